"""Instances of the twin as tests of the ebs provider use them: this machine is all of them, with loop devices for NVMe
disks, a directory for /dev/disk/by-id, and a word from DMI. Undone here, also after a failure."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import botocore.loaders

from providers.ebs import EbsProvider, api, here
from providers.ebs.tags import BY_ID, VENDOR, serial
from snapshotter.core.model import Hold, Snapshot, Volume
from snapshotter.core.remote import Clock
from snapshotter.host import disks as host_disks
from snapshotter.host import mounts
from snapshotter.provider import Settings
from snapshotter.testing.harness import Harness
from tests.twins.ec2 import Clock as TwinClock
from tests.twins.ec2 import Disks, Limits, Twin
from tests.twins.ec2.disks import bytes_of_disks

REGION = "eu-central-1"

# Each run's client would read EC2's model, ten megabytes of JSON, once more: half a second, a hundred times.
botocore.loaders.create_loader = functools.cache(botocore.loaders.create_loader)


class DisksHere(host_disks.Disks, frozen=True):
    """What DMI says on EC2."""

    def vendor(self) -> str:
        return VENDOR


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
def environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        api._shared.cache_clear()  # a client is tens of megabytes, and each test has its own


class ProviderOf(EbsProvider):
    """Unmounts what is to be swapped and mounts what a swap leaves, as the core does."""

    harness: EbsHarness

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        with self.harness.unmounted():
            super().swap(swap_id, snapshot, volume)

    def swap_back(self, swap_id: str) -> None:
        with self.harness.unmounted():
            super().swap_back(swap_id)


class EbsHarness(Harness):
    """One instance of the twin; its volumes' file systems are mounted below `scratch`."""

    def __init__(self, twin: Twin, disks: Disks, scratch: Path, kind: str = "ext4") -> None:
        self.twin, self.disks, self.scratch, self.kind = twin, disks, scratch, kind
        self.clock = QuickClock(twin.clock)
        self.instance = twin.here = twin.world.run_instance()
        self.origins: set[str] = {volume.id for volume in twin.world.volumes.values()}
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
        made = []
        for _ in range(devices):
            self._made += 1
            made.append(self.twin.world.add_volume(self.instance, f"/dev/sd{'fghijklmnop'[self._made]}"))
        self.origins |= {each.id for each in made}
        names = [self.disks.device(each.id) for each in made]
        lazy = ["-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", "-I", "256"]
        subprocess.run(
            [f"mkfs.{self.kind}", "-q", *(lazy if self.kind == "ext4" else []), *names],
            check=True,
            capture_output=True,
        )
        point = self.scratch / f"data-{self._made}"
        point.mkdir()
        together = [word for other in names[1:] for word in ("-o", f"device={other}")]
        subprocess.run(["mount", *together, names[0], str(point)], check=True)
        assert made[0].attached is not None
        self.points[point] = made[0].attached.device
        return self.claimed(point)

    def replaced(self) -> None:
        """The instance is lost with its disks, and this machine is another."""
        for point in self.points:
            mounts.unmount(os.path.realpath(point))
        self.points.clear()
        lost = [each.id for each in self.twin.world.of_instance(self.instance.id) if each.size == 1]
        gone = [self.disks.device(each) for each in lost]
        self.twin.world.terminate(self.instance)
        for device in gone:  # a machine that was never there knows nothing of them
            subprocess.run(["btrfs", "device", "scan", "--forget", device], capture_output=True)
        give_up = time.monotonic() + 20
        while [each for each in self.twin.world.of_instance(self.instance.id) if each.id in lost]:
            assert time.monotonic() < give_up, "the kernel lets go of loop devices in its own time"
            time.sleep(0.05)
        here._ask.cache_clear()
        self.instance = self.twin.here = self.twin.world.run_instance()
        self.origins |= {volume.id for volume in self.twin.world.of_instance(self.instance.id)}

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
            # Asked of EC2 and of the disks, not of the twin: this may be a child that was forked off.
            asked = self.provider()._api()
            given = [{"Name": "attachment.instance-id", "Values": [self.instance.id]}]
            there = asked.call("describe_volumes", asked.deadline("the harness"), Filters=given)["Volumes"]
            devices = {item["Attachments"][0]["Device"]: item["VolumeId"] for item in there if item["Attachments"]}
            for point, device in self.points.items():
                disk = self.provider().disks.find(serial(devices.get(device, "-")), BY_ID)
                if disk is not None and not mounted(point):
                    subprocess.run(["mount", f"/dev/{disk}", str(point)], check=True)

    def again(self, volume: Volume) -> Volume:
        now = self.claimed(Path(str(volume.path)))
        self.origins.add(now.id)
        return now

    def hold(self) -> Hold:
        """The suite writes nothing meanwhile: what a freeze would write out is to be on the disk, that is all."""
        for point in self.points:
            subprocess.run(["sync", "-f", str(point)], check=True)
        return Hold()

    def foreign(self, volume: Volume) -> Callable[[], bool]:
        """Another tool's snapshots: without tags, and with tags as like ours as can be."""
        from tests.twins.ec2.world import Snapshot as Theirs
        from tests.twins.ec2.world import new_id

        now = self.twin.clock.now() - 3600
        made = []
        for tags in (
            {"Name": "data-daily"},
            {"snapshotter:managed": "true", "snapshotter:set": "s20261122t100630z-5f3a9c"},
            {"snapshotter:birth0": "eyJ2Ijox", "snapshotter:managed": "true"},
        ):
            theirs = Theirs(
                id=new_id("snap"), region=REGION, born=now, tagged=[(now, tags)], volume=volume.id, size=1, done=now
            )
            self.twin.world.snapshots[theirs.id] = theirs
            made.append((theirs, dict(tags)))
        return lambda: all(theirs.gone is None and theirs.tags == tags for theirs, tags in made)

    def destination(self) -> str:
        self._made += 1
        return str(self.scratch / f"attached-{self._made}")

    def objects(self) -> set[str]:
        world = self.twin.world
        found = {each.id for each in world.snapshots.values() if each.gone is None}
        found |= {each.id for each in world.volumes.values() if each.gone is None and each.id not in self.origins}
        return found | {name for name in os.listdir(self.scratch) if name.startswith("attached-")}

    def damage(self, snapshot: Snapshot) -> bool:
        self.twin.world.snapshots[snapshot.id].error = "An internal error"
        return True

    def close(self) -> None:
        for point in reversed(self.points):
            subprocess.run(["umount", str(point)], capture_output=True)


@contextmanager
def ebs_harness(kind: str = "ext4", limits: Limits | None = None) -> Iterator[EbsHarness]:
    """The paths are short, because a set of two must have room for both in its record."""
    scratch = Path(tempfile.mkdtemp(prefix="e-"))
    try:
        with (
            bytes_of_disks(scratch / "disks") as disks,
            Twin(disks, limits) as twin,
            environment(**twin.environment(keys=False)),
        ):
            harness = EbsHarness(twin, disks, scratch, kind)
            try:
                yield harness
            finally:
                harness.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
