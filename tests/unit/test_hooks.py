"""Hooks and messages: what they are told, and that none of them can spoil a take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from snapshotter.core.errors import PreconditionError, UsageError
from snapshotter.host.secrets import reveal
from snapshotter.nodes import config
from snapshotter.verbs import plan as planning
from snapshotter.verbs.prune import nodes_of, prune
from snapshotter.verbs.take import take
from snapshotter.verbs.tick import tick
from tests.support import Command
from tests.unit.upkeep_kit import World

POLICY = 'every = "24h"\nkeep = {daily = 1}\n'


def hook(tmp: Path, name: str, code: int = 0, more: str = "") -> str:
    """A hook that writes down its environment; as the config names it."""
    script = tmp / f"{name}.sh"
    script.write_text(
        f"#!/bin/sh\nenv | grep ^SNAPSHOTTER_ >{tmp}/{name}.env\n{more}\necho said by {name}\nexit {code}\n"
    )
    script.chmod(0o755)
    return f'{name} = ["{script}"]'


def told(tmp: Path, name: str) -> dict[str, str]:
    lines = (tmp / f"{name}.env").read_text().splitlines()
    return dict(line.removeprefix("SNAPSHOTTER_").split("=", 1) for line in lines)


def with_hooks(tmp: Path, *hooks: str, more: str = "") -> World:
    return World(tmp, f"{POLICY}{more}\nhooks = {{{', '.join(hooks)}}}")


def test_hooks_know_what_happens(tmp_path: Path) -> None:
    names = [f"{when}_{what}" for when in ("before", "after") for what in ("take", "prune")]
    world = with_hooks(tmp_path, *(hook(tmp_path, name) for name in names))
    with world.clock():
        made = take(world.session(), "n0")
        before, after = told(tmp_path, "before_take"), told(tmp_path, "after_take")
        assert before["SET"] == after["SET"] == made["set_id"] and before["NODE"] == "n0"
        assert (before["EVENT"], after["EVENT"], after["OUTCOME"]) == ("before_take", "after_take", "done")
        assert after["PATH"] == world.config.nodes["n0"].path
        for _ in range(3):
            world.pass_by(days=1)
            take(world.session(), "n0")
        document, errors = prune(world.session(), confirm_many=True)
        assert not errors
        assert told(tmp_path, "after_prune")["SETS"].split() == [gone["set_id"] for gone in document["removed"]]


def test_a_slots_maker_is_taken_for_alive_while_its_hook_runs(tmp_path: Path) -> None:
    """By another host's take of the same slot, which can ask nothing but the record."""
    world = with_hooks(tmp_path, hook(tmp_path, "before_take"), more='timeout = "5m"\nbudget = "10s"')
    node = world.config.nodes["n0"]
    with world.clock():
        of_slot = planning.make(world.session(), node, now=world.now, slot="20261122t000000z")
        assert of_slot.birth.deadline - world.now == timedelta(seconds=310)
        assert planning.make(world.session(), node, now=world.now).birth.deadline - world.now == timedelta(seconds=10)


def test_one_that_fails_before_refuses_and_after_only_warns(tmp_path: Path) -> None:
    world = with_hooks(tmp_path, hook(tmp_path, "before_take", 4))
    with world.clock():
        with pytest.raises(PreconditionError, match="said by before_take"):
            take(world.session(), "n0")
        assert not world.sets() and not world.store.objects
        (tmp_path / "before_take.sh").write_text("#!/bin/sh\nexit 0\n")
        assert take(world.session(), "n0")["good"]
    other = tmp_path / "other"
    other.mkdir()
    world = with_hooks(other, hook(other, "after_take", 5))
    with world.clock():
        document = take(world.session(), "n0")
        assert document["good"] and any("after_take failed with 5: said by" in note for note in document["warnings"])


@pytest.mark.parametrize("way", ["--to", "--in-place"])
def test_around_a_restore_too(tmp_path: Path, way: str) -> None:
    data = tmp_path / "node"
    data.mkdir()
    (data / "file").write_text("content")
    hooks = ", ".join(hook(tmp_path, name) for name in ("before_restore", "after_restore"))
    command = Command(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\nhooks = {{{hooks}}}\n')
    set_id = command.json("take", "n")["set_id"]
    (data / "file").write_text("later")
    words = ("restore", set_id, *((way, str(tmp_path / "clone")) if way == "--to" else (way, "--yes")))
    (tmp_path / "before_restore.sh").write_text("#!/bin/sh\necho not now\nexit 1\n")
    assert "not now" in command.error(*words, exit_code=3)["message"]
    assert not (tmp_path / "after_restore.env").exists() and (data / "file").read_text() == "later"
    hook(tmp_path, "before_restore")
    restored = command.json(*words)["path"]
    assert (Path(restored) / "file").read_text() == "content"
    before, after = told(tmp_path, "before_restore"), told(tmp_path, "after_restore")
    assert before["SET"] == after["SET"] == set_id and before["DESTINATION"] == after["DESTINATION"] == restored
    assert after["OUTCOME"] == "done" and after["NODE"] == "n"


def test_one_that_hangs_is_ended(tmp_path: Path) -> None:
    world = with_hooks(tmp_path, hook(tmp_path, "after_take", more="exec sleep 60"), more='timeout = "1s"')
    with world.clock():
        document = take(world.session(), "n0")
        assert document["good"] and any("did not end within 1 s" in note for note in document["warnings"])


def test_the_hook_after_runs_when_the_take_fails(tmp_path: Path) -> None:
    world = with_hooks(tmp_path, hook(tmp_path, "before_take"), hook(tmp_path, "after_take"))
    world.store.capacity_bytes = 1  # check sees no floor, so create finds it full
    with world.clock(), pytest.raises(Exception):
        take(world.session(), "n0")
    if (tmp_path / "before_take.env").exists():
        assert told(tmp_path, "after_take")["OUTCOME"] == "failed" and told(tmp_path, "after_take")["ERROR"]


@pytest.fixture
def listener() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A web server on loopback, and what it was asked."""
    heard: list[tuple[str, str]] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            heard.append((self.path, body))
            self.send_response(500 if "broken" in self.path else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", heard
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_tick_tells_watchers_and_people(
    tmp_path: Path, listener: tuple[str, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, heard = listener
    monkeypatch.setenv("T_START", f"http://{address}/token/start")
    monkeypatch.setenv("T_FAIL", f"http://{address}/token/fail")
    monkeypatch.setenv("T_PEOPLE", f"json://{address}/people")
    success = tmp_path / "success.url"
    success.write_text(f"http://{address}/token/success\n")
    success.chmod(0o600)
    ping = f'ping = {{start = "env:T_START", success = "file:{success}", fail = "env:T_FAIL"}}\n'
    world = World(tmp_path, f'{POLICY}{ping}notify = ["env:T_PEOPLE"]')
    with world.clock():

        def run() -> dict[str, Any]:
            session = world.session()
            return tick(session, nodes_of(session, None))[0]

        (entry,) = run()["nodes"]
        assert heard == [("/token/start", ""), ("/token/success", entry["taken"]["set_id"])]
        heard.clear()
        run()
        assert not heard, "nothing was due"
        world.pass_by(days=1)
        (tmp_path / "data-0" / "file").unlink()
        document = run()
        assert [path for path, _ in heard] == ["/token/start", "/token/fail", "/people"]
        assert "is empty" in heard[1][1] and "take failed" in heard[2][1]
        # What can't be told is a warning, without the secret.
        monkeypatch.setenv("T_FAIL", f"http://{address}/token/broken")
        monkeypatch.setenv("T_START", "http://127.0.0.1:9/token")
        monkeypatch.delenv("T_PEOPLE")
        document = run()
        notes = " ".join(document["warnings"])
        assert "HTTP 500" in notes and "env:T_START" in notes and "env:T_PEOPLE" in notes and "token" not in notes
        assert len(document["failed"]) == 1


def test_secrets_are_named_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="env:NAME"):
        config.parse('[node.a]\npath = "/a"\nnotify = ["https://hooks.example/secret"]', "test")
    parsed = config.parse('[node.a]\npath = "/a"\nping = {fail = "file:/etc/url"}', "test")
    assert parsed.nodes["a"].ping.fail == "file:/etc/url"
    open_to_all = tmp_path / "open"
    open_to_all.write_text("secret")
    open_to_all.chmod(0o644)
    with pytest.raises(PreconditionError, match="chmod 600"):
        reveal(f"file:{open_to_all}")
    open_to_all.chmod(0o640)
    assert reveal(f"file:{open_to_all}") == "secret"


@pytest.mark.parametrize("failing", ["its time is up", "by itself"])
def test_what_a_hook_that_was_cut_short_has_begun_is_undone(tmp_path: Path, failing: str) -> None:
    """It took the node out of rotation, and was killed while it waited; each tick would again."""
    before = hook(tmp_path, "before_take", *((0, "sleep 30") if failing == "its time is up" else (1, "")))
    world = with_hooks(tmp_path, before, hook(tmp_path, "after_take"), more='timeout = "1s"')
    with world.clock(), pytest.raises(PreconditionError, match="its hook before_take failed"):
        take(world.session(), "n0")
    assert not world.sets()
    if failing == "by itself":
        assert not (tmp_path / "after_take.env").exists(), "it is to leave things as they were"
    else:
        assert told(tmp_path, "after_take")["OUTCOME"] == "failed"
