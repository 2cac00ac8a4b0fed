"""MemoryProvider under the whole contract, and what is its own: pending, invalid, offline, full, busy stores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from snapshotter.core.errors import PreconditionError, QuiesceError, StorageError
from snapshotter.core.labels import MAX_RECORD_BYTES, encode_birth, pack
from snapshotter.core.model import Access, Hold, ImageState, Snapshot, Volume, new_attachment_id, utc_now
from snapshotter.host.mounts import mount_of
from snapshotter.provider import Provider, Settings
from snapshotter.testing import Harness, MemoryProvider, MemoryStore, describe, make_birth
from snapshotter.testing.conformance import ProviderConformance, ready, take
from snapshotter.testing.harness import fill
from snapshotter.testing.memory import STRICT


class MemoryHarness(Harness):
    persistent = False

    def __init__(self, tmp: Path, atomic: bool = True) -> None:
        self.tmp = tmp
        self.store = MemoryStore()
        self.atomic = atomic
        self.made = 0

    def provider(self) -> Provider:
        return MemoryProvider(Settings(state=str(self.tmp / "state")), self.store, atomic=self.atomic)

    def _new(self, kind: str) -> str:
        self.made += 1
        return str(self.tmp / f"{kind}-{self.made}")

    def volume(self) -> Volume:
        path = self._new("volume")
        os.mkdir(path)
        return self.store.add_volume(path)

    def destination(self) -> str:
        return self._new("destination")

    def foreign(self, volume: Volume) -> Callable[[], bool]:
        self.made += 1
        ours = next(
            (name for name in self.store.objects if name not in self.store.foreign), "s20261122t100630z-5f3a9c-0"
        )
        record = pack(make_birth([volume]), STRICT)
        mine = {
            f"{ours}-{self.made}": {"owner": "another-tool", "birth": "1970-01-01"},
            f"s20261122t100630z-5f3a9c-{self.made}": {},
            f"cut-{self.made}": {key: value for key, value in record.items() if key != "birth0"},
            f"newer-{self.made}": {"birth": encode_birth(make_birth([volume])).replace('"v":1', '"v":9')},
        }
        for name, labels in mine.items():
            self.store.add_foreign(name, labels)
        return lambda: {name: self.store.objects[name].labels for name in self.store.foreign if name in mine} == mine

    def objects(self) -> set[str]:
        kept = {f"object {name}" for name in self.store.objects}
        kept |= {f"attachment {name}" for name in self.store.attachments}
        kept |= {f"swap {name}" for name in self.store.swaps}
        return kept | {name for name in os.listdir(self.tmp) if name != "state"}

    def damage(self, snapshot: Snapshot) -> bool:
        self.store.invalidate(snapshot.birth.set_id, snapshot.birth.member)
        return True


class TestMemory(ProviderConformance):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[Harness]:
        yield MemoryHarness(tmp_path)


class TestMemoryOneByOne(ProviderConformance):
    """The same with volumes that are several instants, and snapshots that take their time."""

    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[Harness]:
        harness = MemoryHarness(tmp_path, atomic=False)
        harness.store.upload_polls = 2
        yield harness


@pytest.fixture
def harness(tmp_path: Path) -> MemoryHarness:
    return MemoryHarness(tmp_path)


@pytest.fixture
def volume(harness: MemoryHarness) -> Volume:
    volume = harness.volume()
    assert volume.path
    fill(volume.path)
    return volume


def test_a_snapshot_is_pending_as_long_as_the_store_says(harness: MemoryHarness, volume: Volume) -> None:
    harness.store.upload_polls = 2
    birth = take(harness.provider(), harness, [volume])
    states = [next(harness.provider().snapshots(birth.set_id)).state for _ in range(4)]
    assert states == [ImageState.PENDING, ImageState.PENDING, ImageState.READY, ImageState.READY]


def test_a_pending_snapshot_cannot_be_attached(harness: MemoryHarness, volume: Volume) -> None:
    harness.store.upload_polls = 2
    provider = harness.provider()
    birth = take(provider, harness, [volume])
    found = next(provider.snapshots(birth.set_id))
    destination = harness.destination()
    with pytest.raises(StorageError, match="still copies"):
        provider.attach(found, new_attachment_id(utc_now()), Access.WRITABLE, destination)
    assert not os.path.exists(destination) and not list(provider.attachments())


def test_the_strict_store_takes_the_longest_record_in_chunks(harness: MemoryHarness, volume: Volume) -> None:
    birth = make_birth([volume], node="n")
    birth = replace(birth, node="n" * (1 + MAX_RECORD_BYTES - len(encode_birth(birth))))
    assert len(encode_birth(birth)) == MAX_RECORD_BYTES
    take(harness.provider(), harness, [volume], birth)
    (stored,) = harness.store.objects.values()
    assert len(stored.labels) > 1 and all(len(value) <= 256 for value in stored.labels.values())
    assert next(harness.provider().snapshots()).birth == birth


def test_a_crash_ends_the_hold_of_attachments(harness: MemoryHarness, volume: Volume) -> None:
    birth = take(harness.provider(), harness, [volume])
    (found,) = ready(harness.provider(), harness, birth.set_id)
    harness.provider().attach(found, "a20261122t100630z-5f3a9c", Access.WRITABLE, harness.destination())
    assert next(harness.provider().attachments()).held
    harness.store.crash()
    assert not next(harness.provider().attachments()).held
    harness.provider().detach("a20261122t100630z-5f3a9c")
    assert not list(harness.provider().attachments())


def test_offline_is_an_error_of_every_call(harness: MemoryHarness, volume: Volume) -> None:
    harness.store.offline = "the cable is out"
    provider = harness.provider()
    assert provider.availability()
    for call in (
        lambda: list(provider.snapshots()),
        lambda: list(provider.attachments()),
        lambda: provider.delete("s20261122t100630z-5f3a9c"),
        lambda: take(provider, harness, [volume]),
    ):
        with pytest.raises(StorageError, match="cable"):
            call()


def test_a_full_store_takes_no_part_of_a_set(harness: MemoryHarness, volume: Volume) -> None:
    second = harness.volume()
    assert second.path
    fill(second.path)
    harness.store.capacity_bytes = 400_000  # one of the two
    birth = make_birth([volume, second])
    with pytest.raises(PreconditionError):
        harness.provider().check([volume, second], birth)
    with pytest.raises(StorageError, match="full"):
        harness.provider().create([volume, second], birth, Hold())
    assert not harness.store.objects
    harness.provider().create([volume], make_birth([volume]), Hold())


def test_a_deadline_that_passes_voids_the_create(harness: MemoryHarness, volume: Volume) -> None:
    assert volume.path
    path, stop = os.path.join(volume.path, "busy"), threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with open(path, "wb") as file:
                file.write(b"%d" % number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(QuiesceError):
            for _ in range(1000):  # a quick one may slip through between two writes
                harness.provider().create([volume], make_birth([volume]), Hold(deadline=time.monotonic() - 1))
    finally:
        stop.set()
        writer.join()


def test_claims_only_its_own_volumes(harness: MemoryHarness, volume: Volume) -> None:
    assert volume.path
    here = mount_of(volume.path)
    assert harness.provider().claim(here, volume.path) == volume
    assert harness.provider().claim(here, os.path.join(volume.path, "database")) == volume
    assert harness.provider().claim(here, volume.path + "-other") is None


def test_a_half_written_clone_is_removed_by_detach(harness: MemoryHarness, volume: Volume) -> None:
    birth = take(harness.provider(), harness, [volume])
    (stored,) = harness.store.objects.values()
    stored.image["database/bad\0name"] = stored.image["database/CURRENT"]
    (found,) = harness.provider().snapshots(birth.set_id)
    destination = harness.destination()
    with pytest.raises((StorageError, ValueError)):
        harness.provider().attach(found, "a20261122t100630z-5f3a9c", Access.WRITABLE, destination)
    (listed,) = harness.provider().attachments()
    assert listed.path == destination and os.path.isdir(destination)
    harness.provider().detach(listed.id)
    assert not os.path.exists(destination)
    assert describe(volume.path or "")
