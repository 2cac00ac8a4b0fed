"""Which instance this is, asked of the instance metadata service (IMDSv2 alone). Must know nothing of the EC2 API."""

from __future__ import annotations

import functools
import json
import os
from urllib.parse import urlsplit

from msgspec import Struct

from snapshotter.core.errors import PreconditionError
from snapshotter.host.metadata import ask

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
    host = urlsplit(endpoint).netloc
    token = ask("ebs", host, "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, CURE)
    path = "/latest/dynamic/instance-identity/document"
    document = ask("ebs", host, "GET", path, {"X-aws-ec2-metadata-token": token}, CURE)
    try:
        found = json.loads(document)
        return Here(
            instance=str(found["instanceId"]),
            region=str(found["region"]),
            zone=str(found["availabilityZone"]),
            account=str(found["accountId"]),
        )
    except (ValueError, KeyError) as error:
        raise PreconditionError(
            f"the instance metadata service says nonsense: {error}", object="ebs", cure=CURE
        ) from None
