"""One call: who asks, what is to go wrong, what it begins; and what all methods have in common: names, labels, lists,
operations. Must know no method.
"""

from __future__ import annotations

import base64
import re
import secrets
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from google.cloud import compute_v1

from tests.twins.gce import filters, policy
from tests.twins.gce.wire import Message, Refusal, invalid
from tests.twins.gce.world import Operation, Resource, World, stamp
from tests.twins.knobs import Fault

R = TypeVar("R", bound=Resource)
ACTIONS: dict[str, Callable[[Call], Message]] = {}
_NAME = re.compile(r"[a-z](?:[-a-z0-9]{0,61}[a-z0-9])?")
_KEY = re.compile(r"[a-z][-_a-z0-9]{0,62}")
_VALUE = re.compile(r"[-_a-z0-9]{0,63}")
#: What an operation says in HTTP's terms about its error.
_STATUS = {"RESOURCE_NOT_READY": 400, "RESOURCE_IN_USE_BY_ANOTHER_RESOURCE": 400, "INTERNAL_ERROR": 503}
_LABEL = re.compile(r'labels\.([-\w]+)(?:="([^"*]*)"|:\*)')
_MESSAGE = {400: "BAD REQUEST", 403: "FORBIDDEN", 503: "SERVICE UNAVAILABLE"}


class Failed(Exception):
    """An operation ends with this error, and has no effect."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


def action(*names: str) -> Callable[[Callable[[Call], Message]], Callable[[Call], Message]]:
    def named(run: Callable[[Call], Message]) -> Callable[[Call], Message]:
        ACTIONS.update(dict.fromkeys(names, run))
        return run

    return named


@dataclass
class Call:
    world: World
    action: str
    request: Message
    permissions: policy.Granted = None
    fault: Fault | None = None

    def run(self) -> Message:
        """Raises Refusal."""
        if self.request.project not in (self.world.project,):
            raise Refusal("notFound", f"The resource 'projects/{self.request.project}' was not found")
        asked = self._asked()
        if asked is not None and asked[0] in self.world.by_request:
            before, begun = self.world.by_request[asked[0]]
            if before != asked[1]:
                raise invalid("requestId", asked[0], "It was used for another request.")
            return operation_message(self.world, begun)
        if self.action not in ACTIONS:
            raise Refusal("notImplemented", f"The twin has no {self.action}")
        if self.fault is not None and self.fault.kind == "stale":
            self._stale()
        answer = ACTIONS[self.action](self)
        if asked is not None and isinstance(answer, compute_v1.Operation):
            self.world.by_request[asked[0]] = asked[1], self.world.operations[answer.name]
        return answer

    def _asked(self) -> tuple[str, object] | None:
        given = getattr(self.request, "request_id", "")
        if not given:
            return None
        try:
            if not uuid.UUID(given).int:
                raise ValueError
        except ValueError:
            raise invalid("requestId", given, "It must be a UUID, and not zero.") from None
        return given, (self.action, type(self.request).to_json(self.request))

    def _stale(self) -> None:
        """Somebody else was quicker."""
        name = self.request.resource
        table: dict[str, Any] = self.world.snapshots if self.action.startswith("snapshots") else self.world.disks
        for each in table.values():
            if each.name == name:
                each.labels = {**each.labels, "theirs": "kept"}

    # -- where, and may it ----------------------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """Raises Refusal for a zone or a region that isn't."""
        for kind, known in (("zone", self.world.zones), ("region", self.world.regions)):
            if name := getattr(self.request, kind, ""):
                if name not in known:
                    raise invalid(kind, name, f"Unknown {kind}.")
                return f"{kind}s/{name}"
        return "global"

    def demand(self, permission: str, path: str = "") -> None:
        """Without a path, of the project."""
        whole = self.world.full(path) if path else f"projects/{self.world.project}"
        policy.demand(self.permissions, f"compute.{permission}", whole)

    def new(
        self, kind: str, table: Mapping[str, Resource], name: str, labels: Mapping[str, str], place: str = ""
    ) -> str:
        """The path of what is to be made. Raises Refusal."""
        path = f"{place or self.place}/{kind}/{name}"
        if not _NAME.fullmatch(name):
            why = "Must be a match of regex '(?:[a-z](?:[-a-z0-9]{0,61}[a-z0-9])?)'"
            raise invalid("resource.name", name, why)
        check_labels(labels)
        self.demand(f"{kind}.create", path)
        if labels:
            self.demand(f"{kind}.setLabels", path)
        if any(each.path == path for each in table.values()):
            raise Refusal("alreadyExists", f"The resource '{self.world.full(path)}' already exists")
        return path

    def usable_key(self, key: str) -> str:
        """Raises Refusal if Compute Engine may not use that KMS key."""
        key = key.partition("/cryptoKeyVersions/")[0]
        if key and not re.fullmatch(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+", key):
            raise invalid("kmsKeyName", key, "It is no key's name.")
        if key in self.world.limits.keys_denied:
            raise Refusal(
                "kmsPermissionDenied",
                f"Cloud KMS error when using key {key}: Permission 'cloudkms.cryptoKeyVersions.useToEncrypt' denied on "
                f"resource '{key}' (or it may not exist).",
            )
        return key

    # -- what it begins -------------------------------------------------------------------------------------------

    def begin(
        self,
        kind: str,
        target: Resource,
        effect: Callable[[], None],
        *,
        ends: float | None = None,
        until: Callable[[], bool] | None = None,
        vanish: Callable[[], None] | None = None,
        place: str = "",
    ) -> Message:
        """An operation. `effect` is what it does, now; `vanish` undoes it, for the fault of that name."""
        world, now = self.world, self.world.clock.now()
        place = place or target.place
        name = f"operation-{int(now * 1000)}-{secrets.token_hex(8)}"
        runs = now + world.limits.pending_s
        operation = Operation(
            path=f"{place}/operations/{name}",
            born=now,
            kind=kind,
            target=target.path,
            target_id=target.id,
            runs=runs,
            ends=max(runs, now + world.limits.operate_s if ends is None else ends),
            until=until,
        )
        try:
            if self.fault is not None and self.fault.kind == "operation":
                raise Failed(self.fault.code, self.fault.message or "on purpose")
            effect()
            if self.fault is not None and self.fault.kind == "vanish" and vanish is not None:
                world.later(operation.ends, vanish)
        except Failed as failed:
            operation.code, operation.message, operation.until = failed.code, failed.message, None
            operation.ends = max(runs, now + world.limits.operate_s)
        world.operations[name] = operation
        return operation_message(world, operation, begun=True)

    # -- lists ----------------------------------------------------------------------------------------------------

    def page(self, found: Iterable[R], message: Callable[[World, R], Message], answer: Message) -> Message:
        """`answer` filled with the items of a page; an aggregated list's (scope -> items) too."""
        request = self.request
        size = request.max_results if "max_results" in request else 500
        if not 0 <= size <= 500:
            raise invalid("maxResults", size, "Must be between 0 and 500.")
        wanted = filters.compiled(request.filter if "filter" in request else "")
        there = sorted(_labelled(self.world.seen(found), request), key=lambda each: each.path)
        items = [(each, message(self.world, each)) for each in there]
        if "filter" in request:
            items = [(each, item) for each, item in items if wanted(as_json(item))]
        order = request.order_by if "order_by" in request else ""
        if order == "creationTimestamp desc":
            items.sort(key=lambda one: -one[0].born)
        elif order not in ("", "name"):
            raise invalid("orderBy", order, "Must be name or creationTimestamp desc.")
        start = self._start()
        chosen = items[start : start + (size or 500)]
        if start + len(chosen) < len(items):
            answer.next_page_token = base64.urlsafe_b64encode(f"{start + len(chosen)}".encode()).decode()
        answer.id = f"projects/{self.world.project}/{self.action}"
        return self._scoped(chosen, answer) if self.action.endswith(".aggregatedList") else self._listed(chosen, answer)

    def _start(self) -> int:
        token = self.request.page_token if "page_token" in self.request else ""
        try:
            return int(base64.urlsafe_b64decode(token)) if token else 0
        except ValueError:
            raise invalid("pageToken", token, "The page token is invalid.") from None

    @staticmethod
    def _listed(chosen: Sequence[tuple[Resource, Message]], answer: Message) -> Message:
        answer.items = [item for _, item in chosen]
        return answer

    def _scoped(self, chosen: Sequence[tuple[Resource, Message]], answer: Message) -> Message:
        service = self.action.partition(".")[0]
        scoped = getattr(compute_v1, f"{service[0].upper()}{service[1:]}ScopedList")
        field = re.sub(r"(?<!^)(?=[A-Z])", "_", service).lower()
        scopes = [f"zones/{zone}" for zone in self.world.zones] + [f"regions/{region}" for region in self.world.regions]
        items: dict[str, list[Message]] = {scope: [] for scope in scopes}
        for each, item in chosen:
            items.setdefault(each.place, []).append(item)
        lost = {scope: "UNREACHABLE" for scope in self.world.unreachable}
        answer.items = {
            scope: scoped({field: found})
            if found and scope not in lost
            else scoped({"warning": {"code": lost.get(scope, "NO_RESULTS_ON_PAGE"), "message": scope}})
            for scope, found in items.items()
        }
        return answer


def as_json(message: Message) -> dict[str, Any]:
    """A message's fields under the names that filters have for them."""
    how = {"preserving_proto_field_name": False, "use_integers_for_enums": False}
    return dict(type(message).to_dict(message, always_print_fields_with_no_presence=False, **how))


def check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > 64:
        raise invalid("resource.labels", len(labels), "There may be 64 labels at most.")
    for key, value in labels.items():
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise invalid("resource.labels", f"{key}: {value}", "It is no valid label.")


def set_labels(call: Call, resource: Resource, given: Message) -> Message:
    if given.label_fingerprint != resource.fingerprint:
        raise Refusal("conditionNotMet", "Labels fingerprint either invalid or resource labels have changed")
    labels = dict(given.labels)
    check_labels(labels)

    def effect() -> None:
        resource.labels = labels

    return call.begin("setLabels", resource, effect)


def _labelled(found: Iterable[R], request: Any) -> Iterable[R]:
    """Those that a filter by one label leaves, before they are described: to describe thousands for each of a fleet's
    nodes would be the twin's time, not Compute Engine's."""
    simple = _LABEL.fullmatch(request.filter) if "filter" in request else None
    if simple is None:
        return found
    key, value = simple[1], simple[2]
    return [each for each in found if key in each.labels and value in (None, each.labels[key])]  # type: ignore[attr-defined]


def operation_message(world: World, operation: Operation, *, begun: bool = False) -> Message:
    now = world.clock.now()
    status = world.operation_status(operation)
    if begun and status == "DONE":
        status = "RUNNING"  # as Compute Engine answers, however quick it is
    where, _, name = operation.place.partition("/")
    span = operation.ends - operation.born
    found: Message = compute_v1.Operation(
        id=int(operation.id),
        name=operation.name,
        kind="compute#operation",
        operation_type=operation.kind,
        target_link=world.link(operation.target),
        target_id=int(operation.target_id),
        status=status,
        progress=100 if status == "DONE" else min(99, int(100 * (now - operation.born) / span)) if span else 0,
        insert_time=stamp(operation.born),
        user="snapshotter@twin-project.iam.gserviceaccount.com",
        self_link=world.link(operation.path),
        **({where.rstrip("s"): world.link(operation.place)} if name else {}),
    )
    if status != "PENDING":
        found.start_time = stamp(operation.runs)
    if status == "DONE":
        found.end_time = stamp(operation.ends)
        if operation.code:
            found.error = {"errors": [{"code": operation.code, "message": operation.message}]}
            found.http_error_status_code = _STATUS.get(operation.code, 403)
            found.http_error_message = _MESSAGE[found.http_error_status_code]
    return found
