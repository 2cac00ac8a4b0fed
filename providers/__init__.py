"""The drivers, one file each. They know storage; they know no nodes, no policy and no verb.

Loaded by name through `snapshotter.provider`, never imported from here.
"""
