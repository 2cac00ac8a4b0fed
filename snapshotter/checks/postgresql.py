"""PostgreSQL: its control file and the write-ahead log that a recovery begins with; then the server itself, alone
(`postgres --single`), recovers a clone, and `pg_checksums` reads every block that has a checksum.

The server runs as the data's owner (it refuses root), under a configuration of our own: the clone's could archive into
production, or listen. Source: src/include/catalog/pg_control.h, xlog_internal.h (13 to 17); postgres(1).
"""

from __future__ import annotations

import os
import re
import struct

from snapshotter.checks import CheckFailed, Outcome, corrupt, no_pipes, opened
from snapshotter.checks.records import crc32c
from snapshotter.core.command import Outcome as Ended
from snapshotter.core.command import run
from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.nodes.profiles import matches

_SEGMENT = re.compile(r"[0-9A-F]{24}")
#: Runs "$@" as the owner of the directory $0, which it sees at /mnt, in a mount namespace that ends with it: the
#: directories above a clone let nobody else through.
_AS_OWNER = (
    'mount --make-rprivate / && mount --bind "$0" /mnt && cd /mnt && '
    'exec setpriv --reuid="$(stat -c %u .)" --regid="$(stat -c %g .)" --clear-groups -- "$@"'
)


def level2(directory: str, crash: bool) -> None:
    """Version, control file by its checksum, and the log's segment at which a recovery begins."""
    _version(directory)
    control = _control(directory)
    (version,) = struct.unpack_from("<I", control, 8)
    if version < 1100:
        why = f"control files of version {version} (before 11) aren't known here"
        raise CheckFailed(Outcome.TOOL_MISSING, why, no_check=True)
    for name in ("base", "pg_xact"):
        if not os.path.isdir(os.path.join(directory, name)):
            raise corrupt(f"{name} is missing")
    no_pipes(matches(directory, "*"))
    for top in (path for pattern in ("base", "global", "pg_*", "pg_tblspc/*") for path in matches(directory, pattern)):
        no_pipes(os.path.join(below, name) for below, _, names in os.walk(top) for name in names)
    redo, timeline = struct.unpack_from("<QI", control, 40)
    log = os.path.join(directory, "pg_wal")
    try:
        names = [name for name in os.listdir(log) if _SEGMENT.fullmatch(name)]
    except FileNotFoundError:
        raise corrupt("pg_wal is missing") from None
    if os.path.exists(os.path.join(directory, "backup_label")):
        return  # a recovery begins where that says, and may fetch its log from elsewhere
    sizes = {os.path.getsize(os.path.join(log, name)) for name in names}
    if not sizes:
        raise corrupt("pg_wal has no segment")
    size = max(sizes)
    if size & (size - 1) or not 1 << 20 <= size <= 1 << 30:
        raise corrupt(f"the segments of pg_wal have {size} bytes, which is no size for one")
    each = (1 << 32) // size
    number = redo // size
    wanted = f"{timeline:08X}{number // each:08X}{number % each:08X}"
    if wanted not in names:
        raise corrupt(f"pg_wal/{wanted} is missing, and a recovery begins in it")
    if os.path.getsize(os.path.join(log, wanted)) != size:
        raise corrupt(f"pg_wal/{wanted} is cut off")


def _version(directory: str) -> str:
    with opened(os.path.join(directory, "PG_VERSION")) as file:
        said = file.read(16).decode(errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,2})?", said):
        raise corrupt("PG_VERSION has no version in it")
    return said


def _control(directory: str) -> bytes:
    """The control file, its checksum proven. Where that stands moves with the version, so it is looked for."""
    path = os.path.join(directory, "global", "pg_control")
    try:
        with opened(path) as file:
            data = file.read(8192)
    except FileNotFoundError:
        raise corrupt("global/pg_control is missing") from None
    if len(data) < 512:
        raise corrupt(f"global/pg_control has {len(data)} bytes")
    for at in range(200, 512, 4):
        if struct.unpack_from("<I", data, at)[0] == crc32c(data[:at]) and any(data[:at]):
            return data
    raise corrupt("global/pg_control is damaged: its checksum doesn't match")


def level3(directory: str, crash: bool) -> None:
    """Recovered by the server, then every block that has a checksum is read. Without checksums the tables aren't read:
    the level isn't reached."""
    level4(directory, crash)
    done = _as_owner(directory, _tool(directory, "pg_checksums"), "--check", "-D", ".")
    said = f"{done.stdout}\n{done.stderr}"
    if done.ok:
        return
    if "data checksums are not enabled" in said:
        why = "its blocks have no checksums (initdb --data-checksums), nothing tells"
        raise CheckFailed(Outcome.TOOL_MISSING, why, no_check=True)
    if "checksum verification failed" in said or "Bad checksums" in said:
        raise corrupt(_line(said, "checksum"))
    raise CheckFailed(Outcome.COULD_NOT_RUN, done.said)


def level4(directory: str, crash: bool) -> None:
    """The server opens it, replays its log, answers a question and ends by itself."""
    for name in ("standby.signal", "recovery.signal"):
        if os.path.exists(os.path.join(directory, name)):
            raise CheckFailed(Outcome.COULD_NOT_RUN, f"{name}: a recovery would fetch its log from elsewhere")
    server = _tool(directory, "postgres")
    for stale in ("postmaster.pid", "postmaster.opts"):  # of the original: its process may well run, elsewhere
        if os.path.exists(os.path.join(directory, stale)):
            os.unlink(os.path.join(directory, stale))
    settings = {"config_file": "/dev/null", "hba_file": "/dev/null", "ident_file": "/dev/null", "archive_mode": "off",
                "shared_buffers": "16MB", "dynamic_shared_memory_type": "mmap"}  # fmt: skip
    words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
    done = _as_owner(directory, server, "--single", *words, "-D", ".", "template1", question="SELECT 42 AS answer\n")
    said = f"{done.stdout}\n{done.stderr}"
    if 'answer = "42"' in said and done.ok:
        return
    if "incompatible with server" in said:
        raise CheckFailed(Outcome.TOOL_TOO_OLD, _line(said, "incompatible"))
    for word in ("PANIC", "FATAL"):
        if word in said:
            raise corrupt(_line(said, word)) if _is_damage(said) else CheckFailed(
                Outcome.COULD_NOT_RUN, _line(said, word)
            )  # fmt: skip
    raise CheckFailed(Outcome.COULD_NOT_RUN, done.said)


def _is_damage(said: str) -> bool:
    signs = ("could not locate a valid checkpoint", "invalid checkpoint", "could not read", "invalid page", "corrupt",
             "incorrect checksum", "could not open file", "is not a valid", "unexpected", "PANIC")  # fmt: skip
    return any(sign in said for sign in signs)


def _tool(directory: str, name: str) -> str:
    """The program of the data's own version: no other opens it."""
    version = _version(directory)
    path = f"/usr/lib/postgresql/{version}/bin/{name}"
    if os.access(path, os.X_OK):
        return path
    try:
        said = run([name, "--version"], timeout=30.0)
    except (PreconditionError, StorageError):
        said = None
    if said is not None and re.search(rf"\(PostgreSQL\) {re.escape(version)}\b", said.stdout):
        return name
    raise CheckFailed(Outcome.TOOL_MISSING, f"{name} of PostgreSQL {version} isn't installed: postgresql-{version}")


def _as_owner(directory: str, *argv: str, question: str = "") -> Ended:
    try:
        if os.geteuid() != 0:
            return run(["sh", "-c", 'cd "$0" && exec "$@"', directory, *argv], stdin=question)
        return run(["unshare", "--mount", "sh", "-c", _AS_OWNER, directory, *argv], stdin=question)
    except (PreconditionError, StorageError) as error:
        raise CheckFailed(Outcome.COULD_NOT_RUN, error.line()) from None


def _line(said: str, word: str) -> str:
    return next((" ".join(line.split()) for line in said.splitlines() if word in line), said[:200])
