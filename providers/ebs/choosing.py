"""Which volumes, and whether EC2 would take them in one call now: all that is asked before anybody is held still. Must
know no tag but ours on volumes, and change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from providers.ebs import tags
from providers.ebs.api import Api
from providers.ebs.volumes import attached_to, described, of_instance
from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError
from snapshotter.core.remote import Deadline, poll

SPACING_S = 15.0  # EC2 takes no two snapshots of a volume within this
_MOST_PENDING = {"sc1": 1, "st1": 1}
_USUALLY = 5
_SEEN_S = 60.0
_SWAPS_S = 5.0  # EC2 needs longer to make the disk of a swap and to detach its origin


class Plan(Struct, frozen=True):
    """How the volumes of a set are taken in one call."""

    volumes: tuple[str, ...]
    instance: str  # '' for one volume that is attached nowhere
    excluded: tuple[str, ...] = ()
    without_boot: bool = False
    kinds: tuple[str, ...] = ()  # volume types


#: What EC2 said of volumes and instances, and when: a fleet is selected first and checked then, and each look costs a
#: call.
Seen = dict[str, tuple[float, dict[str, Any]]]


def _seen(api: Api, seen: Seen, name: str) -> dict[str, Any] | None:
    """What was seen a moment ago."""
    at, item = seen.get(name, (0.0, {}))
    return item if item and api.clock.now() - at < _SEEN_S else None


def find(api: Api, seen: Seen, select: Mapping[str, object]) -> list[str]:
    """Ids of the volumes that `select` means. `instance`: all of its volumes but the root; `volumes`: by id; `tags`.
    Raises NotFoundError where there is none, PreconditionError where nothing is selected, BusyError while one is set
    aside and nothing stands in its place: the rest would pass for the whole node."""
    within = api.deadline("the volumes selected")
    filters: dict[str, list[str]] = {}
    boot = ""
    if instance := select.get("instance"):
        filters["attachment.instance-id"] = [str(instance)]
        about = of_instance(api, str(instance), within)
        seen[str(instance)] = (api.clock.now(), about)
        boot = _boot_volume(about)
    if isinstance(volumes := select.get("volumes"), list | tuple) and volumes:
        filters["volume-id"] = [str(volume) for volume in volumes]
    if isinstance(wanted := select.get("tags"), Mapping):
        filters |= {f"tag:{key}": [str(value)] for key, value in wanted.items()}
    if not filters:
        raise PreconditionError("selects nothing", object="select", cure="give instance, volumes or tags")
    listed = _listed(api, within, filters)
    found = [item for item in standing(listed) if item["VolumeId"] != boot]
    aside = [str(item["VolumeId"]) for item in found if tags.ASIDE in tags.read(item)]
    if instance:  # an origin that is detached already isn't listed as the instance's
        there = {str(item["VolumeId"]) for item in listed}
        aside += [origin for origin in _vacant(api, seen, str(instance), within) if origin not in there]
    if aside:
        cure = "continue or undo it on its host"
        raise BusyError("a restore in place is open, and has set it aside", object=aside[0], cure=cure)
    missing = set(filters.get("volume-id", [])) - {item["VolumeId"] for item in found}
    if missing or not found:
        raise NotFoundError("there is no such volume", object=", ".join(sorted(missing)) or str(dict(select)))
    for item in found:
        seen[item["VolumeId"]] = (api.clock.now(), item)
    return sorted(str(item["VolumeId"]) for item in found)


def standing(items: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The volumes among these that are their nodes' own now, not made for an attachment, nor set aside by a swap whose
    disk stands in its place. One set aside whose place is empty is among them: it is to be asked for, not left out."""
    items = list(items)
    taken = {tags.read(item).get(tags.SWAP) for item in items if attached_to(item)[0]}
    for item in items:
        labels = tags.read(item)
        on_its_way = tags.SWAP in labels and not attached_to(item)[0]
        replaced = tags.ASIDE in labels and (labels[tags.ASIDE] in taken or item["State"] in ("deleting", "deleted"))
        if tags.ATTACHMENT not in labels and not on_its_way and not replaced:
            yield item


def _vacant(api: Api, seen: Seen, instance: str, within: Deadline) -> list[str]:
    """Origins of the swaps on an instance whose own disk isn't attached. A committed one has set aside nothing, though
    it was killed before its last tags went. All of the region's are listed at once, by one thread: a fleet would ask
    for each node else."""

    def look() -> list[dict[str, Any]] | None:
        began, known = seen.get(tags.SWAP, (0.0, {}))
        if known and api.clock.now() - began < _SWAPS_S:
            return list(known["Volumes"])
        if api.looking.acquire(blocking=False):
            try:
                began = api.clock.now()
                seen[tags.SWAP] = began, {"Volumes": list(described(api, within, {"tag-key": [tags.SWAP]}))}
                return list(seen[tags.SWAP][1]["Volumes"])
            finally:
                api.looking.release()
        return None

    return [
        labels.get(tags.ORIGIN, "")
        for item in poll(look, within, first_s=0.1, most_s=1.0)
        if (labels := tags.read(item)).get(tags.INSTANCE) == instance
        and tags.SWAP in labels
        and tags.COMMITTED not in labels
        and not attached_to(item)[0]
    ]


def _listed(api: Api, within: Deadline, filters: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    given = [{"Name": name, "Values": values} for name, values in filters.items()]
    return list(api.pages("describe_volumes", "Volumes", within, Filters=given))


def plan(api: Api, seen: Seen, ids: Sequence[str], here: str | None) -> Plan:
    """`here`: the instance that the volumes' mounts were seen on. Raises NotFoundError, PreconditionError where no one
    call can take them."""
    within, what = api.deadline(", ".join(ids)), ", ".join(ids)
    items = {name: item for name in ids if (item := _seen(api, seen, name)) is not None}
    if len(items) < len(ids):
        items = {item["VolumeId"]: item for item in _listed(api, within, {"volume-id": list(ids)})}
    for name in ids:
        if name not in items:
            cure = "is it in another region? -o region=, or `region` in [aws]"
            raise NotFoundError("there is no such volume", object=name, cure=cure)
        if items[name]["State"] not in ("in-use", "available"):
            cure = "see the volume in the EC2 console"
            raise PreconditionError(f"is in state `{items[name]['State']}`", object=name, cure=cure)
    instances = {attached_to(items[name])[0] for name in ids}
    kinds = tuple(str(items[name]["VolumeType"]) for name in ids)
    if here is not None and instances != {here}:
        raise PreconditionError(
            f"EC2 says that it is attached to {', '.join(sorted(instances)) or 'nothing'}, and this is {here}",
            object=what,
            cure="is the account or the region another? -o profile=, -o region=",
        )
    if len(instances) > 1:
        raise PreconditionError(
            f"are attached to several instances ({', '.join(sorted(instances))}): that is no one instant",
            object=what,
            cure="take each instance by itself",
        )
    instance = instances.pop() if instances else ""
    if not instance:
        if len(ids) > 1:
            raise PreconditionError("are attached nowhere: several can't be taken at one instant", object=what)
        return Plan(tuple(ids), "", kinds=kinds)
    about = _seen(api, seen, instance) or of_instance(api, instance, within)
    boot = _boot_volume(about)
    all_of_it = [mapping["Ebs"]["VolumeId"] for mapping in about["BlockDeviceMappings"] if "Ebs" in mapping]
    excluded = tuple(name for name in all_of_it if name not in ids and name != boot)
    return Plan(tuple(ids), instance, excluded, boot not in ids, kinds)


def room(api: Api, plan: Plan, set_id: str) -> float:
    """Seconds until EC2 takes another snapshot of each of these volumes. Raises PreconditionError where too many are
    pending, BusyError where the set exists."""
    within = api.deadline(", ".join(plan.volumes))
    filters = [{"Name": "volume-id", "Values": list(plan.volumes)}]
    listed = api.pages("describe_snapshots", "Snapshots", within, OwnerIds=["self"], Filters=filters)
    pending = dict.fromkeys(plan.volumes, 0)
    wait = 0.0
    for item in api.memory.over(listed, "SnapshotId", "snap-"):
        if tags.read(item).get(tags.SET) == set_id:
            raise BusyError("exists already", object=set_id, cure="take another set")
        if item["VolumeId"] in pending:
            pending[item["VolumeId"]] += item["State"] == "pending"
            # Never longer than that: the two clocks may disagree.
            wait = max(wait, min(SPACING_S, SPACING_S - (api.clock.wall() - item["StartTime"].timestamp())))
    for name, kind in zip(plan.volumes, plan.kinds, strict=True):
        if pending[name] >= (most := _MOST_PENDING.get(kind, _USUALLY)):
            raise PreconditionError(
                f"{pending[name]} of its snapshots are pending, and EC2 takes {most} at once",
                object=name,
                cure="try again when they are done",
            )
    return wait


def _boot_volume(about: Mapping[str, Any]) -> str:
    for mapping in about.get("BlockDeviceMappings", []):
        if mapping["DeviceName"] == about.get("RootDeviceName"):
            return str(mapping.get("Ebs", {}).get("VolumeId", ""))
    return ""
