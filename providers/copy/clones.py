"""Clones of an image, for a person: whether the image is whole, how it is copied out, and what of a clone may go again.
Must not know which store, nor who asked.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from providers.copy.sets import Sets
from snapshotter.core.errors import JudgedBadError, PreconditionError, StorageError
from snapshotter.core.model import Progress, Purpose, Report
from snapshotter.host import permissions, processes, tree
from snapshotter.host.mirror import SKIPPED, Mirror, directory_identity, manifest_lines, remove_clone
from snapshotter.host.mounts import is_under
from snapshotter.host.store import MARKER, readable, room_fd, store_around, told, write_object

#: So often a clone in the making says in its record's time stamp that it is alive; what is made this much after the
#: last time isn't the clone's.
BEAT_S, BEAT_SLACK_NS = 0.5, 2_000_000_000
#: Time stamps of inodes are of the kernel's last tick.
TICK_NS = 20_000_000


def image_of(record: Mapping[str, Any]) -> str:
    return f"sets/{record['set_id']}/{record['member']}"


def _manifest(store: Sets, at: str) -> Iterator[tuple[str, int, str, tree.Entry]]:
    """Raises OSError, ValueError, TypeError."""
    with open(os.open(f"{at}/manifest", os.O_RDONLY | os.O_CLOEXEC, dir_fd=store.fd)) as file:
        yield from manifest_lines(file)


# ------------------------------------------------------------------------------------------------------- the image


def walk_whole(store: Sets, at: str, image: tree.Dirs) -> dict[str, tree.Entry]:
    """The image's walk, if it has what its manifest says: every path, of its kind and size, every link's target.
    (Not the content: that takes reading it all.) Raises JudgedBadError."""
    now = tree.walk(image)
    try:
        wrong = _first_difference(store, at, image, now)
    except (OSError, ValueError, TypeError):
        wrong = "its manifest is damaged"
    if wrong:
        raise JudgedBadError(
            f"the image is damaged: {wrong}",
            object=os.path.dirname(at).removeprefix("sets/"),
            cure="restore another set, and delete this one",
        )
    return now


def _first_difference(store: Sets, at: str, image: tree.Dirs, now: Mapping[str, tree.Entry]) -> str:
    known = set()
    for path, flags, link, entry in _manifest(store, at):
        if flags & SKIPPED:
            continue
        known.add(path)
        found = now.get(path)
        if found is None:
            return f"{path!r} is gone"
        if stat.S_IFMT(found.mode) != stat.S_IFMT(entry.mode):
            return f"{path!r} is of another kind"
        if stat.S_ISREG(entry.mode) and found.size != entry.size:
            return f"{path!r} has {found.size} bytes, and had {entry.size}"
        if stat.S_ISLNK(entry.mode):
            parent, name = tree.parent_and_name(path)
            if os.readlink(name, dir_fd=image.get(parent)) != link:
                return f"{path!r} leads elsewhere"
    return next((f"{path!r} was put into it" for path in now if path not in known), "")


# ----------------------------------------------------------------------------------------------------------- reach


def _newly_reached(store: Sets, record: Mapping[str, Any], top: tree.Entry) -> int:
    """The bits of the image's top that would let in whom the origin's place kept out."""
    try:
        had = int(store.image(record["set_id"])[1][record["member"]].get("reach", 0o077))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        had = 0o077
    return permissions.newly_reached(top.mode, top.gid, record["path"], had)


# ---------------------------------------------------------------------------------------------------------- making


def record(store: Sets, name: str, content: Mapping[str, Any]) -> None:
    """Raises StorageError."""
    try:
        store.ensure("attachments")
        write_object(name, content, store.fd)
    except OSError as error:
        if not os.fstatvfs(store.fd).f_flag & os.ST_RDONLY:
            raise
        at = f"{store.path}/{image_of(content)}/tree"
        raise StorageError(
            f"is on a read-only file system, and a restore is recorded in it ({error.strerror})",
            object=store.path,
            cure=f"remount it writable, or copy by hand: cp -a {at} DIR",
        ) from None


def refuse_stores(path: str) -> None:
    """Raise PreconditionError for a destination in a store: what is put into one is the store's."""
    if (around := store_around(os.path.realpath(path))) is not None:
        raise PreconditionError(f"lies inside the store {around}", object=path, cure="choose another directory")


def view(store: Sets, name: str, content: Mapping[str, Any]) -> list[str]:
    """Record a read-only view of an image that is whole; returns notes. Raises JudgedBadError, StorageError."""
    refuse_stores(str(content["path"]))
    at = image_of(content)
    with tree.open_tree(f"{at}/tree", dir_fd=store.fd) as image:
        top = walk_whole(store, at, image)[""]
    record(store, name, content)
    if _newly_reached(store, content, top):
        return [permissions.SHOWN]
    return []


def clone(store: Sets, name: str, content: dict[str, Any], size: int, report: Report) -> list[str]:
    """Fill the destination of the record with a copy of the image; returns notes. What a failure leaves is removed by
    `remove`. Raises JudgedBadError, PreconditionError, StorageError, OSError."""
    path = str(content["path"])
    refuse_stores(path)
    _look_at_destination(path, content)
    at = image_of(content)
    with told(path), ExitStack() as stack:
        source = stack.enter_context(tree.open_tree(f"{at}/tree", dir_fd=store.fd))
        now = walk_whole(store, at, source)
        lost = _newly_reached(store, content, now[""])
        notes = [permissions.CLOSED] if lost else []
        # An image of an older version may hold a store: in a clone it would look like one more.
        for marker in [each for each in now if each.endswith("/" + MARKER)]:
            inner = os.path.dirname(marker)
            now = {each: entry for each, entry in now.items() if each != inner and not each.startswith(inner + "/")}
            notes.append(f"{inner!r} is a store of copies: left out")
        content["began"] = time.time_ns() - TICK_NS
        record(store, name, content)
        if content["made"]:
            os.mkdir(path, 0o700)
            content["inode"] = directory_identity(path)
            record(store, name, content)
        target = stack.enter_context(tree.open_tree(path))
        if lost:
            os.fchmod(target.top, stat.S_IMODE(os.fstat(target.top).st_mode) & ~lost)
        done = 0
        beaten = time.monotonic()

        def step(count: int) -> None:
            nonlocal done
            done += count
            report(Progress("restoring", done, max(done, size)))

        def tick() -> None:
            nonlocal beaten
            if time.monotonic() - beaten > BEAT_S:
                beaten = time.monotonic()
                os.utime(name, dir_fd=store.fd)

        def must_fit() -> None:
            _, free = room_fd(target.top)
            needed = _used(source, now)
            if needed > free:
                raise StorageError(
                    f"the clone needs {readable(needed)}, and {readable(free)} are free there",
                    object=path,
                    cure="choose a directory on another file system",
                )

        made = Mirror(source, target, step=step, tick=tick, must_copy=must_fit, devices=False, top_mask=0o7777 & ~lost)
        made.update(now)
        if missing := next((each for each in now if each not in made.have), ""):
            raise JudgedBadError(f"{missing!r} went while it was copied", object=f"{store.path}/{at}")
        made.finish(now)
        write_object(name, {**content, "copied": True}, store.fd, durable=False)
    return notes + made.warnings


def _used(image: tree.Dirs, now: Mapping[str, tree.Entry]) -> int:
    """Bytes that a copy of the image takes: its holes take none, there as here. (The same reckoning as of a take.)
    Raises OSError."""
    used: dict[int, int] = {}
    for path, entry in now.items():
        if stat.S_ISREG(entry.mode):
            parent, name = tree.parent_and_name(path)
            found = os.stat(name, dir_fd=image.get(parent), follow_symlinks=False)
            used[found.st_ino] = min(found.st_blocks * 512, found.st_size + 4096)
    return sum(used.values())


def _look_at_destination(path: str, content: dict[str, Any]) -> None:
    """Note in the record what stands at the destination. Raises PreconditionError."""
    try:
        held = os.listdir(path)
        if [each for each in held if not _made_by_mkfs(path, each)]:
            raise PreconditionError("is not empty", object=path, cure="name an absent or an empty directory")
        content["inode"] = directory_identity(path)
        content["held"] = held
    except FileNotFoundError:
        above = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(above):
            raise PreconditionError("doesn't exist", object=above, cure=f"make it: mkdir -p {above}") from None
        content["made"] = True
    except NotADirectoryError:
        raise PreconditionError("is no directory", object=path, cure="name an absent or empty directory") from None


def _made_by_mkfs(path: str, name: str) -> bool:
    found = os.lstat(os.path.join(path, name))
    return name == "lost+found" and stat.S_ISDIR(found.st_mode) and found.st_uid == 0


# -------------------------------------------------------------------------------------------------------- removing


def remove(store: Sets, name: str, content: Mapping[str, Any]) -> list[str]:
    """Remove the clone of this record; returns notes of what stays. Raises BusyError, OSError.

    A finished one goes with all that is in it: who releases it was asked about changes. A half-made one may have become
    a person's directory after its maker died: of that only goes what the maker surely made."""
    path = str(content["path"])
    held = set(content.get("held") or ())

    def all_but_held(_: tree.Dirs, now: Mapping[str, tree.Entry]) -> set[str]:
        return {each for each in now if each.partition("/")[0] not in held}

    choose: Callable[[tree.Dirs, Mapping[str, tree.Entry]], set[str]] | None = all_but_held if held else None
    ours = content.get("maker") is not None and tuple(content["maker"]) == tuple(processes.identity(os.getpid()) or ())
    finished = content.get("since") or content.get("purpose") == Purpose.VERIFY or (content.get("copied") and ours)
    if not finished and content.get("began"):

        def the_makers(top: tree.Dirs, now: Mapping[str, tree.Entry]) -> set[str]:
            return _surely_made(store, name, content, top, now) - held

        choose = the_makers
    left = remove_clone(path, content["inode"], made=bool(content["made"]), choose=choose)
    left = [each for each in left if each.partition("/")[0] not in held]
    if not left:
        return []
    return [f"{path}: {len(left)} entries in it aren't the restore's and stay, {left[-1]!r} is one"]


_WITHHELD_BYTES = 1024  # what stands in a clone in place of a key, put there before the restore settles


def _surely_made(
    store: Sets, name: str, content: Mapping[str, Any], top: tree.Dirs, now: Mapping[str, tree.Entry]
) -> set[str]:
    """Of what is in a half-made clone, what has the image's path and kind, and either its size and time or (one only)
    the mode of a file in the making; made while the maker lived."""
    try:
        image = {path: (entry, link) for path, flags, link, entry in _manifest(store, image_of(content))}
    except (OSError, ValueError, TypeError):
        return set()
    until = os.stat(name, dir_fd=store.fd).st_mtime_ns + BEAT_SLACK_NS
    made: set[str] = set()
    unfinished: list[str] = []
    for path, found in now.items():
        known = image.get(path)
        if not path or known is None or stat.S_IFMT(found.mode) != stat.S_IFMT(known[0].mode):
            continue
        parent, last = tree.parent_and_name(path)
        at = top.get(parent)
        born = tree.born_ns(at, last) or found.ctime_ns  # some network file systems know no birth
        if not content["began"] <= born <= until:
            continue
        if stat.S_ISLNK(found.mode):
            leads = os.readlink(last, dir_fd=at)
            # The restore re-points what led into production, before it settles.
            own = (str(content["path"]), f"{content['path']}.roots")
            if leads != known[1] and not any(is_under(leads, top_of_ours) for top_of_ours in own):
                continue
        withheld = stat.S_IMODE(found.mode) == 0o600 and found.size <= _WITHHELD_BYTES
        changed = (found.size, found.mtime_ns) != (known[0].size, known[0].mtime_ns)
        if stat.S_ISREG(found.mode) and changed and not withheld:
            if stat.S_IMODE(found.mode) == 0o600 and found.size <= known[0].size:
                unfinished.append(path)
            continue
        made.add(path)
    return made | set(unfinished if len(unfinished) == 1 else ())
