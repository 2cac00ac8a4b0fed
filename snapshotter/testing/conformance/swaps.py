"""Swaps: a clone in its origin's place, taken back or committed."""

from __future__ import annotations

import pytest

from snapshotter.core.errors import BusyError
from snapshotter.core.model import (
    Birth,
    ImageState,
    Volume,
)
from snapshotter.testing.conformance.steps import Content, Contract, content_of, ready, seal, take
from snapshotter.testing.harness import (
    Harness,
    describe,
    fill,
    ruin,
)


class Swaps(Contract):
    """Swaps: a clone in its origin's place, taken back or committed."""

    @pytest.fixture
    def history(self, harness: Harness, volume: Volume) -> list[tuple[Birth, Content]]:
        """Two sets of the volume, each with what it holds, and the origin gone on since."""
        provider = harness.provider()
        if not provider.traits.swaps:
            pytest.skip("no swaps here")
        sets: list[tuple[Birth, Content]] = []
        for seed in ("older", "newer"):
            fill(self.top(volume), seed)
            content = describe(self.top(volume))
            birth = take(provider, harness, [volume])
            seal(provider, birth)
            ready(provider, harness, birth.set_id)
            sets.append((birth, content))
        ruin(self.top(volume))
        return sets

    def all_there(self, harness: Harness, history: list[tuple[Birth, Content]]) -> None:
        for birth, content in history:
            (found,) = ready(harness.provider(), harness, birth.set_id)
            assert found.state is ImageState.READY and "sealed" in found.marks
            assert content_of(harness, found) == content

    def test_swap_and_back(self, harness: Harness, volume: Volume, history: list[tuple[Birth, Content]]) -> None:
        before, origin = harness.objects(), describe(self.top(volume))
        (older, content), _ = history
        swap_id = "w" + older.set_id[1:]
        (found,) = harness.provider().snapshots(older.set_id)
        harness.provider().swap(swap_id, found, volume)
        assert describe(self.top(volume)) == content
        assert list(harness.provider().swaps()) == [swap_id]
        for told in (*harness.provider().open_swaps(), *harness.provider().open_swaps(volume.id)):
            assert told.id == swap_id and told.volume in ("", volume.id)
        self.all_there(harness, history)
        ruin(self.top(volume))
        self.all_there(harness, history)
        for _ in range(2):
            harness.provider().swap_back(swap_id)
            assert describe(self.top(volume)) == origin, "not what it was before the swap"
            assert not list(harness.provider().swaps()) and not list(harness.provider().open_swaps(volume.id))
            assert harness.objects() == before
        self.all_there(harness, history)

    def test_swap_and_commit(self, harness: Harness, volume: Volume, history: list[tuple[Birth, Content]]) -> None:
        (older, content), (newer, _) = history
        before = harness.objects()
        swap_id = "w" + older.set_id[1:]
        (found,) = harness.provider().snapshots(older.set_id)
        harness.provider().swap(swap_id, found, volume)
        try:
            harness.provider().swap_commit(swap_id)
        except BusyError as busy:
            # Where what is newer hangs on what is set aside: refused, and nothing is lost by it.
            assert newer.set_id in busy.line() and busy.cure
            assert list(harness.provider().swaps()) == [swap_id]
            assert describe(self.top(volume)) == content
            self.all_there(harness, history)
            harness.provider().swap_back(swap_id)
            harness.provider().delete(history.pop()[0].set_id)
            before = harness.objects()
            harness.provider().swap(swap_id, found, volume)
            harness.provider().swap_commit(swap_id)
        harness.provider().swap_commit(swap_id)
        assert not list(harness.provider().swaps())
        assert describe(self.top(volume)) == content
        self.all_there(harness, history)
        harness.provider().swap_back(swap_id)
        assert describe(self.top(volume)) == content, "a committed swap was taken back"
        ruin(self.top(volume))
        ruined = describe(self.top(volume))
        later = take(harness.provider(), harness, [harness.again(volume)])
        seal(harness.provider(), later)
        self.all_there(harness, [*history, (later, ruined)])
        harness.provider().delete(later.set_id)
        assert harness.objects() == before

    def test_a_second_swap_is_refused(
        self, harness: Harness, volume: Volume, history: list[tuple[Birth, Content]]
    ) -> None:
        origin = describe(self.top(volume))
        (older, content), (newer, _) = history
        first, second = "w" + older.set_id[1:], "w" + newer.set_id[1:]
        snapshots = [next(harness.provider().snapshots(birth.set_id)) for birth, _ in history]
        harness.provider().swap(first, snapshots[0], volume)
        for swap_id in (first, second):
            with pytest.raises(BusyError):
                harness.provider().swap(swap_id, snapshots[1], volume)
            assert list(harness.provider().swaps()) == [first]
            assert describe(self.top(volume)) == content
        harness.provider().swap_back(second)
        assert describe(self.top(volume)) == content
        harness.provider().swap_back(first)
        assert describe(self.top(volume)) == origin

    def test_deleting_the_swapped_set_harms_nothing(
        self, harness: Harness, volume: Volume, history: list[tuple[Birth, Content]]
    ) -> None:
        """It may be refused while the swap is open; what stands in the origin's place stays either way."""
        origin = describe(self.top(volume))
        (older, content), newer = history
        swap_id = "w" + older.set_id[1:]
        harness.provider().swap(swap_id, next(harness.provider().snapshots(older.set_id)), volume)
        try:
            harness.provider().delete(older.set_id)
        except BusyError:
            self.all_there(harness, history)
        else:
            assert not list(harness.provider().snapshots(older.set_id))
        assert describe(self.top(volume)) == content
        harness.provider().swap_back(swap_id)
        assert describe(self.top(volume)) == origin
        self.all_there(harness, [newer])

    def test_absent_swaps_are_done(self, harness: Harness, volume: Volume) -> None:
        if not harness.provider().traits.swaps:
            pytest.skip("no swaps here")
        content = describe(self.top(volume))
        harness.provider().swap_back("w20261122t100630z-000000")
        harness.provider().swap_commit("w20261122t100630z-000000")
        assert describe(self.top(volume)) == content
