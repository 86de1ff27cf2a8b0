"""The agents of the runtime that are states of the state machine.

planner agent      `validate_plan`     is the stored plan one that may be executed?
compliance agent   `check_compliance`  may this step run now, does it wait for a person, or is it denied?
execution agent    `end_task`          how did the execution end? (the steps themselves: ExecuteStep, the worker)
audit agent        RecordAudit         the audit service's recorder, called by the state machine (ADR 2)
"""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import transfers
from qaes.adapters.handlers import state
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import logger
from qaes.adapters.task_store import TaskStore
from qaes.domain import compliance, planning
from qaes.domain.compliance import Verdict
from qaes.domain.models import CONFIRMED_LATER, Model, Outcome, Step, Task


class EndOfTask(Model):
    """What the state machine says at its end; `error` is the state's error output."""

    task_id: str
    outcome: Outcome
    execution: str | None = None
    error: dict[str, Any] | None = None


@state("ValidatePlan")
def validate_plan(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Planner agent. `{task_id, plan_id}` → `{steps: [{step_index, step_id, step_type}]}`, those that are to run."""
    store = TaskStore()
    task = store.get_task(event["task_id"])
    plan = store.get_plan(event["plan_id"])
    planning.check_plan(plan, task.task_id)
    compliance.check_same_plan(task, plan)
    task = store.begin_execution(task.task_id)
    done = _done_before(store, task)
    return {
        "steps": [
            {"step_index": index, "step_id": step.step_id, "step_type": step.type}
            for index, step in enumerate(plan.steps)
            if index not in done
        ]
    }


def _done_before(store: TaskStore, task: Task) -> set[int]:
    """The steps that an execution before this one finished: they are not run again."""
    if task.run == 1:
        return set()
    return {record.step_index for record in store.steps(task.task_id) if record.status == "succeeded"}


@state("CheckCompliance")
def check_compliance(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Compliance agent. `{task_id, step_index}` → `{verdict, reason}`; asked again after an approval.

    A rejection comes first: no plan has to be read for it, and no ledger has to answer. What an attempt before has
    handed in is not decided on again. If it has ended without moving anything, that is put on record first: what is
    asked for after that is for another attempt.
    """
    store, step_index = TaskStore(), int(event["step_index"])
    task = store.get_task(event["task_id"])
    approval = store.latest_approval(task.task_id, step_index)
    if rejection := compliance.rejection(task, approval):
        return rejection.model_dump(mode="json")
    plan = store.plan_of(task)
    record = store.step(task.task_id, step_index)
    if record is not None and record.type in CONFIRMED_LATER:
        compliance.check_same_plan(task, plan)
        if transfers.settle(store, LedgerClient(), task, record).let_through:
            return compliance.go_on(task, plan).model_dump(mode="json")
    current = LedgerClient().policy().decide(plan.analysis.action_type)
    verdict = compliance.decide(task, plan, step_index, current, approval)
    if verdict.verdict in {"await_approval", "execute"}:
        verdict = _with_funds(task, plan.steps[step_index], verdict)
    return verdict.model_dump(mode="json")


def _with_funds(task: Task, step: Step, verdict: Verdict) -> Verdict:
    """Deny what the ledger would refuse, before a person is asked and before the transfer is submitted.

    For want of room today it denies only what would be submitted now: what is approved today may be made tomorrow.
    Whom it asks, it shows the balance.
    """
    ledger = LedgerClient()
    funds, is_next = transfers.funds_of(ledger, step), verdict.verdict == "execute"
    refusal = funds.refusal or (funds.refusal_today if is_next else None)
    if refusal is not None and not transfers.is_submitted(ledger, task.task_id, step.step_id):
        return Verdict(verdict="denied", reason=refusal)
    return verdict if is_next else verdict.model_copy(update={"balance": funds.balance})


REASONS: dict[Outcome, str] = {
    "completed": "",
    "denied": "policy {policy_id} does not allow {action_type}",
    "rejected": compliance.REJECTED,
    "expired": "nobody decided in time",
    "failed": "a step failed",
    "cancelled": "it was cancelled",
}
KIND_OF_FAILURE = {
    "States.Timeout": "the time limit was reached",
    "States.TaskFailed": "a service did not answer",
    "ConfirmationTimedOut": "the ledger has not confirmed the transfer in time; a retry asks again, and pays once",
}


STATES: dict[Outcome, str] = {
    "completed": "CompleteTask",
    "denied": "DenyTask",
    "rejected": "RejectTask",
    "expired": "ExpireTask",
    "failed": "FailTask",
}


@state(lambda event: STATES.get(event["outcome"], "end_task"))
def end_task(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Execution agent. `{task_id, outcome, execution?, error?}` → `{status, reason}`: the terminal status, once.

    What went wrong is read from the step records: the state's error output names functions and ARNs, which are for
    the logs, not for users. Only that of StepDenied is our own: the compliance agent's verdict.
    """
    end = EndOfTask.model_validate(event)
    store = TaskStore()
    task = store.get_task(end.task_id)
    reason, failed_step = REASONS[end.outcome], None
    if end.outcome == "failed":
        logger().error("the execution failed", extra={"state_error": (end.error or {}).get("Error")})
        records = store.steps(task.task_id)
        broken = next((record for record in records if record.status != "succeeded"), None)
        failed_step = broken.step_id if broken else None
        kind = KIND_OF_FAILURE.get(str((end.error or {}).get("Error")), "a service did not answer")
        reason = broken.error if broken and broken.error else kind
    elif end.outcome == "denied":
        error = end.error or {}
        reason = reason.format(policy_id=task.policy_id, action_type=planning.action_type(task.task_type))
        reason = error.get("Cause") or reason if error.get("Error") == "StepDenied" else reason
    ended = store.end_task(
        task.task_id,
        end.outcome,
        actor="execution",
        reason=reason,
        failed_step=failed_step,
        execution=end.execution,
    )
    return {"status": ended.status, "reason": ended.reason}
