"""The provider contract, held against `copy` on this machine's file system."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from providers.copy import CopyProvider
from snapshotter.core.model import Snapshot, Volume
from snapshotter.provider import Settings
from snapshotter.testing.conformance import ProviderConformance
from snapshotter.testing.harness import Harness


class CopyHarness(Harness):
    def __init__(self, top: Path) -> None:
        self.top = top
        self.store = top / "store"
        self._made = 0

    def provider(self) -> CopyProvider:
        return CopyProvider(Settings(str(self.top / "state"), options={"store": str(self.store)}, floor=0.0))

    def volume(self) -> Volume:
        self._made += 1
        path = self.top / f"data-{self._made}"
        path.mkdir()
        return Volume("copy", str(path), str(path), "ext4")

    def foreign(self, volume: Volume) -> Callable[[], bool]:
        theirs = self.store / "sets" / "s20261122t100630z-5f3a9c.bak"
        theirs.mkdir(parents=True, exist_ok=True)
        (theirs / "tree").write_bytes(b"theirs")
        return lambda: (theirs / "tree").read_bytes() == b"theirs"

    def destination(self) -> str:
        self._made += 1
        return str(self.top / f"attached-{self._made}")

    def objects(self) -> set[str]:
        found = {f"{kind}/{name}" for kind in ("sets", "trash", "attachments") for name in self._names(kind)}
        return found | {name for name in os.listdir(self.top) if name.startswith("attached-")}

    def _names(self, kind: str) -> list[str]:
        return os.listdir(self.store / kind) if (self.store / kind).is_dir() else []

    def damage(self, snapshot: Snapshot) -> bool:
        shutil.rmtree(self.store / "sets" / snapshot.birth.set_id / str(snapshot.birth.member) / "tree")
        return True


class TestCopy(ProviderConformance):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[CopyHarness]:
        yield CopyHarness(tmp_path)
