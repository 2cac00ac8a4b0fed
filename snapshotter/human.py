"""What a person reads: the documents of the verbs as text, and progress on a terminal. Never parsed by anything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from snapshotter.core.errors import plain
from snapshotter.core.model import Progress

Document = Mapping[str, Any]


def size(count: int | None) -> str:
    """`1.5 GB`; powers of 1000, as disks are sold; `-` for unknown."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def span(seconds: float) -> str:
    """`3 s`, `5 min`, `2.5 h`, `7 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days"


class Meter:
    """Progress on a terminal: one line, rewritten. Bytes, rate, time left."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._what = ""
        self._started = 0.0
        self._shown = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.what != self._what:
            self._what, self._started = progress.what, now
        finished = progress.total is not None and progress.done >= progress.total
        if now - self._shown < 0.1 and not finished:
            return
        self._shown = now
        try:
            self._out.write("\r\x1b[K" + ("" if finished else self.line(progress, now - self._started)))
            self._out.flush()
        except OSError:
            pass  # the terminal has gone; the work goes on

    @staticmethod
    def line(progress: Progress, elapsed_s: float) -> str:
        """`copying: 120 MB of 1.0 GB, 240 MB/s, 4 s left`."""
        if progress.unit != "bytes":
            return f"{progress.what}: {progress.done} {progress.unit}"
        text = f"{progress.what}: {size(progress.done)}"
        if progress.total is not None:
            text += f" of {size(progress.total)}"
        if elapsed_s > 0.5 and progress.done:
            rate = progress.done / elapsed_s
            text += f", {size(round(rate))}/s"
            if progress.total is not None:
                text += f", {span((progress.total - progress.done) / rate)} left"
        return text


def brief(document: Document) -> str:
    """One set on a line."""
    pinned = " pinned" if document["pinned"] else ""
    return f"{document['set_id']} {document['node']} {document['state']} {document['grade'] or '-'}{pinned}"


def verified(document: Document) -> str:
    """What `verify` says."""
    lines = [f"{document['set_id']}: {document['outcome']} at level {document['level']}"]
    if document["level"] < document["wanted"] and document["outcome"] != "corrupt":
        lines[0] += f" (of {document['wanted']})"
    for found in document["databases"]:
        why = f": {found['why']}" if found["why"] else ""
        lines.append(f"  {found['kind']} {found['path']}: {found['outcome']} at level {found['level']}{why}")
    return "\n".join(lines)


def taken(document: Document) -> str:
    """What `take` says."""
    if "existing" not in document:
        return plan(document)
    words = [f"{document['set_id']}  {document['node']}: {document['state']}, grade {document['grade']}"]
    if document["existing"]:
        words[0] = f"{document['set_id']}  {document['node']}: this slot was taken already"
    known = document["size_bytes"] is not None
    details = [f"{size(document['size_bytes'])} of {document['path']}" if known else document["path"] or ""]
    if document["freeze_ms"] is not None:
        details.append(f"writers held {document['freeze_ms']} ms")
    if document["height"] is not None:
        details.append(f"height {document['height']}")
    words.append("  " + ", ".join(detail for detail in details if detail))
    words += [f"  left out: {link}" for link in document["left_out"]]
    return "\n".join(words)


def plan(document: Document) -> str:
    """What `take --dry-run` says."""
    lines = [
        f"would take {document['path']} (node {document['node']}, profile {document['profile']})",
        f"  quiesce {document['quiesce']}, at most {document['budget_ms']} ms; grade {document['grade']}",
    ]
    for root in document["roots"]:
        provider = next(v["provider"] for v in document["volumes"] if v["volume"] == root["volume"])
        where = f" at {root['path']}" if root["path"] else ""
        lines.append(f"  {root['origin']}: {provider} {root['volume']}{where}")
    lines += [f"  left out: {link}" for link in document["left_out"]]
    return "\n".join(lines)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def table(sets: Sequence[Document]) -> str:
    """What `list` says."""
    if not sets:
        return "no sets"
    rows = [("SET", "NODE", "TAKEN (UTC)", "STATE", "GRADE", "SIZE", "")]
    for entry in sets:
        notes = [word for word, said in (("pinned", entry["pinned"]), ("attached", entry["attachments"])) if said]
        if entry["verify_outcome"]:
            notes.append(f"verified L{entry['verify_level']}: {entry['verify_outcome']}")
        notes += [f"copied to {place}" for place in entry["replicas"]]
        if entry["replica_of"]:
            notes.append(f"copied from {entry['replica_of']}")
        rows.append(
            (
                entry["set_id"],
                entry["node"],
                entry["taken_at"].replace("T", " ").removesuffix("Z"),
                entry["state"],
                entry["grade"] or "-",
                size(entry["size_bytes"]),
                ", ".join(notes),
            )
        )
    return _columns(rows)


def details(document: Document) -> str:
    """What `show` says: every known field."""
    lines = []
    for name, value in document.items():
        if isinstance(value, list):
            shown_each = [
                " ".join(f"{k}={v}" for k, v in entry.items() if v) if isinstance(entry, dict) else entry
                for entry in value
            ]
            lines += [f"{name.removesuffix('s')}: {entry}" for entry in shown_each]
        elif value is not None:
            shown = (
                size(value) if name == "size_bytes" else ("yes" if value is True else "no" if value is False else value)
            )
            lines.append(f"{name}: {shown}")
    return "\n".join(lines)


def restored(document: Document, dry_run: bool) -> str:
    """What `restore` says."""
    verb = "would put" if dry_run else "put"
    kind = "a writable clone" if document["access"] == "rw" else "a read-only mount"
    lines = [f"{verb} {kind} of {document['set_id']} at {document['path']}"]
    lines += [f"  {root['origin']} is at {root['path']}" for root in document["roots"]]
    if not dry_run:
        lines.append(f"  end it with: snapshotter release {document['path']}")
    return "\n".join(lines)


def restored_away(document: Document) -> str:
    """What `restore --away` says."""
    lines = [f"made the volumes of {document['set_id']}"]
    for made in document["volumes"]:
        where = f", attached to {made['instance']} as {made['device']}" if made["instance"] else ", attached to nothing"
        lines.append(f"  {made['volume']}{where}")
    lines += [
        f"  {root['origin']} is {root['inside'] or 'the top'} of {document['volumes'][root['member']]['volume']}"
        for root in document["roots"]
    ]
    lines.append(f"  end it with: snapshotter release {document['attachment_id']}")
    return "\n".join(lines)


def what_is_restored(document: Document) -> str:
    """`the database of s2026...`."""
    part = {"database": "the database of ", "key": "the keys of "}.get(document["only"] or "", "")
    return f"{part}{document['set_id']}"


def _is_put(document: Document) -> str:
    path = document["path"]
    if document["only"] == "resync":
        return f"set the database at {path} aside, to sync anew"
    return f"put {what_is_restored(document)} at {path}"


def question_in_place(document: Document) -> str:
    """What is about to be done, for the question: what it is done to is named after it."""
    if document["only"] == "resync":
        return "stop it, and set its database aside, to sync anew, at"
    return f"stop it, set what is there aside, and put {what_is_restored(document)} at"


def in_place_plan(document: Document) -> str:
    """What `restore --in-place --dry-run` and `resync --dry-run` say."""
    service = document["service"]
    lines = [f"would {_is_put(document)} (node {document['node']})"]
    if service is None:
        lines.append("  no service is configured: nothing is stopped or started")
    else:
        lines.append(
            f"  stop {service}, and start it again" if document["running"] else f"  {service} is stopped, and stays so"
        )
    for root in document["roots"]:
        lines.append(f"  {root['origin']}: what is there goes to {root['aside']}")
    if document["way"] == "swap":
        lines.append("  by swap: nothing is copied")
    elif document["need_bytes"] is None:
        lines.append(f"  {size(document['free_bytes'])} are free")
    else:
        seconds = "" if document["seconds"] is None else f", about {span(document['seconds'])}"
        rate = "" if document["rate_bytes_s"] is None else f" at {size(document['rate_bytes_s'])}/s as measured"
        lines.append(
            f"  copies at most {size(document['need_bytes'])} of {size(document['free_bytes'])} free{seconds}{rate}"
        )
    if document["address"]:
        lines.append(f"  the live key is of {document['address']}")
    lines += [f"  stays as it is: {path}" for path in document["left_alone"]]
    return "\n".join(lines)


def in_place(document: Document) -> str:
    """What the verbs that change the live data say."""
    path = document["path"]
    if document["outcome"] == "undone":
        return f"undone: {path} is what it was"
    if document["outcome"] == "discarded":
        return (
            "\n".join(f"removed {gone}" for gone in document["discarded"])
            or f"nothing is set aside for {path} any more"
        )
    lines = [_is_put(document)]
    lines += [f"  the old data is at {aside}" for aside in document["aside"]]
    seen = document["seen"]
    if seen and seen["height"] is not None:
        lines.append(
            f"  the node runs, at height {seen['height']}" + (f", {seen['peers']} peers" if seen["peers"] else "")
        )
    lines.append(f"  back: {document['undo_command']}")
    lines.append(f"  when all is well: {document['discard_command']}")
    return "\n".join(lines)


def reaped(document: Document) -> str:
    """What `reap` says."""
    lines = [f"let go: {what}" for what in document["let_go"]]
    lines += [f"removed unsealed set {what}" for what in document["removed"]]
    lines += [f"removed half-made attachment {what}" for what in document["released"]]
    lines += [f"removed {what}" for what in document["scratch"]]
    lines += [f"kept {entry['set_id']}: {entry['reason']}" for entry in document["kept"]]
    return "\n".join(lines) or "nothing was left behind"


def profile(document: Document) -> str:
    """What `profile` says."""
    if "profiles" in document:
        return _columns([("PROFILE", "TITLE"), *((entry["name"], entry["title"]) for entry in document["profiles"])])
    found = document["profile"]
    lines = [f"{found['name']}: {found['title']}" + (f" ({document['why']})" if document["why"] else "")]
    for name, value in found.items():
        if name in ("name", "title") or not value:
            continue
        entries = [value] if isinstance(value, Mapping | str) else list(value)
        tables = [f"  {name}: {_flat(entry)}" for entry in entries if isinstance(entry, Mapping)]
        lines += tables or [f"  {name}: {', '.join(map(str, entries))}"]
    return "\n".join(lines)


def _flat(entry: Mapping[str, Any]) -> str:
    shown = {key: " and ".join(value) if isinstance(value, list | tuple) else value for key, value in entry.items()}
    return "; ".join(f"{key}: {value}" for key, value in shown.items() if value)


def providers(document: Document) -> str:
    """What `providers` says."""
    rows = [("PROVIDER", "HERE", "SERVES", "")]
    for entry in document["providers"]:
        serves = "-" if document["path"] is None else "yes" if entry["serves"] else "no"
        rows.append((entry["provider"], "yes" if entry["available"] else "no", serves, entry["reason"] or ""))
    head = f"{document['path']}: {document['fstype']} on {document['source']}\n" if document["path"] else ""
    tail = f"\n{document['refusal']}" if document["refusal"] else ""
    return head + _columns(rows) + tail


def schedules(entries: Sequence[Document]) -> str:
    """What `schedule` says."""
    if not entries:
        return "no nodes"
    rows = [("NODE", "EVERY", "BY", "RUNS BY ITSELF", "NEXT")]
    for entry in entries:
        every = "-" if entry["every_s"] is None else span(entry["every_s"])
        runs = "yes" if entry["active"] else f"no: {entry['why'] or 'not installed'}"
        if entry["current"] is False:
            runs += "; the config has changed since: `schedule install` again"
        rows.append((entry["node"], every, entry["kind"] or "-", runs, entry["next_at"] or "-"))
    return _columns(rows)


def status(document: Document) -> str:
    """What `status` says."""
    lines = []
    for node in document["nodes"]:
        due = "" if node["every_s"] is None else f", one is due every {span(node['every_s'])}"
        lines.append(f"{node['node']}: {'ok' if node['ok'] else 'NOT OK'}{due}")
        for name in ("newest_good", "newest_verified"):
            entry = node[name]
            said = "none"
            if entry is not None:
                level = "" if entry["verify_level"] is None else f", verified at level {entry['verify_level']}"
                said = f"{entry['set_id']}, {span(entry['age_s'])} old, grade {entry['grade']}{level}"
            lines.append(f"  {name.replace('_', ' ')}: {said}")
        counts = [f"{count} {state}" for state, count in node["sets"].items() if count]
        held = "" if node["pinned_bytes"] is None else f", {size(node['pinned_bytes'])}"
        lines.append(f"  sets: {', '.join(counts) or 'none'}{held}")
        for room in node["room"]:
            for part in room["parts"]:
                when = "" if part["full_in_s"] is None else f", full in {span(part['full_in_s'])}"
                lines.append(f"  {room['provider']} {part['name']}: {100 * part['full']:.0f} % full{when}")
        timer = node["timer"]
        if timer is not None and timer["active"]:
            lines.append(f"  timer: {timer['kind']}" + (f", next {timer['next_at']}" if timer["next_at"] else ""))
        for problem in node["problems"]:
            cure = f"; {problem['cure']}" if problem["cure"] else ""
            lines.append(f"  {problem['severity']}: {problem['message']}{cure}")
    return "\n".join(lines)


def nagios(document: Document) -> tuple[str, int]:
    """`status` as one line with performance data, and the exit code of the plugins' convention. What is unknown counts
    as less than a warning only where something is critical."""
    code = {None: 0, "warning": 1, "critical": 2, "unknown": 3}[document["worst"]]
    word = ("OK", "WARNING", "CRITICAL", "UNKNOWN")[code]
    bad = [f"{node['node']}: {entry['message']}" for node in document["nodes"] for entry in node["problems"]]
    said = "; ".join(bad) if bad else f"{len(document['nodes'])} nodes"
    data = []
    for node in document["nodes"]:
        if node["newest_good"] is not None:
            most = "" if node["every_s"] is None else f";;{1.5 * node['every_s']:.0f}"
            data.append(f"'{node['node']} age'={node['newest_good']['age_s']}s{most}")
        data += [
            f"'{node['node']} {part['name']}'={100 * part['full']:.1f}%;;{100 * part['limit']:.0f}"
            for room in node["room"]
            for part in room["parts"]
        ]
    line = f"SNAPSHOTTER {word}: " + plain(said).replace("|", "/")
    return line + (" | " + " ".join(data) if data else ""), code


def findings(document: Document) -> str:
    """What `doctor` says."""
    lines = []
    for found in document["findings"]:
        where = f"{found['node']}: " if found["node"] else ""
        cure = f"; {found['cure']}" if found["cure"] else ""
        lines.append(f"{found['severity']}: {where}{found['message']}{cure}")
    return "\n".join(lines) or "nothing was found"


def pruned(document: Document) -> str:
    """What `prune` says."""
    if not document["dry_run"]:
        return "\n".join(f"removed {brief(gone)}" for gone in document["removed"]) or "nothing was to be removed"
    rows = [
        (
            "keep" if entry["keep"] else "remove",
            entry["set_id"],
            entry["node"],
            entry["taken_at"].replace("T", " ").removesuffix("Z"),
            entry["rule"] + (", stamped in the future" if entry["future"] and "future" not in entry["rule"] else ""),
        )
        for entry in document["sets"]
    ]
    return _columns([("", "SET", "NODE", "TAKEN (UTC)", "RULE"), *rows]) if rows else "no sets"


def ticked(document: Document) -> str:
    """What `tick` says."""
    lines = []
    for entry in document["nodes"]:
        name, taken = entry["node"], entry["taken"]
        if taken is not None:
            lines.append(taken_already(taken) if taken["existing"] else f"{name}: took {taken['set_id']}")
        elif entry["busy"]:
            lines.append(f"{name}: busy: {entry['busy']}")
        elif not entry["due"]:
            lines.append(f"{name}: not due" + (f" before {entry['next_at']}" if entry["next_at"] else ", no schedule"))
        lines += [f"{name}: pending {set_id}" for set_id in entry["pending"]]
        if entry["verified"]:
            proof = entry["verified"]
            lines.append(f"{name}: {proof['set_id']} {proof['outcome']} at level {proof['level']}")
        lines += [f"{name}: removed {set_id}" for set_id in entry["removed"]]
    lines += [f"moved on {name}" for name in document["advanced"]]
    lines += [f"left for the next tick: {what}" for what in document["left"]]
    return "\n".join(lines)


def taken_already(document: Document) -> str:
    return f"{document['node']}: {document['set_id']} has this slot already"
