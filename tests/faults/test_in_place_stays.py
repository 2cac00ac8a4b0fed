"""What stays as it is when a restore in place, or its undo, is refused on the way: untouched data runs again, a mix of
old and new stays stopped and masked. And who is asked: nobody who has nothing to do with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from snapshotter.core.errors import StorageError
from snapshotter.host import mounts
from tests.faults.in_place_kit import Story, difference, journals, ok, picture, point, run_here, story

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


def with_a_mask(node: Story) -> Callable[[], None]:
    """The service as a unit is one: while the file is there it can't be started."""
    flag = str(node.command.home / "masked")

    def patch() -> None:
        from snapshotter.host.service import Commands
        from snapshotter.verbs import in_place_plan

        class Unit(Commands, frozen=True):
            can_mask: ClassVar[bool] = True

            def start(self) -> None:
                if os.path.exists(flag):
                    raise StorageError("is masked", object=self.name)
                super().start()

            def masked(self) -> bool:
                return os.path.exists(flag)

            def mask(self) -> None:
                open(flag, "w").close()

            def unmask(self) -> None:
                if os.path.exists(flag):
                    os.unlink(flag)

        def unit_of(_: object, *argvs: tuple[str, ...]) -> Unit:
            return Unit(*argvs)

        in_place_plan.service_of = unit_of

    return patch


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
            ok(node, "restore", "--undo", "ours", code=5, before=with_a_mask(node))
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
    fstab.write_text(f"# disks\nUUID=1 / ext4 defaults 0 1\nUUID=2 {node.data} ext4 nofail 0 2\n")

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
    finally:
        subprocess.run(["mount", source, str(node.data)], check=True)
    assert node.as_it_was()


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
