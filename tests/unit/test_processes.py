"""Finding writers among real processes: by descriptor, by map, from other mounts and namespaces, and by permission
alone where we may not look."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.host import processes

NOBODY = 65534
OTHER = 65533
PATIENCE_S = 30.0
WAIT = "\nimport time\nprint('ready', flush=True)\nwhile True: time.sleep(60)"


class Children:
    def __init__(self) -> None:
        self.all: list[subprocess.Popen[bytes]] = []

    def start(self, *argv: str) -> int:
        """Run a program that says `ready`, and return its pid."""
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)
        self.all.append(child)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        return child.pid

    def python(self, code: str, *words: object) -> int:
        return self.start(sys.executable, "-I", "-S", "-c", code + WAIT, *map(str, words))


@pytest.fixture
def children() -> Iterator[Children]:
    made = Children()
    yield made
    for child in made.all:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    (path / "file").write_bytes(b"x" * 4096)
    return path


def writers(path: Path) -> list[int]:
    return [found.pid for found in processes.scan([str(path)]).writers]


@pytest.mark.parametrize("flags", ["O_WRONLY", "O_RDWR", "O_WRONLY|os.O_APPEND|os.O_CLOEXEC"])
def test_an_open_file_makes_a_writer(data: Path, children: Children, flags: str) -> None:
    pid = children.python(f"import os, sys; os.open(sys.argv[1], os.{flags})", data / "file")
    (found,) = processes.scan([str(data)]).writers
    assert (found.pid, found.reason, found.uid) == (pid, str(data / "file"), os.geteuid())
    assert found.identity == processes.identity(pid)


@pytest.mark.parametrize(
    "code",
    [
        "import os, sys; os.open(sys.argv[1], os.O_RDONLY)",
        "import os, sys; os.open(sys.argv[1], os.O_PATH)",
        "import os, sys; os.chdir(os.path.dirname(sys.argv[1]))",
        "import mmap, os, sys; m = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=mmap.PROT_READ)",
        "import mmap, os, sys; m = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, mmap.MAP_PRIVATE)",
        "import os, sys; os.open(os.path.dirname(sys.argv[1]) + '-beside', os.O_WRONLY | os.O_CREAT)",
    ],
    ids=["read", "O_PATH", "cwd", "shared map to read", "private map", "beside with the same beginning"],
)
def test_these_do_not_write_there(data: Path, children: Children, code: str) -> None:
    children.python(code, data / "file")
    assert writers(data) == []


def test_a_shared_map_alone_makes_a_writer(data: Path, children: Children) -> None:
    code = "import mmap, os, sys; f = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(f, 0); os.close(f)"
    # Python's mmap keeps a descriptor of its own; those are closed as well.
    code += (
        "\nfor n in os.listdir('/proc/self/fd'):\n  if int(n) > 2:\n    try: os.close(int(n))\n    except OSError: pass"
    )
    pid = children.python(code, data / "file")
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    assert str(data / "file") not in links
    found = processes.scan([str(data)])
    assert [writer.pid for writer in found.writers] == [pid]
    real = os.stat(data / "file")
    assert found.mapped == {(real.st_dev, real.st_ino)}


def test_one_that_closes_its_file_once_it_has_another_is_never_missed(
    data: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It always has one open for writing, but no longer the one that was listed."""
    code = """
import os, signal, sys
held = os.open(sys.argv[1], os.O_WRONLY)
def change(*_):
    global held
    new = os.open(sys.argv[1], os.O_WRONLY); os.close(held); held = new
    print("changed", flush=True)
signal.signal(signal.SIGUSR1, change)"""
    pid = children.python(code, data / "file")
    listed = os.scandir

    @contextlib.contextmanager
    def scandir(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with listed(path) as entries:
            found = list(entries)
        if path == f"/proc/{pid}/fd":
            monkeypatch.setattr(os, "scandir", listed)
            os.kill(pid, signal.SIGUSR1)
            said = children.all[0].stdout
            assert said is not None and said.readline() == b"changed\n"
        yield iter(found)

    monkeypatch.setattr(os, "scandir", scandir)
    assert writers(data) == [pid]
    assert os.scandir is listed


@pytest.mark.parametrize("name", ["plain", "with blank", "line\nbreak", "ünï", "x" * 255, "ends (deleted)", "a\\b"])
def test_odd_names(data: Path, children: Children, name: str) -> None:
    code = "import mmap, os, sys; f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); os.truncate(f, 4096); "
    pid = children.python(code + "m = mmap.mmap(f, 0)", data / name)
    found = processes.scan([str(data)])
    assert [writer.pid for writer in found.writers] == [pid]
    real = os.stat(data / name)
    assert found.mapped == {(real.st_dev, real.st_ino)}


def test_a_deleted_file_counts(data: Path, children: Children) -> None:
    pid = children.python("import os, sys; os.open(sys.argv[1], os.O_WRONLY); os.unlink(sys.argv[1])", data / "file")
    assert writers(data) == [pid]


def test_a_file_open_while_its_directory_was_renamed_counts(data: Path, children: Children) -> None:
    (data / "old").mkdir()
    pid = children.python("import os, sys; os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)", data / "old" / "f")
    (data / "old").rename(data / "new")
    assert writers(data / "new") == [pid]


def test_a_name_that_looks_like_the_end_of_it(data: Path, children: Children) -> None:
    code = "import ctypes, os, sys; ctypes.CDLL(None).prctl(15, b') Z 1 (x) 9'); os.open(sys.argv[1], os.O_WRONLY)"
    pid = children.python(code, data / "file")
    (found,) = processes.scan([str(data)]).writers
    assert found.pid == pid and found.name == ") Z 1 (x) 9" and found.state in "RS"


def test_a_process_whose_first_thread_has_ended(data: Path, children: Children) -> None:
    """/proc/pid/fd of such a process is empty, and its state is Z."""
    code = """
import ctypes, os, sys, threading, time
os.open(sys.argv[1], os.O_WRONLY)
def stay():
    time.sleep(0.3); print("ready", flush=True); time.sleep(600)
threading.Thread(target=stay).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    pid = children.start(sys.executable, "-I", "-S", "-c", code, str(data / "file"))
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    assert writers(data) == [pid]
    found = processes.identity(pid)
    assert found is not None and processes.stopped(*found) is False


def test_settled_ones_are_not_looked_at_again(data: Path, children: Children) -> None:
    children.python("import os, sys; os.open(sys.argv[1], os.O_WRONLY)", data / "file")
    scanner = processes.Scanner([str(data)])
    (found,) = scanner.scan().writers
    assert scanner.scan(settled={found.identity}).writers == ()
    (again,) = scanner.scan(settled={(found.pid, found.starttime + 1)}).writers
    assert again.identity == found.identity


def test_stopped_means_all_threads_of_that_very_process(children: Children) -> None:
    pid = children.python(
        "import threading, time\nfor _ in range(5): threading.Thread(target=time.sleep, args=(600,)).start()"
    )
    found = processes.identity(pid)
    assert found is not None
    assert processes.stopped(*found) is False
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + PATIENCE_S
    while not processes.stopped(*found):
        assert time.monotonic() < end
    assert processes.stopped(pid, found[1] + 1) is None
    os.kill(pid, signal.SIGKILL)
    while processes.stopped(*found) is not None:
        assert time.monotonic() < end
    assert not processes.alive(found) and processes.identity(pid) is None


def test_ancestors() -> None:
    found = processes.ancestors(os.getpid())
    assert found[0] == os.getppid()
    assert os.getpid() not in found


@pytest.mark.parametrize(
    "code",
    [
        "import os, sys; os.open(sys.argv[1], os.O_RDONLY)",
        "import os, sys; os.chdir(os.path.dirname(sys.argv[1]))",
        "import mmap, os, sys; f = os.open(sys.argv[1], os.O_RDONLY); m = mmap.mmap(f, 0, mmap.MAP_PRIVATE)",
        "import os, sys; os.open(os.path.dirname(sys.argv[1]), os.O_RDONLY)",
    ],
)
def test_users_of_a_path(data: Path, children: Children, code: str) -> None:
    pid = children.python(code, data / "file")
    assert [user.pid for user in processes.users_of(str(data))] == [pid]


def test_users_leaves_ourselves_out(data: Path) -> None:
    with open(data / "file"):
        assert processes.users_of(str(data)) == []


def test_a_program_run_from_there_uses_it(data: Path, children: Children) -> None:
    program = data / "program"
    program.write_bytes(Path("/bin/sh").read_bytes())
    program.chmod(0o755)
    pid = children.start(str(program), "-c", "cd /; echo ready; while :; do sleep 60; done")
    assert pid in [user.pid for user in processes.users_of(str(data))]


# What follows needs other users, mounts and namespaces.


def shell_in_namespace(children: Children, script: str, *words: object) -> int:
    return children.start(
        "unshare", "-m", "sh", "-c", script + "; echo ready; while :; do sleep 60; done", "sh", *map(str, words)
    )


@pytest.mark.root
def test_another_mount_namespace_by_another_path(data: Path, children: Children, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pid = shell_in_namespace(children, 'mount --bind "$1" "$2" && exec 3>>"$2/file"', data, elsewhere)
    assert pid in writers(data)
    assert pid not in writers(elsewhere)
    assert pid in [user.pid for user in processes.users_of(str(data))]


@pytest.mark.root
def test_a_map_in_another_mount_namespace(data: Path, children: Children, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import mmap, os, sys; f = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(f, 0); os.closerange(3, 50)" + WAIT
    argv = ["unshare", "-m", "sh", "-c", 'mount --bind "$1" "$2" && exec "$3" -I -S -c "$4" "$2/file"', "sh"]
    pid = children.start(*argv, str(data), str(elsewhere), sys.executable, code)
    found = processes.scan([str(data)])
    assert pid in [writer.pid for writer in found.writers]
    real = os.stat(data / "file")
    assert found.mapped == {(real.st_dev, real.st_ino)}


@pytest.mark.root
def test_the_same_path_in_another_namespace_is_not_ours(data: Path, children: Children) -> None:
    pid = shell_in_namespace(children, 'mount -t tmpfs none "$1" && exec 3>>"$1/file"', data)
    assert pid not in writers(data)
    assert pid not in [user.pid for user in processes.users_of(str(data))]


@pytest.mark.root
def test_another_bind_mount_and_one_unmounted_lazily(data: Path, children: Children, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["mount", "--bind", str(data), str(elsewhere)], check=True)
    try:
        pid = children.python("import os, sys; os.open(sys.argv[1], os.O_WRONLY)", elsewhere / "file")
        assert writers(data) == [pid]
    finally:
        subprocess.run(["umount", "-l", str(elsewhere)], check=True)
    assert writers(data) == [pid]


@pytest.mark.root
@pytest.mark.parametrize("unshare", [(), ("unshare", "--mount")], ids=["here", "in a namespace of its own"])
def test_a_chroot(data: Path, children: Children, unshare: tuple[str, ...]) -> None:
    code = "import os, sys; os.chroot(os.path.dirname(sys.argv[1])); os.open('/file', os.O_WRONLY)"
    pid = children.start(*unshare, sys.executable, "-I", "-S", "-c", code + WAIT, str(data / "file"))
    assert writers(data) == [pid]


@pytest.mark.root
@pytest.mark.parametrize("unshare", [(), ("unshare", "--mount")], ids=["here", "in a namespace of its own"])
def test_a_chroot_elsewhere_on_the_same_disk_is_a_stranger(
    tmp_path: Path, data: Path, children: Children, unshare: tuple[str, ...]
) -> None:
    """Its program, its working directory, its root and its files are below its chroot, not below ours. As was met in
    life: a take paused a compiler that ran in a chroot."""
    chroot = tmp_path / "chroot"
    (chroot / "work").mkdir(parents=True)
    (chroot / "work" / "file").write_bytes(b"x" * 4096)
    code = (
        "import mmap, os, sys; os.chroot(sys.argv[1]); os.chdir('/work'); f = os.open('file', os.O_RDWR);"
        "m = mmap.mmap(f, 0)"
    )
    pid = children.start(*unshare, sys.executable, "-I", "-S", "-c", code + WAIT, str(chroot))
    assert writers(data) == [] and pid not in [user.pid for user in processes.users_of(str(data))]
    assert writers(chroot) == [pid] and pid in [user.pid for user in processes.users_of(str(chroot))]
    # A mount that was not there at the first look makes the scanner read mount tables again: still a stranger.
    scanner = processes.Scanner([str(data)])
    late = tmp_path / f"late{len(unshare)}"
    late.mkdir()
    subprocess.run(["mount", "--bind", str(chroot), str(late)], check=True)
    try:
        code = "import os, sys; os.chroot(sys.argv[1]); os.chdir('/work'); os.open('file', os.O_RDWR)"
        other = children.python(code, late)
        assert {pid, other}.isdisjoint(writer.pid for writer in scanner.scan().writers)
        assert {pid, other}.isdisjoint(user.pid for user in scanner.users())
    finally:
        os.kill(children.all[-1].pid, signal.SIGKILL)
        children.all[-1].wait()
        subprocess.run(["umount", str(late)], check=True)


def test_a_path_too_long_to_be_told(data: Path, children: Children) -> None:
    code = (
        "import os, sys; os.chdir(os.path.dirname(sys.argv[1]))\n"
        "for _ in range(30):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)\n"
        "os.open('file', os.O_WRONLY | os.O_CREAT)"
    )
    pid = children.python(code, data / "file")
    (writer,) = processes.Scanner([str(data)]).scan(only=[pid]).writers
    assert writer.pid == pid and pid in [user.pid for user in processes.users_of(str(data))]


@pytest.mark.root
def test_a_nested_mount_belongs_to_it(data: Path, children: Children) -> None:
    nested = data / "wal"
    nested.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(nested)], check=True)
    try:
        pid = children.python("import os, sys; os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)", nested / "log")
        assert writers(data) == [pid]
    finally:
        os.kill(pid, signal.SIGKILL)
        children.all[-1].wait()
        subprocess.run(["umount", str(nested)], check=True)


@pytest.mark.root
def test_btrfs_maps_are_told_as_stat_tells_them(tmp_path: Path, children: Children) -> None:
    """The device in /proc/pid/maps is the file system's, stat's is the subvolume's."""
    image, point = tmp_path / "image", tmp_path / "mnt"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(128 << 20)
    if subprocess.run(["mkfs.btrfs", "-q", str(image)], check=False, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("no mkfs.btrfs")
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    try:
        sub = point / "sub"
        subprocess.run(["btrfs", "-q", "subvolume", "create", str(sub)], check=True)
        (sub / "file").write_bytes(b"x" * 4096)
        code = "import mmap, os, sys; f = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(f, 0); os.closerange(3, 50)"
        pid = children.python(code, sub / "file")
        found = processes.scan([str(sub)])
        assert [writer.pid for writer in found.writers] == [pid]
        real = os.stat(sub / "file")
        assert found.mapped == {(real.st_dev, real.st_ino)}
        os.kill(pid, signal.SIGKILL)
        children.all[-1].wait()
    finally:
        subprocess.run(["umount", str(point)], check=True)


def as_nobody(data: Path, look: Callable[[processes.Scan], bool], hidepid: str = "") -> None:
    """`look` at a scan that an unprivileged user makes, where /proc may hide other users' processes."""
    pid = os.fork()
    if pid == 0:
        try:
            if hidepid:
                assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS
                subprocess.run(["mount", "--make-rprivate", "/"], check=True)
                subprocess.run(["mount", "-t", "proc", "-o", f"hidepid={hidepid}", "proc", "/proc"], check=True)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os._exit(0 if look(processes.scan([str(data)])) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def pids(found: tuple[processes.Process, ...]) -> list[int]:
    return [process.pid for process in found]


@pytest.fixture
def theirs(data: Path) -> Path:
    """Nobody's directory and file, in nobody's reach."""
    for directory in [data.parent, *data.parent.parents][:3]:
        directory.chmod(0o755)
    for path in (data, data / "file"):
        os.chown(path, NOBODY, NOBODY)
    return data


def of_user(children: Children, uid: int, code: str, *words: object) -> int:
    """A process of that user that can't be looked into by another. It becomes that after it has done its work."""
    code += f"\nos.setgroups([]); os.setgid({uid}); os.setuid({uid})"
    return children.python("import os, sys\n" + code, *words)


@pytest.mark.root
def test_without_permission_assumed_and_named(theirs: Path, children: Children) -> None:
    those = {of_user(children, OTHER, ""), os.getpid()}
    as_nobody(theirs, lambda found: not found.refused and those <= set(pids(found.assumed)) and not found.writers)


@pytest.mark.root
def test_our_own_writer_is_found_without_root(theirs: Path, children: Children) -> None:
    code = f"import os, sys; os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    exec_again = (
        "os.execv('/bin/sh', ['sh', '-c', 'exec 3>>\"$0\"; echo ready; while :; do sleep 60; done', sys.argv[1]])"
    )
    pid = children.start(sys.executable, "-I", "-S", "-c", code + exec_again, str(theirs / "file"))
    as_nobody(theirs, lambda found: pid in pids(found.writers) and not found.refused)


@pytest.mark.root
@pytest.mark.parametrize("grant", ["mode", "group", "acl", "owner"])
def test_one_that_is_permitted_and_has_a_file_open_is_refused(theirs: Path, children: Children, grant: str) -> None:
    pid = of_user(children, OTHER, "fd = os.open(sys.argv[1], os.O_WRONLY)", theirs / "file")
    as_nobody(theirs, lambda found: not found.refused and pid in pids(found.assumed))
    if grant == "mode":
        (theirs / "file").chmod(0o666)
    elif grant == "group":
        os.chown(theirs / "file", NOBODY, OTHER)
        (theirs / "file").chmod(0o660)
    elif grant == "acl":
        entries = [(1, 6, 2**32 - 1), (2, 6, OTHER), (4, 4, 2**32 - 1), (16, 6, 2**32 - 1), (32, 4, 2**32 - 1)]
        acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
        os.setxattr(theirs / "file", "system.posix_acl_access", acl)
    else:
        (theirs / "other").touch()
        os.chown(theirs / "other", OTHER, OTHER)
    as_nobody(theirs, lambda found: pid in pids(found.refused))


@pytest.mark.root
@pytest.mark.parametrize("how", ["noaccess", "invisible", "ptraceable"])
def test_a_proc_that_hides_processes_hides_no_writer(theirs: Path, children: Children, how: str) -> None:
    def could(found: processes.Scan) -> bool:
        return pids(found.refused) == [0] and "hidepid" in str(found.refused[0])

    pid = of_user(children, OTHER, "fd = os.open(sys.argv[1], os.O_WRONLY)", theirs / "file")
    as_nobody(theirs, lambda found: pids(found.assumed) == [0] and not found.refused, how)  # by mode nobody else may
    (theirs / "file").chmod(0o666)
    as_nobody(theirs, could, how)
    (theirs / "file").chmod(0o644)
    (theirs / "other").touch()  # root's: that is as before
    as_nobody(theirs, lambda found: not found.refused, how)
    os.chown(theirs / "other", OTHER, OTHER)
    as_nobody(theirs, could, how)
    os.kill(pid, signal.SIGKILL)
    children.all[-1].wait()
    os.chown(theirs / "other", NOBODY, NOBODY)
    (theirs / "file").chmod(0o666)
    as_nobody(theirs, lambda found: pids(found.assumed) == [0] and not found.refused, how)  # nobody has it open


@pytest.mark.root
def test_a_closed_directory_above_protects_what_is_open_to_all(theirs: Path, children: Children) -> None:
    pid = of_user(children, OTHER, "fd = os.open(sys.argv[1], os.O_WRONLY)", theirs / "file")
    (theirs / "file").chmod(0o666)
    theirs.chmod(0o700)
    as_nobody(theirs, lambda found: not found.refused and pid in pids(found.assumed))


@pytest.mark.root
def test_one_that_is_permitted_but_has_nothing_open_is_assumed(theirs: Path, children: Children) -> None:
    """sshd and systemd keep such processes in every session: the user's own, and unreadable. A lease tells."""
    pid = of_user(children, NOBODY, "")
    assert os.stat(f"/proc/{pid}/fd").st_uid == 0  # not dumpable: nobody but root may look
    as_nobody(theirs, lambda found: not found.refused and pid in pids(found.assumed))


@pytest.mark.root
def test_a_lease_harms_no_writer_and_not_ourselves(theirs: Path, children: Children) -> None:
    """The lease is broken while it is held, again and again: nobody is killed by the signal for that."""
    of_user(children, NOBODY, "")
    code = "n = 0\nprint('ready', flush=True)\nwhile True: os.close(os.open(sys.argv[1], os.O_WRONLY))"
    busy = children.python("import os, sys\n" + code, theirs / "file")
    for _ in range(10):
        as_nobody(theirs, lambda found: True)
    assert Path(f"/proc/{busy}/stat").read_text().rpartition(")")[2].split()[0] in "RSD"


def test_kernel_threads_never_count(data: Path) -> None:
    found = processes.scan([str(data)])
    everyone = [*found.writers, *found.refused, *found.assumed]
    assert not [one for one in everyone if one.name.startswith("kworker") or one.name == "kthreadd"]


def test_a_path_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        processes.scan([str(tmp_path / "gone")])
