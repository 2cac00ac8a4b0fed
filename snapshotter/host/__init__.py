"""What touches this Linux host: mounts, processes, quiesce, locks, services. Knows no nodes and no providers."""
