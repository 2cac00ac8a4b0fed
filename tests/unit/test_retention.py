"""Retention as a property of whole histories: whatever was taken, damaged, pinned, and whatever the clock did."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from msgspec.structs import replace

from snapshotter.core.model import (
    Access,
    Attachment,
    Birth,
    ImageState,
    Member,
    Purpose,
    Root,
    Snapshot,
    SnapshotSet,
    State,
)
from snapshotter.nodes.config import Keep
from snapshotter.nodes.retention import FUTURE, Plan, decide, reach
from snapshotter.nodes.values import Bytes, Seconds

HERE, ELSEWHERE = "here-00000001", "there-00000002"
DAY = timedelta(days=1)
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
DAILY = Keep(daily=7)


#: A schedule whose last slot is always the last.
EVER = 1e12


def a_set(
    taken_at: datetime,
    order: int,
    *,
    state: State = State.READY,
    host: str = HERE,
    pinned: bool = False,
    attached: bool = False,
    size: int | None = 10,
    received: bool = False,
    slot: str = "",
    **marks: str,
) -> SnapshotSet:
    set_id = f"s{taken_at:%Y%m%dt%H%M%Sz}-{order:06x}"
    birth = Birth(
        set_id=set_id,
        target="t" * 16,
        node="node",
        host=host,
        profile="generic",
        roots=(Root("/data", 0),),
        members=(Member("memory", "m1"),),
        taken_at=taken_at,
        deadline=taken_at,
        slot=slot,
    )
    given = {"sealed": "1", "grade": "filesystem", **({"pinned": "1"} if pinned else {}), **marks}
    given = {name.replace("_", "-"): value for name, value in given.items()}
    snapshot = Snapshot("memory", set_id, birth, ImageState.READY, given, size, order, received=received)
    attachment = Attachment("a", "memory", set_id, 0, "/mnt", Access.WRITABLE, Purpose.RESTORE, taken_at)
    return SnapshotSet(birth, (snapshot,), given, state, (attachment,) if attached else ())


def kept(plan: Plan) -> list[str]:
    return [verdict.set_id for verdict in plan.verdicts if verdict.keep]


def history(chance: random.Random) -> tuple[list[SnapshotSet], datetime, Keep]:
    """Takes over up to ten years: the clock is stepped both ways, set by a zone's wall time (summer time), starts at
    leap days and at ends of years; sets of every kind."""
    now = chance.choice(
        [
            datetime(2024, 2, 29, chance.randrange(24), tzinfo=UTC),
            datetime(2020, 12, 31, 23, 30, tzinfo=UTC),
            datetime(2026, 3, 29, 0, 30, tzinfo=ZoneInfo("Europe/Berlin")).astimezone(UTC),
            datetime(2026, 11, 1, 5, 30, tzinfo=ZoneInfo("America/New_York")).astimezone(UTC),
            datetime(2018, 1, 1, tzinfo=UTC) + timedelta(seconds=chance.randrange(10 * 366 * 86400)),
        ]
    )
    every = chance.choice([3600, 6 * 3600, 86400, 86400, 7 * 86400, 30 * 86400])
    wall = chance.choice([None, ZoneInfo("Europe/Berlin"), ZoneInfo("Australia/Lord_Howe")])
    error = timedelta()  # of the clock
    sets = []
    for order in range(chance.choice([0, 1, 2, 5, 20, 60, 120])):
        now += timedelta(seconds=every * chance.choice([1, 1, 1, 1, 0.001, 2, 10]))
        if chance.random() < 0.03:
            error = timedelta(hours=chance.choice([-1, 1, -24 * 366, 24 * 366, -5, 0, 0, 0]))
        seen = now + error
        if wall is not None:  # a clock that is set to local time and believed to be UTC's
            seen = seen.astimezone(wall).replace(tzinfo=UTC)
        kind = chance.random()
        marks: dict[str, str] = {}
        state, host = State.READY, HERE
        if kind < 0.05:
            marks = {"verify_outcome": "corrupt", "verify_level": "3"}
        elif kind < 0.10:
            marks = {"grade": "skewed"}
        elif kind < 0.30:
            state = chance.choice([State.PENDING, State.UNKNOWN, State.DAMAGED, State.INCOMPLETE])
        elif kind < 0.35:
            host = ELSEWHERE
        if not marks and chance.random() < 0.2:
            marks = {"verify_outcome": "ok", "verify_level": str(chance.choice([1, 2, 3]))}
        sets.append(
            a_set(
                seen.replace(microsecond=0),
                # The storage's own order, where it has one; else all say 0 and the time in the id decides.
                order + 1,
                state=state,
                host=host,
                pinned=chance.random() < 0.03,
                attached=chance.random() < 0.03,
                size=chance.choice([None, 1, 10, 1000]),
                received=chance.random() < 0.03,
                slot=f"{seen:%Y%m%dt000000z}" if chance.random() < 0.5 else "",
                **marks,
            )
        )
    if chance.random() < 0.3:
        sets = [_without_order(found) for found in sets]
    sets.sort(key=lambda found: found.sort_key)
    keep = Keep(
        **{
            name: chance.choice([0, 0, 1, 4, 7, 30])
            for name in ("hourly", "daily", "weekly", "monthly", "yearly")
            if chance.random() < 0.5
        },
        min=chance.choice([0, 0, 0, 1, 5]),
        max_age=chance.choice([None, None, Seconds(3600), Seconds(30 * 86400)]),
        max_space=chance.choice([None, None, None, Bytes(0), Bytes(500)]),
    )
    return sets, now + error if chance.random() < 0.5 else now, keep


def _without_order(found: SnapshotSet) -> SnapshotSet:
    return replace(found, snapshots=tuple(replace(snapshot, order=0) for snapshot in found.snapshots))


def hold(sets: list[SnapshotSet], now: datetime, keep: Keep, automatic: bool) -> None:
    """Every invariant of DESIGN's retention, told from outside: nothing here knows how `decide` does it."""
    plan = decide(sets, now, keep, HERE, automatic=automatic, every=EVER)
    assert [verdict.found for verdict in plan.verdicts] == sets, "a verdict on every set, in order"
    assert all(verdict.rule for verdict in plan.verdicts)
    gone = [verdict.found for verdict in plan.verdicts if not verdict.keep]
    left = [verdict.found for verdict in plan.verdicts if verdict.keep]
    for found in gone:
        assert found.birth.host == HERE and not found.pinned and not found.attachments
        assert not found.received
        assert found.state not in (State.PENDING, State.UNKNOWN, State.INCOMPLETE)
        assert not (automatic and found.state is State.DAMAGED)
        assert found.birth.taken_at <= now + FUTURE, "a set of the future went"
    assert all(v.future == (v.found.birth.taken_at > now + FUTURE) for v in plan.verdicts)
    mine = [found for found in sets if found.birth.host == HERE]
    good = [found for found in mine if found.good and not found.received]
    plausible = sorted(
        (found for found in good if found.birth.taken_at <= now + FUTURE),
        key=lambda found: (found.birth.taken_at, *found.sort_key),
    )
    # What a restore would take, by the catalog's order and by the clock's.
    for order in (good, plausible):
        verified = [found for found in order if found.verified]
        assert set(map(id, verified[-1:])) <= set(map(id, left)), "the newest verified good set went"
        newest = order[-1:] if verified else order[-2:]
        assert set(map(id, newest)) <= set(map(id, left)), "the newest good set went"
        scheduled = [found for found in order if found.birth.slot]
        assert set(map(id, scheduled[-1:])) <= set(map(id, left)), "the newest scheduled set went, and is due again"
    if good:
        assert any(found.good for found in left)
    if not plausible:
        assert not gone, "there is nothing to measure age from"
    assert set(map(id, plausible[-keep.min :] if keep.min else [])) <= set(map(id, left)), "fewer than min are left"
    if keep == Keep() or keep == Keep(min=keep.min):
        assert not gone, "no policy, and yet something went"
    good_gone = [found for found in gone if found.good]
    assert plan.many == (2 * len(good_gone) > len(plausible))
    newest_at = plausible[-1].birth.taken_at if plausible else now
    for found in gone:
        if not found.good:
            limit = reach(keep)
            assert limit is not None and (newest_at - found.birth.taken_at).total_seconds() > limit
    if keep.max_age is None and keep.max_space is None:
        # A bucket that had a good set has one still, as far as the policy looks back, and bad sets fill none.
        for name, pattern in (("daily", "%Y-%m-%d"), ("weekly", "%G-%V"), ("monthly", "%Y-%m"), ("yearly", "%Y")):
            buckets = list(dict.fromkeys(f"{f.birth.taken_at:{pattern}}" for f in reversed(plausible)))
            wanted = set(buckets[: getattr(keep, name)])
            assert wanted <= {f"{f.birth.taken_at:{pattern}}" for f in left if f in plausible}, (
                f"a {name} bucket is empty"
            )
        if any((keep.hourly, keep.daily, keep.weekly, keep.monthly, keep.yearly)):
            buckets = sum((keep.hourly, keep.daily, keep.weekly, keep.monthly, keep.yearly))
            free = [f for f in left if f in plausible and not (f.pinned or f.attachments or f.received)]
            assert len(free) <= buckets + keep.min + 8, "more stay than anything asks for"
    again = decide(left, now, keep, HERE, automatic=automatic, every=EVER)
    # Once more changes nothing, but for space: what went made room, and sizes that aren't known are no reason.
    assert kept(again) == [found.set_id for found in left], "a second run would remove more"
    later = decide(sets, now + timedelta(days=4000), keep, HERE, automatic=automatic, every=EVER)
    if not any(verdict.future for verdict in plan.verdicts):
        assert kept(later) == kept(plan), "time alone removes nothing"


def test_ten_thousand_histories(request: pytest.FixtureRequest, measured: Callable[[str], None]) -> None:
    count = 10_000 if request.config.getoption("--full") else 3_000
    seed = int(os.environ.get("SEED", "20261128"))
    removed = 0
    for number in range(count):
        chance = random.Random(f"{seed}-{number}")
        sets, now, keep = history(chance)
        automatic = chance.random() < 0.5
        try:
            hold(sets, now, keep, automatic)
        except AssertionError as error:
            raise AssertionError(f"history {seed}-{number}: {error}") from error
        removed += len(decide(sets, now, keep, HERE).removals)
    measured(f"retention: {count} random histories, 0 invariants broken, {removed} sets removed in them")
    assert removed > count


@pytest.mark.alone
def test_a_hundred_thousand_sets_in_two_seconds(measured: Callable[[str], None]) -> None:
    begin = datetime(2016, 1, 1, tzinfo=UTC)
    sets = [a_set(begin + timedelta(minutes=50 * number), number + 1) for number in range(100_000)]
    started = time.monotonic()
    plan = decide(sets, sets[-1].birth.taken_at, Keep(hourly=48, daily=31, weekly=52, monthly=120, yearly=10), HERE)
    took = time.monotonic() - started
    measured(f"retention: 100,000 sets planned in {took:.2f} s")
    assert took < 2
    assert len(plan.removals) > 99_000


def test_a_validator_keeps_seven_days() -> None:
    sets = [a_set(NOON + number * DAY, number + 1) for number in range(10)]
    plan = decide(sets, NOON + 9 * DAY, DAILY, HERE)
    assert kept(plan) == [found.set_id for found in sets[3:]]
    assert plan.verdicts[0].rule == "no bucket needs it" and plan.verdicts[3].rule == "daily 2026-11-25"
    assert not plan.many


def test_bad_sets_fill_no_bucket_and_go_by_age_alone() -> None:
    """As with a tool that pruned the last common snapshot because broken newer ones had filled its count."""
    good = [a_set(NOON + number * DAY, number + 1) for number in range(7)]
    bad = [a_set(NOON + (7 + number) * DAY, 10 + number, verify_outcome="corrupt") for number in range(30)]
    plan = decide([*good, *bad], NOON + 40 * DAY, DAILY, HERE)
    assert kept(plan) == [found.set_id for found in [*good, *bad]]
    later = [a_set(NOON + (40 + number) * DAY, 50 + number) for number in range(7)]
    plan = decide([*good, *bad, *later], NOON + 46 * DAY, DAILY, HERE)
    assert kept(plan) == [found.set_id for found in later]
    assert plan.many is False, "seven of fourteen is half, not more"


def test_a_clock_a_year_ahead_loses_nothing() -> None:
    sets = [a_set(NOON + number * DAY, number + 1) for number in range(7)]
    ahead = a_set(NOON + 370 * DAY, 8)
    wrong = decide([*sets, ahead], NOON + 370 * DAY, Keep(daily=7, max_age=Seconds(30 * 86400)), HERE)
    assert wrong.many, "while the clock is wrong that much going wants a person"
    right = decide([*sets, ahead], NOON + 6 * DAY, DAILY, HERE)
    assert not right.removals
    assert [verdict.future for verdict in right.verdicts] == [False] * 7 + [True]
    assert right.verdicts[-1].rule in ("newest good", "stamped in the future")


def test_damaged_sets_are_a_persons() -> None:
    sets = [a_set(NOON, 1, state=State.DAMAGED), *(a_set(NOON + k * DAY, k + 1) for k in range(8, 12))]
    assert not decide(sets, NOON + 12 * DAY, DAILY, HERE, automatic=True).removals
    (gone,) = decide(sets, NOON + 12 * DAY, DAILY, HERE).removals
    assert gone.found is sets[0] and "damaged" in gone.rule


def test_what_is_still_to_be_copied_stays_for_three_days() -> None:
    """Else a policy that keeps less than a copy takes would never have one."""

    def copied(found: SnapshotSet, *regions: str) -> SnapshotSet:
        return replace(found, snapshots=tuple(replace(each, copying=regions) for each in found.snapshots))

    hours = [a_set(NOON - timedelta(hours=96 - k), k) for k in range(97)]
    assert len(kept(decide(hours, NOON, Keep(hourly=2), HERE))) == 2
    plan = decide([copied(each, "eu-west-1") for each in hours], NOON, Keep(hourly=2), HERE)
    assert kept(plan) == [each.set_id for each in hours[-73:]]
    assert plan.verdicts[-10].rule == "to be copied to eu-west-1"


def test_a_scheduled_set_stays_for_later_ones_taken_by_hand() -> None:
    """Else its slot is due once more, and with quiesce = stop the node stops again by day."""
    slots = [a_set(NOON - timedelta(hours=12) + number * DAY, number + 1, slot="s") for number in range(3)]
    by_hand = [
        a_set(NOON + 2 * DAY + timedelta(hours=k), 10 + k, verify_outcome="ok", verify_level="2") for k in (0, 1)
    ]
    for keep in (Keep(daily=1), Keep(daily=7), Keep(weekly=4), Keep(max_space=Bytes(0)), Keep(max_age=Seconds(60))):
        plan = decide([*slots, *by_hand], NOON + 3 * DAY, keep, HERE, every=86400)
        assert plan.verdicts[2].keep and plan.verdicts[2].rule == "newest scheduled", keep
        assert plan.verdicts[1].keep == (keep.daily == 7), "only the newest does"
        assert plan.guards == (by_hand[1],), "it is no reason to let nothing go when it is bad"
    for every in (None, 3600):  # no schedule any more, or its slot was due again since
        assert not decide([*slots, *by_hand], NOON + 3 * DAY, Keep(daily=1), HERE, every=every).verdicts[2].keep


def test_replicas_are_nobodys_reason_to_let_go() -> None:
    """They are their senders': their space isn't ours to free, and their being there guards nothing."""
    away = [a_set(NOON + number * DAY, number + 1, received=True) for number in range(20)]
    own = [a_set(NOON + (20 + number) * DAY, 21 + number) for number in range(7)]
    keep = Keep(daily=7, max_space=Bytes(75))
    assert not decide([*away, *own], NOON + 26 * DAY, keep, HERE, automatic=True).removals
    newer = [a_set(NOON + (27 + number) * DAY, 40 + number, received=True) for number in range(7)]
    assert not decide([*own, *newer], NOON + 33 * DAY, DAILY, HERE).removals
