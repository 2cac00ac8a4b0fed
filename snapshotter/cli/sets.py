"""The commands that make, list and judge sets, and end them: take list show verify pin unpin release delete reap."""

from __future__ import annotations

from typing import Any

import click

from snapshotter.cli.call import (
    Call,
    as_budget,
    common,
    complain,
    complete_set,
    complete_target,
    confirm,
    from_host,
    providing,
)
from snapshotter.core.errors import Exit, UsageError, worst


@click.command()
@click.argument("target", required=False, shell_complete=complete_target)
@click.option("--all", "every", is_flag=True, help="Take every node of the config.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the plan, change nothing.")
@click.option(
    "--quiesce",
    type=click.Choice(["auto", "none", "freeze", "pause", "stop", "hooks"]),
    help="How writes are held still (default: what the storage needs).",
)
@click.option(
    "--budget", callback=as_budget, metavar="DURATION", help="How long the writers may be held at most (default 5s)."
)
@click.option(
    "--require",
    type=click.Choice(["crash", "filesystem", "application"]),
    help="Refuse, before anything is touched, if the grade would be lower.",
)
@click.option("--allow-skew", is_flag=True, help="Take it though its volumes are not one instant (never good).")
@click.option("--no-wait", is_flag=True, help="Return once the instant is fixed; the set may still be pending.")
@click.option("--slot", default="", help="Name of the scheduled time: a slot is taken once.")
@providing
@common
def take(
    call: Call,
    target: str | None,
    every: bool,
    dry_run: bool,
    quiesce: str | None,
    budget: float | None,
    require: str | None,
    allow_skew: bool,
    no_wait: bool,
    slot: str,
    provider: str | None,
    options: tuple[str, ...],
) -> None:
    """Make an image of a node's data path, hot."""
    from snapshotter import human
    from snapshotter.verbs import take as verb

    if every and target:
        raise UsageError("--all takes no target", object=target)
    session = call.session(provider, options)
    how: dict[str, Any] = {
        "quiesce": quiesce,
        "budget_s": budget,
        "require": require,
        "allow_skew": allow_skew,
        "dry_run": dry_run,
        "wait": not no_wait,
        "slot": slot,
    }
    if every:
        if not session.config.nodes:
            raise UsageError("the config has no nodes", cure="`snapshotter init PATH --write` adds one")
        document, errors = verb.take_all(session, **how)
        for error in errors:
            complain(f"error: {error.line()}")
        call.answer(document, lambda: "\n".join(human.taken(done) for done in document["sets"]), int(worst(errors)))
        return
    document = verb.take(session, target, **how)
    call.answer(document, lambda: human.plan(document) if dry_run else human.taken(document))


@click.command("list")
@click.argument("target", required=False, shell_complete=complete_target)
@common
def list_command(call: Call, target: str | None) -> None:
    """List the sets, oldest first."""
    from snapshotter import human
    from snapshotter.verbs import list as verb

    document = verb.list_sets(call.session(), target)
    for gone in document["unavailable"]:
        complain(f"warning: not asked: {gone['provider']}: {gone['reason']}")
    call.answer(document, lambda: human.table(document["sets"]))


@click.command()
@click.argument("set_id", metavar="SET", shell_complete=complete_set)
@common
def show(call: Call, set_id: str) -> None:
    """Show one set."""
    from snapshotter import human
    from snapshotter.verbs import list as verb

    document = verb.show(call.session(), set_id)
    call.answer(document, lambda: human.details(document))


@click.command()
@click.argument("what", metavar="SET|TARGET", required=False, shell_complete=complete_set)
@click.option(
    "--level",
    type=click.IntRange(0, 5),
    help="0 the storage's word, 1 the files, 2 the database's structure, 3 every block, 4 the engine opens it "
    "(default: the node's policy, else 2).",
)
@from_host
@common
def verify(call: Call, what: str | None, level: int | None, from_host: bool) -> None:
    """Prove a set by opening a clone of it.

    Of a TARGET its newest good set. What it came to is written on the set."""
    from snapshotter import human
    from snapshotter.verbs import verify as verb

    document = verb.verify(call.session(), what, level=level, from_host=from_host)
    codes = {"ok": Exit.DONE, "corrupt": Exit.JUDGED_BAD, "could-not-run": Exit.REFUSED}
    call.answer(document, lambda: human.verified(document), int(codes.get(document["outcome"], Exit.PRECONDITION)))


def _pin(name: str, pinned: bool, text: str) -> click.Command:
    @click.command(name, help=text)
    @click.argument("set_id", metavar="SET", shell_complete=complete_set)
    @from_host
    @common
    def command(call: Call, set_id: str, from_host: bool) -> None:
        from snapshotter import human
        from snapshotter.verbs import pin as verb

        document = verb.pin(call.session(), set_id, pinned=pinned, from_host=from_host)
        call.answer(document, lambda: human.brief(document))

    return command


pin = _pin("pin", True, "Keep a set whatever happens.")
unpin = _pin("unpin", False, "Let retention decide about a set again.")


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--discard-changes", is_flag=True, help="Drop what was written to the clone.")
@common
def release(call: Call, directory: str, discard_changes: bool) -> None:
    """End what restore made at DIR.

    DIR may also be an attachment's id, as `show SET` names it."""
    from snapshotter.verbs import release as verb

    document = verb.release(call.session(), directory, discard_changes=discard_changes)
    call.answer(
        document, lambda: f"released {document['released']['path'] or directory} (set {document['set_id']} stays)"
    )


@click.command()
@click.argument("set_ids", metavar="SET...", nargs=-1, required=True, shell_complete=complete_set)
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--last", is_flag=True, help="Allow the newest good, or newest verified, set of a target to go.")
@from_host
@common
def delete(call: Call, set_ids: tuple[str, ...], yes: bool, last: bool, from_host: bool) -> None:
    """Delete sets. Wants the full id or a long prefix, never `latest`."""
    from snapshotter import human
    from snapshotter.verbs import delete as verb

    session = call.session()
    chosen = verb.plan(session, list(set_ids), last=last, from_host=from_host)
    confirm(yes, "delete", [found.set_id for found in chosen])
    document = verb.delete(session, [found.set_id for found in chosen], last=last, from_host=from_host)
    for failure in document["failed"]:
        complain(f"error: {failure['set_id']}: {failure['message']}")
    text = "\n".join(f"deleted {human.brief(gone)}" for gone in document["deleted"])
    call.answer(document, lambda: text, int(Exit.REFUSED) if document["failed"] else 0)


@click.command()
@common
def reap(call: Call) -> None:
    """Let go and remove what interrupted runs left behind."""
    from snapshotter import human
    from snapshotter.verbs import reap as verb

    document = verb.reap(call.session())
    call.answer(document, lambda: human.reaped(document))
