"""What a volume is on btrfs, what can be swapped, what is refused with its cure: on a real one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from msgspec.structs import replace

from providers.btrfs import swaps as driver
from snapshotter import catalog
from snapshotter.core.errors import BusyError, PreconditionError
from snapshotter.core.model import Access, Birth, Hold, ImageState, Root, State, Volume, new_attachment_id, utc_now
from snapshotter.host import btrfs, mounts
from snapshotter.host.mounts import mount_of
from snapshotter.provider import Settings
from snapshotter.testing import describe, make_birth
from snapshotter.testing.conformance import attach, content_of, seal, take
from snapshotter.testing.harness import fill, ruin
from tests.unit.btrfs_kit import BtrfsHarness, OfSeveral, btrfs_harness, command

pytestmark = pytest.mark.root
SWAP = "w20261122t100630z-5f3a9c"


@pytest.fixture
def harness() -> Iterator[BtrfsHarness]:
    with btrfs_harness() as harness:
        yield harness


@pytest.fixture
def volume(harness: BtrfsHarness) -> Volume:
    volume = harness.volume()
    fill(top(volume))
    return volume


def top(volume: Volume) -> str:
    assert volume.path is not None
    return volume.path


def number_of(path: str) -> str:
    return command("inspect-internal", "rootid", path).strip()


def taken(harness: BtrfsHarness, *volumes: Volume, birth: Birth | None = None) -> Birth:
    birth = take(harness.provider(), harness, volumes, birth)
    seal(harness.provider(), birth)
    return birth


# ------------------------------------------------------------------------------------------------------- volumes


def test_one_subvolume_is_one_volume_by_whatever_mount(harness: BtrfsHarness, volume: Volume) -> None:
    os.mkdir(os.path.join(top(volume), "deep"))
    with harness.mounted("subvol=/data-1") as one, harness.mounted(f"subvolid={number_of(top(volume))}") as two:
        for where in (one, two):
            seen = harness.claimed(str(where / "deep"))
            assert (seen.id, seen.path) == (volume.id, str(where))
    assert harness.claimed(os.path.join(top(volume), "deep")) == volume
    assert volume.id.endswith(":/data-1")


def test_another_file_system_is_not_claimed(harness: BtrfsHarness) -> None:
    assert harness.provider().claim(mount_of("/proc"), "/proc") is None


def test_a_plain_directory_in_a_subvolume(harness: BtrfsHarness, volume: Volume) -> None:
    inside = os.path.join(top(volume), "database")
    claimed = harness.claimed(inside)
    assert claimed == volume
    birth = make_birth([claimed], roots=[Root(inside, 0, os.path.relpath(inside, top(claimed)))])
    taken(harness, claimed, birth=birth)
    (found,) = harness.provider().snapshots(birth.set_id)
    assert found.birth.roots[0].inside == "database"
    content = describe(inside)
    ruin(top(volume))
    attached = attach(harness, found, Access.WRITABLE)
    try:
        assert describe(os.path.join(attached.path, "database")) == content
    finally:
        attached.end()


def test_the_top_level_itself(harness: BtrfsHarness) -> None:
    """Data on a btrfs without subvolumes. Our store is in sight there, and in no image."""
    fill(str(harness.point))
    volume = harness.claimed(str(harness.point))
    for _ in range(2):
        birth = taken(harness, volume)
    (found,) = harness.provider().snapshots(birth.set_id)
    attached = attach(harness, found, Access.WRITABLE)
    try:
        assert os.path.isfile(os.path.join(attached.path, "key"))
        assert os.listdir(os.path.join(attached.path, btrfs.STORE)) == []
    finally:
        attached.end()
    assert harness.store.stat().st_mode & 0o777 == 0o700
    with pytest.raises(PreconditionError, match="top level"):
        harness.provider().swap(SWAP, found, volume)


def test_a_nested_subvolume_is_never_left_out_in_silence(harness: BtrfsHarness, volume: Volume) -> None:
    nested = harness.subvolume("data-1/database/blobs")
    fill(top(nested), "nested")
    with pytest.raises(PreconditionError) as refused:
        harness.provider().check([volume], make_birth([volume]))
    assert "database/blobs" in refused.value.line() and top(nested) in refused.value.cure
    elsewhere = Root(os.path.join(top(volume), "caches"), 0, "caches")
    harness.provider().check([volume], make_birth([volume], roots=[elsewhere]))

    content = describe(top(volume))
    birth = taken(harness, volume, nested)
    ruin(top(nested))
    outer, inner = (attach(harness, found, Access.WRITABLE) for found in harness.provider().snapshots(birth.set_id))
    place = os.path.join(outer.path, "database/blobs")
    try:
        assert os.listdir(place) == []
        subprocess.run(["mount", "--bind", inner.path, place], check=True)
        restored = describe(outer.path)
        # The empty directory in a nested one's place is the kernel's; all else is what it was.
        assert restored == content
    finally:
        subprocess.run(["umount", place], capture_output=True)
        inner.end()
        outer.end()


def test_other_tools_snapshots_inside_a_volume_are_not_data(harness: BtrfsHarness, volume: Volume) -> None:
    command("subvolume", "create", os.path.join(top(volume), ".snapshots"))
    os.mkdir(os.path.join(top(volume), ".snapshots/1"))
    command("subvolume", "snapshot", top(volume), os.path.join(top(volume), ".snapshots/1/snapshot"))
    command("subvolume", "snapshot", "-r", top(volume), os.path.join(top(volume), "btrbk.20261122"))
    assert btrfs.live_nested(top(volume)) == []
    birth = taken(harness, volume)
    harness.provider().delete(birth.set_id)
    assert number_of(os.path.join(top(volume), ".snapshots/1/snapshot"))
    assert number_of(os.path.join(top(volume), "btrbk.20261122"))


def test_nested_ones_are_found_below_a_path_alone_and_without_root(harness: BtrfsHarness, volume: Volume) -> None:
    inner = harness.subvolume("data-1/database/in ner\n")
    deep = harness.subvolume("data-1/database/in ner\n/deep")
    assert btrfs.live_nested(top(volume)) == [inner.path, deep.path]
    assert btrfs.live_nested(os.path.join(top(volume), "database")) == [inner.path, deep.path]
    assert btrfs.live_nested(os.path.join(top(volume), "caches")) == []
    assert btrfs.live_nested("/proc") == []
    for path in (harness.scratch, harness.point):
        path.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            os._exit(0 if btrfs.live_nested(top(volume)) == [inner.path, deep.path] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_directory_mounted_by_itself_is_refused(harness: BtrfsHarness, volume: Volume) -> None:
    """Its subvolume's top is out of sight, so nobody could tell where in the image it is."""
    where = harness.scratch / "bound"
    where.mkdir()
    subprocess.run(["mount", "--bind", os.path.join(top(volume), "database"), str(where)], check=True)
    try:
        claimed = harness.claimed(str(where))
        with pytest.raises(PreconditionError, match="mounted by itself"):
            harness.provider().check([claimed], make_birth([claimed]))
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_way_through_a_link_is_refused(harness: BtrfsHarness, volume: Volume) -> None:
    os.mkdir(harness.point / "real")
    harness.subvolume("real/data")
    (harness.point / "link").symlink_to("real")
    lured = replace(volume, id=volume.id.replace("/data-1", "/link/data"))
    with pytest.raises(PreconditionError, match="/real/data"):
        harness.provider().check([lured], make_birth([lured]))


def test_several_disks(tmp_path: Path) -> None:
    """Whichever of them the mount table names, also when that name is no longer a disk's."""
    images = [tmp_path / f"{k}.img" for k in range(2)]
    loops: list[str] = []
    point = tmp_path / "p"
    point.mkdir()
    try:
        for image in images:
            with open(image, "wb") as file:
                file.truncate(400 << 20)
            made = subprocess.run(["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True)
            loops.append(made.stdout.strip())
        subprocess.run(["mkfs.btrfs", "-q", "-d", "raid0", "-m", "raid1", *loops], check=True, capture_output=True)
        subprocess.run(["mount", loops[1], str(point)], check=True)
        try:
            harness = BtrfsHarness(point, tmp_path)
            volume = harness.volume()
            fill(top(volume))
            content = describe(top(volume))
            birth = taken(harness, volume)
            ruin(top(volume))
            (found,) = harness.provider().snapshots(birth.set_id)
            assert content_of(harness, found) == content
            (fs,) = harness.provider()._file_systems()
            assert sorted(fs.devices().values()) == sorted(os.path.basename(loop) for loop in loops)
            renamed = btrfs.FileSystem(fs.uuid, replace(fs.mount, source="/dev/gone"))
            assert renamed.source() in loops
            stranger = btrfs.FileSystem(fs.uuid, replace(fs.mount, source=mount_of("/").source))
            assert stranger.source() in loops, "another file system's disk was taken at the mount table's word"
        finally:
            subprocess.run(["umount", str(point)], check=True)
    finally:
        for loop in loops:
            subprocess.run(["losetup", "-d", loop], capture_output=True)


def test_a_set_with_a_file_system_that_is_not_mounted_is_unknown(tmp_path: Path) -> None:
    """Judged damaged, what is left of it would be deleted, on `status`'s own advice."""
    with btrfs_harness(200) as here, btrfs_harness(200) as away:
        provider = OfSeveral(Settings(str(tmp_path), floor=0.0))
        provider.points = (here.point, away.point)
        volumes = [here.volume(), away.volume()]
        birth = make_birth(volumes)
        provider.create(volumes, birth, Hold())
        provider.mark(birth.set_id, {"sealed": "20261122t100630z", "grade": "filesystem"})
        assert [found.state for found in catalog.read([provider]).sets] == [State.READY]
        device = mount_of(str(away.point)).source
        subprocess.run(["umount", str(away.point)], check=True)
        try:
            provider.points = (here.point,)
            (found,) = catalog.read([provider]).sets
            assert found.state is State.UNKNOWN and volumes[1].id in found.why
        finally:
            subprocess.run(["mount", device, str(away.point)], check=True)
        provider.points = (here.point, away.point)
        assert [each.state for each in catalog.read([provider]).sets] == [State.READY]


def test_the_private_mount_is_in_nobodys_sight(harness: BtrfsHarness, volume: Volume) -> None:
    before = [(mount.path, mount.options, mount.super_options) for mount in mounts.table()]
    (fs,) = harness.provider()._file_systems()
    fd = fs.open_top()
    assert "data-1" in os.listdir(fd)
    during = [(mount.path, mount.options, mount.super_options) for mount in mounts.table()]
    os.close(fd)
    assert during == before


def test_without_root_it_says_so(harness: BtrfsHarness, volume: Volume) -> None:
    harness.scratch.chmod(0o755)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            provider = harness.provider()
            said = [*provider.availability(), provider.claim(mount_of(top(volume)), top(volume)) == volume]
            try:
                list(provider.snapshots())
            except PreconditionError as error:
                said.append(error.line())
            os.write(write, "\n".join(map(str, said)).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    reason, claimed, listed = os.read(read, 4096).decode().split("\n")
    os.close(read)
    assert "root" in reason and "--provider copy" in reason
    assert claimed == "True", "who claims must not change with who asks"
    assert "--provider copy" in listed


# --------------------------------------------------------------------------------------------------------- images


def test_an_image_made_writable_is_no_image(harness: BtrfsHarness, volume: Volume) -> None:
    birth = taken(harness, volume)
    image = harness.store / "sets" / birth.set_id / "0"
    command("property", "set", str(image), "ro", "false")
    (found,) = harness.provider().snapshots(birth.set_id)
    assert found.state is ImageState.INVALID and "writable" in found.why


def test_a_read_only_image_beside_a_writable_origin(harness: BtrfsHarness, volume: Volume) -> None:
    birth = taken(harness, volume)
    (found,) = harness.provider().snapshots(birth.set_id)
    attached = attach(harness, found, Access.READ_ONLY)
    try:
        with open(os.path.join(top(volume), "still-written"), "wb") as file:
            file.write(b"1")
        with pytest.raises(OSError):
            os.mkdir(os.path.join(attached.path, "x"))
    finally:
        attached.end()


def test_what_was_made_inside_a_clone_goes_with_it(harness: BtrfsHarness, volume: Volume) -> None:
    birth = taken(harness, volume)
    before = harness.objects()
    (found,) = harness.provider().snapshots(birth.set_id)
    attached = attach(harness, found, Access.WRITABLE)
    command("subvolume", "create", os.path.join(attached.path, "caches/theirs"))
    command("subvolume", "snapshot", "-r", attached.path, os.path.join(attached.path, "caches/theirs/deeper"))
    attached.end()
    assert harness.objects() == before


def test_what_is_mounted_is_busy(harness: BtrfsHarness, volume: Volume) -> None:
    birth = taken(harness, volume)
    (found,) = harness.provider().snapshots(birth.set_id)
    image = f"subvol=/{btrfs.STORE}/sets/{birth.set_id}/0"
    with harness.mounted(image, "ro") as point, pytest.raises(BusyError, match=str(point)):
        harness.provider().delete(birth.set_id)
    attached = attach(harness, found, Access.WRITABLE)
    with pytest.raises(BusyError) as busy:
        harness.provider().detach(attached.id)
    assert attached.path in busy.value.line()
    assert os.path.isfile(os.path.join(attached.path, "key"))
    attached.end()
    harness.provider().delete(birth.set_id)


def test_a_clone_can_be_taken_in_its_turn(harness: BtrfsHarness, volume: Volume) -> None:
    birth = taken(harness, volume)
    attached = attach(harness, next(harness.provider().snapshots(birth.set_id)), Access.WRITABLE)
    try:
        clone = harness.claimed(attached.path)
        again = taken(harness, clone, birth=make_birth([clone], roots=[Root("/restored", 0)]))
        harness.provider().delete(again.set_id)
    finally:
        attached.end()


def test_a_destination_too_long_for_its_record_is_refused(harness: BtrfsHarness, volume: Volume) -> None:
    birth = taken(harness, volume)
    before = harness.objects()
    (found,) = harness.provider().snapshots(birth.set_id)
    attachment_id = new_attachment_id(utc_now())
    with pytest.raises(PreconditionError, match="too long"):
        harness.provider().attach(found, attachment_id, Access.WRITABLE, "/d" * 2000)
    undecodable = os.fsdecode(b"/d\xff") * 300
    harness.provider().attach(found, attachment_id, Access.WRITABLE, undecodable)
    harness.provider().settle(attachment_id, datetime.now(UTC))
    assert [each.path for each in harness.provider().attachments()] == [undecodable]
    harness.provider().detach(attachment_id)
    assert harness.objects() == before


def test_somebody_elses_directory_of_our_name_is_refused(harness: BtrfsHarness, volume: Volume) -> None:
    harness.store.mkdir()
    (harness.store / "theirs").write_bytes(b"1")
    with pytest.raises(PreconditionError, match="isn't ours"):
        harness.provider().check([volume], make_birth([volume]))
    with pytest.raises(PreconditionError, match="isn't ours"):
        harness.provider().prepare([volume], make_birth([volume]), 1.0)
    assert not list(harness.provider().snapshots())
    assert os.listdir(harness.store) == ["theirs"]


def test_a_store_half_made_by_a_dead_run_is_finished(harness: BtrfsHarness, volume: Volume) -> None:
    command("subvolume", "create", str(harness.store))
    (harness.store / "sets").mkdir()
    taken(harness, volume)
    assert len(list(harness.provider().snapshots())) == 1


# ---------------------------------------------------------------------------------------------------------- swaps


@pytest.fixture
def older(harness: BtrfsHarness, volume: Volume) -> tuple[Birth, dict[str, tuple[object, ...]]]:
    content = describe(top(volume))
    birth = taken(harness, volume)
    ruin(top(volume))
    return birth, content


def refused(harness: BtrfsHarness, volume: Volume, birth: Birth) -> str:
    """The swap is refused, and nothing has changed."""
    before, content = harness.objects(), describe(top(volume))
    with pytest.raises((PreconditionError, BusyError)) as error:
        harness.provider().swap(SWAP, next(harness.provider().snapshots(birth.set_id)), volume)
    assert error.value.cure
    assert harness.objects() == before and describe(top(volume)) == content
    return error.value.line()


def test_a_swap_shows_after_a_remount(
    harness: BtrfsHarness, volume: Volume, older: tuple[Birth, dict[str, tuple[object, ...]]]
) -> None:
    birth, content = older
    origin = describe(top(volume))
    with harness.mounted("subvol=/data-1") as live:
        mounted = harness.claimed(str(live))
        assert str(live) in refused(harness, mounted, birth), "mounted, it would go on to show the set-aside"
    provider = harness.provider()
    provider.swap(SWAP, next(provider.snapshots(birth.set_id)), volume)
    with harness.mounted("subvol=/data-1") as live:
        assert describe(str(live)) == content
        assert harness.claimed(str(live)) == replace(volume, path=str(live)), "still the same target"
        with pytest.raises(BusyError, match=str(live)):
            harness.provider().swap_back(SWAP)
        assert describe(str(live)) == content
    aside = f"subvol=/{btrfs.STORE}/swaps/{SWAP}/other"
    with harness.mounted(aside) as old:
        claimed = harness.claimed(str(old))
        with pytest.raises(PreconditionError, match="set aside"):
            harness.provider().check([claimed], make_birth([claimed]))
        with pytest.raises(BusyError, match=str(old)):
            harness.provider().swap_commit(SWAP)
    harness.provider().swap_back(SWAP)
    with harness.mounted("subvol=/data-1") as live:
        assert describe(str(live)) == origin


def test_a_nested_origin_is_swapped_in_its_parent(harness: BtrfsHarness, volume: Volume) -> None:
    inner = harness.subvolume("data-1/database/inner")
    fill(top(inner))
    content = describe(top(inner))
    birth = taken(harness, inner)
    ruin(top(inner))
    origin = describe(top(inner))
    provider = harness.provider()
    provider.swap(SWAP, next(provider.snapshots(birth.set_id)), inner)
    assert describe(top(inner)) == content
    provider.swap_back(SWAP)
    assert describe(top(inner)) == origin


@pytest.mark.parametrize(
    "line",
    [
        "UUID={uuid} /data btrfs defaults,subvolid={number} 0 0",
        "{source} /data btrfs subvolid={hex},subvol=/data-1 0 0",
        "LABEL=chain /data btrfs noatime,subvolid={number} 0 0",
    ],
)
def test_an_fstab_by_number_refuses_the_swap(
    harness: BtrfsHarness,
    volume: Volume,
    older: tuple[Birth, dict[str, tuple[object, ...]]],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (fs,) = harness.provider()._file_systems()
    number = int(number_of(top(volume)))
    fstab = tmp_path / "fstab"
    monkeypatch.setattr(driver, "FSTAB", str(fstab))
    words = {"uuid": fs.uuid.upper(), "number": number, "hex": hex(number), "source": fs.source()}
    fstab.write_text(f"# {line}\n\n" + line.format(**words) + "\n")
    said = refused(harness, volume, older[0])
    assert "line 3" in said and "subvol=/data-1" in said
    fstab.unlink()
    monkeypatch.setattr(mounts, "UNITS", (str(tmp_path),))
    source, _, _, options, *_ = line.format(**words).split()
    unit = tmp_path / "data.mount"
    unit.write_text(f"[Mount]\nWhat={source}\nWhere=/data\nOptions = {options}\n")
    said = refused(harness, volume, older[0])
    assert str(unit) in said and "subvol=/data-1" in said
    for harmless_unit in (
        f"[Mount]\nWhat={source}\nOptions={options}\nOptions=subvol=/data-1\n",  # the last one counts
        f"[Mount]\nWhat={source}\nType=ext4\nOptions={options}\n",
        f"[Mount]\nWhat={mount_of('/').source}\nOptions={options}\n",
    ):
        unit.write_text(harmless_unit)
        assert not list(driver.by_number(fs, number)), harmless_unit
    harmless = [
        "UUID={uuid} /data btrfs subvol=/data-1 0 0",
        "UUID=11111111-2222-3333-4444-555555555555 /x btrfs subvolid={number} 0 0",
        "{other} /x btrfs subvolid={number} 0 0",
        "UUID={uuid} /data btrfs subvolid=99999 0 0",
        "{source} /x ext4 subvolid={number} 0 0",
    ]
    fstab.write_text("".join(each.format(**words, other=mount_of("/").source) + "\n" for each in harmless))
    harness.provider().swap(SWAP, next(harness.provider().snapshots(older[0].set_id)), volume)


def test_the_default_subvolume_refuses_the_swap(
    harness: BtrfsHarness, volume: Volume, older: tuple[Birth, dict[str, tuple[object, ...]]]
) -> None:
    command("subvolume", "set-default", number_of(top(volume)), str(harness.point))
    assert "set-default 5" in refused(harness, volume, older[0])
    command("subvolume", "set-default", "5", str(harness.point))


def test_nested_ones_refuse_the_swap_and_the_way_back(
    harness: BtrfsHarness, volume: Volume, older: tuple[Birth, dict[str, tuple[object, ...]]]
) -> None:
    theirs = os.path.join(top(volume), "theirs")
    command("subvolume", "snapshot", "-r", top(volume), theirs)
    assert "theirs" in refused(harness, volume, older[0])
    command("subvolume", "delete", theirs)
    provider = harness.provider()
    provider.swap(SWAP, next(provider.snapshots(older[0].set_id)), volume)
    command("subvolume", "create", theirs)
    with pytest.raises(BusyError, match="theirs"):
        provider.swap_back(SWAP)
    assert os.path.isdir(theirs)
    command("subvolume", "delete", theirs)
    provider.swap_back(SWAP)


@pytest.mark.parametrize("what", ["nothing", "another subvolume", "a directory"])
def test_the_way_back_where_somebody_moved_things(
    harness: BtrfsHarness, volume: Volume, older: tuple[Birth, dict[str, tuple[object, ...]]], what: str
) -> None:
    origin = describe(top(volume))
    provider = harness.provider()
    provider.swap(SWAP, next(provider.snapshots(older[0].set_id)), volume)
    command("subvolume", "delete", top(volume))
    if what == "another subvolume":
        command("subvolume", "create", top(volume))
    elif what == "a directory":
        os.mkdir(top(volume))
    if what != "nothing":
        theirs = os.path.join(top(volume), "theirs")
        Path(theirs).write_bytes(b"1")
        with pytest.raises((BusyError, PreconditionError)) as error:
            provider.swap_back(SWAP)
        assert error.value.cure
        assert Path(theirs).read_bytes() == b"1" and list(provider.swaps()) == [SWAP]
        os.rename(top(volume), top(volume) + ".theirs")
    provider.swap_back(SWAP)
    assert describe(top(volume)) == origin and not list(provider.swaps())
