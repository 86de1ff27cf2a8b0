"""Items of the tasks table, and the condition of each write.

Under pk=task_id: TASK, EVENT#n, STEP#index, APPROVAL#index#round (sk). Under pk=plan_id: PLAN. Under
pk=IDEMPOTENCY#hash: IDEMPOTENCY. Under pk=REQUESTER#hash: OPEN, the count of a requester's open tasks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qaes.adapters.shards import IN_FLIGHT, status_key
from qaes.adapters.task_events import event_item
from qaes.domain.canonical import canonical_json, hash_of
from qaes.domain.ids import now, timestamp
from qaes.domain.models import Approval, Event, Plan, Status, StepRecord, Task
from qaes.domain.step_types import CONFIRMED_LATER
from qaes.domain.tasks.decisions import Decided

IDEMPOTENCY_SECONDS = 24 * 3600
_IN_DECISIONS = {"parameters", "salt", "retriers"}
"""Fields of a task that its item does not have. Its other copies of decided values serve lists only."""

Item = dict[str, Any]


@dataclass(frozen=True)
class Idempotency:
    """The caller's key, and the hash of its request: method, route and body."""

    subject: str
    key: str
    body_hash: str

    @property
    def pk(self) -> str:
        return "IDEMPOTENCY#" + hash_of([self.subject, self.key])


class TaskItems:
    """Writes of a transaction to one table."""

    def __init__(self, table: str) -> None:
        self._table = table

    def put(self, item: Item, *, unless_exists: bool) -> Item:
        put: Item = {"TableName": self._table, "Item": item}
        if unless_exists:
            put["ConditionExpression"] = "attribute_not_exists(pk)"
        return {"Put": put}

    def put_task(self, task: Task, *, before: Task) -> Item:
        version_is_unchanged = "version = :version"
        return {
            "Put": {
                "TableName": self._table,
                "Item": task_item(task),
                "ConditionExpression": version_is_unchanged,
                "ExpressionAttributeValues": {":version": {"N": str(before.version)}},
            }
        }

    def put_events(self, task_id: str, first: int, events: Sequence[Event | Decided]) -> Item:
        return self.put(event_item(task_id, first, events), unless_exists=True)

    def put_approval(self, task_id: str, approval: Approval, status_before: str | None) -> Item:
        item = {
            "pk": {"S": task_id},
            "sk": {"S": _approval_sk(approval)},
            "status": {"S": approval.status},
            "data": {"S": approval.model_dump_json()},
        }
        put = self.put(item, unless_exists=status_before is None)
        if status_before is not None:
            # A put of a used approval would make it usable again.
            unchanged_and_never_used = "#status = :before AND attribute_not_exists(consumed_at)"
            put["Put"]["ConditionExpression"] = unchanged_and_never_used
            put["Put"]["ExpressionAttributeNames"] = {"#status": "status"}
            put["Put"]["ExpressionAttributeValues"] = {":before": {"S": status_before}}
        return put

    def consume_approval(self, task_id: str, approval: Approval) -> Item:
        approved_and_never_used = "#status = :approved AND attribute_not_exists(consumed_at)"
        return {
            "Update": {
                "TableName": self._table,
                "Key": {"pk": {"S": task_id}, "sk": {"S": _approval_sk(approval)}},
                "UpdateExpression": "SET consumed_at = :now",
                "ConditionExpression": approved_and_never_used,
                "ExpressionAttributeNames": {"#status": "status"},
                "ExpressionAttributeValues": {":approved": {"S": "approved"}, ":now": {"S": timestamp(now())}},
            }
        }

    def put_step(self, task_id: str, sk: str, record: StepRecord, *, before: StepRecord | None) -> Item:
        """Return the write over a record with the status and attempt of `before`; None: no record exists."""
        item = {
            "pk": {"S": task_id},
            "sk": {"S": sk},
            "status": {"S": record.status},
            "attempt": {"N": str(record.attempt)},
            "data": {"S": record.model_dump_json()},
        }
        if record.type in CONFIRMED_LATER and record.status == "running":
            item |= {"status_key": {"S": status_key(IN_FLIGHT, task_id)}, "task_id": {"S": task_id}}
        put = self.put(item, unless_exists=before is None)
        if before is not None:
            still_ours = "#status = :status AND attempt = :attempt"
            put["Put"]["ConditionExpression"] = still_ours
            put["Put"]["ExpressionAttributeNames"] = {"#status": "status"}
            put["Put"]["ExpressionAttributeValues"] = {
                ":status": {"S": before.status},
                ":attempt": {"N": str(before.attempt)},
            }
        return put

    def count_open(self, requester: str, change: int, limit: int | None) -> Item:
        """Return the write that counts the requester's open tasks; with a `limit`, only below it."""
        update: Item = {
            "TableName": self._table,
            "Key": {"pk": {"S": "REQUESTER#" + hash_of([requester])}, "sk": {"S": "OPEN"}},
            "UpdateExpression": "ADD open_tasks :change",
            "ExpressionAttributeValues": {":change": {"N": str(change)}},
        }
        if limit is not None:
            update["ConditionExpression"] = "attribute_not_exists(open_tasks) OR open_tasks < :limit"
            update["ExpressionAttributeValues"][":limit"] = {"N": str(limit)}
        return {"Update": update}

    def put_idempotency(self, idempotency: Idempotency, answer: dict[str, Any]) -> Item:
        seconds = int(time.time())
        item = {
            "pk": {"S": idempotency.pk},
            "sk": {"S": "IDEMPOTENCY"},
            "body_hash": {"S": idempotency.body_hash},
            "answer": {"S": json.dumps(answer)},
            "expires_at_epoch": {"N": str(seconds + IDEMPOTENCY_SECONDS)},
        }
        put = self.put(item, unless_exists=True)
        # DynamoDB deletes expired items late; the condition treats them as deleted.
        put["Put"]["ConditionExpression"] += " OR expires_at_epoch < :now"
        put["Put"]["ExpressionAttributeValues"] = {":now": {"N": str(seconds)}}
        return put


def task_item(task: Task) -> Item:
    # Without empty fields, a task of usual length costs the write units of one kilobyte.
    fields = task.model_dump(mode="json", exclude=_IN_DECISIONS, exclude_defaults=True)
    return {
        "pk": {"S": task.task_id},
        "sk": {"S": "TASK"},
        "task_id": {"S": task.task_id},
        "status_key": {"S": status_key(task.status, task.task_id)},
        "requester_key": {"S": task.requester},
        "requester_status_key": {"S": requester_and_status(task.requester, task.status)},
        "version": {"N": str(task.version)},
        "data": {"S": json.dumps(fields, ensure_ascii=False, separators=(",", ":"))},
    }


def requester_and_status(requester: str, status: Status) -> str:
    """Return the index key of a requester's tasks in one status. The last `#` separates them: no status has a `#`."""
    return f"{requester}#{status}"


def plan_item(plan: Plan) -> Item:
    text = canonical_json(plan.model_dump(mode="json"))
    return {"pk": {"S": plan.plan_id}, "sk": {"S": "PLAN"}, "data": {"S": text}}


def _approval_sk(approval: Approval) -> str:
    return f"APPROVAL#{approval.step_index:03d}#{approval.round:02d}"


def is_counter(write: Item) -> bool:
    return str(write.get("Update", {}).get("Key", {}).get("sk", {}).get("S", "")) == "OPEN"
