"""May this step run now? Asked by the compliance agent before a step, and by the worker right before it acts."""

from __future__ import annotations

from typing import Literal

from qaes.domain.errors import ConflictError, RefusedError
from qaes.domain.models import TERMINAL, Approval, Model, Plan, Step, Task
from qaes.domain.planning import step_requires_approval
from qaes.domain.policy import PolicyDecision


class Verdict(Model):
    """The compliance agent's answer, a value that the state machine chooses by."""

    verdict: Literal["execute", "await_approval", "denied", "rejected", "expired"]
    reason: str
    approvals: int = 1
    """How many people have to approve, when `verdict` is `await_approval`."""
    expires_after: int | None = None
    """Seconds that they have; None: as long as the system allows."""


def check_same_plan(task: Task, plan: Plan) -> None:
    """Raises ConflictError unless `plan` is, to the letter, the one that was recorded for the task."""
    if task.plan_id != plan.plan_id or task.plan_hash != plan.hash():
        raise ConflictError("the plan is not the one that was recorded", field="plan_hash")


def decide(task: Task, plan: Plan, step_index: int, current: PolicyDecision, approval: Approval | None) -> Verdict:
    """The pinned policy and the current one must both allow the step, and an approval must be for just this step.

    `approval` is the newest that was asked for; a policy that has become stricter since asks for one anew, and so does
    another execution of the task (a retry).
    """
    check_same_plan(task, plan)
    step = plan.steps[step_index]
    if approval is not None and approval.run != task.run:
        approval = None
    if task.status in TERMINAL:
        return Verdict(verdict="denied", reason=f"the task has ended: {task.status}")
    if not plan.policy.allowed or not current.allowed:
        return Verdict(verdict="denied", reason=f"policy {current.policy_id} does not allow {current.action_type}")
    if not needs_approval(step, current):
        return Verdict(verdict="execute", reason="no approval is needed")
    return _by_approval(plan, step, current, approval)


def _by_approval(plan: Plan, step: Step, current: PolicyDecision, approval: Approval | None) -> Verdict:
    if approval is None or approval.status == "pending":
        return _ask(plan, current)
    if approval.status == "rejected":
        return Verdict(verdict="rejected", reason="an approver rejected it")
    if approval.status == "expired":
        return Verdict(verdict="expired", reason="nobody decided in time")
    if approval.status != "approved":
        return Verdict(verdict="denied", reason=f"the approval was {approval.status}")
    if sum(decision.approved for decision in approval.decisions) < _approvals(plan, current):
        return _ask(plan, current)
    if not covers(approval, plan, step):
        return Verdict(verdict="denied", reason="what was approved is not what would run")
    return Verdict(verdict="execute", reason="approved")


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


def needs_approval(step: Step, current: PolicyDecision) -> bool:
    """Whether the plan or the policy in force asks for a person."""
    return step.requires_approval or step_requires_approval(step.type, current)


def covers(approval: Approval, plan: Plan, step: Step) -> bool:
    """Whether the approval is for exactly this plan and this step, by their hashes."""
    return approval.plan_hash == plan.hash() and approval.step_hash == step.hash()


def check_may_act(task: Task, plan: Plan, step_index: int, current: PolicyDecision, approval: Approval | None) -> None:
    """The last look, by the one who acts. Raises RefusedError when the step may not run."""
    verdict = decide(task, plan, step_index, current, approval)
    if verdict.verdict != "execute":
        raise RefusedError(verdict.verdict, verdict.reason)
