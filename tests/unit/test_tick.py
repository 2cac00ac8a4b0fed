"""tick: at most one sealed set a slot, none lost, and the next tick heals, whatever the clock, the store and other
ticks do. Over a store in memory; `tests/faults/test_tick_killed.py` has the command itself."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from snapshotter.core.errors import BusyError, StorageError
from snapshotter.core.model import Birth, Hold, Snapshot, compact_time
from snapshotter.provider import Provider
from snapshotter.testing.faults import Counting, FailNth, Proxy
from snapshotter.verbs.prune import nodes_of
from snapshotter.verbs.take import take_node
from snapshotter.verbs.tick import tick
from tests.unit.upkeep_kit import NOON, World

T = TypeVar("T")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    with made.clock():
        yield made


def run(world: World, provider: Provider | None = None, **how: Any) -> dict[str, Any]:
    session = world.session(provider)
    document, errors = tick(session, nodes_of(session, None), **how)
    return {**document, "errors": errors}


def the_law(world: World, number: int = 0) -> None:
    """No slot has two sets that count."""
    twice = {slot: count for slot, count in Counter(world.slots(number)).items() if slot and count > 1}
    assert not twice, f"taken twice: {twice}"


def test_takes_what_is_due_once_and_says_when_next(world: World) -> None:
    document = run(world)
    (entry,) = document["nodes"]
    assert entry["slot"] == "20261122t020000z" and entry["due"] and not document["errors"]
    assert entry["next_at"] == "2026-11-23T02:00:00Z"
    assert world.slots() == ["20261122t020000z"]
    for _ in range(3):
        world.pass_by(minutes=1)
        assert not run(world)["nodes"][0]["due"]
    world.now = NOON.replace(day=23, hour=9)  # seven hours late
    assert run(world)["nodes"][0]["taken"]["good"]
    assert world.slots() == ["20261122t020000z", "20261123t020000z"]


def test_a_slot_that_somebody_else_says_is_due_is_taken_and_the_nodes_own_policy_prunes(tmp_path: Path) -> None:
    """A function asks a node so; on it nothing need be scheduled."""
    world = World(tmp_path, nodes="keep = {daily = 2}")
    with world.clock():
        for _ in range(6):
            slot = compact_time(world.now)
            assert run(world, slot=slot)["nodes"][0]["taken"] and not run(world, slot=slot)["nodes"][0]["due"]
            world.pass_by(days=1)
        assert len(world.slots()) <= 3
        assert not run(world)["nodes"][0]["due"]


def test_a_month_of_ticks_keeps_what_the_policy_keeps(world: World) -> None:
    for _ in range(30):
        document = run(world)
        assert not document["errors"], document["failed"]
        world.pass_by(days=1)
    assert len(world.sets()) == 8, "seven, and the one that the next tick removes"
    assert all(found.verified_level == 0 for found in world.sets()[:-1]), "the storage's word is written down"


@pytest.mark.parametrize("keep", ["{daily = 7}", "{weekly = 4}", '{daily = 7, max_space = "1B"}'])
def test_a_take_by_hand_makes_no_slot_due_again(tmp_path: Path, keep: str) -> None:
    world = World(tmp_path, nodes=f'every = "24h"\nat = "02:00"\nkeep = {keep}')
    with world.clock():
        for _ in range(4):
            assert run(world)["nodes"][0]["taken"]
            world.pass_by(hours=1)
            by_hand = world.take(world.now, verify_outcome="ok", verify_level="2", verify_at=compact_time(world.now))
            for _ in range(3):
                world.pass_by(hours=1)
                entry = run(world)["nodes"][0]
                assert not entry["due"] and entry["taken"] is None
                assert by_hand not in entry["removed"]
            world.pass_by(hours=20)
        the_law(world)


def test_reads_the_catalog_once_for_all_nodes(tmp_path: Path) -> None:
    world = World(tmp_path, count=5)
    listings = []

    class Listed(Proxy):
        def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
            listings.append(set_id)
            return self.inner.snapshots(set_id)

        def of_slot(self, target: str, slot: str) -> Iterator[Snapshot]:
            return self.inner.of_slot(target, slot)

    with world.clock():
        assert not run(world, Listed(world.provider()))["errors"]
        assert listings.count(None) == 1
        world.pass_by(minutes=1)
        listings.clear()
        document = run(world, Listed(world.provider()))
        assert listings.count(None) == 1 and not any(entry["due"] for entry in document["nodes"])


def test_never_waits_for_an_upload(world: World) -> None:
    world.store.upload_polls = 50
    entry = run(world)["nodes"][0]
    assert entry["taken"]["state"] == "pending" and entry["pending"] == [entry["taken"]["set_id"]]
    world.pass_by(minutes=1)
    entry = run(world)["nodes"][0]
    assert not entry["due"] and entry["pending"], "pending is taken"


def test_a_clock_an_hour_back_and_a_year_ahead(world: World) -> None:
    for _ in range(5):
        run(world)
        world.pass_by(days=1)
    right, before = world.now, world.slots()
    world.now = NOON.replace(hour=2, minute=30) + timedelta(days=4, hours=-1)
    run(world)
    assert world.slots() == before, "an hour back: its slot was taken"
    world.now = right + timedelta(days=366)
    run(world)
    assert len(world.slots()) == len(before) + 1
    world.now = right
    for k in range(12):
        document = run(world)
        assert not document["errors"], document["failed"]
        assert set(world.slots()) >= {compact_time(world.now)[:9] + "020000z"}, f"day {k}: the future stops nothing"
        world.pass_by(days=1)
    the_law(world)
    future = [found for found in world.sets() if found.birth.taken_at > world.now]
    assert len(future) == 1 and len(world.sets()) == 9


class Barrier(Proxy):
    """Two makers whose images exist before either looks who else is there."""

    def __init__(self, inner: Provider, together: threading.Barrier) -> None:
        super().__init__(inner)
        self.together = together

    def create(self, volumes: Any, birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        made = super().create(volumes, birth, hold)
        self.together.wait(20)
        return made


@pytest.mark.parametrize("makers", [2, 5])
def test_many_hosts_at_once_leave_one(world: World, makers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # What two hosts share is the store; locks are each host's own.
    monkeypatch.setattr("snapshotter.verbs.take.Locks", lambda *_: __import__("contextlib").nullcontext())
    together = threading.Barrier(makers)
    answers: list[Any] = []

    def one() -> None:
        session = world.session(Barrier(world.provider(), together))
        try:
            answers.append(take_node(session, world.config.nodes["n0"], slot="20261122t020000z"))
        except BusyError as error:
            answers.append(error)

    threads = [threading.Thread(target=one) for _ in range(makers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == makers
    (left,) = world.sets()
    assert left.good and left.birth.slot == "20261122t020000z"
    made = [answer for answer in answers if isinstance(answer, dict) and not answer["existing"]]
    assert [document["set_id"] for document in made] == [left.set_id]


def test_a_maker_that_looks_late_finds_the_sealed_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow run's image, smaller id and all, gives way to what was sealed while it was made."""
    monkeypatch.setattr("snapshotter.verbs.take.Locks", lambda *_: __import__("contextlib").nullcontext())
    rival: list[str] = []

    class Slow(Proxy):
        def create(self, volumes: Any, birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
            made = super().create(volumes, birth, hold)
            rival.append(world.take(NOON + timedelta(minutes=1), slot=birth.slot))
            return made

    entry = run(world, Slow(world.provider()))["nodes"][0]
    assert entry["taken"]["existing"] and entry["taken"]["set_id"] == rival[0]
    assert [found.set_id for found in world.sets()] == rival


def test_a_dead_makers_image_holds_the_slot_up_until_its_deadline_only(world: World) -> None:
    dead = world.take(NOON, slot="20261122t020000z", unsealed="1")
    assert not run(world)["nodes"][0]["due"]
    world.pass_by(minutes=1)
    document = run(world)
    assert document["nodes"][0]["taken"]["good"] and document["reaped"]["removed"] == [dead]
    the_law(world)


class FailEvery(Counting):
    """Every n-th call fails, reading ones too; some after they have acted."""

    def __init__(self, inner: Provider, n: int, chance: random.Random) -> None:
        super().__init__(inner)
        self.n, self.chance, self.count = n, chance, 0

    def fails(self) -> bool:
        self.count += 1
        return self.count % self.n == 0

    def mutate(self, what: str, act: Callable[[], T]) -> T:
        if self.fails():
            if self.chance.random() < 0.5:
                act()
            raise StorageError(f"{what} failed on purpose", object=self.name)
        return act()

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        if self.fails():
            raise StorageError("listing failed on purpose", object=self.name)
        return self.inner.snapshots(set_id)

    def of_slot(self, target: str, slot: str) -> Iterator[Snapshot]:
        if self.fails():
            raise StorageError("listing failed on purpose", object=self.name)
        return self.inner.of_slot(target, slot)


@pytest.mark.parametrize("n", [3, 4, 5, 7])
def test_a_store_that_fails_every_third_call(world: World, n: int) -> None:
    chance = random.Random(n)
    faulty = FailEvery(world.provider(), n, chance)
    failures = 0
    for day in range(12):
        newest = {found.set_id for found in [each for each in world.sets() if each.good][-6:]}
        for _ in range(20):  # a tick a minute
            failures += bool(run(world, faulty)["errors"])
            the_law(world)
            world.pass_by(minutes=1)
        assert newest <= {found.set_id for found in world.sets() if found.good}, f"day {day}: one was lost"
        assert run(world)["errors"] == [], "the next tick heals"
        assert any(found.good and found.birth.slot == compact_time(world.now)[:9] + "020000z" for found in world.sets())
        the_law(world)
        world.pass_by(days=1, minutes=-20)
    assert failures
    world.pass_by(minutes=10)
    run(world)
    assert all(found.good for found in world.sets()), "what failed takes left is reaped"
    assert len(world.sets()) in (7, 8)


@pytest.mark.parametrize("when", ["before", "after"])
def test_failing_at_each_call_in_turn(world: World, when: Any) -> None:
    """As a kill there, but for what the run itself still undoes."""
    counting = Counting(world.provider())
    for _ in range(9):
        run(world, counting)
        world.pass_by(days=1)
    most = len(counting.calls)
    assert most > 20
    for number in range(1, 7):
        faulty = FailNth(world.provider(), number, when)
        run(world, faulty)
        the_law(world)
        world.pass_by(minutes=1)
        healed = run(world)
        assert not healed["errors"], healed["failed"]
        the_law(world)
        assert len([found for found in world.sets() if found.good]) >= 7
        world.pass_by(days=1)


def test_the_deadline_begins_nothing_more_and_says_what_is_left(world: World) -> None:
    document = run(world, deadline_s=0.0)
    assert not world.sets() and document["failed"][0]["step"] == "take"
    assert document["left"] == ["n0: take 20261122t020000z", "memory: advance", "reap"]
    assert run(world, deadline_s=60.0)["nodes"][0]["taken"]


def test_one_nodes_failure_stops_no_other(tmp_path: Path) -> None:
    world = World(tmp_path, count=3)
    with world.clock():
        (tmp_path / "data-1" / "file").unlink()
        document = run(world)  # an empty data path is refused
        assert [entry["node"] for entry in document["failed"]] == ["n1"]
        assert world.slots(0) and world.slots(2) and not world.slots(1)


def test_a_bug_at_one_node_stops_no_other_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, count=3)

    class Buggy(Proxy):
        def check(self, volumes: Any, birth: Birth) -> None:
            if birth.node == "n1":
                raise KeyError("of the driver's")
            super().check(volumes, birth)

        def advance(self) -> list[str]:
            raise IndexError("no such thing")

    told: list[str] = []
    monkeypatch.setattr("snapshotter.verbs.notify.people", lambda node, title, text: told.append(text) or [])
    with world.clock():
        document = run(world, Buggy(world.provider()))
    assert [(entry["node"], entry["exit"]) for entry in document["failed"]] == [("n1", 1), (None, 1)]
    assert "KeyError" in document["errors"][0].line() and "test_tick.py:" in document["errors"][0].line()
    assert world.slots(0) and world.slots(2) and not world.slots(1)
    assert len(told) == 1 and "KeyError" in told[0]


def test_a_newest_set_that_is_damaged_is_a_failure_and_stays(world: World) -> None:
    run(world)
    (found,) = world.sets()
    world.store.invalidate(found.set_id, 0)
    document = run(world)
    assert [error.exit for error in document["errors"]] == [8]
    assert document["nodes"][0]["taken"]["good"], "and the slot is taken anew"
    world.pass_by(days=40)
    run(world)
    assert found.set_id in [each.set_id for each in world.sets()], "nothing automatic removes it"


def test_what_somebody_has_pinned_is_kept_though_never_sealed(world: World) -> None:
    """It may be all that there is of a dead node."""
    world.take(NOON, unsealed="1")
    world.provider().mark(world.sets()[0].set_id, {"pinned": "1"})
    world.pass_by(days=1)
    document = run(world)
    assert len(world.sets()) == 2 and any(found.pinned for found in world.sets()) and not document["errors"]


def test_a_proof_that_lasts_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written down at its end only, and ticks may overlap."""
    world = World(tmp_path, nodes='every = "24h"\nat = "02:00"\nverify = {level = 1, every = "24h"}')
    begun: list[str] = []

    def prove(*_: Any) -> dict[str, Any]:
        begun.append("")
        if len(begun) == 1:
            (entry,) = run(world)["nodes"]
            assert entry.get("verified") is None
        return {}

    monkeypatch.setattr("snapshotter.verbs.tick._prove", prove)
    with world.clock():
        world.take(NOON)
        assert run(world)["nodes"][0]["verified"] == {}
    assert len(begun) == 1
