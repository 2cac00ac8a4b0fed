"""The bench inside the lab: `take` on LVM and ZFS beside the raw command and other tools, and what `list`, `take
--dry-run` and `prune --dry-run` cost over 2,000 snapshots. An emulated CPU: only ratios inside one run say anything.

`scripts/bench --lab` runs it in the virtual machine. Ends with 1 if a bar fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from snapshotter.testing import make_birth
from tests.bench import bench_phases
from tests.bench.bench import Report, shown
from tests.bench.bench_kit import CHECKOUT, Spread, environment, spread, timed
from tests.lab import lvm_kit, zfs_kit

PEERS = Path("/opt/peers")
SETS, GROUPS, MEMBERS = 1000, 20, 2  # 2,000 snapshots of 40 datasets


class Here:
    """snapshotter as the lab has it, byte-compiled, with a place of its own."""

    def __init__(self, home: Path) -> None:
        self.python = sys.executable
        self.config = home / "config.toml"
        self.config.write_text(f'state = "{home}/state"\n')
        paths = f"{CHECKOUT}:{CHECKOUT / 'tests' / 'bench'}"
        self.environment = environment(
            {
                "HOME": str(home),
                "SNAPSHOTTER_RUN": str(home / "run"),
                "PYTHONPATH": paths,
                "PYTHONDONTWRITEBYTECODE": "1",
            }
        )

    def argv(self, *words: str) -> list[str]:
        return [self.python, "-P", "-m", "snapshotter", *words, "--json", "--config", str(self.config)]


class Way(ABC):
    """One way to take an image, and to be rid of all it made. `missing` says why it can't be had here."""

    name = ""
    missing = ""

    @abstractmethod
    def take(self) -> dict[str, float]:
        """ms: `whole`, and where it can be told `storage`, from the first storage command to the seal."""

    @abstractmethod
    def clear(self) -> None: ...


class Ours(Way):
    name = "snapshotter take"

    def __init__(self, here: Here, path: str, clear: Callable[[], None], *options: str) -> None:
        self.here, self.path, self.options = here, path, options
        self._clear = clear

    def take(self) -> dict[str, float]:
        words = ["take", self.path, "--json", "--config", str(self.here.config), *self.options]
        spent, _, out = bench_phases.measure(self.here, words, self.here.config.with_name("phases"))
        if not json.loads(out)["good"]:
            raise RuntimeError(f"no good set: {out}")
        return {"whole": sum(spent.values()), "storage": spent["storage"] + spent["seal"]}

    def clear(self) -> None:
        self._clear()


class Program(Way):
    """A command of another tool's, or the raw one."""

    def __init__(self, name: str, argv: list[str], clear: Callable[[], None], before: Callable[[], None] | None = None):
        self.name, self.argv, self._clear, self._before = name, argv, clear, before

    def take(self) -> dict[str, float]:
        if self._before is not None:
            self._before()
        ms = timed(self.argv).ms
        return {"whole": ms, "storage": ms}

    def clear(self) -> None:
        self._clear()


def by_turns(ways: list[Way], rounds: int) -> dict[str, dict[str, Spread]]:
    """Each once a round, another one first each time; one that fails in its first turn is left out and says why."""
    for way in ways:
        try:
            way.take()
        except (RuntimeError, OSError) as error:
            if isinstance(way, Ours) or "raw" in way.name:
                raise
            way.missing = str(error)
        finally:
            way.clear()
    there = [way for way in ways if not way.missing]
    times: dict[str, list[dict[str, float]]] = {way.name: [] for way in there}
    for number in range(rounds):
        shift = number % len(there)
        for way in there[shift:] + there[:shift]:
            try:
                times[way.name].append(way.take())
            finally:
                way.clear()
    return {
        name: {part: spread([turn[part] for turn in turns]) for part in ("whole", "storage")}
        for name, turns in times.items()
    }


def tell(report: Report, what: str, ways: list[Way], rounds: int, most: float) -> None:
    found = by_turns(ways, rounds)
    raw = found[ways[0].name]["whole"].median
    report.say(f"\n### {what}: ms, median (10th-90th percentile), {rounds} rounds by turns\n")
    rows = [
        (name, shown(each["storage"]), shown(each["whole"]), f"{each['whole'].median / raw:.1f}x")
        for name, each in found.items()
    ]
    report.table(("", "first storage command to seal", "whole command", "whole / raw"), rows)
    report.say()
    for way in ways:
        if way.missing:
            report.say(f"- not to be had: {way.name}: {way.missing[-300:]}")
    ours = found[Ours.name]["storage"].median
    report.bar(f"{what}: storage to seal at most {most}x raw", ours / raw <= most, f"{ours / raw:.2f}x")


# ---------------------------------------------------------------------------------------------------------------- LVM


@contextmanager
def lvm_volume(made: lvm_kit.Storage, name: str, thin: bool, home: Path) -> Iterator[Path]:
    (made.thin if thin else made.linear)(name, 200)
    lvm_kit.make_file_system(f"/dev/{made.vg}/{name}", "ext4")
    point = home / name
    point.mkdir()
    lvm_kit.lvm("mount", f"/dev/{made.vg}/{name}", str(point))
    (point / "data").write_bytes(os.urandom(10 << 20))
    lvm_kit.lvm("sync", "-f", str(point))
    try:
        yield point
    finally:
        lvm_kit.unmount(f"/dev/mapper/{made.vg}-{name}")


def on_lvm(report: Report, here: Here, home: Path, rounds: int) -> None:
    tools = home / "tools"
    tools.mkdir()
    (tools / "journalctl").symlink_to("/bin/true")  # it flushes the journal first, and here is none
    snapm = ["env", f"PATH={tools}:{os.environ['PATH']}", str(PEERS / "snapm" / "bin" / "snapm")]
    os.makedirs("/run/snapm", mode=0o700, exist_ok=True)  # as its tmpfiles.d does at boot
    os.makedirs("/boot/loader/entries", exist_ok=True)  # as a boot loader does; snapm looks for its own there
    with lvm_kit.storage(2500, pool_mb=900) as made:
        for thin in (True, False):
            name = "thin" if thin else "classic"
            with lvm_volume(made, name, thin, home) as point:

                def clear(name: str = name) -> None:
                    rows = [row["lv_name"] for row in made.lvs("lv_name,origin") if row["origin"] == name]
                    if rows:
                        lvm_kit.lvm("lvremove", "-qq", "-y", *(f"{made.vg}/{row}" for row in rows))

                def forget_snapm() -> None:
                    subprocess.run([*snapm, "snapset", "delete", "bench"], capture_output=True)
                    clear()

                size = [] if thin else ["-L", "48m"]
                raw = ["lvcreate", "-qq", "-y", "-s", *size, "-n", "raw", f"{made.vg}/{name}"]
                options = [] if thin else ["-o", "size=48m"]
                ways: list[Way] = [
                    Program("raw: lvcreate -s", raw, clear),
                    Ours(here, str(point), clear, *options),
                    Program(
                        "snapm",
                        [*snapm, "snapset", "create", "bench", f"{point}{'' if thin else ':48MiB'}"],
                        forget_snapm,
                    ),
                ]
                tell(report, f"lvm, {name}", ways, rounds, 2.5)


# ---------------------------------------------------------------------------------------------------------------- ZFS


def on_zfs(report: Report, here: Here, home: Path, rounds: int) -> None:
    with zfs_kit.pool(512) as pool:
        name = f"{pool}/data"
        zfs_kit.zfs("create", name)
        point = zfs_kit.claimed(next(m.path for m in zfs_kit.table() if m.source == name)).path or ""
        Path(point, "data").write_bytes(os.urandom(10 << 20))
        zfs_kit.run("zpool", "sync", pool)
        etc = home / "sanoid"
        etc.mkdir()
        (etc / "sanoid.defaults.conf").write_bytes(Path("/usr/share/sanoid/sanoid.defaults.conf").read_bytes())
        (etc / "sanoid.conf").write_text(
            f"[{name}]\nuse_template = t\n[template_t]\nhourly = 1\ndaily = 0\nmonthly = 0\nautosnap = yes\n"
        )
        zfs_kit.zfs("set", "autobackup:bench=true", name)

        def clear() -> None:
            for each in zfs_kit.names(name, "snapshot"):
                zfs_kit.zfs("destroy", each)

        def no_cache() -> None:
            for file in (etc / "cache").glob("*"):
                file.unlink()

        places = [f"--configdir={etc}", f"--cache-dir={etc}/cache", f"--run-dir={etc}/run"]
        autobackup = str(PEERS / "zfs-autobackup" / "bin" / "zfs-autobackup")
        ways: list[Way] = [
            Program("raw: zfs snapshot", ["zfs", "snapshot", f"{name}@raw"], clear),
            Ours(here, point, clear),
            Program("sanoid", ["sanoid", *places, "--take-snapshots"], clear, no_cache),
            Program("zfs-auto-snapshot", ["zfs-auto-snapshot", "-q", "--label=bench", "--keep=9", name], clear),
            Program("zfs-autobackup", [autobackup, "--no-progress", "--allow-empty", "bench"], clear),
        ]
        tell(report, "zfs", ways, rounds, 3.0)


def many(report: Report, here: Here, rounds: int, sets: int) -> None:
    """Sets of two datasets each, as takes leave them, made in one call a set."""
    with zfs_kit.build("openzfs"), zfs_kit.pool(512) as pool:
        library = sys.modules["libzfs_core"]
        groups: list[list[str]] = []
        for number in range(GROUPS):
            top = f"{pool}/g{number}"
            zfs_kit.zfs("create", top)
            below = [f"{top}/{k}" for k in range(MEMBERS - 1)]
            for each in below:
                zfs_kit.zfs("create", each)
            groups.append([top, *below])
        points = {mount.source: mount.path for mount in zfs_kit.table() if mount.source.startswith(f"{pool}/")}
        from providers.zfs import objects
        from snapshotter.core.labels import encode_birth
        from snapshotter.core.model import Volume

        for number in range(sets):
            theirs = groups[number % GROUPS]
            birth = make_birth([Volume("zfs", each, points[each], "zfs") for each in theirs])
            names = [f"{each}@{birth.set_id}-{k}".encode() for k, each in enumerate(theirs)]
            marks = objects.dump({"sealed": "20261122t100630z", "grade": "filesystem"})
            properties = {objects.BIRTH: encode_birth(birth.of_member(0)), objects.MARKS: marks}
            library.lzc_snapshot(names, {key.encode(): value.encode() for key, value in properties.items()})
        path = points[groups[0][0]]
        acts = {
            "raw: zfs list -t snapshot": ["zfs", "list", "-H", "-t", "snapshot", "-o", "name,creation", "-r", pool],
            "snapshotter list": here.argv("list"),
            "snapshotter take --dry-run": here.argv("take", path, "--dry-run"),
            "snapshotter prune --dry-run": here.argv("prune", path, "--dry-run"),
        }
        times: dict[str, list[float]] = {act: [] for act in acts}
        for _ in range(rounds):
            for act, argv in acts.items():
                done = timed(argv, here.environment)
                times[act].append(done.ms)
                if act == "snapshotter list" and len(json.loads(done.out)["sets"]) != sets:
                    raise RuntimeError("list shows another number of sets")
        report.say(
            f"\n### Over {sets * MEMBERS} snapshots of {GROUPS * MEMBERS} datasets, {sets} sets: ms, {rounds} rounds\n"
        )
        raw = spread(times["raw: zfs list -t snapshot"]).median
        report.table(
            ("", "ms", "/ raw"),
            [(act, shown(spread(each)), f"{spread(each).median / raw:.1f}x") for act, each in times.items()],
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench --lab")
    parser.add_argument("--quick", action="store_true", help="two rounds, few snapshots")
    parser.add_argument("--only", choices=("lvm", "zfs", "many"))
    given = parser.parse_args()
    rounds, sets = (2, 40) if given.quick else (7, SETS)
    report = Report()
    report.say(f"## `{shlex.join(['scripts/bench', '--lab', *sys.argv[1:]])}`\n")
    report.say(f"- when: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; kernel {os.uname().release}, emulated")
    began = time.monotonic()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="b-", dir="/var/tmp")))
        here = Here(home)
        if given.only in (None, "lvm"):
            on_lvm(report, here, home, rounds)
        if given.only in (None, "zfs"):
            on_zfs(report, here, home, rounds)
        if given.only in (None, "many"):
            many(report, here, min(3, rounds), sets)
    report.say(f"\nThe run took {time.monotonic() - began:.0f} s.")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
