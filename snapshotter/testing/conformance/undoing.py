"""Faults: every call failing, its reply lost, made twice, the run killed."""

from __future__ import annotations

import os
import random
import signal
import time
from datetime import UTC, datetime

import pytest

from snapshotter.core.errors import BusyError, StorageError
from snapshotter.core.model import (
    Access,
    ImageState,
    Quiesce,
    Volume,
    new_attachment_id,
    new_set_id,
    utc_now,
)
from snapshotter.provider import Provider
from snapshotter.testing.conformance.steps import Content, Contract, content_of, ready, seal, take
from snapshotter.testing.faults import CallTwice, Counting, FailNth, When
from snapshotter.testing.harness import (
    Harness,
    describe,
    make_birth,
)


class Undoing(Contract):
    """Faults: every call failing, its reply lost, made twice, the run killed."""

    def scenario(self, harness: Harness, provider: Provider, volume: Volume, ids: tuple[str, str, str]) -> None:
        """A set's whole life, with the ids of set, attachment and swap given, so that it can be undone by them."""
        birth = take(provider, harness, [volume], make_birth([volume], set_id=ids[0]))
        seal(provider, birth)
        (found,) = ready(provider, harness, birth.set_id)
        destination = harness.destination()
        access = Access.WRITABLE if provider.traits.writable_clone else Access.READ_ONLY
        provider.attach(found, ids[1], access, destination)
        provider.settle(ids[1], datetime.now(UTC))
        provider.detach(ids[1])
        if provider.traits.swaps:
            provider.swap(ids[2], found, volume)
            provider.swap_back(ids[2])
        provider.delete(birth.set_id)

    @staticmethod
    def ids() -> tuple[str, str, str]:
        now = utc_now()
        return new_set_id(now), new_attachment_id(now), "w" + new_set_id(now)[1:]

    def honest(self, harness: Harness, volume: Volume, content: Content, *, sealed_is_whole: bool) -> None:
        """After a fault nothing that is listed as sealed lacks its image."""
        for found in harness.provider().snapshots():
            if "sealed" in found.marks:
                assert found.state is not ImageState.INVALID, f"sealed without an image: {found.why}"
                if sealed_is_whole:
                    assert content_of(harness, ready(harness.provider(), harness, found.birth.set_id)[0]) == content

    def undo(self, harness: Harness, ids: tuple[str, str, str]) -> None:
        """All inverses by id, by a new run. What a dead run's children still hold is waited for."""
        provider = harness.provider()
        give_up = time.monotonic() + harness.patience_s
        while True:
            try:
                if provider.traits.swaps:
                    provider.swap_back(ids[2])
                provider.detach(ids[1])
                provider.delete(ids[0])
                break
            except BusyError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.1)
        provider.reap()

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_every_single_failure_can_be_undone(self, harness: Harness, volume: Volume, when: When) -> None:
        counting = Counting(harness.provider())
        self.scenario(harness, counting, volume, self.ids())
        before, content = harness.objects(), describe(self.top(volume))
        for n in range(1, len(counting.calls) + 1):
            ids = self.ids()
            with pytest.raises(StorageError, match="on purpose"):
                self.scenario(harness, FailNth(harness.provider(), n, when), volume, ids)
            self.honest(harness, volume, content, sealed_is_whole=True)
            self.undo(harness, ids)
            where = f"{when} call {n}, {counting.calls[n - 1]}"
            assert harness.objects() == before, f"left after a fault {where}"
            assert describe(self.top(volume)) == content, f"the origin changed by a fault {where}"
            assert not list(harness.provider().attachments()), where

    def test_every_call_twice(self, harness: Harness, volume: Volume) -> None:
        before, content = harness.objects(), describe(self.top(volume))
        self.scenario(harness, CallTwice(harness.provider()), volume, self.ids())
        assert harness.objects() == before
        assert describe(self.top(volume)) == content

    def test_killed_at_any_moment(self, harness: Harness, volume: Volume) -> None:
        """SIGKILL of a run at random moments: a new run's inverses leave the storage as it was, and what was sealed
        at that moment is whole."""
        if not harness.persistent:
            pytest.skip("this storage dies with the process")
        started = time.monotonic()
        self.scenario(harness, harness.provider(), volume, self.ids())
        usual_s = time.monotonic() - started
        before, content = harness.objects(), describe(self.top(volume))
        for _ in range(12):
            ids = self.ids()
            child = os.fork()
            if child == 0:
                try:
                    self.scenario(harness, harness.provider(), volume, ids)
                finally:
                    os._exit(0)
            time.sleep(random.uniform(0, usual_s * 1.2))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert not any(found.held for found in harness.provider().attachments()), "held by a dead run"
            if not list(harness.provider().swaps()):
                self.honest(harness, volume, content, sealed_is_whole=True)
            self.undo(harness, ids)
            assert harness.objects() == before
            assert describe(self.top(volume)) == content
            assert not list(harness.provider().attachments())

    def test_it_needs_a_quiesce_that_exists(self, harness: Harness) -> None:
        assert harness.provider().traits.quiesce in (Quiesce.NONE, Quiesce.PAUSE, Quiesce.FREEZE)
