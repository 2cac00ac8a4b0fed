"""What ZFS refuses is told as it is, with the object and a cure, whichever way it was asked: by the command, by
OpenZFS's libzfs_core, and with PyPI's there, whose own errors are none. Nothing is made or removed then."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.model import Access, Hold, Volume, new_attachment_id, utc_now
from snapshotter.testing.harness import make_birth
from tests.lab import zfs_kit
from tests.lab.zfs_kit import ZfsHarness, run, zfs
from tests.support import NOBODY

pytestmark = [pytest.mark.root, pytest.mark.zfs, pytest.mark.skipif(bool(zfs_kit.here()), reason=zfs_kit.here())]


@pytest.fixture(scope="module", params=list(zfs_kit.BUILDS))
def pool(request: pytest.FixtureRequest) -> Iterator[str]:
    with zfs_kit.build(request.param), zfs_kit.pool(256) as name:
        yield name


#: What doesn't depend on how it is asked is asked in one way, but in a full run.
ONCE = list(zfs_kit.BUILDS) if "--full" in sys.argv else ["command"]


@pytest.fixture
def harness(pool: str) -> Iterator[ZfsHarness]:
    with zfs_kit.zfs_harness(pool) as harness:
        yield harness


def take(*volumes: Volume) -> str:
    birth = make_birth(volumes)
    zfs_kit.provider().create(volumes, birth, Hold())
    return birth.set_id


def refused(kind: type[SnapshotterError], act: Callable[[], object], *words: str) -> str:
    """One line that has these words, and a cure."""
    with pytest.raises(SnapshotterError) as caught:
        act()
    line = caught.value.line()
    assert isinstance(caught.value, kind), line
    for word in words:
        assert word in line
    assert caught.value.cure, line
    return line


def as_nobody(act: Callable[[], object]) -> tuple[str, str]:
    """('ok', '') or (the error's class, its line), of a child that is another user."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer = ("bug", "")
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            act()
            answer = ("ok", "")
        except SnapshotterError as error:
            answer = (type(error).__name__, error.line())
        except BaseException as error:
            answer = ("bug", repr(error))
        finally:
            os.write(writing, pickle.dumps(answer))
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    return answer


def test_a_dataset_that_is_gone(harness: ZfsHarness) -> None:
    volume = harness.volume()
    gone = harness.gone(volume)
    before = harness.objects()
    refused(PreconditionError, lambda: zfs_kit.provider().check([gone], make_birth([gone])), gone.id, "no such dataset")
    refused(StorageError, lambda: take(gone), gone.id, "no such dataset")
    refused(StorageError, lambda: take(volume, gone), "no such dataset")
    assert harness.objects() == before


def test_a_clone_below_a_read_only_dataset_is_writable(harness: ZfsHarness) -> None:
    """As on a host that keeps backups. mount(8) tells mount.zfs `rw`, which goes before what is inherited."""
    volume = harness.volume()
    Path(volume.path or "", "file").write_text("content")
    set_id = take(volume)
    zfs("set", "readonly=on", harness.top)
    (found,) = zfs_kit.provider().snapshots(set_id)
    attachment_id, place = new_attachment_id(utc_now()), str(harness.scratch / "clone")
    made = zfs_kit.provider().attach(found, attachment_id, Access.WRITABLE, place)
    where = Path(harness.enter(made, place))
    (where / "file").write_text("changed")
    harness.leave(place)
    zfs_kit.provider().detach(attachment_id)
    zfs("inherit", "readonly", harness.top)


def test_what_is_held_or_cloned_by_others_is_busy(harness: ZfsHarness) -> None:
    one, two = harness.volume(), harness.volume()
    set_id = take(one, two)
    zfs("hold", "theirs", f"{two.id}@{set_id}-1")
    before = harness.objects()
    refused(BusyError, lambda: zfs_kit.provider().delete(set_id), set_id, "theirs", "zfs release")
    assert harness.objects() == before, "half of it is gone"
    zfs("release", "theirs", f"{two.id}@{set_id}-1")
    zfs("clone", "-o", "mountpoint=none", f"{two.id}@{set_id}-1", f"{harness.top}/theirs")
    before = harness.objects()
    refused(BusyError, lambda: zfs_kit.provider().delete(set_id), set_id, f"{harness.top}/theirs")
    assert harness.objects() == before, "half of it is gone"
    zfs("destroy", f"{harness.top}/theirs")
    zfs_kit.provider().delete(set_id)
    assert not list(zfs_kit.provider().snapshots())


@pytest.mark.parametrize("pool", ONCE, indirect=True)
def test_a_pinned_set_is_out_of_other_tools_reach(harness: ZfsHarness) -> None:
    volume = harness.volume()
    set_id = take(volume)
    zfs_kit.provider().mark(set_id, {"pinned": "1"})
    theirs = run("zfs", "destroy", f"{volume.id}@{set_id}-0")
    assert theirs.returncode != 0 and list(zfs_kit.provider().snapshots(set_id))
    zfs_kit.provider().mark(set_id, {"pinned": None})
    assert run("zfs", "destroy", f"{volume.id}@{set_id}-0").returncode == 0
    assert not list(zfs_kit.provider().snapshots(set_id))


def test_no_permission_and_delegation(harness: ZfsHarness) -> None:
    volume = harness.volume()
    provider = zfs_kit.provider()
    birth = make_birth([volume])
    before = harness.objects()
    kind, line = as_nobody(lambda: provider.create([volume], birth, Hold()))
    assert kind == "PreconditionError" and volume.id in line and "no permission" in line and "zfs allow" in line, line
    assert harness.objects() == before
    assert f"zfs allow -u {NOBODY} snapshot,destroy,mount,hold,release,userprop {volume.id}" in line
    # The cure that it names is enough for all of a set's life but attaching it: on Linux only root mounts.
    zfs("allow", "-u", str(NOBODY), "snapshot,destroy,mount,hold,release,userprop", volume.id)

    def life() -> None:
        provider.check([volume], birth)
        provider.create([volume], birth, Hold())
        (found,) = provider.snapshots(birth.set_id)
        provider.mark(birth.set_id, {"sealed": "20261122t100630z", "pinned": "1"})
        provider.mark(birth.set_id, {"pinned": None})
        for access in Access:
            with pytest.raises(PreconditionError, match="only root"):
                provider.attach(found, new_attachment_id(utc_now()), access, "/nonexistent")
        provider.delete(birth.set_id)

    assert as_nobody(life) == ("ok", "")
    assert harness.objects() == before
    zfs("set", "snapshot_limit=1", volume.id)
    second = make_birth([volume])
    assert as_nobody(lambda: provider.create([volume], birth, Hold())) == ("ok", "")
    kind, line = as_nobody(lambda: provider.create([volume], second, Hold()))
    assert kind == "StorageError" and volume.id in line and "limit is reached" in line, line


def test_no_space_for_a_snapshot(harness: ZfsHarness) -> None:
    """What is reserved for the origin alone can't also be pinned by a snapshot."""
    volume = harness.volume()
    assert volume.path is not None
    with open(os.path.join(volume.path, "data"), "wb") as file:
        file.write(os.urandom(60 << 20))
    run("zpool", "sync")
    zfs("set", "refreservation=110M", volume.id)
    before = harness.objects()
    refused(StorageError, lambda: take(volume), volume.id, "no space")
    assert harness.objects() == before
    zfs("set", "refreservation=none", volume.id)
    provider = zfs_kit.provider(floor=0.99)
    line = refused(PreconditionError, lambda: provider.check([volume], make_birth([volume])), "99%", "MiB free")
    assert harness.top.partition("/")[0] in line


@pytest.mark.parametrize("pool", ONCE, indirect=True)
def test_a_quota_that_is_reached_stops_no_take(harness: ZfsHarness) -> None:
    """The quota is on what is written; a snapshot writes next to nothing. And a set can be deleted there."""
    volume = harness.volume()
    assert volume.path is not None
    zfs("set", "quota=8M", volume.id)
    with pytest.raises(OSError), open(os.path.join(volume.path, "data"), "wb", buffering=0) as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
    set_id = take(volume)
    assert list(zfs_kit.provider().snapshots(set_id))
    zfs_kit.provider().delete(set_id)


@pytest.mark.parametrize("pool", ONCE, indirect=True)
def test_a_read_only_pool(pool: str, tmp_path: Path) -> None:
    with zfs_kit.pool(128, where=str(tmp_path)) as name:
        zfs("create", f"{name}/d")
        volume = zfs_kit.claimed(next(m.path for m in zfs_kit.table() if m.source == f"{name}/d"))
        set_id = take(volume)
        before = zfs_kit.names(name)
        directory = next(tmp_path.glob("z-*"))
        for words in (["export", name], ["import", "-d", str(directory), "-o", "readonly=on", name]):
            done = run("zpool", *words)
            assert done.returncode == 0, done.stderr
        refused(PreconditionError, lambda: take(volume), volume.id, "read-only")
        refused(PreconditionError, lambda: zfs_kit.provider().delete(set_id), "read-only")
        refused(PreconditionError, lambda: zfs_kit.provider().mark(set_id, {"pinned": "1"}), "read-only")
        (found,) = zfs_kit.provider().snapshots()
        assert found.birth.set_id == set_id
        refused(
            PreconditionError,
            lambda: zfs_kit.provider().attach(found, new_attachment_id(utc_now()), Access.WRITABLE, "/nonexistent"),
            "read-only",
        )
        assert zfs_kit.names(name) == before


@pytest.mark.parametrize("pool", ONCE, indirect=True)
def test_a_suspended_pool(harness: ZfsHarness) -> None:
    """Its devices are gone. What changes it would wait for ever in the kernel: nothing is begun there. Other pools are
    still listed."""
    volume = harness.volume()
    here = take(volume)
    with zfs_kit.losable_pool() as (name, lose):
        zfs("create", f"{name}/d")
        lost = zfs_kit.claimed(next(m.path for m in zfs_kit.table() if m.source == f"{name}/d"))
        set_id = take(lost)
        lose()
        refused(StorageError, lambda: take(lost), "suspended", f"zpool clear {name}")
        refused(StorageError, lambda: zfs_kit.provider().delete(set_id), "suspended")
        refused(StorageError, lambda: zfs_kit.provider().mark(set_id, {"pinned": "1"}), "suspended")
        refused(PreconditionError, lambda: zfs_kit.provider().check([lost], make_birth([lost])), "suspended")
        seen = set()
        try:
            for found in zfs_kit.provider().snapshots():
                seen.add(found.birth.set_id)
        except StorageError as error:
            assert "suspended" in error.line()
        assert here in seen
        again = take(volume)
        zfs_kit.provider().delete(again)
        # What has nothing to do with it goes on, a swap and its way back too; but nobody is told that this is all.
        zfs_kit.provider().swap("w1", next(zfs_kit.provider().snapshots(here)), volume)
        assert [each.id for each in zfs_kit.provider().open_swaps(volume.id)] == ["w1"]
        zfs_kit.provider().swap_back("w1")
        assert not list(zfs_kit.provider().open_swaps(volume.id))
        refused(StorageError, lambda: list(zfs_kit.provider().swaps()), "suspended")
        refused(StorageError, lambda: list(zfs_kit.provider().open_swaps(lost.id)), "suspended")
        birth, provider = make_birth([volume]), zfs_kit.provider()
        provider.prepare([volume], birth, 5.0)
        provider.delete(birth.set_id)
        refused(StorageError, lambda: zfs_kit.provider().delete(birth.set_id), "suspended")
