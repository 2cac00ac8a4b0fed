"""`snapshotter`, and `python -m snapshotter`: makes the process fit to run a command in, loads it, and ends it."""

import gc
import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """The console script."""
    make_fit()
    from snapshotter.cli import main as command

    leave(command())


def make_fit() -> None:
    """What must be so before anything is loaded."""
    # Until the command has its own handlers, Ctrl-C ends it without a word: nothing was done yet.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Modules, and ten thousand sets, are many objects and no cycles. Not off: a long run may make some.
    gc.set_threshold(100_000, 50, 50)
    # cron and others may start us with descriptors closed: a file that we open must not become our stderr.
    closed = []
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            closed.append(fd)
    if 1 in closed:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if 2 in closed:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def leave(code: int) -> NoReturn:
    """End the process. Not by `sys.exit` where nothing speaks against it: the interpreter would free object by object
    what the kernel frees at once, and that takes longer than a snapshot."""
    import atexit
    import threading

    if threading.active_count() == 1:
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        except OSError:
            pass  # the interpreter says what is to be said of that
    gc.freeze()  # else it ends with a search for cycles in all that was imported
    sys.exit(code)


if __name__ == "__main__":
    main()
