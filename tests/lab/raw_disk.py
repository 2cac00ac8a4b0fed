"""A provider for tests: a raw disk as stand-in for a cloud's. Its snapshot is a copy of the disk's own bytes, read past
every cache, as a cloud sees them: whoever doesn't freeze the file system gets what happens to be on the disk. Put in by
an entry point, as a third party's is. It only takes, lists and deletes."""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from snapshotter.core.labels import LabelLimits, apply_marks, pack, unpack
from snapshotter.core.model import (
    Access,
    Attachment,
    Birth,
    Hold,
    ImageState,
    MountSpec,
    Purpose,
    Quiesce,
    Snapshot,
    Space,
    Tree,
    Volume,
)
from snapshotter.host.mounts import Mount
from snapshotter.provider import Option, Provider, Traits

CHUNK = 1 << 20


class RawDisk(Provider):
    name: ClassVar[str] = "rawdisk"
    traits: ClassVar[Traits] = Traits(
        atomic_across_volumes=True,  # as a cloud's multi-volume snapshot; the freeze makes it true here
        quiesce=Quiesce.FREEZE,
        writable_clone=False,
        swaps=False,
        needs_host=True,
        limits=LabelLimits(max_value=2000, max_chunks=1),
    )
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "store": Option(str, "directory of the images"),
        "bytes": Option(int, "so much of each disk is read"),
        "slow": Option(float, "seconds that a snapshot takes on top"),
    }

    @property
    def _store(self) -> Path:
        return Path(str(self.settings.options["store"]))

    def availability(self) -> list[str]:
        return []

    def claim(self, mount: Mount, path: str) -> Volume | None:
        if "store" not in self.settings.options or not mount.source.startswith("/dev/nvme"):
            return None
        return Volume(self.name, mount.source, mount.path, mount.fstype)

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        self._store.mkdir(exist_ok=True)

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        for member, volume in enumerate(volumes):
            labels = self._labels(birth.set_id, member)
            labels.write_text(json.dumps(pack(birth.of_member(member), self.traits.limits)))
            read_disk(volume.id, labels.with_suffix(".img"), int(str(self.settings.options["bytes"])))
        time.sleep(float(str(self.settings.options.get("slow", 0))))
        return tuple(self.snapshots(birth.set_id))

    def _labels(self, set_id: str, member: int) -> Path:
        return self._store / f"{set_id}-{member}.json"

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        if "store" not in self.settings.options or not self._store.exists():
            return
        for path in sorted(self._store.glob("*.json")):
            labels = json.loads(path.read_text())
            birth = unpack(labels)
            assert birth is not None
            if set_id in (None, birth.set_id):
                marks = {key.removeprefix("mark-"): value for key, value in labels.items() if key.startswith("mark-")}
                yield Snapshot(self.name, path.stem, birth, ImageState.READY, marks)

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        for found in list(self.snapshots(set_id)):
            path = self._labels(set_id, found.birth.member)
            labels = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("mark-")}
            marks = apply_marks(dict(found.marks), changes)
            path.write_text(json.dumps(labels | {f"mark-{key}": value for key, value in marks.items()}))

    def delete(self, set_id: str) -> None:
        for path in self._store.glob(f"{set_id}-*"):
            path.unlink()

    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec | Tree:
        raise NotImplementedError

    def settle(self, attachment_id: str, since: datetime) -> None:
        raise NotImplementedError

    def attachments(self) -> Iterator[Attachment]:
        return iter(())

    def detach(self, attachment_id: str) -> None:
        raise NotImplementedError

    def space(self, volumes: Sequence[Volume]) -> Space:
        return Space(total_bytes=1 << 40, free_bytes=1 << 40, will_pin_bytes=0)


def read_disk(device: str, into: Path, size: int) -> None:
    """The disk's bytes, past the page cache; holes where it has zeros."""
    source = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, CHUNK)  # aligned, as O_DIRECT wants it
        zeros = bytes(CHUNK)
        with open(into, "wb") as file:
            file.truncate(size)
            for offset in range(0, size, CHUNK):
                os.preadv(source, [buffer], offset)
                if buffer[:] != zeros:
                    os.pwrite(file.fileno(), buffer, offset)
    finally:
        os.close(source)
