"""The reconciler: completes tasks after any crash.

It runs every minute, and when an execution fails. It starts executions that were not started, delivers committed
decisions, reminds people of approvals, closes expired approvals, and ends tasks whose execution ended without an
outcome. It records the end of transfers, also of ended tasks, and resumes the waiting executions. Each minute
it publishes the age of the oldest open approval.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from collections.abc import Callable, Collection
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import metrics, transfers
from qaes.adapters.executions import Executions
from qaes.adapters.handlers import function
from qaes.adapters.ledger_client import CALL_SECONDS, LedgerClient
from qaes.adapters.logs import logger
from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import NotFoundError
from qaes.domain.ids import now, parse_timestamp
from qaes.domain.models import OPEN_STATUSES, TERMINAL, Task

GRACE_SECONDS = 30
"""A task that changed more recently than this is left to its own execution."""

OPEN_TASKS_SHARE = 0.5
"""Share of a run's time for open tasks; the rest is for transfers."""

REMINDER = 0.25
"""Share of an approval's time that is left at the reminder."""

_left: list[str] = []
"""The first task that this process skipped for lack of time in its last run, if any."""

REASONS = {
    "TIMED_OUT": "the execution reached its time limit",
    "ABORTED": "the execution was stopped",
    "FAILED": "the execution failed",
    "SUCCEEDED": "the execution ended without an outcome",
}


@function
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Process an EventBridge event. Return `{"reconciled": [task ids]}`."""
    store, executions = TaskStore(), Executions()
    if event.get("detail-type") == "Step Functions Execution Status Change":
        return {"reconciled": _execution_changed(store, event.get("detail") or {})}
    reconciled: list[str] = []
    try:
        reconciled += _reconcile_open(store, executions, context)
    finally:  # an error with open tasks must not block the settling of transfers
        reconciled += _settle_transfers(store, context)
    return {"reconciled": list(dict.fromkeys(reconciled))}


def _reconcile_open(store: TaskStore, executions: Executions, context: LambdaContext) -> list[str]:
    """Reconcile open tasks in their share of the time. The process's next run continues where this one stopped."""
    end = context.get_remaining_time_in_millis() * (1 - OPEN_TASKS_SHARE)

    def has_time() -> bool:
        return context.get_remaining_time_in_millis() > end

    tasks = [task for status in OPEN_STATUSES for task in store.open_tasks(status, GRACE_SECONDS)]
    waiting = {each.task_id: each.waiting_since or each.updated_at for each in tasks if _waits(each)}
    reconciled: list[str] = []
    try:
        running = _running(executions, has_time)
        tasks = _from(tasks, _left.pop() if _left else None)
        for number, task in enumerate(tasks):
            if not has_time():
                _left[:] = [task.task_id]
                logger().warning("no time left for all open tasks", extra={"left_to_the_next_run": len(tasks) - number})
                break
            if _reconciled(task, store, executions, running):
                reconciled.append(task.task_id)
                if task.waiting_until and now() >= parse_timestamp(task.waiting_until):
                    waiting.pop(task.task_id, None)  # its approval was closed just now
    finally:
        metrics.open_approvals([(now() - parse_timestamp(since)).total_seconds() for since in waiting.values()])
    return reconciled


def _from(tasks: list[Task], first: str | None) -> list[Task]:
    """Order the tasks from the id `first` on, or from a random one in a new process."""
    ordered = sorted(tasks, key=lambda task: task.task_id)
    if first is None:
        start = int(random.random() * len(ordered))  # noqa: S311 (an order, no secret)
    else:
        start = bisect_left(ordered, first, key=lambda task: task.task_id)
    return ordered[start:] + ordered[:start]


def _waits(task: Task) -> bool:
    return task.status == "waiting_approval"


def _running(executions: Executions, has_time: Callable[[], bool]) -> set[str]:
    try:
        return executions.running(has_time)
    except Exception:  # noqa: BLE001 the list only saves calls: without it, describe each execution
        logger().exception("running executions could not be listed")
        return set()


def _reconciled(task: Task, store: TaskStore, executions: Executions, running: Collection[str]) -> bool:
    try:
        return reconcile(task, store, executions, running)
    except Exception:  # noqa: BLE001 one task's error must not block the others
        logger().exception("the task could not be reconciled", extra={"task_id": task.task_id})
        return False


def reconcile(task: Task, store: TaskStore, executions: Executions, running: Collection[str] = ()) -> bool:
    """Advance an open task if it is stuck, and return whether it was. Executions in `running` need no describe call."""
    status = "RUNNING" if task.execution_name in running else executions.status(task)
    if status == "RUNNING" and _waits(task):
        return _waiting(task, store, executions)
    listed, task = task, store.get_task(task.task_id)  # the list has copies; the decisions determine the run
    if task.status in TERMINAL:
        return False
    if (
        task.execution_name != listed.execution_name
    ):  # retried since the list: the end of the earlier run does not count
        status = executions.status(task)
    if status is None:
        if task.status != "pending" and task.run == 1:
            return False
        executions.start(task)
        return True
    if status == "RUNNING":
        return _deliver(task, store, executions) or _wake(task, store)
    _end(store, task, status)
    return True


def _waiting(task: Task, store: TaskStore, executions: Executions) -> bool:
    """Remind people of an approval once before it expires, and close it after that."""
    if task.waiting_since and task.waiting_until and not _is_due(task.waiting_since, task.waiting_until):
        return False
    approval = store.open_approval(task.task_id)
    if approval is None:
        return False
    if now() >= parse_timestamp(approval.expires_at):
        expired = store.expire(task.task_id)
        return expired is not None and executions.deliver(task.task_id, expired)
    if approval.reminded_at is None and _is_due(approval.requested_at, approval.expires_at):
        return store.remind(task.task_id)
    return False


def _is_due(since: str, until: str) -> bool:
    """Return whether the reminder of an approval is due."""
    asked, expires = parse_timestamp(since), parse_timestamp(until)
    return now() >= expires - (expires - asked) * REMINDER


def _deliver(task: Task, store: TaskStore, executions: Executions) -> bool:
    """Deliver a decision that the execution still waits for. A used token is not an error."""
    approvals = store.approvals(task.task_id)
    if task.status != "executing" or not approvals or approvals[-1].status not in {"approved", "rejected", "expired"}:
        return False
    last = approvals[-1]
    record = store.step(task.task_id, last.step_index)
    if last.run != task.run or (record is not None and record.run == task.run):
        return False
    return executions.deliver(task.task_id, last)


def _wake(task: Task, store: TaskStore) -> bool:
    """Resume an execution that waits for a finished step, because the message was lost."""
    if task.status != "executing" or task.current_step is None:
        return False
    record = store.step(task.task_id, task.current_step)
    return record is not None and transfers.tell(task, record)


def _settle_transfers(store: TaskStore, context: LambdaContext) -> list[str]:
    """Record the ends of transfers whose events were lost. Return the tasks whose step is finished now.

    The order is random, so that slow answers of the ledger for some transfers do not block the others for ever.
    """
    in_flight, settled = store.transfers_in_flight(GRACE_SECONDS), []
    random.shuffle(in_flight)
    for task_id, record in in_flight:
        if context.get_remaining_time_in_millis() < CALL_SECONDS * 1000:
            logger().warning("no time left; the next run settles the other transfers")
            break
        try:
            task, newest = store.get_task(task_id), store.step(task_id, record.step_index)
            if newest is None or newest.status != "running":
                continue  # the index is eventually consistent
            if transfers.settle_and_tell(store, LedgerClient(), task, newest).status != "running":
                settled.append(task_id)
        except Exception:  # noqa: BLE001 one transfer's error must not block the others
            logger().exception("the transfer could not be settled", extra={"task_id": task_id})
    return settled


def _execution_changed(store: TaskStore, detail: dict[str, Any]) -> list[str]:
    if detail.get("status") not in REASONS:
        return []
    try:
        task = store.get_task(str(json.loads(detail["input"])["task_id"]))
    except (KeyError, TypeError, ValueError, NotFoundError):
        logger().warning("the execution belongs to no known task", extra={"execution": detail.get("name")})
        return []
    if task.status in TERMINAL or detail.get("name") != task.execution_name:
        return []
    _end(store, task, detail["status"])
    return [task.task_id]


def _end(store: TaskStore, task: Task, execution_status: str) -> None:
    """End a task as failed, because its execution ended without an outcome."""
    store.end_task(
        task.task_id,
        "failed",
        actor="reconciler",
        reason=REASONS[execution_status],
        execution=task.execution_name,
    )
