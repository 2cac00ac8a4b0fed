"""The config's own commands around take, restore and prune. They know what happens from their environment; what they
print is caught, and its last line is told where one fails.

One that fails before refuses the verb: nothing was changed. One that is cut short (its time is up, a signal) may have
done half: then what undoes it runs all the same. One that fails after changes nothing: what is done is done.
"""

from __future__ import annotations

from types import TracebackType

from snapshotter.core import command
from snapshotter.core.errors import Interrupted, PreconditionError, SnapshotterError, StorageError, Told
from snapshotter.nodes.config import Node


class _CutShort(PreconditionError):
    """The hook was killed as its time was up."""


class Around:
    """`with Around(node, "take", set=...) as around: ...`. `notes` are for a person. Where the first hook ran the
    second does too, whatever comes between; it is told `SNAPSHOTTER_OUTCOME` (done, failed, interrupted)."""

    def __init__(self, node: Node | None, event: str, **facts: str) -> None:
        self.notes: list[str] = []
        self.facts = facts
        self._node, self._event = node, event

    def __enter__(self) -> Around:
        if self._node is not None:
            try:
                self._run("before", {})
            except (_CutShort, Interrupted) as error:
                self.__exit__(type(error), error, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._node is None:
            return
        said = {"SNAPSHOTTER_OUTCOME": "done"}
        if error is not None:
            said["SNAPSHOTTER_OUTCOME"] = "failed" if isinstance(error, Exception) else "interrupted"
            said["SNAPSHOTTER_ERROR"] = error.line() if isinstance(error, Told) else type(error).__name__
        try:
            self._run("after", said)
        except SnapshotterError as failure:
            self.notes.append(failure.line())

    def _run(self, when: str, said: dict[str, str]) -> None:
        node = self._node
        assert node is not None
        name = f"{when}_{self._event}"
        argv: tuple[str, ...] = getattr(node.hooks, name)
        if not argv:
            return
        given = {f"SNAPSHOTTER_{key.upper()}": value for key, value in self.facts.items()}
        given |= {"SNAPSHOTTER_EVENT": name, "SNAPSHOTTER_NODE": node.name, "SNAPSHOTTER_PATH": node.path, **said}
        cure = "mend the hook, or take it out of the config"
        try:
            done = command.run(argv, timeout=float(node.timeout), extra_env=given)
        except StorageError as error:
            raise _CutShort(f"its hook {name} failed: {error.line()}", object=node.name, cure=cure) from None
        except SnapshotterError as error:
            raise PreconditionError(f"its hook {name} failed: {error.line()}", object=node.name, cure=cure) from None
        if not done.ok:
            raise PreconditionError(
                f"its hook {name} failed with {done.code}: {done.said}", object=node.name, cure=cure
            )
