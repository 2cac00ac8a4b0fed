"""A fleet as its volumes' tags name it, and asking one of its instances to run a command. Must know no set."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from providers.ebs import tags
from providers.ebs.api import Api
from providers.ebs.choosing import Seen, standing
from providers.ebs.volumes import attached_to
from snapshotter.core.errors import PreconditionError
from snapshotter.core.model import Tagged, Volume

_DELIVERY_S = 300  # an agent that doesn't come for the command by then never gets it


def tagged(api: Api, seen: Seen) -> list[Tagged]:
    """Nodes by their volumes' tags, in the order of their names; a node on two instances is two. While a swap has
    emptied a volume's place that volume is still the node's, so that who selects it is told (`choosing.find`)."""
    within = api.deadline("the fleet")
    filters = [{"Name": "tag-key", "Values": [tags.NODE]}]
    volumes: dict[tuple[str, str], list[str]] = {}
    types: dict[tuple[str, str], str] = {}
    items = list(api.pages("describe_volumes", "Volumes", within, Filters=filters))
    swapping = {
        labels[tags.SWAP]: labels.get(tags.INSTANCE, "") for labels in map(tags.read, items) if tags.SWAP in labels
    }
    for item in standing(items):
        labels = tags.read(item)
        if not labels.get(tags.NODE):
            continue
        name = str(item["VolumeId"])
        seen[name] = (api.clock.now(), item)
        node = labels[tags.NODE], attached_to(item)[0] or swapping.get(labels.get(tags.ASIDE, ""), "")
        volumes.setdefault(node, []).append(name)
        types[node] = types.get(node) or labels.get(tags.TYPE, "")
    return [
        Tagged(name, types[name, instance], tuple(Volume(tags.NAME, each) for each in sorted(those)), instance)
        for (name, instance), those in sorted(volumes.items())
    ]


def ask(session: Any, instance: str, argv: Sequence[str]) -> str:
    """Have the instance's SSM agent run a command; not waited for. Returns the command's id. Raises PreconditionError
    where it can't be asked: no agent, no permission."""
    from botocore import exceptions as boto
    from botocore.config import Config

    # Not repeated where the answer is lost: the slot makes a second command harmless, but nobody needs it.
    config = Config(connect_timeout=3, read_timeout=10, retries={"total_max_attempts": 1})
    try:
        client = session.client("ssm", config=config)
        sent = client.send_command(
            InstanceIds=[instance],
            DocumentName="AWS-RunShellScript",
            Parameters={"commands": [shlex.join(argv)]},
            TimeoutSeconds=_DELIVERY_S,
        )
    except (boto.ClientError, boto.BotoCoreError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise PreconditionError(f"can't be asked by SSM: {said}", object=instance) from None
    return str(sent["Command"]["CommandId"])
