"""The twin itself: does Google's own client get Compute Engine's answers? The format, operations, labels, lists."""

from __future__ import annotations

import socket
import uuid
from typing import Any

import google.auth.transport._mtls_helper  # noqa: F401  (slow, and each client would ask for it)
import pytest
from google.api_core.exceptions import (
    BadRequest,
    Conflict,
    Forbidden,
    NotFound,
    PreconditionFailed,
)
from requests.exceptions import ConnectionError

from tests.twins.gce import Twin
from tests.twins.gce.filters import compiled
from tests.twins.gce_client import REGION, ZONE, Asked, codes, raw, reason, status

# -- the wire -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"name": "s", "sourceDisk": f"zones/{ZONE}/disks/data", "colour": "red"},
        {"name": "s", "source_disk_id": {}},
        {"name": "s", "sourceDisk": f"zones/{ZONE}/disks/data", "labels": {"Upper": "x"}},
        {"name": "s", "sourceDisk": f"zones/{ZONE}/disks/data", "labels": {"k": "x" * 64}},
        {"name": "s", "sourceDisk": f"zones/{ZONE}/disks/data", "labels": {f"k{n}": "" for n in range(65)}},
        {"name": "No", "sourceDisk": f"zones/{ZONE}/disks/data"},
        {"name": "s", "sourceDisk": "data"},
        {"name": "s", "sourceDisk": f"zones/{ZONE}/disks/data", "storageLocations": ["mars"]},
        {"name": "s"},
    ],
)
def test_a_body_that_compute_engine_refuses_is_400(twin: Twin, body: object) -> None:
    status, said = raw(twin, "POST", f"/compute/v1/projects/{twin.world.project}/global/snapshots", body)
    assert (status, said["error"]["errors"][0]["reason"]) == (400, "invalid")
    assert not twin.world.snapshots


def test_a_path_or_parameter_that_is_none_is_refused(twin: Twin) -> None:
    project = f"/compute/v1/projects/{twin.world.project}"
    assert raw(twin, "GET", f"{project}/global/snapshots?colour=red")[0] == 400
    assert raw(twin, "GET", f"{project}/global/snapshots?maxResults=many")[0] == 400
    assert raw(twin, "GET", f"{project}/global/snapshots?maxResults=501")[0] == 400
    assert raw(twin, "GET", f"{project}/global/photographs")[0] == 404
    assert raw(twin, "GET", "/compute/v1/projects/other/global/snapshots")[0] == 404
    assert raw(twin, "POST", f"{project}/zones/{ZONE}/instances/node/stop")[0] == 501
    assert raw(twin, "GET", f"{project}/zones/mars-a/disks/data")[0] == 400


def test_links_are_understood_in_all_their_forms(twin: Twin, ask: Asked) -> None:
    full = ask.disk().self_link
    for number, link in enumerate((full, full.partition("/v1/")[2], f"zones/{ZONE}/disks/data")):
        ask.snapshot(f"s{number}", source_disk=link)
    assert {each.source for each in twin.world.snapshots.values()} == {f"zones/{ZONE}/disks/data"}
    assert {each.source_disk for each in ask("Snapshots.list")} == {full}


def test_what_is_not_there_or_there_already(ask: Asked) -> None:
    with pytest.raises(NotFound) as missing:
        ask("Snapshots.get", snapshot="none")
    assert reason(missing) == "notFound" and "global/snapshots/none' was not found" in str(missing.value)
    ask.snapshot("s")
    with pytest.raises(Conflict) as there:
        ask.snapshot("s")
    assert reason(there) == "alreadyExists"


# -- operations and time ------------------------------------------------------------------------------------------


def test_states_follow_the_clock(twin: Twin, ask: Asked) -> None:
    limits = twin.limits
    limits.pending_s, limits.capture_s, limits.upload_s, limits.lag_s = 2, 10, 100, 30
    begun = ask.snapshot("s")
    assert (status(begun), begun.progress) == ("PENDING", 0)
    twin.clock.advance(3)
    assert (status(ask.look(begun)), ask("Snapshots.get", snapshot="s").status) == ("RUNNING", "CREATING")
    assert not list(ask("Snapshots.list")), "listed at once"
    with pytest.raises(BadRequest) as early:
        ask("Snapshots.delete_unary", snapshot="s")
    assert reason(early) == "resourceNotReady"
    twin.clock.advance(50)
    half = ask.look(begun)
    assert (status(half), 40 < half.progress < 60) == ("RUNNING", True)
    (found,) = ask("Snapshots.list")
    assert (found.status, found.storage_bytes_status) == ("UPLOADING", "UPDATING")
    twin.clock.advance(60)
    assert status(ask.look(begun)) == "DONE" and not ask.look(begun).error.errors
    assert ask("Snapshots.get", snapshot="s").status == "READY"


def test_an_operation_may_be_done_when_the_image_is_fixed(twin: Twin, ask: Asked) -> None:
    twin.limits.upload_s, twin.limits.done_when_uploaded = 100, False
    begun = ask.snapshot("s")
    assert status(begun) == "RUNNING", "no first answer says DONE"
    assert (status(ask.look(begun)), ask("Snapshots.get", snapshot="s").status) == ("DONE", "UPLOADING")


def test_operations_are_of_their_place(twin: Twin, ask: Asked) -> None:
    begun = ask("Disks.create_snapshot_unary", zone=ZONE, disk="data", snapshot_resource={"name": "s"})
    assert begun.zone.endswith(ZONE) and begun.target_link.endswith("global/snapshots/s")
    assert ask("ZoneOperations.wait", zone=ZONE, operation=begun.name).target_id == int(twin.world.snapshots["s"].id)
    with pytest.raises(NotFound):
        ask("GlobalOperations.get", operation=begun.name)
    with pytest.raises(NotFound):
        ask("ZoneOperations.get", zone="europe-west3-b", operation=begun.name)
    assert [each.name for each in ask("ZoneOperations.list", zone=ZONE)] == [begun.name]


def test_quotas_are_errors_inside_the_operation(twin: Twin, ask: Asked) -> None:
    twin.limits.snapshots, twin.limits.disks_gib = 1, 12
    ask.snapshot("s1")
    refused = ask.look(ask.snapshot("s2"))
    assert (status(refused), codes(refused)) == ("DONE", ["QUOTA_EXCEEDED"])
    assert (refused.http_error_status_code, refused.http_error_message) == (403, "FORBIDDEN")
    assert set(twin.world.snapshots) == {"s1"}
    refused = ask.done("Disks.insert", zone=ZONE, disk_resource={"name": "big", "size_gb": 10})
    assert codes(refused) == ["QUOTA_EXCEEDED"] and len(twin.world.disks) == 2


def test_a_disk_is_taken_six_times_an_hour(twin: Twin, ask: Asked) -> None:
    twin.limits.hourly = 6
    assert not [code for n in range(6) for code in codes(ask.look(ask.snapshot(f"s{n}")))]
    assert codes(ask.look(ask.snapshot("s6"))) == ["RESOURCE_OPERATION_RATE_EXCEEDED"]
    twin.clock.advance(3601)
    assert not codes(ask.look(ask.snapshot("s7")))
    twin.limits.spacing_s = 600
    assert codes(ask.look(ask.snapshot("s8"))) == ["RESOURCE_OPERATION_RATE_EXCEEDED"]
    twin.clock.advance(601)
    assert not codes(ask.look(ask.snapshot("s8")))
    made = [{"name": f"d{n}", "source_snapshot": "global/snapshots/s0"} for n in (1, 2)]
    outcomes = [codes(ask.done("Disks.insert", zone=ZONE, disk_resource=each)) for each in made]
    assert outcomes == [[], ["RESOURCE_OPERATION_RATE_EXCEEDED"]]


def test_a_quota_is_full_again_at_the_whole_minute(twin: Twin, ask: Asked) -> None:
    twin.limits.per_minute = {"get": 3, "list": 1}
    twin.clock.advance(60 - twin.clock.now() % 60 + 5)
    for _ in range(3):
        ask.disk()
    with pytest.raises(Forbidden) as refused:
        ask.disk()
    assert reason(refused) == "rateLimitExceeded"
    list(ask("Disks.list", zone=ZONE))
    twin.clock.advance(50)
    with pytest.raises(Forbidden):
        ask.disk()
    twin.clock.advance(5.5)
    ask.disk()


def test_a_request_id_begins_one_operation(twin: Twin, ask: Asked) -> None:
    once = str(uuid.uuid4())
    wanted = {"name": "s", "source_disk": f"zones/{ZONE}/disks/data"}
    twin.fail("snapshots.insert", "lost")
    with pytest.raises(ConnectionError):
        ask("Snapshots.insert_unary", snapshot_resource=wanted, request_id=once)
    again = ask("Snapshots.insert_unary", snapshot_resource=wanted, request_id=once)
    assert again.name == ask("Snapshots.insert_unary", snapshot_resource=wanted, request_id=once).name
    assert len(twin.world.snapshots) == len(twin.world.operations) == 1
    for wrong in ("00000000-0000-0000-0000-000000000000", "again"):
        with pytest.raises(BadRequest):
            ask("Snapshots.insert_unary", snapshot_resource=wanted, request_id=wrong)
    with pytest.raises(BadRequest):
        ask("Snapshots.insert_unary", snapshot_resource={**wanted, "name": "other"}, request_id=once)
    # What failed inside its operation is answered with the same failure; what was refused at once begins anew.
    failing, refused = str(uuid.uuid4()), str(uuid.uuid4())
    twin.fail("snapshots.insert", "operation", code="QUOTA_EXCEEDED")
    first = ask("Snapshots.insert_unary", snapshot_resource={**wanted, "name": "t"}, request_id=failing)
    second = ask("Snapshots.insert_unary", snapshot_resource={**wanted, "name": "t"}, request_id=failing)
    assert first.name == second.name and codes(ask.look(second)) == ["QUOTA_EXCEEDED"]
    twin.fail("snapshots.insert", "refuse", code="rateLimitExceeded")
    with pytest.raises(Forbidden):
        ask("Snapshots.insert_unary", snapshot_resource={**wanted, "name": "u"}, request_id=refused)
    ask("Snapshots.insert_unary", snapshot_resource={**wanted, "name": "u"}, request_id=refused)
    assert set(twin.world.snapshots) == {"s", "u"}


# -- labels, lists ------------------------------------------------------------------------------------------------


def test_labels_are_changed_with_a_fresh_fingerprint_only(twin: Twin, ask: Asked) -> None:
    ask.snapshot("s", labels={"a": "1"})
    before = ask("Snapshots.get", snapshot="s")

    def label(fingerprint: str, **labels: str) -> None:
        given = {"labels": labels, "label_fingerprint": fingerprint}
        ask("Snapshots.set_labels_unary", resource="s", global_set_labels_request_resource=given)

    label(before.label_fingerprint, a="2")
    for stale in (before.label_fingerprint, ""):
        with pytest.raises(PreconditionFailed) as refused:
            label(stale, a="3")
        assert reason(refused) == "conditionNotMet"
    now = ask("Snapshots.get", snapshot="s")
    assert (dict(now.labels), now.label_fingerprint != before.label_fingerprint) == ({"a": "2"}, True)
    twin.fail("snapshots.setLabels", "stale")
    with pytest.raises(PreconditionFailed):
        label(now.label_fingerprint, a="3")
    assert dict(ask("Snapshots.get", snapshot="s").labels) == {"a": "2", "theirs": "kept"}
    fresh = {"labels": {"b": ""}, "label_fingerprint": ask.disk().label_fingerprint}
    ask("Disks.set_labels_unary", zone=ZONE, resource="data", zone_set_labels_request_resource=fresh)
    assert dict(ask.disk().labels) == {"b": ""}


def test_lists_are_filtered_and_paged(twin: Twin, ask: Asked) -> None:
    for n in range(7):
        ask.snapshot(f"s{n}", labels={"set": "x" if n % 2 else "y", **({"only": ""} if n == 3 else {})})
        twin.clock.advance(1)
    page = next(ask("Snapshots.list", max_results=3).pages)
    assert ([each.name for each in page.items], bool(page.next_page_token)) == (["s0", "s1", "s2"], True)
    assert [each.name for each in ask("Snapshots.list", max_results=3)] == [f"s{n}" for n in range(7)]
    newest = ask("Snapshots.list", order_by="creationTimestamp desc", max_results=1)
    assert next(iter(newest)).name == "s6"

    def names(filter: str) -> list[str]:
        return [each.name for each in ask("Snapshots.list", filter=filter)]

    assert names("labels.set=x") == ["s1", "s3", "s5"]
    assert names("labels.only:*") == ["s3"]
    assert names("(labels.set=x) (name!=s1)") == ["s3", "s5"]
    link = ask.disk().self_link
    assert len(names(f'sourceDisk="{link}"')) == 7 and not names(f'sourceDisk="{link}x"')
    with pytest.raises(BadRequest):
        names("labels.set=")
    with pytest.raises(BadRequest):
        list(ask("Snapshots.list", page_token="no token"))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", True),
        ("name=disk", True),
        ("name = di*", True),
        ("name eq di.*", True),
        ("name ne di.*", False),
        ("NOT name=disk", False),
        ("sizeGb > 9", True),
        ("sizeGb < 9", False),
        ('made > "2026-11-22T10:06:31Z"', True),
        ("sizeGb >= 10 AND status=READY", True),
        ("(name=x) OR (name=disk)", True),
        ("(name=x OR name=disk) (status!=READY)", False),
        ('users:"instances/node"', True),
        ("labels.none:*", False),
        ("key.kmsKeyName:crypto", True),
    ],
)
def test_the_language_of_filters(text: str, wanted: bool) -> None:
    item = {"name": "disk", "sizeGb": "10", "status": "READY", "users": ["zones/z/instances/node"], "labels": {}}
    item["made"] = "2026-11-22T02:06:32.123-08:00"
    assert compiled(text)({**item, "key": {"kmsKeyName": "cryptoKeys/k"}}) is wanted


def test_aggregated_lists_have_all_places(twin: Twin, ask: Asked) -> None:
    twin.world.add_disk("wide", place=f"regions/{REGION}", replica_zones=[f"{REGION}-a", f"{REGION}-b"])
    found = dict(ask("Disks.aggregated_list"))
    assert [each.name for each in found[f"zones/{ZONE}"].disks] == ["data", "node"]
    assert [each.name for each in found[f"regions/{REGION}"].disks] == ["wide"]
    assert found["zones/us-central1-a"].warning.code == "NO_RESULTS_ON_PAGE"
    pages = list(ask("Disks.aggregated_list", max_results=1).pages)
    assert len(pages) == 3
    assert [each.name for each in dict(ask("Instances.aggregated_list"))[f"zones/{ZONE}"].instances] == ["node"]


def test_nobody_is_asked_but_the_twin(ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client, given an endpoint, looks up no other name."""
    known = socket.getaddrinfo

    def guarded(host: Any, *more: Any, **others: Any) -> Any:
        assert host in ("127.0.0.1", "localhost", None), host
        return known(host, *more, **others)

    monkeypatch.setattr(socket, "getaddrinfo", guarded)
    ask.snapshot("s")
    assert [each.name for each in ask("Snapshots.list")] == ["s"]
