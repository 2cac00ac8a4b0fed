"""Others on the same groups: what hangs on our volumes, what somebody has open or renamed, groups that can't be read.
Nothing of theirs goes with ours, and nothing is silently absent."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from providers.lvm import LvmProvider
from providers.lvm.commands import Group
from snapshotter.core.errors import BusyError, SnapshotterError, StorageError
from snapshotter.core.model import Access, Birth, ImageState, Volume, new_attachment_id, utc_now
from snapshotter.host import block, mounts
from snapshotter.provider import Settings
from snapshotter.testing import describe
from snapshotter.testing.conformance import content_of, seal, take
from snapshotter.testing.harness import fill, ruin
from tests.lab.lvm_kit import MIB, LvmHarness, Storage, harness_on, lvm, make_file_system, marks, storage
from tests.support import Command

pytestmark = marks


@pytest.fixture(scope="module")
def group() -> Iterator[Storage]:
    with storage(2000, pool_mb=700) as made:
        yield made


@pytest.fixture
def thin(group: Storage) -> Iterator[LvmHarness]:
    with harness_on(group, thin=True) as harness:
        yield harness


@pytest.fixture
def their_pool(thin: LvmHarness) -> str:
    """Another thin pool in the group; it goes with the harness."""
    pool = ["-L", "120m", "--poolmetadatasize", "4m", "-Zn", "--poolmetadataspare", "n"]
    lvm("lvcreate", "-qq", "-y", *pool, "-T", f"{thin.storage.vg}/theirpool")
    return "theirpool"


def top(volume: Volume) -> str:
    assert volume.path is not None
    return volume.path


def filled(harness: LvmHarness) -> Volume:
    volume = harness.volume()
    fill(top(volume))
    return volume


def taken(harness: LvmHarness, volume: Volume) -> Birth:
    birth = take(harness.provider(), harness, [volume])
    seal(harness.provider(), birth)
    return birth


def names(harness: LvmHarness) -> set[str]:
    return {row["lv_name"] for row in harness.storage.lvs()}


def in_a_run_that_dies(act: Callable[[], object]) -> None:
    """`act` in a process that is killed at its end, if not before."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


# -------------------------------------------------------------------------------------------------- what is not seen


def test_a_group_that_cannot_be_read_is_said(thin: LvmHarness, tmp_path: Path) -> None:
    """`lvs` ends with 0 and leaves it out: its sets must not look deleted, and other groups' go on."""
    volume = filled(thin)
    command = Command(tmp_path / "etc")
    here = command.json("take", top(volume))["set_id"]
    with storage(300, pool_mb=160) as other, harness_on(other, thin=True) as theirs:
        there_volume = filled(theirs)
        there = command.json("take", top(there_volume))["set_id"]
        assert command.json("list")["unavailable"] == []
        with open(other.disk, "r+b", buffering=0) as disk:  # the text area of its only metadata area
            disk.seek(4096)
            whole = disk.read(MIB - 4096)
            disk.seek(4096 + 512)
            disk.write(bytes(len(whole) - 512))
            os.fsync(disk.fileno())
            try:
                listed = command.json("list")
                assert [entry["set_id"] for entry in listed["sets"]] == [here], listed["unavailable"]
                (unavailable,) = listed["unavailable"]
                assert unavailable["provider"] == "lvm" and other.disk in unavailable["reason"]
                error = command.error("delete", there, "--yes", exit_code=4)
                assert "not asked: lvm" in error["line"], error
                with pytest.raises(StorageError, match="metadata"):
                    thin.provider().delete(there)
                assert command.json("take", top(volume))["good"], "a group of its own is in order"
            finally:
                disk.seek(4096)
                disk.write(whole)
                os.fsync(disk.fileno())
        listed = command.json("list")
        assert there in [entry["set_id"] for entry in listed["sets"]] and listed["unavailable"] == []


# --------------------------------------------------------------------------------------------------- what is in use


@pytest.mark.parametrize("is_thin", [True, False])
def test_a_leftover_that_somebody_has_open_stops_no_take(group: Storage, is_thin: bool) -> None:
    with harness_on(group, thin=is_thin) as harness:
        volume = filled(harness)
        content = describe(top(volume))
        in_a_run_that_dies(lambda: take(harness.provider(), harness, [volume]))
        (left,) = harness.storage.ours()
        if is_thin:  # a classic one is active as long as its origin is
            lvm("lvchange", "-qq", "-ay", "-K", f"{group.vg}/{left}")
        with open(f"/dev/{group.vg}/{left}", "rb"):
            provider = harness.provider()
            birth = take(provider, harness, [volume])
            seal(provider, birth)
            assert any(left[:-2] in note and "fuser" in note for note in provider.notes)
            assert left in harness.storage.ours()
        found = next(found for found in harness.provider().snapshots(birth.set_id))
        assert content_of(harness, found) == content
        again = taken(harness, volume)
        assert {row.rpartition("-")[0] for row in harness.storage.ours()} == {birth.set_id, again.set_id}


# ------------------------------------------------------------------------------------------------ what hangs on ours


def test_an_image_that_is_an_external_origin_stays(thin: LvmHarness, their_pool: str) -> None:
    """`lvremove -y` of it would remove the other pool's volume too."""
    volume = filled(thin)
    birth = taken(thin, volume)
    image = f"{thin.storage.vg}/{birth.set_id}-0"
    lvm("lvcreate", "-qq", "-y", "-s", "--thinpool", their_pool, "-n", "theirs", image)
    before = names(thin)
    with pytest.raises(BusyError, match="theirs") as refused:
        thin.provider().delete(birth.set_id)
    assert "lvremove" in refused.value.cure and names(thin) == before
    lvm("lvremove", "-qq", "-y", f"{thin.storage.vg}/theirs")
    thin.provider().delete(birth.set_id)
    assert names(thin) == before - {"theirs", f"{birth.set_id}-0"}


def test_a_classic_snapshot_of_an_image_stays(thin: LvmHarness) -> None:
    volume = filled(thin)
    birth = taken(thin, volume)
    lvm("lvcreate", "-qq", "-y", "-s", "-L", "8m", "-n", "theirs", f"{thin.storage.vg}/{birth.set_id}-0")
    before = names(thin)
    with pytest.raises(BusyError, match="theirs"):
        thin.provider().delete(birth.set_id)
    assert names(thin) == before
    lvm("lvremove", "-qq", "-y", f"{thin.storage.vg}/theirs")
    thin.provider().delete(birth.set_id)


def test_a_snapshot_of_a_clone_stays(thin: LvmHarness) -> None:
    volume = filled(thin)
    birth = taken(thin, volume)
    (found,) = thin.provider().snapshots(birth.set_id)
    attachment_id = new_attachment_id(utc_now())
    thin.provider().attach(found, attachment_id, Access.WRITABLE, "/nowhere")
    lvm("lvcreate", "-qq", "-y", "-s", "-L", "8m", "-n", "theirs", f"{thin.storage.vg}/{attachment_id}-0")
    before = names(thin)
    with pytest.raises(BusyError, match="theirs"):
        thin.provider().detach(attachment_id)
    assert names(thin) == before
    lvm("lvremove", "-qq", "-y", f"{thin.storage.vg}/theirs")
    thin.provider().detach(attachment_id)


def test_a_snapshot_of_what_was_swapped_in_stays(thin: LvmHarness) -> None:
    volume = filled(thin)
    birth = taken(thin, volume)
    (found,) = thin.provider().snapshots(birth.set_id)
    thin.provider().swap("w1", found, volume)
    lvm("lvcreate", "-qq", "-y", "-s", "-L", "8m", "-n", "theirs", volume.id)
    before = names(thin)
    with pytest.raises(BusyError, match="theirs"):
        thin.provider().swap_back("w1")
    assert names(thin) == before and list(thin.provider().swaps()) == ["w1"]
    lvm("lvremove", "-qq", "-y", f"{thin.storage.vg}/theirs")
    thin.provider().swap_back("w1")


def test_a_set_aside_that_is_an_external_origin_stays(thin: LvmHarness, their_pool: str) -> None:
    volume = filled(thin)
    birth = taken(thin, volume)
    (found,) = thin.provider().snapshots(birth.set_id)
    thin.provider().swap("w1", found, volume)
    aside = f"{thin.storage.vg}/w1-aside"
    lvm("lvchange", "-qq", "-pr", aside)
    lvm("lvcreate", "-qq", "-y", "-s", "--thinpool", their_pool, "-n", "theirs", aside)
    before = names(thin)
    with pytest.raises(BusyError, match="theirs"):
        thin.provider().swap_commit("w1")
    assert names(thin) == before
    lvm("lvremove", "-qq", "-y", f"{thin.storage.vg}/theirs")
    thin.provider().swap_commit("w1")
    assert "w1-aside" not in names(thin)


def test_a_volume_with_an_external_origin_is_taken(thin: LvmHarness) -> None:
    vg = thin.storage.vg
    thin.storage.linear("base", 80)
    make_file_system(f"/dev/{vg}/base", "ext4")
    lvm("lvchange", "-qq", "-an", f"{vg}/base")
    lvm("lvchange", "-qq", "-pr", f"{vg}/base")
    lvm("lvcreate", "-qq", "-y", "-s", "--thinpool", "pool", "-n", "grown", f"{vg}/base")
    point = str(thin.scratch / "grown")
    os.mkdir(point)
    lvm("mount", f"/dev/{vg}/grown", point)
    thin.points[f"{vg}/grown"] = point
    fill(point)
    volume = thin.provider().claim(mounts.mount_of(point), point)
    assert volume is not None
    content = describe(point)
    birth = taken(thin, volume)
    ruin(point)
    (found,) = thin.provider().snapshots(birth.set_id)
    assert content_of(thin, found) == content
    thin.provider().swap("w1", found, volume)
    assert describe(point) == content
    thin.provider().swap_commit("w1")
    thin.provider().delete(birth.set_id)
    assert describe(point) == content and {"base", "grown"} <= names(thin)


def test_a_device_in_the_pool_that_lvm_knows_nothing_of_is_named(thin: LvmHarness) -> None:
    """LVM gives its number out next, and the pool refuses: `create_snap: File exists`, again and again."""
    volume = filled(thin)
    numbers = [int(row["thin_id"]) for row in thin.storage.lvs("thin_id") if row["thin_id"]]
    tpool = f"{thin.storage.vg}-pool-tpool"
    lvm("dmsetup", "message", tpool, "0", f"create_thin {max(numbers) + 1}")
    before = thin.objects()
    with pytest.raises(StorageError, match="LVM knows nothing of") as refused:
        take(thin.provider(), thin, [volume])
    assert thin.objects() == before
    lvm("sh", "-c", refused.value.cure.partition(": ")[2])
    taken(thin, volume)


# ------------------------------------------------------------------------------------------------ what is somebody's


def test_an_image_that_was_renamed_is_somebodys(thin: LvmHarness) -> None:
    """A person has made it their node's volume: whatever is deleted, it stays."""
    volume = filled(thin)
    birth = taken(thin, volume)
    (image,) = thin.provider().snapshots(birth.set_id)
    lvm("lvrename", "-qq", image.id, "production")
    (found,) = thin.provider().snapshots(birth.set_id)
    assert found.state is ImageState.INVALID and "renamed" in found.why
    for wanted in (image, found):
        with pytest.raises(SnapshotterError):
            thin.provider().attach(wanted, new_attachment_id(utc_now()), Access.WRITABLE, "/nowhere")
    thin.provider().delete(birth.set_id)
    assert "production" in names(thin) and not thin.storage.ours()
    assert not list(thin.provider().snapshots(birth.set_id))


@pytest.mark.parametrize("is_thin", [True, False])
def test_a_clone_that_was_renamed_is_somebodys(group: Storage, is_thin: bool) -> None:
    """It can be released, and stays. One over a classic image is two devices: only both are worth anything."""
    with harness_on(group, thin=is_thin) as harness:
        volume = filled(harness)
        birth = taken(harness, volume)
        (found,) = harness.provider().snapshots(birth.set_id)
        attachment_id = new_attachment_id(utc_now())
        harness.provider().attach(found, attachment_id, Access.WRITABLE, "/nowhere")
        lvm("lvrename", "-qq", group.vg, f"{attachment_id}-0", "theirs")
        if not is_thin:
            with pytest.raises(BusyError, match="renamed") as refused:
                harness.provider().detach(attachment_id)
            assert f"lvrename {group.vg} theirs {attachment_id}-0" in refused.value.cure
            lvm("dmsetup", "remove", "--retry", f"snapshotter-{attachment_id}-0")
        harness.provider().detach(attachment_id)
        assert "theirs" in names(harness) and not list(harness.provider().attachments())
        harness.provider().delete(birth.set_id)
        assert not harness.storage.ours() and "theirs" in names(harness)


def test_a_set_in_a_copied_group_is_not_guessed_at(thin: LvmHarness) -> None:
    """As after vgimportclone: every record twice. Neither is removed, and each is attached as itself."""
    volume = filled(thin)
    birth = taken(thin, volume)
    (image,) = thin.provider().snapshots(birth.set_id)
    tags = thin.storage.lvs("lv_name,lv_tags")
    words = next(row["lv_tags"] for row in tags if row["lv_name"] == image.id.partition("/")[2]).split(",")
    with storage(300, pool_mb=160) as other:
        other.thin("copied", 80)
        lvm("lvchange", "-qq", "-an", f"{other.vg}/copied")
        added = [word for text in words for word in ("--addtag", text)]
        lvm("lvchange", "-qq", "-pr", *added, f"{other.vg}/copied")
        lvm("lvrename", "-qq", other.vg, "copied", f"{birth.set_id}-0")
        plain = LvmProvider(Settings("/nowhere"))
        both = {found.id for found in plain.snapshots(birth.set_id)}
        assert both == {image.id, f"{other.vg}/{birth.set_id}-0"}
        with pytest.raises(BusyError) as refused:
            plain.delete(birth.set_id)
        assert all(name in refused.value.line() for name in both)
        assert {found.id for found in plain.snapshots(birth.set_id)} == both
        assert content_of(thin, image) == describe(top(volume))
        lvm("lvrename", "-qq", other.vg, f"{birth.set_id}-0", "kept")
        plain.delete(birth.set_id)
        assert [row["lv_name"] for row in other.lvs()] == ["kept", "pool"] and not other.ours()
    assert f"{birth.set_id}-0" not in names(thin)


def test_a_swap_in_a_copied_group_is_not_guessed_at(tmp_path: Path) -> None:
    """As after vgimportclone of a copy of the disk, for somebody to look into: the wrong one's data was discarded."""
    with storage(400, pool_mb=200) as made, harness_on(made, thin=True) as harness:
        volume = filled(harness)
        birth = taken(harness, volume)
        (found,) = harness.provider().snapshots(birth.set_id)
        attachment_id = new_attachment_id(utc_now())
        harness.provider().attach(found, attachment_id, Access.WRITABLE, str(tmp_path / "clone"))
        harness.provider().swap("w1", found, volume)
        lvm("sync")
        backing = lvm("losetup", "--noheadings", "--output", "BACK-FILE", made.disk).strip()
        lvm("cp", "--sparse=always", backing, str(tmp_path / "copy"))
        disk = lvm("losetup", "--find", "--show", str(tmp_path / "copy")).strip()
        copied = f"{made.vg}c"

        def volumes() -> str:
            return lvm("lvs", "--noheadings", "-o", "lv_full_name,lv_uuid,lv_attr,lv_tags", made.vg, copied)

        try:
            lvm("vgimportclone", "-n", copied, disk)
            before = volumes()
            assert copied in before
            plain = LvmProvider(Settings("/nowhere"))
            for end in (plain.swap_back, plain.swap_commit, plain.refuse_commit):
                with pytest.raises(BusyError, match="copied group"):
                    end("w1")
            with pytest.raises(BusyError, match="copied group"):
                plain.detach(attachment_id)
            assert plain.reap() == [] and volumes() == before
        finally:
            lvm("vgremove", "-ff", "-y", copied, check=False)
            lvm("losetup", "--detach", disk)
        plain.detach(attachment_id)
        plain.swap_commit("w1")
        assert "w1-aside" not in names(harness)


# --------------------------------------------------------------------------------------------------- swaps that died


def test_a_live_volume_that_once_was_set_aside_is_not_reaped(thin: LvmHarness) -> None:
    """Somebody has taken a swap back by hand: the tags are still on it."""
    volume = filled(thin)
    birth = taken(thin, volume)
    (found,) = thin.provider().snapshots(birth.set_id)
    ruin(top(volume))
    content = describe(top(volume))
    thin.provider().swap("w1", found, volume)
    with thin.unmounted([volume.id]):
        lvm("lvremove", "-qq", "-y", volume.id)
        lvm("lvrename", "-qq", thin.storage.vg, "w1-aside", volume.id.partition("/")[2])
        lvm("lvchange", "-qq", "-kn", volume.id)
        lvm("lvchange", "-qq", "-ay", volume.id)
    before = names(thin)
    assert thin.provider().reap() == []
    with contextlib.suppress(StorageError):
        thin.provider().swap_back("w1")
    assert thin.provider().reap() == []
    assert names(thin) == before and describe(top(volume)) == content


def test_what_is_set_aside_is_not_given_up_for_a_clone_that_is_gone(thin: LvmHarness) -> None:
    volume = filled(thin)
    birth = taken(thin, volume)
    (found,) = thin.provider().snapshots(birth.set_id)
    thin.provider().swap("w1", found, volume)
    mounts.unmount(top(volume))
    lvm("lvremove", "-qq", "-y", volume.id)
    for end in (thin.provider().swap_commit, thin.provider().swap_back):
        with pytest.raises(StorageError, match="gone") as refused:
            end("w1")
        assert "lvrename" in refused.value.cure and "w1-aside" in names(thin)


def test_nothing_is_discarded_while_its_group_is_away(tmp_path: Path) -> None:
    with storage(400, pool_mb=300) as made, harness_on(made, thin=True) as harness:
        volume = harness.volume()
        Path(top(volume), "file").write_text("x")
        command = Command(tmp_path / "etc")
        set_id = command.json("take", top(volume))["set_id"]
        assert command.json("restore", set_id, "--in-place", "--yes")["way"] == "swap"
        mounts.unmount(top(volume))
        lvm("vgchange", "-qq", "-an", made.vg)
        backing = lvm("losetup", "--noheadings", "--output", "BACK-FILE", made.disk).strip()
        lvm("losetup", "--detach", made.disk)
        try:
            error = command.error("restore", "--discard", top(volume), "--yes", exit_code=3)
            assert volume.id in error["line"]
        finally:
            lvm("losetup", made.disk, backing)
            lvm("udevadm", "settle", check=False)
            lvm("vgchange", "-qq", "-ay", made.vg)
            harness.mount_all()
        assert any(name.endswith("-aside") for name in names(harness))
        assert command.json("restore", "--discard", top(volume), "--yes")["outcome"] == "discarded"
        assert not any(name.endswith("-aside") for name in names(harness))


@pytest.mark.parametrize("then", ["taken back", "committed"])
def test_what_was_swapped_in_and_renamed_since_is_somebodys(thin: LvmHarness, then: str) -> None:
    volume = filled(thin)
    content, birth = describe(top(volume)), taken(thin, volume)
    (found,) = thin.provider().snapshots(birth.set_id)
    ruin(top(volume))
    ruined = describe(top(volume))
    thin.provider().swap("w1", found, volume)
    mounts.unmount(top(volume))
    lvm("lvrename", "-qq", volume.id, "theirs")
    (thin.provider().swap_back if then == "taken back" else thin.provider().swap_commit)("w1")
    mounts.unmount(top(volume))
    lvm("mount", f"/dev/{thin.storage.vg}/theirs", top(volume))
    assert describe(top(volume)) == content and not list(thin.provider().swaps())
    assert thin.storage.ours() == [f"{birth.set_id}-0"] and "w1-aside" not in names(thin)
    if then == "taken back":
        mounts.unmount(top(volume))
        lvm("mount", f"/dev/{volume.id}", top(volume))
        assert describe(top(volume)) == ruined


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_power_cut_inside_a_swap_leaves_no_two_of_one_uuid(
    thin: LvmHarness, monkeypatch: pytest.MonkeyPatch, way: str, full: bool
) -> None:
    """After each of its commands: what boot activates then is the old, the new or neither. And it can be undone."""
    volume = filled(thin)
    birth = taken(thin, volume)
    (found,) = thin.provider().snapshots(birth.set_id)
    content = describe(top(volume))
    ruin(top(volume))
    ruined, before = describe(top(volume)), names(thin)
    uuid = lvm("blkid", "-p", "-o", "value", "-s", "UUID", f"/dev/{volume.id}").strip()
    real = Group.lvm
    calls = 0

    def counted(group: Group, *argv: str, **how: Any) -> None:
        nonlocal calls
        real(group, *argv, **how)
        calls += 1
        if calls == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Group, "lvm", counted)
    for point in range(1, 8) if full else random.sample(range(1, 8), 3):
        deadly = 0
        if way == "back":
            thin.provider().swap("w1", found, volume)
        calls, deadly = 0, point
        with thin.unmounted([volume.id]):
            plain = LvmProvider(Settings("/nowhere"))
            in_a_run_that_dies(lambda: plain.swap("w1", found, volume) if way == "there" else plain.swap_back("w1"))
            deadly = 0
            assert list(plain.swaps()) == ([] if (way, point) == ("back", 7) else ["w1"]), point
            lvm("vgchange", "-qq", "-an", thin.storage.vg)
            lvm("vgchange", "-qq", "-aay", thin.storage.vg)
            lvm("udevadm", "settle")
            active = [row["lv_name"] for row in thin.storage.lvs("lv_name,lv_attr") if row["lv_attr"][4] == "a"]
            active = [name for name in active if lvm("blkid", "-p", f"/dev/{thin.storage.vg}/{name}", check=False)]
            assert active in ([], [volume.id.partition("/")[2]]), (point, active)
            if active:
                lvm("mount", f"UUID={uuid}", top(volume))
                assert describe(top(volume)) in (ruined, content), point
                mounts.unmount(top(volume))
        thin.provider().swap_back("w1")
        with thin.unmounted([volume.id]):  # before there was a swap at all, nothing activated it
            lvm("lvchange", "-qq", "-ay", volume.id)
        assert describe(top(volume)) == ruined and names(thin) == before, point


@pytest.mark.parametrize("then", ["undone", "kept by another name", "asked for again"])
def test_a_commit_that_was_cut(thin: LvmHarness, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    """Killed with the set-aside marked to go, and still there."""
    volume = filled(thin)
    birth = taken(thin, volume)
    content = describe(top(volume))
    (found,) = thin.provider().snapshots(birth.set_id)
    ruin(top(volume))
    ruined = describe(top(volume))
    thin.provider().swap("w1", found, volume)

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Group, "remove", die)
        in_a_run_that_dies(lambda: thin.provider().swap_commit("w1"))
    assert "w1-aside" in names(thin) and list(thin.provider().swaps()) == ["w1"]
    assert thin.provider().reap() == [], "an open swap is somebody's to end"
    if then == "undone":
        thin.provider().swap_back("w1")
        assert describe(top(volume)) == ruined
        assert thin.provider().reap() == [] and describe(top(volume)) == ruined
        assert not list(thin.provider().swaps())
    elif then == "kept by another name":
        lvm("lvrename", "-qq", thin.storage.vg, "w1-aside", "saved")
        thin.provider().reap()
        thin.provider().swap_commit("w1")
        thin.provider().reap()
        assert "saved" in names(thin) and describe(top(volume)) == content
    else:
        thin.provider().swap_commit("w1")
        assert "w1-aside" not in names(thin) and describe(top(volume)) == content
    assert not [device for device in block.mapped() if device.suspended]
