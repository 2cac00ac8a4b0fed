"""What every twin has: a clock that tests move on, faults at the n-th call, and an HTTP server on loopback that can
leave a caller without an answer. Must know no cloud.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


class Clock:
    """The twin's time, seconds UTC: the machine's, and what tests put on top."""

    def __init__(self) -> None:
        self.offset = 0.0

    def now(self) -> float:
        return time.time() + self.offset

    def advance(self, seconds: float) -> None:
        self.offset += seconds


@dataclass
class Fault:
    """What goes wrong at the `nth` call (from now) of `action` ("*": of any) and, if `forever`, at each after it.
    Of `kind`: `refuse` (`code`, no effect), `lost` (the effect, no reply), `broken` (the effect, and a 500), `hang`
    (no effect, no reply), `upload` (its snapshots end in error), `partial` (one snapshot of the set is missing), `kill`
    and `kill-after` (process `pid` gets SIGKILL before or after the effect, no reply), and a twin's own."""

    action: str
    kind: str
    code: str = "InternalError"
    message: str = ""
    status: int = 400
    nth: int = 1
    pid: int = 0
    forever: bool = False


def due(faults: list[Fault], action: str) -> Fault | None:
    """The fault of this call. It is spent, unless it is for ever."""
    for fault in faults:
        if fault.action in (action, "*"):
            fault.nth -= 1
            if fault.nth <= 0:
                if not fault.forever:
                    faults.remove(fault)
                return fault
    return None


class Server(HTTPServer):
    """Requests are answered one after another in the order in which they came: what a killed client had sent is done,
    or is not, before anybody else looks. Connections in `hanging` stay open and never get an answer."""

    request_queue_size = 128

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hanging: list[Any] = []

    def shutdown_request(self, request: Any) -> None:
        if request not in self.hanging:
            super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in self.hanging:
            connection.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a killed client is no error of the twin's
            super().handle_error(request, client_address)
