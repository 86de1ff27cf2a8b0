"""Evaluation of one request by a policy: one evaluator for both formats.

The planner, the compliance agent, the gateway, the ledger, explain, replay and `python -m qaes.policy` all call
`evaluate`. It reads only its arguments. Its caller compares the usage of a limit's window, with
`qaes.domain.limits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qaes.domain.canonical import sha256_hex
from qaes.domain.errors import InvalidInputError, PermanentError
from qaes.domain.policy.actions import Action, BuiltIn, action_of, pointed
from qaes.domain.policy.document import Policy
from qaes.domain.policy.names import MAX_INTEGER, TRANSFER_ACTION
from qaes.domain.policy.rules import ActionRule, Counts, Limit, Per, PolicyDecision, RiskLevel
from qaes.domain.qubic.demo import wallet_identity
from qaes.domain.qubic.identity import check_address
from qaes.domain.text import same_subject

Code = Literal[
    "allowed",
    "not_allowed",
    "unknown_action",
    "requester_not_allowed",
    "invalid_amount",
    "over_max_amount",
    "address_not_allowed",
    "destination_not_allowed",
    "missing_source",
    "missing_destination",
    "daily_limit_exceeded",
    "limit_exceeded",
    "invalid_parameters",
]


@dataclass(frozen=True)
class ActionRequest:
    """A caller's request.

    Attributes
    ----------
    action
        The action, or the type of a task that requests it.
    parameters
        The task's parameters (`wallet_address`, `to_address` and `amount` for a transfer).
    requester
        The subject that the task belongs to.
    agent
        The client of the agent that made the request; None for a person.
    """

    action: str
    parameters: Mapping[str, Any]
    requester: str
    agent: str | None = None


@dataclass(frozen=True)
class Requirement:
    """A number of approvals, and the group whose members can give them. Without a group, any approver can."""

    approvals: int
    approvers: str | None = None
    members: frozenset[str] | None = None


@dataclass(frozen=True)
class LimitUse:
    """A request's share in the window of one limit, and the consequence beyond the maximum.

    Attributes
    ----------
    key
        Id of the window: a text over action, unit, `counts`, `per`, window and value, the same in every version.
    value
        Subject of the window: the action, a person, a wallet, a destination or a client.
    add
        The request's amount, or 1.
    over
        `deny`, or the approvals that a request over the limit needs instead.
    code
        Code of the refusal: `daily_limit_exceeded` for a limit of format 1.
    """

    key: str
    per: Per
    value: str
    window_seconds: int
    counts: Counts
    add: int
    maximum: int
    over: Literal["deny"] | Requirement
    unit: str
    code: Literal["limit_exceeded", "daily_limit_exceeded"] = "limit_exceeded"


@dataclass(frozen=True)
class Decision:
    """A policy's decision on one request.

    Attributes
    ----------
    code
        `allowed`, or a stable word for the reason of a refusal.
    reason
        Text for people.
    tier
        Index of the tier that applies; None if the request is denied.
    approvals, approvers, members
        Number of required approvals, the approvers' group, and its subjects; None for any approver.
    limits
        The request's share in each limit of the rule; empty if the request is denied.
    """

    policy_id: str
    format: Literal[1, 2]
    action: str
    allowed: bool
    code: Code
    reason: str
    risk_level: RiskLevel
    tier: int | None = None
    approvals: int = 0
    approvers: str | None = None
    members: frozenset[str] | None = None
    signature: bool = False
    expires_after: int | None = None
    escalate_after: int | None = None
    escalate_to: str | None = None
    amount: int | None = None
    unit: str | None = None
    destination: str | None = None
    source: str | None = None
    limits: tuple[LimitUse, ...] = ()

    @property
    def requires_approval(self) -> bool:
        """Return whether people must approve, even if no limit is exceeded."""
        return self.approvals > 0

    @property
    def requirement(self) -> Requirement | None:
        """Return the required approvals of the tier; None if it needs no approval."""
        return Requirement(self.approvals, self.approvers, self.members) if self.approvals else None


class _Denial(Exception):  # noqa: N818 (an answer, not an error)
    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code: Code = code
        self.reason = reason


def evaluate(policy: Policy, request: ActionRequest) -> Decision:
    """Decide on a request by one version of the policy.

    The decision is made without the usage of the limits' windows, except that an amount above the maximum of a limit
    with `over: deny` is refused at once.
    """
    name = action_of(request.action)
    action, rule = policy.action(name), policy.rule_for(name)
    decided = Decision(
        policy_id=policy.policy_id,
        format=policy.format,
        action=name,
        allowed=False,
        code="not_allowed",
        reason=f"policy {policy.policy_id} does not allow {name}",
        risk_level="high" if rule is None else rule.risk_level,
    )
    if policy.format == 2 and action is None:
        reason = f"policy {policy.policy_id} has no action {name}"
        return replace(decided, code="unknown_action", reason=reason)
    if action is not None:
        decided = replace(
            decided,
            unit=action.unit,
            amount=_amount(pointed(request.parameters, action.amount)),
            destination=_text(pointed(request.parameters, action.destination)),
            source=_text(pointed(request.parameters, action.source)),
        )
    if rule is None or not rule.allowed:
        return decided
    try:
        if refusal := requester_refusal(policy, name, request.requester, request.agent):
            raise _Denial("requester_not_allowed", refusal)  # noqa: TRY301
        index = _tier(decided, rule, action)
        tier = rule.tiers[index]
        uses = tuple(_use(policy, decided, limit, request, action) for limit in rule.limits)
        limits = tuple(use for use in uses if use is not None)
        _check_empty_windows(policy, limits)
        _check_destination(decided, rule)
    except _Denial as denial:
        return replace(decided, code=denial.code, reason=denial.reason)
    return replace(
        decided,
        allowed=True,
        code="allowed",
        reason=_words(decided, rule, index),
        tier=index,
        approvals=tier.approvals,
        approvers=tier.approvers,
        members=policy.members(tier.approvers),
        signature=tier.signature,
        expires_after=tier.expires_after,
        escalate_after=tier.escalate_after,
        escalate_to=tier.escalate_to,
        limits=limits,
    )


def decide(policy: Policy, request: ActionRequest) -> PolicyDecision:
    """Return the decision in the form that a plan pins and entries record."""
    return pinned_form(policy, evaluate(policy, request))


def pinned_form(policy: Policy, decision: Decision) -> PolicyDecision:
    """Return a decision of `evaluate` in the form that a plan pins; in format 1 the rule itself, as always."""
    if policy.format == 1:
        return policy.decide(decision.action)
    return PolicyDecision(
        policy_id=decision.policy_id,
        action_type=decision.action,
        allowed=decision.allowed,
        requires_approval=decision.requires_approval,
        risk_level=decision.risk_level,
        approvals=decision.approvals,
        expires_after=decision.expires_after,
        format=2,
        tier=decision.tier,
        approvers=decision.approvers,
        signature=decision.signature,
    )


def refusal_over(policy_id: str, use: LimitUse, *, used: int) -> PermanentError | None:
    """Return the refusal of a limit without room for the request; None if it has room, or requires approvals instead.

    Parameters
    ----------
    used
        The sum of the window before the request.
    """
    if use.over != "deny" or used + use.add <= use.maximum:
        return None
    if use.code == "daily_limit_exceeded":
        text = f"over daily_limit: policy {policy_id} lets a wallet send at most {use.maximum} QU in 24 hours"
        return PermanentError(
            use.code, text + (f", and {used} QU are used" if used else ""), spent=used, limit=use.maximum
        )
    return PermanentError(use.code, limit_words(use, used), used=used, limit=use.maximum, per=use.per)


def requirement_over(use: LimitUse, *, used: int) -> Requirement | None:
    """Return the approvals that the request needs because it exceeds a limit; None within it, or if it is denied."""
    return use.over if isinstance(use.over, Requirement) and used + use.add > use.maximum else None


def limit_words(use: LimitUse, used: int) -> str:
    """Return the text for a request that exceeds a limit."""
    unit = f" {use.unit}" if use.counts == "amount" else " requests" if use.maximum != 1 else " request"
    subject = f"`amount` {use.add}{unit}" if use.counts == "amount" else "the request"
    per = "for this action" if use.per == "action" else f"for this {use.per}"
    return f"{subject} exceeds the limit of {use.maximum}{unit} in {use.window_seconds} s {per} ({used}{unit} used)"


def eligible(requirement: Requirement, excluded: Iterable[str]) -> int | None:
    """Return the number of people who can give the approvals, without the `excluded`; None for any approver."""
    if requirement.members is None:
        return None
    subjects = list(excluded)
    return sum(not any(same_subject(member, other) for other in subjects) for member in requirement.members)


def _amount(value: object) -> int | None:
    return value if type(value) is int and 1 <= value <= MAX_INTEGER else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def requester_refusal(policy: Policy, action: str, requester: str, agent: str | None = None) -> str | None:
    """Return the reason why a caller cannot request an action with any parameters; None if the caller can.

    A person needs an entry by subject or group, an agent needs one by its client: a permitted person's token is not
    enough.
    """
    rule = policy.rule_for(action)
    if rule is None or not rule.allowed:
        return f"policy {policy.policy_id} does not allow {action}"
    if rule.requesters is None:
        return None
    if agent is not None:
        accepted = f"agent:{agent}" in rule.requesters
    else:
        groups = [name for kind, _, name in (each.partition(":") for each in rule.requesters) if kind == "group"]
        accepted = f"user:{requester}" in rule.requesters or any(
            requester in (policy.members(name) or ()) for name in groups
        )
    caller = "this agent" if agent is not None else "this requester"
    return None if accepted else f"policy {policy.policy_id} does not allow {caller} to request {action}"


def _tier(decided: Decision, rule: ActionRule, action: Action | BuiltIn | None) -> int:
    """Return the index of the first tier that reaches the amount."""
    if decided.amount is None and action is not None and action.amount is not None:
        # A built-in action needs no amount if the rule has no limit on it; its own checks detect a missing amount.
        limited = any(limit.counts == "amount" for limit in rule.limits) or rule.tiers[0].max_amount is not None
        if limited or isinstance(action, Action):
            raise _Denial("invalid_amount", _amount_flaw(decided, action.amount))
    for index, tier in enumerate(rule.tiers):
        if tier.max_amount is None or (decided.amount is not None and decided.amount <= tier.max_amount):
            return index
    most = f"{rule.tiers[-1].max_amount} {decided.unit}"
    if decided.action == TRANSFER_ACTION:
        text = f"over max_amount: policy {decided.policy_id} lets a transfer move at most {most}"
    else:
        text = f"over max_amount: policy {decided.policy_id} allows at most {most} for {decided.action}"
    raise _Denial("over_max_amount", text)


def _amount_flaw(decided: Decision, pointer: str) -> str:
    if decided.format == 1:
        return f"policy {decided.policy_id} has limits, so the amount must be a whole number of at least 1"
    return f"`{pointer[1:].replace('/', '.')}` must be a whole number from 1, in {decided.unit}"


def _check_empty_windows(policy: Policy, limits: Iterable[LimitUse]) -> None:
    """Check that an empty window has room for the request: otherwise it could never be allowed."""
    for use in limits:
        if refusal := refusal_over(policy.policy_id, use, used=0):
            raise _Denial(use.code, refusal.message)


def _check_destination(decided: Decision, rule: ActionRule) -> None:
    if rule.destinations is None:
        return
    destination = decided.destination
    if decided.format == 1 or decided.action in {TRANSFER_ACTION, "transaction"}:
        try:
            destination = check_address(destination)
        except InvalidInputError:
            destination = None
    if destination in rule.destinations:
        return
    if decided.format == 1:
        text = f"not among allowed_addresses: policy {decided.policy_id} does not let money go to that address"
        raise _Denial("address_not_allowed", text)
    text = f"policy {decided.policy_id} does not allow this destination for {decided.action}"
    raise _Denial("destination_not_allowed", text)


def _use(
    policy: Policy, decided: Decision, limit: Limit, request: ActionRequest, action: Action | BuiltIn | None
) -> LimitUse | None:
    """Return the request's share in a limit; None for a limit per agent if a person made the request."""
    values = {
        "action": decided.action,
        "requester": request.requester,
        "agent": request.agent,
        "source": _wallet(decided.source, action),
        "destination": _wallet(decided.destination, action),
    }
    value = values[limit.per]
    if value is None and limit.per == "agent":
        return None
    if value is None:
        code: Code = "missing_source" if limit.per == "source" else "missing_destination"
        raise _Denial(code, f"the request names no {limit.per}, for which policy {policy.policy_id} has a limit")
    unit = decided.unit or ""
    over: Literal["deny"] | Requirement = "deny"
    if limit.over != "deny":
        over = Requirement(limit.over.approvals, limit.over.approvers, policy.members(limit.over.approvers))
    return LimitUse(
        key=limit_key(decided.action, unit, limit, value),
        per=limit.per,
        value=value,
        window_seconds=limit.window_seconds,
        counts=limit.counts,
        add=1 if limit.counts == "count" else decided.amount or 0,
        maximum=limit.maximum,
        over=over,
        unit=unit,
        code="daily_limit_exceeded" if policy.format == 1 else "limit_exceeded",
    )


def limit_key(action: str, unit: str, limit: Limit, value: str) -> str:
    """Return the id of a limit's window, the same in every version of the policy. A long value is hashed."""
    return f"{action}/{unit}/{limit.counts}/{limit.per}/{limit.window_seconds}/{sha256_hex(value)}"


def _wallet(address: str | None, action: Action | BuiltIn | None) -> str | None:
    """Return the normal form of a wallet for a built-in action; for another destination, the text itself."""
    return wallet_identity(address) if address is not None and isinstance(action, BuiltIn) else address


def _words(decided: Decision, rule: ActionRule, index: int) -> str:
    tier = rule.tiers[index]
    reach = f"up to {tier.max_amount} {decided.unit}" if tier.max_amount is not None else "any amount"
    place = f"tier {index + 1} of {len(rule.tiers)} ({reach})" if len(rule.tiers) > 1 else "the rule"
    if not tier.approvals:
        return f"{place} requires no approval"
    people = f"the group `{tier.approvers}`" if tier.approvers is not None else "any approver"
    return f"{place} requires {tier.approvals} approval{'s' if tier.approvals > 1 else ''} by {people}"
