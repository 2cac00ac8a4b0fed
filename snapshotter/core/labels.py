"""What we write on the storage's own objects: the birth record and the marks. One codec for every store.

The labels of all members together are the catalog; there is no other database. Must know no store: a driver
declares its store's limits (`LabelLimits`) and calls `pack` and `unpack`.

The record is compact JSON of at most 560 bytes, so that it fits every store known (an LVM tag takes 1024 characters,
an EC2 tag value 256, a GCE description 2048). A path that has no room is replaced by a hash, `paths_known` is
then False, and a restore in place must be told the path.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from snapshotter.core.digest import sha256
from snapshotter.core.errors import PreconditionError
from snapshotter.core.model import SET_ID, Birth, Member, Root

SCHEMA = 1
#: Names and paths that begin as the first one does are written as `[characters in common, the rest]`: in use only for
#: a record that would be too long otherwise, as a snapshotter that knows nothing of it must not misread it.
FOLDED = 2
MAX_RECORD_BYTES = 560
PREFIX = "snapshotter"

#: The only mutable labels. Values are of `[a-z0-9_-]`, at most 63 (a GCE label takes no more).
MARK_NAMES = frozenset(
    {
        "sealed",
        "grade",
        "quiesce",
        "freeze-ms",
        "skew-ms",
        "height",
        "block",
        "pinned",
        "verify-level",
        "verify-at",
        "verify-outcome",
        "secrets",
    }
)
MARK_VALUE = re.compile(r"[a-z0-9_-]{1,63}")


class LabelLimits(Struct, frozen=True):
    """What one store's labels take. `value_pattern` is a regex that every value must match in full; a record that
    doesn't is written as base64url, in chunks of `max_value` characters, at most `max_chunks` of them."""

    max_value: int = 8191
    max_chunks: int = 1
    value_pattern: str = r"(?s).*"


def encode_birth(birth: Birth) -> str:
    """The record as compact JSON. One that would be longer than 560 bytes has volumes and paths told by what they don't
    have in common with the first (datasets of one pool do); if that isn't enough, paths become hashes, longest first
    and the data path last. Raises PreconditionError if even that is too long."""
    roots = [_fold(root, birth.members[root.member].volume) for root in birth.roots]
    record: dict[str, Any] = {
        "v": SCHEMA,
        "s": birth.set_id,
        "t": birth.target,
        "n": birth.node,
        "h": birth.host,
        "p": birth.profile,
        "r": roots,
        "m": [[member.provider, member.volume] for member in birth.members],
        "i": birth.member,
        "at": int(birth.taken_at.timestamp()),
        "dl": int(birth.deadline.timestamp()),
    }
    if birth.slot:
        record["sl"] = birth.slot
    if birth.address:
        record["a"] = birth.address
    if not birth.paths_known:
        record["x"] = 1
    # Always shorten as if it were the last member, so that every member's record says the same.
    widest = len(str(max(0, len(birth.members) - 1))) - len(str(birth.member))
    if len(_dump(record)) + widest > MAX_RECORD_BYTES:
        _fold_names(record, birth)
    while len(text := _dump(record)) + widest > MAX_RECORD_BYTES:
        longest = max(range(len(roots)), key=lambda k: (k > 0 and _weight(roots[k]) > 0, _weight(roots[k]), k))
        if _weight(roots[longest]) == 0:
            raise PreconditionError(
                f"the birth record would be longer than {MAX_RECORD_BYTES} bytes",
                object=birth.node,
                cure="give the node a shorter name, or fewer volumes",
            )
        # Without the data path nothing tells what begins as it does.
        for k in range(len(roots)) if longest == 0 else [longest]:
            roots[k][1:] = [_hashed(birth.roots[k].path), birth.roots[k].inside]
        record["x"] = 1
    return text


def loads(text: str | bytes) -> Any:
    """JSON, quickly: a catalog is tens of thousands of small documents. Raises ValueError."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError):
        import json

        return json.loads(text)  # a lone surrogate (a path that isn't UTF-8) is only too strange for msgspec


def dumps(content: Any) -> str:
    """Compact JSON, quickly. A lone surrogate stays as it is."""
    try:
        return msgspec.json.encode(content).decode()
    except UnicodeEncodeError:
        import json

        return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def decode_birth(text: str) -> Birth | None:
    """Inverse of `encode_birth`; None if it isn't a record of ours (another tool's, damaged, of a newer schema)."""
    try:
        record = loads(text)
        if not isinstance(record, dict) or record.get("v") not in (SCHEMA, FOLDED) or not SET_ID.fullmatch(record["s"]):
            return None
        members = _members(record["m"])
        birth = Birth(
            set_id=record["s"],
            target=str(record["t"]),
            node=str(record["n"]),
            host=str(record["h"]),
            profile=str(record["p"]),
            roots=tuple(_unfold(entry, members, record["r"][0][1]) for entry in record["r"]),
            members=members,
            taken_at=datetime.fromtimestamp(record["at"], UTC),
            deadline=datetime.fromtimestamp(record["dl"], UTC),
            slot=str(record.get("sl", "")),
            address=str(record.get("a", "")),
            member=int(record["i"]),
            paths_known="x" not in record,
        )
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, OSError, RecursionError):
        return None
    if not birth.roots or not 0 <= birth.member < len(members):
        return None
    if any(not 0 <= root.member < len(members) for root in birth.roots):
        return None
    return birth


def pack(birth: Birth, limits: LabelLimits) -> dict[str, str]:
    """The record as label pairs for one store: `birth` alone, or `birth0`, `birth1`, ... in base64url.
    Raises PreconditionError if the store can't take it."""
    text = encode_birth(birth)
    if len(text) <= limits.max_value and re.fullmatch(limits.value_pattern, text):
        return {"birth": text}
    encoded = base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
    chunks = [encoded[k : k + limits.max_value] for k in range(0, len(encoded), limits.max_value)]
    if len(chunks) > limits.max_chunks or not all(re.fullmatch(limits.value_pattern, c) for c in chunks):
        raise PreconditionError(
            "the storage's labels have no room for the birth record",
            object=birth.node,
            cure="give the node a shorter name or path",
        )
    return {f"birth{k}": chunk for k, chunk in enumerate(chunks)}


def unpack(labels: Mapping[str, str]) -> Birth | None:
    """Inverse of `pack`; other labels are ignored. None if there is no whole record of ours."""
    if "birth" in labels:
        return decode_birth(labels["birth"])
    chunks: list[str] = []
    while (key := f"birth{len(chunks)}") in labels:
        chunks.append(labels[key])
    if not chunks:
        return None
    encoded = "".join(chunks)
    try:
        text = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
    except ValueError:
        return None
    return decode_birth(text)


def check_marks(changes: Mapping[str, str | None]) -> None:
    """Raise ValueError for a mark that isn't one of ours or a value that some store couldn't hold. None removes."""
    for name, value in changes.items():
        if name not in MARK_NAMES:
            raise ValueError(f"unknown mark {name!r}")
        if value is not None and not MARK_VALUE.fullmatch(value):
            raise ValueError(f"mark {name} can't hold {value!r}")


def apply_marks(marks: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """`marks` after `changes` (None removes). Raises ValueError as `check_marks`."""
    check_marks(changes)
    merged: dict[str, str | None] = {**marks, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def merge_marks(of_members: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """A set's marks from its members': pinned or corrupt if any says so; everything else only where all say the
    same."""
    members = list(of_members)
    if not members:
        return {}
    merged = {
        name: value
        for name, value in members[0].items()
        if name in MARK_NAMES and all(other.get(name) == value for other in members[1:])
    }
    # `sealed` and `grade` must be on every member, but a retry may have stamped them a second apart.
    if "sealed" not in merged and all("sealed" in member for member in members):
        merged["sealed"] = min(member["sealed"] for member in members)
    for member in members:
        if "pinned" in member:
            merged["pinned"] = member["pinned"]
        if member.get("verify-outcome") == "corrupt":  # written to some, then the verify was killed
            merged |= {name: value for name, value in member.items() if name.startswith("verify-")}
    return merged


def pack_hash(block: str) -> str:
    """A block hash (`0x` and 64 hex digits) as a mark's value: base32, 52 characters, as 64 would not fit. '' if it
    isn't one."""
    try:
        raw = bytes.fromhex(block.removeprefix("0x"))
    except ValueError:
        return ""
    return base64.b32encode(raw).decode().rstrip("=").lower() if len(raw) == 32 else ""


def unpack_hash(value: str) -> str | None:
    """Inverse of `pack_hash`; None for anything else."""
    try:
        raw = base64.b32decode(value.upper() + "=" * (-len(value) % 8))
    except ValueError:
        return None
    return "0x" + raw.hex() if len(raw) == 32 else None


def slot_value(target: str, slot: str) -> str:
    """A slot of a target as a label's value that every store takes: to be looked for by."""
    return f"{target}-{slot}" if re.fullmatch(r"[a-z0-9-]{1,40}", slot) else f"{target}-{_hashed(slot)[1:]}"


def path_hash(path: str) -> str:
    """What stands in a record for a path that had no room."""
    return _hashed(path)


def with_paths(birth: Birth, paths: Mapping[str, str]) -> Birth:
    """`birth` with hashed paths replaced from `paths` (hash -> path), where known."""
    roots = tuple(replace(root, path=paths.get(root.path, root.path)) for root in birth.roots)
    return replace(birth, roots=roots, paths_known=all(root.path.startswith("/") for root in roots))


def _dump(record: Mapping[str, Any]) -> str:
    # ensure_ascii: the length in characters is the length in bytes, and every store takes it.
    text = dumps(record)
    if text.isascii() and text.isprintable():
        return text
    import json  # slow to import, and few paths need its escapes

    return json.dumps(record, separators=(",", ":"), ensure_ascii=True)


def _hashed(path: str) -> str:
    return "#" + sha256(path.encode(errors="surrogateescape")).hexdigest()[:16]


def _fold(root: Root, volume: str) -> list[Any]:
    """A root in few bytes: `=` for a path that is its volume's id; `inside` as the number of the path's last components
    that it has."""
    depth = root.inside.count("/") + 1 if root.inside else 0
    inside: int | str = depth if root.path.split("/")[-depth:] == root.inside.split("/") or not depth else root.inside
    return [root.member, "=" if root.path == volume else root.path, inside]


def _fold_names(record: dict[str, Any], birth: Birth) -> None:
    """Write the record's volumes and paths by what they don't have in common with the first."""
    record["v"] = FOLDED
    first, members = birth.members[0], record["m"]
    for entry, member in zip(members[1:], birth.members[1:], strict=True):
        if member.provider == first.provider:
            entry[:] = _apart(first.volume, member.volume)
    for entry, root in zip(record["r"][1:], birth.roots[1:], strict=True):
        if entry[1] != "=" and birth.roots[0].path != birth.members[birth.roots[0].member].volume:
            entry[1] = min(root.path, _apart(birth.roots[0].path, root.path), key=lambda way: len(_dump({"": way})))


def _apart(first: str, name: str) -> list[Any]:
    pairs = enumerate(zip(first, name, strict=False))
    common = next((k for k, (one, other) in pairs if one != other), min(len(first), len(name)))
    return [common, name[common:]]


def _members(entries: list[list[Any]]) -> tuple[Member, ...]:
    provider, volume = str(entries[0][0]), str(entries[0][1])
    return tuple(
        Member(provider=provider, volume=volume[:one] + str(two))
        if isinstance(one, int)
        else Member(provider=str(one), volume=str(two))
        for one, two in entries
    )


def _unfold(entry: list[Any], members: tuple[Member, ...], first: Any) -> Root:
    member, inside = int(entry[0]), entry[2]
    path = str(first)[: entry[1][0]] + str(entry[1][1]) if isinstance(entry[1], list) else str(entry[1])
    if not 0 <= member < len(members):
        raise ValueError("no such member")
    if path == "=":
        path = members[member].volume
    if isinstance(inside, int):
        inside = "/".join(path.split("/")[-inside:]) if inside else ""
    return Root(path=path, member=member, inside=str(inside))


def _weight(root: list[Any]) -> int:
    """How many bytes hashing this root's path would save; 0 if none."""
    path = root[1]
    if isinstance(path, str) and path.startswith("#"):
        return 0
    return max(0, len(_dump({"": path})) - len(_dump({"": _hashed(str(path))})))
