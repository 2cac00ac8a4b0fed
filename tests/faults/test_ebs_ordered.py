"""One instant or none: a writer that orders its writes over two volumes. Every set has them in order, without a freeze
too. The control, the volumes one after another, must break it: else this proves nothing.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.core.model import Access, Hold, Snapshot, Volume
from snapshotter.testing.conformance.steps import attach
from snapshotter.testing.harness import make_birth
from tests.unit.ebs_kit import EbsHarness, ebs_harness

pytestmark = pytest.mark.root

ORDERED = """
import os, sys
log, table = (os.open(path, os.O_RDWR | os.O_CREAT, 0o644) for path in sys.argv[1:3])
number = 0
while True:
    number += 1
    for fd in (log, table):  # what is in the table was in the log before
        os.pwrite(fd, b"%020d" % number, 0)
        os.fdatasync(fd)
"""
#: Sets to try, usually and with --full; controls until one is broken.
SETS, ALL_SETS, CONTROLS = 5, 60, 60


@pytest.fixture
def world() -> Iterator[tuple[EbsHarness, list[Volume]]]:
    with ebs_harness() as harness:
        volumes = [harness.volume(), harness.volume()]
        log, table = Path(str(volumes[0].path)) / "log", Path(str(volumes[1].path)) / "table"
        writer = subprocess.Popen([sys.executable, "-c", ORDERED, str(log), str(table)])
        try:
            give_up = time.monotonic() + 60
            while not table.exists() or int(table.read_text() or 0) < 5:
                assert time.monotonic() < give_up
                time.sleep(0.02)
            yield harness, volumes
            assert writer.poll() is None
        finally:
            writer.kill()
            writer.wait()


def taken(harness: EbsHarness, volumes: list[Volume]) -> list[Snapshot]:
    """No quiesce: what EC2 itself makes of it."""
    provider, birth = harness.provider(), make_birth(volumes)
    provider.prepare(volumes, birth, 5.0)
    return list(provider.create(volumes, birth, Hold()))


def number(harness: EbsHarness, snapshot: Snapshot, name: str) -> int:
    attached = attach(harness, snapshot, Access.WRITABLE)  # an ext4 of a running machine wants its journal replayed
    found = int((Path(attached.path) / name).read_text() or 0)
    attached.end()
    return found


def whole(harness: EbsHarness, log: Snapshot, table: Snapshot) -> bool:
    first, second = number(harness, log, "log"), number(harness, table, "table")
    harness.provider().delete(log.birth.set_id)
    harness.provider().delete(table.birth.set_id)
    return second <= first <= second + 1


def test_a_set_is_one_instant(world: tuple[EbsHarness, list[Volume]], request: pytest.FixtureRequest) -> None:
    harness, volumes = world
    for _ in range(ALL_SETS if request.config.getoption("--full") else SETS):
        log, table = taken(harness, volumes)
        assert whole(harness, log, table)


def test_one_after_another_is_not(world: tuple[EbsHarness, list[Volume]]) -> None:
    harness, volumes = world
    for _ in range(CONTROLS):
        (log,) = taken(harness, volumes[:1])
        (table,) = taken(harness, volumes[1:])
        if not whole(harness, log, table):
            return
    pytest.fail("they came out in order each time: the control proves nothing")
