"""From a mount to the whole disks below it and their identity, and back from an identity to a device: what a cloud's
driver needs to know its volumes by. Knows no provider and no cloud.

Sources: sysfs (`/sys/dev/block/M:N`, `slaves`, `partition`, `device/serial`), udev's links in `/dev/disk/by-id`, DMI.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from msgspec import Struct

from snapshotter.core.errors import BusyError, PreconditionError
from snapshotter.core.model import MountSpec
from snapshotter.host import mounts
from snapshotter.host.mounts import Mount


class Part(Struct, frozen=True):
    """A whole disk by its kernel name (`nvme1n1`), or the partition of it with this number (0: none)."""

    disk: str
    partition: int = 0


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


class Disks(Struct, frozen=True):
    """Where to look. `by_id` is udev's; tests name a directory of their own."""

    sysfs: str = "/sys"
    by_id: str = "/dev/disk/by-id"
    dev: str = "/dev"

    def vendor(self) -> str:
        """Who made this machine, as DMI says: `Amazon EC2`, `Google`, ..."""
        return _read(f"{self.sysfs}/class/dmi/id/sys_vendor")

    def below(self, mount: Mount) -> list[Part]:
        """The whole disks, or partitions of them, that a mounted file system lies on, through whatever is between
        (LVM, md, crypt). [] for one that lies on none."""
        return list(dict.fromkeys(part for number in self._devices(mount) for part in self._parts(number)))

    def between(self, mount: Mount) -> str:
        """What is between the mount and its disks, by blkid's word for what then lies on these (`LVM2_member`,
        `linux_raid_member`, `crypto_LUKS`); '' where the file system itself does."""
        return next((found for number in self._devices(mount) if (found := self._between(number))), "")

    def _between(self, device: str) -> str:
        here = self._whole(device)
        for under in self._slaves(here)[:1]:
            uuid = _read(f"{here}/dm/uuid")
            known = {"LVM": "LVM2_member", "CRYPT": "crypto_LUKS"}.get(uuid.partition("-")[0], "unknown_member")
            known = "linux_raid_member" if os.path.isdir(f"{here}/md") else known
            return self._between(under) or known
        return ""

    def _whole(self, device: str) -> str:
        """Where sysfs has the device, or that which it is a partition of."""
        here = os.path.realpath(f"{self.sysfs}/dev/block/{device}")
        return os.path.dirname(here) if os.path.exists(f"{here}/partition") else here

    def _slaves(self, here: str) -> list[str]:
        """`major:minor` of what a device is made of."""
        names = sorted(os.listdir(f"{here}/slaves")) if os.path.isdir(f"{here}/slaves") else []
        return [_read(f"{here}/slaves/{name}/dev") for name in names]

    def _devices(self, mount: Mount) -> list[str]:
        """`major:minor` of what the file system itself was made on."""
        if mount.device.partition(":")[0] != "0":
            return [mount.device]
        # btrfs and the like: the kernel names no one device, the mount's source is one of them.
        try:
            found = os.stat(mount.source).st_rdev
        except OSError:
            return []
        first = f"{os.major(found)}:{os.minor(found)}"
        name = os.path.basename(os.path.realpath(f"{self.sysfs}/dev/block/{first}"))
        together = f"{self.sysfs}/fs/btrfs"
        for one in os.listdir(together) if os.path.isdir(together) else []:
            devices = f"{together}/{one}/devices"
            if os.path.isdir(devices) and name in os.listdir(devices):
                return [_read(f"{devices}/{each}/dev") for each in sorted(os.listdir(devices))]
        return [first]

    def _parts(self, device: str) -> list[Part]:
        if under := self._slaves(self._whole(device)):
            return [part for each in under for part in self._parts(each)]
        here = os.path.realpath(f"{self.sysfs}/dev/block/{device}")
        if number := _read(f"{here}/partition"):
            return [Part(os.path.basename(os.path.dirname(here)), int(number))]
        return [Part(os.path.basename(here))] if os.path.isdir(here) else []

    def identity(self, disk: str, prefix: str) -> str:
        """A whole disk's serial, as it says it itself (NVMe), or as udev wrote it after `prefix`. '' if unknown."""
        if serial := _read(f"{self.sysfs}/block/{disk}/device/serial"):
            return serial
        return next((name for name, known in self.linked(prefix).items() if known == disk), "")

    def model(self, disk: str) -> str:
        """What a whole disk says that it is, '' if nothing."""
        return _read(f"{self.sysfs}/block/{disk}/device/model")

    def find(self, identity: str, prefix: str) -> str | None:
        """The kernel name of the disk with this identity, None while there is none. (Where the kernel does NVMe's
        multipath, each path to a disk is listed too, `nvme1c1n1`: hidden, with the disk's serial, and no device.)"""
        if not identity:  # what a disk without a serial reads as
            return None
        blocks = f"{self.sysfs}/block"
        for disk in os.listdir(blocks) if os.path.isdir(blocks) else []:
            if _read(f"{blocks}/{disk}/device/serial") == identity and _read(f"{blocks}/{disk}/hidden") != "1":
                return disk
        return self.linked(prefix).get(identity)

    def device(self, part: Part) -> str | None:
        """Its node in /dev, None while there is no such partition."""
        if not part.partition:
            return f"{self.dev}/{part.disk}"
        top = f"{self.sysfs}/block/{part.disk}"
        for name in os.listdir(top) if os.path.isdir(top) else []:
            if _read(f"{top}/{name}/partition") == str(part.partition):
                return f"{self.dev}/{name}"
        return None

    def number(self, disk: str) -> set[str]:
        """`major:minor` of a whole disk and of all its partitions: what mounts of it have as their device."""
        top = f"{self.sysfs}/block/{disk}"
        names = os.listdir(top) if os.path.isdir(top) else []
        found = {_read(f"{top}/dev"), *(_read(f"{top}/{n}/dev") for n in names if _read(f"{top}/{n}/partition"))}
        return found - {""}

    def lies_on(self, mount: Mount) -> str:
        """The file system and its partition, for who mounts a copy of the disk: `ext4`, `xfs/1`; `LVM2_member` and the
        like where it is no file system that lies there (`between`)."""
        if found := self.between(mount):
            return found
        parts = self.below(mount)
        return mount.fstype + (f"/{parts[0].partition}" if parts and parts[0].partition else "")

    def refuse_mounted(self, disk: str | None, volume: str) -> None:
        """Raises BusyError if a file system on the disk is mounted here, or something (LVM, md, crypt) holds it: the
        cloud would take it from under that."""
        if not disk:
            return
        for mount in mounts.table():
            if disk in [part.disk for part in self.below(mount)]:
                raise BusyError(f"is mounted at {mount.path}", object=volume, cure=f"umount {mount.path}")
        if holder := self._holder(disk):
            raise BusyError(f"is in use by {holder}", object=volume, cure="deactivate that (vgchange -an, mdadm -S)")

    def _holder(self, disk: str) -> str:
        """What is made of a disk, or of a part of it: the name of an LV, an array; '' if nothing."""
        top = f"{self.sysfs}/block/{disk}"
        for part in [top, *(f"{top}/{name}" for name in (os.listdir(top) if os.path.isdir(top) else []))]:
            for holder in os.listdir(f"{part}/holders") if os.path.isdir(f"{part}/holders") else []:
                return _read(f"{part}/holders/{holder}/dm/name") or holder
        return ""

    def refuse_beside(self, disk: str | None, copy: str) -> None:
        """Raises PreconditionError if the disk is (part of) what is in use here and a copy may not be beside: a btrfs
        (the kernel is confused as soon as it sees both), a volume group, an array."""
        if disk and (holder := self._holder(disk)):
            raise PreconditionError(
                f"is of what {holder} is made of here: the two can't be told apart",
                object=copy,
                cure="restore it on another instance",
            )
        for mount in mounts.table():
            if disk and mount.fstype == "btrfs" and disk in [part.disk for part in self.below(mount)]:
                raise PreconditionError(
                    f"is a btrfs that is mounted here, at {mount.path}: the kernel can't tell the two apart",
                    object=copy,
                    cure="restore it on another instance",
                )

    def linked(self, prefix: str) -> dict[str, str]:
        """identity -> kernel name, of whole disks, as udev's links say it after `prefix`. A namespace has a second link
        (`..._1`), sorted behind."""
        found = {}
        for name in sorted(os.listdir(self.by_id)) if os.path.isdir(self.by_id) else []:
            if name.startswith(prefix) and not re.search(r"-part\d+$", name):
                found[name.removeprefix(prefix)] = os.path.basename(os.path.realpath(f"{self.by_id}/{name}"))
        return found


def inactive(kind: str) -> bool:
    """Whether what `lies_on` said is no file system but has to be activated: LVM, md, encryption."""
    return kind.lower().endswith(("_member", "_luks"))


def alone(kind: str) -> bool:
    """Whether a copy of it may not be beside its origin: names or UUIDs that must be there once would be there twice.
    The kernel can't tell two btrfs apart, nor LVM two volume groups, nor md two arrays."""
    return kind == "btrfs" or inactive(kind)


def refuse_inactive(kind: str, copy: str) -> None:
    """Raises PreconditionError if the copy would have to be activated before it is mounted."""
    if inactive(kind):
        raise PreconditionError(
            f"is a {kind}, which must be activated before it can be mounted",
            object=copy,
            cure="restore it with --away to an instance without its origin, and activate it there",
        )


def refuse_meeting(kind: str, there: bool, copy: str) -> None:
    """Raises PreconditionError if the origin is `there`, where the copy is to be attached, and they may not meet."""
    if there and alone(kind):
        raise PreconditionError(
            f"is a {kind}, and its origin is attached there: the two can't be told apart",
            object=copy,
            cure="name another instance",
        )


def partition_in(device: str) -> int:
    """The partition's number in a device's name (`/dev/sdb1`, `/dev/nvme1n1p2`, `/dev/loop3p1`); 0 of a whole disk."""
    found = re.search(r"/(?:(?:sd|xvd|vd)[a-z]+|(?:nvme\d+n\d+|loop\d+|mmcblk\d+)p)(\d+)$", device)
    return int(found[1]) if found else 0


def file_system(device: str) -> str:
    """What is on a device; '' lets `mount` find out."""
    from snapshotter.core.command import run

    return run(["blkid", "-p", "-o", "value", "-s", "TYPE", device], timeout=30).stdout.strip()


def copy_mount(device: str, kind: str, read_only: bool, others: Sequence[str] = ()) -> MountSpec:
    """How the copy of a mounted file system is mounted beside it: a copy of an XFS has its origin's UUID. `others`:
    the rest of a btrfs over several devices, which the kernel needn't have scanned."""
    kind = kind or file_system(device)
    how: tuple[str, ...] = ("ro", "nosuid", "nodev") if read_only else ()
    how += ("nouuid",) if kind == "xfs" else ()
    return MountSpec(device, kind, how + tuple(f"device={other}" for other in others))
