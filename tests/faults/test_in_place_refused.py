"""restore --in-place where it must not, or can't: refused or undone, nothing lost, the service as before, the exit
code."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from providers.copy import CopyProvider
from snapshotter.core.errors import PreconditionError
from snapshotter.host.mounts import Mount
from tests.faults.in_place_kit import Story, difference, journals, ok, picture, run_here, story, until
from tests.support import loop_file_system


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Story]:
    with story("copy", tmp_path) as made:
        made.begin()
        made.run_and_damage()
        yield made


def nothing_changed(node: Story, *, running: bool = True) -> None:
    assert node.as_it_was(), difference(picture(node.data), node.old)
    assert not node.leftovers(), node.leftovers()
    assert node.service.running() == running
    restores = node.command.home / "state" / "restores"
    assert not restores.exists() or not list(restores.iterdir())
    for path in node.place.rglob("*"):
        assert "attachments/" not in str(path), path


IN_PLACE = ("restore", "latest", "--in-place", "--yes")


def test_without_a_confirmation(node: Story) -> None:
    assert ok(node, "restore", "latest", "--in-place", code=2)["cure"] == "--yes"
    nothing_changed(node)


def test_a_shell_sits_in_it(node: Story) -> None:
    shell = subprocess.Popen(["sleep", "1000"], cwd=node.data / "database")
    try:
        started = time.monotonic()
        error = ok(node, *IN_PLACE, code=5)
        assert "sleep" in error["message"] and str(shell.pid) in error["message"]
        nothing_changed(node)
        assert time.monotonic() - started < 120
    finally:
        shell.kill()
        shell.wait()
    # Nor is an undo done under somebody's feet: refused, and everything goes on as it was.
    ok(node, *IN_PLACE)
    shell = subprocess.Popen(["sleep", "1000"], cwd=node.data / "database")
    try:
        ok(node, "restore", "--undo", "ours", code=5)
        assert node.restored() and node.service.running()
    finally:
        shell.kill()
        shell.wait()
    ok(node, "restore", "--undo", "ours")
    nothing_changed(node)


@pytest.mark.parametrize("part", [(), ("--only", "database"), ("--only", "key")], ids=lambda part: "-".join(part))
def test_another_node_lives_in_it(node: Story, part: tuple[str, ...]) -> None:
    """It would go back to what it was when the set was taken, and so would what it has signed."""
    inner = node.data / ("database/inner" if part else "inner")
    inner.mkdir()
    node.old = picture(node.data)
    with node.command.config.open("a") as config:
        config.write(f'[node.inner]\npath = "{inner}"\n')
    if "key" in part:
        ok(node, *IN_PLACE, *part)  # nothing of the other changes places
        ok(node, "restore", "--undo", "ours")
    else:
        error = ok(node, *IN_PLACE, *part, code=3)
        assert "node inner lives in it" in error["message"]
        if part:
            assert "node inner lives in it" in ok(node, "resync", "ours", "--yes", code=3)["message"]
    nothing_changed(node)


@pytest.mark.root
def test_another_node_has_a_disk_of_its_own_below(node: Story, tmp_path: Path) -> None:
    """That stays mounted where it is."""
    inner = node.data / "inner"
    inner.mkdir()
    with node.command.config.open("a") as config:
        config.write(f'[node.inner]\npath = "{inner}"\n')
    with loop_file_system("ext4", tmp_path, 20) as disk:
        subprocess.run(["mount", "--bind", str(disk), str(inner)], check=True)
        try:
            (inner / "its").write_text("its")
            ok(node, *IN_PLACE)
            assert (inner / "its").read_text() == "its" and os.path.ismount(inner)
        finally:
            subprocess.run(["umount", str(inner)], check=True)


def test_no_service_is_known_and_a_process_runs(node: Story) -> None:
    node.command.config.write_text(f'state = "{node.command.home}/state"\n')
    pid = node.service.pid()
    error = ok(node, "restore", node.set_id, "--in-place", "--yes", code=5)
    assert "no service is configured" in error["message"] and str(pid) in error["message"]
    nothing_changed(node)
    assert node.service.pid() == pid


@pytest.mark.parametrize(("how", "code"), [("fail", 6), ("nothing", 5), ("restart", 5)])
def test_a_service_that_does_not_stop(node: Story, how: str, code: int) -> None:
    """The stop command fails, or does nothing, or something starts it again at once."""
    (node.service.home / "bad-stop").write_text(how)
    ok(node, *IN_PLACE, code=code)
    nothing_changed(node)


def test_a_service_that_does_not_start_on_the_new_data(node: Story) -> None:
    """It ran before: so the old state is put back, and it is asked to run on that."""
    (node.service.home / "bad-start").write_text("fail")
    error = ok(node, *IN_PLACE, code=7)  # nor does it on the old data: it is left, and named
    assert "manager.py" in error["left"][0] and "stopped" in error["left"][0]
    nothing_changed(node, running=False)


@pytest.mark.root
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with loop_file_system("ext4", tmp_path, 100) as place, loop_file_system("ext4", tmp_path, 100) as other:
        node = Story(place, tmp_path / "home", "copy", extra=f'store = "{other}/store"\nfloor = "0%"\n')
        try:
            node.begin(blocks=500)
            node.run_and_damage()
            filler = place / "filler"
            with open(filler, "wb") as file:
                room = os.statvfs(place)
                os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - (3 << 20))
            error = ok(node, *IN_PLACE, code=3)
            assert "--aside" in error["cure"] and "resync" in error["cure"]
            nothing_changed(node)
            # By way of another disk there is room; and back.
            error = ok(node, *IN_PLACE, "--aside", str(node.data), code=2)
            filler.unlink()
            with open(filler, "wb") as file:
                room = os.statvfs(place)
                os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - (3 << 20))
            (other / "aside").mkdir()
            done = ok(node, *IN_PLACE, "--aside", str(other / "aside"))
            assert node.restored() and node.service.running(), difference(picture(node.data), node.of_set)
            assert done["aside"][0].startswith(str(other / "aside"))
            assert not difference(picture(Path(done["aside"][0])), node.old)
            ok(node, "restore", "--undo", "ours")
            nothing_changed(node)
            assert not list((other / "aside").iterdir())
            ok(node, *IN_PLACE, "--aside", str(other / "aside"))
            ok(node, "restore", "--discard", "ours", "--yes")
            assert node.restored() and not list((other / "aside").iterdir())
        finally:
            node.service.end()


@pytest.mark.root
def test_what_lies_below_can_not_bear_the_copy(tmp_path: Path) -> None:
    """Classic snapshots that would overflow, a pool that would be full: any driver may say so, not only the set's."""

    def forbid() -> None:
        def refuse_writes(_: CopyProvider, needs: Sequence[tuple[Mount, int]]) -> None:
            for mount, need in needs:
                if mount.path == str(place) and need:
                    raise PreconditionError(f"{need} bytes are too many", object=mount.path, cure="lvextend -L+1M vg/i")

        CopyProvider.refuse_writes = refuse_writes  # type: ignore[method-assign]

    with loop_file_system("ext4", tmp_path, 100) as place:
        node = Story(place, tmp_path / "home", "copy", extra=f'store = "{tmp_path}/store"\n')
        try:
            node.begin()
            node.run_and_damage()
            code, said, _ = run_here(node.command, *IN_PLACE, "--dry-run", before=forbid)
            assert code == 0 and "lvextend -L+1M vg/i" in said, said
            code, said, _ = run_here(node.command, *IN_PLACE, before=forbid)
            assert code == 3 and "lvextend -L+1M vg/i" in said, said
            nothing_changed(node)
        finally:
            node.service.end()


@pytest.mark.root
def test_a_read_only_origin(tmp_path: Path) -> None:
    with loop_file_system("ext4", tmp_path, 100) as place:
        node = Story(place, tmp_path / "home", "copy", extra=f'store = "{tmp_path}/store"\n')
        node.begin()
        node.damage()
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        assert "read-only" in ok(node, *IN_PLACE, code=3)["message"]
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        nothing_changed(node, running=False)


def test_a_set_that_is_damaged_incomplete_or_gone(node: Story) -> None:
    store = next(node.place.glob(".snapshotter"))
    image = store / "sets" / node.set_id / "0" / "tree"
    (image / "database" / "CURRENT").write_text("MANIFEST-999999\n"[:10].ljust(16, "x"))
    error = ok(node, "restore", node.set_id, "--in-place", "--yes", code=8)  # its pointers don't resolve
    assert node.set_id in error["object"] or node.set_id in error["message"]
    nothing_changed(node)
    shutil.rmtree(image / "database")
    ok(node, "restore", node.set_id, "--in-place", "--yes", code=8)
    nothing_changed(node)
    (store / "sets" / node.set_id / "image.json").unlink()
    ok(node, "restore", node.set_id, "--in-place", "--yes", code=8)
    nothing_changed(node)
    ok(node, "restore", "s20200101t000000z-000000", "--in-place", "--yes", code=4)
    nothing_changed(node)


def test_another_profile(node: Story) -> None:
    text = node.command.config.read_text()
    node.command.config.write_text(text + 'profile = "ethereumjs"\n')
    error = ok(node, *IN_PLACE, code=3)
    assert "besu" in error["message"] and "ethereumjs" in error["message"]
    node.command.config.write_text(text)
    nothing_changed(node)


def test_a_key_that_is_a_directory(node: Story) -> None:
    node.service.do("stop")
    (node.data / "key").rename(node.data / "key.was")
    (node.data / "key").mkdir()
    node.old = picture(node.data)
    ok(node, *IN_PLACE, code=3)
    nothing_changed(node, running=False)
    ok(node, *IN_PLACE, "--identity", "set")
    assert (node.data / "key").is_file() and node.restored()
    ok(node, "restore", "--undo", "ours")
    nothing_changed(node, running=False)


def test_a_key_that_was_made_anew(node: Story) -> None:
    """Besu makes a new one without a word: the two are named, and a person chooses."""
    node.service.do("stop")
    of_set = (node.data / "key").read_text()
    (node.data / "key").unlink()
    node.service.do("start")
    new = (node.data / "key").read_text()
    assert new != of_set
    node.old = picture(node.data)
    error = ok(node, *IN_PLACE, code=3)
    assert error["message"].count("0x") == 2 and "--identity" in error["cure"]
    assert of_set[2:] not in str(error) and new[2:] not in str(error)
    nothing_changed(node)
    ok(node, *IN_PLACE, "--identity", "live")
    assert (node.data / "key").read_text() == new
    assert [name for name in difference(picture(node.data), node.of_set)] == ["key"]
    ok(node, "restore", "--undo", "ours")
    nothing_changed(node)
    ok(node, *IN_PLACE, "--identity", "set")
    assert (node.data / "key").read_text() == of_set and node.restored()
    ok(node, "restore", "--undo", "ours")
    nothing_changed(node)


def test_a_validator_is_asked_whether_it_is_alone(tmp_path: Path) -> None:
    with story("copy", tmp_path, extra='type = "validator"\n') as node:
        node.begin()
        node.run_and_damage()
        planned = node.command.json("restore", node.set_id, "--in-place", "--dry-run")
        address = planned["address"]
        assert any("--yes-original-is-stopped" in warning and address in warning for warning in planned["warnings"])
        error = ok(node, *IN_PLACE, code=2)
        assert error["cure"] == "--yes-original-is-stopped"
        assert f"every other node with the key of {address} must be stopped" in error["message"]
        master, slave = os.openpty()
        process = subprocess.Popen(
            node.command.argv(*IN_PLACE), stdin=slave, stderr=slave, env=node.command.environment(), cwd="/"
        )
        os.close(slave)
        said = ""
        while "[y/N]" not in said:
            said += os.read(master, 1000).decode()
        assert f"is every other node with the key of {address} stopped?" in said
        os.write(master, b"n\n")
        assert process.wait(60) == 2
        os.close(master)
        nothing_changed(node)
        ok(node, *IN_PLACE, "--yes-original-is-stopped")
        assert node.restored()


def test_two_at_once(node: Story) -> None:
    """One does it, the other is told that the target is locked, or that old data is still set aside."""
    runs = [node.command.start(*IN_PLACE, "--json") for _ in range(3)]
    ended = sorted((run.communicate(timeout=240)[1] != "", run.returncode) for run in runs)
    assert sorted(code for _, code in ended) == [0, 5, 5], ended
    assert node.restored() and node.service.running() and len(journals(node)) == 1
    undoing = [node.command.start("restore", "--undo", "ours", "--json") for _ in range(2)]
    codes = sorted(run.wait(timeout=240) for run in undoing)
    for run in undoing:
        run.communicate()
    assert codes[0] == 0 and codes[1] in (4, 5), codes
    nothing_changed(node)


def test_the_journal_may_not_be_in_what_is_moved(node: Story) -> None:
    text = node.command.config.read_text()
    node.command.config.write_text(text.replace(f"{node.command.home}/state", f"{node.data}/state", 1))
    assert "state" in ok(node, "restore", node.set_id, "--in-place", "--yes", "--from-host", code=3)["cure"]


def test_a_config_whose_node_has_moved(node: Story) -> None:
    text = node.command.config.read_text()
    elsewhere = node.place / "elsewhere"
    elsewhere.mkdir()
    node.command.config.write_text(text.replace(f'path = "{node.data}"', f'path = "{elsewhere}"'))
    error = ok(node, "restore", node.set_id, "--in-place", "--yes", code=3)
    assert str(elsewhere) in error["message"] and str(node.data) in error["message"]
    node.command.config.write_text(text)
    nothing_changed(node)


def test_while_one_is_open_nothing_else_changes_the_target(node: Story) -> None:
    calls = 0
    for point in range(6, 60):
        killed, _, seen = run_here(node.command, *IN_PLACE, kill_at=point)
        calls = len(seen)
        assert killed == -signal.SIGKILL
        if "before-Commands.stop" in seen:
            break
        ok(node, "restore", "--undo", "ours", code=0 if journals(node) else 4)
    assert calls
    deleting = ("delete", node.set_id, "--yes", "--last")
    for words in (("take", "ours"), ("pin", node.set_id), deleting, IN_PLACE, ("resync", "ours", "--yes")):
        error = ok(node, *words, code=5)
        assert "--continue" in error["cure"] and "--undo" in error["cure"], words
    ok(node, "restore", "--discard", "ours", "--yes", code=3)
    assert len(ok(node, "list", "ours")["sets"]) == 1
    ok(node, "restore", "--undo", "ours")
    nothing_changed(node)
    assert ok(node, "take", "ours")["state"] == "ready"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_undoes_it(node: Story, number: signal.Signals) -> None:
    process = node.command.start(*IN_PLACE, "--json")
    until(lambda: journals(node) or process.poll() is not None, "it never began", 120)
    time.sleep(0.5)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode in (0, 9), said
    if journals(node):  # it was quicker, or the node ran already
        ok(node, "restore", "--undo", "ours")
    nothing_changed(node)
