"""identity: who a node is, and its key kept safe: shown, exported encrypted, put back.

An export is a tar of the profile's identity files, encrypted with a passphrase in the age format
(age-encryption.org/v1: scrypt, ChaCha20-Poly1305): in ten years `age -d FILE | tar x` opens it, without us. gpg was not
taken: it starts a daemon, and a failing one is found out on the day of the restore. Sign-state is never exported:
what comes back late is older than what was signed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any

from snapshotter.core.errors import (
    BusyError,
    NotFoundError,
    PreconditionError,
    SnapshotterError,
    UsageError,
    pip_install,
)
from snapshotter.core.model import compact_time, utc_now
from snapshotter.host import processes
from snapshotter.host.locks import Locks
from snapshotter.host.places import private_directory
from snapshotter.nodes import files, identity, profiles
from snapshotter.nodes.config import Node
from snapshotter.nodes.profiles import Profile
from snapshotter.nodes.target import canonical, resolve, target_id
from snapshotter.verbs import open_restores
from snapshotter.verbs.documents import when
from snapshotter.verbs.plan import profile_of
from snapshotter.verbs.session import Session

_SET = re.compile(r"s[0-9]{8}t.*|latest(-verified)?(:.*)?")
_HEADER = "identity.json"
_LARGEST = 1 << 27  # bytes
#: The library chooses scrypt's work (log2 of N) anew each time, from how long one small hash takes it: where the
#: machine is busy just then far too little, and it takes for too much what it chose another time.
_ENOUGH_WORK = 16
_PATIENCE_S = 20.0


def show(session: Session, word: str | None, host: str | None = None, port: int | None = None) -> dict[str, Any]:
    """Who the target is (default: the only node), from its key; or a set, from its record. With `host` the whole URL
    that peers dial. Raises NotFoundError (no key), PreconditionError (unreadable, malformed, no library)."""
    if word and _SET.fullmatch(word) and not os.path.exists(word) and word not in session.config.nodes:
        found = session.select(word)
        return _document(set_id=found.set_id, path=found.birth.path, profile=found.birth.profile) | {
            "address": found.birth.address or None
        }
    node = resolve(word, session.config)
    profile, _ = profile_of(session, node)
    data = canonical(node.path)
    who = identity.read(data, profile, node.key_file)
    if who is None:
        _refuse_without_key(node, profile)
    assert who is not None
    warnings = []
    if who.mode & 0o077:
        warnings.append(f"{who.path} can be read by others (mode {who.mode:04o}): chmod 600 it")
    return _document(path=data, profile=profile.name) | {
        "address": who.address,
        "node_id": who.node_id,
        "url": who.url(host, port or profile.health.p2p_port or 30303) if host else None,
        "validator": who.validator or None,
        "key_path": who.path,
        "mode": f"{who.mode:04o}",
        "warnings": warnings,
    }


def export(session: Session, word: str | None, to: str, passphrase: Callable[[], str]) -> dict[str, Any]:
    """Write the target's identity files to `to`, encrypted. Never over a file. Raises UsageError, PreconditionError."""
    node = resolve(word, session.config)
    profile, _ = profile_of(session, node)
    data = canonical(node.path)
    contents = identity.collect(data, profile, node.key_file)
    if not contents:
        _refuse_without_key(node, profile)
    if any(identity.is_withheld(content) for content, _ in contents.values()):
        raise PreconditionError(
            "its keys were withheld when this clone was made", object=data, cure="export the node's"
        )
    who = identity.read(data, profile, node.key_file)
    header = {
        "schema": 1,
        "node": node.name,
        "profile": profile.name,
        "address": who.address if who else None,
        "exported_at": when(utc_now()),
    }
    place = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(to))), os.path.basename(to))
    if os.path.lexists(place):
        raise UsageError("is there already", object=place, cure="name another file")
    if not os.path.isdir(os.path.dirname(place)):
        raise NotFoundError("no such directory", object=os.path.dirname(place), cure="make it first")
    files.put(place, _sealed(_packed(header, contents), passphrase()), mode=0o600, uid=os.geteuid(), gid=os.getegid())
    return _document(path=data, profile=profile.name) | {
        "address": header["address"],
        "file": place,
        "names": sorted(contents),
    }


def restore(
    session: Session, file: str, word: str | None, passphrase: Callable[[], str], *, replace: bool = False
) -> dict[str, Any]:
    """Put an exported identity back into the target's data path. One that stands there and is of another node,
    or can't be read, is replaced only with `replace`; it is kept in the state directory.
    Raises NotFoundError, PreconditionError, BusyError."""
    node = resolve(word, session.config)
    data = canonical(node.path)
    header, contents = _opened(os.path.realpath(file), passphrase)
    profile = profiles.get(str(header["profile"]), session.config.profiles)
    there, _ = profile_of(session, node)
    if there.name not in (profile.name, profiles.FALLBACK):
        raise PreconditionError(f"is of a {profile.name} node, not of {there.name}", object=file, cure="name its node")
    with Locks([f"target:{target_id(data)}"]):
        open_restores.refuse(session, target_id(data))
        # A key in a file is read once, as the node starts. One in a database must not be changed under it.
        if profile.node_key is None and (users := processes.users_of(data)):
            some = ", ".join(f"{user.name} ({user.pid})" for user in users[:3])
            raise BusyError(f"is in use by {some}", object=data, cure="stop the node first")
        before = _standing(data, profile, node.key_file)
        if before not in (None, header["address"]) and not replace:
            raise PreconditionError(
                f"another identity stands there: {before}; {file} has {header['address'] or 'one without an address'}",
                object=data,
                cure="--replace puts this one in its place",
            )
        state = os.path.realpath(private_directory(session.config.state))
        keep = os.path.join(state, f"replaced-{node.name}-{compact_time(utc_now())}")
        paths = identity.install(data, contents, profile, node.key_file, owner_of(node, data), keep)
    return _document(path=data, profile=profile.name) | {
        "address": header["address"],
        "replaced": before if before != header["address"] else None,
        "warnings": [
            "a node reads its key as it starts: if it runs, start it again",
            *([f"what stood there is kept in {keep}"] if os.path.isdir(keep) else []),
        ],
        "names": [os.path.relpath(path, data) for path in paths],
    }


def _document(**known: Any) -> dict[str, Any]:
    names = ("set_id", "path", "profile", "address", "node_id", "url", "validator", "key_path", "mode", "file",
             "replaced")  # fmt: skip
    return {**dict.fromkeys(names), "names": [], "warnings": [], **known}


def _refuse_without_key(node: Node, profile: Profile) -> None:
    if profile.node_key is None:
        raise NotFoundError(
            f"nothing is known of how {profile.name} keeps a key",
            object=node.path,
            cure="`export` and `restore` take its identity files as they are" if profile.identity else "",
        )
    raise NotFoundError(
        "there is no key: the node makes a new one as it starts",
        object=node.key_file or os.path.join(node.path, profile.node_key.path),
        cure="`snapshotter identity restore FILE`, or `restore SET --in-place --only key`",
    )


def _standing(data: str, profile: Profile, key_file: str | None) -> str | None:
    """What is there: an address; words for one that has none; None for no identity, or a placeholder."""
    try:
        contents = identity.collect(data, profile, key_file)
        if contents and all(identity.is_withheld(content) for content, _ in contents.values()):
            return None
        who = identity.read(data, profile, key_file)
    except SnapshotterError as error:
        return error.message
    if who is not None:
        return who.address
    return f"{len(contents)} files" if contents else None


def owner_of(node: Node, data: str) -> tuple[int, int]:
    """(uid, gid) of the config's `owner`, else of the data path itself."""
    like = os.stat(data)
    if not node.owner:
        return like.st_uid, like.st_gid
    import grp
    import pwd

    user, _, group = node.owner.partition(":")
    try:
        account = pwd.getpwnam(user)
        return account.pw_uid, grp.getgrnam(group).gr_gid if group else account.pw_gid
    except KeyError:
        raise UsageError("there is no such user or group", object=node.owner, cure="mend owner in the config") from None


def _age() -> Any:
    try:
        from pyrage import passphrase
    except ImportError:
        raise PreconditionError(
            "the encryption library is missing", object="pyrage", cure=pip_install("identity")
        ) from None
    return passphrase


def _sealed(plain: bytes, passphrase: str) -> bytes:
    """Encrypted, with enough work where a few tries get it, else with the most that they got."""
    age, best = _age(), b""
    for _ in range(4):
        best = max(best, age.encrypt(plain, passphrase, armored=True), key=_work)
        if _work(best) >= _ENOUGH_WORK:
            break
    return best


def _work(sealed: bytes) -> int:
    """log2 of scrypt's N, as the header has it (age-encryption.org/v1)."""
    start = b"".join(sealed.splitlines()[1:4])
    found = re.search(rb"\n-> scrypt \S+ (\d+)\n", base64.b64decode(start[: len(start) // 4 * 4]))
    return int(found[1]) if found else 0


def _unsealed(sealed: bytes, passphrase: str, file: str) -> bytes:
    """Raises PreconditionError."""
    age, give_up = _age(), time.monotonic() + _PATIENCE_S
    from pyrage import DecryptError

    while True:
        try:
            return bytes(age.decrypt(sealed, passphrase))
        except DecryptError as error:
            if not str(error).startswith("Excessive work"):
                raise PreconditionError(
                    "can't be opened: another passphrase, or a damaged file", object=file, cure="try the right one"
                ) from None
        if time.monotonic() >= give_up:
            raise PreconditionError(
                "to open it is more work than this machine seems fit for: it is busy, or far slower than the one that "
                "exported it",
                object=file,
                cure="try again when it is idle; or age itself, which only takes longer: age -d FILE | tar x",
            )
        time.sleep(0.1)


def _packed(header: dict[str, Any], contents: dict[str, tuple[bytes, int]]) -> bytes:
    import tarfile

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, (content, mode) in {_HEADER: (json.dumps(header).encode(), 0o600), **contents}.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _opened(file: str, passphrase: Callable[[], str]) -> tuple[dict[str, Any], dict[str, tuple[bytes, int]]]:
    import tarfile

    try:
        sealed, _ = files.read(file, _LARGEST)
    except FileNotFoundError:
        raise NotFoundError("no such file", object=file) from None
    packed = _unsealed(sealed, passphrase(), file)
    contents = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            for entry in tar:
                found = tar.extractfile(entry)
                if found is None or entry.name.startswith("/") or ".." in entry.name.split("/"):
                    raise ValueError(entry.name)
                contents[entry.name] = (found.read(), entry.mode & 0o666)
        header = json.loads(contents.pop(_HEADER)[0])
        if header["schema"] != 1 or not contents:
            raise ValueError
    except (tarfile.TarError, LookupError, ValueError, TypeError):
        raise PreconditionError("holds no identity that snapshotter exported", object=file) from None
    return header, contents
