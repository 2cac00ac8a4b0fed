"""Where a take's time goes: takes by `bench_child`. No hook in the product is needed: the Provider interface is where
the phases meet. Time is exclusive (what an import costs inside a phase counts as import), and the phases sum up to
the whole."""

from __future__ import annotations

import ast
import subprocess
import time
from pathlib import Path

from tests.bench.bench_kit import Install

CHILD = Path(__file__).with_name("bench_child.py")
NAMES = {
    "start": "interpreter starts",
    "imports": "imports",
    "rest": "command line, config, target, plan, locks",
    "check": "storage: claim and check",
    "storage": "storage: birth record and snapshot",
    "seal": "storage: marks and seal",
    "read back": "storage: read back",
    "exit": "interpreter ends",
}


def measure(install: Install, words: list[str], report: Path) -> tuple[dict[str, float], int, str]:
    """(ms by phase, number of modules loaded, stdout) of one take with these words, in a fresh interpreter."""
    began = time.monotonic()
    done = subprocess.run(
        [install.python, "-P", "-m", "bench_child", repr(began), str(report), *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=install.environment,
        cwd="/",
    )
    ended = time.monotonic()
    if done.returncode != 0:
        raise RuntimeError(f"take: exit {done.returncode}: {done.stderr[-500:]}")
    found = ast.literal_eval(report.read_text())
    spent: dict[str, float] = found["spent"]
    spent["exit"] = ended - found["ended"]
    return {phase: spent[phase] * 1000 for phase in NAMES}, found["modules"], done.stdout
