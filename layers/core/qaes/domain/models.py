"""The models of this project: task, plan, step, approval, event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from qaes.domain.canonical import hash_of
from qaes.domain.policy import PolicyDecision, RiskLevel
from qaes.domain.step_types import StepType

Status = Literal[
    "pending",
    "planning",
    "executing",
    "waiting_approval",
    "completed",
    "denied",
    "rejected",
    "expired",
    "failed",
    "cancelled",
]
TERMINAL: frozenset[str] = frozenset({"completed", "denied", "rejected", "expired", "failed", "cancelled"})
OPEN_STATUSES: tuple[Status, ...] = ("pending", "executing", "waiting_approval")
"""Statuses of a task that has not ended. No task has `planning`, which stays in the API for existing clients."""

StepStatus = Literal["pending", "running", "succeeded", "failed"]
ApprovalStatus = Literal["pending", "approved", "rejected", "expired", "cancelled"]
Outcome = Literal["completed", "denied", "rejected", "expired", "failed", "cancelled"]
RETRYABLE: frozenset[str] = frozenset({"failed", "expired"})
"""Terminal statuses that a retry can reopen."""
EventKind = Literal[
    "task_started",
    "policy_checked",
    "plan_built",
    "approval_requested",
    "approval_decided",
    "approval_reminder",
    "approval_expired",
    "approval_cancelled",
    "approval_undeliverable",
    "step_started",
    "step_executed",
    "task_retried",
    "task_ended",
]
TextOf = Literal["request", "plan", "policy", "parameters"]
"""A text of a task or its plan: `policy` is the plan's policy decision, `parameters` are the step's."""


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Analysis(Model):
    """The planner's analysis of a task."""

    action_type: str
    risk_level: RiskLevel


class Step(Model):
    """A typed step of a plan with resolved parameters, as it is hashed, shown, approved and executed."""

    step_id: str
    type: StepType
    requires_approval: bool
    parameters: dict[str, Any]

    def hash(self) -> str:
        """Return the SHA-256 of the canonical step."""
        return hash_of(self.model_dump(mode="json"))


class Plan(Model):
    """A plan; `policy` pins the version of the policy that it is based on."""

    plan_id: str
    task_id: str | None
    created_at: str
    analysis: Analysis
    policy: PolicyDecision
    steps: tuple[Step, ...]

    def hash(self) -> str:
        """Return the SHA-256 of the canonical plan."""
        return hash_of(self.model_dump(mode="json"))


class Task(Model):
    """A task; `version` guards each write, `events` counts the events, `run` the executions.

    `agent` is the client of the agent that requested the task, None if a person requested it. `retriers` are all people
    who retried it, in any run. `salt` prevents guesses of the content behind the audit entries' hashes; only the task's
    bundle discloses it.
    """

    task_id: str
    status: Status
    task_type: str
    description: str
    parameters: dict[str, Any] = {}
    requester: str
    agent: str | None = None
    retriers: tuple[str, ...] = ()
    created_at: str
    updated_at: str
    plan_id: str | None = None
    plan_hash: str | None = None
    policy_id: str | None = None
    current_step: int | None = None
    total_steps: int | None = None
    requires_approval: bool = False
    failed_step: str | None = None
    reason: str | None = None
    waiting_until: str | None = None
    waiting_since: str | None = None
    run: int = 1
    version: int = 0
    events: int = 0
    salt: str = Field(default="", repr=False)

    @property
    def execution_name(self) -> str:
        """Return the name of the task's execution: its id, from the first retry on with the run's number."""
        return self.task_id if self.run == 1 else f"{self.task_id}-{self.run}"

    def request(self) -> dict[str, Any]:
        """Return the request: the part of the task that the requester wrote, and the requester.

        Without an agent it has no member `agent`, so its hash is the same as before agents existed.
        """
        return {
            "task_id": self.task_id,
            "task_type": self.task_type,
            "description": self.description,
            "parameters": self.parameters,
            "requester": self.requester,
            **by_agent(self.agent),
        }


def by_agent(agent: str | None) -> dict[str, Any]:
    """Return the recorded member `agent`; empty if a person acted."""
    return {} if agent is None else {"agent": agent}


class StepRecord(Model):
    """The record of a step. `result` is present if it succeeded, `error` if it failed.

    `replaces` belongs to a repeated transfer: the transaction of the earlier attempt, which moved nothing. Its end is
    not the end of this attempt.
    """

    step_index: int
    step_id: str
    type: StepType
    status: StepStatus
    attempt: int
    run: int = 1
    input_hash: str
    output_hash: str | None = None
    result: dict[str, Any] | None = None
    error: str | None = None
    started_at: str
    duration_ms: int | None = None
    replaces: str | None = None

    def may_run(self, task: Task) -> bool:
        """Return whether the step may be attempted: it is unfinished, or it failed before a retry."""
        return self.status == "running" or (self.status == "failed" and self.run < task.run)


class WalletBalance(Model):
    """A wallet's balance in QU at a tick; `available` excludes the amounts of its transfers in flight."""

    balance: int
    available: int
    tick: int


class Decision(Model):
    """A person's decision, and its time."""

    subject: str
    approved: bool
    reason: str
    decided_at: str


class Quorum(Model):
    """The number of required approvals: from members of the group `approvers`, or from any approvers without a group.

    `members` are the members of the group at the time of the request.
    """

    approvals: int
    approvers: str | None = None
    members: tuple[str, ...] | None = None

    def counts(self, subject: str) -> bool:
        """Return whether a decision of this person counts."""
        return self.members is None or subject in self.members

    def given(self, decisions: Sequence[Decision]) -> int:
        """Return how many of the people who count have approved."""
        return len({decision.subject for decision in decisions if decision.approved and self.counts(decision.subject)})

    def is_met(self, decisions: Sequence[Decision]) -> bool:
        """Return whether enough of these people have approved."""
        return self.given(decisions) >= self.approvals


class Terms(Model):
    """The terms of an approval under a policy of format 2: the required approvals, and the tier.

    All `quorums` must be met; a person in several groups counts for each. `tier` is the index in the pinned
    policy's rule. `escalate_to` is the group to notify `escalate_after` seconds after the request.
    """

    quorums: tuple[Quorum, ...]
    tier: int | None = None
    amount: int | None = None
    unit: str | None = None
    escalate_after: int | None = None
    escalate_to: str | None = None

    @property
    def required(self) -> int:
        """Return the largest number of approvals of a quorum."""
        return max(quorum.approvals for quorum in self.quorums)


class Approval(Model):
    """A request for approval, bound to the hashes of the plan and of the step.

    `required` people must approve; one rejection ends it. `run` is the requesting execution of the task. `balance` is
    the paying wallet's balance right before the request. It is shown, and no rule uses it. A policy of format 1
    requests an approval without `terms`: any approvers count.
    """

    step_index: int
    round: int
    run: int = 1
    status: ApprovalStatus
    required: int = 1
    decisions: tuple[Decision, ...] = ()
    plan_hash: str
    step_hash: str
    policy_id: str
    requested_at: str
    expires_at: str
    reminded_at: str | None = None
    balance: WalletBalance | None = None
    terms: Terms | None = None

    @model_serializer(mode="wrap")
    def _without_absent_terms(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # An approval of format 1 is stored without terms, as in earlier releases.
        fields: dict[str, Any] = serialize(self)
        if self.terms is None:
            fields.pop("terms", None)
        return fields

    @property
    def decided_by(self) -> str | None:
        """The person who made the last decision."""
        return self.decisions[-1].subject if self.decisions else None

    @property
    def reason(self) -> str | None:
        """The reason of the last decision."""
        return self.decisions[-1].reason if self.decisions else None

    @property
    def quorums(self) -> tuple[Quorum, ...]:
        """The required quorums; without terms, any approvers."""
        return self.terms.quorums if self.terms else (Quorum(approvals=self.required),)

    @property
    def is_met(self) -> bool:
        """Return whether every quorum has its approvals."""
        return all(quorum.is_met(self.decisions) for quorum in self.quorums)

    def is_too_little(self, quorums: Sequence[Quorum]) -> bool:
        """Return whether it was approved, but does not meet the quorums that are required now.

        A rejection is never requested again.
        """
        return self.status == "approved" and not all(quorum.is_met(self.decisions) for quorum in quorums)

    def may_be_decided_by(self, subject: str) -> bool:
        """Return whether a decision of this person counts for a quorum."""
        return any(quorum.counts(subject) for quorum in self.quorums)


class Event(Model):
    """An event of a task; it becomes the audit entry with the same number.

    `input` and `output` are canonical JSON. Their hashes, with the task's salt, are in the entry, and the task's bundle
    discloses the values. `input_of` and `output_of` name a text of the task or its plan, which is stored only there.
    """

    kind: EventKind
    actor: str
    status: str
    input_hash: str
    output_hash: str
    timestamp: str
    step_index: int = -1
    step_id: str = ""
    step_type: str = ""
    plan_hash: str = ""
    policy_id: str = ""
    input: str = ""
    output: str = ""
    input_of: TextOf | Literal[""] = ""
    output_of: TextOf | Literal[""] = ""
