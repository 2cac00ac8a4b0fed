"""`snapshotter`, and `python -m snapshotter`: makes the process fit to run a command in, then loads it."""

import os
import signal
import sys


def main() -> None:
    """The console script."""
    # Until the command has its own handlers, Ctrl-C ends it without a word: nothing was done yet.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
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
    from snapshotter.cli import main as command

    command()


if __name__ == "__main__":
    main()
