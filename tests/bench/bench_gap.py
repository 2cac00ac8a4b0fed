"""The writer's longest gap between two synced writes, in windows of one length that begin with what is measured. Run as
a program, this file is the writer."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path

WINDOW_S = 0.5


def main() -> None:
    """argv: directory, where to write the stamps. Appends 4 KiB and syncs, again and again, as a database's log does,
    while another thread writes 5 MB/s unsynced, as its compactions do; until stdin ends. Then writes the time of the
    end of every sync, time.monotonic() s as doubles."""
    top, report = sys.argv[1:]
    stamps = array("d")
    over = threading.Event()

    def compactions() -> None:
        noise = os.urandom(500_000)
        number = 0
        while not over.wait(0.1):
            with open(os.path.join(top, f"compacted-{number % 40}"), "wb") as file:
                file.write(noise)
            number += 1

    def until_told() -> None:
        sys.stdin.read()
        over.set()

    for function in (compactions, until_told):
        threading.Thread(target=function, daemon=True).start()
    block = os.urandom(4096)
    fd = os.open(os.path.join(top, "log"), os.O_WRONLY | os.O_CREAT)
    at = 0
    print("writing", flush=True)
    while not over.is_set():
        os.pwrite(fd, block, at)
        os.fdatasync(fd)
        stamps.append(time.monotonic())
        at = (at + 4096) % (16 << 20)
    with open(report, "wb") as file:
        stamps.tofile(file)


def longest(stamps: array[float], since: float, until: float) -> float:
    """The longest time in ms between two stamps of which a part lies in the window."""
    inside = [k for k, stamp in enumerate(stamps) if since <= stamp <= until]
    if not inside:
        raise RuntimeError("the writer stood still for a whole window")
    first, last = max(1, inside[0]), min(len(stamps) - 1, inside[-1] + 1)
    return max(stamps[k] - stamps[k - 1] for k in range(first, last + 1)) * 1000


def measure(data: Path, report: Path, rounds: int, acts: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """The longest gap (ms) of each round by act; an act begins with its window. Acts go by turns."""
    writer = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), str(data), str(report)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    windows: list[tuple[str, float]] = []
    try:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdout.readline()
        time.sleep(1)
        names = list(acts)
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                began = time.monotonic()
                windows.append((name, began))
                acts[name]()
                time.sleep(max(0.0, began + WINDOW_S - time.monotonic()) + 0.1)
        writer.stdin.close()
        writer.wait(60)
    finally:
        if writer.poll() is None:
            writer.kill()
            writer.wait()
    stamps = array("d")
    stamps.frombytes(report.read_bytes())
    found: dict[str, list[float]] = {name: [] for name in acts}
    for name, began in windows:
        found[name].append(longest(stamps, began, began + WINDOW_S))
    return found


if __name__ == "__main__":
    main()
