"""The command line. It parses, calls one verb, prints. Everything a verb needs is imported when that verb runs:
`snapshotter --help` must stay as quick as the library that parses it.

stdout carries the answer (`--json`: one object, schema 1); warnings, progress and errors go to stderr.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import click

from snapshotter import __version__
from snapshotter.core.errors import Exit, PreconditionError, SnapshotterError, UsageError, plain, worst

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from snapshotter.verbs.session import Session

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _complain(line: str) -> None:
    """One line to stderr; if nobody can hear it, that changes nothing."""
    try:
        click.echo(plain(line), err=True)
    except OSError:
        _mute(sys.stderr)


def _mute(stream: TextIO) -> None:
    """Point it elsewhere, so that the interpreter's last flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Call:
    """One run of a command: its common options, and how its answer is printed."""

    def __init__(self, as_json: bool, verbose: bool, config: str | None) -> None:
        self.as_json = as_json
        self.verbose = verbose
        self.config = config

    def session(self, provider: str | None = None, options: tuple[str, ...] = ()) -> Session:
        from snapshotter import human
        from snapshotter.nodes import config
        from snapshotter.verbs.session import Session

        given: dict[str, object] = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise UsageError("is not KEY=VALUE", object=f"-o {option}", cure="for example -o store=/backup/node")
            given[key] = value
        loaded = config.load(self.config)
        if sys.stderr.isatty() and not self.as_json:
            return Session(loaded, provider, given, human.Meter(sys.stderr))
        return Session(loaded, provider, given)

    def answer(self, document: Mapping[str, Any], text: Callable[[], str], exit_code: int = 0) -> None:
        """Print the answer: the document as JSON, or its `text`. Warnings of the document go to stderr."""
        for warning in document.get("warnings") or ():
            _complain(f"warning: {warning}")
        try:
            if self.as_json:
                _print_json(document)
            elif shown := text():
                click.echo(shown)
        except BrokenPipeError:  # the reader (head, less) has gone: what was to be done is done
            _mute(sys.stdout)
        if exit_code:
            sys.exit(exit_code)


def common(function: Callable[..., None]) -> Callable[..., None]:
    """--json, -v and --config, on every command; the function gets them as a `Call`."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")
    @click.option("--config", metavar="FILE", help="Use this config instead of the usual places.")
    @functools.wraps(function)
    def with_call(*args: Any, as_json: bool, verbose: bool, config: str | None, **rest: Any) -> None:
        click.get_current_context().obj = Call(as_json, verbose, config)
        function(click.get_current_context().obj, *args, **rest)

    return with_call


def from_host(function: Callable[..., None]) -> Callable[..., None]:
    """--from-host, for verbs that act on one set."""
    return click.option("--from-host", is_flag=True, help="Allow a set taken on another host (give its full id).")(
        function
    )


def providing(function: Callable[..., None]) -> Callable[..., None]:
    """--provider and -o, for verbs that choose or configure a provider."""
    function = click.option("-o", "options", multiple=True, metavar="KEY=VALUE", help="An option of the provider.")(
        function
    )
    return click.option("--provider", metavar="NAME", help="Use this provider, not the nearest that claims the path.")(
        function
    )


def _names(ctx: click.Context, what: Callable[[Session], list[str]], incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    try:
        names = what(Call(False, False, ctx.params.get("config")).session())
    except Exception:  # a shell that completes must never print our errors
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """A node's name, or a path."""
    from click.shell_completion import CompletionItem

    if "/" in incomplete:
        return [CompletionItem(incomplete, type="dir")]
    return _names(ctx, lambda session: list(session.config.nodes), incomplete)


def complete_set(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """A set's id, or `latest`."""
    return _names(ctx, lambda session: ["latest", *(found.set_id for found in session.catalog().sets)], incomplete)


def in_seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A duration such as 5s, 250ms or 2m."""
    from snapshotter.nodes.config import Seconds

    try:
        seconds = None if value is None else Seconds.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    if seconds is not None and not 0.01 <= seconds <= 600:
        raise click.BadParameter(f"{value} is out of range; allowed: 10ms to 10m", ctx, param)
    return seconds


@click.group(context_settings=CONTEXT, epilog="A TARGET is a node's name from the config, or a path. "
             "A SET is an id, a prefix of one, latest[:TARGET] or latest-verified[:TARGET].")  # fmt: skip
@click.version_option(__version__, prog_name="snapshotter")
def cli() -> None:
    """Hot backups of a node's data path by storage snapshots, and restores from them."""


@cli.command()
@click.argument("target", required=False, shell_complete=complete_target)
@click.option("--all", "every", is_flag=True, help="Take every node of the config.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the plan, change nothing.")
@click.option(
    "--quiesce",
    type=click.Choice(["auto", "none", "freeze", "pause", "stop", "hooks"]),
    help="How writes are held still (default: what the storage needs).",
)
@click.option(
    "--budget", callback=in_seconds, metavar="DURATION", help="How long the writers may be held at most (default 5s)."
)
@click.option(
    "--require",
    type=click.Choice(["crash", "filesystem", "application"]),
    help="Refuse, before anything is touched, if the grade would be lower.",
)
@click.option("--allow-skew", is_flag=True, help="Take it though its volumes are not one instant (never good).")
@click.option("--no-wait", is_flag=True, help="Return once the instant is fixed; the set may still be pending.")
@click.option("--slot", default="", help="Name of the scheduled time: a slot is taken once.")
@providing
@common
def take(
    call: Call,
    target: str | None,
    every: bool,
    dry_run: bool,
    quiesce: str | None,
    budget: float | None,
    require: str | None,
    allow_skew: bool,
    no_wait: bool,
    slot: str,
    provider: str | None,
    options: tuple[str, ...],
) -> None:
    """Make an image of a node's data path, hot."""
    from snapshotter import human
    from snapshotter.verbs import take as verb

    if every and target:
        raise UsageError("--all takes no target", object=target)
    session = call.session(provider, options)
    how: dict[str, Any] = {
        "quiesce": quiesce,
        "budget_s": budget,
        "require": require,
        "allow_skew": allow_skew,
        "dry_run": dry_run,
        "wait": not no_wait,
        "slot": slot,
    }
    if every:
        if not session.config.nodes:
            raise UsageError("the config has no nodes", cure="`snapshotter init PATH --write` adds one")
        document, errors = verb.take_all(session, **how)
        for error in errors:
            _complain(f"error: {error.line()}")
        call.answer(document, lambda: "\n".join(human.taken(done) for done in document["sets"]), int(worst(errors)))
        return
    document = verb.take(session, target, **how)
    call.answer(document, lambda: human.plan(document) if dry_run else human.taken(document))


@cli.command("list")
@click.argument("target", required=False, shell_complete=complete_target)
@common
def list_command(call: Call, target: str | None) -> None:
    """List the sets, oldest first."""
    from snapshotter import human
    from snapshotter.verbs import list as verb

    document = verb.list_sets(call.session(), target)
    for gone in document["unavailable"]:
        _complain(f"warning: not asked: {gone['provider']}: {gone['reason']}")
    call.answer(document, lambda: human.table(document["sets"]))


@cli.command()
@click.argument("set_id", metavar="SET", shell_complete=complete_set)
@common
def show(call: Call, set_id: str) -> None:
    """Show one set."""
    from snapshotter import human
    from snapshotter.verbs import list as verb

    document = verb.show(call.session(), set_id)
    call.answer(document, lambda: human.details(document))


@cli.command()
@click.argument("set_id", metavar="SET", shell_complete=complete_set)
@click.option("--to", metavar="DIR", help="Make a writable clone at DIR (absent or empty).")
@click.option("--mount", metavar="DIR", help="Mount the image read-only at DIR (absent or empty).")
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be put where, change nothing.")
@from_host
@common
def restore(call: Call, set_id: str, to: str | None, mount: str | None, dry_run: bool, from_host: bool) -> None:
    """Make a set usable beside its origin.

    The origin is not touched; `release DIR` ends it."""
    from snapshotter import human
    from snapshotter.core.model import Access
    from snapshotter.verbs import restore as verb

    if bool(to) == bool(mount):
        raise UsageError("give one of --to DIR and --mount DIR", object=set_id)
    access = Access.WRITABLE if to else Access.READ_ONLY
    document = verb.restore(call.session(), set_id, to or mount or "", access, from_host=from_host, dry_run=dry_run)
    call.answer(document, lambda: human.restored(document, dry_run))


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--discard-changes", is_flag=True, help="Drop what was written to the clone.")
@common
def release(call: Call, directory: str, discard_changes: bool) -> None:
    """End what restore made at DIR.

    DIR may also be an attachment's id, as `show SET` names it."""
    from snapshotter.verbs import release as verb

    document = verb.release(call.session(), directory, discard_changes=discard_changes)
    call.answer(
        document, lambda: f"released {document['released']['path'] or directory} (set {document['set_id']} stays)"
    )


@cli.command()
@click.argument("set_ids", metavar="SET...", nargs=-1, required=True, shell_complete=complete_set)
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--last", is_flag=True, help="Allow the newest good, or newest verified, set of a target to go.")
@from_host
@common
def delete(call: Call, set_ids: tuple[str, ...], yes: bool, last: bool, from_host: bool) -> None:
    """Delete sets. Wants the full id or a long prefix, never `latest`."""
    from snapshotter import human
    from snapshotter.verbs import delete as verb

    session = call.session()
    chosen = verb.plan(session, list(set_ids), last=last, from_host=from_host)
    confirm(yes, "delete", [found.set_id for found in chosen])
    document = verb.delete(session, [found.set_id for found in chosen], last=last, from_host=from_host)
    for failure in document["failed"]:
        _complain(f"error: {failure['set_id']}: {failure['message']}")
    text = "\n".join(f"deleted {human.brief(gone)}" for gone in document["deleted"])
    call.answer(document, lambda: text, int(Exit.REFUSED) if document["failed"] else 0)


def confirm(yes: bool, act: str, objects: list[str]) -> None:
    """Ask on a terminal; without one, refuse unless `--yes` was given. Raises UsageError."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{act} wants a confirmation", object=", ".join(objects), cure="--yes")
    if not click.confirm(f"{act} {', '.join(objects)}?", err=True):
        raise UsageError("not confirmed: nothing was changed", object=", ".join(objects))


def _pin(name: str, pinned: bool, text: str) -> None:
    @cli.command(name, help=text)
    @click.argument("set_id", metavar="SET", shell_complete=complete_set)
    @from_host
    @common
    def command(call: Call, set_id: str, from_host: bool) -> None:
        from snapshotter import human
        from snapshotter.verbs import pin as verb

        document = verb.pin(call.session(), set_id, pinned=pinned, from_host=from_host)
        call.answer(document, lambda: human.brief(document))


_pin("pin", True, "Keep a set whatever happens.")
_pin("unpin", False, "Let retention decide about a set again.")


@cli.command()
@common
def reap(call: Call) -> None:
    """Let go and remove what interrupted runs left behind."""
    from snapshotter import human
    from snapshotter.verbs import reap as verb

    document = verb.reap(call.session())
    call.answer(document, lambda: human.reaped(document))


@cli.command()
@click.argument("path", type=click.Path())
@click.option("--type", "kind", type=click.Choice(["validator", "rpc", "archive"]), help="Presets schedule, retention.")
@click.option("--write", is_flag=True, help="Append it to the config instead of only printing it.")
@providing
@common
def init(call: Call, path: str, kind: str | None, write: bool, provider: str | None, options: tuple[str, ...]) -> None:
    """Find what runs at PATH, print its config."""
    from snapshotter.verbs import init as verb

    where = (call.config or verb.usual_config()) if write else None
    if write and call.config and not os.path.exists(call.config):
        call.config = None  # it is about to be made
    document = verb.init(call.session(provider, options), path, kind=kind, write=where)
    call.answer(document, lambda: document["toml"] + (f"# written to {where}" if where else ""))


@cli.command()
@click.argument("name", required=False)
@common
def profile(call: Call, name: str | None) -> None:
    """Show the kinds of node, or the one at a path."""
    from snapshotter import human
    from snapshotter.verbs import profile as verb

    document = verb.profile(call.session(), name)
    call.answer(document, lambda: human.profile(document))


@cli.command()
@click.argument("target", required=False, shell_complete=complete_target)
@providing
@common
def providers(call: Call, target: str | None, provider: str | None, options: tuple[str, ...]) -> None:
    """Show which provider serves a path, and why."""
    from snapshotter import human
    from snapshotter.verbs import providers as verb

    document = verb.providers(call.session(provider, options), target)
    call.answer(document, lambda: human.providers(document), int(Exit.PRECONDITION) if document["refusal"] else 0)


def _print_json(document: Mapping[str, Any]) -> None:
    import msgspec

    try:
        click.echo(msgspec.json.encode({"schema": 1, **document}))
    except UnicodeEncodeError:  # a path that isn't UTF-8: its odd bytes become lone surrogates, as Python's json has it
        import json

        click.echo(json.dumps({"schema": 1, **document}))


def _fail(error: SnapshotterError, as_json: bool) -> int:
    _complain(f"error: {error.line()}")
    if as_json:
        try:
            _print_json({"error": error.as_json()})
        except OSError:
            _mute(sys.stdout)
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
    except SnapshotterError as error:
        if verbose:
            _traceback()
        return _fail(error, as_json)
    except click.Abort:
        return _fail(UsageError("not confirmed: nothing was changed"), as_json)
    except click.ClickException as error:
        return _fail(UsageError(error.format_message(), cure="see --help"), as_json)
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
