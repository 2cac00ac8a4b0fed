"""IAM as far as the roles of docs/gcp.md use it: is this permission on this resource granted? Must know no method.
Whatever is not understood in a condition is an error of the test, never a grant.

What an account may: None (everything), a set of permissions, or bindings, `{"permissions": [...], "condition": CEL}`.
Of a resource a condition knows `resource.type` and `resource.name` (IAM's own attributes; labels aren't among them).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

from tests.twins.gce.wire import Refusal

Granted = Set[str] | Sequence[Mapping[str, Any]] | None
_TYPES = {
    "disks": "Disk",
    "snapshots": "Snapshot",
    "instances": "Instance",
    "instantSnapshots": "InstantSnapshot",
    "instantSnapshotGroups": "InstantSnapshotGroup",
    "resourcePolicies": "ResourcePolicy",
    "operations": "Operation",
}


def demand(granted: Granted, permission: str, resource: str) -> None:
    """Raises Refusal unless granted. `resource`: `projects/P/zones/Z/disks/D`, or the project, which lists ask of."""
    if granted is None:
        return
    if isinstance(granted, Set):
        may = permission in granted
    else:
        may = any(
            permission in binding["permissions"] and holds(str(binding.get("condition", "")), resource)
            for binding in granted
        )
    if not may:
        raise Refusal("forbidden", f"Required '{permission}' permission for '{resource}'")


def holds(condition: str, resource: str) -> bool:
    """A condition in CEL: comparisons with strings, startsWith and endsWith, joined by &&, || and !."""
    if not condition:
        return True
    parts = resource.split("/")
    kind = (
        f"compute.googleapis.com/{_TYPES[parts[-2]]}"
        if len(parts) > 2
        else "cloudresourcemanager.googleapis.com/Project"
    )
    python = re.sub(r"!(?!=)", " not ", condition.replace("&&", " and ").replace("||", " or "))
    tree = ast.parse(python.strip(), mode="eval").body
    return bool(_value(tree, {"type": kind, "name": resource}))


def _value(node: ast.expr, resource: Mapping[str, str]) -> Any:
    match node:
        case ast.BoolOp(op=ast.And()):
            return all(_value(each, resource) for each in node.values)
        case ast.BoolOp(op=ast.Or()):
            return any(_value(each, resource) for each in node.values)
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, resource)
        case ast.Constant(value=str(text)):
            return text
        case ast.Attribute(value=ast.Name(id="resource"), attr=name) if name in resource:
            return resource[name]
        case ast.Compare(ops=[ast.Eq()]):
            return _value(node.left, resource) == _value(node.comparators[0], resource)
        case ast.Compare(ops=[ast.NotEq()]):
            return _value(node.left, resource) != _value(node.comparators[0], resource)
        case ast.Call(func=ast.Attribute(value=of, attr=("startsWith" | "endsWith") as method), args=[argument]):
            return getattr(_value(of, resource), method.lower())(_value(argument, resource))
    raise AssertionError(f"the twin's IAM has no {ast.unparse(node)}")
