"""LMDB: its two meta pages, and its trees. Its pages have no checksums, and a file shorter than a page that is read
kills the reader (SIGBUS): so whoever opens one does it in a process of its own. Source: liblmdb/mdb.c (0.9)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from snapshotter.checks import CheckFailed, Outcome, corrupt, opened
from snapshotter.core.errors import pip_install

MAGIC = 0xBEEFC0DE
MAGIC_AT = 16  # behind the first page's header
_BRANCH, _LEAF, _METAPAGE = 0x01, 0x02, 0x08
_DEEPEST = 32  # CURSOR_STACK: the engine follows no tree that is deeper
_NONE = (1 << 64) - 1


def level2(path: str, crash: bool) -> None:
    """Both meta pages are ones, and from the newer one's roots every branch leads to pages that are in the file.
    (The file may be shorter than `last page` says: a page taken and given back in one transaction is never written.)"""
    pages = os.path.getsize(path)
    branches: set[int] = set()
    with opened(path) as file:
        first = _meta(file.read(4096), 0)
        file.seek(first.page)
        newest = max(first, _meta(file.read(4096), 1), key=lambda meta: meta.transaction)
        pages //= newest.page
        todo = [(root, depth) for root, depth in newest.trees if root != _NONE]
        if any(depth > _DEEPEST for _, depth in todo):
            raise corrupt(f"its trees are deeper than {_DEEPEST} pages")
        while todo:
            number, depth = todo.pop()
            if number >= pages:
                raise corrupt(f"page {number} isn't in the file, which has {pages}")
            file.seek(number * newest.page)
            head = file.read(16)
            itself, flags, lower = struct.unpack("<Q2xHH2x", head)
            if itself != number or not flags & (_BRANCH if depth > 1 else _LEAF):
                raise corrupt(f"page {number} is damaged")
            if depth > 1:
                # A page is in a tree once: one that leads to itself would keep us busy for ever. (Leaves, which lead
                # nowhere, are nearly all pages: too many to remember.)
                page = head + file.read(newest.page - 16)
                nodes = struct.unpack_from(f"<{(lower - 16) // 2}H", page, 16)
                parts = (struct.unpack_from("<HHH", page, at) for at in nodes)
                below = {low | middle << 16 | high << 32 for low, middle, high in parts}
                if number in branches or len(below) < len(nodes):
                    raise corrupt(f"page {number} is damaged: a page is in the tree twice")
                branches.add(number)
                todo += [(each, depth - 1) for each in below]


class _Meta(Struct, frozen=True):
    transaction: int
    page: int  # bytes
    trees: tuple[tuple[int, int], ...]  # root page and depth: the free pages', the main database's


def _meta(data: bytes, number: int) -> _Meta:
    if len(data) < 152:
        raise corrupt(f"meta page {number} is cut off")
    flags, (magic, version) = struct.unpack_from("<H", data, 10)[0], struct.unpack_from("<II", data, 16)
    if magic != MAGIC or not flags & _METAPAGE:
        raise corrupt(f"meta page {number} is damaged")
    if version != 1:
        raise CheckFailed(Outcome.TOOL_TOO_OLD, f"its format is version {version}")
    page = struct.unpack_from("<I", data, 40)[0]  # the free tree's md_pad holds it
    if page not in {1 << power for power in range(9, 17)}:
        raise corrupt(f"meta page {number} gives a page size of {page}")
    trees = tuple(
        (struct.unpack_from("<Q", data, at + 40)[0], struct.unpack_from("<H", data, at + 6)[0]) for at in (40, 88)
    )
    return _Meta(struct.unpack_from("<Q", data, 144)[0], page, trees)


def level3(path: str, crash: bool) -> None:
    """Every entry of every database in it is read."""
    _read(path, writable=False)


def level4(path: str, crash: bool) -> None:
    """It is opened for writing and takes a transaction (undone)."""
    _read(path, writable=True)


def _read(path: str, *, writable: bool) -> None:
    try:
        import lmdb
    except ImportError:
        raise CheckFailed(Outcome.TOOL_MISSING, f"lmdb isn't installed: {pip_install('verify')}") from None
    try:
        inside = os.path.basename(path) == "data.mdb"
        with lmdb.open(
            os.path.dirname(path) if inside else path, subdir=inside, create=False, readonly=not writable, max_dbs=256
        ) as environment:
            if writable:
                environment.begin(write=True).abort()
                return
            with environment.begin() as transaction:
                _walk(environment, transaction, os.path.getsize(path))
    except lmdb.VersionMismatchError as error:
        raise CheckFailed(Outcome.TOOL_TOO_OLD, str(error)) from None
    except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.InvalidError) as error:
        raise corrupt(str(error)) from None
    except lmdb.Error as error:
        raise CheckFailed(Outcome.COULD_NOT_RUN, str(error)) from None


def _walk(environment: Any, transaction: Any, size: int) -> None:
    """The main database, and each of its entries that is a database itself."""
    import lmdb

    with transaction.cursor() as cursor:
        for key in _keys(cursor, transaction.stat()["entries"], size):
            try:
                inner = environment.open_db(key, txn=transaction, create=False)
            except (lmdb.IncompatibleError, lmdb.NotFoundError, lmdb.BadValsizeError, lmdb.DbsFullError):
                continue
            with transaction.cursor(inner) as entries:
                for _ in _keys(entries, transaction.stat(inner)["entries"], size):
                    pass


def _keys(cursor: Any, said: int, size: int) -> Iterator[bytes]:
    """The keys of one database, which says how many it has, in a file of so many bytes: pages that lead to each other
    have no end, so that is believed as far as it can be true. Raises CheckFailed if it isn't."""
    if said > size:
        raise corrupt(f"{said} entries can't be in a file of {size} bytes")
    count = 0
    for key, _ in cursor:
        count += 1
        if count > said:
            break
        yield key
    if count != said:
        raise corrupt(f"{count} entries are found of {said}")
