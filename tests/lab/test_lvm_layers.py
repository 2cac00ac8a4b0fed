"""What lies between a file system and its logical volume: LUKS is seen through, all else that a clone would not have is
refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.core.errors import PreconditionError
from snapshotter.core.model import Access, new_attachment_id, utc_now
from snapshotter.host import block, mounts
from snapshotter.testing import describe
from snapshotter.testing.conformance import content_of
from snapshotter.testing.harness import fill
from tests.lab.lvm_kit import LvmHarness, Storage, harness_on, lvm, make_file_system, marks, storage
from tests.lab.test_lvm_faults import filled, refused, top
from tests.support import Command, writes_at_last

pytestmark = marks


@pytest.fixture(scope="module")
def group() -> Iterator[Storage]:
    with storage(1200, pool_mb=700) as made:
        yield made


@pytest.fixture
def thin(group: Storage) -> Iterator[LvmHarness]:
    with harness_on(group, thin=True) as harness:
        yield harness


def test_luks_on_a_volume(thin: LvmHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from providers.lvm import clones

    key = tmp_path / "key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    thin.storage.thin("sealed", 100)
    device, name = f"/dev/{thin.storage.vg}/sealed", f"crypt{os.getpid()}"
    quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", str(key)]
    lvm("cryptsetup", "luksFormat", "-q", "--type", "luks2", *quick, device)
    lvm("cryptsetup", "open", "--key-file", str(key), device, name)
    point = str(thin.scratch / "sealed")
    os.mkdir(point)
    try:
        make_file_system(f"/dev/mapper/{name}", "ext4")
        lvm("mount", f"/dev/mapper/{name}", point)
        fill(point)
        provider = thin.provider()
        volume = provider.claim(mounts.mount_of(point), point)
        assert volume is not None and volume.id == f"{thin.storage.vg}/sealed"
        content = describe(point)
        command = Command(tmp_path / "etc")
        birth_id = command.json("take", point, "--budget", "60s")
        assert birth_id["good"] and birth_id["quiesce"] == "pause", "what is not on the disk yet must get there first"
        (found,) = thin.provider().snapshots(birth_id["set_id"])
        assert not provider.swappable(volume, found), "a restore in place must copy"
        table = tmp_path / "crypttab"
        monkeypatch.setattr(clones, "CRYPTTAB", str(table))
        attachment_id = new_attachment_id(utc_now())
        with pytest.raises(PreconditionError, match="LUKS") as refusal:
            thin.provider().attach(found, attachment_id, Access.WRITABLE, thin.destination())
        assert "crypttab" in refusal.value.cure
        thin.provider().detach(attachment_id)
        uuid = lvm("cryptsetup", "luksUUID", device).strip()
        table.write_text(f"data UUID={uuid} {key} luks\n")
        assert content_of(thin, found) == content
        for quiesce in ("stop", "hooks"):  # the suspension of the volume freezes no file system
            late = Command(tmp_path / quiesce, config=writes_at_last(Path(point), tmp_path, quiesce))
            taken = late.json("take", "late")
            assert (taken["quiesce"], taken["good"]) == (quiesce, True)
            (found,) = thin.provider().snapshots(taken["set_id"])
            assert content_of(thin, found)["late"] == describe(point)["late"], quiesce
        assert not [each for each in block.mapped() if each.dm_name.startswith("snapshotter-")]
    finally:
        lvm("umount", point, check=False)
        lvm("cryptsetup", "close", name, check=False)


def test_a_partition_of_a_volume_and_a_btrfs_on_one_are_refused(thin: LvmHarness, tmp_path: Path) -> None:
    thin.storage.thin("parted", 150)
    source = f"/dev/{thin.storage.vg}/parted"
    uuid = next(d.dm_uuid for d in block.mapped() if d.dm_name.endswith("-parted"))
    name = f"{os.path.basename(os.path.realpath(source))}p1-{os.getpid()}"
    # As kpartx maps a partition.
    lvm("dmsetup", "create", name, "--uuid", f"part1-{uuid}", "--table", f"0 204800 linear {source} 2048")
    point = str(thin.scratch / "parted")
    os.mkdir(point)
    try:
        make_file_system(f"/dev/mapper/{name}", "ext4")
        lvm("mount", f"/dev/mapper/{name}", point)
        Path(point, "file").write_text("x")
        line = refused(thin.storage, Command(tmp_path / "etc"), "take", point)
        assert "partition of the logical volume" in line
    finally:
        lvm("umount", point, check=False)
        lvm("dmsetup", "remove", "--retry", name, check=False)
    lvm("mkfs.btrfs", "-q", "-f", source)
    lvm("mount", source, point)
    try:
        Path(point, "file").write_text("x")
        line = refused(thin.storage, Command(tmp_path / "etc"), "take", point, "--provider", "lvm")
        assert "--provider btrfs" in line
    finally:
        lvm("umount", point)


def test_what_a_clone_would_not_have_is_refused(thin: LvmHarness, tmp_path: Path) -> None:
    """A layer that is none of LUKS, a LUKS header that is elsewhere, a log on another device."""
    thin.storage.thin("layered", 320)
    thin.storage.thin("log", 80)
    command = Command(tmp_path / "etc")
    source, name = f"/dev/{thin.storage.vg}/layered", f"layer{os.getpid()}"
    point = str(thin.scratch / "layered")
    os.mkdir(point)

    def said(device: str, kind: str, *options: str) -> str:
        try:
            lvm(
                f"mkfs.{kind}",
                "-q",
                "-F" if kind == "ext4" else "-f",
                *[word for o in options for word in ("-l", o)],
                device,
            )
            lvm("mount", *[word for o in options for word in ("-o", o)], device, point)
            Path(point, "file").write_text("x")
            return refused(thin.storage, command, "take", point)
        finally:
            lvm("umount", point, check=False)

    lvm("dmsetup", "create", name, "--table", f"0 163840 linear {source} 0")
    try:
        assert name in said(f"/dev/mapper/{name}", "ext4")
    finally:
        lvm("dmsetup", "remove", "--retry", name)
    key, header = tmp_path / "key", tmp_path / "header"
    key.write_bytes(os.urandom(32))
    quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--header", str(header), "--key-file", str(key)]
    lvm("cryptsetup", "luksFormat", "-q", "--type", "luks2", *quick, source)
    lvm("cryptsetup", "open", "--header", str(header), "--key-file", str(key), source, name)
    try:
        assert "header" in said(f"/dev/mapper/{name}", "ext4")
    finally:
        lvm("cryptsetup", "close", name)
    assert "logdev=" in said(source, "xfs", f"logdev=/dev/{thin.storage.vg}/log")
    lvm("mke2fs", "-q", "-F", "-b", "4096", "-O", "journal_dev", f"/dev/{thin.storage.vg}/log")
    lvm("mkfs.ext4", "-q", "-F", "-b", "4096", "-J", f"device=/dev/{thin.storage.vg}/log", source)
    lvm("mount", source, point)
    try:
        Path(point, "file").write_text("x")
        assert "journal on another device" in refused(thin.storage, command, "take", point)
    finally:
        lvm("umount", point)


def test_a_directory_mounted_by_itself_is_refused(thin: LvmHarness) -> None:
    volume = filled(thin)
    point = str(thin.scratch / "bound")
    os.mkdir(point)
    lvm("mount", "--bind", os.path.join(top(volume), "database"), point)
    with pytest.raises(PreconditionError, match="as a whole"):
        thin.provider().claim(mounts.mount_of(point), point)
