"""Attachments: volumes made of a set's snapshots, attached to this instance or another. Must know no policy, and mount
nothing.

The record is in the tags that the volume is born with, so whatever a dead run had made is found by them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from providers.ebs import sets, tags, volumes
from providers.ebs.api import Api
from providers.ebs.here import Here
from snapshotter.core.errors import NotFoundError, PreconditionError, StorageError
from snapshotter.core.model import Access, Attachment, Elsewhere, MountSpec, Purpose, Snapshot
from snapshotter.core.remote import operation_id, poll
from snapshotter.host import processes
from snapshotter.host.cloud import joined, parts
from snapshotter.host.disks import Disks, Part, alone, copy_mount, refuse_inactive, refuse_meeting
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
_RATES = (100, 300)  # MiB/s that EC2 takes as an initialization rate
_GP3_DOLLARS = 0.08  # per GiB and month


class Clones:
    """For one call, on the instance `here` or, where that is None, off EC2."""

    def __init__(self, api: Api, here: Here | None, disks: Disks, settings: Settings) -> None:
        self.api, self.here, self.disks, self.settings = api, here, disks, settings

    def attach(
        self, snapshot: Snapshot, attachment_id: str, access: Access, destination: str, purpose: Purpose
    ) -> MountSpec:
        if self.here is None:
            cure = "restore it on an instance, or with --away"
            raise PreconditionError("this is no EC2 instance", object=snapshot.id, cure=cure)
        birth, instance, report = snapshot.birth, self.here.instance, self.settings.report
        items = [restorable(self.api, part) for part in parts(snapshot.id)]
        kind, partition = tags.file_system(tags.read(items[0]), birth.member)
        refuse_inactive(kind, snapshot.id)
        if kind in ("btrfs", ""):  # '': taken from outside, it may be anything
            for origin in parts(snapshot.volume):
                self.disks.refuse_beside(self.disks.find(tags.serial(origin), tags.BY_ID), snapshot.id)
        born = tags.of_attachment(
            attachment_id, birth.set_id, birth.member, destination, access, purpose, instance, _maker()
        )
        made = [self._made(each, attachment_id, self.here.zone, born) for each in parts(snapshot.id)]
        found = []
        for volume in made:
            volumes.attach(self.api, volume, instance, report)
            disk = volumes.appeared(self.api, self.disks, volume, report)
            within = self.api.deadline(f"partition {partition} of {volume}", _PARTITION_S)
            part = Part(disk, partition)
            found.append(poll(lambda part=part: self.disks.device(part), within, first_s=0.1, most_s=1.0))  # type: ignore[misc]
        return copy_mount(found[0], kind, access is Access.READ_ONLY, found[1:])

    def foresee(self, snapshot: Snapshot) -> list[str]:
        """What its volumes will be, how fast their blocks come, and what is paid for."""
        options = self.settings.options
        kind, rate = str(options.get("volume_type") or "gp3"), options.get("initialization_rate")
        size = sum(int(restorable(self.api, part)["VolumeSize"]) for part in parts(snapshot.id))
        price = f" (in us-east-1 {size * _GP3_DOLLARS:.2f} $ a month by 2025's list)" if kind == "gp3" else ""
        made = f"{snapshot.volume} comes back as {size} GiB of {kind}, paid for as long as it exists{price}"
        if isinstance(rate, int):
            return [f"{made}; EC2 fills it at {rate} MiB/s, in {_time(size, rate)}, and charges for that by the GiB"]
        most = _RATES[1]
        offer = f"-o initialization_rate={most}, which costs, has all of them there in {_time(size, most)}"
        return [f"{made}; its blocks come slowly, as they are first read, at no rate that EC2 promises: {offer}"]

    def away(self, snapshot: Snapshot, attachment_id: str) -> Elsewhere:
        """For the instance or the zone that the options name, else this instance's zone."""
        options, birth, report = self.settings.options, snapshot.birth, self.settings.report
        instance, zone = str(options.get("instance") or ""), str(options.get("zone") or "")
        if instance:
            about = volumes.of_instance(self.api, instance, self.api.deadline(instance))
            theirs = str(about["Placement"]["AvailabilityZone"])
            if zone not in ("", theirs):
                cure = f"-o zone={theirs}, or leave it out"
                raise PreconditionError(f"is in {theirs}", object=instance, cure=cure)
            zone = theirs
        zone = zone or (self.here.zone if self.here else "")
        if not zone:
            cure = "-o instance=, or -o zone= for volumes that are attached to none"
            raise PreconditionError("is to be made in which zone?", object=snapshot.id, cure=cure)
        items = [restorable(self.api, each) for each in parts(snapshot.id)]
        kind = tags.file_system(tags.read(items[0]), birth.member)[0]
        if instance and alone(kind):
            for origin in parts(snapshot.volume):
                found = volumes.look(self.api, origin, self.api.deadline(origin)) or {}
                refuse_meeting(kind, volumes.attached_to(found)[0] == instance, snapshot.id)
        born = tags.of_attachment(
            attachment_id,
            birth.set_id,
            birth.member,
            "",
            Access.WRITABLE,
            Purpose.RESTORE,
            instance,
            _maker(),
        )
        born[tags.AWAY] = _host()
        made = [self._made(each, attachment_id, zone, born) for each in parts(snapshot.id)]
        if not instance:
            return Elsewhere(joined(made))
        for volume in made:
            volumes.attach(self.api, volume, instance, report)
        devices = [f"/dev/disk/by-id/{tags.BY_ID}{tags.serial(volume)}" for volume in made]
        return Elsewhere(joined(made), instance, joined(devices))

    def _made(self, part: str, attachment_id: str, zone: str, born: Mapping[str, str]) -> str:
        """A volume of one EBS snapshot, as the options say."""
        options = self.settings.options
        wanted: dict[str, Any] = {
            "SnapshotId": part,
            "AvailabilityZone": zone,
            "ClientToken": operation_id("attach", attachment_id, part),
            "VolumeType": "gp3",
            **{parameter: options[option] for option, parameter in _WANTED.items() if option in options},
        }
        if "KmsKeyId" in wanted:
            wanted["Encrypted"] = True
        return volumes.make(self.api, wanted, born, self.settings.report)

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
        """By volume: a member may be several."""
        for item, found in self._all():
            maker = tags.maker_of(tags.read(item))
            yield msgspec.structs.replace(found, held=maker is not None and processes.alive(maker))

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


def _time(gib: int, rate: int) -> str:
    seconds = -(-gib * 1024 // rate)
    return (
        f"{seconds} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    )


def _maker() -> tuple[int, int] | None:
    return processes.identity(os.getpid())


def _host() -> str:
    """This machine, in few letters."""
    return host_name().rpartition("-")[2]


def restorable(api: Api, name: str) -> dict[str, Any]:
    """What EC2 says of an EBS snapshot that is to be restored now. Raises NotFoundError, StorageError (no image),
    PreconditionError (not yet)."""
    within = api.deadline(name)
    item: dict[str, Any] = api.call("describe_snapshots", within, SnapshotIds=[name])["Snapshots"][0]
    if item["State"] == "error":
        raise StorageError("has no valid image", object=name, cure="restore another set")
    if item["State"] != "completed":
        why = f"EC2 still copies it ({item.get('Progress', '?')})"
        raise PreconditionError(why, object=name, cure="wait until it is ready")
    if sets.is_archived(item):
        raise PreconditionError("is archived", object=name, cure=f"{sets.unarchive(name)}, which takes up to 72 hours")
    return item
