"""Instances of the twin as tests of the gce provider use them: this machine is all of them, with loop devices for its
disks, a directory for /dev/disk/by-id, and a word from DMI. Undone here, also after a failure."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import google.auth.compute_engine._metadata as metadata

from providers.gce import GceProvider, api, here
from snapshotter.core.model import Snapshot, Volume
from tests.twins.gce import Disks, Limits, Twin
from tests.twins.gce.disks import bytes_of_disks
from tests.unit.cloud_kit import CloudHarness, Remounting, closing, scratch_directory

ZONE = "europe-west3-a"


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    known = metadata._GCE_METADATA_HOST  # read when it was imported
    metadata._GCE_METADATA_HOST = values.get("GCE_METADATA_HOST", known)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        metadata._GCE_METADATA_HOST = known
        api._shared.cache_clear()
        here._ask.cache_clear()


def group(twin: Twin, names: list[str], zone: str = ZONE, name: str = "node-1") -> None:
    """Put these disks in a consistency group."""
    policy = twin.world.add_policy(zone.rpartition("-")[0], name)
    for each in names:
        twin.world.disks[f"zones/{zone}/disks/{each}"].resource_policies.append(policy)


class ProviderOf(Remounting, GceProvider):
    pass


class GceHarness(CloudHarness):
    """One instance of the twin; its disks' file systems are mounted below `scratch`."""

    PROVIDER = ProviderOf

    def __init__(self, twin: Twin, disks: Disks, scratch: Path, kind: str = "ext4", grouped: bool = False) -> None:
        super().__init__(twin, disks, scratch, kind)
        self.grouped = grouped
        self.instance = twin.here = twin.world.run_instance(ZONE)
        self.origins = set(twin.world.disks)
        self.regional: list[str] = []  # the zones of disks that are made from now on

    def volume(self, devices: int = 1) -> Volume:
        """A file system (a btrfs may lie over several devices), mounted."""
        found = []
        for _ in range(devices):
            self._made += 1
            name, device_name = f"d{self._made}", f"dev-{self._made}"
            where = {"place": "regions/europe-west3", "replica_zones": self.regional} if self.regional else {}
            made = self.twin.world.add_disk(name, self.instance, device_name=device_name, **where)
            if self.grouped:
                group(self.twin, [name])
            self.origins.add(made.path)
            found.append(os.path.realpath(self.disks.by_id / f"google-{device_name}"))
        return self.formatted(found, device_name)

    def replaced(self, zone: str = "us-central1-b") -> None:
        """The zone is lost with the instance and its disks, and this machine is an instance in another."""
        self.abandoned([os.path.realpath(link) for link in self.disks.by_id.iterdir()])
        self.twin.world.lose_zone(self.instance.zone)
        give_up = time.monotonic() + 60
        while list(self.disks.by_id.iterdir()):
            assert time.monotonic() < give_up, "the kernel lets go of loop devices in its own time"
            time.sleep(0.05)
            self.twin.world.settle()
        here._ask.cache_clear()
        self.instance = self.twin.here = self.twin.world.run_instance(zone)
        self.origins |= set(self.twin.world.disks)

    def _device(self, name: str) -> str | None:
        link = self.disks.by_id / f"google-{name}"
        return os.path.realpath(link) if link.exists() else None

    def again(self, volume: Volume) -> Volume:
        now = self.claimed(Path(str(volume.path)))
        place, _, name = now.id.partition("/")
        self.origins.add(f"zones/{place}/disks/{name}")
        return now

    def foreign(self, volume: Volume) -> Callable[[], bool]:
        """Another tool's snapshots: without labels, and with labels and a description as like ours as can be."""
        made = []
        for number, (labels, description) in enumerate(
            (
                ({"name": "data-daily"}, "daily"),
                ({"snapshotter-managed": "true", "snapshotter-set": "s20261122t100630z-5f3a9c"}, "theirs"),
                ({"snapshotter-managed": "true"}, '{"v":1}'),
            )
        ):
            self._made += 1
            name = f"theirs-{self._made}-{number}"
            theirs = self.twin.world.add_snapshot(name, volume.id, labels=labels, description=description)
            made.append((theirs, dict(labels)))
        there = self.twin.world.snapshots
        return lambda: all(there.get(each.name) is each and each.labels == labels for each, labels in made)

    def objects(self) -> set[str]:
        world = self.twin.world
        found = {*world.snapshots, *world.instants, *world.groups, *(set(world.disks) - self.origins)}
        return found | self.destinations()

    def damage(self, snapshot: Snapshot) -> bool:
        self.twin.world.snapshots[snapshot.id].error = "FAILED"
        return True


@contextmanager
def gce_harness(kind: str = "ext4", limits: Limits | None = None, grouped: bool = False) -> Iterator[GceHarness]:
    with (
        scratch_directory("g-") as scratch,
        bytes_of_disks(scratch / "disks") as disks,
        Twin(disks, limits) as twin,
        environment(twin.environment(keys=False)),
        closing(GceHarness(twin, disks, scratch, kind, grouped)) as harness,
    ):
        yield harness
