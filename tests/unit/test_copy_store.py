"""The copy provider's store: where it may be, how it is found again, and what damage in it hides."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from providers.copy import CopyProvider
from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError, StorageError
from snapshotter.core.model import Access, Hold, ImageState, Purpose, Volume, new_attachment_id, new_set_id, utc_now
from snapshotter.host import mounts
from snapshotter.host.store import KnownStores
from snapshotter.provider import Settings
from snapshotter.testing.harness import describe, fill, make_birth
from tests.support import Command, loop_file_system
from tests.unit.copy_kit import SEAL, Place, reachable

__all__ = ["reachable"]  # a fixture


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    fill(str(made.data))
    return made


def refusal(provider: CopyProvider, volume: Volume, *more: Volume) -> PreconditionError:
    """check, prepare and create all refuse, in the same words, with a cure."""
    volumes = [volume, *more]
    birth = make_birth(volumes)
    said = []
    for step in (
        lambda: provider.check(volumes, birth),
        lambda: provider.prepare(volumes, birth, 30.0),
        lambda: provider.create(volumes, birth, Hold()),
    ):
        with pytest.raises(PreconditionError) as refused:
            step()
        said.append(refused.value)
    assert len({error.line() for error in said}) == 1 and said[0].cure
    return said[0]


# -- where ----------------------------------------------------------------------------------------------------------


def test_never_below_a_disk_that_isnt_mounted(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mount failed at boot: the copies would fill the system's disk, and be hidden by the next boot."""
    fstab = tmp_path / "fstab"
    fstab.write_text(f"UUID=1 {tmp_path}/backup ext4 nofail 0 2\n")
    monkeypatch.setattr("snapshotter.host.mounts.FSTAB", str(fstab))
    (tmp_path / "backup").mkdir()
    error = refusal(place.provider(store=f"{tmp_path}/backup/store"), place.volume())
    assert f"nothing is mounted at {tmp_path}/backup" in error.line() and os.listdir(tmp_path / "backup") == []


def test_by_default_beside_the_data_private_and_found_again(place: Place) -> None:
    provider, volume = place.provider(store=""), place.volume()
    birth = make_birth([volume])
    provider.create([volume], birth, Hold())
    provider.mark(birth.set_id, SEAL)
    store = place.top / ".snapshotter"
    assert os.lstat(store).st_mode & 0o7777 == 0o700
    state = str(place.top / "state")
    for settings in (
        Settings(str(place.top / "other"), paths=(str(place.data),)),  # by the path
        Settings(state),  # by the cache
        Settings(str(place.top / "other"), options={"store": str(store)}),  # by its name
    ):
        assert [each.birth for each in CopyProvider(settings).snapshots()] == [birth]
    assert not list(CopyProvider(Settings(str(place.top / "other"))).snapshots())
    assert not list(CopyProvider(Settings(state, options={"store": str(place.top / "no")})).snapshots())
    shutil.rmtree(store)
    assert not list(CopyProvider(Settings(state)).snapshots())


def test_never_inside_nor_around(place: Place) -> None:
    volume = place.volume()
    assert "lies inside" in refusal(place.provider(store=str(place.data / "store")), volume).line()
    assert "lies inside" in refusal(place.provider(store=str(place.data)), volume).line()
    os.symlink(place.data, place.top / "alias")
    assert "lies inside" in refusal(place.provider(store=str(place.top / "alias/store")), volume).line()
    assert "lies inside" in refusal(place.provider(store=str(place.top)), volume).line()
    second = place.top / "second"
    second.mkdir()
    assert "lies inside" in refusal(place.provider(store=str(second / "s")), volume, place.volume(second)).line()
    assert not place.kept() and sorted(os.listdir(second)) == []


@pytest.mark.root
def test_not_through_a_bind_mount_either(place: Place) -> None:
    seen = place.top / "seen"
    seen.mkdir()
    subprocess.run(["mount", "--bind", str(place.data), str(seen)], check=True)
    try:
        assert "lies inside" in refusal(place.provider(store=str(seen / "store")), place.volume()).line()
    finally:
        subprocess.run(["umount", str(seen)], check=True)


@pytest.mark.root
def test_a_mount_point_needs_a_named_store(tmp_path: Path) -> None:
    with loop_file_system("ext4", tmp_path, 64) as data:
        place = Place(tmp_path / "here")
        volume = place.volume(data)
        error = refusal(place.provider(store=""), volume)
        assert "mount point" in error.line() and "store" in error.cure
        birth = make_birth([volume])
        place.provider().create([volume], birth, Hold())
        assert place.snapshot(birth).state is ImageState.READY


def test_foreign_directories_are_left_alone(place: Place) -> None:
    place.store.mkdir()
    (place.store / "theirs").write_bytes(b"theirs")
    assert "not empty" in refusal(place.provider(), place.volume()).line()
    assert os.listdir(place.store) == ["theirs"]
    assert not list(place.provider().snapshots()) and place.provider().reap() == []
    (place.store / "theirs").unlink()
    place.take()  # an empty one will do


def test_no_directory_no_parent_no_file(place: Place) -> None:
    assert "doesn't exist" in refusal(place.provider(store=str(place.top / "no/store")), place.volume()).line()
    place.store.write_bytes(b"a file")
    refusal(place.provider(), place.volume())


def test_a_newer_store_is_not_touched(place: Place) -> None:
    place.take()
    (place.store / "snapshotter.store").write_text('{"schema":2}')
    assert "update" in refusal(place.provider(), place.volume()).cure
    with pytest.raises(StorageError, match="update snapshotter"):  # nor listed as if it were empty
        list(place.provider().snapshots())


@pytest.mark.root
def test_other_users_stores_and_links_are_not_trusted(place: Place) -> None:
    """Who owns the directory above the data could else make root read, or write, wherever they like."""
    birth = place.take()
    os.chown(place.store, 65534, 65534)
    assert "another user" in refusal(place.provider(), place.volume()).line()
    assert not list(place.provider().snapshots())
    os.chown(place.store, 0, 0)
    assert place.snapshot(birth)
    link = place.top / "link"
    os.symlink(place.store, link)
    assert len(list(place.provider(store=str(link)).snapshots())) == 1, "our own link is fine"
    os.chown(link, 65534, 65534, follow_symlinks=False)
    assert "another user's link" in refusal(place.provider(store=str(link)), place.volume()).line()
    assert not list(place.provider(store=str(link)).snapshots())


@pytest.mark.root
def test_an_unwritable_place_is_refused_with_the_cure(reachable: Path) -> None:
    place = Place(reachable)
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            error = refusal(place.provider(store=""), place.volume())
            os._exit(0 if "isn't writable" in error.line() and "store" in error.cure else 2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.root
def test_nothing_on_tmpfs(tmp_path: Path) -> None:
    point = tmp_path / "tmpfs"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], check=True)
    try:
        assert CopyProvider(Settings(str(tmp_path))).claim(mounts.mount_of(str(point)), str(point)) is None
        place = Place(tmp_path / "here")
        assert "tmpfs" in refusal(place.provider(store=str(point / "store")), place.volume()).line()
    finally:
        subprocess.run(["umount", str(point)], check=True)


# -- listing --------------------------------------------------------------------------------------------------------


def test_damage_in_one_set_hides_no_other_and_is_named(place: Place) -> None:
    good = place.take()
    cases = {
        "marks.json": (b"\xff{garbage", "marks"),
        "image.json": (b"[1]", "image.json"),
        "0/manifest": (b"short", "manifest"),
    }
    for file, (garbage, said) in cases.items():
        birth = place.take()
        (place.store / "sets" / birth.set_id / file).write_bytes(garbage)
        found = place.snapshot(birth)
        assert found.state is ImageState.INVALID and said in found.why
    for gone in ("0/tree", "0/manifest", "image.json"):
        birth = place.take()
        path = place.store / "sets" / birth.set_id / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert place.snapshot(birth).state is ImageState.INVALID and place.snapshot(birth).why
    unlabelled = place.take()
    (place.store / "sets" / unlabelled.set_id / "birth.json").write_bytes(b"{}")
    (place.store / "sets" / new_set_id(utc_now())).mkdir()
    (place.store / "sets/readme").write_bytes(b"?")
    listed = list(place.provider().snapshots())
    assert [each.birth.set_id for each in listed if each.state is ImageState.READY] == [good.set_id]
    assert len(listed) == 7 and unlabelled.set_id not in {each.birth.set_id for each in listed}


def test_order_rises_whatever_the_clock_and_the_counter_say(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    for step in range(5):
        if step == 2:
            (place.store / "order").unlink()
        if step == 3:
            (place.store / "order").write_bytes(b"\0\0torn")
        monkeypatch.setattr(time, "time", lambda step=step: 2_000_000_000 - step * 1000)  # the host's clock falls
        orders.append(place.snapshot(place.take(prepare=False)).order)
    assert orders == sorted(set(orders))


def test_ten_thousand_sets_are_listed_quickly(place: Place, measured: Callable[[str], None]) -> None:
    birth = place.take()
    model = place.store / "sets" / birth.set_id
    texts = {name: (model / name).read_text() for name in ("birth.json", "marks.json", "image.json", "0/manifest")}
    for number in range(9_999):
        set_id = f"s20261122t100630z-{number:06x}"
        directory = place.store / "sets" / set_id
        (directory / "0/tree").mkdir(parents=True)
        for name, text in texts.items():
            (directory / name).write_text(text.replace(birth.set_id, set_id))
    took = []
    for _ in range(3):
        began = time.perf_counter()
        assert sum(each.state is ImageState.READY for each in place.provider().snapshots()) == 10_000
        took.append(time.perf_counter() - began)
    measured(f"copy's part of listing 10,000 sets: {min(took):.2f} s")
    assert min(took) < 3, "generous: 0.8 s is the bar"
    tracemalloc.start()
    for _ in place.provider().snapshots():
        pass
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_what_is_no_id_never_becomes_a_path(place: Place) -> None:
    place.take()
    provider = place.provider()
    for name in ("../..", "sets", "s20261122t100630z-5f3a9c/../x", ""):
        assert not list(provider.snapshots(name))
        for act in (lambda name=name: provider.mark(name, {"pinned": "1"}), lambda name=name: provider.delete(name)):
            with pytest.raises(NotFoundError):
                act()
        with pytest.raises(ValueError):
            provider.detach(name)
    assert len(list(provider.snapshots())) == 1


# -- delete and mark ------------------------------------------------------------------------------------------------


def test_delete_says_what_it_could_not_remove_and_reap_finishes(place: Place) -> None:
    if os.geteuid() != 0 or subprocess.run(["which", "chattr"], capture_output=True).returncode:
        pytest.skip("needs root and chattr, to make a file that can't be removed")
    birth = place.take()
    stuck = place.image(birth) / "key"
    subprocess.run(["chattr", "+i", str(stuck)], check=True)
    try:
        with pytest.raises(StorageError) as refused:
            place.provider().delete(birth.set_id)
        assert "key" in refused.value.line() and "lsattr" in refused.value.cure
        assert not list(place.provider().snapshots()), "never half-deleted and listed"
    finally:
        (left,) = (place.store / "trash").iterdir()
        subprocess.run(["chattr", "-i", str(left / "0/tree/key")], check=True)
    assert len(place.provider().reap()) == 1
    assert not place.kept()


def test_only_a_whole_image_is_sealed(place: Place) -> None:
    birth = place.take(seal=False)
    shutil.rmtree(place.image(birth))
    with pytest.raises(StorageError, match="can't be sealed"):
        place.provider().mark(birth.set_id, SEAL)
    place.provider().mark(birth.set_id, {"pinned": "1"})
    assert dict(place.snapshot(birth).marks) == {"pinned": "1"}


def test_marks_of_two_processes_at_once_are_both_kept(place: Place) -> None:
    birth = place.take()
    names = ["pinned", "height", "block", "verify-level", "verify-at", "secrets"]
    children = []
    for name in names:
        child = os.fork()
        if child == 0:
            try:
                for number in range(20):
                    place.provider().mark(birth.set_id, {name: str(number)})
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(names)
    assert {name: place.snapshot(birth).marks[name] for name in names} == dict.fromkeys(names, "19")


# -- attachments ----------------------------------------------------------------------------------------------------


def test_a_busy_set_names_where_it_is_attached(place: Place) -> None:
    birth = place.take()
    attachment_id, clone = place.clone(birth)
    with pytest.raises(BusyError) as busy:
        place.provider().delete(birth.set_id)
    assert busy.value.cure == f"snapshotter release {clone}"
    place.provider().detach(attachment_id)
    place.provider().delete(birth.set_id)
    assert not place.kept()


def test_detach_knows_its_directory_though_the_inode_is_given_out_again(place: Place) -> None:
    """ext4 gives a new directory the number of the one just removed; who made it there matters more."""
    birth = place.take()
    for _ in range(5):
        attachment_id, clone = place.clone(birth)
        shutil.rmtree(clone)
        clone.mkdir()
        (clone / "a person's").write_bytes(b"work")
        place.provider().detach(attachment_id)
        assert (clone / "a person's").read_bytes() == b"work"
        shutil.rmtree(clone)
    assert not list(place.provider().attachments())


def test_a_directory_that_was_there_is_emptied_and_stays(place: Place) -> None:
    birth = place.take()
    (place.top / "clone").mkdir()
    attachment_id, clone = place.clone(birth)
    place.provider().detach(attachment_id)
    assert clone.is_dir() and not os.listdir(clone)


def test_a_link_in_the_clones_place_is_not_followed(place: Place) -> None:
    birth = place.take()
    attachment_id, clone = place.clone(birth)
    os.rename(clone, place.top / "moved")
    os.symlink(place.data, clone)
    before = describe(str(place.data))
    place.provider().detach(attachment_id)
    assert describe(str(place.data)) == before and clone.is_symlink()


def test_members_inside_each_other_go_together(place: Place) -> None:
    nested = place.top / "nested"
    fill(str(nested), "two")
    (place.data / "wal").mkdir()
    volumes = [place.volume(), place.volume(nested)]
    birth = make_birth(volumes)
    provider = place.provider()
    provider.create(volumes, birth, Hold())
    attachment_id, where = new_attachment_id(utc_now()), place.top / "clone"
    first, second = place.provider().snapshots(birth.set_id)
    provider.attach(first, attachment_id, Access.WRITABLE, str(where))
    provider.attach(second, attachment_id, Access.WRITABLE, str(where / "wal"))
    assert (where / "wal/key").read_bytes() == (nested / "key").read_bytes()
    place.provider().detach(attachment_id)
    assert not where.exists() and not list(place.provider().attachments())


@pytest.mark.root
def test_detach_never_reaches_into_a_mount(place: Place) -> None:
    birth = place.take()
    attachment_id, clone = place.clone(birth)
    (clone / "point").mkdir()
    subprocess.run(["mount", "--bind", str(place.data), str(clone / "point")], check=True)
    try:
        with pytest.raises(BusyError) as busy:
            place.provider().detach(attachment_id)
        assert "umount" in busy.value.cure and (place.data / "key").exists()
    finally:
        subprocess.run(["umount", str(clone / "point")], check=True)
    place.provider().detach(attachment_id)
    assert not clone.exists()


def test_destinations_that_are_refused(place: Place) -> None:
    birth = place.take()
    (place.top / "file").write_bytes(b"x")
    for where in (place.store / "x", place.top, place.top / "no/clone", place.top / "file", place.data):
        before = place.kept()
        with pytest.raises(PreconditionError) as refused:
            place.provider().attach(
                place.snapshot(birth), new_attachment_id(utc_now()), Access.WRITABLE, str(where), Purpose.VERIFY
            )
        assert refused.value.cure
        assert place.kept() == before


def test_damaged_records_hide_no_others(place: Place) -> None:
    birth = place.take()
    attachment_id, _ = place.clone(birth)
    for name, text in (
        (f"{new_attachment_id(utc_now())}.0.json", "garbage"),
        ("readme", "?"),
        (f"{new_attachment_id(utc_now())}.1.json", json.dumps({"schema": 1, "id": attachment_id})),
    ):
        (place.store / "attachments" / name).write_text(text)
    provider = place.provider()
    assert [each.id for each in provider.attachments()] == [attachment_id]
    assert len(provider.notes) == 1 and "damaged" in provider.notes[0]
    other = place.take()
    with pytest.raises(BusyError, match="look at it"):
        provider.delete(other.set_id)  # it may be this one's
    unsealed = place.take(seal=False)
    provider.delete(unsealed.set_id)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema": 2, "marks": {"sealed": "20261122t100630z"}}', '{"schema": 1, "marks": 3}']
)
def test_marks_that_cannot_be_read_are_kept(place: Place, content: str) -> None:
    """It may have been sealed, and pinned: for `reap` it is no leftover, and no other mark is written over these."""
    birth = place.take()
    marks = place.store / "sets" / birth.set_id / "marks.json"
    marks.write_text(content)
    found = place.snapshot(birth)
    assert not found.marks_known and found.state is ImageState.INVALID
    with pytest.raises(StorageError):
        place.provider().mark(birth.set_id, {"pinned": "1"})
    assert marks.read_text() == content


# -- the stores that are known --------------------------------------------------------------------------------------


def test_stores_noted_at_once_are_all_known(tmp_path: Path) -> None:
    """A store that isn't known any more has sets that no `list` shows."""
    file = str(tmp_path / "state" / "copy-stores")
    children = []
    for number in range(8):
        if (child := os.fork()) == 0:
            os._exit(any(KnownStores(file).add(f"/stores/{number}/{each}") for each in range(4)))
        children.append(child)
    assert not any(os.waitpid(child, 0)[1] for child in children)
    assert set(KnownStores(file).read()) == {f"/stores/{number}/{each}" for number in range(8) for each in range(4)}


def test_a_store_of_any_name_is_found_again(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"a\nb\tc\\134 \xff")
    odd.mkdir()
    place = Place(odd)
    fill(str(place.data))
    birth = place.take()
    assert list(KnownStores(str(odd / "state" / "copy-stores")).read()) == [str(place.store)]
    other = CopyProvider(Settings(str(odd / "state")))
    assert [each.birth.set_id for each in other.snapshots()] == [birth.set_id]


def test_a_store_that_cannot_be_noted_is_said(place: Place) -> None:
    (place.top / "state").write_text("in the way")
    provider, volume = place.provider(), place.volume()
    birth = make_birth([volume])
    provider.create([volume], birth, Hold())
    assert "can't be noted" in provider.notes[0] and str(place.store) in provider.notes[0]


def test_a_copied_stores_records_speak_of_no_clone_of_this_one(tmp_path: Path) -> None:
    """The store was copied while a restore went on; after a drill from that copy nothing reaps the clone."""
    data, clone, drill = tmp_path / "data", tmp_path / "clone", tmp_path / "drill"
    data.mkdir()
    (data / "file").write_text("x")
    command = Command(tmp_path / "etc")
    set_id = command.json("take", str(data))["set_id"]
    attachment = command.json("restore", set_id, "--to", str(clone))["attachment_id"]
    archive = tmp_path / "archive"
    shutil.copytree(tmp_path / ".snapshotter", archive, symlinks=True)
    (record,) = (archive / "attachments").glob(f"{attachment}.*.json")
    record.write_text(re.sub(r'"since": ?"[^"]*"', '"since":null', record.read_text()))
    (clone / "work").write_text("a person's")
    store = ("-o", f"store={archive}")
    command.json("restore", set_id, "--to", str(drill), *store)
    command.json("reap")
    assert (clone / "work").exists() and drill.exists()
    command.json("release", str(drill))
    command.json("reap")
    assert (clone / "work").exists() and not drill.exists()
