"""The commands that see to it that backups happen: status schedule doctor."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from snapshotter.cli.call import Call, common, complete_target
from snapshotter.core.errors import Exit, SnapshotterError, UsageError

if TYPE_CHECKING:
    from snapshotter.verbs.session import Session


@click.command()
@click.argument("target", required=False, shell_complete=complete_target)
@click.option("--prometheus", metavar="FILE", help="Also write it for node_exporter's textfile collector.")
@click.option("--nagios", is_flag=True, help="One line and 0, 1, 2 or 3, as Nagios and its kind want it.")
@common
def status(call: Call, target: str | None, prometheus: str | None, nagios: bool) -> None:
    """Say whether every node is backed up as it should be.

    Exit 8 if one isn't: stale, damaged, no timer, no room."""
    from snapshotter import human
    from snapshotter.verbs import status as verb

    if nagios and call.as_json:
        raise UsageError("--nagios and --json contradict one another", object="status")
    try:
        document = verb.status(call.session(), target)
        if prometheus is not None:
            from snapshotter.cli import metrics

            metrics.write(document, prometheus)
    except SnapshotterError as error:
        if not nagios:
            raise
        click.echo(f"SNAPSHOTTER UNKNOWN: {error.line()}".replace("|", "/"))
        sys.exit(3)
    if nagios:
        line, code = human.nagios(document)
        click.echo(line)
        sys.exit(code)
    call.answer(document, lambda: human.status(document), int(Exit.JUDGED_BAD) if document["worst"] else 0)


@click.command()
@click.argument("target", required=False, shell_complete=complete_target)
@common
def doctor(call: Call, target: str | None) -> None:
    """Find what would hurt at three in the morning.

    Exit 8 if there is anything; each finding has its cure."""
    from snapshotter import human
    from snapshotter.verbs import doctor as verb

    session: Session | SnapshotterError
    try:
        session = call.session()
    except SnapshotterError as error:
        session = error
    document = verb.doctor(call.config, session, target)
    call.answer(document, lambda: human.findings(document), 0 if document["ok"] else int(Exit.JUDGED_BAD))


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
