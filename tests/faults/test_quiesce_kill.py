"""SIGKILL of the run, of its watchdog, of both: nobody stays stopped, frozen or down after `reap`."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from quiesce_kit import (
    Disk,
    Run,
    Zoo,
    data,
    disk,
    moves,
    records,
    run_dir,
    state,
    until,
    watchdogs,
    zoo,
)

from snapshotter.host import quiesce

__all__ = ["data", "disk", "run_dir", "zoo"]


def instants(request: pytest.FixtureRequest, sampled: int) -> list[float]:
    """Shares of a run's length at which to kill; the same in every run of the tests."""
    count = 40 if request.config.getoption("--full", default=False) else sampled
    return [random.Random(number).random() for number in range(count)]


def pause_of(data: Path, budget: float = 60) -> str:
    return f"quiesce.pause([{str(data)!r}], {budget}, 's1')"


def test_the_run_is_killed(data: Path, zoo: Zoo, run_dir: Path) -> None:
    writer = zoo.writer(data / "db")
    run = Run(zoo, pause_of(data))
    assert run.hear() == "held" and state(writer.pid) == "T"
    run.kill()
    moves(data)
    until(lambda: not watchdogs(run_dir))
    assert not records(run_dir) and quiesce.leftovers() == []


def test_a_grandchild_with_our_descriptors_does_not_keep_the_watchdog_from_seeing(
    data: Path, zoo: Zoo, run_dir: Path
) -> None:
    """A forked child keeps the pipe open, as a worker process would."""
    zoo.writer(data / "db")
    run = Run(zoo, pause_of(data), seconds=0, inside="__import__('os').fork(); time.sleep(600)")
    assert run.hear() == "held"
    time.sleep(0.2)
    run.kill()
    moves(data)


def test_the_watchdog_is_killed_and_then_the_run(data: Path, zoo: Zoo, run_dir: Path) -> None:
    writer = zoo.writer(data / "db")
    run = Run(zoo, pause_of(data))
    assert run.hear() == "held"
    os.kill(watchdogs(run_dir)[0], signal.SIGKILL)
    until(lambda: not watchdogs(run_dir))
    assert quiesce.leftovers() == [] and quiesce.reap() == []  # its run lives
    run.kill()
    assert state(writer.pid) == "T"
    assert len(quiesce.leftovers()) == 1
    assert len(quiesce.reap()) == 1
    moves(data)
    assert not records(run_dir) and quiesce.leftovers() == [] and quiesce.reap() == []


def test_reap_leaves_a_living_watchdog_its_record(data: Path, zoo: Zoo, run_dir: Path) -> None:
    zoo.writer(data / "db")
    run = Run(zoo, pause_of(data))
    assert run.hear() == "held"
    dog = watchdogs(run_dir)[0]
    os.kill(dog, signal.SIGSTOP)
    until(lambda: state(dog) == "T")
    run.kill()
    assert quiesce.reap() == []
    os.kill(dog, signal.SIGCONT)
    moves(data)
    until(lambda: not watchdogs(run_dir))


@pytest.mark.parametrize("who", ["run", "watchdog", "both"])
def test_killed_at_random_instants(
    data: Path, zoo: Zoo, run_dir: Path, request: pytest.FixtureRequest, who: str
) -> None:
    writers = [zoo.writer(data / f"db{number}") for number in range(3)]
    begun = time.monotonic()
    whole = Run(zoo, pause_of(data), seconds=0.1)
    ran = time.monotonic()
    assert whole.hear() == "held" and whole.hear() == "end"
    length = time.monotonic() - ran
    assert ran > begun
    for share in instants(request, 8):
        run = Run(zoo, pause_of(data), seconds=0.1)
        time.sleep(share * length * 1.2)
        dogs = watchdogs(run_dir)
        if who != "run":
            for dog in dogs:
                try:
                    os.kill(dog, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        if who == "watchdog":
            run.child.wait(timeout=60)
        else:
            run.kill()
        until(lambda: not watchdogs(run_dir), "the watchdog's end")
        quiesce.reap()
        assert not records(run_dir)
        for writer in writers:
            assert state(writer.pid) not in ("T", ""), share


@pytest.mark.root
@pytest.mark.parametrize("who", ["run", "watchdog", "both"])
def test_killed_while_file_systems_are_frozen(
    disk: Callable[[], Disk], zoo: Zoo, run_dir: Path, request: pytest.FixtureRequest, who: str
) -> None:
    disks = [disk(), disk()]
    held = f"quiesce.freeze({[str(one.path) for one in disks]!r}, 60, 's1')"
    whole = Run(zoo, held, seconds=0.1)
    ran = time.monotonic()
    assert whole.hear() == "held" and whole.hear() == "end"
    length = time.monotonic() - ran
    for share in instants(request, 5):
        run = Run(zoo, held, seconds=0.1)
        time.sleep(share * length * 1.2)
        if who != "run":
            for dog in watchdogs(run_dir):
                try:
                    os.kill(dog, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        if who == "watchdog":
            run.child.wait(timeout=60)
        else:
            run.kill()
        until(lambda: not watchdogs(run_dir), "the watchdog's end")
        quiesce.reap()
        assert not records(run_dir)
        assert not any(one.frozen() for one in disks), share
