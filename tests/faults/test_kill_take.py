"""SIGKILL of `take`, of its watchdog, and of both, at random instants: after `reap` nothing is left stopped, no
unsealed
set counts as good, and the next take works."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hot.conftest import start  # noqa: F401 a fixture
from tests.support import Command, Node, check_database, loop_file_system, state_of

VICTIMS = ["take", "watchdog", "both"]


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def watchdogs(pid: int) -> list[int]:
    found = []
    for child in children(pid):
        with contextlib.suppress(OSError):
            if b"watchdog" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_at_random_instants(tmp_path: Path, start, victim: str, request: pytest.FixtureRequest) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    times = 40 if request.config.getoption("--full") else 5
    chance = random.Random(f"{victim}")
    node: Node = start(tmp_path / "data", "--rate", "5", "--fill", "40")
    node.wait_for(30)
    command = Command(tmp_path / "etc")
    began = time.monotonic()
    command.json("take", str(node.data))
    whole_s = time.monotonic() - began
    for turn in range(times):
        before = node.acknowledged()
        process = command.start("take", str(node.data), "--json")
        dogs: list[int] = []
        at = time.monotonic() + chance.uniform(0, whole_s * 1.1)
        while time.monotonic() < at and process.poll() is None:
            dogs = watchdogs(process.pid) or dogs
            if victim == "watchdog" and dogs and chance.random() < 0.02:
                break
            time.sleep(0.001)
        dogs = watchdogs(process.pid) or dogs
        if victim in ("watchdog", "both"):
            for dog in dogs:
                kill(dog)
        if victim in ("take", "both"):
            kill(process.pid)
        process.wait(60)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        settle(node, command)
        for entry in command.json("list", str(node.data))["sets"]:
            assert entry["good"] == (entry["state"] == "ready"), entry
            assert entry["state"] in ("ready", "incomplete"), entry
        taken = command.json("take", str(node.data))
        assert taken["good"], f"turn {turn}: the next take must work"
        clone = tmp_path / "clone"
        command.json("restore", taken["set_id"], "--to", str(clone))
        found = check_database(clone)
        assert found["lost"] == 0 and found["head"] >= before
        command.json("release", str(clone), "--discard-changes")
    time.sleep(5.5)  # the deadline of the unsealed ones
    command.json("reap")
    sets = command.json("list", str(node.data))["sets"]
    assert all(entry["good"] for entry in sets), "reap must have removed every unsealed set"


@pytest.mark.root
def test_killed_on_btrfs(tmp_path: Path, start, request: pytest.FixtureRequest) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    """The same with the btrfs provider, which needs no watchdog: after `reap` only the images of good sets are left."""
    times = 40 if request.config.getoption("--full") else 6
    chance = random.Random("btrfs")
    with loop_file_system("btrfs", tmp_path, 8000) as place:
        node: Node = start(place / "data", "--rate", "2", "--fill", "20")
        node.wait_for(30)
        command = Command(tmp_path / "etc")
        began = time.monotonic()
        command.json("take", str(node.data))
        whole_s = time.monotonic() - began
        for _ in range(times):
            before = node.acknowledged()
            process = command.start("take", str(node.data), "--json")
            time.sleep(chance.uniform(0.3, 1.05) * whole_s)
            kill(process.pid)
            process.communicate(timeout=60)
            settle(node, command)
            assert all(entry["good"] == (entry["state"] == "ready") for entry in sets_of(node, command))
            taken = command.json("take", str(node.data))
            clone = tmp_path / "clone"
            command.json("restore", taken["set_id"], "--to", str(clone))
            found = check_database(clone)
            assert found["lost"] == 0 and found["head"] >= before
            command.json("release", str(clone), "--discard-changes")
            # Each is a subvolume that pins what the node writes over.
            command.json("delete", taken["set_id"], "--yes", "--last")
        time.sleep(5.5)  # the deadline of the unsealed ones
        command.json("reap")
        good = sets_of(node, command)
        assert all(entry["good"] for entry in good)
        listed = subprocess.run(["btrfs", "subvolume", "list", str(place)], capture_output=True, text=True, check=True)
        snapshots = [line for line in listed.stdout.splitlines() if "/sets/" in line]
        assert len(snapshots) == len(good), "an image without a set is left"
        assert "/attachments/" not in listed.stdout
        node.kill()


def sets_of(node: Node, command: Command) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = command.json("list", str(node.data))["sets"]
    return found


def settle(node: Node, command: Command) -> None:
    """After reap the node must run, at once."""
    command.json("reap")
    give_up = time.monotonic() + 3
    while state_of(node.process.pid) in ("T", "t"):
        assert time.monotonic() < give_up, "the node is still stopped after reap"
        time.sleep(0.01)
    node.wait_for(node.acknowledged() + 1)
