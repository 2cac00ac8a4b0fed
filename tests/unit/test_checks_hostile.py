"""What a node's user can put in place of a file, while root verifies: pipes, pages that lead to themselves, numbers and
brackets without end. Each is damage, said in a sentence and soon; none is waited for, nor a bug."""

from __future__ import annotations

import os
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter import checks
from snapshotter.checks import Outcome, manifest, records
from snapshotter.checks import lmdb as pages
from tests.unit.test_checks import prove
from tests.unit.test_checks_layouts import besu, file, leveldb, rocksdb

pytestmark = pytest.mark.timeout(60)
PAGE = 4096


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


# ------------------------------------------------------------------------------------------------------------ no files


def sqlite(top: Path) -> None:
    top.mkdir()
    database = sqlite3.connect(top / "records.sqlite")
    database.execute("CREATE TABLE records (number INTEGER)")
    database.close()


PIPES: dict[str, tuple[Callable[[Path], None], str]] = {
    "CURRENT": (rocksdb, "CURRENT"),
    "MANIFEST": (rocksdb, "MANIFEST-*"),
    "OPTIONS": (rocksdb, "OPTIONS-*"),
    "a log": (rocksdb, "*.log"),
    "RocksDB's own log": (rocksdb, "LOG"),
    "LevelDB's CURRENT": (leveldb, "CURRENT"),
    "LevelDB's MANIFEST": (leveldb, "MANIFEST-*"),
    "LevelDB's log": (leveldb, "*.log"),
    "SQLite's log": (sqlite, "records.sqlite-wal"),
    "SQLite's journal": (sqlite, "records.sqlite-journal"),
}


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_a_files_place_is_damage(tmp_path: Path, name: str, crash: bool) -> None:
    build, pattern = PIPES[name]
    top = tmp_path / "data"
    build(top)
    for path in list(top.glob(pattern)) or [top / pattern]:
        pipe(path)
    proof = prove(tmp_path, crash=crash)
    assert (proof.outcome, proof.level) == (Outcome.CORRUPT, 2) and "is no plain file" in proof.why, proof


@pytest.mark.parametrize("where", ["VERSION_METADATA.json", "DATABASE_METADATA.json"])
def test_a_pipe_beside_the_database(tmp_path: Path, where: str) -> None:
    besu(tmp_path)
    pipe(tmp_path / where)
    proof = prove(tmp_path, 2, "besu")
    assert (proof.outcome, proof.why) == (Outcome.CORRUPT, f"/live/{where}: {where} is no plain file")


@pytest.mark.parametrize("name", ["PG_VERSION", "global/pg_control", "postgresql.auto.conf", "pg_wal/" + "0" * 24])
def test_a_pipe_in_postgresqls_data(tmp_path: Path, name: str) -> None:
    for directory in ("base/1", "global", "pg_wal", "pg_xact"):
        (tmp_path / directory).mkdir(parents=True)
    file(tmp_path / "PG_VERSION", "15\n")
    control = struct.pack("<QI", 1, 1300).ljust(288, b"\1")
    (tmp_path / "global/pg_control").write_bytes(
        (control + struct.pack("<I", records.crc32c(control))).ljust(8192, b"\0")
    )
    pipe(tmp_path / name)
    proof = prove(tmp_path, 2, "postgresql")
    assert proof.outcome is Outcome.CORRUPT and f"{os.path.basename(name)} is no plain file" in proof.why, proof


def test_a_device_is_not_opened_and_a_link_to_itself_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(checks.CheckFailed, match="zero is no plain file"):
        checks.opened(str(tmp_path / "zero"))
    rocksdb(tmp_path / "data")
    (tmp_path / "data" / "CURRENT").unlink()
    (tmp_path / "data" / "CURRENT").symlink_to("CURRENT")
    assert prove(tmp_path, 2).outcome is Outcome.CORRUPT


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, "9" * 200_000])
def test_brackets_without_end(tmp_path: Path, content: str) -> None:
    besu(tmp_path)
    file(tmp_path / "VERSION_METADATA.json", content)
    proof = prove(tmp_path, 2, "besu")
    assert (proof.outcome, proof.why) == (Outcome.CORRUPT, "/live/VERSION_METADATA.json: is not JSON")


# ---------------------------------------------------------------------------------------------------------------- LMDB


def meta(number: int, root: int, depth: int, entries: int = 1) -> bytes:
    """A meta page: of the free pages' tree nothing, of the main one root and depth."""
    head = struct.pack("<Q2xHHH", number, pages._METAPAGE, 0, 0)
    free = struct.pack("<IHH4QQ", PAGE, 0, 0, 0, 0, 0, 0, pages._NONE)
    main = struct.pack("<IHH4QQ", 0, 0, depth, 1, 1, 0, entries, root)
    body = struct.pack("<IIQQ", pages.MAGIC, 1, 0, 1 << 20) + free + main + struct.pack("<QQ", 5, number)
    return (head + body).ljust(PAGE, b"\0")


def branch(number: int, *children: int) -> bytes:
    """A branch page: a node for each child, of 8 bytes, with no key."""
    lower, at = 16 + 2 * len(children), PAGE - 8 * len(children)
    head = struct.pack("<Q2xHHH", number, pages._BRANCH, lower, at)
    slots = struct.pack(f"<{len(children)}H", *range(at, PAGE, 8))
    nodes = b"".join(struct.pack("<HHHH", child & 0xFFFF, child >> 16 & 0xFFFF, child >> 32, 0) for child in children)
    return head + slots + bytes(at - lower) + nodes


def leaf(number: int) -> bytes:
    return struct.pack("<Q2xHHH", number, pages._LEAF, 16, PAGE).ljust(PAGE, b"\0")


TREES: dict[str, tuple[list[bytes], int, str]] = {
    "names itself many times": ([branch(2, *[2] * 400)], 32, "is in the tree twice"),
    "names itself": ([branch(2, 2, 3), branch(3, 3, 2)], 32, "is in the tree twice"),
    "is deep": ([branch(2, *[2] * 400)], 60_000, "deeper than 32 pages"),
    "ends outside": ([branch(2, 3, 1 << 40), leaf(3)], 2, "isn't in the file"),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_without_end(tmp_path: Path, name: str) -> None:
    tree, depth, why = TREES[name]
    (tmp_path / "data.mdb").write_bytes(meta(0, 2, depth) + meta(1, 2, depth) + b"".join(tree))
    proof = prove(tmp_path, 2)
    assert (proof.outcome, proof.level) == (Outcome.CORRUPT, 2) and why in proof.why, proof


def test_control_a_tree_whose_pages_are_in_it_once_is_whole(tmp_path: Path) -> None:
    tree = [branch(2, 3, 4), branch(3, 5, 6), branch(4, 7, 8), *(leaf(number) for number in range(5, 9))]
    (tmp_path / "data.mdb").write_bytes(meta(0, 2, 3) + meta(1, 2, 3) + b"".join(tree))
    assert prove(tmp_path, 2).outcome is Outcome.OK


def test_entries_without_end() -> None:
    """As an engine gives them from pages that lead to each other (in a database within the database)."""

    def endless() -> Iterator[tuple[bytes, bytes]]:
        while True:
            yield b"key", b"value"

    for said, why in ((3, "4 entries are found of 3"), (1 << 60, "can't be in a file of 4096 bytes")):
        with pytest.raises(checks.CheckFailed, match=why):
            for _ in pages._keys(endless(), said, PAGE):
                pass


# ------------------------------------------------------------------------------------------------- LevelDB and RocksDB


def test_a_record_without_end_is_not_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MOST_PARTS", 20)

    def part(kind: int) -> bytes:
        data = bytes(records.BLOCK - 7)
        crc = records.crc32c(bytes([kind]) + data)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        return struct.pack("<IHB", masked, len(data), kind) + data

    leveldb(tmp_path / "data")
    (path,) = (tmp_path / "data").glob("MANIFEST-*")
    path.write_bytes(part(records.FIRST) + part(records.MIDDLE) * 30)
    with open(path, "rb") as log, pytest.raises(checks.CheckFailed, match="too long to be one"):
        manifest.Manifest.read(log)


def test_a_table_of_less_than_its_end(tmp_path: Path) -> None:
    """The MANIFEST may say so: it is damage, and not a check that could not run."""
    leveldb(tmp_path / "data")
    edit = b"\x07\x00\x09\x03" + b"\x08" + bytes(8) + b"\x08" + bytes(8)  # at level 0: table 9, 3 bytes; two keys
    crc = records.crc32c(bytes([records.FULL]) + edit)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    (path,) = (tmp_path / "data").glob("MANIFEST-*")
    with open(path, "ab") as log:
        log.write(struct.pack("<IHB", masked, len(edit), records.FULL) + edit)
    (tmp_path / "data" / "000009.ldb").write_bytes(b"abc")
    proof = prove(tmp_path, 2)
    assert (proof.outcome, proof.level) == (Outcome.CORRUPT, 2), proof
