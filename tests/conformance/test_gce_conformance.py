"""The provider contract, held against the twin of Compute Engine, whose disks are loop devices here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from snapshotter.testing.conformance import ProviderConformance
from tests.unit.gce_kit import GceHarness, gce_harness

pytestmark = pytest.mark.root


class TestGce(ProviderConformance):
    @pytest.fixture
    def harness(self) -> Iterator[GceHarness]:
        with gce_harness() as harness:
            yield harness
