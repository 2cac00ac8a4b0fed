"""Compute Engine's wire format from the client library's own tables: a URL becomes a method and its request message, a
body becomes the message type that the library has for it. Must know no method.

The tables are the client's, so a path, a query parameter or a field that Compute Engine doesn't have is refused here as
there.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import typing
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from google.cloud import compute_v1
from google.protobuf import json_format

Message = Any
SERVICES = (
    "Disks",
    "GlobalOperations",
    "Instances",
    "InstantSnapshotGroups",
    "InstantSnapshots",
    "RegionDisks",
    "RegionInstantSnapshotGroups",
    "RegionInstantSnapshots",
    "RegionOperations",
    "ResourcePolicies",
    "Snapshots",
    "ZoneOperations",
)
#: reason -> HTTP status, where it isn't 400.
STATUS = {
    "authError": 401,
    "forbidden": 403,
    "rateLimitExceeded": 403,
    "quotaExceeded": 403,
    "insufficientPermissions": 403,
    "accessNotConfigured": 403,
    "notFound": 404,
    "alreadyExists": 409,
    "conditionNotMet": 412,
    "internalError": 500,
    "InternalError": 500,
    "notImplemented": 501,
    "backendError": 503,
}
_DOMAIN = {"rateLimitExceeded": "usageLimits", "accessNotConfigured": "usageLimits"}


class Refusal(Exception):
    """An answer of Compute Engine's that is an error."""

    def __init__(self, reason: str, message: str = "", status: int = 0) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason, self.message = reason, message or reason
        self.status = status or STATUS.get(reason, 400)


def invalid(field: str, value: object, why: str) -> Refusal:
    return Refusal("invalid", f"Invalid value for field '{field}': '{value}'. {why}")


@dataclass(frozen=True)
class Route:
    action: str  # as in Google's reference: `disks.createSnapshot`
    path: re.Pattern[str]
    request: Any  # the message type
    body: str  # its field that the body is; ""


def camel(name: str) -> str:
    first, *more = name.split("_")
    return first + "".join(word.capitalize() for word in more)


@functools.cache
def _routes() -> dict[tuple[str, int], list[Route]]:
    """By verb and number of segments. Fixed segments come before named ones: `disks/bulkInsert` is no disk."""
    found: dict[tuple[str, int], list[Route]] = {}
    for service in SERVICES:
        package = re.sub(r"(?<!^)(?=[A-Z])", "_", service).lower()
        base = importlib.import_module(f"google.cloud.compute_v1.services.{package}.transports.rest_base")
        client = getattr(compute_v1, f"{service}Client")
        for name, method in vars(getattr(base, f"_Base{service}RestTransport")).items():
            if not name.startswith("_Base") or not inspect.isclass(method):
                continue
            (options,) = method._get_http_options()  # type: ignore[attr-defined]
            snake = re.sub(r"(?<!^)(?=[A-Z])", "_", name.removeprefix("_Base")).lower()
            asked = inspect.signature(getattr(client, snake)).parameters["request"].annotation
            pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(options["uri"]))
            route = Route(
                f"{camel(package)}.{camel(snake)}",
                re.compile(pattern),
                typing.get_args(asked)[0],
                options.get("body", ""),
            )
            found.setdefault((options["method"].upper(), options["uri"].count("/")), []).append(route)
    for routes in found.values():
        routes.sort(key=lambda route: route.path.pattern.count("(?P<"))
    return found


def parse(method: str, target: str, body: bytes) -> tuple[str, Message]:
    """The action and its request. Raises Refusal."""
    url = urlsplit(target)
    for route in _routes().get((method, url.path.count("/")), []):
        if where := route.path.fullmatch(url.path):
            request = route.request()
            descriptor = route.request.pb(request).DESCRIPTOR
            for name, value in where.groupdict().items():
                setattr(request, name, unquote(value))
            for name, value in parse_qsl(url.query, keep_blank_values=True):
                if not name.startswith("$"):
                    _set(request, descriptor.fields_by_camelcase_name.get(name), name, value)
            if route.body:
                kind = route.request.meta.fields[route.body].message
                try:
                    setattr(request, route.body, kind.from_json(body or b"{}", ignore_unknown_fields=False))
                except json_format.ParseError as error:
                    raise Refusal("invalid", f"Invalid JSON payload received. {error}") from None
            elif body.strip() not in (b"", b"{}"):
                raise Refusal("invalid", "Invalid JSON payload received. No body is expected.")
            return route.action, request
    raise Refusal("notFound", f"The requested URL {url.path} was not found on this server.")


def _set(request: Message, field: Any, name: str, value: str) -> None:
    if field is None or field.message_type is not None:
        raise Refusal("invalid", f'Invalid JSON payload received. Unknown name "{name}": Cannot bind query parameter.')
    try:
        if field.cpp_type == field.CPPTYPE_BOOL:
            setattr(request, field.name, {"true": True, "false": False}[value.lower()])
        elif field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64, field.CPPTYPE_UINT32, field.CPPTYPE_UINT64):
            setattr(request, field.name, int(value))
        else:
            setattr(request, field.name, value)
    except (KeyError, ValueError):
        raise invalid(name, value, "It is of the wrong type.") from None


def answer(message: Message) -> bytes:
    kind = type(message)
    text = kind.to_json(message, use_integers_for_enums=False, always_print_fields_with_no_presence=False, indent=None)
    return str(text).encode()


def error(refusal: Refusal) -> bytes:
    said = {
        "message": refusal.message,
        "domain": _DOMAIN.get(refusal.reason, "global"),
        "reason": refusal.reason,
    }
    return json.dumps(
        {"error": {"code": refusal.status, "message": refusal.message, "errors": [said]}},
    ).encode()
