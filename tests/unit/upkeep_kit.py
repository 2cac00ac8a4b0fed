"""A session over stores in memory, and a clock that a test sets: what tick and prune do, seen at the storage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from snapshotter import catalog
from snapshotter.core.model import Birth, Hold, Member, Root, SnapshotSet, compact_time, new_set_id
from snapshotter.host.places import host_name
from snapshotter.nodes import config
from snapshotter.nodes.config import Node
from snapshotter.nodes.target import target_id
from snapshotter.provider import Provider, Settings
from snapshotter.testing.memory import MemoryProvider, MemoryStore
from snapshotter.verbs.session import Session

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)  # a Sunday
#: Every module that asks what time it is.
CLOCKS = [f"snapshotter.verbs.{name}.utc_now" for name in ("take", "prune", "reap", "tick", "slots", "verify")]


class MemorySession(Session):
    """Whose providers are these instances, by name."""

    instances: dict[str, Provider] = {}  # noqa: RUF012 msgspec copies it

    def provider(self, name: str, node: Node | None = None, *, chosen: bool = True) -> Provider:
        return self.instances[name] if name in self.instances else super().provider(name, node, chosen=chosen)

    def everywhere(self, node: Node | None = None) -> tuple[list[Provider], list[catalog.Unavailable]]:
        return list(self.instances.values()), []


class World:
    """One store, one host, nodes with a file each; `now` is what the clock says."""

    def __init__(self, tmp: Path, nodes: str = 'every = "24h"\nat = "02:00"\nkeep = {daily = 7}', count: int = 1):
        self.tmp = tmp
        self.now = NOON
        self.store = MemoryStore()
        text = f'state = "{tmp}/state"\n'
        for number in range(count):
            path = tmp / f"data-{number}"
            path.mkdir()
            (path / "file").write_text(f"content of {number}")
            self.store.add_volume(str(path))
            text += f'[node.n{number}]\npath = "{path}"\nprovider = "memory"\n{nodes}\n'
        self.config = config.parse(text, "test")
        self.target = target_id(self.config.nodes["n0"].path)

    def provider(self) -> Provider:
        return MemoryProvider(Settings(str(self.tmp / "state"), floor=0.0), self.store)

    def session(self, provider: Provider | None = None) -> Session:
        return MemorySession(self.config, instances={"memory": provider or self.provider()})

    @contextmanager
    def clock(self) -> Iterator[None]:
        with mock.patch.multiple("os", environ={**__import__("os").environ, "SNAPSHOTTER_RUN": str(self.tmp / "run")}):
            patches = [mock.patch(name, lambda: self.now) for name in CLOCKS]
            for patch in patches:
                patch.start()
            try:
                yield
            finally:
                for patch in patches:
                    patch.stop()

    def pass_by(self, **span: float) -> None:
        self.now += timedelta(**span)

    def sets(self, number: int = 0) -> list[SnapshotSet]:
        target = target_id(self.config.nodes[f"n{number}"].path)
        return self.session().catalog().of_target(target)

    def slots(self, number: int = 0) -> list[str]:
        """The slots of the sets that are sealed."""
        return [found.birth.slot for found in self.sets(number) if found.sealed]

    def take(self, moment: datetime, *, number: int = 0, slot: str = "", host: str = "", **marks: str) -> str:
        """A set as a take at that moment would have left it; sealed and good unless `marks` say otherwise."""
        path = self.config.nodes[f"n{number}"].path
        volume = self.store.add_volume(path)
        birth = Birth(
            set_id=new_set_id(moment),
            target=target_id(path),
            node=f"n{number}",
            host=host or host_name(),
            profile="generic",
            roots=(Root(path, 0),),
            members=(Member("memory", volume.id),),
            taken_at=moment,
            deadline=moment + timedelta(seconds=5),
            slot=slot,
        )
        provider = self.provider()
        provider.create([volume], birth, Hold())
        given: dict[str, Any] = {"sealed": compact_time(moment), "grade": "filesystem"}
        given |= {name.replace("_", "-"): value for name, value in marks.items()}
        if given.pop("unsealed", None) is None:
            provider.mark(birth.set_id, given)
        return birth.set_id
