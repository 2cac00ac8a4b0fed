"""Which node a command means by what it was given, and what identifies it. Must not know providers or verbs. Changes
nothing."""

from __future__ import annotations

import os
import re

from snapshotter.core.digest import sha256
from snapshotter.core.errors import NotFoundError, UsageError
from snapshotter.host import places
from snapshotter.nodes.config import NODE_NAME, Config, Node
from snapshotter.nodes.roots import check_directory


def canonical(path: str) -> str:
    """Absolute, without links, `.` and `..`; of a path that is gone, as far as it can be told."""
    return os.path.realpath(path)


def target_id(path: str) -> str:
    """16 hex that name a data path of this host: its name in the config, its path and a link to it are one target.
    Built from the machine's identity (not its name) and the canonical path."""
    host = places.host_name().rpartition("-")[2]
    return sha256(host.encode() + b"\0" + os.fsencode(canonical(path))).hexdigest()[:16]


def target_of(node: Node) -> str:
    """As `target_id`, of a node. One whose volumes are selected lies on no host that we are on: whoever takes it, it is
    the same."""
    if node.select is None:
        return target_id(node.path)
    return sha256(f"select\0{node.provider}\0{node.name}".encode()).hexdigest()[:16]


def resolve(name_or_path: str | None, config: Config, *, must_exist: bool = True) -> Node:
    """The node that a command means: its name, a path of a configured node, any other directory (then with the
    defaults, and a name from its last component), or None for the only node of the config. `must_exist=False` is
    for what works with a data path that is gone (list, restore).

    Raises UsageError (no target, not a directory), NotFoundError (unknown name, missing path), PreconditionError
    (no permission).
    """
    if name_or_path is None:
        if len(config.nodes) != 1:
            names = ", ".join(sorted(config.nodes))
            why = "the config has more than one node" if names else "the config has no node"
            cure = f"name one of: {names}" if names else "give a path, or write a config with `snapshotter init`"
            raise UsageError(f"no target given, and {why}", cure=cure)
        node = next(iter(config.nodes.values()))
    elif name_or_path in config.nodes:
        node = config.nodes[name_or_path]
    else:
        node = _by_path(name_or_path, config)
    if must_exist and node.select is None:
        check_directory(node.path)
    return node


def _by_path(given: str, config: Config) -> Node:
    if not given or "\0" in given:
        raise UsageError("is neither a node's name nor a path", object=repr(given))
    if "/" not in given and given not in (".", "..") and not os.path.isdir(given):
        from difflib import get_close_matches

        near = get_close_matches(given, list(config.nodes), 1)
        cure = f"did you mean {near[0]}?" if near else "give a node's name or a path"
        if config.nodes and not near:
            cure = f"one of: {', '.join(sorted(config.nodes))}; or a path"
        raise NotFoundError(f"no node is called {given!r}", object=given, cure=cure)
    path = canonical(given)
    for node in config.nodes.values():
        if canonical(node.path) == path:
            return node
    return Node(name=node_name(path), path=path)


def node_name(path: str) -> str:
    """A valid node's name from a path's last component; `node` where nothing of it can be kept."""
    last = os.path.basename(path.rstrip("/")).lower()
    name = re.sub(r"[^a-z0-9_.-]+", "-", last).lstrip("-_.")[:32].rstrip("-_.")
    return name if NODE_NAME.fullmatch(name) else "node"
