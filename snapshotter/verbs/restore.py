"""restore --to and --mount: a set made usable beside the origin, which is never touched.

`--to` is a writable clone, `--mount` read-only. The data path's content is at the directory given; roots below the data
path at their relative place in it, roots outside it at `DIR.roots/<n>`. Nothing in it leads back into production.
"""

from __future__ import annotations

import functools
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from snapshotter.core.errors import (
    BusyError,
    JudgedBadError,
    NotFoundError,
    PreconditionError,
    SnapshotterError,
    StorageError,
    UsageError,
)
from snapshotter.core.interrupts import deferred
from snapshotter.core.model import (
    Access,
    Attachment,
    Grade,
    MountSpec,
    Purpose,
    Root,
    SnapshotSet,
    State,
    Tree,
    new_attachment_id,
    utc_now,
)
from snapshotter.core.undo import Undo
from snapshotter.host import mounts, permissions, tree
from snapshotter.host.locks import Locks
from snapshotter.host.places import private_directory, run_directory
from snapshotter.nodes import repoint
from snapshotter.provider import Provider
from snapshotter.verbs.hooks import Around
from snapshotter.verbs.session import Session

_COARSE = 5  # CLOCK_REALTIME_COARSE of linux/time.h, which Python has no name for


def restore(
    session: Session,
    selector: str,
    destination: str,
    access: Access,
    *,
    from_host: bool = False,
    dry_run: bool = False,
    with_identity: bool = False,
) -> dict[str, Any]:
    """Attach the set at `destination`, an absent or empty directory whose parent exists. In a writable clone the node's
    keys are replaced by placeholders (`withheld` names them) unless `with_identity`.

    Returns the `restore` document. Raises NotFoundError, JudgedBadError (incomplete, damaged), PreconditionError
    (pending, no root for a mount, a read-only image that leads into live data), UsageError (a bad destination)."""
    found = session.select(selector, from_host=from_host)
    session.fit_options(found)
    warnings = [*session.notes, *judge(found)]
    top = destination_of(destination, found)
    places = layout(found, top)
    if found.marks.get("secrets") == "1" and (with_identity or access is Access.READ_ONLY):
        warnings.append("it holds the node's keys: never start it while the original runs with the same keys")
    attachment_id = new_attachment_id(utc_now())
    document: dict[str, Any] = {
        "set_id": found.set_id,
        "attachment_id": attachment_id,
        "path": top,
        "access": str(access),
        "roots": [{"origin": root.path, "path": place} for root, place in places],
        "withheld": [],
        "warnings": warnings,
    }
    if dry_run:
        warnings += foreseen(session, found)
        return {**document, "attachment_id": None}
    with Around(session.node_of(found.birth.target), "restore", set=found.set_id, destination=top) as around:
        _bring_all(session, found, document, places, access, with_identity=with_identity)
    warnings += around.notes
    return document


def _bring_all(
    session: Session,
    found: SnapshotSet,
    document: dict[str, Any],
    places: Sequence[tuple[Root, str]],
    access: Access,
    *,
    with_identity: bool,
) -> None:
    """Carry out the plan that `document` is, and note in it what came of it."""
    top, attachment_id, warnings = document["path"], document["attachment_id"], document["warnings"]
    holding = {provider.name: provider for provider in session.providers_of(found)}
    with (
        Locks([f"place:{top}"]),
        # Shared: two restores of one set may run at once; a delete may not.
        Locks([f"set:{found.set_id}"], exclusive=False),
        Undo(undo_command=f"snapshotter release {top}") as undo,
    ):
        destination_of(top, found)  # another restore may have filled it before we had the lock
        _refuse_taken(top, holding.values())
        if access is Access.READ_ONLY and not os.path.isdir(top):
            undo.push(top, lambda: _remove_if_empty(top))
            os.mkdir(top)
        warnings += attach_all(undo, holding, found, places, attachment_id, access, Purpose.RESTORE)
        pairs = [(root.path, place) for root, place in places]
        if os.path.isdir(f"{top}.roots"):
            # Whoever may enter the clone may enter its other roots.
            like = os.stat(top)
            os.chown(f"{top}.roots", like.st_uid, like.st_gid, follow_symlinks=False)
            os.chmod(f"{top}.roots", like.st_mode & 0o777)
        if access is Access.WRITABLE:
            changes = repoint.repoint(pairs, f"{top}.roots/outside")
            if not with_identity:
                document["withheld"] = _withhold(session, found, pairs, warnings)
        elif changes := repoint.check_read_only(pairs):
            raise PreconditionError(
                f"{_shown(changes[0])} leads to {changes[0].before}, a live place; read-only it can't be re-pointed",
                object=found.set_id,
                cure="restore it with --to",
            )
        since = datetime.now(UTC)
        _let_pass(since)
        with deferred():
            for provider in holding.values():
                provider.settle(attachment_id, since)
            undo.commit()
    warnings += [f"{_shown(change)} led to {change.before}, and now to {change.after}" for change in changes]


def _refuse_taken(top: str, providers: Iterable[Provider]) -> None:
    """Raise BusyError where a clone was brought to and isn't mounted now, with all that was written to it: who releases
    the place later may mean either of the two. (What is listed before an error counts: it is a restore.)"""
    listed: list[Attachment] = []
    for provider in providers:
        with suppress(SnapshotterError):
            for part in provider.attachments():
                listed.append(part)
    for part in listed:
        if part.path == top and part.since is not None and not part.tree and part.access is Access.WRITABLE:
            raise BusyError(
                f"{part.id} was brought there, and isn't mounted now",
                object=top,
                cure=f"restore elsewhere, or: snapshotter release {part.id} --discard-changes",
            )


def _let_pass(moment: datetime) -> None:
    """Return when whatever is written from now on has a later ctime: the kernel's coarse clock, which stamps files, is
    past `moment`. At most 20 ms, two of its slowest ticks, whatever else moves the clock."""
    give_up = time.monotonic() + 0.02
    while time.clock_gettime(_COARSE) <= moment.timestamp() and time.monotonic() < give_up:
        time.sleep(0.001)


def _withhold(session: Session, found: SnapshotSet, pairs: Sequence[tuple[str, str]], warnings: list[str]) -> list[str]:
    """Take the node's keys out of a writable clone; returns where they were. All links lead into the clone by now."""
    from snapshotter.nodes import identity, profiles

    own, top = session.config.profiles, pairs[0][1]
    try:
        profile = profiles.get(found.birth.profile, own)
    except UsageError:
        profile, why = profiles.detect(top, own)
        warnings.append(f"its profile {found.birth.profile} isn't known here; taken for {profile.name} ({why})")
    node = session.node_of(found.birth.target)
    withheld = identity.withhold(pairs, profile, node.key_file if node else None)
    if withheld:
        names = ", ".join(os.path.relpath(path, top) for path in withheld)
        warnings.append(f"its keys were withheld ({names}): it can't run as that node; --with-identity leaves them in")
    return withheld


def _shown(change: repoint.Change) -> str:
    return f"{change.key} in {change.path}" if change.key else change.path


def foreseen(session: Session, found: SnapshotSet) -> list[str]:
    """What the providers say beforehand of making it usable: time and cost."""
    holding = {provider.name: provider for provider in session.providers_of(found)}
    return [line for snapshot in found.snapshots for line in holding[snapshot.provider].foresee(snapshot)]


def judge(found: SnapshotSet) -> list[str]:
    """Warnings about a set that may be restored; raises for one that may not."""
    if found.state is State.PENDING:
        raise PreconditionError(
            found.why or "the storage still copies it", object=found.set_id, cure="try again when it is ready"
        )
    if found.state is State.UNKNOWN:
        raise PreconditionError(found.why, object=found.set_id, cure="make that work, then try again")
    if found.state is not State.READY:
        raise JudgedBadError(f"is {found.state}: {found.why}", object=found.set_id, cure="restore another set")
    warnings = []
    if found.corrupt:
        warnings.append("it was verified and found corrupt")
    if found.grade is Grade.SKEWED:
        warnings.append(f"its volumes are {found.marks.get('skew-ms', '?')} ms apart: databases in it may disagree")
    return warnings


def destination_of(given: str, found: SnapshotSet) -> str:
    """The canonical destination. Raises UsageError, NotFoundError, PreconditionError if it can't be one."""
    top = os.path.abspath(given)
    parent = os.path.realpath(os.path.dirname(top))
    top = os.path.join(parent, os.path.basename(top))
    if not os.path.isdir(parent):
        raise NotFoundError("no such directory", object=parent, cure="make it first")
    if os.path.islink(top) or (os.path.lexists(top) and not os.path.isdir(top)):
        raise UsageError("is not a directory", object=top, cure="give an absent or empty directory")
    if os.path.isdir(top):
        try:
            taken = os.listdir(top)
        except OSError as error:
            raise PreconditionError(f"can't read it: {error.strerror}", object=top) from None
        if [name for name in taken if name != "lost+found"]:
            raise UsageError("is not empty", object=top, cure="give an absent or empty directory")
    if top == "/" or not os.path.basename(top):
        raise UsageError("can't restore there", object=top, cure="give an absent or empty directory")
    if os.path.lexists(f"{top}.roots") and len(found.birth.roots) > 1:
        raise UsageError("is in the way", object=f"{top}.roots", cure="remove it, or restore elsewhere")
    if not os.access(parent, os.W_OK) and not os.path.isdir(top):
        raise PreconditionError("may not be written", object=parent, cure="run as root, or restore elsewhere")
    for root in found.birth.roots:
        live = os.path.realpath(root.path) if root.path.startswith("/") else ""
        if live and (mounts.is_under(top, live) or mounts.is_under(live, top)):
            raise UsageError(f"overlaps {root.path}, which is live", object=top, cure="restore elsewhere")
    return top


def layout(found: SnapshotSet, top: str) -> list[tuple[Root, str]]:
    """Each root and where it appears: the data path at `top`, a root below another in its place, others beside."""
    data, *others = found.birth.roots
    places = [(data, top)]
    outside = 0
    for root in sorted(others, key=lambda root: root.path.count("/")):
        above = [pair for pair in places if mounts.is_under(root.path, pair[0].path)]
        if above:
            holder, place = max(above, key=lambda pair: len(pair[0].path))
            places.append((root, os.path.join(place, os.path.relpath(root.path, holder.path))))
        else:
            outside += 1
            places.append((root, os.path.join(f"{top}.roots", str(outside))))
    # A root inside another comes after it: its place must be there first.
    return sorted(places, key=lambda pair: pair[1].count("/"))


def attach_all(
    undo: Undo,
    holding: Mapping[str, Provider],
    found: SnapshotSet,
    places: Sequence[tuple[Root, str]],
    attachment_id: str,
    access: Access,
    purpose: Purpose,
) -> list[str]:
    """Attach the set so that each root is seen at its place (`layout`); inverses are on the stack before. Each
    provider's is there once, below all its mounts: it detaches all volumes, and none may be mounted then. Returns
    notes for a person."""
    notes: list[str] = []
    made: dict[int, MountSpec | Tree] = {}  # several roots may lie in one volume: it is attached once
    detached: set[str] = set()
    # The directory of roots beside the data path: removed below every detach, as it is empty only after that, and made
    # when there is an attachment by which a later run finds it (`release.tidy`).
    beside = {os.path.dirname(place) for _, place in places if os.path.dirname(place).endswith(".roots")}
    for parent in beside:
        if not os.path.isdir(parent):
            undo.push(parent, functools.partial(_remove_if_empty, parent))
    for index, (root, place) in enumerate(places):
        if os.path.dirname(place) in beside:
            os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
            # Others come to it as to the clone (`_bring_all`): by that is told what must be closed to them in it.
            like = os.stat(places[0][1])
            os.chown(os.path.dirname(place), -1, like.st_gid, follow_symlinks=False)
            os.chmod(os.path.dirname(place), like.st_mode & 0o055 | 0o700)
        # The outermost place that holds it: from there on, the directories above are of an image.
        within = next((above for _, above in places[:index] if mounts.is_under(place, above)), "")
        if within:
            with _inside(within, os.path.dirname(place), os.path.dirname(root.path)):
                pass  # refused before the provider makes anything there
        if root.member not in made:
            snapshot = next(member for member in found.snapshots if member.birth.member == root.member)
            provider = holding[snapshot.provider]
            if provider.name not in detached:
                detached.add(provider.name)
                undo.push(f"attachment {attachment_id}", functools.partial(provider.detach, attachment_id))
            made[root.member] = provider.attach(snapshot, attachment_id, access, place, purpose)
            notes += provider.notes
        notes += bring(undo, made[root.member], root, place, within, f"{attachment_id}-{index}")
    return list(dict.fromkeys(notes))  # `copy` says of what it makes itself what `bring` says


def staging_directory() -> str:
    """Where a volume is mounted for a moment, and nobody else comes: `<attachment id>-<n>`."""
    return private_directory(os.path.join(run_directory(), "staging"))


def bring(undo: Undo, made: MountSpec | Tree, root: Root, place: str, within: str, name: str) -> list[str]:
    """See to it that `root`, in what was attached, is seen at `place`; `within` is the place of another root that this
    one is below, or ''. Returns notes. Raises JudgedBadError where an image has a link on the way."""
    if isinstance(made, Tree):
        if root.inside or made.path != place:
            raise StorageError("a root below its volume's top can't be a plain tree", object=place)
        return []
    if not within and not os.path.isdir(place):
        undo.push(place, lambda: _remove_if_empty(place))
        os.mkdir(place)
    staging = private_directory(os.path.join(staging_directory(), name))
    undo.push(staging, lambda: _remove_if_empty(staging))
    _mount(undo, made, staging)
    with (
        _inside(staging, os.path.join(staging, root.inside), root.path) as source,
        _inside(within or place, place, root.path) as target,
    ):
        notes = _keep_out(source, root.path, place, writable="ro" not in made.options)
        _push_unmount(undo, place)
        mounts.bind(source, target, place)
    mounts.unmount(staging)
    _remove_if_empty(staging)
    return notes


def _keep_out(top: int, origin: str, place: str, *, writable: bool) -> list[str]:
    """Close the directory that will be seen at `place` to those who can't come to its origin for a closed directory
    above that, before they see it; returns notes. Where there is no such directory now, nobody knows."""
    found = os.fstat(top)
    had = permissions.reach(origin, found.st_gid) if os.path.isdir(os.path.dirname(origin)) else 0o077
    lost = permissions.newly_reached(found.st_mode, found.st_gid, place, had)
    if not lost:
        return []
    if not writable:
        return [permissions.SHOWN]
    os.fchmod(top, stat.S_IMODE(found.st_mode) & ~lost)
    return [permissions.CLOSED]


@contextmanager
def _inside(top: str, path: str, origin: str) -> Iterator[int]:
    """The directory `path`, open: `top`, or in what is seen there, the image of which `origin` was. Whoever could write
    to the origin may have put a link in its place, by name it would lead to live data. Raises JudgedBadError."""
    with tree.open_tree(top) as image:
        try:
            found = image.get(os.path.relpath(path, top))
        except OSError as error:
            if error.errno not in tree.SWAPPED:
                raise
            raise JudgedBadError(
                "the image has a link, or no directory, in its place", object=origin, cure="restore another set"
            ) from None
        yield found


def _mount(undo: Undo, spec: MountSpec, place: str) -> None:
    _push_unmount(undo, place)
    mounts.mount(spec, place)


def _push_unmount(undo: Undo, place: str) -> None:
    """The inverse of a mount there; it leaves alone what somebody else had mounted at `place` before."""
    before = sum(entry.path == place for entry in mounts.table())

    def inverse() -> None:
        if sum(entry.path == place for entry in mounts.table()) > before:
            mounts.unmount(place)

    undo.push(f"mount {place}", inverse)


def _remove_if_empty(path: str) -> None:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise BusyError(f"can't remove it: {error.strerror}", object=path) from None
