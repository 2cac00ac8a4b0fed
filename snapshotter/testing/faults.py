"""Providers that misbehave on purpose, around any other provider: fail, repeat, or die at the n-th mutating call.

They know the interface and nothing of the storage behind it. Mutating calls are counted from 1, over all methods.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Literal, TypeVar

from snapshotter.core.errors import StorageError
from snapshotter.core.model import (
    Access,
    Attachment,
    Birth,
    Elsewhere,
    Hold,
    MountSpec,
    Purpose,
    Snapshot,
    Space,
    Tagged,
    Tree,
    Volume,
)
from snapshotter.host.mounts import Mount
from snapshotter.provider import OpenSwap, Provider

T = TypeVar("T")
When = Literal["before", "after"]

#: The calls that change storage, and so are counted.
MUTATING = (
    "advance",
    "ask",
    "prepare",
    "create",
    "mark",
    "finish",
    "delete",
    "attach",
    "attach_away",
    "settle",
    "detach",
    "swap",
    "swap_back",
    "swap_commit",
)
#: Those that may be made twice with no other effect than once.
IDEMPOTENT = frozenset({"mark", "finish", "delete", "settle", "detach", "swap_back", "swap_commit"})


class Proxy(Provider):
    """Hands every call on to `inner`. Subclasses override `mutate`, through which all mutating calls go."""

    def __init__(self, inner: Provider) -> None:
        super().__init__(inner.settings)
        self.inner = inner
        # Class variables of the interface, and here of the instance: a proxy is whatever it wraps.
        vars(self).update(name=inner.name, traits=inner.traits, OPTIONS=inner.OPTIONS)

    def mutate(self, what: str, act: Callable[[], T]) -> T:
        """Make the mutating call `what` by calling `act`."""
        return act()

    def availability(self) -> list[str]:
        return self.inner.availability()

    def claim(self, mount: Mount, path: str) -> Volume | None:
        return self.inner.claim(mount, path)

    def find(self, select: Mapping[str, object]) -> list[Volume]:
        return self.inner.find(select)

    def tagged(self) -> list[Tagged]:
        return self.inner.tagged()

    def foresee(self, snapshot: Snapshot) -> list[str]:
        return self.inner.foresee(snapshot)

    def ask(self, instance: str, argv: Sequence[str]) -> str:
        return self.mutate("ask", lambda: self.inner.ask(instance, argv))

    def advance(self) -> list[str]:
        return self.mutate("advance", self.inner.advance)

    def one_instant(self, volumes: Sequence[Volume]) -> bool:
        return self.inner.one_instant(volumes)

    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        self.inner.check(volumes, birth)

    def prepare(self, volumes: Sequence[Volume], birth: Birth, budget: float) -> None:
        self.mutate("prepare", lambda: self.inner.prepare(volumes, birth, budget))

    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        return self.mutate("create", lambda: self.inner.create(volumes, birth, hold))

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        return self.inner.snapshots(set_id)

    def of_slot(self, target: str, slot: str) -> Iterator[Snapshot]:
        return self.inner.of_slot(target, slot)

    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        self.mutate("mark", lambda: self.inner.mark(set_id, changes))

    def finish(self, set_id: str) -> None:
        self.mutate("finish", lambda: self.inner.finish(set_id))

    def delete(self, set_id: str) -> None:
        self.mutate("delete", lambda: self.inner.delete(set_id))

    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec | Tree:
        return self.mutate("attach", lambda: self.inner.attach(snapshot, attachment_id, access, destination, purpose))

    def attach_away(self, snapshot: Snapshot, attachment_id: str) -> Elsewhere:
        return self.mutate("attach_away", lambda: self.inner.attach_away(snapshot, attachment_id))

    def settle(self, attachment_id: str, since: datetime) -> None:
        self.mutate("settle", lambda: self.inner.settle(attachment_id, since))

    def attachments(self) -> Iterator[Attachment]:
        return self.inner.attachments()

    def detach(self, attachment_id: str) -> None:
        self.mutate("detach", lambda: self.inner.detach(attachment_id))

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        self.mutate("swap", lambda: self.inner.swap(swap_id, snapshot, volume))

    def swap_back(self, swap_id: str) -> None:
        self.mutate("swap_back", lambda: self.inner.swap_back(swap_id))

    def swap_commit(self, swap_id: str) -> None:
        self.mutate("swap_commit", lambda: self.inner.swap_commit(swap_id))

    def refuse_commit(self, swap_id: str) -> None:
        self.inner.refuse_commit(swap_id)

    def swappable(self, volume: Volume, snapshot: Snapshot) -> bool:
        return self.inner.swappable(volume, snapshot)

    def sees(self, volume: str) -> bool:
        return self.inner.sees(volume)

    def source_of(self, volume: str, known: str) -> str:
        return self.inner.source_of(volume, known)

    def swaps(self) -> Iterator[str]:
        return self.inner.swaps()

    def open_swaps(self, volume: str | None = None) -> Iterator[OpenSwap]:
        return self.inner.open_swaps(volume)

    def reap(self) -> list[str]:
        return self.inner.reap()

    def refuse_unmounted(self, roots: Sequence[str], others: Sequence[str]) -> None:
        self.inner.refuse_unmounted(roots, others)

    def refuse_writes(self, needs: Sequence[tuple[Mount, int]]) -> None:
        self.inner.refuse_writes(needs)

    def space(self, volumes: Sequence[Volume]) -> Space:
        return self.inner.space(volumes)


class Counting(Proxy):
    """Writes down the mutating calls in `calls`: run a scenario with it once, then loop n over `len(calls)`."""

    def __init__(self, inner: Provider) -> None:
        super().__init__(inner)
        self.calls: list[str] = []

    def mutate(self, what: str, act: Callable[[], T]) -> T:
        self.calls.append(what)
        return act()


class FailNth(Counting):
    """Raises StorageError at the n-th mutating call: `before` it acts, or `after` it has acted (its reply is lost).
    All other calls go through, so that the run's own undo is seen to work."""

    def __init__(self, inner: Provider, n: int, when: When = "before") -> None:
        super().__init__(inner)
        self.n = n
        self.when = when

    def fail(self, what: str) -> None:
        lost = "was refused" if self.when == "before" else "gave no answer"
        raise StorageError(f"{what} {lost} (call {self.n}, a fault on purpose)", object=self.name)

    def mutate(self, what: str, act: Callable[[], T]) -> T:
        self.calls.append(what)
        if len(self.calls) == self.n and self.when == "before":
            self.fail(what)
        result = act()
        if len(self.calls) == self.n:
            self.fail(what)
        return result


class KillAt(FailNth):
    """As FailNth, but the process dies by SIGKILL there: for child processes, over a store that outlives them."""

    def fail(self, what: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()  # the signal is on its way: nothing more may happen


class CallTwice(Proxy):
    """Makes every idempotent mutating call twice and returns the second answer. (`create` isn't one: a second create
    of a set id is refused with BusyError, which `ProviderConformance` asks for.)"""

    def mutate(self, what: str, act: Callable[[], T]) -> T:
        if what in IDEMPOTENT:
            act()
        return act()
