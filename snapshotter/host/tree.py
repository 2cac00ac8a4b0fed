"""Trees of files: walk one, mirror one into another (holes, links, owners, modes, xattrs, ACLs, times), remove one.
Must know no provider, no set, no store.

Works by directory descriptors and never follows a link: as root, the owner of the tree may be hostile and swap a
directory for a link at any instant. A path here is relative to the top ('' is the top itself), a `str` as from
`os.fsdecode`, so every byte but NUL and / survives.

Source of the numbers: ioctl_ficlone(2), ioctl_iflags(2), sync_file_range(2), statx(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from snapshotter.core.errors import PreconditionError

FICLONE = 0x40049409
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_NOCOW_FL = 0x80086601, 0x40086602, 0x00800000
#: One step of a byte copy: between two of them a deadline is looked at.
CHUNK = 8 << 20
#: A file counts as unchanged only if its ctime is this much older than the start of the read: before Linux 6.13 a
#: write within the same clock tick leaves all time stamps as they were.
SETTLED_NS = 2_000_000_000

CLEAN, VOLATILE, SKIPPED = 1, 2, 4

_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.ENOSYS}
#: What an open says when the entry is no longer what the walk saw.
_SWAPPED = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ESTALE}
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FRESH = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_encode = json.JSONEncoder(separators=(",", ":")).encode
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class Entry(NamedTuple):
    """What the walk saw of one file. Two equal ones, `SETTLED_NS` apart, are the same content. Times are ns."""

    mode: int
    ino: int
    dev: int
    size: int
    mtime_ns: int
    ctime_ns: int
    uid: int
    gid: int
    nlink: int


class Copied(NamedTuple):
    """What a mirror has of one path: the source's entry as it was when its copy began, and CLEAN (a later walk that
    sees the same entry proves the copy good), VOLATILE (mapped: it never does), SKIPPED (a socket)."""

    entry: Entry
    flags: int
    line: str  # of the manifest; made here because a pause is no time for it


Tick = Callable[[], None]


def _no_tick() -> None:
    return None


def entry_of(found: os.stat_result) -> Entry:
    return Entry(
        found.st_mode,
        found.st_ino,
        found.st_dev,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_uid,
        found.st_gid,
        found.st_nlink,
    )


def parent_and_name(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition("/")
    return parent, name


class Dirs:
    """Descriptors of one tree's directories, opened from the top component by component, some kept for the next
    call. Takes over `top`. With `unlock`, a directory of ours that can't be entered is made 0700 first."""

    KEEP = 64

    def __init__(self, top: int, *, unlock: bool = False) -> None:
        self.top = top
        self._open: dict[str, int] = {}
        self._unlock = unlock

    def get(self, path: str) -> int:
        """A descriptor, good until the next call. Raises OSError (ELOOP, ENOTDIR: a link is in the way)."""
        if not path:
            return self.top
        fd = self._open.pop(path, None)
        if fd is None:
            fd = self._reach(path)
        self._open[path] = fd  # last in the dict: the most recently used
        if len(self._open) > self.KEEP:
            os.close(self._open.pop(next(iter(self._open))))
        return fd

    def _reach(self, path: str) -> int:
        known, names = path, []
        while known and known not in self._open:
            known, name = parent_and_name(known)
            names.append(name)
        fd = at = self._open.get(known, self.top)
        for name in reversed(names):
            try:
                fd = self._enter(name, at)
            finally:
                if at not in (self.top, self._open.get(known)):
                    os.close(at)
            at = fd
        return fd

    def _enter(self, name: str, at: int) -> int:
        try:
            return os.open(name, _LIST, dir_fd=at)
        except PermissionError:
            if not self._unlock:
                raise
        os.chmod(name, 0o700, dir_fd=at)
        return os.open(name, _LIST, dir_fd=at)

    def forget(self, path: str) -> None:
        """Drop what is kept of `path` and below: it is about to be moved or removed."""
        for known in [known for known in self._open if known == path or known.startswith(path + "/")]:
            os.close(self._open.pop(known))

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
        if self.top >= 0:
            os.close(self.top)
            self.top = -1

    def __enter__(self) -> Dirs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tree(path: str, *, dir_fd: int | None = None, unlock: bool = False) -> Dirs:
    """The tree at `path` (not a link). Raises OSError."""
    return Dirs(os.open(path, _LIST, dir_fd=dir_fd), unlock=unlock)


def walk(
    dirs: Dirs,
    mount_points: Iterable[str] = (),
    *,
    tick: Tick = _no_tick,
    seen: Callable[[int, str, str, os.stat_result], None] | None = None,
    unreadable: Callable[[str], None] | None = None,
) -> dict[str, Entry]:
    """Everything in the tree, parents before children, the top as ''. Never enters a mount point (relative paths):
    such a directory comes without inode and times, since what is seen of it belongs to another volume.

    `seen(directory descriptor, name, path, stat)` is called for each entry, `unreadable(path)` for each directory that
    can't be listed (without it: PermissionError). What vanishes meanwhile is left out.
    """
    here = frozenset(mount_points)
    found = {"": entry_of(os.fstat(dirs.top))}
    pending = [""]
    while pending:
        path = pending.pop()
        tick()
        try:
            fd = dirs.get(path)
            listing = os.scandir(fd)
        except PermissionError as error:
            if path == "lost+found":  # mkfs made it, root's alone; a user's node has nothing in there
                continue
            if unreadable is None:
                raise OSError(error.errno, error.strerror, path) from None
            unreadable(path)
            continue
        except OSError as error:
            if error.errno not in _SWAPPED or not path:
                raise
            del found[path]
            continue
        prefix = path + "/" if path else ""
        with listing:
            for item in listing:
                try:
                    st = item.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                name = prefix + item.name
                mode = st.st_mode
                if mode & 0o170000 == 0o040000:
                    if name in here:
                        found[name] = Entry(mode, 0, 0, 0, 0, 0, st.st_uid, st.st_gid, 0)
                        continue
                    pending.append(name)
                # Written out: a call per file would be a third of the walk.
                found[name] = Entry(
                    mode,
                    st.st_ino,
                    st.st_dev,
                    st.st_size,
                    st.st_mtime_ns,
                    st.st_ctime_ns,
                    st.st_uid,
                    st.st_gid,
                    st.st_nlink,
                )
                if seen is not None:
                    seen(fd, item.name, name, st)
    return found


def difference(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> str | None:
    """A path that isn't the same in both walks (a file rather than the directory that it was made in), or None."""
    if before == after:
        return None
    changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    return max(changed, key=lambda path: (not stat.S_ISDIR((after.get(path) or before[path]).mode), path))


# ---------------------------------------------------------------------------------------------- one file's content


def clone_into(target: int, source: int) -> bool:
    """Make the empty file `target` share `source`'s blocks (FICLONE, which also flushes the source). False if these
    two can't. Raises OSError for real failures (ENOSPC, EIO)."""
    for attempt in (1, 2):
        try:
            fcntl.ioctl(target, FICLONE, source)
            return True
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            if error.errno != errno.EINVAL:
                raise
        # btrfs clones only between files that agree on NOCOW, and it can be set only while a file is empty.
        if attempt == 2 or not _agree_on_nocow(target, source):
            return False
    return False


def _agree_on_nocow(target: int, source: int) -> bool:
    try:
        wanted, has = _inode_flags(source) & FS_NOCOW_FL, _inode_flags(target)
        if wanted == has & FS_NOCOW_FL:
            return False
        fcntl.ioctl(target, FS_IOC_SETFLAGS, struct.pack("l", (has & ~FS_NOCOW_FL) | wanted))
    except OSError:
        return False
    return True


def _inode_flags(fd: int) -> int:
    return int(struct.unpack("l", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(struct.calcsize("l"))))[0])


def can_clone(source: int, directory: str) -> bool | None:
    """Whether FICLONE works from the open file into `directory`; tried with a file that has no name, so without
    effects. None if that can't be tried."""
    try:
        scratch = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        return clone_into(scratch, source)
    except OSError:
        return None
    finally:
        os.close(scratch)


def copy_data(source: int, target: int, size: int, step: Callable[[int], None]) -> None:
    """Copy `size` bytes into the empty `target`; holes stay holes. `step(bytes)` is called after each chunk. A source
    that shrinks meanwhile leaves a tail of zeros: its time stamps tell. Raises OSError."""
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
            end = min(size, os.lseek(source, at, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            end = size  # no such call here: all is data
        while at < end:
            moved = _transfer(source, target, at, min(CHUNK, end - at))
            if moved == 0:
                return
            at += moved
            step(moved)


def _transfer(source: int, target: int, at: int, count: int) -> int:
    try:
        return os.copy_file_range(source, target, count, at, at)
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.EINVAL, errno.ETXTBSY}:
            raise
    os.lseek(target, at, os.SEEK_SET)
    return os.sendfile(target, source, at, count)


def write_back(fd: int) -> bool:
    """Write the file's dirty pages and wait, so that the next store through a mapping must fault and so updates the
    time stamps. True if that was done. (sync_file_range sees no pages of a file on overlay: fdatasync does.)"""
    every_stage = 1 | 2 | 4  # WAIT_BEFORE | WRITE | WAIT_AFTER
    return bool(_libc.sync_file_range(fd, 0, 0, every_stage) == 0)


def write_back_overlay(fd: int) -> bool:
    """As `write_back`, for overlay."""
    try:
        os.fdatasync(fd)
    except OSError:
        return False
    return True


def syncfs(fd: int) -> None:
    """Write everything of that file system. Raises OSError (since Linux 5.8 also for earlier lost writes)."""
    if _libc.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def born_ns(fd: int) -> int:
    """When the inode was made (statx btime), ns; 0 where the file system doesn't know. With the inode number it names
    a directory for ever: numbers alone are given out again at once."""
    buffer = ctypes.create_string_buffer(256)
    try:
        failed = _libc.statx(fd, b"", 0x1000, 0x800, buffer)  # AT_EMPTY_PATH, STATX_BTIME
    except AttributeError:
        return 0
    if failed or not struct.unpack_from("I", buffer, 0)[0] & 0x800:
        return 0
    seconds, ns = struct.unpack_from("qI", buffer, 80)
    return int(seconds) * 1_000_000_000 + int(ns)


# ------------------------------------------------------------------------------------------------------- mirroring


class Shares:
    """An earlier image of the same tree: what of it a new one may share. `unchanged` is path -> (ino, size, mtime ns,
    ctime ns) of its clean regular files."""

    def __init__(self, dirs: Dirs, unchanged: Mapping[str, tuple[int, int, int, int]]) -> None:
        self.dirs = dirs
        self._unchanged = unchanged

    def has(self, path: str, entry: Entry) -> bool:
        return self._unchanged.get(path) == (entry.ino, entry.size, entry.mtime_ns, entry.ctime_ns)


@dataclass(slots=True)
class Costs:
    """What a pass took, so that a pause can be foretold: small or cloned files by number, others by bytes."""

    files: int = 0
    files_s: float = 0.0
    bytes: int = 0
    bytes_s: float = 0.0


@dataclass(slots=True)
class Mirror:
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
    tick: Tick = _no_tick
    step: Callable[[int], None] = lambda _: None
    have: dict[str, Copied] = field(default_factory=dict)
    costs: Costs = field(default_factory=Costs)
    warnings: list[str] = field(default_factory=list)
    clones: bool | None = None  # whether FICLONE from the source works; tried with the first file
    _clones_shares: bool = True
    _shares: Shares | None = None
    _attic_n: int = 0
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
                os.mkdir(name, 0o700, dir_fd=self.target.get(parent))
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
        self._attic_n += 1
        os.rename(name, str(self._attic_n), src_dir_fd=self.target.get(parent), dst_dir_fd=self.attic)

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
            if error.errno not in _SWAPPED:
                raise
            return self._vanished(path)
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode):
                return self._vanished(path)
            entry = entry_of(found)
            if self.clones is None and entry.size:
                self.clones = bool(can_clone(source, f"/proc/self/fd/{self.target.get(parent)}"))
                if not self.clones and not volatile and self._share(path, seen):
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
            if error.errno in _SWAPPED | {errno.EMLINK, errno.EXDEV, errno.EPERM, errno.EACCES}:
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
        at = self.source.get(parent)
        if path in self.have:
            self._retire(path)
            del self.have[path]
        into = self.target.get(parent)
        flags = CLEAN if entry.ctime_ns <= start - SETTLED_NS else 0
        link = ""
        if stat.S_ISSOCK(entry.mode):
            self._record(path, entry, SKIPPED)
            return False
        try:
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
            if error.errno not in _SWAPPED | {errno.EINVAL}:
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
                self._metadata(source, target, os.fstat(source))
            except OSError as error:
                if path == "lost+found" or error.errno in _SWAPPED:
                    continue
                raise OSError(error.errno, error.strerror, path) from error

    # ------------------------------------------------------------------------------------------------- metadata

    def _metadata(self, source: int, target: int, found: os.stat_result) -> None:
        # The order matters: a chown clears set-id bits and capabilities, an ACL changes the mode.
        mode = stat.S_IMODE(found.st_mode)
        if not self._own(found, lambda uid, gid: os.fchown(target, uid, gid)):
            mode &= 0o1777  # set-id for another owner would be another thing
        self._xattrs(source, target)
        os.fchmod(target, mode)
        os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))

    def _own(self, found: os.stat_result | Entry, chown: Callable[[int, int], None]) -> bool:
        uid, gid = (found.uid, found.gid) if isinstance(found, Entry) else (found.st_uid, found.st_gid)
        try:
            chown(uid, gid)
            return True
        except PermissionError:
            self._warn("the owners of some files can't be kept without root")
        try:
            chown(-1, gid)
        except PermissionError:
            pass
        return False

    def _xattrs(self, source: int | str, target: int | str) -> None:
        follow = isinstance(source, int)
        try:
            names = os.listxattr(source, follow_symlinks=follow)
        except OSError as error:
            if error.errno in _UNSUPPORTED | {errno.EACCES}:
                return
            raise
        for name in names:
            try:
                value = os.getxattr(source, name, follow_symlinks=follow)
                os.setxattr(target, name, value, follow_symlinks=follow)
            except OSError as error:
                if error.errno == errno.ENODATA:
                    continue
                if error.errno not in _UNSUPPORTED | {errno.EPERM, errno.EACCES}:
                    raise
                self._warn(f"the extended attribute {name} of some files can't be kept")

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def open_to_read(name: str, dir_fd: int) -> int:
    """Open a file without following a link, waiting for a FIFO, or (where permitted) touching its atime."""
    try:
        return os.open(name, _READ | os.O_NOATIME, dir_fd=dir_fd)
    except PermissionError:
        return os.open(name, _READ, dir_fd=dir_fd)


def manifest_lines(text: Iterator[str]) -> Iterator[tuple[str, int, str, Entry]]:
    """(path, flags, link target, entry) of each manifest line. Raises ValueError for what isn't one."""
    for line in text:
        path, flags, target, *rest = json.loads(line)
        yield path, flags, target, Entry(*rest)


# -------------------------------------------------------------------------------------------------------- removing


def remove_content(top: Dirs, *, tick: Tick = _no_tick) -> None:
    """Remove all below `top` (opened with `unlock`), which stays. The caller has made sure that nothing is mounted
    there. Entries that vanish meanwhile are fine. Raises OSError whose filename is the path."""
    for path, entry in reversed(walk(top, tick=tick).items()):
        if not path:
            continue
        parent, name = parent_and_name(path)
        is_directory = stat.S_ISDIR(entry.mode)
        if is_directory:
            top.forget(path)
        try:
            at = top.get(parent)
            try:
                _remove_one(name, at, is_directory)
            except PermissionError:
                os.fchmod(at, 0o700)
                _remove_one(name, at, is_directory)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error


def _remove_one(name: str, at: int, is_directory: bool) -> None:
    if is_directory:
        os.rmdir(name, dir_fd=at)
    else:
        os.unlink(name, dir_fd=at)
