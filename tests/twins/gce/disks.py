"""The bytes of the twin's disks, under the names that Google's udev rules give them: `google-<deviceName>`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.twins import disks

BY_ID = "google-{device_name}"


class Disks(disks.Disks):
    def link(self, disk: str) -> str:
        raise AssertionError("on Compute Engine the link is named after the attachment, never after the disk")


@contextmanager
def bytes_of_disks(scratch: Path, megabytes: int = 8192) -> Iterator[Disks]:
    with disks.on_btrfs(Disks, scratch, megabytes) as made:
        yield made
