"""What an adversary found in the copy provider: damaged images, clones of dead runs, stores that are away, lie in the
data, lost directories or can't be written."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from providers.copy import CopyProvider
from snapshotter.core.errors import JudgedBadError, PreconditionError, StorageError
from snapshotter.core.model import Access, Birth, Hold, Progress, Purpose, Tree, new_attachment_id, utc_now
from snapshotter.host import mounts
from snapshotter.provider import Settings
from snapshotter.testing.harness import describe, fill, make_birth
from tests.support import loop_file_system
from tests.unit.copy_kit import Place, place_on, reachable, settle

__all__ = ["reachable"]  # a fixture


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    fill(str(made.data))
    os.symlink("database", made.data / "link")
    return made


# -- images that aren't whole ----------------------------------------------------------------------------------------


def remove_file(tree: Path) -> str:
    (tree / "database/000012.sst").unlink()
    return "'database/000012.sst' is gone"


def empty_file(tree: Path) -> str:
    os.truncate(tree / "database/CURRENT", 0)
    return "'database/CURRENT' has 0 bytes"


def turn_link(tree: Path) -> str:
    (tree / "link").unlink()
    os.symlink("/etc", tree / "link")
    return "'link' leads elsewhere"


def add_file(tree: Path) -> str:
    (tree / "new").touch()
    return "'new' was put into it"


def other_kind(tree: Path) -> str:
    (tree / "key").unlink()
    (tree / "key").mkdir()
    return "'key' is of another kind"


def lose_directory(tree: Path) -> str:
    shutil.rmtree(tree / "database")
    return "'database"


@pytest.mark.parametrize("damage", [remove_file, empty_file, turn_link, add_file, other_kind, lose_directory])
@pytest.mark.parametrize("access", [Access.WRITABLE, pytest.param(Access.READ_ONLY, marks=pytest.mark.root)])
def test_a_gutted_image_is_never_restored(place: Place, damage: Callable[[Path], str], access: Access) -> None:
    birth = place.take()
    said = damage(place.image(birth))
    before = place.kept()
    with pytest.raises(JudgedBadError) as bad:
        place.provider().attach(place.snapshot(birth), new_attachment_id(utc_now()), access, str(place.top / "clone"))
    assert said in bad.value.line() and birth.set_id in bad.value.line() and bad.value.cure
    assert not (place.top / "clone").exists() and place.kept() == before


# -- clones of dead runs ---------------------------------------------------------------------------------------------


def killed_clone(place: Place, birth: Birth, attachment_id: str, after: int) -> None:
    """A run that is killed while it copies the clone out, when so many bytes are written."""
    snapshot = place.snapshot(birth)
    child = os.fork()
    if child == 0:
        try:

            def report(progress: Progress) -> None:
                if progress.done >= after:
                    os.kill(os.getpid(), signal.SIGKILL)

            provider = CopyProvider(
                Settings(str(place.top / "state"), options={"store": str(place.store)}, report=report)
            )
            provider.attach(snapshot, attachment_id, Access.WRITABLE, str(place.top / "live"))
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("there_before", [True, False])
def test_what_a_person_did_after_the_kill_stays(place: Place, there_before: bool) -> None:
    for number in range(20):
        (place.data / f"{number}.sst").write_bytes(os.urandom(100_000))
    birth, live, attachment_id = place.take(), place.top / "live", new_attachment_id(utc_now())
    if there_before:
        live.mkdir()
    killed_clone(place, birth, attachment_id, 1_000_000)
    assert len(list(live.iterdir())) > 8
    for each in live.iterdir():
        shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
    (live / "precious").write_bytes(b"years of work")
    (live / "key").write_bytes(b"a key of theirs, at a path of the image")
    place.provider().detach(attachment_id)
    assert sorted(os.listdir(live)) == ["key", "precious"]
    assert (live / "precious").read_bytes() == b"years of work" and not list(place.provider().attachments())


@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize("after", [1, 500_000, 1_200_000])
def test_what_the_copy_made_goes_and_nothing_else(place: Place, there_before: bool, after: int) -> None:
    for number in range(20):
        (place.data / f"{number}.sst").write_bytes(os.urandom(100_000))
    birth, live, attachment_id = place.take(), place.top / "live", new_attachment_id(utc_now())
    if there_before:
        live.mkdir()
    killed_clone(place, birth, attachment_id, after)
    time.sleep(2.5)  # the person comes later than the copy's last sign of life
    put_back = sorted(set(os.listdir(place.data)) - set(os.listdir(live)))[:1]
    for name in put_back:  # the same file from another backup: size and time are the image's
        subprocess.run(["cp", "-a", str(place.data / name), str(live / name)], check=True)
    (live / "of a person").mkdir()
    provider = place.provider()
    provider.detach(attachment_id)
    assert sorted(os.listdir(live)) == sorted(["of a person", *put_back])
    assert any(str(live) in note for note in provider.notes)
    shutil.rmtree(live)


def test_a_dead_runs_clone_goes_whole_if_nobody_came(place: Place) -> None:
    (place.data / "large").write_bytes(os.urandom(20 << 20))
    birth, attachment_id = place.take(), new_attachment_id(utc_now())
    killed_clone(place, birth, attachment_id, 8 << 20)
    provider = place.provider()
    provider.detach(attachment_id)
    assert not (place.top / "live").exists() and not provider.notes


@pytest.mark.parametrize("purpose", list(Purpose))
def test_a_run_that_died_after_the_copy(place: Place, purpose: Purpose) -> None:
    """Of a restore a person's file stays. Nobody but us works in a clone that was made to verify it."""
    birth, attachment_id, live = place.take(), new_attachment_id(utc_now()), place.top / "live"
    for theirs in (False, True):
        child = os.fork()
        if child == 0:
            try:
                place.provider().attach(place.snapshot(birth), attachment_id, Access.WRITABLE, str(live), purpose)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        (found,) = place.provider().attachments()
        assert not found.held and found.since is None and describe(str(live)) == describe(str(place.data))
        if theirs:
            (live / "database/theirs").write_bytes(b"theirs")
        place.provider().detach(attachment_id)
        if theirs and purpose is Purpose.RESTORE:
            assert os.listdir(live) == ["database"] and os.listdir(live / "database") == ["theirs"]
        else:
            assert not live.exists()


def test_a_failed_restore_takes_back_what_it_changed_itself(place: Place) -> None:
    """The same run undoes it: what it wrote after the copy (re-pointed links and configs) goes too."""
    attachment_id, clone = place.clone(place.take())
    (clone / "key").write_bytes(b"re-pointed, and longer than before" * 9)
    place.provider().detach(attachment_id)
    assert not clone.exists()


def test_a_finished_clone_goes_with_what_is_in_it(place: Place) -> None:
    birth = place.take()
    attachment_id, clone = place.clone(birth)
    place.provider().settle(attachment_id, datetime.now(UTC))
    (clone / "work").write_bytes(b"release has asked")
    place.provider().detach(attachment_id)
    assert not clone.exists()


# -- stores ----------------------------------------------------------------------------------------------------------


def test_a_store_without_its_empty_directories_works(place: Place) -> None:
    birth = place.take()
    for name in ("attachments", "trash"):
        os.rmdir(place.store / name)
    assert not list(place.provider().attachments()) and place.snapshot(birth)
    assert place.provider().reap() == []
    attachment_id, clone = place.clone(birth)
    place.provider().detach(attachment_id)
    assert not clone.exists()
    place.provider().delete(birth.set_id)
    assert not place.kept()
    for name in ("attachments", "trash", "sets"):
        os.rmdir(place.store / name)
    assert not list(place.provider().snapshots())
    place.take()


def test_a_store_that_fails_is_told_in_words(place: Place) -> None:
    place.take()
    shutil.rmtree(place.store / "attachments")
    (place.store / "attachments").write_bytes(b"a file")
    with pytest.raises(StorageError):
        list(place.provider().attachments())


@pytest.mark.root
def test_a_store_whose_disk_is_away_is_missed_and_never_made_anew(tmp_path: Path) -> None:
    place = Place(tmp_path)
    fill(str(place.data))
    with loop_file_system("ext4", tmp_path, 64) as disk:
        place.store = disk / "store"
        birth = place.take()
        device = mounts.mount_of(str(disk)).source
        subprocess.run(["umount", str(disk)], check=True)
        try:
            for provider in (place.provider(), CopyProvider(Settings(str(tmp_path / "state")))):
                with pytest.raises(StorageError) as away:
                    list(provider.snapshots())
                assert str(place.store) in away.value.line() and "mount" in away.value.cure
                assert not list(provider.snapshots(birth.set_id))
            new = make_birth([place.volume()])
            for act in (
                lambda: place.provider().check([place.volume()], new),
                lambda: place.provider().prepare([place.volume()], new, 30.0),
            ):
                with pytest.raises(PreconditionError) as refused:
                    act()
                assert "was a store before" in refused.value.line() and "copy-stores" in refused.value.cure
            assert os.listdir(disk) == []
            other = CopyProvider(Settings(str(tmp_path / "state"), options={"store": str(tmp_path / "other")}))
            beside = make_birth([place.volume()])
            other.create([place.volume()], beside, Hold())
            seen = []
            with pytest.raises(StorageError):
                for each in CopyProvider(Settings(str(tmp_path / "state"))).snapshots():
                    seen.append(each.birth)
            assert seen == [beside], "all that is there is listed first"
        finally:
            subprocess.run(["mount", device, str(disk)], check=True)
        assert place.snapshot(birth) and {
            each.birth for each in CopyProvider(Settings(str(tmp_path / "state"))).snapshots()
        } == {birth, beside}
        shutil.rmtree(place.store)
        assert not list(place.provider().snapshots()), "removed on purpose: forgotten"


def test_a_store_below_the_data_is_no_data(place: Place) -> None:
    inner = Place(place.data / "sub")
    fill(str(inner.data), "two")
    nested = CopyProvider(Settings(str(place.top / "state")))
    first = make_birth([inner.volume()])
    nested.create([inner.volume()], first, Hold())  # its default store lies in place.data
    assert (place.data / "sub/.snapshotter/sets").is_dir()
    provider, volume = place.provider(), place.volume()
    birth = make_birth([volume])
    provider.check([volume], birth)
    provider.prepare([volume], birth, 30.0)
    provider.create([volume], birth, Hold())
    assert not (place.image(birth) / "sub/.snapshotter").exists() and (place.image(birth) / "sub/data/key").exists()
    assert any("sub/.snapshotter" in note for note in provider.notes)
    place.clone(birth)
    # One that a person copied along into an image, or that an older version left there, is no store either.
    shutil.copytree(place.data / "sub/.snapshotter", place.image(birth) / "sub/.snapshotter")
    as_path = CopyProvider(Settings(str(place.top / "x"), paths=(str(place.image(birth) / "sub/data"),)))
    assert not list(as_path.snapshots())
    assert len(list(nested.snapshots())) == 2


def test_no_clone_into_any_store(place: Place) -> None:
    birth = place.take()
    other = Place(place.top / "elsewhere")
    fill(str(other.data))
    other.take()
    for where in (other.store / "clone", other.store / "sets/x", place.store / "sets" / birth.set_id / "clone"):
        with pytest.raises(PreconditionError) as refused:
            place.provider().attach(place.snapshot(birth), new_attachment_id(utc_now()), Access.WRITABLE, str(where))
        assert "inside the store" in refused.value.line() and not where.exists()
    with pytest.raises(PreconditionError, match="inside the store"):
        inner = place.provider(store=str(other.store / "store"))
        inner.check([place.volume()], make_birth([place.volume()]))


@pytest.mark.root
def test_somebody_elses_marker_closes_nothing(reachable: Path) -> None:
    """In /tmp anybody may put one: then root could restore nothing there."""
    place = Place(reachable)
    fill(str(place.data))
    (reachable / "snapshotter.store").write_text('{"schema":1}')
    os.chown(reachable / "snapshotter.store", 65534, 65534)
    _, clone = place.clone(place.take())
    assert (clone / "key").exists()


@pytest.mark.root
def test_a_read_only_disk_says_what_to_do(tmp_path: Path) -> None:
    place = Place(tmp_path)
    fill(str(place.data))
    with loop_file_system("ext4", tmp_path, 64) as disk:
        place.store = disk / "store"
        birth = place.take()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for access in Access:
            with pytest.raises(StorageError) as refused:
                place.provider().attach(
                    place.snapshot(birth), new_attachment_id(utc_now()), access, str(tmp_path / "clone")
                )
            assert "read-only" in refused.value.line() and f"cp -a {place.image(birth)}" in refused.value.cure
        assert not (tmp_path / "clone").exists()


def test_a_damaged_record_is_noted(place: Place) -> None:
    good, bad = place.take(), place.take()
    (place.store / "sets" / bad.set_id / "birth.json").write_bytes(b"\xff")
    provider = place.provider()
    assert [each.birth for each in provider.snapshots()] == [good]
    assert len(provider.notes) == 1 and bad.set_id in provider.notes[0]
    assert provider.reap() == [] and place.image(bad).is_dir()


# -- clones ----------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("there_before", [True, False])
def test_a_private_place_stays_private(reachable: Path, there_before: bool) -> None:
    os.mkdir(reachable / "private", 0o700)
    place = Place(reachable / "private")
    (place.data / "key").write_bytes(b"secret")
    for each, mode in ((place.data / "key", 0o644), (place.data, 0o755)):
        os.chmod(each, mode)
    where = reachable / "clone"
    if there_before:
        where.mkdir(mode=0o755)
    birth, provider = place.take(), place.provider()
    provider.attach(place.snapshot(birth), new_attachment_id(utc_now()), Access.WRITABLE, str(where))
    assert stat.S_IMODE(where.stat().st_mode) == 0o700 and any("closed" in note for note in provider.notes)
    reader = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", str(where / "key")], capture_output=True
    )
    assert reader.returncode != 0
    _, beside = place.clone(birth)
    assert describe(str(beside)) == describe(str(place.data)), "where it is as private as the origin nothing changes"
    viewing = place.provider()
    viewing.attach(place.snapshot(birth), new_attachment_id(utc_now()), Access.READ_ONLY, str(reachable / "view"))
    assert any("others can read" in note for note in viewing.notes)


@pytest.mark.root
def test_a_fresh_file_system_is_an_empty_destination(place: Place, tmp_path: Path) -> None:
    (place.data / "lost+found").mkdir()  # the image of a mount point has one too
    birth, attachment_id = place.take(), new_attachment_id(utc_now())
    with loop_file_system("ext4", tmp_path, 64) as disk:
        made = place.provider().attach(place.snapshot(birth), attachment_id, Access.WRITABLE, str(disk))
        assert made == Tree(str(disk)) and (disk / "key").exists()
        place.provider().settle(attachment_id, datetime.now(UTC))
        place.provider().detach(attachment_id)
        assert os.listdir(disk) == ["lost+found"]


@pytest.mark.root
def test_device_nodes_are_kept_in_the_image_and_left_out_of_clones(place: Place) -> None:
    os.mknod(place.data / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    os.mknod(place.data / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    birth, provider = place.take(), place.provider()
    assert stat.S_ISBLK(os.lstat(place.image(birth) / "disk").st_mode)
    where, attachment_id = place.top / "clone", new_attachment_id(utc_now())
    provider.attach(place.snapshot(birth), attachment_id, Access.WRITABLE, str(where))
    assert not os.path.lexists(where / "disk") and not os.path.lexists(where / "null") and (where / "key").exists()
    assert sum("device node" in note for note in provider.notes) == 2
    provider.detach(attachment_id)
    assert not where.exists()


@pytest.mark.root
def test_a_clone_that_cannot_fit_is_refused_before_it_fills_the_disk(place: Place, tmp_path: Path) -> None:
    (place.data / "large").write_bytes(os.urandom(100 << 20))
    settle()
    birth = place.take()
    with place_on("ext4", tmp_path, 64) as small:
        attachment_id, where = new_attachment_id(utc_now()), small.top / "clone"
        with pytest.raises(StorageError, match="needs"):
            place.provider().attach(place.snapshot(birth), attachment_id, Access.WRITABLE, str(where))
        place.provider().detach(attachment_id)
        assert not where.exists()
