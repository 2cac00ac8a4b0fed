"""Instances: looked at; disks attached to them and detached."""

from __future__ import annotations

from google.cloud import compute_v1

from tests.twins.gce.actions import disks
from tests.twins.gce.actions.call import Call, action
from tests.twins.gce.wire import Message, Refusal, invalid
from tests.twins.gce.world import Attached, Instance, World, stamp


def message(world: World, instance: Instance) -> Message:
    attached = [
        compute_v1.AttachedDisk(
            kind="compute#attachedDisk",
            index=index,
            source=world.link(each.disk),
            device_name=each.device_name,
            boot=each.boot,
            auto_delete=each.auto_delete,
            mode=each.mode,
            type_="PERSISTENT",
            interface=each.interface,
            disk_size_gb=world.disks[each.disk].size if each.disk in world.disks else 0,
        )
        for index, each in enumerate(instance.disks)
    ]
    return compute_v1.Instance(
        id=int(instance.id),
        kind="compute#instance",
        name=instance.name,
        self_link=world.link(instance.path),
        creation_timestamp=stamp(instance.born),
        status=instance.status,
        zone=world.link(f"zones/{instance.zone}"),
        machine_type=world.link(f"zones/{instance.zone}/machineTypes/n2-standard-4"),
        labels=instance.labels,
        label_fingerprint=instance.fingerprint,
        disks=attached,
    )


def _existing(call: Call, permission: str) -> Instance:
    path = f"{call.place}/instances/{call.request.instance}"
    call.demand(f"instances.{permission}", path)
    return call.world.find(call.world.instances, path, path)


@action("instances.get")
def get(call: Call) -> Message:
    return message(call.world, _existing(call, "get"))


@action("instances.list")
def listed(call: Call) -> Message:
    call.demand("instances.list")
    found = [each for each in call.world.instances.values() if each.place == call.place]
    return call.page(found, message, compute_v1.InstanceList())


@action("instances.aggregatedList")
def aggregated(call: Call) -> Message:
    call.demand("instances.list")
    return call.page(call.world.instances.values(), message, compute_v1.InstanceAggregatedList())


@action("instances.attachDisk")
def attach(call: Call) -> Message:
    world, asked, instance = call.world, call.request.attached_disk_resource, _existing(call, "attachDisk")
    mode = asked.mode or "READ_WRITE"
    if mode not in ("READ_WRITE", "READ_ONLY"):
        raise invalid("resource.mode", mode, "It is READ_WRITE or READ_ONLY.")
    interface = asked.interface or "SCSI"  # of most machine types
    if interface not in ("SCSI", "NVME"):
        raise invalid("resource.interface", interface, "It is SCSI or NVME.")
    if not asked.source:
        raise Refusal("required", "Required field 'resource.source' not specified")
    path = world.path(asked.source, "resource.source")
    call.demand("disks.use" if mode == "READ_WRITE" else "disks.useReadOnly", path)
    disk = world.find(world.disks, path, path)
    if instance.zone not in disk.zones:
        raise invalid("resource.source", asked.source, "Disk must be in the same zone as the instance.")
    if disk.users:
        raise disks.in_use(world, disk.path, disk.users[0])
    if world.disk_status(disk) != "READY":
        raise Refusal("resourceNotReady", f"The resource '{world.full(disk.path)}' is not ready")
    if instance.status not in ("RUNNING", "TERMINATED"):
        raise Refusal("resourceNotReady", f"The resource '{world.full(instance.path)}' is not ready")
    names = {each.device_name for each in instance.disks}
    free = next(name for k in range(len(names) + 1) if (name := f"persistent-disk-{k}") not in names)
    name = asked.device_name or free
    if name in names:
        raise invalid("resource.deviceName", name, "The instance has a disk of that device name.")
    if len(names) >= world.limits.attached:
        raise Refusal("limitExceeded", f"Exceeded limit 'maximum_persistent_disks' on resource '{instance.name}'.")
    how = Attached(disk.path, name, asked.boot, asked.auto_delete, mode, interface)
    with_bytes = world.bytes is not None and (world.bytes.live / disk.bytes).exists()
    return call.begin("attachDisk", instance, lambda: world.join(instance, disk, how, with_bytes=with_bytes))


@action("instances.detachDisk")
def detach(call: Call) -> Message:
    """The operation isn't done before the kernel has let go of the disk: not while it is mounted, unless it `pulls`."""
    world, instance, name = call.world, _existing(call, "detachDisk"), call.request.device_name
    how = next((each for each in instance.disks if each.device_name == name), None)
    if how is None:
        raise invalid("deviceName", name, "No attached disk found with that device name.")
    if how.boot and instance.status != "TERMINATED":
        raise invalid("deviceName", name, "A boot disk can't be detached from a running instance.")
    return call.begin(
        "detachDisk", instance, lambda: world.part(instance, how), until=lambda: how not in instance.disks
    )
