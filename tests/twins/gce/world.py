"""What the twin's Compute Engine consists of: instances, disks, snapshots, instant ones and their groups, policies,
operations, and the time that all of it takes. Must know neither HTTP nor JSON.

States follow the clock. What is to happen later (an image is fixed, an object is gone) is done by `settle`, before
anybody looks, and while nobody does. Places are `zones/Z`, `regions/R`, `global`; a path is `PLACE/KIND/NAME`.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import itertools
import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

from tests.twins.gce.disks import BY_ID, Disks
from tests.twins.gce.wire import Refusal
from tests.twins.knobs import Clock

PROJECT, NUMBER = "twin-project", "123456789012"
API = "https://www.googleapis.com/compute/v1"
_PACIFIC = timezone(timedelta(hours=-8))


@dataclass
class Limits:
    """Quotas and times. None: unlimited. The rates of one object are off unless asked for."""

    pending_s: float = 0.0  # operations are PENDING, then RUNNING
    operate_s: float = 0.0  # until they are DONE, if nothing below says more
    capture_s: float = 0.0  # a snapshot is CREATING; its image is the disk as it is at the end of that
    upload_s: float = 0.0  # UPLOADING -> READY
    done_when_uploaded: bool = True  # the operation of a snapshot, or already when its image is fixed
    create_s: float = 0.0  # a disk is CREATING
    lag_s: float = 0.0  # until lists show it
    per_minute: dict[str, int] = field(
        default_factory=dict
    )  # method, or its kind: get, list, change, operation, or "*"
    hourly: int | None = None  # snapshots of a disk, disks of a snapshot, in 60 minutes: 6 at Compute Engine
    spacing_s: float = 0.0  # between two of these
    instant_spacing_s: float = 0.0  # between instant snapshots of a disk: 30
    instants: int = 32  # of a disk
    snapshots: int | None = None
    disks_gib: int | None = None
    attached: int = 128  # disks of an instance
    pulls: bool = False  # a disk that is mounted is detached at once, as `detach-disk` warns of; else when it isn't
    keys_denied: set[str] = field(default_factory=set)  # KMS keys that Compute Engine may not use


@dataclass(kw_only=True)
class Resource:
    path: str
    born: float
    id: str = field(default_factory=lambda: str(secrets.randbelow(8 * 10**18) + 10**18))
    description: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    leaving: bool = False
    error: str = ""  # the status that it has instead

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def place(self) -> str:
        return "/".join(self.path.split("/")[:-2])

    @property
    def bytes(self) -> str:
        """What `Disks` knows it by: names come again."""
        return f"{self.path.split('/')[-2]}-{self.id}"

    @property
    def fingerprint(self) -> str:
        text = json.dumps(self.labels, sort_keys=True)
        return base64.b64encode(hashlib.sha256(text.encode()).digest()[:8]).decode()


@dataclass(kw_only=True)
class Instance(Resource):
    status: str = "RUNNING"
    disks: list[Attached] = field(default_factory=list)

    @property
    def zone(self) -> str:
        return self.path.split("/")[1]


@dataclass
class Attached:
    disk: str  # its path
    device_name: str
    boot: bool = False
    auto_delete: bool = False
    mode: str = "READ_WRITE"
    interface: str = "SCSI"


@dataclass(kw_only=True)
class Disk(Resource):
    size: int
    type: str = "pd-balanced"
    replica_zones: list[str] = field(default_factory=list)
    resource_policies: list[str] = field(default_factory=list)
    key: str = ""
    snapshot: str = ""  # the path of what it was made of
    snapshot_id: str = ""
    provisioned_iops: int = 0
    provisioned_throughput: int = 0
    access_mode: str = ""
    storage_pool: str = ""
    ready: float = 0.0
    users: list[str] = field(default_factory=list)  # paths of instances

    @property
    def zones(self) -> list[str]:
        """Where it may be attached."""
        return self.replica_zones or [self.path.split("/")[1]]


@dataclass(kw_only=True)
class Snapshot(Resource):
    source: str  # the disk's path
    source_id: str
    size: int
    fixed: float  # its image
    done: float
    instant: str = ""
    instant_id: str = ""
    key: str = ""
    kind: str = "STANDARD"
    locations: list[str] = field(default_factory=list)
    failed: bool = False


@dataclass(kw_only=True)
class Instant(Resource):
    source: str
    source_id: str
    size: int
    group: str = ""
    group_id: str = ""
    ready: float = 0.0


@dataclass(kw_only=True)
class Group(Resource):
    policy: str
    ready: float = 0.0


@dataclass(kw_only=True)
class Policy(Resource):
    consistency_group: bool = True


@dataclass(kw_only=True)
class Operation(Resource):
    kind: str
    target: str
    target_id: str
    runs: float
    ends: float
    code: str = ""  # of the error that it ends with
    message: str = ""
    until: Callable[[], bool] | None = None  # it isn't done before


R = TypeVar("R", bound=Resource)


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, _PACIFIC).isoformat(timespec="milliseconds")


def region_of(zone: str) -> str:
    return zone.rpartition("-")[0]


class World:
    def __init__(self, disks: Disks | None, limits: Limits, clock: Clock) -> None:
        self.bytes, self.limits, self.clock = disks, limits, clock
        self.project = PROJECT
        self.zones = [f"europe-west3-{letter}" for letter in "abc"] + [f"us-central1-{letter}" for letter in "abcf"]
        self.unreachable: set[str] = set()  # places of which aggregated lists say no more than that
        self.instances: dict[str, Instance] = {}
        self.disks: dict[str, Disk] = {}
        self.snapshots: dict[str, Snapshot] = {}  # by name
        self.instants: dict[str, Instant] = {}
        self.groups: dict[str, Group] = {}
        self.policies: dict[str, Policy] = {}
        self.operations: dict[str, Operation] = {}
        self.by_request: dict[str, tuple[object, Operation]] = {}  # requestId -> what was asked, what it began
        self.happened: dict[str, list[float]] = {}  # what, of which object -> when
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._parting: list[tuple[Instance, Attached]] = []

    @property
    def regions(self) -> list[str]:
        return sorted({region_of(zone) for zone in self.zones})

    # -- what tests make directly -------------------------------------------------------------------------------

    def run_instance(self, zone: str = "europe-west3-a", name: str = "") -> Instance:
        """With a boot disk, which has no bytes."""
        name = name or f"node-{len(self.instances) + 1}"
        instance = Instance(path=f"zones/{zone}/instances/{name}", born=self.clock.now())
        self.instances[instance.path] = instance
        self.add_disk(name, instance, "persistent-disk-0", size=10, with_bytes=False)
        instance.disks[0].boot = instance.disks[0].auto_delete = True
        return instance

    def add_disk(
        self,
        name: str,
        instance: Instance | None = None,
        device_name: str = "",
        size: int = 1,
        *,
        place: str = "",
        with_bytes: bool = True,
        **more: Any,
    ) -> Disk:
        """A disk that was always there; attached, if an instance is given."""
        place = place or f"zones/{instance.zone if instance else self.zones[0]}"
        disk = Disk(path=f"{place}/disks/{name}", born=self.clock.now() - 86400, size=size, **more)
        self.disks[disk.path] = disk
        if self.bytes and with_bytes:
            self.bytes.make(disk.bytes, size)
        if instance is not None:
            self.join(instance, disk, Attached(disk.path, device_name or name), with_bytes=with_bytes)
        return disk

    def add_snapshot(self, name: str, volume: str, **more: Any) -> Snapshot:
        """One that was always there, of nothing. `volume`: `ZONE/DISK`."""
        zone, _, disk = volume.partition("/")
        past = self.clock.now() - 86400
        source = self.disks[f"zones/{zone}/disks/{disk}"]
        how = {"source": source.path, "source_id": source.id, "size": source.size, "locations": [region_of(zone)]}
        made = Snapshot(path=f"global/snapshots/{name}", born=past, fixed=past, done=past, **{**how, **more})
        self.snapshots[name] = made
        return made

    def add_policy(self, region: str, name: str, *, consistency_group: bool = True) -> str:
        """The path of a resource policy, for `Disk.resource_policies`."""
        path = f"regions/{region}/resourcePolicies/{name}"
        if path not in self.policies:
            self.policies[path] = Policy(path=path, born=self.clock.now(), consistency_group=consistency_group)
        return path

    def lose_zone(self, zone: str) -> None:
        """A zone is gone, with its instances, zonal disks and instant snapshots."""
        for table in (self.instances, self.disks, self.instants, self.groups):
            for path in [path for path in table if path.startswith(f"zones/{zone}/")]:
                if isinstance(gone := table.pop(path), Instance):
                    for each in list(gone.disks):
                        self.part(gone, each)
        self.zones.remove(zone)

    # -- disks and instances ------------------------------------------------------------------------------------

    def join(self, instance: Instance, disk: Disk, how: Attached, *, with_bytes: bool = True) -> None:
        instance.disks.append(how)
        disk.users.append(instance.path)
        if self.bytes and with_bytes:
            link = BY_ID.format(device_name=how.device_name)
            self.bytes.attach(disk.bytes, link, read_only=how.mode == "READ_ONLY")

    def part(self, instance: Instance, how: Attached) -> None:
        """Not while it is mounted, unless it `pulls`: then as soon as it isn't."""
        if not self._part(instance, how):
            self._parting.append((instance, how))

    def _part(self, instance: Instance, how: Attached) -> bool:
        disk = self.disks.get(how.disk)
        if disk is not None and self.bytes and not self.bytes.detach(disk.bytes):
            if not self.limits.pulls:
                return False
            # The kernel here can't lose a disk: what is mounted goes on, unlinked, until these bytes are closed.
            (self.bytes.by_id / BY_ID.format(device_name=how.device_name)).unlink(missing_ok=True)
        if how in instance.disks:
            instance.disks.remove(how)
        if disk is not None and instance.path in disk.users:
            disk.users.remove(instance.path)
        return True

    def shoot(self, disks: Sequence[Disk], images: Sequence[Resource]) -> None:
        """Their bytes, as they are now, at one instant."""
        pairs = [
            (d, i) for d, i in zip(disks, images, strict=True) if self.bytes and (self.bytes.live / d.bytes).exists()
        ]
        if self.bytes and pairs:
            self.bytes.shoot([disk.bytes for disk, _ in pairs], [image.bytes for _, image in pairs])

    def image(self, source: Resource | None) -> str:
        """What `Disks` has of it; ''."""
        there = self.bytes and source is not None and (self.bytes.images / source.bytes).exists()
        return source.bytes if there and source is not None else ""

    def drop(self, table: dict[str, Any], key: str) -> None:
        """It is gone, and so are its bytes, and a disk's instant snapshots."""
        gone = table.pop(key, None)
        if gone is None:
            return
        if self.bytes:
            self.bytes.drop_volume(gone.bytes)
            self.bytes.drop_image(gone.bytes)
        if table is self.disks:
            for path in [each.path for each in self.instants.values() if each.source_id == gone.id]:
                self.drop(self.instants, path)

    # -- the time -----------------------------------------------------------------------------------------------

    def later(self, when: float, act: Callable[[], None]) -> None:
        """`act` at that time; now, if it is now."""
        if when <= self.clock.now():
            act()
        else:
            heapq.heappush(self._later, (when, next(self._numbers), act))

    def settle(self) -> None:
        self._parting = [(who, how) for who, how in self._parting if not self._part(who, how)]
        while self._later and self._later[0][0] <= self.clock.now():
            heapq.heappop(self._later)[2]()

    def seen(self, found: Iterable[R]) -> list[R]:
        """What lists show already."""
        return [each for each in found if each.born <= self.clock.now() - self.limits.lag_s]

    def find(self, table: dict[str, R], key: str, path: str) -> R:
        """One that a call names. Raises Refusal."""
        if key not in table:
            raise Refusal("notFound", f"The resource '{self.full(path)}' was not found")
        return table[key]

    def too_often(self, what: str, most: int | None, seconds: float) -> bool:
        """Whether `what` happened within the last `seconds`, or `most` times in the last hour."""
        now = self.clock.now()
        recent = [when for when in self.happened.get(what, []) if when > now - 3600]
        return (most is not None and len(recent) >= most) or any(when > now - seconds for when in recent)

    def full(self, path: str) -> str:
        return f"projects/{self.project}/{path}"

    def link(self, path: str) -> str:
        return f"{API}/{self.full(path)}" if path else ""

    def path(self, link: str, field: str = "resource") -> str:
        """Of a full or partial link. Raises Refusal for what is none, or is another project's."""
        path = "projects/" + link.partition("/projects/")[2] if "/projects/" in link else link
        if path.startswith("projects/"):
            project, _, path = path.removeprefix("projects/").partition("/")
            if project not in (self.project, NUMBER):
                raise Refusal("notFound", f"The resource 'projects/{project}/{path}' was not found")
        if path.partition("/")[0] not in ("zones", "regions", "global"):
            raise Refusal("invalid", f"Invalid value for field '{field}': '{link}'. The URL is malformed.")
        return path

    # -- states -------------------------------------------------------------------------------------------------

    def disk_status(self, disk: Disk) -> str:
        if disk.leaving:
            return "DELETING"
        if disk.error:
            return disk.error
        if self.clock.now() < disk.ready:
            return "RESTORING" if disk.snapshot else "CREATING"
        return "READY"

    def snapshot_status(self, snapshot: Snapshot) -> str:
        now = self.clock.now()
        if snapshot.leaving:
            return "DELETING"
        if snapshot.error or (snapshot.failed and now >= snapshot.done):
            return snapshot.error or "FAILED"
        return "CREATING" if now < snapshot.fixed else "UPLOADING" if now < snapshot.done else "READY"

    def operation_status(self, operation: Operation) -> str:
        now = self.clock.now()
        if now < operation.runs:
            return "PENDING"
        if now < operation.ends or (operation.until is not None and not operation.until()):
            return "RUNNING"
        operation.until = None
        return "DONE"
