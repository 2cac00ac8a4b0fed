"""EC2's wire format from botocore's own model of the service: a request's form becomes the action's parameters, an
answer becomes XML. Must know no action.

The model is the client's, so a parameter that EC2 doesn't have, of the wrong type, or missing, fails here as there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl
from xml.sax.saxutils import escape

import botocore.session
from botocore.model import OperationModel, ServiceModel, Shape


class Refusal(Exception):
    """An answer of EC2's that is an error."""

    def __init__(self, code: str, message: str = "", status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status = code, message or code, status


@functools.cache
def model() -> ServiceModel:
    return botocore.session.get_session().get_service_model("ec2")  # type: ignore[no-any-return]


def parse(body: bytes) -> tuple[OperationModel, dict[str, Any]]:
    """The operation and its parameters, under the names that boto3 has for them."""
    form = dict(parse_qsl(body.decode(), keep_blank_values=True))
    action = form.pop("Action", "")
    form.pop("Version", None)
    if action not in model().operation_names:
        raise Refusal("InvalidAction", f"The action {action} is not valid for this web service.")
    operation = model().operation_model(action)
    tree: dict[str, Any] = {}
    for key, value in form.items():
        here = tree
        *above, last = key.split(".")
        for part in above:
            here = here.setdefault(part, {})
        here[last] = value
    given = _structure(operation.input_shape, tree, "")
    for name in operation.input_shape.required_members:
        if name not in given:
            raise Refusal("MissingParameter", f"The request must contain the parameter {name}")
    return operation, given


def _structure(shape: Any, tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = {_query_name(name, member): (name, member) for name, member in shape.members.items()}
    found = {}
    for key, value in tree.items():
        if key not in names:
            raise Refusal("UnknownParameter", f"The parameter {where}{key} is not recognized")
        name, member = names[key]
        found[name] = _value(member, value, f"{where}{key}")
    return found


def _value(shape: Any, value: Any, where: str) -> Any:
    if shape.type_name == "structure":
        return _structure(shape, value, f"{where}.")
    if shape.type_name == "list":
        return [_value(shape.member, value[key], f"{where}.{key}") for key in sorted(value, key=int)]
    try:
        if shape.type_name == "boolean":
            return {"true": True, "false": False}[value]
        if shape.type_name in ("integer", "long"):
            return int(value)
        if shape.type_name == "string" and (allowed := shape.metadata.get("enum")) and value not in allowed:
            raise ValueError(value)
    except (ValueError, KeyError, TypeError):
        raise Refusal("InvalidParameterValue", f"Value ({value}) for parameter {where} is invalid") from None
    return value


def _query_name(name: str, shape: Shape) -> str:
    """As botocore's own EC2 serializer names a parameter."""
    serialized = shape.serialization
    if "queryName" in serialized:
        return str(serialized["queryName"])
    location = str(serialized.get("name", name))
    return location[0].upper() + location[1:]


def answer(operation: OperationModel, result: Mapping[str, Any], request_id: str) -> bytes:
    """The XML of a result in boto3's names. Raises KeyError for a member that the answer doesn't have."""
    shape = operation.output_shape
    inner = _xml(shape, result) if shape is not None else f"<return>{str(result.get('Return', True)).lower()}</return>"
    name = f"{operation.name}Response"
    space = model().metadata["xmlNamespace"]
    return f'<{name} xmlns="{space}"><requestId>{request_id}</requestId>{inner}</{name}>'.encode()


def error(refusal: Refusal, request_id: str) -> bytes:
    return (
        f"<Response><Errors><Error><Code>{refusal.code}</Code><Message>{escape(refusal.message)}</Message></Error>"
        f"</Errors><RequestID>{request_id}</RequestID></Response>"
    ).encode()


def _xml(shape: Any, value: Any) -> str:
    if shape.type_name == "structure":
        parts = []
        for name, inner in value.items():
            if inner is not None:
                tag = shape.members[name].serialization.get("name", name)
                parts.append(f"<{tag}>{_xml(shape.members[name], inner)}</{tag}>")
        return "".join(parts)
    if shape.type_name == "list":
        return "".join(f"<item>{_xml(shape.member, inner)}</item>" for inner in value)
    if shape.type_name == "timestamp":
        assert isinstance(value, datetime)
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    if shape.type_name == "boolean":
        return "true" if value else "false"
    return escape(str(value))
