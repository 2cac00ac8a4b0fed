"""`unit =` against a live systemd: the node is a service of its, with a child, and Restart=always."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hot.besu_shaped import acknowledged
from tests.support import CHECKOUT, Command, check_database
from tests.systemd_kit import Systemd, booted

pytestmark = pytest.mark.root
UNIT = """[Service]
WorkingDirectory=/
Environment=PYTHONPATH={checkout} PYTHONDONTWRITEBYTECODE=1
ExecStart={python} -m tests.hot.besu_shaped run {data} {acks}
Restart=always
"""


class Inside(Command):
    """The command, run where systemctl reaches that systemd."""

    systemd: Systemd

    def run(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        variables = [f"{name}={value}" for name, value in self.environment().items()]
        return self.systemd.enter("env", "-i", *variables, *self.argv(*words), check=False)


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Inside]:
    data, acks = tmp_path / "node", tmp_path / "acks"
    data.mkdir()
    with booted(tmp_path) as systemd:
        text = UNIT.format(checkout=CHECKOUT, python=sys.executable, data=data, acks=acks)
        systemd.unit("chain.service", text)
        systemd.enter("systemctl", "start", "chain.service")
        give_up = time.monotonic() + 120
        while acknowledged(acks) < 3:
            assert time.monotonic() < give_up
            time.sleep(0.1)
        made = Inside(tmp_path / "etc", config=f'[node.chain]\npath = "{data}"\nunit = "chain.service"\n')
        made.systemd = systemd
        yield made


def taken(inside: Inside, *words: str) -> dict[str, Any]:
    done = inside.run("take", "chain", *words, "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["good"]
    return document


def test_a_take_freezes_the_units_cgroup_and_lets_it_go(inside: Inside, tmp_path: Path) -> None:
    pid = inside.systemd.show("chain.service", "MainPID")
    document = taken(inside)
    assert document["quiesce"] == "pause" and document["freeze_ms"] >= 1
    assert inside.systemd.show("chain.service", "MainPID") == pid
    assert inside.systemd.read("/sys/fs/cgroup/system.slice/chain.service/cgroup.freeze").strip() == "0"
    written = acknowledged(tmp_path / "acks")
    give_up = time.monotonic() + 60
    while acknowledged(tmp_path / "acks") <= written:
        assert time.monotonic() < give_up, "it doesn't write again"
        time.sleep(0.05)
    clone = tmp_path / "clone"
    assert inside.run("restore", document["set_id"], "--to", str(clone)).returncode == 0
    check_database(clone)


def test_a_take_stops_it_against_its_restart_policy_and_starts_it(inside: Inside) -> None:
    pid = inside.systemd.show("chain.service", "MainPID")
    document = taken(inside, "--quiesce", "stop")
    assert document["grade"] == "application"
    assert inside.systemd.show("chain.service", "ActiveState") == "active"
    assert inside.systemd.show("chain.service", "MainPID") != pid
    assert inside.systemd.show("chain.service", "LoadState") == "loaded", "not left masked"


def test_one_that_was_stopped_stays_stopped(inside: Inside) -> None:
    inside.systemd.enter("systemctl", "stop", "chain.service")
    taken(inside, "--quiesce", "stop")
    assert inside.systemd.show("chain.service", "ActiveState") == "inactive"


def test_in_place_stops_masks_and_starts_it(inside: Inside, tmp_path: Path) -> None:
    document = taken(inside)
    (tmp_path / "node" / "database" / "CURRENT").write_text("damaged")
    done = inside.run("restore", document["set_id"], "--in-place", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["outcome"] == "restored" and answer["service"] == "chain.service"
    assert inside.systemd.show("chain.service", "ActiveState") == "active"
    assert inside.systemd.show("chain.service", "LoadState") == "loaded"


def dependents(inside: Inside) -> None:
    for name, text in {"exporter": "PartOf=chain.service", "consensus": "BindsTo=chain.service"}.items():
        inside.systemd.unit(
            f"{name}.service", f"[Unit]\nAfter=chain.service\n{text}\n[Service]\nExecStart=/bin/sleep 9999\n"
        )
    inside.systemd.enter("systemctl", "start", "exporter.service", "consensus.service")


def state_of(inside: Inside) -> list[str]:
    return [inside.systemd.show(f"{name}.service", "ActiveState") for name in ("chain", "exporter", "consensus")]


def test_what_is_stopped_along_with_it_is_started_again(inside: Inside, tmp_path: Path) -> None:
    dependents(inside)
    document = taken(inside, "--quiesce", "stop")
    assert state_of(inside) == ["active"] * 3
    assert inside.run("restore", document["set_id"], "--in-place", "--yes").returncode == 0
    assert state_of(inside) == ["active"] * 3
    inside.systemd.enter("systemctl", "stop", "consensus.service")
    assert inside.run("restore", "--undo", "chain").returncode == 0
    assert state_of(inside) == ["active", "active", "inactive"], "its operator has stopped it since"


def test_a_dependent_that_does_not_start_again_is_told_and_voids_nothing(inside: Inside, tmp_path: Path) -> None:
    """As one that fails while the node's RPC isn't up yet."""
    inside.systemd.unit(
        "fickle.service",
        "[Unit]\nAfter=chain.service\nPartOf=chain.service\n[Service]\nType=oneshot\nRemainAfterExit=yes\n"
        f"ExecStart=/bin/mkdir {tmp_path}/once\n",
    )
    inside.systemd.enter("systemctl", "start", "fickle.service")
    document = taken(inside, "--quiesce", "stop")
    assert document["good"] and any("fickle.service" in warning for warning in document["warnings"]), document
    assert inside.systemd.show("chain.service", "ActiveState") == "active"
    assert inside.run("reap").returncode == 0
    (tmp_path / "once").rmdir()
    inside.systemd.enter("systemctl", "start", "fickle.service")
    done = inside.run("restore", document["set_id"], "--in-place", "--yes", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["outcome"] == "restored" and any("fickle.service" in warning for warning in answer["warnings"]), (
        answer
    )
    assert inside.systemd.show("chain.service", "ActiveState") == "active"


CUT = """
import os, signal, sys
from snapshotter import cli
from snapshotter.verbs import in_place_steps as steps
whole = steps.STEPS["exchange"]
def exchange(work):
    whole(work)
    os.kill(os.getpid(), signal.SIGKILL)
steps.STEPS["exchange"] = exchange
sys.exit(cli.run(sys.argv[1:]))
"""


def test_killed_between_the_stop_and_the_start_it_stays_masked_until_it_is_undone(
    inside: Inside, tmp_path: Path
) -> None:
    show = inside.systemd.show
    dependents(inside)
    document = taken(inside)
    (tmp_path / "node" / "since").write_text("x")
    variables = [f"{name}={value}" for name, value in inside.environment().items()]
    words = ["restore", document["set_id"], "--in-place", "--yes", "--config", str(inside.config)]
    killed = inside.systemd.enter("env", "-i", *variables, sys.executable, "-c", CUT, *words, check=False)
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr
    assert not (tmp_path / "node" / "since").exists(), "it was killed before the exchange"
    assert show("chain.service", "LoadState") == "masked"
    assert inside.systemd.enter("systemctl", "start", "chain.service", check=False).returncode != 0
    assert show("chain.service", "ActiveState") == "inactive"
    done = inside.run("restore", "--undo", "chain", "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "node" / "since").exists()
    assert show("chain.service", "LoadState") == "loaded" and show("chain.service", "ActiveState") == "active"
    assert state_of(inside) == ["active"] * 3
    assert not inside.systemd.enter("sh", "-c", "ls /etc/systemd/system.control", check=False).stdout.split()
