"""Every failure is one line with what, which and the cure, whatever a tool printed; and its exit code."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from snapshotter.core import errors
from snapshotter.core.errors import Exit, SnapshotterError, Told, worst

KINDS = [each for each in vars(errors).values() if isinstance(each, type) and Told in each.__mro__[1:]]
anything = st.text(st.characters())  # lone surrogates too: file names have them


@settings(deadline=None)
@given(st.sampled_from(KINDS), anything, anything, anything, st.lists(anything, max_size=3), anything)
@example(KINDS[0], "a\nb\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029c", "o\nbj", "cu\rre", ["le\nft"], "un\ndo")
def test_a_line_is_one_line_with_everything_in_it(
    kind: type[Told], message: str, thing: str, cure: str, left: list[str], undo: str
) -> None:
    error = kind(message, object=thing, cure=cure, left=left, undo_command=undo)
    line = error.line()
    assert len(line.splitlines()) <= 1
    assert str(error) == line
    for part in (message, thing, cure, *left, undo):
        shown = "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" and not c.isspace() else c for c in part)
        assert all(word in line for word in shown.split())
    assert not any(unicodedata.category(c) == "Cc" for c in line), "a file's name must not drive the terminal"
    document = json.loads(json.dumps(error.as_json()))
    assert set(document) == {"code", "exit", "message", "object", "cure", "left", "undo_command"}
    assert document["exit"] == int(kind.exit)
    assert document["message"] == message
    assert document["object"] == (thing or None), "unknown is null, never absent or empty"


def test_the_exit_codes_are_the_contract() -> None:
    assert {kind.__name__: int(kind.exit) for kind in KINDS} == {
        "SnapshotterError": 1,
        "UsageError": 2,
        "PreconditionError": 3,
        "NotFoundError": 4,
        "BusyError": 5,
        "StorageError": 6,
        "QuiesceError": 6,
        "UndoIncompleteError": 7,
        "JudgedBadError": 8,
        "Interrupted": 9,
    }
    assert len({kind.code for kind in KINDS}) == len(KINDS)


@settings(deadline=None)
@given(st.lists(st.sampled_from(KINDS)))
def test_the_worst_of_many(kinds: list[type[Told]]) -> None:
    found = worst([kind("x") for kind in kinds])
    exits = [kind.exit for kind in kinds]
    if not exits:
        assert found is Exit.DONE
        return
    assert found in exits
    rank = {Exit.UNDO_INCOMPLETE: 0, Exit.REFUSED: 1, Exit.JUDGED_BAD: 2}
    assert all(rank.get(found, 3) <= rank.get(other, 3) for other in exits)
    if found not in rank:
        assert found is exits[0]


@pytest.mark.parametrize("thing", ["tank/kaly", "/var/lib/x"])
def test_the_object_is_not_said_twice(thing: str) -> None:
    assert SnapshotterError(f"{thing} is gone", object=thing).line().count(thing) == 1
    assert SnapshotterError("is gone", object=thing).line() == f"{thing}: is gone"
