"""The rules of a task as pure functions: four eyes, quorum, expiry, steps, ends and retries."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from qaes.domain.errors import (
    ApprovalNeededError,
    ConflictError,
    ForbiddenError,
    StepDeniedError,
    TransientError,
)
from qaes.domain.ids import timestamp
from qaes.domain.models import Approval, Outcome, Plan, Task
from qaes.domain.ruling import rule
from qaes.domain.tasks import approvals, lifecycle
from qaes.domain.tasks.lifecycle import Change, History, StepOutcome
from tests.unit.test_compliance import AT, NOW, PLAN, TASK, changed, policy
from tests.unit.test_planning import POLICY, plan

MONITORING = plan("monitor_wallet", {"wallet_address": "0x1234567890abcdef"})
WATCHES = changed(TASK, task_type="monitor_wallet", plan_hash=MONITORING.hash(), salt="0" * 32)
PAYS = changed(TASK, salt="0" * 32)
OUTCOME = StepOutcome(result={"balance": 1})


def kinds(change: Change) -> list[str]:
    return [f"{event.kind}:{event.status}" for event in change.events]


def applied(task: Task, change: Change) -> Task:
    return task if change.writes_nothing else changed(task, **change.task)


def run(task: Task, steps: Plan, step_index: int, history: History, **changes: Any) -> Change:
    current = policy("policy-v2-now", steps.analysis.action_type, **changes) if changes else POLICY
    decided = rule(task, POLICY, current)
    return lifecycle.run_step(
        task, step_index, history, OUTCOME, decided, run=task.run, started=AT, at=AT + timedelta(seconds=1)
    )


def ran(task: Task, steps: Plan, count: int) -> History:
    """The stored items when the first steps have succeeded."""
    history = History(steps)
    for step_index in range(count):
        record = run(task, steps, step_index, history).step
        assert record is not None
        history = History(steps, {**history.records, step_index: record})
    return history


# Planning


def test_plan_task_pins_policy_and_plan_in_one_change() -> None:
    task = changed(PAYS, status="pending", plan_id=None, plan_hash=None)
    change = lifecycle.plan_task(task, PLAN, AT, run=1)
    assert kinds(change) == ["policy_checked:allowed", "plan_built:planned"]
    planned = applied(task, change)
    assert (planned.status, planned.policy_id, planned.plan_hash) == ("executing", PLAN.policy.policy_id, PLAN.hash())
    assert change.plan == PLAN
    assert lifecycle.plan_task(planned, PLAN, AT, run=1).writes_nothing


def test_deny_task_pins_policy_and_end_in_one_change() -> None:
    task = changed(PAYS, status="pending", plan_id=None, plan_hash=None)
    change = lifecycle.deny_task(task, PLAN.analysis, changed(PLAN.policy, allowed=False), AT, run=1)
    assert kinds(change) == ["policy_checked:denied", "task_ended:denied"]
    assert change.ends
    assert {event.policy_id for event in change.events} == {PLAN.policy.policy_id}
    assert lifecycle.deny_task(applied(task, change), PLAN.analysis, PLAN.policy, AT, run=1).writes_nothing


# Steps


def test_run_step_claims_and_finishes_in_one_change() -> None:
    change = run(WATCHES, MONITORING, 0, History(MONITORING))
    assert kinds(change) == ["step_started:running", "step_executed:succeeded"]
    assert change.step is not None
    assert (change.step.status, change.step.attempt, change.step.duration_ms) == ("succeeded", 1, 1000)
    assert not change.ends


def test_last_step_ends_the_task() -> None:
    change = run(WATCHES, MONITORING, 2, ran(WATCHES, MONITORING, 2))
    assert kinds(change)[-1] == "task_ended:completed"
    assert change.ends


def test_step_that_fails_ends_the_task() -> None:
    decided = rule(WATCHES, POLICY, POLICY)
    failed = StepOutcome(error="no_wallet: none")
    change = lifecycle.run_step(WATCHES, 0, History(MONITORING), failed, decided, run=1, started=AT, at=AT)
    assert kinds(change)[-2:] == ["step_executed:failed", "task_ended:failed"]
    assert (change.task["failed_step"], change.task["reason"]) == ("step_1", "no_wallet: none")


def test_run_step_leaves_finished_step_unchanged() -> None:
    history = ran(WATCHES, MONITORING, 1)
    change = run(WATCHES, MONITORING, 0, history)
    assert change.writes_nothing
    assert change.step == history.records[0]


@pytest.mark.parametrize("step_index", [1, 2])
def test_run_step_keeps_the_order_of_the_plan(step_index: int) -> None:
    with pytest.raises(ConflictError, match="an earlier step"):
        run(WATCHES, MONITORING, step_index, History(MONITORING))


def test_run_step_writes_nothing_when_people_must_approve() -> None:
    with pytest.raises(ApprovalNeededError):
        run(WATCHES, MONITORING, 2, ran(WATCHES, MONITORING, 2), requires_approval=True)
    with pytest.raises(StepDeniedError):
        run(WATCHES, MONITORING, 0, History(MONITORING), allowed=False)
    with pytest.raises(ConflictError, match="effect"):
        run(PAYS, PLAN, 2, ran(PAYS, PLAN, 2))


def asked(task: Task, **options: Any) -> Approval:
    given: dict[str, Any] = {"expires_in": 600, "required": 1, "execution": None, "balance": None}
    given |= {"token": "t", "stored_token": None}
    approval = approvals.request(task, PLAN, 2, None, at=AT, **(given | options)).approval
    assert approval is not None
    return approval


def decide(task: Task, approval: Approval, subject: str, *, approved: bool = True, at: datetime = AT) -> Approval:
    waiting = changed(task, status="waiting_approval")
    decision = approvals.decide(waiting, PLAN, [approval], approved=approved, subject=subject, reason="so", at=at)
    assert decision.approval is not None
    return decision.approval


def test_run_step_leaves_a_step_that_people_approved() -> None:
    """ExecuteAction runs the step, regardless of the policy now in force."""
    history = ran(WATCHES, MONITORING, 2)
    approval = changed(decide(PAYS, asked(PAYS), "bob"), plan_hash=MONITORING.hash())
    approval = changed(approval, step_hash=MONITORING.steps[2].hash())
    with pytest.raises(ApprovalNeededError):
        run(WATCHES, MONITORING, 2, History(MONITORING, history.records, [approval]))


def test_claim_counts_attempts_and_consumes_once() -> None:
    history, current = ran(PAYS, PLAN, 2), POLICY.decide("transfer_funds")
    approval = decide(PAYS, asked(PAYS), "bob")
    first = lifecycle.claim_step(PAYS, 2, history, approval, current, run=1, at=AT)
    assert (kinds(first), first.consumed) == (["step_started:running"], approval)
    claimed = History(PLAN, {**history.records, 2: first.step}, [approval])  # type: ignore[dict-item]
    for again in (
        lifecycle.claim_step(PAYS, 2, claimed, approval, current, run=1, at=AT),
        lifecycle.attempt_again(PAYS, 2, claimed),
    ):
        assert again.step is not None
        assert (kinds(again), again.consumed, again.step.attempt) == ([], None, 2)
    with pytest.raises(ConflictError, match="a later execution"):
        lifecycle.claim_step(PAYS, 2, history, approval, current, run=2, at=AT)


def in_flight(run_: int) -> History:
    history = ran(PAYS, PLAN, 2)
    current = POLICY.decide("transfer_funds")
    claim = lifecycle.claim_step(changed(PAYS, run=run_), 2, history, None, current, run=run_, at=AT)
    assert claim.step is not None
    return History(PLAN, {**history.records, 2: claim.step})


@pytest.mark.parametrize("status", ["executing", "waiting_approval", "cancelled"])
def test_finish_step_ends_only_a_task_that_executes(status: Any) -> None:
    history, task = in_flight(1), changed(PAYS, status=status)
    change = lifecycle.finish_step(task, history.records[2], history, OUTCOME, AT)
    assert kinds(change) == ["step_executed:succeeded", *(["task_ended:completed"] if status == "executing" else [])]


def test_finish_step_of_an_earlier_run_that_failed_ends_nothing() -> None:
    history, task = in_flight(1), changed(PAYS, run=2)
    failed = lifecycle.finish_step(task, history.records[2], history, StepOutcome(error="expired: x"), AT)
    assert kinds(failed) == ["step_executed:failed"]
    succeeded = lifecycle.finish_step(task, history.records[2], history, OUTCOME, AT)
    assert kinds(succeeded) == ["step_executed:succeeded", "task_ended:completed"]


def test_finish_step_believes_the_first() -> None:
    history = in_flight(2)
    earlier = changed(history.records[2], run=1)
    assert lifecycle.finish_step(changed(PAYS, run=2), earlier, history, OUTCOME, AT).writes_nothing


def test_refuse_step_overrules_no_attempt_at_work() -> None:
    with pytest.raises(TransientError):
        lifecycle.refuse_step(PAYS, 2, in_flight(1), None, "too old", run=1, at=AT)
    refused = lifecycle.refuse_step(PAYS, 2, ran(PAYS, PLAN, 2), None, "too old", run=1, at=AT)
    assert kinds(refused) == ["step_executed:failed", "task_ended:failed"]


# People


def test_request_asks_once_and_the_newest_token_counts() -> None:
    first = asked(PAYS)
    given: dict[str, Any] = {"expires_in": 9, "execution": None, "balance": None, "at": AT, "stored_token": "t"}
    again = approvals.request(PAYS, PLAN, 2, first, token="new", required=1, **given)
    assert (kinds(again), again.approval, again.token, again.writes_nothing) == ([], first, "new", False)
    assert approvals.request(PAYS, PLAN, 2, first, token="t", required=1, **given).writes_nothing
    stricter = approvals.request(PAYS, PLAN, 2, decide(PAYS, first, "bob"), token="new", required=2, **given)
    assert kinds(stricter) == ["approval_requested:pending"]
    assert stricter.approval is not None
    assert (stricter.approval.round, stricter.approval.required) == (2, 2)


def test_quorum_needs_different_people() -> None:
    once = decide(PAYS, asked(PAYS, required=2), "bob")
    assert once.status == "pending"
    with pytest.raises(ConflictError, match="already approved"):
        decide(PAYS, once, "bob ")
    assert decide(PAYS, once, "carol").status == "approved"
    assert decide(PAYS, once, "carol", approved=False).status == "rejected"


@pytest.mark.parametrize("subject", ["alice", "olivia", "oscar"])
def test_four_eyes_refuses_every_requester(subject: str) -> None:
    task = changed(PAYS, retriers=("olivia", "oscar"))
    with pytest.raises(ForbiddenError):
        decide(task, asked(task), subject)


def test_decision_after_its_time_is_refused() -> None:
    approval = asked(PAYS)
    late = AT + timedelta(seconds=600)
    with pytest.raises(ConflictError, match="has expired"):
        decide(PAYS, approval, "bob", at=late)
    waiting = changed(PAYS, status="waiting_approval")
    assert approvals.expire(waiting, PLAN, [approval], late - timedelta(milliseconds=1)).writes_nothing
    assert kinds(approvals.expire(waiting, PLAN, [approval], late)) == ["approval_expired:expired"]


def test_people_are_reminded_once() -> None:
    approval, waiting = asked(PAYS), changed(PAYS, status="waiting_approval")
    reminded = approvals.remind(waiting, PLAN, [approval], AT)
    assert kinds(reminded) == ["approval_reminder:pending"]
    assert reminded.approval is not None
    assert approvals.remind(waiting, PLAN, [reminded.approval], AT).writes_nothing


# Ends and retries


def end(outcome: Outcome, *said: Approval, at: datetime = AT) -> Change:
    return lifecycle.end_task(PAYS, outcome, History(PLAN, {}, said), actor="execution", reason="so", at=at)


@pytest.mark.parametrize("outcome", ["denied", "expired", "failed", "cancelled", "completed"])
def test_rejection_overrides_later_outcomes(outcome: Outcome) -> None:
    change = end(outcome, decide(PAYS, asked(PAYS), "bob", approved=False))
    assert (change.task["status"], change.task["reason"]) == ("rejected", "so")


def test_no_task_is_rejected_without_a_rejection() -> None:
    assert kinds(end("rejected")) == ["task_ended:failed"]
    assert kinds(end("rejected", decide(PAYS, asked(PAYS), "bob"))) == ["task_ended:failed"]
    assert kinds(end("rejected", asked(PAYS))) == ["approval_cancelled:cancelled", "task_ended:failed"]


def test_no_approval_expires_before_its_time() -> None:
    approval = asked(PAYS, expires_in=3600)
    early, late = AT + timedelta(minutes=54), AT + timedelta(minutes=56)
    assert kinds(end("expired", approval, at=early)) == ["approval_cancelled:cancelled", "task_ended:failed"]
    assert kinds(end("expired", approval, at=late)) == ["approval_expired:expired", "task_ended:expired"]
    assert kinds(end("expired", at=late)) == ["task_ended:failed"]


def test_approval_that_was_not_delivered_is_no_expiry() -> None:
    change = end("expired", decide(PAYS, asked(PAYS), "bob"))
    assert kinds(change) == ["approval_undeliverable:undeliverable", "task_ended:failed"]


def test_end_is_final() -> None:
    for status in ("completed", "denied", "rejected", "expired", "failed", "cancelled"):
        ended = changed(PAYS, status=status)
        assert lifecycle.end_task(ended, "failed", History(), actor="x", reason="", at=AT).writes_nothing
        with pytest.raises(ConflictError):
            lifecycle.refuse_ended(ended)


def test_retry_reopens_only_failed_or_expired_tasks() -> None:
    for status in ("failed", "expired"):
        change = lifecycle.retry_task(changed(PAYS, status=status), [], subject="olivia", at=AT)
        assert (change.opens, change.task["run"], change.task["retriers"]) == (True, 2, ("olivia",))
    for status in ("executing", "completed", "denied", "rejected", "cancelled"):
        with pytest.raises(ConflictError):
            lifecycle.retry_task(changed(PAYS, status=status), [], subject="olivia", at=AT)
    failed = changed(PAYS, status="failed")
    with pytest.raises(ConflictError, match="rejected"):
        lifecycle.retry_task(failed, [decide(PAYS, asked(PAYS), "bob", approved=False)], subject="olivia", at=AT)
    with pytest.raises(ConflictError, match="at most"):
        lifecycle.retry_task(changed(failed, run=lifecycle.MAX_RETRIES + 1), [], subject="olivia", at=AT)


def test_times_of_events_are_those_of_the_change() -> None:
    change = run(WATCHES, MONITORING, 0, History(MONITORING))
    assert [event.timestamp for event in change.events] == [timestamp(AT + timedelta(seconds=1))] * 2
    assert change.step is not None
    assert change.step.started_at == NOW
