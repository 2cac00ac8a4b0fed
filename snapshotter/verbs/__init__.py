"""What can be done, a file each, found by its name. A verb takes typed arguments, acts, and returns what it did."""
