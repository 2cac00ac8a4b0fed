"""host/tree and host/mirror: what a walk sees, what a mirror keeps, and that a hostile tree leads nowhere."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshotter.host import mirror as mirroring
from snapshotter.host import mounts, tree
from snapshotter.testing.harness import describe, fill_with_oddities
from tests.support import loop_file_system
from tests.unit.copy_kit import allocated


def mirrored(source: Path, target: Path) -> mirroring.Mirror:
    """One whole mirror of `source` at the new directory `target`."""
    target.mkdir(mode=0o700)
    with tree.open_tree(str(source)) as ours, tree.open_tree(str(target)) as theirs:
        made = mirroring.Mirror(ours, theirs)
        now = tree.walk(ours)
        made.update(now)
        made.finish(now)
        return made


def test_everything_odd_survives(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    fill_with_oddities(str(source))
    before = describe(str(source))
    mirrored(source, tmp_path / "target")
    assert describe(str(tmp_path / "target")) == before
    assert describe(str(source)) == before, "copying changed the source"
    assert stat.S_ISFIFO(os.lstat(tmp_path / "target/odd/pipe").st_mode)
    assert not os.path.lexists(tmp_path / "target/odd/geth.ipc"), "a socket is nothing without its listener"


def test_holes_stay_holes_and_unwritten_ends_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rng = random.Random(7)
    contents = {}
    for number in range(6):
        path = source / f"f{number}"
        with open(path, "wb") as file:
            file.truncate(rng.randrange(1, 40 << 20))
            for _ in range(number):  # the first is one hole
                os.pwrite(file.fileno(), rng.randbytes(5000), rng.randrange(0, 30 << 20))
        contents[path.name] = path.read_bytes()
    os.sync()
    mirrored(source, tmp_path / "target")
    for name, content in contents.items():
        assert (tmp_path / "target" / name).read_bytes() == content
        assert allocated(tmp_path / "target" / name) <= allocated(source / name) + 16384


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sets(
        st.binary(min_size=1, max_size=255).filter(
            lambda name: not set(name) & set(b"/\0") and name not in (b".", b"..")
        ),
        max_size=8,
    )
)
def test_any_name_the_kernel_takes(tmp_path: Path, names: set[bytes]) -> None:
    for each in ("source", "target"):
        shutil.rmtree(os.fsencode(tmp_path / each), ignore_errors=True)
    source = os.fsencode(tmp_path / "source")
    os.mkdir(source)
    for name in names:
        with open(os.path.join(source, name), "wb") as file:
            file.write(name)
    made = mirrored(tmp_path / "source", tmp_path / "target")
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path / "target"), name), "rb") as file:
            assert file.read() == name
    lines = iter([copied.line for copied in made.have.values()])
    assert {os.fsencode(path) for path, *_ in mirroring.manifest_lines(lines)} == {b"", *names}


def test_a_tree_too_deep_for_a_path(tmp_path: Path) -> None:
    """4096 bytes is the longest path; a tree may be deeper, and must be walked, copied and removed."""
    source = tmp_path / "source"
    source.mkdir()
    fd = os.open(source, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("n" * 50, dir_fd=fd)
        below = os.open("n" * 50, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with open(os.open("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=fd), "wb") as file:
        file.write(b"deep")
    os.close(fd)
    mirrored(source, tmp_path / "target")
    with tree.open_tree(str(tmp_path / "target")) as there:
        found = tree.walk(there)
        deepest = max(found, key=len)
        assert len(found) == 302 and deepest.endswith("/bottom")
        parent, name = tree.parent_and_name(deepest)
        bottom = tree.open_to_read(name, there.get(parent))
        assert os.read(bottom, 10) == b"deep"
        os.close(bottom)
    for each in (source, tmp_path / "target"):
        with tree.open_tree(str(each), unlock=True) as top:
            tree.remove_content(top)
        assert not os.listdir(each)


def test_a_directory_swapped_for_a_link_leads_nowhere(tmp_path: Path) -> None:
    """The owner of the tree may swap directories for links while root walks: nothing outside is ever listed."""
    outside, source = tmp_path / "outside", tmp_path / "source"
    outside.mkdir()
    (outside / "secret").write_bytes(b"root's")
    (source / "a/b").mkdir(parents=True)
    (source / "a/b/mine").write_bytes(b"mine")
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            os.rename(source / "a", source / "kept")
            os.symlink(outside, source / "a")
            os.unlink(source / "a")
            os.rename(source / "kept", source / "a")

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for number in range(150):
            target = tmp_path / f"t{number}"
            target.mkdir()
            attic = tmp_path / f"attic{number}"
            attic.mkdir()
            attic_fd = os.open(attic, os.O_RDONLY)
            with tree.open_tree(str(source)) as ours, tree.open_tree(str(target)) as theirs:
                made = mirroring.Mirror(ours, theirs, attic_fd)
                for _ in range(2):
                    made.update(tree.walk(ours))
            os.close(attic_fd)
            for _, _, files in os.walk(target):
                assert "secret" not in files
    finally:
        over.set()
        swapper.join()


def test_removing_never_follows_and_opens_closed_directories(tmp_path: Path) -> None:
    outside, doomed = tmp_path / "outside", tmp_path / "doomed"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    (doomed / "closed/inner").mkdir(parents=True)
    (doomed / "closed/inner/file").write_bytes(b"x")
    os.symlink(outside, doomed / "closed/link")
    os.chmod(doomed / "closed/inner", 0)
    os.chmod(doomed / "closed", 0o500)
    with tree.open_tree(str(doomed), unlock=True) as top:
        tree.remove_content(top)
    assert os.listdir(doomed) == [] and (outside / "kept").read_bytes() == b"kept"


def test_a_walk_tells_every_kind_of_change(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "d").mkdir(parents=True)
    for name in ("same", "d/file", "d/other"):
        (top / name).write_bytes(b"12345678")
    changes: list[tuple[str, Callable[[], object]]] = [
        ("d/file", lambda: (top / "d/file").write_bytes(b"87654321")),
        ("d/file", lambda: os.chmod(top / "d/file", 0o640)),
        ("d/file", lambda: os.setxattr(top / "d/file", "user.a", os.urandom(8))),
        ("d/new", lambda: (top / "d/new").write_bytes(b"")),
        ("d/new", lambda: os.unlink(top / "d/new")),
        ("d/file", lambda: os.replace(top / "d/other", top / "d/file")),
        ("d/linked", lambda: os.link(top / "same", top / "d/linked")),
        ("d", lambda: os.chmod(top / "d", 0o750)),
    ]
    with tree.open_tree(str(top)) as dirs:
        for named, change in changes:
            before = tree.walk(dirs)
            assert tree.difference(before, tree.walk(dirs)) is None
            time.sleep(0.02)  # past the tick of the kernel's clock
            change()
            found = tree.difference(before, tree.walk(dirs))
            assert found in (named, "d", "same", "d/other"), (named, found)  # both names of a link or a rename will do


def test_a_truncated_or_vanished_file_is_no_error(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for number in range(20):
        (source / f"{number}").write_bytes(b"x" * 100_000)
    with tree.open_tree(str(source)) as ours, tree.open_tree(str(target)) as theirs:
        now = tree.walk(ours)
        os.unlink(source / "3")
        os.truncate(source / "4", 10)
        os.unlink(source / "5")
        os.mkfifo(source / "5")
        os.unlink(source / "6")
        os.symlink("/etc/passwd", source / "6")
        made = mirroring.Mirror(ours, theirs)
        made.update(now)
        assert made.have.keys() == now.keys() - {"3", "5", "6"}
    assert (target / "4").read_bytes() == b"x" * 10


def test_walking_2000_files_is_quick(tmp_path: Path, measured: Callable[[str], None]) -> None:
    for number in range(2000):
        directory = tmp_path / f"d{number % 20}"
        directory.mkdir(exist_ok=True)
        (directory / f"{number}.sst").touch()
    with tree.open_tree(str(tmp_path)) as dirs:
        took = []
        for _ in range(15):
            began = time.perf_counter()
            assert len(tree.walk(dirs)) == 2021
            took.append(time.perf_counter() - began)
    measured(f"one walk over 2,000 files: {min(took) * 1e3:.1f} ms")
    assert min(took) < 0.1, "generous: 25 ms is the bar"


def test_a_full_target_is_said_and_not_hidden(tmp_path: Path) -> None:
    """sendfile and copy_file_range report a full disk as themselves; a mirror must not fall back to fewer bytes."""
    if os.geteuid() != 0:
        pytest.skip("needs root: a small file system of its own")
    with loop_file_system("ext4", tmp_path, 24) as small:
        source = tmp_path / "source"
        source.mkdir()
        (source / "large").write_bytes(os.urandom(40 << 20))
        with pytest.raises(OSError) as full:
            mirrored(source, small / "target")
        assert full.value.errno == errno.ENOSPC and full.value.filename == "large"


@pytest.mark.root
@pytest.mark.parametrize("kind", ["btrfs", "xfs", "ext4"])
def test_everything_odd_survives_between_file_systems(tmp_path: Path, kind: str) -> None:
    with loop_file_system(kind, tmp_path) as other:
        source = tmp_path / "source"
        source.mkdir()
        fill_with_oddities(str(source))
        before = describe(str(source))
        mirrored(source, other / "there")
        mirrored(other / "there", other / "again")
        assert describe(str(other / "again")) == describe(str(other / "there"))
        for there in (other / "there", other / "again"):
            # XFS writes an ACL's unused fields its own way: compared by meaning, the rest by bytes.
            assert acls(there) == acls(source) and "user:65534:rw-" in acls(there)
            assert without_acls(describe(str(there))) == without_acls(before)
        mirrored(other / "again", tmp_path / "back")
        assert SGI not in str(describe(str(tmp_path / "back")))
        assert without_acls(describe(str(tmp_path / "back"))) == without_acls(before)
        assert acls(tmp_path / "back") == acls(source)


def acls(top: Path) -> str:
    return subprocess.run(["getfacl", "-n", "odd/linked"], cwd=top, capture_output=True, text=True, check=True).stdout


ACL, SGI = "system.posix_acl_access", "trusted.SGI_ACL_FILE"  # XFS shows it twice


def without_acls(described: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    def plain(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(
                plain(each) for each in value if not (isinstance(each, tuple) and each[:1] in ((ACL,), (SGI,)))
            )
        return value

    return {path: tuple(plain(value) for value in values) for path, values in described.items()}


@pytest.mark.root
def test_nodes_capabilities_and_default_acls(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    os.mknod(source / "zero", stat.S_IFCHR | 0o640, os.makedev(1, 5))
    os.chown(source / "zero", 65534, 1234)
    (source / "tool").write_bytes(b"#!/bin/sh\n")
    os.setxattr(source / "tool", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    os.setxattr(source / "tool", "trusted.note", b"t")
    subprocess.run(["setfacl", "-d", "-m", "u:65534:rwx", str(source / "sub")], check=True)
    (source / "sub/plain").write_bytes(b"made before the default")
    subprocess.run(["setfacl", "-b", str(source / "sub/plain")], check=True)
    before = describe(str(source))
    # The directory above the target hands down an ACL of its own: none of it may stick.
    above = tmp_path / "above"
    above.mkdir()
    subprocess.run(["setfacl", "-d", "-m", "u:1000:rwx", str(above)], check=True)
    mirrored(source, above / "target")
    assert describe(str(above / "target")) == before
    node = os.lstat(above / "target/zero")
    assert (node.st_rdev, stat.S_IMODE(node.st_mode), node.st_uid, node.st_gid) == (
        os.makedev(1, 5),
        0o640,
        65534,
        1234,
    )


@pytest.mark.root
def test_mount_points_end_a_walk_and_subvolumes_do_not(tmp_path: Path) -> None:
    with loop_file_system("btrfs", tmp_path) as top:
        for each in ("data", "other"):
            (top / each).mkdir()
        subprocess.run(["btrfs", "-q", "subvolume", "create", str(top / "data/nested")], check=True)
        (top / "data/nested/inside").write_bytes(b"ours")
        (top / "other/theirs").write_bytes(b"another volume's")
        (top / "data/bound").mkdir()
        (top / "data/bound/hidden").write_bytes(b"hidden")
        subprocess.run(["mount", "--bind", str(top / "other"), str(top / "data/bound")], check=True)
        try:
            below = {os.path.relpath(mount.path, top / "data") for mount in mounts.mounts_below(str(top / "data"))}
            assert below == {"bound"}, "a bind mount of the same file system"
            with tree.open_tree(str(top / "data")) as dirs:
                found = tree.walk(dirs, below)
                assert set(found) == {"", "nested", "nested/inside", "bound"}
                (top / "other/more").write_bytes(b"x")
                assert tree.difference(found, tree.walk(dirs, below)) is None, "another volume's writes aren't ours"
        finally:
            subprocess.run(["umount", str(top / "data/bound")], check=True)


@pytest.mark.root
def test_nocow_files_are_reflinked_too(tmp_path: Path) -> None:
    with loop_file_system("btrfs", tmp_path) as top:
        (top / "source").mkdir()
        (top / "source/db").touch()
        subprocess.run(["chattr", "+C", str(top / "source/db")], check=True)
        (top / "source/db").write_bytes(os.urandom(1 << 20))
        (top / "source/plain").write_bytes(os.urandom(1 << 20))
        made = mirrored(top / "source", top / "target")
        assert made.clones is True and made.costs.bytes == 0, "no byte was copied"
        attributes = subprocess.run(["lsattr", str(top / "target")], capture_output=True, text=True, check=True).stdout
        assert [line.split()[0].count("C") for line in sorted(attributes.splitlines(), key=lambda line: line[-2:])] in (
            [1, 0],
            [0, 1],
        )
        for name in ("db", "plain"):
            assert (top / "target" / name).read_bytes() == (top / "source" / name).read_bytes()


def test_twelve_hundred_levels_take_no_time(tmp_path: Path) -> None:
    """Each level must not begin at the top again: in a pause the writers wait for it."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    at = os.open(source, os.O_RDONLY)
    for level in range(1200):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
        if level % 100 == 0:
            os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=at))
    os.close(at)
    target.mkdir()
    with tree.open_tree(str(source)) as ours, tree.open_tree(str(target)) as theirs:
        made = mirroring.Mirror(ours, theirs)
        now = tree.walk(ours)
        made.update(now)
        began = time.process_time()
        made.finish(now)
        finished = time.process_time() - began
        assert len(tree.walk(theirs)) == len(now) == 1 + 1200 + 12
    held = len(os.listdir("/proc/self/fd"))
    for each in (source, target):
        with tree.open_tree(str(each), unlock=True) as top:
            began = time.process_time()
            tree.remove_content(top)
            finished = max(finished, time.process_time() - began)
        assert os.listdir(each) == []
    assert len(os.listdir("/proc/self/fd")) == held, "descriptors are left open"
    assert finished < 2, "generous: a pause has room for a tenth"
