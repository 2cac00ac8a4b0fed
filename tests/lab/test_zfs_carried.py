"""What a swap on ZFS carries over to what takes the place, and what stays below it: properties, room that is reserved,
zvols."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from providers.zfs import tool
from snapshotter.core.errors import BusyError
from tests.lab import zfs_kit
from tests.lab.zfs_kit import ZfsHarness, image, names, read, run, take, write, zfs

pytestmark = [pytest.mark.root, pytest.mark.zfs, pytest.mark.skipif(bool(zfs_kit.here()), reason=zfs_kit.here())]


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    with zfs_kit.pool() as name:
        yield name


@pytest.fixture
def harness(pool: str) -> Iterator[ZfsHarness]:
    with zfs_kit.zfs_harness(pool) as harness:
        yield harness


def test_what_was_set_on_the_origin_is_set_on_what_takes_its_place(harness: ZfsHarness) -> None:
    point = harness.scratch / "live"
    words = ["-o", f"mountpoint={point}", "-o", "recordsize=16K", "-o", "compression=lz4", "-o", "atime=off"]
    volume = harness.dataset("d", *words, "-o", "refquota=200M", "-o", "com.example:note=ours too")
    older = take(volume, "older")
    write(volume, "live")

    def local() -> set[str]:
        kept = zfs("get", "-Hp", "-s", "local", "-o", "property,value", "all", volume.id).splitlines()
        left_out = ("snapshotter:", "canmount", "snapshot_count", "filesystem_count")
        return {line for line in kept if not line.startswith(left_out)}

    before = local()
    zfs_kit.provider().swap("w1", image(older), volume)
    assert local() == before
    assert read(volume) == "older" and volume.path == str(point)
    # As a reboot does it: everything that mounts itself is mounted, and the live path shows the clone still.
    zfs("unmount", volume.id)
    run("zfs", "mount", "-a")
    assert read(volume) == "older"
    assert sum(mount.path == str(point) for mount in zfs_kit.table()) == 1
    zfs_kit.provider().swap_back("w1")
    assert local() == before and read(volume) == "live"


def test_a_note_of_several_lines_is_no_property(harness: ZfsHarness) -> None:
    """Whoever may write a note (`userprop`) could have root set a mount point of his."""
    volume = harness.dataset("d", "-o", "com.example:note=of one line")
    forged = f"a\n{volume.id}\tmountpoint\t/etc/cron.d\tlocal\n{volume.id}\tsetuid\ton\tlocal\nz"
    zfs("set", f"com.example:lines={forged}", volume.id)
    assert {key for key in tool.get_local(volume.id) if not key.startswith("snapshotter:")} == {
        "com.example:note",
        "com.example:lines",
        "acltype",
    }
    older = take(volume, "older")
    zfs_kit.provider().swap("w1", image(older), volume)
    assert zfs("get", "-Hp", "-o", "value", "com.example:lines", volume.id).removesuffix("\n") == forged
    assert "cron.d" not in zfs("get", "-H", "-o", "value", "mountpoint", volume.id) and read(volume) == "older"
    zfs_kit.provider().swap_back("w1")


def test_who_may_do_what_may_do_it_to_what_takes_the_place(harness: ZfsHarness) -> None:
    volume = harness.volume()
    for words in (
        ["-s", "@keeps", "snapshot,hold"],
        ["-c", "destroy"],
        ["-u", "nobody", "@keeps,mount"],
        ["-l", "-u", "4242", "send"],
        ["-d", "-g", "daemon", "create,mount"],
        ["-e", "userused"],
    ):
        zfs("allow", *words, volume.id)
    zfs("allow", "-u", "nobody", "rollback", harness.top)

    def delegated(name: str) -> str:
        return zfs("allow", name).replace(name, "it").replace("-", "")

    before = delegated(volume.id)
    assert "4242" in before and "@keeps" in before and "rollback" in before
    older = take(volume, "older")
    provider = zfs_kit.provider()
    provider.swap("w1", image(older), volume)
    assert delegated(volume.id) == before and not provider.notes
    provider.swap_back("w1")
    assert delegated(volume.id) == before
    provider.swap("w2", image(older), volume)
    provider.swap_commit("w2")
    assert delegated(volume.id) == before


def of(name: str, *keys: str) -> list[str]:
    return zfs("get", "-Hp", "-o", "value", ",".join(keys), name).split()


def test_limits_go_with_the_place_and_room_is_reserved_once(harness: ZfsHarness) -> None:
    """Also where a limit is set to none over an inherited one; of 512 MiB no 300 can be reserved twice."""
    limits = ["quota=none", "refquota=none", "filesystem_limit=7", "snapshot_limit=none", "normalization=formD"]
    reserved = ["reservation=300M", "refreservation=200M"]
    volume = harness.dataset("d", *(word for each in (*limits, *reserved) for word in ("-o", each)))
    older = take(volume, "older")
    write(volume, "live")
    keys = ("quota", "refquota", "filesystem_limit", "snapshot_limit", "reservation", "refreservation")
    before = of(volume.id, *keys)
    assert before[-2:] == [str(300 << 20), str(200 << 20)]
    zfs_kit.provider().swap("w1", image(older), volume)
    assert of(volume.id, *keys) == before and read(volume) == "older"
    assert of(f"{volume.id}.aside-w1", *keys)[-2:] == ["0", "0"]
    zfs_kit.provider().swap_back("w1")
    assert of(volume.id, *keys) == before and read(volume) == "live"
    zfs_kit.provider().swap("w2", image(older), volume)
    newer = take(volume, "newer")
    zfs_kit.provider().swap_back("w2")
    assert of(volume.id, *keys) == before and of(f"{volume.id}.clone-w2", *keys)[-2:] == ["0", "0"]
    zfs_kit.provider().delete(newer)
    zfs_kit.provider().swap("w3", image(older), volume)
    zfs_kit.provider().swap_commit("w3")
    assert of(volume.id, *keys) == before and read(volume) == "older"


def test_a_reservation_survives_a_swap_that_was_killed_anywhere(
    harness: ZfsHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = harness.dataset("d", "-o", "reservation=300M")
    older = take(volume, "older")
    write(volume, "live")
    change = tool.change
    left = 0

    def dies(*words: str, object: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        change(*words, object=object)

    def killed_at(number: int, act: Callable[[], None]) -> bool:
        nonlocal left
        left = number
        with monkeypatch.context() as patched:
            patched.setattr(tool, "change", dies)
            try:
                act()
            except KeyboardInterrupt:
                return True
        return False

    for way_back in (False, True):
        for number in range(20):
            swap_id = f"w{way_back:d}{number}"
            if way_back:
                zfs_kit.provider().swap(swap_id, image(older), volume)
                killed = killed_at(number, lambda swap_id=swap_id: zfs_kit.provider().swap_back(swap_id))  # type: ignore[misc]
            else:
                act = lambda swap_id=swap_id: zfs_kit.provider().swap(swap_id, image(older), volume)  # type: ignore[misc]  # noqa: E731
                killed = killed_at(number, act)
            zfs_kit.provider().swap_back(swap_id)
            assert read(volume) == "live" and of(volume.id, "reservation") == [str(300 << 20)]
            if not killed:
                break
        else:
            raise AssertionError("it never came to its end")
    assert names(harness.top, "filesystem") == {harness.top, volume.id}


def test_below_an_altroot(tmp_path: Path) -> None:
    """`zfs get mountpoint` shows it, and `zfs set mountpoint` puts it in front."""
    with zfs_kit.pool(128, "-R", str(tmp_path)) as name, zfs_kit.zfs_harness(name) as harness:
        volume = harness.dataset("d", "-o", "mountpoint=/live")
        assert volume.path == f"{tmp_path}/live"
        older = take(volume, "older")
        write(volume, "live")
        zfs_kit.provider().swap("w1", image(older), volume)
        assert of(volume.id, "mountpoint") == [volume.path] and read(volume) == "older"
        zfs("unmount", volume.id)
        zfs("mount", volume.id)
        assert read(volume) == "older"
        zfs_kit.provider().swap_back("w1")
        assert of(volume.id, "mountpoint") == [volume.path] and read(volume) == "live"


def test_a_zvol_below_stays_below(harness: ZfsHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is in use. What keeps it from going back keeps nothing else from that."""
    volume = harness.volume()
    zvol = f"{volume.id}/zvol"
    zfs("create", "-s", "-V", "32M", zvol)
    run("udevadm", "settle")
    older = take(volume, "older")
    write(volume, "live")
    with open(f"/dev/zvol/{zvol}", "r+b") as device:
        device.write(b"in use")
        device.flush()
        zfs_kit.provider().swap("w1", image(older), volume)
        assert read(volume) == "older" and zvol in names(harness.top, "volume")
        change = tool.change

        def stuck(*words: str, object: str) -> None:
            if words[0] == "rename" and object.endswith("/zvol"):
                raise BusyError("is in use", object=object)
            change(*words, object=object)

        with monkeypatch.context() as patched:
            patched.setattr(tool, "change", stuck)
            with pytest.raises(BusyError):
                zfs_kit.provider().swap_back("w1")
        assert zfs("get", "-H", "-o", "value", "canmount", volume.id).strip() == "on"
        zfs_kit.provider().swap_back("w1")
    assert read(volume) == "live" and names(harness.top, "filesystem") == {harness.top, volume.id}
    run("udevadm", "settle")
    with open(f"/dev/zvol/{zvol}", "rb") as device:
        assert device.read(6) == b"in use"
