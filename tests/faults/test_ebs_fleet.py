"""A fleet under a bucket of 50 and 20 a second: all taken in about the bucket's own time, hardly a call refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support import CHECKOUT


def test_a_fleet_is_taken_in_the_time_that_ec2_gives_it(
    request: pytest.FixtureRequest, measured: Callable[[str], None]
) -> None:
    nodes = 1000 if request.config.getoption("--full") else 300
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.ebs_fleet", str(nodes)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        cwd=CHECKOUT,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    measured(
        f"ebs fleet: {found['snapshots']} volumes of {nodes} nodes in {found['seconds']:.1f} s, the bucket's own time "
        f"{found['bucket_seconds']:.1f} s; {found['throttled']} of {found['calls']} calls throttled; an idle check "
        f"{found['idle_calls'] / nodes:.3f} calls a node; {found['peak_mb']:.0f} MB with the twin"
    )
    assert not found["failed"]
    assert (found["snapshots"], found["twice"], found["sets"]) == (2 * nodes, 0, nodes)
    assert found["seconds"] <= 1.1 * found["bucket_seconds"]
    assert found["throttled"] < 0.01 * found["calls"]
    assert found["idle_calls"] <= 0.03 * nodes
    assert found["peak_mb"] < 256
