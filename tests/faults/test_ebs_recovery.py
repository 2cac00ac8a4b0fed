"""The instance is lost. What is typed on the empty one that replaces it: `init --from`, `restore --in-place`."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.testing.harness import describe, fill
from tests.faults.cloud_kill_kit import World
from tests.faults.test_ebs_kill import EbsCommand
from tests.unit.ebs_kit import ebs_harness

pytestmark = pytest.mark.root


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ebs_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        with sqlite3.connect(f"{volume.path}/node.db") as database:
            database.execute("create table blocks (height integer)")
            database.executemany("insert into blocks values (?)", [(height,) for height in range(1000)])
        database.close()
        (Path(volume.path) / "genesis.json").write_text("{}")
        yield World(harness, EbsCommand(tmp_path / "home", harness), [volume])


def test_the_whole_recovery(world: World) -> None:
    command, path = world.command, world.path
    content = describe(path)
    name = os.path.basename(path)
    taken = command.json("take", path)["set_id"]
    world.harness.replaced()
    os.rmdir(path)
    command.machine = "new"
    before = world.harness.objects()

    assert "no good set" in command.error("init", "--from", "latest:another", exit_code=4)["line"]
    assert command.error("init", exit_code=2)["cure"]
    said = command.json("init", "--from", f"latest:{name}", "--type", "rpc", "--write")
    assert "keep" not in command.config.read_text(), "the type's own retention"
    assert (said["set_id"], said["found"]["path"], said["written"]) == (taken, path, str(command.config))
    assert said["restore"] == f"snapshotter restore {taken} --in-place --from-host"
    assert "already" in command.error("init", "--from", taken, exit_code=2)["line"]
    planned = command.json("restore", taken, "--in-place", "--from-host", "--dry-run")
    assert any("GiB" in warning for warning in planned["warnings"]), planned["warnings"]
    command.json(*said["restore"].split()[1:], "--yes")
    assert describe(path) == content
    command.json("restore", name, "--discard", "--yes")
    assert world.harness.objects() == before, "nothing is paid for any longer but the set"
    assert not os.path.ismount(path)
    shutil.rmtree(path)


def test_the_dry_run_says_what_it_takes(world: World, tmp_path: Path) -> None:
    taken = world.command.json("take", world.path)["set_id"]
    before = world.harness.twin.count()["CreateVolume"]
    slow = world.command.json("restore", taken, "--to", str(tmp_path / "clone"), "--dry-run")["warnings"]
    assert any("1 GiB of gp3" in warning and "first read" in warning for warning in slow), slow
    rate = world.command.json(
        "restore", taken, "--to", str(tmp_path / "clone"), "--dry-run", "-o", "initialization_rate=100"
    )["warnings"]
    assert any("11 s" in warning for warning in rate), rate
    assert world.harness.twin.count()["CreateVolume"] == before


def test_two_devices_to_another_machine(tmp_path: Path) -> None:
    """A btrfs over two volumes, from the command to the command: the instance is lost, `restore` brings it back."""
    with ebs_harness("btrfs") as harness:
        volume = harness.volume(devices=2)
        assert volume.path is not None
        fill(volume.path)
        content = describe(volume.path)
        command = EbsCommand(tmp_path / "home", harness)
        planned = command.json("take", volume.path, "--provider", "ebs", "--dry-run")
        assert (planned["volumes"], planned["grade"]) == ([{"provider": "ebs", "volume": volume.id}], "filesystem")
        taken = command.json("take", volume.path, "--provider", "ebs")["set_id"]
        harness.replaced()
        clone = tmp_path / "clone"
        command.json("restore", taken, "--to", str(clone), "--with-identity")
        assert describe(str(clone)) == content
        subprocess.run(["btrfs", "scrub", "start", "-B", str(clone)], check=True, capture_output=True)
        command.json("release", str(clone), "--discard-changes")
        assert len(harness.objects()) == 2, "two snapshots, no volume"
