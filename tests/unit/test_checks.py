"""Real databases, damaged in every way known to pass unnoticed: which level finds it; no healthy one is blamed.

What each test damages is a copy of a database that its engine wrote and was killed over, as an image of a running node
is. The level at which each is found is asserted, and printed with the suite's numbers.
"""

from __future__ import annotations

import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter import checks
from snapshotter.checks import Outcome, Proof, manifest, records
from snapshotter.nodes import profiles
from tests.support import Node

Measured = Callable[[str], None]


def prove(top: Path, level: int = 4, profile: str = "generic", **how: bool) -> Proof:
    return checks.prove([("/live", str(top))], profiles.get(profile), level, **how)


def flip(path: Path, at: int, bits: int = 0x10) -> None:
    with open(path, "r+b") as file:
        file.seek(at if at >= 0 else path.stat().st_size + at)
        place = file.tell()
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bits]))


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size if size >= 0 else path.stat().st_size + size)


def biggest(top: Path, pattern: str) -> Path:
    return max(top.glob(pattern), key=lambda path: path.stat().st_size)


# ------------------------------------------------------------------------------------------------------------ RocksDB


@pytest.fixture(scope="module")
def besu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Besu-shaped data path whose node was killed under load: tables, blobs, several logs in use."""
    pytest.importorskip("rocksdict")
    where = tmp_path_factory.mktemp("besu")
    node = Node(where / "data", "--rate", "20", "--fill", "30", "--value", "3000")
    try:
        node.wait_for(3000)
    finally:
        node.kill()
    yield where / "data"


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    def copy(source: Path) -> Path:
        shutil.copytree(source, tmp_path / "image")
        return tmp_path / "image"

    return copy


def database(top: Path) -> Path:
    return top / "database"


def state_of(top: Path) -> manifest.Manifest:
    name = (database(top) / "CURRENT").read_text().strip()
    with open(database(top) / name, "rb") as file:
        return manifest.Manifest.read(file)


def live_table(top: Path) -> Path:
    """The biggest table that is still in use."""
    numbers = {number for family in state_of(top).families.values() for number in family.files}
    return max((database(top) / f"{number:06}.sst" for number in numbers), key=lambda path: path.stat().st_size)


def live_blob(top: Path) -> Path:
    numbers = {number for family in state_of(top).families.values() for number in family.live_blobs()}
    return max((database(top) / f"{number:06}.blob" for number in numbers), key=lambda path: path.stat().st_size)


def needed_logs(top: Path) -> list[Path]:
    """Those that a recovery reads, the newest last; what is in none of them is not what these tests are about."""
    oldest = min(family.log_number for family in state_of(top).families.values())
    return [path for path in sorted(database(top).glob("*.log")) if int(path.stem) >= oldest]


def manifest_of(top: Path) -> Path:
    return database(top) / (database(top) / "CURRENT").read_text().strip()


def append_unknown_edit(top: Path) -> None:
    """A whole, rightly checksummed record with a field that no version of today has."""
    payload = b"\x7b\x00"
    crc = records.crc32c(bytes([records.FULL]) + payload)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    with open(manifest_of(top), "ab") as file:
        file.write(struct.pack("<IHB", masked, len(payload), records.FULL) + payload)


def newer_table(top: Path) -> None:
    """The version in a table's footer, from a future release."""
    with open(live_table(top), "r+b") as file:
        file.seek(-12, 2)
        file.write(struct.pack("<I", 99))


def remove_all_logs(top: Path) -> None:
    for path in database(top).glob("*.log"):
        path.unlink()


ROCKSDB: dict[str, tuple[int, Outcome, Callable[[Path], object]]] = {
    "CURRENT missing": (2, Outcome.CORRUPT, lambda top: (database(top) / "CURRENT").unlink()),
    "CURRENT garbage": (2, Outcome.CORRUPT, lambda top: (database(top) / "CURRENT").write_bytes(b"MANIFEST-\0\n")),
    "MANIFEST missing": (2, Outcome.CORRUPT, lambda top: manifest_of(top).unlink()),
    "MANIFEST bit flipped": (2, Outcome.CORRUPT, lambda top: flip(manifest_of(top), 200)),
    "MANIFEST emptied": (2, Outcome.CORRUPT, lambda top: cut(manifest_of(top), 0)),
    "MANIFEST of a newer format": (1, Outcome.TOOL_TOO_OLD, append_unknown_edit),
    "table missing": (2, Outcome.CORRUPT, lambda top: live_table(top).unlink()),
    "table cut": (2, Outcome.CORRUPT, lambda top: cut(live_table(top), -1)),
    "table's end zeroed": (2, Outcome.CORRUPT, lambda top: flip(live_table(top), -3)),
    "table bit flipped": (3, Outcome.CORRUPT, lambda top: flip(live_table(top), 500)),
    "table of a newer format": (2, Outcome.TOOL_TOO_OLD, newer_table),
    "blob file missing": (2, Outcome.CORRUPT, lambda top: live_blob(top).unlink()),
    "blob file cut": (2, Outcome.CORRUPT, lambda top: cut(live_blob(top), -4096)),
    "blob bit flipped": (3, Outcome.CORRUPT, lambda top: flip(live_blob(top), 100_000)),
    "newest log bit flipped": (3, Outcome.CORRUPT, lambda top: flip(needed_logs(top)[-1], 50_000)),
    "all logs deleted": (2, Outcome.CORRUPT, remove_all_logs),
    "metadata missing": (2, Outcome.CORRUPT, lambda top: (top / "VERSION_METADATA.json").unlink()),
    "metadata no JSON": (2, Outcome.CORRUPT, lambda top: (top / "DATABASE_METADATA.json").write_bytes(b'{"v2":')),
    "database empty": (2, Outcome.CORRUPT, lambda top: (shutil.rmtree(database(top)), database(top).mkdir())),
    "database gone": (2, Outcome.CORRUPT, lambda top: shutil.rmtree(database(top))),
}


@pytest.mark.parametrize("name", ROCKSDB)
def test_which_level_finds_what_of_rocksdb(
    besu: Path, copied: Callable[[Path], Path], measured: Measured, name: str
) -> None:
    level, outcome, damage = ROCKSDB[name]
    top = copied(besu)
    damage(top)
    proof = prove(top, profile="besu")
    assert (proof.level, proof.outcome) == (level, outcome), proof
    assert proof.why
    measured(f"RocksDB, {name}: {outcome} at level {level}")


def test_a_killed_rocksdb_is_healthy_at_every_level(besu: Path, copied: Callable[[Path], Path]) -> None:
    top = copied(besu)
    for level in (2, 3, 4):
        proof = prove(top, level, "besu")
        assert (proof.outcome, proof.level) == (Outcome.OK, level), proof


def test_control_the_engine_opens_a_damaged_log_and_table_without_a_word(
    besu: Path, copied: Callable[[Path], Path]
) -> None:
    """What level 3 is for: an engine that opens tells nothing of these."""
    top = copied(besu)
    flip(needed_logs(top)[-1], 50_000)
    flip(live_table(top), 500)
    flip(live_blob(top), 100_000)
    opens = "from tests.hot.besu_shaped import *; open_database(Path(sys.argv[1])).close()"
    subprocess.run([sys.executable, "-c", opens, str(top)], check=True, timeout=120)


def test_the_newest_of_several_logs_is_missed_only_if_the_manifest_needs_it(
    besu: Path, copied: Callable[[Path], Path]
) -> None:
    """RocksDB doesn't write down which logs there are (track_and_verify_wals_in_manifest is off by default). What no
    table was flushed for is then gone without a trace: a driver's manifest tells (tests/faults/test_verify.py)."""
    top = copied(besu)
    newest = needed_logs(top)[-1]
    needed = max(family.log_number for family in state_of(top).families.values()) >= int(newest.stem)
    newest.unlink()
    assert prove(top, 4, "besu").outcome is (Outcome.CORRUPT if needed or not needed_logs(top) else Outcome.OK)


def test_a_torn_end_and_recycled_bytes_of_a_log_are_normal(besu: Path, copied: Callable[[Path], Path]) -> None:
    top = copied(besu)
    newest = needed_logs(top)[-1]
    with open(newest, "rb") as file:
        whole = [fragment.offset for fragment in records.fragments(file, int(newest.stem)) if fragment.kind]
    cut(newest, whole[-1] + 9)  # in the middle of the last record
    assert prove(top, 4, "besu").outcome is Outcome.OK


def test_an_older_log_behind_a_torn_end_is_normal(besu: Path, copied: Callable[[Path], Path]) -> None:
    """As in a recycled file: behind our last record there are whole ones that carry an older log's number."""
    top = copied(besu)
    logs = sorted(database(top).glob("*.log"))
    newest, older = needed_logs(top)[-1], logs[0]
    if newest == older:
        pytest.skip("the writer had one log only")
    block = records.BLOCK
    with open(newest, "rb") as file:
        end = max(f.offset + 11 + len(f.data) for f in records.fragments(file, int(newest.stem)) if f.kind)
    content = newest.read_bytes()[: end - 20]  # the last record is torn
    content += bytes(-len(content) % block) + older.read_bytes()[: 2 * block]
    newest.write_bytes(content)
    with open(newest, "rb") as file:
        assert any(f.kind == 0 for f in records.fragments(file, int(newest.stem))), "nothing is torn"
    assert prove(top, 3, "besu").outcome is Outcome.OK


def test_a_hole_in_an_unsynced_log_is_normal_for_a_crash_image(besu: Path, copied: Callable[[Path], Path]) -> None:
    """Pages of a log that was never synced reach the disk in any order: only what was held still must be whole."""
    top = copied(besu)
    with open(needed_logs(top)[-1], "r+b") as file:
        file.seek(40_960)
        file.write(bytes(4096))
    assert prove(top, 3, "besu", crash=True).outcome is Outcome.OK
    assert prove(top, 3, "besu").outcome is Outcome.CORRUPT


def test_a_missing_library_is_no_damage(besu: Path, copied: Callable[[Path], Path], tmp_path: Path) -> None:
    """A child whose rocksdict can't be imported: what was proven without it stands."""
    top = copied(besu)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "rocksdict.py").write_text("raise ImportError('not here')\n")
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from snapshotter import checks; from snapshotter.nodes import profiles\n"
        "proof = checks.prove([('/live', sys.argv[1])], profiles.get('besu'), 3)\n"
        "print(proof.outcome, proof.level)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(top), str(hidden)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["tool-missing", "2"]


# ---------------------------------------------------------------------------------------------- LevelDB, LMDB, SQLite


def written(engine: str, where: Path, number: int) -> Path:
    """A database that its writer was killed over."""
    from tests.hot.clients.writers import Writer

    writer = Writer(engine, where / "data")
    try:
        writer.wait_for(number)
    finally:
        writer.kill()
    return where / "data"


@pytest.fixture(scope="module")
def leveldb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("plyvel")
    return written("leveldb", tmp_path_factory.mktemp("leveldb"), 700)


@pytest.fixture(scope="module")
def lmdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lmdb")
    return written("lmdb", tmp_path_factory.mktemp("lmdb"), 700)


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for _ in range(20):
        top = written("sqlite", tmp_path_factory.mktemp("sqlite"), 700)
        log = sqlite_log(top).read_bytes()
        if log[16:24] == log[32 + 8 : 32 + 16]:  # else it was killed just as its log began anew: nothing is in it
            return top
    pytest.fail("no log with anything in it")


def level_table(top: Path) -> Path:
    return biggest(top, "*.ldb")


LEVELDB: dict[str, tuple[int, Callable[[Path], object]]] = {
    "CURRENT missing": (2, lambda top: (top / "CURRENT").unlink()),
    "MANIFEST bit flipped": (2, lambda top: flip(next(top.glob("MANIFEST-*")), 20)),
    "table missing": (2, lambda top: live_level_table(top).unlink()),
    "table cut": (2, lambda top: cut(live_level_table(top), -1)),
    "table bit flipped": (3, lambda top: flip(live_level_table(top), 1000)),
    "log bit flipped": (3, lambda top: flip(biggest(top, "*.log"), 300)),
    "log deleted": (2, lambda top: [path.unlink() for path in top.glob("*.log")]),
}


def live_level_table(top: Path) -> Path:
    with open(top / (top / "CURRENT").read_text().strip(), "rb") as file:
        numbers = manifest.Manifest.read(file).families[0].files
    return max((top / f"{number:06}.ldb" for number in numbers), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("name", LEVELDB)
def test_which_level_finds_what_of_leveldb(
    leveldb: Path, copied: Callable[[Path], Path], measured: Measured, name: str
) -> None:
    level, damage = LEVELDB[name]
    top = copied(leveldb)
    assert prove(top, 2).outcome is Outcome.OK
    damage(top)
    proof = prove(top)
    assert (proof.level, proof.outcome) == (level, Outcome.CORRUPT), proof
    measured(f"LevelDB, {name}: corrupt at level {level}")


def leaf_page(top: Path) -> int:
    """Some leaf of the newer tree, by its place in the file."""
    data = (top / "data.mdb").read_bytes()
    pages = [at for at in range(2 * 4096, len(data) - 4096, 4096) if struct.unpack_from("<H", data, at + 10)[0] == 2]
    return pages[len(pages) // 2]


LMDB: dict[str, tuple[int, Callable[[Path], object]]] = {
    "meta page damaged": (2, lambda top: flip(top / "data.mdb", 17)),
    "file cut to a few pages": (2, lambda top: cut(top / "data.mdb", 6 * 4096)),
    "file shorter than a page": (2, lambda top: cut(top / "data.mdb", 100)),
}


@pytest.mark.parametrize("name", LMDB)
def test_which_level_finds_what_of_lmdb(
    lmdb: Path, copied: Callable[[Path], Path], measured: Measured, name: str
) -> None:
    level, damage = LMDB[name]
    top = copied(lmdb)
    damage(top)
    proof = prove(top)
    assert (proof.level, proof.outcome) == (level, Outcome.CORRUPT), proof
    measured(f"LMDB, {name}: corrupt at level {level}")


def sqlite_log(top: Path) -> Path:
    return top / "records.sqlite-wal"


def fold_in(top: Path) -> None:
    """Everything into the database itself, so that it is what is read."""
    with sqlite3.connect(top / "records.sqlite") as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def damage_interior(top: Path) -> None:
    fold_in(top)
    data = (top / "records.sqlite").read_bytes()
    page = next(at for at in range(4096, len(data), 4096) if data[at] in (2, 5, 10, 13))
    flip(top / "records.sqlite", page, 0x40)


SQLITE: dict[str, tuple[int, Callable[[Path], object]]] = {
    "page damaged": (2, damage_interior),
    "file cut": (2, lambda top: (fold_in(top), cut(top / "records.sqlite", -8192))),
    "log's content flipped": (2, lambda top: flip(sqlite_log(top), 32 + 24 + 700)),
    "log's checksum flipped": (2, lambda top: flip(sqlite_log(top), 32 + 17)),
    "log's header flipped": (2, lambda top: flip(sqlite_log(top), 9)),
}


@pytest.mark.parametrize("name", SQLITE)
def test_which_level_finds_what_of_sqlite(
    sqlite: Path, copied: Callable[[Path], Path], measured: Measured, name: str
) -> None:
    level, damage = SQLITE[name]
    top = copied(sqlite)
    damage(top)
    proof = prove(top)
    assert (proof.level, proof.outcome) == (level, Outcome.CORRUPT), proof
    measured(f"SQLite, {name}: corrupt at level {level}")


@pytest.mark.parametrize("engine", ["leveldb", "lmdb", "sqlite"])
def test_a_killed_database_is_healthy_at_every_level(
    request: pytest.FixtureRequest, copied: Callable[[Path], Path], engine: str
) -> None:
    top = copied(request.getfixturevalue(engine))
    for level in (2, 3, 4):
        proof = prove(top, level)
        assert (proof.outcome, proof.level) == (Outcome.OK, level), proof
        assert [finding.kind for finding in proof.findings] == [engine]


def test_a_torn_end_of_sqlites_log_is_normal(sqlite: Path, copied: Callable[[Path], Path]) -> None:
    """A frame that was being written: the right salts, half a page. Behind it lies what an older round left."""
    top = copied(sqlite)
    with open(sqlite_log(top), "r+b") as file:
        head = file.read(32)
        frame = 24 + struct.unpack_from(">I", head, 8)[0]
        number = 0
        while (seen := file.read(frame)) and seen[8:16] == head[16:24]:
            number += 1
        file.seek(32 + number * frame)
        file.write(struct.pack(">II", 1, 0) + head[16:24] + bytes(8) + b"half a page" * 100)
    assert number > 0
    assert prove(top).outcome is Outcome.OK


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("engine", ["besu", "lmdb", "sqlite"])
def test_what_is_only_read_stays_as_it_was(
    request: pytest.FixtureRequest, copied: Callable[[Path], Path], engine: str, level: int
) -> None:
    """A restore in place proves what it is about to put there."""
    top = copied(request.getfixturevalue(engine))

    def content() -> dict[Path, bytes]:
        own = ("LOG", "LOCK", "lock.mdb", "records.sqlite-shm", "rocksdict-config.json")  # no data
        return {path: path.read_bytes() for path in top.rglob("*") if path.is_file() and path.name not in own}

    before = content()
    assert prove(top, level).outcome is Outcome.OK
    after = content()
    assert {path for path in after if path not in before} <= {path for path in after if "LOG.old" in path.name}
    assert {path: after.get(path) for path in before} == before


# ---------------------------------------------------------------------------------------------------------------- all


def test_files_that_are_no_database_are_not_proven(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("plain")
    proof = prove(tmp_path)
    assert (proof.outcome, proof.level, proof.findings) == (Outcome.OK, 1, ()) and proof.notes


def test_several_databases_count_by_the_worst(sqlite: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(sqlite, tmp_path / name)
    cut(tmp_path / "two" / "records.sqlite", 50)
    with open(tmp_path / "two" / "records.sqlite", "r+b") as file:
        assert file.read(15) == b"SQLite format 3"
    proof = prove(tmp_path)
    assert [finding.path for finding in proof.findings] == ["/live/one/records.sqlite", "/live/two/records.sqlite"]
    assert [finding.outcome for finding in proof.findings] == [Outcome.OK, Outcome.CORRUPT]
    assert (proof.outcome, proof.level) == (Outcome.CORRUPT, 2) and "two/records.sqlite" in proof.why


def test_an_engine_that_crashes_takes_nobody_along(lmdb: Path, copied: Callable[[Path], Path]) -> None:
    """LMDB reads through a mapping: of a file that is too short the kernel kills the reader."""
    top = copied(lmdb)
    size = (top / "data.mdb").stat().st_size
    data = (top / "data.mdb").read_bytes()
    used = max(at for at in range(0, size, 4096) if any(data[at : at + 4096]))
    cut(top / "data.mdb", used // 2 // 4096 * 4096)
    assert prove(top, 3).outcome is Outcome.CORRUPT


def test_masked_checksums_are_those_of_the_format() -> None:
    """RFC 3720, B.4, and LevelDB's own vectors (util/crc32c_test.cc)."""
    assert records._slow_crc32c(bytes(32)) == records.crc32c(bytes(32)) == 0x8A9136AA
    assert records._slow_crc32c(b"\xff" * 32) == 0x62A8AB43
    assert records._slow_crc32c(bytes(range(32))) == 0x46DD794E
