"""The command, on this machine as on an instance of the twin: `python -m tests.unit.gce_command BY_ID take ...`."""

from __future__ import annotations

from providers.gce import GceProvider
from tests.unit.cloud_command import as_on_an_instance, run

if __name__ == "__main__":
    as_on_an_instance(GceProvider)
    run(GceProvider)
