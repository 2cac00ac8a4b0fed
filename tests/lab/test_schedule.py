"""What `schedule install` installs, on LVM under a live systemd, and by a cron daemon where there is none."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.lab.lvm_kit import make_file_system, marks, storage
from tests.support import Command
from tests.systemd_kit import booted
from tests.unit.test_schedule import Inside

pytestmark = marks
#: A minute until the timer's next one, and a tick; emulated, on a machine that does other things too.
PATIENCE_S = 900
SERVICE, TIMER = "snapshotter-chain.service", "snapshotter-chain.timer"


def test_the_timer_fires_and_a_good_set_appears(tmp_path: Path, measured: Any) -> None:
    """Of a classic volume, with the kernel as a fresh boot leaves it: nothing has asked for dm-snapshot yet."""
    data = tmp_path / "chain"
    data.mkdir()
    with storage(1500) as made:
        made.linear("data", 400)
        subprocess.run(["rmmod", "dm_snapshot"], check=True)
        make_file_system(f"/dev/{made.vg}/data", "xfs")
        subprocess.run(["mount", f"/dev/{made.vg}/data", str(data)], check=True)
        try:
            (data / "file").write_text("x")
            with booted(tmp_path) as systemd:
                inside = Inside(tmp_path / "etc")
                inside.nodes(f'[node.chain]\npath = "{data}"\nevery = "1m"\n')
                inside.systemd = systemd
                started = time.monotonic()
                assert inside.json("schedule", "install")["active"]
                said = systemd.enter("systemd-analyze", "verify", "--man=no", TIMER, SERVICE, check=False)
                assert (said.returncode, said.stderr, said.stdout) == (0, "", "")
                said = systemd.enter(
                    "systemd-analyze", "security", "--no-pager", "--threshold=70", SERVICE, check=False
                )
                exposure = re.search(r"exposure level for .*: ([0-9.]+)", said.stdout)
                assert said.returncode == 0 and exposure is not None, said.stdout
                while systemd.show(SERVICE, "ExecMainExitTimestampMonotonic") in ("", "0"):
                    assert time.monotonic() < started + PATIENCE_S
                    time.sleep(3)  # each question is two programs of the same emulated CPU
                status = systemd.enter("systemctl", "status", "--no-pager", SERVICE, check=False).stdout
                assert systemd.show(SERVICE, "Result") == "success", status
                sets = inside.json("list", "chain")["sets"]
                assert sets[0]["good"] and sets[0]["snapshots"][0]["provider"] == "lvm", sets
                measured(f"timer: a good set by lvm, exposure {exposure[1]}, {time.monotonic() - started:.0f} s")
                systemd.enter("systemctl", "stop", TIMER, SERVICE)
                assert len(inside.json("schedule", "remove", "--all")["removed"]) == 1
        finally:
            subprocess.run(["umount", str(data)], check=False)


def test_cron_runs_its_line_and_a_good_set_appears(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").write_text("x")
    command = Command(tmp_path / "etc", config=f'[node.plain]\npath = "{plain}"\nevery = "1m"\n')
    daemon = subprocess.Popen(["cron", "-f"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        made = command.json("schedule", "install")
        assert made["kind"] == "cron" and made["active"]
        give_up = time.monotonic() + PATIENCE_S
        while not any(entry["good"] for entry in command.json("list", "plain")["sets"]):
            assert time.monotonic() < give_up
            time.sleep(3)
    finally:
        command.run("schedule", "remove", "--all")
        daemon.terminate()
        daemon.wait(30)
