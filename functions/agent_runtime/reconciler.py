"""The reconciler: no task is left behind, whatever crashed.

Runs every minute and when an execution's status changes. It starts what was written and not started, delivers a
decision that was committed and not delivered, wakes who waits for a transfer that has ended, reminds of an approval and
closes it when its time is over, and ends a task whose execution has ended without saying so. Each minute it tells how
old the oldest open approval is.
"""

from __future__ import annotations

import json
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import metrics
from qaes.adapters.executions import Executions, wake
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import logger
from qaes.adapters.task_store import TaskStore
from qaes.domain.errors import NotFoundError
from qaes.domain.ids import now, parse_timestamp
from qaes.domain.models import OPEN, TERMINAL, Task

GRACE_SECONDS = 30
"""A task that changed less than this ago is left to those who are at work on it."""

REMINDER = 0.25
"""The part of an approval's time that is left when people are reminded of it."""

REASONS = {
    "TIMED_OUT": "the execution reached its time limit",
    "ABORTED": "the execution was stopped",
    "FAILED": "the execution failed",
    "SUCCEEDED": "the execution ended without an outcome",
}


@logger().inject_lambda_context
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """An EventBridge event → `{"reconciled": [task ids]}`."""
    store, executions = TaskStore(), Executions()
    if event.get("detail-type") == "Step Functions Execution Status Change":
        return {"reconciled": _execution_changed(store, event.get("detail") or {})}
    reconciled, ages = [], []
    for task in [task for status in OPEN for task in store.open_tasks(status, GRACE_SECONDS)]:
        try:
            if reconcile(task, store, executions):
                reconciled.append(task.task_id)
            if task.status == "waiting_approval" and (approval := store.open_approval(task.task_id)):
                ages.append((now() - parse_timestamp(approval.requested_at)).total_seconds())
        except Exception:  # noqa: BLE001 one task that cannot be helped now must not keep the others waiting
            logger().exception("could not reconcile", extra={"task_id": task.task_id})
    metrics.open_approvals(ages)
    return {"reconciled": reconciled}


def reconcile(task: Task, store: TaskStore, executions: Executions) -> bool:
    """Bring one open task forward, if it is stuck; returns whether it did."""
    status = executions.status(task)
    if status is None:
        if task.status != "pending" and task.run == 1:
            return False
        executions.start(task)
        return True
    if status == "RUNNING":
        if task.status == "waiting_approval":
            return _waiting(task, store, executions)
        return _deliver(task, store, executions) or _wake(task, store)
    _end(store, task, status)
    return True


def _waiting(task: Task, store: TaskStore, executions: Executions) -> bool:
    """Close an approval whose time is over, and before that remind of it, once."""
    approval = store.open_approval(task.task_id)
    if approval is None:
        return False
    asked, expires = parse_timestamp(approval.requested_at), parse_timestamp(approval.expires_at)
    if now() >= expires:
        expired = store.expire(task.task_id)
        return expired is not None and executions.deliver(expired)
    if now() >= expires - (expires - asked) * REMINDER:
        return store.remind(task.task_id)
    return False


def _deliver(task: Task, store: TaskStore, executions: Executions) -> bool:
    """A decision that the execution still waits for; a token that was used already is not an error."""
    approvals = store.approvals(task.task_id)
    if task.status != "executing" or not approvals or approvals[-1].status not in {"approved", "rejected", "expired"}:
        return False
    last = approvals[-1]
    record = store.step(task.task_id, last.step_index)
    if last.run != task.run or (record is not None and record.run == task.run):
        return False
    return executions.deliver(last)


def _wake(task: Task, store: TaskStore) -> bool:
    """Wake an execution that waits for a transfer whose end nobody has told it."""
    if task.status != "executing" or task.current_step is None:
        return False
    token, record = store.waiter(task.task_id, task.current_step), store.step(task.task_id, task.current_step)
    if token is None or record is None or record.status != "running":
        return False
    state = LedgerClient().transfer_state(f"{task.task_id}#{record.step_id}")["state"]
    return state not in {"signed", "broadcast"} and wake(token, {"state": state})


def _execution_changed(store: TaskStore, detail: dict[str, Any]) -> list[str]:
    if detail.get("status") not in REASONS:
        return []
    try:
        task = store.get_task(str(json.loads(detail["input"])["task_id"]))
    except (KeyError, TypeError, ValueError, NotFoundError):
        logger().warning("an execution of no known task", extra={"execution": detail.get("name")})
        return []
    if task.status in TERMINAL or detail.get("name") != task.execution_name:
        return []
    _end(store, task, detail["status"])
    return [task.task_id]


def _end(store: TaskStore, task: Task, execution_status: str) -> None:
    """The execution has ended and has not said how the task did: whatever it was, the task has failed."""
    store.end_task(
        task.task_id,
        "failed",
        actor="reconciler",
        reason=REASONS[execution_status],
        execution=task.execution_name,
    )
