"""The config: what is accepted, what is refused and in which words, and the way back to TOML."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.core.errors import PreconditionError, UsageError
from snapshotter.core.model import Grade
from snapshotter.nodes import config as config_module
from snapshotter.nodes.config import Config, Node, load, parse, to_toml
from snapshotter.nodes.values import Bytes, Clock, Seconds, Share
from tests.support import CHECKOUT

EVERY_KEY = """
state = "/srv/state"
[aws]
region = "eu-central-1"
profile = "p"
role_arn = "arn:aws:iam::1:role/x"
copy_to = ["eu-west-1"]
[gcp]
project = "proj"
impersonate = "sa@proj.iam.gserviceaccount.com"
[node.validator-1]
path = "/var/lib/kalychain"
profile = "besu"
type = "validator"
unit = "kalychain.service"
rpc = "http://127.0.0.1:8545"
extra_paths = ["/fast/wal"]
key_file = "/etc/besu/key"
owner = "besu:besu"
provider = "copy"
store = "/backup"
select = {volumes = ["vol-1"]}
options = {snapshot_size = "10GB", retries = 3, fast = true}
quiesce = "hooks"
hold = ["/bin/hold", "now"]
release = ["/bin/release"]
budget = "250ms"
require = "filesystem"
every = "12h"
at = "02:30"
floor = "12.5%"
keep = {hourly = 1, daily = 2, weekly = 3, monthly = 4, yearly = 5, min = 6, max_age = "365d", max_space = "500GB"}
verify = {level = 3, every = "7d"}
timeout = "2m"
notify = ["env:TELEGRAM_URL"]
ping = {success = "file:/etc/snapshotter/ping"}
[node.validator-1.hooks]
before_take = ["/bin/a"]
after_take = ["/bin/b", "x"]
before_restore = []
after_restore = ["/c"]
before_prune = ["/d"]
after_prune = ["/e"]
[node.other]
path = "/other"
stop = ["docker", "stop", "x"]
start = ["docker", "start", "x"]
status = ["/bin/is-running"]
"""


def node_of(body: str, head: str = '[node.a]\npath = "/data"\n') -> Node:
    return parse(head + body, "f.toml").nodes["a"]


def refused(body: str, head: str = '[node.a]\npath = "/data"\n') -> str:
    with pytest.raises(UsageError) as caught:
        parse(head + body, "f.toml")
    line = caught.value.line()
    assert "\n" not in line and "f.toml" in line
    return line


def test_every_key_of_the_design() -> None:
    found = parse(EVERY_KEY, "f.toml")
    node, other = found.nodes["validator-1"], found.nodes["other"]
    assert (found.state, found.aws.copy_to, found.gcp.project) == ("/srv/state", ("eu-west-1",), "proj")
    assert (node.every, node.budget, node.timeout, node.verify.every) == (43200, 0.25, 120, 7 * 86400)
    assert (node.at, node.floor, node.require) == (150, 0.125, Grade.FILESYSTEM)
    assert (node.keep.max_age, node.keep.max_space, node.keep.yearly) == (365 * 86400, 500 * 10**9, 5)
    assert node.hooks.after_take == ("/bin/b", "x") and node.hooks.before_restore == ()
    assert node.select is not None and node.select.volumes == ("vol-1",)
    assert dict(node.options) == {"snapshot_size": "10GB", "retries": 3, "fast": True}
    assert node.stoppable and other.stoppable and other.stop == ("docker", "stop", "x")
    # All keys of the schema are in the example above, so none is untested.
    given_keys = set(Node.__struct_fields__) - {"name", "stop", "start", "status", "hooks"}
    assert all(f"\n{key} = " in EVERY_KEY for key in given_keys)


def test_defaults_and_presets() -> None:
    assert (node_of("").every, node_of("").keep, node_of("").quiesce) == (None, config_module.Keep(), "auto")
    assert (node_of("").floor, node_of("").budget, node_of("").require) == (0.10, 5, Grade.CRASH)
    validator = node_of('type = "validator"')
    assert (validator.every, validator.keep.daily, validator.keep.weekly) == (86400, 7, 0)
    for kind in ("rpc", "archive"):
        found = node_of(f'type = "{kind}"')
        assert (found.every, found.keep.daily, found.keep.weekly) == (7 * 86400, 0, 4)
    mine = node_of('type = "validator"\nevery = "6h"\nkeep = {weekly = 4}')
    assert (mine.every, mine.keep.daily, mine.keep.weekly) == (6 * 3600, 7, 4)
    assert node_of('type = "validator"\nkeep = {daily = 0, hourly = 5}').keep.daily == 0


@pytest.mark.parametrize(
    "body",
    [
        'rpc = "127.0.0.1/v3/hunter2"',
        'rpc = "ws://admin:hunter2@127.0.0.1:8545"',
        'rpc = "https://admin:hunter2@127.0.0.1 :8545"',
        'ping = {fail = "https://hc-ping.com/hunter2"}',
        'ping = "https://hc-ping.com/hunter2"',
        'ping = {fail = ["https://hc-ping.com/hunter2"]}',
        'notify = ["tgram://hunter2/1"]',
        'notify = "tgram://hunter2/1"',
        'hooks = {before_take = "curl https://hunter2@x"}',
        'hooks = {before_take = ["", "https://hunter2@x"]}',
    ],
)
def test_what_may_hold_a_password_is_in_no_error(body: str) -> None:
    assert "hunter2" not in refused(body)


def test_keys_that_nothing_read_stop_nobody() -> None:
    """The manual named them once."""
    text = '[node.a]\npath = "/a"\ngenesis = "/etc/besu/genesis.json"\nconfig_files = []\n'
    assert parse(text, "x").nodes["a"].path == "/a"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("pth = 1", ["node.a.pth", "path"]),
        ("dayly = 1", ["node.a.dayly", "keep.daily"]),
        ("keep = {dayly = 1}", ["node.a.keep.dayly", "daily"]),
        ('hooks = {before_tak = ["x"]}', ["node.a.hooks.before_tak", "before_take"]),
        ("select = {tag = {}}", ["node.a.select.tag", "tags"]),
        ('name = "b"', ["node.a", "name"]),
        ("profile = 3", ["node.a.profile", "a string", "an integer"]),
        ('keep = {daily = "7"}', ["node.a.keep.daily", "an integer", "a string"]),
        ("keep = {daily = true}", ["node.a.keep.daily", "an integer", "true or false"]),
        ("keep = 3", ["node.a.keep", "a table", "an integer"]),
        ("keep = {daily = -1}", ["node.a.keep.daily", "at least 0"]),
        ("verify = {level = 6}", ["node.a.verify.level", "at most 5"]),
        ("verify = {level = 5}", ["node.a", "can't be had yet", "verify = {level = 4}"]),
        ('stop = "docker stop"', ["node.a.stop", "a list", "a string"]),
        ('stop = ["x", 1]\nstart = ["x"]', ["node.a.stop[1]", "a string", "an integer"]),
        ('stop = [""]\nstart = ["x"]', ["stop", "no command"]),
        ("budget = 5", ["node.a.budget", "a string such as", "an integer"]),
        ("at = 02:00:00", ["node.a.at", "02:00", "without quotes"]),
        ('budget = "5"', ["node.a.budget", "'5'", "5s"]),
        ('budget = "-5s"', ["node.a.budget"]),
        ('budget = "11m"', ["budget", "11m", "10ms to 10m"]),
        ('every = "5s"', ["every", "range"]),
        ('keep = {max_age = "5m"}', ["keep.max_age", "range"]),
        ('keep = {max_space = "5 apples"}', ["node.a.keep.max_space", "500GB"]),
        ('floor = "100%"', ["node.a.floor", "100%"]),
        ('floor = "0.1"', ["node.a.floor", "10%"]),
        ('at = "24:00"', ["node.a.at", "24:00"]),
        ('at = "2:00"', ["node.a.at", "02:00"]),
        ('type = "validater"', ["node.a.type", "validator"]),
        ('quiesce = "frieze"', ["node.a.quiesce", "freeze"]),
        ('require = "best"', ["node.a.require", "crash"]),
        ('store = "backup"', ["node.a.store", "absolute"]),
        ('extra_paths = ["~/x"]', ["node.a.extra_paths", "without ~"]),
        ('unit = "x.service"\nstop = ["a"]\nstart = ["b"]', ["unit", "contradict"]),
        ('stop = ["a"]', ["stop and start", "give start"]),
        ('start = ["a"]', ["give stop"]),
        ('quiesce = "hooks"', ["hold and release"]),
        ('hold = ["a"]', ["give release"]),
        ('quiesce = "stop"', ["needs unit"]),
        ('unit = "--now"', ["unit"]),
        ('rpc = "8545"', ["rpc", "http://127.0.0.1:8545"]),
        ('owner = "a:b:c"', ["owner"]),
        ("select = {}", ["exactly one"]),
        ('select = {instance = "i", volumes = ["v"]}', ["exactly one"]),
        ("options = {x = [1]}", ["node.a.options"]),
        ('[node.b]\npath = "/data/../data"', ["node.a", "node.b", "/data"]),
        ('[node.B]\npath = "/b"', ["node.B", "a-z"]),
        (f'[node.{"b" * 33}]\npath = "/b"', ["32"]),
        ('[nodes.b]\npath = "/b"', ["nodes", "did you mean node?"]),
        ('[aws]\nregio = "x"', ["aws.regio", "region"]),
        ("[gcp]\nproject = 1", ["gcp.project", "a string"]),
        ("[node.b]", ["node.b", "path", "missing"]),
        ("x = [\n", ["f.toml:3: not TOML"]),
        ("keep = {}\nkeep = {}", ["f.toml:4"]),
        ("x = 1 2", ["f.toml:3"]),
    ],
)
def test_what_is_refused_and_how(body: str, words: list[str]) -> None:
    line = refused(body)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('path = "/x"\n', ["path"]),
        ('[node]\npath = "/x"\n', ["[node.NAME]"]),
        ("node = 3", ["node"]),
        ("stat = 3", ["did you mean state"]),
        ('state = "x"', ["state", "absolute"]),
        ('[node.a]\npath = "~/x"', ["node.a.path", "without ~"]),
        ('[node.a]\npath = ""', ["node.a.path"]),
        ("a = " + "[" * 5000, ["f.toml"]),
    ],
)
def test_what_is_refused_at_the_top(text: str, words: list[str]) -> None:
    line = refused("", text)
    assert all(word in line for word in words), line


def test_a_link_to_anothers_path_is_the_same_path(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "data", tmp_path / "link")
    text = f'[node.a]\npath = "{tmp_path}/data"\n[node.b]\npath = "{tmp_path}/link"\n'
    with pytest.raises(UsageError, match=r"node\.a and node\.b have the same path"):
        parse(text, "f.toml")


# Where it is looked for.


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(config_module, "SYSTEM_FILE", str(tmp_path / "etc/config.toml"))
    for directory in ("xdg/snapshotter", "home/.config/snapshotter", "etc"):
        (tmp_path / directory).mkdir(parents=True)
    return tmp_path


def test_the_first_that_exists(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load() == Config(state=load().state)
    places = {name: home / f"{name}/config.toml" for name in ("etc", "xdg/snapshotter", "home/.config/snapshotter")}
    explicit = home / "mine.toml"
    places["etc"].write_text('state = "/etc-one"')
    assert (load().state, load().source) == ("/etc-one", str(places["etc"]))
    places["xdg/snapshotter"].write_text('state = "/xdg-one"')
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert load().state == "/etc-one", "root has one place: under sudo HOME may be another user's"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert load().state == "/xdg-one"
    explicit.write_text('state = "/explicit-one"')
    assert load(str(explicit)).state == "/explicit-one"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    places["home/.config/snapshotter"].write_text('state = "/home-one"')
    assert load().state == "/home-one"


def test_a_named_file_that_is_no_config(home: Path) -> None:
    with pytest.raises(UsageError, match="no such config file"):
        load(str(home / "missing.toml"))
    with pytest.raises(UsageError, match="directory"):
        load(str(home))
    (home / "latin.toml").write_bytes(b'\n# caf\xe9\nstate = "/x"\n')
    with pytest.raises(UsageError, match=r"latin\.toml:2: not UTF-8"):
        load(str(home / "latin.toml"))
    with pytest.raises(PreconditionError):
        load("a\0b")


def test_one_that_cant_be_read_is_no_reason_to_take_the_next(home: Path) -> None:
    (home / "xdg/snapshotter/config.toml").write_text('state = "/mine"')
    (home / "etc/config.toml").write_text('state = "/not-mine"')
    code = f"""
from snapshotter.nodes import config
config.SYSTEM_FILE = {str(home / "etc/config.toml")!r}
try:
    print(config.load().state)
except config.PreconditionError as error:
    print(error.line())
"""
    argv = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *argv]
    for above in (home, *home.parents):
        if above.stat().st_uid == os.geteuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o055)

    def ask() -> str:
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    assert ask() == "/mine"
    for hidden in (home / "xdg/snapshotter/config.toml", home / "xdg/snapshotter"):
        hidden.chmod(0)
        assert "can't read the config: Permission denied" in ask()
        hidden.chmod(0o755)


def test_import_is_cheap() -> None:
    code = "import sys, snapshotter.nodes.config; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"tomllib", "difflib", "click", "rich", "subprocess", "urllib.request"} & set(modules.split())


# The way back.


@given(st.integers(0, 10**9 - 1), st.sampled_from(["ms", "s", "m", "h", "d", "w"]))
def test_durations_round_trip(count: int, unit: str) -> None:
    value = Seconds.parse(f"{count}{unit}")
    if count <= 10**5:
        assert Seconds.parse(value.text()) == value


@given(st.integers(0, 10**18 - 1))
def test_other_values_round_trip(number: int) -> None:
    assert Bytes.parse(Bytes(number).text()) == number
    assert Clock.parse(Clock(number % 1440).text()) == number % 1440
    share = Share.parse(f"{number % 100}.{number % 97:02d}%")
    assert Share.parse(share.text()) == share


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
_PATH = _TEXT.map("/".__add__)
_ARGV = st.lists(_TEXT, max_size=3).map(lambda rest: ["/bin/x", *rest])
_DURATION = st.integers(1, 300).map(lambda count: f"{count}m")
_KEYS: dict[str, st.SearchStrategy[Any]] = {
    "profile": _TEXT,
    "type": st.sampled_from(["validator", "rpc", "archive"]),
    "unit": st.sampled_from(["a.service", "a@b\\x2d.service"]),
    "rpc": st.just("http://127.0.0.1:8545/a?b"),
    "extra_paths": st.lists(_PATH, max_size=2),
    "key_file": _PATH,
    "owner": st.sampled_from(["besu", "besu:besu", "1000:1000"]),
    "provider": _TEXT,
    "store": _PATH,
    "select": st.one_of(
        st.fixed_dictionaries({"instance": _TEXT.filter(bool)}),
        st.fixed_dictionaries({"tags": st.dictionaries(_TEXT, _TEXT, min_size=1, max_size=2)}),
    ),
    "options": st.dictionaries(
        _TEXT, st.one_of(_TEXT, st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False)), max_size=3
    ),
    "quiesce": st.sampled_from(["auto", "none", "freeze", "pause"]),
    "budget": st.sampled_from(["250ms", "5s", "9m"]),
    "require": st.sampled_from([*Grade]).map(str),
    "every": _DURATION,
    "at": st.sampled_from(["00:00", "23:59", "02:00"]),
    "floor": st.sampled_from(["0%", "10%", "12.5%", "7.07%", "99.99%"]),
    "keep": st.fixed_dictionaries(
        {},
        optional={
            "daily": st.integers(0, 9),
            "weekly": st.integers(0, 9),
            "max_age": st.just("90d"),
            "max_space": st.sampled_from(["0B", "5GB", "5GiB", "1B"]),
        },
    ),
    "verify": st.fixed_dictionaries({}, optional={"level": st.integers(0, 4), "every": _DURATION}),
    "hooks": st.fixed_dictionaries({}, optional={"before_take": _ARGV, "after_prune": _ARGV}),
    "timeout": _DURATION,
}


@settings(max_examples=300, deadline=None)
@given(st.from_regex(config_module.NODE_NAME, fullmatch=True), _PATH, st.fixed_dictionaries({}, optional=_KEYS))
def test_a_node_written_is_the_node_read(name: str, path: str, keys: dict[str, Any]) -> None:
    node = config_module._node(name, {"path": path, **keys}, "f.toml")
    text = to_toml(node)
    assert parse(text, "f.toml").nodes == {name: node}
    written = {line.split(" = ")[0] for line in text.rstrip("\n").split("\n")[1:]}
    assert written <= {"path", *keys}, "only what was given is written"


def test_what_toml_cant_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        to_toml(Node(name="n", path=os.fsdecode(b"/\xff")))


LEARNT_AT_ONCE = """
import sys, threading, time
from msgspec import defstruct
from snapshotter.nodes.config import decode

sys.setswitchinterval(1e-6)
end = time.monotonic() + 3
while time.monotonic() < end:
    inner = defstruct("Inner", [(f"i{k}", int, 0) for k in range(20)], frozen=True)
    middle = defstruct("Middle", [(f"m{k}", inner, inner()) for k in range(3)], frozen=True)
    outer = defstruct("Outer", [(f"o{k}", middle, middle()) for k in range(3)], frozen=True)
    go = threading.Event()

    def act():
        while not go.is_set():
            pass
        decode({"o0": {"m0": {"i1": 1}}, "o2": {"m2": {"i3": 4}}}, outer, "", "test")

    threads = [threading.Thread(target=act) for _ in range(8)]
    for each in threads:
        each.start()
    go.set()
    for each in threads:
        each.join()
"""


def test_many_threads_may_decode_what_none_has_decoded_before() -> None:
    """A fleet's do. msgspec by itself crashes: another thread meets a type that is being learnt."""
    done = subprocess.run([sys.executable, "-c", LEARNT_AT_ONCE], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, (done.returncode, done.stderr[-1000:])
