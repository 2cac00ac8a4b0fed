"""A fleet in no time: a clock for many threads that goes on when all of them sleep, and a process's own memory."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable

from snapshotter.core.remote import Clock
from tests.twins.knobs import Clock as TwinClock


class FleetClock(Clock):
    """Moves to the next wake-up when every thread that works sleeps: work itself takes no time."""

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self._time = start
        self._wakes: list[tuple[float, int]] = []
        self._numbers = itertools.count()
        self._busy = 0
        self._changed = threading.Condition()

    def now(self) -> float:
        return self._time

    def wall(self) -> float:
        return self._time

    def sleep(self, seconds: float) -> None:
        with self._changed:
            mine = (self._time + seconds, next(self._numbers))
            heapq.heappush(self._wakes, mine)
            self._rest()
            self._changed.wait_for(lambda: mine not in self._wakes)

    def _rest(self) -> None:
        self._busy -= 1
        if self._busy == 0 and self._wakes:
            self._time = max(self._time, self._wakes[0][0])
            while self._wakes and self._wakes[0][0] <= self._time:
                heapq.heappop(self._wakes)
                self._busy += 1
            self._changed.notify_all()

    def _work(self, act: Callable[[], None]) -> None:
        try:
            act()
        finally:
            with self._changed:
                self._rest()

    def run(self, act: Callable[[], None], threads: int) -> float:
        """`act` in so many threads, to the end of all; what that took, in seconds of this clock."""
        started = self._time
        working = [threading.Thread(target=self._work, args=(act,)) for _ in range(threads)]
        self._busy = threads
        for thread in working:
            thread.start()
        for thread in working:
            thread.join()
        self._busy = 1  # who called
        return self._time - started


class ItsClock(TwinClock):
    """The twin's, moved by the fleet's."""

    def __init__(self, clock: FleetClock) -> None:
        self.clock = clock

    def now(self) -> float:
        return self.clock.now()


def peak_mb() -> float:
    """Of this program: getrusage would say the parent's where that was larger."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
