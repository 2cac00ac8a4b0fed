"""Trees of files: walk one, compare walks, copy or clone one file's content, remove all. `host/mirror` builds on this.
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
import os
import stat
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

FICLONE = 0x40049409
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_NOCOW_FL = 0x80086601, 0x40086602, 0x00800000
#: One step of a byte copy: between two of them a deadline is looked at.
CHUNK = 8 << 20
UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.ENOSYS}
#: What an open says when the entry is no longer what the walk saw.
SWAPPED = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ESTALE}
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

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


Tick = Callable[[], None]


def no_tick() -> None:
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
    #: Of the way down to a directory so much is kept: who goes up again needs it next, and would else begin at the top
    #: for each level.
    CHAIN = 32

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
        while len(self._open) > self.KEEP:
            os.close(self._open.pop(next(iter(self._open))))
        return fd

    def _reach(self, path: str) -> int:
        known, steps = path, []
        while known and known not in self._open:
            above, name = parent_and_name(known)
            steps.append((known, name))
            known = above
        fd = at = self._open.get(known, self.top)
        kept = at
        for left, (step, name) in reversed(list(enumerate(steps))):
            try:
                fd = self._enter(name, at)
            finally:
                if at not in (self.top, kept):
                    os.close(at)
            at = fd
            if 0 < left <= self.CHAIN:
                self._open[step] = kept = fd
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

    def refresh(self) -> None:
        """Drop all that is kept but the top: by now other directories may stand in these places."""
        while self._open:
            os.close(self._open.popitem()[1])

    def close(self) -> None:
        self.refresh()
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
    tick: Tick = no_tick,
    seen: Callable[[int, str, str, os.stat_result], None] | None = None,
    unreadable: Callable[[str], None] | None = None,
    leave_out: Callable[[int, str], bool] | None = None,
) -> dict[str, Entry]:
    """Everything in the tree, parents before children, the top as ''. Never enters a mount point (relative paths):
    such a directory comes without inode and times, since what is seen of it belongs to another volume.

    `seen(directory descriptor, name, path, stat)` is called for each entry, `unreadable(path)` for each directory that
    can't be listed (without it: PermissionError). A directory below the top of which `leave_out(descriptor, path)` is
    true isn't in the result, nor is what it holds. What vanishes meanwhile is left out.
    """
    # A directory that was removed and made again since the last walk would else be read as it was: in all walks alike,
    # so that nothing would look changed. And btrfs (6.5 on) lists by an old descriptor only what was there at its
    # opening.
    dirs.refresh()
    top = os.open(".", _LIST, dir_fd=dirs.top)
    try:
        return _walk(dirs, top, frozenset(mount_points), tick, seen, unreadable, leave_out)
    finally:
        os.close(top)


def _walk(
    dirs: Dirs,
    top: int,
    here: frozenset[str],
    tick: Tick,
    seen: Callable[[int, str, str, os.stat_result], None] | None,
    unreadable: Callable[[str], None] | None,
    leave_out: Callable[[int, str], bool] | None,
) -> dict[str, Entry]:
    found = {"": entry_of(os.fstat(top))}
    pending = [""]
    while pending:
        path = pending.pop()
        tick()
        try:
            fd = dirs.get(path) if path else top
            if leave_out is not None and path and leave_out(fd, path):
                del found[path]
                continue
            listing = os.scandir(fd)
        except PermissionError as error:
            if path == "lost+found":  # mkfs made it, root's alone; a user's node has nothing in there
                continue
            if unreadable is None:
                raise OSError(error.errno, error.strerror, path) from None
            unreadable(path)
            continue
        except OSError as error:
            if error.errno not in SWAPPED or not path:
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
            if error.errno in UNSUPPORTED:
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
        if error.errno not in UNSUPPORTED | {errno.EINVAL, errno.ETXTBSY}:
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


def born_ns(fd: int, name: str = "") -> int:
    """When the inode was made (statx btime), ns; 0 where the file system doesn't know. With the inode number it names
    a directory for ever: numbers alone are given out again at once. `name`: of that entry of the open directory."""
    buffer = ctypes.create_string_buffer(256)
    flags = 0x100 if name else 0x1000  # AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH
    try:
        failed = _libc.statx(fd, os.fsencode(name), flags, 0x800, buffer)  # STATX_BTIME
    except AttributeError:
        return 0
    if failed or not struct.unpack_from("I", buffer, 0)[0] & 0x800:
        return 0
    seconds, ns = struct.unpack_from("qI", buffer, 80)
    return int(seconds) * 1_000_000_000 + int(ns)


def locked(dir_fd: int, name: str) -> bool:
    """Whether nobody, root neither, can remove or rename this entry (chattr +i, +a). Source: statx(2),
    STATX_ATTR_IMMUTABLE and STATX_ATTR_APPEND."""
    buffer = ctypes.create_string_buffer(256)
    try:
        failed = _libc.statx(dir_fd, os.fsencode(name), 0x100, 0, buffer)  # AT_SYMLINK_NOFOLLOW
    except AttributeError:
        return False
    return not failed and bool(struct.unpack_from("Q", buffer, 8)[0] & 0x30)


def open_to_read(name: str, dir_fd: int) -> int:
    """Open a file without following a link, waiting for a FIFO, or (where permitted) touching its atime."""
    try:
        return os.open(name, _READ | os.O_NOATIME, dir_fd=dir_fd)
    except PermissionError:
        return os.open(name, _READ, dir_fd=dir_fd)


# -------------------------------------------------------------------------------------------------------- removing


Choose = Callable[[Dirs, Mapping[str, Entry]], Collection[str]]


def remove_content(top: Dirs, *, tick: Tick = no_tick, choose: Choose | None = None) -> list[str]:
    """Remove all below `top` (opened with `unlock`), which stays; with `choose`, only the paths that it names, and of
    directories only the empty. The caller has made sure that nothing is mounted there. Entries that vanish meanwhile
    are fine. Returns what is left. Raises OSError whose filename is the path."""
    found = walk(top, tick=tick)
    chosen = None if choose is None else choose(top, found)
    left = []
    for path, entry in reversed(found.items()):
        if not path:
            continue
        if chosen is not None and path not in chosen:
            left.append(path)
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
            if chosen is not None and is_directory and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                left.append(path)
                continue
            raise OSError(error.errno, error.strerror, path) from error
    return left


def _remove_one(name: str, at: int, is_directory: bool) -> None:
    if is_directory:
        os.rmdir(name, dir_fd=at)
    else:
        os.unlink(name, dir_fd=at)
