"""Stopping a service by its commands, and hooks: put back on every path out."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from quiesce_kit import Run, Zoo, data, moves, records, run_dir, stands_still, until, watchdogs, zoo

from snapshotter.core.errors import PreconditionError, QuiesceError, StorageError, UndoIncompleteError
from snapshotter.host import quiesce
from snapshotter.host.service import Commands

__all__ = ["data", "run_dir", "zoo"]

#: A small service manager: start, stop, status of a process that writes into the data path.
MANAGER = """
import os, signal, subprocess, sys, time
action, home, data = sys.argv[1:4]
pid_file, log = os.path.join(home, "pid"), os.path.join(home, "log")
def running():
    try: pid = int(open(pid_file).read()); os.kill(pid, 0)
    except (OSError, ValueError): return None
    return None if open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z" else pid
open(log, "a").write(action + "\\n")
if os.path.exists(os.path.join(home, "fail-" + action)): sys.exit("no " + action + " today")
if action == "status": sys.exit(0 if running() else 3)
if action == "start" and not running():
    code = "import os, sys, time\\nfd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)\\n"
    code += "while True: os.write(fd, b'x'); time.sleep(0.002)"
    child = subprocess.Popen([sys.executable, "-c", code, os.path.join(data, "db")], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    open(pid_file, "w").write(str(child.pid))
    while not os.path.exists(os.path.join(data, "db")): time.sleep(0.01)
if action == "stop" and (pid := running()):
    os.kill(pid, signal.SIGKILL)
    while running(): time.sleep(0.01)
"""


class Managed:
    def __init__(self, home: Path, data: Path) -> None:
        home.mkdir()
        self.home, self.data = home, data
        script = home / "manager.py"
        script.write_text(MANAGER)

        def argv(action: str) -> tuple[str, ...]:
            return (sys.executable, str(script), action, str(home), str(data))

        self.service = Commands(argv("stop"), argv("start"), argv("status"))

    @property
    def expression(self) -> str:
        service = self.service
        return f"service.Commands({service.stop_argv!r}, {service.start_argv!r}, {service.status_argv!r})"

    def did(self) -> list[str]:
        return [action for action in (self.home / "log").read_text().split() if action != "status"]


@pytest.fixture
def managed(tmp_path: Path, data: Path) -> Iterator[Managed]:
    managed = Managed(tmp_path / "home", data)
    managed.service.start()
    yield managed
    for name in ("fail-stop", "fail-status"):
        (managed.home / name).unlink(missing_ok=True)
    managed.service.stop()


def test_a_service_is_stopped_and_started_again(managed: Managed, data: Path, run_dir: Path) -> None:
    with quiesce.stop(managed.service, "s1", paths=[str(data)]):
        assert not managed.service.running()
        assert stands_still(data)
        assert len(watchdogs(run_dir)) == 1
    assert managed.service.running()
    moves(data)
    assert not records(run_dir) and not watchdogs(run_dir)


def test_one_that_was_stopped_stays_stopped(managed: Managed, data: Path, run_dir: Path) -> None:
    managed.service.stop()
    with quiesce.stop(managed.service, "s1", paths=[str(data)]) as held:
        pass
    assert not managed.service.running()
    assert held.notes


def test_an_exception_inside_starts_it(managed: Managed, data: Path, run_dir: Path) -> None:
    with pytest.raises(ZeroDivisionError), quiesce.stop(managed.service, "s1", paths=[str(data)]):
        raise ZeroDivisionError
    moves(data)


def test_another_writer_left_is_refused_and_it_is_started(
    managed: Managed, data: Path, run_dir: Path, zoo: Zoo
) -> None:
    other = zoo.writer(data / "other")
    with pytest.raises(PreconditionError) as caught, quiesce.stop(managed.service, "s1", paths=[str(data)]):
        pytest.fail("held")
    assert str(other.pid) in caught.value.line()
    assert managed.service.running() and not records(run_dir)


def test_started_by_somebody_meanwhile_is_void(managed: Managed, data: Path, run_dir: Path) -> None:
    with pytest.raises(QuiesceError), quiesce.stop(managed.service, "s1", paths=[str(data)]):
        managed.service.start()
    assert managed.service.running()


def test_one_that_will_not_stop(managed: Managed, data: Path, run_dir: Path) -> None:
    (managed.home / "fail-stop").touch()
    with pytest.raises(StorageError, match="no stop today"), quiesce.stop(managed.service, "s1", paths=[str(data)]):
        pytest.fail("held")
    assert managed.service.running() and not records(run_dir)


def test_one_that_will_not_start_is_named_and_reap_tries_again(managed: Managed, data: Path, run_dir: Path) -> None:
    with pytest.raises(UndoIncompleteError) as caught, quiesce.stop(managed.service, "s1", paths=[str(data)]):
        (managed.home / "fail-start").touch()
    assert caught.value.left and "manager.py" in caught.value.left[0]
    assert records(run_dir)
    # The record stays for reap; its owner is this very process, so another one can't take it before our end.
    assert quiesce.reap() == []


def test_a_status_that_is_neither_is_refused(managed: Managed, data: Path, run_dir: Path) -> None:
    (managed.home / "fail-status").touch()
    with (
        pytest.raises(PreconditionError, match="status command exits 1"),
        quiesce.stop(managed.service, "s1", paths=[str(data)]),
    ):
        pytest.fail("held")
    assert managed.did() == ["start"]


@pytest.mark.parametrize("die", ["budget", "parent", "watchdog", "both"])
def test_it_is_started_whoever_dies(managed: Managed, data: Path, run_dir: Path, zoo: Zoo, die: str) -> None:
    budget = 4 if die == "budget" else 300
    seconds = 1.5 if die == "watchdog" else 600
    run = Run(zoo, f"quiesce.stop({managed.expression}, 's1', {budget}, [{str(data)!r}])", seconds=seconds)
    assert run.hear() == "held"
    if die in ("watchdog", "both"):
        os.kill(watchdogs(run_dir)[0], signal.SIGKILL)
    if die in ("parent", "both"):
        run.kill()
    if die == "both":
        assert not managed.service.running()
        assert len(quiesce.reap()) == 1
    if die == "watchdog":
        assert run.hear().startswith("QuiesceError")
    until(managed.service.running)
    moves(data)


def hook(home: Path, name: str, code: int = 0) -> tuple[str, ...]:
    return ("sh", "-c", f'echo {name} >> "{home}/hooks"; exit {code}')


def called(home: Path) -> list[str]:
    path = home / "hooks"
    return path.read_text().split() if path.exists() else []


def test_hooks_hold_and_release(tmp_path: Path, run_dir: Path) -> None:
    with quiesce.hooks(hook(tmp_path, "hold"), hook(tmp_path, "release"), 60, "s1"):
        assert called(tmp_path) == ["hold"]
    assert called(tmp_path) == ["hold", "release"]
    assert not records(run_dir) and not watchdogs(run_dir)


def test_a_hold_hook_that_fails_is_released(tmp_path: Path, run_dir: Path) -> None:
    with (
        pytest.raises(PreconditionError),
        quiesce.hooks(hook(tmp_path, "hold", 1), hook(tmp_path, "release"), 60, "s1"),
    ):
        pytest.fail("held")
    assert called(tmp_path) == ["hold", "release"]
    assert not records(run_dir)


def test_a_hold_hook_that_is_not_there(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(PreconditionError), quiesce.hooks(["/no/such"], hook(tmp_path, "release"), 60, "s1"):
        pytest.fail("held")
    assert called(tmp_path) == ["release"]


def test_a_release_hook_that_fails_voids(tmp_path: Path, run_dir: Path) -> None:
    with (
        pytest.raises(UndoIncompleteError) as caught,
        quiesce.hooks(hook(tmp_path, "hold"), hook(tmp_path, "release", 1), 60, "s1"),
    ):
        pass
    assert caught.value.left


def test_release_runs_after_an_exception(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(ZeroDivisionError), quiesce.hooks(hook(tmp_path, "hold"), hook(tmp_path, "release"), 60, "s1"):
        raise ZeroDivisionError
    assert called(tmp_path) == ["hold", "release"]


@pytest.mark.parametrize("die", ["budget", "parent", "watchdog", "both"])
def test_release_runs_whoever_dies(tmp_path: Path, run_dir: Path, zoo: Zoo, die: str) -> None:
    budget = 2 if die == "budget" else 300
    seconds = 1.5 if die == "watchdog" else 600
    hold, release = hook(tmp_path, "hold"), hook(tmp_path, "release")
    run = Run(zoo, f"quiesce.hooks({hold!r}, {release!r}, {budget}, 's1')", seconds=seconds)
    assert run.hear() == "held"
    if die in ("watchdog", "both"):
        os.kill(watchdogs(run_dir)[0], signal.SIGKILL)
    if die in ("parent", "both"):
        run.kill()
    if die == "both":
        time.sleep(0.2)
        assert called(tmp_path) == ["hold"]
        assert len(quiesce.reap()) == 1
    until(lambda: "release" in called(tmp_path))
