"""Databases under load on LVM, taken hot by the command: every image opens with all that had been acknowledged. And the
control: two volumes without the pause are no backup."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.lvm_kit import Storage, lvm, make_file_system, marks, storage
from tests.support import Command, Node, check_database

pytestmark = marks
KEPT = 3
#: And how many hot takes without --full.
KINDS = [("thin", "xfs", 3), ("classic", "ext4", 3), ("thin", "ext4", 1), ("classic", "xfs", 1)]
POSTGRES = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="module")
def group() -> Iterator[Storage]:
    with storage(7000, pool_mb=3600, metadata_mb=16) as made:
        yield made


@contextlib.contextmanager
def disk(made: Storage, name: str, how: str, kind: str, where: Path, megabytes: int = 900) -> Iterator[Path]:
    """A volume with a file system, mounted; gone afterwards with all that is of it."""
    (made.thin if how == "thin" else made.linear)(name, megabytes)
    make_file_system(f"/dev/{made.vg}/{name}", kind)
    point = where / name
    point.mkdir()
    lvm("mount", f"/dev/{made.vg}/{name}", str(point))
    try:
        yield point
    finally:
        lvm("umount", str(point), check=False)
        names = [row["lv_name"] for row in made.lvs("lv_name,origin") if row["origin"] == name]
        lvm("lvremove", "-qq", "-y", *(f"{made.vg}/{each}" for each in [*names, name]), check=False)


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(f"/tmp/h{os.getpid()}")
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def config(node: Path, how: str) -> str:
    """The node as an operator configures it; the load is heavier than the default's measure of a day allows for."""
    size = "" if how == "thin" else 'options = {size = "400m"}\n'
    return f'[node.n]\npath = "{node}"\nprovider = "lvm"\nprofile = "generic"\n{size}'


def rounds(request: pytest.FixtureRequest, usual: int, full: int) -> int:
    return full if request.config.getoption("--full") else usual


Check = Callable[[Path], dict[str, int]]


class Said:
    """A line for each turn with its steps in seconds, past pytest's capture: an hour without a word says nothing."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.capture = request.config.pluginmanager.getplugin("capturemanager")
        self.began = time.monotonic()
        self.steps: list[str] = []

    def step(self, name: str) -> None:
        now = time.monotonic()
        self.steps.append(f"{name} {now - self.began:.0f}")
        self.began = now

    def turn(self, number: int) -> None:
        with self.capture.global_and_fixture_disabled():
            print(f"turn {number}, s: {', '.join(self.steps)}", flush=True)
        self.steps.clear()


def hot_takes(
    said: Said, command: Command, place: Path, acknowledged: Callable[[], int], check: Check, times: int
) -> None:
    for turn in range(times):
        before = acknowledged()
        taken = command.json("take", "n", timeout=600)
        assert taken["good"] and taken["grade"] == "filesystem" and taken["quiesce"] == "none", taken
        said.step("take")
        clone = place / f"clone-{turn}"
        command.json("restore", taken["set_id"], "--to", str(clone), timeout=600)
        said.step("restore")
        found = check(clone)
        said.step("open")
        assert found["lost"] == 0 and found["head"] >= before, f"take {turn}: {found}, acknowledged {before}"
        command.json("release", str(clone), "--discard-changes", timeout=600)
        said.step("release")
        sets = command.json("list")["sets"]
        assert all(entry["good"] for entry in sets)
        if len(sets) > KEPT:
            command.json("delete", sets[0]["set_id"], "--yes", timeout=600)
        assert acknowledged() > before, "the node must go on"
        said.step("list and delete")
        said.turn(turn)


@pytest.mark.parametrize(("how", "kind", "usual"), KINDS)
def test_rocksdb(group: Storage, place: Path, how: str, kind: str, usual: int, request: pytest.FixtureRequest) -> None:
    with disk(group, "rocks", how, kind, place) as point:
        node = Node(point / "data", "--rate", "1", "--fill", "10", "--kept", "1000")
        try:
            node.wait_for(20, timeout=300)
            command = Command(place / "etc", config=config(node.data, how))
            hot_takes(Said(request), command, place, node.acknowledged, check_database, rounds(request, usual, 20))
        finally:
            node.kill()


# ------------------------------------------------------------------------------------------------- ordered writers

ORDERED = """
import os, sys
wal, data = (os.open(path, os.O_RDWR | os.O_CREAT, 0o644) for path in sys.argv[1:3])
number = 0
while True:
    number += 1
    for fd in (wal, data):  # what is in the data was in the log before
        os.pwrite(fd, b"%020d" % number, 0)
        os.fdatasync(fd)
"""


def numbers(clone: Path) -> tuple[int, int]:
    return int((clone / "wal" / "log").read_text() or 0), int((clone / "table").read_text() or 0)


@pytest.mark.parametrize("how", ["thin", "classic"])
def test_data_and_log_on_two_volumes(group: Storage, place: Path, how: str, request: pytest.FixtureRequest) -> None:
    """With the pause they are one instant. Without it the control must fail: else this proves nothing."""
    with disk(group, "data", how, "ext4", place, 80) as data, disk(group, "wal", how, "ext4", place, 80) as wal:
        (data / "wal").symlink_to(wal)
        writer = subprocess.Popen([sys.executable, "-c", ORDERED, str(wal / "log"), str(data / "table")])
        try:
            while not (data / "table").exists() or numbers(data)[1] < 5:
                time.sleep(0.1)
            command = Command(place / "etc", config=config(data, how).replace("400m", "40m"))
            said = Said(request)
            for turn in range(rounds(request, 2, 10)):
                before = numbers(data)[1]
                taken = command.json("take", "n", "--budget", "60s", timeout=600)
                assert taken["good"] and taken["quiesce"] == "pause" and len(taken["snapshots"]) == 2
                said.step("take")
                log, table = restored(command, taken["set_id"], place / f"clone-{turn}")
                assert table <= log <= table + 1 and table >= before, (log, table, before)
                assert writer.poll() is None
                said.step("restore and release")
                command.json("delete", taken["set_id"], "--yes", "--last", timeout=600)
                said.step("delete")
                said.turn(turn)
            skewed = command.json("take", "n", "--quiesce", "none", "--allow-skew", timeout=600)
            assert not skewed["good"] and skewed["grade"] == "skewed" and skewed["skew_ms"] > 0
            log, table = restored(command, skewed["set_id"], place / "skewed")
            assert not table <= log <= table + 1, "without the pause it came out whole: the control proves nothing"
        finally:
            writer.send_signal(signal.SIGCONT)
            writer.kill()
            writer.wait()


def restored(command: Command, set_id: str, clone: Path) -> tuple[int, int]:
    command.json("restore", set_id, "--to", str(clone), timeout=600)
    found = numbers(clone)
    command.json("release", str(clone), "--discard-changes", timeout=600)
    return found


# ------------------------------------------------------------------------------------------------------ PostgreSQL


class Postgres:
    """A server of its own, by its Unix socket alone, as user postgres."""

    def __init__(self, data: Path, sockets: Path) -> None:
        self.data, self.sockets = data, sockets
        sockets.mkdir(exist_ok=True)
        shutil.chown(sockets, "postgres", "postgres")
        self.environment = {"PATH": f"{POSTGRES}:{os.environ['PATH']}", "PGHOST": str(sockets), "PGUSER": "postgres"}

    def run(self, *words: str) -> str:
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        done = subprocess.run(
            [*user, *words], env=self.environment, capture_output=True, text=True, cwd="/", timeout=600
        )
        assert done.returncode == 0, f"{words}: {done.stdout} {done.stderr}"
        return done.stdout.strip()

    def begin(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self.sockets} -c shared_buffers=16MB"
        log = str(self.sockets / "log")
        self.run("pg_ctl", "-w", "-t", "300", "-D", str(self.data), "-l", log, "-o", options, "start")

    def end(self) -> None:
        with contextlib.suppress(AssertionError):
            self.run("pg_ctl", "-m", "immediate", "-w", "-D", str(self.data), "stop")

    def ask(self, what: str) -> int:
        return int(self.run("psql", "-qAtc", what, "postgres"))


#: pgbench's own invariant: each transaction adds the same to a teller, a branch and an account, and writes it down.
BALANCED = """select count(*) from (select sum(abalance) from pgbench_accounts union select sum(tbalance) from
pgbench_tellers union select sum(bbalance) from pgbench_branches union
select coalesce(sum(delta), 0) from pgbench_history) as sums"""


@pytest.mark.skipif(not POSTGRES.is_dir(), reason="needs PostgreSQL 15")
@pytest.mark.parametrize(("how", "kind"), [("thin", "ext4"), ("classic", "xfs")])
def test_postgresql(group: Storage, place: Path, how: str, kind: str, request: pytest.FixtureRequest) -> None:
    with disk(group, "pg", how, kind, place) as point:
        shutil.chown(point, "postgres", "postgres")
        server = Postgres(point / "data", place / "sockets")
        server.run("initdb", "-N", "-A", "trust", "-U", "postgres", "-D", str(server.data))
        server.begin()
        load = None
        try:
            server.run("pgbench", "-qi", "postgres")
            bench = ["pgbench", "-n", "-c", "2", "-T", "86400", "postgres"]
            load = subprocess.Popen(
                ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *bench],
                env=server.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
            )

            def acknowledged() -> int:
                return server.ask("select count(*) from pgbench_history")

            def check(clone: Path) -> dict[str, int]:
                (clone / "postmaster.pid").unlink(missing_ok=True)  # stale in a hot image
                copy = Postgres(clone, place / "sockets-of-clone")
                copy.begin()
                try:
                    lost = copy.ask(BALANCED) - 1
                    return {"lost": lost, "head": copy.ask("select count(*) from pgbench_history")}
                finally:
                    copy.end()

            while acknowledged() < 20:
                time.sleep(0.2)
            command = Command(place / "etc", config=config(server.data, how))
            hot_takes(Said(request), command, place, acknowledged, check, rounds(request, 1, 5))
            assert load.poll() is None
        finally:
            if load is not None:
                load.kill()
                load.wait()
            server.end()
