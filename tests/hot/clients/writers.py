"""Small writers on databases that people run nodes on: LevelDB, LMDB and SQLite with a write-ahead log, for tests.

Record n is one synced transaction; after the engine has acknowledged it, n is written to a file outside the data path:
what stands there may never be missing from an image taken later. The newest records stay, older ones are removed:
so blocks of the database are used again and again, and compaction and checkpoints never end.

    python writers.py run ENGINE DATA ACKS      runs until SIGTERM
    python writers.py check ENGINE DATA         opens with the engine, reads everything, prints JSON
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from tests.hot.besu_shaped import payload
from tests.support import CHECKOUT, Node, as_user

KEPT = 600
PAUSE_S = 0.001  # between records: the writer must not starve the tests of a small machine


def value_of(number: int) -> bytes:
    """100 to 6000 bytes, found from the number alone."""
    return payload(number, "record", 100 + number * 7919 % 5900)


class Engine(ABC):
    """One database. Numbers are > 0; the newest `kept` records are in it."""

    kept = KEPT

    @abstractmethod
    def __init__(self, data: Path) -> None: ...

    @abstractmethod
    def write(self, number: int) -> None:
        """One synced transaction: the record, the head, and the end of the record that is KEPT older."""

    @abstractmethod
    def head(self) -> int: ...

    @abstractmethod
    def records(self) -> Iterator[tuple[int, bytes]]:
        """All records in their order; raises at damage."""

    def end(self) -> None:
        """Leave the database as its engine leaves it."""


def key_of(number: int) -> bytes:
    return b"r" + number.to_bytes(8, "big")


class LevelDb(Engine):
    """A small write buffer: files come and go all the time."""

    def __init__(self, data: Path) -> None:
        import plyvel

        self.database = plyvel.DB(
            str(data), create_if_missing=True, paranoid_checks=True, write_buffer_size=256 << 10, max_file_size=1 << 20
        )

    def write(self, number: int) -> None:
        with self.database.write_batch(sync=True, transaction=True) as batch:
            batch.put(key_of(number), value_of(number))
            batch.delete(key_of(max(0, number - KEPT)))
            batch.put(b"head", key_of(number))

    def head(self) -> int:
        return int.from_bytes((self.database.get(b"head", verify_checksums=True) or b"")[1:], "big")

    def records(self) -> Iterator[tuple[int, bytes]]:
        for key, value in self.database.iterator(prefix=b"r", verify_checksums=True):
            yield int.from_bytes(key[1:], "big"), value

    def end(self) -> None:
        self.database.close()


class Lmdb(Engine):
    """Written through a shared mapping, whose stores don't change the file's times between two writebacks."""

    sync = True

    def __init__(self, data: Path) -> None:
        import lmdb

        data.mkdir(exist_ok=True)
        self.database = lmdb.open(str(data), map_size=256 << 20, writemap=True, sync=self.sync, metasync=self.sync)

    def write(self, number: int) -> None:
        with self.database.begin(write=True) as transaction:
            transaction.put(key_of(number), value_of(number))
            if number > KEPT:
                transaction.delete(key_of(number - KEPT))
            transaction.put(b"head", key_of(number))

    def head(self) -> int:
        with self.database.begin() as transaction:
            return int.from_bytes((transaction.get(b"head") or b"")[1:], "big")

    def records(self) -> Iterator[tuple[int, bytes]]:
        with self.database.begin() as transaction, transaction.cursor() as cursor:
            cursor.set_range(b"r")
            for key, value in cursor:
                yield int.from_bytes(key[1:], "big"), value

    def end(self) -> None:
        self.database.close()


class LmdbUnsynced(Lmdb):
    """Never asks for a writeback: its newest pages are only in memory, behind times that tell nothing of them. What
    holds the writer still and reads the files must have them all the same; a power cut would not."""

    sync = False


class Sqlite(Engine):
    """A write-ahead log that is checkpointed, and begun anew, every few dozen transactions."""

    def __init__(self, data: Path) -> None:
        data.mkdir(exist_ok=True)
        self.database = sqlite3.connect(data / "records.sqlite", isolation_level=None)
        for word in ("journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 100"):
            self.database.execute(f"PRAGMA {word}")
        self.database.execute("CREATE TABLE IF NOT EXISTS record (number INTEGER PRIMARY KEY, value BLOB)")
        self.database.execute("CREATE TABLE IF NOT EXISTS head (one INTEGER PRIMARY KEY, number INTEGER)")

    def write(self, number: int) -> None:
        self.database.execute("BEGIN IMMEDIATE")
        self.database.execute("INSERT INTO record VALUES (?, ?)", (number, value_of(number)))
        self.database.execute("DELETE FROM record WHERE number <= ?", (number - KEPT,))
        self.database.execute("INSERT OR REPLACE INTO head VALUES (1, ?)", (number,))
        self.database.execute("COMMIT")

    def head(self) -> int:
        found = self.database.execute("SELECT number FROM head").fetchone()
        return int(found[0]) if found else 0

    def records(self) -> Iterator[tuple[int, bytes]]:
        (said,) = self.database.execute("PRAGMA integrity_check").fetchone()
        if said != "ok":
            raise ValueError(said)
        yield from self.database.execute("SELECT number, value FROM record ORDER BY number")

    def end(self) -> None:
        self.database.close()


class Directories(Engine):
    """No database: each record lies in a directory of its own, made aside and renamed into the place of an older one,
    as checkpoints are published. So what has the same path before and after is another directory."""

    kept = 16

    def __init__(self, data: Path) -> None:
        data.mkdir(exist_ok=True)
        # As every database has one. It also tells whom to pause: one that has nothing open for writing at the instant
        # when that is asked, and writes afterwards, can only be found out (and the take refused).
        self.lock = os.open(data / "LOCK", os.O_RDWR | os.O_CREAT, 0o600)
        self.data, self.making, self.gone = data, data / "making", data / "gone"
        if (self.gone / "number").exists():
            slot = self.slot(int((self.gone / "number").read_text()))
            if not slot.exists():
                self.gone.rename(slot)
        for leftover in (self.making, self.gone):
            shutil.rmtree(leftover, ignore_errors=True)

    def slot(self, number: int) -> Path:
        return self.data / f"slot-{number % self.kept}"

    def write(self, number: int) -> None:
        self.making.mkdir()
        for name, content in (("number", str(number).encode()), ("value", value_of(number))):
            with open(self.making / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self.sync(self.making)
        if self.slot(number).exists():
            self.slot(number).rename(self.gone)
        self.making.rename(self.slot(number))
        self.sync(self.data)
        shutil.rmtree(self.gone, ignore_errors=True)

    @staticmethod
    def sync(directory: Path) -> None:
        fd = os.open(directory, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    def head(self) -> int:
        return max((number for number, _ in self.records()), default=0)

    def records(self) -> Iterator[tuple[int, bytes]]:
        for slot in self.data.glob("slot-*"):
            yield int((slot / "number").read_text()), (slot / "value").read_bytes()


ENGINES: dict[str, type[Engine]] = {
    "leveldb": LevelDb,
    "lmdb": Lmdb,
    "lmdb-unsynced": LmdbUnsynced,
    "sqlite": Sqlite,
    "directories": Directories,
}


def run(engine: str, data: Path, acks: Path) -> None:
    database = ENGINES[engine](data)
    number = database.head()
    stop = False

    def end(*_: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, end)
    log = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    while not stop:
        number += 1
        database.write(number)
        os.pwrite(log, f"{number:012d}\n".encode(), 0)
        time.sleep(PAUSE_S)
    database.end()


def check(engine: str, data: Path) -> dict[str, int]:
    """`lost`: how many of the records up to the head, that weren't removed, are missing or wrong, and how many are
    there that must not be."""
    database = ENGINES[engine](data)
    head = database.head()
    expected = set(range(max(1, head - database.kept + 1), head + 1))
    lost = 0
    for number, value in database.records():
        if number in expected and value == value_of(number):
            expected.remove(number)
        else:
            lost += 1
    database.end()
    return {"head": head, "lost": lost + len(expected)}


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tests.hot.clients.writers", *words]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}


class Writer(Node):
    """One of the writers as a process of its own."""

    def __init__(self, engine: str, data: Path, uid: int | None = None) -> None:
        self.data = data
        self.acks = data.parent / f"{data.name}.acks"
        self.acks.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [*as_user(uid), *_command("run", engine, str(data), str(self.acks))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=_environment(),
            cwd="/",
        )


def check_apart(engine: str, data: Path) -> dict[str, int]:
    """`check` in a process of its own: an engine may crash on a bad database."""
    done = subprocess.run(
        _command("check", engine, str(data)), capture_output=True, text=True, env=_environment(), cwd="/", timeout=300
    )
    assert done.returncode == 0, f"the {engine} does not open: {done.stderr[-500:]}"
    found: dict[str, int] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        json.dump(check(sys.argv[2], Path(sys.argv[3])), sys.stdout)
