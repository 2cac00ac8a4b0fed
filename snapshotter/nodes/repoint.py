"""A restored clone must never lead into production: its links, and the absolute paths in its databases' own options,
are led to the restored roots instead. Knows links, mounts and RocksDB's options files; must not know providers or
verbs.

What a link means is worked out as the kernel would, a component at a time, in two worlds at once: the live one, where
the image was taken, and the clone's. Where the two part, the link must be rewritten. Paths that lead through links
elsewhere or through bind mounts into a live root are followed to it.

A clone's directories belong to the node's user, who may change any name in them while root works there. So a name is
never trusted twice: what is read or changed is held by a descriptor.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Sequence

from msgspec import Struct

from snapshotter.core.digest import sha256
from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.host import mounts
from snapshotter.host.mounts import is_under

#: Left by a run that was killed between making it and renaming it: removed by the next.
_TEMPORARY = ".snapshotter-repoint-"
_LEFTOVER = re.compile(r"\.snapshotter-repoint-[0-9a-f]{16}")
_MOST_LINKS = 255
_MOST_SEEN = 10_000  # paths remembered: links of thousands of parts mustn't fill the memory
_LONGEST_TARGET = 4000  # bytes; the kernel takes 4095
_OPTIONS = re.compile(r"OPTIONS-(\d+)")
_LARGEST_OPTIONS = 16 << 20  # bytes; a real one has a few thousand per column family
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ITSELF = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
#: Directories that RocksDB writes to (include/rocksdb/options.h). The first two hold one path, the others a list.
_ONE_PATH = ("wal_dir", "db_log_dir")
_PATHS = ("db_paths", "cf_paths")


class Change(Struct, frozen=True):
    """What was changed, or would have to be. `path` is in the clone; `key` is the option's name, '' for a link."""

    path: str
    key: str
    before: str
    after: str


def repoint(clone_roots: Sequence[tuple[str, str]], outside_dir: str | None = None) -> list[Change]:
    """Lead everything in the writable clone that leads into a live root to its restored one. `clone_roots` are
    (live path, clone path), both canonical. Links and options that lead outside every root are led to
    `<outside_dir>/<original path>`, which isn't there, so that opening the clone creates nothing in production; with
    None they are left. Owner, mode and times stay. A second run changes nothing.

    Raises PreconditionError (can't read), StorageError (can't write).
    """
    return _Pass(clone_roots, outside_dir, write=True).run()


def check_read_only(image_roots: Sequence[tuple[str, str]]) -> list[Change]:
    """What `repoint` would have to change so that nothing leads into a live root: not empty, and a read-only mount of
    this image must be refused. Changes nothing."""
    return _Pass(image_roots, None, write=False).run()


def open_directory(path: str) -> int:
    """A descriptor of the directory at a canonical path. Raises OSError; FileNotFoundError also if a link has come
    into the path since it was made canonical."""
    fd = os.open(path, _DIRECTORY)
    try:
        if os.readlink(f"/proc/self/fd/{fd}") != path:
            raise FileNotFoundError(errno.ENOENT, "is elsewhere now", path)
    except BaseException:
        os.close(fd)
        raise
    return fd


# RocksDB's options files.


def read_options(fd: int, name: str) -> tuple[bytes, os.stat_result] | None:
    """What the options file `name` in the directory `fd` holds, and whose it is; None for what isn't a plain file (a
    pipe would hang us, a device may have no end). Raises OSError, with EFBIG for one larger than 16 MiB."""
    itself = os.open(name, _ITSELF, dir_fd=fd)
    try:
        found = os.fstat(itself)
        if not stat.S_ISREG(found.st_mode):
            return None
        # Not blocking: its owner may hold a lease on it.
        opened = os.open(f"/proc/self/fd/{itself}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(itself)
    with open(opened, "rb") as file:
        content = file.read(_LARGEST_OPTIONS + 1)
    if len(content) > _LARGEST_OPTIONS:
        raise OSError(errno.EFBIG, f"larger than {_LARGEST_OPTIONS >> 20} MiB, which no options file is", name)
    return content, found


def newest_options(names: Sequence[str]) -> str | None:
    """The options file that RocksDB reads: the one with the highest number."""
    numbered = [(int(match[1]), name) for name in names if (match := _OPTIONS.fullmatch(name))]
    return max(numbered)[1] if numbered else None


def option_paths(content: bytes) -> list[tuple[str, str]]:
    """(key, absolute path) of the directories that an options file names."""
    found: list[tuple[str, str]] = []
    for line in os.fsdecode(content).split("\n"):
        key, equals, value = line.partition("=")
        key = key.strip()
        if equals and key in (*_ONE_PATH, *_PATHS):
            _mapped(key, value.rstrip("\r"), lambda path, key=key: found.append((key, path)))  # type: ignore[misc]
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "r": "\r"}.get(match[1], match[1]), text)


def _escape(text: str) -> str:
    """As RocksDB's EscapeOptionString (options/options_helper.cc): a bare # would begin a comment."""
    text = re.sub(r"[\\#:]", lambda match: "\\" + match[0], text)
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _mapped(key: str, value: str, change: Callable[[str], str | None]) -> str:
    """An option's value with every absolute path in it given to `change` (None: stays)."""
    if key in _ONE_PATH:
        path = _unescape(value.strip())
        if not path.startswith("/") or (new := change(path)) is None:
            return value
        return _escape(new)

    def one(match: re.Match[str]) -> str:
        new = change(_unescape(match[0]))
        return match[0] if new is None else _escape(new)

    return re.sub(r"(?:(?<=[={\[,;:\s])|^)/(?:\\.|[^\\{}\[\];,=:\s])*", one, value)


# Where a path leads.


class _Side(Struct, frozen=True):
    """A directory by its name and by its identity (device and place in its file system)."""

    path: str
    device: str
    inside: str


class _Worlds:
    """Both worlds: which live root, or restored one, a path of this host lies in, and where that is in the other."""

    def __init__(self, clone_roots: Sequence[tuple[str, str]]) -> None:
        self.table = mounts.table()
        self.pairs = [(os.path.normpath(live), os.path.normpath(clone)) for live, clone in clone_roots]
        self.sides = [(self._side(live), self._side(clone)) for live, clone in self.pairs]
        self._seen: dict[str, str | None] = {}

    def _side(self, path: str) -> _Side:
        mount = mounts.mount_of(path, self.table)
        return _Side(path, mount.device, mounts.inside(path, mount))

    def clone_of(self, live: str) -> str | None:
        """Where the live path is restored; None if no root holds it. The deepest root counts."""
        best = max(
            (pair for pair in self.pairs if is_under(live, pair[0])), key=lambda pair: len(pair[0]), default=None
        )
        return None if best is None else _moved(live, *best)

    def live_of(self, path: str) -> str | None:
        """The live name of a path of this host that lies in a live root or a restored one: by name, or because
        it shows the same directory (a bind mount). None: in neither. The clone counts first, it may lie deeper."""
        if path not in self._seen:
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            self._seen[path] = self._find(path)
        return self._seen[path]

    def _find(self, path: str) -> str | None:
        named = [(len(top), _moved(path, top, pair[0])) for pair in self.pairs for top in pair if is_under(path, top)]
        if named:
            return max(named)[1]
        here = self._side(path)
        shown = [
            (len(side.inside), _moved(here.inside, side.inside, live.path))
            for live, clone in self.sides
            for side in (live, clone)
            if side.device == here.device and is_under(here.inside, side.inside)
        ]
        return max(shown)[1] if shown else None


def _moved(path: str, top: str, new_top: str) -> str:
    rest = path[len(top.rstrip("/")) :]
    return new_top.rstrip("/") + rest if rest.strip("/") else new_top


class _Led(Struct, frozen=True):
    """Where a target leads. `target`: what it must be rewritten to so that it stays in the clone, None if it does
    as it is. `outside`: the path outside every root that it leads to by itself, None if it doesn't."""

    target: str | None
    outside: str | None


class _Pass:
    """One run over all roots of a clone."""

    def __init__(self, clone_roots: Sequence[tuple[str, str]], outside_dir: str | None, *, write: bool) -> None:
        self.worlds = _Worlds(clone_roots)
        self.outside_dir = None if outside_dir is None else os.path.realpath(outside_dir)
        self.write = write
        self.changes: list[Change] = []

    def run(self) -> list[Change]:
        clones = [clone for _, clone in self.worlds.pairs]
        for clone in dict.fromkeys(clones):
            try:
                fd = os.open(clone, _DIRECTORY)
            except OSError as error:
                raise PreconditionError(f"can't read the restored root: {error.strerror}", object=clone) from None
            self._tree(fd, clone, set(clones) - {clone})
        return self.changes

    def _tree(self, fd: int, top: str, others: set[str]) -> None:
        """Every directory below, by descriptor, so that a link put in a directory's place is never entered. However
        deep it is, only the current directory stays open; the way back is `..`, if that is where we came from."""
        at = top
        levels: list[tuple[str, tuple[int, int], list[str]]] = []  # (path, identity, what is left to enter)
        try:
            levels.append((top, _identity(fd), self._directory(fd, top)))
            while True:
                at, _, below = levels[-1]
                if below:
                    name = below.pop()
                    at = os.path.join(at, name)
                    if at in others:
                        continue
                    child = os.open(name, _DIRECTORY, dir_fd=fd)
                    try:
                        inner = self._directory(child, at)
                        if inner:
                            levels.append((at, _identity(child), inner))
                            fd, child = child, fd
                    finally:
                        os.close(child)
                    continue
                levels.pop()
                if not levels:
                    return
                above = os.open("..", _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = above
                if _identity(fd) != levels[-1][1]:
                    raise PreconditionError("was moved while it was read", object=at, cure="restore once more")
        except OSError as error:
            raise PreconditionError(f"can't read it: {error.strerror}", object=at) from None
        finally:
            os.close(fd)

    def _directory(self, fd: int, path: str) -> list[str]:
        """One directory: mend its links and options; return the names of the directories in it."""
        before = os.fstat(fd)
        below: list[str] = []
        links: list[str] = []
        files: list[str] = []
        leftovers: list[str] = []
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.name)
                elif self.write and _LEFTOVER.fullmatch(entry.name):
                    leftovers.append(entry.name)
                elif entry.is_symlink():
                    links.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
        count = len(self.changes)
        for name in leftovers:
            try:
                os.unlink(name, dir_fd=fd)
            except OSError as error:
                raise StorageError(f"can't remove it: {error.strerror}", object=os.path.join(path, name)) from None
        for name in sorted(links):
            self._link(fd, path, name)
        if "CURRENT" in (*links, *files):
            newest = newest_options([*links, *files])
            for name in sorted({*links, *files}):
                if _OPTIONS.fullmatch(name):
                    self._options(fd, path, name, newest=name == newest)
        if leftovers or (self.write and len(self.changes) != count):
            try:
                os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
                os.fsync(fd)
            except OSError as error:
                raise StorageError(f"can't write it: {error.strerror}", object=path) from None
        return below

    def _link(self, fd: int, directory: str, name: str) -> None:
        itself = os.open(name, _ITSELF, dir_fd=fd)
        try:
            found, before = os.fstat(itself), os.readlink("", dir_fd=itself)
        finally:
            os.close(itself)
        after = self._wanted(before, directory)
        if after is None or after == before:
            return
        path = os.path.join(directory, name)
        self.changes.append(Change(path, "", before, after))
        if not self.write:
            return
        temporary = _TEMPORARY + os.urandom(8).hex()
        try:
            os.symlink(after, temporary, dir_fd=fd)
            itself = os.open(temporary, _ITSELF, dir_fd=fd)
            try:
                made = os.fstat(itself)
                # By now the name may be a hard link to another's file, which mustn't get this one's owner.
                if not stat.S_ISLNK(made.st_mode) or made.st_nlink > 1:
                    raise StorageError("was replaced by someone while it was written", object=path)
                _dress(itself, made, found)
            finally:
                os.close(itself)
            # Whatever its owner may put in the name's place from here on, he could put there afterwards too.
            os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
        except OSError as error:
            raise StorageError(f"can't re-point it: {error.strerror}", object=path) from None

    def _options(self, fd: int, directory: str, name: str, *, newest: bool) -> None:
        """An options file. One that is a link is mended where it leads, if that is in the clone (links were first)."""
        if not stat.S_ISLNK(os.lstat(name, dir_fd=fd).st_mode):
            self._options_file(fd, directory, name, newest=newest)
            return
        live = self.worlds.live_of(os.path.realpath(os.path.join(directory, name)))
        place = None if live is None else self.worlds.clone_of(live)
        if place is None:
            return
        directory, name = os.path.split(place)
        try:
            fd = open_directory(directory)
        except (FileNotFoundError, NotADirectoryError):
            return  # broken, or in a place that only looks like the clone's
        try:
            self._options_file(fd, directory, name, newest=newest)
        except FileNotFoundError:
            pass
        finally:
            os.close(fd)

    def _options_file(self, fd: int, directory: str, name: str, *, newest: bool) -> None:
        path = os.path.join(directory, name)
        try:
            read = read_options(fd, name)
        except OSError as error:
            if error.errno == errno.EFBIG and newest:
                raise PreconditionError(f"can't be re-pointed: {error.strerror}", object=path) from None
            if error.errno == errno.EFBIG:
                return  # RocksDB reads the newest alone
            raise
        if read is None:
            return
        content, found = read
        lines = os.fsdecode(content).split("\n")
        changed: list[Change] = []
        for number, line in enumerate(lines):
            left, equals, value = line.partition("=")
            key, ending = left.strip(), "\r" if line.endswith("\r") else ""
            if not equals or key.startswith("#"):
                continue
            value = value.removesuffix("\r")
            new = _mapped(key, value, lambda target, key=key: self._option_wanted(target, directory, key))  # type: ignore[misc]
            if new != value:
                changed.append(Change(path, key, value, new))
                lines[number] = f"{left}={new}{ending}"
        self.changes += changed
        if not changed or not self.write:
            return
        temporary = _TEMPORARY + os.urandom(8).hex()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            new_fd = os.open(temporary, flags, 0o600, dir_fd=fd)
            with open(new_fd, "wb") as file:
                file.write(os.fsencode("\n".join(lines)))
                file.flush()
                _dress(new_fd, os.fstat(new_fd), found)
                os.fsync(new_fd)
            os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
            os.fsync(fd)
        except OSError as error:
            raise StorageError(f"can't re-point it: {error.strerror}", object=path) from None

    def _option_wanted(self, target: str, directory: str, key: str) -> str | None:
        led = self._led(target, directory)
        if led.outside is None or key not in (*_ONE_PATH, *_PATHS):
            return led.target if led.outside is None else None
        if self.outside_dir is None:
            return None
        # Logs about itself may go into the database's directory (an empty value says so). A log of writes that isn't
        # in the image must be missed loudly: an empty value would open without it.
        return "" if key == "db_log_dir" else self._cut(led.outside)

    def _wanted(self, target: str, directory: str) -> str | None:
        """The target that this link must have, None if it is right."""
        led = self._led(target, directory)
        if led.outside is not None:
            return None if self.outside_dir is None else self._cut(led.outside)
        return led.target

    def _cut(self, path: str) -> str:
        assert self.outside_dir is not None
        if is_under(path, self.outside_dir):
            return path
        new = self.outside_dir + (path if path != "/" else "/ROOT")
        if len(os.fsencode(new)) > _LONGEST_TARGET:
            new = os.path.join(self.outside_dir, sha256(os.fsencode(path)).hexdigest())
        return new

    def _led(self, target: str, directory: str) -> _Led:
        """Follow `target`, the text of a link in the clone's `directory`, component by component.

        `here` is the place in live names, `there` where the kernel would be. While `there` is where `here` is restored
        the text is right; where they part, all text so far is replaced by the restored place. A link of the clone's
        own met on the way is mended by itself, so what it does isn't this one's doing: its parts are not `own`.
        """
        worlds = self.worlds
        todo = [(part, True) for part in target.split("/")[::-1] if part not in ("", ".")]
        there = "/" if target.startswith("/") else directory
        here = worlds.live_of(there) or there
        rewritten: str | None = None
        links = 0
        while todo:
            part, own = todo.pop()
            here, there = (
                (os.path.dirname(here), os.path.dirname(there))
                if part == ".."
                else (os.path.join(here, part), os.path.join(there, part))
            )
            if there == self.outside_dir:
                here = "/"  # a link that was cut already (this run may follow one that was killed): what it meant
            restored = worlds.clone_of(here)
            if restored is None and (live := worlds.live_of(here)) is not None:
                here = live
                restored = worlds.clone_of(here)
            place = restored or here
            if there != place:
                there = place
                if own:
                    rewritten = os.path.join(place, *(rest for rest, _ in reversed(todo)))
            # The clone's last link on the way is its own business; one elsewhere is nobody's, so it is looked through.
            if restored is None or todo:
                try:
                    text = os.readlink(place)
                except OSError:
                    text = None
                if text is not None:
                    links += 1
                    if links > _MOST_LINKS:
                        return _Led(rewritten, None)  # a loop
                    mine = own and restored is None
                    todo += [(part, mine) for part in text.split("/")[::-1] if part not in ("", ".")]
                    there = "/" if text.startswith("/") else os.path.dirname(place)
                    here = worlds.live_of(there) or there
        return _Led(rewritten, here if worlds.clone_of(here) is None else None)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _dress(fd: int, made: os.stat_result, like: os.stat_result) -> None:
    """Owner, mode and times of `like` for the temporary that `fd` holds: a file, or a link opened as itself (which
    only /proc can change by descriptor). Without root only our own files are in a clone."""
    itself = f"/proc/self/fd/{fd}"
    if (made.st_uid, made.st_gid) != (like.st_uid, like.st_gid):
        try:
            os.chown(itself, like.st_uid, like.st_gid)
        except PermissionError:
            pass
    if not stat.S_ISLNK(like.st_mode):
        os.chmod(itself, like.st_mode & 0o777)  # root gives nobody a file that runs as its owner
    os.utime(itself, ns=(like.st_atime_ns, like.st_mtime_ns))
