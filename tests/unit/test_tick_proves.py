"""tick proves a set as often as the policy says: neither at every run, nor never again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from snapshotter.checks import Outcome, Proof
from snapshotter.core.model import compact_time
from snapshotter.verbs import status, verify
from snapshotter.verbs.prune import nodes_of
from snapshotter.verbs.tick import tick
from tests.unit.upkeep_kit import NOON, World

#: The first day of a scheduled week: the set of its slot stays the newest for the whole test.
MONDAY = NOON.replace(day=23)

WEEKLY = 'every = "7d"\nverify = {level = %d, every = "24h"}'


def monday(tmp_path: Path, level: int) -> World:
    world = World(tmp_path, nodes=WEEKLY % level)
    world.now = MONDAY
    return world


def ticks(world: World, hours: int) -> list[dict[str, Any]]:
    """A tick every hour; what each of them failed of."""
    failed = []
    for _ in range(hours):
        session = world.session()
        failed += tick(session, nodes_of(session, None))[0]["failed"]
        world.pass_by(hours=1)
    return failed


def problems(world: World) -> list[str]:
    return [problem.problem for problem in status.of_sets(world.config.nodes["n0"], world.sets(), world.now)]


def proofs(monkeypatch: pytest.MonkeyPatch, proof: Proof) -> list[int]:
    """The levels to which sets are proven from now on; each comes to `proof`."""
    asked: list[int] = []

    def on_a_clone(session: Any, found: Any, level: int) -> Proof:
        asked.append(level)
        return proof

    monkeypatch.setattr(verify, "_on_a_clone", on_a_clone)
    return asked


def test_one_verify_by_hand_at_a_higher_level_makes_no_tick_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = monday(tmp_path, 2)
    at = compact_time(MONDAY)
    with world.clock():
        world.take(MONDAY, slot="20261123t000000z", verify_outcome="ok", verify_level="3", verify_at=at)
        asked = proofs(monkeypatch, Proof(2, Outcome.OK))
        assert not ticks(world, 18) and not asked
        assert not ticks(world, 54)
        assert asked == [2, 2], "once a day"
        assert world.sets()[0].verified_level == 3 and problems(world) == []


@pytest.mark.parametrize("marks", [{}, {"verify_outcome": "ok", "verify_level": "2", "verify_at": "20261122t120000z"}])
def test_what_can_not_be_proven_is_tried_again_when_the_policy_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks: dict[str, str]
) -> None:
    """A level whose tool is missing, with and without an older judgement."""
    world = monday(tmp_path, 3)
    with world.clock():
        world.take(MONDAY, slot="20261123t000000z", **marks)
        asked = proofs(monkeypatch, Proof(2, Outcome.TOOL_MISSING, (), ("rocksdict is not installed",)))
        failed = ticks(world, 72)
        assert asked == [3, 3, 3] and len(failed) == 3
        assert failed[0]["message"] == "could not be proven to level 3: tool-missing: rocksdict is not installed"
        assert failed[0]["cure"] == "mend that, or ask for less: what can be had here is verify = {level = 2}"
        assert problems(world) == ["unverified"]
        assert world.sets()[0].verified_level == (2 if marks else None)


def test_a_try_that_can_not_be_remembered_or_read_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = monday(tmp_path, 3)
    at = compact_time(NOON)
    with world.clock():
        world.take(MONDAY, slot="20261123t000000z", verify_outcome="ok", verify_level="2", verify_at=at)
        asked = proofs(monkeypatch, Proof(2, Outcome.TOOL_MISSING))
        ticks(world, 1)
        (remembered,) = (tmp_path / "state").glob("tried-*")
        remembered.write_text("20269999")
        assert [failure["step"] for failure in ticks(world, 2)] == ["verify"]
        assert asked == [3, 3]


def test_a_verify_by_hand_to_a_lower_level_is_not_the_policys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that verifies each set's files would keep it from ever being proven."""
    world = monday(tmp_path, 3)
    with world.clock():
        world.take(
            MONDAY, slot="20261123t000000z", verify_outcome="ok", verify_level="1", verify_at=compact_time(MONDAY)
        )
        asked = proofs(monkeypatch, Proof(3, Outcome.OK))
        ticks(world, 24)
        assert asked == [3] and world.sets()[0].verified_level == 3


def test_what_can_be_proven_no_further_is_not_proven_at_every_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = monday(tmp_path, 3)
    with world.clock():
        world.take(MONDAY, slot="20261123t000000z")
        asked = proofs(monkeypatch, Proof(1, Outcome.OK, (), ("no database that is known is in it",)))
        assert not ticks(world, 72)
        assert asked == [3, 3, 3]
