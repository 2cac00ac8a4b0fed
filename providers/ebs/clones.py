"""Attachments: volumes made of a set's snapshots, attached to this instance. Must know no policy, and mount nothing.

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
from snapshotter.core.model import Access, Attachment, MountSpec, Purpose, Snapshot
from snapshotter.core.remote import operation_id, poll
from snapshotter.host import processes
from snapshotter.host.disks import Disks, Part, copy_mount
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
    """On one instance, for one call."""

    def __init__(self, api: Api, here: Here, disks: Disks, settings: Settings) -> None:
        self.api, self.here, self.disks, self.settings = api, here, disks, settings

    def attach(
        self, snapshot: Snapshot, attachment_id: str, access: Access, destination: str, purpose: Purpose
    ) -> MountSpec:
        birth = snapshot.birth
        item = restorable(self.api, snapshot)
        kind, partition = tags.file_system(tags.read(item), birth.member)
        if kind == "btrfs":
            # Two disks of one btrfs confuse the kernel as soon as it sees them.
            self.disks.refuse_beside(self.disks.find(tags.serial(snapshot.volume), tags.BY_ID), snapshot.id)
        maker = processes.identity(os.getpid())
        born = tags.of_attachment(
            attachment_id, birth.set_id, birth.member, destination, access, purpose, self.here.instance, maker
        )
        options = self.settings.options
        wanted: dict[str, Any] = {
            "SnapshotId": snapshot.id,
            "AvailabilityZone": self.here.zone,
            "ClientToken": operation_id("attach", attachment_id, snapshot.id),
            "VolumeType": "gp3",
            **{parameter: options[option] for option, parameter in _WANTED.items() if option in options},
        }
        if "KmsKeyId" in wanted:
            wanted["Encrypted"] = True
        report = self.settings.report
        volume = volumes.make(self.api, wanted, born, report)
        volumes.attach(self.api, volume, self.here.instance, report)
        disk = volumes.appeared(self.api, self.disks, volume, report)
        within = self.api.deadline(f"partition {partition} of {volume}", _PARTITION_S)
        device = poll(lambda: self.disks.device(Part(disk, partition)), within, first_s=0.1, most_s=1.0)
        return copy_mount(device, kind, access is Access.READ_ONLY)

    def _all(self) -> Iterator[tuple[dict[str, Any], Attachment]]:
        """Volumes that are attachments on this instance. Another instance's are its own."""
        filters = {f"tag:{tags.INSTANCE}": [self.here.instance], "tag-key": [tags.ATTACHMENT]}
        for item in volumes.described(self.api, self.api.deadline("the list of attachments"), filters):
            labels = tags.read(item)
            found = tags.attachment_of(labels)
            gone = item["State"] in ("deleting", "deleted")
            if found is not None and labels.get(tags.INSTANCE) == self.here.instance and not gone:
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
        for volume in ours:
            self.disks.refuse_mounted(self.disks.find(tags.serial(volume), tags.BY_ID), volume)
        for volume in ours:
            volumes.remove(self.api, volume, self.settings.report)


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
