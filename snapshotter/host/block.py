"""Block devices of this host as sysfs shows them: what lies below what, device-mapper's names. Knows no provider.

Source of the format: the kernel's Documentation/ABI (sysfs-block, sysfs-block-dm). Devices are named by their number,
"major:minor", as in mountinfo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

SYS_BLOCK = "/sys/dev/block"
_SECTOR = 512


class Device(msgspec.Struct, frozen=True):
    """`name` is the kernel's (sda1, dm-3). `dm_name` and `dm_uuid` are '' but for device-mapper's."""

    number: str
    name: str
    partition: bool = False
    dm_name: str = ""
    dm_uuid: str = ""
    suspended: bool = False


def device(number: str) -> Device | None:
    """The device of this number; None if there is none (any more)."""
    top = os.path.join(SYS_BLOCK, number)
    try:
        name = os.path.basename(os.readlink(top))
    except OSError:
        return None
    return Device(
        number=number,
        name=name,
        partition=os.path.exists(os.path.join(top, "partition")),
        dm_name=_read(f"{top}/dm/name"),
        dm_uuid=_read(f"{top}/dm/uuid"),
        suspended=_read(f"{top}/dm/suspended") == "1",
    )


def number_of(path: str) -> str | None:
    """The number of the block device at `path` (links followed); None if there is no such device."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" if found.st_rdev else None


def below(number: str) -> list[str]:
    """The devices that this one is made of: the slaves of dm and md, the disk of a partition; [] for a disk."""
    top = os.path.realpath(os.path.join(SYS_BLOCK, number))
    if os.path.exists(os.path.join(top, "partition")):
        return [_read(os.path.join(os.path.dirname(top), "dev"))]
    try:
        names = sorted(os.listdir(os.path.join(top, "slaves")))
    except OSError:
        return []
    return [found for found in (_read(os.path.join(top, "slaves", name, "dev")) for name in names) if found]


def chain(number: str) -> list[Device]:
    """The device and what lies below it, as long as that is one device: several (RAID) end it, and so does a disk."""
    found: list[Device] = []
    while (here := device(number)) is not None:
        found.append(here)
        under = below(number)
        if len(under) != 1:
            break
        number = under[0]
    return found


def disks(number: str) -> list[str]:
    """The disks (numbers) that the device lies on at the very bottom, each once."""
    under = below(number)
    if not under:
        return [number]
    return list(dict.fromkeys(disk for each in under for disk in disks(each)))


def mapped() -> Iterator[Device]:
    """Every device of device-mapper here."""
    try:
        names = os.listdir("/sys/block")
    except OSError:
        return
    for name in names:
        if name.startswith("dm-") and (found := device(_read(f"/sys/block/{name}/dev"))) is not None:
            yield found


def flush(numbers: list[str]) -> None:
    """Have the disks write what is in their volatile caches. Raises OSError."""
    for number in numbers:
        found = device(number)
        if found is None:
            continue
        fd = os.open(f"/dev/{found.name.replace('!', '/')}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def size_bytes(number: str) -> int:
    """How large the device is; 0 where there is none."""
    return int(_read(os.path.join(SYS_BLOCK, number, "size")) or 0) * _SECTOR


def written_bytes(number: str) -> int:
    """What was written to the device since the kernel knows it (Documentation/block/stat.rst: 7th field, sectors)."""
    fields = _read(os.path.join(SYS_BLOCK, number, "stat")).split()
    return int(fields[6]) * _SECTOR if len(fields) > 6 else 0


def uptime_s() -> float:
    """Seconds since this kernel started."""
    return float(_read("/proc/uptime").split()[0])


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return ""
