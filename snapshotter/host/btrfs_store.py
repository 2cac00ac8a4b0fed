"""A place of ours on a btrfs: a subvolume at its top level, seen through no mount of anybody's, whose directories carry
their records as extended attributes. Must know no provider and no set.

    <kind>/<name>/          trusted.snapshotter.<record>: small JSON or text; may hold subvolumes
    trash/<name>.<random>/  scratch: all is born by a rename out of it, and dies by a rename into it

An attribute is metadata: it is in the transaction that its directory is in, and the call that makes a snapshot ends its
transaction. So a subvolume in such a directory is never on the disk without the record, and no file has to be synced
before it. A lock on a directory (flock) says that somebody works on it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.labels import dumps, loads
from snapshotter.host import btrfs, mounts
from snapshotter.host.btrfs import DIRECTORY, STORE, FileSystem
from snapshotter.host.mounts import is_under

KINDS = ("sets", "attachments", "swaps", "trash")
SCHEMA = 1
_MARKER = "store"
_MAX_RECORD = 3800  # a file system with 4 KiB nodes has no room for a longer attribute


@contextmanager
def told(what: str) -> Iterator[None]:
    """The kernel's errors as ours; `what` is the object that they name."""
    try:
        yield
    except OSError as error:
        raise _translated(error, what) from error


def _translated(error: OSError, what: str) -> SnapshotterError:
    if error.errno == errno.ENOSPC:
        return StorageError(
            "is full (data or metadata)", object=what, cure="delete old sets; `btrfs filesystem usage` shows the rest"
        )
    if error.errno == errno.EDQUOT:
        return StorageError("a quota of its file system is used up", object=what, cure="see `btrfs qgroup show`")
    if error.errno == errno.EROFS:
        return read_only(what)
    if error.errno in (errno.EPERM, errno.EACCES):
        return PreconditionError(
            f"the kernel forbids it: {error.strerror}", object=what, cure="run as root, outside containers"
        )
    return StorageError(f"the file system refused: {error.strerror}", object=what)


def read_only(what: str) -> PreconditionError:
    """What to say of a file system that takes no changes."""
    cure = f"mount -o remount,rw {what} (if that fails, `dmesg` says why)"
    return PreconditionError("its file system is read-only", object=what, cure=cure)


# --------------------------------------------------------------------------------------------------------- records


def open_directory(path: str, dir_fd: int) -> int | None:
    """The directory, open; None if there is none. Never follows a link in its place."""
    try:
        return os.open(path, DIRECTORY, dir_fd=dir_fd)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise


def read_record(fd: int, name: str) -> bytes | None:
    """None if there is none."""
    try:
        return os.getxattr(fd, f"trusted.snapshotter.{name}")
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise


def write_record(fd: int, name: str, content: bytes) -> None:
    """In one step. On the disk with the next commit, or `os.fsync(fd)`."""
    os.setxattr(fd, f"trusted.snapshotter.{name}", content)


def read_object(fd: int, name: str) -> dict[str, Any] | None:
    """A JSON object of this schema; None for anything else."""
    content = read_record(fd, name)
    try:
        read = loads(content.decode("utf-8", "surrogateescape")) if content else None
    except ValueError:
        return None
    return read if isinstance(read, dict) and read.get("schema") == SCHEMA else None


def as_object(content: Mapping[str, Any], what: str) -> bytes:
    """Inverse of `read_object`. Raises PreconditionError if the file system has no room for a record of that length."""
    text = dumps({"schema": SCHEMA, **content})
    raw = text.encode("utf-8", "surrogateescape")
    if len(raw) > _MAX_RECORD:
        raise PreconditionError("its path is too long to be recorded", object=what, cure="choose a shorter one")
    return raw


# ------------------------------------------------------------------------------------------------------- the store


class Store:
    """One file system with its top level open (`top`), and our subvolume in it (`fd`, -1 while there is none).
    Everything raises OSError, for the caller to wrap in `told`, besides what is said."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self.name = fs.mount.path
        self.fd = -1
        self.top = fs.open_top()
        try:
            fd = open_directory(STORE, self.top)
            if fd is not None:
                found = os.fstat(fd)
                if btrfs.is_top(found) and found.st_uid == 0 and read_record(fd, _MARKER) is not None:
                    self.fd = fd
                else:
                    os.close(fd)
        except BaseException:
            self.close()
            raise

    def check_place(self) -> None:
        """Raise PreconditionError unless our subvolume is there or can be."""
        if self.fd >= 0:
            return
        fd = open_directory(STORE, self.top)
        if fd is None:
            try:
                os.stat(STORE, dir_fd=self.top, follow_symlinks=False)
            except FileNotFoundError:
                return
        else:
            try:
                # What a run that died here before the marker left is fine.
                found = os.fstat(fd)
                if btrfs.is_top(found) and found.st_uid == 0 and not set(os.listdir(fd)) - set(KINDS):
                    return
            finally:
                os.close(fd)
        raise PreconditionError(
            f"its file system has {STORE} at the top level, and that isn't ours", object=self.name, cure="move it away"
        )

    def make(self) -> None:
        """Our subvolume, made if it isn't there. Raises PreconditionError."""
        if self.fd >= 0:
            return
        self.check_place()
        try:
            btrfs.make_subvolume(self.top, STORE)
        except FileExistsError:
            pass
        fd = os.open(STORE, DIRECTORY, dir_fd=self.top)
        try:
            os.fchmod(fd, 0o700)
            for kind in KINDS:
                try:
                    os.mkdir(kind, 0o700, dir_fd=fd)
                except FileExistsError:
                    pass
            write_record(fd, _MARKER, b"1")
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd

    def close(self) -> None:
        for fd in (self.fd, self.top):
            if fd >= 0:
                os.close(fd)
        self.fd = self.top = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self, kind: str) -> list[str]:
        fd = open_directory(kind, self.fd)
        if fd is None:
            return []
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def has(self, path: str) -> bool:
        try:
            os.stat(path, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def object(self, path: str, name: str) -> dict[str, Any] | None:
        """A directory's record; None if there is none."""
        fd = open_directory(path, self.fd)
        if fd is None:
            return None
        try:
            return read_object(fd, name)
        finally:
            os.close(fd)

    # -- birth, work, death ---------------------------------------------------------------------------------------

    def lock(self, path: str, wait_s: float = 0.0) -> int | None:
        """The directory, open and locked until the descriptor is closed; None if it isn't there (any more).
        Raises BusyError."""
        give_up = time.monotonic() + wait_s
        while True:
            fd = open_directory(path, self.fd)
            if fd is None:
                return None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # It may have been moved away while we came.
                if os.path.samestat(os.fstat(fd), os.stat(path, dir_fd=self.fd, follow_symlinks=False)):
                    return fd
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    os.close(fd)
                    raise BusyError(
                        "another process works on it",
                        object=os.path.basename(path),
                        cure="wait for it to end, then try again",
                    ) from None
                time.sleep(0.02)
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    @contextmanager
    def locked(self, path: str, wait_s: float = 5.0) -> Iterator[int | None]:
        """As `lock`, for a block."""
        fd = self.lock(path, wait_s)
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def born(self, kind: str, name: str, records: Mapping[str, bytes]) -> int:
        """A directory that appears with its records in it; open and locked. Raises BusyError if it is there."""
        while True:
            scratch = f"trash/{name}.{os.urandom(4).hex()}"
            os.mkdir(scratch, 0o700, dir_fd=self.fd)
            try:
                fd = self.lock(scratch)
            except BusyError:
                fd = None
            if fd is None:
                continue  # somebody clears the trash, and took it for a leftover
            try:
                for record, content in records.items():
                    write_record(fd, record, content)
                btrfs.rename(self.fd, scratch, self.fd, f"{kind}/{name}")
                return fd
            except FileNotFoundError:
                os.close(fd)
            except FileExistsError:
                os.close(fd)
                self.destroy(scratch)
                raise BusyError("is there already", object=name, cure="take another id") from None
            except BaseException:
                os.close(fd)
                raise

    def discard(self, path: str) -> str:
        """Move a directory of ours to the trash, at once, and return where it is now. On a full file system, where even
        that may have no room, it stays: removing alone is always possible."""
        trashed = f"trash/{os.path.basename(path)}.{os.urandom(4).hex()}"
        try:
            btrfs.rename(self.fd, path, self.fd, trashed)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return path
        return trashed

    def destroy(self, path: str) -> None:
        """Remove a directory of ours with the subvolumes in it, and those in them; absent is done. Raises BusyError."""
        fd = open_directory(path, self.fd)
        if fd is None:
            return
        try:
            for name in os.listdir(fd):
                _destroy_subvolume(fd, name)
        except PermissionError as error:
            raise BusyError(
                f"can't be removed now: {error.strerror}",
                object=f"{STORE}/{path} on {self.name}",
                cure="is it the default subvolume, or being sent? End that, then `snapshotter reap`",
            ) from error
        finally:
            os.close(fd)
        try:
            os.rmdir(path, dir_fd=self.fd)
        except FileNotFoundError:
            pass

    def clear_trash(self, of: str) -> None:
        """Finish what was moved to the trash under this name. Raises BusyError."""
        for name in self.names("trash"):
            if name.startswith(of + "."):
                with self.locked(f"trash/{name}", wait_s=0.2):
                    self.destroy(f"trash/{name}")

    # -- what isn't ours ------------------------------------------------------------------------------------------

    def subvolume(self, path: str) -> int:
        """The subvolume at this path from the top level, open. Raises PreconditionError if there is none, or if the
        way leads through a link."""
        fd = open_directory(path.lstrip("/") or ".", self.top)
        if fd is None:
            raise PreconditionError(
                "there is no such subvolume", object=f"{path} of {self.name}", cure="was it removed or renamed?"
            )
        try:
            if not btrfs.is_top(os.fstat(fd)):
                raise PreconditionError(
                    "is a plain directory that is mounted by itself",
                    object=f"{path} of {self.name}",
                    cure="give the path where the whole subvolume is mounted",
                )
            if (really := btrfs.path_of(fd)) != path:
                raise PreconditionError(f"leads to another subvolume, {really}", object=f"{path} of {self.name}")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def mounted_at(self, path: str) -> list[str]:
        """Where this path from the top level, or something below it, is mounted by itself in our sight."""
        here = [mount for mount in mounts.table() if mount.device == self.fs.mount.device]
        return [mount.path for mount in here if is_under(mount.root, path)]

    def refuse_if_mounted(self, path: str, name: str) -> None:
        """Raise BusyError if something in that directory of ours is mounted."""
        for point in self.mounted_at(f"/{STORE}/{path}"):
            raise BusyError(f"is mounted at {point}", object=name, cure=f"umount {point}")


def subvolume_at(at: int, path: str) -> btrfs.Subvolume | None:
    """The subvolume whose top is there; None if there is none."""
    fd = open_directory(path, at)
    if fd is None:
        return None
    try:
        return btrfs.subvolume(fd) if btrfs.is_top(os.fstat(fd)) else None
    except FileNotFoundError:
        return None
    finally:
        os.close(fd)


def _destroy_subvolume(parent: int, name: str) -> None:
    fd = open_directory(name, parent)
    if fd is None:
        return
    try:
        for path, _ in reversed(btrfs.nested(fd)):  # what somebody made inside a clone goes with it
            above, _, last = path.rpartition("/")
            at = os.open(above or ".", DIRECTORY, dir_fd=fd)
            try:
                btrfs.destroy(at, last)
            finally:
                os.close(at)
    finally:
        os.close(fd)
    try:
        btrfs.destroy(parent, name)
    except FileNotFoundError:
        pass
