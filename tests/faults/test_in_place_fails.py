"""The disk is full (or the driver, the command, the journal fails) at each step of a restore in place, and of its undo:
it is undone at once, or named as incomplete and undone by the next try. Never a traceback, never a mix, never a node
left stopped without a word."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.in_place_kit import Story, difference, journals, ok, picture, run_here, story

WAYS = ["copy", *(pytest.param(kind, marks=pytest.mark.root) for kind in ("btrfs", "entries", "away"))]
#: Refused or undone; undone only in part (then what is left is named).
CODES = (3, 5, 6, 7)


def as_before(node: Story, what: str) -> None:
    now = picture(node.data)
    assert not difference(now, node.old), f"{what}: {difference(now, node.old)}"
    assert node.service.running(), f"{what}: the service doesn't run"
    assert not node.leftovers(), f"{what}: {node.leftovers()}"
    assert not journals(node), what


def failing(calls: list[str]) -> list[int]:
    """The places of what can fail; removing empty directories is only tried."""
    return [n for n, name in enumerate(calls, 1) if name.startswith("before-") and name != "before-remove_empty"]


def judged(code: int, said: str, what: str) -> None:
    assert code == 0 or code in CODES, f"{what}: exit {code}\n{said}"
    assert "Traceback" not in said, f"{what}\n{said}"
    if code == 7:
        error = json.loads(next(line for line in said.splitlines() if line.startswith("{")))["error"]
        assert error["left"], what


@pytest.mark.parametrize("kind", WAYS)
def test_a_full_disk_at_every_step(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest, measured: Callable[[str], None]
) -> None:
    chance = random.Random(kind)
    with story(kind, tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        restore = ("restore", node.set_id, *node.in_place)
        full = request.config.getoption("--full")
        calls = run_here(node.command, *restore)[2]
        undoing = run_here(node.command, "restore", "--undo", "ours")[2]
        as_before(node, "without a fault")
        ended: dict[int, int] = {}
        places = failing(calls)
        for place in places if full else sorted(chance.sample(places, 4)):
            what = f"{kind}: {calls[place - 1]} ({place}) fails"
            code, said, _ = run_here(node.command, *restore, "--json", fail_at=place)
            judged(code, said, what)
            ended[code] = ended.get(code, 0) + 1
            if journals(node):  # it had to be done all the same, or could not all be undone, or the node ran already
                ran = code == 6 and "what was restored stays" in said and node.service.running()
                assert code in (0, 7) or ran, f"{what}: exit {code}, and the journal is still there\n{said}"
                ok(node, "restore", "--undo", "ours")
            as_before(node, what)
        measured(f"restore in place by {kind}, {sum(ended.values())} faults, by exit code: {ended}")
        ended = {}
        places = failing(undoing)
        for place in places if full else sorted(chance.sample(places, 2)):
            what = f"{kind}: undo, {undoing[place - 1]} ({place}) fails"
            ok(node, *restore)
            code, said, _ = run_here(node.command, "restore", "--undo", "ours", "--json", fail_at=place)
            judged(code, said, what)
            ended[code] = ended.get(code, 0) + 1
            if code == 7 and not journals(
                node
            ):  # all is what it was, and that the service could not be started is named
                assert "stopped" in said and not node.service.running(), said
                node.service.do("start")
            if journals(node):
                if code != 7:
                    assert code and node.service.running(), f"{what}: refused, and the service doesn't run"
                ok(node, "restore", "--undo", "ours")
            as_before(node, what)
        measured(f"its undo, {sum(ended.values())} faults, by exit code: {ended}")
