"""A set in the making: passes while the writers run, then what changed, inside the quiesce. Must not know where a store
belongs, or what becomes of the set afterwards."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from msgspec import Struct, field

from providers.copy.sets import Sets
from snapshotter.core.errors import (
    PreconditionError,
    StorageError,
)
from snapshotter.core.model import (
    Birth,
    Hold,
    Progress,
    Volume,
)
from snapshotter.host import mounts, permissions, tree
from snapshotter.host.mirror import (
    SETTLED_NS,
    Mirror,
)
from snapshotter.host.store import (
    STORE_CURE,
    is_store,
    room_fd,
    write_object,
)
from snapshotter.provider import Settings

PASSES = 3
#: What the pause costs besides walks and copies (seconds): the order, image.json, the manifest's write.
OVERHEAD_S = 0.010


class Part(Struct):
    """One volume of a set in the making."""

    number: int
    volume: Volume
    mirror: Mirror
    walk_s: float = 0.0
    left_out: set[str] = set()  # stores below the volume's top

    @property
    def top(self) -> str:
        assert self.volume.path is not None
        return self.volume.path

    def walk(self, tick: Callable[[], None]) -> dict[str, tree.Entry]:
        began = time.perf_counter()
        with self._named():
            found = tree.walk(
                self.mirror.source, mount_points(self.top), tick=tick, leave_out=leave_stores_out(self.left_out)
            )
        self.walk_s = time.perf_counter() - began
        return found

    def update(
        self, now: Mapping[str, tree.Entry], is_volatile: Callable[[tree.Entry], bool], *, last: bool = False
    ) -> None:
        with self._named():
            self.mirror.update(now, is_volatile)
            if last:
                self.mirror.finish(now)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors name the file as the operator knows it."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.path.join(self.top, str(error.filename or ""))) from error


class Making(Struct):
    """A set between `prepare` and the end of `create`; closing it frees its lock."""

    store: Sets
    birth: Birth
    settings: Settings
    parts: list[Part] = []
    mapped: frozenset[tuple[int, int]] = frozenset()
    notes: list[str] = []  # what a person should know of it
    pid: int = field(default_factory=os.getpid)
    open: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        self.open.close()

    def passes(self, budget: float) -> None:
        """Copy while the writers run, until another pass would hardly shorten the pause. Raises PreconditionError
        if the pause can't fit `budget` (seconds)."""
        before = None
        for number in range(1, PASSES + 1):
            for part in self.parts:
                now = part.walk(tree.no_tick)
                self._watch(part, now)
                part.update(now, self._volatile(self.mapped))
            # What this pass replaced would need the room a second time.
            with tree.open_tree(f"sets/{self.birth.set_id}/attic", dir_fd=self.store.fd, unlock=True) as attic:
                tree.remove_content(attic)
            # Else the copies of the pause would have to wait until these are on the disk.
            tree.syncfs(self.store.fd)
            expected, variable, unsettled_s = self._predict()
            enough = variable < 0.02 or (before is not None and expected > 0.7 * before)
            if enough or number == PASSES:
                break
            before = expected
            # What was written within the last two seconds must be copied again whatever comes: let it settle.
            time.sleep(min(unsettled_s, 2.1))
        for part in self.parts:
            part.mirror.flush = None
            part.mirror.step = lambda _: None
        if expected > budget:
            raise PreconditionError(
                f"the writers would have to be held for about {expected:.1f} s, and may be for {budget:g} s",
                object=self.birth.node,
                cure=f"allow more (--budget {int(expected * 2) + 1}s), or stop the node for the copy (--quiesce stop)",
            )

    def _predict(self) -> tuple[float, float, float]:
        """(how long `create` would take now, the part of it that another pass may save, how long until what is
        unsettled is not), seconds."""
        fixed, variable, wait = OVERHEAD_S, 0.0, 0.0
        clock = time.time_ns()
        for part in self.parts:
            now = part.walk(tree.no_tick)
            mirror = part.mirror
            is_volatile = self._volatile(self.mapped)
            files = size = 0
            for path, entry in now.items():
                if stat.S_ISDIR(entry.mode):
                    fixed += 0.00005
                    continue
                if not mirror.stale(path, entry, stat.S_ISREG(entry.mode) and is_volatile(entry)):
                    continue
                files += 1
                old = mirror.have.get(path)
                if old is not None and old.entry == entry:
                    wait = max(wait, (entry.ctime_ns + SETTLED_NS - clock) / 1e9)
                # A clone costs what must be written back first; a copy all of the file.
                size += max(0, entry.size - (old.entry.size if old else 0)) if mirror.clones else entry.size
            costs = mirror.costs
            rate = costs.bytes / costs.bytes_s if costs.bytes > 8 << 20 else 100e6
            each = costs.files_s / costs.files if costs.files else 0.0002
            fixed += 2 * part.walk_s
            variable += files * each + size / rate
        return fixed + variable, variable, wait

    @staticmethod
    def _volatile(mapped: frozenset[tuple[int, int]]) -> Callable[[tree.Entry], bool]:
        return lambda entry: (entry.dev, entry.ino) in mapped

    def _watch(self, part: Part, now: Mapping[str, tree.Entry]) -> None:
        """Progress, and the floor of free space, kept also when `check` foresaw less."""
        total = sum(entry.size for entry in now.values() if stat.S_ISREG(entry.mode))
        size, _ = room_fd(self.store.fd)
        reserve = int(size * self.settings.floor)
        done = looked = 0

        def step(count: int) -> None:
            nonlocal done, looked
            done += count
            looked -= count
            if looked <= 0:
                looked = 16 << 20
                _, free = room_fd(self.store.fd)
                if free < reserve:
                    raise StorageError(
                        f"less than {self.settings.floor:.0%} of the store's file system is free",
                        object=self.store.path,
                        cure="free some space, lower `floor`, or " + STORE_CURE,
                    )
            self.settings.report(Progress("copying", done, max(done, total)))

        part.mirror.step = step

    def fix(self, hold: Hold, tick: Callable[[], None]) -> None:
        """The part inside the quiesce."""
        at = f"sets/{self.birth.set_id}"
        for part in self.parts:
            # All goes by the descriptor from the first pass: is that directory still what stands at the path?
            if not os.path.samestat(os.fstat(part.mirror.source.top), os.stat(part.top)):
                raise PreconditionError("was replaced by another directory", object=part.top, cure="take it again")
        walks = [part.walk(tick) for part in self.parts]
        is_volatile = self._volatile(self.mapped | hold.mapped)
        members: dict[str, Any] = {}
        for part, now in zip(self.parts, walks, strict=True):
            part.mirror.tick = tick
            part.update(now, is_volatile, last=True)
        for part, now in zip(self.parts, walks, strict=True):
            changed = tree.difference(now, part.walk(tick))
            if changed is not None or now.keys() != part.mirror.have.keys():
                file = os.path.join(part.top, changed or "")
                raise PreconditionError(
                    f"something that isn't paused writes to {file!r}",
                    object=file,
                    cure=f"find it (fuser -v {part.top}) and end it, name the node's unit, or use --quiesce stop",
                )
        for part, now in zip(self.parts, walks, strict=True):
            text = "".join([part.mirror.have[path].line + "\n" for path in now]).encode()
            fd = os.open(
                f"{at}/{part.number}/manifest", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.store.fd
            )
            with open(fd, "wb") as file_out:
                file_out.write(text)
            files = {(e.dev, e.ino): e.size for e in now.values() if stat.S_ISREG(e.mode)}
            members[str(part.number)] = {
                "size_bytes": sum(files.values()),
                "files": len(files),
                "manifest_bytes": len(text),
                "reach": permissions.reach(part.top),
            }
        image = {"order": self.store.next_order(), "members": members}
        write_object(f"{at}/image.json", image, self.store.fd, durable=False)


#: What this process makes, through whichever instance: our own lock isn't another run's. (Nor a forked child's.)
MAKING: dict[str, Making] = {}


def own(set_id: str) -> Making | None:
    making = MAKING.get(set_id)
    return making if making is not None and making.pid == os.getpid() else None


def leave_stores_out(noted: set[str]) -> Callable[[int, str], bool]:
    """For a walk: a store of copies is no data of a node, also if another node's copies lie below this one's top."""

    def leave_out(fd: int, path: str) -> bool:
        if not is_store(fd):
            return False
        noted.add(path)
        return True

    return leave_out


def mount_points(top: str) -> set[str]:
    """Where other volumes begin below `top`, relative to it."""
    return {os.path.relpath(mount.path, top) for mount in mounts.mounts_below(top)}
