"""status of what only LVM has: a thin pool that runs full, its metadata, the table of a classic snapshot."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.lvm_kit import Storage, make_file_system, marks, storage
from tests.support import Command
from tests.unit.test_status import look

pytestmark = marks


@contextmanager
def node_on(made: Storage, tmp_path: Path, more: str = "") -> Iterator[tuple[Command, Path]]:
    data = tmp_path / "node"
    data.mkdir()
    make_file_system(f"/dev/{made.vg}/data", "ext4")
    subprocess.run(["mount", f"/dev/{made.vg}/data", str(data)], check=True)
    try:
        (data / "file").write_text("x")
        yield Command(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\n{more}'), data
    finally:
        subprocess.run(["umount", str(data)], check=False)


def write(path: Path, megabytes: int) -> None:
    with open(path, "wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())


def parts(document: dict, name: str) -> float:  # type: ignore[type-arg]
    found: float = next(part["full"] for part in document["nodes"][0]["room"][0]["parts"] if name in part["name"])
    return found


def test_a_thin_pool_that_runs_full(tmp_path: Path) -> None:
    with storage(600, pool_mb=128) as made:
        made.thin("data", 200)
        with node_on(made, tmp_path) as (command, data):
            command.json("take", "n")
            document, problems = look(command, 0)
            assert problems == set() and parts(document, "space") < 0.5 and 0 < parts(document, "metadata") < 0.9
            write(data / "ballast", 112)
            document, problems = look(command, 8)
            assert problems >= {"full"} and parts(document, "space") > 0.9
            assert command.run("take", "n").returncode == 3, "it says what take says"


def test_the_table_of_a_classic_snapshot(tmp_path: Path) -> None:
    with storage(600) as made:
        made.linear("data", 200)
        with node_on(made, tmp_path, 'provider = "lvm"\noptions = {size = "32M"}\n') as (command, data):
            taken = command.json("take", "n")
            assert look(command, 0)[1] == set()
            write(data / "new", 29)
            document, problems = look(command, 8)
            assert problems == {"full"} and parts(document, "copy-on-write") > 0.9
            write(data / "more", 10)
            document, problems = look(command, 8)
            assert "damaged" in problems and document["nodes"][0]["newest_good"] is None
            command.json("delete", taken["set_id"], "--yes", "--last")
