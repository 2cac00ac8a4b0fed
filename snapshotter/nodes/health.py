"""Is a node that was just started the one it was, and does it live? Asked over its RPC until it does or the time is up.

Must not know restores: it says what it found; what follows from that is the caller's. Nothing is raised for a node that
is unhealthy, or doesn't answer. Sources: Besu's documentation ("Health checks", "net_enode"), the execution API of
Ethereum (eth_*), devp2p's enode URLs.
"""

from __future__ import annotations

import re
import time
from typing import Any

from msgspec import Struct

from snapshotter.core.errors import PreconditionError, StorageError
from snapshotter.host.service import Service
from snapshotter.nodes import rpc
from snapshotter.nodes.config import Node
from snapshotter.nodes.profiles import Profile

_ENODE = re.compile(r"(?:enode://)?(?:0x)?([0-9a-fA-F]{128})(?:@.*)?", re.DOTALL)
_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}")
_PAUSE_S = 0.5
_ANSWER_S = 5.0
_WATCHED_S = 5.0


class Expected(Struct, frozen=True):
    """What must be found. None: not known, so not looked at. `enode_id` as `enode_id()` takes it; `height` the set's;
    `min_peers` 0 for a node that is alone in its network."""

    enode_id: str | None = None
    height: int | None = None
    min_peers: int = 1


class Seen(Struct, frozen=True):
    """What a node says of itself; None is what it doesn't say, `why` the last reason for that."""

    enode_id: str | None = None
    height: int | None = None
    peers: int | None = None
    syncing: bool | None = None
    why: str = ""


class Health(Struct, frozen=True):
    """`healthy` is None where the node can't be asked, as the config has no `rpc`: only its service was looked at.
    `findings` say what is wrong, `hints` what a person may look at; `notes` are no faults."""

    healthy: bool | None
    seen: Seen
    findings: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def enode_id(text: object) -> str | None:
    """The 128 hex digits of an enode URL, of its id alone, or of a public key; None if it is none."""
    match = _ENODE.fullmatch(text) if isinstance(text, str) else None
    return match[1].lower() if match else None


def look(node: Node) -> Seen:
    """Ask once, for some seconds at most (before a stop: who is it, how high, has it peers)."""
    if node.rpc is None:
        return Seen(why="no rpc is configured")
    url = node.rpc
    number, why = rpc.call(url, "eth_blockNumber", timeout_s=_ANSWER_S)
    height = int(number, 16) if isinstance(number, str) and _NUMBER.fullmatch(number) else None
    if height is None:
        why = why or "eth_blockNumber gave no block number"
    if number is None and not re.match("eth_blockNumber|HTTP", why):
        return Seen(why=why)  # nobody answers at all: the others needn't be waited for
    said, _ = rpc.call(url, "net_enode", timeout_s=_ANSWER_S)
    identity = enode_id(said)
    if identity is None:
        said, _ = rpc.call(url, "admin_nodeInfo", timeout_s=_ANSWER_S)
        if isinstance(said, dict):  # `id` is a hash of the key in geth, the key itself in others
            identity = enode_id(said.get("enode")) or enode_id(said.get("id"))
    return Seen(
        enode_id=identity,
        height=height,
        peers=_count(rpc.call(url, "net_peerCount", timeout_s=_ANSWER_S)[0]),
        syncing=_syncing(rpc.call(url, "eth_syncing", timeout_s=_ANSWER_S)),
        why=why,
    )


def _count(said: Any) -> int | None:
    if isinstance(said, str) and _NUMBER.fullmatch(said):
        return int(said, 16)
    return said if isinstance(said, int) and not isinstance(said, bool) and said >= 0 else None


def _syncing(answer: tuple[Any, str]) -> bool | None:
    said, why = answer
    return None if why else bool(said)


def prove(
    node: Node, profile: Profile, expected: Expected, deadline_s: float, *, service: Service | None = None
) -> Health:
    """Ask until the node is what is `expected`, its height has risen and its health pages are well, or `deadline_s`
    seconds have passed (and the last answer has come, some seconds more). Another identity than the expected one ends
    it at once: waiting doesn't change a key; so does a service that has stopped again."""
    if node.rpc is None:
        return _watch(min(deadline_s, _WATCHED_S), service)
    give_up = time.monotonic() + deadline_s
    wanted = enode_id(expected.enode_id)
    first: int | None = None
    while True:
        seen = look(node)
        first = seen.height if first is None else first
        stopped = _stopped(service)
        wrong = _wrong(node.rpc, profile, expected, seen, first)
        other = wanted is not None and seen.enode_id not in (None, wanted)
        if stopped or other or not wrong or time.monotonic() >= give_up:
            break
        time.sleep(_PAUSE_S)
    notes = []
    if wanted is not None and seen.enode_id is None and seen.height is not None:
        notes.append("it gives no enode (net_enode, admin_nodeInfo): whether it has the same key was not asked of it")
    findings = [*filter(None, [stopped]), *wrong]
    hints = _hints(profile, expected, seen, other) if findings else []
    return Health(not findings, seen, tuple(findings), tuple(hints), tuple(notes))


def _watch(seconds: float, service: Service | None) -> Health:
    """All that can be seen of a node without an RPC: that its service goes on running."""
    seen = Seen(why="no rpc is configured")
    if service is None:
        return Health(None, seen, notes=("no rpc and no service are configured: nothing was asked of it",))
    ends = time.monotonic() + seconds
    while not (stopped := _stopped(service)) and time.monotonic() < ends:
        time.sleep(_PAUSE_S)
    if stopped:
        return Health(False, seen, (stopped,), ("look at its log",))
    return Health(None, seen, notes=("no rpc is configured: only that its service runs was looked at",))


def _stopped(service: Service | None) -> str:
    if service is None:
        return ""
    try:
        return "" if service.running() else f"{service.name} has stopped again"
    except (PreconditionError, StorageError) as error:
        return error.line()


def _wrong(url: str, profile: Profile, expected: Expected, seen: Seen, first: int | None) -> list[str]:
    """What of the expected isn't (yet) so."""
    if seen.height is None:
        return [f"its RPC gives no height: {seen.why}"]
    found = []
    wanted = enode_id(expected.enode_id)
    if wanted is not None and seen.enode_id is not None and seen.enode_id != wanted:
        found.append(f"it has another key: its enode id is {_short(seen.enode_id)}, and was {_short(wanted)}")
    if expected.height is not None and seen.height < expected.height:
        found.append(f"its height is {seen.height}, and the set has {expected.height}")
    if first is None or seen.height <= first:
        found.append(f"its height doesn't rise: {seen.height}" + (", it is syncing" if seen.syncing else ""))
    if expected.min_peers and seen.peers is not None and seen.peers < expected.min_peers:
        found.append(f"it has {seen.peers or 'no'} peers")
    ready = profile.health.readiness and f"{profile.health.readiness}?minPeers={expected.min_peers}"
    for path in (profile.health.liveness, ready):
        if path is not None:
            status, _ = rpc.page(url, path, _ANSWER_S)
            # What isn't there (404), isn't for us (401, 403), or doesn't answer to GET (405) says nothing.
            if status is not None and status >= 500:
                found.append(f"{path} says {status}")
    return found


def _short(text: str) -> str:
    return f"{text[:8]}...{text[-8:]}"


def _hints(profile: Profile, expected: Expected, seen: Seen, other: bool) -> list[str]:
    hints = []
    if other:
        hints.append(
            "its key has changed: others know it by the old one (allow lists, static nodes, its validator seat)"
        )
    if seen.height is None:
        hints.append("look at its log")
        return hints
    if not seen.peers and expected.min_peers:
        port = profile.health.p2p_port
        hints.append("are its bootnodes or static nodes configured, and do they answer?")
        if port is not None:
            hints.append(f"is port {port} open, TCP and UDP, both ways?")
        if not other and seen.enode_id is None:
            hints.append("has its key changed? peers with allow lists know it by the old one")
    elif not other:
        hints.append("does it sync? its log says")
    return hints
