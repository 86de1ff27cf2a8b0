"""The worker: runs one step, whose effect happens once however often it is called."""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import TASK_ID, logger
from qaes.adapters.task_store import TaskStore
from qaes.domain import compliance
from qaes.domain.errors import ConflictError, RefusedError, UnavailableError
from qaes.domain.models import TERMINAL, Step, StepRecord, Task
from worker.steps import CONFIRMED_LATER, RUN, StepContext, Submitted, onchain_action


@logger().inject_lambda_context(correlation_id_path=TASK_ID)
def execute_step(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """`{task_id, step_index}` → `{step_id, status, result, error, attempt}`; `submitted`: to be asked again later."""
    return run_step(TaskStore(), LedgerClient(), str(event["task_id"]), int(event["step_index"]))


def run_step(store: TaskStore, ledger: LedgerClient, task_id: str, step_index: int) -> dict[str, Any]:
    """Run a step, or find out what became of it.

    A refusal is a value (`failed`); only what may work when tried again is raised. The intent is recorded, and the
    approval consumed, before the step acts; the effect carries (task, step) as its reference, so that the ledger
    answers a repetition from its record.
    """
    record, task = store.step(task_id, step_index), store.get_task(task_id)
    if record is not None and not record.may_run(task):
        return _answer(record)
    plan = store.plan_of(task)
    step = plan.steps[step_index]
    if task.status in TERMINAL:
        return _after_the_end(store, ledger, task, record, step)
    policy = ledger.policy()
    if record is None or record.status == "failed":
        # The claim is the commit point: a later attempt finds out what happened, whatever the policy says by then.
        approval = store.latest_approval(task_id, step_index)
        current = policy.decide(plan.analysis.action_type)
        try:
            compliance.check_may_act(task, plan, step_index, current, approval)
        except RefusedError as refusal:
            refused = store.claim_step(task_id, step_index, step, None)
            if refused.attempt > (record.attempt if record else 0) + 1:
                raise UnavailableError("another attempt is at work on this step") from refusal
            return _answer(store.finish_step(task_id, refused, result=None, error=refusal.message))
        consumed = approval if compliance.needs_approval(step, current) else None
    else:
        consumed = None
    # A step that waits for its outcome is asked again and again: that is not another attempt.
    if record is None or record.status != "running" or record.run != task.run or step.type not in CONFIRMED_LATER:
        record = store.claim_step(task_id, step_index, step, consumed)
    if record.status != "running":
        return _answer(record)
    reference = reference_of(task_id, step.step_id)
    step_context = StepContext(reference, ledger, policy, plan.analysis.action_type, task.run)
    try:
        result = RUN[step.type](step.parameters, step_context)
    except RefusedError as refusal:
        return _answer(store.finish_step(task_id, record, result=None, error=f"{refusal.code}: {refusal.message}"))
    if isinstance(result, Submitted):
        return _answer(record) | {"status": "submitted"}
    return _answer(store.finish_step(task_id, record, result=result, error=None))


def _after_the_end(
    store: TaskStore, ledger: LedgerClient, task: Task, record: StepRecord | None, step: Step
) -> dict[str, Any]:
    """Put on record what became of a transfer whose task has ended meanwhile; nothing is done for it any more."""
    if record is None or record.status != "running" or step.type not in CONFIRMED_LATER:
        raise ConflictError(f"the task has ended: {task.status}", task_status=task.status)
    try:
        state = ledger.transfer_state(reference_of(task.task_id, step.step_id))
    except RefusedError:
        state = {"state": "failed", "error": "not_submitted: the task ended before"}
    if state["state"] in {"signed", "broadcast"}:
        return _answer(record) | {"status": "submitted"}
    if state["state"] == "confirmed":
        return _answer(
            store.finish_step(task.task_id, record, result=onchain_action.result_of(step.parameters, state), error=None)
        )
    return _answer(store.finish_step(task.task_id, record, result=None, error=str(state["error"])))


def reference_of(task_id: str, step_id: str) -> str:
    """What the ledger knows a step's effect by."""
    return f"{task_id}#{step_id}"


def _answer(record: StepRecord) -> dict[str, Any]:
    return record.model_dump(mode="json", include={"step_id", "status", "result", "error", "attempt"})
