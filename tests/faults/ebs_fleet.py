"""A fleet taken from outside under EC2's token buckets, as a process of its own: `python -m tests.faults.ebs_fleet N`
takes N nodes of two volumes each and prints what that took. Time is the twin's: it goes on when all threads sleep.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import queue
import sys
import threading
from collections import Counter
from typing import Any

from providers.ebs import EbsProvider
from providers.ebs.api import Api
from snapshotter.core.model import Hold
from snapshotter.core.remote import Clock
from snapshotter.provider import Settings
from snapshotter.testing.harness import make_birth
from tests.twins.ec2 import Clock as TwinClock
from tests.twins.ec2 import Limits, Twin

BURST, PER_SECOND = 50.0, 20.0
LATENCY_S = 0.1
THREADS = 32


class FleetClock(Clock):
    """Moves to the next wake-up when every thread that works sleeps: work itself takes no time."""

    def __init__(self) -> None:
        self._time = 1_800_000_000.0
        self._wakes: list[tuple[float, int]] = []
        self._numbers = itertools.count()
        self._busy = 0
        self._changed = threading.Condition()

    def now(self) -> float:
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

    def work(self, act: Any) -> None:
        try:
            act()
        finally:
            with self._changed:
                self._rest()

    def start(self, threads: list[threading.Thread]) -> None:
        self._busy = len(threads)
        for thread in threads:
            thread.start()


class ItsClock(TwinClock):
    def __init__(self, clock: FleetClock) -> None:
        self.clock = clock

    def now(self) -> float:
        return self.clock.now()


def peak_mb() -> float:
    """Of this program: getrusage would say the parent's where that was larger."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def run(nodes: int) -> dict[str, Any]:
    clock = FleetClock()
    limits = Limits(buckets={"*": (BURST, PER_SECOND)}, spacing_s=15.0, upload_s=30.0)
    with Twin(None, limits, ItsClock(clock)) as twin:
        os.environ.update(twin.environment())
        instances = []
        for _ in range(nodes):
            instances.append(twin.world.run_instance())
            for device in ("/dev/sdf", "/dev/sdg"):
                twin.world.add_volume(instances[-1], device, with_bytes=False)
        make = Api._make

        def slow(self: Api, timeout: float) -> Any:
            client = make(self, timeout)
            client.meta.events.register("before-send.ec2", lambda **_: clock.sleep(LATENCY_S))
            return client

        Api._make = slow  # type: ignore[method-assign]
        provider = EbsProvider(Settings("/nonexistent", options={"region": "eu-central-1"}))
        provider.clock = clock
        provider._api().warm(60)
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        for instance in instances:
            todo.put(instance.id)
        failed: list[str] = []

        def worker() -> None:
            while True:
                try:
                    instance = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    volumes = provider.find({"instance": instance})
                    birth = make_birth(volumes, node=instance)
                    provider.check(volumes, birth)
                    provider.prepare(volumes, birth, 5.0)
                    provider.create(volumes, birth, Hold())
                    provider.mark(birth.set_id, {"sealed": "20261122t100630z", "grade": "crash"})
                except Exception as error:
                    failed.append(f"{type(error).__name__}: {error}")

        started = clock.now()
        threads = [threading.Thread(target=clock.work, args=(worker,)) for _ in range(THREADS)]
        clock.start(threads)
        for thread in threads:
            thread.join()
        took = clock.now() - started
        calls = len(twin.calls)
        throttled = sum(outcome == "RequestLimitExceeded" for _, outcome in twin.calls)
        taken = Counter(each.volume for each in twin.world.snapshots.values())
        counted = twin.count()
        # An idle check of all: what is there, in pages.
        clock._busy = 1
        sets = {snapshot.birth.set_id for snapshot in provider.snapshots() if "sealed" in snapshot.marks}
        idle = len(twin.calls) - calls
    return {
        "nodes": nodes,
        "snapshots": len(taken),
        "twice": sum(count > 1 for count in taken.values()),
        "sets": len(sets),
        "failed": failed[:3],
        "seconds": took,
        "bucket_seconds": (nodes - BURST) / PER_SECOND,
        "calls": calls,
        "throttled": throttled,
        "by_action": counted,
        "idle_calls": idle,
        "peak_mb": peak_mb(),
    }


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]))))
