"""The worker: runs one step, whose effect happens once however often it is called.

A transfer takes two states. SubmitTransfer (`submit`) hands it in, and is the only one that does; ExecuteStep finds out
what became of it, when the ledger has told.
"""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import transfers
from qaes.adapters.handlers import state
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_store import TaskStore, refuse_other_execution
from qaes.domain import compliance
from qaes.domain.errors import ConflictError, RefusedError, UnavailableError
from qaes.domain.ids import now
from qaes.domain.models import CONFIRMED_LATER, TERMINAL, Plan, StepRecord, Task
from qaes.domain.policy import Policy
from worker.steps import RUN, StepContext, Submitted


class NotConfirmedYetError(UnavailableError):
    """The execution was woken before the transfer's end: the state machine knows it by this name, and waits again."""


@state(lambda event: "SubmitTransfer" if event.get("submit") is True else "ExecuteStep")
def execute_step(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """`{task_id, step_index, submit?, execution?}` → `{step_id, status, result, error, attempt}`.

    With `submit` a transfer is handed in, and `status` is `submitted`: then the ledger has the word. Without, the
    answer is how the transfer ended; NotConfirmedYetError is raised when it has not.
    """
    store, ledger = TaskStore(), LedgerClient()
    task_id, step_index = str(event["task_id"]), int(event["step_index"])
    record, task = store.step(task_id, step_index), store.get_task(task_id)
    refuse_other_execution(task, event.get("execution"))
    plan = store.plan_of(task)
    if plan.steps[step_index].type in CONFIRMED_LATER and event.get("submit") is not True:
        return _answer(_outcome(store, ledger, task, record))
    return _answer(run_step(store, ledger, task, plan, step_index, record))


def _outcome(store: TaskStore, ledger: LedgerClient, task: Task, record: StepRecord | None) -> StepRecord:
    """What became of a transfer; nothing is done for it here."""
    if record is None:
        raise ConflictError("this transfer was never handed in", task_status=task.status)
    settled = transfers.settle(store, ledger, task, record)
    if settled.record.status == "running":
        raise NotConfirmedYetError("the ledger has not told what became of the transfer")
    return settled.record


def run_step(
    store: TaskStore, ledger: LedgerClient, task: Task, plan: Plan, step_index: int, record: StepRecord | None
) -> StepRecord:
    """Run a step; `record` is what an attempt before has left. What it returns is `running` for a transfer under way.

    A refusal is a value (`failed`); only what may work when tried again is raised. The intent is recorded, and the
    approval consumed, before the step acts; the effect carries (task, step) as its reference, so that the ledger
    answers a repetition from its record.
    """
    if record is not None and not record.may_run(task):
        return record
    compliance.check_same_plan(task, plan)
    if task.status in TERMINAL:
        raise ConflictError(f"the task has ended: {task.status}", task_status=task.status)
    step, replaces = plan.steps[step_index], None
    if step.type in CONFIRMED_LATER and record is not None and record.run < task.run:
        # What an execution before this one has handed in was let through then: its end is this step's, whatever it is.
        settled = transfers.settle(store, ledger, task, record)
        if settled.under_way or settled.record != record:
            return settled.record
        before = transfers.state_of(ledger, task.task_id, step.step_id) if record.status == "failed" else None
        replaces = before["txid"] if before else None
    policy = ledger.policy()
    claimed = _claim(store, task, plan, step_index, record, policy, replaces)
    if claimed.status != "running":
        return claimed
    reference = transfers.reference_of(task.task_id, step.step_id)
    step_context = StepContext(reference, ledger, policy, task.requester, task.run)
    try:
        result = RUN[step.type](step.parameters, step_context)
    except RefusedError as refusal:
        if step.type in CONFIRMED_LATER and transfers.settle(store, ledger, task, claimed).under_way:
            return claimed  # it was handed in by a call whose answer was lost, and that is not refused any more
        error = f"{refusal.code}: {refusal.message}"
        return store.finish_step(task.task_id, claimed, result=None, error=error)
    if isinstance(result, Submitted):
        return claimed
    return store.finish_step(task.task_id, claimed, result=result, error=None)


def _claim(
    store: TaskStore,
    task: Task,
    plan: Plan,
    step_index: int,
    record: StepRecord | None,
    policy: Policy,
    replaces: str | None,
) -> StepRecord:
    """Record the intent to act, if the step may run.

    The claim is the commit point: a later attempt of the same execution finds out what happened, whatever the policy
    says by then.
    """
    step = plan.steps[step_index]
    current = policy.decide(plan.analysis.action_type)
    if record is not None and record.status == "running" and record.run == task.run:
        if step.type in CONFIRMED_LATER:
            return record  # to hand it in again is not another attempt
        return store.claim_step(task.task_id, step_index, step, None, run=task.run, current=current)
    approval = store.latest_approval(task.task_id, step_index)
    try:
        compliance.check_may_act(task, plan, step_index, current, approval, at=now())
    except RefusedError as refusal:
        return store.refuse_step(task.task_id, step_index, step, record, refusal.message, run=task.run)
    # Who was asked in this execution has approved it, whether that was needed or not.
    consumed = approval if approval is not None and approval.run == task.run else None
    return store.claim_step(task.task_id, step_index, step, consumed, run=task.run, current=current, replaces=replaces)


def _answer(record: StepRecord) -> dict[str, Any]:
    answer = record.model_dump(mode="json", include={"step_id", "status", "result", "error", "attempt"})
    return answer | ({"status": "submitted"} if record.status == "running" else {})
