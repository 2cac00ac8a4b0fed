"""What a validator has signed never goes back in time, whatever is restored, undone, run and restored again."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.in_place_kit import Story, journals, ok, own_disk, picture, run_here
from tests.support import Command, loop_file_system


class Validator(Story):
    """A CometBFT data path without a service: the test signs itself, as the node would."""

    def __init__(self, place: Path, home: Path, *, mount_point: bool = False) -> None:
        self.place = place
        self.data = self.place if mount_point else self.place / "node"
        store = f'store = "{home}/store"\n' if mount_point else ""
        (self.data / "data").mkdir(parents=True)
        (self.data / "config").mkdir()
        (self.data / "config" / "config.toml").write_text("")
        self.make_databases()
        self.state = self.data / "data" / "priv_validator_state.json"
        self.signed = (0, 0, 0)
        self.sign(1)
        self.command = Command(
            home / "etc",
            config=f'[node.ours]\npath = "{self.data}"\nprofile = "cometbft"\nprovider = "copy"\n{store}',
        )

    def make_databases(self) -> None:
        """As the node does it when it starts without."""
        import plyvel

        for name in ("state", "blockstore"):
            database = plyvel.DB(str(self.data / "data" / f"{name}.db"), create_if_missing=True)
            database.put(b"height", b"1")
            database.close()

    def sign(self, by: int) -> None:
        """As CometBFT does it: a new file, and a rename."""
        height = self.height()[0] + by if self.state.exists() else by
        new = self.state.with_suffix(".new")
        new.write_text(json.dumps({"height": str(height), "round": 0, "step": 3}))
        os.rename(new, self.state)
        self.signed = max(self.signed, self.height())

    def keys(self, letter: str) -> None:
        """As `init` makes them: of the node, and of the validator, each another letter another one."""
        for number, name in enumerate(("node_key", "priv_validator_key")):
            raw = bytes([ord(letter), number]) * 32
            key = {"type": "tendermint/PrivKeyEd25519", "value": base64.b64encode(raw).decode()}
            (self.data / "config" / f"{name}.json").write_text(json.dumps({"priv_key": key}))

    def key(self) -> str:
        value = json.loads((self.data / "config" / "priv_validator_key.json").read_text())["priv_key"]["value"]
        return chr(base64.b64decode(value)[0])

    def reset(self) -> None:
        """`unsafe-reset-all`: the keys stay."""
        self.state.write_text(json.dumps({"height": "0", "round": 0, "step": 0}))

    def height(self) -> tuple[int, int, int]:
        read = json.loads(self.state.read_text())
        return int(read["height"]), int(read["round"]), int(read["step"])


YES = ("--yes", "--yes-original-is-stopped")


@pytest.mark.parametrize("kind", ["renamed", pytest.param("entries", marks=pytest.mark.root)])
def test_never_lower_whatever_is_done(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest, measured: Callable[[str], None]
) -> None:
    """A walk through the states: run, take, restore (whole, the database, none of it), undo, discard, kill."""
    full = request.config.getoption("--full")
    walks, steps = (12, 25) if full else (2, 9)
    for seed in range(walks):
        home = tmp_path / str(seed)
        home.mkdir()
        with own_disk(home) as disk:
            chance = random.Random(f"signing-{kind}-{seed}")
            walk(Validator(disk, home, mount_point=kind == "entries"), chance, steps)
    measured(f"sign-state, {kind}: {walks} walks of {steps} steps, never lower")


def walk(node: Validator, chance: random.Random, steps: int) -> None:
    ok(node, "take", "ours")
    restored = False
    done: list[str] = []
    for _ in range(steps):
        after = ("run", "undo", "run", "undo", "discard", "take")
        before = ("run", "take", "whole", "whole", "database", "resync", "killed")
        act = chance.choice(after if restored else before)
        done.append(act)
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
            node.make_databases()
        elif act == "killed":
            part = chance.choice([(), ("--only", "database")])
            words = ("restore", sets[0], "--in-place", *part, *YES)
            code, said, _ = run_here(node.command, *words, kill_at=chance.randint(8, 80))
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

        if not restored:
            assert not node.leftovers(), f"{node.leftovers()} after {done}"


@pytest.mark.root
def test_a_discard_of_an_undo_that_can_not_be_ended_takes_the_higher_along(tmp_path: Path) -> None:
    """Some of the old data went while it was put back; the node ran on what was there, and signed; then what was
    restored takes that one's place again."""

    def unasked() -> None:
        from snapshotter.verbs.in_place_work import Work

        Work.refuse_lost = lambda _: None  # type: ignore[method-assign]

    with own_disk(tmp_path) as disk:
        node = Validator(disk, tmp_path, mount_point=True)
        (node.data / "zz").write_text("x")  # changes places behind the one with what is signed
        ok(node, "take", "ours")
        node.sign(3)
        ok(node, "restore", "latest", "--in-place", *YES)
        node.sign(3)
        (aside,) = node.data.glob(".corrupted-*")
        (aside / "zz").unlink()
        ok(node, "restore", "--undo", "ours", code=7, before=unasked)
        node.sign(3)
        ok(node, "restore", "--discard", "ours", "--yes")
        assert node.height() >= node.signed, f"{node.height()}: {node.signed} had been signed"
        assert not journals(node) and not node.leftovers()


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
    assert picture(node.data) == before and not journals(node)
    ok(node, "restore", "latest", "--in-place", *YES, "--sign-state-from-set")
    assert node.height() == (1, 0, 3)


@pytest.mark.parametrize("part", [(), ("--only", "database"), ("--only", "key")], ids=lambda part: "-".join(part))
def test_a_state_that_was_reset_is_no_record(tmp_path: Path, part: tuple[str, ...]) -> None:
    """It says less than the set, so not what was signed since: as if it were gone."""
    with own_disk(tmp_path) as disk:
        node = Validator(disk, tmp_path)
        node.keys("A")
        node.sign(4999)
        ok(node, "take", "ours")
        node.sign(1000)
        node.reset()
        before = picture(node.data)
        restore = ("restore", "latest", "--in-place", *part, *YES)
        error = ok(node, *restore, code=3)
        assert "was reset" in error["message"] and "--sign-state-from-set" in error["cure"]
        assert picture(node.data) == before and not journals(node) and not node.leftovers()
        ok(node, *restore, "--sign-state-from-set")
        assert node.height() == (5000, 0, 3)
        node.sign(7)
        ok(node, "restore", "--undo", "ours")
        assert node.height() == (5007, 0, 3) and not node.leftovers()


def made_anew(disk: Path, home: Path) -> Validator:
    """Taken as validator A; it is B since, which has signed nothing."""
    node = Validator(disk, home)
    node.keys("A")
    node.sign(4999)
    ok(node, "take", "ours")
    node.keys("B")
    node.reset()
    return node


@pytest.mark.parametrize("part", [(), ("--only", "key")], ids=["whole", "key"])
@pytest.mark.parametrize("height", [0, 5000, 9000])
def test_another_keys_state_is_no_record(tmp_path: Path, part: tuple[str, ...], height: int) -> None:
    """The node was made anew, and is another validator: nothing there tells what the set's has signed."""
    with own_disk(tmp_path) as disk:
        node = made_anew(disk, tmp_path)
        if height:
            node.sign(height)
        before = picture(node.data)
        restore = ("restore", "latest", "--in-place", *part, "--identity", "set", *YES)
        error = ok(node, *restore, code=3)
        assert "another key" in error["message"] and "--sign-state-from-set" in error["cure"]
        assert picture(node.data) == before and not journals(node) and not node.leftovers()
        ok(node, *restore, "--sign-state-from-set")
        assert node.key() == "A" and node.height() == (max(5000, height), 0, 3)
        ok(node, "restore", "--undo", "ours")
        assert node.key() == "B" and node.height() == (max(5000, height), 0, 3) and not node.leftovers()


def test_the_live_key_stays_with_its_own_state(tmp_path: Path) -> None:
    with own_disk(tmp_path) as disk:
        node = made_anew(disk, tmp_path)
        node.sign(100)
        for part in (("--identity", "live"), ("--only", "database")):
            ok(node, "restore", "latest", "--in-place", *part, *YES)
            assert node.key() == "B" and node.height() == (100, 0, 3), part
            ok(node, "restore", "--undo", "ours")
            assert node.key() == "B" and node.height() == (100, 0, 3) and not node.leftovers()


def test_a_part_leaves_a_state_that_is_damaged_beside_the_sets(tmp_path: Path) -> None:
    with own_disk(tmp_path) as disk:
        node = Validator(disk, tmp_path)
        node.keys("A")
        ok(node, "take", "ours")
        node.state.write_text("{")
        restore = ("restore", "latest", "--in-place", "--only", "key", *YES)
        ok(node, *restore, code=3)
        assert node.state.read_text() == "{"
        said = ok(node, *restore, "--sign-state-from-set")
        (kept,) = node.state.parent.glob("*.corrupted-*")
        assert node.height() == (1, 0, 3) and kept.read_text() == "{" and str(kept) in str(said["warnings"])


def test_what_was_accepted_of_a_restore_is_not_of_its_undo(tmp_path: Path) -> None:
    """The state on disk was empty after a power cut. What the node signs on the set's can't be compared to that either,
    and is all that is known of it."""
    with own_disk(tmp_path) as disk:
        node = Validator(disk, tmp_path)
        ok(node, "take", "ours")
        node.state.write_text("")
        restore = ("restore", "latest", "--in-place", *YES, "--sign-state-from-set")
        ok(node, *restore)
        ok(node, "restore", "--undo", "ours")  # nothing was signed since: there is nothing to guard
        assert node.state.read_text() == "" and not journals(node)
        ok(node, *restore)
        node.sign(499)
        assert "--sign-state-from-set" in ok(node, "restore", "--undo", "ours", code=3)["cure"]
        assert node.height() == (500, 0, 3)
        ok(node, "restore", "--undo", "ours", "--sign-state-from-set")
        assert node.state.read_text() == "" and not journals(node) and not node.leftovers()


def test_where_all_of_it_is_gone_it_is_refused_and_explained(tmp_path: Path) -> None:
    """So it is after an undo of that: what was signed meanwhile is all that is left, and the next restore finds it."""
    with own_disk(tmp_path) as disk:
        node = Validator(disk, tmp_path)
        ok(node, "take", "ours")
        node.sign(10)
        shutil.rmtree(node.data)
        error = ok(node, "restore", "latest", "--in-place", *YES, code=3)
        assert "--sign-state-from-set" in error["cure"] and not node.data.exists() and not journals(node)
        ok(node, "restore", "latest", "--in-place", *YES, "--sign-state-from-set")
        node.sign(20)
        ok(node, "restore", "--undo", "ours")
        assert node.height() == (21, 0, 3) and os.listdir(node.data) == ["data"] and not node.leftovers()
        ok(node, "restore", "latest", "--in-place", *YES, "--identity", "set")
        assert node.height() == (21, 0, 3)
        ok(node, "restore", "--undo", "ours")
        assert node.height() == (21, 0, 3)


@pytest.mark.root
@pytest.mark.parametrize("mount_point", [False, True], ids=["renamed", "entries"])
def test_never_lower_by_way_of_another_disk(
    tmp_path: Path, mount_point: bool, request: pytest.FixtureRequest, measured: Callable[[str], None]
) -> None:
    """--aside: killed anywhere, the machine started anew and the node with it, then on or back."""
    chance = random.Random("aside")
    with own_disk(tmp_path) as disk, loop_file_system("ext4", tmp_path, 100) as aside:
        node = Validator(disk, tmp_path, mount_point=mount_point)
        ok(node, "take", "ours")
        words = ("restore", "latest", "--in-place", "--aside", str(aside), *YES)
        calls = run_here(node.command, *words)[2]
        ok(node, "restore", "--undo", "ours")
        full = request.config.getoption("--full")
        points = range(1, len(calls) + 1)
        for turn, point in enumerate(points if full else sorted(chance.sample(points, 6))):
            code, said, seen = run_here(node.command, *words, kill_at=point)
            assert code in (0, -signal.SIGKILL), said
            if node.state.exists():
                node.sign(3)
            what = f"killed at {point} ({seen[-1]})"
            if journals(node):
                way = ("--continue", "--undo")[turn % 2]
                ended, said, _ = run_here(node.command, "restore", way, "ours", "--json")
                assert ended in (0, 3), f"{what}: {way} exit {ended}\n{said}"
                assert not node.state.exists() or node.height() >= node.signed, f"{what}, {way}"
                if journals(node):
                    ok(node, "restore", "--undo", "ours")
            assert node.height() >= node.signed, f"{what}: {node.height()}, {node.signed} had been signed"
            assert sorted(os.listdir(aside)) == ["lost+found"], f"{what}: {os.listdir(aside)}"
        measured(f"sign-state by way of another disk, killed at {len(points) if full else 6} of {len(calls)} points")
