"""After the start: the same node, alive and rising? A stub RPC server on loopback that changes its mind as nodes do,
and the real Ethereum client where it can be had."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from snapshotter.host.service import Commands
from snapshotter.nodes import health, profiles
from snapshotter.nodes.config import Node
from snapshotter.nodes.health import Expected

KEY, OTHER = "ab" * 64, "cd" * 64
PROFILE = profiles.get("besu")


class Stub:
    """What the node says; tests change it while it runs. None: that method isn't there."""

    def __init__(self) -> None:
        self.height: Callable[[], int] = lambda: 100
        self.peers: int | None = 3
        self.enode: str | None = f"enode://{KEY}@127.0.0.1:30303"
        self.node_info: dict[str, Any] | None = None
        self.pages: dict[str, int] = {}
        self.asked: list[str] = []

    def result(self, method: str) -> Any:
        match method:
            case "eth_blockNumber":
                return hex(self.height())
            case "net_enode":
                return self.enode
            case "admin_nodeInfo":
                return self.node_info
            case "net_peerCount":
                return None if self.peers is None else hex(self.peers)
            case "eth_syncing":
                return False
        return None


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append(self.path)
            self.send_response(made.pages.get(self.path.partition("?")[0], 404))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            method = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["method"]
            result = made.result(method)
            answer = (
                {"error": {"code": -32601, "message": "Method not enabled"}} if result is None else {"result": result}
            )
            body = json.dumps({"jsonrpc": "2.0", "id": 1, **answer}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield made
    server.shutdown()
    server.server_close()


def node(stub: Stub | str | None) -> Node:
    rpc = stub.url if isinstance(stub, Stub) else stub  # type: ignore[attr-defined]
    return Node(name="n", path="/nonexistent", rpc=rpc)


def rising(start: int = 100) -> Callable[[], int]:
    began = time.monotonic()
    return lambda: start + int((time.monotonic() - began) * 2)


def prove(stub: Stub | str | None, expected: Expected, deadline_s: float = 3, **how: Any) -> health.Health:
    return health.prove(node(stub), PROFILE, expected, deadline_s, **how)


def test_a_healthy_node_is_proven_long_before_the_deadline(stub: Stub) -> None:
    stub.height, stub.pages = rising(), {"/liveness": 200, "/readiness": 200}
    began = time.monotonic()
    found = prove(stub, Expected(f"enode://{KEY.upper()}@1.2.3.4:30303", 100), 300)
    assert found.healthy and not found.findings and not found.hints and not found.notes
    assert (found.seen.enode_id, found.seen.peers) == (KEY, 3) and (found.seen.height or 0) > 100
    assert time.monotonic() - began < 100
    assert "/readiness?minPeers=1" in stub.asked


def test_another_key_is_told_at_once(stub: Stub) -> None:
    stub.height, stub.enode = rising(), f"enode://{OTHER}@127.0.0.1:30303"
    began = time.monotonic()
    found = prove(stub, Expected(KEY, 100), 300)
    assert found.healthy is False and time.monotonic() - began < 100
    assert any("another key" in each for each in found.findings) and any(
        "key has changed" in each for each in found.hints
    )
    assert KEY not in repr(found.findings), "only as much of it as tells them apart"


def test_the_enode_may_only_be_known_to_the_admin_api(stub: Stub) -> None:
    stub.height, stub.enode = rising(), None
    stub.node_info = {"id": "12" * 32, "enode": f"enode://{OTHER}@127.0.0.1:1"}  # geth: `id` is a hash of the key
    assert prove(stub, Expected(KEY, 100)).healthy is False
    stub.node_info = {"id": KEY}
    assert prove(stub, Expected(KEY, 100)).healthy is True


def test_a_node_that_gives_no_enode_is_noted_not_blamed(stub: Stub) -> None:
    stub.height, stub.enode = rising(), None
    found = prove(stub, Expected(KEY, 100))
    assert found.healthy and "was not asked" in found.notes[0]


def test_a_height_that_stands_still(stub: Stub) -> None:
    found = prove(stub, Expected(KEY, 100))
    assert found.healthy is False and "doesn't rise" in found.findings[0]


def test_a_height_below_the_sets(stub: Stub) -> None:
    stub.height = rising(50)
    found = prove(stub, Expected(KEY, 10_000))
    assert found.healthy is False and "10000" in found.findings[0]


def test_it_may_catch_up_until_the_deadline(stub: Stub) -> None:
    stub.height = rising(98)
    assert prove(stub, Expected(KEY, 102), 60).healthy


def test_no_peers_and_what_to_look_at(stub: Stub) -> None:
    stub.height, stub.peers = rising(), 0
    found = prove(stub, Expected(KEY, 100))
    assert found.healthy is False and found.findings == ("it has no peers",)
    hints = " ".join(found.hints)
    assert "bootnodes" in hints and "30303" in hints and "TCP and UDP" in hints


def test_peers_may_come_until_the_deadline(stub: Stub) -> None:
    stub.height, stub.peers = rising(), 0
    threading.Timer(2, lambda: setattr(stub, "peers", 1)).start()
    assert prove(stub, Expected(KEY, 100), 60).healthy


def test_a_node_that_is_alone_needs_none(stub: Stub) -> None:
    stub.height, stub.peers, stub.pages = rising(), 0, {"/readiness": 200}
    assert prove(stub, Expected(KEY, 100, min_peers=0)).healthy
    assert "/readiness?minPeers=0" in stub.asked


@pytest.mark.parametrize("page", ["/liveness", "/readiness"])
def test_health_pages(stub: Stub, page: str) -> None:
    stub.height, stub.pages = rising(), {page: 503}
    found = prove(stub, Expected(KEY, 100))
    assert found.healthy is False and page in found.findings[0]
    stub.pages = {page: 404}
    assert prove(stub, Expected(KEY, 100)).healthy, "a page that isn't there says nothing"


def test_nobody_listens_then_it_starts(stub: Stub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = prove(f"http://127.0.0.1:{port}", Expected(KEY, 100), 2)
    assert found.healthy is False and "no height" in found.findings[0] and "log" in found.hints[0]


def test_a_server_that_never_answers_holds_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        found = prove(f"http://127.0.0.1:{server.getsockname()[1]}", Expected(KEY, 100), 1)
        assert found.healthy is False and time.monotonic() - began < 60


def test_garbage_is_no_traceback(stub: Stub) -> None:
    stub.result = lambda method: [{"x": "\x1b[2J"}]  # type: ignore[method-assign]
    assert prove(stub, Expected(KEY, 100), 1).healthy is False


def test_a_service_that_stops_again_ends_the_waiting(stub: Stub, tmp_path: Path) -> None:
    stub.height = rising(1)
    (tmp_path / "runs").touch()
    status = ("sh", "-c", f"test -e {tmp_path}/runs || exit 3")
    service = Commands(stop_argv=("true",), start_argv=("my-node",), status_argv=status)
    threading.Timer(1, (tmp_path / "runs").unlink).start()
    began = time.monotonic()
    found = prove(stub, Expected(KEY, 1_000_000), 300, service=service)
    assert found.healthy is False and found.findings[0] == "my-node has stopped again"
    assert time.monotonic() - began < 100


def test_without_an_rpc_only_the_service_can_be_watched(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    status = ("sh", "-c", f"test -e {tmp_path}/runs || exit 3")
    service = Commands(stop_argv=("true",), start_argv=("my-node",), status_argv=status)
    found = prove(None, Expected(KEY, 100), 1, service=service)
    assert found.healthy is None and not found.findings and "no rpc" in found.notes[0]
    (tmp_path / "runs").unlink()
    assert prove(None, Expected(KEY, 100), 60, service=service).healthy is False
    assert prove(None, Expected(KEY, 100), 60).healthy is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"enode://{KEY}@10.0.0.1:30303?discport=0", KEY),
        (KEY.upper(), KEY),
        (f"0x{KEY}", KEY),
        ("enode://" + "ab" * 63, None),
        (None, None),
        (12, None),
    ],
)
def test_enode_ids(text: object, found: str | None) -> None:
    assert health.enode_id(text) == found


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_the_real_client(tmp_path: Path) -> None:
    """`@ethereumjs/client`, alone in its network: it is itself, rises, has no peers."""
    from tests.hot.clients.ethereumjs import EthereumJs

    client = EthereumJs(tmp_path / "data")
    try:
        client.wait_for(2)
        own = node(client.rpc)
        seen = health.look(own)
        assert seen.enode_id == health.enode_id(client.node_id()) is not None
        profile = profiles.get("ethereumjs")
        found = health.prove(own, profile, Expected(seen.enode_id, 2, min_peers=0), 120)
        assert found.healthy and not found.findings, found
        assert health.prove(own, profile, Expected(OTHER, 2, min_peers=0), 120).healthy is False
        alone = health.prove(own, profile, Expected(seen.enode_id, 2), 5)
        assert alone.healthy is False and alone.findings == ("it has no peers",), alone
    finally:
        client.kill()
