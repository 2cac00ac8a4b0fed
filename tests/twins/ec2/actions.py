"""EC2's actions on the twin's world, each with EC2's checks in EC2's order: may it, does it exist, is it in the right
state, is there room; then the effect; then the answer in boto3's names. Must know neither HTTP nor XML.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.twins.ec2 import policy
from tests.twins.ec2.wire import Refusal
from tests.twins.ec2.world import (
    ACCOUNT,
    Attached,
    Instance,
    Resource,
    Snapshot,
    Volume,
    World,
    moment,
    new_id,
)
from tests.twins.knobs import Fault

Params = dict[str, Any]
Answer = dict[str, Any]
ACTIONS: dict[str, Callable[[Call, Params], Answer]] = {}


@dataclass
class Call:
    """Who asks, where, and what is to go wrong."""

    world: World
    region: str
    policies: Sequence[Mapping[str, Any]] | None
    fault: Fault | None = None

    def arn(self, kind: str, name: str) -> str:
        owner = "" if kind == "snapshot" else ACCOUNT
        return f"arn:aws:ec2:{self.region}:{owner}:{kind}/{name}"

    def demand(self, action: str, kind: str, name: str, of: Resource | None = None, **context: Any) -> None:
        """`context` beyond the resource's own tags; `request` are tags that the call gives."""
        keys: dict[str, Any] = {"aws:RequestedRegion": self.region}
        keys |= {f"aws:ResourceTag/{key}": value for key, value in (of.tags if of else {}).items()}
        request = context.pop("request", {})
        if request:
            keys["aws:TagKeys"] = list(request)
            keys |= {f"aws:RequestTag/{key}": value for key, value in request.items()}
        keys |= {key.replace("_", ":"): value for key, value in context.items()}
        policy.demand(self.policies, f"ec2:{action}", self.arn(kind, name) if kind else "*", keys)

    def may_tag(self, action: str, kind: str, tags: dict[str, str]) -> None:
        if tags:
            self.demand("CreateTags", kind, "*", request=tags, ec2_CreateAction=action)


def _action(run: Callable[[Call, Params], Answer]) -> Callable[[Call, Params], Answer]:
    ACTIONS["".join(word.capitalize() for word in run.__name__.split("_"))] = run
    return run


# -- looking ------------------------------------------------------------------------------------------------------


def _page(found: list[Answer], params: Params, name: str) -> Answer:
    size = params.get("MaxResults")
    if size is not None and not 5 <= size <= 1000:
        raise Refusal("InvalidParameterValue", f"Value ( {size} ) for parameter maxResults is invalid.")
    start = int(params.get("NextToken") or 0)
    end = start + size if size is not None else len(found)
    return {name: found[start:end], **({"NextToken": str(end)} if end < len(found) else {})}


def _filtered(found: list[Answer], params: Params, fields: dict[str, Callable[[Answer], list[str]]]) -> list[Answer]:
    for each in params.get("Filters", []):
        name, values = each["Name"], each["Values"]
        if len(values) > 200:
            raise Refusal("FilterLimitExceeded", "More than 200 filter values on a single call")
        if name.startswith("tag:"):
            key = name[4:]
            have = lambda item, key=key: [t["Value"] for t in item.get("Tags", []) if t["Key"] == key]  # noqa: E731
        elif name == "tag-key":
            have = lambda item: [t["Key"] for t in item.get("Tags", [])]  # noqa: E731
        elif name in fields:
            have = fields[name]
        else:
            raise Refusal("InvalidParameterValue", f"The filter '{name}' is invalid")
        found = [item for item in found if any(fnmatch.fnmatchcase(h, v) for h in have(item) for v in values)]
    return found


def _named(world: World, kind: dict[str, Any], params: Params, ids: str, region: str, what: str) -> list[Any]:
    """What the answer is made of: by id, or all that is listed. A filter that a fleet asks each node by comes first: to
    describe thousands each time would be the twin's time, not EC2's."""
    if ids in params:
        if "MaxResults" in params:
            raise Refusal("InvalidParameterCombination", f"The parameter {ids} cannot be used with maxResults")
        return [world.find(kind, name, region, what) for name in params[ids]]
    wanted = {each["Name"]: each["Values"] for each in params.get("Filters", [])}
    found = world.listed(kind, region)
    if kind is world.snapshots and "volume-id" in wanted:
        found = (each for each in found if each.volume in wanted["volume-id"])
    if kind is world.volumes and "volume-id" in wanted:
        found = (each for each in found if each.id in wanted["volume-id"])
    if kind is world.volumes and "attachment.instance-id" in wanted:
        found = (each for each in found if each.attached and each.attached.instance in wanted["attachment.instance-id"])
    for name, values in wanted.items():
        if name.startswith("tag:"):
            found = _tagged(world, found, name[4:], values)
    return list(found)


def _tagged(world: World, found: Iterable[Any], key: str, values: list[str]) -> Iterator[Any]:
    for each in found:
        value = world.tags(each).get(key)
        if value is not None and (value in values or any(fnmatch.fnmatchcase(value, wanted) for wanted in values)):
            yield each


def _tag_set(tags: dict[str, str]) -> list[Answer]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


@_action
def describe_instances(call: Call, params: Params) -> Answer:
    call.demand("DescribeInstances", "", "*")
    world = call.world
    found = []
    for instance in _named(world, world.instances, params, "InstanceIds", call.region, "InstanceID"):
        mappings = [
            {
                "DeviceName": volume.attached.device,
                "Ebs": {
                    "VolumeId": volume.id,
                    "Status": "attached",
                    "DeleteOnTermination": volume.attached.ends_with_instance,
                },
            }
            for volume in world.of_instance(instance.id)
            if volume.attached
        ]
        found.append(
            {
                "InstanceId": instance.id,
                "State": {"Code": 16 if instance.state == "running" else 48, "Name": instance.state},
                "Placement": {"AvailabilityZone": instance.zone},
                "RootDeviceName": instance.root_device,
                "BlockDeviceMappings": mappings,
                "Tags": _tag_set(world.tags(instance)),
            }
        )
    fields = {"instance-state-name": lambda item: [item["State"]["Name"]]}
    found = _filtered(found, params, fields)
    page = _page(found, params, "Instances")
    return {
        "Reservations": [{"ReservationId": "r-1", "OwnerId": ACCOUNT, "Instances": page.pop("Instances")}],
        **page,
    }


@_action
def describe_volumes(call: Call, params: Params) -> Answer:
    call.demand("DescribeVolumes", "", "*")
    world = call.world
    found = [
        _volume(world, each)
        for each in _named(world, world.volumes, params, "VolumeIds", call.region, "Volume")
        if not (each.gone is not None and world.limits.lag_s == 0)
    ]
    fields = {
        "volume-id": lambda item: [item["VolumeId"]],
        "status": lambda item: [item["State"]],
        "snapshot-id": lambda item: [item["SnapshotId"]],
        "attachment.instance-id": lambda item: [a["InstanceId"] for a in item["Attachments"]],
    }
    return _page(_filtered(found, params, fields), params, "Volumes")


def _volume(world: World, volume: Volume) -> Answer:
    state = world.volume_state(volume)
    return {
        "VolumeId": volume.id,
        "State": state,
        "Size": volume.size,
        "VolumeType": volume.kind,
        "Iops": volume.iops,
        "Throughput": volume.throughput,
        "Encrypted": volume.encrypted,
        "KmsKeyId": volume.key,
        "SnapshotId": volume.snapshot,
        "AvailabilityZone": volume.zone,
        "CreateTime": moment(volume.born),
        "MultiAttachEnabled": False,
        "Attachments": [_attachment(world, volume)] if volume.attached else [],
        "Tags": _tag_set(world.tags(volume)),
    }


def _attachment(world: World, volume: Volume) -> Answer:
    assert volume.attached is not None
    state, attached = world.attachment_state(volume), volume.attached
    return {
        "VolumeId": volume.id,
        "InstanceId": attached.instance if attached else "",
        "Device": attached.device if attached else "",
        "State": state or "detached",
        "DeleteOnTermination": attached.ends_with_instance if attached else False,
    }


@_action
def describe_snapshots(call: Call, params: Params) -> Answer:
    call.demand("DescribeSnapshots", "", "*")
    world = call.world
    found = [
        _snapshot(world, each)
        for each in _named(world, world.snapshots, params, "SnapshotIds", call.region, "Snapshot")
    ]
    owners = params.get("OwnerIds", ["self"])
    found = [item for item in found if "self" in owners or item["OwnerId"] in owners]
    fields = {
        "snapshot-id": lambda item: [item["SnapshotId"]],
        "volume-id": lambda item: [item["VolumeId"]],
        "status": lambda item: [item["State"]],
        "description": lambda item: [item["Description"]],
    }
    return _page(_filtered(found, params, fields), params, "Snapshots")


def _snapshot(world: World, snapshot: Snapshot) -> Answer:
    state = world.snapshot_state(snapshot)
    whole = max(snapshot.done - snapshot.born, 0.001)
    share = min(1.0, (world.clock.now() - snapshot.born) / whole)
    return {
        "SnapshotId": snapshot.id,
        "VolumeId": snapshot.volume,
        "State": state,
        "StateMessage": snapshot.error if state == "error" else None,
        "StartTime": moment(snapshot.born),
        "Progress": f"{share:.0%}",
        "OwnerId": ACCOUNT,
        "Description": snapshot.description,
        "VolumeSize": snapshot.size,
        "Encrypted": snapshot.encrypted,
        "KmsKeyId": snapshot.key,
        "StorageTier": snapshot.tier,
        "Tags": _tag_set(world.tags(snapshot)),
    }


# -- snapshots ----------------------------------------------------------------------------------------------------


def _tags_given(params: Params, kind: str) -> dict[str, str]:
    tags: dict[str, str] = {}
    for each in params.get("TagSpecifications", []):
        if each.get("ResourceType") != kind:
            raise Refusal(
                "InvalidParameterValue", f"'{each.get('ResourceType')}' is not a valid taggable resource here"
            )
        tags |= {tag["Key"]: tag.get("Value", "") for tag in each.get("Tags", [])}
    _check_tags(tags)
    return tags


def _check_tags(tags: dict[str, str]) -> None:
    if len(tags) > 50:
        raise Refusal("TagLimitExceeded", "The maximum number of Tags for a resource has been reached.")
    for key, value in tags.items():
        if not key or len(key) > 127 or len(value) > 255 or key.startswith("aws:"):
            raise Refusal("InvalidParameterValue", f"Tag {key!r}={value!r} is too long, or reserved")


def _may_shoot(call: Call, action: str, volume: Volume, tags: dict[str, str]) -> None:
    call.demand(action, "volume", volume.id, volume)
    call.demand(action, "snapshot", "*", request=tags)


def _room_for(call: Call, volumes: Sequence[Volume]) -> None:
    world, now = call.world, call.world.clock.now()
    living = [each for each in world.snapshots.values() if each.gone is None]
    if world.limits.snapshots is not None and len(living) + len(volumes) > world.limits.snapshots:
        raise Refusal("SnapshotLimitExceeded", "The maximum number of snapshots has been reached.")
    for volume in volumes:
        theirs = [each for each in world.snapshots.values() if each.volume == volume.id]
        if any(now - each.born < world.limits.spacing_s for each in theirs):
            raise Refusal(
                "SnapshotCreationPerVolumeRateExceeded",
                "The maximum per volume CreateSnapshot request rate has been exceeded. Use an increasing or variable "
                "sleep interval between requests.",
            )
        # Errored and being-deleted ones count until their time is over.
        running = [each for each in theirs if now < each.done]
        if len(running) >= world.limits.concurrent.get(volume.kind, 5):
            raise Refusal("ConcurrentSnapshotLimitExceeded", f"Too many pending snapshots of {volume.id}")


def _refuse_archived(snapshot: Snapshot) -> None:
    if snapshot.tier == "archive":
        raise Refusal("IncorrectState", f"Snapshot {snapshot.id} is archived")


def _shoot(call: Call, volumes: Sequence[Volume], params: Params, tags: dict[str, str]) -> list[Snapshot]:
    world, now = call.world, call.world.clock.now()
    made = []
    for volume in volumes:
        denied = volume.key is not None and volume.key in world.limits.keys_denied
        failed = (call.fault is not None and call.fault.kind == "upload") or denied
        made.append(
            Snapshot(
                id=new_id("snap"),
                region=call.region,
                born=now,
                tagged=[(now, dict(tags))],
                volume=volume.id,
                size=volume.size,
                done=now + world.limits.upload_s,
                encrypted=volume.encrypted,
                key=volume.key,
                description=params.get("Description", ""),
                error="" if not failed else "Given key ID is not accessible" if denied else "An internal error",
            )
        )
    if call.fault is not None and call.fault.kind == "partial":
        made.pop()
    if world.disks and made:
        world.disks.shoot([snapshot.volume for snapshot in made], [snapshot.id for snapshot in made])
    world.snapshots |= {snapshot.id: snapshot for snapshot in made}
    return made


@_action
def create_snapshot(call: Call, params: Params) -> Answer:
    world = call.world
    volume = world.find(world.volumes, params["VolumeId"], call.region, "Volume")
    tags = _tags_given(params, "snapshot")
    _may_shoot(call, "CreateSnapshot", volume, tags)
    call.may_tag("CreateSnapshot", "snapshot", tags)
    if world.volume_state(volume) not in ("available", "in-use"):
        raise Refusal("IncorrectState", f"{volume.id} is not 'available' or 'in-use'")
    _room_for(call, [volume])
    (made,) = _shoot(call, [volume], params, tags)
    answer = _snapshot(world, made)
    return {**answer, "State": "pending", "Tags": _tag_set(tags)}


@_action
def create_snapshots(call: Call, params: Params) -> Answer:
    world = call.world
    wanted = params["InstanceSpecification"]
    instance = world.find(world.instances, wanted["InstanceId"], call.region, "InstanceID")
    if instance.state != "running":
        raise Refusal("IncorrectInstanceState", f"The instance '{instance.id}' is not in a valid state")
    tags = _tags_given(params, "snapshot")
    volumes = world.of_instance(instance.id)
    excluded = set(wanted.get("ExcludeDataVolumeIds", []))
    root = {each.id for each in volumes if each.attached and each.attached.device == instance.root_device}
    if excluded & root or not excluded <= {each.id for each in volumes}:
        raise Refusal("InvalidParameterValue", "ExcludeDataVolumeIds names what is no data volume of the instance")
    volumes = [
        each
        for each in volumes
        if each.id not in excluded and not (wanted.get("ExcludeBootVolume") and each.id in root)
    ]
    if not volumes or len(volumes) > 128:
        raise Refusal("InvalidParameterValue", f"{len(volumes)} volumes can't be taken together")
    call.demand("CreateSnapshots", "instance", instance.id, instance)
    for volume in volumes:
        _may_shoot(call, "CreateSnapshots", volume, tags)
    call.may_tag("CreateSnapshots", "snapshot", tags)
    _room_for(call, volumes)
    made = _shoot(call, volumes, params, tags)
    keys = ("SnapshotId", "VolumeId", "VolumeSize", "StartTime", "OwnerId", "Description", "Encrypted", "Progress")
    return {
        "Snapshots": [
            {**{key: _snapshot(world, each)[key] for key in keys}, "State": "pending", "Tags": _tag_set(tags)}
            for each in made
        ]
    }


@_action
def copy_snapshot(call: Call, params: Params) -> Answer:
    """Asked of the region that it goes to. EC2 gives the copy a VolumeId of its own."""
    world, now = call.world, call.world.clock.now()
    source = world.find(world.snapshots, params["SourceSnapshotId"], params["SourceRegion"], "Snapshot")
    tags = _tags_given(params, "snapshot")
    replace(call, region=params["SourceRegion"]).demand("CopySnapshot", "snapshot", source.id, source)
    call.demand("CopySnapshot", "snapshot", "*", request=tags)
    call.may_tag("CopySnapshot", "snapshot", tags)
    if world.snapshot_state(source) != "completed":
        raise Refusal("IncorrectState", f"Snapshot is in invalid state - {world.snapshot_state(source)}")
    _refuse_archived(source)
    under_way = [s for s in world.snapshots.values() if s.copied and s.region == call.region and now < s.done]
    if len(under_way) >= world.limits.copies:
        raise Refusal("ResourceLimitExceeded", "Too many snapshot copies in progress. The limit is 20 for this region")
    key = params.get("KmsKeyId") or source.key
    made = Snapshot(
        id=new_id("snap"),
        region=call.region,
        born=now,
        tagged=[(now, dict(tags))],
        volume="vol-ffffffffffffffff0",
        size=source.size,
        done=now + world.limits.upload_s,
        encrypted=source.encrypted or bool(params.get("Encrypted")),
        key=key,
        description=params.get("Description", ""),
        error="An internal error" if call.fault is not None and call.fault.kind == "upload" else "",
        copied=True,
    )
    world.snapshots[made.id] = made
    if world.disks:
        world.disks.copy(source.id, made.id)
    return {"SnapshotId": made.id, "Tags": _tag_set(tags)}


@_action
def delete_snapshot(call: Call, params: Params) -> Answer:
    world = call.world
    snapshot = world.find(world.snapshots, params["SnapshotId"], call.region, "Snapshot")
    call.demand("DeleteSnapshot", "snapshot", snapshot.id, snapshot)
    snapshot.gone = world.clock.now()
    if world.disks:
        world.disks.drop_image(snapshot.id)
    return {"Return": True}


# -- volumes ------------------------------------------------------------------------------------------------------


@_action
def create_volume(call: Call, params: Params) -> Answer:
    world, now = call.world, call.world.clock.now()
    token = params.get("ClientToken", "")
    if token in world.by_token:
        before, volume_id = world.by_token[token]
        if before != params:
            raise Refusal("IdempotentParameterMismatch", "The request uses the same client token, and is another")
        return _volume(world, world.volumes[volume_id])
    snapshot = None
    if params.get("SnapshotId"):
        snapshot = world.find(world.snapshots, params["SnapshotId"], call.region, "Snapshot")
        call.demand("CreateVolume", "snapshot", snapshot.id, snapshot)
        if world.snapshot_state(snapshot) != "completed":
            raise Refusal("IncorrectState", f"Snapshot is in invalid state - {world.snapshot_state(snapshot)}")
        _refuse_archived(snapshot)
    tags = _tags_given(params, "volume")
    call.demand("CreateVolume", "volume", "*", request=tags)
    call.may_tag("CreateVolume", "volume", tags)
    zone = params.get("AvailabilityZone", "")
    if zone[:-1] != call.region:
        raise Refusal("InvalidZone.NotFound", f"The zone '{zone}' does not exist.")
    size = params.get("Size") or (snapshot.size if snapshot else 0)
    if snapshot and size < snapshot.size:
        raise Refusal("InvalidParameterValue", "Volume size is smaller than the snapshot's")
    kind = params.get("VolumeType", "gp2")
    if params.get("Throughput") and kind != "gp3":
        raise Refusal("InvalidParameterCombination", f"The throughput parameter is not supported for {kind} volumes.")
    used = sum(each.size for each in world.volumes.values() if each.gone is None)
    if world.limits.volumes_gib is not None and used + size > world.limits.volumes_gib:
        raise Refusal("VolumeLimitExceeded", "You have exceeded your maximum volume storage of this type.")
    key = params.get("KmsKeyId") or (snapshot.key if snapshot else None)
    volume = Volume(
        id=new_id("vol"),
        region=call.region,
        born=now,
        tagged=[(now, dict(tags))],
        zone=zone,
        size=size,
        kind=kind,
        iops=params.get("Iops"),
        throughput=params.get("Throughput"),
        encrypted=bool(key) or bool(params.get("Encrypted")),
        key=key,
        snapshot=snapshot.id if snapshot else "",
        initialization_rate=params.get("VolumeInitializationRate"),
        ready=now + world.limits.create_s,
        token=token,
    )
    world.volumes[volume.id] = volume
    if token:
        world.by_token[token] = (params, volume.id)
    answer = {**_volume(world, volume), "State": "creating", "Tags": _tag_set(tags)}
    if key in world.limits.keys_denied:
        volume.gone = now  # EC2 accepts it, and then it vanishes
    elif world.disks:
        world.disks.make(volume.id, size, snapshot.id if snapshot else "")
    return answer


@_action
def delete_volume(call: Call, params: Params) -> Answer:
    world = call.world
    volume = world.find(world.volumes, params["VolumeId"], call.region, "Volume")
    call.demand("DeleteVolume", "volume", volume.id, volume)
    if world.attachment_state(volume):
        raise Refusal("VolumeInUse", f"Volume {volume.id} is currently attached")
    volume.gone = world.clock.now()
    if world.disks:
        world.disks.drop_volume(volume.id)
    return {"Return": True}


@_action
def attach_volume(call: Call, params: Params) -> Answer:
    world = call.world
    volume = world.find(world.volumes, params["VolumeId"], call.region, "Volume")
    instance: Instance = world.find(world.instances, params["InstanceId"], call.region, "InstanceID")
    call.demand("AttachVolume", "volume", volume.id, volume)
    call.demand("AttachVolume", "instance", instance.id, instance)
    if world.attachment_state(volume):
        raise Refusal("VolumeInUse", f"{volume.id} is already attached to an instance")
    if world.volume_state(volume) != "available":
        raise Refusal("IncorrectState", f"{volume.id} is not 'available'.")
    if volume.zone != instance.zone:
        raise Refusal("InvalidVolume.ZoneMismatch", f"The volume '{volume.id}' is not in the same availability zone")
    if instance.state != "running":
        raise Refusal("IncorrectState", f"Instance '{instance.id}' is not 'running'.")
    others = [each.attached.device for each in world.of_instance(instance.id) if each.attached]
    if params["Device"] in others:
        raise Refusal("InvalidParameterValue", f"Invalid value '{params['Device']}' for unixDevice. Already in use")
    if len(others) >= 28:
        raise Refusal("AttachmentLimitExceeded", "The maximum number of attachments has been reached")
    if world.disks:
        world.disks.attach(volume.id)
    volume.attached = Attached(instance.id, params["Device"], world.clock.now())
    return {**_attachment(world, volume), "State": "attaching"}


@_action
def detach_volume(call: Call, params: Params) -> Answer:
    world = call.world
    volume = world.find(world.volumes, params["VolumeId"], call.region, "Volume")
    call.demand("DetachVolume", "volume", volume.id, volume)
    if not world.attachment_state(volume) or volume.attached is None:
        raise Refusal("IncorrectState", f"Volume '{volume.id}' is in the 'available' state.")
    instance = world.instances[volume.attached.instance]
    call.demand("DetachVolume", "instance", instance.id, instance)
    if params.get("InstanceId", instance.id) != instance.id:
        raise Refusal("InvalidAttachment.NotFound", f"{volume.id} is not attached to {params['InstanceId']}")
    volume.attached.leaving, volume.attached.since = True, world.clock.now()
    return {**_attachment(world, volume), "State": "detaching"}


# -- tags ---------------------------------------------------------------------------------------------------------


def _resources(call: Call, params: Params) -> list[tuple[str, Resource]]:
    world = call.world
    kinds: dict[str, tuple[str, dict[str, Any], str]] = {
        "snap": ("snapshot", world.snapshots, "Snapshot"),
        "vol": ("volume", world.volumes, "Volume"),
        "i": ("instance", world.instances, "InstanceID"),
    }
    found = []
    for name in params["Resources"]:
        kind, table, what = kinds[name.partition("-")[0]]
        found.append((kind, world.find(table, name, call.region, what)))
    return found


@_action
def create_tags(call: Call, params: Params) -> Answer:
    tags = {tag["Key"]: tag.get("Value", "") for tag in params["Tags"]}
    resources = _resources(call, params)
    for kind, resource in resources:
        call.demand("CreateTags", kind, resource.id, resource, request=tags)
        _check_tags({**resource.tags, **tags})
    for _, resource in resources:
        call.world.retag(resource, {**resource.tags, **tags})
    return {"Return": True}


@_action
def delete_tags(call: Call, params: Params) -> Answer:
    """A tag with a value is removed only if it has that value."""
    given = params["Tags"]
    resources = _resources(call, params)
    for kind, resource in resources:
        call.demand("DeleteTags", kind, resource.id, resource, request={tag["Key"]: "" for tag in given})
    for _, resource in resources:
        gone = [t["Key"] for t in given if t.get("Value") in (None, resource.tags.get(t["Key"]))]
        call.world.retag(resource, {key: value for key, value in resource.tags.items() if key not in gone})
    return {"Return": True}
