"""A node seen from outside its host: volumes that the config selects, of a machine that isn't this one. Which sets are
of them, and the plan of a take: no mount is seen and no writer can be held, so the grade is `crash`, and only where all
of it is one instant.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

from msgspec.structs import asdict

from snapshotter.core.errors import PreconditionError, UsageError
from snapshotter.core.model import Birth, Grade, Member, Quiesce, Root, SnapshotSet, Volume, new_set_id
from snapshotter.host.cloud import parts
from snapshotter.host.places import host_name
from snapshotter.nodes import profiles
from snapshotter.nodes.config import Node
from snapshotter.nodes.roots import Layout
from snapshotter.nodes.target import target_of
from snapshotter.provider import Provider
from snapshotter.verbs.plan import Plan, refuse_grade
from snapshotter.verbs.session import Session

#: A set that is younger and not sealed may still be in the making, on whatever host: the call that makes it takes a
#: minute at most.
_MAKING_S = 120.0


def disks_of(session: Session, node: Node) -> set[str]:
    """The disks of a node with `select`, as `ebs:vol-1`. Not asked for where it names them: a fleet costs no call a
    node. Raises as `make`."""
    name = session.provider_name or node.provider
    if node.select is not None and node.select.volumes and name is not None:
        return {f"{name}:{each}" for each in node.select.volumes}
    return disks(_selected(session, node)[1])


def disks(volumes: Sequence[Volume]) -> set[str]:
    return {f"{volume.provider}:{part}" for volume in volumes for part in parts(volume.id)}


def is_of(found: SnapshotSet, wanted: Collection[str]) -> bool:
    """Whether a set was taken of any of these disks, whoever took it. A node's name alone doesn't say so: another host
    may have a node of that name, and a copy from another region is of a disk there."""
    of = [(member.provider, part) for member in found.birth.members for part in parts(member.volume)]
    # A config may leave out a disk's zone.
    met = any(f"{name}:{each}" in wanted for name, part in of for each in (part, part.rpartition("/")[2]))
    return met and not found.replica_of


def of_node(node: Node, named: Sequence[SnapshotSet], wanted: Collection[str]) -> list[SnapshotSet]:
    """Of the sets that have the node's name: its own, and those of each target that these disks were ever taken as, so
    that a node whose disk was replaced keeps what was taken of the old one."""
    targets = {target_of(node), *(found.birth.target for found in named if is_of(found, wanted))}
    return [found for found in named if found.birth.target in targets and not found.replica_of]


def make(
    session: Session, node: Node, *, now: datetime, require: str | None = None, allow_skew: bool = False, slot: str = ""
) -> Plan:
    """The plan for a node with `select`. Raises UsageError, NotFoundError (no such volumes), PreconditionError."""
    provider, volumes = _selected(session, node)
    grade = Grade.CRASH if provider.one_instant(volumes) else Grade.SKEWED
    refuse_grade(node, grade, volumes, require, allow_skew)
    # Where they are mounted isn't known here: the first stands for the data path.
    others = [Root(f"{node.path}.volumes/{volume.id}", number) for number, volume in enumerate(volumes) if number]
    birth = Birth(
        set_id=new_set_id(now),
        target=target_of(node),
        node=node.name,
        host=host_name(),
        profile=node.profile or profiles.FALLBACK,
        roots=(Root(node.path, 0), *others),
        members=tuple(Member(volume.provider, volume.id) for volume in volumes),
        taken_at=now,
        deadline=now + timedelta(seconds=_MAKING_S),
        slot=slot,
    )
    provider.check(volumes, birth)
    profile = profiles.get(birth.profile, session.config.profiles)
    said, doubts = profile.hot_safety, []
    if said.safety in ("contested", "stop-required"):
        doubts.append(f"{profile.title} is {said.safety} for images of the running node: {said.reason}")
    return Plan(
        node=node,
        profile=profile,
        layout=Layout(roots=[], subvolumes=[], links_outside=[], aliases=[], warnings=doubts, snapshots=[], nowhere=[]),
        birth=birth,
        volumes=tuple(volumes),
        providers=(provider,) * len(volumes),
        quiesce=Quiesce.NONE,
        grade=grade,
        budget_s=float(node.budget),
    )


def _selected(session: Session, node: Node) -> tuple[Provider, list[Volume]]:
    name = session.provider_name or node.provider
    if name is None or node.select is None:
        raise UsageError(
            "selects volumes and names no provider", object=node.name, cure="set provider, for example to ebs"
        )
    provider = session.provider(name, node)
    if provider.traits.needs_host:
        raise UsageError(f"provider {name} can't take volumes from outside", object=node.name, cure="leave out select")
    if reasons := provider.availability():
        raise PreconditionError(f"provider {name} can't work here: {'; '.join(reasons)}", object=node.name)
    return provider, provider.find({key: value for key, value in asdict(node.select).items() if value})
