"""The runtime's agents that are states of the state machine.

compliance agent   `await_approval`    decides whether the action runs now, waits for an approval, or is denied
execution agent    `end_task`          ends the task if no step has ended it

Approvers never see a callback token. If the state is retried because the function's response was lost, people may have
decided in between, with the earlier token. The decision is then delivered to the new token.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import settings, transfers
from qaes.adapters.executions import Executions, answer
from qaes.adapters.handlers import state, token_state
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import logger, note
from qaes.adapters.task_repository import TaskStore
from qaes.domain import compliance, planning, suspensions
from qaes.domain.compliance import Verdict
from qaes.domain.errors import StepDeniedError
from qaes.domain.models import TERMINAL, Approval, Model, Plan, StepRecord, Task
from qaes.domain.ruling import rule
from qaes.domain.step_types import CONFIRMED_LATER
from qaes.domain.tasks import lifecycle


@token_state("AwaitApproval")
def await_approval(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Compliance agent. `{task_id, task_token, execution?}` → `{verdict, reason}`; `verdict` may be `pending`.

    A rejection comes first, because it needs neither the plan nor the ledger. There is no new decision on a transfer
    that an earlier attempt submitted. If the transfer ended without an effect, its end is recorded first: a new
    approval is for another attempt.
    """
    store, token = TaskStore(), str(event["task_token"])
    task = store.get_task(str(event["task_id"]))
    lifecycle.refuse_other_execution(task, event.get("execution"))
    approvals = store.approvals(task.task_id, of=task)
    for approval in approvals:
        if rejection := compliance.rejection(task, approval):
            return _answered(token, rejection)
    plan, records = store.plan_of(task), store.records(task.task_id)
    step_index = lifecycle.next_step(plan, records)
    note(step_index=step_index)
    asked = [approval for approval in approvals if approval.step_index == step_index]
    verdict = _verdict(store, task, plan, step_index, records.get(step_index), asked[-1] if asked else None)
    if verdict.verdict != "await_approval":
        return _answered(token, verdict)
    longest = settings.number("APPROVAL_TIMEOUT_SECONDS")
    asked_for = store.request_approval(
        task,
        plan,
        step_index,
        token,
        min(verdict.expires_after or longest, longest),
        required=verdict.approvals,
        execution=event.get("execution"),
        balance=verdict.balance,
        terms=verdict.terms,
    )
    if asked_for.status != "pending":
        Executions.deliver(task.task_id, asked_for)
    return {"verdict": asked_for.status, "reason": verdict.reason, "expires_at": asked_for.expires_at}


def _answered(token: str, verdict: Verdict) -> dict[str, Any]:
    """Respond to the token at once, with the verdict or with the error that stops the step."""
    if stopped := compliance.stopped_by(verdict):
        note(outcome=verdict.verdict)
        raise stopped
    answer(token, {"verdict": verdict.verdict})
    return {"verdict": verdict.verdict, "reason": verdict.reason}


def _verdict(
    store: TaskStore, task: Task, plan: Plan, step_index: int, record: StepRecord | None, approval: Approval | None
) -> Verdict:
    ledger, step = LedgerClient(), plan.steps[step_index]
    compliance.check_same_plan(task, plan)
    planning.check_follows(plan, task)
    if record is not None and record.status == "succeeded":
        return compliance.go_on(task, plan)  # it succeeded after its execution had ended: request no approval
    if (
        record is not None
        and record.type in CONFIRMED_LATER
        and transfers.settle(store, ledger, task, record).submitted
    ):
        return compliance.go_on(task, plan)
    policies, funds = transfers.policies_and_funds(ledger, task, plan, step)
    ruling = rule(task, policies.pinned, policies.current)
    usage = transfers.usage_of(step, ruling, funds, (task.task_id, step_index))
    verdict = compliance.decide(task, plan, step_index, ruling, approval, usage)
    if verdict.verdict not in {"await_approval", "execute"}:
        return verdict
    # Deny a transfer that the ledger would reject, before the approval and before the submission. A limit may have room
    # by the time of the approval.
    now = verdict.verdict == "execute"
    refusal = funds.refusal or (funds.refusal_today or ruling.refusal_by_usage(usage) if now else None)
    refusal = refusal or suspensions.refusal(planning.action_type(task.task_type), policies.suspended)
    if refusal is not None and not transfers.is_submitted(ledger, task.task_id, step.step_id):
        return Verdict(verdict="denied", reason=refusal)
    return verdict.model_copy(update={"balance": funds.balance})


class EndOfTask(Model):
    """The state machine's input at its end; `error` is the state's error output."""

    task_id: str
    outcome: Literal["denied", "rejected", "expired", "failed"]
    execution: str | None = None
    error: dict[str, Any] | None = None


REASONS = {
    "denied": "policy {policy_id} does not allow {action_type}",
    "rejected": compliance.REJECTED,
    "expired": "no decision was made in time",
    "failed": "a step failed",
}
KIND_OF_FAILURE = {
    "States.Timeout": "the time limit was reached",
    "LimitError": "the ledger's queue was full; retry the task later",
    "ConfirmationTimedOut": "the ledger did not confirm the transfer in time; retry the task, which pays only once",
}


@state("EndTask")
def end_task(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Execution agent. `{task_id, outcome, execution?, error?}` → `{status, reason}`: the terminal status, once.

    The reason comes from the step records: the state's error output names functions and ARNs, which are for the logs,
    not for users. Only StepDeniedError has our own text: the compliance agent's verdict.
    """
    end = EndOfTask.model_validate(event)
    store = TaskStore()
    task = store.get_task(end.task_id)
    name = str((end.error or {}).get("Error"))
    reason, failed_step = REASONS[end.outcome], None
    if end.outcome == "failed":
        log = (
            logger().info if task.status in TERMINAL else logger().error
        )  # for example cancelled, which is not an error
        log("the execution failed", extra={"state_error": name})
        failed_step, error = _failed_step(store, task)
        reason = error or KIND_OF_FAILURE.get(name, "a service did not respond; retry the task")
    elif end.outcome == "denied":
        reason = reason.format(policy_id=task.policy_id, action_type=planning.action_type(task.task_type))
        reason = _cause(end.error) or reason if name == StepDeniedError.__name__ else reason
    ended = store.end_task(
        task.task_id, end.outcome, actor="execution", reason=reason, failed_step=failed_step, execution=end.execution
    )
    return {"status": ended.status, "reason": ended.reason}


def _failed_step(store: TaskStore, task: Task) -> tuple[str | None, str | None]:
    """Return the failed step, and its error if it has one."""
    if task.plan_id is None:
        return None, None
    plan, records = store.plan_of(task), store.records(task.task_id)
    step_index = lifecycle.next_step(plan, records)
    record = records.get(step_index)
    return plan.steps[step_index].step_id, record.error if record else None


def _cause(error: dict[str, Any] | None) -> str:
    """Return the text of an error: a token's error is plain text, a function's exception is JSON."""
    cause = str((error or {}).get("Cause") or "")
    try:
        return str(json.loads(cause)["errorMessage"])
    except (ValueError, KeyError, TypeError):
        return cause
