"""A node's service: a real systemd (pid 1 of a pid namespace of its own), and shell scripts as operators write them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshotter.core.errors import BusyError, PreconditionError, StorageError
from snapshotter.host import service
from tests.systemd_kit import Systemd, booted

SLEEPS = "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/bin/sleep 9999\nRestart=always\n"


class Asked(Systemd):
    """Runs Python inside, where `systemctl` reaches it."""

    def python(self, program: str) -> Any:
        """The value that the program's `answer(...)` is given, or the error's class and line."""
        whole = (
            "import json\nfrom snapshotter.core.errors import SnapshotterError\n"
            "from snapshotter.host import service\n"
            "def answer(value): print(json.dumps(value))\n"
            "try:\n" + "".join(f"    {line}\n" for line in program.splitlines()) + "except SnapshotterError as error:\n"
            "    answer([type(error).__name__, error.line()])\n"
        )
        return json.loads(self.enter(sys.executable, "-c", whole).stdout or "null")


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    with booted(tmp_path_factory.mktemp("systemd")) as made:
        made.write("/etc/systemd/system/in-etc.service", SLEEPS)
        made.write("/run/systemd/system/in-run.service", SLEEPS)
        made.enter("ln", "-s", "in-etc.service", "/etc/systemd/system/alias.service")
        made.enter("systemctl", "daemon-reload")
        yield Asked(made.pid)


@pytest.mark.root
def test_it_runs_stops_and_starts(systemd: Asked) -> None:
    said = systemd.python(
        "unit = service.SystemdUnit('in-etc.service')\n"
        "seen = [unit.running()]\n"
        "unit.start(); unit.start(); seen.append(unit.running())\n"
        "group = unit.control_group() is not None\n"
        "unit.stop(); unit.stop(); seen.append(unit.running())\n"
        "answer([seen, group])"
    )
    assert said == [[False, True, False], True]


@pytest.mark.root
@pytest.mark.parametrize("unit", ["in-etc.service", "in-run.service", "in-etc"])
def test_a_masked_unit_can_not_be_started_wherever_it_is_defined(systemd: Asked, unit: str) -> None:
    """`systemctl mask --runtime` exits 0 for a unit in /etc/systemd/system, and it can be started all the same."""
    said = systemd.python(
        f"unit = service.SystemdUnit({unit!r})\n"
        "unit.start()\n"
        "before = unit.masked(); unit.mask(); unit.mask(); masked = unit.masked(); goes_on = unit.running()\n"
        "unit.stop()\n"
        "answer([before, masked, goes_on, unit.running()])"
    )
    assert said == [False, True, True, False]
    real = "in-run.service" if "run" in unit else "in-etc.service"
    assert systemd.enter("systemctl", "start", real, check=False).returncode != 0
    assert systemd.python(f"service.SystemdUnit({unit!r}).start()")[0] == "StorageError"
    said = systemd.python(
        f"unit = service.SystemdUnit({unit!r})\n"
        "unit.unmask(); unit.unmask(); masked = unit.masked()\n"
        "unit.start(); runs = unit.running(); unit.stop()\n"
        "answer([masked, runs])"
    )
    assert said == [False, True]
    assert not systemd.enter("sh", "-c", "ls /etc/systemd/system.control").stdout.split()


@pytest.mark.root
def test_a_mask_outlives_a_power_cut(tmp_path: Path) -> None:
    """Between the renames of a restore a node that starts at boot would find half of each."""
    with booted(tmp_path) as machine:
        machine.unit("node.service", SLEEPS)
        assert Asked(machine.pid).python("service.SystemdUnit('node.service').mask()") is None
    with booted(tmp_path) as machine:
        assert machine.enter("systemctl", "start", "node.service", check=False).returncode != 0
        said = Asked(machine.pid).python(
            "unit = service.SystemdUnit('node.service')\n"
            "masked = unit.masked(); unit.unmask(); unit.start(); runs = unit.running(); unit.stop()\n"
            "answer([masked, runs])"
        )
        assert said == [True, True]


@pytest.mark.root
def test_an_alias_is_refused_by_its_own_name(systemd: Asked) -> None:
    """Masked by either name alone, the other can still be started, or says that nothing runs."""
    kind, line = systemd.python("service.SystemdUnit('alias.service').mask()")
    assert kind == "PreconditionError" and "in-etc.service" in line
    assert systemd.python("service.SystemdUnit('alias.service').refuse_unmaskable()") == [kind, line]
    assert systemd.python("service.SystemdUnit('alias.service').unmask()") is None, "there is no mask of ours"


@pytest.mark.root
def test_what_can_not_be_masked_is_said_before(systemd: Asked) -> None:
    assert systemd.python("service.SystemdUnit('in-etc').refuse_unmaskable()") is None
    read_only = "mount --bind /etc/systemd /etc/systemd && mount -o remount,bind,ro /etc/systemd"
    assert systemd.enter("sh", "-c", read_only).returncode == 0
    try:
        kind, line = systemd.python("service.SystemdUnit('in-etc').refuse_unmaskable()")
        assert kind == "PreconditionError" and "can't mask it" in line
    finally:
        systemd.enter("umount", "/etc/systemd")


@pytest.mark.root
def test_one_without_a_mask_of_ours_needs_no_reload(systemd: Asked) -> None:
    fails = "def must(*_): raise service.StorageError('no reload today')\nservice._must = must\n"
    assert systemd.python(f"{fails}service.SystemdUnit('in-etc').unmask()") is None
    systemd.python("service.SystemdUnit('in-etc').mask()")
    assert systemd.python(f"{fails}service.SystemdUnit('in-etc').unmask()")[0] == "StorageError"
    said = systemd.python("unit = service.SystemdUnit('in-etc')\nunit.unmask(); answer(unit.masked())")
    assert said is False, "the link was gone, and systemd had not been told"


@pytest.mark.root
def test_control_what_systemctl_calls_a_runtime_mask_is_none_for_a_unit_in_etc(systemd: Asked) -> None:
    assert systemd.enter("systemctl", "mask", "--runtime", "in-etc.service").returncode == 0
    try:
        assert systemd.python("answer(service.SystemdUnit('in-etc.service').masked())") is False
        assert systemd.enter("systemctl", "start", "in-etc.service").returncode == 0
    finally:
        systemd.enter("systemctl", "unmask", "--runtime", "in-etc.service")
        systemd.enter("systemctl", "stop", "in-etc.service")


@pytest.mark.root
def test_the_operators_own_mask_is_told_and_stays(systemd: Asked) -> None:
    systemd.enter("sh", "-c", "ln -s /dev/null /etc/systemd/system/retired.service; systemctl daemon-reload")
    said = systemd.python(
        "unit = service.SystemdUnit('retired.service')\n"
        "before = unit.masked(); unit.mask(); unit.unmask(); answer([before, unit.masked()])"
    )
    assert said == [True, True]


@pytest.mark.root
def test_an_unknown_unit_is_an_error(systemd: Asked) -> None:
    assert systemd.python("service.SystemdUnit('nothing.service').running()")[0] == "PreconditionError"


@pytest.mark.root
def test_a_unit_that_was_started_too_often_is_started_all_the_same(systemd: Asked) -> None:
    systemd.enter(
        "sh", "-c", "for i in 1 2 3 4 5 6 7 8; do systemctl start in-run; systemctl stop in-run; done", check=False
    )
    assert systemd.python("unit = service.SystemdUnit('in-run'); unit.start(); answer(unit.running())") is True
    systemd.enter("systemctl", "stop", "in-run")


@pytest.fixture
def dependent(systemd: Asked) -> Iterator[list[str]]:
    """Units that a stop of in-etc stops too, by each way of saying so; among them a target that wants another unit,
    which its operator has stopped."""
    says = {
        "required.service": "Requires=in-etc.service",
        "requisite.service": "Requisite=in-etc.service",
        "bound.service": "BindsTo=in-etc.service",
        "part.service": "PartOf=in-etc.service",
        "propagated.service": "StopPropagatedFrom=in-etc.service",
        "second.service": "BindsTo=bound.service",
        "idle.service": "PartOf=in-etc.service",
        "past-idle.service": "PartOf=idle.service",
        "other.service": "",
        "wanting.target": "Requires=in-etc.service\nWants=other.service",
        "beside.service": "Wants=in-etc.service",
    }
    systemd.enter("systemctl", "start", "in-etc.service")
    for name, text in says.items():
        head = f"[Unit]\nDefaultDependencies=no\nAfter=in-etc.service\n{text}\n"
        rest = "[Service]\nExecStart=/bin/sleep 9999\n" if name.endswith(".service") else ""
        systemd.write(f"/etc/systemd/system/{name}", head + rest)
    systemd.enter("systemctl", "daemon-reload")
    systemd.enter("systemctl", "start", *says)
    systemd.enter("systemctl", "stop", "idle.service", "other.service")
    systemd.enter("systemctl", "start", "past-idle.service")
    yield sorted(says.keys() - {"idle.service", "past-idle.service", "other.service", "beside.service"})
    systemd.enter("systemctl", "stop", "in-etc.service", *says)
    for name in says:
        os.unlink(f"/proc/{systemd.pid}/root/etc/systemd/system/{name}")
    systemd.enter("systemctl", "daemon-reload")


def active(systemd: Asked, names: list[str]) -> list[str]:
    return [name for name in names if systemd.show(name, "ActiveState") == "active"]


@pytest.mark.root
def test_those_that_are_stopped_along_with_it_are_known_before(systemd: Asked, dependent: list[str]) -> None:
    assert active(systemd, dependent) == dependent
    assert sorted(systemd.python("answer(service.SystemdUnit('in-etc').stops_along())")) == dependent
    systemd.enter("systemctl", "stop", "in-etc.service")
    assert active(systemd, dependent) == [], "each of them is stopped by that"
    assert len(active(systemd, ["beside.service", "past-idle.service"])) == 2
    assert systemd.python("answer(service.SystemdUnit('in-etc').stops_along())") == []


@pytest.mark.root
def test_they_are_started_and_nobody_else(systemd: Asked, dependent: list[str]) -> None:
    systemd.python(
        "unit = service.SystemdUnit('in-etc.service')\nalong = unit.stops_along()\nunit.stop(); unit.start(along)"
    )
    assert active(systemd, ["in-etc.service", *dependent]) == ["in-etc.service", *dependent]
    assert active(systemd, ["other.service", "idle.service"]) == [], "their operator had stopped them"


@pytest.mark.root
@pytest.mark.parametrize("by", ["the end", "the watchdog", "reap"])
def test_a_hold_by_a_stop_starts_them_too(systemd: Asked, dependent: list[str], by: str) -> None:
    dies = {
        "the end": "pass",
        "the watchdog": "os.kill(os.getpid(), 9)",
        "reap": "os.kill(held._guard._process.pid, 9); os.kill(os.getpid(), 9)",
    }[by]
    hold = (
        "import os\nfrom snapshotter.host import quiesce, service\n"
        "with quiesce.stop(service.SystemdUnit('in-etc.service'), 's1') as held:\n"
        f"    print(service.SystemdUnit('in-etc.service').running(), flush=True); {dies}"
    )
    all_of_them = ["in-etc.service", *dependent]
    done = systemd.enter(sys.executable, "-c", hold, check=False)
    assert done.stdout.strip() == "False", done.stderr
    if by == "reap":
        assert active(systemd, all_of_them) == []
        assert len(systemd.python("from snapshotter.host import quiesce\nanswer(quiesce.reap())")) == 1
    give_up = time.monotonic() + 30
    while by == "the watchdog" and active(systemd, all_of_them) != all_of_them and time.monotonic() < give_up:
        time.sleep(0.1)
    assert active(systemd, all_of_them) == all_of_them
    assert active(systemd, ["other.service", "idle.service"]) == []


@pytest.mark.root
def test_a_hold_by_a_stop_starts_one_that_was_started_too_often(systemd: Asked) -> None:
    """The limit is longer than anybody waits: it would stay stopped."""
    sleeps = "[Service]\nExecStart=/bin/sleep 9999\n"
    systemd.unit("limited.service", f"[Unit]\nStartLimitIntervalSec=1d\nStartLimitBurst=2\n{sleeps}")
    # Something keeps it loaded: what systemd forgets it doesn't count.
    systemd.unit("keeps.service", f"[Unit]\nAfter=limited.service\n{sleeps}")
    systemd.enter("systemctl", "start", "keeps.service", "limited.service")
    hold = (
        "from snapshotter.host import quiesce, service\n"
        "with quiesce.stop(service.SystemdUnit('limited.service'), 's1') as held: pass"
    )
    for _ in range(4):
        done = systemd.enter(sys.executable, "-c", hold, check=False)
        assert done.returncode == 0, done.stderr
        assert active(systemd, ["limited.service"]) == ["limited.service"]
    systemd.enter("systemctl", "stop", "limited.service", "keeps.service")


# ---------------------------------------------------------------------------------------------- the operator's commands

SCRIPT = """#!/bin/sh
# start|stop|status, as the LSB has it: status exits 0 when it runs, 3 when it is stopped.
cd "$(dirname "$0")" || exit 1
alive() { [ -f pid ] && kill -0 "$(cat pid)" 2>/dev/null; }
case $1 in
    start) alive && exit 0; setsid sh -c 'exec 9>>"$0/data/log"; exec sleep 9999' "$PWD" </dev/null >/dev/null 2>&1 &
        echo $! >pid ;;
    stop) alive && kill "$(cat pid)"; for i in $(seq 100); do alive || exit 0; sleep 0.1; done; exit 1 ;;
    status) alive && exit 0; exit 3 ;;
esac
"""


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[tuple[service.Commands, Path]]:
    script = tmp_path / "service"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    (tmp_path / "data").mkdir()
    made = service.of(None, (str(script), "stop"), (str(script), "start"), (str(script), "status"))
    assert isinstance(made, service.Commands)
    yield made, tmp_path / "data"
    made.stop()


def test_commands_run_stop_and_start(scripted: tuple[service.Commands, Path]) -> None:
    made, data = scripted
    assert not made.running()
    made.start()
    made.start()
    assert made.running()
    with pytest.raises(BusyError) as caught:
        service.prove_stopped(made, [str(data)], patience_s=0.5)
    assert "sleep" in caught.value.message
    made.stop()
    made.stop()
    assert not made.running()
    service.prove_stopped(made, [str(data)])
    assert not made.can_mask and not made.masked()
    made.mask()
    made.unmask()


def test_a_service_that_comes_back_is_not_stopped(scripted: tuple[service.Commands, Path]) -> None:
    made, data = scripted
    made.start()
    again = service.Commands(stop_argv=("true",), start_argv=made.start_argv, status_argv=made.status_argv)
    again.stop()
    with pytest.raises(BusyError):
        service.prove_stopped(again, [str(data)], patience_s=0.3)


def test_a_service_without_open_files_that_still_runs_is_not_stopped(tmp_path: Path) -> None:
    made = service.Commands(stop_argv=("true",), start_argv=("true",), status_argv=("true",))
    with pytest.raises(BusyError) as caught:
        service.prove_stopped(made, [str(tmp_path)], patience_s=0.3)
    assert "starts it again" in caught.value.message


def test_without_a_service_whoever_runs_there_is_named(tmp_path: Path) -> None:
    shell = subprocess.Popen(["sleep", "999"], cwd=tmp_path)
    try:
        with pytest.raises(BusyError) as caught:
            service.prove_stopped(None, [str(tmp_path)], patience_s=0)
        assert f"pid {shell.pid}" in caught.value.message and "config" in caught.value.cure
    finally:
        shell.send_signal(signal.SIGKILL)
        shell.wait()
    service.prove_stopped(None, [str(tmp_path), str(tmp_path / "gone")], patience_s=5)


def test_one_who_ends_within_the_patience_is_waited_for(tmp_path: Path) -> None:
    shell = subprocess.Popen(["sleep", "1"], cwd=tmp_path)
    try:
        service.prove_stopped(None, [str(tmp_path)], patience_s=60)
    finally:
        shell.wait()


@pytest.mark.root
@pytest.mark.parametrize("uses_it", [False, True])
def test_a_chroot_of_its_own_on_the_same_disk_counts_only_if_it_uses_the_data(tmp_path: Path, uses_it: bool) -> None:
    """As a container in a directory, or RootDirectory= of systemd: another mount namespace, another root."""
    data, jail = tmp_path / "data", tmp_path / "jail"
    for path in (data, jail):
        path.mkdir()
    (data / "CURRENT").write_text("x")
    program = "import os, sys, time; held = open(sys.argv[2]); os.chroot(sys.argv[1]); os.chdir('/')\ntime.sleep(999)"
    held = data / "CURRENT" if uses_it else jail / "log"
    held.touch()
    process = subprocess.Popen(["unshare", "--mount", sys.executable, "-c", program, str(jail), str(held)])
    try:
        give_up = time.monotonic() + 30
        while os.path.realpath(f"/proc/{process.pid}/root") != str(jail) and time.monotonic() < give_up:
            time.sleep(0.05)
        if uses_it:
            with pytest.raises(BusyError) as caught:
                service.prove_stopped(None, [str(data)], patience_s=0)
            assert f"pid {process.pid}" in caught.value.message
        else:
            service.prove_stopped(None, [str(data)], patience_s=0)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("status", "error"), [(("sh", "-c", "exit 1"), PreconditionError), ((), PreconditionError)], ids=["odd", "none"]
)
def test_a_status_that_tells_nothing_is_an_error(status: tuple[str, ...], error: type[Exception]) -> None:
    made = service.Commands(stop_argv=("true",), start_argv=("true",), status_argv=status)
    with pytest.raises(error):
        made.running()


def test_a_stop_that_fails_is_an_error() -> None:
    made = service.Commands(stop_argv=("sh", "-c", "echo no >&2; exit 1"), start_argv=("true",), status_argv=("true",))
    with pytest.raises(StorageError) as caught:
        made.stop()
    assert "no" in caught.value.message


def test_an_error_names_the_command_that_ran() -> None:
    made = service.Commands(stop_argv=("false", "stop", "node"), start_argv=("false", "start", "node"), status_argv=())
    assert made.name == "false node"
    for act, command in ((made.stop, "false stop node"), (made.start, "false start node")):
        with pytest.raises(StorageError) as caught:
            act()
        assert caught.value.object == command and caught.value.cure
    apart = service.Commands(stop_argv=("sh", "-c", "off"), start_argv=("sh", "-c", "on"), status_argv=())
    assert apart.name == "sh -c on"


def test_no_service() -> None:
    assert service.of(None) is None
    assert service.of("kalychain.service") == service.SystemdUnit("kalychain.service")
