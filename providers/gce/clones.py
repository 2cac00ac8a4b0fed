"""Attachments: disks made of a set's snapshots, attached to this instance, or made for another machine. Must know no
policy, and mount nothing.

The record is in what the disk is born with, so whatever a dead run had made is found by it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec

from providers.gce import disks, labels, taking
from providers.gce.api import Api
from providers.gce.devices import devices
from providers.gce.here import Here
from providers.gce.names import BY_ID, Disk, disk, disk_of, member_name, region_of
from snapshotter.core.errors import NotFoundError, PreconditionError, StorageError
from snapshotter.core.model import Access, Attachment, Elsewhere, MountSpec, Purpose, Snapshot
from snapshotter.core.remote import poll
from snapshotter.host import processes
from snapshotter.host.disks import Disks, Part, copy_mount
from snapshotter.host.places import host_name
from snapshotter.provider import Settings

_PARTITION_S = 30.0


class Clones:
    """On one instance, or on none, for one call."""

    def __init__(self, api: Api, here: Here | None, host: Disks, settings: Settings) -> None:
        self.api, self.host, self.settings = api, host, settings
        self.number, self.zone = (here.number, here.zone) if here else ("", "")
        self.instance = f"{here.zone}/{here.instance}" if here else ""

    def attach(
        self, snapshot: Snapshot, attachment_id: str, access: Access, destination: str, purpose: Purpose
    ) -> MountSpec:
        birth = snapshot.birth
        if not self.instance:
            why = "this is no Compute Engine instance"
            raise PreconditionError(why, object=snapshot.id, cure="restore it on one, or with --away")
        item = restorable(self.api, snapshot)
        kind, partition = labels.file_system(item)
        if kind == "btrfs":
            self.host.refuse_beside(origin_here(self.api, self.host, disk(snapshot.volume), self.instance), snapshot.id)
        maker = processes.identity(os.getpid())
        born = labels.of_attachment(
            attachment_id, birth.set_id, birth.member, destination, access, purpose, self.number, maker
        )
        name = member_name(attachment_id, birth.member)
        which, wanted = self.wanted(name, self.zone)
        report = self.settings.report
        disks.make(self.api, which, {**wanted, **born, "source_snapshot": source(self.api, snapshot)}, report)
        disks.attach(self.api, which, self.instance, {"device_name": name}, report)
        found = disks.appeared(self.api, self.host, name, report)
        within = self.api.deadline(f"partition {partition} of {which.id}", _PARTITION_S)
        device = poll(lambda: self.host.device(Part(found, partition)), within, first_s=0.1, most_s=1.0)
        return copy_mount(device, kind, access is Access.READ_ONLY)

    def away(self, snapshot: Snapshot, attachment_id: str) -> Elsewhere:
        """For the instance or the zone that the options name."""
        options, birth, report = self.settings.options, snapshot.birth, self.settings.report
        zone, _, name = str(options.get("instance") or "").rpartition("/")
        zone = zone or str(options.get("zone") or "") or self.zone
        if not zone:
            raise PreconditionError("is to be made in which zone?", object=snapshot.id, cure="-o zone=")
        restorable(self.api, snapshot)
        number = "none"
        if name:
            within = self.api.deadline(f"{zone}/{name}")
            number = str(self.api.call("Instances.get", within, zone=zone, instance=name).id)
        maker = processes.identity(os.getpid())
        born = labels.of_attachment(
            attachment_id, birth.set_id, birth.member, "", Access.WRITABLE, Purpose.RESTORE, number, maker
        )
        born["labels"][labels.AWAY] = self._host()
        disk_name = member_name(attachment_id, birth.member)
        which, wanted = self.wanted(disk_name, zone)
        disks.make(self.api, which, {**wanted, **born, "source_snapshot": source(self.api, snapshot)}, report)
        if not name:
            return Elsewhere(which.id)
        disks.attach(self.api, which, f"{zone}/{name}", {"device_name": disk_name}, report)
        return Elsewhere(which.id, f"{zone}/{name}", f"/dev/disk/by-id/{BY_ID}{disk_name}")

    def _host(self) -> str:
        return host_name().rpartition("-")[2]

    def wanted(self, name: str, zone: str) -> tuple[Disk, dict[str, Any]]:
        """Where a new disk is made, and what the options say of it."""
        options = self.settings.options
        zones = [each.strip() for each in str(options.get("replica_zones") or "").split(",") if each.strip()]
        if zones and zone not in zones:
            cure = "it is to be attached there"
            raise PreconditionError(f"must have {zone} among them", object="replica_zones", cure=cure)
        which = Disk(region_of(zone) if zones else zone, name)
        wanted: dict[str, Any] = {
            "type_": disks.type_link(self.api.project, which, str(options.get("disk_type") or "pd-balanced"))
        }
        if zones:
            wanted["replica_zones"] = [f"projects/{self.api.project}/zones/{each}" for each in zones]
        for option in ("provisioned_iops", "provisioned_throughput"):
            if option in options:
                wanted[option] = options[option]
        if key := options.get("kms_key"):
            wanted["disk_encryption_key"] = {"kms_key_name": key}
        return which, wanted

    def _all(self) -> Iterator[tuple[Disk, Any, Attachment]]:
        """Disks that are attachments on this instance, and those made for another machine: by this host, or by another
        once they are complete. Another instance's are its own."""
        within = self.api.deadline("the list of attachments")
        for item in disks.labelled(self.api, within, f"labels.{labels.ATTACHMENT}:*"):
            which, found = disk_of(item.self_link), labels.attachment_of(item)
            if found is None or which is None:
                continue
            host = item.labels.get(labels.AWAY)
            away = host is not None and (found.since is not None or host == self._host())
            if away or (host is None and self.number and item.labels.get(labels.INSTANCE) == self.number):
                yield which, item, found

    def _of(self, attachment_id: str) -> list[Disk]:
        return [which for which, _, found in self._all() if found.id == attachment_id]

    def listed(self) -> Iterator[Attachment]:
        for _, item, found in self._all():
            maker = labels.maker_of(item.labels)
            yield msgspec.structs.replace(found, held=maker is not None and processes.alive(maker))

    def settle(self, attachment_id: str, since: datetime) -> None:
        ours = self._of(attachment_id)
        if not ours:
            raise NotFoundError("no such attachment", object=attachment_id)
        for which in ours:
            within = self.api.deadline(which.id)
            changes = {labels.SINCE: labels.since(since), labels.MAKER: None}
            taking.relabel(self.api, "Disks", within, which.id, changes)

    def detach(self, attachment_id: str) -> None:
        ours = self._of(attachment_id)
        for which in ours:  # the device's name is the disk's
            self.host.refuse_mounted(devices(self.host).get(which.name), which.id)
        for which in ours:
            disks.remove(self.api, which, self.settings.report)


def origin_here(api: Api, host: Disks, which: Disk, instance: str) -> str | None:
    """The kernel name of a disk that is attached to this instance; None if it isn't."""
    how = disks.attached_as(api, which, instance, api.deadline(which.id))
    return devices(host).get(how.device_name) if how is not None else None


def source(api: Api, snapshot: Snapshot) -> str:
    return f"projects/{api.project}/global/snapshots/{snapshot.id}"


def restorable(api: Api, snapshot: Snapshot) -> Any:
    """What is said of a snapshot that is to be restored now. Raises NotFoundError, StorageError (no image),
    PreconditionError (not yet)."""
    item = api.call("Snapshots.get", api.deadline(snapshot.id), snapshot=snapshot.id)
    if item.status in ("FAILED", "DELETING"):
        raise StorageError("has no valid image", object=snapshot.id, cure="restore another set")
    if item.status != "READY":
        why = f"Compute Engine still copies it ({item.status})"
        raise PreconditionError(why, object=snapshot.id, cure="wait until it is ready")
    return item
