"""The policy over HTTP: what is in force, its versions, and how one operator proposes and another approves."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Path, Query
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from qaes.adapters.http import EVERY_ROLE, Caller, require
from qaes.domain.planning import RECORDED_ONLY, Effect, action_step, effect_of
from qaes.domain.policy import MAX_RULES, POLICY_ID_PATTERN, ActionRule, ActionType, PolicyDifference, Rule, Rules
from qubic import suspension_api
from qubic.policy.lifecycle import Policies
from qubic.policy.versions import PolicyVersion
from qubic.suspension_api import SuspendedAction

Operator = Annotated[Caller, Depends(require("operator", deciding=True))]
Version = Annotated[int, Path(ge=1, lt=10**9)]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = Field(description="the network that answers; nothing of `mock` is on the real one")


class RuleAnswer(_Answer):
    """The rule for one action type."""

    policy_id: str
    action_type: str
    allowed: bool
    requires_approval: bool
    rules: Rule
    effect: Effect = Field(description="of a task of this type; `recorded only`: the system performs nothing")
    suspended: list[SuspendedAction] = Field(description="this action, `*`, both or none")


class PolicyAnswer(_Answer):
    """Every rule of the policy in force."""

    policy_id: str
    version: int
    rules: dict[str, Rule | ActionRule]
    recorded_only: list[str] = Field(description="action types that the system records, and does not perform")
    suspended: list[SuspendedAction] = Field(description="the suspended actions, which the rules do not show")


class PolicyVersionAnswer(PolicyVersion):
    """A version of the policy, and what became of it."""

    network: str


class PolicyProposalAnswer(PolicyVersionAnswer):
    """A version of the policy, and what it changes."""

    difference: PolicyDifference | None = Field(
        description="from the version that it is based on; null when a text that was altered cannot be read"
    )


class PolicyDocumentAnswer(PolicyProposalAnswer):
    """A version of the policy; `text` is its document to the letter, whose SHA-256 is `hash`."""

    text: str


class PolicyVersionsAnswer(_Answer):
    """Versions, newest first; with `next_before`, unless these are the last."""

    versions: list[PolicyVersion]
    next_before: int | None


class PolicyRequest(BaseModel):
    """A new version: all of its rules. What is not among them is denied, and named in `remove` if it had a rule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    based_on: str = Field(
        pattern=POLICY_ID_PATTERN, description="the policy in force that was looked at; 409 if it is another by now"
    )
    rules: Rules
    remove: list[ActionType] = Field(
        default_factory=list,
        max_length=MAX_RULES,
        description="the rules of the policy in force that `rules` drops: each must be named here",
    )


class RejectRequest(BaseModel):
    """Why a proposal is rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    reason: Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000)] = ""


def policies() -> Policies:
    """Make the policy's store."""
    from qubic import wiring

    return wiring.policies()


def get_policy(
    action_type: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
) -> RuleAnswer | PolicyAnswer:
    """The rule for an action type (without one it is denied), or every rule."""
    it = policies()
    policy = it.in_force()
    if action_type is None:
        recorded = [name for name in policy.rules if effect_of(action_step(name)) == RECORDED_ONLY]
        return PolicyAnswer(
            network=it.network,
            policy_id=policy.policy_id,
            version=policy.version,
            rules=dict(policy.rules),
            recorded_only=recorded,
            suspended=[SuspendedAction.of(each) for each in suspension_api.suspending().suspended()],
        )
    decision = policy.decide(action_type)
    return RuleAnswer(
        network=it.network,
        policy_id=policy.policy_id,
        action_type=action_type,
        allowed=decision.allowed,
        requires_approval=decision.requires_approval,
        rules=decision.rule,
        effect=effect_of(action_step(action_type)),
        suspended=[SuspendedAction.of(each) for each in suspension_api.suspending().suspended(action_type)],
    )


def get_policy_versions(
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before: Annotated[int | None, Query(ge=1, lt=10**9, description="only versions before this one")] = None,
) -> PolicyVersionsAnswer:
    """Every version of the policy, newest first."""
    it = policies()
    found = it.list(limit, before)
    more = len(found) == limit and found[-1].version > 1
    return PolicyVersionsAnswer(network=it.network, versions=found, next_before=found[-1].version if more else None)


def get_policy_version(version: Version) -> PolicyDocumentAnswer:
    """A version of the policy: its document, and what became of it."""
    it = policies()
    found, text = it.read(version)
    return PolicyDocumentAnswer(network=it.network, text=text, difference=it.difference(version), **dict(found))


def propose_policy(body: PolicyRequest, caller: Operator) -> PolicyProposalAnswer:
    """Propose a new version of the policy, for another operator to approve. Operators only."""
    it = policies()
    proposed = it.propose(body.rules, subject=caller.subject, based_on=body.based_on, remove=body.remove)
    changes = it.difference(proposed.version)
    return PolicyProposalAnswer(network=it.network, difference=changes, **dict(proposed))


def approve_policy(version: Version, caller: Operator) -> PolicyVersionAnswer:
    """Approve another operator's proposal: it is in force once its hash is confirmed on the ledger."""
    it = policies()
    approved = it.approve(version, subject=caller.subject, four_eyes=caller.four_eyes)
    return PolicyVersionAnswer(network=it.network, **dict(approved))


def reject_policy(
    version: Version, caller: Operator, body: Annotated[RejectRequest | None, Body()] = None
) -> PolicyVersionAnswer:
    """Reject a proposal, or withdraw one's own."""
    it = policies()
    rejected = it.reject(version, subject=caller.subject, reason=body.reason if body else "")
    return PolicyVersionAnswer(network=it.network, **dict(rejected))


def add_policy_routes(app: FastAPI) -> None:
    """Give the service's application these routes."""
    anybody: Any = [Depends(EVERY_ROLE)]
    app.get("/policy", dependencies=anybody)(get_policy)
    app.get("/policy/versions", dependencies=anybody)(get_policy_versions)
    app.get("/policy/versions/{version}", dependencies=anybody)(get_policy_version)
    app.post("/policy", status_code=201)(propose_policy)
    app.post("/policy/versions/{version}/approve")(approve_policy)
    app.post("/policy/versions/{version}/reject")(reject_policy)
