"""LevelDB (also goleveldb): do its pointers resolve (our own reader), do all blocks read back, does the engine open it
(plyvel)."""

from __future__ import annotations

import os
import struct
from typing import Any

from snapshotter.checks import CheckFailed, Outcome, corrupt, opened
from snapshotter.checks import rocksdb as lsm
from snapshotter.core.errors import pip_install

_MAGIC = 0xDB4775248B80FB57


def level2(directory: str, crash: bool) -> None:
    """CURRENT -> MANIFEST -> every live table with its size and its end; a log as new as it needs."""
    lsm.no_pipes_in(directory)
    found = lsm.manifest(directory)
    for family in found.families.values():
        for number, (size, _) in family.files.items():
            paths = [os.path.join(directory, f"{number:06}.{suffix}") for suffix in ("ldb", "sst")]
            path = next((path for path in paths if os.path.isfile(path)), None)
            if path is None:
                raise corrupt(f"{os.path.basename(paths[0])} is missing")
            if os.path.getsize(path) != size:
                raise corrupt(f"{os.path.basename(path)} has {os.path.getsize(path)} bytes, the MANIFEST says {size}")
            with opened(path) as file:
                file.seek(max(size - 8, 0))
                if struct.unpack("<Q", file.read(8))[0] != _MAGIC:
                    raise corrupt(f"{os.path.basename(path)} has no table's end")
        logs = dict(lsm.logs_of(directory))
        if family.log_number and (not logs or max(logs) < family.log_number):
            raise corrupt(f"its log is missing: one numbered {family.log_number:06} or above")


def level3(directory: str, crash: bool) -> None:
    """The logs' checksums, then every entry, each block with its checksum. It is opened for that, so it recovers."""
    families = lsm.manifest(directory).families.values()
    if not crash:
        lsm.check_logs(min((family.log_number for family in families), default=0), directory)
    database = _open(directory)
    try:
        with database.iterator(verify_checksums=True, fill_cache=False) as entries:
            for _ in entries:
                pass
    except Exception as error:
        raise lsm.judgement(str(error)) from None
    finally:
        database.close()


def level4(directory: str, crash: bool) -> None:
    """It is opened for writing, replays its log, and is closed."""
    _open(directory).close()


def _open(directory: str) -> Any:
    try:
        import plyvel
    except ImportError:
        raise CheckFailed(Outcome.TOOL_MISSING, f"plyvel isn't installed: {pip_install('verify')}") from None
    return lsm.judged(lambda: plyvel.DB(directory, create_if_missing=False, paranoid_checks=True))
