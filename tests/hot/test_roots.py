"""Nodes of several roots: linked databases, nested mounts. A clone never leads into production."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.hot.conftest import Start
from tests.support import Command, check_database, loop_file_system


def digest(top: Path) -> dict[str, str]:
    """Every byte and every link below `top`."""
    found = {}
    for path in sorted(top.rglob("*")):
        if path.is_symlink():
            found[str(path)] = "-> " + os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def linked(tmp_path: Path) -> tuple[Path, Path]:
    """A node whose `database` is an absolute link to a fast disk, and a relative one beside it."""
    data, fast = tmp_path / "node", tmp_path / "fast" / "db"
    data.mkdir()
    fast.mkdir(parents=True)
    (data / "database").symlink_to(fast)
    (data / "again").symlink_to(data / "database")
    (data / "key-link").symlink_to("../node/key")
    return data, fast


def test_a_linked_database_is_taken_and_its_clone_is_apart(
    tmp_path: Path, linked: tuple[Path, Path], start: Start
) -> None:
    data, fast = linked
    node = start(data, "--rate", "2", "--fill", "20")
    node.wait_for(30)
    before = node.acknowledged()
    command = Command(tmp_path / "etc")
    taken = command.json("take", str(data))
    assert {root["origin"] for root in taken["roots"]} == {str(data), str(fast)}
    node.kill()
    live = digest(tmp_path / "fast") | digest(data)
    clone = tmp_path / "clone"
    restored = command.json("restore", taken["set_id"], "--to", str(clone))
    assert {root["path"] for root in restored["roots"]} == {str(clone), str(tmp_path / "clone.roots" / "1")}
    assert os.path.realpath(clone / "database") == str(tmp_path / "clone.roots" / "1")
    assert os.path.realpath(clone / "key-link") == str(clone / "key")
    found = check_database(clone)
    assert found["lost"] == 0 and found["head"] >= before
    second = start(clone, "--rate", "0")  # written to as well, not only opened
    second.wait_for(found["head"] + 200)
    second.kill()
    assert digest(tmp_path / "fast") | digest(data) == live, "opening the clone wrote to production"
    command.json("release", str(clone), "--discard-changes")
    assert not (tmp_path / "clone.roots").exists()
    assert digest(tmp_path / "fast") | digest(data) == live


@pytest.mark.root
def test_a_linked_database_is_not_mounted_read_only(tmp_path: Path, linked: tuple[Path, Path], start: Start) -> None:
    data, _ = linked
    node = start(data, "--rate", "2")
    node.wait_for(5)
    command = Command(tmp_path / "etc")
    taken = command.json("take", str(data))
    error = command.error("restore", taken["set_id"], "--mount", str(tmp_path / "ro"), exit_code=3)
    assert "--to" in error["cure"]
    assert not (tmp_path / "ro").exists()
    assert command.json("show", taken["set_id"])["attachments"] == []


@pytest.mark.root
def test_a_nested_mount_is_a_root_of_its_own(tmp_path: Path, start: Start) -> None:
    data = tmp_path / "node"
    data.mkdir()
    with loop_file_system("ext4", tmp_path, 300) as disk:
        (data / "database").mkdir()
        os.system(f"mount --move {disk} {data / 'database'} 2>/dev/null || mount --bind {disk} {data / 'database'}")
        try:
            node = start(data, "--rate", "2", "--fill", "20")
            node.wait_for(30)
            before = node.acknowledged()
            command = Command(tmp_path / "etc")
            taken = command.json("take", str(data))
            assert len(taken["roots"]) == 2
            clone = tmp_path / "clone"
            restored = command.json("restore", taken["set_id"], "--to", str(clone))
            assert {root["path"] for root in restored["roots"]} == {str(clone), str(clone / "database")}
            found = check_database(clone)
            assert found["lost"] == 0 and found["head"] >= before
            command.json("release", str(clone), "--discard-changes")
            assert not clone.exists()
            node.kill()
        finally:
            os.system(f"umount {data / 'database'}")


def test_two_roots_whose_directories_come_and_go(tmp_path: Path) -> None:
    """Both roots lose a directory and gain a file of its name between two passes: neither is in the other's way."""
    data, other = tmp_path / "node", tmp_path / "other"
    for top in (data, other):
        (top / "thing").mkdir(parents=True)
        (top / "thing" / "file").write_text("old")
        (top / "big").write_bytes(os.urandom(40 << 20))
    (data / "link").symlink_to(other)
    command = Command(tmp_path / "etc")
    process = command.start("take", str(data), "--json")
    changer = 0
    while process.poll() is None:
        for top in (data, other):
            if (top / "thing").is_dir():
                (top / "thing" / "file").unlink()
                (top / "thing").rmdir()
                (top / "thing").write_text(f"{changer}")
            else:
                (top / "thing").unlink()
                (top / "thing").mkdir()
                (top / "thing" / "file").write_text("new")
        changer += 1
        time.sleep(0.02)
    said = process.communicate()
    # This very test writes without an open file, so it can't be paused: the take may refuse, and must not break.
    assert process.returncode in (0, 3), said
    command.json("take", str(data))


@pytest.mark.root
def test_two_roots_in_one_subvolume(tmp_path: Path, start: Start) -> None:
    """The data path and the database that it links to are directories of one btrfs subvolume: one image, two places."""
    with loop_file_system("btrfs", tmp_path, 1000) as disk:
        subprocess.run(["btrfs", "subvolume", "create", disk / "sub"], check=True, capture_output=True)
        data, fast = disk / "sub" / "node", disk / "sub" / "fast"
        data.mkdir()
        fast.mkdir()
        (data / "database").symlink_to(fast)
        node = start(data, "--rate", "2")
        node.wait_for(30)
        before = node.acknowledged()
        command = Command(tmp_path / "etc")
        taken = command.json("take", str(data))
        assert (len(taken["roots"]), len(taken["snapshots"]), taken["quiesce"]) == (2, 1, "none")
        clone = tmp_path / "clone"
        command.json("restore", taken["set_id"], "--to", str(clone))
        live = digest(fast) if node.kill() is None else {}
        found = check_database(clone)
        assert found["lost"] == 0 and found["head"] >= before
        assert digest(fast) == live, "opening the clone wrote to production"
        command.json("release", str(clone), "--discard-changes")
        assert not clone.exists() and not (tmp_path / "clone.roots").exists()
        command.json("restore", taken["set_id"], "--to", str(clone))
        command.json("release", str(clone), "--discard-changes")
        command.json("delete", taken["set_id"], "--yes", "--last")
