"""One question to a cloud's metadata service, which only an instance can reach. Knows no cloud."""

from __future__ import annotations

from collections.abc import Mapping

from snapshotter.core.errors import PreconditionError

_TIMEOUT_S = 2.0
_MOST_BYTES = 65536


def ask(provider: str, host: str, method: str, path: str, headers: Mapping[str, str], cure: str) -> str:
    """The answer's text. Raises PreconditionError, with `cure`, if there is none."""
    import http.client  # slow to import, and nobody needs it off an instance

    try:
        connection = http.client.HTTPConnection(host, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, headers=dict(headers))
            answer = connection.getresponse()
            content = answer.read(_MOST_BYTES).decode()
            if answer.status != 200:
                raise http.client.HTTPException(f"status {answer.status}")
            return content
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PreconditionError(
            f"the instance metadata service doesn't answer: {error}", object=provider, cure=cure
        ) from None
