"""Snapshots: made of disks and of instant snapshots, looked at, labelled, deleted."""

from __future__ import annotations

import re
from collections.abc import Iterable

from google.cloud import compute_v1

from tests.twins.gce.actions import disks
from tests.twins.gce.actions.call import Call, Failed, action, set_labels
from tests.twins.gce.wire import Message, Refusal, invalid
from tests.twins.gce.world import Disk, Instant, Snapshot, World, region_of, stamp

_OF_DISK = r'\(?sourceDisk="[^"*]+"\)?'
_MULTI_REGIONS = {"eu", "us", "asia"}


def message(world: World, snapshot: Snapshot) -> Message:
    status = world.snapshot_status(snapshot)
    there = status == "READY"
    found: Message = compute_v1.Snapshot(
        id=int(snapshot.id),
        kind="compute#snapshot",
        name=snapshot.name,
        self_link=world.link(snapshot.path),
        creation_timestamp=stamp(snapshot.born),
        description=snapshot.description,
        status=status,
        labels=snapshot.labels,
        label_fingerprint=snapshot.fingerprint,
        source_disk=world.link(snapshot.source),
        source_disk_id=snapshot.source_id,
        disk_size_gb=snapshot.size,
        storage_bytes=(snapshot.size << 30) // 2 if there else 0,
        storage_bytes_status="UP_TO_DATE" if there else "UPDATING",
        storage_locations=snapshot.locations,
        snapshot_type=snapshot.kind,
    )
    if snapshot.instant:
        found.source_instant_snapshot = world.link(snapshot.instant)
        found.source_instant_snapshot_id = snapshot.instant_id
    if snapshot.key:
        found.snapshot_encryption_key = {"kms_key_name": f"{snapshot.key}/cryptoKeyVersions/1"}
    return found


def _existing(call: Call, permission: str, name: str) -> Snapshot:
    path = f"global/snapshots/{name}"
    call.demand(f"snapshots.{permission}", path)
    return call.world.find(call.world.snapshots, name, path)


@action("snapshots.get")
def get(call: Call) -> Message:
    return message(call.world, _existing(call, "get", call.request.snapshot))


@action("snapshots.list")
def listed(call: Call) -> Message:
    call.demand("snapshots.list")
    return call.page(_narrowed(call), message, compute_v1.SnapshotList())


def _narrowed(call: Call) -> Iterable[Snapshot]:
    """What a fleet asks each node by comes first: to put thousands into words each time would be the twin's time, not
    Compute Engine's."""
    found, text = call.world.snapshots.values(), call.request.filter if "filter" in call.request else ""
    if re.fullmatch(rf"{_OF_DISK}(?: OR {_OF_DISK})*", text):
        sources = {call.world.path(link) for link in re.findall(r'"([^"]+)"', text)}
        return [each for each in found if each.source in sources]
    if label := re.fullmatch(r'labels\.([-_a-z0-9]+)="([-_a-z0-9]+)"', text):
        return [each for each in found if each.labels.get(label[1]) == label[2]]
    return found


@action("snapshots.insert")
def insert(call: Call) -> Message:
    world, asked = call.world, call.request.snapshot_resource
    if bool(asked.source_disk) is bool(asked.source_instant_snapshot):
        raise invalid("resource.sourceDisk", asked.source_disk, "One of a disk and an instant snapshot is wanted.")
    if asked.source_disk:
        path = world.path(asked.source_disk, "resource.sourceDisk")
        call.demand("disks.createSnapshot", path)
        return _made(call, asked, world.find(world.disks, path, path), None)
    path = world.path(asked.source_instant_snapshot, "resource.sourceInstantSnapshot")
    call.demand("instantSnapshots.useReadOnly", path)
    instant = world.find(world.instants, path, path)
    if world.clock.now() < instant.ready:
        raise Refusal("resourceNotReady", f"The resource '{world.full(path)}' is not ready")
    return _made(call, asked, world.find(world.disks, instant.source, instant.source), instant)


@action("disks.createSnapshot", "regionDisks.createSnapshot")
def create(call: Call) -> Message:
    """As `insert`; the operation is one of the disk's place."""
    return _made(call, call.request.snapshot_resource, disks.existing(call, "createSnapshot"), None, call.place)


def _made(call: Call, asked: Message, disk: Disk, instant: Instant | None, place: str = "") -> Message:
    world, now = call.world, call.world.clock.now()
    path = call.new("snapshots", world.snapshots, asked.name, asked.labels, "global")
    if world.disk_status(disk) != "READY":
        raise Refusal("resourceNotReady", f"The resource '{world.full(disk.path)}' is not ready")
    where, _, name = disk.place.partition("/")
    home = name if where == "regions" else region_of(name)
    locations = list(asked.storage_locations) or [home]
    if len(locations) > 1 or locations[0] not in {*world.regions, *_MULTI_REGIONS}:
        raise invalid("resource.storageLocations", locations, "One region, or one multi-region, is wanted.")
    if asked.snapshot_type not in ("", "STANDARD", "ARCHIVE"):
        raise invalid("resource.snapshotType", asked.snapshot_type, "It is STANDARD or ARCHIVE.")
    key = call.usable_key(asked.snapshot_encryption_key.kms_key_name or disk.key)
    fixed = now + (0 if instant else world.limits.capture_s)
    snapshot = Snapshot(
        path=path,
        born=now,
        description=asked.description,
        labels=dict(asked.labels),
        source=disk.path,
        source_id=disk.id,
        size=instant.size if instant else disk.size,
        fixed=fixed,
        done=fixed + world.limits.upload_s,
        instant=instant.path if instant else "",
        instant_id=instant.id if instant else "",
        key=key,
        kind=asked.snapshot_type or "STANDARD",
        locations=locations,
        failed=call.fault is not None and call.fault.kind == "upload",
    )

    def shoot() -> None:
        if instant and world.bytes and (image := world.image(instant)):
            world.bytes.copy(image, snapshot.bytes)
        elif not instant:
            world.shoot([disk], [snapshot])

    def effect() -> None:
        if world.limits.snapshots is not None and len(world.snapshots) >= world.limits.snapshots:
            raise Failed("QUOTA_EXCEEDED", f"Quota 'SNAPSHOTS' exceeded.  Limit: {world.limits.snapshots}.0 globally.")
        what = f"snapshot of {disk.path}"
        if world.too_often(what, world.limits.hourly, world.limits.spacing_s):
            raise disks.too_frequent(world, disk)
        world.happened.setdefault(what, []).append(now)
        world.snapshots[snapshot.name] = snapshot
        world.later(fixed, shoot)

    ends = max(snapshot.done if world.limits.done_when_uploaded else fixed, now + world.limits.operate_s)
    kind = "createSnapshot" if place else "insert"
    vanish = lambda: world.drop(world.snapshots, snapshot.name)  # noqa: E731
    return call.begin(kind, snapshot, effect, ends=ends, vanish=vanish, place=place)


@action("snapshots.delete")
def delete(call: Call) -> Message:
    world, snapshot = call.world, _existing(call, "delete", call.request.snapshot)
    if world.snapshot_status(snapshot) == "CREATING":
        raise Refusal("resourceNotReady", f"The resource '{world.full(snapshot.path)}' is not ready")
    for disk in world.disks.values():
        if disk.snapshot_id == snapshot.id and world.disk_status(disk) == "RESTORING":
            raise disks.in_use(world, snapshot.path, disk.path)

    def effect() -> None:
        snapshot.leaving = True
        gone = world.clock.now() + world.limits.operate_s
        world.later(gone, lambda: world.drop(world.snapshots, snapshot.name))

    return call.begin("delete", snapshot, effect)


@action("snapshots.setLabels")
def labels(call: Call) -> Message:
    snapshot = _existing(call, "setLabels", call.request.resource)
    return set_labels(call, snapshot, call.request.global_set_labels_request_resource)
