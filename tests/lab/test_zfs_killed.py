"""SIGKILL of take, restore, delete and of a swap at random moments: after `reap` the storage is as it was before."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from snapshotter.core.errors import BusyError
from snapshotter.core.model import Hold, Volume
from snapshotter.testing.harness import make_birth
from tests.lab import zfs_kit
from tests.lab.zfs_kit import ZfsHarness, names
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


def times(request: pytest.FixtureRequest, sampled: int) -> int:
    return 30 if request.config.getoption("--full") else sampled


def write(volume: Volume, text: str) -> None:
    assert volume.path is not None
    with open(os.path.join(volume.path, "file"), "w") as file:
        file.write(text)


def read(volume: Volume) -> str:
    assert volume.path is not None
    with open(os.path.join(volume.path, "file")) as file:
        return file.read()


def reaped(command: Command, deadline_s: float) -> None:
    """`reap` once a dead run's children have ended and its set's deadline is past."""
    give_up = time.monotonic() + deadline_s + 60
    while True:
        answer = command.json("reap")
        if not answer["kept"]:
            return
        assert time.monotonic() < give_up, answer
        time.sleep(0.5)


def test_take_restore_and_delete_killed(harness: ZfsHarness, request: pytest.FixtureRequest) -> None:
    volumes = [harness.dataset("d"), harness.dataset("d/e")]
    for volume in volumes:
        write(volume, volume.id)
    path = volumes[0].path or ""
    command = Command(harness.scratch / "etc")
    chance = random.Random(str(os.getpid()))
    began = time.monotonic()
    first = command.json("take", path, "--budget", "1s")
    usual_s = time.monotonic() - began
    good = {first["set_id"]}
    place = harness.scratch / "clone"
    for turn in range(times(request, 6)):
        verb = ("take", "restore", "delete")[turn % 3]
        words = {
            "take": ("take", path, "--budget", "1s"),
            "restore": ("restore", first["set_id"], "--to", str(place)),
            "delete": ("delete", max(good), "--yes"),
        }[verb]
        if verb == "delete" and len(good) == 1:
            made = [command.json("take", path, "--budget", "1s")["set_id"] for _ in range(2)]
            good |= set(made)
            words = ("delete", made[0], "--yes")
        process = command.start(*words, "--json")
        time.sleep(chance.uniform(0.2, 1.1) * usual_s)
        process.kill()
        process.communicate(timeout=60)
        if verb == "restore" and (parts := list(zfs_kit.provider().attachments())) and parts[0].since is not None:
            command.json("release", str(place), "--discard-changes")
        reaped(command, 1.0)
        assert not list(zfs_kit.provider().attachments())
        assert not any(mount.path.startswith(str(place)) for mount in zfs_kit.table())
        listed = command.json("list", path)["sets"]
        assert all(entry["good"] for entry in listed), listed
        now = {entry["set_id"] for entry in listed}
        # A take may have come to its seal, a delete not to its end; nothing else may be gone or new.
        assert good - now <= ({words[1]} if verb == "delete" else set())
        assert len(now - good) <= (verb == "take")
        good = now
        snapshots = {f"{volume.id}@{set_id}-{k}" for k, volume in enumerate(volumes) for set_id in good}
        assert names(harness.top) == {harness.top, *(volume.id for volume in volumes), *snapshots}
        assert [read(volume) for volume in volumes] == [volume.id for volume in volumes]


def killed(act: Callable[[], None], after_s: float) -> None:
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def until_done(act: Callable[[], None]) -> None:
    """A dead run's child still ends what it had begun: meanwhile it may be busy."""
    give_up = time.monotonic() + 60
    while True:
        try:
            return act()
        except BusyError:
            assert time.monotonic() < give_up
            time.sleep(0.2)


def test_swap_back_and_commit_killed(harness: ZfsHarness, request: pytest.FixtureRequest) -> None:
    """Killed in the swap, and then in the way back or in the commit: made again, either ends where it should."""
    volume = harness.volume()
    write(volume, "older")
    birth = make_birth([volume])
    zfs_kit.provider().create([volume], birth, Hold(marks={"sealed": "20261122t100630z", "grade": "filesystem"}))
    write(volume, "live")
    (found,) = zfs_kit.provider().snapshots(birth.set_id)
    chance = random.Random(str(os.getpid()))
    began = time.monotonic()
    zfs_kit.provider().swap("w0", found, volume)
    swap_s = time.monotonic() - began
    began = time.monotonic()
    zfs_kit.provider().swap_back("w0")
    back_s = time.monotonic() - began
    before = {name for name in harness.objects()}
    for turn in range(1, times(request, 4) + 1):
        swap_id = f"w{turn}"
        killed(lambda swap_id=swap_id: zfs_kit.provider().swap(swap_id, found, volume), chance.random() * swap_s)  # type: ignore[misc]
        time.sleep(0.5)  # what a child of the dead run had begun
        killed(lambda swap_id=swap_id: zfs_kit.provider().swap_back(swap_id), chance.random() * back_s)  # type: ignore[misc]
        time.sleep(0.5)
        until_done(lambda swap_id=swap_id: zfs_kit.provider().swap_back(swap_id))  # type: ignore[misc]
        assert not list(zfs_kit.provider().swaps())
        assert read(volume) == "live"
        assert harness.objects() == before
    zfs_kit.provider().swap("w", found, volume)
    for _ in range(2):
        killed(lambda: zfs_kit.provider().swap_commit("w"), chance.random() * back_s)
        time.sleep(0.5)
    until_done(lambda: zfs_kit.provider().swap_commit("w"))
    assert not list(zfs_kit.provider().swaps())
    assert read(volume) == "older"
    assert names(harness.top) == {harness.top, volume.id, found.id}
