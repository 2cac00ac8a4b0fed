"""Record logs as RocksDB writes them into recycled files: whole ones are whole, and holes are found."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotter import checks
from snapshotter.checks import Outcome, records
from snapshotter.nodes import profiles

NUMBER = 7
RECYCLABLE_FULL = 5

#: Writes many small records into the log of a RocksDB that recycles its logs, as Besu sets it, and dies over it.
WRITER = """
import os, random, sys
from rocksdict import Options, Rdict
options = Options(raw_mode=True)
options.create_if_missing(True)
options.set_recycle_log_file_num(4)
database = Rdict(sys.argv[1], options)
chance = random.Random(1)
for number in range(60_000):
    database[number.to_bytes(4, "big")] = chance.randbytes(chance.randrange(60))
os._exit(0)
"""


def fragment(data: bytes, kind: int = RECYCLABLE_FULL) -> bytes:
    covered = bytes([kind]) + (NUMBER.to_bytes(4, "little") if kind == RECYCLABLE_FULL else b"") + data
    crc = records.crc32c(covered)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked.to_bytes(4, "little") + len(data).to_bytes(2, "little") + covered


def block(tail: int, before: int = 0) -> bytes:
    """Two fragments, and `tail` zeros; `before`: bytes of the block that are there already."""
    first = fragment(b"a" * 100)
    return first + fragment(b"b" * (records.BLOCK - before - len(first) - 11 - tail)) + bytes(tail)


def hole(log: bytes) -> int | None:
    return records.hole(io.BytesIO(log), NUMBER)


@pytest.mark.parametrize("tail", range(11))
def test_a_rest_that_no_recyclable_header_fits_in_is_no_hole(tail: int) -> None:
    whole = block(tail) * 2 + fragment(b"end")
    assert hole(whole) is None
    kinds = [found.kind for found in records.fragments(io.BytesIO(whole), NUMBER)]
    assert kinds == [records.FULL] * 5
    alone = fragment(b"c" * (records.BLOCK - 11 - tail)) + bytes(tail)  # the rest follows the log's first fragment
    assert hole(alone + block(tail) + fragment(b"end")) is None
    # A note of the log's own (how it is compressed), whose header has 7 bytes, may be the first.
    note = fragment(b"\0\0\0\0", kind=9)
    assert hole(note + block(tail, len(note)) + fragment(b"end")) is None


@pytest.mark.parametrize("tail", [7, 8, 9, 10])
def test_a_real_hole_is_still_found(tail: int) -> None:
    whole = block(tail) * 2 + fragment(b"end")
    end = records.BLOCK - tail
    for at in (
        slice(0, 11),  # a header at a block's beginning
        slice(20, 30),  # what is in a fragment
        slice(111, 4096),
        slice(end - 20, records.BLOCK),  # the end of the last fragment before the rest
        slice(records.BLOCK, 2 * records.BLOCK),  # a block that was never written
    ):
        damaged = bytearray(whole)
        damaged[at] = bytes(at.stop - at.start)
        assert hole(bytes(damaged)) is not None, at
    plain = fragment(b"a" * (records.BLOCK - 7 - 20), kind=records.FULL) + bytes(20)
    assert hole(plain + fragment(b"end", kind=records.FULL)) == records.BLOCK - 20
    # In a log that isn't recycled a header of 7 bytes fits in, so zeros are one that is lost.
    plain = fragment(b"a" * (records.BLOCK - 7 - tail), kind=records.FULL) + bytes(tail)
    assert hole(plain + fragment(b"end", kind=records.FULL)) == records.BLOCK - tail


def test_a_log_that_rocksdb_recycles_is_whole_and_a_hole_in_it_is_found(tmp_path: Path) -> None:
    pytest.importorskip("rocksdict")
    top = tmp_path / "database"
    subprocess.run([sys.executable, "-c", WRITER, str(top)], check=True, timeout=300)
    (log,) = top.glob("*.log")
    with open(log, "rb") as file:
        found = list(records.fragments(file, int(log.stem)))
    ends = [each.offset + 11 + len(each.data) for each in found]
    tails = [-end % records.BLOCK for end in ends]
    assert sum(7 <= tail <= 10 for tail in tails) >= 3 and all(each.kind for each in found)
    proof = checks.prove([("/live", str(tmp_path))], profiles.get("generic"), 3)
    assert (proof.outcome, proof.level) == (Outcome.OK, 3), proof
    chance = random.Random(2)
    for _ in range(3):
        at = chance.randrange(len(found) - 1)
        before = log.read_bytes()
        with open(log, "r+b") as file:
            file.seek(found[at].offset)
            file.write(os.urandom(11))
        with open(log, "rb") as file:
            assert records.hole(file, int(log.stem)) == found[at].offset
        log.write_bytes(before)
