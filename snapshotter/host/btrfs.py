"""What the kernel says of a btrfs and does to it: subvolumes, snapshots, the top level without a mount in anybody's
view. Knows no provider, no set and no record.

Everything is an ioctl or a system call on an open directory: no child, no output to parse. Numbers and layouts are from
<linux/btrfs.h> and <linux/mount.h>, the same on every 64-bit Linux since 5.2.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import select
import stat
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import Struct

from snapshotter.core.errors import StorageError
from snapshotter.host.mounts import Mount, table

TOP_LEVEL = 5  # BTRFS_FS_TREE_OBJECTID
_TOP_INODE = 256  # BTRFS_FIRST_FREE_OBJECTID: the top directory of every subvolume, and nothing else

_SUBVOL_CREATE_V2 = 0x50009418
_SNAP_CREATE_V2 = 0x50009417
_SNAP_DESTROY = 0x5000940F
_SYNC = 0x9408
_TREE_SEARCH = 0xD0009411
_INO_LOOKUP = 0xD0009412
_INO_LOOKUP_USER = 0xD000943E
_SPACE_INFO = 0xC0109414
_DEV_INFO = 0xD000941E
_FS_INFO = 0x8400941F
_GET_SUBVOL_INFO = 0x81F8943C
_GET_SUBVOL_ROOTREF = 0xD000943D
_READ_ONLY = 1 << 1  # BTRFS_SUBVOL_RDONLY, to make one
_ROOT_READ_ONLY = 1  # BTRFS_ROOT_SUBVOL_RDONLY, in what GET_SUBVOL_INFO says

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same on every architecture
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6
_ATTRS = 0x2 | 0x4 | 0x8 | 0x10  # nosuid, nodev, noexec, noatime
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW

_libc = ctypes.CDLL(None, use_errno=True)

#: snapper's store, fixed in its source: a writable subvolume inside the one that it snapshots.
SNAPPER = ".snapshots"


class Subvolume(Struct, frozen=True):
    """One subvolume as the kernel describes it. `parent` is the id of the one that it lies in, 0 for the top level
    and for one that is deleted; `directory` the inode there. UUIDs are hex, '' for none."""

    id: int
    name: str
    parent: int
    directory: int
    read_only: bool
    uuid: str
    origin: str  # of what it is a snapshot
    received: bool  # from another file system, by `btrfs receive`


def _call(request: int, fd: int, buffer: bytearray) -> bytearray:
    fcntl.ioctl(fd, request, buffer, True)
    return buffer


def _system_call(number: int, *arguments: Any) -> int:
    done: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if done < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return done


def _text(field: bytes | bytearray) -> str:
    return os.fsdecode(bytes(field).split(b"\0", 1)[0])


def is_top(found: os.stat_result) -> bool:
    """Whether a directory *on btrfs* is the top of a subvolume."""
    return found.st_ino == _TOP_INODE and stat.S_ISDIR(found.st_mode)


def file_system_id(fd: int) -> str:
    """The UUID of the btrfs that `fd` is on, with dashes. Raises OSError (ENOTTY: no btrfs)."""
    digits = _call(_FS_INFO, fd, bytearray(1024))[16:32].hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def subvolume(fd: int) -> Subvolume:
    """The subvolume that `fd` lies in. Raises OSError (ENOENT: it was deleted)."""
    found = _call(_GET_SUBVOL_INFO, fd, bytearray(504))
    parent, directory, _generation, flags = struct.unpack_from("=QQQQ", found, 264)
    origin = bytes(found[312:328])
    return Subvolume(
        id=struct.unpack_from("=Q", found)[0],
        name=_text(found[8:264]),
        parent=parent,
        directory=directory,
        read_only=bool(flags & _ROOT_READ_ONLY),
        uuid=bytes(found[296:312]).hex(),
        origin=origin.hex() if any(origin) else "",
        received=any(found[328:344]),
    )


def is_read_only(path: str) -> bool:
    """Whether the subvolume that this directory *on btrfs* lies in takes no changes. Raises OSError."""
    fd = os.open(path, DIRECTORY)
    try:
        return subvolume(fd).read_only
    finally:
        os.close(fd)


def path_of(fd: int) -> str:
    """Where the subvolume of `fd` is now, from the top level, `/` first. Needs root. Raises OSError."""
    found = subvolume(fd)
    if found.id == TOP_LEVEL:
        return "/"
    parts: list[str] = []
    tree, directory, name = found.parent, found.directory, found.name
    while True:
        parts.append(_directory(fd, tree, directory) + name)
        if tree == TOP_LEVEL:
            return "/" + "/".join(reversed(parts))
        tree, directory, name = _reference(fd, tree)


def _directory(fd: int, tree: int, inode: int) -> str:
    """The path of a directory in its subvolume, with `/` behind; '' for the top."""
    if inode == _TOP_INODE:
        return ""
    buffer = bytearray(4096)
    struct.pack_into("=QQ", buffer, 0, tree, inode)
    return _text(_call(_INO_LOOKUP, fd, buffer)[16:])


def _search(fd: int, tree: int, inode: int, kind: int) -> Iterator[tuple[int, bytes]]:
    """(offset, item) of the items of one kind. Few are expected: only the first 4 KiB of them are read."""
    buffer = bytearray(4096)
    highest = 2**64 - 1
    struct.pack_into("=QQQQQQQIII", buffer, 0, tree, inode, inode, 0, highest, 0, highest, kind, kind, 64)
    _call(_TREE_SEARCH, fd, buffer)
    at = 104
    for _ in range(struct.unpack_from("=I", buffer, 64)[0]):
        _, _, offset, _, length = struct.unpack_from("=QQQII", buffer, at)
        yield offset, bytes(buffer[at + 32 : at + 32 + length])
        at += 32 + length


def _reference(fd: int, tree: int) -> tuple[int, int, str]:
    """(subvolume, directory, name) where the subvolume `tree` lies."""
    for parent, item in _search(fd, 1, tree, 144):  # ROOT_BACKREF
        directory, _, length = struct.unpack_from("<QQH", item)
        return parent, directory, os.fsdecode(item[18 : 18 + length])
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def default_subvolume(fd: int) -> int:
    """The id of what is mounted where no option says which. Needs root. Raises OSError."""
    for _, item in _search(fd, 1, 6, 84):  # the DIR_ITEM in the root tree's directory
        length = struct.unpack_from("<H", item, 27)[0]
        if item[30 : 30 + length] == b"default":
            return int(struct.unpack_from("<Q", item)[0])
    return TOP_LEVEL


def nested(fd: int) -> list[tuple[str, Subvolume]]:
    """Every subvolume below the one at `fd` (opened at its top), with its path from there, above before below. Also
    without root, as far as this user may look. Raises OSError."""
    found: list[tuple[str, Subvolume]] = []
    for name, directory in _children(fd):
        path = directory + name
        try:
            child = os.open(path, DIRECTORY, dir_fd=fd)
        except FileNotFoundError:
            continue
        try:
            if not is_top(os.fstat(child)):
                continue  # something is mounted over it
            found.append((path, subvolume(child)))
            found += [(f"{path}/{below}", each) for below, each in nested(child)]
        finally:
            os.close(child)
    return found


def _children(fd: int) -> Iterator[tuple[str, str]]:
    least = 0
    while True:
        refs = bytearray(4096)
        struct.pack_into("=Q", refs, 0, least)
        more = False
        try:
            _call(_GET_SUBVOL_ROOTREF, fd, refs)
        except OSError as error:
            if error.errno != errno.EOVERFLOW:
                raise
            more = True
        count = refs[4088]
        for k in range(count):
            tree, directory = struct.unpack_from("=QQ", refs, 8 + 16 * k)
            least = tree + 1
            looked = bytearray(4096)
            struct.pack_into("=QQ", looked, 0, directory, tree)
            try:
                _call(_INO_LOOKUP_USER, fd, looked)
            except FileNotFoundError:
                continue  # deleted since
            yield _text(looked[16:272]), _text(looked[272:])
        if not more:
            return


def live_nested(path: str) -> list[str]:
    """The subvolumes below the directory `path` that hold data of their own: not in a snapshot of the subvolume that
    `path` is in. Left out, with all below them: read-only snapshots, and the stores of snapper and of ours. [] where
    `path` is not on btrfs. Absolute paths, sorted. Raises OSError."""
    top = path
    while not is_top(os.stat(top)):
        above = os.path.dirname(top)
        if above == top or os.stat(above).st_dev != os.stat(top).st_dev:
            return []  # a plain directory that is mounted by itself
        top = above
    fd = os.open(top, DIRECTORY)
    try:
        relative = os.path.relpath(path, top)
        inside = "" if relative == "." else relative + "/"
        found = [each for each in living(nested(fd)) if each.startswith(inside)]
        return sorted(os.path.join(top, each) for each in found)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
            return []
        raise
    finally:
        os.close(fd)


def living(found: Sequence[tuple[str, Subvolume]]) -> list[str]:
    """The paths of those among `nested(fd)` that aren't snapshots or a snapshot tool's store, nor lie in one. A
    read-only one that is no snapshot is data that somebody froze, and a writable snapshot may be what programs use."""
    dead = [
        path
        for path, each in found
        if (each.read_only and (each.origin or each.received)) or each.name in (SNAPPER, STORE)
    ]
    return [path for path, _ in found if not any(path == top or path.startswith(top + "/") for top in dead)]


#: The subvolume at the top level where snapshotter keeps its own. Not `.snapshotter`: that is `copy`'s default store
#: beside a data path, which may be at the top level too.
STORE = ".snapshotter-btrfs"


# ------------------------------------------------------------------------------------------------------ changing it


def _arguments(name: str, *, fd: int = 0, flags: int = 0) -> bytearray:
    buffer = bytearray(4096)
    raw = os.fsencode(name)
    struct.pack_into(f"=qQQ32x{len(raw)}s", buffer, 0, fd, 0, flags, raw)
    return buffer


def make_subvolume(parent: int, name: str) -> None:
    """A new subvolume `name` in the directory `parent`. Raises OSError (FileExistsError)."""
    _call(_SUBVOL_CREATE_V2, parent, _arguments(name))


def snapshot(source: int, parent: int, name: str, *, read_only: bool) -> None:
    """A snapshot `name` of the subvolume at `source` in the directory `parent`: one instant, with all that was written
    to the origin before. When this returns it is on the disk (the kernel ends the transaction in this call), and so
    is all else that was done to metadata before. Needs root, or to own the origin. Raises OSError."""
    flags = _READ_ONLY if read_only else 0
    _call(_SNAP_CREATE_V2, parent, _arguments(name, fd=source, flags=flags))


def destroy(parent: int, name: str) -> None:
    """Remove the subvolume `name`; its space comes back later. Raises OSError (ENOTEMPTY: it has nested ones, EPERM: it
    is the default subvolume, or being sent)."""
    buffer = bytearray(4096)
    raw = os.fsencode(name)
    buffer[8 : 8 + len(raw)] = raw
    _call(_SNAP_DESTROY, parent, buffer)


def commit(fd: int) -> None:
    """End the current transaction: what was done is on the disk when this returns. Raises OSError."""
    fcntl.ioctl(fd, _SYNC)


def rename(old_parent: int, old: str, new_parent: int, new: str, *, exchange: bool = False) -> None:
    """rename(2) that never replaces; with `exchange` both change places in one step. Raises OSError."""
    flags = 2 if exchange else 1
    if _libc.renameat2(old_parent, os.fsencode(old), new_parent, os.fsencode(new), ctypes.c_uint(flags)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), old, None, new)


# ------------------------------------------------------------------------------------------------- the file systems


class FileSystem(Struct, frozen=True):
    """A btrfs that is mounted on this host. `mount` is one of its mounts, that can be seen."""

    uuid: str
    mount: Mount

    @property
    def read_only(self) -> bool:
        """The file system itself, not only one mount of it."""
        return "ro" in self.mount.super_options

    def devices(self) -> dict[str, str]:
        """major:minor -> kernel's name, of the disks of this file system as the kernel knows them."""
        found: dict[str, str] = {}
        base = f"/sys/fs/btrfs/{self.uuid}/devices"
        try:
            for name in os.listdir(base):
                with open(f"{base}/{name}/dev", encoding="ascii") as file:
                    found[file.read().strip()] = name.replace("!", "/")
        except OSError:
            pass
        return found

    def source(self) -> str:
        """A block device node of it. The mount table's word alone may be old, and name another file system by now.
        Raises StorageError."""
        devices = self.devices()
        nodes = [self.mount.source, *(f"/dev/{name}" for name in devices.values())]
        for node in [*nodes, *(f"/dev/block/{number}" for number in devices)]:
            try:
                found = os.stat(node)
            except OSError:
                continue
            if stat.S_ISBLK(found.st_mode) and f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" in devices:
                return node
        raise StorageError("none of its disks has a node in /dev", object=f"btrfs {self.uuid}", cure="mend /dev")

    def open_top(self) -> int:
        """The top level (subvolume 5), open. By a mount of our own that is in nobody's mount table, and goes with the
        last descriptor, however this process ends. Needs root. Raises StorageError, OSError."""
        source = os.fsencode(self.source())
        context = _system_call(_FSOPEN, b"btrfs", 1)
        try:
            _system_call(_FSCONFIG, context, _SET_STRING, b"source", source, 0)
            _system_call(_FSCONFIG, context, _SET_STRING, b"subvolid", b"5", 0)
            if self.read_only:
                # Without it the kernel would turn the whole file system, under everybody, to read-write.
                _system_call(_FSCONFIG, context, _SET_FLAG, b"ro", None, 0)
            _system_call(_FSCONFIG, context, _CMD_CREATE, None, None, 0)
            mounted = _system_call(_FSMOUNT, context, 1, _ATTRS)
        finally:
            os.close(context)
        try:
            return os.open(".", DIRECTORY, dir_fd=mounted)
        finally:
            os.close(mounted)


def mounted(mounts: Sequence[Mount] | None = None) -> list[FileSystem]:
    """Every btrfs of which some directory can be seen here, each once."""
    found: dict[str, FileSystem] = {}
    for mount in table() if mounts is None else mounts:
        if mount.fstype != "btrfs" or mount.device in found:
            continue
        try:
            fd = os.open(mount.path, DIRECTORY)
        except OSError:
            continue  # hidden under another mount, or a single file
        try:
            with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
                at = re.search(rb"^mnt_id:\s*(\d+)", file.read(), re.MULTILINE)
            if at and int(at[1]) == mount.id:
                found[mount.device] = FileSystem(file_system_id(fd), mount)
        except OSError:
            continue
        finally:
            os.close(fd)
    return list(found.values())


def refuse_if_stuck(fd: int, name: str, patience_s: float = 3.0) -> None:
    """Raise StorageError if the file system takes no changes now: it is frozen, and our next call would hang until the
    thaw, not to be killed. A child asks by removing a name that isn't there, which waits at the same gate and changes
    nothing, then or ever; one that hangs is left to the thaw. Raises OSError (EROFS)."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            # Nothing else may stay open in it: a lock, or the pipe that somebody reads our output from.
            os.closerange(0, fd)
            os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
            os.unlink(".snapshotter-probe-of-a-name-that-is-not-there", dir_fd=fd)
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    watch = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        if not poll.poll(max(50.0, patience_s * 1000)):
            raise StorageError(
                f"takes no changes (waited {patience_s:.1f} s): it is frozen, or its disk hangs",
                object=name,
                cure=f"if somebody froze it: fsfreeze -u {name}",
            )
    finally:
        os.close(watch)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 255, errno.ENOENT):
        raise OSError(code, os.strerror(code))


def usage(fd: int) -> dict[str, int]:
    """Bytes allocated to data and metadata, used of them, and not allocated yet on its disks. Raises OSError."""
    slots = bytearray(16)
    count = struct.unpack_from("=QQ", _call(_SPACE_INFO, fd, slots))[1]
    slots = bytearray(16 + 24 * count)
    struct.pack_into("=Q", slots, 0, count)
    _call(_SPACE_INFO, fd, slots)
    found = dict.fromkeys(("data_total", "data_used", "metadata_total", "metadata_used"), 0)
    for k in range(struct.unpack_from("=Q", slots, 8)[0]):
        flags, total, used = struct.unpack_from("=QQQ", slots, 16 + 24 * k)
        for kind, bit in (("data", 1), ("metadata", 4)):
            if flags & bit and not flags >> 48:  # the reserve is a part of the metadata, said once more
                found[f"{kind}_total"] += total
                found[f"{kind}_used"] += used
    highest, disks = struct.unpack_from("=QQ", _call(_FS_INFO, fd, bytearray(1024)))
    free = 0
    for number in range(1, highest + 1):
        if not disks:
            break
        buffer = bytearray(4096)
        struct.pack_into("=Q", buffer, 0, number)
        try:
            used, total = struct.unpack_from("=QQ", _call(_DEV_INFO, fd, buffer), 24)
        except OSError:
            continue  # numbers of removed disks
        disks -= 1
        free += total - used
    return {**found, "unallocated": free}


def needs() -> list[str]:
    """[] if this process can do all that is here, else the reasons, each with its cure."""
    with open("/proc/self/status", "rb") as file:
        effective = re.search(rb"^CapEff:\s*([0-9a-f]+)", file.read(), re.MULTILINE)
    if effective is None or not int(effective[1], 16) >> 21 & 1:  # CAP_SYS_ADMIN
        return ["snapshots of btrfs need root (CAP_SYS_ADMIN): run as root, or use --provider copy"]
    return []
