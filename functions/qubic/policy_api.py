"""HTTP API of the policy: the policy in force, its versions, proposals and their approval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Body, Depends, FastAPI, Path, Query
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, StringConstraints, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from qaes.adapters import settings
from qaes.adapters.http import EVERY_ROLE, Caller, require
from qaes.adapters.strict_input import accepts_bytes
from qaes.domain.planning import RECORDED_ONLY, Effect, action_step, effect_of
from qaes.domain.policy import (
    DENIED,
    MAX_RULES,
    POLICY_ID_PATTERN,
    ActionRule,
    ActionType,
    PolicyDifference,
    Rule,
    normalised,
    read_document,
)
from qaes.domain.policy.document import MAX_ACTIONS, MAX_DOCUMENT_V2_BYTES, MAX_GROUPS, Actions, Groups
from qubic import suspension_api
from qubic.policy.lifecycle import Policies
from qubic.policy.versions import PolicyVersion
from qubic.suspension_api import SuspendedAction

Operator = Annotated[Caller, Depends(require("operator", deciding=True))]
Version = Annotated[int, Path(ge=1, lt=10**9)]


MAX_PROPOSAL_BYTES = 2 * MAX_DOCUMENT_V2_BYTES
"""Of the body of a proposal: JSON with escapes and line breaks is longer than the canonical text of the document."""
MAX_REMOVED = MAX_RULES + MAX_GROUPS + MAX_ACTIONS


AnyRules = Annotated[dict[ActionType, Rule | ActionRule], Field(max_length=MAX_RULES)]


@dataclass(frozen=True)
class Described:
    """Documents a field of JSON by a type, which the domain checks: its errors name the part that is wrong."""

    type_: Any

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the JSON schema of the type."""
        return handler(TypeAdapter(self.type_).core_schema)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = Field(description="network that responds; transactions of `mock` are not on the real network")


class RuleAnswer(_Answer):
    """The rule for one action type."""

    policy_id: str
    action_type: str
    allowed: bool
    requires_approval: bool = Field(description="in format 2: whether any tier of the rule requires approvals")
    rules: Rule | ActionRule
    effect: Effect = Field(description="effect of a task of this type; `recorded only`: the system performs nothing")
    suspended: list[SuspendedAction] = Field(description="this action, `*`, both or none")


class PolicyAnswer(_Answer):
    """Every rule of the policy in force."""

    policy_id: str
    version: int
    format: Literal[1, 2]
    rules: dict[str, Rule | ActionRule]
    recorded_only: list[str] = Field(description="action types that the system records, and does not perform")
    suspended: list[SuspendedAction] = Field(description="suspended actions, which the rules do not show")


class PolicyVersionAnswer(PolicyVersion):
    """A version of the policy, and its status."""

    network: str


class PolicyProposalAnswer(PolicyVersionAnswer):
    """A version of the policy, and its changes."""

    difference: PolicyDifference | None = Field(
        description="changes from the version that it is based on; null if an altered text cannot be read"
    )


class PolicyDocumentAnswer(PolicyProposalAnswer):
    """A version of the policy, with its document.

    `text` is the document to the letter, whose SHA-256 is `hash`. Definitions of actions name their handlers, so
    callers with the role requester alone get null instead of a document or a difference that has any.
    """

    text: str | None


class PolicyVersionsAnswer(_Answer):
    """Versions, newest first; `next_before` is null on the last page."""

    versions: list[PolicyVersion]
    next_before: int | None


class PolicyRequest(BaseModel):
    """All rules of a new version. Other actions are denied; `remove` must name those that had a rule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    based_on: str = Field(
        pattern=POLICY_ID_PATTERN, description="policy in force that the proposal is based on; 409 if it has changed"
    )
    rules: Annotated[dict[str, Any], Described(AnyRules)] = Field(description="by action type; all of one format")
    groups: Annotated[dict[str, Any] | None, Described(Groups | None)] = None
    actions: Annotated[dict[str, Any] | None, Described(Actions | None)] = None
    remove: list[ActionType] = Field(
        default_factory=list,
        max_length=MAX_REMOVED,
        description="items that the new version drops: each must be named here",
    )


class RejectRequest(BaseModel):
    """The reason for a rejection."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    reason: Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000)] = ""


def policies() -> Policies:
    """Create the policy store."""
    from qubic import wiring

    return wiring.policies()


def get_policy(
    action_type: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
) -> RuleAnswer | PolicyAnswer:
    """Return the rule for an action type, or every rule. An action type without a rule is denied."""
    store = policies()
    policy = store.in_force()
    if action_type is None:
        recorded = [name for name in policy.rules if effect_of(action_step(name)) == RECORDED_ONLY]
        return PolicyAnswer(
            network=store.network,
            policy_id=policy.policy_id,
            version=policy.version,
            format=policy.format,
            rules=dict(policy.rules),
            recorded_only=recorded,
            suspended=[SuspendedAction.of(each) for each in suspension_api.suspending().suspended()],
        )
    rule = policy.rules.get(action_type, DENIED)
    tiers = normalised(action_type, rule).tiers if isinstance(rule, Rule) else rule.tiers
    return RuleAnswer(
        network=store.network,
        policy_id=policy.policy_id,
        action_type=action_type,
        allowed=rule.allowed,
        requires_approval=any(tier.approvals for tier in tiers),
        rules=rule,
        effect=effect_of(action_step(action_type)),
        suspended=[SuspendedAction.of(each) for each in suspension_api.suspending().suspended(action_type)],
    )


def has_actions(text: str) -> bool:
    """Whether a document defines actions, and so names their handlers. One that cannot be read is taken to do so."""
    try:
        return bool(getattr(read_document(text), "actions", None))
    except ValueError:
        return True


def get_policy_versions(
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before: Annotated[int | None, Query(ge=1, lt=10**9, description="only versions before this one")] = None,
) -> PolicyVersionsAnswer:
    """List every version of the policy, newest first."""
    store = policies()
    found = store.list(limit, before)
    more = len(found) == limit and found[-1].version > 1
    return PolicyVersionsAnswer(network=store.network, versions=found, next_before=found[-1].version if more else None)


def get_policy_version(version: Version, caller: Annotated[Caller, Depends(EVERY_ROLE)]) -> PolicyDocumentAnswer:
    """Return a version of the policy with its document and status."""
    store = policies()
    found, text = store.read(version)
    changes = store.difference(version)
    if not caller.has("approver", "auditor"):
        hidden = has_actions(text)
        if hidden or (changes is not None and changes.actions.removed):
            shown = None if hidden else text
            return PolicyDocumentAnswer(network=store.network, text=shown, difference=None, **dict(found))
    return PolicyDocumentAnswer(network=store.network, text=text, difference=changes, **dict(found))


@accepts_bytes(MAX_PROPOSAL_BYTES)
def propose_policy(body: PolicyRequest, caller: Operator) -> PolicyProposalAnswer:
    """Propose a new version of the policy, for another operator to approve. Operators only."""
    store = policies()
    proposed = store.propose(
        body.rules,
        groups=body.groups,
        actions=body.actions,
        subject=caller.subject,
        based_on=body.based_on,
        remove=body.remove,
        function_prefix=settings.text("ACTION_FUNCTION_PREFIX"),
    )
    changes = store.difference(proposed.version)
    return PolicyProposalAnswer(network=store.network, difference=changes, **dict(proposed))


def approve_policy(version: Version, caller: Operator) -> PolicyVersionAnswer:
    """Approve another operator's proposal. It is in force as soon as its hash is confirmed on the ledger."""
    store = policies()
    approved = store.approve(version, subject=caller.subject, four_eyes=caller.four_eyes)
    return PolicyVersionAnswer(network=store.network, **dict(approved))


def reject_policy(
    version: Version, caller: Operator, body: Annotated[RejectRequest | None, Body()] = None
) -> PolicyVersionAnswer:
    """Reject a proposal, or withdraw your own."""
    store = policies()
    rejected = store.reject(version, subject=caller.subject, reason=body.reason if body else "")
    return PolicyVersionAnswer(network=store.network, **dict(rejected))


def add_policy_routes(app: FastAPI) -> None:
    """Add these routes to the service's application."""
    anybody: Any = [Depends(EVERY_ROLE)]
    app.get("/policy", dependencies=anybody)(get_policy)
    app.get("/policy/versions", dependencies=anybody)(get_policy_versions)
    app.get("/policy/versions/{version}")(get_policy_version)
    app.post("/policy", status_code=201)(propose_policy)
    app.post("/policy/versions/{version}/approve")(approve_policy)
    app.post("/policy/versions/{version}/reject")(reject_policy)
