"""The contract of `snapshotter.provider` as a pytest suite: what must be true of the storage, never how it was done.

    class TestMine(ProviderConformance):
        @pytest.fixture
        def harness(self, tmp_path):
            yield MyHarness(tmp_path)

Put `pytest.register_assert_rewrite("snapshotter.testing.conformance")` in your conftest.py. Beyond the interface's
docstrings the suite settles: `create` with the id of a set that exists raises BusyError and leaves the first as it is;
`swap_commit` of an unknown swap is done; a volume with an open swap is not swapped again (BusyError).
"""

from __future__ import annotations

from snapshotter.testing.conformance.images import Images
from snapshotter.testing.conformance.sets import Sets
from snapshotter.testing.conformance.steps import Attached, attach, content_of, ready, seal, take
from snapshotter.testing.conformance.swaps import Swaps
from snapshotter.testing.conformance.undoing import Undoing


class ProviderConformance(Sets, Images, Swaps, Undoing):
    """The whole contract. Subclass it, give it a `harness` fixture."""


__all__ = ["Attached", "ProviderConformance", "attach", "content_of", "ready", "seal", "take"]
