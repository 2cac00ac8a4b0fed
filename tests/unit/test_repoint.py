"""repoint: after it, nothing in a clone leads into production. Real links, real mounts, a real RocksDB."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.nodes.repoint import Change, check_read_only, newest_options, option_paths, repoint

needs_root = pytest.mark.root
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and foreign owners need root")


class Farm:
    """A live world of two roots, places outside, and a clone of both roots."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.data, self.fast = top / "live/data", top / "mnt/fast"
        self.elsewhere = top / "elsewhere"
        self.clone, self.clone_fast = top / "restore/x", top / "restore/x.roots/1"
        self.outside = top / "restore/x.outside"
        for directory in (self.data / "sub/deep", self.data / "db", self.fast / "wal", self.elsewhere / "d"):
            directory.mkdir(parents=True)
        for file in (self.data / "f", self.data / "db/f", self.fast / "wal/f", self.elsewhere / "d/f"):
            file.write_text(str(file))
        # Ways into the live roots from outside, by links that no clone holds.
        os.symlink(self.data, self.elsewhere / "to-data")
        os.symlink("../mnt/fast/wal", self.elsewhere / "to-wal")
        os.symlink(self.elsewhere / "to-data", self.elsewhere / "twice")

    def copy(self) -> None:
        shutil.copytree(self.data, self.clone, symlinks=True)
        shutil.copytree(self.fast, self.clone_fast, symlinks=True)

    @property
    def roots(self) -> list[tuple[str, str]]:
        return [(str(self.data), str(self.clone)), (str(self.fast), str(self.clone_fast))]

    def repoint(self) -> list[Change]:
        return repoint(self.roots, str(self.outside))


@pytest.fixture
def farm(tmp_path: Path) -> Farm:
    return Farm(tmp_path.resolve())


def links(top: Path) -> list[str]:
    found = []
    for directory, below, files in os.walk(top):
        found += [os.path.join(directory, name) for name in (*below, *files)]
    return [path for path in found if os.path.islink(path)]


def kernel_path(path: str | os.PathLike[str]) -> str | None:
    """Where `path` leads as the kernel has it (python's realpath goes on, by the text alone, after a loop)."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
    return os.path.realpath(path)


def leads_into(path: str, live: list[Path]) -> bool:
    """Whether the kernel's resolution of `path` ends in one of `live`: by name and by inode."""
    if (resolved := kernel_path(path)) is None:
        return False
    ids = {(os.stat(root).st_dev, os.stat(root).st_ino) for root in live if root.exists()}
    while True:
        if any(resolved == str(root) for root in live):
            return True
        try:
            found = os.stat(resolved)
            if (found.st_dev, found.st_ino) in ids:
                return True
        except OSError:
            pass
        if resolved == "/":
            return False
        resolved = os.path.dirname(resolved)


def snapshot_of(top: Path) -> dict[str, tuple[object, ...]]:
    """Everything that can be seen of a tree but atime."""
    seen: dict[str, tuple[object, ...]] = {}
    for directory, below, files in os.walk(top):
        for name in (".", *below, *files):
            path = os.path.normpath(os.path.join(directory, name))
            found = os.lstat(path)
            content: object = None
            if os.path.islink(path):
                content = os.readlink(path)
            elif os.path.isfile(path):
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            seen[path] = (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_ino, content)
    return seen


def test_links_into_live_roots_lead_to_the_restored_ones(farm: Farm) -> None:
    os.symlink(farm.fast / "wal", farm.data / "wal")  # absolute, to another root
    os.symlink(farm.data / "db", farm.data / "database")  # absolute, into itself
    os.symlink("../../mnt/fast/wal/f", farm.data / "escaping")  # relative, to another root
    os.symlink("../db", farm.data / "sub/inside")  # relative, stays
    os.symlink("../f", farm.data / "sub/file")
    os.symlink(farm.elsewhere / "twice/db/f", farm.data / "by-links-elsewhere")
    os.symlink(farm.data / "not/yet", farm.data / "dangling")
    os.symlink(farm.elsewhere / "d", farm.data / "outside")
    os.symlink(farm.elsewhere / "d/no/such", farm.data / "outside-dangling")
    os.symlink(farm.data, farm.fast / "back")
    os.symlink("wal/f", farm.data / "through")  # relative, through a link that is re-pointed itself
    os.symlink("../../live/data/../data/db", farm.data / "sub/winding")
    farm.copy()
    farm.repoint()

    def read(path: str) -> str:
        return os.readlink(farm.clone / path)

    assert read("wal") == str(farm.clone_fast / "wal")
    assert read("database") == str(farm.clone / "db")
    assert os.path.realpath(farm.clone / "escaping") == str(farm.clone_fast / "wal/f")
    assert read("sub/inside") == "../db" and read("sub/file") == "../f" and read("through") == "wal/f"
    assert os.path.realpath(farm.clone / "through") == str(farm.clone_fast / "wal/f")
    assert os.path.realpath(farm.clone / "by-links-elsewhere") == str(farm.clone / "db/f")
    assert read("dangling") == str(farm.clone / "not/yet")
    assert read("outside") == f"{farm.outside}{farm.elsewhere}/d" and not (farm.clone / "outside").exists()
    assert read("outside-dangling") == f"{farm.outside}{farm.elsewhere}/d/no/such"
    assert os.readlink(farm.clone_fast / "back") == str(farm.clone)
    assert not leads_into(str(farm.clone / "sub/winding"), [farm.data, farm.fast])
    before = snapshot_of(farm.top / "restore")
    assert farm.repoint() == []
    assert snapshot_of(farm.top / "restore") == before


def test_without_an_outside_place_links_elsewhere_are_left(farm: Farm) -> None:
    os.symlink("/etc/hostname", farm.data / "system")
    os.symlink(farm.data / "db", farm.data / "database")
    farm.copy()
    assert [change.path for change in repoint(farm.roots)] == [str(farm.clone / "database")]
    assert os.readlink(farm.clone / "system") == "/etc/hostname"


def test_read_only_is_judged_and_nothing_written(farm: Farm) -> None:
    os.symlink(farm.fast / "wal", farm.data / "wal")
    os.symlink("db", farm.data / "database")
    os.symlink("/dev/null", farm.data / "null")
    farm.copy()
    (farm.clone / ".snapshotter-repoint-0123456789abcdef").write_text("of a killed run")
    before = snapshot_of(farm.top)
    assert [(change.path, change.before) for change in check_read_only(farm.roots)] == [
        (str(farm.clone / "wal"), str(farm.fast / "wal"))
    ]
    assert snapshot_of(farm.top) == before


def test_a_killed_runs_temporary_is_replaced_and_owner_and_times_stay(farm: Farm) -> None:
    os.symlink(farm.fast / "wal", farm.data / "wal")
    farm.copy()
    link = farm.clone / "wal"
    if os.geteuid() == 0:
        os.lchown(link, 1234, 4321)
    os.utime(link, ns=(10**18, 10**18), follow_symlinks=False)
    os.utime(farm.clone, ns=(10**18, 10**18))
    os.symlink("half", farm.clone / ".snapshotter-repoint-0123456789abcdef")
    before, directory = os.lstat(link), os.stat(farm.clone)
    farm.repoint()
    after = os.lstat(link)
    assert (after.st_uid, after.st_gid, after.st_mtime_ns) == (before.st_uid, before.st_gid, 10**18)
    assert os.stat(farm.clone).st_mtime_ns == directory.st_mtime_ns
    assert not os.path.lexists(farm.clone / ".snapshotter-repoint-0123456789abcdef")


def test_odd_names_and_long_targets(farm: Farm) -> None:
    odd = [b"with space", b"new\nline", b"\xff\xfe", b"back\\slash", b"tab\t", b"n" * 255]
    for name in odd:
        directory = os.fsencode(farm.data) + b"/db/" + name
        os.mkdir(directory)
        os.symlink(directory, os.fsencode(farm.data) + b"/" + name)
    os.symlink("/nowhere/" + "x" * 200 + "/" + "y/" * 1900, farm.data / "long")
    farm.copy()
    farm.repoint()
    for name in odd:
        assert os.readlink(os.fsencode(farm.clone) + b"/" + name) == os.fsencode(farm.clone) + b"/db/" + name
    assert os.readlink(farm.clone / "long").startswith(str(farm.outside))
    assert farm.repoint() == []


def test_a_root_that_is_gone_is_refused(farm: Farm) -> None:
    with pytest.raises(PreconditionError, match="can't read the restored root"):
        farm.repoint()
    farm.copy()
    os.rename(farm.clone, farm.top / "moved")
    os.symlink(farm.data, farm.clone)  # a link in the clone's place must not be entered
    before = snapshot_of(farm.data)
    with pytest.raises(PreconditionError):
        farm.repoint()
    assert snapshot_of(farm.data) == before


def test_the_live_path_may_be_gone(farm: Farm) -> None:
    os.symlink(farm.fast / "wal", farm.data / "wal")
    os.symlink(farm.data / "db", farm.data / "database")
    farm.copy()
    os.rename(farm.data, farm.top / "corrupted")
    os.rename(farm.fast, farm.top / "corrupted-fast")
    farm.repoint()
    assert os.readlink(farm.clone / "wal") == str(farm.clone_fast / "wal")
    assert os.readlink(farm.clone / "database") == str(farm.clone / "db")


def test_a_nested_root_that_is_restored_elsewhere(farm: Farm) -> None:
    (farm.data / "db/f").unlink()
    os.symlink("../db/x", farm.data / "sub/into")
    os.symlink("../f", farm.data / "db/up")
    farm.copy()
    nested = farm.top / "restore/nested"
    os.rename(farm.clone / "db", nested)
    repoint([*farm.roots, (str(farm.data / "db"), str(nested))], str(farm.outside))
    assert os.readlink(farm.clone / "sub/into") == str(nested / "x")
    assert os.path.realpath(nested / "up") == str(farm.clone / "f")


# The hard property: whatever the links are.

_NAMES = st.sampled_from(["a", "b", "c", "sub", "db", "f", "wal", "x"])
_STEPS = st.lists(st.one_of(_NAMES, st.just("..")), max_size=5).map("/".join)
_LIVE_STARTS = ["{data}/", "{data}//./", "{fast}/", "{live}/", "/proc/self/root{data}/"]
_OTHER_STARTS = ["{elsewhere}/to-data/", "{elsewhere}/twice/", "{elsewhere}/to-wal/", "{elsewhere}/", "{top}/", "/"]
_STARTS = st.sampled_from(
    ["", "", "../", "../../", "../../../", "{clone}/", "{outside}/", *_LIVE_STARTS, *_OTHER_STARTS]
)
_LINK = st.tuples(
    st.sampled_from(["data", "data/sub", "data/sub/deep", "data/db", "fast", "fast/wal"]),
    st.sampled_from(["a", "b", "c", "x"]),
    _STARTS,
    _STEPS,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(farmed=st.lists(_LINK, max_size=10))
@example(farmed=[("data", "a", "", "b/../../data/f"), ("data", "b", "{elsewhere}/", "d")])
@example(farmed=[("data", "a", "", "a/x"), ("data", "b", "", "c"), ("data", "c", "", "b/../../..")])
@example(farmed=[("data", "a", "/", ""), ("data", "b", "", "a")])
@example(farmed=[("data", "a", "../", ""), ("data", "b", "", "a/data/f")])
def test_nothing_leads_into_a_live_root(farmed: list[tuple[str, str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as made:
        farm = Farm(Path(made).resolve())
        for where, name, start, steps in farmed:
            directory = (farm.data if where.startswith("data") else farm.fast) / where[5:]
            begin = start.format(
                data=farm.data,
                fast=farm.fast,
                elsewhere=farm.elsewhere,
                top=farm.top,
                live=farm.data.parent,
                clone=farm.clone,
                outside=farm.outside,
            )
            if (target := begin + steps) and not os.path.lexists(directory / name):
                os.symlink(target, directory / name)
        farm.copy()
        live_before = (snapshot_of(farm.data), snapshot_of(farm.fast), snapshot_of(farm.elsewhere))
        needed = check_read_only(farm.roots)
        bad = [path for path in links(farm.clone) + links(farm.clone_fast) if leads_into(path, [farm.data, farm.fast])]
        farm.repoint()
        after = links(farm.clone) + links(farm.clone_fast)
        for path in after:
            assert not leads_into(path, [farm.data, farm.fast]), (path, os.readlink(path))
            resolved = kernel_path(path)
            assert resolved is None or resolved.startswith(str(farm.top / "restore")), (path, resolved)
        assert needed or not bad
        assert check_read_only(farm.roots) == []
        assert farm.repoint() == []
        assert (snapshot_of(farm.data), snapshot_of(farm.fast), snapshot_of(farm.elsewhere)) == live_before
        # What a link meant in the live world it means in the clone, where that is in a root and exists.
        for where, name, _, _ in farmed:
            top, clone = (farm.data, farm.clone) if where.startswith("data") else (farm.fast, farm.clone_fast)
            live_target = os.path.realpath(top / where[5:] / name)
            for root, restored in ((farm.data, farm.clone), (farm.fast, farm.clone_fast)):
                if os.path.exists(live_target) and (live_target + "/").startswith(f"{root}/"):
                    expected = str(restored) + live_target[len(str(root)) :]
                    assert os.path.realpath(clone / where[5:] / name) == expected


# RocksDB's options.

_OPTIONS_TEXT = """\
# This is a RocksDB option file.
[Version]
  rocksdb_version=9.9.3
[DBOptions]
  wal_dir={wal}
  db_log_dir={log}
  max_open_files=-1
  db_paths={{{{path={paths};target_size=1}};{{path=/elsewhere/x;target_size=0}}}}
  some_new_option={data}/sub
[CFOptions "default"]
  compression=kNoCompression
  comment=/etc/hostname
"""


def _options(farm: Farm, name: str = "OPTIONS-000007", **paths: object) -> Path:
    text = _OPTIONS_TEXT.format(**{"wal": "", "log": "", "paths": f"{farm.fast}/p", "data": farm.data, **paths})
    (farm.data / "db/CURRENT").write_text("MANIFEST-000005\n")
    file = farm.data / "db" / name
    file.write_text(text)
    return file


def test_options_are_led_to_the_clone(farm: Farm) -> None:
    file = _options(farm, wal=f"{farm.fast}/wal", log="/var/log/node")
    _options(farm, "OPTIONS-000003", wal=f"{farm.data}/db")
    os.link(file, farm.fast / "OPTIONS-000007")
    farm.copy()
    clone_file = farm.clone / "db/OPTIONS-000007"
    os.link(clone_file, farm.top / "restore/hard-link")
    if os.geteuid() == 0:
        os.chown(clone_file, 1234, 4321)
    os.chmod(clone_file, 0o640)
    os.utime(clone_file, ns=(10**18, 10**18))
    linked_before = (farm.top / "restore/hard-link").read_bytes()
    before = os.stat(clone_file)
    farm.repoint()
    text = clone_file.read_text()
    assert f"  wal_dir={farm.clone_fast}/wal\n" in text
    assert "  db_log_dir=\n" in text
    assert f"path={farm.clone_fast}/p;" in text and f"path={farm.outside}/elsewhere/x;" in text
    assert f"some_new_option={farm.clone}/sub\n" in text and "comment=/etc/hostname\n" in text
    assert f"wal_dir={farm.clone}/db\n" in (farm.clone / "db/OPTIONS-000003").read_text()
    after = os.stat(clone_file)
    assert (after.st_mode, after.st_uid, after.st_gid, after.st_mtime_ns) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
        10**18,
    )
    # A hard link elsewhere is another file from now on: whoever shares it doesn't see our change.
    assert (farm.top / "restore/hard-link").read_bytes() == linked_before
    assert str(farm.data) in file.read_text()
    assert farm.repoint() == []


def test_options_without_a_database_beside_them_are_no_options(farm: Farm) -> None:
    _options(farm, wal=f"{farm.fast}/wal")
    (farm.data / "db/CURRENT").unlink()
    farm.copy()
    assert farm.repoint() == []


def test_an_options_file_that_is_a_link(farm: Farm) -> None:
    file = _options(farm, wal=f"{farm.fast}/wal")
    os.rename(file, farm.data / "sub/kept")
    os.symlink(farm.data / "sub/kept", file)
    farm.copy()
    live = (farm.data / "sub/kept").read_bytes()
    assert {change.key for change in check_read_only(farm.roots)} >= {"", "wal_dir"}
    farm.repoint()
    assert f"wal_dir={farm.clone_fast}/wal\n" in (farm.clone / "sub/kept").read_text()
    assert (farm.data / "sub/kept").read_bytes() == live
    assert farm.repoint() == []


def test_options_codec() -> None:
    content = (
        b"[DBOptions]\n  wal_dir=/a/w\\#a\\:l\n  db_log_dir=\n  db_paths={{path=/p/q;target_size=1}}\n# wal_dir=/no\n"
    )
    assert option_paths(content) == [("wal_dir", "/a/w#a:l"), ("db_paths", "/p/q")]
    assert newest_options(["OPTIONS-000009", "OPTIONS-000010", "OPTIONS-000011.dbtmp", "CURRENT"]) == "OPTIONS-000010"
    assert newest_options([]) is None


# Bind mounts.


@pytest.fixture
def bind(tmp_path: Path):  # type: ignore[no-untyped-def]
    made: list[Path] = []

    def make(source: Path, at: Path, *flags: str) -> None:
        at.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", *flags, str(source), str(at)], check=True)
        made.append(at)

    yield make
    for at in reversed(made):
        subprocess.run(["umount", "-l", str(at)], check=False)


@needs_root
@as_root
def test_bind_mounts_of_a_live_root_are_seen_through(farm: Farm, bind) -> None:  # type: ignore[no-untyped-def]
    bind(farm.data, farm.top / "alias")
    bind(farm.data / "db", farm.top / "alias-db")
    bind(farm.top / "live", farm.top / "alias-above")
    os.symlink(farm.top / "alias/db/f", farm.data / "one")
    os.symlink(farm.top / "alias-db", farm.data / "two")
    os.symlink(farm.top / "alias-above/data/sub", farm.data / "three")
    os.symlink("../../alias-above/data/sub/../db/f", farm.data / "four")
    farm.copy()
    assert len(check_read_only(farm.roots)) == 4
    farm.repoint()
    expected = {"one": "db/f", "two": "db", "three": "sub", "four": "db/f"}
    for name, place in expected.items():
        assert os.path.realpath(farm.clone / name) == str(farm.clone / place)
        assert not leads_into(str(farm.clone / name), [farm.data, farm.fast])
    assert farm.repoint() == []


@needs_root
@as_root
def test_a_clone_that_is_full_fails_in_one_line_and_can_be_run_again(farm: Farm) -> None:
    os.symlink(farm.fast / "wal", farm.data / "wal")
    _options(farm, wal=f"{farm.fast}/wal")
    small = farm.top / "restore"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], check=True)
    try:
        farm.copy()
        filler = os.open(small / "filler", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError):
            while True:
                os.write(filler, b"x" * 4096)
        os.close(filler)
        with pytest.raises(StorageError, match="can't re-point"):
            farm.repoint()
        (small / "filler").unlink()
        farm.repoint()
        assert f"wal_dir={farm.clone_fast}/wal\n" in (farm.clone / "db/OPTIONS-000007").read_text()
        assert not leads_into(str(farm.clone / "wal"), [farm.data, farm.fast])
        assert check_read_only(farm.roots) == [] and farm.repoint() == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


# A real database.

_LIVE = """
    import os, sys
    from rocksdict import Options, Rdict, WriteOptions
    data, wal = sys.argv[1:]
    options = Options(); options.create_if_missing(True); options.set_wal_dir(wal); options.set_db_log_dir(wal + "-log")
    db = Rdict(data, options)
    for k in range(2000): db[f"k{k}"] = "v" * 100
    db.flush()
    synced = WriteOptions(); synced.sync = True; db.set_write_options(synced)
    for k in range(50): db[f"synced{k}"] = "s" * 100
    print("ready", flush=True)
    sys.stdin.readline()
    os._exit(0)  # as a kill: nothing is flushed
"""
_OPEN = """
    import sys
    from rocksdict import Rdict
    db = Rdict(sys.argv[1])
    assert all(db[f"synced{k}"] == "s" * 100 for k in range(50)), "a synced write is missing"
    for k in range(500): db[f"clone{k}"] = "c" * 1000
    db.flush(); db.close()
"""


def _python(code: str, *argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, argv)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("mended", [True, False], ids=["repoint", "control-without"])
def test_a_clones_engine_writes_to_the_clone_alone(farm: Farm, mended: bool) -> None:
    pytest.importorskip("rocksdict")
    wal = farm.fast / "w#al"
    real = farm.data / "real"
    live = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_LIVE), str(real), str(wal)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert live.stdout is not None and live.stdout.readline() == "ready\n"
        os.symlink(real, farm.data / "database")  # absolute, as operators do
        farm.copy()
    finally:
        assert live.stdin is not None
        live.stdin.write("\n")
        live.stdin.close()
        live.wait(timeout=60)
    before = snapshot_of(farm.data) | snapshot_of(farm.fast)
    if mended:
        changed = farm.repoint()
        assert {change.key for change in changed} == {"", "wal_dir", "db_log_dir"}
    time.sleep(0.01)
    outcome = _python(_OPEN, farm.clone / "database")
    assert outcome.returncode == 0, outcome.stderr
    after = snapshot_of(farm.data) | snapshot_of(farm.fast)
    if mended:
        assert after == before
        assert any("clone" in path for path in map(str, farm.clone_fast.rglob("*"))) or list(
            farm.clone_fast.rglob("*.log")
        )
    else:
        assert after != before, "the control: without repoint the engine writes to the live database"


@pytest.mark.parametrize("mended", [True, False], ids=["repoint", "control-without"])
def test_an_absolute_wal_dir_alone(farm: Farm, mended: bool) -> None:
    """No links at all: only the options name the live log's place."""
    pytest.importorskip("rocksdict")
    wal, real = farm.fast / "w", farm.data / "database"
    live = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_LIVE), str(real), str(wal)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert live.stdout is not None and live.stdout.readline() == "ready\n"
        farm.copy()
    finally:
        assert live.stdin is not None
        live.stdin.write("\n")
        live.stdin.close()
        live.wait(timeout=60)
    before = snapshot_of(farm.data) | snapshot_of(farm.fast)
    if mended:
        assert {change.key for change in farm.repoint()} == {"wal_dir", "db_log_dir"}
    outcome = _python(_OPEN, farm.clone / "database")
    assert outcome.returncode == 0, outcome.stderr
    after = snapshot_of(farm.data) | snapshot_of(farm.fast)
    if mended:
        assert after == before
    else:
        assert after != before, "the control: without repoint the engine writes to the live log's directory"


# Who owns the clone is not who runs this.


def _temporary(directory: Path) -> Path | None:
    return next((path for path in directory.iterdir() if path.name.startswith(".snapshotter-repoint")), None)


@needs_root
@as_root
@pytest.mark.parametrize("swapped_for", ["link", "hard link"])
@pytest.mark.parametrize("kind", ["options", "link"])
def test_a_temporary_swapped_by_the_clones_owner_hurts_nobody(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, kind: str, swapped_for: str
) -> None:
    """At the worst moment, right after it was made, the owner puts his way to root's file in its place."""
    victim = farm.top / "victim"
    victim.write_text("root's")
    os.chmod(victim, 0o600)
    if kind == "options":
        _options(farm, wal=f"{farm.fast}/wal")
    else:
        os.symlink(farm.fast / "wal", farm.data / "db/wal")
    farm.copy()
    directory = farm.clone / "db"
    name = directory / ("OPTIONS-000007" if kind == "options" else "wal")
    os.chown(directory, 65534, 65534)
    os.lchown(name, 65534, 65534)
    if kind == "options":
        os.chmod(name, 0o6666)
    swaps: list[Path] = []

    def swap() -> None:
        if (temporary := _temporary(directory)) is not None and not swaps:
            temporary.unlink()
            os.symlink(victim, temporary) if swapped_for == "link" else os.link(victim, temporary)
            swaps.append(temporary)

    real_fsync, real_symlink, real_chown = os.fsync, os.symlink, os.chown

    def fsync(fd: int) -> None:
        real_fsync(fd)
        swap()

    def symlink(src: str, dst: str, **given: object) -> None:
        real_symlink(src, dst, **given)  # type: ignore[arg-type]
        if os.fspath(dst).startswith(".snapshotter-repoint"):
            swap()

    def chown(path: str, *args: int, **given: object) -> None:
        swap()
        real_chown(path, *args, **given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        patched.setattr(os, "symlink", symlink)
        patched.setattr(os, "chown", chown)
        try:
            farm.repoint()
        except StorageError as error:
            assert "\n" not in error.line()
    assert swaps
    found = os.stat(victim)
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (0, 0, 0o600)
    assert victim.read_text() == "root's"


@needs_root
@as_root
def test_an_options_file_gets_its_owner_but_no_setuid(farm: Farm) -> None:
    _options(farm, wal=f"{farm.fast}/wal")
    farm.copy()
    file = farm.clone / "db/OPTIONS-000007"
    os.chown(file, 65534, 65534)
    os.chmod(file, 0o6664)
    farm.repoint()
    found = os.stat(file)
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (65534, 65534, 0o664)


def test_leftovers_are_known_by_their_whole_name(farm: Farm) -> None:
    mine = ".snapshotter-repoint"
    (farm.data / mine).write_text("the node's own")
    (farm.data / "db" / f"{mine}-0123456789abcdef").mkdir()
    (farm.data / "db" / f"{mine}-0123456789abcdef/f").write_text("a directory is no leftover")
    (farm.data / "db" / f"{mine}-0123456789ABCDEF").write_text("not ours")
    (farm.data / "sub" / mine).mkdir()
    os.symlink(farm.fast / "wal", farm.data / "sub" / f"{mine}-x")
    farm.copy()
    (farm.clone / f"{mine}-0123456789abcdef").write_text("ours")
    os.symlink("ours", farm.clone / "sub" / f"{mine}-fedcba9876543210")
    farm.repoint()
    assert (farm.clone / mine).read_text() == "the node's own"
    assert (farm.clone / "db" / f"{mine}-0123456789abcdef/f").exists()
    assert (farm.clone / "db" / f"{mine}-0123456789ABCDEF").exists() and (farm.clone / "sub" / mine).is_dir()
    assert os.readlink(farm.clone / "sub" / f"{mine}-x") == str(farm.clone_fast / "wal")
    assert not (farm.clone / f"{mine}-0123456789abcdef").exists()
    assert not os.path.lexists(farm.clone / "sub" / f"{mine}-fedcba9876543210")
    assert farm.repoint() == []


def test_options_that_are_no_files_are_not_waited_for(farm: Farm) -> None:
    _options(farm, "OPTIONS-000003", wal=f"{farm.fast}/wal")
    os.symlink("/dev/zero", farm.data / "db/OPTIONS-000008")
    os.symlink("../sub/pipe", farm.data / "db/OPTIONS-000007")
    farm.copy()
    os.mkfifo(farm.clone / "db/OPTIONS-000009")
    os.mkfifo(farm.clone / "sub/pipe")
    code = (
        "import json, sys; from snapshotter.nodes.repoint import repoint; repoint(json.loads(sys.argv[1]), sys.argv[2])"
    )
    argv = [sys.executable, "-c", code, json.dumps(farm.roots), str(farm.outside)]
    subprocess.run(argv, check=True, timeout=60)  # a hang shows as a timeout
    assert f"wal_dir={farm.clone_fast}/wal\n" in (farm.clone / "db/OPTIONS-000003").read_text()


def test_an_options_file_too_large_to_be_one_is_refused_if_it_is_the_newest(farm: Farm) -> None:
    file = _options(farm, wal=f"{farm.fast}/wal")
    farm.copy()
    with open(farm.clone / "db/OPTIONS-000003", "wb") as large:
        large.truncate(1 << 40)
    assert {Path(change.path).name for change in farm.repoint()} == {file.name}
    os.rename(farm.clone / "db/OPTIONS-000003", farm.clone / "db/OPTIONS-000008")
    with pytest.raises(PreconditionError, match="larger than 16 MiB"):
        farm.repoint()


def test_an_options_link_swapped_after_it_was_judged_leads_nowhere(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory that holds an options file's target becomes a link to a foreign one: that isn't written."""
    file = _options(farm, wal=f"{farm.fast}/wal")
    (farm.data / "sub/deep/kept").write_text(file.read_text())
    file.unlink()
    os.symlink("../sub/deep/kept", file)
    farm.copy()
    foreign = farm.top / "foreign/deep"
    foreign.mkdir(parents=True)
    (foreign / "kept").write_text(f"[DBOptions]\n  wal_dir={farm.fast}/wal\n")
    before = snapshot_of(foreign)
    real = os.path.realpath

    def realpath(path: str, **given: object) -> str:
        found = real(path, **given)  # type: ignore[call-overload]
        if str(path).endswith(file.name) and (farm.clone / "sub").is_dir():
            os.rename(farm.clone / "sub", farm.clone / "was-sub")
            os.symlink(farm.top / "foreign", farm.clone / "sub")
        return str(found)

    monkeypatch.setattr(os.path, "realpath", realpath)
    with contextlib.suppress(PreconditionError):  # said of the swapped directory itself, if it comes later
        farm.repoint()
    assert os.path.islink(farm.clone / "sub")
    assert snapshot_of(foreign) == before


def test_a_deep_tree_needs_few_descriptors(farm: Farm) -> None:
    """600 levels, together longer than any path may be, and a link to mend at the very bottom and on the way back."""
    farm.copy()
    fd = os.open(farm.clone, os.O_RDONLY)
    name = "level-name"
    for _ in range(600):
        os.mkdir(name, dir_fd=fd)
        os.mkdir("zz-sibling", dir_fd=fd)
        sibling = os.open("zz-sibling", os.O_RDONLY, dir_fd=fd)
        os.symlink(farm.fast / "wal", "wal", dir_fd=sibling)
        os.close(sibling)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.symlink(farm.fast / "wal", "wal", dir_fd=fd)
    code = """
import json, resource, sys
from snapshotter.nodes.repoint import repoint
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
print(len(repoint(json.loads(sys.argv[1]), sys.argv[2])))
"""
    argv = [sys.executable, "-c", code, json.dumps(farm.roots), str(farm.outside)]
    outcome = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    try:
        assert outcome.stdout == "601\n", outcome.stderr
        assert os.readlink("wal", dir_fd=fd) == str(farm.clone_fast / "wal")
    finally:
        os.close(fd)
        subprocess.run(["rm", "-rf", str(farm.clone)], check=True)  # too deep for the fixture's own removal


def test_a_directory_moved_away_under_the_walk_is_noticed(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back up from it would go on outside the clone."""
    farm.copy()
    away = farm.top / "away"
    (away / "x").mkdir(parents=True)
    os.symlink(farm.data, away / "x/link")
    real = os.scandir

    def scandir(path: int) -> object:
        if isinstance(path, int) and os.readlink(f"/proc/self/fd/{path}") == str(farm.clone / "sub/deep"):
            os.rename(farm.clone / "sub", away / "sub")
        return real(path)

    (farm.clone / "sub/deep/deeper").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PreconditionError, match="was moved"):
        farm.repoint()
    assert os.readlink(away / "x/link") == str(farm.data)
