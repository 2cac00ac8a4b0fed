"""Attachments: disks made of a set's snapshots, attached to this instance. Must know no policy, and mount nothing.

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
from providers.gce.names import Disk, disk, disk_of, member_name
from snapshotter.core.errors import NotFoundError, PreconditionError, StorageError
from snapshotter.core.model import Access, Attachment, MountSpec, Purpose, Snapshot
from snapshotter.core.remote import poll
from snapshotter.host import processes
from snapshotter.host.disks import Disks, Part, copy_mount
from snapshotter.provider import Settings

_PARTITION_S = 30.0


class Clones:
    """On one instance, for one call."""

    def __init__(self, api: Api, here: Here, host: Disks, settings: Settings) -> None:
        self.api, self.here, self.host, self.settings = api, here, host, settings
        self.instance = f"{here.zone}/{here.instance}"

    def attach(
        self, snapshot: Snapshot, attachment_id: str, access: Access, destination: str, purpose: Purpose
    ) -> MountSpec:
        birth = snapshot.birth
        item = restorable(self.api, snapshot)
        kind, partition = labels.file_system(item)
        if kind == "btrfs":
            self.host.refuse_beside(origin_here(self.api, self.host, disk(snapshot.volume), self.instance), snapshot.id)
        maker = processes.identity(os.getpid())
        born = labels.of_attachment(
            attachment_id, birth.set_id, birth.member, destination, access, purpose, self.here.number, maker
        )
        name = member_name(attachment_id, birth.member)
        which, wanted = self.wanted(name)
        report = self.settings.report
        disks.make(self.api, which, {**wanted, **born, "source_snapshot": source(self.api, snapshot)}, report)
        disks.attach(self.api, which, self.instance, {"device_name": name}, report)
        found = disks.appeared(self.api, self.host, name, report)
        within = self.api.deadline(f"partition {partition} of {which.id}", _PARTITION_S)
        device = poll(lambda: self.host.device(Part(found, partition)), within, first_s=0.1, most_s=1.0)
        return copy_mount(device, kind, access is Access.READ_ONLY)

    def wanted(self, name: str) -> tuple[Disk, dict[str, Any]]:
        """Where a new disk is made, and what the options say of it."""
        options, zone = self.settings.options, self.here.zone
        zones = [each.strip() for each in str(options.get("replica_zones") or "").split(",") if each.strip()]
        if zones and zone not in zones:
            raise PreconditionError(
                f"must have {zone} among them", object="replica_zones", cure="this instance is there"
            )
        which = Disk(self.here.region if zones else zone, name)
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
        """Disks that are attachments on this instance. Another instance's are its own."""
        within = self.api.deadline("the list of attachments")
        for item in disks.labelled(self.api, within, f'labels.{labels.INSTANCE}="{self.here.number}"'):
            which, found = disk_of(item.self_link), labels.attachment_of(item)
            if found is not None and which is not None and item.labels.get(labels.INSTANCE) == self.here.number:
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
