"""Targets and roots: real directories, links and mounts."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshotter.core.errors import NotFoundError, PreconditionError, SnapshotterError, UsageError
from snapshotter.host import places
from snapshotter.nodes import profiles
from snapshotter.nodes.config import NODE_NAME, Config, Node
from snapshotter.nodes.roots import Layout, roots
from snapshotter.nodes.target import canonical, node_name, resolve, target_id
from snapshotter.nodes.values import Seconds
from snapshotter.verbs.plan import survey
from snapshotter.verbs.session import Session

needs_root = pytest.mark.root
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
GENERIC = profiles.get("generic")


@pytest.fixture
def top(tmp_path: Path) -> Path:
    return tmp_path.resolve()


def made(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(path.name)
    return path


def layout(path: Path, **given: object) -> Layout:
    return roots(Node(name="n", path=str(path), **given), GENERIC)  # type: ignore[arg-type]


def paths(found: Layout) -> list[str]:
    return [root.path for root in found.roots]


# What a command was given.


@pytest.fixture
def config(top: Path) -> Config:
    made(top / "one")
    made(top / "two")
    os.symlink(top / "one", top / "link")
    nodes = {
        "one": Node(name="one", path=str(top / "link"), budget=Seconds(7)),
        "validator-2": Node(name="validator-2", path=str(top / "two")),
    }
    return Config(state="/nowhere", nodes=nodes)


def test_name_path_and_link_are_one_target(config: Config, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given_as in ("one", str(top / "one"), str(top / "link"), f"{top}/two/../one/"):
        assert resolve(given_as, config).name == "one"
        assert resolve(given_as, config).budget == 7
    monkeypatch.chdir(top)
    assert resolve("./one", config).name == "one"
    assert target_id(str(top / "one")) == target_id(str(top / "link")) != target_id(str(top / "two"))
    host = places.host_name().rpartition("-")[2].encode()
    assert target_id(str(top / "link")) == hashlib.sha256(host + b"\0" + bytes(top / "one")).hexdigest()[:16]


def test_a_bare_path_needs_no_config(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(top / "Besu Data!")
    node = resolve(str(top / "Besu Data!"), Config(state="/"))
    assert (node.name, node.path, node.floor) == ("besu-data", str(top / "Besu Data!"), 0.10)
    monkeypatch.chdir(top)
    assert resolve("Besu Data!", Config(state="/")) == node
    monkeypatch.chdir(top / "Besu Data!")
    assert resolve(".", Config(state="/")) == node


def test_no_target_is_the_only_node(config: Config) -> None:
    only = Config(state="/", nodes={"one": config.nodes["one"]})
    assert resolve(None, only).name == "one"
    with pytest.raises(UsageError, match="one, validator-2"):
        resolve(None, config)
    with pytest.raises(UsageError, match="snapshotter init"):
        resolve(None, Config(state="/"))


def test_what_is_refused(config: Config, top: Path) -> None:
    with pytest.raises(NotFoundError, match="did you mean validator-2"):
        resolve("validator2", config)
    with pytest.raises(NotFoundError, match="one, validator-2"):
        resolve("zzz", config)
    with pytest.raises(NotFoundError, match="no such directory"):
        resolve(str(top / "missing"), config)
    with pytest.raises(UsageError, match="not a directory"):
        resolve(str(top / "one/file"), config)
    with pytest.raises(UsageError):
        resolve("", config)
    with pytest.raises(UsageError):
        resolve("a\0b", config)
    os.symlink("loop", top / "loop")
    with pytest.raises(SnapshotterError):
        resolve(str(top / "loop"), config)


def test_a_data_path_that_is_gone(config: Config, top: Path) -> None:
    os.rename(top / "two", top / "two.corrupted")
    with pytest.raises(NotFoundError):
        resolve("validator-2", config)
    assert resolve("validator-2", config, must_exist=False).path == str(top / "two")
    assert resolve(str(top / "two"), config, must_exist=False).name == "validator-2"


@given(st.text(min_size=0, max_size=300))
def test_a_derived_name_is_always_valid(text: str) -> None:
    assert NODE_NAME.fullmatch(node_name("/var/lib/" + text))


# Roots.


def test_links_are_followed_and_searched_in_turn(top: Path) -> None:
    data, db, wal = made(top / "data"), made(top / "fast/db"), made(top / "logs/wal")
    made(data / "sub/deep")
    os.symlink(db, data / "database")
    os.symlink("../../logs/wal", db / "wal")  # a link in what a link led to
    os.symlink(data, wal / "back")
    os.symlink("sub/deep", data / "inside")
    os.symlink("nowhere", data / "broken")
    os.symlink("self", data / "self")
    found = layout(data)
    assert paths(found) == [str(data), str(db), str(wal)]
    assert [root.relative for root in found.roots] == ["", None, None]
    assert found.links_outside == [] and found.aliases == []
    assert found.warnings == [f"{data}/self: a link that leads to itself"]


def test_a_root_in_another_is_named_once_whatever_the_order(top: Path) -> None:
    for number, order in enumerate([("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c")]):
        here = top / str(number)
        data, big = made(here / "data"), made(here / "fast/big")
        made(big / "small/tiny")
        made(big / "smaller")  # a name that begins like another's
        for name, target in zip(order, (big, big / "small", big / "small/tiny"), strict=True):
            os.symlink(target, data / name)
        assert paths(layout(data)) == [str(data), str(big)]


def test_links_that_are_not_followed(top: Path) -> None:
    data, other = made(top / "data/node"), made(top / "other")
    links = {
        "root": "/",
        "above": "..",
        "above2": str(top),
        "etc": "/etc",
        "ssl": "/etc/ssl" if os.path.isdir("/etc/ssl") else "/etc",
        "null": "/dev/null",
        "proc": "/proc/self",
        "var": "/var/lib",
        "tmp": "/tmp",
        "a-file": str(other / "file"),
    }
    for name, target in links.items():
        os.symlink(target, data / name)
    found = layout(data)
    assert paths(found) == [str(data)]
    for name in links:
        assert any(line.startswith(f"{data}/{name} -> ") for line in found.links_outside), name
    assert len(found.links_outside) == len(links)


def test_what_leads_to_a_disk_that_isnt_mounted(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mount failed at boot: a set without the database would be good, and the next weeks' sets as well."""
    data = made(top / "data")
    fstab = top / "fstab"
    monkeypatch.setattr("snapshotter.host.mounts.FSTAB", str(fstab))
    os.symlink(top / "fast/besu/database", data / "database")
    (data / "rocks").mkdir()
    (data / "rocks/CURRENT").write_text("MANIFEST-000001\n")
    (data / "rocks/OPTIONS-000007").write_text(f"[DBOptions]\n  wal_dir={top}/wal/logs\n")
    found = layout(data)
    assert found.nowhere == [
        (f"{data}/database", f"{top}/fast/besu/database"),
        (f"{data}/rocks/OPTIONS-000007: wal_dir", f"{top}/wal/logs"),
    ]
    assert found.links_outside == [f"{data}/database -> {top}/fast/besu/database: isn't there"]
    node = Node(name="n", path=str(data))
    survey(Session(Config(state=str(top / "state"))), node)  # of no disk is anything known
    for point, who in (("fast", "database"), ("wal", "rocks/OPTIONS-000007: wal_dir")):
        fstab.write_text(f"UUID=1 {top}/{point} ext4 nofail 0 2\n")
        with pytest.raises(PreconditionError, match=f"nothing is mounted at {top}/{point}") as refused:
            survey(Session(Config(state=str(top / "state"))), node)
        assert refused.value.object == f"{data}/{who}" and f"mount {top}/{point}" in str(refused.value.cure)


def test_a_file_link_into_a_root_found_later_isnt_outside(top: Path) -> None:
    data, other = made(top / "data"), made(top / "other")
    os.symlink(other / "file", data / "a-file")
    os.symlink(other, data / "z-directory")
    found = layout(data)
    assert paths(found) == [str(data), str(other)] and found.links_outside == []


def test_extra_paths_and_the_profiles_roots(top: Path) -> None:
    data, extra, ancient = made(top / "data"), made(top / "extra"), made(top / "ancient")
    profile = msgspec.structs.replace(GENERIC, extra_roots=("../ancient", "../not-there"))
    node = Node(name="n", path=str(data), extra_paths=(str(extra), str(data / ".")))
    assert paths(roots(node, profile)) == [str(data), str(ancient), str(extra)]
    with pytest.raises(NotFoundError):
        layout(data, extra_paths=(str(top / "missing"),))
    with pytest.raises(UsageError, match="holds the data path"):
        layout(data, extra_paths=(str(top),))
    with pytest.raises(UsageError, match="extra_paths"):
        layout(data, extra_paths=("/",))


def test_the_databases_own_options_name_roots(top: Path) -> None:
    data, wal, stale = made(top / "data"), made(top / "w#al"), made(top / "stale")
    made(top / "log")
    (data / "CURRENT").write_text("MANIFEST-000001\n")
    (data / "OPTIONS-000008").write_text(f"[DBOptions]\n  wal_dir={stale}\n")
    (data / "OPTIONS-000010").write_text(
        f"[DBOptions]\n  wal_dir={str(wal).replace('#', chr(92) + '#')}\n  db_log_dir={top}/log\n"
    )
    assert paths(layout(data)) == [str(data), str(wal)]
    (data / "OPTIONS-000011").write_text(f"[DBOptions]\n  wal_dir={top}/gone\n")
    found = layout(data)
    assert paths(found) == [str(data)] and "which isn't there" in found.warnings[0]


def test_a_real_rocksdb_with_its_log_elsewhere(top: Path) -> None:
    rocksdict = pytest.importorskip("rocksdict")
    data, wal = made(top / "data"), top / "log of writes"
    options = rocksdict.Options()
    options.create_if_missing(True)
    options.set_wal_dir(str(wal))
    db = rocksdict.Rdict(str(data / "database"), options)
    db["a"] = "b"
    try:
        assert paths(layout(data)) == [str(data), str(wal)]
    finally:
        db.close()


def test_a_directory_that_cant_be_read_is_refused(top: Path) -> None:
    data = made(top / "data")
    made(data / "open/closed")
    os.symlink(top / "hidden/x", data / "link")
    made(top / "hidden/x")
    code = """
import os, sys
from snapshotter.nodes import profiles, roots, target
from snapshotter.nodes.config import Config, Node
from snapshotter.core.errors import PreconditionError
for path in sys.argv[1:]:
    try:
        roots.roots(target.resolve(path, Config(state="/")), profiles.get("generic"))
    except PreconditionError as error:
        print(error.line())
"""

    def ask(path: Path) -> str:
        argv = [sys.executable, "-c", code, str(path)]
        if os.geteuid() == 0:
            argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *argv]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout

    for above in (top, *top.parents):
        if above.stat().st_uid == os.geteuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o055)
    os.chmod(top / "hidden", 0)
    assert f"{data}/link: no permission to see" in ask(data)
    os.chmod(top / "hidden", 0o755)
    assert ask(data) == ""
    os.chmod(data / "open/closed", 0)
    assert f"{data}/open/closed: no permission to read it" in ask(data)
    os.chmod(data, 0)
    assert f"{data}: no permission to read it" in ask(data)
    os.chmod(data, 0o755)


def test_refused_data_paths() -> None:
    with pytest.raises(PreconditionError, match="whole system"):
        layout(Path("/"))
    with pytest.raises(PreconditionError, match="proc"):
        layout(Path("/proc"))


# Mounts.


@pytest.fixture
def mount() -> Iterator[Callable[..., Path]]:
    done: list[Path] = []

    def make(at: Path, *argv: str) -> Path:
        if not at.exists():
            at.mkdir(parents=True)
        subprocess.run(["mount", *argv, str(at)], check=True)
        done.append(at)
        return at

    yield make
    for at in reversed(done):
        subprocess.run(["umount", "-l", str(at)], check=False)


def ext4(image: Path) -> str:
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    return str(image)


@needs_root
@as_root
def test_nested_and_bind_mounts(top: Path, mount: Callable[..., Path]) -> None:
    data = made(top / "data")
    made(data / "own")
    elsewhere = made(top / "else where")
    nested = mount(data / "ne sted", "-o", "loop", ext4(top / "image"))
    (nested / "in").mkdir()
    os.symlink(nested / "in", data / "into-nested")
    bound = mount(data / "bound", "--bind", str(elsewhere))
    mount(data / "again", "--bind", str(data / "own"))  # its own content, twice
    mount(top / "alias", "--bind", str(data / "own"))
    os.symlink(top / "alias", data / "by-alias")
    os.symlink(elsewhere, data / "to-bound")
    mount(top / "alias-above", "--bind", str(top))
    os.symlink(top / "alias-above", data / "holds-us")
    os.symlink(top / "alias-above/data/own", data / "us-again")
    (data / "single").write_text("")
    mount(data / "single", "--bind", str(elsewhere / "file"))
    found = layout(data)
    assert paths(found)[0] == str(data)
    assert paths(found)[1:] == [str(bound), str(nested)]
    by_path = {root.path: root for root in found.roots}
    assert by_path[str(nested)].relative == "ne sted" and by_path[str(nested)].mount.fstype == "ext4"
    aliases = dict(found.aliases)
    assert aliases[f"{data}/again"] == f"{data}/own" and aliases[f"{top}/alias"] == f"{data}/own"
    assert any("holds-us" in line and "holds the data path" in line for line in found.links_outside)
    assert any(f"{data}/single" in line for line in found.links_outside)
    assert found.roots[0].relative == ""


@needs_root
@as_root
def test_a_mount_hidden_by_a_later_one_isnt_a_root(top: Path, mount: Callable[..., Path]) -> None:
    data = made(top / "data")
    made(data / "sub/below")
    mount(data / "sub/below", "-o", "loop", ext4(top / "hidden"))
    over = mount(data / "sub", "-o", "loop", ext4(top / "over"))
    assert paths(layout(data)) == [str(data), str(over)]
    (over / "below").mkdir()  # the hidden one's name, but not the hidden one
    assert paths(layout(data)) == [str(data), str(over)]


@needs_root
@as_root
@pytest.mark.parametrize("how", ["data", "nested", "link"])
def test_tmpfs_is_refused_with_the_reason(top: Path, mount: Callable[..., Path], how: str) -> None:
    data = made(top / "data")
    at = {"data": top / "mem", "nested": data / "mem", "link": top / "mem"}[how]
    mount(at, "-t", "tmpfs", "tmpfs")
    if how == "link":
        os.symlink(at, data / "link")
    with pytest.raises(PreconditionError, match="tmpfs lies in memory"):
        layout(at if how == "data" else data)


def test_the_canonical_path_of_odd_names(top: Path) -> None:
    odd = os.fsdecode(bytes(top) + b"/\xff new\nline \\ tab\t")
    os.mkdir(odd)
    node = resolve(odd, Config(state="/"))
    assert node.path == odd == canonical(odd)
    assert paths(roots(node, GENERIC)) == [odd]
    assert len(target_id(odd)) == 16


# Whatever the links are.

_PLACES = ["data", "data/sub", "x", "x/y", "x/y/z", "w", "w/v"]
_TARGETS = [*_PLACES, "x/y/../y", "missing", "x/file", "."]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.sampled_from(_PLACES), st.sampled_from("abc"), st.sampled_from(_TARGETS), st.booleans()),
        max_size=8,
    )
)
def test_every_directory_reached_is_in_one_root(links: list[tuple[str, str, str, bool]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory).resolve()
        for place in _PLACES:
            made(top / place)
        for place, name, target, relative in links:
            if not os.path.lexists(link := top / place / name):
                os.symlink(os.path.relpath(top / target, link.parent) if relative else top / target, link)
        found = layout(top / "data")
        named = paths(found)
        assert named[0] == str(top / "data")
        for one in named:  # none in another, none above the data path, every name canonical
            assert os.path.realpath(one) == one and not str(top / "data").startswith(one + "/")
            assert not any(other != one and one.startswith(other + "/") for other in named)

        def held(path: str) -> bool:
            return any(path == one or path.startswith(one + "/") for one in named)

        # The other way round: what can be reached by following links, found by a search of its own.
        reached, waiting = set(), [str(top / "data")]
        while waiting:
            here = waiting.pop()
            if here in reached or here == str(top):
                continue
            reached.add(here)
            waiting += [os.path.realpath(entry) for entry in os.scandir(here) if entry.is_dir()]
        assert all(held(path) for path in reached)
        assert all(one in reached for one in named)


# Who owns the tree is not who runs this.

NOBODY, OTHER = 65534, 65533


def owned(path: Path, uid: int) -> Path:
    os.chown(path, uid, uid, follow_symlinks=False)
    return path


def linked(link: Path, target: Path | str, uid: int) -> None:
    os.symlink(target, link)
    owned(link, uid)


@needs_root
@as_root
def test_a_link_leads_root_only_to_what_its_author_owns(top: Path) -> None:
    data = owned(made(top / "data"), NOBODY)
    private, hidden, mine = owned(made(top / "pg"), OTHER), made(top / "of-root"), owned(made(top / "fast/db"), NOBODY)
    os.chmod(private, 0o700)
    blessed = owned(made(top / "blessed"), OTHER)
    linked(data / "a", private, NOBODY)
    linked(data / "b", hidden, NOBODY)
    linked(data / "c", mine, NOBODY)
    linked(data / "d", blessed, 0)
    found = layout(data)
    assert paths(found) == [str(data), str(blessed), str(mine)]
    assert [line.partition(":")[0] for line in found.links_outside] == [
        f"{data}/a -> {private}",
        f"{data}/b -> {hidden}",
    ]
    assert all("name it in extra_paths" in line for line in found.links_outside)
    named = layout(data, extra_paths=(str(private),))
    assert paths(named) == [str(data), str(blessed), str(mine), str(private)]
    assert len(named.links_outside) == 1


@needs_root
@as_root
def test_roots_own_link_is_no_way_through_the_nodes(top: Path) -> None:
    data, private = owned(made(top / "data"), NOBODY), owned(made(top / "pg"), OTHER)
    way = owned(made(top / "way"), NOBODY)
    linked(way / "db", private, NOBODY)
    linked(data / "through", way / "db", 0)  # root's, but it passes one of nobody's
    linked(data / "moved", "../pg", 0)  # root's, and relative: who owns the directory may have moved it here
    linked(top / "others", private, OTHER)
    os.link(
        top / "others", data / "brought", follow_symlinks=False
    )  # its own author may go there; but not by this name
    linked(data / "near", "../fast", 0)
    owned(made(top / "fast"), NOBODY)
    found = layout(data)
    assert paths(found) == [str(data), str(top / "fast")]
    assert len(found.links_outside) == 3


@needs_root
@as_root
def test_a_profiles_root_that_the_node_turned_into_a_link(top: Path) -> None:
    data, private = owned(made(top / "data"), NOBODY), owned(made(top / "pg"), OTHER)
    linked(data / "ancient", private, NOBODY)
    profile = msgspec.structs.replace(GENERIC, extra_roots=("ancient",))
    assert paths(roots(Node(name="n", path=str(data)), profile)) == [str(data)]


@needs_root
@as_root
def test_options_lead_root_only_to_what_their_author_owns(top: Path) -> None:
    data, wal = owned(made(top / "data"), NOBODY), owned(made(top / "wal"), OTHER)
    (data / "CURRENT").write_text("MANIFEST-000001\n")
    options = data / "OPTIONS-000007"
    options.write_text(f"[DBOptions]\n  wal_dir={wal}\n")
    assert paths(layout(data)) == [str(data), str(wal)]  # root's own word
    owned(options, NOBODY)
    with pytest.raises(PreconditionError, match="belongs to another user") as refused:
        layout(data)
    assert "extra_paths" in refused.value.line()
    assert paths(layout(data, extra_paths=(str(wal),))) == [str(data), str(wal)]
    owned(wal, NOBODY)
    assert paths(layout(data)) == [str(data), str(wal)]
    # Another's file, brought here by a hard link, isn't its author's word here.
    owned(wal, OTHER)
    owned(options, OTHER)
    os.link(options, top / "the-others-own")
    with pytest.raises(PreconditionError, match="belongs to another user"):
        layout(data)


def test_without_root_links_lead_anywhere_that_can_be_read(top: Path) -> None:
    """Nobody's privilege is lent to the link's author."""
    data, private = made(top / "data"), made(top / "other")
    os.symlink(private, data / "link")
    for above in (top, *top.parents):
        if above.stat().st_uid == os.geteuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o055)
    code = """
import sys
from snapshotter.nodes import profiles, roots
from snapshotter.nodes.config import Node
print(len(roots.roots(Node(name="n", path=sys.argv[1]), profiles.get("generic")).roots))
"""
    argv = [sys.executable, "-c", code, str(data)]
    if os.geteuid() == 0:
        owned(data / "link", OTHER)
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *argv]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout == "2\n"


_LAYOUT = """
import json, resource, sys
from snapshotter.core.errors import PreconditionError
from snapshotter.nodes import profiles, roots
from snapshotter.nodes.config import Node
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    found = roots.roots(Node(name="n", path=sys.argv[1]), profiles.get("generic"))
    print(json.dumps([[root.path for root in found.roots], found.warnings]))
except PreconditionError as error:
    print(json.dumps(error.line()))
"""


@pytest.mark.parametrize("kind", ["fifo", "fifo by link", "zero by link", "socket", "directory", "huge"])
def test_options_that_are_no_files_neither_hang_nor_fill_the_memory(top: Path, kind: str) -> None:
    data = made(top / "data")
    (data / "CURRENT").write_text("MANIFEST-000001\n")
    options = data / "OPTIONS-000009"
    if kind == "fifo":
        os.mkfifo(options)
    elif kind == "fifo by link":
        os.mkfifo(data / "pipe")
        os.symlink("pipe", options)
    elif kind == "zero by link":
        os.symlink("/dev/zero", options)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(f"/proc/self/fd/{(fd := os.open(data, os.O_PATH))}/{options.name}")
            os.close(fd)
    elif kind == "directory":
        options.mkdir()
    else:
        with open(options, "wb") as file:
            file.truncate(1 << 40)
    argv = [sys.executable, "-c", _LAYOUT, str(data)]
    said = json.loads(subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout)
    if kind == "huge":
        assert str(options) in said and "larger than 16 MiB" in said
    else:
        assert said[0] == [str(data)] and len(said[1]) == 1 and "not read" in said[1][0]


def test_options_that_are_a_link_are_read_in_a_root_alone(top: Path) -> None:
    data, fast, wal = made(top / "data"), made(top / "fast"), made(top / "wal")
    (data / "db").mkdir()
    (data / "db/CURRENT").write_text("MANIFEST-000001\n")
    (fast / "kept").write_text(f"[DBOptions]\n  wal_dir={wal}\n")
    os.symlink(fast / "kept", data / "db/OPTIONS-000009")
    found = layout(data)
    assert paths(found) == [str(data)] and any("not read" in line for line in found.warnings)
    os.symlink(fast, data / "a-root-found-later")
    found = layout(data)
    assert paths(found) == [str(data), str(fast), str(wal)] and found.warnings == []
    os.unlink(data / "a-root-found-later")
    assert paths(layout(data, extra_paths=(str(fast),))) == [str(data), str(fast), str(wal)]


def test_a_directory_swapped_for_a_link_during_the_walk_isnt_entered(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, private = made(top / "data"), made(top / "pg")
    made(data / "a/b/c")
    made(private / "b/c")
    made(top / "wal")
    os.symlink(top / "wal", private / "b/c/link")
    real = os.scandir

    class Swapping:
        def __init__(self, given: object) -> None:
            self.it, self.given = real(given), given  # type: ignore[call-overload]

        def __enter__(self) -> object:
            return self.it.__enter__()

        def __exit__(self, *raised: object) -> None:
            where = os.readlink(f"/proc/self/fd/{self.given}") if isinstance(self.given, int) else str(self.given)
            self.it.__exit__(*raised)
            if where == str(data / "a/b") and not os.path.islink(data / "a"):
                os.rename(data / "a", data / "was-a")
                os.symlink(private, data / "a")

        def close(self) -> None:
            self.it.close()

    monkeypatch.setattr(os, "scandir", Swapping)
    assert paths(layout(data)) == [str(data)]
    assert os.path.islink(data / "a")
