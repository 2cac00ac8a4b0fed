"""What a verify writes on its set: by the marks as they are when it is through, not as they were when it began."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from snapshotter.checks import Finding, Outcome, Proof
from snapshotter.core.errors import BusyError, JudgedBadError, StorageError
from snapshotter.core.model import Attachment, Snapshot, SnapshotSet, compact_time
from snapshotter.host.locks import Locks
from snapshotter.provider import Settings
from snapshotter.testing.memory import MemoryProvider
from snapshotter.verbs import delete, verify
from tests.unit.upkeep_kit import NOON, World

DAILY = 'every = "7d"\nverify = {level = 2, every = "24h"}'


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, nodes=DAILY)
    with made.clock():
        yield made


def proving(monkeypatch: pytest.MonkeyPatch, proof: Proof, meanwhile: Callable[[], Any] = lambda: None) -> None:
    """Every proof on a clone comes to this, and `meanwhile` happens."""

    def on_a_clone(*_: Any) -> Proof:
        meanwhile()
        return proof

    monkeypatch.setattr(verify, "_on_a_clone", on_a_clone)


def marks(found: SnapshotSet) -> tuple[str | None, ...]:
    return tuple(found.marks.get(f"verify-{name}") for name in ("outcome", "level", "at"))


@pytest.mark.parametrize("level", [0, 2])
def test_a_weaker_ok_of_an_older_look_clears_no_corrupt(
    world: World, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    """The set was chosen before another verify found it corrupt."""
    set_id = world.take(NOON)
    (listed,) = world.sets()
    at = compact_time(NOON)

    def operator() -> None:
        world.provider().mark(set_id, {"verify-outcome": "corrupt", "verify-level": "3", "verify-at": at})

    if level == 0:
        operator()
    proving(monkeypatch, Proof(level, Outcome.OK), operator)
    world.pass_by(hours=1)
    verify.prove_set(world.session(), listed, level)
    (now,) = world.sets()
    assert marks(now) == ("corrupt", "3", at) and not now.good


def test_a_set_that_is_gone_meanwhile_needs_no_marks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    set_id = world.take(NOON)
    (listed,) = world.sets()
    proving(monkeypatch, Proof(2, Outcome.OK), lambda: world.provider().delete(set_id))
    assert verify.prove_set(world.session(), listed, 2).outcome is Outcome.OK
    assert not world.sets()


def test_two_that_are_through_at_once_write_one_after_the_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.take(NOON)
    (listed,) = world.sets()
    proving(monkeypatch, Proof(2, Outcome.OK))
    writer = threading.Thread(target=verify.prove_set, args=(world.session(), listed, 2))
    with Locks([f"mark:{listed.set_id}"]):
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and marks(world.sets()[0]) == (None, None, None)
    writer.join(20)
    assert marks(world.sets()[0])[:2] == ("ok", "2")
    monkeypatch.setattr(verify, "_PATIENCE_S", 0.0)
    proving(monkeypatch, Proof(2, Outcome.CORRUPT, (Finding("x", "/db", 2, Outcome.CORRUPT, "a hole"),)))
    with Locks([f"mark:{listed.set_id}"]), pytest.raises(JudgedBadError, match="a hole"):
        verify.prove_set(world.session(), listed, 2)


@pytest.mark.parametrize(("policy", "renewed"), [(2, True), (3, False)])
def test_a_weaker_ok_renews_a_stronger_one_where_the_policy_asks_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: int, renewed: bool
) -> None:
    world = World(tmp_path, nodes=DAILY.replace("level = 2", f"level = {policy}"))
    with world.clock():
        at = compact_time(NOON)
        world.take(NOON, verify_outcome="ok", verify_level="3", verify_at=at)
        world.pass_by(days=2)
        proving(monkeypatch, Proof(2, Outcome.OK))
        verify.prove_set(world.session(), world.sets()[0], 2)
        assert marks(world.sets()[0]) == ("ok", "3", compact_time(world.now) if renewed else at)
        proving(monkeypatch, Proof(2, Outcome.TOOL_MISSING))
        world.pass_by(days=2)
        verify.prove_set(world.session(), world.sets()[0], 4)
        assert marks(world.sets()[0])[2] != compact_time(world.now), "it says nothing of the image"


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("lost", ["", "what was written to it filled its store"])
def test_an_error_in_a_clone_that_is_lost_says_nothing_of_its_image(
    world: World, monkeypatch: pytest.MonkeyPatch, lost: str, blind: bool
) -> None:
    """Also where the driver can't look everywhere: a verdict must be written down."""

    class Full(MemoryProvider):
        asked = False

        def attachments(self) -> Iterator[Attachment]:
            yield from (replace(each, lost=lost) for each in super().attachments())
            if self.asked and blind:
                raise StorageError("can't look into all groups")

    world.take(NOON)
    provider = Full(Settings(str(world.tmp / "state"), floor=0.0), world.store)
    bad = Proof(2, Outcome.CORRUPT, (Finding("rocksdb", "/db", 2, Outcome.CORRUPT, "Input/output error"),))

    def prove(*_: Any, **__: Any) -> Proof:
        provider.asked = True
        return bad

    monkeypatch.setattr(verify.checks, "prove", prove)
    proof = verify.prove_set(world.session(provider), world.sets()[0], 2)
    assert proof.outcome is (Outcome.COULD_NOT_RUN if lost else Outcome.CORRUPT)
    assert lost in proof.why and world.sets()[0].good is bool(lost)


def test_a_refused_delete_gives_the_seal_back_also_where_a_copy_is_seen(world: World) -> None:
    """A copied group shows each member twice; counted, they were not the same as before."""

    class Copied(MemoryProvider):
        def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
            for each in super().snapshots(set_id):
                yield from (each, each)

        def delete(self, set_id: str) -> None:
            self.mark(set_id, {"sealed": None})
            raise BusyError("is there twice", object=set_id)

    world.take(NOON)
    (before,) = world.sets()
    session = world.session(Copied(Settings(str(world.tmp / "state"), floor=0.0), world.store))
    with pytest.raises(BusyError):
        delete.remove(session, before)
    assert world.sets()[0].marks == before.marks and world.sets()[0].good
