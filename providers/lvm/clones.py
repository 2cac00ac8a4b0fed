"""Clones: a thin snapshot of a thin image; for a classic one a dm snapshot over it, with a volume of its own for what
is written. Must know nothing of how images are made.

A clone is always writable, also for read-only use: ext4 and XFS have to replay their journal at the first mount, and a
read-only device lets them not. The image's own bytes stay as they are.

The clone's record is in its tags (for a classic one in those of the volume for its writes), so it is found and removed
also after a reboot, when the device itself is gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from providers.lvm import room
from providers.lvm.claims import luks_uuid
from providers.lvm.commands import Group, changing
from providers.lvm.images import find_image, of_set
from providers.lvm.reports import (
    NAME,
    PREFIX,
    QUOTA,
    READING_S,
    Row,
    attachment_record,
    find,
    hanging_on,
    maker_lives,
    maker_tag,
    suspended_with,
    tag,
    to_text,
    untagging,
)
from snapshotter.core.command import run
from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError, StorageError
from snapshotter.core.model import ATTACHMENT_ID, Access, Attachment, MountSpec, Purpose, Snapshot
from snapshotter.host import block

CRYPTTAB = "/etc/crypttab"
UDEV = "/run/udev"
#: An active clone has its origin's UUID and label: udev would let /dev/disk/by-uuid lead to it, and the next `mount
#: UUID=` would mount the clone. (Debian's 60-persistent-storage-dm.rules, elsewhere 13-dm-disk.rules, heed the flag.)
_RULES = "".join(
    f'ACTION=="add|change", KERNEL=="dm-*", ATTR{{dm/name}}=="{name}", '
    'ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}="1", ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}="1"\n'
    for name in ("snapshotter-a*", f"*-a{'[0-9]' * 8}t{'[0-9]' * 6}z--??????--*")
)
_SINCE = "since"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECTOR = 512


class Clone(msgspec.Struct, frozen=True):
    """What is asked for."""

    id: str
    snapshot: Snapshot
    access: Access
    destination: str
    purpose: Purpose

    @property
    def name(self) -> str:
        """Of the volume that carries its record."""
        return f"{self.id}-{self.snapshot.birth.member}"


def _dm_name(name: str) -> str:
    return f"snapshotter-{name}"


def _dm_uuid(name: str) -> str:
    return f"SNAPSHOTTER-{name}"


def _crypt_name(name: str) -> str:
    return f"snapshotter-{name}-crypt"


# ------------------------------------------------------------------------------------------------------- attaching


def attach(clone: Clone, rows: Sequence[Row], size: int | None) -> MountSpec:
    """Make the clone. Raises NotFoundError (no such image), BusyError (attached already), StorageError (no valid image,
    no room), PreconditionError (a file system whose copy can't be mounted beside it, no key)."""
    if not ATTACHMENT_ID.fullmatch(clone.id):
        raise ValueError(f"{clone.id!r} is no id")
    born = clone.snapshot.birth
    image = find_image(rows, clone.snapshot)
    for row in rows:
        record = attachment_record(row)
        if record is not None and (record["id"], record["member"]) == (clone.id, born.member):
            raise BusyError("exists already", object=clone.id, cure="choose another id")
    record = {
        "id": clone.id,
        "set_id": born.set_id,
        "member": born.member,
        "path": clone.destination,
        "access": str(clone.access),
        "purpose": str(clone.purpose),
    }
    tags = [tag(f"attachment{k}", chunk) for k, chunk in enumerate(to_text(record))] + [maker_tag()]
    words = [word for text in tags for word in ("--addtag", text)]
    room.check_group(image, tags, 1)
    _hide_from_udev()
    with changing(image.vg) as group:
        if image.thin:
            group.lvm(
                *("lvcreate", "-y", "-s", "-prw", "-ky", "-K", "-ay", "-n", clone.name),
                *(*room.PAST_THRESHOLD, *words, image.id),
                object=image.id,
                suspends=suspended_with(rows, image),
                born=clone.name,
            )
            device = f"/dev/{image.vg}/{clone.name}"
        else:
            device = _over(group, image, clone.name, words, rows, size)
        device = _decrypted(group, device, clone.name, born.set_id)
    return _mount_spec(device, clone, image)


def _hide_from_udev() -> None:
    """Rules for this boot: clones are found by their names alone, never by the UUID or label that they share."""
    if not os.path.isdir(UDEV):
        return
    path = f"{UDEV}/rules.d/12-snapshotter.rules"
    try:
        with open(path, encoding="ascii") as file:
            if file.read() == _RULES:
                return
    except OSError:
        pass
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        with open(f"{path}.new", "w", encoding="ascii") as file:
            file.write(_RULES)
        os.chmod(f"{path}.new", 0o644)
        os.rename(f"{path}.new", path)
    except OSError as error:
        raise PreconditionError(f"can't write udev's rule for clones: {error.strerror}", object=path) from None
    run(["udevadm", "control", "--reload"], timeout=60)


def _over(group: Group, image: Row, name: str, words: list[str], rows: Sequence[Row], size: int | None) -> str:
    """A writable device over a classic snapshot; its writes go to a volume of ours (dm-snapshot's persistent store)."""
    if not image.active:  # and so is its origin: production's, which somebody may have deactivated for a reason
        raise PreconditionError(
            "is not active, so whether it has overflowed can't be asked",
            object=image.id,
            cure=f"lvchange -ay {image.vg}/{image.origin}",
        )
    # `size` of a classic snapshot's row is its store's. Its device is as large as its origin was then.
    length = block.size_bytes(block.number_of(image.device) or "")
    if not length:
        raise StorageError("has no device", object=image.id, cure=f"lvchange -ay {image.vg}/{image.origin}")
    origin = find(rows, f"{image.vg}/{image.origin}")
    store = room.store_size(origin, image.vg_free, size, _waiting(rows, image, name))
    group.lvm(
        *("lvcreate", "-y", "-Wy", "-Zy", "-L", f"{store}b", "-n", name, *words, image.vg), object=image.vg, born=name
    )
    table = f"0 {length // _SECTOR} {_over_it(image.device, f'/dev/{image.vg}/{name}')}"
    made = _dm_name(name)
    group.other("dmsetup", "create", made, "--uuid", _dm_uuid(name), "--table", table, object=image.id)
    return f"/dev/mapper/{made}"


def _waiting(rows: Sequence[Row], image: Row, name: str) -> list[Row]:
    """The origins of the set's other members in this group whose clones are still to be made for that attachment."""
    set_id, attachment_id = image.name.rpartition("-")[0], name.rpartition("-")[0]
    made = {part.name.rpartition("-")[2] for part in parts(rows, attachment_id)}
    others = [row for row in of_set(rows, set_id) if row.vg == image.vg and row.name != image.name and not row.thin]
    wanted = {row.origin for row in others if row.name.rpartition("-")[2] not in made}
    return [row for row in rows if row.vg == image.vg and row.name in wanted]


def _mount_spec(device: str, clone: Clone, image: Row) -> MountSpec:
    if not os.path.exists(device):
        raise StorageError(
            f"its clone has no device {device}", object=image.id, cure="volume_list in lvm.conf(5) may keep it inactive"
        )
    found = run(["blkid", "-p", "-o", "value", "-s", "TYPE", device], timeout=60)
    fstype = found.stdout.strip()
    if found.code == 8:  # blkid(8): ambivalent
        raise StorageError(
            "blkid finds signs of more than one file system in it", object=image.id, cure="wipefs shows them"
        )
    if not fstype:
        raise StorageError("blkid finds no file system in it", object=image.id, cure="restore another set")
    if fstype == "btrfs":
        raise PreconditionError(
            "holds a btrfs: mounting a copy of it beside its origin would confuse the kernel, as both have one UUID",
            object=image.id,
            cure="take such a path with --provider btrfs",
        )
    options = ["ro", "nosuid", "nodev"] if clone.access is Access.READ_ONLY else []
    if fstype == "xfs":
        options.append("nouuid")
    options += [option for option in image.labels.get(QUOTA, "").split("&") if option]
    return MountSpec(device, fstype, tuple(options))


def _decrypted(group: Group, device: str, name: str, set_id: str) -> str:
    """The device to mount: the clone itself, or, where it is LUKS, what is in it, opened with the key file that the
    origin has in crypttab(5). Raises PreconditionError without one."""
    uuid = luks_uuid(device)
    if uuid is None:
        return device
    key = _key_file(uuid)
    if key is None:
        raise PreconditionError(
            f"is encrypted (LUKS {uuid}), and {CRYPTTAB} names no key file for that",
            object=set_id,
            cure=f"add a line to {CRYPTTAB}: NAME UUID={uuid} KEYFILE luks,noauto",
        )
    crypt = _crypt_name(name)
    group.other("cryptsetup", "open", "--type", "luks", "--key-file", key, device, crypt, object=set_id)
    return f"/dev/mapper/{crypt}"


def _key_file(uuid: str) -> str | None:
    try:
        with open(CRYPTTAB, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.split() for line in file if not line.lstrip().startswith("#")]
    except OSError:
        return None
    for words in lines:
        if len(words) < 3 or not words[2].startswith("/"):
            continue
        source = words[1]
        same = source.upper() == f"UUID={uuid}".upper()
        if same or (source.startswith("/") and os.path.exists(source) and luks_uuid(source) == uuid):
            return words[2]
    return None


# -------------------------------------------------------------------------------------------------- what there is


def parts(rows: Sequence[Row], attachment_id: str) -> list[Row]:
    return [row for row in rows if (record := attachment_record(row)) is not None and record["id"] == attachment_id]


def listed(rows: Sequence[Row]) -> Iterator[Attachment]:
    for row in rows:
        record = attachment_record(row)
        if record is None:
            continue
        try:
            yield _attachment(row, record)
        except (KeyError, ValueError, TypeError):
            continue


def _attachment(row: Row, record: dict[str, Any]) -> Attachment:
    since = row.labels.get(_SINCE)
    name = f"{record['id']}-{record['member']}"  # of the device over a classic image, also where its store was renamed
    up = not row.thin and any(device.dm_name == _dm_name(name) for device in block.mapped())
    return Attachment(
        id=str(record["id"]),
        provider=NAME,
        set_id=str(record["set_id"]),
        member=record["member"],
        path=str(record["path"]),
        access=Access(record["access"]),
        purpose=Purpose(record["purpose"]),
        since=_EPOCH + timedelta(microseconds=int(since)) if since else None,
        held=since is None and maker_lives(row),
        lost=_lost(row, name) if up else "",
        by_hand=_by_hand(row, name, f"/dev/{row.vg}/{record['set_id']}-{record['member']}", up),
    )


def _by_hand(row: Row, name: str, image: str, up: bool) -> str:
    """`up`: the device over a classic image is there, as where it was but unmounted."""
    if row.thin:
        return f"lvchange -ay -K {row.id} && mount {row.device}"
    made = _dm_name(name)
    if up:
        return f"mount /dev/mapper/{made}"
    table = f"0 $(blockdev --getsz {image}) {_over_it(image, row.device)}"
    create = f'dmsetup create {made} --uuid {_dm_uuid(name)} --table "{table}"'
    return f"{create} && mount /dev/mapper/{made}"


def _over_it(image: str, store: str) -> str:
    """dm-snapshot's part of a table: what is read, where what is written goes, and that it stays there (P)."""
    return f"snapshot {image} {store} P {room.CHUNK // _SECTOR}"


def _lost(row: Row, name: str) -> str:
    """A dm snapshot whose store is full can be neither read nor written, for good (snapshot.rst)."""
    words = run(["dmsetup", "status", "--noflush", _dm_name(name)], timeout=READING_S).stdout.split()
    if words[2:3] != ["snapshot"] or words[3:4] not in (["Invalid"], ["Overflow"]):
        return ""
    return f"what was written to it filled {row.id}: more room is needed in {row.vg}"


def settle(rows: Sequence[Row], attachment_id: str, since: datetime) -> None:
    """Durably record `since` and forget the maker. Raises NotFoundError."""
    found = parts(rows, attachment_id)
    if not found:
        raise NotFoundError("no such attachment", object=attachment_id)
    stamp = tag(_SINCE, str((since - _EPOCH) // timedelta(microseconds=1)))
    for row in found:
        old = [text for text in row.tags if text.startswith((tag(_SINCE, ""), tag("maker", ""))) and text != stamp]
        words = [word for text in old for word in ("--deltag", text)]
        if stamp not in row.tags:
            words += ["--addtag", stamp]
        if words:
            with changing(row.vg) as group:
                group.lvm("lvchange", *words, row.id, object=attachment_id)


def detach(rows: Sequence[Row], attachment_id: str) -> None:
    """Remove every part; a renamed one only loses our tags; absent is done. Raises BusyError while one is mounted or
    open."""
    if not ATTACHMENT_ID.fullmatch(attachment_id):
        raise ValueError(f"{attachment_id!r} is no id")
    found = parts(rows, attachment_id)
    for row in found:
        twin = next((each for each in found if each.name == row.name and each.vg != row.vg), None)
        if twin is not None:  # as vgimportclone makes them: one is of a copied group
            raise BusyError(
                f"{row.id} and {twin.id} are both its part, as in a copied group",
                object=attachment_id,
                cure="take our tags (`lvs -o lv_tags`) from the copy: lvchange --deltag TAG",
            )
    for row in found:
        record = attachment_record(row)
        assert record is not None
        name = f"{attachment_id}-{record['member']}"
        theirs = row.name != name  # renamed by a person, who wants to keep it
        if not theirs and (other := hanging_on(rows, row)) is not None:
            raise BusyError(f"{other.id} hangs on it", object=attachment_id, cure=f"lvremove {other.id}, if unneeded")
        with changing(row.vg) as group:
            there = {device.dm_name: device for device in block.mapped()}
            over = there.get(_dm_name(name))
            if over is not None and over.dm_uuid == _dm_uuid(name) and theirs:
                raise BusyError(
                    f"{row.id}, renamed by somebody, holds what was written to {over.dm_name}, and is nothing alone",
                    object=attachment_id,
                    cure=f"lvrename {row.vg} {row.name} {name}",
                )
            if _crypt_name(name) in there:
                group.other("cryptsetup", "close", _crypt_name(name), object=attachment_id)
            if theirs:
                group.lvm("lvchange", *untagging(row, PREFIX), row.id, object=row.id)
                continue
            if over is not None and over.dm_uuid == _dm_uuid(name):
                group.other("dmsetup", "remove", "--retry", _dm_name(name), object=attachment_id)
            group.remove(row, half_made=True)
