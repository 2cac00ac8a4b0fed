"""A fleet under quotas that are full again at each whole minute: all taken in about the quota's own time, hardly a call
refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support import CHECKOUT


def test_a_fleet_is_taken_in_the_time_that_compute_engine_gives_it(
    request: pytest.FixtureRequest, measured: Callable[[str], None]
) -> None:
    nodes = 1000 if request.config.getoption("--full") else 200
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.gce_fleet", str(nodes)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        cwd=CHECKOUT,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    measured(
        f"gce fleet: {found['snapshots']} disks in {found['seconds']:.1f} s, the quota's own time "
        f"{found['quota_seconds']:.0f} s; {found['throttled']} of {found['calls']} calls throttled; an idle check "
        f"{found['idle_calls'] / nodes:.3f} calls a node; {found['peak_mb']:.0f} MB with the twin"
    )
    assert not found["failed"]
    assert (found["snapshots"], found["twice"], found["sets"]) == (nodes, 0, nodes)
    assert found["seconds"] <= 1.1 * found["quota_seconds"]
    assert found["throttled"] < 0.01 * found["calls"]
    assert found["idle_calls"] <= 0.03 * nodes
    assert found["peak_mb"] < 256
