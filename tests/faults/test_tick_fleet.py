"""A tick over a fleet within what a function has: 900 s and 256 MB, under the clouds' own buckets and quotas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support import CHECKOUT


@pytest.mark.parametrize("cloud", ["ebs", "gce"])
def test_a_fleet_within_a_function(request: pytest.FixtureRequest, measured: Callable[[str], None], cloud: str) -> None:
    """Four days, a tick each: takes, level 0 of what was taken before, and on the fourth removals: two of a node stay
    until one is verified, and what is taken in a tick is counted in the next."""
    nodes = 1000 if request.config.getoption("--full") else 50
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.tick_fleet", cloud, str(nodes), "4"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        cwd=CHECKOUT,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    days = json.loads(done.stdout)
    for number, day in enumerate(days):
        measured(
            f"tick over {nodes} {cloud} nodes, day {number + 1}: {day['taken']} taken, {day['removed']} removed in "
            f"{day['seconds']:.0f} s; {day['throttled']} of {day['calls']} calls throttled; {day['peak_mb']:.0f} MB "
            f"with the twin"
        )
        assert (day["taken"], day["twice"], day["left"]) == (nodes, 0, 0)
        assert day["seconds"] < 900 and day["peak_mb"] < 256
    assert [day["removed"] for day in days] == [0, 0, 0, nodes]
    assert [day["alive"] for day in days] == [nodes, 2 * nodes, 3 * nodes, 3 * nodes]
