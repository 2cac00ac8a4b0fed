"""A cloud's scheduler as the caller: Lambda and Cloud Functions. One tick from outside the nodes.

The config is in SNAPSHOTTER_CONFIG_TOML, as on a host and often empty: the fleet is what is tagged (`Provider.tagged`).
Nothing is mounted and no writer is held here. With SNAPSHOTTER_FREEZE_BY_COMMAND=yes a due node that runs on an
instance is asked, where the cloud can (SSM), to take its own set, frozen; it then has the slot, and a later tick sees
it, or takes it from outside and fails. All is told by an exception only when everything else was done.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, StorageError, UsageError
from snapshotter.core.model import Tagged
from snapshotter.nodes import config
from snapshotter.nodes.config import Node
from snapshotter.provider import Provider
from snapshotter.verbs.documents import SCHEMA
from snapshotter.verbs.session import Session
from snapshotter.verbs.tick import Take, take_here, tick

_SOURCE = "SNAPSHOTTER_CONFIG_TOML"
_STATE = "/tmp/snapshotter"  # noqa: S108 the one place that a function may write to
_MARGIN_S = 30.0  # for what was begun last
_USUAL_S = 840.0
#: A node that was asked has this long. More than an hour: a tick that comes hourly asks once, and then it is over.
_GRACE_S = 3900.0


class TickFailed(Exception):
    """What the cloud's log and alarm see: one line for each failure. All else was done."""


def lambda_handler(event: Any, context: Any) -> dict[str, Any]:
    """AWS Lambda: a tick over the EBS fleet of this region. The event is a hint at most, and isn't read."""
    left_s = context.get_remaining_time_in_millis() / 1000 if context is not None else _USUAL_S
    return run("ebs", max(1.0, left_s - _MARGIN_S))


def gcf_handler(request: Any) -> str:
    """Google Cloud Functions, by HTTP or by a CloudEvent: a tick over the disks of this project."""
    import msgspec

    return msgspec.json.encode(run("gce", _USUAL_S)).decode()


def run(provider: str, deadline_s: float) -> dict[str, Any]:
    """One tick over all that this provider's tags and the config name. Returns its document; raises TickFailed when all
    is done and something failed, UsageError for a wrong config."""
    session = _session(provider)
    nodes, asked, wrong = _fleet(session, provider)
    document, errors = tick(session, nodes, deadline_s=deadline_s, take=_asking(asked) if _may_ask() else take_here)
    problems = [error.line() for error in [*wrong, *errors]]
    if problems:
        raise TickFailed("\n".join(problems))
    return {"schema": SCHEMA, **_brief(document)}


def _session(provider: str) -> Session:
    loaded = config.parse(os.environ.get(_SOURCE, ""), _SOURCE)
    region = loaded.aws.region or os.environ.get("AWS_REGION")
    project = loaded.gcp.project or os.environ.get("GOOGLE_CLOUD_PROJECT")
    loaded = replace(
        loaded, state=_STATE, aws=replace(loaded.aws, region=region), gcp=replace(loaded.gcp, project=project)
    )
    return Session(loaded, only=provider)


def _fleet(session: Session, name: str) -> tuple[list[Node], dict[str, str], list[SnapshotterError]]:
    """The nodes, what instance each is on, and those that can't be: the config's own, then those that tags name. A node
    of both has the config's policy and the tags' volumes."""
    given = session.config.nodes
    found: dict[str, Tagged] = {}
    wrong: list[SnapshotterError] = []
    twice: set[str] = set()
    there, partly = _tagged(session.provider(name))
    wrong += [partly] if partly is not None else []
    for each in there:
        twice |= {each.node} & set(found)
        found[each.node] = each
    nodes = {key: node for key, node in given.items() if node.select is not None}
    for key, tagged in found.items():
        if key in nodes:
            continue
        try:
            if key in twice:
                raise PreconditionError(
                    "is the name of volumes of two instances", object=key, cure="mend the tag snapshotter:node"
                )
            select = {"volumes": [volume.id for volume in tagged.volumes]}
            if key in given:
                nodes[key] = replace(given[key], provider=name, select=config.Select(volumes=tuple(select["volumes"])))
                continue
            # Where it is mounted isn't known out here.
            table: dict[str, Any] = {"path": f"/fleet/{key}", "provider": name, "select": select}
            if tagged.type:
                table["type"] = tagged.type
            nodes[key] = config.make_node(key, table, "tags")
        except SnapshotterError as error:
            wrong.append(error)
    wrong += [
        UsageError("has neither `select` nor tagged volumes", object=key, cure="tag them, or take it out of the config")
        for key in given
        if key not in nodes and key not in twice and partly is None
    ]
    session.config = replace(session.config, nodes=nodes)
    return list(nodes.values()), {key: tagged.instance for key, tagged in found.items() if tagged.instance}, wrong


def _tagged(provider: Provider) -> tuple[Sequence[Tagged], SnapshotterError | None]:
    """The fleet; and why that isn't all of it, where a driver raises with the nodes that are known for certain: a zone
    that is lost keeps no other's nodes from being taken."""
    try:
        return provider.tagged(), None
    except SnapshotterError as error:
        known: Sequence[Tagged] | None = getattr(error, "tagged", None)
        if known is None:
            raise
        return known, error


def _may_ask() -> bool:
    return os.environ.get("SNAPSHOTTER_FREEZE_BY_COMMAND", "").lower() in ("yes", "true", "1")


def _asking(instances: dict[str, str]) -> Take:
    """Have the node take it, frozen, and prune what it took, which its own policy keeps; where it can't be asked, or
    was and nothing came of it, from outside."""

    def take(session: Session, node: Node, slot: str, owed_s: float | None) -> dict[str, Any]:
        instance = instances.get(node.name)
        if instance is None or node.provider is None:
            return take_here(session, node, slot)
        # By this provider whatever lies above the disks: no other's snapshots are seen from here.
        argv = ["snapshotter", "tick", node.name, "--slot", slot, "--provider", node.provider, "--json"]
        if owed_s is not None and owed_s <= _GRACE_S:
            try:
                command = session.provider(node.provider, node).ask(instance, argv)
            except PreconditionError as error:
                document = take_here(session, node, slot)
                return {**document, "warnings": [*document["warnings"], f"{error.line()}; taken from outside"]}
            raise BusyError(f"was asked to take it, by command {command}", object=instance)
        why = "has no set yet" if owed_s is None else f"took no set, due for {owed_s / 60:.0f} minutes"
        cure = f"run `{' '.join(argv[:3])} --provider {node.provider}` on {instance}: it says why"
        try:
            document = take_here(session, node, slot)
        except PreconditionError as error:  # a grade is required that only the node reaches
            command = session.provider(node.provider, node).ask(instance, argv)
            why += f", and was asked by command {command}, as from outside it can't be taken: {error.line()}"
            raise StorageError(why, object=node.name, cure=cure) from None
        if owed_s is None or document["existing"]:
            return {**document, "warnings": [*document["warnings"], f"{why}; taken from outside"]}
        raise StorageError(f"{why}; taken from outside: {document['set_id']}", object=node.name, cure=cure)

    return take


def _brief(document: dict[str, Any]) -> dict[str, Any]:
    """What fits a function's answer: Lambda takes 6 MB, and a log line less."""
    nodes = document["nodes"]
    return {
        "nodes": len(nodes),
        "taken": [entry["taken"]["set_id"] for entry in nodes if entry["taken"] and not entry["taken"]["existing"]],
        "busy": [f"{entry['node']}: {entry['busy']}" for entry in nodes if entry["busy"]],
        "pending": sum(len(entry["pending"]) for entry in nodes),
        "removed": [set_id for entry in nodes for set_id in entry["removed"]],
        "advanced": document["advanced"],
        "left": document["left"],
        "warnings": document["warnings"],
    }
