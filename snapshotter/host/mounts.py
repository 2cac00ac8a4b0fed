"""The mount table of this host: parse it, find what a path lies on, mount and unmount. Knows no provider.

Source of the format: proc(5), /proc/pid/mountinfo. Space, tab, newline and backslash are octal escapes in it.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

from snapshotter.core.command import run
from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError, StorageError
from snapshotter.core.model import MountSpec

#: File systems whose own commands hang while they are frozen.
NEVER_FROZEN = frozenset({"zfs", "btrfs"})
FSTAB = "/etc/fstab"
#: Of both, the first has the word (systemd.unit(5)).
UNITS = ("/etc/systemd/system", "/run/systemd/system")
_SETTING = re.compile(r"\s*(\w+)\s*=(.*)")
_ESCAPE = re.compile(rb"\\([0-7]{3})")


class Mount(Struct, frozen=True):
    """One line of mountinfo. `root` is the directory of the file system that is seen at `path`."""

    id: int
    parent: int
    device: str  # "major:minor"; "0:n" for file systems without one block device (btrfs, ZFS, tmpfs)
    root: str
    path: str
    options: frozenset[str]
    fstype: str
    source: str
    super_options: frozenset[str]

    @property
    def read_only(self) -> bool:
        return "ro" in self.options or "ro" in self.super_options


class Unit(Struct, frozen=True):
    """A .mount unit of systemd's. Of a setting that is given twice, the last."""

    file: str
    enabled: bool
    settings: dict[str, str]


def unescape(field: bytes) -> str:
    """Octal escapes undone, bytes decoded as the file system's names are."""
    if b"\\" in field:
        field = _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)
    return os.fsdecode(field)


def parse(table: bytes) -> list[Mount]:
    """mountinfo's bytes as mounts, in the order in which they were made. Lines that aren't mountinfo are skipped."""
    found: list[Mount] = []
    for line in table.split(b"\n"):
        before, separator, after = line.partition(b" - ")
        left, right = before.split(b" "), after.split(b" ")
        if not separator or len(left) < 6 or len(right) < 3:
            continue
        try:
            ids = int(left[0]), int(left[1])
        except ValueError:
            continue
        found.append(
            Mount(
                id=ids[0],
                parent=ids[1],
                device=os.fsdecode(left[2]),
                root=unescape(left[3]),
                path=unescape(left[4]),
                options=frozenset(unescape(left[5]).split(",")),
                fstype=unescape(right[0]),
                source=unescape(right[1]),
                super_options=frozenset(unescape(right[2]).split(",")),
            )
        )
    return found


def table() -> list[Mount]:
    """The mounts that this process sees."""
    with open("/proc/self/mountinfo", "rb") as file:
        return parse(file.read())


def is_under(path: str, top: str) -> bool:
    """True if `path` is `top` or lies below it. Both absolute and normalised; no file system access."""
    return path == top or path.startswith(top.rstrip("/") + "/")


def mount_of(path: str, mounts: Sequence[Mount] | None = None) -> Mount:
    """The mount that the canonical path `path` lies on, found as the kernel finds it: down the path from the root
    mount, stepping into each mount on the way, so that one which a later mount hides isn't met. Raises NotFoundError (a
    mount namespace without a root that we can see)."""
    mounts = table() if mounts is None else mounts
    ids = {mount.id for mount in mounts}
    tops = [mount for mount in mounts if mount.parent not in ids or mount.parent == mount.id]
    here = max((top for top in tops if is_under(path, top.path)), key=lambda top: len(top.path), default=None)
    if here is None:
        raise NotFoundError("no mount is above this path", object=path)
    seen = {here.id}
    while True:
        inner = [m for m in mounts if m.parent == here.id and m.id not in seen and is_under(path, m.path)]
        if not inner:
            return here
        shortest = min(len(mount.path) for mount in inner)
        here = [mount for mount in inner if len(mount.path) == shortest][-1]
        seen.add(here.id)


def mounts_below(path: str, mounts: Sequence[Mount] | None = None) -> list[Mount]:
    """The mounts strictly below `path` that can be seen (not hidden by a later mount above them)."""
    mounts = table() if mounts is None else mounts
    below = [mount for mount in mounts if mount.path != path and is_under(mount.path, path)]
    return [mount for mount in below if mount_of(mount.path, mounts) == mount]


def by_hand(mount: Mount) -> bool:
    """Not one of those that ZFS makes of itself where somebody looks below .zfs/snapshot, and takes away again."""
    return not (mount.fstype == "zfs" and "@" in mount.source and "/.zfs/snapshot/" in mount.path)


def top_of(mount: Mount) -> str:
    """Where the top of the file system on `mount` is seen. Raises PreconditionError if that is nowhere."""
    for other in [mount, *table()]:
        if other.device == mount.device and other.root == "/":
            return other.path
    raise PreconditionError(
        "is a directory of a file system whose top is mounted nowhere", object=mount.path, cure="mount that"
    )


def is_root(point: str) -> bool:
    """Whether the root file system is mounted there: it is never frozen, as we would be too."""
    return point == "/" or os.stat("/").st_dev == os.stat(point).st_dev


def inside(path: str, mount: Mount) -> str:
    """Where `path` lies in the file system that is mounted there: absolute, seen from that file system's top.
    Two paths with the same (device, inside) are the same directory, bind mounts or not."""
    relative = os.path.relpath(path, mount.path)
    return os.path.normpath(os.path.join(mount.root, relative)) if relative != "." else mount.root


def mount(spec: MountSpec, where: str) -> None:
    """Mount `spec` at the existing directory `where`. Raises PreconditionError without root, StorageError."""
    if os.geteuid() != 0:
        raise PreconditionError("mounting needs root", object=where, cure="run as root, or restore with --to")
    options: Iterable[str] = spec.options
    argv = ["mount"]
    if spec.fstype == "bind":
        # Two calls: the kernel ignores `ro` on the call that makes the bind.
        first = run(["mount", "--bind", "--", spec.source, where], mutates=True)
        if first.ok and spec.options:
            again = ["mount", "-o", ",".join(["remount", "bind", *spec.options]), "--", where]
            second = run(again, mutates=True)
            if not second.ok:
                unmount(where)
            first = second
        if not first.ok:
            raise StorageError(f"can't mount: {first.said}", object=where)
        return
    if spec.fstype:
        argv += ["-t", spec.fstype]
    if options:
        argv += ["-o", ",".join(options)]
    outcome = run([*argv, "--", spec.source, where], mutates=True)
    if not outcome.ok and spec.fstype == "zfs" and "cannot be mounted using 'mount'" in outcome.stderr:
        # A dataset with a mount point of its own: mount.zfs(8) wants to be told that this is meant.
        told = ["mount", "-t", "zfs", "-o", ",".join([*options, "zfsutil"])]
        outcome = run([*told, "--", spec.source, where], mutates=True)
    if not outcome.ok:
        raise StorageError(f"can't mount: {outcome.said}", object=where)


def bind(source: int, where: int, name: str) -> None:
    """Show the open directory `source` at the open directory `where`, which is called `name`, read-only if that is seen
    read-only. By descriptors: a name can lead elsewhere by the time it is looked up. Raises StorageError."""
    # -c: else mount(8) makes names of them first.
    outcome = run(["mount", "-c", "--bind", "--", by_descriptor(source), by_descriptor(where)], mutates=True)
    if not outcome.ok:
        raise StorageError(f"can't mount: {outcome.said}", object=name)


def by_descriptor(fd: int) -> str:
    """A path to an open directory of ours, for another program. It ends in `/.` as move_mount(2), which mount(8) uses
    since 2.39, doesn't follow a last component that is a link, as those in /proc are."""
    return f"/proc/{os.getpid()}/fd/{fd}/."


def is_mount_point(path: str) -> bool:
    """True if something is mounted exactly at the canonical `path`."""
    return any(entry.path == path for entry in table())


def awaited(path: str, table: list[Mount]) -> list[str]:
    """The mount points of /etc/fstab and of systemd's enabled .mount units at, above and below the canonical `path`
    where nothing is mounted though a disk should be (it failed at boot): what is there now isn't that disk's. One with
    `noauto` (fstab(5)) below isn't awaited, nor one above where disks come and go (type `auto`, option `user`). None of
    what can't be read."""
    try:
        with open(FSTAB, "rb") as file:
            lines = [line.split() for line in file if not line.lstrip().startswith(b"#")]
    except OSError:
        lines = []
    here = mount_of(path, table).path
    mounted = {mount.path for mount in table}
    points = {
        point for point in _of_units() if is_under(point, here) and (is_under(point, path) or is_under(path, point))
    }
    found = {point for point in points if not {point, os.path.realpath(point)} & mounted}
    for words in lines:
        if len(words) < 3 or not words[1].startswith(b"/"):
            continue
        point = os.path.normpath(unescape(words[1]))
        if not is_under(point, here) or not (is_under(point, path) or is_under(path, point)):
            continue
        options = set(words[3].split(b",")) if len(words) > 3 else set()
        comes_and_goes = words[2] == b"auto" or bool(options & {b"user", b"users"})
        by_hand = b"noauto" in options and (is_under(point, path) or comes_and_goes)
        if (point == path or not by_hand) and not {point, os.path.realpath(point)} & mounted:
            found.add(point)
    return sorted(found)


def _of_units() -> Iterator[str]:
    """Where the enabled .mount units mount. One that only another unit asks for can't be told from one that nobody
    wants, so isn't among them."""
    for unit in units():
        where = unit.settings.get("Where", "")
        if unit.enabled and where.startswith("/") and "%" not in where:  # %: a specifier
            yield os.path.normpath(where)


def units() -> Iterator[Unit]:
    """systemd's .mount units (systemd.mount(5)), but for those that it makes of fstab. None of what can't be read."""
    files: dict[str, str] = {}
    enabled = set()
    for directory in UNITS:
        for name in glob.glob("*.mount", root_dir=directory):
            files.setdefault(name, os.path.join(directory, name))  # masked: a link to /dev/null, with nothing in it
        for kind in ("wants", "requires"):  # of a target: what a service alone wants comes and goes with it
            enabled |= {os.path.basename(link) for link in glob.glob(f"{directory}/*.target.{kind}/*.mount")}
    for name, file in files.items():
        try:
            with open(file, encoding="utf-8", errors="surrogateescape") as lines:
                said = [match.groups() for match in map(_SETTING.match, lines) if match]
        except OSError:
            continue
        yield Unit(file, name in enabled, {key: value.strip() for key, value in said})


def unmount(where: str, patience_s: float = 5.0) -> None:
    """Unmount what is mounted at `where`; absent is done. Loop and NVMe devices let go asynchronously, so a busy
    answer is asked again for `patience_s`. Raises BusyError, StorageError."""
    from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

    def attempt() -> None:
        if not is_mount_point(where):
            return
        outcome = run(["umount", "--", where], mutates=True)
        if not outcome.ok and is_mount_point(where):
            if "busy" in outcome.said:
                raise BusyError("is in use", object=where, cure=f"see who with: fuser -vm {where}")
            raise StorageError(f"can't unmount: {outcome.said}", object=where)

    retrying = Retrying(
        retry=retry_if_exception_type(BusyError),
        stop=stop_after_delay(patience_s),
        wait=wait_fixed(0.2),
        reraise=True,
    )
    retrying(attempt)
