"""The reconciler: no task is left behind, whatever crashed.

Runs every minute and when an execution's status changes. It starts what was written and not started, delivers a
decision that was committed and not delivered, reminds of an approval and closes it when its time is over, and ends a
task whose execution has ended without saying so. It puts on record how transfers have ended, those of ended tasks too,
and wakes who waits for them. Each minute it tells how old the oldest open approval is.
"""

from __future__ import annotations

import json
import random
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import metrics, transfers
from qaes.adapters.executions import Executions
from qaes.adapters.handlers import function
from qaes.adapters.ledger_client import CALL_SECONDS, LedgerClient
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


@function
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
    return {"reconciled": list(dict.fromkeys(reconciled + _settle_transfers(store, context)))}


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
    """Wake an execution that waits for a step that is finished: whoever has finished it did not come to tell."""
    if task.status != "executing" or task.current_step is None:
        return False
    record = store.step(task.task_id, task.current_step)
    return record is not None and transfers.tell(store, task, record)


def _settle_transfers(store: TaskStore, context: LambdaContext) -> list[str]:
    """Put on record how transfers have ended whose end nobody has told; returns the tasks whose step is finished now.

    In any order, so that those which the ledger is slow to answer for do not keep the others waiting for ever.
    """
    under_way, settled = store.transfers_under_way(GRACE_SECONDS), []
    random.shuffle(under_way)
    for task_id, record in under_way:
        if context.get_remaining_time_in_millis() < CALL_SECONDS * 1000:
            logger().warning("no time left to ask the ledger: the others are asked for next time")
            break
        try:
            task, newest = store.get_task(task_id), store.step(task_id, record.step_index)
            if newest is None or newest.status != "running":
                continue  # the index is behind
            ended = transfers.settle(store, LedgerClient(), task, newest).record
            if ended.status != "running":
                settled.append(task_id)
                transfers.tell(store, task, ended)
        except Exception:  # noqa: BLE001 as above
            logger().exception("could not settle a transfer", extra={"task_id": task_id})
    return settled


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
