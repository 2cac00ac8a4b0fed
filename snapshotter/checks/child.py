"""One check of one database in a process of its own: `python -m snapshotter.checks.child KIND LEVEL CRASH PATH`.
Prints `ready`, then the finding as JSON. Must not know what is made of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from snapshotter.checks import Outcome, check_here

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    """Who asked may be killed: then a terabyte need not be read to its end."""
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    kind, level, crash, path = sys.argv[1:5]
    answer = os.fdopen(os.dup(1), "w")  # engines may print: to stderr with that
    os.dup2(2, 1)
    print("ready", file=answer, flush=True)
    failed = check_here(kind, int(level), path, crash == "crash")
    said = [Outcome.OK, "", False] if failed is None else [failed.outcome, failed.why, failed.no_check]
    print(json.dumps(said), file=answer, flush=True)
    os._exit(0)  # an engine's own end may hang on, or fall over, what was found to be damaged


if __name__ == "__main__":
    main()
