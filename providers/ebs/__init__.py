"""ebs: snapshots of AWS EBS volumes, and volumes made of them. Must know no policy: what is kept is the core's.

A *volume* is an EBS volume, by its id. A set of one instance's volumes is one CreateSnapshots call, so one instant. Its
tags are the catalog (`tags`); there is no other record. An attachment is a new volume, attached to this instance.

On an instance (Nitro) a mount's volume is known by its disk's serial; what the metadata service and the disks say is
checked against EC2. From outside, volumes are named (`find`). No SDK is imported to find out that this isn't EC2.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from providers.ebs import sets, tags
from snapshotter.core.errors import (
    BusyError,
    Interrupted,
    NotFoundError,
    SnapshotterError,
    StorageError,
    UsageError,
)
from snapshotter.core.labels import check_marks, encode_birth, pack, slot_value
from snapshotter.core.model import (
    Birth,
    Hold,
    Quiesce,
    Snapshot,
    Tagged,
    Volume,
)
from snapshotter.core.remote import Deadline, Lost, operation_id, poll
from snapshotter.host import mounts
from snapshotter.host.cloud import Cloud, parts, refuse_unsealable
from snapshotter.host.disks import Part
from snapshotter.host.mounts import Mount
from snapshotter.provider import Option, Provider, Settings, Traits

if TYPE_CHECKING:
    from providers.ebs.api import Api
    from providers.ebs.choosing import Plan, Seen
    from providers.ebs.clones import Clones
    from providers.ebs.here import Here
    from providers.ebs.swaps import Swaps

_CREATE_S = 60.0
_REGION = re.compile(r"[a-z]+(-[a-z]+)+-[0-9]+")


class EbsProvider(Cloud, Provider):
    """See the module."""

    name = tags.NAME
    section = "aws"
    VENDOR = tags.VENDOR
    MACHINE = "EC2 instance"
    LIBRARY = "boto3"
    ELSEWHERE = "region"
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

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._plans: dict[str, Plan] = {}
        self._prepared: dict[str, Plan] = {}
        self._fresh: dict[str, tuple[Snapshot, ...]] = {}  # just created: the seal needs no look
        self._uncertain: dict[str, Deadline] = {}  # sets of which a reply was lost: when all of it will be listed
        self._seen: Seen = {}

    @staticmethod
    def _installed() -> bool:
        from importlib.util import find_spec

        return find_spec("boto3") is not None

    def _asked(self) -> Here:
        from providers.ebs.here import here

        return here()

    def _api(self) -> Api:
        from providers.ebs.api import connect

        region = self._option("region")
        if region is None and (here := self._here()) is not None:
            region = here.region
        return connect(region, self._option("profile"), self._option("role_arn"), self.clock)

    # -- which volumes ------------------------------------------------------------------------------------------

    def _volumes(self, mount: Mount, found: Sequence[Part]) -> list[str] | None:
        volumes = [tags.volume_of(self.disks.identity(part.disk, tags.BY_ID)) for part in found]
        known = [volume for volume in volumes if volume is not None]
        return known if len(known) == len(found) else None  # an instance store is among them

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
        for found in sets.snapshots(api.memory.over(listed, "SnapshotId", "snap-"), api.region):
            if (found.birth.target, found.birth.slot) == (target, slot):
                yield found

    def _plan(self, volumes: Sequence[Volume]) -> Plan:
        from providers.ebs import choosing

        here = self._here() if any(volume.path is not None for volume in volumes) else None
        ids = [part for volume in volumes for part in parts(volume.id)]
        return choosing.plan(self._api(), self._seen, ids, here.instance if here else None)

    # -- before -------------------------------------------------------------------------------------------------

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        encode_birth(birth)
        pack(birth.of_member(0), tags.LIMITS)
        for region in self._copy_to().split():
            if not _REGION.fullmatch(region):
                raise UsageError("is no name of an AWS region", object=region, cure="mend `copy_to` in [aws]")
        self._plans[birth.set_id] = self._plan(volumes)

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
        return tuple(sorted(sets.snapshots(whole, api.region), key=lambda snapshot: snapshot.birth.member))

    # -- afterwards ---------------------------------------------------------------------------------------------

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        if not self._used():
            return
        for found in sets.snapshots(self._items(set_id), self._api().region):
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
            refuse_unsealable(found, self.name, set_id)
        volumes.tag(
            self._api(),
            [part for snapshot in found for part in parts(snapshot.id)],
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
            found = [item for item in self._items(set_id) if sets.made_for(item, set_id)]
            self._drop_copies(api, set_id, found)
            sealed = [item["SnapshotId"] for item in found if "sealed" in tags.marks_of(tags.read(item))]
            if len(sealed) > 1:
                volumes.tag(api, sealed, {tags.mark("sealed"): None})  # half of a set is no backup
            for item in found:
                self._delete_one(api, item["SnapshotId"], within)
            if found or settling is None or settling.left() <= 0:
                break
            self.clock.sleep(min(5.0, settling.left()))
        self._uncertain.pop(set_id, None)

    def _drop_copies(self, api: Api, set_id: str, found: Sequence[Mapping[str, Any]]) -> None:
        from providers.ebs import copies

        for other in copies.begun(found):
            copies.drop(api, api.region, self._in_region(other), other, set_id, found)

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

        api = self._api()
        return copies.advance(api, api.region, self._in_region)

    def _in_region(self, region: str) -> Api:
        from providers.ebs.api import connect

        return connect(region, self._option("profile"), self._option("role_arn"), self.clock)

    def _copy_to(self) -> str:
        """The regions that sets are copied to, a blank between two; their own is none."""
        wanted = set(str(self._option("copy_to") or "").replace(",", " ").split())
        return " ".join(sorted(wanted - {self._api().region}))

    # -- volumes made of snapshots ------------------------------------------------------------------------------

    def _cloning(self) -> Clones:
        from providers.ebs.clones import Clones

        return Clones(self._api(), self._here(), self.disks, self.settings)

    def _swapping(self, here: Here) -> Swaps:
        from providers.ebs.swaps import Swaps

        return Swaps(self._api(), here, self.disks, self.settings.report, self.notes)
