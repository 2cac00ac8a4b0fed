"""PostgreSQL images, healthy and damaged: a real server writes them, the checks' own single-user server reads them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter import checks
from snapshotter.checks import Outcome, Proof
from snapshotter.nodes import profiles
from tests.support import NOBODY, as_user
from tests.unit.test_checks import Measured, cut, flip

INSTALLED = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not INSTALLED, reason="needs PostgreSQL's server programs"),
]


def tool(name: str, *words: str) -> str:
    done = subprocess.run(
        [*as_user(NOBODY), str(INSTALLED[-1].parent / name), *words],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=120,
    )
    assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """A copy of a running server's data, made while it was held still: what an image of one instant is."""
    top = Path(tempfile.mkdtemp(prefix="pg-", dir="/var/tmp"))
    data = top / "data"
    try:
        top.chmod(0o755)
        data.mkdir()
        os.chown(data, NOBODY, NOBODY)
        tool("initdb", "-D", str(data), "-k", "-A", "trust", "-U", "pg", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={data}"
        tool("pg_ctl", "-D", str(data), "-o", options, "-w", "-l", str(data / "log"), "start")
        try:
            for statement in (
                "create table big as select generate_series(1, 50000) n, repeat('x', 100) s",
                "checkpoint",
                "create table after as select generate_series(1, 50000) n",
            ):
                tool("psql", "-h", str(data), "-U", "pg", "-d", "template1", "-c", statement)
            shutil.copytree(data, top / "image", ignore=shutil.ignore_patterns(".s.PGSQL*"))
            for path in [top / "image", *(top / "image").rglob("*")]:
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
            (top / "image").chmod(0o700)
        finally:
            tool("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        yield top / "image"
    finally:
        shutil.rmtree(top, ignore_errors=True)


@pytest.fixture
def clone(image: Path) -> Iterator[Path]:
    """Below a directory that only root may enter, as verify's clones are."""
    closed = Path(tempfile.mkdtemp(prefix="pg-", dir="/var/tmp"))
    try:
        subprocess.run(["cp", "-a", str(image), str(closed / "clone")], check=True)
        yield closed / "clone"
    finally:
        shutil.rmtree(closed, ignore_errors=True)


def prove(top: Path, level: int, profile: str = "postgresql") -> Proof:
    return checks.prove([("/live", str(top))], profiles.get(profile), level)


@pytest.mark.parametrize("profile", ["postgresql", "generic"])
@pytest.mark.parametrize("level", [2, 3, 4])
def test_an_image_of_a_running_server_is_healthy(clone: Path, level: int, profile: str) -> None:
    proof = prove(clone, level, profile)
    assert (proof.outcome, proof.level) == (Outcome.OK, level), proof
    assert [finding.kind for finding in proof.findings] == ["postgresql"]
    assert str(clone) not in Path("/proc/mounts").read_text(), "a mount was left"


def test_a_log_on_another_disk(clone: Path) -> None:
    (clone / "pg_wal").rename(clone.parent / "wal")
    (clone / "pg_wal").symlink_to(clone.parent / "wal")
    places = [("/live", str(clone)), ("/wal", str(clone.parent / "wal"))]
    proof = checks.prove(places, profiles.get("postgresql"), 2)
    assert (proof.outcome, proof.level) == (Outcome.OK, 2), proof


def test_statistics_that_led_into_memory(clone: Path) -> None:
    """`pg_stat_tmp` on a tmpfs is a usual tuning, and in no set."""
    for path in (clone / "pg_stat_tmp").iterdir():
        path.unlink()
    (clone / "pg_stat_tmp").rmdir()
    (clone / "pg_stat_tmp").symlink_to("/run/that/is/not/there")
    assert prove(clone, 2).outcome is Outcome.OK
    (clone / "base").rename(clone.parent / "base")
    (clone / "base").symlink_to("/run/that/is/not/there")
    assert prove(clone, 2).outcome is Outcome.CORRUPT


def pipe_for_table(top: Path) -> None:
    """The server would wait for a writer for ever."""
    table = biggest_table(top)
    table.unlink()
    os.mkfifo(table)


def segment(top: Path) -> Path:
    return sorted((top / "pg_wal").glob("0*"))[0]


def biggest_table(top: Path) -> Path:
    return max((top / "base").rglob("[0-9]*"), key=lambda path: path.stat().st_size)


DAMAGES: dict[str, tuple[int, Outcome, Callable[[Path], object]]] = {
    "control file flipped": (2, Outcome.CORRUPT, lambda top: flip(top / "global" / "pg_control", 40)),
    "control file missing": (2, Outcome.CORRUPT, lambda top: (top / "global" / "pg_control").unlink()),
    "log segment missing": (2, Outcome.CORRUPT, lambda top: segment(top).unlink()),
    "tables missing": (2, Outcome.CORRUPT, lambda top: shutil.rmtree(top / "base")),
    "transactions missing": (2, Outcome.CORRUPT, lambda top: shutil.rmtree(top / "pg_xact")),
    "a table is a pipe": (2, Outcome.CORRUPT, pipe_for_table),
    "version missing": (2, Outcome.CORRUPT, lambda top: (top / "PG_VERSION").unlink()),
    "log segment cut": (2, Outcome.CORRUPT, lambda top: cut(segment(top), 8192)),
    "block flipped": (3, Outcome.CORRUPT, lambda top: flip(biggest_table(top), 100_000)),
    "another version": (2, Outcome.TOOL_MISSING, lambda top: (top / "PG_VERSION").write_text("99\n")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_which_level_finds_what_of_postgresql(clone: Path, measured: Measured, name: str) -> None:
    level, outcome, damage = DAMAGES[name]
    damage(clone)
    proof = prove(clone, 4)
    assert (proof.level, proof.outcome) == (level, outcome), proof
    measured(f"PostgreSQL, {name}: {outcome} at level {level}")
