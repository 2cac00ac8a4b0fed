"""Locks where the disk of the run directory is full: often the very reason for a delete."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.core.errors import BusyError, PreconditionError
from snapshotter.host.locks import Locks

pytestmark = pytest.mark.root


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run directory on a file system with little room, for data and for files."""
    point = tmp_path / "small"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k,nr_inodes=20", "none", str(point)], check=True)
    monkeypatch.setenv("SNAPSHOTTER_RUN", str(point / "run"))
    yield point
    subprocess.run(["umount", str(point)], check=True)


def test_a_full_disk_keeps_nobody_from_a_lock(small: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small / "filler").write_bytes(bytes(1 << 20))
    with Locks(["target:node"]), pytest.raises(BusyError) as caught, Locks(["target:node"]):
        pass
    assert caught.value.object == "target:node" and "by another run" in caught.value.message


def test_no_room_for_the_lock_file_itself_names_it(small: Path) -> None:
    with Locks(["another"]):
        pass
    with pytest.raises(OSError, match="No space left"):
        for number in range(30):
            (small / f"file-{number}").touch()
    with pytest.raises(PreconditionError) as caught, Locks(["target:node"]):
        pass
    lock = str(small / "run" / "lock")
    assert "No space left" in caught.value.message
    assert caught.value.object.startswith(f"{lock}/target_node.") and lock in caught.value.cure
