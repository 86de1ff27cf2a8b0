"""How a task is planned, how its steps run, and how it ends.

Each function takes the task as it was read and a request. It returns the change, which the repository writes in one
transaction if nobody has changed the task since, or raises an error. Asked for what is there already, it returns a
change that writes nothing.
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
"""How often a task may be retried: its trail, and the bundle of it, stay small enough to be sent."""
CLOCKS_DIFFER = timedelta(seconds=300)
"""How far the clocks of services may differ; the verifier accepts as much."""

Records = Mapping[int, StepRecord]
"""The records of the steps that were begun, by their index."""


@dataclass(frozen=True)
class Change:
    """What one transaction writes: fields of the task, events in order, and the items that go with them.

    `step` is the step's record; it replaces `step_before` (None: there is none yet). `approval` replaces one with the
    status `approval_before` (None: it is new); `consumed` is one that was approved and is used up. `token` is
    that of the state that waits for the decision on `approval`. `beside` are writes of other tables, as the adapter has
    them.
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
        """Whether the task ends."""
        return self.task.get("status") in TERMINAL


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step: its result, or the error with which it failed."""

    result: dict[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class History:
    """What the task's items say: its plan, the records of its steps, and the approvals of this run, in order."""

    plan: Plan | None = None
    records: Records = field(default_factory=dict)
    asked: Sequence[Approval] = ()


# Planning


def plan_task(task: Task, plan: Plan, at: datetime, *, run: int) -> Change:
    """Pin the policy that allows the plan, and store the plan, once: the plan that was stored first stays."""
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
    """Pin the policy that does not allow the task, and end the task; `reason` says more than that in words."""
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
    """Return the index of the first step that has not succeeded; of the last one if all have."""
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
    """Record a step that only reads and for which no person is asked: that it began, and its outcome.

    The last step, and a step that failed, end the task. `ruling` is what the policies decide, `usage` what the
    limits have used if the step is the action, and counts in them.

    Raises
    ------
    StoppedError
        The step may not run, or a person is asked: by its class.
    ConflictError
        The task has ended, a step before this one has not succeeded, or the step has an effect.
    """
    plan = _plan_of(history)
    step, before = plan.steps[step_index], history.records.get(step_index)
    if before is not None and not before.may_run(task):
        return Change(step=before, writes_nothing=True)
    refuse_ended(task)
    refuse_other_run(task, run)
    if step.type in EFFECT_TYPES:
        raise ConflictError("this step has an effect: it is no plain step", step_index=step_index)
    if next_step(plan, history.records) != step_index:
        raise ConflictError("a step before this one has not succeeded", step_index=step_index)
    asked = [approval for approval in history.asked if approval.step_index == step_index]
    verdict = compliance.decide(task, plan, step_index, ruling, asked[-1] if asked else None, usage or {})
    if stopped := compliance.stopped_by(verdict):
        raise stopped
    if asked:
        raise ApprovalNeededError("people were asked about this step")
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

    A record that is finished stays as it is. `run` is the execution for which it was decided, `current` what the policy
    in force says; `replaces` is the transaction of an attempt that moved nothing.

    Raises ConflictError when the task has ended, or another execution of it has begun.
    """
    plan = _plan_of(history)
    before = history.records.get(step_index)
    if before is not None and not before.may_run(task):
        return Change(step=before, writes_nothing=True)
    refuse_ended(task)
    refuse_other_run(task, run)
    if task.status != "executing":
        raise ApprovalNeededError("people are asked about this step")
    if before is not None and before.status == "running":
        if before.run == task.run:  # another attempt of this execution has claimed it meanwhile
            return attempt_again(task, step_index, history)
        begun = before.model_copy(update={"attempt": before.attempt + 1, "run": task.run})
    else:
        begun = _begin(task, step_index, plan, before, at).model_copy(update={"replaces": replaces})
    claimed = events.step_started(task, begun, plan, approval, current, timestamp(at), limits)
    return Change({"current_step": step_index}, (claimed,), step=begun, step_before=before, consumed=approval)


def attempt_again(task: Task, step_index: int, history: History) -> Change:
    """Count another attempt of a step that this execution has claimed: it is no other decision, and no event.

    A record that is finished, or of another execution, stays as it is. Raises ConflictError when the task has ended.
    """
    before = history.records.get(step_index)
    if before is None or before.status != "running" or before.run != task.run:
        return Change(step=before, writes_nothing=True)
    refuse_ended(task)
    again = before.model_copy(update={"attempt": before.attempt + 1})
    return Change({"current_step": step_index}, step=again, step_before=before)


def finish_step(task: Task, running: StepRecord, history: History, outcome: StepOutcome, at: datetime) -> Change:
    """Record how a step ended, once, and end the task if it ends with that.

    An execution that has claimed the step since `running` was read is not told by one before it how it ended: then the
    record stays as it is. A task that has ended meanwhile still gets the record of what was done.
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
    """Record that a step may not run, which this execution has not begun, and end the task as failed.

    The record of a transfer that an earlier execution began stays: its outcome is still to be recorded.

    Raises
    ------
    TransientError
        Another attempt has begun since `before` was read: that one is not overruled.
    ConflictError
        The task has ended, or another execution of it than `run` has begun, which may yet run the step.
    """
    if history.records.get(step_index) != before:
        raise TransientError("another attempt is at work on this step")
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

    A task ends with its last step, or with a step that failed in this execution: what an attempt of an execution
    before has come to is not the end. While people are asked, their answer ends it.
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


# The end, and taking it back


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
    """End a task, once. A rejection in this run is the task's end, whatever else has gone wrong and whoever ends it.

    What woke the execution is not believed: without a rejection no task ends as `rejected`, and before its time is over
    no approval is `expired`.
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
        # Decided in time, but the decision did not reach the execution: that is neither expiry nor rejection.
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
    """Take back the end of a task that failed or expired; `approvals` are all that were asked for, in whatever run.

    A task without a plan is `pending` again, one with a plan `executing`.

    Raises ConflictError when the task has not ended, or in a way that no retry takes back, or has been retried
    `MAX_RETRIES` times; or an approver has rejected it, in whatever run.
    """
    if task.status not in RETRYABLE:
        raise ConflictError("only a task that failed or expired can be retried", task_status=task.status)
    # A rejected task ends as that. Those of the time when it could end otherwise are not retried either.
    refuse_rejected(task, approvals)
    if task.run > MAX_RETRIES:
        raise ConflictError(f"a task is retried at most {MAX_RETRIES} times: start another", task_status=task.status)
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
            "an approver has rejected the task: start another one",
            task_status=task.status,
            decided_by=rejected.decided_by,
            decision="rejected",
        )


def of_closed(task: Task, closed: Approval, plan: Plan, moment: str) -> Event:
    """Make the event of an approval that nobody decides on any more."""
    step = plan.steps[closed.step_index]
    if closed.status == "expired":
        return events.of_approval(task, "approval_expired", "compliance", "expired", closed, step, moment)
    return events.of_approval(task, "approval_cancelled", "compliance", "cancelled", closed, step, moment)


def rejected_of(approvals: Sequence[Approval]) -> Approval | None:
    """Return the approval that was rejected."""
    return next((approval for approval in approvals if approval.status == "rejected"), None)


def refuse_ended(task: Task) -> None:
    """Raise ConflictError if the task has ended."""
    if task.status in TERMINAL:
        raise ConflictError(f"the task has ended: {task.status}", task_status=task.status)


def refuse_other_run(task: Task, run: int) -> None:
    """Raise ConflictError unless `run` is the task's."""
    if task.run != run:
        raise ConflictError("another execution of the task has begun", task_status=task.status)


def refuse_other_execution(task: Task, execution: str | None) -> None:
    """Raise ConflictError unless `execution` is the name of the task's execution; None is not checked."""
    if execution not in {None, task.execution_name}:
        raise ConflictError("another execution of the task has begun", task_status=task.status)


def _is_over(last: Approval | None, at: datetime) -> bool:
    """Whether an approval's time is over, as far as clocks may differ, or it was closed or decided on already."""
    if last is None:
        return False
    return last.status != "pending" or at >= parse_timestamp(last.expires_at) - CLOCKS_DIFFER


def _plan_of(history: History) -> Plan:
    if history.plan is None:
        raise ConflictError("the task has no plan")
    return history.plan
