"""What the tests of restores in place share: a Besu-shaped data path, a small service that runs on it, its pictures."""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from snapshotter.core.errors import StorageError
from snapshotter.nodes import health
from tests.support import CHECKOUT, Command, loop_file_system

#: A small service manager: start, stop, status of a process that has files of the data path open and writes there. It
#: notes each action, and does badly what a file `bad-ACTION` in its home asks for.
MANAGER = r"""
import os, signal, subprocess, sys, time
action, home, data = sys.argv[1:4]
pid_file = home + "/pid"
def running():
    try:
        pid = int(open(pid_file).read())
        state = open("/proc/%d/stat" % pid).read().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else pid
if action != "status":
    open(home + "/log", "a").write(action + "\n")
if os.path.exists(home + "/bad-" + action):
    how = open(home + "/bad-" + action).read()
    if how == "fail": sys.exit("no " + action + " today")
    if how == "nothing": sys.exit(0)
if action == "status":
    sys.exit(0 if running() else 3)
if action == "start" and not running():
    child = subprocess.Popen([sys.executable, "-S", "-E", home + "/node.py", data], start_new_session=True,
        close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(home + "/said", "w"))
    open(pid_file, "w").write(str(child.pid))
    for _ in range(1000):
        if os.path.exists(data + "/node.pid") and open(data + "/node.pid").read() == str(child.pid): break
        if child.poll() is not None: sys.exit("it ended: " + open(home + "/said").read())
        time.sleep(0.01)
if action == "stop" and running():
    os.kill(running(), signal.SIGTERM)
    while running(): time.sleep(0.005)
    if os.path.exists(home + "/bad-stop"):  # "restart": something starts it again
        subprocess.run([sys.executable, "-S", "-E", *sys.argv[:1], "start", home, data])
"""

#: The node: as Besu, it makes a new key without a word if there is none, and refuses a database without its metadata.
NODE = r"""
import os, signal, sys, time
data = sys.argv[1]
os.makedirs(data + "/database", exist_ok=True)
if not os.path.exists(data + "/key"):
    open(data + "/key", "w").write("0x" + os.urandom(32).hex())
for name in ("DATABASE_METADATA.json", "VERSION_METADATA.json"):
    if os.path.exists(data + "/database/CURRENT") and not os.path.exists(data + "/" + name):
        sys.exit("refuses a database without " + name)
log = open(data + "/database/node.log", "ab", buffering=0)
open(data + "/besu.ports", "w").write("p2p=%d\n" % os.getpid())
going = True
def end(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, end)
with open(data + "/node.pid", "w") as file: file.write(str(os.getpid()))
while going:
    log.write(b"ran\n")
    time.sleep(0.02)
"""


class Managed:
    """A service of the operator's own commands, for the config."""

    def __init__(self, home: Path, data: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.data = home, data
        (home / "manager.py").write_text(MANAGER)
        (home / "node.py").write_text(NODE)

    def argv(self, action: str) -> list[str]:
        return [sys.executable, "-S", "-E", str(self.home / "manager.py"), action, str(self.home), str(self.data)]

    def config(self) -> str:
        return "".join(f"{action} = {json.dumps(self.argv(action))}\n" for action in ("stop", "start", "status"))

    def do(self, action: str) -> int:
        return subprocess.run(self.argv(action), capture_output=True, timeout=60).returncode

    def running(self) -> bool:
        return subprocess.run(self.argv("status"), capture_output=True).returncode == 0

    def did(self) -> list[str]:
        try:
            return (self.home / "log").read_text().split()
        except FileNotFoundError:
            return []

    def end(self) -> None:
        for path in self.home.glob("bad-*"):
            path.unlink()
        for _ in range(3):
            self.do("stop")

    def pid(self) -> int:
        return int((self.home / "pid").read_text())


#: As setfacl -m u:65534:r makes it, of a file with mode 0644.
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, allowed, who)
    for tag, allowed, who in (
        (1, 6, 2**32 - 1),
        (2, 4, 65534),
        (4, 4, 2**32 - 1),
        (16, 4, 2**32 - 1),
        (32, 4, 2**32 - 1),
    )
)


def lay_out(data: Path, blocks: int = 200) -> None:
    """A stopped Besu-shaped node: keys, metadata, a small RocksDB, what is of the moment."""
    from tests.hot import besu_shaped

    besu_shaped.lay_out(data)
    write_blocks(data, blocks)
    (data / "static-nodes.json").write_text("[]")
    (data / "old.pid").write_text("1")
    plugins = data / "plugins"  # what `picture` sees of a file beside its content
    if not plugins.exists():
        plugins.mkdir()
        (plugins / "one.jar").write_text("x")
        os.link(plugins / "one.jar", plugins / "linked.jar")
        for path, name, value in (
            (plugins, "user.origin", b"ours"),
            (plugins / "one.jar", "system.posix_acl_access", ACL),
        ):
            with suppress(OSError):  # not every file system has them
                os.setxattr(path, name, value)


def write_blocks(data: Path, blocks: int) -> None:
    """In a process of its own: a RocksDB keeps its directory to itself as long as its process lives."""
    code = (
        "import sys; from pathlib import Path; from tests.hot.besu_shaped import *\n"
        "db = open_database(Path(sys.argv[1])); first = last_of(db)\n"
        "for n in range(first + 1, first + 1 + int(sys.argv[2])):\n"
        "    for name in WRITTEN: db.get_column_family(name)[key_of(n)] = payload(n, name, 3000)\n"
        "db.get_column_family('variables')[b'head'] = key_of(n)\n"
        "db.flush(True); db.close()\n"
    )
    argv = [sys.executable, "-c", code, str(data), str(blocks)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr[-800:]


#: What the running node of these tests writes all the time: in no comparison.
MOVING = {"database/node.log", "besu.ports", "node.pid"}


#: Mode, owner, group, content or target, hard links (of a file), extended attributes with their values.
Seen = tuple[int, int, int, str, int, tuple[tuple[str, bytes], ...]]


def picture(top: Path, without: set[str] = MOVING) -> dict[str, Seen]:
    """Every entry below, and the top itself as `.`."""
    found: dict[str, Seen] = {}
    for directory, names, files in os.walk(top):
        for name in [*names, *files, *(["."] if directory == str(top) else [])]:
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, top)
            if relative in without:
                continue
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            else:
                content = ""
            links = status.st_nlink if stat.S_ISREG(status.st_mode) else 0
            found[relative] = (status.st_mode, status.st_uid, status.st_gid, content, links, xattrs(path))
    return found


def xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    """ACLs among them."""
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
        return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
    except OSError:  # not every file system has them
        return ()


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


class Story:
    """A node with a service, and a set of it. `damage` destroys what the set can bring back."""

    aside: Path | None = None

    def __init__(
        self,
        place: Path,
        home: Path,
        provider: str,
        *,
        extra: str = "",
        data: Path | None = None,
        aside: Path | None = None,
    ) -> None:
        self.place = place
        self.data = data or place / "node"
        self.service = Managed(home / "service", self.data)
        self.command = Command(
            home / "etc",
            config=f'[node.ours]\npath = "{self.data}"\nprovider = "{provider}"\ntimeout = "1s"\n'
            + self.service.config()
            + extra,
        )
        self.provider = provider
        self.aside = aside
        self.in_place = ["--in-place", "--yes", *(["--aside", str(aside)] if aside else [])]

    def begin(self, blocks: int = 200) -> str:
        """Lay out, take, start; returns the set's id. `of_set` is what it holds (stale files left out)."""
        if not self.data.exists() and self.provider == "btrfs":
            subprocess.run(["btrfs", "subvolume", "create", str(self.data)], check=True, capture_output=True)
        lay_out(self.data, blocks)
        self.of_set = picture(self.data, MOVING | {"old.pid"})
        taken = self.command.json("take", "ours")
        assert taken["good"], taken
        self.set_id: str = taken["set_id"]
        return self.set_id

    def damage(self) -> None:
        """The node went on, and then its database broke. `old` is what is there now."""
        for path in sorted((self.data / "database").iterdir())[::2]:
            path.write_bytes(os.urandom(path.stat().st_size))
        (self.data / "database" / "later").write_text("written since")
        self.old = picture(self.data)

    def run_and_damage(self) -> None:
        """As `damage`, and the service runs on what is left."""
        self.service.do("start")
        self.service.do("stop")
        self.damage()
        self.service.do("start")

    def restored(self) -> bool:
        return not difference(picture(self.data), self.of_set)

    def as_it_was(self) -> bool:
        return not difference(picture(self.data), self.old)

    def leftovers(self) -> list[str]:
        """What a restore made and nobody asked for."""
        beside = [*self.data.parent.iterdir(), *(self.data.iterdir() if self.data.is_dir() else [])]
        beside += self.aside.iterdir() if self.aside else []
        return [
            str(path)
            for path in beside
            if any(word in path.name for word in (".restoring-", "-restoring-", ".corrupted-"))
        ]


@contextmanager
def own_disk(tmp_path: Path, kind: str = "ext4") -> Iterator[Path]:
    """Root gives each node a file system of its own: what runs in a chroot on the same one counts as its user, and on a
    developer's machine something always does."""
    if os.geteuid() != 0:
        (tmp_path / "place").mkdir()
        yield tmp_path / "place"
    else:
        with loop_file_system(kind, tmp_path, 600) as place:
            yield place


@contextmanager
def story(kind: str, tmp_path: Path, **how: Any) -> Iterator[Story]:
    """A node by `copy`, by `copy` with reflinks (`copy-on-btrfs`), or by `btrfs`; `entries`: by copy in a mount point,
    where entries change places one by one; `away`: by copy, the old data set aside on another disk."""
    if kind == "away":
        with own_disk(tmp_path) as place, loop_file_system("ext4", tmp_path, 100) as other:
            made = Story(place, tmp_path / "home", "copy", aside=other, **how)
            try:
                yield made
            finally:
                made.service.end()
        return
    if kind == "entries":
        with own_disk(tmp_path) as place:
            how = {**how, "data": place, "extra": f'store = "{tmp_path}/store"\n'}
            made = Story(tmp_path, tmp_path / "home", "copy", **how)
            try:
                yield made
            finally:
                made.service.end()
        return
    with own_disk(tmp_path, "ext4" if kind == "copy" else "btrfs") as place:
        made = Story(place, tmp_path / "home", "btrfs" if kind == "btrfs" else "copy", **how)
        try:
            yield made
        finally:
            made.service.end()


def with_a_mask(node: Story) -> Callable[[], None]:
    """The service as a unit is one: while the file is there it can't be started."""
    flag = str(node.command.home / "masked")

    def patch() -> None:
        from snapshotter.host.service import Commands
        from snapshotter.verbs import in_place_plan

        class Unit(Commands, frozen=True):
            can_mask: ClassVar[bool] = True

            def start(self, along: Sequence[str] = ()) -> None:
                if os.path.exists(flag):
                    raise StorageError("is masked", object=self.name)
                super().start(along)

            def masked(self) -> bool:
                return os.path.exists(flag)

            def mask(self) -> None:
                open(flag, "w").close()

            def unmask(self) -> None:
                if os.path.exists(flag):
                    os.unlink(flag)

        def unit_of(_: object, *argvs: tuple[str, ...]) -> Unit:
            return Unit(*argvs)

        in_place_plan.service_of = unit_of

    return patch


# ---------------------------------------------------------------------------------------------------------- killing

#: What a restore does to the world, a call at a time: (module, name). Before and after each it may be killed.
CALLS = (
    ("snapshotter.core.journal", "Journal.append"),
    ("snapshotter.core.journal", "Journal.remove"),
    ("snapshotter.host.exchange", "forward"),
    ("snapshotter.host.exchange", "back"),
    ("snapshotter.host.exchange", "move"),
    ("snapshotter.host.exchange", "_swap"),
    ("snapshotter.host.exchange", "remove"),
    ("snapshotter.host.exchange", "remove_empty"),
    ("snapshotter.host.mirror", "Mirror.update"),
    ("snapshotter.host.mirror", "Mirror.finish"),
    ("snapshotter.host.mounts", "mount"),
    ("snapshotter.host.mounts", "unmount"),
    ("snapshotter.host.service", "Commands.stop"),
    ("snapshotter.host.service", "Commands.start"),
    ("snapshotter.nodes.sign_state", "carry_higher"),
    ("snapshotter.nodes.identity", "carry"),
    ("providers.btrfs", "BtrfsProvider.attach"),
    ("providers.btrfs", "BtrfsProvider.detach"),
    ("providers.btrfs", "BtrfsProvider.swap"),
    ("providers.btrfs", "BtrfsProvider.swap_back"),
    ("providers.btrfs", "BtrfsProvider.swap_commit"),
    ("providers.btrfs.swaps", "exchange"),
    ("providers.copy", "CopyProvider.attach"),
    ("providers.copy", "CopyProvider.detach"),
)


#: Of these, what the kernel says when the disk is full comes as it is.
KERNEL = {"forward", "back", "move", "_swap", "remove", "Mirror.update", "Mirror.finish"}


def run_here(
    command: Command,
    *words: str,
    kill_at: int | None = None,
    fail_at: int | None = None,
    before: Callable[[], None] | None = None,
) -> tuple[int, str, list[str]]:
    """The command in a fork of this process: no interpreter has to start. Returns its exit code (negative: the signal),
    what it said, and the names of the calls, in order; with `kill_at`, SIGKILL comes at the end of so many; with
    `fail_at`, that one finds the disk full. `before` is called in the fork first: what it patches is gone with it."""
    said = command.home / "said"
    calls = command.home / "calls"
    calls.write_text("")
    for module in {module for module, _ in CALLS} | {
        "snapshotter.cli.restoring",
        "snapshotter.cli.sets",
        "snapshotter.human",
        "snapshotter.verbs.in_place",
    }:
        importlib.import_module(module)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            for number in (1, 2):
                os.dup2(fd, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            os.environ["SNAPSHOTTER_RUN"] = str(command.home / "run")
            watch_calls(os.open(calls, os.O_WRONLY | os.O_APPEND), kill_at, fail_at)
            # Nobody here answers an RPC: its service is all that is watched.
            health._WATCHED_S, health._PAUSE_S = 0.1, 0.05
            if before is not None:
                before()
            from snapshotter import cli

            code = cli.run([*words, "--config", str(command.config)])
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(), calls.read_text().split()


def ok(node: Story, *words: str, code: int = 0, before: Callable[[], None] | None = None) -> dict[str, Any]:
    """The command's document, or, for another exit code, its error: always one line for a person."""
    ended, said, _ = run_here(node.command, *words, "--json", before=before)
    assert ended == code, f"{words}: exit {ended}\n{said}"
    assert "Traceback" not in said
    document: dict[str, Any] = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    if code:
        assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1, said
        return dict(document["error"])
    return document


def journals(node: Story) -> list[Path]:
    """Of the restores that are open, or wait to be discarded. (An empty one was not begun.)"""
    restores = node.command.home / "state" / "restores"
    return [path for path in restores.iterdir() if path.stat().st_size] if restores.exists() else []


def point(calls: list[str], event: str, number: int = 1) -> int:
    """The place among the calls of the `number`th such event, for `kill_at`."""
    return [place for place, name in enumerate(calls, 1) if name == event][number - 1]


def watch_calls(log: int, kill_at: int | None, fail_at: int | None = None) -> None:
    count = 0

    def event(name: str) -> None:
        nonlocal count
        os.write(log, f"{name}\n".encode())
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if count == fail_at:
            if name.removeprefix("before-") in KERNEL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise StorageError("the disk is full")  # drivers, commands and the journal translate it

    def wrapped(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **rest: Any) -> Any:
            event(f"before-{name}")
            result = function(*args, **rest)
            event(f"after-{name}")
            return result

        return call

    for module, name in CALLS:
        owner: Any = sys.modules[module]
        *above, last = name.split(".")
        for part in above:
            owner = getattr(owner, part)
        function = getattr(owner, last)
        setattr(owner, last, wrapped(name, function))
        if not above:  # who has imported it by name
            for other in list(sys.modules.values()):
                if getattr(other, "__name__", "").startswith(("snapshotter.", "providers.")):
                    for key, value in list(vars(other).items()):
                        if value is function:
                            setattr(other, key, getattr(owner, last))


def until(condition: Any, what: str, seconds: float = 20) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.02)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
