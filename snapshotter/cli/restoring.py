"""The commands that bring a set back: restore and resync."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from snapshotter.cli.call import Call, ask, common, complete_set, complete_target, confirm, from_host, provider_options
from snapshotter.core.errors import UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from snapshotter.verbs.session import Session


def complete_set_or_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What restore takes: a set, or, to end what one began, a target."""
    if any(ctx.params.get(name) for name in ("go_on", "undo", "discard")):
        return complete_target(ctx, param, incomplete)
    return complete_set(ctx, param, incomplete)


def in_place(function: Callable[..., None]) -> Callable[..., None]:
    """The options of whatever changes the live data."""
    for option in (
        click.option("--yes", is_flag=True, help="Don't ask."),
        click.option("--sign-state-from-set", "from_set", is_flag=True,
                     help="Dangerous: where a validator's signing record can't be compared, believe the incoming one."),
        click.option("--aside", metavar="DIR", help="Set the old data aside in DIR, which may be on another disk."),
        click.option("-n", "--dry-run", is_flag=True, help="Print what would be put where, change nothing."),
    ):  # fmt: skip
        function = option(function)
    return function


@click.command()
@click.argument("set_id", metavar="[SET|TARGET]", required=False, shell_complete=complete_set_or_target)
@click.option("--to", metavar="DIR", help="Make a writable clone at DIR (absent or empty).")
@click.option("--mount", metavar="DIR", help="Mount the image read-only at DIR (absent or empty).")
@click.option("--away", is_flag=True, help="Make its volumes for another machine (-o zone=, instance=).")
@click.option("--in-place", "live", is_flag=True, help="Put it in place of the live data, which is set aside.")
@click.option("--only", type=click.Choice(["database", "key"]), help="In place: only this part of the node.")
@click.option("--identity", type=click.Choice(["set", "live"]), help="In place: whose key stands there afterwards.")
@click.option("--yes-original-is-stopped", "alone", is_flag=True, help="No other node runs with this validator's key.")
@click.option("--continue", "go_on", is_flag=True, help="Go on with TARGET's interrupted restore.")
@click.option("--undo", is_flag=True, help="Put TARGET's old data back.")
@click.option("--discard", is_flag=True, help="Remove TARGET's old data: there is no undo then.")
@click.option("--with-identity", is_flag=True, help="Leave the node's keys in the clone of --to.")
@in_place
@from_host
@provider_options
@common
def restore(call: Call, set_id: str | None, **given: Any) -> None:
    """Make a set usable: beside its origin, on another machine, or in its place.

    --to and --mount don't touch the origin; `release DIR` ends them. --in-place proves the set, stops the node, sets
    the old data aside, puts the set's there, and starts the node; until --discard it can be undone."""
    ways = [name for name in ("to", "mount", "away", "live", "go_on", "undo", "discard") if given[name]]
    shown = {"live": "--in-place", "go_on": "--continue"}
    if len(ways) != 1:
        cure = "one of --to DIR, --mount DIR, --away, --in-place; to end one: --continue, --undo, --discard"
        raise UsageError("give one way to restore", object=set_id or "", cure=cure)
    way = ways[0]
    goes_with = {
        "only": "live", "aside": "live", "identity": "live", "alone": "live", "with_identity": "to",
        "from_set": "live undo", "dry_run": "to mount live", "yes": "live discard", "from_host": "to mount away live",
        "options": "to mount away",
    }  # fmt: skip
    for name, those in goes_with.items():
        if given[name] and way not in those.split():
            option = {"alone": "--yes-original-is-stopped", "from_set": "--sign-state-from-set", "options": "-o"}
            option_name = option.get(name, f"--{name.replace('_', '-')}")
            raise UsageError(f"{option_name} doesn't go with {shown.get(way, '--' + way)}")
    if way in ("go_on", "undo", "discard"):
        _end_restore(call, set_id, way, given)
        return
    if set_id is None:
        raise UsageError("give a set", cure="`snapshotter list` shows them; `latest` is the newest good one")
    if way == "live":
        from snapshotter.verbs import in_place as verb

        how = {"only": given["only"] or "", "aside": given["aside"], "choice": given["identity"] or ""}
        how |= {"from_set": given["from_set"], "from_host": given["from_host"], "measure": given["dry_run"]}
        session = call.session()
        plan = verb.plan(session, set_id, **how)
        _put_in_place(call, session, plan, given)
        return
    from snapshotter import human
    from snapshotter.core.model import Access
    from snapshotter.verbs import restore as beside
    from snapshotter.verbs import restore_away as away

    if way == "away":
        made = away.restore_away(call.session(options=given["options"]), set_id, from_host=given["from_host"])
        call.answer(made, lambda: human.restored_away(made))
        return
    access = Access.WRITABLE if way == "to" else Access.READ_ONLY
    rest: dict[str, Any] = {name: given[name] for name in ("from_host", "dry_run", "with_identity")}
    document = beside.restore(call.session(options=given["options"]), set_id, given[way], access, **rest)
    call.answer(document, lambda: human.restored(document, given["dry_run"]))


def _put_in_place(call: Call, session: Session, plan: Any, given: Mapping[str, Any]) -> None:
    from snapshotter import human
    from snapshotter.verbs import in_place as verb

    alone = "--yes-original-is-stopped"
    if given["dry_run"]:
        document = plan.document()
        if plan.wants_alone:
            asked = f"that every other node with {plan.whose_key} is stopped, by {alone}"
            document["warnings"] += [f"it will want to be told {asked}: two that run equivocate"]
        call.answer(document, lambda: human.in_place_plan(document))
        return
    if plan.wants_alone:
        key = plan.whose_key
        question = f"two nodes that run with one key equivocate: is every other node with {key} stopped?"
        unasked = f"two nodes that run with one key equivocate: every other node with {key} must be stopped"
        ask(given["alone"], question, unasked, plan.path, alone)
    confirm(given["yes"], human.question_in_place(plan.document()), [plan.path])
    document = verb.carry_out(session, plan)
    call.answer(document, lambda: human.in_place(document))


def _end_restore(call: Call, target: str | None, way: str, given: Mapping[str, Any]) -> None:
    from snapshotter import human
    from snapshotter.verbs import in_place as verb

    session = call.session()
    if way == "discard":
        confirm(given["yes"], "remove for good", verb.to_discard(session, target))
        document = verb.discard(session, target)
    elif way == "undo":
        document = verb.undo(session, target, from_set=given["from_set"])
    else:
        document = verb.go_on(session, target)
    call.answer(document, lambda: human.in_place(document))


@click.command()
@click.argument("target", required=False, shell_complete=complete_target)
@in_place
@common
def resync(call: Call, target: str | None, **given: Any) -> None:
    """Set a node's database aside; it syncs anew from its peers.

    Its keys stay. As a restore in place it can be undone until `restore --discard TARGET`."""
    from snapshotter.verbs import in_place as verb

    session = call.session()
    how = {"aside": given["aside"], "from_set": given["from_set"], "measure": given["dry_run"]}
    plan = verb.plan_resync(session, target, **how)
    _put_in_place(call, session, plan, given)
