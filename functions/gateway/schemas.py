"""Request and response bodies of the gateway, and the representation of tasks."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from qaes.domain.models import TERMINAL, Approval, Decision, Plan, Status, Step, Task, WalletBalance
from qaes.domain.planning import Effect, effect_of
from qaes.domain.policy import PolicyDecision, RiskLevel, Rule
from qaes.domain.text import subject_note

Agent = Annotated[
    str | None, Field(description="client id of the agent that requested the task; null if a person requested it")
]


class StartAnswer(BaseModel):
    """The task is recorded, and runs without further requests."""

    task_id: str
    status: Status
    message: str


class TaskError(BaseModel):
    """The reason why a task did not complete, and the failed step."""

    step_id: str | None
    reason: str


EFFECT = Field(description="effect of the completed action; `recorded only`: the system performs nothing")
NOTE = Field(description="lists the requester's letters outside ASCII, which may look like other letters")


class QuorumAnswer(BaseModel):
    """Number and group of the people who must approve; `approvers` is null if any approver counts."""

    approvals: int
    approvers: str | None


class ApprovalQuestion(BaseModel):
    """The approval request. The system runs exactly the plan and step with these hashes, and nothing else."""

    step_index: int
    step_id: str
    step_type: str
    parameters: dict[str, Any]
    action_type: str
    effect: Effect = EFFECT
    risk_level: RiskLevel
    requester: str
    requester_note: str | None = NOTE
    plan_hash: str
    step_hash: str
    policy_id: str
    rule: Rule
    approvals_required: int
    tier: int | None = Field(description="tier of the rule, from 0; null for a policy of format 1")
    approvers: str | None = Field(description="group whose approvals count; null: any approver, or several groups")
    quorums: list[QuorumAnswer] = Field(description="all must be met; a person in two groups counts for both")
    amount: int | None = Field(description="amount that the action moves, in `unit`; null if it has no amount")
    unit: str | None
    decisions: list[Decision]
    requested_at: str
    expires_at: str
    balance: WalletBalance | None = Field(
        description="balance of the paying wallet at the time of the request; null if no money moves"
    )


class TaskAnswer(BaseModel):
    """A task in its current state."""

    task_id: str
    status: Status
    task_type: str
    description: str
    requester: str
    requester_note: str | None = NOTE
    agent: Agent
    created_at: str
    updated_at: str
    plan_id: str | None
    current_step: int | None
    requires_approval: bool
    effect: Effect = EFFECT
    error: TaskError | None
    approval: ApprovalQuestion | None


class TaskSummary(BaseModel):
    """A task in a list; `waiting_until` is the expiry of its pending approval."""

    task_id: str
    status: Status
    task_type: str
    description: str
    requester: str
    agent: Agent
    created_at: str
    updated_at: str
    requires_approval: bool
    waiting_until: str | None


class TaskPage(BaseModel):
    """Tasks, newest first; `next_cursor` is null on the last page. Other pages may be short."""

    tasks: list[TaskSummary]
    next_cursor: str | None


Reason = Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000)]


class DecisionRequest(BaseModel):
    """A decision. The token identifies the person who decides."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    approved: bool
    reason: Reason
    plan_hash: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="hash of the plan that the person read; 409 if the plan has changed"
    )


class DecisionAnswer(BaseModel):
    """The decision is recorded. The task continues when enough people have approved."""

    task_id: str
    approved: bool
    message: str
    approvals_required: int
    approvals_given: int


class CancelRequest(BaseModel):
    """The reason for a cancellation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    reason: Reason = ""


class LifecycleAnswer(BaseModel):
    """The task's new status."""

    task_id: str
    status: Status
    message: str


class About(BaseModel):
    """Description of this API; the other fields are paths below its address."""

    service: str
    version: str
    description: str
    documentation: str
    openapi: str
    health: str


def error_of(task: Task) -> TaskError | None:
    """Return the error of a task that did not complete; None if it completed or has not ended."""
    if task.status not in TERMINAL or task.status == "completed":
        return None
    return TaskError(step_id=task.failed_step, reason=task.reason or task.status)


def question(task: Task, plan: Plan, approval: Approval) -> ApprovalQuestion:
    """Return the approval request."""
    step = plan.steps[approval.step_index]
    return ApprovalQuestion(
        step_index=approval.step_index,
        step_id=step.step_id,
        step_type=step.type,
        parameters=step.parameters,
        action_type=plan.analysis.action_type,
        effect=effect_of(step.type),
        requester_note=subject_note(task.requester),
        risk_level=plan.policy.risk_level,
        requester=task.requester,
        plan_hash=approval.plan_hash,
        step_hash=approval.step_hash,
        policy_id=approval.policy_id,
        rule=_rule(plan.policy),
        approvals_required=approval.required,
        tier=approval.terms.tier if approval.terms else None,
        approvers=_only_group(approval),
        quorums=[QuorumAnswer(approvals=quorum.approvals, approvers=quorum.approvers) for quorum in approval.quorums],
        **_amount(step, approval),
        decisions=list(approval.decisions),
        requested_at=approval.requested_at,
        expires_at=approval.expires_at,
        balance=approval.balance,
    )


def _rule(decision: PolicyDecision) -> Rule:
    """Return the pinned decision in the form of a rule of format 1, whose limits a policy of format 2 does not have."""
    if decision.format == 1:
        return decision.rule
    return Rule(
        allowed=decision.allowed,
        requires_approval=decision.requires_approval,
        risk_level=decision.risk_level,
        approvals=max(decision.approvals, 1),
        expires_after=decision.expires_after,
    )


def _only_group(approval: Approval) -> str | None:
    """Return the name of the group whose approvals are requested, if there is only one group."""
    groups = {quorum.approvers for quorum in approval.quorums}
    return groups.pop() if len(groups) == 1 else None


def _amount(step: Step, approval: Approval) -> dict[str, Any]:
    if approval.terms is not None:
        return {"amount": approval.terms.amount, "unit": approval.terms.unit}
    moves = step.type == "onchain_action"
    return {"amount": step.parameters["amount"] if moves else None, "unit": "QU" if moves else None}
