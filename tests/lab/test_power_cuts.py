"""The power goes while a take runs, at any write of it: afterwards nothing that was there is lost, nothing unsealed is
good, and what the dead run left goes."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotter.core.model import Access, Birth, ImageState, Snapshot, Volume
from snapshotter.host import block, mounts
from snapshotter.testing import make_birth
from snapshotter.testing.conformance import attach, seal, take
from tests.lab.log_writes import detach, logged, run
from tests.lab.lvm_kit import LvmHarness, Storage, lvm, make_file_system, marks, tear_down

pytestmark = marks
VG = f"tpower{os.getpid()}"
MEGABYTES = 260


@contextmanager
def on_disk(disk: str, scratch: Path, thin: bool) -> Iterator[LvmHarness]:
    """The group that lies on this disk, activated and mounted as after a boot; taken down again."""
    made = Storage(VG, disk)
    lvm("vgchange", "-qq", "-aay", VG)
    lvm("udevadm", "settle")
    harness = LvmHarness(made, scratch, thin)
    harness.points[f"{VG}/data"] = str(scratch / "data")
    (scratch / "data").mkdir(parents=True, exist_ok=True)
    harness.mount_all()
    try:
        yield harness
    finally:
        lvm("umount", str(scratch / "data"), check=False)
        for device in block.mapped():
            if device.dm_name.startswith("snapshotter-"):
                lvm("dmsetup", "remove", "--retry", device.dm_name, check=False)
        lvm("vgchange", "-qq", "-an", VG, check=False)
        # What stays active here would be taken for the group on the next disk, which has the same UUIDs.
        left = [device.dm_name for device in block.mapped() if device.dm_name.startswith(VG + "-")]
        assert not left, f"still active on {disk}: {left}"


def written(path: Path) -> list[str]:
    """What had been written with a sync, oldest first."""
    return sorted(each.name for each in path.glob("synced-*"))


def write(path: Path, number: int) -> None:
    with open(path / f"synced-{number:04}", "w") as file:
        file.write(f"{number}" * 1000)
        os.fsync(file.fileno())
    directory = os.open(path, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def take_in_a_run_of_its_own(harness: LvmHarness, volume: Volume, birth: Birth) -> None:
    """After a power cut there is no such process any more, nor here."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            provider = harness.provider()
            take(provider, harness, [volume], birth)
            seal(provider, birth)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@contextmanager
def unseen_by_lvm(disk: str, scratch: Path) -> Iterator[None]:
    """What lies below the logged disk has the same content: LVM must see one of the two."""
    shutil.copytree("/etc/lvm", scratch / "lvm")
    with open(scratch / "lvm" / "lvmlocal.conf", "a") as file:
        file.write(f'\ndevices {{ global_filter = [ "r|^{disk}$|" ] }}\n')
    run("mount", "--bind", str(scratch / "lvm"), "/etc/lvm")
    try:
        yield
    finally:
        run("umount", "/etc/lvm")


@pytest.mark.parametrize("kind", ["thin", "classic"])
def test_power_goes_during_a_take(kind: str, request: pytest.FixtureRequest, measured: Callable[[str], None]) -> None:
    thin = kind == "thin"
    points = 20 if request.config.getoption("--full") else 2
    scratch = Path(tempfile.mkdtemp(prefix="pc-", dir="/var/tmp"))
    try:
        base = scratch / "base"
        with open(base, "wb") as file:
            file.truncate(MEGABYTES << 20)
        with loop(base) as disk:
            lvm("pvcreate", "-qq", "-y", disk)
            lvm("vgcreate", "-qq", VG, disk)
            made = Storage(VG, disk)
            if thin:
                pool = ["-L", "140m", "--poolmetadatasize", "4m", "-Zn", "--poolmetadataspare", "n"]
                lvm("lvcreate", "-qq", "-y", *pool, "-T", made.pool)
            (made.thin if thin else made.linear)("data", 60)
            make_file_system(f"/dev/{VG}/data", "ext4")
            lvm("vgchange", "-qq", "-an", VG)
        with logged(f"{VG}log", scratch, base) as disk_of_log:
            hidden = unseen_by_lvm(disk_of_log.below, scratch)
            with hidden, on_disk(disk_of_log.device, scratch / "m", thin) as harness:
                top = scratch / "m" / "data"
                volume = harness.provider().claim(mounts.mount_of(str(top)), str(top))
                assert volume is not None
                write(top, 1)
                earlier = take(harness.provider(), harness, [volume])
                seal(harness.provider(), earlier)
                write(top, 2)
                run("sync")
                birth = make_birth([volume])
                disk_of_log.mark("begin")
                take_in_a_run_of_its_own(harness, volume, birth)
                disk_of_log.mark("sealed")
                write(top, 3)
                disk_of_log.mark("end")
            entries = disk_of_log.entries()
        at = {entry.mark: number for number, entry in enumerate(entries) if entry.mark}
        first, last = at["begin"], at["end"]
        # The seal's own moment always: before its flush it may be lost, behind it not.
        sealed = at["sealed"] + 1
        moments = sorted({sealed, *random.sample([*range(first, sealed), *range(sealed + 1, last + 1)], points - 1)})
        states: dict[str, int] = {}
        for moment in moments:
            disk_of_log.cut(entries, moment, scratch / "cut")
            with loop(scratch / "cut") as disk, on_disk(disk, scratch / "m", thin) as harness:
                state = after(harness, scratch / "m" / "data", earlier.set_id, birth.set_id, moment > at["sealed"])
                states[state] = states.get(state, 0) + 1
        measured(f"power cut at {len(moments)} of {last - first} writes of a take, {kind}: {states}")
    finally:
        tear_down(Storage(VG, ""))
        shutil.rmtree(scratch, ignore_errors=True)


def after(harness: LvmHarness, top: Path, earlier: str, cut: str, sealed: bool) -> str:
    """What the power cut left of the take, once all has been looked at."""
    assert written(top)[:2] == ["synced-0001", "synced-0002"], "what was synced before is lost"
    for name in written(top)[:2]:
        assert (top / name).read_text() == f"{int(name[-4:])}" * 1000
    found = {each.birth.set_id: each for each in harness.provider().snapshots()}
    assert found[earlier].state is ImageState.READY and "sealed" in found[earlier].marks
    assert contents(harness, found[earlier]) == ["synced-0001"]
    left = found.get(cut)
    state = "nothing" if left is None else "sealed" if "sealed" in left.marks else "a leftover"
    if sealed and state != "sealed":
        said = lvm("lvs", "-a", "-o", "lv_name,vg_seqno,lv_attr,lv_tags,devices", VG) + lvm("losetup", "--list")
        pytest.fail(f"the seal had been written, and is lost: {state}, {left}, {said}")
    if left is not None and state == "sealed":
        assert left.state is ImageState.READY and contents(harness, left) == ["synced-0001", "synced-0002"]
    elif left is not None:
        assert left.state is ImageState.INVALID, "its maker is dead, and nobody can vouch for it"
        harness.provider().delete(cut)  # as `reap` does once its deadline is past
    harness.provider().reap()
    kept = {earlier, cut} if state == "sealed" else {earlier}
    assert {each.birth.set_id for each in harness.provider().snapshots()} == kept
    assert set(harness.storage.ours()) == {f"{set_id}-0" for set_id in kept}
    assert not harness.thin or not harness.storage.orphans()
    volume = harness.provider().claim(mounts.mount_of(str(top)), str(top))
    assert volume is not None
    following = take(harness.provider(), harness, [volume])
    seal(harness.provider(), following)
    (image,) = harness.provider().snapshots(following.set_id)
    assert contents(harness, image)[:2] == ["synced-0001", "synced-0002"]
    return state


def contents(harness: LvmHarness, image: Snapshot) -> list[str]:
    attached = attach(harness, image, Access.READ_ONLY)
    try:
        return written(Path(attached.path))
    finally:
        attached.end()


@contextmanager
def loop(path: Path) -> Iterator[str]:
    disk = run("losetup", "--find", "--show", str(path))
    try:
        yield disk
    finally:
        detach(disk)
