"""Old data set aside on another file system: copied there, seen to be whole, and only then removed, so that there is
room for the new; and copied back for an undo. Must know no journal and no service.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.core.model import Progress, Report
from snapshotter.host import exchange, tree
from snapshotter.host.mirror import Mirror
from snapshotter.host.mounts import is_under
from snapshotter.host.store import readable, told
from snapshotter.verbs.in_place_ways import Ground


def save(ground: Ground, entries: Sequence[str], report: Report) -> None:
    """Copy these entries ('' is the directory itself) to `ground.aside`, a directory that is there and empty. On the
    disk when this returns, with owners, modes and attributes. Raises StorageError, PreconditionError (something could
    not be removed afterwards)."""

    def can_go(at: int, name: str, path: str, _: os.stat_result) -> None:
        if _chosen(path, entries) and tree.locked(at, name):
            raise PreconditionError(
                "can't be moved: it is immutable or append-only",
                object=os.path.join(ground.path, path),
                cure=f"chattr -R -ia {ground.path}",
            )

    for lost in _copy(ground.path, ground.aside, entries, "setting aside", report, seen=can_go):
        raise StorageError(f"{lost} there", object=ground.aside, cure="--aside a directory on another kind of disk")


def remove_saved(ground: Ground, entries: Sequence[str]) -> None:
    """Remove from their place what `save` has copied. Absent is done."""
    for entry in entries:
        path = os.path.join(ground.path, entry).rstrip("/")
        with told(path):
            known = exchange.known(path)
            if known is not None:
                exchange.remove(path, known)


def bring_back(ground: Ground, entries: Sequence[str], report: Report) -> None:
    """The inverse of both: what is in `aside` stands in its place again, made ready beside it first. What a killed
    `remove_saved` has left there goes before that: there may not be room for both, and the copy is whole, and on its
    disk. Raises StorageError."""
    there = [entry for entry in entries if os.path.lexists(os.path.join(ground.aside, entry))]
    remove_saved(ground, entries)
    with told(ground.staged):
        _make(ground.staged)
        _copy(ground.aside, ground.staged, there, "bringing back", report)
    with told(ground.path):
        for entry in there:
            exchange.move(os.path.join(ground.staged, entry).rstrip("/"), os.path.join(ground.path, entry).rstrip("/"))
        exchange.sync_parents([os.path.join(ground.path, entry).rstrip("/") for entry in there])
        if os.path.lexists(ground.staged):
            _remove_tree(ground.staged)


def forget(ground: Ground) -> None:
    """Remove the copy. Absent is done."""
    with told(ground.aside):
        _remove_tree(ground.aside)


def _make(path: str) -> None:
    _remove_tree(path)
    os.mkdir(path, 0o700)


def _remove_tree(path: str) -> None:
    known = exchange.known(path)
    if known is not None:
        exchange.remove(path, known)


def _snapshots(_: int, path: str) -> bool:
    """ZFS's own view of its snapshots (snapdir=visible): each would be mounted by the look, and copied."""
    return path == ".zfs"


def _chosen(path: str, entries: Sequence[str]) -> bool:
    """Whether it is one of the entries, or below or above one."""
    tops = [f"/{entry}" for entry in entries]
    return "" in entries or any(is_under(f"/{path}", top) or is_under(top, f"/{path}") for top in tops)


def _copy(
    source_top: str,
    target_top: str,
    entries: Sequence[str],
    what: str,
    report: Report,
    *,
    seen: Callable[[int, str, str, os.stat_result], None] | None = None,
) -> list[str]:
    """Returns what could not be kept of it. `seen` (`tree.walk`) may refuse before anything is copied."""
    with told(target_top), tree.open_tree(source_top) as source, tree.open_tree(target_top) as target:
        now = tree.walk(source, seen=seen, leave_out=_snapshots)
        now = {path: found for path, found in now.items() if _chosen(path, entries)}
        total = sum(found.size for found in now.values() if stat.S_ISREG(found.mode))
        done = 0

        def step(copied: int) -> None:
            nonlocal done
            done += copied
            report(Progress(what, done, max(done, total)))

        def must_fit() -> None:
            room = os.fstatvfs(target.top)
            if total > (free := room.f_bavail * room.f_frsize):
                raise StorageError(
                    f"{readable(total)} are to go there, and {readable(free)} are free", object=target_top
                )

        made = Mirror(source, target, step=step, must_copy=must_fit)
        made.update(now)
        made.finish(now)
        tree.syncfs(target.top)
        copied = tree.walk(target)
        for path, found in now.items():
            if stat.S_ISSOCK(found.mode):
                continue
            other = copied.get(path)
            whole = other is not None and stat.S_IFMT(other.mode) == stat.S_IFMT(found.mode)
            if other is None or not whole or (stat.S_ISREG(found.mode) and other.size != found.size):
                raise StorageError("was not copied whole", object=os.path.join(source_top, path))
            if path and (other.mode, other.uid, other.gid) != (found.mode, found.uid, found.gid):
                raise StorageError(
                    f"its owner or mode can't be kept in {target_top}", object=os.path.join(source_top, path)
                )
        return made.warnings
