"""A scheduled time is taken once, whoever tries: two runs at once, on two hosts, with clocks that disagree.

No store can compare and set. So each maker, its image made and not yet sealed, lists the slot. A sealed set has it;
else the smallest set id gets it, and the makers of the others delete their own. The smallest waits until they are gone,
as one of them may have looked before it was there: a set that was made later never takes what is being sealed.
"""

from __future__ import annotations

import time

from snapshotter import catalog
from snapshotter.core.errors import BusyError, SnapshotterError, StorageError
from snapshotter.core.model import Grade, SnapshotSet, State, utc_now
from snapshotter.verbs import plan_outside
from snapshotter.verbs.plan import Plan, SlotTakenError
from snapshotter.verbs.session import Session

_LOOK_S = 0.2
#: A rival's deadline is by its own clock: longer than this nobody is waited for.
_PATIENCE_S = 150.0


def counts(found: SnapshotSet) -> bool:
    """Whether this set, of a slot, is its backup: good, or likely to be when the store is done or can be asked."""
    waiting = (
        found.state in (State.PENDING, State.UNKNOWN)
        and found.sealed
        and found.grade is not Grade.SKEWED
        and not found.corrupt
    )
    return found.good or waiting


def being_made(found: SnapshotSet) -> bool:
    """Whether its maker may still live."""
    return found.state in (State.INCOMPLETE, State.UNKNOWN) and not found.sealed and utc_now() <= found.birth.deadline


def refuse_taken(session: Session, plan: Plan) -> None:
    """Raise SlotTakenError if a set has this slot, StorageError if that can't be known."""
    for found in _rivals(session, plan):
        if counts(found):
            raise SlotTakenError(found)


def win(session: Session, plan: Plan) -> None:
    """Return when the slot is ours to seal; else raise SlotTakenError, or BusyError while another is making it."""
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        rivals = [found for found in _rivals(session, plan) if found.set_id != plan.set_id]
        for found in rivals:
            if counts(found):
                raise SlotTakenError(found)
        alive = [found for found in rivals if being_made(found)]
        if not alive:
            return
        first = min(alive, key=lambda found: found.set_id)
        if first.set_id < plan.set_id or time.monotonic() > give_up:
            raise BusyError(f"slot {plan.birth.slot} is being taken by {first.birth.host}", object=first.set_id)
        time.sleep(_LOOK_S)


def _rivals(session: Session, plan: Plan) -> list[SnapshotSet]:
    providers, gone = session.everywhere(plan.node)
    mine = {provider.name: provider for provider in plan.providers}
    # What sees where this set would go must answer: the plan's own instances, or where the session lists only namesakes
    # of one, these. Another's place (the store of another node's copies) may be away.
    unlisted = mine.keys() - {each.name for each in providers if each is mine.get(each.name)}
    needed = [each for each in providers if each.name in unlisted or each is mine.get(each.name)]
    slot = (plan.birth.target, plan.birth.slot)
    try:
        for entry in gone:
            if entry.provider in unlisted:
                raise StorageError(entry.reason, object=entry.provider)
        found = catalog.read(providers, gone, slot=slot, needed=needed).sets
    except SnapshotterError as error:
        raise StorageError(
            f"can't be asked whether the slot {plan.birth.slot} was taken: {error.line()}",
            object=", ".join(mine),
            cure="the next tick tries again",
        ) from None
    if plan.node.select is None:
        return found
    wanted = plan_outside.disks(plan.volumes)  # whoever has a node of this name: one target
    return [each for each in found if plan_outside.is_of(each, wanted)]
