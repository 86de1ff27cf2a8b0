"""Reads of tasks: the items of the tasks table, with people's decisions from their own table.

All reads are consistent, except the reads of an index.
"""

from __future__ import annotations

import json
from datetime import timedelta
from functools import cached_property

from qaes.adapters import dynamo, settings
from qaes.adapters.callbacks import CallbacksTable
from qaes.adapters.decisions import DecisionsTable
from qaes.adapters.shards import IN_FLIGHT, status_keys
from qaes.adapters.task_items import Item, TaskItems
from qaes.domain.errors import ConflictError, NotFoundError
from qaes.domain.ids import now, timestamp
from qaes.domain.models import Approval, Plan, Status, StepRecord, Task
from qaes.domain.tasks import approvals
from qaes.domain.tasks.decisions import Decisions
from qaes.domain.text import same_subject


class TaskQueries:
    """Reads tasks with their plans, steps and approvals."""

    def __init__(self, table: str | None = None) -> None:
        self._table = table or settings.text("TASKS_TABLE")
        self._items = TaskItems(self._table)
        self._read: tuple[str, int, Decisions] | None = None
        """Task id, version and decisions of the last read. Each decision increments the version."""

    @cached_property
    def _decisions(self) -> DecisionsTable:
        return DecisionsTable()

    @cached_property
    def _callbacks(self) -> CallbacksTable:
        return CallbacksTable()

    def get_task(self, task_id: str) -> Task:
        """Read a task with its people's decisions. Raises NotFoundError."""
        item = self._get(task_id, "TASK")
        if item is None:
            raise NotFoundError("no such task", field="task_id")
        task, decisions = Task.model_validate_json(item["data"]["S"]), self._decisions.of(task_id)
        self._read = (task_id, task.version, decisions)
        return decisions.of_task(task)

    def status(self, task_id: str) -> Status:
        """Read only a task's status. Raises NotFoundError."""
        item = self._get(task_id, "TASK")
        if item is None:
            raise NotFoundError("no such task", field="task_id")
        status: Status = json.loads(item["data"]["S"])["status"]
        return status

    def get_plan(self, plan_id: str) -> Plan:
        """Read a plan. Raises NotFoundError."""
        item = self._get(plan_id, "PLAN")
        if item is None:
            raise NotFoundError("no such plan", field="plan_id")
        return Plan.model_validate_json(item["data"]["S"])

    def plan_of(self, task: Task) -> Plan:
        """Read the plan of a task. Raises ConflictError before the task has a plan."""
        if task.plan_id is None:
            raise ConflictError("the task has no plan", task_status=task.status)
        return self.get_plan(task.plan_id)

    def step(self, task_id: str, step_index: int) -> StepRecord | None:
        item = self._get(task_id, f"STEP#{step_index:03d}")
        return StepRecord.model_validate_json(item["data"]["S"]) if item else None

    def steps(self, task_id: str) -> list[StepRecord]:
        """Read the records of the started steps, in order."""
        return [StepRecord.model_validate_json(item["data"]["S"]) for item in self._query(task_id, "STEP#")]

    def records(self, task_id: str) -> dict[int, StepRecord]:
        """Read the records of the started steps, by the step's index."""
        return {record.step_index: record for record in self.steps(task_id)}

    def approvals(self, task_id: str, *, of: Task | None = None) -> list[Approval]:
        """Read all approval requests in order of step and round, each with its decisions.

        With `of`, the decisions of that version of the task are not read again.
        """
        return self._approvals(task_id, "APPROVAL#", of)

    def latest_approval(self, task_id: str, step_index: int, *, of: Task | None = None) -> Approval | None:
        approvals = self._approvals(task_id, f"APPROVAL#{step_index:03d}#", of)
        return approvals[-1] if approvals else None

    def open_approval(self, task_id: str, *, of: Task | None = None) -> Approval | None:
        """Return the pending approval."""
        return approvals.pending_of(self.approvals(task_id, of=of))

    def may_decide(self, listed: Task, subject: str, *, four_eyes: bool = True) -> bool:
        """Return whether `approvals.decide` would accept this person's decision on a listed task now."""
        if listed.status != "waiting_approval" or (four_eyes and same_subject(subject, listed.requester)):
            return False
        try:
            decisions = self._decisions.of(listed.task_id)
        except NotFoundError:  # an item without a request
            return False
        asked = [Approval.model_validate_json(item["data"]["S"]) for item in self._query(listed.task_id, "APPROVAL#")]
        task, asked = decisions.of_task(listed), decisions.of_approvals(asked)
        return approvals.may_decide(task, asked, subject, now(), four_eyes=four_eyes)

    def _approvals(self, task_id: str, prefix: str, of: Task | None) -> list[Approval]:
        asked = [Approval.model_validate_json(item["data"]["S"]) for item in self._query(task_id, prefix)]
        return self._decisions_on(task_id, of).of_approvals(asked) if asked else []

    def _decisions_on(self, task_id: str, of: Task | None) -> Decisions:
        if of is not None and self._read is not None and self._read[:2] == (of.task_id, of.version):
            return self._read[2]
        return self._decisions.of(task_id)

    def open_tasks(self, status: Status, older_than_seconds: int) -> list[Task]:
        """Read the tasks in a status that have not changed for some time, oldest first; eventually consistent."""
        tasks = [Task.model_validate_json(item["data"]["S"]) for item in self._by_status(status)]
        return [task for task in tasks if task.status == status and task.updated_at < _ago(older_than_seconds)]

    def transfers_in_flight(self, older_than_seconds: int) -> list[tuple[str, StepRecord]]:
        """Read (task id, record) of each step that has waited for the ledger for some time; its task may have ended.

        The read is eventually consistent.
        """
        items = self._by_status(IN_FLIGHT)
        steps = [(item["pk"]["S"], StepRecord.model_validate_json(item["data"]["S"])) for item in items]
        return [(task_id, record) for task_id, record in steps if record.started_at < _ago(older_than_seconds)]

    def _by_status(self, status: str) -> list[Item]:
        """Read the items of an index in this status, in the order of their tasks' start."""
        keys = [
            {"pk": item["pk"], "sk": item["sk"]}
            for status_key in status_keys(status)
            for item in dynamo.items(
                TableName=self._table,
                IndexName="by_status",
                KeyConditionExpression="status_key = :status",
                ExpressionAttributeValues={":status": {"S": status_key}},
            )
        ]
        items = dynamo.get_many(self._table, keys, ConsistentRead=False)
        return sorted(items, key=lambda item: (item["pk"]["S"], item["sk"]["S"]))

    def _get(self, pk: str, sk: str) -> Item | None:
        return dynamo.get(self._table, pk, sk)

    def _query(self, pk: str, prefix: str) -> list[Item]:
        items = dynamo.items(
            TableName=self._table,
            KeyConditionExpression="pk = :pk AND begins_with(sk, :prefix)",
            ExpressionAttributeValues={":pk": {"S": pk}, ":prefix": {"S": prefix}},
            ConsistentRead=True,
        )
        return list(items)


def _ago(seconds: int) -> str:
    return timestamp(now() - timedelta(seconds=seconds))
