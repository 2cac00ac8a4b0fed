"""What EC2 lists, as members of sets. Must know no call.

A member is one EBS snapshot, or, where a file system lies on several volumes, one of each: whole, or no image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from providers.ebs import tags
from snapshotter.core.labels import merge_marks
from snapshotter.core.model import Birth, ImageState, Snapshot
from snapshotter.host.cloud import joined, parts


def snapshots(items: Iterable[Mapping[str, Any]]) -> Iterator[Snapshot]:
    """The members that these EBS snapshots are, each once, in the order in which the first of each came."""
    members: dict[tuple[str, int], tuple[Birth, dict[str, Mapping[str, Any]]]] = {}
    for item in items:
        volume = tags.origin_of(item)
        birth = tags.birth_of(tags.read(item), volume)
        if birth is None:
            continue
        have = members.setdefault((birth.set_id, birth.member), (birth, {}))[1]
        # Of two copies of one (two hosts advanced at once) the one that can be restored counts.
        if volume not in have or have[volume].get("State") == "error":
            have[volume] = item
    for birth, have in members.values():
        yield _member(birth, have)


def _member(birth: Birth, have: Mapping[str, Mapping[str, Any]]) -> Snapshot:
    wanted = parts(birth.members[birth.member].volume)
    items = [have[volume] for volume in wanted if volume in have]
    why = ", ".join(f"the snapshot of {volume} is gone" for volume in wanted if volume not in have)
    for item in items:
        if item.get("State") == "error":
            why = f"EC2 could not copy it: {item.get('StateMessage') or 'no reason given'}"
    done = all(item.get("State") == "completed" for item in items)
    state = ImageState.INVALID if why else ImageState.READY if done else ImageState.PENDING
    labels = [tags.read(item) for item in items]
    sizes = [int(item["FullSnapshotSizeInBytes"]) for item in items if item.get("FullSnapshotSizeInBytes") is not None]
    return Snapshot(
        provider=tags.NAME,
        id=joined(str(item["SnapshotId"]) for item in items),
        birth=birth,
        state=state,
        marks=merge_marks([tags.marks_of(each) for each in labels]),
        size_bytes=sum(sizes) if len(sizes) == len(items) else None,
        order=max(_order(birth, item) for item in items),
        why=why,
        replicas=tuple(sorted(set.intersection(*(set(tags.copied(each)) for each in labels)))),
        copying=tuple(sorted({region for each in labels for region in tags.uncopied(each)})),
        replica_of=tags.copy_of(labels[0]),
    )


def _order(birth: Birth, item: Mapping[str, Any]) -> int:
    """EC2's own time. A copy's is that of its copying: the newest copy needn't be of the newest set."""
    moment = birth.taken_at if tags.SOURCE in tags.read(item) else item["StartTime"]
    return int(moment.timestamp() * 1000)
