"""The fault proxies do what they say, at the call they say, and nothing else."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from snapshotter.core.errors import StorageError
from snapshotter.core.model import Hold
from snapshotter.provider import Provider
from snapshotter.testing import MUTATING, CallTwice, Counting, FailNth, KillAt, Proxy, make_birth
from snapshotter.testing.faults import IDEMPOTENT
from tests.conformance.test_memory import MemoryHarness

READING = {
    "availability",
    "claim",
    "find",
    "tagged",
    "foresee",
    "of_slot",
    "one_instant",
    "check",
    "snapshots",
    "attachments",
    "swaps",
    "open_swaps",
    "source_of",
    "swappable",
    "refuse_commit",
    "sees",
    "refuse_unmounted",
    "refuse_writes",
    "reap",
    "space",
}


@pytest.fixture
def harness(tmp_path: Path) -> MemoryHarness:
    return MemoryHarness(tmp_path)


def test_every_method_of_the_interface_is_handed_on() -> None:
    """A method added to Provider must be added to Proxy, and be counted if it changes storage."""
    interface = {name for name, value in vars(Provider).items() if callable(value) and not name.startswith("_")}
    assert interface == set(MUTATING) | READING
    assert interface <= set(vars(Proxy))
    assert set(MUTATING) >= IDEMPOTENT


def test_a_proxy_is_what_it_wraps(harness: MemoryHarness) -> None:
    inner = harness.provider()
    proxy = CallTwice(FailNth(inner, 99))
    assert isinstance(proxy, Provider)
    assert (proxy.name, proxy.traits, proxy.OPTIONS) == (inner.name, inner.traits, inner.OPTIONS)


def test_failing_before_does_nothing_and_failing_after_has_done_it(harness: MemoryHarness) -> None:
    volume = harness.volume()
    for when, made in (("before", 0), ("after", 1)):
        proxy = FailNth(harness.provider(), 2, "before" if when == "before" else "after")
        proxy.prepare([volume], make_birth([volume]), 5.0)
        with pytest.raises(StorageError, match="create"):
            proxy.create([volume], make_birth([volume]), Hold())
        assert len(harness.store.objects) == made
        assert proxy.calls == ["prepare", "create"]
        proxy.create([volume], make_birth([volume]), Hold())  # the next calls go through: an undo must work
        assert len(harness.store.objects) == made + 1
        harness.store.objects.clear()


def test_calling_twice_is_seen_by_what_is_within(harness: MemoryHarness) -> None:
    counting = Counting(harness.provider())
    volume, twice = harness.volume(), CallTwice(counting)
    birth = make_birth([volume])
    twice.create([volume], birth, Hold())
    twice.mark(birth.set_id, {"sealed": "1"})
    twice.delete(birth.set_id)
    assert counting.calls == ["create", "mark", "mark", "delete", "delete"]


def test_killed_where_it_says(harness: MemoryHarness) -> None:
    volume = harness.volume()
    evidence = str(harness.tmp / "evidence")
    for when in ("before", "after"):

        class Inner(Proxy):
            def delete(self, set_id: str) -> None:
                os.close(os.open(evidence, os.O_CREAT))

        child = os.fork()
        if child == 0:
            try:
                proxy = KillAt(Inner(harness.provider()), 2, "before" if when == "before" else "after")
                proxy.create([volume], make_birth([volume]), Hold())
                proxy.delete("s20261122t100630z-5f3a9c")
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert os.path.exists(evidence) == (when == "after")
