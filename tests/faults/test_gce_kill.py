"""The command on Compute Engine: taken under a real freeze, restored, released; and SIGKILL at its API calls. Run
again and reaped there is one good set or none, nothing frozen, no stray disk, no stray instant snapshot.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.testing.harness import describe, fill
from tests.faults.cloud_kill_kit import (
    KINDS,
    CloudCommand,
    World,
    interrupted_in_a_call,
    killed_at_calls_of_restore,
    killed_at_calls_of_take,
    the_tour,
    what_a_held_writer_left_in_memory,
)
from tests.unit.gce_kit import gce_harness

pytestmark = pytest.mark.root


class GceCommand(CloudCommand):
    MODULE = "tests.unit.gce_command"


class GceWorld(World):
    def waiting(self) -> bool:
        return bool(self.harness.twin.world.groups)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with gce_harness() as harness:
        volume = harness.volume()
        fill(str(volume.path))
        yield GceWorld(harness, GceCommand(tmp_path / "home", harness), [volume])


@pytest.fixture
def grouped(tmp_path: Path) -> Iterator[World]:
    """Two disks of one consistency group: a link in the data path leads to the second."""
    with gce_harness(grouped=True) as harness:
        volumes = [harness.volume(), harness.volume()]
        for volume in volumes:
            fill(str(volume.path))
        os.symlink(str(volumes[1].path), f"{volumes[0].path}/ancient")
        yield GceWorld(harness, GceCommand(tmp_path / "home", harness), volumes)


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


def test_what_a_held_writer_left_in_memory(world: World, tmp_path: Path) -> None:
    what_a_held_writer_left_in_memory(world, tmp_path)


def test_the_tour_on_gce(world: World, tmp_path: Path) -> None:
    the_tour(world, tmp_path / "clone")


def test_two_disks_under_one_freeze(grouped: World, tmp_path: Path) -> None:
    """By their group; and, without it, one by one under the same freeze."""
    contents = [describe(path) for path in grouped.paths]
    for in_group in (True, False):
        if not in_group:
            for each in grouped.harness.twin.world.disks.values():
                each.resource_policies.clear()
        taken = grouped.command.json("take", grouped.path)
        assert (taken["quiesce"], taken["grade"], taken["state"]) == ("freeze", "filesystem", "ready")
        assert len(taken["snapshots"]) == 2
        made = grouped.harness.twin.count()["instantSnapshotGroups.insert"]
        assert made == 1, "the first by its group, the second without"
        clone = tmp_path / f"clone-{in_group}"
        restored = grouped.command.json("restore", taken["set_id"], "--to", str(clone), "--with-identity")
        places = [root["path"] for root in restored["roots"]]
        assert describe(places[1]) == contents[1]
        assert {**describe(places[0]), "ancient": None} == {**contents[0], "ancient": None}
        grouped.command.json("release", str(clone))
    assert len(grouped.sets()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_calls_of_take_on_gce(world: World, kind: str, whole: bool) -> None:
    killed_at_calls_of_take(world, kind, whole, [("snapshots.insert", 1), ("snapshots.setLabels", 1)])


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_calls_of_a_groups_take(grouped: World, kind: str, whole: bool) -> None:
    killed_at_calls_of_take(grouped, kind, whole, [("instantSnapshotGroups.insert", 1), ("snapshots.insert", 2)])


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_calls_of_restore_on_gce(world: World, kind: str, whole: bool, tmp_path: Path) -> None:
    sample = [("disks.insert", 1), ("instances.attachDisk", 1)]
    killed_at_calls_of_restore(world, kind, whole, sample, tmp_path / "clone")


def test_interrupted_in_a_call_of_gce(world: World) -> None:
    interrupted_in_a_call(world, "snapshots.insert")
