"""One restore in place, as its journal has it: what both ways, there and back, ask of the disk and the service. What is
to be done is never guessed from how far a run had come; the journal only says which steps were begun. Must not know how
it was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from snapshotter.core.errors import (
    BusyError,
    NotFoundError,
    PreconditionError,
    SnapshotterError,
    StorageError,
    UndoIncompleteError,
)
from snapshotter.core.journal import Journal
from snapshotter.core.model import SnapshotSet
from snapshotter.host import exchange, mounts
from snapshotter.host.exchange import Unit
from snapshotter.host.places import boot_id
from snapshotter.host.service import prove_stopped
from snapshotter.nodes import health, profiles
from snapshotter.verbs import in_place_stage as staging
from snapshotter.verbs.in_place_plan import Plan
from snapshotter.verbs.in_place_ways import Ground, is_open
from snapshotter.verbs.restore import judge
from snapshotter.verbs.session import Session


class Work:
    """What is known of it, and what this run has found out."""

    def __init__(self, session: Session, plan: Plan, journal: Journal) -> None:
        self.session = session
        self.plan = plan
        self.journal = journal
        self.profile = profiles.get(plan.profile, session.config.profiles)
        self.service = plan.service()
        self.along: list[str] = list((journal.last("along") or {"units": []})["units"])  # units stopped with it
        self.notes: list[str] = []
        self.health: health.Health | None = None
        #: What was set aside is being put back: that, or exit 7. The journal may have had no room to tell.
        self.turned = journal.has("undo", "returned") or (self.begun("start") and self._half_back())
        self.started = self.begun("start")  # by this run or an earlier one, weeks ago perhaps: never undone unasked
        self.asked = False  # --sign-state-from-set was said of the undo
        self.unstarted: SnapshotterError | None = None  # why the service doesn't run on the old data
        self.unremoved: list[SnapshotterError] = []  # why the new could not all be removed, behind the old
        self._found: SnapshotSet | None = None

    # ------------------------------------------------------------------------------------------------ the journal

    def begun(self, step: str) -> bool:
        return self.journal.last("begin", step) is not None

    @property
    def discarding(self) -> bool:
        """The old data is going, or gone. (A provider may have refused that: then all is still there.)"""
        last = next((r["kind"] for r in reversed(self.journal.records) if r["kind"] in ("discard", "kept")), "")
        return last == "discard"

    def note(self, kind: str, **facts: Any) -> bool:
        """A record that is only of use after a kill. The journal's disk may be full: no reason to leave the node as it
        is. Returns whether it stands there."""
        try:
            self.journal.append(kind, **facts)
        except StorageError:
            return False
        return True

    def units(self) -> list[Unit]:
        """What changes places."""
        record = next((r for r in reversed(self.journal.records) if r["kind"] in ("units", "carry")), None)
        units = msgspec.convert(record["units"], list[Unit]) if record else []
        if record is None or record["kind"] == "units":
            return units
        return [
            msgspec.structs.replace(
                unit,
                old=exchange.known(old) if old else unit.old,
                new=exchange.known(new) if new else unit.new,
            )
            for unit, (old, new) in zip(units, record["where"], strict=True)
        ]

    def names(self) -> staging.Names:
        record = self.journal.last("names")
        names: staging.Names = record["names"] if record else {}
        return names

    @contextmanager
    def carrying(self, units: list[Unit]) -> Iterator[None]:
        """Files are replaced within: one that is a unit itself is known by another inode afterwards. Where each was, is
        noted before, so that it is found also after a kill in here: nothing changes places meanwhile."""
        where = [(exchange.where_old(unit), exchange.where_new(unit)) for unit in units]
        self.journal.append("carry", units=msgspec.to_builtins(units), where=where)
        yield
        self.journal.append("units", units=msgspec.to_builtins(self.units()))

    # -------------------------------------------------------------------------------------------------- the disk

    def found(self) -> SnapshotSet:
        """The set, judged anew by this run. Raises NotFoundError, JudgedBadError."""
        if self._found is not None:
            return self._found
        entries = self.session.catalog(self.plan.set_id)
        found = next((entry for entry in entries.sets if entry.set_id == self.plan.set_id), None)
        if found is None:
            raise NotFoundError(
                "the set is gone", object=self.plan.set_id, cure=f"snapshotter restore --undo {self.plan.path}"
            )
        judge(found)
        self._found = found
        return found

    @property
    def away(self) -> bool:
        """Old data goes to another disk first, so that there is room."""
        return any(ground.away for ground in self.plan.grounds)

    def brought_back(self, ground: Ground) -> bool:
        """Whether its old data, that had been copied to another disk, is in its place again."""
        return self.journal.last("back", ground.path) is not None

    @property
    def live(self) -> str:
        """Where the old content of the data path is, until it changes places."""
        ground = next((g for g in self.plan.grounds if g.path == self.plan.path), None)
        saved = ground is not None and self.journal.last("saved", self.plan.path) is not None
        return ground.aside if ground is not None and saved else self.plan.path

    def places(self) -> list[tuple[str, str]]:
        """Every root, where it is."""
        return [(root, root) for root in self.plan.roots]

    def staged_places(self) -> list[tuple[str, str]]:
        """Every root, and where its new content is made ready."""
        return [(root, staging.staged_of(self.plan, root)) for root in self.plan.roots]

    def moved(self, *, all_of_them: bool = False) -> bool:
        """Whether any (or all) of the new content stands in its place already."""
        units = self.units()
        there = [unit for unit in units if unit.new is not None and exchange.known(unit.place) == unit.new]
        gone = [unit for unit in units if unit.new is None and exchange.known(unit.place) is None]
        return len(there) + len(gone) == len(units) and bool(units) if all_of_them else bool(there or gone)

    def touched(self) -> bool:
        """Whether anything of the old or the new has left its place: also half way, where they change places in two
        steps. (An entry that the old run has made anew meanwhile has not.)"""
        if self.plan.way == "swap":
            swaps = [(self.session.provider(s.provider, self.plan.node, chosen=False), s) for s in self.plan.swaps]
            away = any(swap.mount and not mounts.is_mount_point(swap.path) for _, swap in swaps)
            return away or any(is_open(provider, swap) for provider, swap in swaps)
        units = self.units()
        left = any(exchange.where_old(unit) not in (None, unit.place) for unit in units)
        return left or any(exchange.where_new(unit) not in (None, unit.staged) for unit in units)

    def removed(self) -> bool:
        """Whether old data is only where it was copied to, on another disk."""
        return any(self.journal.last("removing", g.path) and not self.brought_back(g) for g in self.plan.grounds)

    def putting_back(self) -> bool:
        """Whether an undo has been at it, though its journal may not have had the room to tell: once the node was
        started on the new, all of the old had left its place."""
        if self.turned or not self.begun("start"):
            return self.turned
        olds = [unit for unit in self.units() if unit.old is not None]
        there = any(exchange.known(unit.place) == unit.old for unit in olds)  # all of them, and the new is gone by now
        return there and all(exchange.where_old(unit) in (None, unit.place) for unit in olds)

    def _half_back(self) -> bool:
        """Whether an old one stands in its place, and the new one is where only an undo moves it. (A person may have
        moved an old one there, too.)"""
        olds = [unit for unit in self.units() if unit.old is not None]
        return any(exchange.known(unit.place) == unit.old and exchange.taken(unit) is not None for unit in olds)

    def remade(self, unit: Unit) -> bool:
        """Whether the old run has made it anew by a rename, or removed it, where it stood before it changed places or
        was back again: so it is not lost. Such are small files; what holds data nobody makes anew."""
        new = exchange.where_new(unit)
        if unit.old is None or exchange.where_old(unit) is not None or new == unit.place:
            return False
        if unit.place in self.plan.roots or (new is not None and os.path.isdir(new) and not os.path.islink(new)):
            return False
        return self.putting_back() or (new == unit.staged and exchange.known(unit.place) is not None)

    def settled(self, units: list[Unit]) -> list[Unit]:
        """These: what the old run has made anew is the old one. All of it is known only once the service is stopped."""
        settled = [
            msgspec.structs.replace(unit, old=exchange.known(unit.place)) if self.remade(unit) else unit
            for unit in units
        ]
        if settled != units:
            self.note("units", units=msgspec.to_builtins(settled))
        return settled

    def all_back(self) -> bool:
        """Whether an undo has put back all that was set aside, though it could not tell. From then on, what stands
        there is the old run's, whatever it makes of it."""
        units = self.units()
        back = [exchange.where_old(u) == u.place or self.remade(u) for u in units if u.old is not None]
        left = any(exchange.where_new(unit) == unit.place for unit in units)
        return bool(units) and not self.away and self.putting_back() and all(back) and not left

    def lost(self) -> list[str]:
        """Where old data was set aside and is no more: removed by hand, or moved away. (What the old run has made anew
        before it changed places, on a mix, or since it was back, is none.)"""
        if self.journal.has("returned") or not (self.begun("start") or (self.begun("exchange") and self.touched())):
            return []
        mixed = not self.begun("start") and not (self.journal.last("undo") or {}).get("ran") and self.mixed()
        return [
            unit.aside
            for unit in self.units()
            if unit.old is not None
            and exchange.where_old(unit) is None
            and not (mixed and exchange.where_new(unit) != unit.place)
            and not self.remade(unit)
            and not self.brought_back(staging.ground_of(self.plan, unit.place))
        ]

    def refuse_lost(self) -> None:
        """Raise PreconditionError where not all of the old data is there any more: it must be known before the service
        is stopped for it. UndoIncompleteError if it went while it was being put back."""
        if not (lost := self.lost()):
            return
        path = self.plan.path
        keep = f"snapshotter restore --discard {path} keeps what was restored, and removes what is left of the old data"
        if self.turned:
            raise UndoIncompleteError(
                "the old data can't be put back: what was set aside is gone",
                object=lost[0],
                left=[self.journal.path, *self.stopped()],
                cure=f"put it back there, then the same again; or {keep}",
            )
        if not self.journal.has("restored"):
            keep = f"snapshotter restore --continue {path}, then --discard, keeps what is restored"
        raise PreconditionError(
            "what was set aside is gone, so there is no way back",
            object=lost[0],
            cure=f"put it back there, then the same again; or {keep}",
        )

    def require_disks(self, *, of_aside: bool = False, all_of_it: bool = False) -> None:
        """Raise PreconditionError where a disk that the data lay on, or was set aside on, isn't mounted now: nothing
        there must not be taken for nothing that there was, nor may anything be put below it. `of_aside`: something else
        may be mounted over the data. `all_of_it`: nor if only some of what was copied there is gone."""
        asides = [ground.aside for ground in self.plan.grounds]
        for path, point in self.journal.facts.get("mounts", {}).items():
            now = mounts.mount_of(os.path.realpath(path)).path
            over = of_aside and path not in asides and mounts.is_under(now, point)
            if now != point and not over:
                raise PreconditionError(
                    f"was on what was mounted at {point}, and is on {now} now",
                    object=path,
                    cure=f"{self._again(point)}{f', or umount {now}' if mounts.is_under(now, point) else ''}",
                )
        for ground in self.plan.grounds:
            saved = self.journal.last("saved", ground.path)
            if saved is None or not self.journal.last("removing", ground.path) or self.brought_back(ground):
                continue
            there = [os.path.join(ground.aside, name) for name in saved.get("there", ())]
            found = [path for path in there if os.path.lexists(path)]
            gone = not os.path.isdir(ground.aside) or (there and not found) or (all_of_it and found != there)
            if not self.discarding and gone:
                raise PreconditionError(
                    "what was set aside isn't there, and it is all there is of the old data",
                    object=ground.aside,
                    cure=self._again(os.path.dirname(ground.aside)),
                )

    def _again(self, point: str) -> str:
        return f"mount {point}, then the same again; if that disk is gone for good: rm {self.journal.path}"

    def refuse_foreign(self) -> None:
        """Raise BusyError where there was no data path, and what stands there isn't what was restored: a directory that
        somebody moved there is nobody's to remove. (Where the old data went to another disk, it may be that.)"""
        tops = [ground.path for ground in self.plan.grounds if not ground.away]
        for unit in self.units():
            here = exchange.known(unit.place)
            if unit.old is None and unit.place in tops and here not in (None, unit.new) and os.path.isdir(unit.place):
                raise BusyError(
                    "is neither what was there before nor what was restored",
                    object=unit.place,
                    cure="see what it is, and move it away; then the same again",
                )

    def saved_roots(self) -> dict[str, str]:
        """The grounds whose old data was copied to another disk -> where it is."""
        return {
            ground.path: ground.aside
            for ground in self.plan.grounds
            if self.journal.last("saved", ground.path) is not None and not self.brought_back(ground)
        }

    def may_have_run(self) -> bool:
        """Whether the node may have run on new content before it was meant to: some of that stands in its place, and
        something has started it, or could have: the machine was started anew, and a service that can't be masked (so
        one without a unit) is whatever starts it at boot."""
        if self.begun("start") or not self.moved():
            return False
        if self.journal.has("ran"):
            return True
        if self.service is not None and self.service.running():
            return True
        masked = self.plan.masked or (self.service is not None and self.service.can_mask)
        return not masked and self.journal.facts.get("boot") != boot_id()

    def mixed(self) -> bool:
        """Whether it may have, on a mix of old and new: the exchange was killed in the middle."""
        return self.may_have_run() and not self.moved(all_of_them=True)

    # ----------------------------------------------------------------------------------------------- the service

    def stop(self) -> None:
        """Stopped, masked, and nobody uses the data. Raises StorageError, BusyError."""
        if self.service is not None:
            # Noted before they are: nobody else would start them. An interrupted run's may be stopped by now.
            self.along = list(dict.fromkeys([*self.along, *self.service.stops_along()]))
            if self.along:
                self.note("along", units=self.along)
            self.service.stop()
            if self.service.can_mask and not self.plan.masked:
                self.service.mask()
        self.unused()

    def unused(self, patience_s: float = 10.0) -> None:
        """Raise BusyError unless the service is stopped, and nobody has a root open, nor what was just set aside."""
        tops = [*self.plan.roots, *(ground.aside for ground in self.plan.grounds if os.path.isdir(ground.aside))]
        prove_stopped(self.service, tops, patience_s=patience_s)

    def users_of_old(self) -> str:
        """Who has open what was set aside, as a refusal says it: a mount that is older than the restore (a container's)
        still shows the old data. '' if nobody has."""
        try:
            prove_stopped(None, [ground.aside for ground in self.plan.grounds], patience_s=0.0)
        except BusyError as error:
            return f"{error.object} {error.message}"
        return ""

    def stopped(self) -> list[str]:
        """The service, for what is `left`, if it ran before and doesn't now: on what is half undone it can't."""
        try:
            ran = self.plan.running or (self.journal.last("undo") or {}).get("run_again")
            if self.service is not None and ran and not self.service.running():
                return [f"the service {self.service.name}, stopped"]
        except SnapshotterError:
            pass
        return []

    def let_run(self, run: bool) -> None:
        """It can be started again, and is if it is to `run`: also where unmasking it failed, but it isn't masked."""
        if self.service is not None:
            if self.service.can_mask and not self.plan.masked:
                try:
                    self.service.unmask()
                except SnapshotterError as error:
                    if self.service.masked():
                        raise
                    self.notes.append(error.line())
            if run:
                self.service.start(self.along)
                if self.along:
                    self.notes += [
                        f"{name}, stopped along with it, doesn't run" for name in self.service.down(self.along)
                    ]
                    self.along = []  # a later undo has its own: their operator may have stopped them by then
                    self.note("along", units=self.along)

    # --------------------------------------------------------------------------------- taken away, whoever made it

    def unstage(self) -> None:
        """What was made ready, or was being, goes. Absent is done."""
        ended = {record["id"] for record in self.journal.all("detached")}
        for record in self.journal.all("attachment"):
            if record["id"] in ended:
                continue
            try:
                staging.forget(self.session, record["id"], record.get("providers"))
            except SnapshotterError as error:  # no reason to leave a node stopped: it holds nothing of ours
                self.notes.append(f"what the set was read by stays until `snapshotter reap`: {error.line()}")
        for record in self.journal.all("staged"):
            exchange.remove(record["path"], tuple(record["known"]))
        for ground in self.plan.grounds:
            # Killed between making it and the record.
            exchange.remove_empty([], ground.staged)

    def old_of(self, root: str, units: Sequence[Unit]) -> str:
        """Where a root's old content lies. One by one, it is in the directory of what is set aside."""
        if root == self.plan.path and self.live != root:
            return self.live
        unit = next((u for u in units if u.place == root), None)
        if unit is not None:
            return exchange.where_old(unit) or root
        ground = next((g for g in self.plan.grounds if g.path == root), None)
        return ground.aside if ground is not None and os.path.isdir(ground.aside) else root

    def outside(self, where: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
        return self.plan.outside(dict(where) if where is not None else None)
