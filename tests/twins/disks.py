"""The bytes of a twin's disks: files on a btrfs of their own, and loop devices where an instance would have disks. Must
know nothing of any cloud's API.

A snapshot of several disks is one read-only snapshot of the subvolume that holds all of them, so they are one instant
also under writers (a FICLONE of each by itself would not be); each is then a FICLONE out of it, and a disk from a
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
from typing import TypeVar

_FICLONE = 0x40049409


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


class Disks:
    """`top` is a directory on btrfs; `by_id` stands for /dev/disk/by-id of the one machine that all instances are."""

    def __init__(self, top: Path) -> None:
        self.live, self.images, self.by_id = top / "live", top / "images", top / "by-id"
        _run("btrfs", "subvolume", "create", str(self.live))
        self.images.mkdir()
        self.by_id.mkdir()
        self._loops: dict[str, tuple[str, str]] = {}  # disk -> loop device, link

    def link(self, disk: str) -> str:
        """What udev calls a disk that is attached without another name."""
        raise NotImplementedError

    def make(self, disk: str, size_gib: int, snapshot: str = "") -> None:
        path = self.live / disk
        if snapshot:
            _clone(self.images / snapshot, path)
        with open(path, "ab") as file:
            file.truncate(size_gib << 30)

    def shoot(self, disks: Sequence[str], snapshots: Sequence[str]) -> None:
        """All of them as they are at one instant."""
        instant = self.images / f"instant-{snapshots[0]}"
        _run("btrfs", "subvolume", "snapshot", "-r", str(self.live), str(instant))
        for disk, snapshot in zip(disks, snapshots, strict=True):
            _clone(instant / disk, self.images / snapshot)
        _run("btrfs", "subvolume", "delete", str(instant))

    def copy(self, snapshot: str, other: str) -> None:
        """Another image of the same bytes."""
        _clone(self.images / snapshot, self.images / other)

    def drop_volume(self, disk: str) -> None:
        (self.live / disk).unlink(missing_ok=True)

    def drop_image(self, snapshot: str) -> None:
        (self.images / snapshot).unlink(missing_ok=True)

    def attach(self, disk: str, name: str = "", *, read_only: bool = False) -> None:
        loop = _run("losetup", *(["--read-only"] if read_only else []), "--find", "--show", str(self.live / disk))
        link = self.by_id / (name or self.link(disk))
        self._loops[disk] = loop, link.name
        link.unlink(missing_ok=True)
        link.symlink_to(loop)

    def detach(self, disk: str) -> bool:
        """Whether it is gone: not while it is mounted, and the kernel lets go in its own time."""
        if disk not in self._loops:
            return True
        loop, name = self._loops[disk]
        link, ours = self.by_id / name, str(self.live / disk)
        # The link first: another test may get the loop device as soon as it is free.
        if linked := link.is_symlink() and os.readlink(link) == loop:  # not another's of the same name
            link.unlink()
        if _backing(loop) == ours:
            subprocess.run(["losetup", "-d", loop], capture_output=True)
        if _backing(loop) == ours:
            if linked:
                link.symlink_to(loop)
            return False
        del self._loops[disk]
        return True

    def device(self, disk: str) -> str:
        return self._loops[disk][0]

    def close(self) -> None:
        for disk, (loop, _) in list(self._loops.items()):
            with open("/proc/self/mounts", encoding="utf-8") as table:
                points = [line.split()[1] for line in table if line.split()[0] == loop]
            for point in reversed(points):
                subprocess.run(["umount", point], capture_output=True)
            for _ in range(100):
                if self.detach(disk):
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


D = TypeVar("D", bound=Disks)


@contextmanager
def on_btrfs(kind: type[D], scratch: Path, megabytes: int = 8192) -> Iterator[D]:
    """Disks on a btrfs on a loop device below `scratch`, all undone at the end. Needs root."""
    from tests.support import loop_file_system

    scratch.mkdir(parents=True, exist_ok=True)
    with loop_file_system("btrfs", scratch, megabytes) as point:
        disks = kind(point)
        try:
            yield disks
        finally:
            disks.close()
            shutil.rmtree(disks.by_id, ignore_errors=True)
