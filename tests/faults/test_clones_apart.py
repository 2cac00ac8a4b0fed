"""Clones made and ended as the command does it: nothing of the live data is touched through them, nothing of a
person's goes with them, and they let in nobody whom the origin kept out."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.host.mounts import is_mount_point, table
from tests.support import NOBODY, Command, as_user, loop_file_system
from tests.unit.copy_kit import reachable

__all__ = ["reachable"]  # a fixture


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A btrfs with a subvolume `sub`."""
    with loop_file_system("btrfs", tmp_path, 300) as point:
        subprocess.run(["btrfs", "subvolume", "create", point / "sub"], check=True, capture_output=True)
        yield point


@pytest.fixture
def open_disk(reachable: Path) -> Iterator[Path]:
    """The same, where every user can come to it."""
    with loop_file_system("btrfs", reachable, 300) as point:
        subprocess.run(["btrfs", "subvolume", "create", point / "sub"], check=True, capture_output=True)
        yield point


def swapping(tmp_path: Path, data: Path, moved: Path, lure: Path) -> Command:
    """A node at whose take `moved` is a link to `lure`: from before the image is made until after."""
    hooks = {
        "before_take": f"mv {moved} {moved}.real && ln -s {lure} {moved}",
        "after_take": f"rm {moved} && mv {moved}.real {moved}",
    }
    lines = ", ".join(f'{name} = ["sh", "-c", "{line}"]' for name, line in hooks.items())
    return Command(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\nhooks = {{{lines}}}\n')


# ------------------------------------------------------------------------------------------------ links in an image


def mounted(top: Path) -> list[str]:
    """Other tests mount elsewhere meanwhile."""
    return [mount.path for mount in table() if mount.path.startswith(f"{top}/")]


@pytest.mark.root
def test_a_link_where_the_data_path_was_leads_to_nothing_live(tmp_path: Path, disk: Path) -> None:
    data, live = disk / "sub" / "node", tmp_path / "live"
    for each in (data, live):
        each.mkdir()
        (each / "key").write_text("a" * 64)
    (live / "link").symlink_to(live / "key")
    command = swapping(tmp_path, data, data, live)
    set_id = command.json("take", "n")["set_id"]
    before = mounted(tmp_path)
    for way in ("--to", "--mount"):
        error = command.error("restore", set_id, way, str(tmp_path / "clone"), exit_code=8)
        assert "link" in error["line"] and str(data) in error["line"] and "another set" in error["cure"]
        assert not (tmp_path / "clone").exists()
        assert mounted(tmp_path) == before and command.json("show", set_id)["attachments"] == []
    assert command.run("verify", set_id).returncode == 8
    assert mounted(tmp_path) == before and command.json("show", set_id)["attachments"] == []
    assert (live / "key").read_text() == "a" * 64 and os.readlink(live / "link") == str(live / "key")


@pytest.mark.root
def test_a_link_above_a_nested_root_leads_to_nothing_live(tmp_path: Path, disk: Path) -> None:
    data, live = disk / "sub", tmp_path / "live"
    (data / "db" / "blobs").mkdir(parents=True)
    (live / "blobs").mkdir(parents=True)
    with loop_file_system("btrfs", tmp_path, 300) as other:
        subprocess.run(["mount", "--bind", other, data / "db" / "blobs"], check=True)
        try:
            (data / "key").write_text("a" * 64)
            (data / "db" / "blobs" / "1").write_text("blob")
            command = swapping(tmp_path, data, data / "db", live)
            set_id = command.json("take", "n")["set_id"]
            error = command.error("restore", set_id, "--to", str(tmp_path / "clone"), exit_code=8)
            assert str(data / "db") in error["line"]
            assert not is_mount_point(str(live / "blobs")) and not (tmp_path / "clone").exists()
            assert command.json("show", set_id)["attachments"] == []
            whole = Command(tmp_path / "whole", config=f'[node.n]\npath = "{data}"\n')
            set_id = whole.json("take", "n")["set_id"]
            for way, can in (("--to", "rw"), ("--mount", "ro")):
                whole.json("restore", set_id, way, str(tmp_path / "clone"))
                assert (tmp_path / "clone" / "db" / "blobs" / "1").read_text() == "blob"
                nested = next(mount for mount in table() if mount.path == str(tmp_path / "clone" / "db" / "blobs"))
                assert can in nested.options and (can == "rw" or {"nosuid", "nodev"} <= nested.options)
                whole.json("release", str(tmp_path / "clone"))
        finally:
            subprocess.run(["umount", data / "db" / "blobs"], check=True)


# -------------------------------------------------------------------------------------------------- release and changes


@pytest.mark.root
@pytest.mark.parametrize("unmounted", ["", "clone", "clone.roots/1"])
def test_no_change_goes_without_a_word(tmp_path: Path, disk: Path, unmounted: str) -> None:
    """Nor in a root that shares its volume with another, nor in a clone that isn't mounted any more."""
    data, fast = disk / "sub" / "node", disk / "sub" / "fast"
    for each in (data, fast):
        each.mkdir()
        (each / "file").write_text("x")
    (data / "db").symlink_to(fast)
    command = Command(tmp_path / "etc")
    set_id, clone = command.json("take", str(data))["set_id"], tmp_path / "clone"
    restored = command.json("restore", set_id, "--to", str(clone))
    assert [root["path"] for root in restored["roots"]] == [str(clone), f"{clone}.roots/1"]
    command.json("release", str(clone))  # nobody has written to it
    command.json("restore", set_id, "--to", str(clone))
    (clone / "db" / "mine").write_text("")
    source = next(mount for mount in table() if mount.path == f"{clone}.roots/1")
    if unmounted:
        subprocess.run(["umount", tmp_path / unmounted], check=True)
    error = command.error("release", str(clone), exit_code=5)
    assert "--discard-changes" in error["cure"] and ("isn't mounted" in error["line"]) == bool(unmounted)
    with_mine = tmp_path / "again"
    with_mine.mkdir()
    subprocess.run(["mount", "-o", f"subvol={os.path.dirname(source.root)}", source.source, with_mine], check=True)
    assert (with_mine / "fast" / "mine").exists()
    subprocess.run(["umount", with_mine], check=True)
    command.json("release", str(clone), "--discard-changes")
    assert command.json("show", set_id)["attachments"] == []
    os.remove(data / "db")  # read-only such a link is refused
    set_id = command.json("take", str(data))["set_id"]
    command.json("restore", set_id, "--mount", str(clone))
    subprocess.run(["umount", clone], check=True)
    command.json("release", str(clone))  # read-only: nobody can have
    assert command.json("show", set_id)["attachments"] == []


# ----------------------------------------------------------------------------------------------- two restores at once


@pytest.mark.parametrize("kind", ["copy", pytest.param("btrfs", marks=pytest.mark.root)])
def test_two_restores_into_one_directory(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    """Both have looked at it and found it empty. One fills it, the other leaves it alone."""
    data = (request.getfixturevalue("disk") / "sub" if kind == "btrfs" else tmp_path) / "node"
    data.mkdir()
    for number in range(1000):
        (data / f"{number}.sst").write_bytes(b"x" * 1000)
    meet = f"touch {tmp_path}/$$.here; until set -- {tmp_path}/*.here && [ $# = 2 ]; do sleep 0.01; done"
    config = f'[node.n]\npath = "{data}"\nhooks = {{before_restore = ["sh", "-c", "{meet}"]}}\n'
    command, clone = Command(tmp_path / "etc", config=config), tmp_path / "clone"
    set_id = command.json("take", "n")["set_id"]
    runs = [command.start("restore", set_id, "--to", str(clone)) for _ in range(2)]
    said = [run.communicate(timeout=120)[1] for run in runs]
    codes = sorted(run.returncode for run in runs)
    assert codes in ([0, 5], [0, 2]), said  # 2: it came when the other was done
    assert len(os.listdir(clone)) == 1000
    assert len([mount for mount in table() if mount.path == str(clone)]) == (kind == "btrfs")
    command.json("release", str(clone))
    assert not clone.exists() and command.json("show", set_id)["attachments"] == []


# ---------------------------------------------------------------------------------------------- subvolumes in the data


@pytest.mark.root
def test_a_frozen_store_in_the_data_is_data(tmp_path: Path, disk: Path) -> None:
    """A read-only subvolume that is no snapshot of another is a root. Snapshots aren't, and that is said, briefly."""
    data, clone = disk / "sub", tmp_path / "clone"
    (data / "file").write_text("x")

    def btrfs(*words: str | Path) -> None:
        subprocess.run(["btrfs", *words], check=True, capture_output=True)

    btrfs("subvolume", "create", data / "ancient")
    (data / "ancient" / "blob").write_text("old")
    btrfs("property", "set", data / "ancient", "ro", "true")
    command = Command(tmp_path / "etc")
    taken = command.json("take", str(data))
    assert taken["left_out"] == [] and len(taken["snapshots"]) == 2 and taken["good"]
    for way in ("--to", "--mount"):
        command.json("restore", taken["set_id"], way, str(clone))
        assert (clone / "ancient" / "blob").read_text() == "old"
        command.json("release", str(clone))
    assert command.json("verify", taken["set_id"], "--level", "1")["outcome"] == "ok"
    error = command.error("restore", taken["set_id"], "--in-place", "--yes", exit_code=3)
    assert f"btrfs property set {data}/ancient ro false" in error["cure"]

    with open(tmp_path / "stream", "wb") as stream:
        subprocess.run(["btrfs", "send", "-q", data / "ancient"], check=True, stdout=stream)
    (data / "received").mkdir()
    btrfs("receive", "-q", "-f", tmp_path / "stream", data / "received")
    btrfs("subvolume", "create", data / ".snapshots")
    (data / "btrbk").mkdir()
    for number in range(50):
        (data / ".snapshots" / str(number)).mkdir()
        btrfs("subvolume", "snapshot", "-r", data, data / ".snapshots" / str(number) / "snapshot")
        btrfs("subvolume", "snapshot", "-r", data, data / "btrbk" / str(number))
    taken = command.json("take", str(data))
    assert len(taken["snapshots"]) == 2
    said = [line.partition(":")[0] for line in taken["left_out"]]
    assert said == [str(data / name) for name in (".snapshots", "btrbk", "received/ancient")]
    assert "50 btrfs snapshots" in taken["left_out"][1]
    assert command.json("take", str(data), "--provider", "copy", "--dry-run")["left_out"] == []  # it copies them


# ------------------------------------------------------------------------------------------------- who may look into it


@pytest.mark.root
@pytest.mark.parametrize("provider", ["btrfs", "copy"])
def test_what_a_directory_above_hid_stays_hidden(open_disk: Path, reachable: Path, provider: str) -> None:
    """In the clone, and in its root beside; of a read-only mount, where nothing can be closed, that is told."""
    hidden, clone = open_disk / "sub" / "hidden", reachable / "clone"
    hidden.mkdir(mode=0o700)
    for name in ("node", "fast"):
        (hidden / name).mkdir()
        (hidden / name / "key").write_text("a" * 64)
        for each, mode in ((hidden / name / "key", 0o644), (hidden / name, 0o755)):
            os.chmod(each, mode)
    (hidden / "node" / "db").symlink_to(hidden / "fast")
    command = Command(reachable / "etc")
    words = ("--provider", provider)
    set_id = command.json("take", str(hidden / "node"), *words)["set_id"]

    def readable(path: Path) -> bool:
        return subprocess.run([*as_user(NOBODY), "cat", path], capture_output=True).returncode == 0

    restored = command.json("restore", set_id, "--to", str(clone), "--with-identity")
    assert sum("closed to others" in note for note in restored["warnings"]) == 1
    assert not readable(clone / "key") and not readable(clone / "db" / "key")
    assert stat.S_IMODE(clone.stat().st_mode) == 0o700
    command.json("release", str(clone))
    os.remove(hidden / "node" / "db")  # read-only such a link is refused
    set_id = command.json("take", str(hidden / "node"), *words)["set_id"]
    restored = command.json("restore", set_id, "--mount", str(clone))
    assert sum("others can read" in note for note in restored["warnings"]) == 1
    command.json("release", str(clone))
    hidden.chmod(0o755)
    set_id = command.json("take", str(hidden / "node"), *words)["set_id"]
    restored = command.json("restore", set_id, "--to", str(clone), "--with-identity")
    assert readable(clone / "key") and not [note for note in restored["warnings"] if "closed" in note]
    command.json("release", str(clone))


@pytest.mark.root
@pytest.mark.parametrize("provider", ["btrfs", "copy"])
def test_a_hidden_root_beside_an_open_one(open_disk: Path, reachable: Path, provider: str) -> None:
    data, hidden, clone = open_disk / "sub" / "node", open_disk / "sub" / "hidden", reachable / "clone"
    data.mkdir()
    hidden.mkdir(mode=0o700)
    (hidden / "fast").mkdir()
    for each in (data / "open", hidden / "fast" / "closed"):
        each.write_text("x")
    (data / "db").symlink_to(hidden / "fast")
    for each in (data, hidden / "fast"):
        os.chmod(each, 0o755)
    command = Command(reachable / "etc")
    set_id = command.json("take", str(data), "--provider", provider)["set_id"]
    command.json("restore", set_id, "--to", str(clone))
    for path, code in ((clone / "open", 0), (clone / "db" / "closed", 1)):
        assert subprocess.run([*as_user(NOBODY), "cat", path], capture_output=True).returncode == code, path
    command.json("release", str(clone))
