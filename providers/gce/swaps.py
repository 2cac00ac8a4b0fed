"""A disk made from a snapshot takes its origin's place: the origin is detached, the other attached under its device's
name. Must know no mount's path: nothing of either is mounted meanwhile.

The record is in what the new disk is born with; the origin is labelled as set aside before it is touched. A step that
is done already is done, so `swap_back` ends as it began, wherever the swap was killed. After a commit the new disk is
an ordinary one, with the origin's own labels and policies: its name is another, and the mount must be claimed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from providers.gce import disks, labels, taking
from providers.gce.api import Api
from providers.gce.clones import key_of, origin_here, restorable, source
from providers.gce.here import Here
from providers.gce.names import Disk, disk, disk_of
from snapshotter.core.errors import BusyError, PreconditionError, StorageError
from snapshotter.core.model import Report, Snapshot
from snapshotter.host.cloud import parts
from snapshotter.host.disks import Disks, alone

#: Of the origin, as it is. What can't be read of a disk, its resource manager tags, isn't kept.
_KEPT = ("provisioned_iops", "provisioned_throughput", "access_mode", "storage_pool")


class Swaps:
    """On one instance, for one call."""

    def __init__(self, api: Api, here: Here, host: Disks, report: Report) -> None:
        self.api, self.here, self.host, self.report = api, here, host, report
        self.instance = f"{here.zone}/{here.instance}"

    def open(self) -> Iterator[tuple[str, Disk, Any]]:
        """(swap id, the new disk, what is said of it) of every swap here, committed ones that aren't through
        included."""
        within = self.api.deadline("the list of swaps")
        given = f'labels.{labels.INSTANCE}="{self.here.number}"'
        for item in disks.labelled(self.api, within, given, self.here.zone):
            which = disk_of(item.self_link)
            if which is not None and labels.swap_of(item) and item.labels.get(labels.INSTANCE) == self.here.number:
                yield item.labels[labels.SWAP], which, item

    def _of(self, swap_id: str) -> tuple[Disk, Any] | None:
        return next(((which, item) for known, which, item in self.open() if known == swap_id), None)

    def swap(self, swap_id: str, snapshot: Snapshot, volume: str) -> None:
        if len(parts(volume)) > 1:
            why = "lies on several disks: they can't change places at one instant"
            raise PreconditionError(why, object=volume, cure="restore it with --to")
        if alone(kind := labels.file_system(restorable(self.api, snapshot.id))[0]):
            why = f"is a {kind}: it may not be seen beside its origin"
            raise PreconditionError(why, object=snapshot.id, cure="restore it on another instance")
        for other, which, item in self.open():
            swapped = labels.swap_of(item)
            if other == swap_id or which.id == volume or (swapped and swapped.origin == volume):
                raise BusyError(f"swap {other} is open", object=volume, cure="take it back or commit it")
        origin = disk(volume)
        within = self.api.deadline(volume)
        item = disks.look(self.api, origin, within)
        how = disks.attached_as(self.api, origin, self.instance, within)
        if item is None or how is None:
            raise PreconditionError("isn't attached to this instance", object=volume, cure="restore with --to")
        self.host.refuse_mounted(origin_here(self.api, self.host, origin, self.instance), volume)
        disks.refuse_elsewhere(self.api, origin, self.instance)  # a Hyperdisk may be on several
        theirs = {key: value for key, value in item.labels.items() if key not in labels.ours(item.labels)}
        record = labels.InPlace(volume, how.device_name, how.auto_delete, how.interface, how.mode)
        born = labels.of_swap(swap_id, record, self.here.number, item.description)
        new = Disk(origin.place, f"{swap_id}-{snapshot.birth.member}")
        wanted: dict[str, Any] = {
            **born,
            "labels": {**theirs, **born["labels"]},
            "source_snapshot": source(self.api, snapshot.id),
            "type_": disks.type_link(self.api.project, origin, item.type_),
            "size_gb": item.size_gb,
            "resource_policies": list(item.resource_policies),
            "replica_zones": list(item.replica_zones),
            **{key: getattr(item, key) for key in _KEPT if getattr(item, key)},
        }
        if key := key_of(item.disk_encryption_key):
            wanted["disk_encryption_key"] = {"kms_key_name": key}
        disks.make(self.api, new, wanted, self.report)
        aside = {labels.MANAGED: "true", labels.ASIDE: swap_id}
        taking.relabel(self.api, "Disks", self.api.deadline(volume), volume, aside)
        disks.detach(self.api, origin, self.report)
        self._attach(new, record)

    def _attach(self, which: Disk, record: labels.InPlace) -> None:
        body: dict[str, Any] = {"device_name": record.device, "auto_delete": record.auto_delete}
        body |= {key: value for key in ("interface", "mode") if (value := getattr(record, key))}
        disks.attach(self.api, which, self.instance, body, self.report)
        disks.appeared(self.api, self.host, record.device, self.report)

    def back(self, swap_id: str) -> None:
        found = self._of(swap_id)
        record = labels.swap_of(found[1]) if found else None
        if found is None or record is None:
            return
        (new, item), volume = found, record.origin
        if labels.COMMITTED in item.labels:
            return self.commit(swap_id)
        origin = disk(volume)
        self.host.refuse_mounted(origin_here(self.api, self.host, new, self.instance), new.id)
        disks.refuse_elsewhere(self.api, new, self.instance)
        if disks.look(self.api, origin, self.api.deadline(volume)) is None:
            raise StorageError("what it set aside is gone", object=swap_id, cure="commit it, to keep what is there")
        disks.detach(self.api, new, self.report)
        self._attach(origin, record)
        none = {labels.MANAGED: None, labels.ASIDE: None}
        taking.relabel(self.api, "Disks", self.api.deadline(volume), volume, none)
        disks.remove(self.api, new, self.report)

    def commit(self, swap_id: str) -> None:
        found = self._of(swap_id)
        record = labels.swap_of(found[1]) if found else None
        if found is None or record is None:
            return
        (new, item), volume = found, record.origin
        if self.instance not in [disks.user_of(link) for link in item.users]:
            raise StorageError("the swap was never finished", object=swap_id, cure="take it back")
        within = self.api.deadline(swap_id)
        origin = disks.look(self.api, disk(volume), within)
        if origin is not None:
            if origin.labels.get(labels.ASIDE) != swap_id or origin.users:
                raise StorageError(f"{volume} isn't what it set aside", object=swap_id, cure="take it back")
            # From here on there is no way back.
            taking.relabel(self.api, "Disks", within, new.id, {labels.COMMITTED: "true"})
            disks.remove(self.api, disk(volume), self.report)
        ours = dict.fromkeys(labels.ours(item.labels))
        taking.relabel(self.api, "Disks", within, new.id, {**ours, labels.COMMITTED: None})

    def device_of(self, volume: str) -> str | None:
        """The kernel name of the disk that stands in a volume's place now, or of the volume's own; None if neither is
        attached here."""
        record = {swap.origin: which for _, which, item in self.open() if (swap := labels.swap_of(item))}
        for which in (record.get(volume), disk(volume)):
            if which is not None and (found := origin_here(self.api, self.host, which, self.instance)):
                return found
        return None

    def listed(self) -> Iterator[str]:
        """Those neither taken back nor committed."""
        yield from sorted(swap_id for swap_id, _, item in self.open() if labels.COMMITTED not in item.labels)
