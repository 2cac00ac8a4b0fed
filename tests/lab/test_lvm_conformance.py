"""The provider contract, held against LVM on a real kernel: thin and classic, faults and kills included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from snapshotter.testing.conformance import ProviderConformance
from tests.lab.lvm_kit import LvmHarness, Storage, harness_on, marks, storage

pytestmark = marks


@pytest.fixture(scope="module")
def group() -> Iterator[Storage]:
    with storage(2000, pool_mb=800) as made:
        yield made


class TestThin(ProviderConformance):
    @pytest.fixture
    def harness(self, group: Storage) -> Iterator[LvmHarness]:
        with harness_on(group, thin=True) as harness:
            yield harness


class TestClassic(ProviderConformance):
    @pytest.fixture
    def harness(self, group: Storage) -> Iterator[LvmHarness]:
        with harness_on(group, thin=False) as harness:
            yield harness
