"""Asking a node over JSON-RPC which block it has. Must not know verbs: a node that doesn't answer is no reason to
fail a take, so nothing is raised here, and no answer takes longer than it was given.
"""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any, NamedTuple

_MOST_BYTES = 4 << 20  # of one answer: a block without its transactions' bodies takes some KB, a full one some 100


class Block(NamedTuple):
    """The newest block that a node has. `hash` is 0x and 64 hex digits."""

    height: int
    hash: str


def height(url: str, timeout_s: float = 3.0) -> tuple[Block | None, str]:
    """The node's newest block, or None and why not, within `timeout_s` seconds in all: names that don't resolve and
    servers that send a byte now and then included. Asks the URL itself: no proxy, no redirect."""
    import urllib.request  # noqa: F401 the node isn't to be charged with the time that this takes

    answer: list[tuple[Block | None, str]] = []
    ends = time.monotonic() + timeout_s

    def ask() -> None:
        try:
            number = _call(url, "eth_blockNumber", [], ends)
            if not isinstance(number, str) or not re.fullmatch(r"0x[0-9a-fA-F]{1,16}", number):
                raise ValueError("eth_blockNumber gave no block number")
            block = _call(url, "eth_getBlockByNumber", [number, False], ends)
            found = block.get("hash") if isinstance(block, dict) else None
            if not isinstance(found, str) or not re.fullmatch(r"0x[0-9a-fA-F]{64}", found):
                raise ValueError("eth_getBlockByNumber gave no block hash")
            answer.append((Block(int(number, 16), found.lower()), ""))
        except Exception as error:
            answer.append((None, _said(error)))

    # Only a thread bounds all of it: resolving a name has no timeout, and a socket's begins anew with every byte.
    # One that hangs holds nothing but its socket, and ends with us.
    asking = threading.Thread(target=ask, name="rpc", daemon=True)
    try:
        asking.start()
    except RuntimeError as error:
        return None, str(error)
    asking.join(timeout_s)
    return answer[0] if answer else (None, f"no answer within {timeout_s:g} s")


def _call(url: str, method: str, params: list[Any], ends: float) -> Any:
    """One call's `result`. Raises whatever goes wrong."""
    from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

    class Stay(HTTPRedirectHandler):
        def redirect_request(self, *args: Any, **kwargs: Any) -> None:
            return None

    if not url.lower().startswith(("http://", "https://")):
        raise ValueError("not an http URL")
    question = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    request = Request(url, question, {"Content-Type": "application/json", "Accept": "application/json"})  # noqa: S310
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
    reply = json.loads(content)
    if not isinstance(reply, dict):
        raise ValueError("not a JSON-RPC answer")
    if reply.get("error") is not None:
        error = reply["error"]
        raise ValueError(f"{method}: {error.get('message') if isinstance(error, dict) else error}")
    return reply.get("result")


def _said(error: BaseException) -> str:
    """One line for a person, without the URL (it may hold a password)."""
    reason = getattr(error, "reason", None)  # urllib's own error wraps the socket's
    text = str(getattr(reason, "strerror", None) or reason or error) or type(error).__name__
    if code := getattr(error, "code", None):
        text = f"HTTP {code} {text}"
    return " ".join(text.split())[:200]
