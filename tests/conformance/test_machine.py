"""Any order of everything: hypothesis drives a driver and a model of what must be true side by side.

Every step is a new instance on the same storage, as every command is a new run. Files are rewritten with other bytes of
the same length at once after a take: what a copy may wrongly hold for unchanged. A step's number means the n-th one
made, never the n-th by name: the clock and chance are in names, and hypothesis runs the same steps again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from snapshotter.core.errors import BusyError, NotFoundError
from snapshotter.core.model import (
    Access,
    ImageState,
    MountSpec,
    Purpose,
    Snapshot,
    Volume,
    new_attachment_id,
    new_set_id,
    utc_now,
)
from snapshotter.provider import Provider
from snapshotter.testing import Harness, make_birth
from snapshotter.testing.conformance import ready
from tests.conformance.test_copy import CopyHarness
from tests.conformance.test_memory import MemoryHarness

Files = dict[str, bytes]

numbers = st.integers(0, 99)
names = st.sampled_from(["a", "b", "dir/c", "dir/d"])
contents = st.sampled_from([b"", b"1" * 5000, b"2" * 5000, b"short"])
marked = st.none() | st.sampled_from(["1", "2"])
marks = st.dictionaries(st.sampled_from(["sealed", "pinned", "height", "grade"]), marked)


def files_in(top: str) -> Files:
    found = {}
    for directory, _, inside in os.walk(top):
        for name in inside:
            path = os.path.join(directory, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, top)] = file.read()
    return found


def write_file(top: str, name: str, content: bytes) -> None:
    path = os.path.join(top, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "r+b" if os.path.exists(path) else "wb") as file:
        file.truncate()
        file.write(content)
        file.truncate()


@dataclass
class ModelSet:
    members: list[tuple[int, Files]]  # which volume, what was in it
    marks: dict[str, str] = field(default_factory=dict)


@dataclass
class ModelAttachment:
    set_id: str
    member: int
    destination: str
    files: Files
    since: datetime | None = None


class Machine(RuleBasedStateMachine):
    make: Callable[[str], Harness]

    def __init__(self) -> None:
        super().__init__()
        self.base = tempfile.mkdtemp(prefix="cm")
        self.harness = type(self).make(self.base)
        self.volumes: list[Volume] = [self.harness.volume(), self.harness.volume()]
        self.at_start = self.harness.objects()
        self.origins: list[Files] = [{}, {}]
        self.sets: dict[str, ModelSet] = {}
        self.attached: dict[str, ModelAttachment] = {}
        self.swaps: dict[str, tuple[int, Files]] = {}

    @property
    def provider(self) -> Provider:
        return self.harness.provider()

    def top(self, number: int) -> str:
        path = self.volumes[number].path
        assert path is not None
        return path

    def snapshot(self, number: int, member: int) -> tuple[str, Snapshot]:
        set_id = [*self.sets][number % len(self.sets)]
        found = ready(self.provider, self.harness, set_id)
        return set_id, found[member % len(found)]

    # -- the origin lives ---------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 1), name=names, content=contents)
    def write(self, number: int, name: str, content: bytes) -> None:
        write_file(self.top(number), name, content)
        self.origins[number][name] = content

    @rule(number=st.integers(0, 1), name=names)
    def remove(self, number: int, name: str) -> None:
        if self.origins[number].pop(name, None) is not None:
            os.unlink(os.path.join(self.top(number), name))

    @rule(number=st.integers(0, 1), old=names, new=names)
    def rename(self, number: int, old: str, new: str) -> None:
        if old in self.origins[number] and old != new:
            os.makedirs(os.path.dirname(os.path.join(self.top(number), new)), exist_ok=True)
            os.rename(os.path.join(self.top(number), old), os.path.join(self.top(number), new))
            self.origins[number][new] = self.origins[number].pop(old)

    # -- sets ---------------------------------------------------------------------------------------------------

    @rule(which=st.sampled_from([[0], [1], [0, 1], [1, 0]]), rewrite=st.booleans())
    def take(self, which: list[int], rewrite: bool) -> None:
        volumes = [self.volumes[number] for number in which]
        birth = make_birth(volumes)
        provider = self.provider
        provider.check(volumes, birth)
        provider.prepare(volumes, birth, 5.0)
        if rewrite:  # between the passes and the pause
            self.write(which[0], "a", b"3" * 5000)
        provider.create(volumes, birth, self.harness.hold())
        self.sets[birth.set_id] = ModelSet([(number, dict(self.origins[number])) for number in which])
        for number in which:
            for name in self.origins[number]:  # at once, and as long as before
                content = bytes(byte ^ 1 for byte in self.origins[number][name])
                write_file(self.top(number), name, content)
                self.origins[number][name] = content

    @rule()
    def give_up_after_prepare(self) -> None:
        birth = make_birth(self.volumes)
        self.provider.prepare(self.volumes, birth, 5.0)
        self.provider.delete(birth.set_id)

    @precondition(lambda self: self.sets)
    @rule(number=numbers, changes=marks)
    def mark(self, number: int, changes: dict[str, str | None]) -> None:
        set_id = [*self.sets][number % len(self.sets)]
        self.provider.mark(set_id, changes)
        merged = {**self.sets[set_id].marks, **changes}
        self.sets[set_id].marks = {name: value for name, value in merged.items() if value is not None}

    @precondition(lambda self: self.sets)
    @rule(number=numbers)
    def take_again(self, number: int) -> None:
        """An id that exists is refused."""
        set_id = [*self.sets][number % len(self.sets)]
        volumes = [self.volumes[0]]
        with pytest.raises(BusyError):
            self.provider.prepare(volumes, make_birth(volumes, set_id=set_id), 5.0)
            self.provider.create(volumes, make_birth(volumes, set_id=set_id), self.harness.hold())

    @precondition(lambda self: self.sets)
    @rule(number=numbers)
    def delete(self, number: int) -> None:
        set_id = [*self.sets][number % len(self.sets)]
        if any(attached.set_id == set_id for attached in self.attached.values()):
            with pytest.raises(BusyError):
                self.provider.delete(set_id)
        else:
            self.provider.delete(set_id)
            del self.sets[set_id]

    @rule()
    def absent(self) -> None:
        self.provider.delete(new_set_id(utc_now()))
        self.provider.detach(new_attachment_id(utc_now()))
        with pytest.raises(NotFoundError):
            self.provider.mark(new_set_id(utc_now()), {"pinned": "1"})

    @rule()
    def reap(self) -> None:
        self.provider.reap()

    # -- attachments --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.sets)
    @rule(number=numbers, member=numbers, purpose=st.sampled_from(list(Purpose)))
    def attach(self, number: int, member: int, purpose: Purpose) -> None:
        set_id, found = self.snapshot(number, member)
        attachment_id, destination = new_attachment_id(utc_now()), self.harness.destination()
        made = self.provider.attach(found, attachment_id, Access.WRITABLE, destination, purpose)
        assert not isinstance(made, MountSpec), "for drivers whose clones are trees"
        _, files = self.sets[set_id].members[found.birth.member]
        self.attached[attachment_id] = ModelAttachment(set_id, found.birth.member, destination, dict(files))

    @precondition(lambda self: self.attached)
    @rule(number=numbers, name=names, content=contents)
    def write_to_a_clone(self, number: int, name: str, content: bytes) -> None:
        attached = self.attached[[*self.attached][number % len(self.attached)]]
        write_file(attached.destination, name, content)
        attached.files[name] = content

    @precondition(lambda self: self.attached)
    @rule(number=numbers)
    def settle(self, number: int) -> None:
        attachment_id = [*self.attached][number % len(self.attached)]
        self.attached[attachment_id].since = since = datetime.now(UTC)
        self.provider.settle(attachment_id, since)

    @precondition(lambda self: self.attached)
    @rule(number=numbers, twice=st.booleans())
    def detach(self, number: int, twice: bool) -> None:
        attachment_id = [*self.attached][number % len(self.attached)]
        destination = self.attached.pop(attachment_id).destination
        for _ in range(1 + twice):
            self.provider.detach(attachment_id)
        assert not os.path.lexists(destination)

    # -- swaps --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.sets and self.provider.traits.swaps)
    @rule(number=numbers, member=numbers)
    def swap(self, number: int, member: int) -> None:
        set_id, found = self.snapshot(number, member)
        volume, files = self.sets[set_id].members[found.birth.member]
        swap_id = "w" + new_set_id(utc_now())[1:]
        if any(swapped == volume for swapped, _ in self.swaps.values()):
            with pytest.raises(BusyError):
                self.provider.swap(swap_id, found, self.volumes[volume])
            return
        self.provider.swap(swap_id, found, self.volumes[volume])
        self.swaps[swap_id] = volume, self.origins[volume]
        self.origins[volume] = dict(files)

    @precondition(lambda self: self.swaps)
    @rule(number=numbers, commit=st.booleans(), twice=st.booleans())
    def end_swap(self, number: int, commit: bool, twice: bool) -> None:
        swap_id = [*self.swaps][number % len(self.swaps)]
        volume, files = self.swaps.pop(swap_id)
        for _ in range(1 + twice):
            (self.provider.swap_commit if commit else self.provider.swap_back)(swap_id)
        if not commit:
            self.origins[volume] = files

    # -- what must be true --------------------------------------------------------------------------------------

    @invariant()
    def the_origins_are_as_written(self) -> None:
        assert [files_in(self.top(number)) for number in range(2)] == self.origins

    @invariant()
    def the_catalog_is_the_model(self) -> None:
        listed = {(found.birth.set_id, found.birth.member): found for found in self.provider.snapshots()}
        assert set(listed) == {(set_id, n) for set_id, made in self.sets.items() for n in range(len(made.members))}
        for (set_id, member), found in listed.items():
            assert found.state is ImageState.READY
            assert dict(found.marks) == self.sets[set_id].marks
            assert found.volume == self.volumes[self.sets[set_id].members[member][0]].id
        assert set(self.provider.swaps()) == set(self.swaps)

    @invariant()
    def the_clones_are_as_written(self) -> None:
        found = list(self.provider.attachments())
        listed = {each.id: (each.set_id, each.member, each.path, each.since) for each in found}
        assert listed == {
            key: (each.set_id, each.member, each.destination, each.since) for key, each in self.attached.items()
        }
        for attached in self.attached.values():
            assert files_in(attached.destination) == attached.files

    def teardown(self) -> None:
        """The images, which only now are all looked at, hold what they held; and everything can be taken back."""
        try:
            for number in range(len(self.sets)):
                for member in range(2):
                    self.attach(number, member, Purpose.VERIFY)
            self.the_clones_are_as_written()
            while self.attached:
                self.detach(0, False)
            while self.swaps:
                self.end_swap(0, False, True)
            self.the_origins_are_as_written()
            while self.sets:
                self.delete(0)
            self.provider.reap()
            assert self.harness.objects() == self.at_start
        finally:
            shutil.rmtree(self.base, ignore_errors=True)


class MemoryMachine(Machine):
    make = staticmethod(lambda base: MemoryHarness(Path(base)))


class CopyMachine(Machine):
    make = staticmethod(lambda base: CopyHarness(base))


@pytest.mark.parametrize(("machine", "examples", "steps"), [(MemoryMachine, 200, 40), (CopyMachine, 40, 30)])
def test_any_order_of_everything(
    machine: type[Machine], examples: int, steps: int, request: pytest.FixtureRequest
) -> None:
    times = 10 if request.config.getoption("--full") else 1
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples * times,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
