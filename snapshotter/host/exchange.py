"""New content for old, entry by entry: what stands at a place and what was made ready for it change places, and back.
Must know no node, set or provider.

Who is who is asked of the disk, by inode number and time of birth, never guessed from how far a run had come: so every
call here works from whatever half state a killed one left, and may be made again.

Source: renameat2(2). RENAME_EXCHANGE is one step for the file system: at no instant is the place empty.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterable

from msgspec import Struct

from snapshotter.core.errors import BusyError, StorageError
from snapshotter.host import btrfs, mirror, tree

#: What a file system says that doesn't know the flag (ZFS before 2.2, some network ones).
_NO_SUCH_FLAG = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}

Known = tuple[int, int]


class Unit(Struct, frozen=True):
    """One entry that changes places. `old` is what stood at `place`, `new` what was made ready at `staged` (None:
    nothing); the old goes to `aside`. All on one file system; the directory of `aside` is made when it is needed."""

    place: str
    staged: str
    aside: str
    old: Known | None
    new: Known | None


def known(path: str) -> Known | None:
    """What names the entry itself (a link isn't followed) for as long as it lives, wherever it is renamed to; None if
    there is none. Raises OSError."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = os.fstat(fd)
        return found.st_ino, tree.born_ns(fd)  # never the device's number: it changes with a boot or a mount
    finally:
        os.close(fd)


def move(source: str, target: str) -> None:
    """rename(2) that never replaces. Raises OSError (FileExistsError)."""
    try:
        btrfs.rename(-100, source, -100, target)  # AT_FDCWD: both are absolute
    except OSError as error:
        if error.errno not in _NO_SUCH_FLAG:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        os.rename(source, target)


def _swap(one: str, other: str, between: str) -> None:
    """Both change places; where that can't be one step, by way of the free name `between`."""
    try:
        btrfs.rename(-100, one, -100, other, exchange=True)
    except OSError as error:
        if error.errno not in _NO_SUCH_FLAG:
            raise
        _make_parent(between)
        move(one, between)
        move(other, one)


def forward(unit: Unit) -> None:
    """Put the new one in its place and the old one aside. Raises BusyError (something else stands there), StorageError,
    OSError."""
    here = known(unit.place)
    if unit.new is None:
        if here is not None and here != unit.old:
            raise _foreign(unit.place)
        if here is not None:
            _make_parent(unit.aside)
            move(unit.place, unit.aside)
    elif here != unit.new:
        if known(unit.staged) != unit.new:
            raise StorageError("what was made ready is gone", object=unit.staged)
        if here is None:
            _make_like(os.path.dirname(unit.staged), os.path.dirname(unit.place))
            move(unit.staged, unit.place)
        elif here == unit.old:
            _make_parent(unit.aside)
            _swap(unit.place, unit.staged, unit.aside)
        else:
            raise _foreign(unit.place)
    if unit.old is not None and known(unit.staged) == unit.old:
        move(unit.staged, unit.aside)


def _foreign(place: str) -> BusyError:
    return BusyError("something else was put there meanwhile", object=place, cure="see who did, and move it away")


def where_old(unit: Unit) -> str | None:
    """Where the old one is now; None if it isn't in any of its places."""
    if unit.old is None:
        return None
    return next((path for path in (unit.place, unit.aside, unit.staged) if known(path) == unit.old), None)


def where_new(unit: Unit) -> str | None:
    """As `where_old`, of the new one."""
    if unit.new is None:
        return None
    return next((path for path in (unit.place, unit.staged, unit.aside) if known(path) == unit.new), None)


def back(unit: Unit, *, ran: bool) -> None:
    """The old one stands in its place again; what stood there is at `staged` or `aside` (`remove_new`). `ran`: the node
    ran on the new one, and may have made it anew by a rename, as programs do with small files: then whatever is there
    is its. Raises BusyError (something else stands there), StorageError, OSError."""
    here = known(unit.place)
    if unit.old is None:
        made = here != unit.new and known(unit.staged) == unit.new  # by the node, before the new one came there: stays
        if here is not None and (ran or here == unit.new) and not made:
            if os.path.lexists(unit.staged):
                raise _foreign(unit.staged)
            _make_parent(unit.staged)
            move(unit.place, unit.staged)
        return
    if here == unit.old:
        return
    where = where_old(unit)
    if where is None:
        raise StorageError("what was set aside is gone", object=unit.aside)
    if here is None:
        move(where, unit.place)
    elif ran or here == unit.new:
        _swap(unit.place, where, unit.staged if where != unit.staged else unit.aside)
    else:
        raise _foreign(unit.place)


def refuse_alone(unit: Unit) -> None:
    """Raise StorageError where the old one stands in its place, and of the new one, that there was, nothing is left:
    who moves that away has neither. Raises OSError."""
    there = unit.old is not None and known(unit.place) == unit.old
    if there and unit.new is not None and taken(unit) is None:
        raise StorageError(
            "is the old one, and what was restored is gone",
            object=unit.place,
            cure=f"put that back to {unit.aside}, then the same again",
        )


def taken(unit: Unit) -> str | None:
    """Where the new one is, or whatever the node had made of it, that `back` took from the place."""
    # Where there was no old one, nothing has ever been moved to `aside`.
    places = (unit.staged, unit.aside) if unit.old is not None else (unit.staged,)
    return where_new(unit) or next((path for path in places if known(path) not in (None, unit.old)), None)


def back_again(unit: Unit) -> None:
    """The inverse of `back`, before `remove_new`: what it took from the place stands there again, also where the old
    one is gone by now. Raises StorageError (`refuse_alone`), OSError."""
    here = known(unit.place)
    if here not in (None, unit.old):
        return
    refuse_alone(unit)
    where = taken(unit)
    if where is None and here is not None:  # there was none, or the node had removed it
        _make_parent(unit.aside)
        move(unit.place, unit.aside)
    elif where is not None and here is None:
        move(where, unit.place)
    elif where is not None:
        _swap(unit.place, where, unit.staged if where != unit.staged else unit.aside)
        if known(unit.staged) == unit.old:
            move(unit.staged, unit.aside)


def is_back(unit: Unit) -> bool:
    """After `back`: False if there was none, and somebody has made one. Raises StorageError if it isn't the old one."""
    here = known(unit.place)
    if here != unit.old and (unit.old is not None or here == unit.new):
        raise StorageError("the old one is not in its place, so nothing is removed", object=unit.place)
    return here == unit.old


def remove_new(unit: Unit, *, ran: bool) -> list[str]:
    """Remove the new one, once each old one `is_back`: the old run may go on with that, and make it anew; returns what
    is kept because it is neither. Raises OSError, BusyError."""
    kept = []
    for path in (unit.staged, unit.aside):
        found = known(path)
        # Where there is no old one, only the new one itself is ours to remove from `aside`: there was none, and nothing
        # has ever been moved there, or the old run has removed it since it was back.
        if found is None or (path == unit.aside and unit.old is None and found != unit.new):
            continue
        if found == unit.old or not (ran or found == unit.new):
            kept.append(path)
        else:
            remove(path, found)
    return kept


def remove_old(unit: Unit) -> None:
    """Remove what was set aside, if it is that. Absent is done. Raises OSError, BusyError."""
    if unit.old is not None and known(unit.aside) == unit.old:
        remove(unit.aside, unit.old)


def remove(path: str, which: Known) -> None:
    """Remove the entry, with all below it, if it is the very one. Absent is done. Raises BusyError (something is
    mounted in it), OSError."""
    if known(path) != which:
        return
    if stat.S_ISDIR(os.lstat(path).st_mode):
        mirror.remove_clone(path, mirror.directory_identity(path), made=True)
    else:
        os.unlink(path)


def locked(path: str) -> bool:
    """Whether nobody, root neither, can rename or remove the entry (chattr +i, +a)."""
    return tree.locked(-100, path)  # AT_FDCWD


def locked_below(top: str) -> str | None:
    """The first such entry at or below it."""
    below = (os.path.join(at, name) for at, *names in os.walk(top) for name in sorted(names[0] + names[1]))
    return next((path for path in itertools.chain([top], below) if locked(path)), None)


def remove_empty(paths: Iterable[str], top: str) -> None:
    """Remove the directories above these paths, up to and with `top`, that are empty."""
    above = {top}
    for path in paths:
        directory = os.path.dirname(path)
        while directory.startswith(top + "/"):
            above.add(directory)
            directory = os.path.dirname(directory)
    for directory in sorted(above, key=len, reverse=True):
        try:
            os.rmdir(directory)
        except OSError:
            continue


def sync_parents(paths: Iterable[str]) -> None:
    """What was renamed below these directories stays so after a power cut. Raises OSError."""
    for directory in sorted({os.path.dirname(path) for path in paths}):
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def missing_above(path: str) -> list[str]:
    """The directories above `path` that aren't there, the deepest first."""
    found = []
    while not os.path.isdir(path := os.path.dirname(path)):
        found.append(path)
    return found


def _make_like(like: str, directory: str) -> None:
    """The directory, and those above it, as they were made ready: the node's own, not root's."""
    if os.path.isdir(directory):
        return
    _make_like(os.path.dirname(like), os.path.dirname(directory))
    found = os.stat(like)
    os.mkdir(directory, 0o700)
    if os.geteuid() == 0:
        os.chown(directory, found.st_uid, found.st_gid)
    os.chmod(directory, stat.S_IMODE(found.st_mode))


def _make_parent(path: str) -> None:
    """The directory that an entry set aside goes to: private, whatever is put into it."""
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        os.makedirs(parent, mode=0o700)
