"""init: look at a data path, find what can be found, and print (or write) the node's part of the config."""

from __future__ import annotations

import os
import pwd
import re
from typing import Any

from snapshotter.core.errors import PreconditionError, UsageError
from snapshotter.host import mounts, processes
from snapshotter.nodes import config, profiles, rpc
from snapshotter.nodes.target import canonical, resolve
from snapshotter.verbs import plan as planning
from snapshotter.verbs.session import Session


def init(session: Session, path: str, *, kind: str | None = None, write: str | None = None) -> dict[str, Any]:
    """Find profile, unit, owner, RPC and provider of the node at `path`; returns the TOML and what was found. `kind` is
    validator, rpc or archive. `write` is the config file to append to: made if it isn't there, written whole or not at
    all, refused if the node is in it already."""
    node = resolve(path, session.config)
    if node.name in session.config.nodes:
        raise UsageError("is in the config already", object=node.name, cure="edit the config instead")
    data = canonical(node.path)
    if data == "/":
        raise UsageError("can't be a data path", object=data, cure="give the node's own directory")
    profile, why = profiles.detect(data, session.config.profiles)
    provider, _ = planning.nearest(session, node, data, mounts.mount_of(data))
    found: dict[str, Any] = {"path": data, "profile": profile.name}
    if kind:
        found["type"] = kind
    unit = _unit(data)
    if unit:
        found["unit"] = unit
    if profile.health.rpc and rpc.height(profile.health.rpc, 2.0)[0] is not None:
        found["rpc"] = profile.health.rpc
    owner = _user(os.stat(data).st_uid)
    if owner and owner != "root":
        found["owner"] = owner
    toml = config.to_toml(config.Node(name=node.name, **found))
    if not kind:
        toml += '# type = "validator"    # or "rpc", "archive": presets schedule and retention\n'
    toml += f"# provider: {provider.name} serves this path now (found at each take unless named here)\n"
    if write:
        _append(write, toml)
    return {
        "node": node.name,
        "found": {**found, "provider": provider.name},
        "why": why,
        "toml": toml,
        "written": write,
    }


def usual_config() -> str:
    """The config file that `--write` makes when none is named: the first that a run of this user reads."""
    return config.usual_files()[0]


def _user(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _unit(path: str) -> str | None:
    """The systemd service whose process writes under `path`, if one does."""
    for writer in processes.scan([path]).writers:
        try:
            with open(f"/proc/{writer.pid}/cgroup", encoding="utf-8") as file:
                match = re.search(r"/([^/\n]+\.service)\s*$", file.read(), re.MULTILINE)
        except OSError:
            continue
        if match and not match[1].startswith("user@"):
            return match[1]
    return None


def _append(path: str, toml: str) -> None:
    old = ""
    try:
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                old = file.read()
        new = f"{old.rstrip()}\n\n{toml}" if old.strip() else toml
        config.parse(new, path)  # what would not load is not written
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        temporary = f"{path}.new"
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        if old:
            os.chmod(temporary, os.stat(path).st_mode & 0o777)
        os.replace(temporary, path)
    except OSError as error:
        said = f"can't write it: {error.strerror}"
        raise PreconditionError(said, object=path, cure="--config names another") from None
