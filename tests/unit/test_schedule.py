"""schedule: what it installs is what a live systemd runs, and only what is ours is touched."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from snapshotter.core.errors import PreconditionError
from snapshotter.host import schedules
from snapshotter.host.schedules import Schedule
from tests.support import Command
from tests.systemd_kit import Systemd, booted


class Inside(Command):
    """The command, run where systemctl reaches that systemd."""

    systemd: Systemd

    def words(self, *words: str) -> list[str]:
        return ["env", "-i", *[f"{name}={value}" for name, value in self.environment().items()], *self.argv(*words)]

    def run(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return self.systemd.enter(*self.words(*words), check=False)

    def nodes(self, text: str) -> None:
        self.config.write_text(f'state = "{self.home.parent}/state"\n{text}')


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Systemd]:
    with booted(tmp_path_factory.mktemp("systemd")) as made:
        yield made


@pytest.fixture
def inside(systemd: Systemd, tmp_path: Path) -> Iterator[Inside]:
    data = tmp_path / "node"
    data.mkdir()
    (data / "file").write_text("content")
    # As bad as a path may be.
    made = Inside(tmp_path / "it's 100%h $HOME \\x41")
    made.nodes(f'[node.validator-1]\npath = "{data}"\ntype = "validator"\nat = "02:30"\n')
    made.systemd = systemd
    yield made
    made.systemd.enter("systemctl", "stop", SERVICE, check=False)
    made.run("schedule", "remove", "--all")
    made.systemd.enter("rm", "-rf", f"/etc/systemd/system/{SERVICE}.d", f"/etc/systemd/system/{SERVICE}")


def ours(systemd: Systemd) -> list[str]:
    return systemd.enter(
        "find", "/etc/systemd/system", "/etc/cron.d", "-name", "snapshotter-*", "!", "-type", "d"
    ).stdout.split()


TIMER, SERVICE = "snapshotter-validator-1.timer", "snapshotter-validator-1.service"


@pytest.mark.root
def test_install_show_remove(inside: Inside) -> None:
    systemd = inside.systemd
    before = inside.json("schedule", "show")["schedules"]
    assert [(entry["node"], entry["active"], entry["kind"]) for entry in before] == [("validator-1", False, None)]
    for _ in range(2):
        made = inside.json("schedule", "install", "validator-1")
        assert made["active"] and made["current"] and made["kind"] == "systemd" and made["every_s"] == 86400
    assert systemd.show(TIMER, "ActiveState") == "active" and systemd.show(TIMER, "UnitFileState") == "enabled"
    assert systemd.show(TIMER, "Persistent") == "yes" and systemd.show(TIMER, "FixedRandomDelay") == "yes"
    assert systemd.show(SERVICE, "KillMode") == "mixed" and systemd.show(SERVICE, "SendSIGKILL") == "no"
    # The words arrive as they are, whatever is in them.
    argv = systemd.show(SERVICE, "ExecStart")
    assert "tick validator-1 --config" in argv
    assert "next" not in inside.run("schedule", "show").stdout and made["next_at"]

    inside.nodes(f'[node.validator-1]\npath = "{inside.home.parent}/node"\ntype = "validator"\nat = "02:45"\n')
    assert inside.json("schedule", "show", "validator-1")["schedules"][0]["current"] is False
    inside.json("schedule", "install")
    assert inside.json("schedule", "show", "validator-1")["schedules"][0]["current"] is True
    assert "45:00" in systemd.show(TIMER, "TimersCalendar")

    gone = inside.json("schedule", "remove", "validator-1")["removed"][0]["files"]
    assert len(gone) == 2 and ours(systemd) == []
    assert systemd.show(TIMER, "LoadState") == "not-found" and systemd.show(TIMER, "ActiveState") == "inactive"
    assert inside.json("schedule", "remove", "validator-1")["removed"] == [{"node": "validator-1", "files": []}]
    inside.error("schedule", "remove", "nobody", exit_code=4)


@pytest.mark.root
def test_systemd_finds_nothing_to_say_of_the_units(inside: Inside, measured: Any) -> None:
    """`systemd-analyze verify` is silent; `security` says how open the service is to what it runs; and it has no mount
    namespace of its own, in which what it mounts were seen by nobody."""
    systemd = inside.systemd
    inside.json("schedule", "install")
    said = systemd.enter("systemd-analyze", "verify", "--man=no", TIMER, SERVICE, check=False)
    assert (said.returncode, said.stderr, said.stdout) == (0, "", "")
    said = systemd.enter("systemd-analyze", "security", "--no-pager", "--threshold=70", SERVICE, check=False)
    assert said.returncode == 0, said.stdout
    exposure = re.search(r"exposure level for .*: ([0-9.]+)", said.stdout)
    assert exposure is not None
    measured(f"systemd-analyze security: exposure {exposure[1]} of 10")

    text = systemd.read(f"/etc/systemd/system/{SERVICE}")
    systemd.unit("probe.service", re.sub(r"ExecStart=.*", "ExecStart=/bin/sleep 60", text).replace("oneshot", "exec"))
    systemd.enter("systemctl", "start", "probe.service")
    pid = systemd.show("probe.service", "MainPID")
    links = [systemd.enter("readlink", f"/proc/{number}/ns/mnt").stdout for number in ("1", pid)]
    assert links[0] == links[1]
    systemd.enter("systemctl", "stop", "probe.service")
    systemd.enter("rm", "/etc/systemd/system/probe.service")


@pytest.mark.root
@pytest.mark.parametrize("content", ["[Service]\nExecStart=/bin/true\n", ""])
def test_what_is_not_ours_is_left_alone(inside: Inside, content: str) -> None:
    systemd = inside.systemd
    inside.nodes(
        f'[node.validator-1]\npath = "{inside.home.parent}/node"\nevery = "1h"\n'
        f'[node.other]\npath = "{inside.home.parent}/other"\nevery = "1h"\n'
    )
    inside.json("schedule", "install", "other")
    systemd.write(f"/etc/systemd/system/{SERVICE}", content)
    error = inside.error("schedule", "install", "validator-1", exit_code=3)
    assert SERVICE in error["line"]
    assert inside.json("schedule", "remove", "--all")["removed"][0]["node"] == "other"
    assert systemd.read(f"/etc/systemd/system/{SERVICE}") == content
    assert ours(systemd) == [f"/etc/systemd/system/{SERVICE}"]
    systemd.enter("rm", f"/etc/systemd/system/{SERVICE}")


@pytest.mark.root
def test_one_that_runs_is_not_removed_under_it(inside: Inside) -> None:
    systemd = inside.systemd
    inside.json("schedule", "install")
    systemd.enter("mkdir", f"/etc/systemd/system/{SERVICE}.d")
    systemd.unit(f"{SERVICE}.d/slow.conf", "[Service]\nExecStart=\nExecStart=/bin/sleep 300\nExecStopPost=\n")
    systemd.enter("systemctl", "start", "--no-block", SERVICE)
    while systemd.show(SERVICE, "ActiveState") != "activating":
        time.sleep(0.1)
    error = inside.error("schedule", "remove", "validator-1", exit_code=5)
    assert "systemctl stop" in error["cure"] and len(ours(systemd)) == 3
    assert systemd.show(TIMER, "ActiveState") == "active"
    systemd.enter("systemctl", "stop", SERVICE)
    inside.json("schedule", "remove", "validator-1")


@pytest.mark.root
def test_a_timer_that_would_not_run_is_said(inside: Inside) -> None:
    systemd = inside.systemd
    inside.json("schedule", "install")
    systemd.enter("systemctl", "stop", TIMER)
    assert "inactive" in inside.json("schedule", "show")["schedules"][0]["why"]
    systemd.enter("systemctl", "start", TIMER)
    systemd.enter("systemctl", "disable", TIMER)
    assert "next boot" in inside.json("schedule", "show")["schedules"][0]["why"]
    systemd.enter("rm", f"/etc/systemd/system/{SERVICE}")
    assert "missing" in inside.json("schedule", "show")["schedules"][0]["why"]
    assert inside.json("schedule", "install")["active"]


@pytest.mark.root
@pytest.mark.parametrize("kind", ["copy", "btrfs"])
def test_the_timer_fires_and_a_good_set_appears(
    inside: Inside, tmp_path: Path, kind: str, measured: Any, pytestconfig: pytest.Config
) -> None:
    """Within the minute, by the hardened service; and what it mounts and pauses is let go."""
    if kind == "copy" and not pytestconfig.getoption("--full"):
        return  # a minute of waiting, and the same units
    systemd = inside.systemd
    data = tmp_path / "node"
    if kind == "btrfs":
        image = tmp_path / "disk.img"
        with open(image, "wb") as file:
            file.truncate(200 << 20)
        subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True)
        systemd.enter("mount", "-o", "loop", str(image), str(data))
        systemd.enter("sh", "-c", f"echo x >'{data}/file'")
    inside.nodes(f'[node.validator-1]\npath = "{data}"\nevery = "1m"\nfloor = "0.1%"\n')
    started = time.monotonic()
    inside.json("schedule", "install")
    try:
        while not (sets := inside.json("list", "validator-1")["sets"]):
            assert time.monotonic() < started + 90, systemd.enter("systemctl", "status", SERVICE, check=False).stdout
            time.sleep(1)
        took = time.monotonic() - started
        while systemd.show(SERVICE, "ActiveState") != "inactive":
            assert time.monotonic() < started + 120
            time.sleep(0.2)
        assert systemd.show(SERVICE, "Result") == "success"
        sets = inside.json("list", "validator-1")["sets"]
        assert sets[0]["good"] and sets[0]["grade"] == "filesystem" and sets[0]["snapshots"][0]["provider"] == kind
        measured(f"the timer fired and a good set by {kind} appeared {took:.0f} s after `schedule install`")
        found = json.loads(inside.run("status", "--json").stdout)["nodes"][0]
        assert found["ok"] and found["newest_slot"]["slot"], found["problems"]
    finally:
        inside.run("schedule", "remove", "--all")
        systemd.enter("umount", str(data), check=False)


@pytest.mark.root
def test_a_time_that_was_slept_through_is_made_up_for(inside: Inside) -> None:
    """`Persistent=true`: the machine was off when it was due."""
    systemd = inside.systemd
    inside.json("schedule", "install")
    assert inside.json("list", "validator-1")["sets"] == []
    stamp = f"/var/lib/systemd/timers/stamp-{TIMER}"
    # The fixed delay of up to six minutes holds then too: cut it, by what an operator would do.
    systemd.enter("mkdir", "-p", f"/etc/systemd/system/{TIMER}.d")
    systemd.unit(f"{TIMER}.d/now.conf", "[Timer]\nRandomizedDelaySec=0\n")
    systemd.enter("systemctl", "stop", TIMER)
    systemd.enter("touch", "-d", "2 days ago", stamp)
    systemd.enter("systemctl", "start", TIMER)
    give_up = time.monotonic() + 60
    while not any(found["good"] for found in inside.json("list", "validator-1")["sets"]):  # one being taken is none yet
        assert time.monotonic() < give_up
        time.sleep(0.5)
    systemd.enter("rm", "-rf", f"/etc/systemd/system/{TIMER}.d")


@pytest.mark.root
def test_killed_anywhere_it_can_be_done_again_and_undone(inside: Inside) -> None:
    started = time.monotonic()
    inside.json("schedule", "install")
    whole = time.monotonic() - started
    for k in range(8):
        verb = ("install", "remove")[k % 2]
        process = subprocess.Popen(
            ["nsenter", "-t", str(inside.systemd.pid), "-p", "-m", "-C", "-u", "--wd=/", "--",
             *inside.words("schedule", verb, "validator-1")],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(whole * (0.3 + 0.7 * k / 8))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if verb == "install":
            assert inside.json("schedule", "install")["active"]
        else:
            inside.json("schedule", "remove", "validator-1")
            assert [path for path in ours(inside.systemd) if not path.endswith(".new")] == []


def test_without_root_or_without_a_schedule_it_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "node"
    data.mkdir()
    command = Command(tmp_path / "etc", config=f'[node.a]\npath = "{data}"\n')
    if os.geteuid() == 0:
        assert "every" in command.error("schedule", "install", "a", exit_code=2)["cure"]
    else:
        assert "root" in command.error("schedule", "install", "a", exit_code=3)["cure"]
    assert "init" in command.error("schedule", "install", str(tmp_path), exit_code=2)["cure"]


EVERY = (60, 90, 300, 420, 600, 900, 1800, 2700, 3600, 5400, 6 * 3600, 86400, 36 * 3600, 7 * 86400)


@pytest.mark.parametrize("every_s", EVERY)
@pytest.mark.parametrize("at_min", [None, 0, 61, 150, 1439])
def test_the_timer_comes_at_the_minute_that_is_due(every_s: int, at_min: int | None) -> None:
    """Of systemd's own reading of the expression: every time at which something is due is one of the timer's."""
    schedule = Schedule(node="n", argv=("x",), reap_argv=("y",), every_s=every_s, at_min=at_min)
    first = datetime(2026, 2, 28, tzinfo=UTC) + timedelta(minutes=at_min or 0)
    for k in range(3):
        due = first + timedelta(minutes=k * (every_s // 60))
        before = (due - timedelta(seconds=1)).strftime("%Y-%m-%d %H:%M:%S UTC")
        said = subprocess.run(
            ["systemd-analyze", "calendar", f"--base-time={before}", schedule.calendar],
            capture_output=True, text=True, env={**os.environ, "TZ": "UTC"},
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        assert due.strftime("Next elapse: %a %Y-%m-%d %H:%M:%S UTC") in said.stdout


@pytest.fixture
def cron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without systemd: its cron.d, and no units."""
    place = tmp_path / "cron.d"
    place.mkdir()
    monkeypatch.setattr(schedules, "CRON", str(place))
    monkeypatch.setattr(schedules, "UNITS", str(tmp_path / "none"))
    monkeypatch.setattr(schedules, "BOOTED", str(tmp_path / "none"))
    return place


def test_where_there_is_no_systemd_cron_has_a_line(cron: Path) -> None:
    words = ("/opt/a b/snapshotter", "tick", "v.1", "--config", "/etc/it's 100%/c.toml")
    schedule = Schedule(node="v.1", argv=words, reap_argv=("r",), every_s=900, at_min=5)
    for _ in range(2):
        found = schedules.install(schedule)
    assert found.kind == "cron" and found.files == (str(cron / "snapshotter-v_1"),)
    path = Path(found.files[0])
    assert path.stat().st_mode & 0o777 == 0o644
    line = path.read_text().splitlines()[-1]
    match = re.fullmatch(r"(\d+)-59/15 \* \* \* \* root (.*) >/dev/null", line)
    assert match is not None and 5 <= int(match[1]) <= 6
    # As cron does it: an unescaped % would end the command, an escaped one loses its backslash; then sh.
    assert not re.search(r"(?<!\\)%", match[2])
    said = subprocess.run(
        ["sh", "-c", "printf '%s\\n' " + match[2].replace("\\%", "%")], capture_output=True, text=True
    )
    assert said.stdout.splitlines() == list(words)
    (cron / "foreign").write_text("x")
    assert schedules.remove("other") == [] and schedules.remove("v.1") == [str(path)]
    assert os.listdir(cron) == ["foreign"] and schedules.installed() == []


def test_cron_two_nodes_whose_files_would_be_one(cron: Path) -> None:
    schedules.install(Schedule(node="v.1", argv=("x",), reap_argv=("r",), every_s=900))
    with pytest.raises(PreconditionError, match="isn't this node's"):
        schedules.install(Schedule(node="v_1", argv=("x",), reap_argv=("r",), every_s=900))


def test_a_path_that_no_file_could_hold(cron: Path) -> None:
    with pytest.raises(PreconditionError):
        schedules.install(Schedule(node="v", argv=("a\nb",), reap_argv=("r",), every_s=900))
    assert os.listdir(cron) == []


def test_json(tmp_path: Path) -> None:
    command = Command(tmp_path / "etc", config="")
    assert json.loads(command.run("schedule", "show", "--json").stdout) == {"schema": 1, "schedules": []}
