"""What /proc says of one process. Knows nothing of why it is asked. Source: proc(5)."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence

from msgspec import Struct

_PF_KTHREAD = 0x00200000  # include/linux/sched.h
_CLONE_NEWNS = 0x00020000  # linux/sched.h
_DELETED = " (deleted)"
TOO_LONG = "/(a path too long to be told)"


class Stat(Struct, frozen=True):
    """What we need of /proc/pid/stat."""

    name: str
    state: str
    parent: int
    group: int
    kernel_thread: bool
    threads: int
    starttime: int

    @property
    def dead(self) -> bool:
        """A dead leader with living threads still is a process."""
        return self.state in "ZXx" and self.threads <= 1


def read(path: str, long: bool = False) -> bytes:
    """A file of /proc. Only a `long` one (maps) comes in parts."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.read(fd, 1 << 16)
        if long:
            parts = [found]
            while part := os.read(fd, 1 << 18):
                parts.append(part)
            found = b"".join(parts)
        return found
    finally:
        os.close(fd)


def stat_of(where: str) -> Stat | None:
    """Of /proc/<where>/stat; None if gone. The name may hold blanks and brackets: the fields start after the last."""
    try:
        line = read(f"/proc/{where}/stat")
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # PermissionError: hidepid=noaccess
        return None
    before, _, after = line.rpartition(b")")
    fields = after.split()
    return Stat(
        name=os.fsdecode(before.partition(b"(")[2]),
        state=fields[0].decode(),
        parent=int(fields[1]),
        group=int(fields[2]),
        kernel_thread=bool(int(fields[6]) & _PF_KTHREAD),
        threads=int(fields[17]),
        starttime=int(fields[19]),
    )


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def every_pid() -> Iterator[int]:
    """Those that were there, and those that were born while the caller looked at them: their parents may have ended
    before they were looked at."""
    done: set[int] = set()
    while new := [pid for pid in pids() if pid not in done]:
        done.update(new)
        yield from new


def status(pid: int, wanted: Sequence[bytes]) -> dict[bytes, list[bytes]]:
    found = {}
    for line in read(f"/proc/{pid}/status").split(b"\n"):
        key, _, value = line.partition(b":")
        if key in wanted:
            found[key] = value.split()
    return found


def mounts_in_namespace(pid: int) -> bytes:
    """mountinfo as it is seen from the root of that process' mount namespace, by a child that goes there. Raises
    PermissionError."""
    import ctypes  # slow to import; os.setns is there from 3.12 on

    library = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    source, sink = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            if library.setns(namespace, _CLONE_NEWNS) == 0:
                mounts = os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc)
                while part := os.read(mounts, 1 << 16):
                    os.write(sink, part)
                os._exit(0)
        finally:
            os._exit(1)
    os.close(sink)
    try:
        parts = []
        while part := os.read(source, 1 << 16):
            parts.append(part)
    finally:
        for fd in (namespace, proc, source):
            os.close(fd)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        raise PermissionError(errno.EPERM, "can't see the mounts of its namespace", str(pid))
    return b"".join(parts)


def link_of(path: str) -> str:
    """Where a link of /proc leads; the kernel tells no path longer than a page."""
    try:
        return os.readlink(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return TOO_LONG
        raise


def readable_base(pid: int, seen: Stat) -> str:
    """Where to read: a process whose first thread has ended shows its files only under a thread that lives."""
    if seen.state not in "ZXx":
        return f"/proc/{pid}"
    for thread in os.listdir(f"/proc/{pid}/task"):
        one = stat_of(f"{pid}/task/{thread}")
        if one is not None and one.state not in "ZXx":
            return f"/proc/{pid}/task/{thread}"
    raise FileNotFoundError(pid)


def owner(pid: int) -> int:
    """Effective uid."""
    return int(status(pid, (b"Uid",))[b"Uid"][1])


def map_path(field: bytes) -> str:
    return os.fsdecode(field.replace(b"\\012", b"\n"))  # the only escape in maps


def mapped_file(pid: int, match: re.Match[bytes], path: str) -> tuple[int, int]:
    """(st_dev, st_ino) as stat tells them: on btrfs the device in maps is another one."""
    number = int(match[4])
    for where in (f"/proc/{pid}/map_files/{match[1].decode()}", f"/proc/{pid}/root{path.removesuffix(_DELETED)}"):
        try:
            found = os.stat(where)
        except OSError:
            continue  # map_files is for root alone; the path may be gone
        if found.st_ino == number:
            return found.st_dev, found.st_ino
    return os.makedev(int(match[2], 16), int(match[3], 16)), number


def file_of(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
