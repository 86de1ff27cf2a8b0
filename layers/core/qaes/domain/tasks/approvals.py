"""Rules of an approval: request, decision, reminder and expiry."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from qaes.domain.errors import ConflictError, ForbiddenError
from qaes.domain.ids import parse_timestamp, timestamp
from qaes.domain.models import Approval, ApprovalStatus, Decision, Plan, Quorum, Task, Terms, WalletBalance
from qaes.domain.tasks import events
from qaes.domain.tasks.lifecycle import Change, of_closed, refuse_ended, refuse_other_execution
from qaes.domain.text import same_subject


def request(
    task: Task,
    plan: Plan,
    step_index: int,
    latest: Approval | None,
    *,
    token: str,
    stored_token: str | None,
    expires_in: int,
    required: int,
    execution: str | None,
    balance: WalletBalance | None,
    at: datetime,
    terms: Terms | None = None,
) -> Change:
    """Request an approval of a step; `latest` is the latest request for it, with the `stored_token`.

    If the state is retried in the same execution, the newest token counts. A decided or expired approval stays: the
    request is repeated only if the approvals do not meet the `required` number, or the `terms` of a policy of format 2,
    because the policy has become stricter.

    Raises ConflictError if the task has ended, or `execution` is not its current execution: a token from before a retry
    resumes nothing, and never replaces the current token.
    """
    refuse_ended(task)
    refuse_other_execution(task, execution)
    quorums = terms.quorums if terms else (Quorum(approvals=required),)
    if latest is not None and latest.run == task.run and not latest.is_too_little(quorums):
        waits = {"status": "waiting_approval"} if latest.status == "pending" else {}
        unchanged = stored_token == token
        return Change(waits, approval=latest, approval_before=latest.status, token=token, writes_nothing=unchanged)
    approval = Approval(
        step_index=step_index,
        round=latest.round + 1 if latest else 1,
        run=task.run,
        status="pending",
        required=required,
        plan_hash=plan.hash(),
        step_hash=plan.steps[step_index].hash(),
        policy_id=plan.policy.policy_id,
        requested_at=timestamp(at),
        expires_at=timestamp(at + timedelta(seconds=expires_in)),
        balance=balance,
        terms=terms,
    )
    step = plan.steps[step_index]
    asked = events.of_approval(task, "approval_requested", "compliance", "pending", approval, step, timestamp(at))
    fields: dict[str, str | int] = {
        "status": "waiting_approval",
        "current_step": step_index,
        "waiting_since": approval.requested_at,
        "waiting_until": approval.expires_at,
    }
    return Change(fields, (asked,), approval=approval, token=token)


def decide(
    task: Task,
    plan: Plan | None,
    approvals: Sequence[Approval],
    *,
    approved: bool,
    subject: str,
    reason: str,
    at: datetime,
    plan_hash: str | None = None,
    four_eyes: bool = True,
    key_hash: str | None = None,
) -> Change:
    """Record a person's decision on the pending one of the task's `approvals`.

    A rejection ends the approval, and so does the last required approval. Each approval comes from another person. Only
    people whose approval counts may decide, and each of them may reject.

    Raises
    ------
    ConflictError
        The task does not wait for an approval (details: its status, and the person who decided); this person has
        already approved; or `plan_hash` differs from the plan.
    ForbiddenError
        With `four_eyes`: this person started the task, or retried it in any run. Or the policy requires approvals of
        groups, and this person is not a member.
    """
    if four_eyes:
        _refuse_involved(task, subject)
    approval = pending_of(approvals)
    if task.status != "waiting_approval" or plan is None or approval is None or approval.run != task.run:
        raise _not_waiting(task, approvals)
    if at >= parse_timestamp(approval.expires_at):
        raise ConflictError("the approval has expired", task_status="expired")
    if plan_hash is not None and plan_hash != approval.plan_hash:
        raise ConflictError(
            "`plan_hash` differs from the plan that waits for approval; read the task again",
            field="plan_hash",
            plan_hash=approval.plan_hash,
        )
    if not approval.may_be_decided_by(subject):
        raise ForbiddenError(_not_in_group(approval))
    if any(same_subject(each.subject, subject) for each in approval.decisions):
        raise ConflictError("you have already approved this step", task_status=task.status, decided_by=subject)
    moment, said = timestamp(at), "approved" if approved else "rejected"
    decision = Decision(subject=subject, approved=approved, reason=reason, decided_at=moment)
    decided = approval.model_copy(update={"decisions": (*approval.decisions, decision)})
    ends = not approved or decided.is_met
    decided = decided.model_copy(update={"status": said if ends else "pending"})
    step = plan.steps[approval.step_index]
    event = events.of_approval(task, "approval_decided", subject, said, decided, step, moment, key_hash)
    fields = {"status": "executing", "waiting_until": None} if ends else {}
    return Change(fields, (event,), approval=decided, approval_before="pending")


def remind(task: Task, plan: Plan | None, approvals: Sequence[Approval], at: datetime) -> Change:
    """Record the reminder of the pending approval, once."""
    approval = pending_of(approvals)
    if task.status != "waiting_approval" or plan is None or approval is None or approval.reminded_at is not None:
        return Change(writes_nothing=True)
    moment, step = timestamp(at), plan.steps[approval.step_index]
    event = events.of_approval(task, "approval_reminder", "reconciler", "pending", approval, step, moment)
    reminded = approval.model_copy(update={"reminded_at": moment})
    return Change({}, (event,), approval=reminded, approval_before="pending")


def expire(task: Task, plan: Plan | None, approvals: Sequence[Approval], at: datetime) -> Change:
    """Close the pending approval if it has expired."""
    approval = pending_of(approvals)
    if task.status != "waiting_approval" or plan is None or approval is None:
        return Change(writes_nothing=True)
    if at < parse_timestamp(approval.expires_at):
        return Change(writes_nothing=True)
    expired: ApprovalStatus = "expired"
    closed = approval.model_copy(update={"status": expired})
    event = of_closed(task, closed, plan, timestamp(at))
    fields = {"status": "executing", "waiting_until": None}
    return Change(fields, (event,), approval=closed, approval_before="pending")


def pending_of(approvals: Sequence[Approval]) -> Approval | None:
    """Return the pending approval."""
    return next((approval for approval in approvals if approval.status == "pending"), None)


def may_decide(
    task: Task, approvals: Sequence[Approval], subject: str, at: datetime, *, four_eyes: bool = True
) -> bool:
    """Return whether `decide` would accept a decision of this person now."""
    approval = pending_of(approvals)
    if task.status != "waiting_approval" or approval is None or approval.run != task.run:
        return False
    if four_eyes and is_involved(task, subject):
        return False
    decided = any(same_subject(decision.subject, subject) for decision in approval.decisions)
    return not decided and at < parse_timestamp(approval.expires_at) and approval.may_be_decided_by(subject)


def is_involved(task: Task, subject: str) -> bool:
    """Return whether this person started the task, or retried it in any run, in person or by an agent."""
    return any(same_subject(subject, person) for person in (task.requester, *task.retriers))


def _not_in_group(approval: Approval) -> str:
    names = sorted({quorum.approvers for quorum in approval.quorums if quorum.approvers is not None})
    return (
        f"only people in {' or '.join(f'`{name}`' for name in names)} can decide on this task: you are not among them"
    )


def _not_waiting(task: Task, approvals: Sequence[Approval]) -> ConflictError:
    last = approvals[-1] if approvals else None
    by = {"decided_by": last.decided_by, "decision": last.status} if last and last.decided_by else {}
    return ConflictError("the task does not wait for an approval", task_status=task.status, **by)


def _refuse_involved(task: Task, subject: str) -> None:
    """Raise ForbiddenError if this person started the task, or retried it in any run."""
    if same_subject(subject, task.requester):
        raise ForbiddenError("you cannot decide on a task that you started")
    if any(same_subject(subject, retrier) for retrier in task.retriers):
        raise ForbiddenError("you cannot decide on a task that you retried")
