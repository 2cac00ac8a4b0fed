"""Attachments: disks made of a set's snapshots, attached to this instance, or made for another machine. Must know no
policy, and mount nothing.

The record is in what the disk is born with, so whatever a dead run had made is found by it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from providers.gce import disks, labels, taking
from providers.gce.api import Api
from providers.gce.devices import devices
from providers.gce.here import Here
from providers.gce.names import BY_ID, Disk, disk, disk_of, member_names, region_of
from snapshotter.core.errors import NotFoundError, PreconditionError, StorageError
from snapshotter.core.model import Access, Attachment, Elsewhere, MountSpec, Purpose, Snapshot
from snapshotter.core.remote import poll
from snapshotter.host import processes
from snapshotter.host.cloud import joined, parts
from snapshotter.host.disks import Disks, Part, alone, copy_mount, refuse_inactive, refuse_meeting
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
        items = [restorable(self.api, part) for part in parts(snapshot.id)]
        kind, partition = labels.file_system(items[0])
        refuse_inactive(kind, snapshot.id)
        if kind in ("btrfs", ""):  # '': taken from outside, it may be anything
            for origin in map(disk, parts(snapshot.volume)):
                self.host.refuse_beside(origin_here(self.api, self.host, origin, self.instance), snapshot.id)
        maker = processes.identity(os.getpid())
        born = labels.of_attachment(
            attachment_id, birth.set_id, birth.member, destination, access, purpose, self.number, maker
        )
        report = self.settings.report
        made = self._made(snapshot, items, attachment_id, self.zone, born)
        found = []
        for which in made:
            disks.attach(self.api, which, self.instance, {"device_name": which.name}, report)
            seen = Part(disks.appeared(self.api, self.host, which.name, report), partition)
            within = self.api.deadline(f"partition {partition} of {which.id}", _PARTITION_S)
            found.append(poll(lambda seen=seen: self.host.device(seen), within, first_s=0.1, most_s=1.0))  # type: ignore[misc]
        return copy_mount(found[0], kind, access is Access.READ_ONLY, found[1:])

    def _made(
        self, snapshot: Snapshot, items: Sequence[Any], attachment_id: str, zone: str, born: Mapping[str, Any]
    ) -> list[Disk]:
        """A disk of each of the member's snapshots, as the options say."""
        made = []
        named = member_names(attachment_id, snapshot.birth.member, snapshot.volume)
        for name, item in zip(named, items, strict=True):
            which, wanted = self.wanted(item, name, zone)
            body = {**wanted, **born, "source_snapshot": source(self.api, item.name)}
            disks.make(self.api, which, body, self.settings.report)
            made.append(which)
        return made

    def foresee(self, snapshot: Snapshot) -> list[str]:
        """What its disks will be, how their blocks come, and what is paid for."""
        size = sum(int(restorable(self.api, part).disk_size_gb) for part in parts(snapshot.id))
        kind = self.settings.options.get("disk_type") or "pd-balanced"
        made = f"{snapshot.volume} comes back as {size} GiB of {kind}, paid for as long as it exists"
        return [f"{made}; until all of its blocks are there, which takes its time, it reads slowly"]

    def away(self, snapshot: Snapshot, attachment_id: str) -> Elsewhere:
        """For the instance or the zone that the options name."""
        options, birth, report = self.settings.options, snapshot.birth, self.settings.report
        zone, _, name = str(options.get("instance") or "").rpartition("/")
        zone = zone or str(options.get("zone") or "") or self.zone
        if not zone:
            raise PreconditionError("is to be made in which zone?", object=snapshot.id, cure="-o zone=")
        items = [restorable(self.api, part) for part in parts(snapshot.id)]
        kind, number = labels.file_system(items[0])[0], "none"
        if name:
            within = self.api.deadline(f"{zone}/{name}")
            about = self.api.call("Instances.get", within, zone=zone, instance=name)
            number = str(about.id)
            if alone(kind):
                there = {each.id for each in (disk_of(attached.source) for attached in about.disks) if each is not None}
                refuse_meeting(kind, bool(there & set(parts(snapshot.volume))), snapshot.id)
        maker = processes.identity(os.getpid())
        born = labels.of_attachment(
            attachment_id, birth.set_id, birth.member, "", Access.WRITABLE, Purpose.RESTORE, number, maker
        )
        born["labels"][labels.AWAY] = self._host()
        made = self._made(snapshot, items, attachment_id, zone, born)
        if not name:
            return Elsewhere(joined(each.id for each in made))
        for each in made:
            disks.attach(self.api, each, f"{zone}/{name}", {"device_name": each.name}, report)
        devices = joined(f"/dev/disk/by-id/{BY_ID}{each.name}" for each in made)
        return Elsewhere(joined(each.id for each in made), f"{zone}/{name}", devices)

    def _host(self) -> str:
        return host_name().rpartition("-")[2]

    def wanted(self, item: Any, name: str, zone: str) -> tuple[Disk, dict[str, Any]]:
        """Where a new disk of a snapshot is made, and what the options say of it."""
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
        # A disk isn't promised its snapshot's key: without one it would be Google's.
        if key := options.get("kms_key") or key_of(item.snapshot_encryption_key):
            wanted["disk_encryption_key"] = {"kms_key_name": key}
        return which, wanted

    def _all(self, zone: str = "") -> Iterator[tuple[Disk, Any, Attachment]]:
        """Disks that are attachments on this instance, and those made for another machine: by this host, or by another
        once they are complete. Another instance's are its own."""
        within = self.api.deadline("the list of attachments")
        for item in disks.labelled(self.api, within, f"labels.{labels.ATTACHMENT}:*", zone):
            which, found = disk_of(item.self_link), labels.attachment_of(item)
            if found is None or which is None:
                continue
            host = item.labels.get(labels.AWAY)
            away = host is not None and (found.since is not None or host == self._host())
            if away or (host is None and self.number and item.labels.get(labels.INSTANCE) == self.number):
                yield which, item, found

    def _of(self, attachment_id: str) -> list[tuple[Disk, Attachment]]:
        """All of one attachment's disks are in one place. Here first: when another zone is lost, a restore goes on."""
        for zone in [self.zone, ""] if self.zone else [""]:
            if ours := [(which, found) for which, _, found in self._all(zone) if found.id == attachment_id]:
                return ours
        return []

    def listed(self) -> Iterator[Attachment]:
        """By disk: a member may be several."""
        for _, item, found in self._all():
            maker = labels.maker_of(item.labels)
            yield msgspec.structs.replace(found, held=maker is not None and processes.alive(maker))

    def settle(self, attachment_id: str, since: datetime) -> None:
        ours = self._of(attachment_id)
        if not ours:
            raise NotFoundError("no such attachment", object=attachment_id)
        for which, _ in ours:
            within = self.api.deadline(which.id)
            changes = {labels.SINCE: labels.since(since), labels.MAKER: None}
            taking.relabel(self.api, "Disks", within, which.id, changes)

    def detach(self, attachment_id: str) -> None:
        ours = self._of(attachment_id)
        for which, found in ours:
            self.host.refuse_mounted(devices(self.host).get(which.name), which.id)  # the device's name is the disk's
            if found.since is not None:  # a restore that isn't through has told nobody of it
                disks.refuse_elsewhere(self.api, which, self.instance)
        for which, _ in ours:
            disks.remove(self.api, which, self.settings.report)


def origin_here(api: Api, host: Disks, which: Disk, instance: str) -> str | None:
    """The kernel name of a disk that is attached to this instance; None if it isn't."""
    how = disks.attached_as(api, which, instance, api.deadline(which.id))
    return devices(host).get(how.device_name) if how is not None else None


def key_of(encryption: Any) -> str:
    """The Cloud KMS key, not the version of it that was used; '' if it is Google's own."""
    return str(encryption.kms_key_name).partition("/cryptoKeyVersions/")[0]


def source(api: Api, name: str) -> str:
    return f"projects/{api.project}/global/snapshots/{name}"


def restorable(api: Api, name: str) -> Any:
    """What is said of a snapshot that is to be restored now. Raises NotFoundError, StorageError (no image),
    PreconditionError (not yet)."""
    item = api.call("Snapshots.get", api.deadline(name), snapshot=name)
    if item.status in ("FAILED", "DELETING"):
        raise StorageError("has no valid image", object=name, cure="restore another set")
    if item.status != "READY":
        why = f"Compute Engine still copies it ({item.status})"
        raise PreconditionError(why, object=name, cure="wait until it is ready")
    return item
