"""A tick over a fleet, by the function's own code, as a process of its own: `python -m tests.faults.tick_fleet ebs N D`
(or `gce`) ticks once a day, for D days, over N nodes, and prints what each took. Time is the twin's (`ebs_fleet`): it
goes on when all threads sleep. Memory is that of the function and the twin together.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any
from unittest import mock

from snapshotter import functions
from tests.faults.fleet_kit import FleetClock, ItsClock, peak_mb
from tests.unit.upkeep_kit import CLOCKS

DAY_S = 86400.0
LATENCY_S = 0.1


class Clock(FleetClock):
    def __init__(self) -> None:
        super().__init__(time.time())
        self._busy = 1

    def pass_by(self, seconds: float) -> None:
        self._time += seconds

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

        self.clock.run(worker, self.size)
        return done


class EbsFleet:
    """`nodes` instances with a volume each, in a twin of EC2 with its buckets."""

    provider = "ebs"

    def __init__(self, clock: Clock, nodes: int) -> None:
        # Each cloud's library is loaded in its own process only: memory is measured.
        from providers.ebs import EbsProvider
        from providers.ebs.api import Api
        from tests.faults.ebs_fleet import BURST, PER_SECOND
        from tests.twins.ec2 import Limits, Twin

        limits = Limits(buckets={"*": (BURST, PER_SECOND)}, spacing_s=15.0, upload_s=30.0)
        self.twin = Twin(None, limits, ItsClock(clock))
        make = Api._make

        def slow(api: Api, timeout: float) -> Any:
            client = make(api, timeout)
            client.meta.events.register("before-send.ec2", lambda **_: clock.sleep(LATENCY_S))
            return client

        Api._make = slow  # type: ignore[method-assign]
        EbsProvider.clock = clock
        for number in range(nodes):
            volume = self.twin.world.add_volume(self.twin.world.run_instance(), "/dev/sdf", with_bytes=False)
            self.twin.world.retag(volume, {"snapshotter:node": f"n{number}"})

    def slots(self) -> list[str]:
        world = self.twin.world
        return [each.tags["snapshotter:slot"] for each in world.snapshots.values() if each.gone is None]


class GceFleet:
    """`nodes` instances with a disk each, in a twin of Compute Engine with its quotas a minute."""

    provider = "gce"

    def __init__(self, clock: Clock, nodes: int) -> None:
        from google.auth.transport.requests import AuthorizedSession

        from providers.gce import GceProvider
        from tests.faults.gce_fleet import PER_MINUTE
        from tests.twins import gce

        limits = gce.Limits(per_minute=PER_MINUTE, upload_s=30.0)
        self.twin = gce.Twin(None, limits, ItsClock(clock))
        request = AuthorizedSession.request

        def slow(session: AuthorizedSession, *words: Any, **named: Any) -> Any:
            clock.sleep(LATENCY_S)
            return request(session, *words, **named)

        AuthorizedSession.request = slow  # type: ignore[method-assign]
        GceProvider.clock = clock
        for number in range(nodes):
            disk = self.twin.world.add_disk(f"data-{number}", self.twin.world.run_instance(), with_bytes=False)
            disk.labels = {"snapshotter-node": f"n{number}"}

    def slots(self) -> list[str]:
        return [each.labels["snapshotter-slot"] for each in self.twin.world.snapshots.values()]


def run(kind: str, nodes: int, days: int) -> list[dict[str, Any]]:
    clock = Clock()
    made: EbsFleet | GceFleet = EbsFleet(clock, nodes) if kind == "ebs" else GceFleet(clock, nodes)
    found = []
    with made.twin as twin:
        os.environ.update({**twin.environment(), "AWS_REGION": "eu-central-1", "AWS_LAMBDA_FUNCTION_NAME": "tick"})
        policy = "every = '24h'\nkeep = {daily = 1}\n"
        os.environ["SNAPSHOTTER_CONFIG_TOML"] = "".join(
            f"[node.n{number}]\npath = '/data/{number}'\n{policy}" for number in range(nodes)
        )

        def now() -> datetime:
            return datetime.fromtimestamp(clock.now(), UTC).replace(microsecond=0)

        with mock.patch("concurrent.futures.ThreadPoolExecutor", clock.pool):
            for patch in [mock.patch(name, now) for name in CLOCKS]:
                patch.start()
            for _ in range(days):
                twin.calls.clear()
                started, cpu = clock.now(), time.process_time()
                answer = functions.run(made.provider, 870.0)
                slots = made.slots()
                found.append(
                    {
                        "taken": len(answer["taken"]),
                        "removed": len(answer["removed"]),
                        "left": len(answer["left"]) + len(answer["busy"]),
                        "twice": sum(count > 1 for count in Counter(slots).values()),
                        "alive": len(slots),
                        "seconds": clock.now() - started,
                        "cpu_seconds": time.process_time() - cpu,
                        "calls": len(twin.calls),
                        "throttled": sum(why in ("RequestLimitExceeded", "rateLimitExceeded") for _, why in twin.calls),
                        "by_action": dict(twin.count()),
                        "peak_mb": peak_mb(),
                    }
                )
                clock.pass_by(DAY_S)
    return found


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
