"""Who may write below a directory by mode and ACL, who can come to it at all, and whether anybody has a file open for
writing: what can be said of processes that we may not look into. Knows nothing of /proc.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import struct
from collections.abc import Sequence

from msgspec import Struct


def open_for_writing(path: str) -> bool | None:
    """Whether anybody has this file open for writing, or mapped so; None if the kernel won't tell us.

    Source: fcntl(2), F_SETLEASE: a read lease is given (to the file's owner, and with CAP_LEASE) only while nobody has.
    It is given back at once. Whoever opens the file meanwhile waits for these microseconds, and we are told by a
    signal, by default one that kills: so it is made one that is ignored by default.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)


#: What is told of a clone, or a read-only mount, where `newly_reached` isn't 0.
CLOSED = "its top directory is closed to others, as the directory above the origin was"
SHOWN = "through this mount others can read what the directory above the origin kept from them"


def reach(path: str, gid: int | None = None) -> int:
    """Which permission bits for the group and for others count at all on a directory at `path`: those of who can come
    to it through the directories above. `gid`: its group, if it isn't there yet."""
    mask = 0o077
    try:
        gid = os.stat(path).st_gid if gid is None else gid
        above = os.path.realpath(path)
        while above != "/":
            above = os.path.dirname(above)
            found = os.stat(above)
            if not found.st_mode & 0o001:
                mask &= ~0o007
            if not found.st_mode & (0o010 if found.st_gid == gid else 0o001):
                mask &= ~0o070
    except OSError:
        return 0
    return mask


def newly_reached(mode: int, gid: int, path: str, had: int) -> int:
    """Which permission bits of a directory of this mode and group would, at `path`, let in whom its origin's place kept
    out: `had` is the `reach` there."""
    return mode & reach(path, gid) & ~had & 0o077


class _Access(Struct, frozen=True):
    """Owner, mode and ACL of a file or directory."""

    uid: int
    gid: int
    mode: int
    acl: bytes = b""

    def owned(self, uids: frozenset[int]) -> bool:
        return self.uid in uids

    def allows(self, uids: frozenset[int], gids: frozenset[int], bit: int) -> bool:
        """Whether owner, any group, any ACL entry or "other" gives `bit` (4, 2, 1). An owner may give it to itself. A
        class that denies what a later one gives is not heeded: better to refuse once too often."""
        if self.uid in uids or self.mode & bit:
            return True
        if not self.acl:
            return self.gid in gids and bool(self.mode & (bit << 3))
        for tag, permission, number in struct.iter_unpack("<HHI", self.acl[4:]):
            # acl(5): 2 user, 4 owning group, 8 group. The mode's group bits are the mask.
            named = (tag == 2 and number in uids) or (tag == 4 and self.gid in gids) or (tag == 8 and number in gids)
            if named and permission & bit & (self.mode >> 3):
                return True
        return False


class Permissions:
    """Who may write below some directories: the few different ways in which their files are owned and protected."""

    def __init__(self, paths: Sequence[str]) -> None:
        #: (what must be searched to get there, the object); equal ones are kept once.
        self._objects: set[tuple[frozenset[_Access], _Access]] = set()
        for path in paths:
            chain = frozenset[_Access]()
            above = os.path.dirname(path)
            while True:
                chain |= {_access(above, os.stat(above))}
                if above == os.path.dirname(above):
                    break
                above = os.path.dirname(above)
            self._walk(path, chain)

    def _walk(self, top: str, chain: frozenset[_Access]) -> None:
        todo = [(top, chain, os.lstat(top))]
        while todo:
            directory, chain, found = todo.pop()
            access = _access(directory, found)
            self._objects.add((chain, access))
            deeper = chain | {access}
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        try:
                            below = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        if stat.S_ISDIR(below.st_mode):
                            todo.append((entry.path, deeper, below))
                        elif stat.S_ISREG(below.st_mode):
                            self._objects.add((deeper, _access(entry.path, below)))
            except (PermissionError, FileNotFoundError):
                continue  # not ours to read, and not ours to copy either: that is found out elsewhere

    def allow(self, uids: frozenset[int], gids: frozenset[int]) -> bool:
        """Could such a process write anything there? Owning counts even where the way is closed: a container may see
        the directory by another way."""
        return any(
            access.owned(uids) or (access.allows(uids, gids, 2) and all(above.allows(uids, gids, 1) for above in chain))
            for chain, access in self._objects
        )

    def private(self, uid: int) -> bool:
        """True if nobody but root and `uid` could write anything there, whoever else there is."""
        return all(
            access.uid in (0, uid)
            and not (access.mode & 0o022 and all(above.uid not in (0, uid) or above.mode & 0o011 for above in chain))
            for chain, access in self._objects
        )


def _access(path: str, found: os.stat_result) -> _Access:
    """An ACL gives others at most what the mode's group bits (its mask) show, so it is read only where these give
    writing, or searching."""
    mode = stat.S_IMODE(found.st_mode)
    acl = b""
    if mode & (0o030 if stat.S_ISDIR(found.st_mode) else 0o020):
        try:
            acl = os.getxattr(path, "system.posix_acl_access", follow_symlinks=False)
        except OSError:
            pass
    return _Access(found.st_uid, found.st_gid, mode, acl)
