"""ebs: snapshots of AWS EBS volumes, and volumes made of them. Must know no policy: what is kept is the core's.

A *volume* is an EBS volume, by its id. A set of one instance's volumes is one CreateSnapshots call, so one instant. Its
tags are the catalog (`tags`); there is no other record. An attachment is a new volume, attached to this instance.

On an instance (Nitro) a mount's volume is known by its disk's serial; what the metadata service and the disks say is
checked against EC2. From outside, volumes are named (`find`). No SDK is imported to find out that this isn't EC2.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar

from providers.ebs import sets, tags
from snapshotter.core.errors import (
    BusyError,
    Interrupted,
    NotFoundError,
    PreconditionError,
    SnapshotterError,
    StorageError,
)
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
)
from snapshotter.core.remote import Clock, Deadline, Lost, operation_id, poll
from snapshotter.host import mounts
from snapshotter.host.disks import Disks
from snapshotter.host.mounts import Mount
from snapshotter.provider import Option, Provider, Settings, Traits

if TYPE_CHECKING:
    from providers.ebs.api import Api
    from providers.ebs.choosing import Plan, Seen
    from providers.ebs.clones import Clones
    from providers.ebs.here import Here
    from providers.ebs.swaps import Swaps

_CREATE_S = 60.0


class EbsProvider(Provider):
    """See the module."""

    name = tags.NAME
    section = "aws"
    traits = Traits(
        atomic_across_volumes=True,
        quiesce=Quiesce.FREEZE,
        writable_clone=True,
        swaps=True,
        needs_host=False,
        limits=tags.LIMITS,
    )
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "region": Option(str, "AWS region (default: this instance's, or the profile's)"),
        "profile": Option(str, "AWS profile to log in with"),
        "role_arn": Option(str, "role to assume"),
        "instance": Option(str, "the instance that `restore --away` attaches the volumes to"),
        "zone": Option(str, "availability zone of volumes restored with --away"),
        "volume_type": Option(str, "type of restored volumes (default: gp3)"),
        "iops": Option(int, "IOPS of restored volumes"),
        "throughput": Option(int, "MiB/s of restored volumes (gp3)"),
        "kms_key": Option(str, "KMS key of restored volumes (default: the snapshot's)"),
        "copy_to": Option(str, "regions that each set is copied to, encrypted, once it is whole"),
        "initialization_rate": Option(int, "MiB/s, 100 to 300, at which a restored volume is filled (costs)"),
    }
    #: Tests have others.
    disks = Disks()
    clock = Clock()

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._plans: dict[str, Plan] = {}
        self._prepared: dict[str, Plan] = {}
        self._fresh: dict[str, tuple[Snapshot, ...]] = {}  # just created: the seal needs no look
        self._uncertain: dict[str, Deadline] = {}  # sets of which a reply was lost: when all of it will be listed
        self._seen: Seen = {}

    # -- where we are -------------------------------------------------------------------------------------------

    def _on_ec2(self) -> bool:
        return self.disks.vendor() == tags.VENDOR

    def _here(self) -> Here | None:
        """The instance that this is; None off EC2."""
        if not self._on_ec2():
            return None
        from providers.ebs.here import here

        return here()

    def _option(self, name: str) -> Any:
        return self.settings.options.get(name)

    def _api(self) -> Api:
        from providers.ebs.api import connect

        region = self._option("region")
        if region is None and (here := self._here()) is not None:
            region = here.region
        return connect(region, self._option("profile"), self._option("role_arn"), self.clock)

    def _used(self) -> bool:
        """Whether there can be anything of ours: elsewhere than on EC2 somebody must have said so, and without boto3
        nobody can have taken anything."""
        if self.settings.options:
            return True
        from importlib.util import find_spec

        return self._on_ec2() and find_spec("boto3") is not None

    def availability(self) -> list[str]:
        from importlib.util import find_spec

        if find_spec("boto3") is None:
            return ["boto3 isn't installed: pip install 'node-snapshotter[aws]'"]
        if not self.settings.options and not self._on_ec2():
            return ["this is no EC2 instance: set `region` in [aws] to work from elsewhere"]
        try:
            self._here()
        except PreconditionError as error:
            return [error.line()]
        return []

    # -- which volumes ------------------------------------------------------------------------------------------

    def claim(self, mount: Mount, path: str) -> Volume | None:
        if not self._on_ec2():
            return None
        parts = self.disks.below(mount)
        found = [tags.volume_of(self.disks.identity(part.disk, tags.BY_ID)) for part in parts]
        volumes = [volume for volume in found if volume is not None]
        if not volumes or len(volumes) != len(parts):
            return None  # an instance store, a memory file system: nothing that EBS knows
        if not self.disks.between(mount) and len({part.partition for part in parts}) > 1:
            raise PreconditionError(
                f"lies on different partitions of {', '.join(volumes)}",
                object=mount.path,
                cure="take the volumes from outside by `select`",
            )
        return Volume(self.name, tags.joined(sorted(set(volumes))), mounts.top_of(mount), mount.fstype)

    def find(self, select: Mapping[str, object]) -> list[Volume]:
        from providers.ebs import choosing

        return [Volume(self.name, name) for name in choosing.find(self._api(), self._seen, select)]

    def tagged(self) -> list[Tagged]:
        from providers.ebs import fleet

        return fleet.tagged(self._api(), self._seen)

    def ask(self, instance: str, argv: Sequence[str]) -> str:
        from providers.ebs import fleet

        return fleet.ask(self._api().boto(), instance, argv)

    def of_slot(self, target: str, slot: str) -> Iterator[Snapshot]:
        filters = [{"Name": f"tag:{tags.SLOT}", "Values": [slot_value(target, slot)]}]
        api = self._api()
        within = api.deadline(f"the slot {slot}")
        listed = api.pages("describe_snapshots", "Snapshots", within, OwnerIds=["self"], Filters=filters)
        for found in sets.snapshots(api.memory.over(listed, "SnapshotId", "snap-")):
            if (found.birth.target, found.birth.slot) == (target, slot):
                yield found

    def _plan(self, volumes: Sequence[Volume]) -> Plan:
        from providers.ebs import choosing

        here = self._here() if any(volume.path is not None for volume in volumes) else None
        ids = [part for volume in volumes for part in tags.parts(volume.id)]
        return choosing.plan(self._api(), self._seen, ids, here.instance if here else None)

    # -- before -------------------------------------------------------------------------------------------------

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        encode_birth(birth)
        pack(birth.of_member(0), tags.LIMITS)
        self._plans[birth.set_id] = self._plan(volumes)

    def space(self, volumes: Sequence[Volume]) -> Space:
        """EBS has room without end; what it costs isn't known before."""
        return Space(total_bytes=None, free_bytes=None)

    def prepare(self, volumes: Sequence[Volume], birth: Birth, budget: float) -> None:
        """All that can be asked while the writers run; waits until EC2 takes another snapshot of these volumes."""
        from providers.ebs import choosing

        if birth.set_id in self._prepared:
            return
        plan = self._plans.pop(birth.set_id, None) or self._plan(volumes)
        api = self._api()
        if (wait := choosing.room(api, plan, birth.set_id)) > 0:
            self.clock.sleep(wait)
        api.warm(budget)
        self._prepared[birth.set_id] = plan

    # -- taking -------------------------------------------------------------------------------------------------

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        from providers.ebs.volumes import SETTLE_S

        self.prepare(volumes, birth, 0.0)
        plan = self._prepared.pop(birth.set_id)
        api = self._api()
        left = _CREATE_S if hold.deadline is None else hold.deadline - time.monotonic()
        within = api.deadline(", ".join(plan.volumes), min(left, _CREATE_S))
        operation = operation_id("create", birth.set_id)
        seen = [volume for volume in volumes if volume.path is not None]
        kinds = {volume.id: self.disks.lies_on(mounts.mount_of(str(volume.path))) for volume in seen}
        given = tags.of_set(birth, operation, kinds, self._copy_to())
        how: dict[str, Any] = {
            "Description": f"snapshotter: {birth.node}, {birth.set_id}",
            "TagSpecifications": [{"ResourceType": "snapshot", "Tags": tags.as_tags(given)}],
        }
        # CreateSnapshots has no client token: whether it was done, its tag tells, and that may be listed late.
        self._uncertain[birth.set_id] = api.deadline(birth.set_id, SETTLE_S)
        try:
            if plan.instance:
                spec: dict[str, Any] = {"InstanceId": plan.instance, "ExcludeBootVolume": plan.without_boot}
                if plan.excluded:
                    spec["ExcludeDataVolumeIds"] = list(plan.excluded)
                made = api.call("create_snapshots", within, again=False, InstanceSpecification=spec, **how)["Snapshots"]
            else:
                made = [api.call("create_snapshot", within, again=False, VolumeId=plan.volumes[0], **how)]
        except Interrupted:
            raise
        except SnapshotterError:
            del self._uncertain[birth.set_id]  # refused: nothing happened
            raise
        except Lost as error:
            self._uncertain[birth.set_id] = api.deadline(birth.set_id, SETTLE_S)
            made = self._adopted(api, operation, len(plan.volumes), within, str(error))
        del self._uncertain[birth.set_id]
        for item in made:
            api.memory.made(item["SnapshotId"], {**item, "Tags": tags.as_tags(given)})
        self._fresh[birth.set_id] = self._checked(api, plan, birth, given, made, within)
        return self._fresh[birth.set_id]

    def _adopted(self, api: Api, operation: str, count: int, within: Deadline, why: str) -> list[dict[str, Any]]:
        """What a call made whose reply was lost. Raises StorageError when it isn't seen: `delete` goes on looking."""
        filters = [{"Name": f"tag:{tags.OPERATION}", "Values": [operation]}]

        def whole() -> list[dict[str, Any]] | None:
            found = list(api.pages("describe_snapshots", "Snapshots", within, OwnerIds=["self"], Filters=filters))
            return found if len(found) >= count else None

        try:
            return poll(whole, within, first_s=0.2, most_s=2.0)
        except StorageError:
            raise StorageError(
                f"EC2 gave no answer ({why}), and it isn't known whether it took them",
                object=within.what,
                cure="take another set; `snapshotter reap` removes what there may be",
            ) from None

    def _checked(
        self,
        api: Api,
        plan: Plan,
        birth: Birth,
        given: Mapping[str, str],
        made: Sequence[dict[str, Any]],
        within: Deadline,
    ) -> tuple[Snapshot, ...]:
        """The reply volume by volume: each once, none in error. Else all of it goes."""
        of = {item["VolumeId"]: item for item in made}
        bad = [name for name in plan.volumes if name not in of or of[name].get("State") == "error"]
        stray = [item["SnapshotId"] for item in made if item["VolumeId"] not in plan.volumes or bad]
        for name in stray:  # a volume that was attached since we looked, or all of a set that isn't whole
            self._delete_one(api, name, within)
        if bad:
            raise StorageError(
                f"EC2 took the set, but not of {', '.join(bad)}", object=birth.set_id, cure="take it again"
            )
        whole = [{**of[name], "Tags": tags.as_tags(given)} for name in plan.volumes]
        return tuple(sorted(sets.snapshots(whole), key=lambda snapshot: snapshot.birth.member))

    # -- afterwards ---------------------------------------------------------------------------------------------

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        if not self._used():
            return
        for found in sets.snapshots(self._items(set_id)):
            if set_id in (None, found.birth.set_id):
                yield found

    def _items(self, set_id: str | None) -> Iterator[dict[str, Any]]:
        api = self._api()
        within = api.deadline(set_id or "the list of snapshots")
        name, value = (tags.MANAGED, "true") if set_id is None else (tags.SET, set_id)
        filters = [{"Name": f"tag:{name}", "Values": [value]}]
        listed = api.pages("describe_snapshots", "Snapshots", within, OwnerIds=["self"], Filters=filters)
        yield from api.memory.over(listed, "SnapshotId", "snap-")

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        from providers.ebs import volumes

        check_marks(changes)
        found = list(self._fresh.pop(set_id, ()) or self.snapshots(set_id))
        if not found:
            raise NotFoundError("no such set", object=set_id, cure="`snapshotter list` shows all")
        if changes.get("sealed"):
            here = {snapshot.birth.member for snapshot in found}
            for number, member in enumerate(found[0].birth.members):
                if member.provider == self.name and number not in here:
                    raise StorageError(f"can't be sealed: no snapshot of {member.volume}", object=set_id)
            for snapshot in found:
                if snapshot.state is ImageState.INVALID:
                    raise StorageError(f"can't be sealed: {snapshot.why}", object=set_id)
        volumes.tag(
            self._api(),
            [part for snapshot in found for part in tags.parts(snapshot.id)],
            {tags.mark(name): value for name, value in changes.items()},
        )

    def delete(self, set_id: str) -> None:
        from providers.ebs import volumes

        self._prepared.pop(set_id, None)
        self._fresh.pop(set_id, None)
        if not self._used():
            return
        api = self._api()
        within = api.deadline(set_id)
        for item in volumes.described(api, within, {f"tag:{tags.SET}": [set_id]}):
            used = tags.attachment_of(tags.read(item))
            if used is not None and used.set_id == set_id:
                where = f"{used.path or item['VolumeId']} of {tags.read(item).get(tags.INSTANCE)}"
                cure = f"snapshotter release {used.path or used.id}"
                raise BusyError(f"is attached at {where} ({used.id})", object=set_id, cure=cure)
        settling = self._uncertain.get(set_id)
        while True:
            found = [item for item in self._items(set_id) if tags.read(item).get(tags.SET) == set_id]
            sealed = [item["SnapshotId"] for item in found if "sealed" in tags.marks_of(tags.read(item))]
            if len(sealed) > 1:
                volumes.tag(api, sealed, {tags.mark("sealed"): None})  # half of a set is no backup
            for item in found:
                self._delete_one(api, item["SnapshotId"], within)
            if found or settling is None or settling.left() <= 0:
                break
            self.clock.sleep(min(5.0, settling.left()))
        self._uncertain.pop(set_id, None)

    def _delete_one(self, api: Api, name: str, within: Deadline) -> None:
        def attempt() -> bool | None:
            try:
                api.call("delete_snapshot", within, SnapshotId=name)
            except NotFoundError:
                # EC2 may not know yet what it has just made.
                return None if api.memory.is_ours(name) and within.left() > within.seconds / 2 else True
            return True

        poll(attempt, within, first_s=0.5, most_s=5.0)
        api.memory.deleted(name)

    def advance(self) -> list[str]:
        if not self._used():
            return []
        from providers.ebs import copies
        from providers.ebs.api import connect

        api = self._api()
        profile, role = self._option("profile"), self._option("role_arn")
        return copies.advance(api, api.region, lambda region: connect(region, profile, role, self.clock))

    def _copy_to(self) -> str:
        """The regions that sets are copied to, a blank between two."""
        return " ".join(sorted(set(str(self._option("copy_to") or "").replace(",", " ").split())))

    # -- attachments --------------------------------------------------------------------------------------------

    def _clones(self) -> Clones | None:
        """None where there can be nothing of ours."""
        if not self._used():
            return None
        from providers.ebs.clones import Clones

        return Clones(self._api(), self._here(), self.disks, self.settings)

    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec | Tree:
        return self._clones_for(snapshot).attach(snapshot, attachment_id, access, destination, purpose)

    def foresee(self, snapshot: Snapshot) -> list[str]:
        return self._clones_for(snapshot).foresee(snapshot)

    def attach_away(self, snapshot: Snapshot, attachment_id: str) -> Elsewhere:
        return self._clones_for(snapshot).away(snapshot, attachment_id)

    def _clones_for(self, snapshot: Snapshot) -> Clones:
        if (clones := self._clones()) is None:
            raise PreconditionError("this is no EC2 instance", object=snapshot.id, cure="restore it on an instance")
        return clones

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
        from providers.ebs.swaps import Swaps

        return Swaps(self._api(), here, self.disks, self.settings.report)

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        swaps = self._swaps()
        if swaps is None:
            raise PreconditionError("this is no EC2 instance", object=snapshot.id, cure="restore it on the instance")
        swaps.swap(swap_id, snapshot, volume.id)

    def swap_back(self, swap_id: str) -> None:
        if (swaps := self._swaps()) is not None:
            swaps.back(swap_id)

    def swap_commit(self, swap_id: str) -> None:
        if (swaps := self._swaps()) is not None:
            swaps.commit(swap_id)

    def source_of(self, volume: str, known: str) -> str:
        from snapshotter.host.disks import Part, partition_in

        found = swaps.device_of(volume) if (swaps := self._swaps()) is not None else None
        return (self.disks.device(Part(found, partition_in(known))) if found else None) or known

    def swaps(self) -> Iterator[str]:
        if (swaps := self._swaps()) is not None:
            yield from swaps.listed()
