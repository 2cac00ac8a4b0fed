"""A secret that the config names and doesn't hold: `env:NAME`, or `file:/path`. Its value is in no error and no log."""

from __future__ import annotations

import os
import stat

from snapshotter.core.errors import PreconditionError


def reveal(where: str) -> str:
    """The secret. Raises PreconditionError where there is none, or a file that others may read."""
    kind, _, name = where.partition(":")
    if kind == "env":
        if value := os.environ.get(name, "").strip():
            return value
        raise PreconditionError("is not set in the environment", object=where, cure="set it where the timer runs")
    try:
        with open(name, encoding="utf-8") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o007:
                raise PreconditionError("can be read by everybody", object=where, cure=f"chmod 600 {name}")
            value = file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise PreconditionError(f"can't read it: {why}", object=where) from None
    if not value:
        raise PreconditionError("is empty", object=where)
    return value
