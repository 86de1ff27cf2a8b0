"""The policy as a caller sees it: the actions that exist, and a decision with its limits in words."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qaes.domain.policy.actions import BUILT_IN, TASK_TYPES, Effect, step_of
from qaes.domain.policy.deciding import LimitUse, limit_words, requester_refusal
from qaes.domain.policy.document import Policy
from qaes.domain.policy.rules import Counts, Limit, Per, RiskLevel, Tier

_TASK_TYPE_OF = {action: task_type for task_type, action in TASK_TYPES.items()}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ActionDescription(_Frozen):
    """An action, and the requirements of a request for it. It names no handler."""

    action: str = Field(description="the name of the action's rule in the policy")
    task_type: str = Field(description="the `task_type` of a task that requests the action")
    title: str
    description: str
    effect: Effect = Field(description="`none`: the action changes nothing")
    built_in: bool
    recorded_only: bool = Field(description="whether the system records the request and performs nothing")
    may_request: bool = Field(description="whether the caller may request the action")
    reason: str | None = Field(description="why the caller may not request it")
    risk_level: RiskLevel
    parameters: dict[str, Any] = Field(description="JSON Schema 2020-12 of the parameters")
    unit: str | None = Field(description="the unit of the amount; null for an action without an amount")
    destinations: list[str] | None = Field(description="the permitted destinations; null: every one")
    tiers: list[Tier] = Field(description="the approvals that a request needs, by its amount")
    limits: list[Limit]


def describe_actions(policy: Policy, *, requester: str, agent: str | None = None) -> list[ActionDescription]:
    """Return the built-in actions and those of the policy, by name, as one caller sees them.

    Parameters
    ----------
    requester, agent
        The caller, as the task would record them.
    """
    names = dict.fromkeys([*BUILT_IN, *policy.actions, *(policy.rules if policy.format == 1 else ())])
    return [_describe(policy, name, requester, agent) for name in names]


def _describe(policy: Policy, name: str, requester: str, agent: str | None) -> ActionDescription:
    action, rule = policy.action(name), policy.rule_for(name)
    refusal = requester_refusal(policy, name, requester, agent)
    own = policy.actions.get(name)
    return ActionDescription(
        action=name,
        task_type=_TASK_TYPE_OF.get(name, name),
        title=name if action is None else action.title,
        description="" if own is None else own.description,
        effect="none" if action is None else action.effect,
        built_in=name in BUILT_IN,
        recorded_only=step_of(name) == "generic_action",
        may_request=refusal is None,
        reason=refusal,
        risk_level="high" if rule is None else rule.risk_level,
        parameters={"type": "object"} if action is None else action.parameters,
        unit=None if action is None or action.amount is None else action.unit,
        destinations=None if rule is None or rule.destinations is None else list(rule.destinations),
        tiers=[] if rule is None else list(rule.tiers),
        limits=[] if rule is None else list(rule.limits),
    )


class LimitState(_Frozen):
    """A limit of a decision, and the room in its window."""

    per: Per
    value: str = Field(description="the action, subject, wallet, destination or client that the window is for")
    window_seconds: int
    counts: Counts
    unit: str | None
    maximum: int
    used: int
    remaining: int = Field(description="before the request")
    add: int = Field(description="the share of the request")
    over: str = Field(description="`deny`, or the approvals that a request over the limit needs")
    exceeded: bool
    words: str


def limit_state(use: LimitUse, used: int) -> LimitState:
    """Return a limit with the sum of its window before the request."""
    exceeded = used + use.add > use.maximum
    unit = use.unit if use.counts == "amount" else None
    left = max(use.maximum - used, 0)
    room = f"{left}{f' {unit}' if unit else ''} of {use.maximum} left in {use.window_seconds} s for this {use.per}"
    over = "deny" if use.over == "deny" else people(use.over.approvals, use.over.approvers)
    return LimitState(
        per=use.per,
        value=use.value,
        window_seconds=use.window_seconds,
        counts=use.counts,
        unit=unit,
        maximum=use.maximum,
        used=used,
        remaining=left,
        add=use.add,
        over=over,
        exceeded=exceeded,
        words=(f"{limit_words(use, used)}: {over}" if exceeded else room),
    )


def people(approvals: int, approvers: str | None) -> str:
    """State in words how many people must approve."""
    group = f"the group `{approvers}`" if approvers is not None else "any approver"
    return f"{approvals} approval{'s' if approvals > 1 else ''} by {group}"
