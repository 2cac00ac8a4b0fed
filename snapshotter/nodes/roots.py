"""From a data path to what must be snapshotted: the directories that belong to a node. Knows mounts, links and a
profile; must not know providers or verbs. Changes nothing.

The node's user may make any link below the data path and change it while root looks. So root follows a link only to
what its author owns (or root's own links), and opens what it found by descriptor.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat

from msgspec import Struct

from snapshotter.core.errors import NotFoundError, PreconditionError, SnapshotterError, UsageError
from snapshotter.host import mounts
from snapshotter.host.mounts import Mount, is_under
from snapshotter.nodes.config import Node
from snapshotter.nodes.profiles import Profile
from snapshotter.nodes.repoint import newest_options, open_directory, option_paths, read_options

_NETWORK = """
    nfs nfs4 cifs smb3 smbfs 9p ceph glusterfs lustre beegfs afs davfs orangefs ocfs2 gfs2 coda
    fuse.sshfs fuse.glusterfs fuse.ceph fuse.s3fs fuse.rclone fuse.gcsfuse fuse.mount-s3 fuse.davfs2
    fuse.juicefs
"""
_ITSELF = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_NO_FILES = """
    proc sysfs devtmpfs devpts cgroup cgroup2 mqueue debugfs tracefs securityfs pstore bpf configfs
    hugetlbfs fusectl efivarfs binfmt_misc autofs nsfs selinuxfs
"""
_SYSTEM = re.compile(
    r"/(etc|usr|bin|lib\w*|sbin|boot|dev|proc|sys|run|tmp|var|home|root|opt|srv|mnt|media|var/lib|var/log)?"
)
_MOST_LINKS = 40  # path_resolution(7)
_NOT_THE_AUTHORS = "belongs to another user than the link: name it in extra_paths if it is the node's"
_SYSTEM_TREES = ("/etc", "/usr", "/dev", "/proc", "/sys", "/run", "/boot", "/var/log")


class Found(Struct, frozen=True):
    """One root. `path` is canonical, `mount` what it lies on, `relative` its place below the data path: '' for the
    data path itself, None for a root outside it."""

    path: str
    mount: Mount
    relative: str | None


class Layout(Struct, frozen=True):
    """What belongs to a node. `roots[0]` is the data path; those below it come next, then those elsewhere, each
    in the order of their names. `links_outside`: links (and single mounted files) that are not followed, each with
    why. `aliases`: (path, same content's path in a root): bind mounts that aren't stored a second time. `subvolumes`:
    btrfs subvolumes below the roots that aren't mounts: roots too for a provider whose snapshots end at them.
    `snapshots`: those that are no roots even then, each directory of them once. `nowhere`: (who leads there, path) of
    what isn't there now, outside the roots: perhaps on a disk that isn't mounted."""

    roots: list[Found]
    subvolumes: list[Found]
    links_outside: list[str]
    aliases: list[tuple[str, str]]
    warnings: list[str]
    snapshots: list[str]
    nowhere: list[tuple[str, str]]


def check_directory(path: str) -> None:
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise UsageError("is not a directory", object=path, cure="give the node's data directory")
        os.scandir(path).close()
    except OSError as error:
        raise _readable(error, path) from None


def _readable(error: OSError, path: str) -> SnapshotterError:
    """What an operator can do about a directory that can't be looked at."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFoundError("no such directory", object=path)
    if error.errno in (errno.EACCES, errno.EPERM):
        return PreconditionError("no permission to read it", object=path, cure="run as root, or as the node's user")
    return PreconditionError(f"can't read it: {error.strerror}", object=path)


def mount_at(path: str, table: list[Mount]) -> Mount:
    """The mount that the existing canonical `path` lies on, as the kernel says: the table alone can't tell where
    mounts hide one another. Raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            found = re.search(rb"^mnt_id:\s*(\d+)", file.read(), re.MULTILINE)
    finally:
        os.close(fd)
    by_id = {mount.id: mount for mount in table}
    known = by_id.get(int(found[1])) if found else None
    return known or mounts.mount_of(path, table)


def roots(node: Node, profile: Profile) -> Layout:
    """The directories that belong to the node: its data path, every mount below it, every directory that a link
    below leads to, the node's `extra_paths`, the profile's extra roots, and what the databases' own options name;
    each searched in turn. One that lies in another isn't named again. As root, a link (or an options file) leads only
    to a directory of its author's, so that nobody gets another user's data into a set; root's links lead anywhere.

    Costs one walk over names (no stat per file). Raises PreconditionError (a file system that can't be snapshotted,
    a directory that can't be read, a database that names a directory that can't be taken), NotFoundError and
    UsageError (the data path, extra_paths).
    """
    check_directory(node.path)
    search = _Search(os.path.realpath(node.path), profile)
    for path in node.extra_paths:
        check_directory(path)
        search.add(os.path.realpath(path), "extra_paths", explicit=True)
    for path in profile.extra_roots:
        try:
            led = _led(os.path.join(search.data, path))
        except OSError:
            continue  # most nodes of a profile don't have them
        if led.is_directory and search.may_follow(led, f"profile {profile.name}"):
            search.add(led.path, f"profile {profile.name}")
    return search.layout()


class _Led(Struct, frozen=True):
    """Where a path leads. `authors`: who wrote the links on the way, or could have put them there."""

    path: str
    is_directory: bool
    owner: int
    authors: frozenset[int]


def _led(path: str) -> _Led:
    """Follow an absolute path as the kernel does, by descriptor, so that what is judged is what was passed. Raises
    OSError."""
    authors: set[int] = set()
    fd = os.open("/", _ITSELF)
    try:
        todo = path.split("/")[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            here = os.open(part, _ITSELF, dir_fd=fd)
            try:
                found = os.fstat(here)
                if not stat.S_ISLNK(found.st_mode):
                    fd, here = here, fd
                    continue
                text = os.readlink("", dir_fd=here)
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                # Who owns the directory may have brought another's link here (a hard link), or have moved root's to
                # where it means something else (a relative one): then it is his word.
                brought = found.st_nlink > 1 or (found.st_uid == 0 and not text.startswith("/"))
                authors.add(os.fstat(fd).st_uid if brought else found.st_uid)
                todo += text.split("/")[::-1]
                if text.startswith("/"):
                    top = os.open("/", _ITSELF)
                    os.close(fd)
                    fd = top
            finally:
                os.close(here)
        found = os.fstat(fd)
        if found.st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        name = os.readlink(f"/proc/self/fd/{fd}")
        return _Led(name, stat.S_ISDIR(found.st_mode), found.st_uid, frozenset(authors))
    finally:
        os.close(fd)


class _Search:
    """The walk's state: what was found so far."""

    def __init__(self, data: str, profile: Profile) -> None:
        self.data = data
        self.profile = profile
        self.table = mounts.table()
        self.mount_points = {mount.path for mount in self.table}
        self.found: dict[str, Mount] = {}
        self.outside: list[tuple[str, str, str]] = []  # (who leads there, where, why not)
        self.nowhere: list[tuple[str, str]] = []  # (who leads there, where)
        self.aliases: dict[str, str] = {}
        self.subvolumes: dict[str, Mount] = {}
        self.snapshots: dict[str, set[str]] = {}  # by the directory that they are in
        self.warnings: list[str] = []
        self.linked_options: list[str] = []  # options files that are links: read once their target is in a root
        self.missing: list[tuple[str, str]] = []  # (options file and key, directory that it may not lead us to)
        self.judges = os.geteuid() == 0  # others can read no more than what is theirs anyway
        if data == "/":
            cure = "give the node's own directory"
            raise PreconditionError("the whole system can't be a data path", object="/", cure=cure)
        self.add(data, "data path", explicit=True)

    def add(self, path: str, why: str, *, explicit: bool = False) -> None:
        """Take the canonical directory `path` as a root, unless it is in one already or must not be one; search it
        and what it leads to. `why` says who named it, for messages."""
        waiting = [(path, why, explicit)]
        while waiting or (waiting := self._linked_options()):
            path, why, explicit = waiting.pop()
            if self._known(path):
                continue
            try:
                mount = mount_at(path, self.table)
            except OSError as error:
                raise _readable(error, path) from None
            if not os.path.isdir(path):
                self.outside.append(("a mount", path, "a single file"))
                continue
            if self.found and (refused := self._must_not(path, mount, explicit)):
                if explicit:
                    raise UsageError(f"can't be a root: {refused}", object=path, cure="take it out of extra_paths")
                if os.path.isfile(why.partition(": ")[0]):
                    # A database without its log would open, and have lost what was in it.
                    said = f"names {path}, {refused}: a set without it is no backup"
                    raise PreconditionError(said, object=why, cure="move that to a directory of the node's own")
                self.outside.append((why, path, refused))
                continue
            if alias := next((seen for top in self.found if (seen := self._seen_in(top, path, mount))), None):
                self.aliases[path] = alias
                continue
            _refuse_file_system(path, mount)
            self.found[path] = mount
            waiting += self._search(path, mount)
            # Taken before what links lead to: a directory mounted below the data path is restored in its place there.
            below = mounts.mounts_below(path, self.table)
            waiting += [(each.path, "a mount", False) for each in below if mounts.by_hand(each) and self._visible(each)]

    def _known(self, path: str) -> bool:
        """In a root already, on the root's own mount."""
        if any(is_under(path, alias) for alias in self.aliases):
            return True
        tops = [top for top in self.found if is_under(path, top)]
        if not tops:
            return False
        between = [point for point in self.mount_points if is_under(path, point)]
        deepest = max(between, key=len, default="/")
        return any(not is_under(deepest, top) or deepest == top for top in tops)

    def _visible(self, mount: Mount) -> bool:
        try:
            return mount_at(mount.path, self.table) == mount
        except OSError:
            return False

    def _must_not(self, path: str, mount: Mount, explicit: bool) -> str | None:
        """Why this directory isn't followed to, or None."""
        data_mount = self.found[self.data]
        if is_under(self.data, path):
            return "it holds the data path itself"
        if path != self.data and mount.device == data_mount.device:
            here, data = mounts.inside(path, mount), mounts.inside(self.data, data_mount)
            if here != data and is_under(data, here):
                return "it shows a directory that holds the data path itself"
        if _SYSTEM.fullmatch(path):
            return "a directory of the system"
        if not explicit and any(is_under(path, tree) for tree in _SYSTEM_TREES) and not is_under(path, self.data):
            return "a directory of the system"
        return None

    def _seen_in(self, top: str, path: str, mount: Mount) -> str | None:
        """Where the directory `path` is seen in the root `top` through that root's own mount, or None."""
        top_mount = self.found[top]
        if mount.device != top_mount.device:
            return None
        here, there = mounts.inside(path, mount), mounts.inside(top, top_mount)
        if not is_under(here, there):
            return None
        seen = os.path.normpath(os.path.join(top, os.path.relpath(here, there)))
        try:
            return seen if mount_at(seen, self.table).id == top_mount.id else None
        except OSError:
            return None

    def _search(self, top: str, mount: Mount) -> list[tuple[str, str, bool]]:
        """Walk one root, not into other mounts, and return the directories that it leads to."""
        leads: list[tuple[str, str, bool]] = []
        waiting = [top]
        nested = _nested_subvolumes(top) if mount.fstype == "btrfs" else set()
        snapshots = os.path.join(mount.path, ".zfs") if mount.fstype == "zfs" else ""  # seen with snapdir=visible
        while waiting:
            directory = waiting.pop()
            names: list[str] = []
            try:
                fd = open_directory(directory)
            except OSError as error:
                if directory != top and isinstance(error, FileNotFoundError | NotADirectoryError):
                    continue  # removed since it was listed (the node is running), or a link has come into the path
                raise _readable(error, directory) from None
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        path = os.path.join(directory, entry.name)
                        if path == snapshots:
                            continue
                        if entry.is_symlink():
                            leads += self._follow(path)
                        elif entry.is_dir(follow_symlinks=False) and path not in self.mount_points:
                            if mount.fstype == "btrfs" and _is_subvolume(entry):
                                if path not in nested:
                                    self._snapshot(directory, entry.name)
                                    continue  # a snapshot of ours or another tool's: not the node's
                                self.subvolumes[path] = mount
                            waiting.append(path)
                        names.append(entry.name)
                if "CURRENT" in names:
                    leads += self._options(fd, directory, names)
            except OSError as error:
                raise _readable(error, directory) from None
            finally:
                os.close(fd)
        return leads

    def _snapshot(self, directory: str, name: str) -> None:
        from snapshotter.host import btrfs

        if name != btrfs.STORE:  # ours, and nobody's loss
            self.snapshots.setdefault(directory, set()).add(os.path.join(directory, name))

    def may_follow(self, led: _Led, who: str, author: int = 0) -> bool:
        """Whether all who led there (`author`: of what names the path) own it, or are root. Notes a refusal."""
        if self._known(led.path) or not self.judges or {author, *led.authors} <= {0, led.owner}:
            return True
        self.outside.append((who, led.path, _NOT_THE_AUTHORS))
        return False

    def _follow(self, link: str) -> list[tuple[str, str, bool]]:
        """Where a link leads: a directory to search, or nothing (broken, a loop, a file, in a root already)."""
        try:
            led = _led(link)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise PreconditionError(
                    "no permission to see where this link leads", object=link, cure="run as root, or as the node's user"
                ) from None
            if error.errno == errno.ELOOP:
                self.warnings.append(f"{link}: a link that leads to itself")
            elif error.errno in (errno.ENOENT, errno.ENOTDIR):
                self.nowhere.append((link, os.path.realpath(link)))
                self.outside.append((link, os.path.realpath(link), "isn't there"))
            elif error.errno != errno.ENAMETOOLONG:
                raise _readable(error, link) from None
            return []
        if self._known(led.path):
            return []
        if led.is_directory:
            return [(led.path, link, False)] if self.may_follow(led, link) else []
        self.outside.append((link, led.path, "not a directory, and outside the node's"))
        return []

    def _options(self, fd: int, directory: str, names: list[str]) -> list[tuple[str, str, bool]]:
        """The directories that a RocksDB's newest options file names."""
        patterns = self.profile.option_files
        newest = newest_options([name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)])
        if newest is None:
            return []
        file = os.path.join(directory, newest)
        try:
            if stat.S_ISLNK(os.lstat(newest, dir_fd=fd).st_mode):
                self.linked_options.append(file)
                return []
            return self._named_by(fd, newest, file)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _readable(error, file) from None

    def _linked_options(self) -> list[tuple[str, str, bool]]:
        """The same of options files that are links, as far as they lead into a root by now."""
        leads: list[tuple[str, str, bool]] = []
        for link in list(self.linked_options):
            file = os.path.realpath(link)
            if not self._known(file):
                continue
            self.linked_options.remove(link)
            directory, name = os.path.split(file)
            try:
                fd = open_directory(directory)
                try:
                    leads += self._named_by(fd, name, file)
                finally:
                    os.close(fd)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise _readable(error, file) from None
        return leads

    def _named_by(self, fd: int, name: str, file: str) -> list[tuple[str, str, bool]]:
        read = read_options(fd, name)
        if read is None:
            self.warnings.append(f"{file}: not a file, and not read")
            return []
        content, found = read
        # A file that has other names may have been brought here by who owns the directory.
        author = found.st_uid if found.st_nlink == 1 else os.fstat(fd).st_uid
        leads: list[tuple[str, str, bool]] = []
        for key, path in option_paths(content):
            if key == "db_log_dir":
                continue  # where it writes about itself: nothing to restore
            try:
                led = _led(path)
            except OSError:
                led = None
            who = f"{file}: {key}"
            if led is None or not led.is_directory:
                self.warnings.append(f"{who} names {os.path.realpath(path)}, which isn't there")
                self.nowhere.append((who, os.path.realpath(path)))
            elif self.may_follow(led, who, author):
                leads.append((led.path, who, False))
            else:
                self.missing.append((who, led.path))
        return leads

    def layout(self) -> Layout:
        """What was found, each directory once. One that a directory found later holds is dropped here, so that the
        order of finding makes no difference."""
        for who, path in self.missing:
            if not self._known(path):  # extra_paths may hold it
                said = f"names {path}, which belongs to another user than the file: a set without it is no backup"
                raise PreconditionError(said, object=who, cure="name it in extra_paths if it is the node's")
        kept: list[str] = []
        for path, mount in self.found.items():
            holder = None
            for top in self.found:
                if top != path and path != self.data and (seen := self._seen_in(top, path, mount)):
                    same = self._seen_in(path, top, self.found[top]) is not None
                    if not same or top in kept:
                        holder = seen
            if holder is None:
                kept.append(path)
            elif holder != path:
                self.aliases[path] = holder
        found = [Found(path, self.found[path], self._relative(path)) for path in kept]
        found.sort(key=lambda root: (root.path != self.data, root.relative is None, root.path))
        warned = [f"{path} shows the same as {same}: stored once" for path, same in sorted(self.aliases.items())]
        unread = [f"{file}: a link that leads to no file of the node's, and not read" for file in self.linked_options]
        return Layout(
            roots=found,
            subvolumes=[Found(path, self.subvolumes[path], self._relative(path)) for path in sorted(self.subvolumes)],
            # A link may have been judged before the root that holds its target was found.
            links_outside=sorted(
                {f"{who} -> {path}: {why}" for who, path, why in self.outside if not self._known(path)}
            ),
            aliases=sorted(self.aliases.items()),
            warnings=sorted({*self.warnings, *warned, *unread}),
            snapshots=sorted(_named(*each) for each in self.snapshots.items()),
            nowhere=[(who, path) for who, path in self.nowhere if not self._known(path)],
        )

    def _relative(self, path: str) -> str | None:
        if path == self.data:
            return ""
        return os.path.relpath(path, self.data) if is_under(path, self.data) else None


def _named(directory: str, snapshots: set[str]) -> str:
    """One line for all in a directory: a tool may keep hundreds."""
    if len(snapshots) == 1:
        return f"{min(snapshots)}: a btrfs snapshot, or a store of them"
    return f"{directory}: {len(snapshots)} btrfs snapshots in it, {min(snapshots)} is one"


def _nested_subvolumes(top: str) -> set[str]:
    """Those below `top` that programs work in; not snapshots."""
    from snapshotter.host import btrfs

    return set(btrfs.live_nested(top))


def _is_subvolume(directory: os.DirEntry[str]) -> bool:
    """The top of a btrfs subvolume always has inode 256 (btrfs-subvolume(8))."""
    try:
        return directory.stat(follow_symlinks=False).st_ino == 256
    except OSError:
        return False


def _refuse_file_system(path: str, mount: Mount) -> None:
    if mount.fstype in _IN_MEMORY:
        why, cure = "lies in memory and is gone after a reboot", "move it to a disk"
    elif mount.fstype in _NETWORK.split():
        why, cure = "is a network file system: others write to it unseen", "snapshot it on its server"
    elif mount.fstype in _NO_FILES.split():
        why, cure = "is the kernel's, not files", "unmount it, or give the node's own directory"
    else:
        return
    where = "" if mount.path == path else f" (mounted at {mount.path})"
    raise PreconditionError(f"{mount.fstype} {why}{where}", object=path, cure=cure)
