"""The config file: its schema, where it is looked for, and its errors. Must not know providers, profiles or verbs:
a name of one of those is only a string here, checked by whoever loads it.

Precedence is flag > node > type preset > default; a preset is merged below the node's own keys before anything is
decoded, and `keep` is merged key by key, so `keep = {weekly = 4}` on a validator keeps its 7 daily sets too.
Units: durations are seconds, sizes bytes, shares 0..1, times of day minutes after 00:00 UTC.
"""

from __future__ import annotations

import os
import re
from _thread import allocate_lock  # `threading` takes its time to import
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct, ValidationError, convert

from snapshotter.core.errors import PreconditionError, UsageError
from snapshotter.core.model import Grade
from snapshotter.host import places
from snapshotter.nodes.values import EXAMPLES, TEXTUAL, Bytes, Clock, Seconds, Secret, Share

NODE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")
SYSTEM_FILE = "/etc/snapshotter/config.toml"

T = TypeVar("T", bound=Struct)


Argv = tuple[str, ...]
Count = Annotated[int, Meta(ge=0, le=100_000)]
Level = Annotated[int, Meta(ge=0, le=5)]
HowQuiesced = Literal["auto", "none", "freeze", "pause", "stop", "hooks"]
NodeType = Literal["validator", "rpc", "archive"]


class Keep(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Retention: how many sets of each kind of bucket. All zero and no limit: nothing is ever pruned."""

    hourly: Count = 0
    daily: Count = 0
    weekly: Count = 0
    monthly: Count = 0
    yearly: Count = 0
    min: Count = 0
    max_age: Seconds | None = None
    max_space: Bytes | None = None


class Verify(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """To which level, and how often, sets are verified. `every` None: only on request."""

    level: Level = 2
    every: Seconds | None = None


class Hooks(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Commands (one argv each) run around the verbs; empty: none."""

    before_take: Argv = ()
    after_take: Argv = ()
    before_restore: Argv = ()
    after_restore: Argv = ()
    before_prune: Argv = ()
    after_prune: Argv = ()


class Ping(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """URLs that a tick asks for when a take is due, when it is done, when something failed: a watcher elsewhere."""

    start: Secret | None = None
    success: Secret | None = None
    fail: Secret | None = None


class Select(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which volumes, off the host: exactly one of these is given."""

    instance: str | None = None
    volumes: tuple[str, ...] = ()
    tags: dict[str, str] = {}


class Node(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node, presets applied. `path` is as written: use `target.canonical`. None: not given."""

    name: str
    path: str
    profile: str | None = None
    type: NodeType | None = None
    unit: str | None = None
    stop: Argv = ()
    start: Argv = ()
    status: Argv = ()  # exit code 0: runs, 3: stopped
    rpc: str | None = None
    extra_paths: tuple[str, ...] = ()
    key_file: str | None = None
    owner: str | None = None  # user or user:group
    provider: str | None = None
    store: str | None = None
    select: Select | None = None
    options: dict[str, str | int | float | bool] = {}
    quiesce: HowQuiesced = "auto"
    hold: Argv = ()
    release: Argv = ()
    budget: Seconds = Seconds(5)
    require: Grade = Grade.CRASH
    every: Seconds | None = None
    at: Clock | None = None
    floor: Share = Share(0.10)
    keep: Keep = Keep()
    verify: Verify = Verify()
    hooks: Hooks = Hooks()
    timeout: Seconds = Seconds(60)  # of one hook
    notify: tuple[Secret, ...] = ()  # apprise URLs that are told when a tick fails
    ping: Ping = Ping()

    @property
    def stoppable(self) -> bool:
        """Whether the config says how to stop it and start it again."""
        return self.unit is not None or bool(self.stop and self.start)


class Aws(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    region: str | None = None
    profile: str | None = None
    role_arn: str | None = None
    copy_to: tuple[str, ...] = ()  # regions


class Gcp(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    project: str | None = None
    impersonate: str | None = None  # a service account's address
    endpoint: str | None = None  # the API's address, where it isn't the public one


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole config. `source` is the file it came from, None if there was none."""

    state: str
    aws: Aws = Aws()
    gcp: Gcp = Gcp()
    nodes: dict[str, Node] = {}
    source: str | None = None

    @property
    def profiles(self) -> str:
        """Where the user's own profiles are looked for: `profiles` beside the config file. Need not be there."""
        return os.path.join(os.path.dirname(os.path.abspath(self.source or usual_files()[0])), "profiles")


class _Top(Struct, forbid_unknown_fields=True):
    """The file's own shape, for the top level's names and types."""

    state: str | None = None
    aws: dict[str, Any] = {}
    gcp: dict[str, Any] = {}
    node: dict[str, dict[str, Any]] = {}


#: What a type stands for, as if it were written in the node's table (the operators' guide, FACTS).
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "validator": {"every": "24h", "keep": {"daily": 7}},
    "rpc": {"every": "7d", "keep": {"weekly": 4}},
    "archive": {"every": "7d", "keep": {"weekly": 4}},
}
#: Inclusive, in seconds. `budget`: nobody wants writers held for longer, whatever they write.
_RANGES = {
    "budget": (0.01, 600),
    "every": (60, 366 * 86400),
    "timeout": (1, 86400),
    "keep.max_age": (3600, 100 * 366 * 86400),
    "verify.every": (60, 366 * 86400),
}


def usual_files() -> list[str]:
    """Where a config is looked for when none is named, the first that exists. Root has one place only: a config can
    name commands, and under sudo HOME may be another user's."""
    user = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    mine = [f"{user}/snapshotter/config.toml"] if os.geteuid() != 0 and user.startswith("/") else []
    return [*mine, SYSTEM_FILE]


def load(explicit: str | None = None) -> Config:
    """The config: `explicit`, or the first that exists of `usual_files`, or an empty one. Raises UsageError (missing
    though named, wrong), PreconditionError (there, but can't be read: falling through to another file would protect
    other nodes than were asked for)."""
    for path in [explicit] if explicit is not None else usual_files():
        try:
            with open(path, "rb") as file:
                content = file.read()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except IsADirectoryError:
            raise UsageError("is a directory, not a config file", object=path) from None
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            cure = "run as its owner, or mend its permissions"
            raise PreconditionError(f"can't read the config: {why}", object=path, cure=cure) from None
        return parse(content, path)
    if explicit is not None:
        raise UsageError("no such config file", object=explicit, cure="mend --config, or write one with init --write")
    return Config(state=places.state_directory())


def parse(content: bytes | str, source: str) -> Config:
    """A config from its text; `source` names it in errors. Raises UsageError."""
    import tomllib

    try:
        raw = tomllib.loads(content if isinstance(content, str) else content.decode())
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{source}:{line}: not UTF-8", object=source) from None
    except RecursionError:
        raise UsageError(f"{source}: tables nested too deep", object=source) from None
    except tomllib.TOMLDecodeError as error:
        text = content if isinstance(content, str) else content.decode()
        at = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        line = int(at[1]) if at and at[1] else text.rstrip().count("\n") + 1
        said = str(error)[: at.start()] if at else str(error)
        raise UsageError(f"{source}:{line}: not TOML: {said}", object=source) from None
    top = decode(raw, _Top, "", source)
    nodes = {name: _node(name, table, source) for name, table in top.node.items()}
    _refuse_same_path(nodes.values(), source)
    if top.state is not None:
        _absolute(top.state, "state", source)
    return Config(
        state=places.state_directory() if top.state is None else top.state,
        aws=decode(top.aws, Aws, "aws", source),
        gcp=decode(top.gcp, Gcp, "gcp", source),
        nodes=nodes,
        source=source,
    )


def make_node(name: str, table: Mapping[str, Any], source: str) -> Node:
    """A node from its name and table, as if they were in a file. Raises UsageError."""
    return _node(name, dict(table), source)


def with_preset(table: Mapping[str, Any]) -> dict[str, Any]:
    """A node's raw table over its type's preset; `keep` is merged key by key."""
    kind = table.get("type")
    preset = PRESETS.get(kind, {}) if isinstance(kind, str) else {}
    merged = {**preset, **table}
    if isinstance(keep := table.get("keep"), dict):
        merged["keep"] = {**preset.get("keep", {}), **keep}
    return merged


#: Keys that once were, and that nothing ever read: a config with them stays good.
_NO_MORE = ("genesis", "config_files")


def _node(name: str, table: dict[str, Any], source: str) -> Node:
    where = f"node.{name}"
    table = {key: value for key, value in table.items() if key not in _NO_MORE}
    if not NODE_NAME.fullmatch(name):
        raise UsageError(
            f"{source}: {where}: {name!r} can't be a node's name",
            object=where,
            cure="use up to 32 of a-z 0-9 _ . - beginning with a letter or digit",
        )
    if "name" in table:
        raise UsageError(f"{source}: {where} has no key name", object=where, cure="the table's header is its name")
    node = decode({**with_preset(table), "name": name}, Node, where, source)
    _check(node, where, source)
    return node


def _check(node: Node, where: str, source: str) -> None:
    """What types can't say: absolute paths, ranges, keys that contradict one another. Raises UsageError."""

    def refuse(why: str, cure: str = "") -> UsageError:
        return UsageError(f"{source}: {where}: {why}", object=where, cure=cure)

    one_path = {key: getattr(node, key) for key in ("path", "key_file", "store")}
    for key, path in one_path.items():
        if path is not None:
            _absolute(path, f"{where}.{key}", source)
    for path in node.extra_paths:
        _absolute(path, f"{where}.extra_paths", source)
    for key, (least, most) in _RANGES.items():
        value: Any = node
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None and not least <= value <= most:
            allowed = f"{Seconds(least).text()} to {Seconds(most).text()}"
            raise refuse(f"{key} = {value.text()} is out of range", f"allowed: {allowed}")
    argvs = {key: getattr(node, key) for key in ("stop", "start", "status", "hold", "release")}
    argvs |= {f"hooks.{key}": getattr(node.hooks, key) for key in Hooks.__struct_fields__}
    for key, argv in argvs.items():
        if (argv and not argv[0]) or any("\0" in word for word in argv):
            raise refuse(f"{key} is no command", 'write it as a list: ["docker", "stop", "node"]')
    if node.verify.level == 5:
        raise refuse("verify.level = 5 (the node boots) can't be had yet", "verify = {level = 4}")
    if node.unit is not None and not re.fullmatch(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,254}", node.unit):
        raise refuse(f"unit {node.unit!r} can't be a unit's name")
    if node.unit is not None and (node.stop or node.start or node.status):
        raise refuse("unit and stop/start/status contradict one another", "keep either")
    if bool(node.stop) != bool(node.start):
        raise refuse("stop and start go together", f"give {'start' if node.stop else 'stop'} too")
    if bool(node.hold) != bool(node.release):
        raise refuse("hold and release go together", f"give {'release' if node.hold else 'hold'} too")
    if node.quiesce == "hooks" and not node.hold:
        raise refuse("quiesce = hooks needs hold and release")
    if node.quiesce == "stop" and not node.stoppable:
        raise refuse("quiesce = stop needs unit, or stop and start")
    if node.rpc is not None and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", node.rpc):
        # Never the value itself: it may have a password or an API key in it.
        raise refuse("rpc is no http URL", 'write it as "http://127.0.0.1:8545"')
    if node.owner is not None and not re.fullmatch(r"[^:\s]+(:[^:\s]+)?", node.owner):
        raise refuse(f"owner {node.owner!r} is no user or user:group")
    if node.select is not None and sum(map(bool, (node.select.instance, node.select.volumes, node.select.tags))) != 1:
        raise refuse("select takes exactly one of instance, volumes, tags")


def _absolute(path: str, where: str, source: str) -> None:
    if not path.startswith("/") or "\0" in path:
        cure = "write the whole path, without ~" if path.startswith("~") else "write the whole path, from /"
        raise UsageError(f"{source}: {where} = {path!r} isn't an absolute path", object=where, cure=cure)


def _refuse_same_path(nodes: Iterable[Node], source: str) -> None:
    seen: dict[str, str] = {}
    for node in nodes:
        canonical = os.path.realpath(node.path)
        if other := seen.get(canonical):
            raise UsageError(
                f"{source}: node.{other} and node.{node.name} have the same path {canonical}",
                object=f"node.{node.name}",
                cure="keep one of them",
            )
        seen[canonical] = node.name


# Decoding, with errors that an operator understands. What runs only on an error imports what it needs there.

_ONE_AT_A_TIME = allocate_lock()
_FOUND = {"int": "an integer", "str": "a string", "float": "a number", "bool": "true or false", "array": "a list"}
_FOUND |= {"object": "a table", "datetime": "a date and time", "date": "a date", "time": "a time without quotes"}


def _from_text(kind: type, value: object) -> object:
    """msgspec's hook for our own types. A ValueError comes back as a ValidationError with the key's place."""
    if kind not in TEXTUAL:
        raise NotImplementedError(kind)
    if not isinstance(value, str):
        names = {int: "int", float: "float", bool: "bool", list: "array", dict: "object"}
        found = _FOUND.get(names.get(type(value), type(value).__name__), "something else")
        raise ValueError(f'expected a string such as "{EXAMPLES[kind]}", found {found}')
    return kind.parse(value)


def decode(raw: object, kind: type[T], where: str, source: str) -> T:
    """`raw` (as tomllib gives it) as a `kind`. `where` is its place in the file, `source` the file's name. Raises
    UsageError: an unknown key with the nearest known one, a wrong type with what was expected and found."""
    try:
        # msgspec (0.22) learns a type when it first meets it, and crashes in another thread that comes meanwhile.
        with _ONE_AT_A_TIME:
            return convert(raw, kind, dec_hook=_from_text)
    except ValidationError as error:
        raise _explained(str(error), kind, where, source) from None


def _explained(said: str, kind: type[Struct], where: str, source: str) -> UsageError:
    """msgspec's words as ours. They look like ``Expected `int`, got `str` - at `$.keep.daily` ``."""
    said, _, place = said.partition(" - at `$")
    place = place.rstrip("`").replace("[...]", ".*")
    steps = [step for step in place.split(".") if step]
    full = ".".join([*([where] if where else []), *steps])
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", said, re.DOTALL):
        shown = f"{full}.{match[1]}" if full else match[1]
        return UsageError(f"{source}: unknown key {shown}", object=shown, cure=_nearest_key(match[1], kind, steps))
    if match := re.fullmatch(r"Object missing required field `(.*)`", said):
        return UsageError(f"{source}: {full}: the key {match[1]} is missing", object=full, cure=f"add {match[1]} = ...")
    if match := re.fullmatch(r"Invalid enum value (.*)", said, re.DOTALL):
        values = _choices(kind, steps)
        near = _near(match[1].strip("'"), values)
        cure = f"did you mean {near}?" if near else f"one of: {', '.join(values)}"
        return UsageError(f"{source}: {full}: {match[1]} is not allowed", object=full, cure=cure)
    if match := re.fullmatch(r"Expected (.*), got `(.*)`", said):
        names = [_FOUND.get(name, name) for name in re.findall(r"\w+", match[1]) if name != "null"]
        found = _FOUND.get(match[2], match[2])
        cure = "write [node.NAME] above the node's keys" if steps[:1] == ["node"] and not where else ""
        said = f"expected {' or '.join(names)}, found {found}"
        return UsageError(f"{source}: {full}: {said}", object=full, cure=cure)
    if match := re.fullmatch(r"Expected `\w+` (>=|<=) (\d+)", said):
        said = f"must be {'at least' if match[1] == '>=' else 'at most'} {match[2]}"
    return UsageError(f"{source}: {full}: {said}", object=full)


def _hint_at(kind: Any, steps: list[str]) -> Any:
    """The type hint of the place that `steps` lead to below the struct `kind`."""
    from typing import get_args, get_type_hints

    for step in steps:
        if not (isinstance(kind, type) and issubclass(kind, Struct)):
            kind = next((arg for arg in get_args(kind) if isinstance(arg, type) and issubclass(arg, Struct)), None)
        if kind is None:
            return None
        kind = get_type_hints(kind).get(re.sub(r"\.\*|\[\d+\]", "", step))
    return kind


def _structs_in(hint: Any) -> list[type[Struct]]:
    from typing import get_args

    candidates = [hint, *get_args(hint)]
    return [each for each in candidates if isinstance(each, type) and issubclass(each, Struct)]


def _choices(kind: type[Struct], steps: list[str]) -> list[str]:
    from enum import Enum
    from typing import get_args

    hint = _hint_at(kind, steps)
    values: list[str] = []
    for each in [hint, *get_args(hint)]:
        if isinstance(each, type) and issubclass(each, Enum):
            values += [str(member.value) for member in each]
        else:
            values += [value for value in [each, *get_args(each)] if isinstance(value, str)]
    return list(dict.fromkeys(values))


def _near(word: str, known: Iterable[str]) -> str | None:
    from difflib import get_close_matches

    found = get_close_matches(word, list(known), 1)
    return found[0] if found else None


def _nearest_key(key: str, kind: type[Struct], steps: list[str]) -> str:
    """The cure for an unknown key: the nearest one here, else the same one in a table below, else all of them."""
    structs = _structs_in(_hint_at(kind, steps))
    if not structs:
        return ""
    known = [name for name in structs[0].__struct_fields__ if not (structs[0] is Node and name == "name")]
    if near := _near(key, known):
        return f"did you mean {near}?"
    for name in known:
        for inner in _structs_in(_hint_at(structs[0], [name])):
            if near := _near(key, inner.__struct_fields__):
                return f"did you mean {name}.{near}?"
    return f"known here: {', '.join(known)}"


# Writing one node's table.


def to_toml(node: Node) -> str:
    """The node's table as TOML, for `init`: only what its type's preset and the defaults don't already say, so that
    `parse` gives the same node back. Raises UsageError for text that TOML can't hold (a path that isn't UTF-8)."""
    given = {"path": node.path} | ({"type": node.type} if node.type else {})
    base = decode({**with_preset(given), "name": node.name}, Node, f"node.{node.name}", "")
    lines = [f"[node.{_key(node.name)}]", f"path = {_value(node.path)}"]
    for field in Node.__struct_fields__:
        value, usual = getattr(node, field), getattr(base, field)
        if field == "type" and value is not None:
            lines.append(f"type = {_value(value)}")
        elif field not in ("name", "path") and value != usual and value is not None:
            lines.append(f"{field} = {_value(value, usual)}")
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: object, usual: object = None) -> str:
    if isinstance(value, TEXTUAL):
        return f'"{value.text()}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError("not UTF-8, so no TOML file can hold it", object=ascii(text)) from None
        text = text.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\u{ord(match[0]):04X}", text) + '"'
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, Struct):
        fields = {field: getattr(value, field) for field in value.__struct_fields__}
        inner = {k: v for k, v in fields.items() if v is not None and (usual is None or v != getattr(usual, k))}
        if usual is None:
            inner = {k: v for k, v in inner.items() if v not in ((), {})}
        value = inner
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"no TOML for {value!r}")
