"""A node's service: is it running, stop it, start it. By systemd, or by commands of the operator's.
Must know nothing of quiesce or restore, which call it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from snapshotter.core.command import run
from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.host.mounts import table


class Service(Protocol):
    """Starting what runs and stopping what is stopped are done, not errors: both may be asked twice."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def start_argv(self) -> Sequence[str]:
        """What starts it: the watchdog runs this when we can't."""

    def running(self) -> bool:
        """Raises PreconditionError if that can't be told."""

    def stop(self) -> None:
        """Returns when it is stopped. Raises StorageError."""

    def start(self) -> None:
        """Raises StorageError."""


def _must(argv: Sequence[str], what: str, name: str) -> None:
    outcome = run(argv, mutates=True)
    if not outcome.ok:
        raise StorageError(f"can't {what}: {outcome.said}", object=name)


def cgroup2() -> str | None:
    """Where the unified cgroup hierarchy is mounted (not always /sys/fs/cgroup); None if it isn't."""
    return next((mount.path for mount in table() if mount.fstype == "cgroup2"), None)


class SystemdUnit(Struct, frozen=True):
    """A systemd unit, through systemctl(1)."""

    unit: str

    @property
    def name(self) -> str:
        return self.unit

    @property
    def start_argv(self) -> Sequence[str]:
        return ("systemctl", "start", "--", self.unit)

    def _show(self, wanted: str) -> str:
        outcome = run(["systemctl", "show", f"--property={wanted}", "--value", "--", self.unit], timeout=10.0)
        if not outcome.ok:
            raise PreconditionError(f"can't ask systemd: {outcome.said}", object=self.unit)
        return outcome.stdout.strip()

    def running(self) -> bool:
        """Anything but inactive and failed runs, or may do so in a moment. An unknown unit is an error."""
        if self._show("LoadState") in ("not-found", "bad-setting", "error"):
            raise PreconditionError("systemd has no such unit", object=self.unit, cure="correct `unit` in the config")
        return self._show("ActiveState") not in ("inactive", "failed")

    def stop(self) -> None:
        _must(["systemctl", "stop", "--", self.unit], "stop", self.unit)

    def start(self) -> None:
        _must(self.start_argv, "start", self.unit)

    def control_group(self) -> str | None:
        """Directory of its cgroup; None while it isn't running, or without the unified hierarchy."""
        top, group = cgroup2(), self._show("ControlGroup")
        if top is None or group in ("", "/"):
            return None
        directory = os.path.join(top, group.lstrip("/"))
        return directory if os.path.isdir(directory) else None


class Commands(Struct, frozen=True):
    """A service that the operator's commands handle. `status` exits 0 if it runs, 3 if it is stopped (as the LSB and
    systemctl have it)."""

    stop_argv: tuple[str, ...]
    start_argv: tuple[str, ...]
    status_argv: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join(self.start_argv)

    def running(self) -> bool:
        outcome = run(self.status_argv, timeout=60.0)
        if outcome.code not in (0, 3):
            raise PreconditionError(
                f"the status command exits {outcome.code}: {outcome.said}",
                object=" ".join(self.status_argv),
                cure="it must exit 0 when the service runs and 3 when it is stopped",
            )
        return outcome.code == 0

    def stop(self) -> None:
        _must(self.stop_argv, "stop", self.name)

    def start(self) -> None:
        _must(self.start_argv, "start", self.name)
