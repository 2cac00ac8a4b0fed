"""doctor: each thing that would hurt is found, with a cure that, done, ends the finding; and nothing is changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.in_place_kit import point, run_here
from tests.support import NOBODY, Command
from tests.unit.test_cli import inventory


@pytest.fixture
def command(tmp_path: Path) -> Command:
    data = tmp_path / "node"
    (data / "database").mkdir(parents=True)
    (data / "database" / "CURRENT").write_text("MANIFEST-1\n")
    (data / "DATABASE_METADATA.json").write_text("{}")
    (data / "key").write_text("0x" + "11" * 32)
    os.chmod(data / "key", 0o600)
    return Command(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\nfloor = "0.1%"\n')


def found(command: Command, *checks: str) -> list[dict[str, Any]]:
    """The findings, which must be of these checks alone (but for the clock of this machine, and advice)."""
    before = inventory(command.home.parent / "node")
    done = command.run("doctor", "--json")
    document = json.loads(done.stdout)
    assert inventory(command.home.parent / "node") == before
    # Every btrfs of the machine is seen, and other tests' swaps on them.
    others = {"clock", *({"swap"} - set(checks))}
    here = [entry for entry in document["findings"] if entry["check"] not in others and entry["severity"] != "advice"]
    assert [entry["check"] for entry in here] == list(checks), document["findings"]
    assert done.returncode == (8 if not document["ok"] else 0), done.stderr
    assert document["ok"] == all(entry["severity"] == "advice" for entry in document["findings"])
    assert all(entry["cure"] for entry in here)
    human = command.run("doctor")
    assert human.returncode == done.returncode and all(entry["message"] in human.stdout for entry in here)
    return here


def test_a_node_that_is_well(command: Command) -> None:
    found(command)
    with open(command.config, "a") as file:
        file.write('provider = "copy"\n')
    advice = json.loads(command.run("doctor", "n", "--json").stdout)["findings"]
    assert "same-disk" in [entry["check"] for entry in advice]


def test_a_key_that_others_can_read_and_one_of_another_user(command: Command) -> None:
    key = command.home.parent / "node" / "key"
    os.chmod(key, 0o644)
    assert str(key) in found(command, "key")[0]["cure"]
    os.chmod(key, 0o600)
    found(command)


@pytest.mark.root
def test_a_key_of_another_user(command: Command) -> None:
    key = command.home.parent / "node" / "key"
    os.chown(key, NOBODY, NOBODY)
    assert str(NOBODY) in found(command, "key")[0]["message"]
    os.chown(key, 0, 0)
    found(command)


def test_a_config_that_is_wrong_or_that_others_can_change(command: Command) -> None:
    os.chmod(command.config, 0o666)
    assert "chmod" in found(command, "config")[0]["cure"]
    os.chmod(command.config, 0o644)
    text = command.config.read_text()
    command.config.write_text(text + "evry = 3\n")
    assert "every" in found(command, "config")[0]["message"]
    command.config.unlink()
    found(command, "config")


def test_what_status_says_is_among_it(command: Command) -> None:
    with open(command.config, "a") as file:
        file.write('every = "24h"\nprovider = "btrfs"\n')
    checks = [entry["check"] for entry in found(command, "stale", "no-timer", "no-take")]
    assert checks[-1] == "no-take"


def test_a_run_that_died_and_reap_as_its_cure(command: Command) -> None:
    taken = command.json("take", "n")
    marks = command.home.parent / ".snapshotter" / "sets" / taken["set_id"] / "marks.json"
    content = json.loads(marks.read_text())
    del content["marks"]["sealed"]
    marks.write_text(json.dumps(content))
    time.sleep(6)  # its deadline
    assert taken["set_id"] in found(command, "leftover", "stale")[0]["message"]
    command.json("reap")
    found(command)


@pytest.mark.parametrize(
    ("event", "checks"),
    [("before-forward", ["restore"]), ("after-CopyProvider.attach", ["leftover", "restore"])],
)
def test_a_restore_in_place_that_was_killed(command: Command, event: str, checks: list[str]) -> None:
    data = command.home.parent / "node"
    shutil.rmtree(data / "database")
    (data / "DATABASE_METADATA.json").unlink()  # of no kind: there is nothing to prove
    taken = command.json("take", "n")
    restore = ("restore", taken["set_id"], "--in-place", "--yes")
    code, said, calls = run_here(command, *restore)
    assert code == 0, said
    assert command.run("restore", "--undo", "n").returncode == 0
    killed, said, _ = run_here(command, *restore, kill_at=point(calls, event))
    assert killed == -signal.SIGKILL, said
    assert "--undo" in found(command, *checks)[-1]["cure"]
    refused = command.error("take", "n", "--dry-run", exit_code=5)
    assert "--undo" in refused["cure"] and refused == command.error("take", "n", exit_code=5)
    (problem,) = json.loads(command.run("status", "--json").stdout)["nodes"][0]["problems"]
    assert (problem["problem"], problem["severity"], problem["cure"]) == ("no-take", "critical", refused["cure"])
    assert command.run("restore", "--undo", "n").returncode == 0
    found(command)


@pytest.mark.root
def test_a_unit_that_is_not_there(command: Command) -> None:
    with open(command.config, "a") as file:
        file.write('unit = "no-such-thing-here.service"\n')
    findings = json.loads(command.run("doctor", "--json").stdout)["findings"]
    assert any(entry["check"] == "unit" for entry in findings)


def test_no_such_target(command: Command) -> None:
    command.error("doctor", "nobody", exit_code=4)
