"""What every kind of quiesce is built on: the record, the watchdog's parent side, the checked end, and `reap` for runs
that died. Must not know how anything is held: that is `quiesce`.

A record in the run directory names the inverse of every act before the act, and the watchdog, a process of its own, is
up before the first of them: it lets go when the budget ends, when we die, on any signal. When both die, `reap` does.
The watchdog, `reap` and the normal end all run `watchdog.undo_record`, then `watchdog.wake`.

The end is checked. If it isn't proven that everything was held all the time, it raises QuiesceError and the image is
void. That goes for a watchdog that died, too: what it guarded was most likely held, but "likely" isn't "proven". An
exception from inside goes on, once everything is let go. An interruption (a signal handler that raises) can hit between
any two bytecodes, also before __exit__ has got to its first line: then the watchdog lets go, at the latest when the
budget ends.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

from snapshotter.core.command import start
from snapshotter.core.errors import PreconditionError, QuiesceError, StorageError, UndoIncompleteError
from snapshotter.core.interrupts import deferred
from snapshotter.core.model import Hold
from snapshotter.host import watchdog
from snapshotter.host.places import boot_id, private_directory, run_directory
from snapshotter.host.processes import alive, identity
from snapshotter.host.service import cgroup2

_READY_S = 30.0  # for the watchdog's start; nothing is held yet
_END_S = 30.0  # for the watchdog's end; nothing is held any more
_TICK_S = 0.0005


def _directory() -> str:
    return private_directory(os.path.join(run_directory(), "quiesce"))


def _boot() -> tuple[str, str]:
    """This boot, and this pid namespace: a pid means something only within both."""
    return boot_id(), str(os.stat("/proc/self/ns/pid").st_ino)


class Guard:
    """The record and the watchdog of one quiesce, as the parent sees them."""

    def __init__(self, what: str, budget_s: float, fds: Sequence[int] = ()) -> None:
        self._fds = tuple(fds)
        self.what = what
        name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', what)[:80]}.{os.urandom(4).hex()}"
        self.path = os.path.join(_directory(), name)
        self._open: list[int] = []
        self._orders = self._answers = -1
        me = identity(os.getpid())
        assert me is not None
        owner = ("owner", str(me[0]), str(me[1]), *_boot(), str(budget_s), what)
        try:
            self._record = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._open.append(self._record)
            self.note(*owner)
            self._start()
        except BaseException:
            self.close(undone=True)  # the watchdog, if it is there, ends with its pipe
            raise

    def _start(self) -> None:
        top = cgroup2()
        argv = [sys.executable, "-I", "-S", os.path.abspath(watchdog.__file__), self.path, str(os.getpid())]
        argv += [os.path.join(top, "cgroup.procs") if top else "", *map(str, self._fds)]
        orders, self._orders = os.pipe2(os.O_CLOEXEC)
        self._open.append(self._orders)
        self._answers, answers = os.pipe2(os.O_CLOEXEC)
        self._open.append(self._answers)
        try:
            self._process = start(argv, keep_fds=self._fds, stdin=orders, stdout=answers)
        finally:
            os.close(orders)
            os.close(answers)

    def note(self, *parts: str) -> None:
        """Put the inverse of the next act on record. Raises PreconditionError: then the act must not be done."""
        text = watchdog.line(*parts)
        try:
            whole = os.write(self._record, text) == len(text)
        except OSError:
            whole = False
        if not whole:
            raise PreconditionError("can't write the record of the quiesce", object=self.path, cure="make room there")

    def ready(self) -> None:
        """Wait until the watchdog guards."""
        waiting = select.poll()
        waiting.register(self._answers, select.POLLIN)
        if not waiting.poll(_READY_S * 1000) or os.read(self._answers, 64) != b"ready\n":
            raise PreconditionError("the watchdog did not start", object=self.what, cure=f"try: {sys.executable} -V")

    def arm(self, deadline: float) -> None:
        self._say(b"arm %r\n" % deadline)

    def _say(self, order: bytes) -> None:
        try:
            os.write(self._orders, order)
        except BrokenPipeError:
            pass  # it has ended; who asks `lost` is told

    def lost(self) -> str:
        """Why the watchdog doesn't guard any more, '' while it does."""
        if any(entry[0] == "fired" for entry in watchdog.read_record(self.path)):
            return "the watchdog let go"
        return "" if self._process.poll() is None else "the watchdog died"

    def undo(self) -> list[str]:
        return watchdog.undo_record(self.path, self._fds)

    def wake(self) -> list[str]:
        self.arm(time.monotonic() + _END_S)  # all is let go, in time: that the budget ends now is no matter
        return watchdog.wake(self.path)

    def end(self) -> str:
        """The watchdog is to end without acting: everything is undone. Returns what `lost` does, also if it fired
        just now."""
        self._say(b"done\n")
        until = time.monotonic() + _END_S
        while (code := self._process.poll()) is None:
            if time.monotonic() > until:
                return "the watchdog does not end"
            time.sleep(_TICK_S)
        return "" if code == 0 else "the watchdog let go" if code in (3, 4) else "the watchdog died"

    def close(self, undone: bool) -> None:
        """Forget it; also the record, if all is undone."""
        if undone:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass
        while self._open:
            os.close(self._open.pop())


class Held(ABC):
    """What is held while the block runs. `hold` is for the provider; `notes` (for the output) and `held_ms` (after the
    end; from the first act to the last inverse) are for the operator. Not for use twice."""

    def __init__(self, what: str, budget_s: float) -> None:
        self.notes: list[str] = []
        self.held_ms: float | None = None
        self._what = what
        self._budget_s = budget_s
        self._deadline: float | None = None
        self._mapped: frozenset[tuple[int, int]] = frozenset()
        self._guard: Guard | None = None

    @property
    def hold(self) -> Hold:
        return Hold(deadline=self._deadline, mapped=self._mapped)

    @abstractmethod
    def _prepare(self) -> None:
        """All that can be found out, refused or written before anything is held. Calls `_watch`."""

    @abstractmethod
    def _take(self) -> None:
        """Hold. Each act after its note."""

    @abstractmethod
    def _lost(self) -> str:
        """'' if everything still is held, else what isn't. Called at the end, before anything is let go."""

    def _afterwards(self) -> None:  # noqa: B027 most kinds have nothing
        """All was let go: what is to be noted of that."""

    def _close(self) -> None:  # noqa: B027 most kinds have nothing
        """Give up what `_prepare` opened."""

    def _void(self, failures: list[str]) -> StorageError | UndoIncompleteError:
        return UndoIncompleteError(
            "not everything that was held could be let go",
            object=self._what,
            left=failures,
            cure="run `snapshotter reap`",
            undo_command="snapshotter reap",
        )

    def _watch(self, fds: Sequence[int] = ()) -> Guard:
        self._guard = Guard(self._what, self._budget_s, fds)
        return self._guard

    def _remaining_s(self) -> float:
        assert self._deadline is not None
        return self._deadline - time.monotonic()

    def _wait(self, done: Iterable[bool], what: str) -> None:
        """Ask `done` until it says so. Half of what is left of the budget: the other half is for the snapshot."""
        until = time.monotonic() + self._remaining_s() / 2
        for answer in done:
            if answer:
                return
            if time.monotonic() > until:
                raise QuiesceError(what, object=self._what, cure="give it a longer `budget`")
            time.sleep(_TICK_S)

    def __enter__(self) -> Held:
        try:
            self._prepare()
            if self._guard is not None:
                self._guard.ready()
                self._deadline = time.monotonic() + self._budget_s
                self._guard.arm(self._deadline)
            self._take()
            if self._guard is not None and (lost := self._guard.lost()):
                raise QuiesceError(f"{lost} before everything was held", object=self._what)
            return self
        except BaseException as error:
            failures, _, interruption = self._let_go()
            if failures:
                raise self._void(failures) from error
            if interruption is not None:
                raise interruption from error
            if isinstance(error, OSError):
                raise PreconditionError(
                    f"can't hold the writers still: {error.strerror or error}", object=str(error.filename or self._what)
                ) from error
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        lost = ""
        try:
            if kind is None:
                lost = self._lost_anything()
        except OSError as found:
            lost = f"can't see ({found.strerror}: {found.filename})"
        except BaseException as found:
            error = found
        failures, fired, interruption = self._let_go()
        if failures:
            raise self._void(failures) from error
        if interruption is not None:
            raise interruption from error
        if kind is None and error is not None:
            raise error
        if kind is None and (lost or fired):
            raise QuiesceError(f"the writers were not held all the time: {lost or fired}", object=self._what)

    def _lost_anything(self) -> str:
        if self._guard is None:
            return self._lost()
        lost = self._guard.lost() or self._lost()
        if not lost and self._remaining_s() <= 0:
            lost = "the budget ended"
        return lost

    def _let_go(self) -> tuple[list[str], str, BaseException | None]:
        """Undo, whatever interrupts it: what could not be undone, what the watchdog did, what interrupted."""
        guard = self._guard
        if guard is None:
            self._close()
            return [], "", None
        interruption: BaseException | None = None
        failures, fired = ["not tried"], ""
        for _ in range(10):
            try:
                # All of it: cut in the middle of asking for its child, `subprocess` never sees that end.
                with deferred():
                    if self._guard is not None:
                        failures = guard.undo()
                        if self.held_ms is None and self._deadline is not None:
                            self.held_ms = (self._budget_s - self._remaining_s()) * 1000
                        failures += guard.wake()
                        fired = guard.end()
                        guard.close(undone=not failures)
                        self._guard = None
                        self._afterwards()
                    self._close()
                break
            except BaseException as error:  # a second Ctrl-C: first let go, then obey
                interruption = error
        return failures, fired, interruption


def _owner_gone(path: str) -> bool | None:
    """Of a record: True if its run is dead on this boot, False if it may live, None if it is from another boot (nothing
    is held any more) or never got as far as an act."""
    record = watchdog.read_record(path)
    if not record or record[0][0] != "owner":
        return None if time.time() - os.stat(path).st_mtime > 60 else False
    _, pid, begun, boot, namespace, *_ = record[0]
    here = _boot()
    if boot != here[0]:
        return None
    return namespace == here[1] and not alive((int(pid), int(begun)))


def _dead_records(patience_s: float = 0.0) -> Iterator[tuple[str, bool]]:
    """Records whose run and watchdog are dead, each locked while the caller looks at it: (path, is anything held?).
    A lock is waited for a little: a watchdog may be letting go just now, or be dying."""
    directory = _directory()
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        try:
            if _owner_gone(path) is False:
                continue
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            until = time.monotonic() + patience_s
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise
                    time.sleep(0.02)
            if os.fstat(fd).st_nlink:
                yield path, _owner_gone(path) is True
        except BlockingIOError:
            continue  # its watchdog lives, or another reap is at it
        finally:
            os.close(fd)


def leftovers() -> list[str]:
    """What dead runs may still hold, for a person. No effects."""
    found = []
    for path, held in _dead_records():
        acts = [" ".join(entry) for entry in watchdog.read_record(path)[1:] if entry[0] not in ("fired", "not")]
        if held and acts:
            found.append(f"quiesce {os.path.basename(path)}: {', '.join(acts)}")
    return found


def reap() -> list[str]:
    """Let go what dead runs with dead watchdogs held; return their records' names. Two at once are fine.
    Raises UndoIncompleteError, after all were tried."""
    done: list[str] = []
    failures: list[str] = []
    for path, held in _dead_records(patience_s=1.0):
        failed = watchdog.undo_record(path) + watchdog.wake(path) if held else []
        if failed:
            failures += failed
            continue
        if held:
            done.append(f"quiesce {os.path.basename(path)}")
        os.unlink(path)
    if failures:
        raise UndoIncompleteError("a dead run still holds something", left=failures, cure="see what keeps it")
    return done
