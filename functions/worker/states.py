"""The worker's states: RunStep runs a plain step, ExecuteAction runs a step with an effect or an approval.

Only ExecuteAction's role can move money. Its function also processes the qubic service's event `transfer_settled`:
it records the end, and resumes the execution if it still waits. The reconciler does the same for lost events.
"""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import audit_trail, settings, transfers
from qaes.adapters.callbacks import Callback, CallbacksTable
from qaes.adapters.executions import answer
from qaes.adapters.handlers import state, token_state
from qaes.adapters.intents import Intent
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.limits import LimitsTable
from qaes.adapters.task_repository import TaskStore
from qaes.domain import compliance, planning, suspensions
from qaes.domain.errors import ConflictError, PermanentError, StepDeniedError, StepFailedError
from qaes.domain.ids import now
from qaes.domain.models import TERMINAL, Plan, StepRecord, Task
from qaes.domain.ruling import rule
from qaes.domain.step_types import CONFIRMED_LATER
from qaes.domain.tasks import lifecycle
from qaes.domain.tasks.lifecycle import StepOutcome
from worker import steps
from worker.confirmations import SETTLED, transfer_ended
from worker.steps import Effect, Submitted

Granted = tuple[str, ...]
"""The keys of the limits beyond which people have approved an action."""


@state("RunStep")
def run_step(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """`{task_id, step_index, execution?}` → `{step_id, status, attempt}`: a step that only reads, in one transaction.

    Raises
    ------
    StoppedError
        The step must not run, needs an approval first, or has failed.
    """
    store, step_index = TaskStore(), int(event["step_index"])
    task = store.get_task(str(event["task_id"]))
    lifecycle.refuse_other_execution(task, event.get("execution"))
    plan, started = store.plan_of(task), now()
    step = plan.steps[step_index]
    if step.type not in steps.READS:
        raise ConflictError("this step has an effect, so it is not a plain step", step_index=step_index)
    readings = steps.read(LedgerClient(), task, plan, step)
    if refusal := suspensions.refusal(planning.action_type(task.task_type), readings.suspended):
        raise StepDeniedError(refusal)
    record = store.run_step(task, plan, step_index, steps.outcome_of(step, readings), readings.ruling, started=started)
    if record.status == "failed":
        raise StepFailedError(record.error or "")
    return record.model_dump(mode="json", include={"step_id", "status", "attempt"})


def handle_action(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Handle the state ExecuteAction, and the event that settles its transfer."""
    if event.get("detail-type") == SETTLED:
        return transfer_ended(event, context)
    return execute_action(event, context)


@token_state("ExecuteAction")
def execute_action(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """`{task_id, task_token, execution?}` → `{step_id, status, attempt}`; `status` is `submitted` before the outcome.

    The action is the plan's last step. Its outcome ends the task and resumes the token's execution.
    """
    store, ledger, token = TaskStore(), LedgerClient(), str(event["task_token"])
    task = store.get_task(str(event["task_id"]))
    lifecycle.refuse_other_execution(task, event.get("execution"))
    plan, records = store.plan_of(task), store.records(task.task_id)
    step_index = lifecycle.next_step(plan, records)
    limit = settings.number("CONFIRMATION_TIMEOUT_SECONDS")
    callbacks, record = CallbacksTable(), records.get(step_index)
    attempt_of = record.run if record is not None and record.status == "running" else task.run
    callbacks.wait(Callback("ACTION", task.task_id, step_index, token, limit, task.run, attempt_of))
    if record is not None and record.status == "running":
        record = store.step(task.task_id, step_index)  # it may have ended before this token was stored
    ended = None
    try:
        if attempt_of < task.run and record is not None and record.status == "failed":
            ended = record  # as if it had ended a moment later: only a retry makes another attempt
        else:
            ended = execute(store, ledger, task, plan, step_index, record)
    finally:
        if ended is None or ended.status != "running":
            callbacks.forget("ACTION", task.task_id, step_index, token)
    if ended.status == "failed":
        raise StepFailedError(ended.error or "")
    if ended.status == "succeeded":
        answer(token, {"status": ended.status})
    said = ended.model_dump(mode="json", include={"step_id", "status", "attempt"})
    return said | ({"status": "submitted"} if ended.status == "running" else {})


def execute(
    store: TaskStore, ledger: LedgerClient, task: Task, plan: Plan, step_index: int, record: StepRecord | None
) -> StepRecord:
    """Run the action; `record` comes from an earlier attempt. The record is `running` while its outcome is unknown.

    A rejection by the ledger is a result (`failed`); only transient errors are raised. The intent is recorded, and the
    approval used, before the step acts. The effect has (task, step) as its reference, so that the ledger returns the
    existing transfer to a repetition.

    Raises
    ------
    StoppedError
        The step must not run, or needs a (new) approval.
    TransientError
        The intent is not in the audit table yet, or the ledger did not respond.
    """
    if record is not None and not record.may_run(task):
        if record.status == "succeeded" and task.status not in TERMINAL:
            store.end_task(task.task_id, "completed", actor="execution", reason="", execution=task.execution_name)
        return record
    compliance.check_same_plan(task, plan)
    planning.check_follows(plan, task)
    lifecycle.refuse_ended(task)
    step, replaces = plan.steps[step_index], None
    if step.type in CONFIRMED_LATER and record is not None and record.run < task.run:
        # The step's end is the end of the transfer that an earlier execution submitted.
        settled = transfers.settle(store, ledger, task, record)
        if settled.in_flight or settled.record != record:
            return settled.record
        before = transfers.state_of(ledger, task.task_id, step.step_id) if record.status == "failed" else None
        replaces = before["txid"] if before else None
    if record is not None and record.status == "running" and record.run == task.run:
        # The claim stands, even if the policy has changed. A repeated submission is not another attempt.
        claimed = record if step.type in CONFIRMED_LATER else store.attempt_again(task, plan, step_index)
        task = store.get_task(task.task_id)  # the claim may be newer than `task`, and must be recorded
        lifecycle.refuse_ended(task)
        lifecycle.refuse_other_run(task, claimed.run)
        granted = _check_claim(store, ledger, task, plan, step_index)
    else:
        task, claimed, granted = _claim(store, ledger, task, plan, step_index, record, replaces)
    if claimed.status != "running":
        return claimed
    if step.type in steps.READS:
        return _finish(store, task, claimed, steps.outcome_of(step, steps.read(ledger, task, plan, step)))
    audit_trail.ensure_recorded(task.task_id, task.events, step_id=step.step_id)
    # The recorder may have taken seconds, in which a person may have cancelled the task.
    lifecycle.refuse_ended(task.model_copy(update={"status": store.status(task.task_id)}))
    return _act(store, ledger, task, plan, claimed, granted)


def _check_claim(store: TaskStore, ledger: LedgerClient, task: Task, plan: Plan, step_index: int) -> Granted:
    """Check that people approved a claimed step, and that the worker claimed it within its limits.

    Other roles can write its record and its event. Returns the limits that the approvals allow it to exceed. A transfer
    that the ledger has was submitted after this check. Raises StoppedError if the approval or the claim is missing.
    """
    step = plan.steps[step_index]
    if step.type in CONFIRMED_LATER and transfers.is_submitted(ledger, task.task_id, step.step_id):
        return ()
    policies = ledger.policies(planning.action_type(task.task_type), pinned=plan.policy.policy_id)
    ruling = rule(task, policies.pinned, policies.current)
    approval = store.latest_approval(task.task_id, step_index, of=task)
    verdict = compliance.decide(task, plan, step_index, ruling, approval)
    if verdict.verdict != "execute":  # not ApprovalNeededError: a started step requests no approval
        raise StepDeniedError(f"the step was started, but must not continue: {verdict.reason}")
    Intent(task, step_index, step, ruling).check_claimed()
    return ruling.granted(approval.decisions if approval else ())


def _act(
    store: TaskStore, ledger: LedgerClient, task: Task, plan: Plan, claimed: StepRecord, granted: Granted
) -> StepRecord:
    step = plan.steps[claimed.step_index]
    reference = transfers.reference_of(task.task_id, step.step_id)
    effect = Effect(reference, ledger, task.requester, task.run, task.agent, granted)
    try:
        result = steps.ACTS[step.type](step.parameters, effect)
    except PermanentError as refusal:  # the ledger never rejects a transfer that it has signed, and vice versa
        return _finish(store, task, claimed, StepOutcome(error=f"{refusal.code}: {refusal.message}"))
    if isinstance(result, Submitted):
        return claimed
    return _finish(store, task, claimed, StepOutcome(result=result))


def _finish(store: TaskStore, task: Task, claimed: StepRecord, outcome: StepOutcome) -> StepRecord:
    """Record the outcome; an action that failed has done nothing, and no longer counts in the limits."""
    if outcome.error is None or claimed.type in CONFIRMED_LATER:
        return store.finish_step(task.task_id, claimed, outcome)
    return store.finish_step(
        task.task_id, claimed, outcome, lambda: LimitsTable().give_back_of(task.task_id, claimed.step_index)
    )


def _claim(
    store: TaskStore,
    ledger: LedgerClient,
    task: Task,
    plan: Plan,
    step_index: int,
    record: StepRecord | None,
    replaces: str | None,
) -> tuple[Task, StepRecord, Granted]:
    """Record the intent to act, if the step may run by both policies, their limits and the wallet's balance now.

    Returns the task, the step's record, and the limits that the approvals allow it to exceed.
    """
    step = plan.steps[step_index]
    policies, funds = transfers.policies_and_funds(ledger, task, plan, step)
    ruling = rule(task, policies.pinned, policies.current)
    approval = store.latest_approval(task.task_id, step_index, of=task)
    # An approval in this execution counts, even if the current policy does not require it.
    consumed = approval if approval is not None and approval.run == task.run else None
    decisions = consumed.decisions if consumed else ()
    intent = Intent(task, step_index, step, ruling, decisions, funds.used)
    usage = intent.usage()
    try:
        compliance.check_may_act(task, plan, step_index, ruling, approval, usage, at=now())
    except PermanentError as too_old:
        store.refuse_step(task, plan, step_index, record, too_old.message)
        raise StepFailedError(too_old.message) from too_old
    refusal = funds.refusal or funds.refusal_today or ruling.refusal_by_usage(usage)
    if refusal is not None and not transfers.is_submitted(ledger, task.task_id, step.step_id):
        raise StepDeniedError(refusal)
    task, claimed = store.claim_step(
        task, plan, step_index, consumed, ruling.recorded, replaces=replaces, intent=intent
    )
    return task, claimed, ruling.granted(decisions)
