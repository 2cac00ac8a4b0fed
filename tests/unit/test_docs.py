"""The docs say only what there is: every command in them exists with its options, every link leads to a file, every
example config loads."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import click
import pytest

from snapshotter.cli import COMMANDS
from snapshotter.core.errors import Exit
from snapshotter.nodes import config
from snapshotter.verbs.status import PROBLEMS
from tests.support import CHECKOUT

PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Every `snapshotter COMMAND ...`, in code spans and blocks."""
    text = re.sub(r"```(yaml|json|toml|ts)\n.*?```", "", text, flags=re.DOTALL)
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    blocks = re.findall(r"^(?:    |\$ )(?:.*[ /$])?(snapshotter [a-z].*)$", joined, re.MULTILINE)
    spans = [
        match[1]
        for paragraph in joined.split("\n\n")
        for span in paragraph.split("`")[1::2]
        if (match := re.fullmatch(r"(?:.*[ /])?(snapshotter\s[a-z].*)", span, re.DOTALL))
    ]
    fenced = re.findall(r"^(snapshotter [a-z].*)$", joined, re.MULTILINE)
    return [re.split(r"\s#|[;|>&]|\s{3}", " ".join(each.split()))[0] for each in (*blocks, *spans, *fenced)]


def known(name: str) -> click.Command:
    module = import_module(f"snapshotter.cli.{COMMANDS[name]}")
    found: click.Command = getattr(module, "list_command" if name == "list" else name)
    return found


def wrong(line: str) -> str:
    """What is wrong with a command, '' if nothing."""
    words = shlex.split(line.replace("...", ""))[1:]
    if words[0] in ("COMMAND", "--help", "-h", "providers)"):
        return ""
    if words[0] not in COMMANDS:
        return f"there is no command {words[0]}"
    command = known(words[0])
    if isinstance(command, click.Group):
        if len(words) == 1:
            return ""
        if "|" in words[1] or words[1] not in command.commands:
            return f"there is no command {words[0]} {words[1]}"
        command = command.commands[words[1]]
    options = {option for parameter in command.params for option in parameter.opts}
    for word in words[1:]:
        for option in re.findall(r"^(--?[a-z][a-z-]*)", word):
            if option not in options | {"--help", "-h"}:
                return f"{words[0]} has no option {option}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    found = commands(page.read_text())
    said = [f"{line}: {why}" for line in found if (why := wrong(line))]
    assert said == []


def test_the_commands_are_found_at_all() -> None:
    assert len(commands((CHECKOUT / "docs" / "kalychain.md").read_text())) > 10
    assert wrong("snapshotter take n --dry-rum") and wrong("snapshotter tak n") and wrong("snapshotter schedule put n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_load(page: Path) -> None:
    for text in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
        config.parse(text, page.name)


def test_every_exit_code_and_every_problem_has_its_line() -> None:
    codes = re.findall(r"^\| (\d) \|", (CHECKOUT / "docs" / "exit-codes.md").read_text(), re.MULTILINE)
    assert [int(code) for code in codes] == [int(code) for code in Exit]
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \|", (CHECKOUT / "docs" / "alerting.md").read_text(), re.MULTILINE)
    assert dict(rows) == PROBLEMS


def test_every_hook_and_what_it_is_told() -> None:
    page = (CHECKOUT / "docs" / "hooks.md").read_text()
    assert set(config.Hooks.__struct_fields__) == set(re.findall(r"\b(?:before|after)_[a-z]+", page))
    verbs = [*(CHECKOUT / "snapshotter" / "verbs").glob("*.py")]
    given = {name for path in verbs for call in re.findall(r"Around\([^)]*\)", path.read_text())
             for name in re.findall(r"\b(\w+)=", call)}  # fmt: skip
    told = {f"SNAPSHOTTER_{name.upper()}" for name in (*given, "event", "node", "path", "outcome", "error")}
    assert told == set(re.findall(r"`(SNAPSHOTTER_[A-Z]+)`", page))
