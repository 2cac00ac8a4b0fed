"""A fleet taken from outside under EC2's token buckets, as a process of its own: `python -m tests.faults.ebs_fleet N`
takes N nodes of two volumes each and prints what that took. Time is the twin's: it goes on when all threads sleep.
"""

from __future__ import annotations

import json
import os
import queue
import sys
from collections import Counter
from typing import Any

from providers.ebs import EbsProvider
from providers.ebs.api import Api
from snapshotter.core.model import Hold
from snapshotter.provider import Settings
from snapshotter.testing.harness import make_birth
from tests.faults.fleet_kit import FleetClock, ItsClock, peak_mb
from tests.twins.ec2 import Limits, Twin

BURST, PER_SECOND = 50.0, 20.0
LATENCY_S = 0.1
THREADS = 32


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

        took = clock.run(worker, THREADS)
        calls = len(twin.calls)
        throttled = sum(outcome == "RequestLimitExceeded" for _, outcome in twin.calls)
        taken = Counter(each.volume for each in twin.world.snapshots.values())
        counted = twin.count()
        # An idle check of all: what is there, in pages.
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
