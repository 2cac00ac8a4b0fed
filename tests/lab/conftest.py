"""The lab's own: a test of these never runs outside the virtual machine, and a session leaves no storage behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

IN_LAB = os.environ.get("SNAPSHOTTER_IN_LAB") == "1"
HERE = os.path.dirname(__file__)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not IN_LAB:
        for item in items:
            if str(item.path).startswith(HERE + os.sep):
                item.add_marker(pytest.mark.skip(reason="runs in the virtual machine only: scripts/lab"))


def said(*words: str) -> list[str]:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()


def storage() -> dict[str, list[str]]:
    """What tests may leave behind, asked of the kernel and the tools themselves."""
    devices = [line.split(":") for line in said("dmsetup", "info", "-c", "--noheadings", "-o", "name,suspended")]
    devices = [words for words in devices if len(words) == 2]  # else: `No devices found`
    return {
        "volume groups": said("vgs", "--noheadings", "-o", "vg_name"),
        "pools": said("zpool", "list", "-H", "-o", "name"),
        "mapped devices": [name for name, _ in devices],
        "suspended devices": [name for name, state in devices if state.lower() == "suspended"],
        "loop devices": said("losetup", "--list", "--noheadings", "-O", "NAME"),
        "mounts": [
            line.split()[1] for line in open("/proc/mounts") if line.startswith(("/dev/mapper", "/dev/dm", "/dev/loop"))
        ],
    }


@pytest.fixture(scope="session", autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    """Over all tests of the session: whatever they killed, the machine is as it was."""
    if not IN_LAB:
        yield
        return
    before = storage()
    yield
    subprocess.run(["udevadm", "settle"], check=False)
    after = storage()
    left = {kind: sorted(set(names) - set(before[kind])) for kind, names in after.items()}
    assert not any(left.values()), (
        f"left behind by the tests: { ({kind: names for kind, names in left.items() if names}) }"
    )


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))
