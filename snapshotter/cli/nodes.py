"""The commands about a node and its storage: init profile providers identity."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

import click

from snapshotter.cli.call import Call, common, complain, complete_target, providing
from snapshotter.core.errors import Exit, UsageError


@click.command()
@click.argument("path", required=False, type=click.Path())
@click.option("--from", "source", metavar="SET", help="Of the node that a set was taken of: an id, or latest:NODE.")
@click.option("--type", "kind", type=click.Choice(["validator", "rpc", "archive"]), help="Presets schedule, retention.")
@click.option("--write", is_flag=True, help="Append it to the config instead of only printing it.")
@providing
@common
def init(
    call: Call,
    path: str | None,
    source: str | None,
    kind: str | None,
    write: bool,
    provider: str | None,
    options: tuple[str, ...],
) -> None:
    """Find what runs at PATH, print its config."""
    from snapshotter.verbs import init as verb

    if (path is None) == (source is None):
        raise UsageError("give one of PATH and --from SET", cure="--from latest:NODE where the node isn't there yet")
    where = (call.config or verb.usual_config()) if write else None
    if write and call.config and not os.path.exists(call.config):
        call.config = None  # it is about to be made
    session = call.session(provider, options)
    if path is None:
        document = verb.recall(session, str(source), kind=kind, write=where)
    else:
        document = verb.init(session, path, kind=kind, write=where)
    call.answer(document, lambda: document["toml"] + (f"# written to {where}" if where else ""))


@click.command()
@click.argument("name", required=False)
@common
def profile(call: Call, name: str | None) -> None:
    """Show the kinds of node, or the one at a path."""
    from snapshotter import human
    from snapshotter.verbs import profile as verb

    document = verb.profile(call.session(), name)
    call.answer(document, lambda: human.profile(document))


@click.command()
@click.argument("target", required=False, shell_complete=complete_target)
@providing
@common
def providers(call: Call, target: str | None, provider: str | None, options: tuple[str, ...]) -> None:
    """Show which provider serves a path, and why."""
    from snapshotter import human
    from snapshotter.verbs import providers as verb

    document = verb.providers(call.session(provider, options), target)
    call.answer(document, lambda: human.providers(document), int(Exit.PRECONDITION) if document["refusal"] else 0)


@click.group()
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
            complain(f"warning: {file} can be read by others: chmod 600 it")
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
