"""What the tests share: running the command, a node under load, loop file systems. Everything made here is undone
here."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snapshotter.host.mounts import table
from tests import json_kit

CHECKOUT = Path(__file__).resolve().parents[1]
BESU = ["-m", "tests.hot.besu_shaped"]
NOBODY = 65534


def as_user(uid: int | None) -> list[str]:
    """The words before a command that run it as another user."""
    if uid is None or os.geteuid() != 0:
        return []
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]


@functools.cache
def interpreter(uid: int | None) -> tuple[str, str]:
    """(interpreter, PYTHONPATH) that this user can run snapshotter and the test nodes with. Root's own interpreter or
    checkout may lie where others can't go (/root): then Debian's is used, and a copy of the packages."""
    if uid is None or os.geteuid() != 0:
        return sys.executable, str(CHECKOUT)
    packages = sysconfig.get_paths()["purelib"]
    wanted = "import click, msgspec, tenacity, rocksdict, snapshotter.cli, tests.hot.besu_shaped"
    tried = []
    for program, path in [(sys.executable, str(CHECKOUT)), ("/usr/bin/python3", f"{CHECKOUT}:{packages}"), ("", "")]:
        if not program:
            copy = tempfile.mkdtemp(prefix="snapshotter-packages-", dir="/var/tmp")
            atexit.register(shutil.rmtree, copy, ignore_errors=True)
            os.chmod(copy, 0o755)
            shutil.copytree(packages, f"{copy}/packages", ignore=shutil.ignore_patterns("mypy*", "ruff*", "pip*"))
            for name in ("snapshotter", "providers", "tests"):
                shutil.copytree(CHECKOUT / name, f"{copy}/{name}")
            program, path = "/usr/bin/python3", f"{copy}:{copy}/packages"
        done = subprocess.run(
            [*as_user(uid), program, "-c", wanted],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            cwd="/",
        )
        real = subprocess.run(
            [*as_user(uid), program, "-c", "import os, sys; os.execv(sys.executable, ['python3', '-V'])"]
        )
        if done.returncode == 0 and real.returncode == 0:
            return program, path
        tried.append(f"{program} with {path}: {done.stderr[-200:]}")
    raise AssertionError(f"no interpreter that user {uid} can run: {tried}")


class Command:
    """`snapshotter` as an operator runs it: another process, with its own state and run-time places."""

    def __init__(self, home: Path, uid: int | None = None, config: str = "") -> None:
        self.home = home
        self.uid = uid
        home.mkdir(parents=True, exist_ok=True)
        self.config = home / "config.toml"
        self.config.write_text(f'state = "{home}/state"\n' + config)
        if uid is not None:
            for path in (home, self.config):
                os.chown(path, uid, uid)

    def argv(self, *words: str) -> list[str]:
        program = interpreter(self.uid)[0]
        return [*as_user(self.uid), program, "-m", "snapshotter", *words, "--config", str(self.config)]

    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "SNAPSHOTTER_RUN": str(self.home / "run"),
            "PYTHONPATH": interpreter(self.uid)[1],
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.argv(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
            cwd="/",
        )

    def run(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment(),
            cwd="/",
            timeout=timeout,
        )

    def json(self, *words: str, timeout: float = 300) -> dict[str, Any]:
        """The answer of a command that must succeed."""
        done = self.run(*words, "--json", timeout=timeout)
        assert done.returncode == 0, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        document: dict[str, Any] = json.loads(done.stdout)
        assert document.pop("schema") == 1
        json_kit.check(words, document)
        return document

    def error(self, *words: str, exit_code: int) -> dict[str, Any]:
        """The error of a command that must fail with this exit code: one line for a person, an object for a program."""
        done = self.run(*words, "--json")
        assert done.returncode == exit_code, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.stderr
        answer = json.loads(done.stdout)
        assert answer.pop("schema") == 1
        json_kit.check(words, answer, failed=True)
        error: dict[str, Any] = answer["error"]
        assert error["exit"] == exit_code
        return {**error, "line": lines[0]}


def writes_at_last(data: Path, scratch: Path, quiesce: str) -> str:
    """A config's node `late`, whose stop, or hold hook, writes 20 MB to `data`/late, and leaves them in memory."""
    sign = scratch / f"stopped-{quiesce}"
    hold = ["sh", "-c", f"dd if=/dev/urandom of={data}/late bs=1M count=20 && touch {sign}"]
    let_go = ["rm", "-f", str(sign)]
    lines = {"hooks": {"hold": hold, "release": let_go}}.get(
        quiesce, {"stop": hold, "start": let_go, "status": ["sh", "-c", f"test ! -e {sign} || exit 3"]}
    )
    head = f'[node.late]\npath = "{data}"\nquiesce = "{quiesce}"\nbudget = "60s"\n'
    return head + "".join(f"{key} = {json.dumps(argv)}\n" for key, argv in lines.items())


class Node:
    """A Besu-shaped node under synced load, as a process of its own."""

    def __init__(self, data: Path, *words: str, uid: int | None = None) -> None:
        self.data = data
        self.acks = data.parent / f"{data.name}.acks"
        self.acks.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [*as_user(uid), interpreter(uid)[0], *BESU, "run", str(data), str(self.acks), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": interpreter(uid)[1], "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/",
        )

    def acknowledged(self) -> int:
        from tests.hot.besu_shaped import acknowledged

        return acknowledged(self.acks)

    def wait_for(self, number: int, timeout: float = 120) -> None:
        give_up = time.monotonic() + timeout
        while self.acknowledged() < number:
            assert self.process.poll() is None, "the node died"
            assert time.monotonic() < give_up, "the node is too slow"
            time.sleep(0.02)

    def state(self) -> str:
        return state_of(self.process.pid)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(10)


def state_of(pid: int) -> str:
    """R, S, D, T, Z ..., or '' if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class StopWatch(threading.Thread):
    """Watches a process and notes what it had acknowledged while it was seen stopped: nothing of that may be
    missing."""

    def __init__(self, node: Node) -> None:
        super().__init__(daemon=True)
        self.node = node
        self.acknowledged_when_stopped = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            if self.node.state() == "T":
                number = self.node.acknowledged()
                if self.node.state() == "T":
                    self.acknowledged_when_stopped = max(self.acknowledged_when_stopped, number)
            time.sleep(0.001)

    def __enter__(self) -> StopWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def check_database(data: Path, uid: int | None = None) -> dict[str, int]:
    """Open the database with its engine in a process of its own, read everything."""
    done = subprocess.run(
        [*as_user(uid), interpreter(uid)[0], *BESU, "check", str(data)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": interpreter(uid)[1], "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        timeout=300,
    )
    assert done.returncode == 0, f"the database does not open: {done.stderr[-500:]}"
    found: dict[str, int] = json.loads(done.stdout)
    return found


@contextlib.contextmanager
def loop_file_system(kind: str, where: Path, megabytes: int = 600, options: str = "") -> Iterator[Path]:
    """A file system of this kind on a loop device of its own, mounted below `where`. Needs root."""
    tag = uuid.uuid4().hex[:8]
    image, point = where / f"{kind}-{tag}.img", where / f"{kind}-{tag}"
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(megabytes << 20)
    make = {"btrfs": ["mkfs.btrfs", "-q"], "xfs": ["mkfs.xfs", "-q"], "ext4": ["mkfs.ext4", "-q", "-E", "nodiscard"]}
    subprocess.run([*make[kind], str(image)], check=True, capture_output=True)
    device = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        subprocess.run(["mount", *(["-o", options] if options else []), device, str(point)], check=True)
        try:
            yield point
        finally:
            # What a killed command mounted of it elsewhere (staging) would keep the device for ever.
            for mount in reversed([each.path for each in table() if each.source == device]):
                _unmount(mount)
    finally:
        subprocess.run(["losetup", "-d", device], capture_output=True)
        image.unlink(missing_ok=True)
        shutil.rmtree(point, ignore_errors=True)


def _unmount(place: str) -> None:
    """What is busy for five seconds is only taken out of the tree."""
    for _ in range(50):
        if subprocess.run(["umount", place], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", place], capture_output=True)


def pull_disk(point: Path) -> None:
    """The disk of a `loop_file_system` is gone, as one that was unplugged, and its file system still mounted: what the
    kernel hadn't read yet is an I/O error. Nothing on it may be open."""
    source = next(mount.source for mount in reversed(table()) if mount.path == str(point))
    subprocess.run(["umount", str(point)], check=True)
    subprocess.run(["mount", source, str(point)], check=True)  # with nothing read yet
    os.truncate(point.with_suffix(".img"), 0)
    subprocess.run(["blockdev", "--flushbufs", source], capture_output=True)
