"""Restore in place on LVM and ZFS: by swap (thin, zfs), by copy into the mount point (classic). Taken, run on, ruined,
restored, undone, restored again, discarded; and killed on the way: continued or undone, it ends as restored or as
before, byte for byte, and the service runs."""

from __future__ import annotations

import json
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotter.host import block, mounts
from tests.faults import in_place_kit
from tests.faults.in_place_kit import Story, difference, journals, ok, picture, run_here
from tests.lab import lvm_kit, zfs_kit
from tests.support import Command

pytestmark = [*lvm_kit.marks, pytest.mark.zfs, pytest.mark.skipif(bool(zfs_kit.here()), reason=zfs_kit.here())]
WAYS = {"thin": "swap", "classic": "copy", "zfs": "swap"}
#: A kill at every point of a restore takes hours on an emulated CPU: each part has every PARTS-th of them.
PARTS = 8
METHODS = ("attach", "detach", "swap", "swap_back", "swap_commit")


@pytest.fixture(autouse=True)
def calls_of_these_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kill may come, besides the calls that all ways share: around each step of a swap too."""
    theirs = [(f"providers.{name}", f"{kind}.{method}") for name, kind in PROVIDERS for method in METHODS]
    steps = [("providers.lvm.commands", "Group.lvm"), ("providers.zfs.tool", "change")]
    monkeypatch.setattr(in_place_kit, "CALLS", (*in_place_kit.CALLS, *theirs, *steps))


PROVIDERS = (("lvm", "LvmProvider"), ("zfs", "ZfsProvider"))


@contextmanager
def mounted(kind: str, home: Path) -> Iterator[Path]:
    """A mount point of its own that is one volume of this kind."""
    if kind == "zfs":
        with zfs_kit.pool(512) as pool:
            zfs_kit.zfs("create", f"{pool}/node")
            yield Path(next(mount.path for mount in zfs_kit.table() if mount.source == f"{pool}/node"))
        return
    with lvm_kit.storage(1200, pool_mb=500 if kind == "thin" else 0) as made:
        (made.thin if kind == "thin" else made.linear)("node", 300)
        lvm_kit.make_file_system(f"/dev/{made.vg}/node", "ext4")
        point = home / "node"
        point.mkdir()
        lvm_kit.lvm("mount", f"/dev/{made.vg}/node", str(point))
        yield point


@contextmanager
def story(kind: str) -> Iterator[Story]:
    with tempfile.TemporaryDirectory(prefix="p-", dir="/var/tmp") as name:
        home = Path(name)
        with mounted(kind, home) as point:
            # Room for every block of the origin: each restore by copy writes elsewhere on it.
            extra = 'options = {size = "310m"}\n' if kind == "classic" else ""
            node = Story(home, home / "home", "zfs" if kind == "zfs" else "lvm", data=point, extra=extra)
            node.command = Patient(node.command)
            try:
                yield node
            finally:
                node.service.end()


class Patient(Command):
    """An emulated service takes longer to say that it runs."""

    def __init__(self, plain: Command) -> None:
        super().__init__(plain.home, config=plain.config.read_text().partition("\n")[2].replace('"1s"', '"60s"'))


def check(node: Story, way: str) -> None:
    """The end of every path: the content is what it should be, the service runs, nothing is suspended, and an old state
    has nothing left of the restore."""
    now = {name: what for name, what in picture(node.data).items() if ".corrupted-" not in name}
    wrong = difference(now, node.of_set if way == "restored" else node.old)
    assert not wrong, f"not {way}: {wrong}"
    assert node.service.running(), f"{way}, and the service doesn't run: {node.service.did()}"
    assert not [device for device in block.mapped() if device.suspended]
    if way == "old":
        assert not node.leftovers(), node.leftovers()
        assert not journals(node)


def attached(node: Story) -> list[object]:
    return [found for entry in ok(node, "list")["sets"] for found in entry["attachments"]]


@pytest.mark.parametrize("kind", list(WAYS))
def test_restored_undone_restored_discarded(kind: str) -> None:
    with story(kind) as node:
        node.begin(40)
        node.run_and_damage()
        restore = ("restore", node.set_id, "--in-place", "--yes")
        done = ok(node, *restore)
        assert done["outcome"] == "restored" and done["way"] == WAYS[kind], done
        check(node, "restored")
        ok(node, "restore", "--undo", "ours")
        check(node, "old")
        ok(node, *restore)
        check(node, "restored")
        ok(node, "restore", "--discard", "ours", "--yes")
        check(node, "restored")
        assert not journals(node) and not node.leftovers() and not attached(node)
        assert mounts.is_mount_point(str(node.data))
        assert ok(node, "take", "ours")["good"]


def test_entries_change_places_on_zfs() -> None:
    """OpenZFS 2.1 can't exchange two names in one step: there and back by way of a third, each as a whole."""
    with story("zfs") as node:
        node.begin(20)
        node.run_and_damage()
        for only in ("database", "key"):
            ok(node, "restore", node.set_id, "--in-place", "--yes", "--only", only)
            assert node.service.running()
            ok(node, "restore", "--undo", "ours")
            check(node, "old")


def some(points: range, full: bool) -> list[int]:
    return list(points) if full else sorted(random.sample(points, 2))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", list(WAYS))
def test_killed_on_the_way(kind: str, part: int, full: bool, measured: Callable[[str], None]) -> None:
    with story(kind) as node:
        node.begin(40)
        node.run_and_damage()
        restore = ("restore", node.set_id, "--in-place", "--yes")
        _, said, calls = run_here(node.command, *restore)
        check(node, "restored")
        _, said, undoing = run_here(node.command, "restore", "--undo", "ours")
        check(node, "old")
        ended = {"restored": 0, "undone": 0, "nothing begun": 0}
        for turn, point in enumerate(some(range(1 + part, len(calls) + 1, PARTS), full)):
            killed, said, seen = run_here(node.command, *restore, kill_at=point)
            assert killed in (0, -signal.SIGKILL), f"{point}: exit {killed}\n{said}"
            way = ("--continue", "--undo")[turn % 2]
            code, said, _ = run_here(node.command, "restore", way, "ours", "--json")
            if code == 4 and not journals(node):  # it was killed before it began
                ok(node, "reap")
                check(node, "old")
                ended["nothing begun"] += 1
                continue
            assert code == 0, f"{way} after a kill at {point} ({seen[-1:]}): exit {code}\n{said}"
            outcome = json.loads(next(line for line in said.splitlines() if line.startswith("{")))["outcome"]
            ended[outcome] += 1
            check(node, "restored" if outcome == "restored" else "old")
            if outcome == "restored":
                ok(node, "restore", "--undo", "ours")
                check(node, "old")
        for turn, point in enumerate(some(range(1 + part, len(undoing) + 1, PARTS), full)[: None if full else 1]):
            ok(node, *restore)
            killed, said, seen = run_here(node.command, "restore", "--undo", "ours", kill_at=point)
            code, said, _ = run_here(node.command, "restore", ("--undo", "--continue")[turn % 2], "ours")
            assert code in (0, 4), f"after a kill of the undo at {point} ({seen[-1:]}): exit {code}\n{said}"
            if journals(node):  # --continue of an undo that was not begun
                ok(node, "restore", "--undo", "ours")
            check(node, "old")
        ok(node, "reap")
        assert not attached(node)
        measured(f"restore in place on {kind}, killed at {sum(ended.values())} of {len(calls)} points: {ended}")
