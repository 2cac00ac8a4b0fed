"""copy, where directories are replaced between its passes and the pause: what is in place then is what counts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from providers.copy import CopyProvider
from snapshotter.core.errors import PreconditionError
from snapshotter.core.model import Access, Hold, Volume, compact_time, new_attachment_id, utc_now
from snapshotter.host import mounts
from snapshotter.provider import Settings
from snapshotter.testing.harness import make_birth
from tests.support import loop_file_system


@pytest.fixture(
    params=["ext4", pytest.param("btrfs", marks=pytest.mark.root), pytest.param("xfs", marks=pytest.mark.root)]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "ext4":
        yield tmp_path
    else:
        with loop_file_system(request.param, tmp_path, 400) as point:
            yield point


def volume_of(provider: CopyProvider, path: Path) -> Volume:
    volume = provider.claim(mounts.mount_of(str(path)), str(path))
    assert volume is not None
    return volume


def image_of(provider: CopyProvider, volume: Volume, place: Path, meanwhile: object) -> Path:
    """Take with `meanwhile` between the passes and the pause, and lay the image open."""
    birth = make_birth([volume])
    provider.prepare([volume], birth, 60.0)
    assert callable(meanwhile)
    meanwhile()
    (snapshot,) = provider.create([volume], birth, Hold())
    provider.mark(birth.set_id, {"sealed": compact_time(utc_now())})
    provider.attach(snapshot, new_attachment_id(utc_now()), Access.WRITABLE, str(place / "clone"))
    return place / "clone"


def content(top: Path) -> dict[str, bytes]:
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def test_a_directory_made_anew(place: Path, tmp_path: Path) -> None:
    data = place / "data"
    (data / "x").mkdir(parents=True)
    (data / "x" / "old").write_text("old")
    provider = CopyProvider(Settings(state=str(tmp_path / "state"), paths=(str(data),)))

    def meanwhile() -> None:
        (data / "x" / "old").unlink()
        (data / "x").rmdir()
        (data / "x").mkdir()
        (data / "x" / "new").write_text("new")

    clone = image_of(provider, volume_of(provider, data), place, meanwhile)
    assert content(clone) == content(data) == {"x/new": b"new"}


def test_a_directory_renamed_over(place: Path, tmp_path: Path) -> None:
    data = place / "data"
    for name in ("x", "next"):
        (data / name / "deep").mkdir(parents=True)
        (data / name / "deep" / "file").write_text(name)
    provider = CopyProvider(Settings(state=str(tmp_path / "state"), paths=(str(data),)))

    def meanwhile() -> None:
        os.rename(data / "x", data / "was")
        os.rename(data / "next", data / "x")
        (data / "x" / "deep" / "more").write_text("more")

    clone = image_of(provider, volume_of(provider, data), place, meanwhile)
    assert content(clone) == content(data)


def test_files_made_after_the_first_pass(place: Path, tmp_path: Path) -> None:
    """btrfs lists by an old descriptor only what was there when it was opened."""
    data = place / "data"
    data.mkdir()
    (data / "first").write_text("first")
    provider = CopyProvider(Settings(state=str(tmp_path / "state"), paths=(str(data),)))
    clone = image_of(provider, volume_of(provider, data), place, lambda: (data / "second").write_text("second"))
    assert content(clone) == content(data)


def test_the_data_path_itself_replaced(place: Path, tmp_path: Path) -> None:
    data = place / "data"
    data.mkdir()
    (data / "file").write_text("old")
    provider = CopyProvider(Settings(state=str(tmp_path / "state"), paths=(str(data),)))

    def meanwhile() -> None:
        os.rename(data, place / "was")
        data.mkdir()
        (data / "file").write_text("new")

    with pytest.raises(PreconditionError, match="replaced"):
        image_of(provider, volume_of(provider, data), place, meanwhile)
    assert list(provider.snapshots()) == []
