"""Each built-in profile's own layout, as its software leaves it: healthy is ok, and what is lost of it is found."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotter import checks
from snapshotter.checks import Outcome, Proof
from snapshotter.nodes import profiles

plyvel = pytest.importorskip("plyvel")
rocksdict = pytest.importorskip("rocksdict")


def leveldb(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with plyvel.DB(str(path), create_if_missing=True) as database:
        database.put(b"key", b"value")


def rocksdb(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    database = rocksdict.Rdict(str(path), rocksdict.Options(raw_mode=True))
    database[b"key"] = b"value"
    database.close()


def file(path: Path, content: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def besu(top: Path) -> None:
    rocksdb(top / "database")
    for name in ("DATABASE_METADATA.json", "VERSION_METADATA.json"):
        file(top / name, '{"version": 2}')
    file(top / "key", "0x17")
    (top / "caches").mkdir()


def geth_hash(top: Path) -> None:
    leveldb(top / "geth" / "chaindata")
    file(top / "geth" / "chaindata" / "ancient" / "chain" / "headers.0000.cdat", "frozen")
    leveldb(top / "geth" / "nodes")
    file(top / "geth" / "nodekey", "17")


def geth_path(top: Path) -> None:
    geth_hash(top)
    file(top / "geth" / "triedb" / "merkle.journal", "journal")


def ethereumjs(top: Path) -> None:
    for name in ("chain", "state", "meta", "config"):
        leveldb(top / "mainnet" / name)


def cometbft(top: Path) -> None:
    for name in ("blockstore", "state", "application", "tx_index"):
        leveldb(top / "data" / f"{name}.db")
    file(top / "data" / "cs.wal" / "wal", "log")
    (top / "data" / "snapshots").mkdir()
    file(top / "data" / "priv_validator_state.json", '{"height": "5"}')
    file(top / "config" / "node_key.json")


def lighthouse(top: Path) -> None:
    for name in ("chain_db", "freezer_db", "blobs_db"):
        leveldb(top / "beacon" / name)
    file(top / "beacon" / "network" / "key", "17")


def lighthouse_validator(top: Path) -> None:
    """The validator client alone: it has no beacon's databases."""
    file(top / "validators" / "validator_definitions.yml", "[]")
    with sqlite3.connect(top / "validators" / "slashing_protection.sqlite") as database:
        database.execute("CREATE TABLE validators (id INTEGER)")
    database.close()


LAYOUTS: list[tuple[str, Callable[[Path], None]]] = [
    ("besu", besu),
    ("geth", geth_hash),
    ("geth", geth_path),
    ("ethereumjs", ethereumjs),
    ("cometbft", cometbft),
    ("lighthouse", lighthouse),
    ("lighthouse", lighthouse_validator),
]


def prove(top: Path, profile: str, level: int = 2) -> Proof:
    return checks.prove([("/live", str(top))], profiles.get(profile), level)


@pytest.mark.parametrize(("profile", "build"), LAYOUTS, ids=[build.__name__ for _, build in LAYOUTS])
def test_a_healthy_node_is_ok(tmp_path: Path, profile: str, build: Callable[[Path], None]) -> None:
    build(tmp_path)
    assert profiles.detect(str(tmp_path))[0].name == profile, "not the layout that it says it is"
    proof = prove(tmp_path, profile)
    assert (proof.outcome, proof.level) == (Outcome.OK, 2), proof
    assert {finding.kind for finding in proof.findings} <= {"rocksdb", "leveldb", "sqlite"}


def test_cometbft_on_what_has_no_check(tmp_path: Path) -> None:
    """badger and bbolt are among the databases that it can be built with: not proven, and not corrupt either."""
    cometbft(tmp_path)
    remove(tmp_path, "data/state.db", "data/tx_index.db")
    file(tmp_path / "data/state.db/KEYREGISTRY", "badger")
    (tmp_path / "data/tx_index.db").write_bytes(bytes(16) + (0xED0CDAED).to_bytes(4, "little") + bytes(4076))
    proof = prove(tmp_path, "cometbft")
    assert (proof.outcome, proof.no_check) == (Outcome.TOOL_MISSING, True), proof
    assert {finding.kind for finding in proof.findings} == {"leveldb", "badger", "bbolt"}


def test_another_programs_database_that_has_no_check_is_noted(tmp_path: Path) -> None:
    """A node that was proven isn't left unproven for what its own profile doesn't name."""
    besu(tmp_path)
    file(tmp_path / "etcd/KEYREGISTRY", "badger")
    proof = prove(tmp_path, "besu")
    assert (proof.outcome, proof.level) == (Outcome.OK, 2), proof
    assert proof.notes == ("/live/etcd: there is no check for badger yet: its content was not proven",)


def remove(top: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(top / name)


def empty(top: Path, name: str) -> None:
    remove(top, name)
    (top / name).mkdir()


LOST: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], object], str]] = {
    "besu, emptied": ("besu", besu, lambda top: empty(top, "database"), "/live/database: has no database in it"),
    "besu, gone": ("besu", besu, lambda top: remove(top, "database"), "/live: has no database"),
    "besu, a link that leads nowhere": (
        "besu",
        besu,
        lambda top: (remove(top, "database"), (top / "database").symlink_to("elsewhere")),
        "/live/database: leads to nothing in it",
    ),
    "geth, emptied": (
        "geth",
        geth_path,
        lambda top: empty(top, "geth/chaindata"),
        "/live/geth/chaindata: has no database in it",
    ),
    # Its list of peers is a LevelDB too, and doesn't stand for the chain.
    "geth, gone": ("geth", geth_path, lambda top: remove(top, "geth/chaindata"), "/live: has no geth/chaindata"),
    "geth, the journal's link leads nowhere": (
        "geth",
        geth_path,
        lambda top: (remove(top, "geth/triedb"), (top / "geth/triedb").symlink_to("elsewhere")),
        "/live/geth/triedb: leads to nothing in it",
    ),
    "ethereumjs, gone": (
        "ethereumjs",
        ethereumjs,
        lambda top: remove(top, "mainnet/chain", "mainnet/state", "mainnet/meta"),
        "/live: has no */chain or */state or */meta",
    ),
    "cometbft, one emptied": (
        "cometbft",
        cometbft,
        lambda top: empty(top, "data/state.db"),
        "/live/data/state.db: has no database in it",
    ),
    "cometbft, gone": (
        "cometbft",
        cometbft,
        lambda top: remove(top, *(f"data/{name}.db" for name in ("blockstore", "state", "application", "tx_index"))),
        "/live: has no data/*.db",
    ),
    "lighthouse, one emptied": (
        "lighthouse",
        lighthouse,
        lambda top: empty(top, "beacon/freezer_db"),
        "/live/beacon/freezer_db: has no database in it",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_a_database_that_is_lost_is_found_at_level_2_and_not_below(tmp_path: Path, name: str) -> None:
    profile, build, damage, why = LOST[name]
    build(tmp_path)
    damage(tmp_path)
    proof = prove(tmp_path, profile)
    assert (proof.outcome, proof.level, proof.why) == (Outcome.CORRUPT, 2, why)
    for level in (0, 1):  # the files are as the manifest says: more isn't asked
        assert prove(tmp_path, profile, level).outcome is Outcome.OK


def test_a_named_database_whose_first_byte_is_damaged_is_found(tmp_path: Path) -> None:
    """Nothing tells any more that it is one, but that the profile says so."""
    own = tmp_path / "profiles"
    file(
        own / "mine.toml",
        'name = "mine"\ntitle = "Mine"\ndatabase = ["main.sqlite", "journal"]\nno_database = ["journal"]\n'
        '[hot_safety]\nsafety = "unknown"\nreason = "r"\nsource = "s"\n',
    )
    data = tmp_path / "data"
    file(data / "journal" / "1", "x")
    with sqlite3.connect(data / "main.sqlite") as database:
        database.execute("CREATE TABLE t (x)")
    database.close()
    mine = profiles.get("mine", str(own))
    assert checks.prove([("/live", str(data))], mine, 2).outcome is Outcome.OK
    content = (data / "main.sqlite").read_bytes()
    (data / "main.sqlite").write_bytes(b"T" + content[1:])
    proof = checks.prove([("/live", str(data))], mine, 2)
    assert (proof.outcome, proof.why) == (Outcome.CORRUPT, "/live/main.sqlite: has no database in it")


def test_a_database_on_another_disk(tmp_path: Path) -> None:
    besu(tmp_path / "data")
    (tmp_path / "data" / "database").rename(tmp_path / "fast")
    (tmp_path / "data" / "database").symlink_to(tmp_path / "fast")
    places = [("/live", str(tmp_path / "data")), ("/fast", str(tmp_path / "fast"))]
    assert checks.prove(places, profiles.get("besu"), 2).outcome is Outcome.OK


def test_directories_deeper_than_a_pythons_stack(tmp_path: Path) -> None:
    """os.walk calls itself for each."""
    leveldb(tmp_path / "database")
    os.makedirs(tmp_path / "/".join("d" * 600))
    for number in range(600, 1200):
        os.mkdir(f"{tmp_path}/{'/'.join('d' * (number + 1))}")
    try:
        proof = prove(tmp_path, "generic")
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)
    assert (proof.outcome, len(proof.findings)) == (Outcome.OK, 1)
