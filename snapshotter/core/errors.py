"""Every failure that an operator can meet, as one line: what, which object, the cure. Must not know any verb.

Exit codes are part of the command-line contract (README, "Exit codes"). A traceback is a bug of ours (exit 1).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, ClassVar

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def plain(text: str, *, keep: str = "") -> str:
    """`text` with control characters (but those in `keep`) shown, not sent: a file's name must not drive a terminal."""
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else f"\\x{ord(match[0]):02x}", text)


def pip_install(extra: str) -> str:
    """The cure for a missing library, one of our extras: by the pip of the environment that we are installed in, which
    knows us. No index does."""
    return f"{sys.prefix}/bin/pip install 'node-snapshotter[{extra}]'"


class Exit(IntEnum):
    """Exit codes of the command."""

    DONE = 0
    BUG = 1
    USAGE = 2
    PRECONDITION = 3
    NOT_FOUND = 4
    BUSY = 5
    REFUSED = 6
    UNDO_INCOMPLETE = 7
    JUDGED_BAD = 8
    INTERRUPTED = 9


#: When several things went wrong, the exit code is the first of these that occurred; then the first that came.
WORST_FIRST = (Exit.UNDO_INCOMPLETE, Exit.REFUSED, Exit.JUDGED_BAD)


class Told(BaseException):
    """What the operator is told in one line. `message` says what, `object` which one, `cure` what can be done about it.

    `left` names what could not be undone, `undo_command` the command that would.
    """

    exit: ClassVar[Exit] = Exit.BUG
    code: ClassVar[str] = "bug"

    def __init__(
        self,
        message: str,
        *,
        object: str = "",
        cure: str = "",
        left: Sequence[str] = (),
        undo_command: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.object = object
        self.cure = cure
        self.left = tuple(left)
        self.undo_command = undo_command

    def what(self) -> str:
        """What, and which object: the line without its cure, for who shows that apart."""
        named = not self.object or self.object in self.message
        return self.message if named else f"{self.object}: {self.message}"

    def line(self) -> str:
        """The one line for a terminal or a log. Line breaks are folded, control characters (of a file's name) shown."""
        text = self.what()
        if self.left:
            text += f" (left: {', '.join(self.left)})"
        if self.cure:
            text += f"; {self.cure}"
        if self.undo_command:
            text += f"; undo: {self.undo_command}"
        return plain(" ".join(text.split()))

    def as_json(self) -> dict[str, Any]:
        """The `error` object of the JSON contract."""
        return {
            "code": self.code,
            "exit": int(self.exit),
            "message": self.message,
            "object": self.object or None,
            "cure": self.cure or None,
            "left": list(self.left),
            "undo_command": self.undo_command or None,
        }

    def __str__(self) -> str:
        return self.line()


class SnapshotterError(Told, Exception):
    """Base of all failures."""


class UsageError(SnapshotterError):
    """The call, the config or a name in it is wrong, or a confirmation is missing. Nothing was changed."""

    exit, code = Exit.USAGE, "usage"


class PreconditionError(SnapshotterError):
    """A tool, a permission, space or a grade is missing. Nothing was changed."""

    exit, code = Exit.PRECONDITION, "precondition"


class NotFoundError(SnapshotterError):
    """No such set, node, path or attachment."""

    exit, code = Exit.NOT_FOUND, "not-found"


class BusyError(SnapshotterError):
    """Locked by another run, attached, or in use."""

    exit, code = Exit.BUSY, "busy"


class StorageError(SnapshotterError):
    """The storage or the cloud refused, or a budget was spent."""

    exit, code = Exit.REFUSED, "refused"


class QuiesceError(StorageError):
    """The writes were not proven to be held for the instant of the snapshot: the image is void."""

    code = "quiesce-void"


class UndoIncompleteError(SnapshotterError):
    """Something failed and what had been done could not all be undone; `left` names it."""

    exit, code = Exit.UNDO_INCOMPLETE, "undo-incomplete"


class JudgedBadError(SnapshotterError):
    """Looked at and found bad: corrupt, stale, damaged."""

    exit, code = Exit.JUDGED_BAD, "judged-bad"


class Interrupted(Told):
    """A signal came. Undone if nothing was sealed yet; kept if it was. Like KeyboardInterrupt it is no `Exception`:
    what goes on after a failure (the next node, the next provider) doesn't go on after this."""

    exit, code = Exit.INTERRUPTED, "interrupted"


def foreseen(error: Exception, what: str) -> SnapshotterError:
    """One that isn't of ours as a failure at `what`, so that a bug, a driver's for one, stops nothing else and is told
    like any other."""
    if isinstance(error, SnapshotterError):
        return error
    from traceback import extract_tb

    at = extract_tb(error.__traceback__)[-1]
    place = f"{at.filename.rpartition('/')[2]}:{at.lineno}"
    return SnapshotterError(
        f"met a bug of snapshotter: {type(error).__name__}: {error} ({place})", object=what, cure="report it"
    )


def worst(errors: Sequence[Told]) -> Exit:
    """The exit code of a run with these errors: 7 over 6 over 8 over whichever came first; 0 if none."""
    exits = [error.exit for error in errors]
    for exit_code in WORST_FIRST:
        if exit_code in exits:
            return exit_code
    return exits[0] if exits else Exit.DONE


@contextmanager
def put_off(failed: list[SnapshotterError]) -> Iterator[None]:
    """A failure at one of several is noted in `failed`, and the others have their turn."""
    try:
        yield
    except SnapshotterError as error:
        failed.append(error)
