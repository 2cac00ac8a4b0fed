"""The twins' disks as real instances show them, by nvmet over TCP on loopback: NVMe devices with Amazon's model and the
volume's id as their serial; with Google's model, and udev's links as Google's own rule makes them. Must know nothing of
any API. Only in the lab's virtual machine: its kernel has the modules.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tests.support import loop_file_system
from tests.twins import disks
from tests.twins.ec2.disks import Disks as Ec2Disks
from tests.twins.ec2.disks import serial
from tests.twins.gce.disks import Disks as GceDisks

_TARGET = Path("/sys/kernel/config/nvmet")
_PORT = _TARGET / "ports" / "1"
_PATIENCE_S = 60.0


def _until(what: str, seen: object) -> None:
    give_up = time.monotonic() + _PATIENCE_S
    while not seen():  # type: ignore[operator]
        assert time.monotonic() < give_up, what
        time.sleep(0.05)


class _Nvmet(disks.Disks):
    model = ""

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self._attached: list[str] = []

    def serial(self, disk: str) -> str:
        """At most 20 characters."""
        raise NotImplementedError

    def _subsystem(self, disk: str) -> Path:
        return _TARGET / "subsystems" / f"nqn.2014-08.test:{self.serial(disk)}"

    def attach(self, disk: str, name: str = "", *, read_only: bool = False) -> None:
        subsystem = self._subsystem(disk)
        subsystem.mkdir()
        self._attached.append(disk)
        (subsystem / "attr_allow_any_host").write_text("1")
        (subsystem / "attr_model").write_text(self.model)
        (subsystem / "attr_serial").write_text(self.serial(disk))
        space = subsystem / "namespaces" / "1"
        space.mkdir()
        (space / "device_path").write_text(str(self.live / disk))
        (space / "enable").write_text("1")
        (_PORT / "subsystems" / subsystem.name).symlink_to(subsystem)
        with open("/dev/nvme-fabrics", "w", encoding="ascii") as fabrics:
            fabrics.write(f"transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn={subsystem.name}")
        _until(f"the disk of {disk}", lambda: self._kernel_name(disk) and os.path.exists(self.device(disk)))
        if read_only:
            subprocess.run(["blockdev", "--setro", self.device(disk)], check=True)
        subprocess.run(["udevadm", "settle"], check=True)

    def detach(self, disk: str) -> bool:
        if disk not in self._attached:
            return True
        if self._kernel_name(disk):
            try:
                os.close(os.open(self.device(disk), os.O_RDONLY | os.O_EXCL))
            except OSError:
                return False  # mounted: the instance doesn't let go
        for controller in Path("/sys/class/nvme").iterdir():
            if _said(controller / "subsysnqn") == self._subsystem(disk).name:
                (controller / "delete_controller").write_text("1")
        self._unmake(disk)
        self._attached.remove(disk)
        return True

    def _unmake(self, disk: str) -> None:
        subsystem = self._subsystem(disk)
        (_PORT / "subsystems" / subsystem.name).unlink(missing_ok=True)
        space = subsystem / "namespaces" / "1"
        if space.is_dir():
            (space / "enable").write_text("0")
            space.rmdir()
        if subsystem.is_dir():
            subsystem.rmdir()

    def _kernel_name(self, disk: str) -> str:
        """Not that of the path to it (`nvme1c1n1`, hidden), which has the same serial and no device."""
        for block in Path("/sys/block").glob("nvme*"):
            if _said(block / "device" / "serial") == self.serial(disk) and _said(block / "hidden") != "1":
                return block.name
        return ""

    def device(self, disk: str) -> str:
        return f"/dev/{self._kernel_name(disk)}"

    def close(self) -> None:
        for disk in list(self._attached):
            with open("/proc/self/mounts", encoding="utf-8") as table:
                points = [line.split()[1] for line in table if line.split()[0] == self.device(disk)]
            for point in reversed(points):
                subprocess.run(["umount", point], capture_output=True)
            _until(f"{disk} let go", lambda disk=disk: self.detach(disk))


def _said(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


class NvmeDisks(_Nvmet, Ec2Disks):
    """`by_id` of the twin's own stays empty: udev makes the links where it makes them on Nitro."""

    model = "Amazon Elastic Block Store"

    def serial(self, disk: str) -> str:
        return serial(disk)


class GoogleDisks(_Nvmet, GceDisks):
    """The disk's name, which Google writes into the vendor's part of its identity, nvmet has no place for: where
    Google's rule asks its `google_nvme_id`, one of ours answers, from a file of that serial."""

    model = "nvme_card-pd"
    _names = Path("/run/google-names")
    _asked = Path("/usr/lib/udev/google_nvme_id")
    _rule = Path("/run/udev/rules.d/65-gce-disk-naming.rules")

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self.by_id.rmdir()
        self.by_id = Path("/dev/disk/by-id")
        self._names.mkdir()
        self._asked.write_text(
            '#!/bin/sh\nread -r serial <"/sys/class/block/${2##*/}/device/serial"\n'
            f'read -r name <"{self._names}/$serial"\n'
            'echo "ID_SERIAL_SHORT=$name"\necho "ID_SERIAL=Google_PersistentDisk_$name"\n'
        )
        self._asked.chmod(0o755)
        self._rule.parent.mkdir(parents=True, exist_ok=True)
        self._rule.write_text(
            'SUBSYSTEM=="block", KERNEL=="nvme*n*", ATTRS{model}=="nvme_card-pd", '
            'IMPORT{program}="google_nvme_id -d $tempnode"\n'
            'SUBSYSTEM=="block", KERNEL=="nvme*n*", ATTRS{model}=="nvme_card-pd", ENV{DEVTYPE}=="disk", '
            'SYMLINK+="disk/by-id/google-$env{ID_SERIAL_SHORT}"\n'
        )
        subprocess.run(["udevadm", "control", "--reload"], check=True)

    def serial(self, disk: str) -> str:
        return hashlib.md5(disk.encode(), usedforsecurity=False).hexdigest()[:20]

    def attach(self, disk: str, name: str = "", *, read_only: bool = False) -> None:
        (self._names / self.serial(disk)).write_text(name.removeprefix("google-") + "\n")
        super().attach(disk, name, read_only=read_only)

    def close(self) -> None:
        try:
            super().close()
        finally:
            shutil.rmtree(self._names)
            self._rule.unlink()
            self._asked.unlink()
            subprocess.run(["udevadm", "control", "--reload"], check=True)


D = TypeVar("D", bound=_Nvmet)


@contextmanager
def nvme_disks(kind: type[D], scratch: Path, megabytes: int = 2048) -> Iterator[D]:
    """Disks on a btrfs of their own, and the port that they are reached by; all undone at the end."""
    subprocess.run(["modprobe", "-a", "nvmet", "nvmet_tcp", "nvme_tcp"], check=True, capture_output=True)
    if not _TARGET.is_dir():  # nobody needed it at boot
        subprocess.run(["mount", "-t", "configfs", "configfs", "/sys/kernel/config"], check=True)
    scratch.mkdir(parents=True, exist_ok=True)
    with loop_file_system("btrfs", scratch, megabytes) as point:
        _PORT.mkdir()
        try:
            for name, value in (("trtype", "tcp"), ("adrfam", "ipv4"), ("traddr", "127.0.0.1"), ("trsvcid", "4420")):
                (_PORT / f"addr_{name}").write_text(value)
            made = kind(point)
            try:
                yield made
            finally:
                made.close()
        finally:
            _PORT.rmdir()
