"""Other tools on the same datasets: what is theirs we neither list nor touch, what is ours they leave alone; copies of
our sets that came from elsewhere are listed and left."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.core.errors import BusyError, PreconditionError, StorageError
from snapshotter.core.model import Access, Hold, MountSpec, Volume, new_attachment_id, utc_now
from snapshotter.testing.harness import make_birth
from tests.lab import zfs_kit
from tests.lab.zfs_kit import ZfsHarness, names, run, zfs
from tests.support import Command

pytestmark = [pytest.mark.root, pytest.mark.zfs, pytest.mark.skipif(bool(zfs_kit.here()), reason=zfs_kit.here())]
SEALED = {"sealed": "20261122t100630z", "grade": "filesystem"}


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    with zfs_kit.pool() as name:
        yield name


@pytest.fixture
def harness(pool: str) -> Iterator[ZfsHarness]:
    with zfs_kit.zfs_harness(pool) as harness:
        yield harness


def take(*volumes: Volume) -> str:
    birth = make_birth(volumes)
    zfs_kit.provider().create(volumes, birth, Hold(marks=SEALED))
    return birth.set_id


def guids(top: str, *, of: str) -> set[str]:
    """name=guid of the snapshots below `top` whose short name begins so."""
    listed = zfs("list", "-Hp", "-r", "-o", "name,guid", "-t", "snapshot", top).splitlines()
    return {line for line in listed if line.partition("@")[2].startswith(of)}


def ours() -> set[str]:
    return {found.birth.set_id for found in zfs_kit.provider().snapshots()}


def sanoid(etc: Path, *words: str) -> None:
    argv = ["sanoid", f"--configdir={etc}", f"--cache-dir={etc}/cache", f"--run-dir={etc}/run", *words]
    done = run(*argv)
    assert done.returncode == 0, done.stderr


def test_sanoid_and_zfs_auto_snapshot_on_the_same_datasets(harness: ZfsHarness) -> None:
    """They take and prune recursively, while sets are taken, attached, and deleted; also of a clone of ours."""
    volume, below = harness.dataset("d"), harness.dataset("d/below")
    etc = harness.scratch / "sanoid"
    etc.mkdir()
    defaults = Path("/usr/share/sanoid/sanoid.defaults.conf")
    (etc / "sanoid.defaults.conf").write_bytes(defaults.read_bytes())
    (etc / "sanoid.conf").write_text(
        f"[{harness.top}]\nuse_template = t\nrecursive = yes\n"
        "[template_t]\nhourly = 1\ndaily = 1\nmonthly = 0\nautosnap = yes\nautoprune = yes\n"
    )
    auto = ["zfs-auto-snapshot", "-q", "--label=frequent", "--keep=1", "-r", harness.top]
    first = take(volume, below)
    zfs_kit.provider().mark(first, {"pinned": "1"})
    attachment_id = new_attachment_id(utc_now())
    place = str(harness.scratch / "clone")
    made = zfs_kit.provider().attach(next(zfs_kit.provider().snapshots(first)), attachment_id, Access.WRITABLE, place)
    harness.enter(made, place)
    sanoid(etc, "--take-snapshots")
    assert run(*auto).returncode == 0
    second = take(volume, below)
    before = guids(harness.top, of="autosnap") | guids(harness.top, of="zfs-auto-snap")
    assert len(before) >= 6
    assert ours() == {first, second}, "a snapshot of our clone has our properties, and is not ours"
    sanoid(etc, "--prune-snapshots", "--force-prune")
    assert ours() == {first, second}
    theirs = guids(harness.top, of="autosnap") | guids(harness.top, of="zfs-auto-snap")
    harness.leave(place)
    # Our clone carries theirs now: it is they who must let it go.
    assert not any(attachment_id in line for line in guids(harness.top, of="zfs-auto-snap")), "a clone is left out"
    with pytest.raises(BusyError, match="another tool"):
        zfs_kit.provider().detach(attachment_id)
    zfs_kit.provider().delete(second)
    zfs_kit.provider().reap()
    assert guids(harness.top, of="autosnap") | guids(harness.top, of="zfs-auto-snap") == theirs
    for line in theirs:
        if attachment_id in line:
            zfs("destroy", line.split("\t")[0])
    zfs_kit.provider().detach(attachment_id)
    assert run(*auto).returncode == 0, "its own rotation still works"
    assert ours() == {first}
    zfs_kit.provider().delete(first)
    left = names(harness.top) - {harness.top, volume.id, below.id}
    assert left and all("@autosnap" in name or "@zfs-auto-snap" in name for name in left)


def test_a_replica_is_listed_and_never_deleted(harness: ZfsHarness) -> None:
    volume = harness.volume()
    assert volume.path is not None
    with open(os.path.join(volume.path, "file"), "w") as file:
        file.write("content")
    set_id = take(volume)
    copy = f"{harness.top}/copy"
    with subprocess.Popen(["zfs", "send", "-R", f"{volume.id}@{set_id}-0"], stdout=subprocess.PIPE) as sender:
        done = subprocess.run(["zfs", "receive", "-u", copy], stdin=sender.stdout, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    replica = f"{copy}@{set_id}-0"
    assert [found.id for found in zfs_kit.provider().snapshots(set_id)] == [f"{volume.id}@{set_id}-0", replica]
    zfs_kit.provider().mark(set_id, {"height": "7"})
    original, received = zfs_kit.provider().snapshots(set_id)
    assert original.marks["height"] == "7" and "height" not in received.marks
    zfs_kit.provider().delete(set_id)
    (found,) = zfs_kit.provider().snapshots(set_id)
    assert found.id == replica and found.marks["sealed"] and found.received and not original.received
    with pytest.raises(PreconditionError) as refused:
        zfs_kit.provider().delete(set_id)
    assert replica in refused.value.line() and refused.value.cure
    assert zfs_kit.content_at(found, "file", harness.scratch) == b"content"
    assert replica in names(harness.top)


def test_a_snapshot_that_has_our_name_or_inherits_our_record_is_not_ours(harness: ZfsHarness) -> None:
    volume = harness.volume()
    set_id = take(volume)
    record = zfs("get", "-H", "-o", "value", "snapshotter:birth", f"{volume.id}@{set_id}-0").strip()
    # By hand, or by a tool that copies properties from the snapshot to what it restores.
    zfs("set", f"snapshotter:birth={record}", volume.id)
    zfs("snapshot", f"{volume.id}@s20261122t100630z-5f3a9c-0")
    zfs("snapshot", f"{volume.id}@theirs")
    assert ours() == {set_id}
    before = guids(harness.top, of="")
    zfs_kit.provider().delete(set_id)
    assert guids(harness.top, of="") == {line for line in before if set_id not in line}
    zfs("inherit", "snapshotter:birth", volume.id)


def test_a_dataset_that_is_not_mounted_is_taken_by_nobody_else(harness: ZfsHarness, tmp_path: Path) -> None:
    """As where its key wasn't loaded at boot: the node made itself anew in the directory below, and sets of that by
    another provider pushed the real ones out."""
    point = harness.scratch / "live"
    volume = harness.dataset("d", "-o", f"mountpoint={point}")
    (point / "node").mkdir()
    (point / "node" / "chain").write_text("real")
    command, store = Command(tmp_path / "etc"), ["-o", f"store={harness.scratch}/store"]
    set_id = command.json("take", str(point / "node"))["set_id"]
    zfs("unmount", volume.id)
    (point / "node").mkdir(parents=True)
    (point / "node" / "chain").write_text("made anew")
    try:
        for words in ([], ["--provider", "copy", *store]):
            error = command.error("take", str(point / "node"), *words, exit_code=3)
            assert f"{volume.id}: isn't mounted at {point}" in error["line"] and "zfs mount" in error["cure"]
        zfs("set", "canmount=noauto", volume.id)
        assert command.json("take", str(point / "node"), "--provider", "copy", *store)["good"], "not meant"
        zfs("set", "canmount=on", volume.id)
    finally:
        for path in (point / "node" / "chain", point / "node"):
            path.unlink() if path.is_file() else path.rmdir()
    zfs("mount", volume.id)
    assert [each["set_id"] for each in command.json("list")["sets"] if each["set_id"] == set_id] == [set_id]


def test_a_file_system_on_a_zvol_is_refused_by_name(harness: ZfsHarness) -> None:
    """It is ZFS's, so nothing else takes it for its own; and its snapshot would be no whole file system."""
    zvol = f"{harness.top}/zvol"
    zfs("create", "-s", "-V", "64M", zvol)
    run("udevadm", "settle")
    device = os.path.realpath(f"/dev/zvol/{zvol}")
    assert run("mkfs.ext4", "-q", device).returncode == 0
    point = harness.scratch / "ext4"
    point.mkdir()
    assert run("mount", device, str(point)).returncode == 0
    try:
        (point / "file").write_text("content")
        refused = Command(harness.scratch / "etc").error("take", str(point), exit_code=3)
        assert zvol in refused["line"] and "zvol" in refused["line"] and "copy" in refused["line"]
        words = ["--provider", "copy", "-o", f"store={harness.scratch}/store"]
        taken = Command(harness.scratch / "etc").json("take", str(point), *words)
        assert taken["good"]
    finally:
        run("umount", str(point))


def test_a_value_of_many_lines_speaks_of_nobody_else(harness: ZfsHarness) -> None:
    """`zfs get` prints it as it is, so lines of it look like other datasets' properties. What they name isn't ours."""
    live, other = harness.dataset("d"), harness.dataset("d.clone-w1")
    attachment_id = new_attachment_id(utc_now())
    record = {"id": attachment_id, "set_id": "s", "member": 0, "path": "/x", "access": "writable", "purpose": "restore"}
    clone = json.dumps(record)
    lines = [
        f'{other.id}\tsnapshotter:kept\t{{"id":"w1"}}\tlocal',
        f"{live.id}\tsnapshotter:clone\t{clone}\tlocal",
        f'{live.id}\tsnapshotter:swap\t{{"id":"w2","volume":"{live.id}"}}\tlocal',
        f'{other.id}\tsnapshotter:aside\t{{"id":"w2","volume":"{live.id}"}}\tlocal',
    ]
    for prop in ("kept", "clone", "swap", "aside"):
        zfs("set", f"snapshotter:{prop}=first\n" + "\n".join(lines) + "\nlast", harness.top)
    for volume in (live, other):
        assert volume.path is not None
        zfs("unmount", volume.id)
    provider = zfs_kit.provider()
    assert provider.reap() == [] and not list(provider.swaps())
    provider.detach(attachment_id)
    provider.swap_back("w2")
    provider.swap_commit("w2")
    assert {live.id, other.id} <= names(harness.top)
    for prop in ("kept", "clone", "swap", "aside"):
        zfs("inherit", f"snapshotter:{prop}", harness.top)


def test_a_set_whose_marks_cannot_be_read_is_nobodys_leftover(harness: ZfsHarness) -> None:
    volume = harness.volume()
    (Path(volume.path or "") / "file").write_text("content")
    command = Command(harness.scratch / "etc")
    taken = command.json("take", volume.path or "", "--budget", "1s")
    name = f"{volume.id}@{taken['set_id']}-0"
    sealed = zfs("get", "-H", "-o", "value", "snapshotter:marks", name).strip()
    time.sleep(2)  # past its deadline
    for damaged in (sealed[:-1], '{"scaled":"x"}', sealed.replace(",", ",\n")):
        zfs("set", f"snapshotter:marks={damaged}", name)
        command.json("reap")
        (found,) = zfs_kit.provider().snapshots(taken["set_id"])
        assert not found.marks_known and not found.marks
        for changes in ({"pinned": "1"}, {"sealed": "20261122t100630z"}):
            with pytest.raises(StorageError, match="marks are damaged"):
                zfs_kit.provider().mark(taken["set_id"], changes)
        assert zfs("get", "-H", "-o", "value", "snapshotter:marks,userrefs", name) == f"{damaged}\n0\n"
    (listed,) = command.json("list", volume.path or "")["sets"]
    assert listed["state"] == "damaged"
    zfs("set", f"snapshotter:marks={sealed}", name)
    assert [entry["good"] for entry in command.json("list", volume.path or "")["sets"]] == [True]


def test_names_that_say_what_errors_say(harness: ZfsHarness) -> None:
    volume = harness.dataset("busy permission denied")
    path = volume.path or ""
    set_id = take(volume)
    (found,) = zfs_kit.provider().snapshots(set_id)
    zfs("hold", "theirs", found.id)
    with pytest.raises(BusyError, match="theirs"):
        zfs_kit.provider().delete(set_id)
    zfs("release", "theirs", found.id)
    zfs_kit.provider().delete(set_id)
    zfs("destroy", volume.id)
    with pytest.raises(StorageError, match="no such dataset"):
        take(volume)
    assert not os.path.exists(path) or not os.listdir(path)


def test_a_clone_that_was_promoted_is_not_released_at_the_price_of_sets(harness: ZfsHarness) -> None:
    volume = harness.volume()
    set_id = zfs_kit.take(volume, "older")
    attachment_id = new_attachment_id(utc_now())
    place = str(harness.scratch / "clone")
    made = zfs_kit.provider().attach(zfs_kit.image(set_id), attachment_id, Access.WRITABLE, place)
    assert isinstance(made, MountSpec)
    zfs("promote", made.source)
    with pytest.raises(BusyError) as busy:
        zfs_kit.provider().detach(attachment_id)
    assert set_id in busy.value.line() and "zfs destroy" not in busy.value.line()
    assert busy.value.cure == f"zfs promote {volume.id}, then again"
    zfs("promote", volume.id)
    zfs_kit.provider().detach(attachment_id)
    zfs_kit.holds(harness, {set_id: "older"})


def local(pool: str) -> str:
    """All that is set on anything of a pool, and so all that we could have changed there."""
    listed = zfs("get", "-Hpr", "-s", "local", "-o", "name,property,value", "all", pool)
    return "\n".join(line for line in listed.splitlines() if "snapshot_count" not in line)


def test_a_copy_of_the_whole_pool_is_left_alone_and_a_renamed_one_is_only_read(tmp_path: Path) -> None:
    """As `zpool split` makes it: all that is ours is local there, too."""
    with zfs_kit.pool(128, where=str(tmp_path)) as name:
        disk = next(tmp_path.glob("z-*")) / "disk"
        second = disk.with_name("second")
        with open(second, "wb") as file:
            file.truncate(128 << 20)
        for words in (["attach", name, str(disk), str(second)], ["wait", "-t", "resilver", name]):
            done = run("zpool", *words)
            assert done.returncode == 0, done.stderr
        for dataset in ("d", "e"):
            zfs("create", f"{name}/{dataset}")
        one, two = (zfs_kit.claimed(f"{disk.parent}/m/{dataset}") for dataset in ("d", "e"))
        set_id, other = zfs_kit.take(one, "older"), zfs_kit.take(two, "older")
        writable, read_only = new_attachment_id(utc_now()), new_attachment_id(utc_now())
        for attachment_id, access in ((writable, Access.WRITABLE), (read_only, Access.READ_ONLY)):
            zfs_kit.provider().attach(zfs_kit.image(set_id), attachment_id, access, str(tmp_path / attachment_id))
            zfs_kit.provider().settle(attachment_id, utc_now())
        zfs_kit.write(two, "live")
        zfs_kit.provider().swap("w1", zfs_kit.image(other), two)
        copy = f"{name}copy"
        done = run("zpool", "split", "-R", str(tmp_path / "copy"), name, copy)
        assert done.returncode == 0, done.stderr
        try:
            before = local(copy)
            original, copied = zfs_kit.provider().snapshots(set_id)
            assert not original.received and copied.received and copied.id == f"{copy}/d@{set_id}-0"
            assert {found.id for found in zfs_kit.provider().attachments()} == {writable, read_only}
            assert list(zfs_kit.provider().swaps()) == ["w1"]
            zfs_kit.provider().mark(set_id, {"height": "7"})
            zfs_kit.provider().swap_back("w1")
            assert zfs_kit.read(two) == "live" and not list(zfs_kit.provider().swaps())
            for attachment_id in (writable, read_only):
                zfs_kit.provider().detach(attachment_id)
            assert not list(zfs_kit.provider().attachments())
            zfs_kit.provider().delete(set_id)
            assert zfs_kit.provider().reap() == []
            with pytest.raises(PreconditionError) as refused:
                zfs_kit.provider().delete(set_id)
            assert copy in refused.value.line() and "zfs destroy" in refused.value.line()
            assert local(copy) == before, "something of the copy was changed"
            assert zfs_kit.content_at(zfs_kit.image(set_id), "file", tmp_path) == b"older"
        finally:
            assert run("zpool", "destroy", "-f", copy).returncode == 0
        zfs_kit.provider().swap("w2", zfs_kit.image(other), two)
        for words in (["export", name], ["import", "-d", str(disk.parent), name, copy]):
            done = run("zpool", *words)
            assert done.returncode == 0, done.stderr
        try:
            found = zfs_kit.image(other)
            assert found.received and zfs_kit.content_at(found, "file", tmp_path) == b"older"
            for act in (lambda: zfs_kit.provider().delete(other), lambda: zfs_kit.provider().swap_back("w2")):
                with pytest.raises((PreconditionError, StorageError), match=f"zpool import {copy} {name}"):
                    act()
        finally:
            for words in (["export", copy], ["import", "-d", str(disk.parent), copy, name]):
                done = run("zpool", *words)
                assert done.returncode == 0, done.stderr
        zfs_kit.provider().swap_back("w2")
        assert zfs_kit.read(two) == "live" and not zfs_kit.image(other).received
