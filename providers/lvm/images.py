"""Images that are there: which are whose leftovers, what uses one, how marks are changed for good, how they go. Must
know nothing of how they are made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

from providers.lvm.commands import changing
from providers.lvm.reports import (
    NAME,
    PREFIX,
    PVS,
    QUOTA,
    READING_S,
    Row,
    attachment_record,
    birth_of,
    hanging_on,
    lacks,
    maker_lives,
    mark_tag,
    marks,
    pool_of,
    renamed,
    said,
    suspended_with,
    tag,
    untagging,
)
from snapshotter.core.command import run
from snapshotter.core.errors import BusyError, NotFoundError, SnapshotterError, StorageError
from snapshotter.core.labels import apply_marks
from snapshotter.core.model import Snapshot, Volume, utc_now
from snapshotter.host import block, mounts
from snapshotter.host.places import host_name, same_host

_QUOTA = re.compile(r"quota|(usr|grp|prj)j?quota(=[A-Za-z0-9_+./-]+)?|[ugp]qnoenforce|jqfmt=\w+")


def of_set(rows: Sequence[Row], set_id: str) -> list[Row]:
    """The members of a set that are here, also those that somebody has renamed."""
    return [row for row in rows if (birth := birth_of(row)) is not None and birth.set_id == set_id]


def find_image(rows: Sequence[Row], wanted: Snapshot) -> Row:
    """The volume of this very snapshot: a copied group (vgimportclone) has another with its record. Raises
    NotFoundError, StorageError (it has no valid image)."""
    for row in of_set(rows, wanted.birth.set_id):
        if row.id == wanted.id:
            refuse_invalid(row, rows, wanted.birth.set_id)
            return row
    raise NotFoundError("no such set", object=wanted.birth.set_id, cure="`snapshotter list` shows all")


def refuse_invalid(image: Row, rows: Sequence[Row], set_id: str) -> None:
    """Raises StorageError."""
    if why := lacks(image, pool_of(rows, image)):
        raise StorageError(f"has no valid image: {why}", object=set_id, cure="restore another set")


def in_use(rows: Sequence[Row], set_id: str) -> BusyError | None:
    """Why the set can't be removed now: attached, open, or `lvremove -y` would take along what hangs on it."""
    members = of_set(rows, set_id)
    ours = [row for row in members if not renamed(row)]
    for row in rows:
        record = attachment_record(row)
        if members and record is not None and record.get("set_id") == set_id:
            where = record.get("path")
            return BusyError(
                f"is attached at {where} ({record['id']})", object=set_id, cure=f"snapshotter release {where}"
            )
    for row in ours:
        if (twin := next((each for each in ours if each is not row and each.name == row.name), None)) is not None:
            return BusyError(
                f"{row.id} and {twin.id} are both its member, as in a copied group",
                object=set_id,
                cure="rename the one that isn't to be removed",
            )
        if (other := hanging_on(rows, row)) is not None:
            return BusyError(f"{other.id} hangs on it", object=set_id, cure=f"lvremove {other.id}, if unneeded")
        if row.open:
            return BusyError(f"{row.id} is in use", object=set_id, cure=f"see who with: fuser -vm {row.device}")
    return None


def remove(rows: Sequence[Row], set_id: str) -> None:
    """Remove every member that is here; a renamed one only loses our tags. Raises BusyError, StorageError."""
    if (busy := in_use(rows, set_id)) is not None:
        raise busy
    members = of_set(rows, set_id)
    for vg in sorted({row.vg for row in members}):
        theirs = [row for row in members if row.vg == vg]
        origins = [row for row in rows if row.vg == vg and row.name in {each.origin for each in theirs}]
        held = [each for origin in origins for each in suspended_with(rows, origin)]
        with changing(vg) as group:
            for row in theirs:
                if renamed(row):
                    words = untagging(row, PREFIX)
                    group.lvm("lvchange", *words, row.id, object=row.id)
                    continue
                # Of a classic one lvremove first makes a volume of its own, which is no image any more: killed there, a
                # sealed one was damaged for ever. Without its seal it is a leftover, and `reap` ends what was begun.
                if not row.thin and (words := retag(marks(row), {"sealed": None}, [])):
                    with suppress(SnapshotterError):  # then lvremove says why
                        group.lvm("lvchange", *words, row.id, object=row.id)
                group.remove(row, suspends=held, half_made="sealed" not in marks(row))


def leftovers(rows: Sequence[Row], volumes: Sequence[Volume]) -> list[str]:
    """Sets of these volumes that were never sealed, and whose makers are dead or whose deadline is past. Whoever takes
    these volumes holds their locks, so no other run on this host is making one."""
    ids = {volume.id for volume in volumes}
    found: dict[str, bool] = {}
    for row in rows:
        birth = birth_of(row)
        if birth is None or "sealed" in marks(row) or not same_host(birth.host, host_name()):
            continue
        if any(member.provider == NAME and member.volume in ids for member in birth.members):
            found[birth.set_id] = not maker_lives(row) or birth.deadline < utc_now()
    sealed = {birth.set_id for row in rows if "sealed" in marks(row) and (birth := birth_of(row)) is not None}
    return [set_id for set_id, dead in found.items() if dead and set_id not in sealed]


def quota_tags(volume: Volume) -> list[str]:
    """The quota options that the origin is mounted with: a clone mounted without them would lose its accounting."""
    entry = next((entry for entry in reversed(mounts.table()) if entry.path == volume.path), None)
    options = sorted(option for option in (entry.super_options if entry else ()) if _QUOTA.fullmatch(option))
    return [tag(QUOTA, "&".join(options))] if options else []


def retag(now: Mapping[str, str], changes: Mapping[str, str | None], gone: Sequence[str]) -> list[str]:
    """Options of lvchange that turn the marks `now` into those after `changes`, and take the tags `gone` away."""
    after = apply_marks(now, changes)
    old = [mark_tag(name, value) for name, value in now.items() if after.get(name) != value]
    new = [mark_tag(name, value) for name, value in after.items() if now.get(name) != value]
    return [word for text in (*old, *gone) for word in ("--deltag", text)] + [
        word for text in new for word in ("--addtag", text)
    ]


def carry_out(work: Mapping[str, list[str]], set_id: str) -> None:
    """One lvchange per group and per kind of change: members almost always change alike."""
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for volume, words in work.items():
        if words:
            alike.setdefault((volume.partition("/")[0], tuple(words)), []).append(volume)
    for (vg, changed), theirs in sorted(alike.items()):
        with changing(vg) as group:
            group.lvm("lvchange", *changed, *theirs, object=set_id)


def flush(rows: Sequence[Row]) -> None:
    """LVM writes its metadata past the page cache, but a disk's own cache may hold it still. What LVM writes to is told
    to flush, not the disks at the very bottom: between them may be what has a cache or a journal of its own (dm-cache,
    bcache, a thin volume), and only what comes through it makes it write."""
    written = [pv for row in rows if (number := block.number_of(row.device)) for pv in _physical(number, row)]
    written += [pv for vg in sorted({row.vg for row in rows if row.pvs > 1}) for pv in _with_metadata(vg)]
    try:
        block.flush(list(dict.fromkeys(written)))
    except OSError as error:
        raise StorageError(f"can't flush its disks: {error.strerror}", object=rows[0].vg) from None


def _with_metadata(vg: str) -> list[str]:
    """The physical volumes (numbers) of a group that hold its metadata: not all need to (pvchange --metadataignore)."""
    asked = run(
        [*PVS, "--noheadings", "-o", "pv_name", "-S", f"vg_name={vg} && pv_mda_used_count>0"], timeout=READING_S
    )
    found = [number for line in asked.stdout.splitlines() if (number := block.number_of(line.strip()))]
    if not found:  # a seal that a power cut could take back is none
        raise StorageError(
            f"can't tell which of its disks hold its metadata: {said(asked.stderr)}",
            object=vg,
            cure=f"see what `pvs` says of {vg}",
        )
    return found


def _physical(number: str, row: Row) -> list[str]:
    """The physical volumes (numbers) below a device of this volume's group; they may be another group's volumes."""
    found, group = block.device(number), f"LVM-{row.vg_uuid.replace('-', '')}"
    if found is None or not found.dm_uuid.startswith(group):
        return [number]
    return [pv for under in block.below(number) for pv in _physical(under, row)]
