"""What a validator has signed never goes back in time, whatever is restored, undone, run and restored again."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.in_place_kit import Story, ok, own_disk, picture, run_here
from tests.support import Command


class Validator(Story):
    """A CometBFT data path without a service: the test signs itself, as the node would."""

    def __init__(self, place: Path, home: Path) -> None:
        import plyvel

        self.place = place
        self.data = self.place / "node"
        (self.data / "data").mkdir(parents=True)
        (self.data / "config").mkdir()
        (self.data / "config" / "config.toml").write_text("")
        for name in ("state", "blockstore"):
            database = plyvel.DB(str(self.data / "data" / f"{name}.db"), create_if_missing=True)
            database.put(b"height", b"1")
            database.close()
        self.state = self.data / "data" / "priv_validator_state.json"
        self.signed = (0, 0, 0)
        self.sign(1)
        self.command = Command(
            home / "etc", config=f'[node.ours]\npath = "{self.data}"\nprofile = "cometbft"\nprovider = "copy"\n'
        )

    def sign(self, by: int) -> None:
        """As CometBFT does it: a new file, and a rename."""
        height = self.height()[0] + by if self.state.exists() else by
        new = self.state.with_suffix(".new")
        new.write_text(json.dumps({"height": str(height), "round": 0, "step": 3}))
        os.rename(new, self.state)
        self.signed = max(self.signed, self.height())

    def height(self) -> tuple[int, int, int]:
        read = json.loads(self.state.read_text())
        return int(read["height"]), int(read["round"]), int(read["step"])


YES = ("--yes", "--yes-original-is-stopped")


def test_never_lower_whatever_is_done(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A walk through the states: run, take, restore (whole, the database, none of it), undo, discard, kill."""
    full = request.config.getoption("--full")
    with own_disk(tmp_path) as disk:
        for seed in range(12 if full else 2):
            walk(Validator(disk / str(seed), tmp_path / str(seed)), random.Random(f"signing-{seed}"), 25 if full else 9)


def walk(node: Validator, chance: random.Random, steps: int) -> None:
    ok(node, "take", "ours")
    restored = False
    done: list[str] = []
    for _ in range(steps):
        after = ("run", "undo", "run", "undo", "discard", "take")
        before = ("run", "take", "whole", "whole", "database", "resync", "killed")
        act = chance.choice(after if restored else before)
        done.append(act)
        time.sleep(1.1)  # what is set aside is named by the second
        sets = [entry["set_id"] for entry in ok(node, "list", "ours")["sets"]]
        if act == "run":
            node.sign(chance.randint(1, 5))
        elif act == "take":
            ok(node, "take", "ours")
        elif act == "whole":
            ok(node, "restore", chance.choice(sets), "--in-place", *YES)
        elif act == "database":
            ok(node, "restore", chance.choice(sets), "--in-place", "--only", "database", *YES)
        elif act == "resync":
            ok(node, "resync", "ours", "--yes")
        elif act == "killed":
            code, said, _ = run_here(
                node.command, "restore", sets[0], "--in-place", *YES, kill_at=chance.randint(8, 60)
            )
            assert code in (0, -signal.SIGKILL), f"{said} after {done}"
            if code and chance.random() < 0.5:
                node.sign(2)  # the machine had gone down, and the node was started at boot
            if code:
                code, said, _ = run_here(node.command, "restore", chance.choice(["--continue", "--undo"]), "ours")
                assert code in (0, 4), said
            code, said, _ = run_here(node.command, "restore", "--undo", "ours")
            assert code in (0, 4), said
        elif act in ("undo", "discard"):
            ok(node, "restore", f"--{act}", "ours", *(["--yes"] if act == "discard" else []))
        restored = act in ("whole", "database", "resync") or (restored and act in ("run", "take"))
        assert node.state.exists(), done
        assert node.height() >= node.signed, f"{node.height()} after {done}: {node.signed} had been signed"


def journal(node: Story) -> bool:
    restores = node.command.home / "state" / "restores"
    return restores.exists() and any(restores.iterdir())


def test_without_one_on_disk_it_is_refused_and_explained(tmp_path: Path) -> None:
    with own_disk(tmp_path) as disk:
        lost(Validator(disk, tmp_path))


def lost(node: Validator) -> None:
    ok(node, "take", "ours")
    node.sign(10)
    node.state.unlink()
    before = picture(node.data)
    error = ok(node, "restore", "latest", "--in-place", *YES, code=3)
    assert "--sign-state-from-set" in f"{error['message']} {error['cure']}"
    assert picture(node.data) == before and not journal(node)
    ok(node, "restore", "latest", "--in-place", *YES, "--sign-state-from-set")
    assert node.height() == (1, 0, 3)
