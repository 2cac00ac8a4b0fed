"""What Compute Engine lists, as members of sets. Must know no call.

A member is one snapshot, or, where a file system lies on several disks, one of each: whole, or no image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from providers.gce import labels
from providers.gce.names import NAME, member_names, milliseconds
from snapshotter.core.labels import merge_marks
from snapshotter.core.model import Birth, ImageState, Snapshot
from snapshotter.host.cloud import joined, parts


def snapshots(items: Iterable[Any]) -> Iterator[Snapshot]:
    """The members that these snapshots are, each once, in the order in which the first of each came."""
    members: dict[tuple[str, int], tuple[Birth, dict[str, Any]]] = {}
    for item in items:
        if (birth := labels.birth_of(item)) is not None:
            members.setdefault((birth.set_id, birth.member), (birth, {}))[1][item.name] = item
    for birth, have in members.values():
        yield _member(birth, have)


def _member(birth: Birth, have: dict[str, Any]) -> Snapshot:
    volume = birth.members[birth.member].volume
    named = member_names(birth.set_id, birth.member, volume)
    items = [have[name] for name in named if name in have]
    gone = [disk for disk, name in zip(parts(volume), named, strict=True) if name not in have]
    why = ", ".join(f"the snapshot of {disk} is gone" for disk in gone)
    if any(item.status == "FAILED" for item in items):
        why = "Compute Engine could not copy it"
    done = all(item.status == "READY" for item in items)
    sizes = [int(item.storage_bytes) for item in items if item.storage_bytes]
    return Snapshot(
        provider=NAME,
        id=joined(str(item.name) for item in items),
        birth=birth,
        state=ImageState.INVALID if why else ImageState.READY if done else ImageState.PENDING,
        marks=merge_marks([labels.marks_of(item.labels) for item in items]),
        size_bytes=sum(sizes) if len(sizes) == len(items) else None,
        order=max(milliseconds(item.creation_timestamp) if item.creation_timestamp else 0 for item in items),
        why=why,
    )
