"""Rules of a task: planning, the run of its steps, its end and its retry.

Each function takes the task and a request. It returns a change, which the repository writes in one transaction if the
task is unchanged since the read, or raises an error. A repeated request returns a change that writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from qaes.domain import compliance
from qaes.domain.canonical import hash_of
from qaes.domain.compliance import REJECTED
from qaes.domain.errors import ApprovalNeededError, ConflictError, TransientError
from qaes.domain.ids import parse_timestamp, timestamp
from qaes.domain.models import (
    RETRYABLE,
    TERMINAL,
    Analysis,
    Approval,
    ApprovalStatus,
    Event,
    Outcome,
    Plan,
    Status,
    StepRecord,
    Task,
    by_agent,
)
from qaes.domain.policy import PolicyDecision
from qaes.domain.ruling import Ruling, Usage
from qaes.domain.step_types import CONFIRMED_LATER, EFFECT_TYPES
from qaes.domain.tasks import events

MAX_RETRIES = 20
"""Maximum number of retries of a task, so that its trail and its bundle stay small enough to send."""
CLOCKS_DIFFER = timedelta(seconds=300)
"""Tolerated difference between the clocks of services; the verifier accepts the same."""

Records = Mapping[int, StepRecord]
"""Records of the started steps, by their index."""


@dataclass(frozen=True)
class Change:
    """The writes of one transaction: fields of the task, events in order, and the items that belong to them.

    `step` is the step's record and replaces `step_before` (None: new). `approval` replaces an approval with the status
    `approval_before` (None: new). `consumed` is an approval that this change uses. `token` belongs to the state that
    waits for the decision on `approval`. `beside` has the adapter's writes to other tables.
    """

    task: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    plan: Plan | None = None
    step: StepRecord | None = None
    step_before: StepRecord | None = None
    approval: Approval | None = None
    approval_before: ApprovalStatus | None = None
    consumed: Approval | None = None
    token: str | None = None
    opens: bool = False
    beside: Sequence[Mapping[str, Any]] = ()
    writes_nothing: bool = False

    @property
    def ends(self) -> bool:
        """Return whether the task ends."""
        return self.task.get("status") in TERMINAL


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of a step: its result, or its error."""

    result: dict[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class History:
    """A task's plan, the records of its steps, and the approvals of this run, in order."""

    plan: Plan | None = None
    records: Records = field(default_factory=dict)
    asked: Sequence[Approval] = ()


# Planning


def plan_task(task: Task, plan: Plan, at: datetime, *, run: int) -> Change:
    """Pin the policy that allows the plan, and store the plan, once. The first stored plan stays."""
    if task.plan_id is not None:
        return Change(writes_nothing=True)
    refuse_ended(task)
    refuse_other_run(task, run)
    moment = timestamp(at)
    checked = events.policy_checked(task, plan.analysis, plan.policy, moment, output_of="policy")
    fields = {
        "status": "executing",
        "current_step": 0,
        "policy_id": plan.policy.policy_id,
        "plan_id": plan.plan_id,
        "plan_hash": plan.hash(),
        "total_steps": len(plan.steps),
        "requires_approval": any(step.requires_approval for step in plan.steps),
    }
    return Change(fields, (checked, events.plan_built(task, plan, moment)), plan=plan)


def deny_task(
    task: Task, analysis: Analysis, decision: PolicyDecision, at: datetime, *, run: int, reason: str | None = None
) -> Change:
    """Pin the policy that denies the task, and end the task; `reason` is a more specific text."""
    if task.plan_id is not None or task.status in TERMINAL:
        return Change(writes_nothing=True)
    refuse_other_run(task, run)
    checked = events.policy_checked(task, analysis, decision, timestamp(at))
    pinned = {"policy_id": decision.policy_id}
    reason = reason or not_allowed(decision)
    ending = end_task(task.model_copy(update=pinned), "denied", History(), actor="execution", reason=reason, at=at)
    return Change({**pinned, **ending.task}, (checked, *ending.events))


def not_allowed(decision: PolicyDecision) -> str:
    return f"policy {decision.policy_id} does not allow {decision.action_type}"


# Steps


def next_step(plan: Plan, records: Records) -> int:
    """Return the index of the first step that has not succeeded, or of the last step if all have."""
    return next((index for index in range(len(plan.steps)) if not has_succeeded(records, index)), len(plan.steps) - 1)


def has_succeeded(records: Records, step_index: int) -> bool:
    record = records.get(step_index)
    return record is not None and record.status == "succeeded"


def run_step(
    task: Task,
    step_index: int,
    history: History,
    outcome: StepOutcome,
    ruling: Ruling,
    *,
    run: int,
    started: datetime,
    at: datetime,
    usage: Usage | None = None,
) -> Change:
    """Record the start and the outcome of a step that only reads and needs no approval.

    The last step, and a failed step, end the task. `ruling` has the decisions of the policies; `usage` is the usage of
    the limits if the step is the action, which counts in them.

    Raises
    ------
    StoppedError
        The step must not run, or needs an approval. The class has the reason.
    ConflictError
        The task has ended, an earlier step has not succeeded, or the step has an effect.
    """
    plan = _plan_of(history)
    step, before = plan.steps[step_index], history.records.get(step_index)
    if before is not None and not before.may_run(task):
        return Change(step=before, writes_nothing=True)
    refuse_ended(task)
    refuse_other_run(task, run)
    if step.type in EFFECT_TYPES:
        raise ConflictError("this step has an effect, so it is not a plain step", step_index=step_index)
    if next_step(plan, history.records) != step_index:
        raise ConflictError("an earlier step has not succeeded", step_index=step_index)
    asked = [approval for approval in history.asked if approval.step_index == step_index]
    verdict = compliance.decide(task, plan, step_index, ruling, asked[-1] if asked else None, usage or {})
    if stopped := compliance.stopped_by(verdict):
        raise stopped
    if asked:
        raise ApprovalNeededError("an approval of this step was requested")
    begun = _begin(task, step_index, plan, before, started)
    final, executed = _finish(task, plan, begun, outcome, at)
    limits = None if usage is None else ruling.limits(usage)
    # Both events are of one transaction.
    claimed = events.step_started(task, begun, plan, None, ruling.recorded, timestamp(at), limits)
    change = Change({"current_step": step_index}, (claimed, executed), step=final, step_before=before)
    return _with_end(change, task, history, final, at)


def claim_step(
    task: Task,
    step_index: int,
    history: History,
    approval: Approval | None,
    current: PolicyDecision,
    *,
    run: int,
    at: datetime,
    replaces: str | None = None,
    limits: Sequence[Mapping[str, Any]] | None = None,
) -> Change:
    """Record the intent to run a step, which consumes its approval.

    A finished record stays. `run` is the execution of the verdict, `current` is the decision of the policy in force,
    and `replaces` is the transaction of an attempt that moved nothing.

    Raises ConflictError if the task has ended, or a later execution of it has started.
    """
    plan = _plan_of(history)
    before = history.records.get(step_index)
    if before is not None and not before.may_run(task):
        return Change(step=before, writes_nothing=True)
    refuse_ended(task)
    refuse_other_run(task, run)
    if task.status != "executing":
        raise ApprovalNeededError("an approval of this step is pending")
    if before is not None and before.status == "running":
        if before.run == task.run:  # another attempt of this execution has claimed it
            return attempt_again(task, step_index, history)
        begun = before.model_copy(update={"attempt": before.attempt + 1, "run": task.run})
    else:
        begun = _begin(task, step_index, plan, before, at).model_copy(update={"replaces": replaces})
    claimed = events.step_started(task, begun, plan, approval, current, timestamp(at), limits)
    return Change({"current_step": step_index}, (claimed,), step=begun, step_before=before, consumed=approval)


def attempt_again(task: Task, step_index: int, history: History) -> Change:
    """Count another attempt of a step that this execution has claimed. It needs no new decision and no event.

    A record that is finished, or of another execution, stays. Raises ConflictError if the task has ended.
    """
    before = history.records.get(step_index)
    if before is None or before.status != "running" or before.run != task.run:
        return Change(step=before, writes_nothing=True)
    refuse_ended(task)
    again = before.model_copy(update={"attempt": before.attempt + 1})
    return Change({"current_step": step_index}, step=again, step_before=before)


def finish_step(task: Task, running: StepRecord, history: History, outcome: StepOutcome, at: datetime) -> Change:
    """Record the end of a step, once, and end the task if this was its last step.

    If a later execution has claimed the step since `running` was read, the record stays: an earlier execution cannot
    end it. A task that has ended in the meantime still gets the record.
    """
    before = history.records.get(running.step_index)
    if before is not None and (before.status != "running" or before.run != running.run):
        return Change(step=before, writes_nothing=True)
    final, executed = _finish(task, _plan_of(history), before or running, outcome, at)
    change = Change({}, (executed,), step=final, step_before=before or running)
    return _with_end(change, task, history, final, at)


def refuse_step(
    task: Task, step_index: int, history: History, before: StepRecord | None, error: str, *, run: int, at: datetime
) -> Change:
    """Record that a step must not run, which this execution has not started, and end the task as failed.

    The record of a transfer of an earlier execution stays: its outcome will be recorded.

    Raises
    ------
    TransientError
        Another attempt has started since `before` was read, and takes precedence.
    ConflictError
        The task has ended, or a later execution than `run` has started, which may still run the step.
    """
    if history.records.get(step_index) != before:
        raise TransientError("another attempt of this step is running")
    refuse_ended(task)
    refuse_other_run(task, run)
    plan = _plan_of(history)
    never_begun = _begin(task, step_index, plan, before, at)
    final, executed = _finish(task, plan, never_begun, StepOutcome(error=error), at, begun=False)
    change = Change({"current_step": step_index}, (executed,))
    if before is None or before.status != "running" or before.type not in CONFIRMED_LATER:
        change = replace(change, step=final, step_before=before)
    return _with_end(change, task, history, final, at)


def _begin(task: Task, step_index: int, plan: Plan, before: StepRecord | None, at: datetime) -> StepRecord:
    step = plan.steps[step_index]
    return StepRecord(
        step_index=step_index,
        step_id=step.step_id,
        type=step.type,
        status="running",
        attempt=before.attempt + 1 if before else 1,
        run=task.run,
        input_hash=hash_of(step.parameters),
        started_at=timestamp(at),
    )


def _finish(
    task: Task, plan: Plan, record: StepRecord, outcome: StepOutcome, at: datetime, *, begun: bool = True
) -> tuple[StepRecord, Event]:
    output = outcome.result
    if outcome.error is not None:
        output = {"error": outcome.error} | ({} if begun else {"begun": False})
    final = record.model_copy(
        update={
            "status": "succeeded" if outcome.error is None else "failed",
            "result": outcome.result,
            "error": outcome.error,
            "output_hash": hash_of(output),
            "duration_ms": int((at - parse_timestamp(record.started_at)).total_seconds() * 1000),
        }
    )
    return final, events.step_executed(task, final, plan.steps[final.step_index], output, timestamp(at))


def _with_end(change: Change, task: Task, history: History, final: StepRecord, at: datetime) -> Change:
    """Add the task's end, if it ends with this step.

    A task ends with its last step, or with a step that failed in this execution. The outcome of an earlier execution's
    attempt does not end it. While an approval is pending, its decision ends the task.
    """
    if task.status != "executing":
        return change
    records = {**history.records, final.step_index: final}
    if final.status == "failed" and final.run == task.run:
        reason = final.error or ""
        ending = end_task(task, "failed", history, actor="execution", reason=reason, failed_step=final.step_id, at=at)
    elif all(has_succeeded(records, index) for index in range(len(_plan_of(history).steps))):
        ending = end_task(task, "completed", history, actor="execution", reason="", at=at)
    else:
        return change
    return replace(
        ending, task={**change.task, **ending.task}, events=(*change.events, *ending.events), **_step_of(change)
    )


def _step_of(change: Change) -> dict[str, Any]:
    return {"step": change.step, "step_before": change.step_before}


# End and retry


def end_task(
    task: Task,
    outcome: Outcome,
    history: History,
    *,
    actor: str,
    reason: str,
    at: datetime,
    failed_step: str | None = None,
    key_hash: str | None = None,
    agent: str | None = None,
) -> Change:
    """End a task, once. After a rejection in this run, the task always ends as rejected.

    The message that resumed the execution is not trusted: without a rejection no task ends as `rejected`, and an
    approval is `expired` only after its time.
    """
    if task.status in TERMINAL:
        return Change(writes_nothing=True)
    moment = timestamp(at)
    told: list[Event] = []
    closed: Approval | None = None
    last, rejected = history.asked[-1] if history.asked else None, rejected_of(history.asked)
    if rejected is not None:
        outcome, reason, failed_step = "rejected", rejected.reason or REJECTED, None
    elif outcome == "rejected" or (outcome == "expired" and not _is_over(last, at)):
        outcome, reason = "failed", "the execution was resumed without a decision"
    if rejected is None and last is not None and last.status == "pending":
        closed = last.model_copy(update={"status": "expired" if outcome == "expired" else "cancelled"})
        told.append(of_closed(task, closed, _plan_of(history), moment))
    elif rejected is None and last is not None and outcome == "expired" and last.status == "approved":
        # The decision was made in time, but did not reach the execution: neither expiry nor rejection.
        outcome, reason = "failed", "the approval could not be delivered in time"
        step = _plan_of(history).steps[last.step_index]
        told.append(events.of_approval(task, "approval_undeliverable", actor, "undeliverable", last, step, moment))
    final = {"status": outcome, "reason": reason or None, "failed_step": failed_step}
    told.append(events.task_ended(task, actor, final, moment, key_hash=key_hash, agent=agent))
    fields = final | {"waiting_until": None}
    return Change(fields, tuple(told), approval=closed, approval_before="pending" if closed else None)


def retry_task(
    task: Task,
    approvals: Sequence[Approval],
    *,
    subject: str,
    at: datetime,
    agent: str | None = None,
    key_hash: str | None = None,
) -> Change:
    """Reopen a task that failed or expired; `approvals` are the approval requests of all runs.

    A task without a plan becomes `pending`, a task with a plan becomes `executing`.

    Raises ConflictError if the task has not ended, or has another terminal status, or was retried `MAX_RETRIES` times,
    or if an approver has rejected it in any run.
    """
    if task.status not in RETRYABLE:
        raise ConflictError("only a task that failed or expired can be retried", task_status=task.status)
    # A rejected task ends as rejected. In earlier releases it could end otherwise; it cannot be retried either.
    refuse_rejected(task, approvals)
    if task.run > MAX_RETRIES:
        raise ConflictError(
            f"a task can be retried at most {MAX_RETRIES} times; start another task", task_status=task.status
        )
    status: Status = "executing" if task.plan_id else "pending"
    fields = {
        "status": status, "run": task.run + 1, "retriers": tuple(dict.fromkeys((*task.retriers, subject))),
        "reason": None, "failed_step": None, "waiting_until": None,
    }  # fmt: skip
    output = {"run": task.run + 1, "idempotency_key": key_hash, **by_agent(agent)}
    event = events.make(task, "task_retried", subject, status, events.request_again(task), output, at=timestamp(at))
    return Change(fields, (event,), opens=True)


def refuse_rejected(task: Task, approvals: Sequence[Approval]) -> None:
    """Raise ConflictError if an approver has rejected one of these approvals."""
    if (rejected := rejected_of(approvals)) is not None:
        raise ConflictError(
            "an approver has rejected the task; start another task",
            task_status=task.status,
            decided_by=rejected.decided_by,
            decision="rejected",
        )


def of_closed(task: Task, closed: Approval, plan: Plan, moment: str) -> Event:
    """Build the event of an approval that is closed without a decision."""
    step = plan.steps[closed.step_index]
    if closed.status == "expired":
        return events.of_approval(task, "approval_expired", "compliance", "expired", closed, step, moment)
    return events.of_approval(task, "approval_cancelled", "compliance", "cancelled", closed, step, moment)


def rejected_of(approvals: Sequence[Approval]) -> Approval | None:
    """Return the rejected approval."""
    return next((approval for approval in approvals if approval.status == "rejected"), None)


def refuse_ended(task: Task) -> None:
    """Raise ConflictError if the task has ended."""
    if task.status in TERMINAL:
        raise ConflictError(f"the task has ended: {task.status}", task_status=task.status)


def refuse_other_run(task: Task, run: int) -> None:
    """Raise ConflictError unless `run` is the task's current run."""
    if task.run != run:
        raise ConflictError("a later execution of the task has started", task_status=task.status)


def refuse_other_execution(task: Task, execution: str | None) -> None:
    """Raise ConflictError unless `execution` is the name of the task's execution; None is not checked."""
    if execution not in {None, task.execution_name}:
        raise ConflictError("a later execution of the task has started", task_status=task.status)


def _is_over(last: Approval | None, at: datetime) -> bool:
    """Return whether an approval is closed, decided, or expired within the tolerance of clocks."""
    if last is None:
        return False
    return last.status != "pending" or at >= parse_timestamp(last.expires_at) - CLOCKS_DIFFER


def _plan_of(history: History) -> Plan:
    if history.plan is None:
        raise ConflictError("the task has no plan")
    return history.plan
