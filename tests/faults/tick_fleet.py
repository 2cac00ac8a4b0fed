"""A tick over a fleet, by the function's own code, as a process of its own: `python -m tests.faults.tick_fleet N DAYS`
ticks once a day over N nodes and prints what each took. Time is the twin's (`ebs_fleet`): it goes on when all threads
sleep. Memory is that of the function and the twin together.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any
from unittest import mock

from providers.ebs import EbsProvider
from providers.ebs.api import Api
from snapshotter import functions
from tests.faults.ebs_fleet import BURST, LATENCY_S, PER_SECOND, FleetClock, ItsClock, peak_mb
from tests.faults.test_functions import fleet
from tests.twins.ec2 import Limits, Twin
from tests.unit.upkeep_kit import CLOCKS

DAY_S = 86400.0


class Clock(FleetClock):
    def __init__(self) -> None:
        super().__init__()
        self._time = time.time()
        self._busy = 1

    def wall(self) -> float:
        return self.now()

    def pool(self, size: int) -> Pool:
        return Pool(self, size)


class Pool:
    """A thread pool whose threads the clock knows of, and whose caller it knows to wait."""

    def __init__(self, clock: Clock, size: int) -> None:
        self.clock, self.size = clock, size

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, act: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for item in items:
            todo.put(item)
        done: list[Any] = []

        def worker() -> None:
            while True:
                try:
                    item = todo.get_nowait()
                except queue.Empty:
                    return
                done.append(act(item))

        threads = [threading.Thread(target=self.clock.work, args=(worker,)) for _ in range(self.size)]
        self.clock.start(threads)
        for thread in threads:
            thread.join()
        self.clock._busy = 1
        return done


def run(nodes: int, days: int) -> list[dict[str, Any]]:
    clock = Clock()
    limits = Limits(buckets={"*": (BURST, PER_SECOND)}, spacing_s=15.0, upload_s=30.0)
    make = Api._make

    def slow(self: Api, timeout: float) -> Any:
        client = make(self, timeout)
        client.meta.events.register("before-send.ec2", lambda **_: clock.sleep(LATENCY_S))
        return client

    Api._make = slow  # type: ignore[method-assign]
    EbsProvider.clock = clock
    found = []
    with Twin(None, limits, ItsClock(clock)) as twin:
        os.environ.update({**twin.environment(), "AWS_REGION": "eu-central-1", "AWS_LAMBDA_FUNCTION_NAME": "tick"})
        text = "".join(
            f"[node.n{number}]\npath = '/data/{number}'\nevery = '24h'\nkeep = {{daily = 1}}\n"
            for number in range(nodes)
        )
        os.environ["SNAPSHOTTER_CONFIG_TOML"] = text
        fleet(twin, nodes)
        now = lambda: datetime.fromtimestamp(clock.now(), UTC).replace(microsecond=0)  # noqa: E731
        with mock.patch("concurrent.futures.ThreadPoolExecutor", clock.pool):
            for patch in [mock.patch(name, now) for name in CLOCKS]:
                patch.start()
            for _ in range(days):
                twin.calls.clear()
                started, cpu = clock.now(), time.process_time()
                answer = functions.run("ebs", 870.0)
                alive = [each for each in twin.world.snapshots.values() if each.gone is None]
                found.append(
                    {
                        "taken": len(answer["taken"]),
                        "removed": len(answer["removed"]),
                        "left": len(answer["left"]) + len(answer["busy"]),
                        "twice": sum(n > 1 for n in Counter(each.tags["snapshotter:slot"] for each in alive).values()),
                        "alive": len(alive),
                        "seconds": clock.now() - started,
                        "cpu_seconds": time.process_time() - cpu,
                        "calls": len(twin.calls),
                        "throttled": sum(outcome == "RequestLimitExceeded" for _, outcome in twin.calls),
                        "by_action": dict(twin.count()),
                        "peak_mb": peak_mb(),
                    }
                )
                clock._time += DAY_S
    return found


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
