"""Forged items with a person's decision, as a role of the engine could write them."""

from __future__ import annotations

import json
from typing import Any

from qaes.adapters.task_events import event_item
from qaes.adapters.task_items import TaskItems, task_item
from qaes.domain.canonical import salted_hash
from qaes.domain.ids import now, timestamp
from qaes.domain.models import Approval, Decision, Event, Task
from qaes.domain.tasks.decisions import Decided

Item = dict[str, Any]


def approval_of_bob(task: Task, approval: Approval, **changes: Any) -> Item:
    """Return the open approval's item with bob's approval."""
    yes = Decision(subject="bob", approved=True, reason="because", decided_at=timestamp(now()))
    forged = approval.model_copy(update={"status": "approved", "decisions": (yes,)} | changes)
    item: Item = TaskItems("any").put_approval(task.task_id, forged, None)["Put"]["Item"]
    return item


def event_of_bob(task: Task, kind: str = "approval_decided") -> Item:
    """Return the item of the next event with a decision of bob."""
    said = {"approved": True, "reason": "because"}
    event = Event.model_validate(
        {"kind": kind, "actor": "bob", "status": "approved", "timestamp": timestamp(now()), "step_index": 2}
        | {"input_hash": salted_hash(task.salt, said), "output_hash": salted_hash(task.salt, said)}
        | {"step_id": "step_3", "step_type": "onchain_action", "input": json.dumps(said), "output": json.dumps(said)}
    )
    return event_item(task.task_id, task.events + 1, [event])


def reference_to_nothing(task: Task) -> Item:
    """Return the item of the next event, which refers to a missing decision."""
    return event_item(task.task_id, task.events + 1, [Decided(timestamp=timestamp(now()))])


def task_that_goes_on(task: Task, **changes: Any) -> Item:
    """Return the task's item with the state of an approved task."""
    return task_item(task.model_copy(update={"status": "executing", "waiting_until": None} | changes))
