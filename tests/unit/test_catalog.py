"""Sets put together from what providers list: states, what is good, what `latest` and a prefix mean."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from snapshotter import catalog
from snapshotter.catalog import Unavailable
from snapshotter.core.errors import NotFoundError, StorageError, UsageError
from snapshotter.core.model import Attachment, Birth, ImageState, Member, Root, Snapshot, State
from snapshotter.host.places import host_name
from snapshotter.nodes.config import Config
from snapshotter.verbs.session import Session

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
GOOD = {"sealed": "20261122t120000z", "grade": "filesystem"}


def birth(tail: str, *, members: int = 1, host: str = "", target: str = "t" * 16, day: int = 22) -> Birth:
    return Birth(
        set_id=f"s202611{day}t120000z-{tail}",
        target=target,
        node="node",
        host=host or host_name(),
        profile="generic",
        roots=(Root("/data", 0),),
        members=tuple(Member("one" if k < 2 else "two", f"v{k}") for k in range(members)),
        taken_at=NOON,
        deadline=NOON + timedelta(seconds=5),
    )


def snapshot(
    born: Birth, member: int = 0, state: ImageState = ImageState.READY, order: int = 0, **marks: str
) -> Snapshot:
    named = {name.replace("_", "-"): value for name, value in marks.items()}
    return Snapshot(
        born.members[member].provider, f"{born.set_id}/{member}", born.of_member(member), state, named, 10, order
    )


class Listed:
    """A provider as the catalog sees one."""

    def __init__(self, name: str, found: list[Snapshot], error: Exception | None = None) -> None:
        self.name = name
        self.notes: list[str] = []
        self.found = found
        self.error = error
        self.away: set[str] = set()

    def sees(self, volume: str) -> bool:
        return volume not in self.away

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        if self.error:
            raise self.error
        yield from (one for one in self.found if set_id in (None, one.birth.set_id))

    def attachments(self) -> Iterator[Attachment]:
        return iter(())


def read(*found: Snapshot, gone: tuple[Unavailable, ...] = ()) -> catalog.Catalog:
    return catalog.read([Listed("one", list(found))], gone)  # type: ignore[list-item]


def state_of(*found: Snapshot, gone: tuple[Unavailable, ...] = ()) -> State:
    (only,) = read(*found, gone=gone).sets
    return only.state


def test_the_order_of_sets_whose_volumes_changed() -> None:
    """A node that moved: one provider counts in transactions, the other in seconds. Of sets of the same volumes the
    storage's order counts, whatever a clock said."""

    def one(tail: str, provider: str, minute: int, order: int) -> Snapshot:
        born = replace(birth(tail), members=(Member(provider, "v"),), taken_at=NOON + timedelta(minutes=minute))
        return snapshot(born, order=order, **GOOD)

    moved = [one("00000a", "one", 0, 1_700_000_000), one("00000b", "one", 1, 1_700_000_060)]
    since = [one("00000c", "two", 2, 17), one("00000d", "two", 3, 23)]
    back = one("00000e", "two", -60, 31)  # the clock was set back; and was right again
    right = one("00000f", "two", 5, 37)
    ahead = one("000009", "one", 10**8, 1_600_000_000)  # the clock was ahead, and was right again

    def order(*found: Snapshot) -> str:
        for listed in (found, found[::-1]):
            entries = read(*listed)
            ids = "".join(each.set_id[-1] for each in entries.sets)
        assert entries.newest_good("t" * 16) is entries.sets[-1]
        return ids

    assert order(*moved, *since) == "abcd"
    assert order(*moved, *since, back) == "abcde"
    assert order(*moved, *since, back, right) == "abcdef"
    assert order(ahead, *moved, *since) == "9abcd"
    last = one("000008", "one", 10**8, 1_700_000_120)  # the clock was ahead at the last set before the node moved
    assert order(*moved, last, *since) == "ab8cd"
    assert order(*moved, last) == "ab8"


def test_one_members_corrupt_is_the_sets() -> None:
    """A verify that was killed between two members, or could not write to one."""
    both, ok = (
        birth("000001", members=2),
        {"verify_outcome": "ok", "verify_level": "3", "verify_at": "20261122t120000z"},
    )
    bad = {"verify_outcome": "corrupt", "verify_level": "2", "verify_at": "20261123t120000z"}
    for marks in ((bad, ok), (ok, bad), (bad, {}), ({}, bad)):
        (found,) = read(*(snapshot(both, k, **GOOD, **marks[k]) for k in (0, 1))).sets
        assert found.corrupt and not found.good and found.marks["verify-at"] == bad["verify_at"]


def test_latest_says_what_could_not_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    old = birth("000001", day=21)
    half = replace(birth("000003", members=3, day=23), taken_at=NOON + timedelta(days=1))
    gone = Unavailable("two", "the pool isn't imported")
    entries = read(snapshot(old, **GOOD), snapshot(half, 0, **GOOD), snapshot(half, 1, **GOOD), gone=(gone,))
    session = Session(Config(state="/nonexistent"))
    monkeypatch.setattr(Session, "catalog", lambda *_: entries)
    monkeypatch.setattr(Session, "_target_of", lambda *_: "t" * 16)
    assert session.select("latest").set_id == old.set_id
    newer, unasked = session.notes
    assert newer.startswith(half.set_id) and "isn't imported" in unasked and old.set_id in unasked


def test_states() -> None:
    one, two, three = birth("000001"), birth("000002", members=2), birth("000003", members=3)
    assert state_of(snapshot(one, **GOOD)) is State.READY
    assert state_of(snapshot(one)) is State.INCOMPLETE
    assert state_of(snapshot(one, state=ImageState.INVALID, **GOOD)) is State.DAMAGED
    assert state_of(snapshot(one, state=ImageState.PENDING, **GOOD)) is State.PENDING
    assert state_of(replace(snapshot(one), marks_known=False)) is State.DAMAGED, "it may have been sealed"
    assert state_of(snapshot(two, 0, **GOOD)) is State.DAMAGED, "a member is gone"
    assert state_of(snapshot(two, 0, **GOOD), snapshot(two, 1)) is State.INCOMPLETE, "sealed on one of two"
    assert state_of(snapshot(two, 0, **GOOD), snapshot(two, 1, **GOOD)) is State.READY
    both = snapshot(three, 0, **GOOD), snapshot(three, 1, **GOOD)
    asked = catalog.read([Listed("one", list(both)), Listed("two", [])])  # type: ignore[list-item]
    assert asked.sets[0].state is State.DAMAGED, "two was asked, and has none"
    assert state_of(*both) is State.UNKNOWN, "two isn't installed here: nobody asked it"
    assert state_of(*both, gone=(Unavailable("two", "no SDK"),)) is State.UNKNOWN


def test_what_is_out_of_sight_is_not_gone() -> None:
    """A pool that isn't imported: a person who prunes, or follows `status`, must not lose what is left of the set."""
    here = Listed("one", [snapshot(birth("000001", members=2), 0, **GOOD)])
    assert catalog.read([here]).sets[0].state is State.DAMAGED  # type: ignore[list-item]
    here.away.add("v1")
    (only,) = catalog.read([here]).sets  # type: ignore[list-item]
    assert only.state is State.UNKNOWN and "v1" in only.why
    assert catalog.read([here, Listed("one", [])]).sets[0].state is State.DAMAGED  # type: ignore[list-item]


def test_good() -> None:
    born = birth("000001")
    assert read(snapshot(born, **GOOD)).sets[0].good
    for marks in ({**GOOD, "grade": "skewed"}, {**GOOD, "verify_outcome": "corrupt"}, {"grade": "filesystem"}):
        assert not read(snapshot(born, **marks)).sets[0].good, marks
    assert not read(snapshot(born, state=ImageState.PENDING, **GOOD)).sets[0].good


def test_pinned_if_any_member_says_so_the_rest_only_if_all_do() -> None:
    two = birth("000002", members=2)
    (found,) = read(snapshot(two, 0, **GOOD, pinned="1", height="7"), snapshot(two, 1, **GOOD)).sets
    assert found.pinned and found.sealed and "height" not in found.marks


def test_newest_is_by_the_storages_order_before_the_clock() -> None:
    early, late = birth("000001", day=21), birth("000002", day=22)
    entries = read(snapshot(early, order=9, **GOOD), snapshot(late, order=3, **GOOD))
    newest = entries.newest_good("t" * 16)
    assert newest is not None and newest.set_id == early.set_id
    assert entries.newest_verified("t" * 16) is None
    assert entries.newest_good("another") is None


def test_a_replica_is_not_numbered_as_its_original_is() -> None:
    """Another pool counts transactions of its own: an old replica was `latest`."""
    here = [snapshot(replace(birth(f"00000{k}"), taken_at=NOON + timedelta(days=k)), order=k, **GOOD) for k in (3, 4)]
    there = [
        replace(
            snapshot(replace(birth(f"00000{k}"), taken_at=NOON + timedelta(days=k)), order=900 + k, **GOOD),
            received=True,
        )
        for k in (1, 2)
    ]
    assert [each.set_id[-1] for each in read(*there, *here).sets] == ["1", "2", "3", "4"]


def test_a_provider_that_fails_hides_only_its_own() -> None:
    here = Listed("one", [snapshot(birth("000001"), **GOOD)])
    entries = catalog.read([Listed("two", [], StorageError("is down")), here])  # type: ignore[list-item]
    assert [gone.provider for gone in entries.unavailable] == ["two"]
    assert [found.state for found in entries.sets] == [State.READY]


def test_a_bug_of_one_provider_hides_only_its_own() -> None:
    here = Listed("one", [snapshot(birth("000001"), **GOOD)])
    broken = Listed("two", [], AttributeError("'NoneType' object has no attribute 'x'"))
    entries = catalog.read([broken, here])  # type: ignore[list-item]
    assert [(gone.provider, "a bug" in gone.reason) for gone in entries.unavailable] == [("two", True)]
    assert [found.state for found in entries.sets] == [State.READY]
    with pytest.raises(AttributeError):
        catalog.read([broken, here], needed=[broken])  # type: ignore[list-item]


def test_the_same_object_through_two_instances_counts_once() -> None:
    one = snapshot(birth("000002", members=2), 0, **GOOD)
    other = snapshot(birth("000002", members=2), 1, **GOOD)
    entries = catalog.read([Listed("one", [one, other]), Listed("one", [one])])  # type: ignore[list-item]
    assert [len(found.snapshots) for found in entries.sets] == [2]


def test_picking_by_prefix() -> None:
    entries = read(*(snapshot(birth(tail), **GOOD) for tail in ("aaaaaa", "aaabbb", "cccccc")))
    ids = [found.set_id for found in entries.sets]
    assert entries.pick(ids[0]).set_id == ids[0]
    assert entries.pick("s20261122t120000z-c").set_id == ids[2]
    for prefix, error in [
        ("s2026", UsageError),
        ("s20261122t120000z-aaa", UsageError),
        ("x", NotFoundError),
        ("", NotFoundError),
    ]:
        with pytest.raises(error):
            entries.pick(prefix)
    with pytest.raises(UsageError, match="full id"):
        entries.pick("s20261122t120000z-c", careful=True)
    assert entries.pick(ids[2], careful=True).set_id == ids[2]
    (alone,) = read(snapshot(birth("aaaaaa"), **GOOD)).sets
    assert read(*alone.snapshots).pick("s20261122", careful=True), "8 characters past the s that all ids begin with"
    with pytest.raises(UsageError):
        read(*alone.snapshots).pick("s2026", careful=True)


def test_another_hosts_set_wants_its_full_id_and_a_word() -> None:
    born = replace(birth("aaaaaa"), host="elsewhere-00000000")
    entries = read(snapshot(born, **GOOD))
    for selector, from_host in [(born.set_id, False), (born.set_id[:-1], True)]:
        with pytest.raises(UsageError, match="another host"):
            entries.pick(selector, from_host=from_host)
    assert entries.pick(born.set_id, from_host=True)
