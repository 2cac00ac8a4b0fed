"""Google's own client, at the twin: how the twin's tests ask it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import google.auth.transport._mtls_helper  # noqa: F401  (slow, and each client would ask for it)
import pytest
from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import (
    GoogleAPICallError,
)
from google.auth.credentials import AnonymousCredentials
from google.cloud import compute_v1

from tests.twins.gce import Twin

ZONE, REGION = "europe-west3-a", "europe-west3"


class Asked:
    """The real client, at the twin: `ask("Disks.get", zone=..., disk=...)`. Operations are waited for."""

    def __init__(self, twin: Twin) -> None:
        self.twin, self._clients = twin, {}  # type: ignore[var-annotated]

    def client(self, service: str) -> Any:
        if service not in self._clients:
            options = ClientOptions(api_endpoint=self.twin.url)
            kind = getattr(compute_v1, f"{service}Client")
            self._clients[service] = kind(credentials=AnonymousCredentials(), client_options=options)  # type: ignore[no-untyped-call]
        return self._clients[service]

    def __call__(self, action: str, **fields: Any) -> Any:
        service, _, method = action.partition(".")
        request = {"project": self.twin.world.project, **fields}
        return getattr(self.client(service), method)(request=request, retry=None, timeout=5)

    def done(self, action: str, **fields: Any) -> Any:
        """What it began, looked at again."""
        return self.look(self(f"{action}_unary", **fields))

    def look(self, operation: Any) -> Any:
        where = {key: getattr(operation, key).rpartition("/")[2] for key in ("zone", "region") if key in operation}
        return self(f"{next(iter(where), 'global').capitalize()}Operations.get", operation=operation.name, **where)

    def snapshot(self, name: str, disk: str = "data", **more: Any) -> Any:
        source = f"projects/{self.twin.world.project}/zones/{ZONE}/disks/{disk}"
        return self("Snapshots.insert_unary", snapshot_resource={"name": name, "source_disk": source, **more})

    def disk(self, name: str = "data") -> Any:
        return self("Disks.get", zone=ZONE, disk=name)


def status(operation: Any) -> str:
    return str(compute_v1.Operation.Status(operation.status).name)


def codes(operation: Any) -> list[str]:
    return [error.code for error in operation.error.errors]


def reason(error: pytest.ExceptionInfo[GoogleAPICallError]) -> str:
    return str(error.value.errors[0]["reason"])


def raw(twin: Twin, method: str, path: str, body: object = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(twin.url + path, data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
