"""SHA-256 from the interpreter's own code, as the standard library's `random` takes its SHA-512. `hashlib` would load
OpenSSL for it: that takes as long as a snapshot. Nothing here is a secret."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import sha256 as sha256
else:
    try:
        from _sha256 import sha256  # Python 3.11
    except ImportError:
        try:
            from _sha2 import sha256  # since 3.12
        except ImportError:  # an interpreter built without its own
            from hashlib import sha256

__all__ = ["sha256"]
