"""An archive node on Compute Engine: two disks of one consistency group, a database under synced load, taken hot; the
zone is lost, and the node comes back in another one. And writers that write in order over both disks: a group's set
keeps the order, sets taken one by one without a freeze (the control) break it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotter.core.model import Access, Hold, Volume
from snapshotter.testing.conformance.steps import attach, ready
from snapshotter.testing.harness import make_birth
from tests.faults.test_gce_kill import GceCommand
from tests.hot.conftest import Start
from tests.support import check_database
from tests.unit.gce_kit import GceHarness, gce_harness

pytestmark = pytest.mark.root


def test_an_archive_node_survives_its_zone(tmp_path: Path, start: Start) -> None:
    with gce_harness(kind="xfs", grouped=True) as harness:
        data, fast = (Path(str(harness.volume().path)) for _ in range(2))
        (data / "database").symlink_to(fast)
        command = GceCommand(tmp_path / "etc", harness)
        node = start(data, "--rate", "2", "--fill", "20")
        node.wait_for(30)
        taken = []
        for _ in range(2):
            before = node.acknowledged()
            taken.append((command.json("take", str(data)), before))
            assert node.state() not in ("", "T", "Z"), "the node must go on"
        node.wait_for(node.acknowledged() + 20)
        for document, _ in taken:
            assert (document["state"], document["grade"], len(document["snapshots"])) == ("ready", "filesystem", 2)
        assert not harness.twin.world.instants and not harness.twin.world.groups

        node.kill()
        harness.replaced()
        away = harness.instance
        clone = tmp_path / "clone"
        for document, before in taken:
            restored = command.json("restore", document["set_id"], "--to", str(clone), "--with-identity")
            made = {name for name in harness.objects() if "/disks/" in name}
            assert len(made) == 2 and all(name.startswith(f"zones/{away.zone}/") for name in made)
            found = check_database(clone)
            assert found["lost"] == 0 and found["head"] >= before, "acknowledged writes are lost"
            assert os.path.realpath(clone / "database") == restored["roots"][1]["path"]
            command.json("release", str(clone), "--discard-changes")
        assert {part["id"] for document, _ in taken for part in document["snapshots"]} == harness.objects()


@contextmanager
def in_order(paths: list[str]) -> Iterator[None]:
    """A number on the first disk is always on it before it is on the second."""
    stop, started = threading.Event(), threading.Event()

    def write() -> None:
        descriptors = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths]
        number = 0
        while not stop.is_set():
            number += 1
            for fd in descriptors:
                os.pwrite(fd, b"%020d" % number, 0)
                os.fsync(fd)
            started.set()
        for fd in descriptors:
            os.close(fd)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert started.wait(60)
        yield
    finally:
        stop.set()
        writer.join()


def apart(harness: GceHarness, volumes: list[Volume], times: int) -> list[int]:
    """How many writes the second disk is behind the first, in each of so many sets: 0 or 1 is in order."""
    births = []
    with in_order([os.path.join(str(each.path), "sequence") for each in volumes]):
        for turn in range(times):
            provider = harness.provider()
            either = volumes if turn % 2 else volumes[::-1]
            births.append(make_birth(either))
            provider.prepare(either, births[-1], 5.0)
            provider.create(either, births[-1], Hold())
            harness.twin.clock.advance(601)  # Compute Engine takes six an hour
    found = []
    for birth in births:
        number: dict[str, int] = {}
        for snapshot in ready(harness.provider(), harness, birth.set_id):
            attached = attach(harness, snapshot, Access.WRITABLE)
            with open(os.path.join(attached.path, "sequence"), "rb") as file:
                number[snapshot.volume] = int(file.read() or b"0")
            attached.end()
        found.append(number[volumes[0].id] - number[volumes[1].id])
        harness.provider().delete(birth.set_id)
    return found


def test_ordered_writes_stay_in_order_in_a_groups_set(request: pytest.FixtureRequest) -> None:
    times = 30 if request.config.getoption("--full") else 5
    with gce_harness(grouped=True) as harness:
        volumes = [harness.volume(), harness.volume()]
        behind = apart(harness, volumes, times)
        assert all(each in (0, 1) for each in behind), behind
        # The control: the same disks in no group, and nobody held.
        for each in harness.twin.world.disks.values():
            each.resource_policies.clear()
        assert not harness.provider().one_instant(volumes)
        behind = apart(harness, volumes, times)
        assert not all(each in (0, 1) for each in behind), "the control proves nothing"
