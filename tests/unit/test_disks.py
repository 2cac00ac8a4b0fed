"""From mounts to disks and back: on this machine's loop devices, and on the sysfs that a Nitro instance has (partitions
there alone: the kernels that this is tested on know no partition table)."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotter.host.disks import Disks, Part
from snapshotter.host.mounts import Mount, mount_of
from tests.support import loop_file_system

AWS = "nvme-Amazon_Elastic_Block_Store_"


def mount(device: str, fstype: str = "ext4", source: str = "/dev/x") -> Mount:
    return Mount(1, 0, device, "/", "/data", frozenset(), fstype, source, frozenset())


@pytest.fixture
def nitro(tmp_path: Path) -> Disks:
    """nvme0n1 with a root partition; nvme1n1 whole; nvme2n1 with two partitions; md0 of nvme1n1 and nvme3n1; an
    instance store; the links as udev makes them, once more for the namespace and for each partition."""
    sysfs, by_id = tmp_path / "sys", tmp_path / "by-id"
    by_id.mkdir()
    (sysfs / "dev/block").mkdir(parents=True)
    (sysfs / "block").mkdir()
    (sysfs / "class/dmi/id").mkdir(parents=True)
    (sysfs / "class/dmi/id/sys_vendor").write_text("Amazon EC2\n")
    serials = {"nvme0n1": "vol0a", "nvme1n1": "vol0b", "nvme2n1": "vol0c", "nvme3n1": "vol0d", "nvme4n1": "AWS123"}
    for minor, (name, serial) in enumerate(serials.items()):
        top = sysfs / "devices" / name
        (top / "device").mkdir(parents=True)
        (top / "slaves").mkdir()
        (top / "device/serial").write_text(f"{serial}               \n")
        (top / "dev").write_text(f"259:{minor * 10}\n")
        (sysfs / "block" / name).symlink_to(top)
        (sysfs / f"dev/block/259:{minor * 10}").symlink_to(top)
        for number in {"nvme0n1": [1], "nvme2n1": [1, 2]}.get(name, []):
            part = top / f"{name}p{number}"
            part.mkdir()
            (part / "partition").write_text(f"{number}\n")
            (part / "dev").write_text(f"259:{minor * 10 + number}\n")
            (sysfs / f"dev/block/259:{minor * 10 + number}").symlink_to(part)
        for link in (serial, f"{serial}_1", f"{serial}-part1"):
            (by_id / f"{AWS}{link}").symlink_to(f"/dev/{name}")
    array = sysfs / "devices/md0"
    (array / "slaves").mkdir(parents=True)
    for name in ("nvme1n1", "nvme3n1"):
        (array / "slaves" / name).symlink_to(sysfs / "devices" / name)
    (sysfs / "dev/block/9:0").symlink_to(array)
    return Disks(sysfs=str(sysfs), by_id=str(by_id))


def test_a_nitro_instance(nitro: Disks) -> None:
    assert nitro.vendor() == "Amazon EC2"
    assert nitro.below(mount("259:10")) == [Part("nvme1n1")]
    assert nitro.below(mount("259:22")) == [Part("nvme2n1", 2)]
    assert nitro.below(mount("9:0")) == [Part("nvme1n1"), Part("nvme3n1")]
    assert nitro.below(mount("0:42", "tmpfs", "tmpfs")) == []
    assert nitro.stacked(mount("9:0")) and not nitro.stacked(mount("259:10"))
    assert nitro.identity("nvme2n1", AWS) == "vol0c"
    assert nitro.find("vol0d", AWS) == "nvme3n1"
    assert nitro.find("vol0e", AWS) is None
    assert nitro.device(Part("nvme2n1", 2)) == "/dev/nvme2n1p2"
    assert nitro.device(Part("nvme2n1", 3)) is None
    assert nitro.device(Part("nvme1n1")) == "/dev/nvme1n1"
    assert nitro.number("nvme2n1") == {"259:20", "259:21", "259:22"}


def test_without_a_serial_in_sysfs_the_link_tells(nitro: Disks) -> None:
    for name in ("nvme1n1", "nvme2n1"):
        Path(nitro.sysfs, "block", name, "device/serial").unlink()
    assert nitro.identity("nvme2n1", AWS) == "vol0c"
    assert nitro.find("vol0b", AWS) == "nvme1n1"


def test_a_path_to_a_disk_is_no_disk(nitro: Disks) -> None:
    """A controller that says it may be one of several: the kernel lists its path to the disk beside the disk."""
    blocks = Path(nitro.sysfs, "block")
    for path in ("nvme0c0n1", "nvme9c9n1"):  # wherever the directory lists them
        (blocks / path / "device").mkdir(parents=True)
        (blocks / path / "device/serial").write_text("vol0d\n")
        (blocks / path / "hidden").write_text("1\n")
    assert nitro.find("vol0d", AWS) == "nvme3n1"
    (blocks / "nvme3n1").unlink()
    Path(nitro.by_id, f"{AWS}vol0d").unlink()
    assert nitro.find("vol0d", AWS) is None


def test_there_may_be_nothing(tmp_path: Path) -> None:
    disks = Disks(sysfs=str(tmp_path), by_id=str(tmp_path / "by-id"))
    assert disks.vendor() == ""
    assert disks.below(mount("259:10")) == []
    assert disks.find("vol0a", AWS) is None and disks.identity("sda", AWS) == ""


@pytest.mark.root
def test_a_btrfs_here(tmp_path: Path) -> None:
    with loop_file_system("btrfs", tmp_path) as point:
        (part,) = Disks().below(mount_of(str(point)))
        assert f"/dev/{part.disk}" == mount_of(str(point)).source
