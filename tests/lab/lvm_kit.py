"""Volume groups of their own for the tests of the lvm provider, on files. Undone here, also after a failure. Looks at
LVM with LVM's own commands, never through the driver."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from providers.lvm import LvmProvider, swaps
from providers.lvm.reports import Row
from snapshotter.core.model import Snapshot, Volume
from snapshotter.host import block, mounts
from snapshotter.provider import Settings
from snapshotter.testing.harness import Harness

MIB = 1 << 20


def has_device_mapper() -> bool:
    with open("/proc/misc", encoding="ascii") as file:
        there = any(line.split()[-1:] == ["device-mapper"] for line in file)
    return there and os.geteuid() == 0 and shutil.which("lvs") is not None


#: For `pytestmark`: these tests run in the lab, or wherever root has a device-mapper.
marks = [
    pytest.mark.lvm,
    pytest.mark.skipif(not has_device_mapper(), reason="needs root, LVM and a kernel with device-mapper: scripts/lab"),
]


def lvm(*words: str, check: bool = True) -> str:
    """LVM's (or another) command, as an operator or another tool runs it."""
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert not check or done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def suspended() -> list[str]:
    return sorted(device.dm_name for device in block.mapped() if device.suspended)


class Storage:
    """A volume group on a disk of its own, with a thin pool where `pool_mb` says so."""

    def __init__(self, vg: str, disk: str) -> None:
        self.vg = vg
        self.disk = disk
        self.pool = f"{vg}/pool"

    def lvs(self, fields: str = "lv_name") -> list[dict[str, str]]:
        said = lvm("lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields, self.vg)
        rows: list[dict[str, str]] = json.loads(said)["report"][0]["lv"]
        return rows

    def attr(self, name: str) -> str:
        return next(row["lv_attr"] for row in self.lvs("lv_name,lv_attr") if row["lv_name"] == name)

    def ours(self) -> list[str]:
        """Names of the volumes with a tag of ours."""
        return sorted(row["lv_name"] for row in self.lvs("lv_name,lv_tags") if "snapshotter." in row["lv_tags"])

    def orphans(self) -> set[str]:
        """Numbers of devices that the thin pool has and LVM knows nothing of, not even that it has to remove them with
        its next command: it would give the number out again, and the pool refuse."""
        pool = f"{self.vg.replace('-', '--')}-pool"
        lvm("dmsetup", "message", f"{pool}-tpool", "0", "reserve_metadata_snap")
        try:
            there = lvm("thin_ls", "-m", "--no-headers", "-o", "DEV", f"/dev/mapper/{pool}_tmeta").split()
        finally:
            lvm("dmsetup", "message", f"{pool}-tpool", "0", "release_metadata_snap")
        with tempfile.NamedTemporaryFile("r") as text:
            lvm("vgcfgbackup", "-qq", "-f", text.name, self.vg)
            # LVM renames another file into its place.
            queued = set(re.findall(r"\bdelete = ([0-9]+)", Path(text.name).read_text()))
        return set(there) - queued - {row["thin_id"] for row in self.lvs("thin_id")}

    def thin(self, name: str, megabytes: int) -> None:
        lvm("lvcreate", "-qq", "-y", "-V", f"{megabytes}m", "-T", self.pool, "-n", name)

    def linear(self, name: str, megabytes: int) -> None:
        lvm("lvcreate", "-qq", "-y", "-Wn", "-L", f"{megabytes}m", "-n", name, self.vg)


@contextlib.contextmanager
def storage(
    megabytes: int = 2000, pool_mb: int = 0, *, metadata_mb: int = 8, vg: str = "", area: str = ""
) -> Iterator[Storage]:
    """`area` is the size of LVM's own metadata area, as pvcreate takes it."""
    scratch = Path(tempfile.mkdtemp(prefix="vg-", dir="/var/tmp"))
    image = scratch / "disk"
    with open(image, "wb") as file:
        file.truncate(megabytes * MIB)
    disk = lvm("losetup", "--find", "--show", "--direct-io=off", str(image)).strip()
    made = Storage(vg or f"t{uuid.uuid4().hex[:5]}", disk)
    try:
        lvm("pvcreate", "-qq", "-y", *(["--metadatasize", area, "--dataalignment", area] if area else []), disk)
        lvm("vgcreate", "-qq", made.vg, disk)
        if pool_mb:
            size = ["-L", f"{pool_mb}m", "--poolmetadatasize", f"{metadata_mb}m"]
            lvm("lvcreate", "-qq", "-y", *size, "-Zn", "--poolmetadataspare", "n", "-T", made.pool)
        yield made
    finally:
        tear_down(made)
        lvm("losetup", "-d", disk, check=False)
        shutil.rmtree(scratch, ignore_errors=True)


def tear_down(made: Storage) -> None:
    for device in block.mapped():
        if device.dm_name.startswith(made.vg.replace("-", "--") + "-") and device.suspended:
            lvm("dmsetup", "resume", device.dm_name, check=False)
    for device in block.mapped():
        if device.dm_name.startswith("snapshotter-"):
            unmount(f"/dev/mapper/{device.dm_name}")
    for device in sorted(block.mapped(), key=lambda each: -len(each.dm_name)):
        if device.dm_name.startswith("snapshotter-"):
            lvm("dmsetup", "remove", "--retry", device.dm_name, check=False)
    unmount(f"/dev/mapper/{made.vg.replace('-', '--')}-")
    lvm("vgremove", "-qq", "-ff", "-y", made.vg, check=False)
    for device in list(block.mapped()):
        if device.dm_name.startswith(made.vg.replace("-", "--") + "-"):
            lvm("dmsetup", "remove", "--force", device.dm_name, check=False)


def unmount(prefix: str) -> None:
    for entry in reversed(mounts.table()):
        if entry.source.startswith(prefix):
            lvm("umount", "-l", entry.path, check=False)


def make_file_system(device: str, kind: str) -> None:
    if kind == "xfs":
        lvm("mkfs.xfs", "-q", "-f", "-K", device)
    else:
        lvm("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", device)


class ProviderOf(LvmProvider):
    """Sees one volume group, and mounts what a swap leaves, as the core would."""

    def __init__(self, settings: Settings, harness: LvmHarness) -> None:
        super().__init__(settings)
        self.harness = harness
        if not harness.thin:
            vars(self)["traits"] = msgspec.structs.replace(self.traits, swaps=False)

    def _rows(self, rows: list[Row]) -> list[Row]:
        return [row for row in rows if row.vg == self.harness.storage.vg]

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        with self.harness.unmounted([volume.id]):
            super().swap(swap_id, snapshot, volume)

    def swap_back(self, swap_id: str) -> None:
        with self.harness.unmounted([swap.volume for swap in swaps.found(self._report()) if swap.id == swap_id]):
            super().swap_back(swap_id)


class LvmHarness(Harness):
    """Volumes of `storage`, thin or linear, each with a file system, mounted below `scratch`."""

    patience_s = 120.0

    def __init__(self, storage: Storage, scratch: Path, thin: bool, kind: str = "ext4") -> None:
        self.storage = storage
        self.scratch = scratch
        self.thin = thin
        self.kind = kind
        self.megabytes = 320 if kind == "xfs" else 80
        self.points: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self.state = scratch / "state"

    def provider(self) -> ProviderOf:
        options = {} if self.thin else {"size": 12 * MIB}
        return ProviderOf(Settings(str(self.state), floor=0.0, options=options), self)

    def volume(self) -> Volume:
        name = f"{'t' if self.thin else 'c'}{next(self._numbers)}"  # two harnesses may share a group
        (self.storage.thin if self.thin else self.storage.linear)(name, self.megabytes)
        make_file_system(f"/dev/{self.storage.vg}/{name}", self.kind)
        point = str(self.scratch / name)
        os.mkdir(point)
        self.points[f"{self.storage.vg}/{name}"] = point
        self.mount_all()
        volume = self.provider().claim(mounts.mount_of(point), point)
        assert volume is not None and volume.id == f"{self.storage.vg}/{name}"
        return volume

    def mount_all(self) -> None:
        for volume, point in self.points.items():
            if not mounts.is_mount_point(point) and os.path.exists(f"/dev/{volume}"):
                lvm("mount", f"/dev/{volume}", point)

    @contextlib.contextmanager
    def unmounted(self, volumes: list[str]) -> Iterator[None]:
        try:
            for volume in volumes:
                mounts.unmount(self.points[volume])
            yield
        finally:
            self.mount_all()

    def destination(self) -> str:
        return str(self.scratch / f"attached-{next(self._numbers)}")

    def foreign(self, volume: Volume) -> Callable[[], bool]:
        """As another tool: named as ours are, tagged with something of its own, or with a damaged record."""
        number = next(self._numbers)
        size = [] if self.thin else ["-L", "4m"]
        names = [f"s20261122t100630z-{number:06}-0", f"theirs{number}"]
        tags = [["--addtag", "backup=1"], ["--addtag", "snapshotter.birth0=eyJ2Ijox"]]
        for name, theirs in zip(names, tags, strict=True):
            lvm("lvcreate", "-qq", "-y", "-s", *size, "-n", name, *theirs, volume.id)

        def seen() -> list[dict[str, str]]:
            rows = self.storage.lvs("lv_name,lv_uuid,lv_tags,lv_size,lv_permissions,origin")
            return [row for row in rows if row["lv_name"] in names]

        before = seen()
        assert len(before) == 2
        return lambda: seen() == before

    def objects(self) -> set[str]:
        """Volumes by name, with what a swap might have left on an origin; devices of ours; and any suspended one."""
        found = set()
        for row in self.storage.lvs("lv_name,lv_tags,lv_skip_activation"):
            origin = f"{self.storage.vg}/{row['lv_name']}" in self.points
            if origin and (row["lv_tags"] or row["lv_skip_activation"]):
                found.add(f"origin {row['lv_name']}: {row['lv_tags']} {row['lv_skip_activation']}")
            elif not origin and row["lv_name"] != "pool":
                found.add(row["lv_name"])
        devices = {device.dm_name for device in block.mapped() if device.dm_name.startswith("snapshotter-")}
        return found | devices | {f"suspended: {name}" for name in suspended()}

    def damage(self, snapshot: Snapshot) -> bool:
        if self.thin:
            lvm("lvchange", "-qq", "-prw", snapshot.id)
        else:
            self.overflow(snapshot)
        return True

    def overflow(self, snapshot: Snapshot) -> None:
        """Write to the origin until its snapshot has no room."""
        path = os.path.join(self.points[snapshot.volume], "overflow")
        name = snapshot.id.partition("/")[2]
        for _ in range(10):
            with open(path, "wb") as file:
                file.write(os.urandom(8 * MIB))
                os.fsync(file.fileno())
            if self.storage.attr(name)[4] in "IS":
                break
        os.unlink(path)

    def clean(self) -> None:
        """Everything of this harness is gone; its storage stays for the next."""
        for device in block.mapped():
            if device.suspended:
                lvm("dmsetup", "resume", device.dm_name, check=False)
        for entry in reversed(mounts.table()):
            if mounts.is_under(entry.path, str(self.scratch)):
                lvm("umount", "-l", entry.path, check=False)
        for device in sorted(block.mapped(), key=lambda each: -len(each.dm_name)):
            if device.dm_name.startswith("snapshotter-"):
                lvm("dmsetup", "remove", "--retry", device.dm_name, check=False)
        gone = not lvm("vgs", "--noheadings", "-o", "vg_name", self.storage.vg, check=False).strip()
        names = [] if gone else [row["lv_name"] for row in self.storage.lvs() if row["lv_name"] != "pool"]
        for _ in range(0 if gone else 3):  # an origin goes with its classic snapshots
            if names:
                lvm("lvremove", "-qq", "-ff", "-y", *(f"{self.storage.vg}/{name}" for name in names), check=False)
            names = [row["lv_name"] for row in self.storage.lvs() if row["lv_name"] != "pool"]
            if not names:
                break
            time.sleep(0.5)
        shutil.rmtree(self.scratch, ignore_errors=True)


@contextlib.contextmanager
def harness_on(made: Storage, thin: bool, kind: str = "ext4") -> Iterator[LvmHarness]:
    """The paths are short, because a set of two must have room for both in its record."""
    harness = LvmHarness(made, Path(tempfile.mkdtemp(prefix="l-")), thin, kind)
    try:
        yield harness
    finally:
        harness.clean()
