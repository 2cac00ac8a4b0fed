"""Asking a node for its height: real servers on loopback, most of them bad."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from snapshotter.nodes.rpc import Block, height

HASH = "0x" + "aB" * 32


class _Node(BaseHTTPRequestHandler):
    """A JSON-RPC server; `server.answers` says what to give for a method: a result, or bytes for the whole body."""

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((question["method"], question["params"]))  # type: ignore[attr-defined]
        answer = self.server.answers.get(question["method"])  # type: ignore[attr-defined]
        if isinstance(answer, int):
            self.send_response(answer)
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            return
        body = answer if isinstance(answer, bytes) else json.dumps({"jsonrpc": "2.0", "id": 1, **answer}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


Serve = Callable[..., tuple[str, list[Any]]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[ThreadingHTTPServer] = []

    def start(**answers: Any) -> tuple[str, list[Any]]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Node)
        server.asked = []  # type: ignore[attr-defined]
        server.answers = {  # type: ignore[attr-defined]
            "eth_blockNumber": {"result": "0x1b4"},
            "eth_getBlockByNumber": {"result": {"number": "0x1b4", "hash": HASH}},
            **answers,
        }
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", server.asked  # type: ignore[attr-defined]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def raw() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """A server that does with each connection what it is told."""
    listening: list[socket.socket] = []
    over = threading.Event()

    def start(behave: Callable[[socket.socket], None]) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)

        def run() -> None:
            while not over.is_set():
                try:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(65536)
                        behave(connection)
                except OSError:
                    return

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    over.set()
    for server in listening:
        server.close()


def test_the_newest_block(serve: Serve) -> None:
    url, asked = serve()
    assert height(url, 30) == (Block(0x1B4, HASH.lower()), "")
    assert asked == [("eth_blockNumber", []), ("eth_getBlockByNumber", ["0x1b4", False])]


def test_no_proxy_from_the_environment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    block, _ = height(serve()[0], 30)
    assert block is not None


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ({"eth_blockNumber": {"error": {"code": -32601, "message": "Method not found"}}}, "Method not found"),
        ({"eth_blockNumber": {"error": "x"}}, "x"),
        ({"eth_blockNumber": {"result": 12}}, "no block number"),
        ({"eth_blockNumber": {"result": "0xzz"}}, "no block number"),
        ({"eth_blockNumber": {"result": "0x" + "f" * 1000}}, "no block number"),
        ({"eth_blockNumber": {"result": None}}, "no block number"),
        ({"eth_getBlockByNumber": {"result": None}}, "no block hash"),
        ({"eth_getBlockByNumber": {"result": {"hash": "0x12"}}}, "no block hash"),
        ({"eth_getBlockByNumber": {"result": {"hash": HASH + "\n"}}}, "no block hash"),
        ({"eth_getBlockByNumber": {"result": [1]}}, "no block hash"),
        ({"eth_blockNumber": b"<html>not json"}, ""),
        ({"eth_blockNumber": b"[]"}, "not a JSON-RPC answer"),
        ({"eth_blockNumber": b"\xff\xfe\xff"}, ""),
        ({"eth_blockNumber": b"[" * 100_000}, ""),
        ({"eth_blockNumber": b""}, ""),
        ({"eth_blockNumber": 500}, "HTTP 500"),
        ({"eth_blockNumber": 401}, "HTTP 401"),
        ({"eth_blockNumber": 302}, "HTTP 302"),
        ({"eth_blockNumber": 307}, "HTTP 307"),
        ({"eth_blockNumber": b'{"result":"' + b"x" * (5 << 20)}, "too long"),
    ],
)
def test_a_bad_answer_is_none_and_why(serve: Serve, answers: dict[str, Any], why: str) -> None:
    block, said = height(serve(**answers)[0], 30)
    assert block is None and said and why in said and "\n" not in said


@pytest.mark.parametrize(
    "url",
    [
        "",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://",
        "http://127.0.0.1:99999",
        "http://[::1",
        "x y",
        "http://a b/",
    ],
)
def test_a_bad_url(url: str) -> None:
    block, said = height(url, 30)
    assert block is None and said


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    block, said = height(f"http://user:secret@127.0.0.1:{port}", 30)
    assert block is None and "secret" not in said
    assert "refused" in height(f"http://127.0.0.1:{port}", 30)[1]


def _silent(connection: socket.socket) -> None:
    connection.settimeout(60)
    connection.recv(1)


def _trickle(head: bytes, each: bytes) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(each)
            time.sleep(0.05)

    return behave


@pytest.mark.parametrize(
    "behave",
    [
        _silent,
        _trickle(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "),
        _trickle(b"HTTP/1.1 200 OK\r\nX: ", b"y"),
        _trickle(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        _trickle(b"", b"H"),
    ],
    ids=["silent", "body", "header", "chunks", "status"],
)
def test_no_server_holds_us_longer_than_it_was_given(raw, behave: Callable[[socket.socket], None]) -> None:  # type: ignore[no-untyped-def]
    url = raw(behave)
    began = time.monotonic()
    block, said = height(url, 1.0)
    took = time.monotonic() - began
    assert block is None and said
    assert took < 5, f"{took:.1f} s for a limit of 1 s"


def test_a_connection_closed_at_once(raw) -> None:  # type: ignore[no-untyped-def]
    block, said = height(raw(lambda connection: None), 30)
    assert block is None and said
