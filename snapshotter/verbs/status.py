"""status: is every node backed up as its config wants it, and will it be tomorrow?

Everything is read from the catalog, the storage and the host as they are now, never from what a run remembers having
done. The one thing kept is how full the storage was (`filling`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from msgspec import Struct

from snapshotter.core.errors import SnapshotterError, UsageError
from snapshotter.core.model import SnapshotSet, State, parse_compact_time, utc_now
from snapshotter.host import schedules
from snapshotter.host.schedules import Installed
from snapshotter.nodes import profiles
from snapshotter.nodes.config import Node
from snapshotter.nodes.target import resolve, target_of
from snapshotter.verbs import filling, open_restores, plan_outside
from snapshotter.verbs import plan as planning
from snapshotter.verbs.documents import when
from snapshotter.verbs.filling import Room
from snapshotter.verbs.session import Session

Severity = Literal["critical", "warning", "unknown"]

#: Every problem that there is, with how bad it is; alerting.md explains each.
PROBLEMS: dict[str, Severity] = {
    "stale": "critical",  # no good set, or the newest is older than one and a half periods
    "no-tick": "critical",  # nothing scheduled has made a set for two periods
    "no-timer": "critical",  # nothing on this host would make the next one
    "unverified": "warning",  # verify.every is over, at the policy's level or as far as there is anything to prove
    "corrupt": "critical",  # a verification found it so
    "damaged": "critical",  # a sealed set lost a member
    "full": "critical",  # the next take is refused, or the storage is in trouble
    "filling": "warning",  # full within a week, or two periods
    "no-take": "critical",  # what the next take would be refused for
    "ahead": "warning",  # a set from the future: a clock is, or was, wrong
    "unknown": "unknown",  # a storage that can't be asked
}
#: Clocks of two machines may differ so much.
_AHEAD = timedelta(minutes=5)
_SOON_S = 7 * 86400.0


class Problem(Struct, frozen=True):
    """One finding, with what can be done about it."""

    problem: str
    message: str
    cure: str = ""

    def document(self) -> dict[str, Any]:
        severity = PROBLEMS[self.problem]
        return {"problem": self.problem, "severity": severity, "message": self.message, "cure": self.cure or None}


def status(session: Session, target: str | None = None) -> dict[str, Any]:
    """Every node of the config, or one. `worst` is the worst severity, or null. Raises UsageError (no nodes)."""
    if target is None and not session.config.nodes:
        raise UsageError("the config has no nodes", cure="`snapshotter init PATH --write` adds one; or name a path")
    nodes = list(session.config.nodes.values())
    if target is not None:
        nodes = [resolve(target, session.config, must_exist=False)]
    now = utc_now()
    entries = session.catalog(node=nodes[0] if target is not None else None)
    timers = {found.node: found for found in schedules.installed()}
    samples = filling.load(session)
    documents, notes = [], list(entries.notes)
    for node in nodes:
        problems, found = [], []
        if node.select is None:
            sets = entries.of_target(target_of(node))
        else:  # the node itself, or a function, may have taken it
            named = [found for found in entries.sets if found.birth.node == node.name]
            wanted: set[str] = set()
            if any(found.birth.target != target_of(node) for found in named):
                try:
                    wanted = plan_outside.disks_of(session, node)
                except SnapshotterError as error:
                    problems.append(Problem("unknown", error.line()))
            sets = plan_outside.of_node(node, named, wanted)
        if node.select is None:  # off this host there is nothing to look at but the sets
            try:
                seen = planning.survey(session, node)
                spaces = filling.rooms(seen.claims)
                found = [filling.judge(node, name, space, samples, time.time()) for name, space in spaces]
                open_restores.refuse(session, target_of(node))
                planning.held(node, seen)
            except SnapshotterError as error:
                problems.append(Problem("no-take", error.what(), error.cure))
        timer = timers.get(node.name)
        bare = {name for name in {found.birth.profile for found in sets} if _is_bare(session, name)}
        notes += unproven(node, sets, now, bare)
        problems = [
            *of_sets(node, sets, now, bare),
            *of_timer(node, sets, timer, now),
            *of_rooms(node, found),
            *problems,
        ]
        documents.append(_document(node, sets, found, timer, problems, now))
    filling.save(session, samples)
    severities = {problem["severity"] for document in documents for problem in document["problems"]}
    worst = next((severity for severity in ("critical", "unknown", "warning") if severity in severities), None)
    return {
        "checked_at": when(now),
        "worst": worst,
        "nodes": documents,
        "unavailable": [{"provider": gone.provider, "reason": gone.reason} for gone in entries.unavailable],
        "warnings": notes,
    }


def of_sets(
    node: Node, sets: Sequence[SnapshotSet], now: datetime, bare: Collection[str] = (profiles.FALLBACK,)
) -> list[Problem]:
    """What is wrong with a target's sets (oldest first), by the node's policy. `bare`: profiles that name no database.
    Pure."""
    problems: list[Problem] = []
    goods = [found for found in sets if found.good and found.birth.taken_at <= now + _AHEAD]
    newest = goods[-1] if goods else None
    take = f"snapshotter take {node.name}"
    if newest is None:
        if node.every is not None or sets:
            problems.append(Problem("stale", "there is no good set", take))
    elif node.every is not None and (age := _age(newest, now)) > 1.5 * node.every:
        why = f"the newest good set, {newest.set_id}, is {_span(age)} old, and one is due every {_span(node.every)}"
        problems.append(Problem("stale", why, take))
    slots = [found for found in sets if found.birth.slot and found.birth.taken_at <= now + _AHEAD]
    if node.every is not None and (since := [*sets[:1], *slots]) and _age(since[-1], now) > 2 * node.every:
        last = f"since {slots[-1].set_id}" if slots else "yet"
        why = f"no scheduled take was made {last}: none for two periods of {_span(node.every)}"
        problems.append(Problem("no-tick", why, f"`snapshotter tick {node.name}` shows why"))
    if node.verify.every is not None and newest is not None:
        proven = _newest_proven(node, sets, now, bare)
        at = None if proven is None else _verified_at(proven)
        if at is None or (now - at).total_seconds() > 1.5 * node.verify.every:
            said = "no good set is verified" if at is None else f"the last verification was {when(at)}"
            why = f"{said}, at level {node.verify.level}, and one is due every {_span(node.verify.every)}"
            problems.append(Problem("unverified", why, f"snapshotter verify {node.name}"))
    for found in sets:
        if found.corrupt:
            level = found.marks.get("verify-level", "?")
            problems.append(
                Problem(
                    "corrupt", f"{found.set_id} was found corrupt at level {level}", f"{take}, then delete that one"
                )
            )
        elif found.state is State.DAMAGED:
            problems.append(Problem("damaged", f"{found.set_id}: {found.why}", f"{take}, then delete that one"))
        elif found.state is State.UNKNOWN:
            cure = "connect or import it; `snapshotter providers` says what can't be asked"
            problems.append(Problem("unknown", f"{found.set_id}: {found.why}", cure))
        if found.birth.taken_at > now + _AHEAD:
            problems.append(Problem("ahead", f"{found.set_id} is from the future", "mend the clock (NTP)"))
    return problems


def unproven(node: Node, sets: Sequence[SnapshotSet], now: datetime, bare: Collection[str]) -> list[str]:
    """A note where the newest proven set is less proven than the policy asks, and no more can be had. Pure."""
    proven = _newest_proven(node, sets, now, bare) if node.verify.every is not None else None
    if proven is None or (proven.verified_level or 0) >= node.verify.level:
        return []
    return [f"{node.name}: {proven.set_id} is verified at level 1, its files: of its content nothing was proven"]


def of_timer(node: Node, sets: Sequence[SnapshotSet], timer: Installed | None, now: datetime) -> list[Problem]:
    """Is there something that would take the next set? Pure."""
    if node.every is None or node.select is not None or (timer is not None and timer.active):
        return []
    if timer is None:
        away = [found for found in sets if found.birth.slot and 0 <= _age(found, now) <= 2 * node.every]
        if away and not _needs_host(away[-1]):
            return []  # somebody else's timer makes them: a cloud function's
        why = "nothing on this host would take the next set"
    else:
        why = f"its timer will not run: {timer.why}"
        if timer.kind == "cron":  # its line is there
            return [Problem("no-timer", why, "start a cron daemon, or install one")]
    return [Problem("no-timer", why, f"snapshotter schedule install {node.name}")]


def of_rooms(node: Node, found: Sequence[Room]) -> list[Problem]:
    """What is full, or soon will be. Pure."""
    problems: list[Problem] = []
    soon_s = max(_SOON_S, 2 * (node.every or 0))
    for room in found:
        for part in room.parts:
            what = f"{room.provider}: {part.name} is {100 * part.full:.0f} % full"
            if part.full > part.limit:
                why = f"{what} (limit {100 * part.limit:.0f} %)"
                problems.append(Problem("full", why, "delete or prune sets, or make it larger"))
            elif part.full_in_s is not None and part.full_in_s < soon_s:
                why = f"{what}, and will be full in {_span(part.full_in_s)}"
                problems.append(Problem("filling", why, "keep fewer sets, or make it larger"))
    return problems


def _document(
    node: Node,
    sets: Sequence[SnapshotSet],
    found: Sequence[Room],
    timer: Installed | None,
    problems: Sequence[Problem],
    now: datetime,
) -> dict[str, Any]:
    goods = [entry for entry in sets if entry.good and entry.birth.taken_at <= now + _AHEAD]
    proven = _newest_verified(node, sets, now)
    sizes = [entry.size_bytes for entry in sets if entry.size_bytes is not None]
    states = Counter("corrupt" if entry.corrupt else str(entry.state) for entry in sets)
    slots = [entry for entry in sets if entry.birth.slot]
    return {
        "node": node.name,
        "target": target_of(node),
        "path": node.path,
        "ok": not problems,
        "every_s": None if node.every is None else round(node.every),
        "newest_good": None if not goods else _brief(goods[-1], now),
        "newest_verified": None if proven is None else _brief(proven, now),
        "newest_slot": None if not slots else _brief(slots[-1], now),
        "sets": {name: states.get(name, 0) for name in (*map(str, State), "corrupt")},
        "pinned_bytes": sum(sizes) if sizes else None,
        "room": [room.document() for room in found],
        "timer": None
        if timer is None
        else {"kind": timer.kind, "active": timer.active, "why": timer.why or None, "next_at": timer.next_at or None},
        "problems": [problem.document() for problem in problems],
    }


def _brief(found: SnapshotSet, now: datetime) -> dict[str, Any]:
    at = _verified_at(found)
    return {
        "set_id": found.set_id,
        "taken_at": when(found.birth.taken_at),
        "age_s": round(_age(found, now)),
        "state": str(found.state),
        "grade": str(found.grade) if found.grade else None,
        "slot": found.birth.slot or None,
        "verify_level": found.verified_level,
        "verified_at": when(at) if at else None,
    }


def _newest_verified(node: Node, sets: Sequence[SnapshotSet], now: datetime) -> SnapshotSet | None:
    """Ok at level 2 or above and at the policy's."""
    proven = [found for found in sets if found.good and found.verified and found.birth.taken_at <= now + _AHEAD]
    return next((found for found in reversed(proven) if (found.verified_level or 0) >= node.verify.level), None)


def _newest_proven(node: Node, sets: Sequence[SnapshotSet], now: datetime, bare: Collection[str]) -> SnapshotSet | None:
    """The newest good set that is proven at the policy's level, or to level 1 where that was all: a set with a known
    database is ok at the level asked for or not ok at all, and one whose profile names a database has one or is
    corrupt. (A person may have asked for no more than level 1: a bare one counts then until a tick proves it.)"""
    for found in reversed(sets):
        level = found.verified_level
        if level is None or not found.good or found.birth.taken_at > now + _AHEAD:
            continue
        if level >= node.verify.level or (level == 1 and found.birth.profile in bare):
            return found
    return None


def _is_bare(session: Session, profile: str) -> bool:
    """Whether this profile names no database. One that isn't there any more counts as `verify` takes it: as generic."""
    try:
        return not profiles.get(profile, session.config.profiles).database
    except SnapshotterError:
        return True


def _verified_at(found: SnapshotSet) -> datetime | None:
    try:
        return parse_compact_time(found.marks.get("verify-at", ""))
    except ValueError:
        return None


def _needs_host(found: SnapshotSet) -> bool:
    from snapshotter import provider

    try:
        return any(provider.load(member.provider).traits.needs_host for member in found.birth.members)
    except SnapshotterError:
        return True


def _age(found: SnapshotSet, now: datetime) -> float:
    return (now - found.birth.taken_at).total_seconds()


def _span(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size or (seconds >= size and seconds % size == 0):
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} seconds"
