"""What an NVMe disk says of itself, asked by the ioctl that the gce provider uses where udev has no link; the lab's own
root disk answers."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from providers.gce.devices import name_in
from snapshotter.host import nvme

pytestmark = pytest.mark.root


def test_the_identity_is_this_disks() -> None:
    found = nvme.identity("/dev/nvme0n1")
    blocks, _, used = struct.unpack_from("<QQQ", found)
    size = int(Path("/sys/block/nvme0n1/size").read_text()) * 512
    assert size in (blocks * 512, blocks * 4096) and used <= blocks
    assert name_in(nvme.vendors_part("/dev/nvme0n1")) == "", "qemu's disks have no name of Google's"


def test_another_disk_has_none() -> None:
    with pytest.raises(OSError):
        nvme.identity("/dev/zero")
