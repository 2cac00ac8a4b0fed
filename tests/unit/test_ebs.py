"""The ebs provider where it isn't the contract's: other file systems, partitions, late listings, who asks AWS at all;
and what moto, a second judge of the wire format, says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from providers.ebs import EbsProvider
from providers.ebs.tags import BY_ID, VENDOR, serial
from snapshotter.core.errors import BusyError, PreconditionError, StorageError
from snapshotter.core.model import (
    Access,
    Grade,
    Hold,
    ImageState,
    Quiesce,
    Volume,
    new_attachment_id,
    utc_now,
)
from snapshotter.host.disks import Disks, Part
from snapshotter.host.mounts import Mount, mount_of
from snapshotter.nodes.config import Node
from snapshotter.provider import Settings
from snapshotter.testing.conformance.steps import attach, content_of, ready, seal, take
from snapshotter.testing.harness import describe, fill, make_birth, ruin
from snapshotter.verbs import plan
from tests.support import CHECKOUT
from tests.unit.cloud_command import DisksHere
from tests.unit.ebs_kit import ebs_harness, environment


@pytest.mark.root
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_copy_is_mounted_beside_its_origin(kind: str) -> None:
    with ebs_harness(kind) as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        content = describe(volume.path)
        birth = take(harness.provider(), harness, [volume])
        ruin(volume.path)
        (found,) = ready(harness.provider(), harness, birth.set_id)
        for access in Access:
            attached = attach(harness, found, access)
            assert describe(attached.path, writable=access is Access.WRITABLE) is not None
            attached.end()
        assert content_of(harness, found) == content


@pytest.mark.root
def test_a_btrfs_is_not_brought_beside_its_origin() -> None:
    with ebs_harness("btrfs") as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        provider = harness.provider()
        birth = take(provider, harness, [volume])
        (found,) = ready(provider, harness, birth.set_id)
        before = harness.objects()
        with pytest.raises(PreconditionError, match="btrfs"):
            provider.attach(found, new_attachment_id(utc_now()), Access.WRITABLE, harness.destination())
        assert harness.objects() == before, "the kernel may not even see it"
        # Elsewhere it can be restored: here, when its origin is gone.
        content = describe(volume.path)
        with harness.unmounted():
            assert content_of(harness, found) == content


@pytest.mark.root
def test_a_btrfs_over_two_devices_is_one_volume() -> None:
    with ebs_harness("btrfs") as harness:
        volume = harness.volume(devices=2)
        assert volume.path is not None
        names = volume.id.split("+")
        assert names == sorted(names) and len(names) == 2
        fill(volume.path)
        content = describe(volume.path)
        provider = harness.provider()
        birth = take(provider, harness, [volume])
        assert len([each for each in harness.twin.world.snapshots.values() if each.gone is None]) == 2
        assert harness.twin.count()["CreateSnapshots"] == 1
        seal(provider, birth)
        ruin(volume.path)
        (found,) = ready(provider, harness, birth.set_id)
        assert (found.state, found.volume, found.marks.get("sealed") is not None) == (ImageState.READY, volume.id, True)
        with pytest.raises(PreconditionError, match="btrfs"):
            harness.provider().attach(found, new_attachment_id(utc_now()), Access.WRITABLE, harness.destination())
        with pytest.raises(PreconditionError, match="several volumes"):
            harness.provider().swap("w20261122t100630z-5f3a9c", found, volume)
        # On another instance, bit for bit, and the origin as well as the image are as they were.
        harness.replaced()
        for access in Access:
            attached = attach(harness, found, access)
            assert describe(attached.path, writable=access is Access.WRITABLE) is not None
            (listed,) = harness.provider().attachments()
            assert (listed.id, listed.member) == (attached.id, 0)
            attached.end()
        assert content_of(harness, found) == content
        # Half of it is no image.
        harness.twin.world.snapshots[found.id.split("+")[1]].error = "An internal error"
        (half,) = harness.provider().snapshots(birth.set_id)
        assert half.state is ImageState.INVALID
        harness.provider().delete(birth.set_id)
        assert not harness.objects()


@pytest.mark.root
def test_a_swap_keeps_the_node_in_its_fleet() -> None:
    """What runs the fleet's schedule finds its nodes by these tags."""
    with ebs_harness() as harness:
        volume, swap_id, again = harness.volume(), "w20261122t100630z-5f3a9c", "w20261122t100640z-5f3a9c"
        assert volume.path is not None
        fill(volume.path)
        theirs = {"team": "nodes", "snapshotter:node": "validator-1", "snapshotter:type": "validator"}
        harness.twin.world.volumes[volume.id].tagged.append((0.0, theirs))
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        harness.provider().swap(swap_id, found, volume)
        (node,) = harness.provider().tagged()
        assert (node.node, node.type) == ("validator-1", "validator")
        assert [each.id for each in node.volumes] != [volume.id]
        harness.provider().swap_back(swap_id)
        assert [each.volumes for each in harness.provider().tagged()] == [(Volume("ebs", volume.id),)]
        harness.provider().swap(again, found, volume)
        harness.provider().swap_commit(again)
        (new,) = [each for each in harness.twin.world.volumes.values() if each.gone is None and each.tags.get("team")]
        assert new.id != volume.id and new.tags == theirs


@pytest.mark.root
@pytest.mark.parametrize("ends", [True, False])
def test_a_swap_says_that_the_disk_no_longer_goes_with_the_instance(ends: bool) -> None:
    with ebs_harness() as harness:
        volume = harness.volume()
        origin = harness.twin.world.volumes[volume.id].attached
        assert origin is not None
        origin.ends_with_instance = ends
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        provider = harness.provider()
        provider.swap("w20261122t100630z-5f3a9c", found, volume)
        assert len(provider.notes) == ends
        for note in provider.notes:
            assert volume.id in note and harness.instance.id in note and f"DeviceName={origin.device}," in note


@pytest.mark.root
@pytest.mark.parametrize("action", ["DetachVolume", "AttachVolume"])
def test_a_node_in_the_middle_of_a_swap_is_not_taken_without_that_volume(action: str) -> None:
    """The swap is killed when the origin is set aside but attached, or when it is detached: nothing of it is seen on
    the instance then, and the other volume alone would pass for the whole node."""
    with ebs_harness() as harness:
        volume, other, swap_id = harness.volume(), harness.volume(), "w20261122t100630z-5f3a9c"
        theirs = {"team": "nodes", "snapshotter:node": "validator-1"}
        for each in (volume, other):
            harness.twin.world.volumes[each.id].tagged.append((0.0, theirs))
        here, both = harness.instance.id, sorted([volume.id, other.id])
        selects = ({"instance": here}, {"tags": {"team": "nodes"}}, {"volumes": both})
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        harness.twin.fail(action, "refuse", code="UnsupportedOperation")
        with pytest.raises(StorageError):
            harness.provider().swap(swap_id, found, volume)
        for select in selects:
            with pytest.raises(BusyError, match="restore in place") as refused:
                harness.provider().find(select)
            assert refused.value.object == volume.id and refused.value.cure
        (node,) = harness.provider().tagged()
        assert sorted(each.id for each in node.volumes) == both and node.instance == here
        harness.provider().swap_back(swap_id)
        assert [[each.id for each in harness.provider().find(select)] for select in selects] == [both] * 3
        swap_id = "w20261122t100640z-5f3a9c"
        harness.provider().swap(swap_id, found, volume)  # all of it is there: another disk in the origin's place
        (node,) = harness.provider().tagged()
        for select in selects[:2]:
            now = [each.id for each in harness.provider().find(select)]
            assert len(now) == 2 and volume.id not in now and now == [each.id for each in node.volumes]
        harness.provider().swap_back(swap_id)


@pytest.mark.root
def test_a_committed_swap_that_was_killed_before_its_last_tags_keeps_no_node_busy() -> None:
    """Its disk is detached later, by a person."""
    with ebs_harness() as harness:
        volume, other, swap_id = harness.volume(), harness.volume(), "w20261122t100630z-5f3a9c"
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        harness.provider().swap(swap_id, found, volume)
        harness.twin.fail("DeleteTags", "refuse", code="UnauthorizedOperation")
        with pytest.raises(PreconditionError):
            harness.provider().swap_commit(swap_id)
        (new,) = [each for each in harness.twin.world.volumes.values() if "snapshotter:committed" in each.tags]
        assert harness.twin.world.volumes[volume.id].gone is not None
        selected = {"instance": harness.instance.id}
        assert {each.id for each in harness.provider().find(selected)} == {new.id, other.id}
        new.attached = None
        assert [each.id for each in harness.provider().find(selected)] == [other.id]


class Mapped(DisksHere, frozen=True):
    """As sysfs would show a logical volume over these disks (`test_disks` has the real shape)."""

    over: tuple[str, ...] = ()

    def below(self, mount: Mount) -> list[Part]:
        return [Part(disk) for disk in self.over]

    def between(self, mount: Mount) -> str:
        return "LVM2_member"


@pytest.mark.root
def test_what_lies_on_lvm_is_taken_and_comes_back_elsewhere() -> None:
    """All the disks below it are one volume of the set. Beside its origin a volume group's names are there twice."""
    with ebs_harness() as harness:
        one, two = harness.volume(), harness.volume()
        assert one.path is not None
        fill(one.path)
        disks = [harness.provider().disks.find(serial(each.id), BY_ID) or "" for each in (two, one)]
        mapped = Mapped(by_id=str(harness.disks.by_id), maker=VENDOR, over=(*disks, disks[0]))
        provider = harness.provider()
        provider.disks = mapped
        volume = provider.claim(mount_of(one.path), one.path)
        assert volume == Volume("ebs", "+".join(sorted((one.id, two.id))), one.path, "ext4")
        birth = take(provider, harness, [volume])
        seal(provider, birth)
        assert harness.twin.count()["CreateSnapshots"] == 1
        (found,) = ready(harness.provider(), harness, birth.set_id)
        objects = harness.objects()
        for refused in (
            lambda: provider.attach(found, new_attachment_id(utc_now()), Access.WRITABLE, harness.destination()),
            lambda: provider.swap("w20261122t100630z-5f3a9c", found, volume),
            lambda: harness.provider(instance=harness.instance.id).attach_away(found, new_attachment_id(utc_now())),
        ):
            with pytest.raises(PreconditionError) as told:
                refused()
            assert told.value.cure
        assert harness.objects() == objects
        other, attachment_id = harness.twin.world.run_instance(), new_attachment_id(utc_now())
        harness.origins |= set(harness.twin.world.volumes)
        made = harness.provider(instance=other.id).attach_away(found, attachment_id)
        for new, image in zip(made.volume.split("+"), found.id.split("+"), strict=True):
            subprocess.run(["cmp", harness.disks.live / new, harness.disks.images / image], check=True)
        harness.provider().detach(attachment_id)
        harness.provider().delete(birth.set_id)


@pytest.mark.root
def test_the_root_file_system_is_taken_without_a_freeze(tmp_path: Path) -> None:
    """It would freeze us too: nobody is held, and the grade says so. What can't be frozen elsewhere is paused."""
    provider, node = EbsProvider(Settings("/nonexistent")), Node(name="n", path="/data")
    for top, fstype, instant, quiesce, grade in (
        ("/", "ext4", 1, Quiesce.NONE, Grade.CRASH),
        ("/dev/shm", "ext4", 1, Quiesce.FREEZE, Grade.FILESYSTEM),
        ("/", "btrfs", 1, Quiesce.PAUSE, Grade.FILESYSTEM),
        (None, "", 1, Quiesce.FREEZE, Grade.FILESYSTEM),
    ):
        volumes = [Volume("ebs", "vol-0a", top, fstype)] * instant
        chosen = plan._quiesce(node, None, [provider] * instant, volumes)
        assert (chosen, plan._grade(chosen, [provider], volumes)) == (quiesce, grade), top


@pytest.mark.root
def test_one_of_two_devices_without_its_snapshot_is_no_image() -> None:
    with ebs_harness("btrfs") as harness:
        volume = harness.volume(devices=2)
        assert volume.path is not None
        fill(volume.path)
        provider = harness.provider()
        birth = take(provider, harness, [volume])
        (found,) = ready(provider, harness, birth.set_id)
        gone = found.id.split("+")[0]
        harness.twin.world.snapshots[gone].gone = harness.twin.clock.now()
        (left,) = harness.provider().snapshots(birth.set_id)
        assert left.state is ImageState.INVALID and volume.id.split("+")[0] in left.why
        with pytest.raises(StorageError):
            harness.provider().mark(birth.set_id, {"sealed": "20261122t100630z"})


@pytest.mark.root
def test_a_restore_where_ec2_lists_late() -> None:
    with ebs_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        before, content = harness.objects(), describe(volume.path)
        harness.twin.clock.advance(3600)
        harness.twin.limits.lag_s = 3.0
        harness.twin.limits.create_s = 2.0
        provider = harness.provider()
        birth = take(provider, harness, [volume])
        seal(provider, birth)
        (found,) = ready(provider, harness, birth.set_id)
        attachment_id, destination = new_attachment_id(utc_now()), harness.destination()
        made = provider.attach(found, attachment_id, Access.WRITABLE, destination)
        assert describe(harness.enter(made, destination)) == content
        provider.settle(attachment_id, datetime.now(UTC))
        (listed,) = provider.attachments()
        assert listed.since is not None
        harness.leave(destination)
        provider.detach(attachment_id)
        provider.delete(birth.set_id)
        assert harness.objects() == before


def test_off_ec2_nobody_is_asked(tmp_path: Path) -> None:
    """No option names a region, DMI names another maker: no SDK, no call, nothing claimed."""
    program = (
        "import sys\n"
        "from providers.ebs import EbsProvider\n"
        "from snapshotter.host.disks import Disks\n"
        "from snapshotter.host.mounts import mount_of\n"
        "from snapshotter.provider import Settings\n"
        f"EbsProvider.disks = Disks(sysfs={str(tmp_path)!r})\n"
        "provider = EbsProvider(Settings('/nonexistent'))\n"
        "assert provider.claim(mount_of('/'), '/') is None\n"
        "assert not list(provider.snapshots()) and not list(provider.attachments()) and not list(provider.swaps())\n"
        "assert provider.availability()\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    heavy = {"boto3", "botocore", "tenacity", "urllib.request", "http.client", "ssl"}
    assert not heavy & set(done.stdout.split())


def test_a_disk_that_is_no_volume_is_not_claimed(tmp_path: Path) -> None:
    provider = EbsProvider(Settings("/nonexistent"))
    provider.disks = DisksHere(by_id=str(tmp_path), maker=VENDOR)
    assert provider.disks.vendor() == VENDOR
    assert provider.claim(mount_of("/"), "/") is None


def test_the_metadata_service_that_does_not_answer(tmp_path: Path) -> None:
    provider = EbsProvider(Settings("/nonexistent"))
    provider.disks = DisksHere(by_id=str(tmp_path), maker=VENDOR)
    with environment(AWS_EC2_METADATA_SERVICE_ENDPOINT="http://127.0.0.1:9/"):
        (reason,) = provider.availability()
    assert "metadata service" in reason and "IMDSv2" in reason


@pytest.mark.skipif(importlib.util.find_spec("moto") is None, reason="moto, the second judge, isn't installed")
def test_moto_takes_it_too() -> None:
    """A set of an instance's volumes, marked, listed and deleted, as another's reading of the API has it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
        with environment(AWS_ENDPOINT_URL=f"http://{host}:{port}", AWS_CONFIG_FILE=os.devnull, **keys):
            ec2 = boto3.client("ec2", region_name="eu-central-1")
            image = ec2.describe_images()["Images"][0]["ImageId"]
            instance = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1)["Instances"][0]
            zone = instance["Placement"]["AvailabilityZone"]
            made = ec2.create_volume(AvailabilityZone=zone, Size=1)["VolumeId"]
            ec2.attach_volume(VolumeId=made, InstanceId=instance["InstanceId"], Device="/dev/sdf")
            provider = EbsProvider(Settings("/nonexistent", options={"region": "eu-central-1"}))
            provider.disks = Disks(sysfs="/nonexistent")
            volumes = provider.find({"instance": instance["InstanceId"]})
            assert volumes == [Volume("ebs", made)]
            birth = make_birth(volumes)
            provider.check(volumes, birth)
            provider.prepare(volumes, birth, 5.0)
            provider.create(volumes, birth, Hold())
            provider.mark(birth.set_id, {"sealed": "20261122t100630z", "pinned": "1"})
            provider.mark(birth.set_id, {"pinned": None})
            (found,) = EbsProvider(provider.settings).snapshots(birth.set_id)
            assert (found.birth, found.state) == (birth, ImageState.READY)
            assert dict(found.marks) == {"sealed": "20261122t100630z"}
            provider.delete(birth.set_id)
            assert not ec2.describe_snapshots(Filters=[{"Name": "tag:snapshotter:managed", "Values": ["true"]}])[
                "Snapshots"
            ]
            role = {"role_arn": "arn:aws:iam::123456789012:role/snapshotter"}
            assumed = EbsProvider(Settings("/nonexistent", options={"region": "eu-central-1", **role}))
            assert not list(assumed.snapshots())
            assert assumed._api()._session.get_credentials().access_key.startswith("ASIA")
    finally:
        server.stop()
