"""The command, on this machine as on an instance of the twin: `python -m tests.unit.gce_command BY_ID take ...`. Loads
nothing of the twin's."""

from __future__ import annotations

import sys
import time

from providers.gce import GceProvider
from providers.gce.names import VENDOR
from snapshotter.core.remote import Clock
from snapshotter.host import disks


class DisksHere(disks.Disks, frozen=True):
    """What DMI says on Compute Engine."""

    def vendor(self) -> str:
        return VENDOR


class Hasty(Clock):
    """Nobody waits for long here: the twin is at once where Compute Engine would be in a minute."""

    skipped = 0.0

    def now(self) -> float:
        return time.monotonic() + self.skipped

    def wall(self) -> float:
        return time.time() + self.skipped

    def sleep(self, seconds: float) -> None:
        moment = min(seconds, 0.05)
        time.sleep(moment)
        self.skipped += seconds - moment


if __name__ == "__main__":
    GceProvider.disks = DisksHere(by_id=sys.argv.pop(1))
    GceProvider.clock = Hasty()
    from snapshotter import provider
    from snapshotter.__main__ import main

    # Not what other tests, and the machine's owner, have on btrfs.
    provider.BUILT_IN = {name: provider.BUILT_IN[name] for name in ("copy", "gce")}
    main()
