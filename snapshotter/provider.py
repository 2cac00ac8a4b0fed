"""The Provider interface: what a storage driver must do. Its docstrings are the contract, and
`snapshotter.testing` is the contract as a test suite. Must know no driver: built-ins are strings, loaded on first use.

Rules that hold for every method:
- Ids are chosen by the caller and exist before the act; the birth record is written in the very call (or, where
  the store has no such call, durably before) that creates the object. Nothing of ours exists unlabelled.
- Every inverse (`delete`, `detach`, `swap_back`) takes an id and treats "absent" as done.
- Only what carries our label is ever listed, marked or removed.
- A failure is one of `core.errors`; nothing else escapes but bugs.
"""

from __future__ import annotations

import glob
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import ClassVar

from msgspec import Struct

from snapshotter.core.errors import PreconditionError, SnapshotterError, UsageError, pip_install
from snapshotter.core.labels import LabelLimits
from snapshotter.core.model import (
    Access,
    Attachment,
    Birth,
    Elsewhere,
    Hold,
    MountSpec,
    Purpose,
    Quiesce,
    Report,
    Snapshot,
    Space,
    Tagged,
    Tree,
    Volume,
    no_report,
)
from snapshotter.host.mounts import Mount
from snapshotter.host.places import run_directory


class Traits(Struct, frozen=True):
    """What the orchestrator must know of a driver to plan with it."""

    atomic_across_volumes: bool  # one create() of several volumes is one instant
    quiesce: Quiesce  # what one create() of one volume needs around it: NONE, PAUSE or FREEZE
    writable_clone: bool
    swaps: bool  # a clone can take its origin's place
    needs_host: bool  # works only on the host that sees the data path
    sized_by_content: bool = True  # a snapshot's size_bytes is how much is in it, not what it pins
    subvolumes_apart: bool = False  # a snapshot ends at nested btrfs subvolumes: they are volumes of their own
    limits: LabelLimits = LabelLimits()


class Option(Struct, frozen=True):
    """One typed option of a driver, given by `-o KEY=VALUE` or `options = {}`."""

    kind: type
    help: str


class OpenSwap(Struct, frozen=True):
    """A swap neither taken back nor committed, of this volume's place (its id), '' where the driver can't tell.
    `by_hand`: what a person types, the node stopped and nothing of it mounted, to have what was set aside again; ''
    where the driver can't tell, or was asked for one volume."""

    id: str
    volume: str = ""
    by_hand: str = ""


class Settings(Struct, frozen=True):
    """What an instance is made from. `state` is snapshotter's own directory (caches may live there, truth may
    not). `paths` are data paths that the config or the command names: where a store may be found."""

    state: str
    options: Mapping[str, object] = {}
    paths: tuple[str, ...] = ()
    floor: float = 0.10  # share of free space that a take must leave
    report: Report = no_report


class Provider(ABC):
    """One instance per (provider, options). Instances are cheap: no I/O in `__init__`."""

    name: ClassVar[str]
    traits: ClassVar[Traits]
    OPTIONS: ClassVar[Mapping[str, Option]] = {}
    #: The config's table whose keys are this driver's options too, below a node's own: `aws`, `gcp`.
    section: ClassVar[str] = ""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        #: What a person should know of the last `create`, `attach`, `swap`, `reap` (owners that couldn't be kept).
        self.notes: list[str] = []

    @classmethod
    def resume(cls) -> list[str]:
        """Let go on what killed runs left suspended; the names. A driver that may leave such a thing notes it before,
        in `<run directory>/<its name>/`. Called where that isn't empty, before anybody looks at a data path: the look
        might hang, so this must not look either. Raises StorageError. Default: nothing."""
        return []

    @abstractmethod
    def availability(self) -> list[str]:
        """[] if the driver can work on this machine, else the reasons why not, each with its cure. No effects."""

    @abstractmethod
    def claim(self, mount: Mount, path: str) -> Volume | None:
        """The volume that holds the directory `path`, which lies on `mount`; None if this driver doesn't know
        such storage. Claiming says nothing about being able to work: that is `availability` and `check`."""

    def find(self, select: Mapping[str, object]) -> list[Volume]:
        """Volumes by ids, tags or instance, for drivers that work off the host. Default: none."""
        return []

    def tagged(self) -> list[Tagged]:
        """The fleet: every node whose resources carry the tag `snapshotter:node` (GCE: the label `snapshotter-node`) in
        this account and region, with the type that `snapshotter:type` (`snapshotter-type`) says. A listing in pages,
        never a call per node. Default: none."""
        return []

    def ask(self, instance: str, argv: Sequence[str]) -> str:
        """Have the machine that is `instance` run a command, where the cloud can; never wait for it. Returns a name for
        a person. Raises PreconditionError where it can't be asked. Default: it can't."""
        raise PreconditionError("can't be asked to run a command", object=instance)

    def advance(self) -> list[str]:
        """Start or move on what the store does in its own time for sealed sets (copies to other regions): names of
        what was moved on. Never waits; called again later. Default: nothing."""
        return []

    def one_instant(self, volumes: Sequence[Volume]) -> bool:
        """Would one `create` of these volumes be one instant? Default: what the traits say of several. No effects."""
        return len(volumes) == 1 or self.traits.atomic_across_volumes

    @abstractmethod
    def check(self, volumes: Sequence[Volume], birth: Birth) -> None:
        """Could `create` work now: tool, permission, space, limits, room for the birth record? No effects.
        Raises PreconditionError."""

    def prepare(self, volumes: Sequence[Volume], birth: Birth, budget: float) -> None:
        """Work that can be done while the writers still run (a copy's passes; clearing what dead runs left).
        From here on `delete(birth.set_id)` is the inverse. `budget` is how long the writers may be held (seconds):
        raises PreconditionError, before anything is held, if `create` can't fit. Default: nothing."""
        return None

    @abstractmethod
    def create(self, volumes: Sequence[Volume], birth: Birth, hold: Hold) -> tuple[Snapshot, ...]:
        """Fix the instant: one snapshot per volume, in their order, born with their record: all or none (what was
        made before a failure is removed). Runs inside the quiesce, so it does only what must be done there, and
        ends before `hold.deadline`. Snapshots may be PENDING. Not sealed, unless the store did so at birth.
        Raises StorageError, PreconditionError (an unseen writer), QuiesceError (deadline), BusyError if the set has
        an image already, which stays as it is."""

    @abstractmethod
    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        """Every snapshot that carries our label (of one set, or all), each image's validity asked of the storage.
        Other tools' objects, and ours that have no readable record, are not listed. Marks that are there and can't be
        read are not none: `marks_known` says so. No effects."""

    def sees(self, volume: str) -> bool:
        """Whether what holds this volume (its id) is here now: its pool is imported, its group's disks are connected.
        Only where it is does an absent snapshot mean that it is gone. Default: it is."""
        return True

    def of_slot(self, target: str, slot: str) -> Iterator[Snapshot]:
        """Those of one scheduled time of one target. A store that is shared by a fleet asks for just these (by a label
        that `create` wrote); default: looked for among all."""
        return (each for each in self.snapshots() if (each.birth.target, each.birth.slot) == (target, slot))

    @abstractmethod
    def mark(self, set_id: str, changes: Mapping[str, str | None]) -> None:
        """Change marks on every member that is here, all or none (None removes; `core.labels.apply_marks`, whose
        ValueError for what is no mark of ours gets out). Setting `sealed` is the last thing written, and returns only
        when neither the image nor the mark can be lost to a power cut. Raises NotFoundError, StorageError (the marks
        can't be read, so others would be lost)."""

    def finish(self, set_id: str) -> None:
        """Every member of the sealed set is READY: remove what only the making of the images needed. Absent is done.
        Where nobody waited for that, `reap` does it. Default: nothing."""
        return None

    @abstractmethod
    def delete(self, set_id: str) -> None:
        """Remove every member of the set that is here. Inverse of `prepare` and `create`, so it works on half-made
        sets; absent is done; twice is fine. A set is never half-deleted and still listed as valid.
        Raises BusyError if an attachment uses it (named, with the cure), or another process is making it."""

    @abstractmethod
    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec | Tree:
        """Make the image usable, and record that first. Never mounts: it says how (`MountSpec`), or fills
        `destination`, an absent or empty directory, itself (`Tree`). WRITABLE must leave the snapshot's bytes as they
        are; READ_ONLY must not be writable. A destination that isn't empty is left alone; the same part of an
        attachment twice is refused, or is the same again. One attachment id may span several snapshots, each with its
        destination. Where `traits.needs_host` the source, or the path in it, has the attachment's id or the set's in
        it: by that is told later whether what is mounted there is it. Raises PreconditionError (needs root, no such
        access), StorageError (invalid image, no space)."""

    def foresee(self, snapshot: Snapshot) -> list[str]:
        """What a person should know before `attach`: how long it takes and what it costs, a line each. No effects.
        Default: nothing."""
        return []

    def attach_away(self, snapshot: Snapshot, attachment_id: str) -> Elsewhere:
        """As `attach`, for another machine: the volume is made, and attached where the options say; nothing is mounted,
        and the attachment's path is ''. Raises PreconditionError (the default: this storage is this machine's)."""
        raise PreconditionError(
            f"{self.name} can't make volumes of another machine", object=snapshot.id, cure="restore it with --to"
        )

    @abstractmethod
    def settle(self, attachment_id: str, since: datetime) -> None:
        """The attachment is complete and now a person's: durably record `since` (UTC, with microseconds), on every part
        of it that is here. Until then `attachments()` lists it with `since` None: half-made. The core calls this last,
        after mounting and re-pointing, so that a later ctime in a clone means that somebody wrote to it. Raises
        NotFoundError."""

    @abstractmethod
    def attachments(self) -> Iterator[Attachment]:
        """Every attachment of ours here, half-made ones included (`since` is None). No effects."""

    @abstractmethod
    def detach(self, attachment_id: str) -> None:
        """Inverse of `attach`, after the core has unmounted; absent is done; twice is fine. Removes only what attach
        made (a directory that a person has since put in that place stays)."""

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        """Put a clone of `snapshot` in `volume`'s place; the volume's content is set aside under `swap_id`.
        The volume is not in use. A snapshot of the set-aside stays a snapshot. Only where `traits.swaps`.
        Raises BusyError while another swap of the volume is open."""
        raise NotImplementedError

    def swap_back(self, swap_id: str) -> None:
        """Inverse of `swap`: the set-aside is the volume again, the clone is gone. Absent is done."""
        raise NotImplementedError

    def swap_commit(self, swap_id: str) -> None:
        """The set-aside is removed, the clone stays. Absent is done. Never loses a snapshot: refuses (BusyError) by
        name while any depends on the set-aside."""
        raise NotImplementedError

    def refuse_commit(self, swap_id: str) -> None:
        """Raise what `swap_commit` would refuse with now, as far as that can be known before: of several swaps none is
        to be committed then. Absent is fine. No effects. Default: nothing."""
        return None

    def swappable(self, volume: Volume, snapshot: Snapshot) -> bool:
        """Whether `swap` could ever do it for this volume and this snapshot of it: some drivers have several kinds, and
        not all can; the snapshot may be a copy that lies elsewhere. Raises what `swap` would refuse with and a person
        can mend, as far as that is known while the volume is in use: the node is stopped when `swap` is asked. Only
        asked where `traits.swaps`. Default: yes."""
        return True

    def source_of(self, volume: str, known: str) -> str:
        """The device that the file system of the volume (its id), or of what stands in its place, is mounted from now;
        `known` is what it was before a swap or its inverse. Default: the same. A cloud's disk gets another name."""
        return known

    def swaps(self) -> Iterator[str]:
        """Ids of swaps neither taken back nor committed."""
        return iter(())

    def open_swaps(self, volume: str | None = None) -> Iterator[OpenSwap]:
        """The same, and what a person must know of them. With a volume (its id) at least those of that one: then what
        has nothing to do with it (another pool) need not be able to answer. Default: the ids alone, of all."""
        return (OpenSwap(swap_id) for swap_id in self.swaps())

    def reap(self) -> list[str]:
        """Remove what only this driver can see of dead runs (half-deleted objects, scratch), or of ended ones that
        nobody waited for (`finish`); return their names. Never a set with a record, an attachment, or anything that a
        live process holds. Default: nothing."""
        return []

    def refuse_unmounted(self, roots: Sequence[str], others: Sequence[str]) -> None:
        """Raise PreconditionError, with the cure, where a volume of this storage mounts itself at one of these paths,
        above it, or below a root, and isn't seen there: no fstab tells of it. (`others`: where links of the data lead.)
        Asked of `MOUNT_THEMSELVES` before a take, whoever serves the path. Default: nothing."""
        return None

    def refuse_writes(self, needs: Sequence[tuple[Mount, int]]) -> None:
        """Raise PreconditionError, with the cure, where so many bytes (at most) written to the file systems of these
        mounts would harm what lies below them: fill a pool that others are in, overflow snapshots. Asked before a
        restore copies, of every driver: the set may be another's. Default: no harm."""
        return None

    @abstractmethod
    def space(self, volumes: Sequence[Volume]) -> Space:
        """Room where snapshots of these volumes live, and what one will pin."""


#: name -> "module:class", and the extra to install if the module's import fails.
BUILT_IN: Mapping[str, tuple[str, str]] = {
    "btrfs": ("providers.btrfs:BtrfsProvider", ""),
    "copy": ("providers.copy:CopyProvider", ""),
    "lvm": ("providers.lvm:LvmProvider", ""),
    "zfs": ("providers.zfs:ZfsProvider", ""),
    "ebs": ("providers.ebs:EbsProvider", "aws"),
    "gce": ("providers.gce:GceProvider", "gcp"),
}
#: Which claim wins, nearest to the file system first. `copy` serves only where nothing else claims, or on request.
NEAREST_FIRST = ("zfs", "btrfs", "lvm", "ebs", "gce")
LAST_RESORT = "copy"
#: Drivers that serve one kind of file system: not loaded for a mount of another (it takes longer than a snapshot).
_ONLY = {"zfs": "zfs", "btrfs": "btrfs"}
#: What is there on a machine that a driver can see anything on, without the config's help; one of each is enough.
_SIGNS = {
    "zfs": ("/proc/spl/kstat/zfs", "/dev/zfs"),
    "lvm": ("/dev/mapper/control", "/sys/class/misc/device-mapper"),
}
#: Storage that mounts what is in it by itself.
MOUNT_THEMSELVES = ("zfs",)
#: What DMI calls the machines of each cloud.
VENDORS = {"ebs": "Amazon EC2", "gce": "Google"}
ENTRY_POINTS = "snapshotter.providers"


def names() -> Iterator[str]:
    """All providers installed, in the order in which claims win: built in, then third parties', then `copy`. Third
    parties' are looked up only when the others are through."""
    yield from (name for name in NEAREST_FIRST if name in BUILT_IN)
    if _third_parties():
        from importlib.metadata import entry_points

        yield from sorted({point.name for point in entry_points(group=ENTRY_POINTS)} - set(BUILT_IN))
    yield LAST_RESORT


def _third_parties() -> bool:
    """Whether anything installed may announce a driver. importlib.metadata knows, but takes longer to import than a
    snapshot and its clone to make; what it reads are these files (and archives, which only it can read)."""
    for place in sys.path:
        if os.path.isfile(place) or place.endswith(".egg"):
            return True
        for file in glob.iglob(f"{glob.escape(place or '.')}/*.*-info/entry_points.txt"):
            try:
                with open(file, "rb") as announced:
                    if ENTRY_POINTS.encode() in announced.read():
                        return True
            except OSError:
                return True
    return False


def may_be_here(name: str) -> bool:
    """False where it is certain, without loading the driver, that this machine shows it nothing. What the config or
    a person says beside that (a region, a project) is the caller's to know."""
    if name in BUILT_IN and BUILT_IN[name][0].partition(":")[0] in sys.modules:
        return True  # it can say so itself, at no cost
    if name in VENDORS:
        try:
            with open("/sys/class/dmi/id/sys_vendor", encoding="ascii", errors="replace") as file:
                return file.read().strip() == VENDORS[name]
        except OSError:
            return False
    return any(map(os.path.exists, _SIGNS.get(name, ("/",))))


def may_claim(name: str, mount: Mount) -> bool:
    """False where it is certain, without loading the driver, that it claims nothing on this mount."""
    zvol = name == "zfs" and mount.source.startswith(("/dev/zd", "/dev/zvol/"))
    return zvol or _ONLY.get(name, mount.fstype) == mount.fstype


def resume() -> list[str]:
    """The first act of a run that works on data paths: what dead runs left suspended goes on; the names. Loads a driver
    only where it noted such a thing. A failure is left to that driver's `prepare` and `reap`, which meet it again."""
    resumed: list[str] = []
    with suppress(SnapshotterError):
        top = run_directory()
        for name in BUILT_IN:
            noted = os.path.join(top, name)
            if os.path.isdir(noted) and os.listdir(noted):
                with suppress(SnapshotterError):
                    resumed += load(name).resume()
    return [f"{name}, left suspended by a killed command" for name in resumed]


def load(name: str) -> type[Provider]:
    """The driver's class. Raises UsageError for an unknown name, PreconditionError if what it needs isn't
    installed (with the extra to install)."""
    from importlib import import_module

    if name in BUILT_IN:
        target, extra = BUILT_IN[name]
        module, _, attribute = target.partition(":")
        try:
            loaded = getattr(import_module(module), attribute)
        except ImportError as error:
            hint = pip_install(extra) if extra else "reinstall snapshotter"
            raise PreconditionError(f"can't load: {error}", object=f"provider {name}", cure=hint) from None
    else:
        from importlib.metadata import entry_points

        points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        if name not in points:
            from difflib import get_close_matches

            known = [*BUILT_IN, *points]
            near = get_close_matches(name, known, 1)
            cure = f"did you mean {near[0]}?" if near else f"one of: {', '.join(sorted(known))}"
            raise UsageError(f"no provider is called {name!r}", object=name, cure=cure)
        try:
            loaded = points[name].load()
        except Exception as error:  # a third party's module may raise anything
            raise PreconditionError(f"can't load: {type(error).__name__}: {error}", object=f"provider {name}") from None
    if not (isinstance(loaded, type) and issubclass(loaded, Provider)):
        raise PreconditionError("is not a Provider", object=f"provider {name}", cure="mend its entry point")
    if lacking := sorted(getattr(loaded, "__abstractmethods__", ())):
        why = f"lacks {', '.join(lacking)}: it is older than this snapshotter"
        raise PreconditionError(why, object=f"provider {name}", cure="install a newer one")
    return loaded


def parse_options(kind: type[Provider], given: Mapping[str, object]) -> dict[str, object]:
    """`given` (from -o or the config) checked against the driver's OPTIONS and turned into their types.
    Raises UsageError that names the nearest known option."""
    parsed: dict[str, object] = {}
    for key, value in given.items():
        option = kind.OPTIONS.get(key)
        if option is None:
            from difflib import get_close_matches

            near = get_close_matches(key, list(kind.OPTIONS), 1)
            known = f"did you mean {near[0]}?" if near else f"it has: {', '.join(kind.OPTIONS) or 'none'}"
            raise UsageError(f"provider {kind.name} has no option {key!r}", object=key, cure=known)
        try:
            if option.kind is bool and isinstance(value, str):
                value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
            elif not isinstance(value, option.kind) or (option.kind is int and isinstance(value, bool)):
                value = option.kind(value)
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"option {key} of provider {kind.name} takes {option.kind.__name__}, not {value!r}", object=key
            ) from None
        parsed[key] = value
    return parsed
