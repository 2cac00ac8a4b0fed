"""btrfs: read-only snapshots of subvolumes, writable clones, and swaps, by the kernel's own calls (`host.btrfs`).
Must know no policy: what is kept, and for how long, is the core's.

No `btrfs` command and no binding: PyPI's `btrfsutil` is a source that wants the C library and its headers, while the
ioctls need no child, no parsing, and give errno instead of prose. A take costs the kernel's own snapshot and one fsync.

A *volume* is a subvolume, named `<first 13 digits of the file system's UUID>:<path from the top level>`. The path and not
the kernel's number is its identity, because a swap puts another subvolume in that place, and it is still the same target.
13 digits, because the birth record has 400 bytes for all volumes of a set.

What we keep is in one subvolume at the top level, `.snapshotter-btrfs` (0700; a subvolume, so that a snapshot of the top
level does not hold it), reached by a private mount. Records are extended attributes of directories, in root's `trusted.`:

    sets/<set id>/             .birth .order .marks; holds <member>, the read-only snapshots
    attachments/<id>.<member>/ .attachment; holds clone, where writable
    swaps/<swap id>/           .swap; holds other: the clone before the exchange, the set-aside after it
    trash/                     scratch: everything is born by a rename out of it, and dies by a rename into it

An attribute is metadata: it is in the transaction of its directory, and the snapshot's call ends with the commit of its own. So
there is no image on the disk without its birth record, and no file to fsync before it. flock on a directory says that
somebody works on it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

from snapshotter.core.errors import (
    BusyError,
    NotFoundError,
    PreconditionError,
    QuiesceError,
    SnapshotterError,
    StorageError,
)
from snapshotter.core.labels import MARK_NAMES, LabelLimits, apply_marks, check_marks, decode_birth, encode_birth
from snapshotter.core.model import (
    ATTACHMENT_ID,
    SET_ID,
    Access,
    Attachment,
    Birth,
    Hold,
    ImageState,
    MountSpec,
    Purpose,
    Quiesce,
    Snapshot,
    Space,
    Tree,
    Volume,
)
from snapshotter.host import btrfs, mounts, processes
from snapshotter.host.btrfs import STORE, FileSystem, Subvolume
from snapshotter.host.mounts import Mount, is_under
from snapshotter.provider import Provider, Settings, Traits

FSTAB = "/etc/fstab"
KINDS = ("sets", "attachments", "swaps", "trash")
_MARKER = "store"
_ID_DIGITS = 13
_MAX_RECORD = 3800  # a file system with 4 KiB nodes has no room for a longer attribute
_PROBE_S = 0.5  # how long an answer to "do you take changes?" is believed
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """The kernel's errors as ours."""
    try:
        yield
    except OSError as error:
        raise _translated(error, what) from error


def _translated(error: OSError, what: str) -> SnapshotterError:
    if error.errno == errno.ENOSPC:
        return StorageError(
            "is full (data or metadata)", object=what, cure="delete old sets, or see `btrfs filesystem usage`"
        )
    if error.errno == errno.EDQUOT:
        return StorageError("a quota of the file system is used up", object=what, cure="see `btrfs qgroup show`")
    if error.errno == errno.EROFS:
        return _read_only(what)
    if error.errno in (errno.EPERM, errno.EACCES):
        return btrfs.denied(error, what)
    return StorageError(f"the file system refused: {error.strerror}", object=what)


def _read_only(what: str) -> PreconditionError:
    return PreconditionError(
        "the file system is read-only", object=what, cure=f"see `dmesg`, then: mount -o remount,rw {what}"
    )


def _open(path: str, dir_fd: int) -> int | None:
    """The directory, open; None if there is none. Never through a link."""
    try:
        return os.open(path, _DIRECTORY, dir_fd=dir_fd)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise


def _record(fd: int, name: str) -> bytes | None:
    try:
        return os.getxattr(fd, f"trusted.snapshotter.{name}")
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise


def _write_record(fd: int, name: str, content: bytes) -> None:
    os.setxattr(fd, f"trusted.snapshotter.{name}", content)


def _object(content: bytes | None) -> dict[str, Any] | None:
    """A JSON object of ours; None for anything else."""
    try:
        read = json.loads(content.decode("utf-8", "surrogateescape")) if content else None
    except ValueError:
        return None
    return read if isinstance(read, dict) and read.get("schema") == 1 else None


def _json(content: Mapping[str, Any], what: str) -> bytes:
    text = json.dumps({"schema": 1, **content}, separators=(",", ":"), ensure_ascii=False)
    raw = text.encode("utf-8", "surrogateescape")
    if len(raw) > _MAX_RECORD:
        raise PreconditionError("its path is too long to be recorded", object=what, cure="choose a shorter path")
    return raw


# ------------------------------------------------------------------------------------------------------- the store


class Store:
    """One file system with its top level open, and our subvolume in it (`fd`, -1 while there is none)."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self.name = fs.mount.path
        self.key = fs.uuid[:_ID_DIGITS]
        self.fd = -1
        self.top = fs.open_top()
        try:
            self._look()
        except BaseException:
            self.close()
            raise

    def _look(self) -> None:
        fd = _open(STORE, self.top)
        if fd is None:
            return
        found = os.fstat(fd)
        if btrfs.is_top(found) and found.st_uid == 0 and _record(fd, _MARKER) is not None:
            self.fd = fd
        else:
            os.close(fd)

    def check_place(self) -> None:
        """Raise PreconditionError unless our subvolume is there or can be."""
        if self.fd >= 0:
            return
        try:
            found = os.stat(STORE, dir_fd=self.top, follow_symlinks=False)
        except FileNotFoundError:
            return
        fd = _open(STORE, self.top)
        # What a run that died here before the marker may have left is fine.
        if fd is not None:
            try:
                if btrfs.is_top(found) and found.st_uid == 0 and not set(os.listdir(fd)) - set(KINDS):
                    return
            finally:
                os.close(fd)
        raise PreconditionError(
            f"has {STORE} at its top level, which is not ours", object=self.name, cure="move that away"
        )

    def make(self) -> None:
        """Our subvolume, made if it isn't there."""
        if self.fd >= 0:
            return
        self.check_place()
        try:
            btrfs.make_subvolume(self.top, STORE)
        except FileExistsError:
            pass
        fd = os.open(STORE, _DIRECTORY, dir_fd=self.top)
        try:
            os.fchmod(fd, 0o700)
            for kind in KINDS:
                try:
                    os.mkdir(kind, 0o700, dir_fd=fd)
                except FileExistsError:
                    pass
            _write_record(fd, _MARKER, b"1")
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd

    def close(self) -> None:
        for fd in (self.fd, self.top):
            if fd >= 0:
                os.close(fd)
        self.fd = self.top = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self, kind: str) -> list[str]:
        fd = _open(kind, self.fd)
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

    def lock(self, path: str, wait_s: float = 0.0) -> int | None:
        """The directory, open and locked until the descriptor is closed; None if it isn't there (any more).
        Raises BusyError."""
        give_up = time.monotonic() + wait_s
        while True:
            fd = _open(path, self.fd)
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
        fd = self.lock(path, wait_s)
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def born(self, kind: str, name: str, records: Mapping[str, bytes]) -> int:
        """A directory that appears with its records in it; open and locked. Raises BusyError if it is there."""
        while True:
            scratch = f"trash/{name}.{secrets.token_hex(4)}"
            os.mkdir(scratch, 0o700, dir_fd=self.fd)
            try:
                fd = self.lock(scratch)
            except BusyError:
                continue  # reap is just taking it for a leftover
            if fd is None:
                continue
            try:
                for record, content in records.items():
                    _write_record(fd, record, content)
                btrfs.rename(self.fd, scratch, self.fd, f"{kind}/{name}")
            except FileExistsError:
                os.close(fd)
                self.destroy(scratch)
                raise BusyError("is there already", object=name, cure="take another id") from None
            except FileNotFoundError:
                os.close(fd)
                continue
            except BaseException:
                os.close(fd)
                raise
            return fd

    def discard(self, path: str) -> str:
        """Move a directory of ours to the trash, at once, and return where it is. On a full file system, where even that
        may have no room, it stays in its place: removing alone is always possible."""
        trashed = f"trash/{os.path.basename(path)}.{secrets.token_hex(4)}"
        try:
            btrfs.rename(self.fd, path, self.fd, trashed)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return path
        return trashed

    def destroy(self, path: str) -> None:
        """Remove a directory of ours with the subvolumes in it, and those in them; absent is done."""
        fd = _open(path, self.fd)
        if fd is None:
            return
        try:
            for name in os.listdir(fd):
                self._destroy_subvolume(fd, name)
        except PermissionError as error:
            raise BusyError(
                f"can't be removed now: {error.strerror}",
                object=f"{self.name} {STORE}/{path}",
                cure="is it the default subvolume, or being sent? then `snapshotter reap`",
            ) from error
        finally:
            os.close(fd)
        try:
            os.rmdir(path, dir_fd=self.fd)
        except FileNotFoundError:
            pass

    @staticmethod
    def _destroy_subvolume(parent: int, name: str) -> None:
        fd = _open(name, parent)
        if fd is None:
            return
        try:
            below = btrfs.nested(fd)
            for path, _ in reversed(below):  # what somebody made inside a clone goes with the clone
                at = os.open(os.path.dirname(path) or ".", _DIRECTORY, dir_fd=fd)
                try:
                    btrfs.destroy(at, os.path.basename(path))
                finally:
                    os.close(at)
        finally:
            os.close(fd)
        try:
            btrfs.destroy(parent, name)
        except FileNotFoundError:
            pass

    def clear_trash(self, of: str) -> None:
        """Finish what was moved to the trash under this id."""
        for name in self.names("trash"):
            if name.startswith(of + "."):
                with self.locked(f"trash/{name}", wait_s=0.2):
                    self.destroy(f"trash/{name}")

    def next_order(self) -> int:
        """A number above all given out before on this file system; about the UTC second, so that those of several file
        systems and providers compare."""
        fd = os.open("sets", _DIRECTORY, dir_fd=self.fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            last = int(_record(fd, "order") or b"0")
            number = max(last + 1, int(time.time()))
            _write_record(fd, "order", str(number).encode())
            return number
        finally:
            os.close(fd)

    def subvolume(self, path: str) -> int:
        """The subvolume at this path from the top level, open. Raises PreconditionError if there is none, or if the way
        there leads through a link."""
        what = f"{self.key}:{path}"
        fd = _open(path.lstrip("/") or ".", self.top)
        if fd is None:
            raise PreconditionError("there is no such subvolume", object=what, cure="was it removed, or renamed?")
        try:
            if not btrfs.is_top(os.fstat(fd)):
                raise PreconditionError(
                    "is a plain directory, mounted by itself",
                    object=what,
                    cure="give the path where its whole subvolume is mounted",
                )
            if btrfs.path_of(fd) != path:
                raise PreconditionError(f"is not the subvolume {btrfs.path_of(fd)}, where this leads", object=what)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def mounted_at(self, path: str) -> list[str]:
        """Where this path from the top level, or something below it, is mounted by itself in our sight."""
        here = [mount for mount in mounts.table() if mount.device == self.fs.mount.device]
        return [mount.path for mount in here if is_under(mount.root, path)]

    def refuse_if_mounted(self, path: str, name: str) -> None:
        for point in self.mounted_at(f"/{STORE}/{path}"):
            raise BusyError(f"is mounted at {point}", object=name, cure=f"umount {point}")

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(directory, record) of each attachment's part here."""
        for name in self.names("attachments"):
            if ATTACHMENT_ID.fullmatch(name.partition(".")[0]):
                fd = _open(f"attachments/{name}", self.fd)
                if fd is not None:
                    try:
                        record = _object(_record(fd, "attachment"))
                    finally:
                        os.close(fd)
                    if record is not None:
                        yield f"attachments/{name}", record

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        """What is in this store."""
        for name in [set_id] if set_id is not None else self.names("sets"):
            fd = _open(f"sets/{name}", self.fd) if SET_ID.fullmatch(name) else None
            if fd is not None:
                try:
                    yield from self._of_set(fd, name)
                finally:
                    os.close(fd)

    def _of_set(self, fd: int, set_id: str) -> Iterator[Snapshot]:
        birth = decode_birth((_record(fd, "birth") or b"").decode("ascii", "replace"))
        if birth is None or birth.set_id != set_id:
            return
        read = (_object(_record(fd, "marks")) or {}).get("marks", {})
        marks = {name: value for name, value in read.items() if name in MARK_NAMES and isinstance(value, str)}
        order = _record(fd, "order") or b""
        for number, member in enumerate(birth.members):
            if member.provider != BtrfsProvider.name or not member.volume.startswith(self.key + ":"):
                continue
            why = _lacks(fd, str(number))
            yield Snapshot(
                provider=BtrfsProvider.name,
                id=f"{self.key}:/{STORE}/sets/{set_id}/{number}",
                birth=birth.of_member(number),
                state=ImageState.INVALID if why else ImageState.READY,
                marks=marks,
                order=int(order) if order.isdigit() else 0,
                why=why,
            )


def _lacks(at: int, name: str) -> str:
    """Why this is no image, for a person; '' if it is one. Asked of the kernel."""
    fd = _open(name, at)
    if fd is None:
        return "its snapshot is gone"
    try:
        if not btrfs.is_top(os.fstat(fd)):
            return "its snapshot is a plain directory"
        found = btrfs.subvolume(fd)
    except FileNotFoundError:
        return "its snapshot is gone"
    finally:
        os.close(fd)
    if not found.read_only:
        return "its snapshot was made writable, so it may have been changed"
    return "" if found.origin else "its snapshot is no snapshot"


# ----------------------------------------------------------------------------------------------------- the driver


class BtrfsProvider(Provider):
    """See the module."""

    name = "btrfs"
    traits = Traits(
        atomic_across_volumes=False,
        quiesce=Quiesce.NONE,
        writable_clone=True,
        swaps=True,
        needs_host=True,
        limits=LabelLimits(),
    )

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._making: dict[str, ExitStack] = {}
        self._answered: dict[str, float] = {}

    # -- which file system ----------------------------------------------------------------------------------------

    def availability(self) -> list[str]:
        return btrfs.needs()

    def claim(self, mount: Mount, path: str) -> Volume | None:
        if mount.fstype != self.name:
            return None
        try:
            top = path
            while not btrfs.is_top(os.stat(top)) and top != mount.path:
                top = os.path.dirname(top)
            fd = os.open(top, _DIRECTORY)
            try:
                key = btrfs.file_system_id(fd)[:_ID_DIGITS]
            finally:
                os.close(fd)
        except OSError as error:
            raise PreconditionError(f"can't look at it: {error.strerror}", object=path, cure="run as root") from None
        # Where `top` is no subvolume's (a directory mounted by itself) its top is out of sight: `check` refuses it.
        return Volume(self.name, f"{key}:{mounts.inside(top, mount)}", top, mount.fstype)

    def _known(self, *, make: Sequence[str] | None = None) -> Iterator[Store]:
        """Every file system that has a store of ours, open for the time of the loop's body; or (`make`) those of these
        volumes, whether they have one or not. One that can't be opened hides no other: its error comes last."""
        keys = None if make is None else {volume.partition(":")[0] for volume in make}
        here = [fs for fs in btrfs.mounted() if keys is None or fs.uuid[:_ID_DIGITS] in keys]
        if here and (reasons := btrfs.needs()):
            raise PreconditionError(reasons[0].partition(": ")[0], object="btrfs", cure=reasons[0].partition(": ")[2])
        failed: SnapshotterError | None = None
        for fs in here:
            try:
                with _told(fs.mount.path):
                    store = Store(fs)
            except SnapshotterError as error:
                failed = failed or error
                continue
            with store, _told(store.name):
                if keys is not None or store.fd >= 0:
                    yield store
        if failed is not None:
            raise failed

    def _at(self, stack: ExitStack, volume: str) -> Store:
        """The file system of this volume, open. Raises PreconditionError if it isn't mounted here."""
        store = next(self._held(stack, [volume]), None)
        if store is None:
            raise PreconditionError("its file system isn't mounted here", object=volume, cure="mount it")
        return store

    def _held(self, stack: ExitStack, volumes: Sequence[str]) -> Iterator[Store]:
        found = self._known(make=volumes)
        stack.callback(found.close)  # type: ignore[attr-defined]
        yield from found

    def _writable(self, store: Store, *, patience_s: float = 3.0, now: bool = False) -> None:
        """Raise unless the file system takes changes. `now`: ask, however short ago it said that it did."""
        if store.fs.read_only:
            raise _read_only(store.name)
        if now or time.monotonic() - self._answered.get(store.fs.uuid, -_PROBE_S) >= _PROBE_S:
            btrfs.refuse_if_stuck(store.top, store.name, patience_s)
            self._answered[store.fs.uuid] = time.monotonic()

    # -- before ---------------------------------------------------------------------------------------------------

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        encode_birth(birth)
        floor = self.settings.floor
        for volume in volumes:
            with ExitStack() as stack:
                store = self._at(stack, volume.id)
                with _told(store.name):
                    self._writable(store)
                    store.check_place()
                    self._check_subvolume(store, volume, birth)
                    total, free = _room(store.top)
            if free < total * floor:
                raise PreconditionError(
                    f"has {free >> 20} MiB free of {total >> 20}, and {floor:.0%} must stay so, because snapshots keep "
                    "what is deleted",
                    object=store.name,
                    cure="delete old sets, free some space, or lower `floor`",
                )

    def _check_subvolume(self, store: Store, volume: Volume, birth: Birth) -> None:
        path = volume.id.partition(":")[2]
        if is_under(path, f"/{STORE}") and not is_under(path, f"/{STORE}/attachments"):
            raise PreconditionError(
                "is in snapshotter's own store: an old mount of what a swap set aside?",
                object=volume.path or volume.id,
                cure="unmount it and mount it again",
            )
        fd = store.subvolume(path)
        try:
            inside = btrfs.living(btrfs.nested(fd))
        finally:
            os.close(fd)
        covered = {member.volume for member in birth.members if member.provider == self.name}
        for root in birth.roots:
            if birth.members[root.member].volume != volume.id:
                continue
            for below in inside:
                if is_under(f"/{below}", f"/{root.inside}") and f"{store.key}:{_join(path, below)}" not in covered:
                    raise PreconditionError(
                        f"{below!r} in it is a subvolume of its own, which no snapshot of this one holds",
                        object=volume.path or volume.id,
                        cure=f"add it: extra_paths = [{_join(volume.path or '', below)!r}]",
                    )

    def space(self, volumes: Sequence[Volume]) -> Space:
        total = free = 0
        detail: dict[str, int] = {}
        for store in self._known(make=[volume.id for volume in volumes]):
            room = _room(store.top)
            total, free = total + room[0], free + room[1]
            for name, number in btrfs.usage(store.top).items():
                detail[name] = detail.get(name, 0) + number
        return Space(total_bytes=total, free_bytes=free, detail=detail)

    # -- making ---------------------------------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[Volume], birth: Birth, budget: float) -> None:
        if not SET_ID.fullmatch(birth.set_id):
            raise ValueError(f"{birth.set_id!r} is no set id")
        if birth.set_id not in self._making:
            with ExitStack() as stack:
                self._begin(stack, volumes, birth)
                self._making[birth.set_id] = stack.pop_all()

    def _begin(self, stack: ExitStack, volumes: Sequence[Volume], birth: Birth) -> None:
        """The set's directory, with its record, on every file system that it is on."""
        record = encode_birth(birth.of_member(0)).encode()
        born: list[Store] = []
        try:
            for fs in dict.fromkeys(volume.id.partition(":")[0] for volume in volumes):
                store = self._at(stack, f"{fs}:")
                with _told(store.name):
                    self._writable(store)
                    store.make()
                    order = str(store.next_order()).encode()
                    stack.callback(os.close, store.born("sets", birth.set_id, {"birth": record, "order": order}))
                    born.append(store)
        except BaseException:
            self._withdraw(born, birth.set_id)
            raise

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        self.prepare(volumes, birth, 0.0)
        making = self._making.pop(birth.set_id)
        stores: list[Store] = []
        with making:
            try:
                for volume in volumes:
                    store = self._at(making, volume.id)
                    stores.append(store)
                    with _told(volume.path or volume.id):
                        self._shoot(store, volume, birth, hold)
            except BaseException:
                self._withdraw(stores, birth.set_id)
                raise
            made = {found.birth.member: found for store in stores for found in store.snapshots(birth.set_id)}
        return tuple(made[_member(birth, volume)] for volume in volumes)

    def _shoot(self, store: Store, volume: Volume, birth: Birth, hold: Hold) -> None:
        if hold.deadline is not None:
            left = hold.deadline - time.monotonic()
            if left <= 0:
                raise QuiesceError("the time for which the writers may be held is over", object=volume.id)
            # Whoever holds the writers may have frozen the file system itself.
            self._writable(store, patience_s=min(3.0, left / 2), now=True)
        source = store.subvolume(volume.id.partition(":")[2])
        try:
            at = os.open(f"sets/{birth.set_id}", _DIRECTORY, dir_fd=store.fd)
            try:
                btrfs.snapshot(source, at, str(_member(birth, volume)), read_only=True)
            finally:
                os.close(at)
        finally:
            os.close(source)

    @staticmethod
    def _withdraw(stores: Sequence[Store], set_id: str) -> None:
        """Only the rename: the writers may be held, and the core calls `delete` when they aren't."""
        for store in stores:
            try:
                store.discard(f"sets/{set_id}")
            except OSError:
                continue

    # -- afterwards -----------------------------------------------------------------------------------------------

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        for store in self._known():
            yield from store.snapshots(set_id)

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        check_marks(changes)
        there = False
        for store in self._known():
            if not SET_ID.fullmatch(set_id) or not store.has(f"sets/{set_id}"):
                continue
            self._writable(store)
            with store.locked(f"sets/{set_id}") as fd:
                found = list(store.snapshots(set_id)) if fd is not None else []
                if fd is None or not found:
                    continue
                there = True
                for member in found:
                    if changes.get("sealed") and member.state is not ImageState.READY:
                        raise StorageError(f"can't be sealed: {member.why}", object=set_id)
                _write_record(fd, "marks", _json({"marks": apply_marks(found[0].marks, changes)}, set_id))
                os.fsync(fd)  # the images are on the disk since their creation: see host.btrfs.snapshot
        if not there:
            raise NotFoundError("no such set", object=set_id, cure="`snapshotter list` shows all")

    def delete(self, set_id: str) -> None:
        if not SET_ID.fullmatch(set_id):
            raise ValueError(f"{set_id!r} is no set id")
        if set_id in self._making:
            self._making.pop(set_id).close()
        for store in self._known():
            if store.has(f"sets/{set_id}"):
                self._delete_from(store, set_id)
            store.clear_trash(set_id)

    def _delete_from(self, store: Store, set_id: str) -> None:
        self._writable(store)
        at = f"sets/{set_id}"
        with store.locked(at, wait_s=0.2) as fd:
            if fd is None:
                return
            for _, record in store.records():
                if record.get("set_id") == set_id:
                    where = record.get("path")
                    raise BusyError(
                        f"is attached at {where} ({record.get('id')})",
                        object=set_id,
                        cure=f"snapshotter release {where}",
                    )
            store.refuse_if_mounted(at, set_id)
            store.destroy(store.discard(at))

    def reap(self) -> list[str]:
        removed = []
        for store in self._known():
            for name in store.names("trash"):
                self._writable(store)
                try:
                    with store.locked(f"trash/{name}", wait_s=0.0) as fd:
                        if fd is not None:
                            store.destroy(f"trash/{name}")
                            removed.append(f"{store.name} {STORE}/trash/{name}")
                except BusyError:
                    continue  # a live process is making it
        return removed

    # -- attachments ----------------------------------------------------------------------------------------------

    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec | Tree:
        if not ATTACHMENT_ID.fullmatch(attachment_id):
            raise ValueError(f"{attachment_id!r} is no attachment id")
        set_id, number = snapshot.birth.set_id, snapshot.birth.member
        record = {
            "id": attachment_id,
            "set_id": set_id,
            "member": number,
            "path": destination,
            "access": str(access),
            "purpose": str(purpose),
            "since": None,
            "maker": processes.identity(os.getpid()),
        }
        content = _json(record, destination)
        with ExitStack() as stack:
            store = self._at(stack, snapshot.volume)
            stack.enter_context(_told(store.name))
            source = self._image(store, snapshot, stack)
            self._writable(store)
            name = f"{attachment_id}.{number}"
            fd = store.born("attachments", name, {"attachment": content})
            stack.callback(os.close, fd)
            if not store.has(f"sets/{set_id}/{number}"):  # a delete may have looked for attachments just before
                raise NotFoundError("was deleted meanwhile", object=set_id)
            if access is Access.READ_ONLY:
                where = f"/{STORE}/sets/{set_id}/{number}"
                return MountSpec(store.fs.source(), self.name, ("ro", "nosuid", "nodev", f"subvol={where}"))
            btrfs.snapshot(source, fd, "clone", read_only=False)
            return MountSpec(store.fs.source(), self.name, (f"subvol=/{STORE}/attachments/{name}/clone",))

    @staticmethod
    def _image(store: Store, snapshot: Snapshot, stack: ExitStack) -> int:
        """The snapshot, open. Raises NotFoundError, StorageError (no valid image)."""
        set_id, number = snapshot.birth.set_id, snapshot.birth.member
        found = None
        if store.fd >= 0:
            found = next((each for each in store.snapshots(set_id) if each.birth.member == number), None)
        if found is None:
            raise NotFoundError("no such set", object=set_id, cure="`snapshotter list` shows all")
        if found.state is not ImageState.READY:
            raise StorageError(f"has no valid image: {found.why}", object=set_id)
        fd = os.open(f"sets/{set_id}/{number}", _DIRECTORY, dir_fd=store.fd)
        stack.callback(os.close, fd)
        return fd

    def settle(self, attachment_id: str, since: datetime) -> None:
        there = False
        for store in self._known():
            for path, record in store.records():
                if record.get("id") != attachment_id:
                    continue
                self._writable(store)
                with store.locked(path) as fd:
                    if fd is not None:
                        changed = {**record, "since": since.astimezone(UTC).isoformat(), "maker": None}
                        _write_record(fd, "attachment", _json(changed, attachment_id))
                        os.fsync(fd)
                        there = True
        if not there:
            raise NotFoundError("no such attachment", object=attachment_id)

    def attachments(self) -> Iterator[Attachment]:
        for store in self._known():
            for _, record in store.records():
                try:
                    maker, since = record["maker"], record["since"]
                    yield Attachment(
                        id=str(record["id"]),
                        provider=self.name,
                        set_id=str(record["set_id"]),
                        member=int(record["member"]),
                        path=str(record["path"]),
                        access=Access(record["access"]),
                        purpose=Purpose(record["purpose"]),
                        since=datetime.fromisoformat(since) if since else None,
                        held=maker is not None and processes.alive((maker[0], maker[1])),
                    )
                except (KeyError, ValueError, TypeError, IndexError):
                    continue

    def detach(self, attachment_id: str) -> None:
        if not ATTACHMENT_ID.fullmatch(attachment_id):
            raise ValueError(f"{attachment_id!r} is no attachment id")
        for store in self._known():
            for name in store.names("attachments"):
                if name.partition(".")[0] != attachment_id:
                    continue
                self._writable(store)
                with store.locked(f"attachments/{name}") as fd:
                    if fd is not None:
                        store.refuse_if_mounted(f"attachments/{name}", attachment_id)
                        store.destroy(store.discard(f"attachments/{name}"))
            store.clear_trash(attachment_id)

    # -- taking the origin's place --------------------------------------------------------------------------------

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        _check_name(swap_id)
        path = volume.id.partition(":")[2]
        with ExitStack() as stack:
            store = self._at(stack, volume.id)
            stack.enter_context(_told(volume.path or volume.id))
            if not snapshot.volume.startswith(store.key + ":"):
                raise PreconditionError(
                    "is on another file system than the set", object=volume.id, cure="restore with --to, and copy"
                )
            source = self._image(store, snapshot, stack)
            self._writable(store)
            for other in store.names("swaps"):
                if other == swap_id or self._swap_record(store, other).get("volume") == path:
                    raise BusyError(f"swap {other} is open", object=volume.id, cure="take it back or commit it")
            origin = self._check_swappable(store, path, stack)
            record = {"volume": path, "origin": origin.uuid, "clone": None}
            fd = store.born("swaps", swap_id, {"swap": _json(record, path)})
            stack.callback(os.close, fd)
            btrfs.snapshot(source, fd, "other", read_only=False)
            clone = _subvolume_at(fd, "other")
            assert clone is not None
            _write_record(fd, "swap", _json({**record, "clone": clone.uuid}, path))
            self._exchange(store, swap_id, path)

    def _check_swappable(self, store: Store, path: str, stack: ExitStack) -> Subvolume:
        what = f"{store.key}:{path}"
        if path == "/":
            raise PreconditionError(
                "is the top level of its file system, which has no place to be swapped in",
                object=what,
                cure="restore with --to, and copy",
            )
        fd = store.subvolume(path)
        stack.callback(os.close, fd)
        found = btrfs.subvolume(fd)
        self._refuse_in_use(store, path, fd)
        if btrfs.default_subvolume(store.top) == found.id:
            raise PreconditionError(
                "is the default subvolume, and the set-aside would stay that",
                object=what,
                cure=f"mount it by subvol={path}, then: btrfs subvolume set-default 5 {store.name}",
            )
        for number, line in _by_number(store.fs, found.id):
            raise PreconditionError(
                f"{FSTAB}, line {number}, mounts it by subvolid={found.id}, which would be the set-aside: {line}",
                object=what,
                cure=f"write subvol={path} there instead",
            )
        return found

    @staticmethod
    def _refuse_in_use(store: Store, path: str, fd: int) -> None:
        what = f"{store.key}:{path}"
        for point in store.mounted_at(path):
            raise BusyError(f"is mounted at {point}, which would go on to show it", object=what, cure=f"umount {point}")
        for below, _ in btrfs.nested(fd):
            raise BusyError(
                f"holds another subvolume, {below!r}, which would go along with it",
                object=what,
                cure="move that away, or restore with --to, and copy",
            )

    @staticmethod
    def _exchange(store: Store, swap_id: str, path: str) -> None:
        """What is at `path` and the swap's `other` change places, and that is on the disk."""
        try:
            btrfs.rename(store.fd, f"swaps/{swap_id}/other", store.top, path.lstrip("/"), exchange=True)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise BusyError("something is mounted on it", object=f"{store.key}:{path}", cure="unmount it") from None
            raise
        btrfs.commit(store.top)

    @staticmethod
    def _swap_record(store: Store, swap_id: str) -> dict[str, Any]:
        fd = _open(f"swaps/{swap_id}", store.fd)
        if fd is None:
            return {}
        try:
            return _object(_record(fd, "swap")) or {}
        finally:
            os.close(fd)

    def swap_back(self, swap_id: str) -> None:
        _check_name(swap_id)
        for store in self._known():
            if store.has(f"swaps/{swap_id}"):
                self._writable(store)
                with store.locked(f"swaps/{swap_id}") as fd, _told(store.name):
                    if fd is not None:
                        self._take_back(store, swap_id, fd)
                        store.destroy(store.discard(f"swaps/{swap_id}"))
            store.clear_trash(swap_id)

    def _take_back(self, store: Store, swap_id: str, fd: int) -> None:
        """The origin is at its place again, whichever step the swap had come to."""
        record = self._swap_record(store, swap_id)
        path, origin = str(record.get("volume")), record.get("origin")
        other = _subvolume_at(fd, "other")
        there = _subvolume_at(store.top, path.lstrip("/"))
        if other is None or other.uuid != origin:
            if there is None or there.uuid != origin:
                raise StorageError(
                    "what was set aside is gone", object=swap_id, cure="keep what is there: commit the swap"
                )
            return
        if there is None:
            btrfs.rename(store.fd, f"swaps/{swap_id}/other", store.top, path.lstrip("/"))
            btrfs.commit(store.top)
            return
        if there.uuid != record.get("clone"):
            raise BusyError(
                "something else has been put there since the swap", object=f"{store.key}:{path}", cure="move it away"
            )
        live = store.subvolume(path)
        try:
            self._refuse_in_use(store, path, live)
        finally:
            os.close(live)
        self._exchange(store, swap_id, path)

    def swap_commit(self, swap_id: str) -> None:
        _check_name(swap_id)
        for store in self._known():
            at = f"swaps/{swap_id}"
            if store.has(at):
                self._writable(store)
                with store.locked(at) as fd, _told(store.name):
                    if fd is not None:
                        record, other = self._swap_record(store, swap_id), _subvolume_at(fd, "other")
                        if other is not None and other.uuid != record.get("origin"):
                            raise StorageError("the swap was never finished", object=swap_id, cure="take it back")
                        store.refuse_if_mounted(at, swap_id)
                        store.destroy(store.discard(at))
            store.clear_trash(swap_id)

    def swaps(self) -> Iterator[str]:
        for store in self._known():
            yield from sorted(store.names("swaps"))


def _check_name(swap_id: str) -> None:
    if not _NAME.fullmatch(swap_id):
        raise ValueError(f"{swap_id!r} is no swap id")


def _member(birth: Birth, volume: Volume) -> int:
    for number, member in enumerate(birth.members):
        if (member.provider, member.volume) == (BtrfsProvider.name, volume.id):
            return number
    raise PreconditionError("is no member of the set", object=volume.id)


def _join(path: str, below: str) -> str:
    return f"{path.rstrip('/')}/{below}"


def _room(fd: int) -> tuple[int, int]:
    """Bytes in all and available; the kernel says 0 available where metadata has no room left."""
    found = os.fstatvfs(fd)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _subvolume_at(at: int, path: str) -> Subvolume | None:
    fd = _open(path, at)
    if fd is None:
        return None
    try:
        return btrfs.subvolume(fd) if btrfs.is_top(os.fstat(fd)) else None
    finally:
        os.close(fd)


def _by_number(fs: FileSystem, number: int) -> Iterator[tuple[int, str]]:
    """(line number, line) of each line of fstab that mounts this subvolume by its number, as far as can be told."""
    try:
        with open(FSTAB, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for count, line in enumerate(lines, 1):
        words = line.split()
        if len(words) < 4 or words[0].startswith("#") or words[2] != "btrfs" or not _may_be(fs, words[0]):
            continue
        for option in words[3].split(","):
            name, _, value = option.partition("=")
            try:
                if name == "subvolid" and int(value, 0) == number:
                    yield count, line.strip()
            except ValueError:
                continue


def _may_be(fs: FileSystem, spec: str) -> bool:
    """False only where fstab's first field certainly names another file system."""
    if spec.upper().startswith("UUID="):
        return spec[5:].strip('"').lower() == fs.uuid
    try:
        found = os.stat(spec)
    except OSError:
        return True
    if not stat.S_ISBLK(found.st_mode):
        return True
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" in fs.devices()
