"""Scheduled times are a grid: the same for everybody, however late."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

from snapshotter.nodes.schedule import due, next_after

DAY, WEEK = 86400, 7 * 86400


def test_a_day_and_a_week() -> None:
    sunday = datetime(2026, 11, 22, 1, 59, tzinfo=UTC)
    assert due(DAY, 120, sunday) == datetime(2026, 11, 21, 2, tzinfo=UTC)
    assert due(DAY, 120, sunday + timedelta(minutes=1)) == datetime(2026, 11, 22, 2, tzinfo=UTC)
    assert due(WEEK, 120, sunday) == datetime(2026, 11, 16, 2, tzinfo=UTC), "a Monday"
    assert next_after(WEEK, None, sunday) == datetime(2026, 11, 23, tzinfo=UTC)
    assert due(900, 7, sunday) == datetime(2026, 11, 22, 1, 52, tzinfo=UTC)


def test_always_the_newest_that_is_not_to_come() -> None:
    chance = random.Random(1)
    for _ in range(5000):
        every = chance.choice([60, 300, 3600, 5 * 3600, DAY, WEEK, 30 * DAY, 366 * DAY, 61])
        at = chance.choice([None, 0, 120, 1439])
        now = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=chance.randrange(100 * 366 * DAY))
        slot = due(every, at, now)
        assert slot <= now < next_after(every, at, now) == slot + timedelta(seconds=every)
        assert due(every, at, slot) == slot and due(every, at, slot + timedelta(seconds=every)) > slot
