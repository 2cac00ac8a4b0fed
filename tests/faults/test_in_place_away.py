"""The old data set aside on another disk: what if that isn't mounted when it is asked for, or can't keep what is put
there. Nothing there is never taken for nothing that there was."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotter.core.errors import StorageError
from snapshotter.host import mounts
from snapshotter.verbs import in_place_away as away
from snapshotter.verbs import in_place_ways as ways
from tests.faults.in_place_kit import Story, journals, ok, point, run_here, story, with_a_mask
from tests.support import loop_file_system

pytestmark = pytest.mark.root


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Story]:
    with story("away", tmp_path) as made:
        made.begin(blocks=20)
        made.run_and_damage()
        yield made


def restore(node: Story) -> tuple[str, ...]:
    return ("restore", node.set_id, *node.in_place)


@contextmanager
def not_mounted(node: Story) -> Iterator[None]:
    """As after a boot without it in fstab."""
    assert node.aside
    mounted = subprocess.run(
        ["findmnt", "-no", "SOURCE", str(node.aside)], capture_output=True, text=True, check=True
    ).stdout.strip()
    subprocess.run(["umount", str(node.aside)], check=True)
    try:
        yield
        assert os.listdir(node.aside) == [], "something was made where the disk should be"
    finally:
        subprocess.run(["mount", mounted, str(node.aside)], check=True)


def test_its_disk_is_not_mounted_when_it_is_undone_or_discarded(node: Story) -> None:
    ok(node, *restore(node))
    with not_mounted(node):
        for words in (("--undo", "ours"), ("--discard", "ours", "--yes")):
            error = ok(node, "restore", *words, code=3)
            assert "mount" in error["cure"] and str(node.aside) in error["object"]
            assert node.restored() and node.service.running() and journals(node)
    ok(node, "restore", "--undo", "ours")
    assert node.as_it_was() and node.service.running() and not node.leftovers()


def test_its_disk_is_not_mounted_when_it_goes_on(node: Story) -> None:
    """Killed when the old data had gone there, and nothing stands in its place yet."""
    calls = run_here(node.command, *restore(node))[2]
    ok(node, "restore", "--undo", "ours")
    at = point(calls, "before-Mirror.update", calls.count("before-Mirror.update"))  # the set's, behind the old data's
    assert run_here(node.command, *restore(node), kill_at=at)[0] == -signal.SIGKILL
    with not_mounted(node):
        ok(node, "restore", "--continue", "ours", code=3)
        ok(node, "restore", "--undo", "ours", code=3)
        assert journals(node)
    ok(node, "restore", "--continue", "ours")
    assert node.restored() and node.service.running()


def test_the_datas_own_disk_is_not_mounted_when_it_is_undone(node: Story) -> None:
    """Brought back to the disk below it, the old data would be hidden by the next mount, and its copy gone."""
    ok(node, *restore(node))
    node.service.do("stop")
    source = mounts.mount_of(str(node.place)).source
    subprocess.run(["umount", str(node.place)], check=True)
    try:
        for words in (("--undo", "ours"), ("--discard", "ours", "--yes")):
            error = ok(node, "restore", *words, code=3)
            assert str(node.place) in error["cure"] and journals(node)
        assert os.listdir(node.place) == []
    finally:
        subprocess.run(["mount", source, str(node.place)], check=True)
    node.service.do("start")
    ok(node, "restore", "--undo", "ours")
    assert node.as_it_was() and not node.leftovers()


def test_an_undo_that_is_refused_never_starts_the_node_on_nothing(node: Story) -> None:
    """The old data has gone to the other disk, the copy of the set fails, and somebody looks at what was set aside."""
    masked = node.command.home / "masked"
    holder = node.command.home / "shell"

    def patch() -> None:
        with_a_mask(node)()
        from snapshotter.verbs import in_place_stage

        def fill(*_: object) -> list[str]:
            assert node.aside
            (aside,) = node.aside.glob("*.corrupted-*")
            shell = subprocess.Popen(["sleep", "1000"], cwd=aside, start_new_session=True)
            holder.write_text(str(shell.pid))
            raise StorageError("the disk is full")

        in_place_stage.fill = fill

    key = (node.data / "key").read_text()
    try:
        ok(node, *restore(node), code=7, before=patch)
        assert masked.exists() and not node.service.running() and not (node.data / "key").exists()
    finally:
        os.kill(int(holder.read_text()), signal.SIGKILL)
    ok(node, "restore", "--undo", "ours", before=with_a_mask(node))
    assert node.as_it_was() and (node.data / "key").read_text() == key
    assert node.service.running() and not masked.exists() and not node.leftovers()


def test_one_that_was_killed_as_it_set_aside_ends_in_a_discard_too(node: Story) -> None:
    calls = run_here(node.command, *restore(node))[2]
    ok(node, "restore", "--undo", "ours")
    copies = [place for place, name in enumerate(calls, 1) if name == "before-Mirror.update"]
    assert run_here(node.command, *restore(node), kill_at=copies[-2])[0] == -signal.SIGKILL
    ok(node, "restore", "--continue", "ours")
    assert node.restored()
    ok(node, "restore", "--discard", "ours", "--yes")
    assert node.restored() and not node.leftovers() and not journals(node)


@pytest.mark.parametrize("way", ["--undo", "--continue"])
def test_one_that_was_killed_as_it_removed_what_it_had_copied_needs_no_room_for_it_twice(
    tmp_path: Path, way: str
) -> None:
    """A small disk, more than half full; killed again as it brings the old data back."""

    def cut() -> None:
        def remove(path: str, _: object) -> None:
            os.unlink(os.path.join(path, "key"))
            os.kill(os.getpid(), signal.SIGKILL)

        away.exchange.remove = remove

    def cut_again() -> None:
        copy = away._copy

        def and_die(*args: object) -> None:
            copy(*args)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGKILL)

        away._copy = and_die  # type: ignore[assignment]

    with loop_file_system("ext4", tmp_path, 70) as place, loop_file_system("ext4", tmp_path, 100) as other:
        node = Story(place, tmp_path / "home", "copy", aside=other, extra=f'store = "{tmp_path}/store"\n')
        try:
            node.begin(blocks=20)
            (node.data / "database" / "big").write_bytes(os.urandom(40 << 20))
            node.run_and_damage()
            assert run_here(node.command, *restore(node), before=cut)[0] == -signal.SIGKILL
            assert (node.data / "database" / "big").exists() and not (node.data / "key").exists()
            if way == "--undo":
                assert run_here(node.command, "restore", way, "ours", before=cut_again)[0] == -signal.SIGKILL
            ok(node, "restore", way, "ours")
            if way == "--continue":
                assert node.restored() and node.service.running()
                ok(node, "restore", "--undo", "ours")
            assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)
        finally:
            node.service.end()


def test_a_disk_that_keeps_no_owners_is_refused(node: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """vfat, or root's files on NFS: there, a key would be anybody's to read, and come back as nobody's."""

    def patch() -> None:
        def fchown(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        ways.os.fchown = fchown  # type: ignore[assignment]

    error = ok(node, *restore(node), code=3, before=patch)
    assert "owners" in error["message"] and error["object"] == str(node.aside)
    assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


def test_a_copy_that_has_lost_the_owner_is_none(node: Story) -> None:
    def patch() -> None:
        from snapshotter.host.mirror import Mirror

        finish = Mirror.finish

        def lossy(self: Mirror, now: object) -> None:
            finish(self, now)  # type: ignore[arg-type]
            os.chmod("key", 0o644, dir_fd=self.target.top)

        Mirror.finish = lossy  # type: ignore[assignment,method-assign]

    error = ok(node, *restore(node), code=6, before=patch)
    assert "owner or mode" in error["message"]
    assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


def test_what_could_not_be_removed_afterwards_is_said_first(node: Story) -> None:
    subprocess.run(["chattr", "+i", str(node.data / "key")], check=True)
    try:
        error = ok(node, *restore(node), code=3)
        assert "immutable" in error["message"] and error["object"].endswith("/key") and "chattr" in error["cure"]
        assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)
    finally:
        subprocess.run(["chattr", "-i", str(node.data / "key")], check=True)
