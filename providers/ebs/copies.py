"""Copies of sets to other regions, made by EC2 in its own time. Must know no policy, and wait for no upload.

Everything that is known of a copy is in tags, so whoever asks next goes on: the source says where it is to be copied,
what was begun, and where it is whole; a copy says what it is a copy of, as EC2 gives it a VolumeId that means nothing.
Only sealed sets are copied, and a copy is born with its source's marks: in its region it is a set of its own, pending
until all of it is there, that can be restored and deleted also where the source and its region are lost. While the
source is there it sees to it that the copy gets whole, and what is there of one that isn't goes with it (`drop`). From
then on nothing here deletes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from providers.ebs import sets, tags, volumes
from providers.ebs.api import Api
from snapshotter.core.errors import BusyError, NotFoundError, SnapshotterError, StorageError
from snapshotter.core.remote import Deadline, Late, Lost, operation_id
from snapshotter.host.cloud import parts

#: EC2 has no more copies under way into a region than this; it says so, and the next run goes on.
_FULL = ("ResourceLimitExceeded", "ConcurrentSnapshotLimitExceeded", "ConcurrentCopyLimitExceeded")


def advance(api: Api, region: str, in_region: Callable[[str], Api]) -> list[str]:
    """Begin what isn't begun, note what is whole; returns what was done. `region` is where the sets were taken. One
    set's failure stops no other: the first of them is raised at the end. A region that doesn't answer, or takes no
    more, is left to the next run: each of its sets would wait as long."""
    done: list[str] = []
    failed: SnapshotterError | None = None
    over: set[str] = set()
    for set_id, source in _wanted(api, region):
        for other in tags.uncopied(tags.read(source[0]), region):
            if other in over:
                continue
            try:
                done += _copy(api, region, in_region(other), other, set_id, source)
            except SnapshotterError as error:
                full = volumes.code_of(error) in _FULL
                if full or isinstance(error, Late):
                    over.add(other)
                if not full:
                    failed = failed or error
    if failed is not None:
        raise failed
    return done


def begun(source: Sequence[Mapping[str, Any]]) -> list[str]:
    """Regions where a set's copies may be in the making: it is tagged so before the first is asked for."""
    return sorted({key.removeprefix(tags.COPYING) for item in source for key in tags.read(item)
                   if key.startswith(tags.COPYING)})  # fmt: skip


def drop(api: Api, region: str, there: Api, other: str, set_id: str, source: Sequence[Mapping[str, Any]]) -> None:
    """Remove a set's copies in the making in another region, before the set itself goes. Raises BusyError where one was
    asked for a moment ago and isn't listed yet. A copy all of which is there stays, though no `advance` has noted it
    yet: it is listed as good, so the set may have been let go for its sake."""
    within = there.deadline(f"{set_id} in {other}")
    filters = [{"Name": f"tag:{tags.SET}", "Values": [set_id]}, {"Name": "tag-key", "Values": [tags.SOURCE]}]
    listed = there.pages("describe_snapshots", "Snapshots", within, OwnerIds=["self"], Filters=filters)
    found = {
        str(item["SnapshotId"]): item
        for item in there.memory.over(listed, "SnapshotId", "snap-")
        if (labels := tags.read(item)).get(tags.SET) == set_id
        and labels.get(tags.MANAGED) == "true"
        and tags.copy_of(labels) == region
    }
    copied = {tags.read(item)[tags.SOURCE].partition("/")[2] for item in found.values()}
    for item in source:
        if str(item["SnapshotId"]) not in copied and _begun_lately(api, item, other):
            raise BusyError(f"is being copied to {other}", object=set_id, cure="try again in a minute")
    making = {name for name, item in found.items() if tags.in_the_making(tags.read(item))}
    one_each = {tags.origin_of(item): name for name, item in found.items() if _is_done(item)}
    if _is_whole([found[name] for name in one_each.values()]) and (done := making.intersection(one_each.values())):
        volumes.tag(there, sorted(done), {tags.WHOLE: "true"})
        making -= done
    for name in sorted(making):
        with suppress(NotFoundError):
            there.call("delete_snapshot", within, SnapshotId=name)
        there.memory.deleted(name)


def _wanted(api: Api, region: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(set id, its snapshots) of every whole, sealed set that is to be copied somewhere and isn't yet. One in the
    archive isn't offered: EC2 would refuse it each time."""
    filters = [{"Name": "tag-key", "Values": [tags.COPY_TO]}, {"Name": "status", "Values": ["completed"]}]
    within = api.deadline("the sets to be copied")
    listed = api.pages("describe_snapshots", "Snapshots", within, OwnerIds=["self"], Filters=filters)
    ours = [item for item in api.memory.over(listed, "SnapshotId", "snap-") if tags.read(item).get(tags.COPY_TO)]
    ours.sort(key=lambda item: tags.read(item).get(tags.SET, ""))
    for set_id, group in groupby(ours, key=lambda item: tags.read(item).get(tags.SET, "")):
        source = list(group)
        archived = any(sets.is_archived(item) for item in source)
        if _is_whole(source) and not archived and tags.uncopied(tags.read(source[0]), region):
            yield set_id, source


def _is_done(item: Mapping[str, Any]) -> bool:
    return item.get("State") == "completed" and "sealed" in tags.marks_of(tags.read(item))


def _is_whole(items: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these snapshots of one set are all of it, sealed, and EC2 has done each."""
    births = [tags.birth_of(tags.read(item), tags.origin_of(item)) for item in items]
    first = next((birth for birth in births if birth is not None), None)
    if first is None:
        return False
    theirs = [member.volume for member in first.members if member.provider == tags.NAME]
    wanted = {part for volume in theirs for part in parts(volume)}
    return all(map(_is_done, items)) and {tags.origin_of(item) for item in items} == wanted


def _copy(api: Api, region: str, there: Api, other: str, set_id: str, source: Sequence[dict[str, Any]]) -> list[str]:
    within = there.deadline(f"{set_id} in {other}")
    found, pending = _copies(there, set_id, within)
    done = []
    for item in source:
        name = str(item["SnapshotId"])
        copies = sorted(found.get(name, []))
        for twice in copies[1:]:  # two ran at once
            there.call("delete_snapshot", within, SnapshotId=twice)
            there.memory.deleted(twice)
        if copies or _begun_lately(api, item, other):
            continue
        volumes.tag(api, [name], {tags.COPYING + other: str(int(api.clock.wall()))})
        done.append(_begin(region, there, other, item, within))
    if done or pending or any(str(item["SnapshotId"]) not in found for item in source):
        return done
    marks = {key: value for key, value in tags.read(source[0]).items() if key.startswith(tags.mark(""))}
    copied = [sorted(found[str(item["SnapshotId"])])[0] for item in source]
    volumes.tag(there, copied, {**marks, tags.WHOLE: "true"})
    names = [str(item["SnapshotId"]) for item in source]
    volumes.tag(api, names, {tags.COPIED + other: "true", tags.COPYING + other: None})
    return [f"{set_id} to {other}"]


def _copies(there: Api, set_id: str, within: Deadline) -> tuple[dict[str, list[str]], bool]:
    """source snapshot -> its copies there; and whether any of them is still under way. Raises StorageError where some
    failed: they are removed, as they would count for ever, and the next run makes them again."""
    filters = [{"Name": f"tag:{tags.SET}", "Values": [set_id]}, {"Name": "tag-key", "Values": [tags.SOURCE]}]
    found: dict[str, list[str]] = {}
    pending, failed = False, ""
    listed = there.pages("describe_snapshots", "Snapshots", within, OwnerIds=["self"], Filters=filters)
    for item in there.memory.over(listed, "SnapshotId", "snap-"):
        labels = tags.read(item)
        if labels.get(tags.SET) != set_id or tags.SOURCE not in labels:
            continue
        if item.get("State") == "error":
            there.call("delete_snapshot", within, SnapshotId=item["SnapshotId"])
            there.memory.deleted(str(item["SnapshotId"]))
            failed = str(item.get("StateMessage") or "no reason given")
            continue
        found.setdefault(labels[tags.SOURCE].partition("/")[2], []).append(str(item["SnapshotId"]))
        pending = pending or item.get("State") != "completed"
    if failed:
        cure = "if it fails each time: may the key there be used? docs/aws.md"
        raise StorageError(f"EC2 could not copy it, and is asked again: {failed}", object=within.what, cure=cure)
    return found, pending


def _begun_lately(api: Api, item: Mapping[str, Any], other: str) -> bool:
    """A copy that EC2 may not list yet: of a run that was killed, or is under way elsewhere."""
    at = tags.read(item).get(tags.COPYING + other, "")
    return at.isdigit() and api.clock.wall() - int(at) < 2 * volumes.SETTLE_S


def _begin(region: str, there: Api, other: str, item: Mapping[str, Any], within: Deadline) -> str:
    name, labels = str(item["SnapshotId"]), tags.read(item)
    birth = tags.birth_of(labels, str(item["VolumeId"]))
    assert birth is not None
    given = tags.of_copy(labels, f"{region}/{name}", tags.origin_of(item), operation_id("copy", name, other))
    try:
        made = there.call(
            "copy_snapshot",
            within,
            again=False,
            SourceRegion=region,
            SourceSnapshotId=name,
            Encrypted=True,
            Description=f"snapshotter: {birth.node}, {birth.set_id}, of {region}",
            TagSpecifications=[{"ResourceType": "snapshot", "Tags": tags.as_tags(given)}],
        )
    except Lost as error:
        raise StorageError(
            f"EC2 gave no answer ({error}), and it isn't known whether it copies it to {other}",
            object=name,
            cure="the next run sees",
        ) from None
    seen = {"VolumeId": "", "State": "pending", "StartTime": datetime.now(UTC), "Tags": tags.as_tags(given)}
    there.memory.made(str(made["SnapshotId"]), {**made, **seen})
    return f"{name} to {other}"
