"""A restore in place of a mount point: nothing can be renamed as a whole, so entries change places one by one. What the
power does to that, what undo does with what the restored node has made, and with what was signed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.in_place_kit import Story, difference, journals, ok, picture, point, run_here, story

pytestmark = pytest.mark.root

IN_PLACE = ("restore", "latest", "--in-place", "--yes")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Story]:
    with story("entries", tmp_path) as made:
        made.begin(blocks=20)
        made.run_and_damage()
        yield made


def cut_in_the_middle(node: Story, after: int = 2) -> None:
    """SIGKILL between two renames."""
    calls = run_here(node.command, *IN_PLACE)[2]
    ok(node, "restore", "--undo", "ours")
    killed, _, _ = run_here(node.command, *IN_PLACE, kill_at=point(calls, "after-forward", after))
    assert killed == -signal.SIGKILL and not node.as_it_was() and not node.restored()


def another_boot(node: Story) -> None:
    """As far as the journal can tell, the machine has been started anew."""
    (journal,) = journals(node)
    head, _, rest = journal.read_text().partition("\n")
    record = json.loads(head)
    assert record["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    journal.write_text(json.dumps({**record, "boot": "another"}) + "\n" + rest)


def test_the_plan_says_what_a_power_cut_can_do_to_a_service_without_a_unit(node: Story) -> None:
    warnings = ok(node, "restore", "latest", "--in-place", "--dry-run")["warnings"]
    assert any("can't be kept from starting at boot" in text for text in warnings)
    only_one = [text for text in warnings if "manager.py" in text]
    assert len(only_one) == 1


def test_a_node_that_ran_on_a_mix(node: Story) -> None:
    """Power cut between two renames, and its starter has started it: it made a file anew by a rename, as programs do.
    To go on would end in neither state; the way back is there."""
    cut_in_the_middle(node)
    another_boot(node)
    node.service.do("start")
    (node.data / "new").write_text("[]")
    os.replace(node.data / "new", node.data / "static-nodes.json")
    error = ok(node, "restore", "--continue", "ours", code=3)
    assert "mix" in error["message"] and "--undo" in error["cure"] and node.service.running()
    (node.data / "static-nodes.json").write_text("[]")
    done = ok(node, "restore", "--undo", "ours")
    assert any("mix" in text for text in done["warnings"])
    assert node.as_it_was(), difference(picture(node.data), node.old)
    assert node.service.running() and not node.leftovers() and not journals(node)


def test_one_that_was_only_killed_goes_on(node: Story) -> None:
    cut_in_the_middle(node)
    ok(node, "restore", "--continue", "ours")
    now = {name: what for name, what in picture(node.data).items() if not name.startswith(".corrupted-")}
    assert not difference(now, node.of_set) and node.service.running()


def test_what_the_old_run_made_anew_before_anything_changed_places_is_not_lost(node: Story) -> None:
    calls = run_here(node.command, *IN_PLACE)[2]
    ok(node, "restore", "--undo", "ours")
    at = point(calls, "before-forward")
    assert run_here(node.command, *IN_PLACE, kill_at=at)[0] == -signal.SIGKILL
    node.service.do("start")
    (node.data / "anew").write_text("[]")
    os.replace(node.data / "anew", node.data / "static-nodes.json")
    ok(node, "restore", "--undo", "ours")
    assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


def test_what_was_made_ready_twice_leaves_nothing(node: Story) -> None:
    """Killed while it was made ready: --continue makes it anew."""
    calls = run_here(node.command, *IN_PLACE)[2]
    ok(node, "restore", "--undo", "ours")
    run_here(node.command, *IN_PLACE, kill_at=point(calls, "before-Mirror.update"))
    ok(node, "restore", "--continue", "ours")
    assert not [name for name in os.listdir(node.data) if "restoring" in name]


def test_after_a_boot_that_started_nothing_the_way_back_is_open(node: Story) -> None:
    cut_in_the_middle(node)
    another_boot(node)
    ok(node, "restore", "--continue", "ours", code=3)
    ok(node, "restore", "--undo", "ours")
    assert node.as_it_was() and node.service.running() and not node.leftovers()


def test_one_that_something_starts_between_the_renames_and_our_start(node: Story) -> None:
    """As a container with a restart policy. It is undone; what that run has made anew by a rename goes with it."""

    def patch() -> None:
        from snapshotter.host import exchange

        whole, calls = exchange.sync_parents, []

        def sync_parents(paths: list[str]) -> None:
            whole(paths)
            if not calls:
                calls.append(1)
                node.service.do("start")
                (node.data / "new").write_text("by the wrong run")
                os.replace(node.data / "new", node.data / "static-nodes.json")
                (node.data / "made.json").write_text("by the wrong run")

        exchange.sync_parents = sync_parents  # type: ignore[assignment]

    error = ok(node, *IN_PLACE, code=5, before=patch)
    assert "in use" in error["message"] or "starts it again" in error["message"]
    assert node.as_it_was(), difference(picture(node.data), node.old)
    assert node.service.running() and not node.leftovers() and not journals(node)


def made_anew(node: Story) -> None:
    """What a node makes of its own at the top, and what isn't its."""
    (node.data / "made").mkdir()
    (node.data / "made" / "deep").write_text("x")
    (node.data / "made.json").write_text("{}")
    (node.data / "DATABASE_METADATA.json").unlink()
    (node.data / "DATABASE_METADATA.json").write_text("{}")


def test_undo_takes_the_new_runs_own_files_along(node: Story) -> None:
    """As of a directory that is renamed whole: nothing of the new run is left among the old files."""
    (node.data / "logs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", node.data / "logs"], check=True)
    try:
        node.old = picture(node.data)
        ok(node, *IN_PLACE)
        made_anew(node)
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was(), difference(picture(node.data), node.old)
        assert node.service.running() and not node.leftovers() and os.path.ismount(node.data / "logs")
        # What a person puts there while nothing ran is nobody's to remove.
        calls = run_here(node.command, *IN_PLACE)[2]
        ok(node, "restore", "--undo", "ours")
        run_here(node.command, *IN_PLACE, kill_at=point(calls, "after-forward", 2))
        (node.data / "note").write_text("from a person")
        ok(node, "restore", "--undo", "ours")
        assert (node.data / "note").read_text() == "from a person"
    finally:
        node.service.end()
        subprocess.run(["umount", node.data / "logs"], check=True)


def test_an_undo_that_is_killed_does_so_too(node: Story) -> None:
    ok(node, *IN_PLACE)
    made_anew(node)
    calls = run_here(node.command, "restore", "--undo", "ours")[2]
    assert node.as_it_was()
    events = [n for n, name in enumerate(calls, 1) if name.split("-", 1)[1] in ("move", "remove", "Journal.append")]
    for place in events[::3]:
        ok(node, *IN_PLACE)
        made_anew(node)
        run_here(node.command, "restore", "--undo", "ours", kill_at=place)
        if journals(node):
            ok(node, "restore", "--undo", "ours")
        assert node.as_it_was(), (place, difference(picture(node.data), node.old))
        assert node.service.running() and not node.leftovers()


def test_what_the_old_run_makes_after_an_undo_stays(node: Story) -> None:
    """Killed when the old node ran again already: the undo that ends it doesn't take that for the new run's."""
    ok(node, *IN_PLACE)
    calls = run_here(node.command, "restore", "--undo", "ours")[2]
    ok(node, *IN_PLACE)
    run_here(node.command, "restore", "--undo", "ours", kill_at=point(calls, "before-Journal.remove"))
    assert node.service.running()
    (node.data / "made.json").write_text("by the old run")
    os.replace(node.data / "made.json", node.data / "static-nodes.json")
    (node.data / "other.json").write_text("by the old run")
    ok(node, "restore", "--undo", "ours")
    assert (node.data / "other.json").read_text() == (node.data / "static-nodes.json").read_text() == "by the old run"
    assert node.service.running() and not journals(node)


def test_a_part_whose_files_were_not_there_before(tmp_path: Path) -> None:
    """resync of a node without metadata: the new run makes them, the undo takes them along."""
    with story("copy", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        node.service.do("stop")
        (node.data / "VERSION_METADATA.json").unlink()
        for path in (node.data / "database").iterdir():
            path.unlink()
        (node.data / "database" / "x").write_text("x")
        node.old = picture(node.data)
        node.service.do("start")
        ok(node, "resync", "ours", "--yes")
        (node.data / "VERSION_METADATA.json").write_text("{}")
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was(), difference(picture(node.data), node.old)


def test_what_an_image_holds_of_an_earlier_restore_is_not_put_in_place(node: Story) -> None:
    """A take while the old data waits has that in its image too, as it lies in the mount point: nobody's any more."""
    ok(node, *IN_PLACE)
    taken = ok(node, "take", "ours")["set_id"]
    assert node.leftovers()
    ok(node, "restore", "--discard", "ours", "--yes")
    ok(node, "restore", taken, "--in-place", "--yes")
    ok(node, "restore", "--discard", "ours", "--yes")
    assert not node.leftovers() and node.restored(), difference(picture(node.data), node.of_set)
