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
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from providers.gce import labels, names, sets
from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError, SnapshotterError
from snapshotter.core.labels import check_marks, encode_birth, pack, slot_value
from snapshotter.core.model import (
    Birth,
    Hold,
    ImageState,
    Quiesce,
    Snapshot,
    Tagged,
    Volume,
    compact_time,
    utc_now,
)
from snapshotter.core.remote import Deadline, Late
from snapshotter.host import mounts
from snapshotter.host.cloud import Cloud, parts, refuse_unsealable
from snapshotter.host.disks import Part
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
#: A tick moves on all sets: what isn't removed within this is left to the next.
_GROUP_S = 30.0
#: After this long, what was asked for without an answer is there, or never will be.
_SETTLE_S = 30.0
_ELSEWHERE = timedelta(hours=1)
#: A deletion that is late until then is slow, later it is a fault.
_SLOW = timedelta(days=1)


class GceProvider(Cloud, Provider):
    """See the module."""

    name = names.NAME
    section = "gcp"
    VENDOR = names.VENDOR
    MACHINE = "Compute Engine instance"
    LIBRARY = "google-cloud-compute"
    ELSEWHERE = "project"
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

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._plans: dict[str, tuple[Plan, float]] = {}  # and when another instant of its disks may be taken
        self._prepared: dict[str, Plan] = {}
        self._fresh: dict[str, tuple[Snapshot, ...]] = {}  # just created: the seal needs no look
        self._uncertain: dict[str, Deadline] = {}  # sets of which an answer is missing: when it must have shown
        self._working: dict[str, Any] = {}  # snapshot -> the operation that makes it
        self._seen: Seen = {}
        self._late: set[str] = set()  # sets whose instant snapshots were just waited for in vain

    @staticmethod
    def _installed() -> bool:
        from importlib.metadata import PackageNotFoundError, version

        try:
            version("google-cloud-compute")
        except PackageNotFoundError:
            return False
        return True

    def _asked(self) -> Here:
        from providers.gce.here import here

        return here()

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

    # -- which disks --------------------------------------------------------------------------------------------

    def _volumes(self, mount: Mount, found: Sequence[Part]) -> list[str] | None:
        from providers.gce.devices import devices

        known = {disk: device for device, disk in devices(self.disks).items()}
        if any(part.disk not in known for part in found):
            return None
        attached = {each.device_name: each for each in self._instance(self._here()).disks}
        if missing := [known[part.disk] for part in found if known[part.disk] not in attached]:
            raise PreconditionError(
                f"Compute Engine knows of no disk attached here as {', '.join(missing)}",
                object=mount.path,
                cure="is the project another? -o project=",
            )
        volumes = [names.disk_of(attached[known[part.disk]].source) for part in found]
        ids = [each.id for each in volumes if each is not None]
        return ids if len(ids) == len(found) else None  # a local SSD can't be snapshotted

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
        ids = [part for volume in volumes for part in parts(volume.id)]
        return choosing.plan(self._api(), self._seen, ids, here)

    # -- before -------------------------------------------------------------------------------------------------

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        from providers.gce import choosing

        encode_birth(birth)
        pack(birth.of_member(0), labels.LIMITS)
        self._resource("standard")
        plan = self._plan(volumes)
        for volume in volumes:
            if volume.fstype in mounts.NEVER_FROZEN and len(parts(volume.id)) > 1 and not plan.group:
                raise PreconditionError(
                    f"is a {volume.fstype} over several disks that are in no consistency group, and can't be frozen",
                    object=volume.id,
                    cure="put them in one: docs/gcp.md",
                )
        wait = choosing.room(self._api(), self._seen, plan, birth.set_id)
        self._plans[birth.set_id] = plan, self.clock.now() + wait

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
        each_named = [part for snapshot in found for part in parts(snapshot.id)]
        if changes.get("sealed"):
            refuse_unsealable(found, self.name, set_id)
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
        from providers.gce import taking

        self._fresh.pop(set_id, None)
        if not self._used():
            return
        api = self._api()
        within = api.deadline(set_id, _DELETE_S)
        self._refuse_attached(api, set_id, within)
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
            whole = birth is not None and len(found) >= sum(len(parts(volume)) for volume in theirs)
            if whole or settling is None or settling.left() <= 0:
                break
            self.clock.sleep(min(5.0, settling.left()))
        self._uncertain.pop(set_id, None)
        self._prepared.pop(set_id, None)

    def _refuse_attached(self, api: Api, set_id: str, within: Deadline) -> None:
        """Raise BusyError where a disk made of the set is known, Unreachable where one may be: but a set that was never
        sealed has none that anybody misses, and a failed take's must go whatever other zone is lost. The seal is taken
        off first by who deletes several members; the marks that came with it stay."""
        from providers.gce import disks
        from providers.gce.api import Unreachable

        try:
            for item in disks.labelled(api, within, f'labels.{labels.SET}="{set_id}"'):
                used = labels.attachment_of(item)
                if used is not None and used.set_id == set_id:
                    path, instance = used.path, item.labels.get(labels.INSTANCE)
                    where = f"at {path} of instance {instance}" if path else "elsewhere"
                    raise BusyError(
                        f"is attached {where} ({used.id})",
                        object=set_id,
                        cure=f"snapshotter release {path or used.id}",
                    )
        except Unreachable:
            marks = [labels.marks_of(item.labels) for item in self._items(api, set_id, within)]
            if marks and all(marks):
                raise

    def reap(self) -> list[str]:
        return self._instants_gone(_DELETE_S)

    def advance(self) -> list[str]:
        return self._instants_gone(_GROUP_S)

    def _instants_gone(self, patience_s: float) -> list[str]:
        """Instant snapshots of dead runs, and of sets that are complete, go. `patience_s`: for them all; however long
        one takes, each of the others has `_GROUP_S`. What is late is left to the next run."""
        from providers.gce import taking
        from snapshotter.host.locks import Locks
        from snapshotter.host.places import host_name, same_host

        if not self._used():
            return []
        api = self._api()
        within = api.deadline("instant snapshots of dead runs")
        every = api.deadline("instant snapshots of dead runs", patience_s)
        gone: list[str] = []
        failed: SnapshotterError | None = None
        waited, self._late = self._late, set()
        for set_id, instants in taking.groups(api, within).items():
            if set_id in waited:  # a tick advances, then reaps: it waits once
                continue
            within = api.deadline(set_id, max(_GROUP_S, every.left()))
            try:
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
            except Late as error:  # Compute Engine goes on with it all the same
                self._late.add(set_id)
                self.notes.append(f"instant snapshots of {set_id} aren't gone yet: {error.line()}")
                if set_id[1:] < compact_time(utc_now() - _SLOW):
                    failed = failed or error
            except SnapshotterError as error:  # the others' go all the same
                failed = failed or error
        if failed is not None:
            raise failed
        return gone

    # -- disks made of snapshots --------------------------------------------------------------------------------

    def _cloning(self) -> Clones:
        from providers.gce.clones import Clones

        return Clones(self._api(), self._here(), self.disks, self.settings)

    def _swapping(self, here: Here) -> Swaps:
        from providers.gce.swaps import Swaps

        return Swaps(self._api(), here, self.disks, self.settings.report)
