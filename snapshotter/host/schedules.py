"""What makes backups happen by themselves on this host: a systemd timer with its service, or a line for cron where
there is no systemd. Must know no config and no verb: it is told what to run, and how often.

The timer is a heartbeat: it runs an idempotent command more often than anything is due, at minutes that fit. What is
due is that command's business. Only files whose first line is ours are ever replaced or removed.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from snapshotter.core.command import run
from snapshotter.core.digest import sha256
from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, StorageError
from snapshotter.host.places import host_name, replace_file

UNITS = "/etc/systemd/system"
CRON = "/etc/cron.d"
#: sd_booted(3): there is a running systemd exactly if this directory is there.
BOOTED = "/run/systemd/system"

_LABEL = "# Made by `snapshotter schedule` for node "
_DIVISORS = (60, 30, 20, 15, 12, 10, 6, 5, 4, 3, 2, 1)
_CRON_DAEMONS = frozenset({"cron", "crond", "fcron", "dcron", "bcron-sched"})

#: Root stays root, as storage wants it. Left out on purpose, as each would give the service a mount namespace of its
#: own (systemd.exec(5)), in which what it mounts is seen by nobody else: PrivateTmp, PrivateDevices, PrivateMounts,
#: ProtectSystem, ProtectHome, ProtectKernelTunables, ProtectKernelModules, ProtectKernelLogs, ProtectControlGroups,
#: ProtectProc, ReadOnlyPaths. ProtectClock and DevicePolicy would close the disks, RestrictSUIDSGID a copy's modes,
#: MemoryDenyWriteExecute the databases' engines. What runs under these limits loads no kernel module, so the one that
#: LVM's classic snapshots need, and that a fresh boot needn't have, is loaded before (`+`: without limits).
_SERVICE = """{label}
# Changes here are lost at the next `schedule install`; drop-ins (systemctl edit) stay. What the config's hooks run is
# under these limits too: a drop-in can lift one.
[Unit]
Description=snapshotter: backups of {node}
After=local-fs.target network-online.target time-sync.target

[Service]
Type=oneshot
ExecStartPre=-+/bin/sh -c 'test ! -e /sys/class/misc/device-mapper || modprobe -q dm_snapshot'
ExecStart={run}
ExecStopPost={reap}
KillMode=mixed
SendSIGKILL=no
TimeoutStopSec=10min
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
ProtectHostname=yes
RestrictRealtime=yes
RestrictNamespaces=mnt net pid ipc uts
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=~@clock @cpu-emulation @debug @module @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_CHOWN CAP_FOWNER CAP_FSETID CAP_SETFCAP
CapabilityBoundingSet=CAP_MKNOD CAP_KILL CAP_SYS_PTRACE CAP_IPC_LOCK CAP_SYS_RESOURCE CAP_SYS_NICE CAP_SETUID
CapabilityBoundingSet=CAP_SETGID CAP_LINUX_IMMUTABLE
"""
_TIMER = """{label}
[Unit]
Description=snapshotter: when {node} is looked after

[Timer]
OnCalendar={calendar}
RandomizedDelaySec={delay}s
FixedRandomDelay=true
AccuracySec=1s
Persistent=true

[Install]
WantedBy=timers.target
"""
_CRON_FILE = """{label}
# Changes here are lost at the next `schedule install`. No report of what went well; what did not, cron mails.
{minutes} * * * * root {run} >/dev/null
"""

Kind = Literal["systemd", "cron"]


class Schedule(Struct, frozen=True):
    """What to run for a node, and how often something of it is due: every `every_s` seconds, at `at_min` minutes after
    00:00 UTC (None: whenever)."""

    node: str
    argv: tuple[str, ...]
    reap_argv: tuple[str, ...]
    every_s: float
    at_min: int | None = None

    @property
    def step_min(self) -> int:
        """Minutes from one run to the next: an hour, or less where what is due comes at other minutes of the hour."""
        every_min = max(1, int(self.every_s // 60))
        return next(step for step in _DIVISORS if every_min % step == 0)

    @property
    def delay_s(self) -> int:
        """The longest fixed delay, so that not all hosts of a site begin in the same second."""
        return self.step_min * 6

    @property
    def calendar(self) -> str:
        """When, as systemd.time(7) has it."""
        first = (self.at_min or 0) % self.step_min
        minutes = {1: "*", 60: f"{first:02d}"}.get(self.step_min, f"{first:02d}/{self.step_min}")
        return f"*-*-* *:{minutes}:00 UTC"

    @property
    def cron_minutes(self) -> str:
        """When, as crontab(5) has it, after a delay that is always this host's: cron has none of its own."""
        share = int(sha256(f"{host_name()} {self.node}".encode()).hexdigest(), 16) % (self.delay_s // 60 + 1)
        first = ((self.at_min or 0) + share) % self.step_min
        return {1: "*", 60: str(first)}.get(self.step_min, f"{first}-59/{self.step_min}")

    def texts(self, kind: Kind) -> dict[str, str]:
        """The files that it is made of: path -> content. Raises PreconditionError for words that they can't hold."""
        label = f"{_LABEL}{self.node}"
        if any("\n" in word or "\0" in word for word in (*self.argv, *self.reap_argv)):
            raise PreconditionError("a path with a line break can be in no timer", object=repr(self.argv[0]))
        if kind == "cron":
            command = _cron_words(self.argv)
            return {_cron_path(self.node): _CRON_FILE.format(label=label, minutes=self.cron_minutes, run=command)}
        words = {"run": _unit_words(self.argv), "reap": _unit_words(self.reap_argv)}
        return {
            _unit_path(self.node, "service"): _SERVICE.format(label=label, node=self.node, **words),
            _unit_path(self.node, "timer"): _TIMER.format(
                label=label, node=self.node, calendar=self.calendar, delay=self.delay_s
            ),
        }


class Installed(Struct, frozen=True):
    """What is there for a node. `active`: it will run by itself; `why` not. `next_at`: systemd's own words, or ''."""

    node: str
    kind: Kind
    files: tuple[str, ...]
    active: bool
    why: str = ""
    next_at: str = ""


def kind_here() -> Kind:
    """Raises PreconditionError where there is neither."""
    if os.path.isdir(BOOTED):
        return "systemd"
    if os.path.isdir(CRON):
        return "cron"
    raise PreconditionError(
        "there is neither a running systemd nor a directory for cron",
        object=CRON,
        cure="run `snapshotter tick NODE` every hour by whatever this host has",
    )


def install(schedule: Schedule) -> Installed:
    """Write its files and start it. Twice is fine; killed in between: run it again. Raises PreconditionError (a file
    that isn't ours is in the way, no permission), StorageError (systemd refuses)."""
    kind = kind_here()
    texts = schedule.texts(kind)
    for path in texts:
        _refuse_foreign(path, schedule.node)
    other = [found for found in installed() if found.node == schedule.node and found.kind != kind]
    for path, text in texts.items():
        if _content(path) != text:
            replace_file(path, text.encode(), 0o644)
    if kind == "systemd":
        timer = f"snapshotter-{schedule.node}.timer"
        _systemctl("daemon-reload")
        _systemctl("enable", "--", timer)
        _systemctl("restart", "--", timer)  # one that runs keeps its old times otherwise
    for found in other:  # the host has got a systemd since, or lost it
        _remove(found)
    return next(found for found in installed() if found.node == schedule.node)


def installed() -> list[Installed]:
    """Everything of ours that is there, by node. Reads files that everybody may read."""
    found: dict[tuple[str, Kind], list[str]] = {}
    places: tuple[tuple[str, Kind], ...] = ((UNITS, "systemd"), (CRON, "cron"))
    for directory, kind in places:
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for name in names:
            path = os.path.join(directory, name)
            if name.startswith("snapshotter-") and (node := _node_of(path)) is not None:
                found.setdefault((node, kind), []).append(path)
    return [_judge(node, kind, tuple(files)) for (node, kind), files in sorted(found.items())]


def remove(node: str) -> list[str]:
    """Stop it and remove its files; returns them. Absent is done. Raises BusyError while its command runs,
    PreconditionError, StorageError."""
    gone: list[str] = []
    for found in installed():
        if found.node == node:
            gone += _remove(found)
    return gone


def _remove(found: Installed) -> list[str]:
    if found.kind == "systemd" and os.path.isdir(BOOTED):
        service, timer = f"snapshotter-{found.node}.service", f"snapshotter-{found.node}.timer"
        if _property(service, "ActiveState") in ("active", "activating", "deactivating", "reloading"):
            raise BusyError("runs now", object=service, cure=f"wait for it, or: systemctl stop {service}")
        if _unit_path(found.node, "timer") in found.files:
            _systemctl("disable", "--now", "--", timer)
            run(["systemctl", "clean", "--what=state", "--", timer], mutates=True)  # when it last ran
    wants = os.path.join(UNITS, "timers.target.wants", f"snapshotter-{found.node}.timer")
    for path in (*([wants] if os.path.islink(wants) else []), *found.files):
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise PreconditionError(f"can't remove it: {error.strerror}", object=path, cure="run as root") from None
    if found.kind == "systemd" and os.path.isdir(BOOTED):
        _systemctl("daemon-reload")
        run(["systemctl", "reset-failed", "--", f"snapshotter-{found.node}.service"], mutates=True)
    return list(found.files)


def _judge(node: str, kind: Kind, files: tuple[str, ...]) -> Installed:
    if kind == "cron":
        why = "" if _cron_runs() else "no cron daemon runs"
        return Installed(node, kind, files, not why, why)
    wanted = {_unit_path(node, "service"), _unit_path(node, "timer")}
    if missing := sorted(wanted - set(files)):
        return Installed(node, kind, files, False, f"{missing[0]} is missing")
    if not os.path.isdir(BOOTED):
        return Installed(node, kind, files, False, "systemd doesn't run")
    timer = f"snapshotter-{node}.timer"
    state, enabled = _property(timer, "ActiveState"), _property(timer, "UnitFileState")
    if state != "active":
        return Installed(node, kind, files, False, f"{timer} is {state or 'unknown to systemd'}")
    if enabled != "enabled":
        return Installed(node, kind, files, False, f"{timer} is {enabled}: it is gone after the next boot")
    return Installed(node, kind, files, True, "", _property(timer, "NextElapseUSecRealtime"))


def _property(unit: str, wanted: str) -> str:
    try:
        return run(["systemctl", "show", f"--property={wanted}", "--value", "--", unit], timeout=10.0).stdout.strip()
    except SnapshotterError:
        return ""


def _systemctl(*words: str) -> None:
    outcome = run(["systemctl", *words], mutates=True, leaves_daemons=True)
    if not outcome.ok:
        raise StorageError(f"systemctl {words[0]}: {outcome.said}", object=words[-1], cure="run as root, and see -v")


def _cron_runs() -> bool:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/comm") as file:
                    if file.read().strip() in _CRON_DAEMONS:
                        return True
            except OSError:
                continue
    return False


def _unit_path(node: str, suffix: str) -> str:
    return os.path.join(UNITS, f"snapshotter-{node}.{suffix}")


def _cron_path(node: str) -> str:
    """Debian's cron reads no file with a dot in its name (cron(8))."""
    return os.path.join(CRON, f"snapshotter-{node.replace('.', '_')}")


def _content(path: str) -> str | None:
    """The first 64 KiB of a plain file; None for anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.read(fd, 65536).decode(errors="surrogateescape")
    except OSError:  # a directory
        return None
    finally:
        os.close(fd)


def _node_of(path: str) -> str | None:
    """The node that a file of ours is for; None if it isn't ours."""
    first = (_content(path) or "").partition("\n")[0]
    return first.removeprefix(_LABEL) if first.startswith(_LABEL) else None


def _refuse_foreign(path: str, node: str) -> None:
    if os.path.lexists(path) and _node_of(path) != node:
        raise PreconditionError(
            "is there already, and isn't this node's schedule",
            object=path,
            cure="remove it, or name the node otherwise",
        )


def _unit_words(argv: Sequence[str]) -> str:
    """A command as systemd.service(5) reads it: no variable and no specifier is replaced."""

    def quoted(word: str) -> str:
        word = word.replace("%", "%%").replace("$", "$$")
        if re.fullmatch(r"[A-Za-z0-9_./%$:@=+,-]+", word):
            return word
        return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'

    return " ".join(map(quoted, argv))


def _cron_words(argv: Sequence[str]) -> str:
    """A command as crontab(5) reads it: by sh, and `%` would be a line break."""
    return shlex.join(argv).replace("%", "\\%")
