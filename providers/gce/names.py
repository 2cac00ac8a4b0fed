"""How Compute Engine's things are named: links, zones and regions, disks by `ZONE/NAME` or `REGION/NAME`. Must know no
call, and load nothing that takes time.
"""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct

from snapshotter.host.cloud import parts
from snapshotter.provider import VENDORS

NAME = "gce"
VENDOR = VENDORS["gce"]
#: udev's link to a disk has the device's name behind this.
BY_ID = "google-"
_ZONE = re.compile(r".+-[a-z]")


def last(link: str) -> str:
    """The name at the end of a link."""
    return link.rpartition("/")[2]


def path_of(link: str) -> str:
    """A link, whichever way it is written, as `projects/P/zones/Z/disks/D`: two are compared like that."""
    return "projects/" + link.rpartition("projects/")[2] if "projects/" in link else link


class Disk(Struct, frozen=True):
    """Where a disk is: in a zone, or, replicated to two of them, in a region."""

    place: str
    name: str

    @property
    def id(self) -> str:
        """As volumes are named in records: `europe-west3-a/data`."""
        return f"{self.place}/{self.name}"

    @property
    def regional(self) -> bool:
        return not _ZONE.fullmatch(self.place)

    @property
    def service(self) -> str:
        return "RegionDisks" if self.regional else "Disks"

    @property
    def where(self) -> dict[str, Any]:
        """The field of a request that says where."""
        return {"region" if self.regional else "zone": self.place}

    def link(self, project: str) -> str:
        return f"projects/{project}/{'regions' if self.regional else 'zones'}/{self.place}/disks/{self.name}"


def disk(volume: str) -> Disk:
    """Inverse of `Disk.id`."""
    place, _, name = volume.rpartition("/")
    return Disk(place, name)


def disk_of(link: str) -> Disk | None:
    """The disk that a link names; None for another thing's link."""
    found = re.search(r"/(?:zones|regions)/([^/]+)/disks/([^/]+)$", link)
    return Disk(found[1], found[2]) if found else None


def region_of(place: str) -> str:
    return place.rpartition("-")[0] if _ZONE.fullmatch(place) else place


def member_names(identity: str, member: int, volume: str) -> list[str]:
    """The names of a set's snapshots, of an attachment's disks, one for each disk of the volume: whoever repeats the
    call that makes it asks for the same name, and there is one."""
    count = len(parts(volume))
    return [f"{identity}-{member}" if count == 1 else f"{identity}-{member}-{part}" for part in range(count)]


def milliseconds(stamp: str) -> int:
    """`2026-11-22T02:06:30.123-08:00` since 1970."""
    from datetime import datetime

    return int(datetime.fromisoformat(stamp).timestamp() * 1000)


def labels_of(item: Any) -> dict[str, str]:
    return dict(item.labels)
