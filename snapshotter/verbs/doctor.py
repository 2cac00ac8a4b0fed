"""doctor: what would hurt at three in the morning, found by day: all of `status`, and what only shows on the day of a
take or a restore (keys that others can read, a unit that isn't there, what a dead run left, a restore half done).

Changes nothing. Each finding has its cure.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from typing import Any, Literal

from msgspec import Struct

from snapshotter.core.errors import SnapshotterError
from snapshotter.core.journal import Journal
from snapshotter.core.model import State, utc_now
from snapshotter.host import block, mounts, quiesce, service
from snapshotter.host.places import host_name, same_host
from snapshotter.host.store import default_store
from snapshotter.nodes import config, identity
from snapshotter.nodes.config import Node
from snapshotter.nodes.roots import roots
from snapshotter.nodes.target import canonical, resolve
from snapshotter.provider import OpenSwap
from snapshotter.verbs import open_restores
from snapshotter.verbs import plan as planning
from snapshotter.verbs import schedule as scheduling
from snapshotter.verbs.documents import grouped, when
from snapshotter.verbs.identity import owner_of
from snapshotter.verbs.session import Session
from snapshotter.verbs.status import status

_UNSYNCHRONIZED = 5  # adjtimex(2): TIME_ERROR


class Finding(Struct, frozen=True):
    """`node` is None for what concerns the host. `advice` alone is no reason for exit 8."""

    node: str | None
    check: str
    message: str
    cure: str
    severity: Literal["critical", "warning", "unknown", "advice"] = "critical"

    def document(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "check": self.check,
            "severity": self.severity,
            "message": self.message,
            "cure": self.cure or None,
        }


def doctor(where: str | None, session: Session | SnapshotterError, target: str | None = None) -> dict[str, Any]:
    """Look at the host and every node of the config, or at one target. `session` is the error where the config could
    not be loaded (from `where`): then that is the finding. Raises NotFoundError, UsageError (the target)."""
    findings = list(_host())
    names: list[str] = []
    if isinstance(session, SnapshotterError):
        findings.insert(0, Finding(None, "config", session.line(), session.cure or "mend it"))
    else:
        nodes = list(session.config.nodes.values())
        if target is not None:
            nodes = [resolve(target, session.config, must_exist=False)]
        names = [node.name for node in nodes]
        findings += _config(session)
        findings += _leftovers(session)
        if nodes:
            seen = status(session, target)
            said = {found.message for found in findings}  # an interrupted restore is among the leftovers
            for entry in seen["nodes"]:
                findings += [
                    Finding(entry["node"], found["problem"], found["message"], found["cure"] or "", found["severity"])
                    for found in entry["problems"]
                    if found["message"] not in said
                ]
        for node in nodes:
            findings += _node(session, node)
    # What keeps the next take from being made may be found twice.
    unique = list({(found.node, found.message): found for found in findings}.values())
    return {
        "checked_at": when(utc_now()),
        "config": where if isinstance(session, SnapshotterError) else session.config.source,
        "nodes": names,
        "ok": all(found.severity == "advice" for found in unique),
        "findings": [found.document() for found in unique],
    }


def _host() -> Iterator[Finding]:
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))  # all zero: only asks
    except (OSError, AttributeError):
        state = 0
    if state == _UNSYNCHRONIZED:
        why = "the clock is not synchronized: sets are named and pruned by it"
        yield Finding(None, "clock", why, "run chrony, systemd-timesyncd or ntpd", "warning")
    for held in quiesce.leftovers():
        yield Finding(None, "leftover", f"a dead run still holds a node: {held}", "snapshotter reap")


def _config(session: Session) -> Iterator[Finding]:
    source = session.config.source
    if source is None:
        yield Finding(
            None, "config", f"there is no config, looked for at {', '.join(config.usual_files())}",
            "snapshotter init PATH --write", "advice",
        )  # fmt: skip
        return
    found = os.stat(source)
    if found.st_mode & 0o022 or found.st_uid not in (0, os.geteuid()):
        why = f"{source} can be changed by others, and it names commands that run as you"
        yield Finding(None, "config", why, f"chown {os.geteuid()} {source}; chmod go-w {source}")


def _leftovers(session: Session) -> Iterator[Finding]:
    """What interrupted runs left: unsealed sets, half-made attachments, restores in place that are neither done nor
    undone."""
    entries = session.catalog()
    for found in entries.sets:
        past = utc_now() >= found.birth.deadline and same_host(found.birth.host, host_name())
        if found.state is State.INCOMPLETE and past and found.pinned:
            why = f"{found.set_id} was never sealed, and is pinned: it is kept"
            yield Finding(found.birth.node, "leftover", why, f"snapshotter unpin {found.set_id}, if unneeded", "advice")
        elif found.state is State.INCOMPLETE and past:
            why = f"{found.set_id} was never sealed: its run died"
            yield Finding(found.birth.node, "leftover", why, "snapshotter reap", "warning")
    for parts in grouped(tuple(entries.attachments)):
        if any(part.since is None for part in parts) and not any(part.held for part in parts):
            why = f"the attachment {parts[0].id} is half-made: its run died"
            yield Finding(None, "leftover", why, "snapshotter reap", "warning")
    yield from _restores(session)


def _restores(session: Session) -> Iterator[Finding]:
    """Those in place that a journal names; and, where all of them can be read, open swaps that none names."""
    swaps = _open_swaps(session)  # before the journals are read, as each is older than its swaps
    directory = open_restores.directory(session)
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        names = []
    except OSError as error:
        yield Finding(None, "restore", f"can't look into {directory}: {error.strerror}", "run as root", "unknown")
        return
    named: set[str] = set()
    for name in (name for name in names if name.endswith(".journal")):
        try:
            journal = Journal.load(os.path.join(directory, name))
        except SnapshotterError as error:
            yield Finding(None, "restore", error.what(), error.cure)
            swaps = []
            continue
        if journal is not None:
            named |= {swap["swap_id"] for swap in journal.facts.get("plan", {}).get("swaps", ())}
            yield from _open_restore(journal, os.path.join(directory, name))
    for provider, swap in swaps:
        if swap.id not in named:
            why = f"{swap.volume or provider}: what a restore in place set aside by swap {swap.id} waits still"
            cure = "bring that journal back, from the `state` or the host where the restore ran"
            if swap.by_hand:
                cure += f"; or, with the node stopped and nothing of it mounted: {swap.by_hand}"
            yield Finding(None, "swap", f"{why}, and no journal in {directory} names it", cure, "warning")


def _open_swaps(session: Session) -> list[tuple[str, OpenSwap]]:
    """(provider, swap) of each on this host's storage. A cloud has other hosts' as well, whose journals aren't here."""
    found: dict[tuple[str, str], OpenSwap] = {}
    for provider in session.everywhere()[0]:
        if not (provider.traits.swaps and provider.traits.needs_host):
            continue
        try:
            for each in provider.open_swaps():  # what is listed before an error counts; the error is the catalog's
                found[(provider.name, each.id)] = each
        except SnapshotterError:
            continue
    return [(name, each) for (name, _), each in found.items()]


def _open_restore(journal: Journal, where: str) -> Iterator[Finding]:
    path = str(journal.facts.get("path", where))
    if journal.has("restored") and not journal.has("undo", "returned"):
        cure = f"snapshotter restore --discard {path} once all is well"
        yield Finding(None, "restore", f"{path}: what a restore set aside still takes room", cure, "advice")
    else:
        cure = f"snapshotter restore --continue {path}, or --undo {path}"
        yield Finding(None, "restore", f"{path}: {open_restores.OPEN}", cure)


def _node(session: Session, node: Node) -> Iterator[Finding]:
    if node.select is not None:
        return
    try:
        plan = planning.make(session, node, now=utc_now())
    except SnapshotterError as error:
        yield Finding(node.name, "no-take", error.what(), error.cure)
    else:
        yield from (Finding(node.name, "take", note, "", "advice") for note in plan.layout.warnings)
    try:
        yield from _keys(session, node)
    except (SnapshotterError, OSError) as error:
        why = error.line() if isinstance(error, SnapshotterError) else f"{error.filename}: {error.strerror}"
        yield Finding(node.name, "key", f"can't look at its keys: {why}", "run as root", "unknown")
    if node.unit is not None:
        try:
            service.SystemdUnit(node.unit).running()
        except SnapshotterError as error:
            yield Finding(node.name, "unit", error.what(), error.cure or "mend `unit` in the config")
    yield from _same_disk(node)
    if node.name in session.config.nodes and scheduling.show(session, node.name)["schedules"][0]["current"] is False:
        why = "its timer is not what the config says now"
        yield Finding(node.name, "schedule", why, f"snapshotter schedule install {node.name}", "warning")


def _keys(session: Session, node: Node) -> Iterator[Finding]:
    """0600, and the node's own."""
    profile = planning.profile_of(session, node)[0]
    data = canonical(node.path)
    places = [(found.path, found.path) for found in roots(node, profile).roots]
    paths = identity.secret_files(places, profile, node.key_file)
    if node.key_file is not None and os.path.realpath(node.key_file) not in paths:
        paths.append(os.path.realpath(node.key_file))
    uid = owner_of(node, data)[0]
    for path in paths:
        found = os.stat(path)
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o077:
            yield Finding(node.name, "key", f"{path} can be read by others (mode {mode:04o})", f"chmod 600 {path}")
        if found.st_uid != uid:
            why = f"{path} belongs to user {found.st_uid}, the node's data to {uid}"
            yield Finding(node.name, "key", why, f"chown {uid} {path}", "warning")


def _same_disk(node: Node) -> Iterator[Finding]:
    """Only of copies in a store: a snapshot is always where its origin is."""
    if node.provider != "copy" and node.store is None:
        return
    store = node.store or str(node.options.get("store", "")) or default_store(canonical(node.path))
    while not os.path.exists(store):
        store = os.path.dirname(store)
    here, there = _disks(canonical(node.path)), _disks(store)
    if here & there:
        why = f"the store {store} is on the node's own disk: it survives a broken database, not a broken disk"
        yield Finding(node.name, "same-disk", why, "copy it elsewhere too, or name a store on another disk", "advice")


def _disks(path: str) -> set[str]:
    while not os.path.exists(path):
        path = os.path.dirname(path)
    number = block.number_of(mounts.mount_of(path).source)
    found = os.stat(path).st_dev
    return set(block.disks(number)) if number else {f"{os.major(found)}:{os.minor(found)}"}
