"""restore --away: a set's volumes made for another machine, and attached to it. Nothing is mounted here, so nothing in
them is changed either: their keys and links are as they were taken.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from msgspec.structs import asdict

from snapshotter.core.interrupts import deferred
from snapshotter.core.model import new_attachment_id, utc_now
from snapshotter.core.undo import Undo
from snapshotter.host.locks import Locks
from snapshotter.verbs.restore import judge
from snapshotter.verbs.session import Session


def restore_away(session: Session, selector: str, *, from_host: bool = False) -> dict[str, Any]:
    """Make the set's volumes where the providers' options say. Returns the document; `volumes` says which they are.
    Raises NotFoundError, JudgedBadError (incomplete, damaged), PreconditionError (pending, no such storage)."""
    found = session.select(selector, from_host=from_host)
    session.fit_options(found)
    warnings = [*session.notes, *judge(found)]
    if found.marks.get("secrets") == "1":
        warnings.append("it holds the node's keys: never start it while the original runs with the same keys")
    attachment_id = new_attachment_id(utc_now())
    holding = {provider.name: provider for provider in session.providers_of(found)}
    volumes = []
    with (
        Locks([f"set:{found.set_id}"], exclusive=False),
        Undo(undo_command=f"snapshotter release {attachment_id}") as undo,
    ):
        for snapshot in found.snapshots:
            provider = holding[snapshot.provider]
            undo.push(f"attachment {attachment_id}", lambda provider=provider: provider.detach(attachment_id))  # type: ignore[misc]
            made = provider.attach_away(snapshot, attachment_id)
            volumes.append({"provider": snapshot.provider, "member": snapshot.birth.member, **asdict(made)})
        with deferred():
            for provider in holding.values():
                provider.settle(attachment_id, datetime.now(UTC))
            undo.commit()
    return {
        "set_id": found.set_id,
        "attachment_id": attachment_id,
        "path": None,
        "volumes": volumes,
        "roots": [{"origin": root.path, "member": root.member, "inside": root.inside} for root in found.birth.roots],
        "warnings": warnings,
    }
