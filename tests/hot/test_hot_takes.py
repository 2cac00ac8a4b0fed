"""The main job: a database under synced load is taken hot, again and again, and every image opens with all that had
been acknowledged. And the control: the same without the pause loses."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hot.conftest import Start
from tests.support import NOBODY, Command, StopWatch, check_database, loop_file_system

KEPT = 5


def open_to(uid: int | None, *paths: Path) -> None:
    """pytest's tmp_path is private to root: let another user in."""
    if uid is not None:
        for path in paths:
            for parent in [path, *path.parents]:
                if parent != Path("/") and os.stat(parent).st_uid == os.geteuid():
                    os.chmod(parent, os.stat(parent).st_mode | 0o055)


def hot_takes(place: Path, start: Start, times: int, uid: int | None, provider: str = "copy") -> None:
    base = place / f"node-{uid or 0}"
    base.mkdir()
    open_to(uid, base)
    if uid is not None:
        os.chown(base, uid, uid)
    command = Command(base / "etc", uid)
    node = start(base / "data", "--rate", "5", "--fill", "60", uid=uid)
    node.wait_for(50)
    for turn in range(times):
        before = node.acknowledged()
        with StopWatch(node) as watch:
            taken = command.json("take", str(node.data), "--provider", provider)
        assert taken["good"] and taken["state"] == "ready" and taken["grade"] == "filesystem", taken
        clone = base / f"clone-{turn}"
        restored = command.json("restore", taken["set_id"], "--to", str(clone))
        assert restored["path"] == str(clone)
        found = check_database(clone, uid)
        assert found["lost"] == 0, f"take {turn}: {found}"
        assert found["head"] >= max(before, watch.acknowledged_when_stopped), (
            f"take {turn}: acknowledged writes are lost"
        )
        command.json("release", str(clone), "--discard-changes")
        assert not clone.exists()
        assert taken["quiesce"] == ("pause" if provider == "copy" else "none")
        assert node.state() not in ("", "T", "Z"), "the node must go on"
        # Each set pins what the node has written over since: as retention would, keep the last few.
        sets = command.json("list", str(node.data))["sets"]
        assert len(sets) == min(turn + 1, KEPT + 1) and all(entry["good"] for entry in sets)
        if len(sets) > KEPT:
            command.json("delete", sets[0]["set_id"], "--yes")
    node.wait_for(node.acknowledged() + 20)


def count(request: pytest.FixtureRequest) -> int:
    return 50 if request.config.getoption("--full") else 3


def test_hot_takes_as_this_user(tmp_path: Path, start: Start, request: pytest.FixtureRequest) -> None:
    hot_takes(tmp_path, start, count(request), None)


@pytest.fixture
def place() -> Iterator[Path]:
    """Where anybody may go. Asked for before `start`, so that its node is dead when this goes."""
    made = Path("/var/tmp") / f"snapshotter-test-{os.getpid()}"
    made.mkdir(mode=0o755)
    yield made
    shutil.rmtree(made)


@pytest.mark.root
def test_hot_takes_without_root(place: Path, start: Start, request: pytest.FixtureRequest) -> None:
    hot_takes(place, start, count(request), NOBODY)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_hot_takes_by_reflink(tmp_path: Path, start: Start, request: pytest.FixtureRequest, kind: str) -> None:
    with loop_file_system(kind, tmp_path, 20_000) as place:
        hot_takes(place, start, count(request), None)


@pytest.mark.root
def test_hot_takes_by_btrfs(tmp_path: Path, start: Start, request: pytest.FixtureRequest) -> None:
    with loop_file_system("btrfs", tmp_path, 20_000) as place:
        hot_takes(place, start, count(request), None, "btrfs")


def test_control_a_slow_copy_without_the_pause_loses(tmp_path: Path, start: Start) -> None:
    """What the pause is for: the same database, copied over at least 5 s while it is written, is no backup."""
    node = start(tmp_path / "data", "--rate", "0", "--fill", "100")
    node.wait_for(50)
    outcomes = []
    for turn in range(3):
        copy = tmp_path / f"copy-{turn}"
        before = node.acknowledged()
        outcomes.append(plain_copy(node.data, copy, seconds=6) or opens_whole(copy, before))
        if outcomes[-1] != "whole":
            break
    assert outcomes[-1] != "whole", (
        "a hot copy without the pause came out whole three times: the control proves nothing"
    )


def plain_copy(source: Path, destination: Path, seconds: float) -> str:
    """As cp does it, but spread over `seconds`; what went wrong, or ''."""
    names = sorted(path for path in source.rglob("*") if path.is_file())
    for name in names:
        target = destination / name.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy2(name, target)
        except FileNotFoundError as error:
            return f"vanished: {error.filename}"
        time.sleep(seconds / len(names))
    return ""


def opens_whole(copy: Path, before: int) -> str:
    try:
        found = check_database(copy)
    except AssertionError as error:
        return f"does not open: {error}"
    return "whole" if found["lost"] == 0 and found["head"] >= before else f"opens, and has lost: {found}"
