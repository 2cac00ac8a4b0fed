"""The copy provider's images: what is shared and what never, writers that weren't paused, budgets, full disks."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.core.errors import BusyError, PreconditionError, QuiesceError, StorageError
from snapshotter.core.model import Access, Hold, ImageState, new_attachment_id, utc_now
from snapshotter.host import mounts
from snapshotter.testing.harness import describe, fill, fill_with_oddities, make_birth
from tests.support import Command, as_user, interpreter, loop_file_system
from tests.unit.copy_kit import SEAL, Place, allocated, place_on, reachable, settle, shared_extents

__all__ = ["reachable"]  # a fixture
KINDS = ["here", pytest.param("btrfs", marks=pytest.mark.root), pytest.param("xfs", marks=pytest.mark.root)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(params=KINDS)
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with place_on(request.param, tmp_path) as place:
        yield place


def same_inode(one: Path, other: Path) -> bool:
    return os.path.samestat(os.lstat(one), os.lstat(other))


# -- fidelity and sharing --------------------------------------------------------------------------------------------


def test_image_and_clone_are_the_tree(anywhere: Place) -> None:
    fill_with_oddities(str(anywhere.data))
    before = describe(str(anywhere.data))
    for _ in range(2):  # the second shares with the first
        settle()
        birth = anywhere.take()
        assert describe(str(anywhere.image(birth))) == before
        attachment_id, clone = anywhere.clone(birth)
        assert describe(str(clone)) == before
        assert allocated(clone / "odd/sparse") < 1 << 20
        anywhere.provider().detach(attachment_id)
        assert not clone.exists()
    assert describe(str(anywhere.data)) == before


def test_unchanged_files_take_no_second_room(anywhere: Place) -> None:
    for name in ("kept", "changed"):
        (anywhere.data / name).write_bytes(os.urandom(3 << 20))
    settle()
    one = anywhere.take()
    with open(anywhere.data / "changed", "r+b") as file:
        file.write(b"new")
    settle()
    two = anywhere.take()
    first, second = anywhere.image(one), anywhere.image(two)
    assert (second / "changed").read_bytes()[:3] == b"new"
    assert (first / "changed").read_bytes()[:3] != b"new"
    assert same_inode(first / "kept", second / "kept") or (
        shared_extents(first / "kept") and shared_extents(second / "kept")
    )
    assert not same_inode(first / "changed", second / "changed")
    content = (second / "kept").read_bytes()
    anywhere.provider().delete(one.set_id)
    assert (second / "kept").read_bytes() == content and anywhere.snapshot(two).state is ImageState.READY


def test_a_clone_never_shares_an_inode_with_the_store(anywhere: Place) -> None:
    fill(str(anywhere.data))
    settle()
    anywhere.take()
    birth = anywhere.take()
    before = describe(str(anywhere.image(birth)))
    _, clone = anywhere.clone(birth)
    for directory, _, files in os.walk(clone):
        for name in files:
            path = Path(directory) / name
            assert os.lstat(path).st_nlink == 1
            path.write_bytes(b"a person's")
            os.chmod(path, 0o777)
    assert describe(str(anywhere.image(birth))) == before


def test_a_rewrite_that_restores_size_and_mtime_is_seen(place: Place) -> None:
    """rsync would miss it; only ctime can't be set back."""
    path = place.data / "key"
    path.write_bytes(b"old content")
    settle()
    one = place.take()
    found = os.lstat(path)
    with open(path, "r+b") as file:
        file.write(b"new content")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    again = os.lstat(path)
    assert (again.st_size, again.st_mtime_ns, again.st_ino) == (found.st_size, found.st_mtime_ns, found.st_ino)
    settle()
    two = place.take()
    assert (place.image(one) / "key").read_bytes() == b"old content"
    assert (place.image(two) / "key").read_bytes() == b"new content"


def test_what_was_written_within_two_seconds_is_never_shared(place: Place) -> None:
    """On older kernels a second write in the same tick leaves every time stamp; so such a file is copied again."""
    path = place.data / "hot"
    path.write_bytes(b"written just now")
    one = place.take(prepare=False)
    settle()
    two = place.take()
    three = place.take()
    assert not same_inode(place.image(one) / "hot", place.image(two) / "hot"), "its first copy proves nothing"
    assert same_inode(place.image(two) / "hot", place.image(three) / "hot"), "by now it is settled"


def test_new_metadata_is_no_unchanged_file(place: Place) -> None:
    for name in ("mode", "attribute", "linked", "replaced"):
        (place.data / name).write_bytes(b"same content")
    settle()
    place.take()
    os.chmod(place.data / "mode", 0o640)
    os.setxattr(place.data / "attribute", "user.new", b"1")
    os.link(place.data / "linked", place.data / "linked too")
    (place.data / "replacement").write_bytes(b"SAME content")
    os.rename(place.data / "replacement", place.data / "replaced")
    os.chmod(place.data, 0o711)
    settle()
    assert describe(str(place.image(place.take()))) == describe(str(place.data))


def test_directories_that_change_kind_or_place(place: Place) -> None:
    fill(str(place.data))
    provider, volume = place.provider(), place.volume()
    birth = make_birth([volume])
    provider.prepare([volume], birth, 30.0)
    os.rename(place.data / "database", place.data / "moved")
    os.unlink(place.data / "key")
    (place.data / "key/below").mkdir(parents=True)
    (place.data / "key/below/file").write_bytes(b"now a directory")
    (place.data / "database").write_bytes(b"now a file")
    os.symlink("moved", place.data / "link")
    provider.create([volume], birth, Hold())
    provider.mark(birth.set_id, SEAL)
    assert describe(str(place.image(birth))) == describe(str(place.data))
    assert (
        os.listdir(place.store / "sets" / birth.set_id) and not (place.store / "sets" / birth.set_id / "attic").exists()
    )


def test_a_damaged_set_is_not_shared_with(place: Place) -> None:
    (place.data / "file").write_bytes(b"x" * 10_000)
    settle()
    one, two = place.take(), place.take(seal=False)
    marked = place.take()
    place.provider().mark(marked.set_id, {"verify-outcome": "corrupt"})
    for each in (two, marked):
        (place.image(each) / "file").unlink()
        (place.image(each) / "file").write_bytes(b"y" * 10_000)
    (place.store / "sets" / one.set_id / "0/manifest").write_bytes(b"garbage\n" * 3)
    assert (place.image(place.take()) / "file").read_bytes() == b"x" * 10_000


@pytest.mark.root
@pytest.mark.parametrize("case", ["the second", "the second, deleted", "the first", "the second, by an older version"])
def test_what_rotted_is_in_no_later_set(tmp_path: Path, case: str) -> None:
    """Where files are shared by hard links, one that rotted is in every set that has it, also in those not verified."""
    with place_on("ext4", tmp_path, 64) as place:
        (place.data / "file").write_bytes(b"x" * 10_000)
        settle()
        one, two = place.take(), place.take()
        assert same_inode(place.image(one) / "file", place.image(two) / "file")
        with open(place.image(one) / "file", "r+b") as file:  # same size: only a verify that reads all finds it
            file.write(b"rotten")
        corrupt = one if case == "the first" else two
        place.provider().mark(corrupt.set_id, {"verify-outcome": "corrupt"})
        if "older version" in case:
            for mark in place.store.glob("sets/*/suspect"):
                mark.unlink()
        if "deleted" in case:
            place.provider().delete(corrupt.set_id)
        three = place.take()
        assert (place.image(three) / "file").read_bytes() == b"x" * 10_000
        four = place.take()
        assert same_inode(place.image(three) / "file", place.image(four) / "file"), "what was copied anew is shared"


# -- writers ---------------------------------------------------------------------------------------------------------

MAPPER = """
import mmap, sys, os
fd = os.open(sys.argv[1], os.O_RDWR)
view = mmap.mmap(fd, 4096 * 4)
os.close(fd)
for line in sys.stdin:
    view[0:len(line.strip())] = line.strip().encode()
    print("done", flush=True)
"""


@contextlib.contextmanager
def mapper(path: Path) -> Iterator[Callable[[str], None]]:
    """A process that keeps the file mapped, shared and writable, and writes through the mapping when told."""
    child = subprocess.Popen(
        [sys.executable, "-c", MAPPER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin and child.stdout

    def write(text: str) -> None:
        assert child.stdin and child.stdout
        child.stdin.write(text + "\n")
        child.stdin.flush()
        assert child.stdout.readline() == "done\n"

    try:
        yield write
    finally:
        child.stdin.close()
        child.wait(10)
        child.stdout.close()


def test_a_mapped_file_is_copied_again_though_no_time_stamp_moves(anywhere: Place) -> None:
    path = anywhere.data / "data.mdb"
    path.write_bytes(bytes(4096 * 4))
    with mapper(path) as write:
        write("first")
        settle()
        one = anywhere.take()
        provider, volume = anywhere.provider(), anywhere.volume()
        birth = make_birth([volume])
        write("second")
        settle()
        provider.prepare([volume], birth, 30.0)
        write("third!")
        write("fourth")  # the page is dirty already: no fault, no time stamp
        found = os.lstat(path)
        hold = Hold(mapped=frozenset({(found.st_dev, found.st_ino)}))
        provider.create([volume], birth, hold)
        provider.mark(birth.set_id, SEAL)
        assert (anywhere.image(birth) / "data.mdb").read_bytes()[:6] == b"fourth"
        assert (anywhere.image(one) / "data.mdb").read_bytes()[:5] == b"first"
    settle()
    after = anywhere.take()
    assert not same_inode(anywhere.image(after) / "data.mdb", anywhere.image(birth) / "data.mdb"), "it was volatile"


def test_a_store_through_a_mapping_after_the_read_is_seen_by_its_time(anywhere: Place) -> None:
    """Without anybody saying that it is mapped: pages are written back before the read, so a later store faults."""
    path = anywhere.data / "data.mdb"
    path.write_bytes(bytes(4096 * 4))
    fd = os.open(path, os.O_RDWR)
    view = mmap.mmap(fd, 0)
    os.close(fd)
    view[0:5] = b"first"
    settle()
    provider, volume = anywhere.provider(), anywhere.volume()
    birth = make_birth([volume])
    provider.prepare([volume], birth, 30.0)
    view[0:5] = b"later"
    provider.create([volume], birth, Hold())
    assert (anywhere.image(birth) / "data.mdb").read_bytes()[:5] == b"later"
    view.close()


def write_for_ever(act: str, data: Path) -> None:
    number = 0
    while True:
        number += 1
        match act:
            case "append":
                with open(data / "7", "ab") as file:
                    file.write(b"x")
            case "make":
                (data / f"new-{number % 50}").touch()
            case "remove":
                (data / f"{number % 300}").unlink(missing_ok=True)
                (data / f"{number % 300}").touch()
            case "touch":
                os.utime(data / "9")


@pytest.mark.parametrize("act", ["append", "make", "remove", "touch"])
def test_a_writer_that_nobody_paused_is_found_out(place: Place, act: str) -> None:
    for number in range(1000):
        (place.data / f"{number}").write_bytes(os.urandom(2_000))
    settle()
    child = os.fork()
    if child == 0:
        try:
            write_for_ever(act, place.data)
        finally:
            os._exit(1)
    try:
        for _ in range(20):  # on a busy machine the writer may not get to write within one short create
            provider, volume = place.provider(), place.volume()
            birth = make_birth([volume])
            provider.prepare([volume], birth, 30.0)
            try:
                provider.create([volume], birth, Hold())
            except PreconditionError as error:
                refused = error
                break
            provider.delete(birth.set_id)
        else:
            pytest.fail("never found out")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert "isn't paused" in refused.line() and str(place.data) in refused.line() and refused.cure
    assert not list(place.provider().snapshots()), "the image is void: nothing of it is listed"
    provider.delete(birth.set_id)
    assert not place.kept()


def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_held(place: Place) -> None:
    """A file that is rewritten all the time must be copied whole in the pause."""
    path = place.data / "large"
    path.write_bytes(os.urandom(48 << 20))
    over = threading.Event()

    def write() -> None:
        with open(path, "r+b") as file:
            while not over.is_set():
                os.pwrite(file.fileno(), b"x", 0)
                time.sleep(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    provider, volume = place.provider(), place.volume()
    birth = make_birth([volume])
    try:
        with pytest.raises(PreconditionError) as refused:
            provider.prepare([volume], birth, 0.005)
    finally:
        over.set()
        writer.join()
    assert "would have to be held" in refused.value.line() and refused.value.cure
    assert not place.kept()
    provider.delete(birth.set_id)


def test_the_deadline_ends_a_copy_within_a_file(place: Place) -> None:
    (place.data / "large").write_bytes(os.urandom(96 << 20))
    provider, volume = place.provider(), place.volume()
    birth = make_birth([volume])
    deadline = time.monotonic() + 0.02
    with pytest.raises(QuiesceError):
        provider.create([volume], birth, Hold(deadline=deadline))
    assert time.monotonic() - deadline < 5, "generous: one chunk's time is the bar"
    assert not list(place.provider().snapshots())
    provider.delete(birth.set_id)
    assert not place.kept()


def test_passes_and_pause_under_an_appender(place: Place, measured: Callable[[str], None]) -> None:
    """What the founder's bar asks for, in small: the pause is a small part of the take."""
    for number in range(12):
        (place.data / f"{number}.sst").write_bytes(os.urandom(16 << 20))
    over, pause, paused = threading.Event(), threading.Event(), threading.Event()

    def write() -> None:
        with open(place.data / "wal", "ab", buffering=0) as file:
            while not over.is_set():
                if pause.is_set():
                    paused.set()
                else:
                    file.write(os.urandom(50_000))
                time.sleep(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        provider, volume = place.provider(), place.volume()
        birth = make_birth([volume])
        began = time.monotonic()
        provider.prepare([volume], birth, 30.0)
        pause.set()
        assert paused.wait(10)
        at = (place.data / "wal").stat().st_size
        held = time.monotonic()
        provider.create([volume], birth, Hold(deadline=held + 30.0))
        held = time.monotonic() - held
        pause.clear()
        provider.mark(birth.set_id, SEAL)
        took = time.monotonic() - began
    finally:
        over.set()
        writer.join()
    assert (place.image(birth) / "wal").stat().st_size == at
    measured(f"200 MB on ext4 under 5 MB/s: held {held * 1e3:.0f} ms of {took * 1e3:.0f} ms")
    assert held < took
    assert {step.what for step in place.progress} == {"copying"} and place.progress[-1].done > 0


# -- rooms -----------------------------------------------------------------------------------------------------------


def test_check_counts_room_and_floor(place: Place) -> None:
    (place.data / "sparse").touch()
    os.truncate(place.data / "sparse", 4 << 40)
    volume = place.volume()
    place.provider().check([volume], make_birth([volume]))  # a hole needs nothing
    with pytest.raises(PreconditionError) as refused:
        place.provider(floor=0.999).check([volume], make_birth([volume]))
    assert "must stay so" in refused.value.line() and "free" in refused.value.line() and refused.value.cure
    assert not place.store.exists()


@pytest.mark.root
def test_a_full_store_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with place_on("ext4", tmp_path, 64) as small:
        data = tmp_path / "data"
        data.mkdir()
        small.data = data
        (data / "large").write_bytes(os.urandom(80 << 20))
        provider, volume = small.provider(), small.volume()
        birth = make_birth([volume])
        with pytest.raises(PreconditionError) as foreseen:
            provider.check([volume], birth)
        assert "needs 80.0 MiB" in foreseen.value.line()
        free = os.statvfs(small.top).f_bfree
        for step in (
            lambda: provider.prepare([volume], birth, 30.0),
            lambda: provider.create([volume], birth, Hold()),
        ):
            with pytest.raises(StorageError) as full:
                step()
            assert "full" in full.value.line() and str(small.store) in full.value.line() and full.value.cure
            assert not list(small.provider().snapshots())
            provider.delete(birth.set_id)
            assert not small.kept()
            os.sync()
            assert os.statvfs(small.top).f_bfree >= free - 1024
        floored = small.provider(floor=0.5)
        with pytest.raises(StorageError, match="50% of the store"):
            floored.prepare([volume], birth, 30.0)
        assert not small.kept()


@pytest.mark.root
def test_from_a_full_store_sets_of_two_members_are_deleted(tmp_path: Path) -> None:
    """Their seal can't be taken off there, as that wants a block: and only a deletion makes room."""
    with loop_file_system("ext4", tmp_path, 64, "") as disk:
        subprocess.run(["tune2fs", "-m", "0", mounts.mount_of(str(disk)).source], check=True, capture_output=True)
        data, more = tmp_path / "data", tmp_path / "more"
        for path in (data, more):
            path.mkdir()
            (path / "file").write_bytes(os.urandom(4 << 20))
        (data / "more").symlink_to(more)
        command = Command(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\nstore = "{disk}/store"\n')
        first, last = (command.json("take", "n")["set_id"] for _ in range(2))
        with open(disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(b"x" * (64 << 10))
        with open(disk / "filler", "ab", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"x")
        assert command.error("delete", last, "--yes", exit_code=2)["message"].startswith("is the newest")
        assert command.json("delete", first, "--yes")["deleted"][0]["set_id"] == first
        assert [entry["set_id"] for entry in command.json("list", "n")["sets"]] == [last]
        assert not list(disk.glob("store/sets/*/*.tmp")) and not os.listdir(disk / "store/trash")


@pytest.mark.root
def test_a_clone_that_does_not_fit(tmp_path: Path) -> None:
    with place_on("ext4", tmp_path, 64) as small:
        place = Place(tmp_path / "here")
        (place.data / "large").write_bytes(os.urandom(80 << 20))
        birth = place.take()
        attachment_id = new_attachment_id(utc_now())
        with pytest.raises(StorageError, match="the clone needs"):
            place.provider().attach(place.snapshot(birth), attachment_id, Access.WRITABLE, str(small.top / "clone"))
        place.provider().detach(attachment_id)
        assert not (small.top / "clone").exists() and place.kept() == {f"sets/{birth.set_id}"}


@pytest.mark.root
def test_sparse_data_needs_no_room_for_its_holes(tmp_path: Path) -> None:
    with place_on("ext4", tmp_path, 64) as place:
        with open(place.data / "data.mdb", "wb") as file:
            file.truncate(1 << 40)
            file.seek(1 << 39)
            file.write(os.urandom(5 << 20))
        birth = place.take()
        _, clone = place.clone(birth)
        assert os.lstat(clone / "data.mdb").st_size == 1 << 40 and allocated(clone / "data.mdb") < 6 << 20
        with open(place.data / "data.mdb", "rb") as origin, open(clone / "data.mdb", "rb") as copied:
            origin.seek(1 << 39)
            copied.seek(1 << 39)
            assert origin.read(5 << 20) == copied.read(5 << 20)


# -- without root ----------------------------------------------------------------------------------------------------

UNPRIVILEGED = """
import os, sys
from pathlib import Path
from tests.unit.copy_kit import Place, settle
from snapshotter.core.errors import PreconditionError
from snapshotter.core.model import Access, new_attachment_id, utc_now
from snapshotter.testing.harness import describe, fill_with_oddities

place = Place(Path(sys.argv[1]) / "mine")
fill_with_oddities(str(place.data))
closed = place.data / "closed"
(closed / "inner").mkdir(parents=True)
(closed / "inner/file").write_bytes(b"x")
os.chmod(closed / "inner/file", 0o400)
os.chmod(closed / "inner", 0o500)
os.chmod(closed, 0o555)
before = describe(str(place.data))
for _ in range(2):
    settle()
    birth = place.take()
    assert describe(str(place.image(birth))) == before
    attachment_id, clone = place.clone(birth)
    assert describe(str(clone)) == before
    place.provider().detach(attachment_id)
    assert not clone.exists()
try:
    place.provider().attach(place.snapshot(birth), attachment_id, Access.READ_ONLY, str(place.top / "ro"))
except PreconditionError as error:
    assert "root" in error.line() and "--to" in error.cure
else:
    raise AssertionError("a mount without root")
for each in list(place.provider().snapshots()):
    place.provider().delete(each.birth.set_id)
assert not place.kept()
foreign = Place(Path(sys.argv[1]) / "theirs")
os.chmod(foreign.data / "sub", 0o700) if os.access(foreign.data / "sub", os.W_OK) else None
birth = foreign.take()
image = foreign.image(birth)
assert (image / "roots").stat().st_uid == os.geteuid() and (image / "roots").read_bytes() == b"root's, for all to read"
assert (image / "suid").stat().st_mode & 0o7777 == 0o755, "set-id of another owner is another thing"
"""


@pytest.mark.root
def test_an_ordinary_user(reachable: Path) -> None:
    tmp_path = reachable
    program, python_path = interpreter(65534)
    for each in ("mine", "theirs"):
        (tmp_path / each).mkdir()
        os.chown(tmp_path / each, 65534, 65534)
    (tmp_path / "theirs/data/sub").mkdir(parents=True)
    (tmp_path / "theirs/data/roots").write_bytes(b"root's, for all to read")
    (tmp_path / "theirs/data/suid").write_bytes(b"#!")
    os.chmod(tmp_path / "theirs/data/suid", 0o4755)
    done = subprocess.run(
        [
            *as_user(65534),
            sys.executable,
            "-c",
            UNPRIVILEGED,
            str(tmp_path),
        ],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": python_path, "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # What it may not read is refused before anything is made, with the count and the first.
    secret = tmp_path / "theirs/data/secret"
    secret.write_bytes(b"root's")
    os.chmod(secret, 0o600)
    script = (
        "import sys; from pathlib import Path; from tests.unit.copy_kit import Place\n"
        "from snapshotter.testing.harness import make_birth\n"
        "p = Place(Path(sys.argv[1]) / 'theirs'); v = p.volume(); p.provider().check([v], make_birth([v]))"
    )
    done = subprocess.run(
        [*as_user(65534), program, "-c", script, str(tmp_path)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": python_path, "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "1 of its files or directories can't be read, the first is 'secret'" in done.stderr


# -- two at once -----------------------------------------------------------------------------------------------------


def test_a_set_that_another_process_makes_is_busy(place: Place) -> None:
    (place.data / "large").write_bytes(os.urandom(1 << 20))
    volume = place.volume()
    birth = make_birth([volume])
    made, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            provider = place.provider()
            provider.prepare([volume], birth, 30.0)
            os.write(made[1], b"x")
            os.read(go[0], 1)
            provider.create([volume], birth, Hold())
            os._exit(0)
        finally:
            os._exit(1)
    try:
        assert os.read(made[0], 1) == b"x"
        with pytest.raises(BusyError):
            place.provider().delete(birth.set_id)
        assert place.provider().reap() == []
        other = place.take()  # another set of the same volume, meanwhile
        assert [each.state for each in place.provider().snapshots(birth.set_id)] == [ImageState.INVALID]
    finally:
        os.write(go[1], b"x")
        _, status = os.waitpid(child, 0)
        for fd in (*made, *go):
            os.close(fd)
    assert status == 0
    assert {each.state for each in place.provider().snapshots()} == {ImageState.READY}
    assert place.snapshot(birth).order != place.snapshot(other).order
    place.provider().delete(birth.set_id)
