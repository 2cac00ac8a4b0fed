"""Keys that only the live data has: no restore takes them away without a word."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import plyvel
import pytest

from tests.faults.in_place_kit import Story, difference, ok, picture, story

KEYS = {"geth/nodekey": "17" * 32, "geth/jwtsecret": "ab", "keystore/UTC--1": "the first"}


def begin(node: Story, profile: str = "geth") -> Path:
    """A geth data path, and a set of it; then an account is made, and its database breaks."""
    if node.provider == "btrfs":
        subprocess.run(["btrfs", "subvolume", "create", str(node.data)], check=True, capture_output=True)
    for name, content in KEYS.items():
        path = node.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o600)
    plyvel.DB(str(node.data / "geth/chaindata"), create_if_missing=True).close()
    with node.command.config.open("a") as config:
        config.write(f'profile = "{profile}"\n')
    ok(node, "take", "ours")
    node.of_set = picture(node.data)
    later = node.data / "keystore/UTC--2"
    later.write_text("the second")
    later.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(later, 4711, 4712)
    (node.data / "geth/jwtsecret").write_text("made anew")
    for path in (node.data / "geth/chaindata").iterdir():
        path.write_text("broken")
    node.old = picture(node.data)
    return later


@pytest.mark.parametrize(
    "kind", ["copy", *(pytest.param(k, marks=pytest.mark.root) for k in ("btrfs", "entries", "away"))]
)
def test_an_account_made_since_the_take_is_kept(tmp_path: Path, kind: str) -> None:
    with story(kind, tmp_path) as node:
        later = begin(node)
        done = ok(node, *(restore := ("restore", "latest", *node.in_place)))
        assert done["way"] == ("swap" if kind == "btrfs" else "copy")
        said = "\n".join(done["warnings"])
        assert "kept, as the set has none: keystore/UTC--2" in said and "the second" not in said
        assert "only what was set aside has: geth/jwtsecret" in said and "UTC--1" not in said
        assert later.read_text() == "the second"
        found = later.stat()
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert os.geteuid() != 0 or (found.st_uid, found.st_gid) == (4711, 4712)
        aside = Path(done["aside"][0]).name
        now = {name: what for name, what in picture(node.data).items() if not name.startswith(aside)}
        assert difference(now, node.of_set) in (["keystore/UTC--2"], ["keystore/UTC--2", "lost+found"])
        asked = ok(node, "restore", "--discard", "ours", code=2)
        assert "geth/jwtsecret" in str(asked) and "UTC--" not in str(asked)
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was(), difference(picture(node.data), node.old)
        ok(node, *restore)
        ok(node, "restore", "--discard", "ours", "--yes")
        assert later.read_text() == "the second"


def test_an_identity_is_never_mixed(tmp_path: Path) -> None:
    """The set's was chosen; the live one is named, as it is gone with what is set aside."""
    with story("copy", tmp_path) as node:
        begin(node)
        (node.data / "geth/nodekey").write_text("18" * 32)
        done = ok(node, "restore", "latest", *node.in_place, "--identity", "set")
        named = "only what was set aside has: geth/jwtsecret, geth/nodekey, keystore/UTC--2"
        assert named in "\n".join(done["warnings"]) and not (node.data / "keystore/UTC--2").exists()
        assert (node.data / "geth/nodekey").read_text() == KEYS["geth/nodekey"]
        assert "geth/nodekey" in str(ok(node, "restore", "--discard", "ours", code=2))


def test_what_can_not_be_kept_does_not_bar_the_restore(tmp_path: Path) -> None:
    """It is no key, or too large to be one: named, if it is a file, and the others are kept all the same."""
    with story("copy", tmp_path) as node:
        later = begin(node)
        large = later.with_name("UTC--3")
        with large.open("wb") as file:
            file.truncate(65 << 20)
        os.mkfifo(later.with_name("UTC--4"))
        said = "\n".join(ok(node, "restore", "latest", *node.in_place)["warnings"])
        assert "only what was set aside has: geth/jwtsecret, keystore/UTC--3" in said and "UTC--4" not in said
        assert later.exists() and not large.exists()
