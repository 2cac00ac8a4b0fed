"""Entries that change places: what was set aside is removed by nobody who only undoes."""

from __future__ import annotations

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
    for ran in (False, True):
        with pytest.raises(StorageError):
            exchange.remove_new(unit, ran=ran)
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
