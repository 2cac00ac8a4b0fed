"""Making and removing snapshots and clones: through libzfs_core where it is sound and worth it, else by the `zfs`
command. Must know neither sets nor labels. Both ways refuse alike: `tool.failure` of the same errno.

Two things are called pyzfs. OpenZFS's own (Debian: python3-pyzfs) is sound. PyPI's 0.2.3 was made for Python 2: what
it makes of an error is an AttributeError, and a hold fails even when it was made. It is never asked: an error that
lost its number has lost its truth. `_sound` tells the two by what they do, not by their version.

`zfs snapshot -o birth=... a@x b@x` builds one list and makes one lzc_snapshot call of it (cmd/zfs, zfs_do_snapshot;
zfs-snapshot(8): "taken atomically"), so that the command is as atomic, and as much one call with its properties, as the
library. What differs is the price: importing libzfs_core takes as long as several `zfs snapshot` (cffi parses C
declarations each time; FACTS: 1.9 s against 0.25 s, emulated). So it is imported only for what the command can't do,
removing snapshots of several datasets all or none; what has it loaded already uses it for everything.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from providers.zfs import tool
from snapshotter.core.command import run
from snapshotter.core.errors import SnapshotterError

_NAME = "libzfs_core"
_NONE_SUCH = "could not find any snapshots to destroy"
_NOAUTO = 2  # the number of canmount=noauto (zfs_prop.c): the library takes no words


def _sound(library: Any) -> bool:
    """Releasing no hold at all must do nothing. The build for Python 2 fails even at that, before it calls anything."""
    try:
        library.lzc_release({})
    except Exception:  # whatever it is: not one of the library's own
        return False
    return True


def _library(*, load: bool) -> Any:
    """libzfs_core if it can be relied on, else None. `load`: import it if it isn't yet."""
    library = sys.modules.get(_NAME)
    if library is None:
        if not load:
            return None
        try:
            library = import_module(_NAME)
        except Exception:  # not installed, or its C library isn't, or it is of another Python
            return None
    return library if _sound(library) else None


def _refusal(error: Exception, names: Sequence[str]) -> SnapshotterError:
    """The one error behind what libzfs_core raised."""
    first: Any = (getattr(error, "errors", None) or [error])[0]
    number = getattr(first, "errno", None) or 0
    named = getattr(first, "name", None)
    name = named.decode(errors="replace") if isinstance(named, bytes) else names[0]
    return tool.failure(number, name if name in names else names[0], str(error))


def snapshot(names: Sequence[str], properties: Mapping[str, str]) -> None:
    """All these snapshots (of one pool), at one instant, born with these user properties; or none."""
    tool.refuse_suspended(names)
    library = _library(load=False)
    if library is not None:
        try:
            library.lzc_snapshot([name.encode() for name in names], _user(properties))
        except library.exceptions.ZFSError as error:
            raise _refusal(error, names) from None
        return
    words = [word for key, value in properties.items() for word in ("-o", f"{key}={value}")]
    outcome = run(["zfs", "snapshot", *words, *names], mutates=True)
    if not outcome.ok:
        raise tool.told(outcome, next((name for name in names if f"'{name}'" in outcome.stderr), names[0]))


def clone(name: str, origin: str, properties: Mapping[str, str], mountpoint: str | None = None) -> None:
    """A clone that mounts itself nowhere, born with these user properties. `mountpoint`: else it inherits that."""
    tool.refuse_suspended([name])
    library = _library(load=False)
    if library is not None:
        native: dict[bytes, Any] = {b"canmount": _NOAUTO}
        if mountpoint is not None:
            native[b"mountpoint"] = mountpoint.encode()
        try:
            library.lzc_clone(name.encode(), origin.encode(), {**native, **_user(properties)})
        except library.exceptions.ZFSError as error:
            raise _refusal(error, [origin]) from None
        return
    given = {"canmount": "noauto", **({"mountpoint": mountpoint} if mountpoint is not None else {}), **properties}
    words = [word for key, value in given.items() for word in ("-o", f"{key}={value}")]
    outcome = run(["zfs", "clone", *words, origin, name], mutates=True)
    if not outcome.ok:
        raise tool.told(outcome, origin if f"'{origin}'" in outcome.stderr else name)


def destroy(names: Sequence[str]) -> None:
    """Remove these snapshots; absent is done. Of one pool: all or none, where libzfs_core is there."""
    tool.refuse_suspended(names)
    several = len({name.partition("@")[0] for name in names}) > 1
    library = _library(load=several)
    by_pool: dict[str, list[str]] = {}
    for name in names:
        by_pool.setdefault(tool.pool_of(name), []).append(name)
    for theirs in by_pool.values():
        if library is not None:
            try:
                library.lzc_destroy_snaps([name.encode() for name in theirs], False)
            except library.exceptions.ZFSError as error:
                raise _refusal(error, theirs) from None
            continue
        for name in theirs:
            outcome = run(["zfs", "destroy", name], mutates=True)
            absent = _NONE_SUCH in outcome.stderr or tool.number_of(outcome.stderr) == errno.ENOENT
            if not outcome.ok and not absent:
                raise tool.told(outcome, name)


def exists(name: str) -> bool:
    """Whether there is such a dataset or snapshot now."""
    library = _library(load=False)
    if library is not None:
        return bool(library.lzc_exists(name.encode()))
    return name in tool.get(["type"], [name])


def _user(properties: Mapping[str, str]) -> dict[bytes, bytes]:
    return {key.encode(): value.encode() for key, value in properties.items()}
