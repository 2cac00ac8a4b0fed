"""A btrfs that is full, read-only, frozen, changed behind our back; runs that die; other tools at work beside us."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from msgspec.structs import replace

from snapshotter.core.errors import Exit, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.model import Access, Birth, Hold, ImageState, Volume, new_attachment_id, new_set_id, utc_now
from snapshotter.host import btrfs
from snapshotter.host.mounts import mount_of, table
from snapshotter.provider import Provider
from snapshotter.testing import describe, make_birth
from snapshotter.testing.conformance import attach, content_of, seal, take
from snapshotter.testing.harness import fill, ruin
from tests.unit.btrfs_kit import BtrfsHarness, btrfs_harness, command

pytestmark = pytest.mark.root


@pytest.fixture
def harness() -> Iterator[BtrfsHarness]:
    with btrfs_harness() as harness:
        yield harness


@pytest.fixture
def volume(harness: BtrfsHarness) -> Volume:
    volume = harness.volume()
    fill(top(volume))
    return volume


def top(volume: Volume) -> str:
    assert volume.path is not None
    return volume.path


def taken(harness: BtrfsHarness, volume: Volume) -> Birth:
    birth = take(harness.provider(), harness, [volume])
    seal(harness.provider(), birth)
    return birth


# --------------------------------------------------------------------------------------------------- runs that die


class Life:
    """One set, one attachment and one swap of a volume, by ids, and each step of their life."""

    def __init__(self, harness: BtrfsHarness, volume: Volume) -> None:
        now = utc_now()
        self.harness, self.volume = harness, volume
        self.birth = make_birth([volume], set_id=new_set_id(now))
        self.set_id = self.birth.set_id
        self.attachment = new_attachment_id(now)
        self.swap = "w" + self.set_id[1:]

    def steps(self, provider: Provider) -> dict[str, Callable[[], object]]:
        def found() -> object:
            return next(iter(provider.snapshots(self.set_id)))

        def create() -> None:
            provider.prepare([self.volume], self.birth, 5.0)
            provider.create([self.volume], self.birth, Hold())

        return {
            "create": create,
            "mark": lambda: seal(provider, self.birth),
            "attach": lambda: provider.attach(found(), self.attachment, Access.WRITABLE, "/nowhere"),  # type: ignore[arg-type]
            "settle": lambda: provider.settle(self.attachment, datetime.now(UTC)),
            "detach": lambda: provider.detach(self.attachment),
            "swap": lambda: provider.swap(self.swap, found(), self.volume),  # type: ignore[arg-type]
            "swap_back": lambda: provider.swap_back(self.swap),
            "delete": lambda: provider.delete(self.set_id),
        }

    def undo(self) -> None:
        provider = self.harness.provider()
        provider.swap_back(self.swap)
        provider.detach(self.attachment)
        provider.delete(self.set_id)
        provider.reap()


@pytest.mark.parametrize("step", ["create", "mark", "attach", "settle", "detach", "swap", "swap_back", "delete"])
def test_killed_in_the_middle_of(
    harness: BtrfsHarness, volume: Volume, step: str, request: pytest.FixtureRequest
) -> None:
    """SIGKILL at random moments of each call; then the inverses and `reap` leave the storage as it was."""
    kept = taken(harness, volume)
    theirs = harness.foreign(volume)
    before, content = harness.objects(), describe(top(volume))
    usual = Life(harness, volume)
    lasted: dict[str, float] = {}
    for name, act in usual.steps(harness.provider()).items():
        began = time.perf_counter()
        act()
        lasted[name] = time.perf_counter() - began
    middle = 0
    for _ in range(40 if request.config.getoption("--full") else 8):
        life = Life(harness, volume)
        steps = life.steps(harness.provider())
        for name in list(steps)[: list(steps).index(step)]:
            steps[name]()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(write, b"1")
                life.steps(harness.provider())[step]()
                os.write(write, b"2")
                time.sleep(60)
            finally:
                os._exit(1)
        os.close(write)
        os.read(read, 1)
        time.sleep(random.uniform(0, lasted[step] * 1.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        middle += os.read(read, 1) == b""
        os.close(read)
        for found in harness.provider().snapshots():
            if "sealed" in found.marks and found.birth.set_id == life.set_id:
                assert found.state is ImageState.READY or step == "delete"
        if step == "attach":
            assert not any(found.held for found in harness.provider().attachments()), "held by a dead run"
        life.undo()
        assert harness.objects() == before
        assert describe(top(volume)) == content
        assert not list(harness.provider().swaps()) and not list(harness.provider().attachments())
        assert [found.birth.set_id for found in harness.provider().snapshots()] == [kept.set_id]
    assert theirs()
    assert middle, "no kill hit the call"


def test_a_clearer_and_a_taker_at_once(harness: BtrfsHarness, volume: Volume) -> None:
    """`reap` in a loop must never take from under a live run what that is just making."""
    taken(harness, volume)
    child = os.fork()
    if child == 0:
        provider = harness.provider()
        try:
            while True:
                provider.reap()
        finally:
            os._exit(1)
    try:
        for _ in range(20):
            birth = taken(harness, volume)
            (found,) = harness.provider().snapshots(birth.set_id)
            attachment_id = new_attachment_id(utc_now())
            harness.provider().attach(found, attachment_id, Access.WRITABLE, "/nowhere")
            harness.provider().detach(attachment_id)
            harness.provider().delete(birth.set_id)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.alone  # a `sync` of anybody's writes what is not yet to be on the disk
def test_sealed_is_on_the_disk(tmp_path: Path) -> None:
    """What the disk holds right after the seal, as after a power cut, has the seal and the image. The kernel would
    otherwise write only every 300 s, and what is written later is not there: the control."""
    with btrfs_harness(options="commit=300") as harness:
        volume = harness.volume()
        fill(top(volume))
        content = describe(top(volume))
        birth = take(harness.provider(), harness, [volume])
        (image,) = harness.scratch.glob("*.img")
        born = tmp_path / "born.img"
        subprocess.run(["cp", "--sparse=always", str(image), str(born)], check=True)
        seal(harness.provider(), birth)
        sealed = tmp_path / "sealed.img"
        Path(top(volume), "later").write_bytes(b"x" * 100_000)
        late = harness.provider()
        late.prepare([volume], make_birth([volume], set_id="s20261122t100630z-5f3a9c"), 1.0)
        subprocess.run(["cp", "--sparse=always", str(image), str(sealed)], check=True)
    # The origin is unmounted by now: never a block-level copy beside it.
    for cut, is_sealed in ((born, False), (sealed, True)):
        point = tmp_path / cut.stem
        point.mkdir()
        subprocess.run(["btrfs", "device", "scan", "--forget"], capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(cut), str(point)], check=True)
        try:
            after = BtrfsHarness(point, tmp_path)
            (found,) = after.provider().snapshots()
            assert found.birth == birth, "only what was on the disk"
            assert found.state is ImageState.READY and ("sealed" in found.marks) is is_sealed
            assert content_of(after, found) == content
            assert not (point / "data-1" / "later").exists()
        finally:
            subprocess.run(["umount", str(point)], check=True)


# ------------------------------------------------------------------------------------------------------------ full


def fill_data(where: str) -> None:
    size = 4 << 20
    with open(os.path.join(where, "ballast"), "wb", buffering=0) as file:
        while size >= 4096:
            try:
                file.write(os.urandom(size))
                os.fsync(file.fileno())
            except OSError as error:
                assert error.errno == errno.ENOSPC
                size //= 2


def fill_metadata(where: str) -> None:
    """Files small enough to lie in the metadata, until not one more can be made."""
    os.mkdir(os.path.join(where, "tiny"))
    failures = 0
    for number in range(1_000_000):
        try:
            with open(os.path.join(where, "tiny", f"{number:0200}"), "wb") as file:
                file.write(b"x" * 1800)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failures += 1
            os.sync()
            if failures > 5:
                return


@pytest.mark.parametrize("how", [fill_data, fill_metadata])
@pytest.mark.timeout(600)
def test_full(how: Callable[[str], None]) -> None:
    """Refused in one line, nothing left behind; and deleting, the way out, still works."""
    with btrfs_harness(megabytes=200) as harness:
        volume = harness.volume()
        fill(top(volume))
        content = describe(top(volume))
        kept, old = taken(harness, volume), taken(harness, volume)
        before = harness.objects()
        fill_data(str(harness.point))
        if how is fill_metadata:
            fill_metadata(str(harness.point))
        provider = harness.provider()

        for _ in range(10):
            birth = make_birth([volume])
            try:
                provider.prepare([volume], birth, 1.0)
                provider.create([volume], birth, Hold())
                provider.mark(birth.set_id, {"sealed": "20261122t100630z"})
            except SnapshotterError as error:
                assert isinstance(error, StorageError) and error.exit is Exit.REFUSED, error.line()
                assert "full" in error.line() and error.cure
            provider.delete(birth.set_id)
        assert harness.objects() == before
        provider.delete(old.set_id)
        provider.reap()
        (found,) = harness.provider().snapshots()
        assert found.birth.set_id == kept.set_id and found.state is ImageState.READY
        os.unlink(harness.point / "ballast")
        shutil.rmtree(harness.point / "tiny", ignore_errors=True)
        os.sync()
        assert content_of(harness, found) == content
        taken(harness, volume)


def test_the_floor_is_refused_before_anything(harness: BtrfsHarness, volume: Volume) -> None:
    provider = harness.provider()
    room = os.statvfs(harness.point)
    provider.settings = replace(provider.settings, floor=room.f_bavail / room.f_blocks + 0.01)
    with pytest.raises(PreconditionError, match="snapshots keep what is deleted") as refused:
        provider.check([volume], make_birth([volume]))
    assert refused.value.cure
    provider.settings = replace(provider.settings, floor=room.f_bavail / room.f_blocks - 0.01)
    provider.check([volume], make_birth([volume]))


# ------------------------------------------------------------------------------------------- read-only, and frozen


@contextmanager
def frozen(harness: BtrfsHarness, at_most_s: float = 60) -> Iterator[None]:
    """Frozen, and thawed in any case: who hangs in a frozen file system can't even be killed."""
    subprocess.run(["fsfreeze", "-f", str(harness.point)], check=True)
    rescue = threading.Timer(at_most_s, lambda: subprocess.run(["fsfreeze", "-u", str(harness.point)]))
    rescue.start()
    try:
        yield
    finally:
        assert rescue.is_alive(), "it hung until it was thawed"
        rescue.cancel()
        subprocess.run(["fsfreeze", "-u", str(harness.point)], check=True)


def changing(harness: BtrfsHarness, volume: Volume, birth: Birth) -> dict[str, Callable[[], object]]:
    provider = harness.provider()
    found = next(iter(provider.snapshots(birth.set_id)))
    return {
        "check": lambda: provider.check([volume], make_birth([volume])),
        "prepare": lambda: provider.prepare([volume], make_birth([volume]), 1.0),
        "create": lambda: provider.create([volume], make_birth([volume]), Hold()),
        "mark": lambda: provider.mark(birth.set_id, {"pinned": "1"}),
        "delete": lambda: provider.delete(birth.set_id),
        "attach": lambda: provider.attach(found, new_attachment_id(utc_now()), Access.WRITABLE, "/nowhere"),
        "attach read-only": lambda: provider.attach(found, new_attachment_id(utc_now()), Access.READ_ONLY, "/nowhere"),
        "swap": lambda: provider.swap("w20261122t100630z-5f3a9c", found, volume),
    }


def test_read_only(harness: BtrfsHarness, volume: Volume) -> None:
    """Refused; still listed; and nothing of ours turns it to read-write (the kernel would, for a mount that doesn't say
    read-only)."""
    birth = taken(harness, volume)
    before, content = harness.objects(), describe(top(volume))
    subprocess.run(["mount", "-o", "remount,ro", str(harness.point)], check=True)
    try:
        for name, act in changing(harness, volume, birth).items():
            with pytest.raises(PreconditionError, match="read-only") as refused:
                act()
            assert "remount,rw" in refused.value.cure, name
        (found,) = harness.provider().snapshots()
        assert found.state is ImageState.READY
        harness.provider().space([volume])
        harness.provider().reap()
        assert mount_of(str(harness.point)).read_only, "we made it writable"
        assert "ro" in mount_of(str(harness.point)).super_options
        assert harness.objects() == before and describe(top(volume)) == content
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(harness.point)], check=True)
    harness.provider().delete(birth.set_id)


def test_a_set_on_two_file_systems_is_marked_on_both_or_none(harness: BtrfsHarness, volume: Volume) -> None:
    with btrfs_harness(megabytes=200) as other:
        second = other.volume()
        fill(top(second))
        provider = harness.provider()
        both = [*provider._file_systems(), *other.provider()._file_systems()]
        vars(provider)["_file_systems"] = lambda: [replace(fs, mount=mount_of(fs.mount.path)) for fs in both]
        volumes = [volume, second]
        birth = make_birth(volumes)
        provider.check(volumes, birth)
        provider.prepare(volumes, birth, 1.0)
        provider.create(volumes, birth, Hold())
        subprocess.run(["mount", "-o", "remount,ro", str(other.point)], check=True)
        with pytest.raises(PreconditionError, match="read-only"):
            seal(provider, birth)
        assert [dict(found.marks) for found in provider.snapshots()] == [{}, {}]
        subprocess.run(["mount", "-o", "remount,rw", str(other.point)], check=True)
        seal(provider, birth)
        assert all("sealed" in found.marks for found in provider.snapshots())
        assert sorted(found.volume for found in provider.snapshots()) == sorted(each.id for each in volumes)
        provider.delete(birth.set_id)
        assert not list(provider.snapshots())


def test_only_the_mount_is_read_only(harness: BtrfsHarness, volume: Volume) -> None:
    with harness.mounted("subvol=/data-1", "ro") as point:
        taken(harness, harness.claimed(str(point)))


def test_frozen(harness: BtrfsHarness, volume: Volume) -> None:
    """Each call ends with the cure instead of hanging past its own SIGKILL; after the thaw nothing is made late."""
    birth = taken(harness, volume)
    before = harness.objects()
    with frozen(harness):
        for name, act in changing(harness, volume, birth).items():
            with pytest.raises(StorageError, match="frozen") as refused:
                act()
            assert f"fsfreeze -u {harness.point}" in refused.value.cure, name
        (found,) = harness.provider().snapshots()
        assert found.state is ImageState.READY
    time.sleep(0.5)
    assert harness.objects() == before


def test_frozen_by_whoever_holds_the_writers(harness: BtrfsHarness, volume: Volume) -> None:
    taken(harness, volume)
    before, birth = harness.objects(), make_birth([volume])
    provider = harness.provider()
    provider.prepare([volume], birth, 1.0)
    with frozen(harness), pytest.raises(StorageError, match="frozen"):
        provider.create([volume], birth, Hold(deadline=time.monotonic() + 1.0))
    harness.provider().delete(birth.set_id)
    assert harness.objects() == before


def test_asking_a_frozen_one_holds_nothing(harness: BtrfsHarness, volume: Volume) -> None:
    """The child that hangs until the thaw must keep neither our locks nor whoever reads our output."""
    read, write = os.pipe()
    with frozen(harness):
        with pytest.raises(StorageError, match="frozen"):
            harness.provider().check([volume], make_birth([volume]))
        os.close(write)
        os.set_blocking(read, False)
        assert os.read(read, 1) == b"", "the pipe is still open in a child"
    os.close(read)


def test_the_time_is_over(harness: BtrfsHarness, volume: Volume) -> None:
    before, birth = harness.objects(), make_birth([volume])
    with pytest.raises(StorageError, match="is over"):
        harness.provider().create([volume], birth, Hold(deadline=time.monotonic() - 0.1))
    harness.provider().delete(birth.set_id)
    assert {name for name in harness.objects() if "s20" in name} == {name for name in before if "s20" in name}


# ------------------------------------------------------------------------------------------------ behind our back


def test_the_origin_is_removed_between_check_and_create(harness: BtrfsHarness, volume: Volume) -> None:
    kept = taken(harness, volume)
    before, birth = harness.objects(), make_birth([volume])
    provider = harness.provider()
    provider.check([volume], birth)
    provider.prepare([volume], birth, 1.0)
    command("subvolume", "delete", top(volume))
    with pytest.raises(SnapshotterError, match="no such subvolume") as refused:
        provider.create([volume], birth, Hold())
    assert refused.value.exit in (Exit.PRECONDITION, Exit.REFUSED)
    provider.delete(birth.set_id)
    assert harness.objects() == before
    (found,) = harness.provider().snapshots()
    assert found.birth.set_id == kept.set_id and found.state is ImageState.READY, "the image outlives its origin"
    attach(harness, found, Access.WRITABLE).end()


def test_the_set_is_removed_while_it_is_made(harness: BtrfsHarness, volume: Volume) -> None:
    taken(harness, volume)
    before, birth = harness.objects(), make_birth([volume])
    provider = harness.provider()
    provider.prepare([volume], birth, 1.0)
    harness.provider().delete(birth.set_id)
    with pytest.raises(StorageError, match="deleted while"):
        provider.create([volume], birth, Hold())
    assert harness.objects() == before


def test_the_whole_store_is_removed(harness: BtrfsHarness, volume: Volume) -> None:
    birth = taken(harness, volume)
    command("subvolume", "delete", str(harness.store / "sets" / birth.set_id / "0"))
    command("subvolume", "delete", str(harness.store))
    assert not list(harness.provider().snapshots())
    harness.provider().delete(birth.set_id)
    taken(harness, volume)


def test_damaged_records_hide_nothing_else(harness: BtrfsHarness, volume: Volume) -> None:
    good, bad = taken(harness, volume), taken(harness, volume)
    at = str(harness.store / "sets" / bad.set_id)
    os.setxattr(at, "trusted.snapshotter.marks", b"\xff{not json")
    (found,) = harness.provider().snapshots(bad.set_id)
    assert not found.marks and not found.marks_known, "it may be sealed, so it is nobody's leftover"
    newer = b'{"schema":2,"marks":{"sealed":"20261122t100630z"}}'
    os.setxattr(at, "trusted.snapshotter.marks", newer)
    with pytest.raises(StorageError):
        harness.provider().mark(bad.set_id, {"pinned": "1"})
    assert os.getxattr(at, "trusted.snapshotter.marks") == newer
    os.setxattr(at, "trusted.snapshotter.birth", b"\xff\x00")
    assert [found.birth.set_id for found in harness.provider().snapshots()] == [good.set_id]
    (harness.store / "sets" / "s20261122t100630z-5f3a9c").symlink_to("/etc")
    (harness.store / "attachments" / "a20261122t100630z-5f3a9c.0").mkdir()
    assert [found.birth.set_id for found in harness.provider().snapshots()] == [good.set_id]
    assert not list(harness.provider().attachments())
    harness.provider().delete("s20261122t100630z-5f3a9c")
    assert os.path.isdir("/etc")


def test_snapper_and_btrbk_beside_us(harness: BtrfsHarness, volume: Volume) -> None:
    """Their layouts, inside the volume and beside it, with their metadata: a whole life of ours changes nothing."""
    data = top(volume)
    command("subvolume", "create", f"{data}/.snapshots")
    for number in (1, 2):
        os.mkdir(f"{data}/.snapshots/{number}")
        Path(f"{data}/.snapshots/{number}/info.xml").write_text(f"<snapshot><num>{number}</num></snapshot>")
        command("subvolume", "snapshot", "-r", data, f"{data}/.snapshots/{number}/snapshot")
    os.mkdir(harness.point / "btrbk_snapshots")
    command("subvolume", "snapshot", "-r", data, str(harness.point / "btrbk_snapshots" / "data-1.20261122T1006"))

    def theirs() -> dict[str, tuple[object, ...]]:
        # Without what stands for a nested subvolume in a snapshot: inode 2, whose times are when it was looked at.
        return {
            os.path.join(where, path): what
            for where in (f"{data}/.snapshots", str(harness.point / "btrbk_snapshots"))
            for path, what in describe(where).items()
            if os.lstat(os.path.join(where, path)).st_ino != 2
        }

    before, listed = theirs(), command("subvolume", "list", "-u", str(harness.point))
    birth = taken(harness, volume)
    (found,) = harness.provider().snapshots()
    attach(harness, found, Access.WRITABLE).end()
    ruin(data)
    harness.provider().delete(birth.set_id)
    harness.provider().reap()
    assert theirs() == before
    after = command("subvolume", "list", "-u", str(harness.point)).splitlines()
    ours = [line for line in after if line.endswith(btrfs.STORE)]

    def stable(lines: list[str]) -> list[str]:
        return [line.split(" gen ")[0] + line.partition(" top level ")[2] for line in lines if line not in ours]

    assert stable(after) == stable(listed.splitlines())


def test_one_that_cannot_be_opened_hides_no_other(harness: BtrfsHarness, volume: Volume) -> None:
    birth = taken(harness, volume)
    with btrfs_harness(megabytes=200) as other:
        theirs = other.volume()
        taken(other, theirs)
        provider = harness.provider()
        good, bad = harness.provider()._file_systems()[0], other.provider()._file_systems()[0]

        class Broken(btrfs.FileSystem):
            def open_top(self) -> int:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        vars(provider)["_file_systems"] = lambda: [Broken(bad.uuid, bad.mount), good]
        seen = []
        with pytest.raises(StorageError, match="Input/output"):
            for found in provider.snapshots():
                seen.append(found.birth.set_id)
        assert seen == [birth.set_id]


def test_nothing_of_ours_stays_mounted(harness: BtrfsHarness, volume: Volume) -> None:
    """A run that is killed with the top level open leaves the file system free to be unmounted."""
    before = len(table())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            (fs,) = harness.provider()._file_systems()
            fs.open_top()
            os.write(write, b"1")
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.close(read)
    assert len(table()) == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(table()) == before
    source, uuid = mount_of(str(harness.point)).source, harness.provider()._file_systems()[0].uuid
    subprocess.run(["umount", str(harness.point)], check=True)
    give_up = time.monotonic() + 20
    while os.path.exists(f"/sys/fs/btrfs/{uuid}/devinfo") and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not os.path.exists(f"/sys/fs/btrfs/{uuid}/devinfo"), "something keeps it mounted"
    subprocess.run(["mount", source, str(harness.point)], check=True)
