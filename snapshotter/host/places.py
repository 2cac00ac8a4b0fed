"""Where snapshotter keeps its own few files on this host, and who this host is. No truth lives there but the
records of a running quiesce: the catalog is in the labels on the storage.

Root: /run/snapshotter and /var/lib/snapshotter. Others: a private directory in /tmp, and XDG_STATE_HOME.
`SNAPSHOTTER_RUN` replaces the run-time place: containers without /run.
"""

from __future__ import annotations

import functools
import os
import stat

from snapshotter.core.digest import sha256
from snapshotter.core.errors import PreconditionError


def private_directory(path: str, cure: str = "") -> str:
    """`path`, made with mode 0700 if it isn't there. Raises PreconditionError if it is another user's, or a link:
    somebody may have laid it there for us to write through. `cure`: what helps if it can't be had."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        found = os.lstat(path)
    except OSError as error:
        raise PreconditionError(
            f"can't make it: {error.strerror}", object=path, cure=cure or f"make {os.path.dirname(path)} writable"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PreconditionError("is not a directory of ours", object=path, cure=cure or "remove it")
    if found.st_mode & 0o077:
        os.chmod(path, 0o700)
    return path


def replace_file(path: str, content: bytes, mode: int) -> None:
    """`path` holds `content` from one instant to the next, with this mode whatever the umask, and keeps it over a
    power cut. A link there is replaced, never written through. Raises PreconditionError."""
    temporary = f"{path}.{os.urandom(4).hex()}.new"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fchmod(fd, mode)
                os.fsync(fd)
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        above = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(above)
        finally:
            os.close(above)
    except OSError as error:
        raise PreconditionError(f"can't write it: {error.strerror}", object=path) from None


def run_directory() -> str:
    """For the records of a running quiesce: void after a reboot, as is every pause and freeze. One place per user,
    whatever the environment: what cron's run left held, a login shell's `reap` must find."""
    usual = "/run/snapshotter" if os.geteuid() == 0 else f"/tmp/snapshotter-{os.geteuid()}"  # noqa: S108 checked to be ours
    given = os.environ.get("SNAPSHOTTER_RUN")
    cure = "set SNAPSHOTTER_RUN, for every run, to one directory that we can make or own"
    return private_directory(os.path.abspath(given) if given else usual, cure)


def lock_directory() -> str:
    """For the lock files: not in /run/lock, where anybody could lay a directory of that name in our way. A lock file is
    never removed: its flock is the lock, not its being there."""
    return private_directory(os.path.join(run_directory(), "lock"))


def state_directory() -> str:
    """The default of the config's `state`: journal and caches."""
    if os.geteuid() == 0:
        return "/var/lib/snapshotter"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    if not home.startswith("/"):  # no HOME, and no entry in passwd
        return os.path.join(run_directory(), "state")
    return os.path.join(home, "snapshotter")


@functools.cache
def host_name() -> str:
    """`<hostname>-<8 hex>`: the hex is of the machine id (machine-id(5) asks not to show it itself), and alone decides
    whether two records are of one host, so renaming a host changes nothing."""
    identity = ""
    # One function is one host, whichever machine of the cloud's it runs on today.
    function = os.environ.get("AWS_LAMBDA_FUNCTION_NAME") or os.environ.get("K_SERVICE")
    if function:
        identity = "function:" + function
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id") if not function else ():
        try:
            with open(path, encoding="ascii") as file:
                identity = file.read().strip()
        except OSError:
            continue
        if identity:
            break
    name = (function or os.uname().nodename.split(".")[0]).lower()[:20] or "host"
    if not identity:
        identity = "name:" + os.uname().nodename
    return f"{name}-{sha256(b'snapshotter:' + identity.encode()).hexdigest()[:8]}"


def boot_id() -> str:
    """Of the machine's running since it was last started (random(4), /proc/sys/kernel/random/boot_id)."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def same_host(one: str, other: str) -> bool:
    """Whether two `host` fields are of the same machine."""
    return one.rpartition("-")[2] == other.rpartition("-")[2]
