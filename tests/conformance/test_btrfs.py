"""The provider contract, held against btrfs on a loop device: subvolumes seen through a mount of the top level."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from snapshotter.testing.conformance import ProviderConformance
from tests.unit.btrfs_kit import BtrfsHarness, btrfs_harness

pytestmark = pytest.mark.root


class TestBtrfs(ProviderConformance):
    @pytest.fixture
    def harness(self) -> Iterator[BtrfsHarness]:
        with btrfs_harness() as harness:
            yield harness
