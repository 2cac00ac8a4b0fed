"""The `zfs` command: run it, read its properties, and turn what it says of a failure into an errno and one of
`core.errors`. Must know neither sets nor labels.

Reading is the command's alone: libzfs_core has no listing. Its error prose is that of libzfs (C locale), checked on
OpenZFS 2.1.11.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Sequence

from snapshotter.core.command import Outcome, environment, run
from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, StorageError

_POOLS = "/proc/spl/kstat/zfs"
_READING_S = 120.0
_AT_ONCE = 400  # names on one command line: 400 of the longest (255 bytes) stay far below ARG_MAX
_NO_LIMIT = 2**64 - 1
_LIMITS = ("snapshot_limit", "snapshot_count", "filesystem_limit", "filesystem_count")
#: What -p makes of `none`, where it isn't that word.
_PRINTED_NONE = {
    "quota": "0",
    "refquota": "0",
    "reservation": "0",
    "refreservation": "0",
    "filesystem_limit": str(_NO_LIMIT),
    "snapshot_limit": str(_NO_LIMIT),
}
_MISSING = ("does not exist", "no such pool")

#: What libzfs says -> errno, the first that fits. Later ones are parts of longer sentences.
_SAID = (
    ("suspended", errno.EAGAIN),
    ("permission denied", errno.EPERM),
    ("quota exceeded", errno.EDQUOT),
    ("snapshot limit", errno.EDQUOT),
    ("out of space", errno.ENOSPC),
    ("no space left", errno.ENOSPC),
    ("read-only", errno.EROFS),
    ("read only", errno.EROFS),
    ("key must be loaded", errno.ENOKEY),
    ("key not loaded", errno.ENOKEY),
    ("already exists", errno.EEXIST),
    ("dataset exists", errno.EEXIST),
    ("does not exist", errno.ENOENT),
    ("no such pool", errno.ENOENT),
    ("has children", errno.ENOTEMPTY),
    ("dependent clones", errno.EBUSY),
    ("busy", errno.EBUSY),
    ("too long", errno.ENAMETOOLONG),
    ("io error", errno.EIO),
)

Properties = dict[str, tuple[str, str]]  # name -> (value, source)


def needs() -> list[str]:
    """[] if ZFS can be worked with here, else the reasons, each with its cure."""
    if not os.path.exists("/dev/zfs"):
        return ["zfs: its kernel module isn't loaded: modprobe zfs"]
    if not _found("zfs"):
        return ["zfs: there is no `zfs` command: install zfsutils-linux"]
    if not os.access("/dev/zfs", os.R_OK | os.W_OK):
        return ["zfs: no permission to open /dev/zfs: run as root, or let this user open it"]
    return []


def _found(program: str) -> bool:
    return any(os.access(os.path.join(place, program), os.X_OK) for place in environment()["PATH"].split(":"))


def pools() -> list[str]:
    """The pools that are imported here, asked of the kernel without a child: [] where there is no ZFS."""
    try:
        return sorted(name for name in os.listdir(_POOLS) if os.path.isdir(os.path.join(_POOLS, name)))
    except OSError:
        return []


def pool_of(name: str) -> str:
    return name.partition("@")[0].partition("/")[0]


def suspended(pool: str) -> bool:
    """Whether it has lost its devices. False where that isn't told (an older OpenZFS, no such pool)."""
    try:
        with open(f"{_POOLS}/{pool}/state", encoding="ascii") as file:
            return file.read().strip() == "SUSPENDED"
    except OSError:
        return False


def refuse_suspended(names: Iterable[str]) -> None:
    """Raise StorageError if a pool of these names lost its devices: what changes it would wait for ever."""
    for pool in {pool_of(name) for name in names}:
        if suspended(pool):
            raise failure(errno.EAGAIN, pool)


def refuse_blind() -> None:
    """Raise StorageError if a pool here can't be looked into: `zfs get` leaves it out without a word."""
    refuse_suspended(pools())


def change(*words: str, object: str) -> None:
    """Run a `zfs` that changes something to its end. Raises what `failure` makes of its refusal."""
    refuse_suspended([object])
    outcome = run(["zfs", *words], mutates=True)
    if not outcome.ok:
        raise told(outcome, object)


def destroy(dataset: str) -> None:
    """Remove this dataset, never what hangs on it; absent is done."""
    refuse_suspended([dataset])
    outcome = run(["zfs", "destroy", dataset], mutates=True)
    if not outcome.ok and number_of(outcome.stderr) != errno.ENOENT:
        raise told(outcome, dataset)


def told(outcome: Outcome, object: str) -> SnapshotterError:
    """The error of a `zfs` that failed. The first line has the reason; how to use the command may follow."""
    lines = [line.strip() for line in outcome.stderr.splitlines() if line.strip()]
    number = number_of(outcome.stderr)
    if number == errno.ENOSPC and _at_limit(object):
        number = errno.EDQUOT
    return failure(number, object, lines[0] if lines else outcome.said)


def _at_limit(object: str) -> bool:
    """Whether a limit on the number of snapshots or datasets is reached: libzfs calls that "out of space" too."""
    parts = object.partition("@")[0].split("/")
    for found in get(_LIMITS, ["/".join(parts[: k + 1]) for k in range(len(parts))]).values():
        for limit, count in zip(_LIMITS[::2], _LIMITS[1::2], strict=True):
            most, now = (found.get(key, ("", ""))[0] for key in (limit, count))
            if most.isdigit() and now.isdigit() and int(now) >= int(most) != _NO_LIMIT:
                return True
    return False


#: What libzfs quotes, and what is a dataset's or snapshot's name without quotes too.
_NAMES = re.compile(r"'[^']*'|\S*[/@]\S*")


def _reasons(said: str) -> list[str]:
    """The lines of an error without the names in it: a dataset may be called `busy`, or `does not exist`."""
    return [_NAMES.sub("", line.lower().replace("i/o error", "io error")) for line in said.splitlines()]


def number_of(said: str) -> int:
    """The errno that libzfs must have had when it said this; 0 if it isn't known."""
    for line in _reasons(said):  # the first has the reason; names may follow, a line each
        for words, number in _SAID:
            if words in line:
                return number
    return 0


def failure(number: int, object: str, said: str = "") -> SnapshotterError:
    """One refusal of ZFS, the same whichever way it was asked. `said` is shown where the number isn't known."""
    dataset = object.partition("@")[0]
    match number:
        case errno.EAGAIN:
            pool = pool_of(object)
            return StorageError("the pool is suspended: it lost its devices", object=object, cure=f"zpool clear {pool}")
        case errno.EPERM | errno.EACCES:
            user = os.geteuid()
            return PreconditionError(
                "no permission",
                object=object,
                cure=f"run as root, or: zfs allow -u {user} snapshot,destroy,mount,hold,release,userprop {dataset}",
            )
        case errno.EDQUOT:
            return StorageError("a quota or limit is reached", object=object, cure="raise it, or delete old sets")
        case errno.ENOSPC:
            cure = "delete old sets, or free some space"
            return StorageError("no space: its pool is full, or the rest is reserved", object=object, cure=cure)
        case errno.EROFS:
            return PreconditionError("its pool is read-only", object=object, cure="import it for writing")
        case errno.ENOKEY:
            cure = f"zfs load-key {dataset}"
            return PreconditionError("its encryption key isn't loaded", object=object, cure=cure)
        case errno.EEXIST:
            return BusyError("exists already", object=object)
        case errno.ENOENT:
            return StorageError("no such dataset", object=object, cure="was it destroyed, renamed or exported?")
        case errno.ENOTEMPTY:
            return BusyError("has children or snapshots", object=object, cure=f"zfs list -r -t all {dataset}")
        case errno.EBUSY:
            return BusyError("is in use", object=object, cure=f"zfs holds {object}; or who has it open: fuser -vm")
        case errno.ENAMETOOLONG:
            return PreconditionError("the name would be too long", object=object, cure="give the dataset a shorter one")
        case errno.EXDEV:
            return StorageError("crosses pools", object=object)
        case errno.EIO:
            return StorageError("an I/O error", object=object, cure=f"zpool status {pool_of(object)}")
    if said:
        return StorageError(f"zfs refused: {said.removeprefix('cannot ')}", object=object)
    return StorageError(f"zfs refused: {os.strerror(number) if number else 'no reason given'}", object=object)


def get(properties: Sequence[str], names: Sequence[str]) -> dict[str, Properties]:
    """These properties of these objects, by name; those that aren't there are left out. Raises StorageError,
    PreconditionError."""
    found: dict[str, Properties] = {}
    for start in range(0, len(names), _AT_ONCE):
        part = names[start : start + _AT_ONCE]
        _read(["-o", "name,property,value,source", ",".join(properties), *part], found, part[0])
    # Not what a value with line breaks in it says of others.
    return {name: found[name] for name in names if name in found}


def get_set(properties: Sequence[str], pool: str | None = None) -> dict[str, Properties]:
    """As `get`, of every object here (or in one pool) that has one of these properties set on itself (local or
    received)."""
    found: dict[str, Properties] = {}
    if pools():
        kinds = ["-t", "filesystem,volume,snapshot", "-s", "local,received"]
        where = ["-r", pool] if pool else []
        _read([*kinds, "-o", "name,property,value,source", *where[:1], ",".join(properties), *where[1:]], found, "zfs")
    return found


def local_value(name: str, key: str) -> str:
    """What this one object has set on itself as this one property, to the letter; '' if nothing."""
    outcome = run(["zfs", "get", "-Hp", "-s", "local", "-o", "value", key, name], timeout=_READING_S)
    return outcome.stdout.removesuffix("\n")


def version() -> str:
    """The kernel module's, as 2.1.11-1; '' where there is none."""
    try:
        with open("/sys/module/zfs/version", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def get_local(name: str) -> dict[str, str]:
    """All properties that are set on this object itself. Raises StorageError if it isn't there. Names first, and what
    a user may have written value by value: one of several lines looks like other properties, which root would set."""
    there = run(["zfs", "get", "-H", "-s", "local,received", "-o", "property", "all", name], timeout=_READING_S)
    if not there.ok:
        raise told(there, name)
    keys = there.stdout.split()
    if not keys and name not in get(["type"], [name]):
        raise failure(errno.ENOENT, name)
    found: dict[str, Properties] = {}
    if native := [key for key in keys if ":" not in key]:
        _read(["-o", "name,property,value,source", ",".join(native), name], found, name)
    local = {key: value for key, (value, _) in found.get(name, {}).items()}
    for key in keys:
        if ":" in key:
            local[key] = run(["zfs", "get", "-Hp", "-o", "value", key, name], timeout=_READING_S).stdout.removesuffix(
                "\n"
            )
    return local


def settable(name: str) -> dict[str, str]:
    """As `get_local`, each as `zfs set` takes it, which isn't always what `zfs get -p` prints."""
    local = get_local(name)
    local |= {key: "none" for key, value in _PRINTED_NONE.items() if local.get(key) == value}
    if local.get("mountpoint", "").startswith("/"):
        local["mountpoint"] = local["mountpoint"].removeprefix(_altroot(pool_of(name))) or "/"
    return local


#: What stands above permissions of a kind in `zfs allow`'s list -> how to give such.
_GIVEN = {
    "Local permissions:": ["-l"],
    "Descendent permissions:": ["-d"],
    "Local+Descendent permissions:": [],
}
_DELEGATED = re.compile(r"(?:(user|group) (.+)|(everyone)) (\S+)")
_UNKNOWN = re.compile(r"\(unknown: (-?[0-9]+)\)")  # an id that has no name here


def delegations(name: str) -> list[list[str]]:
    """What is delegated on this very dataset, as the words that `zfs allow` gives the same by, in that order. Raises
    StorageError where its list can't be understood."""
    outcome = run(["zfs", "allow", name], timeout=_READING_S)
    if not outcome.ok:
        raise told(outcome, name)
    found: list[list[str]] = []
    here, title = False, ""
    for line in outcome.stdout.splitlines():
        if line.startswith("---- Permissions on "):
            here = line.removeprefix("---- Permissions on ").rstrip("-").rstrip(" ") == name
        elif here and line.startswith("\t"):
            found.append(_delegation(title, _UNKNOWN.sub(r"\1", line.strip()), name))
        elif here:
            title = line.strip()
    return found


def _delegation(title: str, line: str, name: str) -> list[str]:
    match = _DELEGATED.fullmatch(line)
    if title == "Create time permissions:" and " " not in line:
        return ["-c", line]
    if title == "Permission sets:" and line.startswith("@") and len(line.split()) == 2:
        return ["-s", *line.split()]
    if title in _GIVEN and match:
        return [*_GIVEN[title], *(["-e"] if match[3] else [f"-{match[1][0]}", match[2]]), match[4]]
    raise StorageError(f"can't understand what is delegated there: {title} {line}", object=name)


def _altroot(pool: str) -> str:
    """What `zfs get` shows in front of this pool's mount points, and `zfs set` puts there; '' if nothing."""
    outcome = run(["zpool", "get", "-Hp", "-o", "value", "altroot", pool], timeout=_READING_S)
    if not outcome.ok:
        raise told(outcome, pool)
    return outcome.stdout.strip().removeprefix("-").rstrip("/")


def _read(words: Sequence[str], found: dict[str, Properties], object: str) -> None:
    if reasons := needs():
        message, _, cure = reasons[0].partition(": ")[2].partition(": ")
        raise PreconditionError(message, object="zfs", cure=cure)
    outcome = run(["zfs", "get", "-Hp", *words], timeout=_READING_S)
    for line in outcome.stdout.split("\n"):
        fields = line.split("\t")
        if len(fields) >= 4:  # else a part of another's property that has several lines
            found.setdefault(fields[0], {})[fields[1]] = "\t".join(fields[2:-1]), fields[-1]
    if not outcome.ok:
        # Something that was destroyed since its name was read is no error.
        lines = [line for line in outcome.stderr.splitlines() if line.strip()]
        wrong = [line for line in lines if not any(word in _reasons(line)[0] for word in _MISSING)]
        if wrong:
            raise failure(number_of("\n".join(wrong)), object, wrong[-1])


def children(name: str) -> list[tuple[str, str]]:
    """(name, type) of the datasets directly below this one: `filesystem` or `volume`."""
    words = ["zfs", "list", "-H", "-d", "1", "-o", "name,type", "-t", "filesystem,volume", name]
    outcome = run(words, timeout=_READING_S)
    if not outcome.ok:
        raise told(outcome, name)
    pairs = (line.split("\t") for line in outcome.stdout.splitlines())
    return [(found, kind) for found, kind in pairs if found != name]


def automatic(names: Sequence[str]) -> dict[str, str]:
    """Of these datasets and all below them, by name: where each mounts itself (canmount=on, not a container's own), ''
    where it doesn't. Absent ones are left out."""
    words = ["zfs", "list", "-Hp", "-r", "-t", "filesystem", "-o", "name,canmount,zoned,mountpoint", *names]
    outcome = run(words, timeout=_READING_S)
    if not outcome.ok and number_of(outcome.stderr) != errno.ENOENT:
        raise told(outcome, names[0])
    found = [line.split("\t", 3) for line in outcome.stdout.splitlines()]
    return {
        words[0]: words[3] if words[1:3] == ["on", "off"] and words[3].startswith("/") else ""
        for words in found
        if len(words) == 4
    }


def mounts_as_it_came(name: str) -> bool:
    """Whether its mount point came with `zfs receive`: a replica's, that shows where its original is mounted."""
    while True:
        words = ["zfs", "get", "-H", "-o", "source", "mountpoint", name]
        source = run(words, timeout=_READING_S).stdout.strip()
        if not source.startswith("inherited from "):
            return source == "received"
        name = source.removeprefix("inherited from ")


def snapshots_of(name: str) -> list[tuple[str, int]]:
    """(full name, createtxg) of the snapshots of this one dataset, everybody's, oldest first; none of an absent one."""
    words = ["zfs", "list", "-Hp", "-d", "1", "-o", "name,createtxg", "-s", "createtxg", "-t", "snapshot", name]
    outcome = run(words, timeout=_READING_S)
    if not outcome.ok and number_of(outcome.stderr) != errno.ENOENT:
        raise told(outcome, name)
    pairs = (line.split("\t") for line in outcome.stdout.splitlines())
    return [(found, int(txg)) for found, txg in pairs]


def bookmarks_of(name: str) -> list[str]:
    """Full names of the bookmarks of this one dataset; none of an absent one. They go with it, without a word."""
    outcome = run(["zfs", "list", "-H", "-d", "1", "-o", "name", "-t", "bookmark", name], timeout=_READING_S)
    if not outcome.ok and number_of(outcome.stderr) != errno.ENOENT:
        raise told(outcome, name)
    return outcome.stdout.splitlines()


def holds_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """(snapshot, tag) of every hold on these snapshots."""
    outcome = run(["zfs", "holds", "-H", *names], timeout=_READING_S)
    if not outcome.ok and number_of(outcome.stderr) != errno.ENOENT:
        raise told(outcome, names[0])
    lines = (line.split("\t") for line in outcome.stdout.splitlines())
    return [(fields[0], fields[1]) for fields in lines if len(fields) >= 2]
