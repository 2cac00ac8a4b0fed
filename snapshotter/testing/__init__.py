"""The provider contract as tests, shipped so that third parties can hold their drivers to it.

`conformance` has the suite (it alone imports pytest; import it from your tests), `harness` what you write for your
storage, `memory` a complete provider to learn from, `faults` proxies that fail, repeat or kill at the n-th call.
"""

from snapshotter.testing.faults import MUTATING, CallTwice, Counting, FailNth, KillAt, Proxy
from snapshotter.testing.harness import Harness, describe, make_birth
from snapshotter.testing.memory import MemoryProvider, MemoryStore

__all__ = [
    "MUTATING",
    "CallTwice",
    "Counting",
    "FailNth",
    "Harness",
    "KillAt",
    "MemoryProvider",
    "MemoryStore",
    "Proxy",
    "describe",
    "make_birth",
]
