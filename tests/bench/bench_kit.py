"""What the bench's parts share: an install as an operator has it, timed commands, medians. Judges nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]
DEPENDENCIES = ("click", "msgspec", "tenacity")
#: What pip writes for `setup.cfg`'s entry point.
PIPS_SCRIPT = """\
# -*- coding: utf-8 -*-
import re
import sys
from snapshotter.__main__ import main
if __name__ == '__main__':
    sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])
    sys.exit(main())
"""
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


class Spread(NamedTuple):
    """Median, and the 10th and 90th percentile, of some measurements of one kind."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(statistics.median(ordered), ordered[round(last * 0.1)], ordered[round(last * 0.9)], len(ordered))


class Install:
    """snapshotter as pip installs it into a venv of its own: byte-compiled, its dependencies and nothing else. The
    checkout's own venv won't do: an editable install and the test tools make every start of Python slower."""

    def __init__(self, home: Path) -> None:
        self.venv = home / "venv"
        subprocess.run([_base_python(), "-m", "venv", "--without-pip", str(self.venv)], check=True)
        self.python = str(self.venv / "bin" / "python3")
        where = subprocess.run(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        packages = Path(sysconfig.get_paths()["purelib"])
        for name in DEPENDENCIES:
            shutil.copytree(packages / name, Path(where) / name)
        for pattern in (*(f"{name}-*.dist-info" for name in DEPENDENCIES), "node_snapshotter-*.dist-info"):
            for found in packages.glob(pattern):
                shutil.copytree(found, Path(where) / found.name)
        for name in ("snapshotter", "providers"):
            shutil.copytree(CHECKOUT / name, Path(where) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(CHECKOUT / "tests" / "bench" / "bench_child.py", where)
        subprocess.run([self.python, "-m", "compileall", "-q", where], check=True)
        self.script = self.venv / "bin" / "snapshotter"
        self.script.write_text(f"#!{self.python}\n{PIPS_SCRIPT}")
        self.script.chmod(0o755)
        self.config = home / "config.toml"
        self.config.write_text(f'state = "{home}/state"\n')
        self.environment = environment({"HOME": str(home), "SNAPSHOTTER_RUN": str(home / "run")})

    def argv(self, *words: str) -> list[str]:
        return [str(self.script), *words, "--json", "--config", str(self.config)]


def _base_python() -> str:
    """The interpreter that this one's venv was made from: of the version that the dependencies were compiled for."""
    return str(getattr(sys, "_base_executable", sys.executable))


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {"PATH": f"{os.environ['PATH']}:{_SBIN}", "HOME": os.environ.get("HOME", "/"), "LC_ALL": "C.UTF-8"} | dict(
        extra or {}
    )


class Timed(NamedTuple):
    """A command that succeeded, and its wall-clock time in ms."""

    ms: float
    out: str


def timed(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Timed:
    """Run it to its end, from the fork to the wait. Raises RuntimeError with what it said if it fails."""
    began = time.perf_counter()
    done = subprocess.run(
        list(argv), stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env or environment(), cwd="/"
    )
    ms = (time.perf_counter() - began) * 1000
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    return Timed(ms, done.stdout)


def quietly(*argv: str) -> None:
    """Run it, whatever comes of it."""
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, env=environment(), cwd="/")


def forget(path: Path) -> None:
    """Drop a file from the page cache: what is read next comes from the disk, as it would in a restore."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def fill(top: Path, megabytes: int) -> None:
    """Files like a database's: 64 MB each (the last may be smaller), of noise, on the disk when this returns."""
    top.mkdir(parents=True, exist_ok=True)
    noise = os.urandom(1 << 20)
    left, number = megabytes, 0
    while left > 0:
        with open(top / f"{number:06}.sst", "wb") as file:
            for block in range(min(64, left)):
                file.write(block.to_bytes(8, "big") + number.to_bytes(8, "big") + noise[16:])
        left, number = left - 64, number + 1
    subprocess.run(["sync", "-f", str(top)], check=True)


@contextlib.contextmanager
def no_mounts_left(below: Path) -> Iterator[None]:
    """On the way out, whatever is still mounted below is unmounted, innermost first."""
    try:
        yield
    finally:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            points = [line.split(" ")[4] for line in file]
        for point in sorted((each for each in points if each.startswith(f"{below}/")), key=len, reverse=True):
            quietly("umount", "-l", point)


def ended_by_signals() -> None:
    """SIGTERM and SIGHUP leave by the same way as Ctrl-C: everything is undone."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
