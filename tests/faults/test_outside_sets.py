"""Whose a set is, for a node that is seen from outside: its disks tell, whoever took it, and not its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from providers.ebs import EbsProvider, api, tags
from snapshotter import functions
from snapshotter.core.model import Hold, SnapshotSet, State, Volume, compact_time, utc_now
from snapshotter.host.places import host_name
from snapshotter.nodes import config, schedule
from snapshotter.nodes.target import target_of
from snapshotter.provider import Settings
from snapshotter.testing.harness import make_birth
from snapshotter.verbs import plan_outside
from snapshotter.verbs.session import Session
from snapshotter.verbs.status import status
from tests.twins.ec2 import Twin
from tests.unit.cloud_kit import QuickClock
from tests.unit.ebs_kit import REGION, environment
from tests.unit.upkeep_kit import CLOCKS

DAY = 86400.0


class Fleet:
    """One tagged node, n0, and a disk of another instance; what was taken of either, by whom the test says."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin
        self.disk = self.add()
        self.other = self.add()
        twin.world.retag(self.disk, {tags.NODE: "n0"})

    def add(self) -> Any:
        return self.twin.world.add_volume(self.twin.world.run_instance(), "/dev/sdf", with_bytes=False)

    def config(self) -> str:
        return "[node.n0]\npath = '/data'\nprovider = 'ebs'\nevery = '24h'\n"

    def node(self) -> config.Node:
        text = self.config() + f"select = {{volumes = ['{self.disk.id}']}}\n"
        return config.parse(text, "test").nodes["n0"]

    def slot(self) -> str:
        return compact_time(schedule.due(DAY, None, utc_now()))

    def take(self, disk: Any, **birth: Any) -> str:
        provider = EbsProvider(Settings("/nonexistent", options={"region": REGION}))
        volumes = [Volume("ebs", disk.id)]
        born = replace(make_birth(volumes), **{"node": "n0", "slot": self.slot(), **birth})
        provider.check(volumes, born)
        provider.create(volumes, born, Hold())
        provider.mark(born.set_id, {"sealed": compact_time(utc_now()), "grade": "crash"})
        return born.set_id

    def tick(self) -> list[str]:
        return list(functions.run("ebs", 60.0)["taken"])

    def problems(self) -> list[str]:
        loaded = config.parse(self.config() + f"select = {{volumes = ['{self.disk.id}']}}\n", "test")
        loaded = replace(loaded, aws=replace(loaded.aws, region=REGION), state=functions._STATE)
        (entry,) = status(Session(loaded, only="ebs"))["nodes"]
        return [problem["problem"] for problem in entry["problems"]]


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr(functions, "_STATE", str(tmp_path / "state"))
    with Twin() as twin:
        monkeypatch.setattr(EbsProvider, "clock", QuickClock(twin.clock))
        made = Fleet(twin)
        given = {
            **twin.environment(),
            "AWS_REGION": REGION,
            "AWS_LAMBDA_FUNCTION_NAME": "tick",
            "SNAPSHOTTER_RUN": str(tmp_path / "run"),
            "SNAPSHOTTER_CONFIG_TOML": made.config(),
        }
        with environment(**given):
            host_name.cache_clear()  # a function is a host of its own
            yield made
    host_name.cache_clear()


def of_another_host(fleet: Fleet) -> None:
    fleet.take(fleet.other)


def of_another_config(fleet: Fleet) -> None:
    """From outside, too: a node's name and provider are its target."""
    fleet.take(fleet.other, target=target_of(fleet.node()))


def copied_from_another_region(fleet: Fleet) -> None:
    set_id = fleet.take(fleet.disk, target=target_of(fleet.node()))
    for each in fleet.twin.world.snapshots.values():
        if each.tags[tags.SET] == set_id:
            given = {**each.tags, tags.SOURCE: "us-east-1/snap-1", tags.ORIGIN: each.volume, tags.SLOT: ""}
            fleet.twin.world.retag(each, given)
    api._shared.cache_clear()  # another run's, of which this one remembers nothing


@pytest.mark.parametrize("have", [of_another_host, of_another_config, copied_from_another_region])
def test_no_other_disks_set_fills_the_slot(fleet: Fleet, have: Callable[[Fleet], None]) -> None:
    have(fleet)
    assert len(fleet.tick()) == 1, "its own disk is taken all the same"
    assert fleet.tick() == [], "once"


@pytest.mark.parametrize("have", [of_another_host, copied_from_another_region])
def test_status_counts_no_other_disks_set(fleet: Fleet, have: Callable[[Fleet], None]) -> None:
    have(fleet)
    assert fleet.problems() == ["stale"]
    fleet.tick()
    assert fleet.problems() == []


def test_what_the_node_took_itself_is_its_own(fleet: Fleet) -> None:
    fleet.take(fleet.disk)
    assert fleet.tick() == [] and fleet.problems() == []


def test_after_its_disk_was_replaced_the_new_one_is_due_and_the_old_sets_are_still_its_own(fleet: Fleet) -> None:
    """By a swap or a restore: what was taken of the old one is kept by the same policy."""
    yesterday = utc_now() - timedelta(days=1)
    fleet.take(fleet.disk, taken_at=yesterday, slot=compact_time(schedule.due(DAY, None, yesterday)))
    old = fleet.tick()
    fleet.disk.tagged.clear()
    fleet.disk = fleet.add()
    fleet.twin.world.retag(fleet.disk, {tags.NODE: "n0"})
    assert fleet.problems() == [], "what was taken from outside is its target's"
    (new,) = fleet.tick()
    assert new not in old and fleet.tick() == [] and fleet.problems() == []


class Asked:
    """An instance that hears every command, and does nothing of it."""

    def __init__(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[list[str]] = []
        self.now = datetime(2026, 11, 22, 0, 50, tzinfo=UTC)
        for name in CLOCKS:
            monkeypatch.setattr(name, lambda: self.now)
        monkeypatch.setattr(EbsProvider, "ask", self.ask)
        monkeypatch.setenv("SNAPSHOTTER_FREEZE_BY_COMMAND", "yes")
        fleet.take(fleet.disk, taken_at=self.now - timedelta(days=1), slot="20261121t000000z")

    def ask(self, instance: str, argv: list[str]) -> str:
        self.commands.append(argv)
        return "command-1"


@pytest.fixture
def asked(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(fleet, monkeypatch)


def test_a_node_that_never_does_what_it_was_asked_is_taken_from_outside_and_told(fleet: Fleet, asked: Asked) -> None:
    assert fleet.tick() == [] and len(asked.commands) == 1
    asked.now += timedelta(hours=1)
    with pytest.raises(functions.TickFailed, match="n0: took no set, due for 110 minutes; taken from outside: s2026"):
        fleet.tick()
    assert len(asked.commands) == 1 and fleet.tick() == [], "it has its slot"
    asked.now += timedelta(hours=23)
    assert fleet.tick() == [] and len(asked.commands) == 2, "and is asked for the next"


def test_hourly_sets_too(fleet: Fleet, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hourly tick meets each slot once."""
    monkeypatch.setenv("SNAPSHOTTER_CONFIG_TOML", fleet.config().replace("24h", "1h"))
    fleet.take(fleet.disk, taken_at=asked.now, slot="20261122t000000z")
    asked.now += timedelta(hours=1)
    assert fleet.tick() == [] and len(asked.commands) == 1
    asked.now += timedelta(hours=1)
    with pytest.raises(functions.TickFailed, match="due for 110 minutes"):
        fleet.tick()


def test_where_only_the_node_reaches_the_grade_it_is_asked_again_and_told(
    fleet: Fleet, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPSHOTTER_CONFIG_TOML", fleet.config() + "require = 'filesystem'\n")
    asked.now += timedelta(hours=1)
    for _ in range(2):
        with pytest.raises(functions.TickFailed, match="due for 110 minutes, and was asked by command command-1"):
            fleet.tick()
    assert len(asked.commands) == 2


def test_a_new_node_is_taken_from_outside_at_once(fleet: Fleet, asked: Asked) -> None:
    """Nobody knows yet whether it does what it is asked."""
    fleet.twin.world.retag(fleet.other, {tags.NODE: "n1", tags.TYPE: "validator"})
    (taken,) = fleet.tick()
    assert [argv[2] for argv in asked.commands] == ["n0"] and taken


@pytest.mark.parametrize(
    ("taken", "wanted", "its"),
    [
        ("ebs:vol-1+vol-2", {"ebs:vol-2", "ebs:vol-3"}, True),  # a file system over several disks
        ("ebs:vol-1+vol-2", {"ebs:vol-12"}, False),
        ("gce:europe-west3-a/data", {"gce:europe-west3-a/data"}, True),
        ("gce:europe-west3-a/data", {"gce:data"}, True),  # as a config may say it
        ("gce:europe-west3-a/data", {"gce:europe-west3-b/data"}, False),
        ("lvm:group/data", {"gce:data"}, False),
    ],
)
def test_disks_of_both_clouds(taken: str, wanted: set[str], its: bool) -> None:
    provider, _, volume = taken.partition(":")
    birth = make_birth([Volume(provider, volume)])
    assert plan_outside.is_of(SnapshotSet(birth, (), {}, State.READY), wanted) is its
