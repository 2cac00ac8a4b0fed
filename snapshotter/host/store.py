"""A *store*: a directory of ours on a local file system, private to one user, with durable small files, locks on its
directories, and a trash. Where one may be, and how a known one is found again. Must know no provider and no set.

All goes by the open store's descriptor: as root, somebody else may own the directory above it, and swap it for a link.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.labels import loads
from snapshotter.host import mounts, tree
from snapshotter.host.mounts import is_under
from snapshotter.host.places import replace_file

MARKER = "snapshotter.store"
SCHEMA = 1
DIRECTORIES = ("sets", "attachments", "trash")
STORE_CURE = 'name a place for the copies: -o store=DIR, or options = { store = "DIR" }'

#: Not local, or not storage: no image can be made of these, and none may live there.
REFUSED_FSTYPES = frozenset(
    [
        *(
            "9p",
            "afs",
            "beegfs",
            "ceph",
            "cifs",
            "coda",
            "gfs2",
            "glusterfs",
            "lustre",
            "ncpfs",
            "nfs",
            "nfs4",
            "ocfs2",
        ),
        *("orangefs", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs"),
        *("autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs"),
        *("hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs", "rpc_pipefs", "securityfs", "selinuxfs", "sysfs"),
        *("tmpfs", "tracefs"),
    ]
)


def refused(fstype: str) -> bool:
    return fstype in REFUSED_FSTYPES or fstype.startswith("fuse")


def slurp(path: str, dir_fd: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        # Most are small: a large buffer for each would cost more than the read.
        parts = [os.read(fd, 1 << 14)]
        while len(parts[-1]) == 1 << 14:
            parts.append(os.read(fd, 1 << 14))
        return b"".join(parts)
    finally:
        os.close(fd)


def read_object(path: str, dir_fd: int) -> dict[str, Any] | None:
    """A JSON object of ours; None if absent. Raises ValueError if it is damaged."""
    try:
        read = loads(slurp(path, dir_fd))
    except FileNotFoundError:
        return None
    if not isinstance(read, dict) or read.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not of this schema")
    return read


def write_object(path: str, content: Mapping[str, Any], dir_fd: int, *, durable: bool = True) -> None:
    """Replace a file in one step; `durable`: on the disk when this returns."""
    scratch = f"{path}.{os.getpid()}.tmp"
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=dir_fd)
    try:
        with open(fd, "wb") as file:
            file.write(json.dumps({"schema": SCHEMA, **content}, separators=(",", ":")).encode())
            file.flush()
            if durable:
                os.fsync(fd)
        os.rename(scratch, path, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except OSError:
        os.unlink(scratch, dir_fd=dir_fd)
        raise
    if durable:
        sync_directory(os.path.dirname(path) or ".", dir_fd)


def sync_directory(path: str, dir_fd: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Store:
    """An open store. All goes by its descriptor: as root, somebody else may own the directory above it."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def open(cls, path: str) -> Self | None:
        """The store at `path`, if there is one of this user's; None for anything else."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise StorageError(f"can't be read: {error.strerror}", object=path) from None
        try:
            if os.fstat(fd).st_uid == os.geteuid() and read_object(MARKER, fd) is not None:
                return cls(path, fd)
        except (ValueError, OSError):
            pass
        os.close(fd)
        return None

    @classmethod
    def make(cls, path: str) -> Self:
        """The store at `path`, made if it isn't there; its place was checked (`check_place`)."""
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        store = cls(path, fd)
        try:
            check_ours(path, fd)
            # Nothing here is for others, whatever default ACL the directory above hands down.
            for name in ("system.posix_acl_default", "system.posix_acl_access"):
                try:
                    os.removexattr(fd, name)
                except OSError:
                    pass
            os.fchmod(fd, 0o700)
            for name in DIRECTORIES:
                try:
                    os.mkdir(name, 0o700, dir_fd=fd)
                except FileExistsError:
                    pass
            if read_object(MARKER, fd) is None:
                write_object(MARKER, {}, fd)
                sync_directory(os.path.dirname(path), fd)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self, directory: str) -> list[str]:
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return []
        try:
            return os.listdir(fd)
        except FileNotFoundError:
            return []
        finally:
            os.close(fd)

    def ensure(self, directory: str) -> None:
        """Make one of `DIRECTORIES` if it isn't there: a tool that synchronises stores may have dropped it, empty."""
        try:
            os.mkdir(directory, 0o700, dir_fd=self.fd)
        except FileExistsError:
            pass

    def has(self, path: str) -> bool:
        try:
            os.stat(path, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def age_s(self, path: str) -> float:
        """Seconds since the file was written; 0 if it isn't there."""
        try:
            return abs(time.time() - os.stat(path, dir_fd=self.fd, follow_symlinks=False).st_mtime)
        except FileNotFoundError:
            return 0.0

    def unlink(self, path: str) -> None:
        """Remove a file; absent is done."""
        try:
            os.unlink(path, dir_fd=self.fd)
        except FileNotFoundError:
            pass

    @contextmanager
    def locked(self, path: str, *, shared: bool = False, wait_s: float = 0.0) -> Iterator[bool]:
        """Hold the lock of the directory `path`; False if it isn't there (any more). Raises BusyError."""
        fd = self.lock(path, shared=shared, wait_s=wait_s)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                os.close(fd)

    def lock(self, path: str, *, shared: bool = False, wait_s: float = 0.0) -> int | None:
        """As `locked`; the lock is free when the descriptor is closed."""
        give_up = time.monotonic() + wait_s
        while True:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.fd)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                # A deleter may have moved it away while we came: then what we locked isn't there any more.
                if os.path.samestat(os.fstat(fd), os.stat(path, dir_fd=self.fd)):
                    return fd
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    os.close(fd)
                    raise BusyError(
                        "another process works on it",
                        object=os.path.basename(path).removeprefix(".new-"),
                        cure="wait for it to end, then try again",
                    ) from None
                time.sleep(0.02)
            except FileNotFoundError:
                os.close(fd)
                return None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def remove(self, path: str) -> None:
        """Remove the directory `path` of ours and all in it; absent is done. Raises StorageError."""
        try:
            with tree.open_tree(path, dir_fd=self.fd, unlock=True) as top:
                os.fchmod(top.top, 0o700)
                tree.remove_content(top)
            os.rmdir(path, dir_fd=self.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(
                f"can't be removed: {error.strerror} ({error.filename!r})",
                object=f"{self.path}/{path}",
                cure="see `lsattr`, then run `snapshotter reap`",
            ) from None

    def discard(self, path: str, name: str) -> str:
        """Move a directory to the trash, at once; what is left to do is to remove it (the result)."""
        self.ensure("trash")
        trashed = f"trash/{name}.{os.urandom(4).hex()}"
        os.rename(path, trashed, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        return trashed


def check_ours(path: str, fd: int) -> None:
    """Raise PreconditionError unless the open directory is, or may become, a store of this user's."""
    if os.fstat(fd).st_uid != os.geteuid():
        raise PreconditionError("belongs to another user, so it can't be the store", object=path, cure=STORE_CURE)
    try:
        if read_object(MARKER, fd) is not None:
            return
    except (ValueError, OSError):
        raise PreconditionError(
            f"is a store that this version can't read ({MARKER})",
            object=path,
            cure="update snapshotter, or " + STORE_CURE,
        ) from None
    # What a run that died here before it wrote the marker may have left.
    if any(name not in DIRECTORIES and not name.startswith(MARKER) for name in os.listdir(fd)):
        raise PreconditionError(
            "is no store of ours, and not empty", object=path, cure="name an empty or absent directory: -o store=DIR"
        )


def unreadable(path: str) -> bool:
    """Whether there is a store of this user's at `path` whose marker is damaged or of a newer version."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if os.fstat(fd).st_uid == os.geteuid():
            read_object(MARKER, fd)
        return False
    except (ValueError, OSError):
        return True
    finally:
        os.close(fd)


def is_store(fd: int) -> bool:
    """Whether the open directory is a store of this or another version, whoever's. The marker counts only if it is the
    directory's owner's: else anybody could put one into /tmp."""
    try:
        found = os.stat(MARKER, dir_fd=fd, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.fstat(fd).st_uid:
            return False
        read = loads(slurp(MARKER, fd))
    except PermissionError:
        return True  # a foreign one: a marker that only its owner may read
    except (OSError, ValueError):
        return False
    return isinstance(read, dict) and isinstance(read.get("schema"), int)


def store_around(path: str) -> str | None:
    """The store that the canonical `path`, which need not exist, is or lies in; None if in none."""
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            pass
        else:
            try:
                if is_store(fd):
                    return path
            finally:
                os.close(fd)
        if path == "/":
            return None
        path = os.path.dirname(path)


def default_store(path: str) -> str:
    return os.path.join(os.path.dirname(path), ".snapshotter")


def canonical(path: str) -> str:
    """The real path of a store. A link in its place must be ours or root's: anybody's would lead us anywhere.
    Raises PreconditionError."""
    path = os.path.abspath(path)
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode) and found.st_uid not in (0, os.geteuid()):
            raise PreconditionError("is another user's link, so it can't be the store", object=path, cure=STORE_CURE)
    except OSError:
        pass
    return os.path.realpath(path)


def check_place(store: str, tops: Sequence[str]) -> None:
    """Could the canonical path `store` be the store for the directories `tops`? No effects. Raises PreconditionError:
    each rule has its cure."""
    table = mounts.table()
    at = mounts.mount_of(store, table)
    for top in tops:
        on = mounts.mount_of(top, table)
        aliases = on.device == at.device  # the same directories may be seen at several places: bind mounts
        if is_under(store, top) or (aliases and is_under(mounts.inside(store, at), mounts.inside(top, on))):
            raise PreconditionError(f"the store {store} lies inside {top}", object=store, cure=STORE_CURE)
        if is_under(top, store) or (aliases and is_under(mounts.inside(top, on), mounts.inside(store, at))):
            raise PreconditionError(f"{top} lies inside the store {store}", object=store, cure=STORE_CURE)
    if (around := store_around(os.path.dirname(store))) is not None:
        raise PreconditionError(f"lies inside the store {around}", object=store, cure=STORE_CURE)
    if refused(at.fstype):
        raise PreconditionError(f"the store {store} would be on {at.fstype}", object=store, cure=STORE_CURE)
    for point in mounts.awaited(store, table):  # its disk failed at boot: it would fill the system's
        raise PreconditionError(
            f"nothing is mounted at {point}, where /etc/fstab or systemd has a disk",
            object=store,
            cure=f"mount {point}",
        )
    try:
        fd = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        above = os.path.dirname(store)
        if not os.path.isdir(above):
            raise PreconditionError("doesn't exist", object=above, cure=f"make it: mkdir -p {above}") from None
        if not os.access(above, os.W_OK | os.X_OK, effective_ids=True) or at.read_only:
            raise PreconditionError(
                "isn't writable, so no store can be made in it", object=above, cure=STORE_CURE
            ) from None
    except OSError as error:
        raise PreconditionError(f"can't be the store: {error.strerror}", object=store, cure=STORE_CURE) from None
    else:
        try:
            check_ours(store, fd)
        finally:
            os.close(fd)


class KnownStores:
    """Paths of stores that were used on this host, one per line in a file, each with the mount point that it was found
    on (after a tab; tab, line break and backslash as in mountinfo). No truth is lost with it: who names a store finds
    it."""

    def __init__(self, file: str) -> None:
        self.file = file

    def read(self) -> dict[str, str]:
        """Path -> mount point ('' if not known)."""
        try:
            with open(self.file, "rb") as file:
                lines = [line.partition(b"\t") for line in file.read().split(b"\n")]
        except OSError:
            return {}
        return {mounts.unescape(path): mounts.unescape(point) for path, _, point in lines if path.startswith(b"/")}

    def away(self, path: str) -> str | None:
        """The mount point of this store's disk if it isn't mounted now, so that the store is away and not gone."""
        point = self.read().get(path)
        if point in (None, "", "/") or mounts.is_mount_point(point):
            return None
        store = Store.open(path)
        if store is not None:
            store.close()
            return None
        return point

    def remove(self, path: str) -> None:
        """Absent is done. What can't be written stays: it is looked at once more, and no harm."""
        if path in self.read():
            self._write(lambda known: {each: at for each, at in known.items() if each != path})

    def add(self, path: str) -> str:
        """Returns why it could not be noted, '' if it is."""
        try:
            point = mounts.mount_of(path).path
        except SnapshotterError:
            point = ""
        if self.read().get(path) == point:
            return ""

        def added(known: dict[str, str]) -> dict[str, str]:
            if len(known) >= 50:  # those whose disk isn't mounted stay: nothing else tells of them
                known = {each: at for each, at in known.items() if os.path.isdir(each) or self.away(each)}
            return {**known, path: point}

        return self._write(added)

    def _write(self, change: Callable[[dict[str, str]], dict[str, str]]) -> str:
        try:
            os.makedirs(os.path.dirname(self.file), 0o700, exist_ok=True)
            above = os.open(os.path.dirname(self.file), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(above, fcntl.LOCK_EX)  # another take may be noting its own
                lines = [_escape(each) + b"\t" + _escape(at) + b"\n" for each, at in change(self.read()).items()]
                replace_file(self.file, b"".join(lines), 0o600)
            finally:
                os.close(above)
        except OSError as error:
            return error.strerror or str(error)
        except PreconditionError as error:
            return error.message
        return ""


def _escape(path: str) -> bytes:
    return re.sub(rb"[\t\n\\]", lambda match: b"\\%03o" % match[0][0], os.fsencode(path))


def room(path: str) -> tuple[int, int]:
    """(total, free) bytes of the file system there. Raises PreconditionError."""
    try:
        found = os.statvfs(path)
    except OSError as error:
        raise PreconditionError(f"can't be read: {error.strerror}", object=path) from None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def room_fd(fd: int) -> tuple[int, int]:
    found = os.fstatvfs(fd)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def readable(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


@contextmanager
def told(place: str) -> Iterator[None]:
    """The kernel's errors in the operator's words."""
    try:
        yield
    except OSError as error:
        what = repr(error.filename) if error.filename else place
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                "the file system is full", object=place, cure="free some space, or " + STORE_CURE
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise PreconditionError(
                f"{what}: {error.strerror}", object=place, cure="run as root, or as the user who owns it"
            ) from None
        raise StorageError(f"{what}: {error.strerror}", object=place) from None
