"""The whole story with a real Ethereum client: run, take, run on, lose the database, restore in place; it is the same
node and goes on. Then back, and the parts: only the database, only the key, and a resync."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hot.clients.ethereumjs import HERE, NETWORK, SIGNER_KEY, free_port, modules
from tests.support import Command, loop_file_system

pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm: the Ethereum client runs on them"
)

#: start, stop, status of the client, as an operator's own commands.
MANAGER = r"""
import json, os, signal, subprocess, sys, time
action, home = sys.argv[1:3]
def running():
    try:
        pid = int(open(home + "/pid").read())
        return pid if open("/proc/%d/stat" % pid).read().rpartition(")")[2].split()[0] != "Z" else None
    except (OSError, ValueError):
        return None
if action == "status":
    sys.exit(0 if running() else 3)
if action == "start" and not running():
    log = open(home + "/log", "ab")
    child = subprocess.Popen(json.load(open(home + "/argv")), cwd="/", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    open(home + "/pid", "w").write(str(child.pid))
if action == "stop" and running():
    os.kill(running(), signal.SIGTERM)
    for _ in range(1500):
        if not running(): break
        time.sleep(0.01)
    else:
        os.kill(running(), signal.SIGKILL)
"""


class Client:
    """@ethereumjs/client as a service, asked over its RPC."""

    def __init__(self, data: Path, home: Path, provider: str) -> None:
        home.mkdir()
        self.data, self.home = data, home
        self.rpc = f"http://127.0.0.1:{free_port()}"
        (home / "signer").write_text(SIGNER_KEY)
        (home / "manager.py").write_text(MANAGER)
        argv = [
            "node", "--require", str(HERE / "loopback.cjs"), str(modules() / "@ethereumjs/client/dist/esm/bin/cli.js"),
            "--dataDir", str(data), "--gethGenesis", str(HERE / f"{NETWORK}.json"), "--mine",
            "--unlock", str(home / "signer"), "--isSingleNode", "--rpc", "--rpcAddr", "127.0.0.1",
            "--rpcPort", self.rpc.rpartition(":")[2], "--port", str(free_port()), "--extIP", "127.0.0.1",
            "--discDns=false", "--discV4=false", "--rpcEngine=false",
        ]  # fmt: skip
        argv[0] = shutil.which("node") or "node"
        (home / "argv").write_text(json.dumps(argv))
        config = f'[node.ours]\npath = "{data}"\nrpc = "{self.rpc}"\nprovider = "{provider}"\ntimeout = "120s"\n'
        for action in ("stop", "start", "status"):
            config += f"{action} = {json.dumps([sys.executable, str(home / 'manager.py'), action, str(home)])}\n"
        self.command = Command(home / "etc", config=config)

    def do(self, action: str) -> int:
        return subprocess.run([sys.executable, self.home / "manager.py", action, self.home]).returncode

    def call(self, method: str, *params: Any) -> Any:
        from snapshotter.nodes import rpc

        said, why = rpc.call(self.rpc, method, list(params), timeout_s=20)
        assert not why, why
        return said

    def height(self) -> int:
        return int(self.call("eth_blockNumber"), 16)

    def node_id(self) -> str:
        found: str = self.call("admin_nodeInfo")["id"]
        return found

    def wait_for(self, height: int) -> None:
        import time

        give_up = time.monotonic() + 150
        while True:
            with contextlib.suppress(AssertionError):
                if self.height() >= height:
                    return
            assert time.monotonic() < give_up, (self.home / "log").read_text(errors="replace")[-2000:]
            time.sleep(0.1)

    def end(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.home / "pid").read_text()), signal.SIGKILL)


@contextlib.contextmanager
def client(tmp_path: Path, how: str) -> Iterator[Client]:
    with contextlib.ExitStack() as stack:
        place = tmp_path
        if os.geteuid() == 0:
            place = stack.enter_context(loop_file_system("btrfs" if how == "btrfs" else "ext4", tmp_path, 600))
        data = place / "node"
        if how == "btrfs":
            subprocess.run(["btrfs", "subvolume", "create", data], check=True, capture_output=True)
        made = Client(data, tmp_path / "home", how)
        stack.callback(made.end)
        made.do("start")
        yield made
        made.end()


@pytest.mark.parametrize("how", ["copy", pytest.param("btrfs", marks=pytest.mark.root)])
def test_the_whole_story(tmp_path: Path, how: str, request: pytest.FixtureRequest) -> None:
    with client(tmp_path, how) as node:
        node.wait_for(3)
        enode = node.node_id()
        taken = node.command.json("take", "ours")
        node.wait_for(taken["height"] + 3)
        chain = node.data / NETWORK / "chain"
        for path in chain.iterdir():  # under its feet: it goes on for a while, with what it has in memory
            path.write_bytes(b"broken")

        done = node.command.json("restore", "latest", "--in-place", "--yes")
        assert done["healthy"] and done["seen"]["height"] > taken["height"]
        node.wait_for(taken["height"] + 2)
        assert node.node_id() == enode and done["way"] == ("swap" if how == "btrfs" else "copy")

        node.command.json("restore", "--undo", "ours")
        assert (chain / "CURRENT").read_bytes() == b"broken"
        if how == "copy" and not request.config.getoption("--full"):
            return  # the parts don't differ by provider
        node.do("stop")

        # Only the database: the key that stands there stays. The client was stopped, and so it stays.
        node.command.json("restore", "latest", "--in-place", "--only", "database", "--yes")
        node.do("start")
        node.wait_for(taken["height"] + 1)
        assert node.node_id() == enode
        node.command.json("restore", "--discard", "ours", "--yes")

        # Only the key: it was lost, and the client has made a new one without a word.
        node.do("stop")
        shutil.rmtree(node.data / NETWORK / "config")
        node.do("start")
        node.wait_for(1)
        assert node.node_id() != enode
        height = node.height()
        done = node.command.json("restore", "latest", "--in-place", "--only", "key", "--identity", "set", "--yes")
        assert done["healthy"] and node.node_id() == enode and node.height() >= height
        node.command.json("restore", "--discard", "ours", "--yes")

        # Anew, with the same key. (Alone in its network, it begins a chain of its own.)
        height = node.height()
        done = node.command.json("resync", "ours", "--yes")
        assert node.node_id() == enode and node.height() < height
        node.command.json("restore", "--undo", "ours")
        node.wait_for(height)
        assert node.node_id() == enode
