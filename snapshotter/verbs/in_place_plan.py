"""What a restore in place would do: which directories change places with what, by which way, how much room and time
that takes, whose keys stand there afterwards. Changes nothing; every refusal that can be known beforehand is made here.
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from snapshotter.core.errors import (
    BusyError,
    JudgedBadError,
    PreconditionError,
    SnapshotterError,
)
from snapshotter.core.model import Birth, Member, SnapshotSet, compact_time
from snapshotter.host import btrfs, mounts, processes
from snapshotter.host.mounts import Mount, is_under
from snapshotter.host.places import private_directory
from snapshotter.host.service import Service
from snapshotter.host.service import of as service_of
from snapshotter.nodes import identity, profiles
from snapshotter.nodes.config import Node
from snapshotter.nodes.profiles import Profile
from snapshotter.nodes.roots import mount_at
from snapshotter.nodes.target import canonical, node_name, target_id
from snapshotter.verbs import in_place_ways as ways
from snapshotter.verbs import open_restores
from snapshotter.verbs.in_place_ways import Ground, Swap
from snapshotter.verbs.restore import foreseen, judge
from snapshotter.verbs.session import Session

UNMASKED = (
    "it takes several steps, and a service without a unit can't be kept from starting at boot after a power cut "
    "between them"
)


class Plan(Struct, frozen=True, kw_only=True):
    """All that is decided; the journal's first record. `only`: "", "database" or "key"; a resync has no set."""

    id: str
    set_id: str
    only: str
    target: str
    node: Node
    profile: str
    way: str  # "swap", "copy"
    grounds: tuple[Ground, ...]
    swaps: tuple[Swap, ...]
    roots: tuple[str, ...]
    running: bool | None  # None: it has no service
    masked: bool
    identity: str  # "set", "live", "" where there was nothing to choose
    from_set: bool
    from_host: bool
    set_address: str
    address: str  # of the live key
    node_id: str  # the enode's, of the live key
    validator: bool  # two of it, running with one key, would do harm
    height: int | None
    need_bytes: int | None
    free_bytes: int | None
    rate_bytes_s: int | None
    left_alone: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def path(self) -> str:
        """The data path."""
        return self.roots[0]

    @property
    def resync(self) -> bool:
        return not self.set_id

    @property
    def brings_key(self) -> bool:
        return not self.resync and self.only != "database"

    @property
    def wants_alone(self) -> bool:
        """Whether a person must say that no other node runs with the key that will stand there."""
        return self.brings_key and self.validator

    @property
    def whose_key(self) -> str:
        """Of the key that will stand there: `the key of 0x...`."""
        address = self.address if self.identity == "live" else self.set_address or self.address
        return f"the key of {address}" if address else "its key"

    @property
    def seconds(self) -> float | None:
        if self.way == "swap" or self.need_bytes == 0:
            return 1.0
        return self.need_bytes / self.rate_bytes_s if self.need_bytes and self.rate_bytes_s else None

    def service(self) -> Service | None:
        return service_of(self.node.unit, self.node.stop, self.node.start, self.node.status)

    def outside(self, where: dict[str, str] | None = None) -> list[tuple[str, str]]:
        """The roots elsewhere than below the data path, each with where its content is."""
        others = [root for root in self.roots[1:] if not is_under(root, self.path)]
        return [(root, (where or {}).get(root, root)) for root in others]

    def document(self) -> dict[str, Any]:
        """For --dry-run, and the head of what is told afterwards."""
        service = self.service()
        return {
            "set_id": self.set_id or None,
            "node": self.node.name,
            "target": self.target,
            "path": self.path,
            "profile": self.profile,
            "only": ("resync" if self.resync else self.only) or None,
            "way": self.way,
            "service": service.name if service else None,
            "running": self.running,
            "roots": [{"origin": ground.path, "aside": ground.aside} for ground in self.grounds]
            or [{"origin": swap.path, "aside": f"{swap.provider}:{swap.swap_id}"} for swap in self.swaps],
            "need_bytes": self.need_bytes,
            "free_bytes": self.free_bytes,
            "rate_bytes_s": self.rate_bytes_s,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "identity": self.identity or None,
            "address": self.address or None,
            "left_alone": list(self.left_alone),
            "warnings": list(self.warnings),
        }


def load(facts: Any) -> Plan:
    """The plan of a journal's first record. Raises SnapshotterError if it isn't one."""
    try:
        # A key that the config had when it began, and has no more, must not bar the way back.
        node = {key: value for key, value in facts["plan"]["node"].items() if key in Node.__struct_fields__}
        return msgspec.convert({**facts["plan"], "node": node}, Plan, dec_hook=_decode)
    except (KeyError, TypeError, AttributeError, msgspec.ValidationError) as error:
        raise SnapshotterError(f"the journal's plan can't be read: {error}") from None


def dump(plan: Plan) -> Any:
    return msgspec.to_builtins(plan, enc_hook=_encode)


def _encode(value: Any) -> Any:
    return float(value) if isinstance(value, float) else int(value) if isinstance(value, int) else str(value)


def _decode(kind: type, value: Any) -> Any:
    return kind(value)


# ------------------------------------------------------------------------------------------------------------ which


def node_of(session: Session, birth: Birth) -> Node:
    """The node whose data path the set is of: from the config, or made from the record. Raises PreconditionError."""
    for node in session.config.nodes.values():
        if canonical(node.path) == birth.path:
            return node
    named = session.config.nodes.get(birth.node)
    if named is not None:
        raise PreconditionError(
            f"the set is of {birth.path}, and this node is at {canonical(named.path)} now",
            object=named.name,
            cure="correct its path in the config, or restore with --to and move it",
        )
    return Node(name=node_name(birth.path), path=birth.path)


def profile_of(session: Session, node: Node, birth: Birth) -> Profile:
    """Raises PreconditionError if the set is of another kind of node than what is there."""
    own = session.config.profiles
    profile = profiles.get(birth.profile, own)
    there, why = (profiles.get(node.profile, own), "by the config") if node.profile else (None, "")
    if there is None and os.path.isdir(birth.path):
        there, why = profiles.detect(birth.path, own)
        there = None if there.name == profiles.FALLBACK else there
    if there is not None and there.name != profile.name:
        raise PreconditionError(
            f"the set is of a {profile.name} node, and {node.path} is of {there.name} ({why})",
            object=birth.set_id,
            cure="restore it with --to and look",
        )
    return profile


def restore(
    session: Session,
    selector: str,
    *,
    now: datetime,
    only: str = "",
    aside: str | None = None,
    choice: str = "",
    from_set: bool = False,
    from_host: bool = False,
    measure: bool = False,
) -> Plan:
    """`measure`: how fast the disk writes. Raises any of core.errors; changes nothing."""
    found = session.select(selector, careful=True, from_host=from_host)
    warnings = [*session.notes, *judge(found)]
    if measure:
        warnings += foreseen(session, found)
    if found.corrupt:
        raise JudgedBadError("was verified and found corrupt", object=found.set_id, cure="restore another set")
    birth = found.birth
    if not birth.paths_known:
        raise PreconditionError("its record doesn't name its paths", object=found.set_id, cure="restore it with --to")
    node = node_of(session, birth)
    profile = profile_of(session, node, birth)
    return _plan(session, node, profile, found, now, only, aside, choice, from_set, from_host, warnings, measure)


def resync(
    session: Session,
    node: Node,
    *,
    now: datetime,
    aside: str | None = None,
    from_set: bool = False,
    measure: bool = False,
) -> Plan:
    """The database goes, the keys stay. Raises any of core.errors; changes nothing."""
    if not os.path.isdir(node.path):
        raise PreconditionError("is not there: nothing to sync anew", object=node.path)
    own = session.config.profiles
    profile = profiles.get(node.profile, own) if node.profile else profiles.detect(node.path, own)[0]
    return _plan(session, node, profile, None, now, "database", aside, "", from_set, False, [], measure)


def _plan(
    session: Session,
    node: Node,
    profile: Profile,
    found: SnapshotSet | None,
    now: datetime,
    only: str,
    aside: str | None,
    choice: str,
    from_set: bool,
    from_host: bool,
    warnings: list[str],
    measure: bool,
) -> Plan:
    path = found.birth.path if found else canonical(node.path)
    target = target_id(path)
    open_restores.refuse(session, target, finished=True)
    if only and not (profile.database if only == "database" else profile.identity):
        what = "database is" if only == "database" else "keys are"
        raise PreconditionError(
            f"profile {profile.name} doesn't say what its {what}",
            object=node.name,
            cure="set the node's profile, or restore it whole",
        )
    roots = [root.path for root in found.birth.roots] if found else _roots_of(node, profile)
    _refuse_state_below(session, roots)
    table = mounts.table()
    for root in roots:
        _refuse_read_only(root, table)
    _refuse_unmounted(session, node, found, roots, from_host, table)
    service = service_of(node.unit, node.stop, node.start, node.status)
    running = service.running() if service else None
    if service is None:
        refuse_users(roots, "and no service is configured that could be stopped")
    live = _live_identity(node, profile, path, roots, choice) if found and only != "database" else None
    set_address = found.birth.address if found else ""
    if live is not None and set_address and not choice and live.address.lower() != set_address.lower():
        raise different(live.address, set_address, found.set_id if found else "")
    stamp = compact_time(now)
    token = os.urandom(3).hex()
    swaps = ways.swaps(session, found, node, profile, live, choice, aside, only, f"w{stamp}-{token}", table)
    left: list[str] = []
    grounds: tuple[Ground, ...] = ()
    if not swaps:
        grounds = ways.grounds_of(roots, found, path, stamp, token, aside, table)
        left = sorted(
            entry for ground in grounds for entry in ways.left_alone(ground, [g.path for g in grounds], table)
        )
    _refuse_others(session, path, ways.tops(profile, path, roots, only), left)
    need = ways.size_of(session, found, roots, profile, only) if found and not swaps else 0
    if (harm := ways.harm(session, grounds, need)) is not None:
        if any(ground.away for ground in grounds):
            raise harm  # the image is looked into only when the node is stopped already
        warnings = [*warnings, harm.line()]
    free, rate = ways.room_at(path, measure=measure and ways.bears_probe(session, path))
    if choice == "live" and not os.path.isdir(path):
        raise PreconditionError("there is no live key to keep", object=path, cure="--identity set takes the set's")
    masked = _masked(service, running)
    if service is not None and not service.can_mask and (only or not _one_step(grounds)):
        warnings = [*warnings, f"{UNMASKED} ({service.name}): see to that, until this is done"]
    return Plan(
        id=f"{stamp}-{token}",
        set_id=found.set_id if found else "",
        only=only,
        target=target,
        node=node,
        profile=profile.name,
        way="swap" if swaps else "copy",
        grounds=grounds,
        swaps=tuple(swaps),
        roots=tuple(roots),
        running=running,
        masked=masked,
        identity=choice,
        from_set=from_set,
        from_host=from_host,
        set_address=set_address,
        address=live.address if live else "",
        node_id=live.node_id if live else "",
        validator=node.type == "validator" or bool(profile.sign_state) or bool(live and live.validator),
        height=_height(found),
        need_bytes=need,
        free_bytes=free,
        rate_bytes_s=rate,
        left_alone=tuple(left),
        warnings=tuple(warnings),
    )


def _height(found: SnapshotSet | None) -> int | None:
    text = found.marks.get("height", "") if found else ""
    return int(text) if text.isdigit() else None


def _roots_of(node: Node, profile: Profile) -> list[str]:
    from snapshotter.nodes.roots import roots

    return [root.path for root in roots(node, profile).roots]


def as_of_now(plan: Plan) -> Plan:
    """The plan, its service looked at again. Raises PreconditionError."""
    service = plan.service()
    running = service.running() if service else None
    return msgspec.structs.replace(plan, running=running, masked=_masked(service, running))


def _masked(service: Service | None, running: bool | None) -> bool:
    masked = bool(service and service.masked())
    if running and masked and service is not None:
        raise PreconditionError(
            "runs, but is masked: it could not be started again",
            object=service.name,
            cure=f"systemctl unmask {service.name}",
        )
    if service is not None and service.can_mask and not masked:
        service.refuse_unmaskable()
    return masked


def _one_step(grounds: tuple[Ground, ...]) -> bool:
    """Whether old and new change places in one step of the file system, so that no power cut leaves a mix."""
    return len(grounds) == 1 and not grounds[0].fixed and not grounds[0].away


# --------------------------------------------------------------------------------------------------------- refusals


def refuse_users(roots: list[str], why: str) -> None:
    """Raise BusyError if any process has something below the roots open."""
    here = [root for root in roots if os.path.isdir(root)]
    users = processes.Scanner(here).users() if here else []
    if users:
        raise BusyError(
            f"is in use by {processes.named(users)}, {why}",
            object=roots[0],
            cure="stop it, or set unit (or stop, start and status) in the config",
        )


def different(live: str, of_set: str, set_id: str) -> PreconditionError:
    return PreconditionError(
        f"the live key is of {live}, the set's is of {of_set}",
        object=set_id,
        cure="--identity set takes the set's, --identity live keeps the live one",
    )


def _refuse_state_below(session: Session, roots: list[str]) -> None:
    state = private_directory(os.path.realpath(open_restores.directory(session)))
    here = mount_at(state, mounts.table())
    for root in roots:
        below = is_under(state, os.path.realpath(root))
        if not below and os.path.isdir(root):
            there = mount_at(os.path.realpath(root), mounts.table())
            same = there.device == here.device
            below = same and is_under(mounts.inside(state, here), mounts.inside(os.path.realpath(root), there))
        if below:
            raise PreconditionError(
                f"the journal would be in it ({state})",
                object=root,
                cure="set `state` in the config to a place outside",
            )


def _refuse_others(session: Session, path: str, tops: list[str], left: list[str]) -> None:
    """Raise PreconditionError where another node lives in what changes places: it would be rolled back as well, with
    its key and what it has signed."""
    for other in session.config.nodes.values():
        place = canonical(other.path)
        alone = any(is_under(place, each) for each in left)
        if place != path and not alone and any(is_under(place, top) for top in tops):
            raise PreconditionError(
                f"node {other.name} lives in it ({place}), and would be put back with it",
                object=path,
                cure="move that node out first; or restore with --to, and copy by hand",
            )


def _refuse_read_only(root: str, table: list[Mount]) -> None:
    at = root
    while not os.path.isdir(at):
        at = os.path.dirname(at)
    mount = mount_at(os.path.realpath(at), table)
    if mount.read_only:
        raise PreconditionError(
            f"is on a file system that is mounted read-only ({mount.path})",
            object=root,
            cure=f"look at why (dmesg), then: mount -o remount,rw {mount.path}; or restore elsewhere with --to",
        )
    if mount.fstype == "btrfs" and btrfs.is_read_only(at):
        raise PreconditionError(
            "is in a read-only subvolume, so nothing can be put in its place",
            object=root,
            cure=f"btrfs property set {at} ro false; or restore elsewhere with --to",
        )


def _refuse_unmounted(
    session: Session, node: Node, found: SnapshotSet | None, roots: list[str], from_host: bool, table: list[Mount]
) -> None:
    """Raise PreconditionError where a root lies on a disk that isn't mounted (it failed at boot): what was restored
    would fill the disk below, and be hidden as soon as the right one is mounted again."""
    mounted = {mount.path for mount in table}
    for number, path in enumerate(roots):
        place = os.path.realpath(path)
        missing = mounts.awaited(place, table)
        why = "by /etc/fstab or systemd"
        if not missing and found and not from_host:
            root = found.birth.roots[number]
            top = place.removesuffix(f"/{root.inside}") if root.inside else place
            member = found.birth.members[root.member]
            if top not in mounted and _lies_elsewhere(session, node, member, top, table):
                missing, why = [top], "when the set was taken"
        if missing:
            raise PreconditionError(
                f"nothing is mounted at {missing[0]}, where a disk of its was ({why})",
                object=path,
                cure=f"mount {missing[0]}; or restore it elsewhere with --to",
            )


def _lies_elsewhere(session: Session, node: Node, member: Member, top: str, table: list[Mount]) -> bool:
    """Whether the volume whose top was mounted here is on this host, and what is here now is another's file system."""
    provider = session.provider(member.provider, node, chosen=False)
    traits = provider.traits
    whole = traits.needs_host and traits.swaps and not traits.subvolumes_apart  # its volumes are file systems
    if not whole or not provider.sees(member.volume):
        return False
    while not os.path.isdir(top):
        top = os.path.dirname(top)
    volume = provider.claim(mount_at(top, table), top)
    return volume is None or volume.id != member.volume


def _live_identity(node: Node, profile: Profile, path: str, roots: list[str], choice: str) -> identity.Identity | None:
    if not os.path.isdir(path):
        return None
    outside = [(root, root) for root in roots[1:] if not is_under(root, path)]
    try:
        return identity.read(path, profile, node.key_file, roots=outside)
    except PreconditionError as error:
        if choice:
            return None  # whatever is there is set aside, or carried over as it is
        error.cure = (
            f"{error.cure}; or --identity set takes the set's" if error.cure else "--identity set takes the set's"
        )
        raise
