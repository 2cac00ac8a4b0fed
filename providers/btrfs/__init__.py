"""btrfs: read-only snapshots of subvolumes, writable clones, and swaps, by the kernel's own calls (`host.btrfs`). Must
know no policy: what is kept, and for how long, is the core's.

No `btrfs` command and no binding: PyPI's `btrfsutil` is a source that wants a C library and its headers, while the
ioctls need no child and no parsing, and give an errno instead of prose. A take costs the kernel's snapshot and a fsync.

A *volume* is a subvolume: `<first 13 characters of the file system's UUID>:<path from the top level>`. The path and not
the kernel's number is its identity: a swap puts another subvolume in that place, and it is still the same target. Not
the whole UUID, because a birth record has 560 bytes for all the volumes of its set.

Ours are (`host.btrfs_store`), in the subvolume .snapshotter-btrfs at the top level:

    sets/<set id>/             birth, order, marks; in it <member>: the read-only snapshots
    attachments/<id>.<member>/ attachment; in it clone, where writable
    swaps/<swap id>/           swap; in it other: the clone before the exchange, the set-aside after it
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TypeVar

from providers.btrfs import images
from snapshotter.core.errors import (
    BusyError,
    NotFoundError,
    PreconditionError,
    QuiesceError,
    SnapshotterError,
    StorageError,
    put_off,
)
from snapshotter.core.labels import LabelLimits, apply_marks, check_marks, encode_birth
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
from snapshotter.host import btrfs, mounts
from snapshotter.host.btrfs import DIRECTORY, STORE, FileSystem
from snapshotter.host.btrfs_store import (
    Store,
    as_object,
    read_only,
    read_record,
    subvolume_at,
    told,
    write_record,
)
from snapshotter.host.mounts import Mount, is_under
from snapshotter.provider import Provider, Settings, Traits

T = TypeVar("T")
_BELIEVED_S = 0.5  # how long a file system's answer to "do you take changes?" is
_PATIENCE_S = 3.0
_SWAP_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


class BtrfsProvider(Provider):
    """See the module."""

    name = images.NAME
    traits = Traits(
        atomic_across_volumes=False,
        quiesce=Quiesce.NONE,
        writable_clone=True,
        swaps=True,
        needs_host=True,
        subvolumes_apart=True,
        limits=LabelLimits(),
    )

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._prepared: dict[str, list[str]] = {}  # set id -> file systems that have its directory
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
            fd = os.open(top, DIRECTORY)
            try:
                key = images.key_of(btrfs.file_system_id(fd))
            finally:
                os.close(fd)
        except OSError as error:
            raise PreconditionError(f"can't look at it: {error.strerror}", object=path, cure="run as root") from None
        # Where this is no subvolume (a directory that is mounted by itself) the top is out of sight: `check` refuses.
        return Volume(self.name, f"{key}:{mounts.inside(top, mount)}", top, mount.fstype)

    def _file_systems(self) -> list[FileSystem]:
        return btrfs.mounted()

    def _stores(
        self, failed: dict[str, SnapshotterError], of: Sequence[str] | None = None
    ) -> Generator[Store, None, None]:
        """Every file system here that has a store of ours, open for the time of the loop's body; or those `of` these
        volumes, store or not. One that can't be opened hides no other: its error goes to `failed`, by its key."""
        keys = None if of is None else {volume.partition(":")[0] for volume in of}
        here = [fs for fs in self._file_systems() if keys is None or images.key(fs) in keys]
        if here and (reasons := btrfs.needs()):
            message, _, cure = reasons[0].partition(": ")
            raise PreconditionError(message, object="btrfs", cure=cure)
        for fs in here:
            try:
                with told(fs.mount.path):
                    store = Store(fs)
            except SnapshotterError as error:
                if any(mount.device == fs.mount.device for mount in mounts.table()):
                    failed[images.key(fs)] = error
                continue  # unmounted since we looked
            with store:
                if keys is not None or store.fd >= 0:
                    yield store

    def _all(self, act: Callable[[Store], Iterable[T]]) -> Iterator[T]:
        """What `act` finds on every file system. One that fails hides no other: its error comes last."""
        failed: dict[str, SnapshotterError] = {}
        late: list[SnapshotterError] = []
        for store in self._stores(failed):
            with put_off(late), told(store.name):
                yield from act(store)
        for error in (*failed.values(), *late):
            raise error

    def _holding(self, keys: Callable[[Store], set[str]]) -> Iterator[Store]:
        """The file systems for which `keys` isn't empty: of all those that hold a part of what is looked for. Another
        may fail; the error of one of these, or of any if none is known to hold a part, comes last."""
        failed: dict[str, SnapshotterError] = {}
        needed: set[str] = set()
        for store in self._stores(failed):
            found: set[str] = set()
            late: list[SnapshotterError] = []
            with put_off(late), told(store.name):
                found = keys(store)
            if late:
                failed[images.key(store.fs)] = late[0]
            if found:
                needed |= found
                yield store
        for key, error in failed.items():
            if not needed or key in needed:
                raise error

    def _store_of(self, stack: ExitStack, volume: str) -> Store:
        """The volume's file system, open until the stack ends. Raises PreconditionError if it isn't mounted here."""
        failed: dict[str, SnapshotterError] = {}
        found = self._stores(failed, of=[volume])
        stack.callback(found.close)
        store = next(found, None)
        if store is None:
            for error in failed.values():
                raise error
            raise PreconditionError("its file system isn't mounted here", object=volume, cure="mount it")
        return store

    def _writable(self, store: Store, *, patience_s: float = _PATIENCE_S, now: bool = False) -> None:
        """Raise unless the file system takes changes. `now`: ask, however short ago it said that it did."""
        if store.fs.read_only:
            raise read_only(store.name)
        if now or time.monotonic() - self._answered.get(store.fs.uuid, -_BELIEVED_S) >= _BELIEVED_S:
            btrfs.refuse_if_stuck(store.top, store.name, patience_s)
            self._answered[store.fs.uuid] = time.monotonic()

    # -- before ---------------------------------------------------------------------------------------------------

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        encode_birth(birth)
        for volume in volumes:
            with ExitStack() as stack:
                store = self._store_of(stack, volume.id)
                with told(store.name):
                    self._writable(store)
                    store.check_place()
                    self._check_subvolume(store, volume, birth)
                    if birth.slot and store.fd >= 0:  # taken? That must be told from all sets here: see `of_slot`
                        list(images.snapshots(store))
                    total, free = _room(store.top)
            if free < total * self.settings.floor:
                raise PreconditionError(
                    f"has {free >> 20} MiB free of {total >> 20}, and {self.settings.floor:.0%} must stay so, as "
                    "snapshots keep what is deleted",
                    object=store.name,
                    cure="delete old sets, free some space, or lower `floor`",
                )

    def _check_subvolume(self, store: Store, volume: Volume, birth: Birth) -> None:
        path = images.path(volume.id)
        what = volume.path or volume.id
        if is_under(path, f"/{STORE}") and not is_under(path, f"/{STORE}/attachments"):
            raise PreconditionError(
                "shows what is in snapshotter's own store: an old mount of what a swap set aside?",
                object=what,
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
                # A snapshot has an empty directory in its place.
                if _within(below, root.inside) and f"{images.key(store.fs)}:{_join(path, below)}" not in covered:
                    raise PreconditionError(
                        f"{below!r} in it is a subvolume of its own, which its snapshot would not hold",
                        object=what,
                        cure=f"extra_paths = [{_join(what, below)!r}]",
                    )

    def space(self, volumes: Sequence[Volume]) -> Space:
        total = free = 0
        detail: dict[str, int] = {}
        failed: dict[str, SnapshotterError] = {}
        for store in self._stores(failed, of=[volume.id for volume in volumes]):
            with told(store.name):
                room = _room(store.top)
                total, free = total + room[0], free + room[1]
                for name, number in btrfs.usage(store.top).items():
                    detail[name] = detail.get(name, 0) + number
                could_be = detail["metadata_total"] + detail["unallocated"]
                detail["metadata percent"] = round(100 * detail["metadata_used"] / max(1, could_be))
        for error in failed.values():
            raise error
        return Space(total_bytes=total, free_bytes=free, detail=detail)

    # -- making ---------------------------------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[Volume], birth: Birth, budget: float) -> None:
        """The set's directory, with its record, on each file system that it will be on."""
        _check_id(SET_ID, birth.set_id)
        if birth.set_id in self._prepared:
            return
        record = encode_birth(birth.of_member(0)).encode()
        try:
            for key in dict.fromkeys(volume.id.partition(":")[0] for volume in volumes):
                with ExitStack() as stack:
                    store = self._store_of(stack, f"{key}:")
                    stack.enter_context(told(store.name))
                    self._writable(store)
                    store.make()
                    records = {"birth": record, "order": str(_next_order(store)).encode()}
                    os.close(store.born("sets", birth.set_id, records))
                    self._prepared.setdefault(birth.set_id, []).append(key)
        except BaseException:
            self._withdraw(birth.set_id)
            raise

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        self.prepare(volumes, birth, 0.0)
        made: dict[int, Snapshot] = {}
        try:
            for volume in volumes:
                with ExitStack() as stack:
                    store = self._store_of(stack, volume.id)
                    stack.enter_context(told(volume.path or volume.id))
                    made[images.member(birth, volume)] = self._shoot(store, volume, birth, hold)
        except BaseException:
            self._withdraw(birth.set_id)
            raise
        del self._prepared[birth.set_id]
        return tuple(made[images.member(birth, volume)] for volume in volumes)

    def _withdraw(self, set_id: str) -> None:
        """Only the rename: the writers may be held, and the core calls `delete` when they aren't any more."""
        for key in self._prepared.pop(set_id, []):
            for store in self._stores({}, of=[key]):
                try:
                    with told(store.name):
                        self._writable(store, patience_s=0.5, now=True)  # what failed may be that it is frozen
                        if store.has(f"sets/{set_id}"):
                            store.discard(f"sets/{set_id}")
                except SnapshotterError:
                    continue  # `delete` finds it

    def _shoot(self, store: Store, volume: Volume, birth: Birth, hold: Hold) -> Snapshot:
        if hold.deadline is not None:
            left = hold.deadline - time.monotonic()
            if left <= 0:
                raise QuiesceError("the time for which the writers may be held is over", object=volume.id)
            # Whoever holds the writers may have frozen the file system itself.
            self._writable(store, patience_s=min(_PATIENCE_S, left / 2), now=True)
        number = images.member(birth, volume)
        with ExitStack() as stack:
            source = store.subvolume(images.path(volume.id))
            stack.callback(os.close, source)
            at = stack.enter_context(store.locked(f"sets/{birth.set_id}", wait_s=0.2))
            if at is None:
                raise StorageError("was deleted while it was being made", object=birth.set_id, cure="take another set")
            btrfs.snapshot(source, at, str(number), read_only=True)
            return next(
                each for each in images.of_set(images.key(store.fs), at, birth.set_id) if each.birth.member == number
            )

    # -- afterwards -----------------------------------------------------------------------------------------------

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        if set_id is None:
            yield from self._all(images.snapshots)
            return
        for store in self._of_set(set_id):
            with told(store.name):
                yield from images.snapshots(store, set_id)

    def _of_set(self, set_id: str) -> Iterator[Store]:
        return self._holding(
            lambda store: images.keys_of_set(store, f"sets/{set_id}") if SET_ID.fullmatch(set_id) else set()
        )

    def of_slot(self, target: str, slot: str) -> Iterator[Snapshot]:
        """Only on file systems that can be read now: a target's rivals are all on this host, whose lock lets one take
        at a time; and those that the set would be on are asked by `check`."""
        for store in self._stores({}):
            with put_off([]), told(store.name):
                found = images.snapshots(store)
                yield from (each for each in found if (each.birth.target, each.birth.slot) == (target, slot))

    def sees(self, volume: str) -> bool:
        return volume.partition(":")[0] in {images.key(fs) for fs in self._file_systems()}

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        check_marks(changes)
        for write in (False, True):  # all file systems that the set is on are asked before the first is written to
            there = False
            for store in self._of_set(set_id):
                with told(store.name):
                    there = self._mark_in(store, set_id, changes, write=write) or there
            if not there:
                raise NotFoundError("no such set", object=set_id, cure="`snapshotter list` shows all")

    def _mark_in(self, store: Store, set_id: str, changes: Mapping[str, str | None], *, write: bool) -> bool:
        self._writable(store)
        with store.locked(f"sets/{set_id}") as fd:
            found = list(images.snapshots(store, set_id)) if fd is not None else []
            if fd is None or not found:
                return False
            for member in found:
                if not member.marks_known:
                    raise StorageError("its marks are damaged, or of a newer version", object=set_id)
                if changes.get("sealed") and member.state is not ImageState.READY:
                    raise StorageError(f"can't be sealed: {member.why}", object=set_id)
            if write:
                write_record(fd, "marks", as_object({"marks": apply_marks(found[0].marks, changes)}, set_id))
                os.fsync(fd)  # the image is on the disk since it was made (`btrfs.snapshot`)
            return True

    def delete(self, set_id: str) -> None:
        _check_id(SET_ID, set_id)
        self._prepared.pop(set_id, None)

        def keys(store: Store) -> set[str]:
            trashed = [f"trash/{name}" for name in store.names("trash") if name.startswith(set_id + ".")]
            return {key for at in (f"sets/{set_id}", *trashed) for key in images.keys_of_set(store, at)}

        for store in self._holding(keys):
            with told(store.name):
                if store.has(f"sets/{set_id}"):
                    self._delete_in(store, set_id)
                store.clear_trash(set_id)

    def _delete_in(self, store: Store, set_id: str) -> None:
        self._writable(store)
        with store.locked(f"sets/{set_id}", wait_s=0.2) as fd:
            if fd is None:
                return
            for _, record in images.attachments(store):
                if record.get("set_id") == set_id:
                    where = record.get("path")
                    raise BusyError(
                        f"is attached at {where} ({record.get('id')})",
                        object=set_id,
                        cure=f"snapshotter release {where}",
                    )
            store.refuse_if_mounted(f"sets/{set_id}", set_id)
            store.destroy(store.discard(f"sets/{set_id}"))

    def reap(self) -> list[str]:
        return list(self._all(self._empty_trash))

    def _empty_trash(self, store: Store) -> Iterator[str]:
        for name in store.names("trash"):
            self._writable(store)
            try:
                with store.locked(f"trash/{name}", wait_s=0.0) as fd:
                    if fd is not None:
                        store.destroy(f"trash/{name}")
                        yield f"{STORE}/trash/{name} on {store.name}"
            except BusyError:
                continue  # a live process works on it, or what keeps it is another's

    # -- attachments ----------------------------------------------------------------------------------------------

    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec | Tree:
        from snapshotter.host import processes

        _check_id(ATTACHMENT_ID, attachment_id)
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
        with ExitStack() as stack:
            store = self._store_of(stack, snapshot.volume)
            stack.enter_context(told(store.name))
            source = images.open_image(store, snapshot, stack)
            self._writable(store)
            name = f"{attachment_id}.{number}"
            fd = store.born("attachments", name, {"attachment": as_object(record, destination)})
            stack.callback(os.close, fd)
            if not store.has(f"sets/{set_id}/{number}"):
                # A delete looked for attachments just before there was this one.
                raise NotFoundError("was deleted meanwhile", object=set_id)
            options: tuple[str, ...]
            if access is Access.READ_ONLY:
                options = ("ro", "nosuid", "nodev", f"subvol=/{STORE}/sets/{set_id}/{number}")
            else:
                btrfs.snapshot(source, fd, "clone", read_only=False)
                options = (f"subvol=/{STORE}/attachments/{name}/clone",)
            return MountSpec(store.fs.source(), self.name, options)

    def settle(self, attachment_id: str, since: datetime) -> None:
        there = False
        stamp = {"since": since.astimezone(UTC).isoformat(), "maker": None}
        for store in self._holding(lambda store: images.keys_of_attachment(store, attachment_id)):
            with told(store.name):
                for path, record in list(images.attachments(store)):
                    if record.get("id") != attachment_id:
                        continue
                    self._writable(store)
                    with store.locked(path) as fd:
                        if fd is not None:
                            write_record(fd, "attachment", as_object({**record, **stamp}, attachment_id))
                            os.fsync(fd)
                            there = True
        if not there:
            raise NotFoundError("no such attachment", object=attachment_id)

    def attachments(self) -> Iterator[Attachment]:
        for _, record in self._all(images.attachments):
            try:
                yield images.attachment(record)
            except (KeyError, ValueError, TypeError, IndexError):
                continue

    def detach(self, attachment_id: str) -> None:
        _check_id(ATTACHMENT_ID, attachment_id)
        for store in self._holding(lambda store: images.keys_of_attachment(store, attachment_id)):
            with told(store.name):
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
        from providers.btrfs import swaps  # nothing that a take needs

        _check_id(_SWAP_ID, swap_id)
        path = images.path(volume.id)
        with ExitStack() as stack:
            store = self._store_of(stack, volume.id)
            stack.enter_context(told(volume.path or volume.id))
            if not snapshot.volume.startswith(images.key(store.fs) + ":"):
                raise PreconditionError(
                    "is on another file system than the set", object=volume.id, cure="restore with --to, and copy"
                )
            source = images.open_image(store, snapshot, stack)
            self._writable(store)
            for other in store.names("swaps"):
                if other == swap_id or (store.object(f"swaps/{other}", "swap") or {}).get("volume") == path:
                    raise BusyError(f"swap {other} is open", object=volume.id, cure="take it back or commit it")
            origin = swaps.check_swappable(store, volume)
            record = {"volume": path, "origin": origin.uuid, "clone": None}
            fd = store.born("swaps", swap_id, {"swap": as_object(record, path)})
            stack.callback(os.close, fd)
            btrfs.snapshot(source, fd, "other", read_only=False)
            clone = subvolume_at(fd, "other")
            if clone is None:
                raise StorageError("the clone is gone as soon as it was made", object=swap_id, cure="try again")
            write_record(fd, "swap", as_object({**record, "clone": clone.uuid}, path))
            swaps.exchange(store, swap_id, path)

    def swap_back(self, swap_id: str) -> None:
        from providers.btrfs import swaps

        _check_id(_SWAP_ID, swap_id)
        for store in self._holding(lambda store: images.keys_of_swap(store, swap_id)):
            with told(store.name):
                if store.has(f"swaps/{swap_id}"):
                    self._writable(store)
                    with store.locked(f"swaps/{swap_id}") as fd:
                        if fd is not None:
                            swaps.take_back(store, swap_id, fd)
                            store.destroy(store.discard(f"swaps/{swap_id}"))
                store.clear_trash(swap_id)

    def swap_commit(self, swap_id: str) -> None:
        from providers.btrfs import swaps

        _check_id(_SWAP_ID, swap_id)
        for store in self._holding(lambda store: images.keys_of_swap(store, swap_id)):
            with told(store.name):
                if store.has(f"swaps/{swap_id}"):
                    self._writable(store)
                    with store.locked(f"swaps/{swap_id}") as fd:
                        if fd is not None:
                            swaps.forget_origin(store, swap_id, fd)
                store.clear_trash(swap_id)

    def swaps(self) -> Iterator[str]:
        return self._all(lambda store: sorted(store.names("swaps")))


def _join(path: str, below: str) -> str:
    return f"{path.rstrip('/')}/{below}"


def _within(path: str, top: str) -> bool:
    return is_under(f"/{path}", f"/{top}" if top else "/")


def _room(fd: int) -> tuple[int, int]:
    """Bytes in all, and available: the kernel says 0 where metadata has no room left."""
    found = os.fstatvfs(fd)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _next_order(store: Store) -> int:
    """A number above all given out before on this file system; about the UTC second, so that those of several file
    systems and providers compare."""
    with store.locked("sets") as fd:
        assert fd is not None
        last = int(read_record(fd, "order") or b"0")
        number = max(last + 1, int(time.time()))
        write_record(fd, "order", str(number).encode())
        return number


def _check_id(pattern: re.Pattern[str], given: str) -> None:
    if not pattern.fullmatch(given):
        raise ValueError(f"{given!r} is no id")
