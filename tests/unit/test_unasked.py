"""One provider that can't be asked, or one leftover that is stuck, keeps the verbs from nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from providers.btrfs import BtrfsProvider
from providers.copy import CopyProvider
from snapshotter.core.errors import NotFoundError, StorageError, UndoIncompleteError
from snapshotter.core.model import (
    Access,
    Attachment,
    Hold,
    MountSpec,
    Purpose,
    Snapshot,
    new_attachment_id,
    new_set_id,
    utc_now,
)
from snapshotter.host import quiesce
from snapshotter.nodes.config import Config, Node
from snapshotter.provider import Settings
from snapshotter.testing.harness import make_birth
from snapshotter.verbs import in_place
from snapshotter.verbs.pin import pin
from snapshotter.verbs.reap import reap
from snapshotter.verbs.release import release
from snapshotter.verbs.restore import restore
from snapshotter.verbs.session import Session
from snapshotter.verbs.take import take, take_node
from snapshotter.verbs.verify import verify
from tests.support import loop_file_system, pull_disk
from tests.unit.btrfs_kit import BtrfsHarness, OfSeveral, btrfs_harness
from tests.unit.copy_kit import SEAL, Place


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    data = tmp_path / "node"
    data.mkdir()
    (data / "file").write_text("content")
    monkeypatch.setenv("SNAPSHOTTER_RUN", str(tmp_path / "run"))

    def gone(self: BtrfsProvider) -> Iterator[Attachment]:
        raise StorageError("the disk is gone", object="/dev/lost")

    monkeypatch.setattr(BtrfsProvider, "attachments", gone)
    monkeypatch.setattr(BtrfsProvider, "_file_systems", lambda self: [])  # other tests have theirs
    node = Node(name="node", path=str(data), provider="copy")
    return Session(Config(state=str(tmp_path / "state"), nodes={"node": node}))


def left_behind(session: Session) -> str:
    """A set that a dead run left unsealed."""
    provider = session.provider("copy", session.config.nodes["node"])
    assert isinstance(provider, CopyProvider)
    path = session.config.nodes["node"].path
    from snapshotter.host import mounts

    volume = provider.claim(mounts.mount_of(path), path)
    assert volume is not None
    born = make_birth([volume])
    born = replace(born, deadline=born.taken_at - timedelta(seconds=1))
    provider.create([volume], born, Hold())
    return born.set_id


def test_reap_goes_on_past_a_provider_that_cannot_be_asked(session: Session) -> None:
    leftover = left_behind(session)
    said = reap(session)
    assert said["removed"] == [leftover]
    assert [(entry["provider"], "the disk is gone" in entry["reason"]) for entry in said["unavailable"]] == [
        ("btrfs", True)
    ]


def test_reap_goes_on_past_a_pause_that_is_stuck(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = left_behind(session)

    def stuck() -> list[str]:
        raise UndoIncompleteError("a dead run still holds something", left=["thaw /data: Input/output error"])

    monkeypatch.setattr(quiesce, "reap", stuck)
    with pytest.raises(UndoIncompleteError) as refused:
        reap(session)
    assert refused.value.left == ("thaw /data: Input/output error",)
    assert leftover not in [entry.set_id for entry in session.catalog().sets]


def test_release_needs_only_the_providers_of_that_set(session: Session, tmp_path: Path) -> None:
    taken = take(session, "node")
    clone = str(tmp_path / "clone")
    restore(session, taken["set_id"], clone, Access.WRITABLE)
    assert release(session, clone)["set_id"] == taken["set_id"]
    with pytest.raises(NotFoundError, match="not asked: btrfs"):
        release(session, clone)


@pytest.mark.root
def test_a_store_of_copies_that_fails_is_needed_for_its_own_sets_alone(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    (place.data / "file").write_text("content")
    with loop_file_system("ext4", tmp_path, 64) as disk:
        beside, place.store = place.store, disk / "store"
        lost = place.take()
        place.store = beside
        pull_disk(disk)
        birth = place.take()
        provider = CopyProvider(Settings(str(place.top / "state")))
        known = list(provider._cache.read())
        assert known == [str(disk / "store"), str(beside)], "the one that fails is asked first"

        provider.mark(birth.set_id, {"pinned": "1"})
        (snapshot,) = provider.snapshots(birth.set_id)
        assert snapshot.marks["pinned"]
        attachment_id, clone = new_attachment_id(utc_now()), str(place.top / "clone")
        provider.attach(snapshot, attachment_id, Access.WRITABLE, clone)
        provider.settle(attachment_id, datetime.now(UTC))
        provider.detach(attachment_id)
        assert not os.path.exists(clone)

        seen = []
        with pytest.raises(StorageError, match="Input/output error"):
            for each in provider.snapshots():
                seen.append(each.birth)
        assert seen == [birth], "what can be read is listed first"
        for act in (
            lambda: provider.mark(lost.set_id, {"pinned": None}),
            lambda: provider.delete(new_set_id(utc_now())),
            lambda: provider.detach(attachment_id),
            lambda: provider.settle(attachment_id, datetime.now(UTC)),
            lambda: list(provider.attachments()),
            lambda: provider.reap(),
        ):
            with pytest.raises(StorageError, match="Input/output error"):
                act()
        provider.delete(birth.set_id)
        assert not place.kept()


@pytest.mark.root
def test_a_btrfs_that_fails_is_needed_for_its_own_sets_alone(tmp_path: Path) -> None:
    with btrfs_harness(200) as pulled, btrfs_harness(200) as here:
        provider = OfSeveral(Settings(str(tmp_path), floor=0.0))
        provider.points = (pulled.point, here.point)
        theirs, ours = pulled.volume(), here.volume()
        lost, birth, over_both = make_birth([theirs]), make_birth([ours]), make_birth([ours, theirs])
        provider.create([theirs], lost, Hold())
        provider.create([ours, theirs], over_both, Hold())
        attached = new_attachment_id(utc_now())
        for each in list(provider.snapshots(over_both.set_id)):
            assert isinstance(provider.attach(each, attached, Access.WRITABLE, str(tmp_path / "c")), MountSpec)
        pull_disk(pulled.point)

        provider.create([ours], birth, Hold())
        provider.mark(birth.set_id, SEAL)
        (snapshot,) = provider.snapshots(birth.set_id)
        attachment_id = new_attachment_id(utc_now())
        provider.attach(snapshot, attachment_id, Access.WRITABLE, str(tmp_path / "clone"))
        provider.settle(attachment_id, datetime.now(UTC))
        provider.detach(attachment_id)
        provider.swap("w1", snapshot, ours)
        provider.swap_back("w1")

        seen = []
        with pytest.raises(StorageError, match="Input/output error"):
            for found in provider.snapshots():
                seen.append(found.birth.set_id)
        assert sorted(seen) == sorted([birth.set_id, over_both.set_id]), "what can be read is listed first"
        born = next(provider.snapshots(birth.set_id)).birth
        assert [each.birth for each in provider.of_slot(born.target, born.slot) if each.birth == born] == [born]
        for act in (
            lambda: provider.mark(lost.set_id, SEAL),
            lambda: provider.mark(over_both.set_id, SEAL),
            lambda: provider.settle(attached, datetime.now(UTC)),
            lambda: provider.detach(attached),
            lambda: provider.delete(over_both.set_id),
            lambda: provider.delete(lost.set_id),
            lambda: provider.detach(attachment_id),
            lambda: list(provider.attachments()),
            lambda: list(provider.swaps()),
            lambda: provider.reap(),
        ):
            with pytest.raises(StorageError, match="Input/output error"):
                act()
        provider.delete(birth.set_id)
        assert not list(BtrfsHarness.provider(here).snapshots(birth.set_id))


def test_the_instance_that_holds_the_set_is_enough(session: Session, tmp_path: Path) -> None:
    """Of two instances of one provider, the first can't be asked."""
    taken = take(session, "node")
    found = session.select(taken["set_id"])
    holding = session.provider("copy", session.config.nodes["node"])

    class Failing(CopyProvider):
        def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
            raise StorageError("the disk is gone", object="/dev/lost")

    session._everywhere = ([Failing(Settings(str(tmp_path))), holding], [])
    assert session.providers_of(found) == [holding]
    session._everywhere = ([Failing(Settings(str(tmp_path))), Failing(Settings(str(tmp_path)))], [])
    with pytest.raises(StorageError, match="the disk is gone"):
        session.providers_of(found)


def scheduled(session: Session, slot: str) -> Any:
    return take_node(session, session.config.nodes["node"], slot=slot)


@contextmanager
def failing_store(session: Session, where: Path) -> Iterator[Path]:
    """Another node's store, known to the session's host, is on a disk that fails; the disk's mount point."""
    with loop_file_system("ext4", where, 64) as disk:
        other = Place(where / "other")
        (other.data / "file").write_text("content")
        other.store = disk / "store"
        other.take()
        known = Path(session.config.state) / "copy-stores"
        known.parent.mkdir(exist_ok=True)
        known.write_bytes((other.top / "state" / "copy-stores").read_bytes())
        pull_disk(disk)
        yield disk


@pytest.mark.root
def test_the_verbs_on_one_set_pass_a_store_that_fails_over(session: Session, tmp_path: Path) -> None:
    with failing_store(session, tmp_path):
        set_id = take(session, "node")["set_id"]
        assert session.catalog().unavailable
        assert pin(session, set_id, pinned=True)["pinned"] and not pin(session, set_id, pinned=False)["pinned"]
        assert verify(session, set_id, level=1)["outcome"] == "ok"
        clone = str(tmp_path / "clone")
        restore(session, set_id, clone, Access.WRITABLE)
        assert release(session, clone)["set_id"] == set_id and not os.path.exists(clone)
        data = session.config.nodes["node"].path
        Path(data, "file").write_text("ruined")
        in_place.carry_out(session, in_place.plan(session, set_id))
        assert Path(data, "file").read_text() == "content"


@pytest.mark.root
def test_reap_removes_what_it_can_see(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with failing_store(session, tmp_path):
        found = session.select(take(session, "node")["set_id"])
        (holding,) = session.providers_of(found)
        clone = str(tmp_path / "clone")
        holding.attach(found.snapshots[0], new_attachment_id(utc_now()), Access.WRITABLE, clone, Purpose.VERIFY)
        monkeypatch.setattr("snapshotter.host.processes.alive", lambda _: False)
        with pytest.raises(UndoIncompleteError, match="Input/output error"):
            reap(session)
        assert not os.path.exists(clone)


@pytest.mark.root
def test_a_scheduled_take_needs_no_store_but_its_own(session: Session, tmp_path: Path) -> None:
    """Another node's store is on a disk that fails, and later isn't there."""
    with failing_store(session, tmp_path) as disk:
        assert session.catalog().unavailable
        assert [scheduled(session, "20261122t020000z")["existing"] for _ in range(2)] == [False, True]
        subprocess.run(["umount", str(disk)], check=True)
        assert any("nothing is mounted" in entry.reason for entry in session.catalog().unavailable)
        assert [scheduled(session, "20261123t020000z")["existing"] for _ in range(2)] == [False, True]


def test_a_slot_needs_the_instance_that_the_set_would_be_made_by(session: Session, tmp_path: Path) -> None:
    class Failing(CopyProvider):
        def of_slot(self, target: str, slot: str) -> Iterator[Snapshot]:
            raise StorageError("the disk is gone", object="/dev/lost")

    own = session.provider("copy", session.config.nodes["node"])
    session._everywhere = ([Failing(Settings(str(tmp_path))), own], [])
    assert not scheduled(session, "20261122t020000z")["existing"]
    session._everywhere = ([Failing(Settings(str(tmp_path)))], [])
    with pytest.raises(StorageError, match="slot 20261123t020000z was taken: /dev/lost: the disk is gone"):
        scheduled(session, "20261123t020000z")
