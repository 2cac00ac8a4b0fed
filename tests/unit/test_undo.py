"""The undo stack: all inverses, newest first, whatever goes wrong meanwhile, and what is left is named."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.core import interrupts
from snapshotter.core.errors import BusyError, Exit, Interrupted, StorageError, UndoIncompleteError
from snapshotter.core.undo import Undo


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=8), st.booleans())
def test_all_run_in_reverse_and_the_failed_are_named(fails: list[bool], by_error: bool) -> None:
    ran: list[int] = []

    def step(number: int, fail: bool) -> Callable[[], None]:
        def inverse() -> None:
            ran.append(number)
            if fail:
                raise StorageError(f"refused {number}")

        return inverse

    def body() -> None:
        with Undo("snapshotter reap") as undo:
            for number, fail in enumerate(fails):
                undo.push(f"step {number}", step(number, fail))
            if by_error:
                raise BusyError("the first error")

    left = [f"step {number}" for number, fail in reversed(list(enumerate(fails))) if fail]
    if left:
        with pytest.raises(UndoIncompleteError) as incomplete:
            body()
        assert list(incomplete.value.left) == left
        assert incomplete.value.exit is Exit.UNDO_INCOMPLETE
        assert incomplete.value.undo_command == "snapshotter reap"
        assert all(name in incomplete.value.line() for name in left)
        assert ("the first error" in incomplete.value.line()) == by_error
    elif by_error:
        with pytest.raises(BusyError, match="the first error"):
            body()
    else:
        body()
    assert ran == list(reversed(range(len(fails))))


def test_committed_steps_stay() -> None:
    ran: list[str] = []
    with pytest.raises(BusyError), Undo() as undo:
        undo.push("before", lambda: ran.append("before"))
        undo.commit()
        undo.push("after", lambda: ran.append("after"))
        raise BusyError("late")
    assert ran == ["after"]


def test_an_inverse_runs_once() -> None:
    ran: list[str] = []
    undo = Undo()
    undo.push("one", lambda: ran.append("one"))
    assert undo.run() == [] and undo.run() == []
    assert ran == ["one"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, Interrupted, ZeroDivisionError, MemoryError])
def test_the_rest_is_undone_when_an_inverse_is_broken_off(interrupt: type[BaseException]) -> None:
    ran: list[str] = []

    def broken() -> None:
        raise interrupt("now")

    with pytest.raises(UndoIncompleteError) as incomplete, Undo() as undo:
        undo.push("first", lambda: ran.append("first"))
        undo.push("second", broken)
        undo.push("third", lambda: ran.append("third"))
        raise KeyboardInterrupt
    assert ran == ["third", "first"]
    assert incomplete.value.left == ("second",)


def test_the_first_error_is_the_cause() -> None:
    def broken() -> None:
        raise StorageError("refused")

    error = BusyError("why it began")
    with pytest.raises(UndoIncompleteError) as incomplete, Undo() as undo:
        undo.push("it", broken)
        raise error
    assert incomplete.value.__cause__ is error


@pytest.fixture
def signals() -> Iterator[None]:
    """As the command line installs them; put back afterwards."""
    before = {number: signal.getsignal(number) for number in interrupts.ASKING_TO_END}
    for number in interrupts.ASKING_TO_END:
        signal.signal(number, signal.default_int_handler)
    interrupts.install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        interrupts._pending = None  # kept for later by a test in which another error went first


def strike(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", interrupts.ASKING_TO_END)
def test_a_signal_undoes_what_was_done(signals: None, number: int) -> None:
    ran: list[str] = []
    with pytest.raises(Interrupted), Undo() as undo:
        undo.push("one", lambda: ran.append("one"))
        strike(number)
        ran.append("not reached")
    assert ran == ["one"]


def test_a_second_signal_does_not_break_the_undo(signals: None) -> None:
    ran: list[str] = []

    def inverse(name: str) -> Callable[[], None]:
        def run() -> None:
            strike(signal.SIGINT)
            ran.append(name)

        return run

    with pytest.raises(Interrupted), Undo() as undo:
        for name in ("one", "two", "three"):
            undo.push(name, inverse(name))
        strike()
    assert ran == ["three", "two", "one"]


def test_what_is_left_is_named_although_a_signal_came(signals: None) -> None:
    def inverse() -> None:
        strike()
        raise StorageError("refused")

    with pytest.raises(UndoIncompleteError) as incomplete, Undo() as undo:
        undo.push("the set", inverse)
        raise BusyError("first")
    assert incomplete.value.left == ("the set",)
