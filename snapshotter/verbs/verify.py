"""verify: prove a set by opening a clone of it, and write down what that came to.

The clone is attached with purpose `verify` in a directory that only its maker may enter, with all that leads out of it
re-pointed, and is gone on every way out; what a killed run leaves is `reap`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from snapshotter import checks
from snapshotter.checks import Finding, Outcome, Proof
from snapshotter.core.errors import JudgedBadError, PreconditionError, SnapshotterError, StorageError, UsageError
from snapshotter.core.interrupts import deferred
from snapshotter.core.model import (
    Access,
    Grade,
    Purpose,
    SnapshotSet,
    compact_time,
    new_attachment_id,
    utc_now,
)
from snapshotter.core.undo import Undo
from snapshotter.host import mounts
from snapshotter.host.locks import Locks
from snapshotter.host.places import private_directory
from snapshotter.nodes import profiles, repoint
from snapshotter.verbs.documents import set_document
from snapshotter.verbs.restore import attach_all, judge, layout
from snapshotter.verbs.session import Session

PLACE = ".snapshotter-verify"
#: How long to wait for another verify that writes down what it found.
_PATIENCE_S = 60.0


def verify(
    session: Session, selector: str | None = None, *, level: int | None = None, from_host: bool = False
) -> dict[str, Any]:
    """Prove a set (an id, a prefix, `latest...`), or the newest good set of a target (a node's name or a path; the only
    node if None), up to `level` (default: the node's policy). Returns the `verify` document; its `outcome` is the
    verdict. Raises NotFoundError, PreconditionError (pending, no room, no permission), StorageError."""
    latest = selector is not None and selector.startswith(("latest:", "latest-verified:"))
    if selector is None or selector in session.config.nodes or ("/" in selector and not latest):
        selector = f"latest:{selector}" if selector else "latest"
    found = session.select(selector, from_host=from_host)
    node = session.node_of(found.birth.target)
    wanted = level if level is not None else int(node.verify.level) if node else 2
    with Locks([f"set:{found.set_id}"], exclusive=False):
        proof = prove_set(session, found, wanted)
    now = session.catalog(found.set_id).pick(found.set_id, from_host=True)
    return {
        "set_id": found.set_id,
        "level": proof.level,
        "wanted": wanted,
        "outcome": str(proof.outcome),
        "why": proof.why or None,
        "databases": [
            {
                "kind": each.kind,
                "path": each.path,
                "level": each.level,
                "outcome": str(each.outcome),
                "why": each.why or None,
            }
            for each in proof.findings
        ],
        "set": set_document(now),
        "warnings": [*session.notes, *proof.notes],
    }


def prove_set(session: Session, found: SnapshotSet, level: int, *, record: bool = True) -> Proof:
    """Prove one set on a clone; `record` writes the marks. The caller holds a lock of `set:<id>`, shared at least.

    L0 is the storage's word, asked by whoever listed the set. Raises what attaching raises, but for the driver's
    JudgedBadError: its manifest (L1) is part of the proof."""
    try:
        judge(found)
    except JudgedBadError as error:  # L0: incomplete or damaged: that is its state, and needs no mark
        return Proof(0, Outcome.CORRUPT, (), (error.message,))
    proof = Proof(0, Outcome.OK) if level < 1 else _on_a_clone(session, found, level)
    if record:
        _record(session, found, proof)
    return proof


def _on_a_clone(session: Session, found: SnapshotSet, level: int) -> Proof:
    try:
        profile = profiles.get(found.birth.profile, session.config.profiles)
    except UsageError:
        profile = profiles.get(profiles.FALLBACK)
    reading = False
    try:
        with cloned(session, found) as (attachment_id, places):
            reading = True
            proof = checks.prove(places, profile, level, crash=found.grade is Grade.CRASH, report=session.report)
            if proof.outcome is Outcome.CORRUPT and (why := _lost(session, found, attachment_id)):
                return Proof(
                    1, Outcome.COULD_NOT_RUN, (Finding("clone", found.birth.path, 1, Outcome.COULD_NOT_RUN, why),)
                )
            return proof
    except JudgedBadError as error:
        if reading:
            raise
        return Proof(1, Outcome.CORRUPT, (Finding("image", found.birth.path, 1, Outcome.CORRUPT, error.message),))


def _lost(session: Session, found: SnapshotSet, attachment_id: str) -> str:
    """Why the clone can't be read any more; '' if it can: an error in it says nothing of the image then."""
    for provider in session.providers_of(found):
        with suppress(SnapshotterError):  # what is listed before an error counts
            for part in provider.attachments():
                if part.id == attachment_id and part.lost:
                    return part.lost
    return ""


@contextmanager
def cloned(session: Session, found: SnapshotSet) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A writable clone of the whole set for the time of the `with`, detached and gone on every way out. Gives its id
    and pairs of (a root's live path, the directory where its clone is), the data path first. Never settled: so it is
    its maker's, and `reap` lets it alone while that lives. Raises what attaching raises."""
    attachment_id = new_attachment_id(utc_now())
    base = private_directory(os.path.join(_base(session, found), PLACE))
    top = os.path.join(base, attachment_id)
    holding = {provider.name: provider for provider in session.providers_of(found)}
    with Undo(undo_command="snapshotter reap") as undo:
        undo.push(base, lambda: _remove_if_empty(base))
        undo.push(f"{top}.roots", lambda: _remove_if_empty(f"{top}.roots"))
        places = layout(found, top)
        attach_all(undo, holding, found, places, attachment_id, Access.WRITABLE, Purpose.VERIFY)
        pairs = [(root.path, place) for root, place in places]
        repoint.repoint(pairs, f"{top}.roots/outside")
        yield attachment_id, pairs


def _base(session: Session, found: SnapshotSet) -> str:
    """A directory for the clone on the disk where the image most likely is (a copy can be reflinked there), that isn't
    itself below a root: beside the store if the config names one, else beside the data path, else our own state."""
    node = session.node_of(found.birth.target)
    store = session.options.get("store") or (node.store if node else None)
    beside = [os.path.dirname(os.path.abspath(str(store)))] if store else []
    path = found.birth.path
    if path.startswith("/") and not (os.path.isdir(path) and mounts.is_mount_point(path)):
        beside.append(os.path.dirname(path))
    for directory in map(os.path.realpath, beside):
        inside = any(mounts.is_under(directory, root.path) for root in found.birth.roots)
        if os.path.isdir(directory) and os.access(directory, os.W_OK) and not inside and directory != "/":
            return directory
    return session.config.state


def _remove_if_empty(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:
        pass  # another verify uses it, or it never came to be; it is empty and ours, and no harm


def _record(session: Session, found: SnapshotSet, proof: Proof) -> None:
    """Write down what is known now, by the marks as they are now: the proof may have taken hours, and verifies of one
    set go on side by side. A set that is gone meanwhile needs none."""
    node = session.node_of(found.birth.target)
    enough = node is not None and proof.level >= node.verify.level
    try:
        # A lock of its own, as verifies share the set's. It is always the last to be taken, and held for an instant.
        with Locks([f"mark:{found.set_id}"], wait_s=_PATIENCE_S):
            now = session.again(found)
            if now is None or not (marks := _marks_of(proof, now, enough)):
                return
            with deferred():
                for provider in session.providers_of(now):
                    provider.mark(now.set_id, marks)
    except SnapshotterError as error:
        if proof.outcome is not Outcome.CORRUPT:
            raise
        raise JudgedBadError(
            f"is corrupt: {proof.why}; and that can't be written down now ({error.line()})",
            object=found.set_id,
            cure="verify it again; restore another set",
        ) from None


def _marks_of(proof: Proof, now: SnapshotSet, enough: bool) -> dict[str, str]:
    """What a proof changes of what is known of the set. What says nothing of the image (a tool is missing) replaces no
    judgement, and a weaker ok no stronger one: corrupt stays until an ok at that level or above. A weaker ok that is
    `enough`, all that the node's policy asks for, bears the stronger one out."""
    said = now.marks.get("verify-outcome")
    before = now.marks.get("verify-level", "")
    judged = said in (Outcome.OK, Outcome.CORRUPT)
    at = {"verify-at": compact_time(utc_now())}
    if proof.outcome not in (Outcome.OK, Outcome.CORRUPT) and judged:
        return {}
    if proof.outcome is Outcome.OK and judged and before.isdigit() and int(before) > proof.level:
        return at if said == Outcome.OK and enough else {}
    return {"verify-level": str(proof.level), **at, "verify-outcome": str(proof.outcome)}


def require(found: SnapshotSet, proof: Proof) -> list[str]:
    """Warnings about a set that is proven well enough to take the place of live data. Of what has no check that is said
    and no more asked: else it could never be restored. Raises JudgedBadError (corrupt), PreconditionError (it could
    not be proven)."""
    error = failure(found.set_id, proof)
    if error is not None and not (proof.outcome is Outcome.TOOL_MISSING and proof.no_check):
        raise error
    return [*(each.unproven for each in proof.findings if each.no_check), *proof.notes]


def failure(set_id: str, proof: Proof) -> SnapshotterError | None:
    """What this outcome is as an error, with its cure; None for ok."""
    why = proof.why or "; ".join(proof.notes)
    match proof.outcome:
        case Outcome.OK:
            return None
        case Outcome.CORRUPT:
            cure = "restore another set: latest-verified is one that was proven"
            return JudgedBadError(f"is corrupt (level {proof.level}): {why}", object=set_id, cure=cure)
        case Outcome.TOOL_MISSING:
            cure = f"verify with --level {max(proof.level, 1)}"
            cure = cure if proof.no_check else f"install it, or {cure}"
            return PreconditionError(f"could be proven to level {proof.level} only: {why}", object=set_id, cure=cure)
        case Outcome.TOOL_TOO_OLD:
            cure = "install a newer one"
            return PreconditionError(f"can't be judged: {why}", object=set_id, cure=cure)
        case _:
            return StorageError(f"the check could not run: {why}", object=set_id, cure="mend that and verify again")
