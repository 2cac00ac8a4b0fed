"""Disks of a zone and of a region, made empty, of snapshots and of instant ones; cloned by the group; deleted."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

from google.cloud import compute_v1

from tests.twins.gce.actions.call import Call, Failed, action, set_labels
from tests.twins.gce.wire import Message, Refusal, invalid
from tests.twins.gce.world import Disk, Instant, Resource, Snapshot, World, region_of, stamp

_TYPES = {
    "zones": {
        "pd-standard",
        "pd-balanced",
        "pd-ssd",
        "pd-extreme",
        "hyperdisk-balanced",
        "hyperdisk-extreme",
        "hyperdisk-throughput",
        "hyperdisk-ml",
    },
    "regions": {"pd-standard", "pd-balanced", "pd-ssd", "hyperdisk-balanced-high-availability"},
}


def message(world: World, disk: Disk) -> Message:
    where, name = disk.place.split("/")
    found: Message = compute_v1.Disk(
        id=int(disk.id),
        kind="compute#disk",
        name=disk.name,
        self_link=world.link(disk.path),
        creation_timestamp=stamp(disk.born),
        description=disk.description,
        size_gb=disk.size,
        physical_block_size_bytes=4096,
        status=world.disk_status(disk),
        type_=world.link(f"{disk.place}/diskTypes/{disk.type}"),
        labels=disk.labels,
        label_fingerprint=disk.fingerprint,
        users=[world.link(user) for user in disk.users],
        resource_policies=[world.link(policy) for policy in disk.resource_policies],
        replica_zones=[world.link(f"zones/{zone}") for zone in disk.replica_zones],
        **{where.rstrip("s"): world.link(f"{where}/{name}")},
    )
    if disk.snapshot:
        kind = "source_instant_snapshot" if "instantSnapshots" in disk.snapshot else "source_snapshot"
        setattr(found, kind, world.link(disk.snapshot))
        setattr(found, f"{kind}_id", disk.snapshot_id)
    for amount in ("provisioned_iops", "provisioned_throughput", "access_mode", "storage_pool"):
        if getattr(disk, amount):
            setattr(found, amount, getattr(disk, amount))
    if disk.key:
        found.disk_encryption_key = {"kms_key_name": f"{disk.key}/cryptoKeyVersions/1"}
    return found


def _found(call: Call) -> Disk:
    name = call.request.disk if "disk" in type(call.request).meta.fields else call.request.resource
    path = f"{call.place}/disks/{name}"
    return call.world.find(call.world.disks, path, path)


def existing(call: Call, permission: str) -> Disk:
    """What the call names, if it may do that to it; Compute Engine says so first of all."""
    name = call.request.disk if "disk" in type(call.request).meta.fields else call.request.resource
    call.demand(f"disks.{permission}", f"{call.place}/disks/{name}")
    return _found(call)


@action("disks.get", "regionDisks.get")
def get(call: Call) -> Message:
    return message(call.world, existing(call, "get"))


@action("disks.list", "regionDisks.list")
def listed(call: Call) -> Message:
    call.demand("disks.list")
    found = [each for each in call.world.disks.values() if each.place == call.place]
    return call.page(found, message, compute_v1.DiskList())


@action("disks.aggregatedList")
def aggregated(call: Call) -> Message:
    call.demand("disks.list")
    return call.page(call.world.disks.values(), message, compute_v1.DiskAggregatedList())


def source_of(call: Call, asked: Message) -> Snapshot | Instant | None:
    """What a new disk is to be made of. Raises Refusal if it may not, or not now."""
    world = call.world
    found: Snapshot | Instant
    if asked.source_snapshot:
        path = world.path(asked.source_snapshot, "resource.sourceSnapshot")
        call.demand("snapshots.useReadOnly", path)
        found = world.find(world.snapshots, path.removeprefix("global/snapshots/"), path)
        ready = world.snapshot_status(found) == "READY"
    elif asked.source_instant_snapshot:
        path = world.path(asked.source_instant_snapshot, "resource.sourceInstantSnapshot")
        call.demand("instantSnapshots.useReadOnly", path)
        found = world.find(world.instants, path, path)
        if found.place != call.place:
            raise invalid("resource.sourceInstantSnapshot", path, "It is in another place.")
        ready = world.clock.now() >= found.ready
    else:
        return None
    if not ready:
        raise Refusal("resourceNotReady", f"The resource '{world.full(path)}' is not ready")
    return found


def _type(call: Call, asked: Message) -> str:
    if not asked.type_:
        return "pd-standard"
    path = call.world.path(asked.type_, "resource.type")
    place, _, name = path.partition("/diskTypes/")
    if place != call.place or name not in _TYPES[place.partition("/")[0]]:
        raise invalid("resource.type", asked.type_, "There is no such type of disk here.")
    for amount in ("provisioned_iops", "provisioned_throughput"):
        if getattr(asked, amount) and not (name.startswith("hyperdisk") or name == "pd-extreme"):
            raise invalid(f"resource.{amount}", getattr(asked, amount), f"A {name} has no such thing.")
    return name


def _pool(call: Call, asked: Message) -> str:
    """A storage pool of the disk's zone."""
    if not asked.storage_pool:
        return ""
    path = call.world.path(asked.storage_pool, "resource.storagePool")
    call.demand("storagePools.use", path)
    if path.partition("/storagePools/")[0] != call.place or not _type(call, asked).startswith("hyperdisk"):
        raise invalid("resource.storagePool", asked.storage_pool, "It takes Hyperdisks of its own zone.")
    return call.world.link(path)


def _replicas(call: Call, asked: Message) -> list[str]:
    zones = [call.world.path(zone, "resource.replicaZones").removeprefix("zones/") for zone in asked.replica_zones]
    region = call.place.removeprefix("regions/") if call.place.startswith("regions/") else ""
    fits = len(set(zones)) == 2 and all(zone in call.world.zones and region_of(zone) == region for zone in zones)
    if bool(region) is not fits or (zones and not region):
        raise invalid("resource.replicaZones", zones, "A regional disk has two zones of its region, another none.")
    return zones


@action("disks.insert", "regionDisks.insert")
def insert(call: Call) -> Message:
    world, asked = call.world, call.request.disk_resource
    path = call.new("disks", world.disks, asked.name, asked.labels)
    kind, zones, source = _type(call, asked), _replicas(call, asked), source_of(call, asked)
    size = asked.size_gb or (source.size if source else 0)
    if not size or (source and size < source.size):
        least = source.size if source else 1
        raise invalid(
            "resource.sizeGb", size, f"Requested disk size cannot be smaller than the snapshot size ({least} GB)"
        )
    disk = Disk(
        path=path,
        born=world.clock.now(),
        description=asked.description,
        labels=dict(asked.labels),
        size=size,
        type=kind,
        replica_zones=zones,
        resource_policies=[policy(call, link, "use") for link in asked.resource_policies],
        key=call.usable_key(asked.disk_encryption_key.kms_key_name),
        provisioned_iops=asked.provisioned_iops,
        provisioned_throughput=asked.provisioned_throughput,
        access_mode=asked.access_mode,
        storage_pool=_pool(call, asked),
    )
    return _made(call, disk, source)


def _made(call: Call, disk: Disk, source: Snapshot | Instant | None) -> Message:
    world, now = call.world, call.world.clock.now()
    disk.ready = now + world.limits.create_s
    disk.snapshot, disk.snapshot_id = (source.path, source.id) if source else ("", "")

    def effect() -> None:
        used = sum(each.size for each in world.disks.values())
        if world.limits.disks_gib is not None and used + disk.size > world.limits.disks_gib:
            most = world.limits.disks_gib
            raise Failed("QUOTA_EXCEEDED", f"Quota 'DISKS_TOTAL_GB' exceeded.  Limit: {most}.0 in region.")
        if source is not None:
            _not_too_often(world, source)
        world.disks[disk.path] = disk
        if world.bytes:
            world.bytes.make(disk.bytes, disk.size, world.image(source))

    return call.begin(
        "insert",
        disk,
        effect,
        ends=max(disk.ready, now + world.limits.operate_s),
        vanish=lambda: world.drop(world.disks, disk.path),
    )


def _not_too_often(world: World, source: Resource) -> None:
    what = f"disk of {source.path}"
    if world.too_often(what, world.limits.hourly, world.limits.spacing_s):
        raise too_frequent(world, source)
    world.happened.setdefault(what, []).append(world.clock.now())


def too_frequent(world: World, source: Resource) -> Failed:
    return Failed(
        "RESOURCE_OPERATION_RATE_EXCEEDED",
        f"Operation rate exceeded for resource '{world.full(source.path)}'. Too frequent operations from the source "
        "resource.",
    )


@action("disks.delete", "regionDisks.delete")
def delete(call: Call) -> Message:
    world, disk = call.world, existing(call, "delete")
    if disk.users:
        raise in_use(world, disk.path, disk.users[0])

    def effect() -> None:
        disk.leaving = True
        world.later(world.clock.now() + world.limits.operate_s, lambda: world.drop(world.disks, disk.path))

    return call.begin("delete", disk, effect)


def in_use(world: World, path: str, user: str) -> Refusal:
    return Refusal(
        "resourceInUseByAnotherResource",
        f"The {path.split('/')[-2].rstrip('s')} resource '{world.full(path)}' is already being used by "
        f"'{world.full(user)}'",
    )


@action("disks.setLabels", "regionDisks.setLabels")
def labels(call: Call) -> Message:
    kind = "zone" if call.place.startswith("zones/") else "region"
    given = getattr(call.request, f"{kind}_set_labels_request_resource")
    return set_labels(call, existing(call, "setLabels"), given)


# -- policies and groups ------------------------------------------------------------------------------------------


def policy(call: Call, link: str, permission: str) -> str:
    """The path of a resource policy that a disk is to have. Raises Refusal."""
    path = call.world.path(link, "resourcePolicies")
    call.demand(f"resourcePolicies.{permission}", path)
    call.world.find(call.world.policies, path, path)
    region = call.place.split("/")[1] if call.place.startswith("regions/") else region_of(call.place.split("/")[1])
    if not path.startswith(f"regions/{region}/"):
        raise invalid("resourcePolicies", path, "The policy is in another region than the disk.")
    return path


def _changed(call: Call, permission: str, change: Callable[[Disk, list[str]], list[str]]) -> Message:
    disk = existing(call, permission)
    word = re.sub(r"(?<!^)(?=[A-Z])", "_", permission).lower().removesuffix("_resource_policies")
    kind = "disks" if call.action.startswith("disks") else "region_disks"
    asked = getattr(call.request, f"{kind}_{word}_resource_policies_request_resource")
    wanted = change(disk, [policy(call, link, "use") for link in asked.resource_policies])
    if sum(call.world.policies[each].consistency_group for each in wanted) > 1:
        raise invalid("resourcePolicies", wanted, "A disk is in one consistency group at most.")

    def effect() -> None:
        disk.resource_policies = wanted

    return call.begin(permission, disk, effect)


@action("disks.addResourcePolicies", "regionDisks.addResourcePolicies")
def add_policies(call: Call) -> Message:
    return _changed(
        call, "addResourcePolicies", lambda disk, given: list(dict.fromkeys(disk.resource_policies + given))
    )


@action("disks.removeResourcePolicies", "regionDisks.removeResourcePolicies")
def remove_policies(call: Call) -> Message:
    return _changed(
        call,
        "removeResourcePolicies",
        lambda disk, given: [each for each in disk.resource_policies if each not in given],
    )


@action("disks.bulkInsert", "regionDisks.bulkInsert")
def bulk_insert(call: Call) -> Message:
    """A disk of each instant snapshot of a group."""
    world, asked = call.world, call.request.bulk_insert_disk_resource_resource
    link = asked.instant_snapshot_group_parameters.source_instant_snapshot_group
    if not link:
        raise Refusal("notImplemented", "The twin's bulkInsert knows instant snapshot groups alone")
    path = world.path(link, "sourceInstantSnapshotGroup")
    group = world.find(world.groups, path, path)
    if group.place != call.place:
        raise invalid("sourceInstantSnapshotGroup", path, "It is in another place.")
    sources = [each for each in world.instants.values() if each.group == group.path]
    made = []
    for source in sources:
        call.demand("instantSnapshots.useReadOnly", source.path)
        name = f"{source.source.rpartition('/')[2][:50]}-{secrets.token_hex(4)}"
        path = call.new("disks", world.disks, name, {})
        made.append(_made(call, Disk(path=path, born=world.clock.now(), size=source.size), source))
    return call.begin("bulkInsert", group, lambda: None, ends=world.clock.now() + world.limits.create_s)
