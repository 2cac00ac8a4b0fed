"""Is there room for a snapshot of this volume: thin pool, volume group, LVM's own metadata, and how large a classic
snapshot should be. Changes nothing, runs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from providers.lvm.reports import THRESHOLD, Row, find, pool_of
from snapshotter.core.errors import PreconditionError
from snapshotter.host import block

#: A full metadata device stops the origin as a full pool does, and grows in jumps: never let it come near.
METADATA_LIMIT = 90.0
#: How long a classic snapshot should last at the rate at which its origin has been written, twice over; and the least.
HORIZON_S = 24 * 3600.0
LEAST_S = 3600.0
SMALLEST = 16 << 20
CHUNK = 4096
#: A new image may wait until there is room; a restore may not.
PAST_THRESHOLD = ("--config", f"{THRESHOLD}=100")
#: What a file system writes beside what is copied into it: a sixteenth, and at least so many bytes.
_BESIDE = 4 << 20
_FULL = 95.0  # of a thin pool, percent: a restore may pass LVM's threshold, and what runs on it needs some too
_MAPPING = 48  # bytes of a pool's metadata for a chunk (thin_metadata_size)
_AND = " && "
_ELSEWHERE = "or restore elsewhere with --to"
#: LVM's text for one more volume, beside its tags (seen: 300 to 700 bytes).
VOLUME_TEXT = 1000


class Size(int):
    """Bytes, also as 10G, 512M, 1T (powers of 1024)."""

    def __new__(cls, given: object) -> Size:
        text = str(given).strip().upper().removesuffix("B").removesuffix("I")
        power = "KMGT".find(text[-1:]) + 1 if text else 0
        number = float(text[:-1]) * 1024**power if power else float(int(text))
        if not 1 <= number < math.inf:
            raise ValueError(given)
        return super().__new__(cls, number)


def check_group(row: Row, tags: list[str], members: int) -> None:
    """Can the group of this volume be changed, and take as many volumes more with these tags? Raises
    PreconditionError."""
    if "x" in row.vg_attr[2:3] or row.vg_attr[:1] == "r":
        why, cure = (
            ("exported", f"vgimport {row.vg}") if "x" in row.vg_attr[2:3] else ("read-only", "`vgs -v` says more")
        )
        raise PreconditionError(f"may not be changed: it is {why}", object=row.vg, cure=cure)
    if row.vg_attr[3:4] == "p" or row.attr[8] == "p":
        raise PreconditionError(
            "a physical volume of it is missing", object=row.vg, cure="`pvs` shows which; bring it back"
        )
    needed = sum(len(tag) + 4 for tag in tags) + members * VOLUME_TEXT
    if row.mda_free < needed:
        raise PreconditionError(
            f"its LVM metadata area has {row.mda_free} bytes left of {row.mda_size}, and a set needs {needed}",
            object=row.vg,
            cure="delete old sets; a new physical volume with --metadatasize 16m has more",
        )


def check_pool(pool: Row, floor: float, threshold: float = 100.0) -> None:
    """Is the thin pool sound and below its limits, LVM's own `threshold` (percent) among them? Raises PreconditionError
    with what to run."""
    if pool.attr[8] == "F":
        raise PreconditionError("the thin pool has failed", object=pool.id, cure=f"lvconvert --repair {pool.id}")
    if pool.attr[4] in "cC" or pool.attr[8] == "M":
        raise PreconditionError(
            "the thin pool's metadata wants a check", object=pool.id, cure=f"lvconvert --repair {pool.id}"
        )
    limit = min(100 * (1 - floor), threshold)
    if pool.data is not None and (pool.data > limit or pool.attr[8] == "D"):
        raise PreconditionError(
            f"the thin pool is {pool.data:.0f} % full, and a full one stops its origin too (limit {limit:.0f} %)",
            object=pool.id,
            cure=f"delete old sets, or: lvextend -L+{_more(pool.size, 1 << 30)} {pool.id}",
        )
    # LVM makes no thin volume with less than that free (2.03, pool_metadata_min_threshold).
    least = min(25.0, 100 * (4 << 20) / pool.metadata_size) if pool.metadata_size else 0.0
    limit = min(limit, METADATA_LIMIT, 100 - least)
    if pool.metadata is not None and pool.metadata > limit:
        raise PreconditionError(
            f"the thin pool's metadata is {pool.metadata:.0f} % full, and a full one stops its origin too "
            f"(limit {limit:.0f} %)",
            object=pool.id,
            cure=f"delete old sets, or: lvextend --poolmetadatasize +{_more(pool.size // 1000, 4 << 20)} {pool.id}",
        )


def check_writes(rows: Sequence[Row], written: Mapping[str, int]) -> None:
    """Is there room below these volumes for so many bytes written to each? A classic snapshot that overflows is lost
    for good, and a full pool stops all that is in it. Each block counts as new: which ones were copied out before,
    LVM doesn't tell. (One that was costs nothing, so a snapshot as large as its origin never overflows.) Raises
    PreconditionError with what to run."""
    pools: dict[str, int] = {}
    for volume, need in written.items():
        row = find(rows, volume)
        cost = min(need + need // 16 + _BESIDE, row.size) if need else 0
        pool = pool_of(rows, row) if row.thin else None
        if pool is not None:
            pools[pool.id] = pools.get(pool.id, 0) + cost
        lacking: dict[str, int] = {}
        for cow in rows:
            if (cow.vg, cow.origin) != (row.vg, row.name) or cow.attr[0] != "s":
                continue
            if cow.data is None or cow.data >= 100 or cow.attr[4] in "IS":
                continue  # lost already
            used = round(cow.size * cow.data / 100)
            lack = min(whole(cost), whole(row.size) - used) - (cow.size - used)
            if cost and lack > 0:
                lacking[cow.id] = lack
        if lacking:
            raise PreconditionError(
                f"up to {cost >> 20} MiB would be written to it, and overflow its classic snapshots: {len(lacking)} of "
                "them would be lost",
                object=row.id,
                cure=f"{_AND.join(f'lvextend -L+{_mib(lack)}M {id}' for id, lack in lacking.items())}; {_ELSEWHERE}",
            )
    for id, cost in pools.items():
        pool = find(rows, id)
        free = round(pool.size * (100 - (pool.data or 0)) / 100)
        lack = cost - round(pool.size * (_FULL - (pool.data or 0)) / 100)
        if cost * 20 > free and lack > 0:  # a key's few bytes are no harm, however full it is
            raise PreconditionError(
                f"up to {cost >> 20} MiB would be written to the thin pool, which is {pool.data or 0:.0f} % full: a "
                "full one stops all that is in it",
                object=id,
                cure=f"lvextend -L+{_mib(lack)}M {id}; {_ELSEWHERE}",
            )
        mapped = _MAPPING * (cost // pool.chunk if pool.chunk else 0)
        lack = mapped - round(pool.metadata_size * (_FULL - (pool.metadata or 0)) / 100)
        if cost and pool.metadata_size and lack > 0:
            raise PreconditionError(
                f"up to {cost >> 20} MiB would be written to the thin pool, whose metadata is "
                f"{pool.metadata or 0:.0f} % full: a full one stops all that is in it",
                object=id,
                cure=f"lvextend --poolmetadatasize +{_mib(lack)}M {id}; {_ELSEWHERE}",
            )


def _mib(size: int) -> int:
    return -(-size // (1 << 20))


def whole(size: int) -> int:
    """Bytes of a classic snapshot of which so many of the origin's are written, each once."""
    return size + size // (CHUNK // 16) + 4 * CHUNK


def _more(size: int, least: int) -> str:
    return f"{max(size // 5, least) >> 20}M"


def cow_sizes(rows: Sequence[Row], wanted: int | None, written_per_s: Sequence[float]) -> list[int]:
    """Bytes for a classic snapshot of each of these volumes, taken together: as `wanted`; else for a day of what was
    written to it on average, twice over, and a tenth of it at least; never more than could be used. Where its group
    hasn't that, each has an hour's, and they share the rest, but for one clone of each: an image that can't be attached
    is of no use. Raises PreconditionError if there isn't even that."""
    sizes: dict[str, int] = {}
    for vg in sorted({row.vg for row in rows}):
        theirs = [(row, rate) for row, rate in zip(rows, written_per_s, strict=True) if row.vg == vg]
        least, more = {}, {}
        for row, rate in theirs:
            day, hour = max(2 * round(rate * HORIZON_S), row.size // 10), max(round(rate * LEAST_S), row.size // 100)
            least[row.id] = _extents(row, wanted if wanted is not None else max(hour, SMALLEST))
            more[row.id] = _extents(row, wanted if wanted is not None else max(day, SMALLEST)) - least[row.id]
        clones = sum(least_store(row) for row, _ in theirs) if wanted is None else 0
        free, extent = theirs[0][0].vg_free, theirs[0][0].extent
        spare = free - clones - sum(least.values())
        if spare < 0:
            raise PreconditionError(
                f"its volume group has {free >> 20} MiB free, and a snapshot needs {(free - spare) >> 20}"
                + (", room for a clone included" if clones else ""),
                object=theirs[0][0].id,
                cure=f"delete old sets, vgextend the group, or give {'-o' if wanted is None else 'a smaller -o'} size=",
            )
        share = min(1.0, spare / sum(more.values())) if any(more.values()) else 1.0
        sizes |= {id: size + int(more[id] * share) // extent * extent for id, size in least.items()}
    return [sizes[row.id] for row in rows]


def least_store(row: Row) -> int:
    """Bytes without which no clone of a classic snapshot of this volume is made."""
    return _extents(row, max(row.size // 100, SMALLEST))


def store_size(row: Row, free: int, wanted: int | None, waiting: Sequence[Row] = ()) -> int:
    """Bytes for what is written to a clone of a classic snapshot of this volume: as `wanted`, else a tenth of it, but
    no more than half of what is `free` in its group, as takes go on, and as clones of those `waiting` are to be made
    too. Raises PreconditionError."""
    left = free - sum(least_store(other) for other in waiting)
    size = wanted if wanted is not None else max(least_store(row), min(row.size // 10, left // 2))
    size = _extents(row, size)
    if size > free:
        raise PreconditionError(
            f"its volume group has {free >> 20} MiB free, and a clone needs {size >> 20} for what is written to it",
            object=row.id,
            cure="vgextend the group, delete old sets, or with --to or --mount give -o size= (a full clone is lost)",
        )
    return size


def _extents(row: Row, size: int) -> int:
    return -(-min(size, whole(row.size)) // row.extent) * row.extent  # LVM makes none larger


def write_rate(number: str | None) -> float:
    """Bytes per second written to this device, on average since the kernel started."""
    return block.written_bytes(number) / max(1.0, block.uptime_s()) if number else 0.0
