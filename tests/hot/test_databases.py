"""LevelDB, LMDB and SQLite under synced load, taken hot: every image opens with all that had been acknowledged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter import provider
from tests.hot.clients.writers import KEPT, Writer, check_apart
from tests.support import Command, StopWatch, loop_file_system

Write = Callable[[str, Path], Writer]


@pytest.fixture
def write() -> Iterator[Write]:
    """Starts writers and ends them, whatever the test does."""
    writers: list[Writer] = []

    def begin(engine: str, data: Path) -> Writer:
        writers.append(Writer(engine, data))
        return writers[-1]

    yield begin
    for writer in writers:
        writer.kill()


def needs(engine: str) -> None:
    module = {"leveldb": "plyvel", "lmdb": "lmdb", "lmdb-unsynced": "lmdb"}.get(engine)
    if module:
        pytest.importorskip(module, reason=f"needs {module}")


def hot_takes(place: Path, engine: str, how: str, write: Write, rounds: int) -> None:
    writer = write(engine, place / "data")
    try:
        take_and_open(place, writer, engine, how, rounds)
    finally:
        writer.kill()  # before its file system goes
    assert check_apart(engine, writer.data)["lost"] == 0, "the original itself is not whole: the check proves nothing"


def take_and_open(place: Path, writer: Writer, engine: str, how: str, rounds: int) -> None:
    command = Command(place / "etc")
    writer.wait_for(KEPT // 2)  # the first image before blocks are used again, the others after
    for turn in range(rounds):
        before = writer.acknowledged()
        with StopWatch(writer) as watch:
            taken = command.json("take", str(writer.data), "--provider", how)
        assert taken["good"] and taken["state"] == "ready" and taken["grade"] == "filesystem", taken
        assert {member["provider"] for member in taken["snapshots"]} == {how}
        clone = place / f"clone-{turn}"
        command.json("restore", taken["set_id"], "--to", str(clone))
        assert blocks(clone) < 2 * blocks(writer.data) + (1 << 20), "holes were filled"
        found = check_apart(engine, clone)
        assert found["lost"] == 0, f"take {turn}: {found}"
        assert found["head"] >= max(before, watch.acknowledged_when_stopped), (
            f"take {turn}: acknowledged writes are lost: {found}, {before}, {watch.acknowledged_when_stopped}"
        )
        command.json("release", str(clone), "--discard-changes")
        assert not clone.exists() or not any(clone.iterdir())
        assert writer.state() not in ("", "T", "Z"), "the writer must go on"
        writer.wait_for(writer.acknowledged() + KEPT // 2)
    sets = command.json("list", str(writer.data))["sets"]
    assert len(sets) == rounds and all(entry["good"] for entry in sets)


def blocks(top: Path) -> int:
    """The bytes that the files below `top` take on the disk."""
    total = 0
    for directory, _, names in os.walk(top):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def count(request: pytest.FixtureRequest) -> int:
    return 10 if request.config.getoption("--full") else 3


@pytest.mark.parametrize("engine", ["leveldb", "lmdb", "lmdb-unsynced", "sqlite", "directories"])
def test_a_database_is_taken_hot_by_copy(
    tmp_path: Path, write: Write, request: pytest.FixtureRequest, engine: str
) -> None:
    needs(engine)
    hot_takes(tmp_path, engine, "copy", write, count(request))


@pytest.mark.root
@pytest.mark.skipif("btrfs" not in provider.BUILT_IN, reason="there is no btrfs provider yet")
@pytest.mark.parametrize("engine", ["leveldb", "lmdb", "sqlite", "directories"])
def test_a_database_is_taken_hot_by_btrfs(
    tmp_path: Path, write: Write, request: pytest.FixtureRequest, engine: str
) -> None:
    needs(engine)
    with loop_file_system("btrfs", tmp_path, 1500) as place:
        hot_takes(place, engine, "btrfs", write, count(request))


@pytest.mark.root
@pytest.mark.parametrize("engine", ["leveldb", "lmdb-unsynced", "sqlite", "directories"])
def test_a_database_is_taken_hot_by_reflink(
    tmp_path: Path, write: Write, request: pytest.FixtureRequest, engine: str
) -> None:
    needs(engine)
    with loop_file_system("btrfs", tmp_path, 1500) as place:
        hot_takes(place, engine, "copy", write, count(request))
