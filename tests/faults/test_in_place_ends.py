"""How a restore in place ends: discarded (and that cut, or refused), undone with a full journal disk, gone on with
though the node isn't well. And what else it must not trip over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from snapshotter.core.errors import BusyError, StorageError
from snapshotter.nodes import health
from tests.faults.in_place_kit import (
    Managed,
    Story,
    difference,
    journals,
    ok,
    own_disk,
    picture,
    point,
    run_here,
    story,
    with_a_mask,
)
from tests.support import loop_file_system

IN_PLACE = ("restore", "latest", "--in-place", "--yes")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Story]:
    with story("copy", tmp_path) as made:
        made.begin(blocks=20)
        made.run_and_damage()
        yield made


def test_a_restore_by_a_version_whose_config_had_another_key_can_be_undone(node: Story) -> None:
    ok(node, *IN_PLACE)
    (journal,) = journals(node)
    journal.write_text(journal.read_text().replace('"node":{', '"node":{"genesis":null,', 1))
    ok(node, "restore", "--undo", "ours")
    assert node.as_it_was() and node.service.running()


# ---------------------------------------------------------------------------------------------- volumes, discarded


@contextmanager
def two_volumes() -> Iterator[Story]:
    """The data path and its database, each a subvolume: two swaps. (Their paths are short: of two long ones a record
    has no room for the node's address beside them, and who comes back unnamed can't be swapped in.)"""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place, story("btrfs", Path(place)) as node:
        for path in (node.data, node.place / "db"):
            subprocess.run(["btrfs", "subvolume", "create", path], check=True, capture_output=True)
        (node.data / "database").symlink_to(node.place / "db")
        node.begin(blocks=20)
        node.of_database = picture(node.place / "db", {"node.log"})  # type: ignore[attr-defined]
        node.service.do("start")
        node.service.do("stop")
        for path in (node.place / "db").iterdir():
            path.write_bytes(b"broken")
        (node.data / "static-nodes.json").write_text("broken")
        node.old = picture(node.data)
        yield node


def database(node: Story) -> Any:
    return picture(node.place / "db", {"node.log"})


@pytest.mark.root
def test_a_discard_that_is_cut_between_two_volumes_goes_on_and_never_back() -> None:
    with two_volumes() as node:
        plan = ok(node, *IN_PLACE)
        assert plan["way"] == "swap" and len(plan["aside"]) == 2
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was()
        ok(node, *IN_PLACE)
        cut = lambda: kill_after_one_commit()  # noqa: E731
        killed, said, _ = run_here(node.command, "restore", "--discard", "ours", "--yes", before=cut)
        assert killed == -signal.SIGKILL, said
        error = ok(node, "restore", "--undo", "ours", code=3)
        assert "--discard" in error["cure"]
        assert node.restored() and database(node) == node.of_database  # type: ignore[attr-defined]
        ok(node, "restore", "--discard", "ours", "--yes")
        assert node.restored() and database(node) == node.of_database  # type: ignore[attr-defined]
        assert not journals(node)
        listed = subprocess.run(["btrfs", "subvolume", "list", node.place], capture_output=True, text=True).stdout
        assert "/swaps/" not in listed


def kill_after_one_commit() -> None:
    import os

    from providers.btrfs import BtrfsProvider

    whole = BtrfsProvider.swap_commit

    def commit(self: BtrfsProvider, swap_id: str) -> None:
        whole(self, swap_id)
        os.kill(os.getpid(), signal.SIGKILL)

    BtrfsProvider.swap_commit = commit  # type: ignore[method-assign]


def refuse(name: str) -> Callable[[], None]:
    def patch() -> None:
        from providers.btrfs import BtrfsProvider

        def refused(self: BtrfsProvider, _: str) -> None:
            raise BusyError("something depends on it")

        setattr(BtrfsProvider, name, refused)

    return patch


@pytest.mark.root
def test_a_discard_that_is_refused_leaves_the_way_back() -> None:
    with two_volumes() as node:
        ok(node, *IN_PLACE)
        ok(node, "restore", "--discard", "ours", "--yes", code=5, before=refuse("swap_commit"))
        ok(node, "restore", "--continue", "ours")
        assert node.restored()
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and not journals(node)


@pytest.mark.root
def test_a_delete_that_is_refused_keeps_the_seal() -> None:
    with two_volumes() as node:
        ok(node, "delete", node.set_id, "--yes", "--last", code=5, before=refuse("delete"))
        (found,) = ok(node, "list", "ours")["sets"]
        assert found["good"] and found["state"] == "ready"
        ok(node, *IN_PLACE)
        assert node.restored()


# ----------------------------------------------------------------------------------------------- the journal's disk


def full() -> Callable[[], None]:
    def patch() -> None:
        from snapshotter.core.journal import Journal

        def append(self: Journal, kind: str, **facts: Any) -> None:
            raise StorageError("can't write the journal: No space left on device", object=self.path)

        Journal.append = append  # type: ignore[method-assign]

    return patch


@pytest.mark.parametrize("kind", ["copy", pytest.param("entries", marks=pytest.mark.root)])
def test_an_undo_needs_no_room_for_its_journal(tmp_path: Path, kind: str) -> None:
    with story(kind, tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, *IN_PLACE)
        (node.data / "made.json").write_text("{}")
        ok(node, "restore", "--undo", "ours", before=full())
        assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


@pytest.mark.root
def test_an_undo_that_fails_on_the_way_says_so_whatever_the_journal_could_take(tmp_path: Path) -> None:
    """Exit 7, the stopped service named; done again, it ends."""

    def patch() -> None:
        full()()
        from snapshotter.host import exchange

        whole = exchange.back

        def back(unit: exchange.Unit, *, ran: bool) -> None:
            if unit.place.endswith("/key"):
                raise StorageError("the disk is full")
            whole(unit, ran=ran)

        exchange.back = back

    with story("entries", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, *IN_PLACE)
        error = ok(node, "restore", "--undo", "ours", code=7, before=patch)
        assert any("stopped" in left for left in error["left"]) and "--undo" in error["undo_command"]
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and node.service.running() and not node.leftovers()


@pytest.mark.root
def test_old_data_that_was_brought_back_from_another_disk_is_not_taken_for_the_new_runs(tmp_path: Path) -> None:
    """The undo is killed as it removes the copy: done again, it leaves what it has brought back."""
    with story("away", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        restore = ("restore", node.set_id, *node.in_place)
        ok(node, *restore)
        calls = run_here(node.command, "restore", "--undo", "ours")[2]
        assert node.as_it_was()
        ok(node, *restore)
        last = calls.count("before-remove")
        killed, _, _ = run_here(node.command, "restore", "--undo", "ours", kill_at=point(calls, "before-remove", last))
        assert killed == -signal.SIGKILL and journals(node)
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was(), difference(picture(node.data), node.old)
        assert node.service.running() and not node.leftovers()


# ------------------------------------------------------------------------------------------ what was set aside is gone


def gone(node: Story, how: str) -> None:
    """By an operator's hand: the whole aside, or a part of it."""
    (aside,) = map(Path, node.leftovers())
    if how == "whole":
        shutil.rmtree(aside)
    elif how == "moved":
        aside.rename(aside.parent / "elsewhere")
    else:
        shutil.rmtree(aside / "database")


LOSSES = [("copy", "whole"), *(pytest.param("entries", how, marks=pytest.mark.root) for how in ("part", "moved"))]


def as_restored(node: Story) -> bool:
    """But for what the restored node has made, what is set aside, and what was moved away."""
    others = ("elsewhere", "made", ".corrupted-")
    now = {name: what for name, what in picture(node.data).items() if not name.startswith(others)}
    return not difference(now, node.of_set)


@pytest.mark.parametrize(("kind", "how"), LOSSES)
def test_an_undo_without_the_old_data_is_refused_before_anything_is_stopped(
    tmp_path: Path, kind: str, how: str
) -> None:
    with story(kind, tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, *IN_PLACE)
        did = node.service.did()
        gone(node, how)
        error = ok(node, "restore", "--undo", "ours", code=3)
        assert "--discard" in error["cure"] and ".corrupted-" in error["object"]
        assert node.service.did() == did and node.service.running() and as_restored(node)
        if how == "moved":
            (elsewhere,) = node.data.glob("elsewhere")
            elsewhere.rename(Path(error["object"]).parent)
            ok(node, "restore", "--undo", "ours")
            assert node.as_it_was() and node.service.running() and not node.leftovers()
            return
        ok(node, "restore", "--discard", "ours", "--yes")
        assert node.service.did() == did and as_restored(node) and not node.leftovers() and not journals(node)


@pytest.mark.parametrize(("kind", "how"), LOSSES)
def test_one_that_goes_while_it_is_put_back_leaves_a_way_out(tmp_path: Path, kind: str, how: str) -> None:
    """The undo has begun, so the service is stopped, masked, and what is there a mix: a discard ends it, and the node
    runs on what was restored."""
    masked = tmp_path / "home" / "etc" / "masked"

    def unasked() -> None:
        from snapshotter.verbs.in_place_work import Work

        with_a_mask(node)()
        Work.refuse_lost = lambda _: None  # type: ignore[method-assign]

    with story(kind, tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, *IN_PLACE, before=with_a_mask(node))
        (node.data / "made.json").write_text("[]")
        (node.data / "new").write_text("[]")
        (node.data / "new").replace(node.data / "static-nodes.json")
        gone(node, how)
        ok(node, "restore", "--undo", "ours", code=7, before=unasked)
        assert masked.exists() and not node.service.running()
        for way in ("--undo", "--continue"):
            error = ok(node, "restore", way, "ours", code=7, before=with_a_mask(node))
            assert "--discard" in error["cure"] and any("stopped" in left for left in error["left"])
        assert ok(node, "take", "ours", code=5)
        done = ok(node, "restore", "--discard", "ours", "--yes", before=with_a_mask(node))
        assert any("stands there again" in text for text in done["warnings"])
        assert as_restored(node) and (node.data / "made.json").exists()
        assert node.service.running() and not masked.exists() and not node.leftovers() and not journals(node)


@pytest.mark.root
def test_one_that_was_cut_in_the_middle_goes_on_without_the_old_data(tmp_path: Path) -> None:
    with story("entries", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        calls = run_here(node.command, *IN_PLACE)[2]
        ok(node, "restore", "--undo", "ours")
        assert run_here(node.command, *IN_PLACE, kill_at=point(calls, "after-forward", 3))[0] == -signal.SIGKILL
        shutil.rmtree(next(path for path in node.leftovers() if ".corrupted-" in path))
        error = ok(node, "restore", "--undo", "ours", code=3)
        assert "--continue" in error["cure"] and "--discard" in error["cure"]
        ok(node, "restore", "--continue", "ours")
        assert node.service.running()
        ok(node, "restore", "--discard", "ours", "--yes")
        assert as_restored(node) and not node.leftovers() and not journals(node)


@pytest.mark.root
def test_some_of_what_was_copied_to_another_disk_is_gone(tmp_path: Path) -> None:
    with story("away", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, "restore", node.set_id, *node.in_place)
        gone(node, "part")
        did = node.service.did()
        ok(node, "restore", "--undo", "ours", code=3)
        assert node.service.did() == did and node.service.running() and node.restored()
        ok(node, "restore", "--discard", "ours", "--yes")
        assert node.restored() and not node.leftovers() and not journals(node)


def restored_again(node: Story) -> list[str]:
    """Restored, undone and restored again; the calls of that undo."""
    ok(node, *IN_PLACE)
    undoing = run_here(node.command, "restore", "--undo", "ours")[2]
    ok(node, *IN_PLACE)
    return undoing


def anew(node: Story, name: str = "static-nodes.json") -> None:
    """As programs do with small files: a new one takes the name."""
    shutil.copy(node.data / name, node.data / "anew")
    (node.data / "anew").replace(node.data / name)


@pytest.mark.root
@pytest.mark.parametrize("way", ["--undo", "--continue"])
def test_what_was_back_and_is_made_anew_by_the_old_run_is_not_gone(tmp_path: Path, way: str) -> None:
    """The power fails in the undo, all of the old is back; the node is started at boot, and makes and removes files."""
    with story("entries", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, *IN_PLACE)
        anew(node, "key")  # the new run does too
        undoing = run_here(node.command, "restore", "--undo", "ours")[2]
        assert node.as_it_was()
        ok(node, *IN_PLACE)
        anew(node, "key")
        at = point(undoing, "after-back", undoing.count("after-back"))
        assert run_here(node.command, "restore", "--undo", "ours", kill_at=at)[0] == -signal.SIGKILL
        node.service.do("start")
        for name in ("static-nodes.json", "key", "old.pid"):  # the last one the set lacks
            anew(node, name)
        removed = (node.data / "VERSION_METADATA.json").read_bytes()
        (node.data / "VERSION_METADATA.json").unlink()
        (node.data / "made.json").write_text("by the old run")
        error = ok(node, "restore", "--discard", "ours", "--yes", code=3)
        assert "--discard" not in error["cure"] and node.service.running()
        ok(node, "restore", way, "ours")
        assert (node.data / "made.json").read_text() == "by the old run"
        (node.data / "made.json").unlink()
        (node.data / "VERSION_METADATA.json").write_bytes(removed)
        assert node.as_it_was(), difference(picture(node.data), node.old)
        assert node.service.running() and not node.leftovers() and not journals(node)


@pytest.mark.root
def test_a_discard_of_a_half_undo_takes_what_the_old_run_made_anew_for_old(tmp_path: Path) -> None:
    """The undo is cut in the middle, the node runs on that mix, and what was set aside is gone: all of the new."""
    with story("entries", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        undoing = restored_again(node)
        at = point(undoing, "after-back", 3)
        assert run_here(node.command, "restore", "--undo", "ours", kill_at=at)[0] == -signal.SIGKILL
        gone(node, "part")
        node.service.do("start")
        anew(node, "DATABASE_METADATA.json")  # was back
        pid = node.service.pid()
        error = ok(node, "restore", "--undo", "ours", code=7)
        assert "--discard" in error["cure"] and error["object"].endswith("/database")
        ok(node, "restore", "--discard", "ours", "--yes")
        assert as_restored(node) and not node.leftovers() and not journals(node)
        assert node.service.running() and node.service.pid() != pid, "it ran while its data changed places"


@pytest.mark.root
@pytest.mark.parametrize("cut", ["before the first", "after the second"])
def test_what_never_changed_places_and_is_made_anew_is_not_gone(tmp_path: Path, cut: str) -> None:
    """Killed there, run by hand, and stopped again: nothing tells that it has run, but for what it made anew."""
    with story("entries", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        restoring = (run_here(node.command, *IN_PLACE)[2], ok(node, "restore", "--undo", "ours"))[0]
        at = point(restoring, "before-forward") if cut == "before the first" else point(restoring, "after-forward", 2)
        for way in ("asked for", "by itself"):
            assert run_here(node.command, *IN_PLACE, kill_at=at)[0] == -signal.SIGKILL
            node.service.do("start")
            anew(node)
            node.service.do("stop")
            shell = subprocess.Popen(["sleep", "1000"], cwd=node.data / "plugins" if way == "by itself" else "/")
            try:
                if way == "by itself" and cut == "before the first":
                    ok(node, "restore", "--continue", "ours", code=5)
                    assert node.as_it_was() and node.service.running()
            finally:
                shell.kill()
                shell.wait()
            if journals(node):
                ok(node, "restore", "--undo", "ours")
            assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


@pytest.mark.root
@pytest.mark.parametrize("full_at", ["returned", "returned, once", "the undo"])
def test_a_journal_that_could_not_take_that_all_is_back_destroys_nothing_later(tmp_path: Path, full_at: str) -> None:
    """Something of the new can't be removed; the node runs on the old meanwhile, and makes files, some of them anew."""
    with story("entries", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, *IN_PLACE)
        held = node.data / "database" / "kept"
        held.write_text("x")
        subprocess.run(["chattr", "+i", held], check=True)
        try:
            fault = full() if full_at == "the undo" else no_room_for("returned", once="once" in full_at)
            error = ok(node, "restore", "--undo", "ours", code=7, before=fault)
            assert "--discard" not in error["cure"] and "--undo" in error["undo_command"] and node.service.running()
            (journal,) = journals(node)
            assert ("returned" in journal.read_text()) == ("once" in full_at), "the new had taken its room"
            for name in ("static-nodes.json", "key", "old.pid"):
                anew(node, name)
            (node.data / "made.json").write_text("by the old run")
            for _ in range(2):  # nor does what is left of the new, or none of it
                if full_at != "the undo":
                    assert "--discard" not in ok(node, "restore", "--discard", "ours", "--yes", code=3)["cure"]
                error = ok(node, "restore", "--undo", "ours", code=7, before=fault)
                assert "--discard" not in error["cure"] and node.service.running()
        finally:
            for path in node.data.rglob("kept"):
                subprocess.run(["chattr", "-i", path], check=True)
        ok(node, "restore", "--undo", "ours")
        assert (node.data / "made.json").read_text() == "by the old run"
        (node.data / "made.json").unlink()
        assert node.as_it_was(), difference(picture(node.data), node.old)
        assert node.service.running() and not node.leftovers() and not journals(node)


def test_an_undo_that_its_journal_could_tell_only_the_end_of_is_one(tmp_path: Path) -> None:
    """Its disk was full at first, and the run was killed before it was over."""
    with story("copy", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, *IN_PLACE)

        def patch() -> None:
            no_room_for("undo")()
            from snapshotter.verbs.in_place_work import Work

            def killed(*_: object) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            Work.let_run = killed  # type: ignore[method-assign]

        assert run_here(node.command, "restore", "--undo", "ours", before=patch)[0] == -signal.SIGKILL
        (journal,) = journals(node)
        assert '"returned"' in journal.read_text() and '"undo"' not in journal.read_text()
        error = ok(node, "restore", "--discard", "ours", "--yes", code=3)
        assert "--undo" in error["cure"]
        assert "--undo" in ok(node, "take", "ours", code=5)["cure"]
        said = json.loads(run_here(node.command, "doctor", "--json")[1])
        (cure,) = (each["cure"] for each in said["findings"] if each["check"] == "restore")
        assert "--undo" in cure and "--discard" not in cure
        ok(node, "restore", "--continue", "ours")
        assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


@pytest.mark.root
def test_the_old_data_is_never_removed_where_the_new_is_gone(tmp_path: Path) -> None:
    """An undo was cut with most of the old back, and somebody removed all the rest, of the old and the new."""
    with story("entries", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        undoing = restored_again(node)
        at = point(undoing, "after-back", undoing.count("after-back") - 1)
        assert run_here(node.command, "restore", "--undo", "ours", kill_at=at)[0] == -signal.SIGKILL
        (aside,) = node.data.glob(".corrupted-*")
        shutil.rmtree(aside)
        anew(node, "DATABASE_METADATA.json")
        ok(node, "restore", "--undo", "ours", code=7)
        before, did = picture(node.data), node.service.did()
        for _ in range(2):
            error = ok(node, "restore", "--discard", "ours", "--yes", code=6)
            assert "is gone" in error["message"] and ".corrupted-" in error["cure"]
            assert not difference(picture(node.data), before) and node.service.did() == did
        (node.data / "static-nodes.json").unlink()  # the one that was not back: by a person
        ok(node, "restore", "--undo", "ours")
        assert node.service.running() and not node.leftovers() and not journals(node)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["copy", "entries"])
def test_an_undo_that_was_cut_and_could_not_tell_is_no_finished_restore(tmp_path: Path, kind: str) -> None:
    """The journal's disk was full. A discard would have removed what was not back yet."""
    with story(kind, tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, *IN_PLACE)

        def full() -> None:
            from snapshotter.verbs.in_place_work import Work

            Work.note = lambda *_, **__: False  # type: ignore[method-assign]

        seen = run_here(node.command, "restore", "--undo", "ours", before=full)[2]
        ok(node, *IN_PLACE)
        at = point(seen, "after-back", 1 if kind == "copy" else 3)
        killed = run_here(node.command, "restore", "--undo", "ours", before=full, kill_at=at)[0]
        assert killed == -signal.SIGKILL
        (journal,) = journals(node)
        assert '"undo"' not in journal.read_text() and '"returned"' not in journal.read_text()
        before = picture(node.data)
        assert "--undo" in ok(node, "restore", "--discard", "ours", "--yes", code=3)["cure"]
        assert not difference(picture(node.data), before)
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


@pytest.mark.root
def test_that_it_ran_on_a_mix_is_known_also_once_it_is_stopped(tmp_path: Path) -> None:
    """The first undo stopped it, and then met a shell in the data path."""
    with story("entries", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        calls = run_here(node.command, *IN_PLACE)[2]
        ok(node, "restore", "--undo", "ours")
        assert run_here(node.command, *IN_PLACE, kill_at=point(calls, "after-forward", 3))[0] == -signal.SIGKILL
        assert node.service.do("start") == 0
        anew(node)
        shell = subprocess.Popen(["sleep", "60"], cwd=node.data)
        try:
            assert ok(node, "restore", "--undo", "ours", code=7)["cure"]
        finally:
            shell.kill()
            shell.wait()
        assert not node.service.running()
        ok(node, "restore", "--undo", "ours")
        assert node.service.running() and not node.leftovers() and not journals(node)
        assert difference(picture(node.data), node.old) in ([], ["static-nodes.json"])


# ---------------------------------------------------------------------------------------------------- not well, twice


def test_to_continue_one_whose_node_is_not_well_is_no_success(node: Story) -> None:
    (node.service.home / "bad-start").write_text("nothing")
    error = ok(node, *IN_PLACE, code=8)
    assert "--undo" in error["undo_command"] and node.restored()
    error = ok(node, "restore", "--continue", "ours", code=8)
    assert "--undo" in error["undo_command"]
    (node.service.home / "bad-start").unlink()
    node.service.do("start")
    ok(node, "restore", "--continue", "ours")
    assert node.restored() and node.service.running()
    ok(node, "restore", "--undo", "ours")
    assert node.as_it_was() and node.service.running()


# -------------------------------------------------------------------------------- what can't be moved, nor removed


@pytest.mark.root
@pytest.mark.parametrize("kind", ["copy", "entries"])
@pytest.mark.parametrize("how", ["immutable", "mounted"])
def test_what_was_restored_and_can_not_be_removed_keeps_no_node_stopped(tmp_path: Path, kind: str, how: str) -> None:
    with story(kind, tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, *IN_PLACE)
        held = node.data / "database" / ("sub" if how == "mounted" else "kept")
        if how == "mounted":
            held.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(held)], check=True)
        else:
            held.write_text("x")
            subprocess.run(["chattr", "+i", str(held)], check=True)
        try:
            error = ok(node, "restore", "--undo", "ours", code=7, before=with_a_mask(node))
            assert node.as_it_was() or kind == "entries"  # there, what is left of it lies below
            assert node.service.running() and not (node.command.home / "masked").exists()
            (where,) = error["left"]
            real = error["cure"].split()[-1]
            assert Path(real if how == "mounted" else where).exists()
            assert error["cure"].startswith("umount" if how == "mounted" else "chattr -R -ia")
            assert "--undo" in error["undo_command"]
            assert ok(node, "restore", "--continue", "ours", code=7)["left"] == [where]
            assert node.service.running()
            # The old run goes on meanwhile, and makes a file anew.
            (node.data / "anew").write_text((node.data / "static-nodes.json").read_text())
            (node.data / "anew").replace(node.data / "static-nodes.json")
        finally:
            for path in (node.place if kind == "copy" else node.data).rglob(held.name):
                subprocess.run(
                    ["umount" if how == "mounted" else "chattr", *(["-i"] if how != "mounted" else []), path]
                )
        subprocess.run([*error["cure"].split()], capture_output=True)
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


@pytest.mark.root
def test_a_copy_on_another_disk_that_can_not_be_removed_keeps_no_node_stopped(tmp_path: Path) -> None:
    """That disk has gone read-only, as after an I/O error."""
    with story("away", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, "restore", node.set_id, *node.in_place, before=with_a_mask(node))
        subprocess.run(["mount", "-o", "remount,ro", str(node.aside)], check=True)
        try:
            for way in ("--undo", "--continue"):
                error = ok(node, "restore", way, "ours", code=7, before=with_a_mask(node))
                assert error["left"] == node.leftovers() and "--undo" in error["undo_command"]
                assert node.as_it_was() and node.service.running() and not (node.command.home / "masked").exists()
                anew(node)
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(node.aside)], check=True)
        ok(node, "restore", "--undo", "ours", before=with_a_mask(node))
        assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


@pytest.mark.root
def test_what_was_restored_and_can_not_be_moved_is_refused_before_anything_is_stopped(tmp_path: Path) -> None:
    with story("entries", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, *IN_PLACE)
        did = node.service.did()
        (node.data / "made").write_text("x")
        for hold, let_go, code in (
            (["chattr", "+i", node.data / "made"], ["chattr", "-i", node.data / "made"], 3),
            (["chattr", "+i", node.data / "key"], ["chattr", "-i", node.data / "key"], 3),
            (["mount", "-t", "tmpfs", "tmpfs", node.data / "caches"], ["umount", node.data / "caches"], 5),
        ):
            (node.data / "caches").mkdir(exist_ok=True)
            subprocess.run(hold, check=True)
            try:
                error = ok(node, "restore", "--undo", "ours", code=code)
                assert error["object"] == str(hold[-1]) and node.service.did() == did
            finally:
                subprocess.run(let_go, check=True)
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


@pytest.mark.root
def test_a_link_to_another_disk_is_no_mount_that_keeps_the_undo_back(tmp_path: Path) -> None:
    """Also not the automatic one: the node would stay stopped."""
    with loop_file_system("ext4", tmp_path, 100) as other, story("entries", tmp_path) as node:
        (node.data / "logs").symlink_to(other)
        node.begin(blocks=20)
        node.run_and_damage()
        ok(node, *IN_PLACE)
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and node.service.running() and not node.leftovers()
        ok(node, *IN_PLACE, code=6, before=no_room_for("done exchange"))
        assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


# ------------------------------------------------------------------------------------------- after the node was started


def ssh_drops() -> None:
    """While its health is waited for."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what runs the tests by nohup has it ignored

    def prove(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(60)

    health.prove = prove


def in_the_health_wait(node: Story, how: Callable[[], None], code: int) -> None:
    killed, said, _ = run_here(node.command, *IN_PLACE, before=how)
    assert killed == code, said
    assert node.service.running() and journals(node)
    (node.data / "made-since").write_text("by weeks of work")


def killed_then() -> None:
    def prove(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    health.prove = prove


def no_room_for(kind: str, *, once: bool = False) -> Callable[[], None]:
    def patch() -> None:
        from snapshotter.core.journal import Journal

        append, refused = Journal.append, []

        def full(self: Journal, what: str, **facts: Any) -> None:
            if kind in (what, f"{what} {facts.get('step')}") and not (once and refused):
                refused.append(what)
                raise StorageError("can't write the journal: No space left on device", object=self.path)
            append(self, what, **facts)

        Journal.append = full  # type: ignore[method-assign]

    return patch


def no_start() -> None:
    """As a daemon-reload that fails."""
    from snapshotter.verbs.in_place_work import Work

    def let_run(self: Work, run: bool) -> None:
        raise StorageError("can't unmask it: Connection timed out", object="its unit")

    Work.let_run = let_run  # type: ignore[method-assign]


@pytest.mark.parametrize("cut", ["killed", "hung up"])
def test_what_the_node_wrote_since_its_start_is_never_dropped_unasked(node: Story, cut: str) -> None:
    how, code = (killed_then, -signal.SIGKILL) if cut == "killed" else (ssh_drops, 9)
    in_the_health_wait(node, how, code)
    faults = [(ssh_drops, 9), (no_room_for("done healthy"), 6), (no_room_for("restored"), 6)]
    for fault, exit_code in faults:
        error = ok(node, "restore", "--continue", "ours", code=exit_code, before=fault)
        assert "--undo" in error["undo_command"] and "--continue" in error["cure"]
        assert (node.data / "made-since").exists() and node.service.running() and journals(node)
    ok(node, "restore", "--continue", "ours")
    assert (node.data / "made-since").exists() and node.service.running()
    ok(node, "restore", "--undo", "ours")
    assert node.as_it_was() and node.service.running() and not node.leftovers()


def test_nor_by_one_that_was_killed_as_it_started_it(node: Story) -> None:
    calls = run_here(node.command, *IN_PLACE)[2]
    ok(node, "restore", "--undo", "ours")
    at = point(calls, "after-Commands.start")
    assert run_here(node.command, *IN_PLACE, kill_at=at)[0] == -signal.SIGKILL
    (node.data / "made-since").write_text("by weeks of work")
    error = ok(node, "restore", "--continue", "ours", code=6, before=no_start)
    assert "--undo" in error["undo_command"]
    assert (node.data / "made-since").exists() and node.service.running()
    ok(node, "restore", "--continue", "ours")
    assert (node.data / "made-since").exists() and node.service.running()


def test_one_that_is_not_well_says_so_also_where_its_journal_is_full(node: Story) -> None:
    (node.service.home / "bad-start").write_text("nothing")
    error = ok(node, *IN_PLACE, code=8, before=no_room_for("restored"))
    assert "--undo" in error["undo_command"] and node.restored()


# ------------------------------------------------------------------------------------------------------------ others


def test_what_an_earlier_restore_of_the_same_second_set_aside_stays(node: Story) -> None:
    moment = datetime(2026, 11, 28, 7, 0, 0, tzinfo=UTC)

    def patch() -> None:
        from snapshotter.verbs import in_place

        in_place.utc_now = lambda: moment  # type: ignore[attr-defined]

    earlier = node.data.parent / f"{node.data.name}.corrupted-20261128t070000z"
    earlier.mkdir()
    (earlier / "kept").write_text("by a person")
    done = ok(node, *IN_PLACE, before=patch)
    assert node.restored() and done["aside"][0].startswith(f"{earlier}-")
    ok(node, "restore", "--discard", "ours", "--yes")
    assert (earlier / "kept").read_text() == "by a person" and node.leftovers() == [str(earlier)]


def test_a_key_from_a_set_that_has_none(tmp_path: Path) -> None:
    from tests.faults.in_place_kit import lay_out

    with story("copy", tmp_path) as node:
        lay_out(node.data, 20)
        key = (node.data / "key").read_bytes()
        (node.data / "key").unlink()
        for name in ("key.pub", "nodeAddress"):
            (node.data / name).unlink(missing_ok=True)
        ok(node, "take", "ours")
        (node.data / "key").write_bytes(key)
        before = picture(node.data)
        error = ok(node, "restore", "latest", "--in-place", "--only", "key", "--yes", code=4)
        assert "there are no keys in it" in error["message"]
        assert not difference(picture(node.data), before) and not node.leftovers() and not journals(node)


def test_no_identity_is_put_in_while_a_restore_is_open(node: Story, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text("long enough for a test\n")
    export = tmp_path / "key.age"
    word = ("--passphrase-file", str(tmp_path / "passphrase"))
    ok(node, "identity", "export", "ours", "--to", str(export), *word)
    calls = run_here(node.command, *IN_PLACE)[2]
    ok(node, "restore", "--undo", "ours")
    run_here(node.command, *IN_PLACE, kill_at=point(calls, "before-Commands.stop"))
    key = (node.data / "key").read_bytes()
    error = ok(node, "identity", "restore", str(export), "ours", *word, code=5)
    assert "--continue" in error["cure"] and (node.data / "key").read_bytes() == key
    ok(node, "restore", "--undo", "ours")
    ok(node, "identity", "restore", str(export), "ours", *word)


@pytest.mark.root
def test_a_node_that_still_sees_the_old_data_is_found_out(tmp_path: Path) -> None:
    """It sees the data path by a mount that is older than the restore, as in a container."""
    with own_disk(tmp_path) as place:
        view = tmp_path / "view"
        view.mkdir()
        node = Story(place, tmp_path / "home", "copy")
        node.begin()
        node.damage()
        subprocess.run(["mount", "--bind", node.data, view], check=True)
        inside = Managed(tmp_path / "inside", view)
        node.command.config.write_text(node.command.config.read_text().replace(node.service.config(), inside.config()))
        try:
            inside.do("start")
            error = ok(node, "restore", "latest", "--in-place", "--yes", code=8)
            assert "runs on the old data" in error["message"] and str(inside.pid()) in error["message"]
            assert "restart what mounts it" in error["cure"] and error["undo_command"]
            error = ok(node, "restore", "--discard", "ours", "--yes", code=5)
            assert str(inside.pid()) in error["message"]
            inside.do("stop")
            subprocess.run(["umount", view], check=True)
            subprocess.run(["mount", "--bind", node.data, view], check=True)
            inside.do("start")
            ok(node, "restore", "--continue", "ours")
            ok(node, "restore", "--discard", "ours", "--yes")
            assert inside.running() and node.restored() and not node.leftovers()
        finally:
            inside.end()
            subprocess.run(["umount", view], check=True)
