"""The command, on this machine as on an instance of the twin: `python -m tests.unit.ebs_command BY_ID take ...`."""

from __future__ import annotations

import functools
import json
import sys

import botocore.loaders

from providers.ebs import EbsProvider
from snapshotter.provider import Settings
from tests.unit.cloud_command import as_on_an_instance, run

# Each client would read EC2's model, ten megabytes of JSON, once more: half a second, a hundred times.
botocore.loaders.create_loader = functools.cache(botocore.loaders.create_loader)

if __name__ == "__main__":
    as_on_an_instance(EbsProvider)
    if sys.argv[1] == "advance":  # what a tick does beside its nodes
        print(json.dumps({"schema": 1, "advanced": EbsProvider(Settings("/nonexistent")).advance()}))
    else:
        run(EbsProvider)
