"""Snapshots of a set's disks: made, marked, deleted; and the instant snapshots that a consistency group is taken by.
Must know no mount and no freeze.

By a group: one instant snapshot group of all its disks is the instant, and each member's snapshot is made of its
instant snapshot, which stays until that snapshot is complete (`instants_gone`). Without: a snapshot of each disk, at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from providers.gce import errors, labels
from providers.gce.api import Api, Operation, Unreachable
from providers.gce.choosing import Plan
from providers.gce.names import Disk, disk, disk_of, last, path_of
from snapshotter.core.errors import NotFoundError, SnapshotterError, StorageError
from snapshotter.core.labels import encode_birth
from snapshotter.core.model import SET_ID, Birth
from snapshotter.core.remote import Deadline, Temporary, persist, poll

T = TypeVar("T")
R = TypeVar("R")
_AT_ONCE = 8
#: The instant is fixed (CLOUD.md): what is on the disk from now on isn't in the image.
_TAKEN = frozenset({"UPLOADING", "READY"})


def all_of(act: Callable[[T], R], things: Sequence[T]) -> list[R]:
    """`act` done with each of these, several at once; the first failure is raised when all have ended."""
    if len(things) <= 1:
        return [act(thing) for thing in things]
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and one disk needs none

    with ThreadPoolExecutor(min(len(things), _AT_ONCE)) as pool:
        return list(pool.map(act, things))


#: A snapshot as Compute Engine describes it, and the operation that makes it where that may still fail.
Made = tuple[Any, Operation | None]


def take(api: Api, plan: Plan, birth: Birth, resources: Sequence[Mapping[str, Any]], within: Deadline) -> list[Made]:
    """The set's snapshots, in the order of `plan.disks`. `resources`: what each is to be like. Returns when the instant
    is fixed. Raises: what was made then is left to the caller."""
    wanted = list(zip(plan.disks, resources, strict=True))
    if not plan.group:
        return all_of(lambda one: _of_disk(api, {**one[1], "source_disk": one[0].link(api.project)}, within), wanted)
    instants = _instant(api, plan, birth, within)
    return all_of(lambda one: _of_instant(api, instants[one[0].id], one[1], within), wanted)


def begin(api: Api, resource: Mapping[str, Any], within: Deadline) -> Operation | None:
    """Ask for a snapshot. None if it is there already, and is this very one: an earlier answer was lost."""
    name = str(resource["name"])
    try:
        return api.begin("Snapshots.insert", within, name, snapshot_resource=dict(resource))
    except SnapshotterError as error:
        if errors.reason_of(error) not in errors.EXISTS:
            if errors.reason_of(error):
                errors.no_effect(error)
            raise
        found = api.call("Snapshots.get", within, snapshot=name)
        if found.description != resource["description"] or found.labels.get(labels.MANAGED) != "true":
            raise
        return None


def _of_disk(api: Api, resource: Mapping[str, Any], within: Deadline) -> Made:
    def attempt() -> Made:
        operation = begin(api, resource, within)

        def taken() -> Made | None:
            done = api.done(operation, within) if operation is not None else None
            try:
                found = api.call("Snapshots.get", within, snapshot=resource["name"])
            except NotFoundError:
                if not done:
                    return None
                raise StorageError("was made, and is gone", object=resource["name"], cure="take it again") from None
            if found.status == "FAILED":
                raise StorageError("Compute Engine could not take it", object=found.name, cure="take it again")
            return (found, None) if done or found.status in _TAKEN else None

        return poll(taken, within, first_s=0.1, most_s=1.0)

    return persist(attempt, within, again_after_loss=False)


def _of_instant(api: Api, link: str, resource: Mapping[str, Any], within: Deadline) -> Made:
    """A snapshot of an instant one: its instant is fixed, so nobody has to wait for it but the seal."""
    from google.cloud import compute_v1

    operation = begin(api, {**resource, "source_instant_snapshot": path_of(link)}, within)
    return compute_v1.Snapshot({**resource, "status": "CREATING"}), operation


# -- instant snapshots -------------------------------------------------------------------------------------------


def _instant(api: Api, plan: Plan, birth: Birth, within: Deadline) -> dict[str, str]:
    """The one instant of all the group's disks: disk id -> link of its instant snapshot."""
    first = plan.disks[0]
    kind = "RegionInstantSnapshotGroups" if first.regional else "InstantSnapshotGroups"
    group = {"name": birth.set_id, "description": encode_birth(birth), "source_consistency_group": plan.group}
    api.do(f"{kind}.insert", within, birth.set_id, instant_snapshot_group_resource=group, **first.where)
    found = {}
    for item in _instants_in(api, first, within):
        if last(item.source_instant_snapshot_group) == birth.set_id and (of := disk_of(item.source_disk)) is not None:
            found[of.id] = str(item.self_link)
    if missing := [each.id for each in plan.disks if each.id not in found]:
        raise StorageError(
            f"the group's instant has no {', '.join(missing)}", object=birth.set_id, cure="take it again"
        )
    return found


def _instants_in(api: Api, place: Disk, within: Deadline) -> Iterator[Any]:
    yield from api.pages(f"{'RegionI' if place.regional else 'I'}nstantSnapshots.list", within, **place.where)


def record_of(api: Api, place: Disk, within: Deadline) -> Birth | None:
    """The record of a group, named by its set's id; None if there is none, or it isn't ours."""
    kind = "RegionInstantSnapshotGroups" if place.regional else "InstantSnapshotGroups"
    try:
        return labels.group_of(api.call(f"{kind}.get", within, instant_snapshot_group=place.name, **place.where))
    except NotFoundError:
        return None


def groups(api: Api, within: Deadline, set_id: str | None = None) -> dict[str, list[Disk]]:
    """Sets (all, or one) of which there are instant snapshots still, and these as (place, name): where it can be asked
    now. In other places nothing hangs on them, and a later `advance` finds them."""
    found: dict[str, list[Disk]] = {}
    with suppress(Unreachable):
        for item in api.pages("InstantSnapshots.aggregated_list", within):
            of = last(item.source_instant_snapshot_group)
            if SET_ID.fullmatch(of) and set_id in (None, of):
                found.setdefault(of, []).append(Disk(last(item.zone or item.region), item.name))
    return found


def instants_gone(api: Api, set_id: str, instants: Sequence[Disk], within: Deadline) -> None:
    """Remove a set's instant snapshot group, and with it its instant snapshots; absent is done. One that isn't ours is
    left alone."""
    for place in {Disk(each.place, set_id) for each in instants}:
        if record_of(api, place, within) is not None:
            kind = "RegionInstantSnapshotGroups" if place.regional else "InstantSnapshotGroups"
            remove(api, f"{kind}.delete", set_id, within, instant_snapshot_group=set_id, **place.where)


# -- afterwards --------------------------------------------------------------------------------------------------


def settled(api: Api, name: str, operation: Operation | None, within: Deadline) -> None:
    """Until a snapshot's instant is fixed. Raises StorageError where it never will be."""

    def look() -> bool | None:
        try:
            done = api.done(operation, within) if operation is not None else None
        except Temporary as error:
            why = f"can't be sealed: Compute Engine took no more calls in that minute ({error})"
            raise StorageError(why, object=name, cure="take it again") from None
        try:
            found = api.call("Snapshots.get", within, snapshot=name)
        except NotFoundError:
            if operation is not None and not done:
                return None
            raise
        if found.status == "FAILED":
            raise StorageError("can't be sealed: Compute Engine could not take it", object=name, cure="take it again")
        return True if done or found.status in _TAKEN else None

    poll(look, within, first_s=0.2, most_s=10.0)


def relabel(api: Api, kind: str, within: Deadline, name: str, changes: Mapping[str, str | None]) -> None:
    """Set labels of a snapshot or a disk (`kind`: `Snapshots`; a volume's id is the name of a disk), and remove (None)
    others. Read, changed and written again for as long as another does the same in between. Raises NotFoundError."""
    where, get, resource = {}, {"snapshot": name}, "global_set_labels_request_resource"
    short = name
    if kind == "Disks":
        of = disk(name)
        kind, where, short = of.service, of.where, of.name
        get, resource = {"disk": short}, f"{next(iter(where))}_set_labels_request_resource"

    def attempt() -> None:
        item = api.call(f"{kind}.get", within, **get, **where)
        before = dict(item.labels)
        wanted = {key: value for key, value in {**before, **changes}.items() if value is not None}
        if wanted == before:
            return
        given = {"labels": wanted, "label_fingerprint": item.label_fingerprint}
        try:
            fields: dict[str, Any] = {"resource": short, resource: given, **where}
            api.do(f"{kind}.set_labels", within, short, **fields)
        except SnapshotterError as error:
            if errors.reason_of(error) in errors.STALE | errors.NOT_NOW:
                raise Temporary(errors.reason_of(error)) from None
            raise

    persist(attempt, within, again_after_loss=False)


def delete(api: Api, name: str, within: Deadline) -> None:
    """A snapshot; absent is done."""
    remove(api, "Snapshots.delete", name, within, snapshot=name)


def remove(api: Api, action: str, name: str, within: Deadline, **fields: Any) -> None:
    """Delete an object; absent is done. One that is in use is waited for. Raises StorageError at the deadline."""

    def attempt() -> None:
        try:
            api.do(action, within, name, **fields)
        except NotFoundError:
            return
        except SnapshotterError as error:
            if errors.reason_of(error) in errors.NOT_NOW | {errors.IN_USE}:
                raise Temporary(error.message) from None
            raise

    persist(attempt, within, again_after_loss=False)
