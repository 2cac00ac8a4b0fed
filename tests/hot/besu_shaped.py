"""A node shaped like Hyperledger Besu, for tests and the demo: Besu itself can't be had on these machines.

The data path has Besu's documented layout (key, metadata beside `database/`, caches, runtime files) and the database
is one
RocksDB with many column families that share one WAL, with blob files and recycled WAL files, as Besu keeps it. A
"block" n is one
synced write batch over several column families. After RocksDB has acknowledged it, `n` is written to the
acknowledgements
file, which lies outside the data path: what stands there may never be missing from an image taken later.

    python besu_shaped.py run DATA ACKS [--rate MB/s] [--fill MB] [--kept BLOCKS]    runs until SIGTERM
    python besu_shaped.py check DATA                                 opens with the engine, reads everything, prints
    JSON
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FAMILIES = [
    "default", "blockchain", "account-state", "code", "storage", "trie-branch", "trie-log", "variables",
    "pruning", "snapsync-missing", "snapsync-ranges", "snapsync-heal", "world-state", "private-state",
    "private-metadata", "backward-sync-headers", "backward-sync-blocks", "backward-sync-chain", "goquorum",
    "chain-pruner", "freezer", "history",
]  # fmt: skip
WRITTEN = ["blockchain", "account-state", "storage", "trie-log"]  # one entry each per block
#: Blocks; older ones are pruned, as Besu prunes its trie logs: the database doesn't grow for ever. What was chosen is
#: in the database, for `check`: it makes the bytes of every one again, minutes for all of them on an emulated CPU.
KEPT = 5_000


def options() -> Any:
    from rocksdict import Options

    made = Options(raw_mode=True)
    made.create_if_missing(True)
    made.create_missing_column_families(True)
    made.set_enable_blob_files(True)
    made.set_min_blob_size(2000)
    made.set_blob_file_size(16 << 20)
    made.set_enable_blob_gc(True)
    made.set_write_buffer_size(8 << 20)
    made.set_db_write_buffer_size(64 << 20)
    made.set_recycle_log_file_num(4)
    made.set_max_total_wal_size(32 << 20)
    made.set_keep_log_file_num(2)
    return made


def open_database(data: Path) -> Any:
    from rocksdict import Rdict

    return Rdict(str(data / "database"), options=options(), column_families={name: options() for name in FAMILIES})


def payload(number: int, family: str, size: int) -> bytes:
    """What must be found for block `number`: checkable without having been stored anywhere else."""
    seed = hashlib.sha256(f"{number}/{family}".encode()).digest()
    return seed * (size // len(seed)) if size <= 64 else hashlib.shake_256(seed).digest(size)


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "big")


def lay_out(data: Path) -> None:
    """Besu's files around the database."""
    data.mkdir(parents=True, exist_ok=True)
    if not (data / "key").exists():
        with open(os.open(data / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write("0x" + os.urandom(32).hex())
        (data / "DATABASE_METADATA.json").write_text('{"v2":{"format":"BONSAI","version":3}}')
        (data / "VERSION_METADATA.json").write_text('{"besuVersion":"25.7.0"}')
        (data / "caches").mkdir()
        (data / "caches" / "logBloom-0.cache").write_bytes(bytes(4096))
    (data / "besu.ports").write_text("discovery=30303\np2p=30303\njson-rpc=8545\n")


def run(data: Path, acks: Path, rate: float, fill: int, value: int, kept: int) -> None:
    from rocksdict import WriteBatch, WriteOptions

    lay_out(data)
    database = open_database(data)
    families = {name: database.get_column_family_handle(name) for name in FAMILIES}
    chaff = database.get_column_family("world-state")
    for number in range(fill):
        chaff[key_of(number)] = os.urandom(1 << 20)
    if fill:
        database.flush(True)
    synced = WriteOptions()
    synced.sync = True
    number = last_of(database)
    variables = database.get_column_family("variables")
    assert variables.get(b"kept", key_of(kept)) == key_of(kept), "what was pruned by another count isn't lost"
    variables[b"kept"] = key_of(kept)
    stop = False

    def end(*_: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, end)
    log = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    step = value * len(WRITTEN) / (rate * 1e6) if rate else 0.0
    due = time.monotonic()
    while not stop:
        number += 1
        batch = WriteBatch(raw_mode=True)
        for name in WRITTEN:
            batch.put(key_of(number), payload(number, name, value), families[name])
            if number > kept:
                batch.delete(key_of(number - kept), families[name])
        batch.put(b"head", key_of(number), families["variables"])
        database.write(batch, synced)
        os.pwrite(log, f"{number:012d}\n".encode(), 0)
        due = max(due + step, time.monotonic() - 1.0)
        time.sleep(max(0.0, due - time.monotonic()))
    database.close()


def last_of(database: Any) -> int:
    head = database.get_column_family("variables").get(b"head")
    return int.from_bytes(head, "big") if head else 0


def check(data: Path) -> dict[str, Any]:
    """Open with the engine and read every value back. `lost` are blocks of the newest that are kept, up to the head,
    that are not whole."""
    from rocksdict import ReadOptions

    database = open_database(data)
    head = last_of(database)
    kept = int.from_bytes(database.get_column_family("variables").get(b"kept", key_of(KEPT)), "big")
    lost = 0
    for name in WRITTEN:
        iterator = database.get_column_family(name).iter(ReadOptions())
        iterator.seek_to_first()
        expected = max(1, head - kept + 1)
        while iterator.valid():
            number, found = int.from_bytes(iterator.key(), "big"), iterator.value()
            lost += number - expected + (found != payload(number, name, len(found)))
            expected = number + 1
            iterator.next()
        iterator.status()  # raises at corruption: `valid()` alone ends silently there
        lost += max(0, head - expected + 1)
        if expected - 1 > head:
            lost += 1  # a column family ahead of the others: not one instant
    database.close()
    return {"head": head, "lost": lost}


def acknowledged(acks: Path) -> int:
    """The number of the last block that the engine has acknowledged."""
    try:
        return int(acks.read_text().strip() or 0)
    except (OSError, ValueError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("data", type=Path)
    runner.add_argument("acks", type=Path)
    runner.add_argument("--rate", type=float, default=5.0, help="MB/s; 0 is as fast as it goes")
    runner.add_argument("--fill", type=int, default=0, help="MB written before the first block")
    runner.add_argument("--value", type=int, default=4000, help="bytes per value")
    runner.add_argument("--kept", type=int, default=KEPT, help="blocks that aren't pruned")
    checker = commands.add_parser("check")
    checker.add_argument("data", type=Path)
    given = parser.parse_args()
    if given.command == "run":
        run(given.data, given.acks, given.rate, given.fill, given.value, given.kept)
    else:
        json.dump(check(given.data), sys.stdout)


if __name__ == "__main__":
    main()
