"""Swaps on ZFS: whatever order they come in with takes, deletions and other tools, no set and no other's snapshot is
lost, and each way back ends where it began."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from providers.zfs import objects, tool
from snapshotter.core.errors import BusyError, PreconditionError
from snapshotter.core.model import Access, Hold, ImageState, new_attachment_id, new_set_id, utc_now
from snapshotter.host import mounts
from snapshotter.testing.harness import make_birth
from tests.lab import zfs_kit
from tests.lab.zfs_kit import ZfsHarness, content_at, holds, image, names, path_of, read, run, take, write, zfs
from tests.support import Command

pytestmark = [pytest.mark.root, pytest.mark.zfs, pytest.mark.skipif(bool(zfs_kit.here()), reason=zfs_kit.here())]


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    with zfs_kit.pool() as name:
        yield name


@pytest.fixture
def harness(pool: str) -> Iterator[ZfsHarness]:
    with zfs_kit.zfs_harness(pool) as harness:
        yield harness


def test_swap_five_newer_sets_undo(harness: ZfsHarness) -> None:
    volume = harness.volume()
    sets = {take(volume, "older"): "older"}
    write(volume, "before the swap")
    zfs_kit.provider().swap("w1", image(next(iter(sets))), volume)
    assert read(volume) == "older"
    for number in range(5):
        sets[take(volume, f"newer {number}")] = f"newer {number}"
    zfs("snapshot", f"{volume.id}@theirs")
    zfs_kit.provider().swap_back("w1")
    assert read(volume) == "before the swap"
    assert not list(zfs_kit.provider().swaps())
    holds(harness, sets)
    assert any(name.endswith("@theirs") for name in names(harness.top, "snapshot"))
    # The one that the rest was taken upon can't go first; when all have gone, nothing is left of the swap.
    oldest, *others = sets
    with pytest.raises(BusyError) as busy:
        zfs_kit.provider().delete(oldest)
    assert others[0] in busy.value.line()
    run("zfs", "destroy", next(name for name in names(harness.top, "snapshot") if name.endswith("@theirs")))
    for set_id in others:
        zfs_kit.provider().delete(set_id)
    zfs_kit.provider().delete(oldest)
    assert names(harness.top) == {harness.top, volume.id}
    assert read(volume) == "before the swap"


def test_other_tools_go_on_with_what_is_in_place_and_leave_what_is_taken_back(harness: ZfsHarness) -> None:
    wanted, other = "com.sun:auto-snapshot", "com.example:replicate"
    volume = harness.dataset("d", "-o", f"{wanted}=true", "-o", f"{other}=yes")
    older = take(volume, "older")
    zfs_kit.provider().swap("w1", image(older), volume)
    assert zfs("get", "-H", "-s", "local", "-o", "value", f"{wanted},{other}", volume.id).split() == ["true", "yes"]
    zfs("snapshot", f"{volume.id}@theirs")
    newer = take(volume, "newer")
    zfs_kit.provider().swap_back("w1")
    assert zfs("get", "-H", "-s", "local", "-o", "value", f"{wanted},{other}", volume.id).split() == ["true", "yes"]
    kept = f"{volume.id}.clone-w1"
    assert zfs("get", "-H", "-o", "value", f"{wanted},{other}", kept).split() == ["false", "-"]
    provider = zfs_kit.provider()
    assert provider.reap() == [] and not provider.notes, "what a set of ours hangs on is no leftover"
    zfs_kit.provider().delete(newer)
    told = Command(harness.scratch / "etc").json("reap")["warnings"]
    assert [warning for warning in told if kept in warning and f"zfs destroy {kept}@theirs" in warning], told
    zfs("destroy", f"{kept}@theirs")
    with pytest.raises(BusyError) as busy:
        zfs_kit.provider().delete(older)
    assert busy.value.cure == "snapshotter reap"
    provider = zfs_kit.provider()
    assert provider.reap() == [kept] and not provider.notes
    assert names(harness.top, "filesystem") == {harness.top, volume.id}


def test_swap_back_ends_what_a_dead_one_had_almost(harness: ZfsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clone is gone already, and what was set aside is a clone of nothing."""
    volume = harness.volume()
    older = take(volume, "older")
    write(volume, "live")
    zfs_kit.provider().swap("w1", image(older), volume)
    change = tool.change

    def dies(*words: str, object: str) -> None:
        if words[:2] == ("inherit", objects.ASIDE):
            raise KeyboardInterrupt
        change(*words, object=object)

    with monkeypatch.context() as patched:
        patched.setattr(tool, "change", dies)
        with pytest.raises(KeyboardInterrupt):
            zfs_kit.provider().swap_back("w1")
    assert list(zfs_kit.provider().swaps()) == ["w1"]
    zfs_kit.provider().swap_back("w1")
    assert read(volume) == "live" and not list(zfs_kit.provider().swaps())


def test_swap_back_after_a_person_destroyed_the_clone(harness: ZfsHarness) -> None:
    volume = harness.volume()
    older = take(volume, "older")
    write(volume, "live")
    before = harness.objects()
    zfs_kit.provider().swap("w1", image(older), volume)
    zfs("destroy", volume.id)
    zfs_kit.provider().swap_back("w1")
    assert read(volume) == "live" and not list(zfs_kit.provider().swaps())
    assert harness.objects() == before
    holds(harness, {older: "older"})


def test_discard_is_refused_while_anything_hangs_on_what_is_set_aside(harness: ZfsHarness) -> None:
    volume = harness.volume()
    older = take(volume, "older")
    zfs("snapshot", f"{volume.id}@theirs-between")
    newer = take(volume, "newer")
    zfs("snapshot", f"{volume.id}@theirs-last")
    zfs_kit.provider().swap("w1", image(older), volume)
    with pytest.raises(BusyError) as busy:
        zfs_kit.provider().swap_commit("w1")
    for name in (newer, "@theirs-between", "@theirs-last"):
        assert name in busy.value.line()
    holds(harness, {older: "older", newer: "newer"})
    later = take(volume, "later")
    zfs_kit.provider().delete(newer)
    for name in [name for name in names(harness.top, "snapshot") if "@theirs" in name]:
        with pytest.raises(BusyError, match="theirs"):
            zfs_kit.provider().swap_commit("w1")
        zfs("destroy", name)
    zfs_kit.provider().swap_commit("w1")
    assert names(harness.top, "filesystem") == {harness.top, volume.id}
    assert read(volume) == "later"
    holds(harness, {older: "older", later: "later"})
    zfs_kit.provider().delete(older)
    holds(harness, {later: "later"})


def test_an_undo_ends_though_another_mount_namespace_shows_the_clone(harness: ZfsHarness) -> None:
    """As a container's with `/` mounted in it: a clone that can't go kept the node stopped, and each reap failed."""
    volume = harness.volume()
    older = take(volume, "older")
    write(volume, "live")
    zfs_kit.provider().swap("w1", image(older), volume)
    inside = harness.scratch / "inside"  # by another name: what is mounted in a directory goes with that, everywhere
    inside.mkdir()
    shows = f"mount --bind {volume.path} {inside} && exec sleep 600"
    container = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sh", "-c", shows])
    try:
        while b"sleep" not in Path(f"/proc/{container.pid}/cmdline").read_bytes()[:5]:
            time.sleep(0.05)
        zfs_kit.provider().swap_back("w1")
        assert read(volume) == "live" and not list(zfs_kit.provider().swaps())
        provider = zfs_kit.provider()
        assert not any(".clone-" in name for name in provider.reap())
        assert any("/proc/*/mounts" in note for note in provider.notes)
        zfs_kit.provider().delete(take(volume, "newer"))
    finally:
        container.kill()
        container.wait()
    assert any(".clone-" in name for name in zfs_kit.provider().reap())
    zfs_kit.provider().delete(older)
    assert names(harness.top) == {harness.top, volume.id} and read(volume) == "newer"


def test_discard_is_refused_while_what_is_set_aside_has_bookmarks(harness: ZfsHarness) -> None:
    """With one another tool knows how far it had sent."""
    volume = harness.volume()
    zfs("snapshot", f"{volume.id}@theirs")
    zfs("bookmark", f"{volume.id}@theirs", f"{volume.id}#cursor")
    zfs("destroy", f"{volume.id}@theirs")
    older = take(volume, "older")
    zfs_kit.provider().swap("w1", image(older), volume)
    mark = f"{volume.id}.aside-w1#cursor"
    with pytest.raises(BusyError, match=mark) as busy:
        zfs_kit.provider().swap_commit("w1")
    assert f"zfs destroy {mark}" in busy.value.cure
    assert zfs("list", "-H", "-o", "name", "-t", "bookmark", "-r", harness.top).split() == [mark]
    zfs_kit.provider().swap_back("w1")
    assert zfs("list", "-H", "-o", "name", "-t", "bookmark", volume.id).split() == [f"{volume.id}#cursor"]
    zfs_kit.provider().swap("w2", image(older), volume)
    zfs("destroy", f"{volume.id}.aside-w2#cursor")
    zfs_kit.provider().swap_commit("w2")
    holds(harness, {older: "older"})


def test_discard_names_where_a_set_is_mounted(harness: ZfsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = harness.volume(), harness.volume()
    sets = [take(volume, "older") for volume in (one, two)]
    for number, volume in enumerate((one, two)):
        zfs_kit.provider().swap(f"w{number}", image(sets[number]), volume)
    attachment_id, place = new_attachment_id(utc_now()), str(harness.scratch / "ro")
    harness.enter(zfs_kit.provider().attach(image(sets[1]), attachment_id, Access.READ_ONLY, place), place)
    zfs_kit.provider().refuse_commit("w0")
    for act in (zfs_kit.provider().refuse_commit, zfs_kit.provider().swap_commit):
        with pytest.raises(BusyError) as busy:
            act("w1")
        assert sets[1] in busy.value.line() and f"snapshotter release {place}" in busy.value.cure
    assert list(zfs_kit.provider().swaps()) == ["w0", "w1"]
    harness.leave(place)
    zfs_kit.provider().detach(attachment_id)
    other = harness.scratch / "other"
    other.mkdir()
    found = image(sets[1]).id
    assert run("mount", "-t", "zfs", found, str(other)).returncode == 0
    with pytest.raises(BusyError, match=f"umount {other}"):
        zfs_kit.provider().refuse_commit("w1")
    table = mounts.table()
    with monkeypatch.context() as patched:  # as in another mount namespace: told as far as that goes
        patched.setattr(mounts, "table", lambda: [mount for mount in table if mount.path != str(other)])
        with pytest.raises(BusyError, match="is in use: being sent, or mounted"):
            zfs_kit.provider().swap_commit("w1")
    assert run("umount", str(other)).returncode == 0
    for swap_id in ("w0", "w1"):
        zfs_kit.provider().refuse_commit(swap_id)
        zfs_kit.provider().swap_commit(swap_id)
    assert [read(volume) for volume in (one, two)] == ["older", "older"]


def test_equal_names_of_other_tools_snapshots_are_named(harness: ZfsHarness) -> None:
    volume = harness.volume()
    zfs("snapshot", f"{volume.id}@daily")
    older = take(volume, "older")
    zfs_kit.provider().swap("w1", image(older), volume)
    zfs("snapshot", f"{volume.id}@daily")
    with pytest.raises(BusyError, match="daily"):
        zfs_kit.provider().swap_commit("w1")
    zfs("rename", f"{volume.id}@daily", f"{volume.id}@other")
    zfs_kit.provider().swap_commit("w1")
    assert {f"{volume.id}@daily", f"{volume.id}@other"} <= names(harness.top)
    holds(harness, {older: "older"})


def test_who_unmounted_it_finds_its_mount_point(harness: ZfsHarness) -> None:
    """As a restore in place does: `zfs rename` takes an empty mount point away."""
    volume = harness.volume()
    older = take(volume, "older")
    write(volume, "live")
    point = volume.path or ""
    for act, text in (
        (lambda: zfs_kit.provider().swap("w1", image(older), volume), "older"),
        (lambda: zfs_kit.provider().swap_back("w1"), "live"),
    ):
        zfs("unmount", volume.id)
        act()
        assert os.path.isdir(point) and not any(mount.path == point for mount in zfs_kit.table())
        assert run("mount", "-t", "zfs", "-o", "zfsutil", volume.id, point).returncode == 0
        assert read(volume) == text


def test_a_legacy_mount_stays_where_it_is(harness: ZfsHarness) -> None:
    point = harness.scratch / "legacy"
    point.mkdir()
    full = f"{harness.top}/legacy"
    zfs("create", "-o", "mountpoint=legacy", full)
    assert run("mount", "-t", "zfs", "-o", "noatime,nosuid", full, str(point)).returncode == 0
    volume = zfs_kit.claimed(str(point))
    assert (volume.id, volume.path) == (full, str(point))
    older = take(volume, "older")
    write(volume, "live")
    zfs_kit.provider().swap("w1", image(older), volume)
    assert read(volume) == "older"
    (mount,) = [mount for mount in zfs_kit.table() if mount.path == str(point)]
    assert mount.source == full and {"noatime", "nosuid"} <= mount.options
    zfs_kit.provider().swap_back("w1")
    assert read(volume) == "live"


@pytest.mark.parametrize("root", [True, False])
def test_an_encrypted_dataset(harness: ZfsHarness, root: bool) -> None:
    """Its own encryption root, or below one: taken, attached, swapped, taken back, committed."""
    key = harness.scratch / "key"
    key.write_bytes(os.urandom(32))
    secret = ["-o", "encryption=on", "-o", "keyformat=raw", "-o", f"keylocation=file://{key}"]
    volume = harness.dataset("e", *secret)
    if not root:
        volume = harness.dataset("e/d")
    older = take(volume, "older")
    newer = take(volume, "newer")
    assert content_at(image(older), "file", harness.scratch) == b"older"
    attachment_id = new_attachment_id(utc_now())
    place = str(harness.scratch / attachment_id)
    made = zfs_kit.provider().attach(image(older), attachment_id, Access.WRITABLE, place)
    assert os.listdir(harness.enter(made, place)) == ["file"]
    harness.leave(place)
    zfs_kit.provider().detach(attachment_id)
    zfs_kit.provider().swap("w1", image(older), volume)
    assert read(volume) == "older"
    zfs_kit.provider().swap_back("w1")
    assert read(volume) == "newer"
    zfs_kit.provider().delete(newer)
    zfs_kit.provider().swap("w2", image(older), volume)
    zfs_kit.provider().swap_commit("w2")
    assert read(volume) == "older"
    top = f"{harness.top}/e"
    zfs("unmount", top)  # with what is mounted below
    zfs("unload-key", "-r", top)
    with pytest.raises(PreconditionError) as refused:
        zfs_kit.provider().attach(image(older), new_attachment_id(utc_now()), Access.WRITABLE, place)
    assert f"zfs load-key {top}" in refused.value.line()
    zfs("load-key", "-r", top)
    zfs("mount", volume.id)
    assert read(volume) == "older"


def test_datasets_below_stay_below(harness: ZfsHarness) -> None:
    """Each is a volume of its own: a set of two is swapped volume by volume, as a restore in place does it."""
    above, below = harness.dataset("d"), harness.dataset("d/below")
    other = harness.dataset("d/other", "-o", f"mountpoint={harness.scratch}/other")
    volumes = [above, below]
    write(other, "other")
    for volume in volumes:
        write(volume, f"older {volume.id}")
    birth = make_birth(volumes)
    zfs_kit.provider().create(volumes, birth, Hold(marks={"sealed": "20261122t100630z", "grade": "filesystem"}))
    for volume in volumes:
        write(volume, f"live {volume.id}")
    found = sorted(zfs_kit.provider().snapshots(birth.set_id), key=lambda each: each.birth.member)
    before = harness.objects()

    def seen(turn: str) -> None:
        for volume in (*volumes, other):  # `zfs unmount` goes down the names, wherever that is mounted
            run("zfs", "mount", volume.id)
        assert [read(volume) for volume in volumes] == [f"{turn} {volume.id}" for volume in volumes]
        assert read(other) == "other"
        for volume in volumes[::-1]:
            zfs("unmount", volume.id)

    seen("live")
    for number, volume in enumerate(volumes):
        zfs_kit.provider().swap(f"w{number}", found[number], volume)
    seen("older")
    for number in range(2):
        zfs_kit.provider().swap_back(f"w{number}")
    seen("live")
    for volume in (*volumes, other):
        zfs("mount", volume.id)
    assert {name for name in harness.objects() if " canmount=" not in name} == before
    zfs("unmount", above.id)
    for number, volume in enumerate(volumes):
        zfs_kit.provider().swap(f"w{number}", found[number], volume)
    for number in range(2):
        zfs_kit.provider().swap_commit(f"w{number}")
    seen("older")
    assert names(harness.top, "filesystem") == {harness.top, above.id, below.id, other.id}


def test_what_cannot_be_swapped_is_refused_by_name(harness: ZfsHarness) -> None:
    volume = harness.volume()
    older = take(volume, "older")
    before = harness.objects()

    def refused(*words: str) -> None:
        with pytest.raises((BusyError, PreconditionError)) as error:
            zfs_kit.provider().swap("w1", image(older), volume)
        for word in words:
            assert word in error.value.line(), error.value.line()
        assert error.value.cure

    child = harness.dataset("d1/child")
    refused(child.id, "umount")
    zfs("destroy", child.id)
    with open(path_of(volume)):
        refused("in use")
    assert read(volume) == "older"
    assert harness.objects() - {f"{volume.id} canmount=on"} == before


def test_a_swap_that_no_journal_names_is_told_and_ended_by_hand(harness: ZfsHarness) -> None:
    """As where the host and its journals were lost. No other restore stops a node for nothing meanwhile."""
    volume = harness.dataset("d", "-o", "reservation=16M")
    command = Command(harness.scratch / "etc")
    write(volume, "older")
    set_id = command.json("take", volume.path or "")["set_id"]
    write(volume, "live")
    zfs_kit.provider().swap("w1", image(set_id), volume)
    refused = command.error("restore", set_id, "--in-place", "--dry-run", exit_code=5)
    assert "w1" in refused["line"] and "doctor" in refused["line"]
    child = harness.dataset("d/child")
    found = json.loads(command.run("doctor", "--json").stdout)["findings"]
    (cure,) = [each["cure"] for each in found if each["check"] == "swap" and volume.id in each["message"]]
    zfs("unmount", child.id)
    zfs("unmount", volume.id)
    for step in cure.partition("mounted: ")[2].split("; "):
        done = run(*step.split())
        assert done.returncode == 0, f"{step}: {done.stderr}"
    for each in (volume, child):
        zfs("mount", each.id)
    assert read(volume) == "live" and not list(zfs_kit.provider().swaps())
    assert zfs("get", "-Hp", "-o", "value", "reservation,canmount", volume.id).split() == [str(16 << 20), "on"]
    assert names(harness.top, "filesystem") == {harness.top, volume.id, child.id}


def test_a_pools_own_dataset_is_copied_in_place(harness: ZfsHarness) -> None:
    """Nothing can take its place, which is known before a node is stopped for it."""
    with zfs_kit.pool(128) as own:
        point = next(mount.path for mount in zfs_kit.table() if mount.source == own)
        write(zfs_kit.claimed(point), "older")
        command = Command(harness.scratch / "etc")
        set_id = command.json("take", point)["set_id"]
        write(zfs_kit.claimed(point), "newer")
        assert command.json("restore", set_id, "--in-place", "--dry-run")["way"] == "copy"
        assert command.json("restore", set_id, "--in-place", "--yes")["outcome"] == "restored"
        assert read(zfs_kit.claimed(point)) == "older"


# ------------------------------------------------------------------------------------------------ any order of these


class Machine(RuleBasedStateMachine):
    """One volume, sets of it by us, snapshots of it by another tool, one swap at a time."""

    pool = ""

    def __init__(self) -> None:
        super().__init__()
        self.context = zfs_kit.zfs_harness(type(self).pool)
        self.harness = self.context.__enter__()
        self.volume = self.harness.volume()
        self.live = "at first"
        write(self.volume, self.live)
        self.sets: dict[str, str] = {}
        self.theirs: set[str] = set()  # guids
        self.swapped: tuple[str, str] | None = None
        self.count = 0

    def next(self) -> int:
        self.count += 1
        return self.count

    @rule()
    def take(self) -> None:
        self.live = f"content {self.next()}"
        self.sets[take(self.volume, self.live)] = self.live

    @rule()
    def another_tool(self) -> None:
        name = f"{self.volume.id}@theirs-{self.next()}"
        zfs("snapshot", name)
        self.theirs.add(zfs("get", "-H", "-o", "value", "guid", name).strip())

    @precondition(lambda self: self.sets)
    @rule(number=st.integers(0, 9))
    def delete(self, number: int) -> None:
        set_id = [*self.sets][number % len(self.sets)]
        try:
            zfs_kit.provider().delete(set_id)
        except BusyError as busy:
            assert busy.cure
        else:
            del self.sets[set_id]

    @precondition(lambda self: self.sets and self.swapped is None)
    @rule(number=st.integers(0, 9))
    def swap(self, number: int) -> None:
        set_id = [*self.sets][number % len(self.sets)]
        swap_id = "w" + new_set_id(datetime.now(UTC))[1:]
        zfs_kit.provider().swap(swap_id, image(set_id), self.volume)
        self.swapped = swap_id, self.live
        self.live = self.sets[set_id]

    @precondition(lambda self: self.swapped)
    @rule(twice=st.booleans())
    def back(self, twice: bool) -> None:
        assert self.swapped is not None
        for _ in range(1 + twice):
            zfs_kit.provider().swap_back(self.swapped[0])
        self.live = self.swapped[1]
        self.swapped = None

    @precondition(lambda self: self.swapped)
    @rule()
    def commit(self) -> None:
        assert self.swapped is not None
        try:
            zfs_kit.provider().swap_commit(self.swapped[0])
        except BusyError as busy:
            assert busy.cure
        else:
            self.swapped = None

    @rule()
    def reap(self) -> None:
        zfs_kit.provider().reap()

    @invariant()
    def nothing_is_lost(self) -> None:
        assert read(self.volume) == self.live
        listed = list(zfs_kit.provider().snapshots())
        assert {found.birth.set_id for found in listed} == set(self.sets)
        assert all(found.state is ImageState.READY and found.volume == self.volume.id for found in listed)
        assert list(zfs_kit.provider().swaps()) == ([self.swapped[0]] if self.swapped else [])
        words = ["-Hr", "-t", "snapshot", "-o", "value", "guid"]
        assert self.theirs <= set(zfs("get", *words, self.harness.top).split())

    def teardown(self) -> None:
        try:
            holds(self.harness, self.sets)
            if self.swapped:
                zfs_kit.provider().swap_back(self.swapped[0])
                self.live = self.swapped[1]
            assert read(self.volume) == self.live
            for name in [name for name in names(self.harness.top, "snapshot") if "@theirs" in name]:
                zfs("destroy", name)
            while self.sets:  # whatever hangs on whatever: some set can always go
                for set_id in list(self.sets):
                    try:
                        zfs_kit.provider().delete(set_id)
                    except BusyError:
                        continue
                    del self.sets[set_id]
                    break
                else:  # what was taken back may be left, where another tool's snapshot of it kept it until now
                    assert zfs_kit.provider().reap(), f"none of {sorted(self.sets)} can be deleted"
            zfs_kit.provider().reap()
            assert names(self.harness.top) == {self.harness.top, self.volume.id}
        finally:
            self.context.__exit__(None, None, None)


def test_any_order(pool: str, request: pytest.FixtureRequest) -> None:
    full = request.config.getoption("--full")
    Machine.pool = pool
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40 if full else 3,
            stateful_step_count=20 if full else 10,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
