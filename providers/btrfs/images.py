"""What a store of ours holds, read back: sets and their images, attachments. Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from typing import Any

from snapshotter.core.errors import NotFoundError, PreconditionError, StorageError
from snapshotter.core.labels import MARK_NAMES, decode_birth
from snapshotter.core.model import SET_ID, Access, Attachment, Birth, ImageState, Purpose, Snapshot, Volume
from snapshotter.host.btrfs import DIRECTORY, STORE, FileSystem
from snapshotter.host.btrfs_store import Store, open_directory, read_object, read_record, subvolume_at

NAME = "btrfs"
_UUID_PART = 13


def key(fs: FileSystem) -> str:
    """What the ids of this file system's volumes begin with."""
    return key_of(fs.uuid)


def key_of(uuid: str) -> str:
    return uuid[:_UUID_PART]


def path(volume: str) -> str:
    """A volume's path from the top level."""
    return volume.partition(":")[2]


def member(birth: Birth, volume: Volume) -> int:
    """The volume's number in the set. Raises PreconditionError."""
    for number, each in enumerate(birth.members):
        if (each.provider, each.volume) == (NAME, volume.id):
            return number
    raise PreconditionError("is no member of the set", object=volume.id)


def snapshots(store: Store, set_id: str | None = None) -> Iterator[Snapshot]:
    """Those of one set, or all."""
    for name in [set_id] if set_id is not None else store.names("sets"):
        fd = open_directory(f"sets/{name}", store.fd) if store.fd >= 0 and SET_ID.fullmatch(name) else None
        if fd is not None:
            try:
                yield from of_set(key(store.fs), fd, name)
            finally:
                os.close(fd)


def of_set(key: str, fd: int, set_id: str) -> Iterator[Snapshot]:
    """Those whose set's directory `fd` is."""
    birth = decode_birth((read_record(fd, "birth") or b"").decode("ascii", "replace"))
    if birth is None or birth.set_id != set_id:
        return
    content = read_object(fd, "marks")
    read = (content or {}).get("marks", {})
    marks_known = isinstance(read, dict) and (content is not None or read_record(fd, "marks") is None)
    read = read if marks_known else {}
    marks = {name: value for name, value in read.items() if name in MARK_NAMES and isinstance(value, str)}
    order = read_record(fd, "order") or b""
    for number, member in enumerate(birth.members):
        if member.provider != NAME or member.volume.partition(":")[0] != key:
            continue
        why = lacks(fd, str(number))
        yield Snapshot(
            provider=NAME,
            id=f"{key}:/{STORE}/sets/{set_id}/{number}",
            birth=birth.of_member(number),
            state=ImageState.INVALID if why else ImageState.READY,
            marks=marks,
            order=int(order) if order.isdigit() else 0,
            why=why,
            marks_known=marks_known,
        )


def keys_of_set(store: Store, directory: str) -> set[str]:
    """Keys of the file systems that the set whose directory this is has members on; none if it isn't there."""
    fd = open_directory(directory, store.fd)
    if fd is None:
        return set()
    try:
        birth = decode_birth((read_record(fd, "birth") or b"").decode("ascii", "replace"))
    finally:
        os.close(fd)
    members = birth.members if birth is not None else ()
    return {key(store.fs), *(each.volume.partition(":")[0] for each in members if each.provider == NAME)}


def keys_of_attachment(store: Store, attachment_id: str) -> set[str]:
    """Keys of the file systems that may hold parts of the attachment, those of its set; none if no part is here."""
    keys: set[str] = set()
    for kind in ("attachments", "trash"):
        for name in store.names(kind):
            if name.partition(".")[0] == attachment_id:
                record = store.object(f"{kind}/{name}", "attachment") or {}
                keys |= {key(store.fs)} | keys_of_set(store, f"sets/{record.get('set_id')}")
    return keys


def keys_of_swap(store: Store, swap_id: str) -> set[str]:
    """The key of the file system if the swap, which is on one, is on this."""
    names = [*store.names("swaps"), *store.names("trash")]
    return {key(store.fs)} if any(name.partition(".")[0] == swap_id for name in names) else set()


def lacks(at: int, name: str) -> str:
    """Why this is no image, for a person; '' if it is one. The kernel's word."""
    found = subvolume_at(at, name)
    if found is None:
        return "its snapshot is gone"
    if not found.read_only:
        return "its snapshot was made writable, so it may have been changed"
    return "" if found.origin else "its snapshot is a snapshot of nothing"


def open_image(store: Store, snapshot: Snapshot, stack: ExitStack) -> int:
    """A descriptor of it, until the stack ends. Raises NotFoundError, StorageError (no valid image)."""
    set_id, number = snapshot.birth.set_id, snapshot.birth.member
    found = next((each for each in snapshots(store, set_id) if each.birth.member == number), None)
    if found is None:
        raise NotFoundError("no such set", object=set_id, cure="`snapshotter list` shows all")
    if found.state is not ImageState.READY:
        raise StorageError(f"has no valid image: {found.why}", object=set_id, cure="restore another set")
    fd = os.open(f"sets/{set_id}/{number}", DIRECTORY, dir_fd=store.fd)
    stack.callback(os.close, fd)
    return fd


def attachments(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    """(directory, record) of each attachment's part here."""
    for name in store.names("attachments"):
        record = store.object(f"attachments/{name}", "attachment")
        if record is not None and record.get("id") == name.partition(".")[0]:
            yield f"attachments/{name}", record


def attachment(record: Mapping[str, Any]) -> Attachment:
    """Raises KeyError, ValueError, TypeError or IndexError for what is no whole record."""
    maker, since = record["maker"], record["since"]
    held = False
    if maker is not None:
        from snapshotter.host import processes

        held = processes.alive((maker[0], maker[1]))
    return Attachment(
        id=str(record["id"]),
        provider=NAME,
        set_id=str(record["set_id"]),
        member=int(record["member"]),
        path=str(record["path"]),
        access=Access(record["access"]),
        purpose=Purpose(record["purpose"]),
        since=datetime.fromisoformat(since) if since else None,
        held=held,
    )
