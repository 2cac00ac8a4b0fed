"""What LVM says of its volumes (`lvs` as JSON), our tags on them, and what follows for an image. Changes nothing.

Tags are `snapshotter.<key>=<value>`, of the characters that lvm(8) takes: A-Za-z0-9_+.-/=!:#& and at most 1024. The
birth record and the attachment record are base64url in chunks; marks are a tag each.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from snapshotter.core.command import run
from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.core.labels import MARK_NAMES, LabelLimits, dumps, loads, pack, unpack
from snapshotter.core.model import ATTACHMENT_ID, Birth, ImageState, Snapshot

NAME = "lvm"
LIMITS = LabelLimits(max_value=900, max_chunks=2, value_pattern=r"[A-Za-z0-9_+./=!:#&-]*")
PREFIX = "snapshotter."
QUOTA = "quota"  # on an image: the quota options that its origin was mounted with
_MARK = "mark."
SEALED = f"{PREFIX}{_MARK}sealed="
_CHUNK = 900
READING_S = 120.0  # a report waits for LVM's own lock while another command changes the group

#: LVM would warn of the lock's descriptor that it inherits, and closes.
ENVIRONMENT = {"LVM_SUPPRESS_FD_WARNINGS": "1"}
#: What lvm.conf(5) may say of how a report looks: words before each line, no field that is empty, another separator in
#: a list, without which a thin volume would be taken for a classic one.
_PLAIN = 'log{prefix="" command_names=0} report{compact_output=0 list_item_separator=","}'
LVS, PVS = ("lvs", "--config", _PLAIN), ("pvs", "--config", _PLAIN)

_FIELDS = {
    "vg_name": "vg",
    "vg_uuid": "vg_uuid",
    "vg_attr": "vg_attr",
    "vg_size": "vg_size",
    "vg_free": "vg_free",
    "vg_extent_size": "extent",
    "pv_count": "pvs",
    "vg_mda_size": "mda_size",
    "vg_mda_free": "mda_free",
    "lv_name": "name",
    "lv_uuid": "uuid",
    "lv_attr": "attr",
    "lv_size": "size",
    "lv_tags": "tags",
    "pool_lv": "pool",
    "origin": "origin",
    "data_percent": "data",
    "metadata_percent": "metadata",
    "lv_metadata_size": "metadata_size",
    "chunk_size": "chunk",
    "lv_layout": "layout",
}


class Row(msgspec.Struct, frozen=True):
    """One logical volume. Sizes are bytes, percentages of 100; `attr` and `vg_attr` as lvs(8) and vgs(8) explain."""

    vg: str
    vg_uuid: str
    vg_attr: str
    vg_size: int
    vg_free: int
    extent: int
    pvs: int  # how many physical volumes its group has
    mda_size: int
    mda_free: int
    name: str
    uuid: str
    attr: str
    size: int
    tags: tuple[str, ...]
    pool: str
    origin: str
    data: float | None
    metadata: float | None
    metadata_size: int
    chunk: int  # of a thin pool, or a classic snapshot; else 0
    layout: str

    @property
    def id(self) -> str:
        """As a volume's id, and as LVM's commands take it."""
        return f"{self.vg}/{self.name}"

    @property
    def device(self) -> str:
        return f"/dev/{self.vg}/{self.name}"

    @property
    def dm_name(self) -> str:
        return f"{self.vg.replace('-', '--')}-{self.name.replace('-', '--')}"

    @property
    def dm_uuid(self) -> str:
        """What its device's UUID in device-mapper begins with; hidden layers have something behind it."""
        return f"LVM-{self.vg_uuid.replace('-', '')}{self.uuid.replace('-', '')}"

    @property
    def thin(self) -> bool:
        """A thin volume (`attr` calls it an origin when somebody made a classic snapshot of it)."""
        return bool(self.pool) and "thin" in self.layout.split(",")

    @property
    def active(self) -> bool:
        return self.attr[4] not in "-h"

    @property
    def open(self) -> bool:
        return self.attr[5] == "o"

    @property
    def skipped(self) -> bool:
        """Left out when volumes are activated, as at boot."""
        return self.attr[9:10] == "k"

    @property
    def labels(self) -> dict[str, str]:
        pairs = (tag.removeprefix(PREFIX).partition("=") for tag in self.tags if tag.startswith(PREFIX))
        return {key: value for key, _, value in pairs}


# ------------------------------------------------------------------------------------------------------- reading


def parse(text: str) -> list[Row]:
    """The rows of `lvs --reportformat json --units b --nosuffix`, one for each volume. Raises ValueError for anything
    else."""
    rows = [_row(found) for report in loads(report_of(text))["report"] for found in report["lv"]]
    # The chunk size is a field of segments: asked for it, `lvs` tells of a volume once for each.
    return list({(row.vg_uuid, row.uuid): row for row in rows}.values())


def report_of(stdout: str) -> str:
    """The JSON of it: LVM says things like "Retrying metadata scan." on stdout too, before it or amid its lines."""
    return "\n".join(line for line in stdout.splitlines() if line.lstrip()[:1] in set('{}[]",'))


def _row(found: Mapping[str, str]) -> Row:
    values: dict[str, Any] = {to: found[field] for field, to in _FIELDS.items()}
    for name in ("vg_size", "vg_free", "extent", "pvs", "mda_size", "mda_free", "size", "metadata_size", "chunk"):
        values[name] = int(values[name] or 0)
    for name in ("data", "metadata"):
        values[name] = float(values[name]) if values[name] else None
    values["tags"] = tuple(tag for tag in values["tags"].split(",") if tag)
    return Row(**values)


#: Of a group whose metadata can't be read `lvs` says no more than that, and ends with 0.
_UNREADABLE = re.compile(r"scan failed to get metadata summary from \S+")
_NO_GROUP = re.compile(r'Volume group "\S+" not found|Cannot process volume group')


def read(groups: Sequence[str] = ()) -> tuple[list[Row], str]:
    """(every logical volume of these volume groups, or of all; why there may be more, '' if there are not). A group
    that isn't there has no rows. Raises PreconditionError (no lvm here), StorageError."""
    argv = [*LVS, "--reportformat", "json", "--units", "b", "--nosuffix", "-o", ",".join(_FIELDS), *groups]
    done = run(argv, timeout=READING_S, extra_env=ENVIRONMENT)
    try:
        rows = parse(done.stdout)
    except (ValueError, KeyError, TypeError, IndexError):
        raise StorageError(f"can't list logical volumes: {said(done.stderr) or done.said}", object="lvs") from None
    unreadable = [] if groups else _UNREADABLE.findall(done.stderr)
    return rows, unreadable[-1] if unreadable else "" if done.ok else _unseen(done.stderr)


#: LVM makes no volume in a thin pool fuller than the percentage at which it is to grow, grown or not.
THRESHOLD = "activation/thin_pool_autoextend_threshold"
_LEAST_THRESHOLD = 50.0  # lvm.conf(5): what is below means that


def threshold_of(pool: Row) -> float:
    """The percentage above which LVM makes no volume in this thin pool; 100 where it is too empty for that to matter.
    Raises PreconditionError (no lvm here), StorageError."""
    if max(pool.data or 0, pool.metadata or 0) <= _LEAST_THRESHOLD:
        return 100.0  # to ask costs as much as a report
    done = run(["lvmconfig", "--typeconfig", "full", THRESHOLD], timeout=READING_S)
    said = done.stdout.strip().rpartition("=")[2]
    return max(float(said), _LEAST_THRESHOLD) if said.isdigit() else 100.0


def _unseen(stderr: str) -> str:
    return said("\n".join(line for line in stderr.splitlines() if not _NO_GROUP.search(line)))


def said(stderr: str) -> str:
    """LVM's errors as one line: what it says first may be what it got over."""
    lines = [line.strip().rstrip(".") for line in stderr.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("WARNING", "File descriptor"))]
    return ": ".join(told[:4] or lines[:1])


def find(rows: Iterable[Row], volume: str) -> Row:
    """The row of this volume id. Raises PreconditionError."""
    for row in rows:
        if row.id == volume:
            return row
    raise PreconditionError("there is no such logical volume", object=volume, cure="`lvs` shows what there is")


def hanging_on(rows: Iterable[Row], row: Row) -> Row | None:
    """A volume that `lvremove -y` would remove along with this one: a classic snapshot of it, or a thin volume of
    another pool that has it as its external origin. (lvmthin(7). Thin snapshots in its own pool live on.)"""
    for other in rows:
        if (other.vg, other.origin) == (row.vg, row.name) and (other.attr[0] in "sS" or other.pool != row.pool):
            return other
    return None


def pool_of(rows: Iterable[Row], row: Row) -> Row | None:
    """The thin pool of a thin volume."""
    return next((other for other in rows if row.pool and (other.vg, other.name) == (row.vg, row.pool)), None)


def untagging(row: Row, *prefixes: str) -> list[str]:
    """Options of lvchange that take away this volume's tags with one of these beginnings."""
    return [word for text in row.tags if text.startswith(prefixes) for word in ("--deltag", text)]


def suspended_with(rows: Sequence[Row], row: Row) -> list[Row]:
    """What a command that makes or removes a snapshot of this volume may suspend: it, its thin pool, and every classic
    snapshot that there is of it."""
    pool = pool_of(rows, row)
    others = [other for other in rows if (other.vg, other.origin) == (row.vg, row.name) and other.attr[0] in "sS"]
    return [row, *([pool] if pool else []), *others]


# ---------------------------------------------------------------------------------------------------------- tags


def tag(key: str, value: str) -> str:
    return f"{PREFIX}{key}={value}"


def birth_tags(birth: Birth, order: int) -> list[str]:
    """Raises PreconditionError if there is no room for the record."""
    return [tag(key, value) for key, value in pack(birth, LIMITS).items()] + [tag("order", str(order))]


def maker_tag() -> str:
    """Who makes this: until it is sealed or settled, that it lives tells it from a leftover."""
    from snapshotter.host import processes

    who = processes.identity(os.getpid())
    return tag("maker", f"{who[0]}.{who[1]}" if who else "")


def maker_lives(row: Row) -> bool:
    """Whether the process that made it runs still; True where nothing is said of one."""
    pid, _, started = row.labels.get("maker", "").partition(".")
    if not (pid.isdigit() and started.isdigit()):
        return "maker" not in row.labels
    from snapshotter.host import processes

    return processes.alive((int(pid), int(started)))


def marks(row: Row) -> dict[str, str]:
    found = {key.removeprefix(_MARK): value for key, value in row.labels.items() if key.startswith(_MARK)}
    return {name: value for name, value in found.items() if name in MARK_NAMES}


def mark_tag(name: str, value: str) -> str:
    return tag(_MARK + name, value)


def to_text(record: Mapping[str, Any]) -> list[str]:
    """A record as values for tags, in order."""
    raw = dumps(record).encode(errors="surrogateescape")  # a path need not be UTF-8
    text = base64.urlsafe_b64encode(raw).decode().rstrip("=")
    return [text[at : at + _CHUNK] for at in range(0, len(text), _CHUNK)]


def attachment_record(row: Row) -> dict[str, Any] | None:
    """What `attach` wrote on the clone; None if this is none of ours."""
    labels = row.labels
    chunks: list[str] = []
    while (key := f"attachment{len(chunks)}") in labels:
        chunks.append(labels[key])
    text = "".join(chunks)
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        record = loads(raw.decode(errors="surrogateescape"))
    except ValueError:
        return None
    if not isinstance(record, dict) or not ATTACHMENT_ID.fullmatch(str(record.get("id"))):
        return None
    return record if isinstance(record.get("member"), int) else None


def birth_of(row: Row) -> Birth | None:
    """The birth record that an image carries; None if it is none of ours."""
    return unpack(row.labels) if any(tag.startswith(PREFIX + "birth") for tag in row.tags) else None


# -------------------------------------------------------------------------------------------------------- images


def image_name(birth: Birth) -> str:
    return f"{birth.set_id}-{birth.member}"


def renamed(row: Row) -> bool:
    """An image of ours that a person has given another name, and perhaps a node: it is theirs."""
    birth = birth_of(row)
    return birth is not None and row.name != image_name(birth)


def snapshot(row: Row, rows: Sequence[Row]) -> Snapshot | None:
    """The member of a set that this volume is, judged; None if it is none of ours."""
    birth = birth_of(row)
    if birth is None:
        return None
    why = lacks(row, pool_of(rows, row))
    if not why and "mark.sealed" not in row.labels and not maker_lives(row):
        # Its lvcreate may have been killed with the image still queued: the next lvcreate there makes it, too late.
        why = "the run that made it died before it was sealed"
    order = row.labels.get("order", "")
    used = row.data if not row.thin and row.attr[0] == "s" else None
    return Snapshot(
        provider=NAME,
        id=row.id,
        birth=birth,
        state=ImageState.INVALID if why else ImageState.READY,
        marks=marks(row),
        size_bytes=None if used is None else round(row.size * used / 100),
        order=int(order) if order.isdigit() else 0,
        why=why,
    )


def lacks(row: Row, pool: Row | None) -> str:
    """Why this is no image that could be restored, for a person; '' if it is one. (lvs(8), "lv_attr".) Of an inactive
    classic snapshot nothing can be asked: `attach` refuses it."""
    state, health = row.attr[4], row.attr[8]
    if renamed(row):
        return f"somebody has renamed it to {row.name}, and keeps it for something else"
    if health == "p":
        return "a physical volume that it lies on is missing"
    if row.attr[1] == "w":
        return "it was made writable, so it may have been changed"
    if row.attr[0] == "S":  # a thin one, at the latest when its origin is activated again
        return "it is being merged into its origin"
    if row.thin:
        if pool is None:
            return "its thin pool is gone"
        if "F" in (health, pool.attr[8]) or health == "X":
            return f"its thin pool {pool.name} has failed"
        return f"its thin pool {pool.name} wants a check" if pool.attr[4] in "cC" else ""
    if row.attr[0] != "s" or not row.origin:
        return "it is no snapshot"
    if state in "IS" or (row.data is not None and row.data >= 100):
        return "it overflowed: its origin wrote more than it had room for"
    return "it could not be merged into its origin" if state in "mM" else ""


# ---------------------------------------------------------------------------------------------------------- names

_DM_NAME = re.compile(r"((?:[^-]|--)+)-((?:[^-]|--)+)")
_DM_UUID = re.compile(r"LVM-[A-Za-z0-9]{64}")


def volume_of(dm_name: str, dm_uuid: str) -> str | None:
    """`group/volume` of a device of LVM that is a volume itself; None for hidden layers and other devices."""
    if not _DM_UUID.fullmatch(dm_uuid):
        return None
    found = _DM_NAME.fullmatch(dm_name)
    return "/".join(part.replace("--", "-") for part in found.groups()) if found else None
