"""reap: remove what an interrupted run left behind, and let go what it still holds.

Only unsealed sets of this host whose deadline is past and whose locks are free, half-made and `verify` attachments of
dead runs, what a driver alone can see of its dead runs, and dead runs' pauses and freezes. Never a pinned, pending,
damaged or unknown set, never a person's clone.
"""

from __future__ import annotations

import os
from typing import Any

from snapshotter.catalog import Catalog, Unavailable
from snapshotter.core.errors import BusyError, SnapshotterError, UndoIncompleteError
from snapshotter.core.model import Attachment, Purpose, State, utc_now
from snapshotter.host import mounts, processes, quiesce
from snapshotter.host.locks import Locks
from snapshotter.host.places import host_name, same_host
from snapshotter.provider import resume
from snapshotter.verbs.delete import lock_names, remove
from snapshotter.verbs.documents import grouped
from snapshotter.verbs.release import mounted_of, placed, places_of, refuse_foreign_mount, tidy
from snapshotter.verbs.session import Session


def reap(session: Session, entries: Catalog | None = None) -> dict[str, Any]:
    """Returns what was let go and removed, and what is kept for now and why. `entries`: the catalog, if it was read
    just now; what is to go is looked at again anyway. Raises UndoIncompleteError if something of a dead run could not
    be undone."""
    let_go = resume()
    left: list[str] = []
    try:
        let_go += quiesce.reap()
    except UndoIncompleteError as error:  # one that is stuck keeps no other leftover
        left += error.left
    providers, gone = session.everywhere()
    kept: list[dict[str, str]] = []
    removed: list[str] = []
    released: list[str] = []
    notes: list[str] = []
    for provider in providers:
        listed: list[Attachment] = []
        try:
            for each in provider.attachments():  # what is listed before an error counts
                listed.append(each)
        except SnapshotterError as error:
            gone.append(Unavailable(provider.name, error.line()))
        for parts in grouped(tuple(listed)):
            dead = any(part.since is None or part.purpose is Purpose.VERIFY for part in parts)
            if not dead or any(part.held for part in parts):
                continue
            try:
                trees = {part.path for part in parts if part.tree}
                places = places_of(placed(session, parts), parts)
                mounted = mounted_of(places, [(provider, part) for part in parts], listed)
                for path in [path for path in places if os.path.lexists(path)]:
                    refuse_foreign_mount(path, trees)
                    if path not in mounted and path not in trees:
                        continue
                    if users := processes.users_of(path):
                        raise BusyError(f"is in use by {processes.named(users)}", object=path)
                for path in mounted:
                    mounts.unmount(path)
                provider.detach(parts[0].id)
                tidy(places, parts[0].id)
                notes += provider.notes
                released.append(parts[0].id)
            except BusyError as error:
                kept.append({"set_id": parts[0].set_id, "reason": f"its attachment {parts[0].id}: {error.line()}"})
            except SnapshotterError as error:
                left.append(f"{parts[0].id}: {error.line()}")
    for found in (entries or session.catalog()).sets:
        if found.state is not State.INCOMPLETE:
            continue
        if not same_host(found.birth.host, host_name()):
            kept.append({"set_id": found.set_id, "reason": f"it is being taken, or was left, by {found.birth.host}"})
        elif found.received:
            kept.append({"set_id": found.set_id, "reason": "it is a replica, or its pool was renamed"})
        elif found.pinned:  # somebody wants what there is of it
            kept.append({"set_id": found.set_id, "reason": "it is pinned"})
        elif utc_now() < found.birth.deadline:
            kept.append({"set_id": found.set_id, "reason": "its deadline is not past"})
        else:
            try:
                with Locks(lock_names(found)):
                    # Looked at again: it may have been sealed just before the lock came free.
                    now = [entry for entry in session.catalog(found.set_id).sets if entry.set_id == found.set_id]
                    if now and now[0].state is State.INCOMPLETE and not now[0].pinned:
                        remove(session, now[0])
                        removed.append(found.set_id)
            except BusyError as error:
                kept.append({"set_id": found.set_id, "reason": error.line()})
            except SnapshotterError as error:
                left.append(f"{found.set_id}: {error.line()}")
    scratch: list[str] = []
    for provider in providers:
        provider.notes = []  # those of what it did before are told
        try:
            scratch += provider.reap()
            notes += provider.notes
        except SnapshotterError as error:
            left.append(f"{provider.name}: {error.line()}")
    if left:
        raise UndoIncompleteError("not everything could be reaped", left=left, cure="mend that and reap again")
    return {
        "let_go": let_go,
        "removed": removed,
        "released": sorted(set(released)),
        "scratch": scratch,
        "kept": kept,
        "unavailable": [{"provider": entry.provider, "reason": entry.reason} for entry in dict.fromkeys(gone)],
        "warnings": notes,
    }
