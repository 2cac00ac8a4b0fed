"""The sets, orders and attachment records in a store of copies, as they are read back. Makes and removes nothing but
what is in the trash."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from typing import Any

from snapshotter.core.errors import (
    BusyError,
)
from snapshotter.core.labels import (
    MARK_NAMES,
    decode_birth,
)
from snapshotter.core.model import (
    ATTACHMENT_ID,
    SET_ID,
    ImageState,
    Snapshot,
)
from snapshotter.host.store import (
    Store,
    read_object,
    slurp,
)

#: The provider's.
NAME = "copy"
#: In a set's directory: no later set shares files with this one.
SUSPECT = "suspect"


class Sets(Store):
    """The store with what this driver keeps in it."""

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path, fd)
        #: What a listing could not read, in a person's words.
        self.damaged: list[str] = []

    def snapshots(self, set_id: str | None = None) -> Iterator[Snapshot]:
        """What is in this store. One damaged set hides no other."""
        found = [set_id] if set_id is not None else [name for name in self.names("sets") if SET_ID.fullmatch(name)]
        for name in found:
            yield from self._of_set(name)

    def _of_set(self, set_id: str) -> Iterator[Snapshot]:
        at = f"sets/{set_id}"
        try:
            birth = decode_birth(slurp(f"{at}/birth.json", self.fd).decode())
        except (OSError, ValueError):
            birth = None
        if birth is None or birth.set_id != set_id:
            if self.has(at):  # not just deleted by another process
                self.damaged.append(f"{self.path}/{at}: its birth.json is damaged, or of a newer version: left alone")
            return
        why = ""
        marks: dict[str, str] = {}
        marks_known = True
        order, parts = 0, dict[int, Any]()
        try:
            read = (read_object(f"{at}/marks.json", self.fd) or {}).get("marks", {})
            marks = {name: value for name, value in read.items() if name in MARK_NAMES and isinstance(value, str)}
        except (OSError, ValueError, AttributeError):
            why, marks_known = "its marks are damaged, or of a newer version", False
        try:
            order, parts = self.image(set_id)
        except (OSError, ValueError, TypeError, AttributeError):
            why = why or "its image.json is damaged"
        if not parts:
            why = why or "the copy was never completed"
        for number, member in enumerate(birth.members):
            if member.provider != NAME:
                continue
            part = parts.get(number)
            size = part.get("size_bytes") if isinstance(part, dict) else None
            wrong = (
                why or ("" if isinstance(size, int) else "image.json doesn't know it") or self._lacks(at, number, part)
            )
            yield Snapshot(
                provider=NAME,
                id=f"{self.path}/{at}/{number}",
                birth=birth.of_member(number),
                state=ImageState.INVALID if wrong else ImageState.READY,
                marks=marks,
                size_bytes=size if isinstance(size, int) else None,
                order=order,
                why=wrong,
                marks_known=marks_known,
            )

    def image(self, set_id: str) -> tuple[int, dict[int, Any]]:
        """(order, what is known of each member) from image.json; (0, {}) without one.
        Raises OSError, ValueError, TypeError, AttributeError."""
        image = read_object(f"sets/{set_id}/image.json", self.fd) or {}
        return int(image.get("order", 0)), {int(number): part for number, part in image.get("members", {}).items()}

    def _lacks(self, at: str, number: int, part: Any) -> str:
        try:
            if not stat.S_ISDIR(os.stat(f"{at}/{number}/tree", dir_fd=self.fd, follow_symlinks=False).st_mode):
                return "its tree is no directory"
            manifest = os.stat(f"{at}/{number}/manifest", dir_fd=self.fd, follow_symlinks=False)
        except OSError as error:
            return f"its {os.path.basename(error.filename or 'image')} is gone"
        return "" if manifest.st_size == part.get("manifest_bytes") else "its manifest is damaged"

    def next_order(self) -> int:
        """A number above all given out before; about the UTC second, so that those of several stores compare."""
        fd = os.open("order", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self.fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            text = os.pread(fd, 64, 0).strip()
            last = int(text) if text.isdigit() else self._highest_order()
            number = max(last + 1, int(time.time()))
            # In place and of fixed width: a torn write can't be, and a new file would lose the lock.
            os.pwrite(fd, b"%020d\n" % number, 0)
            return number
        finally:
            os.close(fd)

    def _highest_order(self) -> int:
        return max((snapshot.order for snapshot in self.snapshots()), default=0)

    def leftovers(self) -> list[str]:
        """What dead runs left: trash, and sets that were never born. Not what a live one holds."""
        found = [f"trash/{name}" for name in self.names("trash")]
        for name in self.names("attachments"):
            # A record is written in no time: one that was begun a minute ago never will be.
            if name.endswith(".tmp") and self.age_s(f"attachments/{name}") > 60:
                self.unlink(f"attachments/{name}")
        for name in self.names("sets"):
            if name.startswith(".new-"):
                try:
                    with self.locked(f"sets/{name}") as there:
                        if there:
                            found.append(self.discard(f"sets/{name}", name.removeprefix(".new-")))
                except BusyError:
                    continue
        return found

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(file, content) of each attachment's part here. Those that can't be read (never torn ones of ours, as a write
        is one step) are left out, and named in `damaged`."""
        for name in self.names("attachments"):
            attachment_id, _, rest = name.partition(".")
            if not ATTACHMENT_ID.fullmatch(attachment_id) or not rest.endswith(".json"):
                continue
            try:
                record = read_object(f"attachments/{name}", self.fd)
            except (ValueError, OSError):
                self.damaged.append(f"{self.path}/attachments/{name} is damaged, or of a newer version: left alone")
                continue
            if record is not None and record.get("id") == attachment_id:
                yield f"attachments/{name}", record
