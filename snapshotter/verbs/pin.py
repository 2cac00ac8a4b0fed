"""pin and unpin: keep a set whatever happens, or stop keeping it."""

from __future__ import annotations

from typing import Any

from snapshotter.host.locks import Locks
from snapshotter.verbs import open_restores
from snapshotter.verbs.documents import set_document
from snapshotter.verbs.session import Session


def pin(session: Session, selector: str, *, pinned: bool, from_host: bool = False) -> dict[str, Any]:
    """Pin or unpin the set; returns its document. Pinned twice is fine."""
    found = session.select(selector, careful=True, from_host=from_host)
    with Locks([f"set:{found.set_id}"]):  # a delete that has checked already would not see the pin
        open_restores.refuse(session, found.birth.target)
        for provider in session.providers_of(found):
            provider.mark(found.set_id, {"pinned": "1" if pinned else None})
    return set_document(session.catalog(found.set_id).pick(found.set_id, from_host=from_host))
