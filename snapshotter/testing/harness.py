"""What a driver's tests write for their storage (`Harness`), and how the suite makes and compares content.

Must not know pytest, nor any driver. Everything here looks at the storage from outside, with the kernel's own calls.
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import struct
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta

from msgspec.structs import replace

from snapshotter.core.model import (
    Birth,
    Hold,
    Member,
    MountSpec,
    Root,
    Snapshot,
    Tree,
    Volume,
    new_set_id,
    utc_now,
)
from snapshotter.host import mounts
from snapshotter.host.places import host_name
from snapshotter.provider import Provider


class Harness(ABC):
    """One storage for one test. Make it in a fixture and clean it up there, also after a failure."""

    #: The storage outlives this process: tests may kill a child that works on it.
    persistent = True
    #: Seconds to wait for what the storage does in its own time (a PENDING snapshot, a killed child's commands).
    patience_s = 60.0

    @abstractmethod
    def provider(self) -> Provider:
        """A fresh instance on the same storage, as a new run would make it."""

    @abstractmethod
    def volume(self) -> Volume:
        """A new origin, its top directory (`volume.path`) writable here. Called twice, both can be in one set."""

    @abstractmethod
    def foreign(self, volume: Volume) -> Callable[[], bool]:
        """Make an object of another tool of `volume`, beside where ours are and named as like ours as the storage
        allows. Returns a check: is it still there, untouched?"""

    @abstractmethod
    def objects(self) -> set[str]:
        """Raw names of everything on the storage that a driver could leave behind, its own scratch included; nothing
        of an origin's content. Never asks the driver."""

    def enter(self, made: MountSpec | Tree, destination: str) -> str:
        """Mount where there is something to mount; the path of the content."""
        if isinstance(made, Tree):
            return made.path
        os.makedirs(destination, exist_ok=True)
        mounts.mount(made, destination)
        return destination

    def leave(self, destination: str) -> None:
        """Undo `enter`; absent is done."""
        if mounts.is_mount_point(os.path.realpath(destination)):
            mounts.unmount(os.path.realpath(destination))
            os.rmdir(destination)

    def destination(self) -> str:
        """An absent path, new each time, where the driver can attach to. By default below the system's temporary
        directory; override it where a clone must be near its storage."""
        return os.path.join(tempfile.mkdtemp(prefix="conformance-"), "attached")

    def gone(self, volume: Volume) -> Volume:
        """A volume that was there and isn't any more."""
        path = None if volume.path is None else volume.path + "-gone"
        return replace(volume, id=volume.id + "-gone", path=path)

    def again(self, volume: Volume) -> Volume:
        """The volume that is in this one's place now, as a new claim names it: after a committed swap it may have
        another id (a cloud's disks). Default: the same."""
        return volume

    def damage(self, snapshot: Snapshot) -> bool:
        """Ruin the image behind the driver's back, its label kept, as the storage itself might. False: can't."""
        return False

    def hold(self) -> Hold:
        """The quiesce that `create` runs in. The suite writes nothing to the origin meanwhile, unless the driver's
        traits say that it needs none."""
        return Hold()


def make_birth(
    volumes: Sequence[Volume],
    *,
    set_id: str | None = None,
    node: str = "node-1",
    roots: Sequence[Root] | None = None,
    slot: str = "",
    address: str = "",
) -> Birth:
    """A birth record of a set of these volumes, taken now, each volume's top a root unless `roots` are given."""
    now = utc_now()
    tops = [Root(path=volume.path or f"/{k}", member=k) for k, volume in enumerate(volumes)]
    return Birth(
        set_id=set_id or new_set_id(now),
        target=hashlib.sha256(node.encode()).hexdigest()[:16],
        node=node,
        host=host_name(),
        profile="generic",
        roots=tuple(roots or tops),
        members=tuple(Member(volume.provider, volume.id) for volume in volumes),
        taken_at=now,
        deadline=now + timedelta(minutes=10),
        slot=slot,
        address=address,
    )


def describe(top: str, *, writable: bool = True) -> dict[str, tuple[object, ...]]:
    """Everything that an image must keep of the tree at `top`, by relative path: kind, mode, owner, time of last
    change, content, link target, extended attributes, and which paths are one file. Not pipes and sockets, which hold
    nothing. With `writable=False` the write permissions are left out: a read-only image may lack them."""
    described: dict[str, tuple[object, ...]] = {}
    names: dict[tuple[int, int], list[str]] = {}
    todo = [""]
    while todo:
        relative = todo.pop()
        path = os.path.join(top, relative) if relative else top
        found = os.lstat(path)
        content: object = None
        xattrs: dict[str, bytes] = {}
        if stat.S_ISDIR(found.st_mode):
            todo += [os.path.join(relative, name) for name in os.listdir(path)]
        elif stat.S_ISREG(found.st_mode):
            with open(path, "rb") as file:
                content = (found.st_size, hashlib.file_digest(file, "sha256").hexdigest())
            names.setdefault((found.st_dev, found.st_ino), []).append(relative)
        elif stat.S_ISLNK(found.st_mode):
            content = os.readlink(path)
        else:
            continue
        mode: int | None = found.st_mode if writable else found.st_mode & ~0o222
        if stat.S_ISLNK(found.st_mode):
            mode = stat.S_IFLNK
        else:
            # The mask of an ACL is the group's permission bits: without those, only the others are comparable.
            kept = [name for name in os.listxattr(path) if writable or not name.startswith("system.")]
            xattrs = {name: os.getxattr(path, name) for name in sorted(kept)}
        owner = (found.st_uid, found.st_gid)
        described[relative] = (mode, owner, found.st_mtime_ns, content, tuple(xattrs.items()))
    for same in names.values():
        for relative in same:
            described[relative] += (tuple(sorted(same)),)
    return described


def fill(top: str, seed: str = "one") -> None:
    """Ordinary content: a few files in directories, some bytes of `seed` in each, one large enough for extents."""
    for relative, size in (
        ("database/000012.sst", 300_000),
        ("database/CURRENT", 16),
        ("key", 64),
        ("caches/c", 5_000),
    ):
        path = os.path.join(top, relative)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write((hashlib.sha256(f"{seed}{relative}".encode()).digest() * (size // 32 + 1))[:size])
    os.chmod(os.path.join(top, "key"), 0o600)


def ruin(top: str) -> None:
    """What a living origin does after its snapshot: overwrites in place, appends, truncates, removes, renames,
    changes modes, times and attributes, makes new files."""
    sst = os.path.join(top, "database/000012.sst")
    with open(sst, "r+b") as file:
        file.write(b"overwritten in place")
    with open(os.path.join(top, "database/CURRENT"), "ab") as file:
        file.write(b"appended")
    os.truncate(os.path.join(top, "caches/c"), 100)
    os.chmod(os.path.join(top, "key"), 0o640)
    os.utime(os.path.join(top, "database"), (1, 1))
    try:
        os.setxattr(sst, "user.changed", b"1")
    except OSError:
        pass  # no such attributes here
    os.rename(os.path.join(top, "key"), os.path.join(top, "key.old"))
    os.makedirs(os.path.join(top, "new/deep"))
    with open(os.path.join(top, "new/deep/file"), "wb") as file:
        file.write(b"new")
    os.rename(os.path.join(top, "caches"), os.path.join(top, "new/caches"))
    os.unlink(os.path.join(top, "new/caches/c"))


def fill_with_oddities(top: str) -> None:
    """Names, kinds, modes, attributes and times that have broken other tools. As far as this file system and this
    user can have them."""
    raw = os.fsencode(top)
    raw_names = [b"with space", b"new\nline", b"tab\there", "\u00e9\u65e5\U0001f40b".encode(), b"invalid\xff\xfeutf-8"]
    raw_names += [
        b"n" * 255,
        b"-rf",
        b"--",
        b"*",
        b"$(touch oops)",
        b"quote'\"",
        b"back\\slash",
        b" ",
        b".hidden",
        b"a:b",
    ]
    for raw_name in raw_names:
        try:
            with open(os.path.join(raw, raw_name), "wb") as file:
                file.write(b"content of " + raw_name)
        except OSError:
            continue  # no such names here (utf8only)
    os.mkdir(os.path.join(top, "empty directory"))
    open(os.path.join(top, "empty file"), "wb").close()
    odd = os.path.join(top, "odd")
    os.makedirs(os.path.join(odd, *[f"level-{depth:014}" for depth in range(60)]))
    for name, target in (
        ("dangling", "nowhere"),
        ("absolute", "/etc/hostname"),
        ("to-directory", ".."),
        ("long", "x/" * 500),
    ):
        os.symlink(target, os.path.join(odd, name))
    os.symlink(b"invalid\xff", os.path.join(os.fsencode(odd), b"raw"))
    with open(os.path.join(odd, "linked"), "wb") as file:
        file.write(b"one file, three names")
    os.link(os.path.join(odd, "linked"), os.path.join(odd, "linked-too"))
    os.link(os.path.join(odd, "linked"), os.path.join(top, "linked elsewhere"))
    with open(os.path.join(odd, "sparse"), "wb") as file:
        file.truncate(64 << 20)
        os.pwrite(file.fileno(), b"an island", 33 << 20)
    os.mkfifo(os.path.join(odd, "pipe"))
    here = os.open(odd, os.O_PATH)
    try:  # through the descriptor, as a socket's path has room for 108 bytes
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{here}/geth.ipc")
    finally:
        os.close(here)
    for mode in (0o600, 0o400, 0o755, 0o4755, 0o000):
        if mode == 0 and os.geteuid() != 0:
            continue  # nobody but root could read it
        path = os.path.join(odd, f"mode-{mode:04o}")
        with open(path, "wb") as file:
            file.write(b"mode")
        os.chmod(path, mode)
    if os.geteuid() == 0:
        os.chown(os.path.join(odd, "mode-0755"), 65534, 1234)
        os.chown(os.path.join(odd, "dangling"), 65534, 1234, follow_symlinks=False)
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in ((1, 6, 2**32 - 1), (2, 6, 65534), (4, 4, 2**32 - 1), (16, 6, 2**32 - 1), (32, 0, 2**32 - 1))
    )
    for attribute, value in (("user.note", b"\x00binary\xff"), ("user.empty", b""), ("system.posix_acl_access", acl)):
        try:
            os.setxattr(os.path.join(odd, "linked"), attribute, value)
        except OSError:
            continue  # no such attributes here
    os.utime(os.path.join(odd, "mode-0600"), ns=(1, 1_000_000_000_123_456_789))
    os.utime(os.path.join(odd, "dangling"), ns=(1, 1_111_111_111_000_000_001), follow_symlinks=False)
    os.utime(os.path.join(top, "empty directory"), ns=(1, 987_654_321_000_000_000))


def blocks(path: str) -> int:
    """Bytes that a file has on disk."""
    return os.lstat(path).st_blocks * 512


def write_permissions(top: str) -> list[str]:
    """Paths below `top` that somebody may write to by their mode."""
    return [relative for relative, (mode, *_) in describe(top).items() if _writable(mode)]


def _writable(mode: object) -> bool:
    return isinstance(mode, int) and not stat.S_ISLNK(mode) and bool(mode & 0o222)
