"""The commands that see to it that backups happen: schedule status doctor."""

from __future__ import annotations

import click

from snapshotter.cli.call import Call, common, complete_target
from snapshotter.core.errors import UsageError


@click.group()
def schedule() -> None:
    """Let backups happen by themselves: a timer."""


@schedule.command("install")
@click.argument("node", required=False, shell_complete=complete_target)
@common
def schedule_install(call: Call, node: str | None) -> None:
    """Make systemd, or cron, run `tick` for a node.

    Again after its config has changed."""
    from snapshotter import human
    from snapshotter.verbs import schedule as verb

    document = verb.install(call.session(), node)
    call.answer(document, lambda: human.schedules([document]))


@schedule.command("show")
@click.argument("node", required=False, shell_complete=complete_target)
@common
def schedule_show(call: Call, node: str | None) -> None:
    """Show what is installed, of a node or of all."""
    from snapshotter import human
    from snapshotter.verbs import schedule as verb

    document = verb.show(call.session(), node)
    call.answer(document, lambda: human.schedules(document["schedules"]))


@schedule.command("remove")
@click.argument("node", required=False, shell_complete=complete_target)
@click.option("--all", "every", is_flag=True, help="Every one that is installed.")
@common
def schedule_remove(call: Call, node: str | None, every: bool) -> None:
    """Stop and remove it."""
    from snapshotter.verbs import schedule as verb

    if every and node:
        raise UsageError("--all takes no node", object=node)
    document = verb.remove(call.session(), node, every=every)
    gone = [path for entry in document["removed"] for path in entry["files"]]
    call.answer(document, lambda: "\n".join(f"removed {path}" for path in gone) or "nothing is installed")
