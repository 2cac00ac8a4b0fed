"""The twin itself: is it EC2's answers that real boto3 gets, and are the bytes those of the accepted call's instant?"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError

from tests.twins.ec2 import Twin
from tests.twins.ec2.disks import bytes_of_disks


def client(twin: Twin, region: str = "eu-central-1") -> Any:
    return boto3.client(
        "ec2",
        region_name=region,
        endpoint_url=twin.url,
        aws_access_key_id="AKIATWIN",
        aws_secret_access_key="secret",
        config=Config(retries={"total_max_attempts": 1}, read_timeout=10),
    )


@pytest.fixture
def twin() -> Iterator[Twin]:
    with Twin() as twin:
        yield twin


def refused(call: Any, **params: Any) -> str:
    with pytest.raises(ClientError) as error:
        call(**params)
    return str(error.value.response["Error"]["Code"])


def test_states_follow_the_clock(twin: Twin) -> None:
    twin.limits.upload_s, twin.limits.spacing_s, twin.limits.lag_s = 3600, 15, 30
    volume = twin.world.add_volume(twin.world.run_instance(), "/dev/sdf", with_bytes=False)
    ec2 = client(twin)
    made = ec2.create_snapshot(VolumeId=volume.id)
    assert made["State"] == "pending"
    assert refused(ec2.create_snapshot, VolumeId=volume.id) == "SnapshotCreationPerVolumeRateExceeded"
    assert not ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"], "seen at once"
    twin.clock.advance(31)
    (seen,) = ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]
    assert (seen["SnapshotId"], seen["State"], seen["Progress"]) == (made["SnapshotId"], "pending", "1%")
    for _ in range(4):
        ec2.create_snapshot(VolumeId=volume.id)
        twin.clock.advance(16)
    assert refused(ec2.create_snapshot, VolumeId=volume.id) == "ConcurrentSnapshotLimitExceeded"
    twin.clock.advance(3600)
    assert {s["State"] for s in ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]} == {"completed"}


def test_what_ec2_would_refuse_is_refused(twin: Twin) -> None:
    instance = twin.world.run_instance()
    volume = twin.world.add_volume(instance, "/dev/sdf", with_bytes=False)
    ec2 = client(twin)
    assert refused(ec2.describe_volumes, VolumeIds=["vol-0123"]) == "InvalidVolume.NotFound"
    elsewhere = client(twin, "eu-west-1")
    assert refused(elsewhere.describe_volumes, VolumeIds=[volume.id]) == "InvalidVolume.NotFound"
    assert refused(ec2.describe_volumes, Filters=[{"Name": "colour", "Values": ["red"]}]) == "InvalidParameterValue"
    wrong = {"InstanceId": instance.id, "ExcludeDataVolumeIds": ["vol-0123"]}
    assert refused(ec2.create_snapshots, InstanceSpecification=wrong) == "InvalidParameterValue"
    made = ec2.create_volume(AvailabilityZone="eu-central-1b", Size=1)["VolumeId"]
    attach = {"VolumeId": made, "InstanceId": instance.id}
    assert refused(ec2.attach_volume, Device="/dev/sdg", **attach) == "InvalidVolume.ZoneMismatch"
    made = ec2.create_volume(AvailabilityZone="eu-central-1a", Size=1)["VolumeId"]
    assert refused(ec2.attach_volume, **{**attach, "VolumeId": made}, Device="/dev/sdf") == "InvalidParameterValue"


def test_a_client_token_makes_one_volume(twin: Twin) -> None:
    ec2, wanted = client(twin), {"AvailabilityZone": "eu-central-1a", "Size": 1, "ClientToken": "t"}
    twin.fail("CreateVolume", "lost")
    with pytest.raises(ConnectionClosedError):
        ec2.create_volume(**wanted)
    made = ec2.create_volume(**wanted)
    assert [volume["VolumeId"] for volume in ec2.describe_volumes()["Volumes"]] == [made["VolumeId"]]
    assert refused(ec2.create_volume, **{**wanted, "Size": 2}) == "IdempotentParameterMismatch"


def test_buckets_and_pages(twin: Twin) -> None:
    twin.limits.buckets["DescribeSnapshots"] = (3, 1)
    volume = twin.world.add_volume(twin.world.run_instance(), "/dev/sdf", with_bytes=False)
    ec2 = client(twin)
    for _ in range(7):
        ec2.create_snapshot(VolumeId=volume.id)
    pages = list(ec2.get_paginator("describe_snapshots").paginate(OwnerIds=["self"], MaxResults=5))
    assert [len(page["Snapshots"]) for page in pages] == [5, 2]
    ec2.describe_snapshots()
    assert refused(ec2.describe_snapshots) == "RequestLimitExceeded"
    twin.clock.advance(1.01)
    ec2.describe_snapshots()


def test_what_is_not_granted_is_refused(twin: Twin) -> None:
    volume = twin.world.add_volume(twin.world.run_instance(), "/dev/sdf", with_bytes=False)
    ours = {"StringEquals": {"aws:RequestTag/ours": "true"}}
    born = {"StringEquals": {"ec2:CreateAction": "CreateSnapshot"}}
    anything = {"Effect": "Allow", "Resource": "*"}
    twin.policies = [
        {
            "Statement": [
                {"Action": "ec2:CreateSnapshot", "Effect": "Allow", "Resource": "arn:aws:ec2:*:*:volume/*"},
                {
                    "Action": "ec2:CreateSnapshot",
                    "Effect": "Allow",
                    "Resource": "arn:aws:ec2:*::snapshot/*",
                    "Condition": ours,
                },
                {**anything, "Action": ["ec2:CreateTags"], "Condition": born},
            ]
        }
    ]
    ec2 = client(twin)
    tags = [{"ResourceType": "snapshot", "Tags": [{"Key": "ours", "Value": "true"}]}]
    assert refused(ec2.describe_snapshots) == "UnauthorizedOperation"
    assert refused(ec2.create_snapshot, VolumeId=volume.id) == "UnauthorizedOperation"
    made = ec2.create_snapshot(VolumeId=volume.id, TagSpecifications=tags)["SnapshotId"]
    assert refused(ec2.delete_snapshot, SnapshotId=made) == "UnauthorizedOperation"
    assert refused(ec2.create_tags, Resources=[made], Tags=tags[0]["Tags"]) == "UnauthorizedOperation"


@pytest.mark.root
def test_the_bytes_are_those_of_the_instant(twin: Twin, tmp_path: Path) -> None:
    """Two disks written in order: the first is always as new as the second or newer by one, in a set. Two sequential
    snapshots are no set, and this test would see it: the control."""
    with bytes_of_disks(tmp_path) as disks, Twin(disks) as twin:
        instance = twin.world.run_instance()
        volumes = [twin.world.add_volume(instance, device).id for device in ("/dev/sdf", "/dev/sdg")]
        ec2 = client(twin)
        stop, started = threading.Event(), threading.Event()

        def write() -> None:
            opened = [os.open(disks.device(volume), os.O_RDWR) for volume in volumes]
            number = 0
            while not stop.is_set():
                number += 1
                for fd in opened:
                    os.pwrite(fd, b"%020d" % number, 0)
                    os.fsync(fd)
                started.set()
            for fd in opened:
                os.close(fd)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert started.wait(60)
            together = [
                ec2.create_snapshots(InstanceSpecification={"InstanceId": instance.id, "ExcludeBootVolume": True})
                for _ in range(4)
            ]
            one_by_one = []
            for _ in range(4):
                one_by_one.append([ec2.create_snapshot(VolumeId=volume) for volume in volumes])
        finally:
            stop.set()
            writer.join()

        def numbers(members: list[dict[str, Any]]) -> list[int]:
            where = {member["VolumeId"]: member["SnapshotId"] for member in members}
            return [int((disks.images / where[volume]).open("rb").read(20)) for volume in volumes]

        for each in together:
            first, second = numbers(each["Snapshots"])
            assert first - second in (0, 1)
        apart = [numbers(each) for each in one_by_one]
        assert any(first - second not in (0, 1) for first, second in apart), apart
