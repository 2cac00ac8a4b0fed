"""A clone in its origin's place, and back: what speaks against it, and the steps. Who is who is known by UUID."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator

from providers.btrfs.images import path as path_of
from snapshotter.core.errors import BusyError, PreconditionError, StorageError
from snapshotter.core.model import Volume
from snapshotter.host import btrfs, mounts
from snapshotter.host.btrfs import DIRECTORY, STORE, FileSystem, Subvolume
from snapshotter.host.btrfs_store import Store, read_object, subvolume_at

FSTAB = "/etc/fstab"


def check_swappable(store: Store, volume: Volume) -> Subvolume:
    """The origin, if another can take its place now. Raises PreconditionError, BusyError."""
    path = path_of(volume.id)
    if path == "/":
        raise PreconditionError(
            "is the top level of its file system, so nothing can take its place",
            object=volume.id,
            cure="restore with --to, and copy",
        )
    fd = store.subvolume(path)
    try:
        origin = btrfs.subvolume(fd)
        refuse_in_use(store, path, fd)
    finally:
        os.close(fd)
    if btrfs.default_subvolume(store.top) == origin.id:
        raise PreconditionError(
            "is the file system's default subvolume, which would stay what is set aside",
            object=volume.id,
            cure=f"mount it by subvol={path}, then: btrfs subvolume set-default 5 {store.name}",
        )
    for where, line in by_number(store.fs, origin.id):
        raise PreconditionError(
            f"{where} would mount what is set aside: {line}",
            object=volume.id,
            cure=f"write subvol={path} there instead of subvolid={origin.id}",
        )
    return origin


def exchange(store: Store, swap_id: str, path: str) -> None:
    """What is at `path` and the swap's `other` change places, and that is on the disk."""
    try:
        btrfs.rename(store.fd, f"swaps/{swap_id}/other", store.top, path.lstrip("/"), exchange=True)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError("something is mounted over it", object=f"{path} of {store.name}", cure="umount") from None
        raise
    btrfs.commit(store.top)


def take_back(store: Store, swap_id: str, fd: int) -> None:
    """The origin is in its place again, whichever step the swap had come to: who is who is known by UUID."""
    record = read_object(fd, "swap") or {}
    path, origin = str(record.get("volume")), record.get("origin")
    other, there = subvolume_at(fd, "other"), subvolume_at(store.top, path.lstrip("/"))
    if other is None or other.uuid != origin:
        if there is None or there.uuid != origin:
            raise StorageError("what it set aside is gone", object=swap_id, cure="commit it, to keep what is there")
    elif there is None or there.uuid != record.get("clone"):
        try:
            btrfs.rename(store.fd, f"swaps/{swap_id}/other", store.top, path.lstrip("/"))
        except FileExistsError:
            raise BusyError(
                "something else was put there since the swap", object=f"{path} of {store.name}", cure="move it away"
            ) from None
        btrfs.commit(store.top)
    else:
        live = store.subvolume(path)
        try:
            refuse_in_use(store, path, live)
        finally:
            os.close(live)
        exchange(store, swap_id, path)


def forget_origin(store: Store, swap_id: str, fd: int) -> None:
    """What the swap set aside goes, for good."""
    other = subvolume_at(fd, "other")
    if other is not None:
        if other.uuid != (read_object(fd, "swap") or {}).get("origin"):
            raise StorageError("the swap was never finished", object=swap_id, cure="take it back")
        aside = os.open("other", DIRECTORY, dir_fd=fd)
        try:
            refuse_in_use(store, f"/{STORE}/swaps/{swap_id}/other", aside)
        finally:
            os.close(aside)
    store.destroy(store.discard(f"swaps/{swap_id}"))


def refuse_in_use(store: Store, path: str, fd: int) -> None:
    """Raises BusyError if the subvolume is mounted anywhere, or holds another."""
    what = f"{path} of {store.name}"
    for point in store.mounted_at(path):
        raise BusyError(f"is mounted at {point}, which would go on to show it", object=what, cure=f"umount {point}")
    for below, _ in btrfs.nested(fd):
        raise BusyError(
            f"holds another subvolume, {below!r}, which would go where it goes",
            object=what,
            cure="move that away, or restore with --to, and copy",
        )


def by_number(fs: FileSystem, number: int) -> Iterator[tuple[str, str]]:
    """(where, line) of each line of fstab and each .mount unit that mounts this subvolume by its number, as far as can
    be told. A unit also where it isn't enabled: another may ask for it."""
    try:
        with open(FSTAB, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        lines = []
    for count, line in enumerate(lines, 1):
        words = line.split()
        if len(words) < 4 or words[0].startswith("#") or words[2] != "btrfs" or not _may_be(fs, words[0]):
            continue
        if _names(words[3], number):
            yield f"{FSTAB}, line {count},", line.strip()
    for unit in mounts.units():
        what, kind, options = (unit.settings.get(key, "") for key in ("What", "Type", "Options"))
        if kind in ("btrfs", "auto", "") and _may_be(fs, what) and _names(options, number):
            yield unit.file, f"Options={options}"


def _names(options: str, number: int) -> bool:
    """Whether these mount options say `subvolid=` this number, as the kernel reads numbers."""
    given = re.findall(r"(?:^|,)\s*subvolid=(0x[0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)(?=\s*(?:,|$))", options)
    return any(int(value, 16 if value[:2] == "0x" else 8 if value[0] == "0" else 10) == number for value in given)


def _may_be(fs: FileSystem, spec: str) -> bool:
    """False only where fstab's first field certainly names another file system."""
    if spec.upper().startswith("UUID="):
        return spec[5:].strip('"').lower() == fs.uuid
    try:
        found = os.stat(spec)
    except OSError:
        return True
    if not stat.S_ISBLK(found.st_mode):
        return True
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" in fs.devices()
