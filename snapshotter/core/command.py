"""Running other programs: the only module that imports subprocess.

Never through a shell, always in the C locale with a small environment. A mutating child runs in a session of its own
and inherits the descriptors of the locks that it works under: a lock is free only when the storage no longer
changes under it, also if we are killed. Such a child is waited for and never killed by a timeout. (One that closes what
it inherits needs a parent that doesn't: `providers.lvm.commands`.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from msgspec import Struct

from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.core.interrupts import deferred

if TYPE_CHECKING:
    import subprocess

_KEPT = ("PATH", "HOME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "SSL_CERT_FILE", "TMPDIR")
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


#: Descriptors of the locks that this process holds (`host.locks` keeps it): every mutating child inherits them.
LOCKED: set[int] = set()


class Outcome(Struct, frozen=True):
    """How a program ended. Text is decoded as UTF-8, undecodable bytes kept by surrogateescape."""

    argv: tuple[str, ...]
    code: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def said(self) -> str:
        """The last non-empty line of stderr (or stdout): what a person needs to see of a failure."""
        lines = [line.strip() for line in (self.stderr or self.stdout).splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self.code}"


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The scrubbed environment for children: C locale, and PATH always with the sbin directories (cron has none)."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    path = kept.get("PATH", "")
    kept["PATH"] = f"{path}:{_DEFAULT_PATH}" if path else _DEFAULT_PATH
    return {**kept, "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8", **(extra or {})}


def run(
    argv: Sequence[str],
    *,
    timeout: float | None = None,
    mutates: bool = False,
    leaves_daemons: bool = False,
    extra_env: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> Outcome:
    """Run a program to its end. `timeout` (seconds) kills a reading child only; it is an error with `mutates`.
    `leaves_daemons`: what it starts goes on after it (a service), and must not keep our locks.

    Raises PreconditionError if the program isn't there, StorageError if the time is up.
    """
    import subprocess  # slow to import, and many a command needs no child

    if mutates and timeout is not None:
        raise ValueError("a mutating child is never killed by a timeout")
    # A signal would have subprocess kill the child: one that changes storage is waited for.
    waits = mutates and not leaves_daemons
    try:
        with deferred() if waits else nullcontext():
            done = subprocess.run(
                list(argv),
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                encoding="utf-8",
                errors="surrogateescape",
                env=environment(extra_env),
                timeout=timeout,
                start_new_session=mutates,
                pass_fds=tuple(LOCKED) if waits else (),
                check=False,
            )
    except OSError as error:
        raise _cannot_run(argv, error) from None
    except subprocess.TimeoutExpired:
        raise StorageError(f"{argv[0]} did not end within {timeout:g} s", object=" ".join(argv[:3])) from None
    return Outcome(tuple(argv), done.returncode, done.stdout, done.stderr)


def start(
    argv: Sequence[str],
    *,
    keep_fds: Sequence[int] = (),
    stdin: int | None = None,
    stdout: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own and don't wait (the watchdog is the one user). Raises
    PreconditionError."""
    import subprocess

    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.DEVNULL if stdout is None else stdout,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
            pass_fds=tuple(keep_fds),
            cwd="/",
        )
    except OSError as error:
        raise _cannot_run(argv, error) from None


def _cannot_run(argv: Sequence[str], error: OSError) -> PreconditionError:
    return PreconditionError(f"can't run it: {error.strerror}", object=argv[0], cure="install it, or mend PATH")
