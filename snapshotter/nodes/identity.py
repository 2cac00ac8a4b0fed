"""Who a node is: its key, what derives from it (address, enode), and the files that hold both. Must not know providers,
verbs or the config. What a key file holds never leaves this module but into another file of mode 0600: not into an
error, a label, an argument or a log.

Sources: an enode is the uncompressed secp256k1 public key without its 04, an address the last 20 bytes of that key's
keccak256 (FACTS; Ethereum yellow paper, appendix F). A CometBFT node's id is the first 20 bytes of the sha256 of its
public key (docs.cometbft.com, node_key.json), a validator's address likewise (priv_validator_key.json).
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from msgspec import Struct

from snapshotter.core.errors import PreconditionError, SnapshotterError, StorageError, pip_install
from snapshotter.core.labels import loads
from snapshotter.nodes import files
from snapshotter.nodes.files import Places
from snapshotter.nodes.profiles import Profile

#: What stands in a writable clone for what was withheld. No client takes it for a key, and a LevelDB whose CURRENT it
#: is doesn't open: each refuses to start rather than making a new identity without a word.
PLACEHOLDER = (
    b"withheld by snapshotter: a clone must not run with the keys of the node that it was taken from.\n"
    b"`snapshotter restore SET --to DIR --with-identity` leaves them in.\n"
)
_LARGEST_KEY = 1 << 16  # bytes; a hex key has 66, a CometBFT key 0.4 KB
_LARGEST_FILE = 1 << 26  # bytes; an identity that is a LevelDB has a log of a few KB
_CURE = "put the right key file there, or restore it: `snapshotter identity restore`, `restore --only key`"


class Identity(Struct, frozen=True, kw_only=True):
    """What may be known of a node's key; never the key.

    `address`: `0x` and 40 hex digits; of CometBFT its node id (40 hex digits). `node_id`: what its URL names it by,
    128 hex digits of an enode. `path` is where the key was read, `mode` that file's permission bits. `validator`:
    CometBFT's validator address, '' without a priv_validator_key.json.
    """

    address: str
    node_id: str
    path: str
    mode: int
    kind: str  # profiles.NodeKey.format
    validator: str = ""

    def url(self, host: str, port: int) -> str:
        """`enode://ID@HOST:PORT`, or CometBFT's `ID@HOST:PORT`."""
        place = f"[{host}]" if ":" in host else host
        return f"{'enode://' if self.kind == 'secp256k1-hex' else ''}{self.node_id}@{place}:{port}"

    def same_as(self, other: Identity) -> bool:
        """Whether both are one node: the same keys, wherever they lie."""
        return (self.node_id, self.validator) == (other.node_id, other.validator)

    def __str__(self) -> str:
        return f"{self.address} (validator {self.validator})" if self.validator else self.address


def read(
    top: str, profile: Profile, key_file: str | None = None, *, production: str = "", roots: Places = ()
) -> Identity | None:
    """Who the node is whose data path's content is at `top`; None if its profile knows no key that can be read, or no
    key is there (the node would make a new one).

    `key_file` is where the config says that the key is. `production` is the data path that `top` is a copy of, if it
    isn't `top` itself, `roots` the node's other roots: (path in production, path here).

    Raises PreconditionError: a directory, unreadable, withheld, no key; or the libraries are missing.
    """
    if profile.node_key is None:
        return None
    places = _places(top, production, roots)
    path = files.here(places, os.path.realpath(key_file)) if key_file else files.locate(places, profile.node_key.path)
    try:
        content, found = files.read(path, _LARGEST_KEY)
    except FileNotFoundError:
        return None
    if is_withheld(content):
        raise PreconditionError(
            "its key was withheld when this clone was made", object=path, cure="restore it with --with-identity"
        )
    mode = stat.S_IMODE(found.st_mode)
    if profile.node_key.format == "secp256k1-hex":
        address, node_id = _ethereum(content, path)
        return Identity(address=address, node_id=node_id, path=path, mode=mode, kind=profile.node_key.format)
    node_id = _cometbft(content, path).hex()
    validator = _validator(places)
    return Identity(
        address=node_id, node_id=node_id, path=path, mode=mode, kind=profile.node_key.format, validator=validator
    )


def validator(places: Places, profile: Profile) -> str:
    """CometBFT's validator address, also where the node's own key is gone; '' if it can't be told."""
    if profile.node_key is None or profile.node_key.format != "cometbft":
        return ""
    try:
        return _validator(places)
    except PreconditionError:
        return ""


def _validator(places: Places) -> str:
    try:
        path = files.locate(places, "config/priv_validator_key.json")
        return _cometbft(files.read(path, _LARGEST_KEY)[0], path).hex().upper()
    except FileNotFoundError:
        return ""  # a full node, or the key is with a signer of its own


def for_record(data_path: str, profile: Profile, key_file: str | None = None) -> tuple[str, str]:
    """(address for the birth record, note): never raises, as an image without an address is worth more than none.
    ('', '') where there is no key, and then nothing heavy is imported."""
    try:
        found = read(data_path, profile, key_file)
    except (SnapshotterError, OSError) as error:
        why = error.line() if isinstance(error, SnapshotterError) else error.strerror
        return "", f"the node's address is not recorded: {why}"
    return (found.address, "") if found else ("", "")


def secret_files(places: Places, profile: Profile, key_file: str | None = None) -> list[str]:
    """The plain files of a node that want mode 0600, by their paths here: what the profile's `secrets` and `key_file`
    lead to, in directories all that is in them. Only what lies in `places`; sorted."""
    found = {files.locate(places, name) for name in _secrets(places, profile)}
    if key_file:
        found.add(files.here(places, os.path.realpath(key_file)))
    return sorted(path for path in found if files.held(places, path) and _is_plain(path))


def withhold(places: Places, profile: Profile, key_file: str | None = None) -> list[str]:
    """In a writable clone, a placeholder of mode 0600 in the place of every secret, owner kept; returns their paths.
    `places` are all roots: (path in production, path in the clone), the data path first; nothing outside them is
    touched. A link to a secret in the clone stays, one that leads nowhere or out of the clone is replaced. Every other
    hard link of a secret keeps its content. Raises PreconditionError, StorageError."""
    wanted = set(secret_files(places, profile, key_file))
    for pattern in profile.secrets:
        for name in files.expand(places, pattern):
            link, target = files.itself(places, name), files.locate(places, name)
            if os.path.islink(link) and not (files.held(places, target) and os.path.lexists(target)):
                wanted.add(link)
    kept = sorted(path for path in wanted if files.held(places, path))
    for path in kept:
        like = os.lstat(path)
        files.put(path, PLACEHOLDER, mode=0o600, uid=like.st_uid, gid=like.st_gid, keep_times=True)
    return kept


def carry(
    source: str,
    into: str,
    profile: Profile,
    key_file: str | None = None,
    *,
    production: str = "",
    source_roots: Places = (),
    into_roots: Places = (),
) -> list[str]:
    """Make the identity files in the data path at `into` those of the one at `source`; returns their names.

    They are copied, so that `source` still has its own for an undo: each a new file of the old one's owner, secrets
    with mode 0600, renamed into place and synced. What of the profile's `identity` only `into` has is removed: a
    `nodeAddress` that derives from another key. `key_file`, where the config says that the key is, goes along if it
    lies in both. Killed half-way, it is called again and does the rest.

    `production` is the data path whose copies these are, where neither is it; `..._roots` are the other roots.
    Raises PreconditionError (`source` has no identity: nothing was changed), StorageError.
    """
    theirs, ours = _places(source, production, source_roots), _places(into, production, into_roots)
    wanted = _names(theirs, profile.identity)
    key = _key_file(theirs, ours, key_file)
    if not wanted and key is None:
        raise PreconditionError("there is no identity in it", object=source, cure=_CURE)
    secret = {files.locate(theirs, name) for name in _secrets(theirs, profile)}
    # All that could refuse comes before the first change.
    moves = []
    for name in wanted:
        path, place = files.locate(theirs, name), _place_of(ours, name)
        if files.locate(ours, name) != path:  # else both lead to one file, outside what is moved
            moves.append((path, place, *_read(theirs, path, name, key_file)))
    if key is not None and key not in [(path, place) for path, place, _, _ in moves]:
        moves.append((*key, *files.read(key[0], _LARGEST_KEY)))
        secret.add(key[0])
    surplus = [_place_of(ours, name) for name in _names(ours, profile.identity) if name not in wanted]
    for path, place, content, like in moves:
        files.make_parents(os.path.dirname(path), os.path.dirname(place))
        mode = 0o600 if path in secret else stat.S_IMODE(like.st_mode)
        files.sweep(os.path.dirname(place))
        files.put(place, content, mode=mode, uid=like.st_uid, gid=like.st_gid)
    for place in surplus:
        files.remove(place)
    return wanted


def secrets_of(places: Places, profile: Profile, leave: Sequence[str] = ()) -> list[tuple[str, bytes, os.stat_result]]:
    """(name, content, status) of every secret in these places that doesn't lie below one of `leave`; b"" of one that
    can't be read. For `add_secrets`. Raises PreconditionError, OSError (a directory can't be read)."""
    found = []
    for name in _secrets(places, profile):
        path = files.locate(places, name)
        if files.held(places, path) and not files.held([(each, each) for each in leave], path):
            try:
                found.append((name, *files.read(path, _LARGEST_FILE)))
            except (PreconditionError, OSError):  # a broken disk's inode isn't to hide the others
                found.append((name, b"", os.stat(places[0][1])))
    return found


def add_secrets(
    secrets: Sequence[tuple[str, bytes, os.stat_result]], places: Places, profile: Profile, *, replaced: bool
) -> tuple[list[str], list[str]]:
    """Put secrets of the old data (`secrets_of`) into the new at `places` where that has none of their name, each with
    its owner and mode 0600: an account that was made since. Returns (names of those, names of what is in the old alone:
    another stands in its place, or it is of an identity, which is one as a whole and is never mixed).

    `replaced`: the identity was chosen to be the new one, so what the old has besides is another node's, and stays in
    the old alone. Else it was found to be the same, or can't be told. Raises PreconditionError, StorageError."""
    added, alone = [], []
    for name, content, like in secrets:
        held = next((pattern for pattern in profile.identity if _in(pattern, name)), "")
        path = files.locate(places, name)
        if is_withheld(content):
            continue
        if held and not replaced:
            alone += [] if files.expand(places, held) else [name]
        elif os.path.lexists(path):
            alone += [] if _holds(path, content) else [name]
        elif held or replaced or not content or not files.held(places, path):
            alone.append(name)
        else:
            _make_directory(os.path.dirname(path), like)
            files.put(path, content, mode=0o600, uid=like.st_uid, gid=like.st_gid)
            added.append(name)
    return added, alone


def _in(pattern: str, name: str) -> bool:
    """Whether the file `name` is what an identity's pattern means, or lies in it."""
    depth = pattern.rstrip("/").count("/") + 1
    return all(
        fnmatch.fnmatchcase(part, wanted)
        for part, wanted in zip_longest(name.split("/")[:depth], pattern.rstrip("/").split("/"), fillvalue="")
    )


def _holds(path: str, content: bytes) -> bool:
    try:
        return files.read(path, _LARGEST_FILE)[0] == content
    except (PreconditionError, FileNotFoundError):
        return False


def _make_directory(path: str, like: os.stat_result) -> None:
    """It and those above it, only for the owner of the secret that goes there."""
    if os.path.isdir(path):
        return
    _make_directory(os.path.dirname(path), like)
    try:
        os.mkdir(path, 0o700)
        with files.directory_of(os.path.join(path, "it")) as (fd, _):
            files.own(fd, like.st_uid, like.st_gid, 0o700)
            os.fsync(fd)
    except OSError as error:
        raise StorageError(f"can't make it: {error.strerror}", object=path) from None


def _key_file(theirs: Places, ours: Places, key_file: str | None) -> tuple[str, str] | None:
    """Where the config's key file is in the one and in the other; None if it isn't in both, so no part of the data."""
    if not key_file:
        return None
    path, place = (files.here(places, os.path.realpath(key_file)) for places in (theirs, ours))
    inside = files.held(theirs, path) and files.held(ours, place)
    return (path, place) if inside and path != place and os.path.lexists(path) else None


def collect(top: str, profile: Profile, key_file: str | None = None) -> dict[str, tuple[bytes, int]]:
    """The identity files of the data path at `top`: name -> (content, mode). A key that the config says is elsewhere
    comes under the name that it has by default. {} if there are none. For `install`. Raises PreconditionError."""
    places = _places(top, "", ())
    paths = {name: files.locate(places, name) for name in _names(places, profile.identity)}
    if key_file and profile.node_key:
        paths[profile.node_key.path] = os.path.realpath(key_file)
    found = {}
    for name, path in paths.items():
        try:
            content, seen = _read(places, path, name, key_file)
        except FileNotFoundError:
            continue
        found[name] = (content, stat.S_IMODE(seen.st_mode))
    return found


def _read(places: Places, path: str, name: str, key_file: str | None) -> tuple[bytes, os.stat_result]:
    """The identity file `name`, which is at `path`. The node's user may make a link to any file, and has what we make
    of it: where one leads out of the data, it must be to his own, root's link, or the config's `key_file`. Raises
    FileNotFoundError, PreconditionError."""
    content, found = files.read(path, _LARGEST_FILE)
    if os.geteuid() != 0 or files.held(places, path) or found.st_uid == os.stat(places[0][1]).st_uid:
        return content, found
    link = files.itself(places, name)
    by_root = files.held(places, link) and _is_roots_link(link, path)
    if not by_root and not (key_file and path == os.path.realpath(key_file)):
        cure = "put the file itself there; or name it as key_file in the config, if it is the node's key"
        raise PreconditionError("belongs to another user than the data, and a link leads there", object=path, cure=cure)
    return content, found


def _is_roots_link(link: str, path: str) -> bool:
    """Whether root made this link, and straight to `path`. (A relative one means another place once it is moved.)"""
    try:
        found = os.lstat(link)
        return (found.st_uid, found.st_nlink) == (0, 1) and os.readlink(link) == path
    except OSError:
        return False


def is_withheld(content: bytes) -> bool:
    """Whether this is what stands in a clone for a key."""
    return content.startswith(PLACEHOLDER[:24])


def install(
    top: str,
    contents: Mapping[str, tuple[bytes, int]],
    profile: Profile,
    key_file: str | None,
    owner: tuple[int, int],
    keep: str,
) -> list[str]:
    """Make the identity files of the data path at `top` these, and no others; returns their paths. What stood there and
    differs is first kept in the directory `keep` (made, 0700): a key is never lost. `owner` is (uid, gid). Secrets get
    mode 0600, whatever they had where they were exported. Killed half-way, it is called again and does the rest.
    Raises PreconditionError, StorageError."""
    places = _places(top, "", ())
    outside = os.path.realpath(key_file) if key_file and profile.node_key else ""
    moves = {}
    for name, (content, mode) in contents.items():
        own = outside and profile.node_key and name == profile.node_key.path
        secret = own or any(_in(pattern, name) for pattern in profile.secrets)
        moves[outside if own else _place_of(places, name)] = content, 0o600 if secret else mode
    there = {_place_of(places, name): name for name in _names(places, profile.identity)}
    if outside and profile.node_key:
        there[outside] = profile.node_key.path
    for path, name in there.items():
        try:
            content, _ = files.read(path, _LARGEST_FILE)
        except FileNotFoundError:
            continue
        if (path not in moves or content != moves[path][0]) and not is_withheld(content):
            place = os.path.join(keep, name)
            os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
            files.put(place, content, mode=0o600, uid=os.geteuid(), gid=os.getegid())
    for path, (content, mode) in moves.items():
        files.make_parents(top, os.path.dirname(path))
        files.put(path, content, mode=mode, uid=owner[0], gid=owner[1])
    for path in there:
        if path not in moves:
            files.remove(path)
    return sorted(moves)


def _places(top: str, production: str, roots: Places) -> list[tuple[str, str]]:
    return [(production or top, top), *roots]


def _place_of(places: Places, name: str) -> str:
    """Where a file of this name is to be written: where a link leads if that is in the places, else the link's own
    place. Raises PreconditionError if that would be outside: it may be another node's, or production."""
    for place in (files.locate(places, name), files.itself(places, name)):
        if files.held(places, place):
            return place
    raise PreconditionError(
        "leads out of the data", object=files.itself(places, name), cure="move it into the data path"
    )


def _names(places: Places, patterns: Sequence[str]) -> list[str]:
    """Every plain file that the patterns mean, a directory's files one by one: names relative to the data path."""
    return sorted(
        {file for pattern in patterns for name in files.expand(places, pattern) for file in files.below(places, name)}
    )


def _secrets(places: Places, profile: Profile) -> list[str]:
    return _names(places, profile.secrets)


def _is_plain(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


# What derives from a key. The libraries are imported here only: most commands need none of this.


def _ethereum(content: bytes, path: str) -> tuple[str, str]:
    """(address, enode's id) of a file with 64 hex digits, with or without 0x, white space around them."""
    try:
        text = content.decode("ascii").strip()
        raw = bytes.fromhex(text[2:] if text[:2] in ("0x", "0X") else text)
        if len(raw) != 32 or any(character.isspace() for character in text):
            raise ValueError
    except ValueError:
        raise PreconditionError("is no secp256k1 key of 64 hex digits", object=path, cure=_CURE) from None
    public = _secp256k1(raw, path, compressed=False)[1:]
    try:
        from Crypto.Hash import keccak
    except ImportError:
        raise _no_library(path) from None
    return "0x" + keccak.new(digest_bits=256, data=public).digest()[12:].hex(), public.hex()


def _secp256k1(raw: bytes, path: str, *, compressed: bool) -> bytes:
    try:
        from coincurve import PublicKey
    except ImportError:
        raise _no_library(path) from None
    try:
        return PublicKey.from_valid_secret(raw).format(compressed)
    except ValueError:  # zero, or not below the curve's order
        raise PreconditionError("is no secp256k1 key: out of range", object=path, cure=_CURE) from None


def _no_library(path: str) -> PreconditionError:
    return PreconditionError(
        "the address can't be derived from the key: a library is missing",
        object=path,
        cure=pip_install("identity"),
    )


def _cometbft(content: bytes, path: str) -> bytes:
    """The 20 bytes that stand for the key of a node_key.json or priv_validator_key.json."""
    import base64
    import hashlib

    try:
        key = loads(content)["priv_key"]
        kind, raw = key["type"], base64.b64decode(key["value"], validate=True)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise PreconditionError("is no CometBFT key file", object=path, cure=_CURE) from None
    if kind == "tendermint/PrivKeyEd25519" and len(raw) == 64:
        return hashlib.sha256(raw[32:]).digest()[:20]  # the seed, then the public key
    if kind == "tendermint/PrivKeySecp256k1" and len(raw) == 32:
        # As Bitcoin's addresses (crypto/secp256k1/secp256k1.go, PubKey.Address).
        public = hashlib.sha256(_secp256k1(raw, path, compressed=True)).digest()
        try:
            from Crypto.Hash import RIPEMD160
        except ImportError:
            raise _no_library(path) from None
        return RIPEMD160.new(public).digest()
    raise PreconditionError("is a CometBFT key of a kind that isn't known here", object=path, cure=_CURE)
