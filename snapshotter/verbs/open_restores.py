"""The guard: while a restore in place of a target is open, nothing else may change it. Must stay quick to import, as
every mutating verb asks; the work itself is in `in_place`.
"""

from __future__ import annotations

import os

from snapshotter.core.errors import BusyError, SnapshotterError
from snapshotter.verbs.session import Session

#: What `refuse` says; doctor lists it among the leftovers, in the same words, so that it is said once.
OPEN = "a restore in place is under way, or was interrupted"


def directory(session: Session) -> str:
    """Where the journals are."""
    return os.path.join(session.config.state, "restores")


def path_of(session: Session, target: str) -> str:
    return os.path.join(directory(session), target + ".journal")


def refuse(session: Session, target: str, *, finished: bool = False) -> None:
    """Raise BusyError while a restore of this target is open; with `finished`, also while its old data waits to be
    discarded."""
    where = path_of(session, target)
    if not os.path.exists(where):
        return
    from snapshotter.core.journal import Journal

    try:
        journal = Journal.load(where)
    except SnapshotterError as error:
        raise BusyError(error.message, object=where, cure=error.cure) from None
    if journal is None:
        return
    path = str(journal.facts.get("path", target))
    if journal.has("restored") and not journal.has("undo", "returned"):
        if finished:
            raise BusyError(
                "the old data of its last restore is still set aside",
                object=path,
                cure=f"snapshotter restore --discard {path} removes it, snapshotter restore --undo {path} puts it back",
            )
        return
    raise BusyError(
        OPEN,
        object=path,
        cure=f"snapshotter restore --continue {path}, or snapshotter restore --undo {path}",
    )
