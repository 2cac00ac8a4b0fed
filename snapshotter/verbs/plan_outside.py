"""A take's plan from outside the host: volumes that the config selects, of a machine that isn't this one. No mount is
seen and no writer can be held, so the grade is `crash`, and only where all of it is one instant.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from msgspec.structs import asdict

from snapshotter.core.errors import PreconditionError, UsageError
from snapshotter.core.model import Birth, Grade, Member, Quiesce, Root, new_set_id
from snapshotter.host.places import host_name
from snapshotter.nodes import profiles
from snapshotter.nodes.config import Node
from snapshotter.nodes.roots import Layout
from snapshotter.nodes.target import target_of
from snapshotter.verbs.plan import Plan, refuse_grade
from snapshotter.verbs.session import Session

#: A set that is younger and not sealed may still be in the making, on whatever host: the call that makes it takes a
#: minute at most.
_MAKING_S = 120.0


def make(
    session: Session, node: Node, *, now: datetime, require: str | None = None, allow_skew: bool = False, slot: str = ""
) -> Plan:
    """The plan for a node with `select`. Raises UsageError, NotFoundError (no such volumes), PreconditionError."""
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
    volumes = provider.find({key: value for key, value in asdict(node.select).items() if value})
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
        layout=Layout(roots=[], subvolumes=[], links_outside=[], aliases=[], warnings=doubts),
        birth=birth,
        volumes=tuple(volumes),
        providers=(provider,) * len(volumes),
        quiesce=Quiesce.NONE,
        grade=grade,
        budget_s=float(node.budget),
    )
