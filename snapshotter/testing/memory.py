"""A complete Provider whose storage is an object in memory: for tests, and to learn from when you write a driver.

Its volumes are real directories that it reads when a snapshot is made, so the origin is alive. Several providers may
share one `MemoryStore`: a new run after a crash is a new provider on the same store. Knows nothing above the interface.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar

from msgspec.structs import replace

from snapshotter.core.errors import (
    BusyError,
    NotFoundError,
    PreconditionError,
    QuiesceError,
    StorageError,
)
from snapshotter.core.labels import LabelLimits, apply_marks, pack, unpack
from snapshotter.core.model import (
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
from snapshotter.host.mounts import Mount, is_under
from snapshotter.provider import Provider, Settings, Traits
from snapshotter.testing.images import Image, read_tree, remove, size, write_tree

#: As strict as the strictest store known, so that records are chunked as they are there.
STRICT = LabelLimits(max_value=256, max_chunks=4, value_pattern=r"[A-Za-z0-9_-]*")
_MARK = "mark-"
_PATIENCE_S = 30.0


@dataclass(slots=True)
class StoredObject:
    """What lies in the store under one name: ours if its labels hold a birth record, else another tool's."""

    image: Image
    labels: dict[str, str]
    order: int
    polls: int = 0  # listed as PENDING so many times more
    invalid: str = ""  # why there is no image any more


@dataclass(slots=True)
class StoredAttachment:
    listed: Attachment
    run: int
    made_directory: bool = False
    fd: int = -1  # holds the directory's inode number, so that no other directory can get it


@dataclass(slots=True)
class StoredSwap:
    volume: str
    path: str
    committed: bool = False

    def aside(self, swap_id: str) -> str:
        return f"{self.path}.aside-{swap_id}"

    def clone(self, swap_id: str) -> str:
        return f"{self.path}.clone-{swap_id}"


class MemoryStore:
    """The storage. Tests reach in: `add_foreign`, `invalidate`, `upload_polls`, `offline`, `crash`, `objects`."""

    def __init__(self, capacity_bytes: int = 1 << 32) -> None:
        self.capacity_bytes = capacity_bytes
        self.objects: dict[str, StoredObject] = {}
        self.volumes: dict[str, str] = {}
        self.attachments: dict[tuple[str, int], StoredAttachment] = {}
        self.swaps: dict[str, StoredSwap] = {}
        self.upload_polls = 0  # new snapshots are PENDING for so many listings
        self.offline = ""  # a reason: every call fails with it
        self.run = 0
        self.orders = 0
        self.lock = threading.RLock()

    def add_volume(self, path: str) -> Volume:
        """The directory `path` becomes a volume of this store (or is one already)."""
        path = os.path.realpath(path)
        known = [identity for identity, top in self.volumes.items() if top == path]
        identity = known[0] if known else f"m{len(self.volumes) + 1}"
        self.volumes[identity] = path
        return Volume(provider=MemoryProvider.name, id=identity, path=path, fstype="memory")

    def add_foreign(self, name: str, labels: Mapping[str, str] | None = None) -> None:
        """Another tool's snapshot."""
        self.orders += 1
        given = {"owner": "another-tool"} if labels is None else dict(labels)
        self.objects[name] = StoredObject(image={}, labels=given, order=self.orders)

    @property
    def foreign(self) -> list[str]:
        """Names of other tools' objects."""
        return [name for name, found in self.objects.items() if unpack(found.labels) is None]

    def invalidate(self, set_id: str, member: int) -> None:
        """The storage loses this image, and keeps its labels."""
        for found in self.objects.values():
            birth = unpack(found.labels)
            if birth is not None and (birth.set_id, birth.member) == (set_id, member):
                found.image, found.invalid = {}, "the storage dropped it"

    def crash(self) -> None:
        """Every run so far is dead: what it attached is no longer held."""
        self.run += 1

    def used_bytes(self) -> int:
        return sum(size(found.image) for found in self.objects.values())


class MemoryProvider(Provider):
    """The driver. `atomic=False` makes several volumes several instants, as most stores do."""

    name: ClassVar[str] = "memory"
    traits: ClassVar[Traits] = Traits(
        atomic_across_volumes=True,
        quiesce=Quiesce.NONE,
        writable_clone=True,
        swaps=True,
        needs_host=True,
        limits=STRICT,
    )

    def __init__(self, settings: Settings, store: MemoryStore, *, atomic: bool = True) -> None:
        super().__init__(settings)
        self._store = store
        if not atomic:
            vars(self)["traits"] = replace(self.traits, atomic_across_volumes=False)

    @property
    def store(self) -> MemoryStore:
        if self._store.offline:
            raise StorageError(self._store.offline, object=self.name)
        return self._store

    # -- what is there ------------------------------------------------------------------------------------------

    def availability(self) -> list[str]:
        return [f"{self._store.offline}; bring it back"] if self._store.offline else []

    def claim(self, mount: Mount, path: str) -> Volume | None:
        above = [top for top in self._store.volumes.values() if is_under(path, top)]
        return self._store.add_volume(max(above, key=len)) if above else None

    def space(self, volumes: Sequence[Volume]) -> Space:
        pins = sum(size(read_tree(self._top(volume))) for volume in volumes)
        total = self.store.capacity_bytes
        return Space(total_bytes=total, free_bytes=max(0, total - self.store.used_bytes()), will_pin_bytes=pins)

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        for name, found in sorted(self._ours(set_id).items()):
            listed = self._snapshot(name, found)
            found.polls = max(0, found.polls - 1)  # time goes by while somebody watches
            yield listed

    def attachments(self) -> Iterator[Attachment]:
        for found in list(self.store.attachments.values()):
            yield replace(found.listed, held=found.run == self.store.run)

    def swaps(self) -> Iterator[str]:
        return iter(sorted(name for name, found in self.store.swaps.items() if not found.committed))

    # -- a set's life -------------------------------------------------------------------------------------------

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        for member, volume in enumerate(volumes):
            self._top(volume)
            pack(birth.of_member(member), self.traits.limits)
        room = self.space(volumes)
        assert room.free_bytes is not None and room.total_bytes is not None and room.will_pin_bytes is not None
        if room.free_bytes - room.will_pin_bytes < self.settings.floor * room.total_bytes:
            raise PreconditionError("the store has no room", object=self.name, cure="delete old sets")

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        with self.store.lock:
            if self._ours(birth.set_id):
                raise BusyError("exists", object=birth.set_id, cure="choose another id")
            # Everything that can fail comes first; then the objects appear all at once, labels and all.
            labels = [pack(birth.of_member(member), self.traits.limits) for member in range(len(volumes))]
            tops = [self._top(volume) for volume in volumes]
            if self.traits.atomic_across_volumes:
                images = _read_at_one_instant(tops, hold)
            else:
                images = [image for top in tops for image in _read_at_one_instant([top], hold)]
            if self.store.used_bytes() + sum(map(size, images)) > self.store.capacity_bytes:
                raise StorageError("the store is full", object=self.name, cure="delete old sets")
            self.store.orders += 1
            made = {
                f"{birth.set_id}-{member}": StoredObject(image, label, self.store.orders, self.store.upload_polls)
                for member, (image, label) in enumerate(zip(images, labels, strict=True))
            }
            self.store.objects.update(made)
            return tuple(self._snapshot(name, found) for name, found in made.items())

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        with self.store.lock:
            ours = self._ours(set_id)
            if not ours:
                raise NotFoundError("no such set", object=set_id)
            marked = {name: apply_marks(_marks(found.labels), changes) for name, found in ours.items()}
            for name, marks in marked.items():
                labels = {key: value for key, value in ours[name].labels.items() if not key.startswith(_MARK)}
                ours[name].labels = labels | {_MARK + key: value for key, value in marks.items()}

    def delete(self, set_id: str) -> None:
        with self.store.lock:
            for used in self.store.attachments.values():
                if used.listed.set_id == set_id:
                    raise BusyError(
                        f"is attached by {used.listed.id}",
                        object=set_id,
                        cure=f"release {used.listed.path} first",
                    )
            for name in self._ours(set_id):
                del self.store.objects[name]

    # -- making it usable ---------------------------------------------------------------------------------------

    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec | Tree:
        with self.store.lock:
            image = self._usable_image(snapshot)
            key = (attachment_id, snapshot.birth.member)
            if key in self.store.attachments:
                raise BusyError("exists", object=attachment_id, cure="choose another id")
            there = os.path.lexists(destination)
            if there and (os.path.islink(destination) or not os.path.isdir(destination) or os.listdir(destination)):
                raise PreconditionError("is not an empty directory", object=destination, cure="name another place")
            listed = Attachment(
                id=attachment_id,
                provider=self.name,
                set_id=snapshot.birth.set_id,
                member=snapshot.birth.member,
                path=destination,
                access=access,
                purpose=purpose,
                since=None,  # until settle
                tree=True,
            )
            # Recorded before the first byte is written: whatever happens from here on, detach finds it.
            record = StoredAttachment(listed, self.store.run, made_directory=not there)
            self.store.attachments[key] = record
            try:
                if not there:
                    os.mkdir(destination)
                record.fd = os.open(destination, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                write_tree(image, destination, read_only=access is Access.READ_ONLY)
            except OSError as error:
                raise StorageError(f"can't write it: {error.strerror}", object=destination) from error
            return Tree(destination)

    def settle(self, attachment_id: str, since: datetime) -> None:
        with self.store.lock:
            parts = [record for (name, _), record in self.store.attachments.items() if name == attachment_id]
            if not parts:
                raise NotFoundError("no such attachment", object=attachment_id)
            for record in parts:
                record.listed = replace(record.listed, since=since)

    def detach(self, attachment_id: str) -> None:
        with self.store.lock:
            for key, record in list(self.store.attachments.items()):
                if key[0] != attachment_id:
                    continue
                try:
                    _clear(record)
                except OSError as error:
                    raise StorageError(f"can't remove it: {error.strerror}", object=record.listed.path) from error
                del self.store.attachments[key]

    # -- taking the origin's place ------------------------------------------------------------------------------

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        with self.store.lock:
            image = self._usable_image(snapshot)
            path = self._top(volume)
            for other, found in self.store.swaps.items():
                if other == swap_id or found.volume == volume.id:
                    raise BusyError(f"swap {other} is open", object=volume.id, cure="take it back or commit it")
            swap = self.store.swaps[swap_id] = StoredSwap(volume.id, path)
            try:
                os.mkdir(swap.clone(swap_id))
                write_tree(image, swap.clone(swap_id))
                os.rename(path, swap.aside(swap_id))
                os.rename(swap.clone(swap_id), path)
            except OSError as error:
                raise StorageError(f"can't swap: {error.strerror}", object=path) from error

    def swap_back(self, swap_id: str) -> None:
        with self.store.lock:
            swap = self.store.swaps.get(swap_id)
            if swap is None:
                return
            if swap.committed:
                return self.swap_commit(swap_id)
            try:
                # Right at whichever step `swap` stopped: while the set-aside is there, the path has a clone or nothing.
                if os.path.lexists(swap.aside(swap_id)):
                    remove(swap.path)
                    os.rename(swap.aside(swap_id), swap.path)
                remove(swap.clone(swap_id))
            except OSError as error:
                raise StorageError(f"can't swap back: {error.strerror}", object=swap.path) from error
            del self.store.swaps[swap_id]

    def swap_commit(self, swap_id: str) -> None:
        with self.store.lock:
            swap = self.store.swaps.get(swap_id)
            if swap is None:
                return
            if not swap.committed and not (os.path.lexists(swap.aside(swap_id)) and os.path.lexists(swap.path)):
                raise StorageError("the swap was never finished", object=swap_id, cure="take it back")
            swap.committed = True  # from here on what is set aside may be half gone: no way back
            try:
                remove(swap.aside(swap_id))
            except OSError as error:
                raise StorageError(f"can't remove it: {error.strerror}", object=swap.aside(swap_id)) from error
            del self.store.swaps[swap_id]

    # -- within -------------------------------------------------------------------------------------------------

    def _ours(self, set_id: str | None) -> dict[str, StoredObject]:
        """Ours by label, whatever their names are."""
        return {
            name: found
            for name, found in self.store.objects.items()
            if (birth := unpack(found.labels)) is not None and set_id in (None, birth.set_id)
        }

    def _snapshot(self, name: str, found: StoredObject) -> Snapshot:
        birth = unpack(found.labels)
        assert birth is not None
        state = ImageState.INVALID if found.invalid else ImageState.PENDING if found.polls else ImageState.READY
        return Snapshot(
            provider=self.name,
            id=name,
            birth=birth,
            state=state,
            marks=_marks(found.labels),
            size_bytes=size(found.image),
            order=found.order,
            why=found.invalid,
        )

    def _usable_image(self, snapshot: Snapshot) -> Image:
        found = self._ours(snapshot.birth.set_id).get(snapshot.id)
        if found is None:
            raise NotFoundError("no such snapshot", object=snapshot.id)
        if found.invalid:
            raise StorageError(f"the image is invalid: {found.invalid}", object=snapshot.id)
        if found.polls:
            raise StorageError("the store still copies it", object=snapshot.id, cure="wait until it is ready")
        return found.image

    def _top(self, volume: Volume) -> str:
        top = self.store.volumes.get(volume.id)
        if top is None or not os.path.isdir(top):
            raise PreconditionError("there is no such volume", object=volume.id)
        return top


def _marks(labels: Mapping[str, str]) -> dict[str, str]:
    return {key.removeprefix(_MARK): value for key, value in labels.items() if key.startswith(_MARK)}


def _read_at_one_instant(tops: Sequence[str], hold: Hold) -> list[Image]:
    """The trees as they all were at one instant, while others write: read again until two readings in a row are
    equal. What is the same in both was the same all the time from the first's end to the second's start."""
    give_up = hold.deadline or time.monotonic() + _PATIENCE_S
    last: list[Image] | None = None
    while True:
        try:
            now = [read_tree(top) for top in tops]
        except (FileNotFoundError, NotADirectoryError) as error:
            if not all(os.path.isdir(top) for top in tops):
                raise StorageError("the volume is gone", object=", ".join(tops)) from error
            now = None  # something went away under our hands
        except OSError as error:
            raise PreconditionError(f"can't read: {error.strerror}", object=error.filename or tops[0]) from error
        if now is not None and now == last:
            return now
        last = now
        if time.monotonic() > give_up:
            raise QuiesceError("changes too fast to be read", object=", ".join(tops), cure="pause the writers")


def _clear(record: StoredAttachment) -> None:
    """Remove what attach made, if it is still what is in that place."""
    if record.fd < 0:
        if record.made_directory and os.path.isdir(record.listed.path) and not os.listdir(record.listed.path):
            os.rmdir(record.listed.path)
        return
    try:
        same = os.path.samestat(os.fstat(record.fd), os.lstat(record.listed.path))
    except FileNotFoundError:
        same = False
    if same and record.made_directory:
        remove(record.listed.path)
    elif same:
        os.chmod(record.listed.path, 0o700)
        for name in os.listdir(record.listed.path):
            remove(os.path.join(record.listed.path, name))
    os.close(record.fd)
    record.fd = -1
