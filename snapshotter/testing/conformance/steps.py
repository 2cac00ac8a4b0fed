"""What the suite's parts share: how a take, an attachment and a look at an image are made, and the fixtures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from snapshotter.core.errors import PreconditionError
from snapshotter.core.model import (
    Access,
    Birth,
    ImageState,
    MountSpec,
    Purpose,
    Snapshot,
    Tree,
    Volume,
    new_attachment_id,
    utc_now,
)
from snapshotter.provider import Provider
from snapshotter.testing.harness import (
    Harness,
    describe,
    fill,
    make_birth,
)

Content = dict[str, tuple[object, ...]]


def take(provider: Provider, harness: Harness, volumes: Sequence[Volume], birth: Birth | None = None) -> Birth:
    """As the take verb does it, up to the seal."""
    birth = birth or make_birth(volumes)
    provider.check(volumes, birth)
    provider.prepare(volumes, birth, 5.0)
    made = provider.create(volumes, birth, harness.hold())
    assert [snapshot.birth.member for snapshot in made] == list(range(len(volumes)))
    return birth


def seal(provider: Provider, birth: Birth) -> None:
    provider.mark(birth.set_id, {"sealed": "20261122t100630z", "grade": "filesystem"})


def ready(provider: Provider, harness: Harness, set_id: str) -> list[Snapshot]:
    """The set's members in order, as soon as the storage copies none any more."""
    give_up = time.monotonic() + harness.patience_s
    while True:
        found = sorted(provider.snapshots(set_id), key=lambda snapshot: snapshot.birth.member)
        if all(snapshot.state is not ImageState.PENDING for snapshot in found):
            return found
        assert time.monotonic() < give_up, f"still pending after {harness.patience_s:g} s"
        time.sleep(0.05)


@dataclass
class Attached:
    """One attachment that the suite made, and how to end it."""

    harness: Harness
    id: str
    destination: str
    path: str = ""
    made_tree: bool = False
    ended: bool = field(default=False)

    def end(self) -> None:
        self.harness.leave(self.destination)
        self.harness.provider().detach(self.id)
        self.ended = True


def attach(harness: Harness, snapshot: Snapshot, access: Access, purpose: Purpose = Purpose.RESTORE) -> Attached:
    """Attach and enter. A read-only attachment may need root: then the refusal must say how to get one."""
    attached = Attached(harness, new_attachment_id(utc_now()), harness.destination())
    provider = harness.provider()
    try:
        made = provider.attach(snapshot, attached.id, access, attached.destination, purpose)
    except PreconditionError as error:
        assert os.geteuid() != 0, error.line()
        assert error.cure, "a refusal names its cure"
        provider.detach(attached.id)
        pytest.skip("without root there is no such attachment here, and the refusal says so")
    attached.made_tree = isinstance(made, Tree)
    if isinstance(made, MountSpec) and provider.traits.needs_host:
        said = " ".join((made.source, *made.options))
        named = attached.id in said or (access is Access.READ_ONLY and snapshot.birth.set_id in said)
        assert named, "it is told by that whether what is mounted there is it"
    try:
        attached.path = harness.enter(made, attached.destination)
    except PreconditionError:
        provider.detach(attached.id)
        assert os.geteuid() != 0
        pytest.skip("without root there is no such attachment here, and the refusal says so")
    return attached


def content_of(harness: Harness, snapshot: Snapshot) -> Content:
    """What the image holds, seen through a writable clone (or read-only, where the storage has no clones)."""
    access = Access.WRITABLE if harness.provider().traits.writable_clone else Access.READ_ONLY
    attached = attach(harness, snapshot, access)
    try:
        return describe(attached.path)
    finally:
        attached.end()


class Contract:
    """Fixtures of all parts."""

    @pytest.fixture
    def harness(self) -> Iterator[Harness]:
        raise NotImplementedError("a fixture that yields your Harness")

    @pytest.fixture
    def volume(self, harness: Harness) -> Volume:
        """One volume with ordinary content."""
        volume = harness.volume()
        fill(self.top(volume))
        return volume

    @staticmethod
    def top(volume: Volume) -> str:
        assert volume.path is not None
        return volume.path
