"""ZFS: atomic snapshots of datasets with their record, clones, read-only mounts and swaps. Must know no policy: what is
kept, and for how long, is the core's.

A *volume* is a dataset, by its name: a swap puts another dataset in that place, and it is still the same target.
Children are volumes of their own. One `create` of datasets of one pool is one instant; of two pools it is two.

`tool` is the `zfs` command, `library` chooses between it and libzfs_core, `objects` is what we write on ZFS's own
objects (no directory, no database), `swaps` a clone in its origin's place.

A volume with another file system in it (a zvol) is claimed, so that nothing else takes it for its own, and refused.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from providers.zfs import attaching, library, objects, swaps, tool
from providers.zfs.objects import BIRTH, MARKS, PIN, Object
from snapshotter.core.errors import (
    BusyError,
    NotFoundError,
    PreconditionError,
    QuiesceError,
    SnapshotterError,
    StorageError,
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
from snapshotter.host import mounts
from snapshotter.host.locks import Locks
from snapshotter.host.mounts import Mount
from snapshotter.provider import OpenSwap, Provider, Settings, Traits

_LONGEST_NAME = 255  # ZFS_MAX_DATASET_NAME_LEN, less its end
_SWAP_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


class ZfsProvider(Provider):
    """See the module."""

    name = objects.PROVIDER
    traits = Traits(
        atomic_across_volumes=True,
        quiesce=Quiesce.NONE,
        writable_clone=True,
        swaps=True,
        needs_host=True,
        limits=LabelLimits(),
    )

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        #: set id -> (its snapshots, the marks they were born with) of what this instance made, or was to make.
        self._made: dict[str, tuple[list[str], Mapping[str, str]]] = {}
        self._pools: list[str] = []

    # -- before ---------------------------------------------------------------------------------------------------

    def availability(self) -> list[str]:
        return tool.needs()

    def claim(self, mount: Mount, path: str) -> Volume | None:
        if mount.fstype == self.name:
            return Volume(self.name, mount.source, mount.path, mount.fstype)
        if (zvol := _zvol(mount)) is not None:
            return Volume(self.name, zvol, mount.path, mount.fstype)
        return None

    def one_instant(self, volumes: Sequence[Volume]) -> bool:
        return len({tool.pool_of(volume.id) for volume in volumes}) == 1

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        encode_birth(birth)
        for volume in volumes:
            self._check_volume(volume, birth)
        names = [volume.id for volume in volumes]
        tops = sorted({tool.pool_of(name) for name in names})
        try:
            tool.refuse_suspended(tops)
        except StorageError as error:
            raise PreconditionError(error.message, object=error.object, cure=error.cure) from None
        datasets = tool.automatic(tops)
        for name in names:
            if name not in datasets:
                raise PreconditionError("no such dataset", object=name, cure="was it destroyed, renamed or exported?")
        _refuse_hollow(birth, datasets)
        found = tool.get(("used", "available"), tops)
        for top in tops:
            total, free = _room(found.get(top, {}))
            if total is not None and free is not None and free < total * self.settings.floor:
                raise PreconditionError(
                    f"has {free >> 20} MiB free of {total >> 20}, and {self.settings.floor:.0%} must stay so, as "
                    "snapshots keep what is deleted",
                    object=top,
                    cure="delete old sets, free some space, or lower `floor`",
                )

    def _check_volume(self, volume: Volume, birth: Birth) -> None:
        if volume.fstype not in ("", self.name):
            raise PreconditionError(
                f"is a zvol with {volume.fstype} on it, which its snapshot would not hold as a whole file system",
                object=volume.id,
                cure="--provider copy, or move the node to a dataset",
            )
        if "@" in volume.id:
            raise PreconditionError("is a snapshot", object=volume.id, cure="give the live data path")
        if len(objects.snapshot_name(volume.id, birth.set_id, _member(birth, volume))) > _LONGEST_NAME:
            raise tool.failure(errno.ENAMETOOLONG, volume.id)
        if volume.path is not None and os.path.isdir(volume.path):
            seen = mounts.mount_of(os.path.realpath(volume.path))
            if seen.source == volume.id and seen.root != "/":
                raise PreconditionError(
                    f"only its directory {seen.root} is mounted at {seen.path}",
                    object=volume.id,
                    cure="give the path below the dataset's own mount point",
                )

    def refuse_unmounted(self, roots: Sequence[str], others: Sequence[str]) -> None:
        well = [pool for pool in tool.pools() if not tool.suspended(pool)]
        if not well or tool.needs():
            return
        try:
            datasets = tool.automatic(well)
        except SnapshotterError:
            return  # whose volumes are no dataset needs no ZFS that answers
        table = mounts.table()
        seen = [(path, mounts.mount_of(path, table)) for path in map(os.path.realpath, (*roots, *others))]
        for name, point in datasets.items():
            place = os.path.realpath(point) if point else ""
            if not place or mounts.mount_of(place, table).path == place:
                continue
            below = any(
                mounts.is_under(place, root)
                # `check` asks that of the pools that the node is on.
                and not (mount.fstype == self.name and tool.pool_of(mount.source) == tool.pool_of(name))
                for root, mount in seen[: len(roots)]
            )
            # What has a mount of its own below the place is not what the dataset would hide.
            hides = any(mounts.is_under(path, place) and mounts.is_under(place, mount.path) for path, mount in seen)
            if (below or hides) and not tool.mounts_as_it_came(name):
                raise PreconditionError(
                    f"isn't mounted at {place}, so what is seen there is not what is meant",
                    object=name,
                    cure=f"stop what runs there, zfs load-key -a, zfs mount {name}; or, if it isn't meant: "
                    f"zfs set canmount=noauto {name}",
                )

    def space(self, volumes: Sequence[Volume]) -> Space:
        names = [volume.id for volume in volumes]
        tops = sorted({tool.pool_of(name) for name in names})
        found = tool.get(("used", "available", "usedbysnapshots"), list(dict.fromkeys([*tops, *names])))
        rooms = [_room(found.get(top, {})) for top in tops]
        pinned = {f"{name} usedbysnapshots": found.get(name, {}).get("usedbysnapshots", ("", ""))[0] for name in names}
        return Space(
            total_bytes=sum(total or 0 for total, _ in rooms),
            free_bytes=sum(free or 0 for _, free in rooms),
            detail={key: int(value) for key, value in pinned.items() if value.isdigit()},
        )

    # -- making ---------------------------------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[Volume], birth: Birth, budget: float) -> None:
        # `delete` is the inverse from now on: it need not look beyond these names, whatever other pools do.
        _check_id(SET_ID, birth.set_id)
        names = [objects.snapshot_name(volume.id, birth.set_id, _member(birth, volume)) for volume in volumes]
        self._made[birth.set_id] = names, {}

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        """One call for each pool. Its snapshots' `order` isn't known yet (0): listing asks for it."""
        _check_id(SET_ID, birth.set_id)
        # All snapshots of one call get the same properties: the number of the member is in the name.
        properties = {BIRTH: encode_birth(birth.of_member(0))}
        born: Mapping[str, str] = {}
        if hold.marks and self.one_instant(volumes):
            born = dict(hold.marks)
            check_marks(born)
            properties[MARKS] = objects.dump(born)
        by_pool: dict[str, list[str]] = {}
        made: list[Snapshot] = []
        for volume in volumes:
            number = _member(birth, volume)
            name = objects.snapshot_name(volume.id, birth.set_id, number)
            by_pool.setdefault(tool.pool_of(name), []).append(name)
            made.append(Snapshot(self.name, name, birth.of_member(number), ImageState.READY, born))
        self._made[birth.set_id] = [each.id for each in made], {}
        done: list[str] = []
        try:
            for names in by_pool.values():
                if hold.deadline is not None and time.monotonic() >= hold.deadline:
                    raise QuiesceError("the time for which the writers may be held is over", object=names[0])
                library.snapshot(names, properties)
                done += names
        except BaseException:
            if done:
                library.destroy(done)
            raise
        self._made[birth.set_id] = done, born
        return tuple(made)

    # -- afterwards -----------------------------------------------------------------------------------------------

    def _members(self, set_id: str, *, native: bool = False) -> list[Object]:
        """The set's snapshots. Those that this instance made are known by name, which spares the look at all pools."""
        if set_id in self._made:
            found = objects.of_set(objects.read(self._made[set_id][0]), set_id)
            if len(found) == len(self._made[set_id][0]):
                return found
        found = objects.of_set(objects.labelled((BIRTH, MARKS)), set_id) if SET_ID.fullmatch(set_id) else []
        return objects.read([each.name for each in found]) if native and found else found

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        self._pools = tool.pools()  # before the look: what is imported meanwhile was not looked into
        if set_id is not None:
            found = self._members(set_id, native=True)
        else:
            found = objects.labelled((BIRTH, MARKS), native=True)
        for each in sorted(found, key=lambda one: one.replica):  # the original first
            if (snapshot := objects.as_snapshot(each)) is not None:
                yield snapshot
        if set_id is None or not found:
            tool.refuse_blind()  # hides no other pool: last

    def sees(self, volume: str) -> bool:
        return tool.pool_of(volume) in (self._pools or tool.pools())

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        check_marks(changes)
        if set_id in self._made and changes == self._made[set_id][1]:
            return  # born with them
        members = self._members(set_id, native=True)
        members = [each for each in members if not each.replica] or members
        if not members:
            tool.refuse_blind()
            raise NotFoundError("no such set", object=set_id, cure="`snapshotter list` shows all")
        names = [each.name for each in members]
        # One write if all say the same, which they do but after a kill between two writes.
        written: dict[str, list[str]] = {}
        for each in members:
            marks = objects.marks_of(each)
            if marks is None:
                cure = f"zfs get {MARKS} {each.name}"
                raise StorageError("its marks are damaged, or of a newer version", object=set_id, cure=cure)
            snapshot = objects.as_snapshot(each)
            if changes.get("sealed") and snapshot is not None and snapshot.state is not ImageState.READY:
                raise StorageError(f"can't be sealed: {snapshot.why}", object=set_id)
            text = objects.dump({**objects.others(each), **apply_marks(marks, changes)})
            written.setdefault(text, []).append(each.name)
        if changes.get("pinned"):
            self._hold(names)
        for text, theirs in written.items():
            tool.change("set", f"{MARKS}={text}", *theirs, object=theirs[0])
        if "pinned" in changes and not changes["pinned"]:
            self._release(names)

    @staticmethod
    def _hold(names: Sequence[str]) -> None:
        """Nothing, and no other tool, destroys what is held."""
        held = {name for name, tag in tool.holds_of(names) if tag == PIN}
        if wanted := [name for name in names if name not in held]:
            tool.change("hold", PIN, *wanted, object=wanted[0])

    @staticmethod
    def _release(names: Sequence[str]) -> None:
        held = [name for name, tag in tool.holds_of(names) if tag == PIN]
        if held:
            tool.change("release", PIN, *held, object=held[0])

    def delete(self, set_id: str) -> None:
        _check_id(SET_ID, set_id)
        members = self._members(set_id)
        ours = [each for each in members if not each.replica]
        if members and not ours:
            raise _replica(members[0], set_id)
        if not members and set_id in self._made:
            tool.refuse_suspended(self._made[set_id][0])
        elif not members:
            tool.refuse_blind()
        if ours:
            with Locks([attaching.lock(each.name) for each in ours], wait_s=attaching.PATIENCE_S):
                self._delete([each.name for each in ours], set_id)
        self._made.pop(set_id, None)

    def _delete(self, names: Sequence[str], set_id: str) -> None:
        members = objects.of_set(objects.read(names), set_id)
        members = [each for each in members if each.ours.get(BIRTH) == tool.local_value(each.name, BIRTH)]
        for each in members:
            for record in attaching.mounts_of(each).values():
                raise attaching.attached(set_id, record)
            if each.clones:
                raise attaching.cloned(set_id, each)
            if seen := [mount.path for mount in mounts.table() if mount.source == each.name and mounts.by_hand(mount)]:
                raise BusyError(f"is mounted at {seen[0]}", object=set_id, cure=f"umount {seen[0]}")
        pinned: list[str] = []
        if held := [each.name for each in members if each.native.get("userrefs", "0") != "0"]:
            holds = tool.holds_of(held)
            for name, tag in holds:
                if tag != PIN:
                    cure = f"zfs release {tag} {name}"
                    raise BusyError(f"another tool holds it ({tag})", object=f"{set_id} ({name})", cure=cure)
            for each in members:
                if each.name in held and objects.marks_of(each) is None:
                    cure = f"zfs release {PIN} {each.name}"
                    raise BusyError("is pinned, and its marks are damaged", object=set_id, cure=cure)
            pinned = [name for name, _ in holds]
            if pinned:
                tool.change("release", PIN, *pinned, object=pinned[0])
        try:
            library.destroy([each.name for each in members])
        except BaseException:
            still = [each.name for each in objects.read(pinned)]
            if still:
                tool.change("hold", PIN, *still, object=still[0])
            raise
        if any(".clone-" in each.dataset for each in members):
            swaps.sweep()

    def reap(self) -> list[str]:
        removed, self.notes = swaps.sweep() if tool.pools() else ([], [])
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
        _check_id(ATTACHMENT_ID, attachment_id)
        _refuse_without_root(snapshot.id)
        return attaching.attach(self._image(snapshot), snapshot.birth, attachment_id, access, destination, purpose)

    def _image(self, snapshot: Snapshot) -> Object:
        """The snapshot as it is now, wherever a promotion may have brought it. Raises NotFoundError, StorageError."""
        birth = snapshot.birth
        known = objects.of_set(objects.read([snapshot.id]), birth.set_id)
        found = [
            each
            for each in (known or self._members(birth.set_id, native=True))
            if each.birth is not None and each.birth.member == birth.member
        ]
        if not found:
            raise NotFoundError("no such set", object=birth.set_id, cure="`snapshotter list` shows all")
        image = objects.as_snapshot(found[0])
        if image is None or image.state is not ImageState.READY:
            why = image.why if image else "its record is gone"
            raise StorageError(f"has no valid image: {why}", object=birth.set_id, cure="restore another set")
        if found[0].native.get("keystatus") == "unavailable":
            root = found[0].native.get("encryptionroot") or found[0].dataset
            raise tool.failure(errno.ENOKEY, root)
        return found[0]

    def settle(self, attachment_id: str, since: datetime) -> None:
        attaching.settle(attachment_id, since)

    def attachments(self) -> Iterator[Attachment]:
        yield from attaching.listed()

    def detach(self, attachment_id: str) -> None:
        _check_id(ATTACHMENT_ID, attachment_id)
        attaching.detach(attachment_id)

    # -- taking the origin's place --------------------------------------------------------------------------------

    def swappable(self, volume: Volume, snapshot: Snapshot) -> bool:
        # Nothing can take the place of a pool's own dataset, and a clone is always in its origin's pool. Before 2.0
        # there is no `zfs rename -u`, and any other unmounts what is below.
        if tool.version().startswith("0."):
            return False
        return "/" in volume.id and tool.pool_of(snapshot.id) == tool.pool_of(volume.id)

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        _check_id(_SWAP_ID, swap_id)
        _refuse_without_root(volume.id)
        self.notes = swaps.begin(swap_id, self._image(snapshot), volume.id)

    def swap_back(self, swap_id: str) -> None:
        _check_id(_SWAP_ID, swap_id)
        swaps.back(swap_id)

    def swap_commit(self, swap_id: str) -> None:
        _check_id(_SWAP_ID, swap_id)
        swaps.commit(swap_id)

    def refuse_commit(self, swap_id: str) -> None:
        _check_id(_SWAP_ID, swap_id)
        swaps.committable(swap_id)

    def swaps(self) -> Iterator[str]:
        return (each.id for each in self.open_swaps())

    def open_swaps(self, volume: str | None = None) -> Iterator[OpenSwap]:
        if volume is not None:
            tool.refuse_suspended([volume])
        pool = tool.pool_of(volume) if volume is not None else None
        for swap_id, clone, aside in swaps.open_swaps(objects.sure(objects.SWAP, objects.ASIDE, pool=pool)):
            steps = swaps.by_hand(swap_id, clone, aside) if volume is None else ""
            yield OpenSwap(swap_id, swaps.volume_of(clone, aside), steps)
        if volume is None:
            tool.refuse_blind()  # a person, or who doesn't know where to look, must know that it isn't all


def _check_id(pattern: re.Pattern[str], given: str) -> None:
    if not pattern.fullmatch(given):
        raise ValueError(f"{given!r} is no id")


def _refuse_without_root(what: str) -> None:
    if os.geteuid() != 0:
        raise PreconditionError("only root can mount on Linux", object=what, cure="run as root")


def _replica(found: Object, set_id: str) -> PreconditionError:
    """Why this snapshot isn't ours to delete."""
    here, cure = tool.pool_of(found.name), f"zfs destroy {found.name}"
    if found.of_pool == here or BIRTH not in found.ours:
        why = "is a replica that was received here, which is its sender's to delete"
    else:
        why = f"was taken in pool {found.of_pool}, and {here} is a copy of that, or has a new name"
        cure += f"; or, if it is renamed: zpool export {here}, zpool import {here} {found.of_pool}"
    return PreconditionError(why, object=f"{set_id} ({found.name})", cure=cure)


def _member(birth: Birth, volume: Volume) -> int:
    for number, member in enumerate(birth.members):
        if (member.provider, member.volume) == (ZfsProvider.name, volume.id):
            return number
    raise PreconditionError("is no member of the set", object=volume.id)


def _refuse_hollow(birth: Birth, datasets: Mapping[str, str]) -> None:
    """Raise PreconditionError if a dataset of these pools should be seen in the data path, and nothing is mounted
    there, or what is can't be seen: so it is no root, and nobody would miss it in the set."""
    table = mounts.table()
    tops = [root.path for root in birth.roots]
    for name, point in datasets.items():
        place = os.path.realpath(point) if point else ""
        if not place or not any(mounts.is_under(place, top) for top in tops):
            continue
        over = mounts.mount_of(place, table)
        if over.path == place:
            continue
        if any(mount.path == place and mount.source == name for mount in table):
            why = f"is hidden by what was mounted later at {over.path}"
            cure = f"umount {over.path}, zfs unmount {name}, then zfs mount -a"
        else:
            why, cure = f"isn't mounted at {place}", f"zfs mount -l {name}"
        cure += f"; or zfs set canmount=noauto {name}, if it isn't meant"
        raise PreconditionError(f"{why}, so the set would lack it", object=name, cure=cure)


def _zvol(mount: Mount) -> str | None:
    """The name of the zvol that this is mounted from, or None if it is none."""
    try:
        device = os.path.basename(os.readlink(f"/sys/dev/block/{mount.device}"))
    except OSError:
        return None
    match = re.fullmatch(r"(zd[0-9]+)(p[0-9]+)?", device)
    if match is None:
        return None
    for directory, _, names in os.walk("/dev/zvol"):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.basename(os.path.realpath(path)) == match[1]:
                return os.path.relpath(path, "/dev/zvol")
    return match[1]


def _room(found: tool.Properties) -> tuple[int | None, int | None]:
    """Bytes in all, and free, as the pool's own dataset tells them."""
    used, free = (found.get(key, ("", ""))[0] for key in ("used", "available"))
    if not (used.isdigit() and free.isdigit()):
        return None, None
    return int(used) + int(free), int(free)
