"""Read-only explanations of the policy's decisions: `POST /policy/decide`, `GET /actions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI
from pydantic import BaseModel, ConfigDict, Field

from qaes.adapters import settings
from qaes.adapters.http import EVERY_ROLE, Caller
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.limits import LimitsTable
from qaes.domain import planning, suspensions
from qaes.domain.errors import ForbiddenError, InvalidInputError
from qaes.domain.ids import now, timestamp
from qaes.domain.models import Quorum, Task
from qaes.domain.policy import ACTION_TYPE_PATTERN, TRANSFER_ACTION, Decision, Policy, requirement_over
from qaes.domain.policy.actions import TASK_TYPES
from qaes.domain.policy.describing import ActionDescription, LimitState, describe_actions, limit_state
from qaes.domain.policy.rules import RiskLevel
from qaes.domain.requests import TaskRequest, check_destination
from qaes.domain.ruling import Ruling, Usage, refusal_by_people, rule
from qaes.domain.text import MAX_SUBJECT_LENGTH, normal_subject

_TASK_TYPE_OF = {action: task_type for task_type, action in TASK_TYPES.items()}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DecideRequest(_Model):
    """A request to explain: the caller's own, unless it names another requester or an agent."""

    action: str = Field(pattern=ACTION_TYPE_PATTERN, description="an action, or the type of a task that requests it")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="parameters of the task (`wallet_address`, `to_address`, `amount`)"
    )
    requester: str | None = Field(
        None, min_length=1, max_length=MAX_SUBJECT_LENGTH, description="another subject; for operators and auditors"
    )
    agent: str | None = Field(
        None, min_length=1, max_length=128, description="requesting agent's client; for operators and auditors"
    )
    version: int | None = Field(
        None, ge=1, lt=10**9, strict=True, description="a version of the policy, a proposal too; null: the one in force"
    )


class NeededApprovals(_Model):
    """Approvals that the request needs."""

    approvals: int
    approvers: str | None = Field(description="group of the approvers; null: any approver")
    eligible: int | None = Field(
        description="number of people who can give them, without the requester; null: any approver"
    )


class DecideAnswer(_Model):
    """The policy's decision on the request. Balances and people's decisions do not count here."""

    policy_id: str
    version: int
    status: str = Field(description="status of the version, such as `in_force` or `proposed`")
    action: str
    requester: str
    agent: str | None
    decision: Literal["execute", "await_approval", "denied"]
    code: str = Field(description="`allowed`, or a stable word for the reason of a denial")
    reason: str
    risk_level: RiskLevel
    tier: int | None = Field(description="index of the rule's tier that applies; null without a tier")
    approvals: list[NeededApprovals] = Field(description="required approvals, all of them")
    signature: bool
    expires_after: int | None
    escalate_after: int | None
    escalate_to: str | None
    amount: int | None
    unit: str | None
    destination: str | None
    source: str | None
    limits: list[LimitState] = Field(description="each limit of the rule, and the room in its window now")
    suspended: bool


class ActionsAnswer(_Model):
    """The actions of the policy in force, as the caller sees them."""

    policy_id: str
    version: int
    suspended: list[str] = Field(description="names of suspended actions; `*` means every action")
    actions: list[ActionDescription]


def explain_decision(body: DecideRequest, caller: Annotated[Caller, Depends(EVERY_ROLE)]) -> DecideAnswer:
    """Explain the policy's decision on a request: the tier, the approvals, the room in each limit, and the reason.

    This writes nothing and requests no approval. Only operators and auditors can explain another person's request.
    """
    requester, agent = _asking(body, caller)
    ledger, action = LedgerClient(), planning.action_type(body.action)
    policies = ledger.policies(action)
    status, policy = "in_force", policies.current
    if body.version is not None:
        status, whole = ledger.policy_version(body.version)
        policy = whole.reduced(action)
    parameters = _resolved(body, policy, action)
    ruling = rule(_task(action, parameters, requester, agent), policy, policy)
    usage = _usage(ledger, ruling.current, parameters, requester, agent, body.version)
    quorums = ruling.quorums(usage)
    suspension = suspensions.refusal(action, policies.suspended)
    code, reason = _refusal(ruling, quorums, usage, suspension) or ("allowed", _reason(ruling.current, usage))
    decided = ruling.current
    return DecideAnswer(
        policy_id=policy.policy_id,
        version=policy.version,
        status=status,
        action=action,
        requester=requester,
        agent=agent,
        decision="denied" if code != "allowed" else "await_approval" if quorums else "execute",
        code=code,
        reason=reason,
        risk_level=decided.risk_level,
        tier=decided.tier,
        approvals=[_needed(quorum) for quorum in quorums],
        signature=decided.signature,
        expires_after=decided.expires_after,
        escalate_after=decided.escalate_after,
        escalate_to=decided.escalate_to,
        amount=decided.amount,
        unit=decided.unit if decided.amount is not None else None,
        destination=decided.destination,
        source=decided.source,
        limits=[limit_state(use, usage.get(use.key, 0)) for use in decided.limits],
        suspended=suspension is not None,
    )


def get_actions(caller: Annotated[Caller, Depends(EVERY_ROLE)]) -> ActionsAnswer:
    """List the built-in actions and those of the policy in force, with the caller's requirements."""
    ledger = LedgerClient()
    policy, suspended = ledger.policy(), ledger.suspensions()
    described = describe_actions(policy, requester=caller.subject, agent=caller.agent)
    if not caller.has("requester"):
        no_role = {"may_request": False, "reason": "this needs the role requester"}
        described = [each.model_copy(update=no_role) for each in described]
    return ActionsAnswer(
        policy_id=policy.policy_id, version=policy.version, suspended=sorted(suspended), actions=described
    )


def add_explaining_routes(app: FastAPI) -> None:
    """Add these routes to the service's application."""
    app.post("/policy/decide")(explain_decision)
    app.get("/actions")(get_actions)


def _asking(body: DecideRequest, caller: Caller) -> tuple[str, str | None]:
    """Return the requester and the agent of the request.

    Raises
    ------
    ForbiddenError
        It is another one's, and the caller is neither an operator nor an auditor.
    InvalidInputError
        The requester is not a subject.
    """
    if body.requester is None and body.agent is None:
        return caller.subject, caller.agent
    try:
        requester = caller.subject if body.requester is None else normal_subject(body.requester)
    except ValueError as error:
        raise InvalidInputError(str(error), field="requester") from error
    agent = body.agent or (caller.agent if requester == caller.subject else None)
    if (requester, agent) != (caller.subject, caller.agent) and not caller.has("auditor"):
        raise ForbiddenError("only operators and auditors can explain the request of another requester or agent")
    return requester, agent


def _resolved(body: DecideRequest, policy: Policy, action: str) -> dict[str, Any]:
    """Check the parameters as the start of a task does. Raises InvalidInputError."""
    task_type = _TASK_TYPE_OF.get(body.action, body.action)
    request = TaskRequest(task_type=task_type, description="to explain", parameters=body.parameters)
    parameters = request.resolved(settings.text("QUBIC_NETWORK"), operators=action in policy.actions)
    check_destination(policy, action, parameters)
    return parameters


def _task(action: str, parameters: dict[str, Any], requester: str, agent: str | None) -> Task:
    moment = timestamp(now())
    return Task(
        task_id="",
        status="pending",
        task_type=_TASK_TYPE_OF.get(action, action),
        description="to explain",
        parameters=parameters,
        requester=requester,
        agent=agent,
        created_at=moment,
        updated_at=moment,
    )


def _usage(
    ledger: LedgerClient,
    decision: Decision,
    parameters: dict[str, Any],
    requester: str,
    agent: str | None,
    version: int | None,
) -> Usage:
    """Read the usage of the limits, from the ledger for transfers, otherwise from LimitsTable."""
    if not decision.limits:
        return {}
    if decision.action == TRANSFER_ACTION:
        return ledger.limits_used(parameters, requester=requester, agent=agent, version=version)
    return {use.limit.key: use.used for use in LimitsTable().read(decision.limits)}


def _refusal(
    ruling: Ruling, quorums: tuple[Quorum, ...], usage: Usage, suspension: str | None
) -> tuple[str, str] | None:
    """Return code and reason of a denial; None if the request is not denied."""
    decided = ruling.current
    if not decided.allowed:
        return decided.code, decided.reason
    for refusal in (ruling.flaw, refusal_by_people(quorums, decided.policy_id), suspension):
        if refusal is not None:
            code, _, reason = refusal.partition(": ")
            return code, reason
    if (refusal := ruling.refusal_by_usage(usage)) is not None:
        code, _, reason = refusal.partition(": ")
        return code, reason
    return None


def _reason(decision: Decision, usage: Usage) -> str:
    """Return the text about the tier that applies, and the limits that the request exceeds with approvals."""
    over = [
        limit_state(use, usage.get(use.key, 0)).words
        for use in decision.limits
        if requirement_over(use, used=usage.get(use.key, 0)) is not None
    ]
    return "; ".join([decision.reason, *over])


def _needed(quorum: Quorum) -> NeededApprovals:
    eligible = None if quorum.members is None else len(quorum.members)
    return NeededApprovals(approvals=quorum.approvals, approvers=quorum.approvers, eligible=eligible)
