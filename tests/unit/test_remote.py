"""Deadlines, buckets, pollers and repeated calls, on a clock that the tests drive: what must be true of the calls made
and of the time that they took."""

from __future__ import annotations

import threading

import pytest

from snapshotter.core.errors import StorageError
from snapshotter.core.remote import (
    Clock,
    Deadline,
    Lost,
    MinuteQuota,
    Temporary,
    TokenBucket,
    operation_id,
    persist,
    poll,
)


class DrivenClock(Clock):
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return 1_800_000_000.0 + self.time

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.time += seconds


@pytest.fixture
def clock() -> DrivenClock:
    return DrivenClock()


@pytest.mark.parametrize("patience", [0.0, 0.5, 7.0, 600.0])
def test_a_poll_never_outlives_its_deadline(clock: DrivenClock, patience: float) -> None:
    looks: list[float] = []
    started = clock.now()
    with pytest.raises(StorageError, match="within") as late:
        poll(lambda: looks.append(clock.now()), Deadline(patience, clock, "vol-1"))
    assert clock.now() - started <= patience + 1e-6
    assert looks and looks[-1] - started >= patience - 1e-6, "looks once more when the time is over"
    assert late.value.cure and "vol-1" in late.value.line()
    assert len(looks) < 40, "looks ever more rarely"


def test_a_poll_ends_with_its_answer(clock: DrivenClock) -> None:
    answers = iter([None, None, "there"])
    assert poll(lambda: next(answers), Deadline(60, clock, "x")) == "there"
    assert clock.now() - 1000 < 5


def test_what_had_no_effect_is_repeated_until_the_deadline(clock: DrivenClock) -> None:
    calls = 0

    def refused() -> None:
        nonlocal calls
        calls += 1
        raise Temporary("RequestLimitExceeded", throttled=True)

    with pytest.raises(StorageError, match="RequestLimitExceeded"):
        persist(refused, Deadline(60, clock, "x"), again_after_loss=False)
    assert clock.now() - 1000 <= 60
    assert calls > 3


def test_a_lost_reply_is_repeated_only_where_it_may_be(clock: DrivenClock) -> None:
    calls = 0

    def lost() -> str:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise Lost("ReadTimeout")
        return "done"

    with pytest.raises(Lost):
        persist(lost, Deadline(60, clock, "x"), again_after_loss=False)
    assert calls == 1
    assert persist(lost, Deadline(60, clock, "x"), again_after_loss=True) == "done"


def test_a_bucket_gives_what_the_other_side_gives(clock: DrivenClock) -> None:
    bucket, deadline = TokenBucket(50, 20, clock), Deadline(3600, clock, "x")
    for _ in range(50):
        bucket.take(deadline)
    assert clock.now() == 1000, "a burst passes at once"
    for _ in range(1000):
        bucket.take(deadline)
    assert clock.now() - 1000 == pytest.approx(50, rel=0.01)


def test_a_turn_after_the_deadline_is_refused_at_once(clock: DrivenClock) -> None:
    bucket = TokenBucket(1, 0.1, clock)
    bucket.take(Deadline(5, clock, "x"))
    with pytest.raises(StorageError):
        bucket.take(Deadline(5, clock, "x"))
    assert clock.now() == 1000
    clock.sleep(10)
    bucket.take(Deadline(5, clock, "x"))  # the refused one has taken nothing


def test_a_refusal_slows_a_bucket_down_and_a_minute_heals_it(clock: DrivenClock) -> None:
    bucket, deadline = TokenBucket(50, 20, clock), Deadline(36000, clock, "x")

    def rate() -> float:
        started = clock.now()
        for _ in range(20):
            bucket.take(deadline)
        return 20 / (clock.now() - started)

    for _ in range(50):
        bucket.take(deadline)
    for _ in range(30):
        bucket.throttled()  # a burst of refusals is one
    assert 11 < rate() < 17
    for _ in range(100):
        clock.sleep(1.1)
        bucket.throttled()
    assert rate() < 3, "however little the other side gives, it is found"
    clock.sleep(61)
    for _ in range(50):
        bucket.take(deadline)
    assert rate() > 19


def test_threads_share_a_bucket(clock: DrivenClock) -> None:
    bucket, taken = TokenBucket(10, 1, clock), []

    def work() -> None:
        try:
            while True:
                bucket.take(Deadline(0, clock, "x"))
                taken.append(1)
        except StorageError:
            pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(taken) == 10


class ByTheMinute:
    """The other side: so many calls between two whole minutes."""

    def __init__(self, clock: DrivenClock, most: int) -> None:
        self.clock, self.most, self.minute = clock, most, -1
        self.passed = self.refused = self.taken = 0

    def call(self) -> bool:
        if (minute := int(self.clock.wall() // 60)) != self.minute:
            self.minute, self.taken = minute, 0
        self.taken += 1
        if self.taken > self.most:
            self.refused += 1
            return False
        self.passed += 1
        return True


def test_a_refusal_ends_the_minute_and_the_next_is_asked_for_no_more(clock: DrivenClock) -> None:
    other, quota, deadline = ByTheMinute(clock, 100), MinuteQuota(clock), Deadline(36000, clock, "x")
    started = clock.wall()
    while other.passed < 1000:
        quota.take(deadline)
        if not other.call():
            quota.throttled()
    assert other.refused <= 10, "one a minute finds out that there is no more"
    assert clock.wall() // 60 - started // 60 <= 10, "ten minutes' worth in ten minutes"


def test_after_a_refusal_nobody_asks_before_the_whole_minute(clock: DrivenClock) -> None:
    quota = MinuteQuota(clock)
    for second in (0, 1, 59):
        clock.time += 60 - clock.wall() % 60 + second
        quota.take(Deadline(600, clock, "x"))
        quota.throttled()
        before = clock.wall()
        quota.take(Deadline(600, clock, "x"))
        assert 0 < clock.wall() - before <= 61 and clock.wall() % 60 < 1
    quota.throttled()
    with pytest.raises(StorageError, match="minute"):
        quota.take(Deadline(5, clock, "x"))


def test_a_quota_that_grew_is_found(clock: DrivenClock) -> None:
    other, quota, deadline = ByTheMinute(clock, 10), MinuteQuota(clock), Deadline(1e6, clock, "x")
    for _ in range(100):
        quota.take(deadline)
        if not other.call():
            quota.throttled()
    other.most = 10_000
    started = clock.wall()
    for _ in range(10_000):
        quota.take(deadline)
        assert other.call()
    assert clock.wall() - started < 30 * 60


def test_operation_ids_are_of_the_operation() -> None:
    assert operation_id("a", "b") == operation_id("a", "b")
    assert len({operation_id("a", "b"), operation_id("ab"), operation_id("a"), operation_id("a", "b", "")}) == 4
