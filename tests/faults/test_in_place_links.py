"""Parts of a node whose directories are reached through links: what the link leads to changes places, the link stays,
and nothing in an image is ever looked for in production."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import plyvel
import pytest

from snapshotter.nodes import profiles
from snapshotter.verbs import in_place_stage as staging
from tests.faults.in_place_kit import Story, difference, ok, own_disk, picture
from tests.support import Command

KEY = "0x" + "17" * 32


class Geth(Story):
    """`geth` in the data path is a link to another directory; no service."""

    def __init__(self, place: Path, home: Path) -> None:
        self.place, self.data, self.fast = place, place / "node", place / "fast"
        self.data.mkdir()
        (self.fast / "chaindata").mkdir(parents=True)
        (self.data / "geth").symlink_to(self.fast)
        (self.data / "keystore").mkdir()
        self.write("one")
        (self.fast / "nodekey").write_text(KEY[2:])
        self.command = Command(
            home / "etc", config=f'[node.ours]\npath = "{self.data}"\nprofile = "geth"\nprovider = "copy"\n'
        )

    def write(self, value: str) -> None:
        database = plyvel.DB(str(self.fast / "chaindata"), create_if_missing=True)
        database.put(b"value", value.encode())
        database.close()

    def both(self) -> dict[str, object]:
        return {**picture(self.data), **{f"fast/{name}": what for name, what in picture(self.fast).items()}}


@pytest.fixture
def geth(tmp_path: Path) -> Iterator[Geth]:
    with own_disk(tmp_path) as disk:
        yield Geth(disk, tmp_path)


def chaindata(node: Geth) -> dict[str, object]:
    return dict(picture(node.fast / "chaindata"))


def test_only_the_database_behind_a_link(geth: Geth) -> None:
    assert len(ok(geth, "take", "ours")["roots"]) == 2
    of_set = chaindata(geth)
    geth.write("two")
    (geth.fast / "nodekey").write_text("18" * 32)
    before = geth.both()
    ok(geth, "restore", "latest", "--in-place", "--only", "database", "--yes")
    assert not difference(chaindata(geth), of_set)
    assert os.readlink(geth.data / "geth") == str(geth.fast) and (geth.fast / "nodekey").read_text() == "18" * 32
    ok(geth, "restore", "--undo", "ours")
    assert not difference(geth.both(), before)
    assert sorted(os.listdir(geth.place)) == sorted([".snapshotter", "fast", "node", *lost_found(geth.place)])
    ok(geth, "restore", "latest", "--in-place", "--only", "database", "--yes")
    ok(geth, "restore", "--discard", "ours", "--yes")
    assert not difference(chaindata(geth), of_set)
    assert sorted(os.listdir(geth.place)) == sorted([".snapshotter", "fast", "node", *lost_found(geth.place)])


def lost_found(place: Path) -> list[str]:
    return ["lost+found"] if (place / "lost+found").exists() else []


def test_only_the_key_behind_a_link_also_where_it_is_gone(geth: Geth) -> None:
    ok(geth, "take", "ours")
    (geth.fast / "nodekey").unlink()
    geth.write("two")
    before = geth.both()
    ok(geth, "restore", "latest", "--in-place", "--only", "key", "--yes")
    assert (geth.fast / "nodekey").read_text() == KEY[2:]
    assert difference(geth.both(), before) == ["fast/nodekey"]
    ok(geth, "restore", "--undo", "ours")
    assert not difference(geth.both(), before)


def test_a_part_that_a_link_leads_out_of_the_set_for_is_refused(geth: Geth) -> None:
    ok(geth, "take", "ours")
    elsewhere = geth.place / "elsewhere"
    (geth.data / "geth").unlink()
    (geth.fast).rename(elsewhere)
    (geth.data / "geth").symlink_to(elsewhere)
    before = picture(elsewhere)
    error = ok(geth, "restore", "latest", "--in-place", "--only", "database", "--yes", code=3)
    assert str(elsewhere) in error["message"]
    assert picture(elsewhere) == before and not geth.leftovers()


def test_what_is_stale_is_never_looked_for_in_production(tmp_path: Path) -> None:
    """A link in what was made ready still names the live place."""
    live, made = tmp_path / "live", tmp_path / "made"
    for top in (live, made):
        (top / "run").mkdir(parents=True)
        (top / "data").mkdir()
        (top / "data" / "run").symlink_to(live / "run")
        (top / "data" / "outside").symlink_to(tmp_path / "else")
        (top / "run" / "node.pid").write_text("1")
        (top / "data" / "node.pid").write_text("1")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "other.pid").write_text("1")
    import msgspec

    profile = msgspec.structs.replace(profiles.get("besu"), runtime=("*.pid", "run/*.pid", "outside/*.pid"))
    staging.strip(profile, [(str(live / name), str(made / name)) for name in ("data", "run")])
    assert (live / "run" / "node.pid").exists() and (live / "data" / "node.pid").exists()
    assert (tmp_path / "else" / "other.pid").exists()
    assert not (made / "run" / "node.pid").exists() and not (made / "data" / "node.pid").exists()


def test_only_the_key_where_the_directory_above_it_is_gone_too(geth: Geth) -> None:
    """It is made as it was in the set, the node's own, and an undo leaves none of it."""
    (geth.data / "geth").unlink()
    geth.fast.rename(geth.data / "geth")
    if os.geteuid() == 0:
        os.chown(geth.data / "geth", 65534, 65534)
    ok(geth, "take", "ours")
    like = (geth.data / "geth").stat()
    (geth.data / "geth").rename(geth.place / "lost")
    ok(geth, "restore", "latest", "--in-place", "--only", "key", "--yes")
    made = (geth.data / "geth").stat()
    assert (made.st_uid, made.st_gid, made.st_mode) == (like.st_uid, like.st_gid, like.st_mode)
    assert (geth.data / "geth" / "nodekey").read_text() == KEY[2:]
    ok(geth, "restore", "--undo", "ours")
    assert not (geth.data / "geth").exists()
