"""The gce provider under one to three faults at random calls: whatever Compute Engine does to a take, a restore or a
swap, it ends in all of it or, undone, in nothing; and never in a bug's traceback. Seeds make every run repeatable.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from snapshotter.core.errors import SnapshotterError
from snapshotter.core.model import Access, Hold, Snapshot, Volume, new_attachment_id, utc_now
from snapshotter.testing.conformance.steps import ready, seal, take
from snapshotter.testing.harness import describe, fill, make_birth
from tests.faults.test_gce_faults import Cloud
from tests.twins.gce import Limits, Twin
from tests.unit.gce_kit import GceHarness, environment, gce_harness

KINDS = (
    ("lost", "", 400),
    ("broken", "", 400),
    ("refuse", "backendError", 503),
    ("refuse", "rateLimitExceeded", 403),
    ("refuse", "forbidden", 403),
    ("refuse", "resourceNotReady", 400),
    ("operation", "RESOURCE_NOT_READY", 400),
    ("operation", "QUOTA_EXCEEDED", 400),
    ("operation", "RATE_LIMIT_EXCEEDED", 400),
    ("operation", "INTERNAL_ERROR", 400),
    ("stale", "", 400),
)
OF_TAKE = (
    "snapshots.insert",
    "snapshots.setLabels",
    "snapshots.get",
    "snapshots.delete",
    "snapshots.list",
    "globalOperations.get",
    "zoneOperations.get",
    "instantSnapshotGroups.insert",
    "instantSnapshotGroups.get",
    "instantSnapshots.list",
    "instantSnapshots.aggregatedList",
    "resourcePolicies.get",
    "disks.get",
)
OF_RESTORE = (
    "disks.insert",
    "disks.get",
    "disks.setLabels",
    "disks.delete",
    "disks.aggregatedList",
    "instances.get",
    "instances.attachDisk",
    "instances.detachDisk",
    "zoneOperations.get",
    "snapshots.get",
)


def arm(twin: Twin, chance: random.Random, actions: tuple[str, ...]) -> None:
    for _ in range(chance.choice((1, 1, 2, 3))):
        action, (kind, code, status) = chance.choice(actions), chance.choice(KINDS)
        if kind != "stale" or action.endswith("setLabels"):
            twin.fail(action, kind, nth=chance.choice((1, 1, 2, 3)), code=code, status=status)


def seeds(request: pytest.FixtureRequest, few: int, many: int) -> Iterator[int]:
    yield from range(many if request.config.getoption("--full") else few)


def test_takes_under_random_faults(request: pytest.FixtureRequest) -> None:
    outcomes: Counter[bool] = Counter()
    for seed in seeds(request, 40, 600):
        chance = random.Random(seed)
        limits = Limits(
            pending_s=chance.choice((0, 0.2)),
            capture_s=chance.choice((0, 0.5)),
            upload_s=chance.choice((0, 20)),
            done_when_uploaded=chance.random() < 0.7,
        )
        with Twin(None, limits) as twin, environment(twin.environment()):
            cloud = Cloud(twin, disks=chance.choice((1, 2, 3)), grouped=chance.random() < 0.5)
            arm(twin, chance, OF_TAKE)
            outcomes[_taken_or_nothing(cloud, seed)] += 1
    assert outcomes[True] and outcomes[False], "both ends must be seen"


def _taken_or_nothing(cloud: Cloud, seed: int) -> bool:
    provider, volumes = cloud.provider(), cloud.volumes()
    birth = make_birth(volumes)
    made = cloud.twin.world.snapshots
    try:
        provider.check(volumes, birth)
        provider.prepare(volumes, birth, 5.0)
        provider.create(volumes, birth, Hold())
        provider.mark(birth.set_id, {"sealed": "20261122t100630z", "grade": "crash"})
    except SnapshotterError as error:
        assert error.cure, f"seed {seed}: {error}"
        for _ in range(3):
            with contextlib.suppress(SnapshotterError):
                provider.delete(birth.set_id)
                break
        assert not made and not cloud.instants(), f"seed {seed}: left behind after {error}"
        return False
    assert cloud.living() == cloud.each_once(), f"seed {seed}"
    assert all("snapshotter-mark-sealed" in each.labels for each in made.values()), f"seed {seed}"
    return True


@pytest.mark.root
def test_restores_and_swaps_under_random_faults(request: pytest.FixtureRequest) -> None:
    with gce_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        birth = take(harness.provider(), harness, [volume])
        seal(harness.provider(), birth)
        (snapshot,) = ready(harness.provider(), harness, birth.set_id)
        content, before = describe(volume.path), harness.objects()
        origin = harness.twin.world.disks["zones/" + volume.id.replace("/", "/disks/")]
        for seed in seeds(request, 12, 200):
            _tried(harness, snapshot, volume, seed)
            for path in harness.scratch.glob("attached-*"):
                path.rmdir()
            assert harness.objects() == before, f"seed {seed}: left behind"
            assert describe(volume.path) == content, f"seed {seed}"
            assert origin.users == [harness.instance.path] and set(origin.labels) <= {"theirs"}, f"seed {seed}"


def _tried(harness: GceHarness, snapshot: Snapshot, volume: Volume, seed: int) -> None:
    """Something with faults in it, and its inverse without."""
    chance, twin = random.Random(seed), harness.twin
    what = chance.choice(("attach", "swap", "swap back"))
    swap_id, attachment_id = f"w20261122t100630z-{seed:06x}", new_attachment_id(utc_now())
    if what == "swap back":
        harness.provider().swap(swap_id, snapshot, volume)
    arm(twin, chance, OF_RESTORE)
    with contextlib.suppress(SnapshotterError):
        if what == "attach":
            harness.provider().attach(snapshot, attachment_id, Access.WRITABLE, harness.destination())
        elif what == "swap":
            harness.provider().swap(swap_id, snapshot, volume)
        else:
            harness.provider().swap_back(swap_id)
    twin.faults.clear()
    if what == "attach":
        harness.provider().detach(attachment_id)
    else:
        harness.provider().swap_back(swap_id)
