"""A btrfs on loop devices of its own, as the tests of the btrfs provider use it. Undone here, also after a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from providers.btrfs import BtrfsProvider
from snapshotter.core.model import Snapshot, Volume
from snapshotter.host import btrfs
from snapshotter.host.mounts import mount_of
from snapshotter.provider import Settings
from snapshotter.testing.harness import Harness
from tests.support import loop_file_system


def command(*words: str) -> str:
    """The `btrfs` command: what another tool, or an operator, sees and does."""
    return subprocess.run(["btrfs", *words], check=True, capture_output=True, text=True).stdout


class ProviderOf(BtrfsProvider):
    """Sees one file system of those that are mounted here: other tests, and the machine's owner, have theirs."""

    def __init__(self, settings: Settings, point: Path) -> None:
        super().__init__(settings)
        self.point = point

    def _file_systems(self) -> list[btrfs.FileSystem]:
        device = mount_of(str(self.point)).device
        return [fs for fs in super()._file_systems() if fs.mount.device == device]


class OfSeveral(BtrfsProvider):
    """Sees the file systems that are mounted at these points, in this order."""

    points: tuple[Path, ...] = ()

    def _file_systems(self) -> list[btrfs.FileSystem]:
        here = {fs.mount.device: fs for fs in super()._file_systems()}
        return [here[mount_of(str(point)).device] for point in self.points]


class BtrfsHarness(Harness):
    """`point` is where the top level is mounted."""

    def __init__(self, point: Path, scratch: Path) -> None:
        self.point = point
        self.scratch = scratch
        self.store = point / btrfs.STORE
        self._made = 0
        self._origins: set[str] = set()

    def _number(self) -> int:
        self._made += 1
        return self._made

    def provider(self) -> BtrfsProvider:
        return ProviderOf(Settings(str(self.scratch / "state"), floor=0.0), self.point)

    def volume(self) -> Volume:
        return self.subvolume(f"data-{self._number()}")

    def subvolume(self, name: str) -> Volume:
        """A new subvolume at this path from the top level, as an origin."""
        path = str(self.point / name)
        command("subvolume", "create", path)
        self._origins.add(name)
        return self.claimed(path)

    @contextmanager
    def mounted(self, *options: str) -> Iterator[Path]:
        """The file system mounted once more."""
        where = self.scratch / f"mount-{self._number()}"
        where.mkdir()
        source = mount_of(str(self.point)).source
        subprocess.run(["mount", "-o", ",".join(options), source, str(where)], check=True)
        try:
            yield where
        finally:
            subprocess.run(["umount", str(where)], capture_output=True)

    def claimed(self, path: str) -> Volume:
        claimed = self.provider().claim(mount_of(path), path)
        assert claimed is not None
        return claimed

    def foreign(self, volume: Volume) -> Callable[[], bool]:
        """As snapper (a subvolume beside, with snapshots in it), as btrbk (beside, by date), and with our own names and
        records in the wrong place or form."""
        assert volume.path is not None
        self.provider().reap()
        number = self._number()
        theirs = [self.point / f"snapper-{number}" / "1" / "snapshot", self.point / f"btrbk-{number}.20261122T1006"]
        command("subvolume", "create", str(self.point / f"snapper-{number}"))
        if self.store.is_dir():
            theirs += [
                self.store / "sets" / f"s20261122t100630z-5f3a9{number % 10}",
                self.store / "sets" / f"s20261122t100630z-5f3a9c.bak{number}",
                self.store / f"s20261122t100630z-{number:06}",
            ]
        for path in theirs:
            path.parent.mkdir(exist_ok=True)
            command("subvolume", "snapshot", "-r", volume.path, str(path))
        before = [command("subvolume", "show", str(path)) for path in theirs]
        return lambda: [command("subvolume", "show", str(path)) for path in theirs] == before

    def destination(self) -> str:
        return str(self.scratch / f"attached-{self._number()}")

    def objects(self) -> set[str]:
        found = {line.split(" path ", 1)[1] for line in command("subvolume", "list", str(self.point)).splitlines()}
        found -= {btrfs.STORE, *self._origins}
        if self.store.is_dir():
            found |= {str(path) for kind in self.store.iterdir() for path in kind.iterdir()}
        return found | {name for name in os.listdir(self.scratch) if name.startswith("attached-")}

    def damage(self, snapshot: Snapshot) -> bool:
        command("subvolume", "delete", str(self.store / "sets" / snapshot.birth.set_id / str(snapshot.birth.member)))
        return True


@contextmanager
def btrfs_harness(megabytes: int = 600, options: str = "") -> Iterator[BtrfsHarness]:
    """The paths are short, because a set of two must have room for both in its record."""
    scratch = Path(tempfile.mkdtemp(prefix="b-"))
    try:
        with loop_file_system("btrfs", scratch, megabytes, options) as point:
            yield BtrfsHarness(point, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
