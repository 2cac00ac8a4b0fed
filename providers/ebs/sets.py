"""What EC2 lists, as members of sets. Must know no call.

A member is one EBS snapshot, or, where a file system lies on several volumes, one of each: whole, or no image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from providers.ebs import tags
from snapshotter.core.labels import merge_marks
from snapshotter.core.model import Birth, ImageState, Snapshot, compact_time
from snapshotter.core.remote import operation_id
from snapshotter.host.cloud import joined, parts


def snapshots(items: Iterable[Mapping[str, Any]], region: str) -> Iterator[Snapshot]:
    """The members that these EBS snapshots of a region are, each once, in the order in which the first of each came."""
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
        others = [other for k, other in enumerate(birth.members) if (birth.set_id, k) not in members]
        missing = [other.volume for other in others if other.provider == tags.NAME]
        yield _member(birth, have, region, missing)


def _member(birth: Birth, have: Mapping[str, Mapping[str, Any]], region: str, missing: Sequence[str]) -> Snapshot:
    """`missing`: the set's members that aren't listed. A copy in the making waits for them, and for its own parts.

    What is archived has no image until it is brought back, which nobody but a person does: it is invalid, not pending,
    so that it isn't waited for, and its set can be let go by the policy.
    """
    wanted = parts(birth.members[birth.member].volume)
    items = [have[volume] for volume in wanted if volume in have]
    gone = [volume for volume in wanted if volume not in have]
    labels = [tags.read(item) for item in items]
    waits = [*gone, *missing] if any(tags.in_the_making(each) for each in labels) else []
    why = "" if waits else ", ".join(f"the snapshot of {volume} is gone" for volume in gone)
    if archived := [str(item["SnapshotId"]) for item in items if is_archived(item)]:
        why = f"{', '.join(archived)} is archived: {unarchive(archived[0])}"
    for item in items:
        if item.get("State") == "error":
            why = f"EC2 could not copy it: {item.get('StateMessage') or 'no reason given'}"
    done = all(item.get("State") == "completed" for item in items)
    unmarked = any(map(_is_unmarked, labels))
    ready = done and not waits and not unmarked
    state = ImageState.INVALID if why else ImageState.READY if ready else ImageState.PENDING
    if waits and not why:
        why = f"the copy of {', '.join(waits)} isn't there yet"
    elif unmarked and not why:
        why = f"its marks aren't there yet: a tick where {tags.copy_of(labels[0])}'s sets are taken brings them"
    sizes = [int(item["FullSnapshotSizeInBytes"]) for item in items if item.get("FullSnapshotSizeInBytes") is not None]
    return Snapshot(
        provider=tags.NAME,
        id=joined(str(item["SnapshotId"]) for item in items),
        birth=birth,
        state=state,
        marks=merge_marks([_marks_of(each, birth) for each in labels]),
        size_bytes=sum(sizes) if len(sizes) == len(items) else None,
        order=max(_order(birth, item) for item in items),
        why=why,
        replicas=tuple(sorted(set.intersection(*(set(tags.copied(each)) for each in labels)))),
        copying=tuple(sorted({other for each in labels for other in tags.uncopied(each, region)})),
        replica_of=tags.copy_of(labels[0]),
    )


def _is_unmarked(labels: Mapping[str, str]) -> bool:
    """A copy in the making by an earlier version: it gave the marks only once all was there."""
    return tags.in_the_making(labels) and not tags.marks_of(labels)


def _marks_of(labels: Mapping[str, str], birth: Birth) -> dict[str, str]:
    """Only what was sealed is copied: without its marks a copy isn't a leftover for reap. One that lost its seal alone
    is: its deletion was begun."""
    return {"sealed": compact_time(birth.taken_at)} if _is_unmarked(labels) else tags.marks_of(labels)


def made_for(item: Mapping[str, Any], set_id: str) -> bool:
    """Whether we made this EBS snapshot for the set. Its tags alone don't say so: other tools copy a volume's or
    a snapshot's. What isn't a member's was made by the same call, of a volume that was attached meanwhile."""
    labels = tags.read(item)
    if labels.get(tags.SET) != set_id or labels.get(tags.MANAGED) != "true":
        return False
    if tags.birth_of(labels, tags.origin_of(item)) is not None:
        return True
    return labels.get(tags.OPERATION) == operation_id("create", set_id)


def is_archived(item: Mapping[str, Any]) -> bool:
    """In the archive: EC2 makes no volume of it, and calls it completed all the same."""
    return item.get("StorageTier") == "archive"


def unarchive(name: str) -> str:
    """The command that brings it back, in up to three days."""
    return f"aws ec2 restore-snapshot-tier --permanent-restore --snapshot-id {name}"


def _order(birth: Birth, item: Mapping[str, Any]) -> int:
    """EC2's own time. A copy's is that of its copying: the newest copy needn't be of the newest set."""
    moment = birth.taken_at if tags.SOURCE in tags.read(item) else item["StartTime"]
    return int(moment.timestamp() * 1000)
