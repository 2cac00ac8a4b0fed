"""Instances of the twin as tests of the ebs provider use them: this machine is all of them, with loop devices for NVMe
disks, a directory for /dev/disk/by-id, and a word from DMI. Undone here, also after a failure."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from providers.ebs import EbsProvider, api, here
from providers.ebs.tags import BY_ID, serial
from snapshotter.core.model import Snapshot, Volume
from tests.twins.ec2 import Disks, Limits, Twin
from tests.twins.ec2.disks import bytes_of_disks
from tests.unit import ebs_command  # noqa: F401  (its patch of botocore)
from tests.unit.cloud_kit import CloudHarness, Remounting, closing, scratch_directory

REGION = "eu-central-1"


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
        here._ask.cache_clear()  # another twin may get the same port


class ProviderOf(Remounting, EbsProvider):
    pass


class EbsHarness(CloudHarness):
    """One instance of the twin; its volumes' file systems are mounted below `scratch`."""

    PROVIDER = ProviderOf

    def __init__(self, twin: Twin, disks: Disks, scratch: Path, kind: str = "ext4") -> None:
        super().__init__(twin, disks, scratch, kind)
        self.instance = twin.here = twin.world.run_instance()
        self.origins = {volume.id for volume in twin.world.volumes.values()}

    def volume(self, devices: int = 1) -> Volume:
        """A file system (a btrfs may lie over several devices), mounted."""
        made = []
        for _ in range(devices):
            self._made += 1
            made.append(self.twin.world.add_volume(self.instance, f"/dev/sd{'fghijklmnop'[self._made]}"))
        self.origins |= {each.id for each in made}
        return self.formatted([self.disks.device(each.id) for each in made], made[0].attached.device)

    def replaced(self) -> None:
        """The instance is lost with its disks, and this machine is another."""
        lost = [each.id for each in self.twin.world.of_instance(self.instance.id) if each.size == 1]
        self.abandoned([self.disks.device(each) for each in lost])
        self.twin.world.terminate(self.instance)
        give_up = time.monotonic() + 60
        while [each for each in self.twin.world.of_instance(self.instance.id) if each.id in lost]:
            assert time.monotonic() < give_up, "the kernel lets go of loop devices in its own time"
            time.sleep(0.05)
        here._ask.cache_clear()
        self.instance = self.twin.here = self.twin.world.run_instance()
        self.origins |= {volume.id for volume in self.twin.world.of_instance(self.instance.id)}

    def _device(self, name: str) -> str | None:
        # Asked of EC2 and of the disks, not of the twin: this may be a child that was forked off.
        provider = self.provider()
        asked = provider._api()
        given = [{"Name": "attachment.instance-id", "Values": [self.instance.id]}]
        there = asked.call("describe_volumes", asked.deadline("the harness"), Filters=given)["Volumes"]
        devices = {item["Attachments"][0]["Device"]: item["VolumeId"] for item in there if item["Attachments"]}
        disk = provider.disks.find(serial(devices.get(name, "")), BY_ID)
        return f"/dev/{disk}" if disk is not None else None

    def again(self, volume: Volume) -> Volume:
        now = self.claimed(Path(str(volume.path)))
        self.origins.add(now.id)
        return now

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

    def objects(self) -> set[str]:
        world = self.twin.world
        found = {each.id for each in world.snapshots.values() if each.gone is None}
        found |= {each.id for each in world.volumes.values() if each.gone is None and each.id not in self.origins}
        return found | self.destinations()

    def damage(self, snapshot: Snapshot) -> bool:
        self.twin.world.snapshots[snapshot.id].error = "An internal error"
        return True


@contextmanager
def ebs_harness(kind: str = "ext4", limits: Limits | None = None) -> Iterator[EbsHarness]:
    with (
        scratch_directory("e-") as scratch,
        bytes_of_disks(scratch / "disks") as disks,
        Twin(disks, limits) as twin,
        environment(**twin.environment(keys=False)),
        closing(EbsHarness(twin, disks, scratch, kind)) as harness,
    ):
        yield harness
