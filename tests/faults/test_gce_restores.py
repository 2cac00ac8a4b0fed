"""Restores on Compute Engine that the contract doesn't ask for: other file systems, regional disks, what the options
say, disks made for another machine, the command putting a set in place of the live disk."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from providers.gce import GceProvider
from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError, StorageError
from snapshotter.core.model import Access, ImageState, Tagged, Volume, new_attachment_id, utc_now
from snapshotter.host.disks import Disks
from snapshotter.provider import Settings
from snapshotter.testing.conformance.steps import attach, content_of, ready, seal, take
from snapshotter.testing.harness import describe, fill, make_birth, ruin
from tests.faults.test_gce_kill import GceCommand
from tests.unit.gce_kit import gce_harness, group

pytestmark = pytest.mark.root
KEY = "projects/p/locations/l/keyRings/r/cryptoKeys/ours"


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_copy_of_a_disk_is_mounted_beside_its_origin(kind: str) -> None:
    with gce_harness(kind) as harness:
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


def test_a_btrfs_disk_is_not_brought_beside_its_origin() -> None:
    with gce_harness("btrfs") as harness:
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


def test_a_btrfs_over_two_disks_is_one_volume() -> None:
    """Of one consistency group: it can't be frozen. Whole, or no image; bit for bit on another instance."""
    with gce_harness("btrfs", grouped=True) as harness:
        volume = harness.volume(devices=2)
        assert volume.path is not None and volume.id == "europe-west3-a/d1+europe-west3-a/d2"
        fill(volume.path)
        content, provider = describe(volume.path), harness.provider()
        assert provider.one_instant([volume])
        birth = take(provider, harness, [volume])
        seal(provider, birth)
        assert len(harness.twin.world.snapshots) == 2 and harness.twin.count()["instantSnapshotGroups.insert"] == 1
        ruin(volume.path)
        (found,) = ready(harness.provider(), harness, birth.set_id)
        assert (found.id, found.volume) == (f"{birth.set_id}-0-0+{birth.set_id}-0-1", volume.id)
        assert found.state is ImageState.READY and "sealed" in found.marks
        before = harness.objects()
        with pytest.raises(PreconditionError, match="btrfs"):
            provider.attach(found, new_attachment_id(utc_now()), Access.WRITABLE, harness.destination())
        with pytest.raises(PreconditionError, match="several disks"):
            provider.swap("w20261122t100630z-5f3a9c", found, volume)
        here = f"{harness.instance.zone}/{harness.instance.name}"
        with pytest.raises(PreconditionError, match="can't be told apart"):
            outside(harness, instance=here).attach_away(found, new_attachment_id(utc_now()))
        assert harness.objects() == before, "the kernel may not even see it"
        harness.replaced()
        for access in Access:
            attached = attach(harness, found, access)
            assert describe(attached.path, writable=access is Access.WRITABLE) is not None
            (listed,) = harness.provider().attachments()
            assert (listed.id, listed.member) == (attached.id, 0)
            attached.end()
        assert content_of(harness, found) == content
        harness.twin.world.snapshots.pop(found.id.split("+")[1])
        (half,) = harness.provider().snapshots(birth.set_id)
        assert half.state is ImageState.INVALID and "europe-west3-a/d2" in half.why
        with pytest.raises(StorageError, match="can't be sealed"):
            harness.provider().mark(birth.set_id, {"sealed": "20261122t100630z"})
        harness.provider().delete(birth.set_id)
        assert not harness.objects()


def test_a_btrfs_over_disks_of_no_group_is_refused() -> None:
    with gce_harness("btrfs") as harness:
        volume = harness.volume(devices=2)
        with pytest.raises(PreconditionError, match="no consistency group") as refused:
            harness.provider().check([volume], make_birth([volume]))
        assert "docs/gcp.md" in refused.value.line()


def test_the_zone_is_lost_and_the_node_comes_back(tmp_path: Path) -> None:
    """What is typed on the empty instance of another zone: `init --from`, `restore --in-place`."""
    with gce_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        for name in ("genesis.json", "blocks"):
            Path(volume.path, name).write_bytes(name.encode() * 10_000)
        content, name = describe(volume.path), os.path.basename(volume.path)
        command = GceCommand(tmp_path / "home", harness)
        taken = command.json("take", volume.path)["set_id"]
        harness.replaced()
        os.rmdir(volume.path)
        command.machine = "new"
        before = harness.objects()
        said = command.json("init", "--from", f"latest:{name}", "--write")
        assert (said["set_id"], said["found"]["path"]) == (taken, volume.path)
        assert said["restore"] == f"snapshotter restore {taken} --in-place --from-host"
        command.json("restore", taken, "--in-place", "--from-host", "--dry-run")
        command.json(*said["restore"].split()[1:], "--yes")
        assert describe(volume.path) == content
        command.json("restore", name, "--discard", "--yes")
        assert harness.objects() == before == {f"{taken}-0"}, "nothing is paid for any longer but the set"
        assert not os.path.ismount(volume.path)


def test_a_regional_disk_is_taken_restored_and_swapped() -> None:
    zones = ["europe-west3-a", "europe-west3-b"]
    with gce_harness() as harness:
        harness.regional = zones
        volume = harness.volume()
        assert volume.path is not None and volume.id == "europe-west3/d1"
        fill(volume.path)
        content = describe(volume.path)
        provider = harness.provider(replica_zones=",".join(zones))
        birth = take(provider, harness, [volume])
        seal(provider, birth)
        ruin(volume.path)
        ruined = describe(volume.path)
        (found,) = ready(provider, harness, birth.set_id)
        attachment_id, destination = new_attachment_id(utc_now()), harness.destination()
        made = provider.attach(found, attachment_id, Access.WRITABLE, destination)
        assert describe(harness.enter(made, destination)) == content
        disk = harness.twin.world.disks[f"regions/europe-west3/disks/{attachment_id}-0"]
        assert [each.rpartition("/")[2] for each in disk.replica_zones] == zones
        provider.settle(attachment_id, datetime.now(UTC))
        harness.leave(destination)
        provider.detach(attachment_id)
        provider.swap("w20261122t100630z-000000", found, volume)
        assert describe(volume.path) == content
        provider.swap_back("w20261122t100630z-000000")
        assert describe(volume.path) == ruined
        with pytest.raises(PreconditionError, match="europe-west3-a among them"):
            harness.provider(replica_zones="europe-west3-b,europe-west3-c").attach(
                found, new_attachment_id(utc_now()), Access.WRITABLE, harness.destination()
            )
        provider.delete(birth.set_id)


def test_what_the_options_say_is_made() -> None:
    with gce_harness() as harness:
        volume = harness.volume()
        provider = harness.provider(
            storage_location="eu",
            snapshot_type="archive",
            kms_key=KEY,
            disk_type="hyperdisk-balanced",
            provisioned_iops=5000,
            provisioned_throughput=200,
        )
        birth = take(provider, harness, [volume])
        (found,) = ready(provider, harness, birth.set_id)
        snapshot = harness.twin.world.snapshots[found.id]
        assert (snapshot.locations, snapshot.kind, snapshot.key) == (["eu"], "ARCHIVE", KEY)
        attachment_id = new_attachment_id(utc_now())
        provider.attach(found, attachment_id, Access.WRITABLE, harness.destination())
        disk = harness.twin.world.disks[f"zones/{harness.instance.zone}/disks/{attachment_id}-0"]
        assert (disk.type, disk.provisioned_iops, disk.provisioned_throughput) == ("hyperdisk-balanced", 5000, 200)
        assert disk.key == KEY
        provider.detach(attachment_id)
        # Without a word its key is the snapshot's: never one of Google's for what was encrypted with one of ours.
        plain, attachment_id = harness.provider(), new_attachment_id(utc_now())
        plain.attach(found, attachment_id, Access.WRITABLE, harness.destination())
        assert harness.twin.world.disks[f"zones/{harness.instance.zone}/disks/{attachment_id}-0"].key == KEY
        plain.detach(attachment_id)
        provider.delete(birth.set_id)
        with pytest.raises(PreconditionError, match="no cold snapshots"):
            take(harness.provider(snapshot_type="cold"), harness, [volume])


def test_a_swap_keeps_what_the_origin_was_like() -> None:
    with gce_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        origin = harness.twin.world.disks[f"zones/{harness.instance.zone}/disks/d1"]
        origin.labels |= {"team": "nodes", "snapshotter-node": "archive-1", "snapshotter-type": "archive"}
        origin.type, origin.provisioned_iops, origin.size = "hyperdisk-balanced", 6000, 2
        group(harness.twin, ["d1"])
        origin.description, origin.access_mode = "of the archive\n{}", "READ_WRITE_SINGLE"
        zone, world = harness.instance.zone, harness.twin.world
        origin.storage_pool = world.link(f"zones/{zone}/storagePools/fast")
        theirs = dict(origin.labels)

        def attached(path: str) -> tuple[str, str, str]:
            (how,) = [each for each in harness.instance.disks if each.disk == path]
            return how.device_name, how.interface, how.mode

        next(each for each in harness.instance.disks if each.disk == origin.path).interface = "NVME"
        before = attached(origin.path)
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        harness.provider().swap("w20261122t100630z-000000", found, volume)
        harness.provider().swap_back("w20261122t100630z-000000")
        assert attached(origin.path) == before and origin.labels == theirs
        for swap_id in ("w20261122t100630z-000001", "w20261122t100630z-000002"):
            harness.provider().swap(swap_id, found, volume)
            harness.provider().swap_commit(swap_id)
            volume = harness.again(volume)
        new = world.disks[f"zones/{zone}/disks/w20261122t100630z-000002-0"]
        assert new.labels == theirs
        assert (new.type, new.provisioned_iops, new.size) == ("hyperdisk-balanced", 6000, 2)
        assert (new.access_mode, new.storage_pool) == (origin.access_mode, origin.storage_pool)
        assert new.resource_policies == origin.resource_policies
        assert attached(new.path) == before
        first, _, record = new.description.rpartition("\n")
        assert first == origin.description and "000001" in record


def outside(harness: object, **options: object) -> GceProvider:
    """As from a machine that is no instance."""
    twin = harness.twin  # type: ignore[attr-defined]
    provider = GceProvider(Settings("/nonexistent", options={"project": twin.world.project, **options}))
    provider.disks = Disks(sysfs="/nonexistent", by_id="/nonexistent")
    provider.clock = harness.clock  # type: ignore[attr-defined]
    return provider


def test_disks_for_another_machine_in_another_zone(tmp_path: Path) -> None:
    with gce_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        command = GceCommand(tmp_path / "home", harness)
        taken = command.json("take", volume.path)
        before = harness.objects()
        other = harness.twin.world.run_instance("us-central1-b")
        harness.origins |= set(harness.twin.world.disks)
        # From outside any instance, attached to one; and made, attached to none.
        where = {"instance": f"us-central1-b/{other.name}"}
        provider, attachment_id = outside(harness, **where), new_attachment_id(utc_now())
        (found,) = provider.snapshots(taken["set_id"])
        made = provider.attach_away(found, attachment_id)
        provider.settle(attachment_id, datetime.now(UTC))
        assert (made.volume, made.instance) == (f"us-central1-b/{attachment_id}-0", f"us-central1-b/{other.name}")
        assert made.device == f"/dev/disk/by-id/google-{attachment_id}-0"
        (listed,) = outside(harness).attachments()
        assert (listed.id, listed.path, listed.set_id) == (attachment_id, "", taken["set_id"])
        assert attachment_id in command.error("delete", taken["set_id"], "--yes", "--last", exit_code=5)["line"]
        assert "--discard-changes" in command.error("release", attachment_id, exit_code=5)["cure"]
        release = ("release", attachment_id, "--discard-changes")
        assert other.name in command.error(*release, exit_code=5)["line"]
        harness.twin.here = other  # there it sees what is mounted
        command.json(*release)
        harness.twin.here = harness.instance
        assert harness.objects() == before
        with pytest.raises(PreconditionError) as refused:
            outside(harness).attach_away(found, attachment_id)
        assert "-o zone=" in refused.value.line()
        with pytest.raises(PreconditionError):
            outside(harness).attach(found, attachment_id, Access.WRITABLE, "/nowhere")
        # The command, on the instance: in its own zone where none is named.
        document = command.json("restore", taken["set_id"], "--away", "-o", "zone=us-central1-f")
        assert document["path"] is None
        assert [each["volume"] for each in document["volumes"]] == [f"us-central1-f/{document['attachment_id']}-0"]
        assert document["roots"] == [{"origin": volume.path, "member": 0, "inside": ""}]
        assert not document["volumes"][0]["instance"]
        command.json("release", document["attachment_id"], "--discard-changes")
        assert harness.objects() == before


def test_a_disk_that_is_mounted_on_another_instance_is_not_pulled_away(tmp_path: Path) -> None:
    """Compute Engine asks nobody. Before the restore is through nobody has mounted it, and its undo takes it back."""
    with gce_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        before, other = harness.objects(), harness.twin.world.run_instance(harness.instance.zone)
        harness.origins |= set(harness.twin.world.disks)
        harness.twin.limits.pulls = True
        provider = outside(harness, instance=f"{other.zone}/{other.name}")
        undone = new_attachment_id(utc_now())
        provider.attach_away(found, undone)
        provider.detach(undone)
        assert harness.objects() == before
        attachment_id = new_attachment_id(utc_now())
        provider.attach_away(found, attachment_id)
        provider.settle(attachment_id, datetime.now(UTC))
        disk = harness.twin.world.disks[f"zones/{other.zone}/disks/{attachment_id}-0"]
        subprocess.run(["mount", harness.disks.device(disk.bytes), tmp_path], check=True)
        try:
            with pytest.raises(BusyError) as refused:
                provider.detach(attachment_id)
            assert other.name in refused.value.line() and refused.value.cure
            assert disk.users == [other.path]
        finally:
            subprocess.run(["umount", tmp_path], check=True)
        api = provider._api()
        fields = {"zone": other.zone, "instance": other.name, "device_name": disk.name}
        api.do("Instances.detach_disk", api.deadline("what a person does"), other.name, **fields)
        provider.detach(attachment_id)
        assert harness.objects() == before


def test_a_disk_that_several_instances_have_is_not_swapped() -> None:
    with gce_harness() as harness:
        volume = harness.volume()
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        before, other = harness.objects(), harness.twin.world.run_instance(harness.instance.zone)
        harness.origins |= set(harness.twin.world.disks)
        origin = harness.twin.world.disks[f"zones/{harness.instance.zone}/disks/d1"]
        origin.users.append(other.path)
        with pytest.raises(BusyError, match=other.name):
            harness.provider().swap("w20261122t100630z-000003", found, volume)
        origin.users.remove(other.path)
        assert harness.objects() == before and not origin.labels


def test_a_set_in_place_of_the_live_disk(tmp_path: Path) -> None:
    """By the disk's own swap: the data path is the whole disk. Undone, done again, made final."""
    with gce_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        for name in ("one", "two"):
            Path(volume.path, name).write_bytes(name.encode() * 10_000)
        content = describe(volume.path)
        command = GceCommand(tmp_path / "home", harness)
        set_id = command.json("take", volume.path)["set_id"]
        before = harness.objects()
        Path(volume.path, "one").unlink()
        Path(volume.path, "two").write_bytes(b"ruined")
        ruined = describe(volume.path)
        plan = command.json("restore", set_id, "--in-place", "--dry-run")
        assert "gce:" in str(plan), plan
        command.json("restore", set_id, "--in-place", "--yes")
        assert describe(volume.path) == content
        assert os.path.realpath(harness.disks.by_id / "google-dev-1") == mounted_from(volume.path)
        command.json("restore", "--undo", volume.path)
        assert describe(volume.path) == ruined and harness.objects() == before
        command.json("restore", set_id, "--in-place", "--yes")
        command.json("restore", "--discard", volume.path, "--yes")
        assert describe(volume.path) == content
        (disk,) = harness.objects() - before
        assert not any(key.startswith("snapshotter") for key in harness.twin.world.disks[disk].labels)
        again = command.json("take", volume.path)
        assert again["snapshots"][0]["volume"] != volume.id and again["good"]


def mounted_from(point: str) -> str:
    words = ["findmnt", "-n", "-o", "SOURCE", point]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def test_disks_are_found_from_outside() -> None:
    with gce_harness() as harness:
        world, zone = harness.twin.world, harness.instance.zone
        for name in ("a", "b"):
            world.add_disk(name, harness.instance, device_name=name, with_bytes=False)
            world.disks[f"zones/{zone}/disks/{name}"].labels |= {"snapshotter-node": "n1", "snapshotter-type": "rpc"}
        both = [Volume("gce", f"{zone}/a"), Volume("gce", f"{zone}/b")]
        assert outside(harness).find({"instance": f"{zone}/{harness.instance.name}"}) == both, "not what it boots from"
        assert outside(harness, zone=zone).find({"instance": harness.instance.name}) == both
        assert outside(harness, zone=zone).find({"volumes": ["a"]}) == both[:1]
        assert outside(harness).find({"volumes": [f"{zone}/b"]}) == both[1:]
        assert outside(harness).find({"tags": {"snapshotter-node": "n1"}}) == both
        where = f"{zone}/{harness.instance.name}"
        assert outside(harness).tagged() == [Tagged("n1", "rpc", tuple(both), where)]
        for nothing in ({}, {"instance": harness.instance.name}):
            with pytest.raises(PreconditionError):
                outside(harness).find(nothing)


@pytest.mark.parametrize("action", ["instances.detachDisk", "instances.attachDisk"])
def test_a_node_whose_disk_changes_places_is_not_taken_without_it(action: str) -> None:
    """A swap killed before its origin is detached, or before the new disk is attached: seen from outside, where the
    host's journal isn't."""
    with gce_harness() as harness:
        volume, where = harness.volume(), f"{harness.instance.zone}/{harness.instance.name}"
        world, zone = harness.twin.world, harness.instance.zone
        world.add_disk("wal", harness.instance, with_bytes=False)
        world.add_disk("other", world.run_instance(zone), with_bytes=False)
        harness.origins |= set(world.disks)
        for name, node in (("d1", "n1"), ("wal", "n1"), ("other", "n2")):
            world.disks[f"zones/{zone}/disks/{name}"].labels |= {"snapshotter-node": node, "team": node}
        ways: list[dict[str, object]] = [{"instance": where}, {"tags": {"team": "n1"}}]
        named = {"volumes": [volume.id, f"{zone}/wal"]}

        def find(select: dict[str, object]) -> list[str]:
            return [each.id for each in outside(harness).find(select)]

        def fleet() -> dict[str, tuple[list[str], str]]:
            return {each.node: ([v.id for v in each.volumes], each.instance) for each in outside(harness).tagged()}

        whole = sorted(named["volumes"])
        assert all(find(select) == whole for select in [*ways, named])
        before = fleet()
        assert before["n1"] == (whole, where)
        birth = take(harness.provider(), harness, [volume])
        (found,) = ready(harness.provider(), harness, birth.set_id)
        swap_id = "w20261122t100630z-000002"
        # Made, and nothing is set aside yet: the origin alone is the node's.
        harness.twin.fail("disks.setLabels", "refuse", code="forbidden", status=403)
        with pytest.raises(PreconditionError):
            harness.provider().swap(swap_id, found, volume)
        assert fleet() == before and all(find(select) == whole for select in [*ways, named])
        harness.provider().swap_back(swap_id)
        fault = harness.twin.fail(action, "refuse", code="forbidden", status=403)
        with pytest.raises(PreconditionError):
            harness.provider().swap(swap_id, found, volume)
        assert fault not in harness.twin.faults
        tagged = fleet()
        assert tagged["n2"] == before["n2"], "the others of the fleet go on"
        assert tagged["n1"][1] == where
        for select in [*ways, named, {"volumes": tagged["n1"][0]}]:
            with pytest.raises(BusyError) as refused:
                find(select)
            assert volume.id in refused.value.line() and "--undo" in refused.value.line()
        harness.provider().swap_back(swap_id)
        assert fleet() == before and all(find(select) == whole for select in [*ways, named])
        # Done: what took its place is the node's, and the old one no longer.
        harness.provider().swap(swap_id, found, volume)
        now = sorted([f"{zone}/{swap_id}-0", f"{zone}/wal"])
        assert all(find(select) == now for select in [*ways, {"volumes": now}])
        assert fleet()["n1"] == (now, where)
        with pytest.raises(BusyError):
            find(named)
        harness.provider().swap_commit(swap_id)
        assert all(find(select) == now for select in [*ways, {"volumes": now}])
        with pytest.raises(NotFoundError):
            find(named)
        # A copy is no node's, however it is named.
        attached = attach(harness, found, Access.WRITABLE)
        with pytest.raises(NotFoundError, match="restored copy"):
            find({"volumes": [f"{zone}/{attached.id}-0", f"{zone}/wal"]})
        assert find(ways[0]) == now
        attached.end()
