"""Compute Engine accepts a snapshot at once and fixes its image later, at the end of CREATING: the writers must be held
until then. Writers that write in order over two disks of no group, both frozen, prove it; and that the twin would see a
driver that lets them go when its call is answered (the control).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from providers.gce import taking
from snapshotter.core.model import Access, Hold, Volume
from snapshotter.testing.conformance.steps import attach, ready
from snapshotter.testing.harness import make_birth
from tests.hot.test_gce_archive import in_order
from tests.twins.gce import Limits
from tests.unit.gce_kit import GceHarness, gce_harness

pytestmark = pytest.mark.root
ROUNDS = 4


@contextmanager
def frozen(volumes: list[Volume]) -> Iterator[None]:
    held: list[str] = []
    try:
        for volume in volumes:
            subprocess.run(["fsfreeze", "-f", str(volume.path)], check=True)
            held.append(str(volume.path))
        yield
    finally:
        for path in held:
            subprocess.run(["fsfreeze", "-u", path], check=True)


def behind(harness: GceHarness, volumes: list[Volume]) -> list[int]:
    """How many writes the second disk is behind the first, in each of some sets: 0 or 1 is in order."""
    births = []
    with in_order([os.path.join(str(each.path), "sequence") for each in volumes]):
        for _ in range(ROUNDS):
            provider, birth = harness.provider(), make_birth(volumes)
            provider.prepare(volumes, birth, 5.0)
            with frozen(volumes):
                provider.create(volumes, birth, Hold())
            births.append(birth)
            ready(harness.provider(), harness, birth.set_id)
            harness.twin.clock.advance(600)  # so often may a disk be taken
    found = []
    for birth in births:
        number = {}
        for snapshot in ready(harness.provider(), harness, birth.set_id):
            attached = attach(harness, snapshot, Access.WRITABLE)
            with open(os.path.join(attached.path, "sequence"), "rb") as file:
                number[snapshot.volume] = int(file.read() or b"0")
            attached.end()
        found.append(number[volumes[0].id] - number[volumes[1].id])
    return found


def test_writers_are_held_until_the_image_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    with gce_harness(limits=Limits(pending_s=0.5, capture_s=2.0, upload_s=5.0)) as harness:
        volumes = [harness.volume(), harness.volume()]
        assert all(each in (0, 1) for each in behind(harness, volumes))
        monkeypatch.setattr(taking, "_TAKEN", frozenset({"CREATING", "UPLOADING", "READY"}))
        assert not all(each in (0, 1) for each in behind(harness, volumes)), "the control proves nothing"
