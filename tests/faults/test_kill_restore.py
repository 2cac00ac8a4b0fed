"""SIGKILL of `restore` at random instants: after `reap` no half-made clone, mount or record is left; the next works."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.host import mounts
from tests.support import Command, loop_file_system


@contextlib.contextmanager
def somewhere(kind: str, tmp_path: Path) -> Iterator[Path]:
    if kind == "copy":
        yield tmp_path
    else:
        with loop_file_system("btrfs", tmp_path, 1000) as disk:
            subprocess.run(["btrfs", "subvolume", "create", disk / "sub"], check=True, capture_output=True)
            yield disk / "sub"


@pytest.mark.parametrize("kind", ["copy", pytest.param("btrfs", marks=pytest.mark.root)])
def test_killed_at_random_instants(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    times = 40 if request.config.getoption("--full") else 6
    chance = random.Random(kind)
    with somewhere(kind, tmp_path) as place:
        data, fast = place / "node", place / "fast"
        for top in (data, fast):
            top.mkdir()
            for number in range(200):
                (top / f"{number:06}.sst").write_bytes(b"x" * 20_000)
        (data / "database").symlink_to(fast)
        (data / "inner").symlink_to(data)
        command = Command(tmp_path / "etc")
        identity = command.json("take", str(data))["set_id"]
        clone = tmp_path / "clone"
        began = time.monotonic()
        command.json("restore", identity, "--to", str(clone))
        whole_s = time.monotonic() - began
        command.json("release", str(clone))
        finished = 0
        for _ in range(times):
            process = command.start("restore", identity, "--to", str(clone), "--json")
            time.sleep(chance.uniform(0.2, 1.0) * whole_s)
            process.kill()
            process.communicate(timeout=60)
            command.json("reap")
            attached = command.json("show", identity)["attachments"]
            if attached:  # it had ended: a person's clone, which reap leaves alone
                finished += 1
                command.json("release", str(clone))
            else:
                assert not [mount.path for mount in mounts.table() if mount.path.startswith(str(clone))]
                assert not list((tmp_path / "etc" / "run" / "staging").glob("*/*"))
                assert not clone.exists() and not (tmp_path / "clone.roots").exists()
        assert finished < times
        command.json("restore", identity, "--to", str(clone))
        assert len(list((clone / "database").iterdir())) == 200
        command.json("release", str(clone))
        command.json("delete", identity, "--yes", "--last")


def test_killed_once_the_directory_of_other_roots_is_made(tmp_path: Path) -> None:
    """It is there with none of them: found by the attachment, which is recorded first."""
    data, fast = tmp_path / "node", tmp_path / "fast"
    for top in (data, fast):
        top.mkdir()
        (top / "file").write_text("content")
    (data / "database").symlink_to(fast)
    command = Command(tmp_path / "etc")
    identity = command.json("take", str(data))["set_id"]
    clone = tmp_path / "clone"
    program = """
        import os, signal, sys
        made = os.makedirs
        def makedirs(path, *args, **named):
            made(path, *args, **named)
            if str(path).endswith(".roots"):
                os.kill(os.getpid(), signal.SIGKILL)
        os.makedirs = makedirs
        from snapshotter.__main__ import main
        main()
    """
    words = command.argv("restore", identity, "--to", str(clone))
    argv = [words[0], "-c", textwrap.dedent(program), *words[3:]]
    assert subprocess.run(argv, env=command.environment(), cwd="/").returncode == -signal.SIGKILL
    assert (tmp_path / "clone.roots").is_dir()
    command.json("reap")
    assert sorted(os.listdir(tmp_path)) == [".snapshotter", "etc", "fast", "node"]
