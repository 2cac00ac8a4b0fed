"""The record of a quiesce and its one inverse: torn lines, reused pids, other boots, two reaps at once."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quiesce_kit import Zoo, data, moves, records, run_dir, stands_still, state, until, zoo

from snapshotter.core.errors import PreconditionError, UndoIncompleteError
from snapshotter.host import processes, quiesce, watchdog

__all__ = ["data", "run_dir", "zoo"]

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
NAMESPACE = str(os.stat("/proc/self/ns/pid").st_ino)


def dead() -> tuple[str, str]:
    """A process that was."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    begun = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    os.waitpid(pid, 0)
    return str(pid), begun


def record(run: Path, *lines: bytes, owner: tuple[str, str] | None = None, boot: str = BOOT) -> Path:
    path = run / "quiesce" / "s1.0"
    path.parent.mkdir(exist_ok=True, mode=0o700)
    path.write_bytes(watchdog.line("owner", *(owner or dead()), boot, NAMESPACE, "5", "s1") + b"".join(lines))
    return path


def stop(zoo: Zoo, data: Path) -> processes.Identity:
    """A writer that somebody stopped."""
    child = zoo.writer(data / "db")
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: state(child.pid) == "T")
    found = processes.identity(child.pid)
    assert found is not None
    return found


def cont(who: processes.Identity, off: int = 0) -> bytes:
    return watchdog.line("cont", str(who[0]), str(who[1] + off))


@given(st.lists(st.binary().filter(lambda raw: b"\0" not in raw).map(os.fsdecode), min_size=1))
def test_a_line_keeps_its_words(parts: list[str]) -> None:
    line = watchdog.line(*parts)
    assert line.count(b"\n") == 1 and line.isascii()
    assert watchdog.words(line.strip(b"\n").removesuffix(b" ;")) == parts


@given(st.integers(0, 200), st.lists(st.text("ab %\n/.;", min_size=1), min_size=1, max_size=4))
def test_a_line_cut_short_is_not_there_and_spoils_no_other(cut: int, parts: list[str]) -> None:
    whole = watchdog.line("run", *parts)
    torn = whole[: cut % len(whole)]
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(watchdog.line("owner", "1") + torn + watchdog.line("fired", "x"))
        assert watchdog.read_record(file.name) == [["owner", "1"], ["fired", "x"]]


def test_a_pid_that_is_another_process_now_gets_no_signal(data: Path, zoo: Zoo, run_dir: Path) -> None:
    who = stop(zoo, data)
    record(run_dir, cont(who, off=1))
    assert len(quiesce.reap()) == 1
    assert stands_still(data) and state(who[0]) == "T"
    assert not records(run_dir)


def test_a_torn_last_line_is_safe(data: Path, zoo: Zoo, run_dir: Path) -> None:
    who = stop(zoo, data)
    record(run_dir, cont(who), b"\ncont 1")
    assert len(quiesce.reap()) == 1
    moves(data)


def test_all_that_is_gone_already_is_fine(run_dir: Path) -> None:
    record(
        run_dir,
        cont((int(dead()[0]), 1)),
        watchdog.line("unfreeze", "/no/such/cgroup"),
        watchdog.line("thaw", "/no/such/mount", "1"),
        watchdog.line("thaw", "/", str(os.stat("/").st_dev + 1)),
        watchdog.line("run", "true"),
    )
    assert len(quiesce.reap()) == 1
    assert not records(run_dir)


def test_a_cancelled_act_is_not_undone(tmp_path: Path, run_dir: Path) -> None:
    record(
        run_dir,
        watchdog.line("run", "touch", str(tmp_path / "first")),
        watchdog.line("run", "touch", str(tmp_path / "second")),
        watchdog.line("not"),
    )
    quiesce.reap()
    assert (tmp_path / "first").exists() and not (tmp_path / "second").exists()


def test_undone_newest_first_and_a_failure_stops_no_other(data: Path, zoo: Zoo, tmp_path: Path, run_dir: Path) -> None:
    who = stop(zoo, data)
    log = tmp_path / "log with blank"
    path = record(
        run_dir,
        cont(who),
        watchdog.line("run", "sh", "-c", 'echo 1 >> "$0"', str(log)),
        watchdog.line("run", "false"),
        watchdog.line("run", "sh", "-c", 'echo 2 >> "$0"', str(log)),
        watchdog.line("run", "/no/such/program"),
    )
    with pytest.raises(UndoIncompleteError) as caught:
        quiesce.reap()
    assert len(caught.value.left) == 2
    assert log.read_text().split() == ["2", "1"]
    moves(data)
    assert path.exists()  # for the next try


def test_a_record_of_another_boot_is_only_removed(data: Path, zoo: Zoo, run_dir: Path, tmp_path: Path) -> None:
    who = stop(zoo, data)
    record(run_dir, cont(who), watchdog.line("run", "touch", str(tmp_path / "ran")), boot="another")
    assert quiesce.leftovers() == []
    assert quiesce.reap() == []
    assert state(who[0]) == "T" and not (tmp_path / "ran").exists() and not records(run_dir)


def test_a_record_whose_owner_lives_is_left_alone(data: Path, zoo: Zoo, run_dir: Path) -> None:
    who = stop(zoo, data)
    me = processes.identity(os.getpid())
    assert me is not None
    record(run_dir, cont(who), owner=(str(me[0]), str(me[1])))
    assert quiesce.reap() == [] and quiesce.leftovers() == []
    assert state(who[0]) == "T" and records(run_dir)


def test_a_record_that_somebody_is_undoing_is_left_to_him(data: Path, zoo: Zoo, run_dir: Path) -> None:
    who = stop(zoo, data)
    path = record(run_dir, cont(who))
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert quiesce.reap() == []
    assert len(quiesce.reap()) == 1


def test_many_reaps_at_once_undo_once(tmp_path: Path, run_dir: Path) -> None:
    record(run_dir, watchdog.line("run", "sh", "-c", 'echo x >> "$0"; sleep 0.3', str(tmp_path / "log")))
    done: list[str] = []
    threads = [threading.Thread(target=lambda: done.extend(quiesce.reap())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1 and (tmp_path / "log").read_text() == "x\n"


def test_a_record_without_a_first_line_goes_when_it_is_old(run_dir: Path) -> None:
    path = record(run_dir)
    path.write_bytes(b"")
    assert quiesce.reap() == [] and path.exists()
    os.utime(path, (1, 1))
    assert quiesce.reap() == [] and not path.exists()


def test_leftovers_changes_nothing(data: Path, zoo: Zoo, run_dir: Path) -> None:
    who = stop(zoo, data)
    record(run_dir, cont(who))
    (found,) = quiesce.leftovers()
    assert str(who[0]) in found
    assert state(who[0]) == "T" and records(run_dir)


@pytest.mark.root
def test_no_room_for_the_record_and_nothing_is_held(
    data: Path, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(small)], check=True)
    try:
        (small / "full").write_bytes(b"x" * 4096)
        monkeypatch.setenv("SNAPSHOTTER_RUN", str(small / "run"))
        writer = zoo.writer(data / "db")
        with pytest.raises(PreconditionError), quiesce.pause([str(data)], 60, "s1"):
            pytest.fail("held")
        assert state(writer.pid) != "T"
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_bad_paths_are_one_line(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(PreconditionError) as caught, quiesce.pause([str(tmp_path / "no")], 60, "s1"):
        pytest.fail("held")
    assert str(tmp_path / "no") in caught.value.line()
    assert not records(run_dir)
