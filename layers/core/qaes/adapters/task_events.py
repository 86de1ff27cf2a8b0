"""The EVENT items of the tasks table: one for each change of a task, with all events of that change.

An item has the number of its last event as its key, so the items after EVENT#n hold every event after n. Its
attributes are those of its last event. `earlier` has the different attributes of each earlier event.

A text of another item of the task is not repeated here: `input_of` or `output_of` names it (`TextOf`), and `Texts`
reads it. The hash of the text is always in the event.

A person's event is not here: `Decided` represents it, and its body is the item with the same number in DecisionsTable
(`qaes.adapters.decisions`), which only the gateway writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from qaes.adapters import dynamo
from qaes.adapters.shards import day_key
from qaes.domain.canonical import canonical_json
from qaes.domain.models import Event, Plan, TextOf
from qaes.domain.tasks.decisions import Decided

Item = dict[str, Any]

PREFIX = "EVENT#"
_NOT_OF_THE_EVENT = frozenset({"pk", "sk", "day", "earlier"})
_DEFAULTS = {name: field.default for name, field in Event.model_fields.items() if not field.is_required()} | {
    "decided": 0
}
_HASHES = frozenset({"input_hash", "output_hash", "plan_hash"})
_NO_TEXTS = frozenset({"input", "output"})


def event_item(task_id: str, first: int, events: Sequence[Event | Decided]) -> Item:
    """Return the item of a change's events; `first` is the number of the first event."""
    *earlier, last = [_fields(event) for event in events]
    item = dynamo.key(task_id, f"{PREFIX}{first + len(earlier):06d}")
    # The audit sweeper finds the item by its day if the stream has not delivered it.
    item["day"] = {"S": day_key(events[-1].timestamp[:10], task_id)}
    item |= _difference(last, _DEFAULTS)
    if earlier:
        item["earlier"] = {"L": [{"M": _difference(fields, _DEFAULTS | last)} for fields in earlier]}
    return item


def event_attributes(event: Event) -> Item:
    """Return the attributes of an event with all its texts."""
    return _difference(_fields(event.model_copy(update={"input_of": "", "output_of": ""})), _DEFAULTS)


def event_of(attributes: Item) -> Event:
    """Read the event that `event_attributes` wrote."""
    return Event.model_validate({name: _read(value) for name, value in attributes.items()})


def number_of(item: Item) -> int:
    """Return the number of the item's last event."""
    return int(item["sk"]["S"].removeprefix(PREFIX))


def events_of(item: Item) -> Iterator[tuple[int, Event | Decided]]:
    """Return the item's events as (number, event), in order, without the texts of other items."""
    last = {name: value for name, value in item.items() if name not in _NOT_OF_THE_EVENT}
    earlier = item.get("earlier", {}).get("L", [])
    first = number_of(item) - len(earlier)
    for number, attributes in enumerate([last | event["M"] for event in earlier] + [last], start=first):
        fields = {name: _read(value) for name, value in attributes.items()}
        decided = fields.pop("decided", 0)
        yield number, Decided(timestamp=str(fields["timestamp"])) if decided else Event.model_validate(fields)


class Texts:
    """Texts that a task's events refer to. They are read lazily; a deleted text is empty."""

    def __init__(self, table: str, task_id: str, request: str) -> None:
        self._table, self._task_id, self._request = table, task_id, request

    def disclose(self, event: Event) -> Event:
        """Return the event with its texts."""
        texts = {
            "input": self._text(event.input_of, event.step_index) if event.input_of else event.input,
            "output": self._text(event.output_of, event.step_index) if event.output_of else event.output,
        }
        return event.model_copy(update=texts)

    def _text(self, of: TextOf, step_index: int) -> str:
        """Return the canonical JSON of the request, of the plan, of its policy's decision or of a step's parameters."""
        if of == "request":
            return self._request
        plan = self._plan
        if plan is None:
            return ""
        if of == "plan":
            return canonical_json(plan.model_dump(mode="json"))
        if of == "policy":
            return canonical_json(plan.policy.model_dump(mode="json"))
        return canonical_json(plan.steps[step_index].parameters) if 0 <= step_index < len(plan.steps) else ""

    @cached_property
    def _plan(self) -> Plan | None:
        task = dynamo.get(self._table, self._task_id, "TASK")
        plan_id = json.loads(task["data"]["S"]).get("plan_id") if task else None
        item = dynamo.get(self._table, plan_id, "PLAN") if plan_id else None
        return Plan.model_validate_json(item["data"]["S"]) if item else None


def _fields(event: Event | Decided) -> dict[str, Any]:
    """Return the event's fields, without the texts of other items."""
    if isinstance(event, Decided):
        return {"timestamp": event.timestamp, "decided": 1}
    fields = event.model_dump(mode="json") | {"decided": 0}
    return fields | {side: "" for side in _NO_TEXTS if fields[f"{side}_of"]}


def _difference(fields: dict[str, Any], others: dict[str, Any]) -> Item:
    return {name: _written(name, value) for name, value in fields.items() if value != others.get(name)}


def _written(name: str, value: str | int) -> Item:
    if isinstance(value, int):
        return {"N": str(value)}
    return {"B": bytes.fromhex(value)} if name in _HASHES and value else {"S": value}


def _read(attribute: Item) -> str | int:
    if "N" in attribute:
        return int(attribute["N"])
    return bytes(attribute["B"]).hex() if "B" in attribute else str(attribute.get("S", ""))
