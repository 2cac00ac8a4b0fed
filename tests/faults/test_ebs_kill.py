"""The command on EBS: taken under a real freeze, restored, released; and SIGKILL at its calls of EC2. Run again and
reaped there is one good set or none, nothing frozen, no stray volume.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.testing.harness import fill
from tests.faults.cloud_kill_kit import (
    KINDS,
    CloudCommand,
    World,
    interrupted_in_a_call,
    killed_at_calls_of_restore,
    killed_at_calls_of_take,
    places,
    the_tour,
    what_a_held_writer_left_in_memory,
)
from tests.unit.ebs_kit import ebs_harness

pytestmark = pytest.mark.root


class EbsCommand(CloudCommand):
    MODULE = "tests.unit.ebs_command"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ebs_harness() as harness:
        volume = harness.volume()
        fill(str(volume.path))
        yield World(harness, EbsCommand(tmp_path / "home", harness), [volume])


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


def test_the_tour(world: World, tmp_path: Path) -> None:
    the_tour(world, tmp_path / "clone")


def test_what_a_held_writer_left_in_memory(world: World, tmp_path: Path) -> None:
    what_a_held_writer_left_in_memory(world, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_calls_of_take(world: World, kind: str, whole: bool) -> None:
    killed_at_calls_of_take(world, kind, whole, [("CreateSnapshots", 1), ("CreateTags", 1)])


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_calls_of_restore(world: World, kind: str, whole: bool, tmp_path: Path) -> None:
    killed_at_calls_of_restore(world, kind, whole, [("CreateVolume", 1), ("AttachVolume", 1)], tmp_path / "clone")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_calls_of_copy(world: World, kind: str, whole: bool) -> None:
    """The next that asks goes on: in the end there is one copy, whole, and nothing else."""
    command, twin = world.command, world.harness.twin
    command.config.write_text('[aws]\ncopy_to = ["eu-west-1"]\n')
    for action, nth in places(whole, [("CopySnapshot", 1), ("CreateTags", 1)]):
        taken = command.json("take", world.path)["set_id"]
        through = not command.killed(action, nth, kind, "advance")
        for _ in range(4):
            command.later += 300
            last = json.loads(command.run("advance").stdout)["advanced"]
        (copy,) = [each for each in twin.world.snapshots.values() if each.region == "eu-west-1" and each.gone is None]
        assert copy.tags["snapshotter:set"] == taken and "snapshotter:mark-sealed" in copy.tags
        assert not last, "there is nothing left to be done"
        copy.gone = twin.clock.now()
        command.json("delete", taken, "--yes", "--last")
        assert not world.harness.objects()
        if through:
            break
    else:
        assert not whole, "it made more calls than were tried"


def test_interrupted_in_a_call(world: World) -> None:
    interrupted_in_a_call(world, "CreateSnapshots")
