"""Single files of a node found, read and put in place although the node's user may change any name meanwhile, and
although the node's directories may not be where they are in production. Must not know profiles, providers or verbs.

`Places` says where directories are: (path in production, path here), the data path first. A link in a data path that
was moved, or in a copy of it, still names the place in production: it is looked up where that directory is now.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.host.mounts import is_under
from snapshotter.nodes.repoint import open_directory

Places = Sequence[tuple[str, str]]
_MOST_LINKS = 40  # path_resolution(7)
_TEMPORARY = ".snapshotter-new-"
_ITSELF = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def here(places: Places, path: str) -> str:
    """Where a path of production is: below the deepest of `places` that holds it, else where it always was."""
    # A link that was re-pointed leads to a place itself already.
    holding = [(top, place) for pair in places for top, place in (pair, (pair[1], pair[1])) if is_under(path, top)]
    if not holding:
        return path
    top, place = max(holding, key=lambda pair: len(pair[0]))
    return place + path[len(top.rstrip("/")) :] if path != top else place


def held(places: Places, path: str) -> bool:
    """Whether a path of this host is in one of the places."""
    return any(is_under(path, place) for _, place in places)


def locate(places: Places, name: str) -> str:
    """Where `name`, relative to the data path, leads: a path of this host without links as far as it exists."""
    production = places[0][0]
    todo = name.split("/")[::-1]
    links = 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            production = os.path.dirname(production)
            continue
        production = os.path.join(production, part)
        try:
            target = os.readlink(here(places, production))
        except OSError:
            continue
        links += 1
        if links > _MOST_LINKS:
            raise PreconditionError("too many links", object=os.path.join(places[0][1], name), cure="mend them")
        production = "/" if target.startswith("/") else os.path.dirname(production)
        todo += target.split("/")[::-1]
    return here(places, production)


def itself(places: Places, name: str) -> str:
    """As `locate`, but a link as the last component is not followed."""
    above, _, last = name.rpartition("/")
    return os.path.join(locate(places, above) if above else places[0][1], last)


def expand(places: Places, pattern: str) -> list[str]:
    """The names, relative to the data path, that a profile's pattern means; sorted. Nothing there: []."""
    names = [""]
    for part in pattern.rstrip("/").split("/"):
        found = []
        for name in names:
            if not set("*?[").isdisjoint(part):
                try:
                    entries = os.listdir(locate(places, name))
                except (FileNotFoundError, NotADirectoryError):
                    entries = []
                except OSError as error:
                    raise _unreadable(error) from None
                found += [os.path.join(name, entry) for entry in fnmatch.filter(entries, part)]
            elif os.path.lexists(itself(places, os.path.join(name, part))):
                found.append(os.path.join(name, part))
        names = found
    return sorted(names)


def below(places: Places, name: str) -> Iterator[str]:
    """`name` itself if it leads to a plain file; of a directory every plain file in it, relative to the data path.
    Links inside a directory are not followed: what they lead to has a place of its own, or isn't the node's."""
    path = locate(places, name)
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISREG(mode):
        yield name
    elif stat.S_ISDIR(mode):
        for top, directories, files in os.walk(path, onerror=_refuse):
            directories.sort()
            for file in sorted(files):
                if stat.S_ISREG(os.lstat(os.path.join(top, file)).st_mode):
                    yield os.path.join(name, os.path.relpath(os.path.join(top, file), path))


def _unreadable(error: OSError) -> PreconditionError:
    return PreconditionError(f"can't read it: {error.strerror}", object=os.fsdecode(error.filename or ""))


def _refuse(error: OSError) -> None:
    raise _unreadable(error)


@contextmanager
def plain(path: str) -> Iterator[tuple[int, os.stat_result]]:
    """(O_PATH descriptor, status) of a plain file. Anything else isn't opened: to open a pipe is to wait, and a device
    (/dev/watchdog) may act on it. Raises FileNotFoundError, else PreconditionError."""
    try:
        fd = os.open(path, _ITSELF)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _cannot_read(error, path) from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "no plain file"
            raise PreconditionError(f"is {kind}", object=path, cure="put the file itself there")
        yield fd, found
    finally:
        os.close(fd)


def opened(fd: int, path: str) -> int:
    """A descriptor to read what `plain` gave. Raises PreconditionError."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_read(error, path) from None


def _cannot_read(error: OSError, path: str) -> PreconditionError:
    cure = "run as root, or as its owner" if error.errno in (errno.EACCES, errno.EPERM) else ""
    return PreconditionError(f"can't read it: {error.strerror}", object=path, cure=cure)


def read(path: str, most: int) -> tuple[bytes, os.stat_result]:
    """What a plain file of at most `most` bytes holds, and whose it is. Raises FileNotFoundError, else
    PreconditionError that says nothing of the content."""
    with plain(path) as (itself, found):
        fd = opened(itself, path)
    try:
        if found.st_size > most:
            raise PreconditionError(f"is too large ({found.st_size} bytes) to be what its name says", object=path)
        with open(fd, "rb", closefd=False) as file:
            return file.read(most + 1), found
    except OSError as error:
        raise PreconditionError(f"can't read it: {error.strerror}", object=path) from None
    finally:
        os.close(fd)


def hide(path: str) -> None:
    """Mode 0600 for a plain file that has no links above it; a link that stands there now is not followed. Raises
    OSError, PreconditionError."""
    with directory_of(path) as (parent, name):
        fd = os.open(name, _ITSELF, dir_fd=parent)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.chmod(f"/proc/self/fd/{fd}", 0o600)
        finally:
            os.close(fd)


@contextmanager
def directory_of(path: str) -> Iterator[tuple[int, str]]:
    """(descriptor of the directory, last name) of a path that has no links above its last name."""
    parent, name = os.path.split(path)
    try:
        fd = open_directory(parent)
    except OSError as error:
        raise PreconditionError(f"can't open it: {error.strerror}", object=parent) from None
    try:
        yield fd, name
    finally:
        os.close(fd)


def put(path: str, content: bytes, *, mode: int, uid: int, gid: int, keep_times: bool = False) -> None:
    """`path` holds `content` from one instant to the next, and keeps it over a power cut: a new file, renamed over
    what was there. So a hard link of the old file keeps the old, and a link is replaced, never written through.
    `keep_times`: the directory's own times stay as they were. Raises PreconditionError, StorageError."""
    with directory_of(path) as (fd, name):
        before = os.fstat(fd)
        temporary = _TEMPORARY + os.urandom(8).hex()
        try:
            new = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd
            )
            try:
                with open(new, "wb") as file:
                    file.write(content)
                    file.flush()
                    own(new, uid, gid, mode)
                    os.fsync(new)
                os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
            except BaseException:
                _forget(temporary, fd)
                raise
            if keep_times:
                os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
            os.fsync(fd)
        except OSError as error:
            raise StorageError(f"can't write it: {error.strerror}", object=path) from None


def own(fd: int, uid: int, gid: int, mode: int) -> None:
    """Owner and mode. Without root a file can't be given away: then it is ours."""
    now = os.fstat(fd)
    if (now.st_uid, now.st_gid) != (uid, gid):
        try:
            os.fchown(fd, uid, gid)
        except PermissionError:
            pass
    os.fchmod(fd, mode & 0o777)  # after the chown, which clears bits; and nobody is given what runs as its owner


def make_parents(like: str, directory: str) -> None:
    """`directory` is there, with the owner and mode of `like`; so are those above it."""
    if os.path.isdir(directory):
        return
    make_parents(os.path.dirname(like), os.path.dirname(directory))
    try:
        found = os.stat(like)
        os.mkdir(directory, 0o700)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            own(fd, found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode))
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileExistsError:
        pass
    except OSError as error:
        raise StorageError(f"can't make it: {error.strerror}", object=directory) from None


def remove(path: str) -> None:
    """The plain file or link at `path` is gone, durably. Absent is done. Raises StorageError."""
    if not os.path.lexists(path):
        return
    with directory_of(path) as (fd, name):
        try:
            os.unlink(name, dir_fd=fd)
            os.fsync(fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(f"can't remove it: {error.strerror}", object=path) from None


def sweep(directory: str) -> None:
    """Remove what a killed `put` left in a directory. Absent is done."""
    try:
        left = [name for name in os.listdir(directory) if name.startswith(_TEMPORARY)]
    except OSError:
        return
    for name in left:
        remove(os.path.join(directory, name))


def _forget(name: str, fd: int) -> None:
    try:
        os.unlink(name, dir_fd=fd)
    except OSError:
        pass
