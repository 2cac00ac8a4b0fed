"""Which disks, how they can be taken at one instant, and whether Compute Engine would take them now: all that is asked
before anybody is held still. Must change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct

from providers.gce import labels
from providers.gce.api import Api, Unreachable
from providers.gce.names import NAME, Disk, disk, disk_of, last, milliseconds, path_of, region_of
from snapshotter.core.errors import BusyError, NotFoundError, PreconditionError
from snapshotter.core.model import Tagged, Volume
from snapshotter.core.remote import Deadline

#: "At most once every 10 minutes. If you want to issue a burst, at most 6 requests in 60 minutes": the guide to
#: snapshots.
BURST, WITHIN_S = 6, 3600.0
#: The guide to instant snapshots.
INSTANTS, INSTANT_SPACING_S = 32, 30.0
_SEEN_S = 60.0
_SELECT = "see the config's `select`"


class Plan(Struct, frozen=True):
    """How the disks of a set are taken: by their consistency group, at one instant; else (`group` is '') one by one."""

    disks: tuple[Disk, ...]
    group: str = ""  # the link of the policy

    @property
    def place(self) -> str:
        return self.disks[0].place


#: What was said of disks and instances, and when: they are selected first and checked then, and each look costs a call.
Seen = dict[str, tuple[float, Any]]


def look(api: Api, seen: Seen, which: Disk, within: Deadline) -> Any:
    """What is known of a disk, or was a moment ago. Raises NotFoundError."""
    at, item = seen.get(which.id, (0.0, None))
    if item is None or api.clock.now() - at > _SEEN_S:
        item = api.call(f"{which.service}.get", within, disk=which.name, **which.where)
        seen[which.id] = (api.clock.now(), item)
    return item


def instance(api: Api, seen: Seen, zone: str, name: str, within: Deadline) -> Any:
    """The same of an instance."""
    at, item = seen.get(f"{zone}/instance/{name}", (0.0, None))
    if item is None or api.clock.now() - at > _SEEN_S:
        item = api.call("Instances.get", within, zone=zone, instance=name)
        seen[f"{zone}/instance/{name}"] = (api.clock.now(), item)
    return item


def find(api: Api, seen: Seen, select: Mapping[str, object], zone: str) -> list[str]:
    """Ids of the disks that `select` means. `instance`: all of its disks but the one it boots from; `volumes`: by id,
    or by name in `zone`; `tags`: by labels. Restored copies aren't meant, unless they took their origin's place. Raises
    NotFoundError where there is none, BusyError while one of them changes places (the rest is no whole node),
    PreconditionError where nothing is selected."""
    within = api.deadline("the disks selected")
    if isinstance(named := select.get("instance"), str) and named:
        where, _, name = named.rpartition("/")
        if not (where or zone):
            raise PreconditionError("is in a zone that isn't known", object=named, cure="write ZONE/NAME, or -o zone=")
        about = instance(api, seen, where or zone, name, within)
        items = [
            look(api, seen, each, within)
            for attached in about.disks
            if not attached.boot and (each := disk_of(attached.source)) is not None
        ]
        # What a swap detached from it is known by what is to take its place.
        for item in near(api, within, f'labels.{labels.INSTANCE}="{about.id}"', where or zone):
            if (record := labels.swap_of(item)) is not None and not item.users:
                items += _set_aside(api, disk(record.origin), within)
    elif isinstance(volumes := select.get("volumes"), list | tuple) and volumes:
        named_so = [disk(each if "/" in each else f"{zone}/{each}") for each in map(str, volumes)]
        for which in named_so:
            _refuse_no_nodes(which, look(api, seen, which, within))
        return sorted(each.id for each in named_so)
    elif isinstance(tags := select.get("tags"), Mapping) and tags:
        given = " ".join(f'(labels.{key}="{value}")' for key, value in tags.items())
        items = list(api.pages("Disks.aggregated_list", within, filter=given))
        seen |= {found.id: (api.clock.now(), item) for item in items if (found := disk_of(item.self_link)) is not None}
    else:
        raise PreconditionError("selects nothing", object="select", cure="give instance, volumes or tags")
    found_ids = []
    for which, aside in _of_nodes(items):
        if aside:
            raise _open(which)
        found_ids.append(which.id)
    if not found_ids:
        raise NotFoundError("there is no such disk", object=str(dict(select)), cure=_SELECT)
    return sorted(found_ids)


def near(api: Api, within: Deadline, given: str, zone: str) -> Iterator[Any]:
    """Disks that an instance of the zone can have, and that fit a filter: known also while another zone can't be
    asked."""
    yield from api.pages("Disks.list", within, filter=given, zone=zone)
    yield from api.pages("RegionDisks.list", within, filter=given, region=region_of(zone))


def _of_nodes(items: Sequence[Any]) -> Iterator[tuple[Disk, bool]]:
    """Of these, the disks that are nodes', and whether each is set aside with nothing in its place yet. Not restored
    copies: of a swap's two, the new one when it is attached, until then the origin."""
    arrived = {item.labels[labels.SWAP] for item in items if labels.SWAP in item.labels and item.users}
    for item in items:
        which, marks = disk_of(item.self_link), item.labels
        if which is None or labels.ATTACHMENT in marks or marks.get(labels.ASIDE) in arrived:
            continue
        if labels.SWAP in marks and not item.users:
            continue
        yield which, labels.ASIDE in marks


def _set_aside(api: Api, origin: Disk, within: Deadline) -> list[Any]:
    """A swap's origin as it is now, if it is set aside already."""
    try:
        item = look(api, {}, origin, within)
    except NotFoundError:
        raise _open(origin) from None
    return [item] if labels.ASIDE in item.labels else []


def _refuse_no_nodes(which: Disk, item: Any) -> None:
    """Raise BusyError, NotFoundError for a disk that isn't a node's: left out, the rest would pass for the whole."""
    if labels.ASIDE in item.labels or (labels.SWAP in item.labels and not item.users):
        raise _open(which)
    if labels.ATTACHMENT in item.labels:
        raise NotFoundError("is a restored copy, no node's disk", object=which.id, cure=_SELECT)


def _open(which: Disk) -> BusyError:
    return BusyError(
        "changes places: a restore in place is open",
        object=which.id,
        cure="`snapshotter restore --continue` or `--undo` on its host; after `--discard` select what took its place",
    )


def tagged(api: Api) -> list[Tagged]:
    """Nodes of the fleet, by their disks' labels, in the order of their names. One of whose disks changes places has
    what is set aside among its own: `find` refuses that, for this node alone. Raises Unreachable; where it is known
    what can't be asked, with the nodes that have all their disks elsewhere (`tagged`)."""
    there = api.pages("Disks.aggregated_list", api.deadline("the fleet"), filter=f"labels.{labels.NODE}:*")
    items: dict[str, Any] = {}
    lost: Unreachable | None = None
    try:
        for item in there:
            if (found := disk_of(item.self_link)) is not None:
                items[found.id] = item
    except Unreachable as error:
        if not error.scopes:
            raise
        lost = error
    disks: dict[tuple[str, str], list[str]] = {}
    types: dict[tuple[str, str], str] = {}
    aside: list[Disk] = []
    for which, is_aside in _of_nodes(list(items.values())):
        item = items[which.id]
        if is_aside and not item.users:
            aside.append(which)
            continue
        user = path_of(next(iter(item.users), "")).split("/")
        node = item.labels[labels.NODE], f"{user[3]}/{user[5]}" if len(user) == 6 else ""
        disks.setdefault(node, []).append(which.id)
        types[node] = types.get(node) or item.labels.get(labels.TYPE, "")
    for which in aside:  # on the instance where the node's other disks are
        marks = items[which.id].labels
        node = next((known for known in disks if known[0] == marks[labels.NODE]), (marks[labels.NODE], ""))
        disks.setdefault(node, []).append(which.id)
        types[node] = types.get(node) or marks.get(labels.TYPE, "")
    nodes = [
        Tagged(name, types[name, instance], tuple(Volume(NAME, each) for each in sorted(those)), instance)
        for (name, instance), those in sorted(disks.items())
    ]
    if lost is None:
        return nodes
    partial = {each.node for each in nodes if _reaches(each, {last(scope) for scope in lost.scopes})}
    if partial:
        lost.message += f", and {', '.join(sorted(partial))} may have disks there: not taken"
    lost.tagged = [each for each in nodes if each.node not in partial]
    raise lost


def _reaches(node: Tagged, places: Set[str]) -> bool:
    """Whether the node may have a disk in one of these zones and regions: an instance's are in its own zone and that
    one's region; a regional disk that no instance has may be beside others in each of the region's zones."""
    own = {node.instance.partition("/")[0]} if node.instance else {disk(each.id).place for each in node.volumes}
    near = own | {region_of(each) for each in own} | {each for each in places if region_of(each) in own}
    return not near.isdisjoint(places)


def plan(api: Api, seen: Seen, ids: Sequence[str], here: Any | None) -> Plan:
    """`here`: the instance that the disks' mounts were seen on. Raises NotFoundError, PreconditionError."""
    within = api.deadline(", ".join(ids))
    if here is not None:
        attached = {path_of(each.source) for each in here.disks}
        for each in ids:
            if disk(each).link(api.project) not in attached:
                raise PreconditionError(
                    f"Compute Engine says that it isn't attached to {here.name}",
                    object=each,
                    cure="is the project another? -o project=",
                )
    items = [look(api, seen, disk(each), within) for each in ids]
    for each, item in zip(ids, items, strict=True):
        if item.status not in ("READY", "RESTORING"):
            raise PreconditionError(f"is in state {item.status}", object=each, cure="see the disk in the console")
    return Plan(tuple(map(disk, ids)), _group(api, items, within) if len(ids) > 1 else "")


def _group(api: Api, items: Sequence[Any], within: Deadline) -> str:
    """The consistency group that all of these disks are in; '' if there is none."""
    places = {item.zone or item.region for item in items}
    common = set.intersection(*({path_of(link) for link in item.resource_policies} for item in items))
    if len(places) != 1:
        return ""
    for link in sorted(common):
        try:
            where = region_of(last(next(iter(places))))
            policy = api.call("ResourcePolicies.get", within, region=where, resource_policy=last(link))
        except NotFoundError:
            continue
        if "disk_consistency_group_policy" in policy:
            return link
    return ""


def room(api: Api, seen: Seen, plan: Plan, set_id: str) -> float:
    """Seconds until Compute Engine takes these disks, a few. Raises PreconditionError where that is long, BusyError
    where the set exists."""
    within = api.deadline(", ".join(each.id for each in plan.disks))
    links = {path_of(look(api, seen, each, within).self_link): each for each in plan.disks}
    taken: dict[str, list[float]] = {link: [] for link in links}
    given = " OR ".join(f'(sourceDisk="{look(api, seen, each, within).self_link}")' for each in plan.disks)
    now = api.clock.wall()
    for item in api.pages("Snapshots.list", within, filter=given):
        if item.labels.get(labels.SET) == set_id:
            raise BusyError("exists already", object=set_id, cure="take another set")
        at = milliseconds(item.creation_timestamp) / 1000
        if path_of(item.source_disk) in taken and now - at < WITHIN_S:
            taken[path_of(item.source_disk)].append(at)
    for link, moments in taken.items():
        if len(moments) >= BURST:
            again = datetime.fromtimestamp(sorted(moments)[-BURST] + WITHIN_S, UTC)
            raise PreconditionError(
                f"{len(moments)} snapshots of it were made within the hour, and Compute Engine takes {BURST}",
                object=links[link].id,
                cure=f"take it again after {again:%H:%M} UTC",
            )
    return _instants(api, plan, links, within) if plan.group else 0.0


def _instants(api: Api, plan: Plan, links: Mapping[str, Disk], within: Deadline) -> float:
    """The same for the instant snapshots that a group is taken by."""
    wait, count = 0.0, dict.fromkeys(links, 0)
    service = "RegionInstantSnapshots" if plan.disks[0].regional else "InstantSnapshots"
    for item in api.pages(f"{service}.list", within, **plan.disks[0].where):
        if path_of(item.source_disk) in count:
            count[path_of(item.source_disk)] += 1
            age = api.clock.wall() - milliseconds(item.creation_timestamp) / 1000
            # Never longer than that: the two clocks may disagree.
            wait = max(wait, min(INSTANT_SPACING_S, INSTANT_SPACING_S - age))
    for link, many in count.items():
        if many >= INSTANTS:
            raise PreconditionError(
                f"has {many} instant snapshots, and can have {INSTANTS}",
                object=links[link].id,
                cure="delete some; `snapshotter reap` removes those that dead runs of ours left",
            )
    return wait
