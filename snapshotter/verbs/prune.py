"""prune: remove what retention no longer keeps. What stays and why is `nodes.retention`'s; here it is carried out.

Nothing goes on the word of a list that may be old: under the target's lock the sets that must stay are looked at again
before each that goes, and that once more under its own. One that is held, busy or can't be removed doesn't stop the
rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from snapshotter.catalog import Catalog
from snapshotter.core.errors import BusyError, SnapshotterError, UsageError
from snapshotter.core.model import SnapshotSet, State, utc_now
from snapshotter.host.locks import Locks
from snapshotter.host.places import host_name, same_host
from snapshotter.nodes import retention
from snapshotter.nodes.config import Node
from snapshotter.nodes.retention import Verdict
from snapshotter.nodes.target import resolve, target_of
from snapshotter.verbs import open_restores
from snapshotter.verbs.delete import lock_names, remove
from snapshotter.verbs.documents import set_document, when
from snapshotter.verbs.hooks import Around
from snapshotter.verbs.session import Session


class OfTarget(Struct, frozen=True):
    """What prune means to do with one node's sets."""

    node: Node
    target: str
    plan: retention.Plan

    @property
    def going(self) -> list[str]:
        return [verdict.set_id for verdict in self.plan.removals]

    def refusal(self) -> UsageError | None:
        """Why it wants a person's word; None if it doesn't."""
        if not self.plan.many:
            return None
        good = sum(verdict.found.good for verdict in self.plan.verdicts)
        going = sum(verdict.found.good for verdict in self.plan.removals)
        return UsageError(
            f"{going} of its {good} good sets would go",
            object=self.node.name,
            cure=f"`snapshotter prune {self.node.name} --dry-run` shows them, --confirm-many removes them",
        )


class Outcome(Struct):
    """What was done: documents of the sets removed, entries for `failed`, and the errors behind these."""

    removed: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    errors: list[SnapshotterError] = []
    notes: list[str] = []

    def note(self, error: SnapshotterError, node: str, set_id: str | None = None) -> None:
        self.errors.append(error)
        self.failed.append({"node": node, "set_id": set_id, **error.as_json()})


def plan(entries: Catalog, nodes: Sequence[Node], *, automatic: bool = False) -> list[OfTarget]:
    """What would be done with the sets of these nodes. `automatic`: no person has asked."""
    by_target: dict[str, list[SnapshotSet]] = {}
    for found in entries.sets:
        by_target.setdefault(found.birth.target, []).append(found)
    return [plan_of(node, by_target.get(target_of(node), []), automatic=automatic) for node in nodes]


def plan_of(node: Node, sets: Sequence[SnapshotSet], *, automatic: bool = False) -> OfTarget:
    """As `plan`, of one node whose sets (its target's, in the catalog's order) are known."""
    decided = retention.decide(sets, utc_now(), node.keep, host_name(), automatic=automatic, every=node.every)
    return OfTarget(node, target_of(node), decided)


def nodes_of(session: Session, target: str | None) -> list[Node]:
    """The node meant, or all of the config. Its path may be gone."""
    if target is None and session.config.nodes:
        return list(session.config.nodes.values())
    return [resolve(target, session.config, must_exist=False)]


def carry_out(session: Session, of: OfTarget, outcome: Outcome, *, confirm_many: bool = False) -> None:
    """Remove what is to go of one target, what fails is noted in `outcome`."""
    refusal = of.refusal()
    try:
        if refusal is not None and not confirm_many:
            raise refusal
        if not of.going:
            return
        with Locks([f"target:{of.target}"]):
            open_restores.refuse(session, of.target)
            _look_at_guards(session, of)  # before the hook too: it runs only where any goes
            with Around(of.node, "prune", sets=" ".join(of.going)) as around:
                for verdict in of.plan.removals:
                    _look_at_guards(session, of)  # the hook, and each removal, may have taken an hour
                    try:
                        _remove(session, verdict, outcome)
                    except SnapshotterError as error:
                        outcome.note(error, of.node.name, verdict.set_id)
            outcome.notes += around.notes
    except SnapshotterError as error:
        outcome.note(error, of.node.name)


def _look_at_guards(session: Session, of: OfTarget) -> None:
    """Raise BusyError where a set that is to be left when the others are gone was deleted or found bad meanwhile."""
    for guard in of.plan.guards:
        now = session.again(guard)
        if now is None or not now.good or now.verified != guard.verified:
            raise BusyError("was to stay, and isn't what it was a moment ago", object=guard.set_id, cure="prune again")


def _remove(session: Session, verdict: Verdict, outcome: Outcome) -> None:
    found = verdict.found
    with Locks([name for name in lock_names(found) if not name.startswith("target:")]):
        now = session.again(found)
        if now is None:
            return  # somebody else removed it: that is what was to be done
        if now.pinned:
            raise BusyError("was pinned meanwhile", object=found.set_id)
        if now.attachments:
            where = now.attachments[0].path or now.attachments[0].id
            raise BusyError(f"is attached at {where}", object=found.set_id, cure=f"`snapshotter release {where}` first")
        if (now.good, now.verified) > (found.good, found.verified):  # it may be the newest such, and so to stay
            what = "verified" if now.verified else "good"
            raise BusyError(f"is {what}, and wasn't when this was decided", object=found.set_id, cure="prune again")
        if now.state in (State.PENDING, State.UNKNOWN):
            raise BusyError(f"is {now.state} now", object=found.set_id, cure="prune again later")
        remove(session, now)
        outcome.removed.append(set_document(now))


def prune(
    session: Session,
    target: str | None = None,
    *,
    dry_run: bool = False,
    confirm_many: bool = False,
    only: Sequence[str] | None = None,
) -> tuple[dict[str, Any], list[SnapshotterError]]:
    """Apply retention to one node, or to all of the config. Returns the document and the errors behind its `failed`.
    `only`: the ids that a person has agreed to; what else has come to be due meanwhile stays for the next time."""
    nodes = nodes_of(session, target)
    entries = session.catalog(node=nodes[0] if target is not None else None)
    planned = plan(entries, nodes)
    outcome = Outcome()
    for of in planned if not dry_run else ():
        agreed = of if only is None else OfTarget(of.node, of.target, _limited(of.plan, only))
        carry_out(session, agreed, outcome, confirm_many=confirm_many)
    return {
        "dry_run": dry_run,
        "sets": documents(entries, planned, everything=target is None),
        "removed": outcome.removed,
        "failed": outcome.failed,
        "unavailable": [{"provider": gone.provider, "reason": gone.reason} for gone in entries.unavailable],
        "warnings": [*entries.notes, *outcome.notes],
    }, outcome.errors


def _limited(decided: retention.Plan, only: Sequence[str]) -> retention.Plan:
    verdicts = tuple(
        verdict if verdict.keep or verdict.set_id in only else Verdict(verdict.found, True, "not agreed to")
        for verdict in decided.verdicts
    )
    return retention.Plan(verdicts, decided.guards, decided.many)


def documents(entries: Catalog, planned: Sequence[OfTarget], *, everything: bool) -> list[dict[str, Any]]:
    """Each set with keep or remove and the rule; with `everything` also those of no node here."""
    verdicts = {verdict.set_id: verdict for of in planned for verdict in of.plan.verdicts}
    shown = []
    for found in entries.sets:
        verdict = verdicts.get(found.set_id)
        if verdict is None:
            if not everything:
                continue
            ours = same_host(found.birth.host, host_name())
            verdict = Verdict(found, True, "no node of the config" if ours else "another host's")
        shown.append(
            {
                "set_id": found.set_id,
                "node": found.birth.node,
                "taken_at": when(found.birth.taken_at),
                "state": str(found.state),
                "good": found.good,
                "keep": verdict.keep,
                "rule": verdict.rule,
                "future": verdict.future,
            }
        )
    return shown
