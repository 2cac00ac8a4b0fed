"""What was signed goes along, whichever way data moves: the higher sign-state of both is put into what is about to take
the other's place. Each call may be made again after a kill.

`sign_state` is told where everything will be, entry by entry (path in production -> path now): what doesn't change
places is one file for both sides, and left alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from snapshotter.core.errors import PreconditionError
from snapshotter.host import exchange
from snapshotter.host.exchange import Unit
from snapshotter.host.mounts import is_under
from snapshotter.nodes import files, identity, sign_state
from snapshotter.verbs.in_place_ways import Ground
from snapshotter.verbs.in_place_work import Work

Where = Mapping[str, str]


def into_staged(work: Work) -> None:
    """Before anything changes places: into what was made ready. Raises PreconditionError where it can't be guarded."""
    plan = work.plan
    if not work.profile.sign_state:
        return
    now, then = _saved(work), dict([(plan.path, plan.path)])
    names, seen = work.names(), work.journal.last("names") or {}
    of_set = seen.get("signed", {})
    for ground in plan.grounds:
        if ground.path in names:
            then |= _entries(ground, names[ground.path], ground.staged)
        then |= _entries(ground, of_set.get(ground.path, []), ground.staged)
    if not os.path.isdir(now[plan.path]):
        if plan.from_set or not os.path.isdir(then[plan.path]):
            return
        raise PreconditionError(
            f"there is no sign-state at {plan.path}, so whether the set's is older can't be told: "
            "a validator that signs with an older one is slashed",
            object=plan.set_id,
            cure="copy the newest back from wherever the node last ran, or say --sign-state-from-set "
            "if it has signed nothing since the set was taken",
        )
    keys = sign_state.Keys(
        live=identity.validator(_as_places(plan.path, now), work.profile),
        of_set=seen.get("signer", ""),
        live_stays=plan.identity == "live" or not plan.brings_key,
    )
    work.notes += _carry(work, now, then, from_set=plan.from_set, keys=keys)
    if any(of_set.values()):
        _raise_live(work, now, then)
    elif plan.from_set:
        work.journal.append("accepted", digest=sign_state.digest(_as_places(plan.path, then), work.profile))


def _raise_live(work: Work, now: Where, then: Where) -> None:
    """Where only a part changes places the sign-state stays, and becomes what was made ready if that is the higher:
    there is nothing to undo of that. One that can't be ordered is kept beside it."""
    path = work.plan.path
    (_, top), *roots = theirs = _as_places(path, now)
    (_, ready), *others = _as_places(path, then)
    compared = sign_state.compare(ready, top, work.profile, production=path, live_roots=others, roots=roots)
    for found in compared:
        if found.order is sign_state.Order.UNORDERED:
            place = files.locate(theirs, found.name)
            os.rename(place, kept := f"{place}.corrupted-{work.plan.id}")
            work.notes.append(f"what was there of {found.name} is {kept}")
    _carry(work, then, now, from_set=True)


def first(work: Work, units: list[Unit]) -> list[Unit]:
    """These, what holds sign-state before the rest: killed between two, and run, no key meets a record that is lower
    than its own."""
    places = work.places()
    names = [n for pattern in work.profile.sign_state for n in (pattern, *files.expand(places, pattern))]
    signed = {files.locate(places, name) for name in names}
    return sorted(units, key=lambda unit: not any(is_under(path, unit.place) for path in signed))


def into_new(work: Work) -> None:
    """Some of the new content is in its place, the rest still where it was made ready."""
    if work.profile.sign_state:
        then = {unit.place: exchange.where_new(unit) or unit.place for unit in work.units()}
        with work.carrying(work.units()):
            work.notes += _carry(work, {}, then, from_set=work.plan.from_set)


def into_old(work: Work, units: list[Unit], *, ran: bool) -> list[Unit]:
    """Before the old content takes its place again; returns the units as they are then. Where there was none and the
    node `ran`, it is what was signed, and no more: the next restore must find that."""
    if not work.profile.sign_state or not os.path.isdir(work.plan.path):
        return units
    then = {unit.place: exchange.where_old(unit) or (unit.aside if ran else unit.place) for unit in units}
    then |= {place: saved for place, saved in _saved(work).items() if place != saved}
    with work.carrying(units):
        for ground in work.plan.grounds:
            make_private(ground.aside, [unit.aside for unit in units])
        work.notes += _carry(work, {}, then, from_set=_accepted(work, ran))
    units = work.units()
    aside = [exchange.known(unit.aside) for unit in units]  # there also of a new one, where the old run removed the old
    units = [
        msgspec.structs.replace(unit, old=here) if unit.old is None and here != unit.new else unit
        for unit, here in zip(units, aside, strict=True)
    ]
    work.journal.append("units", units=msgspec.to_builtins(units))
    return units


def _accepted(work: Work, ran: bool) -> bool:
    """Whether the old sign-state may come back though it can't be compared. Who said so of the restore spoke of the
    set: what was signed since counts, unless he says it of the undo as well."""
    if work.asked or (work.journal.last("undo") or {}).get("asked"):
        return True
    if not work.plan.from_set:
        return False
    path, then = work.plan.path, (work.journal.last("accepted") or {}).get("digest")
    return not ran or bool(then and then == sign_state.digest([(path, path)], work.profile))


def into_copy(work: Work, ground: Ground) -> None:
    """What the node signed in its place after that was copied to another disk (it ran again after a reboot)."""
    saved = _saved(work, only=ground)
    if work.profile.sign_state and os.path.isdir(ground.path) and saved:
        _carry(work, {}, saved, from_set=True)


def make_private(aside: str, wanted: list[str]) -> None:
    """The directory for entries that are set aside one by one: nobody's but ours."""
    if any(path.startswith(aside + "/") for path in wanted) and not os.path.isdir(aside):
        os.mkdir(aside, 0o700)


def _carry(work: Work, now: Where, then: Where, *, from_set: bool, keys: sign_state.Keys | None = None) -> list[str]:
    path = work.plan.path
    (_, live), *live_roots = _as_places(path, now)
    (_, incoming), *roots = _as_places(path, then)
    return sign_state.carry_higher(
        live,
        incoming,
        work.profile,
        production=path,
        live_roots=live_roots,
        roots=roots,
        from_set=from_set,
        keys=keys,
    )


def _as_places(path: str, where: Where) -> list[tuple[str, str]]:
    """The data path first."""
    return [(path, where.get(path, path)), *(pair for pair in where.items() if pair[0] != path)]


def _saved(work: Work, only: Ground | None = None) -> dict[str, str]:
    """Where what was copied to another disk lies, and the data path, wherever it is."""
    path = work.plan.path
    found = {path: path} if only is None else {}
    for ground in [only] if only else work.plan.grounds:
        if (record := work.journal.last("saved", ground.path)) is not None and not work.brought_back(ground):
            found |= _entries(ground, record["entries"], ground.aside)
    return found


def _entries(ground: Ground, names: Sequence[str] | None, top: str) -> dict[str, str]:
    return {
        os.path.join(ground.path, name).rstrip("/"): os.path.join(top, name).rstrip("/")
        for name in ([""] if names is None else names)
    }
