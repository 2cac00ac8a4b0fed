"""One run of a command: its session, its answer, the options and completions that commands share."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import click

from snapshotter.core.errors import UsageError, plain

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from snapshotter.verbs.session import Session


#: Commands of whose work nothing is left where their answer is lost (`show` of sets, schedules, identities). What the
#: others did is done, and their exit code says so.
_ONLY_TELL = ("list", "show", "status", "doctor", "providers", "profile")


def complain(line: str) -> None:
    """One line to stderr; if nobody can hear it, that changes nothing."""
    try:
        click.echo(plain(line), err=True)
    except OSError:
        mute(sys.stderr)


def mute(stream: TextIO) -> None:
    """Point it elsewhere, so that the interpreter's last flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_json(document: Mapping[str, Any]) -> None:
    import msgspec

    try:
        click.echo(msgspec.json.encode({"schema": 1, **document}))
    except UnicodeEncodeError:  # a path that isn't UTF-8: its odd bytes become lone surrogates, as Python's json has it
        import json

        click.echo(json.dumps({"schema": 1, **document}))


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
            complain(f"warning: {warning}")
        try:
            if self.as_json:
                print_json(document)
            elif shown := text():
                click.echo(plain(shown, keep="\n"))
        except BrokenPipeError:  # the reader (head, less) has gone: what was to be done is done
            mute(sys.stdout)
        except OSError as error:  # stdout is on a full disk
            mute(sys.stdout)
            if click.get_current_context().info_name in _ONLY_TELL:
                raise
            complain(f"warning: it is done, but the answer can't be written to stdout: {error.strerror}")
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


def provider_options(function: Callable[..., None]) -> Callable[..., None]:
    """-o, for verbs that configure a provider."""
    return click.option("-o", "options", multiple=True, metavar="KEY=VALUE", help="An option of the provider.")(
        function
    )


def providing(function: Callable[..., None]) -> Callable[..., None]:
    """--provider and -o, for verbs that choose or configure a provider."""
    return click.option("--provider", metavar="NAME", help="Use this provider, not the nearest that claims the path.")(
        provider_options(function)
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
    from snapshotter.nodes.values import Seconds

    try:
        return None if value is None else Seconds.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def as_budget(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A duration for which writers may be held."""
    seconds = in_seconds(ctx, param, value)
    if seconds is not None and not 0.01 <= seconds <= 600:
        raise click.BadParameter(f"{value} is out of range; allowed: 10ms to 10m", ctx, param)
    return seconds


def confirm(yes: bool, act: str, objects: list[str], option: str = "--yes") -> None:
    """Ask on a terminal; without one, refuse unless `option` was given. Raises UsageError."""
    named = ", ".join(objects)
    ask(yes, f"{act} {named}?", f"{act} wants a confirmation", named, option)


def ask(yes: bool, question: str, unasked: str, named: str, option: str) -> None:
    """As `confirm`, in other words: `unasked` is the error of who can't be asked."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(unasked, object=named, cure=option)
    if not click.confirm(plain(question), err=True):
        raise UsageError("not confirmed: nothing was changed", object=named)
