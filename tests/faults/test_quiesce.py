"""Pausing real writers: who is held, who is not, and that none stays stopped on any path out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from quiesce_kit import (
    MAPPER,
    NOBODY,
    READER,
    THREADED,
    TRACER,
    WRITER,
    Run,
    Zoo,
    cgroup,
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

from snapshotter.core.errors import PreconditionError, QuiesceError
from snapshotter.host import processes, quiesce

__all__ = ["cgroup", "data", "run_dir", "zoo"]

BUDGET = 60.0


def test_writers_of_every_kind_stand_still_and_go_on(data: Path, zoo: Zoo, run_dir: Path) -> None:
    zoo.writer(data / "by-fd")
    zoo.writer(data / "by-map", MAPPER)
    threaded = zoo.writer(data / "by-thread", THREADED)
    with quiesce.pause([str(data)], BUDGET, "s1") as held:
        assert stands_still(data)
        found = os.stat(data / "by-map")
        assert held.hold.mapped == {(found.st_dev, found.st_ino)}
        assert held.hold.deadline is not None and 0 < held.hold.deadline - time.monotonic() <= BUDGET
        assert state(threaded.pid) == "T"
        for thread in os.listdir(f"/proc/{threaded.pid}/task"):
            assert Path(f"/proc/{threaded.pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        assert len(watchdogs(run_dir)) == 1
    assert held.held_ms is not None and held.held_ms >= 100
    moves(data)
    assert not records(run_dir) and not watchdogs(run_dir)


def test_no_writer_at_all_is_fine(data: Path, run_dir: Path) -> None:
    with quiesce.pause([str(data)], BUDGET, "s1") as held:
        assert held.hold.mapped == frozenset()


def test_readers_shells_and_tails_are_left_alone(data: Path, zoo: Zoo, run_dir: Path, tmp_path: Path) -> None:
    (data / "log").write_text("line\n")
    shell = zoo.run("sh", "-c", "while :; do read line || exit; done", cwd=data, stdin=subprocess.PIPE)
    tail = zoo.run("tail", "-f", str(data / "log"), stdout=subprocess.DEVNULL)
    count = tmp_path / "count"
    zoo.python(READER, data / "log", count)
    until(count.exists)
    zoo.writer(data / "db")
    with quiesce.pause([str(data)], BUDGET, "s1"):
        assert state(shell.pid) == "S" and state(tail.pid) == "S"
        before = count.read_text()
        until(lambda: count.read_text() not in ("", before), "the reader to go on")


def test_who_was_stopped_before_stays_stopped(data: Path, zoo: Zoo, run_dir: Path) -> None:
    stopped = zoo.writer(data / "a")
    zoo.writer(data / "b")
    os.kill(stopped.pid, signal.SIGSTOP)
    until(lambda: state(stopped.pid) == "T")
    with quiesce.pause([str(data)], BUDGET, "s1") as held:
        assert stands_still(data)
    assert any(f"pid {stopped.pid}" in note for note in held.notes)
    moves(data)
    assert state(stopped.pid) == "T"


def test_if_somebody_continues_who_was_stopped_before_the_image_is_void(data: Path, zoo: Zoo, run_dir: Path) -> None:
    stopped = zoo.writer(data / "a")
    os.kill(stopped.pid, signal.SIGSTOP)
    until(lambda: state(stopped.pid) == "T")
    with pytest.raises(QuiesceError), quiesce.pause([str(data)], BUDGET, "s1"):
        os.kill(stopped.pid, signal.SIGCONT)
    moves(data)


@pytest.mark.parametrize("words", [(), ("--holds",)], ids=["runs", "in a stop of its tracer's"])
def test_a_traced_writer_is_refused(data: Path, zoo: Zoo, run_dir: Path, words: tuple[str, ...]) -> None:
    """Its tracer lets it go on, whatever stops it."""
    traced, other = zoo.writer(data / "a"), zoo.writer(data / "b")
    by = zoo.tracer(traced.pid, *words)
    with pytest.raises(PreconditionError) as caught, quiesce.pause([str(data)], BUDGET, "s1"):
        pytest.fail("held")
    assert f"pid {traced.pid}" in caught.value.message and f"pid {by.pid}" in caught.value.message
    assert "tracer" in caught.value.cure and state(other.pid) != "T"
    by.kill()
    until(lambda: not processes.tracer(traced.pid))
    moves(data)


def test_a_tracer_that_comes_meanwhile_voids_the_pause(data: Path, zoo: Zoo, run_dir: Path) -> None:
    writer = zoo.writer(data / "db")
    with pytest.raises(QuiesceError) as caught, quiesce.pause([str(data)], BUDGET, "s1"):
        by = zoo.tracer(writer.pid, "--holds")
    assert f"pid {writer.pid}" in caught.value.message
    by.kill()
    moves(data)


def test_we_ourselves_writing_there_is_refused(data: Path, zoo: Zoo, run_dir: Path) -> None:
    other = zoo.writer(data / "db")
    with open(data / "ours", "w"), pytest.raises(PreconditionError) as caught, quiesce.pause([str(data)], BUDGET, "s1"):
        pytest.fail("held")
    assert "ours" in caught.value.line() and caught.value.cure
    assert state(other.pid) != "T"
    moves(data)
    assert not records(run_dir) and not watchdogs(run_dir)


def test_a_parent_of_ours_writing_there_is_refused(data: Path, zoo: Zoo, run_dir: Path) -> None:
    """The operator's shell, with its log in the data path, starts the backup."""
    other = zoo.writer(data / "db")
    code = f"from snapshotter.host import quiesce\nwith quiesce.pause([{str(data)!r}], 60, 's1'): print('held')"
    shell = zoo.run(
        "sh", "-c", f'exec 9>>"{data}/log"; "$0" -c "$1" 9>&-; true', sys.executable, code, stderr=subprocess.PIPE
    )
    _, said = shell.communicate(timeout=60)
    assert b"PreconditionError" in said and b"a parent of this command" in said
    assert state(other.pid) != "T"


def test_writers_that_are_born_meanwhile_are_held_too(data: Path, zoo: Zoo, run_dir: Path) -> None:
    """Every writer lives for some ms, and hands its open file on to its successor."""
    code = f"""
import os, time
old = None
while True:
    fd = os.open({str(data)!r} + "/" + str(os.getpid() % 20), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if old is not None: os.close(old)
    for _ in range(5):
        os.write(fd, b"x"); time.sleep(0.002)
    old = fd
    if os.fork(): os._exit(0)
"""
    zoo.python(code)
    for attempt in range(8):
        moves(data)
        with quiesce.pause([str(data)], BUDGET, f"s{attempt}"):
            assert stands_still(data)


def test_a_writer_that_has_just_vforked_is_held(data: Path, zoo: Zoo, run_dir: Path, tmp_path: Path) -> None:
    """It can't stop before its child runs a program; that child has its files open, and would be stopped too."""
    source, program = tmp_path / "vforks.c", tmp_path / "vforks"
    source.write_text("""
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int count, char **words) {
    int fd = open(words[1], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    for (;;) {
        write(fd, "x", 1);
        pid_t child = vfork();
        if (child == 0) { usleep(200000); execl("/bin/true", "true", (char *)0); _exit(1); }
        waitpid(child, 0, 0);
    }
}
""")
    if subprocess.run(["cc", "-w", "-o", str(program), str(source)], check=False).returncode != 0:
        pytest.skip("no C compiler")
    zoo.run(str(program), str(data / "db"))
    until((data / "db").exists)
    for attempt in range(3):
        with quiesce.pause([str(data)], BUDGET, f"s{attempt}"):
            assert stands_still(data, 0.5)
        moves(data)


def test_a_crowd_with_children_is_held(data: Path, zoo: Zoo, run_dir: Path) -> None:
    for number in range(6):
        zoo.writer(data / f"db{number}", "import os\nos.fork(); os.fork()\n" + WRITER)
    for attempt in range(3):
        with quiesce.pause([str(data)], BUDGET, f"s{attempt}"):
            assert stands_still(data)
        moves(data)


def test_a_new_writer_during_the_pause_voids_it(data: Path, zoo: Zoo, run_dir: Path) -> None:
    zoo.writer(data / "db")
    with pytest.raises(QuiesceError), quiesce.pause([str(data)], BUDGET, "s1"):
        zoo.writer(data / "new")
    moves(data)


def test_a_held_writer_may_die(data: Path, zoo: Zoo, run_dir: Path) -> None:
    writer = zoo.writer(data / "db")
    with quiesce.pause([str(data)], BUDGET, "s1"):
        writer.kill()
        writer.wait()


def test_a_third_partys_sigcont_voids_the_pause(data: Path, zoo: Zoo, run_dir: Path) -> None:
    writer = zoo.writer(data / "db", THREADED)
    with pytest.raises(QuiesceError) as caught, quiesce.pause([str(data)], BUDGET, "s1"):
        os.kill(writer.pid, signal.SIGCONT)
        until(lambda: state(writer.pid) != "T")
    assert str(writer.pid) in caught.value.line()
    assert not records(run_dir)


def test_the_budgets_end_resumes_and_voids(data: Path, zoo: Zoo, run_dir: Path) -> None:
    writer = zoo.writer(data / "db")
    with pytest.raises(QuiesceError), quiesce.pause([str(data)], 2.0, "s1"):
        begun = time.monotonic()
        assert state(writer.pid) == "T"
        moves(data)
        assert time.monotonic() - begun < 2 + 10
    assert not records(run_dir) and not watchdogs(run_dir)


def test_an_exception_inside_lets_go_and_goes_on(data: Path, zoo: Zoo, run_dir: Path) -> None:
    zoo.writer(data / "db")
    with pytest.raises(ZeroDivisionError), quiesce.pause([str(data)], BUDGET, "s1"):
        raise ZeroDivisionError
    moves(data)
    assert not records(run_dir) and not watchdogs(run_dir)


def test_the_watchdogs_death_resumes_at_the_end_and_voids(data: Path, zoo: Zoo, run_dir: Path) -> None:
    zoo.writer(data / "db")
    with pytest.raises(QuiesceError), quiesce.pause([str(data)], BUDGET, "s1"):
        os.kill(watchdogs(run_dir)[0], signal.SIGKILL)
        until(lambda: not watchdogs(run_dir))
        assert stands_still(data)
    moves(data)
    assert not records(run_dir)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGALRM", "SIGTSTP", "SIGRTMIN"])
def test_a_signal_to_the_watchdog_lets_go(data: Path, zoo: Zoo, run_dir: Path, name: str) -> None:
    zoo.writer(data / "db")
    with pytest.raises(QuiesceError), quiesce.pause([str(data)], BUDGET, "s1"):
        os.kill(watchdogs(run_dir)[0], getattr(signal, name))
        moves(data)
    assert not records(run_dir)


def test_the_watchdog_is_out_of_our_session_and_group(data: Path, run_dir: Path) -> None:
    """Ctrl-C, a closed terminal and an out-of-memory killer go past it."""
    with quiesce.pause([str(data)], BUDGET, "s1"):
        dog = watchdogs(run_dir)[0]
        assert os.getsid(dog) == dog != os.getsid(0)
        assert os.readlink(f"/proc/{dog}/cwd") == "/"
        score = int(Path(f"/proc/{dog}/oom_score_adj").read_text())
        assert score <= int(Path("/proc/self/oom_score_adj").read_text())
        open_files = [os.readlink(f"/proc/{dog}/fd/{fd}") for fd in os.listdir(f"/proc/{dog}/fd")]
        ours = [name for name in open_files if name.startswith("/") and name != "/dev/null"]
        assert all(name.startswith(str(run_dir)) for name in ours)


def test_interrupted_anywhere_nothing_stays_stopped(data: Path, zoo: Zoo, run_dir: Path) -> None:
    """A handler that raises, at many instants from before the start to after the end."""
    writers = [zoo.writer(data / f"db{number}") for number in range(3)]

    class Stop(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        raise Stop

    begun = time.monotonic()
    with quiesce.pause([str(data)], BUDGET, "warm"):
        pass
    whole = time.monotonic() - begun
    before = signal.signal(signal.SIGALRM, handler)
    interrupted = 0
    try:
        for number in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, whole * 1.3 * (number + 1) / 40)
                with quiesce.pause([str(data)], 3.0, f"s{number}"):
                    time.sleep(whole * 0.2)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stop:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            until(lambda: all(state(writer.pid) not in ("T", "") for writer in writers), f"resumed after {number}")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted
    until(lambda: not watchdogs(run_dir), "no watchdog is left")


def test_a_second_interruption_while_letting_go(data: Path, zoo: Zoo, run_dir: Path) -> None:
    writer = zoo.writer(data / "db")
    run = Run(zoo, f"quiesce.pause([{str(data)!r}], 60, 's1')")
    assert run.hear() == "held"
    for _ in range(5):
        os.kill(run.pid, signal.SIGINT)
        time.sleep(0.003)
    run.child.wait(timeout=60)
    until(lambda: state(writer.pid) != "T")
    until(lambda: not watchdogs(run_dir))


def test_two_at_once_on_one_path_never_both_believe(data: Path, zoo: Zoo, run_dir: Path) -> None:
    """Locks keep runs apart; without them, the one that ends later is void if the other resumed its writers."""
    zoo.writer(data / "db")
    first = Run(zoo, f"quiesce.pause([{str(data)!r}], 60, 's1')", seconds=1.5)
    assert first.hear() == "held"
    with pytest.raises(QuiesceError), quiesce.pause([str(data)], BUDGET, "s2"):
        assert first.hear() == "end"
        until(lambda: not stands_still(data, 0.05))


def test_a_directory_of_threads_that_pause(data: Path, zoo: Zoo, run_dir: Path) -> None:
    """The caller may have threads of its own."""
    zoo.writer(data / "db")
    over = threading.Event()
    threads = [threading.Thread(target=over.wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with quiesce.pause([str(data)], BUDGET, "s1"):
            assert stands_still(data)
    finally:
        over.set()
    moves(data)


@pytest.mark.root
def test_a_cgroup_is_frozen_with_its_children(data: Path, zoo: Zoo, run_dir: Path, cgroup: Path) -> None:
    inside = zoo.writer(data / "inside", "import os\nos.fork()\n" + WRITER)
    deep = zoo.writer(data / "deep")
    outside = zoo.writer(data / "outside")
    (cgroup / "below").mkdir()
    for writer in processes.scan([str(data)]).writers:
        if writer.reason.endswith("inside"):
            (cgroup / "cgroup.procs").write_text(str(writer.pid))
    (cgroup / "below" / "cgroup.procs").write_text(str(deep.pid))
    with quiesce.pause([str(data)], BUDGET, "s1", cgroup=str(cgroup)):
        assert stands_still(data)
        assert "frozen 1" in (cgroup / "cgroup.events").read_text()
        assert state(outside.pid) == "T"
        assert state(inside.pid) != "T" and state(deep.pid) != "T"
    assert (cgroup / "cgroup.freeze").read_text().strip() == "0"
    for name in ("inside", "deep", "outside"):
        before = (data / name).stat().st_size
        until(lambda name=name, before=before: (data / name).stat().st_size > before, name)  # type: ignore[misc]


@pytest.mark.root
def test_a_cgroup_thawed_by_somebody_voids(data: Path, zoo: Zoo, run_dir: Path, cgroup: Path) -> None:
    writer = zoo.writer(data / "db")
    (cgroup / "cgroup.procs").write_text(str(writer.pid))
    with pytest.raises(QuiesceError), quiesce.pause([str(data)], BUDGET, "s1", cgroup=str(cgroup)):
        (cgroup / "cgroup.freeze").write_text("0")
        moves(data)


@pytest.mark.root
def test_a_writer_taken_out_of_the_frozen_cgroup_voids(data: Path, zoo: Zoo, run_dir: Path, cgroup: Path) -> None:
    writer = zoo.writer(data / "db")
    (cgroup / "cgroup.procs").write_text(str(writer.pid))
    with pytest.raises(QuiesceError), quiesce.pause([str(data)], BUDGET, "s1", cgroup=str(cgroup)):
        (cgroup.parent / "cgroup.procs").write_text(str(writer.pid))
        moves(data)


@pytest.mark.root
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_traced_writer_in_a_cgroup_is_refused_too(
    data: Path, zoo: Zoo, run_dir: Path, cgroup: Path, when: str
) -> None:
    """Stopped by its tracer at the start of a write it counts as frozen, and still does that write."""
    writer = zoo.writer(data / "db")
    (cgroup / "cgroup.procs").write_text(str(writer.pid))
    refused = PreconditionError if when == "before" else QuiesceError
    if when == "before":
        zoo.tracer(writer.pid)
    with pytest.raises(refused) as caught, quiesce.pause([str(data)], BUDGET, "s1", cgroup=str(cgroup)):
        assert when == "meanwhile"
        zoo.python(TRACER, writer.pid)
        until(lambda: processes.tracer(writer.pid))
    assert f"pid {writer.pid}" in caught.value.message
    assert (cgroup / "cgroup.freeze").read_text().strip() == "0"


@pytest.mark.root
def test_a_cgroup_frozen_before_stays_frozen(data: Path, zoo: Zoo, run_dir: Path, cgroup: Path) -> None:
    writer = zoo.writer(data / "db")
    (cgroup / "cgroup.procs").write_text(str(writer.pid))
    (cgroup / "cgroup.freeze").write_text("1")
    with quiesce.pause([str(data)], BUDGET, "s1", cgroup=str(cgroup)) as held:
        assert stands_still(data)
    assert any(str(cgroup) in note for note in held.notes)
    assert (cgroup / "cgroup.freeze").read_text().strip() == "1"
    assert stands_still(data)


@pytest.mark.root
def test_a_cgroup_with_ourselves_is_refused(data: Path, zoo: Zoo, run_dir: Path, cgroup: Path) -> None:
    code = f"""
import os
open({str(cgroup / "cgroup.procs")!r}, "w").write(str(os.getpid()))
from snapshotter.host import quiesce
with quiesce.pause([{str(data)!r}], 60, "s1", cgroup={str(cgroup)!r}): print("held")
"""
    run = zoo.python(code, stderr=subprocess.PIPE)
    _, said = run.communicate(timeout=60)
    assert b"PreconditionError" in said and b"this cgroup" in said
    assert (cgroup / "cgroup.freeze").read_text().strip() == "0"


@pytest.mark.root
@pytest.mark.parametrize("die", ["budget", "parent"])
def test_the_watchdog_thaws_a_cgroup(data: Path, zoo: Zoo, run_dir: Path, cgroup: Path, die: str) -> None:
    writer = zoo.writer(data / "db")
    (cgroup / "cgroup.procs").write_text(str(writer.pid))
    budget = 2 if die == "budget" else 60
    run = Run(zoo, f"quiesce.pause([{str(data)!r}], {budget}, 's1', cgroup={str(cgroup)!r})")
    assert run.hear() == "held"
    if die == "parent":
        run.kill()
    moves(data)
    until(lambda: not watchdogs(run_dir))


@pytest.mark.root
def test_killing_our_whole_cgroup_leaves_the_watchdog(data: Path, zoo: Zoo, run_dir: Path, cgroup: Path) -> None:
    """What a service manager does with a unit that it wants gone."""
    writer = zoo.writer(data / "db")
    run = Run(
        zoo, f"(open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0'), quiesce.pause([{str(data)!r}], 60, 's'))[1]"
    )
    assert run.hear() == "held"
    assert state(writer.pid) == "T"
    (cgroup / "cgroup.kill").write_text("1")
    run.child.wait()
    moves(data)
    until(lambda: not watchdogs(run_dir))


@pytest.fixture
def open_path(tmp_path: Path) -> Callable[[], None]:
    """Lets another user reach the test's directories."""

    def grant() -> None:
        for directory in [tmp_path, *tmp_path.parents][:3]:
            os.chmod(directory, 0o755)

    return grant


@pytest.mark.root
def test_without_root_our_own_writer_among_roots_processes(
    data: Path, zoo: Zoo, run_dir: Path, open_path: Callable[[], None]
) -> None:
    open_path()
    os.chown(data, NOBODY, NOBODY)
    os.chown(run_dir, NOBODY, NOBODY)
    os.chmod(run_dir.parent, 0o755)
    writer = zoo.writer(data / "db", uid=NOBODY)
    run = Run(zoo, f"quiesce.pause([{str(data)!r}], 60, 's1')", seconds=0.5, inside="say(held.notes)", uid=NOBODY)
    assert run.hear() == "held"
    assert state(writer.pid) == "T" and stands_still(data)
    assert "assumed not to write" in run.hear()
    assert run.hear() == "end"
    moves(data)


@pytest.mark.root
def test_without_root_anothers_open_file_is_refused(
    data: Path, zoo: Zoo, run_dir: Path, open_path: Callable[[], None]
) -> None:
    """Root's process writes into a file of ours. We can't see that it does, but the kernel says that somebody does."""
    open_path()
    os.chmod(data, 0o777)
    os.chown(data, NOBODY, NOBODY)
    os.chown(run_dir, NOBODY, NOBODY)
    os.chmod(run_dir.parent, 0o755)
    zoo.writer(data / "db")
    os.chown(data / "db", NOBODY, NOBODY)
    run = Run(zoo, f"quiesce.pause([{str(data)!r}], 60, 's1')", uid=NOBODY)
    said = run.hear()
    assert said.startswith("PreconditionError") and "run as root" in said
    moves(data)
