"""docs/json.md as a checker: it reads the page's TypeScript (the little of it that the page uses) and its table of
commands, and says what is wrong with an answer. Every answer that `support.Command` gets goes through it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "json.md"
Check = Callable[[Any, str], list[str]]
_TOKEN = re.compile(r'\s*(?:"([^"]*)"|([A-Za-z_]\w*)|(\[\]|[{}:;|?()<>,=]))')
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_PRIMITIVE: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "int": _whole,
    "time": lambda value: isinstance(value, str) and _TIME.fullmatch(value) is not None,
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "any": lambda value: True,
}


class Page:
    """The interfaces by name, and which command answers with which."""

    def __init__(self, text: str) -> None:
        self.shapes: dict[str, dict[str, tuple[bool, Check]]] = {}
        self.commands: dict[tuple[str, ...], str] = {}
        for cells in re.findall(r"^\| (`.*`) \| `(\w+)` \|$", text, re.MULTILINE):
            for command in re.findall(r"`([^`]*)`", cells[0]):
                self.commands[tuple(command.split())] = cells[1]
        source = re.sub(r"//.*", "", text[text.index("```ts") + 5 : text.rindex("```")]).rstrip()
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(source):
            match = _TOKEN.match(source, at)
            assert match is not None, source[at : at + 60]
            self._tokens.append(
                ("text", match[1]) if match[1] is not None else ("name", match[2]) if match[2] else ("mark", match[3])
            )
            at = match.end()
        self._tokens.reverse()
        while self._tokens:
            self._declaration()

    def _next(self, wanted: str | None = None) -> str:
        kind, word = self._tokens.pop()
        assert wanted is None or (word == wanted and kind != "text"), f"{wanted} expected, {word} found"
        return word

    def _is(self, word: str) -> bool:
        return bool(self._tokens) and self._tokens[-1][1] == word and self._tokens[-1][0] != "text"

    def _declaration(self) -> None:
        if self._is("type"):  # int, time: known here
            assert [self._next() for _ in range(5)][1] in _PRIMITIVE
            return
        self._next("interface")
        name = self._next()
        shape: dict[str, tuple[bool, Check]] = {}
        if self._is("extends"):
            self._next()
            shape |= self.shapes[self._next()]
        assert name not in self.shapes
        self.shapes[name] = shape | self._body()

    def _body(self) -> dict[str, tuple[bool, Check]]:
        shape: dict[str, tuple[bool, Check]] = {}
        self._next("{")
        while not self._is("}"):
            key = self._next()
            optional = self._is("?")
            if optional:
                self._next()
            self._next(":")
            shape[key] = optional, self._union()
            if self._is(";"):
                self._next()
        self._next("}")
        return shape

    def _union(self) -> Check:
        parts = [self._postfix()]
        while self._is("|"):
            self._next()
            parts.append(self._postfix())
        if len(parts) == 1:
            return parts[0]

        def check(value: Any, where: str) -> list[str]:
            said = [part(value, where) for part in parts]
            return [] if any(not found for found in said) else min(said, key=len)

        return check

    def _postfix(self) -> Check:
        inner = self._primary()
        while self._is("[]"):
            self._next()
            inner = _array(inner)
        return inner

    def _primary(self) -> Check:
        kind, word = self._tokens[-1]
        if kind == "text":
            self._tokens.pop()
            return lambda value, where: [] if value == word else [f"{where} is {value!r}, not {word!r}"]
        if word == "{":
            shape = self._body()
            return lambda value, where: _object(shape, value, where)
        if word == "(":
            self._next()
            inner = self._union()
            self._next(")")
            return inner
        self._tokens.pop()
        if word == "Record":
            for mark in ("<", "string", ",", "any", ">"):
                self._next(mark)
            return lambda value, where: [] if isinstance(value, dict) else [f"{where} is no object"]
        if word in _PRIMITIVE:
            right = _PRIMITIVE[word]
            return lambda value, where: [] if right(value) else [f"{where} is {value!r}, not {word}"]
        return lambda value, where: _object(self.shapes[word], value, where)

    def name_of(self, words: Sequence[str]) -> str:
        """The answer's interface for a command's words: of the table's rows that are all in them the longest."""
        words = ["--dry-run" if word == "-n" else word for word in words]
        fitting = [row for row in self.commands if row[0] == words[0] and set(row) <= set(words)]
        assert fitting, f"docs/json.md has no row for {' '.join(words)}"
        return self.commands[max(fitting, key=len)]

    def errors(self, name: str, document: Any) -> list[str]:
        """What is wrong with a document of this interface, `schema` set apart."""
        return _object(self.shapes[name], document, name)


def _array(inner: Check) -> Check:
    def check(value: Any, where: str) -> list[str]:
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [said for k, entry in enumerate(value) for said in inner(entry, f"{where}[{k}]")]

    return check


def _object(shape: dict[str, tuple[bool, Check]], value: Any, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where} is no object"]
    said = [f"{where}.{key} is not documented" for key in value if key not in shape]
    for key, (optional, check) in shape.items():
        if key in value:
            said += check(value[key], f"{where}.{key}")
        elif not optional:
            said.append(f"{where}.{key} is missing")
    return said


@functools.cache
def page() -> Page:
    return Page(PAGE.read_text())


def check(words: Sequence[str], document: Any, *, failed: bool = False) -> None:
    """Assert that an answer (without `schema`) is what docs/json.md says."""
    said = page().errors("Failure" if failed else page().name_of(words), document)
    assert not said, f"docs/json.md says otherwise of {' '.join(words)}: {'; '.join(said[:5])}"
