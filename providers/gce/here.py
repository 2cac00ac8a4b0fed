"""Which instance this is, asked of the metadata server. Must know nothing of the API, nor load Google's libraries."""

from __future__ import annotations

import functools
import os

from msgspec import Struct

from snapshotter.host.metadata import ask

CURE = "is the metadata server reachable (in containers: the host's network)? or name -o instance= and -o zone="


class Here(Struct, frozen=True):
    """Where this program runs. `instance` is its name, `number` its id, which no other ever has."""

    instance: str
    number: str
    zone: str
    project: str

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]


def here() -> Here:
    """Raises PreconditionError if the server doesn't answer."""
    return _ask(os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal")


@functools.cache
def _ask(host: str) -> Here:
    def value(path: str) -> str:
        return ask("gce", host, "GET", f"/computeMetadata/v1/{path}", {"Metadata-Flavor": "Google"}, CURE)

    return Here(
        instance=value("instance/name"),
        number=value("instance/id"),
        zone=value("instance/zone").rpartition("/")[2],
        project=value("project/project-id"),
    )
