"""docs/json.md: every command has its row, every answer its shape, and the checker does find what is wrong.

That real answers are as the page says is checked by `support.Command` in every test that runs a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snapshotter.cli import COMMANDS
from tests.json_kit import page
from tests.support import Command


def test_every_command_has_a_row_and_every_row_a_shape() -> None:
    assert {row[0] for row in page().commands} == set(COMMANDS)
    assert set(page().commands.values()) <= set(page().shapes)


def test_the_documents_of_a_tour(tmp_path: Path) -> None:
    """Each command once, so that this file alone can be run after a change of the page."""
    data = tmp_path / "node"
    data.mkdir()
    (data / "file").write_text("x")
    command = Command(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\nfloor = "0.1%"\n')
    command.json("take", "n", "--dry-run")
    command.json("take", "--all", "--dry-run")
    identity = command.json("take", "n")["set_id"]
    command.json("take", "--all")
    command.json("list")
    command.json("show", identity)
    command.json("pin", identity)
    command.json("unpin", identity)
    command.json("verify", identity, "--level", "1")
    command.json("restore", identity, "--to", str(tmp_path / "clone"), "--dry-run")
    command.json("restore", identity, "--to", str(tmp_path / "clone"))
    command.json("show", identity)
    command.json("release", str(tmp_path / "clone"))
    command.json("restore", identity, "--in-place", "--dry-run")
    command.json("restore", identity, "--in-place", "--yes")
    command.json("restore", "--undo", "n")
    command.json("restore", identity, "--in-place", "--yes")
    command.json("restore", "--discard", "n", "--yes")
    command.json("status")
    command.run("doctor", "--json")
    command.json("schedule", "show")
    command.json("schedule", "remove", "--all")
    (tmp_path / "other").mkdir()
    command.json("init", str(tmp_path / "other"))
    command.json("profile")
    command.json("profile", "besu")
    command.json("profile", "n")
    command.json("providers")
    command.json("providers", "n")
    command.json("prune", "--dry-run")
    command.json("prune", "--yes")
    command.json("tick")
    command.json("reap")
    command.json("delete", identity, "--yes", "--last")
    command.error("show", "s1", exit_code=4)
    answer = json.loads(command.run("doctor", "--json").stdout)
    assert answer.pop("schema") == 1 and page().errors("Doctor", answer) == []


def test_the_checker_finds_what_is_wrong() -> None:
    right = {"provider": "zfs", "reason": "no"}
    assert page().errors("Unavailable", right) == []
    assert page().errors("Unavailable", {**right, "more": 1}) == ["Unavailable.more is not documented"]
    assert page().errors("Unavailable", {"provider": "zfs"}) == ["Unavailable.reason is missing"]
    assert page().errors("Unavailable", {**right, "reason": None}) == ["Unavailable.reason is None, not string"]
    schedule = {"node": "n", "every_s": 1, "at": None, "kind": "systemd", "files": [], "current": None, "active": True}
    schedule |= {"why": None, "next_at": None}
    assert page().errors("Schedule", schedule) == []
    for key, value in (("every_s", 1.5), ("every_s", True), ("kind", "at"), ("files", [1]), ("active", "yes")):
        assert len(page().errors("Schedule", {**schedule, key: value})) == 1, key
    assert page().errors("Schedules", {"schedules": [{**schedule, "node": 1}]}) == [
        "Schedules.schedules[0].node is 1, not string"
    ]


@pytest.mark.parametrize("words", [["restore", "x", "--in-place", "--dry-run"], ["resync", "--dry-run", "n"]])
def test_the_row_that_fits_best_is_meant(words: list[str]) -> None:
    assert page().name_of(words) == "InPlacePlan" and page().name_of(["restore", "x", "--to", "d"]) == "Restored"
