"""The bytes of the twin's volumes, under the names that Nitro gives their disks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.twins import disks

BY_ID = "nvme-Amazon_Elastic_Block_Store_{serial}"


def serial(volume_id: str) -> str:
    """As the disk says it on Nitro."""
    return volume_id.replace("-", "")


class Disks(disks.Disks):
    def link(self, disk: str) -> str:
        return BY_ID.format(serial=serial(disk))


@contextmanager
def bytes_of_disks(scratch: Path, megabytes: int = 8192) -> Iterator[Disks]:
    with disks.on_btrfs(Disks, scratch, megabytes) as made:
        yield made
