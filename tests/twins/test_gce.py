"""The twin itself: does Google's own client get Compute Engine's answers, are its bytes those of the instant?"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google.auth.transport._mtls_helper  # noqa: F401  (slow, and each client would ask for it)
import pytest
from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import (
    BadRequest,
    Conflict,
    Forbidden,
    GoogleAPICallError,
    NotFound,
    PreconditionFailed,
    ServiceUnavailable,
)
from google.auth.credentials import AnonymousCredentials
from google.cloud import compute_v1
from requests.exceptions import ConnectionError, ReadTimeout

from tests.support import CHECKOUT
from tests.twins.gce import Twin
from tests.twins.gce.disks import bytes_of_disks
from tests.twins.gce.filters import compiled
from tests.twins.gce.policy import holds

ZONE, REGION = "europe-west3-a", "europe-west3"
KEY = "projects/k/locations/europe-west3/keyRings/r/cryptoKeys/secret"


class Asked:
    """The real client, at the twin: `ask("Disks.get", zone=..., disk=...)`. Operations are waited for."""

    def __init__(self, twin: Twin) -> None:
        self.twin, self._clients = twin, {}  # type: ignore[var-annotated]

    def client(self, service: str) -> Any:
        if service not in self._clients:
            options = ClientOptions(api_endpoint=self.twin.url)
            kind = getattr(compute_v1, f"{service}Client")
            self._clients[service] = kind(credentials=AnonymousCredentials(), client_options=options)  # type: ignore[no-untyped-call]
        return self._clients[service]

    def __call__(self, action: str, **fields: Any) -> Any:
        service, _, method = action.partition(".")
        request = {"project": self.twin.world.project, **fields}
        return getattr(self.client(service), method)(request=request, retry=None, timeout=5)

    def done(self, action: str, **fields: Any) -> Any:
        """What it began, looked at again."""
        return self.look(self(f"{action}_unary", **fields))

    def look(self, operation: Any) -> Any:
        where = {key: getattr(operation, key).rpartition("/")[2] for key in ("zone", "region") if key in operation}
        return self(f"{next(iter(where), 'global').capitalize()}Operations.get", operation=operation.name, **where)

    def snapshot(self, name: str, disk: str = "data", **more: Any) -> Any:
        source = f"projects/{self.twin.world.project}/zones/{ZONE}/disks/{disk}"
        return self("Snapshots.insert_unary", snapshot_resource={"name": name, "source_disk": source, **more})

    def disk(self, name: str = "data") -> Any:
        return self("Disks.get", zone=ZONE, disk=name)


def status(operation: Any) -> str:
    return str(compute_v1.Operation.Status(operation.status).name)


def codes(operation: Any) -> list[str]:
    return [error.code for error in operation.error.errors]


@pytest.fixture
def twin() -> Iterator[Twin]:
    with Twin() as twin:
        twin.here = twin.world.run_instance(ZONE, "node")
        twin.world.add_disk("data", twin.here, "dev-data", with_bytes=False)
        yield twin


@pytest.fixture
def ask(twin: Twin) -> Asked:
    return Asked(twin)


def reason(error: pytest.ExceptionInfo[GoogleAPICallError]) -> str:
    return str(error.value.errors[0]["reason"])


# -- the wire -----------------------------------------------------------------------------------------------------


def raw(twin: Twin, method: str, path: str, body: object = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(twin.url + path, data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


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


# -- disks and instances ------------------------------------------------------------------------------------------


def test_what_compute_engine_would_refuse_of_a_disk_is_refused(twin: Twin, ask: Asked) -> None:
    ask.snapshot("s")
    source = {"source_snapshot": "global/snapshots/s"}
    twin.world.snapshots["s"].size = 20

    def made(kind: str = "Disks", where: dict[str, str] | None = None, **wanted: Any) -> None:
        ask(f"{kind}.insert_unary", disk_resource={"name": "new", **wanted}, **(where or {"zone": ZONE}))

    region = {"region": REGION}
    for kind, where, wanted in (
        ("Disks", None, {}),
        ("Disks", None, {**source, "size_gb": 10}),
        ("Disks", None, {**source, "type_": "zones/europe-west3-b/diskTypes/pd-ssd"}),
        ("Disks", None, {**source, "type_": f"zones/{ZONE}/diskTypes/floppy"}),
        ("Disks", None, {**source, "type_": f"zones/{ZONE}/diskTypes/pd-ssd", "provisioned_iops": 5000}),
        ("Disks", None, {**source, "replica_zones": [f"zones/{REGION}-a", f"zones/{REGION}-b"]}),
        ("Disks", None, {**source, "disk_encryption_key": {"kms_key_name": "secret"}}),
        ("RegionDisks", region, source),
        ("RegionDisks", region, {**source, "replica_zones": [f"zones/{REGION}-a", "zones/us-central1-a"]}),
    ):
        with pytest.raises(BadRequest) as refused:
            made(kind, where, **wanted)
        assert reason(refused) == "invalid", wanted
    twin.limits.upload_s = 100
    ask.snapshot("slow")
    with pytest.raises(BadRequest) as early:
        made(source_snapshot="global/snapshots/slow")
    assert reason(early) == "resourceNotReady"
    made(**source, type_=f"zones/{ZONE}/diskTypes/hyperdisk-balanced", provisioned_iops=5000)
    twin.limits.create_s = 60
    made("RegionDisks", region, name="wide", **source, replica_zones=[f"zones/{REGION}-a", f"zones/{REGION}-b"])
    found = ask("RegionDisks.get", region=REGION, disk="wide")
    assert (found.status, found.size_gb, len(found.replica_zones)) == ("RESTORING", 20, 2)
    with pytest.raises(BadRequest) as used:
        ask("Snapshots.delete_unary", snapshot="s")
    assert reason(used) == "resourceInUseByAnotherResource"
    twin.clock.advance(61)
    assert ask("RegionDisks.get", region=REGION, disk="wide").status == "READY"
    ask("Snapshots.delete_unary", snapshot="s")
    assert ask("RegionDisks.get", region=REGION, disk="wide").source_snapshot.endswith("global/snapshots/s")


def test_a_disk_attaches_where_it_is_and_once(twin: Twin, ask: Asked) -> None:
    far = twin.world.run_instance(f"{REGION}-b", "far")
    for name, place in (("near", ZONE), ("wide", None)):
        more = {} if place else {"place": f"regions/{REGION}", "replica_zones": [f"{REGION}-b", f"{REGION}-c"]}
        twin.world.add_disk(name, **({"place": f"zones/{place}"} if place else more))  # type: ignore[arg-type]

    def attach(instance: str, zone: str, source: str, **more: Any) -> None:
        body = {"source": source, **more}
        ask("Instances.attach_disk_unary", zone=zone, instance=instance, attached_disk_resource=body)

    near, wide = f"zones/{ZONE}/disks/near", f"regions/{REGION}/disks/wide"
    for instance, zone, source, more in (
        ("far", far.zone, near, {}),
        ("node", ZONE, wide, {}),
        ("node", ZONE, near, {"device_name": "dev-data"}),
        ("node", ZONE, near, {"mode": "SIDEWAYS"}),
    ):
        with pytest.raises(BadRequest):
            attach(instance, zone, source, **more)
    attach("node", ZONE, near, device_name="ours", auto_delete=True)
    attach("far", far.zone, wide)
    with pytest.raises(BadRequest) as used:
        attach("node", ZONE, near, device_name="again")
    assert reason(used) == "resourceInUseByAnotherResource"
    with pytest.raises(BadRequest) as used:
        ask("Disks.delete_unary", zone=ZONE, disk="near")
    assert reason(used) == "resourceInUseByAnotherResource"
    found = {each.device_name: each for each in ask("Instances.get", zone=ZONE, instance="node").disks}
    assert found["ours"].source == ask.disk("near").self_link and found["ours"].auto_delete
    assert [each.device_name for each in ask("Instances.get", zone=far.zone, instance="far").disks][1] == (
        "persistent-disk-1"
    )
    assert ask.disk("near").users[0].endswith(f"zones/{ZONE}/instances/node")
    ask("Instances.detach_disk_unary", zone=ZONE, instance="node", device_name="ours")
    with pytest.raises(BadRequest):
        ask("Instances.detach_disk_unary", zone=ZONE, instance="node", device_name="ours")
    with pytest.raises(BadRequest):  # it runs from that one
        ask("Instances.detach_disk_unary", zone=ZONE, instance="node", device_name="persistent-disk-0")
    twin.limits.operate_s = 10
    ask("Disks.delete_unary", zone=ZONE, disk="near")
    assert ask.disk("near").status == "DELETING"
    twin.clock.advance(11)
    with pytest.raises(NotFound):
        ask.disk("near")


def test_keys_go_along_and_may_be_denied(twin: Twin, ask: Asked) -> None:
    twin.world.disks[f"zones/{ZONE}/disks/data"].key = KEY
    ask.snapshot("s")
    assert ask("Snapshots.get", snapshot="s").snapshot_encryption_key.kms_key_name == f"{KEY}/cryptoKeyVersions/1"
    wanted = {"name": "new", "source_snapshot": "global/snapshots/s", "disk_encryption_key": {"kms_key_name": KEY}}
    twin.limits.keys_denied = {KEY}
    with pytest.raises(BadRequest) as denied:
        ask("Disks.insert_unary", zone=ZONE, disk_resource=wanted)
    assert reason(denied) == "kmsPermissionDenied" and "cloudkms.cryptoKeyVersions.useToEncrypt" in str(denied.value)
    twin.limits.keys_denied = set()
    ask("Disks.insert_unary", zone=ZONE, disk_resource=wanted)
    assert ask.disk("new").disk_encryption_key.kms_key_name == f"{KEY}/cryptoKeyVersions/1"


def test_a_lost_zone_leaves_what_is_not_in_it(twin: Twin, ask: Asked) -> None:
    ask.snapshot("s")
    twin.world.lose_zone(ZONE)
    with pytest.raises(BadRequest):
        ask.disk()
    wanted = {"name": "data", "source_snapshot": "global/snapshots/s"}
    ask("Disks.insert_unary", zone=f"{REGION}-b", disk_resource=wanted)
    assert ask("Disks.get", zone=f"{REGION}-b", disk="data").status == "READY"


# -- consistency groups -------------------------------------------------------------------------------------------


def grouped(twin: Twin, ask: Asked, names: tuple[str, ...] = ("data", "logs")) -> str:
    """A group of these disks, made by the API; its policy's path."""
    body = {"name": "group", "disk_consistency_group_policy": {}}
    ask("ResourcePolicies.insert_unary", region=REGION, resource_policy_resource=body)
    policy = f"regions/{REGION}/resourcePolicies/group"
    for name in names:
        if f"zones/{ZONE}/disks/{name}" not in twin.world.disks:
            twin.world.add_disk(name, twin.here, f"dev-{name}", with_bytes=False)
        asked = {"resource_policies": [policy]}
        fields = {"disks_add_resource_policies_request_resource": asked}
        ask("Disks.add_resource_policies_unary", zone=ZONE, disk=name, **fields)
    return policy


def instant(ask: Asked, name: str = "now", policy: str = f"regions/{REGION}/resourcePolicies/group") -> Any:
    body = {"name": name, "source_consistency_group": policy}
    return ask.done("InstantSnapshotGroups.insert", zone=ZONE, instant_snapshot_group_resource=body)


def test_a_group_is_taken_at_one_instant_and_snapshots_are_made_of_it(twin: Twin, ask: Asked) -> None:
    grouped(twin, ask)
    assert not codes(instant(ask))
    found = list(ask("InstantSnapshots.list", zone=ZONE))
    assert {each.source_disk.rpartition("/")[2] for each in found} == {"data", "logs"}
    assert {each.source_instant_snapshot_group.rpartition("/")[2] for each in found} == {"now"}
    assert len({each.creation_timestamp for each in found}) == 1
    twin.limits.upload_s = 60
    for each in found:
        made = {"name": f"of-{each.source_disk.rpartition('/')[2]}", "source_instant_snapshot": each.self_link}
        ask("Snapshots.insert_unary", snapshot_resource=made)
    about = ask("Snapshots.get", snapshot="of-logs")
    assert about.source_disk.endswith("disks/logs") and "/instantSnapshots/" in about.source_instant_snapshot
    gone = {"zone": ZONE, "instant_snapshot_group": "now"}
    with pytest.raises(BadRequest) as used:
        ask("InstantSnapshotGroups.delete_unary", **gone)
    assert reason(used) == "resourceInUseByAnotherResource"
    twin.clock.advance(61)
    ask("InstantSnapshotGroups.delete_unary", **gone)
    assert not twin.world.instants and not twin.world.groups


def test_rules_of_groups(twin: Twin, ask: Asked) -> None:
    grouped(twin, ask)
    twin.world.add_policy(REGION, "daily", consistency_group=False)
    twin.world.add_policy("us-central1", "far")
    for policy in ("daily", "empty"):
        if policy == "empty":
            twin.world.add_policy(REGION, "empty")
        with pytest.raises(BadRequest):
            instant(ask, policy=f"regions/{REGION}/resourcePolicies/{policy}")
    for wrong in ("regions/us-central1/resourcePolicies/far", f"regions/{REGION}/resourcePolicies/empty"):
        asked = {"resource_policies": [wrong]}  # in another region; a second group
        with pytest.raises(BadRequest):
            fields = {"disks_add_resource_policies_request_resource": asked}
            ask("Disks.add_resource_policies_unary", zone=ZONE, disk="data", **fields)
    twin.limits.instant_spacing_s, twin.limits.instants = 30, 2
    assert not codes(instant(ask, "one"))
    assert codes(instant(ask, "two")) == ["RESOURCE_OPERATION_RATE_EXCEEDED"]
    twin.clock.advance(31)
    assert not codes(instant(ask, "two"))
    twin.clock.advance(31)
    assert codes(instant(ask, "three")) == ["LIMIT_EXCEEDED"]
    assert set(twin.world.groups) == {f"zones/{ZONE}/instantSnapshotGroups/{name}" for name in ("one", "two")}
    asked = {"resource_policies": [f"regions/{REGION}/resourcePolicies/group"]}
    fields = {"disks_remove_resource_policies_request_resource": asked}
    ask("Disks.remove_resource_policies_unary", zone=ZONE, disk="logs", **fields)
    assert not ask.disk("logs").resource_policies
    # Instant snapshots die with their disk.
    disk = twin.world.disks[f"zones/{ZONE}/disks/logs"]
    assert twin.here is not None
    ask("Instances.detach_disk_unary", zone=ZONE, instance="node", device_name="dev-logs")
    ask("Disks.delete_unary", zone=ZONE, disk="logs")
    assert not [each for each in twin.world.instants.values() if each.source_id == disk.id]


def test_a_member_may_be_missing(twin: Twin, ask: Asked) -> None:
    grouped(twin, ask)
    twin.fail("instantSnapshotGroups.insert", "partial")
    assert not codes(instant(ask))
    assert len(list(ask("InstantSnapshots.list", zone=ZONE))) == 1


def test_disks_of_a_group_at_once(twin: Twin, ask: Asked) -> None:
    grouped(twin, ask)
    instant(ask)
    link = f"zones/{ZONE}/instantSnapshotGroups/now"
    body = {"instant_snapshot_group_parameters": {"source_instant_snapshot_group": link}}
    assert not codes(ask.done("Disks.bulk_insert", zone=ZONE, bulk_insert_disk_resource_resource=body))
    made = [each for each in ask("Disks.list", zone=ZONE) if each.source_instant_snapshot]
    assert sorted(re.sub(r"-[0-9a-f]{8}$", "", each.name) for each in made) == ["data", "logs"]


def test_a_single_instant_snapshot(twin: Twin, ask: Asked) -> None:
    body = {"name": "i", "source_disk": f"zones/{ZONE}/disks/data"}
    ask("InstantSnapshots.insert_unary", zone=ZONE, instant_snapshot_resource=body)
    made = {"name": "new", "source_instant_snapshot": f"zones/{ZONE}/instantSnapshots/i"}
    with pytest.raises(BadRequest):  # they stay where they are
        ask("Disks.insert_unary", zone=f"{REGION}-b", disk_resource=made)
    ask("Disks.insert_unary", zone=ZONE, disk_resource=made)
    ask("InstantSnapshots.delete_unary", zone=ZONE, instant_snapshot="i")
    assert not [each for _, scoped in ask("InstantSnapshots.aggregated_list") for each in scoped.instant_snapshots]


# -- faults -------------------------------------------------------------------------------------------------------


def test_faults_are_what_they_say(twin: Twin, ask: Asked) -> None:
    twin.fail("disks.get", "refuse", code="backendError", forever=True)
    for _ in range(3):
        with pytest.raises(ServiceUnavailable):
            ask.disk()
    twin.faults.clear()
    ask.disk()
    twin.fail("snapshots.insert", "refuse", code="forbidden", message="no", nth=2)
    ask.snapshot("s1")
    with pytest.raises(Forbidden):
        ask.snapshot("s2")
    twin.fail("snapshots.insert", "broken")
    with pytest.raises(GoogleAPICallError) as broken:
        ask.snapshot("s3")
    assert broken.value.code == 500
    twin.fail("snapshots.insert", "lost")
    with pytest.raises(ConnectionError):
        ask.snapshot("s4")
    twin.fail("snapshots.insert", "hang")
    with pytest.raises(ReadTimeout):
        ask("Snapshots.insert_unary", snapshot_resource={"name": "s5", "source_disk": ask.disk().self_link})
    assert set(twin.world.snapshots) == {"s1", "s3", "s4"}
    twin.fail("snapshots.insert", "operation", code="RESOURCE_NOT_READY")
    failed = ask.look(ask.snapshot("s6"))
    assert (codes(failed), failed.http_error_status_code) == (["RESOURCE_NOT_READY"], 400)
    twin.fail("snapshots.insert", "vanish")
    assert not codes(ask.look(ask.snapshot("s7")))
    assert set(twin.world.snapshots) == {"s1", "s3", "s4"}
    twin.limits.upload_s = 60
    twin.fail("snapshots.insert", "upload")
    ask.snapshot("s8")
    assert ask("Snapshots.get", snapshot="s8").status == "UPLOADING"
    twin.clock.advance(61)
    assert ask("Snapshots.get", snapshot="s8").status == "FAILED"


_DIES = """
import sys
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import compute_v1
client = compute_v1.SnapshotsClient(
    credentials=AnonymousCredentials(), client_options=ClientOptions(api_endpoint=sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
client.insert_unary(request={"project": "twin-project", "snapshot_resource": {
    "name": "s", "source_disk": "zones/europe-west3-a/disks/data"}}, retry=None, timeout=5)
"""


@pytest.mark.parametrize(("kind", "there"), [("kill", set()), ("kill-after", {"s"})])
def test_the_caller_is_killed_at_the_call(twin: Twin, kind: str, there: set[str]) -> None:
    argv = [sys.executable, "-c", _DIES, twin.url]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, cwd=CHECKOUT) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"
        twin.fail("snapshots.insert", kind, pid=process.pid)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(30) == -9
    assert set(twin.world.snapshots) == there


# -- who may ------------------------------------------------------------------------------------------------------


def test_what_is_not_granted_is_refused(twin: Twin, ask: Asked) -> None:
    twin.permissions = {"compute.disks.createSnapshot", "compute.snapshots.create"}
    with pytest.raises(Forbidden) as refused:
        ask.disk()
    assert reason(refused) == "forbidden"
    assert f"'compute.disks.get' permission for 'projects/twin-project/zones/{ZONE}/disks/data'" in str(refused.value)
    with pytest.raises(Forbidden, match=r"compute\.snapshots\.setLabels"):  # born with labels is setting them
        ask.snapshot("s", labels={"a": "b"})
    ask.snapshot("s")
    for call in (
        lambda: ask("GlobalOperations.get", operation=next(iter(twin.world.operations))),
        lambda: ask("Snapshots.delete_unary", snapshot="s"),
        lambda: list(ask("Snapshots.list")),
        lambda: ask("Disks.insert_unary", zone=ZONE, disk_resource={"name": "new", "size_gb": 10}),
        lambda: ask("Instances.detach_disk_unary", zone=ZONE, instance="node", device_name="dev-data"),
    ):
        with pytest.raises(Forbidden):
            call()
    ours = 'resource.name.startsWith("projects/twin-project/global/snapshots/s2")'
    twin.permissions = [
        {"permissions": {"compute.disks.createSnapshot", "compute.snapshots.create"}},
        {"permissions": {"compute.snapshots.delete"}, "condition": ours},
    ]
    ask.snapshot("s2")
    with pytest.raises(Forbidden):
        ask("Snapshots.delete_unary", snapshot="s")
    ask("Snapshots.delete_unary", snapshot="s2")
    assert set(twin.world.snapshots) == {"s"}


def test_conditions() -> None:
    disk = "projects/p/zones/z/disks/a2-0"
    assert holds('resource.type == "compute.googleapis.com/Disk" && resource.name.endsWith("-0")', disk)
    assert not holds('!(resource.name.startsWith("projects/p/zones/z/disks/a2"))', disk)
    assert holds('resource.type != "compute.googleapis.com/Disk" || resource.name == "' + disk + '"', disk)
    assert not holds('resource.name.startsWith("projects/p/zones")', "projects/p")
    with pytest.raises(AssertionError):
        holds('resource.matchTag("a", "b")', disk)


def test_tokens(twin: Twin) -> None:
    """Without one, one of the metadata server's, one that the account signed; and none that is another's or too old."""
    twin.anonymous = False
    assert raw(twin, "GET", "/compute/v1/projects/twin-project/global/snapshots")[0] == 401
    for keys, expired in ((True, False), (False, False), (False, True)):
        twin.expired = expired
        inner = (
            "import os; from google.cloud import compute_v1; from google.api_core.client_options import ClientOptions\n"
            "client = compute_v1.DisksClient(client_options=ClientOptions(api_endpoint=os.environ['GCE_ENDPOINT']))\n"
            "import google.auth; project = google.auth.default()[1]\n"
            f"print(client.get(project=project, zone='{ZONE}', disk='data', timeout=5, retry=None).status)\n"
        )
        environment = {"PATH": os.environ["PATH"], **twin.environment(keys=keys)}
        argv = [sys.executable, "-c", inner]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.stdout == "READY\n") is not expired, done.stderr
        if expired:
            assert "Unauthorized: 401" in done.stderr
    forged = urllib.request.Request(f"{twin.url}/compute/v1/projects/twin-project/global/snapshots")
    forged.add_header("Authorization", "Bearer eyJhbGciOiJub25lIn0.e30.")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(forged, timeout=5)


def test_the_metadata_server(twin: Twin) -> None:
    def get(path: str, **headers: str) -> tuple[int, str]:
        request = urllib.request.Request(twin.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                assert answer.headers["Metadata-Flavor"] == "Google"
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    flavor = {"Metadata-Flavor": "Google"}
    top = "/computeMetadata/v1"
    assert twin.here is not None
    assert get(f"{top}/instance/name")[0] == 403
    assert get(f"{top}/instance/name", **flavor) == (200, "node")
    assert get(f"{top}/instance/id", **flavor) == (200, twin.here.id)
    assert get(f"{top}/instance/zone", **flavor) == (200, f"projects/123456789012/zones/{ZONE}")
    assert get(f"{top}/project/project-id", **flavor) == (200, "twin-project")
    assert get(f"{top}/instance/disks/1/device-name", **flavor)[0] == 404
    whole = json.loads(get(f"{top}/instance/?recursive=true", **flavor)[1])
    assert [each["deviceName"] for each in whole["disks"]] == ["persistent-disk-0", "dev-data"]
    assert json.loads(get(f"{top}/instance/service-accounts/default/token", **flavor)[1])["token_type"] == "Bearer"


# -- bytes --------------------------------------------------------------------------------------------------------


class Ordered:
    """A writer to two disks: the first is always as new as the second, or newer by one."""

    def __init__(self, devices: list[str]) -> None:
        self._devices, self._stop, self._started = devices, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> Ordered:
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _write(self) -> None:
        opened = [os.open(device, os.O_RDWR) for device in self._devices]
        number = 0
        while not self._stop.is_set():
            number += 1
            for fd in opened:
                os.pwrite(fd, b"%020d" % number, 0)
                os.fsync(fd)
            self._started.set()
        for fd in opened:
            os.close(fd)


@pytest.mark.root
def test_a_group_is_one_instant_also_under_writers(tmp_path: Path) -> None:
    """Two sequential snapshots are none, and this test would see it: the control."""
    with bytes_of_disks(tmp_path) as disks, Twin(disks) as twin:
        ask, twin.here = Asked(twin), twin.world.run_instance(ZONE, "node")
        made = [twin.world.add_disk(name, twin.here, f"dev-{name}") for name in ("data", "logs")]
        grouped(twin, ask)
        links = [os.path.realpath(disks.by_id / f"google-dev-{disk.name}") for disk in made]
        with Ordered(links):
            for n in range(4):
                assert not codes(instant(ask, f"g{n}"))
            for n in range(4):
                for disk in made:
                    ask.snapshot(f"apart-{n}-{disk.name}", disk.name)
        for each in ask("InstantSnapshots.list", zone=ZONE):
            group, of = each.source_instant_snapshot_group.rpartition("/")[2], each.source_disk.rpartition("/")[2]
            body = {"name": f"together-{group[1:]}-{of}", "source_instant_snapshot": each.self_link}
            ask("Snapshots.insert_unary", snapshot_resource=body)

        def number(name: str) -> int:
            return int((disks.images / twin.world.snapshots[name].bytes).open("rb").read(20))

        def apart(kind: str) -> list[int]:
            return [number(f"{kind}-{n}-data") - number(f"{kind}-{n}-logs") for n in range(4)]

        assert set(apart("together")) <= {0, 1}
        assert not set(apart("apart")) <= {0, 1}


@pytest.mark.root
def test_the_image_is_fixed_when_creating_ends_not_when_the_call_returns(tmp_path: Path) -> None:
    """Whoever lets the writers go on when the insert returns has their writes in the image."""
    with bytes_of_disks(tmp_path) as disks, Twin(disks) as twin:
        ask, twin.here = Asked(twin), twin.world.run_instance(ZONE, "node")
        twin.world.add_disk("data", twin.here, "dev-data")
        device = os.path.realpath(disks.by_id / "google-dev-data")

        def write(text: bytes) -> None:
            fd = os.open(device, os.O_RDWR)
            os.pwrite(fd, text, 0)
            os.fsync(fd)
            os.close(fd)

        twin.limits.capture_s = 0.5
        write(b"before")
        ask.snapshot("s")
        write(b"during")
        time.sleep(1)  # nobody asks: it is done all the same
        write(b"after!")
        assert ask("Snapshots.get", snapshot="s").status == "READY"
        ask("Disks.insert_unary", zone=ZONE, disk_resource={"name": "new", "source_snapshot": "global/snapshots/s"})
        made = twin.world.disks[f"zones/{ZONE}/disks/new"]
        assert (disks.live / made.bytes).open("rb").read(6) == b"during"


@pytest.mark.root
def test_a_mounted_disk_does_not_let_go(tmp_path: Path) -> None:
    with bytes_of_disks(tmp_path / "disks") as disks, Twin(disks) as twin:
        ask, twin.here = Asked(twin), twin.world.run_instance(ZONE, "node")
        twin.world.add_disk("data", twin.here, "dev-data")
        link, point = disks.by_id / "google-dev-data", tmp_path / "point"
        subprocess.run(["mkfs.ext4", "-q", os.path.realpath(link)], check=True)
        point.mkdir()
        subprocess.run(["mount", os.path.realpath(link), str(point)], check=True)
        try:
            begun = ask("Instances.detach_disk_unary", zone=ZONE, instance="node", device_name="dev-data")
            time.sleep(0.3)
            assert status(ask.look(begun)) == "RUNNING" and link.is_symlink() and ask.disk().users
        finally:
            subprocess.run(["umount", str(point)], check=True)
        until = time.monotonic() + 10
        while link.is_symlink() and time.monotonic() < until:
            time.sleep(0.05)
        assert status(ask.look(begun)) == "DONE" and not link.is_symlink() and not ask.disk().users
        # And a disk of a snapshot of it comes up under the device name that it is given.
        ask.snapshot("s")
        ask("Disks.insert_unary", zone=ZONE, disk_resource={"name": "new", "source_snapshot": "global/snapshots/s"})
        body = {"source": f"zones/{ZONE}/disks/new", "device_name": "ours", "mode": "READ_ONLY"}
        ask("Instances.attach_disk_unary", zone=ZONE, instance="node", attached_disk_resource=body)
        device = os.path.realpath(disks.by_id / "google-ours")
        subprocess.run(["mount", "-o", "ro,noload", device, str(point)], check=True)
        subprocess.run(["umount", str(point)], check=True)


def test_nobody_is_asked_but_the_twin(ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client, given an endpoint, looks up no other name."""
    known = socket.getaddrinfo

    def guarded(host: Any, *more: Any, **others: Any) -> Any:
        assert host in ("127.0.0.1", "localhost", None), host
        return known(host, *more, **others)

    monkeypatch.setattr(socket, "getaddrinfo", guarded)
    ask.snapshot("s")
    assert [each.name for each in ask("Snapshots.list")] == ["s"]
