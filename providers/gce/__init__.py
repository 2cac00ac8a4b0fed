"""gce: snapshots of Google Compute Engine disks, and disks made of them. Must know no policy: what is kept is the
core's.

A *volume* is a disk, zonal or regional, by `ZONE/NAME` or `REGION/NAME`. A set of several disks is one instant where
they are in one consistency group, else they want one freeze around all. Labels and descriptions are the catalog
(`labels`); there is no other record. An attachment is a new disk, attached to this instance.

On an instance a mount's disk is known by udev's link, which has the device's name; what disk that is the instance says
(instances.get). From outside, disks are named (`find`). No SDK is imported to find out that this isn't Compute Engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from providers.gce import labels, names, sets
from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.labels import check_marks, encode_birth, pack, slot_value
from snapshotter.core.model import (
    Access,
    Attachment,
    Birth,
    Elsewhere,
    Hold,
    ImageState,
    MountSpec,
    Purpose,
    Quiesce,
    Snapshot,
    Space,
    Tagged,
    Tree,
    Volume,
    utc_now,
)
from snapshotter.core.remote import Clock, Deadline
from snapshotter.host import mounts
from snapshotter.host.disks import Disks
from snapshotter.host.mounts import Mount
from snapshotter.provider import Option, Provider, Settings, Traits

if TYPE_CHECKING:
    from providers.gce.api import Api
    from providers.gce.choosing import Plan, Seen
    from providers.gce.clones import Clones
    from providers.gce.here import Here
    from providers.gce.swaps import Swaps

_CREATE_S = 60.0
#: A snapshot is deleted while another operation of it ends.
_DELETE_S = 300.0
#: After this long, what was asked for without an answer is there, or never will be.
_SETTLE_S = 30.0
_ELSEWHERE = timedelta(hours=1)


class GceProvider(Provider):
    """See the module."""

    name = names.NAME
    section = "gcp"
    traits = Traits(
        atomic_across_volumes=False,
        quiesce=Quiesce.FREEZE,
        writable_clone=True,
        swaps=True,
        needs_host=False,
        limits=labels.LIMITS,
    )
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "project": Option(str, "Google Cloud project (default: this instance's, or the credentials')"),
        "impersonate": Option(str, "service account to act as"),
        "endpoint": Option(str, "the API's address, where it isn't the public one"),
        "zone": Option(str, "zone of disks and instances that are named without one, and of disks restored away"),
        "instance": Option(str, "instance (NAME, ZONE/NAME) that disks restored away are attached to"),
        "disk_type": Option(str, "type of restored disks (default: pd-balanced)"),
        "provisioned_iops": Option(int, "IOPS of restored disks (Hyperdisk)"),
        "provisioned_throughput": Option(int, "MiB/s of restored disks (Hyperdisk)"),
        "replica_zones": Option(str, "two zones: a restored disk is regional"),
        "kms_key": Option(str, "Cloud KMS key of snapshots and restored disks (default: the disk's, the snapshot's)"),
        "storage_location": Option(
            str, "region or multi-region where snapshots are kept (default: nearest to the disk)"
        ),
        "snapshot_type": Option(str, "standard or archive"),
    }
    #: Tests have others.
    disks = Disks()
    clock = Clock()

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._plans: dict[str, tuple[Plan, float]] = {}  # and when another instant of its disks may be taken
        self._prepared: dict[str, Plan] = {}
        self._fresh: dict[str, tuple[Snapshot, ...]] = {}  # just created: the seal needs no look
        self._uncertain: dict[str, Deadline] = {}  # sets of which an answer is missing: when it must have shown
        self._working: dict[str, Any] = {}  # snapshot -> the operation that makes it
        self._seen: Seen = {}

    # -- where we are -------------------------------------------------------------------------------------------

    def _on_gce(self) -> bool:
        return self.disks.vendor() == names.VENDOR

    def _here(self) -> Here | None:
        """The instance that this is; None elsewhere."""
        if not self._on_gce():
            return None
        from providers.gce.here import here

        return here()

    def _option(self, name: str) -> Any:
        return self.settings.options.get(name)

    def _api(self) -> Api:
        from providers.gce.api import connect

        project = self._option("project")
        if project is None and (here := self._here()) is not None:
            project = here.project
        return connect(project, self._option("endpoint"), self._option("impersonate"), self.clock)

    def _zone(self) -> str:
        if zone := self._option("zone"):
            return str(zone)
        here = self._here()
        return here.zone if here is not None else ""

    def _used(self) -> bool:
        """Whether there can be anything of ours: elsewhere than on Compute Engine somebody must have said so, and
        without Google's library nobody can have taken anything."""
        return bool(self.settings.options) or (self._on_gce() and _installed())

    def availability(self) -> list[str]:
        if not _installed():
            return ["google-cloud-compute isn't installed: pip install 'node-snapshotter[gcp]'"]
        if not self.settings.options and not self._on_gce():
            return ["this is no Compute Engine instance: set `project` in [gcp] to work from elsewhere"]
        try:
            self._here()
            self._resource("standard")
        except SnapshotterError as error:
            return [error.line()]
        return []

    # -- which disks --------------------------------------------------------------------------------------------

    def claim(self, mount: Mount, path: str) -> Volume | None:
        if not self._on_gce():
            return None
        from providers.gce.devices import devices

        parts = self.disks.below(mount)
        known = {disk: device for device, disk in devices(self.disks).items()}
        seen = [known[part.disk] for part in parts if part.disk in known]
        if not seen or len(seen) != len(parts):
            return None  # a memory file system, a disk of another kind
        attached = {each.device_name: each for each in self._instance(self._here()).disks}
        if missing := [device for device in seen if device not in attached]:
            raise PreconditionError(
                f"Compute Engine knows of no disk attached here as {', '.join(missing)}",
                object=mount.path,
                cure="is the project another? -o project=",
            )
        found = [names.disk_of(attached[device].source) for device in seen]
        volumes = [each.id for each in found if each is not None]
        if len(volumes) != len(seen):
            return None  # a local SSD: nothing that could be snapshotted
        if not self.disks.between(mount) and len({part.partition for part in parts}) > 1:
            raise PreconditionError(
                f"lies on different partitions of {', '.join(volumes)}",
                object=mount.path,
                cure="take the disks from outside by `select`",
            )
        return Volume(self.name, names.joined(sorted(set(volumes))), mounts.top_of(mount), mount.fstype)

    def _instance(self, here: Here | None) -> Any:
        """What Compute Engine says of this instance."""
        from providers.gce import choosing

        if here is None:
            raise PreconditionError("this is no Compute Engine instance", object=self.name, cure="run it on one")
        api = self._api()
        found = choosing.instance(api, self._seen, here.zone, here.instance, api.deadline(here.instance))
        if str(found.id) != here.number:
            raise PreconditionError(
                f"the metadata server says {here.number}, and Compute Engine says {found.id}",
                object=here.instance,
                cure="is the project another? -o project=",
            )
        return found

    def find(self, select: Mapping[str, object]) -> list[Volume]:
        from providers.gce import choosing

        return [Volume(self.name, each) for each in choosing.find(self._api(), self._seen, select, self._zone())]

    def tagged(self) -> list[Tagged]:
        from providers.gce import choosing

        return choosing.tagged(self._api()) if self._used() else []

    def one_instant(self, volumes: Sequence[Volume]) -> bool:
        plan = self._plan(volumes)
        return len(plan.disks) == 1 or bool(plan.group)

    def _plan(self, volumes: Sequence[Volume]) -> Plan:
        from providers.gce import choosing

        here = self._instance(self._here()) if any(volume.path is not None for volume in volumes) else None
        ids = [part for volume in volumes for part in names.parts(volume.id)]
        return choosing.plan(self._api(), self._seen, ids, here)

    # -- before -------------------------------------------------------------------------------------------------

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        from providers.gce import choosing

        encode_birth(birth)
        pack(birth.of_member(0), labels.LIMITS)
        self._resource("standard")
        plan = self._plan(volumes)
        for volume in volumes:
            if volume.fstype in mounts.NEVER_FROZEN and len(names.parts(volume.id)) > 1 and not plan.group:
                raise PreconditionError(
                    f"is a {volume.fstype} over several disks that are in no consistency group, and can't be frozen",
                    object=volume.id,
                    cure="put them in one: docs/gcp.md",
                )
        wait = choosing.room(self._api(), self._seen, plan, birth.set_id)
        self._plans[birth.set_id] = plan, self.clock.now() + wait

    def space(self, volumes: Sequence[Volume]) -> Space:
        """There is room without end; what it costs isn't known before."""
        return Space(total_bytes=None, free_bytes=None)

    def prepare(self, volumes: Sequence[Volume], birth: Birth, budget: float) -> None:
        """All that can be asked while the writers run; waits until another instant of these disks may be taken."""
        if birth.set_id in self._prepared:
            return
        api = self._api()
        if birth.set_id not in self._plans:
            self.check(volumes, birth)
        plan, free = self._plans.pop(birth.set_id)
        if (wait := free - self.clock.now()) > 0:
            self.clock.sleep(wait)
        for service in ("GlobalOperations", *(("ZoneOperations", "RegionOperations") if plan.group else ())):
            api.client(service)  # making one takes its time, and soon there is none
        self._prepared[birth.set_id] = plan

    # -- taking -------------------------------------------------------------------------------------------------

    def _resource(self, default: str) -> dict[str, Any]:
        """What the options say of a snapshot."""
        wanted: dict[str, Any] = {"snapshot_type": str(self._option("snapshot_type") or default).upper()}
        if wanted["snapshot_type"] not in ("STANDARD", "ARCHIVE"):
            raise PreconditionError(
                f"there are no {wanted['snapshot_type'].lower()} snapshots",
                object="snapshot_type",
                cure="standard, or archive",
            )
        if location := self._option("storage_location"):
            wanted["storage_locations"] = [location]
        if key := self._option("kms_key"):
            wanted["snapshot_encryption_key"] = {"kms_key_name": key}
        return wanted

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        from providers.gce import errors, taking

        self.prepare(volumes, birth, 0.0)
        plan = self._prepared[birth.set_id]
        api = self._api()
        left = _CREATE_S if hold.deadline is None else hold.deadline - time.monotonic()
        within = api.deadline(", ".join(each.id for each in plan.disks), min(left, _CREATE_S))
        numbers = {(member.provider, member.volume): number for number, member in enumerate(birth.members)}
        resources = []
        for volume in volumes:
            number = numbers[(self.name, volume.id)]
            lies_on = self.disks.lies_on(mounts.mount_of(volume.path)) if volume.path is not None else ""
            born = labels.of_set(birth.of_member(number), lies_on)
            each_named = names.member_names(birth.set_id, number, volume.id)
            resources += [{"name": name, **self._resource("standard"), **born} for name in each_named]
        self._uncertain[birth.set_id] = api.deadline(birth.set_id, _SETTLE_S)
        try:
            made = taking.take(api, plan, birth, resources, within)
        except SnapshotterError as error:
            if errors.had_no_effect(error) and len(plan.disks) == 1:
                del self._uncertain[birth.set_id]
            else:
                self._uncertain[birth.set_id] = api.deadline(birth.set_id, _SETTLE_S)
            with suppress(SnapshotterError):  # as far as there is time: `delete` does the rest
                for item in self._items(api, birth.set_id, within):
                    taking.delete(api, item.name, within)
            raise
        del self._uncertain[birth.set_id]
        for each, (item, operation) in zip(plan.disks, made, strict=True):
            if operation is not None:
                self._working[item.name] = operation
            item.source_disk = item.source_disk or each.link(api.project)
        self._fresh[birth.set_id] = tuple(sets.snapshots(item for item, _ in made))
        return self._fresh[birth.set_id]

    # -- afterwards ---------------------------------------------------------------------------------------------

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        if not self._used():
            return
        api = self._api()
        yield from sets.snapshots(self._items(api, set_id, api.deadline(set_id or "the list of snapshots")))

    def of_slot(self, target: str, slot: str) -> Iterator[Snapshot]:
        api = self._api()
        listed = self._labelled(api, labels.SLOT, slot_value(target, slot), api.deadline(f"the slot {slot}"))
        for found in sets.snapshots(listed):
            if (found.birth.target, found.birth.slot) == (target, slot):
                yield found

    def _items(self, api: Api, set_id: str | None, within: Deadline) -> Iterator[Any]:
        name, value = (labels.MANAGED, "true") if set_id is None else (labels.SET, set_id)
        yield from self._labelled(api, name, value, within)

    def _labelled(self, api: Api, name: str, value: str, within: Deadline) -> Iterator[Any]:
        """As they are listed: those that carry our label, and aren't being deleted."""
        for item in api.pages("Snapshots.list", within, filter=f'labels.{name}="{value}"'):
            if item.status != "DELETING" and labels.birth_of(item) is not None:
                yield item

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        from providers.gce import taking

        check_marks(changes)
        api = self._api()
        fresh = self._fresh.pop(set_id, ())
        found = list(fresh or self.snapshots(set_id))
        if not found:
            raise NotFoundError("no such set", object=set_id, cure="`snapshotter list` shows all")
        each_named = [part for snapshot in found for part in names.parts(snapshot.id)]
        if changes.get("sealed"):
            here = {snapshot.birth.member for snapshot in found}
            for number, member in enumerate(found[0].birth.members):
                if member.provider == self.name and number not in here:
                    raise StorageError(f"can't be sealed: no snapshot of {member.volume}", object=set_id)
            for snapshot in found:
                if snapshot.state is ImageState.INVALID:
                    raise StorageError(f"can't be sealed: {snapshot.why}", object=set_id, cure="take it again")
            for name in each_named:
                if not fresh or name in self._working:
                    taking.settled(api, name, self._working.pop(name, None), api.deadline(name))
        labelled = {labels.mark(name): value for name, value in changes.items()}
        taking.all_of(lambda name: taking.relabel(api, "Snapshots", api.deadline(name), name, labelled), each_named)

    def finish(self, set_id: str) -> None:
        from providers.gce import taking

        plan = self._prepared.get(set_id)
        if plan is not None and plan.group:
            api = self._api()
            taking.instants_gone(api, set_id, [names.Disk(plan.place, set_id)], api.deadline(set_id, _DELETE_S))
        self._prepared.pop(set_id, None)

    def delete(self, set_id: str) -> None:
        from providers.gce import disks, taking

        self._fresh.pop(set_id, None)
        if not self._used():
            return
        api = self._api()
        within = api.deadline(set_id, _DELETE_S)
        for item in disks.labelled(api, within, f'labels.{labels.SET}="{set_id}"'):
            used = labels.attachment_of(item)
            if used is not None and used.set_id == set_id:
                where = f"at {used.path} of instance {item.labels.get(labels.INSTANCE)}" if used.path else "elsewhere"
                raise BusyError(
                    f"is attached {where} ({used.id})",
                    object=set_id,
                    cure=f"snapshotter release {used.path or used.id}",
                )
        settling = self._uncertain.get(set_id)
        while True:
            found = list(self._items(api, set_id, within))
            sealed = [item.name for item in found if "sealed" in labels.marks_of(item.labels)]
            for name in sealed if len(sealed) > 1 else ():  # half of a set is no backup
                taking.relabel(api, "Snapshots", within, name, {labels.mark("sealed"): None})
            taking.all_of(lambda item: taking.delete(api, item.name, within), found)
            instants = taking.groups(api, within, set_id).get(set_id, [])
            if (plan := self._prepared.get(set_id)) is not None and plan.group:
                instants.append(names.Disk(plan.place, set_id))  # a group may have lost its instants
            taking.instants_gone(api, set_id, instants, within)
            birth = labels.birth_of(found[0]) if found else None
            theirs = [member.volume for member in birth.members if member.provider == self.name] if birth else []
            whole = birth is not None and len(found) >= sum(len(names.parts(volume)) for volume in theirs)
            if whole or settling is None or settling.left() <= 0:
                break
            self.clock.sleep(min(5.0, settling.left()))
        self._uncertain.pop(set_id, None)
        self._prepared.pop(set_id, None)

    def reap(self) -> list[str]:
        return self.advance()

    def advance(self) -> list[str]:
        """Instant snapshots of dead runs, and of sets that are complete, go."""
        from providers.gce import taking
        from snapshotter.host.locks import Locks
        from snapshotter.host.places import host_name, same_host

        if not self._used():
            return []
        api = self._api()
        within = api.deadline("instant snapshots of dead runs", _DELETE_S)
        gone = []
        for set_id, instants in taking.groups(api, within).items():
            birth = taking.record_of(api, names.Disk(instants[0].place, set_id), within)
            if birth is None or any(each.state is ImageState.PENDING for each in self.snapshots(set_id)):
                continue
            # Nobody but its own host knows whether the run that made them lives.
            patience = timedelta(0) if same_host(birth.host, host_name()) else _ELSEWHERE
            if utc_now() < birth.deadline + patience:
                continue
            with suppress(BusyError), Locks([f"target:{birth.target}"]):
                taking.instants_gone(api, set_id, instants, within)
                gone.append(f"instant snapshots of {set_id}")
        return gone

    # -- attachments --------------------------------------------------------------------------------------------

    def _clones(self) -> Clones | None:
        """None where there can be nothing of ours."""
        if not self._used():
            return None
        from providers.gce.clones import Clones

        return Clones(self._api(), self._here(), self.disks, self.settings)

    def _some_clones(self, snapshot: Snapshot) -> Clones:
        if (clones := self._clones()) is None:
            why = "this is no Compute Engine instance"
            raise PreconditionError(why, object=snapshot.id, cure="restore it on one, or set `project` in [gcp]")
        return clones

    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec | Tree:
        return self._some_clones(snapshot).attach(snapshot, attachment_id, access, destination, purpose)

    def attach_away(self, snapshot: Snapshot, attachment_id: str) -> Elsewhere:
        return self._some_clones(snapshot).away(snapshot, attachment_id)

    def settle(self, attachment_id: str, since: datetime) -> None:
        if (clones := self._clones()) is None:
            raise NotFoundError("no such attachment", object=attachment_id)
        clones.settle(attachment_id, since)

    def attachments(self) -> Iterator[Attachment]:
        if (clones := self._clones()) is not None:
            yield from clones.listed()

    def detach(self, attachment_id: str) -> None:
        if (clones := self._clones()) is not None:
            clones.detach(attachment_id)

    # -- taking the origin's place ------------------------------------------------------------------------------

    def _swaps(self) -> Swaps | None:
        here = self._here()
        if here is None or not self._used():
            return None
        from providers.gce.swaps import Swaps

        return Swaps(self._api(), here, self.disks, self.settings.report)

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        swaps = self._swaps()
        if swaps is None:
            why = "this is no Compute Engine instance"
            raise PreconditionError(why, object=snapshot.id, cure="restore it on the instance")
        swaps.swap(swap_id, snapshot, volume.id)
        self._seen.clear()

    def swap_back(self, swap_id: str) -> None:
        if (swaps := self._swaps()) is not None:
            swaps.back(swap_id)
            self._seen.clear()

    def swap_commit(self, swap_id: str) -> None:
        if (swaps := self._swaps()) is not None:
            swaps.commit(swap_id)
            self._seen.clear()

    def source_of(self, volume: str, known: str) -> str:
        from snapshotter.host.disks import Part, partition_in

        found = swaps.device_of(volume) if (swaps := self._swaps()) is not None else None
        return (self.disks.device(Part(found, partition_in(known))) if found else None) or known

    def swaps(self) -> Iterator[str]:
        if (swaps := self._swaps()) is not None:
            yield from swaps.listed()


def _installed() -> bool:
    """Whether Google's client is there, without loading anything of it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("google-cloud-compute")
    except PackageNotFoundError:
        return False
    return True
