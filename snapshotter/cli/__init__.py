"""The command line. It parses, calls one verb, prints. A command is loaded when it is called, and what its verb needs
when that verb runs: `snapshotter --help` must stay as quick as the library that parses it.

stdout carries the answer (`--json`: one object, schema 1); warnings, progress and errors go to stderr.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

import click

from snapshotter import __version__
from snapshotter.cli.call import complain, mute, print_json
from snapshotter.core.errors import Exit, PreconditionError, SnapshotterError, Told, UsageError

#: Command -> module of this package that has it, under its name (`list`: `list_command`), in the order of --help.
COMMANDS = {
    "take": "sets",
    "list": "sets",
    "show": "sets",
    "restore": "restoring",
    "resync": "restoring",
    "release": "sets",
    "delete": "sets",
    "verify": "sets",
    "pin": "sets",
    "unpin": "sets",
    "prune": "upkeep",
    "tick": "upkeep",
    "reap": "sets",
    "status": "watching",
    "doctor": "watching",
    "schedule": "watching",
    "init": "nodes",
    "identity": "nodes",
    "profile": "nodes",
    "providers": "nodes",
}


class Commands(click.Group):
    """A group whose commands are loaded when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        from importlib import import_module

        module = import_module(f"snapshotter.cli.{COMMANDS[name]}")
        command: click.Command = getattr(module, "list_command" if name == "list" else name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
             epilog="A TARGET is a node's name from the config, or a path. "
             "A SET is an id, a prefix of one, latest[:TARGET] or latest-verified[:TARGET].")  # fmt: skip
@click.version_option(__version__, prog_name="snapshotter")
def cli() -> None:
    """Hot backups of a node's data path by storage snapshots, and restores from them."""


def _fail(error: Told, as_json: bool) -> int:
    complain(f"error: {error.line()}")
    if as_json:
        try:
            print_json({"error": error.as_json()})
        except OSError:
            mute(sys.stdout)
    return int(error.exit)


def run(argv: list[str]) -> int:
    """Run one command; returns its exit code. No exception of ours or of the operator's doing gets out."""
    from snapshotter.core import interrupts

    interrupts.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # a path that isn't UTF-8 is printed as its bytes
    # click parses --json only when the rest parses; an error object is owed also when it doesn't.
    as_json = "--json" in argv
    verbose = "-v" in argv or "--verbose" in argv
    try:
        cli.main(argv, prog_name="snapshotter", standalone_mode=False)
        return 0
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except Told as error:
        if verbose:
            _traceback()
        return _fail(error, as_json)
    except click.Abort:
        return _fail(UsageError("not confirmed: nothing was changed"), as_json)
    except click.ClickException as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # since 8.2; its message is the help
            with suppress(OSError):
                error.show()
            return int(Exit.USAGE)
        return _fail(UsageError(error.format_message().rstrip("."), cure="see --help"), as_json)
    except OSError as error:
        if verbose:
            _traceback()
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        return _fail(PreconditionError(error.strerror or str(error), object=where, cure="-v shows where"), as_json)
    except Exception as error:
        if verbose:
            _traceback()
        bug = SnapshotterError(f"a bug of ours: {type(error).__name__}: {error}", cure="run it with -v and report that")
        return _fail(bug, as_json)


def _traceback() -> None:
    import traceback

    traceback.print_exc()


def main() -> int:
    """Run the words that the process was given; returns its exit code. What `__main__` calls."""
    return run(sys.argv[1:])
