"""A validator on EC2, played through on NVMe disks as Nitro shows them: RocksDB under load on one EBS volume, what
belongs to it on another, and a writer that orders its writes over both. Taken hot; the instance is lost; restored on a
new one. And a logical volume over two of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.core.digest import sha256
from snapshotter.testing.harness import describe, fill
from tests.faults.test_ebs_kill import EbsCommand
from tests.lab.lvm_kit import lvm
from tests.lab.nvme_disks import NvmeDisks, nvme_disks
from tests.lab.test_lvm_hot import ORDERED
from tests.support import Node, check_database
from tests.twins.ec2 import Twin
from tests.unit.ebs_kit import EbsHarness, environment

pytestmark = pytest.mark.root


@pytest.fixture
def harness() -> Iterator[EbsHarness]:
    scratch = Path(tempfile.mkdtemp(prefix="e-"))
    try:
        with (
            nvme_disks(NvmeDisks, scratch / "disks") as disks,
            Twin(disks) as twin,
            environment(**twin.environment(keys=False)),
        ):
            made = EbsHarness(twin, disks, scratch, "ext4")
            try:
                yield made
            finally:
                made.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def numbers(log: Path, table: Path) -> tuple[int, int]:
    return int(log.read_text() or 0), int(table.read_text() or 0)


def test_a_validator_on_ec2(harness: EbsHarness) -> None:
    data, state = (Path(str(harness.volume().path)) for _ in range(2))
    assert isinstance(harness.disks, NvmeDisks)
    names = sorted(os.listdir("/dev/disk/by-id"))
    for volume in harness.origins:
        serial = volume.replace("-", "")
        rooted = harness.twin.world.volumes[volume].size != 1
        assert rooted or f"nvme-Amazon_Elastic_Block_Store_{serial}" in names, "udev links it as on Nitro"
    (data / "database").symlink_to(state / "database")
    (state / "database").mkdir()
    ballast = os.urandom(1 << 20)
    (data / "keep").write_bytes(ballast)
    (state / "database" / "keep").write_bytes(ballast[::-1])
    command = EbsCommand(harness.scratch / "etc", harness)
    command.config.parent.mkdir(exist_ok=True)
    command.config.write_text(f'[node.v]\npath = "{data}"\nprofile = "generic"\ntype = "validator"\n')
    table, log = data / "table", state / "database" / "log"
    writer = subprocess.Popen([sys.executable, "-c", ORDERED, str(log), str(table)])
    node = Node(data, "--rate", "1", "--fill", "2")
    try:
        node.wait_for(10, timeout=300)
        before, ordered = node.acknowledged(), numbers(log, table)[1]
        taken = command.json("take", "v", "--budget", "60s", timeout=600)
        assert (taken["grade"], taken["quiesce"], taken["good"]) == ("filesystem", "freeze", True), taken
        assert len(taken["snapshots"]) == 2 and harness.twin.count()["CreateSnapshots"] == 1
        assert node.process.poll() is None and writer.poll() is None
    finally:
        for process in (node.process, writer):
            process.kill()
            process.wait()
    harness.replaced()  # with the instance all that it had attached
    before_restore = harness.objects()
    clone = harness.scratch / "clone"
    command.json("restore", taken["set_id"], "--to", str(clone), timeout=600)
    assert sha256((clone / "keep").read_bytes()).digest() == sha256(ballast).digest()
    assert (clone / "database" / "keep").read_bytes() == ballast[::-1]
    found = check_database(clone)
    assert found["lost"] == 0 and found["head"] >= before, (found, before)
    first, second = numbers(clone / "database" / "log", clone / "table")
    assert second <= first <= second + 1 and second >= ordered, (first, second, ordered)
    command.json("release", str(clone), "--discard-changes", timeout=600)
    assert harness.objects() == before_restore


def test_a_logical_volume_over_two_volumes(harness: EbsHarness) -> None:
    """All the disks below it are taken at one instant, under a freeze; on another instance the group is activated."""
    made = [harness.twin.world.add_volume(harness.instance, f"/dev/sd{letter}") for letter in "gh"]
    harness.origins |= {each.id for each in made}
    devices = [harness.disks.device(each.id) for each in made]
    lvm("pvcreate", "-q", *devices)
    lvm("vgcreate", "-q", "ec2data", *devices)
    lvm("lvcreate", "-q", "--yes", "-i", "2", "-l", "100%FREE", "-n", "data", "ec2data")
    lvm("mkfs.xfs", "-q", "/dev/ec2data/data")
    data, clone = harness.scratch / "data", harness.scratch / "clone"
    data.mkdir()
    clone.mkdir()
    try:
        lvm("mount", "/dev/ec2data/data", str(data))
        fill(str(data))
        content = describe(str(data))
        command = EbsCommand(harness.scratch / "etc", harness)
        words = ("take", str(data), "--provider", "ebs", "--budget", "60s")
        taken = command.json(*words, timeout=600)
        assert (taken["quiesce"], taken["grade"], taken["good"]) == ("freeze", "filesystem", True), taken
        assert [each["volume"] for each in taken["snapshots"]] == ["+".join(sorted(each.id for each in made))]
        assert harness.twin.count()["CreateSnapshots"] == 1
        here = harness.instance.id
        assert "LVM2_member" in command.error("restore", taken["set_id"], "--to", str(clone), exit_code=3)["line"]
        beside = ("restore", taken["set_id"], "--away", "-o", f"instance={here}")
        assert "told apart" in command.error(*beside, exit_code=3)["line"]
        (data / "later").write_text("after the instant")
        lvm("umount", str(data))
        lvm("vgchange", "-an", "ec2data")
        harness.replaced()
        before = harness.objects()
        away = command.json("restore", taken["set_id"], "--away", "-o", f"instance={harness.instance.id}", timeout=600)
        lvm("udevadm", "settle")
        lvm("vgchange", "-ay", "ec2data")
        lvm("mount", "/dev/ec2data/data", str(clone))
        assert describe(str(clone)) == content
        release = ("release", away["attachment_id"], "--discard-changes")
        assert "mounted" in command.error(*release, exit_code=5)["line"]
        lvm("umount", str(clone))
        assert "ec2data-data" in command.error(*release, exit_code=5)["line"]
        lvm("vgchange", "-an", "ec2data")
        command.json(*release, timeout=600)
        assert harness.objects() == before
    finally:
        for point in (clone, data):
            lvm("umount", str(point), check=False)
        lvm("vgchange", "-an", "ec2data", check=False)
