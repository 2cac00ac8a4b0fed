"""restore --in-place, resync, and what becomes of one that was interrupted: --continue, --undo, --discard.

The plan is made and may be looked at (`plan`, `plan_resync`); `carry_out` does it under the locks of the target and of
its volumes. Whatever fails before the node was started again is undone at once. A run that was killed is found by its
journal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from snapshotter.core.errors import (
    NotFoundError,
    PreconditionError,
    SnapshotterError,
    Told,
    UndoIncompleteError,
    UsageError,
)
from snapshotter.core.interrupts import deferred
from snapshotter.core.journal import Journal, names
from snapshotter.core.model import utc_now
from snapshotter.host import mounts
from snapshotter.host.locks import Locks
from snapshotter.host.places import boot_id, private_directory
from snapshotter.host.store import told
from snapshotter.nodes import health
from snapshotter.nodes.target import resolve, target_id
from snapshotter.verbs import in_place_back as back
from snapshotter.verbs import in_place_plan as planning
from snapshotter.verbs import open_restores
from snapshotter.verbs.hooks import Around
from snapshotter.verbs.in_place_plan import Plan
from snapshotter.verbs.in_place_steps import Unhealthy, forward, healthy
from snapshotter.verbs.in_place_work import Work
from snapshotter.verbs.session import Session


def plan(session: Session, selector: str, **how: Any) -> Plan:
    """What `restore SET --in-place` would do; see `in_place_plan.restore`. Changes nothing."""
    return planning.restore(session, selector, now=utc_now(), **how)


def plan_resync(session: Session, target: str | None, **how: Any) -> Plan:
    """What `resync` would do. Changes nothing."""
    return planning.resync(session, resolve(target, session.config), now=utc_now(), **how)


def carry_out(session: Session, plan: Plan) -> dict[str, Any]:
    """Returns the document. Raises any of core.errors: nothing has changed then, but for `Unhealthy`, what comes after
    the start (restored; the undo command is named) and UndoIncompleteError."""
    with _locked(session, plan):
        open_restores.refuse(session, plan.target, finished=True)
        plan = planning.as_of_now(plan)  # a person was asked meanwhile
        with Around(plan.node, "restore", set=plan.set_id, destination=plan.path) as around:
            work = _begin(session, plan)
    document = _document(work, "restored")
    document["warnings"] = [*document["warnings"], *around.notes]
    return document


def _begin(session: Session, plan: Plan) -> Work:
    private_directory(open_restores.directory(session))
    seen = health.look(plan.node) if plan.running else None
    where = open_restores.path_of(session, plan.target)
    paths = [path for ground in plan.grounds for path in (ground.path, ground.aside)]
    points = {path: mounts.mount_of(os.path.realpath(path)).path for path in paths}
    facts = {"path": plan.path, "boot": boot_id(), "mounts": points, "plan": planning.dump(plan)}
    journal = Journal.create(where, id=plan.id, **facts)
    try:
        work = Work(session, plan, journal)
        if seen is not None:
            journal.append("seen", enode_id=seen.enode_id, peers=seen.peers, height=seen.height)
    except BaseException:
        journal.remove()  # nothing was done yet
        raise
    _drive(work)
    return work


def _drive(work: Work) -> None:
    """Forward; on any failure before the node runs on the new content, back. After that, what it has written since is
    nobody's to drop unasked."""
    try:
        with told(work.plan.path):
            forward(work)
    except Unhealthy:
        raise
    except BaseException as error:
        if not work.started:
            _back(work, error)
        elif isinstance(error, Told):
            path = work.plan.path
            stays = f"what was restored stays in place; snapshotter restore --continue {path} ends it"
            error.cure = f"{error.cure}; {stays}" if error.cure else stays
            error.left = (*error.left, *work.stopped())
            error.undo_command = error.undo_command or f"snapshotter restore --undo {path}"
        raise


def _back(work: Work, error: BaseException | None) -> None:
    """Raises UndoIncompleteError if the old state could not be had again."""
    try:
        _undo(work)
    except UndoIncompleteError:
        raise
    except BaseException as failed:
        said = failed.line() if isinstance(failed, SnapshotterError) else f"{type(failed).__name__}: {failed}"
        raise UndoIncompleteError(
            f"the restore could not all be undone ({said}){_after(error)}",
            object=work.plan.path,
            left=[work.journal.path, *work.stopped()],
            cure="mend that",
            undo_command=f"snapshotter restore --undo {work.plan.path}",
        ) from failed
    _refuse_unended(work, error)


def _undo(work: Work) -> None:
    with deferred():
        with told(work.plan.path):
            back.backward(work)
        if not work.unremoved and not _still_masked(work):
            work.journal.remove()


def _refuse_unended(work: Work, error: BaseException | None) -> None:
    """Raise UndoIncompleteError where the old data is in its place, and that isn't all."""
    if work.unremoved:
        first, path = work.unremoved[0], work.plan.path
        raise UndoIncompleteError(
            f"{path} is what it was, but what was restored could not all be removed: {first.what()}{_after(error)}",
            object=path,
            left=[*dict.fromkeys(each.object for each in work.unremoved), *work.stopped()],
            cure=first.cure,
            undo_command=f"snapshotter restore --undo {path}",
        )
    if work.unstarted is not None:
        raise _unstarted(work, error)


def _still_masked(work: Work) -> bool:
    """Whether our mask is left: the journal stays, so that the undo, done again, takes it away."""
    if work.unstarted is None or work.service is None or not work.service.can_mask or work.plan.masked:
        return False
    try:
        return work.service.masked()
    except SnapshotterError:
        return True


def _unstarted(work: Work, error: BaseException | None) -> UndoIncompleteError:
    why = work.unstarted.line() if work.unstarted else ""
    return UndoIncompleteError(
        f"{work.plan.path} is what it was, and its service doesn't run on that ({why}){_after(error)}",
        object=work.plan.path,
        left=[f"the service {work.plan.document()['service']}, stopped"],
        cure="see why, and start it" if not (masked := _still_masked(work)) else "mend that",
        undo_command=f"snapshotter restore --undo {work.plan.path}" if masked else "",
    )


def _after(error: BaseException | None) -> str:
    return f" after: {error.line() if isinstance(error, SnapshotterError) else error}" if error is not None else ""


def go_on(session: Session, target: str | None) -> dict[str, Any]:
    """--continue: to the end, whichever way it was going. Raises NotFoundError (there is none), Unhealthy,
    PreconditionError (the node may have run on a mix of old and new, so the end would be none of both)."""
    with _open(session, target) as work:
        work.require_disks(of_aside=work.discarding)
        if work.discarding:  # also of one that was being undone, and could not be
            return _discarded(work)
        if work.turned:
            _back(work, None)
            return _document(work, "undone")
        if (done := work.journal.last("restored")) is None:
            if work.mixed() and not work.lost():  # else on is the only way
                raise PreconditionError(
                    "the node may have run on a mix of old and new since the restore was interrupted",
                    object=work.plan.path,
                    cure=f"snapshotter restore --undo {work.plan.path}, then restore it again",
                )
            _drive(work)
        elif done["healthy"] is False:
            healthy(work)  # it may have found its peers by now
            work.journal.append("restored", healthy=True)
        return _document(work, "restored")


def undo(session: Session, target: str | None, *, from_set: bool = False) -> dict[str, Any]:
    """--undo: the old state again, whether the restore was interrupted or is long done. Raises NotFoundError,
    BusyError (somebody uses it: nothing has changed), PreconditionError (it is being discarded; the sign-states can't
    be ordered), UndoIncompleteError."""
    with _open(session, target) as work:
        back.refuse_discarding(work)
        work.asked = from_set
        try:
            _undo(work)
        except Exception:
            if not work.turned:
                raise  # refused: it is as it was
            _back(work, None)
        _refuse_unended(work, None)
        return _document(work, "undone")


def to_discard(session: Session, target: str | None) -> list[str]:
    """What `--discard` would remove, for the question. Raises NotFoundError, PreconditionError (not done yet)."""
    with _open(session, target, locked=False) as work:
        _refuse_unfinished(work)
        unwell = (work.journal.last("restored") or {}).get("healthy") is False
        half = "(some of it is gone, and it was being put back: what was restored stands there again afterwards)"
        aside = [ground.aside for ground in work.plan.grounds] or [f"{s.provider}:{s.swap_id}" for s in work.plan.swaps]
        alone = (work.journal.last("alone") or {"names": []})["names"]
        aside += [f"with the only copy of {name}" for name in alone]
        unwell_too = ["(the node was not well after its restore)"] if unwell else []
        return [*aside, *unwell_too, *([half] if work.turned else [])]


def discard(session: Session, target: str | None) -> dict[str, Any]:
    """--discard: the old data goes, and with it the way back."""
    with _open(session, target) as work:
        _refuse_unfinished(work)
        return _discarded(work)


def _refuse_unfinished(work: Work) -> None:
    if (work.turned or not work.journal.has("restored")) and not (work.turned and (work.discarding or work.lost())):
        path = work.plan.path
        raise PreconditionError(
            "the restore isn't done: what is set aside may be all there is",
            object=path,
            cure=f"snapshotter restore --continue {path}, or snapshotter restore --undo {path}",
        )


def _discarded(work: Work) -> dict[str, Any]:
    with told(work.plan.path):
        gone = back.discard(work)
    work.journal.remove()
    return {**_document(work, "discarded"), "discarded": gone}


# ---------------------------------------------------------------------------------------------------------- helpers


@contextmanager
def _locked(session: Session, plan: Plan) -> Iterator[None]:
    volumes: list[str] = []
    if plan.set_id:
        found = next((each for each in session.catalog(plan.set_id).sets if each.set_id == plan.set_id), None)
        volumes = [f"{member.provider}:{member.volume}" for member in found.birth.members] if found else []
    with Locks([f"target:{plan.target}", *volumes]), Locks([f"set:{plan.set_id}"], exclusive=False):
        yield


@contextmanager
def _open(session: Session, target: str | None, *, locked: bool = True) -> Iterator[Work]:
    """The restore of a target that has a journal. Raises NotFoundError."""
    identity = _target(session, target)
    journal = Journal.load(open_restores.path_of(session, identity))
    if journal is None:
        raise NotFoundError("no restore in place is open, nor waits to be discarded", object=target or identity)
    plan = planning.load(journal.facts)
    if not locked:
        yield Work(session, plan, journal)
        return
    with _locked(session, plan):
        again = Journal.load(journal.path)  # another run may have ended or turned it before we had the lock
        if again is None or again.facts != journal.facts:
            raise NotFoundError("that restore in place is open no more", object=target or identity)
        yield Work(session, plan, again)


def _target(session: Session, target: str | None) -> str:
    try:
        return target_id(resolve(target, session.config, must_exist=False).path)
    except UsageError:
        known = names(open_restores.directory(session))
        if target is None and len(known) == 1:
            return known[0]
        raise


def _document(work: Work, outcome: str) -> dict[str, Any]:
    plan, found = work.plan, work.health
    document = plan.document()
    aside = [root["aside"] for root in document["roots"]] if outcome == "restored" else []
    planned = document["warnings"] if outcome == "restored" else []  # what was foreseen of it is past
    return {
        **document,
        "outcome": outcome,
        "aside": [path for path in aside if not path.startswith("/") or os.path.lexists(path)],
        "healthy": found.healthy if found else None,
        "seen": {"enode_id": found.seen.enode_id, "height": found.seen.height, "peers": found.seen.peers}
        if found
        else None,
        "undo_command": f"snapshotter restore --undo {plan.path}" if outcome == "restored" else None,
        "discard_command": f"snapshotter restore --discard {plan.path}" if outcome == "restored" else None,
        "warnings": [*planned, *work.notes],
    }
