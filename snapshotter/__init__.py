"""snapshotter: hot backups of a node's data path by storage snapshots.

The orchestrator. It knows nodes, sets, time and policy, and no storage: that is `providers/`.
"""

__version__ = "0.1.0"
