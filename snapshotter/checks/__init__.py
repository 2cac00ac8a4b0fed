"""How a database is proven: found by its files, then checked level by level on a clone that may be written to.

Must know no provider, no set and no command: it is given directories, and says what they are worth.

- L2 structure: the database's own pointers resolve. Our own readers, no library (SQLite's own is Python's).
- L3 every block is read back by the engine, with its checksum where the format has one.
- L4 the engine opens it for writing and recovers.

L0 and L1 (the storage says complete; files match the manifest) are the driver's: it proved them by attaching the clone.
Levels above 2 run an engine, in a process of its own: one that crashes on a bad file takes nobody along.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import BinaryIO

from msgspec import Struct

from snapshotter.core.command import run
from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.core.model import Progress, Report, no_report
from snapshotter.host.mounts import is_under
from snapshotter.nodes.profiles import Profile, matches

HIGHEST = 4


class Outcome(StrEnum):
    """What a check came to. Only OK and CORRUPT say something of the image."""

    OK = "ok"
    CORRUPT = "corrupt"
    TOOL_TOO_OLD = "tool-too-old"  # a format newer than what reads it here: nothing is known
    TOOL_MISSING = "tool-missing"
    COULD_NOT_RUN = "could-not-run"


class CheckFailed(Exception):
    """A check that isn't ok. `why` is one line for a person. `no_check`: a tool is missing that nobody can install, as
    there is none."""

    def __init__(self, outcome: Outcome, why: str, *, no_check: bool = False) -> None:
        super().__init__(why)
        self.outcome = outcome
        self.why = why
        self.no_check = no_check


def corrupt(why: str) -> CheckFailed:
    return CheckFailed(Outcome.CORRUPT, why)


def opened(path: str) -> BinaryIO:
    """A plain file, or one that a link leads to, for reading. The node's user may have put anything in its place, and
    we may be root: to open a pipe is to wait for ever, and a device may act on it. Raises CheckFailed, OSError."""
    itself = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(itself).st_mode):
            raise corrupt(f"{os.path.basename(path)} is no plain file")
        return os.fdopen(os.open(f"/proc/self/fd/{itself}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(itself)


def no_pipes(paths: Iterable[str]) -> None:
    """For what an engine opens by itself: it would wait for ever too. What isn't there isn't looked at. Raises
    CheckFailed, OSError."""
    for path in paths:
        if os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode):
            raise corrupt(f"{os.path.basename(path)} is no plain file")


class Finding(Struct, frozen=True):
    """One database: `level` is the highest that was passed, or, where it is corrupt, the one that found it so.
    `path` is the place in the original's names. `no_check`: as in CheckFailed."""

    kind: str
    path: str
    level: int
    outcome: Outcome
    why: str = ""
    no_check: bool = False

    @property
    def unproven(self) -> str:
        """A note for a person where there is no check."""
        return f"{self.path}: {self.why}: its content was not proven"


class Proof(Struct, frozen=True):
    """What is proven of a whole clone. `level`: as in Finding, the lowest of all (of the corrupt ones, if any is).

    With no database found nothing but L1 was to be proven: `level` is 1, `outcome` ok, and `notes` say so."""

    level: int
    outcome: Outcome
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """One line for a person: the first finding that isn't ok; '' if all are."""
        worst = min(self.findings, key=_rank, default=None)
        return "" if worst is None or worst.outcome is Outcome.OK else f"{worst.path}: {worst.why}"

    @property
    def no_check(self) -> bool:
        """Nothing that could be installed would prove more: what isn't ok has no check."""
        return all(finding.no_check for finding in self.findings if finding.outcome is not Outcome.OK)


class Database(Struct, frozen=True):
    """One found in a clone. `place` is its directory or file, `path` the same in the original's names."""

    kind: str
    place: str
    path: str


def prove(
    places: Sequence[tuple[str, str]],
    profile: Profile,
    level: int,
    *,
    crash: bool = False,
    report: Report = no_report,
) -> Proof:
    """Prove what is in `places`, pairs of (a root's live path, the directory where its clone is), up to `level`.

    The places are *written to* (SQLite's quick_check and engines recover them): clones only, with every link and option
    re-pointed (`nodes.repoint`). `crash`: the image is of grade crash, so a hole in a log that was never synced is no
    damage. Never raises for what is wrong with a database."""
    found = [database for live, place in places for database in databases(live, place)]
    named = places[:1] if level >= 2 else ()
    findings = [finding for live, place in named for finding in _missing(profile, live, place, found)]
    notes = []
    for number, database in enumerate(found):
        finding = _one(
            database,
            level,
            crash,
            lambda word, n=number: report(Progress(word, n, len(found), "databases")),  # type: ignore[misc]
        )
        if finding.no_check and profile.database and not _is_named(profile, places[0][1], database):
            notes.append(finding.unproven)  # another program's, most likely
        else:
            findings.append(finding)
    return proof_of(findings, level, notes)


def _is_named(profile: Profile, place: str, database: Database) -> bool:
    """Whether the profile names it, or what it lies in, as the node's."""
    paths = [os.path.realpath(path) for pattern in profile.database for path in matches(place, pattern)]
    return any(is_under(os.path.realpath(database.place), path) for path in paths)


def proof_of(findings: Sequence[Finding], level: int, noted: Sequence[str] = ()) -> Proof:
    """What all findings come to together, where up to `level` was asked for."""
    notes = list(noted)
    if not findings:
        notes.append("no database that is known is in it: its content was not proven")
        return Proof(min(level, 1), Outcome.OK, (), tuple(notes))
    outcome = min(findings, key=_rank).outcome
    same = [finding for finding in findings if finding.outcome is Outcome.CORRUPT] or findings
    if outcome is Outcome.OK and level > HIGHEST:
        outcome = Outcome.TOOL_MISSING
        notes.append(f"level {level} (the node boots) can't be had yet: level {HIGHEST} was reached")
    return Proof(min(finding.level for finding in same), outcome, tuple(findings), tuple(notes))


_WORST = [Outcome.CORRUPT, Outcome.COULD_NOT_RUN, Outcome.TOOL_MISSING, Outcome.TOOL_TOO_OLD, Outcome.OK]


def _rank(finding: Finding) -> float:
    """The worst has the lowest. What can be cured comes before what has no check: it is to be told, and done."""
    return _WORST.index(finding.outcome) if not finding.no_check else _WORST.index(Outcome.OK) - 0.5


def databases(live: str, place: str) -> list[Database]:
    """Every database below `place`, by its files: names first, then the first bytes of what remains. Links aren't
    followed: what they lead to is in another root. What lies in a database's own directory is its own. Raises
    PreconditionError for a directory that can't be read."""
    found: list[Database] = []

    def unreadable(error: OSError) -> None:
        raise PreconditionError(f"can't read it: {error.strerror}", object=str(error.filename)) from None

    todo = [place]  # os.walk calls itself for each level: a path may have more of them than a Python's stack
    while todo:
        directory = todo.pop()
        _, below, files = next(os.walk(directory, onerror=unreadable))
        names = set(files)
        shown = os.path.normpath(os.path.join(live, os.path.relpath(directory, place)))
        kind = _directory_kind(names, set(below))
        if kind:
            found.append(Database(kind, directory, shown))
            continue
        for name in sorted(files):
            path = os.path.join(directory, name)
            if kind := _file_kind(path):
                found.append(Database(kind, path, os.path.join(shown, name)))
        inner = (os.path.join(directory, name) for name in sorted(below, reverse=True))
        todo += [path for path in inner if not os.path.islink(path)]
    return found


def _directory_kind(names: set[str], below: set[str]) -> str:
    if "PG_VERSION" in names and "global" in below:
        return "postgresql"
    if any(name.startswith("marker.manifest.") for name in names):
        return "pebble"
    if "KEYREGISTRY" in names:
        return "badger"
    if not ("CURRENT" in names or any(name.startswith("MANIFEST-") for name in names)):
        return ""
    tables = {os.path.splitext(name)[1] for name in names}
    rocks = any(name.startswith("OPTIONS-") or name == "IDENTITY" for name in names) or ".sst" in tables
    return "rocksdb" if rocks and ".ldb" not in tables else "leveldb"


def _file_kind(path: str) -> str:
    """By its first bytes. A damaged first byte is a file that we don't know: a profile names what must be there."""
    if path.endswith(("-wal", "-shm", "-journal")) or os.path.islink(path) or not os.path.isfile(path):
        return ""
    if os.path.basename(path) == "data.mdb":
        return "lmdb"
    if os.path.basename(path) == "mdbx.dat":
        return "mdbx"
    try:
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as error:
        raise PreconditionError(f"can't read it: {error.strerror}", object=path) from None
    if head.startswith(b"SQLite format 3\0") or (not head.strip(b"\0") and path.endswith((".sqlite", ".sqlite3"))):
        return "sqlite"
    return {b"\xde\xc0\xef\xbe": "lmdb", b"\xed\xda\x0c\xed": "bbolt"}.get(head[16:20], "")  # behind a page's header


def _missing(profile: Profile, live: str, place: str, found: Sequence[Database]) -> Iterator[Finding]:
    """What the profile says belongs together: databases without the files beside them, files without a database."""
    named = {pattern: matches(place, pattern) for pattern in profile.database}
    holding = {pattern: paths for pattern, paths in named.items() if pattern not in profile.no_database}

    def shown(path: str) -> str:
        return os.path.normpath(os.path.join(live, os.path.relpath(path, place)))

    # What is kept beside the database (a list of peers, a key) doesn't stand for it.
    apart = [path for pattern in (*profile.caches, *profile.identity) for path in matches(place, pattern)]
    elsewhere = [each for each in found if not any(is_under(each.place, path) for path in apart)]
    if holding and not any(holding.values()) and not elsewhere:
        yield Finding(profile.name, shown(place), 2, Outcome.CORRUPT, f"has no {' or '.join(holding)}")
    # First these: without one a database may not be known as one.
    for pattern in profile.metadata:
        there = matches(place, pattern)
        if any(named.values()) and not there:
            yield Finding("metadata", shown(os.path.join(place, pattern)), 2, Outcome.CORRUPT, "is missing")
        for path in there:
            try:
                with opened(path) as file:
                    content = json.loads(file.read(1 << 20)) if path.endswith(".json") else file.read(1)
                if not content:
                    yield Finding("metadata", shown(path), 2, Outcome.CORRUPT, "is empty")
            except CheckFailed as failed:
                yield Finding("metadata", shown(path), 2, failed.outcome, failed.why)
            except (ValueError, RecursionError):
                yield Finding("metadata", shown(path), 2, Outcome.CORRUPT, "is not JSON")
            except OSError as error:
                yield Finding("metadata", shown(path), 2, *_of_os_error(error))
    for pattern, paths in named.items():
        for path in paths:
            # It is a database, holds one, or is a part of one (by its name: it may be a link to another disk).
            real = os.path.realpath(path)
            holds = any(is_under(os.path.realpath(each.place), real) or is_under(path, each.place) for each in found)
            # Of a part of a database its own check knows whether it may be missing: PostgreSQL's pg_stat_tmp often
            # leads into memory.
            part = any(path != each.place and is_under(path, each.place) for each in found)
            if not os.path.exists(path):
                if not part:
                    yield Finding(profile.name, shown(path), 2, Outcome.CORRUPT, "leads to nothing in it")
            elif pattern in holding and not holds:
                yield Finding(profile.name, shown(path), 2, Outcome.CORRUPT, "has no database in it")


def _one(database: Database, level: int, crash: bool, tell: Callable[[str], None]) -> Finding:
    """All levels of one database, up to the first that it doesn't pass."""
    reached = 1
    for step in range(2, min(level, HIGHEST) + 1):
        tell(f"verifying {database.path}, level {step}")
        failed = _apart(database, step, crash) if step >= _APART.get(database.kind, 9) else check_here(
            database.kind, step, database.place, crash
        )  # fmt: skip
        if failed is not None:
            found = step if failed.outcome is Outcome.CORRUPT else reached
            return Finding(database.kind, database.path, found, failed.outcome, failed.why, failed.no_check)
        reached = step
    return Finding(database.kind, database.path, reached, Outcome.OK)


#: The level from which on a library of each kind's is used, in a process of its own. What has none here is known only
#: to be there.
_APART = {"rocksdb": 3, "leveldb": 3, "sqlite": 2, "lmdb": 3, "postgresql": 3}


#: What no reader foresaw in a bad file.
_UNFORESEEN = (ValueError, ArithmeticError, LookupError, RecursionError, struct.error)


def check_here(kind: str, level: int, place: str, crash: bool) -> CheckFailed | None:
    """One level of one database in this process: None if it is passed."""
    from importlib import import_module

    if kind not in _APART:
        return CheckFailed(Outcome.TOOL_MISSING, f"there is no check for {kind} yet", no_check=True)
    try:
        getattr(import_module(f"snapshotter.checks.{kind}"), f"level{level}")(place, crash)
    except CheckFailed as failed:
        return failed
    except OSError as error:
        return CheckFailed(*_of_os_error(error))
    except _UNFORESEEN as error:
        return corrupt(f"can't be read: {type(error).__name__}: {error}")
    except MemoryError:
        return CheckFailed(Outcome.COULD_NOT_RUN, "there is not enough memory")
    return None


_BAD = {errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EUCLEAN, errno.EBADMSG}


def _of_os_error(error: OSError) -> tuple[Outcome, str]:
    """An image that can't be read can't be restored; but that we may not read it says nothing of it."""
    name = os.path.basename(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else ""
    why = f"{name}: {error.strerror}" if name else str(error.strerror or error)
    return (Outcome.CORRUPT if error.errno in _BAD else Outcome.COULD_NOT_RUN), why


def _apart(database: Database, level: int, crash: bool) -> CheckFailed | None:
    """The same in a process of its own, which may crash or be killed."""
    words = [database.kind, str(level), "crash" if crash else "whole", database.place]
    try:
        done = run(
            [sys.executable, "-m", "snapshotter.checks.child", *words],
            extra_env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except (PreconditionError, StorageError) as error:
        return CheckFailed(Outcome.COULD_NOT_RUN, error.line())
    ready, _, rest = done.stdout.partition("\n")
    if done.code == 0 and rest:
        outcome, why, no_check = json.loads(rest)
        return None if outcome == Outcome.OK else CheckFailed(Outcome(outcome), why, no_check=no_check)
    crashed = -done.code in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE)
    if ready == "ready" and crashed:
        return corrupt(f"the engine crashed on it ({signal.Signals(-done.code).name})")
    return CheckFailed(Outcome.COULD_NOT_RUN, f"the check ended with {done.code}: {done.said}")
