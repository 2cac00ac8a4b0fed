"""Copies of a set to other regions: begun, gone on with by whoever asks next, never twice, never waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from providers.ebs import EbsProvider
from providers.ebs.api import Api
from snapshotter import catalog
from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, StorageError, UsageError
from snapshotter.core.model import ImageState, State, new_attachment_id, utc_now
from snapshotter.core.remote import Deadline
from snapshotter.testing.conformance.steps import seal, take
from tests.faults.test_ebs_faults import Cloud
from tests.faults.test_ebs_policies import policies
from tests.twins.ec2 import Twin
from tests.twins.ec2.world import new_id
from tests.unit.ebs_kit import REGION, ebs_harness, environment

WEST, EAST = "eu-west-1", "us-east-1"
#: After this a copy that isn't listed was never made.
LATER_S = 61.0


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with Twin() as twin, environment(**twin.environment()):
        twin.limits.upload_s = 600.0
        yield Cloud(twin)


def copies(cloud: Cloud, region: str) -> list[str]:
    return sorted(each.tags["snapshotter:source"] for each in cloud.twin.world.snapshots.values()
                  if each.region == region and each.gone is None)  # fmt: skip


def whole(cloud: Cloud, set_id: str, region: str = WEST) -> bool:
    """One copy of each member there, sealed as one set."""
    found = list(cloud.provider(region=region).snapshots(set_id))
    return (
        len(found) == len(copies(cloud, region)) == len(cloud.ids)
        and {each.birth.member for each in found} == set(range(len(cloud.ids)))
        and all("sealed" in each.marks and each.marks["grade"] == "crash" for each in found)
        and all(each.state is ImageState.READY for each in found)
    )


def test_copied_in_its_own_time_and_by_whoever_asks(cloud: Cloud) -> None:
    set_id = cloud.take(cloud.provider(copy_to=f"{WEST},{EAST}"))
    assert cloud.provider().advance() == [] and not copies(cloud, WEST), "EC2 copies only what is whole"
    assert [each.copying for each in catalog.read([cloud.provider()]).sets] == [[WEST, EAST]], "retention waits for it"
    cloud.twin.clock.advance(601)
    begun = cloud.provider().advance()  # another process, whose config needn't say so
    assert len(begun) == 4 and len(copies(cloud, WEST)) == len(copies(cloud, EAST)) == 2
    assert cloud.provider().advance() == [], "nothing to do but to wait, and nobody does"
    (coming,) = catalog.read([cloud.provider(region=WEST)]).sets
    assert coming.state is State.PENDING and coming.replica_of == REGION, "whole only once all of it is there"
    cloud.twin.clock.advance(601)
    assert len(cloud.provider().advance()) == 2
    assert whole(cloud, set_id, WEST) and whole(cloud, set_id, EAST)
    listed = [catalog.read([cloud.provider(**where)]).sets for where in ({}, {"region": WEST})]
    assert [each.copying for (each,) in listed] == [[], []]
    assert [(each.replicas, each.replica_of) for (each,) in listed] == [([WEST, EAST], ""), ([], REGION)]
    assert {each.state for each in cloud.provider(region=WEST).snapshots(set_id)} == {ImageState.READY}
    assert all(each.encrypted for each in cloud.twin.world.snapshots.values() if each.region != REGION)
    before = cloud.twin.count()
    assert cloud.provider().advance() == []
    assert sum((cloud.twin.count() - before).values()) == 1, "an idle look is one page"
    # Each is a set of its own: the source's end isn't its.
    cloud.provider().delete(set_id)
    assert whole(cloud, set_id)
    cloud.provider(region=WEST).delete(set_id)
    assert not copies(cloud, WEST) and len(copies(cloud, EAST)) == 2


def test_a_copy_in_the_making_goes_with_its_source(cloud: Cloud) -> None:
    """Else it would be paid for, and never be of use."""
    set_id = cloud.take(cloud.provider(copy_to=f"{WEST},{EAST}"))
    cloud.twin.clock.advance(601)
    cloud.provider().advance()
    (others, *_) = [each for each in cloud.twin.world.snapshots.values() if each.region == EAST]
    cloud.twin.world.retag(others, {**others.tags, "snapshotter:source": "ap-south-1/snap-1"})  # another region's
    cloud.twin.clock.advance(LATER_S)
    cloud.provider().delete(set_id)
    assert not copies(cloud, WEST) and copies(cloud, EAST) == ["ap-south-1/snap-1"]
    assert not list(cloud.provider().snapshots(set_id))


@pytest.mark.parametrize("kind", ["", "error", "lost"])
@pytest.mark.parametrize("action", ["CreateTags", "DeleteTags", "DeleteSnapshot"])
def test_a_copy_that_is_done_outlives_its_source(cloud: Cloud, action: str, kind: str) -> None:
    """No run in the source's region has noted that it is whole; in its own it is good, and may be the latest."""
    set_id = cloud.take(cloud.provider(copy_to=f"{WEST},{EAST}"))
    cloud.twin.clock.advance(601)
    cloud.provider().advance()
    twice = [replace(each, id=new_id("snap")) for each in cloud.twin.world.snapshots.values() if each.region == WEST]
    cloud.twin.world.snapshots |= {each.id: each for each in twice}  # two ran at once
    lost = next(each for each in cloud.twin.world.snapshots.values() if each.region == EAST)
    cloud.twin.clock.advance(601)
    lost.gone = cloud.twin.clock.now()
    west = [cloud.provider(region=WEST)]
    assert [each.good for each in catalog.read(west).sets] == [True]
    if kind:
        cloud.twin.fail(action, kind)
    for _ in range(2):  # a retry finds the source unsealed, or a half of it
        with suppress(SnapshotterError):
            cloud.provider().delete(set_id)
    assert not list(cloud.provider().snapshots(set_id)) and not copies(cloud, EAST), "half a copy is none"
    assert whole(cloud, set_id) and [each.good for each in catalog.read(west).sets] == [True]
    for each in [each for each in cloud.twin.world.snapshots.values() if each.region == WEST and each.gone is None][1:]:
        each.gone = cloud.twin.clock.now()
    assert [each.state for each in catalog.read(west).sets] == [State.DAMAGED], "it is known to have been whole"


def test_a_copy_that_is_being_deleted_is_not_kept_for_its_source(cloud: Cloud) -> None:
    set_id = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    cloud.provider().advance()
    cloud.twin.clock.advance(601)
    cloud.provider(region=WEST).mark(set_id, {"sealed": None})
    cloud.provider().delete(set_id)
    assert not copies(cloud, WEST) and not cloud.living()


def test_a_source_whose_copy_is_not_listed_yet_stays(cloud: Cloud) -> None:
    set_id = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    cloud.twin.limits.lag_s = 20.0
    cloud.twin.fail("CopySnapshot", "lost")
    with pytest.raises(StorageError, match="isn't known"):
        cloud.provider().advance()
    cloud.twin.clock.advance(5)
    with pytest.raises(BusyError, match="is being copied"):
        cloud.provider().delete(set_id)
    assert len(list(cloud.provider().snapshots(set_id))) == len(cloud.ids)
    cloud.twin.clock.advance(LATER_S)
    cloud.provider().delete(set_id)
    assert not copies(cloud, WEST) and not cloud.living()


@pytest.mark.parametrize("lag", [0.0, 20.0])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_lost_reply_makes_no_second_copy(cloud: Cloud, nth: int, lag: float) -> None:
    set_id = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    cloud.twin.limits.lag_s = lag
    cloud.twin.fail("CopySnapshot", "lost", nth=nth)
    with pytest.raises(StorageError, match="isn't known"):
        cloud.provider().advance()
    for _ in range(4):
        cloud.provider().advance()
        cloud.twin.clock.advance(LATER_S / 2)
    cloud.twin.clock.advance(601)
    cloud.provider().advance()
    assert whole(cloud, set_id)


@pytest.mark.parametrize("action", ["CopySnapshot", "CreateTags"])
@pytest.mark.parametrize("kind", ["error", "lost"])
@pytest.mark.parametrize("nth", [1, 3])
def test_whatever_fails_the_next_run_goes_on(cloud: Cloud, action: str, kind: str, nth: int) -> None:
    set_id = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    cloud.twin.fail(action, kind, nth=nth)
    for _ in range(6):
        try:
            cloud.provider().advance()
        except SnapshotterError as error:
            assert error.cure
        cloud.twin.clock.advance(LATER_S)
    cloud.twin.clock.advance(601)
    cloud.provider().advance()
    assert whole(cloud, set_id)


def test_a_copy_that_fails_is_made_again(cloud: Cloud) -> None:
    set_id = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    cloud.twin.fail("CopySnapshot", "upload")
    cloud.provider().advance()
    cloud.twin.clock.advance(601)
    with pytest.raises(StorageError, match=f"{set_id} in {WEST}: EC2 could not copy it.*An internal error") as told:
        cloud.provider().advance()
    assert told.value.cure
    for _ in range(3):
        cloud.twin.clock.advance(601)
        cloud.provider().advance()
    found = list(cloud.provider(region=WEST).snapshots(set_id))
    assert {each.birth.member for each in found if each.state is ImageState.READY} == {0, 1}


def test_a_failed_copy_stops_no_other_set(cloud: Cloud) -> None:
    sets = []
    for _ in range(2):
        sets.append(cloud.take(cloud.provider(copy_to=WEST)))
        cloud.twin.clock.advance(601)
    cloud.twin.fail("CopySnapshot", "upload")
    cloud.provider().advance()
    cloud.twin.clock.advance(601)
    with pytest.raises(StorageError, match="An internal error"):
        cloud.provider().advance()
    assert len([each for each in catalog.read([cloud.provider(region=WEST)]).sets if each.good]) == 1


def test_a_region_that_does_not_answer_costs_one_set_its_time(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick has to take sets, too: each that waits for the region would wait two minutes."""
    for _ in range(3):
        cloud.take(cloud.provider(copy_to=f"{WEST},{EAST}"))
        cloud.twin.clock.advance(601)
    provider = cloud.provider()
    reach = EbsProvider._in_region

    def no_connection(within: Deadline) -> Any:
        raise EndpointConnectionError(endpoint_url=f"https://ec2.{EAST}.amazonaws.com")

    def unreachable(self: EbsProvider, region: str) -> Api:
        found = reach(self, region)
        if region == EAST:
            monkeypatch.setattr(found, "client", no_connection)
        return found

    monkeypatch.setattr(EbsProvider, "_in_region", unreachable)
    began = cloud.clock.now()
    with pytest.raises(StorageError, match=f"in {EAST}: was not done within 120 s"):
        provider.advance()
    assert cloud.clock.now() - began < 2 * 120
    assert len(copies(cloud, WEST)) == 3 * len(cloud.ids), "the other region has its own"


def test_the_region_of_the_sets_is_none_to_copy_to(cloud: Cloud) -> None:
    set_id = cloud.take(cloud.provider(copy_to=f"{REGION},{WEST}"))
    for each in cloud.twin.world.snapshots.values():
        assert each.tags["snapshotter:copy-to"] == WEST
        cloud.twin.world.retag(each, {**each.tags, "snapshotter:copy-to": f"{REGION} {WEST}"})  # as once tagged
    assert {each.copying for each in cloud.provider().snapshots(set_id)} == {(WEST,)}
    for _ in range(3):
        cloud.twin.clock.advance(601)
        cloud.provider().advance()
    assert len(copies(cloud, WEST)) == sum(cloud.living().values()) - len(cloud.ids) == len(cloud.ids)


def test_what_is_no_region_is_refused_before(cloud: Cloud) -> None:
    with pytest.raises(UsageError, match="no name of an AWS region") as refused:
        cloud.take(cloud.provider(copy_to="Ireland"))
    assert refused.value.object == "Ireland" and refused.value.cure


def test_an_archived_set_is_not_offered_for_copying(cloud: Cloud) -> None:
    """EC2 would refuse it in each run."""
    first = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(60)
    second = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    archived = [each for each in cloud.twin.world.snapshots.values() if each.tags["snapshotter:set"] == first]
    archived[0].tier = "archive"
    cloud.provider().advance()
    there = {each.birth.set_id for each in cloud.provider(region=WEST).snapshots()}
    assert there == {second} and not cloud.provider().advance()
    archived[0].tier = "standard"
    cloud.provider().advance()
    assert {each.birth.set_id for each in cloud.provider(region=WEST).snapshots()} == {first, second}


def test_only_so_many_at_once(cloud: Cloud) -> None:
    sets = []
    for _ in range(3):
        sets.append(cloud.take(cloud.provider(copy_to=WEST)))
        cloud.twin.clock.advance(601)
    cloud.twin.limits.copies = 3
    cloud.provider().advance()
    assert len(copies(cloud, WEST)) == 3, "the limit is no failure"
    for _ in range(5):
        cloud.twin.clock.advance(601)
        cloud.provider().advance()
    assert len(copies(cloud, WEST)) == 6
    assert {each.birth.set_id for each in cloud.provider(region=WEST).snapshots()} == set(sets)


def test_two_at_once_leave_one(cloud: Cloud) -> None:
    """The tags of another host's run are listed late, so both begin: the next look keeps one of each."""
    set_id = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    cloud.provider().advance()
    world = cloud.twin.world
    twice = [replace(each, id=new_id("snap")) for each in world.snapshots.values() if each.region == WEST]
    world.snapshots |= {each.id: each for each in twice}
    for _ in range(2):
        cloud.twin.clock.advance(601)
        cloud.provider().advance()
    assert whole(cloud, set_id)


def lose(cloud: Cloud) -> None:
    """All that the sets' region has."""
    for each in cloud.twin.world.snapshots.values():
        if each.region == REGION:
            each.gone = cloud.twin.clock.now()


def test_a_copy_is_a_set_where_its_source_is_lost_before_it_is_whole(cloud: Cloud) -> None:
    """The very case that it is made for."""
    set_id = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    cloud.provider().advance()
    lose(cloud)
    west = [cloud.provider(region=WEST, zone=WEST + "a")]
    assert [each.state for each in catalog.read(west).sets] == [State.PENDING]
    cloud.twin.clock.advance(601)
    assert [(each.good, each.replica_of) for each in catalog.read(west).sets] == [(True, REGION)]
    attachment_id = new_attachment_id(utc_now())
    assert all(west[0].attach_away(each, attachment_id).volume for each in west[0].snapshots(set_id))
    west[0].detach(attachment_id)
    west[0].delete(set_id)
    assert not copies(cloud, WEST)


def test_half_a_copy_is_pending_and_can_be_deleted(cloud: Cloud) -> None:
    set_id = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    cloud.twin.limits.copies = 1
    cloud.provider().advance()
    lose(cloud)
    cloud.twin.clock.advance(601)
    (found,) = catalog.read([cloud.provider(region=WEST)]).sets
    (one,) = found.snapshots
    (other,) = set(cloud.ids) - {one.volume}
    assert found.state is State.PENDING and found.why == f"the copy of {other} isn't there yet"
    cloud.provider(region=WEST).delete(set_id)
    assert not copies(cloud, WEST)


@pytest.mark.parametrize("unmarked", [1, 2])
def test_a_copy_begun_by_an_earlier_version_is_no_leftover(cloud: Cloud, unmarked: int) -> None:
    """It gave a copy its marks only once all of it was there: `reap` would remove what isn't sealed."""
    set_id = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    cloud.provider().advance()
    west = [cloud.provider(region=WEST)]
    for each in [each for each in cloud.twin.world.snapshots.values() if each.region == WEST][:unmarked]:
        less = {key: value for key, value in each.tags.items() if not key.startswith("snapshotter:mark-")}
        cloud.twin.world.retag(each, less)
    assert [each.state for each in catalog.read(west).sets] == [State.PENDING]
    cloud.twin.clock.advance(601)
    (found,) = catalog.read(west).sets
    assert found.state is State.PENDING and found.why.startswith("its marks aren't there yet")
    cloud.provider().advance()
    assert whole(cloud, set_id) and [each.good for each in catalog.read(west).sets] == [True]
    west[0].mark(set_id, {"sealed": None})
    assert [each.state for each in catalog.read(west).sets] == [State.INCOMPLETE], "its deletion was begun"


def test_a_whole_copy_that_lost_a_member_is_damaged(cloud: Cloud) -> None:
    set_id = cloud.take(cloud.provider(copy_to=WEST))
    for _ in range(3):
        cloud.twin.clock.advance(601)
        cloud.provider().advance()
    assert whole(cloud, set_id)
    next(each for each in cloud.twin.world.snapshots.values() if each.region == WEST).gone = cloud.twin.clock.now()
    assert [each.state for each in catalog.read([cloud.provider(region=WEST)]).sets] == [State.DAMAGED]


def test_bit_for_bit() -> None:
    with ebs_harness() as harness:
        volume = harness.volume()
        provider = harness.provider(copy_to=WEST)
        birth = take(provider, harness, [volume])
        seal(provider, birth)
        for _ in range(2):
            harness.provider().advance()
        (copied,) = [each for each in harness.twin.world.snapshots.values() if each.region == WEST]
        (source,) = [each for each in harness.twin.world.snapshots.values() if each.region == REGION]
        images = harness.disks.images
        assert (images / copied.id).read_bytes() == (images / source.id).read_bytes()


def test_with_the_policies_of_the_manual(cloud: Cloud) -> None:
    """And with each of the copier's statements gone it is refused, in one line with a cure."""
    given = policies()
    cloud.twin.policies = [given["taker"], given["copier"]]
    set_id = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    for missing in range(len(given["copier"]["Statement"])):
        less = {**given["copier"], "Statement": [x for k, x in enumerate(given["copier"]["Statement"]) if k != missing]}
        cloud.twin.policies = [given["taker"], less]
        with pytest.raises(PreconditionError, match="may not ec2:") as refused:
            cloud.provider().advance()
        assert refused.value.cure and not copies(cloud, WEST)
        cloud.twin.clock.advance(LATER_S)
    cloud.twin.policies = [given["taker"], given["copier"]]
    for _ in range(2):
        cloud.provider().advance()
        cloud.twin.clock.advance(601)
    cloud.provider().advance()
    assert whole(cloud, set_id)
    gone = cloud.take(cloud.provider(copy_to=WEST))
    cloud.twin.clock.advance(601)
    cloud.provider().advance()
    cloud.provider().delete(gone)
    assert whole(cloud, set_id), "and nothing of the other is left"
