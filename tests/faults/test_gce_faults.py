"""The gce provider when Compute Engine fails it: answers lost after the effect, operations that end in an error, quotas
of a minute, hangs, stale fingerprints, a full project.

What must be true afterwards is asked of the twin itself, never of the provider.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from providers.gce import GceProvider
from providers.gce.api import Api, Unreachable
from snapshotter.core.errors import (
    BusyError,
    Exit,
    NotFoundError,
    PreconditionError,
    SnapshotterError,
    StorageError,
)
from snapshotter.core.model import Access, Hold, ImageState, Volume, new_attachment_id, utc_now
from snapshotter.host.disks import Disks
from snapshotter.provider import Settings
from snapshotter.testing.conformance.steps import ready, seal, take
from snapshotter.testing.conformance.undoing import Life
from snapshotter.testing.harness import describe, fill, make_birth
from tests.twins.gce import Twin
from tests.unit.cloud_kit import QuickClock
from tests.unit.gce_kit import GceHarness, environment, gce_harness, group

MUTATING = (
    "snapshots.insert",
    "snapshots.setLabels",
    "snapshots.delete",
    "disks.insert",
    "disks.setLabels",
    "instances.attachDisk",
    "instances.detachDisk",
    "disks.delete",
    "instantSnapshotGroups.insert",
    "instantSnapshotGroups.delete",
)


class Cloud:
    """A twin without bytes, seen from outside: an instance of so many disks."""

    def __init__(self, twin: Twin, disks: int = 1, grouped: bool = False) -> None:
        self.twin = twin
        self.clock = QuickClock(twin.clock)
        self.instance = twin.world.run_instance()
        self.names = [f"data-{k}" for k in range(disks)]
        for name in self.names:
            twin.world.add_disk(name, self.instance, device_name=f"dev-{name}", with_bytes=False)
        if grouped:
            group(twin, self.names)

    def provider(self, **options: object) -> GceProvider:
        provider = GceProvider(Settings("/nonexistent", options={"project": self.twin.world.project, **options}))
        provider.clock = self.clock
        provider.disks = Disks(sysfs="/nonexistent")
        return provider

    @property
    def zone(self) -> str:
        return self.instance.zone

    def volumes(self) -> list[Volume]:
        return [Volume("gce", f"{self.zone}/{name}") for name in self.names]

    def living(self) -> Counter[str]:
        """Snapshots that there are, by disk."""
        return Counter(each.source.rpartition("/")[2] for each in self.twin.world.snapshots.values())

    def instants(self) -> int:
        return len(self.twin.world.instants) + len(self.twin.world.groups)

    def take(self, provider: GceProvider | None = None, hold: Hold | None = None) -> str:
        provider = provider or self.provider()
        birth = make_birth(self.volumes())
        provider.check(self.volumes(), birth)
        provider.prepare(self.volumes(), birth, 5.0)
        provider.create(self.volumes(), birth, hold or Hold())
        provider.mark(birth.set_id, {"sealed": "20261122t100630z", "grade": "crash"})
        return birth.set_id

    def each_once(self) -> Counter[str]:
        return Counter(dict.fromkeys(self.names, 1))


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with Twin() as twin, environment(twin.environment(keys=False)):
        yield Cloud(twin)


@pytest.fixture
def pair() -> Iterator[Cloud]:
    """Two disks of one consistency group."""
    with Twin() as twin, environment(twin.environment(keys=False)):
        yield Cloud(twin, disks=2, grouped=True)


# -- answers lost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lost", "broken"])
@pytest.mark.parametrize("action", ["snapshots.insert", "snapshots.setLabels", "globalOperations.get"])
def test_a_lost_answer_makes_no_second_snapshot(cloud: Cloud, kind: str, action: str) -> None:
    cloud.twin.fail(action, kind)
    set_id = cloud.take()
    assert cloud.living() == cloud.each_once()
    (found,) = cloud.provider().snapshots(set_id)
    assert found.marks["sealed"]
    cloud.provider().delete(set_id)
    assert not cloud.living()


@pytest.mark.parametrize("action", ["instantSnapshotGroups.insert", "instantSnapshotGroups.delete", "snapshots.insert"])
def test_a_lost_answer_makes_no_second_instant(pair: Cloud, action: str) -> None:
    pair.twin.fail(action, "lost")
    provider = pair.provider()
    set_id = pair.take(provider)
    assert pair.living() == pair.each_once()
    assert {found.birth.member for found in pair.provider().snapshots(set_id)} == {0, 1}
    provider.finish(set_id)
    assert not pair.instants()


def test_an_answer_that_is_lost_for_good_is_undone(cloud: Cloud) -> None:
    """The writers can't be held until it comes: the take fails, and its undo finds what there may be."""
    for _ in range(40):
        cloud.twin.fail("snapshots.insert", "lost")
    provider, birth = cloud.provider(), make_birth(cloud.volumes())
    provider.prepare(cloud.volumes(), birth, 5.0)
    with pytest.raises(StorageError) as failed:
        provider.create(cloud.volumes(), birth, Hold(deadline=time.monotonic() + 3))
    assert failed.value.cure
    provider.delete(birth.set_id)
    assert not cloud.living()


@pytest.mark.root
@pytest.mark.parametrize("action", MUTATING)
def test_a_lost_answer_of_any_call_leaves_one_object_and_no_orphan(action: str, request: pytest.FixtureRequest) -> None:
    """A set's whole life with each call of the action losing its answer once. It succeeds, or its inverses clean up."""
    grouped = action.startswith("instant")
    with gce_harness(grouped=grouped) as harness:
        volumes = [harness.volume(), *([harness.volume()] if grouped else [])]
        top = str(volumes[0].path)
        fill(top)
        content, before = describe(top), harness.objects()
        whole = bool(request.config.getoption("--full"))
        for nth in range(1, 9 if whole else 2):
            fault = harness.twin.fail(action, "lost", nth=nth)
            life = Life.new(harness)
            with contextlib.suppress(StorageError):
                _life(harness, volumes, life)
            made = Counter(each.source for each in harness.twin.world.snapshots.values())
            assert all(count == 1 for count in made.values()), f"two of {made} after call {nth} of {action}"
            provider = harness.provider()
            provider.swap_back(life.swap_id)
            provider.detach(life.attachment_id)
            provider.delete(life.set_id)
            assert harness.objects() == before, f"left after call {nth} of {action}"
            assert describe(top) == content
            if fault in harness.twin.faults:
                harness.twin.faults.remove(fault)
                break  # there are no more calls of it


def _life(harness: GceHarness, volumes: list[Volume], life: Life) -> None:
    provider = harness.provider()
    birth = take(provider, harness, volumes, make_birth(volumes, set_id=life.set_id))
    seal(provider, birth)
    provider.mark(birth.set_id, {"pinned": "1"})
    provider.mark(birth.set_id, {"pinned": None})
    found = ready(provider, harness, birth.set_id)[0]
    provider.finish(birth.set_id)
    provider.attach(found, life.attachment_id, Access.WRITABLE, life.destination)
    provider.settle(life.attachment_id, datetime.now(UTC))
    provider.detach(life.attachment_id)
    provider.swap(life.swap_id, found, volumes[0])
    provider.swap_back(life.swap_id)
    provider.delete(birth.set_id)


# -- sets of a group ---------------------------------------------------------------------------------------------


def test_a_group_is_one_instant_and_leaves_nothing_but_its_snapshots(pair: Cloud) -> None:
    provider = pair.provider()
    assert provider.one_instant(pair.volumes())
    pair.twin.limits.upload_s = 100.0
    set_id = pair.take(provider)
    assert pair.instants() == 3, "the group, and an instant of each disk, for as long as it is copied"
    assert {found.state for found in pair.provider().snapshots(set_id)} == {ImageState.PENDING}
    assert not pair.provider().reap()
    pair.twin.clock.advance(101)
    assert {found.state for found in pair.provider().snapshots(set_id)} == {ImageState.READY}
    provider.finish(set_id)
    assert pair.instants() == 0 and pair.living() == pair.each_once()


def test_a_group_that_nobody_waited_for_is_reaped(pair: Cloud) -> None:
    set_id = pair.take()
    other = pair.provider()
    assert pair.instants() == 3
    gone: list[str] = []
    give_up = time.monotonic() + 30
    while not gone and time.monotonic() < give_up:  # the record's deadline is the machine's time
        with _later(3600):
            gone = other.reap()
    assert gone == [f"instant snapshots of {set_id}"] and pair.instants() == 0
    assert pair.living() == pair.each_once()


def test_a_group_that_cannot_be_removed_holds_up_no_other(pair: Cloud) -> None:
    first, second = pair.take(), pair.take()
    pair.twin.clock.advance(60)
    for _ in range(100):
        pair.twin.fail("instantSnapshotGroups.delete", "refuse", code="resourceInUseByAnotherResource")
    started, provider = pair.clock.now(), pair.provider()
    with _later(3600):
        assert provider.advance() == [], "it may be slow only"
        assert provider.reap() == [], "and a tick, which does both, waits once"
    assert pair.clock.now() - started < 120, "and the tick isn't over"
    with _later(2 * 86400), pytest.raises(StorageError) as failed:
        pair.provider().advance()
    told(failed.value, Exit.REFUSED, "within 30 s")
    pair.twin.faults[:] = [pair.twin.fail("instantSnapshotGroups.get", "refuse", code="forbidden", status=403)]
    with _later(3600), pytest.raises(PreconditionError):
        pair.provider().reap()
    assert len(pair.twin.world.groups) == 1 and {first, second} > {
        each.name for each in pair.twin.world.groups.values()
    }, "one failed, the other's are gone"


def test_instant_snapshots_that_go_slowly_are_left_to_the_next_tick(pair: Cloud) -> None:
    set_id = pair.take()
    pair.twin.clock.advance(60)
    for _ in range(40):
        pair.twin.fail("instantSnapshotGroups.delete", "refuse", code="resourceInUseByAnotherResource")
    tick, names = pair.provider(), [f"instant snapshots of {set_id}"]
    with _later(3600):
        assert tick.advance() == [] and pair.instants() == 3
        (note,) = tick.notes
        assert set_id in note and "within 30 s" in note
        del pair.twin.faults[20:]
        assert len(pair.twin.faults) == 20, "more than go into 30 s"
        assert pair.provider().reap() == names, "who is asked for just that waits longer"
    assert pair.instants() == 0 and pair.living() == pair.each_once()


@contextlib.contextmanager
def _later(seconds: float) -> Iterator[None]:
    """The provider's look at the machine's clock, so much later."""
    from datetime import timedelta

    import providers.gce as module

    now = module.utc_now
    module.utc_now = lambda: now() + timedelta(seconds=seconds)
    try:
        yield
    finally:
        module.utc_now = now


def test_disks_in_no_group_are_several_instants(cloud: Cloud) -> None:
    cloud.twin.world.add_disk("other", cloud.instance, device_name="other", with_bytes=False)
    cloud.names.append("other")
    assert not cloud.provider().one_instant(cloud.volumes())
    cloud.take()
    assert cloud.living() == cloud.each_once() and not cloud.instants()


def test_a_group_that_fails_in_one_disk_is_no_set(pair: Cloud) -> None:
    """Taken, but one member's copy is refused inside its operation: it is never sealed."""
    provider, birth = pair.provider(), make_birth(pair.volumes())
    pair.twin.fail("snapshots.insert", "operation", code="QUOTA_EXCEEDED", message="Quota 'SNAPSHOTS' exceeded.", nth=2)
    provider.prepare(pair.volumes(), birth, 5.0)
    with pytest.raises(StorageError, match="SNAPSHOTS"):
        provider.create(pair.volumes(), birth, Hold())
        provider.mark(birth.set_id, {"sealed": "20261122t100630z"})
    provider.delete(birth.set_id)
    assert not pair.living() and not pair.instants()


def test_a_copy_of_a_group_that_meets_the_minutes_quota_is_told(pair: Cloud) -> None:
    """Inside its operation, when nobody is held any more: not sealed, one line, nothing left."""
    pair.twin.fail("snapshots.insert", "operation", code="RATE_LIMIT_EXCEEDED", message="too many")
    provider, birth = pair.provider(), make_birth(pair.volumes())
    provider.prepare(pair.volumes(), birth, 5.0)
    provider.create(pair.volumes(), birth, Hold())
    with pytest.raises(StorageError) as refused:
        provider.mark(birth.set_id, {"sealed": "20261122t100630z"})
    told(refused.value, Exit.REFUSED, "minute")
    provider.delete(birth.set_id)
    assert not pair.living() and not pair.instants()


def test_a_group_that_could_not_be_removed_is_removed_by_the_next_try(pair: Cloud) -> None:
    provider = pair.provider()
    set_id = pair.take(provider)
    pair.twin.fail("instantSnapshotGroups.delete", "operation", code="INTERNAL_ERROR")
    with pytest.raises(StorageError):
        provider.finish(set_id)
    provider.finish(set_id)
    assert not pair.instants() and pair.living() == pair.each_once()


def test_a_snapshot_that_is_gone_when_it_is_done_holds_nobody(cloud: Cloud) -> None:
    cloud.twin.fail("snapshots.insert", "vanish")
    provider, birth = cloud.provider(), make_birth(cloud.volumes())
    provider.prepare(cloud.volumes(), birth, 60.0)
    started = time.monotonic()
    with pytest.raises(StorageError, match="is gone"):
        provider.create(cloud.volumes(), birth, Hold(deadline=started + 60))
    assert time.monotonic() - started < 20
    provider.delete(birth.set_id)
    assert not cloud.living()


def test_an_upload_that_fails_is_invalid_and_says_why(cloud: Cloud) -> None:
    cloud.twin.limits.upload_s = 100.0
    cloud.twin.fail("snapshots.insert", "upload")
    set_id = cloud.take()
    assert {found.state for found in cloud.provider().snapshots(set_id)} == {ImageState.PENDING}
    cloud.twin.clock.advance(101)
    for found in cloud.provider().snapshots(set_id):
        assert found.state is ImageState.INVALID and found.why


def test_a_snapshot_that_vanished_is_missed(pair: Cloud) -> None:
    provider = pair.provider()
    set_id = pair.take(provider)
    del pair.twin.world.snapshots[f"{set_id}-0"]
    assert [found.id for found in pair.provider().snapshots(set_id)] == [f"{set_id}-1"]
    with pytest.raises(StorageError, match="can't be sealed"):
        pair.provider().mark(set_id, {"sealed": "20261122t100630z"})
    pair.provider().delete(set_id)
    assert not pair.living()


# -- limits ------------------------------------------------------------------------------------------------------


def test_a_disk_that_was_taken_six_times_in_an_hour_is_refused_before_anybody_is_held(cloud: Cloud) -> None:
    for _ in range(6):
        cloud.take()
        cloud.twin.clock.advance(60)
    volumes = cloud.volumes()
    with pytest.raises(PreconditionError) as refused:
        cloud.provider().check(volumes, make_birth(volumes))
    told(refused.value, Exit.PRECONDITION, cloud.names[0], "within the hour", "UTC")
    assert sum(cloud.living().values()) == 6
    cloud.twin.clock.advance(3600 - 5 * 60)
    cloud.take()


def test_too_many_calls_wait_for_the_whole_minute_and_go_on(cloud: Cloud) -> None:
    """Driven clock: not before the minute is over, and then at once."""
    cloud.take()
    for action in ("snapshots.insert", "disks.get", "snapshots.list"):
        started = cloud.clock.wall()
        cloud.twin.fail(action, "refuse", code="rateLimitExceeded", status=403)
        seen: list[float] = []
        record, provider = cloud.twin.calls, cloud.provider()
        before = len(record)
        cloud.take(provider)
        assert cloud.clock.wall() // 60 == started // 60 + 1, "in the next minute"
        assert cloud.clock.wall() % 60 < 20, seen
        assert [outcome for each, outcome in record[before:] if each == action].count("rateLimitExceeded") == 1
    assert sum(cloud.living().values()) == 4


def test_quotas_of_a_minute_are_kept_by_threads_together(cloud: Cloud) -> None:
    cloud.twin.fail("snapshots.insert", "operation", code="RATE_LIMIT_EXCEEDED", message="too many")
    started = cloud.clock.wall()
    cloud.take()
    assert cloud.clock.wall() // 60 > started // 60, "an operation that ended so is begun again in the next minute"
    assert cloud.living() == cloud.each_once()


def test_labels_that_others_change_are_read_again(cloud: Cloud) -> None:
    set_id = cloud.take()
    cloud.twin.fail("snapshots.setLabels", "stale")
    cloud.provider().mark(set_id, {"pinned": "1"})
    (found,) = cloud.provider().snapshots(set_id)
    assert found.marks["pinned"] == "1" and found.marks["sealed"]
    labels = cloud.twin.world.snapshots[found.id].labels
    assert labels["theirs"] == "kept", "what another wrote in between is still there"


# -- deadlines ---------------------------------------------------------------------------------------------------


def test_a_look_that_is_answered_503_for_ever_ends_at_its_deadline(cloud: Cloud) -> None:
    provider = cloud.provider()
    provider.clock = type(GceProvider.clock)()  # real time
    api = provider._api()
    api.call("Disks.get", api.deadline("a first look"), zone=cloud.zone, disk=cloud.names[0])
    for _ in range(200):
        cloud.twin.fail("disks.get", "refuse", code="backendError", status=503)
    started = time.monotonic()
    with pytest.raises(StorageError) as failed:
        api.call("Disks.get", api.deadline("the look", 6.0), zone=cloud.zone, disk=cloud.names[0])
    assert abs(time.monotonic() - started - 6.0) <= 1.0
    told(failed.value, Exit.REFUSED, "the look", "503")


def test_an_answer_that_never_comes_ends_before_the_hold_does(cloud: Cloud) -> None:
    cloud.twin.fail("snapshots.insert", "hang")
    provider, birth = cloud.provider(), make_birth(cloud.volumes())
    provider.prepare(cloud.volumes(), birth, 3.0)
    started = time.monotonic()
    with pytest.raises(StorageError) as failed:
        provider.create(cloud.volumes(), birth, Hold(deadline=started + 3))
    assert time.monotonic() - started < 3.5
    assert failed.value.cure
    assert not cloud.living()


def test_every_call_goes_to_the_configured_endpoint(pair: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything but loopback blocked, by name and by address, a whole life of a set goes through."""
    asked: list[object] = []
    resolve, connect = socket.getaddrinfo, socket.socket.connect

    def local(host: object) -> bool:
        return host in ("127.0.0.1", "localhost", b"127.0.0.1")

    def guarded(host: object, *more: object, **others: object) -> object:
        asked.append(host)
        assert local(host), f"asked for {host!r}"
        return resolve(host, *more, **others)  # type: ignore[arg-type]

    def guarded_connect(self: socket.socket, address: object) -> None:
        asked.append(address)
        assert isinstance(address, tuple) and local(address[0]), f"connected to {address!r}"
        connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", guarded)
    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    provider = pair.provider()
    set_id = pair.take(provider)
    provider.finish(set_id)
    pair.provider().delete(set_id)
    assert asked and not pair.living()


# -- errors, one line each ---------------------------------------------------------------------------------------


def told(error: SnapshotterError, exit_code: Exit, *words: str) -> None:
    line = error.line()
    assert error.exit is exit_code, line
    assert error.cure, f"no cure: {line}"
    assert "\n" not in line and "Traceback" not in line
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("kind", ["refuse", "operation"])
@pytest.mark.parametrize(
    ("code", "message", "exit_code", "words"),
    [
        (
            "QUOTA_EXCEEDED",
            "Quota 'SNAPSHOTS' exceeded.  Limit: 5000.0 globally.",
            Exit.REFUSED,
            ("SNAPSHOTS", "quota"),
        ),
        ("RESOURCE_OPERATION_RATE_EXCEEDED", "Operation rate exceeded for resource", Exit.REFUSED, ("ten minutes",)),
        (
            "KMS",
            "Cloud KMS error when using key projects/p/locations/l/keyRings/r/cryptoKeys/k",
            Exit.PRECONDITION,
            ("cryptoKeys/k", "docs/gcp.md"),
        ),
        (
            "INTERNAL_ERROR",
            "Internal error. Please try again or contact Google Support.",
            Exit.REFUSED,
            ("Internal error",),
        ),
    ],
)
def test_a_refusal_is_one_line_with_its_cure(
    cloud: Cloud, kind: str, code: str, message: str, exit_code: Exit, words: tuple[str, ...]
) -> None:
    cloud.twin.fail("snapshots.insert", kind, code=code, message=message)
    provider = cloud.provider()
    birth = make_birth(cloud.volumes())
    provider.prepare(cloud.volumes(), birth, 5.0)
    with pytest.raises(SnapshotterError) as refused:
        provider.create(cloud.volumes(), birth, Hold())
    told(refused.value, exit_code, *words)
    provider.delete(birth.set_id)
    assert not cloud.living()


def test_no_permission(cloud: Cloud) -> None:
    cloud.twin.permissions = {"compute.disks.get", "compute.snapshots.list"}
    with pytest.raises(PreconditionError) as refused:
        cloud.take()
    told(refused.value, Exit.PRECONDITION, "may not compute.disks.createSnapshot", "docs/gcp.md")


def test_no_credentials(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    import google.auth.compute_engine._metadata as metadata

    monkeypatch.setattr(metadata, "_NO_GCE_CHECK", True)
    with pytest.raises(PreconditionError) as refused:
        cloud.take()
    told(refused.value, Exit.PRECONDITION, "no Google credentials", "service account")


EXTERNAL = {
    "type": "external_account",
    "audience": "//iam.googleapis.com/pool",
    "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
    "token_url": "https://sts.googleapis.com/v1/token",
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no Google credentials"),
        ("", "not a valid json file"),
        ("\udcff", "not a valid json file"),
        ("[]", "no Google credentials"),
        ({}, "does not have a valid type"),
        ({"type": "service_account"}, "Failed to load service account"),
        (
            {"type": "service_account", "client_email": "a@b", "token_uri": "https://t", "private_key": "x"},
            "Failed to load service account",
        ),
        ({"type": "authorized_user"}, "Failed to load authorized user"),
        ({"type": "impersonated_service_account"}, "no Google credentials"),
        ({**EXTERNAL, "credential_source": "x"}, "no Google credentials"),
        ({**EXTERNAL, "credential_source": {"file": "/nonexistent/token"}}, "/nonexistent/token"),
        ({**EXTERNAL, "credential_source": {"executable": {"command": "/nonexistent/it"}}}, "/nonexistent/it"),
        ({**EXTERNAL, "credential_source": {"executable": {"command": "false"}}}, "gives no token"),
    ],
    ids=str,
)
def test_credentials_that_are_broken(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: object, words: str
) -> None:
    """A directory, a file that is no key, a key that is none, a token that nobody gives: never a bug of ours."""
    file = tmp_path / "key.json"
    if content is None:
        file.mkdir()
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        file.write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    monkeypatch.setenv("GOOGLE_EXTERNAL_ACCOUNT_ALLOW_EXECUTABLES", "1")
    with pytest.raises(PreconditionError) as refused:
        cloud.take()
    told(refused.value, Exit.PRECONDITION, words)


@pytest.mark.parametrize("name", ["GOOGLE_API_USE_MTLS_ENDPOINT", "GOOGLE_CLOUD_UNIVERSE_DOMAIN"])
def test_a_client_that_the_environment_forbids(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, " ")
    with pytest.raises(PreconditionError) as refused:
        cloud.take()
    told(refused.value, Exit.PRECONDITION, "client can't be made")


@pytest.mark.parametrize(
    ("kind", "retryable", "refused"),
    [
        ("DefaultCredentialsError", False, PreconditionError),
        ("RefreshError", False, PreconditionError),
        ("RefreshError", True, StorageError),
        ("MalformedError", False, PreconditionError),
        ("TransportError", False, StorageError),
    ],
)
def test_a_token_that_is_not_given(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, kind: str, retryable: bool, refused: type[SnapshotterError]
) -> None:
    """Refused: at once. Not answered: asked for again until the deadline, as every call is."""
    import google.auth.exceptions
    from google.auth.compute_engine import Credentials

    def refresh(self: object, request: object) -> None:
        raise getattr(google.auth.exceptions, kind)("nobody knows you", {"error": "x"}, retryable=retryable)

    monkeypatch.setattr(Credentials, "refresh", refresh)
    started = cloud.clock.now()
    with pytest.raises(refused) as failed:
        cloud.take()
    told(failed.value, refused.exit, "Google gives no token: nobody knows you")
    assert (cloud.clock.now() - started < 5) is (refused is PreconditionError)


def test_a_project_that_is_not_ours(cloud: Cloud) -> None:
    with pytest.raises(NotFoundError) as refused:
        cloud.take(cloud.provider(project="another"))
    told(refused.value, Exit.NOT_FOUND, "another", "project")


def test_a_disk_that_is_not_there(cloud: Cloud) -> None:
    cloud.names[0] = "gone"
    with pytest.raises(NotFoundError) as refused:
        cloud.take()
    told(refused.value, Exit.NOT_FOUND, "gone", "-o zone=")


def test_a_disk_in_error(cloud: Cloud) -> None:
    cloud.twin.world.disks[f"zones/{cloud.zone}/disks/{cloud.names[0]}"].error = "FAILED"
    with pytest.raises(PreconditionError) as refused:
        cloud.take()
    told(refused.value, Exit.PRECONDITION, cloud.names[0], "FAILED")


def test_a_zone_that_cannot_be_asked_is_not_empty(pair: Cloud) -> None:
    """Its part of a list is missing, and only a warning says so: what is there may be attached, a node's, a group's."""
    provider = pair.provider()
    set_id = pair.take(provider)
    disk = pair.twin.world.disks[f"zones/{pair.zone}/disks/{pair.names[0]}"]
    disk.labels |= {"snapshotter-node": "n1"}
    pair.twin.world.unreachable = {f"zones/{pair.zone}"}
    for ask in (
        lambda: pair.provider().delete(set_id),
        lambda: list(pair.provider().attachments()),
        lambda: pair.provider().find({"tags": {"snapshotter-node": "n1"}}),
        lambda: pair.provider().tagged(),
    ):
        with pytest.raises(StorageError) as refused:
            ask()
        told(refused.value, Exit.REFUSED, f"zones/{pair.zone}", "try again")
    assert pair.living() == pair.each_once()
    # What is known of all the same: what an instance there has, and what another zone's dead runs left.
    assert pair.provider().find({"instance": f"{pair.zone}/{pair.instance.name}"}) == pair.volumes()
    with _later(3600):
        assert pair.provider().reap() == []
    pair.twin.world.unreachable = {"zones/us-central1-a"}
    with _later(3600):
        assert pair.provider().reap() == [f"instant snapshots of {set_id}"]
    with pytest.raises(StorageError):
        pair.provider().delete(set_id)
    pair.twin.world.unreachable = set()
    pair.provider().delete(set_id)
    assert not pair.living()


def test_the_nodes_of_other_places_than_the_lost_one_are_known(cloud: Cloud) -> None:
    """Not those that may have a disk there too: a node's zonal disk is listed without its regional one."""
    world, region = cloud.twin.world, "regions/europe-west3"
    for node, zone in (("n-a", "europe-west3-a"), ("n-b", "europe-west3-b"), ("n-us", "us-central1-a")):
        instance = world.run_instance(zone)
        world.add_disk(node, instance, with_bytes=False).labels = {"snapshotter-node": node}
        zones = [f"{region.partition('/')[2]}-{letter}" for letter in "bc"]
        if node == "n-b":
            both = world.add_disk("both", instance, place=region, replica_zones=zones, with_bytes=False)
            both.labels = {"snapshotter-node": node}
    free = world.add_disk("free", place=region, replica_zones=zones, with_bytes=False)
    free.labels = {"snapshotter-node": "n-free"}
    # On two instances, of which one is lost, that is wrong as it was.
    again = world.add_disk("again", world.run_instance("us-central1-b"), with_bytes=False)
    again.labels = {"snapshotter-node": "n-b"}
    for lost, known, partial in (
        ("zones/us-central1-a", ["n-a", "n-b", "n-b", "n-free"], []),
        ("zones/europe-west3-a", ["n-b", "n-b", "n-us"], ["n-free"]),
        ("zones/europe-west3-b", ["n-a", "n-us"], ["n-b", "n-free"]),
        (region, ["n-us"], ["n-a", "n-b"]),
    ):
        world.unreachable = {lost}
        with pytest.raises(Unreachable) as refused:
            cloud.provider().tagged()
        told(refused.value, Exit.REFUSED, lost, "try again")
        assert refused.value.tagged is not None
        assert [each.node for each in refused.value.tagged] == known
        assert ("not taken" in refused.value.line()) is bool(partial)
        assert ", ".join(partial) in refused.value.line()


@pytest.mark.parametrize("named", [True, False])
def test_a_list_may_say_for_all_of_it_what_is_missing(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Where it doesn't say which place that is, no node is known for certain."""
    disk = cloud.twin.world.disks[f"zones/{cloud.zone}/disks/{cloud.names[0]}"]
    disk.labels |= {"snapshotter-node": "n1"}
    call = Api.call

    def warned(self: Api, action: str, *given: Any, **fields: Any) -> Any:
        answer = call(self, action, *given, **fields)
        if action == "Disks.aggregated_list":
            data = [{"key": "scope", "value": "zones/us-central1-a"}] if named else []
            answer._response.warning = {"code": "UNREACHABLE", "message": "us-central1-a", "data": data}
        return answer

    monkeypatch.setattr(Api, "call", warned)
    with pytest.raises(Unreachable) as refused:
        cloud.provider().tagged()
    told(refused.value, Exit.REFUSED, "us-central1-a", "try again")
    assert [each.node for each in refused.value.tagged or ()] == (["n1"] if named else [])
    assert (refused.value.tagged is None) is not named, "then the whole fleet waits"


def test_a_take_that_fails_is_undone_while_another_zone_is_lost(pair: Cloud) -> None:
    pair.twin.world.unreachable = {"zones/us-central1-a"}
    provider, birth = pair.provider(), make_birth(pair.volumes())
    provider.check(pair.volumes(), birth)
    provider.create(pair.volumes(), birth, Hold())
    # A dead run that had sealed half of it left no backup either.
    pair.twin.world.snapshots[f"{birth.set_id}-0"].labels |= {"snapshotter-mark-sealed": "1"}
    pair.provider().delete(birth.set_id)
    assert not pair.living() and pair.instants() == 0


def test_the_seal_that_a_deletion_takes_off_first_does_not_let_a_lost_zone_pass(pair: Cloud) -> None:
    set_id = pair.take()
    pair.twin.world.unreachable = {"zones/us-central1-a"}
    pair.provider().mark(set_id, {"sealed": None})
    with pytest.raises(StorageError) as refused:
        pair.provider().delete(set_id)
    told(refused.value, Exit.REFUSED, "zones/us-central1-a", "try again")
    assert pair.living() == pair.each_once()


def test_an_unsealed_set_that_is_attached_stays_while_another_zone_is_lost(cloud: Cloud) -> None:
    provider, birth = cloud.provider(), make_birth(cloud.volumes())
    provider.check(cloud.volumes(), birth)
    provider.create(cloud.volumes(), birth, Hold())
    attached = cloud.twin.world.add_disk("a20261122t100630z-000001-0", cloud.instance, with_bytes=False)
    attached.labels = {
        "snapshotter-managed": "true",
        "snapshotter-set": birth.set_id,
        "snapshotter-attachment": "a20261122t100630z-000001",
    }
    attached.description = json.dumps({"member": 0, "path": "/mnt", "access": "ro", "purpose": "restore"})
    cloud.twin.world.unreachable = {"zones/us-central1-a"}
    with pytest.raises(BusyError):
        cloud.provider().delete(birth.set_id)
    assert cloud.living() == cloud.each_once()


@pytest.mark.root
def test_a_restore_goes_on_while_another_zone_is_lost() -> None:
    with gce_harness() as harness:
        volume = harness.volume()
        top = str(volume.path)
        fill(top)
        before, content, life = harness.objects(), describe(top), Life.new(harness)
        harness.twin.world.unreachable = {"zones/us-central1-a", "regions/us-central1"}
        provider = harness.provider()
        birth = take(provider, harness, [volume], make_birth([volume], set_id=life.set_id))
        seal(provider, birth)
        (found,) = ready(provider, harness, birth.set_id)
        provider.attach(found, life.attachment_id, Access.WRITABLE, life.destination)
        provider.settle(life.attachment_id, datetime.now(UTC))
        provider.detach(life.attachment_id)
        provider.swap(life.swap_id, found, volume)
        assert list(provider.swaps()) == [life.swap_id]
        provider.swap_back(life.swap_id)
        assert describe(top) == content
        harness.twin.world.unreachable = set()
        provider.delete(birth.set_id)
        assert harness.objects() == before


@pytest.mark.root
def test_a_disk_that_is_never_ready_is_given_up_and_removed() -> None:
    with gce_harness() as harness:
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


@pytest.mark.root
def test_a_key_that_may_not_be_used_leaves_nothing() -> None:
    with gce_harness() as harness:
        volume = harness.volume()
        before = harness.objects()
        provider = harness.provider()
        birth = take(provider, harness, [volume])
        (found,) = ready(provider, harness, birth.set_id)
        key = "projects/p/locations/l/keyRings/r/cryptoKeys/secret"
        harness.twin.limits.keys_denied = {key}
        attachment_id = new_attachment_id(utc_now())
        with pytest.raises(PreconditionError) as refused:
            harness.provider(kms_key=key).attach(found, attachment_id, Access.WRITABLE, harness.destination())
        told(refused.value, Exit.PRECONDITION, "cryptoKeys/secret", "docs/gcp.md")
        provider.detach(attachment_id)
        provider.delete(birth.set_id)
        assert harness.objects() == before


@pytest.mark.root
def test_a_mounted_disk_is_not_pulled_away() -> None:
    with gce_harness() as harness:
        volume = harness.volume()
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
                GceProvider.swap(provider, "w20261122t100630z-000000", found, volume)
            assert not list(provider.swaps())
        finally:
            harness.leave(destination)
            provider.detach(attachment_id)


@pytest.mark.root
def test_what_the_metadata_server_says_is_checked() -> None:
    """Credentials of another project, or a machine that only looks like that instance."""
    with gce_harness() as harness:
        volume = harness.volume()
        provider = harness.provider()
        birth = make_birth([volume])
        from providers.gce import here

        here._ask.cache_clear()
        harness.instance.id, known = "1", harness.instance.id
        provider.check([volume], birth)
        here._ask.cache_clear()
        harness.twin.here = None
        with pytest.raises(PreconditionError) as refused:
            harness.provider().check([volume], birth)
        told(refused.value, Exit.PRECONDITION, "metadata", "-o zone=")
        harness.twin.here, harness.instance.id = harness.instance, known


def test_a_fleet_is_taken_but_for_the_node_whose_disk_changes_places(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a restore that was killed between the two leaves it: the origin is detached, and nothing stands for it."""
    from providers.gce import labels
    from snapshotter import functions

    monkeypatch.setattr(functions, "_STATE", str(tmp_path))
    monkeypatch.setenv("SNAPSHOTTER_CONFIG_TOML", "")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", cloud.twin.world.project)
    world, theirs = cloud.twin.world, {labels.NODE: "n1", labels.TYPE: "validator"}
    world.disks[f"zones/{cloud.zone}/disks/{cloud.names[0]}"].labels |= theirs
    swap_id = "w20261122t100630z-5f3a9c"
    record = labels.InPlace(f"{cloud.zone}/origin", "dev", False)
    born = labels.of_swap(swap_id, record, cloud.instance.id, "")
    born["labels"] |= theirs
    world.add_disk(f"{swap_id}-0", with_bytes=False, **born)
    aside = {labels.MANAGED: "true", labels.ASIDE: swap_id}
    world.add_disk("origin", with_bytes=False, labels=theirs | aside)
    world.add_disk("another", world.run_instance(), with_bytes=False, labels={**theirs, labels.NODE: "n2"})
    answer = functions.run("gce", 300.0)
    assert len(answer["taken"]) == 1 and cloud.living() == {"another": 1}
    (busy,) = answer["busy"]
    assert busy.startswith("n1: ") and f"{cloud.zone}/origin" in busy and "--undo" in busy
