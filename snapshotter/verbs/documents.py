"""The JSON documents of the command line, schema 1: one function per object. Unknown is null, never absent."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from snapshotter.core.labels import unpack_hash
from snapshotter.core.model import Attachment, SnapshotSet

SCHEMA = 1


def when(moment: datetime) -> str:
    """`2026-11-22T10:06:30Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def attachment_document(attachments: list[Attachment]) -> dict[str, Any]:
    """One attachment, which may span several members: its path is that of the data path."""
    top = min(attachments, key=lambda attachment: attachment.member)
    return {
        "id": top.id,
        "path": top.path or None,
        "access": str(top.access),
        "purpose": str(top.purpose),
        "since": when(top.since) if top.since else None,
    }


def grouped(attachments: tuple[Attachment, ...]) -> list[list[Attachment]]:
    """The parts of each attachment id together."""
    by_id: dict[str, list[Attachment]] = {}
    for attachment in attachments:
        by_id.setdefault(attachment.id, []).append(attachment)
    return list(by_id.values())


def set_document(found: SnapshotSet) -> dict[str, Any]:
    """The set object of the contract."""
    birth, marks = found.birth, found.marks
    return {
        "set_id": found.set_id,
        "target": birth.target,
        "node": birth.node,
        "host": birth.host,
        "path": birth.path if birth.paths_known else None,
        "taken_at": when(birth.taken_at),
        "state": str(found.state),
        "why": found.why or None,
        "grade": str(found.grade) if found.grade else None,
        "good": found.good,
        "quiesce": marks.get("quiesce"),
        "freeze_ms": _whole(marks.get("freeze-ms")),
        "skew_ms": _whole(marks.get("skew-ms")),
        "height": _whole(marks.get("height")),
        "block": unpack_hash(marks.get("block", "")),
        "size_bytes": found.size_bytes,
        "pinned": found.pinned,
        "verify_level": _whole(marks.get("verify-level")),
        "verify_at": marks.get("verify-at"),
        "verify_outcome": marks.get("verify-outcome"),
        "secrets": _whole(marks.get("secrets")),
        "snapshots": [
            {"provider": member.provider, "id": member.id, "volume": member.volume, "state": str(member.state)}
            for member in found.snapshots
        ],
        "roots": [
            {"volume": birth.members[root.member].volume, "origin": root.path, "path": root.inside}
            for root in birth.roots
        ],
        "replicas": found.replicas,
        "replica_of": found.replica_of or None,
        "attachments": [attachment_document(parts) for parts in grouped(found.attachments)],
    }
