"""The new content made ready beside the old, on its file system, while the node still runs: an image looked into,
copied, rid of what is stale. Touches nothing but what it makes; must know no journal and no service.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from snapshotter.core.errors import JudgedBadError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.model import Access, MountSpec, Progress, Purpose, SnapshotSet, Tree
from snapshotter.host import exchange, mounts, tree
from snapshotter.host.exchange import Unit
from snapshotter.host.mirror import Mirror
from snapshotter.host.mounts import is_under
from snapshotter.host.places import private_directory
from snapshotter.host.store import told
from snapshotter.nodes import files, identity, sign_state
from snapshotter.nodes.files import Places
from snapshotter.nodes.profiles import Profile
from snapshotter.verbs.in_place_plan import Plan
from snapshotter.verbs.in_place_ways import Ground, left_alone, refuse_no_room, refuse_writes, set_aside_in_image
from snapshotter.verbs.restore import staging_directory
from snapshotter.verbs.session import Session

#: Of each ground (by its path): the entries that change places; None: all there is.
Names = Mapping[str, Sequence[str] | None]
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")


# ------------------------------------------------------------------------------------------------------- the image


@contextmanager
def views(session: Session, plan: Plan, found: SnapshotSet, attachment_id: str) -> Iterator[dict[str, str]]:
    """Where the image of each root can be read: mounted read-only in a private place. A user without root, who can't
    mount, gets a copy beside the ground (`<staged>.image-<n>`), from which things may be moved. All of it is gone
    afterwards, on every way out; what a killed run left, `forget` removes."""
    holding = {provider.name: provider for provider in session.providers_of(found)}
    made: dict[int, str] = {}
    try:
        for root in found.birth.roots:
            if root.member in made:
                continue
            snapshot = next(member for member in found.snapshots if member.birth.member == root.member)
            if os.geteuid() == 0:
                place = private_directory(os.path.join(staging_directory(), f"{attachment_id}-{root.member}"))
                spec = holding[snapshot.provider].attach(
                    snapshot, attachment_id, Access.READ_ONLY, place, Purpose.VERIFY
                )
            else:
                place = f"{ground_of(plan, root.path).staged}.image-{root.member}"
                spec = holding[snapshot.provider].attach(
                    snapshot, attachment_id, Access.WRITABLE, place, Purpose.VERIFY
                )
            if isinstance(spec, MountSpec):
                mounts.mount(spec, place)
            elif not isinstance(spec, Tree) or spec.path != place:
                raise StorageError("the provider put it elsewhere", object=place)
            made[root.member] = place
        yield {root.path: os.path.join(made[root.member], root.inside).rstrip("/") for root in found.birth.roots}
    finally:
        forget(session, attachment_id, list(holding))


def forget(session: Session, attachment_id: str, names: Sequence[str] | None) -> None:
    """End an attachment of `views`, also one of a killed run, by the providers of these names: no other can have made
    it, and one that can't be asked now is no matter. None: by all. Absent is done."""
    staging = staging_directory()
    ours = [os.path.join(staging, name) for name in os.listdir(staging) if name.startswith(attachment_id)]
    for place in ours:
        mounts.unmount(os.path.realpath(place))
    asked = [provider for provider in session.everywhere()[0] if names is None or provider.name in names]
    failed: dict[str, SnapshotterError] = {}
    ended: set[str] = set()
    for provider in asked:
        try:
            listed = any(each.id == attachment_id for each in provider.attachments())
        except SnapshotterError as error:
            listed, failed[provider.name] = False, error
        if listed:
            provider.detach(attachment_id)
            ended.add(provider.name)
    for place in ours:
        if os.path.isdir(place):
            os.rmdir(place)
    for name, missed in failed.items():
        if name not in ended:  # its part may be where it couldn't look
            raise missed


def ground_of(plan: Plan, path: str) -> Ground:
    """The one that a path of production is in."""
    return max((g for g in plan.grounds if is_under(path, g.path)), key=lambda g: len(g.path))


def staged_of(plan: Plan, root: str) -> str:
    """Where the new content of a root is made ready."""
    ground = ground_of(plan, root)
    return root.replace(ground.path, ground.staged, 1)


# ------------------------------------------------------------------------------------------------- which entries


def image_places(plan: Plan, seen: Mapping[str, str]) -> list[tuple[str, str]]:
    """Every root, and where its image can be read."""
    return [(root, seen[root]) for root in plan.roots if root in seen]


def there(places: Places, pattern: str) -> bool:
    """Whether a profile's pattern means anything in these places."""
    found = [files.locate(places, name) for name in files.expand(places, pattern)] if places else []
    return any(files.held(places, path) and os.path.lexists(path) for path in found)


def names_of(plan: Plan, profile: Profile, seen: Mapping[str, str]) -> dict[str, list[str] | None]:
    """The entries that change places. For a part of a node: what its profile's patterns mean in the image (`seen`: root
    -> where it can be read) or in the live data; wherever a link on the way leads is meant, and the link stays."""
    if not plan.only:
        return {ground.path: None for ground in plan.grounds}
    patterns = (*profile.database, *profile.metadata) if plan.only == "database" else profile.identity
    live = [(root, root) for root in plan.roots] if os.path.isdir(plan.path) else []
    chosen: dict[str, list[str] | None] = {}
    for places in filter(None, [live, image_places(plan, seen)]):
        meant = [_meant(plan, places, name) for pattern in patterns for name in files.expand(places, pattern)]
        for production in [*meant, *key_files(plan, places)]:
            ground = ground_of(plan, production)
            entry = os.path.relpath(production, ground.path)
            if entry == ".":
                chosen[ground.path] = None
            elif (names := chosen.setdefault(ground.path, [])) is not None and entry not in names:
                names.append(entry)
    for path, names in chosen.items():
        # One inside another goes with it.
        if names is not None:
            chosen[path] = sorted(n for n in names if not any(n != m and is_under("/" + n, "/" + m) for m in names))
    return chosen


def signed_in(plan: Plan, profile: Profile, seen: Mapping[str, str]) -> dict[str, list[str]]:
    """For a part of a node: the set's sign-state, by ground. It doesn't change places, but is looked into: what stands
    there must not be lower, whatever part is brought back."""
    found: dict[str, list[str]] = {}
    places = image_places(plan, seen)
    for pattern in sign_state.patterns(profile) if plan.only and places else ():
        for name in files.expand(places, pattern):
            if files.held(places, files.locate(places, name)):
                production = _meant(plan, places, name)
                ground = ground_of(plan, production)
                found.setdefault(ground.path, []).append(os.path.relpath(production, ground.path))
    return found


def key_files(plan: Plan, places: Places) -> list[str]:
    """The key that the config says lies elsewhere than its profile does, by its path in production; none if that isn't
    in these places, or isn't asked for."""
    if plan.only != "key" or not plan.node.key_file:
        return []
    key = os.path.realpath(plan.node.key_file)
    path = files.here(places, key)
    return [key] if files.held(places, path) and os.path.lexists(path) else []


def _meant(plan: Plan, places: Places, name: str) -> str:
    """The path in production of what a name leads to. Raises PreconditionError if the set doesn't hold that."""
    path = files.locate(places, name)
    holding = [(root, place) for root, place in places if is_under(path, place)]
    if not holding:
        raise PreconditionError(
            f"leads to {path}, which the set doesn't hold",
            object=os.path.join(plan.path, name),
            cure="restore it with --to, and copy by hand",
        )
    root, place = max(holding, key=lambda pair: len(pair[1]))
    return os.path.normpath(os.path.join(root, os.path.relpath(path, place)))


# ----------------------------------------------------------------------------------------------------------- copying


def make_staged(ground: Ground) -> exchange.Known:
    """The directory that the new content is made in. Returns what names it."""
    os.makedirs(os.path.dirname(ground.staged), exist_ok=True)
    os.mkdir(ground.staged, 0o700)
    found = exchange.known(ground.staged)
    assert found is not None
    return found


def fill(session: Session, plan: Plan, names: Names, seen: Mapping[str, str], gained: int) -> list[str]:
    """Copy the image's entries to where they are made ready; returns notes. Raises PreconditionError (no room, before
    the first byte), JudgedBadError, StorageError."""
    notes: list[str] = []
    for ground in plan.grounds:
        if ground.path not in names:
            continue
        for root in [root for root in plan.roots if ground_of(plan, root) == ground]:
            chosen = _inside(names[ground.path], os.path.relpath(root, ground.path))
            with told(staged_of(plan, root)):
                notes += _copy(session, plan, seen[root], staged_of(plan, root), ground, root, chosen, gained)
    return notes


def _copy(
    session: Session,
    plan: Plan,
    view: str,
    into: str,
    ground: Ground,
    root: str,
    chosen: Sequence[str] | None,
    gained: int,
) -> list[str]:
    if os.geteuid() != 0 and ground.path == root:
        _move_out(view, into, chosen)
        return []
    with tree.open_tree(view) as source, tree.open_tree(into) as target:
        sizes: dict[tuple[int, int], int] = {}

        def count(_: int, __: str, path: str, found: os.stat_result) -> None:
            if stat.S_ISREG(found.st_mode) and _wanted(path, chosen):
                sizes[found.st_dev, found.st_ino] = min(found.st_blocks * 512, found.st_size + 4096)

        now = tree.walk(source, seen=count)
        now = {path: entry for path, entry in now.items() if _wanted(path, chosen) or _above(path, chosen)}
        total, done = sum(sizes.values()), 0

        def step(copied: int) -> None:
            nonlocal done
            done += copied
            session.report(Progress("copying", done, max(done, total)))

        def must_fit() -> None:
            refuse_no_room(total, into, plan.path, gained=gained)
            refuse_writes(session, {into: total})

        made = Mirror(source, target, step=step, must_copy=must_fit)
        made.update(now)
        if missing := next((path for path in now if path not in made.have), ""):
            raise JudgedBadError(f"{missing!r} went while it was copied", object=plan.set_id)
        made.finish(now)
    return made.warnings


def _inside(chosen: Sequence[str] | None, below: str) -> Sequence[str] | None:
    """The names as a root sees them that lies `below` its ground."""
    if chosen is None or below == "." or any(is_under(f"/{below}", f"/{name}") for name in chosen):
        return chosen if below == "." else None
    return [os.path.relpath(name, below) for name in chosen if is_under(f"/{name}", f"/{below}")]


def _wanted(path: str, chosen: Sequence[str] | None) -> bool:
    if chosen is None:
        return not set_aside_in_image(path)
    return any(is_under("/" + path, "/" + name) for name in chosen)


def _above(path: str, chosen: Sequence[str] | None) -> bool:
    return chosen is not None and any(is_under("/" + name, "/" + path) for name in chosen)


def _move_out(view: str, into: str, chosen: Sequence[str] | None) -> None:
    """Out of a copy that is ours alone. Directory times don't matter; modes of the top do."""
    like = os.stat(view)
    for name in filter(lambda name: _wanted(name, None), os.listdir(view)) if chosen is None else chosen:
        if os.path.lexists(os.path.join(view, name)):
            os.makedirs(os.path.dirname(os.path.join(into, name)), exist_ok=True)
            exchange.move(os.path.join(view, name), os.path.join(into, name))
    os.chmod(into, stat.S_IMODE(like.st_mode))


def strip(profile: Profile, places: Places) -> None:
    """Remove what was of the moment (pid files, ports): stale in an image. By pattern, only inside `places`, where also
    the links on the way are looked up: they name production."""
    for pattern in profile.runtime:
        for name in files.expand(places, pattern):
            path = files.itself(places, name)
            if not files.held(places, path):
                continue
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


def dress(plan: Plan, places: list[tuple[str, str]], profile: Profile, names: Names) -> None:
    """Owner as the config names it, 0600 for what is secret. Raises OSError, PreconditionError."""
    if plan.node.owner and os.geteuid() == 0:
        uid, gid = owner_of(plan.node.owner)
        for ground in plan.grounds:
            if ground.path in names and os.path.isdir(ground.staged):
                _own_all(ground.staged, uid, gid)
    for path in identity.secret_files(places, profile, plan.node.key_file):
        if any(is_under(path, place) for _, place in places):
            files.hide(path)


def top_of(path: str) -> dict[str, Any]:
    """Owner, mode and ACLs of a directory that can't be renamed itself, for the journal."""
    found = os.stat(path)
    try:
        acls = {name: os.getxattr(path, name).hex() for name in os.listxattr(path) if name in _ACLS}
    except OSError as error:
        if error.errno not in tree.UNSUPPORTED:
            raise
        acls = {}
    return {"uid": found.st_uid, "gid": found.st_gid, "mode": stat.S_IMODE(found.st_mode), "acls": acls}


def set_top(path: str, wanted: Mapping[str, Any]) -> None:
    """What `top_of` said. Without root an owner stays who it is, and the directory of another as it is: what can be
    written there could be before. Raises OSError."""
    now = top_of(path)
    if now == wanted:
        return
    passed_over = () if os.geteuid() == 0 else (PermissionError,)
    with suppress(*passed_over):
        os.chown(path, wanted["uid"], wanted["gid"])
    with suppress(*passed_over):
        for name in now["acls"].keys() - wanted["acls"].keys():
            os.removexattr(path, name)
        for name, value in wanted["acls"].items():
            os.setxattr(path, name, bytes.fromhex(value))
        os.chmod(path, wanted["mode"])  # the last: a chown clears bits, an ACL is a mode as well


def owner_of(text: str) -> tuple[int, int]:
    """Of `user` or `user:group`. Raises PreconditionError."""
    import grp
    import pwd

    user, _, group = text.partition(":")
    try:
        found = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
        gid = found.pw_gid if not group else int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise PreconditionError("no such user or group", object=text, cure="correct `owner` in the config") from None
    return found.pw_uid, gid


def _own_all(top: str, uid: int, gid: int) -> None:
    with tree.open_tree(top) as dirs:
        os.fchown(dirs.top, uid, gid)

        def own(at: int, name: str, _: str, found: os.stat_result) -> None:
            if (found.st_uid, found.st_gid) != (uid, gid):
                os.chown(name, uid, gid, dir_fd=at, follow_symlinks=False)

        tree.walk(dirs, seen=own)


# ------------------------------------------------------------------------------------------------------------- units


def entries_of(plan: Plan, ground: Ground, chosen: Sequence[str] | None) -> list[str]:
    """The entries of a ground that are renamed each as a whole; '' is the ground itself."""
    table, grounds = mounts.table(), [each.path for each in plan.grounds]
    blocked = [*left_alone(ground, grounds, table), *(g for g in grounds if g != ground.path)]
    inner = {os.path.relpath(path, ground.path) for path in blocked if is_under(path, ground.path)}
    return [
        name
        for start in ([""] if chosen is None else chosen)
        for name in _entries(ground, start, inner, whole=not ground.fixed)
    ]


def units_of(plan: Plan, names: Names) -> list[Unit]:
    """What changes places, with who is who on the disk now. The node is stopped."""
    units = [
        unit_of(ground, name)
        for ground in plan.grounds
        if ground.path in names
        for name in entries_of(plan, ground, names[ground.path])
    ]
    return [unit for unit in units if unit.old is not None or unit.new is not None]


def unit_of(ground: Ground, name: str) -> Unit:
    place, staged, aside = (os.path.join(top, name).rstrip("/") for top in (ground.path, ground.staged, ground.aside))
    if ground.away:
        aside = f"{staged}.old"  # never used: what was there is gone from its place, and saved elsewhere
    return Unit(place, staged, aside, exchange.known(place), exchange.known(staged))


def _entries(ground: Ground, name: str, blocked: set[str], *, whole: bool) -> list[str]:
    """The entries at or below `name` that can be renamed: it, unless something that stays where it is lies in it."""
    if name in blocked:
        return []
    inside = any(other.startswith(f"{name}/" if name else "") for other in blocked)
    if not inside and (name or whole):
        return [name]
    found: list[str] = []
    below: set[str] = set()
    for top in (ground.path, ground.staged):
        try:
            below |= set(os.listdir(os.path.join(top, name)))
        except (FileNotFoundError, NotADirectoryError):
            continue
    ours = os.path.basename(ground.staged) if not name else ""
    for entry in sorted(below):
        if not (ours and entry.startswith(ours)):
            found += _entries(ground, f"{name}/{entry}" if name else entry, blocked, whole=True)
    return found
