"""A disk that Compute Engine attaches, in the lab: the kernel shows it as NVMe, and udev links it by the device name
that the provider gave it, as Google's own rule does. Restored beside its origin, compared byte for byte, released."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.testing.harness import describe, fill, ruin
from tests.faults.test_gce_kill import GceCommand
from tests.lab.nvme_disks import GoogleDisks, nvme_disks
from tests.twins.gce import Twin
from tests.unit.gce_kit import GceHarness, environment

pytestmark = pytest.mark.root


@pytest.fixture
def harness() -> Iterator[GceHarness]:
    scratch = Path(tempfile.mkdtemp(prefix="g-"))
    try:
        with (
            nvme_disks(GoogleDisks, scratch / "disks") as disks,
            Twin(disks) as twin,
            environment(twin.environment(keys=False)),
        ):
            made = GceHarness(twin, disks, scratch, "xfs")
            try:
                yield made
            finally:
                made.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def links() -> set[str]:
    subprocess.run(["udevadm", "settle"], check=True)
    return {name for name in os.listdir("/dev/disk/by-id") if name.startswith("google-")}


def test_what_is_attached_is_linked_by_the_name_that_we_gave_it(harness: GceHarness) -> None:
    data = str(harness.volume().path)
    fill(data)
    before, content, objects = links(), describe(data), harness.objects()
    assert "google-dev-1" in before, "udev links it as on Compute Engine"
    command = GceCommand(harness.scratch / "etc", harness)
    taken = command.json("take", data, "--budget", "60s", timeout=600)
    assert taken["good"] and [each["provider"] for each in taken["snapshots"]] == ["gce"]
    ruin(data)
    clone = harness.scratch / "clone"
    command.json("restore", taken["set_id"], "--to", str(clone), "--with-identity", timeout=600)
    (made,) = links() - before
    (attached,) = [each for each in harness.instance.disks if f"google-{each.device_name}" == made]
    assert attached.disk in harness.objects() and attached.disk.endswith(f"/{attached.device_name}"), attached
    assert describe(str(clone)) == content
    command.json("release", str(clone), "--discard-changes", timeout=600)
    assert links() == before
    command.json("delete", taken["set_id"], "--yes", "--last", timeout=600)
    assert harness.objects() == objects
