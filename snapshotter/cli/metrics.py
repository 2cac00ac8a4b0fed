"""The document of `status` as metrics, for the textfile collector of Prometheus's node_exporter. Times are UTC unix
seconds, so that an age goes on growing when nobody writes the file any more."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from snapshotter.core.errors import PreconditionError, pip_install
from snapshotter.host.places import replace_file
from snapshotter.verbs.status import PROBLEMS


def write(document: Mapping[str, Any], path: str) -> None:
    """Replace the file at once, mode 0644: whoever reads it sees the old one or the new one. Raises
    PreconditionError."""
    replace_file(os.path.abspath(path), text(document), 0o644)


def text(document: Mapping[str, Any]) -> bytes:
    """The exposition format. Raises PreconditionError where its library isn't installed."""
    try:
        from prometheus_client import CollectorRegistry, Gauge, generate_latest
    except ImportError:
        cure = pip_install("metrics")
        raise PreconditionError("the library prometheus-client is missing", object="--prometheus", cure=cure) from None
    registry = CollectorRegistry()

    def gauge(name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"snapshotter_{name}", help, labels, registry=registry)

    checked = gauge("status_timestamp_seconds", "When this was found out")
    problem = gauge("problem", "1 if the node has this problem", "node", "problem", "severity")
    period = gauge("schedule_period_seconds", "How often a set is due", "node")
    good = gauge("newest_good_timestamp_seconds", "When the newest good set was taken", "node")
    verified = gauge("newest_verified_timestamp_seconds", "When the newest verified set was taken", "node")
    level = gauge("newest_verified_level", "The level at which that set was verified", "node")
    slot = gauge("newest_scheduled_timestamp_seconds", "When the newest scheduled set was taken", "node")
    sets = gauge("sets", "How many sets there are", "node", "state")
    pinned = gauge("pinned_bytes", "What the sets hold, as far as the storage tells", "node")
    timer = gauge("timer_active", "1 if something on this host takes the next set", "node")
    full = gauge("full_ratio", "How full a part of the storage is, 0 to 1", "node", "provider", "part")
    limit = gauge("full_limit_ratio", "Above this a take is refused", "node", "provider", "part")
    full_in = gauge("full_in_seconds", "When it is full, at the measured rate", "node", "provider", "part")
    checked.set(_unix(document["checked_at"]))
    for entry in document["nodes"]:
        name = entry["node"]
        found = {each["problem"] for each in entry["problems"]}
        for code, severity in PROBLEMS.items():
            problem.labels(name, code, severity).set(code in found)
        for newest, metric in (("newest_good", good), ("newest_verified", verified), ("newest_slot", slot)):
            if entry[newest] is not None:
                metric.labels(name).set(_unix(entry[newest]["taken_at"]))
        if entry["newest_verified"] is not None:
            level.labels(name).set(entry["newest_verified"]["verify_level"])
        if entry["every_s"] is not None:
            period.labels(name).set(entry["every_s"])
        for state, count in entry["sets"].items():
            sets.labels(name, state).set(count)
        if entry["pinned_bytes"] is not None:
            pinned.labels(name).set(entry["pinned_bytes"])
        timer.labels(name).set(entry["timer"] is not None and entry["timer"]["active"])
        for room in entry["room"]:
            for part in room["parts"]:
                where = name, room["provider"], part["name"]
                full.labels(*where).set(part["full"])
                limit.labels(*where).set(part["limit"])
                if part["full_in_s"] is not None:
                    full_in.labels(*where).set(part["full_in_s"])
    content: bytes = generate_latest(registry)
    return content


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
