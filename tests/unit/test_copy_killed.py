"""SIGKILL of a run of the copy provider at random instants of every step; then its inverses, by a new run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotter.core.errors import BusyError
from snapshotter.core.model import Access, Birth, Hold, ImageState, new_attachment_id, utc_now
from snapshotter.testing.harness import describe, make_birth
from tests.unit.copy_kit import SEAL, Place

Act = Callable[[Place, Birth, str], None]


def prepare(place: Place, birth: Birth, _: str) -> None:
    place.provider().prepare([place.volume()], birth, 30.0)


def create(place: Place, birth: Birth, _: str) -> None:
    place.provider().create([place.volume()], birth, Hold())


def mark(place: Place, birth: Birth, _: str) -> None:
    place.provider().mark(birth.set_id, SEAL)


def delete(place: Place, birth: Birth, _: str) -> None:
    place.provider().delete(birth.set_id)


def attach(place: Place, birth: Birth, attachment_id: str) -> None:
    place.provider().attach(place.snapshot(birth), attachment_id, Access.WRITABLE, str(place.top / "clone"))


def detach(place: Place, _: Birth, attachment_id: str) -> None:
    place.provider().detach(attachment_id)


#: What is killed, and what was done before it.
STEPS: dict[str, tuple[Act, list[Act]]] = {
    "prepare": (prepare, []),
    "create": (create, [prepare]),
    "mark": (mark, [create]),
    "delete": (delete, [create, mark]),
    "attach": (attach, [create, mark]),
    "detach": (detach, [create, mark, attach]),
}


def in_child(act: Act, place: Place, birth: Birth, attachment_id: str, after_s: float) -> None:
    """Run it in a process of its own and kill that after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            act(place, birth, attachment_id)
        finally:
            os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_random_instants(tmp_path: Path, request: pytest.FixtureRequest, step: str) -> None:
    place = Place(tmp_path)
    for number in range(150):
        directory = place.data / f"d{number % 5}"
        directory.mkdir(exist_ok=True)
        (directory / f"{number}").write_bytes(os.urandom(random.randrange(100_000)))
    keep = place.take()  # another set, which must never be harmed
    content, before = describe(str(place.data)), place.kept()
    act, earlier = STEPS[step]
    times = 40 if request.config.getoption("--full", default=False) else 8

    def fresh() -> tuple[Birth, str]:
        birth, attachment_id = make_birth([place.volume()]), new_attachment_id(utc_now())
        # prepare and create share what one process knows: where create is killed, that process does both.
        for each in earlier if step != "create" else []:
            each(place, birth, attachment_id)
        return birth, attachment_id

    def whole(place: Place, birth: Birth, attachment_id: str) -> None:
        for each in earlier if step == "create" else []:
            each(place, birth, attachment_id)
        act(place, birth, attachment_id)

    birth, attachment_id = fresh()
    began = time.monotonic()
    whole(place, birth, attachment_id)
    usual_s = time.monotonic() - began
    undo(place, birth, attachment_id)
    assert place.kept() == before
    for _ in range(times):
        birth, attachment_id = fresh()
        in_child(whole, place, birth, attachment_id, random.uniform(0, usual_s * 1.2))
        for found in place.provider().snapshots(birth.set_id):
            if "sealed" in found.marks:
                assert found.state is ImageState.READY and describe(str(place.image(birth))) == content
        if step == "attach":
            assert not any(each.held for each in place.provider().attachments()), "held by a dead run"
        undo(place, birth, attachment_id)
        assert place.kept() == before
        assert not (place.top / "clone").exists()
        assert describe(str(place.image(keep))) == content and place.snapshot(keep).state is ImageState.READY
        assert describe(str(place.data)) == content


def undo(place: Place, birth: Birth, attachment_id: str) -> None:
    for inverse in (
        lambda: place.provider().detach(attachment_id),
        lambda: place.provider().delete(birth.set_id),
        lambda: place.provider().reap(),
    ):
        for _ in range(100):  # the dead child's descriptors may be closed a moment later
            try:
                inverse()
                break
            except BusyError:
                time.sleep(0.05)
        else:
            pytest.fail("busy for ever")
