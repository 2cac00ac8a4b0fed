"""Locks between runs on one host: flock on a file per volume and per target. Take, swap and delete hold them
exclusively, verify shared.

A lock is its flock, so a dead run's lock is free at once; the file stays. Children that change storage inherit the
descriptors (`Locks.fds`), so that a lock is free only when the storage no longer changes under it.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType

from snapshotter.core import command
from snapshotter.core.digest import sha256
from snapshotter.core.errors import BusyError, PreconditionError
from snapshotter.host.places import lock_directory


def _path(name: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[-40:]
    return os.path.join(lock_directory(), f"{readable}.{sha256(name.encode()).hexdigest()[:12]}")


class Locks:
    """`with Locks(names, wait_s=0): ...`. Sorted order, all or none. Raises BusyError naming the holder,
    PreconditionError where a lock file can't be had."""

    def __init__(self, names: Iterable[str], *, exclusive: bool = True, wait_s: float = 0.0) -> None:
        self.names = sorted(set(names))
        self.fds: list[int] = []
        self._kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        self._wait_s = wait_s

    def __enter__(self) -> Locks:
        give_up = time.monotonic() + self._wait_s
        try:
            for name in self.names:
                self._take(name, give_up)
        except BaseException:
            self.release()
            raise
        return self

    def _take(self, name: str, give_up: float) -> None:
        path = _path(name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PreconditionError(
                f"can't open the lock file: {error.strerror}",
                object=path,
                cure=f"see that {os.path.dirname(path)} can be written and has room",
            ) from None
        self.fds.append(fd)
        command.LOCKED.add(fd)
        while True:
            try:
                fcntl.flock(fd, self._kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
                    who = f"by process {holder}" if holder.isdigit() else "by another run"
                    raise BusyError(f"locked {who}", object=name, cure="wait for it to end, then try again") from None
                time.sleep(0.05)
        if self._kind == fcntl.LOCK_EX:
            with suppress(OSError):  # only for others' messages, and a full disk must not keep us from deleting
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give all up. Our own descriptors only: a child that inherited them keeps the lock until it ends."""
        while self.fds:
            fd = self.fds.pop()
            command.LOCKED.discard(fd)
            os.close(fd)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
