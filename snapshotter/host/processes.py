"""Who can write below some directories right now, and who uses a path: read from /proc. Stops nobody, and must know
nothing of a quiesce.

Source: proc(5). An open file is recognised by its mount (`mnt_id` in fdinfo is unique on the machine, whatever the
mount namespace) and by where it lies in that mount's file system, so another bind mount, a container's mount
namespace or a deleted file changes nothing. What can't be seen: descriptors in flight in a socket or registered with
io_uring and closed, those of a thread that gave up its process's table, and the kernel's own (loop devices, NFS
server). The file copier's last walk is there for these.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Container, Generator, Iterable, Iterator, Sequence
from contextlib import suppress

from msgspec import Struct

from snapshotter.core.errors import NotFoundError
from snapshotter.host import proc
from snapshotter.host.mounts import Mount, inside, is_under, mount_of, mounts_below, parse, table
from snapshotter.host.permissions import Permissions, open_for_writing

#: One line of /proc/pid/maps that is writable and shared: range, device, inode, path.
_SHARED_MAP = re.compile(rb"^([0-9a-f]+-[0-9a-f]+) .w.s [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+) +(/.*)$", re.M)
_ANY_MAP = re.compile(rb"^([0-9a-f]+-[0-9a-f]+) .... [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+) +(/.*)$", re.M)
#: Every daemon has some of these.
_NEVER_DATA = ("/dev/null", "/dev/pts/", "/memfd:")
#: At the descriptors of a process that closes some while we look.
_LOOKS = 5
#: Stands for all that a /proc with `hidepid` doesn't show.
_HIDDEN = (0, 0)

#: Process id and start time (clock ticks after boot): a pid alone may be somebody else's by now.
Identity = tuple[int, int]


class Process(Struct, frozen=True):
    """`reason` is a file that it has open (an example), '' if that can't be seen. `state` as in proc(5)."""

    pid: int
    starttime: int
    name: str
    uid: int
    state: str
    reason: str = ""

    @property
    def identity(self) -> Identity:
        return self.pid, self.starttime

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})" if self.pid else self.name


class Scan(Struct, frozen=True):
    """`writers` can write below the paths. `mapped`: (st_dev, st_ino) of every file there that one of them maps shared
    and writable. We may not look into `refused` and `assumed`: mode and ACL would let the first write there, the
    second not."""

    writers: tuple[Process, ...] = ()
    mapped: frozenset[tuple[int, int]] = frozenset()
    refused: tuple[Process, ...] = ()
    assumed: tuple[Process, ...] = ()


def identity(pid: int) -> Identity | None:
    """The process that has this pid now; None if there is none."""
    seen = proc.stat_of(str(pid))
    return None if seen is None or seen.dead else (pid, seen.starttime)


def alive(who: Identity) -> bool:
    """True while this very process lives; a zombie doesn't."""
    return identity(who[0]) == who


def ancestors(pid: int) -> list[int]:
    """Parent, its parent, and so on up to the first process that this pid namespace shows."""
    found: list[int] = []
    while (seen := proc.stat_of(str(pid))) is not None and seen.parent > 0 and seen.parent not in found:
        pid = seen.parent
        found.append(pid)
    return found


def group(number: int) -> list[Identity]:
    """Who is in this process group."""
    seen = ((pid, proc.stat_of(str(pid))) for pid in proc.pids())
    return [(pid, found.starttime) for pid, found in seen if found is not None and found.group == number and pid != 1]


def stopped(pid: int, starttime: int) -> bool | None:
    """True if every thread of that process is stopped by a signal, False if one isn't; None if it is gone or dead. One
    that its tracer stopped isn't: that lets it go on when it likes."""
    seen = proc.stat_of(str(pid))
    if seen is None or seen.dead or seen.starttime != starttime:
        return None
    if seen.state not in "TZXx":
        return False
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return None
    for thread in threads:
        one = proc.stat_of(f"{pid}/task/{thread}")
        if one is not None and one.state not in "TZXx":
            return False
    return True


def tracer(pid: int) -> str:
    """Who traces a thread of that process, for a message; '' if nobody does that this pid namespace shows."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):  # this one has ended
                found = int(proc.status(int(thread), (b"TracerPid",))[b"TracerPid"][0])
                if found:
                    seen = proc.stat_of(str(found))
                    return f"{seen.name if seen else '?'} (pid {found})"
    return ""


class Scanner:
    """Looks for writers below `paths` (canonical directories), again and again. It remembers what can't change
    between two scans: mount tables, who may write by mode and ACL, and how unreadable processes were judged.

    Raises NotFoundError for a path that no mount shows, OSError for one that is gone.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        own = table()
        self._namespace = os.readlink("/proc/self/ns/mnt")
        self._tables = {self._namespace: own}
        self._by_id = {mount.id: mount for mount in own}
        self._read_tables_of: set[int] = set()
        self._places: dict[str, list[str]] = {}  # device -> directories in its file system
        self._devices: set[int] = set()  # st_dev
        self._prefixes: dict[Mount, list[str]] = {}  # what a mount shows of the places, as paths
        for path in self._paths:
            here = mount_of(path, own)
            self._add_place(here.device, inside(path, here), path)
            for below in mounts_below(path, own):
                self._add_place(below.device, below.root, below.path)
        self._permissions: Permissions | None = None
        self._judged: dict[Identity, tuple[bool, Process]] = {}
        self._hidden = _hides_processes(own)
        self._idle: set[Identity] = set()  # could write, but had nothing open for writing

    def _add_place(self, device: str, directory: str, path: str) -> None:
        self._places.setdefault(device, []).append(directory)
        try:
            self._devices.add(os.stat(path).st_dev)
        except PermissionError:
            pass  # a nested mount that only others may enter; its mount still is compared

    def scan(self, settled: Container[Identity] = (), only: Iterable[int] | None = None) -> Scan:
        """One pass over all processes (or `only` these). Those in `settled` are skipped: stopped before they were last
        looked at, they can't have opened anything since.

        Processes that we may not look into are judged by mode and ACL *alone*: without root nearly every daemon of
        the machine is one, all of root's could write anywhere by capability, and to refuse because of them would be
        to refuse always. So one is `refused` only if it owns something below the paths, or owner group, ACL or "other"
        permit it to write there and to reach it; all others are `assumed` not to write, for the caller to name.

        Some processes may not be looked into even by their own user (sshd's and systemd's helpers of a session) or by
        root. So before one is refused the kernel is asked, by a read lease, whether anybody whom we don't see has any
        file there open for writing. If not, it is `assumed` too. Leases are for a file's owner and root.

        Where /proc hides others' processes, one that stands for all of them is judged likewise: it is `assumed` not to
        write only if mode and ACL let nobody else, or the lease says so.
        """
        writers: list[Process] = []
        mapped: set[tuple[int, int]] = set()
        refused: list[Process] = []
        assumed: list[Process] = []
        for pid in proc.every_pid() if only is None else only:
            seen = proc.stat_of(str(pid))
            if seen is None or seen.kernel_thread or seen.dead or (pid, seen.starttime) in settled:
                continue
            who = (pid, seen.starttime)
            try:
                if who not in self._judged:
                    base = proc.readable_base(pid, seen)
                    # Maps last: a file is opened, mapped and closed, in that order.
                    reason = next((found for found, _ in self._open_files(base, pid, writable=True)), "")
                    maps = self._maps(base, pid)
                    reason = reason or (maps[0][1] if maps else "")
                    mapped.update(file for file, _ in maps)
                    if reason:
                        writers.append(Process(pid, seen.starttime, seen.name, proc.owner(pid), seen.state, reason))
                    continue
            except PermissionError:
                try:
                    self._judged[who] = self._judge(pid, seen)
                except (FileNotFoundError, ProcessLookupError):
                    continue
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            could, process = self._judged[who]
            (refused if could else assumed).append(process)
        if self._hidden and only is None:
            could, process = self._judged.get(_HIDDEN) or self._judge_hidden()
            (refused if could else assumed).append(process)
        if any(process.identity not in self._idle for process in refused) and self._nobody_unseen_writes():
            self._idle.update(process.identity for process in refused)
        assumed += [process for process in refused if process.identity in self._idle]
        refused = [process for process in refused if process.identity not in self._idle]
        return Scan(tuple(writers), frozenset(mapped), tuple(refused), tuple(assumed))

    def users(self) -> list[Process]:
        """Every process but ourselves that has anything open, mapped, or as its cwd, root or program below the
        paths, as far as we may look."""
        found: list[Process] = []
        for pid in proc.pids():
            seen = proc.stat_of(str(pid))
            if pid == os.getpid() or seen is None or seen.kernel_thread or seen.dead:
                continue
            try:
                reason = self._use(proc.readable_base(pid, seen), pid)
            except (PermissionError, FileNotFoundError, ProcessLookupError):
                continue
            if reason is not None:
                found.append(Process(pid, seen.starttime, seen.name, proc.owner(pid), seen.state, reason))
        return found

    def _use(self, base: str, pid: int) -> str | None:
        for link in ("cwd", "root", "exe"):
            try:
                target = proc.link_of(f"{base}/{link}")
            except FileNotFoundError:
                continue
            if target == proc.TOO_LONG:
                if os.stat(f"{base}/{link}").st_dev in self._devices:
                    return target
                continue
            if self._path_is_ours(pid, target, None):
                return target
        for found, _ in self._open_files(base, pid, writable=False):
            return found
        for match in _ANY_MAP.finditer(proc.read(f"{base}/maps", long=True)):
            target = proc.map_path(match[5])
            if self._path_is_ours(pid, target, f"{int(match[2], 16)}:{int(match[3], 16)}"):
                return target
        return None

    def _open_files(self, base: str, pid: int, *, writable: bool) -> Iterator[tuple[str, str]]:
        """Descriptors whose file is below the paths: its path, and the descriptor's own in /proc.

        One that was closed while we looked may have been followed by another that the list doesn't have: a process
        that always has one open would be missed. So the list is read again, a few times."""
        for _ in range(_LOOKS):
            closed = yield from self._listed_files(base, pid, writable=writable)
            if not closed:
                return

    def _listed_files(self, base: str, pid: int, *, writable: bool) -> Generator[tuple[str, str], None, bool]:
        """One look; whether a descriptor was closed meanwhile.

        A descriptor's link has its owner's write bit if the file is open for writing (and no bits with O_PATH), which
        spares reading fdinfo for most."""
        closed = False
        with os.scandir(f"{base}/fd") as entries:
            for entry in entries:
                try:
                    if writable and not entry.stat(follow_symlinks=False).st_mode & stat.S_IWUSR:
                        continue
                    link = proc.link_of(entry.path)
                    if not link.startswith("/") or link.startswith(_NEVER_DATA):
                        continue  # a socket, a pipe
                    info = proc.read(f"{base}/fdinfo/{entry.name}")
                except (FileNotFoundError, ProcessLookupError):
                    closed = True
                    continue
                if link == proc.TOO_LONG:
                    if os.stat(entry.path).st_dev in self._devices:  # where it is can't be told, so it counts
                        yield link, entry.path
                    continue
                mount_id = int(info.partition(b"mnt_id:")[2].split(None, 1)[0])
                if self._descriptor_is_ours(pid, link, mount_id, entry.path):
                    yield link, entry.path
        return closed

    def _descriptor_is_ours(self, pid: int, link: str, mount_id: int, entry: str) -> bool:
        mount = self._by_id.get(mount_id)
        if mount is None and pid not in self._read_tables_of:
            self._read_tables_of.add(pid)
            self._mounts_seen_by(pid, fresh=True)
            mount = self._by_id.get(mount_id)
        if mount is not None:
            return mount.device in self._places and self._below(mount, link)
        # A mount that nobody shows (unmounted lazily, outside a chroot): the same file system will do.
        return os.stat(entry).st_dev in self._devices

    def _below(self, mount: Mount, path: str) -> bool:
        if not is_under(path, mount.path):
            return True  # seen from another root: can't be told apart, so it counts
        prefixes = self._prefixes.get(mount)
        if prefixes is None:
            prefixes = self._prefixes[mount] = [
                mount.path
                if is_under(mount.root, place)
                else os.path.join(mount.path, os.path.relpath(place, mount.root))
                for place in self._places[mount.device]
                if is_under(place, mount.root) or is_under(mount.root, place)
            ]
        return any(is_under(path, prefix) for prefix in prefixes)

    def _mounts_seen_by(self, pid: int, fresh: bool = False) -> list[Mount]:
        """The mounts by which the links of this process in /proc are to be read. Those links tell paths from the root
        of its mount namespace, also of a process in a chroot; its own mountinfo tells only what is in the chroot."""
        namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        if fresh or namespace not in self._tables:
            whole = namespace == self._namespace or os.readlink(f"/proc/{pid}/root") == "/"
            whose = os.getpid() if namespace == self._namespace else pid
            text = proc.read(f"/proc/{whose}/mountinfo", long=True) if whole else proc.mounts_in_namespace(pid)
            self._tables[namespace] = parse(text)
            self._by_id.update((mount.id, mount) for mount in self._tables[namespace])
        return self._tables[namespace]

    def _path_is_ours(self, pid: int, path: str, device: str | None) -> bool:
        """For what /proc names by path alone: does any mount that this process sees lead from it to one of ours?"""
        if device is not None and device not in self._places:
            return False
        mounts = self._mounts_seen_by(pid)
        if device is None:
            try:
                device = mount_of(path, mounts).device
            except NotFoundError:
                return False
        above = [mount for mount in mounts if mount.device == device and is_under(path, mount.path)]
        return device in self._places and (not above or any(self._below(mount, path) for mount in above))

    def _maps(self, base: str, pid: int) -> list[tuple[tuple[int, int], str]]:
        """((st_dev, st_ino), path) of files of ours that are mapped shared and writable."""
        maps = proc.read(f"{base}/maps", long=True)
        if b"w-s " not in maps and b"wxs " not in maps:
            return []
        found = []
        for match in _SHARED_MAP.finditer(maps):
            device = f"{int(match[2], 16)}:{int(match[3], 16)}"
            path = proc.map_path(match[5])
            if self._path_is_ours(pid, path, device):
                found.append((proc.mapped_file(pid, match, path), path))
        return found

    def _nobody_unseen_writes(self) -> bool:
        """True if every file below the paths that is open for writing is so in a process that we can look into."""
        suspects = []
        for path in self._paths:
            todo = [path]
            while todo:
                try:
                    with os.scandir(todo.pop()) as entries:
                        for entry in entries:
                            if entry.is_dir(follow_symlinks=False):
                                todo.append(entry.path)
                            elif entry.is_file(follow_symlinks=False):
                                suspects.append(entry.path)
                except PermissionError:
                    return False
                except FileNotFoundError:
                    continue
        for _ in range(5):  # a running writer opens and closes files while we compare
            busy = {path: open_for_writing(path) for path in suspects}
            if None in busy.values():
                return False
            suspects = [path for path, is_open in busy.items() if is_open]
            if suspects:
                seen = self._files_open_for_writing()
                suspects = [path for path in suspects if proc.file_of(path) not in seen]
            if not suspects:
                return True
        return False

    def _files_open_for_writing(self) -> set[tuple[int, int] | None]:
        """(st_dev, st_ino) of those in processes that we can look into; None stands for a file that is gone."""
        found: set[tuple[int, int] | None] = {None}
        for pid in proc.pids():
            try:
                seen = proc.stat_of(str(pid))
                if seen is None or seen.kernel_thread or seen.dead:
                    continue
                base = proc.readable_base(pid, seen)
                found.update(proc.file_of(entry) for _, entry in self._open_files(base, pid, writable=True))
                found.update(file for file, _ in self._maps(base, pid))
            except (PermissionError, FileNotFoundError, ProcessLookupError):
                continue
        return found

    def _judge(self, pid: int, seen: proc.Stat) -> tuple[bool, Process]:
        """Could this process, which we may not look into, write below the paths by mode and ACL?"""
        status = proc.status(pid, (b"Uid", b"Gid", b"Groups"))
        uids = frozenset(int(uid) for uid in status[b"Uid"])
        gids = frozenset(int(gid) for gid in status[b"Gid"] + status[b"Groups"])
        if self._permissions is None:
            self._permissions = Permissions(self._paths)
        process = Process(pid, seen.starttime, seen.name, int(status[b"Uid"][1]), seen.state)
        return self._permissions.allow(uids, gids), process

    def _judge_hidden(self) -> tuple[bool, Process]:
        if self._permissions is None:
            self._permissions = Permissions(self._paths)
        process = Process(*_HIDDEN, "other users' processes, which /proc hides (hidepid)", -1, "?")
        self._judged[_HIDDEN] = not self._permissions.private(os.geteuid()), process
        return self._judged[_HIDDEN]


def _hides_processes(mounts: Sequence[Mount]) -> bool:
    """Whether /proc doesn't show us all processes. Source: proc(5), `hidepid` and `gid`."""
    if os.geteuid() == 0:
        return False
    options = dict(option.partition("=")[::2] for option in mount_of("/proc", mounts).super_options)
    hides = options.get("hidepid", "off")
    shown = int(options.get("gid", "-1")) in (os.getegid(), *os.getgroups()) and hides not in ("ptraceable", "4")
    return hides not in ("off", "0") and not shown


def scan(paths: Sequence[str]) -> Scan:
    """One look at who can write below the canonical directories `paths`; see `Scanner.scan`."""
    return Scanner(paths).scan()


def users_of(path: str) -> list[Process]:
    """Who but ourselves uses anything at or below the canonical `path` (see `Scanner.users`): the check before an
    unmount or a removal."""
    return Scanner([path]).users()


def named(processes: Sequence[Process], limit: int = 5) -> str:
    """A few of them for a message: `sshd (pid 7), cron (pid 9) and 12 more`."""
    text = ", ".join(str(process) for process in processes[:limit])
    return text + (f" and {len(processes) - limit} more" if len(processes) > limit else "")
