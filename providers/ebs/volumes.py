"""Volumes made from snapshots: made, attached to an instance, found there, detached, deleted. Must know no set.

Every step looks first, and is done if it is done already: a killed run, a lost reply and a retry are the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from providers.ebs.api import Api
from providers.ebs.tags import BY_ID, as_tags, serial
from snapshotter.core.errors import BusyError, NotFoundError, SnapshotterError, StorageError
from snapshotter.core.model import Report
from snapshotter.core.remote import Deadline, Lost, poll
from snapshotter.host.disks import Disks

#: After this long what was asked for is listed, or was never done: EC2's own word is "a few minutes" at the very worst.
SETTLE_S = 30.0
#: Blocks come later, when they are read: nothing here depends on a volume's size.
PATIENCE_S = 600.0
APPEARS_S = 60.0
_DEVICES = [f"/dev/sd{letter}" for letter in "fghijklmnop"] + [
    f"/dev/xvd{one}{two}" for one in "bc" for two in "abcdefghijklmnopqrstuvwxyz"
]


def code_of(error: SnapshotterError) -> str:
    """EC2's own code behind a refusal."""
    return str(vars(error).get("ec2", ""))


def described(api: Api, within: Deadline, filters: Mapping[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Volumes as EC2 will list them when it has caught up with us. Those made by us lately come along whatever the
    filters."""
    given = [{"Name": name, "Values": values} for name, values in filters.items()]
    listed = api.pages("describe_volumes", "Volumes", within, Filters=given)
    yield from api.memory.over(listed, "VolumeId", "vol-")


def look(api: Api, volume: str, within: Deadline) -> dict[str, Any] | None:
    """One volume; None if it isn't there (any more, or yet)."""
    try:
        return api.memory.current(api.call("describe_volumes", within, VolumeIds=[volume])["Volumes"][0], "VolumeId")
    except (NotFoundError, IndexError):
        return None


def attached_to(item: Mapping[str, Any]) -> tuple[str, str]:
    """(instance, state) of a volume's attachment; ('', '') if it has none."""
    for each in item.get("Attachments", []):
        if each.get("State") != "detached":
            return str(each.get("InstanceId", "")), str(each.get("State", ""))
    return "", ""


def make(api: Api, wanted: Mapping[str, Any], tags: Mapping[str, str], report: Report) -> str:
    """A volume, available. `wanted` are CreateVolume's parameters, a ClientToken among them, so that however often it
    is asked for there is one. Raises StorageError if it ends in error or vanishes."""
    within = api.deadline(f"a volume of {wanted['SnapshotId']}", PATIENCE_S)
    spec = [{"ResourceType": "volume", "Tags": as_tags(tags)}]
    made = api.call("create_volume", within, TagSpecifications=spec, **wanted)
    volume = str(made["VolumeId"])
    api.memory.made(volume, made)
    asked, seen = api.clock.now(), False

    def available() -> bool | None:
        nonlocal seen
        item = look(api, volume, within)
        state = item["State"] if item else ""
        if state in ("available", "in-use"):
            return True
        if state == "error":
            raise StorageError("EC2 made it, and it is in state `error`", object=volume, cure="try again")
        if (item is None and (seen or api.clock.now() - asked > SETTLE_S)) or state in ("deleting", "deleted"):
            # That is how EC2 tells that it may not use the key.
            cure = "may this role use the snapshot's KMS key? docs/aws.md"
            raise StorageError("the new volume vanished before it was there", object=volume, cure=cure)
        seen = seen or item is not None
        return None

    poll(available, within, report=report)
    return volume


def attach(api: Api, volume: str, instance: str, report: Report, device: str = "") -> None:
    """Attached to the instance, as `device` or under any free name. Raises BusyError if it is attached elsewhere."""
    within = api.deadline(f"attaching {volume} to {instance}", PATIENCE_S)
    refused: SnapshotterError | None = None
    tried: set[str] = set()

    def there() -> bool | None:
        nonlocal refused
        item = look(api, volume, within)
        where, state = attached_to(item or {})
        if where == instance and state == "attached":
            return True
        if where == instance and state in ("attaching", "detaching"):
            return None
        if where:
            raise BusyError(f"is attached to {where}", object=volume, cure="detach it there")
        if refused is not None:
            raise refused
        name = device or _free_device(api, instance, within, tried)
        try:
            api.call("attach_volume", within, again=False, VolumeId=volume, InstanceId=instance, Device=name)
        except Lost:
            return None  # the next look tells
        except SnapshotterError as error:
            if code_of(error) == "InvalidParameterValue" and "in use" in error.message and not device:
                tried.add(name)  # somebody was faster
            elif code_of(error) in ("VolumeInUse", "IncorrectState"):
                refused = error  # by ourselves, a lost reply ago: the next look tells
            else:
                raise
        return None

    poll(there, within, report=report)


def _free_device(api: Api, instance: str, within: Deadline, tried: set[str]) -> str:
    used = {mapping["DeviceName"] for mapping in of_instance(api, instance, within)["BlockDeviceMappings"]}
    for name in _DEVICES:
        if name not in tried and name not in used and name.replace("/dev/sd", "/dev/xvd") not in used:
            return name
    raise StorageError("has no device name left", object=instance, cure="detach a volume")


def of_instance(api: Api, instance: str, within: Deadline) -> dict[str, Any]:
    """What EC2 says of an instance. Raises NotFoundError."""
    for reservation in api.call("describe_instances", within, InstanceIds=[instance])["Reservations"]:
        for found in reservation["Instances"]:
            return found  # type: ignore[no-any-return]
    raise NotFoundError("there is no such instance", object=instance)


def appeared(api: Api, disks: Disks, volume: str, report: Report) -> str:
    """The kernel name of the disk that was attached here, when it is there."""
    within = api.deadline(f"the disk of {volume}", APPEARS_S)
    return poll(lambda: disks.find(serial(volume), BY_ID), within, first_s=0.1, most_s=2.0, report=report)


def detach(api: Api, volume: str, report: Report) -> None:
    """Attached nowhere; absent is done. Raises BusyError while the instance doesn't let go."""
    within = api.deadline(f"detaching {volume}", PATIENCE_S)

    def free() -> bool | None:
        item = look(api, volume, within)
        where, state = attached_to(item or {})
        if item is None:
            return None if api.memory.is_ours(volume) and PATIENCE_S - within.left() < SETTLE_S else True
        if state == "busy":
            raise BusyError(f"is in use on {where}", object=volume, cure="unmount it there, then try again")
        if state in ("attached", "attaching"):
            try:
                api.call("detach_volume", within, VolumeId=volume, InstanceId=where)
            except SnapshotterError as error:
                if code_of(error) not in ("IncorrectState", "InvalidAttachment.NotFound"):
                    raise
            return None
        return True if not where and item["State"] != "creating" else None

    poll(free, within, first_s=0.5, most_s=15.0, report=report)


def remove(api: Api, volume: str, report: Report) -> None:
    """Detached, deleted; absent is done. Raises BusyError while the instance doesn't let go."""
    detach(api, volume, report)
    within = api.deadline(f"deleting {volume}", PATIENCE_S)
    poll(lambda: _delete(api, volume, within), within, first_s=0.5, most_s=15.0, report=report)
    api.memory.deleted(volume)


def _delete(api: Api, volume: str, within: Deadline) -> bool | None:
    try:
        api.call("delete_volume", within, VolumeId=volume)
    except NotFoundError:
        return None if api.memory.is_ours(volume) and within.left() > PATIENCE_S - SETTLE_S else True
    except SnapshotterError as error:
        if code_of(error) not in ("VolumeInUse", "IncorrectState"):
            raise
        return None
    return True


def tag(api: Api, names: Sequence[str], changes: Mapping[str, str | None]) -> None:
    """Set tags and remove (None) others. Removals first: what is set last is a seal. What was just made may not be
    known yet. Raises NotFoundError."""
    within = api.deadline(", ".join(names[:3]))
    gone = [{"Key": key} for key, value in changes.items() if value is None]
    new = {key: value for key, value in changes.items() if value is not None}

    def attempt() -> bool | None:
        try:
            if gone:
                api.call("delete_tags", within, Resources=list(names), Tags=gone)
            if new:
                api.call("create_tags", within, Resources=list(names), Tags=as_tags(new))
        except NotFoundError:
            if any(api.memory.is_ours(name) for name in names):
                return None
            raise
        return True

    poll(attempt, within, most_s=5.0)
    for name in names:
        api.memory.tagged(name, changes)
