"""What drivers of a cloud's disks share, as a mix-in: where this machine is, which of its disks a mount lies on, and
attachments and swaps handed on to who makes them. Must know no cloud and load no SDK: every take on a disk that is
nobody's asks whose it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, ClassVar, Protocol

from snapshotter.core.errors import NotFoundError, PreconditionError, SnapshotterError, StorageError, pip_install
from snapshotter.core.model import (
    Access,
    Attachment,
    Elsewhere,
    ImageState,
    MountSpec,
    Purpose,
    Snapshot,
    Space,
    Volume,
)
from snapshotter.core.remote import Clock
from snapshotter.host import mounts
from snapshotter.host.disks import Disks, Part, partition_in
from snapshotter.host.mounts import Mount


def parts(name: str) -> list[str]:
    """The disks of a volume: one, or, where a file system lies on several, `vol-1+vol-2`; its snapshot is
    `snap-1+snap-2`, in the same order."""
    return name.split("+")


def joined(names: Iterable[str]) -> str:
    """Inverse of `parts`."""
    return "+".join(names)


def whole(found: Iterable[Attachment]) -> Iterator[Attachment]:
    """Attachments by disk, as attachments by member: one of several disks is complete when all of them are."""
    members: dict[tuple[str, int], list[Attachment]] = {}
    for each in found:
        members.setdefault((each.id, each.member), []).append(each)
    for those in members.values():
        yield next((each for each in those if each.since is None), those[0])


def refuse_unsealable(found: Sequence[Snapshot], provider: str, set_id: str) -> None:
    """Raises StorageError if a member of the set is missing or has no image."""
    here = {snapshot.birth.member for snapshot in found}
    for number, member in enumerate(found[0].birth.members):
        if member.provider == provider and number not in here:
            raise StorageError(f"can't be sealed: no snapshot of {member.volume}", object=set_id)
    for snapshot in found:
        if snapshot.state is ImageState.INVALID:
            raise StorageError(f"can't be sealed: {snapshot.why}", object=set_id)


class Clones(Protocol):
    """Volumes made of snapshots, for one call."""

    def attach(
        self, snapshot: Snapshot, attachment_id: str, access: Access, destination: str, purpose: Purpose
    ) -> MountSpec: ...
    def foresee(self, snapshot: Snapshot) -> list[str]: ...
    def away(self, snapshot: Snapshot, attachment_id: str) -> Elsewhere: ...
    def settle(self, attachment_id: str, since: datetime) -> None: ...
    def listed(self) -> Iterator[Attachment]: ...
    def detach(self, attachment_id: str) -> None: ...


class Swaps(Protocol):
    """Such volumes in their origins' places, on this instance, for one call."""

    def swap(self, swap_id: str, snapshot: Snapshot, volume: str) -> None: ...
    def back(self, swap_id: str) -> None: ...
    def commit(self, swap_id: str) -> None: ...
    def device_of(self, volume: str) -> str | None: ...
    def listed(self) -> Iterator[str]: ...


class Cloud(ABC):
    """Mixed into a `Provider`, before it."""

    VENDOR: ClassVar[str]  # DMI's word for the machine
    MACHINE: ClassVar[str]  # `EC2 instance`
    LIBRARY: ClassVar[str]  # what must be installed, as PyPI calls it
    ELSEWHERE: ClassVar[str]  # the option without which nothing is known on another machine
    # The provider's own.
    name: ClassVar[str]
    section: ClassVar[str]
    settings: Any
    #: Tests have others.
    disks = Disks()
    clock = Clock()
    #: What was asked a moment ago.
    _seen: dict[str, Any]

    @staticmethod
    @abstractmethod
    def _installed() -> bool:
        """Whether the cloud's library is there, without loading anything of it."""

    @abstractmethod
    def _asked(self) -> Any:
        """Which instance this machine is, asked of the cloud's metadata service. Raises PreconditionError."""

    @abstractmethod
    def _volumes(self, mount: Mount, found: Sequence[Part]) -> list[str] | None:
        """The ids of the cloud's disks that a mount's are; None if one of them isn't the cloud's."""

    @abstractmethod
    def _cloning(self) -> Clones: ...

    @abstractmethod
    def _swapping(self, here: Any) -> Swaps: ...

    # -- where we are -------------------------------------------------------------------------------------------

    def _on(self) -> bool:
        return self.disks.vendor() == self.VENDOR

    def _here(self) -> Any:
        """The instance that this is; None elsewhere."""
        return self._asked() if self._on() else None

    def _option(self, name: str) -> Any:
        return self.settings.options.get(name)

    def _used(self) -> bool:
        """Whether there can be anything of ours: on another machine somebody must have said so, and without the library
        nobody can have taken anything."""
        return bool(self.settings.options) or (self._on() and self._installed())

    def availability(self) -> list[str]:
        if not self._installed():
            return [f"{self.LIBRARY} isn't installed: {pip_install(self.section)}"]
        if not self.settings.options and not self._on():
            return [f"this is no {self.MACHINE}: set `{self.ELSEWHERE}` in [{self.section}] to work from elsewhere"]
        try:
            self._here()
        except SnapshotterError as error:
            return [error.line()]
        return []

    # -- which volumes ------------------------------------------------------------------------------------------

    def claim(self, mount: Mount, path: str) -> Volume | None:
        found = self.disks.below(mount) if self._on() else []
        volumes = self._volumes(mount, found) if found else None
        if not volumes:
            return None  # a memory file system, a disk that isn't the cloud's
        if elsewhere := [each for each in sorted(mount.super_options) if each.startswith(("logdev=", "rtdev="))]:
            raise PreconditionError(
                f"keeps a part of itself on another device ({elsewhere[0]}), which isn't known to be of the set",
                object=mount.path,
                cure="take the volumes from outside by `select`",
            )
        if not self.disks.between(mount) and len({part.partition for part in found}) > 1:
            raise PreconditionError(
                f"lies on different partitions of {', '.join(volumes)}",
                object=mount.path,
                cure="take the volumes from outside by `select`",
            )
        return Volume(self.name, joined(sorted(set(volumes))), mounts.top_of(mount), mount.fstype)

    def space(self, volumes: Sequence[Volume]) -> Space:
        """There is room without end; what it costs isn't known before."""
        return Space(total_bytes=None, free_bytes=None)

    # -- attachments --------------------------------------------------------------------------------------------

    def _clones(self) -> Clones | None:
        """None where there can be nothing of ours."""
        return self._cloning() if self._used() else None

    def _clones_for(self, snapshot: Snapshot) -> Clones:
        if (clones := self._clones()) is None:
            cure = f"restore it on one, or set `{self.ELSEWHERE}` in [{self.section}]"
            raise PreconditionError(f"this is no {self.MACHINE}", object=snapshot.id, cure=cure)
        return clones

    def attach(
        self,
        snapshot: Snapshot,
        attachment_id: str,
        access: Access,
        destination: str,
        purpose: Purpose = Purpose.RESTORE,
    ) -> MountSpec:
        return self._clones_for(snapshot).attach(snapshot, attachment_id, access, destination, purpose)

    def foresee(self, snapshot: Snapshot) -> list[str]:
        return self._clones_for(snapshot).foresee(snapshot)

    def attach_away(self, snapshot: Snapshot, attachment_id: str) -> Elsewhere:
        return self._clones_for(snapshot).away(snapshot, attachment_id)

    def settle(self, attachment_id: str, since: datetime) -> None:
        if (clones := self._clones()) is None:
            raise NotFoundError("no such attachment", object=attachment_id)
        clones.settle(attachment_id, since)

    def attachments(self) -> Iterator[Attachment]:
        if (clones := self._clones()) is not None:
            yield from whole(clones.listed())

    def detach(self, attachment_id: str) -> None:
        if (clones := self._clones()) is not None:
            clones.detach(attachment_id)

    # -- taking the origin's place ------------------------------------------------------------------------------

    def _swaps(self) -> Swaps | None:
        here = self._here()
        return self._swapping(here) if here is not None and self._used() else None

    def swap(self, swap_id: str, snapshot: Snapshot, volume: Volume) -> None:
        if (swaps := self._swaps()) is None:
            raise PreconditionError(f"this is no {self.MACHINE}", object=snapshot.id, cure="restore it on the instance")
        swaps.swap(swap_id, snapshot, volume.id)
        self._seen.clear()

    def swap_back(self, swap_id: str) -> None:
        if (swaps := self._swaps()) is not None:
            swaps.back(swap_id)
            self._seen.clear()

    def swap_commit(self, swap_id: str) -> None:
        if (swaps := self._swaps()) is not None:
            swaps.commit(swap_id)
            self._seen.clear()

    def source_of(self, volume: str, known: str) -> str:
        found = swaps.device_of(volume) if (swaps := self._swaps()) is not None else None
        return (self.disks.device(Part(found, partition_in(known))) if found else None) or known

    def swaps(self) -> Iterator[str]:
        if (swaps := self._swaps()) is not None:
            yield from swaps.listed()
