"""The tools that are compared, each as `turn()`: take, list, restore, delete once, timed, and clean up what that
leaves. All on one btrfs; `top` is its top level, `top/data` the subvolume that is taken. A tool that copies has ended
when its copy is on the disk (`sync -f`), as a snapshot is when the command returns.
"""

from __future__ import annotations

import json
import platform
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from tests.bench.bench_kit import Install, environment, quietly, timed

Turn = dict[str, float]  # verb -> ms; a tool that has no such verb leaves it out


class Tool(ABC):
    """One way to back up `top/data`. `needs` are the commands without which it is left out."""

    name: str
    needs: tuple[str, ...] = ()
    copies = False  # slow: takes part in few rounds

    def __init__(self, top: Path) -> None:
        self.top = top
        self.data = top / "data"
        self.made = top / "made"  # what this tool makes is put here
        self.made.mkdir(exist_ok=True)

    def missing(self) -> list[str]:
        return [name for name in self.needs if shutil.which(name, path=environment()["PATH"]) is None]

    def prepare(self) -> None:
        """Its config, and a first turn's worth of warming up."""

    @abstractmethod
    def turn(self) -> Turn: ...


class Snapshotter(Tool):
    def __init__(self, top: Path, install: Install, clones: Path, provider: str) -> None:
        super().__init__(top)
        self.name = f"snapshotter, {provider}"
        self.install = install
        self.clones = clones
        self.provider = provider

    def run(self, *words: str) -> tuple[float, dict[str, object]]:
        done = timed(self.install.argv(*words), self.install.environment)
        return done.ms, json.loads(done.out)

    def take(self, data: Path | None = None) -> tuple[float, str]:
        options = ["-o", f"store={self.top}/made/copies"] if self.provider == "copy" else []
        ms, taken = self.run("take", str(data or self.data), "--provider", self.provider, *options)
        if self.provider == "btrfs" and taken["quiesce"] != "none":
            raise RuntimeError(f"one subvolume needs no quiesce, and this take had {taken['quiesce']}")
        return ms, str(taken["set_id"])

    def restore(self, set_id: str) -> float:
        """Timed without the `release` after it."""
        clone = self.clones / set_id
        ms, _ = self.run("restore", set_id, "--to", str(clone))
        self.run("release", str(clone), "--discard-changes")
        return ms

    def delete(self, set_id: str) -> float:
        return self.run("delete", set_id, "--yes", "--last")[0]

    def prepare(self) -> None:
        self.turn()

    def turn(self) -> Turn:
        took, set_id = self.take()
        listed, _ = self.run("list")
        restored = self.restore(set_id)
        return {"take": took, "list": listed, "restore": restored, "delete": self.delete(set_id)}


class Raw(Tool):
    name = "btrfs subvolume snapshot -r"
    needs = ("btrfs",)

    def turn(self) -> Turn:
        image, clone = str(self.made / "raw"), str(self.made / "raw-clone")
        turn = {"take": timed(["btrfs", "subvolume", "snapshot", "-r", str(self.data), image]).ms}
        turn["list"] = timed(["btrfs", "subvolume", "list", "-r", str(self.top)]).ms
        turn["restore"] = timed(["btrfs", "subvolume", "snapshot", image, clone]).ms
        quietly("btrfs", "subvolume", "delete", clone)
        turn["delete"] = timed(["btrfs", "subvolume", "delete", image]).ms
        return turn


class Btrbk(Tool):
    name = "btrbk"
    needs = ("btrbk", "btrfs")

    def prepare(self) -> None:
        (self.made / "btrbk").mkdir(exist_ok=True)
        self.config = self.made / "btrbk.conf"
        # One that is as quick as it can be: nothing to prune, no target.
        self.config.write_text(
            "timestamp_format long-iso\nsnapshot_preserve_min all\n"
            f"snapshot_dir made/btrbk\nvolume {self.top}\n  subvolume data\n"
        )
        self.turn()

    def turn(self) -> Turn:
        turn = {"take": timed(["btrbk", "-q", "-c", str(self.config), "snapshot"]).ms}
        turn["list"] = timed(["btrbk", "-c", str(self.config), "list", "snapshots"]).ms
        made = list((self.made / "btrbk").iterdir())
        if len(made) != 1:
            raise RuntimeError(f"btrbk made {len(made)} snapshots, not one")
        quietly("btrfs", "subvolume", "delete", str(made[0]))  # it has no verb for one snapshot
        return turn


class Snapper(Tool):
    """Under a root of its own on the file system, so that this host's /etc/snapper stays as it is."""

    name = "snapper --no-dbus"
    needs = ("snapper", "btrfs")

    def prepare(self) -> None:
        for directory in ("etc/snapper/configs", "etc/default", "var/log"):
            (self.top / directory).mkdir(parents=True, exist_ok=True)
        (self.top / "etc/snapper/configs/data").write_text('SUBVOLUME="/snapped"\nFSTYPE="btrfs"\n')
        (self.top / "etc/default/snapper").write_text('SNAPPER_CONFIGS="data"\n')
        # The same content, but its own: snapper's store is a subvolume inside what it snapshots.
        timed(["btrfs", "subvolume", "snapshot", str(self.data), str(self.top / "snapped")])
        timed(["btrfs", "subvolume", "create", str(self.top / "snapped" / ".snapshots")])
        self.turn()

    def turn(self) -> Turn:
        snapper = ["snapper", "--no-dbus", "--root", str(self.top), "-c", "data"]
        took = timed([*snapper, "create", "--print-number"])
        turn = {"take": took.ms, "list": timed([*snapper, "list"]).ms}
        turn["delete"] = timed([*snapper, "delete", took.out.strip()]).ms
        return turn


class Copier(Tool):
    """A command that copies the whole tree, and one that copies it back."""

    copies = True

    def __init__(self, top: Path, name: str, take: Sequence[str], restore: Sequence[str]) -> None:
        super().__init__(top)
        self.name = name
        self.needs = (take[0],)
        self._commands = {"take": take, "restore": restore}

    def _run(self, verb: str, source: Path, to: Path) -> float:
        argv = [word.format(source=source, to=to) for word in self._commands[verb]]
        return timed(["sh", "-c", '"$@" && sync -f "$0"', str(to), *argv]).ms

    def turn(self) -> Turn:
        image, clone = self.made / "copied", self.made / "copied-back"
        if self.name == "tar":
            clone.mkdir()
        elif self.name == "rsync -a":
            image.mkdir()
        turn = {"take": self._run("take", self.data, image), "restore": self._run("restore", image, clone)}
        shutil.rmtree(clone)
        turn["delete"] = timed(["rm", "-rf", str(image)]).ms
        return turn


def copiers(top: Path) -> list[Tool]:
    reflink = ["cp", "-a", "--reflink=always", "{source}", "{to}"]
    plain = ["cp", "-a", "--reflink=never", "{source}", "{to}"]
    rsync = ["rsync", "-a", "{source}/", "{to}/"]
    return [
        Copier(top, "cp -a --reflink", reflink, reflink),
        Copier(top, "cp -a", plain, plain),
        Copier(top, "rsync -a", rsync, rsync),
        Copier(top, "tar", ["tar", "-cf", "{to}", "-C", "{source}", "."], ["tar", "-xf", "{source}", "-C", "{to}"]),
    ]


def versions() -> str:
    """Of the tools, for the record."""
    words = []
    for argv in (["btrfs", "--version"], ["btrbk", "--version"], ["snapper", "--version"], ["tar", "--version"]):
        if shutil.which(argv[0], path=environment()["PATH"]):
            said = timed(argv).out.splitlines()[0]
            words.append(said.replace("command line client, version ", "").replace("(GNU tar) ", ""))
    return ", ".join(words) + f", Python {platform.python_version()}"
