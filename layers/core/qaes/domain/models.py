"""The words of this project: task, plan, step, approval, event."""

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
"""The statuses of a task that has not ended. No task has `planning`, which stays in the API for its clients."""

StepStatus = Literal["pending", "running", "succeeded", "failed"]
ApprovalStatus = Literal["pending", "approved", "rejected", "expired", "cancelled"]
Outcome = Literal["completed", "denied", "rejected", "expired", "failed", "cancelled"]
RETRYABLE: frozenset[str] = frozenset({"failed", "expired"})
"""The ends that a retry takes back."""
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
"""A text of a task or its plan: the policy is the plan's decision by it, the parameters are the step's."""


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Analysis(Model):
    """What the planner made of a task's words."""

    action_type: str
    risk_level: RiskLevel


class Step(Model):
    """One typed step of a plan, its parameters resolved: what is hashed, shown, approved and executed."""

    step_id: str
    type: StepType
    requires_approval: bool
    parameters: dict[str, Any]

    def hash(self) -> str:
        """SHA-256 of the canonical step."""
        return hash_of(self.model_dump(mode="json"))


class Plan(Model):
    """A plan; `policy` pins the policy's version under which it was made."""

    plan_id: str
    task_id: str | None
    created_at: str
    analysis: Analysis
    policy: PolicyDecision
    steps: tuple[Step, ...]

    def hash(self) -> str:
        """SHA-256 of the canonical plan."""
        return hash_of(self.model_dump(mode="json"))


class Task(Model):
    """A task as its item has it; `version` guards each write, `events` counts the events, `run` the executions.

    `agent` is the client of the agent that asked for the task, None when a person did. `retriers` are all the people
    who have retried it, in any run. `salt` keeps what the task's audit entries hash from being guessed; only the task's
    bundle shows it.
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
        """The name of the task's execution: its id, and from the first retry on with the run's number."""
        return self.task_id if self.run == 1 else f"{self.task_id}-{self.run}"

    def request(self) -> dict[str, Any]:
        """What was asked for: the part of the task that the requester wrote, and who they are.

        Without an agent it has no member `agent`: its hash is that of the time before there were any.
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
    """The member `agent` of what is recorded: there is none when a person has done it."""
    return {} if agent is None else {"agent": agent}


class StepRecord(Model):
    """What happened to a step. `result` is there when it succeeded, `error` when it failed.

    `replaces` is, for a transfer that is attempted anew, the transaction of the attempt before, which moved nothing:
    its end is not this one's.
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
        """Whether it may be attempted: it was not finished, or it failed in an execution before a retry."""
        return self.status == "running" or (self.status == "failed" and self.run < task.run)


class WalletBalance(Model):
    """What a wallet holds, in QU, as of a tick; `available` is what is not promised to its transfers in flight."""

    balance: int
    available: int
    tick: int


class Decision(Model):
    """What one person decided, and when."""

    subject: str
    approved: bool
    reason: str
    decided_at: str


class Quorum(Model):
    """How many people must approve: members of the group `approvers`, or any approvers if there is no group.

    `members` are the people of the group who count, as they were when the approval was requested.
    """

    approvals: int
    approvers: str | None = None
    members: tuple[str, ...] | None = None

    def counts(self, subject: str) -> bool:
        """Whether a decision of this person counts."""
        return self.members is None or subject in self.members

    def is_met(self, decisions: Sequence[Decision]) -> bool:
        """Whether enough of the people who count have approved."""
        given = {decision.subject for decision in decisions if decision.approved and self.counts(decision.subject)}
        return len(given) >= self.approvals


class Terms(Model):
    """What a policy of format 2 requests an approval for: who must approve, and the tier that applies.

    `quorums` must all be met; a person in several of the groups counts for each. `tier` is the index in the pinned
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
        """The most approvals that one of the quorums needs."""
        return max(quorum.approvals for quorum in self.quorums)


class Approval(Model):
    """People were asked. Bound to the hashes of the plan and of the step.

    `required` people have to approve; one rejection ends it. `run` is the task's execution that asks. `balance` is that
    of the wallet that is to pay, as it was read right before; it is shown, and nothing is bound to it. A policy of
    format 1 requests an approval without `terms`: any approvers count.
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
        # An approval of format 1 is stored as it was before there were terms.
        fields: dict[str, Any] = serialize(self)
        if self.terms is None:
            fields.pop("terms", None)
        return fields

    @property
    def decided_by(self) -> str | None:
        """Who made the last decision."""
        return self.decisions[-1].subject if self.decisions else None

    @property
    def reason(self) -> str | None:
        """What the last decision gave as its reason."""
        return self.decisions[-1].reason if self.decisions else None

    @property
    def quorums(self) -> tuple[Quorum, ...]:
        """Who must approve: without terms, any approvers."""
        return self.terms.quorums if self.terms else (Quorum(approvals=self.required),)

    @property
    def is_met(self) -> bool:
        """Whether every quorum has its approvals."""
        return all(quorum.is_met(self.decisions) for quorum in self.quorums)

    def is_too_little(self, quorums: Sequence[Quorum]) -> bool:
        """Whether it is a yes that does not meet the quorums that are required by now.

        A no is never asked about again.
        """
        return self.status == "approved" and not all(quorum.is_met(self.decisions) for quorum in quorums)

    def may_be_decided_by(self, subject: str) -> bool:
        """Whether a decision of this person counts for one of the quorums."""
        return any(quorum.counts(subject) for quorum in self.quorums)


class Event(Model):
    """Something that happened to a task; becomes the audit entry with the same number.

    `input` and `output` are the canonical JSON of what the two hashes are over, with the task's salt: the entry has the
    hashes, and the task's bundle discloses the values. `input_of` and `output_of` name a text that the task or its plan
    has as well, which is stored there alone.
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
