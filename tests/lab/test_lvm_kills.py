"""SIGKILL of runs on LVM, between their commands and inside them: afterwards no device is suspended, no image of a
later time is sealed, and `reap` leaves the storage as it was."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from providers.lvm import commands
from providers.lvm.reports import find
from snapshotter.core.errors import BusyError, SnapshotterError
from snapshotter.core.model import Access, Hold, ImageState, Volume, new_attachment_id, utc_now
from snapshotter.host import block
from snapshotter.host.locks import Locks
from snapshotter.testing import describe, make_birth
from snapshotter.testing.conformance import content_of, seal, take
from snapshotter.testing.harness import fill
from tests.lab.lvm_kit import LvmHarness, Storage, harness_on, lvm, marks, storage, suspended
from tests.support import Command

pytestmark = marks


@pytest.fixture(scope="module")
def group() -> Iterator[Storage]:
    with storage(2000, pool_mb=800) as made:
        yield made


@pytest.fixture(params=["thin", "classic"])
def harness(group: Storage, request: pytest.FixtureRequest) -> Iterator[LvmHarness]:
    with harness_on(group, thin=request.param == "thin") as harness:
        yield harness


@pytest.fixture
def volume(harness: LvmHarness) -> Volume:
    volume = harness.volume()
    fill(top(volume))
    return volume


def top(volume: Volume) -> str:
    assert volume.path is not None
    return volume.path


def commands_of_lvm() -> list[int]:
    """Pids of LVM's mutating commands that run now."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and Path(f"/proc/{name}/cmdline").read_bytes().startswith((b"lvcreate", b"lvremove")):
                found.append(int(name))
    return found


def run_and_kill(act: Callable[[], object], when: Callable[[], bool]) -> list[int]:
    """`act` in a child, which is killed together with its LVM command as soon as `when` is true (or it ended); the pids
    of the commands killed."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    victims: list[int] = []
    give_up = time.monotonic() + 120
    while not when() and os.waitpid(child, os.WNOHANG) == (0, 0):
        assert time.monotonic() < give_up
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    victims = commands_of_lvm()
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)
    while commands_of_lvm():
        assert time.monotonic() < give_up, "an LVM command can't be killed"
        time.sleep(0.05)
    return victims


def run_and_kill_while_suspended(act: Callable[[], object], volume: Volume) -> None:
    """The moment is short: so only one file is watched, and its reader knows already whom to kill."""
    device = block.device(block.number_of(f"/dev/{volume.id}") or "")
    assert device is not None
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    give_up = time.monotonic() + 120
    while not (victims := commands_of_lvm()):
        assert time.monotonic() < give_up
    watched = os.open(f"/sys/block/{device.name}/dm/suspended", os.O_RDONLY)
    try:
        while os.pread(watched, 1, 0) != b"1" and os.waitpid(child, os.WNOHANG) == (0, 0):
            pass
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    finally:
        os.close(watched)
    while commands_of_lvm():
        assert time.monotonic() < give_up, "an LVM command can't be killed"
        time.sleep(0.05)


def moments(request: pytest.FixtureRequest, most_s: float) -> list[float]:
    count = 20 if request.config.getoption("--full") else 2
    return [random.uniform(0.0, most_s) for _ in range(count)]


def after(seconds: float) -> Callable[[], bool]:
    """True so long after the first LVM command was seen to run."""
    began: list[float] = []

    def over() -> bool:
        if not began and commands_of_lvm():
            began.append(time.monotonic())
        return bool(began) and time.monotonic() >= began[0] + seconds

    return over


def undo(harness: LvmHarness, set_id: str) -> None:
    """As the next run does: what hangs runs again first, then what was left goes."""
    provider = harness.provider()
    provider.reap()
    assert not suspended(), "reap must have resumed it"
    provider.delete(set_id)
    assert not harness.thin or not harness.storage.orphans()


def test_killed_inside_lvcreate(harness: LvmHarness, volume: Volume, request: pytest.FixtureRequest) -> None:
    """The run and its lvcreate at once. Whatever is left, no set is sealed whose image could be of a later time: not
    when the next lvcreate in that pool carries out what was queued."""
    kept = take(harness.provider(), harness, [volume])
    seal(harness.provider(), kept)
    before, content = harness.objects(), describe(top(volume))
    began = time.monotonic()
    usual = take(harness.provider(), harness, [volume])
    usual_s = time.monotonic() - began
    harness.provider().delete(usual.set_id)
    hits = 0
    for moment in moments(request, usual_s / 2):
        birth = make_birth([volume])
        provider = harness.provider()
        provider.check([volume], birth)
        provider.prepare([volume], birth, 5.0)
        hits += bool(run_and_kill(functools.partial(provider.create, [volume], birth, Hold()), after(moment)))
        for found in harness.provider().snapshots(birth.set_id):
            assert "sealed" not in found.marks
            with pytest.raises(SnapshotterError):
                seal(harness.provider(), birth)  # nobody can vouch for it any more
            assert found.state is ImageState.INVALID and found.why
        harness.provider().reap()
        assert not suspended()
        Path(top(volume), "later").write_text("written after the kill")
        following = take(harness.provider(), harness, [volume])  # clears what was left, before its own lvcreate
        assert not list(harness.provider().snapshots(birth.set_id)), "a leftover outlived the next take"
        Path(top(volume), "later").unlink()
        os.utime(top(volume), ns=(0, content[""][2]))  # type: ignore[call-overload]
        harness.provider().delete(following.set_id)
        undo(harness, birth.set_id)
        assert harness.objects() == before
        assert describe(top(volume)) == content
    assert hits, "no kill hit a command"
    (found,) = harness.provider().snapshots()
    assert found.birth.set_id == kept.set_id and content_of(harness, found) == content


def test_killed_with_the_origin_suspended(harness: LvmHarness, volume: Volume) -> None:
    """The worst moment: every write to the node hangs until `reap`, or the next run, resumes the device."""
    seal(harness.provider(), take(harness.provider(), harness, [volume]))  # suspended along with it, if classic
    before, content = harness.objects(), describe(top(volume))
    for _ in range(6):
        birth = make_birth([volume])
        provider = harness.provider()
        provider.check([volume], birth)
        provider.prepare([volume], birth, 5.0)
        run_and_kill_while_suspended(functools.partial(provider.create, [volume], birth, Hold()), volume)
        left = suspended()
        resumed = harness.provider().reap()
        assert not suspended()
        assert len(resumed) >= len(left)
        with open(os.path.join(top(volume), "alive"), "w") as file:
            file.write("x")
            os.fsync(file.fileno())
        os.unlink(os.path.join(top(volume), "alive"))
        os.utime(top(volume), ns=(0, content[""][2]))  # type: ignore[call-overload]
        undo(harness, birth.set_id)
        assert harness.objects() == before and describe(top(volume)) == content
        if left:
            return
    pytest.fail("no kill hit the moment of suspension")


def test_what_somebody_else_suspended_stays_so(harness: LvmHarness, volume: Volume) -> None:
    other = harness.volume()
    device = f"/dev/{other.id}"
    lvm("dmsetup", "suspend", device)
    try:
        birth = take(harness.provider(), harness, [volume])
        harness.provider().reap()
        assert len(suspended()) == 1, "that was an operator's own"
        harness.provider().delete(birth.set_id)
    finally:
        lvm("dmsetup", "resume", device)


def test_a_child_outlives_its_run_and_holds_the_lock(harness: LvmHarness, volume: Volume) -> None:
    """Only the run is killed: its lvcreate goes on to its end. Whoever comes next waits for that, then finds it all."""
    before = harness.objects()
    birth = make_birth([volume])
    provider = harness.provider()
    provider.check([volume], birth)
    provider.prepare([volume], birth, 5.0)
    child = os.fork()
    if child == 0:
        try:
            provider.create([volume], birth, Hold())
        finally:
            os._exit(0)
    while not commands_of_lvm():
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with contextlib.suppress(BusyError):
        harness.provider().delete(birth.set_id)
    assert not commands_of_lvm(), "delete did not wait for the dead run's command"
    harness.provider().delete(birth.set_id)
    assert harness.objects() == before and not suspended()


def test_the_lock_is_held_while_an_orphan_waits_for_lvm(harness: LvmHarness, volume: Volume) -> None:
    """LVM closes the lock's descriptor. An orphan that waits for LVM's own lock suspends the origin later, so what was
    written of that must stay, and nobody may believe that the group is free."""
    before, vg = harness.objects(), harness.storage.vg
    birth = make_birth([volume])
    provider = harness.provider()
    provider.check([volume], birth)
    provider.prepare([volume], birth, 5.0)
    with open(f"/run/lock/lvm/V_{vg}", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        child = os.fork()
        if child == 0:
            try:
                provider.create([volume], birth, Hold())
            finally:
                os._exit(0)
        while not commands_of_lvm():
            time.sleep(0.002)
        time.sleep(0.5)  # it closes what it inherited
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for _ in range(3):
            with pytest.raises(BusyError), Locks([f"lvm-commands:{vg}"]):
                pass
            assert commands.recover_all() == ([], [])
        assert commands_of_lvm() and commands._recorded() == [vg]
    give_up = time.monotonic() + 120
    while commands_of_lvm():
        assert time.monotonic() < give_up
        time.sleep(0.05)
    harness.provider().reap()
    assert not suspended() and commands._recorded() == []
    harness.provider().delete(birth.set_id)
    assert harness.objects() == before


@pytest.mark.parametrize("verb", ["take", "reap"])
def test_a_suspended_data_path_runs_again_before_anybody_looks_at_it(
    harness: LvmHarness, volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Else the look itself hangs: nothing of it is cached."""
    command = Command(tmp_path / "etc")
    monkeypatch.setenv("SNAPSHOTTER_RUN", command.environment()["SNAPSHOTTER_RUN"])
    size = [] if harness.thin else ["-o", "size=12m"]
    row = find(harness.provider()._report(), volume.id)
    commands.Group(harness.storage.vg)._intend([row], "")
    lvm("sync")
    lvm("dmsetup", "suspend", f"/dev/{volume.id}")
    Path("/proc/sys/vm/drop_caches").write_text("3")
    try:
        process = command.start(verb, *([top(volume), *size] if verb == "take" else []), "--json")
        stdout, stderr = process.communicate(timeout=120)  # one that hangs can't be killed: it is let go below
        assert process.returncode == 0 and not suspended(), stderr
        assert "left suspended" in stdout
    finally:
        lvm("dmsetup", "resume", f"/dev/{volume.id}")


def test_another_groups_dead_run_keeps_nobody_waiting(harness: LvmHarness, volume: Volume) -> None:
    commands.Group("other")._intend([], "s20261122t100630z-5f3a9c-0")
    try:
        with Locks(["lvm-commands:other"]):
            birth = take(harness.provider(), harness, [volume])
            seal(harness.provider(), birth)
            (found,) = harness.provider().snapshots()
            attachment_id = new_attachment_id(utc_now())
            harness.provider().attach(found, attachment_id, Access.WRITABLE, "/nowhere")
            harness.provider().detach(attachment_id)
            harness.provider().delete(birth.set_id)
            assert commands._recorded() == ["other"]
    finally:
        commands.Group("other")._forget()


@pytest.mark.parametrize("what", ["detach", "delete"])
def test_killed_inside_lvremove(harness: LvmHarness, volume: Volume, what: str, request: pytest.FixtureRequest) -> None:
    before, content = harness.objects(), describe(top(volume))
    hits = 0
    for moment in (0.0, *moments(request, 1.0)):
        birth = take(harness.provider(), harness, [volume])
        attachment_id = new_attachment_id(utc_now())
        if what == "detach":
            (found,) = harness.provider().snapshots()
            harness.provider().attach(found, attachment_id, Access.WRITABLE, "/nowhere")
            act = functools.partial(harness.provider().detach, attachment_id)
        else:
            act = functools.partial(harness.provider().delete, birth.set_id)
        hits += bool(run_and_kill(act, after(moment)))
        harness.provider().reap()
        assert not suspended()
        harness.provider().detach(attachment_id)
        undo(harness, birth.set_id)
        assert harness.objects() == before and describe(top(volume)) == content
    assert hits, "no kill hit a command"


# -------------------------------------------------------------------------------------------------- the whole command


@pytest.mark.parametrize("verb", ["take", "restore", "delete"])
def test_the_command_is_killed(
    harness: LvmHarness, volume: Volume, tmp_path: Path, verb: str, request: pytest.FixtureRequest
) -> None:
    """At random instants, with its LVM command or without; then `reap` as an operator runs it."""
    command = Command(tmp_path / "etc")
    size = [] if harness.thin else ["-o", "size=12m"]
    os.makedirs(os.path.join(top(volume), "data"))
    Path(top(volume), "data", "file").write_text("x" * 10_000)
    data = os.path.join(top(volume), "data")
    kept = command.json("take", data, *size)["set_id"]
    content = describe(data)
    before = harness.objects()
    clone = str(harness.scratch / "clone")
    hits, turns, longest = 0, 0, 2.0
    wanted = 20 if request.config.getoption("--full") else 1
    while turns < wanted or not hits:
        turns += 1
        assert turns <= wanted + 6, "no kill hit the command"
        victim = command.json("take", data, *size)["set_id"] if verb == "delete" else kept
        words = {
            "take": ["take", data, *size],
            "restore": ["restore", kept, "--to", clone],
            "delete": ["delete", victim, "--yes", "--last"],
        }[verb]
        process = command.start(*words, "--json")
        give_up = time.monotonic() + 60
        while not commands_of_lvm() and process.poll() is None:
            assert time.monotonic() < give_up
        time.sleep(random.uniform(0, longest))
        if process.poll() is None:
            hits += 1
        else:
            longest /= 2  # a machine that is faster
        process.kill()
        if random.random() < 0.5:
            for pid in commands_of_lvm():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=120)
        time.sleep(6)  # the deadline of an unsealed set
        done = command.run("reap", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        assert not suspended()
        for entry in command.json("list")["sets"]:
            assert entry["good"], f"{json.dumps(entry)} after {done.stdout}"
            for attached in entry["attachments"]:
                command.json("release", attached["path"], "--discard-changes")
            if entry["set_id"] != kept:
                command.json("delete", entry["set_id"], "--yes", "--last")
        assert harness.objects() == before
        assert not any(device.dm_name.startswith("snapshotter-") for device in block.mapped())
        assert not os.path.exists(clone)
        assert describe(data) == content
    shown = command.json("restore", kept, "--to", clone)
    assert Path(shown["path"], "file").read_text() == "x" * 10_000
    command.json("release", clone)
    subprocess.run(["sync"], check=True)
