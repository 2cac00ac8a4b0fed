"""A volume made from a snapshot takes its origin's place: the origin is detached, the other attached under its device
name. Must know no mount's path: nothing of either is mounted meanwhile.

The record is in the tags that the new volume is born with; the origin is tagged as set aside before it is touched. A
step that is done already is done, so `swap_back` ends as it began, wherever the swap was killed. After a commit the new
volume is an ordinary one, with the origin's own tags: its id is another, and the mount must be claimed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from providers.ebs import tags, volumes
from providers.ebs.api import Api
from providers.ebs.clones import restorable
from providers.ebs.here import Here
from snapshotter.core.errors import BusyError, PreconditionError, StorageError
from snapshotter.core.model import Report, Snapshot
from snapshotter.core.remote import operation_id
from snapshotter.host.cloud import parts
from snapshotter.host.disks import Disks, alone


class Swaps:
    """On one instance, for one call. `notes`: for what a person is to be told afterwards."""

    def __init__(self, api: Api, here: Here, disks: Disks, report: Report, notes: list[str]) -> None:
        self.api, self.here, self.disks, self.report, self.notes = api, here, disks, report, notes
        self.instance = here.instance

    def open(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(swap id, the new volume) of every swap here, committed ones that aren't through yet included."""
        within = self.api.deadline("the list of swaps")
        filters = {f"tag:{tags.INSTANCE}": [self.instance], "tag-key": [tags.SWAP]}
        for item in volumes.described(self.api, within, filters):
            labels = tags.read(item)
            if labels.get(tags.INSTANCE) == self.instance and tags.SWAP in labels:
                yield labels[tags.SWAP], item

    def _refuse_mounted(self, volume: str) -> None:
        self.disks.refuse_mounted(self.disks.find(tags.serial(volume), tags.BY_ID), volume)

    def _of(self, swap_id: str) -> dict[str, Any] | None:
        return next((item for known, item in self.open() if known == swap_id), None)

    def swap(self, swap_id: str, snapshot: Snapshot, volume: str) -> None:
        if len(parts(volume)) > 1:
            why = "lies on several volumes: they can't change places at one instant"
            raise PreconditionError(why, object=volume, cure="restore it with --to")
        item = restorable(self.api, snapshot.id)
        if alone(kind := tags.file_system(tags.read(item), snapshot.birth.member)[0]):
            why = f"is a {kind}: it may not be seen beside its origin"
            raise PreconditionError(why, object=snapshot.id, cure="restore it on another instance")
        for other, item in self.open():
            if other == swap_id or volume in (tags.read(item).get(tags.ORIGIN), item["VolumeId"]):
                raise BusyError(f"swap {other} is open", object=volume, cure="take it back or commit it")
        within = self.api.deadline(volume)
        origin = volumes.look(self.api, volume, within)
        attachment: dict[str, Any] = next(iter((origin or {}).get("Attachments", [])), {})
        device = str(attachment.get("Device", ""))
        if origin is None or volumes.attached_to(origin)[0] != self.instance:
            raise PreconditionError("isn't attached to this instance", object=volume, cure="restore with --to")
        self._refuse_mounted(volume)
        labels = tags.read(origin)
        theirs = {key: value for key, value in labels.items() if not (key.startswith("aws:") or tags.is_ours(key))}
        wanted = {
            "SnapshotId": snapshot.id,
            "AvailabilityZone": self.here.zone,
            "ClientToken": operation_id("swap", swap_id, snapshot.id),
            "VolumeType": origin["VolumeType"],
            "Size": origin["Size"],
            **{key: origin[key] for key in ("Iops", "Throughput") if origin.get(key)},
            **({"Encrypted": True, "KmsKeyId": origin["KmsKeyId"]} if origin.get("KmsKeyId") else {}),
        }
        if origin["VolumeType"] not in ("gp3", "io1", "io2"):
            wanted.pop("Iops", None)  # EC2 says it of others too, and takes it of none
        born = {**theirs, **tags.of_swap(swap_id, volume, device, self.instance)}
        new = volumes.make(self.api, wanted, born, self.report)
        volumes.tag(self.api, [volume], {tags.MANAGED: "true", tags.ASIDE: swap_id})
        volumes.detach(self.api, volume, self.report)
        volumes.attach(self.api, new, self.instance, self.report, device)
        volumes.appeared(self.api, self.disks, new, self.report)
        if attachment.get("DeleteOnTermination"):  # to set it again a role would have to be let change the instance
            mapping = f"DeviceName={device},Ebs={{DeleteOnTermination=true}}"
            cure = f"modify-instance-attribute --instance-id {self.instance} --block-device-mappings '{mapping}'"
            self.notes.append(
                f"{volume} was to be deleted with the instance; {new} isn't, nor is {volume} once it is put back: "
                f"`aws ec2 {cure}` says so again"
            )

    def back(self, swap_id: str) -> None:
        item = self._of(swap_id)
        if item is None:
            return
        labels, new = tags.read(item), str(item["VolumeId"])
        if tags.COMMITTED in labels:
            return self.commit(swap_id)
        origin, device = labels[tags.ORIGIN], labels[tags.DEVICE]
        self._refuse_mounted(new)
        if volumes.look(self.api, origin, self.api.deadline(origin)) is None:
            raise StorageError("what it set aside is gone", object=swap_id, cure="commit it, to keep what is there")
        volumes.detach(self.api, new, self.report)
        volumes.attach(self.api, origin, self.instance, self.report, device)
        volumes.appeared(self.api, self.disks, origin, self.report)
        if tags.ASIDE in tags.read(volumes.look(self.api, origin, self.api.deadline(origin)) or {}):
            volumes.tag(self.api, [origin], {tags.MANAGED: None, tags.ASIDE: None})
        volumes.remove(self.api, new, self.report)

    def commit(self, swap_id: str) -> None:
        item = self._of(swap_id)
        if item is None:
            return
        labels, new = tags.read(item), str(item["VolumeId"])
        if volumes.attached_to(item)[0] != self.instance:
            raise StorageError("the swap was never finished", object=swap_id, cure="take it back")
        origin = volumes.look(self.api, labels[tags.ORIGIN], self.api.deadline(swap_id))
        if origin is not None:
            if tags.read(origin).get(tags.ASIDE) != swap_id or volumes.attached_to(origin)[0]:
                raise StorageError(
                    f"{labels[tags.ORIGIN]} isn't what it set aside", object=swap_id, cure="take it back"
                )
            volumes.tag(self.api, [new], {tags.COMMITTED: "true"})  # from here on there is no way back
            volumes.remove(self.api, labels[tags.ORIGIN], self.report)
        ours = {key: None for key in labels if tags.is_ours(key)}
        volumes.tag(self.api, [new], {**ours, tags.COMMITTED: None})

    def device_of(self, volume: str) -> str | None:
        """The kernel name of the disk that stands in a volume's place now, or of the volume's own; None if neither is
        attached here."""
        record = {tags.read(item).get(tags.ORIGIN): str(item["VolumeId"]) for _, item in self.open()}
        for name in (record.get(volume), volume):
            if name is not None and (found := self.disks.find(tags.serial(name), tags.BY_ID)):
                return found
        return None

    def listed(self) -> Iterator[str]:
        """Those neither taken back nor committed."""
        yield from sorted(swap_id for swap_id, item in self.open() if tags.COMMITTED not in tags.read(item))
