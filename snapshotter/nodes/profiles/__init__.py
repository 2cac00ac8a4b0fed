"""What kind of software a node runs: one TOML file per kind, read as a `Profile`. Must not know the config or verbs.

Paths in a profile are relative to the data path; all but `extra_roots` may be globs (`*`, `?`, `[]`, not across `/`).
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from typing import Literal

from msgspec import Struct

from snapshotter.core.errors import PreconditionError, UsageError
from snapshotter.nodes.config import NODE_NAME, decode

FALLBACK = "generic"


class Detect(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sign: every path or glob of `all` is there. The highest score of the signs seen counts."""

    all: tuple[str, ...]
    score: int


class HotSafety(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a snapshot of the running node is worth, why, and who says so."""

    safety: Literal["hot-safe", "crash-recovers", "contested", "stop-required", "unknown"]
    reason: str
    source: str


class Health(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to ask the node: `rpc` is the usual JSON-RPC address, the others are HTTP paths on it."""

    rpc: str | None = None
    liveness: str | None = None
    readiness: str | None = None
    p2p_port: int | None = None


class Warned(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that the operator of this software should know. `before`: only of versions older than this."""

    text: str
    source: str
    before: str | None = None


class NodeKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file that holds the node's key, and how (`nodes.identity` reads it)."""

    path: str
    format: Literal["secp256k1-hex", "cometbft"]


class Version(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the software notes its version in its data: a JSON file, and the key in it."""

    file: str
    key: str


class Profile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of node software."""

    name: str
    title: str
    hot_safety: HotSafety
    detect: tuple[Detect, ...] = ()
    database: tuple[str, ...] = ()  # restored as one unit, together with `metadata`
    no_database: tuple[str, ...] = ()  # those of `database` that need hold no database: journals, dumps
    metadata: tuple[str, ...] = ()  # beside the database; it can't be opened without them
    identity: tuple[str, ...] = ()  # the node key and what derives from it
    node_key: NodeKey | None = None  # None: what it holds can't be read as a key
    sign_state: tuple[str, ...] = ()  # must never go back in time
    # How `nodes.sign_state` reads it. Opaque: two that differ can't be ordered, and a restore refuses.
    sign_state_format: Literal["cometbft", "slashing-protection", "opaque"] = "opaque"
    secrets: tuple[str, ...] = ()  # restored with mode 0600 (a directory: all in it), withheld from a writable clone
    config: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()  # stale in an image: removed on restore
    caches: tuple[str, ...] = ()  # rebuilt by the node itself
    extra_roots: tuple[
        str, ...
    ] = ()  # directories elsewhere that belong to it, if there: absolute, or from the data path
    option_files: tuple[str, ...] = ()  # the database's own options, by file name: they may name directories
    version: Version | None = None
    health: Health = Health()
    warnings: tuple[Warned, ...] = ()


def load_all(extra_directory: str | None = None) -> dict[str, Profile]:
    """Every profile by its name. `extra_directory` (may be missing) holds the user's own *.toml; a built-in's
    namesake takes its place. Raises UsageError for a wrong file, PreconditionError for one that can't be read."""
    found = [_decode(content, name) for name, content in _built_in()]
    return {profile.name: profile for profile in found} | _own(extra_directory)


def _own(directory: str | None) -> dict[str, Profile]:
    found: dict[str, Profile] = {}
    try:
        names = sorted(os.listdir(directory)) if directory else []
    except (FileNotFoundError, NotADirectoryError):
        return found
    except OSError as error:
        raise PreconditionError(f"can't read the profiles: {error.strerror}", object=directory or "") from None
    for path in (f"{directory}/{name}" for name in names if name.endswith(".toml")):
        try:
            with open(path, "rb") as file:
                profile = _decode(file.read(), path)
        except OSError as error:
            raise PreconditionError(f"can't read the profile: {error.strerror}", object=path) from None
        found[profile.name] = profile
    return found


def _built_in(wanted: str = "*") -> list[tuple[str, bytes]]:
    """(file name, content) of our own: each is called as its profile. importlib.resources is slow to import, and only a
    zip needs it."""
    here = os.path.dirname(__file__)
    if os.path.isdir(here):
        found = []
        for name in sorted(glob.glob(f"{wanted}.toml", root_dir=here)):
            with open(os.path.join(here, name), "rb") as file:
                found.append((name, file.read()))
        return found
    from importlib.resources import files

    entries = sorted(files(__name__).iterdir(), key=lambda entry: entry.name)
    return [(each.name, each.read_bytes()) for each in entries if fnmatch.fnmatchcase(each.name, f"{wanted}.toml")]


def _decode(content: bytes, source: str) -> Profile:
    import tomllib

    try:
        raw = tomllib.loads(content.decode())
    except ValueError as error:  # of UTF-8 or of TOML
        raise UsageError(f"{source}: not TOML: {error}", object=source) from None
    profile = decode(raw, Profile, "", source)
    if not NODE_NAME.fullmatch(profile.name):
        raise UsageError(f"{source}: {profile.name!r} can't be a profile's name", object=source)
    inside = (
        *(path for sign in profile.detect for path in sign.all),
        *profile.database,
        *profile.metadata,
        *profile.identity,
        *profile.sign_state,
        *profile.secrets,
        *profile.config,
        *profile.runtime,
        *profile.caches,
        *([profile.node_key.path] if profile.node_key else []),
        *([profile.version.file] if profile.version else []),
    )
    for path in inside:
        # A restore removes what `runtime` names: it must never reach outside the data path, nor be all of it.
        if not path or path.startswith("/") or not {"..", ".", ""}.isdisjoint(path.rstrip("/").split("/")):
            raise UsageError(f"{source}: {path!r} isn't a path inside the data path", object=source)
    for path in set(profile.no_database) - set(profile.database):
        raise UsageError(f"{source}: {path!r} of `no_database` isn't in `database` too", object=source)
    for kept in (*profile.identity, *profile.sign_state):
        for path in (*profile.database, *profile.metadata, *profile.runtime, *profile.caches):
            # Each of those is removed by some restore, and neither of these may ever be.
            if _holds(path, kept):
                raise UsageError(f"{source}: {path!r} holds {kept!r}, which must outlive it", object=source)
    return profile


def _holds(pattern: str, inner: str) -> bool:
    """Whether something that `pattern` means may be, or hold, what `inner` means."""
    pairs = zip(pattern.rstrip("/").split("/"), inner.rstrip("/").split("/"), strict=False)
    if pattern.count("/") > inner.rstrip("/").count("/"):
        return False
    return all(fnmatch.fnmatchcase(b, a) or fnmatch.fnmatchcase(a, b) for a, b in pairs)


def get(name: str, extra_directory: str | None = None) -> Profile:
    """The profile called `name`. Raises UsageError naming the nearest."""
    known = _own(extra_directory)
    if name not in known and NODE_NAME.fullmatch(name):  # to read all of ours takes longer than a snapshot
        for file, content in _built_in(name):
            known[name] = _decode(content, file)
    if name not in known:
        known = load_all(extra_directory)
        from difflib import get_close_matches

        near = get_close_matches(name, known, 1)
        cure = f"did you mean {near[0]}?" if near else f"one of: {', '.join(sorted(known))}"
        raise UsageError(f"no profile is called {name!r}", object=name, cure=cure)
    return known[name]


def matches(data_path: str, pattern: str) -> list[str]:
    """What is at `pattern` below `data_path`, sorted: absolute paths. A link counts also where it leads nowhere."""
    found = glob.glob(pattern, root_dir=data_path, include_hidden=True)
    return sorted(os.path.join(data_path, name) for name in found)


def detect(data_path: str, extra_directory: str | None = None) -> tuple[Profile, str]:
    """The profile that the content of `data_path` speaks for, and why, for a person. Nothing known: generic."""
    known = load_all(extra_directory)
    best, best_score, why = known[FALLBACK], 0, "nothing in it speaks for a known kind of node"
    for profile in known.values():
        for sign in profile.detect:
            if sign.score > best_score and all(matches(data_path, pattern) for pattern in sign.all):
                best, best_score, why = profile, sign.score, f"it has {' and '.join(sign.all)}"
    return best, why


def outdated(profile: Profile, data_path: str) -> list[str]:
    """The profile's warnings about versions older than a certain one, where the data says that it is of one."""
    version = version_of(profile, data_path)
    if version is None:
        return []
    return [
        f"{warning.text} (its data is of {version}; {warning.source})"
        for warning in profile.warnings
        if warning.before and _numbers(version) < _numbers(warning.before)
    ]


def version_of(profile: Profile, data_path: str) -> str | None:
    """The version that the data says it was last used with; None if that can't be told."""
    if profile.version is None:
        return None
    from snapshotter.core.labels import loads
    from snapshotter.nodes import files

    try:
        content, _ = files.read(os.path.join(data_path, profile.version.file), 1 << 16)
        said = loads(content)[profile.version.key]
    except (OSError, PreconditionError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return said if isinstance(said, str) and _numbers(said) else None


def _numbers(version: str) -> tuple[int, ...]:
    """25.7.0 of `25.7.0`, `v25.7.0-RC1` or `besu/v25.7.0/linux`; () of what has no version in it."""
    match = re.search(r"\d{1,9}(\.\d{1,9})+", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
