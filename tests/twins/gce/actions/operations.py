"""Operations: looked at, and waited for."""

from __future__ import annotations

from google.cloud import compute_v1

from tests.twins.gce.actions.call import Call, action, operation_message
from tests.twins.gce.wire import Message
from tests.twins.gce.world import Operation


def _found(call: Call) -> Operation:
    service = call.action.partition(".")[0]
    path = f"{call.place}/operations/{call.request.operation}"
    call.demand(f"{service}.get", path)
    operation = call.world.find(call.world.operations, call.request.operation, path)
    return call.world.find({operation.path: operation}, path, path)  # not another place's


@action("zoneOperations.get", "regionOperations.get", "globalOperations.get")
def get(call: Call) -> Message:
    return operation_message(call.world, _found(call))


@action("zoneOperations.wait", "regionOperations.wait", "globalOperations.wait")
def wait(call: Call) -> Message:
    """At once: the reference allows it to return before two minutes, 'or after zero seconds', done or not."""
    return operation_message(call.world, _found(call))


@action("zoneOperations.list", "regionOperations.list", "globalOperations.list")
def listed(call: Call) -> Message:
    call.demand(f"{call.action.partition('.')[0]}.list")
    found = [each for each in call.world.operations.values() if each.place == call.place]
    return call.page(found, operation_message, compute_v1.OperationList())
