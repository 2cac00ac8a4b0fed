"""The commands that keep a node's sets as its policy asks: prune tick."""

from __future__ import annotations

import click

from snapshotter.cli.call import Call, common, complain, complete_target, confirm, in_seconds, providing
from snapshotter.core.errors import Exit, UsageError, worst


@click.command()
@click.argument("target", required=False, shell_complete=complete_target)
@click.option("-n", "--dry-run", is_flag=True, help="Print every set, whether it stays, and the rule.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--confirm-many", is_flag=True, help="Let more than half of a node's good sets go.")
@common
def prune(call: Call, target: str | None, dry_run: bool, yes: bool, confirm_many: bool) -> None:
    """Remove what retention no longer keeps, of one node or of all."""
    from snapshotter import human
    from snapshotter.verbs import prune as verb

    session = call.session()
    only = None
    if not dry_run:
        planned = verb.plan(session.catalog(), verb.nodes_of(session, target))
        only = [set_id for of in planned for set_id in of.going]
        if only:
            confirm(yes, "remove", only)
        if not yes and not confirm_many:
            many = [refusal for of in planned if (refusal := of.refusal()) is not None]
            if many:
                confirm(False, "go on although", [refusal.line() for refusal in many], "--confirm-many")
                confirm_many = True
    document, errors = verb.prune(session, target, dry_run=dry_run, confirm_many=confirm_many, only=only)
    if errors and not document["removed"] and len(errors) == 1:
        raise errors[0]
    for error in errors:
        complain(f"error: {error.line()}")
    for gone in document["unavailable"]:
        complain(f"warning: not asked: {gone['provider']}: {gone['reason']}")
    call.answer(document, lambda: human.pruned(document), int(Exit.REFUSED) if document["failed"] else 0)


@click.command()
@click.argument("target", metavar="[NODE]", required=False, shell_complete=complete_target)
@click.option("--deadline", callback=in_seconds, metavar="DURATION", help="Begin nothing after so long (10m).")
@click.option("--slot", default="", help="Name of the scheduled time that is due, instead of the node's own.")
@providing
@common
def tick(
    call: Call, target: str | None, deadline: float | None, slot: str, provider: str | None, options: tuple[str, ...]
) -> None:
    """Do what is due now: take, verify, prune, reap. What a timer calls.

    Of one node, or of all. May run as often as you like."""
    from snapshotter import human
    from snapshotter.verbs import tick as verb
    from snapshotter.verbs.prune import nodes_of

    if slot and target is None:
        raise UsageError("is one node's", object=f"--slot {slot}", cure="name the node")
    session = call.session(provider, options)
    if target is None and not session.config.nodes:
        raise UsageError("the config has no nodes", cure="`snapshotter init PATH --write` adds one")
    document, errors = verb.tick(session, nodes_of(session, target), deadline_s=deadline, slot=slot)
    for error in errors:
        complain(f"error: {error.line()}")
    call.answer(document, lambda: human.ticked(document), int(worst(errors)))
