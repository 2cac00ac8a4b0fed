"""What a LevelDB's or RocksDB's MANIFEST says is there: read to its end, as the engine does when it opens.
Must not know the files themselves.

Source: LevelDB db/version_edit.cc; RocksDB db/version_edit.h, db/version_edit.cc, db/blob/blob_file_addition.cc,
db/wal_edit.cc, db/version_builder.cc (10.x).
"""

from __future__ import annotations

from typing import BinaryIO

from snapshotter.checks import CheckFailed, Outcome, corrupt
from snapshotter.checks.records import Damaged, Reader, records

_SAFE_TO_IGNORE = 1 << 13  # a tag with this bit is followed by a field that may be skipped
_MUST_KNOW = 1 << 6  # the like among the fields of a file: with this bit one may not be skipped


class Blob:
    """A blob file: how many bytes of records it has, and how many of its values are garbage."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size, self.garbage = count, size, 0


class Family:
    """One column family (LevelDB has one). `files`: number -> (bytes, number of its oldest blob file or 0)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log_number = 0
        self.files: dict[int, tuple[int, int]] = {}
        self.blobs: dict[int, Blob] = {}

    def live_blobs(self) -> dict[int, Blob]:
        """Those that are needed: a blob file has no deletion record, it is dropped when it is older than all that any
        table names, or all of it is garbage and no table begins with it (VersionBuilder::SaveBlobFilesTo)."""
        named = {oldest for _, oldest in self.files.values() if oldest}
        return {
            number: blob
            for number, blob in self.blobs.items()
            if named and number >= min(named) and (number in named or blob.garbage < blob.count)
        }


class Edit:
    """One record of a MANIFEST. `left`: how many edits of its atomic group are still to come, None outside a group."""

    def __init__(self, record: bytes) -> None:
        self.family = 0
        self.name: str | None = None
        self.dropped = False
        self.left: int | None = None
        self.log_number: int | None = None
        self.deleted: list[int] = []
        self.added: list[tuple[int, int, int]] = []  # table, bytes, its oldest blob file or 0
        self.blobs: list[tuple[int, int, int]] = []  # blob file, values, bytes
        self.garbage: list[tuple[int, int]] = []  # blob file, values
        self.logs: list[tuple[int, int]] = []  # log, bytes synced
        self.logs_from = 0
        reader = Reader(record)
        while reader:
            self._field(reader, reader.varint())

    def _field(self, reader: Reader, tag: int) -> None:
        if tag == 2:
            self.log_number = reader.varint()
        elif tag in (3, 4, 9, 10, 203):  # counters
            reader.varint()
        elif tag == 1:  # the comparator's name
            reader.chunk()
        elif tag == 5:  # where a compaction goes on
            reader.varint()
            reader.chunk()
        elif tag == 6:
            reader.varint()  # level
            self.deleted.append(reader.varint())
        elif tag in (7, 100, 102, 103):
            self.added.append(_new_file(reader, tag))
        elif tag == 200:
            self.family = reader.varint()
        elif tag == 201:
            self.name = reader.chunk().decode(errors="replace")
        elif tag == 202:
            self.dropped = True
        elif tag == 300:
            self.left = reader.varint()
        elif tag in (400, _SAFE_TO_IGNORE + 2):
            self.blobs.append((reader.varint(), reader.varint(), reader.varint()))
            reader.chunk(), reader.chunk()  # the file's checksum
            _skip_fields(reader)
        elif tag in (401, _SAFE_TO_IGNORE + 3):
            self.garbage.append((reader.varint(), reader.varint()))
            reader.varint()  # bytes
            _skip_fields(reader)
        elif tag in (_SAFE_TO_IGNORE + 4, _SAFE_TO_IGNORE + 7):
            log = Reader(reader.chunk()) if tag == _SAFE_TO_IGNORE + 7 else reader
            number, synced = log.varint(), 0
            while (field := log.varint()) != 1:
                if field != 2:
                    raise _too_new(f"field {field} of a log")
                synced = log.varint()
            self.logs.append((number, synced))
        elif tag in (_SAFE_TO_IGNORE + 5, _SAFE_TO_IGNORE + 8):
            log = Reader(reader.chunk()) if tag == _SAFE_TO_IGNORE + 8 else reader
            self.logs_from = log.varint()
        elif tag & _SAFE_TO_IGNORE:
            reader.chunk()
        else:
            raise _too_new(f"tag {tag}")


class Manifest:
    """The state after the last edit. `logs`: write-ahead logs that are tracked, with the bytes known to be synced."""

    def __init__(self) -> None:
        self.families: dict[int, Family] = {}
        self.logs: dict[int, int] = {}

    @classmethod
    def read(cls, file: BinaryIO) -> Manifest:
        """Raises CheckFailed (corrupt, or a tag that we don't know: too old), OSError."""
        made = cls()
        group: list[Edit] = []
        try:
            for record in records(file):
                # Edits of a group count together, or (its end was never written) not at all.
                group.append(Edit(record))
                if not group[-1].left:
                    for edit in group:
                        made._apply(edit)
                    group = []
        except Damaged as error:
            raise corrupt(f"the MANIFEST is damaged: {error}") from None
        if not made.families:
            raise corrupt("the MANIFEST has nothing in it")
        return made

    def _apply(self, edit: Edit) -> None:
        self.logs.update(edit.logs)
        self.logs = {number: size for number, size in self.logs.items() if number >= edit.logs_from}
        if edit.dropped:
            self.families.pop(edit.family, None)
            return
        if edit.name is not None or not self.families:
            self.families[edit.family] = Family(edit.name or "default")
        family = self.families.get(edit.family)
        if family is None:
            return  # it was dropped meanwhile
        if edit.log_number is not None:
            family.log_number = edit.log_number
        for number in edit.deleted:
            family.files.pop(number, None)
        family.files.update({number: (size, oldest) for number, size, oldest in edit.added})
        family.blobs.update({number: Blob(count, size) for number, count, size in edit.blobs})
        for number, count in edit.garbage:
            if number in family.blobs:
                family.blobs[number].garbage += count


def _too_new(what: str) -> CheckFailed:
    return CheckFailed(Outcome.TOOL_TOO_OLD, f"the MANIFEST has {what}, which isn't known here: a newer format")


def _new_file(edit: Reader, tag: int) -> tuple[int, int, int]:
    """(number, size in bytes, number of its oldest blob file or 0)."""
    edit.varint()  # level
    number = edit.varint()
    if tag == 102:
        edit.varint()  # which of several paths
    size = edit.varint()
    edit.chunk(), edit.chunk()  # smallest and largest key
    oldest = 0
    if tag != 7:
        edit.varint(), edit.varint()  # smallest and largest sequence number
    if tag == 103:
        while (field := edit.varint()) != 1:
            value = edit.chunk()
            if field == 4:
                oldest = Reader(value).varint()
            elif field & _MUST_KNOW and field != _MUST_KNOW + 1:
                raise _too_new(f"field {field} of a table")
    return number, size, oldest


def _skip_fields(edit: Reader) -> None:
    while field := edit.varint():
        if field & _MUST_KNOW:
            raise _too_new(f"field {field} of a blob file")
        edit.chunk()
