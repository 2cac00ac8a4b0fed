"""That the lab is what the other tests here take it for: the kernel, its modules, udev, the scratch disks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.root
MODULES = (
    "dm_thin_pool",
    "dm_snapshot",
    "dm_flakey",
    "dm_log_writes",
    "dm_delay",
    "zfs",
    "nvmet_tcp",
    "nvme_tcp",
    "loop",
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_there(module: str) -> None:
    subprocess.run(["modprobe", module], check=True, capture_output=True)
    assert Path("/sys/module", module).is_dir()


def test_the_kernel_is_the_one_whose_timestamps_lie() -> None:
    assert os.uname().release.startswith("6.1.")
