"""`python -m snapshotter` is the command `snapshotter`."""

from snapshotter.cli import main

if __name__ == "__main__":
    main()
