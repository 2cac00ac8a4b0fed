"""What is written on snapshots and disks: the gce provider's one codec. Must know no call, and load nothing that takes
time.

What never changes is in the `description`, which Compute Engine takes at birth alone: the birth record, an attachment's
record. What does change, and what is looked for, are labels; each of their keys begins with `snapshotter-`, and their
values are of `[a-z0-9_-]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct, convert
from msgspec.structs import asdict

from providers.gce.names import NAME, disk_of, member_names
from snapshotter.core.errors import PreconditionError
from snapshotter.core.labels import MARK_NAMES, LabelLimits, decode_birth, encode_birth, slot_value
from snapshotter.core.model import Access, Attachment, Birth, Purpose
from snapshotter.host.cloud import parts

PREFIX = "snapshotter-"
MANAGED = PREFIX + "managed"
SET = PREFIX + "set"
FILE_SYSTEM = PREFIX + "fs"
ATTACHMENT = PREFIX + "attachment"
INSTANCE = PREFIX + "instance"
SINCE = PREFIX + "since"
MAKER = PREFIX + "maker"
AWAY = PREFIX + "away"  # the host that made it for another machine
SWAP = PREFIX + "swap"
COMMITTED = PREFIX + "committed"
ASIDE = PREFIX + "set-aside"
NODE, TYPE = PREFIX + "node", PREFIX + "type"  # a person's: of a fleet
SLOT = PREFIX + "slot"
_MARK = PREFIX + "mark-"
_MOST = 2048  # characters of a description

LIMITS = LabelLimits(max_value=_MOST, value_pattern=r"[ -~]*")


def of_set(birth: Birth, file_system: str) -> dict[str, Any]:
    """Description and labels of a member's snapshot. `file_system`: what lies on its disk, `ext4`, `ext4/1` on a
    partition, '' where it isn't known."""
    labels = {MANAGED: "true", SET: birth.set_id}
    if birth.slot:
        labels[SLOT] = slot_value(birth.target, birth.slot)
    if file_system:
        labels[FILE_SYSTEM] = file_system.lower().replace("/", "-")
    return {"description": encode_birth(birth), "labels": labels}


def birth_of(item: Any) -> Birth | None:
    """The record of a snapshot; None if it is none of ours: a copy of our labels on another's snapshot is not."""
    labels = item.labels
    if labels.get(MANAGED) != "true":
        return None
    birth = decode_birth(item.description)
    if birth is None or birth.set_id != labels.get(SET):
        return None
    member, disk = birth.members[birth.member], disk_of(item.source_disk)
    named = zip(parts(member.volume), member_names(birth.set_id, birth.member, member.volume), strict=True)
    return birth if member.provider == NAME and disk is not None and (disk.id, item.name) in named else None


def file_system(item: Any) -> tuple[str, int]:
    """(type, partition) of what lies on a snapshot's disk; ('', 0) where it wasn't known."""
    kind, _, partition = item.labels.get(FILE_SYSTEM, "").partition("-")
    return kind, int(partition) if partition.isdigit() else 0


def marks_of(labels: Mapping[str, str]) -> dict[str, str]:
    found = {key.removeprefix(_MARK): value for key, value in labels.items() if key.startswith(_MARK)}
    return {name: value for name, value in found.items() if name in MARK_NAMES}


def mark(name: str) -> str:
    return _MARK + name


def of_attachment(
    attachment_id: str,
    set_id: str,
    member: int,
    destination: str,
    access: Access,
    purpose: Purpose,
    instance: str,
    maker: tuple[int, int] | None,
) -> dict[str, Any]:
    """Description and labels of a disk made from a snapshot. `instance`: the number of the one that it is for."""
    record = {"member": member, "path": destination, "access": str(access), "purpose": str(purpose)}
    description = json.dumps(record)  # ASCII: a path that isn't UTF-8 has its bytes escaped
    if len(description) > _MOST:
        raise PreconditionError("is too long a path", object=destination, cure="restore to a shorter one")
    labels = {MANAGED: "true", SET: set_id, ATTACHMENT: attachment_id, INSTANCE: instance}
    if maker:
        labels[MAKER] = f"{maker[0]}-{maker[1]}"
    return {"description": description, "labels": labels}


def attachment_of(item: Any) -> Attachment | None:
    """The attachment that a disk is (a part of); None if it is none of ours. `held` is not known here."""
    labels = item.labels
    try:
        record = json.loads(item.description)
        if labels.get(MANAGED) != "true" or not item.name.startswith(f"{labels[ATTACHMENT]}-"):
            return None  # a copy of our labels on another's disk is none
        return Attachment(
            id=labels[ATTACHMENT],
            provider=NAME,
            set_id=labels[SET],
            member=int(record["member"]),
            path=str(record["path"]),
            access=Access(record["access"]),
            purpose=Purpose(record["purpose"]),
            since=_moment(labels[SINCE]) if labels.get(SINCE) else None,
        )
    except (KeyError, ValueError, TypeError):
        return None


def since(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y%m%dt%H%M%S-%f")


def _moment(text: str) -> datetime:
    return datetime.strptime(text, "%Y%m%dt%H%M%S-%f").replace(tzinfo=UTC)


def maker_of(labels: Mapping[str, str]) -> tuple[int, int] | None:
    """The process that was making the attachment."""
    found = re.fullmatch(r"(\d+)-(\d+)", labels.get(MAKER, ""))
    return (int(found[1]), int(found[2])) if found else None


class InPlace(Struct, frozen=True):
    """Whose place a disk takes (a volume's id), and as what that was attached."""

    origin: str
    device: str
    auto_delete: bool
    interface: str = ""
    mode: str = ""


def of_swap(swap_id: str, record: InPlace, instance: str, theirs: str) -> dict[str, Any]:
    """Description and labels of a disk that takes another's place. `theirs`: the other's description, which it can't be
    given later: the record is its last line."""
    ours = json.dumps(asdict(record))
    if _record_of(theirs) is not None:
        theirs = theirs.rpartition("\n")[0]  # of an earlier swap
    theirs = theirs[: _MOST - len(ours) - 1]
    labels = {MANAGED: "true", SWAP: swap_id, INSTANCE: instance}
    return {"description": f"{theirs}\n{ours}" if theirs else ours, "labels": labels}


def swap_of(item: Any) -> InPlace | None:
    """Of a disk that is in another's place; None if it is none of ours."""
    ours = item.labels.get(MANAGED) == "true" and SWAP in item.labels
    return _record_of(item.description) if ours and item.name.startswith(f"{item.labels[SWAP]}-") else None


def _record_of(description: str) -> InPlace | None:
    try:
        return convert(json.loads(description.rpartition("\n")[2]), InPlace)
    except (ValueError, TypeError):
        return None


def ours(labels: Mapping[str, str]) -> dict[str, str]:
    """Those that we write."""
    return {key: value for key, value in labels.items() if key.startswith(PREFIX) and key not in (NODE, TYPE)}


def group_of(item: Any) -> Birth | None:
    """The record of an instant snapshot group; None if it is none of ours. It can't have labels: its name is the set's
    id, and its description the set's record."""
    birth = decode_birth(item.description)
    return birth if birth is not None and birth.set_id == item.name else None
