"""Profiles: what is known of Besu, and that a data path's content speaks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import snapshotter
from snapshotter.core.errors import PreconditionError, UsageError
from snapshotter.nodes import profiles
from tests.support import Command


def besu_tree(path: Path) -> Path:
    (path / "database").mkdir(parents=True)
    (path / "database/CURRENT").write_text("MANIFEST-000004\n")
    for name in ("DATABASE_METADATA.json", "VERSION_METADATA.json", "key", "key.pub", "nodeAddress"):
        (path / name).write_text("{}")
    for name in ("besu.ports", "besu.networks", "besu.pid", "static-nodes.json"):
        (path / name).write_text("")
    (path / "caches").mkdir()
    return path


def test_every_file_of_a_besu_data_path_has_its_place(tmp_path: Path) -> None:
    tree = besu_tree(tmp_path / "besu")
    profile = profiles.get("besu")
    groups = ("database", "metadata", "identity", "config", "runtime", "caches")
    named = [path for group in groups for p in getattr(profile, group) for path in profiles.matches(str(tree), p)]
    assert sorted(named) == sorted(str(entry) for entry in tree.iterdir())
    assert profile.secrets == ("key",) and profile.sign_state == ()
    assert profile.node_key is not None and profile.node_key.path == "key"
    assert profile.hot_safety.safety == "crash-recovers" and profile.hot_safety.source
    assert any("25.4.0" in warning.text for warning in profile.warnings)


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ([], "besu"),
        (["key", "key.pub", "nodeAddress"], "besu"),  # the key may be elsewhere
        (["DATABASE_METADATA.json"], "besu"),
        (["DATABASE_METADATA.json", "VERSION_METADATA.json"], "besu"),
        (["DATABASE_METADATA.json", "VERSION_METADATA.json", "key"], "generic"),  # any RocksDB in a `database`
        (["database/CURRENT", "database"], "generic"),
    ],
)
def test_found_from_the_content(tmp_path: Path, gone: list[str], expected: str) -> None:
    tree = besu_tree(tmp_path / "data [x] *")
    for name in gone:
        (tree / name).rmdir() if (tree / name).is_dir() else (tree / name).unlink()
    found, why = profiles.detect(str(tree))
    assert found.name == expected and why


def test_a_linked_database_speaks_too(tmp_path: Path) -> None:
    tree = besu_tree(tmp_path / "data")
    os.rename(tree / "database", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tree / "database")
    assert profiles.detect(str(tree))[0].name == "besu"
    assert profiles.detect(str(tmp_path / "not-there"))[0].name == "generic"


def test_unknown_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean besu"):
        profiles.get("bezu")
    with pytest.raises(UsageError, match=r"besu, .*generic"):
        profiles.get("xyz")


_USER = 'name = "mine"\ntitle = "Mine"\n[hot_safety]\nsafety = "contested"\nreason = "r"\nsource = "s"\n'


def test_each_of_ours_is_in_the_file_of_its_name() -> None:
    """`get` reads that one alone."""
    known = profiles.load_all()
    assert known and all(profiles.get(name) == profile for name, profile in known.items())
    assert {name for name, _ in profiles._built_in()} == {f"{name}.toml" for name in known}


def test_the_users_own(tmp_path: Path) -> None:
    built_in = profiles.load_all(str(tmp_path / "missing"))
    assert {"besu", "generic"} <= set(built_in) and all(name == each.name for name, each in built_in.items())
    (tmp_path / "mine.toml").write_text(_USER + '[[detect]]\nall = ["*.special"]\nscore = 99\n')
    (tmp_path / "notes.txt").write_text("no profile")
    data = besu_tree(tmp_path / "data")
    assert profiles.detect(str(data), str(tmp_path))[0].name == "besu"
    (data / "x.special").write_text("")
    assert profiles.detect(str(data), str(tmp_path))[0].name == "mine"
    (tmp_path / "mine.toml").write_text(_USER.replace('"mine"', '"besu"'))
    assert profiles.get("besu", str(tmp_path)).title == "Mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_USER + "[health]\nrpx = 1\n", ["health.rpx", "did you mean rpc"]),
        (_USER.replace("contested", "fine"), ["hot_safety.safety", "contested"]),
        ("databse = []\n" + _USER, ["databse", "database"]),
        ('runtime = ["../../etc/passwd"]\n' + _USER, ["../../etc/passwd"]),
        ('runtime = ["/etc/passwd"]\n' + _USER, ["/etc/passwd"]),
        ('runtime = ["."]\n' + _USER, ["'.'"]),
        ('runtime = [""]\n' + _USER, ["''"]),
        (_USER.replace('"mine"', '"My Node"'), ["My Node"]),
        ('database = ["data"]\nsign_state = ["data/state.json"]\n' + _USER, ["data/state.json", "outlive"]),
        ('caches = ["*"]\nidentity = ["key"]\n' + _USER, ["key", "outlive"]),
        ('sign_state_format = "bolt"\n' + _USER, ["sign_state_format", "cometbft"]),
        (_USER + '[node_key]\npath = "../key"\nformat = "cometbft"\n', ["../key"]),
        ("name = ", ["not TOML"]),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        profiles.load_all(str(tmp_path))
    assert all(word in caught.value.line() for word in [*words, "mine.toml"])


def test_one_that_cant_be_opened(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").mkdir()
    with pytest.raises(PreconditionError, match=r"mine\.toml"):
        profiles.load_all(str(tmp_path))


TREES = {
    "geth": ["geth/chaindata/ancient/", "geth/chaindata/CURRENT", "geth/nodekey", "geth/jwtsecret", "geth/nodes/",
             "geth/triedb/", "geth/blobpool/", "geth/transactions.rlp", "geth.ipc", "keystore/UTC--1"],
    "cometbft": ["config/node_key.json", "config/priv_validator_key.json", "config/config.toml", "config/app.toml",
                 "config/genesis.json", "config/addrbook.json", "data/blockstore.db/", "data/application.db/",
                 "data/cs.wal/", "data/priv_validator_state.json", "data/snapshots/", "keyring-test/"],
    "postgresql": ["PG_VERSION", "base/", "global/pg_control", "pg_wal/", "pg_xact/", "pg_tblspc/", "pg_subtrans/",
                   "postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf", "postmaster.pid",
                   "postmaster.opts", "server.key"],
    "lighthouse": ["beacon/chain_db/", "beacon/freezer_db/", "beacon/blobs_db/", "beacon/network/key",
                   "validators/slashing_protection.sqlite", "validators/validator_definitions.yml",
                   "validators/api-token.txt", "secrets/0xaa", "validators/0xaa/voting-keystore.json"],
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_the_documented_layout_speaks_for_it_and_every_file_has_its_place(tmp_path: Path, name: str) -> None:
    for entry in TREES[name]:
        path = tmp_path / entry
        path.mkdir(parents=True) if entry.endswith("/") else path.parent.mkdir(parents=True, exist_ok=True)
        if not entry.endswith("/"):
            path.write_text("")
    profile, why = profiles.detect(str(tmp_path))
    assert profile.name == name and why
    groups = ("database", "metadata", "identity", "sign_state", "secrets", "config", "runtime", "caches")
    named = {
        match for group in groups for one in getattr(profile, group) for match in profiles.matches(str(tmp_path), one)
    }
    files = [path for path in tmp_path.rglob("*") if not (path.is_dir() and any(path.iterdir()))]
    lost = [path for path in files if not {str(path), *map(str, path.parents)} & named]
    assert not lost
    assert profile.hot_safety.safety != "unknown" and profile.hot_safety.source


def test_what_a_profile_lets_go_never_holds_what_must_stay() -> None:
    """What a restore may remove or replace has neither the identity nor the sign-state in it."""
    for profile in profiles.load_all().values():
        assert profile.node_key is None or profile.node_key.path in profile.identity
        assert profile.node_key is None or profile.node_key.path in profile.secrets
        assert bool(profile.sign_state) == (profile.sign_state_format != "opaque")
    assert {"besu", "geth", "ethereumjs", "cometbft", "postgresql", "generic"} <= set(profiles.load_all())


@pytest.mark.parametrize(
    ("said", "warned"),
    [
        ("25.2.1", True),
        ("v24.12.2-RC1", True),
        ("25.4.0", False),
        ("25.10.0", False),  # as numbers
        ("besu/v25.7.0/linux-x86_64", False),
        ("UNKNOWN", False),
        (None, False),
    ],
)
def test_a_version_that_is_known_to_be_too_old(tmp_path: Path, said: str | None, warned: bool) -> None:
    tree = besu_tree(tmp_path / "data")
    if said is not None:
        (tree / "VERSION_METADATA.json").write_text(json.dumps({"besuVersion": said}))
    found = profiles.outdated(profiles.get("besu"), str(tree))
    assert [("25.4.0" in text and "BONSAI" in text) for text in found] == ([True] if warned else [])


@pytest.mark.parametrize("content", ["", "[]", "{", '{"besuVersion": 7}', '{"other": "1.2"}'])
def test_a_version_that_cant_be_told(tmp_path: Path, content: str) -> None:
    tree = besu_tree(tmp_path / "data")
    (tree / "VERSION_METADATA.json").write_text(content)
    assert profiles.version_of(profiles.get("besu"), str(tree)) is None
    (tree / "VERSION_METADATA.json").unlink()
    (tree / "VERSION_METADATA.json").mkdir()
    assert profiles.version_of(profiles.get("besu"), str(tree)) is None


def test_the_users_profiles_lie_beside_the_config(tmp_path: Path) -> None:
    """The command finds them, by name and by content, and takes with them."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "x.special").write_text("x")
    command = Command(tmp_path / "etc")
    assert command.json("profile", str(data))["profile"]["name"] == "generic"
    (command.home / "profiles").mkdir()
    (command.home / "profiles/mine.toml").write_text(_USER + '[[detect]]\nall = ["*.special"]\nscore = 99\n')
    assert command.json("profile", str(data))["profile"]["name"] == "mine"
    assert "mine" in {entry["name"] for entry in command.json("profile")["profiles"]}
    assert command.json("take", str(data), "--dry-run")["profile"] == "mine"
    assert command.json("init", str(data))["found"]["profile"] == "mine"
    (command.home / "profiles/mine.toml").write_text("name = ")
    assert "mine.toml" in command.error("take", str(data), exit_code=2)["message"]


def test_what_a_hot_image_is_worth_is_heeded(tmp_path: Path) -> None:
    """Contested: said. Stop-required: refused while somebody uses it; stopped, it is taken as any other."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "x").write_text("x")
    command = Command(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\nprofile = "mine"\n')
    (command.home / "profiles").mkdir()
    (command.home / "profiles/mine.toml").write_text(_USER)
    assert any("contested" in note for note in command.json("take", "n", "--dry-run")["warnings"])
    (command.home / "profiles/mine.toml").write_text(_USER.replace("contested", "stop-required"))
    with open(data / "x"):
        error = command.error("take", "n", exit_code=3)
    assert "must be stopped" in error["message"] and "--quiesce stop" in error["cure"]
    assert command.json("list", "n")["sets"] == []
    assert command.json("take", "n")["good"]


def test_profiles_are_read_from_a_zip(tmp_path: Path) -> None:
    package = Path(snapshotter.__file__).parent
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in package.rglob("*"):
            if file.suffix in (".py", ".toml"):
                archive.write(file, Path("snapshotter") / file.relative_to(package))
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path / "all.zip")!r})
import snapshotter.nodes.profiles as profiles
assert "all.zip" in profiles.__file__
print(*profiles.load_all())
"""
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert outcome.stdout.split() == list(profiles.load_all()), outcome.stderr
