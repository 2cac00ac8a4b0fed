"""Swaps, of thin volumes only: a clone of an image takes its origin's name. Must know nothing of sets.

Two renames; never a merge (it consumes the snapshot). What is set aside is deactivated and marked to be skipped, and
the clone is not: after a reboot `/dev/group/name` is the clone, and `mount UUID=` can find nothing else. So that this
holds after a power cut at any step too, at most one of the two is ever not to be skipped: the one that has the name.

    clone, tagged  swap=<id>, place=<name>, origin=<UUID of what it replaces>:  <id>-new, then <name>
    origin, tagged aside=<id>, place=<name>:                                     <name>, then <id>-aside

The clone's tag says that the swap is open. Without it, a volume tagged `aside` belongs to a swap that was committed,
and goes. Which step a dead run had come to is seen from names and UUIDs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import msgspec

from providers.lvm import room
from providers.lvm.commands import Group, changing
from providers.lvm.images import find_image
from providers.lvm.reports import PREFIX, Row, find, hanging_on, suspended_with, tag, untagging
from snapshotter.core.command import run
from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.model import Snapshot, Volume
from snapshotter.host import block

FSTAB = "/etc/fstab"
_TAGS = tuple(tag(key, "") for key in ("swap", "aside", "place", "origin", "committed"))
_SWAP_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
Report = Callable[[], list[Row]]


class Swap(msgspec.Struct, frozen=True):
    """What the tags say. `open` is false once it was committed; then `clone` is None."""

    id: str
    vg: str
    place: str
    origin_uuid: str
    clone: Row | None
    aside: Row | None

    @property
    def open(self) -> bool:
        return self.clone is not None

    @property
    def volume(self) -> str:
        return f"{self.vg}/{self.place}"


def found(rows: Sequence[Row]) -> list[Swap]:
    """Every swap that left a tag."""
    swaps: dict[tuple[str, str], Swap] = {}  # by group: vgimportclone copies tags and UUIDs of volumes
    for row in rows:
        labels = row.labels
        swap_id = labels.get("swap") or labels.get("aside")
        if not swap_id or not labels.get("place"):
            continue
        known = swaps.get((row.vg, swap_id)) or Swap(swap_id, row.vg, labels["place"], "", None, None)
        if "swap" in labels:
            known = msgspec.structs.replace(known, clone=row, origin_uuid=labels.get("origin", ""))
        else:
            known = msgspec.structs.replace(known, aside=row)
        swaps[row.vg, swap_id] = known
    return list(swaps.values())


def _one(rows: Sequence[Row], swap_id: str) -> Swap | None:
    """Raises BusyError where a copied group has it too: which of them is meant, nothing tells."""
    ours = [swap for swap in found(rows) if swap.id == swap_id]
    if len(ours) > 1:
        raise BusyError(
            f"swap {swap_id} is in {' and '.join(swap.vg for swap in ours)}, as in a copied group",
            object=swap_id,
            cure="disconnect whichever of these is the copy, or take our tags (`lvs -o lv_tags`) from its volumes: "
            "lvchange --deltag TAG",
        )
    return ours[0] if ours else None


def refuse_copied(rows: Sequence[Row], volume: str) -> None:
    """Raise BusyError if a copied group has an open swap of this volume too."""
    for each in found(rows):
        if each.open and each.volume == volume:
            _one(rows, each.id)


# ------------------------------------------------------------------------------------------------------- there


def swap(report: Report, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
    """See Provider.swap. Raises PreconditionError (classic, another group, in fstab by UUID of the volume), BusyError
    (in use, an open swap), StorageError."""
    if not _SWAP_ID.fullmatch(swap_id):
        raise ValueError(f"{swap_id!r} is no id")
    with changing(volume.id.partition("/")[0]) as group:
        rows = report()
        origin = find(rows, volume.id)
        image = find_image(rows, snapshot)
        for other in found(rows):
            if other.open and (other.id == swap_id or other.volume == volume.id):
                raise BusyError(f"swap {other.id} is open", object=volume.id, cure="take it back or commit it")
        check_swappable(rows, origin, image)
        record = [tag("swap", swap_id), tag("place", origin.name), tag("origin", origin.uuid)]
        theirs = [text for text in origin.tags if not text.startswith(PREFIX)]
        room.check_group(origin, [*record, *theirs], 1)
        words = [word for text in (*record, *theirs) for word in ("--addtag", text)]
        group.lvm(
            *("lvcreate", "-y", "-s", "-prw", "-ky", "-an", "-n", f"{swap_id}-new"),
            *(*room.PAST_THRESHOLD, *words, image.id),
            object=image.id,
            suspends=suspended_with(rows, image),
            born=f"{swap_id}-new",
        )
        try:
            set_aside = [
                word for text in (tag("aside", swap_id), tag("place", origin.name)) for word in ("--addtag", text)
            ]
            group.lvm("lvchange", "-an", origin.id, object=origin.id)
            group.lvm("lvchange", "-ky", *set_aside, origin.id, object=origin.id)
            group.lvm("lvrename", origin.vg, origin.name, f"{swap_id}-aside", object=origin.id)
            group.lvm("lvrename", origin.vg, f"{swap_id}-new", origin.name, object=origin.id)
            group.lvm("lvchange", "-kn", origin.id, object=origin.id)
            group.lvm("lvchange", "-ay", origin.id, object=origin.id)
            _settle(origin)
        except BaseException:
            with suppress(SnapshotterError):
                _take_back(group, report(), swap_id)
            raise


def check_swappable(rows: Sequence[Row], origin: Row, image: Row, *, in_use: bool = False) -> None:
    """`in_use`: it is to be mounted still. Raises BusyError, PreconditionError."""
    if not (origin.thin and image.thin):
        raise PreconditionError(
            "is no thin volume, and only of those can a snapshot take the place",
            object=origin.id,
            cure="restore with --to, and copy",
        )
    if image.vg != origin.vg:
        raise PreconditionError(
            f"is in another volume group than the set ({image.vg})",
            object=origin.id,
            cure="restore with --to, and copy",
        )
    if origin.open and not in_use:
        raise BusyError("is in use", object=origin.id, cure=f"see who with: fuser -vm {origin.device}")
    if origin.skipped:
        raise PreconditionError(
            "is itself left out of activation at boot", object=origin.id, cure=f"lvchange -kn {origin.id}"
        )
    if (other := hanging_on(rows, origin)) is not None:
        raise BusyError(f"{other.name} hangs on it", object=origin.id, cure="remove that first")
    for number, line in fstab_by_uuid(origin):
        raise PreconditionError(
            f"{FSTAB}, line {number}, would go on to mean what is set aside: {line}",
            object=origin.id,
            cure=f"write {origin.device} there",
        )


def fstab_by_uuid(origin: Row) -> Iterator[tuple[int, str]]:
    """(line number, line) of each line of fstab that names this volume by LVM's own UUID, which a clone hasn't."""
    for number, source, line in _fstab():
        if origin.dm_uuid in source:
            yield number, line


def _fstab() -> Iterator[tuple[int, str, str]]:
    try:
        with open(FSTAB, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) >= 4 and not words[0].startswith("#"):
            yield number, words[0], line.strip()


def _settle(place: Row) -> None:
    """Wait for udev's links, and see that what fstab means is what is in its place now. Raises StorageError."""
    with suppress(PreconditionError):  # no udev here
        run(["udevadm", "settle", "--timeout=60"], timeout=90)
    here = block.number_of(place.device)
    if here is None:
        raise StorageError(
            "did not appear after it was activated", object=place.device, cure=f"lvchange -ay {place.id}"
        )
    uuid = run(["blkid", "-p", "-o", "value", "-s", "UUID", place.device], timeout=60).stdout.strip()
    for number, source, _ in _fstab():
        if (uuid and source.strip('"').upper() == f"UUID={uuid}".upper()) or source == f"/dev/disk/by-uuid/{uuid}":
            link = f"/dev/disk/by-uuid/{uuid}"
            if os.path.exists(link) and block.number_of(link) != here:
                raise StorageError(
                    f"{FSTAB}, line {number}, means another device of that UUID, {os.path.realpath(link)}",
                    object=place.device,
                    cure="release the clones of this volume, or write its path there",
                )


# --------------------------------------------------------------------------------------------------------- back


def swap_back(report: Report, swap_id: str) -> bool:
    """See Provider.swap_back: right at whichever step the swap had come to. False: there is no such swap."""
    if not _SWAP_ID.fullmatch(swap_id):
        raise ValueError(f"{swap_id!r} is no id")
    known = _one(report(), swap_id)
    if known is None:
        return False
    with changing(known.vg) as group:
        _take_back(group, report(), swap_id)
    return True


def _take_back(group: Group, rows: Sequence[Row], swap_id: str) -> None:
    known = _one(rows, swap_id)
    if known is None:
        return
    if known.clone is None:
        if known.aside is None:
            return
        raise StorageError(
            "its clone is gone; what it set aside stays",
            object=known.aside.id,
            cure=f"lvrename {known.vg} {known.aside.name} {known.place} and lvchange -kn -ay it; or lvremove it",
        )
    clone = known.clone
    theirs = _is_theirs(known)
    origin = next((row for row in rows if row.vg == known.vg and row.uuid == known.origin_uuid), None)
    if origin is None:
        raise StorageError("what it set aside is gone", object=swap_id, cure="commit it, to keep what is there")
    if not theirs and (other := hanging_on(rows, clone)) is not None:
        raise BusyError(f"{other.id} hangs on it", object=clone.id, cure=f"lvremove {other.id}, if unneeded")
    if not theirs and clone.open:
        raise BusyError("is in use", object=clone.id, cure=f"see who with: fuser -vm {clone.device}")
    if clone.name == known.place:
        group.lvm("lvchange", "-an", clone.id, object=clone.id)
    if not theirs and not clone.skipped:
        group.lvm("lvchange", "-ky", clone.id, object=clone.id)
    if clone.name == known.place:
        group.lvm("lvrename", known.vg, known.place, f"{swap_id}-new", object=clone.id)
        clone = msgspec.structs.replace(clone, name=f"{swap_id}-new")
    if origin.name != known.place:
        if any((row.vg, row.name) == (known.vg, known.place) and row.uuid != clone.uuid for row in rows):
            raise BusyError("something else has that name since the swap", object=known.volume, cure="rename that")
        group.lvm("lvrename", known.vg, origin.name, known.place, object=origin.id)
    words = ["-kn"] if origin.skipped else []
    for text in (tag("aside", swap_id), tag("place", known.place), tag("committed", "1")):
        words += ["--deltag", text] if text in origin.tags else []
    if words:
        group.lvm("lvchange", *words, known.volume, object=known.volume)
    group.lvm("lvchange", "-ay", known.volume, object=known.volume)
    if theirs:  # last, as its tags say that the swap is open
        # And no more to be activated at boot: it has the UUID of the file system that is in its place again.
        _forget(group, clone, *([] if clone.skipped else ["-ky"]))
    else:
        group.remove(clone, half_made=True)
    with suppress(PreconditionError):
        run(["udevadm", "settle", "--timeout=60"], timeout=90)


# ------------------------------------------------------------------------------------------------------- for good


def swap_commit(report: Report, swap_id: str) -> bool:
    """See Provider.swap_commit. False: there is no such swap. Raises BusyError while what is set aside is in use, or
    something hangs on it; StorageError where its clone isn't in its place."""
    if not _SWAP_ID.fullmatch(swap_id):
        raise ValueError(f"{swap_id!r} is no id")
    known = _one(report(), swap_id)
    if known is None:
        return False
    with changing(known.vg) as group:
        rows = report()
        known = _one(rows, swap_id)
        if known is None:
            return True
        _refuse_commit(rows, known)
        clone, aside = known.clone, known.aside
        if aside is not None and clone is not None and _is_kept(known):
            _forget(group, aside)
        elif aside is not None and not _is_kept(known):
            if not _committed(known):
                group.lvm("lvchange", "--addtag", tag("committed", "1"), aside.id, object=aside.id)
            group.remove(aside)
        if clone is not None:  # last: while they are there the commit can be asked for again
            _forget(group, clone)
    return True


def refuse_commit(report: Report, swap_id: str) -> None:
    """See Provider.refuse_commit."""
    rows = report()
    if (known := _one(rows, swap_id)) is not None:
        _refuse_commit(rows, known)


def _refuse_commit(rows: Sequence[Row], known: Swap) -> None:
    clone, aside = known.clone, known.aside
    if aside is not None and clone is None and not _is_kept(known) and not _committed(known):
        raise StorageError(
            "its clone is gone: this may be all there is",
            object=aside.id,
            cure=f"lvrename {known.vg} {aside.name} {known.place} and lvchange -kn -ay it; or lvremove it",
        )
    if clone is not None and clone.name != known.place and not _is_theirs(known):
        raise StorageError("the swap was never finished", object=known.id, cure="take it back")
    if aside is not None and not _is_kept(known):
        _refuse_dependents(rows, aside)


def _is_kept(known: Swap) -> bool:
    """Whether a person has given what is set aside another name: it is theirs."""
    return known.aside is not None and known.aside.name != f"{known.id}-aside"


def _is_theirs(known: Swap) -> bool:
    """Whether a person has given the clone another name, and keeps it."""
    return known.clone is not None and known.clone.name not in (known.place, f"{known.id}-new")


def _forget(group: Group, row: Row, *changes: str) -> None:
    """It stays, and is in no swap any more."""
    group.lvm("lvchange", *changes, *untagging(row, *_TAGS), row.id, object=row.id)


def finish_commits(rows: Sequence[Row]) -> list[str]:
    """Remove what committed swaps of dead runs still have set aside; the names."""
    removed = []
    swaps = found(rows)
    for known in swaps:
        if sum(other.id == known.id for other in swaps) > 1:
            continue  # a copied group has it too
        if not known.open and known.aside is not None and _committed(known):
            with suppress(BusyError), changing(known.vg, wait_s=0.0) as group:
                _refuse_dependents(rows, known.aside)
                group.remove(known.aside)
                removed.append(known.aside.id)
    return removed


def _committed(known: Swap) -> bool:
    """Its removal was begun. One that a person has renamed since is kept."""
    aside = known.aside
    return aside is not None and tag("committed", "1") in aside.tags and aside.name == f"{known.id}-aside"


def _refuse_dependents(rows: Sequence[Row], aside: Row) -> None:
    if (other := hanging_on(rows, aside)) is not None:
        raise BusyError(f"has {other.name}, which would go with it", object=aside.id, cure="remove that first")
    if aside.open:
        raise BusyError("is in use", object=aside.id, cure=f"see who with: fuser -vm {aside.device}")
