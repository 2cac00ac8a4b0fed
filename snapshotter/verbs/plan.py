"""What a take would do: target -> roots -> volumes -> providers -> quiesce -> grade. Changes nothing.

`take` carries out exactly this plan, and `take --dry-run` prints it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from msgspec import Struct

from snapshotter import provider as providers
from snapshotter.core.errors import BusyError, PreconditionError, SnapshotterError, UsageError
from snapshotter.core.labels import decode_birth, encode_birth
from snapshotter.core.model import Birth, Grade, Member, Quiesce, Root, SnapshotSet, Volume, new_set_id
from snapshotter.host import mounts
from snapshotter.host.places import host_name
from snapshotter.nodes import profiles
from snapshotter.nodes.config import Node
from snapshotter.nodes.profiles import Profile
from snapshotter.nodes.roots import Layout, roots
from snapshotter.nodes.target import target_id
from snapshotter.provider import Provider
from snapshotter.verbs.documents import when
from snapshotter.verbs.session import Session

STOP_BUDGET_S = 3600.0


class SlotTakenError(BusyError):
    """Another set, `found`, is the backup of this scheduled time."""

    def __init__(self, found: SnapshotSet) -> None:
        super().__init__("the slot was taken already", object=found.set_id)
        self.found = found


class Claim(Struct, frozen=True):
    """One root, the provider that will snapshot what it lies on, and the volume."""

    root: str
    provider: Provider
    volume: Volume


class Plan(Struct, frozen=True):
    """Everything decided before anything is done. `volumes` are in member order."""

    node: Node
    profile: Profile
    layout: Layout
    birth: Birth
    volumes: tuple[Volume, ...]
    providers: tuple[Provider, ...]  # one per volume
    quiesce: Quiesce
    grade: Grade
    budget_s: float

    @property
    def set_id(self) -> str:
        return self.birth.set_id

    def by_provider(self) -> list[tuple[Provider, list[Volume]]]:
        """Each provider once, with its volumes, in member order."""
        groups: list[tuple[Provider, list[Volume]]] = []
        for provider, volume in zip(self.providers, self.volumes, strict=True):
            for known, volumes in groups:
                if known is provider:
                    volumes.append(volume)
                    break
            else:
                groups.append((provider, [volume]))
        return groups

    def locks(self) -> list[str]:
        return [f"target:{self.birth.target}", *(volume.key for volume in self.volumes)]

    def left_out(self) -> list[str]:
        """What lies below the roots, or is led to from there, and isn't in the set; each with why."""
        apart = any(provider.traits.subvolumes_apart for provider in self.providers)
        return [*self.layout.links_outside, *(self.layout.snapshots if apart else ())]

    def document(self) -> dict[str, Any]:
        """For `--dry-run`."""
        return {
            "set_id": self.set_id,
            "node": self.node.name,
            "target": self.birth.target,
            "path": self.birth.path,
            "profile": self.profile.name,
            "taken_at": when(self.birth.taken_at),
            "quiesce": str(self.quiesce),
            "budget_ms": round(self.budget_s * 1000),
            "grade": str(self.grade),
            "volumes": [{"provider": volume.provider, "volume": volume.id} for volume in self.volumes],
            "roots": [
                {"origin": root.path, "volume": self.volumes[root.member].id, "path": root.inside}
                for root in self.birth.roots
            ],
            "left_out": self.left_out(),
            "warnings": list(self.layout.warnings),
        }


def nearest(session: Session, node: Node, path: str, mount: mounts.Mount) -> tuple[Provider, Volume]:
    """The provider that serves `path` and the volume it claims: by request, else the claim nearest to the file
    system, else `copy`. It never falls through: a claim whose provider can't work is PreconditionError."""
    asked = session.provider_name or node.provider
    if asked:
        provider = session.provider(asked, node)
        volume = provider.claim(mount, path)
        if volume is None:
            raise PreconditionError(
                f"provider {asked} can't snapshot {mount.fstype} on {mount.source}",
                object=path,
                cure=f"`snapshotter providers {path}` shows which can",
            )
    else:
        for name in providers.names():
            if not providers.may_claim(name, mount):
                continue
            volume = session.provider(name, node, chosen=False).claim(mount, path)
            if volume is not None:
                provider = session.provider(name, node)
                break
        else:
            raise PreconditionError(
                f"no provider can snapshot {mount.fstype}", object=path, cure="move the data to a local file system"
            )
    reasons = provider.availability()
    if reasons:
        raise PreconditionError(f"provider {provider.name} can't work here: {'; '.join(reasons)}", object=path)
    return provider, volume


def claimed(session: Session, node: Node, layout: Layout) -> list[Claim]:
    """Who snapshots each root, and what lies apart below it. Raises as `nearest`."""
    claims = [Claim(found.path, *nearest(session, node, found.path, found.mount)) for found in layout.roots]
    for nested in layout.subvolumes:
        holder = max((c for c in claims if mounts.is_under(nested.path, c.root)), key=lambda c: len(c.root))
        if holder.provider.traits.subvolumes_apart:
            claims.append(Claim(nested.path, *nearest(session, node, nested.path, nested.mount)))
    return claims


class Survey(Struct, frozen=True):
    """What lies below a node's data path, and who snapshots it. `volumes` are in member order."""

    profile: Profile
    layout: Layout
    claims: tuple[Claim, ...]
    volumes: tuple[Volume, ...]
    providers: tuple[Provider, ...]  # one per volume


def survey(session: Session, node: Node) -> Survey:
    """Look at the node's storage. Raises as `nearest`, and PreconditionError for a disk that isn't mounted."""
    profile = profile_of(session, node)[0]
    layout = roots(node, profile)
    _refuse_unmounted(session, layout)
    claims = claimed(session, node, layout)
    found: dict[str, Claim] = {}
    for claim in claims:
        found.setdefault(claim.volume.key, claim)
    return Survey(
        profile=profile,
        layout=layout,
        claims=tuple(claims),
        volumes=tuple(claim.volume for claim in found.values()),
        providers=tuple(claim.provider for claim in found.values()),
    )


def held(
    node: Node, seen: Survey, *, quiesce: str | None = None, require: str | None = None, allow_skew: bool = False
) -> tuple[Quiesce, Grade]:
    """How the writers would be held, and what comes of it. Raises PreconditionError, UsageError where a take would be
    refused for what is quick to see: `status` asks too."""
    if not any(_has_anything(claim.root) for claim in seen.claims):
        raise PreconditionError(
            "is empty: an image of nothing is no backup", object=node.path, cure="is its disk mounted?"
        )
    chosen = _quiesce(node, quiesce, seen.providers, seen.volumes)
    grade = _grade(chosen, seen.providers, seen.volumes)
    refuse_grade(node, grade, seen.volumes, require, allow_skew)
    if chosen is Quiesce.STOP or (chosen is Quiesce.PAUSE and node.unit):
        _ask_service(node, chosen)
    return chosen, grade


def _ask_service(node: Node, chosen: Quiesce) -> None:
    """Raise PreconditionError where what a take asks the node's service can't be told."""
    from snapshotter.host import service  # most takes have none

    if chosen is Quiesce.PAUSE and node.unit:
        service.SystemdUnit(node.unit).control_group()
    elif found := service.of(node.unit, node.stop, node.start, node.status):
        found.running()


def make(
    session: Session,
    node: Node,
    *,
    now: datetime,
    quiesce: str | None = None,
    budget_s: float | None = None,
    require: str | None = None,
    allow_skew: bool = False,
    slot: str = "",
) -> Plan:
    """Decide everything. Raises PreconditionError (grade, skew, providers), UsageError."""
    if node.select is not None:
        from snapshotter.verbs import plan_outside

        return plan_outside.make(session, node, now=now, require=require, allow_skew=allow_skew, slot=slot)
    seen = survey(session, node)
    profile, layout, claims, volumes = seen.profile, seen.layout, seen.claims, seen.volumes
    chosen, grade = held(node, seen, quiesce=quiesce, require=require, allow_skew=allow_skew)
    keys = [volume.key for volume in volumes]
    set_id = new_set_id(now)
    # On one host the locks tell whether the run lives; the deadline only has to outlast the quiesce. But a slot's rival
    # on another host knows no more than that, and a hook comes first.
    making_s = max(1.0, budget_s or node.budget)
    if slot and node.hooks.before_take:
        making_s += node.timeout

    def record(address: str) -> Birth:
        return Birth(
            set_id=set_id,
            target=target_id(node.path),
            node=node.name,
            host=host_name(),
            profile=profile.name,
            roots=tuple(
                Root(claim.root, keys.index(claim.volume.key), _inside(claim.root, claim.volume)) for claim in claims
            ),
            members=tuple(Member(volume.provider, volume.id) for volume in volumes),
            taken_at=now,
            deadline=now + timedelta(seconds=making_s),
            slot=slot,
            address=address,
        )

    birth = record(_address(node, profile, layout))
    if birth.address and not _remembered(birth):
        layout.warnings.append("the node's address is not recorded: beside the paths there is no room for it")
        birth = record("")
    if not _remembered(birth):
        raise PreconditionError(
            "the paths of its roots are too long to be recorded, and it could not be restored",
            object=node.path,
            cure="give it a shorter path (a bind mount will do)",
        )
    if chosen not in (Quiesce.STOP, Quiesce.HOOKS):
        _heed_safety(node, profile, layout)
    plan = Plan(
        node=node,
        profile=profile,
        layout=layout,
        birth=birth,
        volumes=volumes,
        providers=seen.providers,
        quiesce=chosen,
        grade=grade,
        # A service takes its time to stop, and is held as long as the copy lasts.
        budget_s=budget_s or (STOP_BUDGET_S if chosen is Quiesce.STOP else float(node.budget)),
    )
    for provider, theirs in plan.by_provider():
        provider.check(theirs, birth)
    return plan


def _refuse_unmounted(session: Session, layout: Layout) -> None:
    """Raise PreconditionError where a disk of a root, or one that a link or a database's options lead to, isn't mounted
    (it failed at boot): the set would lack what is on it, and retention would let go of good ones for it."""
    table = mounts.table()
    for who, path in [*((root.path, root.path) for root in layout.roots), *layout.nowhere]:
        for point in mounts.awaited(path, table):
            raise PreconditionError(
                f"nothing is mounted at {point}, where /etc/fstab or systemd has a disk: the set would lack that",
                object=who,
                cure=f"mount {point}; or take its line out of /etc/fstab, or disable its .mount unit",
            )
    for name in filter(providers.may_be_here, providers.MOUNT_THEMSELVES):
        driver = session.provider(name, chosen=False)
        driver.refuse_unmounted([root.path for root in layout.roots], [path for _, path in layout.nowhere])


def refuse_grade(node: Node, grade: Grade, volumes: Sequence[Volume], require: str | None, allow_skew: bool) -> None:
    """Raise PreconditionError if what would come out is less than what is wanted."""
    wanted = Grade(require or node.require)
    if grade is Grade.SKEWED and not allow_skew:
        raise PreconditionError(
            f"the image would be skewed: {len(volumes)} volumes are not one instant and no writer is held"
            if len(volumes) > 1
            else f"the image would be skewed: {volumes[0].provider} needs the writers held, or its disks in one group",
            object=node.path,
            cure="leave --quiesce to auto, or say --allow-skew",
        )
    if grade.rank < wanted.rank and not (grade is Grade.SKEWED and allow_skew and require is None):
        raise PreconditionError(
            f"the grade would be {grade}, {wanted} is required", object=node.path, cure="--quiesce stop, or hooks"
        )


def _heed_safety(node: Node, profile: Profile, layout: Layout) -> None:
    """What the profile says of an image of the running node. Raises PreconditionError where that is worth nothing, and
    somebody uses the data now."""
    said = profile.hot_safety
    if said.safety == "contested":
        layout.warnings.append(
            f"whether {profile.title} opens a hot image is contested: {said.reason}; verify it, or --quiesce stop"
        )
    elif said.safety == "stop-required":
        from snapshotter.host import processes

        if users := processes.Scanner([found.path for found in layout.roots]).users():
            raise PreconditionError(
                f"is in use by {processes.named(users)}, and {profile.title} must be stopped for it: {said.reason}",
                object=node.path,
                cure="--quiesce stop, with its unit (or stop, start and status) in the config",
            )


def _address(node: Node, profile: Profile, layout: Layout) -> str:
    """The node's address, '' if it has none or it can't be told. A note of why joins the layout's warnings."""
    if profile.node_key is None:
        return ""
    from snapshotter.nodes import identity

    address, note = identity.for_record(layout.roots[0].path, profile, node.key_file)
    if note:
        layout.warnings.append(note)
    return address


def profile_of(session: Session, node: Node) -> tuple[Profile, str]:
    """The node's profile, by its config or else by its content, and why it is that. Raises UsageError."""
    own = session.config.profiles
    if node.profile:
        return profiles.get(node.profile, own), "the config says so"
    return profiles.detect(node.path, own)


def _has_anything(path: str) -> bool:
    with os.scandir(path) as entries:
        return any(entry.name not in ("lost+found", ".zfs") for entry in entries)


def _remembered(birth: Birth) -> bool:
    """Whether the birth record has room for the paths: a restore needs them."""
    decoded = decode_birth(encode_birth(birth))
    return decoded is not None and decoded.paths_known


def _inside(root: str, volume: Volume) -> str:
    if volume.path is None:
        raise SnapshotterError("a volume that was claimed by its path has none", object=volume.id)
    relative = os.path.relpath(root, volume.path)
    return "" if relative == "." else relative


def _quiesce(node: Node, asked: str | None, owners: Sequence[Provider], volumes: Sequence[Volume]) -> Quiesce:
    word = asked or node.quiesce
    if word != "auto":
        chosen = Quiesce(word)
        if chosen is Quiesce.HOOKS and not (node.hold and node.release):
            raise UsageError(
                "quiesce hooks needs both", object=node.name, cure="set hold = [...] and release = [...] in the config"
            )
        if chosen is Quiesce.STOP and not (node.unit or node.stop):
            raise UsageError(
                "quiesce stop needs a service",
                object=node.name,
                cure="set unit, or stop, start and status, in the config",
            )
        return chosen
    needs = {owner.traits.quiesce for owner in owners}
    if Quiesce.FREEZE in needs and any(volume.fstype in mounts.NEVER_FROZEN for volume in volumes):
        return Quiesce.PAUSE
    if needs == {Quiesce.FREEZE} and not any(mounts.is_root(volume.path) for volume in volumes if volume.path):
        return Quiesce.FREEZE  # all of them together, so it needn't be one instant
    if Quiesce.PAUSE in needs or not _one_instant(owners, volumes):
        return Quiesce.PAUSE
    return Quiesce.NONE


def _one_instant(owners: Sequence[Provider], volumes: Sequence[Volume]) -> bool:
    """One create() call makes all of it at one instant."""
    return len(set(map(id, owners))) == 1 and owners[0].one_instant(volumes)


def _grade(quiesce: Quiesce, owners: Sequence[Provider], volumes: Sequence[Volume]) -> Grade:
    for owner, volume in zip(owners, volumes, strict=True) if quiesce is not Quiesce.FREEZE else ():
        # One file system over several disks, each of another instant: the kernel writes to it whoever is paused.
        if owner.traits.quiesce is Quiesce.FREEZE and not owner.one_instant([volume]):
            return Grade.SKEWED
    if quiesce in (Quiesce.STOP, Quiesce.HOOKS):
        return Grade.APPLICATION
    if quiesce in (Quiesce.PAUSE, Quiesce.FREEZE):
        return Grade.FILESYSTEM
    needs = {owner.traits.quiesce for owner in owners}
    if Quiesce.PAUSE in needs or not _one_instant(owners, volumes):
        return Grade.SKEWED
    return Grade.CRASH if Quiesce.FREEZE in needs else Grade.FILESYSTEM
