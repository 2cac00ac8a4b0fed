"""RocksDB: do its pointers resolve (our own reader), do all blocks read back, does the engine open it (rocksdict).

What the engine doesn't tell when it opens: a log that is damaged or gone (it stops before it, in silence), a damaged
block of a table, a missing blob file (measured). Source: RocksDB's wiki (MANIFEST, BlobDB, WAL recovery modes).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

from snapshotter.checks import CheckFailed, Outcome, corrupt, no_pipes, opened
from snapshotter.checks.manifest import Manifest
from snapshotter.checks.records import hole
from snapshotter.core.errors import pip_install
from snapshotter.nodes.repoint import newest_options, option_paths, read_options

#: The last 8 bytes of a table: block-based, its predecessor, plain, cuckoo.
_MAGIC = {0x88E241B785F4CFF7, 0xDB4775248B80FB57, 0x8242229663BF9564, 0x926789D0C5F17873}
_BLOB_FRAME = 30 + 32  # header and footer of a blob file
_LOG = re.compile(r"([0-9]{6,})\.log")
#: The names of files that the engine opens.
_OWN = re.compile(r"CURRENT|IDENTITY|LOCK|LOG|(MANIFEST|OPTIONS)-.*|.*\.(log|sst|ldb|blob)")
_READ_AHEAD = 4 << 20


def current(directory: str) -> str:
    """The path of the MANIFEST that CURRENT names. Raises CheckFailed, OSError."""
    try:
        with opened(os.path.join(directory, "CURRENT")) as file:
            content = file.read(4096)
    except FileNotFoundError:
        raise corrupt("CURRENT is missing") from None
    match = re.fullmatch(rb"(MANIFEST-[0-9]+)\n", content)
    if match is None:
        raise corrupt("CURRENT doesn't name a MANIFEST")
    return os.path.join(directory, match[1].decode())


def manifest(directory: str) -> Manifest:
    """Raises CheckFailed, OSError."""
    path = current(directory)
    try:
        with opened(path) as file:
            return Manifest.read(file)
    except FileNotFoundError:
        raise corrupt(f"{os.path.basename(path)} is missing, and CURRENT names it") from None


def _directories(directory: str) -> tuple[list[str], str]:
    """Where its tables and blobs may be, and where its logs are."""
    everywhere, logs = [directory], directory
    newest = newest_options(os.listdir(directory))
    if newest is not None:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            read = read_options(fd, newest)
        finally:
            os.close(fd)
        for key, path in option_paths(read[0]) if read else ():
            everywhere.append(path)
            logs = path if key == "wal_dir" else logs
    return list(dict.fromkeys(everywhere)), logs


def no_pipes_in(directory: str) -> None:
    """Raises CheckFailed, OSError."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    no_pipes(os.path.join(directory, name) for name in names if _OWN.fullmatch(name))


def _find(directories: list[str], *names: str) -> str | None:
    paths = (os.path.join(directory, name) for directory in directories for name in names)
    return next((path for path in paths if os.path.isfile(path)), None)


def level2(directory: str, crash: bool) -> None:
    """CURRENT -> MANIFEST -> every live table and blob file with its size and its frame, and the logs that it needs."""
    everywhere, log_directory = _directories(directory)
    for each in (*everywhere, log_directory):
        no_pipes_in(each)
    found = manifest(directory)
    for family in found.families.values():
        for number, (size, _) in family.files.items():
            name = f"{number:06}.sst"
            path = _find(everywhere, name, f"{number:06}.ldb")
            if path is None:
                raise corrupt(f"{name} is missing (column family {family.name})")
            if os.path.getsize(path) != size:
                raise corrupt(f"{name} has {os.path.getsize(path)} bytes, the MANIFEST says {size}")
            with opened(path) as file:
                file.seek(max(size - 8, 0))
                if struct.unpack("<Q", file.read(8))[0] not in _MAGIC:
                    raise corrupt(f"{name} has no table's end")
        for number, blob in family.live_blobs().items():
            name = f"{number:06}.blob"
            path = _find(everywhere, name)
            if path is None:
                raise corrupt(f"{name} is missing (column family {family.name})")
            if os.path.getsize(path) < blob.size + _BLOB_FRAME:
                raise corrupt(f"{name} has {os.path.getsize(path)} bytes, the MANIFEST says {blob.size + _BLOB_FRAME}")
    logs = {number: path for number, path in logs_of(log_directory)}
    for number, synced in found.logs.items():
        if number not in logs:
            raise corrupt(f"the log {number:06}.log is missing")
        if os.path.getsize(logs[number]) < synced:
            raise corrupt(f"the log {number:06}.log has {os.path.getsize(logs[number])} bytes, {synced} were synced")
    # While it is open, and after it was closed, there is a log at least as new as any that a family still needs.
    newest = max((family.log_number for family in found.families.values()), default=0)
    if newest and (not logs or max(logs) < newest):
        raise corrupt(f"its newest log is missing: one numbered {newest:06} or above")


def logs_of(directory: str) -> Iterator[tuple[int, str]]:
    """Every write-ahead log: its number and path."""
    for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
        if match := _LOG.fullmatch(name):
            yield int(match[1]), os.path.join(directory, name)


def check_logs(oldest: int, directory: str) -> None:
    """Every fragment of the logs that a recovery reads. Raises CheckFailed."""
    for number, path in logs_of(directory):
        if number >= oldest:
            with opened(path) as file:
                if (at := hole(file, number)) is not None:
                    raise corrupt(
                        f"the log {os.path.basename(path)} is damaged at byte {at}: what follows would be lost"
                    )


def level3(directory: str, crash: bool) -> None:
    """The logs' checksums, then every entry of every column family, each block and blob with its checksum."""
    families = manifest(directory).families.values()
    if not crash:
        check_logs(min((family.log_number for family in families), default=0), _directories(directory)[1])
    with Engine(directory, writable=False) as (database, names):
        from rocksdict import ReadOptions

        for name in names:
            how = ReadOptions()
            how.set_verify_checksums(True)
            how.set_readahead_size(_READ_AHEAD)
            how.set_total_order_seek(True)
            iterator = database.get_column_family(name).iter(how)
            iterator.seek_to_first()
            while iterator.valid():
                iterator.next()
            iterator.status()  # `valid()` alone ends silently at damage


def level4(directory: str, crash: bool) -> None:
    """It is opened for writing, replays its logs, and is closed."""
    with Engine(directory, writable=True) as (database, _):
        database.flush(True)


class Engine:
    """`with Engine(directory, writable=...) as (database, names of its column families)`. Raises CheckFailed."""

    def __init__(self, directory: str, *, writable: bool) -> None:
        self.directory, self.writable = directory, writable
        self.database: Any = None

    def __enter__(self) -> tuple[Any, list[str]]:
        try:
            from rocksdict import AccessType, Options, Rdict
        except ImportError:
            raise CheckFailed(Outcome.TOOL_MISSING, f"rocksdict isn't installed: {pip_install('verify')}") from None

        def options(_: str) -> Any:
            made = Options(raw_mode=True)
            made.create_if_missing(False)
            made.set_paranoid_checks(True)
            made.set_max_open_files(512)
            return made

        def opened() -> tuple[Any, list[str]]:
            names = Rdict.list_cf(self.directory)
            main = options("")
            logs = _directories(self.directory)[1]
            if logs != self.directory:
                main.set_wal_dir(logs)
            how = AccessType.read_write() if self.writable else AccessType.read_only(False)
            families = {name: options(name) for name in names}
            self.database = Rdict(self.directory, options=main, column_families=families, access_type=how)
            return self.database, names

        made: tuple[Any, list[str]] = judged(opened)
        return made

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.database is not None:
            self.database.close()
        if error is not None and not isinstance(error, CheckFailed | OSError) and isinstance(error, Exception):
            raise judgement(str(error)) from None


def judged(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as error:
        raise judgement(str(error)) from None


def judgement(said: str) -> CheckFailed:
    """What the engine's words (rocksdb::Status, leveldb::Status) mean. A damaged version number reads as a new one."""
    said = " ".join(said.split())[:300]
    low = said.lower()
    if "format_version" in low or "unknown checksum type" in low or "unsupported compression" in low:
        return CheckFailed(Outcome.TOOL_TOO_OLD, f"the engine here doesn't know this format: {said}")
    if "corruption" in low or "no such file" in low or "input/output error" in low or "checksum mismatch" in low:
        return corrupt(said)
    return CheckFailed(Outcome.COULD_NOT_RUN, said)
