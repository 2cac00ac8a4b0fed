"""Telling others: a watcher's URLs at start, success and failure, and people by apprise when a tick failed. Nothing
here fails what it tells of, and no URL is ever shown: it is a secret.
"""

from __future__ import annotations

from snapshotter.core.errors import PreconditionError, SnapshotterError, pip_install
from snapshotter.host.secrets import reveal
from snapshotter.nodes.config import Node

_PATIENCE_S = 10.0


def ping(node: Node, event: str, text: str = "") -> list[str]:
    """Ask for the node's URL of this event (start, success, fail), with `text` as the body. Returns what went wrong."""
    where = getattr(node.ping, event)
    if where is None:
        return []
    import urllib.request
    from http.client import HTTPException

    try:
        url = reveal(where)
        if not url.startswith(("http://", "https://")):
            raise PreconditionError("is no http URL", object=where)
        request = urllib.request.Request(url, data=text.encode()[:10_000])  # noqa: S310 checked above
        with urllib.request.urlopen(request, timeout=_PATIENCE_S):  # noqa: S310
            return []
    except SnapshotterError as error:
        return [f"{node.name}: ping {event}: {error.line()}"]
    except (OSError, ValueError, HTTPException) as error:
        return [f"{node.name}: ping {event} ({where}) failed: {_plain(error)}"]


def people(node: Node, title: str, text: str) -> list[str]:
    """Send to all of the node's apprise URLs. Returns what went wrong."""
    if not node.notify:
        return []
    try:
        import apprise
    except ImportError:
        return [f"{node.name}: nobody was told: {pip_install('notify')}"]
    wrong = []
    for where in node.notify:
        try:
            sender = apprise.Apprise()
            known = sender.add(reveal(where))
            if not known or not sender.notify(body=text, title=title):
                wrong.append(f"{node.name}: notify {where}: {'was not sent' if known else 'is no URL of apprise'}")
        except SnapshotterError as error:
            wrong.append(f"{node.name}: notify {where}: {error.line()}")
        except Exception as error:  # of the hundred services' own code
            wrong.append(f"{node.name}: notify {where} failed: {type(error).__name__}")
    return wrong


def _plain(error: Exception) -> str:
    """What failed, without what the URL held."""
    code = getattr(error, "code", None)
    reason = getattr(error, "reason", None)
    if isinstance(code, int):
        return f"HTTP {code}"
    return reason.strerror or type(reason).__name__ if isinstance(reason, OSError) else type(error).__name__
