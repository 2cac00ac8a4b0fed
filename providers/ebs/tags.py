"""How EBS's volumes are named on a host, and what is written on volumes and snapshots: the ebs provider's one codec.
Must know no call, and load nothing that takes time: every take on a disk that is nobody's asks who it belongs to.

All keys begin with `snapshotter:`, so that a policy can name them. One CreateSnapshots call gives all its snapshots the
same tags: each says only that it is of the set, and its VolumeId which member it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from snapshotter.core.labels import MARK_NAMES, LabelLimits, pack, slot_value, unpack
from snapshotter.core.model import Access, Attachment, Birth, Purpose
from snapshotter.host.cloud import parts
from snapshotter.provider import VENDORS

PREFIX = "snapshotter:"
MANAGED = PREFIX + "managed"
SET = PREFIX + "set"
OPERATION = PREFIX + "operation"
FILE_SYSTEM = PREFIX + "fs"
ATTACHMENT = PREFIX + "attachment"
INSTANCE = PREFIX + "instance"
AWAY = PREFIX + "away"  # on a volume made for another machine: the host that asked for it
SINCE = PREFIX + "since"
MAKER = PREFIX + "maker"
SWAP = PREFIX + "swap"
ORIGIN = PREFIX + "origin"
DEVICE = PREFIX + "device"
COMMITTED = PREFIX + "committed"
ASIDE = PREFIX + "set-aside"
COPY_TO = PREFIX + "copy-to"  # on a set: regions
COPIED = PREFIX + "copied-"  # and a region, on a set: it is whole there
COPYING = PREFIX + "copying-"  # and a region, on a set's snapshot: when its copy was last asked for (since 1970)
SOURCE = PREFIX + "source"  # on a copy: region/snapshot
WHOLE = PREFIX + "whole"  # on a copy: all of its set was there
SLOT = PREFIX + "slot"
#: On volumes, by whoever runs the fleet: which node they are of, and which type it is.
NODE, TYPE = PREFIX + "node", PREFIX + "type"
_MEMBER, _ACCESS, _PURPOSE, _PATH = (PREFIX + name for name in ("member", "access", "purpose", "path"))
_MARK = PREFIX + "mark-"
_CHUNK = 250
NAME = "ebs"
VENDOR = VENDORS["ebs"]
BY_ID = "nvme-Amazon_Elastic_Block_Store_"

#: 255 characters of letters, digits, blanks and these, says EC2's guide; a GCE label or a JSON text would need more.
LIMITS = LabelLimits(max_value=_CHUNK, max_chunks=3, value_pattern=r"[A-Za-z0-9 +=._:/@-]*")


def serial(volume: str) -> str:
    """As a volume's disk says it: `vol0123...`."""
    return volume.replace("-", "")


def volume_of(identity: str) -> str | None:
    """Inverse of `serial`; None for another disk (an instance store says `AWS...`)."""
    return f"vol-{identity[3:]}" if identity.startswith("vol") and identity[3:4] != "-" else None


def as_tags(values: Mapping[str, str]) -> list[dict[str, str]]:
    """As EC2's calls take them."""
    return [{"Key": key, "Value": value} for key, value in values.items()]


def is_ours(key: str) -> bool:
    """Whether we write it. NODE and TYPE are the fleet's own: they go with the data."""
    return key.startswith(PREFIX) and key not in (NODE, TYPE)


def read(item: Mapping[str, Any]) -> dict[str, str]:
    """The tags of what EC2 described."""
    return {tag["Key"]: tag["Value"] for tag in item.get("Tags", [])}


def of_set(birth: Birth, operation: str, file_systems: Mapping[str, str], copy_to: str = "") -> dict[str, str]:
    """The tags of a set's snapshots. `file_systems`: what lies on each volume, `ext4`, or `ext4/1` on a partition.
    `copy_to`: regions, a blank between two."""
    record = pack(birth.of_member(0), LIMITS)
    kinds = [file_systems.get(member.volume, "-") if member.provider == NAME else "-" for member in birth.members]
    return {
        MANAGED: "true",
        SET: birth.set_id,
        OPERATION: operation,
        FILE_SYSTEM: " ".join(kind or "-" for kind in kinds),
        **({COPY_TO: copy_to} if copy_to else {}),
        **({SLOT: slot_value(birth.target, birth.slot)} if birth.slot else {}),
        **{PREFIX + key: value for key, value in record.items()},
    }


def of_copy(labels: Mapping[str, str], source: str, volume: str, operation: str) -> dict[str, str]:
    """The tags of a copy in another region of a set's snapshot that has these. It is born with its marks, the seal
    among them: where the region that it is of is lost, nobody can bring them."""
    kept = {key: value for key, value in labels.items() if key in (MANAGED, SET, FILE_SYSTEM) or key.startswith(_MARK)}
    record = {key: value for key, value in labels.items() if key.startswith(PREFIX + "birth")}
    return {**kept, **record, OPERATION: operation, SOURCE: source, ORIGIN: volume}


def birth_of(tags: Mapping[str, str], volume: str) -> Birth | None:
    """The record of the snapshot of this volume; None if it is none of ours."""
    if tags.get(MANAGED) != "true":
        return None
    birth = unpack({key.removeprefix(PREFIX): value for key, value in tags.items() if key.startswith(PREFIX)})
    if birth is None or birth.set_id != tags.get(SET):
        return None
    for index, member in enumerate(birth.members):
        if member.provider == NAME and volume in parts(member.volume):
            return birth.of_member(index)
    return None


def origin_of(item: Mapping[str, Any]) -> str:
    """The volume that a snapshot is of. EC2 gives a copy one that means nothing."""
    labels = read(item)
    return labels.get(ORIGIN, "") if SOURCE in labels else str(item["VolumeId"])


def copied(tags: Mapping[str, str]) -> list[str]:
    """Regions where a set's snapshot was copied to, wholly."""
    return [key.removeprefix(COPIED) for key in tags if key.startswith(COPIED)]


def uncopied(tags: Mapping[str, str], here: str) -> list[str]:
    """Regions other than its own where a set's snapshot is to be copied to, and isn't wholly yet."""
    return [region for region in tags.get(COPY_TO, "").split() if region != here and COPIED + region not in tags]


def copy_of(tags: Mapping[str, str]) -> str:
    """The region of what a snapshot is a copy of; '' if it is none."""
    return tags.get(SOURCE, "").partition("/")[0]


def in_the_making(tags: Mapping[str, str]) -> bool:
    """A copy whose set isn't known to have been copied wholly."""
    return SOURCE in tags and WHOLE not in tags


def file_system(tags: Mapping[str, str], member: int) -> tuple[str, int]:
    """(type, partition) of what lies on a member's volume; ('', 0) where it wasn't known."""
    kinds = tags.get(FILE_SYSTEM, "").split(" ")
    kind, _, partition = (kinds[member] if member < len(kinds) else "-").partition("/")
    return ("" if kind == "-" else kind), int(partition) if partition.isdigit() else 0


def marks_of(tags: Mapping[str, str]) -> dict[str, str]:
    found = {key.removeprefix(_MARK): value for key, value in tags.items() if key.startswith(_MARK)}
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
) -> dict[str, str]:
    """The tags of a volume made from a snapshot."""
    from urllib.parse import quote_from_bytes

    # As in mail: `=` instead of `%`, which EC2's guide doesn't allow.
    path = quote_from_bytes(os.fsencode(destination)).replace("~", "%7E").replace("%", "=")
    chunks = [path[k : k + _CHUNK] for k in range(0, len(path), _CHUNK)]
    return {
        MANAGED: "true",
        SET: set_id,
        ATTACHMENT: attachment_id,
        INSTANCE: instance,
        _MEMBER: str(member),
        _ACCESS: str(access),
        _PURPOSE: str(purpose),
        MAKER: f"{maker[0]}.{maker[1]}" if maker else "",
        **{f"{_PATH}{k}": chunk for k, chunk in enumerate(chunks)},
    }


def of_swap(swap_id: str, origin: str, device: str, instance: str) -> dict[str, str]:
    """The tags of a volume that takes its origin's place."""
    return {MANAGED: "true", SWAP: swap_id, ORIGIN: origin, DEVICE: device, INSTANCE: instance}


def attachment_of(tags: Mapping[str, str]) -> Attachment | None:
    """The attachment that a volume is (a part of); None if it is none of ours. `held` is not known here."""
    from urllib.parse import unquote_to_bytes

    chunks = [tags[f"{_PATH}{k}"] for k in range(len(tags)) if f"{_PATH}{k}" in tags]
    try:
        return Attachment(
            id=tags[ATTACHMENT],
            provider=NAME,
            set_id=tags[SET],
            member=int(tags[_MEMBER]),
            path=os.fsdecode(unquote_to_bytes("".join(chunks).replace("=", "%"))),
            access=Access(tags[_ACCESS]),
            purpose=Purpose(tags[_PURPOSE]),
            since=datetime.fromisoformat(tags[SINCE]) if tags.get(SINCE) else None,
        )
    except (KeyError, ValueError):
        return None


def maker_of(tags: Mapping[str, str]) -> tuple[int, int] | None:
    """The process that was making the attachment."""
    found = re.fullmatch(r"(\d+)\.(\d+)", tags.get(MAKER, ""))
    return (int(found[1]), int(found[2])) if found else None
