"""The EVENT items of the tasks table: one for each change of a task, with all events of that change.

An item has the number of its last event as its key, so the items after EVENT#n hold every event after n. Its
attributes are those of its last event. `earlier` has, for each event before that one, what differs from the last.

A text that another item of the task has is not repeated here: `input_of` or `output_of` names it (`TextOf`), and
`Texts` reads it. The hash over the text is always in the event.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qaes.adapters import dynamo
from qaes.adapters.shards import day_key
from qaes.domain.canonical import canonical_json
from qaes.domain.models import Event, Plan, Task, TextOf

Item = dict[str, Any]

PREFIX = "EVENT#"
_NOT_OF_THE_EVENT = frozenset({"pk", "sk", "day", "earlier"})
_DEFAULTS = {name: each.default for name, each in Event.model_fields.items() if not each.is_required()}
_HASHES = frozenset({"input_hash", "output_hash", "plan_hash"})
_NO_TEXTS = frozenset({"input", "output"})


def event_item(task_id: str, first: int, events: Sequence[Event]) -> Item:
    """Make the item of a change's events, of which `first` is the first one's number."""
    *earlier, last = [_fields(event) for event in events]
    item = dynamo.key(task_id, f"{PREFIX}{first + len(earlier):06d}")
    # By its day the audit's sweeper finds it, if the stream has not brought it.
    item["day"] = {"S": day_key(events[-1].timestamp[:10], task_id)}
    item |= {name: _written(name, value) for name, value in last.items() if value != _DEFAULTS.get(name)}
    if earlier:
        differences = [
            {name: _written(name, value) for name, value in fields.items() if value != last[name]} for fields in earlier
        ]
        item["earlier"] = {"L": [{"M": fields} for fields in differences]}
    return item


def number_of(item: Item) -> int:
    """Return the number of the item's last event."""
    return int(item["sk"]["S"].removeprefix(PREFIX))


def fields_of(item: Item) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return the fields of each event of the item as (number, fields), in order; what was altered stays altered."""
    last = {name: value for name, value in item.items() if name not in _NOT_OF_THE_EVENT}
    earlier = item.get("earlier", {}).get("L", [])
    first = number_of(item) - len(earlier)
    for number, fields in enumerate([last | each["M"] for each in earlier] + [last], start=first):
        yield number, {name: _read(value) for name, value in fields.items()}


def events_of(item: Item) -> Iterator[tuple[int, Event]]:
    """Return the item's events as (number, event), in order; texts that other items have are not in them."""
    for number, fields in fields_of(item):
        yield number, Event.model_validate(fields)


class Texts:
    """The texts that a task's events name: read when first needed, empty where they are gone."""

    def __init__(self, table: str, task_id: str) -> None:
        self._table, self._task_id = table, task_id
        self._task: Task | None = None
        self._plan: Plan | None = None

    def disclose(self, event: Event) -> Event:
        """Return the event with its texts."""
        texts = {
            "input": self.text(event.input_of, event.step_index) if event.input_of else event.input,
            "output": self.text(event.output_of, event.step_index) if event.output_of else event.output,
        }
        return event.model_copy(update=texts)

    def text(self, of: TextOf, step_index: int) -> str:
        """Return the canonical JSON of the request, of the plan, of its policy's decision or of a step's parameters."""
        if of == "request":
            task = self._read_task()
            return canonical_json(task.request()) if task else ""
        plan = self._read_plan()
        if plan is None:
            return ""
        if of == "plan":
            return canonical_json(plan.model_dump(mode="json"))
        if of == "policy":
            return canonical_json(plan.policy.model_dump(mode="json"))
        return canonical_json(plan.steps[step_index].parameters) if 0 <= step_index < len(plan.steps) else ""

    def _read_task(self) -> Task | None:
        if self._task is None and (item := dynamo.get(self._table, self._task_id, "TASK")):
            self._task = Task.model_validate_json(item["data"]["S"])
        return self._task

    def _read_plan(self) -> Plan | None:
        task = self._read_task()
        if self._plan is None and task and task.plan_id and (item := dynamo.get(self._table, task.plan_id, "PLAN")):
            self._plan = Plan.model_validate_json(item["data"]["S"])
        return self._plan


def _fields(event: Event) -> dict[str, Any]:
    """Return the event's fields, without the texts that another item has."""
    fields = event.model_dump(mode="json")
    return fields | {side: "" for side in _NO_TEXTS if fields[f"{side}_of"]}


def _written(name: str, value: str | int) -> Item:
    if isinstance(value, int):
        return {"N": str(value)}
    return {"B": bytes.fromhex(value)} if name in _HASHES and value else {"S": value}


def _read(attribute: Item) -> str | int:
    if "N" in attribute:
        return int(attribute["N"])
    return bytes(attribute["B"]).hex() if "B" in attribute else str(attribute.get("S", ""))
