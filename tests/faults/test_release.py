"""A clone that isn't mounted any more, as after a reboot: what stands at its place is taken for it by nobody, and what
was written to it stays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.host import mounts
from tests.support import Command, loop_file_system

pytestmark = pytest.mark.root


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with loop_file_system("btrfs", tmp_path) as made:
        subprocess.run(["btrfs", "subvolume", "create", made / "node"], check=True, capture_output=True)
        (made / "node" / "chain").write_text("content")
        yield made


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Path]:
    """Another disk, with a file that was written long before."""
    with loop_file_system("ext4", tmp_path, 20) as made:
        (made / "theirs").write_text("theirs")
        yield made


def worked_in(command: Command, set_id: str, place: Path) -> str:
    """A clone at `place` that was written to, and isn't mounted any more: its id."""
    made: str = command.json("restore", set_id, "--to", str(place))["attachment_id"]
    (place / "work").write_text("a day's")
    mounts.unmount(str(place))
    return made


def clones(disk: Path) -> dict[str, bool]:
    """Every clone that is there, and whether the work is in it."""
    return {
        path.parent.name.partition(".")[0]: (path / "work").exists()
        for path in disk.glob(".snapshotter-btrfs/attachments/*/clone")
    }


def test_a_second_clone_at_the_place_of_one_that_is_not_mounted_is_refused(tmp_path: Path, disk: Path) -> None:
    command, place = Command(tmp_path / "etc"), tmp_path / "clone"
    set_id = command.json("take", str(disk / "node"))["set_id"]
    first = worked_in(command, set_id, place)
    for how in ("--to", "--mount"):
        error = command.error("restore", set_id, how, str(place), exit_code=5)
        assert first in error["line"] and f"release {first} --discard-changes" in error["cure"]
    error = command.error("release", str(place), exit_code=5)
    assert "isn't mounted" in error["line"] and clones(disk) == {first: True}
    command.json("release", first, "--discard-changes")
    assert clones(disk) == {}
    command.json("restore", set_id, "--to", str(place))
    command.json("release", str(place))


def test_what_somebody_mounted_there_is_not_the_clone(tmp_path: Path, disk: Path, other: Path) -> None:
    command, place = Command(tmp_path / "etc"), tmp_path / "clone"
    set_id = command.json("take", str(disk / "node"))["set_id"]
    first = worked_in(command, set_id, place)
    subprocess.run(["mount", "--bind", str(other), str(place)], check=True)
    try:
        for where in (str(place), first):
            error = command.error("release", where, exit_code=5)
            assert "isn't mounted" in error["line"] and clones(disk) == {first: True}
        command.json("release", first, "--discard-changes")
        assert clones(disk) == {} and (place / "theirs").read_text() == "theirs"
    finally:
        mounts.unmount(str(place))


def test_the_image_itself_at_the_place_of_a_clone_is_not_the_clone(tmp_path: Path, disk: Path) -> None:
    command, place = Command(tmp_path / "etc"), tmp_path / "clone"
    set_id = command.json("take", str(disk / "node"))["set_id"]
    first = worked_in(command, set_id, place)
    image, source = f"subvol=/.snapshotter-btrfs/sets/{set_id}/0", mounts.mount_of(str(disk)).source
    subprocess.run(["mount", "-o", f"ro,{image}", source, str(place)], check=True)
    try:
        assert "isn't mounted" in command.error("release", str(place), exit_code=5)["line"]
        assert clones(disk) == {first: True}
    finally:
        mounts.unmount(str(place))


def test_reap_leaves_what_somebody_mounted_where_a_dead_restore_was_to_bring_it(
    tmp_path: Path, disk: Path, other: Path
) -> None:
    command, place = Command(tmp_path / "etc"), tmp_path / "clone"
    set_id = command.json("take", str(disk / "node"))["set_id"]
    first = worked_in(command, set_id, place)
    (at,) = disk.glob(f".snapshotter-btrfs/attachments/{first}.*")
    record = json.loads(os.getxattr(at, "trusted.snapshotter.attachment"))
    assert record["since"]
    os.setxattr(at, "trusted.snapshotter.attachment", json.dumps({**record, "since": None, "maker": [1, 1]}).encode())
    subprocess.run(["mount", "--bind", str(other), str(place)], check=True)
    try:
        assert command.json("reap")["released"] == [first]
        assert clones(disk) == {} and (place / "theirs").read_text() == "theirs"
    finally:
        mounts.unmount(str(place))
