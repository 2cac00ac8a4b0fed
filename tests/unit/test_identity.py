"""The node's key: who it says the node is, that it never gets out, that a clone has none, that a lost one comes back.

Vectors are published: EIP-155's example key, the generator point itself (key 1, SEC 2), CometBFT's documentation.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import pty
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from snapshotter.core.errors import PreconditionError, SnapshotterError
from snapshotter.nodes import files, identity, profiles
from snapshotter.verbs import identity as verb
from tests.support import NOBODY, Command

ONE = f"{1:064x}"
#: SEC 2, 2.4.1: the base point; its address is the best known of all.
ONE_PUBLIC = (
    "79be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798"
    "483ada7726a3c4655da4fbfc0e1108a8fd17b448a68554199c47d08ffb10d4b8"
)
VECTORS = [
    (ONE, "0x7e5f4552091a69125d5dfcb7b8c2659029395bdf"),
    (f"{2:064x}", "0x2b5ad5c4795c026514f8317c7a215e218dccd6cf"),
    ("46" * 32, "0x9d8a62f656a8d1615c1294fd71e9cfb3e4855a4f"),  # EIP-155
    # web3.js documentation, eth.accounts.privateKeyToAccount
    ("348ce564d427a3311b6536bbcff9390d69395b06ed6c486954e971d960fe8709", "0xb8ce9ab6943e0eced004cde8e3bbed6568b2fa01"),
]
BESU = profiles.get("besu")
COMETBFT = profiles.get("cometbft")


def besu(path: Path, key: str = ONE) -> Path:
    (path / "database").mkdir(parents=True)
    (path / "database/CURRENT").write_text("MANIFEST-000004\n")
    (path / "DATABASE_METADATA.json").write_text("{}")
    write_key(path / "key", f"0x{key}")
    return path


def write_key(path: Path, text: str, mode: int = 0o600) -> Path:
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def files_below(top: Path) -> dict[str, bytes]:
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


# Who it is.


@pytest.mark.parametrize(("key", "address"), VECTORS)
@pytest.mark.parametrize("form", ["{}", "0x{}", "0x{}\n", "  {}\r\n", "upper"])
def test_the_address_of_published_keys(tmp_path: Path, key: str, address: str, form: str) -> None:
    write_key(tmp_path / "key", key.upper() if form == "upper" else form.format(key), 0o640)
    found = identity.read(str(tmp_path), BESU)
    assert found is not None and found.address == address
    assert (found.path, found.mode) == (str(tmp_path / "key"), 0o640)


def test_the_enode_of_a_published_key(tmp_path: Path) -> None:
    write_key(tmp_path / "key", ONE)
    found = identity.read(str(tmp_path), BESU)
    assert found is not None and found.node_id == ONE_PUBLIC
    assert found.url("10.1.2.3", 30303) == f"enode://{ONE_PUBLIC}@10.1.2.3:30303"
    assert found.url("fe80::1", 1) == f"enode://{ONE_PUBLIC}@[fe80::1]:1"


def test_cometbfts_published_keys(tmp_path: Path) -> None:
    """docs.cometbft.com: priv_validator_key.json, both examples; the node id is made of a key in the same way."""
    (tmp_path / "config").mkdir()
    ed25519 = "9giFjwnmAKCAI95l4Q32kXsau+itGrbsvz84CTLxGnJSPENCBVOUck5ntrGkyX+JzMwgleJCkXEIWPAoa/NioQ=="
    secp256k1 = "Lfa2uW//4KGvzLXhtoHGfI5Yd2DA2gC7pOfHSkFheGg="
    key = {"priv_key": {"type": "tendermint/PrivKeyEd25519", "value": ed25519}}
    write_key(tmp_path / "config/node_key.json", json.dumps(key))
    found = identity.read(str(tmp_path), COMETBFT)
    assert found is not None and found.address == found.node_id == "e74fbe24164cfc4f88e311c3ac92e63d0dc310d8"
    assert found.validator == "" and found.url("h", 26656) == f"{found.node_id}@h:26656"
    other = {"priv_key": {"type": "tendermint/PrivKeySecp256k1", "value": secp256k1}}
    write_key(tmp_path / "config/priv_validator_key.json", json.dumps(other))
    both = identity.read(str(tmp_path), COMETBFT)
    assert both is not None and both.validator == "E5B4F106D46A46820308C49B5F92DC22D9F9ACFA"
    assert not both.same_as(found) and both.same_as(both)


def test_without_a_key_there_is_nothing_to_say_and_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    code = f"""
import sys
from snapshotter.nodes import files, identity, profiles
for name, profile in profiles.load_all().items():
    assert identity.for_record({str(tmp_path)!r}, profile) == ("", ""), name
assert not {{"coincurve", "Crypto", "pyrage", "sqlite3", "tarfile"}} & set(sys.modules), sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


BAD = {
    "empty": b"",
    "short": ONE[:-1].encode(),
    "long": ONE.encode() + b"00",
    "split": f"{ONE[:32]} {ONE[32:]}".encode(),
    "not-hex": b"g" * 64,
    "not-text": b"\xff\xfe" * 32,
    "zero": b"0" * 64,
    "the-order": b"fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141",
    "huge": b"a" * (1 << 20),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_key_is_refused_without_a_word_of_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "key").write_bytes(BAD[name])
    with pytest.raises(PreconditionError) as caught:
        identity.read(str(tmp_path), BESU)
    line = caught.value.line() + repr(caught.value.__context__) + repr(caught.value.__cause__)
    assert str(tmp_path / "key") in line and caught.value.object
    text = BAD[name].decode(errors="replace").strip()
    assert not text or text[:16] not in line
    address, note = identity.for_record(str(tmp_path), BESU)
    assert address == "" and "not recorded" in note and (not text or text[:16] not in note)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"priv_key": 7}', b'{"priv_key": {"type": "x", "value": "eHh4"}}']
)
def test_what_is_no_cometbft_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/node_key.json").write_bytes(content)
    with pytest.raises(PreconditionError, match="CometBFT key"):
        identity.read(str(tmp_path), COMETBFT)


def test_a_key_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    with pytest.raises(PreconditionError, match="is a directory"):
        identity.read(str(tmp_path), BESU)
    (tmp_path / "key").rmdir()
    os.mkfifo(tmp_path / "key")
    with pytest.raises(PreconditionError, match="no plain file"):  # and it doesn't wait for a writer
        identity.read(str(tmp_path), BESU)


def test_a_device_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's user links `key` to /dev/watchdog: to open that as root is to have the host reset."""
    (tmp_path / "key").symlink_to("/dev/zero")
    opened = os.open
    flags: list[int] = []

    def watched(path: object, how: int, *rest: object, **more: object) -> int:
        flags.append(how if str(path) in ("/dev/zero", str(tmp_path / "key")) else os.O_PATH)
        return opened(path, how, *rest, **more)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(os, "open", watched)
    with pytest.raises(PreconditionError, match="no plain file"):
        identity.read(str(tmp_path), BESU)
    assert flags and all(how & os.O_PATH for how in flags)


@pytest.mark.root
@pytest.mark.parametrize("link", ["nodeAddress", "key"])
def test_the_nodes_user_gets_nobody_elses_file_as_his_identity(tmp_path: Path, link: str) -> None:
    """What is carried and restored becomes his."""
    data, other = besu(tmp_path / "data"), besu(tmp_path / "other")
    for path in [data, *data.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    (tmp_path / "shadow").write_text("root's")
    (tmp_path / "shadow").chmod(0o600)
    (data / link).unlink(missing_ok=True)
    (data / link).symlink_to(tmp_path / "shadow")
    assert identity.collect(str(data), BESU)[link][0] == b"root's", "a link that root made means what it says"
    os.lchown(data / link, NOBODY, NOBODY)
    if link == "key":
        assert identity.collect(str(data), BESU, str(tmp_path / "shadow"))[link][0] == b"root's"
    before = files_below(other)
    for refused in (lambda: identity.carry(str(data), str(other), BESU), lambda: identity.collect(str(data), BESU)):
        with pytest.raises(PreconditionError, match="another user") as told:
            refused()
        assert told.value.object == str(tmp_path / "shadow") and told.value.cure
    assert files_below(other) == before
    os.chown(tmp_path / "shadow", NOBODY, NOBODY)
    assert identity.collect(str(data), BESU)[link][0] == b"root's"


@pytest.mark.root
def test_another_nodes_key_is_not_to_be_had_by_way_of_its_directory(tmp_path: Path) -> None:
    """Root linked the other node's key to where it is; this node's user links to the directory of that link."""
    other, data = tmp_path / "other", tmp_path / "data"
    for top in (other, data):
        top.mkdir()
    (tmp_path / "secret").write_text("the other's")
    (other / "node_key.json").symlink_to(tmp_path / "secret")
    (data / "config").symlink_to(other)
    for path in (data, data / "config"):
        os.lchown(path, NOBODY, NOBODY)
    with pytest.raises(PreconditionError, match="another user"):
        identity.collect(str(data), COMETBFT)


@pytest.mark.root
def test_a_key_that_may_not_be_read_costs_the_address_not_the_take(tmp_path: Path) -> None:
    for path in [tmp_path, *tmp_path.parents]:
        if not path.stat().st_mode & 1:
            path.chmod(0o755)
    data = besu(tmp_path / "data")
    command = Command(tmp_path / "etc", uid=NOBODY)
    for path in [data, *data.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    (tmp_path / "keys").mkdir(mode=0o755)
    outside = write_key(tmp_path / "keys/key", ONE)  # root's, 0600
    tmp_path.chmod(0o777)
    command.config.write_text(
        f'state = "{command.home}/state"\n[node.n]\npath = "{data}"\nprofile = "besu"\nkey_file = "{outside}"\n'
    )
    (data / "key").unlink()
    taken = command.json("take", "n")
    assert taken["good"] and any("address is not recorded" in note for note in taken["warnings"])
    assert command.json("identity", "show", taken["set_id"])["address"] is None


def test_a_key_elsewhere_and_a_key_behind_a_link(tmp_path: Path) -> None:
    data = besu(tmp_path / "data")
    elsewhere = write_key(tmp_path / "node.key", "46" * 32)
    found = identity.read(str(data), BESU, str(elsewhere))
    assert found is not None and found.address == VECTORS[2][1]
    (data / "key").unlink()
    (data / "key").symlink_to("../node.key")
    linked = identity.read(str(data), BESU)
    assert linked is not None and linked.address == VECTORS[2][1] and linked.path == str(elsewhere)
    assert identity.read(str(data), BESU, str(tmp_path / "gone")) is None


def test_in_a_copy_a_link_is_followed_to_where_that_root_is_copied(tmp_path: Path) -> None:
    """An image's absolute link names production; who is asked for is the copy."""
    live, keys = besu(tmp_path / "data"), tmp_path / "keys"
    keys.mkdir()
    write_key(keys / "key", ONE)
    (live / "key").unlink()
    (live / "key").symlink_to(keys / "key")
    copy, copied_keys = tmp_path / "copy", tmp_path / "copied-keys"
    shutil.copytree(live, copy, symlinks=True)
    copied_keys.mkdir()
    write_key(copied_keys / "key", "46" * 32)
    found = identity.read(str(copy), BESU, production=str(live), roots=[(str(keys), str(copied_keys))])
    assert found is not None and found.address == VECTORS[2][1]
    there = identity.read(str(live), BESU)
    assert there is not None and there.address == VECTORS[0][1]


def test_without_the_library_it_says_what_to_install(tmp_path: Path) -> None:
    data = besu(tmp_path / "data")
    code = f"""
import sys
sys.modules["coincurve"] = sys.modules["Crypto"] = sys.modules["Crypto.Hash"] = None
from snapshotter.core.errors import PreconditionError
from snapshotter.nodes import files, identity, profiles
try:
    identity.read({str(data)!r}, profiles.get("besu"))
except PreconditionError as error:
    assert error.cure == f"{{sys.prefix}}/bin/pip install 'node-snapshotter[identity]'"
    print(identity.for_record({str(data)!r}, profiles.get("besu")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("('', \"the node's address is not recorded"), done.stderr


# In a set and in a clone.


def test_a_set_knows_the_address_and_a_clone_has_no_key(tmp_path: Path) -> None:
    data = besu(tmp_path / "data")
    (data / "key").chmod(0o644)
    command = Command(tmp_path / "etc")
    taken = command.json("take", str(data))
    assert command.json("identity", "show", taken["set_id"])["address"] == VECTORS[0][1]
    clone = tmp_path / "clone"
    restored = command.json("restore", taken["set_id"], "--to", str(clone))
    assert restored["withheld"] == [str(clone / "key")]
    assert any("--with-identity" in warning for warning in restored["warnings"])
    held = (clone / "key").read_text()
    assert "--with-identity" in held and permissions(clone / "key") == 0o600
    # Besu reads it as Bytes32.fromHexString: no hex digits, no start; and nothing of ours takes it for a key.
    assert not re.fullmatch(r"\s*(0x)?[0-9a-fA-F]{64}\s*", held)
    assert "withheld" in command.error("identity", "show", str(clone), exit_code=3)["message"]
    assert ONE.encode() not in b"".join(files_below(clone).values())
    assert files_below(data).keys() == files_below(clone).keys() and (data / "key").read_text() == f"0x{ONE}"
    command.json("release", str(clone))  # what was withheld isn't a change that somebody made
    # The set still has it, and so has whoever asks for it.
    whole = command.json("restore", taken["set_id"], "--to", str(clone), "--with-identity")
    assert whole["withheld"] == [] and (clone / "key").read_text() == f"0x{ONE}"
    assert any("never start it" in warning for warning in whole["warnings"])
    command.json("release", str(clone))
    error = command.error("restore", taken["set_id"], "--mount", str(clone), "--with-identity", exit_code=2)
    assert "--with-identity" in error["line"]


def test_a_take_of_a_clone_has_no_address(tmp_path: Path) -> None:
    command = Command(tmp_path / "etc")
    taken = command.json("take", str(besu(tmp_path / "data")))
    clone = tmp_path / "clone"
    command.json("restore", taken["set_id"], "--to", str(clone))
    again = command.json("take", str(clone))
    assert any("withheld" in warning for warning in again["warnings"])
    assert command.json("identity", "show", again["set_id"])["address"] is None


def test_paths_count_more_than_the_address(tmp_path: Path) -> None:
    """A birth record has 560 bytes: a data path that just fits must still be taken."""
    command = Command(tmp_path / "etc")
    above = tmp_path / ("a" * 160)
    above.mkdir()
    seen = []
    for length in range(10, 255, 30):  # the address takes 49 bytes
        done = command.run("take", str(besu(above / ("d" * length))), "--dry-run", "--json")
        if done.returncode != 0:
            assert "too long" in done.stdout
            break
        seen.append(any("no room" in warning for warning in json.loads(done.stdout)["warnings"]))
    assert seen[0] is False and seen[-1] is True and sorted(seen) == seen


def places(*pairs: tuple[Path, Path]) -> list[tuple[str, str]]:
    return [(str(there), str(here)) for there, here in pairs]


def test_withholding_touches_nothing_outside_the_clone(tmp_path: Path) -> None:
    """Links out of the clone, links within it, hard links to the store, a root beside it, a directory of keys."""
    profile = profiles.Profile(
        name="p",
        title="P",
        hot_safety=BESU.hot_safety,
        secrets=("key", "second", "third", "keys", "far/key", "deep/*/key"),
    )
    clone, beside, outside, store = (tmp_path / name for name in ("clone", "beside", "outside", "store"))
    for path in (clone / "keys/inner", clone / "deep/a", beside, outside, store):
        path.mkdir(parents=True)
    secret = b"SECRET"
    for path in (store / "key", clone / "keys/one", clone / "keys/inner/two", clone / "real", beside / "key",
                 outside / "key", outside / "third", clone / "deep/a/key"):  # fmt: skip
        path.write_bytes(secret)
    os.link(store / "key", clone / "key")
    (clone / "second").symlink_to("real")
    (clone / "third").symlink_to(outside / "third")  # what repoint would have cut; it must not be written through
    (clone / "far").symlink_to(beside)
    (clone / "keys/out").symlink_to(outside / "key")
    os.utime(clone, (1, 1))
    withheld = identity.withhold(places((Path("/production"), clone), (Path("/else"), beside)), profile)
    assert {str(Path(path).relative_to(tmp_path)) for path in withheld} == {
        "clone/key", "clone/real", "clone/third", "clone/keys/one", "clone/keys/inner/two", "clone/deep/a/key",
        "beside/key",
    }  # fmt: skip
    assert all(content == secret for content in [*files_below(outside).values(), *files_below(store).values()])
    assert not (clone / "third").is_symlink() and (clone / "second").is_symlink()
    for path in withheld:
        assert Path(path).read_bytes() == identity.PLACEHOLDER and permissions(Path(path)) == 0o600
    assert clone.stat().st_mtime == 1
    assert not [path for top in (clone, beside) for path in top.rglob(".snapshotter*")]


def test_a_link_above_a_secret_that_leads_out_is_not_entered(tmp_path: Path) -> None:
    profile = profiles.Profile(name="p", title="P", hot_safety=BESU.hot_safety, secrets=("config/key",))
    clone, outside = tmp_path / "clone", tmp_path / "outside"
    clone.mkdir()
    outside.mkdir()
    (outside / "key").write_text("production")
    (clone / "config").symlink_to(outside)
    assert identity.withhold(places((Path("/production"), clone)), profile) == []
    assert (outside / "key").read_text() == "production"


def test_a_key_file_in_another_root_is_withheld_there(tmp_path: Path) -> None:
    data, keys = besu(tmp_path / "data"), tmp_path / "keys"
    (data / "key").unlink()
    keys.mkdir()
    write_key(keys / "node.key", ONE)
    command = Command(
        tmp_path / "etc",
        config=f'[node.n]\npath = "{data}"\nprofile = "besu"\nkey_file = "{keys}/node.key"\nextra_paths = ["{keys}"]\n',
    )
    taken = command.json("take", "n")
    restored = command.json("restore", taken["set_id"], "--to", str(tmp_path / "clone"))
    assert restored["withheld"] == [str(tmp_path / "clone.roots/1/node.key")]
    assert ONE not in "".join(path.read_text() for path in Path(restored["withheld"][0]).parent.iterdir())
    assert (keys / "node.key").read_text() == ONE


def test_a_profile_that_is_gone_is_found_from_the_content(tmp_path: Path) -> None:
    """The user's own profile isn't on this host any more: the key is withheld all the same."""
    data = besu(tmp_path / "data")
    command = Command(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\nprofile = "mine"\n')
    own = command.home / "profiles"
    own.mkdir()
    (own / "mine.toml").write_text(
        'name = "mine"\ntitle = "M"\nsecrets = ["key"]\n[hot_safety]\nsafety = "unknown"\nreason = "r"\nsource = "s"\n'
    )
    taken = command.json("take", "n")
    shutil.rmtree(own)
    command.config.write_text(f'state = "{command.home}/state"\n')
    restored = command.json("restore", taken["set_id"], "--to", str(tmp_path / "clone"))
    assert restored["withheld"] == [str(tmp_path / "clone/key")]
    assert any("taken for besu" in warning for warning in restored["warnings"])


def test_a_leveldb_of_which_keys_are_withheld_does_not_open(tmp_path: Path) -> None:
    """EthereumJS keeps its key in a LevelDB and would make a new one without a word, if that were only empty."""
    plyvel = pytest.importorskip("plyvel")
    data = tmp_path / "data"
    (data / "net").mkdir(parents=True)
    for name in ("chain", "state", "meta", "config"):
        with plyvel.DB(str(data / "net" / name), create_if_missing=True) as database:
            database.put(b"config:client_key", b"SECRET-KEY")
    command = Command(tmp_path / "etc")
    taken = command.json("take", str(data))
    clone = tmp_path / "clone"
    assert command.json("restore", taken["set_id"], "--to", str(clone))["withheld"]
    assert not [name for name, content in files_below(clone / "net/config").items() if b"SECRET-KEY" in content]
    with pytest.raises(plyvel.Error):
        plyvel.DB(str(clone / "net/config"), create_if_missing=True)
    with plyvel.DB(str(clone / "net/chain")) as database:
        assert database.get(b"config:client_key") == b"SECRET-KEY"


# Carried along by a restore in place.


def test_carry_makes_the_identity_the_sources_and_drops_what_derived_from_another(tmp_path: Path) -> None:
    live, staged = besu(tmp_path / "data"), besu(tmp_path / "staged", "46" * 32)
    (live / "key").chmod(0o644)
    (staged / "nodeAddress").write_text("of another key")
    (staged / "database/CURRENT").write_text("the set's")
    names = identity.carry(str(live), str(staged), BESU, production=str(live))
    assert names == ["key"] and not (staged / "nodeAddress").exists()
    assert (staged / "key").read_text() == f"0x{ONE}" and permissions(staged / "key") == 0o600
    assert (staged / "database/CURRENT").read_text() == "the set's"
    assert (live / "key").read_text() == f"0x{ONE}", "the source keeps its own: an undo needs it"
    before = files_below(staged)
    assert identity.carry(str(live), str(staged), BESU, production=str(live)) == names
    assert files_below(staged) == before


@pytest.mark.root
def test_carry_keeps_the_owner(tmp_path: Path) -> None:
    live, staged = besu(tmp_path / "data"), besu(tmp_path / "staged", "46" * 32)
    os.chown(live / "key", 4711, 4712)
    identity.carry(str(live), str(staged), BESU, production=str(live))
    found = (staged / "key").stat()
    assert (found.st_uid, found.st_gid) == (4711, 4712)


def test_carry_of_nothing_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    live, staged = besu(tmp_path / "data"), besu(tmp_path / "staged")
    (live / "key").unlink()
    before = files_below(staged)
    with pytest.raises(PreconditionError, match="no identity"):
        identity.carry(str(live), str(staged), BESU, production=str(live))
    assert files_below(staged) == before


def test_carry_never_writes_through_a_link_into_production(tmp_path: Path) -> None:
    """The image's `key` is an absolute link to where another node's key lies now."""
    live, staged, elsewhere = besu(tmp_path / "data"), besu(tmp_path / "staged"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_key(elsewhere / "key", "46" * 32)
    (staged / "key").unlink()
    (staged / "key").symlink_to(elsewhere / "key")
    identity.carry(str(live), str(staged), BESU, production=str(live))
    assert (elsewhere / "key").read_text() == "46" * 32
    assert not (staged / "key").is_symlink() and (staged / "key").read_text() == f"0x{ONE}"
    # Both by the same link to one file outside: it is neither's to change.
    for top in (live, staged):
        (top / "key").unlink()
        (top / "key").symlink_to(elsewhere / "key")
    identity.carry(str(live), str(staged), BESU, production=str(live))
    assert (staged / "key").is_symlink() and (elsewhere / "key").read_text() == "46" * 32


def test_carry_takes_an_identity_that_is_a_database(tmp_path: Path) -> None:
    plyvel = pytest.importorskip("plyvel")
    profile = profiles.get("ethereumjs")
    for top, key in (("data", b"live"), ("staged", b"old")):
        (tmp_path / top / "net").mkdir(parents=True)
        with plyvel.DB(str(tmp_path / top / "net/config"), create_if_missing=True) as database:
            database.put(b"key", key)
    for _ in range(3):  # the more files one has, the more would be left of it
        with plyvel.DB(str(tmp_path / "staged/net/config")) as database:
            database.put(b"other", b"x")
    live, staged = str(tmp_path / "data"), str(tmp_path / "staged")
    identity.carry(live, staged, profile, production=live)
    with plyvel.DB(f"{staged}/net/config") as database:
        assert database.get(b"key") == b"live" and database.get(b"other") is None


def test_carry_killed_anywhere_is_called_again_and_does_the_rest(tmp_path: Path) -> None:
    """SIGKILL at random moments of a process that carries to and fro: what stands there is always one of both keys,
    whole, and another call ends it."""
    live, staged = besu(tmp_path / "data"), besu(tmp_path / "staged", "46" * 32)
    code = (
        "import sys; from snapshotter.nodes import identity, profiles; p = profiles.get('besu')\n"
        "print(flush=True)\n"
        f"while True: [identity.carry(a, {str(staged)!r}, p, production={str(live)!r}) for a in sys.argv[1:]]"
    )
    other = besu(tmp_path / "other", "46" * 32)
    wanted = {f"0x{ONE}", "0x" + "46" * 32}
    for turn in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, str(live), str(other)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.005 * turn)
        process.kill()
        process.wait()
        process.stdout.close()
        assert (staged / "key").read_text() in wanted
        identity.carry(str(live), str(staged), BESU, production=str(live))
        assert (staged / "key").read_text() == f"0x{ONE}"
        assert not list(staged.glob(".snapshotter*"))


def test_secret_files_are_those_in_the_places(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("config/node_key.json", "config/priv_validator_key.json", "keyring-test/a.info", "config/app.toml"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("{}")
    found = identity.secret_files(places((home, home)), COMETBFT)
    assert {Path(path).name for path in found} == {"node_key.json", "priv_validator_key.json", "a.info"}


# Kept safe: export and restore.


@pytest.fixture
def secret(tmp_path: Path) -> str:
    (tmp_path / "secret").write_text("four words and more\nsecond line\n")
    (tmp_path / "secret").chmod(0o600)
    return str(tmp_path / "secret")


def test_a_lost_key_comes_back(tmp_path: Path, secret: str) -> None:
    data = besu(tmp_path / "data")
    (data / "nodeAddress").write_text("derived")
    command = Command(tmp_path / "etc")
    kept = tmp_path / "key.age"
    exported = command.json("identity", "export", str(data), "--to", str(kept), "--passphrase-file", secret)
    assert exported["names"] == ["key", "nodeAddress"] and exported["address"] == VECTORS[0][1]
    assert permissions(kept) == 0o600 and ONE not in kept.read_text()
    assert kept.read_text().startswith("-----BEGIN AGE ENCRYPTED FILE-----")
    assert "there already" in command.error(
        "identity", "export", str(data), "--to", str(kept), "--passphrase-file", secret, exit_code=2
    )["message"]  # fmt: skip
    for name in ("key", "nodeAddress"):
        (data / name).unlink()
    assert "makes a new one" in command.error("identity", "show", str(data), exit_code=4)["message"]
    back = command.json("identity", "restore", str(kept), str(data), "--passphrase-file", secret)
    assert back["address"] == VECTORS[0][1] and back["replaced"] is None
    assert (data / "key").read_text() == f"0x{ONE}" and permissions(data / "key") == 0o600
    assert (data / "nodeAddress").read_text() == "derived"
    again = command.json("identity", "restore", str(kept), str(data), "--passphrase-file", secret)
    assert again["replaced"] is None, "the same identity is nothing to ask about"


@pytest.mark.parametrize("where", ["data", "key_file"])
def test_a_key_that_was_open_to_all_is_restored_closed(tmp_path: Path, where: str) -> None:
    data = besu(tmp_path / "data")
    (data / "key").chmod(0o644)
    write_key(data / "nodeAddress", "derived", 0o644)
    contents = identity.collect(str(data), BESU)
    assert contents["key"][1] == 0o644
    key_file = str(tmp_path / "node.key") if where == "key_file" else None
    owner = (os.geteuid(), os.getegid())
    identity.install(str(data), contents, BESU, key_file, owner, str(tmp_path / "kept"))
    assert permissions(Path(key_file) if key_file else data / "key") == 0o600
    assert permissions(data / "nodeAddress") == 0o644, "no secret: others may read it"


def test_another_key_is_replaced_only_by_request_and_never_lost(tmp_path: Path, secret: str) -> None:
    data = besu(tmp_path / "data")
    command = Command(tmp_path / "etc")
    kept = tmp_path / "key.age"
    command.json("identity", "export", str(data), "--to", str(kept), "--passphrase-file", secret)
    write_key(data / "key", "46" * 32)
    words = ("identity", "restore", str(kept), str(data), "--passphrase-file", secret)
    error = command.error(*words, exit_code=3)
    assert VECTORS[0][1] in error["message"] and VECTORS[2][1] in error["message"] and "--replace" in error["cure"]
    assert (data / "key").read_text() == "46" * 32
    done = command.json(*words, "--replace")
    assert done["replaced"] == VECTORS[2][1] and (data / "key").read_text() == f"0x{ONE}"
    saved = [path for path in (command.home / "state").rglob("key")]
    assert [path.read_text() for path in saved] == ["46" * 32] and permissions(saved[0]) == 0o600
    assert not list(data.glob("key?*")), "a copy of a key in the data path would be in every image"


@pytest.mark.parametrize("standing", ["rubbish", "directory"])
def test_what_cannot_be_judged_is_not_overwritten_unasked(tmp_path: Path, secret: str, standing: str) -> None:
    data = besu(tmp_path / "data")
    command = Command(tmp_path / "etc")
    kept = tmp_path / "key.age"
    command.json("identity", "export", str(data), "--to", str(kept), "--passphrase-file", secret)
    (data / "key").unlink()
    (data / "key").mkdir() if standing == "directory" else (data / "key").write_text("rubbish")
    command.error("identity", "restore", str(kept), str(data), "--passphrase-file", secret, exit_code=3)
    assert (data / "key").is_dir() if standing == "directory" else (data / "key").read_text() == "rubbish"


def test_the_wrong_passphrase_and_a_damaged_file(tmp_path: Path, secret: str) -> None:
    data = besu(tmp_path / "data")
    command = Command(tmp_path / "etc")
    kept = tmp_path / "key.age"
    command.json("identity", "export", str(data), "--to", str(kept), "--passphrase-file", secret)
    (tmp_path / "wrong").write_text("guess\n")
    words = ("identity", "restore", str(kept), str(data), "--passphrase-file")
    assert "passphrase" in command.error(*words, str(tmp_path / "wrong"), exit_code=3)["message"]
    content = kept.read_text()
    kept.write_text(content.replace(content[200:204], "AAAA", 1))
    command.error(*words, secret, exit_code=3)
    (tmp_path / "empty").write_text("\n")
    assert "empty" in command.error(*words, str(tmp_path / "empty"), exit_code=2)["message"]
    # No terminal, no file: it says how, and waits for nobody.
    assert "--passphrase-file" in command.error("identity", "restore", str(kept), str(data), exit_code=2)["cure"]


def test_a_clones_placeholder_is_never_exported_and_gives_way(tmp_path: Path, secret: str) -> None:
    data = besu(tmp_path / "data")
    command = Command(tmp_path / "etc")
    kept = tmp_path / "key.age"
    command.json("identity", "export", str(data), "--to", str(kept), "--passphrase-file", secret)
    taken = command.json("take", str(data))
    clone = tmp_path / "clone"
    command.json("restore", taken["set_id"], "--to", str(clone))
    words = ("--passphrase-file", secret)
    assert (
        "withheld"
        in command.error("identity", "export", str(clone), "--to", f"{kept}2", *words, exit_code=3)["message"]
    )
    command.json("identity", "restore", str(kept), str(clone), *words)
    assert (clone / "key").read_text() == f"0x{ONE}"


def test_a_busy_instant_neither_weakens_an_export_nor_keeps_it_shut(
    tmp_path: Path, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library times one small hash, and takes what that says for the machine's speed."""
    import pyrage

    made: list[int] = []
    opened: list[int] = []

    def encrypt(plain: bytes, word: str, *, armored: bool) -> bytes:
        made.append(1)
        raw = pyrage.passphrase.encrypt(plain, word)
        raw = re.sub(rb" \d+\n", b" 11\n" if len(made) == 1 else b" 18\n", raw, count=1)
        lines = base64.b64encode(raw)
        lines = b"\n".join(lines[n : n + 64] for n in range(0, len(lines), 64))
        return b"-----BEGIN AGE ENCRYPTED FILE-----\n" + lines + b"\n-----END AGE ENCRYPTED FILE-----\n"

    def decrypt(sealed: bytes, word: str) -> bytes:
        opened.append(1)
        if len(opened) < 3:
            raise pyrage.DecryptError("Excessive work parameter for passphrase.")
        return b"plain"

    monkeypatch.setattr(verb, "_age", lambda: SimpleNamespace(encrypt=encrypt, decrypt=decrypt))
    assert verb._work(verb._sealed(b"plain", "word")) == 18 and len(made) == 2
    assert verb._unsealed(b"", "word", "file") == b"plain" and len(opened) == 3


def test_more_work_than_the_machine_is_fit_for_is_no_wrong_passphrase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyrage

    raw = re.sub(rb" \d+\n", b" 40\n", pyrage.passphrase.encrypt(b"plain", "word"), count=1)
    monkeypatch.setattr(verb, "_PATIENCE_S", 0.2)
    with pytest.raises(PreconditionError, match="more work") as caught:
        verb._unsealed(raw, "word", "file")
    assert "age -d" in caught.value.cure


def test_the_file_opens_with_age_itself(tmp_path: Path, secret: str) -> None:
    """With the age program where it is installed, else with the library: a tar of the files by their names."""
    data = besu(tmp_path / "data")
    kept, plain = tmp_path / "key.age", tmp_path / "plain.tar"
    command = Command(tmp_path / "etc")
    command.json("identity", "export", str(data), "--to", str(kept), "--passphrase-file", secret)
    if shutil.which("age"):
        pid, terminal = pty.fork()
        if pid == 0:
            os.execvp("age", ["age", "-d", "-o", str(plain), str(kept)])
        time.sleep(1)
        os.write(terminal, b"four words and more\n")
        assert os.waitpid(pid, 0)[1] == 0
        os.close(terminal)
    else:
        plain.write_bytes(verb._unsealed(kept.read_bytes(), "four words and more", str(kept)))
    with tarfile.open(plain) as tar:
        assert tar.getnames() == ["identity.json", "key"]
        key = tar.extractfile("key")
        assert key is not None and key.read() == f"0x{ONE}".encode()


def test_a_cometbft_home_and_its_two_keys(tmp_path: Path, secret: str) -> None:
    home = tmp_path / "home"
    (home / "config").mkdir(parents=True)
    (home / "data/blockstore.db").mkdir(parents=True)
    (home / "data/priv_validator_state.json").write_text('{"height": "5", "round": 0, "step": 3}')
    for number, name in enumerate(("node_key.json", "priv_validator_key.json")):
        key = {
            "priv_key": {
                "type": "tendermint/PrivKeySecp256k1",
                "value": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" + "EI"[number] + "=",
            }
        }
        write_key(home / "config" / name, json.dumps(key))
    command = Command(tmp_path / "etc")
    shown = command.json("identity", "show", str(home), "--host", "10.0.0.1")
    assert shown["validator"] and shown["url"] == f"{shown['address']}@10.0.0.1:26656"
    exported = command.json("identity", "export", str(home), "--to", str(tmp_path / "k"), "--passphrase-file", secret)
    assert exported["names"] == ["config/node_key.json", "config/priv_validator_key.json"], "never the sign-state"
    before = files_below(home)
    shutil.rmtree(home / "config")
    command.json("identity", "restore", str(tmp_path / "k"), str(home), "--passphrase-file", secret)
    assert files_below(home) == before


def test_no_command_says_the_key(tmp_path: Path, secret: str) -> None:
    """Every way of asking, errors and tracebacks included."""
    key = "d3ad" * 16
    data = besu(tmp_path / "data", key)
    command = Command(tmp_path / "etc")
    said = ""
    taken = command.json("take", str(data))
    clone, kept = str(tmp_path / "c"), str(tmp_path / "k")
    for words in (
        ["take", str(data), "-v"], ["take", str(data), "-n"], ["list"], ["show", taken["set_id"]],
        ["identity", "show", str(data)], ["identity", "show", taken["set_id"], "-v"],
        ["restore", taken["set_id"], "--to", clone, "-v"], ["identity", "show", clone, "-v"],
        ["identity", "export", str(data), "--to", kept, "--passphrase-file", secret, "-v"],
        ["identity", "restore", kept, str(data), "--passphrase-file", str(data / "key"), "-v"],
        ["identity", "restore", kept, str(data), "--passphrase-file", secret, "-v"],
        ["identity", "restore", str(data / "key"), str(data), "--passphrase-file", secret, "-v"],
    ):  # fmt: skip
        for more in ([], ["--json"]):
            done = command.run(*words, *more)
            said += done.stdout + done.stderr
    write_key(data / "key", f"{key}0")
    done = command.run("identity", "show", str(data), "-v")
    assert done.returncode == 3
    said += done.stdout + done.stderr
    assert "d3add3ad" not in said and "four words" not in said
    assert b"d3add3ad" not in b"".join(files_below(command.home).values())


def test_errors_name_the_way_out(tmp_path: Path) -> None:
    besu(tmp_path / "data")
    (tmp_path / "data/key").write_text("rubbish")
    with pytest.raises(SnapshotterError) as caught:
        identity.read(str(tmp_path / "data"), BESU)
    assert "identity restore" in caught.value.cure


def test_a_secret_that_can_not_be_read_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An inode of a damaged disk: EUCLEAN, not only for its content."""
    (tmp_path / "keystore").mkdir()
    for name in ("UTC--1", "UTC--2"):
        (tmp_path / "keystore" / name).write_text("a key")
    read = files.read

    def damaged(path: str, most: int) -> tuple[bytes, os.stat_result]:
        if path.endswith("UTC--1"):
            raise OSError(errno.EUCLEAN, "Structure needs cleaning")
        return read(path, most)

    monkeypatch.setattr(files, "read", damaged)
    found = identity.secrets_of([(str(tmp_path), str(tmp_path))], profiles.get("geth"))
    assert [(name, content) for name, content, _ in found] == [("keystore/UTC--1", b""), ("keystore/UTC--2", b"a key")]
