"""The bytes of the twin's volumes: files on a btrfs of their own, and loop devices where an instance would have NVMe
disks. Must know nothing of EC2's API.

A snapshot of several volumes is one read-only snapshot of the subvolume that holds all of them, so they are one instant
also under writers (a FICLONE of each by itself would not be); each is then a FICLONE out of it, and a volume from a
snapshot is a FICLONE back.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_FICLONE = 0x40049409
BY_ID = "nvme-Amazon_Elastic_Block_Store_{serial}"


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def serial(volume_id: str) -> str:
    """As the disk says it on Nitro."""
    return volume_id.replace("-", "")


class Disks:
    """`top` is a directory on btrfs; `by_id` stands for /dev/disk/by-id of the one machine that all instances are."""

    def __init__(self, top: Path) -> None:
        self.live, self.images, self.by_id = top / "live", top / "images", top / "by-id"
        _run("btrfs", "subvolume", "create", str(self.live))
        self.images.mkdir()
        self.by_id.mkdir()
        self._loops: dict[str, str] = {}

    def make(self, volume: str, size_gib: int, snapshot: str = "") -> None:
        path = self.live / volume
        if snapshot:
            _clone(self.images / snapshot, path)
        with open(path, "ab") as file:
            file.truncate(size_gib << 30)

    def shoot(self, volumes: Sequence[str], snapshots: Sequence[str]) -> None:
        """All of them as they are at one instant."""
        instant = self.images / f"instant-{snapshots[0]}"
        _run("btrfs", "subvolume", "snapshot", "-r", str(self.live), str(instant))
        for volume, snapshot in zip(volumes, snapshots, strict=True):
            _clone(instant / volume, self.images / snapshot)
        _run("btrfs", "subvolume", "delete", str(instant))

    def drop_volume(self, volume: str) -> None:
        (self.live / volume).unlink(missing_ok=True)

    def drop_image(self, snapshot: str) -> None:
        (self.images / snapshot).unlink(missing_ok=True)

    def attach(self, volume: str) -> None:
        loop = _run("losetup", "--find", "--show", str(self.live / volume))
        self._loops[volume] = loop
        (self.by_id / BY_ID.format(serial=serial(volume))).symlink_to(loop)

    def detach(self, volume: str) -> bool:
        """Whether it is gone: not while it is mounted, and the kernel lets go in its own time."""
        loop = self._loops.get(volume)
        if loop is None:
            return True
        subprocess.run(["losetup", "-d", loop], capture_output=True)
        if _backing(loop) == str(self.live / volume):
            return False
        (self.by_id / BY_ID.format(serial=serial(volume))).unlink(missing_ok=True)
        del self._loops[volume]
        return True

    def device(self, volume: str) -> str:
        return self._loops[volume]

    def close(self) -> None:
        for volume, loop in list(self._loops.items()):
            with open("/proc/self/mounts", encoding="utf-8") as table:
                points = [line.split()[1] for line in table if line.split()[0] == loop]
            for point in reversed(points):
                subprocess.run(["umount", point], capture_output=True)
            for _ in range(100):
                if self.detach(volume):
                    break
                time.sleep(0.05)


def _clone(source: Path, target: Path) -> None:
    with open(source, "rb") as have, open(target, "wb") as want:
        fcntl.ioctl(want, _FICLONE, have.fileno())


def _backing(loop: str) -> str:
    try:
        return Path(f"/sys/block/{os.path.basename(loop)}/loop/backing_file").read_text().strip()
    except OSError:
        return ""


@contextmanager
def bytes_of_disks(scratch: Path, megabytes: int = 8192) -> Iterator[Disks]:
    """Disks on a btrfs on a loop device below `scratch`, all undone at the end. Needs root."""
    from tests.support import loop_file_system

    scratch.mkdir(parents=True, exist_ok=True)
    with loop_file_system("btrfs", scratch, megabytes) as point:
        disks = Disks(point)
        try:
            yield disks
        finally:
            disks.close()
            shutil.rmtree(disks.by_id, ignore_errors=True)
