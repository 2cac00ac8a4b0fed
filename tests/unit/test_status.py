"""status: each thing that is wrong is said, with its exit code and its metric; what is right is not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from snapshotter.core.model import Birth, ImageState, Member, Root, Snapshot, SnapshotSet, Space, State
from snapshotter.host.schedules import Installed
from snapshotter.nodes.config import Node, parse
from snapshotter.verbs import filling, status
from tests.support import Command, loop_file_system
from tests.systemd_kit import booted
from tests.unit.test_schedule import Inside

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
GOOD = {"sealed": "x", "grade": "filesystem"}


def node(more: str = 'every = "24h"') -> Node:
    return parse(f'[node.n]\npath = "/data"\n{more}\n', "test").nodes["n"]


def made(hours_old: float, state: State = State.READY, slot: str = "", **marks: str) -> SnapshotSet:
    at = NOW - timedelta(hours=hours_old)
    birth = Birth(
        set_id=f"s{at:%Y%m%dt%H%M%Sz}-000000", target="t", node="n", host="h-00000000", profile="generic",
        roots=(Root("/data", 0),), members=(Member("copy", "v"),), taken_at=at, deadline=at, slot=slot,
    )  # fmt: skip
    named = {**GOOD, **{name.replace("_", "-"): value for name, value in marks.items()}}
    return SnapshotSet(birth, (Snapshot("copy", "x", birth, ImageState.READY, named, 10),), named, state)


def said(of: Node, *sets: SnapshotSet) -> list[str]:
    return [problem.problem for problem in status.of_sets(of, sets, NOW)]


def test_stale_is_by_the_newest_good_set_and_its_own_schedule() -> None:
    assert said(node(), made(35, slot="s")) == []
    assert said(node(), made(37, slot="s")) == ["stale"]
    assert said(node('every = "7d"'), made(7 * 36 - 1, slot="s")) == []
    assert said(node()) == ["stale"], "no set at all"
    assert said(node("")) == [], "a node without a schedule owes none"
    assert said(node(""), made(9999)) == []
    for bad in (
        made(1, State.INCOMPLETE, slot="s"),
        made(1, State.PENDING, slot="s"),
        made(1, grade="skewed", slot="s"),
    ):
        assert said(node(), made(40), bad) == ["stale"], "what isn't good doesn't count"
    assert said(node(), made(40, slot="s"), made(1, State.DAMAGED, slot="s")) == ["stale", "damaged"]
    assert said(node(), made(40), made(1, verify_outcome="corrupt", slot="s")) == ["stale", "corrupt"]
    assert said(node(), made(40), made(1, State.UNKNOWN, slot="s")) == ["stale", "unknown"]


def test_no_tick_for_two_periods_is_said_even_if_somebody_takes_by_hand() -> None:
    assert said(node(), made(49, slot="s"), made(1)) == ["no-tick"]
    assert said(node(), made(47, slot="s"), made(1)) == []
    assert said(node(), made(47, State.INCOMPLETE, slot="s"), made(1)) == [], "it ran, whatever came of it"
    assert said(node(), made(49), made(1)) == ["no-tick"], "never, for two periods"
    assert said(node(), made(1)) == [], "a new node"


def test_a_set_from_the_future_is_neither_the_newest_nor_a_sign_of_life() -> None:
    assert said(node(), made(50, slot="s"), made(-1000, slot="s")) == ["stale", "no-tick", "ahead"]


def test_verification_has_a_schedule_of_its_own_and_a_level() -> None:
    policy = node('every = "24h"\nverify = {level = 3, every = "7d"}')

    def proven(days: float, level: str = "3") -> SnapshotSet:
        at = f"{NOW - timedelta(days=days):%Y%m%dt%H%M%Sz}".lower()
        return made(1, slot="s", verify_outcome="ok", verify_level=level, verify_at=at)

    assert said(policy, made(1, slot="s")) == ["unverified"]
    assert said(policy, proven(10)) == []
    assert said(policy, proven(11)) == ["unverified"]
    assert said(policy, proven(1, level="2")) == ["unverified"], "not at the policy's level"
    assert said(node('every = "24h"\nverify = {level = 3}'), made(1, slot="s")) == [], "only on request"


def test_where_level_1_is_asked_for_or_all_that_can_be_had_it_counts() -> None:
    def looked(level: int, profile: str = "generic", days: float = 1, said_level: str = "1") -> tuple[list[str], int]:
        policy = node(f'every = "24h"\nverify = {{level = {level}, every = "7d"}}')
        at = f"{NOW - timedelta(days=days):%Y%m%dt%H%M%Sz}".lower()
        found = made(1, slot="s", verify_outcome="ok", verify_level=said_level, verify_at=at)
        found = replace(found, birth=replace(found.birth, profile=profile))
        notes = status.unproven(policy, [found], NOW, {"generic"})
        return [problem.problem for problem in status.of_sets(policy, [found], NOW, {"generic"})], len(notes)

    assert looked(1) == looked(1, "besu") == ([], 0), "the policy asks for no more"
    assert looked(2) == looked(4) == ([], 1), "no known database: there is no more, and it is said"
    assert looked(2, days=11) == (["unverified"], 1)
    assert looked(2, "besu") == (["unverified"], 0), "it has a database, or would be corrupt"
    assert looked(2, said_level="0") == (["unverified"], 0)
    assert looked(2, said_level="2") == ([], 0)


def test_a_timer_is_missed_unless_a_function_takes_the_sets() -> None:
    def timer(found: Installed | None, *sets: SnapshotSet, of: Node | None = None) -> list[str]:
        return [problem.problem for problem in status.of_timer(of or node(), sets, found, NOW)]

    assert timer(None) == ["no-timer"]
    assert timer(Installed("n", "systemd", (), True)) == []
    assert timer(Installed("n", "systemd", (), False, "it is inactive")) == ["no-timer"]
    (problem,) = status.of_timer(node(), [], Installed("n", "cron", (), False, "no cron daemon runs"), NOW)
    assert "install" not in problem.cure.split(",")[0] and "cron daemon" in problem.cure
    assert timer(None, of=node("")) == []
    assert timer(None, made(1, slot="s")) == ["no-timer"], "copy can only be taken on this host"
    away = made(1, slot="s")
    assert timer(None, of=node('every = "24h"\nselect = {volumes = ["vol-1"]}')) == []
    birth = Birth(**{**{f: getattr(away.birth, f) for f in Birth.__struct_fields__}, "members": (Member("ebs", "v"),)})
    ebs = SnapshotSet(birth, away.snapshots, away.marks, State.READY)
    assert timer(None, ebs) == [], "a cloud function's"


def room(free: int, detail: dict[str, int] | None = None, samples: filling.Samples | None = None, at: float = 0.0):  # type: ignore[no-untyped-def]
    space = Space(total_bytes=1000, free_bytes=free, detail=detail or {})
    return filling.judge(node(), "lvm", space, {} if samples is None else samples, at)


def test_full_is_the_nodes_floor_for_room_and_nine_tenths_for_metadata() -> None:
    def problems(found: filling.Room) -> list[str]:
        return [problem.problem for problem in status.of_rooms(node(), [found])]

    assert problems(room(101)) == [] and problems(room(99)) == ["full"]
    assert problems(room(900, {"vg/pool metadata percent": 91})) == ["full"]
    assert problems(room(900, {"vg/s copy-on-write percent": 95, "bytes free": 1})) == ["full"]
    samples: filling.Samples = {}
    assert problems(room(500, samples=samples)) == []
    # A tenth of it in a day: the other 40 % last four days.
    later = room(400, samples=samples, at=86400.0)
    assert later.parts[0].full_in_s == pytest.approx(4 * 86400)
    assert problems(later) == ["filling"]


def test_a_rate_needs_an_hour_and_forgets_the_future_and_what_is_old() -> None:
    samples: filling.Samples = {}
    room(900, samples=samples)
    assert room(100, samples=samples, at=3000.0).parts[0].full_in_s is None
    assert room(950, samples=samples, at=90000.0).parts[0].full_in_s is None, "it empties"
    name = next(iter(samples))
    samples[name] = [(1e12, 0.0), (5.0, 0.0)]
    assert room(500, samples=samples, at=filling.KEPT_S * 2).parts[0].full_in_s is None
    assert samples[name] == [(filling.KEPT_S * 2, 0.5)]
    for k in range(3):
        room(500, samples=samples, at=filling.KEPT_S * 2 + k)
    assert len(samples[name]) == 1, "not one for every look"


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path: Path) -> Command:
    data = tmp_path / "node"
    data.mkdir()
    (data / "file").write_text("content")
    return Command(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\nfloor = "0.1%"\n')


def schedule(command: Command, every: str) -> None:
    with open(command.config, "a") as file:
        file.write(f'every = "{every}"\n')


def look(command: Command, exit_code: int) -> tuple[dict[str, Any], set[str]]:
    """The document, and the problems that metrics, JSON and Nagios agree on."""
    prom = command.home / "n.prom"
    done = command.run("status", "--json", "--prometheus", str(prom))
    assert done.returncode == exit_code, done.stdout + done.stderr
    document = json.loads(done.stdout)
    of_json = {problem["problem"] for problem in document["nodes"][0]["problems"]}
    assert prom.stat().st_mode & 0o777 == 0o644
    samples = [sample for family in text_string_to_metric_families(prom.read_text()) for sample in family.samples]
    of_metrics = {s.labels["problem"] for s in samples if s.name == "snapshotter_problem" and s.value == 1}
    assert of_metrics == of_json
    nagios = command.run("status", "--nagios")
    severities = {problem["severity"] for problem in document["nodes"][0]["problems"]}
    wanted = 2 if "critical" in severities else 3 if "unknown" in severities else 1 if severities else 0
    assert nagios.returncode == wanted and nagios.stdout.count("\n") == 1
    assert nagios.stdout.startswith(("SNAPSHOTTER OK", "SNAPSHOTTER WARNING", "SNAPSHOTTER CRITICAL", "SNAPSHOTTER UN"))
    return document, of_json


def age(command: Command, set_id: str, seconds: int) -> None:
    """Make a set of the copy provider older than it is, in its record."""
    record = command.home.parent / ".snapshotter" / "sets" / set_id / "birth.json"
    content = json.loads(record.read_text())
    content["at"] -= seconds
    record.write_text(json.dumps(content, separators=(",", ":")))


def test_a_node_without_a_schedule_is_well(command: Command) -> None:
    document, problems = look(command, 0)
    assert problems == set() and document["worst"] is None
    taken = command.json("take", "n")
    document, problems = look(command, 0)
    assert document["nodes"][0]["newest_good"]["set_id"] == taken["set_id"]
    assert document["nodes"][0]["room"][0]["parts"][0]["name"] == "space"


def test_stale_without_a_timer_and_without_a_tick(command: Command) -> None:
    schedule(command, "24h")
    assert look(command, 8)[1] == {"stale", "no-timer"}
    taken = command.json("take", "n", "--slot", "n-1")
    assert look(command, 8)[1] == {"no-timer"}
    age(command, taken["set_id"], 40 * 3600)
    document, problems = look(command, 8)
    assert problems == {"stale", "no-timer"}
    assert document["nodes"][0]["newest_good"]["age_s"] >= 40 * 3600
    age(command, taken["set_id"], 10 * 3600)
    assert look(command, 8)[1] == {"stale", "no-timer", "no-tick"}
    human = command.run("status", "n")
    assert human.returncode == 8 and "snapshotter schedule install n" in human.stdout


def test_files_of_no_known_database_are_verified_as_far_as_can_be(command: Command) -> None:
    with open(command.config, "a") as file:
        file.write('verify = {level = 3, every = "7d"}\n')
    set_id = command.json("take", "n")["set_id"]
    assert look(command, 8)[1] == {"unverified"}
    assert command.json("verify", "n")["level"] == 1, "as the cure says"
    document, problems = look(command, 0)
    assert problems == set() and document["nodes"][0]["newest_verified"] is None
    (warning,) = document["warnings"]
    assert set_id in warning and "nothing was proven" in warning


def test_damaged_and_corrupt(command: Command) -> None:
    first = command.json("take", "n")["set_id"]
    command.json("take", "n")
    shutil.rmtree(command.home.parent / ".snapshotter" / "sets" / first / "0")
    document, problems = look(command, 8)
    assert problems == {"damaged"} and document["nodes"][0]["sets"]["damaged"] == 1
    command.run("delete", first, "--yes")
    assert look(command, 0)[1] == set()
    last = command.json("take", "n")["set_id"]
    marks = command.home.parent / ".snapshotter" / "sets" / last / "marks.json"
    content = json.loads(marks.read_text())
    content["marks"] |= {"verify-outcome": "corrupt", "verify-level": "3"}
    marks.write_text(json.dumps(content))
    document, problems = look(command, 8)
    assert problems == {"corrupt"} and document["nodes"][0]["newest_good"]["set_id"] != last


def test_a_path_that_is_gone_is_what_the_next_take_fails_of(command: Command) -> None:
    command.json("take", "n")
    os.rename(command.home.parent / "node", command.home.parent / "moved")
    document, problems = look(command, 8)
    assert problems == {"no-take"}
    assert document["nodes"][0]["newest_good"] is not None, "its sets are found all the same"


@pytest.mark.parametrize(
    ("more", "emptied"), [('quiesce = "stop"\nunit = "no-such-thing-here.service"\n', False), ("", True)]
)
def test_what_the_next_take_is_refused_for(command: Command, more: str, emptied: bool) -> None:
    command.json("take", "n")
    with open(command.config, "a") as file:
        file.write(more)
    if emptied:  # as when its disk isn't mounted
        os.unlink(command.home.parent / "node" / "file")
    refused = command.error("take", "n", "--dry-run", exit_code=3)
    document, problems = look(command, 8)
    assert problems == {"no-take"} and document["nodes"][0]["room"], "how full it is, is said all the same"
    assert refused["message"] in document["nodes"][0]["problems"][0]["message"]
    assert command.error("take", "n", exit_code=3)["message"] == refused["message"]


@pytest.mark.root
@pytest.mark.parametrize("kind", ["btrfs", "ext4"])
def test_a_full_file_system(tmp_path: Path, kind: str, measured: Any) -> None:
    with loop_file_system(kind, tmp_path, megabytes=200) as point:
        data = point / "node"
        data.mkdir()
        (data / "file").write_bytes(b"x" * 1000)
        command = Command(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\n')
        command.json("take", "n")
        assert look(command, 0)[1] == set()
        room = command.json("status")["nodes"][0]["room"][0]
        with open(point / "ballast", "wb") as file:
            file.write(os.urandom(room["free_bytes"] - room["total_bytes"] // 20))
            os.fsync(file.fileno())
        document, problems = look(command, 8)
        assert problems == {"full"}
        assert document["nodes"][0]["room"][0]["provider"] == ("btrfs" if kind == "btrfs" else "copy")
        # It says what take says.
        os.unlink(data / "file")
        (data / "file").write_bytes(b"y")
        assert command.run("take", "n").returncode == 3


def test_the_rate_is_from_earlier_looks(command: Command) -> None:
    command.json("status")
    cache = command.home / "state" / "room.json"
    samples = json.loads(cache.read_text())
    name = next(iter(samples))
    full = samples[name][0][1]
    samples[name] = [[samples[name][0][0] - 3 * 86400, full / 2]]
    cache.write_text(json.dumps(samples))
    document, problems = look(command, 8)
    assert problems == {"filling"}
    expected = (1 - full) / (full / 2) * 3 * 86400
    assert document["nodes"][0]["room"][0]["parts"][0]["full_in_s"] == pytest.approx(expected, rel=0.1)
    cache.write_text("not json")
    assert look(command, 0)[1] == set(), "a cache"


def test_nagios_says_unknown_of_what_it_can_not_ask(command: Command) -> None:
    command.config.write_text("nonsense = 1\n")
    done = command.run("status", "--nagios")
    assert done.returncode == 3 and done.stdout.startswith("SNAPSHOTTER UNKNOWN") and done.stdout.count("\n") == 1
    assert command.run("status", "--nagios", "--json").returncode == 2


def test_a_file_that_can_not_be_written_leaves_the_old_one(command: Command, tmp_path: Path) -> None:
    assert "No such file" in command.error("status", "--prometheus", "/nowhere/at/all", exit_code=3)["message"]
    elsewhere = tmp_path / "precious"
    elsewhere.write_text("x")
    (tmp_path / "link").symlink_to(elsewhere)
    assert command.run("status", "--prometheus", str(tmp_path / "link")).returncode == 0
    assert elsewhere.read_text() == "x", "a link is replaced, not written through"
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".new")]


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Inside]:
    data = tmp_path / "node"
    data.mkdir()
    (data / "file").write_text("content")
    with booted(tmp_path) as systemd:
        found = Inside(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\nevery = "24h"\n')
        found.systemd = systemd
        yield found


@pytest.mark.root
def test_with_its_timer_a_node_is_well_and_without_it_is_not(inside: Inside) -> None:
    inside.json("take", "n", "--slot", "n-1")
    assert look(inside, 8)[1] == {"no-timer"}
    inside.json("schedule", "install")
    document, problems = look(inside, 0)
    assert problems == set()
    assert document["nodes"][0]["timer"]["kind"] == "systemd" and document["nodes"][0]["timer"]["next_at"]
    inside.systemd.enter("systemctl", "stop", "snapshotter-n.timer")
    document, problems = look(inside, 8)
    assert problems == {"no-timer"} and "inactive" in document["nodes"][0]["problems"][0]["message"]
