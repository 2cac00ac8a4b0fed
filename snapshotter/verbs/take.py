"""take: an image of everything under a node's data path, without stopping it.

plan -> locks -> undo stack -> prepare -> quiesce -> create -> end of the quiesce, checked -> marks and seal -> wait
until ready. Before the seal every way out undoes everything; after it the set is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from snapshotter import catalog
from snapshotter.core.errors import Interrupted, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.interrupts import deferred
from snapshotter.core.labels import pack_hash
from snapshotter.core.model import Grade, Hold, Quiesce, State, compact_time, utc_now
from snapshotter.core.undo import Undo
from snapshotter.host.locks import Locks
from snapshotter.nodes import profiles
from snapshotter.nodes.config import Hooks, Node
from snapshotter.nodes.target import resolve
from snapshotter.provider import resume
from snapshotter.verbs import open_restores
from snapshotter.verbs import plan as planning
from snapshotter.verbs.documents import set_document
from snapshotter.verbs.plan import Plan, SlotTakenError
from snapshotter.verbs.session import Session

if TYPE_CHECKING:
    from snapshotter.host.service import Service
    from snapshotter.nodes.rpc import Block


def take(
    session: Session,
    target: str | None = None,
    *,
    quiesce: str | None = None,
    budget_s: float | None = None,
    require: str | None = None,
    allow_skew: bool = False,
    dry_run: bool = False,
    wait: bool = True,
    wait_s: float = 24 * 3600.0,
    slot: str = "",
) -> dict[str, Any]:
    """Take one target. Returns the set's document with `existing` (a set of the same slot was there already),
    `warnings` and `left_out`; for `dry_run` the plan's. Raises any of core.errors."""
    resumed = resume()
    node = resolve(target, session.config)
    how: dict[str, Any] = {"quiesce": quiesce, "budget_s": budget_s, "require": require, "allow_skew": allow_skew}
    document = take_node(session, node, dry_run=dry_run, wait_s=wait_s if wait else 0.0, slot=slot, **how)
    return {**document, "warnings": [*resumed, *document["warnings"]]}


def take_node(
    session: Session,
    node: Node,
    *,
    quiesce: str | None = None,
    budget_s: float | None = None,
    require: str | None = None,
    allow_skew: bool = False,
    dry_run: bool = False,
    wait_s: float = 0.0,
    slot: str = "",
) -> dict[str, Any]:
    """As `take`, of a node that is known already. `wait_s`: how long to wait for a store that copies."""
    plan = planning.make(
        session,
        node,
        now=utc_now(),
        quiesce=quiesce,
        budget_s=budget_s,
        require=require,
        allow_skew=allow_skew,
        slot=slot,
    )
    if dry_run:
        open_restores.refuse(session, plan.birth.target)
        return plan.document()
    notes = list(plan.layout.warnings)
    left_out = plan.left_out()
    with Locks(plan.locks()):
        open_restores.refuse(session, plan.birth.target)
        try:
            if slot:
                from snapshotter.verbs import slots

                slots.refuse_taken(session, plan)
            if node.hooks == Hooks():
                notes += _carry_out(session, plan)
            else:
                notes += _between_hooks(session, plan)
        except SlotTakenError as error:
            return {**set_document(error.found), "existing": True, "warnings": notes, "left_out": left_out}
    document = _wait_until_ready(session, plan, wait_s)
    return {**document, "existing": False, "warnings": notes, "left_out": left_out}


def _between_hooks(session: Session, plan: Plan) -> list[str]:
    from snapshotter.verbs.hooks import Around

    with Around(plan.node, "take", set=plan.set_id) as around:
        notes = _carry_out(session, plan)
    return notes + around.notes


def take_all(session: Session, **how: Any) -> tuple[dict[str, Any], list[SnapshotterError]]:
    """Take every node of the config; one that fails doesn't stop the rest. Returns the document (`sets`, `failed`) and
    the failures; where only a part was done, a StorageError that says so is the last of them."""
    sets, failed, errors = [], [], []
    for name in session.config.nodes:
        try:
            sets.append(take(session, name, **how))
        except SnapshotterError as error:
            errors.append(error)
            failed.append({"node": name, **error.as_json()})
    if sets and errors:
        errors.append(StorageError(f"{len(errors)} of {len(session.config.nodes)} nodes were not taken"))
    return {"sets": sets, "failed": failed}, errors


def _carry_out(session: Session, plan: Plan) -> list[str]:
    """From the first change to the seal. Returns notes for a person."""
    set_id = plan.set_id
    groups = plan.by_provider()
    marks = {"quiesce": str(plan.quiesce), "grade": str(plan.grade)}
    if any(profiles.matches(plan.birth.path, pattern) for pattern in plan.profile.secrets):
        marks["secrets"] = "1"
    with Undo(undo_command="snapshotter reap") as undo:
        for provider, volumes in groups:
            undo.push(f"set {set_id} at {provider.name}", lambda provider=provider: provider.delete(set_id))  # type: ignore[misc]
            provider.prepare(volumes, plan.birth, plan.budget_s)
        # Asked before the instant: the image holds at least this block.
        head, silent = _height(plan.node)
        if head is not None:
            marks["height"] = str(head.height)
            marks["block"] = pack_hash(head.hash)
        # Nothing to prove afterwards: the driver may seal in the very call that makes the image, so a signal waits.
        at_birth = plan.quiesce is Quiesce.NONE and len(groups) == 1 and plan.grade is not Grade.SKEWED
        at_birth = at_birth and not plan.birth.slot  # whose slot it is must be found out first
        if at_birth:
            marks["sealed"] = compact_time(utc_now())
        with _kept(set_id, undo), deferred() if at_birth else nullcontext():
            with _hold(plan, marks if at_birth else {}) as held:
                _write_out(plan)
                first = time.monotonic()
                for provider, volumes in groups:
                    provider.create(volumes, plan.birth, held.hold)
                skew_ms = round((time.monotonic() - first) * 1000)
            # Leaving the `with` proved that the writers were held throughout; else it raised and all is undone.
            if plan.quiesce is not Quiesce.NONE:
                marks["freeze-ms"] = str(max(1, round(held.held_ms or 0)))
            if plan.grade == "skewed":
                marks["skew-ms"] = str(max(1, skew_ms))
            if plan.birth.slot:
                from snapshotter.verbs import slots

                slots.win(session, plan)
            if not at_birth:
                marks["sealed"] = compact_time(utc_now())
            with deferred():
                for provider, _ in groups:
                    provider.mark(set_id, marks)
                undo.commit()
    notes = [*held.notes, *(note for provider, _ in groups for note in provider.notes)]
    if plan.quiesce is not Quiesce.STOP:
        notes += profiles.outdated(plan.profile, plan.birth.path)
    if silent:
        # Never the URL itself: it may have a password or an API key in it.
        notes.append(f"no height is known, the node's RPC gives none: {silent}")
    return notes


@contextmanager
def _kept(set_id: str, undo: Undo) -> Iterator[None]:
    """A signal that waited for the seal says that the set stays."""
    try:
        yield
    except Interrupted as error:
        if undo.committed:
            error.message += f"; the set {set_id} is sealed and kept"
        raise


def _height(node: Node) -> tuple[Block | None, str]:
    """The newest block that the node says it has, or None and why not ('' where it isn't asked)."""
    if not node.rpc:
        return None, ""
    from snapshotter.nodes import rpc

    return rpc.height(node.rpc)


def _hold(plan: Plan, marks: Mapping[str, str]) -> AbstractContextManager[Any]:
    """What gives a `Held`. Its module is imported only where something is to be held: it takes its time."""
    if plan.quiesce is Quiesce.NONE:
        return nullcontext(SimpleNamespace(hold=Hold(marks=dict(marks)), notes=[], held_ms=None))
    from snapshotter.host import quiesce as holding
    from snapshotter.host.service import SystemdUnit

    paths = [root.path for root in plan.birth.roots]
    what = plan.set_id
    match plan.quiesce:
        case Quiesce.PAUSE:
            unit = SystemdUnit(plan.node.unit) if plan.node.unit else None
            return holding.pause(paths, plan.budget_s, what=what, cgroup=unit.control_group() if unit else None)
        case Quiesce.FREEZE:
            points = sorted({found.mount.path for found in plan.layout.roots})
            # Who wants a freeze makes its image below this host's storage stack, device mapper included.
            mapped = all(provider.traits.quiesce is Quiesce.FREEZE for provider in plan.providers)
            return holding.freeze(points, plan.budget_s, what=what, mapped=mapped)
        case Quiesce.STOP:
            holding.sync(paths)  # so that little is left to write out while all is held
            return holding.stop(service_of(plan.node), what, plan.budget_s, paths)
        case _:
            holding.sync(paths)
            return holding.hooks(plan.node.hold, plan.node.release, plan.budget_s, what=what)


def _write_out(plan: Plan) -> None:
    """What held writers have left in memory is in no image that is made below this host's file systems. (A freeze has
    written it.) Raises StorageError."""
    if plan.quiesce in (Quiesce.NONE, Quiesce.FREEZE):
        return
    groups = [volumes for provider, volumes in plan.by_provider() if provider.traits.quiesce is Quiesce.FREEZE]
    if paths := [volume.path for volumes in groups for volume in volumes if volume.path is not None]:
        from snapshotter.host import quiesce as holding

        holding.sync(paths)


def service_of(node: Node) -> Service:
    """The service manager's handle for a node that has one. Raises PreconditionError."""
    from snapshotter.host.service import Commands, SystemdUnit

    if node.unit:
        return SystemdUnit(node.unit)
    if node.stop:
        return Commands(stop_argv=node.stop, start_argv=node.start, status_argv=node.status)
    raise PreconditionError(
        "has no service", object=node.name, cure="set unit, or stop, start and status, in the config"
    )


def _wait_until_ready(session: Session, plan: Plan, patience_s: float) -> dict[str, Any]:
    """The set's document once it isn't pending any more, or when patience ends. An interruption keeps the set."""
    from snapshotter.core.model import Progress

    give_up = time.monotonic() + patience_s
    pause_s = 0.05
    started = time.monotonic()
    try:
        while True:
            found = catalog.read([provider for provider, _ in plan.by_provider()], (), plan.set_id).sets[0]
            if found.state is not State.PENDING or time.monotonic() >= give_up:
                break
            session.report(Progress("waiting for the store", round(time.monotonic() - started), None, "s"))
            time.sleep(min(pause_s, max(0.0, give_up - time.monotonic())))
            pause_s = min(pause_s * 2, 30.0)
    except IndexError:
        raise StorageError(
            "the set was sealed and is not listed any more", object=plan.set_id, cure="`snapshotter list`"
        ) from None
    except Interrupted as error:
        error.message += f"; the set {plan.set_id} is sealed and kept"
        raise
    if found.state is State.DAMAGED:
        raise StorageError(f"the storage lost the image: {found.why}", object=plan.set_id)
    if found.state is State.READY:
        for provider, _ in plan.by_provider():
            provider.finish(plan.set_id)
    return set_document(found)
