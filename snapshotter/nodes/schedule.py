"""When a node is due: pure, in UTC, from `every` and `at` alone. Must know no clock, no timer and no verb.

Scheduled times are a fixed grid, so that any host, any late or repeated run comes to the same ones, and a set that has
the time as its `slot` is the one of that time. The grid begins on a Monday: a week's sets are of Mondays, unless `at`
says otherwise.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_BEGIN = datetime(1970, 1, 5, tzinfo=UTC)  # a Monday


def due(every: float, at: int | None, now: datetime) -> datetime:
    """The newest scheduled time that isn't after `now`. `every` in seconds, `at` in minutes after 00:00."""
    first = _BEGIN + timedelta(minutes=(at or 0))
    return first + timedelta(seconds=(now - first) // timedelta(seconds=every) * every)


def next_after(every: float, at: int | None, now: datetime) -> datetime:
    """The first scheduled time after `now`."""
    return due(every, at, now) + timedelta(seconds=every)
