"""A clone in its origin's place, and back. Must know no set but as what keeps a dataset from being destroyed.

Two renames do it: `<volume>` to `<volume>.<swap id>`, the clone to `<volume>`. The clone is made beside the origin,
below the same parent: an encrypted dataset may not leave its encryption root, but may be renamed there
(dsl_dir_rename_check looks at the keys only when the parent changes).

A clone has none of the origin's local properties and delegated permissions, so they are carried over. What is set
aside would mount itself over the clone after a reboot, hence its canmount=noauto. Nothing is promoted until the commit:
promoting moves the older snapshots to the clone and leaves the newer ones where a later `zfs destroy -r` would kill
them.

Datasets below the volume are volumes of their own, and are moved below what takes its place.

Each step is repeatable: both datasets carry the swap's id and what is needed to undo it, so `back` and `commit` find
out from the storage how far a dead run had come.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from providers.zfs import library, objects, tool
from providers.zfs.attaching import mounts_of
from providers.zfs.objects import ASIDE, KEPT, SWAP, Object
from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, StorageError
from snapshotter.core.model import MountSpec
from snapshotter.host import mounts

#: Room that is kept for a dataset. There may not be enough for two: it goes from the one to the other.
_RESERVED = ("reservation", "refreservation")
#: Set when a dataset is made or by its key, or ZFS's own counts, or the swap sees to them.
_NOT_CARRIED = frozenset(
    {
        *("encryption", "keyformat", "keylocation", "pbkdf2iters", "origin", "version"),
        *("filesystem_count", "snapshot_count"),
        *("canmount", *_RESERVED),
    }
)


def open_swaps(found: Sequence[Object]) -> Iterator[tuple[str, Object | None, Object | None]]:
    """(swap id, the clone, what is set aside) of each swap that was begun and not ended."""
    clones = {record["id"]: each for each in found if (record := each.record(SWAP)) and "id" in record}
    asides = {record["id"]: each for each in found if (record := each.record(ASIDE)) and "id" in record}
    for swap_id in sorted({*clones, *asides}):
        yield swap_id, clones.get(swap_id), asides.get(swap_id)


def volume_of(clone: Object | None, aside: Object | None) -> str:
    """Whose place was taken; '' if no record tells."""
    record = (aside.record(ASIDE) if aside else None) or (clone.record(SWAP) if clone else None) or {}
    return str(record.get("volume", ""))


def by_hand(swap_id: str, clone: Object | None, aside: Object | None) -> str:
    """`back` in a person's commands, for a swap of which nothing but the storage knows. What they destroy is the clone,
    which `zfs destroy` refuses where something was taken of it."""
    volume = volume_of(clone, aside)
    if not volume:
        return ""
    there = clone is not None and clone.name == volume
    away = _beside(volume, swap_id)[0] if there or clone is None else clone.name
    if aside is None:  # destroyed: what is there can only stay
        return f"zfs inherit {SWAP} {volume}" if there else f"zfs destroy {away}"
    record = aside.record(ASIDE) or {}
    steps = [f"zfs rename -u {volume} {away}"] if there else []
    steps += [f"zfs promote {aside.name}"] if _is_promoted(swap_id, volume, clone, aside) else []
    steps += [f"zfs rename -u {aside.name} {volume}"] if aside.name != volume else []
    below = [child.rpartition("/")[2] for child, _ in tool.children(volume)] if there else []
    steps += [f"zfs rename {away}/{name} {volume}/{name}" for name in below]
    steps += [f"zfs destroy {away}"] if clone is not None else []
    reserved = [f"{key}={value}" for key, value in record.get("reserved", {}).items()]
    steps.append(" ".join(["zfs set", f"canmount={record.get('canmount') or 'on'}", *reserved, volume]))
    steps += [" ".join(["zfs", *words, volume]) for words in _let_in(record)]
    steps.append(f"zfs inherit {ASIDE} {volume}")
    return "; ".join(steps)


def _find(swap_id: str) -> tuple[Object | None, Object | None]:
    labelled = objects.sure(SWAP, ASIDE)
    for found, clone, aside in open_swaps(labelled):
        if found == swap_id:
            return clone, aside
    tool.refuse_blind()
    for each in labelled:
        for record in (each.record(prop, anywhere=True) or {} for prop in (SWAP, ASIDE)):
            pool, here = tool.pool_of(str(record.get("volume"))), tool.pool_of(each.name)
            if record.get("id") == swap_id and pool not in tool.pools():  # else this is only a copy
                cure = f"zpool export {here}, zpool import {here} {pool}; then again"
                raise StorageError(f"was made in pool {pool}, and is in {here} now", object=swap_id, cure=cure)
    return None, None


def begin(swap_id: str, snapshot: Object, volume: str) -> list[str]:
    """See `Provider.swap`. What fails is taken back here, as far as it can be. Returns notes for a person."""
    _check(swap_id, snapshot, volume)
    local = tool.settable(volume)
    seen = _mounted(volume)
    clone, aside = _beside(volume, swap_id)
    record = {
        "id": swap_id,
        "volume": volume,
        "canmount": local.get("canmount"),
        "mounted": [[mount.path, sorted(_options(mount))] for mount in seen],
        "reserved": {key: local[key] for key in _RESERVED if local.get(key, "none") != "none"},
        "left_in": {key: local.get(key) for key in objects.LEFT_OUT},
    }
    library.clone(clone, snapshot.name, {SWAP: objects.dump(record)})
    try:
        carried = [f"{key}={value}" for key, value in local.items() if _is_carried(key)]
        if carried:
            tool.change("set", *carried, clone, object=clone)
        notes = _delegate(volume, clone, aside)
        _unmount(volume)
        out = [f"{key}={value}" for key, value in objects.LEFT_OUT.items()]  # what is taken of it bars a commit
        tool.change("set", "canmount=noauto", *out, f"{ASIDE}={objects.dump(record)}", volume, object=volume)
        if record["reserved"]:  # after the record of it
            tool.change("set", *(f"{key}=none" for key in record["reserved"]), volume, object=volume)
        _reserve(clone, record)
        tool.change("rename", "-u", volume, aside, object=volume)
        tool.change("rename", "-u", clone, volume, object=clone)
        _move_children(aside, volume)
        _restore_canmount(volume, record)
        _make_mount_point(volume)
        _mount(volume, record)
    except BaseException:
        back(swap_id)
        raise
    return notes


def _delegate(volume: str, clone: str, aside: str) -> list[str]:
    """Who may do what to the volume may do it to what takes its place. Not worth a restore: what can't be is told."""
    try:
        given = tool.delegations(volume)
        for words in given:
            tool.change("allow", *words, clone, object=clone)
        there = tool.delegations(clone)  # and maybe what its creator gets by itself
        why = "" if all(words in there for words in given) else "it isn't the same there"
    except SnapshotterError as error:
        why = error.message
    if not why:
        return []
    return [
        f"what is delegated on {volume} may be lost by the swap ({why}): see `zfs allow {aside}`, and give it again"
    ]


def _check(swap_id: str, snapshot: Object, volume: str) -> None:
    here = tool.get(("type", "encryptionroot", "keystatus"), [volume])
    if volume not in here:
        raise StorageError("no such dataset", object=volume, cure="restore with --to, and copy")
    if here[volume]["type"][0] != "filesystem":
        raise PreconditionError("is a zvol", object=volume, cure="restore with --to, and copy")
    if "/" not in volume:
        cure = "restore with --to, and copy"
        raise PreconditionError("is its pool's own dataset, so nothing can take its place", object=volume, cure=cure)
    if tool.pool_of(snapshot.name) != tool.pool_of(volume):
        raise PreconditionError("is in another pool than the set", object=volume, cure="restore with --to, and copy")
    if here[volume].get("keystatus", ("-", ""))[0] == "unavailable":
        root = here[volume].get("encryptionroot", ("-", ""))[0]
        cure = f"zfs load-key {volume if root == '-' else root}"
        raise PreconditionError("its encryption key isn't loaded", object=volume, cure=cure)
    for other, clone, aside in open_swaps(objects.sure(SWAP, ASIDE, pool=tool.pool_of(volume))):
        records = [each.record(prop) for each, prop in ((clone, SWAP), (aside, ASIDE)) if each is not None]
        if other == swap_id or any(record and record.get("volume") == volume for record in records):
            raise BusyError(f"swap {other} is open", object=volume, cure="take it back or commit it")
    for mount in _mounted(volume):
        if mount.root != "/":
            cure = f"umount {mount.path}"
            raise BusyError(f"a directory of it is mounted at {mount.path}", object=volume, cure=cure)
        for below in mounts.mounts_below(mount.path):
            if mounts.by_hand(below):
                cure = f"umount {below.path}"
                raise BusyError(f"{below.source} is mounted in it at {below.path}", object=volume, cure=cure)


def back(swap_id: str) -> None:
    """See `Provider.swap_back`."""
    clone, aside = _find(swap_id)
    if clone is None and aside is None:
        return
    record = _record(clone, aside)
    volume = record["volume"]
    if clone is not None and clone.name == volume:
        if aside is None:
            raise StorageError("what it set aside is gone", object=swap_id, cure="commit it, to keep what is there")
        _unmount(clone.name)
        tool.change("rename", "-u", clone.name, _beside(volume, swap_id)[0], object=volume)
    if aside is not None:
        if _is_promoted(swap_id, volume, clone, aside):
            # A commit had come as far as promoting: what both share goes back to the older one.
            tool.change("promote", aside.name, object=aside.name)
        if aside.name != volume:
            if library.exists(volume):
                raise BusyError("something else was put there since the swap", object=volume, cure="rename that")
            tool.change("rename", "-u", aside.name, volume, object=aside.name)
        _restore_canmount(volume, record)
        if clone is not None and library.exists(_beside(volume, swap_id)[0]):
            _move_children(_beside(volume, swap_id)[0], volume)
    _make_mount_point(volume)
    _mount(volume, record)
    if clone is not None:
        _retire(_beside(volume, swap_id)[0], swap_id)
    if aside is not None:
        _reserve(volume, record)
        for words in _let_in(record):
            tool.change(*words, volume, object=volume)
        tool.change("inherit", ASIDE, volume, object=volume)


def _is_promoted(swap_id: str, volume: str, clone: Object | None, aside: Object) -> bool:
    """Whether a commit had come as far as making what is set aside a clone of its clone."""
    origin = _dataset_of(_origin(aside.name))
    return origin is not None and origin in (clone.name if clone else None, _beside(volume, swap_id)[0])


def _let_in(record: dict[str, Any]) -> list[list[str]]:
    """`zfs`'s words, but for the dataset, that let other tools go on with it as before it was set aside."""
    former = record.get("left_in", {})
    return [["inherit", key] if value is None else ["set", f"{key}={value}"] for key, value in former.items()]


def _retire(name: str, swap_id: str) -> None:
    """The clone that isn't in its origin's place any more: gone, or, where something was taken of it there, kept as
    what that hangs on, until `sweep` finds nothing left. Other tools were to go on with it as with its origin; now they
    aren't."""
    if not library.exists(name):
        return
    if not tool.snapshots_of(name):
        # A snapshot was taken meanwhile, or another mount namespace shows it: what is in its place is right all the
        # same, and its node must not stay stopped for that.
        with suppress(BusyError):
            tool.destroy(name)
            return
    for key in [key for key in tool.get_local(name) if ":" in key and not key.startswith(objects.PREFIX)]:
        tool.change("inherit", key, name, object=name)
    kept = ["canmount=noauto", "mountpoint=none", "reservation=none", "refreservation=none"]
    kept += [f"{key}={value}" for key, value in objects.LEFT_OUT.items()]
    record = {"id": swap_id, "pool": tool.pool_of(name)}
    tool.change("set", *kept, f"{KEPT}={objects.dump(record)}", name, object=name)
    tool.change("inherit", SWAP, name, object=name)


def sweep() -> tuple[list[str], list[str]]:
    """Remove the kept clones that nothing hangs on any more. Their names; and of those that no set of ours keeps, yet
    can't go, why."""
    removed, stay = [], []
    for found in objects.sure(KEPT):
        # By another name a person keeps it.
        if ".clone-" not in found.name or found.record(KEPT) is None:
            continue
        hanging = [name for name, _ in tool.snapshots_of(found.name)]
        if not hanging and not (seen := _mounted(found.name)):
            try:
                tool.destroy(found.name)
                removed.append(found.name)
            except BusyError:
                stay.append(
                    f"{found.name}, of a swap that was taken back, is in use, as where another mount namespace shows "
                    f"it: grep -l {found.name} /proc/*/mounts"
                )
        elif not hanging:
            stay.append(f"{found.name}, of a swap that was taken back, is mounted: umount {seen[0].path}")
        elif not any(each.birth for each in objects.read(hanging)):
            stay.append(
                f"{found.name}, of a swap that was taken back, stays as another tool has taken "
                f"{', '.join(hanging[:3])}: zfs destroy {hanging[0]} (each), and keep that tool from it"
            )
    return removed, stay


def commit(swap_id: str) -> None:
    """See `Provider.swap_commit`."""
    clone, aside = committable(swap_id)
    if clone is None:
        return
    volume = clone.name
    if aside is not None:
        while tool.snapshots_of(aside.name):
            try:
                tool.change("promote", volume, object=volume)
            except BusyError:
                raise BusyError(
                    "a snapshot of what it set aside is in use: being sent, or mounted in another mount namespace",
                    object=aside.name,
                    cure=f"pgrep -af 'zfs send'; grep -l {aside.name}@ /proc/*/mounts; then commit it again",
                ) from None
            except StorageError:
                if tool.snapshots_of(aside.name):  # else a dead run's child was just about it
                    raise
        tool.destroy(aside.name)
    tool.change("inherit", SWAP, volume, object=volume)


def committable(swap_id: str) -> tuple[Object | None, Object | None]:
    """The clone in its place and what is set aside, both None if there is no such swap. Raises BusyError, StorageError
    if it can't be committed now."""
    clone, aside = _find(swap_id)
    if clone is None and aside is None:
        return None, None
    volume = _record(clone, aside)["volume"]
    if clone is None or clone.name != volume or (aside is not None and aside.name == volume):
        raise StorageError("the swap was never finished", object=swap_id, cure="take it back")
    if aside is not None:
        if seen := _mounted(aside.name):
            where = seen[0].path
            raise BusyError(f"what it set aside is mounted at {where}", object=aside.name, cure=f"umount {where}")
        if below := tool.children(aside.name):
            raise BusyError(f"what it set aside holds {below[0][0]}", object=aside.name, cure="move that away")
        _refuse_dependents(clone.name, aside.name, swap_id)
    return clone, aside


def _refuse_dependents(clone: str, aside: str, swap_id: str) -> None:
    """Raise BusyError, naming them, if anything hangs on what is set aside that promoting the clone doesn't move."""
    origins: list[str] = []  # the snapshots that the clone goes back to, and what those's datasets go back to
    name = clone
    while (origin := _origin(name)) is not None:
        origins.append(origin)
        name = _dataset_of(origin) or ""
    branch = next((origin for origin in origins if _dataset_of(origin) == aside), None)
    theirs = tool.snapshots_of(aside)
    moved = [found for found, _ in theirs]
    moved = moved[: moved.index(branch) + 1] if branch in moved else []
    staying = [found for found, _ in theirs if found not in moved]
    if staying:
        raise BusyError(
            f"what it set aside still carries {_shown(staying)}, newer than what was restored",
            object=aside,
            cure="delete those sets (and other tools' snapshots), then commit it again",
        )
    # Another tool's place in its replication. They don't go along with what they were made of.
    if marks := tool.bookmarks_of(aside):
        raise BusyError(
            f"what it set aside still carries another tool's bookmarks {', '.join(marks[:5])}",
            object=aside,
            cure=f"zfs destroy {marks[0]} (each), if no replication goes on from there; then commit it again",
        )
    for mount in mounts.table():  # what is mounted can't go to another dataset
        if mount.source in moved and mounts.by_hand(mount):
            ours = [record for each in objects.read([mount.source]) for record in mounts_of(each).values()]
            attached = any(record.get("path") == mount.path for record in ours)
            cure = f"snapshotter release {mount.path}" if attached else f"umount {mount.path}"
            why = f"still carries {_shown([mount.source])}, which is mounted at {mount.path}"
            raise BusyError(f"what it set aside {why}", object=aside, cure=f"{cure}, then commit it again")
    names = {found.partition("@")[2] for found in moved}
    if twice := [found for found, _ in tool.snapshots_of(clone) if found.partition("@")[2] in names]:
        raise BusyError(
            f"both it and what it set aside have a snapshot called {twice[0].partition('@')[2]}",
            object=swap_id,
            cure=f"zfs rename one, or destroy it: zfs rename {twice[0]} ...",
        )


def _shown(names: Sequence[str]) -> str:
    """Sets by their ids, other tools' snapshots by their names."""
    births = {each.name: each.birth for each in objects.read(names)}
    shown = [birth.set_id if (birth := births.get(name)) else name for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


# ------------------------------------------------------------------------------------------------------------ steps


def _record(clone: Object | None, aside: Object | None) -> dict[str, Any]:
    record = (aside.record(ASIDE) if aside else None) or (clone.record(SWAP) if clone else None) or {}
    if not isinstance(record.get("volume"), str):
        name = (clone or aside).name  # type: ignore[union-attr]
        raise StorageError("the record of its swap can't be read", object=name, cure=f"zfs get all {name}")
    return record


def _beside(volume: str, swap_id: str) -> tuple[str, str]:
    """(what the clone is called while it isn't in the volume's place, what the volume is called when set aside)."""
    return f"{volume}.clone-{swap_id}", f"{volume}.aside-{swap_id}"


def _move_children(source: str, target: str) -> None:
    """Datasets below are volumes of their own: they stay below what is in the volume's place. What is mounted stays."""
    for child, kind in tool.children(source):
        stays = ["-u"] if kind == "filesystem" else []  # with it `zfs rename` knows no zvol
        tool.change("rename", *stays, child, f"{target}/{child.rpartition('/')[2]}", object=child)


def _origin(dataset: str) -> str | None:
    """The snapshot that this is a clone of."""
    found = tool.get(("origin",), [dataset]).get(dataset, {}).get("origin", ("-", ""))[0]
    return None if found in ("", "-") else found


def _dataset_of(snapshot: str | None) -> str | None:
    return snapshot.partition("@")[0] if snapshot and "@" in snapshot else None


def _is_carried(key: str) -> bool:
    return key not in _NOT_CARRIED and not key.startswith(objects.PREFIX)


def _mounted(dataset: str) -> list[mounts.Mount]:
    return [mount for mount in mounts.table() if mount.fstype == "zfs" and mount.source == dataset]


def _options(mount: mounts.Mount) -> set[str]:
    """Those of one mount itself, as far as they aren't the default."""
    return set(mount.options) & {"ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime"}


def _unmount(dataset: str) -> None:
    tops = [mount.path for mount in _mounted(dataset)]
    for mount in mounts.table():
        # What somebody looked at below .zfs is mounted by the kernel, until nobody has for five minutes.
        below = any(mount.path.startswith(f"{top}/.zfs/snapshot/") for top in tops)
        if below and mount.source.startswith(f"{dataset}@"):
            mounts.unmount(mount.path)
    for path in reversed(tops):
        mounts.unmount(path)


def _restore_canmount(volume: str, record: dict[str, Any]) -> None:
    # Not inheritable (`zfs inherit canmount` is an error), so it is set to what it was, or to its default.
    tool.change("set", f"canmount={record.get('canmount') or 'on'}", volume, object=volume)


def _reserve(dataset: str, record: dict[str, Any]) -> None:
    if reserved := record.get("reserved"):
        tool.change("set", *(f"{key}={value}" for key, value in reserved.items()), dataset, object=dataset)


def _make_mount_point(volume: str) -> None:
    """`zfs rename` removes a mount point that it finds empty; who unmounted it before the swap will mount it again."""
    point = tool.get(("mountpoint",), [volume]).get(volume, {}).get("mountpoint", ("", ""))[0]
    if point.startswith("/"):
        os.makedirs(point, exist_ok=True)


def _mount(volume: str, record: dict[str, Any]) -> None:
    """Mounted where it was before the swap."""
    for path, options in record.get("mounted", ()):
        if not any(mount.path == path for mount in _mounted(volume)):
            os.makedirs(path, exist_ok=True)
            mounts.mount(MountSpec(volume, "zfs", tuple(options)), path)
