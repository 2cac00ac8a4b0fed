"""A fleet taken from outside under Compute Engine's quotas of a minute, as a process of its own: `python -m
tests.faults.gce_fleet N` takes N nodes of one disk each and prints what that took. Time is the twin's: it goes on when
all threads sleep.
"""

from __future__ import annotations

import json
import math
import os
import queue
import sys
from collections import Counter
from typing import Any

import google.auth.transport._mtls_helper  # noqa: F401  (slow, and each client would ask for it)

from providers.gce import GceProvider
from providers.gce.api import Api
from snapshotter.core.model import Hold
from snapshotter.provider import Settings
from snapshotter.testing.harness import make_birth
from tests.faults.fleet_kit import FleetClock, ItsClock, peak_mb
from tests.twins.gce import Limits, Twin

#: What Compute Engine grants a project that has never asked for more, of each kind of call, or thereabouts.
PER_MINUTE = {"change": 375, "get": 1500, "list": 1500, "operation": 1500}
#: Each disk must be asked for and, when its instant is fixed, be sealed.
CHANGES = 2
LATENCY_S = 0.1
THREADS = 32


def run(nodes: int) -> dict[str, Any]:
    clock = FleetClock()  # begins with a minute
    limits = Limits(per_minute=PER_MINUTE, hourly=6, pending_s=0.3, capture_s=1.0, upload_s=60.0)
    with Twin(None, limits, ItsClock(clock)) as twin:
        os.environ.update(twin.environment())
        zones = ("europe-west3-a", "us-central1-a")
        instances = []
        for number in range(nodes):
            instances.append(twin.world.run_instance(zones[number % 2]))
            twin.world.add_disk(f"data-{number}", instances[-1], "data", with_bytes=False)
        make = Api._make

        def slow(self: Api, service: str) -> Any:
            client = make(self, service)
            client._transport._session.hooks["response"].append(lambda *_, **__: clock.sleep(LATENCY_S))
            return client

        Api._make = slow  # type: ignore[method-assign]
        provider = GceProvider(Settings("/nonexistent", options={"project": twin.world.project}))
        provider.clock = clock
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        for instance in instances:
            todo.put(f"{instance.zone}/{instance.name}")
        failed: list[str] = []

        def worker() -> None:
            while True:
                try:
                    instance = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    volumes = provider.find({"instance": instance})
                    birth = make_birth(volumes, node=instance.rpartition("/")[2])
                    provider.check(volumes, birth)
                    provider.prepare(volumes, birth, 5.0)
                    provider.create(volumes, birth, Hold())
                    provider.mark(birth.set_id, {"sealed": "20261122t100630z", "grade": "crash"})
                except Exception as error:
                    failed.append(f"{type(error).__name__}: {error}")

        took = clock.run(worker, THREADS)
        calls = len(twin.calls)
        throttled = sum(outcome == "rateLimitExceeded" for _, outcome in twin.calls)
        taken = Counter(each.source for each in twin.world.snapshots.values())
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
        # A minute's calls are there at its beginning: the last of them needs no more than to be made.
        "quota_seconds": 60.0 * (math.ceil(CHANGES * nodes / PER_MINUTE["change"]) - 1),
        "calls": calls,
        "throttled": throttled,
        "by_action": counted,
        "idle_calls": idle,
        "peak_mb": peak_mb(),
    }


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]))))
