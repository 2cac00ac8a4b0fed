"""Which logical volume a mounted file system lies on, and whether a clone of that volume alone could be opened and
mounted as it is. Changes nothing, runs nothing."""

from __future__ import annotations

import msgspec

from providers.lvm.reports import volume_of
from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.host import block
from snapshotter.host.mounts import Mount

_COPY = "use --provider copy"
_SUPERBLOCK = (0x38, 2), (0x5C, 4), (0xE0, 4)
_LUKS = b"LUKS\xba\xbe"


class Place(msgspec.Struct, frozen=True):
    """A volume (its id), and what lies between the file system and it."""

    volume: str
    above: tuple[block.Device, ...]

    @property
    def luks(self) -> str:
        """The UUID that device-mapper gives the LUKS device on it; '' where the file system is on the volume itself."""
        return self.above[0].dm_uuid if self.above else ""


def below(mount: Mount) -> Place | None:
    """The volume nearest to the file system; None if it lies on none."""
    number = block.number_of(mount.source) if mount.fstype == "btrfs" else mount.device
    if number is None or number.startswith("0:"):
        return None
    chain = block.chain(number)
    for depth, device in enumerate(chain):
        volume = volume_of(device.dm_name, device.dm_uuid)
        if volume is not None:
            return Place(volume, tuple(chain[:depth]))
    return None


def refuse(place: Place, mount: Mount, path: str) -> None:
    """Raises PreconditionError where a clone of the volume would not be what is mounted here."""
    for device in place.above:
        if device.partition or device.dm_uuid.startswith("part"):
            raise PreconditionError(
                f"lies on {device.dm_name or device.name}, a partition of the logical volume {place.volume}: a clone's "
                "partitions would have to be mapped too, which snapshotter does not",
                object=path,
                cure=f"put the file system on a logical volume of its own, or {_COPY}",
            )
    if place.above and (len(place.above) > 1 or not place.luks.startswith("CRYPT-LUKS")):
        layers = ", ".join(device.dm_name or device.name for device in place.above)
        raise PreconditionError(
            f"has {layers} between it and the logical volume {place.volume}, which a clone would not have",
            object=path,
            cure=f"only one LUKS device may lie there; {_COPY}",
        )
    if mount.fstype == "btrfs":
        raise PreconditionError(
            f"is a btrfs, and a copy of its volume {place.volume} would have its UUID, which the kernel confuses",
            object=path,
            cure="use --provider btrfs",
        )
    if other := sorted(each for each in mount.super_options if each.startswith(("logdev=", "rtdev="))):
        raise PreconditionError(
            f"keeps a part of itself on another device ({other[0]}), which no snapshot of {place.volume} has",
            object=path,
            cure=_COPY,
        )
    if mount.fstype in ("ext3", "ext4") and has_journal_elsewhere(mount.device):
        raise PreconditionError(
            f"keeps its journal on another device, which no snapshot of {place.volume} has", object=path, cure=_COPY
        )
    if mount.root != "/":
        raise PreconditionError(
            f"is seen through a mount of its directory {mount.root} alone, so a restore could not find its place",
            object=path,
            cure=f"mount {place.volume} as a whole too, and name the path there",
        )


def has_journal_elsewhere(number: str) -> bool:
    """Of the ext4 on the device of this number: what is mounted doesn't tell. (ext4(5) and the kernel's
    Documentation/filesystems/ext4: superblock at 1024, s_magic 0x38, s_feature_compat 0x5C, s_journal_inum 0xE0.)"""
    found = block.device(number)
    try:
        with open(f"/dev/{found.name}" if found else "", "rb") as file:
            file.seek(1024)
            head = file.read(1024)
    except OSError:
        return False  # not root, who alone can take it
    magic, compat, journal = (int.from_bytes(head[at : at + size], "little") for at, size in _SUPERBLOCK)
    return magic == 0xEF53 and bool(compat & 0x4) and journal == 0


def check_header(device: str, luks: str) -> None:
    """Is the header of this LUKS device (its UUID in device-mapper) on the volume at `device`? A clone is opened with
    what is there. Raises PreconditionError, StorageError."""
    uuid = luks_uuid(device)
    if uuid is None or uuid.replace("-", "") not in luks:
        raise PreconditionError(
            "is encrypted, and its LUKS header isn't on it: no clone of it could be opened", object=device, cure=_COPY
        )


def luks_uuid(device: str) -> str | None:
    """Of the header (the same place in LUKS1 and LUKS2; cryptsetup's on-disk format, 168: uuid[40])."""
    try:
        with open(device, "rb") as file:
            header = file.read(512)
    except OSError as error:
        raise StorageError(f"can't read it: {error.strerror}", object=device) from None
    if not header.startswith(_LUKS):
        return None
    return header[168:208].split(b"\0")[0].decode("ascii", "replace")
