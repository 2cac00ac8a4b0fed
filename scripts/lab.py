"""The lab: builds a Debian image with device-mapper and ZFS, boots it under qemu, runs a job in it. Run by scripts/lab.

It knows nothing of what the tests test. Only the standard library: the host needs Python, qemu, e2fsprogs, debootstrap
(to build), git. Nothing stays behind, whatever kills it: qemu dies with its parent, the disks of a run are files
without a name, the build's mounts live in a mount namespace of their own.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import fcntl
import hashlib
import io
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn

CHECKOUT = Path(__file__).resolve().parents[1]
RECIPE = CHECKOUT / "tests/lab/image"
SUITE = "bookworm"
#: What runs when no path is given.
SELECTION = ("tests/lab",)
GB = 1024**3
IMAGE_SIZE = 5 * GB
DISKS, DISK_SIZE = 4, 8 * GB
#: Exit statuses besides the job's own.
UNAVAILABLE, TIMED_OUT, DIED = 3, 124, 125
#: After the guest's own time limit, for it to say what hangs and write its results.
GRACE = 300
CRASH = "Kernel panic"  # an oops is one, too: oops=panic


def fail(line: str, status: int = UNAVAILABLE) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(status)


def program(name: str, package: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not found:
        fail(f"{name} is missing on this machine; as root: apt-get install {package}")
    return found


# --- the image


def requirements() -> list[str]:
    """What the package and its tests ask of PyPI, without what runs natively only."""
    parser = configparser.ConfigParser()
    parser.read(CHECKOUT / "setup.cfg")
    extras = parser["options.extras_require"]
    wanted = parser["options"]["install_requires"] + extras["dev"] + extras["aws"] + extras["gcp"]
    lines = [line.strip() for line in wanted.splitlines()]
    here = re.compile("mypy|ruff|pytest-xdist")
    return sorted({line.split(";")[0].replace(" ", "") for line in lines if line and not here.match(line)})


def image_directory() -> Path:
    """Where the image of this very recipe is, or will be: one directory per recipe, outside the checkout."""
    digest = hashlib.sha256(repr([SUITE, IMAGE_SIZE, requirements()]).encode())
    for path in sorted(RECIPE.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return cache() / digest.hexdigest()[:16]


def cache() -> Path:
    given = os.environ.get("SNAPSHOTTER_LAB")
    return Path(given).resolve() if given else Path("/var/tmp/snapshotter-lab")


def image() -> Path:
    """The image's directory (root.img, vmlinuz); built if need be, by one of many that ask at once."""
    made = image_directory()
    if (made / "root.img").exists():
        return made
    tools = builders()
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("lab: another build runs; waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "root.img").exists():
            # We hold the lock: what other builds left is of dead ones.
            for stale in cache().glob("*.building"):
                shutil.rmtree(stale, ignore_errors=True)
            build(made, *tools)
    return made


def can() -> None:
    """Fails, in one line, where the lab can't be had."""
    program("qemu-system-x86_64", "qemu-system-x86")
    program("git", "git")
    if not (image_directory() / "root.img").exists():
        builders()


def builders() -> list[str]:
    """The programs that build the image."""
    if os.geteuid() != 0:
        fail("the lab's image is not built yet, and building needs root; as root: scripts/lab image")
    return [program("debootstrap", "debootstrap"), program("unshare", "util-linux"), program("mke2fs", "e2fsprogs")]


def build(made: Path, debootstrap: str, unshare: str, mke2fs: str) -> None:
    began = time.monotonic()
    work = made.with_name(made.name + ".building")
    work.mkdir(mode=0o755)
    log = cache() / "build.log"
    print(f"lab: building the image {made} (about 7 minutes; {log})", file=sys.stderr, flush=True)
    environment = {
        **{k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")},
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "WORK": str(work),
        "SUITE": SUITE,
        "DEBOOTSTRAP": debootstrap,
        "MKE2FS": mke2fs,
        "SIZE": str(IMAGE_SIZE // 1024**2),
        "RECIPE": str(RECIPE),
        "REQUIREMENTS": " ".join(requirements()),
    }
    # Mounts and processes of the build end with it, however it ends.
    command = [unshare, "--mount", "--pid", "--fork", "--kill-child", "bash", str(RECIPE / "build.sh")]
    with open(log, "wb") as output:
        done = subprocess.run(
            [*dies_with_us(), *command], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    if done.returncode:
        shutil.rmtree(work, ignore_errors=True)
        tail = log.read_text(errors="replace").splitlines()[-30:]
        print("\n".join(tail), file=sys.stderr)
        fail(f"the image could not be built (its log: {log})")
    shutil.rmtree(work / "root", ignore_errors=True)
    os.rename(work, made)
    print(f"lab: built in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def dies_with_us() -> list[str]:
    """The words before a command that make the kernel kill it when we die."""
    return [program("setpriv", "util-linux"), "--pdeathsig", "KILL"]


# --- the job


def files() -> list[str]:
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={CHECKOUT}", "ls-files", "-coz", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        fail(f"git can't list the checkout's files: {listed.stderr.strip()}")
    return sorted({name for name in listed.stdout.split("\0") if name and (CHECKOUT / name).is_file()})


def pack(into: IO[bytes], script: str, limit: int, disks: int, interactive: bool) -> None:
    with tarfile.open(fileobj=into, mode="w") as tar:
        for name in files():
            with contextlib.suppress(FileNotFoundError):
                tar.add(CHECKOUT / name, arcname=name, recursive=False)
        extra = {"job": script, "limits": f"{limit} {disks}\n"}
        if interactive:
            extra["interactive"] = ""
            with contextlib.suppress(OSError):
                columns, rows = os.get_terminal_size()
                extra["size"] = f"rows {rows} columns {columns}\n"
        for name, text in extra.items():
            info = tarfile.TarInfo(f".lab/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    into.flush()
    size = into.tell()
    into.truncate(size + (-size % 1024**2))


@contextlib.contextmanager
def unnamed(size: int = 0) -> Iterator[IO[bytes]]:
    """A file that is gone when its last user is."""
    with tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", "/var/tmp")) as made:
        made.truncate(size)
        yield made


class Run:
    """One boot. `status` and the results are there when `go` came back."""

    def __init__(self, options: argparse.Namespace, script: str, interactive: bool = False) -> None:
        self.options = options
        self.script = script
        self.interactive = interactive
        self.limit = 0 if interactive else options.limit
        self.console: deque[str] = deque(maxlen=2000)
        self.results: dict[str, bytes] = {}

    def go(self) -> int:
        can()
        qemu = program("qemu-system-x86_64", "qemu-system-x86")
        built = image()
        with contextlib.ExitStack() as stack:
            job = stack.enter_context(unnamed())
            result = stack.enter_context(unnamed(64 * 1024**2))
            scratch = [stack.enter_context(unnamed(self.options.disk * GB)) for _ in range(self.options.disks)]
            pack(job, self.script, self.limit, len(scratch), self.interactive)
            ours, theirs = socket.socketpair()
            reader = threading.Thread(target=self.read_console, args=(ours.makefile("rb"),), daemon=True)
            reader.start()
            disks = [job.fileno(), result.fileno(), *(disk.fileno() for disk in scratch)]
            process = subprocess.Popen(
                [*dies_with_us(), qemu, *self.words(built, disks, theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[*disks, theirs.fileno()],
            )
            theirs.close()
            try:
                timed_out = self.relay(process)
            finally:
                process.kill()
                process.wait()
            reader.join(5)
            with contextlib.suppress(tarfile.ReadError), tarfile.open(fileobj=result, mode="r:") as tar:
                for member in tar:
                    opened = tar.extractfile(member) if member.isfile() else None
                    if opened:
                        self.results[member.name.removeprefix("./")] = opened.read()
        return self.verdict(timed_out)

    def words(self, built: Path, disks: list[int], console: int) -> list[str]:
        """qemu's command line; the disks and the console are descriptors that it is given."""
        words = ["-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "q35", "-display", "none", "-no-reboot"]
        words += ["-nodefaults", "-smp", str(self.options.cpus), "-m", str(self.options.memory)]
        words += ["-kernel", str(built / "vmlinuz"), "-append"]
        words += [
            "root=/dev/nvme0n1 rw init=/lab-init console=ttyS0 quiet loglevel=4 mitigations=off oops=panic panic=-1 "
            "random.trust_cpu=on audit=0 selinux=0 apparmor=0 raid=noautodetect rcupdate.rcu_cpu_stall_suppress=1 "
            "nowatchdog spl.spl_panic_halt=1 "
            # A host busy with its own disk may hold a write beyond the driver's 30 s, which then gives the disk up.
            "nvme_core.io_timeout=900 nvme_core.admin_timeout=900"
        ]
        # Namespaces of one controller: their numbers are the same at every boot, which controllers' are not.
        words += ["-device", "nvme,id=nvme,serial=lab,max_ioqpairs=4"]
        drives = [f"file={built / 'root.img'},snapshot=on"]
        drives += [f"file=/proc/self/fd/{descriptor}" for descriptor in disks]
        for number, drive in enumerate(drives):
            words += ["-drive", f"{drive},format=raw,if=none,id=d{number},cache=unsafe,discard=unmap"]
            words += ["-device", f"nvme-ns,drive=d{number},bus=nvme,nsid={number + 1}"]
        words += ["-chardev", f"socket,id=kernel,fd={console}", "-serial", "chardev:kernel"]
        words += ["-device", "virtio-serial-pci", "-chardev", "stdio,id=job,signal=off", "-device"]
        return [*words, "virtconsole,chardev=job", "-device", "virtio-rng-pci"]

    def read_console(self, stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode(errors="replace").rstrip()
            self.console.append(text)
            if self.options.console:
                print(f"[kernel] {text}", file=sys.stderr, flush=True)

    def relay(self, process: subprocess.Popen[bytes]) -> bool:
        """Passes the job's output on as it comes (and a person's keys), until qemu ends. True: it had to be killed."""
        assert process.stdin and process.stdout
        ends = time.monotonic() + self.limit + GRACE if self.limit else None
        watched = [process.stdout.fileno()] + ([0] if self.interactive else [])
        while True:
            ready, _, _ = select.select(watched, [], [], 1)
            if process.stdout.fileno() in ready:
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    return False
                os.write(1, data)
            if 0 in ready:
                keys = os.read(0, 4096)
                if keys:
                    process.stdin.write(keys)
                    process.stdin.flush()
                else:
                    watched.remove(0)
            if ends is not None and time.monotonic() > ends:
                return True

    def verdict(self, timed_out: bool) -> int:
        crash = next((line for line in self.console if CRASH in line), None)
        status = self.results.get("status")
        over = timed_out or "limit" in self.results
        if crash or status is None or over:
            print("\nlab: the kernel's console ended with:", file=sys.stderr)
            print("\n".join(list(self.console)[-100:]), file=sys.stderr)
        if crash:
            fail(f"the lab's kernel crashed: {crash}", DIED)
        if over:
            how = "hung: it was killed" if timed_out else "was ended: see above what ran then"
            fail(f"the lab's limit of {self.limit} s is over, and it {how}", TIMED_OUT)
        if status is None:
            fail("the lab ended without a result (its console is above)", DIED)
        return int(status)


# --- the commands


def take_junit(arguments: list[str]) -> tuple[list[str], Path]:
    """pytest's arguments without where to write JUnit's file, and that place, which is on this side."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--junitxml", "--junit-xml", dest="junit", type=Path, default=CHECKOUT / ".cache/lab/junit.xml")
    known, rest = parser.parse_known_args(arguments)
    return rest, known.junit


def run_tests(options: argparse.Namespace, arguments: list[str]) -> int:
    rest, junit = take_junit(arguments)
    if not any(os.path.exists(CHECKOUT / word.split("::")[0]) for word in rest if not word.startswith("-")):
        rest += SELECTION
    color = "yes" if sys.stdout.isatty() else "no"
    words = ["/opt/venv/bin/python", "-m", "pytest", "-p", "no:cacheprovider", f"--color={color}", *rest]
    words += ["--junitxml=/results/junit.xml", "-o", "faulthandler_timeout=600"]
    run = Run(options, f"exec {shlex.join(words)}\n")
    began = time.monotonic()
    status = DIED
    try:
        status = run.go()
    finally:
        report = run.results.get("junit.xml")
        if report:
            junit.parent.mkdir(parents=True, exist_ok=True)
            junit.write_bytes(report)
            print(f"lab: JUnit file {junit}", file=sys.stderr)
    print(f"lab: pytest ended with {status} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return status


def run_script(options: argparse.Namespace, arguments: list[str]) -> int:
    if not arguments:
        fail("run what? scripts/lab run SCRIPT|-", 2)
    name, *words = arguments
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text()
    except OSError as error:
        fail(f"{name}: {error.strerror}", 2)
    return Run(options, f"set -- {shlex.join(words)}\n{text}").go()


def shell(options: argparse.Namespace) -> int:
    if not os.isatty(0):
        return run_script(options, ["-"])
    print("lab: booting; `exit` powers off; the checkout is /checkout; free disks: $LAB_DISKS", file=sys.stderr)
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        return Run(options, "exec bash --login -i\n", interactive=True).go()
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def main(argv: list[str]) -> int:
    usage = "scripts/lab [options] [pytest arguments | run SCRIPT|- [WORD ...] | shell | image | can]"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False)
    limit = 12 * 3600 if "--full" in argv else 2700
    parser.add_argument("--limit", type=int, default=limit, help="seconds that a job may take (0: no limit)")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=3072, help="MiB")
    parser.add_argument("--disks", type=int, default=DISKS, help="empty scratch disks")
    parser.add_argument("--disk", type=int, default=DISK_SIZE // GB, help="GiB of each")
    parser.add_argument("--console", action="store_true", help="show the kernel's console too")
    options, rest = parser.parse_known_args(argv)
    # A polite end is an end like any other: what `finally` undoes is undone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    match rest:
        case ["can"]:
            can()
            return 0
        case ["image"]:
            print(image())
            return 0
        case ["shell"]:
            return shell(options)
        case ["run", *words]:
            return run_script(options, words)
        case _:
            return run_tests(options, rest)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
