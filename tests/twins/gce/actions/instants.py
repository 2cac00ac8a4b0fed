"""Instant snapshots, by themselves and of a consistency group at once, and the policies that make such a group."""

from __future__ import annotations

import secrets

from google.cloud import compute_v1

from tests.twins.gce.actions import disks
from tests.twins.gce.actions.call import Call, Failed, action, set_labels
from tests.twins.gce.wire import Message, Refusal, invalid
from tests.twins.gce.world import Disk, Group, Instant, Policy, World, stamp


def _where(world: World, place: str) -> dict[str, str]:
    kind, _, _ = place.partition("/")
    return {kind.rstrip("s"): world.link(place)}


def message(world: World, instant: Instant) -> Message:
    found: Message = compute_v1.InstantSnapshot(
        id=int(instant.id),
        kind="compute#instantSnapshot",
        name=instant.name,
        self_link=world.link(instant.path),
        creation_timestamp=stamp(instant.born),
        description=instant.description,
        status="READY" if world.clock.now() >= instant.ready else "CREATING",
        labels=instant.labels,
        label_fingerprint=instant.fingerprint,
        source_disk=world.link(instant.source),
        source_disk_id=instant.source_id,
        disk_size_gb=instant.size,
        **_where(world, instant.place),
    )
    if instant.group:
        found.source_instant_snapshot_group = world.link(instant.group)
        found.source_instant_snapshot_group_id = instant.group_id
    return found


def group_message(world: World, group: Group) -> Message:
    return compute_v1.InstantSnapshotGroup(
        id=int(group.id),
        kind="compute#instantSnapshotGroup",
        name=group.name,
        self_link=world.link(group.path),
        creation_timestamp=stamp(group.born),
        description=group.description,
        status="READY" if world.clock.now() >= group.ready else "CREATING",
        source_consistency_group=world.link(group.policy),
        **_where(world, group.place),
    )


def policy_message(world: World, policy: Policy) -> Message:
    found: Message = compute_v1.ResourcePolicy(
        id=int(policy.id),
        kind="compute#resourcePolicy",
        name=policy.name,
        self_link=world.link(policy.path),
        creation_timestamp=stamp(policy.born),
        description=policy.description,
        region=world.link(policy.place),
        status="READY",
    )
    if policy.consistency_group:
        found.disk_consistency_group_policy = {}
    else:
        found.snapshot_schedule_policy = {"retention_policy": {"max_retention_days": 7}}
    return found


def _taken(call: Call, sources: list[Disk], instants: list[Instant]) -> None:
    """All of them as they are at one instant. Raises Failed."""
    world, now = call.world, call.world.clock.now()
    for disk in sources:
        what = f"instant of {disk.path}"
        if world.too_often(what, None, world.limits.instant_spacing_s):
            raise disks.too_frequent(world, disk)
        if sum(each.source_id == disk.id for each in world.instants.values()) >= world.limits.instants:
            raise Failed("LIMIT_EXCEEDED", f"'{world.full(disk.path)}' has {world.limits.instants} instant snapshots")
    for disk in sources:
        world.happened.setdefault(f"instant of {disk.path}", []).append(now)
    world.instants |= {each.path: each for each in instants}
    by_id = {disk.id: disk for disk in sources}
    shot = [by_id[each.source_id] for each in instants]
    world.later(now + world.limits.capture_s, lambda: world.shoot(shot, instants))


# -- by itself ----------------------------------------------------------------------------------------------------


def _existing(call: Call, permission: str) -> Instant:
    fields = type(call.request).meta.fields
    name = call.request.instant_snapshot if "instant_snapshot" in fields else call.request.resource
    path = f"{call.place}/instantSnapshots/{name}"
    call.demand(f"instantSnapshots.{permission}", path)
    return call.world.find(call.world.instants, path, path)


@action("instantSnapshots.get", "regionInstantSnapshots.get")
def get(call: Call) -> Message:
    return message(call.world, _existing(call, "get"))


@action("instantSnapshots.list", "regionInstantSnapshots.list")
def listed(call: Call) -> Message:
    call.demand("instantSnapshots.list")
    found = [each for each in call.world.instants.values() if each.place == call.place]
    return call.page(found, message, compute_v1.InstantSnapshotList())


@action("instantSnapshots.aggregatedList")
def aggregated(call: Call) -> Message:
    call.demand("instantSnapshots.list")
    return call.page(call.world.instants.values(), message, compute_v1.InstantSnapshotAggregatedList())


@action("instantSnapshots.insert", "regionInstantSnapshots.insert")
def insert(call: Call) -> Message:
    world, asked = call.world, call.request.instant_snapshot_resource
    path = call.new("instantSnapshots", world.instants, asked.name, asked.labels)
    source = world.path(asked.source_disk, "resource.sourceDisk")
    call.demand("disks.createSnapshot", source)
    disk = world.find(world.disks, source, source)
    if disk.place != call.place:
        raise invalid("resource.sourceDisk", asked.source_disk, "The disk is in another place.")
    instant = _of(call, disk, path)
    instant.labels, instant.description = dict(asked.labels), asked.description
    ends = max(instant.ready, instant.born + world.limits.operate_s)
    return call.begin("insert", instant, lambda: _taken(call, [disk], [instant]), ends=ends)


def _of(call: Call, disk: Disk, path: str) -> Instant:
    now = call.world.clock.now()
    ready = now + call.world.limits.capture_s
    return Instant(path=path, born=now, source=disk.path, source_id=disk.id, size=disk.size, ready=ready)


@action("instantSnapshots.delete", "regionInstantSnapshots.delete")
def delete(call: Call) -> Message:
    instant = _existing(call, "delete")
    _unused(call.world, [instant])
    return call.begin("delete", instant, lambda: call.world.drop(call.world.instants, instant.path))


def _unused(world: World, instants: list[Instant]) -> None:
    """Raises Refusal while a snapshot is being made of one of them."""
    for snapshot in world.snapshots.values():
        if snapshot.instant_id in {each.id for each in instants} and world.snapshot_status(snapshot) == "UPLOADING":
            raise disks.in_use(world, snapshot.instant, snapshot.path)


@action("instantSnapshots.setLabels", "regionInstantSnapshots.setLabels")
def labels(call: Call) -> Message:
    kind = "zone" if call.place.startswith("zones/") else "region"
    given = getattr(call.request, f"{kind}_set_labels_request_resource")
    return set_labels(call, _existing(call, "setLabels"), given)


# -- of a group ---------------------------------------------------------------------------------------------------


def _group(call: Call, permission: str) -> Group:
    path = f"{call.place}/instantSnapshotGroups/{call.request.instant_snapshot_group}"
    call.demand(f"instantSnapshotGroups.{permission}", path)
    return call.world.find(call.world.groups, path, path)


@action("instantSnapshotGroups.get", "regionInstantSnapshotGroups.get")
def get_group(call: Call) -> Message:
    return group_message(call.world, _group(call, "get"))


@action("instantSnapshotGroups.list", "regionInstantSnapshotGroups.list")
def list_groups(call: Call) -> Message:
    call.demand("instantSnapshotGroups.list")
    found = [each for each in call.world.groups.values() if each.place == call.place]
    return call.page(found, group_message, compute_v1.ListInstantSnapshotGroups())


@action("instantSnapshotGroups.insert", "regionInstantSnapshotGroups.insert")
def insert_group(call: Call) -> Message:
    """Of all disks here that have the policy."""
    world, asked = call.world, call.request.instant_snapshot_group_resource
    path = call.new("instantSnapshotGroups", world.groups, asked.name, {})
    link = asked.source_consistency_group or call.request.source_consistency_group
    if not link:
        raise Refusal("required", "Required field 'sourceConsistencyGroup' not specified")
    policy = disks.policy(call, link, "useReadOnly")
    if not world.policies[policy].consistency_group:
        raise invalid("sourceConsistencyGroup", link, "The policy makes no consistency group.")
    sources = [each for each in world.disks.values() if policy in each.resource_policies and each.place == call.place]
    if not sources:
        raise invalid("sourceConsistencyGroup", link, "No disk here is in the consistency group.")
    for disk in sources:
        call.demand("disks.createSnapshot", disk.path)
        if world.disk_status(disk) != "READY":
            raise Refusal("resourceNotReady", f"The resource '{world.full(disk.path)}' is not ready")
    ready = world.clock.now() + world.limits.capture_s
    group = Group(path=path, born=world.clock.now(), description=asked.description, policy=policy, ready=ready)
    made = []
    for disk in sources:
        name = f"{group.name[:40]}-{secrets.token_hex(8)}"
        made.append(_of(call, disk, f"{call.place}/instantSnapshots/{name}"))
        made[-1].group, made[-1].group_id = group.path, group.id
    if call.fault is not None and call.fault.kind == "partial":
        made.pop()

    def effect() -> None:
        _taken(call, sources, made)
        world.groups[group.path] = group

    return call.begin("insert", group, effect, ends=max(ready, group.born + world.limits.operate_s))


@action("instantSnapshotGroups.delete", "regionInstantSnapshotGroups.delete")
def delete_group(call: Call) -> Message:
    """Its instant snapshots go with it."""
    world, group = call.world, _group(call, "delete")
    members = [each for each in world.instants.values() if each.group_id == group.id]
    _unused(world, members)

    def effect() -> None:
        for each in members:
            world.drop(world.instants, each.path)
        world.groups.pop(group.path, None)

    return call.begin("delete", group, effect)


# -- policies -----------------------------------------------------------------------------------------------------


def _policy(call: Call, permission: str) -> Policy:
    path = f"{call.place}/resourcePolicies/{call.request.resource_policy}"
    call.demand(f"resourcePolicies.{permission}", path)
    return call.world.find(call.world.policies, path, path)


@action("resourcePolicies.get")
def get_policy(call: Call) -> Message:
    return policy_message(call.world, _policy(call, "get"))


@action("resourcePolicies.list")
def list_policies(call: Call) -> Message:
    call.demand("resourcePolicies.list")
    found = [each for each in call.world.policies.values() if each.place == call.place]
    return call.page(found, policy_message, compute_v1.ResourcePolicyList())


@action("resourcePolicies.insert")
def insert_policy(call: Call) -> Message:
    world, asked = call.world, call.request.resource_policy_resource
    path = call.new("resourcePolicies", world.policies, asked.name, {})
    group = "disk_consistency_group_policy" in asked
    policy = Policy(path=path, born=world.clock.now(), description=asked.description, consistency_group=group)
    return call.begin("insert", policy, lambda: world.policies.update({path: policy}))


@action("resourcePolicies.delete")
def delete_policy(call: Call) -> Message:
    world, policy = call.world, _policy(call, "delete")
    for disk in world.disks.values():
        if policy.path in disk.resource_policies:
            raise disks.in_use(world, policy.path, disk.path)
    return call.begin("delete", policy, lambda: world.drop(world.policies, policy.path))
