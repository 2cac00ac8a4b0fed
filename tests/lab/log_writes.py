"""A disk that writes down all that is written to it (dm-log-writes), and that disk as it was at any moment since: what
a power cut then would have left. Knows nothing of what lies on it.

The log (drivers/md/dm-log-writes.c): sector 0 is a super block {magic, version, number of entries (u64 each), sector
size (u32)}; then for each write a sector with {sector, number of sectors, flags, length of data (u64 each), data}, and
behind it, but for discards, what was written. The unit is the sector size that the super block names. Little endian. A
write is logged when it has completed, and one that was not flushed only once a flush or FUA has made sure of it: what
is replayed up to an entry is what a disk without a cache of its own holds.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = 0x6A736677736872
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8


class Entry(NamedTuple):
    """One write: `sector` and `count` in units of the log's sector size; `at` is where its data is in the log."""

    sector: int
    count: int
    flags: int
    at: int
    mark: str


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout.strip()


def detach(disk: str) -> None:
    """A loop device that somebody has open (udev, a scan of LVM's) only goes when that is closed. Until then it would
    be a second disk with the same UUIDs as the next one, and LVM may take it for the group's."""
    run("udevadm", "settle")
    run("losetup", "-d", disk)
    give_up = time.monotonic() + 60
    while os.path.exists(f"/sys/block/{os.path.basename(disk)}/loop/backing_file"):
        assert time.monotonic() < give_up, f"{disk} is still in use"
        time.sleep(0.05)


class Logged:
    """`device` is the disk; `cut(number)` gives it as a power cut after so many entries would leave it."""

    def __init__(self, name: str, base: Path, log: Path, below: str) -> None:
        self.name, self.base, self.log, self.below = name, base, log, below
        self.device = f"/dev/mapper/{name}"
        self.unit = 512

    def mark(self, text: str) -> None:
        run("dmsetup", "message", self.name, "0", "mark", text)

    def entries(self) -> list[Entry]:
        """All that is in the log now, in order."""
        run("sync")
        found = []
        with open(self.log, "rb") as file:
            magic, _, count, self.unit = _SUPER.unpack(file.read(_SUPER.size))
            assert magic == MAGIC, "this is no log of dm-log-writes"
            at = self.unit
            for _ in range(count):
                file.seek(at)
                sector, sectors, flags, length = _ENTRY.unpack(file.read(_ENTRY.size))
                mark = file.read(length).decode() if flags & MARK else ""
                at += self.unit
                found.append(Entry(sector, sectors, flags, at, mark))
                if not flags & DISCARD:
                    at += sectors * self.unit
        return found

    def cut(self, entries: list[Entry], number: int, into: Path) -> None:
        """`into` becomes a sparse file of what was there after the first so many entries."""
        into.unlink(missing_ok=True)
        run("cp", "--sparse=always", str(self.base), str(into))
        with open(self.log, "rb") as log, open(into, "r+b") as disk:
            for entry in entries[:number]:
                start, size = entry.sector * self.unit, entry.count * self.unit
                disk.seek(start)
                if entry.flags & DISCARD:
                    while size:  # thin pools and file systems read zeros there
                        part = min(size, 1 << 20)
                        disk.write(bytes(part))
                        size -= part
                elif size:
                    log.seek(entry.at)
                    disk.write(log.read(size))


@contextlib.contextmanager
def logged(name: str, where: Path, base: Path) -> Iterator[Logged]:
    """A disk with the content of `base` (a file that stays as it is), on which all further writes are logged."""
    bytes_ = base.stat().st_size
    live, log = where / "live", where / "log"
    run("cp", "--sparse=always", str(base), str(live))
    with open(log, "wb") as file:
        file.truncate(4 * bytes_)
    disks = [run("losetup", "--find", "--show", str(path)) for path in (live, log)]
    try:
        run("modprobe", "dm-log-writes")
        run("dmsetup", "create", name, "--table", f"0 {bytes_ // 512} log-writes {disks[0]} {disks[1]}")
        try:
            yield Logged(name, base, log, disks[0])
        finally:
            subprocess.run(["dmsetup", "remove", "--retry", name], capture_output=True)
    finally:
        for disk in disks:
            detach(disk)
