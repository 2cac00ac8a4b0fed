"""What stays as it is when a restore in place, or its undo, is refused on the way: untouched data runs again, a mix of
old and new stays stopped and masked. And who is asked: nobody who has nothing to do with it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.host import exchange, mounts
from tests.faults.in_place_kit import Story, difference, journals, ok, picture, point, run_here, story, with_a_mask

IN_PLACE = ("restore", "latest", "--in-place", "--yes")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Story]:
    with story("entries", tmp_path) as made:
        made.begin(blocks=20)
        made.run_and_damage()
        yield made


def restored(node: Story) -> bool:
    now = {name: what for name, what in picture(node.data).items() if ".corrupted-" not in name}
    return not difference(now, node.of_set)


@pytest.mark.root
def test_on_a_mix_nothing_is_started_by_an_undo_that_is_refused(node: Story) -> None:
    """Killed between two renames; whoever looks into it has a shell there, and asks for the undo."""
    masked = node.command.home / "masked"
    calls = run_here(node.command, *IN_PLACE, before=with_a_mask(node))[2]
    assert restored(node) and not masked.exists() and node.service.running()
    ok(node, "restore", "--undo", "ours", before=with_a_mask(node))
    at = point(calls, "after-forward", 2)
    assert run_here(node.command, *IN_PLACE, kill_at=at, before=with_a_mask(node))[0] == -signal.SIGKILL
    assert masked.exists()
    shell = subprocess.Popen(["sleep", "1000"], cwd=node.data)
    try:
        for _ in range(2):
            error = ok(node, "restore", "--undo", "ours", code=7, before=with_a_mask(node))
            assert "sleep" in error["message"] and any("stopped" in left for left in error["left"])
            assert masked.exists() and not node.service.running(), "it could run on a mix of old and new"
    finally:
        shell.kill()
        shell.wait()
    ok(node, "restore", "--undo", "ours", before=with_a_mask(node))
    assert node.as_it_was() and node.service.running() and not masked.exists() and not node.leftovers()


@pytest.mark.root
def test_untouched_data_runs_again_whoever_sits_in_it(node: Story, tmp_path: Path) -> None:
    """Somebody's shell comes into the data path after the stop, before anything has changed places."""
    shell = tmp_path / "shell"

    def patch() -> None:
        with_a_mask(node)()
        from snapshotter.verbs import in_place_steps

        sync = in_place_steps._sync

        def and_sit(path: str) -> None:
            sync(path)
            if not shell.exists():
                started = subprocess.Popen(["sleep", "1000"], cwd=node.data / "database", start_new_session=True)
                shell.write_text(str(started.pid))

        in_place_steps._sync = and_sit

    try:
        error = ok(node, *IN_PLACE, code=5, before=patch)
        assert "sleep" in error["message"]
        assert node.as_it_was() and node.service.running() and not journals(node) and not node.leftovers()
        assert not (node.command.home / "masked").exists()
    finally:
        os.kill(int(shell.read_text()), signal.SIGKILL)


def maskless(node: Story, *, masked: bool) -> Callable[[], None]:
    """A unit whose unmask fails: before the link is gone, or after."""

    def patch() -> None:
        with_a_mask(node)()
        from snapshotter.verbs import in_place_plan

        unit_of = in_place_plan.service_of

        def failing(*argvs: object) -> object:
            made = unit_of(*argvs)  # type: ignore[arg-type]
            unmask = type(made).unmask

            def no_unmask(self: object) -> None:
                if not masked:
                    unmask(self)  # type: ignore[arg-type]
                raise StorageError("can't unmask it: Connection timed out")

            type(made).unmask = no_unmask  # type: ignore[union-attr]
            return made

        in_place_plan.service_of = failing  # type: ignore[assignment]

    return patch


def test_a_service_that_can_not_be_masked_is_not_stopped(tmp_path: Path) -> None:
    def patch() -> None:
        with_a_mask(node)()
        from snapshotter.host.service import Commands

        def refuse(_: Commands) -> None:
            raise PreconditionError("is an alias of another.service", object="its unit")

        Commands.refuse_unmaskable = refuse  # type: ignore[method-assign]

    with story("copy", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        did = node.service.did()
        for words in (IN_PLACE, (*IN_PLACE, "--dry-run"), ("resync", "ours", "--yes")):
            assert "alias" in ok(node, *words, code=3, before=patch)["message"]
        assert node.service.did() == did and node.service.running() and node.as_it_was() and not journals(node)


def test_one_is_started_though_its_unmask_failed_unless_it_is_masked(tmp_path: Path) -> None:
    masked = tmp_path / "home" / "etc" / "masked"
    with story("copy", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        done = ok(node, *IN_PLACE, before=maskless(node, masked=False))
        assert any("can't unmask it" in text for text in done["warnings"])
        assert node.restored() and node.service.running()
        error = ok(node, "restore", "--undo", "ours", code=7, before=maskless(node, masked=True))
        assert "can't unmask it" in error["message"] and any("stopped" in left for left in error["left"])
        assert masked.exists() and not node.service.running() and node.as_it_was() and error["undo_command"]
        ok(node, "restore", "--undo", "ours", before=with_a_mask(node))
        assert not masked.exists() and node.service.running() and node.as_it_was() and not journals(node)


@pytest.mark.root
def test_a_provider_that_has_nothing_to_do_with_it_may_be_out_of_order(node: Story) -> None:
    def patch() -> None:
        from providers.btrfs import BtrfsProvider
        from snapshotter.verbs.session import Session

        everywhere = Session.everywhere

        class Broken(BtrfsProvider):
            def attachments(self):  # type: ignore[no-untyped-def]
                raise StorageError("its credentials have expired")

        def with_broken(self: Session, *rest: object):  # type: ignore[no-untyped-def]
            made, gone = everywhere(self, *rest)  # type: ignore[arg-type]
            return [*made, Broken(made[0].settings)], gone

        Session.everywhere = with_broken  # type: ignore[method-assign]

    ok(node, *IN_PLACE, before=patch)
    assert restored(node) and node.service.running()
    ok(node, "restore", "--undo", "ours", before=patch)
    assert node.as_it_was() and node.service.running() and not node.leftovers()


@pytest.mark.root
def test_a_disk_that_is_not_mounted_is_not_restored_beside(node: Story, tmp_path: Path) -> None:
    """Its mount failed at boot: what would be restored fills the disk below, and is hidden by the next boot."""
    fstab = tmp_path / "fstab"
    above = f"UUID=3 {node.data.parent} ext4 noauto 0 2\nUUID=4 none swap sw 0 0\n"  # its own disk lies below that
    fstab.write_text(f"# disks\nUUID=1 / ext4 defaults 0 1\nUUID=2 {node.data}/ ext4 nofail 0 2\n{above}")

    def patch() -> None:
        mounts.FSTAB = str(fstab)

    ok(node, *IN_PLACE, "--dry-run", before=patch)
    node.service.do("stop")
    source = mounts.mount_of(str(node.data)).source
    subprocess.run(["umount", str(node.data)], check=True)
    try:
        error = ok(node, *IN_PLACE, code=3, before=patch)
        assert "nothing is mounted" in error["message"] and error["object"] == str(node.data)
        ok(node, "resync", "ours", "--yes", code=3, before=patch)
        assert os.listdir(node.data) == []
        error = ok(node, "take", "ours", code=3, before=patch)  # nor is what is below it taken for the node
        assert "nothing is mounted at" in error["message"] and "lack" in error["message"]
    finally:
        subprocess.run(["mount", source, str(node.data)], check=True)
    assert node.as_it_was()
    fstab.write_text(f"UUID=5 {node.data}/database ext4 nofail 0 2\n")  # a disk of a part of it
    assert "database" in ok(node, *IN_PLACE, code=3, before=patch)["cure"]
    assert "database" in ok(node, "take", "ours", code=3, before=patch)["cure"]


@pytest.mark.root
def test_a_directory_that_the_node_made_on_a_mix_stays_and_is_told(node: Story) -> None:
    """There was no database; killed after the first rename; started at boot, it made one: that is what it wrote into
    the old data, and the undo drops none of it."""
    node.service.do("stop")
    shutil.rmtree(node.data / "database")
    node.service.do("start")
    node.service.do("stop")
    shutil.rmtree(node.data / "database")
    node.old = picture(node.data)
    calls = run_here(node.command, *IN_PLACE)[2]
    node.service.do("stop")
    ok(node, "restore", "--undo", "ours")
    assert node.as_it_was()
    at = point(calls, "after-forward", 1)
    assert run_here(node.command, *IN_PLACE, kill_at=at)[0] == -signal.SIGKILL
    node.service.do("start")
    (node.data / "database" / "on-a-mix").write_text("x")
    ok(node, "restore", "--continue", "ours", code=3)
    done = ok(node, "restore", "--undo", "ours")
    assert any("/database is neither the old nor the new" in text for text in done["warnings"])
    assert node.service.running(), "it ran when the undo was asked for"
    node.service.do("stop")
    assert {path.name for path in (node.data / "database").iterdir()} == {"node.log", "on-a-mix"}
    shutil.rmtree(node.data / "database")
    assert node.as_it_was() and not node.leftovers() and not journals(node)


@pytest.mark.root
def test_what_is_set_aside_can_go_whatever_the_data_lies_on_now(tmp_path: Path) -> None:
    """A new disk in the data's place, filled by hand."""
    with story("copy", tmp_path) as node:
        node.begin(blocks=20)
        node.damage()
        ok(node, *IN_PLACE)
        other = tmp_path / "other"
        shutil.copytree(node.data, other)
        subprocess.run(["mount", "--bind", str(other), str(node.data)], check=True)
        try:
            assert "umount" in ok(node, "restore", "--undo", "ours", code=3)["cure"]
            ok(node, "restore", "--discard", "ours", "--yes")
            assert not node.leftovers() and not journals(node)
        finally:
            subprocess.run(["umount", str(node.data)], check=True)
        assert node.restored()


@pytest.mark.root
def test_nor_in_a_directory_of_it(tmp_path: Path) -> None:
    """The commonest layout: /disk/node. And what has since come to stand there is nobody's to remove in an undo."""
    with story("copy", tmp_path, extra=f'store = "{tmp_path}/store"\n') as node:
        node.begin(blocks=20)
        node.run_and_damage()
        node.service.do("stop")
        fstab = tmp_path / "fstab"
        fstab.write_text(f"UUID=2 {node.place} ext4 nofail 0 2\n")

        def patch() -> None:
            mounts.FSTAB = str(fstab)

        node.data.rename(node.place / "real")  # as below a disk that isn't mounted: nothing is there
        ok(node, *IN_PLACE, before=patch)
        node.data.rename(node.place / "made")
        (node.place / "real").rename(node.data)
        error = ok(node, "restore", "--undo", "ours", code=5)
        assert "move it away" in error["cure"]
        assert node.as_it_was(), "what stands there was never put there by the restore"
        node.data.rename(node.place / "real")
        (node.place / "made").rename(node.data)
        ok(node, "restore", "--undo", "ours")
        source = mounts.mount_of(str(node.place)).source
        subprocess.run(["umount", str(node.place)], check=True)
        try:
            error = ok(node, *IN_PLACE, code=3, before=patch)
            assert str(node.place) in error["cure"] and os.listdir(node.place) == []
        finally:
            subprocess.run(["mount", source, str(node.place)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["copy", "entries"])
def test_an_undo_that_was_killed_as_it_removed_the_new_leaves_none_of_it(tmp_path: Path, kind: str) -> None:
    """Of a restore that had not come as far as the start."""
    with story(kind, tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        calls = run_here(node.command, *IN_PLACE)[2]
        ok(node, "restore", "--undo", "ours")
        at = point(calls, "after-forward", calls.count("after-forward"))
        assert run_here(node.command, *IN_PLACE, kill_at=at)[0] == -signal.SIGKILL
        undoing = run_here(node.command, "restore", "--undo", "ours")[2]
        assert node.as_it_was()
        assert run_here(node.command, *IN_PLACE, kill_at=at)[0] == -signal.SIGKILL
        removing = point(undoing, "before-remove")
        assert run_here(node.command, "restore", "--undo", "ours", kill_at=removing)[0] == -signal.SIGKILL
        ok(node, "restore", "--undo", "ours")
        assert node.as_it_was() and not node.leftovers() and not journals(node)


@pytest.mark.root
@pytest.mark.parametrize("way", ["--continue", "--undo"])
def test_killed_between_the_two_renames_of_one_exchange(tmp_path: Path, way: str) -> None:
    """Where a file system can't exchange two names in one step (OpenZFS 2.1), the place is empty for a moment."""

    def patch() -> None:
        exchange._NO_SUCH_FLAG.add(errno.ENOTTY)

        def refused(*_: object, **__: object) -> None:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

        exchange.btrfs.rename = refused

    with story("copy", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        calls = run_here(node.command, *IN_PLACE, before=patch)[2]
        ok(node, "restore", "--undo", "ours", before=patch)
        assert node.as_it_was()
        between = next(
            k for k, name in enumerate(calls, 1) if name == "after-move" and "before-_swap" in calls[k - 4 : k]
        )
        assert run_here(node.command, *IN_PLACE, kill_at=between, before=patch)[0] == -signal.SIGKILL
        assert not node.data.exists()
        ok(node, "restore", way, "ours", before=patch)
        if way == "--continue":
            assert node.restored()
            ok(node, "restore", "--undo", "ours", before=patch)
        assert node.as_it_was() and node.service.running() and not node.leftovers() and not journals(node)


@pytest.mark.root
def test_volumes_that_were_not_swapped_yet_run_again_whoever_sits_in_them(tmp_path: Path) -> None:
    with story("btrfs", tmp_path) as node:
        node.begin(blocks=20)
        node.run_and_damage()
        holder = tmp_path / "shell"

        def patch() -> None:
            with_a_mask(node)()
            from snapshotter.verbs import in_place_steps

            def keep(_: object) -> None:
                shell = subprocess.Popen(["sleep", "1000"], cwd=node.data / "database", start_new_session=True)
                holder.write_text(str(shell.pid))

            in_place_steps.STEPS["keep"] = keep

        try:
            ok(node, *IN_PLACE, code=5, before=patch)
            assert node.as_it_was() and node.service.running() and not journals(node)
            assert not (node.command.home / "masked").exists()
        finally:
            os.kill(int(holder.read_text()), signal.SIGKILL)


KEYS = ("17" * 32, "18" * 32)


@pytest.mark.parametrize("way", ["live", "set", "only"])
def test_a_key_in_a_place_of_its_own(tmp_path: Path, way: str) -> None:
    """`key_file` in the data path, another name than the profile's: it is the key, whichever way is asked for."""
    with story("copy", tmp_path) as node:
        name = node.data / "keys" / "node.key"
        config = node.command.config
        config.write_text(
            config.read_text().replace("[node.ours]\n", f"[node.ours]\nkey_file = {json.dumps(str(name))}\n")
        )
        name.parent.mkdir(parents=True)
        name.write_text(KEYS[0])
        node.begin(blocks=20)
        node.damage()
        name.write_text(KEYS[1])
        ok(node, *IN_PLACE, code=3)
        chosen = ("--identity", "set", "--only", "key") if way == "only" else ("--identity", way)
        ok(node, *IN_PLACE, *chosen)
        assert name.read_text() == KEYS[way == "live"]
        assert way == "live" or name.stat().st_mode & 0o77 == 0
        ok(node, "restore", "--undo", "ours")
        assert name.read_text() == KEYS[1]
