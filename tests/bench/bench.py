"""The bench: one run on a btrfs of its own on a loop device, ratios inside that run. Run it through scripts/bench.

Prints the tables and each bar with its verdict; exits 1 if a bar fails, 3 if it can't run here.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import bench_gap, bench_phases
from tests.bench.bench_kit import (
    CHECKOUT,
    Install,
    Spread,
    ended_by_signals,
    fill,
    forget,
    no_mounts_left,
    quietly,
    spread,
    timed,
)
from tests.bench.bench_tools import Btrbk, Raw, Snapper, Snapshotter, Tool, copiers, versions
from tests.support import loop_file_system

RESULTS = CHECKOUT / "tests" / "bench" / "RESULTS.md"
BEGIN, END = "<!-- scripts/bench writes from here -->", "<!-- to here -->"
VERBS = ("take", "list", "restore", "delete")


@dataclass(frozen=True)
class Scale:
    """How much is done. Sizes in MB."""

    rounds: int
    copy_rounds: int
    data: int
    gap_rounds: int
    restore_sizes: tuple[int, ...]
    restore_rounds: int
    phase_rounds: int
    disk: int  # of the sparse image; it takes what is written to it


FULL = Scale(25, 3, 500, 40, (50, 500, 5000), 7, 20, 24_000)
QUICK = Scale(7, 1, 50, 10, (50, 250), 3, 5, 4_000)


@dataclass
class Report:
    """What goes to the terminal and, with --write, to RESULTS.md."""

    lines: list[str] = field(default_factory=list)
    failed: int = 0

    def say(self, line: str = "") -> None:
        self.lines.append(line)
        print(line, flush=True)

    def table(self, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
        for row in [head, tuple("-" * (width - 1) + (":" if k else "-") for k, width in enumerate(widths)), *rows]:
            cells = [cell.rjust(width) if k else cell.ljust(width) for k, (cell, width) in enumerate(zip(row, widths))]
            self.say(f"| {' | '.join(cells)} |")

    def bar(self, what: str, passed: bool | None, found: str) -> None:
        """`passed` None: could not be judged here."""
        self.failed += passed is False
        verdict = {True: "pass", False: "FAIL", None: "not judged"}[passed]
        self.say(f"- bar: {what}: **{verdict}**: {found}")


def shown(found: Spread | None, digits: int = 0) -> str:
    if found is None:
        return "-"
    return f"{found.median:.{digits}f} ({found.low:.{digits}f}-{found.high:.{digits}f})"


# ---------------------------------------------------------------------------------------------------- the verbs


def verbs(report: Report, scale: Scale, top: Path, install: Install, clones: Path) -> None:
    everything: list[Tool] = [
        Raw(top),
        Snapper(top),
        Btrbk(top),
        Snapshotter(top, install, clones, "btrfs"),
        Snapshotter(top, install, clones, "copy"),
        *copiers(top),
    ]
    tools = [tool for tool in everything if not tool.missing()]
    for tool in tools:
        if not tool.copies:
            tool.prepare()
    turns: dict[str, list[dict[str, float]]] = {tool.name: [] for tool in tools}
    for number in range(scale.rounds):
        shift = number % len(tools)
        for tool in tools[shift:] + tools[:shift]:
            if not tool.copies or number < scale.copy_rounds:
                turns[tool.name].append(tool.turn())
    found: dict[tuple[str, str], Spread] = {}
    for tool in tools:
        for verb in VERBS:
            if times := [turn[verb] for turn in turns[tool.name] if verb in turn]:
                found[tool.name, verb] = spread(times)
    report.say(
        f"\n### The verbs, {scale.data} MB in one subvolume: ms, median (10th-90th percentile), by turns, "
        f"{scale.rounds} rounds (those that copy: {scale.copy_rounds}, each with its `sync -f`)\n"
    )
    raw = Raw.name
    rows = []
    for tool in tools:
        times = [shown(found.get((tool.name, verb))) for verb in VERBS]
        ratio = found[tool.name, "take"].median / found[raw, "take"].median
        rows.append((tool.name, *times, f"{ratio:.1f}x"))
    report.table(("", "take", "list", "restore --to", "delete", "take / raw"), rows)
    report.say()
    for tool in everything:
        if tool not in tools:
            report.say(f"- not here: {tool.name}: {', '.join(tool.missing())} missing")
    what = "`take` on btrfs no slower than `btrbk snapshot`"
    ours, theirs = found.get(("snapshotter, btrfs", "take")), found.get((Btrbk.name, "take"))
    if ours is None or theirs is None:
        report.bar(what, None, "btrbk is missing")
    else:
        ratio = ours.median / theirs.median
        report.bar(what, ratio <= 1, f"{ours.median:.0f} ms to {theirs.median:.0f} ms, {ratio:.2f}x")


# -------------------------------------------------------------------------------------------------- where it goes


def phases(report: Report, scale: Scale, install: Install, tool: Snapshotter) -> None:
    words = ["take", str(tool.data), "--provider", "btrfs", "--json", "--config", str(install.config)]
    found: list[dict[str, float]] = []
    modules = 0
    for _ in range(scale.phase_rounds):
        spent, modules, out = bench_phases.measure(install, words, install.config.with_name("phases"))
        found.append(spent)
        tool.delete(out.partition('"set_id":"')[2].partition('"')[0])
    whole = spread([sum(spent.values()) for spent in found])
    report.say(
        f"\n### Where a take's time goes: ms, median of {scale.phase_rounds} (the clock itself adds to imports; "
        f"{modules} modules are loaded)\n"
    )
    rows = []
    for phase, name in bench_phases.NAMES.items():
        part = spread([spent[phase] for spent in found])
        rows.append((name, shown(part, 1), f"{part.median / whole.median:.0%}"))
    report.table(("", "ms", "share"), [*rows, ("the whole take", shown(whole, 1), "")])


# --------------------------------------------------------------------------------------------------- the writer


def gaps(report: Report, scale: Scale, top: Path, home: Path, tool: Snapshotter) -> None:
    timed(["btrfs", "subvolume", "create", str(top / "busy")])
    made: list[str] = []

    def raw() -> None:
        image = str(top / "made" / f"busy-{len(made)}")
        made.append(image)
        timed(["btrfs", "subvolume", "snapshot", "-r", str(top / "busy"), image])

    def take() -> None:
        sets.append(tool.take(top / "busy")[1])

    sets: list[str] = []
    acts = {"in quiet": lambda: None, "the raw command": raw, "take": take}
    found = {
        name: spread(times)
        for name, times in bench_gap.measure(top / "busy", home / "stamps", scale.gap_rounds, acts).items()
    }
    for image in made:
        quietly("btrfs", "subvolume", "delete", image)
    for set_id in sets:
        tool.delete(set_id)
    report.say(
        f"\n### The writer's longest gap between two synced writes in a window of {bench_gap.WINDOW_S:g} s: ms, "
        f"{scale.gap_rounds} windows of each kind, by turns; it also writes 5 MB/s unsynced\n"
    )
    report.table(("", "longest gap"), [(name, shown(each, 1)) for name, each in found.items()])
    report.say()
    ratio = found["take"].median / found["the raw command"].median
    report.bar("the writer's longest gap during a take at most 1.5x the raw command's", ratio <= 1.5, f"{ratio:.2f}x")


# --------------------------------------------------------------------------------------------------- the restore


def restores(report: Report, scale: Scale, top: Path, tool: Snapshotter) -> None:
    clones: dict[int, Spread] = {}
    tars: dict[int, Spread] = {}
    archive, out = top / "made" / "archive.tar", top / "made" / "extracted"
    sets: dict[int, str] = {}
    for size in scale.restore_sizes:
        data = top / f"node-{size}"
        timed(["btrfs", "subvolume", "create", str(data)])
        fill(data, size)
        sets[size] = tool.take(data)[1]
    by_turns: dict[int, list[float]] = {size: [] for size in sets}
    for _ in range(scale.restore_rounds):
        for size, set_id in sets.items():
            by_turns[size].append(tool.restore(set_id))
    for size, set_id in sets.items():
        clones[size] = spread(by_turns[size])
        data = top / f"node-{size}"
        times = []
        timed(["tar", "-cf", str(archive), "-C", str(data), "."])
        for _ in range(1 if size == max(sets) else 3):
            out.mkdir()
            forget(archive)
            argv = ["tar", "-xf", str(archive), "-C", str(out)]
            times.append(timed(["sh", "-c", '"$@" && sync -f "$0"', str(out), *argv]).ms)
            shutil.rmtree(out)
        tars[size] = spread(times)
        archive.unlink()
        tool.delete(set_id)
        timed(["btrfs", "subvolume", "delete", str(data)])
    report.say(
        "\n### A path brought back: ms. `restore --to` by clone, to the mounted clone; `tar -xf` with `sync -f`, the "
        "archive not in the page cache\n"
    )
    rows = [
        (f"{size} MB", shown(clones[size]), shown(tars[size]), f"{tars[size].median / clones[size].median:.1f}x")
        for size in clones
    ]
    report.table(("", f"restore --to, {scale.restore_rounds} times", "tar -xf", "tar / restore"), rows)
    report.say()
    smallest, largest = min(clones), max(clones)
    ratio = tars[largest].median / clones[largest].median
    what = "restore by clone at least 100x faster than `tar -x` at 5 GB"
    if largest < 5000:
        report.bar(what, None, f"--quick stops at {largest} MB, there {ratio:.0f}x")
    else:
        report.bar(what, ratio >= 100, f"{ratio:.0f}x")
    growth = clones[largest].median / clones[smallest].median
    report.bar(
        "restore by clone flat in size (at most 1.25x from the smallest to the largest)",
        growth <= 1.25,
        f"{growth:.2f}x from {smallest} MB to {largest} MB",
    )


# ------------------------------------------------------------------------------------------------------ the run


def refusal() -> str:
    """'' if the bench can run here, else why not."""
    if os.geteuid() != 0:
        return "needs root: loop devices and mounts; run it as root"
    missing = [name for name in ("mkfs.btrfs", "btrfs", "losetup", "mount") if not shutil.which(name)]
    if missing:
        return f"missing here: {', '.join(missing)}; install btrfs-progs, mount"
    with open("/proc/filesystems", encoding="ascii") as file:
        if "btrfs" not in file.read():
            quietly("modprobe", "btrfs")
    with open("/proc/filesystems", encoding="ascii") as file:
        return "" if "btrfs" in file.read() else "this kernel has no btrfs"


def machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{os.cpu_count()} CPUs ({model or platform.machine()}), {memory:.0f} GB, kernel {platform.release()}"


def bench(report: Report, scale: Scale, home: Path) -> None:
    began = time.monotonic()
    install = Install(home)
    clones = home / "clones"
    clones.mkdir()
    with loop_file_system("btrfs", home, scale.disk) as top, no_mounts_left(home):
        report.say(f"- when: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC")
        report.say(f"- machine: {machine()}; btrfs on a sparse loop file")
        report.say(f"- with: {versions()}")
        timed(["btrfs", "subvolume", "create", str(top / "data")])
        fill(top / "data", scale.data)
        tool = Snapshotter(top, install, clones, "btrfs")
        verbs(report, scale, top, install, clones)
        phases(report, scale, install, tool)
        gaps(report, scale, top, home, tool)
        restores(report, scale, top, tool)
    report.say(f"\nThe run took {time.monotonic() - began:.0f} s.")


def write(lines: list[str]) -> None:
    """Our part of RESULTS.md anew; the rest of it is left as it is."""
    text = RESULTS.read_text() if RESULTS.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    RESULTS.write_text(before + BEGIN + "\n\n" + "\n".join(lines).strip() + "\n\n" + END + after)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Ratios against raw commands and other tools.")
    parser.add_argument("--quick", action="store_true", help="small and short (a minute and a half)")
    parser.add_argument("--write", action="store_true", help="write the numbers to tests/bench/RESULTS.md")
    given = parser.parse_args()
    if why := refusal():
        print(f"error: the bench {why}", file=sys.stderr)
        return 3
    ended_by_signals()
    report = Report()
    report.say(f"## `{shlex.join(['scripts/bench', *sys.argv[1:]])}`\n")
    with ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="snapshotter-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")))
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        bench(report, QUICK if given.quick else FULL, home)
    if given.write:
        write(report.lines)
    return 1 if report.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: everything is undone", file=sys.stderr)
        sys.exit(130)
