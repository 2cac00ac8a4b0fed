"""The watchdog of a quiesce: lets everything go when the budget ends, when its parent dies, on any signal. And the one
inverse of a quiesce, `undo_record`, which the parent's end and `reap` use as well.

Run as a program of its own (`python -I -S watchdog.py RECORD PARENT CGROUP_PROCS [FD ...]`), so it must know nothing
else of snapshotter, and imports little.

The record is a file of lines of blank-separated words (`line`, `words`). The first names the owner; every other is the
inverse of an act and is there before the act: `cont PID STARTTIME`, `wake PID STARTTIME` (su, sudo or the like, which
runs one: see `wake`), `also PID STARTTIME` (one of sudo's process group), `unfreeze CGROUP`, `thaw MOUNT_POINT ST_DEV`,
`run ARGV...`, `try ARGV...` (which may fail). `not` cancels the line before it (the act was refused), `fired REASON` is
the watchdog's. All inverses treat "already done" as done: undoing twice, or by two at once, is fine. While the watchdog
lives it holds a flock on it.
"""

import _thread
import fcntl
import os
import select
import signal
import sys
import time

FITHAW = 0xC0045878  # linux/fs.h: _IOWR('X', 120, int)
_THAW_PATIENCE_S = 10.0
_WAKE_S = 1.0  # for `wake`, where somebody never sleeps
_WAKE_TICK_S = 0.005
_WAKE_TICKS = 10  # that all must be asleep in a row
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: A fault inside the interpreter would come again and again if it were caught. The others have no use as an alarm.
_UNCAUGHT = {"SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGCHLD"}


def line(*parts: str) -> bytes:
    """A record's line: words are percent-encoded where they hold blanks, controls, `;`, non-ASCII; an empty one is `%`.
    It begins with the line break and ends with a mark: so what a full disk cut short is known, and spoils no other."""
    return (
        b"\n"
        + b" ".join(
            b"".join(bytes([c]) if 0x21 <= c <= 0x7E and c not in b"%;" else b"%%%02x" % c for c in os.fsencode(part))
            or b"%"
            for part in parts
        )
        + b" ;"
    )


def words(text: bytes) -> list[str]:
    """Inverse of `line`."""
    found = []
    for word in text.split():
        plain, *coded = word.split(b"%") if word != b"%" else [b""]
        found.append(os.fsdecode(plain + b"".join(bytes([int(part[:2], 16)]) + part[2:] for part in coded)))
    return found


def read_record(path: str) -> list[list[str]]:
    """The record's lines; [] if there is none. A last line that was only partly written is left out: its act comes
    after it. Raises OSError."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return []
    return [words(text[:-2]) for text in content.split(b"\n") if text.endswith(b" ;")]


def _seen(pid: int) -> tuple[bytes, int | None, bool]:
    """State (its letter) and start time (clock ticks after boot) of that process; None if there is none, or only its
    zombie. And whether it is in the background of a terminal."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return b"", None, False
    begun = None if fields[0] in (b"Z", b"X") and int(fields[17]) <= 1 else int(fields[19])
    return fields[0], begun, fields[4] != b"0" and fields[2] != fields[5]


def resume(pid: int, begun: int) -> None:
    """Let that very process go on; gone is fine."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Looked at after the pidfd: from here on it can't become another process.
        if _seen(pid)[1] == begun:
            signal.pidfd_send_signal(fd, signal.SIGCONT)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


def _unfreeze(cgroup: str) -> None:
    try:
        fd = os.open(os.path.join(cgroup, "cgroup.freeze"), os.O_WRONLY)
    except FileNotFoundError:
        return
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)


def _thaw(mount_point: str, device: int, fds: dict[int, int]) -> None:
    """By a descriptor that was opened before the freeze, if there is one: the mount may be gone or covered."""
    fd = fds.get(device, -1)
    opened = fd < 0
    if opened:
        try:
            fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
    try:
        if os.fstat(fd).st_dev == device:
            fcntl.ioctl(fd, FITHAW, 0)
    except OSError as error:
        if error.errno != 22:  # EINVAL: not frozen
            raise
    finally:
        if opened:
            os.close(fd)


def _run(argv: list[str]) -> None:
    """To its end, however long it takes: it changes something."""
    path = os.environ.get("PATH", "")
    pid = os.posix_spawnp(
        argv[0],
        argv,
        {**os.environ, "PATH": f"{path}:{_PATH}" if path else _PATH, "LC_ALL": "C.UTF-8"},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
        ],
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE],
    )
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 0:
        raise OSError(0, f"exit status {code}")


def _undo(act: list[str], fds: dict[int, int]) -> None:
    if act[0] == "cont":
        resume(int(act[1]), int(act[2]))
    elif act[0] == "unfreeze":
        _unfreeze(act[1])
    elif act[0] == "thaw":
        _thaw(act[1], int(act[2]), fds)
    elif act[0] == "run":
        _run(act[1:])
    elif act[0] == "try":
        try:
            _run(act[1:])
        except OSError:
            pass


def _wake(pid: int, begun: int) -> None:
    try:
        resume(pid, begun)
    except PermissionError:
        pass  # most aren't stopped at all


def _acts(path: str) -> list[list[str]]:
    """Of the record: the inverses that are to be done. Raises OSError."""
    acts: list[list[str]] = []
    for act in read_record(path):
        if act and act[0] == "not":
            del acts[-1:]
        elif act and act[0] in ("cont", "wake", "also", "unfreeze", "thaw", "run", "try"):
            acts.append(act)
    return acts


def undo_record(path: str, fds: tuple[int, ...] = ()) -> list[str]:
    """Undo what the record names, newest first; return what could not be undone, [] if nothing is held any more.

    `fds`: directories that were opened on the file systems before they were frozen. Never signals a process that only
    has the pid of the recorded one. The record stays; it is removed by whoever knows that no act can follow.
    """
    try:
        acts = [act for act in _acts(path) if act[0] not in ("wake", "also")]
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    failures: list[str] = []
    threads: list[tuple[str, list[str]]] = []
    by_device = {os.fstat(fd).st_dev: fd for fd in fds}

    def attempt(act: list[str], said: list[str]) -> None:
        try:
            _undo(act, by_device)
            said.append("")
        except (OSError, ValueError, LookupError, MemoryError) as error:  # what a signal handler raises goes on
            said.append(f"{' '.join(act)}: {getattr(error, 'strerror', None) or error!r}")

    for act in reversed(acts):
        said: list[str] = []
        if act[0] == "thaw":
            # Each in a thread: a file system whose disk hangs must not keep the others frozen.
            try:
                _thread.start_new_thread(attempt, (act, said))
            except RuntimeError:  # no memory for one
                attempt(act, said)
        else:
            attempt(act, said)
        threads.append((" ".join(act), said))
    patience = time.monotonic() + _THAW_PATIENCE_S
    for what, said in threads:
        while not said and time.monotonic() < patience:
            time.sleep(0.002)
        failure = said[0] if said else f"{what}: does not end"
        if failure:
            failures.append(failure)
    return failures


def wake(path: str) -> list[str]:
    """After `undo_record`: see to it that nobody has stopped because of those that we stopped; return who has.

    su, runuser, script and sudo run a program as a shell runs a job: where that is stopped they stop themselves, sudo
    its whole process group, and then whoever runs them so. That can be late: one may have been told before its child
    went on, and act on it afterwards. So all are told to go on until each of them has been seen asleep for a while
    (the kernel wakes a parent in the same instant in which its child stops), or is busy all the time. One that its
    terminal keeps stopped, as the shell has taken that back, is as after a Ctrl-Z: no failure.
    """
    try:
        acts = _acts(path)
    except OSError:
        return []  # `undo_record` has said it
    ours = {(int(act[1]), int(act[2])) for act in acts if act[0] in ("cont", "also")}
    told = {(int(act[1]), int(act[2])) for act in acts if act[0] == "wake" and int(act[1]) != os.getpid()}
    until = time.monotonic() + _WAKE_S
    quiet = 0
    while told and quiet < _WAKE_TICKS:
        seen = {(pid, begun): _seen(pid) for pid, begun in ours | told}
        halted = [who for who in seen if seen[who][:2] == (b"T", who[1])]
        for who in halted:
            _wake(*who)
        if time.monotonic() > until:
            return [f"process {who[0]}: can't be made to go on" for who in halted if not seen[who][2]]
        busy = any(seen[who][0] in (b"R", b"D") for who in told - ours)
        quiet = 0 if halted or busy else quiet + 1
        time.sleep(_WAKE_TICK_S)
    return []


def _protect(cgroup_procs: str) -> None:
    """Best effort to survive what befalls the parent's unit. The topmost cgroup can be neither frozen nor killed, and
    to move there leaves no empty one behind."""
    try:
        with open(cgroup_procs, "w") as file:
            file.write("0")
    except OSError:
        pass
    for score in (-1000, -500, -100, 0):
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(str(score))
            break
        except OSError:
            continue
    try:
        import ctypes

        # MCL_CURRENT; for root, whom no limit binds, MCL_FUTURE too. Not inherited: each process does it for itself.
        ctypes.CDLL(None).mlockall(1 | 2 if os.geteuid() == 0 else 1)
    except (ImportError, OSError, AttributeError):
        pass


def _guard(parent: int) -> str:
    """Wait. '' if the parent says that it is done, else why everything must be let go now."""
    wake, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    for number in signal.valid_signals():
        name = number.name if isinstance(number, signal.Signals) else ""
        if name not in _UNCAUGHT:
            try:
                signal.signal(number, lambda number, frame: None)
            except (OSError, ValueError):
                continue  # the C library's own
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(0, select.POLLIN)
    try:
        poll.register(os.pidfd_open(parent), select.POLLIN)
    except ProcessLookupError:
        return "parent died"
    if os.getppid() != parent:
        return "parent died"
    os.write(1, b"ready\n")
    deadline = None
    heard = b""
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return "budget ended"
        ready = {fd for fd, _ in poll.poll(None if left is None else left * 1000 + 1)}
        if wake in ready:
            return f"signal {os.read(wake, 1)[0]}"
        if 0 in ready:
            said = os.read(0, 4096)
            heard += said
            *orders, heard = heard.split(b"\n")
            for order in orders:
                if order == b"done":
                    return ""
                deadline = float(order.removeprefix(b"arm "))
            if not said:
                return "parent died"
        elif ready:
            return "parent died"


def main(arguments: list[str]) -> int:
    """Exit status 0 if the parent ended it, 3 if the watchdog fired, 4 if it fired and something is still held."""
    record, parent, cgroup_procs, *inherited = arguments
    fds = tuple(int(fd) for fd in inherited)
    lock = os.open(record, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    _protect(cgroup_procs)
    reason = _guard(int(parent))
    if not reason:
        return 0
    try:
        os.write(lock, line("fired", reason))
    except OSError:
        pass  # the exit status says it too
    if undo_record(record, fds) + wake(record):
        return 4
    if reason == "parent died":
        try:
            os.unlink(record)  # no act can follow any more
        except FileNotFoundError:
            pass
    return 3


if __name__ == "__main__":
    status = main(sys.argv[1:])
    os._exit(status)  # a thaw that hangs must not keep us
