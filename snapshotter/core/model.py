"""The words of the design as types: volume, root, birth record, snapshot, set, attachment. No I/O, no storage.

Bytes are ints, times are aware UTC datetimes to the second, durations name their unit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

SET_ID = re.compile(r"s[0-9]{8}t[0-9]{6}z-[0-9a-f]{6}")
ATTACHMENT_ID = re.compile(r"a[0-9]{8}t[0-9]{6}z-[0-9a-f]{6}")


def utc_now() -> datetime:
    """Now, UTC, whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def compact_time(moment: datetime) -> str:
    """`20261122t100630z`: a time in a form that every store takes as a name or a label value."""
    return moment.astimezone(UTC).strftime("%Y%m%dt%H%M%Sz")


def parse_compact_time(text: str) -> datetime:
    """Inverse of `compact_time`. Raises ValueError."""
    return datetime.strptime(text, "%Y%m%dt%H%M%Sz").replace(tzinfo=UTC)


def new_set_id(moment: datetime) -> str:
    """`s20261122t100630z-5f3a9c`: lower case, UTC, random tail, valid as a name in every store."""
    return f"s{compact_time(moment)}-{os.urandom(3).hex()}"


def new_attachment_id(moment: datetime) -> str:
    """As `new_set_id`, with `a` in front."""
    return f"a{compact_time(moment)}-{os.urandom(3).hex()}"


class Grade(StrEnum):
    """What may be believed of an image, in rising order; compare with `rank`."""

    SKEWED = "skewed"
    CRASH = "crash"
    FILESYSTEM = "filesystem"
    APPLICATION = "application"

    @property
    def rank(self) -> int:
        return list(Grade).index(self)


_GRADES = {str(grade): grade for grade in Grade}


class Quiesce(StrEnum):
    """How writes are held still for the instant of the snapshot."""

    NONE = "none"
    FREEZE = "freeze"
    PAUSE = "pause"
    STOP = "stop"
    HOOKS = "hooks"


class ImageState(StrEnum):
    """What the storage itself says of one snapshot's image (never what a label says)."""

    READY = "ready"
    PENDING = "pending"  # the instant is fixed, the store still copies
    INVALID = "invalid"  # there is an object of ours, but no image that could be restored


class State(StrEnum):
    """State of a set."""

    PENDING = "pending"  # sealed, the store still copies
    READY = "ready"
    INCOMPLETE = "incomplete"  # never sealed
    DAMAGED = "damaged"  # was sealed; a member is gone or invalid
    UNKNOWN = "unknown"  # a member is out of sight: its provider can't be asked, or its pool or group isn't here


class Access(StrEnum):
    READ_ONLY = "ro"
    WRITABLE = "rw"


class Purpose(StrEnum):
    RESTORE = "restore"
    VERIFY = "verify"


class Volume(Struct, frozen=True):
    """The unit that a provider can snapshot. `id` is the storage's own name for it, stable over reboots.

    `path` is where the volume's top directory is seen on this host, None when it isn't (off the host).
    """

    provider: str
    id: str
    path: str | None = None
    fstype: str = ""

    @property
    def key(self) -> str:
        """Names the volume among all providers; locks are taken in the order of these."""
        return f"{self.provider}:{self.id}"


class Tagged(Struct, frozen=True):
    """A node of a fleet as its resources' own tags name it: volumes that are one node's, seen from outside."""

    node: str
    type: str  # as the tag says it; '' if none does
    volumes: tuple[Volume, ...]
    instance: str = ""  # what they are attached to, where the storage knows such a thing


class Root(Struct, frozen=True):
    """A directory that belongs to the node. `path` is canonical and absolute; `inside` is where it lies
    below its volume's top ('' for the top itself); `member` is the index of its volume in the set."""

    path: str
    member: int
    inside: str = ""


class Member(Struct, frozen=True):
    """One volume of a set, as the birth record names it."""

    provider: str
    volume: str


class Birth(Struct, frozen=True):
    """The immutable record written in the very call that creates each snapshot (`core.labels` encodes it).

    The same for all members of a set but for `member`, the index of the one that carries it. `roots[0]` is the
    data path. `host` is `<hostname>-<8 hex of the host id>`; `target` is 16 hex of host id and path.
    """

    set_id: str
    target: str
    node: str
    host: str
    profile: str
    roots: tuple[Root, ...]
    members: tuple[Member, ...]
    taken_at: datetime
    deadline: datetime  # unsealed after this, with its locks free, it is a leftover
    slot: str = ""
    address: str = ""
    member: int = 0
    #: False when `roots` came back from a record that had no room for the paths (they are hashes then).
    paths_known: bool = True

    @property
    def path(self) -> str:
        """The data path."""
        return self.roots[0].path

    def of_member(self, index: int) -> Birth:
        return self if index == self.member else replace(self, member=index)


class Snapshot(Struct, frozen=True):
    """One member of a set as it exists in the storage. `order` rises with the age of the storage's own
    clock (createtxg, generation, cloud time) so that sets sort right when the host's clock was wrong."""

    provider: str
    id: str
    birth: Birth
    state: ImageState
    marks: Mapping[str, str] = {}
    size_bytes: int | None = None
    order: int = 0
    why: str = ""  # why it is INVALID, or PENDING until somebody does something, for a person
    #: False: there are marks, but they can't be read (damaged, of a newer schema): it may have been sealed, or pinned.
    marks_known: bool = True
    replicas: tuple[str, ...] = ()  # where the store has made whole copies of it: regions
    copying: tuple[str, ...] = ()  # where it has still to make one
    replica_of: str = ""  # on such a copy: where its original was taken
    #: Not ours to remove: sent here by what keeps replicas (zfs receive), or come with a copy of its whole pool.
    received: bool = False

    @property
    def volume(self) -> str:
        return self.birth.members[self.birth.member].volume


class Attachment(Struct, frozen=True):
    """A snapshot made usable on this host. `path` is the destination given to `attach` ('' if not known).

    One attachment id spans all members of the set: each provider records its own part. `since` is None until
    `Provider.settle`: half-made, and if no live run holds it (`held`), a leftover. `lost`: why it can't be read any
    more, though its image can (what was written to it had no room); '' where the driver knows of no such thing.
    `by_hand`: what a person types to have it mounted again after a reboot, but for the place; '' if unknown.
    """

    id: str
    provider: str
    set_id: str
    member: int
    path: str
    access: Access
    purpose: Purpose
    since: datetime | None
    held: bool = False
    tree: bool = False  # a plain directory at `path`: nothing of ours is mounted there
    lost: str = ""
    by_hand: str = ""


class MountSpec(Struct, frozen=True):
    """How the core is to mount what `attach` made: `mount -t fstype -o options source`."""

    source: str
    fstype: str
    options: tuple[str, ...] = ()


class Tree(Struct, frozen=True):
    """`attach` made a plain directory with the content: nothing to mount."""

    path: str


class Elsewhere(Struct, frozen=True):
    """`attach_away` made a volume that isn't this machine's. `instance` is '' where it is attached to none; `device` is
    what it is called there."""

    volume: str
    instance: str = ""
    device: str = ""


class Space(Struct, frozen=True):
    """Room where a snapshot of some volumes would live. Bytes; None where the storage can't tell. In `detail` a name
    that ends in ` percent` says how full (0 to 100) a part is that must not be: its metadata, a copy-on-write table."""

    total_bytes: int | None
    free_bytes: int | None
    will_pin_bytes: int | None = None
    detail: Mapping[str, int] = {}


class Hold(Struct, frozen=True):
    """What a provider may know of the quiesce that it works inside.

    `deadline` is time.monotonic() seconds at which the watchdog lets the writers go: every call of the provider
    must end before it. `mapped` has (st_dev, st_ino) of every file that a held process maps shared and
    writable: their timestamps tell nothing. `marks` are the set's, the seal among them, where nothing is left to be
    proven once the images exist (no quiesce, one instant): a driver that can writes them in the call that makes the
    images, and has nothing to do when it is told to mark the set so. Else they are empty.
    """

    deadline: float | None = None
    mapped: frozenset[tuple[int, int]] = frozenset()
    marks: Mapping[str, str] = {}


class Progress(Struct, frozen=True):
    """A step of long work, for a person's terminal. `total` is None while it isn't known."""

    what: str
    done: int
    total: int | None
    unit: str = "bytes"


Report = Callable[[Progress], None]


def no_report(progress: Progress) -> None:
    """The `Report` of runs that nobody watches."""


class SnapshotSet(Struct, frozen=True):
    """All the snapshots of one take. Built by the catalog from what the providers list; never stored."""

    birth: Birth
    snapshots: tuple[Snapshot, ...]
    marks: Mapping[str, str]  # merged: pinned if any member says so, all else only if every member agrees
    state: State
    attachments: tuple[Attachment, ...] = ()
    why: str = ""

    @property
    def set_id(self) -> str:
        return self.birth.set_id

    @property
    def sealed(self) -> bool:
        return "sealed" in self.marks

    @property
    def pinned(self) -> bool:
        return "pinned" in self.marks

    @property
    def received(self) -> bool:
        return any(snapshot.received for snapshot in self.snapshots)

    @property
    def grade(self) -> Grade | None:
        return _GRADES.get(self.marks.get("grade", ""))

    @property
    def corrupt(self) -> bool:
        return self.marks.get("verify-outcome") == "corrupt"

    @property
    def good(self) -> bool:
        """Sealed, all members valid, not skewed, not verified corrupt. A pending set isn't good yet."""
        return self.state is State.READY and self.grade not in (None, Grade.SKEWED) and not self.corrupt

    @property
    def verified_level(self) -> int | None:
        """The level of the last verification if its outcome was ok, else None."""
        if self.marks.get("verify-outcome") != "ok":
            return None
        level = self.marks.get("verify-level", "")
        return int(level) if level.isdigit() else None

    @property
    def verified(self) -> bool:
        """ok at L2 or above."""
        return (self.verified_level or 0) >= 2

    @property
    def size_bytes(self) -> int | None:
        sizes = [snapshot.size_bytes for snapshot in self.snapshots]
        known = [size for size in sizes if size is not None]
        return sum(known) if known and len(known) == len(sizes) else None

    @property
    def replicas(self) -> list[str]:
        """Where all of it was copied to. Whether it is there still, the list there tells."""
        each = [set(snapshot.replicas) for snapshot in self.snapshots]
        return sorted(set.intersection(*each)) if each else []

    @property
    def copying(self) -> list[str]:
        """Where the store has still to copy it, or a part of it, to."""
        return sorted({place for snapshot in self.snapshots for place in snapshot.copying})

    @property
    def replica_of(self) -> str:
        """Where the set was taken that this is a copy of; '' if it is none."""
        return next((snapshot.replica_of for snapshot in self.snapshots if snapshot.replica_of), "")

    @property
    def sort_key(self) -> tuple[int, str]:
        """Newest last, among sets of the same volumes only, as each pool and each driver counts in its own way. The
        storage's own order where it has one, then the time in the id."""
        return (max((snapshot.order for snapshot in self.snapshots), default=0), self.set_id)
