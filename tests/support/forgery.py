"""Items that say what only a person can decide, as a role of the engine might write them."""

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
    """Make the open approval's item as one that bob has given."""
    yes = Decision(subject="bob", approved=True, reason="because", decided_at=timestamp(now()))
    forged = approval.model_copy(update={"status": "approved", "decisions": (yes,)} | changes)
    item: Item = TaskItems("any").put_approval(task.task_id, forged, None)["Put"]["Item"]
    return item


def event_of_bob(task: Task, kind: str = "approval_decided") -> Item:
    """Make the item of the next event, which says that bob has decided."""
    said = {"approved": True, "reason": "because"}
    event = Event.model_validate(
        {"kind": kind, "actor": "bob", "status": "approved", "timestamp": timestamp(now()), "step_index": 2}
        | {"input_hash": salted_hash(task.salt, said), "output_hash": salted_hash(task.salt, said)}
        | {"step_id": "step_3", "step_type": "onchain_action", "input": json.dumps(said), "output": json.dumps(said)}
    )
    return event_item(task.task_id, task.events + 1, [event])


def reference_to_nothing(task: Task) -> Item:
    """Make the item of the next event, which refers to a decision that there is not."""
    return event_item(task.task_id, task.events + 1, [Decided(timestamp=timestamp(now()))])


def task_that_goes_on(task: Task, **changes: Any) -> Item:
    """Make the task's item as that of a task that people have approved."""
    return task_item(task.model_copy(update={"status": "executing", "waiting_until": None} | changes))
