"""Entries that change places: what was set aside is removed by nobody who only undoes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest

from snapshotter.core.errors import BusyError, StorageError
from snapshotter.host import exchange
from snapshotter.host.exchange import Unit


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    for name in ("place", "staged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(f"of {name}")
    place, staged, aside = (str(tmp_path / name) for name in ("place", "staged", "aside"))
    return Unit(place, staged, aside, exchange.known(place), exchange.known(staged))


def text(path: str) -> str:
    return (Path(path) / "file").read_text()


def test_there_and_back_each_twice(unit: Unit) -> None:
    for _ in range(2):
        exchange.forward(unit)
        assert text(unit.place) == "of staged" and text(unit.aside) == "of place" and not Path(unit.staged).exists()
    for _ in range(2):
        exchange.back(unit, ran=True)
        assert text(unit.place) == "of place"
        assert exchange.remove_new(unit, ran=True) == []
    assert not Path(unit.staged).exists() and not Path(unit.aside).exists()


def test_nothing_is_removed_while_the_old_one_is_not_in_its_place(unit: Unit) -> None:
    exchange.forward(unit)
    with pytest.raises(StorageError):
        exchange.is_back(unit)
    for ran in (False, True):
        assert exchange.remove_new(unit, ran=ran) == [unit.aside]
        assert text(unit.aside) == "of place" and text(unit.place) == "of staged"


def test_where_there_was_no_old_one_what_stands_aside_is_not_ours(unit: Unit) -> None:
    new = msgspec.structs.replace(unit, old=None)
    Path(unit.place).rename(unit.aside)  # somebody's
    exchange.forward(new)
    exchange.back(new, ran=True)
    exchange.remove_new(new, ran=True)
    assert text(unit.aside) == "of place" and not Path(unit.place).exists() and not Path(unit.staged).exists()


def test_what_somebody_else_put_there_stays(unit: Unit) -> None:
    exchange.forward(unit)
    Path(unit.place).rename(unit.place + ".taken")
    Path(unit.place).mkdir()
    with pytest.raises(BusyError):
        exchange.back(unit, ran=False)
    assert text(unit.aside) == "of place"
    exchange.back(unit, ran=True)  # the node ran, and made it anew
    assert text(unit.place) == "of place"


def test_what_is_set_aside_goes_only_if_it_is_that(unit: Unit) -> None:
    exchange.forward(unit)
    Path(unit.aside).rename(unit.aside + ".moved")
    Path(unit.aside).mkdir()
    exchange.remove_old(unit)
    assert Path(unit.aside).is_dir() and text(unit.aside + ".moved") == "of place"


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ZFS before 2.2, and some network file systems: no flags of renameat2."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(exchange.btrfs, "rename", refused)


def test_there_and_back_where_places_cannot_be_exchanged_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory that the new one was made ready in is gone by then, as after every restore."""
    without_exchange(monkeypatch)
    for name in ("node/data", "made/node/data", "aside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(f"of {name}")
    place, staged, aside = (str(tmp_path / name) for name in ("node/data", "made/node/data", "aside/node/data"))
    unit = Unit(place, staged, aside, exchange.known(place), exchange.known(staged))
    for _ in range(2):
        exchange.forward(unit)
        assert text(unit.place) == "of made/node/data" and text(unit.aside) == "of node/data"
        exchange.remove_empty([unit.staged], str(tmp_path / "made"))
        assert not (tmp_path / "made").exists()
    exchange.back(unit, ran=False)
    assert text(unit.place) == "of node/data"
    exchange.remove_new(unit, ran=False)
    exchange.remove_empty([unit.staged], str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


@pytest.mark.root
def test_a_directory_that_is_missing_above_a_place_is_the_nodes(tmp_path: Path) -> None:
    staged = tmp_path / "made" / "geth" / "nodekey"
    staged.parent.mkdir(parents=True)
    staged.write_text("key")
    os.chown(staged.parent, 65534, 65534)
    os.chmod(staged.parent, 0o750)
    place = tmp_path / "node" / "geth" / "nodekey"
    (tmp_path / "node").mkdir()
    assert exchange.missing_above(str(place)) == [str(place.parent)]
    exchange.forward(Unit(str(place), str(staged), str(tmp_path / "aside"), None, exchange.known(str(staged))))
    found = place.parent.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (65534, 65534, 0o750)
