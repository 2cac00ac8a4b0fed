"""The steps of a restore in place, each with its inverse. Any of them may be begun again after a kill: what is to be
done is asked of the disk and the service, the journal only says which steps were begun. Must not know how it was asked
for.

    prove     the databases' own pointers resolve (L2), on a clone, or
    stage     the new content is made ready beside the old           inverse: it is removed
    check     on what was made ready
    stop      the service is stopped and masked, nobody uses it      inverse: unmasked, started if it ran
    save      (--aside on another disk) old data copied, removed     inverse: copied back
    keep      keys and sign-state as they are to be, owner, modes
    exchange  new and old change places, or the volumes are swapped  inverse: back, the higher sign-state goes along
    start     unmasked, started if it ran                            inverse: stopped
    healthy   it is the same node, and lives
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from snapshotter import checks
from snapshotter.core.errors import JudgedBadError, NotFoundError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.journal import Journal
from snapshotter.core.model import SnapshotSet, new_attachment_id, utc_now
from snapshotter.host import exchange, mounts, tree
from snapshotter.host.exchange import Unit
from snapshotter.host.service import prove_stopped
from snapshotter.host.store import told
from snapshotter.nodes import health, identity, profiles, sign_state
from snapshotter.verbs import in_place_away as away
from snapshotter.verbs import in_place_stage as staging
from snapshotter.verbs import in_place_swap as swapping
from snapshotter.verbs import verify
from snapshotter.verbs.in_place_plan import Plan, different
from snapshotter.verbs.in_place_ways import Ground
from snapshotter.verbs.restore import judge
from snapshotter.verbs.session import Session

STEPS = ("prove", "stage", "check", "stop", "keep", "exchange", "start", "healthy")
#: Where the old data must go first, to another disk, so that there is room.
STEPS_AWAY = ("prove", "stop", "save", "stage", "check", "keep", "exchange", "start", "healthy")


class Unhealthy(JudgedBadError):
    """The new content is in place and the node runs on it, but isn't well: for a person to judge, not to be undone."""


class Work:
    """One restore in place, as its journal has it."""

    def __init__(self, session: Session, plan: Plan, journal: Journal) -> None:
        self.session = session
        self.plan = plan
        self.journal = journal
        self.profile = profiles.get(plan.profile, session.config.profiles)
        self.service = plan.service()
        self.notes: list[str] = []
        self.health: health.Health | None = None
        self.unstarted: SnapshotterError | None = None  # why the service doesn't run on the old data
        self._found: SnapshotSet | None = None

    def begun(self, step: str) -> bool:
        return self.journal.last("begin", step) is not None

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

    def unused(self, patience_s: float = 10.0) -> None:
        """Raise BusyError unless the service is stopped, and nobody has a root open, nor what was just set aside."""
        tops = [*self.plan.roots, *(ground.aside for ground in self.plan.grounds if os.path.isdir(ground.aside))]
        prove_stopped(self.service, tops, patience_s=patience_s)

    # ---------------------------------------------------------------------------------------------------- forward

    def forward(self) -> None:
        """All steps that aren't done. After a kill the node may have run (a reboot ends a runtime mask): until it was
        meant to, it is stopped again, and what it signed meanwhile is taken along."""
        for step in STEPS_AWAY if self.away else STEPS:
            again = step in ("stop", "keep", "exchange") and not self.begun("start")
            if self.journal.last("done", step) is not None and not (again and self.begun(step)):
                continue
            if step == "keep" and self.moved():
                continue
            self.journal.begin(step)
            getattr(self, step)()
            self.journal.done(step)
        self.journal.append("restored", healthy=self.health.healthy if self.health else None)

    def stage(self) -> None:
        self.unstage()
        plan = self.plan
        if plan.way == "swap":
            return
        if plan.resync:
            self._make_ready(staging.names_of(plan, self.profile, {}), {})
            return
        attachment_id = new_attachment_id(utc_now())
        self.journal.append("attachment", id=attachment_id)
        with staging.views(self.session, plan, self.found(), attachment_id) as seen:
            self._make_ready(staging.names_of(plan, self.profile, seen), seen)

    def _make_ready(self, names: staging.Names, seen: dict[str, str]) -> None:
        plan = self.plan
        wanted = {"key": self.profile.identity, "database": self.profile.database}.get(plan.only, ()) if seen else ()
        if not names or (wanted and not any(profiles.matches(seen[plan.path], pattern) for pattern in wanted)):
            what = "database" if plan.only == "database" else "keys"
            raise NotFoundError(f"there are no {what} in it", object=plan.set_id or plan.path)
        self.journal.append("names", names=dict(names))
        for ground in plan.grounds:
            if ground.path in names:
                self.journal.append("staged", path=ground.staged, known=staging.make_staged(ground))
        if seen:
            self.notes += staging.fill(self.session, plan, names, seen, 0)
        if not plan.only:
            staging.strip(plan, self.profile, [staging.staged_of(plan, plan.path)])

    @property
    def away(self) -> bool:
        return any(ground.away for ground in self.plan.grounds)

    def save(self) -> None:
        names = staging.names_of(self.plan, self.profile, {})
        for ground in self.plan.grounds:
            if ground.path not in names or not os.path.isdir(ground.path):
                continue
            entries = staging.entries_of(self.plan, ground, names[ground.path])
            earlier = self.journal.last("saved", ground.path)
            if self.journal.last("removing", ground.path) is None:
                earlier = None  # all is still there, and the node may have gone on with it after a reboot: copy it anew
            if earlier is None:
                for record in self.journal.all("saving", ground.path):
                    exchange.remove(ground.aside, tuple(record["known"]))
                exchange.remove_empty([], ground.aside)  # killed between making it and the record
                os.mkdir(ground.aside, 0o700)
                self.journal.append("saving", step=ground.path, known=exchange.known(ground.aside))
                away.save(ground, entries, self.session.report)
                self.journal.append("saved", step=ground.path, entries=entries)
                self.journal.append("removing", step=ground.path)
            else:
                self._carry_to_copy(ground)
            away.remove_saved(ground, entries if earlier is None else earlier["entries"])

    def _bring_back(self) -> None:
        for ground in self.plan.grounds:
            saved = self.journal.last("saved", ground.path)
            removing = self.journal.last("removing", ground.path) is not None  # else the original never left
            if saved is not None and removing and self.journal.last("back", ground.path) is None:
                self._carry_to_copy(ground)
                away.bring_back(ground, saved["entries"], self.session.report)
                self.journal.append("back", step=ground.path)
            for record in self.journal.all("saving", ground.path):
                exchange.remove(ground.aside, tuple(record["known"]))

    def _carry_to_copy(self, ground: Ground) -> None:
        """What was signed in the place meanwhile (after a reboot the node may have run) must outlive it."""
        if ground.path == self.plan.path and self.profile.sign_state and os.path.isdir(ground.path):
            self.notes += sign_state.carry_higher(
                ground.path, ground.aside, self.profile, roots=self.plan.outside(), from_set=True
            )

    @property
    def live(self) -> str:
        """Where the old content of the data path is."""
        ground = next((g for g in self.plan.grounds if g.path == self.plan.path), None)
        saved = ground is not None and self.journal.last("saved", self.plan.path) is not None
        return ground.aside if ground is not None and saved else self.plan.path

    def unstage(self) -> None:
        for record in self.journal.all("attachment"):
            staging.forget(self.session, record["id"])
        for record in self.journal.all("staged"):
            exchange.remove(record["path"], tuple(record["known"]))
        for ground in self.plan.grounds:
            # Killed between making it and the record.
            exchange.remove_empty([], ground.staged)

    def prove(self) -> None:
        """On a clone: where nothing is made ready (a swap), or where links in it lead to live roots."""
        if self.plan.set_id and self.plan.only != "key" and not self._proven_staged():
            self.notes += verify.require(self.found(), verify.prove_set(self.session, self.found(), 2, record=False))

    def check(self) -> None:
        """What was made ready, before anybody is stopped for it."""
        if self.plan.set_id and self.plan.only != "key" and self._proven_staged():
            found = self.found()
            places = [pair for pair in self.staged_places() if os.path.isdir(pair[1])]
            crash = found.marks.get("grade") == "crash"
            proof = checks.prove(places, self.profile, 2, crash=crash, report=self.session.report)
            self.notes += verify.require(found, proof)

    def _proven_staged(self) -> bool:
        return self.plan.way == "copy" and not self.plan.outside() and not self.away

    def staged_places(self) -> list[tuple[str, str]]:
        return [(root, staging.staged_of(self.plan, root)) for root in self.plan.roots]

    def stop(self) -> None:
        if self.service is not None:
            self.service.stop()
            if self.service.can_mask and not self.plan.masked:
                self.service.mask()
        self.unused()

    def keep(self) -> None:
        """What the new content must have of the old one, now that nobody writes it."""
        plan, profile = self.plan, self.profile
        if plan.way == "swap":
            return
        live, new = self.live, staging.staged_of(plan, plan.path)
        outside = plan.outside({root: staging.staged_of(plan, root) for root in plan.roots})
        if plan.brings_key:
            self._identity(live, new, outside)
        self._sign_state()
        staging.dress(plan, self.staged_places(), profile, self.names())
        units = staging.units_of(plan, self.names())
        self.journal.append("units", units=msgspec.to_builtins(units))
        for ground in plan.grounds:
            if os.path.isdir(ground.staged):
                _sync(ground.staged)

    def _identity(self, live: str, new: str, outside: list[tuple[str, str]]) -> None:
        plan, profile = self.plan, self.profile
        if plan.identity == "set" or not os.path.isdir(live):
            return
        old_outside = plan.outside()
        if plan.identity == "live":
            identity.carry(live, new, profile, production=plan.path, source_roots=old_outside, into_roots=outside)
            return
        theirs = identity.read(new, profile, plan.node.key_file, production=plan.path, roots=outside)
        mine = identity.read(live, profile, plan.node.key_file, production=plan.path, roots=old_outside)
        if mine is not None and theirs is not None and not mine.same_as(theirs):
            raise different(mine.address, theirs.address, plan.set_id)
        if mine is not None and theirs is None and not plan.only:
            identity.carry(live, new, profile, production=plan.path, source_roots=old_outside, into_roots=outside)

    def _sign_state(self) -> None:
        """The higher of the two goes into what takes the other's place. Only what is in it by then can be lowered: for
        a part of a node, what lies in the entries that change places."""
        plan = self.plan
        new = staging.staged_of(plan, plan.path)
        if not self.profile.sign_state or not os.path.isdir(new):
            return
        if not os.path.isdir(self.live):
            if plan.from_set:
                return
            raise PreconditionError(
                f"there is no sign-state at {plan.path}, so whether the set's is older can't be told: "
                "a validator that signs with an older one is slashed",
                object=plan.set_id,
                cure="copy the newest back from wherever the node last ran, or say --sign-state-from-set "
                "if it has signed nothing since the set was taken",
            )
        if plan.only and not self._holds_sign_state():
            return
        outside = plan.outside({root: staging.staged_of(plan, root) for root in plan.roots})
        self.notes += sign_state.carry_higher(self.live, new, self.profile, roots=outside, from_set=plan.from_set)

    def _holds_sign_state(self) -> bool:
        """Whether sign-state lies in an entry that changes places; then the directory for it is made, if the new
        content has none (a resync has no content)."""
        plan, held = self.plan, False
        for pattern in self.profile.sign_state:
            for top in (self.live, staging.staged_of(plan, plan.path)):
                for path in profiles.matches(top, pattern):
                    name = os.path.relpath(path, top)
                    chosen = self.names().get(plan.path)
                    if any(mounts.is_under("/" + name, "/" + each) for each in chosen or ()):
                        held = True
                        _make_like(self.live, staging.staged_of(plan, plan.path), os.path.dirname(name))
        return held

    def exchange(self) -> None:
        self.unused(2.0)
        if self.plan.way == "swap":
            self._swap()
        else:
            if self.moved() and not self.moved(all_of_them=True):
                # Killed in the middle. If the machine went down, the node may have run since `keep`.
                with self._carrying(self.units()):
                    self._sign_state()
            self._exchange()
        self.unused(2.0)

    def _exchange(self) -> None:
        units = self.units()
        for ground in self.plan.grounds:
            if (ground.fixed or ground.names is not None or self.plan.only) and any(u.old for u in units):
                _make_private(ground.aside, [u.aside for u in units])
        for unit in units:
            with told(unit.place):
                exchange.forward(unit)
        exchange.sync_parents([path for unit in units for path in (unit.place, unit.aside)])
        for ground in self.plan.grounds:
            record = next((r for r in self.journal.all("staged") if r["path"] == ground.staged), None)
            if record is not None and not any(exchange.where_old(u) == u.staged for u in units):
                exchange.remove(ground.staged, tuple(record["known"]))  # what is left of it: directories, empty

    def moved(self, *, all_of_them: bool = False) -> bool:
        """Whether any (or all) of the new content stands in its place already."""
        units = self.units()
        there = [unit for unit in units if unit.new is not None and exchange.known(unit.place) == unit.new]
        gone = [unit for unit in units if unit.new is None and exchange.known(unit.place) is None]
        return len(there) + len(gone) == len(units) and bool(units) if all_of_them else bool(there or gone)

    def units(self) -> list[Unit]:
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

    def start(self) -> None:
        if self.service is None:
            return
        if self.service.can_mask and not self.plan.masked:
            self.service.unmask()
        if self.plan.running:
            self.service.start()

    def healthy(self) -> None:
        if self.service is None or not self.plan.running:
            return
        plan = self.plan
        seen = self.journal.last("seen") or {}
        outside = plan.outside()
        try:
            now = identity.read(plan.path, self.profile, plan.node.key_file, roots=outside)
        except SnapshotterError:
            now = None
        expected = health.Expected(
            enode_id=now.node_id if now else seen.get("enode_id") if not plan.brings_key else None,
            height=plan.height if plan.set_id and plan.only != "key" else None,
            min_peers=0 if seen.get("peers") == 0 else 1,
        )
        self.health = health.prove(plan.node, self.profile, expected, float(plan.node.timeout), service=self.service)
        self.notes += self.health.notes
        if self.health.healthy is False:
            self.journal.append("restored", healthy=False)
            raise Unhealthy(
                f"restored, but the node isn't well: {'; '.join(self.health.findings)}",
                object=plan.path,
                cure="; ".join(self.health.hints),
                undo_command=f"snapshotter restore --undo {plan.path}",
            )

    # --------------------------------------------------------------------------------------------------- backward

    def backward(self) -> None:
        """The old state, from whatever this has come to. Raises any of core.errors; may be called again."""
        ran, touched = self.begun("start"), self.begun("stop")
        changed = self.begun("exchange") or self.begun("save")
        runs = changed and self.service is not None and self.service.running()
        if changed:
            try:
                self.stop()
                if self.profile.sign_state and (ran or self.moved()):
                    self._sign_state_back(self.units())
            except BaseException:
                if not self.journal.has("undo"):
                    self._let_run(runs)  # nothing was changed yet
                raise
        run_again = bool(self.plan.running) or runs
        if (begun := self.journal.last("undo")) is not None:
            run_again = run_again or bool(begun["run_again"])
        else:
            try:
                self.journal.append("undo", run_again=run_again)
            except StorageError:
                pass  # the journal's disk is full: no reason to leave the node as it is
        if changed and self.plan.way == "swap":
            swapping.swap_back(self.session, self.plan)
        elif changed:
            self._back(ran)
        self.unstage()
        self._bring_back()
        for ground in self.plan.grounds:
            exchange.remove_empty([unit.aside for unit in self.units()], ground.aside)
        if touched:
            try:
                self._let_run(run_again)
            except SnapshotterError as error:
                self.unstarted = error  # the old data may be just what it can't run on

    def _let_run(self, run: bool) -> None:
        if self.service is not None:
            if self.service.can_mask and not self.plan.masked:
                self.service.unmask()
            if run:
                self.service.start()

    def _back(self, ran: bool) -> None:
        units = self.units()
        for unit in units:
            with told(unit.place):
                exchange.back(unit, ran=ran)
        exchange.sync_parents([unit.place for unit in units])
        for unit in units:
            with told(unit.place):
                for kept in exchange.remove_new(unit, ran=ran):
                    self.notes.append(f"{kept} is neither the old nor the new one, and stays")

    def _sign_state_back(self, units: list[Unit]) -> None:
        """What the node has signed since goes into the old data before that takes its place again."""
        plan = self.plan
        where = {root: self._old_of(root, units) for root in plan.roots}
        old = where[plan.path]
        if old == plan.path or not os.path.isdir(plan.path) or not os.path.isdir(old):
            return
        with self._carrying(units):
            self.notes += sign_state.carry_higher(
                plan.path, old, self.profile, roots=plan.outside(where), from_set=plan.from_set
            )

    @contextmanager
    def _carrying(self, units: list[Unit]) -> Iterator[None]:
        """Files are replaced within: one that is a unit itself is known by another inode afterwards. Where each was, is
        noted before, so that it is found also after a kill in here: nothing changes places meanwhile."""
        where = [(exchange.where_old(unit), exchange.where_new(unit)) for unit in units]
        self.journal.append("carry", units=msgspec.to_builtins(units), where=where)
        yield
        self.journal.append("units", units=msgspec.to_builtins(self.units()))

    def _old_of(self, root: str, units: list[Unit]) -> str:
        """Where a root's old content lies. One by one, it is in the directory of what is set aside."""
        if root == self.plan.path and self.live != root:
            return self.live
        unit = next((u for u in units if u.place == root), None)
        if unit is not None:
            return exchange.where_old(unit) or root
        ground = next((g for g in self.plan.grounds if g.path == root), None)
        return ground.aside if ground is not None and os.path.isdir(ground.aside) else root

    # ------------------------------------------------------------------------------------------------------- swaps

    def _swap(self) -> None:
        swapping.swap(self.session, self.plan, self.found())
        staging.strip(self.plan, self.profile, [self.plan.path])
        for path in identity.secret_files([(r, r) for r in self.plan.roots], self.profile, self.plan.node.key_file):
            if any(mounts.is_under(path, root) for root in self.plan.roots):
                os.chmod(path, 0o600)
        for root in self.plan.roots:
            _sync(root)

    # ----------------------------------------------------------------------------------------------------- the end

    def discard(self) -> list[str]:
        """Remove what was set aside; returns its names. May be called again."""
        gone: list[str] = []
        for swap in self.plan.swaps:
            provider = self.session.provider(swap.provider, self.plan.node, chosen=False)
            provider.swap_commit(swap.swap_id)
            if not self.journal.has("discard"):
                self.journal.append("discard")
            gone.append(f"{swap.provider}:{swap.swap_id}")
        if not self.plan.swaps and not self.journal.has("discard"):
            self.journal.append("discard")
        units = self.units()
        for unit in units:
            with told(unit.aside):
                exchange.remove_old(unit)
        for record in self.journal.all("saving"):
            ground = next(g for g in self.plan.grounds if g.path == record["step"])
            exchange.remove(ground.aside, tuple(record["known"]))
            gone.append(ground.aside)
        for ground in self.plan.grounds:
            exchange.remove_empty([unit.aside for unit in units], ground.aside)
            if os.path.lexists(ground.aside) and any(u.aside.startswith(ground.aside) for u in units):
                raise StorageError("could not be removed: there is something else in it", object=ground.aside)
            if any(mounts.is_under(u.aside, ground.aside) and u.old for u in units):
                gone.append(ground.aside)
        return gone


def _sync(path: str) -> None:
    """Everything of its file system, on the disk. Raises StorageError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with told(path):
            tree.syncfs(fd)
    finally:
        os.close(fd)


def _make_private(aside: str, wanted: list[str]) -> None:
    """The directory for entries that are set aside one by one: nobody's but ours."""
    if any(path.startswith(aside + "/") for path in wanted) and not os.path.isdir(aside):
        os.mkdir(aside, 0o700)


def _make_like(old_top: str, new_top: str, name: str) -> None:
    """The directory `name` in the new content, with the old one's owner and mode."""
    if name and not os.path.isdir(os.path.join(new_top, name)):
        _make_like(old_top, new_top, os.path.dirname(name))
        like = os.stat(os.path.join(old_top, name))
        os.mkdir(os.path.join(new_top, name), 0o700)
        os.chown(os.path.join(new_top, name), like.st_uid, like.st_gid)
        os.chmod(os.path.join(new_top, name), like.st_mode & 0o7777)
