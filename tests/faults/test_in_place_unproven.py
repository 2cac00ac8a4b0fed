"""Databases that there is no check for (Pebble, geth's own choice; MDBX): `verify` says that it can't tell, a restore
in place goes on with a warning, and what is damaged beside them is refused all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import plyvel
import pytest

from snapshotter.checks import Finding, Outcome, Proof, proof_of
from snapshotter.core.errors import PreconditionError
from snapshotter.verbs.verify import failure, require
from tests.faults.in_place_kit import ok, own_disk
from tests.support import Command

WHY = "there is no check for pebble yet"
WARNING = f"{WHY}: its content was not proven"


class Geth:
    """A geth on Pebble; its list of peers is a LevelDB. No service."""

    def __init__(self, place: Path, home: Path) -> None:
        self.place, self.data = place, place / "node"
        self.chaindata, self.nodes = self.data / "geth" / "chaindata", self.data / "geth" / "nodes"
        self.chaindata.mkdir(parents=True)
        for name in ("CURRENT", "MANIFEST-000001", "OPTIONS-000003", "marker.manifest.000001.MANIFEST-000001"):
            (self.chaindata / name).write_text("of the set")
        plyvel.DB(str(self.nodes), create_if_missing=True).close()
        (self.data / "geth" / "nodekey").write_text("17" * 32)
        self.command = Command(
            home / "etc", config=f'[node.ours]\npath = "{self.data}"\nprofile = "geth"\nprovider = "copy"\n'
        )

    def leftovers(self) -> list[str]:
        return [str(path) for path in self.place.iterdir() if ".restoring-" in path.name]


@pytest.fixture
def geth(tmp_path: Path) -> Iterator[Geth]:
    with own_disk(tmp_path) as disk:
        yield Geth(disk, tmp_path)


@pytest.mark.parametrize("part", [(), ("--only", "database")], ids=["whole", "database"])
def test_a_node_on_pebble_is_restored_with_a_warning(geth: Geth, part: tuple[str, ...]) -> None:
    ok(geth, "take", "ours")
    (geth.chaindata / "CURRENT").write_text("broken")
    done = ok(geth, "restore", "latest", "--in-place", *part, "--yes")
    assert any(f"{geth.chaindata}: {WARNING}" in line for line in done["warnings"]), done
    assert (geth.chaindata / "CURRENT").read_text() == "of the set"


def test_verify_says_that_it_cant_tell(geth: Geth) -> None:
    ok(geth, "take", "ours")
    done = geth.command.run("verify", "ours")
    assert done.returncode == 3 and "tool-missing" in done.stdout, done
    assert "no check for pebble" in done.stdout and "install" not in done.stdout + done.stderr


def test_what_is_damaged_beside_it_is_refused(geth: Geth) -> None:
    (geth.nodes / "CURRENT").write_text("no MANIFEST")
    ok(geth, "take", "ours")
    (geth.chaindata / "CURRENT").write_text("broken")
    error = ok(geth, "restore", "latest", "--in-place", "--yes", code=8)
    assert f"{geth.nodes}: CURRENT doesn't name a MANIFEST" in error["message"]
    assert (geth.chaindata / "CURRENT").read_text() == "broken"


PEBBLE = Finding("pebble", "/data/chaindata", 1, Outcome.TOOL_MISSING, WHY, no_check=True)
FINE = Finding("leveldb", "/data/nodes", 2, Outcome.OK)
MISSING = Finding("sqlite", "/data/one", 1, Outcome.TOOL_MISSING, "its library isn't installed")
NEWER = Finding("rocksdb", "/data/two", 1, Outcome.TOOL_TOO_OLD, "the MANIFEST has tag 99")


@pytest.mark.parametrize(("other", "cure"), [(MISSING, "install it"), (NEWER, "install a newer one")])
def test_what_could_be_proven_is_still_to_be(other: Finding, cure: str) -> None:
    """Also where what can't be is named first."""
    found = SimpleNamespace(set_id="s1")
    with pytest.raises(PreconditionError, match=other.why) as caught:
        require(found, proof_of((PEBBLE, FINE, other), 2))  # type: ignore[arg-type]
    assert caught.value.cure.startswith(cure)
    assert require(found, proof_of((PEBBLE, FINE), 2)) == [f"/data/chaindata: {WARNING}"]  # type: ignore[arg-type]


def test_nobody_is_told_to_install_what_there_isnt() -> None:
    for proof in (Proof(1, Outcome.TOOL_MISSING, (PEBBLE, FINE)), Proof(4, Outcome.TOOL_MISSING, (FINE,))):
        error = failure("s1", proof)
        assert error is not None and error.cure == f"verify with --level {proof.level}"
