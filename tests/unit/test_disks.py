"""From mounts to disks and back: on this machine's loop devices, and on the sysfs that a Nitro instance has (partitions
there alone: the kernels that this is tested on know no partition table)."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotter.core.errors import BusyError, PreconditionError
from snapshotter.host.disks import Disks, Part, inactive
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
    (array / "md").mkdir()
    (array / "dev").write_text("9:0\n")
    (sysfs / "dev/block/9:0").symlink_to(array)
    return Disks(sysfs=str(sysfs), by_id=str(by_id))


def test_a_nitro_instance(nitro: Disks) -> None:
    assert nitro.vendor() == "Amazon EC2"
    assert nitro.below(mount("259:10")) == [Part("nvme1n1")]
    assert nitro.below(mount("259:22")) == [Part("nvme2n1", 2)]
    assert nitro.below(mount("9:0")) == [Part("nvme1n1"), Part("nvme3n1")]
    assert nitro.below(mount("0:42", "tmpfs", "tmpfs")) == []
    assert nitro.between(mount("9:0")) == "linux_raid_member" and nitro.between(mount("259:10")) == ""
    assert nitro.identity("nvme2n1", AWS) == "vol0c"
    assert nitro.find("vol0d", AWS) == "nvme3n1"
    assert nitro.find("vol0e", AWS) is None
    assert nitro.device(Part("nvme2n1", 2)) == "/dev/nvme2n1p2"
    assert nitro.device(Part("nvme2n1", 3)) is None
    assert nitro.device(Part("nvme1n1")) == "/dev/nvme1n1"
    assert nitro.number("nvme2n1") == {"259:20", "259:21", "259:22"}


def mapped(nitro: Disks, number: str, name: str, uuid: str, *slaves: str) -> None:
    """A device of device-mapper (or, without a uuid, of another kind) over these devices of `nitro`."""
    top = Path(nitro.sysfs, "devices", name)
    (top / "slaves").mkdir(parents=True)
    (top / "dev").write_text(f"{number}\n")
    if uuid:
        (top / "dm").mkdir()
        (top / "dm/uuid").write_text(f"{uuid}\n")
        (top / "dm/name").write_text(f"named-{name}\n")
    for slave in slaves:
        (found,) = [
            path for path in Path(nitro.sysfs, "devices").rglob(slave) if path.is_dir() and not path.is_symlink()
        ]
        (top / "slaves" / slave).symlink_to(found)
        (found / "holders").mkdir(exist_ok=True)
        (found / "holders" / name).symlink_to(top)
    Path(nitro.sysfs, "dev/block", number).symlink_to(top)


def test_through_volume_groups_arrays_and_encryption(nitro: Disks) -> None:
    """A thin volume's pool lies on a disk and a partition; an encrypted volume on an array; a partition of an array."""
    mapped(nitro, "253:0", "dm-0", "LVM-x-tmeta", "nvme1n1")
    mapped(nitro, "253:1", "dm-1", "LVM-x-tdata", "nvme1n1", "nvme2n1p2")
    mapped(nitro, "253:2", "dm-2", "LVM-x-tpool", "dm-0", "dm-1")
    mapped(nitro, "253:3", "dm-3", "LVM-x", "dm-2")
    assert nitro.below(mount("253:3")) == [Part("nvme1n1"), Part("nvme2n1", 2)]
    assert nitro.lies_on(mount("253:3")) == "LVM2_member"
    mapped(nitro, "253:4", "dm-4", "CRYPT-LUKS2-x", "md0")
    assert nitro.below(mount("253:4")) == [Part("nvme1n1"), Part("nvme3n1")]
    assert nitro.lies_on(mount("253:4")) == "linux_raid_member", "what lies on the disks is what counts"
    mapped(nitro, "253:5", "dm-5", "CRYPT-LUKS2-y", "nvme3n1")
    assert nitro.lies_on(mount("253:5")) == "crypto_LUKS"
    mapped(nitro, "252:0", "bcache0", "", "nvme4n1")
    assert nitro.lies_on(mount("252:0")) == "unknown_member"
    part = Path(nitro.sysfs, "devices/md0/md0p1")
    part.mkdir()
    (part / "partition").write_text("1\n")
    Path(nitro.sysfs, "dev/block/259:99").symlink_to(part)
    assert nitro.below(mount("259:99")) == [Part("nvme1n1"), Part("nvme3n1")]
    assert nitro.lies_on(mount("259:99")) == "linux_raid_member"
    assert nitro.lies_on(mount("259:22")) == "ext4/2"
    assert [inactive(kind) for kind in ("LVM2_member", "lvm2_member", "crypto_luks", "ext4", "btrfs", "")] == [
        *[True] * 3,
        *[False] * 3,
    ]


def test_a_disk_that_something_holds_is_not_pulled_away(nitro: Disks) -> None:
    mapped(nitro, "253:1", "dm-1", "LVM-x", "nvme1n1", "nvme2n1p2")
    for disk in ("nvme1n1", "nvme2n1"):
        with pytest.raises(BusyError, match="named-dm-1"):
            nitro.refuse_mounted(disk, "vol-0b")
        with pytest.raises(PreconditionError, match="can't be told apart"):
            nitro.refuse_beside(disk, "snap-0b")
    nitro.refuse_mounted("nvme0n1", "vol-0a")
    nitro.refuse_mounted(None, "vol-0a")


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
    (blocks / "loop0").mkdir()  # has no serial: no disk is found by none
    assert nitro.find("", AWS) is None


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
