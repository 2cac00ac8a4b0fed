"""What the tests of a quiesce share: real writers, runs that can be killed, disks, and their sure end."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.host import processes
from snapshotter.host.mounts import table
from tests.support import interpreter

PATIENCE_S = 30.0  # the machine may be busy with other tests
NOBODY = 65534
#: The system's interpreter has no snapshotter installed.
CHECKOUT = str(Path(__file__).resolve().parents[2])

WRITER = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while True:
    os.write(fd, b"x"); time.sleep(0.001)
"""
MAPPER = """
import mmap, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 4096); m = mmap.mmap(fd, 4096); os.close(fd)
n = 0
while True:
    n += 1; m[:8] = n.to_bytes(8, "big"); time.sleep(0.001)
"""
THREADED = """
import os, sys, threading, time
def work(n):
    fd = os.open(sys.argv[1] + str(n), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        os.write(fd, b"x"); time.sleep(0.001)
for n in range(8): threading.Thread(target=work, args=(n,)).start()
"""
READER = """
import os, sys, time
os.chdir(os.path.dirname(sys.argv[1])); fd = os.open(sys.argv[1], os.O_RDONLY); n = 0
while True:
    os.pread(fd, 10, 0); n += 1; open(sys.argv[2], "w").write(str(n)); time.sleep(0.002)
"""


def until(what: Callable[[], object], why: str = "") -> None:
    """Wait until `what()` is true, or fail."""
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end, f"waited in vain: {why or what}"
        time.sleep(0.005)


class Zoo:
    """Starts processes; ends them all, stopped ones too."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, *argv: str, uid: int | None = None, **more: object) -> subprocess.Popen[bytes]:
        if uid is not None:
            argv = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *argv)
        child = subprocess.Popen(argv, start_new_session=True, **more)  # type: ignore[call-overload]
        self.started.append(child)
        return child

    def python(self, code: str, *words: object, uid: int | None = None, **more: object) -> subprocess.Popen[bytes]:
        program, path = interpreter(uid)
        return self.run(
            program,
            "-c",
            code,
            *map(str, words),
            uid=uid,
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            **more,
        )

    def writer(self, file: Path, code: str = WRITER, uid: int | None = None) -> subprocess.Popen[bytes]:
        child = self.python(code, file, uid=uid)
        until(lambda: child.pid in [found.pid for found in processes.scan([str(file.parent)]).writers], "a writer")
        return child

    def tracer(self, pid: int, *words: str) -> subprocess.Popen[bytes]:
        child = self.python(TRACER, pid, *words, stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"traced\n"
        return child

    def end(self) -> None:
        for child in self.started:
            for number in (signal.SIGKILL, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
        for child in self.started:
            child.wait()


@pytest.fixture
def zoo() -> Iterator[Zoo]:
    zoo = Zoo()
    yield zoo
    zoo.end()


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("SNAPSHOTTER_RUN", str(path))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


def state(pid: int) -> str:
    """The state letter of the first thread; '' if gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def content(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def stands_still(directory: Path, seconds: float = 0.1) -> bool:
    before = content(directory)
    time.sleep(seconds)
    return content(directory) == before


def moves(directory: Path) -> None:
    """Fail unless the content changes: the writers run."""
    before = content(directory)
    until(lambda: content(directory) != before, "the writers to go on")


def records(run: Path) -> list[str]:
    directory = run / "quiesce"
    return os.listdir(directory) if directory.exists() else []


def watchdogs(run: Path) -> list[int]:
    """Watchdogs of quiesces in this run directory."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            mine = any(word.startswith(os.fsencode(str(run)) + b"/") for word in words)
            if mine and any(word.endswith(b"watchdog.py") for word in words) and state(int(pid)) != "Z":
                found.append(int(pid))
    return found


#: A run that holds with the given expression, says so, and then waits. It takes signals as the command does: letting go
#: isn't cut.
RUN = """
import signal, sys, time
from snapshotter.core import interrupts
from snapshotter.host import quiesce, service
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests with `&` has it ignored
interrupts.install()
say = lambda text: print(text, flush=True)
say("begin")
try:
    with {held} as held:
        say("held")
        # A signal that comes just before a sleep begins is seen at its end only.
        until = time.monotonic() + {seconds}
        while time.monotonic() < until: time.sleep(0.05)
        {inside}
    say("end")
except BaseException as error:
    say(type(error).__name__ + ": " + str(error))
"""


#: strace and gdb do this: the process `argv[1]` is traced until this one ends. It goes on at once, whatever stops it.
TRACER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
pid = int(sys.argv[1])
if libc.ptrace(16, pid, None, None): sys.exit(os.strerror(ctypes.get_errno()))  # PTRACE_ATTACH
while True:
    os.waitpid(pid, 0x40000000)  # __WALL
    print("traced", flush=True)
    if "--holds" in sys.argv: import time; time.sleep(600)
    libc.ptrace(7, pid, None, None)  # PTRACE_CONT
"""


class Run:
    """Another process that quiesces."""

    def __init__(self, zoo: Zoo, held: str, seconds: float = 600, inside: str = "pass", uid: int | None = None) -> None:
        code = RUN.format(held=held, seconds=seconds, inside=inside)
        self.child = zoo.python(code, uid=uid, stdout=subprocess.PIPE)
        self.pid = self.child.pid
        assert self.hear() == "begin"

    def hear(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline().decode().strip()

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()


class Disk:
    """An ext4 file system on a loop device."""

    def __init__(self, where: Path) -> None:
        where.mkdir()
        image = where / "image"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        self.path = where / "mnt"
        self.path.mkdir()
        # `mount -o loop` sets autoclear: the device goes with the mount.
        subprocess.run(["mount", "-o", "loop", str(image), str(self.path)], check=True)

    def freeze(self) -> int:
        return subprocess.run(["fsfreeze", "-f", str(self.path)], stderr=subprocess.DEVNULL).returncode

    def thaw(self) -> int:
        return subprocess.run(["fsfreeze", "-u", str(self.path)], stderr=subprocess.DEVNULL).returncode

    def frozen(self) -> bool:
        """Asked by freezing it (a frozen one refuses), and undone."""
        if self.freeze() == 0:
            assert self.thaw() == 0
            return False
        return True

    def end(self) -> None:
        self.thaw()
        end = time.monotonic() + PATIENCE_S
        while any(mount.path == str(self.path) for mount in table()):
            subprocess.run(["umount", str(self.path)], check=False, stderr=subprocess.DEVNULL)
            assert time.monotonic() < end, f"{self.path} can't be unmounted"
            time.sleep(0.05)


@pytest.fixture
def disk(tmp_path: Path, zoo: Zoo) -> Iterator[Callable[[], Disk]]:
    disks: list[Disk] = []

    def make() -> Disk:
        disks.append(Disk(tmp_path / f"disk-{secrets.token_hex(3)}"))
        return disks[-1]

    yield make
    for one in disks:
        one.thaw()
    zoo.end()
    for one in disks:
        one.end()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of its own, emptied, thawed and removed at the end."""
    top = next((mount.path for mount in table() if mount.fstype == "cgroup2"), None)
    if top is None or os.geteuid() != 0:
        pytest.skip("needs root and the unified cgroup hierarchy")
    path = Path(top) / f"snapshotter-test-{secrets.token_hex(4)}"
    path.mkdir()
    yield path
    below = [one for one in path.rglob("*") if one.is_dir()]
    for one in [*below, path]:
        (one / "cgroup.freeze").write_text("0")
    for one in [*reversed(below), path]:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            for pid in (one / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                one.rmdir()
                break
            except OSError:
                time.sleep(0.02)
