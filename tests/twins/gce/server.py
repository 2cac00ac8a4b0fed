"""The twin's faces on one loopback port: the API (/compute/v1/...), the metadata server (/computeMetadata/v1/...) and
OAuth's token endpoint (/token). Quotas, credentials and faults are here, before and after a method.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import tempfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from google.auth import jwt

from tests.twins.gce import wire
from tests.twins.gce.actions import Call
from tests.twins.gce.disks import Disks
from tests.twins.gce.policy import Granted
from tests.twins.gce.wire import Refusal
from tests.twins.gce.world import NUMBER, Instance, Limits, World
from tests.twins.knobs import Clock, Fault, Server, due

_EMAIL = "snapshotter@twin-project.iam.gserviceaccount.com"
_SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]
_KIND = {"get": "get", "list": "list", "aggregatedList": "list"}


@functools.cache
def _keys() -> tuple[str, str]:
    """The account's key, private and public."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


class Twin:
    """`with Twin(disks) as twin:`; Google's client finds it by `environment`, or by `url` as its api_endpoint. `here`
    is the instance whose metadata is served; `permissions` what its account may do (see `policy`); `anonymous` lets
    callers in who have no token at all; `expired` makes every token too old."""

    def __init__(self, disks: Disks | None = None, limits: Limits | None = None, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.limits = limits or Limits()
        self.world = World(disks, self.limits, self.clock)
        self.here: Instance | None = None
        self.permissions: Granted = None
        self.anonymous = True
        self.expired = False
        self.faults: list[Fault] = []
        self.calls: list[tuple[str, str]] = []  # action, outcome: "ok" or the error's reason
        self._tokens: set[str] = set()
        self._spent: Counter[tuple[str, int]] = Counter()  # of which quota, in which minute
        self._file: str | None = None
        self._server = _Server(type("Handler", (_Handler,), {"twin": self}))
        self._server.settle = self.world.settle
        self.hanging = self._server.hanging
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Twin:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self._file is not None:
            os.unlink(self._file)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def environment(self, *, keys: bool = True) -> dict[str, str]:
        """For Google's library. Without `keys` the credentials are the instance's, from the metadata server; it must
        not have been imported before: it reads the address then."""
        found = {
            "GCE_ENDPOINT": self.url,
            "GCE_METADATA_HOST": self.address,
            "GCE_METADATA_IP": self.address,
            "CLOUDSDK_CONFIG": "/nonexistent",
            "NO_PROXY": "127.0.0.1",
        }
        if not keys:
            return found
        return found | {"GOOGLE_APPLICATION_CREDENTIALS": self._account(), "GOOGLE_CLOUD_PROJECT": self.world.project}

    def _account(self) -> str:
        """The path of a service account's key file."""
        if self._file is None:
            fd, self._file = tempfile.mkstemp(prefix="twin-", suffix=".json")
            account = {
                "type": "service_account",
                "project_id": self.world.project,
                "private_key_id": "twin",
                "private_key": _keys()[0],
                "client_email": _EMAIL,
                "client_id": "1",
                "token_uri": f"{self.url}/token",
            }
            with os.fdopen(fd, "w") as file:
                json.dump(account, file)
        return self._file

    def fail(self, action: str, kind: str, **more: Any) -> Fault:
        fault = Fault(action, kind, **more)
        self.faults.append(fault)
        return fault

    def count(self) -> Counter[str]:
        return Counter(action for action, _ in self.calls)

    # -- the API ------------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, token: str, body: bytes) -> tuple[int, bytes] | str:
        """Status and body; `lost` or `hang` for a reply that doesn't come."""
        self.world.settle()
        action, outcome = "?", "ok"
        fault: Fault | None = None
        try:
            action, request = wire.parse(method, target, body)
            if self.expired or not self._knows(token.removeprefix("Bearer ")):
                raise Refusal("authError", "Request had invalid authentication credentials.")
            self._throttle(action)
            fault = due(self.faults, action)
            if fault is not None and fault.kind == "refuse":
                status = fault.status if fault.status != 400 else 0
                raise Refusal(fault.code, fault.message or "on purpose", status)
            if fault is not None and fault.kind == "hang":
                return "hang"
            if fault is not None and fault.kind == "kill":
                os.kill(fault.pid, signal.SIGKILL)
                return "lost"
            result = Call(self.world, action, request, self.permissions, fault).run()
            if fault is not None and fault.kind == "broken":
                raise Refusal("internalError", "Internal error. Please try again.")
            answer = 200, wire.answer(result)
        except Refusal as refusal:
            outcome = refusal.reason
            answer = refusal.status, wire.error(refusal)
        finally:
            self.calls.append((action, outcome))
        if fault is not None and fault.kind == "kill-after":
            os.kill(fault.pid, signal.SIGKILL)
        return "lost" if fault is not None and fault.kind in ("lost", "kill-after") else answer

    def _throttle(self, action: str) -> None:
        """A quota is full again at each whole minute."""
        service, _, method = action.partition(".")
        kind = "operation" if service.endswith("Operations") else _KIND.get(method, "change")
        name = next((each for each in (action, kind, "*") if each in self.limits.per_minute), None)
        if name is None:
            return
        key = name, int(self.clock.now() // 60)
        if self._spent[key] >= self.limits.per_minute[name]:
            raise Refusal(
                "rateLimitExceeded",
                f"Quota exceeded for quota metric 'Queries' and limit 'Queries per minute' of service "
                f"'compute.googleapis.com' for consumer 'project_number:{NUMBER}'.",
            )
        self._spent[key] += 1

    def _knows(self, token: str) -> bool:
        """One that was given here, or one that the account signed for itself."""
        if not token:
            return self.anonymous
        if token in self._tokens:
            return True
        try:
            said = jwt.decode(token, certs=_keys()[1])  # type: ignore[no-untyped-call]
        except ValueError:  # also for an expired one
            return False
        return bool(said["iss"] == said["sub"] == _EMAIL)

    def token(self, body: bytes) -> tuple[int, bytes]:
        """OAuth: a token for a signed assertion."""
        form = parse_qs(body.decode())
        if form.get("grant_type") != ["urn:ietf:params:oauth:grant-type:jwt-bearer"] or "assertion" not in form:
            return 400, b'{"error": "invalid_grant"}'
        return 200, json.dumps(self._given()).encode()

    def _given(self) -> dict[str, Any]:
        token = f"ya29.{secrets.token_urlsafe(24)}"
        self._tokens.add(token)
        return {"access_token": token, "expires_in": 3599, "token_type": "Bearer"}

    # -- the metadata server ------------------------------------------------------------------------------------

    def metadata(self, target: str, flavor: str) -> tuple[int, str, bytes]:
        """Status, content type, body."""
        url = urlsplit(target)
        if flavor != "Google":
            return 403, "text/html", b"Missing Metadata-Flavor:Google header."
        if url.path == "/":
            return 200, "text/plain", b"computeMetadata/\n"
        if url.path == "/computeMetadata/v1/instance/service-accounts/default/token":
            return 200, "application/json", json.dumps(self._given()).encode()
        found: Any = self._metadata()
        for part in url.path.removeprefix("/computeMetadata/v1/").strip("/").split("/"):
            if part:
                key = int(part) if isinstance(found, list) and part.isdigit() else part
                try:
                    found = found[key]
                except (KeyError, IndexError, TypeError):
                    return 404, "text/html", b"Not Found"
        if isinstance(found, (dict, list)) and parse_qs(url.query).get("recursive", ["false"])[0].lower() != "true":
            names = found if isinstance(found, dict) else range(len(found))
            return 200, "application/text", "".join(f"{name}/\n" for name in names).encode()
        if isinstance(found, (dict, list)):
            return 200, "application/json", json.dumps(found).encode()
        return 200, "application/text", str(found).encode()

    def _metadata(self) -> dict[str, Any]:
        account = {"aliases": ["default"], "email": _EMAIL, "scopes": _SCOPES}
        found: dict[str, Any] = {"project": {"project-id": self.world.project, "numericProjectId": int(NUMBER)}}
        found["project"]["numeric-project-id"] = NUMBER
        found["instance"] = {"service-accounts": {"default": account, _EMAIL: account}}
        if self.here is not None:
            found["instance"] |= {
                "id": int(self.here.id),
                "name": self.here.name,
                "zone": f"projects/{NUMBER}/zones/{self.here.zone}",
                "hostname": f"{self.here.name}.c.{self.world.project}.internal",
                "disks": [
                    {
                        "deviceName": each.device_name,
                        "index": index,
                        "interface": each.interface,
                        "mode": each.mode,
                        "type": "PERSISTENT-BALANCED",
                    }
                    for index, each in enumerate(self.here.disks)
                ],
            }
        found["universe"] = {"universe-domain": "googleapis.com"}
        return found


class _Server(Server):
    settle: Any

    def service_actions(self) -> None:
        self.settle()


class _Handler(BaseHTTPRequestHandler):
    twin: Twin
    timeout = 10  # one that was killed while it was sending holds up nobody for longer

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.startswith("/compute/"):
            token = self.headers.get("Authorization", "")
            answer = self.twin.answer(self.command, self.path, token, body)
            if answer == "hang":
                self.twin.hanging.append(self.connection)
            elif not isinstance(answer, str):
                self._send(answer[0], "application/json; charset=UTF-8", answer[1])
        elif self.path == "/token" and self.command == "POST":
            status, said = self.twin.token(body)
            self._send(status, "application/json", said)
        elif self.command == "GET":
            self._send(*self.twin.metadata(self.path, self.headers.get("Metadata-Flavor", "")))
        else:
            self._send(404, "text/html", b"Not Found")

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = _any

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
