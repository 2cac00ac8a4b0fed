"""Where a take's time goes. `measure` runs takes; run as a program, this file is such a take: the command's own `main`
with a clock around the provider's methods and every import. No hook in the product is needed: the Provider interface
is where the phases meet.

Time is exclusive: what an import costs inside a phase counts as import. The phases sum up to the whole.
"""

from __future__ import annotations

import builtins
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

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
_METHODS = {
    "availability": "check",
    "claim": "check",
    "check": "check",
    "prepare": "storage",
    "create": "storage",
    "mark": "seal",
    "snapshots": "read back",
    "attachments": "read back",
}


class Clock:
    """Time since the last change of phase is charged to the innermost one."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(NAMES, 0.0)
        self.stack = ["rest"]
        self.since = time.monotonic()

    def charge(self) -> float:
        now = time.monotonic()
        self.spent[self.stack[-1]] += now - self.since
        self.since = now
        return now

    def inside(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.charge()
            self.stack.append(phase)
            try:
                made = function(*args, **kwargs)
                # A generator does its work later, in somebody else's phase: let it do it here.
                return iter(list(made)) if hasattr(made, "__next__") else made
            finally:
                self.charge()
                self.stack.pop()

        return call


def main() -> None:
    """argv: started (time.monotonic() s of who started us), where to write the report, the command's words."""
    clock = Clock()
    clock.spent["start"] = clock.since - float(sys.argv[1])
    where = sys.argv[2]
    builtins.__import__ = clock.inside("imports", builtins.__import__)
    import importlib

    importlib.import_module = clock.inside("imports", importlib.import_module)
    from snapshotter import cli, provider

    plain = provider.load

    def load(name: str) -> type[provider.Provider]:
        kind = plain(name)
        for method, phase in _METHODS.items():
            function = getattr(kind, method)
            if not hasattr(function, "__wrapped__"):
                setattr(kind, method, clock.inside(phase, function))
        return kind

    provider.load = load
    run = cli.run

    def timed(words: list[str]) -> int:
        code = run(words)
        ended = clock.charge()
        with open(where, "w", encoding="ascii") as file:
            json.dump({"ended": ended, "spent": clock.spent, "modules": len(sys.modules)}, file)
        return code

    cli.run = timed
    sys.argv = ["snapshotter", *sys.argv[3:]]
    cli.main()


def measure(python: str, words: list[str], env: dict[str, str], report: str) -> tuple[dict[str, float], int, str]:
    """(ms by phase, number of modules loaded, stdout) of one take with these words, in a fresh interpreter."""
    began = time.monotonic()
    done = subprocess.run(
        [python, "-P", os.path.abspath(__file__), repr(began), report, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=env,
        cwd="/",
    )
    ended = time.monotonic()
    if done.returncode != 0:
        raise RuntimeError(f"take: exit {done.returncode}: {done.stderr[-500:]}")
    with open(report, encoding="ascii") as file:
        found = json.load(file)
    spent: dict[str, float] = found["spent"]
    spent["exit"] = ended - found["ended"]
    return {phase: seconds * 1000 for phase, seconds in spent.items()}, found["modules"], done.stdout


if __name__ == "__main__":
    main()
