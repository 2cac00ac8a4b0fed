"""What our part of a take on btrfs costs beside the command's own snapshot, in one run; and a listing of many sets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest

from snapshotter.core.model import Access, Hold, new_attachment_id, new_set_id, utc_now
from snapshotter.testing import make_birth
from snapshotter.testing.harness import fill
from tests.unit.btrfs_kit import btrfs_harness, command

pytestmark = [pytest.mark.root, pytest.mark.alone]


def test_a_take_and_its_parts(measured: Callable[[str], None]) -> None:
    with btrfs_harness() as harness:
        volume = harness.volume()
        assert volume.path is not None
        fill(volume.path)
        ms: dict[str, list[float]] = {}

        def timed(name: str, act: Callable[[], object]) -> None:
            began = time.perf_counter()
            act()
            ms.setdefault(name, []).append((time.perf_counter() - began) * 1000)

        for number in range(15):
            with open(f"{volume.path}/log", "ab") as file:
                file.write(b"x" * 10_000)
            timed(
                "raw",
                lambda number=number: command(
                    "subvolume", "snapshot", "-r", volume.path, f"{harness.point}/raw-{number}"
                ),
            )  # type: ignore[misc]
            with open(f"{volume.path}/log", "ab") as file:
                file.write(b"x" * 10_000)
            birth, provider = make_birth([volume], set_id=new_set_id(utc_now())), harness.provider()
            timed("check", lambda: provider.check([volume], birth))
            timed("prepare", lambda: provider.prepare([volume], birth, 1.0))
            timed("create", lambda: provider.create([volume], birth, Hold()))
            timed("seal", lambda: provider.mark(birth.set_id, {"sealed": "20261122t100630z"}))
            ms.setdefault("take", []).append(sum(ms[name][-1] for name in ("check", "prepare", "create", "seal")))
            timed("list", lambda: list(provider.snapshots()))
            attachment_id, found = new_attachment_id(utc_now()), next(iter(provider.snapshots(birth.set_id)))
            timed("attach", lambda: provider.attach(found, attachment_id, Access.WRITABLE, "/nowhere"))
            timed("detach", lambda: provider.detach(attachment_id))
            timed("delete", lambda: harness.provider().delete(birth.set_id))
        median = {name: statistics.median(each) for name, each in ms.items()}
        measured("btrfs, ms in the provider: " + ", ".join(f"{name} {each:.1f}" for name, each in median.items()))
        # btrbk needs twelve times the raw command; the interpreter's start is the core's to measure.
        assert median["take"] < 6 * median["raw"] + 20
