"""The command on Compute Engine: taken under a real freeze, restored, released; and SIGKILL at its API calls. Run
again and reaped there is one good set or none, nothing frozen, no stray disk, no stray instant snapshot.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.core.model import Volume
from snapshotter.host.mounts import is_mount_point
from snapshotter.testing.harness import describe, fill, ruin
from tests.support import Command
from tests.unit.gce_kit import GceHarness, gce_harness

pytestmark = pytest.mark.root


class GceCommand(Command):
    """`snapshotter` on the twin's instance."""

    def __init__(self, home: Path, harness: GceHarness, config: str = "") -> None:
        super().__init__(home, config=config)
        self.harness = harness

    def argv(self, *words: str) -> list[str]:
        program, *_ = super().argv()
        by_id = str(self.harness.disks.by_id)
        return [program, "-m", "tests.unit.gce_command", by_id, *words, "--config", str(self.config)]

    def environment(self) -> dict[str, str]:
        return super().environment() | self.harness.twin.environment(keys=False)

    def killed(self, action: str, nth: int, kind: str, *words: str) -> bool:
        """Run it with a SIGKILL at a call; False if there was no such call."""
        fault = self.harness.twin.fail(action, kind, nth=nth)
        process = self.start(*words)
        fault.pid = process.pid
        process.communicate(timeout=300)
        if fault in self.harness.twin.faults:
            self.harness.twin.faults.remove(fault)
        return process.returncode == -9


class World:
    def __init__(self, harness: GceHarness, command: GceCommand, volumes: list[Volume]) -> None:
        self.harness, self.command, self.volumes = harness, command, volumes
        self.paths = [str(volume.path) for volume in volumes]
        self.path = self.paths[0]

    def reaped(self) -> None:
        """Until nothing is kept for its deadline's sake."""
        give_up = time.monotonic() + 60
        while True:
            done = self.command.json("reap")
            waiting = bool(self.harness.twin.world.groups)
            if not done["kept"] and not waiting:
                return
            assert time.monotonic() < give_up, done
            time.sleep(1)

    def not_frozen(self) -> None:
        for path in self.paths:
            words = ["timeout", "30", "sh", "-c", f"echo x > {path}/written && sync -f {path}"]
            assert subprocess.run(words).returncode == 0, "still frozen"
            os.unlink(f"{path}/written")

    def sets(self) -> list[str]:
        """Ids of the good sets; Compute Engine has their snapshots and nothing else of ours."""
        listed = self.command.json("list")["sets"]
        assert all(found["good"] for found in listed), listed
        snapshots = {part["id"] for found in listed for part in found["snapshots"]}
        assert self.harness.objects() == snapshots, "a stray object"
        return [found["set_id"] for found in listed]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with gce_harness() as harness:
        volume = harness.volume()
        fill(str(volume.path))
        yield World(harness, GceCommand(tmp_path / "home", harness), [volume])


@pytest.fixture
def grouped(tmp_path: Path) -> Iterator[World]:
    """Two disks of one consistency group: a link in the data path leads to the second."""
    with gce_harness(grouped=True) as harness:
        volumes = [harness.volume(), harness.volume()]
        for volume in volumes:
            fill(str(volume.path))
        os.symlink(str(volumes[1].path), f"{volumes[0].path}/ancient")
        yield World(harness, GceCommand(tmp_path / "home", harness), volumes)


def test_the_tour_on_gce(world: World, tmp_path: Path) -> None:
    command, content = world.command, describe(world.path)
    planned = command.json("take", world.path, "--dry-run")
    assert (planned["quiesce"], planned["grade"]) == ("freeze", "filesystem")
    assert planned["volumes"] == [{"provider": "gce", "volume": world.volumes[0].id}]
    taken = command.json("take", world.path)
    assert (taken["state"], taken["grade"], taken["good"]) == ("ready", "filesystem", True)
    ruin(world.path)
    clone = tmp_path / "clone"
    restored = command.json("restore", taken["set_id"], "--to", str(clone), "--with-identity")
    assert describe(restored["path"]) == content
    assert command.error("delete", taken["set_id"], "--yes", "--last", exit_code=5)
    (clone / "mine").write_text("")
    assert "--discard-changes" in command.error("release", str(clone), exit_code=5)["line"]
    command.json("release", str(clone), "--discard-changes")
    command.json("restore", taken["set_id"], "--mount", str(clone))
    assert is_mount_point(str(clone))
    command.json("release", str(clone))
    assert world.sets() == [taken["set_id"]]
    command.json("delete", taken["set_id"], "--yes", "--last")
    assert not world.harness.objects()


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


def _killed_at(world: World, places: list[tuple[str, int]], kind: str, whole: bool) -> None:
    for action, nth in places:
        if not world.command.killed(action, nth, kind, "take", world.path):
            break
        world.not_frozen()
        world.reaped()
        left = world.sets()
        assert len(left) <= 1
        again = world.command.json("take", world.path)["set_id"]
        assert sorted(world.sets()) == sorted([*left, again])
        for set_id in [*left, again]:
            world.command.json("delete", set_id, "--yes", "--last")
        assert not world.harness.objects()
    else:
        assert not whole, "it made more calls than were tried"


@pytest.mark.parametrize("kind", ["kill", "kill-after"])
def test_killed_at_calls_of_take_on_gce(world: World, kind: str, request: pytest.FixtureRequest) -> None:
    whole = bool(request.config.getoption("--full"))
    sample = [("snapshots.insert", 1), ("snapshots.setLabels", 1)]
    _killed_at(world, [("*", nth) for nth in range(1, 40)] if whole else sample, kind, whole)


@pytest.mark.parametrize("kind", ["kill", "kill-after"])
def test_killed_at_calls_of_a_groups_take(grouped: World, kind: str, request: pytest.FixtureRequest) -> None:
    whole = bool(request.config.getoption("--full"))
    sample = [("instantSnapshotGroups.insert", 1), ("snapshots.insert", 2)]
    _killed_at(grouped, [("*", nth) for nth in range(1, 60)] if whole else sample, kind, whole)


@pytest.mark.parametrize("kind", ["kill", "kill-after"])
def test_killed_at_calls_of_restore_on_gce(
    world: World, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole = bool(request.config.getoption("--full"))
    sample = [("disks.insert", 1), ("instances.attachDisk", 1)]
    places = [("*", nth) for nth in range(1, 50)] if whole else sample
    set_id, content = world.command.json("take", world.path)["set_id"], describe(world.path)
    before = world.harness.objects()
    clone = tmp_path / "clone"
    for action, nth in places:
        if not world.command.killed(action, nth, kind, "restore", set_id, "--to", str(clone)):
            break
        world.reaped()
        assert world.harness.objects() == before, f"left after {kind} at {action} {nth}"
        assert not is_mount_point(str(clone))
        assert world.sets() == [set_id]
        restored = world.command.json("restore", set_id, "--to", str(clone), "--with-identity")
        assert describe(restored["path"]) == content
        world.command.json("release", str(clone))
        assert world.harness.objects() == before
    else:
        assert not whole, "it made more calls than were tried"


def test_interrupted_in_a_call_of_gce(world: World) -> None:
    """Google's client waits for an answer when SIGTERM comes: undone, and let go at once."""
    world.harness.twin.fail("snapshots.insert", "hang")
    process = world.command.start("take", world.path)
    give_up = time.monotonic() + 120
    while not world.harness.twin.count()["snapshots.insert"]:
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 9, said
    world.not_frozen()
    assert not world.sets()
    assert not world.harness.objects(), "left behind"
