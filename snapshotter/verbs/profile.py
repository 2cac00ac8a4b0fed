"""profile: what snapshotter knows of a kind of node, or of the one found at a path."""

from __future__ import annotations

from typing import Any

import msgspec

from snapshotter.core.errors import NotFoundError
from snapshotter.nodes import profiles
from snapshotter.nodes.target import resolve
from snapshotter.verbs.plan import profile_of
from snapshotter.verbs.session import Session


def profile(session: Session, name_or_target: str | None = None) -> dict[str, Any]:
    """Without an argument all profiles; else the profile of this name, or that of this target and why."""
    known = profiles.load_all(session.config.profiles)
    if name_or_target is None:
        return {"profiles": [msgspec.to_builtins(entry) for entry in known.values()]}
    if name_or_target in known and "/" not in name_or_target:
        return {"profile": msgspec.to_builtins(known[name_or_target]), "why": None, "path": None, "version": None}
    try:
        node = resolve(name_or_target, session.config)
    except NotFoundError:
        if "/" not in name_or_target:
            profiles.get(name_or_target, session.config.profiles)  # raises with the nearest name
        raise
    found, why = profile_of(session, node)
    return {
        "profile": msgspec.to_builtins(found),
        "why": why,
        "path": node.path,
        "version": profiles.version_of(found, node.path),
    }
