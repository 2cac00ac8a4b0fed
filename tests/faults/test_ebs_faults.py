"""The ebs provider when EC2 fails it: replies lost after the effect, late listings, errors, hangs, a full account.

What must be true afterwards is asked of the twin itself, never of the provider.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace

from providers.ebs import EbsProvider
from snapshotter import catalog
from snapshotter.core.errors import (
    BusyError,
    Exit,
    NotFoundError,
    PreconditionError,
    QuiesceError,
    SnapshotterError,
    StorageError,
)
from snapshotter.core.model import Access, Hold, ImageState, State, Volume, new_attachment_id, utc_now
from snapshotter.host.cloud import parts
from snapshotter.nodes.config import Keep
from snapshotter.nodes.retention import decide
from snapshotter.provider import Settings
from snapshotter.testing.conformance.steps import ready, seal, take
from snapshotter.testing.conformance.undoing import Life
from snapshotter.testing.harness import describe, fill, make_birth
from tests.twins.ec2 import Twin
from tests.twins.ec2.world import Snapshot as Theirs
from tests.twins.ec2.world import new_id
from tests.unit.cloud_kit import QuickClock
from tests.unit.ebs_kit import REGION, EbsHarness, ebs_harness, environment

MUTATING = (
    "CreateSnapshots",
    "CreateTags",
    "DeleteTags",
    "DeleteSnapshot",
    "CreateVolume",
    "AttachVolume",
    "DetachVolume",
    "DeleteVolume",
)


class Cloud:
    """A twin without bytes, seen from outside: an instance of so many volumes."""

    def __init__(self, twin: Twin, volumes: int = 2) -> None:
        self.twin = twin
        self.clock = QuickClock(twin.clock)
        self.instance = twin.world.run_instance()
        self.ids = [
            twin.world.add_volume(self.instance, f"/dev/sd{'fghij'[k]}", with_bytes=False).id for k in range(volumes)
        ]

    def provider(self, **options: object) -> EbsProvider:
        provider = EbsProvider(Settings("/nonexistent", options={"region": REGION, **options}))
        provider.clock = self.clock
        return provider

    def volumes(self) -> list[Volume]:
        return [Volume("ebs", name) for name in self.ids]

    def living(self) -> Counter[str]:
        """Snapshots that there are, by volume."""
        return Counter(each.volume for each in self.twin.world.snapshots.values() if each.gone is None)

    def take(self, provider: EbsProvider | None = None, hold: Hold | None = None) -> str:
        provider = provider or self.provider()
        birth = make_birth(self.volumes())
        provider.check(self.volumes(), birth)
        provider.prepare(self.volumes(), birth, 5.0)
        provider.create(self.volumes(), birth, hold or Hold())
        provider.mark(birth.set_id, {"sealed": "20261122t100630z", "grade": "crash"})
        return birth.set_id


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with Twin() as twin, environment(**twin.environment()):
        yield Cloud(twin)


def each_once(cloud: Cloud) -> Counter[str]:
    return Counter(dict.fromkeys(cloud.ids, 1))


# -- replies lost, listings late ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lost", "broken"])
@pytest.mark.parametrize("lag", [0.0, 3.0])
def test_a_lost_reply_makes_no_second_snapshot(cloud: Cloud, kind: str, lag: float) -> None:
    cloud.twin.limits.lag_s = lag
    cloud.twin.clock.advance(60)
    cloud.twin.fail("CreateSnapshots", kind)
    set_id = cloud.take()
    assert cloud.living() == each_once(cloud), "the one that was made was adopted"
    assert cloud.twin.count()["CreateSnapshots"] == 1
    assert {found.birth.member for found in cloud.provider().snapshots(set_id)} == {0, 1}
    cloud.provider().delete(set_id)
    assert not cloud.living()


def test_a_lost_reply_that_can_not_be_looked_up_in_time_is_undone(cloud: Cloud) -> None:
    """The writers can't be held until EC2 lists it: the take fails, and its undo waits for what there may be."""
    cloud.twin.limits.lag_s = 20.0
    cloud.twin.clock.advance(60)
    cloud.twin.fail("CreateSnapshots", "lost")
    provider, birth = cloud.provider(), make_birth(cloud.volumes())
    provider.prepare(cloud.volumes(), birth, 5.0)
    with pytest.raises(StorageError) as failed:
        provider.create(cloud.volumes(), birth, Hold(deadline=time.monotonic() + 4))
    assert failed.value.cure
    assert cloud.living() == each_once(cloud)
    provider.delete(birth.set_id)
    assert not cloud.living()


def test_what_is_listed_late_is_known_to_who_made_it(cloud: Cloud) -> None:
    cloud.twin.limits.lag_s = 30.0
    cloud.twin.clock.advance(60)
    provider = cloud.provider()
    set_id = cloud.take(provider)
    found = list(provider.snapshots(set_id))
    assert len(found) == 2 and all("sealed" in snapshot.marks for snapshot in found)
    provider.delete(set_id)
    assert not cloud.living()
    assert not list(provider.snapshots())


@pytest.mark.root
@pytest.mark.parametrize("action", MUTATING)
def test_a_lost_reply_of_any_call_leaves_one_object_and_no_orphan(action: str, request: pytest.FixtureRequest) -> None:
    """A set's whole life with each call of the action losing its reply once. It succeeds, or its inverses clean up."""
    with ebs_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        content, before = describe(volume.path), harness.objects()
        whole = bool(request.config.getoption("--full"))
        for nth in range(1, 7 if whole else 2):
            fault = harness.twin.fail(action, "lost", nth=nth)
            life = Life.new(harness)
            with contextlib.suppress(StorageError):
                _life(harness, volume, life)
            made = Counter(each.volume for each in harness.twin.world.snapshots.values() if each.gone is None)
            assert all(count == 1 for count in made.values()), f"two of {made} after call {nth} of {action}"
            provider = harness.provider()
            provider.swap_back(life.swap_id)
            provider.detach(life.attachment_id)
            provider.delete(life.set_id)
            assert harness.objects() == before, f"left after call {nth} of {action}"
            assert describe(volume.path) == content
            if fault in harness.twin.faults:
                harness.twin.faults.remove(fault)
                break  # there are no more calls of it


def _life(harness: EbsHarness, volume: Volume, life: Life) -> None:
    provider = harness.provider()
    birth = take(provider, harness, [volume], make_birth([volume], set_id=life.set_id))
    seal(provider, birth)
    provider.mark(birth.set_id, {"pinned": "1"})
    provider.mark(birth.set_id, {"pinned": None})
    (found,) = ready(provider, harness, birth.set_id)
    provider.attach(found, life.attachment_id, Access.WRITABLE, life.destination)
    provider.settle(life.attachment_id, datetime.now(UTC))
    provider.detach(life.attachment_id)
    provider.swap(life.swap_id, found, volume)
    provider.swap_back(life.swap_id)
    provider.delete(birth.set_id)


# -- a set that isn't what was asked for ---------------------------------------------------------------------------


def test_a_reply_without_one_of_the_volumes_is_no_set(cloud: Cloud) -> None:
    cloud.twin.fail("CreateSnapshots", "partial")
    with pytest.raises(StorageError, match=cloud.ids[1]):
        cloud.take()
    assert not cloud.living(), "half a set was left"


def test_a_volume_attached_meanwhile_is_not_kept(cloud: Cloud) -> None:
    provider, birth = cloud.provider(), make_birth(cloud.volumes())
    provider.check(cloud.volumes(), birth)
    provider.prepare(cloud.volumes(), birth, 5.0)
    late = cloud.twin.world.add_volume(cloud.instance, "/dev/sdp", with_bytes=False)
    assert len(provider.create(cloud.volumes(), birth, Hold())) == 2
    assert late.id not in cloud.living() and cloud.living() == each_once(cloud)


def test_the_root_and_other_volumes_are_left_out(cloud: Cloud) -> None:
    other = cloud.twin.world.add_volume(cloud.instance, "/dev/sdp", with_bytes=False)
    cloud.take()
    assert cloud.living() == each_once(cloud)
    assert [volume.id for volume in cloud.provider().find({"instance": cloud.instance.id})] == sorted(
        [*cloud.ids, other.id]
    )


def test_an_upload_that_fails_is_invalid_and_says_why(cloud: Cloud) -> None:
    cloud.twin.limits.upload_s = 100
    cloud.twin.fail("CreateSnapshots", "upload")
    set_id = cloud.take()
    assert {found.state for found in cloud.provider().snapshots(set_id)} == {ImageState.PENDING}
    cloud.twin.clock.advance(101)
    for found in cloud.provider().snapshots(set_id):
        assert found.state is ImageState.INVALID and "internal error" in found.why


def test_a_snapshot_that_vanished_is_missed(cloud: Cloud) -> None:
    set_id = cloud.take()
    assert len(list(cloud.provider().snapshots(set_id))) == 2
    gone, kept = (each for each in cloud.twin.world.snapshots.values())
    gone.gone = cloud.twin.clock.now()
    assert [found.id for found in cloud.provider().snapshots(set_id)] == [kept.id]
    with pytest.raises(StorageError, match="can't be sealed"):
        cloud.provider().mark(set_id, {"sealed": "20261122t100630z"})
    cloud.provider().delete(set_id)
    assert not cloud.living()


# -- limits ------------------------------------------------------------------------------------------------------


def test_two_sets_of_a_volume_wait_for_each_other_before_anybody_is_held(cloud: Cloud) -> None:
    cloud.twin.limits.spacing_s = 15.0
    cloud.take()
    before = cloud.clock.skipped
    provider, birth = cloud.provider(), make_birth(cloud.volumes())
    provider.prepare(cloud.volumes(), birth, 5.0)
    assert cloud.clock.skipped - before > 10
    provider.create(cloud.volumes(), birth, Hold())
    assert "SnapshotCreationPerVolumeRateExceeded" not in {outcome for _, outcome in cloud.twin.calls}


def test_too_many_pending_is_refused_before_anybody_is_held(cloud: Cloud) -> None:
    cloud.twin.limits.upload_s = 1e6
    for _ in range(5):
        cloud.take()
        cloud.twin.clock.advance(20)
    with pytest.raises(PreconditionError, match="pending"):
        cloud.take()
    assert sum(cloud.living().values()) == 10


def test_throttled_calls_are_made_again(cloud: Cloud) -> None:
    cloud.twin.limits.buckets["*"] = (2, 1)
    for _ in range(3):
        cloud.take()
    assert sum(cloud.living().values()) == 6


def test_an_undo_hears_what_ec2_says_not_what_it_undoes(cloud: Cloud) -> None:
    """Whatever is raised within an `except` has the error that is being handled as its context."""
    set_ids = [cloud.take() for _ in range(3)]
    cloud.twin.limits.buckets["*"] = (2, 1)
    try:
        raise StorageError("the take failed")
    except StorageError:
        for set_id in set_ids:
            cloud.provider().delete(set_id)
    assert not cloud.living()


# -- deadlines ---------------------------------------------------------------------------------------------------


def test_an_answer_that_never_comes_ends_before_the_hold_does(cloud: Cloud) -> None:
    cloud.twin.fail("CreateSnapshots", "hang")
    provider, birth = cloud.provider(), make_birth(cloud.volumes())
    provider.prepare(cloud.volumes(), birth, 3.0)
    started = time.monotonic()
    with pytest.raises((StorageError, QuiesceError)) as failed:
        provider.create(cloud.volumes(), birth, Hold(deadline=started + 3))
    assert time.monotonic() - started < 3.5
    assert failed.value.cure
    assert not cloud.living()


@pytest.mark.root
def test_a_volume_that_is_never_there_is_given_up_and_removed() -> None:
    with ebs_harness() as harness:
        volume = harness.volume()
        before = harness.objects()
        provider = harness.provider()
        birth = take(provider, harness, [volume])
        (found,) = ready(provider, harness, birth.set_id)
        harness.twin.limits.create_s = 5000.0
        started, attachment_id = harness.clock.now(), new_attachment_id(utc_now())
        with pytest.raises(StorageError, match="within 600 s"):
            provider.attach(found, attachment_id, Access.WRITABLE, harness.destination())
        assert harness.clock.now() - started < 620
        harness.twin.clock.advance(5000)
        provider.detach(attachment_id)
        provider.delete(birth.set_id)
        assert harness.objects() == before


# -- errors, one line each ---------------------------------------------------------------------------------------


def told(error: SnapshotterError, exit_code: Exit, *words: str) -> None:
    line = error.line()
    assert error.exit is exit_code, line
    assert error.cure, f"no cure: {line}"
    assert "\n" not in line and "Traceback" not in line
    for word in words:
        assert word in line, line


def test_what_another_tool_copied_our_tags_to_is_not_deleted(cloud: Cloud) -> None:
    """Data Lifecycle Manager and AWS Backup give their snapshots the tags of the volume, a clone of ours for one."""
    set_id = cloud.take()
    (first, _) = cloud.provider().snapshots(set_id)
    made = cloud.provider(zone=REGION + "a").attach_away(first, new_attachment_id(utc_now()))
    clone, now = cloud.twin.world.volumes[made.volume], cloud.twin.clock.now()
    foreign = [clone.tags, {**clone.tags, "snapshotter:mark-sealed": "20261122t100630z"}]
    theirs = [
        Theirs(id=new_id("snap"), region=REGION, born=now, tagged=[(now, tags)], volume=clone.id, size=1, done=now)
        for tags in foreign
    ]
    cloud.twin.world.snapshots |= {each.id: each for each in theirs}
    (attached,) = cloud.provider().attachments()
    cloud.provider().detach(attached.id)
    cloud.provider().delete(set_id)
    assert cloud.living() == {clone.id: 2} and [each.tags for each in theirs] == foreign


def test_an_archived_snapshot_is_not_ready(cloud: Cloud) -> None:
    """EC2 calls it completed, and makes no volume of it for up to three days."""
    set_id = cloud.take()
    (_, second) = cloud.provider().snapshots(set_id)
    cloud.twin.world.snapshots[second.id].tier = "archive"
    (found,) = catalog.read([cloud.provider()]).sets
    assert found.state is State.DAMAGED and not found.good
    assert f"{second.id} is archived: aws ec2 restore-snapshot-tier" in found.why
    with pytest.raises(PreconditionError) as refused:
        cloud.provider(zone=REGION + "a").attach_away(second, new_attachment_id(utc_now()))
    told(refused.value, Exit.PRECONDITION, f"restore-snapshot-tier --permanent-restore --snapshot-id {second.id}")
    with pytest.raises(PreconditionError, match="archived"):
        cloud.provider().foresee(second)
    cloud.twin.world.snapshots[second.id].tier = "standard"
    assert [each.good for each in catalog.read([cloud.provider()]).sets] == [True]


def test_an_archived_set_is_let_go_by_age_and_by_a_person_alone(cloud: Cloud) -> None:
    """It guards nothing and fills no bucket, but what was archived to be kept isn't gone with the next tick."""
    sets = []
    for _ in range(4):
        sets.append(cloud.take())
        cloud.twin.clock.advance(60)
    for each in cloud.provider().snapshots():
        if each.birth.set_id in sets[1::2]:
            for part in parts(each.id):
                cloud.twin.world.snapshots[part].tier = "archive"
    found = catalog.read([cloud.provider()]).sets
    assert [each.good for each in found] == [True, False, True, False]
    now, here = utc_now(), found[0].birth.host

    def going(age: timedelta, *, automatic: bool) -> list[str]:
        taken_at = found[1].birth.taken_at - age
        old = replace(found[1], birth=replace(found[1].birth, taken_at=taken_at))
        plan = decide([old, *found[:1], *found[2:]], now, Keep(min=1, daily=7), here, automatic=automatic)
        assert {each.set_id for each in plan.guards} == {sets[0], sets[2]}
        return [each.set_id for each in plan.removals]

    assert going(timedelta(days=6), automatic=False) == []
    assert going(timedelta(days=8), automatic=True) == []
    assert going(timedelta(days=8), automatic=False) == [sets[1]]


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        ("AuthFailure", Exit.PRECONDITION, ("credentials", "log in")),
        ("RequestExpired", Exit.PRECONDITION, ("expired",)),
        ("UnauthorizedOperation", Exit.PRECONDITION, ("may not", "docs/aws.md")),
        ("KmsKeyNotAccessibleFault", Exit.PRECONDITION, ("KMS", "key's policy")),
        ("SnapshotLimitExceeded", Exit.REFUSED, ("quota",)),
        ("ResourceCountExceeded", Exit.REFUSED, ("quota",)),
        ("ConcurrentSnapshotLimitExceeded", Exit.REFUSED, ("pending",)),
        ("OptInRequired", Exit.PRECONDITION, ("region",)),
        ("InvalidVolume.NotFound", Exit.NOT_FOUND, ("region",)),
    ],
)
def test_a_refusal_is_one_line_with_its_cure(cloud: Cloud, code: str, exit_code: Exit, words: tuple[str, ...]) -> None:
    cloud.twin.fail("CreateSnapshots", "refuse", code=code, message="You are not authorized to perform: ec2:X on: y")
    with pytest.raises(SnapshotterError) as refused:
        cloud.take()
    told(refused.value, exit_code, *words)
    assert not cloud.living()


def test_expired_credentials(cloud: Cloud) -> None:
    cloud.twin.expired = True
    with pytest.raises(PreconditionError) as refused:
        cloud.take()
    told(refused.value, Exit.PRECONDITION, "expired")


def without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_no_credentials(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    without_keys(monkeypatch)
    with pytest.raises(PreconditionError) as refused:
        cloud.take()
    told(refused.value, Exit.PRECONDITION, "no AWS credentials", "role")


_NOT_THERE = "/nonexistent/file"
_SSO = """[profile broken]
sso_session = ours
sso_account_id = 123456789012
sso_role_name = x
[sso-session ours]
sso_region = eu-central-1
sso_start_url = https://ours.invalid/start
"""


@pytest.mark.parametrize(
    ("config", "variables"),
    [
        ("[profile broken]\ncredential_process = /bin/false\n", {}),  # CredentialRetrievalError
        ("[profile broken]\naws_access_key_id = AKIATWIN\n", {}),  # PartialCredentialsError
        ("[profile broken]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = gone\n", {}),  # InvalidConfig
        (_SSO, {}),  # TokenRetrievalError, SSOTokenLoadError
        (
            "[profile broken]\nrole_arn = arn:aws:iam::123456789012:role/x\nweb_identity_token_file = /nonexistent/t\n",
            {},
        ),
        ("nonsense", {}),  # ConfigParseError
        ("", {"AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/x", "AWS_WEB_IDENTITY_TOKEN_FILE": _NOT_THERE}),
    ],
)
def test_broken_credentials(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str, variables: dict[str, str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    provider = cloud.provider(**({} if variables else {"profile": "broken"}))
    with pytest.raises(PreconditionError) as refused:
        list(provider.snapshots())
    told(refused.value, Exit.PRECONDITION, "no AWS credentials")


def test_a_role_and_nothing_to_assume_it_with(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    without_keys(monkeypatch)
    with pytest.raises(PreconditionError) as refused:
        list(cloud.provider(role_arn="arn:aws:iam::123456789012:role/x").snapshots())
    told(refused.value, Exit.PRECONDITION, "no AWS credentials", "role")


def test_no_such_profile(cloud: Cloud) -> None:
    with pytest.raises(SnapshotterError) as refused:
        cloud.take(cloud.provider(profile="nobody"))
    told(refused.value, Exit.USAGE, "nobody", "profile")


def test_another_region(cloud: Cloud) -> None:
    with pytest.raises(NotFoundError) as refused:
        cloud.take(cloud.provider(region="eu-west-1"))
    told(refused.value, Exit.NOT_FOUND, cloud.ids[0], "region")


def test_a_volume_in_error(cloud: Cloud) -> None:
    cloud.twin.world.volumes[cloud.ids[0]].error = True
    with pytest.raises(PreconditionError) as refused:
        cloud.take()
    told(refused.value, Exit.PRECONDITION, cloud.ids[0], "error")


def test_two_instances_are_no_one_instant(cloud: Cloud) -> None:
    other = cloud.twin.world.add_volume(cloud.twin.world.run_instance(), "/dev/sdf", with_bytes=False)
    cloud.ids.append(other.id)
    with pytest.raises(PreconditionError) as refused:
        cloud.take()
    told(refused.value, Exit.PRECONDITION, "several instances")
    assert not cloud.living()


@pytest.mark.root
def test_what_the_disks_say_is_checked_against_ec2() -> None:
    """Credentials of another account, or a machine that only looks like that instance."""
    with ebs_harness() as harness:
        volume = harness.volume()
        harness.instance.id, wrong = "i-0123456789abcdef0", harness.instance.id
        harness.twin.here = harness.instance
        provider = harness.provider()
        assert wrong != harness.instance.id
        from providers.ebs import here as asked

        asked._ask.cache_clear()
        with pytest.raises(PreconditionError) as refused:
            provider.check([volume], make_birth([volume]))
        told(refused.value, Exit.PRECONDITION, "this is i-0123456789abcdef0")


@pytest.mark.root
def test_a_key_that_may_not_be_used_leaves_nothing() -> None:
    with ebs_harness() as harness:
        volume = harness.volume()
        before = harness.objects()
        provider = harness.provider()
        birth = take(provider, harness, [volume])
        (found,) = ready(provider, harness, birth.set_id)
        harness.twin.world.snapshots[found.id].key = "alias/secret"
        harness.twin.limits.keys_denied = {"alias/secret"}
        attachment_id = new_attachment_id(utc_now())
        with pytest.raises(StorageError) as refused:
            provider.attach(found, attachment_id, Access.WRITABLE, harness.destination())
        told(refused.value, Exit.REFUSED, "vanished", "KMS")
        provider.detach(attachment_id)
        provider.delete(birth.set_id)
        assert harness.objects() == before


@pytest.mark.root
def test_a_mounted_volume_is_not_pulled_away() -> None:
    with ebs_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        provider = harness.provider()
        birth = take(provider, harness, [volume])
        (found,) = ready(provider, harness, birth.set_id)
        destination, attachment_id = harness.destination(), new_attachment_id(utc_now())
        harness.enter(provider.attach(found, attachment_id, Access.WRITABLE, destination), destination)
        try:
            with pytest.raises(BusyError) as refused:
                provider.detach(attachment_id)
            told(refused.value, Exit.BUSY, destination, "umount")
            with pytest.raises(BusyError):
                EbsProvider.swap(provider, "w20261122t100630z-000000", found, volume)
            assert not list(provider.swaps())
        finally:
            harness.leave(destination)
            provider.detach(attachment_id)


# -- for another machine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["error", "lost"])
@pytest.mark.parametrize("action", ["CreateVolume", "AttachVolume", "CreateTags"])
def test_made_for_another_instance_or_for_none(cloud: Cloud, action: str, kind: str) -> None:
    other = cloud.twin.world.run_instance()
    set_id = cloud.take()
    provider = cloud.provider(instance=other.id)
    attachment_id = new_attachment_id(utc_now())
    cloud.twin.fail(action, kind)
    made = []
    with contextlib.suppress(SnapshotterError):
        made = [provider.attach_away(found, attachment_id) for found in provider.snapshots(set_id)]
        provider.settle(attachment_id, datetime.now(UTC))
    if kind == "lost":
        assert {each.instance for each in made} == {other.id} and len({each.device for each in made}) == 2
        assert {each.id for each in cloud.twin.world.of_instance(other.id)} >= {each.volume for each in made}
        (listed, _) = cloud.provider().attachments()
        assert listed.id == attachment_id and listed.since is not None
    cloud.provider().detach(attachment_id)  # another process
    left = [each for each in cloud.twin.world.volumes.values() if each.gone is None and each.id not in cloud.ids]
    assert all(each.attached and each.attached.device == other.root_device for each in left)
    cloud.provider().detach(attachment_id)


def test_made_for_a_zone_and_for_what_is_not_there(cloud: Cloud) -> None:
    set_id = cloud.take()
    (first, _) = cloud.provider().snapshots(set_id)
    attachment_id = new_attachment_id(utc_now())
    for options, error in (
        ({}, PreconditionError),
        ({"instance": "i-0123456789abcdef0"}, NotFoundError),
        ({"instance": cloud.instance.id, "zone": REGION + "z"}, PreconditionError),
    ):
        with pytest.raises(error) as refused:
            cloud.provider(**options).attach_away(first, attachment_id)
        assert refused.value.line()
    made = cloud.provider(zone=REGION + "b").attach_away(first, attachment_id)
    assert (made.instance, made.device) == ("", "")
    assert cloud.twin.world.volumes[made.volume].zone == REGION + "b"
    cloud.provider().detach(attachment_id)
    assert cloud.twin.world.volumes[made.volume].gone is not None
