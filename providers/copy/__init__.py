"""copy: images as trees of files in a *store*, a directory of ours, on any local file system, privileged or not.

Files are reflinked where the file system can; else up to three passes copy while the writers run, and only what
changed since is copied inside the quiesce. Must know no policy: what is kept, and for how long, is the core's.

    store/snapshotter.store         makes it ours
    store/order                     the last number given out: the store's clock
    store/sets/<set id>/birth.json  there before the image; the directory appears by a rename with it inside
                       /marks.json
                       /image.json  written last: without it there is no image
                       /<member>/tree, /<member>/manifest
                       /attic       what a pass replaced; goes with the seal
                       /suspect     a set that may share files with this was found corrupt: none will share with it
    store/attachments/<id>.<member>.json    its time stamp: the last sign of life while a clone is made
    store/trash/                    deleting is a rename to here, so nothing is ever half-deleted and listed

flock on a set's directory says that somebody makes, marks, attaches or deletes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, ClassVar

from providers.copy import clones
from providers.copy.foreseeing import previous, room_needed
from providers.copy.making import MAKING, Making, Part, own
from providers.copy.sets import NAME, SUSPECT, Sets
from snapshotter.core.errors import (
    BusyError,
    NotFoundError,
    PreconditionError,
    QuiesceError,
    SnapshotterError,
    StorageError,
    put_off,
)
from snapshotter.core.labels import (
    LabelLimits,
    apply_marks,
    check_marks,
    encode_birth,
    path_hash,
)
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
from snapshotter.host import mounts, processes, tree
from snapshotter.host.mirror import Mirror, Shares
from snapshotter.host.mounts import Mount
from snapshotter.host.store import (
    STORE_CURE,
    KnownStores,
    canonical,
    check_place,
    default_store,
    readable,
    refused,
    room,
    store_around,
    sync_directory,
    told,
    unreadable,
    write_object,
)
from snapshotter.provider import Option, Provider, Settings, Traits


class CopyProvider(Provider):
    """See the module."""

    name = NAME
    traits = Traits(
        atomic_across_volumes=False,
        quiesce=Quiesce.PAUSE,
        writable_clone=True,
        swaps=False,
        needs_host=True,
        limits=LabelLimits(),
    )
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "store": Option(str, "directory for the copies (default: .snapshotter beside the data path)")
    }

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._used: list[str] = []
        self._cache = KnownStores(os.path.join(settings.state, "copy-stores"))
        #: Where the clones came from that there are, so that `release` finds them. Nothing else is looked for there: a
        #: copy of a store, which -o named, is somebody's archive, and none of its sets are this host's to prune.
        self._attached = KnownStores(os.path.join(settings.state, "copy-attached"))

    def availability(self) -> list[str]:
        return []

    def claim(self, mount: Mount, path: str) -> Volume | None:
        if refused(mount.fstype):
            return None
        # The path itself, unless it would take the birth record's room (560 bytes for everything).
        short = len(os.fsencode(path)) <= 64 and path.isascii()
        return Volume(provider=self.name, id=path if short else path_hash(path), path=path, fstype=mount.fstype)

    # -- which store ----------------------------------------------------------------------------------------------

    def _named(self) -> str | None:
        given = self.settings.options.get("store")
        return os.path.abspath(os.path.expanduser(str(given))) if given else None

    def _place(self, volumes: Sequence[Volume], birth: Birth) -> str:
        """Where the set's store is or will be. No effects. Raises PreconditionError: each rule has its cure."""
        tops = [volume.path for volume in volumes if volume.path is not None]
        if len(tops) != len(volumes) or not tops:
            raise PreconditionError("can only be copied where its files are seen", object=birth.node)
        first = birth.members[birth.roots[0].member]
        data = next((v.path for v in volumes if v.id == first.volume and first.provider == self.name), None) or tops[0]
        named = self._named()
        if named is None and mounts.is_mount_point(data):
            raise PreconditionError(
                "is a mount point, so nothing beside it is on its disk", object=data, cure=STORE_CURE
            )
        store = canonical(named or default_store(data))
        if (point := self._cache.away(store)) is not None:
            raise PreconditionError(
                f"was a store before, and nothing is mounted at {point} now: is its disk mounted?",
                object=store,
                cure=f"mount it, or remove the line from {self._cache.file}",
            )
        check_place(store, list(dict.fromkeys([*tops, *(r.path for r in birth.roots if r.path.startswith("/"))])))
        return store

    def _known(self, failed: list[SnapshotterError], *, attached: bool = False) -> Iterator[Sets]:
        """Every store that we know of (with `attached`, also those that only clones came from), open for the time of
        the loop's body. One that can't be opened hides no other: its error goes to `failed`."""
        usual = self._where()
        for path in self._where(attached):
            store = None
            with put_off(failed if path in usual else []):
                store = Sets.open(path)
            # A copy of a store that lies in an image isn't one more.
            if store is not None:
                with store:
                    if store_around(os.path.dirname(path)) is None:
                        yield store

    def _holding(self, holds: Callable[[Sets], bool], *, attached: bool = False) -> Iterator[Sets]:
        """As `_known`, those of which `holds` is true. All of a set is in one store, so the others may fail: only where
        none holds it, one of those might, and its error comes last."""
        failed: list[SnapshotterError] = []
        found = False
        for store in self._known(failed, attached=attached):
            held = False
            with put_off(failed), told(store.path):
                held = holds(store)
            if held:
                found = True
                yield store
        if failed and not found:
            raise failed[0]

    def _where(self, attached: bool = False) -> list[str]:
        """Where a store that we know of is or was, each path once."""
        named = self._named()
        found: dict[str, None] = {}
        paths = [named] if named else [*self._used, *self._cache.read(), *map(default_store, self.settings.paths)]
        paths += self._attached.read() if attached else []
        for path in paths:
            try:
                found[canonical(path)] = None
            except PreconditionError:
                continue
        return list(found)

    # -- before --------------------------------------------------------------------------------------------------

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        encode_birth(birth)
        place = self._place(volumes, birth)
        above = place if os.path.isdir(place) else os.path.dirname(place)
        needed = 0
        for volume in volumes:
            needed += room_needed(volume, birth, above)
        total, free = room(above)
        reserve = int(total * self.settings.floor)
        if needed + reserve > free:
            raise PreconditionError(
                f"needs {readable(needed)} on the store's file system, where {readable(free)} are free and "
                f"{readable(reserve)} ({self.settings.floor:.0%}) must stay so",
                object=place,
                cure=f"{_of_corrupt(birth, place)}free some space, lower `floor`, or {STORE_CURE}",
            )
        if birth.slot:  # whether it was taken must be told from all of the store's sets: see `of_slot`
            store = Sets.open(place)
            if store is not None:
                with store, told(place):
                    list(store.snapshots())

    def space(self, volumes: Sequence[Volume]) -> Space:
        named = self._named()
        first = next((volume.path for volume in volumes if volume.path), "/")
        at = canonical(named or default_store(first))
        while not os.path.isdir(at):
            at = os.path.dirname(at)
        total, free = room(at)
        return Space(total_bytes=total, free_bytes=free)

    # -- making ----------------------------------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[Volume], birth: Birth, budget: float) -> None:
        making = own(birth.set_id) or self._begin(volumes, birth)
        try:
            with told(making.store.path):
                making.mapped = processes.scan([part.top for part in making.parts]).mapped
                making.passes(budget)
        except BaseException:
            self._abandon(making)
            raise

    def _begin(self, volumes: Sequence[Volume], birth: Birth) -> Making:
        """Let the set be born: its directory, locked, with its record in it."""
        _check_set_id(birth.set_id)
        place = self._place(volumes, birth)
        with ExitStack() as undo, told(place):
            store = undo.enter_context(Sets.make(place))
            self._used.append(place)
            unknown = self._cache.add(place)
            for left in store.leftovers():
                try:
                    store.remove(left)
                except StorageError:
                    continue
            scratch, at = f"sets/.new-{birth.set_id}", f"sets/{birth.set_id}"
            if store.has(at):
                raise BusyError("is there already", object=birth.set_id, cure="take another set")
            lock = None
            while lock is None:  # a reaper may take it for a leftover before we have its lock
                os.mkdir(scratch, 0o700, dir_fd=store.fd)
                lock = store.lock(scratch, wait_s=5.0)
            undo.callback(os.close, lock)
            making = Making(store, birth, self.settings)
            if unknown:
                making.notes.append(
                    f"the store {place} can't be noted in {self._cache.file} ({unknown}): "
                    "its sets are listed only where its node's path is given, or -o store="
                )
            try:
                text = encode_birth(birth)
                fd = os.open(f"{scratch}/birth.json", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=store.fd)
                with open(fd, "wb") as file:
                    file.write(text.encode())
                    file.flush()
                    os.fsync(fd)
                os.mkdir(f"{scratch}/attic", 0o700, dir_fd=store.fd)
                attic = os.open(f"{scratch}/attic", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=store.fd)
                undo.callback(os.close, attic)
                for volume in volumes:
                    making.parts.append(self._part(store, birth, volume, scratch, attic, undo))
                sync_directory(scratch, store.fd)
                os.rename(scratch, at, src_dir_fd=store.fd, dst_dir_fd=store.fd)
                sync_directory("sets", store.fd)
            except BaseException:
                if store.has(scratch):
                    store.remove(store.discard(scratch, birth.set_id))
                elif store.has(at):
                    store.remove(store.discard(at, birth.set_id))
                raise
            making.open = undo.pop_all()
        MAKING[birth.set_id] = making
        return making

    def _part(self, store: Sets, birth: Birth, volume: Volume, at: str, attic: int, undo: ExitStack) -> Part:
        number = next(
            (k for k, m in enumerate(birth.members) if (m.provider, m.volume) == (self.name, volume.id)), None
        )
        if number is None or volume.path is None:
            raise PreconditionError("is no member of the set", object=volume.id)
        try:
            source = undo.enter_context(tree.open_tree(volume.path))
        except OSError as error:
            raise PreconditionError(f"can't be read: {error.strerror}", object=volume.path) from None
        os.mkdir(f"{at}/{number}", 0o700, dir_fd=store.fd)
        os.mkdir(f"{at}/{number}/tree", 0o700, dir_fd=store.fd)
        target = undo.enter_context(tree.open_tree(f"{at}/{number}/tree", dir_fd=store.fd))

        def load() -> Shares | None:
            shares = previous(birth, volume, store.path)
            if shares is not None:
                undo_shares.callback(shares.dirs.close)
            return shares

        undo_shares = undo.enter_context(ExitStack())
        flush = tree.write_back_overlay if mounts.mount_of(volume.path).fstype == "overlay" else tree.write_back
        return Part(number, volume, Mirror(source, target, attic, load_shares=load, flush=flush))

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        def tick() -> None:
            if hold.deadline is not None and time.monotonic() > hold.deadline:
                raise QuiesceError("the copy did not end in time", object=birth.set_id, cure="allow a longer budget")

        making = own(birth.set_id) or self._begin(volumes, birth)
        try:
            with told(making.store.path):
                making.fix(hold, tick)
                found = {each.birth.member: each for each in making.store.snapshots(birth.set_id)}
                made = tuple(found[part.number] for part in making.parts)
            for snapshot in made:
                if snapshot.state is not ImageState.READY:
                    raise StorageError(f"the image is not there: {snapshot.why}", object=snapshot.id)
        except BaseException:
            # Only the rename here: the writers are held, and the core calls `delete` once they aren't.
            self._abandon(making, remove=False)
            raise
        self.notes = [*making.notes, *dict.fromkeys(text for part in making.parts for text in part.mirror.warnings)]
        for part in making.parts:
            self.notes += [f"{part.top}/{path} is a store of copies: left out" for path in sorted(part.left_out)]
        del MAKING[birth.set_id]
        making.close()
        return made

    def _abandon(self, making: Making, *, remove: bool = True) -> None:
        """Undo a set in the making that failed: from here on nothing of it is listed."""
        set_id = making.birth.set_id
        MAKING.pop(set_id, None)
        try:
            left = making.store.discard(f"sets/{set_id}", set_id)
            if remove:
                making.store.remove(left)
        except (OSError, SnapshotterError):
            pass  # `delete` and `reap` find it
        finally:
            making.close()

    # -- afterwards --------------------------------------------------------------------------------------------------

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        if set_id is not None and not SET_ID.fullmatch(set_id):
            return
        failed: list[SnapshotterError] = []
        for store in (
            self._known(failed) if set_id is None else self._holding(lambda store: store.has(f"sets/{set_id}"))
        ):
            with put_off(failed), told(store.path):
                yield from store.snapshots(set_id)
            self.notes += [note for note in store.damaged if note not in self.notes]
        # Last, so that all others are listed.
        if failed:
            raise failed[0]
        # Who asks for one set has seen it, or asks several instances.
        for path in [] if set_id is not None else self._where():
            if unreadable(path):
                raise StorageError("is a store that this version can't read", object=path, cure="update snapshotter")
            if (point := self._cache.away(path)) is not None:
                raise StorageError(
                    f"the store is not there, and nothing is mounted at {point}",
                    object=path,
                    cure=f"mount its disk, or remove its line from {self._cache.file}",
                )

    def of_slot(self, target: str, slot: str) -> Iterator[Snapshot]:
        """Only in stores that can be read now: a target's rivals are all on this host, whose lock lets one take at a
        time; and the store that the set would go to is asked by `check`."""
        for store in self._known([]):
            with put_off([]), told(store.path):
                yield from (
                    each for each in store.snapshots() if (each.birth.target, each.birth.slot) == (target, slot)
                )

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        _check_set_id(set_id)
        check_marks(changes)
        at = f"sets/{set_id}"
        for store in self._holding(lambda store: store.has(at)):
            with told(store.path), store.locked(at, wait_s=5.0) as there:
                members = list(store.snapshots(set_id)) if there else []
                if not members:
                    continue
                if not members[0].marks_known:
                    raise StorageError(members[0].why, object=set_id, cure=f"look at {store.path}/{at}/marks.json")
                if changes.get("sealed"):
                    if why := next((each.why for each in members if each.state is not ImageState.READY), ""):
                        raise StorageError(f"can't be sealed: {why}", object=set_id)
                    store.remove(f"{at}/attic")
                    tree.syncfs(store.fd)
                known = members[0].marks.get("verify-outcome")
                if changes.get("verify-outcome") == "corrupt" and known != "corrupt":
                    _suspect(store, members[0].birth.target)
                write_object(f"{at}/marks.json", {"marks": apply_marks(members[0].marks, changes)}, store.fd)
                return
        raise NotFoundError("no such set in any store known here", object=set_id, cure="`snapshotter list` shows all")

    def delete(self, set_id: str) -> None:
        _check_set_id(set_id)
        if (making := own(set_id)) is not None:
            self._abandon(making)

        def holds(store: Sets) -> bool:
            if store.has(f"sets/{set_id}") or store.has(f"sets/.new-{set_id}"):
                return True
            return any(name.startswith(set_id + ".") for name in store.names("trash"))

        for store in self._holding(holds):
            with told(store.path):
                self._delete_from(store, set_id)

    def _delete_from(self, store: Sets, set_id: str) -> None:
        for at in (f"sets/{set_id}", f"sets/.new-{set_id}"):
            with store.locked(at, wait_s=0.2) as there:
                if not there:
                    continue
                for _, record in store.records():
                    if record.get("set_id") == set_id:
                        raise BusyError(
                            f"is attached at {record.get('path')} ({record.get('id')})",
                            object=set_id,
                            cure=f"snapshotter release {record.get('path')}",
                        )
                if store.damaged and store.has(f"{at}/marks.json"):  # whose attachment that is, nobody knows
                    raise BusyError(store.damaged[0], object=set_id, cure="look at it, then remove that file")
                store.discard(at, set_id)
        for name in store.names("trash"):
            if name.startswith(set_id + "."):
                store.remove(f"trash/{name}")

    def reap(self) -> list[str]:
        removed = []
        failed: list[SnapshotterError] = []
        for store in self._known(failed):
            with put_off(failed), told(store.path):
                for left in store.leftovers():
                    store.remove(left)
                    removed.append(f"{store.path}/{left}")
        if failed:
            raise failed[0]
        return removed

    # -- attachments -------------------------------------------------------------------------------------------------

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
        _check_set_id(set_id)
        if access is Access.READ_ONLY and os.geteuid() != 0:
            raise PreconditionError(
                "a read-only view of a copy is a mount, which needs root",
                object=destination,
                cure=f"run as root, or make a clone: snapshotter restore {set_id} --to DIR",
            )
        at = f"sets/{set_id}"
        for store in self._holding(lambda store: store.has(at)):
            with told(store.path), store.locked(at, shared=True, wait_s=5.0) as there:
                if not there:
                    continue
                found = next((each for each in store.snapshots(set_id) if each.birth.member == number), None)
                if found is None:
                    continue
                if found.state is not ImageState.READY:
                    raise StorageError(f"has no valid image: {found.why}", object=set_id)
                unknown = self._attached.add(store.path) if self._named() else ""
                name = f"attachments/{attachment_id}.{number}.json"
                if store.has(name):
                    raise BusyError("this attachment exists already", object=attachment_id)
                record: dict[str, Any] = {
                    "id": attachment_id,
                    "set_id": set_id,
                    "member": number,
                    "path": destination,
                    "access": str(access),
                    "purpose": str(purpose),
                    "since": None,
                    "maker": processes.identity(os.getpid()),
                    "store": store.path,
                    "made": False,
                    "inode": None,
                }
                if access is Access.READ_ONLY:
                    self.notes = clones.view(store, name, record)
                    return MountSpec(f"{store.path}/{at}/{number}/tree", "bind", ("ro", "nosuid", "nodev"))
                self.notes = clones.clone(store, name, record, found.size_bytes or 0, self.settings.report)
                if unknown:
                    self.notes.append(f"{self._attached.file}: {unknown}: `release` may not find {store.path}")
                # More than a tick of the kernel's clock: what is written to it from now on has a later ctime.
                time.sleep(0.02)
                return Tree(destination)
        raise NotFoundError("no such set in any store known here", object=set_id, cure="`snapshotter list` shows all")

    def settle(self, attachment_id: str, since: datetime) -> None:
        found = False
        for store in self._holding(lambda store: _has_parts(store, attachment_id)):
            with told(store.path):
                for name, record in list(store.records()):
                    if record["id"] == attachment_id:
                        found = True
                        stamp = since.astimezone(UTC).isoformat()
                        write_object(name, {**record, "since": stamp, "maker": None}, store.fd)
        if not found:
            raise NotFoundError("no such attachment", object=attachment_id)

    def attachments(self) -> Iterator[Attachment]:
        failed: list[SnapshotterError] = []
        for store in self._known(failed, attached=True):
            records: list[tuple[str, dict[str, Any]]] = []
            with put_off(failed), told(store.path):
                records = self._records(store)
            self.notes += [note for note in store.damaged if note not in self.notes]
            for _, record in records:
                try:
                    maker = record["maker"]
                    yield Attachment(
                        id=record["id"],
                        provider=self.name,
                        set_id=record["set_id"],
                        member=int(record["member"]),
                        path=record["path"],
                        access=Access(record["access"]),
                        purpose=Purpose(record["purpose"]),
                        since=datetime.fromisoformat(record["since"]) if record["since"] else None,
                        held=maker is not None and processes.alive((maker[0], maker[1])),
                        tree=record["access"] == Access.WRITABLE,
                    )
                except (KeyError, TypeError, ValueError, IndexError):
                    continue
        if failed:
            raise failed[0]

    def detach(self, attachment_id: str) -> None:
        if not ATTACHMENT_ID.fullmatch(attachment_id):
            raise ValueError(f"{attachment_id!r} is no attachment id")

        def holds(store: Sets) -> bool:
            return _has_parts(store, attachment_id) and (store.path in self._where() or bool(self._records(store)))

        for store in self._holding(holds, attached=True):
            with told(store.path):
                parts = [each for each in self._records(store) if each[1]["id"] == attachment_id]
                # A member's place may lie inside another's.
                for name, record in sorted(parts, key=lambda each: -len(str(each[1].get("path")))):
                    if record.get("access") == Access.WRITABLE:
                        with told(str(record["path"])):
                            self.notes += clones.remove(store, name, record)
                    store.unlink(name)
                for name in store.names("attachments"):
                    if name.startswith(attachment_id + ".") and name.endswith(".tmp"):  # killed while it was written
                        store.unlink(f"attachments/{name}")
                if parts:
                    sync_directory("attachments", store.fd)
                if not self._records(store):
                    self._attached.remove(store.path)

    def _records(self, store: Sets) -> list[tuple[str, dict[str, Any]]]:
        """Its attachments. A copy of a store has the other's records too, as they were: where only clones lead here,
        those are nobody's."""
        usual = store.path in self._where()
        return [each for each in store.records() if usual or each[1].get("store") == store.path]


# ------------------------------------------------------------------------------------------------------------ helpers


def _of_corrupt(birth: Birth, place: str) -> str:
    """What to say first where a full copy has no room because of a verdict: see `foreseeing.previous`."""
    store = Sets.open(place)
    if store is None:
        return ""
    with store:
        of_target = [each for each in store.snapshots() if each.birth.target == birth.target]
    bad = {each.birth.set_id for each in of_target if each.marks.get("verify-outcome") == "corrupt"}
    return f"delete what was found corrupt ({min(bad)}), so nothing is shared with older sets; " if bad else ""


def _has_parts(store: Sets, attachment_id: str) -> bool:
    return any(name.startswith(attachment_id + ".") for name in store.names("attachments"))


def _suspect(store: Sets, target: str) -> None:
    """The sets of this target that are here now, of which one was found corrupt, are no base of later ones, also when
    that one is deleted: the next set copies all."""
    for set_id in {each.birth.set_id for each in store.snapshots() if each.birth.target == target}:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            os.close(os.open(f"sets/{set_id}/{SUSPECT}", flags, 0o600, dir_fd=store.fd))
            sync_directory(f"sets/{set_id}", store.fd)
        except FileNotFoundError:
            continue  # just deleted


def _check_set_id(set_id: str) -> None:
    """Paths are built from it."""
    if not SET_ID.fullmatch(set_id):
        raise NotFoundError("is no set id", object=set_id, cure="`snapshotter list` shows all")
