"""The command, on this machine as on an instance of the twin: `python -m tests.unit.ebs_command BY_ID take ...`."""

from __future__ import annotations

import json
import os
import sys
import time

from providers.ebs import EbsProvider
from snapshotter.core.remote import Clock
from snapshotter.provider import Settings
from tests.unit.ebs_kit import DisksHere


class Hasty(Clock):
    """Nobody waits for long here: the twin is at once where EC2 would be in a minute."""

    skipped = 0.0

    def now(self) -> float:
        return time.monotonic() + self.skipped

    def wall(self) -> float:
        """The test's word for how late it is."""
        return super().wall() + float(os.environ.get("SECONDS_LATER", "0"))

    def sleep(self, seconds: float) -> None:
        moment = min(seconds, 0.05)
        time.sleep(moment)
        self.skipped += seconds - moment


if __name__ == "__main__":
    EbsProvider.disks = DisksHere(by_id=sys.argv.pop(1))
    EbsProvider.clock = Hasty()
    if sys.argv[1] == "advance":  # what a tick does beside its nodes
        print(json.dumps({"schema": 1, "advanced": EbsProvider(Settings("/nonexistent")).advance()}))
        sys.exit(0)
    from snapshotter import provider
    from snapshotter.__main__ import main

    # Not what other tests, and the machine's owner, have on btrfs.
    provider.BUILT_IN = {name: provider.BUILT_IN[name] for name in ("copy", "ebs")}
    main()
