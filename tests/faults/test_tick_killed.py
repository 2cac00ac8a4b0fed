"""The command `tick` itself, on files: two at once, and SIGKILL at random instants. At most one sealed set a slot, none
lost, and the next tick heals."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.support import Command

POLICY = 'every = "366d"\nkeep = {daily = 7}\n'


def nodes(tmp: Path, count: int) -> Command:
    """As many nodes, so that each turn has a slot of its own, which lasts longer than the test."""
    config = ""
    for number in range(count):
        data = tmp / f"data-{number}"
        data.mkdir()
        for name in range(40):
            (data / f"file-{name}").write_bytes(os.urandom(200_000))
        config += f'[node.n{number}]\npath = "{data}"\nprovider = "copy"\n{POLICY}'
    return Command(tmp / "etc", config=config)


def sealed(command: Command, node: str) -> list[str]:
    sets = command.json("list", node)["sets"]
    assert all(entry["good"] or entry["state"] == "incomplete" for entry in sets), sets
    return [entry["set_id"] for entry in sets if entry["good"]]


def test_two_ticks_at_once(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    rounds = 20 if request.config.getoption("--full") else 4
    command = nodes(tmp_path, rounds)
    for number in range(rounds):
        both = [command.start("tick", f"n{number}", "--json") for _ in range(2)]
        for process in both:
            said, complaints = process.communicate(timeout=300)
            assert process.returncode == 0, (said, complaints)
        assert len(sealed(command, f"n{number}")) == 1


def test_killed_at_random_instants(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    rounds = 60 if request.config.getoption("--full") else 8
    chance = random.Random("tick")
    command = nodes(tmp_path, rounds + 1)
    time.sleep(2.5)  # a take of files as young as these waits for their time stamps: the first alone would
    began = time.monotonic()
    command.json("tick", f"n{rounds}")
    whole_s = time.monotonic() - began
    cut, before = 0, {}
    for number in range(rounds):
        process = command.start("tick", f"n{number}", "--json")
        time.sleep(chance.uniform(0.1, 1.0) * whole_s)
        cut += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
        before[number] = sealed(command, f"n{number}")
        assert len(before[number]) <= 1
        command.json("tick", f"n{number}")  # heals, or finds a dead run's image that might still be in the making
    time.sleep(5.5)  # the deadline of the unsealed ones
    for number in range(rounds):
        command.json("tick", f"n{number}")
        left = sealed(command, f"n{number}")
        assert len(left) == 1 and before[number] in ([], left), "one set a slot, and what was sealed stays"
        assert len(command.json("list", f"n{number}")["sets"]) == 1, "what the dead run left is gone"
    assert cut
