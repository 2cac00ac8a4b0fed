"""tick: what is to be done now for each node, and no more: take what is due, move on what is pending, note what the
storage says of it (level 0), prune, reap, report. All its memory is the labels (and, as a cache, when a set could last
not be proven), so it may run every minute, late, twice at once, on two hosts, or be killed anywhere: the next one goes
on.

It never waits for an upload. The catalog is read once for all nodes; what is changed is looked at again, by itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from msgspec import Struct

from snapshotter.catalog import Catalog
from snapshotter.core.errors import (
    BusyError,
    JudgedBadError,
    PreconditionError,
    SnapshotterError,
    StorageError,
    foreseen,
)
from snapshotter.core.model import SnapshotSet, State, compact_time, parse_compact_time, utc_now
from snapshotter.host.locks import Locks
from snapshotter.host.places import host_name, private_directory, replace_file, same_host
from snapshotter.nodes import schedule
from snapshotter.nodes.config import Node
from snapshotter.nodes.target import target_of
from snapshotter.provider import resume
from snapshotter.verbs import notify, plan_outside, prune, slots, verify
from snapshotter.verbs.documents import when
from snapshotter.verbs.reap import reap
from snapshotter.verbs.session import Session
from snapshotter.verbs.take import take_node

#: Nodes of a fleet at once: a store far away answers slowly, and its bucket isn't emptied faster by more (CLOUD.md).
AT_ONCE = 16

#: How a due node is taken: (session, node, slot, owed_s) -> the document of `take`. `owed_s`: for how long a set has
#: been due, seconds since the first scheduled time after the newest; None where there is no set yet.
Take = Callable[[Session, Node, str, float | None], dict[str, Any]]


def take_here(session: Session, node: Node, slot: str, owed_s: float | None = None) -> dict[str, Any]:
    """The usual way."""
    return take_node(session, node, slot=slot)


class Run(Struct):
    """One tick: what all nodes share. `end` is monotonic seconds, or None."""

    session: Session
    entries: Catalog
    end: float | None
    take: Take
    slot: str = ""
    failed: list[dict[str, Any]] = []
    errors: list[SnapshotterError] = []
    left: list[str] = []
    notes: list[str] = []

    def in_time(self, what: str) -> bool:
        """Whether there is time to begin something; if not, it is said to be left."""
        if self.end is None or time.monotonic() < self.end:
            return True
        self.left.append(what)
        return False

    def fail(self, node: str | None, step: str, error: SnapshotterError, set_id: str | None = None) -> None:
        self.errors.append(error)
        self.failed.append({"node": node, "step": step, "set_id": set_id, **error.as_json()})


def tick(
    session: Session,
    nodes: Sequence[Node],
    *,
    deadline_s: float | None = None,
    take: Take = take_here,
    slot: str = "",
) -> tuple[dict[str, Any], list[SnapshotterError]]:
    """Do what is due for these nodes. `deadline_s`: nothing is begun after so many seconds. `slot`: the scheduled time
    that is due, as whoever asks for it says, instead of the nodes' own. Returns the document and the errors behind its
    `failed`: one node's failure doesn't stop the others."""
    run = Run(session, Catalog([], []), None if deadline_s is None else time.monotonic() + deadline_s, take, slot)
    run.notes += resume()
    run.entries = session.catalog()
    by_target: dict[str, list[SnapshotSet]] = {}
    for found in run.entries.sets:
        by_target.setdefault(found.birth.target, []).append(found)
    # A set of a node that is seen from outside may have been taken by the node itself: as another target.
    by_name: dict[str, list[SnapshotSet]] = {}
    for found in run.entries.sets:
        by_name.setdefault(found.birth.node, []).append(found)
    work = [
        (node, by_name.get(node.name, []) if node.select is not None else by_target.get(target_of(node), []))
        for node in nodes
    ]
    here = [(node, sets) for node, sets in work if node.select is None]
    away = [(node, sets) for node, sets in work if node.select is not None]
    entries = [_node(run, node, sets) for node, sets in here]
    if len(away) > 1:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                entries += pool.map(lambda pair: _node(run, *pair), away)
            except BaseException:  # a signal: those that haven't begun don't
                run.end = 0.0
                raise
    else:
        entries += [_node(run, node, sets) for node, sets in away]
    advanced, reaped = _everything(run)
    gone = [{"provider": entry.provider, "reason": entry.reason} for entry in run.entries.unavailable]
    return {
        "nodes": entries,
        "advanced": advanced,
        "reaped": reaped,
        "failed": run.failed,
        "left": run.left,
        "unavailable": gone,
        "warnings": [
            *run.entries.notes,
            *run.notes,
            *(f"not asked: {entry['provider']}: {entry['reason']}" for entry in gone),
        ],
    }, run.errors


def _everything(run: Run) -> tuple[list[str], dict[str, Any] | None]:
    """What isn't one node's: what the stores do in their own time, and what dead runs left."""
    advanced: list[str] = []
    for provider in run.session.everywhere()[0]:
        if run.in_time(f"{provider.name}: advance"):
            try:
                advanced += provider.advance()
            except Exception as error:
                run.fail(None, "advance", foreseen(error, provider.name))
    if not run.in_time("reap"):
        return advanced, None
    try:
        return advanced, reap(run.session, run.entries)
    except Exception as error:
        run.fail(None, "reap", foreseen(error, "reap"))
        return advanced, None


def _node(run: Run, node: Node, sets: list[SnapshotSet]) -> dict[str, Any]:
    """All that is to be done for one node; `sets` are its own, or have its name where it is seen from outside. Oldest
    first."""
    entry: dict[str, Any] = {
        "node": node.name,
        "target": target_of(node),
        "slot": None,
        "due": False,
        "taken": None,
        "busy": None,
        "next_at": None,
        "pending": [found.set_id for found in sets if found.state is State.PENDING],
        "damaged": [found.set_id for found in sets if found.state is State.DAMAGED],
        "verified": None,
        "removed": [],
    }
    try:
        _serve(run, node, sets, entry)
    except Exception as error:
        run.fail(node.name, "tick", foreseen(error, node.name))
    _tell(run, node, entry)
    return entry


def _serve(run: Run, node: Node, sets: list[SnapshotSet], entry: dict[str, Any]) -> None:
    own = sets
    if node.select is not None:
        wanted: set[str] = set()
        with suppress(SnapshotterError):  # the take, which is due then, tells why
            wanted = plan_outside.disks_of(run.session, node) if sets else wanted
        own = [found for found in sets if plan_outside.is_of(found, wanted)]
    slot, owed_s = run.slot, None
    if node.every is not None:
        now = utc_now()
        slot = slot or compact_time(schedule.due(node.every, node.at, now))
        entry["next_at"] = when(schedule.next_after(node.every, node.at, now))
        if (newest := next((found for found in reversed(own) if slots.counts(found)), None)) is not None:
            owed_s = (now - schedule.next_after(node.every, node.at, newest.birth.taken_at)).total_seconds()
    if slot:
        entry |= {"slot": slot, "due": is_due(own, slot)}
        if entry["due"]:
            run.notes += notify.ping(node, "start")
            _take(run, node, slot, owed_s, entry)
    _verify(run, node, own, entry)
    _prune(run, node, [found for found in sets if found.birth.target == entry["target"]], entry)


def _tell(run: Run, node: Node, entry: dict[str, Any]) -> None:
    """A failure, every time; a success, where something was taken."""
    failed = [failure for failure in run.failed if failure["node"] == node.name]
    if failed:
        lines = [f"{failure['step']}: {failure['object'] or node.name}: {failure['message']}" for failure in failed]
        run.notes += notify.ping(node, "fail", "\n".join(lines))
        run.notes += notify.people(node, f"snapshotter: {node.name}: {failed[0]['step']} failed", "\n".join(lines))
    elif entry["taken"] is not None:
        run.notes += notify.ping(node, "success", entry["taken"]["set_id"])


def is_due(sets: Sequence[SnapshotSet], slot: str) -> bool:
    """Whether no set has this slot, and none that has is being made now."""
    return not any(found.birth.slot == slot and (slots.counts(found) or slots.being_made(found)) for found in sets)


def _take(run: Run, node: Node, slot: str, owed_s: float | None, entry: dict[str, Any]) -> None:
    if not run.in_time(f"{node.name}: take {slot}"):
        error = StorageError("was due, and the deadline came first", object=node.name, cure="the next tick takes it")
        run.fail(node.name, "take", error)
        return
    try:
        entry["taken"] = run.take(run.session, node, slot, owed_s)
        run.notes += [f"{node.name}: {warning}" for warning in entry["taken"]["warnings"]]
        if entry["taken"]["state"] == State.PENDING:
            entry["pending"].append(entry["taken"]["set_id"])
    except BusyError as error:  # another run is at it, or a restore is open: `status` tells when that lasts
        entry["busy"] = error.line()
    except SnapshotterError as error:
        run.fail(node.name, "take", error)


def _verify(run: Run, node: Node, sets: list[SnapshotSet], entry: dict[str, Any]) -> None:
    """Write down level 0 of the newest good set, if nothing is written there yet; and prove it to the policy's level
    where the policy says how often and the data path is here. A newest set that is damaged is a failure."""
    newest = next((found for found in reversed(sets) if found.sealed and found.state is not State.PENDING), None)
    if newest is not None and newest.state is State.DAMAGED:
        run.fail(node.name, "verify", JudgedBadError(f"is damaged: {newest.why}", object=newest.set_id), newest.set_id)
    good = next((found for found in reversed(sets) if found.good), None)
    if good is None or not run.in_time(f"{node.name}: verify"):
        return
    try:
        # One at a time: another tick's proof may take hours, and is written down at its end.
        with Locks([f"verify:{target_of(node)}"]):
            _verify_due(run, node, sets, good, entry)
    except BusyError as error:
        run.left.append(f"{node.name}: verify: {error.line()}")
    except SnapshotterError as error:
        run.fail(node.name, "verify", error)


def _verify_due(run: Run, node: Node, sets: list[SnapshotSet], good: SnapshotSet, entry: dict[str, Any]) -> None:
    if (every := node.verify.every) is not None and node.select is None:
        # What said nothing of the image was an attempt too: it isn't made again every minute. A person's verify to a
        # lower level isn't what the policy asks for.
        asked = (each for each in sets if each.verified_level is None or each.verified_level >= node.verify.level)
        times = [parse_compact_time(text) for found in asked if (text := found.marks.get("verify-at"))]
        times += _tried(run.session, node)
        if not any(0 <= (utc_now() - last).total_seconds() < every for last in times):
            entry["verified"] = _prove(run, node)
    elif "verify-outcome" not in good.marks and same_host(good.birth.host, host_name()):
        with Locks([f"set:{good.set_id}"], exclusive=False):
            verify.prove_set(run.session, good, 0)
        entry["verified"] = {"set_id": good.set_id, "level": 0, "outcome": "ok"}


def _prove(run: Run, node: Node) -> dict[str, Any]:
    proof = verify.verify(run.session, node.name)
    if proof["outcome"] == "corrupt":
        raise JudgedBadError(
            f"is corrupt: {proof['why']}", object=proof["set_id"], cure="restore none but verified ones"
        )
    if proof["outcome"] != "ok" or proof["level"] < node.verify.level:
        _remember_try(run.session, node)
    if proof["outcome"] != "ok":
        why = proof["why"] or "; ".join(proof["warnings"])
        less = f", or ask for less: what can be had here is verify = {{level = {max(proof['level'], 1)}}}"
        raise PreconditionError(
            f"could not be proven to level {proof['wanted']}: {proof['outcome']}: {why}",
            object=proof["set_id"],
            cure="mend that" + (less if proof["outcome"] == "tool-missing" else ""),
        )
    return {key: proof[key] for key in ("set_id", "level", "outcome")}


def _tried(session: Session, node: Node) -> list[datetime]:
    """When this node's set could last not be proven as far as the policy asks. Its marks don't say so where an older
    judgement stands in them, or where a person's verify may have been it."""
    try:
        with open(_tried_at(session, node), encoding="ascii") as file:
            return [parse_compact_time(file.read())]
    except (OSError, ValueError):
        return []


def _remember_try(session: Session, node: Node) -> None:
    """Who may not write there tries again at the next tick."""
    with suppress(SnapshotterError):
        private_directory(session.config.state)
        replace_file(_tried_at(session, node), compact_time(utc_now()).encode(), 0o600)


def _tried_at(session: Session, node: Node) -> str:
    return os.path.join(session.config.state, f"tried-{target_of(node)}")


def _prune(run: Run, node: Node, sets: list[SnapshotSet], entry: dict[str, Any]) -> None:
    """By the list that the tick began with: what was taken since only adds to what stays."""
    planned = prune.plan_of(node, sets, automatic=True)
    if not planned.going or not run.in_time(f"{node.name}: prune"):
        return
    outcome = prune.Outcome()
    prune.carry_out(run.session, planned, outcome)
    entry["removed"] = [gone["set_id"] for gone in outcome.removed]
    run.notes += outcome.notes
    for error, failure in zip(outcome.errors, outcome.failed, strict=True):
        if isinstance(error, BusyError):
            run.left.append(f"{node.name}: prune: {error.line()}")
        else:
            run.fail(node.name, "prune", error, failure["set_id"])
