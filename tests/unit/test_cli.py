"""The command as an operator meets it: bad input ends with the right exit code, one line that has the cure, and nothing
changed; answers keep to the documented shape."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snapshotter.host.mounts import is_mount_point
from snapshotter.nodes import config
from tests.faults.in_place_kit import picture
from tests.support import CHECKOUT, NOBODY, Command, loop_file_system


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "etc")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    made = tmp_path / "place" / "node"
    (made / "database").mkdir(parents=True)
    (made / "database" / "000001.sst").write_bytes(b"x" * 100_000)
    (made / "database" / "CURRENT").write_text("MANIFEST-1\n")
    (made / "DATABASE_METADATA.json").write_text("{}")
    (made / "key").write_text("0x" + "11" * 32)
    os.chmod(made / "key", 0o600)
    return made


def inventory(top: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted(top.rglob("*")):
        stat = path.lstat()
        found[str(path.relative_to(top))] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


SET_KEYS = {
    "set_id", "target", "node", "host", "path", "taken_at", "state", "why", "grade", "good", "quiesce", "freeze_ms",
    "skew_ms", "height", "block", "size_bytes", "pinned", "verify_level", "verify_at", "verify_outcome", "secrets",
    "snapshots", "roots", "replicas", "replica_of", "attachments",
}  # fmt: skip


def test_the_tour(command: Command, data: Path, tmp_path: Path) -> None:
    """take, list, show, restore, pin, release, unpin, delete: each says in JSON what the contract says."""
    before = inventory(data)
    taken = command.json("take", str(data))
    assert set(taken) == SET_KEYS | {"existing", "warnings", "left_out"}
    assert (taken["state"], taken["grade"], taken["good"], taken["existing"]) == ("ready", "filesystem", True, False)
    assert taken["secrets"] == 1 and taken["quiesce"] == "pause" and taken["height"] is None
    identity = taken["set_id"]
    listed = command.json("list", str(data))
    assert listed["unavailable"] == [] and [set(entry) for entry in listed["sets"]] == [SET_KEYS]
    assert command.json("show", identity[:-2])["set_id"] == identity
    assert command.json("show", f"latest:{data}")["set_id"] == identity

    clone = tmp_path / "clone"
    restored = command.json("restore", identity, "--to", str(clone))
    assert {"set_id", "attachment_id", "path", "roots", "withheld"} <= set(restored)
    assert (clone / "key").stat().st_mode & 0o777 == 0o600
    assert (clone / "database" / "000001.sst").read_bytes() == b"x" * 100_000
    assert inventory(data) == before, "the origin is never touched"

    error = command.error("delete", identity, "--yes", "--last", exit_code=5)
    assert str(clone) in error["line"] and "release" in error["cure"]
    (clone / "new").write_text("")
    assert "--discard-changes" in command.error("release", str(clone), exit_code=5)["cure"]
    assert command.json("release", str(clone), "--discard-changes")["set_id"] == identity
    assert not clone.exists()
    command.error("release", str(clone), exit_code=4)

    assert command.json("pin", identity)["pinned"] is True
    assert "unpin" in command.error("delete", identity, "--yes", "--last", exit_code=5)["cure"]
    assert command.json("unpin", identity)["pinned"] is False
    assert "--last" in command.error("delete", identity, "--yes", exit_code=2)["cure"]
    assert "--yes" in command.error("delete", identity, "--last", exit_code=2)["cure"]
    assert [gone["set_id"] for gone in command.json("delete", identity, "--last", "--yes")["deleted"]] == [identity]
    assert command.json("list", str(data))["sets"] == []
    command.error("delete", identity, "--yes", exit_code=4)


def test_a_tick_that_a_function_asks_for(data: Path, tmp_path: Path) -> None:
    """The slot and the provider are the function's, which finds the set by both; the config may say others."""
    command = Command(tmp_path / "etc", config=f'[node.n]\npath = "{data}"\nprovider = "zfs"\n')
    asked = ("tick", "n", "--slot", "20261122t020000z", "--provider", "copy", "-o", f"store={tmp_path}/place/store")
    (entry,) = command.json(*asked)["nodes"]
    assert entry["due"] and entry["slot"] == "20261122t020000z" and entry["next_at"] is None
    assert {each["provider"] for each in entry["taken"]["snapshots"]} == {"copy"}
    assert not command.json(*asked)["nodes"][0]["due"]
    assert "node" in command.error("tick", "--slot", "20261122t020000z", exit_code=2)["cure"]


def test_a_clone_not_written_to_is_released_without_a_word(command: Command, data: Path, tmp_path: Path) -> None:
    identity = command.json("take", str(data))["set_id"]
    command.json("restore", identity, "--to", str(tmp_path / "clone"))
    shutil.copytree(tmp_path / "clone", tmp_path / "elsewhere")  # reading it is not writing to it
    command.json("release", str(tmp_path / "clone"))
    assert not (tmp_path / "clone").exists()


def test_release_is_refused_while_somebody_sits_in_it(command: Command, data: Path, tmp_path: Path) -> None:
    identity = command.json("take", str(data))["set_id"]
    command.json("restore", identity, "--to", str(tmp_path / "clone"))
    sitter = subprocess.Popen(["sleep", "600"], cwd=tmp_path / "clone")
    try:
        assert "sleep" in command.error("release", str(tmp_path / "clone"), exit_code=5)["line"]
    finally:
        sitter.kill()
        sitter.wait()
    command.json("release", str(tmp_path / "clone"))


def test_dry_runs_change_nothing(command: Command, data: Path, tmp_path: Path) -> None:
    before = inventory(tmp_path / "place")
    planned = command.json("take", str(data), "--dry-run")
    assert planned["quiesce"] == "pause" and planned["profile"] == "besu"
    assert inventory(tmp_path / "place") == before
    identity = command.json("take", str(data))["set_id"]
    before = inventory(tmp_path / "place")
    assert command.json("restore", identity, "--to", str(tmp_path / "c"), "-n")["path"] == str(tmp_path / "c")
    assert inventory(tmp_path / "place") == before and not (tmp_path / "c").exists()


def test_a_slot_is_taken_once(command: Command, data: Path) -> None:
    first = command.json("take", str(data), "--slot", "daily-1")
    again = command.json("take", str(data), "--slot", "daily-1")
    assert again["existing"] and again["set_id"] == first["set_id"]
    assert not command.json("take", str(data), "--slot", "daily-2")["existing"]


def test_name_path_and_link_are_one_target(tmp_path: Path, data: Path) -> None:
    command = Command(tmp_path / "etc", config=f'[node.validator-1]\npath = "{data}"\ntype = "validator"\n')
    (tmp_path / "link").symlink_to(data)
    names = [["validator-1"], [str(data)], [str(tmp_path / "link")], []]
    taken = [command.json("take", *name) for name in names]
    assert len({entry["target"] for entry in taken}) == 1
    assert {entry["node"] for entry in taken} == {"validator-1"}
    assert len(command.json("take", "--all")["sets"]) == 1


def test_all_goes_on_after_a_node_that_fails(tmp_path: Path, data: Path) -> None:
    config = f'[node.gone]\npath = "{tmp_path}/gone"\n[node.here]\npath = "{data}"\n'
    done = Command(tmp_path / "etc", config=config).run("take", "--all", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 6
    assert [entry["node"] for entry in document["sets"]] == ["here"]
    assert [(entry["node"], entry["exit"]) for entry in document["failed"]] == [("gone", 4)]


BAD = [
    (["take", "{t}/absent"], 4, "no such directory"),
    (["take", "{d}/key"], 2, "not a directory"),
    (["take", "/"], 3, "own directory"),
    (["take", "/dev/shm"], 3, "move it to a disk"),
    (["take", "/proc"], 3, "kernel's"),
    (["take", "nobody-has-this-name"], 4, "give a node's name or a path"),
    (["take"], 2, "give a path"),
    (["take", "{d}", "--provider", "cpoy"], 2, "did you mean copy"),
    (["take", "{d}", "-o", "stroe=/x"], 2, "did you mean store"),
    (["take", "{d}", "-o", "store"], 2, "KEY=VALUE"),
    (["take", "{d}", "--budget", "soon"], 2, "5s"),
    (["take", "{d}", "--quiesce", "none"], 3, "--allow-skew"),
    (["take", "{d}", "--quiesce", "stop"], 2, "set unit"),
    (["take", "{d}", "--quiesce", "hooks"], 2, "hold"),
    (["take", "{d}", "--require", "application"], 3, "--quiesce stop"),
    (["take", "{d}", "-o", "store={d}/inside"], 3, ""),
    (["take", "--all"], 2, "init"),
    (["take", "{d}", "--all"], 2, ""),
    (["take", "{d}", "--no-such-flag"], 2, "--help"),
    (["show", "s2020"], 4, "snapshotter list"),
    (["show", "latest:{d}"], 4, "snapshotter list"),
    (["restore", "s2020", "--to", "{t}/c"], 4, "snapshotter list"),
    (["restore", "s2020"], 2, "--to DIR"),
    (["restore", "s2020", "--to", "{t}/c", "--mount", "{t}/d"], 2, "--to DIR"),
    (["release", "{t}"], 4, "show SET"),
    (["delete", "latest:{d}", "--yes"], 2, "the set's id"),
    (["delete", "s2020", "--yes"], 4, "snapshotter list"),
    (["profile", "besuu"], 2, "did you mean besu"),
    (["init", "{t}/absent"], 4, ""),
    (["frobnicate"], 2, "--help"),
]


@pytest.mark.parametrize(
    ("words", "exit_code", "cure"), BAD, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None
)
def test_bad_input(command: Command, data: Path, tmp_path: Path, words: list[str], exit_code: int, cure: str) -> None:
    before = inventory(tmp_path / "place")
    error = command.error(*[word.format(t=tmp_path, d=data) for word in words], exit_code=exit_code)
    assert cure in error["line"], error["line"]
    assert inventory(tmp_path / "place") == before


@pytest.mark.parametrize("words", [[], ["schedule"], ["identity"]])
def test_a_group_alone_shows_its_help(words: list[str]) -> None:
    run = [sys.executable, "-m", "snapshotter", *words]
    done, asked = (
        subprocess.run(argv, capture_output=True, text=True, cwd=CHECKOUT) for argv in (run, [*run, "--help"])
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", asked.stdout) and asked.returncode == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stat = 1", "did you mean state"),
        ("[node.a]\npath = 7", "expected a string"),
        ("[node.a]\npath = '/x'\nbudgt = '5s'", "did you mean budget"),
        ("[node.a]\npath = '/x'\nbudget = 5", "a string such as"),
        ("[node.a]\npath = 'x'", "absolute"),
        ("[node.a", "not TOML"),
    ],
)
def test_bad_config(tmp_path: Path, text: str, says: str) -> None:
    command = Command(tmp_path / "etc")
    command.config.write_text(text)
    assert says in command.error("list", exit_code=2)["line"]


def test_restore_destinations(command: Command, data: Path, tmp_path: Path) -> None:
    identity = command.json("take", str(data))["set_id"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    before = inventory(tmp_path / "place")
    for place, code in [
        ("full", 2),
        ("full/file", 2),
        ("link", 2),
        ("absent/deep", 4),
        ("place/node/in", 2),
        ("place", 2),
    ]:
        command.error("restore", identity, "--to", str(tmp_path / place), exit_code=code)
    assert inventory(tmp_path / "place") == before
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_ambiguous_ids(command: Command, data: Path) -> None:
    for _ in range(2):
        command.json("take", str(data))
    assert "more of the id" in command.error("show", "s", exit_code=2)["line"]
    assert "more of the id" in command.error("pin", "s2", exit_code=2)["line"]


def test_reap_of_nothing(command: Command, data: Path) -> None:
    command.json("take", str(data))
    said = command.json("reap")
    assert said["removed"] == [] and said["let_go"] == []
    assert len(command.json("list", str(data))["sets"]) == 1


@pytest.mark.root
def test_without_permission(tmp_path: Path, data: Path) -> None:
    """Another user's node: refused, in one line, and nothing made."""
    for parent in [tmp_path, *tmp_path.parents][:3]:
        os.chmod(parent, 0o755)
    command = Command(tmp_path / "home", NOBODY)
    before = inventory(tmp_path / "place")
    os.chmod(data, 0o700)
    command.error("take", str(data), exit_code=3)
    os.chmod(data, 0o755)
    command.error("take", str(data), exit_code=3)  # `key` can't be read
    assert inventory(tmp_path / "place") == before


@pytest.mark.root
def test_read_only_mount(command: Command, data: Path, tmp_path: Path) -> None:
    identity = command.json("take", str(data))["set_id"]
    place = tmp_path / "ro"
    command.json("restore", identity, "--mount", str(place))
    try:
        assert (place / "key").read_text().startswith("0x")
        with pytest.raises(OSError, match="Read-only"):
            (place / "new").write_text("")
    finally:
        command.json("release", str(place))
    assert not os.path.ismount(place)


@pytest.mark.root
def test_store_full(tmp_path: Path, data: Path) -> None:
    """No room in the store: refused before anything is made; the floor counts."""
    (data / "database" / "000002.sst").write_bytes(os.urandom(60 << 20))
    command = Command(tmp_path / "etc")
    time.sleep(2.5)  # what was just written is copied twice, and for a moment needs its room twice
    with loop_file_system("ext4", tmp_path, 100) as small:
        store = small / "store"
        command.json("take", str(data), "-o", f"store={store}")
        error = command.error("take", str(data), "--quiesce", "pause", "-o", f"store={small}/other", exit_code=3)
        assert "free" in error["line"]
        assert len(command.json("list", str(data))["sets"]) == 1


def test_completion_and_version(command: Command, data: Path) -> None:
    identity = command.json("take", str(data))["set_id"]
    environment = command.environment()
    for shell in ("bash", "zsh", "fish"):
        script = subprocess.run(
            [sys.executable, "-m", "snapshotter"],
            env={**environment, "_SNAPSHOTTER_COMPLETE": f"{shell}_source"},
            capture_output=True, text=True, cwd=CHECKOUT,
        )  # fmt: skip
        assert "snapshotter" in script.stdout
    done = subprocess.run(
        [sys.executable, "-m", "snapshotter"],
        env={**environment, "_SNAPSHOTTER_COMPLETE": "bash_complete", "COMP_CWORD": "4",
             "COMP_WORDS": f"snapshotter show --config {command.config} s"},
        capture_output=True, text=True, cwd=CHECKOUT,
    )  # fmt: skip
    assert identity in done.stdout
    assert command.run("--version").returncode in (0, 2)


def test_errors_for_a_person_are_one_line(command: Command) -> None:
    done = command.run("show", "nonsense")
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_init_finds_and_writes(command: Command, data: Path) -> None:
    command.config.unlink()
    shown = command.run("init", str(data), "--type", "validator", "--config", str(command.config))
    assert shown.returncode == 2, "a config that was named must be there, unless it is about to be written"
    said = command.json("init", str(data), "--type", "validator", "--write")
    assert said["found"]["profile"] == "besu" and said["found"]["provider"] == "copy"
    assert command.config.stat().st_mode & 0o077 == 0
    command.config.write_text(f'state = "{data.parent}/state"\n' + command.config.read_text())
    taken = command.json("take", "node")
    assert taken["path"] == str(data)
    assert "already" in command.error("init", str(data), "--write", exit_code=2)["line"]


@pytest.mark.parametrize("kind", ["validator", "rpc", "archive"])
def test_init_leaves_schedule_and_retention_to_the_type(command: Command, data: Path, kind: str) -> None:
    command.config.unlink()
    command.json("init", str(data), "--type", kind, "--write")
    preset = config.make_node("node", {"path": str(data), "type": kind}, "")
    written = config.load(str(command.config)).nodes["node"]
    assert (written.every, written.keep) == (preset.every, preset.keep) and written.keep != config.Keep()
    assert "keep" not in command.config.read_text()


def test_init_keeps_what_the_config_says(command: Command, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "place" / "other"
    other.mkdir()
    (other / "file").write_text("content")
    mine = f'# mine\nstate = "{tmp_path}/state"\n[node.a]\npath = "{data}"\n'
    command.config.write_text(mine)
    command.json("init", str(other), "--write")
    assert command.config.read_text().startswith(mine)
    assert {entry["node"] for entry in command.json("take", "--all")["sets"]} == {"a", "other"}


def test_a_name_does_not_drive_the_terminal(command: Command, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"place\x1b[2J") / os.fsdecode(b"n\x1b]0;title\x07")
    odd.mkdir(parents=True)
    (odd / "file").write_text("content")
    for words in (["take", str(odd)], ["show", f"latest:{odd}"], ["take", str(odd), "-n"], ["providers", str(odd)]):
        done = command.run(*words)
        assert done.returncode == 0, done.stderr
        assert "\\x1b[2J" in done.stdout and "\x1b" not in done.stdout + done.stderr
    assert command.json("show", f"latest:{odd}")["path"] == str(odd)


def test_a_run_directory_that_cannot_be_had_names_the_cure(command: Command, data: Path) -> None:
    (command.home / "run").write_text("in the way")
    assert "set SNAPSHOTTER_RUN" in command.error("take", str(data), exit_code=3)["cure"]


def test_providers_and_profiles(command: Command, data: Path) -> None:
    said = command.json("providers", str(data))
    assert said["serves"] in [entry["provider"] for entry in said["providers"]]
    assert all(entry["serves"] or entry["reason"] for entry in said["providers"]), "each no has its reason"
    refused = command.run("providers", "/dev/shm", "--json")
    assert refused.returncode == 3 and json.loads(refused.stdout)["serves"] is None
    assert {"besu", "generic"} <= {entry["name"] for entry in command.json("profile")["profiles"]}
    assert command.json("profile", str(data))["profile"]["name"] == "besu"
    assert command.json("profile", "besu")["profile"]["secrets"] == ["key"]


def test_every_command_speaks_to_a_person_too(command: Command, data: Path, tmp_path: Path) -> None:
    """The text forms run, end with 0, and print no Python."""
    identity = command.json("take", str(data))["set_id"]
    clone = str(tmp_path / "clone")
    for words in (
        ["take", str(data), "-n"], ["take", str(data)], ["list"], ["show", identity], ["pin", identity],
        ["unpin", identity], ["restore", identity, "--to", clone, "-n"], ["restore", identity, "--to", clone],
        ["show", identity], ["release", clone], ["delete", identity, "--yes"], ["reap"], ["profile"],
        ["profile", "besu"], ["providers"], ["providers", str(data)], ["init", str(tmp_path / "place")],
    ):  # fmt: skip
        done = command.run(*words)
        assert done.returncode == 0, (words, done.stderr)
        assert done.stdout and "None" not in done.stdout and "{" not in done.stdout, (words, done.stdout)


def test_another_hosts_set_is_looked_at_but_not_touched(command: Command, data: Path, tmp_path: Path) -> None:
    identity = command.json("take", str(data))["set_id"]
    birth = next((tmp_path / "place" / ".snapshotter" / "sets" / identity).glob("birth*.json"))
    record = json.loads(birth.read_text())
    record["h"] = "elsewhere-00000000"
    birth.write_text(json.dumps(record, separators=(",", ":")))
    assert command.json("show", identity)["host"] == "elsewhere-00000000"
    for words in (
        ["pin", identity],
        ["delete", identity, "--yes", "--last"],
        ["restore", identity, "--to", str(tmp_path / "c")],
    ):
        assert "--from-host" in command.error(*words, exit_code=2)["line"]
    command.json("restore", identity, "--to", str(tmp_path / "c"), "--from-host")


def test_an_empty_data_path_is_no_backup(command: Command, data: Path) -> None:
    """Its disk isn't mounted, most likely: an image of nothing must not become the latest."""
    good = command.json("take", str(data))["set_id"]
    shutil.rmtree(data)
    data.mkdir()
    (data / "lost+found").mkdir()
    assert "mounted" in command.error("take", str(data), exit_code=3)["line"]
    assert command.json("show", f"latest:{data}")["set_id"] == good


def test_from_a_copy_of_a_store(command: Command, data: Path, tmp_path: Path) -> None:
    """The disk is gone, its store was copied elsewhere: what docs/copy.md says, with nothing remembered."""
    shutil.rmtree(data / "database")
    (data / "DATABASE_METADATA.json").unlink()
    set_id = command.json("take", str(data))["set_id"]
    copy, clone, content = tmp_path / "backup/store", tmp_path / "clone", picture(data)
    copy.parent.mkdir()
    shutil.copytree(data.parent / ".snapshotter", copy, symlinks=True)
    shutil.rmtree(data.parent / ".snapshotter")
    shutil.rmtree(data)
    new = Command(tmp_path / "new-etc")
    store = ("-o", f"store={copy}")
    made = new.json("restore", set_id, "--to", str(clone), *store, "--with-identity")
    assert made["set_id"] == set_id and picture(clone) == content
    new.json("release", str(clone))
    assert not clone.exists()
    listed = [entry["set_id"] for entry in new.json("list")["sets"]]  # a btrfs of another test's may be mounted
    assert set_id not in listed, "it is an archive: none of its sets are this host's to prune"
    assert (new.home / "state/copy-attached").read_bytes() == b""
    said = new.json("init", "--from", set_id, *store, "--write")
    words = said["restore"].split()[1:]
    new.json(*words, "--yes")
    assert picture(data) == content


def test_a_path_that_could_not_be_recorded_is_refused(command: Command, tmp_path: Path) -> None:
    data = tmp_path / ("d" * 200) / ("e" * 200)
    data.mkdir(parents=True)
    (data / "file").write_text("")
    assert "bind mount" in command.error("take", str(data), exit_code=3)["line"]
    assert not (data.parent / ".snapshotter").exists()


@pytest.mark.parametrize("gone", ["removed", "moved"])
def test_a_clone_that_is_gone_is_released(command: Command, data: Path, tmp_path: Path, gone: str) -> None:
    identity = command.json("take", str(data))["set_id"]
    command.json("restore", identity, "--to", str(tmp_path / "clone"))
    if gone == "removed":
        shutil.rmtree(tmp_path / "clone")
    else:
        (tmp_path / "clone").rename(tmp_path / "mine")
    command.json("release", str(tmp_path / "clone"))
    assert command.json("show", identity)["attachments"] == []
    command.json("delete", identity, "--yes", "--last")
    assert gone == "removed" or (tmp_path / "mine" / "key").exists()


@pytest.mark.root
def test_a_mount_of_somebody_elses_is_not_unmounted(command: Command, data: Path, tmp_path: Path) -> None:
    identity = command.json("take", str(data))["set_id"]
    clone = tmp_path / "clone"
    command.json("restore", identity, "--to", str(clone))
    (clone / "mine").write_text("")
    (tmp_path / "other").mkdir()
    subprocess.run(["mount", "--bind", tmp_path / "other", clone], check=True)
    try:
        assert "umount" in command.error("release", str(clone), "--discard-changes", exit_code=5)["line"]
        assert is_mount_point(str(clone))
    finally:
        subprocess.run(["umount", clone], check=True)
    assert "--discard-changes" in command.error("release", str(clone), exit_code=5)["line"]
    assert (clone / "mine").exists()


def test_output_that_nobody_takes(command: Command, data: Path) -> None:
    """A closed or broken stdout or stderr is no reason to fail, nor for a traceback."""
    environment = command.environment()
    listing = " ".join(f"'{word}'" for word in command.argv("list", str(data), "--json"))
    taking = " ".join(f"'{word}'" for word in command.argv("take", str(data)))
    for script, codes in [
        (f"{taking} 2>&-", {0}),
        (f"{taking} <&- >&- 2>&-", {0}),
        (f"set -o pipefail; {listing} | true", {0}),
        (f"{listing} > /dev/full", {3}),
        (f"{listing} > /dev/full".replace("'--json'", ""), {3}),
    ]:
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, cwd="/")
        assert done.returncode in codes, (script, done.returncode, done.stderr)
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr, (script, done.stderr)
    assert len(command.json("list", str(data))["sets"]) == 2


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_what_was_done_is_done_where_the_answer_finds_no_room(command: Command, data: Path, more: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command.argv("take", str(data), *more),
            env=command.environment(), stdout=full, stderr=subprocess.PIPE, text=True, cwd="/",
        )  # fmt: skip
    assert done.returncode == 0, "exit 3 would say that there is no set"
    assert "can't be written to stdout: No space left" in done.stderr.splitlines()[-1]
    assert len(command.json("list", str(data))["sets"]) == 1


def test_budgets_out_of_range(command: Command, data: Path) -> None:
    for budget in ("0s", "999999999w", "11m", "-5s", "1ms"):
        command.error("take", str(data), f"--budget={budget}", exit_code=2)


def test_the_rpcs_address_is_nobodys_business(tmp_path: Path, data: Path) -> None:
    config = f'[node.a]\npath = "{data}"\nrpc = "http://admin:hunter2@127.0.0.1:1/v3/APIKEY"\n'
    done = Command(tmp_path / "etc", config=config).run("take", "a", "--json")
    assert done.returncode == 0
    assert "height" in done.stderr and "hunter2" not in done.stdout + done.stderr
    assert "APIKEY" not in done.stdout + done.stderr


def test_a_copied_store_beside_the_first(command: Command, data: Path, tmp_path: Path) -> None:
    """A set that is there twice is one set, and a broken copy doesn't break it."""
    identity = command.json("take", str(data))["set_id"]
    store = tmp_path / "place" / ".snapshotter"
    copy = tmp_path / "copy"
    shutil.copytree(store, copy, symlinks=True)
    os.chmod(copy, 0o700)
    (copy / "sets" / identity / "image.json").unlink()
    other = tmp_path / "place2" / "node"
    other.mkdir(parents=True)
    (other / "file").write_text("")
    command.json("take", str(other), "-o", f"store={copy}")  # now it is known
    (found,) = command.json("list", str(data))["sets"]
    assert (found["state"], len(found["snapshots"])) == ("ready", 1)
