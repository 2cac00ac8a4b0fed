"""Which instance this is, asked of the instance metadata service (IMDSv2 alone). Must know nothing of the EC2 API."""

from __future__ import annotations

import functools
import http.client
import json
import os
from urllib.parse import urlsplit

from msgspec import Struct

from snapshotter.core.errors import PreconditionError

_TIMEOUT_S = 2.0
CURE = "allow IMDSv2 (in containers with a hop limit of 2), or name -o instance= and -o region="


class Here(Struct, frozen=True):
    """Where this program runs."""

    instance: str
    region: str
    zone: str
    account: str


def here() -> Here:
    """Raises PreconditionError if the service doesn't answer."""
    return _ask(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254/")


@functools.cache
def _ask(endpoint: str) -> Here:
    address = urlsplit(endpoint)
    try:
        token = _request(address.netloc, "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        path = "/latest/dynamic/instance-identity/document"
        found = json.loads(_request(address.netloc, "GET", path, {"X-aws-ec2-metadata-token": token}))
        return Here(
            instance=str(found["instanceId"]),
            region=str(found["region"]),
            zone=str(found["availabilityZone"]),
            account=str(found["accountId"]),
        )
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise PreconditionError(
            f"the instance metadata service doesn't answer: {error}", object="ebs", cure=CURE
        ) from None


def _request(host: str, method: str, path: str, headers: dict[str, str]) -> str:
    connection = http.client.HTTPConnection(host, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        content = answer.read(65536).decode()
        if answer.status != 200:
            raise http.client.HTTPException(f"status {answer.status}")
        return content
    finally:
        connection.close()
