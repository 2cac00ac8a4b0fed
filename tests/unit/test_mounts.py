"""host.mounts: the table's format, and what lies where. Synthetic tables by property, and real mounts in a mount
namespace of their own."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from snapshotter.host.mounts import (
    Mount,
    awaited,
    bind,
    by_descriptor,
    by_hand,
    inside,
    is_under,
    mount_of,
    mounts_below,
    parse,
    table,
)

needs_root = pytest.mark.root
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


def escaped(field: bytes) -> bytes:
    """As the kernel writes it (seq_path and mangle: space, tab, newline, backslash; # in some fields)."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in field)


_COMPONENT = st.one_of(
    st.sampled_from(
        [b"a", b"b", b"with space", b"new\nline", b"back\\slash", b"tab\t", b"\\040", b"\xff\xfe", b" - ", b"#"]
    ),
    st.binary(min_size=1, max_size=8)
    .map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_"))
    .filter(lambda raw: raw not in (b".", b"..")),
)
_PATH = st.lists(_COMPONENT, max_size=4).map(lambda parts: b"/" + b"/".join(parts))
_WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789.=-", min_size=1, max_size=12).filter(lambda word: word != "-")


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10**6),
            st.integers(0, 255),
            _PATH,
            _PATH,
            st.lists(_WORD, min_size=1, max_size=3),
            st.lists(st.sampled_from([b"shared:1", b"master:22", b"propagate_from:3", b"unbindable"]), max_size=3),
            _WORD,
            st.one_of(_PATH, st.just(b"none"), st.just(b"//server/share name")),
        ),
        max_size=6,
    )
)
def test_parse_gives_back_what_the_kernel_wrote(rows: list[tuple]) -> None:  # type: ignore[type-arg]
    lines = []
    for number, minor, root, path, options, optional, fstype, source in rows:
        left = [
            b"%d" % number,
            b"1",
            b"8:%d" % minor,
            escaped(root),
            escaped(path),
            ",".join(options).encode(),
            *optional,
        ]
        lines.append(b" ".join([*left, b"-", fstype.encode(), escaped(source), b"rw,errors=x"]))
    found = parse(b"".join(line + b"\n" for line in lines))
    assert len(found) == len(rows)
    for mount, (number, minor, root, path, options, _, fstype, source) in zip(found, rows, strict=True):
        assert (mount.id, mount.device, mount.fstype) == (number, f"8:{minor}", fstype)
        assert os.fsencode(mount.root) == root and os.fsencode(mount.path) == path
        assert os.fsencode(mount.source) == source and mount.options == frozenset(options)
        assert mount.super_options == {"rw", "errors=x"}


@given(st.binary(max_size=200))
def test_parse_of_anything_raises_nothing(raw: bytes) -> None:
    parse(raw)
    parse(b"1 2 8:1 / / rw - ext4 /dev/x rw\n" + raw + b"\n3 1 0:5 / /y rw shared:1 - tmpfs tmpfs rw\n")


def test_the_real_table_is_understood() -> None:
    found = table()
    raw = Path("/proc/self/mountinfo").read_bytes().rstrip(b"\n").split(b"\n")
    assert len(found) == len(raw)
    here = mount_of(os.path.realpath(__file__), found)
    assert os.stat(here.path).st_dev == os.stat(__file__).st_dev


def made(path: str, device: str, root: str = "/", number: int = 1) -> Mount:
    return Mount(number, 0, device, root, path, frozenset({"rw"}), "ext4", "/dev/x", frozenset({"rw"}))


def test_names_that_begin_alike_are_not_below() -> None:
    assert is_under("/a/b", "/a") and is_under("/a", "/a") and is_under("/a", "/")
    assert not is_under("/ab", "/a") and not is_under("/", "/a")
    mounts = [made("/", "8:1"), made("/a", "8:2", number=2), made("/ab", "8:3", number=3)]
    assert mount_of("/abc", mounts).path == "/"
    assert [mount.path for mount in mounts_below("/a", mounts)] == []
    assert [mount.path for mount in mounts_below("/", mounts)] == ["/a", "/ab"]


def test_disks_of_fstab_that_are_not_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fstab = tmp_path / "fstab"
    monkeypatch.setattr("snapshotter.host.mounts.FSTAB", str(fstab))
    table = [made("/", "8:1"), made("/srv", "8:2", number=2), made("/srv/node/in", "8:3", number=3)]
    assert awaited("/srv/node", table) == []  # no fstab
    for point, options, expected in (
        ("/srv", "defaults", False),  # it is mounted
        ("/", "defaults", False),
        ("/srv/other", "defaults", False),
        ("/srv/node/in", "defaults", False),
        ("/srv/node", "nofail", True),
        ("/srv/node", "noauto", True),  # who has the data there means that disk
        ("/srv/node/ancient/", "nofail,noatime", True),
        ("/srv/node/an\\040old", "defaults", True),
        ("/srv/node/usb", "noauto", False),
        ("none", "sw", False),
        ("/srv/node/ancient", "", True),
    ):
        fstab.write_text(f"# /dev/x /srv/node ext4 defaults 0 0\n\n/dev/x {point} ext4 {options}\n")
        assert bool(awaited("/srv/node", table)) is expected, (point, options)
    fstab.write_text("/dev/x /mnt ext4 defaults 0 2\n")
    assert awaited("/srv/node", table) == []
    assert awaited("/mnt/node", table) == ["/mnt"]
    fstab.write_text("/dev/sdb1 /mnt auto noauto,user 0 0\n")  # a place for disks that come and go
    assert awaited("/mnt/node", table) == []
    fstab.write_text("/dev/mapper/c /mnt ext4 noauto,nofail 0 0\n")  # opened by hand
    assert awaited("/mnt/node", table) == ["/mnt"]


def test_disks_of_mount_units_that_are_not_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, run = tmp_path / "etc", tmp_path / "run"
    monkeypatch.setattr("snapshotter.host.mounts.FSTAB", str(tmp_path / "none"))
    monkeypatch.setattr("snapshotter.host.mounts.UNITS", (str(own), str(run)))
    table = [made("/", "8:1"), made("/srv", "8:2", number=2), made("/srv/node/in", "8:3", number=3)]
    assert awaited("/srv/node", table) == []  # no systemd
    for directory in (own, run):
        (directory / "local-fs.target.wants").mkdir(parents=True)

    def unit(name: str, where: str, *, enabled: bool = True, directory: Path = own) -> None:
        (directory / name).write_text(f"[Unit]\n#Where=/srv/node/no\n[Mount]\nWhat=/dev/x\nWhere = {where}\n")
        if enabled:
            (own / "local-fs.target.wants" / name).symlink_to(directory / name)

    unit("srv.mount", "/srv")  # it is mounted
    unit("srv-node-in.mount", "/srv/node/in")
    unit("srv-other.mount", "/srv/other")
    unit("srv-node-off.mount", "/srv/node/off", enabled=False)
    (own / "backup.service.wants").mkdir()
    (own / "backup.service.wants" / "srv-node-off.mount").symlink_to(own / "srv-node-off.mount")
    unit("srv-node-at.mount", "/srv/node/%i")
    (own / "srv-node-masked.mount").symlink_to("/dev/null")
    unit("srv-node-masked.mount", "/srv/node/masked", directory=run)
    (own / "srv-node-gone.mount").symlink_to(tmp_path / "nowhere")
    assert awaited("/srv/node", table) == []
    unit("srv-node-ancient.mount", "/srv/node/ancient/")
    unit("srv-node.mount", "/srv/node", directory=run)
    assert awaited("/srv/node", table) == ["/srv/node", "/srv/node/ancient"]
    unit("mnt.mount", "/mnt")
    assert awaited("/mnt/node", table) == ["/mnt"] and awaited("/other", table) == []


def test_what_zfs_mounts_of_itself() -> None:
    def of(path: str, source: str) -> bool:
        return by_hand(structs.replace(made(path, "0:99"), fstype="zfs", source=source))

    assert not of("/tank/a/.zfs/snapshot/daily", "tank/a@daily")
    assert of("/tank/a", "tank/a") and of("/mnt", "tank/a@daily") and of("/tank/a/.zfs/snapshot/x", "tank/b")


def test_where_a_path_lies_in_its_file_system() -> None:
    plain, bind, top = made("/data", "8:2"), made("/alias", "8:2", "/sub/dir"), made("/", "8:1")
    assert inside("/data/x/y", plain) == "/x/y" and inside("/data", plain) == "/"
    assert inside("/alias", bind) == "/sub/dir" and inside("/alias/x", bind) == "/sub/dir/x"
    assert inside("/etc", top) == "/etc" and inside("/", top) == "/"
    assert inside("/data/sub/dir/x", plain) == inside("/alias/x", bind)


_DIRECTORIES = st.lists(st.sampled_from("abc"), max_size=3).map(lambda parts: "/" + "/".join(parts))


@given(_DIRECTORIES, _DIRECTORIES)
def test_a_bind_mount_and_its_source_are_the_same_place(source: str, below: str) -> None:
    mounts = [made("/", "8:1")]
    mounts.append(made("/bind", "8:1", source, number=2))
    rest = below if below != "/" else ""
    bound = f"/bind{rest}"
    direct = os.path.normpath(source + rest)
    assert mount_of(bound, mounts).path == "/bind"
    assert inside(bound, mount_of(bound, mounts)) == inside(direct, mount_of(direct, mounts))


# Real mounts, in a namespace of their own: nothing to clean up, also if killed.


def in_namespace(code: str, *argv: str) -> dict[str, object]:
    script = "import json, os, subprocess, sys\nfrom snapshotter.host.mounts import *\n" + textwrap.dedent(code)
    outcome = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", script, *argv],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)  # type: ignore[no-any-return]


@needs_root
@as_root
def test_odd_mount_points_as_the_kernel_writes_them(tmp_path: Path) -> None:
    top = str(tmp_path.resolve())
    found = in_namespace(
        r"""
        top = os.fsencode(sys.argv[1])
        names = [b"with space", b"new\nline", b"back\\slash", b"tab\t", b"\xff\xfe", b"\\040"]
        names += [b"ha#sh", b" - x", "ümläut".encode()]
        for name in names:
            os.mkdir(top + b"/" + name)
            subprocess.run(["mount", "-t", "tmpfs", b"src " + name, top + b"/" + name], check=True)
        seen = {os.fsencode(mount.path): mount for mount in mounts_below(os.fsdecode(top))}
        print(json.dumps({
            "all": set(seen) == {top + b"/" + name for name in names},
            "kinds": sorted({mount.fstype for mount in seen.values()}),
            "found": all(mount_of(os.fsdecode(path + b"/x/y")) == mount for path, mount in seen.items()),
            "inside": all(inside(os.fsdecode(path + b"/x"), mount) == "/x" for path, mount in seen.items()),
        }))
        """,
        top,
    )
    assert found == {"all": True, "kinds": ["tmpfs"], "found": True, "inside": True}


@needs_root
@as_root
def test_binds_and_read_only_and_stacked(tmp_path: Path) -> None:
    top = str(tmp_path.resolve())
    for name in ("src/deep", "bound", "stack"):
        os.makedirs(f"{top}/{name}")
    found = in_namespace(
        """
        top = sys.argv[1]
        def sh(*argv): subprocess.run(argv, check=True)
        sh("mount", "--bind", top + "/src", top + "/bound")
        sh("mount", "-o", "remount,bind,ro", top + "/bound")
        sh("mount", "-t", "tmpfs", "first", top + "/stack")
        sh("mount", "-t", "tmpfs", "second", top + "/stack")
        bound, source = mount_of(top + "/bound/deep"), mount_of(top + "/src/deep")
        places = (bound.device, inside(top + "/bound/deep", bound)), (source.device, inside(top + "/src/deep", source))
        print(json.dumps({
            "same": places[0] == places[1],
            "read_only": [bound.read_only, source.read_only],
            "stacked": mount_of(top + "/stack/x").source,
            "below": [mount.source for mount in mounts_below(top) if mount.path.endswith("stack")],
        }))
        """,
        top,
    )
    assert found == {"same": True, "read_only": [True, False], "stacked": "second", "below": ["second"]}


@needs_root
@as_root
def test_a_mount_that_a_later_one_hides(tmp_path: Path) -> None:
    top = str(tmp_path.resolve())
    os.makedirs(f"{top}/a/b")
    found = in_namespace(
        """
        top = sys.argv[1]
        subprocess.run(["mount", "-t", "tmpfs", "hidden", top + "/a/b"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "over", top + "/a"], check=True)
        print(json.dumps({
            "below": [mount.source for mount in mounts_below(top)], "of": mount_of(top + "/a/b").source
        }))
        """,
        top,
    )
    assert found == {"below": ["over"], "of": "over"}


@pytest.mark.root
def test_a_path_by_descriptor_is_one_that_newer_mounts_take(tmp_path: Path) -> None:
    """mount(8) since 2.39 attaches by move_mount(2), which follows no link in the last component. Older ones, as this
    machine's may be, use mount(2), which does: so the calls themselves are tried."""
    libc = ctypes.CDLL(None, use_errno=True)
    open_tree, move_mount, here, clone, empty_path = 428, 429, -100, 1 | os.O_CLOEXEC, 4
    for name in ("source", "where"):
        (tmp_path / name).mkdir()
    (tmp_path / "source/file").touch()
    source, where = (os.open(tmp_path / name, os.O_PATH | os.O_DIRECTORY) for name in ("source", "where"))
    try:
        tree = libc.syscall(open_tree, here, by_descriptor(source).encode(), clone)
        assert tree >= 0, os.strerror(ctypes.get_errno())
        done = libc.syscall(move_mount, tree, b"", here, by_descriptor(where).encode(), empty_path)
        os.close(tree)
        assert done == 0, os.strerror(ctypes.get_errno())
        try:
            assert os.listdir(tmp_path / "where") == ["file"]
        finally:
            subprocess.run(["umount", tmp_path / "where"], check=True)
        bind(source, where, "where")
        try:
            assert os.listdir(tmp_path / "where") == ["file"]
        finally:
            subprocess.run(["umount", tmp_path / "where"], check=True)
    finally:
        os.close(source)
        os.close(where)
