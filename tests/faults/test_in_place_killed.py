"""SIGKILL of a restore in place, of its undo and of its discard at every step: --continue and --undo end in the
restored state or in the old one, byte for byte, and the service runs."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.in_place_kit import Story, difference, journals, picture, run_here, story

WAYS = ["copy", *(pytest.param(kind, marks=pytest.mark.root) for kind in ("btrfs", "entries", "away"))]


def ok(node: Story, *words: str) -> list[str]:
    code, said, calls = run_here(node.command, *words)
    assert code == 0, f"{words}: exit {code}\n{said}"
    return calls


def check(node: Story, way: str) -> None:
    """The end of every path."""
    wanted = node.of_set if way == "restored" else node.old
    now = {name: what for name, what in picture(node.data).items() if not name.startswith((".corrupted-", "made"))}
    assert not difference(now, wanted), f"not {way}: {difference(now, wanted)}"
    assert node.service.running(), f"{way}, and the service doesn't run: {node.service.did()}"
    if way == "old":
        assert not (node.data / "made-by-the-new-run").exists()
        assert not node.leftovers(), node.leftovers()
        assert not journals(node)


@pytest.mark.parametrize("kind", WAYS)
def test_killed_at_every_step(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest, measured: Callable[[str], None]
) -> None:
    chance = random.Random(kind)
    with story(kind, tmp_path) as node:
        node.begin(blocks=20)
        node.service.do("start")
        node.service.do("stop")
        node.damage()
        node.service.do("start")
        restore = ("restore", node.set_id, *node.in_place)
        calls = ok(node, *restore)
        check(node, "restored")
        undoing = ok(node, "restore", "--undo", "ours")
        check(node, "old")
        full = request.config.getoption("--full")
        points = range(1, len(calls) + 1)
        ended = {"old": 0, "restored": 0, "nothing begun": 0}
        for turn, point in enumerate(points if full else sorted(chance.sample(points, 4))):
            killed, said, seen = run_here(node.command, *restore, kill_at=point)
            if killed == 0:  # there were fewer calls than at first
                ok(node, "restore", "--undo", "ours")
                continue
            assert killed == -signal.SIGKILL, f"{point}: exit {killed}\n{said}"
            if not journals(node):
                check(node, "old")
                ended["nothing begun"] += 1
                continue
            way = ("--continue", "--undo")[turn % 2]
            code, said, _ = run_here(node.command, "restore", way, "ours", "--json")
            assert code == 0, f"{way} after a kill at {point} ({seen[-1]}): exit {code}\n{said}"
            outcome = json.loads(said.splitlines()[-1])["outcome"]
            assert outcome == ("restored" if way == "--continue" else "undone")
            check(node, "restored" if way == "--continue" else "old")
            ended["restored" if way == "--continue" else "old"] += 1
            if way == "--continue":
                ok(node, "restore", "--undo", "ours")
                check(node, "old")
        # The undo itself, killed: it can be undone and be gone on with, which is the same.
        points = range(1, len(undoing) + 1)
        for turn, point in enumerate(points if full else sorted(chance.sample(points, 2))):
            ok(node, *restore)
            (node.data / "made-by-the-new-run").write_text("x")
            killed, said, seen = run_here(node.command, "restore", "--undo", "ours", kill_at=point)
            code, said, _ = run_here(node.command, "restore", ("--continue", "--undo")[turn % 2], "ours")
            if code == 4:  # the journal had gone: all was done
                check(node, "old")
                continue
            assert code == 0, f"after a kill of the undo at {point} ({seen[-1:]}): exit {code}\n{said}"
            if journals(node):  # --continue of one that was not begun
                ok(node, "restore", "--undo", "ours")
            check(node, "old")
        measured(
            f"restore in place by {kind}, killed at {sum(ended.values())} of {len(calls)} points: {ended}; "
            f"its undo at {len(points) if full else 2} of {len(undoing)}"
        )
