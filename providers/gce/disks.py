"""Disks made from snapshots: made, attached to an instance, found there, detached, deleted. Must know no set.

Every step looks first, and is done if it is done already: a killed run, a lost reply and a retry are the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from providers.gce import errors
from providers.gce.api import Api
from providers.gce.choosing import near
from providers.gce.devices import devices
from providers.gce.names import Disk, last, path_of
from providers.gce.taking import remove as delete
from snapshotter.core.errors import BusyError, NotFoundError, SnapshotterError, StorageError
from snapshotter.core.model import Report
from snapshotter.core.remote import Deadline, poll
from snapshotter.host.disks import Disks

#: Blocks come later, when they are read: nothing here depends on a disk's size.
PATIENCE_S = 600.0
APPEARS_S = 60.0


def look(api: Api, which: Disk, within: Deadline) -> Any | None:
    """A disk; None if it isn't there."""
    try:
        return api.call(f"{which.service}.get", within, disk=which.name, **which.where)
    except NotFoundError:
        return None


def labelled(api: Api, within: Deadline, given: str, zone: str = "") -> Iterator[Any]:
    """Disks whose labels fit a filter, wherever they are, or those that an instance of this zone can have."""
    everywhere = "Disks.aggregated_list"
    for item in near(api, within, given, zone) if zone else api.pages(everywhere, within, filter=given):
        if item.status != "DELETING":
            yield item


def make(api: Api, which: Disk, wanted: Mapping[str, Any], report: Report) -> None:
    """A disk, ready. `wanted` is what it is to be like, its labels and description among it: one of the name that has
    just these is what an earlier call made. Raises StorageError if it ends in error."""
    within = api.deadline(which.id, PATIENCE_S)
    body = {"name": which.name, **wanted}
    try:
        api.do(f"{which.service}.insert", within, which.name, report, disk_resource=body, **which.where)
    except SnapshotterError as error:
        if errors.reason_of(error) not in errors.EXISTS:
            raise
        found = look(api, which, within)
        same = found is not None and found.description == body["description"]
        if found is None or not same or not dict(wanted["labels"]).items() <= dict(found.labels).items():
            raise

    def ready() -> bool | None:
        found = look(api, which, within)
        if found is None or found.status in ("FAILED", "DELETING"):
            state = "vanished" if found is None else f"is in state {found.status}"
            raise StorageError(f"Compute Engine made it, and it {state}", object=which.id, cure="try again")
        return True if found.status == "READY" else None

    poll(ready, within, report=report)


def attach(api: Api, which: Disk, instance: str, how: Mapping[str, Any], report: Report) -> None:
    """Attached to the instance (`ZONE/NAME`); `how`: the device's name and more of an AttachedDisk. Raises BusyError if
    it is attached elsewhere."""
    within = api.deadline(f"attaching {which.id} to {instance}", PATIENCE_S)
    zone, _, name = instance.partition("/")
    refused: SnapshotterError | None = None

    def there() -> bool | None:
        nonlocal refused
        found = look(api, which, within)
        if found is None:
            raise NotFoundError("there is no such disk", object=which.id, cure="was it deleted meanwhile? try again")
        users = [user_of(link) for link in found.users]
        if instance in users:
            return True
        if users:
            raise BusyError(f"is attached to {', '.join(users)}", object=which.id, cure="detach it there")
        if refused is not None:
            raise refused
        body = {"source": which.link(api.project), **how}
        try:
            api.do("Instances.attach_disk", within, name, report, zone=zone, instance=name, attached_disk_resource=body)
        except SnapshotterError as error:
            if errors.reason_of(error) not in errors.NOT_NOW | {errors.IN_USE}:
                raise
            refused = error  # by ourselves, a lost reply ago: the next look tells
        return None

    poll(there, within, first_s=0.2, most_s=10.0, report=report)


def user_of(link: str) -> str:
    """`ZONE/NAME` of the instance that a disk's user is."""
    parts = path_of(link).split("/")
    return f"{parts[3]}/{parts[5]}" if len(parts) == 6 else link


def attached_as(api: Api, which: Disk, instance: str, within: Deadline) -> Any | None:
    """How a disk is attached to an instance; None if it isn't."""
    zone, _, name = instance.partition("/")
    try:
        about = api.call("Instances.get", within, zone=zone, instance=name)
    except NotFoundError:
        return None
    mine = which.link(api.project)
    return next((each for each in about.disks if path_of(each.source) == mine), None)


def detach(api: Api, which: Disk, report: Report) -> None:
    """Attached nowhere; absent is done. Raises BusyError while an instance doesn't let go."""
    within = api.deadline(f"detaching {which.id}", PATIENCE_S)

    def free() -> bool | None:
        found = look(api, which, within)
        for link in found.users if found is not None else ():
            instance = user_of(link)
            zone, _, name = instance.partition("/")
            how = attached_as(api, which, instance, within)
            if how is None:
                return None  # the two say different things: one of them is late
            fields = {"zone": zone, "instance": name, "device_name": how.device_name}
            try:
                api.do("Instances.detach_disk", within, name, report, **fields)
            except SnapshotterError as error:
                late = {*errors.NOT_NOW, errors.IN_USE, "notfound", "resourcenotfound", "invalid"}
                if errors.reason_of(error) not in late:
                    raise
            return None
        return True

    poll(free, within, first_s=0.2, most_s=10.0, report=report)


def refuse_elsewhere(api: Api, which: Disk, instance: str) -> None:
    """Raise BusyError while another instance than this one has a disk: whether it is mounted there isn't known here,
    and Compute Engine pulls it away all the same."""
    found = look(api, which, api.deadline(which.id))
    users = {user_of(link) for link in found.users} - {instance} if found is not None else set()
    if users:
        cure = "umount it and `gcloud compute instances detach-disk` it there, then try again"
        raise BusyError(f"is attached to {', '.join(sorted(users))}", object=which.id, cure=cure)


def remove(api: Api, which: Disk, report: Report) -> None:
    """Detached, deleted; absent is done."""
    detach(api, which, report)
    within = api.deadline(f"deleting {which.id}", PATIENCE_S)
    delete(api, f"{which.service}.delete", which.name, within, disk=which.name, **which.where)


def appeared(api: Api, disks: Disks, device: str, report: Report) -> str:
    """The kernel name of the disk that was attached here under this device name, when it is there."""
    within = api.deadline(f"the disk {device}", APPEARS_S)
    return poll(lambda: devices(disks).get(device), within, first_s=0.1, most_s=2.0, report=report)


def type_link(project: str, which: Disk, kind: str) -> str:
    """Of a disk's type: `pd-balanced`, `hyperdisk-balanced`."""
    scope = "regions" if which.regional else "zones"
    return f"projects/{project}/{scope}/{which.place}/diskTypes/{last(kind)}"
