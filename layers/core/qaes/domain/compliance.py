"""May this step run now? Asked by the compliance agent before a step, and by the worker right before it acts."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal

from qaes.domain import limits
from qaes.domain.errors import (
    ApprovalExpiredError,
    ApprovalNeededError,
    ApprovalRejectedError,
    ConflictError,
    InvalidInputError,
    PermanentError,
    StepDeniedError,
    StoppedError,
)
from qaes.domain.ids import parse_timestamp
from qaes.domain.models import TERMINAL, Approval, Model, Plan, Step, Task, WalletBalance
from qaes.domain.planning import step_requires_approval
from qaes.domain.policy import PolicyDecision
from qaes.domain.qubic.identity import check_payable

REJECTED = "an approver rejected it"


MAX_APPROVAL_AGE = timedelta(minutes=55)
"""How long after an approval's `expires_at` its step may still begin; the verifier refuses a step after an hour."""


class Verdict(Model):
    """The compliance agent's answer, a value that the state machine chooses by."""

    verdict: Literal["execute", "await_approval", "denied", "rejected", "expired"]
    reason: str
    approvals: int = 1
    """How many people have to approve, when `verdict` is `await_approval`."""
    expires_after: int | None = None
    """Seconds that they have; None: as long as the system allows."""
    balance: WalletBalance | None = None
    """Of the wallet that is to pay, when `verdict` is `await_approval` for a transfer; it is shown to the approver."""


_STOPS: dict[str, type[StoppedError]] = {
    "await_approval": ApprovalNeededError,
    "rejected": ApprovalRejectedError,
    "expired": ApprovalExpiredError,
}


def stopped_by(verdict: Verdict) -> StoppedError | None:
    """Return the error that stops a step by this verdict; None when the step may run. What is no clear yes denies."""
    if verdict.verdict == "execute":
        return None
    return _STOPS.get(verdict.verdict, StepDeniedError)(verdict.reason)


def check_same_plan(task: Task, plan: Plan) -> None:
    """Raises ConflictError unless `plan` is, to the letter, the one that was recorded for the task."""
    if task.plan_id != plan.plan_id or task.plan_hash != plan.hash():
        raise ConflictError("the plan is not the one that was recorded", field="plan_hash")


def decide(task: Task, plan: Plan, step_index: int, current: PolicyDecision, approval: Approval | None) -> Verdict:
    """The pinned policy and the current one must both allow the step, and an approval must be for just this step.

    Nobody is asked to approve what the limits of either forbid; what a wallet has spent today is for the ledger to say.
    `approval` is the newest that was asked for; a policy that has become stricter since asks for one anew, and so does
    another execution of the task (a retry). Once somebody was asked, their answer counts, even if by now no policy
    would ask.
    """
    if rejected := rejection(task, approval):
        return rejected
    check_same_plan(task, plan)
    step = plan.steps[step_index]
    if approval is not None and approval.run != task.run:
        approval = None
    if task.status in TERMINAL:
        return Verdict(verdict="denied", reason=f"the task has ended: {task.status}")
    if not plan.policy.allowed or not current.allowed:
        return Verdict(verdict="denied", reason=f"policy {current.policy_id} does not allow {current.action_type}")
    for refusal in (refusal_by_address(step), *(refusal_by_limits(step, each) for each in (plan.policy, current))):
        if refusal:
            return Verdict(verdict="denied", reason=refusal)
    return _by_approval(plan, step, current, approval)


def rejection(task: Task, approval: Approval | None) -> Verdict | None:
    """Return the verdict on a step whose approval was rejected in this execution; None if it was not.

    Nothing else counts then: neither the plan, the policies nor the ledger can let the step run.
    """
    if approval is None or approval.run != task.run or approval.status != "rejected":
        return None
    return Verdict(verdict="rejected", reason=REJECTED)


def preview(plan: Plan, current: PolicyDecision) -> tuple[Step | None, Verdict]:
    """Return the verdict that a task with this plan would get if it were started now, and the step that gets it.

    The first verdict that is not `execute` is the task's: `decide` says it, step by step, as it does for a task. The
    state machine asks for the policy's permission before there are steps: then the step is None.
    """
    if not plan.policy.allowed:
        reason = f"policy {plan.policy.policy_id} does not allow {plan.analysis.action_type}"
        return None, Verdict(verdict="denied", reason=reason)
    task = Task(
        task_id=plan.task_id or "",
        status="executing",
        task_type=plan.analysis.action_type,
        description="",
        parameters={},
        requester="",
        created_at=plan.created_at,
        updated_at=plan.created_at,
        plan_id=plan.plan_id,
        plan_hash=plan.hash(),
    )
    found: tuple[Step | None, Verdict] = None, Verdict(verdict="execute", reason="no approval is needed")
    for index, step in enumerate(plan.steps):
        verdict = decide(task, plan, index, current, None)
        if verdict.verdict == "denied":
            return step, verdict
        if verdict.verdict != "execute" and found[0] is None:
            found = step, verdict
    return found


def go_on(task: Task, plan: Plan) -> Verdict:
    """The verdict on a step whose transfer was let through by an execution before this one: its end is waited for.

    Nobody is asked again, and no policy: a rejection would not stop it any more. Raises ConflictError as
    `check_same_plan`.
    """
    check_same_plan(task, plan)
    if task.status in TERMINAL:
        return Verdict(verdict="denied", reason=f"the task has ended: {task.status}")
    return Verdict(verdict="execute", reason="its transfer was handed in before, and let through then")


def _by_approval(plan: Plan, step: Step, current: PolicyDecision, approval: Approval | None) -> Verdict:
    if approval is not None and approval.status != "approved":
        return _not_approved(plan, current, approval)
    given = sum(decision.approved for decision in approval.decisions) if approval else 0
    if needs_approval(step, current) and given < _approvals(plan, current):
        return _ask(plan, current)
    if approval is None:
        return Verdict(verdict="execute", reason="no approval is needed")
    if not covers(approval, plan, step):
        return Verdict(verdict="denied", reason="what was approved is not what would run")
    return Verdict(verdict="execute", reason="approved")


def _not_approved(plan: Plan, current: PolicyDecision, approval: Approval) -> Verdict:
    if approval.status == "pending":
        return _ask(plan, current)
    if approval.status == "expired":
        return Verdict(verdict="expired", reason="nobody decided in time")
    return Verdict(verdict="denied", reason=f"the approval was {approval.status}")


def _approvals(plan: Plan, current: PolicyDecision) -> int:
    return max(plan.policy.approvals, current.approvals)


def _ask(plan: Plan, current: PolicyDecision) -> Verdict:
    limits = [each for each in (plan.policy.expires_after, current.expires_after) if each is not None]
    return Verdict(
        verdict="await_approval",
        reason=f"policy {current.policy_id} asks for an approval",
        approvals=_approvals(plan, current),
        expires_after=min(limits, default=None),
    )


def refusal_by_address(step: Step) -> str | None:
    """Tell why a transfer may not go from or to its addresses; None when it may, or when it is no transfer.

    A task's start checks its parameters; a plan that was stored before that check existed is checked here.
    """
    if step.type != "onchain_action":
        return None
    try:
        for field in ("from_address", "to_address"):
            check_payable(step.parameters.get(field), field)
    except InvalidInputError as error:
        return f"invalid_address: {error.message}"
    return None


def refusal_by_balance(step: Step, balance: WalletBalance) -> str | None:
    """Tell why a transfer's source cannot pay it; None when it can."""
    amount = step.parameters["amount"]
    if balance.available >= amount:
        return None
    promised = balance.balance - balance.available
    rest = f", of which {promised} QU are promised to other transfers" if promised > 0 else ""
    return f"insufficient_balance: the wallet holds {balance.balance} QU{rest}; the transfer needs {amount} QU"


def refusal_by_limits(step: Step, policy: PolicyDecision) -> str | None:
    """Tell which limit of the policy a transfer is beyond on any day; None when it is within all, or no transfer."""
    if step.type != "onchain_action":
        return None
    to, amount = step.parameters.get("to_address"), step.parameters.get("amount")
    refusal = limits.refusal_by_limits(policy, destination=to, amount=amount)
    return refusal.message if refusal else None


def needs_approval(step: Step, current: PolicyDecision) -> bool:
    """Whether the plan or the policy in force asks for a person."""
    return step.requires_approval or step_requires_approval(step.type, current)


def covers(approval: Approval, plan: Plan, step: Step) -> bool:
    """Whether the approval is for exactly this plan and this step, by their hashes."""
    return approval.plan_hash == plan.hash() and approval.step_hash == step.hash()


def check_may_act(
    task: Task, plan: Plan, step_index: int, current: PolicyDecision, approval: Approval | None, *, at: datetime
) -> None:
    """Check, as the last before a step begins at the moment `at`, that it may run.

    Raises
    ------
    StoppedError
        The step may not run, or not yet: by its class.
    PermanentError
        `approval_too_old`: its approval expired `MAX_APPROVAL_AGE` ago or earlier, so a retry asks for a new one.
    """
    if stopped := stopped_by(decide(task, plan, step_index, current, approval)):
        raise stopped
    if approval is None or approval.run != task.run:
        return
    if at - parse_timestamp(approval.expires_at) >= MAX_APPROVAL_AGE:
        raise PermanentError("approval_too_old", f"its approval expired at {approval.expires_at}: retry the task")
