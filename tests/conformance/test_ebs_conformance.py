"""The provider contract, held against the twin of EC2, whose volumes are loop devices here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from snapshotter.testing.conformance import ProviderConformance
from tests.unit.ebs_kit import EbsHarness, ebs_harness

pytestmark = pytest.mark.root


class TestEbs(ProviderConformance):
    @pytest.fixture
    def harness(self) -> Iterator[EbsHarness]:
        with ebs_harness() as harness:
            yield harness
