"""What the twin's EC2 consists of: instances, volumes, snapshots, their tags, and the time that all of it takes. Must
know neither HTTP nor XML.

States follow the clock: nothing has a thread. What was created, tagged or deleted is seen by others `lag_s` later.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from tests.twins.ec2.disks import Disks
from tests.twins.ec2.wire import Refusal
from tests.twins.knobs import Clock

ACCOUNT = "123456789012"


@dataclass
class Limits:
    """Quotas and times. None: unlimited."""

    upload_s: float = 0.0  # pending -> completed
    create_s: float = 0.0  # creating -> available, attaching -> attached
    lag_s: float = 0.0  # until others see it
    spacing_s: float = 0.0  # between two snapshots of one volume: 15 at EC2
    concurrent: dict[str, int] = field(default_factory=lambda: {"st1": 1, "sc1": 1})  # pending per volume; else 5
    snapshots: int | None = 100_000
    copies: int = 20  # under way into one region
    volumes_gib: int | None = None
    buckets: dict[str, tuple[float, float]] = field(default_factory=dict)  # action, or "*": capacity, per second
    busy_s: float = 30.0  # detaching -> busy, where the disk is in use: real seconds
    keys_denied: set[str] = field(default_factory=set)  # KMS keys that the caller may not use


@dataclass(kw_only=True)
class Resource:
    id: str
    region: str
    born: float
    gone: float | None = None
    tagged: list[tuple[float, dict[str, str]]] = field(default_factory=list)

    @property
    def tags(self) -> dict[str, str]:
        """As they really are."""
        return self.tagged[-1][1] if self.tagged else {}

    def tags_at(self, moment: float) -> dict[str, str]:
        return next((tags for since, tags in reversed(self.tagged) if since <= moment), {})


@dataclass(kw_only=True)
class Instance(Resource):
    zone: str
    root_device: str = "/dev/xvda"
    state: str = "running"


@dataclass
class Attached:
    instance: str
    device: str
    since: float
    leaving: bool = False
    waiting: float = 0.0
    ends_with_instance: bool = False  # DeleteOnTermination: AttachVolume always makes it false


@dataclass(kw_only=True)
class Volume(Resource):
    zone: str
    size: int
    kind: str = "gp3"
    iops: int | None = None
    throughput: int | None = None
    encrypted: bool = False
    key: str | None = None
    snapshot: str = ""
    initialization_rate: int | None = None
    ready: float = 0.0
    error: bool = False
    attached: Attached | None = None
    token: str = ""


@dataclass(kw_only=True)
class Snapshot(Resource):
    volume: str
    size: int
    done: float
    encrypted: bool = False
    key: str | None = None
    description: str = ""
    error: str = ""
    copied: bool = False  # from another region
    tier: str = "standard"  # or "archive"


R = TypeVar("R", bound=Resource)


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(8)}{secrets.token_hex(1)[:1]}"


def moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


class World:
    def __init__(self, disks: Disks | None, limits: Limits, clock: Clock) -> None:
        self.disks, self.limits, self.clock = disks, limits, clock
        self.instances: dict[str, Instance] = {}
        self.volumes: dict[str, Volume] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self.by_token: dict[str, tuple[dict[str, Any], str]] = {}  # ClientToken -> parameters, volume

    # -- what tests make directly -------------------------------------------------------------------------------

    def run_instance(self, zone: str = "eu-central-1a") -> Instance:
        """With a root volume, which has no bytes."""
        instance = Instance(id=new_id("i"), region=zone[:-1], born=self.clock.now(), zone=zone)
        self.instances[instance.id] = instance
        self.add_volume(instance, "/dev/xvda", size=8, with_bytes=False)
        return instance

    def add_volume(
        self, instance: Instance, device: str, size: int = 1, *, with_bytes: bool = True, **more: Any
    ) -> Volume:
        """A volume that was always there, attached."""
        now = self.clock.now()
        volume = Volume(
            id=new_id("vol"), region=instance.region, born=now - 86400, zone=instance.zone, size=size, **more
        )
        self.volumes[volume.id] = volume
        if self.disks and with_bytes:
            self.disks.make(volume.id, size)
            self.disks.attach(volume.id)
        volume.attached = Attached(instance.id, device, now - 86400)
        return volume

    def terminate(self, instance: Instance) -> None:
        instance.state = "terminated"
        for volume in self.volumes.values():
            if volume.attached and volume.attached.instance == instance.id:
                volume.attached.leaving = True

    # -- the time -----------------------------------------------------------------------------------------------

    def seen(self, resource: Resource) -> bool:
        horizon = self.clock.now() - self.limits.lag_s
        return resource.born <= horizon and (resource.gone is None or resource.gone > horizon)

    def tags(self, resource: Resource) -> dict[str, str]:
        return resource.tags_at(self.clock.now() - self.limits.lag_s) if resource.tagged else {}

    def retag(self, resource: Resource, tags: dict[str, str]) -> None:
        resource.tagged.append((self.clock.now(), tags))

    def listed(self, kind: dict[str, R], region: str) -> Iterator[R]:
        yield from (found for found in kind.values() if found.region == region and self.seen(found))

    def find(self, kind: dict[str, R], name: str, region: str, what: str) -> R:
        """One that a call names. Raises Refusal."""
        found = kind.get(name)
        if found is None or found.region != region or found.gone is not None or not self.seen(found):
            raise Refusal(f"Invalid{what}.NotFound", f"The {what.lower()} '{name}' does not exist.")
        return found

    def volume_state(self, volume: Volume) -> str:
        if volume.gone is not None:
            return "deleting"
        if volume.error:
            return "error"
        if self.clock.now() < volume.ready:
            return "creating"
        return "in-use" if self.attachment_state(volume) else "available"

    def attachment_state(self, volume: Volume) -> str:
        """'' when it isn't attached. A disk that is mounted doesn't let go."""
        attached = volume.attached
        if attached is None:
            return ""
        if attached.leaving:
            if self.disks and not self.disks.detach(volume.id):
                # The kernel's own time, however fast the twin's goes.
                attached.waiting = attached.waiting or time.monotonic()
                return "busy" if time.monotonic() - attached.waiting > self.limits.busy_s else "detaching"
            volume.attached = None
            return ""
        return "attaching" if self.clock.now() < attached.since + self.limits.create_s else "attached"

    def snapshot_state(self, snapshot: Snapshot) -> str:
        if snapshot.error and self.clock.now() >= snapshot.done:
            return "error"
        return "completed" if self.clock.now() >= snapshot.done else "pending"

    def of_instance(self, instance: str) -> list[Volume]:
        return [
            volume
            for volume in self.volumes.values()
            if volume.attached and volume.attached.instance == instance and self.attachment_state(volume)
        ]
