"""`status` of storage that fills: a thin pool, a classic snapshot's table, a pool of ZFS. It says which, exit 8."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.lab import lvm_kit, zfs_kit
from tests.support import Command
from tests.unit.test_status import look

MIB = 1 << 20


def fill(path: Path, megabytes: int) -> None:
    with open(path, "wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def parts(document: dict[str, Any]) -> dict[str, float]:
    (room,) = document["nodes"][0]["room"]
    return {part["name"]: part["full"] for part in room["parts"]}


@pytest.mark.lvm
@pytest.mark.skipif(not lvm_kit.has_device_mapper(), reason="needs root, LVM and a kernel with device-mapper")
@pytest.mark.parametrize("kind", ["thin", "classic"])
def test_lvm(tmp_path: Path, kind: str) -> None:
    point = tmp_path / "node"
    point.mkdir()
    thin = kind == "thin"
    with lvm_kit.storage(400, pool_mb=100 if thin else 0) as made:
        (made.thin if thin else made.linear)("data", 120)
        lvm_kit.make_file_system(f"/dev/{made.vg}/data", "ext4")
        subprocess.run(["mount", f"/dev/{made.vg}/data", str(point)], check=True)
        try:
            (point / "file").write_text("content")
            options = "" if thin else 'provider = "lvm"\noptions = {size = "24m"}\nfloor = "5%"\n'
            command = Command(tmp_path / "etc", config=f'[node.n]\npath = "{point}"\n{options}')
            taken = command.json("take", "n")
            assert taken["snapshots"][0]["provider"] == "lvm" and look(command, 0)[1] == set()
            fill(point / "more", 86 if thin else 22)
            document, problems = look(command, 8)
            assert problems == {"full"}
            name = next(name for name, full in parts(document).items() if full > 0.85)
            assert name == "space" if thin else name.endswith("copy-on-write")
            said = command.run("status", "n").stdout
            assert "full" in said and (thin or "copy-on-write" in said), said
        finally:
            subprocess.run(["umount", str(point)], check=False)


@pytest.mark.zfs
@pytest.mark.skipif(bool(zfs_kit.here()), reason=zfs_kit.here() or "-")
def test_zfs(tmp_path: Path) -> None:
    with zfs_kit.pool(200) as pool:
        zfs_kit.zfs("create", f"{pool}/n")
        point = Path(zfs_kit.zfs("get", "-Ho", "value", "mountpoint", f"{pool}/n").strip())
        command = Command(tmp_path / "etc", config=f'[node.n]\npath = "{point}"\n')
        (point / "file").write_text("content")
        assert command.json("take", "n")["snapshots"][0]["provider"] == "zfs"
        assert look(command, 0)[1] == set()
        room = command.json("status")["nodes"][0]["room"][0]
        fill(point / "more", (room["free_bytes"] - room["total_bytes"] // 20) // MIB)
        _, problems = look(command, 8)
        assert problems == {"full"}
        assert command.error("take", "n", exit_code=3), "it says what take says"
