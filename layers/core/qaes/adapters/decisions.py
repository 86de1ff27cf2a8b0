"""DecisionsTable: people's decisions about tasks. Only the gateway's role writes it; its items never change.

pk=task_id, sk=DECISION#n: the event with number n. `texts` has its input and its output, one line each, compressed
by zlib. The first decision is the request. It has the salt of the task's hashes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

from qaes.adapters import dynamo, settings
from qaes.adapters.task_events import event_attributes, event_of
from qaes.domain.errors import NotFoundError
from qaes.domain.models import Event
from qaes.domain.tasks.decisions import Decisions

Item = dict[str, Any]

_PREFIX = "DECISION#"
_NOT_OF_THE_EVENT = frozenset({"pk", "sk", "salt", "texts"})


class DecisionsTable:
    """Decisions on tasks. All reads are consistent."""

    def __init__(self, table: str | None = None) -> None:
        self._table = table or settings.text("DECISIONS_TABLE")

    def put(self, task_id: str, number: int, event: Event, *, salt: str | None = None) -> Item:
        """Return the write of a new decision; the request also has the `salt`."""
        texts = {"texts": {"B": zlib.compress(f"{event.input}\n{event.output}".encode())}}
        bare = event_attributes(event.model_copy(update={"input": "", "output": ""}))
        item = _key(task_id, number) | bare | texts | ({"salt": {"S": salt}} if salt else {})
        not_there_yet = "attribute_not_exists(pk)"
        return {"Put": {"TableName": self._table, "Item": item, "ConditionExpression": not_there_yet}}

    def event(self, task_id: str, number: int) -> Event | None:
        """Read one decision."""
        item = dynamo.get(self._table, task_id, f"{_PREFIX}{number:06d}")
        return _event(item) if item else None

    def requests(self, task_ids: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Read the requests of tasks, at most a batch: the time and the content, by the task's id."""
        found = dynamo.get_many(self._table, [_key(task_id, 1) for task_id in task_ids], ConsistentRead=False)
        events = {item["pk"]["S"]: _event(item) for item in found}
        return {task_id: (event.timestamp, json.loads(event.input)) for task_id, event in events.items()}

    def of(self, task_id: str) -> Decisions:
        """Read all decisions on a task. Raises NotFoundError if the task was never requested."""
        items = list(
            dynamo.items(
                TableName=self._table,
                KeyConditionExpression="pk = :pk AND begins_with(sk, :prefix)",
                ExpressionAttributeValues={":pk": {"S": task_id}, ":prefix": {"S": _PREFIX}},
                ConsistentRead=True,
            )
        )
        events = {int(item["sk"]["S"].removeprefix(_PREFIX)): _event(item) for item in items}
        if 1 not in events:
            raise NotFoundError("no such task", field="task_id")
        return Decisions(str(items[0]["salt"]["S"]), events)


def _key(task_id: str, number: int) -> Item:
    return dynamo.key(task_id, f"{_PREFIX}{number:06d}")


def _event(item: Item) -> Event:
    event = event_of({name: value for name, value in item.items() if name not in _NOT_OF_THE_EVENT})
    # Canonical JSON has no line breaks.
    input_, _, output = zlib.decompress(item["texts"]["B"]).decode().partition("\n")
    return event.model_copy(update={"input": input_, "output": output})
