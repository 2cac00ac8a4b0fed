"""What a copy will need, found out by one walk before anything is made: whether all can be read, how much room it
takes, and the image that it can share files with. No effects. Must not know how a set is made."""

from __future__ import annotations

import os
import stat

from providers.copy.making import leave_stores_out, mount_points
from providers.copy.sets import SUSPECT, Sets
from snapshotter.core.errors import PreconditionError
from snapshotter.core.model import Birth, ImageState, Volume
from snapshotter.host import mounts, tree
from snapshotter.host.mirror import CLEAN, Shares, manifest_lines


def room_needed(volume: Volume, birth: Birth, above: str) -> int:
    """Bytes that a copy of the volume takes, after one walk. Raises PreconditionError."""
    assert volume.path is not None
    refused: list[str] = []
    devices: list[str] = []
    sizes: dict[tuple[int, int], tuple[int, str, tree.Entry]] = {}
    privileged = os.geteuid() == 0

    def seen(at: int, name: str, path: str, found: os.stat_result) -> None:
        if stat.S_ISREG(found.st_mode):
            if not privileged and not os.access(name, os.R_OK, dir_fd=at, effective_ids=True):
                refused.append(path)
            used = min(found.st_blocks * 512, found.st_size + 4096)
            sizes[found.st_dev, found.st_ino] = (used, path, tree.entry_of(found))
        elif not privileged and (stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode)):
            devices.append(path)

    try:
        with tree.open_tree(volume.path) as top:
            tree.walk(
                top,
                mount_points(volume.path),
                seen=seen,
                unreadable=refused.append,
                leave_out=leave_stores_out(set()),
            )
            if refused:
                raise PreconditionError(
                    f"{len(refused)} of its files or directories can't be read, the first is {refused[0]!r}",
                    object=volume.path,
                    cure="run as root, or as the user who owns them",
                )
            if devices:
                raise PreconditionError(
                    f"{devices[0]!r} is a device node, which only root can copy",
                    object=volume.path,
                    cure="run as root, or move it away",
                )
            if _clones(top, volume, [path for used, path, _ in sizes.values() if used], above):
                return 0
    except OSError as error:
        raise PreconditionError(f"can't be read: {error.strerror}", object=volume.path) from None
    shared = previous(birth, volume, above)
    try:
        return sum(used for used, path, entry in sizes.values() if shared is None or not shared.has(path, entry))
    finally:
        if shared is not None:
            shared.dirs.close()


def _clones(top: tree.Dirs, volume: Volume, files: list[str], above: str) -> bool:
    """Whether the volume's blocks can be shared with files in `above`."""
    for path in files[:1]:
        parent, name = tree.parent_and_name(path)
        try:
            fd = tree.open_to_read(name, top.get(parent))
        except OSError:
            break
        try:
            tried = tree.can_clone(fd, above)
        finally:
            os.close(fd)
        if tried is not None:
            return tried
    assert volume.path is not None
    here, there = mounts.mount_of(volume.path), mounts.mount_of(os.path.realpath(above))
    return here.device == there.device and here.fstype in ("btrfs", "xfs", "bcachefs")


def previous(birth: Birth, volume: Volume, place: str) -> Shares | None:
    """The newest good image of the same volume of the same target in the store `place`; None, for a full copy, where
    one found corrupt may share files with it: what has rotted in a file has in every set that it is in."""
    store = Sets.open(place)
    if store is None:
        return None
    with store:
        sealed = [
            each
            for each in store.snapshots()
            if each.birth.target == birth.target and each.volume == volume.id and "sealed" in each.marks
        ]
        corrupt = [each for each in sealed if each.marks.get("verify-outcome") == "corrupt"]
        good = [
            each
            for each in sealed
            if each not in corrupt
            and each.state is ImageState.READY
            and each.marks.get("grade") != "skewed"
            and not store.has(f"sets/{each.birth.set_id}/{SUSPECT}")
        ]
        if not good:
            return None
        newest = max(good, key=lambda each: (each.order, each.birth.set_id))
        if any(each.order > newest.order for each in corrupt):  # judged by a version that made nothing SUSPECT
            return None
        at = f"sets/{newest.birth.set_id}/{newest.birth.member}"
        clean: dict[str, tuple[int, int, int, int]] = {}
        try:
            with open(os.open(f"{at}/manifest", os.O_RDONLY | os.O_CLOEXEC, dir_fd=store.fd)) as file:
                for path, flags, _, entry in manifest_lines(file):
                    if flags == CLEAN and stat.S_ISREG(entry.mode):
                        clean[path] = (entry.ino, entry.size, entry.mtime_ns, entry.ctime_ns)
            return Shares(tree.open_tree(f"{at}/tree", dir_fd=store.fd), clean)
        except (OSError, ValueError, TypeError):
            return None  # nothing to share with: a full copy
