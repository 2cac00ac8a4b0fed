"""The command on EBS: taken under a real freeze, restored, released; and SIGKILL at its calls of EC2. Run again and
reaped there is one good set or none, nothing frozen, no stray volume.
"""

from __future__ import annotations

import json
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
from tests.unit.ebs_kit import EbsHarness, ebs_harness

pytestmark = pytest.mark.root


class EbsCommand(Command):
    """`snapshotter` on the twin's instance."""

    def __init__(self, home: Path, harness: EbsHarness) -> None:
        super().__init__(home)
        self.harness = harness
        self.later = 0  # seconds, by the command's clock

    def argv(self, *words: str) -> list[str]:
        program, *_ = super().argv()
        by_id = str(self.harness.disks.by_id)
        return [program, "-m", "tests.unit.ebs_command", by_id, *words, "--config", str(self.config)]

    def environment(self) -> dict[str, str]:
        given = super().environment() | self.harness.twin.environment(keys=False)
        return given | {"SECONDS_LATER": str(self.later)}

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
    def __init__(self, harness: EbsHarness, command: EbsCommand, volume: Volume) -> None:
        assert volume.path is not None
        self.harness, self.command, self.volume, self.path = harness, command, volume, volume.path

    def reaped(self) -> None:
        """Until nothing is kept for its deadline's sake."""
        give_up = time.monotonic() + 60
        while kept := self.command.json("reap")["kept"]:
            assert time.monotonic() < give_up, kept
            time.sleep(1)

    def not_frozen(self) -> None:
        words = ["timeout", "30", "sh", "-c", f"echo x > {self.path}/written && sync -f {self.path}"]
        assert subprocess.run(words).returncode == 0, "still frozen"
        os.unlink(f"{self.path}/written")

    def sets(self) -> list[str]:
        """Ids of the good sets; EC2 has their snapshots and no others of ours."""
        listed = self.command.json("list")["sets"]
        assert all(found["good"] for found in listed), listed
        assert len(self.harness.objects()) == len(listed), "a stray object"
        return [found["set_id"] for found in listed]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ebs_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        yield World(harness, EbsCommand(tmp_path / "home", harness), volume)


def test_the_tour(world: World, tmp_path: Path) -> None:
    command, content = world.command, describe(world.path)
    planned = command.json("take", world.path, "--dry-run")
    assert (planned["quiesce"], planned["grade"]) == ("freeze", "filesystem")
    assert planned["volumes"] == [{"provider": "ebs", "volume": world.volume.id}]
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


@pytest.mark.parametrize("kind", ["kill", "kill-after"])
def test_killed_at_calls_of_take(world: World, kind: str, request: pytest.FixtureRequest) -> None:
    whole = bool(request.config.getoption("--full"))
    places = [("*", nth) for nth in range(1, 30)] if whole else [("CreateSnapshots", 1), ("CreateTags", 1)]
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
def test_killed_at_calls_of_restore(world: World, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    whole = bool(request.config.getoption("--full"))
    places = [("*", nth) for nth in range(1, 40)] if whole else [("CreateVolume", 1), ("AttachVolume", 1)]
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


@pytest.mark.parametrize("kind", ["kill", "kill-after"])
def test_killed_at_calls_of_copy(world: World, kind: str, request: pytest.FixtureRequest) -> None:
    """The next that asks goes on: in the end there is one copy, whole, and nothing else."""
    whole = bool(request.config.getoption("--full"))
    command, twin = world.command, world.harness.twin
    places = [("*", nth) for nth in range(1, 30)] if whole else [("CopySnapshot", 1), ("CreateTags", 1)]
    command.config.parent.mkdir(exist_ok=True)
    command.config.write_text('[aws]\ncopy_to = ["eu-west-1"]\n')
    for action, nth in places:
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
    """boto3 waits for EC2's answer when SIGTERM comes: undone, and let go at once."""
    world.harness.twin.fail("CreateSnapshots", "hang")
    process = world.command.start("take", world.path)
    give_up = time.monotonic() + 120
    while not world.harness.twin.count()["CreateSnapshots"]:
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 9, said
    world.not_frozen()
    assert not world.sets()
    assert not world.harness.objects(), "left behind"
