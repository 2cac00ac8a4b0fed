"""Pools on sparse files of their own, with random names, as the tests of the ZFS provider use them. Undone here, also
after a failure. In the lab only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from providers.zfs import ZfsProvider
from snapshotter.core.model import Access, Hold, ImageState, Snapshot, Volume, new_attachment_id, utc_now
from snapshotter.host.mounts import mount_of, table
from snapshotter.provider import Settings
from snapshotter.testing.harness import Harness, make_birth

#: The builds of libzfs_core that the lab has, by the directory to import them from; and none.
BUILDS = {"command": "", "openzfs": "/opt/libzfs_core/openzfs", "pypi": "/opt/libzfs_core/pypi"}


def here() -> str:
    """Why there is no ZFS here, '' if there is."""
    if os.geteuid() != 0:
        return "needs root: pools"
    return "" if os.path.isdir("/sys/module/zfs") else "this kernel has no ZFS: scripts/lab runs it"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


def zfs(*words: str) -> str:
    """The `zfs` command: what another tool, or an operator, sees and does."""
    done = run("zfs", *words)
    assert done.returncode == 0, f"zfs {' '.join(words)}: {done.stderr}"
    return done.stdout


def names(top: str, kinds: str = "filesystem,volume,snapshot") -> set[str]:
    return set(zfs("list", "-H", "-r", "-o", "name", "-t", kinds, top).split())


@contextmanager
def build(kind: str) -> Iterator[None]:
    """This process has this build of libzfs_core, already loaded, or none at all."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "libzfs_core"}
    for name in before:
        del sys.modules[name]
    try:
        if kind == "command":
            sys.modules["libzfs_core"] = None  # type: ignore[assignment]  # an import of it fails
        else:
            sys.path.insert(0, BUILDS[kind])
            __import__("libzfs_core")
            sys.path.remove(BUILDS[kind])
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "libzfs_core"]:
            del sys.modules[name]
        sys.modules.update(before)


@contextmanager
def pool(megabytes: int = 512, *options: str, where: str = "/var/tmp") -> Iterator[str]:
    """A pool, mounted below a directory of its own (`mount_of_pool`); destroyed with all that is in it."""
    name = f"t{uuid.uuid4().hex[:6]}"
    base = Path(tempfile.mkdtemp(prefix="z-", dir=where))
    image = base / "disk"
    with open(image, "wb") as file:
        file.truncate(megabytes << 20)
    made = run("zpool", "create", "-O", f"mountpoint={base / 'm'}", *options, name, str(image))
    assert made.returncode == 0, made.stderr
    try:
        yield name
    finally:
        run("zpool", "clear", name)
        for mount in reversed(table()):
            if mount.fstype == "zfs" and mount.source.split("@")[0].split("/")[0] == name:
                run("umount", mount.path)
        for _ in range(20):
            if run("zpool", "destroy", "-f", name).returncode == 0:
                break
            time.sleep(0.5)
        shutil.rmtree(base, ignore_errors=True)


def provider(floor: float = 0.0) -> ZfsProvider:
    return ZfsProvider(Settings("/nonexistent/state", floor=floor))


def claimed(path: str) -> Volume:
    found = provider().claim(mount_of(path), path)
    assert found is not None
    return found


class ZfsHarness(Harness):
    """Works below `top`, a dataset of its own, so that one pool serves many tests."""

    def __init__(self, top: str, scratch: Path) -> None:
        self.top = top
        self.scratch = scratch
        self._made = 0
        self._origins: set[str] = {top}

    def _number(self) -> int:
        self._made += 1
        return self._made

    def provider(self) -> ZfsProvider:
        return provider()

    def volume(self) -> Volume:
        return self.dataset(f"d{self._number()}")

    def dataset(self, name: str, *options: str) -> Volume:
        full = f"{self.top}/{name}"
        zfs("create", "-o", "acltype=posixacl", *options, full)
        self._origins.add(full)
        return claimed(next(mount.path for mount in table() if mount.source == full))

    def foreign(self, volume: Volume) -> Callable[[], bool]:
        """Snapshots as other tools make them, one with our form of name; one of a clone that has our properties by
        inheritance, and names of ours with other values."""
        number = self._number()
        theirs = [
            f"{volume.id}@autosnap_2026-11-22_10:06:{number:02}_daily",
            f"{volume.id}@s20261122t100630z-5f3a{number:02x}-0",
        ]
        for name in theirs:
            zfs("snapshot", "-o", "other:birth={}", name)
        guids = [zfs("get", "-Hp", "-o", "value", "guid,creation,userrefs", name) for name in theirs]
        self._origins |= set(theirs)
        return lambda: [zfs("get", "-Hp", "-o", "value", "guid,creation,userrefs", name) for name in theirs] == guids

    def destination(self) -> str:
        return str(self.scratch / f"attached-{self._number()}")

    def objects(self) -> set[str]:
        """Names; with them what a swap may leave set on an origin, and what is mounted."""
        words = ["-t", "filesystem,volume,snapshot", "-s", "local,none", "-o", "name,property,value"]
        props = "type,canmount,userrefs,snapshotter:aside,snapshotter:swap,snapshotter:kept,snapshotter:mounts"
        found = set()
        for line in zfs("get", "-Hpr", *words, props, self.top).splitlines():
            name, prop, value = line.split("\t")
            if prop == "type":
                found |= {name} - self._origins
            elif value not in ("-", "0", "on"):
                found.add(f"{name} {prop}={value}")
        found |= {f"{m.source} at {m.path}" for m in table() if m.source.startswith(self.top + "/")}
        return found | {name for name in os.listdir(self.scratch) if name.startswith("attached-")}

    def damage(self, snapshot: Snapshot) -> bool:
        """Another tool destroys it (`-d`) while something still needs it, so that its label stays to be seen."""
        self.provider().mark(snapshot.birth.set_id, {"pinned": "1"})
        zfs("destroy", "-d", snapshot.id)
        return True


@contextmanager
def zfs_harness(pool_name: str) -> Iterator[ZfsHarness]:
    """The names are short, because a set of two must have room for both paths in its record."""
    top = f"{pool_name}/h{uuid.uuid4().hex[:4]}"
    scratch = Path(tempfile.mkdtemp(prefix="zs-", dir="/var/tmp"))
    zfs("create", top)
    try:
        yield ZfsHarness(top, scratch)
    finally:
        for mount in reversed(table()):
            if mount.fstype == "zfs" and mount.source.startswith((top + "/", top + "@")):
                run("umount", mount.path)
        for line in run("zfs", "list", "-H", "-o", "name,userrefs", "-t", "snapshot", "-r", top).stdout.splitlines():
            name, held = line.split("\t")
            if held != "0":
                for hold in run("zfs", "holds", "-H", name).stdout.splitlines():
                    run("zfs", "release", hold.split("\t")[1], name)
        run("zfs", "destroy", "-R", top)
        shutil.rmtree(scratch, ignore_errors=True)


def content_at(snapshot: Snapshot, relative: str, scratch: Path) -> bytes:
    """A file of an image, seen through a read-only attachment that is ended again."""
    attachment_id = new_attachment_id(utc_now())
    where = str(scratch / attachment_id)
    made = provider().attach(snapshot, attachment_id, Access.READ_ONLY, where)
    harness = ZfsHarness("", scratch)
    path = harness.enter(made, where)
    try:
        with open(os.path.join(path, relative), "rb") as file:
            return file.read()
    finally:
        harness.leave(where)
        provider().detach(attachment_id)


def path_of(volume: Volume, name: str = "file") -> str:
    assert volume.path is not None
    return os.path.join(volume.path, name)


def write(volume: Volume, text: str) -> None:
    with open(path_of(volume), "w") as file:
        file.write(text)


def read(volume: Volume) -> str:
    with open(path_of(volume)) as file:
        return file.read()


def take(volume: Volume, text: str) -> str:
    write(volume, text)
    birth = make_birth([volume])
    provider().create([volume], birth, Hold(marks={"sealed": "20261122t100630z", "grade": "filesystem"}))
    return birth.set_id


def image(set_id: str) -> Snapshot:
    (found,) = provider().snapshots(set_id)
    return found


def holds(harness: ZfsHarness, sets: dict[str, str]) -> None:
    """All these sets are there, and hold what they held."""
    listed = {found.birth.set_id: found for found in provider().snapshots()}
    assert set(listed) == set(sets)
    for set_id, text in sets.items():
        assert listed[set_id].state is ImageState.READY and listed[set_id].marks["sealed"]
        assert content_at(listed[set_id], "file", harness.scratch) == text.encode()


@contextmanager
def losable_pool(megabytes: int = 128) -> Iterator[tuple[str, Callable[[], None]]]:
    """A pool whose only device can be lost: (name, lose). At the end the device is back, and the pool destroyed."""
    base = Path(tempfile.mkdtemp(prefix="z-", dir="/var/tmp"))
    name = f"t{uuid.uuid4().hex[:6]}"
    with open(base / "disk", "wb") as file:
        file.truncate(megabytes << 20)
    loop = run("losetup", "--find", "--show", str(base / "disk")).stdout.strip()
    sectors = megabytes * 2048

    def table_of(line: str) -> None:
        for words in (["load", name, "--table", line], ["resume", "--noudevsync", name]):
            done = run("dmsetup", *words)
            assert done.returncode == 0, done.stderr

    def lose() -> None:
        """Returns when the pool has noticed."""
        table_of(f"0 {sectors} error")
        (base / "m" / "unwritable").parent.mkdir(exist_ok=True)
        writer = subprocess.Popen(["dd", "if=/dev/zero", f"of={base / 'm'}/lost", "bs=1M", "count=8", "conv=fsync"])
        writers.append(writer)
        state = Path("/proc/spl/kstat/zfs", name, "state")
        give_up = time.monotonic() + 120
        while state.read_text().strip() != "SUSPENDED":
            assert time.monotonic() < give_up, "the pool doesn't notice that its device is gone"
            time.sleep(0.2)

    writers: list[subprocess.Popen[bytes]] = []
    made = run("dmsetup", "create", name, "--table", f"0 {sectors} linear {loop} 0")
    assert made.returncode == 0, made.stderr
    try:
        made = run("zpool", "create", "-O", f"mountpoint={base / 'm'}", name, f"/dev/mapper/{name}")
        assert made.returncode == 0, made.stderr
        try:
            yield name, lose
        finally:
            table_of(f"0 {sectors} linear {loop} 0")
            run("zpool", "clear", name)
            for writer in writers:
                writer.wait(120)
            for mount in reversed(table()):
                if mount.fstype == "zfs" and mount.source.split("@")[0].split("/")[0] == name:
                    run("umount", mount.path)
            for _ in range(20):
                if run("zpool", "destroy", "-f", name).returncode == 0:
                    break
                time.sleep(0.5)
    finally:
        run("dmsetup", "remove", "--retry", name)
        run("losetup", "-d", loop)
        shutil.rmtree(base, ignore_errors=True)
