"""LVM that is full, gone, frozen, odd: the right exit code, one line, nothing changed. What an overflow, a swap and a
reboot leave."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from providers.lvm import LvmProvider
from snapshotter.core.errors import BusyError, PreconditionError, StorageError
from snapshotter.core.model import Access, Birth, ImageState, MountSpec, Volume, new_attachment_id, utc_now
from snapshotter.host import block, mounts
from snapshotter.provider import Settings
from snapshotter.testing import describe, make_birth
from snapshotter.testing.conformance import attach, content_of, seal, take
from snapshotter.testing.harness import fill, ruin
from tests.lab.lvm_kit import MIB, LvmHarness, Storage, harness_on, lvm, marks, storage
from tests.support import Command

pytestmark = marks


@pytest.fixture(scope="module")
def group() -> Iterator[Storage]:
    """A group with dashes in its name; all tests here that need nothing special share it."""
    with storage(3000, pool_mb=1200, vg=f"t-a--{os.getpid()}") as made:
        yield made


@pytest.fixture
def thin(group: Storage) -> Iterator[LvmHarness]:
    with harness_on(group, thin=True) as harness:
        yield harness


@pytest.fixture
def classic(group: Storage) -> Iterator[LvmHarness]:
    with harness_on(group, thin=False) as harness:
        yield harness


def filled(harness: LvmHarness) -> Volume:
    volume = harness.volume()
    fill(top(volume))
    return volume


def top(volume: Volume) -> str:
    assert volume.path is not None
    return volume.path


def taken(harness: LvmHarness, volume: Volume) -> Birth:
    birth = take(harness.provider(), harness, [volume])
    seal(harness.provider(), birth)
    return birth


def refused(made: Storage, command: Command, *words: str, exit_code: int = 3) -> str:
    """The one line of a refusal that changed nothing of the group."""
    before = made.lvs("lv_name,lv_uuid,lv_tags,lv_size,lv_permissions")
    error = command.error(*words, exit_code=exit_code)
    assert made.lvs("lv_name,lv_uuid,lv_tags,lv_size,lv_permissions") == before
    assert error["cure"], error
    line: str = error["line"]
    return line


# ------------------------------------------------------------------------------------------------------------ no room


def test_a_pool_that_is_nearly_full(tmp_path: Path) -> None:
    with storage(400, pool_mb=160) as made, harness_on(made, thin=True) as harness:
        volume = filled(harness)
        harness.storage.thin("ballast", 200)
        with open(f"/dev/{made.vg}/ballast", "wb", buffering=0) as device:
            while pool_percent(made) < 95:
                device.write(os.urandom(4 * MIB))
                os.fsync(device.fileno())
        line = refused(made, Command(tmp_path / "etc"), "take", top(volume))
        assert "full" in line and "lvextend -L+" in line and made.pool in line


def test_a_pool_past_lvms_own_threshold(tmp_path: Path) -> None:
    """It makes nothing more in a pool that should have grown by then: a take is refused for that reason, and what is
    there can be restored."""
    with storage(400, pool_mb=160) as made, harness_on(made, thin=True) as harness:
        volume = filled(harness)
        content = describe(top(volume))
        birth = taken(harness, volume)
        (found,) = harness.provider().snapshots(birth.set_id)
        harness.storage.thin("ballast", 200)
        with open(f"/dev/{made.vg}/ballast", "wb", buffering=0) as device:
            while pool_percent(made) < 62:
                device.write(os.urandom(4 * MIB))
                os.fsync(device.fileno())
        shutil.copytree("/etc/lvm", tmp_path / "lvm")
        with open(tmp_path / "lvm" / "lvm.conf", "a") as config:
            config.write("\nactivation/thin_pool_autoextend_threshold = 60\n")
        lvm("mount", "--bind", str(tmp_path / "lvm"), "/etc/lvm")
        try:
            line = refused(made, Command(tmp_path / "etc"), "take", top(volume))
            assert "limit 60 %" in line and "lvextend" in line
            assert content_of(harness, found) == content
            ruin(top(volume))
            harness.provider().swap("w1", found, volume)
            assert describe(top(volume)) == content
            harness.provider().swap_commit("w1")
        finally:
            lvm("umount", "/etc/lvm")


def pool_percent(made: Storage, what: str = "data_percent") -> float:
    return next(float(row[what]) for row in made.lvs(f"lv_name,{what}") if row["lv_name"] == "pool")


def test_pool_metadata_that_is_nearly_full(tmp_path: Path) -> None:
    """Filled as it fills in life: by snapshots, and writes that part them from each other."""
    with storage(1500, pool_mb=1200, metadata_mb=2) as made, harness_on(made, thin=True) as harness:
        volume = filled(harness)
        made.thin("ballast", 64_000)
        aligned = mmap.mmap(-1, 4096)  # O_DIRECT wants a page
        spots = [spot * 5 * MIB for spot in range(12_000)]

        def write(name: str, where: list[int]) -> None:
            device = os.open(f"/dev/{made.vg}/{name}", os.O_WRONLY | os.O_DIRECT)
            try:
                for spot in where:
                    os.pwrite(device, aligned, spot)
                os.fsync(device)
            finally:
                os.close(device)

        write("ballast", spots)
        names = [f"b{number}" for number in range(16)]  # before LVM itself says that there is no room
        for name in names:
            lvm("lvcreate", "-qq", "-y", "-s", "-kn", "-n", name, f"{made.vg}/ballast")
        for name in names:
            if pool_percent(made, "metadata_percent") < 95:
                write(name, spots[::100])
        assert 95 <= pool_percent(made, "metadata_percent") < 100, "the test could not fill it"
        line = refused(made, Command(tmp_path / "etc"), "take", top(volume))
        assert "metadata" in line and "--poolmetadatasize" in line


def test_a_group_without_free_extents(tmp_path: Path) -> None:
    with storage(200) as made, harness_on(made, thin=False) as harness:
        volume = filled(harness)
        lvm("lvcreate", "-qq", "-y", "-Wn", "-l", "100%FREE", "-n", "ballast", made.vg)
        line = refused(made, Command(tmp_path / "etc"), "take", top(volume))
        assert "0 MiB free" in line and "vgextend" in line


def test_lvms_own_metadata_area_is_nearly_full(tmp_path: Path) -> None:
    with storage(400, pool_mb=160, area="64k") as made, harness_on(made, thin=True) as harness:
        volume = filled(harness)
        room = int(made.lvs("vg_mda_free")[0]["vg_mda_free"]) - 1200
        tags = [word for number in range(room // 760) for word in ("--addtag", f"b{number:03}-{'x' * 740}")]
        lvm("lvchange", "-qq", *tags, made.pool)
        assert int(made.lvs("vg_mda_free")[0]["vg_mda_free"]) < 2000, "the test could not fill it"
        line = refused(made, Command(tmp_path / "etc"), "take", top(volume))
        assert "metadata area" in line


def test_a_set_whose_pool_is_gone(tmp_path: Path) -> None:
    """Its disk fails under the group: sets are damaged, a take is refused, as nothing can be made."""
    with storage(300, pool_mb=160) as made, harness_on(made, thin=True) as harness:
        volume = filled(harness)
        command = Command(tmp_path / "etc")
        set_id = command.json("take", top(volume))["set_id"]
        spare = tmp_path / "second"
        spare.write_bytes(b"")
        os.truncate(spare, 200 * MIB)
        disk = lvm("losetup", "--find", "--show", str(spare)).strip()
        name = f"{made.vg}flaky"
        # Not from its start: LVM would find the label on both.
        table = f"0 {int(lvm('blockdev', '--getsz', disk)) - 2048} linear {disk} 2048"
        lvm("dmsetup", "create", name, "--table", table)
        try:
            lvm("vgextend", "-qq", "-y", made.vg, f"/dev/mapper/{name}")
            lvm("lvextend", "-qq", "-l", "+10", made.pool, f"/dev/mapper/{name}")
            lvm("dmsetup", "wipe_table", name)
            entry = command.json("show", set_id)
            assert entry["state"] == "damaged" and not entry["good"]
            error = command.error("take", top(volume), exit_code=3)
            assert "physical volume" in error["line"]
            command.error("restore", set_id, "--to", str(tmp_path / "clone"), exit_code=8)
        finally:
            lvm("dmsetup", "load", name, "--table", table, check=False)
            lvm("dmsetup", "resume", name, check=False)
            lvm("vgextend", "-qq", "--restoremissing", made.vg, f"/dev/mapper/{name}", check=False)
            harness.clean()
            lvm("vgremove", "-qq", "-ff", "-y", made.vg, check=False)
            lvm("dmsetup", "remove", "--retry", name, check=False)
            lvm("losetup", "-d", disk, check=False)


def test_the_seal_reaches_the_disk_that_holds_lvms_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need be none of those that the volume and its image are on."""
    with storage(300) as made, harness_on(made, thin=False) as harness:
        volume = filled(harness)
        spare = tmp_path / "second"
        spare.write_bytes(b"")
        os.truncate(spare, 100 * MIB)
        disk = lvm("losetup", "--find", "--show", str(spare)).strip()
        flushed: list[str] = []
        monkeypatch.setattr(block, "flush", flushed.extend)
        try:
            lvm("vgextend", "-qq", "-y", made.vg, disk)
            lvm("pvchange", "-qq", "--metadataignore", "y", made.disk)
            taken(harness, volume)
        finally:
            lvm("pvchange", "-qq", "--metadataignore", "n", made.disk, check=False)
            lvm("vgreduce", "-qq", made.vg, disk, check=False)
            lvm("losetup", "-d", disk, check=False)
        assert {block.number_of(made.disk), block.number_of(disk)} <= set(flushed)


def test_a_swap_that_would_be_refused_is_so_while_the_node_runs(thin: LvmHarness, tmp_path: Path) -> None:
    volume = thin.volume()
    Path(top(volume), "file").write_text("x")
    command = Command(tmp_path / "etc")
    set_id = command.json("take", top(volume))["set_id"]
    lvm("lvcreate", "-qq", "-y", "-s", "-L", "8m", "-n", "theirs", volume.id)
    for more in (["--dry-run"], ["--yes"]):
        line = refused(thin.storage, command, "restore", set_id, "--in-place", *more, exit_code=5)
        assert "theirs hangs on it" in line and mounts.is_mount_point(top(volume))
    lvm("lvremove", "-qq", "-y", f"{thin.storage.vg}/theirs")
    assert command.json("restore", set_id, "--in-place", "--dry-run")["way"] == "swap"


@pytest.mark.parametrize("is_thin", [True, False])
def test_an_image_whose_merge_waits_is_no_backup(group: Storage, tmp_path: Path, is_thin: bool) -> None:
    """Its origin is in use, so LVM merges it when that is activated next: at the next boot it is gone."""
    with harness_on(group, thin=is_thin) as harness:
        volume = filled(harness)
        command = Command(tmp_path / "etc")
        set_id = command.json("take", top(volume))["set_id"]
        lvm("lvconvert", "-qq", "-y", "--merge", f"{group.vg}/{set_id}-0")
        assert not any(entry["good"] for entry in command.json("list")["sets"]), "LVM hides it"
        size = [] if is_thin else ["-L", "12m"]
        raw = subprocess.run(["lvcreate", "-y", "-s", *size, "-n", "theirs", volume.id], capture_output=True)
        assert (raw.returncode == 0) is is_thin, "what LVM makes, a take makes"
        if is_thin:
            assert command.json("take", top(volume))["good"]
        else:
            assert "merged into it" in refused(group, command, "take", top(volume))


def test_a_classic_snapshot_that_overflows(classic: LvmHarness, tmp_path: Path) -> None:
    volume = filled(classic)
    command = Command(tmp_path / "etc")
    first = command.json("take", top(volume), "-o", "size=12m")["set_id"]
    (found,) = classic.provider().snapshots()
    classic.overflow(found)
    entry = next(entry for entry in command.json("list")["sets"] if entry["set_id"] == first)
    assert entry["state"] == "damaged" and not entry["good"] and "overflowed" in entry["why"]
    error = command.error("restore", first, "--to", str(tmp_path / "clone"), exit_code=8)
    assert "overflowed" in error["line"]
    second = command.json("take", top(volume), "-o", "size=12m")
    assert second["good"]
    command.json("delete", first, "--yes")
    assert [entry["set_id"] for entry in command.json("list")["sets"]] == [second["set_id"]]


def test_a_clone_without_room_says_nothing_of_its_image(classic: LvmHarness) -> None:
    """What is written to it fills its store, and nothing of it can be read any more; the image is as good as before."""
    volume = filled(classic)
    birth = taken(classic, volume)
    small = LvmProvider(Settings(str(classic.state), options={"size": 4 * MIB}))
    attachment = new_attachment_id(utc_now())
    (found,) = classic.provider().snapshots(birth.set_id)
    destination = classic.destination()
    made = small.attach(found, attachment, Access.WRITABLE, destination)
    assert isinstance(made, MountSpec)
    os.mkdir(destination)
    mounts.mount(made, destination)

    def lost() -> str:
        (part,) = [each for each in classic.provider().attachments() if each.id == attachment]
        return part.lost

    assert lost() == ""
    with suppress(OSError), open(os.path.join(destination, "more"), "wb") as file:
        file.write(os.urandom(8 * MIB))
        os.fsync(file.fileno())
    assert "filled" in lost()
    mounts.unmount(destination)
    classic.provider().detach(attachment)
    assert [each.state for each in classic.provider().snapshots(birth.set_id)] == [ImageState.READY]
    assert content_of(classic, found) == describe(top(volume))


@pytest.mark.parametrize("is_thin", [True, False])
def test_a_report_is_read_whatever_lvm_conf_says_of_its_looks(is_thin: bool, tmp_path: Path) -> None:
    """Another separator made a thin volume a classic one; a command's name before each line hid every set."""
    local = Path("/etc/lvm/lvmlocal.conf")  # of the virtual machine
    before = local.read_text() if local.exists() else None
    with storage(400, pool_mb=160 if is_thin else 0) as made, harness_on(made, thin=is_thin) as harness:
        volume = filled(harness)
        content = describe(top(volume))
        try:
            local.write_text(
                'log { prefix = "lvm: " command_names = 1 }\n'
                'report { compact_output = 1 list_item_separator = ";" aligned = 0 headings = 0 }\n'
            )
            assert "lvs" in lvm("lvs").split("\n")[0], "the test changed nothing"
            command = Command(tmp_path / "etc")
            set_id = command.json("take", top(volume))["set_id"]
            assert [(each["set_id"], each["good"]) for each in command.json("list")["sets"]] == [(set_id, True)]
            to = tmp_path / "clone"
            command.json("restore", set_id, "--to", str(to))
            assert describe(str(to)).keys() == content.keys()
            command.json("release", str(to), "--discard-changes")
            command.json("delete", set_id, "--last", "--yes")
            assert not command.json("list")["sets"]
        finally:
            local.unlink() if before is None else local.write_text(before)
        assert not made.ours()


@pytest.mark.parametrize("is_thin", [True, False])
def test_a_copy_in_place_harms_no_set_and_no_pool(tmp_path: Path, is_thin: bool) -> None:
    """It writes into free blocks of the same volume, and each counts: in every classic snapshot, or in the pool."""
    with storage(400, pool_mb=88 if is_thin else 0) as made, harness_on(made, thin=is_thin) as harness:
        volume = harness.volume()
        data = Path(top(volume), "data")
        data.mkdir()
        data.joinpath("chain").write_bytes(os.urandom(28 * MIB))
        lvm("sync")
        command = Command(tmp_path / "etc")
        size = [] if is_thin else ["-o", "size=12m"]
        set_id = command.json("take", str(data), *size)["set_id"]
        content = describe(str(data))
        data.joinpath("chain").write_bytes(b"damaged")
        if is_thin:
            made.thin("ballast", 64)
            with open(f"/dev/{made.vg}/ballast", "wb", buffering=0) as device:
                while pool_percent(made) < 65:
                    device.write(os.urandom(MIB))
                    os.fsync(device.fileno())
        planned = command.json("restore", set_id, "--in-place", "--dry-run")
        assert planned["way"] == "copy" and planned["need_bytes"] != round(12 * MIB)
        before = sorted(os.listdir(top(volume)))
        line = refused(made, command, "restore", set_id, "--in-place", "--yes")
        assert "lvextend" in line and sorted(os.listdir(top(volume))) == before
        assert command.json("show", set_id)["good"] and data.joinpath("chain").read_bytes() == b"damaged"
        for step in line.partition("lvextend")[2].partition(";")[0].split(" && "):
            lvm("lvextend", "-qq", *step.removeprefix("lvextend").split())
        assert command.json("restore", set_id, "--in-place", "--yes")["outcome"] == "restored"
        assert describe(str(data)) == content and command.json("show", set_id)["good"]
        assert not is_thin or pool_percent(made) < 100


# ---------------------------------------------------------------------------------------------------------- odd ones


def test_a_frozen_file_system_is_said_and_nothing_is_left(thin: LvmHarness) -> None:
    volume = filled(thin)
    before = thin.objects()
    lvm("fsfreeze", "--freeze", top(volume))
    try:
        with pytest.raises(StorageError, match="frozen"):
            take(thin.provider(), thin, [volume])
    finally:
        lvm("fsfreeze", "--unfreeze", top(volume))
    assert thin.objects() == before
    taken(thin, volume)


@pytest.mark.parametrize("is_thin", [True, False])
def test_lvms_own_files_on_the_volume(group: Storage, is_thin: bool) -> None:
    """As on a root volume: LVM writes its backups to what it has just suspended."""
    with harness_on(group, thin=is_thin) as harness:
        volume = filled(harness)
        lvm("cp", "-a", "/etc/lvm", os.path.join(top(volume), "lvm"))
        lvm("mount", "--bind", os.path.join(top(volume), "lvm"), "/etc/lvm")
        try:
            birth = taken(harness, volume)
            (found,) = harness.provider().snapshots(birth.set_id)
            assert found.state is ImageState.READY
            harness.provider().delete(birth.set_id)
        finally:
            lvm("umount", "/etc/lvm")


def test_a_virtual_volume_of_2_tib(group: Storage) -> None:
    with harness_on(group, thin=True, kind="xfs") as harness:
        harness.megabytes = 2 << 20
        volume = filled(harness)
        content = describe(top(volume))
        birth = taken(harness, volume)
        ruin(top(volume))
        (found,) = harness.provider().snapshots(birth.set_id)
        assert found.state is ImageState.READY and content_of(harness, found) == content


@pytest.mark.parametrize("is_thin", [True, False])
def test_xfs_is_mounted_beside_its_origin(group: Storage, is_thin: bool) -> None:
    """The same UUID twice, its log replayed, and the quota options of the origin kept."""
    with harness_on(group, thin=is_thin, kind="xfs") as harness:
        volume = harness.volume()
        lvm("umount", top(volume))
        lvm("mount", "-o", "prjquota", f"/dev/{volume.id}", top(volume))
        fill(top(volume))
        content = describe(top(volume))
        birth = taken(harness, volume)
        (found,) = harness.provider().snapshots(birth.set_id)
        for access in Access:
            attached = attach(harness, found, access)
            assert describe(attached.path, writable=access is Access.WRITABLE) == {
                path: what for path, what in describe(top(volume), writable=access is Access.WRITABLE).items()
            }
            assert "prjquota" in mounts.mount_of(attached.path).super_options
            attached.end()
        assert content_of(harness, found) == content


def test_a_clone_is_not_found_by_its_origins_uuid(thin: LvmHarness, classic: LvmHarness) -> None:
    """Else the operator's next `mount UUID=` would mount the clone."""
    for harness in (thin, classic):
        volume = filled(harness)
        uuid = lvm("blkid", "-p", "-o", "value", "-s", "UUID", f"/dev/{volume.id}").strip()
        birth = taken(harness, volume)
        (found,) = harness.provider().snapshots(birth.set_id)
        attached = attach(harness, found, Access.WRITABLE)
        lvm("udevadm", "settle")
        try:
            assert block.number_of(f"/dev/disk/by-uuid/{uuid}") == block.number_of(f"/dev/{volume.id}")
        finally:
            attached.end()


# ----------------------------------------------------------------------------------------------- swaps and reboots


def test_after_a_swap_and_a_reboot_path_and_uuid_are_the_restored_data(thin: LvmHarness) -> None:
    """A reboot as LVM sees it: all is deactivated, then what boot activates is."""
    volume = filled(thin)
    content = describe(top(volume))
    birth = taken(thin, volume)
    ruin(top(volume))
    uuid = lvm("blkid", "-p", "-o", "value", "-s", "UUID", f"/dev/{volume.id}").strip()
    (found,) = thin.provider().snapshots(birth.set_id)
    thin.provider().swap("w1", found, volume)
    assert describe(top(volume)) == content
    mounts.unmount(top(volume))
    lvm("vgchange", "-qq", "-an", thin.storage.vg)
    lvm("vgchange", "-qq", "-aay", thin.storage.vg)
    lvm("udevadm", "settle")
    for source in (f"/dev/{volume.id}", f"UUID={uuid}"):
        lvm("mount", source, top(volume))
        assert describe(top(volume)) == content, source
        mounts.unmount(top(volume))
    thin.mount_all()
    thin.provider().swap_commit("w1")
    assert describe(top(volume)) == content


def test_a_swap_is_refused_where_it_would_not_last(
    thin: LvmHarness, classic: LvmHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from providers.lvm import swaps

    volume, other = filled(thin), filled(classic)
    birth, theirs = taken(thin, volume), taken(classic, other)
    (found,), (no_thin,) = thin.provider().snapshots(birth.set_id), thin.provider().snapshots(theirs.set_id)
    plain = LvmProvider(Settings(str(tmp_path)))
    with pytest.raises(BusyError):
        plain.swap("w1", found, volume)  # it is mounted
    with pytest.raises(PreconditionError, match="no thin"):
        plain.swap("w1", no_thin, other)
    uuid = next(d.dm_uuid for d in block.mapped() if d.dm_name.endswith(f"-{volume.id.partition('/')[2]}"))
    fstab = tmp_path / "fstab"
    fstab.write_text(f"/dev/disk/by-id/dm-uuid-{uuid} /data ext4 defaults 0 2\n")
    monkeypatch.setattr(swaps, "FSTAB", str(fstab))
    with pytest.raises(PreconditionError, match=re.escape(str(fstab))):
        thin.provider().swap("w1", found, volume)
    assert not list(thin.provider().swaps())
    lvm("lvcreate", "-qq", "-y", "-s", "-L", "8m", "-n", "theirs", volume.id)
    fstab.write_text("")
    with pytest.raises(BusyError, match="theirs"):
        thin.provider().swap("w1", found, volume)


@pytest.mark.parametrize("is_thin", [True, False])
def test_an_attachment_outlives_a_reboot_as_a_record(group: Storage, is_thin: bool) -> None:
    with harness_on(group, thin=is_thin) as harness:
        volume = filled(harness)
        birth = taken(harness, volume)
        content = describe(top(volume))
        before = harness.objects()
        (found,) = harness.provider().snapshots(birth.set_id)
        attached = attach(harness, found, Access.WRITABLE)
        harness.provider().settle(attached.id, utc_now())
        Path(attached.destination, "written").write_text("to it")
        harness.leave(attached.destination)
        mounts.unmount(top(volume))
        for device in block.mapped():
            if device.dm_name.startswith("snapshotter-"):
                lvm("dmsetup", "remove", "--retry", device.dm_name)
        lvm("vgchange", "-qq", "-an", group.vg)
        (listed,) = harness.provider().attachments()
        assert listed.id == attached.id and listed.since is not None and not listed.held
        with pytest.raises(BusyError):
            harness.provider().delete(birth.set_id)
        lvm("vgchange", "-qq", "-aay", group.vg)
        harness.mount_all()
        Path(attached.destination).mkdir()
        lvm("sh", "-c", f"{listed.by_hand} {attached.destination}")
        assert Path(attached.destination, "written").read_text() == "to it", "the cure that `release` gives"
        harness.leave(attached.destination)
        harness.provider().detach(attached.id)
        assert harness.objects() == before
        assert content_of(harness, found) == content


def test_an_inactive_classic_snapshot_is_not_activated_with_its_origin(classic: LvmHarness) -> None:
    volume = filled(classic)
    birth = taken(classic, volume)
    (found,) = classic.provider().snapshots(birth.set_id)
    classic.overflow(found)
    mounts.unmount(top(volume))
    lvm("lvchange", "-qq", "-an", volume.id)
    attachment_id = new_attachment_id(utc_now())
    with pytest.raises(PreconditionError) as refused:
        classic.provider().attach(found, attachment_id, Access.WRITABLE, classic.destination())
    assert classic.storage.attr(volume.id.partition("/")[2])[4] == "-", "production's own volume"
    lvm(*refused.value.cure.split(), check=False)
    with pytest.raises(StorageError, match="overflowed"):
        classic.provider().attach(found, attachment_id, Access.WRITABLE, classic.destination())
    classic.provider().detach(attachment_id)
    classic.mount_all()


def test_a_classic_image_of_before_its_origin_was_enlarged(classic: LvmHarness) -> None:
    volume = filled(classic)
    content, birth = describe(top(volume)), taken(classic, volume)
    (found,) = classic.provider().snapshots(birth.set_id)
    with classic.unmounted([volume.id]):
        lvm("lvchange", "-qq", "-an", volume.id)
        lvm("lvextend", "-qq", "-L+16m", volume.id)
        lvm("lvchange", "-qq", "-ay", volume.id)
    assert content_of(classic, found) == content
    attached = attach(classic, found, Access.WRITABLE)
    with open(mounts.mount_of(attached.path).source, "rb") as device:
        assert device.seek(0, os.SEEK_END) == 80 * MIB, "what lies behind it is nobody's"
    attached.end()


def test_two_volumes_in_one_group_share_its_room(classic: LvmHarness, tmp_path: Path) -> None:
    volumes = [filled(classic), filled(classic)]
    provider = LvmProvider(Settings(str(tmp_path), options={"size": 1 << 40}))
    with pytest.raises(PreconditionError) as refusal:
        free = int(classic.storage.lvs("vg_free")[0]["vg_free"])
        classic.storage.linear("ballast", (free - 120 * MIB) // MIB)
        provider.check(volumes, make_birth(volumes))
    assert "free" in refusal.value.line()
