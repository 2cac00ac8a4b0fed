"""The policies of docs/aws.md, proven: each step of a set's life with exactly these, by the twin that refuses all that
isn't granted; what they must not allow is refused; and there is no action in them that nothing needs."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from typing import Any

import parliament
import pytest

from snapshotter.core.errors import PreconditionError
from snapshotter.core.model import Access, new_attachment_id, utc_now
from snapshotter.testing.conformance.steps import ready, seal, take
from snapshotter.testing.harness import describe, fill, make_birth
from tests.support import CHECKOUT
from tests.unit.ebs_kit import EbsHarness, ebs_harness

pytestmark = pytest.mark.root


def policies() -> dict[str, dict[str, Any]]:
    text = (CHECKOUT / "docs/aws.md").read_text()
    found = re.findall(r"<!-- policy: (\w+) -->\n```json\n(.*?)```", text, re.S)
    return {name: json.loads(body) for name, body in found}


def test_parliament_finds_nothing() -> None:
    """It looks at each statement by itself: what one lacks of an action's resources, another must name."""
    for name, policy in policies().items():
        for finding in parliament.analyze_policy_string(json.dumps(policy)).findings:
            assert finding.issue == "RESOURCE_MISMATCH", (name, finding.issue, finding.detail)
            for lacking in finding.detail:
                wanted = lacking["required_format"].replace("arn:*:", "arn:aws:")
                named = [each for each in policy["Statement"] if lacking["action"] in each["Action"]]
                assert any(wanted in each["Resource"] for each in named), (name, lacking)


def without(policy: dict[str, Any], sid: str, action: str) -> dict[str, Any]:
    """The policy less one action of one statement."""
    statements = []
    for statement in policy["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        if statement["Sid"] == sid:
            actions = [each for each in actions if each != action]
        if actions:
            statements.append({**statement, "Action": actions})
    return {**policy, "Statement": statements}


def grants(policy: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (statement["Sid"], action)
        for statement in policy["Statement"]
        for action in (statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]])
    ]


def taker(harness: EbsHarness, volume: Any) -> None:
    """Take, mark, list and delete; of an attached volume, and of one that isn't."""
    provider = harness.provider()
    birth = take(provider, harness, [volume])
    seal(provider, birth)
    provider.mark(birth.set_id, {"pinned": "1"})
    provider.mark(birth.set_id, {"pinned": None})
    assert ready(provider, harness, birth.set_id)
    provider.delete(birth.set_id)


def restorer(harness: EbsHarness, found: Any) -> None:
    provider, attachment_id, destination = harness.provider(), new_attachment_id(utc_now()), harness.destination()
    harness.enter(provider.attach(found, attachment_id, Access.WRITABLE, destination), destination)
    provider.settle(attachment_id, datetime.now(UTC))
    assert list(provider.attachments())
    harness.leave(destination)
    provider.detach(attachment_id)


def clean(harness: EbsHarness) -> None:
    for attachment in list(harness.provider().attachments()):
        harness.leave(attachment.path)
        harness.provider().detach(attachment.id)
    for name in os.listdir(harness.scratch):
        if name.startswith("attached-"):
            os.rmdir(harness.scratch / name)


@pytest.fixture
def lone() -> Any:
    from tests.faults.test_ebs_faults import Cloud
    from tests.twins.ec2 import Twin
    from tests.unit.ebs_kit import environment

    with Twin() as twin, environment(**twin.environment()):
        cloud = Cloud(twin, volumes=1)
        twin.world.volumes[cloud.ids[0]].attached = None
        yield cloud


def test_a_taker_can_take_and_do_no_more(lone: Any) -> None:
    taker_policy = policies()["taker"]
    with ebs_harness() as harness:
        volume = harness.volume()
        before = harness.objects()
        theirs = harness.foreign(volume)
        harness.twin.policies = [taker_policy]
        taker(harness, volume)
        birth = take(harness.provider(), harness, [volume])
        seal(harness.provider(), birth)
        (found,) = ready(harness.provider(), harness, birth.set_id)
        for forbidden in (
            lambda: harness.provider().attach(found, new_attachment_id(utc_now()), Access.WRITABLE, "/nowhere"),
            lambda: harness.provider().swap("w20261122t100630z-000000", found, volume),
            lambda: delete_foreign(harness),
        ):
            with pytest.raises(PreconditionError, match="may not ec2:") as refused:
                forbidden()
            assert refused.value.cure
        assert theirs()
        harness.provider().delete(birth.set_id)
        assert before < harness.objects()
    lone.twin.policies = [taker_policy]
    lone.provider().delete(lone.take())
    assert not lone.living()


def delete_foreign(harness: EbsHarness) -> None:
    """As a bug of ours would."""
    api = harness.provider()._api()
    name = next(name for name, each in harness.twin.world.snapshots.items() if each.tags == {"Name": "data-daily"})
    api.call("delete_snapshot", api.deadline(name), SnapshotId=name)


def test_a_restorer_can_restore_and_a_swapper_swap(request: pytest.FixtureRequest) -> None:
    found_policies = policies()
    with ebs_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        birth = take(harness.provider(), harness, [volume])
        seal(harness.provider(), birth)
        (found,) = ready(harness.provider(), harness, birth.set_id)
        before, content = harness.objects(), describe(volume.path)
        harness.twin.policies = [found_policies["restorer"]]
        restorer(harness, found)
        for forbidden in (
            lambda: harness.provider().delete(birth.set_id),
            lambda: harness.provider().mark(birth.set_id, {"sealed": None}),
            lambda: take(harness.provider(), harness, [volume], make_birth([volume])),
            lambda: harness.provider().swap("w20261122t100630z-000001", found, volume),
        ):
            with pytest.raises(PreconditionError, match="may not ec2:"):
                forbidden()
        harness.provider().swap_back("w20261122t100630z-000001")
        assert harness.objects() == before
        given = grants(found_policies["restorer"])
        for sid, action in given if request.config.getoption("--full") else given[-2:]:
            if action != "ec2:DeleteTags":  # of a swap that is taken back
                harness.twin.policies = [without(found_policies["restorer"], sid, action)]
                with pytest.raises(PreconditionError, match="may not ec2:"):
                    restorer(harness, found)
                harness.twin.policies = None
                clean(harness)
                assert harness.objects() == before
        harness.twin.policies = [found_policies["restorer"], found_policies["swapper"]]
        harness.provider().swap("w20261122t100630z-000002", found, volume)
        harness.provider().swap_back("w20261122t100630z-000002")
        harness.provider().swap("w20261122t100630z-000003", found, volume)
        harness.provider().swap_commit("w20261122t100630z-000003")
        assert describe(volume.path) == content


def test_nothing_is_granted_that_is_not_needed(lone: Any, request: pytest.FixtureRequest) -> None:
    """Less any one action, something of what the role is for fails."""
    found_policies = policies()
    given = grants(found_policies["taker"])
    for sid, action in given if request.config.getoption("--full") else given[::3]:
        lone.twin.policies = None
        whole = Whole(lone)
        lone.twin.policies = [without(found_policies["taker"], sid, action)]
        with pytest.raises(PreconditionError, match="may not ec2:"):
            whole.life()
        lone.twin.policies = None
        whole.clean()


class Whole:
    """What a taker is for: a set of an instance, and one of a volume that is attached nowhere."""

    def __init__(self, lone: Any) -> None:
        self.lone = lone
        self.other = lone.twin.world.run_instance()
        self.attached = lone.twin.world.add_volume(self.other, "/dev/sdf", with_bytes=False).id
        self.sets: list[str] = []

    def life(self) -> None:
        for name in (self.attached, self.lone.twin.world.volumes[self.lone.ids[0]].id):
            provider = self.lone.provider()
            from snapshotter.core.model import Hold, Volume

            volumes = [Volume("ebs", name)]
            birth = make_birth(volumes)
            self.sets.append(birth.set_id)
            provider.check(volumes, birth)
            provider.prepare(volumes, birth, 5.0)
            provider.create(volumes, birth, Hold())
            provider.mark(birth.set_id, {"sealed": "20261122t100630z", "pinned": "1"})
            provider.mark(birth.set_id, {"pinned": None})
            provider.delete(birth.set_id)

    def clean(self) -> None:
        for set_id in self.sets:
            self.lone.provider().delete(set_id)
