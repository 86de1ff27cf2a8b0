"""The bodies of the gateway's requests and answers, and how an answer shows a task."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from qaes.domain.models import TERMINAL, Approval, Decision, Plan, Status, Step, Task, WalletBalance
from qaes.domain.planning import Effect, effect_of
from qaes.domain.policy import PolicyDecision, RiskLevel, Rule
from qaes.domain.text import subject_note

Agent = Annotated[
    str | None, Field(description="the client of the agent that asked for the task; null when a person did")
]


class StartAnswer(BaseModel):
    """The task is recorded; it runs by itself."""

    task_id: str
    status: Status
    message: str


class TaskError(BaseModel):
    """Why a task did not complete, and at which step."""

    step_id: str | None
    reason: str


EFFECT = Field(description="of the action when it completes; `recorded only`: the system performs nothing")
NOTE = Field(description="names the letters of the requester that are outside ASCII: they may look like others")


class QuorumAnswer(BaseModel):
    """How many people must approve, and of which group; `approvers` is null where any approvers count."""

    approvals: int
    approvers: str | None


class ApprovalQuestion(BaseModel):
    """What people are asked to approve: exactly what the hashes stand for, and nothing else, will run."""

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
    tier: int | None = Field(description="of the rule, counted from 0; null for a policy of format 1")
    approvers: str | None = Field(description="the group whose approvals count; null: any approvers, or several groups")
    quorums: list[QuorumAnswer] = Field(description="each must be met; a person in two groups counts for both")
    amount: int | None = Field(description="what the action moves, in `unit`; null where it has no amount")
    unit: str | None
    decisions: list[Decision]
    requested_at: str
    expires_at: str
    balance: WalletBalance | None = Field(
        description="of the wallet that is to pay, when the approval was requested; null where no money moves"
    )


class TaskAnswer(BaseModel):
    """A task as it stands."""

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
    """A task in a list; `waiting_until` is when the approval that it waits for expires."""

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
    """Tasks, newest first; with `next_cursor`, unless this is the last page. A page before it may be short."""

    tasks: list[TaskSummary]
    next_cursor: str | None


Reason = Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000)]


class DecisionRequest(BaseModel):
    """A decision. Who decides is told by the token alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    approved: bool
    reason: Reason
    plan_hash: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="the plan that was looked at; 409 if it is another by now"
    )


class DecisionAnswer(BaseModel):
    """The decision is recorded; the task goes on when enough people have approved."""

    task_id: str
    approved: bool
    message: str
    approvals_required: int
    approvals_given: int


class CancelRequest(BaseModel):
    """Why a task is cancelled."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    reason: Reason = ""


class LifecycleAnswer(BaseModel):
    """The task's status from now on."""

    task_id: str
    status: Status
    message: str


class About(BaseModel):
    """What this API is; the other fields are paths below its address."""

    service: str
    version: str
    description: str
    documentation: str
    openapi: str
    health: str


def error_of(task: Task) -> TaskError | None:
    """Return why a task did not complete; None if it did, or has not ended."""
    if task.status not in TERMINAL or task.status == "completed":
        return None
    return TaskError(step_id=task.failed_step, reason=task.reason or task.status)


def question(task: Task, plan: Plan, approval: Approval) -> ApprovalQuestion:
    """Return what people are asked to approve."""
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
        quorums=[QuorumAnswer(approvals=each.approvals, approvers=each.approvers) for each in approval.quorums],
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
    """Return the name of the group whose approvals are requested, if all are of one group."""
    groups = {quorum.approvers for quorum in approval.quorums}
    return groups.pop() if len(groups) == 1 else None


def _amount(step: Step, approval: Approval) -> dict[str, Any]:
    if approval.terms is not None:
        return {"amount": approval.terms.amount, "unit": approval.terms.unit}
    moves = step.type == "onchain_action"
    return {"amount": step.parameters["amount"] if moves else None, "unit": "QU" if moves else None}
