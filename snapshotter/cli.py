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
from snapshotter.core.errors import Exit, PreconditionError, SnapshotterError, Told, UsageError, plain, worst

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


def complete_set_or_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What restore takes: a set, or, to end what one began, a target."""
    if any(ctx.params.get(name) for name in ("go_on", "undo", "discard")):
        return complete_target(ctx, param, incomplete)
    return complete_set(ctx, param, incomplete)


def in_place(function: Callable[..., None]) -> Callable[..., None]:
    """The options of whatever changes the live data."""
    for option in (
        click.option("--yes", is_flag=True, help="Don't ask."),
        click.option("--sign-state-from-set", "from_set", is_flag=True,
                     help="Dangerous: where a validator's signing record can't be compared, believe the incoming one."),
        click.option("--aside", metavar="DIR", help="Set the old data aside in DIR, which may be on another disk."),
        click.option("-n", "--dry-run", is_flag=True, help="Print what would be put where, change nothing."),
    ):  # fmt: skip
        function = option(function)
    return function


@cli.command()
@click.argument("set_id", metavar="[SET|TARGET]", required=False, shell_complete=complete_set_or_target)
@click.option("--to", metavar="DIR", help="Make a writable clone at DIR (absent or empty).")
@click.option("--mount", metavar="DIR", help="Mount the image read-only at DIR (absent or empty).")
@click.option("--in-place", "live", is_flag=True, help="Put it in place of the live data, which is set aside.")
@click.option("--only", type=click.Choice(["database", "key"]), help="In place: only this part of the node.")
@click.option("--identity", type=click.Choice(["set", "live"]), help="In place: whose key stands there afterwards.")
@click.option("--yes-original-is-stopped", "alone", is_flag=True, help="No other node runs with this validator's key.")
@click.option("--continue", "go_on", is_flag=True, help="Go on with TARGET's interrupted restore.")
@click.option("--undo", is_flag=True, help="Put TARGET's old data back.")
@click.option("--discard", is_flag=True, help="Remove TARGET's old data: there is no undo then.")
@click.option("--with-identity", is_flag=True, help="Leave the node's keys in the clone of --to.")
@in_place
@from_host
@common
def restore(call: Call, set_id: str | None, **given: Any) -> None:
    """Make a set usable: beside its origin, or in its place.

    --to and --mount don't touch the origin; `release DIR` ends them. --in-place proves the set, stops the node, sets
    the old data aside, puts the set's there, and starts the node; until --discard it can be undone."""
    ways = [name for name in ("to", "mount", "live", "go_on", "undo", "discard") if given[name]]
    shown = {"live": "--in-place", "go_on": "--continue"}
    if len(ways) != 1:
        cure = "one of --to DIR, --mount DIR, --in-place; to end one: --continue, --undo, --discard"
        raise UsageError("give one way to restore", object=set_id or "", cure=cure)
    way = ways[0]
    goes_with = {
        "only": "live", "aside": "live", "identity": "live", "alone": "live", "with_identity": "to",
        "from_set": "live undo", "dry_run": "to mount live", "yes": "live discard", "from_host": "to mount live",
    }  # fmt: skip
    for name, those in goes_with.items():
        if given[name] and way not in those.split():
            option = {"alone": "yes-original-is-stopped", "from_set": "sign-state-from-set"}.get(name, name)
            raise UsageError(f"--{option.replace('_', '-')} doesn't go with {shown.get(way, '--' + way)}")
    if way in ("go_on", "undo", "discard"):
        _end_restore(call, set_id, way, given)
        return
    if set_id is None:
        raise UsageError("give a set", cure="`snapshotter list` shows them; `latest` is the newest good one")
    if way == "live":
        from snapshotter.verbs import in_place as verb

        how = {"only": given["only"] or "", "aside": given["aside"], "choice": given["identity"] or ""}
        how |= {"from_set": given["from_set"], "from_host": given["from_host"], "measure": given["dry_run"]}
        session = call.session()
        plan = verb.plan(session, set_id, **how)
        _put_in_place(call, session, plan, given)
        return
    from snapshotter import human
    from snapshotter.core.model import Access
    from snapshotter.verbs import restore as beside

    access = Access.WRITABLE if way == "to" else Access.READ_ONLY
    rest: dict[str, Any] = {name: given[name] for name in ("from_host", "dry_run", "with_identity")}
    document = beside.restore(call.session(), set_id, given[way], access, **rest)
    call.answer(document, lambda: human.restored(document, given["dry_run"]))


def _put_in_place(call: Call, session: Session, plan: Any, given: Mapping[str, Any]) -> None:
    from snapshotter import human
    from snapshotter.verbs import in_place as verb

    if given["dry_run"]:
        document = plan.document()
        call.answer(document, lambda: human.in_place_plan(document))
        return
    if plan.brings_key and plan.validator:
        key = "no other node runs with this key; restore"
        confirm(given["alone"], key, [plan.path], "--yes-original-is-stopped")
    confirm(given["yes"], f"stop it and set its data aside: {human.what_is_restored(plan.document())} at", [plan.path])
    document = verb.carry_out(session, plan)
    call.answer(document, lambda: human.in_place(document))


def _end_restore(call: Call, target: str | None, way: str, given: Mapping[str, Any]) -> None:
    from snapshotter import human
    from snapshotter.verbs import in_place as verb

    session = call.session()
    if way == "discard":
        confirm(given["yes"], "remove for good", verb.to_discard(session, target))
        document = verb.discard(session, target)
    elif way == "undo":
        document = verb.undo(session, target, from_set=given["from_set"])
    else:
        document = verb.go_on(session, target)
    call.answer(document, lambda: human.in_place(document))


@cli.command()
@click.argument("target", required=False, shell_complete=complete_target)
@in_place
@common
def resync(call: Call, target: str | None, **given: Any) -> None:
    """Set a node's database aside; it syncs anew from its peers.

    Its keys stay. As a restore in place it can be undone until `restore --discard TARGET`."""
    from snapshotter.verbs import in_place as verb

    session = call.session()
    how = {"aside": given["aside"], "from_set": given["from_set"], "measure": given["dry_run"]}
    plan = verb.plan_resync(session, target, **how)
    _put_in_place(call, session, plan, given)


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
@click.argument("what", metavar="SET|TARGET", required=False, shell_complete=complete_set)
@click.option(
    "--level",
    type=click.IntRange(0, 5),
    help="0 the storage's word, 1 the files, 2 the database's structure, 3 every block, 4 the engine opens it "
    "(default: the node's policy, else 2).",
)
@from_host
@common
def verify(call: Call, what: str | None, level: int | None, from_host: bool) -> None:
    """Prove a set by opening a clone of it.

    Of a TARGET its newest good set. What it came to is written on the set."""
    from snapshotter import human
    from snapshotter.verbs import verify as verb

    document = verb.verify(call.session(), what, level=level, from_host=from_host)
    codes = {"ok": Exit.DONE, "corrupt": Exit.JUDGED_BAD, "could-not-run": Exit.REFUSED}
    call.answer(document, lambda: human.verified(document), int(codes.get(document["outcome"], Exit.PRECONDITION)))


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


def confirm(yes: bool, act: str, objects: list[str], option: str = "--yes") -> None:
    """Ask on a terminal; without one, refuse unless `option` was given. Raises UsageError."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{act} wants a confirmation", object=", ".join(objects), cure=option)
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


@cli.group()
def identity() -> None:
    """Show a node's identity, keep its key safe."""


def passphrase_of(file: str | None, *, twice: bool) -> str:
    """From a file's first line, or asked for on a terminal: never an argument, which others can see."""
    if file is not None:
        from snapshotter.nodes import files

        try:
            content, found = files.read(os.path.realpath(file), 4096)
        except FileNotFoundError:
            raise UsageError("no such file", object=file) from None
        if found.st_mode & 0o077:
            _complain(f"warning: {file} can be read by others: chmod 600 it")
        given = content.split(b"\n")[0].rstrip(b"\r").decode(errors="surrogateescape")
    elif sys.stdin.isatty() and sys.stderr.isatty():
        given = click.prompt("Passphrase", hide_input=True, confirmation_prompt=twice, err=True)
    else:
        raise UsageError("wants a passphrase", object="identity", cure="--passphrase-file FILE")
    if not given:
        raise UsageError("the passphrase is empty", object=file or "identity", cure="give one that can't be guessed")
    return given


def secretly(function: Callable[..., None]) -> Callable[..., None]:
    """--passphrase-file."""
    return click.option("--passphrase-file", metavar="FILE", help="Read the passphrase from its first line.")(function)


@identity.command("show")
@click.argument("target", metavar="TARGET|SET", required=False, shell_complete=complete_target)
@click.option("--host", metavar="HOST", help="Print the URL that peers dial, with this address of the node.")
@click.option("--port", type=click.IntRange(1, 65535), help="Its port (default: the usual one).")
@common
def identity_show(call: Call, target: str | None, host: str | None, port: int | None) -> None:
    """Show address and enode, from the node's key (or a set's record)."""
    from snapshotter import human
    from snapshotter.verbs import identity as verb

    document = verb.show(call.session(), target, host, port)
    call.answer(document, lambda: human.details({**document, "warnings": None}))


@identity.command("export")
@click.argument("target", required=False, shell_complete=complete_target)
@click.option("--to", required=True, metavar="FILE", help="The encrypted file to make.")
@secretly
@common
def identity_export(call: Call, target: str | None, to: str, passphrase_file: str | None) -> None:
    """Write the node's key, encrypted, to a file that `age -d` opens too."""
    from snapshotter.verbs import identity as verb

    document = verb.export(call.session(), target, to, lambda: passphrase_of(passphrase_file, twice=True))
    call.answer(document, lambda: f"wrote {document['file']}: {', '.join(document['names'])}, encrypted")


@identity.command("restore")
@click.argument("file", type=click.Path())
@click.argument("target", required=False, shell_complete=complete_target)
@click.option("--replace", is_flag=True, help="Allow another identity to be replaced (it is kept).")
@secretly
@common
def identity_restore(call: Call, file: str, target: str | None, replace: bool, passphrase_file: str | None) -> None:
    """Put an exported key back in its place."""
    from snapshotter.verbs import identity as verb

    ask = functools.partial(passphrase_of, passphrase_file, twice=False)
    document = verb.restore(call.session(), file, target, ask, replace=replace)
    shown = document["address"] or "the identity"
    call.answer(document, lambda: f"put {shown} back in {document['path']}: {', '.join(document['names'])}")


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


def _fail(error: Told, as_json: bool) -> int:
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
    except Told as error:
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
