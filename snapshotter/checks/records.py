"""The record log that LevelDB's and RocksDB's MANIFESTs and write-ahead logs are made of: read with every checksum.
Must not know what is in a record.

Source: LevelDB doc/log_format.md; RocksDB db/log_format.h, db/log_reader.cc. Blocks of 32 KiB hold fragments: a masked
CRC32C (4 bytes), a length (2), a kind (1); recyclable kinds have the log's number (4) too, as the rest of a recycled
file holds records of an older one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

from msgspec import Struct

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
_MOST_PARTS = 8192  # of a record that is held in memory: 256 MiB, and one of a MANIFEST names a million tables then
#: Recyclable kinds: what each is without the number. 9..11 and 130, 131 are notes of the log's own, no records.
_RECYCLABLE = {5: FULL, 6: FIRST, 7: MIDDLE, 8: LAST, 11: 10, 131: 130}
_KNOWN = {FULL, FIRST, MIDDLE, LAST, 9, 10, 130, *_RECYCLABLE}


def _tables() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE: list[int] = []


def _slow_crc32c(data: bytes) -> int:
    global _TABLE
    table = _TABLE = _TABLE or _tables()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli). With google-crc32c installed a thousand times as fast as without (some MB a second)."""
    global _crc32c
    if _crc32c is None:
        try:
            from google_crc32c import value

            _crc32c = value
        except ImportError:
            _crc32c = _slow_crc32c
    return _crc32c(data)


_crc32c: Callable[[bytes], int] | None = None


def unmask(crc: int) -> int:
    """Inverse of the masking that keeps a CRC of data with CRCs in it from being weak."""
    rotated = (crc - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


class Fragment(Struct, frozen=True):
    """`kind` is 0 for what is no valid fragment at `offset` (bytes from the file's start): torn, damaged, or old."""

    kind: int
    data: bytes
    offset: int


def fragments(file: BinaryIO, number: int | None = None) -> Iterator[Fragment]:
    """Every fragment, valid or not, in order. `number` is the log's own, for logs that may be recycled: what carries
    another one with a right checksum ends the log. Raises OSError."""
    start = 0
    recycled = False  # then a fragment needs 11 bytes, and what is less at a block's end is filled with zeros
    while block := file.read(BLOCK):
        at = 0
        while len(block) - at >= 7:
            masked, length, kind = struct.unpack_from("<IHB", block, at)
            if kind == 0 and length == 0:
                if recycled and len(block) - at < 11 and not any(block[at:]):
                    break
                if any(block[at:]):
                    yield Fragment(0, b"", start + at)  # zeros over what was a header
                    break
                yield Fragment(0, b"", start + at)  # nothing was written here (files are preallocated)
                break
            head = 11 if kind in _RECYCLABLE else 7
            end = at + head + length
            if kind not in _KNOWN or end > len(block) or unmask(masked) != crc32c(block[at + 6 : end]):
                yield Fragment(0, b"", start + at)
                if end > len(block):
                    break
                at = end  # the length may be right: what follows then tells damage from an end
                continue
            recycled = recycled or head == 11
            if head == 11 and number is not None:
                (belongs,) = struct.unpack_from("<I", block, at + 7)
                if belongs != number & 0xFFFFFFFF:
                    return
            yield Fragment(_RECYCLABLE.get(kind, kind), block[at + head : end], start + at)
            at = end
        start += len(block)


def hole(file: BinaryIO, number: int | None = None) -> int | None:
    """Where a log is damaged: the offset (bytes) of the first invalid fragment that has valid ones of the same log
    after it. None: whole, but perhaps for a torn or unused end, which every image of a running writer may have."""
    bad: int | None = None
    for fragment in fragments(file, number):
        if fragment.kind == 0:
            bad = fragment.offset if bad is None else bad
        elif bad is not None:
            return bad
    return None


class Damaged(ValueError):
    """What isn't as its format has it. One line for a person."""


def records(file: BinaryIO) -> Iterator[bytes]:
    """Whole records, up to a torn end. Raises Damaged for anything invalid with something valid after it, OSError."""
    bad: int | None = None
    parts: list[bytes] | None = None
    for fragment in fragments(file):
        if fragment.kind == 0:
            bad = fragment.offset if bad is None else bad
            continue
        if bad is not None:
            raise Damaged(f"its record at byte {bad} is damaged")
        if fragment.kind in (FULL, FIRST):
            if parts is not None:
                raise Damaged(f"a record before byte {fragment.offset} has no end")
            if fragment.kind == FULL:
                yield fragment.data
            else:
                parts = [fragment.data]
        elif fragment.kind in (MIDDLE, LAST):
            if parts is None:
                raise Damaged(f"the record at byte {fragment.offset} has no beginning")
            parts.append(fragment.data)
            if len(parts) > _MOST_PARTS:
                raise Damaged(f"the record before byte {fragment.offset} is too long to be one")
            if fragment.kind == LAST:
                yield b"".join(parts)
                parts = None


class Reader:
    """Fields of a record, in their order. Raises Damaged where it ends too early."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def varint(self) -> int:
        value = shift = 0
        while True:
            if self.at >= len(self.data) or shift > 63:
                raise Damaged("a number in it has no end")
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def chunk(self) -> bytes:
        """Bytes with their length before them."""
        length = self.varint()
        if length > len(self.data) - self.at:
            raise Damaged("a field in it has no end")
        self.at += length
        return self.data[self.at - length : self.at]
