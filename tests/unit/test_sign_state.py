"""What was signed never goes back in time: by content, whichever way data moves, or it is refused."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from snapshotter.core.errors import PreconditionError
from snapshotter.nodes import profiles, sign_state
from snapshotter.nodes.sign_state import Order

COMETBFT = profiles.get("cometbft")
LIGHTHOUSE = profiles.get("lighthouse")
STATE = "data/priv_validator_state.json"
DATABASE = "validators/slashing_protection.sqlite"
A, B = "0x" + "aa" * 48, "0x" + "bb" * 48


def cometbft(top: Path, height: int, round_: int = 0, step: int = 3, signbytes: str | None = None) -> Path:
    (top / "data").mkdir(parents=True, exist_ok=True)
    state = {"height": str(height), "round": round_, "step": step}
    if height:
        state |= {"signature": "c2ln", "signbytes": signbytes or f"{height:08X}{round_:02X}{step:02X}"}
    (top / STATE).write_text(json.dumps(state))
    return top


def lighthouse(top: Path, signed: dict[str, tuple[list[int], list[tuple[int, int]]]], wal: bool = False) -> Path:
    """{key: (slots, [(source, target)])} in Lighthouse's tables. `wal`: the rows are only in the log."""
    path = top / DATABASE
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name("making")
    database = sqlite3.connect(made)
    if wal:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA wal_autocheckpoint=0")
    database.executescript(
        "CREATE TABLE validators (id INTEGER PRIMARY KEY, public_key BLOB NOT NULL UNIQUE);"
        "CREATE TABLE signed_blocks (validator_id INTEGER NOT NULL, slot INTEGER NOT NULL, signing_root BLOB NOT NULL,"
        " UNIQUE (validator_id, slot));"
        "CREATE TABLE signed_attestations (validator_id INTEGER, source_epoch INTEGER NOT NULL,"
        " target_epoch INTEGER NOT NULL, signing_root BLOB NOT NULL, UNIQUE (validator_id, target_epoch));"
    )
    if wal:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for number, (key, (slots, votes)) in enumerate(signed.items(), 1):
        database.execute("INSERT INTO validators VALUES (?, ?)", (number, key))
        database.executemany("INSERT INTO signed_blocks VALUES (?, ?, x'00')", [(number, slot) for slot in slots])
        database.executemany(
            "INSERT INTO signed_attestations VALUES (?, ?, ?, x'00')",
            [(number, source, target) for source, target in votes],
        )
    database.commit()
    for suffix in ("", "-wal"):
        if os.path.exists(f"{made}{suffix}"):
            shutil.copyfile(f"{made}{suffix}", f"{path}{suffix}")
    database.close()
    for suffix in ("", "-wal", "-shm"):
        Path(f"{made}{suffix}").unlink(missing_ok=True)
    return top


def interchange(top: Path, signed: dict[str, tuple[list[int], list[tuple[int, int]]]], chain: str = "0x04") -> Path:
    document = {
        "metadata": {"interchange_format_version": "5", "genesis_validators_root": chain},
        "data": [
            {
                "pubkey": key,
                "signed_blocks": [{"slot": str(slot)} for slot in slots],
                "signed_attestations": [{"source_epoch": str(s), "target_epoch": str(t)} for s, t in votes],
            }
            for key, (slots, votes) in signed.items()
        ],
    }
    (top / DATABASE).parent.mkdir(parents=True, exist_ok=True)
    (top / DATABASE).write_text(json.dumps(document))
    return top


def order(live: Path, incoming: Path, profile: profiles.Profile = COMETBFT, **more: Any) -> Order:
    (found,) = sign_state.compare(str(live), str(incoming), profile, **more)
    assert found.why
    return found.order


def content(top: Path) -> dict[str, bytes]:
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


# CometBFT.


@pytest.mark.parametrize(
    ("live", "incoming", "expected"),
    [
        ((10, 0, 3), (10, 0, 3), Order.EQUAL),
        ((0, 0, 0), (0, 0, 0), Order.EQUAL),
        ((11, 0, 1), (10, 5, 3), Order.HIGHER),  # the height counts before round and step
        ((10, 1, 1), (10, 0, 3), Order.HIGHER),
        ((10, 0, 3), (10, 0, 2), Order.HIGHER),
        ((9, 0, 3), (10, 0, 1), Order.LOWER),
        ((9, 0, 3), (10, 0, 3), Order.LOWER),  # as numbers, not as text
        ((2**63, 0, 0), (2**63 - 1, 9, 3), Order.HIGHER),
    ],
)
def test_height_round_step(tmp_path: Path, live: Any, incoming: Any, expected: Order) -> None:
    a, b = cometbft(tmp_path / "a", *live), cometbft(tmp_path / "b", *incoming)
    os.utime(b / STATE, (2**31, 2**31))  # time stamps tell nothing
    assert order(a, b) is expected
    before = content(a), content(b)
    notes = sign_state.carry_higher(str(a), str(b), COMETBFT)
    assert content(a) == before[0]
    assert bool(notes) is (expected is Order.HIGHER)
    assert order(a, b) in (Order.EQUAL, Order.LOWER)
    assert content(b)[STATE] == (before[0] if expected is Order.HIGHER else before[1])[STATE]
    if notes:
        assert stat.S_IMODE((b / STATE).stat().st_mode) == 0o600 and str(live[0]) in notes[0]
    assert sign_state.carry_higher(str(a), str(b), COMETBFT) == [], "a second call has nothing left to do"


def test_the_same_height_but_not_the_same_block(tmp_path: Path) -> None:
    a, b = cometbft(tmp_path / "a", 10, signbytes="AA"), cometbft(tmp_path / "b", 10, signbytes="BB")
    assert order(a, b) is Order.UNORDERED


def test_old_tendermint_wrote_the_round_as_text(tmp_path: Path) -> None:
    a, b = cometbft(tmp_path / "a", 10), cometbft(tmp_path / "b", 9)
    (a / STATE).write_text('{"height": "10", "round": "0", "step": 3}')
    assert order(a, b) is Order.HIGHER


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\0" * 300,
        b"{",
        b"[]",
        b"null",
        b'{"height": "x"}',
        b'{"height": "-1", "round": 0, "step": 0}',
        b"[" * 99999,
    ],
)
def test_a_damaged_one_is_refused_in_either_place(tmp_path: Path, damaged: bytes) -> None:
    a, b = cometbft(tmp_path / "a", 10), cometbft(tmp_path / "b", 9)
    (a / STATE).write_bytes(damaged)
    for live, incoming in ((a, b), (b, a)):
        before = content(live), content(incoming)
        assert order(live, incoming) is Order.UNORDERED
        with pytest.raises(PreconditionError) as caught:
            sign_state.carry_higher(str(live), str(incoming), COMETBFT)
        assert "--sign-state-from-set" in caught.value.cure and "dangerous" in caught.value.cure
        assert (content(live), content(incoming)) == before
        assert sign_state.carry_higher(str(live), str(incoming), COMETBFT, from_set=True)
        assert (content(live), content(incoming)) == before


def test_none_on_disk_is_refused_unless_the_operator_says_so(tmp_path: Path) -> None:
    b = cometbft(tmp_path / "b", 10)
    for live in (tmp_path / "gone", tmp_path / "empty"):
        if live.name == "empty":
            live.mkdir()
        assert order(live, b) is Order.ABSENT
        with pytest.raises(PreconditionError, match="none on disk") as caught:
            sign_state.carry_higher(str(live), str(b), COMETBFT)
        assert "--sign-state-from-set" in caught.value.line()
        sign_state.carry_higher(str(live), str(b), COMETBFT, from_set=True)
        assert json.loads((b / STATE).read_text())["height"] == "10"


def test_from_set_never_lowers_what_can_be_ordered(tmp_path: Path) -> None:
    a, b = cometbft(tmp_path / "a", 11), cometbft(tmp_path / "b", 10)
    sign_state.carry_higher(str(a), str(b), COMETBFT, from_set=True)
    assert json.loads((b / STATE).read_text())["height"] == "11"


def test_a_set_without_one_gets_the_live_one(tmp_path: Path) -> None:
    a, b = cometbft(tmp_path / "a", 11), tmp_path / "b"
    b.mkdir()
    assert order(a, b) is Order.HIGHER
    sign_state.carry_higher(str(a), str(b), COMETBFT)
    assert content(b) == content(a)


def test_neither_has_one_or_the_profile_knows_none(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert sign_state.compare(str(tmp_path / "a"), str(tmp_path / "b"), COMETBFT) == []
    assert sign_state.compare(str(cometbft(tmp_path / "a", 1)), str(tmp_path / "b"), profiles.get("besu")) == []


@pytest.mark.root
def test_the_owner_goes_along(tmp_path: Path) -> None:
    a, b = cometbft(tmp_path / "a", 11), cometbft(tmp_path / "b", 10)
    os.chown(a / STATE, 4711, 4712)
    sign_state.carry_higher(str(a), str(b), COMETBFT)
    assert ((b / STATE).stat().st_uid, (b / STATE).stat().st_gid) == (4711, 4712)


def test_a_hard_link_in_the_store_keeps_what_it_had(tmp_path: Path) -> None:
    a, b = cometbft(tmp_path / "a", 11), cometbft(tmp_path / "b", 10)
    os.link(b / STATE, tmp_path / "store")
    sign_state.carry_higher(str(a), str(b), COMETBFT)
    assert json.loads((tmp_path / "store").read_text())["height"] == "10"


# Of a restore the set's says nothing new.


A_AND_B = sign_state.Keys(live="BB", of_set="AA")


@pytest.mark.parametrize(
    ("live", "incoming", "keys", "refused", "then"),
    [
        (0, 10, sign_state.Keys(), True, 10),  # reset
        (9, 10, sign_state.Keys("AA", "AA"), True, 10),
        (10, 10, sign_state.Keys("AA", "AA"), False, 10),
        (11, 10, sign_state.Keys("AA", "AA"), False, 11),
        (11, 10, sign_state.Keys("", "AA"), False, 11),  # the key on disk is gone
        (0, 0, A_AND_B, True, 0),
        (0, 10, A_AND_B, True, 10),
        (11, 10, A_AND_B, True, 11),  # another's: whether it is high enough can't be told; nor is it ever lowered
        (5, 10, sign_state.Keys("BB", "AA", live_stays=True), False, 5),
        (11, 10, sign_state.Keys("BB", "AA", live_stays=True), False, 11),
        (5, 10, sign_state.Keys("AA", "AA", live_stays=True), True, 10),
    ],
)
def test_a_live_one_below_the_sets_or_of_another_key_tells_nothing(
    tmp_path: Path, live: int, incoming: int, keys: sign_state.Keys, refused: bool, then: int
) -> None:
    a, b = cometbft(tmp_path / "a", live), cometbft(tmp_path / "b", incoming)
    before = content(a), content(b)
    if refused:
        with pytest.raises(PreconditionError) as caught:
            sign_state.carry_higher(str(a), str(b), COMETBFT, keys=keys)
        assert "--sign-state-from-set" in caught.value.cure and (content(a), content(b)) == before
    assert bool(sign_state.carry_higher(str(a), str(b), COMETBFT, keys=keys, from_set=refused)) is (
        refused or live != incoming
    )
    assert json.loads((b / STATE).read_text())["height"] == str(then) and content(a) == before[0]


def test_slashing_protection_made_anew_tells_nothing(tmp_path: Path) -> None:
    a, b = lighthouse(tmp_path / "a", {}), lighthouse(tmp_path / "b", HISTORY)
    with pytest.raises(PreconditionError, match="was reset"):
        sign_state.carry_higher(str(a), str(b), LIGHTHOUSE, keys=sign_state.Keys())


def test_an_entry_that_is_elsewhere_is_found_by_a_pattern_too(tmp_path: Path) -> None:
    profile = profiles.Profile(
        name="p", title="P", hot_safety=COMETBFT.hot_safety, sign_state=("*/state.json",), sign_state_format="cometbft"
    )
    (tmp_path / "node").mkdir()
    (tmp_path / "staged").write_text(json.dumps({"height": 5, "round": 0, "step": 0}))
    roots = [(str(tmp_path / "node/one/state.json"), str(tmp_path / "staged"))]
    (found,) = sign_state.compare(str(tmp_path / "node"), str(tmp_path / "node"), profile, roots=roots)
    assert found.order is Order.ABSENT


# Links: the image's still name production.


def linked(top: Path, root: Path, height: int) -> Path:
    top.mkdir()
    cometbft(root.parent / "scratch", height)
    (root.parent / "scratch/data").rename(root)
    return top


def test_a_data_directory_on_another_disk(tmp_path: Path) -> None:
    """`data` is a link to a root of its own; in the set's copy it is the same absolute link, into production."""
    live, live_root = tmp_path / "node", tmp_path / "fast"
    staged, staged_root = tmp_path / "staged", tmp_path / "fast-staged"
    for top, root, height in ((live, live_root, 20), (staged, staged_root, 10)):
        linked(top, root, height)
        (top / "data").symlink_to(live_root)
    roots = [(str(live_root), str(staged_root))]
    assert order(live, staged, roots=roots) is Order.HIGHER
    sign_state.carry_higher(str(live), str(staged), COMETBFT, roots=roots)
    assert json.loads((staged_root / "priv_validator_state.json").read_text())["height"] == "20"
    assert json.loads((live_root / "priv_validator_state.json").read_text())["height"] == "20"
    # The undo: what was set aside comes back, and production has signed on meanwhile.
    cometbft(tmp_path / "scratch", 30)
    shutil.copy(tmp_path / "scratch" / STATE, live_root / "priv_validator_state.json")
    sign_state.carry_higher(str(live), str(staged), COMETBFT, roots=roots)
    assert json.loads((staged_root / "priv_validator_state.json").read_text())["height"] == "30"


def test_a_state_outside_all_that_moves_is_left_where_it_is(tmp_path: Path) -> None:
    outside = cometbft(tmp_path / "outside", 20) / STATE
    for name in ("a", "b"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / STATE).symlink_to(outside)
    assert sign_state.compare(str(tmp_path / "a"), str(tmp_path / "b"), COMETBFT) == []
    # The set's leads out, the live one is a file: never written through.
    (tmp_path / "a" / STATE).unlink()
    cometbft(tmp_path / "a", 21)
    sign_state.carry_higher(str(tmp_path / "a"), str(tmp_path / "b"), COMETBFT)
    assert json.loads(outside.read_text())["height"] == "20"
    assert json.loads((tmp_path / "b" / STATE).read_text())["height"] == "21"


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    a, b = cometbft(tmp_path / "a", 11), cometbft(tmp_path / "b", 10)
    (a / STATE).unlink()
    (a / STATE).mkdir() if kind == "directory" else os.mkfifo(a / STATE)
    assert order(a, b) is Order.UNORDERED


# Slashing protection.


HISTORY = {A: ([100, 130], [(2, 3), (3, 4)]), B: ([90], [(1, 3)])}


@pytest.mark.parametrize(
    ("live", "incoming", "expected"),
    [
        (HISTORY, HISTORY, Order.EQUAL),
        ({**HISTORY, A: ([100, 130, 140], HISTORY[A][1])}, HISTORY, Order.HIGHER),
        ({**HISTORY, A: ([100, 130], [*HISTORY[A][1], (3, 5)])}, HISTORY, Order.HIGHER),
        (HISTORY, {A: HISTORY[A]}, Order.HIGHER),
        ({A: HISTORY[A]}, HISTORY, Order.LOWER),
        # A validator ahead here, another there: neither may replace the other.
        ({A: ([200], []), B: ([90], [])}, {A: ([100], []), B: ([95], [])}, Order.UNORDERED),
        # So for one validator's blocks and votes.
        ({A: ([200], [(1, 2)])}, {A: ([100], [(2, 3)])}, Order.UNORDERED),
        # Pruned: what lies under the lowest that is remembered is refused anyway.
        ({A: ([130, 150], [(4, 5)])}, {A: ([100, 130], [(2, 3), (4, 5)])}, Order.HIGHER),
        # Ahead by its highest, but it has forgotten slot 120, which it would sign again.
        ({A: ([100, 150], [])}, {A: ([100, 120], [])}, Order.UNORDERED),
        ({A: ([], [])}, {}, Order.EQUAL),
        ({}, {}, Order.EQUAL),
    ],
)
@pytest.mark.parametrize("live_form", ["sqlite", "wal", "json"])
@pytest.mark.parametrize("incoming_form", ["sqlite", "wal", "json"])
def test_slashing_protection(
    tmp_path: Path, live: Any, incoming: Any, expected: Order, live_form: str, incoming_form: str
) -> None:
    for name, signed, form in (("a", live, live_form), ("b", incoming, incoming_form)):
        if form == "json":
            interchange(tmp_path / name, signed)
        else:
            lighthouse(tmp_path / name, signed, wal=form == "wal")
    a, b = tmp_path / "a", tmp_path / "b"
    before = content(a), content(b)
    assert order(a, b, LIGHTHOUSE) is expected
    assert (content(a), content(b)) == before, "looking changes nothing, not even beside a database"
    if expected is Order.HIGHER:
        sign_state.carry_higher(str(a), str(b), LIGHTHOUSE)
        assert content(a) == before[0]
        assert order(a, b, LIGHTHOUSE) is Order.EQUAL
        assert not (b / f"{DATABASE}-wal").exists(), "a log of the old database would be replayed into the new"
    elif expected is Order.UNORDERED:
        with pytest.raises(PreconditionError):
            sign_state.carry_higher(str(a), str(b), LIGHTHOUSE)
        assert (content(a), content(b)) == before


def test_what_is_only_in_the_log_counts(tmp_path: Path) -> None:
    a = lighthouse(tmp_path / "a", HISTORY, wal=True)
    with sqlite3.connect(f"file:{a / DATABASE}?immutable=1", uri=True) as without_log:
        assert without_log.execute("SELECT count(*) FROM signed_blocks").fetchone() == (0,)
    b = lighthouse(tmp_path / "b", {A: ([100], [(2, 3)])})
    assert order(a, b, LIGHTHOUSE) is Order.HIGHER
    # The same file, another log: not "the same bytes".
    shutil.copy(a / DATABASE, b / DATABASE)
    assert order(a, b, LIGHTHOUSE) is Order.HIGHER


@pytest.mark.parametrize("where", [0, 30, 4096, 9000])
def test_a_damaged_database(tmp_path: Path, where: int) -> None:
    many = {A: (list(range(1, 4000)), [(n, n + 1) for n in range(4000)])}
    a, b = lighthouse(tmp_path / "a", many), lighthouse(tmp_path / "b", HISTORY)
    raw = bytearray((a / DATABASE).read_bytes())
    raw[where : where + 64] = b"\xff" * 64
    (a / DATABASE).write_bytes(raw)
    assert order(a, b, LIGHTHOUSE) is Order.UNORDERED
    (a / DATABASE).write_bytes(raw[:5000])
    assert order(a, b, LIGHTHOUSE) is Order.UNORDERED


def test_another_clients_database_and_another_chain(tmp_path: Path) -> None:
    a, b = lighthouse(tmp_path / "a", HISTORY), lighthouse(tmp_path / "b", HISTORY)
    (a / DATABASE).unlink()
    with sqlite3.connect(a / DATABASE) as database:
        database.execute("CREATE TABLE something (else_ INTEGER)")
    assert order(a, b, LIGHTHOUSE) is Order.UNORDERED
    interchange(a, HISTORY, "0x04")
    interchange(b, HISTORY, "0x05")
    assert order(a, b, LIGHTHOUSE) is Order.UNORDERED


def test_nimbus_writes_the_keys_as_bytes(tmp_path: Path) -> None:
    a = lighthouse(tmp_path / "a", {bytes.fromhex(A[2:]): ([100, 101], [])})  # type: ignore[dict-item]
    assert order(a, lighthouse(tmp_path / "b", {A: ([100], [])}), LIGHTHOUSE) is Order.HIGHER


def test_what_cannot_be_read_is_equal_or_refused(tmp_path: Path) -> None:
    """A users' profile with a file of its own format (Prysm's validator.db)."""
    profile = profiles.Profile(name="p", title="P", hot_safety=COMETBFT.hot_safety, sign_state=("validator.db",))
    a, b = tmp_path / "a", tmp_path / "b"
    for top in (a, b):
        top.mkdir()
        (top / "validator.db").write_bytes(b"bolt")
    assert order(a, b, profile) is Order.EQUAL
    (b / "validator.db").write_bytes(b"tlob")
    assert order(a, b, profile) is Order.UNORDERED
    (b / "validator.db").unlink()
    assert order(a, b, profile) is Order.HIGHER
    sign_state.carry_higher(str(a), str(b), profile)
    assert content(a) == content(b)


def test_all_is_compared_before_anything_is_written(tmp_path: Path) -> None:
    profile = profiles.Profile(
        name="p", title="P", hot_safety=COMETBFT.hot_safety, sign_state=("*/state.json",), sign_state_format="cometbft"
    )
    for top, heights in (("a", (11, 5)), ("b", (10, 6))):
        for name, height in zip(("one", "two"), heights, strict=True):
            (tmp_path / top / name).mkdir(parents=True)
            (tmp_path / top / name / "state.json").write_text(json.dumps({"height": height, "round": 0, "step": 0}))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert [found.order for found in sign_state.compare(a, b, profile)] == [Order.HIGHER, Order.LOWER]
    (tmp_path / "a/two/state.json").write_text("damaged")
    before = content(tmp_path / "b")
    with pytest.raises(PreconditionError, match="two/state"):
        sign_state.carry_higher(a, b, profile)
    assert content(tmp_path / "b") == before


def test_killed_at_any_moment_it_is_never_lower_than_the_set(tmp_path: Path) -> None:
    """SIGKILL of a process that carries, over and over: what stands there is the set's or the live one, never less."""
    a = lighthouse(tmp_path / "a", HISTORY, wal=True)
    low = {A: ([100], [(2, 3)]), B: ([90], [(1, 3)])}
    template = lighthouse(tmp_path / "template", low)
    code = f"""
import shutil
from snapshotter.nodes import profiles, sign_state
profile = profiles.get("lighthouse")
print(flush=True)
while True:
    shutil.copyfile({str(template / DATABASE)!r}, {str(tmp_path / "b" / "next")!r})
    import os; os.replace({str(tmp_path / "b" / "next")!r}, {str(tmp_path / "b" / DATABASE)!r})
    sign_state.carry_higher({str(a)!r}, {str(tmp_path / "b")!r}, profile)
"""
    b = lighthouse(tmp_path / "b", low)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
        )
        assert process.stdout is not None and process.stdout.readline()
        process.stdout.close()
        os.sched_yield()
        process.kill()
        process.wait()
        assert order(b, template, LIGHTHOUSE) in (Order.EQUAL, Order.HIGHER)
        sign_state.carry_higher(str(a), str(b), LIGHTHOUSE)
        assert order(a, b, LIGHTHOUSE) is Order.EQUAL


# Any sequence of run, take, restore, undo, and kills between.


class Exchanges(RuleBasedStateMachine):
    """A validator that signs, sets that are taken of it, restores that exchange directories, and undos of them: each
    carries the higher state and then exchanges; a kill may come before either, and then it is begun again. Keys come
    and go, and states are reset. What the live directory says was signed is never less than what was."""

    def __init__(self) -> None:
        super().__init__()
        self.top = Path(tempfile.mkdtemp(prefix="sign-state-"))
        self.live = cometbft(self.top / "live", 0, 0, 0)
        self.signed = (0, 0, 0)  # with the key that is live
        self.key = "A"
        self.sets: list[tuple[str, Path]] = []
        self.asides: list[Path] = []
        self.count = 0

    def teardown(self) -> None:
        shutil.rmtree(self.top)

    def new(self, kind: str) -> Path:
        self.count += 1
        return self.top / f"{kind}-{self.count}"

    def state(self) -> tuple[int, int, int]:
        found = json.loads((self.live / STATE).read_text())
        return int(found["height"]), int(found["round"]), int(found["step"])

    @rule(by=st.sampled_from([(1, 0, 1), (0, 1, 1), (0, 0, 1), (7, 0, 3)]))
    def sign(self, by: tuple[int, int, int]) -> None:
        height, round_, step = self.state()
        if by[0]:
            now = height + by[0], 0, by[2]
        elif by[1]:
            now = height, round_ + 1, by[2]
        else:
            now = height, round_, min(3, step + 1)
        cometbft(self.live, *now)
        self.signed = max(self.signed, now)

    @rule()
    def take(self) -> None:
        copy = self.new("set")
        shutil.copytree(self.live, copy)
        self.sets.append((self.key, copy))

    def exchange(self, incoming: Path, killed: bool, keys: sign_state.Keys | None = None) -> None:
        if killed:  # after the carrying, before the exchange: the validator goes on, then it is begun again
            sign_state.carry_higher(str(self.live), str(incoming), COMETBFT, keys=keys)
            self.sign((1, 0, 1))
        sign_state.carry_higher(str(self.live), str(incoming), COMETBFT, keys=keys)
        aside = self.new("aside")
        self.live.rename(aside)
        incoming.rename(self.live)
        self.asides.append(aside)

    def staged(self, data: st.DataObject) -> tuple[str, Path]:
        key, of_set = data.draw(st.sampled_from(self.sets))
        copy = self.new("staged")
        shutil.copytree(of_set, copy)
        return key, copy

    @precondition(lambda self: self.sets)
    @rule(data=st.data(), killed=st.booleans())
    def restore(self, data: st.DataObject, killed: bool) -> None:
        key, copy = self.staged(data)
        if key == self.key:
            self.exchange(copy, killed, sign_state.Keys(self.key, key))
            return
        with pytest.raises(PreconditionError):  # what that one has signed since isn't here
            self.exchange(copy, killed=False, keys=sign_state.Keys(self.key, key))

    @precondition(lambda self: self.sets)
    @rule(data=st.data(), killed=st.booleans())
    def keep_the_key(self, data: st.DataObject, killed: bool) -> None:
        key, copy = self.staged(data)
        self.exchange(copy, killed, sign_state.Keys(self.key, key, live_stays=True))

    @rule()
    def another_key(self) -> None:
        """The node is made anew, and is another validator. What was set aside is of the one before: discarded."""
        self.key += "A"
        self.signed = (0, 0, 0)
        self.asides.clear()
        cometbft(self.live, *self.signed)

    @precondition(lambda self: self.sets)
    @rule(data=st.data(), to=st.sampled_from([(0, 0, 0), (1, 0, 1)]))
    def reset(self, data: st.DataObject, to: tuple[int, int, int]) -> None:
        """A live one below a set's was reset: refused, until the newest copy is there again."""
        key, copy = self.staged(data)
        kept = (self.live / STATE).read_bytes()
        cometbft(self.live, *to)
        of_set = json.loads((copy / STATE).read_text())
        if (int(of_set["height"]), of_set["round"], of_set["step"]) > to or key != self.key:
            for stays in {key == self.key, False}:
                with pytest.raises(PreconditionError):
                    keys = sign_state.Keys(self.key, key, live_stays=stays)
                    sign_state.carry_higher(str(self.live), str(copy), COMETBFT, keys=keys)
        (self.live / STATE).write_bytes(kept)

    @precondition(lambda self: self.asides)
    @rule(data=st.data(), killed=st.booleans())
    def undo(self, data: st.DataObject, killed: bool) -> None:
        aside = data.draw(st.sampled_from(self.asides))
        self.asides.remove(aside)
        self.exchange(aside, killed)

    @precondition(lambda self: self.sets)
    @rule(data=st.data())
    def damaged(self, data: st.DataObject) -> None:
        """A live state that can't be read is refused, and then it is still there."""
        kept = (self.live / STATE).read_bytes()
        (self.live / STATE).write_bytes(kept[:5])
        _, copy = self.staged(data)
        with pytest.raises(PreconditionError):
            sign_state.carry_higher(str(self.live), str(copy), COMETBFT)
        (self.live / STATE).write_bytes(kept)
        shutil.rmtree(copy)

    @invariant()
    def never_lower(self) -> None:
        assert self.state() >= self.signed


def test_never_lower_after_any_sequence(request: pytest.FixtureRequest) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    full = request.config.getoption("--full")
    run_state_machine_as_test(
        Exchanges,
        settings=settings(
            max_examples=300 if full else 25,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
