"""A restore in place, back: the old state again, from whatever it has come to; or the end of it, the old data removed.
Either may be called again after a kill.
"""

from __future__ import annotations

import os

import msgspec

from snapshotter.core.errors import (
    BusyError,
    PreconditionError,
    SnapshotterError,
    StorageError,
    UndoIncompleteError,
)
from snapshotter.host import exchange, mounts
from snapshotter.host.exchange import Unit
from snapshotter.host.store import told
from snapshotter.verbs import in_place_away as away
from snapshotter.verbs import in_place_signing as signing
from snapshotter.verbs import in_place_stage as staging
from snapshotter.verbs import in_place_swap as swapping
from snapshotter.verbs.in_place_ways import is_open
from snapshotter.verbs.in_place_work import Work


def backward(work: Work) -> None:
    """The old state. Raises any of core.errors: nothing was changed if `work.turned` is still false."""
    work.require_disks(all_of_it=True)
    work.refuse_lost()
    if not work.journal.has("returned"):
        work.refuse_foreign()
    appeared = [unit for unit in work.units() if unit.old is None and exchange.known(unit.place) is not None]
    touched = work.begun("exchange") and (bool(appeared) or work.touched())
    changed = work.begun("save") or touched or work.begun("start") or work.turned
    if (returned := work.journal.last("returned")) is not None:
        undo = work.journal.last("undo") or {}
        _let_run(work, bool(returned.get("run_again", undo.get("run_again"))))
        _remove(work, _not_brought_back(work), bool(returned.get("ran", undo.get("ran"))))
        _remove_copies(work)
        return
    runs = changed and work.service is not None and work.service.running()
    before = work.journal.last("undo") or {}
    ran = work.begun("start") or bool(before.get("ran"))
    run_again = bool(work.plan.running) or runs or bool(before.get("run_again"))
    units = _not_brought_back(work)
    apart = work.plan.way == "copy" and ran and not before
    back = work.all_back()
    if changed and not back:
        _refuse_held([*units, *(_made(work, units) if apart else [])])
        try:
            mixed = not ran and work.mixed()
            if not ran and work.may_have_run():
                ran = True
                work.note("ran", mixed=mixed)  # once it is stopped, nothing else tells that
            work.stop()
            if mixed:
                units = _as_left(work, units)
                work.notes.append(
                    "it may have run on a mix of old and new since the restore was interrupted: see to it"
                )
            units = work.settled(units)
            if work.plan.way == "copy" and ran and not before:
                units = [*_as_run(units), *_made(work, units)]
                work.note("units", units=msgspec.to_builtins(units))
            if work.plan.way == "copy" and (ran or work.moved()):
                units = signing.into_old(work, units, ran=ran)
        except BaseException as error:
            if work.turned:
                raise
            # Nothing was changed yet. On what is half old and half new, or gone, nothing may be started: that stays
            # masked.
            if work.begun("start"):
                work.let_run(runs)
            elif not touched and not work.removed():
                work.let_run(runs or bool(work.plan.running))
            elif work.service is not None and isinstance(error, SnapshotterError):
                raise UndoIncompleteError(
                    f"{error.line()}; and what is there is half old, half new: nothing may run on it",
                    object=work.plan.path,
                    left=[work.journal.path, f"the service {work.service.name}, stopped"],
                    cure="mend that",
                    undo_command=f"snapshotter restore --undo {work.plan.path}",
                ) from error
            raise
    work.turned = True
    if not before:
        work.note("undo", run_again=run_again, ran=ran, asked=work.asked)
    if changed and work.plan.way == "swap":
        swapping.swap_back(work.session, work.plan)
    elif changed and not back:
        _exchange_back(work, units, ran)
    exchange.sync_parents([unit.place for unit in units])
    for top in work.journal.all("top"):
        with told(top["path"]):
            staging.set_top(top["path"], top["was"])
    swapping.tidy(work.plan)
    if work.away:  # the old needs the room of the new
        _remove(work, units, ran)
        if work.unremoved:
            raise work.unremoved[0]
        _bring_back(work)
    for path in (work.journal.last("above") or {"made": []})["made"]:
        exchange.remove_empty([], path)
    # From here on what stands there is the old run's again, whatever it makes of it; and nothing that the new holds
    # keeps it from running. Where the journal can't take that, the new goes first, so that this is never done again.
    noted = work.note("returned", run_again=run_again, ran=ran)
    if noted:
        _let_run(work, run_again)
    _remove(work, units, ran)
    _remove_copies(work)
    if not noted:
        work.note("returned", run_again=run_again, ran=ran)  # it may have had no room but for the new
        _let_run(work, run_again)


def _not_brought_back(work: Work) -> list[Unit]:
    """Where the copy of the old was brought back from another disk, what stands there is that, and nobody else's."""
    return [unit for unit in work.units() if not work.brought_back(staging.ground_of(work.plan, unit.place))]


def _let_run(work: Work, run_again: bool) -> None:
    if work.begun("stop"):
        try:
            work.let_run(run_again)
        except SnapshotterError as error:
            work.unstarted = error  # the old data may be just what it can't run on


def _as_left(work: Work, units: list[Unit]) -> list[Unit]:
    """These, after a run on a mix: an old entry that had not changed places yet, and that the node has made anew by a
    rename, or removed, is what stands there now."""
    gone = [u.old is not None and exchange.where_old(u) is None and exchange.where_new(u) != u.place for u in units]
    left = [
        msgspec.structs.replace(unit, old=exchange.known(unit.place)) if lost else unit
        for unit, lost in zip(units, gone, strict=True)
    ]
    work.note("units", units=msgspec.to_builtins(left))
    return left


def _as_run(units: list[Unit]) -> list[Unit]:
    """These, after a run on the new: what that has made anew by a rename is the new one, and what it has removed is
    none. So it is told from what the old run makes anew, once that is back."""
    return [
        msgspec.structs.replace(unit, new=exchange.known(unit.place))
        if exchange.where_new(unit) is None and exchange.where_old(unit) != unit.place
        else unit
        for unit in units
    ]


def _made(work: Work, units: list[Unit]) -> list[Unit]:
    """What the new run has made beside these: where entries change places one by one, that is in none of
    them. All of it is the new run's, as in a directory that changes places whole: before, the place had none of it."""
    plan = work.plan
    try:
        names = staging.names_of(plan, work.profile, {})
    except SnapshotterError as error:
        stays = f"what the restored node has made anew stays: {error.line()}"
        work.notes += [stays] if stays not in work.notes else []
        return []
    known = {unit.place for unit in units}
    made = []
    for ground in plan.grounds:
        for name in staging.entries_of(plan, ground, names[ground.path]) if ground.path in names else ():
            unit = staging.unit_of(ground, name)
            above = any(mounts.is_under(place, unit.place) or mounts.is_under(unit.place, place) for place in known)
            if not above and unit.old is not None:
                made.append(msgspec.structs.replace(unit, old=None, new=unit.old))
    return made


def _exchange_back(work: Work, units: list[Unit], ran: bool) -> None:
    for unit in units:
        with told(unit.place):
            exchange.back(unit, ran=ran)
    for unit in units:
        with told(unit.place):
            if not exchange.is_back(unit):
                work.notes.append(f"{unit.place} is neither the old nor the new one, and stays")


def _remove(work: Work, units: list[Unit], ran: bool) -> None:
    """What was restored goes. What can't is no reason to leave the node stopped: `work.unremoved` has it."""
    work.unremoved = []
    for unit in units:
        try:
            with told(unit.place):
                for kept in exchange.remove_new(unit, ran=ran):
                    work.notes.append(f"{kept} is neither the old nor the new one, and stays")
        except SnapshotterError as error:
            work.unremoved.append(_held(error, unit.staged, unit.aside))
    try:
        with told(work.plan.path):
            work.unstage()
    except SnapshotterError as error:
        if not work.unremoved:
            work.unremoved.append(_held(error, *(ground.staged for ground in work.plan.grounds)))
    for ground in work.plan.grounds:
        exchange.remove_empty([unit.aside for unit in units], ground.aside)
        exchange.remove_empty([unit.staged for unit in units], ground.staged)


def _remove_copies(work: Work) -> None:
    """On another disk, once the old data is in its place (or had never left it). As `_remove`: `work.unremoved`."""
    for ground in work.plan.grounds:
        try:
            with told(ground.aside):
                for record in work.journal.all("saving", ground.path):
                    exchange.remove(ground.aside, tuple(record["known"]))
        except SnapshotterError as error:
            work.unremoved.append(_held(error, ground.aside))


def _held(error: SnapshotterError, *paths: str) -> SnapshotterError:
    """The error, which knows what failed to be removed by its last name alone, with the real path in it."""
    for top in paths if not isinstance(error, BusyError) else ():  # something is mounted in it: that is named
        if (path := exchange.locked_below(top)) is not None:
            return StorageError("is immutable or append-only", object=path, cure=f"chattr -R -ia {top}")
    return error


def _refuse_held(units: list[Unit]) -> None:
    """Raise PreconditionError where an entry that is to be moved can't be, so that nothing is stopped for it."""
    for unit in units:
        old = exchange.where_old(unit)
        if old == unit.place or (old is None and unit.old is not None):
            continue
        for path in [unit.place, os.path.dirname(unit.place), *([old] if old else [])]:
            if exchange.locked(path):
                raise PreconditionError(
                    "can't be moved: it is immutable or append-only", object=path, cure=f"chattr -ia {path}"
                )
        above, name = os.path.split(unit.place)  # a link there is moved itself, whatever is mounted where it leads
        if mounts.is_mount_point(os.path.join(os.path.realpath(above), name)):
            raise BusyError(
                "can't be moved: something is mounted there", object=unit.place, cure=f"umount {unit.place}"
            )


def _bring_back(work: Work) -> None:
    for ground in work.plan.grounds:
        saved = work.journal.last("saved", ground.path)
        removing = work.journal.last("removing", ground.path) is not None  # else the original never left
        if saved is not None and removing and not work.brought_back(ground):
            signing.into_copy(work, ground)
            away.bring_back(ground, saved["entries"], work.session.report)
            work.journal.append("back", step=ground.path)


# ------------------------------------------------------------------------------------------------------- the end


def discard(work: Work) -> list[str]:
    """Remove what was set aside; returns its names. The journal has it before the first of it goes: from then on, there
    is no way back but where a provider refuses, and has let go of nothing."""
    work.require_disks(of_aside=True)
    for swap in work.plan.swaps:
        if not work.session.provider(swap.provider, work.plan.node, chosen=False).sees(swap.volume):
            raise PreconditionError(
                "what it lies on isn't here, nor what was set aside",
                object=f"{swap.provider}:{swap.volume}",
                cure="bring it back (connect its disks, import its pool, mount it), then the same again; "
                f"if it is gone for good: rm {work.journal.path}",
            )
    if old := work.users_of_old():
        raise BusyError(
            f"something runs on what would be removed: {old}",
            object=work.plan.path,
            cure="end it; a container sees the old data until it is restarted",
        )
    if work.turned and not work.discarding:
        for unit in work.settled(work.units()):
            with told(unit.place):
                exchange.refuse_alone(unit)
    if work.turned:
        work.stop()  # it may have been started at boot; refused, there is still the undo
    if not work.discarding:
        if work.turned:
            work.settled(work.units())  # again, as it may make some anew as it ends
            if not work.journal.has("undo"):  # there was no room for that; whoever ends this must know
                work.journal.append("undo", run_again=bool(work.plan.running), ran=True, asked=False)
        work.journal.append("discard")
    gone = _commit_swaps(work)
    if work.turned:
        _turn_again(work)
    units = work.units()
    for unit in units:
        with told(unit.aside):
            exchange.remove_old(unit)
    for ground in work.plan.grounds:
        saved = [tuple(record["known"]) for record in work.journal.all("saving", ground.path)]
        for one in saved:
            exchange.remove(ground.aside, one)
        if saved and os.path.lexists(ground.aside):
            raise StorageError("is not what was put there", object=ground.aside, cure="see what it is; remove it")
        gone += [ground.aside] if saved else []
    for ground in work.plan.grounds:
        exchange.remove_empty([unit.aside for unit in units], ground.aside)
        if os.path.lexists(ground.aside) and any(u.aside.startswith(ground.aside) for u in units):
            raise StorageError("could not be removed: there is something else in it", object=ground.aside)
        if any(mounts.is_under(u.aside, ground.aside) and u.old for u in units):
            gone.append(ground.aside)
    return gone


def _turn_again(work: Work) -> None:
    """Of the undo that can't be ended, as some of the old data is gone: all of the new stands in its place again, with
    what was signed meanwhile, and the service, stopped by now, runs on that."""
    if os.path.isdir(work.plan.path):
        signing.into_new(work)
    units = work.units()
    for unit in units:
        with told(unit.place):
            exchange.back_again(unit)
    exchange.sync_parents([unit.place for unit in units])
    for ground in work.plan.grounds:
        exchange.remove_empty([unit.staged for unit in units], ground.staged)
    work.let_run(bool(work.plan.running or (work.journal.last("undo") or {}).get("run_again")))
    work.notes.append("it could not be undone, as some of the old data was gone: what was restored stands there again")


def _commit_swaps(work: Work) -> list[str]:
    swaps = [(work.session.provider(s.provider, work.plan.node, chosen=False), s) for s in work.plan.swaps]
    try:
        for provider, swap in swaps:  # one that is refused when others are committed leaves neither the old nor the new
            provider.refuse_commit(swap.swap_id)
        for provider, swap in swaps:
            provider.swap_commit(swap.swap_id)
    except SnapshotterError:
        if all(is_open(provider, swap) for provider, swap in swaps):
            work.journal.append("kept")  # refused, and all are still open: they can be taken back too
        raise
    return [f"{swap.provider}:{swap.swap_id}" for swap in work.plan.swaps]


def refuse_discarding(work: Work) -> None:
    """Raise PreconditionError where the old data is going: there is no undo."""
    if work.discarding:
        raise PreconditionError(
            "the old data is being discarded, and may be gone",
            object=work.plan.path,
            cure=f"snapshotter restore --discard {work.plan.path} ends it",
        )
