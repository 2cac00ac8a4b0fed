"""What a validator has signed so far, which must never go back in time: who signs the same height or epoch twice loses
his stake. Compared by content, never by time stamps; whatever can't be ordered is a refusal. Must not know verbs.

Read are CometBFT's `priv_validator_state.json` (height, round, step), and of slashing protection an SQLite database of
Lighthouse's or Nimbus's tables and the interchange JSON of EIP-3076. All else is opaque: equal, or not to be ordered.
Sources: docs.cometbft.com, priv_validator_state.json; eips.ethereum.org/EIPS/eip-3076; FACTS.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import zip_longest
from typing import TYPE_CHECKING

from msgspec import Struct

from snapshotter.core.digest import sha256
from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.core.labels import loads
from snapshotter.nodes import files
from snapshotter.nodes.files import Places
from snapshotter.nodes.profiles import Profile

if TYPE_CHECKING:
    import sqlite3

_LARGEST = 1 << 30  # bytes; one validator's history, pruned, is some 100 KB
_LARGEST_JSON = 1 << 28
_SQLITE = b"SQLite format 3\0"
#: What SQLite keeps beside a database, the last without content: https://www.sqlite.org/tempfiles.html
_SIDE_FILES = ("-wal", "-journal", "-shm")
_DANGEROUS = "--sign-state-from-set takes the set's, which is dangerous: what was signed since may be signed again"


class Order(StrEnum):
    """How the live sign-state stands to the incoming one."""

    LOWER = "lower"
    EQUAL = "equal"
    HIGHER = "higher"
    ABSENT = "absent"  # there is none to compare with: what was signed since the set was taken is not known
    UNORDERED = "unordered"


class Compared(Struct, frozen=True):
    """One file: its name below the data path, the order, and why, for a person."""

    name: str
    order: Order
    why: str


class Keys(Struct, frozen=True):
    """Of a restore: the validator whose key is live, and the one whose key the set holds ('': not known), and whether
    the live key is the one that stands there afterwards."""

    live: str = ""
    of_set: str = ""
    live_stays: bool = False


class Signed(Struct, frozen=True):
    """What one file says was signed, by validator ('' for the only one).

    `last`: the highest of each kind of thing signed; the kinds are ordered apart, the numbers of one by lexical order
    (height, round, step). `each`: of the kinds where every single one counts, all that are remembered. `chain` and
    `content`: what must be the same for two to be compared, and for two of equal numbers to be equal.
    """

    last: Mapping[str, tuple[tuple[int, ...], ...]]
    each: Mapping[str, tuple[frozenset[int], ...]] = {}
    chain: str = ""
    content: str = ""


class _Unreadable(Exception):
    """Its content can't be judged; says why."""


def compare(
    live: str,
    incoming: str,
    profile: Profile,
    *,
    production: str = "",
    live_roots: Places = (),
    roots: Places = (),
) -> list[Compared]:
    """How what the live data at `live` says was signed stands to what the data that is to take its place says. [] if
    the profile has no sign-state, or neither side has any. Changes nothing, not even beside an SQLite database.

    `production` is the data path, where `live` isn't it; `roots` are where the other roots of the incoming data are,
    `live_roots` those of the live ones if they aren't in their places: (path in production, path here)."""
    return [found for found, _, _ in _pairs(live, incoming, profile, production or live, live_roots, roots)]


def check(compared: Sequence[Compared], *, from_set: bool = False) -> None:
    """Raise PreconditionError where it can't be told which of both is higher; `from_set` accepts that, as the operator
    has said so."""
    for found in compared:
        if found.order in (Order.ABSENT, Order.UNORDERED) and not from_set:
            raise PreconditionError(
                f"the sign-state {found.name} can't be guarded: {found.why}",
                object=found.name,
                cure=f"put the newest copy of it on disk first; {_DANGEROUS}",
            )


def carry_higher(
    live: str,
    incoming: str,
    profile: Profile,
    *,
    production: str = "",
    live_roots: Places = (),
    roots: Places = (),
    from_set: bool = False,
    keys: Keys | None = None,
) -> list[str]:
    """See to it that the data at `incoming`, which is about to take the place of that at `live`, has the higher
    sign-state of both; returns what a person should know. The node is stopped, nothing has been moved yet.

    All is compared before anything is written; then each file where the live one is higher is replaced by it (owner
    kept, mode 0600, synced). The live data is left as it is. Called again after a kill it does the rest. The same call
    serves a restore, its undo and a swap back: "live" is what stands at the data path, whatever it is. `keys` says that
    it is a restore: what an image says is never news, so a live one below it tells nothing (`_of_restore`).

    Raises PreconditionError (`check`; `from_set` lets what can't be ordered be the incoming one, but never lowers what
    can), StorageError.
    """
    pairs = _pairs(live, incoming, profile, production or live, live_roots, roots)
    judged = [_of_restore(found, keys) if keys is not None else found for found, _, _ in pairs]
    check(judged, from_set=from_set)
    notes = []
    for (found, theirs, ours), said in zip(pairs, judged, strict=True):
        if Order.HIGHER in (found.order, said.order):
            _replace(theirs, ours)
            kept = said if said.order is Order.HIGHER else found
            notes.append(f"kept the live {found.name}: {kept.why}")
        elif said.order in (Order.ABSENT, Order.UNORDERED):
            notes.append(f"took the set's {found.name} as you asked, though it can't be guarded: {said.why}")
    return notes


def _of_restore(found: Compared, keys: Keys) -> Compared:
    """The order, for a restore. The live record counts only if it can be what its validator has signed since the set
    was taken: one below the set's was reset, and another validator's says nothing of this one."""
    if found.order in (Order.ABSENT, Order.UNORDERED):
        return found
    if keys.live and keys.of_set and keys.live != keys.of_set:
        if keys.live_stays:
            return found if found.order is Order.EQUAL else Compared(found.name, Order.HIGHER, "it is of the live key")
        why = f"the one on disk is of another key (validator {keys.live}, the set's is of {keys.of_set})"
        return Compared(found.name, Order.ABSENT, f"{why}, so what was signed since is not known")
    if found.order is Order.LOWER:
        why = f"the one on disk was reset, or is of another key, so what was signed since is not known: {found.why}"
        return Compared(found.name, Order.ABSENT, why)
    return found


def _pairs(
    live: str, incoming: str, profile: Profile, production: str, live_roots: Places, roots: Places
) -> list[tuple[Compared, str, str]]:
    """(how they stand, the live file, the incoming file's place) of every file that either side has."""
    theirs = [(production, live), *live_roots]
    ours = [(production, incoming), *roots]
    found = []
    for name in sorted({*_names(theirs, profile), *_names(ours, profile)}):
        if profile.sign_state_format != "opaque" and name.endswith(_SIDE_FILES):
            continue  # a part of its database
        path = files.locate(theirs, name)
        seen = place = files.locate(ours, name)
        if path == seen:
            continue  # one file for both, outside what is moved
        if not files.held(ours, place):
            place = files.itself(ours, name)  # a link out of the data: it is read, and replaced rather than followed
        if not files.held(ours, place):
            raise PreconditionError("leads out of the data", object=place, cure="move it into the data path")
        order, why = _compared(path, seen, profile.sign_state_format)
        found.append((Compared(name, order, why), path, place))
    return found


def _names(places: Places, profile: Profile) -> set[str]:
    names = {name for pattern in profile.sign_state for name in files.expand(places, pattern)}
    for root, place in places[1:]:  # a file that is elsewhere now is in no directory where a glob would look
        name = os.path.relpath(root, places[0][0])
        if os.path.lexists(place) and any(_means(pattern, name) for pattern in profile.sign_state):
            names.add(name)
    return {file for name in names for file in (list(files.below(places, name)) or [name])}


def _means(pattern: str, name: str) -> bool:
    return pattern.count("/") == name.count("/") and fnmatch.fnmatchcase(name, pattern)


def patterns(profile: Profile) -> list[str]:
    """What the sign-state is, and what SQLite keeps beside it, which goes where it goes."""
    return [pattern + suffix for pattern in profile.sign_state for suffix in ("", *_SIDE_FILES)]


def digest(places: Places, profile: Profile) -> str:
    """Of the names and contents of all sign-state there: the same only if nothing was signed in between. '' if it
    can't be told."""
    found = sha256()
    try:
        for name in sorted(_names(places, profile)):
            content = _content(files.locate(places, name))
            if content is not None:
                found.update(f"{len(os.fsencode(name))} {len(content)} ".encode() + os.fsencode(name) + content)
    except PreconditionError:
        return ""
    return found.hexdigest()


def _compared(path: str, place: str, kind: str) -> tuple[Order, str]:
    there, here = os.path.lexists(path), os.path.lexists(place)
    if not there and not here:
        return Order.EQUAL, "both are links to nothing"
    if not there:
        return Order.ABSENT, "there is none on disk to compare the set's with"
    if not here:
        return Order.HIGHER, "the set has none"
    if _same_bytes(path, place):
        return Order.EQUAL, "both are the same"
    try:
        live = read(path, kind)
    except _Unreadable as error:
        return Order.UNORDERED, f"the one on disk {error}"
    try:
        incoming = read(place, kind)
    except _Unreadable as error:
        return Order.UNORDERED, f"the set's {error}"
    return order_of(live, incoming)


def order_of(live: Signed, incoming: Signed) -> tuple[Order, str]:
    """How two sign-states stand, and why. A validator that only one knows has signed nothing as the other knows. Where
    each is ahead in something, or the higher one has forgotten what the lower one knows, they can't be ordered: taking
    either would let something be signed twice."""
    if live.chain != incoming.chain and live.chain and incoming.chain:
        return Order.UNORDERED, "they are of different chains"
    higher = lower = ""
    for validator in sorted({*live.last, *incoming.last}):
        mine, theirs = live.last.get(validator, ()), incoming.last.get(validator, ())
        said = f"{_named(validator)}{_numbers(mine)} on disk, {_numbers(theirs)} in the set"
        for one, other in zip_longest(mine, theirs, fillvalue=()):
            if one > other:
                higher = higher or said
            elif one < other:
                lower = lower or said
    if higher and lower:
        return Order.UNORDERED, f"each is ahead in something ({higher}; {lower})"
    if lower:
        top, below, order, why = incoming, live, Order.LOWER, f"the set's is ahead: {lower}"
    else:
        top, below, order, why = live, incoming, Order.HIGHER, f"it is ahead: {higher}"
    forgotten = _forgotten(top, below)
    if not (higher or lower):
        forgotten = forgotten or _forgotten(below, top)
        order, why = Order.EQUAL, "both say the same"
        if live.content != incoming.content:
            return Order.UNORDERED, "both have the same numbers, but did not sign the same: did two run with one key?"
    if forgotten:
        return Order.UNORDERED, f"neither has all that the other signed ({forgotten})"
    return order, why


def _forgotten(top: Signed, below: Signed) -> str:
    """A validator of whom `below` knows something signed that `top` would sign again: not in it, and not under the
    lowest that it remembers either (what was pruned is refused as a whole: EIP-3076, conditions 2, 4 and 5)."""
    for validator, kinds in below.each.items():
        for known, remembered in zip_longest(kinds, top.each.get(validator, ()), fillvalue=frozenset[int]()):
            floor = min(remembered, default=-1)
            if any(number > floor for number in known - remembered):
                return _named(validator).rstrip(": ")
    return ""


def _named(validator: str) -> str:
    return f"{validator[:12]}: " if validator else ""


def _numbers(last: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("/".join(map(str, numbers)) or "-" for numbers in last) or "nothing"


# The formats.


def read(path: str, kind: str) -> Signed:
    """What the sign-state file at `path` says, of this `profiles.Profile.sign_state_format`. Raises _Unreadable."""
    try:
        if kind == "cometbft":
            return _cometbft(files.read(path, _LARGEST_JSON)[0])
        if kind == "slashing-protection":
            return _sqlite(path) if _head(path) == _SQLITE else _interchange(files.read(path, _LARGEST_JSON)[0])
    except (PreconditionError, FileNotFoundError) as error:
        why = error.message if isinstance(error, PreconditionError) else "is gone"
        raise _Unreadable(why) from None
    raise _Unreadable("is of a format that can't be read here, and they differ")


def _cometbft(content: bytes) -> Signed:
    try:
        state = loads(content)
        last = int(state["height"]), int(state["round"]), int(state["step"])
        signed = str(state.get("signbytes") or "").upper()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Unreadable("is damaged: it has no height, round and step") from None
    if min(last) < 0:
        raise _Unreadable("is damaged: it has a negative height, round or step")
    return Signed({"": (last,)}, content=signed)


def _interchange(content: bytes) -> Signed:
    last: dict[str, tuple[tuple[int, ...], ...]] = {}
    each: dict[str, tuple[frozenset[int], ...]] = {}
    try:
        document = loads(content)
        chain = str(document["metadata"]["genesis_validators_root"]).lower()
        for entry in document["data"]:
            slots = [int(block["slot"]) for block in entry["signed_blocks"]]
            votes = [(int(vote["source_epoch"]), int(vote["target_epoch"])) for vote in entry["signed_attestations"]]
            name = _key(entry["pubkey"])
            if name in last:
                raise ValueError("twice")
            last[name], each[name] = _summed(slots, votes)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Unreadable("is damaged, or no slashing protection that can be read here") from None
    return Signed(last, each, chain)


def _sqlite(path: str) -> Signed:
    import sqlite3

    slots: dict[str, list[int]] = {}
    votes: dict[str, list[tuple[int, int]]] = {}
    with _recovered(path) as copy:
        try:
            # (Lighthouse, validator_client/slashing_protection/src/slashing_database.rs)
            names = {number: _key(key) for number, key in copy.execute("SELECT id, public_key FROM validators")}
            for number, slot in copy.execute("SELECT validator_id, slot FROM signed_blocks"):
                slots.setdefault(names[number], []).append(int(slot))
            for number, source, target in copy.execute(
                "SELECT validator_id, source_epoch, target_epoch FROM signed_attestations"
            ):
                votes.setdefault(names[number], []).append((int(source), int(target)))
        except sqlite3.OperationalError as error:
            raise _Unreadable(f"is a database that can't be read here, or damaged ({error})") from None
        except (sqlite3.Error, LookupError, ValueError, TypeError):
            raise _Unreadable("is damaged") from None
    summed = {name: _summed(slots.get(name, []), votes.get(name, [])) for name in names.values()}
    return Signed(
        {name: last for name, (last, _) in summed.items()}, {name: each for name, (_, each) in summed.items()}
    )


def _key(said: str | bytes) -> str:
    """A validator's public key as hex digits: Lighthouse writes them as text, Nimbus as bytes."""
    if isinstance(said, bytes):
        return said.hex()
    return bytes.fromhex(said.lower().removeprefix("0x")).hex()


def _summed(
    slots: list[int], votes: list[tuple[int, int]]
) -> tuple[tuple[tuple[int, ...], ...], tuple[frozenset[int], ...]]:
    """(highest slot, source and target; all slots, all targets) of one validator."""
    columns = [slots, [source for source, _ in votes], [target for _, target in votes]]
    last = tuple((max(column),) if column else () for column in columns)
    return last, (frozenset(slots), frozenset(columns[2]))


@contextmanager
def _recovered(path: str) -> Iterator[sqlite3.Connection]:
    """A private copy of an SQLite database with its log, opened and found whole: SQLite replays a log only where it
    may write, and beside the original nothing may change. Raises _Unreadable."""
    import shutil
    import sqlite3
    import tempfile

    place = tempfile.mkdtemp(prefix="snapshotter-sign-state-")
    try:
        for suffix in ("", *_SIDE_FILES[:2]):
            try:
                content, _ = files.read(path + suffix, _LARGEST)
            except FileNotFoundError:
                continue
            with open(os.path.join(place, "db" + suffix), "wb") as file:
                file.write(content)
        opened = None
        try:
            opened = sqlite3.connect(os.path.join(place, "db"))
            if opened.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise _Unreadable("is a damaged SQLite database")
            yield opened
        except sqlite3.DatabaseError:
            raise _Unreadable("is a damaged SQLite database") from None
        finally:
            if opened is not None:
                opened.close()
    except OSError as error:
        raise StorageError(f"can't copy it to look at it: {error.strerror}", object=path) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _head(path: str) -> bytes:
    """The first bytes of a plain file."""
    with files.plain(path) as (itself, _):
        fd = files.opened(itself, path)
    try:
        return os.read(fd, len(_SQLITE))
    finally:
        os.close(fd)


def _same_bytes(path: str, place: str) -> bool:
    """Whether both files, and what SQLite keeps beside them, are the same."""
    try:
        return all(_content(path + suffix) == _content(place + suffix) for suffix in ("", *_SIDE_FILES[:2]))
    except PreconditionError:
        return False


def _content(path: str) -> bytes | None:
    try:
        return files.read(path, _LARGEST)[0]
    except FileNotFoundError:
        return None


def _replace(path: str, place: str) -> None:
    """Put the live file in the incoming one's place. Of an SQLite database its content with the log replayed, in one
    file; a log that lay there must go first: SQLite would replay it into any database of that name."""
    try:
        content, like = files.read(path, _LARGEST)
        if content.startswith(_SQLITE):
            with _recovered(path) as copy:
                content = copy.serialize()
    except FileNotFoundError:
        raise PreconditionError("is gone", object=path, cure="is the node stopped?") from None
    except _Unreadable as error:
        raise PreconditionError(str(error), object=path, cure=_DANGEROUS) from None
    for suffix in _SIDE_FILES:
        files.remove(place + suffix)
    files.make_parents(os.path.dirname(path), os.path.dirname(place))
    files.sweep(os.path.dirname(place))
    files.put(place, content, mode=0o600, uid=like.st_uid, gid=like.st_gid)
