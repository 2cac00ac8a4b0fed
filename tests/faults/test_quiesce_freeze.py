"""Freezing real file systems (ext4 on loop devices), and that none stays frozen on any path out."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from quiesce_kit import Disk, Run, Zoo, disk, moves, records, run_dir, stands_still, until, watchdogs, zoo

from snapshotter.core.errors import BusyError, PreconditionError, QuiesceError, SnapshotterError
from snapshotter.host import quiesce

__all__ = ["disk", "run_dir", "zoo"]
pytestmark = pytest.mark.root
Disks = Callable[[], Disk]
BUDGET = 60.0


def test_two_together_a_blocked_writer_goes_on(disk: Disks, zoo: Zoo, run_dir: Path) -> None:
    disks = [disk(), disk()]
    for one in disks:
        zoo.writer(one.path / "db")
    with quiesce.freeze([str(one.path) for one in disks], BUDGET, "s1") as held:
        assert all(one.frozen() for one in disks)
        assert all(stands_still(one.path) for one in disks)
    assert held.held_ms is not None
    for one in disks:
        moves(one.path)
        assert not one.frozen()
    assert not records(run_dir) and not watchdogs(run_dir)


def test_one_file_system_by_two_mount_points_is_frozen_once(disk: Disks, run_dir: Path, tmp_path: Path) -> None:
    one = disk()
    other = tmp_path / "bound"
    other.mkdir()
    subprocess.run(["mount", "--bind", str(one.path), str(other)], check=True)
    try:
        with quiesce.freeze([str(one.path), str(other)], BUDGET, "s1"):
            assert one.frozen()
        assert not one.frozen()
    finally:
        one.thaw()
        subprocess.run(["umount", str(other)], check=True)


def test_thawed_by_somebody_is_void(disk: Disks, run_dir: Path) -> None:
    disks = [disk(), disk()]
    with pytest.raises(QuiesceError) as caught, quiesce.freeze([str(one.path) for one in disks], BUDGET, "s1"):
        assert disks[0].thaw() == 0
    assert str(disks[0].path) in caught.value.line()
    assert not any(one.frozen() for one in disks) and not records(run_dir)


def test_frozen_by_somebody_else_is_refused_and_stays_frozen(disk: Disks, run_dir: Path) -> None:
    disks = [disk(), disk()]
    assert disks[1].freeze() == 0
    with pytest.raises(BusyError), quiesce.freeze([str(one.path) for one in disks], BUDGET, "s1"):
        pytest.fail("held")
    assert not disks[0].frozen()
    assert disks[1].frozen()
    assert not records(run_dir) and not watchdogs(run_dir)


def test_the_budgets_end_thaws_and_voids(disk: Disks, zoo: Zoo, run_dir: Path) -> None:
    disks = [disk(), disk()]
    zoo.writer(disks[0].path / "db")
    with pytest.raises(QuiesceError), quiesce.freeze([str(one.path) for one in disks], 2.0, "s1"):
        moves(disks[0].path)
        until(lambda: not any(one.frozen() for one in disks))
    assert not records(run_dir)


def test_an_exception_inside_thaws(disk: Disks, run_dir: Path) -> None:
    one = disk()
    with pytest.raises(ZeroDivisionError), quiesce.freeze([str(one.path)], BUDGET, "s1"):
        raise ZeroDivisionError
    assert not one.frozen() and not records(run_dir)


def test_the_run_is_killed(disk: Disks, zoo: Zoo, run_dir: Path) -> None:
    disks = [disk(), disk()]
    run = Run(zoo, f"quiesce.freeze({[str(one.path) for one in disks]!r}, 60, 's1')")
    assert run.hear() == "held"
    assert all(one.frozen() for one in disks)
    run.kill()
    until(lambda: not any(one.frozen() for one in disks))
    until(lambda: not records(run_dir))


def test_the_watchdog_is_killed(disk: Disks, run_dir: Path) -> None:
    one = disk()
    with pytest.raises(QuiesceError), quiesce.freeze([str(one.path)], BUDGET, "s1"):
        os.kill(watchdogs(run_dir)[0], signal.SIGKILL)
        until(lambda: not watchdogs(run_dir))
        assert one.frozen()
    assert not one.frozen() and not records(run_dir)


def test_both_are_killed_then_reap(disk: Disks, zoo: Zoo, run_dir: Path) -> None:
    disks = [disk(), disk()]
    run = Run(zoo, f"quiesce.freeze({[str(one.path) for one in disks]!r}, 60, 's1')")
    assert run.hear() == "held"
    os.kill(watchdogs(run_dir)[0], signal.SIGKILL)
    run.kill()
    assert all(one.frozen() for one in disks)
    assert len(quiesce.reap()) == 1
    assert not any(one.frozen() for one in disks)


def test_the_watchdog_thaws_what_is_no_longer_mounted_where_it_was(disk: Disks, zoo: Zoo, run_dir: Path) -> None:
    """Covered by another mount, the mount point leads elsewhere; the descriptor doesn't."""
    one = disk()
    run = Run(zoo, f"quiesce.freeze([{str(one.path)!r}], 60, 's1')")
    assert run.hear() == "held"
    subprocess.run(["mount", "-t", "tmpfs", "none", str(one.path)], check=True)
    try:
        run.kill()
        until(lambda: not watchdogs(run_dir))
    finally:
        subprocess.run(["umount", str(one.path)], check=True)
    assert not one.frozen()


@pytest.mark.parametrize("point", ["/", "/proc", "/dev/shm", "/sys"])
def test_never_the_root_nor_what_cannot(run_dir: Path, point: str) -> None:
    with pytest.raises(PreconditionError) as caught, quiesce.freeze([point], BUDGET, "s1"):
        pytest.fail("held")
    assert caught.value.cure


def test_never_where_our_records_are(disk: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    one = disk()
    monkeypatch.setenv("SNAPSHOTTER_RUN", str(one.path / "run"))
    with pytest.raises(PreconditionError), quiesce.freeze([str(one.path)], BUDGET, "s1"):
        pytest.fail("held")
    assert not one.frozen()


def test_never_ourselves(disk: Disks, run_dir: Path) -> None:
    """Our own log is on it: the first line that we write would hang us."""
    one = disk()
    with (
        open(one.path / "log", "w"),
        pytest.raises(PreconditionError) as caught,
        quiesce.freeze([str(one.path)], BUDGET, "s1"),
    ):
        pytest.fail("held")
    assert "log" in caught.value.line()
    assert not one.frozen()


def test_never_btrfs(run_dir: Path, tmp_path: Path) -> None:
    image, point = tmp_path / "image", tmp_path / "mnt"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(128 << 20)
    if subprocess.run(["mkfs.btrfs", "-q", str(image)], check=False, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("no mkfs.btrfs")
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    try:
        with pytest.raises(PreconditionError, match="btrfs"), quiesce.freeze([str(point)], BUDGET, "s1"):
            pytest.fail("held")
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_never_without_root(zoo: Zoo, run_dir: Path, disk: Disks) -> None:
    one = disk()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            quiesce.freeze([str(one.path)], BUDGET, "s1").__enter__()
        except SnapshotterError as error:
            os._exit(int(error.exit))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == int(PreconditionError.exit)
    assert not one.frozen()


def test_a_device_below_which_the_device_mapper_works_is_known(tmp_path: Path) -> None:
    """A made-up sysfs: this machine has no device mapper. A partition of a RAID of a logical volume."""
    block = tmp_path / "dev" / "block"
    block.mkdir(parents=True)
    devices = tmp_path / "devices"
    for name, number in (("dm-0", "253:0"), ("md0", "9:0"), ("sda", "8:0")):
        (devices / name / "slaves").mkdir(parents=True)
        (devices / name / "dev").write_text(number + "\n")
        (block / number).symlink_to(devices / name)
    (devices / "dm-0" / "dm").mkdir()
    (devices / "md0" / "slaves" / "dm-0").symlink_to(devices / "dm-0")
    (devices / "md0" / "md0p1").mkdir()
    (devices / "md0" / "md0p1" / "partition").write_text("1\n")
    (block / "259:0").symlink_to(devices / "md0" / "md0p1")
    found = {number: quiesce.on_device_mapper(number, str(tmp_path)) for number in ("253:0", "9:0", "259:0", "8:0")}
    assert found == {"253:0": True, "9:0": True, "259:0": True, "8:0": False}
    assert quiesce.on_device_mapper("0:99", str(tmp_path)) is False
