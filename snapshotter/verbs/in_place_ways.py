"""By which way new content comes into place: by swaps of whole volumes, or on grounds where entries change places. And
what of a ground is left alone, what room a copy takes, how fast the disk is. Changes nothing.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence

from msgspec import Struct

from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, UsageError
from snapshotter.core.model import SnapshotSet
from snapshotter.host import btrfs, mounts, tree
from snapshotter.host.mounts import Mount, is_under
from snapshotter.host.store import MARKER, readable
from snapshotter.nodes import identity, profiles
from snapshotter.nodes.config import Node
from snapshotter.nodes.profiles import Profile
from snapshotter.nodes.roots import mount_at
from snapshotter.nodes.target import canonical
from snapshotter.provider import Provider
from snapshotter.verbs.session import Session

#: Inside a directory that can't be renamed itself.
_OURS = re.compile(r"\.(snapshotter-restoring-|corrupted-)[0-9]{8}t[0-9]{6}z.*")
_PROBE_BYTES = 16 << 20
_MARGIN = 64 << 20  # bytes left free, or 1 % of a small file system


class Ground(Struct, frozen=True, kw_only=True):
    """One root and where things are made ready and set aside. A `fixed` one (a mount point, a subvolume's top) can't be
    renamed: its entries change places one by one."""

    path: str
    member: int
    inside: str
    fixed: bool
    staged: str
    aside: str
    away: bool = False  # `aside` is on another file system: what goes there is copied


class Swap(Struct, frozen=True, kw_only=True):
    """A volume whose place a clone takes, by its provider. `mount`: what is mounted at `path`, to be mounted again."""

    swap_id: str
    provider: str
    member: int
    volume: str
    path: str
    fstype: str
    mount: tuple[str, str, tuple[str, ...]] | None = None  # source, type, options


def is_open(provider: Provider, swap: Swap) -> bool:
    """Whether this swap was begun, and neither taken back nor committed. Raises SnapshotterError."""
    return any(each.id == swap.swap_id for each in provider.open_swaps(swap.volume))


# -------------------------------------------------------------------------------------------------------- which way


def swaps(
    session: Session,
    found: SnapshotSet | None,
    node: Node,
    profile: Profile,
    live: identity.Identity | None,
    choice: str,
    aside: str | None,
    only: str,
    swap_id: str,
    table: list[Mount],
) -> list[Swap]:
    """The swaps that would put the whole set in place; none if one of its volumes can't be swapped, or if something in
    the image must be changed before the node may see it: between a swap and that change the power may fail."""
    if found is None or only or aside or profile.sign_state or node.owner or not os.path.isdir(found.birth.path):
        return []
    birth = found.birth
    if choice == "live" or (live is not None and not choice and not birth.address):
        return []
    known = {root.path for root in birth.roots}
    if len(birth.members) != len(birth.roots):
        return []
    swaps = []
    refused: SnapshotterError | None = None
    for root in birth.roots:
        member = birth.members[root.member]
        if root.inside or not os.path.isdir(root.path):
            return []
        mount = mount_at(root.path, table)
        provider = session.provider(member.provider, node, chosen=False)
        if not provider.traits.swaps:
            return []
        volume = provider.claim(mount, root.path)
        if volume is None or volume.id != member.volume or volume.path != root.path:
            return []
        snapshot = next((each for each in found.snapshots if each.birth.member == root.member), None)
        if snapshot is None:
            return []
        try:
            if not provider.swappable(volume, snapshot):
                return []
        except SnapshotterError as error:  # said once nothing else is against a swap: a copy may not mind it
            refused = refused or error
        below = [mount.path for mount in mounts.mounts_below(root.path, table) if mounts.by_hand(mount)]
        if any(path not in known for path in below):
            return []
        others = [canonical(other.path) for other in session.config.nodes.values() if other.name != node.name]
        if any(is_under(other, root.path) for other in others):
            return []
        if mount.fstype == "btrfs" and (mounts.inside(root.path, mount) == "/" or btrfs.live_nested(root.path)):
            return []
        spec = None
        if mount.path == root.path:
            options = sorted(option for option in mount.options)
            options += sorted(option for option in mount.super_options if "quota" in option and option != "noquota")
            if mount.fstype == "btrfs":
                options.append(f"subvol={mount.root}")
            spec = (mount.source, mount.fstype, tuple(options))
        swaps.append(
            Swap(
                swap_id=f"{swap_id}-{root.member}",
                provider=member.provider,
                member=root.member,
                volume=volume.id,
                path=root.path,
                fstype=mount.fstype,
                mount=spec,
            )
        )
    for swap in swaps:
        _refuse_open(session.provider(swap.provider, node, chosen=False), swap.volume)
    if refused is not None:
        raise refused
    return swaps


def _refuse_open(provider: Provider, volume: str) -> None:
    """Raise BusyError while another swap of the volume is open, of a restore whose journal isn't here: `swap` would
    refuse, with the node stopped already. (A cloud's is told by it alone, as that costs calls.)"""
    for each in provider.open_swaps(volume) if provider.traits.needs_host else ():
        if each.volume == volume:
            raise BusyError(
                f"what an earlier restore set aside waits still (swap {each.id})",
                object=volume,
                cure="`snapshotter doctor` tells how to end that",
            )


def grounds_of(
    roots: list[str],
    found: SnapshotSet | None,
    data: str,
    stamp: str,
    token: str,
    aside: str | None,
    table: list[Mount],
) -> tuple[Ground, ...]:
    grounds: list[Ground] = []
    for number, root in enumerate(roots):
        fixed = _fixed(root, table)
        holder = next((g for g in grounds if is_under(root, g.path) and root != g.path), None)
        if holder is not None and not fixed:
            continue  # restored in its place in the one that holds it
        beside = root.rstrip("/")
        staged = f"{root}/.snapshotter-restoring-{stamp}-{token}" if fixed else f"{beside}.restoring-{stamp}-{token}"
        put = f"{root}/.corrupted-{stamp}" if fixed else f"{beside}.corrupted-{stamp}"
        away = False
        if aside is not None:
            into = _aside_directory(aside, roots)
            put = os.path.join(into, f"{os.path.basename(beside)}.corrupted-{stamp}" + (f"-{number}" if number else ""))
            away = not _one_file_system(into, root, fixed, table)
            if away:
                _refuse_lossy(into)
        if os.path.lexists(put):
            put = f"{put}-{token}"  # another restore of this second
        member, inside = (found.birth.roots[number].member, found.birth.roots[number].inside) if found else (0, "")
        grounds.append(
            Ground(path=root, member=member, inside=inside, fixed=fixed, staged=staged, aside=put, away=away)
        )
    return tuple(grounds)


def _fixed(root: str, table: list[Mount]) -> bool:
    if not os.path.isdir(root):
        return False
    if any(mount.path == root for mount in table):
        return True
    return mount_at(root, table).fstype == "btrfs" and btrfs.is_top(os.stat(root))


def _aside_directory(given: str, roots: list[str]) -> str:
    into = os.path.realpath(given)
    if not os.path.isdir(into):
        raise UsageError("is no directory", object=given, cure="make it first, or name another for --aside")
    for root in roots:
        if is_under(into, root):
            raise UsageError(f"lies in {root}, which is restored", object=given, cure="name another for --aside")
    return into


def _refuse_lossy(into: str) -> None:
    """Raise PreconditionError unless files there keep their owner and mode (vfat's don't, nor root's on NFS): they come
    back from there, and keys are among them."""
    root = os.geteuid() == 0
    wanted = (65534, 65534) if root else (os.geteuid(), os.getegid())
    try:
        with tempfile.TemporaryFile(dir=into) as file:
            os.fchmod(file.fileno(), 0o600)
            os.fchown(file.fileno(), *wanted)
            found = os.fstat(file.fileno())
            kept = (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (*wanted, 0o600)
    except OSError:
        kept = False
    if not kept:
        raise PreconditionError(
            "can't keep the owners and modes of what is set aside there",
            object=into,
            cure="name a directory on ext4, XFS or the like for --aside",
        )


def _one_file_system(into: str, root: str, fixed: bool, table: list[Mount]) -> bool:
    """Whether a rename works between them."""
    at = root if fixed else os.path.dirname(root)
    while not os.path.isdir(at):
        at = os.path.dirname(at)
    return os.stat(into).st_dev == os.stat(at).st_dev and mount_at(into, table).id == mount_at(at, table).id


def set_aside_in_image(path: str) -> bool:
    """Whether what has this path in an image of a root is what a restore had set aside in it when the image was taken:
    nobody's any more, and never put in place."""
    return _OURS.fullmatch(path.partition("/")[0]) is not None


def left_alone(ground: Ground, roots: list[str], table: list[Mount]) -> list[str]:
    """What lies below a ground and isn't the node's to be moved: other mounts, and in one that can't be renamed also
    what mkfs made, our stores, what earlier restores set aside, other tools' subvolumes."""
    found = [mount.path for mount in table if is_under(mount.path, ground.path) and mount.path != ground.path]
    if ground.fixed and os.path.isdir(ground.path):
        kind = mount_at(ground.path, table).fstype
        with os.scandir(ground.path) as entries:
            for entry in entries:
                if kind == "zfs" and entry.name == ".zfs":  # its snapshots, with snapdir=visible
                    found.append(entry.path)
                    continue
                if entry.name == "lost+found" or entry.name == btrfs.STORE or _OURS.fullmatch(entry.name):
                    found.append(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    top = mount_at(ground.path, table).fstype == "btrfs" and btrfs.is_top(entry.stat())
                    if os.path.isfile(os.path.join(entry.path, MARKER)) or (top and entry.path not in roots):
                        found.append(entry.path)
    return sorted({path for path in found if path not in roots})


# ---------------------------------------------------------------------------------------------------- room and time


def size_of(session: Session, found: SnapshotSet, roots: list[str], profile: Profile, only: str) -> int | None:
    """Bytes that the copy takes, as far as that is known before the image is looked into."""
    if only:
        return sum(_used(path) for path in tops(profile, roots[0], roots, only)) or None
    kinds = [session.provider(member.provider, chosen=False) for member in found.birth.members]
    if found.size_bytes is not None and all(kind.traits.sized_by_content for kind in kinds):
        return found.size_bytes
    return sum(_used(root) for root in roots) or None


def tops(profile: Profile, path: str, roots: list[str], only: str) -> list[str]:
    """What changes places, as far as it is there now."""
    if not only:
        return roots
    return [os.path.realpath(top) for pattern in _patterns(profile, only) for top in profiles.matches(path, pattern)]


def _patterns(profile: Profile, only: str) -> tuple[str, ...]:
    return (*profile.database, *profile.metadata) if only == "database" else profile.identity


def _used(path: str) -> int:
    """Bytes on the disk of what is there."""
    try:
        with tree.open_tree(os.path.realpath(path)) as top:
            total = 0

            def count(_: int, __: str, ___: str, found: os.stat_result) -> None:
                nonlocal total
                if stat.S_ISREG(found.st_mode):
                    total += min(found.st_blocks * 512, found.st_size + 4096)

            tree.walk(top, seen=count, unreadable=lambda _: None)
            return total
    except NotADirectoryError:
        return os.lstat(path).st_blocks * 512
    except OSError:
        return 0


def room_at(path: str, *, measure: bool) -> tuple[int | None, int | None]:
    """Bytes free where the copy goes, and bytes per second that can be written there: measured with a file that has no
    name."""
    at = path
    while not os.path.isdir(at):
        at = os.path.dirname(at)
    room = os.statvfs(at)
    free = room.f_bavail * room.f_frsize
    if not measure or free < 4 * _PROBE_BYTES:
        return free, None
    try:
        fd = os.open(at, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError:
        return free, None
    try:
        began = time.monotonic()
        for _ in range(_PROBE_BYTES >> 20):
            os.write(fd, b"\xa5" * (1 << 20))
        os.fsync(fd)
        return free, round(_PROBE_BYTES / max(1e-6, time.monotonic() - began))
    except OSError:
        return free, None
    finally:
        os.close(fd)


def refuse_no_room(need: int, path: str, node: str, *, gained: int = 0) -> None:
    """Raise PreconditionError unless `need` bytes fit on the file system of `path`, from which `gained` are still to
    go."""
    at = path
    while not os.path.isdir(at):
        at = os.path.dirname(at)
    room = os.statvfs(at)
    margin = min(_MARGIN, room.f_blocks * room.f_frsize // 100)
    free = room.f_bavail * room.f_frsize + gained
    if need and need + margin > free:
        raise PreconditionError(
            f"the copy needs {readable(need)}, and {readable(free)} are free",
            object=at,
            cure=f"free some space; or --aside DIR on another disk takes the old data there first; or, without a "
            f"backup's help: snapshotter resync {node}",
        )


def refuse_writes(session: Session, needs: Mapping[str, int]) -> None:
    """Raise PreconditionError where so many bytes, written at these paths, would harm what lies below the file systems
    there. (Space that is gained there first is no help: a block that is written anew is as good as a new one.)"""
    table = mounts.table()
    here = [(mount_at(_there(path), table), need) for path, need in needs.items()]
    for provider in {provider.name: provider for provider in session.everywhere()[0]}.values():
        provider.refuse_writes(here)


def _there(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return os.path.realpath(path)


def harm(session: Session, grounds: Sequence[Ground], need: int | None) -> PreconditionError | None:
    """What `refuse_writes` would probably say of the copy, whose size is known only when the image is looked into."""
    if not need:
        return None
    needs = {ground.path: need if len(grounds) == 1 else min(need, _used(ground.path)) for ground in grounds}
    try:
        refuse_writes(session, needs)
    except PreconditionError as error:
        return error
    return None


def bears_probe(session: Session, path: str) -> bool:
    """Whether the file of `room_at` may be written there."""
    try:
        refuse_writes(session, {path: _PROBE_BYTES})
    except PreconditionError:
        return False
    return True
