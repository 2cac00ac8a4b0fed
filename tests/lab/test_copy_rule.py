"""The copy provider's changed-file rule on a kernel whose clock is coarse: a file rewritten twice within a tick keeps
size, mtime and ctime, and a copy that trusts them carries the older bytes for ever."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.support import Command, StopWatch, state_of

FILES = 200
SIZE = 4096
#: The worst of writers: it sees which file is opened, by us, and rewrites it and those that came next the last time, in
#: place and always the same size, for so short that a coarse clock doesn't tick; then it leaves them alone. A line in
#: the log, outside the data path, acknowledges each rewrite: from then on that file may not be older in an image.
WRITER = f"""
import ctypes, os, select, struct, sys, time
data, log = sys.argv[1:]
files = {{name: os.open(os.path.join(data, name), os.O_RDWR) for name in os.listdir(data)}}
out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(os.O_NONBLOCK)
libc.inotify_add_watch(watch, data.encode(), 0x20)  # IN_OPEN
turn, last, following = 0, "", {{}}

def rewrite(name):
    global turn
    turn += 1
    os.pwrite(files[name], turn.to_bytes(8, "big"), {SIZE} - 8)
    os.write(out, struct.pack(">QQ", int(name), turn))

names = list(files)
while True:
    if not select.select([watch], [], [], 0.05)[0]:
        rewrite(names[turn % len(names)])
        continue
    opened, at = "", 0
    events = os.read(watch, 65536)
    while at < len(events):
        length = struct.unpack_from("iIII", events, at)[3]
        name = events[at + 16 : at + 16 + length].rstrip(bytes(1)).decode()
        at += 16 + length
        if name in files:
            following[last], last, opened = name, name, name
    several = [opened] if opened else []
    while several and len(several) < 4 and several[-1] in following:
        several.append(following[several[-1]])
    ends = time.monotonic() + 0.002
    while several and time.monotonic() < ends:
        for name in several:
            rewrite(name)
"""


class Rewriter:
    """A process that rewrites; looks to StopWatch like a node."""

    def __init__(self, data: Path) -> None:
        data.mkdir(parents=True)
        for number in range(FILES):
            (data / str(number)).write_bytes(bytes(SIZE))
        self.data, self.log = data, data.parent / "log"
        self.log.touch()
        self.process = subprocess.Popen([sys.executable, "-c", WRITER, str(data), str(self.log)])

    def acknowledged(self) -> int:
        """How many lines the log has."""
        return os.stat(self.log).st_size // 16

    def state(self) -> str:
        return state_of(self.process.pid)

    def newest(self, lines: int) -> dict[int, int]:
        """What each file held at least when the log had so many lines."""
        with open(self.log, "rb") as file:
            return dict(struct.iter_unpack(">QQ", file.read(16 * lines)))

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


def test_this_kernel_hides_quick_rewrites(tmp_path: Path, measured: Callable[[str], None]) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    descriptor = os.open(path, os.O_RDWR)
    hidden = 0
    try:
        for number in range(1, 2001):
            os.pwrite(descriptor, number.to_bytes(8, "big"), 0)
            first = os.fstat(descriptor)
            os.pwrite(descriptor, (-number % 2**64).to_bytes(8, "big"), 0)
            second = os.fstat(descriptor)
            hidden += (first.st_size, first.st_mtime_ns, first.st_ctime_ns) == (
                second.st_size,
                second.st_mtime_ns,
                second.st_ctime_ns,
            )
    finally:
        os.close(descriptor)
    measured(f"{hidden} of 2000 quick rewrites kept size, mtime and ctime on {os.uname().release}")
    assert hidden > 500, "this kernel doesn't lie: the test below proves nothing here"


def test_no_rewrite_is_lost(full: bool, measured: Callable[[str], None]) -> None:
    """Takes under load: every image has every rewrite that was acknowledged when the writer stood still. The second
    set of one store is made from the first's: there a wrong `unchanged` would stay."""
    place = Path(tempfile.mkdtemp(prefix="lab-copy-", dir="/var/tmp"))
    store, writer = place / "store", Rewriter(place / "data")
    lost: list[str] = []
    times = 20 if full else 3
    waited = 0
    try:
        command = Command(place / "etc")
        for turn in range(times):
            before = writer.acknowledged()
            with StopWatch(writer) as watch:  # type: ignore[arg-type]
                taken = command.json(
                    "take", str(writer.data), "--provider", "copy", "-o", f"store={store}", "--budget", "60s"
                )
            assert taken["good"] and taken["quiesce"] == "pause", taken
            waited += watch.acknowledged_when_stopped > 0
            held = writer.newest(max(before, watch.acknowledged_when_stopped))
            tree = store / "sets" / taken["set_id"] / "0" / "tree"
            for number, newest in held.items():
                value = int.from_bytes((tree / str(number)).read_bytes()[-8:], "big")
                if value < newest:
                    lost.append(f"take {turn}, file {number}: {value}, acknowledged was {newest}")
    finally:
        writer.end()
        shutil.rmtree(place)
    assert not lost, lost
    assert waited, "the pause was never seen: nothing is proven of the instant"
    measured(f"copy: {times} takes of {FILES} files under quick rewrites, no rewrite lost")
