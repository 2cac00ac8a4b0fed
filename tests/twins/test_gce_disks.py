"""The twin's disks, instances and consistency groups, and their bytes: are they those of the instant?"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google.auth.transport._mtls_helper  # noqa: F401  (slow, and each client would ask for it)
import pytest
from google.api_core.exceptions import (
    BadRequest,
    NotFound,
)

from tests.twins.gce import Twin
from tests.twins.gce.disks import bytes_of_disks
from tests.twins.gce_client import REGION, ZONE, Asked, codes, reason, status

KEY = "projects/k/locations/europe-west3/keyRings/r/cryptoKeys/secret"


# -- disks and instances ------------------------------------------------------------------------------------------


def test_what_compute_engine_would_refuse_of_a_disk_is_refused(twin: Twin, ask: Asked) -> None:
    ask.snapshot("s")
    source = {"source_snapshot": "global/snapshots/s"}
    twin.world.snapshots["s"].size = 20

    def made(kind: str = "Disks", where: Mapping[str, str] | None = None, **wanted: Any) -> None:
        ask(f"{kind}.insert_unary", disk_resource={"name": "new", **wanted}, **(where or {"zone": ZONE}))

    region = {"region": REGION}
    refusals: list[tuple[str, dict[str, str] | None, dict[str, Any]]] = [
        ("Disks", None, {}),
        ("Disks", None, {**source, "size_gb": 10}),
        ("Disks", None, {**source, "type_": "zones/europe-west3-b/diskTypes/pd-ssd"}),
        ("Disks", None, {**source, "type_": f"zones/{ZONE}/diskTypes/floppy"}),
        ("Disks", None, {**source, "type_": f"zones/{ZONE}/diskTypes/pd-ssd", "provisioned_iops": 5000}),
        ("Disks", None, {**source, "replica_zones": [f"zones/{REGION}-a", f"zones/{REGION}-b"]}),
        ("Disks", None, {**source, "disk_encryption_key": {"kms_key_name": "secret"}}),
        ("RegionDisks", region, source),
        ("RegionDisks", region, {**source, "replica_zones": [f"zones/{REGION}-a", "zones/us-central1-a"]}),
    ]
    for kind, where, wanted in refusals:
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
    twin.world.add_disk("near", place=f"zones/{ZONE}")
    twin.world.add_disk("wide", place=f"regions/{REGION}", replica_zones=[f"{REGION}-b", f"{REGION}-c"])

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


@pytest.mark.root
def test_a_mounted_disk_may_be_pulled_away(tmp_path: Path) -> None:
    with bytes_of_disks(tmp_path / "disks") as disks, Twin(disks) as twin:
        ask, twin.here, twin.limits.pulls = Asked(twin), twin.world.run_instance(ZONE, "node"), True
        twin.world.add_disk("data", twin.here, "dev-data")
        link, point = disks.by_id / "google-dev-data", tmp_path / "point"
        subprocess.run(["mkfs.ext4", "-q", os.path.realpath(link)], check=True)
        point.mkdir()
        subprocess.run(["mount", os.path.realpath(link), str(point)], check=True)
        try:
            ask.done("Instances.detach_disk", zone=ZONE, instance="node", device_name="dev-data")
            assert not ask.disk().users and not link.is_symlink()
        finally:
            subprocess.run(["umount", str(point)], check=True)
