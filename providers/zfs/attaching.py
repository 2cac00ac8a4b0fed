"""Snapshots made usable: a clone that is mounted, or the snapshot itself, read-only, and what hangs on a snapshot. Must
know no set but as what is attached. The core mounts; nothing here goes through .zfs.

A clone carries its record from birth. A read-only attachment is written on the snapshot, under a lock, as several may
come at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from providers.zfs import library, objects, tool
from providers.zfs.objects import CLONE, KEPT, MOUNTS, SWAP, Object
from snapshotter.core.errors import BusyError, NotFoundError
from snapshotter.core.model import Access, Attachment, Birth, MountSpec, Purpose
from snapshotter.host import mounts
from snapshotter.host.locks import Locks

PATIENCE_S = 10.0
#: Local properties of an origin without which its clone would show other attributes or modes.
_SHOWN_BY = ("acltype", "xattr", "aclmode", "aclinherit", "exec", "setuid", "devices")


def attach(
    source: Object, birth: Birth, attachment_id: str, access: Access, destination: str, purpose: Purpose
) -> MountSpec:
    """See `Provider.attach`; `source` is the snapshot as it is now."""
    from snapshotter.host import processes

    record = {
        "id": attachment_id,
        "set_id": birth.set_id,
        "member": birth.member,
        "path": destination,
        "access": str(access),
        "purpose": str(purpose),
        "since": None,
        "maker": processes.identity(os.getpid()),
        "pool": tool.pool_of(source.name),
    }
    if access is Access.READ_ONLY:
        with Locks([lock(source.name)], wait_s=PATIENCE_S):
            there = _read_mounts(source.name)
            if attachment_id in there:
                raise BusyError("is there already", object=attachment_id)
            _write_mounts(source.name, {**there, attachment_id: record})
        return MountSpec(source.name, objects.PROVIDER, ("ro", "nosuid", "nodev"))
    local = tool.get_local(source.dataset)
    # Beside its origin, so that it inherits the same; or in the pool whose own dataset that is.
    parent = source.dataset.rpartition("/")[0] or source.dataset
    clone = f"{parent}/snapshotter-{attachment_id}-{birth.member}"
    library.clone(clone, source.name, {CLONE: objects.dump(record), **objects.LEFT_OUT}, "legacy")
    if shown := [f"{key}={local[key]}" for key in _SHOWN_BY if key in local]:
        tool.change("set", *shown, clone, object=clone)
    return MountSpec(clone, objects.PROVIDER)


def settle(attachment_id: str, since: datetime) -> None:
    """See `Provider.settle`."""
    stamp = {"since": since.astimezone(UTC).isoformat(), "maker": None}
    there = False
    for found in objects.sure(CLONE, MOUNTS):
        record = found.record(CLONE)
        if record is not None and record.get("id") == attachment_id:
            tool.change("set", f"{CLONE}={objects.dump({**record, **stamp})}", found.name, object=found.name)
            there = True
        if attachment_id in mounts_of(found):
            with Locks([lock(found.name)], wait_s=PATIENCE_S):
                now = _read_mounts(found.name)
                if attachment_id in now:
                    _write_mounts(found.name, {**now, attachment_id: {**now[attachment_id], **stamp}})
                    there = True
    if not there:
        tool.refuse_blind()
        raise NotFoundError("no such attachment", object=attachment_id)


def listed() -> Iterator[Attachment]:
    """See `Provider.attachments`."""
    for found in objects.labelled((CLONE, MOUNTS)):
        record = found.record(CLONE)
        for each in [*([record] if record is not None else []), *mounts_of(found).values()]:
            try:
                yield _attachment(each)
            except (KeyError, ValueError, TypeError, IndexError):
                continue
    tool.refuse_blind()


def detach(attachment_id: str) -> None:
    """See `Provider.detach`."""
    there = False
    for found in objects.sure(CLONE, MOUNTS):
        record = found.record(CLONE)
        if record is not None and record.get("id") == attachment_id:
            there = True
            refuse_if_mounted(found.name, attachment_id)
            _refuse_foreign(found.name, attachment_id)
            tool.destroy(found.name)
        if attachment_id in mounts_of(found):
            there = True
            with Locks([lock(found.name)], wait_s=PATIENCE_S):
                recorded = _read_mounts(found.name)
                refuse_if_mounted(found.name, attachment_id, str(recorded.get(attachment_id, {}).get("path", "")))
                recorded.pop(attachment_id, None)
                _write_mounts(found.name, recorded)
    if not there:
        tool.refuse_blind()


def lock(snapshot: str) -> str:
    """The name of the lock under which the attachments on a snapshot change."""
    return f"zfs-mounts:{snapshot}"


def mounts_of(found: Object) -> dict[str, dict[str, Any]]:
    """The read-only attachments that are recorded on a snapshot, by id; none that came with a copy of its pool."""
    recorded = {key: value for key, value in (found.record(MOUNTS) or {}).items() if isinstance(value, dict)}
    here = tool.pool_of(found.name)
    return {key: value for key, value in recorded.items() if value.get("pool", here) == here}


def _read_mounts(snapshot: str) -> dict[str, dict[str, Any]]:
    return next((mounts_of(found) for found in objects.read([snapshot])), {})


def _write_mounts(snapshot: str, recorded: Mapping[str, Any]) -> None:
    if recorded:
        tool.change("set", f"{MOUNTS}={objects.dump(recorded)}", snapshot, object=snapshot)
    else:
        tool.change("inherit", MOUNTS, snapshot, object=snapshot)


def _attachment(record: Mapping[str, Any]) -> Attachment:
    maker, since = record["maker"], record["since"]
    held = False
    if maker is not None:
        from snapshotter.host import processes

        held = processes.alive((maker[0], maker[1]))
    return Attachment(
        id=str(record["id"]),
        provider=objects.PROVIDER,
        set_id=str(record["set_id"]),
        member=int(record["member"]),
        path=str(record["path"]),
        access=Access(record["access"]),
        purpose=Purpose(record["purpose"]),
        since=datetime.fromisoformat(since) if since else None,
        held=held,
    )


def attached(set_id: str, record: Mapping[str, Any]) -> BusyError:
    """Why a set with this attachment can't go."""
    where = record.get("path")
    return BusyError(f"is attached at {where} ({record.get('id')})", object=set_id, cure=f"snapshotter release {where}")


def cloned(set_id: str, snapshot: Object) -> BusyError:
    """What hangs on a snapshot: attachments, swaps and kept clones of ours by their names, else another's clone."""
    for clone in objects.read(snapshot.clones):
        if (record := clone.record(CLONE)) is not None:
            return attached(set_id, record)
        if (record := clone.record(SWAP)) is not None:
            cure = "take the swap back, or commit it"
            return BusyError(f"stands in its origin's place by swap {record.get('id')}", object=set_id, cure=cure)
        if clone.record(KEPT) is not None:
            kept = [name for name, _ in tool.snapshots_of(clone.name)]
            if not kept:
                return BusyError(f"is what {clone.name} was cloned from", object=set_id, cure="snapshotter reap")
            sets = [birth.set_id for each in objects.read(kept) if (birth := each.birth) is not None]
            first = ", ".join((sets or kept)[:3])
            return BusyError(f"is what {first} was taken upon", object=set_id, cure="delete that first")
    name = ", ".join(snapshot.clones[:3])
    return BusyError(f"has a clone: {name}", object=set_id, cure=f"zfs promote or zfs destroy {name}")


def refuse_if_mounted(name: str, what: str, only_at: str = "") -> None:
    """Raise BusyError if somebody has this dataset or snapshot mounted (at that place)."""
    for mount in mounts.table():
        if mount.source == name and mounts.by_hand(mount) and only_at in ("", mount.path):
            raise BusyError(f"is mounted at {mount.path}", object=what, cure=f"umount {mount.path}")


def _refuse_foreign(clone: str, what: str) -> None:
    """Another tool's snapshot of our clone isn't ours to destroy; still less is a set that a person brought there by
    promoting it, or took there."""
    if found := [name for name, _ in tool.snapshots_of(clone)]:
        births = [birth for each in objects.read(found) if (birth := each.birth) is not None]
        moved = [birth for birth in births if birth.members[birth.member].volume != clone]
        if moved:
            volume = moved[0].members[moved[0].member].volume
            sets = ", ".join(birth.set_id for birth in moved[:3])
            why = f"was promoted, and carries the sets {sets} of {volume} now"
            raise BusyError(why, object=what, cure=f"zfs promote {volume}, then again")
        if births:
            sets = ", ".join(birth.set_id for birth in births[:3])
            raise BusyError(f"sets were taken of it: {sets}", object=what, cure=f"snapshotter delete {sets}")
        raise BusyError(
            f"another tool has taken {', '.join(found[:3])}", object=what, cure=f"zfs destroy {found[0]}, then again"
        )
