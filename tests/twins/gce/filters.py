"""The filter expressions of list methods, as the API's reference has them: comparisons of fields, in parentheses,
joined by AND, OR and NOT; side by side is AND. Must know no resource.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from tests.twins.gce.wire import Refusal

Item = Mapping[str, Any]  # as in JSON
Test = Callable[[Item], bool]
_TOKENS = re.compile(r'\s*(?:([()])|(!=|<=|>=|=|:|<|>)|"((?:[^"\\]|\\.)*)"|([^\s()=:<>!"]+))')


def compiled(text: str) -> Test:
    """Whether an item is among those wanted. Raises Refusal."""
    if not text:
        return lambda item: True
    tokens, at = [], 0
    while text[at:].strip():
        found = _TOKENS.match(text, at)
        if found is None:
            raise _bad(text)
        group = found.lastindex or 0
        tokens.append((("", "paren", "op", "quoted", "word")[group], found[group]))
        at = found.end()
    try:
        return _Parser(tokens).whole()
    except (IndexError, ValueError):
        raise _bad(text) from None


def _bad(text: str) -> Refusal:
    return Refusal("invalid", f"Invalid value for field 'filter': '{text}'. Invalid list filter expression.")


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens

    def whole(self) -> Test:
        found = self._all()
        if self._tokens:
            raise ValueError
        return found

    def _all(self) -> Test:
        tests = [self._any()]
        while self._tokens and self._tokens[0] != ("paren", ")"):
            if self._tokens[0] == ("word", "AND"):
                self._tokens.pop(0)
            tests.append(self._any())
        return lambda item: all(test(item) for test in tests)

    def _any(self) -> Test:
        tests = [self._one()]
        while self._tokens and self._tokens[0] == ("word", "OR"):
            self._tokens.pop(0)
            tests.append(self._one())
        return lambda item: any(test(item) for test in tests)

    def _one(self) -> Test:
        kind, text = self._tokens.pop(0)
        if (kind, text) == ("word", "NOT"):
            test = self._one()
            return lambda item: not test(item)
        if (kind, text) == ("paren", "("):
            inner = self._all()
            if self._tokens.pop(0) != ("paren", ")"):
                raise ValueError
            return inner
        if kind != "word":
            raise ValueError
        how, op = self._tokens.pop(0)
        if how != "op" and op not in ("eq", "ne"):
            raise ValueError
        value_kind, value = self._tokens.pop(0)
        if value_kind not in ("word", "quoted"):
            raise ValueError
        return _comparison(text, op, re.sub(r"\\(.)", r"\1", value) if value_kind == "quoted" else value)


def _comparison(key: str, op: str, value: str) -> Test:
    def of(item: Item) -> list[str]:
        have: Any = item
        for part in key.split("."):
            have = have.get(part) if isinstance(have, Mapping) else None
        if have is None:
            return []
        return [_text(each) for each in (have if isinstance(have, list) else [have])]

    if op in ("eq", "ne"):
        pattern = re.compile(value)
        return lambda item: any(pattern.fullmatch(each) for each in of(item)) is (op == "eq")
    if op == ":":
        return lambda item: any(value == "*" or value.strip("*").lower() in each.lower() for each in of(item))
    if op in ("=", "!="):
        exact = re.compile(".*".join(re.escape(part) for part in value.split("*")), re.IGNORECASE)
        return lambda item: any(exact.fullmatch(each) for each in of(item)) is (op == "=")
    order = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}[op]
    return lambda item: any(order(_comparable(each), _comparable(value)) for each in of(item))


def _comparable(text: str) -> tuple[str, float | str]:
    """Numbers and times are compared as what they are."""
    for kind, parse in (("number", float), ("time", lambda text: datetime.fromisoformat(text).timestamp())):
        with contextlib.suppress(ValueError):
            return kind, parse(text)
    return "text", text


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
