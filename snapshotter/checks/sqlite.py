"""SQLite: its header, its write-ahead log, and its own checks. Run on a clone, in a process of its own.

A damaged or cut log is dropped by SQLite in silence from the first bad frame on; each frame's checksum continues the
one before, so a good frame after a bad one tells damage from an end. Source: sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import os
import struct

from snapshotter.checks import CheckFailed, Outcome, corrupt, no_pipes, opened

MAGIC = b"SQLite format 3\0"
_SIZES = {1 << power for power in range(9, 17)}
_ROWS = 20
#: Connections that are never closed: the last one to close folds the log into the database, and a check that may run on
#: what is about to be restored leaves that as it is. They end with the process.
_KEPT: list[object] = []


def level2(path: str, crash: bool) -> None:
    """Header, size, log; then SQLite's quick_check."""
    no_pipes(path + suffix for suffix in ("-wal", "-journal", "-shm"))
    _header(path)
    if not crash:
        _log(path + "-wal")
    _pragma(path, "quick_check")


def level3(path: str, crash: bool) -> None:
    """SQLite's integrity_check: every page is read, every index compared. (Its pages have no checksums.)"""
    _pragma(path, "integrity_check")


def level4(path: str, crash: bool) -> None:
    """It is opened for writing, takes a transaction (undone), and folds its log in."""
    import sqlite3

    database = _open(path)
    try:
        database.execute("BEGIN IMMEDIATE")
        database.execute("CREATE TABLE snapshotter_probe (x)")
        database.execute("ROLLBACK")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        raise _judgement(error) from None
    finally:
        database.close()


def _header(path: str) -> None:
    size = os.path.getsize(path)
    with opened(path) as file:
        head = file.read(100)
    if not head and not size:
        return  # SQLite makes an empty database of an empty file
    if len(head) < 100:
        raise corrupt(f"has {size} bytes, less than a header")
    page = struct.unpack_from(">H", head, 16)[0]
    page = 65536 if page == 1 else page
    if page not in _SIZES:
        raise corrupt(f"its header gives a page size of {page}")
    if head[19] > 2 or struct.unpack_from(">I", head, 44)[0] > 4:
        raise CheckFailed(Outcome.TOOL_TOO_OLD, "its header has a newer format than is known here")
    changes, pages = struct.unpack_from(">II", head, 24)
    valid_for = struct.unpack_from(">I", head, 92)[0]
    # The newest pages may still be in its log, and an older library leaves the count as it was.
    logged = os.path.exists(path + "-wal") and os.path.getsize(path + "-wal") > 32
    hot = os.path.exists(path + "-journal") and os.path.getsize(path + "-journal") > 0
    if changes == valid_for and pages and size < pages * page and not (logged or hot):
        raise corrupt(f"has {size} bytes, its header says {pages} pages of {page}")


def _sum(data: bytes, one: int, two: int, order: str) -> tuple[int, int]:
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return one, two


def _log(path: str) -> None:
    """Raise CheckFailed if a frame is damaged that has a good one after it. Frames of an older round (their salts
    differ) are no part of the log."""
    try:
        file = opened(path)
    except FileNotFoundError:
        return
    with file:
        head = file.read(32)
        if len(head) < 32:
            return  # nothing was ever logged
        magic, version, page, _, salt1, salt2, sum1, sum2 = struct.unpack(">8I", head)
        if magic not in (0x377F0682, 0x377F0683):
            if any(head):
                raise corrupt("its write-ahead log has no header")
            return
        if version != 3007000:
            raise CheckFailed(Outcome.TOOL_TOO_OLD, f"its write-ahead log has version {version}")
        order = ">" if magic & 1 else "<"
        running = _sum(head[:24], 0, 0, order)
        if running != (sum1, sum2) or page not in _SIZES:
            raise corrupt("the header of its write-ahead log is damaged")
        bad: int | None = None
        seeds = [running]
        number = 0
        while len(frame := file.read(24 + page)) == 24 + page:
            number += 1
            stored = struct.unpack_from(">2I", frame, 16)
            if struct.unpack_from(">2I", frame, 8) != (salt1, salt2):
                if bad is None:
                    bad = number
                    seeds = []
                continue
            sums = [_sum(frame[24:], *_sum(frame[:8], *seed, order), order) for seed in seeds]
            if stored in sums:
                if bad is not None:
                    raise corrupt(f"frame {bad} of its write-ahead log is damaged: what follows would be lost")
                seeds = [stored]
            else:
                bad = number if bad is None else bad
                # Whether its content or its own checksum was hit: one of these began the next.
                seeds = [stored, *sums]
                seeds = seeds[:4]


def _open(path: str):  # type: ignore[no-untyped-def]
    import sqlite3
    from urllib.parse import quote

    try:
        database = sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True, isolation_level=None, timeout=10)
    except sqlite3.Error as error:
        raise _judgement(error) from None
    database.text_factory = bytes  # what an application stores as text need not be UTF-8
    return database


def _pragma(path: str, check: str) -> None:
    import sqlite3

    database = _open(path)
    _KEPT.append(database)
    try:
        rows = database.execute(f"PRAGMA {check}({_ROWS})").fetchall()
    except sqlite3.Error as error:
        raise _judgement(error) from None
    said = [row[0].decode(errors="replace") for row in rows]
    if said != ["ok"]:
        raise corrupt(" ".join(said[0].split())[:300])


def _judgement(error: Exception) -> CheckFailed:
    said = str(error)
    if "malformed" in said or "not a database" in said or "disk I/O error" in said:
        return corrupt(said)
    if "unsupported file format" in said:
        return CheckFailed(Outcome.TOOL_TOO_OLD, said)
    return CheckFailed(Outcome.COULD_NOT_RUN, said)
