"""su, runuser, script and sudo stop themselves when what they run is stopped: they go on as well, on every path out."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from quiesce_kit import (
    NOBODY,
    WRITER,
    Run,
    Zoo,
    data,
    moves,
    records,
    run_dir,
    stands_still,
    state,
    until,
    watchdogs,
    zoo,
)

from snapshotter.core.errors import UndoIncompleteError
from snapshotter.host import proc, processes, quiesce

__all__ = ["data", "run_dir", "zoo"]

pytestmark = pytest.mark.root
BUDGET = 60.0
WRAPPERS = {
    "su": ["su", "root", "-s", "/bin/sh", "-c", "exec {}"],
    "runuser": ["runuser", "-u", "root", "--", "sh", "-c", "exec {}"],
    "runuser, with a terminal": ["runuser", "-P", "-u", "root", "--", "sh", "-c", "exec {}"],
    "script": ["script", "-q", "-c", "exec {}", "/dev/null"],
    "one in another": ["script", "-q", "-c", "exec su root -s /bin/sh -c 'exec {}'", "/dev/null"],
}
#: As sudo: told by a pipe that its child stopped, and late, it stops its whole process group.
LATE = """
import os, signal, subprocess, sys, time
open("/proc/self/comm", "w").write("sudo")
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], start_new_session=True)
beside = subprocess.Popen(["sleep", "9999"])
while True:
    if os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1]):
        until = time.monotonic() + float(sys.argv[3])
        while time.monotonic() < until: pass
        os.killpg(0, signal.SIGSTOP)
        os.kill(child.pid, signal.SIGCONT)
"""


@pytest.fixture(autouse=True)
def nobody_stays(zoo: Zoo) -> Iterator[None]:
    """What runs a program as su does outlives nobody's end: each of our descendants is ended by itself."""
    before = set(descendants())
    yield
    for pid in set(descendants()) - before:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants() -> list[int]:
    return [pid for pid in proc.pids() if os.getpid() in processes.ancestors(pid)]


@pytest.fixture(params=WRAPPERS)
def chain(request: pytest.FixtureRequest, data: Path, zoo: Zoo) -> list[int]:
    """A writer, and those of its ancestors that stop with it."""
    (data.parent / "writer.py").write_text(WRITER)
    command = f"{sys.executable} {data.parent}/writer.py {data}/db"
    zoo.run(*(word.format(command) for word in WRAPPERS[request.param]), stdin=-3, stdout=-3)
    return chain_of(data)


def chain_of(data: Path) -> list[int]:
    def writers() -> list[int]:
        return [one.pid for one in processes.scan([str(data)]).writers if one.reason.endswith("/db")]

    until(writers, "a writer")
    (writer,) = writers()
    above = processes.ancestors(writer)
    return [writer, *above[: above.index(os.getpid())]]


def all_run(chain: list[int], data: Path) -> None:
    """Now, and still when a late one has had its time."""
    for _ in range(20):
        assert all(state(pid) in "SRD" for pid in chain), [state(pid) for pid in chain]
        time.sleep(0.01)
    moves(data)


def test_control_they_stay_stopped_by_themselves(chain: list[int], zoo: Zoo) -> None:
    os.kill(chain[0], signal.SIGSTOP)
    until(lambda: all(state(pid) == "T" for pid in chain))
    os.kill(chain[0], signal.SIGCONT)
    time.sleep(0.3)
    assert state(chain[0]) != "T" and all(state(pid) == "T" for pid in chain[1:])


def test_they_go_on_at_the_end(chain: list[int], data: Path, run_dir: Path) -> None:
    for number in range(5):
        with quiesce.pause([str(data)], BUDGET, f"s{number}") as held:
            assert stands_still(data, 0.1 if number else 0)
        assert not any("was stopped already" in note for note in held.notes)
        all_run(chain, data)
    assert not records(run_dir) and not watchdogs(run_dir)


@pytest.mark.parametrize("die", ["budget", "parent", "watchdog", "both"])
def test_they_go_on_whoever_dies(chain: list[int], data: Path, zoo: Zoo, run_dir: Path, die: str) -> None:
    budget = 2 if die == "budget" else 60
    run = Run(zoo, f"quiesce.pause([{str(data)!r}], {budget}, 's1')", seconds=1 if die == "watchdog" else 600)
    assert run.hear() == "held"
    until(lambda: all(state(pid) == "T" for pid in chain) or die == "budget")
    if die in ("watchdog", "both"):
        os.kill(watchdogs(run_dir)[0], signal.SIGKILL)
    if die in ("parent", "both"):
        run.kill()
    if die == "both":
        assert all(state(pid) == "T" for pid in chain)
        assert len(quiesce.reap()) == 1
    if die == "watchdog":
        assert run.hear().startswith("QuiesceError")
    until(lambda: not watchdogs(run_dir))
    until(lambda: not any(state(pid) == "T" for pid in chain))
    all_run(chain, data)


def test_one_that_was_stopped_before_stays_stopped(data: Path, zoo: Zoo, run_dir: Path) -> None:
    shell = zoo.python(
        "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])", "-c", WRITER, data / "db"
    )
    chain = chain_of(data)
    assert chain[1] == shell.pid
    os.kill(shell.pid, signal.SIGSTOP)
    until(lambda: state(shell.pid) == "T")
    with quiesce.pause([str(data)], BUDGET, "s1"):
        pass
    moves(data)
    assert state(shell.pid) == "T"


@pytest.mark.parametrize("late_s", [0.0, 0.2])
def test_a_group_that_is_stopped_late_goes_on(data: Path, zoo: Zoo, run_dir: Path, late_s: float) -> None:
    zoo.python(LATE, WRITER, data / "db", late_s)
    chain = chain_of(data)
    beside = [int(pid) for pid in Path(f"/proc/{chain[1]}/task/{chain[1]}/children").read_text().split()]
    with quiesce.pause([str(data)], BUDGET, "s1"):
        assert stands_still(data, 0.02)
    all_run([*chain, *beside], data)


def test_a_wrapper_that_is_a_writer_itself(data: Path, zoo: Zoo, run_dir: Path) -> None:
    """Stopped because of us before we come to it: that isn't 'stopped already'."""
    (data.parent / "writer.py").write_text(WRITER)
    command = f"exec {sys.executable} {data.parent}/writer.py {data}/db"
    zoo.run("script", "-q", "-c", command, str(data / "typescript"), stdin=-3, stdout=-3)
    chain = chain_of(data)
    for number in range(5):
        with quiesce.pause([str(data)], BUDGET, f"s{number}") as held:
            assert stands_still(data)
        assert not any("was stopped already" in note for note in held.notes)
        all_run(chain, data)


def test_who_stops_again_and_again_is_named(data: Path, zoo: Zoo, run_dir: Path) -> None:
    code = "import os, signal, sys\n" + WRITER.replace(
        "while True:", "signal.signal(18, lambda *_: os.kill(os.getpid(), 19))\nwhile True:"
    )
    (data.parent / "writer.py").write_text(code)
    zoo.run("su", "root", "-s", "/bin/sh", "-c", f"exec {sys.executable} {data.parent}/writer.py {data}/db")
    writer, _ = chain_of(data)
    with pytest.raises(UndoIncompleteError) as caught, quiesce.pause([str(data)], BUDGET, "s1"):
        pass
    assert any(f"process {writer}" in one for one in caught.value.left)


def test_who_stands_beside_a_writer_stays_as_others_left_it(data: Path, zoo: Zoo, run_dir: Path) -> None:
    """In the process group of one script: another take may have stopped it meanwhile, or its operator."""
    code = "import subprocess, sys\nsubprocess.Popen(['sleep', '99'])\nsubprocess.run([sys.executable, *sys.argv[1:]])"
    script = zoo.python(code, "-c", WRITER, data / "db")
    chain = chain_of(data)
    (beside,) = {pid for pid in descendants() if script.pid in processes.ancestors(pid)} - set(chain)
    with quiesce.pause([str(data)], BUDGET, "s1"):
        os.kill(beside, signal.SIGSTOP)
        until(lambda: state(beside) == "T")
    moves(data)
    time.sleep(0.1)
    assert state(beside) == "T"


def test_one_that_its_terminal_keeps_stopped_is_no_failure(data: Path, zoo: Zoo, run_dir: Path) -> None:
    """An interactive shell takes its terminal back when its job stops: who reads from that then is as after Ctrl-Z."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    try:
        os.write(terminal, f"cat > {data}/db\n".encode())
        chain = chain_of(data)
        with quiesce.pause([str(data)], BUDGET, "s1"):
            assert state(chain[0]) == "T"
        assert not records(run_dir) and quiesce.reap() == []
    finally:
        os.kill(pid, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(pid, 0)


def test_without_root_one_that_we_could_not_let_go_on_is_refused(data: Path, zoo: Zoo, run_dir: Path) -> None:
    for directory in list(data.parents)[:3]:
        os.chmod(directory, 0o755)
    os.chmod(run_dir.parent, 0o755)
    for path in (data, run_dir):
        os.chown(path, NOBODY, NOBODY)
    (data.parent / "writer.py").write_text(WRITER)
    zoo.run("runuser", "-u", "nobody", "--", "/usr/bin/python3", str(data.parent / "writer.py"), str(data / "db"))
    chain = chain_of(data)
    run = Run(zoo, f"quiesce.pause([{str(data)!r}], 60, 's1')", uid=NOBODY)
    said = run.hear()
    assert said.startswith("PreconditionError") and f"runuser (pid {chain[1]})" in said and "run as root" in said
    all_run(chain, data)
