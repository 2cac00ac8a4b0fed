"""A signal that asks `take` to end, disk full, two at once: undone before the seal, kept after it, never half."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import Command, loop_file_system, state_of


@pytest.fixture
def data(tmp_path: Path) -> Path:
    made = tmp_path / "place" / "node"
    made.mkdir(parents=True)
    for number in range(300):
        (made / f"{number:06}.sst").write_bytes(os.urandom(50_000))
    return made


def names(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*")}


def test_a_stop_is_not_killed_by_a_signal_to_us(tmp_path: Path) -> None:
    """A `docker stop` that was killed goes on in its daemon, and the `start` that followed came too early."""
    stop = f"touch {tmp_path}/begun; sleep 1; touch {tmp_path}/ended"
    script = (
        "from snapshotter.core import interrupts\n"
        "from snapshotter.host.service import Commands\n"
        "interrupts.install()\n"
        f"Commands(('sh', '-c', {stop!r}), ('true',), ('true',)).stop()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (tmp_path / "ended").exists() and process.returncode != 0 and "interrupted by SIGTERM" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_at_random_instants(
    tmp_path: Path, data: Path, number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    times = 25 if request.config.getoption("--full") else 5
    command = Command(tmp_path / "etc")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(data / "log")])
    try:
        began = time.monotonic()
        command.json("take", str(data))
        whole_s = time.monotonic() - began
        chance = random.Random(int(number))
        for _ in range(times):
            before = {entry["set_id"] for entry in command.json("list", str(data))["sets"]}
            process = command.start("take", str(data), "--json")
            time.sleep(chance.uniform(0.05, whole_s * 1.1))
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
            assert process.returncode in (0, 9, -number), said  # -number: before Python could hear it
            assert "Traceback" not in said or process.returncode < 0, said
            assert state_of(writer.pid) not in ("T", "t")
            sets = command.json("list", str(data))["sets"]
            new = [entry for entry in sets if entry["set_id"] not in before]
            assert all(entry["good"] for entry in new), "an unsealed set is left"
            if process.returncode == 0:
                assert len(new) == 1
        said_again = command.json("reap")
        assert said_again["let_go"] == [], "an undo left something for reap"
        # reap sees every btrfs of the machine, and other runs' leftovers there: only ours count here.
        assert not list((data.parent / ".snapshotter" / "trash").iterdir())
        assert len(command.json("list", str(data))["sets"]) == len(
            list((data.parent / ".snapshotter" / "sets").iterdir())
        )
    finally:
        writer.kill()
        writer.wait()


WRITER = """
import os, sys, time
with open(sys.argv[1], "ab") as file:
    while True:
        file.write(b"x" * 100)
        file.flush()
        time.sleep(0.005)
"""


def test_two_at_once(tmp_path: Path, data: Path) -> None:
    """One of them takes; the other takes after it, or says that it is locked. Never a third outcome."""
    command = Command(tmp_path / "etc")
    both = [command.start("take", str(data), "--json") for _ in range(3)]
    codes = sorted((process.communicate(timeout=120), process.returncode)[1] for process in both)
    assert codes[0] == 0 and set(codes) <= {0, 5}, codes
    sets = command.json("list", str(data))["sets"]
    assert len(sets) == codes.count(0) and all(entry["good"] for entry in sets)


def test_delete_and_take_at_once(tmp_path: Path, data: Path) -> None:
    """A set that a take shares from is deleted meanwhile: each ends well or says busy, and what is listed is whole."""
    command = Command(tmp_path / "etc")
    for _ in range(3):
        first = command.json("take", str(data))["set_id"]
        process = command.start("take", str(data), "--json")
        time.sleep(0.15)
        done = command.run("delete", first, "--yes", "--last")
        assert done.returncode in (0, 5), done.stderr
        process.communicate(timeout=120)
        assert process.returncode in (0, 5)
        if process.returncode == 5:  # the delete was first
            command.json("take", str(data))
        assert all(entry["good"] for entry in command.json("list", str(data))["sets"])
        latest = command.json("list", str(data))["sets"][-1]["set_id"]
        clone = tmp_path / "clone"
        command.json("restore", latest, "--to", str(clone))
        assert names(clone) == names(data)
        command.json("release", str(clone))


@pytest.mark.root
def test_disk_full_while_restoring(tmp_path: Path, data: Path) -> None:
    """ENOSPC in the middle of a clone: one line, and nothing of the clone is left."""
    command = Command(tmp_path / "etc")
    identity = command.json("take", str(data))["set_id"]
    with loop_file_system("ext4", tmp_path, 12) as small:
        error = command.error("restore", identity, "--to", str(small / "clone"), exit_code=6)
        assert "full" in error["line"] or "space" in error["line"]
        assert names(small) <= {"lost+found"}
    assert command.json("show", identity)["attachments"] == []
