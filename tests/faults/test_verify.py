"""verify, as an operator runs it: no false alarm on images of running databases, damage found, the judgement written
down, and nothing left behind whoever dies."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from snapshotter.checks import Finding, Outcome, Proof
from snapshotter.core.errors import BusyError, JudgedBadError
from snapshotter.verbs.verify import _record
from tests.support import Command, Node, loop_file_system
from tests.unit.test_checks import flip, live_table

Measured = Callable[[str], None]


@pytest.fixture
def start() -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def begin(data: Path, *words: str) -> Node:
        nodes.append(Node(data, *words))
        return nodes[-1]

    yield begin
    for node in nodes:
        node.kill()


def left_behind(command: Command, node: Node) -> list[str]:
    """Everything that a verify could leave: mounts, directories, attachments."""
    beside = node.data.parent
    found = [str(path) for path in beside.rglob("*") if ".snapshotter-verify" in str(path)]
    found += [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(beside) in line]
    found.remove(str(beside)) if str(beside) in found else None
    sets = command.json("list", str(node.data))["sets"]
    return found + [each["id"] for entry in sets for each in entry["attachments"]]


def verified(command: Command, what: str, *words: str, exit_code: int = 0) -> dict[str, Any]:
    import json

    done = command.run("verify", what, *words, "--json")
    assert done.returncode == exit_code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def hot_images(place: Path, start: Callable[..., Node], provider: str, times: int, measured: Measured) -> None:
    command = Command(place / "etc")
    node = start(place / "data", "--rate", "8", "--fill", "20")
    node.wait_for(100)
    took: list[float] = []
    try:
        for _ in range(times):
            taken = command.json("take", str(node.data), "--provider", provider)
            for level in (2, 3, 4):
                began = time.monotonic()
                document = verified(command, taken["set_id"], "--level", str(level))
                took.append(time.monotonic() - began)
                assert (document["outcome"], document["level"]) == ("ok", level), document
                assert [each["kind"] for each in document["databases"]] == ["rocksdb"]
                now = document["set"]
                assert (now["verify_outcome"], now["verify_level"]) == ("ok", level) and now["good"]
            assert not left_behind(command, node)
            node.wait_for(node.acknowledged() + 100)
            command.json("delete", taken["set_id"], "--yes", "--last")
    finally:
        node.kill()
    measured(f"verify, {times} hot images by {provider}: no false alarm at L2, L3, L4; {max(took):.1f} s at most")


def count(request: pytest.FixtureRequest) -> int:
    return 20 if request.config.getoption("--full") else 3


def test_no_false_alarm_on_hot_images_by_copy(
    tmp_path: Path, start: Callable[..., Node], request: pytest.FixtureRequest, measured: Measured
) -> None:
    hot_images(tmp_path, start, "copy", count(request), measured)


@pytest.mark.root
def test_no_false_alarm_on_hot_images_by_btrfs(
    tmp_path: Path, start: Callable[..., Node], request: pytest.FixtureRequest, measured: Measured
) -> None:
    with loop_file_system("btrfs", tmp_path, 4000) as place:
        hot_images(place, start, "btrfs", count(request), measured)


@pytest.fixture
def taken(tmp_path: Path, start: Callable[..., Node]) -> tuple[Command, Node, str]:
    """A node that was taken by copy and runs no more."""
    command = Command(tmp_path / "etc")
    node = start(tmp_path / "data", "--rate", "8", "--fill", "20")
    node.wait_for(300)
    set_id = command.json("take", str(node.data), "--provider", "copy")["set_id"]
    node.kill()
    return command, node, set_id


def image(node: Node, set_id: str) -> Path:
    return node.data.parent / ".snapshotter" / "sets" / set_id / "0" / "tree"


def test_a_target_means_its_newest_good_set(taken: tuple[Command, Node, str]) -> None:
    command, node, set_id = taken
    document = verified(command, str(node.data))
    for selector in (f"latest:{node.data}", f"latest-verified:{node.data}"):
        assert verified(command, selector)["set_id"] == document["set_id"]
    assert (document["set_id"], document["level"], document["wanted"]) == (set_id, 2, 2)
    assert command.json("show", f"latest-verified:{node.data}")["set_id"] == set_id


def test_a_file_missing_from_the_image_is_found_by_the_files_manifest(taken: tuple[Command, Node, str]) -> None:
    """The newest log, which neither RocksDB nor its MANIFEST misses."""
    command, node, set_id = taken
    max((image(node, set_id) / "database").glob("*.log")).unlink()
    document = verified(command, set_id, exit_code=8)
    assert (document["outcome"], document["level"]) == ("corrupt", 1) and ".log" in document["why"]
    assert document["set"]["verify_outcome"] == "corrupt" and not document["set"]["good"]
    assert not left_behind(command, node)
    command.error("show", f"latest:{node.data}", exit_code=4)


def test_a_verdict_that_can_not_be_written_down_is_told() -> None:
    """Somebody restores from it meanwhile, or the disk is full."""
    provider = SimpleNamespace(mark=Mock(side_effect=BusyError("another process works on it", object="s1")))
    found = SimpleNamespace(set_id="s1", marks={}, birth=SimpleNamespace(target="t"))
    session = SimpleNamespace(providers_of=lambda _: [provider], node_of=lambda _: None, again=lambda _: found)
    bad = Proof(3, Outcome.CORRUPT, (Finding("image", "/data", 3, Outcome.CORRUPT, "a block differs"),))
    with pytest.raises(JudgedBadError, match=r"is corrupt: .*a block differs.*works on it"):
        _record(session, found, bad)  # type: ignore[arg-type]
    with pytest.raises(BusyError):
        _record(session, found, Proof(3, Outcome.OK))  # type: ignore[arg-type]


def test_a_flipped_bit_is_found_at_level_3_and_a_weaker_ok_does_not_clear_it(
    taken: tuple[Command, Node, str],
) -> None:
    command, node, set_id = taken
    assert verified(command, set_id, "--level", "4")["outcome"] == "ok"
    table = live_table(image(node, set_id))
    flip(table, 500)
    assert verified(command, set_id, "--level", "2")["set"]["verify_level"] == 4, "the stronger ok stands"
    document = verified(command, set_id, "--level", "3", exit_code=8)
    assert (document["outcome"], document["level"]) == ("corrupt", 3)
    assert verified(command, set_id, "--level", "2")["set"]["verify_outcome"] == "corrupt"
    flip(table, 500)
    assert verified(command, set_id, "--level", "3")["set"]["good"], "an ok at that level does"


@pytest.mark.root
def test_a_database_that_was_damaged_before_the_take(tmp_path: Path, start: Callable[..., Node]) -> None:
    with loop_file_system("btrfs", tmp_path, 2000) as place:
        command = Command(place / "etc")
        node = start(place / "data", "--rate", "8", "--fill", "20")
        node.wait_for(300)
        node.kill()
        flip(live_table(node.data), 500)
        set_id = command.json("take", str(node.data), "--provider", "btrfs")["set_id"]
        document = verified(command, set_id, "--level", "3", exit_code=8)
        assert document["outcome"] == "corrupt" and "sst" in document["why"]
        assert not left_behind(command, node)


def test_the_image_is_as_it_was(taken: tuple[Command, Node, str]) -> None:
    """Engines recover the clone; the image itself isn't touched."""
    command, node, set_id = taken

    def content() -> dict[str, tuple[int, bytes]]:
        top = image(node, set_id)
        files = [path for path in top.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = content()
    verified(command, set_id, "--level", "4")
    assert content() == before


@pytest.mark.root
@pytest.mark.parametrize("provider", ["copy", "btrfs"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_any_moment_nothing_stays(
    tmp_path: Path, start: Callable[..., Node], request: pytest.FixtureRequest, provider: str, how: signal.Signals
) -> None:
    with loop_file_system("btrfs", tmp_path, 3000) as place:
        command = Command(place / "etc")
        node = start(place / "data", "--rate", "8", "--fill", "20")
        node.wait_for(200)
        set_id = command.json("take", str(node.data), "--provider", provider)["set_id"]
        node.kill()
        began = time.monotonic()
        verified(command, set_id, "--level", "4")
        whole_s = time.monotonic() - began
        rounds = 12 if request.config.getoption("--full") else 3
        for _ in range(rounds):
            process = command.start("verify", set_id, "--level", "4", "--json")
            time.sleep(random.uniform(0.3, 1.0) * whole_s)
            process.send_signal(how)
            process.communicate(timeout=120)
            assert process.returncode != 1, "a bug of ours"
            if how is signal.SIGKILL or process.returncode == -signal.SIGTERM:
                command.json("reap")
                with contextlib.suppress(OSError):  # empty and ours: the next verify takes it, and removes it
                    (place / ".snapshotter-verify").rmdir()
            assert not left_behind(command, node)
        document = verified(command, set_id)
        assert document["outcome"] == "ok" and document["set"]["verify_level"] == 4


def test_two_at_once_and_a_delete_between_them(taken: tuple[Command, Node, str]) -> None:
    command, node, set_id = taken
    both = [command.start("verify", set_id, "--level", "4", "--json") for _ in range(2)]
    refused = False
    while any(process.poll() is None for process in both):
        now = [path for path in (node.data.parent / ".snapshotter" / "attachments").glob("*.json")]
        if now and not refused:
            command.error("delete", set_id, "--yes", "--last", exit_code=5)
            command.json("reap")
            refused = True
        time.sleep(0.01)
    for process in both:
        said, complained = process.communicate()
        assert process.returncode == 0, (said, complained)
    assert refused and not left_behind(command, node)


def test_no_room_for_a_clone_is_no_judgement(tmp_path: Path, start: Callable[..., Node]) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: loop devices")
    with loop_file_system("ext4", tmp_path, 600) as place:
        command = Command(tmp_path / "etc")
        node = start(place / "data", "--rate", "8", "--fill", "40")
        node.wait_for(100)
        set_id = command.json("take", str(node.data), "--provider", "copy")["set_id"]
        node.kill()
        free = os.statvfs(place)
        with open(place / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - (16 << 20)))
        error = command.error("verify", set_id, exit_code=6)
        assert "free" in error["message"]
        (place / "filler").unlink()
        assert not left_behind(command, node)
        assert command.json("show", set_id)["verify_outcome"] is None
