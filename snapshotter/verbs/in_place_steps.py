"""The steps of a restore in place, there. Any of them may be begun again after a kill.

    prove     the databases' own pointers resolve (L2), on a clone, or
    stage     the new content is made ready beside the old           inverse: it is removed
    check     on what was made ready
    stop      the service is stopped and masked, nobody uses it      inverse: unmasked, started if it ran
    save      (--aside on another disk) old data copied, removed     inverse: copied back
    keep      keys and sign-state as they are to be, owner, modes
    exchange  new and old change places, or the volumes are swapped  inverse: back, the higher sign-state goes along
    start     unmasked, started if it ran                            inverse: stopped
    healthy   it is the same node, and lives

The inverses are in `in_place_back`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from snapshotter import checks
from snapshotter.core.errors import JudgedBadError, NotFoundError, PreconditionError, SnapshotterError
from snapshotter.core.model import new_attachment_id, utc_now
from snapshotter.host import exchange, tree
from snapshotter.host.mounts import is_under
from snapshotter.host.store import told
from snapshotter.nodes import files, health, identity
from snapshotter.verbs import in_place_away as away
from snapshotter.verbs import in_place_signing as signing
from snapshotter.verbs import in_place_stage as staging
from snapshotter.verbs import in_place_swap as swapping
from snapshotter.verbs import verify
from snapshotter.verbs.in_place_plan import different
from snapshotter.verbs.in_place_ways import Ground
from snapshotter.verbs.in_place_work import Work


class Unhealthy(JudgedBadError):
    """The new content is in place and the node runs on it, but isn't well: for a person to judge, not to be undone."""


def forward(work: Work) -> None:
    """All steps that aren't done. After a kill the node may have run (a service without a unit isn't masked): until it
    was meant to, it is stopped again, and what it signed meanwhile is taken along."""
    for name in ORDER_AWAY if work.away else ORDER:
        again = name in ("stop", "keep", "exchange") and not work.begun("start")
        if work.journal.last("done", name) is not None and not (again and work.begun(name)):
            continue
        if name == "keep" and work.touched():
            continue
        work.journal.begin(name)
        STEPS[name](work)
        work.journal.done(name)
    work.journal.append("restored", healthy=work.health.healthy if work.health else None)


# --------------------------------------------------------------------------------------- beside the node, which runs


def prove(work: Work) -> None:
    """On a clone: where nothing is made ready (a swap), or where links in it lead to live roots."""
    if work.plan.set_id and work.plan.only != "key" and not _proven_staged(work):
        work.notes += verify.require(work.found(), verify.prove_set(work.session, work.found(), 2, record=False))


def stage(work: Work) -> None:
    work.unstage()
    plan = work.plan
    if plan.way == "swap":
        return
    if plan.resync:
        _make_ready(work, {})
        return
    attachment_id = new_attachment_id(utc_now())
    providers = sorted({member.provider for member in work.found().birth.members})
    work.journal.append("attachment", id=attachment_id, providers=providers)
    with staging.views(work.session, plan, work.found(), attachment_id) as seen:
        _make_ready(work, seen)
    work.journal.append("detached", id=attachment_id)


def _make_ready(work: Work, seen: dict[str, str]) -> None:
    plan, profile = work.plan, work.profile
    names = staging.names_of(plan, profile, seen)
    saved = work.saved_roots()
    live = [(root, saved.get(root, root)) for root in plan.roots]
    wanted = {"key": profile.identity, "database": profile.database}.get(plan.only, ()) if seen else ()
    image = staging.image_places(plan, seen)
    in_it = staging.key_files(plan, image)
    if not staging.key_files(plan, live):
        in_it = in_it or [pattern for pattern in wanted if staging.there(image, pattern)]
    if not names or (wanted and not in_it):
        what = "is no database" if plan.only == "database" else "are no keys"
        raise NotFoundError(f"there {what} in it", object=plan.set_id or plan.path)
    signer = identity.validator(image, profile) if image else ""  # what stands there later may be the live key
    signed = staging.signed_in(plan, profile, seen)
    work.journal.append("names", names=dict(names), signer=signer, signed=signed)
    filled = {path: names.get(path, []) for path in (*names, *signed)}
    filled |= {path: [*chosen, *signed.get(path, ())] for path, chosen in filled.items() if chosen is not None}
    for ground in plan.grounds:
        if ground.path in filled:
            work.journal.append("staged", path=ground.staged, known=staging.make_staged(ground))
    if seen:
        work.notes += staging.fill(work.session, plan, filled, seen, 0)
    if not plan.only:
        staging.strip(profile, work.staged_places())


def check(work: Work) -> None:
    """What was made ready, before anybody is stopped for it."""
    if work.plan.set_id and work.plan.only != "key" and _proven_staged(work):
        found = work.found()
        places = [pair for pair in work.staged_places() if os.path.isdir(pair[1])]
        crash = found.marks.get("grade") == "crash"
        proof = checks.prove(places, work.profile, 2, crash=crash, report=work.session.report)
        work.notes += verify.require(found, proof)


def _proven_staged(work: Work) -> bool:
    return work.plan.way == "copy" and not work.plan.outside() and not work.away


# ------------------------------------------------------------------------------------------------ the node is stopped


def stop(work: Work) -> None:
    work.stop()


def save(work: Work) -> None:
    names = staging.names_of(work.plan, work.profile, {})
    for ground in work.plan.grounds:
        if ground.path not in names or not os.path.isdir(ground.path):
            continue
        entries = staging.entries_of(work.plan, ground, names[ground.path])
        earlier = work.journal.last("saved", ground.path)
        if work.journal.last("removing", ground.path) is None:
            earlier = None  # all is still there, and the node may have gone on with it after a reboot: copy it anew
        if earlier is None:
            for record in work.journal.all("saving", ground.path):
                exchange.remove(ground.aside, tuple(record["known"]))
            exchange.remove_empty([], ground.aside)  # killed between making it and the record
            os.mkdir(ground.aside, 0o700)
            work.journal.append("saving", step=ground.path, known=exchange.known(ground.aside))
            away.save(ground, entries, work.session.report)
            there = sorted(os.listdir(ground.aside))
            work.journal.append("saved", step=ground.path, entries=entries, there=there)
            work.journal.append("removing", step=ground.path)
        else:
            signing.into_copy(work, ground)
        away.remove_saved(ground, entries if earlier is None else earlier["entries"])


def keep(work: Work) -> None:
    """What the new content must have of the old one, now that nobody writes it."""
    plan, profile = work.plan, work.profile
    if plan.way == "swap":
        return
    if plan.brings_key:
        _identity(work)
    if not plan.only:
        _add_secrets(work, _secrets(work), work.staged_places())
    signing.into_staged(work)
    staging.dress(plan, work.staged_places(), profile, work.names())
    units = signing.first(work, staging.units_of(plan, work.names()))
    above = sorted({path for unit in units for path in exchange.missing_above(unit.place)}, key=len, reverse=True)
    work.journal.append("units", units=msgspec.to_builtins(units))
    work.journal.append("above", made=[path for path in above if any(is_under(path, root) for root in plan.roots)])
    for ground in plan.grounds:
        if os.path.isdir(ground.staged):
            _top(work, ground)
            _sync(ground.staged)


def _top(work: Work, ground: Ground) -> None:
    """The directory of entries that change places stays: what is its own goes along by itself."""
    whole = ground.fixed and work.names().get(ground.path, ()) is None
    if whole and work.journal.last("top", ground.path) is None:
        was, to = staging.top_of(ground.path), staging.top_of(ground.staged)
        work.journal.append("top", step=ground.path, path=ground.path, was=was, to=to)


def _identity(work: Work) -> None:
    plan, profile, live = work.plan, work.profile, work.live
    if plan.identity == "set" or not os.path.isdir(live):
        return
    new = staging.staged_of(plan, plan.path)
    ours, theirs = plan.outside(dict(work.staged_places())), plan.outside(work.saved_roots())
    if plan.identity == "live":
        _carry_identity(work, live, new)
        found = identity.read(new, profile, plan.node.key_file, production=plan.path, roots=ours)
        if plan.address and (found is None or found.address != plan.address):
            raise different(plan.address, found.address if found else "nobody", plan.set_id)
        return
    found = identity.read(new, profile, plan.node.key_file, production=plan.path, roots=ours)
    mine = identity.read(live, profile, plan.node.key_file, production=plan.path, roots=theirs)
    if mine is not None and found is not None and not mine.same_as(found):
        raise different(mine.address, found.address, plan.set_id)
    if mine is not None and found is None and not plan.only:
        _carry_identity(work, live, new)


def _carry_identity(work: Work, live: str, new: str) -> None:
    plan = work.plan
    identity.carry(
        live,
        new,
        work.profile,
        plan.node.key_file,
        production=plan.path,
        source_roots=plan.outside(work.saved_roots()),
        into_roots=plan.outside(dict(work.staged_places())),
    )


Secrets = list[tuple[str, bytes, os.stat_result]]


def _secrets(work: Work) -> Secrets:
    """Of the old data, wherever it is. What can't be read is no reason to leave a node that is damaged as it is."""
    saved = work.saved_roots()
    places = [(root, saved.get(root, root)) for root in work.plan.roots]
    try:
        return identity.secrets_of(places, work.profile, work.plan.left_alone) if os.path.isdir(work.live) else []
    except (PreconditionError, OSError) as error:
        why = error.line() if isinstance(error, PreconditionError) else str(error)
        work.notes.append(f"whether the old data has keys that the set lacks can't be told: {why}")
        return []


def _add_secrets(work: Work, secrets: Secrets, places: list[tuple[str, str]]) -> None:
    """What the old data alone has: an account made since the take would be gone with it at the discard."""
    added, alone = identity.add_secrets(secrets, places, work.profile, replaced=work.plan.identity == "set")
    if added:
        work.notes.append(f"kept, as the set has none: {', '.join(added)}")
    if alone:
        work.notes.append(f"only what was set aside has: {', '.join(alone)}")
    work.journal.append("alone", names=alone)


def exchange_places(work: Work) -> None:
    work.unused(2.0)
    if work.plan.way == "swap":
        _swap(work)
    else:
        if work.moved() and not work.moved(all_of_them=True):
            signing.into_new(work)  # killed in the middle, and somebody may have run it since
        _exchange(work)
    work.unused(2.0)


def _exchange(work: Work) -> None:
    units = work.units()
    for ground in work.plan.grounds:
        if any(unit.old for unit in units):
            signing.make_private(ground.aside, [unit.aside for unit in units])
    for unit in units:
        with told(unit.place):
            exchange.forward(unit)
    for top in work.journal.all("top"):
        with told(top["path"]):
            staging.set_top(top["path"], top["to"])
    exchange.sync_parents([path for unit in units for path in (unit.place, unit.aside)])
    if not any(exchange.where_old(unit) == unit.staged for unit in units):
        for record in work.journal.all("staged"):
            exchange.remove(record["path"], tuple(record["known"]))  # what is left of it: directories, empty


def _swap(work: Work) -> None:
    plan = work.plan
    if work.touched():
        swapping.swap_back(work.session, plan)  # a killed run's, that nobody has used: the old is to be looked into
    secrets = _secrets(work)
    work.notes += swapping.swap(work.session, plan, work.found())
    _add_secrets(work, secrets, work.places())
    staging.strip(work.profile, work.places())
    for path in identity.secret_files(work.places(), work.profile, plan.node.key_file):
        files.hide(path)
    for root in plan.roots:
        _sync(root)


# -------------------------------------------------------------------------------------------------------- it runs


def start(work: Work) -> None:
    work.let_run(bool(work.plan.running))
    work.started = True


def healthy(work: Work) -> None:
    """Raises Unhealthy: then the restore is done, and journalled as such."""
    plan = work.plan
    if work.service is None or not plan.running:
        return
    seen = work.journal.last("seen") or {}
    try:
        now = identity.read(plan.path, work.profile, plan.node.key_file, roots=plan.outside())
    except SnapshotterError:
        now = None
    expected = health.Expected(
        enode_id=now.node_id if now else seen.get("enode_id") if not plan.brings_key else None,
        height=plan.height if plan.set_id and plan.only != "key" else None,
        min_peers=0 if seen.get("peers") == 0 else 1,
    )
    work.health = health.prove(plan.node, work.profile, expected, float(plan.node.timeout), service=work.service)
    if old := work.users_of_old():
        work.health = msgspec.structs.replace(
            work.health,
            healthy=False,
            findings=(*work.health.findings, f"something runs on the old data: {old}"),
            hints=(*work.health.hints, "restart what mounts it (a container sees the old directory until then)"),
        )
    work.notes += work.health.notes
    if work.health.healthy is False:
        work.note("restored", healthy=False)
        raise Unhealthy(
            f"restored, but the node isn't well: {'; '.join(work.health.findings)}",
            object=plan.path,
            cure="; ".join(work.health.hints),
            undo_command=f"snapshotter restore --undo {plan.path}",
        )


STEPS: dict[str, Callable[[Work], None]] = {
    "prove": prove, "stage": stage, "check": check, "stop": stop, "save": save, "keep": keep,
    "exchange": exchange_places, "start": start, "healthy": healthy,
}  # fmt: skip
ORDER = ("prove", "stage", "check", "stop", "keep", "exchange", "start", "healthy")
#: Where the old data must go first, to another disk, so that there is room.
ORDER_AWAY = ("prove", "stop", "save", "stage", "check", "keep", "exchange", "start", "healthy")


def _sync(path: str) -> None:
    """Everything of its file system, on the disk. Raises StorageError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with told(path):
            tree.syncfs(fd)
    finally:
        os.close(fd)
