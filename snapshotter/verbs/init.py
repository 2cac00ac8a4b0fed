"""init: look at a data path, find what can be found, and print (or write) the node's part of the config. Where there is
no node yet, on the machine that is to be the next one, a set of it says what it was (`recall`)."""

from __future__ import annotations

import os
import pwd
import re
from typing import Any

from snapshotter.core.errors import NotFoundError, PreconditionError, UsageError
from snapshotter.core.model import SnapshotSet
from snapshotter.host import mounts, processes
from snapshotter.host.places import host_name, same_host
from snapshotter.nodes import config, profiles, rpc
from snapshotter.nodes.target import canonical, resolve
from snapshotter.provider import load
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
    toml = config.to_toml(config.make_node(node.name, found, data))
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
        "set_id": None,
        "restore": None,
    }


def recall(session: Session, selector: str, *, kind: str | None = None, write: str | None = None) -> dict[str, Any]:
    """As `init`, of the node that a set was taken of, on whatever host: a full id, or `latest:NODE`, the newest good
    set of the node of that name. Reads what all providers list; the data path needn't be there.

    `restore` in the answer is the command that then brings it back. Raises NotFoundError, UsageError (nodes of that
    name on several hosts), PreconditionError (its paths had no room in its record)."""
    found = _recalled(session, selector)
    birth = found.birth
    if not birth.paths_known:
        cure = "write the config by hand"
        raise PreconditionError("its record had no room for its paths", object=found.set_id, cure=cure)
    if birth.node in session.config.nodes:
        raise UsageError("is in the config already", object=birth.node, cure="restore it")
    known: dict[str, Any] = {"path": birth.path, "profile": birth.profile}
    if kind:
        known["type"] = kind
    providers = sorted({member.provider for member in birth.members})
    if (store := session.options.get("store")) and "store" in load(providers[0]).OPTIONS:
        known["store"] = os.path.abspath(os.path.expanduser(str(store)))  # its restore must find it too
    outside = [root.path for root in birth.roots[1:] if not mounts.is_under(root.path, birth.path)]
    toml = config.to_toml(config.make_node(birth.node, known, found.set_id))
    command = f"snapshotter restore {found.set_id} --in-place"
    command += "" if same_host(birth.host, host_name()) else " --from-host"
    toml += f"# as {found.set_id} of {birth.host} says; to bring it back: {command}\n"
    if outside:
        toml += f"# it had other directories too: {', '.join(outside)}\n"
    if write:
        _append(write, toml)
    return {
        "node": birth.node,
        "found": {**known, "provider": ", ".join(providers)},
        "why": f"{found.set_id} says so",
        "toml": toml,
        "written": write,
        "set_id": found.set_id,
        "restore": command,
    }


def _recalled(session: Session, selector: str) -> SnapshotSet:
    word, _, name = selector.partition(":")
    entries = session.catalog()
    if word != "latest":
        return entries.pick(selector, from_host=True)
    good = [found for found in entries.sets if found.good and (not name or found.birth.node == name)]
    if not good:
        gone = ", ".join(each.provider for each in entries.unavailable)
        cure = "`snapshotter list` shows what there is" + (f"; not asked: {gone}" if gone else "")
        raise NotFoundError("there is no good set", object=selector, cure=cure)
    newest = {found.birth.target: found for found in good}  # oldest first: the last of each stays
    if len(newest) > 1:
        some = ", ".join(f"{found.set_id} of {found.birth.node} on {found.birth.host}" for found in newest.values())
        raise UsageError(f"is of several nodes: {some}", object=selector, cure="give the full id of one")
    return good[-1]


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
