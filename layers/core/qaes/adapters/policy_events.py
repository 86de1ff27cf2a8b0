"""The EVENT items of PolicyTable: pk `EVENTS#policy`, sk `EVENT#` and the number in nine digits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from qaes.adapters import dynamo
from qaes.domain.policy_events import PolicyEvent

Item = dict[str, Any]

EVENTS_PK: Final = "EVENTS#policy"
_PREFIX = "EVENT#"
_LAST = 999_999_999


def put_event(table: str, event: PolicyEvent) -> Item:
    """Return the write for the transaction of the change; its condition fails if another event has the number."""
    no_other_event_has_the_number = "attribute_not_exists(pk)"
    return {
        "Put": {
            "TableName": table,
            "Item": event_item(event),
            "ConditionExpression": no_other_event_has_the_number,
        }
    }


def newest_event(table: str) -> PolicyEvent | None:
    """Read the newest event consistently; None before the first."""
    response = dynamo.call(
        "query",
        TableName=table,
        KeyConditionExpression="pk = :pk AND begins_with(sk, :event)",
        ExpressionAttributeValues={":pk": {"S": EVENTS_PK}, ":event": {"S": _PREFIX}},
        ConsistentRead=True,
        ScanIndexForward=False,
        Limit=1,
    )
    return next(map(event_of, response["Items"]), None)


def events_after(table: str, number: int = 0) -> Iterator[PolicyEvent]:
    """Read the events after that number, in order."""
    items = dynamo.items(
        TableName=table,
        KeyConditionExpression="pk = :pk AND sk BETWEEN :first AND :last",
        ExpressionAttributeValues={
            ":pk": {"S": EVENTS_PK},
            ":first": {"S": _sk(number + 1)},
            ":last": {"S": _sk(_LAST)},
        },
        ConsistentRead=True,
    )
    return map(event_of, items)


def event_item(event: PolicyEvent) -> Item:
    """Write an event as its item."""
    fields = event.model_dump(exclude={"number"})
    return dynamo.key(EVENTS_PK, _sk(event.number)) | {name: {"S": value} for name, value in fields.items()}


def event_of(item: Item) -> PolicyEvent:
    """Read the event of an item, from the table or from its stream."""
    fields = {name: value["S"] for name, value in item.items() if name not in ("pk", "sk")}
    return PolicyEvent.model_validate({**fields, "number": int(item["sk"]["S"].removeprefix(_PREFIX))})


def _sk(number: int) -> str:
    return f"{_PREFIX}{number:09d}"
