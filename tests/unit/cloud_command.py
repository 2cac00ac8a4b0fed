"""What `ebs_command` and `gce_command` share: the command, on this machine as on an instance of a twin. Loads nothing
of the twins'."""

from __future__ import annotations

import os
import sys
import time

from snapshotter.core.remote import Clock
from snapshotter.host import disks


class DisksHere(disks.Disks, frozen=True):
    """This machine's, with another's word from DMI."""

    maker: str = ""

    def vendor(self) -> str:
        return self.maker


class Hasty(Clock):
    """Nobody waits for long here: the twin is at once where the cloud would be in a minute. SECONDS_LATER is the test's
    word for how late it is."""

    skipped = float(os.environ.get("SECONDS_LATER", "0"))

    def now(self) -> float:
        return time.monotonic() + self.skipped

    def wall(self) -> float:
        return time.time() + self.skipped

    def sleep(self, seconds: float) -> None:
        moment = min(seconds, 0.05)
        time.sleep(moment)
        self.skipped += seconds - moment


def as_on_an_instance(kind: type) -> None:
    """`kind`: the cloud's provider. Takes the directory for /dev/disk/by-id from the words."""
    kind.disks = DisksHere(by_id=sys.argv.pop(1), maker=kind.VENDOR)  # type: ignore[attr-defined]
    kind.clock = Hasty()  # type: ignore[attr-defined]


def run(kind: type) -> None:
    from snapshotter import provider
    from snapshotter.__main__ import main

    # Not what other tests, and the machine's owner, have on btrfs.
    provider.BUILT_IN = {name: provider.BUILT_IN[name] for name in ("copy", kind.name)}  # type: ignore[attr-defined]
    main()
