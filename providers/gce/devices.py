"""Device names of the disks here, as Compute Engine attached them. Must know no call, and load nothing that takes
time.

Google's images have a udev rule that links `/dev/disk/by-id/google-<device name>`. Where an image lacks it, an NVMe
disk says its name itself, as JSON in the vendor's part of its identity.
"""

from __future__ import annotations

import json
import os

from providers.gce.names import BY_ID
from snapshotter.host.disks import Disks

_MODEL = "nvme_card"  # `nvme_card-pd`, and `nvme_card` of local SSDs


def devices(host: Disks) -> dict[str, str]:
    """device name -> kernel name of the disk."""
    found = host.linked(BY_ID)
    blocks = f"{host.sysfs}/block"
    for disk in sorted(os.listdir(blocks)) if os.path.isdir(blocks) else []:
        if disk.startswith("nvme") and disk not in found.values() and host.model(disk).startswith(_MODEL):
            from snapshotter.host import nvme

            try:
                name = name_in(nvme.vendors_part(f"{host.dev}/{disk}"))
            except OSError:
                continue
            if name:
                found.setdefault(name, disk)
    return found


def name_in(vendors_part: bytes) -> str:
    """`{"device_name": "data", "disk_type": "PERSISTENT"}`; '' for anything else."""
    try:
        return str(json.loads(vendors_part)["device_name"])
    except (ValueError, KeyError, TypeError):
        return ""
