"""What is typed on an instance of either cloud, and SIGKILL at its API calls: run again and reaped there is one good
set or none, nothing frozen, no stray object. Knows no cloud: what is asked of one, its twin answers.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any, ClassVar

from snapshotter.core.model import Volume
from snapshotter.host.mounts import is_mount_point
from snapshotter.testing.conformance import content_of
from snapshotter.testing.harness import describe, ruin
from tests.support import Command, writes_at_last

#: (action, which of its calls); ("*", n): the n-th call, whatever it is.
Places = list[tuple[str, int]]
KINDS = ("kill", "kill-after")


class CloudCommand(Command):
    """`snapshotter` on the twin's instance."""

    MODULE: ClassVar[str]

    def __init__(self, home: Path, harness: Any, config: str = "") -> None:
        super().__init__(home, config=config)
        self.harness = harness
        self.later = 0  # seconds, by the command's clock
        self.machine = ""  # another one than this, by its own word

    def argv(self, *words: str) -> list[str]:
        program, *_ = super().argv()
        return [program, "-m", self.MODULE, str(self.harness.disks.by_id), *words, "--config", str(self.config)]

    def environment(self) -> dict[str, str]:
        given = super().environment() | self.harness.twin.environment(keys=False)
        elsewhere = {"K_SERVICE": self.machine} if self.machine else {}
        return given | {"SECONDS_LATER": str(self.later)} | elsewhere

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
    """A node's data on volumes of an instance."""

    def __init__(self, harness: Any, command: CloudCommand, volumes: list[Volume]) -> None:
        self.harness, self.command, self.volumes = harness, command, volumes
        self.paths = [str(volume.path) for volume in volumes]
        self.path = self.paths[0]

    def waiting(self) -> bool:
        """Whether the cloud has something of ours that a later `reap` removes."""
        return False

    def reaped(self) -> None:
        """Until nothing is kept for its deadline's sake."""
        give_up = time.monotonic() + 60
        while (done := self.command.json("reap"))["kept"] or self.waiting():
            assert time.monotonic() < give_up, done
            time.sleep(1)

    def not_frozen(self) -> None:
        for path in self.paths:
            words = ["timeout", "30", "sh", "-c", f"echo x > {path}/written && sync -f {path}"]
            assert subprocess.run(words).returncode == 0, "still frozen"
            os.unlink(f"{path}/written")

    def sets(self) -> list[str]:
        """Ids of the good sets; the cloud has their snapshots and nothing else of ours."""
        listed = self.command.json("list")["sets"]
        assert all(found["good"] for found in listed), listed
        snapshots = {part["id"] for found in listed for part in found["snapshots"]}
        assert self.harness.objects() == snapshots, "a stray object"
        return [found["set_id"] for found in listed]


def what_a_held_writer_left_in_memory(world: World, scratch: Path) -> None:
    """Nothing is frozen: it must be written out before the cloud makes its image."""
    for quiesce in ("stop", "hooks"):
        world.command.config.write_text(writes_at_last(Path(world.path), scratch, quiesce))
        taken = world.command.json("take", "late")
        assert (taken["quiesce"], taken["good"]) == (quiesce, True)
        (found,) = world.harness.provider().snapshots(taken["set_id"])
        assert content_of(world.harness, found)["late"] == describe(world.path)["late"]


def the_tour(world: World, clone: Path) -> None:
    command, content = world.command, describe(world.path)
    (volume,) = world.volumes
    planned = command.json("take", world.path, "--dry-run")
    assert (planned["quiesce"], planned["grade"]) == ("freeze", "filesystem")
    assert planned["volumes"] == [{"provider": volume.provider, "volume": volume.id}]
    taken = command.json("take", world.path)
    assert (taken["state"], taken["grade"], taken["good"]) == ("ready", "filesystem", True)
    ruin(world.path)
    planned = command.json("restore", taken["set_id"], "--to", str(clone), "--dry-run")
    assert any(f"{volume.id} comes back as 1 GiB of" in warning for warning in planned["warnings"]), planned["warnings"]
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


def places(whole: bool, sample: Places) -> Places:
    """Every call, as far as there are any, or a sample of them."""
    return [("*", nth) for nth in range(1, 60)] if whole else sample


def killed_at_calls_of_take(world: World, kind: str, whole: bool, sample: Places) -> None:
    for action, nth in places(whole, sample):
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


def killed_at_calls_of_restore(world: World, kind: str, whole: bool, sample: Places, clone: Path) -> None:
    set_id, content = world.command.json("take", world.path)["set_id"], describe(world.path)
    before = world.harness.objects()
    words = ("restore", set_id, "--to", str(clone), "--with-identity")
    for action, nth in places(whole, sample):
        if not world.command.killed(action, nth, kind, *words):
            break
        world.reaped()
        # Killed behind its last step (or asking what became of it): complete, and a person's.
        for complete in world.command.json("show", set_id)["attachments"]:
            assert complete["since"] and describe(str(clone)) == content
            world.command.json("release", str(clone))
        assert world.harness.objects() == before, f"left after {kind} at {action} {nth}"
        assert not is_mount_point(str(clone))
        assert world.sets() == [set_id]
        assert describe(world.command.json(*words)["path"]) == content
        world.command.json("release", str(clone))
        assert world.harness.objects() == before
    else:
        assert not whole, "it made more calls than were tried"


def interrupted_in_a_call(world: World, action: str) -> None:
    """The cloud's client waits for an answer when SIGTERM comes: undone, and let go at once."""
    world.harness.twin.fail(action, "hang")
    process = world.command.start("take", world.path)
    give_up = time.monotonic() + 120
    while not world.harness.twin.count()[action]:
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 9, said
    world.not_frozen()
    assert not world.sets()
    assert not world.harness.objects(), "left behind"
