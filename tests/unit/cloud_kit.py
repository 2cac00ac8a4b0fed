"""What the kits of both clouds share: a twin's instance, whose file systems lie on loop devices of this machine and are
mounted below a scratch directory. Undone here, also after a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from snapshotter.core.model import Hold, Snapshot, Volume
from snapshotter.core.remote import Clock
from snapshotter.host import mounts
from snapshotter.provider import Settings
from snapshotter.testing.harness import Harness
from tests.twins.knobs import Clock as TwinClock
from tests.unit.cloud_command import DisksHere


class QuickClock(Clock):
    """Waits for a moment where the provider waits for long, and the twin's time goes on as if it had been long."""

    def __init__(self, twin: TwinClock) -> None:
        self.twin = twin
        self.skipped = 0.0

    def now(self) -> float:
        return time.monotonic() + self.skipped

    def wall(self) -> float:
        return self.twin.now()

    def sleep(self, seconds: float) -> None:
        moment = min(seconds, 0.02)
        time.sleep(moment)
        self.skipped += seconds - moment
        self.twin.advance(seconds - moment)


class Remounting:
    """Mixed into a provider: unmounts what is to be swapped and mounts what a swap leaves, as the core does."""

    harness: CloudHarness

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        with self.harness.unmounted():
            super().swap(swap_id, snapshot, volume)  # type: ignore[misc]

    def swap_back(self, swap_id: str) -> None:
        with self.harness.unmounted():
            super().swap_back(swap_id)  # type: ignore[misc]


class CloudHarness(Harness):
    """One instance of a twin (`twin`, `disks`, `instance` are the cloud's)."""

    PROVIDER: Any  # with `Remounting`
    origins: set[str]  # what was there before us

    def __init__(self, twin: Any, disks: Any, scratch: Path, kind: str) -> None:
        self.twin, self.disks, self.scratch, self.kind = twin, disks, scratch, kind
        self.clock = QuickClock(twin.clock)
        self.points: dict[Path, str] = {}  # mount point -> the device's name in the cloud
        self._made = 0

    def _device(self, name: str) -> str | None:
        """The disk here that the cloud has attached under this name; None if there is none."""
        raise NotImplementedError

    def provider(self, **options: object) -> Any:
        provider = self.PROVIDER(Settings(str(self.scratch / "state"), options=options, floor=0.0))
        provider.disks = DisksHere(by_id=str(self.disks.by_id), maker=self.PROVIDER.VENDOR)
        provider.clock = self.clock
        provider.harness = self
        return provider

    def formatted(self, devices: list[str], name: str) -> Volume:
        """A file system on these, mounted. `name`: of the first, in the cloud."""
        lazy = ["-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", "-I", "256"]
        how = lazy if self.kind == "ext4" else []
        subprocess.run([f"mkfs.{self.kind}", "-q", *how, *devices], check=True, capture_output=True)
        point = self.scratch / f"m{self._made}"
        point.mkdir()
        together = [word for other in devices[1:] for word in ("-o", f"device={other}")]
        subprocess.run(["mount", *together, devices[0], str(point)], check=True)
        self.points[point] = name
        return self.claimed(point)

    def claimed(self, point: Path) -> Volume:
        claimed: Volume | None = self.provider().claim(mounts.mount_of(str(point)), str(point))
        assert claimed is not None
        return claimed

    def abandoned(self, devices: list[str]) -> None:
        """Nothing of these is mounted any more, and the kernel forgets them, as on a machine that never had them."""
        for point in self.points:
            mounts.unmount(os.path.realpath(point))
        self.points.clear()
        for device in devices:
            subprocess.run(["btrfs", "device", "scan", "--forget", device], capture_output=True)

    @contextmanager
    def unmounted(self) -> Iterator[None]:
        def mounted(point: Path) -> bool:
            return mounts.is_mount_point(os.path.realpath(point))

        for point in self.points:
            if mounted(point):
                mounts.unmount(os.path.realpath(point))
        try:
            yield
        finally:
            for point, name in self.points.items():
                if (device := self._device(name)) is not None and not mounted(point):
                    subprocess.run(["mount", device, str(point)], check=True)

    def hold(self) -> Hold:
        """The suite writes nothing meanwhile: what a freeze would write out is to be on the disk, that is all."""
        for point in self.points:
            subprocess.run(["sync", "-f", str(point)], check=True)
        return Hold()

    def destination(self) -> str:
        self._made += 1
        return str(self.scratch / f"attached-{self._made}")

    def destinations(self) -> set[str]:
        return {name for name in os.listdir(self.scratch) if name.startswith("attached-")}

    def close(self) -> None:
        for point in reversed(self.points):
            subprocess.run(["umount", str(point)], capture_output=True)


@contextmanager
def scratch_directory(prefix: str) -> Iterator[Path]:
    """Its path is short, because a set of two must have room for both in its record."""
    scratch = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def closing(harness: CloudHarness) -> Iterator[Any]:
    try:
        yield harness
    finally:
        harness.close()
