"""A journal of one piece of work that must be finished or undone, whatever happens to who does it: lines of JSON, each
on the disk before what it announces is done. Must not know what the work is.

There is at most one per name in a directory: it is made by an exclusive create. A torn last line (killed, or without
power, while it was written) is as if it had never been begun: nothing had been done on its word yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from snapshotter.core.errors import BusyError, StorageError

SUFFIX = ".journal"


def path_of(directory: str, name: str) -> str:
    return os.path.join(directory, name + SUFFIX)


def names(directory: str) -> list[str]:
    """The names that have a journal here."""
    try:
        return sorted(entry.removesuffix(SUFFIX) for entry in os.listdir(directory) if entry.endswith(SUFFIX))
    except (FileNotFoundError, NotADirectoryError):
        return []


class Journal:
    """`records` are what stands in it, in order. Each has `kind`; those of steps also `step`."""

    def __init__(self, path: str, records: list[dict[str, Any]]) -> None:
        self.path = path
        self.records = records

    # ------------------------------------------------------------------------------------------------ made and read

    @classmethod
    def create(cls, path: str, /, **facts: Any) -> Journal:
        """A new journal whose first record, of kind `open`, has these facts. Raises BusyError if there is one already,
        StorageError."""
        if cls.load(path) is not None:
            raise BusyError("there is a journal already", object=path)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            os.close(fd)
            sync_directory(os.path.dirname(path))
        except OSError as error:
            raise StorageError(f"can't write the journal: {error.strerror}", object=path) from None
        journal = cls(path, [])
        try:
            journal.append("open", **facts)
        except BaseException:
            journal.remove()
            raise
        return journal

    @classmethod
    def load(cls, path: str) -> Journal | None:
        """The journal at `path`; None if there is none, or one whose first record was never finished: nothing had been
        done then. Raises StorageError if it can't be read, or is damaged before its last line."""
        try:
            with open(path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"can't read the journal: {error.strerror}", object=path) from None
        lines = content.split(b"\n")
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or "kind" not in record:
                    raise ValueError(line)
            except ValueError:
                # The end of a whole journal is an empty piece; a torn line has no end, or was never written out.
                if any(rest.strip(b"\0") for rest in lines[number + 1 :]):
                    raise StorageError(
                        f"the journal is damaged at line {number + 1}",
                        object=path,
                        cure="look at it by hand: nothing is done on its word",
                    ) from None
                break
            if number + 1 == len(lines):
                break  # whole, but its end was not written: it may be the beginning of more
            records.append(record)
        return cls(path, records) if records and records[0]["kind"] == "open" else None

    # --------------------------------------------------------------------------------------------------- written to

    def append(self, kind: str, **facts: Any) -> None:
        """Add a record; it is on the disk when this returns. Raises StorageError, and then the journal is as it was."""
        record = {"kind": kind, **facts}
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        whole = b"".join(json.dumps(each, separators=(",", ":")).encode() + b"\n" for each in self.records)
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.ftruncate(fd, len(whole))  # what a killed run tore
                try:
                    if os.pwrite(fd, line, len(whole)) != len(line):
                        raise OSError(28, os.strerror(28))
                    os.fsync(fd)
                except OSError:
                    os.ftruncate(fd, len(whole))
                    raise
            finally:
                os.close(fd)
        except OSError as error:
            raise StorageError(f"can't write the journal: {error.strerror}", object=self.path) from None
        self.records.append(json.loads(line))

    def begin(self, step: str, **facts: Any) -> None:
        self.append("begin", step=step, **facts)

    def done(self, step: str, **facts: Any) -> None:
        self.append("done", step=step, **facts)

    def remove(self) -> None:
        """It is over. Absent is done. Raises StorageError."""
        try:
            os.unlink(self.path)
            sync_directory(os.path.dirname(self.path))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(f"can't remove the journal: {error.strerror}", object=self.path) from None

    # ------------------------------------------------------------------------------------------------------- asked

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the first record."""
        return self.records[0]

    def has(self, *kinds: str) -> bool:
        """Whether there is a record of one of these kinds."""
        return any(record["kind"] in kinds for record in self.records)

    def last(self, kind: str, step: str | None = None) -> Mapping[str, Any] | None:
        """The newest record of that kind (and step)."""
        return next((record for record in reversed(self.records) if _matches(record, kind, step)), None)

    def all(self, kind: str, step: str | None = None) -> Iterator[Mapping[str, Any]]:
        return (record for record in self.records if _matches(record, kind, step))


def _matches(record: Mapping[str, Any], kind: str, step: str | None) -> bool:
    return record["kind"] == kind and (step is None or record.get("step") == step)


def sync_directory(path: str) -> None:
    """What was made, renamed or removed in it stays so after a power cut. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
