"""The twin of Compute Engine with one instance and one disk, and Google's client at it: loaded by whom it concerns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.twins.gce import Twin
    from tests.twins.gce_client import Asked


@pytest.fixture
def twin() -> Iterator[Twin]:
    from tests.twins.gce import Twin
    from tests.twins.gce_client import ZONE

    with Twin() as twin:
        twin.here = twin.world.run_instance(ZONE, "node")
        twin.world.add_disk("data", twin.here, "dev-data", with_bytes=False)
        yield twin


@pytest.fixture
def ask(twin: Twin) -> Asked:
    from tests.twins.gce_client import Asked

    return Asked(twin)
