"""The roles of docs/gcp.md, proven: each step of a set's life with exactly these, by the twin that refuses all that is
not granted; what they must not allow is refused; and there is no permission in them that nothing needs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest

from snapshotter.core.errors import PreconditionError
from snapshotter.core.model import Access, Snapshot, new_attachment_id, utc_now
from snapshotter.testing.conformance.steps import ready, seal, take
from snapshotter.testing.harness import describe, fill
from tests.faults.test_gce_faults import Cloud
from tests.support import CHECKOUT
from tests.twins.gce import Twin
from tests.unit.gce_kit import GceHarness, environment, gce_harness


def roles() -> dict[str, set[str]]:
    text = (CHECKOUT / "docs/gcp.md").read_text()
    found = re.findall(r"<!-- role: (\w+) -->\n```yaml\n(.*?)```", text, re.S)
    return {name: set(re.findall(r"^- (compute\.[\w.]+)$", body, re.M)) for name, body in found}


@pytest.fixture
def pair() -> Iterator[Cloud]:
    with Twin() as twin, environment(twin.environment(keys=False)):
        yield Cloud(twin, disks=2, grouped=True)


@pytest.fixture
def single() -> Iterator[Cloud]:
    with Twin() as twin, environment(twin.environment(keys=False)):
        yield Cloud(twin)


def life(cloud: Cloud) -> None:
    """What a taker is for: take, mark, list, delete, reap; from outside the instance, as a function does."""
    provider = cloud.provider()
    assert provider.find({"instance": f"{cloud.zone}/{cloud.instance.name}"}) == cloud.volumes()
    set_id = cloud.take(provider)
    provider.mark(set_id, {"pinned": "1"})
    provider.mark(set_id, {"pinned": None})
    assert list(provider.snapshots(set_id))
    provider.finish(set_id)
    provider.reap()
    provider.delete(set_id)
    assert not cloud.living() and not cloud.instants()


def needs_all(cloud: Cloud, granted: set[str], less: set[str], act: Callable[[], None]) -> None:
    """Less any one of `less`, something of `act` fails, and says what is missing."""
    for permission in sorted(less):
        cloud.twin.permissions = granted - {permission}
        with pytest.raises(PreconditionError, match="may not compute") as refused:
            act()
        assert permission in refused.value.line() and "docs/gcp.md" in refused.value.cure
        cloud.twin.permissions = None
        cloud.twin.world.snapshots.clear()
        cloud.twin.world.instants.clear()
        cloud.twin.world.groups.clear()


def test_a_taker_needs_just_its_role(single: Cloud) -> None:
    taker = roles()["taker"]
    single.twin.permissions = taker
    life(single)
    needs_all(single, taker, taker, lambda: life(single))


def test_a_taker_of_groups_needs_the_other_too(pair: Cloud) -> None:
    taker, grouper = roles()["taker"], roles()["grouper"]
    pair.twin.permissions = taker | grouper
    life(pair)
    needs_all(pair, taker | grouper, grouper, lambda: life(pair))


def restore(harness: GceHarness, found: Snapshot) -> None:
    provider, attachment_id, destination = harness.provider(), new_attachment_id(utc_now()), harness.destination()
    harness.enter(provider.attach(found, attachment_id, Access.WRITABLE, destination), destination)
    provider.settle(attachment_id, datetime.now(UTC))
    assert list(provider.attachments())
    harness.leave(destination)
    provider.detach(attachment_id)


def clean(harness: GceHarness) -> None:
    for attachment in list(harness.provider().attachments()):
        harness.leave(attachment.path)
        harness.provider().detach(attachment.id)
    for name in os.listdir(harness.scratch):
        if name.startswith("attached-"):
            os.rmdir(harness.scratch / name)


@pytest.mark.root
def test_a_restorer_needs_just_its_role(request: pytest.FixtureRequest) -> None:
    granted = roles()
    with gce_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        harness.twin.permissions = granted["taker"]
        birth = take(harness.provider(), harness, [volume])
        seal(harness.provider(), birth)
        (found,) = ready(harness.provider(), harness, birth.set_id)
        before, content = harness.objects(), describe(volume.path)
        for forbidden in (
            lambda: harness.provider().attach(found, new_attachment_id(utc_now()), Access.WRITABLE, "/nowhere"),
            lambda: harness.provider().swap("w20261122t100630z-000000", found, volume),
        ):
            with pytest.raises(PreconditionError, match="may not compute"):
                forbidden()
        harness.twin.permissions = granted["restorer"]
        restore(harness, found)
        for refused in (
            lambda: harness.provider().delete(birth.set_id),
            lambda: harness.provider().mark(birth.set_id, {"sealed": None}),
            lambda: take(harness.provider(), harness, [volume]),
        ):
            with pytest.raises(PreconditionError, match="may not compute"):
                refused()
        assert harness.objects() == before
        given = sorted(granted["restorer"])
        for permission in given if request.config.getoption("--full") else given[::4]:
            if permission == "compute.snapshots.list":
                continue  # of the command, which looks the set up
            harness.twin.permissions = granted["restorer"] - {permission}
            with pytest.raises(PreconditionError, match="may not compute"):
                restore(harness, found)
            harness.twin.permissions = None
            clean(harness)
            assert harness.objects() == before, permission
        harness.twin.permissions = granted["restorer"]
        harness.provider().swap("w20261122t100630z-000002", found, volume)
        harness.provider().swap_back("w20261122t100630z-000002")
        harness.provider().swap("w20261122t100630z-000003", found, volume)
        harness.provider().swap_commit("w20261122t100630z-000003")
        assert describe(volume.path) == content
