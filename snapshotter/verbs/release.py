"""release: end an attachment. Refused while something has it open and, for a clone written since, without a word."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from shlex import quote
from typing import Any

from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError, SnapshotterError
from snapshotter.core.model import Access, Attachment, parse_compact_time
from snapshotter.host import mounts, processes, tree
from snapshotter.host.locks import Locks
from snapshotter.provider import Provider
from snapshotter.verbs.documents import attachment_document
from snapshotter.verbs.restore import layout, staging_directory
from snapshotter.verbs.session import Session


def release(session: Session, where: str, *, discard_changes: bool = False) -> dict[str, Any]:
    """Unmount and remove what a restore made at `where` (a directory, or an attachment id). Returns its document.
    Raises NotFoundError, BusyError (in use, written since, or not mounted, so that this can't be told)."""
    providers, gone = session.everywhere()
    seen: dict[tuple[str, str, int], tuple[Provider, Attachment]] = {}  # each once, whichever instances see it
    unasked = [entry.provider for entry in gone]
    for provider in providers:
        try:
            for found in provider.attachments():  # what is listed before an error counts
                seen.setdefault((found.id, found.provider, found.member), (provider, found))
        except SnapshotterError:
            unasked.append(provider.name)
    parts = list(seen.values())
    attachment_id = _identify([found for _, found in parts], where, unasked)
    ours = [(provider, found) for provider, found in parts if found.id == attachment_id]
    attachments = [found for _, found in ours]
    here = {(found.provider, found.member) for found in attachments}
    hidden = {
        member.provider
        for entry in session.catalog(attachments[0].set_id).sets
        for number, member in enumerate(entry.birth.members)
        if member.provider in unasked and (member.provider, number) not in here
    }
    if hidden:  # its part of this attachment would be forgotten
        raise PreconditionError(
            f"provider {min(hidden)} can't be asked now", object=where, cure="make it work, then try again"
        )
    roots = placed(session, attachments)
    paths = places_of(roots, attachments)
    trees = {found.path for found in attachments if found.tree}
    if any(found.held for found in attachments):
        raise BusyError("is being made by a running restore", object=where, cure="wait for it, or stop it")
    with Locks([f"attachment:{attachment_id}"]):
        mounted = mounted_of(paths, ours, [found for _, found in parts])
        for path in [path for path in paths if os.path.lexists(path)]:
            refuse_foreign_mount(path, trees)
            if path in mounted or path in trees:
                _refuse_if_used(path)
        if not discard_changes and attachments[0].access is Access.WRITABLE:
            _refuse_if_changed(session, roots, attachments, mounted)
        for path in mounted:
            mounts.unmount(path)
        notes: list[str] = []
        for provider in {id(provider): provider for provider, _ in ours}.values():
            provider.detach(attachment_id)
            notes += provider.notes
        tidy(paths, attachment_id)
    return {"released": attachment_document(attachments), "set_id": attachments[0].set_id, "warnings": notes}


def placed(session: Session, parts: list[Attachment]) -> dict[str, int]:
    """Where each root of the attachment's set was brought, and the member that it is in: one may have several roots."""
    found = {part.path: part.member for part in parts if part.path}
    for entry in session.catalog(parts[0].set_id).sets:
        data = entry.birth.roots[0].member
        for top in [part.path for part in parts if part.member == data and part.path]:
            found |= {place: root.member for root, place in layout(entry, top)}
    return found


def places_of(roots: Iterable[str], parts: list[Attachment]) -> list[str]:
    """Everywhere that something of one attachment may be mounted, the deepest first (a root may be inside another):
    where its `roots` were brought (`placed`), and where a killed restore was mounting."""
    staging = staging_directory()
    left = [os.path.join(staging, name) for name in os.listdir(staging) if name.startswith(parts[0].id)]
    return sorted({*roots, *left}, key=lambda path: path.count("/"), reverse=True)


def _identify(attachments: list[Attachment], where: str, unasked: list[str]) -> str:
    wanted = os.path.realpath(where)
    if any(where == found.id for found in attachments):
        return where
    ids = sorted({found.id for found in attachments if found.path and os.path.realpath(found.path) == wanted})
    if len(ids) > 1:  # as where a clone isn't mounted since a reboot, and another took its place
        raise BusyError(f"{' and '.join(ids)} were both brought there", object=where, cure="release one by its id")
    if ids:
        return ids[0]
    cure = "`snapshotter show SET` names attachments"
    if unasked:
        cure += f"; not asked: {', '.join(dict.fromkeys(unasked))}"
    raise NotFoundError("nothing of ours is attached there", object=where, cure=cure)


def mounted_of(
    paths: Iterable[str], ours: Sequence[tuple[Provider, Attachment]], every: Iterable[Attachment]
) -> list[str]:
    """Those of the places at which one attachment is mounted now. After a reboot, or an umount, what a person mounted
    may be there instead, or another one of `every` attachment: a clone names the attachment, in its source or in the
    path within it; a read-only view that or the set, or is some snapshot of ZFS's. (A cloud's disk has no such name:
    there whatever is mounted counts.)"""
    own = ours[0][1]
    others = {each.path for each in every if each.id != own.id and (each.since is not None or each.held)}
    named = all(provider.traits.needs_host for provider, _ in ours)

    def is_it(entry: mounts.Mount) -> bool:
        shown = f"{entry.source} {entry.root}".replace("--", "-")  # as device-mapper has it
        view = own.access is Access.READ_ONLY and (own.set_id in shown or (entry.fstype == "zfs" and "@" in shown))
        return not named or own.id in shown or (view and entry.path not in others)

    here = {entry.path for entry in mounts.table() if is_it(entry)}
    return [path for path in paths if path in here]


def refuse_foreign_mount(path: str, trees: set[str]) -> None:
    """Raise BusyError if somebody mounted something of his own at `path`: on a tree of ours, or on our mount."""
    mounted = [entry for entry in mounts.table() if entry.path == path]
    if len(mounted) > (0 if path in trees else 1):
        raise BusyError("something else is mounted there", object=path, cure=f"umount {path}, then release it again")


def _refuse_if_used(path: str) -> None:
    users = processes.users_of(path)
    if users:
        some = ", ".join(f"{user.name} ({user.pid})" for user in users[:3])
        more = f" and {len(users) - 3} more" if len(users) > 3 else ""
        raise BusyError(f"is in use by {some}{more}", object=path, cure="end that first")


def _refuse_if_changed(
    session: Session, roots: Mapping[str, int], parts: list[Attachment], mounted: Collection[str]
) -> None:
    if any(part.since is not None and not part.path for part in parts):  # `--away`
        raise BusyError(
            "is for another machine: what was written to it there can't be seen",
            object=parts[0].id,
            cure="--discard-changes drops that",
        )
    by_member = {part.member: part for part in parts}
    for place, member in roots.items():
        part = by_member.get(member)
        if part is None or part.since is None:
            continue  # never settled: half-made, nobody has worked in it
        if not part.tree and place not in mounted:
            # After a reboot, or an umount: the clone is there still, with all that was written to it.
            raise BusyError(
                "isn't mounted, so whether it was written to since it was restored can't be told",
                object=place,
                cure=f"{_mount_again(session, part, place)}; or --discard-changes drops what may be in it",
            )
        changed = first_change(place, part.since.timestamp())
        if changed is not None:
            raise BusyError(
                f"was written to since it was restored ({changed})",
                object=place,
                cure="--discard-changes drops that",
            )


def _mount_again(session: Session, part: Attachment, place: str) -> str:
    """What a person types for that. The driver knows of whole volumes only: a directory of one may have been there."""
    births = [entry.birth for entry in session.catalog(part.set_id).sets]
    whole = bool(births) and not any(root.inside for birth in births for root in birth.roots)
    return f"{part.by_hand} {quote(place)}" if part.by_hand and whole else "mount it there again"


def first_change(top: str, since: float) -> str | None:
    """Something under `top` whose inode changed after `since` (seconds, UTC), or None. Only ctime tells: it can't be
    set back by a program."""
    pending = [top]
    while pending:
        directory = pending.pop()
        try:
            found = os.lstat(directory)
            if found.st_ino == 2 and directory != top:
                continue  # where a subvolume was, in a btrfs snapshot of what held it: the kernel makes up its times
            if found.st_ctime > since:
                return directory
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.stat(follow_symlinks=False).st_ctime > since:
                        return entry.path
        except FileNotFoundError:
            continue
    return None


def tidy(paths: list[str], attachment_id: str) -> None:
    """Remove what is left empty of these places, and the directory of the roots beside the data path, where they are
    younger than the attachment: restore made them, and nobody has used them."""
    made_ns = parse_compact_time(attachment_id[1:].partition("-")[0]).timestamp() * 1e9
    beside = {os.path.dirname(path) for path in paths if os.path.dirname(path).endswith(".roots")}
    for path in [*paths, *(f"{top}/outside" for top in beside), *beside]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if tree.born_ns(fd) >= made_ns:
                os.rmdir(path)
        except OSError:
            continue
        finally:
            os.close(fd)
