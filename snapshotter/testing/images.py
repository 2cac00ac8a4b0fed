"""Trees of files as values in memory: read one, write one, remove one. What MemoryProvider's images are made of.

Knows no provider. Device nodes are left out; pipes and sockets are made anew.
"""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass, field

_BLOCK = 4096


@dataclass(slots=True)
class Entry:
    """One file, directory, symlink, pipe or socket of an image. `data` is the content, or a symlink's target."""

    mode: int  # st_mode: kind and permissions
    owner: tuple[int, int]
    mtime_ns: int
    data: bytes = b""
    xattrs: dict[str, bytes] = field(default_factory=dict)
    link_to: str | None = None  # another path of the image: they are one file


#: Relative path ('' is the top itself) -> entry, a directory always before what is in it.
Image = dict[str, Entry]


def size(image: Image) -> int:
    return sum(len(entry.data) for entry in image.values())


def read_tree(top: str) -> Image:
    """The tree at the directory `top` as it is seen now. Raises OSError, also when something goes away meanwhile."""
    image: Image = {}
    seen: dict[tuple[int, int], str] = {}
    todo = [""]
    while todo:
        relative = todo.pop()
        path = os.path.join(top, relative) if relative else top
        found = os.lstat(path)
        kind = stat.S_IFMT(found.st_mode)
        if kind in (stat.S_IFBLK, stat.S_IFCHR):
            continue
        entry = image[relative] = Entry(found.st_mode, (found.st_uid, found.st_gid), found.st_mtime_ns)
        if kind == stat.S_IFDIR:
            todo += [os.path.join(relative, name) for name in sorted(os.listdir(path), reverse=True)]
        elif found.st_nlink > 1:
            first = seen.setdefault((found.st_dev, found.st_ino), relative)
            if first != relative:
                entry.link_to = first
                continue
        if kind == stat.S_IFREG:
            with open(path, "rb") as file:
                entry.data = file.read()
        elif kind == stat.S_IFLNK:
            entry.data = os.readlink(os.fsencode(path))
        if kind in (stat.S_IFREG, stat.S_IFDIR):
            entry.xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    return image


def write_tree(image: Image, top: str, *, read_only: bool = False) -> None:
    """Fill the empty directory `top`. Owners are kept where we may set them."""
    for relative, entry in image.items():
        path = os.path.join(top, relative) if relative else top
        kind = stat.S_IFMT(entry.mode)
        if entry.link_to is not None:
            os.link(os.path.join(top, entry.link_to), path, follow_symlinks=False)
        elif kind == stat.S_IFDIR:
            if relative:
                os.mkdir(path, 0o700)
        elif kind == stat.S_IFLNK:
            os.symlink(entry.data, os.fsencode(path))
        elif kind == stat.S_IFREG:
            _write_file(path, entry.data)
        else:
            os.mknod(path, kind | 0o600)
    # Backwards: a directory's time and its write permission last, when nothing in it changes any more.
    for relative, entry in reversed(image.items()):
        path = os.path.join(top, relative) if relative else top
        if entry.link_to is not None:
            continue
        if os.geteuid() == 0:
            os.chown(path, *entry.owner, follow_symlinks=False)
        if not stat.S_ISLNK(entry.mode):
            for name, value in entry.xattrs.items():
                os.setxattr(path, name, value)
            os.chmod(path, stat.S_IMODE(entry.mode) & (0o7555 if read_only else 0o7777))
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)


def _write_file(path: str, data: bytes) -> None:
    """Blocks of zeros are left out, so that a sparse file stays one."""
    with open(path, "xb", buffering=0) as file:
        file.truncate(len(data))
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            if block.count(0) != len(block):
                os.pwrite(file.fileno(), block, start)


def remove(path: str) -> None:
    """A file or a whole tree, read-only directories included; absent is done."""
    if os.path.islink(path) or not os.path.isdir(path):
        if os.path.lexists(path):
            os.unlink(path)
        return
    os.chmod(path, 0o700)
    for directory, names, _ in os.walk(path):
        for name in names:
            if not os.path.islink(os.path.join(directory, name)):
                os.chmod(os.path.join(directory, name), 0o700)
    shutil.rmtree(path)
