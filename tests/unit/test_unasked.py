"""One provider that can't be asked, or one leftover that is stuck, keeps the verbs from nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace

from providers.btrfs import BtrfsProvider
from providers.copy import CopyProvider
from snapshotter.core.errors import NotFoundError, StorageError, UndoIncompleteError
from snapshotter.core.model import Access, Attachment, Hold
from snapshotter.host import quiesce
from snapshotter.nodes.config import Config, Node
from snapshotter.testing.harness import make_birth
from snapshotter.verbs.reap import reap
from snapshotter.verbs.release import release
from snapshotter.verbs.restore import restore
from snapshotter.verbs.session import Session
from snapshotter.verbs.take import take


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    data = tmp_path / "node"
    data.mkdir()
    (data / "file").write_text("content")
    monkeypatch.setenv("SNAPSHOTTER_RUN", str(tmp_path / "run"))

    def gone(self: BtrfsProvider) -> Iterator[Attachment]:
        raise StorageError("the disk is gone", object="/dev/lost")

    monkeypatch.setattr(BtrfsProvider, "attachments", gone)
    node = Node(name="node", path=str(data), provider="copy")
    return Session(Config(state=str(tmp_path / "state"), nodes={"node": node}))


def left_behind(session: Session) -> str:
    """A set that a dead run left unsealed."""
    provider = session.provider("copy", session.config.nodes["node"])
    assert isinstance(provider, CopyProvider)
    path = session.config.nodes["node"].path
    from snapshotter.host import mounts

    volume = provider.claim(mounts.mount_of(path), path)
    assert volume is not None
    born = make_birth([volume])
    born = replace(born, deadline=born.taken_at - timedelta(seconds=1))
    provider.create([volume], born, Hold())
    return born.set_id


def test_reap_goes_on_past_a_provider_that_cannot_be_asked(session: Session) -> None:
    leftover = left_behind(session)
    said = reap(session)
    assert said["removed"] == [leftover]
    assert [(entry["provider"], "the disk is gone" in entry["reason"]) for entry in said["unavailable"]] == [
        ("btrfs", True)
    ]


def test_reap_goes_on_past_a_pause_that_is_stuck(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = left_behind(session)

    def stuck() -> list[str]:
        raise UndoIncompleteError("a dead run still holds something", left=["thaw /data: Input/output error"])

    monkeypatch.setattr(quiesce, "reap", stuck)
    with pytest.raises(UndoIncompleteError) as refused:
        reap(session)
    assert refused.value.left == ("thaw /data: Input/output error",)
    assert leftover not in [entry.set_id for entry in session.catalog().sets]


def test_release_needs_only_the_providers_of_that_set(session: Session, tmp_path: Path) -> None:
    taken = take(session, "node")
    clone = str(tmp_path / "clone")
    restore(session, taken["set_id"], clone, Access.WRITABLE)
    assert release(session, clone)["set_id"] == taken["set_id"]
    with pytest.raises(NotFoundError, match="not asked: btrfs"):
        release(session, clone)
