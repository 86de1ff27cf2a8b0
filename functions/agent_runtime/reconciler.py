"""The reconciler: no task is left behind, whatever crashed.

Runs every minute and when an execution fails. It starts what was written and not started, delivers a
decision that was committed and not delivered, reminds of an approval and closes it when its time is over, and ends a
task whose execution has ended without saying so. It puts on record how transfers have ended, those of ended tasks too,
and wakes who waits for them. Each minute it tells how old the oldest open approval is.
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
"""A task that changed less than this ago is left to those who are at work on it."""

OPEN_TASKS_SHARE = 0.5
"""The part of a run's time that open tasks get; transfers get the rest."""

REMINDER = 0.25
"""The part of an approval's time that is left when people are reminded of it."""

_left: list[str] = []
"""The first task that this process had no time for in its last run, if there was one."""

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
    reconciled: list[str] = []
    try:
        reconciled += _reconcile_open(store, executions, context)
    finally:  # whatever keeps open tasks from being helped must not keep transfers from being settled
        reconciled += _settle_transfers(store, context)
    return {"reconciled": list(dict.fromkeys(reconciled))}


def _reconcile_open(store: TaskStore, executions: Executions, context: LambdaContext) -> list[str]:
    """Help open tasks in half of the time that is left. The next run of this process goes on where this one stopped."""
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
                    waiting.pop(task.task_id, None)  # its approval was just closed
    finally:
        metrics.open_approvals([(now() - parse_timestamp(since)).total_seconds() for since in waiting.values()])
    return reconciled


def _from(tasks: list[Task], first: str | None) -> list[Task]:
    """Put the tasks in order, from the one with the id `first` on; from any one in a process that has just begun."""
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
    except Exception:  # noqa: BLE001 the list only saves calls: without it, each execution is described
        logger().exception("running executions could not be listed")
        return set()


def _reconciled(task: Task, store: TaskStore, executions: Executions, running: Collection[str]) -> bool:
    try:
        return reconcile(task, store, executions, running)
    except Exception:  # noqa: BLE001 one task that cannot be helped now must not keep the others waiting
        logger().exception("could not reconcile", extra={"task_id": task.task_id})
        return False


def reconcile(task: Task, store: TaskStore, executions: Executions, running: Collection[str] = ()) -> bool:
    """Bring one open task forward, if it is stuck; returns whether it did. What is in `running` is not described."""
    status = "RUNNING" if task.execution_name in running else executions.status(task)
    if status == "RUNNING" and _waits(task):
        return _waiting(task, store, executions)
    listed, task = task, store.get_task(task.task_id)  # the list has copies: the run is what people decided
    if task.status in TERMINAL:
        return False
    if task.execution_name != listed.execution_name:  # retried since it was listed: how the run before ended is no end
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
    """Close an approval whose time is over, and before that remind of it, once."""
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
    """Return whether only the last part of an approval's time is left, or none."""
    asked, expires = parse_timestamp(since), parse_timestamp(until)
    return now() >= expires - (expires - asked) * REMINDER


def _deliver(task: Task, store: TaskStore, executions: Executions) -> bool:
    """A decision that the execution still waits for; a token that was used already is not an error."""
    approvals = store.approvals(task.task_id)
    if task.status != "executing" or not approvals or approvals[-1].status not in {"approved", "rejected", "expired"}:
        return False
    last = approvals[-1]
    record = store.step(task.task_id, last.step_index)
    if last.run != task.run or (record is not None and record.run == task.run):
        return False
    return executions.deliver(task.task_id, last)


def _wake(task: Task, store: TaskStore) -> bool:
    """Wake an execution that waits for a step that is finished: whoever has finished it did not come to tell."""
    if task.status != "executing" or task.current_step is None:
        return False
    record = store.step(task.task_id, task.current_step)
    return record is not None and transfers.tell(task, record)


def _settle_transfers(store: TaskStore, context: LambdaContext) -> list[str]:
    """Put on record how transfers have ended whose end nobody has told; returns the tasks whose step is finished now.

    In any order, so that those which the ledger is slow to answer for do not keep the others waiting for ever.
    """
    in_flight, settled = store.transfers_in_flight(GRACE_SECONDS), []
    random.shuffle(in_flight)
    for task_id, record in in_flight:
        if context.get_remaining_time_in_millis() < CALL_SECONDS * 1000:
            logger().warning("no time left to ask the ledger: the others are asked for next time")
            break
        try:
            task, newest = store.get_task(task_id), store.step(task_id, record.step_index)
            if newest is None or newest.status != "running":
                continue  # the index is behind
            if transfers.settle_and_tell(store, LedgerClient(), task, newest).status != "running":
                settled.append(task_id)
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
