"""Faults: every call failing, its reply lost, made twice, the run killed."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from snapshotter.core.errors import BusyError, StorageError
from snapshotter.core.model import (
    Access,
    ImageState,
    Quiesce,
    Volume,
    new_set_id,
    utc_now,
)
from snapshotter.provider import Provider
from snapshotter.testing.conformance.steps import Content, Contract, content_of, ready, seal, take
from snapshotter.testing.faults import CallTwice, Counting, FailNth, KillAt, When
from snapshotter.testing.harness import (
    Harness,
    describe,
    make_birth,
)


@dataclass(frozen=True)
class Life:
    """What one run of the scenario is known by."""

    set_id: str
    attachment_id: str
    swap_id: str
    destination: str

    @classmethod
    def new(cls, harness: Harness) -> Life:
        set_id = new_set_id(utc_now())
        return cls(set_id, "a" + set_id[1:], "w" + set_id[1:], harness.destination())


class Undoing(Contract):
    """Faults: every call failing, its reply lost, made twice, the run killed."""

    def scenario(self, harness: Harness, provider: Provider, volume: Volume, life: Life) -> None:
        """A set's whole life, with the ids of everything given before, so that it can be undone by them."""
        birth = take(provider, harness, [volume], make_birth([volume], set_id=life.set_id))
        seal(provider, birth)
        (found,) = ready(provider, harness, birth.set_id)
        access = Access.WRITABLE if provider.traits.writable_clone else Access.READ_ONLY
        provider.attach(found, life.attachment_id, access, life.destination)
        provider.settle(life.attachment_id, datetime.now(UTC))
        provider.detach(life.attachment_id)
        if provider.traits.swaps:
            provider.swap(life.swap_id, found, volume)
            provider.swap_back(life.swap_id)
        provider.delete(birth.set_id)

    def honest(self, harness: Harness, volume: Volume, content: Content, *, sealed_is_whole: bool) -> None:
        """After a fault nothing that is listed as sealed lacks its image."""
        for found in harness.provider().snapshots():
            if "sealed" in found.marks:
                assert found.state is not ImageState.INVALID, f"sealed without an image: {found.why}"
                if sealed_is_whole:
                    assert content_of(harness, ready(harness.provider(), harness, found.birth.set_id)[0]) == content

    def undo(self, harness: Harness, life: Life) -> None:
        """All inverses by id, by a new run. What a dead run's children still hold is waited for."""
        provider = harness.provider()
        give_up = time.monotonic() + harness.patience_s
        while True:
            try:
                if provider.traits.swaps:
                    provider.swap_back(life.swap_id)
                provider.detach(life.attachment_id)
                provider.delete(life.set_id)
                break
            except BusyError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.1)
        provider.reap()

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_every_single_failure_can_be_undone(self, harness: Harness, volume: Volume, when: When) -> None:
        counting = Counting(harness.provider())
        self.scenario(harness, counting, volume, Life.new(harness))
        before, content = harness.objects(), describe(self.top(volume))
        for n in range(1, len(counting.calls) + 1):
            life = Life.new(harness)
            with pytest.raises(StorageError, match="on purpose"):
                self.scenario(harness, FailNth(harness.provider(), n, when), volume, life)
            self.honest(harness, volume, content, sealed_is_whole=True)
            self.undo(harness, life)
            where = f"{when} call {n}, {counting.calls[n - 1]}"
            assert harness.objects() == before, f"left after a fault {where}"
            assert describe(self.top(volume)) == content, f"the origin changed by a fault {where}"
            assert not list(harness.provider().attachments()), where

    def test_every_call_twice(self, harness: Harness, volume: Volume) -> None:
        before, content = harness.objects(), describe(self.top(volume))
        self.scenario(harness, CallTwice(harness.provider()), volume, Life.new(harness))
        assert harness.objects() == before
        assert describe(self.top(volume)) == content

    def killed(self, harness: Harness, volume: Volume, act: Callable[[Life], None], after_s: float | None) -> None:
        """Run `act` in a child that dies by SIGKILL, by itself or after so many seconds; then what must be true."""
        before, content = harness.objects(), describe(self.top(volume))
        life = Life.new(harness)
        child = os.fork()
        if child == 0:
            try:
                act(life)
            finally:
                os._exit(0)
        try:
            if after_s is not None:
                time.sleep(after_s)
                os.kill(child, signal.SIGKILL)
        finally:
            _, status = os.waitpid(child, 0)
        assert after_s is not None or os.WIFSIGNALED(status), "the child lived on"
        assert not any(found.held for found in harness.provider().attachments()), "held by a dead run"
        if not list(harness.provider().swaps()):
            self.honest(harness, volume, content, sealed_is_whole=True)
        self.undo(harness, life)
        left = harness.objects() - before
        assert not left, f"left by a killed run, after its undo and a reap: {sorted(left)}"
        assert harness.objects() == before
        assert describe(self.top(volume)) == content
        assert not list(harness.provider().attachments())

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_killed_at_every_call(self, harness: Harness, volume: Volume, when: When) -> None:
        if not harness.persistent:
            pytest.skip("this storage dies with the process")
        counting = Counting(harness.provider())
        self.scenario(harness, counting, volume, Life.new(harness))
        for n in range(1, len(counting.calls) + 1):
            provider = KillAt(harness.provider(), n, when)
            self.killed(harness, volume, functools.partial(self.scenario, harness, provider, volume), None)

    def test_killed_at_any_moment(self, harness: Harness, volume: Volume) -> None:
        """SIGKILL of a run at random moments: a new run's inverses leave the storage as it was, and what was sealed
        at that moment is whole."""
        if not harness.persistent:
            pytest.skip("this storage dies with the process")
        started = time.monotonic()
        self.scenario(harness, harness.provider(), volume, Life.new(harness))
        usual_s = time.monotonic() - started
        for _ in range(12):
            act = functools.partial(self.scenario, harness, harness.provider(), volume)
            self.killed(harness, volume, act, random.uniform(0, usual_s * 1.2))

    def test_looking_while_another_run_works(self, harness: Harness, volume: Volume) -> None:
        """What is listed while sets come and go may be a moment old, and is never an error."""
        if not harness.persistent:
            pytest.skip("this storage dies with the process")
        life = Life.new(harness)
        before = harness.objects()
        child = os.fork()
        if child == 0:
            try:
                while True:
                    self.scenario(harness, harness.provider(), volume, life)
            finally:
                os._exit(0)
        try:
            looks, until = 0, time.monotonic() + 2
            while time.monotonic() < until or looks < 20:
                looks += 1
                for found in harness.provider().snapshots():
                    assert found.birth.set_id == life.set_id
                for attached in harness.provider().attachments():
                    assert (attached.id, attached.set_id) == (life.attachment_id, life.set_id)
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the other run ended: was it disturbed by our looking?"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            self.undo(harness, life)
        assert harness.objects() == before

    def test_it_needs_a_quiesce_that_exists(self, harness: Harness) -> None:
        assert harness.provider().traits.quiesce in (Quiesce.NONE, Quiesce.PAUSE, Quiesce.FREEZE)
