"""The twin's two faces on one loopback port: EC2 (POST /) and the instance metadata service, version 2 alone
(/latest/...). Throttling, credentials and faults are here, before and after an action.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.twins.ec2 import wire
from tests.twins.ec2.actions import ACTIONS, Call
from tests.twins.ec2.disks import Disks
from tests.twins.ec2.wire import Refusal
from tests.twins.ec2.world import ACCOUNT, Instance, Limits, World
from tests.twins.knobs import Clock, Fault, Server, due

_SCOPE = re.compile(r"Credential=([^/]+)/\d{8}/([a-z0-9-]+)/ec2/aws4_request")
REGION = "eu-central-1"


class Twin:
    """`with Twin(disks) as twin:`; boto3 finds it by `environment`. `here` is the instance whose metadata is served;
    `policies` what its role may do (None: everything); `expired` makes its token too old."""

    def __init__(self, disks: Disks | None = None, limits: Limits | None = None, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.limits = limits or Limits()
        self.world = World(disks, self.limits, self.clock)
        self.here: Instance | None = None
        self.policies: Sequence[Mapping[str, Any]] | None = None
        self.expired = False
        self.faults: list[Fault] = []
        self.calls: list[tuple[str, str]] = []  # action, outcome: "ok" or the error's code
        self._buckets: dict[str, tuple[float, float]] = {}
        self._tokens: dict[str, float] = {}
        self._server = Server(type("Handler", (_Handler,), {"twin": self}))
        self.hanging = self._server.hanging
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Twin:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, *, keys: bool = True) -> dict[str, str]:
        """For boto3. Without `keys` the credentials are the instance role's, from the metadata service."""
        found = {
            "AWS_ENDPOINT_URL_EC2": self.url,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.url + "/",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }
        return found | ({"AWS_ACCESS_KEY_ID": "AKIATWIN", "AWS_SECRET_ACCESS_KEY": "secret"} if keys else {})

    def fail(self, action: str, kind: str, **more: Any) -> Fault:
        fault = Fault(action, kind, **more)
        self.faults.append(fault)
        return fault

    def count(self) -> Counter[str]:
        return Counter(action for action, _ in self.calls)

    # -- EC2 ----------------------------------------------------------------------------------------------------

    def answer(self, authorization: str, body: bytes) -> tuple[int, bytes] | str:
        """Status and body; `lost` or `hang` for a reply that doesn't come."""
        request_id = secrets.token_hex(16)
        action, outcome = "?", "ok"
        fault: Fault | None = None
        try:
            operation, params = wire.parse(body)
            action = operation.name
            scope = _SCOPE.search(authorization)
            if scope is None:
                raise Refusal("MissingAuthenticationToken", "Request is missing Authentication Token", 403)
            if self.expired:
                raise Refusal("RequestExpired", "Request has expired.")
            if scope[1] not in ("AKIATWIN", "ASIAROLE"):
                raise Refusal("AuthFailure", "AWS was not able to validate the provided access credentials", 401)
            self._throttle(action, scope[2])
            fault = due(self.faults, action)
            if fault is not None and fault.kind == "refuse":
                raise Refusal(fault.code, fault.message or "on purpose", fault.status)
            if fault is not None and fault.kind == "hang":
                return "hang"
            if fault is not None and fault.kind == "kill":
                os.kill(fault.pid, signal.SIGKILL)
                return "lost"
            if action not in ACTIONS:
                raise Refusal("UnsupportedOperation", f"The twin has no {action}")
            result = ACTIONS[action](Call(self.world, scope[2], self.policies, fault), params)
            if fault is not None and fault.kind == "broken":
                raise Refusal("InternalError", "An internal error has occurred", 500)
            answer = 200, wire.answer(operation, result, request_id)
        except Refusal as refusal:
            outcome = refusal.code
            answer = refusal.status, wire.error(refusal, request_id)
        finally:
            self.calls.append((action, outcome))
        if fault is not None and fault.kind == "kill-after":
            os.kill(fault.pid, signal.SIGKILL)
        return "lost" if fault is not None and fault.kind in ("lost", "kill-after") else answer

    def _throttle(self, action: str, region: str) -> None:
        bucket = self.limits.buckets.get(action, self.limits.buckets.get("*"))
        if bucket is None:
            return
        capacity, rate = bucket
        now = self.clock.now()
        left, since = self._buckets.get(f"{region}:{action}", (capacity, now))
        left = min(capacity, left + (now - since) * rate)
        self._buckets[f"{region}:{action}"] = (left - (left >= 1), now)
        if left < 1:
            raise Refusal("RequestLimitExceeded", "Request limit exceeded.", 503)

    # -- the metadata service -----------------------------------------------------------------------------------

    def metadata(self, method: str, path: str, headers: Any) -> tuple[int, bytes]:
        if method == "PUT" and path == "/latest/api/token":
            ttl = headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if not ttl.isdigit() or not 1 <= int(ttl) <= 21600:
                return 400, b""
            token = secrets.token_urlsafe(24)
            self._tokens[token] = self.clock.now() + int(ttl)
            return 200, token.encode()
        if self._tokens.get(headers.get("X-aws-ec2-metadata-token", ""), 0) < self.clock.now():
            return 401, b""  # version 1 asks without a token
        found = self._metadata(path)
        return (404, b"") if found is None else (200, found.encode())

    def _metadata(self, path: str) -> str | None:
        if self.here is None:
            return None
        role = "/latest/meta-data/iam/security-credentials/"
        until = (datetime.now(UTC) + timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M:%SZ")
        where = {
            "accountId": ACCOUNT,
            "instanceId": self.here.id,
            "region": self.here.region,
            "availabilityZone": self.here.zone,
        }
        keys = {"Code": "Success", "AccessKeyId": "ASIAROLE", "SecretAccessKey": "s", "Token": "t"}
        keys |= {"Type": "AWS-HMAC", "LastUpdated": "2026-11-22T00:00:00Z", "Expiration": until}
        return {
            "/latest/meta-data/instance-id": self.here.id,
            "/latest/dynamic/instance-identity/document": json.dumps(where),
            role: "snapshotter",
            f"{role}snapshotter": json.dumps(keys),
        }.get(path)


class _Handler(BaseHTTPRequestHandler):
    twin: Twin
    timeout = 10  # one that was killed while it was sending holds up nobody for longer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.twin.answer(self.headers.get("Authorization", ""), body)
        if answer == "hang":
            self.twin.hanging.append(self.connection)
        elif not isinstance(answer, str):
            self._send(*answer, kind="text/xml;charset=UTF-8")

    def do_PUT(self) -> None:
        self._send(*self.twin.metadata("PUT", self.path, self.headers))

    def do_GET(self) -> None:
        self._send(*self.twin.metadata("GET", self.path, self.headers))

    def _send(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
