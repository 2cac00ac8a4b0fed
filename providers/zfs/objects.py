"""Ours, as ZFS's own objects carry it: user properties, set on the object itself. Must know no policy.

Properties of a dataset are inherited by all below it, its snapshots too: another tool's snapshot of a clone of ours
shows our properties. So only those with the source `local` count; `received` ones came with a replica. And the names of
sets (on snapshots) and of attachments and swaps (on datasets) differ.

In a copy of a whole pool (`zpool split`, a copied LUN imported under another name) all of them are local, too. But they
speak of another pool than the one they lie in: so a set is a replica there, and the rest is nobody's here. A pool that
was renamed looks the same, until a person gives it its name again.

    snapshotter:birth    snapshot   the birth record, written in the call that makes it
    snapshotter:marks    snapshot   the marks, as one JSON object: they change in one write
    snapshotter:mounts   snapshot   read-only attachments, by id
    snapshotter:clone    clone      a writable attachment
    snapshotter:swap     clone      it is, or is to be, in its origin's place
    snapshotter:aside    dataset    a clone is, or is to be, in this one's place
    snapshotter:kept     clone      was in its origin's place: only what was taken of it there keeps it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from providers.zfs import tool
from snapshotter.core.labels import MARK_NAMES, decode_birth, dumps, loads
from snapshotter.core.model import Birth, ImageState, Snapshot

PROVIDER = "zfs"
BIRTH, MARKS, MOUNTS = "snapshotter:birth", "snapshotter:marks", "snapshotter:mounts"
CLONE, SWAP, ASIDE, KEPT = "snapshotter:clone", "snapshotter:swap", "snapshotter:aside", "snapshotter:kept"
OURS = (BIRTH, MARKS, MOUNTS, CLONE, SWAP, ASIDE, KEPT)
PREFIX = "snapshotter:"
NATIVE = (
    "type",
    "createtxg",
    "origin",
    "userrefs",
    "defer_destroy",
    "clones",
    "referenced",
    "keystatus",
    "encryptionroot",
)
_UNREADABLE = "?"
PIN = "snapshotter"  # the tag of our holds
#: What zfs-auto-snapshot and its like go by. Their snapshots of a clone that comes and goes would keep it from going.
LEFT_OUT = {"com.sun:auto-snapshot": "false"}
_MEMBER = re.compile(r"(s[0-9]{8}t[0-9]{6}z-[0-9a-f]{6})-([0-9]{1,4})")


class Object(msgspec.Struct, frozen=True):
    """A dataset or a snapshot that has something of ours set on itself. `ours`: only what is local; `received`: only
    what came with a replica."""

    name: str
    native: dict[str, str]
    ours: dict[str, str]
    received: dict[str, str]

    @property
    def dataset(self) -> str:
        return self.name.partition("@")[0]

    def record(self, prop: str, *, anywhere: bool = False) -> dict[str, Any] | None:
        """The JSON object that is set here, or None; unless `anywhere`, only one that was made in this pool."""
        try:
            found = loads(self.ours.get(prop, ""))
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict):
            return None
        return found if anywhere or _made_in(found) in ("", tool.pool_of(self.name)) else None

    @property
    def replica(self) -> bool:
        """Whether what was taken is, or may be, another: this one was received, or came here with its whole pool."""
        return BIRTH not in self.ours or self.of_pool not in ("", tool.pool_of(self.name))

    @property
    def of_pool(self) -> str:
        """The pool that the record says it was taken in; '' if it is no snapshot of ours."""
        birth = self.birth
        return "" if birth is None else tool.pool_of(birth.members[birth.member].volume)

    @property
    def birth(self) -> Birth | None:
        """The record, with the number of the member that this snapshot is."""
        birth = decode_birth(self.ours.get(BIRTH) or self.received.get(BIRTH, ""))
        if birth is None or "@" not in self.name:
            return None
        number = _number(self.name, birth)
        return None if number is None else birth.of_member(number)

    @property
    def clones(self) -> list[str]:
        return [name for name in self.native.get("clones", "").split(",") if name not in ("", "-")]


def _made_in(record: Mapping[str, Any]) -> str:
    """The pool that a record was made in; '' if it doesn't tell."""
    named = record.get("pool") or record.get("volume")
    return tool.pool_of(named) if isinstance(named, str) else ""


def snapshot_name(dataset: str, set_id: str, member: int) -> str:
    """One call gives all its snapshots the same properties, so the number of the member is in the name alone."""
    return f"{dataset}@{set_id}-{member}"


def _number(name: str, birth: Birth) -> int | None:
    dataset, _, short = name.partition("@")
    match = _MEMBER.fullmatch(short)
    if match and match[1] == birth.set_id and int(match[2]) < len(birth.members):
        number = int(match[2])
        return number if birth.members[number].provider == PROVIDER else None
    # Renamed by a person: then the dataset tells, as long as it has its name.
    volumes = [(member.provider, member.volume) for member in birth.members]
    return volumes.index((PROVIDER, dataset)) if (PROVIDER, dataset) in volumes else None


def read(names: Sequence[str]) -> list[Object]:
    """These objects as they are now, absent ones left out, in the order of the names."""
    found = tool.get((*NATIVE, *OURS), names)
    for properties in found.values():
        # Each that was asked for has a line, set or not; but a value of many lines has none that can be read.
        properties.setdefault(MARKS, (_UNREADABLE, "local"))
    return [_object(name, found[name]) for name in names if name in found]


def labelled(properties: Sequence[str], *, native: bool = False, pool: str | None = None) -> list[Object]:
    """Every object here (or in one pool) that has one of these set on itself; with ZFS's own properties only if asked
    for."""
    found = tool.get_set(properties, pool)
    return read(list(found)) if native else [_object(name, found[name]) for name in found]


def sure(*properties: str, pool: str | None = None) -> list[Object]:
    """As `labelled`, for what is to be changed: only what each has set on itself for certain. `zfs get` prints a value
    of many lines as it is, also an inherited one, and these may look like any object's properties: so each is asked
    for alone."""
    found = []
    for each in labelled(properties, pool=pool):
        ours = {key: value for key in each.ours if (value := tool.local_value(each.name, key))}
        if ours:
            found.append(msgspec.structs.replace(each, ours=ours))
    return found


def _object(name: str, found: tool.Properties) -> Object:
    return Object(
        name=name,
        native={key: found[key][0] for key in NATIVE if key in found},
        ours={key: found[key][0] for key in OURS if key in found and found[key][1] == "local"},
        received={key: found[key][0] for key in OURS if key in found and found[key][1] == "received"},
    )


def as_snapshot(found: Object) -> Snapshot | None:
    """The member of a set that this snapshot is, or None if it is none of ours."""
    birth = found.birth
    if birth is None:
        return None
    doomed = found.native.get("defer_destroy") == "on"
    marks = marks_of(found)
    return Snapshot(
        provider=PROVIDER,
        id=found.name,
        birth=birth,
        state=ImageState.INVALID if doomed else ImageState.READY,
        # Of what can't be read the hold is left to tell that it is pinned.
        marks=marks if marks is not None else {"pinned": "1"} if found.native.get("userrefs", "0") != "0" else {},
        size_bytes=_int(found.native.get("referenced")),
        order=_int(found.native.get("createtxg")) or 0,
        why="it was destroyed (zfs destroy -d), and only what still uses it keeps it" if doomed else "",
        received=found.replica,
        marks_known=marks is not None,
    )


def marks_of(found: Object) -> dict[str, str] | None:
    """The marks that we know (a newer version may have more); None if what is there can't be read."""
    text = found.ours.get(MARKS) or found.received.get(MARKS, "")
    if not text:
        return {}
    try:
        there = loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(there, dict) or not all(isinstance(value, str) for value in there.values()):
        return None
    marks = {name: value for name, value in there.items() if name in MARK_NAMES}
    return marks if marks or not there else None


def others(found: Object) -> dict[str, Any]:
    """What a newer version has marked, to be kept."""
    there = found.record(MARKS, anywhere=True) or {}
    return {name: value for name, value in there.items() if name not in MARK_NAMES}


def dump(record: object) -> str:
    """JSON in ASCII without blanks: goes through every layer as it is."""
    text = dumps(record)
    if text.isascii():
        return text
    import json  # slow to import, and few paths need its escapes

    return json.dumps(record, separators=(",", ":"), ensure_ascii=True)


def of_set(found: Iterable[Object], set_id: str) -> list[Object]:
    return [each for each in found if (birth := each.birth) is not None and birth.set_id == set_id]


def _int(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
