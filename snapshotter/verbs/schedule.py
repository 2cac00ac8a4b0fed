"""schedule: let `tick` run by itself for a node, by this host's systemd or cron; show it; undo it."""

from __future__ import annotations

import os
import sys
from typing import Any

from snapshotter.core.command import run
from snapshotter.core.errors import NotFoundError, PreconditionError, UsageError
from snapshotter.host import schedules
from snapshotter.host.schedules import Installed, Schedule
from snapshotter.nodes.config import SYSTEM_FILE, Node
from snapshotter.nodes.target import resolve
from snapshotter.verbs.session import Session


def install(session: Session, name: str | None = None) -> dict[str, Any]:
    """Write and start a node's timer. Again is fine: the files follow the config. Raises UsageError (no such node, no
    `every`), PreconditionError (not root, nothing to do it with), StorageError."""
    node = _configured(session, name)
    _root()
    wanted = _schedule(session, node)
    outcome = run(["env", "-C", "/", *wanted.argv[: -len(_words(session, node))], "--version"], timeout=60.0)
    if not outcome.ok:
        raise PreconditionError(
            f"can't be run from / without this shell's environment: {outcome.said}",
            object=wanted.argv[0],
            cure="install snapshotter as the README says, then use that one",
        )
    return _document(session, node.name, node, schedules.install(wanted))


def show(session: Session, name: str | None = None) -> dict[str, Any]:
    """What is there, of one node or of all; changes nothing."""
    there = {found.node: found for found in schedules.installed()}
    nodes = session.config.nodes
    if name is not None:
        wanted = [name if name in there and name not in nodes else _configured(session, name).name]
    else:
        wanted = [*nodes, *(other for other in there if other not in nodes)]
    return {"schedules": [_document(session, node, nodes.get(node), there.get(node)) for node in wanted]}


def remove(session: Session, name: str | None = None, *, every: bool = False) -> dict[str, Any]:
    """Stop and remove a node's timer, or all of ours, also those of nodes that the config has no more. Absent is done.
    Raises NotFoundError (nothing has that name), BusyError (it runs now)."""
    there = [found.node for found in schedules.installed()]
    if every:
        wanted = sorted(set(there))
    elif name is not None and name in there:
        wanted = [name]  # also one that the config has no more
    else:
        try:
            wanted = [_configured(session, name).name]
        except UsageError as error:
            raise NotFoundError(error.message, object=error.object, cure=error.cure) from None
    if wanted:
        _root()
    return {"removed": [{"node": node, "files": schedules.remove(node)} for node in wanted]}


def _configured(session: Session, name: str | None) -> Node:
    node = resolve(name, session.config, must_exist=False)
    if node.name not in session.config.nodes:
        raise UsageError(
            "is no node of the config", object=node.path, cure=f"`snapshotter init {node.path} --write` makes it one"
        )
    return node


def _root() -> None:
    if os.geteuid() != 0:
        raise PreconditionError("a schedule is root's", object=schedules.UNITS, cure="run as root")


def _words(session: Session, node: Node) -> list[str]:
    source = session.config.source
    where = [] if source is None or source == SYSTEM_FILE else ["--config", os.path.abspath(source)]
    return ["tick", node.name, *where]


def _program() -> list[str]:
    """How this very snapshotter is started."""
    script = os.path.join(os.path.dirname(sys.executable), "snapshotter")
    return [script] if os.access(script, os.X_OK) else [sys.executable, "-m", "snapshotter"]


def _schedule(session: Session, node: Node) -> Schedule:
    if node.every is None:
        raise UsageError(
            "has no schedule", object=f"node.{node.name}", cure='set its type, or every = "24h", in the config'
        )
    words = _words(session, node)
    return Schedule(
        node=node.name,
        argv=(*_program(), *words),
        reap_argv=(*_program(), "reap", *words[2:]),
        every_s=float(node.every),
        at_min=None if node.at is None else int(node.at),
    )


def _document(session: Session, name: str, node: Node | None, found: Installed | None) -> dict[str, Any]:
    every = None if node is None or node.every is None else float(node.every)
    current = None
    if node is not None and every is not None and found is not None:
        current = all(_same(path, text) for path, text in _schedule(session, node).texts(found.kind).items())
    return {
        "node": name,
        "every_s": None if every is None else round(every),
        "at": None if node is None or node.at is None else node.at.text(),
        "kind": None if found is None else found.kind,
        "files": [] if found is None else list(found.files),
        "current": current,
        "active": found is not None and found.active,
        "why": None if found is None else found.why or None,
        "next_at": None if found is None else found.next_at or None,
    }


def _same(path: str, text: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read() == text
    except OSError:
        return False
