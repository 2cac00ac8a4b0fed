"""LVM: snapshots of logical volumes, thin and classic, writable clones of both, and swaps of thin ones. Must know no
policy: what is kept, and for how long, is the core's.

A *volume* is a logical volume, `<group>/<name>`: the name and not the UUID is its identity, as a swap puts another in
that place. Ours are known by their tags alone (`reports`): an image `<set id>-<member>`, read-only, beside its origin;
a clone `<attachment id>-<member>`; what a swap sets aside, `<swap id>-aside`.

LVM commits a tag before the image exists, so a tag proves nothing: a killed lvcreate leaves a volume without an image,
and the next lvcreate in that pool may give it one of a later time. That is why the seal comes last, written only by the
run whose own lvcreate ended well, and why what dead runs left is removed before the next take.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime

import msgspec
from msgspec.structs import replace

from providers.lvm import claims, images, room
from providers.lvm.commands import WAIT_S, Group, changing, check_target, recover_all, wait_for_dead_runs
from providers.lvm.reports import (
    LIMITS,
    NAME,
    Row,
    birth_of,
    birth_tags,
    find,
    image_name,
    maker_tag,
    marks,
    pool_of,
    read,
    snapshot,
    suspended_with,
    tag,
    threshold_of,
)
from snapshotter.core.command import environment
from snapshotter.core.errors import (
    BusyError,
    NotFoundError,
    PreconditionError,
    QuiesceError,
    SnapshotterError,
    StorageError,
)
from snapshotter.core.labels import check_marks
from snapshotter.core.model import (
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
from snapshotter.host import block
from snapshotter.host.mounts import Mount
from snapshotter.provider import OpenSwap, Option, Provider, Settings, Traits

_FRESH_S = 10.0  # `prepare` believes what `check` has just read: a report costs half of a snapshot


class _Prepared(msgspec.Struct, frozen=True):
    order: int
    rows: list[Row]


class _Made(msgspec.Struct, frozen=True):
    """An image that this very run has made, and not yet marked."""

    id: str
    origin: Row
    maker: str


class LvmProvider(Provider):
    """See the module."""

    name = NAME
    traits = Traits(
        atomic_across_volumes=False,
        quiesce=Quiesce.NONE,
        writable_clone=True,
        swaps=True,
        needs_host=True,
        sized_by_content=False,
        limits=LIMITS,
    )
    OPTIONS = {"size": Option(room.Size, "room of a classic snapshot, as 10G (default: by its origin's writes)")}  # noqa: RUF012

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._seen: tuple[float, list[Row]] = float("-inf"), []
        self._prepared: dict[str, _Prepared] = {}
        self._made: dict[str, list[_Made]] = {}  # set id -> its images, until they are marked
        self._begun: set[str] = set()  # sets of this run: their groups could be read
        self._blind = ""  # why LVM's last report may lack volumes
        self._covered: dict[str, str] = {}  # volumes whose file system lies on LUKS on them: its UUID in device-mapper

    @classmethod
    def resume(cls) -> list[str]:
        return recover_all()[0]

    # -- which volume ---------------------------------------------------------------------------------------------

    def availability(self) -> list[str]:
        if os.geteuid() != 0:
            return ["LVM's commands need root: run as root, or use --provider copy"]
        if not _installed():
            return ["there is no `lvs` here: apt-get install lvm2"]
        return [] if _has_device_mapper() else ["this kernel has no device-mapper: modprobe dm_mod"]

    def claim(self, mount: Mount, path: str) -> Volume | None:
        place = claims.below(mount)
        if place is None:
            return None
        claims.refuse(place, mount, path)
        if place.luks:
            self._covered[place.volume] = place.luks
        return Volume(self.name, place.volume, mount.path, mount.fstype)

    def one_instant(self, volumes: Sequence[Volume]) -> bool:
        """LVM's suspension has the kernel freeze the file system that lies on the volume itself. One on LUKS on the
        volume it knows nothing of: what that has in memory would be missing, so its writers are paused and it is
        synced, as for several volumes."""
        return len(volumes) == 1 and volumes[0].id not in self._covered

    def _report(self, groups: Sequence[str] = ()) -> list[Row]:
        """What LVM says now. [] where there can be no LVM. Raises PreconditionError where there is, out of reach."""
        if os.geteuid() != 0 or not _installed():
            if any(device.dm_uuid.startswith("LVM-") for device in block.mapped()):
                message, _, cure = self.availability()[0].partition(": ")
                raise PreconditionError(message, object=self.name, cure=cure)
            return []
        rows, self._blind = read(groups)
        return self._rows(rows)

    def _rows(self, rows: list[Row]) -> list[Row]:
        """All of them; tests look at their own groups only."""
        return rows

    def _refuse_blind(self) -> None:
        """What LVM's last report doesn't show may be there: raise StorageError if it could not look everywhere."""
        if self._blind:
            raise StorageError(
                f"LVM can't look into all of its groups: {self._blind}", object=self.name, cure="see what `vgs` says"
            )

    def _settled_report(self, id: str, members: Callable[[Sequence[Row], str], list[Row]]) -> list[Row]:
        """What LVM says once no command of a dead run works any more where there are `members` of `id`, or at making
        one. Raises BusyError if one goes on and on."""
        wait_for_dead_runs([], id)  # what it makes is in no report yet
        rows = self._report()
        return self._report() if wait_for_dead_runs({row.vg for row in members(rows, id)}) else rows

    # -- before ---------------------------------------------------------------------------------------------------

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        rows = self._report(_groups(volumes))
        if self._blind:
            raise PreconditionError(self._blind, object=_groups(volumes)[0], cure="see what `vgs` says")
        self._seen = time.monotonic(), rows
        for group, theirs in _by_group(volumes).items():
            tags = [
                text
                for volume in theirs
                for text in (*birth_tags(birth.of_member(_member(birth, volume)), int(time.time())), maker_tag())
            ]
            room.check_group(find(rows, theirs[0].id), tags, len(theirs))
            for volume in theirs:
                row = find(rows, volume.id)
                if volume.id in self._covered:
                    claims.check_header(row.device, self._covered[volume.id])
                if row.attr[0] in "sS":
                    raise PreconditionError(
                        "is a snapshot itself, and LVM makes none of those",
                        object=row.id,
                        cure=f"take {group}/{row.origin}",
                    )
                if row.attr[0] == "O" and not row.thin:
                    raise PreconditionError(
                        "a snapshot is being merged into it, and LVM makes no other meanwhile",
                        object=row.id,
                        cure=f"wait for the merge; one that was put off begins with lvchange --refresh {row.id}",
                    )
                if row.thin and (pool := pool_of(rows, row)) is not None:
                    room.check_pool(pool, self.settings.floor, threshold_of(pool))
        if self._cow_sizes(rows, volumes):
            check_target()

    def _cow_sizes(self, rows: Sequence[Row], volumes: Sequence[Volume]) -> dict[str, int]:
        """Bytes for the snapshot of each volume that isn't thin. Raises PreconditionError."""
        wanted = self.settings.options.get("size")
        classic = [row for row in (find(rows, volume.id) for volume in volumes) if not row.thin]
        rates = [room.write_rate(block.number_of(row.device)) for row in classic]
        sizes = room.cow_sizes(classic, wanted if isinstance(wanted, int) else None, rates)
        return {row.id: size for row, size in zip(classic, sizes, strict=True)}

    def space(self, volumes: Sequence[Volume]) -> Space:
        rows = self._report(_groups(volumes))
        total, free = 0, 0
        detail: dict[str, int] = {}
        for row in [find(rows, volume.id) for volume in volumes]:
            pool = pool_of(rows, row) if row.thin else None
            where = pool.id if pool else row.vg
            if f"{where} bytes free" in detail:
                continue
            there = pool.size if pool else row.vg_size
            left = round(pool.size * (100 - (pool.data or 0)) / 100) if pool else row.vg_free
            total, free = total + there, free + left
            detail[f"{where} bytes free"] = left
            detail[f"{row.vg} metadata area bytes free"] = row.mda_free
            if pool is not None and pool.metadata is not None:
                detail[f"{where} metadata percent"] = round(pool.metadata)
            for cow in rows:  # a classic snapshot is lost once its table is full
                if not row.thin and cow.vg == row.vg and cow.origin == row.name and cow.data is not None:
                    detail[f"{cow.id} copy-on-write percent"] = round(cow.data)
        return Space(total_bytes=total, free_bytes=free, detail=detail)

    def refuse_writes(self, needs: Sequence[tuple[Mount, int]]) -> None:
        written: dict[str, int] = {}
        for mount, need in needs:
            if (place := claims.below(mount)) is not None:
                written[place.volume] = written.get(place.volume, 0) + need
        if written and not self.availability():
            rows = self._report(sorted({volume.partition("/")[0] for volume in written}))
            listed = {row.id for row in rows}  # a group that LVM was told to leave alone isn't
            room.check_writes(rows, {volume: need for volume, need in written.items() if volume in listed})

    # -- making ---------------------------------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[Volume], birth: Birth, budget: float) -> None:
        """Remove what dead runs left of these volumes: what a killed lvcreate of theirs had queued would be carried out
        with ours."""
        _check_id(SET_ID, birth.set_id)
        if birth.set_id in self._prepared:
            return
        news = wait_for_dead_runs(_groups(volumes))
        seen_at, rows = self._seen
        if news or time.monotonic() - seen_at > _FRESH_S or not set(_by_group(volumes)) <= {row.vg for row in rows}:
            rows = self._report(_groups(volumes))
        for volume in volumes:
            find(rows, volume.id)
        if any(born is not None and born.set_id == birth.set_id for born in map(birth_of, rows)):
            raise BusyError("exists already", object=birth.set_id, cure="choose another id")
        if left := images.leftovers(rows, volumes):
            for set_id in left:
                if (busy := images.in_use(rows, set_id)) is not None:
                    # What can be opened has its image: nothing of it is queued for the next lvcreate. It can wait.
                    self.notes.append(f"{set_id}, which a dead run left, stays: {busy.message}; {busy.cure}")
                else:
                    self.delete(set_id)
            rows = self._report(_groups(volumes))
        orders = [int(order) + 1 for row in rows if (order := row.labels.get("order", "")).isdigit()]
        self._begun.add(birth.set_id)
        self._prepared[birth.set_id] = _Prepared(max([int(time.time()), *orders]), rows)
        self._seen = float("-inf"), []

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        self.prepare(volumes, birth, 0.0)
        ready = self._prepared.pop(birth.set_id)
        sizes = self._cow_sizes(ready.rows, volumes)
        quota = {volume.id: images.quota_tags(volume) for volume in volumes}
        wait_s = WAIT_S if hold.deadline is None else max(0.0, (hold.deadline - time.monotonic()) / 2)
        made: dict[int, Snapshot] = {}
        with ExitStack() as stack:
            groups = {vg: stack.enter_context(changing(vg, wait_s)) for vg in sorted(_by_group(volumes))}
            try:
                if covered := [each.path for each in volumes if each.id in self._covered and each.path is not None]:
                    from snapshotter.host.quiesce import sync

                    sync(covered)  # no suspension writes out what they have in memory, nor does a stop or a hook
                for volume in volumes:
                    if hold.deadline is not None and time.monotonic() >= hold.deadline:
                        raise QuiesceError("the time for which the writers may be held is over", object=volume.id)
                    born = birth.of_member(_member(birth, volume))
                    row = find(ready.rows, volume.id)
                    tags = [*birth_tags(born, ready.order), *quota[volume.id]]
                    image = self._shoot(groups[row.vg], row, ready.rows, born, tags, sizes.get(row.id))
                    made[born.member] = Snapshot(self.name, image, born, ImageState.READY, order=ready.order)
            except BaseException:
                for part in self._made.pop(birth.set_id, []):
                    with suppress(SnapshotterError):  # `delete`, which the core calls, tries again
                        held = suspended_with(ready.rows, part.origin)
                        groups[part.origin.vg].lvm(
                            "lvremove", "-y", part.id, object=part.id, suspends=held, born=part.id.partition("/")[2]
                        )
                raise
        return tuple(made[_member(birth, volume)] for volume in volumes)

    def _shoot(self, group: Group, row: Row, rows: list[Row], birth: Birth, tags: list[str], size: int | None) -> str:
        """One lvcreate: the image's id. Thin ones are not activated: nothing sees a second file system of that UUID."""
        name, maker = image_name(birth), maker_tag()
        argv = ["lvcreate", "-y", "-s", "-pr", "-n", name]
        argv += ["-ky"] if size is None else ["-L", f"{size}b"]
        for text in (*tags, maker):
            argv += ["--addtag", text]
        group.lvm(*argv, row.id, object=row.id, suspends=suspended_with(rows, row), born=name)
        image = f"{row.vg}/{name}"
        self._made.setdefault(birth.set_id, []).append(_Made(image, row, maker))
        return image

    # -- afterwards -----------------------------------------------------------------------------------------------

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        rows = self._report()
        for row in rows:
            found = snapshot(row, rows)
            if found is not None and set_id in (None, found.birth.set_id):
                yield found
        self._refuse_blind()  # hides no other group: last

    def sees(self, volume: str) -> bool:
        group = volume.partition("/")[0]
        return any(row.vg == group for row in self._report())

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        check_marks(changes)
        sealing = bool(changes.get("sealed"))
        made = self._made.pop(set_id, None)
        if made is not None:  # known to the letter: the report would tell nothing new, and cost as much as the seal
            parts = [(replace(part.origin, name=part.id.partition("/")[2]), part.origin) for part in made]
            written = [row for pair in parts for row in pair]
            work = {part.id: images.retag({}, changes, [part.maker] if sealing else []) for part in made}
        else:
            rows = self._report()
            members = {
                row.id: (row, found) for row in rows if (found := snapshot(row, rows)) and found.birth.set_id == set_id
            }
            if not members:
                self._refuse_blind()
                raise NotFoundError("no such set", object=set_id, cure="`snapshotter list` shows all")
            for _, found in members.values():
                if sealing and found.state is not ImageState.READY:
                    raise StorageError(f"can't be sealed: {found.why}", object=set_id)
            own = [row for row, _ in members.values()]
            written = [*own, *(row for row in rows if (row.vg, row.name) in {(each.vg, each.origin) for each in own})]
            old = [text for row in own for text in row.tags if text.startswith(tag("maker", ""))]
            work = {at: images.retag(marks(row), changes, old if sealing else []) for at, (row, _) in members.items()}
        try:
            images.carry_out(work, set_id)
        except NotFoundError:
            raise NotFoundError("no such set", object=set_id, cure="`snapshotter list` shows all") from None
        if sealing:
            images.flush(written)  # a classic image's own store may be on other disks than its origin

    def delete(self, set_id: str) -> None:
        _check_id(SET_ID, set_id)
        self._prepared.pop(set_id, None)
        self._made.pop(set_id, None)
        rows = self._settled_report(set_id, images.of_set)
        if set_id not in self._begun and not images.of_set(rows, set_id):
            self._refuse_blind()
        images.remove(rows, set_id)

    def reap(self) -> list[str]:
        from providers.lvm import swaps

        resumed, failed = recover_all()
        removed = swaps.finish_commits(self._report())
        if failed:
            raise StorageError("; ".join(error.line() for error in failed), object=self.name)
        return [f"{name}, left suspended by a killed command" for name in resumed] + removed

    # -- attachments ----------------------------------------------------------------------------------------------

    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec | Tree:
        from providers.lvm import clones

        wait_for_dead_runs([snapshot.id.partition("/")[0]])
        wanted = self.settings.options.get("size")
        clone = clones.Clone(attachment_id, snapshot, access, destination, purpose)
        return clones.attach(clone, self._report(), wanted if isinstance(wanted, int) else None)

    def settle(self, attachment_id: str, since: datetime) -> None:
        from providers.lvm import clones

        rows = self._report()
        if not clones.parts(rows, attachment_id):
            self._refuse_blind()
        clones.settle(rows, attachment_id, since)

    def attachments(self) -> Iterator[Attachment]:
        from providers.lvm import clones

        yield from clones.listed(self._report())
        self._refuse_blind()

    def detach(self, attachment_id: str) -> None:
        from providers.lvm import clones

        rows = self._settled_report(attachment_id, clones.parts)
        if not clones.parts(rows, attachment_id):
            self._refuse_blind()
        clones.detach(rows, attachment_id)

    # -- taking the origin's place --------------------------------------------------------------------------------

    def swappable(self, volume: Volume, snapshot: Snapshot) -> bool:
        from providers.lvm import swaps

        rows = self._report(_groups([volume]))
        origin = find(rows, volume.id)
        # An open LUKS device would go on to lie on what a swap sets aside.
        if volume.id in self._covered or not origin.thin or snapshot.id.partition("/")[0] != origin.vg:
            return False
        swaps.check_swappable(rows, origin, images.find_image(rows, snapshot), in_use=True)
        room.check_group(origin, list(origin.tags), 1)
        return True

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        from providers.lvm import swaps

        wait_for_dead_runs(_groups([volume]))
        swaps.swap(self._report, swap_id, snapshot, volume)

    def swap_back(self, swap_id: str) -> None:
        from providers.lvm import swaps

        wait_for_dead_runs([], swap_id)
        if not swaps.swap_back(self._report, swap_id):
            self._refuse_blind()

    def swap_commit(self, swap_id: str) -> None:
        from providers.lvm import swaps

        wait_for_dead_runs([], swap_id)
        if not swaps.swap_commit(self._report, swap_id):
            self._refuse_blind()

    def refuse_commit(self, swap_id: str) -> None:
        from providers.lvm.swaps import refuse_commit

        refuse_commit(self._report, swap_id)

    def swaps(self) -> Iterator[str]:
        return (each.id for each in self.open_swaps())

    def open_swaps(self, volume: str | None = None) -> Iterator[OpenSwap]:
        from providers.lvm import swaps

        rows = self._report()
        if volume is not None:
            swaps.refuse_copied(rows, volume)
        yield from (OpenSwap(each.id, each.volume) for each in swaps.found(rows) if each.open)
        if volume is None or not self.sees(volume):
            self._refuse_blind()


# ------------------------------------------------------------------------------------------------------- small parts


def _installed() -> bool:
    import shutil

    return shutil.which("lvs", path=environment()["PATH"]) is not None


def _has_device_mapper() -> bool:
    try:
        with open("/proc/misc", encoding="ascii") as file:
            return any(line.split()[-1:] == ["device-mapper"] for line in file)
    except OSError:
        return False


def _check_id(pattern: re.Pattern[str], given: str) -> None:
    if not pattern.fullmatch(given):
        raise ValueError(f"{given!r} is no id")


def _member(birth: Birth, volume: Volume) -> int:
    for number, member in enumerate(birth.members):
        if (member.provider, member.volume) == (NAME, volume.id):
            return number
    raise PreconditionError("is no member of the set", object=volume.id)


def _by_group(volumes: Sequence[Volume]) -> dict[str, list[Volume]]:
    groups: dict[str, list[Volume]] = {}
    for volume in volumes:
        groups.setdefault(volume.id.partition("/")[0], []).append(volume)
    return groups


def _groups(volumes: Sequence[Volume]) -> list[str]:
    return sorted(_by_group(volumes))
