"""The host's freeze on raw disks, which stand in for a cloud's: what the native suite asks of loop devices is asked
here of disks and of this kernel, and whole takes are made through a provider that sees only what is on the disk."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import CHECKOUT, Command, Node, check_database

sys.path.insert(0, str(CHECKOUT / "tests/faults"))
from quiesce_kit import Disk, Zoo, moves, records, run_dir, until, watchdogs, zoo
from test_quiesce_freeze import (
    test_both_are_killed_then_reap,
    test_the_budgets_end_thaws_and_voids,
    test_the_run_is_killed,
    test_the_watchdog_is_killed,
    test_two_together_a_blocked_writer_goes_on,
)

from snapshotter.core.errors import PreconditionError, QuiesceError
from snapshotter.host import quiesce

__all__ = [
    "run_dir",
    "test_both_are_killed_then_reap",
    "test_the_budgets_end_thaws_and_voids",
    "test_the_run_is_killed",
    "test_the_watchdog_is_killed",
    "test_two_together_a_blocked_writer_goes_on",
    "zoo",
]
pytestmark = pytest.mark.root
#: XFS's smallest.
SIZE = 300 << 20
KINDS = (["mkfs.ext4", "-q", "-F", "-b", "4096"], ["mkfs.xfs", "-q", "-f", "-d", f"size={SIZE}"])


class RealDisk(Disk):
    """A file system of SIZE bytes at the start of one of the lab's scratch disks."""

    def __init__(self, device: str, make: list[str], where: Path) -> None:
        self.device = device
        self.path = where
        where.mkdir(parents=True)
        size = [str(SIZE // 4096)] if "mkfs.ext4" in make else []
        subprocess.run([*make, device, *size], check=True, capture_output=True)
        subprocess.run(["mount", device, str(where)], check=True)

    def end(self) -> None:
        super().end()
        subprocess.run(["wipefs", "-aq", self.device], check=True)


@pytest.fixture
def disk(tmp_path: Path, zoo: Zoo) -> Iterator[Callable[[], RealDisk]]:
    disks: list[RealDisk] = []
    free = [
        device
        for device in os.environ["LAB_DISKS"].split()
        if not subprocess.run(["wipefs", "-n", device], capture_output=True, check=True).stdout
    ]

    def make() -> RealDisk:
        kind = KINDS[len(disks) % len(KINDS)]
        disks.append(RealDisk(free[len(disks)], kind, tmp_path / f"disk-{secrets.token_hex(3)}"))
        return disks[-1]

    yield make
    for one in disks:
        one.thaw()
    zoo.end()
    for one in disks:
        one.end()


Disks = Callable[[], RealDisk]


class WithRawDisk(Command):
    """`snapshotter` with the test's provider installed as a third party's is."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.installed = home / "installed"
        metadata = self.installed / "rawdisk-1.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rawdisk\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text("[snapshotter.providers]\nrawdisk = tests.lab.raw_disk:RawDisk\n")
        self.store = home / "store"

    def environment(self) -> dict[str, str]:
        found = super().environment()
        return {**found, "PYTHONPATH": f"{found['PYTHONPATH']}:{self.installed}"}

    def take(self, data: Path, *more: str) -> list[str]:
        options = ["-o", f"store={self.store}", "-o", f"bytes={SIZE}"]
        return ["take", str(data), "--provider", "rawdisk", *options, *more]


@pytest.fixture
def command(tmp_path: Path) -> WithRawDisk:
    return WithRawDisk(tmp_path / "etc")


def test_hot_takes_under_the_freeze(disk: Disks, command: WithRawDisk, tmp_path: Path, full: bool) -> None:
    """The image is clean (its journal has nothing to replay), opens, and lacks nothing acknowledged before."""
    one = disk()
    node = Node(one.path / "node", "--rate", "1", "--fill", "5")
    try:
        node.wait_for(20, timeout=300)
        for _ in range(20 if full else 2):
            before = node.acknowledged()
            taken = command.json(*command.take(node.data, "--budget", "120s"))
            assert taken["good"] and (taken["quiesce"], taken["grade"]) == ("freeze", "filesystem")
            assert not one.frozen()
            image = command.store / f"{taken['set_id']}-0.img"
            said = subprocess.run(["dumpe2fs", "-h", str(image)], capture_output=True, text=True, check=True).stdout
            assert "needs_recovery" not in said
            point = tmp_path / f"image-{taken['set_id']}"
            point.mkdir()
            subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
            try:
                found = check_database(point / "node")
            finally:
                subprocess.run(["umount", str(point)], check=True)
            image.unlink()
            assert found["lost"] == 0 and found["head"] >= before, found
        node.wait_for(node.acknowledged() + 5, timeout=300)
    finally:
        node.kill()


def test_a_set_whose_budget_ended_is_void(disk: Disks, command: WithRawDisk, zoo: Zoo) -> None:
    one = disk()
    zoo.writer(one.path / "data")
    refused = command.error(*command.take(one.path, "--budget", "3s", "-o", "slow=8"), exit_code=int(QuiesceError.exit))
    assert refused["line"]
    assert not list(command.store.iterdir()), "what was read after the thaw is no image"
    assert not one.frozen()
    moves(one.path)


def test_a_killed_take_leaves_nothing_frozen_and_is_no_set(disk: Disks, command: WithRawDisk, zoo: Zoo) -> None:
    one = disk()
    zoo.writer(one.path / "data")
    run = command.start(*command.take(one.path, "--budget", "120s", "-o", "slow=60"))
    until_frozen = lambda: any(command.store.glob("*.img")) if command.store.exists() else False  # noqa: E731
    until(until_frozen, "the take to be in its freeze")
    run.kill()
    run.communicate()
    until(lambda: not watchdogs(command.home / "run"), "the watchdog to thaw and end")
    assert not one.frozen() and not records(command.home / "run")
    moves(one.path)
    sealed = [path for path in command.store.glob("*.json") if "mark-sealed" in json.loads(path.read_text())]
    assert not sealed, "no seal, no set"


def test_never_the_root(run_dir: Path) -> None:
    with pytest.raises(PreconditionError) as caught, quiesce.freeze(["/"], 60.0, "s1"):
        pytest.fail("held")
    assert caught.value.cure


def test_never_on_the_device_mapper(disk: Disks, run_dir: Path, tmp_path: Path) -> None:
    """lvcreate freezes by itself: a file system frozen by us would hang it."""
    name = f"lab-{secrets.token_hex(3)}"
    device = os.environ["LAB_DISKS"].split()[-1]
    subprocess.run(["dmsetup", "create", name, "--table", f"0 {SIZE // 512} linear {device} 0"], check=True)
    point = tmp_path / "mapped"
    point.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", f"/dev/mapper/{name}"], check=True)
        subprocess.run(["mount", f"/dev/mapper/{name}", str(point)], check=True)
        try:
            with pytest.raises(PreconditionError) as caught, quiesce.freeze([str(point)], 60.0, "s1"):
                pytest.fail("held")
            assert caught.value.cure
            (point / "written").write_text("so it isn't frozen")
        finally:
            subprocess.run(["umount", str(point)], check=True)
    finally:
        subprocess.run(["udevadm", "settle"], check=False)
        subprocess.run(["dmsetup", "remove", "--retry", name], check=True)
        subprocess.run(["wipefs", "-aq", device], check=True)
