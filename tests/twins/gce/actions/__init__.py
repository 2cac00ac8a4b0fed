"""Compute Engine's methods on the twin's world, each with its checks: may it, does it exist, is it in the right state;
then the operation, and in it the quotas and the effect. Must know neither HTTP nor JSON.
"""

from tests.twins.gce.actions import disks, instances, instants, operations, snapshots  # noqa: F401  (they register)
from tests.twins.gce.actions.call import ACTIONS, Call

__all__ = ["ACTIONS", "Call"]
