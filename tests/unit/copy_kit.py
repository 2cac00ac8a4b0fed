"""What the tests of the copy provider share: a place with data, a store, a provider; takes; file systems."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from providers.copy import CopyProvider
from snapshotter.core.model import Access, Birth, Hold, Progress, Snapshot, Volume, new_attachment_id, utc_now
from snapshotter.host import mounts
from snapshotter.provider import Settings
from snapshotter.testing.harness import make_birth
from tests.support import loop_file_system

SEAL = {"sealed": "20261122t100630z", "grade": "filesystem"}


class Place:
    """`top/data` is the volume, `top/store` the store."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.data = top / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        self.store = top / "store"
        self.progress: list[Progress] = []

    def provider(self, *, floor: float = 0.0, **options: object) -> CopyProvider:
        chosen = options or {"store": str(self.store)}
        return CopyProvider(
            Settings(
                str(self.top / "state"),
                options={name: value for name, value in chosen.items() if value},
                paths=(str(self.data),),
                floor=floor,
                report=self.progress.append,
            )
        )

    def volume(self, path: Path | None = None) -> Volume:
        where = str(path or self.data)
        claimed = self.provider().claim(mounts.mount_of(where), where)
        assert claimed is not None
        return claimed

    def take(self, hold: Hold | None = None, *, prepare: bool = True, seal: bool = True) -> Birth:
        """A take as the verb makes it."""
        provider, volume = self.provider(), self.volume()
        birth = make_birth([volume])
        provider.check([volume], birth)
        if prepare:
            provider.prepare([volume], birth, 30.0)
        provider.create([volume], birth, hold or Hold())
        if seal:
            provider.mark(birth.set_id, SEAL)
        return birth

    def image(self, birth: Birth) -> Path:
        return self.store / "sets" / birth.set_id / "0" / "tree"

    def snapshot(self, birth: Birth) -> Snapshot:
        return next(self.provider().snapshots(birth.set_id))

    def clone(self, birth: Birth, name: str = "clone") -> tuple[str, Path]:
        attachment_id, where = new_attachment_id(utc_now()), self.top / name
        self.provider().attach(self.snapshot(birth), attachment_id, Access.WRITABLE, str(where))
        return attachment_id, where

    def kept(self) -> set[str]:
        """Everything in the store that a run may leave behind."""
        found = set()
        for kind in ("sets", "trash", "attachments"):
            if (self.store / kind).is_dir():
                found |= {f"{kind}/{name}" for name in os.listdir(self.store / kind)}
        return found


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that every user can reach: pytest closes its own to others, again at the start of every run."""
    made = tempfile.mkdtemp(prefix="copy-")
    os.chmod(made, 0o755)
    yield Path(made)
    shutil.rmtree(made)


def settle() -> None:
    """Let what was just written become old enough to be told unchanged (two seconds)."""
    time.sleep(2.2)


@contextmanager
def place_on(kind: str, where: Path, megabytes: int = 600) -> Iterator[Place]:
    """A `Place` on a file system of its own, or ("here") on this one."""
    if kind == "here":
        yield Place(where / "here")
    else:
        with loop_file_system(kind, where, megabytes) as top:
            yield Place(top)


def allocated(path: Path) -> int:
    return os.lstat(path).st_blocks * 512


def shared_extents(path: Path) -> bool:
    """Whether any extent of the file is shared with another (FIEMAP's flag, as filefrag shows it)."""
    done = subprocess.run(["filefrag", "-v", str(path)], capture_output=True, text=True, check=True)
    return "shared" in done.stdout
