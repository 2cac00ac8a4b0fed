"""A journal: what stands in it was on the disk before the step; whatever a kill or a full disk tears is as if never
begun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapshotter.core.errors import BusyError, StorageError
from snapshotter.core.journal import Journal, names, path_of


@pytest.fixture
def where(tmp_path: Path) -> str:
    return path_of(str(tmp_path), "target")


def read(where: str) -> Journal:
    found = Journal.load(where)
    assert found is not None
    return found


def test_written_and_read_back(where: str) -> None:
    journal = Journal.create(where, plan={"path": "/data/\udcff"})
    journal.begin("stage")
    journal.done("stage", count=3)
    again = read(where)
    assert again.facts["plan"] == {"path": "/data/\udcff"} and again.records == journal.records
    assert again.last("done", "stage") == {"kind": "done", "step": "stage", "count": 3}
    assert again.last("done", "stop") is None and not again.has("restored")
    assert names(os.path.dirname(where)) == ["target"] and os.stat(where).st_mode & 0o777 == 0o600


def test_one_per_target(where: str) -> None:
    Journal.create(where)
    with pytest.raises(BusyError):
        Journal.create(where)
    read(where).remove()
    read_again = Journal.load(where)
    assert read_again is None and names(os.path.dirname(where)) == []
    Journal.create(where).remove()
    Journal(where, []).remove()  # absent is done


def test_torn_at_every_byte_of_the_last_record(where: str) -> None:
    """It is as if that record had never been written, and the next one is read back whole."""
    journal = Journal.create(where, plan=1)
    journal.begin("stage")
    before = Path(where).read_bytes()
    journal.done("stage", note="x" * 20)
    whole = Path(where).read_bytes()
    for cut in range(len(before), len(whole)):
        for tail in (b"", b"\0" * 7):  # some file systems give the length first, and zeros
            Path(where).write_bytes(whole[:cut] + tail)
            again = read(where)
            assert [record["kind"] for record in again.records] == ["open", "begin"]
            again.append("undo")
            assert [record["kind"] for record in read(where).records] == ["open", "begin", "undo"]


def test_a_first_record_that_is_torn_is_no_journal(where: str) -> None:
    """Nothing had been done on its word; a new one takes its place."""
    Journal.create(where, plan=1)
    whole = Path(where).read_bytes()
    for cut in range(len(whole)):
        Path(where).write_bytes(whole[:cut])
        assert Journal.load(where) is None
    Journal.create(where, plan=2)
    assert read(where).facts["plan"] == 2


def test_damage_in_the_middle_is_said_and_nothing_done_on_it(where: str) -> None:
    journal = Journal.create(where, plan=1)
    journal.begin("stage")
    journal.done("stage")
    lines = Path(where).read_bytes().split(b"\n")
    lines[1] = b"{" + lines[1]
    Path(where).write_bytes(b"\n".join(lines))
    with pytest.raises(StorageError, match="line 2"):
        Journal.load(where)
    with pytest.raises(StorageError):
        Journal.create(where)


@pytest.mark.root
def test_a_full_disk_leaves_it_as_it_was(tmp_path: Path) -> None:
    from tests.support import loop_file_system

    with loop_file_system("ext4", tmp_path, 20) as disk:
        where = path_of(str(disk), "target")
        journal = Journal.create(where, plan=1)
        journal.begin("stage")
        with open(disk / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(1 << 12))
            except OSError:
                pass
        with pytest.raises(StorageError, match="No space"):
            for _ in range(100):
                journal.append("attachment", filler="y" * 3000)
        kinds = [record["kind"] for record in read(where).records]
        assert kinds == [record["kind"] for record in journal.records]
        (disk / "filler").unlink()
        journal.append("undo")
        assert read(where).has("undo")


def test_a_link_in_its_place_is_not_followed(where: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("keep")
    os.symlink(tmp_path / "theirs", where)
    with pytest.raises(StorageError):
        Journal.create(where, plan=1)
    assert (tmp_path / "theirs").read_text() == "keep"
