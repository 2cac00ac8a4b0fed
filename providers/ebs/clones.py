"""Attachments: volumes made of a set's snapshots, attached to this instance or another. Must know no policy, and mount
nothing.

The record is in the tags that the volume is born with, so whatever a dead run had made is found by them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from providers.ebs import tags, volumes
from providers.ebs.api import Api
from providers.ebs.here import Here
from snapshotter.core.errors import NotFoundError, PreconditionError, StorageError
from snapshotter.core.model import Access, Attachment, Elsewhere, MountSpec, Purpose, Snapshot
from snapshotter.core.remote import operation_id, poll
from snapshotter.host import processes
from snapshotter.host.disks import Disks, Part, copy_mount
from snapshotter.host.places import host_name
from snapshotter.provider import Settings

#: option -> parameter of CreateVolume
_WANTED = {
    "volume_type": "VolumeType",
    "iops": "Iops",
    "throughput": "Throughput",
    "kms_key": "KmsKeyId",
    "initialization_rate": "VolumeInitializationRate",
}
_PARTITION_S = 30.0


class Clones:
    """For one call, on the instance `here` or, where that is None, off EC2."""

    def __init__(self, api: Api, here: Here | None, disks: Disks, settings: Settings) -> None:
        self.api, self.here, self.disks, self.settings = api, here, disks, settings

    def attach(
        self, snapshot: Snapshot, attachment_id: str, access: Access, destination: str, purpose: Purpose
    ) -> MountSpec:
        birth, here = snapshot.birth, self.here
        if here is None:
            why = "this is no EC2 instance"
            raise PreconditionError(why, object=snapshot.id, cure="restore it on an instance, or with --away")
        item = restorable(self.api, snapshot)
        kind, partition = tags.file_system(tags.read(item), birth.member)
        if kind == "btrfs":
            # Two disks of one btrfs confuse the kernel as soon as it sees them.
            self.disks.refuse_beside(self.disks.find(tags.serial(snapshot.volume), tags.BY_ID), snapshot.id)
        maker = processes.identity(os.getpid())
        born = tags.of_attachment(
            attachment_id, birth.set_id, birth.member, destination, access, purpose, here.instance, maker
        )
        report = self.settings.report
        volume = volumes.make(self.api, self._wanted(snapshot, attachment_id, here.zone), born, report)
        volumes.attach(self.api, volume, here.instance, report)
        disk = volumes.appeared(self.api, self.disks, volume, report)
        within = self.api.deadline(f"partition {partition} of {volume}", _PARTITION_S)
        device = poll(lambda: self.disks.device(Part(disk, partition)), within, first_s=0.1, most_s=1.0)
        return copy_mount(device, kind, access is Access.READ_ONLY)

    def away(self, snapshot: Snapshot, attachment_id: str) -> Elsewhere:
        """For the instance, or else the zone, that the options name. Raises PreconditionError if neither does, or the
        instance is in another zone."""
        options, birth, report = self.settings.options, snapshot.birth, self.settings.report
        instance, zone = str(options.get("instance") or ""), str(options.get("zone") or "")
        if instance:
            about = volumes.of_instance(self.api, instance, self.api.deadline(instance))
            if zone not in ("", where := str(about["Placement"]["AvailabilityZone"])):
                raise PreconditionError(f"is in {where}", object=instance, cure=f"-o zone={where}, or leave it out")
            zone = where
        zone = zone or (self.here.zone if self.here else "")
        if not zone:
            cure = "-o instance=, or -o zone= for volumes that are attached to none"
            raise PreconditionError("is to be made in which zone?", object=snapshot.id, cure=cure)
        restorable(self.api, snapshot)
        maker = processes.identity(os.getpid())
        born = tags.of_attachment(
            attachment_id, birth.set_id, birth.member, "", Access.WRITABLE, Purpose.RESTORE, instance, maker
        )
        born[tags.AWAY] = _host()
        volume = volumes.make(self.api, self._wanted(snapshot, attachment_id, zone), born, report)
        if not instance:
            return Elsewhere(volume)
        volumes.attach(self.api, volume, instance, report)
        # Requested names mean nothing on Nitro: the volume's own link does.
        return Elsewhere(volume, instance, f"/dev/disk/by-id/{tags.BY_ID}{tags.serial(volume)}")

    def _wanted(self, snapshot: Snapshot, attachment_id: str, zone: str) -> dict[str, Any]:
        """CreateVolume's parameters."""
        options = self.settings.options
        wanted: dict[str, Any] = {
            "SnapshotId": snapshot.id,
            "AvailabilityZone": zone,
            "ClientToken": operation_id("attach", attachment_id, snapshot.id),
            "VolumeType": "gp3",
            **{parameter: options[option] for option, parameter in _WANTED.items() if option in options},
        }
        if "KmsKeyId" in wanted:
            wanted["Encrypted"] = True
        return wanted

    def _all(self) -> Iterator[tuple[dict[str, Any], Attachment]]:
        """Volumes that are attachments on this instance, and those made for another machine: by this host, or by
        another once they are complete. Another instance's are its own."""
        within = self.api.deadline("the list of attachments")
        for item in volumes.described(self.api, within, {"tag-key": [tags.ATTACHMENT]}):
            labels = tags.read(item)
            found = tags.attachment_of(labels)
            if found is None or item["State"] in ("deleting", "deleted"):
                continue
            host = labels.get(tags.AWAY)
            away = host is not None and (found.since is not None or host == _host())
            if away or (host is None and self.here is not None and labels.get(tags.INSTANCE) == self.here.instance):
                yield item, found

    def _of(self, attachment_id: str) -> list[str]:
        return [item["VolumeId"] for item, found in self._all() if found.id == attachment_id]

    def listed(self) -> Iterator[Attachment]:
        for item, found in self._all():
            maker = tags.maker_of(tags.read(item))
            held = maker is not None and processes.alive(maker)
            yield msgspec.structs.replace(found, held=held)

    def settle(self, attachment_id: str, since: datetime) -> None:
        ours = self._of(attachment_id)
        if not ours:
            raise NotFoundError("no such attachment", object=attachment_id)
        volumes.tag(self.api, ours, {tags.SINCE: since.astimezone(UTC).isoformat(), tags.MAKER: ""})

    def detach(self, attachment_id: str) -> None:
        ours = self._of(attachment_id)
        for volume in ours if self.here is not None else ():
            self.disks.refuse_mounted(self.disks.find(tags.serial(volume), tags.BY_ID), volume)
        for volume in ours:
            volumes.remove(self.api, volume, self.settings.report)


def _host() -> str:
    """This host in few letters, the same under every name of it."""
    return host_name().rpartition("-")[2]


def restorable(api: Api, snapshot: Snapshot) -> dict[str, Any]:
    """What EC2 says of a snapshot that is to be restored now. Raises NotFoundError, StorageError (no image),
    PreconditionError (not yet)."""
    within = api.deadline(snapshot.id)
    item: dict[str, Any] = api.call("describe_snapshots", within, SnapshotIds=[snapshot.id])["Snapshots"][0]
    if item["State"] == "error":
        raise StorageError("has no valid image", object=snapshot.id, cure="restore another set")
    if item["State"] != "completed":
        why = f"EC2 still copies it ({item.get('Progress', '?')})"
        raise PreconditionError(why, object=snapshot.id, cure="wait until it is ready")
    return item
