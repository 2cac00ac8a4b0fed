"""IAM as far as the policies of docs/aws.md use it: is this action on this resource granted? Must know no action's
effect. Whatever is not understood is an error of the test, never a grant.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from tests.twins.ec2.wire import Refusal

Context = Mapping[str, str | list[str]]


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _like(value: str, patterns: Any, *, case: bool = True) -> bool:
    """IAM's wildcards are `*` and `?` alone."""
    escaped = [str(pattern).replace("[", "[[]") for pattern in _many(patterns)]
    if not case:
        return any(fnmatch.fnmatchcase(value.lower(), pattern.lower()) for pattern in escaped)
    return any(fnmatch.fnmatchcase(value, pattern) for pattern in escaped)


def _holds(operator: str, key: str, wanted: Any, context: Context) -> bool:
    quantifier, _, operator = operator.rpartition(":")
    present = key in context
    if operator == "Null":
        return present is (str(wanted).lower() == "false")
    values = _many(context.get(key, []))
    if operator not in ("StringEquals", "StringLike", "ArnLike", "ArnEquals"):
        raise AssertionError(f"the twin's IAM has no {operator}")

    def test(value: str) -> bool:
        return value in _many(wanted) if operator.endswith("Equals") else _like(value, wanted)

    if quantifier == "ForAllValues":
        return all(test(value) for value in values)  # true of none at all, as IAM has it
    if quantifier == "ForAnyValue":
        return any(test(value) for value in values)
    return present and len(values) == 1 and test(values[0])


def _matches(statement: Mapping[str, Any], action: str, resource: str, context: Context) -> bool:
    unknown = set(statement) - {"Sid", "Effect", "Action", "Resource", "Condition"}
    if unknown:
        raise AssertionError(f"the twin's IAM has no {unknown}")
    return (
        _like(action, statement["Action"], case=False)
        and _like(resource, statement["Resource"])
        and all(
            _holds(operator, key, wanted, context)
            for operator, tests in statement.get("Condition", {}).items()
            for key, wanted in tests.items()
        )
    )


def granted(documents: Sequence[Mapping[str, Any]], action: str, resource: str, context: Context) -> bool:
    """Allowed by a statement and denied by none."""
    statements = [statement for document in documents for statement in document["Statement"]]
    effects = [each["Effect"] for each in statements if _matches(each, action, resource, context)]
    return "Allow" in effects and "Deny" not in effects


def demand(
    documents: Sequence[Mapping[str, Any]] | None, action: str, resource: str, context: Context | None = None
) -> None:
    """Raises Refusal unless granted. None: an administrator."""
    if documents is not None and not granted(documents, action, resource, context or {}):
        raise Refusal(
            "UnauthorizedOperation",
            f"You are not authorized to perform this operation. User: arn:aws:sts::123456789012:assumed-role/twin is "
            f"not authorized to perform: {action} on resource: {resource}",
            403,
        )
