"""A mirror of a tree of files, brought up to date pass by pass, with holes, links, owners, modes, xattrs, ACLs and
times; and clones: a mirror made once, for a person. Must know no provider, no set, no store.

Paths are as in `host/tree`. What a mirror has is written down as lines of a *manifest*: a JSON array of path, flags,
link target, and the fields of the source's `Entry` as it was when the copy began.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct, field

from snapshotter.core.errors import BusyError, PreconditionError
from snapshotter.host.mounts import mounts_below
from snapshotter.host.tree import (
    SWAPPED,
    UNSUPPORTED,
    Choose,
    Dirs,
    Entry,
    Tick,
    born_ns,
    can_clone,
    clone_into,
    copy_data,
    entry_of,
    no_tick,
    open_to_read,
    open_tree,
    parent_and_name,
    remove_content,
)

#: A file counts as unchanged only if its ctime is this much older than the start of the read: before Linux 6.13 a
#: write within the same clock tick leaves all time stamps as they were.
SETTLED_NS = 2_000_000_000

CLEAN, VOLATILE, SKIPPED = 1, 2, 4

_encode = json.JSONEncoder(separators=(",", ":")).encode
_FRESH = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Copied(NamedTuple):
    """What a mirror has of one path: the source's entry as it was when its copy began, and CLEAN (a later walk that
    sees the same entry proves the copy good), VOLATILE (mapped: it never does), SKIPPED (a socket)."""

    entry: Entry
    flags: int
    line: str  # of the manifest; made here because a pause is no time for it


#: Names in attics: unique in this process, as several mirrors may share one.
_RETIRED = itertools.count()


class Shares:
    """An earlier image of the same tree: what of it a new one may share. `unchanged` is path -> (ino, size, mtime ns,
    ctime ns) of its clean regular files."""

    def __init__(self, dirs: Dirs, unchanged: Mapping[str, tuple[int, int, int, int]]) -> None:
        self.dirs = dirs
        self._unchanged = unchanged

    def has(self, path: str, entry: Entry) -> bool:
        return self._unchanged.get(path) == (entry.ino, entry.size, entry.mtime_ns, entry.ctime_ns)


class Costs(Struct):
    """What a pass took, so that a pause can be foretold: small or cloned files by number, others by bytes."""

    files: int = 0
    files_s: float = 0.0
    bytes: int = 0
    bytes_s: float = 0.0


class Mirror(Struct):
    """A copy of a tree in the making. `update` brings `target` up to what a walk saw, any number of times; `finish`
    gives the directories their metadata, after which it isn't to be updated again.

    What `update` replaces is moved into `attic` (removing a large file takes long, and the writers may be held).
    `tick()` may raise to end it all; `step(bytes)` is told of bytes written. Hard links are made within the target,
    and to `shares` if the file system can't share blocks.
    """

    source: Dirs
    target: Dirs
    attic: int | None = None
    load_shares: Callable[[], Shares | None] | None = None
    flush: Callable[[int], bool] | None = None  # while writers run
    tick: Tick = no_tick
    step: Callable[[int], None] = lambda _: None
    have: dict[str, Copied] = {}
    costs: Costs = field(default_factory=Costs)
    warnings: list[str] = []
    clones: bool | None = None  # whether FICLONE from the source works; tried with the first file
    must_copy: Callable[[], None] = lambda: None  # called once if it doesn't: all content will take room
    devices: bool = True  # else device nodes are left out: one leads to the live disk
    top_mask: int = 0o7777  # what the target's top may have of the source's mode
    _clones_shares: bool = True
    _shares: Shares | None = None
    _copied_bytes: int = 0

    def __post_init__(self) -> None:
        # A default ACL of the directory above would be inherited by all that is made here.
        for name in ("system.posix_acl_default", "system.posix_acl_access"):
            try:
                os.removexattr(self.target.top, name)
            except OSError:
                pass

    def stale(self, path: str, entry: Entry, volatile: bool) -> bool:
        """Whether a pass would have to copy this one (again)."""
        old = self.have.get(path)
        return old is None or volatile or old.entry != entry or not old.flags & (CLEAN | SKIPPED)

    def update(self, now: Mapping[str, Entry], is_volatile: Callable[[Entry], bool] = lambda _: False) -> None:
        """Make the target what the walk `now` saw. Raises OSError whose filename is the path, PreconditionError (a
        device node, without root)."""
        dropped: set[str] = set()
        for path in [path for path in self.have if path not in now]:
            if parent_and_name(path)[0] not in dropped or not path:
                self._retire(path)
            dropped.add(path)
            del self.have[path]
        leaders: dict[tuple[int, int], str] = {}
        for path, entry in now.items():
            self.tick()
            try:
                self._one(path, entry, is_volatile, leaders)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from error

    def _one(
        self, path: str, entry: Entry, is_volatile: Callable[[Entry], bool], leaders: dict[tuple[int, int], str]
    ) -> None:
        kind = stat.S_IFMT(entry.mode)
        old = self.have.get(path)
        if old is not None and stat.S_IFMT(old.entry.mode) != kind:
            self._retire(path)
            del self.have[path]
            old = None
        if kind == stat.S_IFDIR:
            if old is None and path:
                parent, name = parent_and_name(path)
                try:
                    os.mkdir(name, 0o700, dir_fd=self.target.get(parent))
                except FileExistsError:
                    if path != "lost+found":  # mkfs made that in an otherwise empty target
                        raise
            if old is None or old.entry != entry:
                self._record(path, entry, CLEAN)
            return
        volatile = kind == stat.S_IFREG and is_volatile(entry)
        key = (entry.dev, entry.ino)
        if not self.stale(path, entry, volatile):
            if entry.nlink > 1:
                leaders.setdefault(key, path)
            return
        if entry.nlink > 1 and key in leaders:
            self._link(leaders[key], path)
            return
        start = time.time_ns()
        began = time.perf_counter()
        self._copied_bytes = 0
        if kind == stat.S_IFREG:
            done = self._regular(path, entry, start, volatile)
        else:
            done = self._special(path, entry, start)
        took = time.perf_counter() - began
        if self._copied_bytes >= 1 << 20:
            self.costs.bytes += self._copied_bytes
            self.costs.bytes_s += took
        else:
            self.costs.files += 1
            self.costs.files_s += took
        if done and entry.nlink > 1:
            leaders[key] = path

    def _record(self, path: str, entry: Entry, flags: int, target: str = "") -> None:
        self.have[path] = Copied(entry, flags, _encode([path, flags, target, *entry]))

    def _retire(self, path: str) -> None:
        copied = self.have[path]
        if copied.flags & SKIPPED:
            return
        if stat.S_ISDIR(copied.entry.mode):
            self.target.forget(path)
        parent, name = parent_and_name(path)
        if self.attic is None:
            raise OSError(errno.EEXIST, "changed while it was copied", path)
        os.rename(name, str(next(_RETIRED)), src_dir_fd=self.target.get(parent), dst_dir_fd=self.attic)

    def _link(self, leader: str, path: str) -> None:
        if path in self.have:
            self._retire(path)
        first, (parent, name) = parent_and_name(leader), parent_and_name(path)
        # One of the two may be closed by the other's get: both fit into what is kept.
        from_fd = self.target.get(first[0])
        os.link(first[1], name, src_dir_fd=from_fd, dst_dir_fd=self.target.get(parent), follow_symlinks=False)
        copied = self.have[leader]
        line = json.loads(copied.line)
        self._record(path, copied.entry, copied.flags, line[2])

    def _regular(self, path: str, seen: Entry, start: int, volatile: bool) -> bool:
        parent, name = parent_and_name(path)
        if self.clones is False and not volatile and self._share(path, seen):
            return True
        try:
            source = open_to_read(name, self.source.get(parent))
        except OSError as error:
            if error.errno not in SWAPPED:
                raise
            return self._vanished(path)
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode):
                return self._vanished(path)
            entry = entry_of(found)
            if self.clones is None and entry.size:
                self.clones = bool(can_clone(source, f"/proc/self/fd/{self.target.get(parent)}"))
                if not self.clones:
                    self.must_copy()
                    if not volatile and self._share(path, seen):
                        return True
            if path in self.have:
                self._retire(path)
                del self.have[path]
            target = os.open(name, _FRESH, 0o600, dir_fd=self.target.get(parent))
            try:
                flushed = True
                if not (self.clones and entry.size and clone_into(target, source)):
                    flushed = self.flush is None or self.flush(source)
                    copy_data(source, target, entry.size, self._stepped)
                self._metadata(source, target, found)
            finally:
                os.close(target)
        finally:
            os.close(source)
        settled = flushed and entry.ctime_ns <= start - SETTLED_NS and not volatile
        self._record(path, entry, (CLEAN if settled else 0) | (VOLATILE if volatile else 0))
        return True

    def _stepped(self, count: int) -> None:
        self._copied_bytes += count
        self.step(count)
        self.tick()

    def _share(self, path: str, entry: Entry) -> bool:
        """Take the file from the earlier image, if it is the same. (Where the source can be cloned there is no
        need.)"""
        if self.load_shares is not None:
            self._shares, self.load_shares = self.load_shares(), None
        if self._shares is None or not self._shares.has(path, entry):
            return False
        if path in self.have:
            self._retire(path)
            del self.have[path]
        parent, name = parent_and_name(path)
        into = self.target.get(parent)
        try:
            theirs = self._shares.dirs.get(parent)
            if not (self._clones_shares and self._clone_share(name, theirs, into)):
                self._clones_shares = False
                os.link(name, name, src_dir_fd=theirs, dst_dir_fd=into, follow_symlinks=False)
        except OSError as error:
            if error.errno in SWAPPED | {errno.EMLINK, errno.EXDEV, errno.EPERM, errno.EACCES}:
                return False
            raise
        self._record(path, entry, CLEAN)
        return True

    def _clone_share(self, name: str, theirs: int, into: int) -> bool:
        source = open_to_read(name, theirs)
        try:
            target = os.open(name, _FRESH, 0o600, dir_fd=into)
            try:
                done = clone_into(target, source)
                if done:
                    self._metadata(source, target, os.fstat(source))
            finally:
                os.close(target)
            if not done:
                os.unlink(name, dir_fd=into)
            return done
        finally:
            os.close(source)

    def _special(self, path: str, entry: Entry, start: int) -> bool:
        parent, name = parent_and_name(path)
        if path in self.have:
            self._retire(path)
            del self.have[path]
        into = self.target.get(parent)
        flags = CLEAN if entry.ctime_ns <= start - SETTLED_NS else 0
        link = ""
        if stat.S_ISSOCK(entry.mode):
            self._record(path, entry, SKIPPED)
            return False
        if not self.devices and (stat.S_ISBLK(entry.mode) or stat.S_ISCHR(entry.mode)):
            self._warn(f"{path!r} is a device node: left out, as it leads to the live device")
            self._record(path, entry, SKIPPED)
            return False
        try:
            at = self.source.get(parent)
            if stat.S_ISLNK(entry.mode):
                link = os.readlink(name, dir_fd=at)
                os.symlink(link, name, dir_fd=into)
            else:
                found = os.stat(name, dir_fd=at, follow_symlinks=False)
                os.mknod(name, stat.S_IFMT(entry.mode) | 0o600, found.st_rdev, dir_fd=into)
        except PermissionError:
            raise PreconditionError(
                "is a device node, which only root can copy", object=path, cure="run as root, or move it away"
            ) from None
        except OSError as error:
            if error.errno not in SWAPPED | {errno.EINVAL}:
                raise
            return self._vanished(path)
        self._own(entry, lambda uid, gid: os.chown(name, uid, gid, dir_fd=into, follow_symlinks=False))
        if os.geteuid() == 0:  # others can't have or set any on these
            self._xattrs(f"/proc/self/fd/{at}/{name}", f"/proc/self/fd/{into}/{name}")
        if not stat.S_ISLNK(entry.mode):
            node = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=into)
            try:
                os.chmod(f"/proc/self/fd/{node}", stat.S_IMODE(entry.mode))
            finally:
                os.close(node)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=into, follow_symlinks=False)
        self._record(path, entry, flags, link)
        return True

    def _vanished(self, path: str) -> bool:
        """It went while we came to it: normal while writers run; in a pause the second walk tells."""
        if path in self.have:
            self._retire(path)
            del self.have[path]
        return False

    def finish(self, now: Mapping[str, Entry]) -> None:
        """Give the directories their owner, mode, xattrs and times, the deepest first. Raises OSError."""
        for path in reversed([path for path, entry in now.items() if stat.S_ISDIR(entry.mode)]):
            self.tick()
            entry = now[path]
            target = self.target.get(path)
            if entry.ino == 0:  # a mount point: what is seen there is another volume's
                self._own(entry, lambda uid, gid, fd=target: os.chown(fd, uid, gid))  # type: ignore[misc]
                os.fchmod(target, stat.S_IMODE(entry.mode))
                continue
            try:
                source = self.source.get(path)
                self._metadata(source, target, os.fstat(source), 0o7777 if path else self.top_mask)
            except OSError as error:
                if path == "lost+found" or error.errno in SWAPPED:
                    continue
                raise OSError(error.errno, error.strerror, path) from error

    # ------------------------------------------------------------------------------------------------- metadata

    def _metadata(self, source: int, target: int, found: os.stat_result, mask: int = 0o7777) -> None:
        # The order matters: a chown clears set-id bits and capabilities, an ACL changes the mode. And a file that has
        # another mode than the one it was made with has its content and its time: what a killed run left is told so.
        mode = stat.S_IMODE(found.st_mode) & mask
        if not self._own(found, lambda uid, gid: os.fchown(target, uid, gid)):
            mode &= 0o1777  # set-id for another owner would be another thing
        os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
        self._xattrs(source, target)
        os.fchmod(target, mode)

    def _own(self, found: os.stat_result | Entry, chown: Callable[[int, int], None]) -> bool:
        uid, gid = (found.uid, found.gid) if isinstance(found, Entry) else (found.st_uid, found.st_gid)
        try:
            chown(uid, gid)
            return True
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL, errno.EOVERFLOW):  # the last two: a user namespace
                raise
            self._warn("the owners of some files can't be kept without root")
        try:
            chown(-1, gid)
        except OSError:
            pass
        return False

    def _xattrs(self, source: int | str, target: int | str) -> None:
        follow = isinstance(source, int)
        try:
            names = os.listxattr(source, follow_symlinks=follow)
        except OSError as error:
            if error.errno in UNSUPPORTED | {errno.EACCES, errno.ENOENT}:  # the last: a link that went just now
                return
            raise
        for name in names:
            if name.startswith("trusted.SGI_ACL_"):  # how XFS shows root its ACLs a second time
                continue
            try:
                value = os.getxattr(source, name, follow_symlinks=follow)
                os.setxattr(target, name, value, follow_symlinks=follow)
            except OSError as error:
                if error.errno in (errno.ENODATA, errno.ENOENT):
                    continue
                if error.errno not in UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EINVAL}:
                    raise
                self._warn(f"the extended attribute {name} of some files can't be kept")

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def manifest_lines(text: Iterator[str]) -> Iterator[tuple[str, int, str, Entry]]:
    """(path, flags, link target, entry) of each manifest line. Raises ValueError for what isn't one."""
    for line in text:
        path, flags, target, *rest = json.loads(line)
        yield path, flags, target, Entry(*rest)


# --------------------------------------------------------------------------------------------------------- clones


def directory_identity(path: str) -> tuple[int, int]:
    """Names a directory for ever. Not by its device number, which may be another after a reboot; not by its inode
    number alone, which is given out again at once. Raises OSError."""
    with open_tree(path) as top:
        return _identity(top.top)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_ino, born_ns(fd) or found.st_dev


def remove_clone(path: str, inode: Sequence[int] | None, *, made: bool, choose: Choose | None = None) -> list[str]:
    """Remove the clone at `path`, if that is the very directory of this identity, and only that: what a person has
    put there instead stays. A directory that wasn't `made` for it is emptied. Without identity (killed before it was
    noted) it goes only if it is empty. With `choose` only what that names; returns what is left in it. Absent is done.
    Raises BusyError (mounts in it), OSError."""
    try:
        try:
            top = open_tree(path, unlock=True)
        except PermissionError:
            os.chmod(path, 0o700)
            top = open_tree(path, unlock=True)
    except OSError as error:
        if error.errno in SWAPPED:
            return []
        raise
    left: list[str] = []
    with top:
        if inode is not None:
            if _identity(top.top) != tuple(inode):
                return []
            if below := mounts_below(os.path.realpath(path)):
                raise BusyError("something is mounted in it", object=path, cure=f"umount {below[0].path}")
            left = remove_content(top, choose=choose)
    if made and not left:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or inode is not None:
                raise
    return left
