"""prune: what is gone from the storage afterwards, and what isn't, whoever meddles meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from snapshotter.core.errors import StorageError, UsageError
from snapshotter.core.journal import Journal
from snapshotter.core.model import Access, new_attachment_id
from snapshotter.host.locks import Locks
from snapshotter.testing.faults import Proxy
from snapshotter.verbs import open_restores
from snapshotter.verbs.prune import prune
from tests.unit.upkeep_kit import NOON, World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, count=2)
    with made.clock():
        yield made


def days(world: World, count: int, number: int = 0, **marks: str) -> list[str]:
    """A set a day, the last one now."""
    return [world.take(NOON - timedelta(days=count - 1 - k), number=number, **marks) for k in range(count)]


def left(world: World, number: int = 0) -> list[str]:
    return [found.set_id for found in world.sets(number)]


def test_what_no_bucket_needs_goes_and_a_dry_run_says_so_of_each(world: World) -> None:
    ids = days(world, 10)
    world.store.add_foreign("theirs")
    document, _ = prune(world.session(), dry_run=True)
    assert [entry["set_id"] for entry in document["sets"] if not entry["keep"]] == ids[:3]
    assert all(entry["rule"] for entry in document["sets"]) and len(document["sets"]) == 10
    assert left(world) == ids, "a dry run changed something"
    document, errors = prune(world.session())
    assert not errors and [gone["set_id"] for gone in document["removed"]] == ids[:3]
    assert left(world) == ids[3:]
    assert world.store.foreign == ["theirs"]
    assert not prune(world.session())[0]["removed"], "a second run"


def test_more_than_half_wants_a_word_and_stops_no_other_node(world: World) -> None:
    many, few = days(world, 20), days(world, 8, number=1)
    document, errors = prune(world.session())
    assert isinstance(errors[0], UsageError) and "--confirm-many" in errors[0].line()
    assert [entry["node"] for entry in document["failed"]] == ["n0"]
    assert left(world) == many and left(world, 1) == few[1:]
    prune(world.session(), confirm_many=True)
    assert left(world) == many[13:]


def test_one_that_is_held_busy_or_failing_stops_no_other(world: World) -> None:
    ids = days(world, 12)
    session = world.session()
    (attached,) = [found for found in world.sets() if found.set_id == ids[0]]
    provider = world.provider()
    provider.attach(attached.snapshots[0], new_attachment_id(NOON), Access.WRITABLE, str(world.tmp / "mnt"))

    class Stubborn(Proxy):
        def delete(self, set_id: str) -> None:
            if set_id == ids[1]:
                raise StorageError("refused", object=set_id)
            super().delete(set_id)

    with Locks([f"set:{ids[2]}"]):
        document, errors = prune(world.session(Stubborn(world.provider())))
    assert left(world) == [*ids[:3], *ids[5:]]
    assert [entry["set_id"] for entry in document["failed"]] == ids[1:3]
    assert [error.exit for error in errors] == [6, 5]
    assert session.again(world.sets()[1]) is not None


def test_nothing_goes_when_what_was_to_stay_is_gone(world: World) -> None:
    ids = days(world, 9)

    class Meddled(Proxy):
        """Somebody deletes the newest set between the list and the lock."""

        def snapshots(self, set_id: str | None = None):  # type: ignore[no-untyped-def]
            if set_id is not None:
                world.provider().delete(ids[-1])
            return self.inner.snapshots(set_id)

    _, errors = prune(world.session(Meddled(world.provider())))
    assert len(errors) == 1 and left(world) == ids[:-1]


def test_a_pin_that_comes_meanwhile_holds(world: World) -> None:
    ids = days(world, 9)

    class Pinned(Proxy):
        def snapshots(self, set_id: str | None = None):  # type: ignore[no-untyped-def]
            if set_id == ids[0]:
                self.inner.mark(ids[0], {"pinned": "1"})
            return self.inner.snapshots(set_id)

    _, errors = prune(world.session(Pinned(world.provider())))
    assert left(world) == [ids[0], *ids[2:]] and "pinned" in errors[0].line()


def test_one_that_is_verified_meanwhile_may_be_the_newest_such(world: World) -> None:
    ids = days(world, 9)

    class Verified(Proxy):
        def snapshots(self, set_id: str | None = None):  # type: ignore[no-untyped-def]
            if set_id == ids[1]:
                self.inner.mark(ids[1], {"verify-outcome": "ok", "verify-level": "3"})
            return self.inner.snapshots(set_id)

    document, errors = prune(world.session(Verified(world.provider())))
    assert left(world) == ids[1:], "the other went"
    assert [error.line() for error in errors] == [
        f"{ids[1]}: is verified, and wasn't when this was decided; prune again"
    ]
    assert document["failed"][0]["set_id"] == ids[1]
    prune(world.session())
    assert left(world) == ids[1:], "newest verified"


def test_no_more_go_once_what_was_to_stay_is_found_corrupt(world: World) -> None:
    """A verify of hours ends while sets are being removed."""
    ids = days(world, 12)

    class Slow(Proxy):
        def delete(self, set_id: str) -> None:
            super().delete(set_id)
            self.inner.mark(ids[-1], {"verify-outcome": "corrupt", "verify-level": "3"})

    document, errors = prune(world.session(Slow(world.provider())))
    assert left(world) == ids[1:] and [gone["set_id"] for gone in document["removed"]] == ids[:1]
    assert [error.exit for error in errors] == [5] and ids[-1] in errors[0].line()


def test_an_open_restore_holds_its_target_only(world: World) -> None:
    ids, others = days(world, 9), days(world, 9, number=1)
    where = Path(open_restores.path_of(world.session(), world.target))
    where.parent.mkdir(parents=True)
    Journal.create(str(where), path="/data")
    document, _ = prune(world.session())
    assert left(world) == ids and left(world, 1) == others[2:]
    assert [entry["code"] for entry in document["failed"]] == ["busy"]


def test_other_hosts_sets_and_those_of_no_node_are_shown_and_stay(world: World) -> None:
    ids = days(world, 8)
    foreign = world.take(NOON - timedelta(days=40), host="other-99999999")
    document, _ = prune(world.session())
    rules = {entry["set_id"]: entry["rule"] for entry in document["sets"]}
    assert rules[foreign] == "another host's" and foreign in left(world)
    assert ids[0] not in left(world)
