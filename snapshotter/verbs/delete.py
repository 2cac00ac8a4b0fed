"""delete: remove a set on a person's word. Never the last good one by mistake, never a pinned or attached one."""

from __future__ import annotations

from typing import Any

from snapshotter.catalog import Catalog
from snapshotter.core.errors import BusyError, SnapshotterError, UsageError
from snapshotter.core.model import SnapshotSet, State
from snapshotter.host.locks import Locks
from snapshotter.verbs import open_restores
from snapshotter.verbs.documents import set_document
from snapshotter.verbs.session import Session


def lock_names(found: SnapshotSet) -> list[str]:
    """What must not be worked on while this set goes: the set, its volumes (a take may be sharing from it), its
    target."""
    birth = found.birth
    return [f"set:{found.set_id}", f"target:{birth.target}", *(f"{m.provider}:{m.volume}" for m in birth.members)]


def check(entries: Catalog, found: SnapshotSet, *, last: bool) -> None:
    """Raise if this set must stay. BusyError: pinned or attached; UsageError: the last good or verified one."""
    if found.pinned:
        raise BusyError("is pinned", object=found.set_id, cure=f"`snapshotter unpin {found.set_id}` first")
    if found.attachments:
        where = found.attachments[0].path or found.attachments[0].id
        raise BusyError(f"is attached at {where}", object=found.set_id, cure=f"`snapshotter release {where}` first")
    for kind, newest in (
        ("good", entries.newest_good(found.birth.target)),
        ("verified", entries.newest_verified(found.birth.target)),
    ):
        if newest is not None and newest.set_id == found.set_id and not last:
            raise UsageError(f"is the newest {kind} set of its target", object=found.set_id, cure="--last deletes it")
    if found.state is State.UNKNOWN and found.sealed and not last and entries.may_be_newest(found):
        raise UsageError(
            f"may be the newest good set of its target: {found.why}",
            object=found.set_id,
            cure="--last deletes what is here of it",
        )


def plan(session: Session, selectors: list[str], *, last: bool, from_host: bool) -> list[SnapshotSet]:
    """The sets that would go, each looked at before any of them is touched."""
    entries = session.catalog()
    chosen: dict[str, SnapshotSet] = {}
    for selector in selectors:
        if selector.startswith("latest"):
            raise UsageError("delete takes no `latest`", object=selector, cure="give the set's id")
        found = entries.pick(selector, careful=True, from_host=from_host)
        open_restores.refuse(session, found.birth.target)
        check(entries, found, last=last)
        chosen[found.set_id] = found
    return list(chosen.values())


def delete(session: Session, selectors: list[str], *, last: bool = False, from_host: bool = False) -> dict[str, Any]:
    """Delete these sets. All are checked before the first is touched, and each again under its lock. One that fails
    then doesn't stop the rest: the document's `failed` names it. If none was deleted, its error is raised."""
    gone: list[dict[str, Any]] = []
    errors: list[SnapshotterError] = []
    failed = []
    for found in plan(session, selectors, last=last, from_host=from_host):
        try:
            with Locks(lock_names(found)):
                entries = session.catalog()
                now = next((entry for entry in entries.sets if entry.set_id == found.set_id), None)
                if now is None:
                    continue  # somebody else deleted it: that is what was asked for
                open_restores.refuse(session, now.birth.target)
                check(entries, now, last=last)
                remove(session, now)
                gone.append(set_document(now))
        except SnapshotterError as error:
            errors.append(error)
            failed.append({"set_id": found.set_id, **error.as_json()})
    if errors and not gone:
        raise errors[0]
    return {"deleted": gone, "failed": failed}


def remove(session: Session, found: SnapshotSet) -> None:
    """The deletion itself, for who holds the locks and has checked. A set of several members loses its seal
    first, so that one killed half way is a leftover for reap, not a damaged backup. Where that can't be written (the
    store is full) it goes all the same: only a deletion makes room, and one killed half way is shown as incomplete."""
    holding = session.providers_of(found)
    try:
        if len(found.birth.members) > 1 and found.sealed:
            try:
                for provider in holding:
                    provider.mark(found.set_id, {"sealed": None})
            except SnapshotterError:
                if len(holding) > 1:  # none goes where another's may not
                    raise
        for provider in holding:
            provider.delete(found.set_id)
    except SnapshotterError:
        there = [(provider, list(provider.snapshots(found.set_id))) for provider in holding]
        here = {
            (part.provider, part.birth.member) for _, snapshots in there for part in snapshots
        }  # more than once, maybe
        if found.sealed and here == {(part.provider, part.birth.member) for part in found.snapshots}:
            for provider, snapshots in there:  # refused, and all of it is there: as good as before
                if any("sealed" not in snapshot.marks for snapshot in snapshots):
                    provider.mark(found.set_id, {"sealed": found.marks["sealed"]})
        raise
