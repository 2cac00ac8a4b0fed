"""Does the suite see what it is for? Drivers with one known fault each, and the test that must fail for it.

The faults are those that other tools were known for, or that a driver's author would make first.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from snapshotter.core.errors import BusyError, NotFoundError
from snapshotter.core.labels import pack, unpack
from snapshotter.core.model import (
    Access,
    Attachment,
    Birth,
    Hold,
    ImageState,
    MountSpec,
    Purpose,
    Snapshot,
    Tree,
    Volume,
)
from snapshotter.provider import Provider, Settings
from snapshotter.testing import MemoryProvider
from snapshotter.testing.conformance import ProviderConformance
from snapshotter.testing.harness import fill
from snapshotter.testing.images import read_tree, remove
from snapshotter.testing.memory import STRICT, StoredObject
from tests.conformance.test_memory import MemoryHarness


class ListsByName(MemoryProvider):
    """Takes other tools' objects for its own where the name fits."""

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        yield from super().snapshots(set_id)
        ours = next(iter(super().snapshots()), None)
        for name in self.store.foreign:
            if name.startswith("s2") and ours is not None:
                yield replace(ours, id=name)


class DeletesByPrefix(MemoryProvider):
    def delete(self, set_id: str) -> None:
        super().delete(set_id)
        for name in [name for name in self.store.objects if name.startswith(set_id)]:
            del self.store.objects[name]


class DeleteMinds(MemoryProvider):
    """Absent isn't done."""

    def delete(self, set_id: str) -> None:
        if not self._ours(set_id):
            raise NotFoundError("no such set", object=set_id)
        super().delete(set_id)


class LeaksOnFailure(MemoryProvider):
    """Creates one by one and leaves what it made when the next fails (barman)."""

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        for member, volume in enumerate(volumes):
            top = self._top(volume)
            assert top
            self.store.objects[f"{birth.set_id}-{member}"] = StoredObject({}, pack(birth.of_member(member), STRICT), 1)
        for member in range(len(volumes)):
            del self.store.objects[f"{birth.set_id}-{member}"]
        return super().create(volumes, birth, hold)


class CreatesOver(MemoryProvider):
    """The second create of an id replaces the first."""

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        super().delete(birth.set_id)
        return super().create(volumes, birth, hold)


class SharesFiles(MemoryProvider):
    """A clone for a person is the store's own bytes (hard links)."""

    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec | Tree:
        shared = f"{self.store.volumes['m1']}.shared"
        if not os.path.exists(shared):
            super().attach(snapshot, "a20000101t000000z-000000", access, shared)
            for (name, _), record in list(self.store.attachments.items()):
                if name == "a20000101t000000z-000000":
                    os.close(record.fd)
                    del self.store.attachments[(name, 0)]
        made = super().attach(snapshot, attachment_id, access, destination, purpose)
        shutil.copytree(shared, destination, copy_function=_relink, dirs_exist_ok=True)
        return made


def _relink(source: str, target: str) -> None:
    os.unlink(target)
    os.link(source, target)


class NeverBusy(MemoryProvider):
    def delete(self, set_id: str) -> None:
        for name in self._ours(set_id):
            del self.store.objects[name]


class DetachRemovesThePlace(MemoryProvider):
    """Removes whatever is at the path now."""

    def detach(self, attachment_id: str) -> None:
        places = [found.path for found in self.attachments() if found.id == attachment_id]
        super().detach(attachment_id)
        for place in places:
            remove(place)


class DetachForgets(MemoryProvider):
    """Ends the record and leaves the clone."""

    def detach(self, attachment_id: str) -> None:
        for key in [key for key in self.store.attachments if key[0] == attachment_id]:
            del self.store.attachments[key]


class SealsWithoutImage(MemoryProvider):
    def _snapshot(self, name: str, found: StoredObject) -> Snapshot:
        return replace(super()._snapshot(name, found), state=ImageState.READY, why="")


class WritableReadOnly(MemoryProvider):
    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec | Tree:
        made = super().attach(snapshot, attachment_id, Access.WRITABLE, destination, purpose)
        record = self.store.attachments[(attachment_id, snapshot.birth.member)]
        record.listed = replace(record.listed, access=access)
        return made


class HalfMarks(MemoryProvider):
    """Writes marks one by one and finds the bad one last."""

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        for name, value in changes.items():
            super().mark(set_id, {name: value})


class ForgetsMarks(MemoryProvider):
    """Replaces the marks instead of changing them."""

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        for found in self._ours(set_id).values():
            found.labels = {key: value for key, value in found.labels.items() if not key.startswith("mark-")}
        super().mark(set_id, changes)


class MarksEverySet(MemoryProvider):
    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        for birth in {snapshot.birth.set_id for snapshot in list(self.snapshots())} | {set_id}:
            super().mark(birth, changes)


class OneAfterTheOther(MemoryProvider):
    """Claims one instant and has two, 50 ms apart."""

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        made = super().create(volumes, birth, hold)
        for snapshot, volume in list(zip(made, volumes, strict=True))[1:]:
            time.sleep(0.05)
            self.store.objects[snapshot.id].image = read_tree(self._top(volume))
        return made


class SwapBackLoses(MemoryProvider):
    """The second swap_back removes what the first put back."""

    def swap_back(self, swap_id: str) -> None:
        if self.store.swaps.get(swap_id) is None:
            remove(os.path.join(self.store.volumes["m1"], "database"))
        super().swap_back(swap_id)


class SwapCommitKeeps(MemoryProvider):
    """The set-aside stays for ever."""

    def swap_commit(self, swap_id: str) -> None:
        self.store.swaps.pop(swap_id, None)


class CheckWrites(MemoryProvider):
    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        super().check(volumes, birth)
        with open(self._top(volumes[0]) + ".probe", "w"):
            pass


class HidesHalfMade(MemoryProvider):
    """An attachment is listed only when it is settled, and detach finds only those."""

    def attachments(self) -> Iterator[Attachment]:
        return (found for found in super().attachments() if found.since is not None)


class CreateAnswersLate(MemoryProvider):
    """Fails after it acted, and thinks that nothing was made: a retry makes a second one."""

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        made = super().create(volumes, birth, hold)
        for snapshot in made:
            self.store.objects[snapshot.id + "-scratch"] = StoredObject({}, {}, 0)
        return made


class OrderOfTheClock(MemoryProvider):
    """Sorts by the host's clock instead of the storage's."""

    def _snapshot(self, name: str, found: StoredObject) -> Snapshot:
        birth = unpack(found.labels)
        assert birth is not None
        return replace(super()._snapshot(name, found), order=int(birth.set_id[1:9]))


class DeletesTheSetAside(MemoryProvider):
    """A set older or newer than the swap goes with it (ZFS promote, destroy -r)."""

    def swap_commit(self, swap_id: str) -> None:
        if swap_id in self.store.swaps:
            newest = max(self._ours(None).items(), key=lambda pair: pair[1].order)[0]
            del self.store.objects[newest]
        super().swap_commit(swap_id)


class HeldForEver(MemoryProvider):
    """Refuses to end what it attached twice."""

    def detach(self, attachment_id: str) -> None:
        if not any(name == attachment_id for name, _ in self.store.attachments):
            raise BusyError("is gone", object=attachment_id)
        super().detach(attachment_id)


FAULTS: list[tuple[type[MemoryProvider], str, dict[str, Any]]] = [
    (ListsByName, "test_foreign_objects_are_left_alone", {}),
    (DeletesByPrefix, "test_foreign_objects_are_left_alone", {}),
    (DeleteMinds, "test_delete_leaves_nothing_and_absent_is_done", {}),
    (DeleteMinds, "test_every_call_twice", {}),
    (LeaksOnFailure, "test_a_partial_create_leaves_nothing", {"gone_first": False}),
    (CreatesOver, "test_create_of_a_set_that_exists_is_refused", {}),
    (SharesFiles, "test_a_clone_is_its_own", {}),
    (NeverBusy, "test_an_attached_set_is_busy", {"access": Access.WRITABLE}),
    (DetachRemovesThePlace, "test_what_a_person_put_there_stays", {"how": "moved away"}),
    (DetachForgets, "test_detach_of_the_absent_is_done_and_hurts_nothing", {}),
    (SealsWithoutImage, "test_an_image_that_the_storage_lost_is_invalid", {}),
    (WritableReadOnly, "test_read_only_cannot_be_written", {}),
    (HalfMarks, "test_a_mark_that_is_none_is_refused", {"changes": {"height": "UPPER"}}),
    (ForgetsMarks, "test_every_mark_round_trips_and_goes", {}),
    (MarksEverySet, "test_two_sets_of_a_volume_are_independent", {}),
    (OneAfterTheOther, "test_volumes_are_one_instant_where_claimed", {}),
    (SwapBackLoses, "test_swap_and_back", {}),
    (SwapCommitKeeps, "test_swap_and_commit", {}),
    (DeletesTheSetAside, "test_swap_and_commit", {}),
    (CheckWrites, "test_check_and_looking_have_no_effects", {}),
    (HidesHalfMade, "test_attachments_are_listed", {"access": Access.WRITABLE, "purpose": Purpose.VERIFY}),
    (CreateAnswersLate, "test_every_single_failure_can_be_undone", {"when": "after"}),
    (OrderOfTheClock, "test_the_order_rises", {}),
    (HeldForEver, "test_every_call_twice", {}),
]


@pytest.mark.parametrize(("kind", "test", "arguments"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_the_suite_sees(kind: type[MemoryProvider], test: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    class Faulty(MemoryHarness):
        def provider(self) -> Provider:
            return kind(Settings(state=str(tmp_path)), self.store)

    os.mkdir(tmp_path / "faulty")
    assert not _passes(Faulty(tmp_path / "faulty"), test, arguments), "a faulty driver passes"
    os.mkdir(tmp_path / "right")
    assert _passes(MemoryHarness(tmp_path / "right"), test, arguments), "and not for its fault"


def _passes(harness: MemoryHarness, test: str, arguments: dict[str, Any]) -> bool:
    suite = ProviderConformance()
    volume = harness.volume()
    assert volume.path
    fill(volume.path)
    given: dict[str, Any] = {"harness": harness, "volume": volume, **arguments}
    method: Callable[..., None] = getattr(suite, test)
    if "history" in method.__code__.co_varnames[: method.__code__.co_argcount]:
        given["history"] = _history(harness, volume)
    try:
        method(**given)
    except pytest.skip.Exception as skipped:
        raise AssertionError(f"skipped: {skipped}") from None
    except (Exception, pytest.fail.Exception):
        return False
    return True


def _history(harness: MemoryHarness, volume: Volume) -> object:
    fixture = ProviderConformance.history
    function = getattr(fixture, "_fixture_function", None) or getattr(fixture, "__wrapped__", fixture)
    return function(ProviderConformance(), harness, volume)
