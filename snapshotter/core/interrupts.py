"""Signals that ask a run to end, as an exception at a moment when it can be undone. Must not know what is undone.

`install()` turns SIGINT, SIGTERM and SIGHUP into `Interrupted`, raised in the main thread wherever it is. Code that
must not be cut in half (an undo, the seal and its commit) runs under `deferred()`: the signal is raised when that ends.
"""

from __future__ import annotations

import _thread  # what `threading` is made of, and quick to import
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from snapshotter.core.errors import Interrupted

ASKING_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_MAIN = _thread.get_ident()  # the one thread that Python handles signals in
_depth = 0
_pending: int | None = None


def _raise(number: int) -> None:
    raise Interrupted(f"interrupted by {signal.Signals(number).name}")


def _handler(number: int, frame: FrameType | None) -> None:
    global _pending
    if _depth:
        _pending = number
    else:
        _raise(number)


def install() -> None:
    """Called once by the command line, never by a library user. SIGHUP stays ignored if it was (nohup)."""
    for number in ASKING_TO_END:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handler)


@contextmanager
def deferred() -> Iterator[None]:
    """No `Interrupted` inside; one that came is raised at the end, or, where another exception is on its way, at the
    end of the next block: a run that was asked to end doesn't go on with the next node."""
    global _depth, _pending
    if _thread.get_ident() != _MAIN:  # nothing can be raised in here
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if _depth == 0 and _pending is not None:
        number, _pending = _pending, None
        _raise(number)
