"""Holding the writers still for the instant of a snapshot: pause processes, freeze file systems, stop a service, run
hooks. Must know nothing of nodes, sets or providers.

Every kind is a context manager that gives a `Held`; `holding` says what becomes of it whatever happens.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence

from snapshotter.core.command import run
from snapshotter.core.errors import BusyError, PreconditionError, QuiesceError, StorageError, UndoIncompleteError
from snapshotter.host import proc, watchdog
from snapshotter.host.holding import Held, leftovers, reap
from snapshotter.host.mounts import NEVER_FROZEN, is_root, mount_of
from snapshotter.host.places import run_directory
from snapshotter.host.processes import Identity, Process, Scan, Scanner, alive, ancestors, group, named, stopped, tracer
from snapshotter.host.service import Service

__all__ = ["Held", "freeze", "hooks", "leftovers", "none", "on_device_mapper", "pause", "reap", "stop", "sync"]

FIFREEZE = 0xC0045877  # linux/fs.h: _IOWR('X', 119, int)
_VFORK_S = 0.02  # longer than this, a writer that doesn't stop may be waiting for its child
#: They stop themselves when what they run is stopped (tried; sudo's exec_pty.c and exec_nopty.c).
_STOP_ALONG = ("su", "runuser", "script", "sudo")
_ROUNDS = 50  # of scanning for writers that are born while we stop the others


class _Nothing(Held):
    def _prepare(self) -> None:
        pass

    def _take(self) -> None:
        pass

    def _lost(self) -> str:
        return ""


def none() -> Held:
    """Nothing is held; no budget."""
    return _Nothing("", 0.0)


def sync(paths: Sequence[str]) -> None:
    """Write out what the file systems of `paths` have in memory, so that less is left to do while all is held. Takes as
    long as it takes. Raises StorageError, with the disk's own error."""
    import ctypes  # slow to import

    library = ctypes.CDLL(None, use_errno=True)
    done: set[int] = set()
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            device = os.fstat(fd).st_dev
            if device not in done and library.syncfs(fd) != 0:
                raise StorageError(f"can't write out: {os.strerror(ctypes.get_errno())}", object=path)
            done.add(device)
        finally:
            os.close(fd)


def _refuse_unreadable(scan: Scan) -> None:
    if scan.refused:
        raise PreconditionError(
            f"can't see whether these write there: {named(scan.refused)}",
            cure="run as root or as their user, or set quiesce = stop or hooks",
        )


class _Pause(Held):
    def __init__(
        self, paths: Sequence[str], budget_s: float, what: str, cgroup: str | None, synced: Sequence[str] | None
    ) -> None:
        super().__init__(what, budget_s)
        self._paths = [os.path.realpath(path) for path in paths]
        self._synced = self._paths if synced is None else synced
        self._cgroup = cgroup
        self._frozen = False
        self._ours: set[Identity] = set()  # we stopped them
        self._before: set[Identity] = set()  # somebody else had
        self._told: set[Identity] = set()  # ran, and may stop because those that we stop do
        self._settled: set[Identity] = set()  # stopped before they were last looked at
        self._names: dict[Identity, str] = {}
        self._first: list[Process] = []  # found before any was stopped

    def _prepare(self) -> None:
        self._untouchable = {1, os.getpid(), *ancestors(os.getpid())}
        if self._cgroup is not None:
            mine = self._untouchable & set(_members(self._cgroup))
            if mine:
                raise PreconditionError(
                    f"we are in this cgroup ourselves (process {min(mine)})",
                    object=self._cgroup,
                    cure="run snapshotter from another unit",
                )
        sync(self._synced)
        self._watch()  # it starts while we look
        self._scanner = Scanner(self._paths)
        first = self._scanner.scan()
        self._refuse(first)
        self._first = list(first.writers)
        self._note_kin(self._first)
        if first.assumed:
            self.notes.append(
                f"assumed not to write (can't be looked into): {len(first.assumed)} processes: {named(first.assumed)}"
            )

    def _refuse(self, scan: Scan) -> None:
        looked = {writer.identity for writer in self._first} | self._ours | self._before
        for writer in scan.writers:
            if writer.pid in self._untouchable:
                who = {1: "init", os.getpid(): "this very command"}.get(writer.pid, "a parent of this command")
                raise PreconditionError(
                    f"{writer} has {writer.reason} open for writing and can't be paused: it is {who}",
                    object=writer.reason,
                    cure="start snapshotter from elsewhere, with no output into that directory",
                )
            # A tracer lets it go on whatever stopped it, and from the start of a write also in a frozen cgroup, which
            # says that it is frozen all the while (tried on 6.18). Not asked again of who was looked at before the
            # hold: it takes a JVM's hundreds of threads some ms, and the end is checked.
            if writer.identity not in looked and (by := tracer(writer.pid)):
                raise PreconditionError(
                    f"{writer} has {writer.reason} open for writing and can't be paused: {by} traces it",
                    object=writer.reason,
                    cure="end that tracer, or set quiesce = stop",
                )
        _refuse_unreadable(scan)

    def _take(self) -> None:
        if self._cgroup is not None:
            self._freeze_cgroup(self._cgroup)
        new = self._not_held(self._first)
        for _ in range(_ROUNDS):
            for writer in new:
                self._stop(writer)
            names = ", ".join(map(self._name, self._ours - self._settled))
            self._wait(self._all_stopped(), f"did not stop in time: one of {names}")
            held = self._ours | self._before
            found = self._scanner.scan(self._settled)
            self._mapped |= found.mapped
            self._settled |= held
            self._refuse(found)
            new = self._not_held(found.writers)
            if not new:
                return
            self._note_kin(new)
            if self._remaining_s() < self._budget_s / 2:
                break
        raise QuiesceError(f"new writers come faster than they can be stopped: {named(new)}", object=self._what)

    def _name(self, who: Identity) -> str:
        return self._names.get(who, str(who[0]))

    def _not_held(self, writers: Iterable[Process]) -> list[Process]:
        members = set(_members(self._cgroup)) if self._cgroup is not None and self._frozen else set()
        held = self._ours | self._before
        return [writer for writer in writers if writer.identity not in held and writer.pid not in members]

    def _freeze_cgroup(self, directory: str) -> None:
        assert self._guard is not None
        try:
            with open(os.path.join(directory, "cgroup.freeze"), "r+b", buffering=0) as file:
                if file.read(8).strip() == b"1":
                    self.notes.append(f"was frozen already, and stays so: {directory}")
                else:
                    self._guard.note("unfreeze", directory)
                    file.write(b"1")
        except OSError as error:
            self.notes.append(f"can't freeze {directory} ({error.strerror}): its processes are stopped one by one")
            return
        self._wait(iter(lambda: _is_frozen(directory), None), f"{directory} did not freeze in time")
        self._frozen = True

    def _note_kin(self, writers: Sequence[Process]) -> None:
        """Who stops because these do (see `watchdog.wake`) is to go on afterwards, unless it stands still already.
        Raises PreconditionError if we couldn't let it."""
        for writer in writers:
            for pid in ancestors(writer.pid):
                runs = proc.stat_of(str(pid))
                if runs is None or runs.name not in _STOP_ALONG:
                    break
                if not _may_signal(pid):
                    raise PreconditionError(
                        f"{writer} has {writer.reason} open for writing, and {runs.name} (pid {pid}), which runs it, "
                        "would stop with it: we may not let that go on",
                        object=writer.reason,
                        cure="run as root",
                    )
                self._note_one("wake", (pid, runs.starttime))
                for other in group(runs.group) if runs.name == "sudo" else ():
                    self._note_one("also", other)

    def _note_one(self, act: str, who: Identity) -> None:
        assert self._guard is not None
        if who not in self._told and stopped(*who) is False:
            self._guard.note(act, *map(str, who))
            self._told.add(who)

    def _stop(self, writer: Process) -> None:
        assert self._guard is not None
        self._names[writer.identity] = str(writer)
        if writer.identity not in self._told and stopped(*writer.identity):
            self._before.add(writer.identity)
            self.notes.append(f"was stopped already, and stays so: {writer}")
            return
        try:
            fd = os.pidfd_open(writer.pid)
        except ProcessLookupError:
            return
        try:
            if not alive(writer.identity):  # asked after the pidfd: from here on it can't become another process
                return
            self._guard.note("cont", str(writer.pid), str(writer.starttime))
            signal.pidfd_send_signal(fd, signal.SIGSTOP)
            self._ours.add(writer.identity)
        except ProcessLookupError:
            return
        except PermissionError:
            raise PreconditionError(
                f"{writer} has {writer.reason} open for writing, and we may not pause it",
                object=writer.reason,
                cure=f"run as root or as the user with id {writer.uid}",
            ) from None
        finally:
            os.close(fd)

    def _all_stopped(self) -> Iterator[bool]:
        waiting = self._ours - self._settled
        unblock_at = time.monotonic() + _VFORK_S
        while True:
            waiting = {who for who in waiting & self._ours if stopped(*who) is False}
            yield not waiting
            if time.monotonic() > unblock_at:
                self._unblock({pid for pid, _ in waiting})
                unblock_at = time.monotonic() + _VFORK_S

    def _unblock(self, parents: set[int]) -> None:
        """A thread that has vforked doesn't stop before its child has ended or runs its program. So a child that was
        stopped before that goes on; if it still can write then, the next scan finds it."""
        for child in list(self._ours):
            if parents.intersection(ancestors(child[0])[:1]) and stopped(*child):
                watchdog.resume(*child)
                self._ours.discard(child)

    def _lost(self) -> str:
        for who in self._ours | self._before:
            if stopped(*who) is False:
                return f"{self._name(who)} was continued by somebody"
        if self._frozen and self._cgroup is not None and not _is_frozen(self._cgroup):
            return f"{self._cgroup} was unfrozen by somebody"
        found = self._scanner.scan(self._settled)
        for writer in found.writers:  # of the frozen cgroup; who was stopped one by one is looked at above
            if by := tracer(writer.pid):
                return f"{by} traces {writer}"
        new = self._not_held(found.writers)
        if new:
            return f"{named(new)} has {new[0].reason} open for writing"
        return f"can't see whether {named(found.refused)} wrote" if found.refused else ""


def _may_signal(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    return True


def _members(cgroup: str) -> Iterator[int]:
    """Processes in this cgroup and those below it."""
    for directory, _, files in os.walk(cgroup):
        if "cgroup.procs" in files:
            try:
                with open(os.path.join(directory, "cgroup.procs"), encoding="ascii") as file:
                    yield from map(int, file.read().split())
            except OSError:
                continue  # removed meanwhile, or a threaded one: its processes show in the one above


def _is_frozen(cgroup: str) -> bool:
    try:
        with open(os.path.join(cgroup, "cgroup.events"), encoding="ascii") as file:
            return "frozen 1" in file.read().splitlines()
    except OSError:
        return False


def pause(
    paths: Sequence[str],
    budget_s: float,
    what: str,
    cgroup: str | None = None,
    sync: Sequence[str] | None = None,
) -> Held:
    """Stop every process that can write below the directories `paths`, after writing out the file systems of `sync`
    (default: `paths`). With `cgroup` (a directory in cgroup v2) that is frozen as a whole first; writers outside it
    get SIGSTOP. No writers at all is fine. Readers are left alone; whoever was stopped before stays stopped.

    A shell sees its job stop: it takes the terminal back, as after Ctrl-Z, and the job goes on in the background. Who
    stops itself then (su, sudo, runuser, script) goes on as well. Freezing a cgroup has no such effects. A process that
    opens a file only now and then is missed if it hasn't one open: the caller's own check for changes must find that.

    Raises PreconditionError: a writer is pid 1, ourselves or an ancestor, may not be signalled (nor who would stop with
    it), is traced, or is hidden from us (`Scanner.scan` tells whom that means); the cgroup holds ourselves.
    QuiesceError: not held in time, or lost.
    """
    return _Pause(paths, budget_s, what, cgroup, sync)


class _Freeze(Held):
    def __init__(self, mount_points: Sequence[str], budget_s: float, what: str, mapped: bool) -> None:
        super().__init__(what, budget_s)
        self._through_mapper = mapped
        self._points = [os.path.realpath(point) for point in mount_points]
        self._fds: dict[int, tuple[str, int]] = {}  # st_dev -> mount point, its descriptor

    def _prepare(self) -> None:
        if os.geteuid() != 0:
            raise PreconditionError(
                "freezing needs root", object=self._points[0], cure="run as root, or set quiesce = pause"
            )
        ours = os.stat(run_directory()).st_dev
        for point in self._points:
            _refuse_freezing(point, ours, self._through_mapper)
            fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            device = os.fstat(fd).st_dev
            if device in self._fds:
                os.close(fd)  # two mount points of one file system: frozen once
            else:
                self._fds[device] = (point, fd)
        for writer in Scanner(self._points).scan(only=[os.getpid()]).writers:
            raise PreconditionError(
                f"this very command has {writer.reason} open for writing: it would freeze itself",
                object=writer.reason,
                cure="send its output elsewhere",
            )
        sync(self._points)
        self._watch([fd for _, fd in self._fds.values()])

    def _take(self) -> None:
        assert self._guard is not None
        for device, (point, fd) in self._fds.items():
            self._guard.note("thaw", point, str(device))
            try:
                fcntl.ioctl(fd, FIFREEZE, 0)
            except OSError as error:
                self._guard.note("not")  # whoever froze it thaws it
                if error.errno == errno.EBUSY:
                    raise BusyError(
                        "is frozen already, by somebody else",
                        object=point,
                        cure=f"if that is a leftover: fsfreeze -u {point}",
                    ) from None
                raise PreconditionError(
                    f"can't freeze it: {error.strerror}", object=point, cure="set quiesce = pause or stop"
                ) from None

    def _lost(self) -> str:
        """FITHAW tells: so here, checking is letting go."""
        assert self._guard is not None
        lost = ""
        for point, fd in reversed(list(self._fds.values())):
            try:
                fcntl.ioctl(fd, watchdog.FITHAW, 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise StorageError(f"can't thaw it: {error.strerror}", object=point) from None
                lost = lost or f"{point} was thawed by somebody"
            self._guard.note("not")  # undone: nobody is to thaw the next one's freeze
        return lost

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1][1])


def _refuse_freezing(point: str, ours: int, mapped: bool) -> None:
    mount = mount_of(point)
    if is_root(mount.path):
        raise PreconditionError(
            "the root file system is never frozen", object=point, cure="set quiesce = none or pause"
        )
    if os.stat(point).st_dev == ours:
        raise PreconditionError("our own records are there", object=point, cure="set SNAPSHOTTER_RUN to another place")
    if mount.fstype in NEVER_FROZEN:
        raise PreconditionError(f"{mount.fstype} is never frozen", object=point, cure="its snapshots need no freeze")
    if not mapped and on_device_mapper(mount.device):
        raise PreconditionError("LVM is never frozen", object=point, cure="the device mapper does that itself")


def on_device_mapper(device: str, sysfs: str = "/sys") -> bool:
    """Whether the block device "major:minor", or any that it is made of, is a device-mapper one."""
    here = os.path.join(sysfs, "dev", "block", device)
    if os.path.exists(os.path.join(here, "dm")):
        return True
    above = [] if not os.path.exists(os.path.join(here, "partition")) else [os.path.join(os.path.realpath(here), "..")]
    try:
        above += [os.path.join(here, "slaves", name) for name in os.listdir(os.path.join(here, "slaves"))]
    except OSError:
        pass
    for other in above:
        try:
            with open(os.path.join(other, "dev"), encoding="ascii") as file:
                if on_device_mapper(file.read().strip(), sysfs):
                    return True
        except OSError:
            continue
    return False


def freeze(mount_points: Sequence[str], budget_s: float, what: str, *, mapped: bool = False) -> Held:
    """Freeze the file systems mounted there, all together (FIFREEZE). Never `/`, the one with our records, ZFS, btrfs
    or LVM; but LVM with `mapped`: the image is made by who knows nothing of it, of the disks below (a cloud).

    Raises PreconditionError (also: no root, a file system that can't), BusyError (frozen by somebody else: stays so),
    QuiesceError (somebody thawed one).
    """
    return _Freeze(mount_points, budget_s, what, mapped)


class _Stop(Held):
    def __init__(self, service: Service, budget_s: float, what: str, paths: Sequence[str]) -> None:
        super().__init__(what, budget_s)
        self._service = service
        self._paths = [os.path.realpath(path) for path in paths]

    def _prepare(self) -> None:
        self._ran = self._service.running()
        self._scanner = Scanner(self._paths)
        if self._ran:
            self._along = self._service.stops_along()
            self._watch()
        else:
            self.notes.append(f"was stopped already, and stays so: {self._service.name}")

    def _take(self) -> None:
        if self._ran:
            assert self._guard is not None
            for act in reversed(self._service.start_acts(self._along)):  # the newest is done first
                self._guard.note(*act)
            self._service.stop()
        writing = self._writing()
        if writing:
            raise PreconditionError(f"after the stop, {writing}", object=self._service.name, cure="stop that as well")

    def _writing(self) -> str:
        if self._service.running():
            return f"{self._service.name} runs"
        scan = self._scanner.scan()
        _refuse_unreadable(scan)
        return f"{named(scan.writers)} has {scan.writers[0].reason} open for writing" if scan.writers else ""

    def _lost(self) -> str:
        return self._writing()

    def _afterwards(self) -> None:
        if self._ran:
            self.notes += [f"{name}, which was stopped along, doesn't run" for name in self._service.down(self._along)]


def stop(service: Service, what: str, budget_s: float = 300.0, paths: Sequence[str] = ()) -> Held:
    """Stop the service, and prove that nobody has anything below `paths` open for writing. It is started again on every
    path out, with what was stopped along with it, unless it was stopped before.

    Raises PreconditionError (can't be told, a writer is left), StorageError (won't stop), QuiesceError (was started
    meanwhile), UndoIncompleteError (won't start).
    """
    return _Stop(service, budget_s, what, paths)


class _Hooks(Held):
    def __init__(self, hold_argv: Sequence[str], release_argv: Sequence[str], budget_s: float, what: str) -> None:
        super().__init__(what, budget_s)
        self._hold_argv = tuple(hold_argv)
        self._release_argv = tuple(release_argv)

    def _prepare(self) -> None:
        self._watch()

    def _take(self) -> None:
        assert self._guard is not None
        self._guard.note("run", *self._release_argv)
        outcome = run(self._hold_argv, mutates=True, leaves_daemons=True)
        if not outcome.ok:
            raise PreconditionError(
                f"the hold hook failed: {outcome.said}", object=" ".join(self._hold_argv), cure="see what it says"
            )

    def _lost(self) -> str:
        return ""  # only the release hook knows; its status is the answer

    def _void(self, failures: list[str]) -> StorageError | UndoIncompleteError:
        return UndoIncompleteError(  # it may not have held, or may hold still: for a person to see
            "the release hook failed, so the application may be held still; the set is void",
            object=self._what,
            left=failures,
            cure=f"see what it says: {' '.join(self._release_argv)}",
            undo_command="snapshotter reap",
        )


def hooks(hold_argv: Sequence[str], release_argv: Sequence[str], budget_s: float, what: str) -> Held:
    """The application holds still by itself: `hold_argv` must return 0 when it does, `release_argv` 0 if it did until
    then. Release runs on every path out, also when hold failed or the budget ended, and maybe twice: it must not mind.

    Raises PreconditionError (hold failed), QuiesceError (the budget ended), UndoIncompleteError (release failed).
    """
    return _Hooks(hold_argv, release_argv, budget_s, what)
