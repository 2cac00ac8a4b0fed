"""The operators' guide, step by step, each by its command of docs/from-the-guide.md; and the guide's four errors."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.faults.in_place_kit import Story, difference, ok, picture, story
from tests.support import CHECKOUT, check_database

SET = "latest:ours"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """One node for all steps: each leaves it as it was, running on damaged data, with one set of when it was well."""
    with story("copy", tmp_path_factory.mktemp("guide")) as made:
        made.begin()
        made.run_and_damage()
        yield made


@pytest.fixture
def undone(node: Story) -> Iterator[Story]:
    yield node
    ok(node, "restore", "--undo", "ours")
    assert node.as_it_was() and node.service.running()


def test_a_backup_with_the_node_stopped(node: Story) -> None:
    before = node.service.did().count("start")
    taken = ok(node, "take", "ours", "--quiesce", "stop")
    assert taken["grade"] == "application" and node.service.running()
    assert node.service.did().count("start") == before + 1
    ok(node, "delete", taken["set_id"], "--yes", "--last")


def test_a_hot_backup(node: Story) -> None:
    pid = node.service.pid()
    taken = ok(node, "take", "ours")
    assert taken["good"] and node.service.pid() == pid
    ok(node, "delete", taken["set_id"], "--yes", "--last")


def test_restore_in_full(undone: Story) -> None:
    ok(undone, "restore", SET, "--in-place", "--yes")
    assert undone.restored() and undone.service.running()


def test_the_key_has_mode_0600_and_its_owner(undone: Story) -> None:
    ok(undone, "restore", SET, "--in-place", "--yes")
    found = (undone.data / "key").stat()
    assert found.st_mode & 0o777 == 0o600 and found.st_uid == undone.data.stat().st_uid


def test_the_damaged_data_is_kept_as_corrupted(undone: Story) -> None:
    done = ok(undone, "restore", SET, "--in-place", "--yes")
    (aside,) = done["aside"]
    assert aside.startswith(f"{undone.data}.corrupted-")
    assert not difference(picture(Path(aside)), undone.old)


def test_restore_the_key_alone_then_sync(node: Story) -> None:
    key = (node.data / "key").read_text()
    (node.data / "key").unlink()
    ok(node, "restore", SET, "--in-place", "--only", "key", "--yes")
    assert (node.data / "key").read_text() == key
    ok(node, "restore", "--discard", "ours", "--yes")
    ok(node, "resync", "ours", "--yes")
    assert (node.data / "key").read_text() == key and not (node.data / "database" / "later").exists()
    ok(node, "restore", "--undo", "ours")
    assert not difference(picture(node.data), node.old) and node.service.running()


def test_the_database_from_the_backup(undone: Story, tmp_path: Path) -> None:
    ok(undone, "restore", SET, "--in-place", "--only", "database", "--yes")
    shutil.copytree(undone.data, tmp_path / "copy")
    assert check_database(tmp_path / "copy") == {"head": 200, "lost": 0}


def test_the_database_anew(undone: Story) -> None:
    ok(undone, "resync", "ours", "--yes")
    assert undone.service.running() and os.listdir(undone.data / "database") == ["node.log"]


def test_a_test_restore_in_a_temporary_place(node: Story) -> None:
    place = node.place / "test-restore"
    ok(node, "restore", SET, "--to", str(place))
    assert check_database(place) == {"head": 200, "lost": 0}
    ok(node, "release", str(place), "--discard-changes")
    assert node.as_it_was() and not place.exists()


def test_the_key_encrypted(node: Story, tmp_path: Path) -> None:
    """`age -d FILE | tar x` opens it, in ten years too."""
    import io
    import tarfile

    from pyrage import passphrase

    (tmp_path / "passphrase").write_text("of the guide's\n")
    file = tmp_path / "validator-1.age"
    ok(node, "identity", "export", "ours", "--to", str(file), "--passphrase-file", str(tmp_path / "passphrase"))
    key = (node.data / "key").read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600 and key.strip() not in file.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(passphrase.decrypt(file.read_bytes(), "of the guide's"))) as tar:
        member = tar.extractfile("key")
        assert member is not None and member.read() == key


def test_configuration_in_the_data_path_is_part_of_every_set(node: Story) -> None:
    place = node.place / "test-restore"
    ok(node, "restore", SET, "--to", str(place))
    assert (place / "static-nodes.json").read_bytes() == (node.data / "static-nodes.json").read_bytes()
    ok(node, "release", str(place), "--discard-changes")


def test_kept_for_so_long(node: Story, tmp_path: Path) -> None:
    from snapshotter.nodes import config

    kept = {}
    for kind in ("validator", "rpc", "archive"):
        (tmp_path / "config.toml").write_text(f'[node.ours]\npath = "{node.data}"\ntype = "{kind}"\n')
        found = config.load(str(tmp_path / "config.toml")).nodes["ours"]
        kept[kind] = found.every, found.keep.daily, found.keep.weekly
    assert kept == {"validator": (86400, 7, 0), "rpc": (7 * 86400, 0, 4), "archive": (7 * 86400, 0, 4)}


def test_no_peers_after_a_restart(node: Story) -> None:
    """The node runs and its chain rises, but it has nobody: exit 8, what to look at, and the way back."""
    text = node.command.config.read_text()
    with alone() as url:
        node.command.config.write_text(text + f'rpc = "{url}"\n')
        try:
            error = ok(node, "restore", SET, "--in-place", "--yes", code=8)
        finally:
            node.command.config.write_text(text)
    assert "no peers" in error["message"]
    assert "bootnodes" in error["cure"] and "30303 open, TCP and UDP" in error["cure"]
    assert error["undo_command"] == f"snapshotter restore --undo {node.data}"
    ok(node, "restore", "--undo", "ours")
    assert node.as_it_was() and node.service.running()


@contextmanager
def alone() -> Iterator[str]:
    """The RPC of a node that rises and once had peers."""
    heights, peers = iter(range(100, 10_000)), iter([3])

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = {
                "eth_blockNumber": lambda: hex(next(heights)),
                "net_peerCount": lambda: hex(next(peers, 0)),
                "eth_syncing": lambda: False,
            }.get(asked["method"])
            answer = {"result": said()} if said else {"error": {"code": -32601, "message": "no such method"}}
            content = json.dumps({"jsonrpc": "2.0", "id": asked["id"], **answer}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ----------------------------------------------------------------------------------------------- its four errors


def test_error_1_not_into_a_copy_of_the_path_inside_itself(undone: Story) -> None:
    ok(undone, "restore", SET, "--in-place", "--yes")
    first = str(undone.data).split("/")[1]
    assert not (undone.data / first).exists() and (undone.data / "database" / "CURRENT").exists()


def test_error_2_the_metadata_come_with_the_database(undone: Story) -> None:
    """The node (as Besu) refuses a database without them: it runs."""
    undone.service.do("stop")
    for name in ("DATABASE_METADATA.json", "VERSION_METADATA.json"):
        (undone.data / name).rename(undone.place / name)
    try:
        assert undone.service.do("start") != 0, "the node of these tests must refuse that"
        ok(undone, "restore", SET, "--in-place", "--only", "database", "--yes")
        assert undone.service.do("start") == 0 and undone.service.running()
        undone.service.do("stop")
        ok(undone, "restore", "--undo", "ours")
    finally:
        undone.service.do("stop")
        for name in ("DATABASE_METADATA.json", "VERSION_METADATA.json"):
            (undone.place / name).rename(undone.data / name)
        undone.service.do("start")
    ok(undone, "restore", SET, "--in-place", "--only", "database", "--yes")
    assert undone.service.running()


def test_error_3_the_key_is_there_afterwards(undone: Story) -> None:
    key = (undone.data / "key").read_text()
    ok(undone, "restore", SET, "--in-place", "--yes")
    assert (undone.data / "key").read_text() == key


def test_error_4_a_backup_that_fails_removes_nothing(node: Story) -> None:
    before = [entry["set_id"] for entry in ok(node, "list", "ours")["sets"]]
    assert before
    (node.service.home / "bad-stop").write_text("fail")
    ok(node, "take", "ours", "--quiesce", "stop", code=6)
    (node.service.home / "bad-stop").unlink()
    assert [entry["set_id"] for entry in ok(node, "list", "ours")["sets"]] == before


def test_the_document_names_each_command() -> None:
    """What docs/from-the-guide.md says can be typed is known to the command."""
    import re

    import click

    from snapshotter.cli import COMMANDS, cli

    commands = {name: cli.get_command(click.Context(cli), name) for name in COMMANDS}
    text = (CHECKOUT / "docs" / "from-the-guide.md").read_text()
    typed = set(re.findall(r"`snapshotter ([a-z]+)", text))
    assert typed <= set(commands), typed - set(commands)
    known = {option for command in commands.values() if command for each in command.params for option in each.opts}
    for option in set(re.findall(r"(?<!-)(--[a-z][a-z-]+)", text)):
        assert option in known, option
