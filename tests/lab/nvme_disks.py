"""The twin's disks as Nitro shows them: NVMe devices with Amazon's model and the volume's id as their serial, by nvmet
over TCP on loopback. Must know nothing of EC2's API. Only in the lab's virtual machine: its kernel has the modules.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import loop_file_system
from tests.twins.ec2 import disks

_TARGET = Path("/sys/kernel/config/nvmet")
_PORT = _TARGET / "ports" / "1"
_MODEL = "Amazon Elastic Block Store"
_PATIENCE_S = 60.0


def _until(what: str, seen: object) -> None:
    give_up = time.monotonic() + _PATIENCE_S
    while not seen():  # type: ignore[operator]
        assert time.monotonic() < give_up, what
        time.sleep(0.05)


class NvmeDisks(disks.Disks):
    """`by_id` of the twin's own stays empty: udev makes the links where it makes them on Nitro."""

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self._attached: list[str] = []

    def _subsystem(self, disk: str) -> Path:
        return _TARGET / "subsystems" / f"nqn.2014-08.test:{disk}"

    def attach(self, disk: str, name: str = "", *, read_only: bool = False) -> None:
        subsystem = self._subsystem(disk)
        subsystem.mkdir()
        (subsystem / "attr_allow_any_host").write_text("1")
        (subsystem / "attr_model").write_text(_MODEL)
        (subsystem / "attr_serial").write_text(disks.serial(disk))
        space = subsystem / "namespaces" / "1"
        space.mkdir()
        (space / "device_path").write_text(str(self.live / disk))
        (space / "enable").write_text("1")
        (_PORT / "subsystems" / subsystem.name).symlink_to(subsystem)
        self._attached.append(disk)
        with open("/dev/nvme-fabrics", "w", encoding="ascii") as fabrics:
            fabrics.write(f"transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn={subsystem.name}")
        _until(f"the disk of {disk}", lambda: self._kernel_name(disk) and os.path.exists(self.device(disk)))
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
        for block in Path("/sys/block").glob("nvme*"):
            # A path of a multipath disk is hidden: it has the serial, and no node in /dev.
            if _said(block / "device" / "serial") == disks.serial(disk) and _said(block / "hidden") != "1":
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


@contextmanager
def nvme_disks(scratch: Path, megabytes: int = 2048) -> Iterator[NvmeDisks]:
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
            made = NvmeDisks(point)
            try:
                yield made
            finally:
                made.close()
        finally:
            _PORT.rmdir()
