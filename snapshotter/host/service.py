"""A node's service: is it running, stop it, start it, keep it from being started. By systemd, or by commands of the
operator's. Must know nothing of quiesce or restore, which call it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar, Protocol

from msgspec import Struct

from snapshotter.core.command import run
from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.interrupts import deferred
from snapshotter.host.mounts import table

#: Where a link to /dev/null masks a unit, whatever else defines it, also over a power cut. `systemctl mask` can't: it
#: needs the name in /etc/systemd/system, where most nodes' units are, and with --runtime it writes to
#: /run/systemd/system, which is weaker: it exits 0 and masks nothing (systemd.unit(5), "Unit File Load Path"; tried
#: with 252).
_MASKS = "/etc/systemd/system.control"

#: Of a unit: those that a stop of it stops too (systemd.unit(5): Requires=, Requisite=, BindsTo=, PartOf=,
#: StopPropagatedFrom= in them name it).
_STOPPED_WITH = ("RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo")

#: Only what was stopped, and nothing that it wants: a target may want another validator that its operator has stopped.
_ALONG_ARGV = ("systemctl", "start", "--job-mode=ignore-requirements", "--")


class Service(Protocol):
    """Starting what runs and stopping what is stopped are done, not errors: both may be asked twice."""

    @property
    def name(self) -> str:
        """For messages."""

    def stops_along(self) -> Sequence[str]:
        """Others that run now and that `stop` stops with it: nothing else starts them again. Ask before it."""

    def start_acts(self, along: Sequence[str]) -> list[tuple[str, ...]]:
        """What `start` does, as acts of a `watchdog`'s record, in their order: for when we can't."""

    def running(self) -> bool:
        """Raises PreconditionError if that can't be told."""

    def stop(self) -> None:
        """Returns when it is stopped. Raises StorageError."""

    def start(self, along: Sequence[str] = ()) -> None:
        """And then those that were stopped `along` with it, as far as they start. Raises StorageError."""

    def down(self, along: Sequence[str]) -> Sequence[str]:
        """Those of them that don't run now."""

    @property
    def can_mask(self) -> bool:
        """Whether `mask` can keep it from being started (by a restart policy, a timer, a person)."""

    def masked(self) -> bool:
        """Whether it can't be started now, by us or by its operator. Ask before `mask`: what he masked stays so."""

    def refuse_unmaskable(self) -> None:
        """Raise PreconditionError where `mask` couldn't be done, though `can_mask`: asked before it is stopped."""

    def mask(self) -> None:
        """Nobody can start it from here on until `unmask`, nor does a boot. It goes on if it runs. Twice is fine;
        nothing where it can't be done. Raises PreconditionError (no permission), StorageError (it didn't take)."""

    def unmask(self) -> None:
        """Inverse of `mask`; not masked is done. A mask of the operator's own stays. Raises as `mask`."""


def of(
    unit: str | None, stop: Sequence[str] = (), start: Sequence[str] = (), status: Sequence[str] = ()
) -> Service | None:
    """The service that a node's config names; None if it names none."""
    if unit:
        return SystemdUnit(unit)
    if stop and start:
        return Commands(stop_argv=tuple(stop), start_argv=tuple(start), status_argv=tuple(status))
    return None


def prove_stopped(service: Service | None, paths: Sequence[str], *, patience_s: float = 10.0) -> None:
    """Return once the service is stopped and no process but ourselves uses anything at or below these directories
    (those that exist). Raises BusyError naming who does, after `patience_s` seconds at the latest; PreconditionError if
    it can't be told."""
    from snapshotter.host import processes  # slow to import, and many a caller only asks a service

    give_up = time.monotonic() + patience_s
    while True:
        running = service is not None and service.running()
        there = [path for path in map(os.path.realpath, paths) if os.path.isdir(path)]
        users = {user.identity: user for path in there for user in processes.users_of(path)}
        if there and not users:  # those that we may not look into count too, where they could write there
            found = processes.scan(there)
            users = {user.identity: user for user in (*found.writers, *found.refused)}
        users = {who: user for who, user in users.items() if _same_world(user.pid) or _has_open(user.pid, there)}
        if not running and not users:
            return
        if time.monotonic() >= give_up:
            break
        time.sleep(0.2)
    if users:
        cure = "end that first" if service is not None else "stop it, or name its `unit` (or stop, start) in the config"
        raise BusyError(f"is in use by {processes.named(list(users.values()))}", object=there[0], cure=cure)
    assert service is not None
    raise BusyError("runs, though it was stopped: something starts it again", object=service.name, cure="find out what")


def _same_world(pid: int) -> bool:
    """Whether a process sees the same mounts as we do, from the same root; True if that can't be seen."""
    try:
        return all(
            os.readlink(f"/proc/{pid}/{link}") == os.readlink(f"/proc/self/{link}") for link in ("ns/mnt", "root")
        )
    except OSError:
        return True


def _has_open(pid: int, directories: Sequence[str]) -> bool:
    """Whether a process has one of the very files or directories below these open, mapped or as its cwd or root. Of a
    process with a root of its own on the same file system nothing else tells where its files are."""
    try:
        links = [f"/proc/{pid}/{link}" for link in ("cwd", "root", "exe")]
        for table in ("fd", "map_files"):
            links += [entry.path for entry in os.scandir(f"/proc/{pid}/{table}")]
    except PermissionError:
        return True
    except OSError:
        return False  # it has ended
    theirs = set()
    for link in links:
        try:
            found = os.stat(link)
            theirs.add((found.st_dev, found.st_ino))
        except OSError:
            continue
    for top in directories:
        for directory, _, names in os.walk(top):
            for path in (directory, *(os.path.join(directory, name) for name in names)):
                try:
                    found = os.lstat(path)
                except OSError:
                    continue
                if (found.st_dev, found.st_ino) in theirs:
                    return True
    return False


def _must(argv: Sequence[str], what: str, name: str = "") -> None:
    """Run a command of the unit `name`, or one of the operator's own. Raises StorageError."""
    outcome = run(argv, mutates=True, leaves_daemons=True)
    if not outcome.ok:
        cure = f"`systemctl status {name}` shows why" if name else "run that by hand, and mend what it says"
        raise StorageError(f"can't {what} it: {outcome.said}", object=name or " ".join(argv), cure=cure)


def _stop(argv: Sequence[str], name: str = "") -> None:
    """A signal waits for its end: a client that is killed (docker's) leaves a node that goes on to stop, so that what
    starts it again comes too early."""
    with deferred():
        _must(argv, "stop", name)


def _is_mask(link: str) -> bool:
    try:
        return os.readlink(link) == "/dev/null"
    except OSError:
        return False


def cgroup2() -> str | None:
    """Where the unified cgroup hierarchy is mounted (not always /sys/fs/cgroup); None if it isn't."""
    return next((mount.path for mount in table() if mount.fstype == "cgroup2"), None)


class SystemdUnit(Struct, frozen=True):
    """A systemd unit, through systemctl(1)."""

    unit: str
    can_mask: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.unit

    def _start_argv(self) -> tuple[str, ...]:
        return ("systemctl", "start", "--", self.unit)

    def _reset_argv(self, along: Sequence[str]) -> tuple[str, ...]:
        """They may have been started too often lately: systemd counts, and restores go wrong more than once."""
        return ("systemctl", "reset-failed", "--", self.unit, *along)

    def stops_along(self) -> Sequence[str]:
        known: dict[str, bool] = {}  # those that run, and those that don't; itself first, under its real name
        todo = [self.unit]
        while todo:
            wanted = ",".join(("Id", "ActiveState", *_STOPPED_WITH))
            outcome = run(["systemctl", "show", f"--property={wanted}", "--", *todo], timeout=10.0)
            if not outcome.ok:
                raise PreconditionError(f"can't ask systemd: {outcome.said}", object=self.unit)
            found: set[str] = set()
            for block in outcome.stdout.strip().split("\n\n"):
                said = dict(line.partition("=")[::2] for line in block.splitlines())
                runs = said["ActiveState"] not in ("inactive", "failed", "deactivating")
                if runs or not known:  # a stop doesn't go on through one that doesn't run (tried with 252)
                    found.update(name for key in _STOPPED_WITH for name in said.get(key, "").split())
                known[said["Id"]] = runs
            todo = sorted(found - known.keys())
        return [name for name, runs in list(known.items())[1:] if runs]

    def start_acts(self, along: Sequence[str]) -> list[tuple[str, ...]]:
        acts = [("try", *self._reset_argv(along)), ("run", *self._start_argv())]
        # What hangs on a node may not start before that answers: it is told (`down`), and voids nothing.
        return [*acts, ("try", *_ALONG_ARGV, *along)] if along else acts

    def _show(self, wanted: str) -> str:
        outcome = run(["systemctl", "show", f"--property={wanted}", "--value", "--", self.unit], timeout=10.0)
        if not outcome.ok:
            raise PreconditionError(f"can't ask systemd: {outcome.said}", object=self.unit)
        return outcome.stdout.strip()

    def running(self) -> bool:
        """Anything but inactive and failed runs, or may do so in a moment. An unknown unit is an error."""
        if self._show("LoadState") in ("not-found", "bad-setting", "error"):
            raise PreconditionError("systemd has no such unit", object=self.unit, cure="correct `unit` in the config")
        return self._show("ActiveState") not in ("inactive", "failed")

    def stop(self) -> None:
        _stop(["systemctl", "stop", "--", self.unit], self.unit)

    def start(self, along: Sequence[str] = ()) -> None:
        if not run(self._start_argv(), mutates=True, leaves_daemons=True).ok:
            run(self._reset_argv(along), mutates=True)
            _must(self._start_argv(), "start", self.unit)
        if along:
            run([*_ALONG_ARGV, *along], mutates=True, leaves_daemons=True)

    def down(self, along: Sequence[str]) -> Sequence[str]:
        found = []
        for unit in along:
            with suppress(SnapshotterError):
                if not SystemdUnit(unit).running():
                    found.append(unit)
        return found

    def masked(self) -> bool:
        return self._show("LoadState") == "masked"

    def _link(self) -> str:
        real = self._show("Id")
        if real.removesuffix(".service") != self.unit.removesuffix(".service"):
            # Another link beside the alias's own would mask half of it.
            raise PreconditionError(
                f"is an alias of {real}", object=self.unit, cure=f'set unit = "{real}" in the config'
            )
        return os.path.join(_MASKS, real)

    def refuse_unmaskable(self) -> None:
        link = at = self._link()
        while not os.path.isdir(at := os.path.dirname(at)):
            pass
        if not os.access(at, os.W_OK):  # of root also false where it is mounted read-only, or immutable
            raise PreconditionError("can't mask it: nothing can be made there", object=link, cure="run as root")

    def mask(self) -> None:
        from snapshotter.core.journal import sync_directory  # a take needs neither

        link = self._link()
        try:
            os.makedirs(_MASKS, exist_ok=True)
            with suppress(FileExistsError):
                os.symlink("/dev/null", link)
            for directory in (_MASKS, os.path.dirname(_MASKS)):
                sync_directory(directory)
        except OSError as error:
            raise PreconditionError(f"can't mask it: {error.strerror}", object=link, cure="run as root") from None
        _must(["systemctl", "daemon-reload"], "mask", self.unit)
        if not self.masked():
            raise StorageError(
                "systemd doesn't take the mask", object=self.unit, cure=f"see `systemctl cat {self.unit}`"
            )

    def unmask(self) -> None:
        from snapshotter.core.journal import sync_directory

        # Ours has its own name: whose is an alias's was never made. Killed before the reload, none is left and it is
        # masked; else a reload, which may fail, isn't needed.
        names = {self.unit, self.unit.removesuffix(".service") + ".service"}
        links = [link for link in (os.path.join(_MASKS, name) for name in names) if _is_mask(link)]
        if not links and not self.masked():
            return
        for link in links:
            try:
                os.unlink(link)
                sync_directory(_MASKS)
            except OSError as error:
                raise PreconditionError(f"can't unmask it: {error.strerror}", object=link, cure="run as root") from None
        _must(["systemctl", "daemon-reload"], "unmask", self.unit)

    def control_group(self) -> str | None:
        """Directory of its cgroup; None while it isn't running, or without the unified hierarchy."""
        top, group = cgroup2(), self._show("ControlGroup")
        if top is None or group in ("", "/"):
            return None
        directory = os.path.join(top, group.lstrip("/"))
        return directory if os.path.isdir(directory) else None


class Commands(Struct, frozen=True):
    """A service that the operator's commands handle. `status` exits 0 if it runs, 3 if it is stopped (as the LSB and
    systemctl have it). What starts it again by itself (a container's restart policy) can't be kept from doing so: who
    needs it stopped asks again."""

    can_mask: ClassVar[bool] = False
    stop_argv: tuple[str, ...]
    start_argv: tuple[str, ...]
    status_argv: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its two commands have in common: `docker node` of `docker stop node` and `docker start node`; of a
        shell's, which have only the shell in common, the whole one."""
        common = [word for word in self.start_argv if word in self.stop_argv]
        return " ".join(common if common and common[-1] != "-c" else self.start_argv)

    def stops_along(self) -> Sequence[str]:
        return ()

    def start_acts(self, along: Sequence[str]) -> list[tuple[str, ...]]:
        return [("run", *self.start_argv)]

    def running(self) -> bool:
        if not self.status_argv:
            raise PreconditionError(
                "can't tell whether it runs", object=self.name, cure="set status in the config: 0 runs, 3 is stopped"
            )
        outcome = run(self.status_argv, timeout=60.0)
        if outcome.code not in (0, 3):
            raise PreconditionError(
                f"the status command exits {outcome.code}: {outcome.said}",
                object=" ".join(self.status_argv),
                cure="it must exit 0 when the service runs and 3 when it is stopped",
            )
        return outcome.code == 0

    def stop(self) -> None:
        _stop(self.stop_argv)

    def start(self, along: Sequence[str] = ()) -> None:
        _must(self.start_argv, "start")

    def down(self, along: Sequence[str]) -> Sequence[str]:
        return ()

    def masked(self) -> bool:
        return False

    def refuse_unmaskable(self) -> None:
        return None

    def mask(self) -> None:
        return None

    def unmask(self) -> None:
        return None
