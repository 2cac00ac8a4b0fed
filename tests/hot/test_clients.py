"""A real Ethereum client taken hot: its clone has the same node key and goes on where the image was taken."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshotter import provider
from snapshotter.nodes import profiles
from tests.hot.clients.ethereumjs import NETWORK, SIGNER, EthereumJs
from tests.support import Command, loop_file_system

Client = Callable[[Path], EthereumJs]

pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm: the Ethereum client runs on them"
)


@pytest.fixture
def client() -> Iterator[Client]:
    """Starts clients and ends them, whatever the test does."""
    clients: list[EthereumJs] = []

    def begin(data: Path) -> EthereumJs:
        clients.append(EthereumJs(data))
        return clients[-1]

    yield begin
    for one in clients:
        one.kill()


@contextlib.contextmanager
def place_of(kind: str, tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of this kind; "here" is what tmp_path is on."""
    if kind == "here":
        yield tmp_path
    else:
        with loop_file_system(kind, tmp_path, 600) as place:
            yield place


WAYS = [
    pytest.param("copy", "here", id="copy"),
    pytest.param("copy", "btrfs", id="copy-by-reflink", marks=pytest.mark.root),
    *([pytest.param("btrfs", "btrfs", id="btrfs", marks=pytest.mark.root)] if "btrfs" in provider.BUILT_IN else []),
]


@pytest.mark.parametrize(("how", "kind"), WAYS)
def test_a_client_is_taken_hot_and_its_clone_goes_on(
    tmp_path: Path, client: Client, request: pytest.FixtureRequest, how: str, kind: str
) -> None:
    rounds = 5 if request.config.getoption("--full") else 2
    with place_of(kind, tmp_path) as place:
        node = client(place / "node")
        try:
            node.wait_for(3)
            take_and_revive(place, node, client, how, rounds)
        finally:
            node.kill()  # before its file system goes


def take_and_revive(place: Path, node: EthereumJs, client: Client, how: str, rounds: int) -> None:
    config = f'[node.ours]\npath = "{node.data}"\nrpc = "{node.rpc}"\nprovider = "{how}"\n'
    command = Command(place / "etc", config=config)
    assert command.json("take", "--dry-run")["profile"] == "ethereumjs"
    for turn in range(rounds):
        before = node.height()
        taken = command.json("take")
        after = node.height()
        assert taken["good"] and taken["state"] == "ready", taken
        assert {member["provider"] for member in taken["snapshots"]} == {how}
        check_height(taken, node, before, after)
        clone = place / f"clone-{turn}"
        # The same node is to come up again, alone on the loopback interface.
        command.json("restore", taken["set_id"], "--to", str(clone), "--with-identity")
        node.wait_for(after + 1)  # it goes on; its clone isn't fed from it
        revived = client(clone)
        try:
            check_revived(revived, node, taken, before)
        finally:
            revived.kill()
        command.json("release", str(clone), "--discard-changes")
        assert not clone.exists() or not any(clone.iterdir())
    sets = command.json("list", "ours")["sets"]
    assert len(sets) == rounds and all(entry["good"] for entry in sets)
    assert node.chain(node.height())


def check_height(taken: dict[str, Any], node: EthereumJs, before: int, after: int) -> None:
    """The height and block that the set names are those that the node had."""
    assert before <= taken["height"] <= after, (before, taken["height"], after)
    assert taken["block"] == node.block(taken["height"])["hash"]


def check_revived(revived: EthereumJs, node: EthereumJs, taken: dict[str, Any], before: int) -> None:
    """The clone is the same node, has all that the original had, and seals blocks of its own on top."""
    assert revived.node_id() == node.node_id(), "another enode: the node key was not in the image"
    start = revived.height()
    assert start >= taken["height"] >= before
    revived.wait_for(start + 2)
    chain = revived.chain(start + 2)
    assert chain[: taken["height"] + 1] == node.chain(taken["height"])
    assert revived.funds(start + 2) == node.funds(taken["height"]) > 0, "the state behind the blocks is not there"
    assert revived.call("net_peerCount") == "0x0", "the clone must have found its blocks in the image, not at a peer"


def test_the_profile_names_what_the_client_writes(tmp_path: Path, client: Client) -> None:
    """Each group of the profile against a data path that the client itself has made."""
    node = client(tmp_path / "node")
    node.wait_for(2)
    key = node.node_id()
    node.kill()
    profile, why = profiles.detect(str(node.data))
    assert profile.name == "ethereumjs", why

    def found(*patterns: str) -> set[str]:
        return {path for pattern in patterns for path in profiles.matches(str(node.data), pattern)}

    units = found(*profile.database) | found(*profile.identity)
    assert units == {str(file.parent) for file in node.data.rglob("CURRENT")}, "every LevelDB has its place"
    below = {str(entry) for entry in (node.data / NETWORK).iterdir() if "log" not in entry.name}
    audit = {path for path in below if path.endswith("-audit.json")}  # of the logs' rotation
    assert below - units - found(*profile.runtime) - audit == {str(node.data / NETWORK / "invalidPayloads")}

    # The node key is in the identity and nowhere else; mode 0600 on the secrets doesn't keep the owner out.
    for path in found(*profile.secrets):
        assert stat.S_ISREG(os.stat(path).st_mode), "mode 0600 shuts a directory"
        os.chmod(path, 0o600)
    for path in found(*profile.runtime):
        os.unlink(path)
    again = client(node.data)
    assert again.node_id() == key
    again.kill()
    (kept,) = found(*profile.identity)
    os.rename(kept, tmp_path / "kept")
    another = client(node.data)
    assert another.node_id() != key
    another.kill()
    shutil.rmtree(kept)
    os.rename(tmp_path / "kept", kept)
    back = client(node.data)
    assert back.node_id() == key and back.height() >= 2
    assert int(back.call("eth_getBalance", SIGNER, "latest"), 16) > 0
