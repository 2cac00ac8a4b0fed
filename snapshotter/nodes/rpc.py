"""Asking a node over HTTP: JSON-RPC, and its health pages. Must not know verbs: a node that doesn't answer is no reason
to fail a take, so nothing is raised here, and no answer takes longer than it was given.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
_MOST_BYTES = 4 << 20  # of one answer: a block without its transactions' bodies takes some KB, a full one some 100


class Block(NamedTuple):
    """The newest block that a node has. `hash` is 0x and 64 hex digits."""

    height: int
    hash: str


def height(url: str, timeout_s: float = 3.0) -> tuple[Block | None, str]:
    """The node's newest block, or None and why not, within `timeout_s` seconds in all: names that don't resolve and
    servers that send a byte now and then included. Asks the URL itself: no proxy, no redirect."""

    def ask(ends: float) -> Block:
        number = _call(url, "eth_blockNumber", [], ends)
        if not isinstance(number, str) or not re.fullmatch(r"0x[0-9a-fA-F]{1,16}", number):
            raise ValueError("eth_blockNumber gave no block number")
        block = _call(url, "eth_getBlockByNumber", [number, False], ends)
        found = block.get("hash") if isinstance(block, dict) else None
        if not isinstance(found, str) or not re.fullmatch(r"0x[0-9a-fA-F]{64}", found):
            raise ValueError("eth_getBlockByNumber gave no block hash")
        return Block(int(number, 16), found.lower())

    return _within(timeout_s, ask)


def call(url: str, method: str, params: Sequence[Any] = (), timeout_s: float = 3.0) -> tuple[Any, str]:
    """One call's result and '', or None and why not. As bounded as `height`."""
    return _within(timeout_s, lambda ends: _call(url, method, list(params), ends))


def page(url: str, path: str, timeout_s: float = 3.0) -> tuple[int | None, str]:
    """The status of GET `path` (it may have a query) on the server of the RPC at `url`, or None and why not. As bounded
    as `height`."""
    from urllib.parse import urlsplit

    def ask(ends: float) -> int:
        from urllib.error import HTTPError

        parts = urlsplit(url)
        try:
            _fetch(f"{parts.scheme}://{parts.netloc}{path}", None, ends)
        except HTTPError as error:
            with error:
                return error.code
        return 200

    return _within(timeout_s, ask)


def _within(timeout_s: float, ask: Callable[[float], T]) -> tuple[T | None, str]:
    """What `ask` gives by the time.monotonic() that it is given, or None and why not."""
    import urllib.request  # noqa: F401 the node isn't to be charged with the time that this takes

    answer: list[tuple[T | None, str]] = []
    ends = time.monotonic() + timeout_s

    def run() -> None:
        try:
            answer.append((ask(ends), ""))
        except Exception as error:
            answer.append((None, _said(error)))

    # Only a thread bounds all of it: resolving a name has no timeout, and a socket's begins anew with every byte.
    # One that hangs holds nothing but its socket, and ends with us.
    asking = threading.Thread(target=run, name="rpc", daemon=True)
    try:
        asking.start()
    except RuntimeError as error:
        return None, str(error)
    asking.join(timeout_s)
    return answer[0] if answer else (None, f"no answer within {timeout_s:g} s")


def _call(url: str, method: str, params: list[Any], ends: float) -> Any:
    """One call's `result`. Raises whatever goes wrong."""
    question = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    reply = json.loads(_fetch(url, question, ends))
    if not isinstance(reply, dict):
        raise ValueError("not a JSON-RPC answer")
    if reply.get("error") is not None:
        error = reply["error"]
        raise ValueError(f"{method}: {error.get('message') if isinstance(error, dict) else error}")
    return reply.get("result")


def _fetch(url: str, body: bytes | None, ends: float) -> bytes:
    """GET, or POST of JSON. Raises whatever goes wrong."""
    from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

    class Stay(HTTPRedirectHandler):
        def redirect_request(self, *args: Any, **kwargs: Any) -> None:
            return None

    if not url.lower().startswith(("http://", "https://")):
        raise ValueError("not an http URL")
    request = Request(url, body, {"Content-Type": "application/json", "Accept": "application/json"})  # noqa: S310
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    content = b""
    with build_opener(ProxyHandler({}), Stay).open(request, timeout=left) as response:
        while chunk := response.read1(65536):
            content += chunk
            if len(content) > _MOST_BYTES:
                raise ValueError("the answer is too long")
            if time.monotonic() > ends:
                raise TimeoutError("timed out")
    return content


def _said(error: BaseException) -> str:
    """One line for a person, without the URL (it may hold a password)."""
    reason = getattr(error, "reason", None)  # urllib's own error wraps the socket's
    text = str(getattr(reason, "strerror", None) or reason or error) or type(error).__name__
    if code := getattr(error, "code", None):
        text = f"HTTP {code} {text}"
    return " ".join(text.split())[:200]
