"""Fixtures for tests on a node under load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import Node

Start = Callable[..., Node]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts nodes and ends them, whatever the test does."""
    nodes: list[Node] = []

    def begin(data: Path, *words: str, uid: int | None = None) -> Node:
        nodes.append(Node(data, *words, uid=uid))
        return nodes[-1]

    yield begin
    for node in nodes:
        node.kill()
