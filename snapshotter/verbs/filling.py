"""How full the storage below a node is, and when it will be full at the rate measured.

The rate is from samples of earlier looks, in a small file of the state directory: a cache. Without it, or in a new
place, there is no rate until there are two looks an hour apart; nothing else is lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from snapshotter.core.errors import SnapshotterError
from snapshotter.core.model import Space, Volume
from snapshotter.host.places import private_directory, replace_file
from snapshotter.nodes.config import Node
from snapshotter.provider import Provider
from snapshotter.verbs.plan import Claim
from snapshotter.verbs.session import Session

#: Samples: not closer than this, kept for so long, and a rate wants this much time between the first and the last.
APART_S = 600.0
KEPT_S = 30 * 86400.0
LEAST_S = 3600.0
_PERCENT = " percent"

Samples = dict[str, list[tuple[float, float]]]


class Part(Struct, frozen=True):
    """One thing that can be full. `full` is 0 to 1; `limit` is where takes are refused or the storage gets in trouble.
    `full_in_s`: seconds until it is full at the measured rate; None if that isn't known, or it doesn't fill."""

    name: str
    full: float
    limit: float
    full_in_s: float | None = None


class Room(Struct, frozen=True):
    """What one provider says of a node's volumes. Bytes; None where the storage can't tell."""

    provider: str
    space: Space
    parts: tuple[Part, ...]

    def document(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "total_bytes": self.space.total_bytes,
            "free_bytes": self.space.free_bytes,
            "will_pin_bytes": self.space.will_pin_bytes,
            "parts": [
                {
                    "name": part.name,
                    "full": round(part.full, 4),
                    "limit": round(part.limit, 4),
                    "full_in_s": None if part.full_in_s is None else round(part.full_in_s),
                }
                for part in self.parts
            ],
        }


def rooms(claims: Sequence[Claim]) -> list[tuple[str, Space]]:
    """(provider, space) of the storage that a node's data lies on now. Raises any of core.errors."""
    volumes: dict[int, tuple[Provider, dict[str, Volume]]] = {}
    for claim in claims:
        volumes.setdefault(id(claim.provider), (claim.provider, {}))[1][claim.volume.key] = claim.volume
    return [(provider.name, provider.space(list(theirs.values()))) for provider, theirs in volumes.values()]


def judge(node: Node, provider: str, space: Space, samples: Samples, now_s: float) -> Room:
    """The parts of a space, each with its limit and when it will be full; `samples` gets today's."""
    full: dict[str, tuple[float, float]] = {}
    if space.total_bytes and space.free_bytes is not None:
        full["space"] = 1 - space.free_bytes / space.total_bytes, 1 - float(node.floor)
    for name, number in space.detail.items():
        if name.endswith(_PERCENT):
            full[name.removesuffix(_PERCENT)] = number / 100, 0.9
    parts = []
    for name, (share, limit) in full.items():
        seen = samples.setdefault(f"{node.name} {provider} {name}", [])
        seen[:] = [(when, what) for when, what in seen if now_s - KEPT_S <= when <= now_s]
        rate = (share - seen[0][1]) / (now_s - seen[0][0]) if seen and now_s - seen[0][0] >= LEAST_S else 0.0
        if not seen or now_s - seen[-1][0] >= APART_S:
            seen.append((now_s, share))
        # Less than a thousandth in all that time is what a storage breathes.
        filling = rate > 0 and share - seen[0][1] > 0.001
        parts.append(Part(name, share, limit, max(0.0, 1 - share) / rate if filling else None))
    return Room(provider, space, tuple(parts))


def load(session: Session) -> Samples:
    """Earlier looks. What can't be read is forgotten: it is a cache."""
    try:
        with open(_path(session), "rb") as file:
            return msgspec.json.decode(file.read(), type=Samples)
    except (OSError, msgspec.DecodeError):
        return {}


def save(session: Session, samples: Mapping[str, list[tuple[float, float]]]) -> None:
    """For the next look; one who may not write there does without. Two at once: one of them is kept."""
    try:
        private_directory(session.config.state)
        replace_file(_path(session), msgspec.json.encode(samples), 0o600)
    except SnapshotterError:
        return


def _path(session: Session) -> str:
    return os.path.join(session.config.state, "room.json")
