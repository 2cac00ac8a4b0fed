"""The undo stack: the inverse of a step is pushed before the step runs, and takes an id, never an object.

Every inverse treats "absent" as done, so the same inverse serves an error here, a retry, and the reaper later.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from snapshotter.core.errors import Told, UndoIncompleteError
from snapshotter.core.interrupts import deferred


class Undo:
    """`with Undo() as undo: undo.push("set s...", lambda: provider.delete("s...")); ...; undo.commit()`.

    Left by an exception (or without `commit`), it runs the inverses in reverse, all of them, also when some fail.
    If any failed it raises UndoIncompleteError, whose `left` names them, from the first error.
    """

    def __init__(self, undo_command: str = "") -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []
        self._undo_command = undo_command
        self.committed = False

    def push(self, what: str, inverse: Callable[[], object]) -> None:
        """Remember `inverse`; `what` is how a person would name what is left if it fails."""
        self._steps.append((what, inverse))

    def commit(self) -> None:
        """What was done stays: forget the inverses."""
        self._steps.clear()
        self.committed = True

    def run(self) -> list[tuple[str, BaseException]]:
        """Run and forget the inverses, newest first; return the failures. A signal waits until all have run; where
        `interrupts` isn't installed, one that breaks an inverse is its failure, and the others still run."""
        failures: list[tuple[str, BaseException]] = []
        with deferred():
            while self._steps:
                what, inverse = self._steps.pop()
                try:
                    inverse()
                except BaseException as error:
                    failures.append((what, error))
        return failures

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with deferred():  # what could not be undone goes before a signal that came meanwhile
            self._run_and_say(error)

    def _run_and_say(self, error: BaseException | None) -> None:
        failures = self.run()
        if not failures:
            return
        first = failures[0][1]
        said = first.line() if isinstance(first, Told) else f"{type(first).__name__}: {first}"
        cause = ""
        if isinstance(error, Told):
            cause = f" after: {error.line()}"
        elif error is not None:
            cause = f" after {type(error).__name__}: {error}"
        raise UndoIncompleteError(
            f"not everything could be undone ({said}){cause}",
            left=[what for what, _ in failures],
            cure="run `snapshotter reap`",
            undo_command=self._undo_command,
        ) from (error or sys.exception())
