"""A real Ethereum client for tests: `@ethereumjs/client` from npm, a chain of one signer that seals a block a second
into four LevelDBs. On the loopback interface only.

What to know of it:
- 0.10.4 and 0.10.5 lose the node key: their LevelDB binding answers `undefined` for a key that isn't there, they wait
  for an exception, and so make a new enode at every start. 0.10.3 is the newest that keeps it.
- `--dev` without `--unlock` *deletes* the chain at every start. So the genesis is our own, and so is the signer.
- Under clique it can't put transactions into its own blocks ("extraData must be 97 bytes"): they are empty.
- It binds its peer-to-peer ports to 0.0.0.0 whatever it is told: `loopback.cjs` mends that.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NETWORK = "genesis"  # the client names the chain, and its directory below the data path, after the genesis file
SIGNER_KEY = f"{1:064x}"
SIGNER = "0x7e5f4552091a69125d5dfcb7b8c2659029395bdf"


def modules() -> Path:
    """The client's node_modules, installed on first use into a cache outside the checkout, one per lock file."""
    files = [HERE / "package.json", HERE / "package-lock.json"]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snapshotter-tests"
    ready = cache / f"npm-{key}"
    if not ready.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix="npm-making-", dir=cache))
        try:
            for file in files:
                shutil.copy(file, making)
            quiet = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--loglevel=error"]
            done = subprocess.run(["npm", "ci", *quiet], cwd=making, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"npm ci: {done.stderr[-1000:]}"
            with contextlib.suppress(OSError):  # another run was quicker
                os.rename(making, ready)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return ready / "node_modules"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class EthereumJs:
    """One running client, answering."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.log = data.parent / f"{data.name}.log"
        self.rpc = f"http://127.0.0.1:{free_port()}"
        signer = data.parent / f"{data.name}.signer"
        signer.write_text(SIGNER_KEY)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [
                    "node", "--require", str(HERE / "loopback.cjs"),
                    str(modules() / "@ethereumjs/client/dist/esm/bin/cli.js"),
                    "--dataDir", str(data), "--gethGenesis", str(HERE / f"{NETWORK}.json"),
                    "--mine", "--unlock", str(signer), "--isSingleNode",
                    "--rpc", "--rpcAddr", "127.0.0.1", "--rpcPort", self.rpc.rpartition(":")[2],
                    "--port", str(free_port()), "--extIP", "127.0.0.1", "--discDns=false", "--discV4=false",
                    "--rpcEngine=false",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd="/",
            )  # fmt: skip
        try:
            self.wait_for(0)
        except BaseException:
            self.kill()
            raise

    def call(self, method: str, *params: Any, timeout: float = 20) -> Any:
        """One JSON-RPC call's result."""
        question = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        request = urllib.request.Request(self.rpc, question, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout) as response:
            answer = json.loads(response.read())
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def height(self) -> int:
        return int(self.call("eth_blockNumber"), 16)

    def block(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self.call("eth_getBlockByNumber", hex(number), False)
        return found

    def chain(self, up_to: int) -> list[str]:
        """The hashes of all blocks up to this one; each was found to follow the one before."""
        blocks = [self.block(number) for number in range(up_to + 1)]
        for parent, block in itertools.pairwise(blocks):
            assert block["parentHash"] == parent["hash"], f"block {block['number']} doesn't follow its parent"
        return [block["hash"] for block in blocks]

    def funds(self, number: int) -> int:
        """What the signer has, from the state as of that block."""
        return int(self.call("eth_getBalance", SIGNER, hex(number)), 16)

    def node_id(self) -> str:
        """The public key of its enode."""
        found: str = self.call("admin_nodeInfo")["id"]
        return found

    def wait_for(self, height: int, timeout: float = 120) -> None:
        give_up = time.monotonic() + timeout
        while True:
            assert self.process.poll() is None, f"the client ended: {self.said()}"
            with contextlib.suppress(OSError):
                if self.height() >= height:
                    return
            assert time.monotonic() < give_up, f"the client has not reached block {height}: {self.said()}"
            time.sleep(0.1)

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(10)
