"""providers: which provider serves a path, and why the others don't."""

from __future__ import annotations

from typing import Any

from snapshotter import provider as table
from snapshotter.core.errors import SnapshotterError
from snapshotter.host import mounts
from snapshotter.nodes.config import Node
from snapshotter.nodes.target import canonical, resolve
from snapshotter.verbs import plan as planning
from snapshotter.verbs.session import Session


def providers(session: Session, target: str | None = None) -> dict[str, Any]:
    """Every provider: can it work on this machine, would it claim the path, does it serve it; each no with its
    reason."""
    node = resolve(target, session.config) if target is not None else None
    path = canonical(node.path) if node is not None else ""
    mount = mounts.mount_of(path) if path else None
    serves, refusal = None, None
    if node is not None and mount is not None:
        try:
            serves = planning.nearest(session, node, path, mount)[0].name
        except SnapshotterError as error:
            refusal = error.line()
    return {
        "path": path or None,
        "fstype": mount.fstype if mount else None,
        "source": mount.source if mount else None,
        "serves": serves,
        "refusal": refusal,
        "providers": [_entry(session, name, node, path, mount, serves) for name in table.names()],
    }


def _entry(
    session: Session, name: str, node: Node | None, path: str, mount: mounts.Mount | None, serves: str | None
) -> dict[str, Any]:
    entry: dict[str, Any] = {"provider": name, "available": False, "claims": None, "serves": name == serves}
    try:
        instance = session.provider(name, node, chosen=False)
        reasons = instance.availability()
        entry["available"] = not reasons
        volume = instance.claim(mount, path) if mount is not None else None
    except SnapshotterError as error:
        return {**entry, "reason": error.line(), "volume": None}
    if mount is not None:
        entry["claims"] = volume is not None
        if volume is None:
            reasons = [*reasons, f"{mount.fstype} on {mount.source} is not its kind of storage"]
        elif serves is not None and name != serves:
            reasons = [*reasons, f"{serves} is nearer to the file system, or was asked for"]
    return {**entry, "reason": "; ".join(reasons) or None, "volume": volume.id if volume else None}
