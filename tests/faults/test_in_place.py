"""restore --in-place: the whole of it, undone, discarded; parts of a node; everywhere a data path may be."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from tests.faults.in_place_kit import MOVING, Story, difference, lay_out, ok, picture, story
from tests.support import NOBODY, Command, loop_file_system

ACL = "system.posix_acl_access"
WAYS = ["copy", pytest.param("btrfs", marks=pytest.mark.root)]
EVERY_WAY = [*WAYS, pytest.param("copy-on-btrfs", marks=pytest.mark.root)]


@pytest.mark.parametrize("kind", EVERY_WAY)
def test_restored_undone_and_discarded(tmp_path: Path, kind: str) -> None:
    with story(kind, tmp_path) as node:
        node.begin()
        node.run_and_damage()
        plan = ok(node, "restore", "latest", "--in-place", "--dry-run")
        assert plan["way"] == ("swap" if kind == "btrfs" else "copy") and plan["running"]
        assert plan["free_bytes"] > 0 and plan["seconds"] is not None
        assert node.as_it_was() and node.service.running() and not node.leftovers()
        done = ok(node, "restore", "latest", "--in-place", "--yes")
        assert node.restored(), difference(picture(node.data), node.of_set)
        assert node.service.running() and done["outcome"] == "restored"
        assert done["aside"]
        # A take goes on while the old data waits; another restore in place doesn't.
        assert ok(node, "take", "ours")["good"]
        assert "--discard" in ok(node, "restore", node.set_id, "--in-place", "--yes", code=5)["cure"]
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and node.service.running() and not node.leftovers()
        ok(node, "restore", "--undo", "ours", code=4)
        ok(node, "restore", node.set_id, "--in-place", "--yes")
        assert node.restored()
        ok(node, "restore", "--discard", "ours", code=2)
        ok(node, "restore", "--discard", "ours", "--yes")
        assert node.restored() and node.service.running() and not node.leftovers()
        if kind == "btrfs":
            listed = subprocess.run(["btrfs", "subvolume", "list", node.place], capture_output=True, text=True).stdout
            assert "/swaps/" not in listed


def test_stopped_stays_stopped(tmp_path: Path) -> None:
    with story("copy", tmp_path) as node:
        node.begin()
        node.damage()
        done = ok(node, "restore", "latest", "--in-place", "--yes")
        assert not node.service.running() and node.restored() and done["healthy"] is None
        assert "start" not in node.service.did()
        ok(node, "restore", "--undo", "ours")
        assert not node.service.running() and node.as_it_was() and "start" not in node.service.did()


# -------------------------------------------------------------------------------------------- parts of a node


def test_only_database_keeps_everything_else(tmp_path: Path) -> None:
    with story("copy", tmp_path) as node:
        node.begin()
        node.run_and_damage()
        node.service.do("stop")
        (node.data / "static-nodes.json").write_text('["enode://later"]')
        node.old = picture(node.data)
        node.service.do("start")
        done = ok(node, "restore", "latest", "--in-place", "--only", "database", "--yes")
        assert done["only"] == "database" and node.service.running()
        now, metadata = picture(node.data), {"DATABASE_METADATA.json", "VERSION_METADATA.json"}
        for name in {**now, **node.old}:
            unit = name.partition("/")[0] == "database" or name in metadata
            assert now.get(name) == (node.of_set if unit else node.old).get(name), name
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and not node.leftovers() and node.service.running()


def test_only_key_and_nothing_else(tmp_path: Path) -> None:
    with story("copy", tmp_path) as node:
        node.begin()
        key = (node.data / "key").read_text()
        node.run_and_damage()
        node.service.do("stop")
        (node.data / "key").unlink()
        node.old = picture(node.data)
        ok(node, "restore", "latest", "--in-place", "--only", "key", "--yes")
        assert (node.data / "key").read_text() == key and (node.data / "key").stat().st_mode & 0o777 == 0o600
        assert difference(picture(node.data), node.old) == ["key"]
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and not node.leftovers()


def test_resync_sets_the_database_aside_and_keeps_the_key(tmp_path: Path) -> None:
    with story("copy", tmp_path) as node:
        node.begin()
        node.run_and_damage()
        plan = ok(node, "resync", "ours", "--dry-run")
        assert plan["only"] == "resync" and node.as_it_was()
        planned = node.command.run("resync", "ours", "--dry-run").stdout
        assert planned.startswith(f"would set the database at {node.data} aside, to sync anew")
        assert f"manager.py {node.service.home}" in planned.splitlines()[1], "its service, not one of its commands"
        assert "set its database aside" in ok(node, "resync", "ours", code=2)["message"]
        done = ok(node, "resync", "ours", "--yes")
        # The node began a new one, with the same key.
        assert os.listdir(node.data / "database") == ["node.log"]
        assert not (node.data / "DATABASE_METADATA.json").exists()
        assert picture(node.data)["key"] == node.old["key"] and node.service.running()
        assert {"database", "DATABASE_METADATA.json"} <= set(os.listdir(done["aside"][0]))
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and node.service.running() and not node.leftovers()
        ok(node, "resync", "ours", "--yes")
        ok(node, "restore", "--discard", "ours", "--yes")
        assert not node.leftovers() and node.service.running()


# ------------------------------------------------------------------------------------- wherever the data path is


@pytest.mark.parametrize("kind", WAYS)
def test_the_data_path_is_gone_and_so_is_the_config(tmp_path: Path, kind: str) -> None:
    """Path, profile and owner come from the set; nothing is stopped or started where no service is known."""
    with story(kind, tmp_path) as node:
        node.begin()
        node.damage()
        node.command.config.write_text(f'state = "{node.command.home}/state"\n')
        if kind == "btrfs":
            subprocess.run(["btrfs", "subvolume", "delete", node.data], check=True, capture_output=True)
        else:
            shutil.rmtree(node.data)
        done = ok(node, "restore", node.set_id, "--in-place", "--yes")
        assert done["service"] is None and node.restored(), difference(picture(node.data), node.of_set)
        ok(node, "restore", "--undo", str(node.data))
        assert not node.data.exists() and not node.leftovers()


def test_a_link_to_the_data_path_stays(tmp_path: Path) -> None:
    with story("copy", tmp_path) as node:
        real = node.place / "real"
        real.mkdir()
        node.data.symlink_to(real)
        node.begin()
        node.run_and_damage()
        ok(node, "restore", "latest", "--in-place", "--yes")
        assert node.data.is_symlink() and node.data.resolve() == real and node.restored()
        assert (node.place / "real").is_dir() and list(node.place.glob("real.corrupted-*"))
        ok(node, "restore", "--undo", str(node.data))
        assert node.as_it_was() and node.data.is_symlink()


@pytest.mark.root
def test_a_database_on_another_disk(tmp_path: Path) -> None:
    """Two roots: the data path, and what `database` leads to. Both change places; the link stays what it is."""
    with loop_file_system("ext4", tmp_path, 200) as fast, story("copy", tmp_path) as node:
        (fast / "db").mkdir()
        node.data.mkdir()
        (node.data / "database").symlink_to(fast / "db")
        node.begin()
        of_database = picture(fast / "db", {"node.log"})
        node.service.do("start")
        node.service.do("stop")
        for path in (fast / "db").iterdir():
            path.write_bytes(b"broken")
        node.old = picture(node.data)
        broken = picture(fast / "db")
        done = ok(node, "restore", "latest", "--in-place", "--yes")
        assert node.restored() and not difference(picture(fast / "db", {"node.log"}), of_database)
        assert len(done["aside"]) == 2
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and picture(fast / "db") == broken
        done = ok(node, "restore", "latest", "--in-place", "--only", "database", "--yes")
        assert not difference(picture(fast / "db", {"node.log"}), of_database)
        assert os.readlink(node.data / "database") == str(fast / "db")
        assert any("several steps" in said for said in done["warnings"])
        undone = ok(node, "restore", "--undo", "ours")
        assert not any("several steps" in said for said in undone["warnings"]), "that is past"
        assert node.as_it_was() and picture(fast / "db") == broken
        assert sorted(os.listdir(fast)) == ["db", "lost+found"]


@pytest.mark.root
def test_several_subvolumes_change_places_together(tmp_path: Path) -> None:
    """The data path, and one that `database` leads to: each is swapped. (Beside paths as long as these tests' there is
    no room for the node's address in the record, so it is said whose key is meant.)"""
    with story("btrfs", tmp_path) as node:
        fast = node.place / "fast"
        for path in (node.data, fast):
            subprocess.run(["btrfs", "subvolume", "create", path], check=True, capture_output=True)
        (node.data / "database").symlink_to(fast)
        node.begin()
        of_database = picture(fast, {"node.log"})
        node.service.do("start")
        node.service.do("stop")
        for path in fast.iterdir():
            path.write_bytes(b"broken")
        node.old, broken = picture(node.data), picture(fast, {"node.log"})
        node.service.do("start")
        restore = ("restore", "latest", "--in-place", "--identity", "set", "--yes")
        done = ok(node, *restore)
        assert done["way"] == "swap" and len(done["aside"]) == 2 and node.service.running()
        assert node.restored() and not difference(picture(fast, {"node.log"}), of_database)
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and not difference(picture(fast, {"node.log"}), broken)
        ok(node, *restore)
        ok(node, "restore", "--discard", "ours", "--yes")
        assert node.restored() and node.service.running()


@pytest.mark.root
def test_a_directory_of_a_subvolume_that_others_live_on(tmp_path: Path) -> None:
    """The image is of all of it; only the data path changes places, by copy."""
    with story("btrfs", tmp_path) as node:
        node.data.mkdir()
        (node.place / "neighbour").write_text("before")
        node.begin()
        (node.place / "neighbour").write_text("after")
        node.run_and_damage()
        done = ok(node, "restore", "latest", "--in-place", "--yes")
        assert done["way"] == "copy" and node.restored() and node.service.running()
        assert (node.place / "neighbour").read_text() == "after"
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and node.service.running() and not node.leftovers()
        ok(node, "restore", "latest", "--in-place", "--only", "database", "--yes")
        ok(node, "restore", "--discard", "ours", "--yes")
        assert node.service.running() and (node.place / "neighbour").read_text() == "after" and not node.leftovers()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["ext4", "btrfs", "btrfs-subvolume"])
def test_the_data_path_is_a_mount_point(tmp_path: Path, kind: str) -> None:
    """It can't be renamed: what is in it changes places entry by entry; what is mounted below, and what mkfs made,
    stays. A btrfs subvolume that is mounted is swapped."""
    with loop_file_system(kind.partition("-")[0], tmp_path, 300) as disk:
        data = disk
        if kind == "btrfs-subvolume":
            subprocess.run(["btrfs", "subvolume", "create", disk / "@data"], check=True, capture_output=True)
            source = subprocess.run(["findmnt", "-no", "SOURCE", disk], capture_output=True, text=True).stdout.strip()
            data = tmp_path / "data"
            data.mkdir()
            subprocess.run(["mount", "-o", "subvol=@data", source, data], check=True)
        provider = "btrfs" if kind == "btrfs-subvolume" else "copy"
        extra = "" if kind == "btrfs-subvolume" else f'store = "{tmp_path}/store"\n'
        node = Story(tmp_path, tmp_path / "home", provider, data=data, extra=extra)
        try:
            node.begin()
            node.run_and_damage()
            if kind == "ext4":
                (data / "logs").mkdir()
                subprocess.run(["mount", "-t", "tmpfs", "none", data / "logs"], check=True)
                (data / "logs" / "today").write_text("in memory")
                node.service.do("stop")
                node.old = picture(node.data)
                node.service.do("start")
            done = ok(node, "restore", "latest", "--in-place", "--yes")
            assert done["way"] == ("swap" if kind == "btrfs-subvolume" else "copy")
            kept = {"lost+found", "logs", "logs/today"}
            aside = os.path.basename(done["aside"][0]) if provider == "copy" else "-"
            now = {name: what for name, what in picture(data, MOVING | kept).items() if name.split("/")[0] != aside}
            wanted = {name: what for name, what in node.of_set.items() if name not in kept}
            assert not difference(now, wanted), difference(now, wanted)
            assert node.service.running() and os.path.ismount(data)
            if kind == "ext4":
                assert (data / "logs" / "today").read_text() == "in memory"
            ok(node, "restore", "--undo", str(data))
            assert node.as_it_was() and node.service.running() and os.path.ismount(data)
            ok(node, "restore", "latest", "--in-place", "--yes")
            ok(node, "restore", "--discard", str(data), "--yes")
            assert not [name for name in os.listdir(data) if "corrupted" in name or "restoring" in name]
        finally:
            node.service.end()
            if kind == "ext4":
                subprocess.run(["umount", data / "logs"], capture_output=True)
            if data != disk:
                subprocess.run(["umount", data], capture_output=True)


@pytest.mark.root
@pytest.mark.parametrize("owner", ["", "nobody"])
def test_a_mount_points_own_owner_and_mode_are_restored(tmp_path: Path, owner: str) -> None:
    """A fresh disk is root's: the node could not write to it."""
    with story("entries", tmp_path) as node:
        with node.command.config.open("a") as config:
            config.write(f'owner = "{owner}"\n' if owner else "")
        lay_out(node.data)
        os.chown(node.data, 4711, 4712)
        entries = ((1, 7, -1), (2, 5, 4713), (4, 5, -1), (16, 5, -1), (32, 0, -1))  # acl(5); the second: user 4713, r-x
        acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
        os.setxattr(node.data, ACL, acl)
        os.chmod(node.data, 0o2750)
        ok(node, "take", "ours")
        os.removexattr(node.data, ACL)
        os.chown(node.data, 0, 0)
        os.chmod(node.data, 0o755)

        def own() -> tuple[int, int, int, bytes]:
            found = node.data.stat()
            acl = os.getxattr(node.data, ACL) if ACL in os.listxattr(node.data) else b""
            return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), acl

        fresh = own()
        ok(node, "restore", "latest", *node.in_place)
        assert own() == (*((NOBODY, NOBODY) if owner else (4711, 4712)), 0o2750, acl)
        ok(node, "restore", "--undo", "ours")
        assert own() == fresh
        ok(node, "restore", "latest", "--in-place", "--only", "database", "--yes")
        assert own() == fresh


@pytest.mark.root
def test_a_user_without_root_can_do_it_by_copy(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    home = Path("/var/tmp") / f"snapshotter-test-{os.urandom(6).hex()}"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    try:
        data = home / "node"
        lay_out(data)
        for path in [data, *data.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
        command = Command(home / "etc", uid=NOBODY)
        of_set = picture(data, MOVING | {"old.pid"})
        command.json("take", str(data))
        (data / "database" / "CURRENT").write_text("broken")
        broken = picture(data)
        command.json("restore", "latest", "--in-place", "--yes")
        assert not difference(picture(data), of_set), difference(picture(data), of_set)
        command.json("restore", "--undo", str(data))
        assert not difference(picture(data), broken)
        command.json("restore", "latest", "--in-place", "--only", "database", "--yes")
        command.json("restore", "--discard", str(data), "--yes")
        assert sorted(os.listdir(home)) == [".snapshotter", "etc", "node"]
    finally:
        shutil.rmtree(home)
