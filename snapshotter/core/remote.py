"""Asking a remote API that answers late, twice, or never: clocks, deadlines, token buckets, pollers, operation ids.

Must know no cloud. A driver tells what an answer means by raising `Temporary` (nothing happened, ask again) or `Lost`
(no answer: it may have happened); everything else it raises gets out as it is. Seconds throughout.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from snapshotter.core.errors import StorageError
from snapshotter.core.model import Progress, Report, no_report

T = TypeVar("T")
_LITTLE = 0.01
_FEW = 20.0  # calls a minute that we ask for however few there were: others may have taken the rest of that one
_LAST_S = 0.5  # before a deadline the last attempt is made
_LATE_S = 0.2  # after a whole minute: the other side's clock isn't ours
_NAMESPACE = "6a4f0d8e-5f0b-4a5c-9a8b-2f0a1d3c7e55"


class Temporary(Exception):
    """The call had no effect and may be made again. `throttled`: because there were too many."""

    def __init__(self, message: str, *, throttled: bool = False) -> None:
        super().__init__(message)
        self.throttled = throttled


class Lost(Exception):
    """No answer came, or one that says nothing: the effect may have happened."""


class Late(StorageError):
    """The deadline is over."""


class Clock:
    """Time as everything here sees it: tests drive one of their own."""

    def now(self) -> float:
        """Monotonic."""
        return time.monotonic()

    def wall(self) -> float:
        """Since 1970: what a cloud's time stamps, and its whole minutes, are compared with."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Deadline:
    """The end of everything that is done for one purpose, however many calls that takes."""

    def __init__(self, seconds: float, clock: Clock, what: str) -> None:
        self.clock, self.what, self.seconds = clock, what, seconds
        self._end = clock.now() + seconds

    def left(self) -> float:
        return max(0.0, self._end - self.clock.now())

    def over(self, why: str = "") -> Late:
        """The error to raise when nothing is left. `why`: what was heard last."""
        said = f" ({why})" if why else ""
        return Late(f"was not done within {self.seconds:.0f} s{said}", object=self.what, cure="try again later")


class TokenBucket:
    """Calls per second as the other side counts them, so that it needn't refuse. Others may draw on the same account:
    a refusal (`throttled`) slows us down, and within a minute we are back at full speed. Threads may share one."""

    def __init__(self, capacity: float, per_second: float, clock: Clock) -> None:
        self.capacity, self.per_second, self.clock = capacity, per_second, clock
        self._tokens, self._rate, self._at = capacity, per_second, clock.now()
        self._slowed = -1.0
        import threading  # slow to import, and nobody needs it who asks no cloud

        self._lock = threading.Lock()

    def take(self, deadline: Deadline) -> None:
        """Wait for one's turn. Raises StorageError, at once, if that would be after the deadline."""
        with self._lock:
            self._refill()
            wait = (1 - self._tokens) / self._rate
            if wait > deadline.left():
                raise deadline.over("waiting for our turn: the API takes only so many calls a second")
            self._tokens -= 1
        if wait > 0:
            self.clock.sleep(wait)

    def throttled(self) -> None:
        with self._lock:
            self._refill()
            self._tokens = min(self._tokens, 0.0)
            if self.clock.now() - self._slowed >= 1:  # a burst of refusals is one piece of news
                self._slowed = self.clock.now()
                self._rate = max(self.per_second / 20, self._rate * 0.7)

    def _refill(self) -> None:
        now = self.clock.now()
        passed, self._at = now - self._at, now
        self._tokens = min(self.capacity, self._tokens + passed * self._rate)
        self._rate = min(self.per_second, self._rate + self.per_second * passed / 60)


class MinuteQuota:
    """Calls that the other side takes between two whole minutes, all at once if one likes, and then none until the
    next. How many isn't known before: a refusal (`throttled`) ends the minute for all, and what it has taken until then
    is what we ask of the minutes after it, and ever more of each until it refuses again. Threads may share one."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._minute, self._taken, self._refused = -1, 0, 0
        self._most: float | None = None
        self._more = _LITTLE
        import threading  # slow to import, and nobody needs it who asks no cloud

        self._lock = threading.Lock()

    def take(self, deadline: Deadline) -> None:
        """Wait for one's turn. Raises StorageError, at once, if that would be after the deadline."""
        while True:
            with self._lock:
                now = self.clock.wall()
                self._turn(int(now // 60))
                if not self._refused and (self._most is None or self._taken < self._most):
                    self._taken += 1
                    return
                wait = 60 - now % 60 + _LATE_S
                if wait > deadline.left():
                    raise deadline.over("waiting for the next minute: the API takes only so many calls in each")
            self.clock.sleep(wait)

    def throttled(self) -> None:
        with self._lock:
            self._turn(int(self.clock.wall() // 60))
            self._refused += 1
            self._most, self._more = max(_FEW, self._taken - self._refused), _LITTLE

    def _turn(self, minute: int) -> None:
        if minute != self._minute:
            if self._most is not None and not self._refused:
                self._most += max(1.0, self._most * self._more)
                self._more = min(1.0, self._more * 2)
            self._minute, self._taken, self._refused = minute, 0, 0


def operation_id(*parts: str) -> str:
    """The same for the same operation, whoever repeats it: a client token, a tag to find its effect by."""
    import uuid  # slow to import, and nobody needs it who asks no cloud

    return str(uuid.uuid5(uuid.UUID(_NAMESPACE), "\0".join(parts)))


def persist(attempt: Callable[[], T], deadline: Deadline, *, again_after_loss: bool) -> T:
    """Make a call until it is answered. Temporary failures are met with another attempt; `Lost` is too where the call
    may be made twice, else it gets out. Raises StorageError at the deadline."""
    from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

    heard = ""

    def noted() -> T:
        nonlocal heard
        try:
            return attempt()
        except (Temporary, Lost) as error:
            heard = str(error)
            raise

    longer = wait_random_exponential(multiplier=0.25, max=10)

    def pause(state: RetryCallState) -> float:
        return max(0.0, min(longer(state), deadline.left() - _LAST_S))

    retrying = Retrying(
        retry=retry_if_exception_type((Temporary, Lost) if again_after_loss else Temporary),
        wait=pause,
        stop=lambda _: deadline.left() <= _LAST_S,
        sleep=deadline.clock.sleep,
        reraise=True,
    )
    try:
        return retrying(noted)
    except Late:
        if not heard:
            raise
        raise deadline.over(heard) from None
    except Temporary as error:
        raise deadline.over(str(error)) from None
    except Lost as error:
        if again_after_loss:
            raise deadline.over(str(error)) from None
        raise


def poll(
    look: Callable[[], T | None],
    deadline: Deadline,
    *,
    first_s: float = 1.0,
    most_s: float = 60.0,
    report: Report = no_report,
) -> T:
    """Look until there is an answer (not None), ever more rarely. Raises StorageError at the deadline, never later."""
    pause_s, started = first_s, deadline.clock.now()
    while True:
        found = look()
        if found is not None:
            return found
        left = deadline.left()
        if left <= 0:
            raise deadline.over()
        report(Progress(f"waiting for {deadline.what}", round(deadline.clock.now() - started), None, "s"))
        deadline.clock.sleep(min(pause_s, left))
        pause_s = min(pause_s * 1.5, most_s)
