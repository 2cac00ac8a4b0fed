"""Sets, read back from the labels on the storage through every provider. There is no other record of them.

Must know no storage and no policy. An image is judged by what its storage says of it, never by its label alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import accumulate

from msgspec import Struct

from snapshotter.core.errors import NotFoundError, UsageError, foreseen
from snapshotter.core.labels import merge_marks
from snapshotter.core.model import SET_ID, Attachment, ImageState, Member, Snapshot, SnapshotSet, State, utc_now
from snapshotter.host.places import host_name, same_host
from snapshotter.provider import Provider


class Unavailable(Struct, frozen=True):
    """A provider that could not be asked, and why."""

    provider: str
    reason: str


class Catalog(Struct):
    """What all providers list now. `unavailable` providers make the sets that name them `unknown`."""

    sets: list[SnapshotSet]
    attachments: list[Attachment]
    unavailable: list[Unavailable] = []
    notes: list[str] = []  # what providers found odd, for a person

    def of_target(self, target: str) -> list[SnapshotSet]:
        """The sets of one target, oldest first."""
        return [found for found in self.sets if found.birth.target == target]

    def newest_good(self, target: str) -> SnapshotSet | None:
        """What `latest` means."""
        return next((found for found in reversed(self.of_target(target)) if found.good), None)

    def newest_verified(self, target: str) -> SnapshotSet | None:
        """What `latest-verified` means."""
        return next((found for found in reversed(self.of_target(target)) if found.good and found.verified), None)

    def may_be_newest(self, found: SnapshotSet) -> bool:
        """Whether no newer one of its target is known to be good."""
        newest = self.newest_good(found.birth.target)
        return newest is None or self.sets.index(newest) < self.sets.index(found)

    def pick(self, selector: str, *, careful: bool = False, from_host: bool = False) -> SnapshotSet:
        """The set with this id or prefix. `careful` (delete, pin, in place) wants the full id or a prefix that goes 8
        characters past what all ids have in common. Another host's set needs its full id and `from_host`.
        Raises NotFoundError, UsageError (ambiguous, too short, another host's)."""
        selector = selector.strip()
        matches = [found for found in self.sets if found.set_id.startswith(selector)] if selector else []
        if not matches:
            cure = "`snapshotter list` shows the sets"
            if self.unavailable:
                cure += f"; not asked: {', '.join(gone.provider for gone in self.unavailable)}"
            raise NotFoundError("no such set", object=selector or "''", cure=cure)
        if len(matches) > 1:
            some = ", ".join(found.set_id for found in matches[:3]) + (", ..." if len(matches) > 3 else "")
            raise UsageError(f"is ambiguous: {some}", object=selector, cure="give more of the id")
        found = matches[0]
        full = bool(SET_ID.fullmatch(selector))
        if careful and not full:
            ids = [other.set_id for other in self.sets]
            common = _common_prefix(ids)
            if len(selector) < min(len(common) + 8, len(found.set_id)):
                raise UsageError(
                    "is too short a prefix for this", object=selector, cure=f"give the full id: {found.set_id}"
                )
        if not same_host(found.birth.host, host_name()) and not (full and from_host):
            raise UsageError(
                f"was taken on another host, {found.birth.host}",
                object=found.set_id,
                cure="give its full id and --from-host",
            )
        return found


def _common_prefix(ids: Sequence[str]) -> str:
    first, last = min(ids), max(ids)
    if first == last:
        return "s"
    return first[: next(k for k, (a, b) in enumerate(zip(first, last, strict=True)) if a != b)]


def read(
    providers: Sequence[Provider],
    unavailable: Iterable[Unavailable] = (),
    set_id: str | None = None,
    slot: tuple[str, str] | None = None,
    needed: Sequence[Provider] = (),
) -> Catalog:
    """Ask every provider, each object once (two instances may see the same store). A provider that fails, be it by a
    bug, becomes `unavailable`; the rest is still listed. `slot` (target, scheduled time): only those sets, without
    attachments. Raises SnapshotterError: of one of the `needed` instances."""
    gone = list(unavailable)
    notes: list[str] = []
    members: dict[str, dict[tuple[str, int], Snapshot]] = {}
    attachments: dict[tuple[str, str, int], Attachment] = {}
    for provider in providers:
        try:
            for snapshot in provider.snapshots(set_id) if slot is None else provider.of_slot(*slot):
                found = members.setdefault(snapshot.birth.set_id, {})
                key = (snapshot.provider, snapshot.birth.member)
                # A store may have been copied as a whole: of two of the same member the one that can be restored
                # counts.
                if key not in found or found[key].state is ImageState.INVALID:
                    found[key] = snapshot
        except Exception as error:
            if any(provider is each for each in needed):
                raise
            gone.append(Unavailable(provider.name, foreseen(error, provider.name).line()))
        try:
            for attachment in provider.attachments() if slot is None else ():
                attachments[(attachment.id, attachment.provider, attachment.member)] = attachment
        except Exception as error:
            gone.append(Unavailable(provider.name, foreseen(error, provider.name).line()))
        notes += provider.notes
    by_set: dict[str, list[Attachment]] = {}
    for attachment in attachments.values():
        by_set.setdefault(attachment.set_id, []).append(attachment)
    # Also of a driver that isn't among them (not installed, or with nothing that it could look at) nothing is known.
    failed = {entry.provider for entry in gone}
    asked = [provider for provider in providers if provider.name not in failed]
    sets = [
        _assemble(list(parts.values()), tuple(by_set.get(identity, ())), asked) for identity, parts in members.items()
    ]
    return Catalog(
        sets=in_order(sets),
        attachments=list(attachments.values()),
        unavailable=list(dict.fromkeys(gone)),
        notes=list(dict.fromkeys(notes)),
    )


def in_order(sets: Iterable[SnapshotSet]) -> list[SnapshotSet]:
    """Oldest first. Among sets of the same volumes the storage's order counts; between others (the node moved to
    another provider or pool; a replica, which its own storage has numbered) only clocks can tell: a set is no older
    than those before it, and one stamped in the future is as old as the one after it, or else the one before it."""
    chains: dict[tuple[object, ...], list[SnapshotSet]] = {}
    for found in sets:
        chains.setdefault((found.birth.members, found.received), []).append(found)
    timed: list[tuple[datetime, SnapshotSet]] = []
    now = utc_now()
    for chain in chains.values():
        chain.sort(key=lambda found: found.sort_key)
        times = [found.birth.taken_at for found in chain]
        for k in reversed(range(len(chain) - 1)):
            times[k] = times[k + 1] if times[k] > now else times[k]
        if past := [moment for moment in times if moment <= now]:
            times = [moment if moment <= now else past[-1] for moment in times]
        timed += zip(accumulate(times, max), chain, strict=True)
    timed.sort(key=lambda each: each[0])  # stable: a chain stays as it is
    return [found for _, found in timed]


def _out_of_sight(members: Iterable[Member], asked: Sequence[Provider]) -> Member | None:
    """The first of these that isn't listed because what holds it isn't here."""
    for member in members:
        if not any(provider.sees(member.volume) for provider in asked if provider.name == member.provider):
            return member
    return None


def _assemble(found: list[Snapshot], attachments: tuple[Attachment, ...], asked: Sequence[Provider]) -> SnapshotSet:
    found.sort(key=lambda snapshot: snapshot.birth.member)
    birth = found[0].birth
    marks = merge_marks(snapshot.marks for snapshot in found)
    here = {snapshot.birth.member for snapshot in found}
    missing = [member for index, member in enumerate(birth.members) if index not in here]
    state, why = State.READY, ""
    names = {provider.name for provider in asked}
    pending = [snapshot for snapshot in found if snapshot.state is ImageState.PENDING]
    coming = any(snapshot.replica_of for snapshot in pending)  # a copy's members come one after another
    if unasked := [member for member in missing if member.provider not in names]:
        state, why = State.UNKNOWN, f"can't ask {unasked[0].provider} about {unasked[0].volume}"
    elif not all(snapshot.marks_known for snapshot in found):  # never "incomplete": that would be reaped
        state, why = State.DAMAGED, "its marks can't be read: damaged, or of a newer version of snapshotter"
    elif "sealed" not in marks:
        state, why = State.INCOMPLETE, "never sealed"
    elif (away := _out_of_sight(missing, asked)) is not None:
        state, why = State.UNKNOWN, f"what holds {away.volume} ({away.provider}) isn't connected or imported"
    elif missing and not coming:
        state, why = State.DAMAGED, f"the snapshot of {missing[0].volume} is gone"
    else:
        invalid = [snapshot for snapshot in found if snapshot.state is ImageState.INVALID]
        if invalid:
            state, why = State.DAMAGED, f"{invalid[0].volume}: {invalid[0].why or 'the image is invalid'}"
        elif pending:
            state, why = State.PENDING, pending[0].why
    return SnapshotSet(
        birth=birth.of_member(0),
        snapshots=tuple(found),
        marks=marks,
        state=state,
        attachments=attachments,
        why=why,
    )
