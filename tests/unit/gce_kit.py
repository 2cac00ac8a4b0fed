"""Instances of the twin as tests of the gce provider use them: this machine is all of them, with loop devices for its
disks, a directory for /dev/disk/by-id, and a word from DMI. Undone here, also after a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import google.auth.compute_engine._metadata as metadata

from providers.gce import GceProvider, api, here
from snapshotter.core.model import Hold, Snapshot, Volume
from snapshotter.core.remote import Clock
from snapshotter.host import mounts
from snapshotter.provider import Settings
from snapshotter.testing.harness import Harness
from tests.twins.gce import Clock as TwinClock
from tests.twins.gce import Disks, Limits, Twin
from tests.twins.gce.disks import bytes_of_disks
from tests.unit.gce_command import DisksHere

ZONE = "europe-west3-a"


class QuickClock(Clock):
    """Waits for a moment where the provider waits for long, and the twin's time goes on as if it had been long."""

    def __init__(self, twin: TwinClock) -> None:
        self.twin = twin
        self.skipped = 0.0

    def now(self) -> float:
        return time.monotonic() + self.skipped

    def wall(self) -> float:
        return self.twin.now()

    def sleep(self, seconds: float) -> None:
        moment = min(seconds, 0.02)
        time.sleep(moment)
        self.skipped += seconds - moment
        self.twin.advance(seconds - moment)


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


class ProviderOf(GceProvider):
    """Unmounts what is to be swapped and mounts what a swap leaves, as the core does."""

    harness: GceHarness

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        with self.harness.unmounted():
            super().swap(swap_id, snapshot, volume)

    def swap_back(self, swap_id: str) -> None:
        with self.harness.unmounted():
            super().swap_back(swap_id)


class GceHarness(Harness):
    """One instance of the twin; its disks' file systems are mounted below `scratch`."""

    def __init__(self, twin: Twin, disks: Disks, scratch: Path, kind: str = "ext4", grouped: bool = False) -> None:
        self.twin, self.disks, self.scratch, self.kind, self.grouped = twin, disks, scratch, kind, grouped
        self.clock = QuickClock(twin.clock)
        self.instance = twin.here = twin.world.run_instance(ZONE)
        self.origins: set[str] = set(twin.world.disks)
        self.regional: list[str] = []  # the zones of disks that are made from now on
        self.points: dict[Path, str] = {}  # mount point -> device name
        self._made = 0

    def provider(self, **options: object) -> ProviderOf:
        provider = ProviderOf(Settings(str(self.scratch / "state"), options=options, floor=0.0))
        provider.disks = DisksHere(by_id=str(self.disks.by_id))
        provider.clock = self.clock
        provider.harness = self
        return provider

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
        lazy = ["-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", "-I", "256"]
        how = lazy if self.kind == "ext4" else []
        subprocess.run([f"mkfs.{self.kind}", "-q", *how, *found], check=True, capture_output=True)
        point = self.scratch / f"m{self._made}"
        point.mkdir()
        together = [word for other in found[1:] for word in ("-o", f"device={other}")]
        subprocess.run(["mount", *together, found[0], str(point)], check=True)
        self.points[point] = device_name
        return self.claimed(point)

    def replaced(self, zone: str = "us-central1-b") -> None:
        """The zone is lost with the instance and its disks, and this machine is an instance in another."""
        gone = [os.path.realpath(link) for link in self.disks.by_id.iterdir()]
        for point in self.points:
            mounts.unmount(os.path.realpath(point))
        self.points.clear()
        for device in gone:  # a machine that was never there knows nothing of them
            subprocess.run(["btrfs", "device", "scan", "--forget", device], capture_output=True)
        self.twin.world.lose_zone(self.instance.zone)
        give_up = time.monotonic() + 20
        while list(self.disks.by_id.iterdir()):
            assert time.monotonic() < give_up, "the kernel lets go of loop devices in its own time"
            time.sleep(0.05)
            self.twin.world.settle()
        here._ask.cache_clear()
        self.instance = self.twin.here = self.twin.world.run_instance(zone)
        self.origins |= set(self.twin.world.disks)

    def claimed(self, point: Path) -> Volume:
        claimed = self.provider().claim(mounts.mount_of(str(point)), str(point))
        assert claimed is not None
        return claimed

    @contextmanager
    def unmounted(self) -> Iterator[None]:
        def mounted(point: Path) -> bool:
            return mounts.is_mount_point(os.path.realpath(point))

        for point in self.points:
            if mounted(point):
                mounts.unmount(os.path.realpath(point))
        try:
            yield
        finally:
            for point, device_name in self.points.items():
                link = self.disks.by_id / f"google-{device_name}"
                if link.exists() and not mounted(point):
                    subprocess.run(["mount", os.path.realpath(link), str(point)], check=True)

    def again(self, volume: Volume) -> Volume:
        now = self.claimed(Path(str(volume.path)))
        place, _, name = now.id.partition("/")
        self.origins.add(f"zones/{place}/disks/{name}")
        return now

    def hold(self) -> Hold:
        """The suite writes nothing meanwhile: what a freeze would write out is to be on the disk, that is all."""
        for point in self.points:
            subprocess.run(["sync", "-f", str(point)], check=True)
        return Hold()

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

    def destination(self) -> str:
        self._made += 1
        return str(self.scratch / f"attached-{self._made}")

    def objects(self) -> set[str]:
        world = self.twin.world
        found = {*world.snapshots, *world.instants, *world.groups, *(set(world.disks) - self.origins)}
        return found | {name for name in os.listdir(self.scratch) if name.startswith("attached-")}

    def damage(self, snapshot: Snapshot) -> bool:
        self.twin.world.snapshots[snapshot.id].error = "FAILED"
        return True

    def close(self) -> None:
        for point in reversed(self.points):
            subprocess.run(["umount", str(point)], capture_output=True)


@contextmanager
def gce_harness(kind: str = "ext4", limits: Limits | None = None, grouped: bool = False) -> Iterator[GceHarness]:
    """The paths are short, because a set of two must have room for both in its record."""
    scratch = Path(tempfile.mkdtemp(prefix="g-"))
    try:
        with (
            bytes_of_disks(scratch / "disks") as disks,
            Twin(disks, limits) as twin,
            environment(twin.environment(keys=False)),
        ):
            harness = GceHarness(twin, disks, scratch, kind, grouped)
            try:
                yield harness
            finally:
                harness.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
