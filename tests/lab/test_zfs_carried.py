"""What a swap on ZFS carries over to what takes the place, and what stays below it: properties, room that is reserved,
zvols."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import zfs_kit
from tests.lab.zfs_kit import ZfsHarness, image, read, run, take, write, zfs

pytestmark = [pytest.mark.root, pytest.mark.zfs, pytest.mark.skipif(bool(zfs_kit.here()), reason=zfs_kit.here())]


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    with zfs_kit.pool() as name:
        yield name


@pytest.fixture
def harness(pool: str) -> Iterator[ZfsHarness]:
    with zfs_kit.zfs_harness(pool) as harness:
        yield harness


def test_what_was_set_on_the_origin_is_set_on_what_takes_its_place(harness: ZfsHarness) -> None:
    point = harness.scratch / "live"
    words = ["-o", f"mountpoint={point}", "-o", "recordsize=16K", "-o", "compression=lz4", "-o", "atime=off"]
    volume = harness.dataset("d", *words, "-o", "refquota=200M", "-o", "com.example:note=ours too")
    older = take(volume, "older")
    write(volume, "live")

    def local() -> set[str]:
        kept = zfs("get", "-Hp", "-s", "local", "-o", "property,value", "all", volume.id).splitlines()
        left_out = ("snapshotter:", "canmount", "snapshot_count", "filesystem_count")
        return {line for line in kept if not line.startswith(left_out)}

    before = local()
    zfs_kit.provider().swap("w1", image(older), volume)
    assert local() == before
    assert read(volume) == "older" and volume.path == str(point)
    # As a reboot does it: everything that mounts itself is mounted, and the live path shows the clone still.
    zfs("unmount", volume.id)
    run("zfs", "mount", "-a")
    assert read(volume) == "older"
    assert sum(mount.path == str(point) for mount in zfs_kit.table()) == 1
    zfs_kit.provider().swap_back("w1")
    assert local() == before and read(volume) == "live"
