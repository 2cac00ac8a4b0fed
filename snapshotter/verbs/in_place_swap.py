"""Volumes swapped by their providers, with what is mounted there taken away meanwhile. Each may be done again after a
kill. Must know no journal and no service.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from snapshotter.core.model import MountSpec, SnapshotSet, Volume
from snapshotter.host import mounts
from snapshotter.host.places import private_directory
from snapshotter.verbs.in_place_plan import Plan
from snapshotter.verbs.in_place_ways import is_open
from snapshotter.verbs.restore import staging_directory
from snapshotter.verbs.session import Session


def swap(session: Session, plan: Plan, found: SnapshotSet) -> list[str]:
    """A clone of each member takes its volume's place. A swap that a killed run began is taken back first: nobody has
    used it. Returns notes for a person. Raises what the provider raises, BusyError (it can't be unmounted)."""
    notes: list[str] = []
    with _unmounted(session, plan):
        for one in plan.swaps:
            provider = session.provider(one.provider, plan.node, chosen=False)
            snapshot = next(m for m in found.snapshots if m.birth.member == one.member)
            if is_open(provider, one):
                provider.swap_back(one.swap_id)
            provider.notes = []
            provider.swap(one.swap_id, snapshot, Volume(one.provider, one.volume, one.path, one.fstype))
            notes += provider.notes
    return notes


def swap_back(session: Session, plan: Plan) -> None:
    """The volumes as they were. Absent is done."""
    with _unmounted(session, plan):
        for one in plan.swaps:
            session.provider(one.provider, plan.node, chosen=False).swap_back(one.swap_id)


def tidy(plan: Plan) -> None:
    """What a killed run has left mounted for itself alone goes. Absent is done."""
    hidden = _hidden(plan)
    if os.path.isdir(hidden):
        mounts.unmount(hidden)
        os.rmdir(hidden)


def _hidden(plan: Plan) -> str:
    return os.path.realpath(os.path.join(staging_directory(), f"swap-{plan.id}"))


@contextmanager
def _unmounted(session: Session, plan: Plan) -> Iterator[None]:
    """The volumes to be swapped, seen by nobody; mounted again on every way out. A btrfs that nothing shows any more is
    out of its provider's reach too: it is shown to us alone meanwhile."""
    hidden = private_directory(_hidden(plan))
    spec = next((one.mount for one in plan.swaps if one.mount and one.fstype == "btrfs"), None)
    try:
        if spec is not None and not mounts.is_mount_point(hidden):
            mounts.mount(MountSpec(spec[0], "btrfs", ("subvolid=5",)), hidden)
        try:
            for one in sorted(plan.swaps, key=lambda one: -len(one.path)):
                if one.mount:
                    mounts.unmount(one.path)
            yield
        finally:
            _mount_again(session, plan)
    finally:
        mounts.unmount(hidden)
        os.rmdir(hidden)


def _mount_again(session: Session, plan: Plan) -> None:
    for one in sorted(plan.swaps, key=lambda one: len(one.path)):
        if one.mount and not mounts.is_mount_point(one.path):
            source, kind, options = one.mount
            source = session.provider(one.provider, plan.node, chosen=False).source_of(one.volume, source)
            mounts.mount(MountSpec(source, kind, options), one.path)
