"""Retention: which sets of one target stay, which go, and by which rule: pure, from (sets, now, policy). Must know no
storage, no clock and no verb.

Calendar buckets are UTC's, so summer time changes nothing. A set's age is measured from the newest good set that isn't
stamped in the future, never from the clock: where no sets are taken any more none go, and a clock that jumps ages
nothing until a set was taken under it. A bucket keeps its newest set.

The newest scheduled set stays while its slot may be the last: that it is there is how a tick knows that it was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from msgspec import Struct

from snapshotter.core.model import SnapshotSet, State
from snapshotter.host.places import same_host
from snapshotter.nodes.config import Keep
from snapshotter.nodes.values import Seconds

#: A set stamped so far ahead of the clock was taken under another one.
FUTURE = timedelta(minutes=5)
#: What goes before its copy in another region is whole is copied nowhere; for longer than this a copy doesn't take.
_COPYING = timedelta(days=3)

_HOUR, _DAY = 3600, 86400
#: Field of `Keep`, which bucket a moment falls into, its name, and how long one is at most (seconds).
_BUCKETS: tuple[tuple[str, Callable[[datetime], object], str, int], ...] = (
    ("hourly", lambda at: (at.toordinal(), at.hour), "%Y-%m-%dT%H", _HOUR),
    ("daily", datetime.toordinal, "%Y-%m-%d", _DAY),
    ("weekly", lambda at: (at.toordinal() - 1) // 7, "%G-W%V", 7 * _DAY),  # ISO weeks: day 1 was a Monday
    ("monthly", lambda at: (at.year, at.month), "%Y-%m", 31 * _DAY),
    ("yearly", lambda at: at.year, "%Y", 366 * _DAY),
)


class Verdict(Struct, frozen=True):
    """What becomes of one set, and why."""

    found: SnapshotSet
    keep: bool
    rule: str
    future: bool = False  # stamped ahead of the clock: kept, and it counts for nothing

    @property
    def set_id(self) -> str:
        return self.found.set_id


class Plan(Struct, frozen=True):
    """The verdicts, in the order of the sets. `guards`: the good sets that must still be good when the others go.
    `many`: more than half of the good sets would go, which wants a person's word."""

    verdicts: tuple[Verdict, ...]
    guards: tuple[SnapshotSet, ...]
    many: bool

    @property
    def removals(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if not verdict.keep]


def decide(
    sets: Sequence[SnapshotSet],
    now: datetime,
    keep: Keep,
    host: str,
    *,
    automatic: bool = False,
    every: float | None = None,
) -> Plan:
    """The verdict on every set of one target. `sets` are in the catalog's order (the storage's own); `host` is this
    one; `automatic`: no person has asked, so damaged sets stay too; `every`: the schedule's, in seconds."""
    moments = [found.birth.taken_at for found in sets]
    future = [moment > now + FUTURE for moment in moments]
    hosts = {name: same_host(name, host) for name in {found.birth.host for found in sets}}
    ours = [hosts[found.birth.host] for found in sets]
    # A replica is its sender's, who may remove it at any time: nothing is let go for its sake.
    good = [k for k, found in enumerate(sets) if ours[k] and found.good and not found.received]
    # By the clock, then by the storage: in this order buckets are filled. What the future holds fills none.
    plausible = sorted((k for k in good if not future[k]), key=lambda k: (moments[k], k), reverse=True)
    guards = _newest(sets, good, plausible)
    rules = {k: "newest good" for k in guards}
    rules.update((k, "newest verified") for k in guards if sets[k].verified)
    for order in (good[::-1], plausible):
        k = next((k for k in order if sets[k].birth.slot), None)
        # Of an older one a later slot is due anyway.
        if k is not None and every is not None and (now - moments[k]).total_seconds() <= 2 * every:
            rules.setdefault(k, "newest scheduled")
    for k in plausible[: keep.min]:
        rules.setdefault(k, f"min {keep.min}")
    bucketed = _buckets(plausible, moments, keep)
    newest = moments[plausible[0]] if plausible else None
    verdicts: list[Verdict] = []
    candidates = set(plausible)
    for k, found in enumerate(sets):
        stays = _stays(found, ours[k], automatic) or ("stamped in the future" if future[k] else "")
        if not stays and found.good and found.copying and newest is not None and newest - moments[k] <= _COPYING:
            stays = f"to be copied to {', '.join(found.copying)}"
        if stays or k in rules:
            candidates.discard(k)
            verdicts.append(Verdict(found, True, stays or rules[k], future[k]))
        elif newest is None:
            verdicts.append(Verdict(found, True, "nothing better is there"))
        elif k in candidates:
            verdicts.append(_of_good(found, newest - moments[k], keep, bucketed.get(k)))
        else:
            verdicts.append(_of_bad(found, newest - moments[k], keep))
    _fit(verdicts, [k for k in reversed(plausible) if k in candidates], keep)
    going = sum(not verdicts[k].keep for k in plausible)
    return Plan(tuple(verdicts), tuple(sets[k] for k in guards), many=2 * going > len(plausible))


def _newest(sets: Sequence[SnapshotSet], good: list[int], plausible: list[int]) -> list[int]:
    """The sets that never go: the newest verified good one, and the newest good one (two until one is verified). Newest
    by the storage's order and, as a clock may have been wrong or a provider changed, also by the clock's."""
    guards: list[int] = []
    for order in (good[::-1], plausible):
        verified = next((k for k in order if sets[k].verified), None)
        guards += order[: 1 if verified is not None else 2]
        guards += [] if verified is None else [verified]
    return list(dict.fromkeys(guards))


def _buckets(plausible: list[int], moments: list[datetime], keep: Keep) -> dict[int, str]:
    """Set -> the first bucket that it is the newest of."""
    held: dict[int, str] = {}
    for kind, bucket_of, name, _ in _BUCKETS:
        wanted, last = getattr(keep, kind), None
        for k in plausible if wanted else ():
            if (bucket := bucket_of(moments[k])) != last:  # they come in the clock's order
                if not wanted:
                    break
                last, wanted = bucket, wanted - 1
                held.setdefault(k, f"{kind} {moments[k]:{name}}")
    return held


def _stays(found: SnapshotSet, ours: bool, automatic: bool) -> str:
    """Why this set is none of retention's business; '' if it is."""
    if not ours:
        return "another host's"
    if found.received:
        return "a replica, or its pool was renamed"
    if found.pinned:
        return "pinned"
    if found.attachments:
        return "attached"
    if found.state in (State.PENDING, State.UNKNOWN):
        return str(found.state)
    if found.state is State.INCOMPLETE:
        return "incomplete: reap's"
    if found.state is State.DAMAGED and automatic:
        return "damaged: only a person's prune removes it"
    return ""


def _of_good(found: SnapshotSet, age: timedelta, keep: Keep, bucket: str | None) -> Verdict:
    if keep.max_age is not None and age.total_seconds() > keep.max_age:
        return Verdict(found, False, f"older than max_age {keep.max_age.text()}")
    if bucket is not None:
        return Verdict(found, True, bucket)
    if keep.hourly or keep.daily or keep.weekly or keep.monthly or keep.yearly:
        return Verdict(found, False, "no bucket needs it")
    return Verdict(found, True, "no bucket is asked for" if keep != Keep() else "no policy")


def _of_bad(found: SnapshotSet, age: timedelta, keep: Keep) -> Verdict:
    what = "corrupt" if found.corrupt else str(found.grade or "no grade")
    what = str(found.state) if found.state is State.DAMAGED else what
    limit = reach(keep)
    if limit is None:
        return Verdict(found, True, f"{what}, and no age limit")
    if age.total_seconds() > limit:
        return Verdict(found, False, f"{what}, and older than {Seconds(limit).text()}")
    return Verdict(found, True, f"{what}, but not older than {Seconds(limit).text()}")


def reach(keep: Keep) -> float | None:
    """How far back this policy looks (seconds): `max_age`, else the longest of its buckets. None: without end."""
    if keep.max_age is not None:
        return float(keep.max_age)
    return max((getattr(keep, kind) * seconds for kind, _, _, seconds in _BUCKETS), default=0) or None


def _fit(verdicts: list[Verdict], candidates: list[int], keep: Keep) -> None:
    """`max_space`: of what would stay the oldest good sets (`candidates`, oldest first) go until the rest fits. A size
    that isn't known counts as nothing; the space of bad sets counts too, that of replicas doesn't: it isn't ours to
    free."""
    if keep.max_space is None:
        return
    staying = [verdict.found for verdict in verdicts if verdict.keep and not verdict.found.received]
    used = sum(found.size_bytes or 0 for found in staying)
    for k in candidates:
        if used <= keep.max_space:
            return
        if verdicts[k].keep:
            used -= verdicts[k].found.size_bytes or 0
            verdicts[k] = Verdict(verdicts[k].found, False, f"over max_space {keep.max_space.text()}")
