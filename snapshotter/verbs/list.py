"""list and show: the sets, and one set, as the storage has them now."""

from __future__ import annotations

from typing import Any

from snapshotter.nodes.target import resolve, target_of
from snapshotter.verbs.documents import set_document
from snapshotter.verbs.session import Session


def list_sets(session: Session, target: str | None = None) -> dict[str, Any]:
    """Every set, oldest first (of one target, if given), and the providers that could not be asked."""
    node = None
    wanted = None
    if target is not None:
        # The path may be gone: that is when somebody looks for its sets.
        node = resolve(target, session.config, must_exist=False)
        wanted = target_of(node)
    found = session.catalog(node=node)
    return {
        "sets": [set_document(entry) for entry in found.sets if wanted is None or entry.birth.target == wanted],
        "unavailable": [{"provider": gone.provider, "reason": gone.reason} for gone in found.unavailable],
        "warnings": found.notes,
    }


def show(session: Session, selector: str) -> dict[str, Any]:
    """One set. Another host's needs its full id only to be looked at."""
    return set_document(session.select(selector, from_host=True))
