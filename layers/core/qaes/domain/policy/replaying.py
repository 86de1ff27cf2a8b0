"""Replay of recorded requests with a proposal, to show the effects of the new version.

The usage of the limits' windows is left out: a replay decides each request as if it were the only one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from qaes.domain.errors import InvalidInputError
from qaes.domain.policy.deciding import ActionRequest, Code, Decision, evaluate
from qaes.domain.policy.document import Policy

Change = Literal["allow_to_deny", "deny_to_allow", "more_approvals", "fewer_approvals", "other_approvers", "unchanged"]
CHANGES: tuple[Change, ...] = get_args(Change)


@dataclass(frozen=True)
class Recorded:
    """A request that the system has recorded, by the id of its task."""

    task_id: str
    request: ActionRequest


@dataclass(frozen=True)
class Replayed:
    """A recorded request, and the decisions of both versions."""

    task_id: str
    change: Change
    before: Decision
    after: Decision


@dataclass(frozen=True)
class Comparison:
    """The counts of each change, and the requests that are decided differently."""

    counts: dict[Change, int]
    changed: tuple[Replayed, ...]

    @property
    def total(self) -> int:
        """Return the number of requests that were decided again."""
        return sum(self.counts.values())


def judge(policy: Policy, request: ActionRequest) -> Decision:
    """Decide on a request as `evaluate` does, and deny it if its parameters do not fit the action's schema."""
    from qaes.domain.policy.schemas import check_parameters

    decision = evaluate(policy, request)
    if not decision.allowed:
        return decision
    try:
        check_parameters(policy, request.action, request.parameters)
    except InvalidInputError as error:
        return denied(decision, f"`{error.field}` {error.message}")
    return decision


def denied(decision: Decision, reason: str, code: Code = "invalid_parameters") -> Decision:
    """Return a decision as a denial."""
    return Decision(
        policy_id=decision.policy_id,
        format=decision.format,
        action=decision.action,
        allowed=False,
        code=code,
        reason=reason,
        risk_level=decision.risk_level,
        amount=decision.amount,
        unit=decision.unit,
        destination=decision.destination,
        source=decision.source,
    )


def compare(before: Policy, after: Policy, requests: Iterable[Recorded]) -> Comparison:
    """Decide recorded requests by two versions, and classify the differences."""
    counts = dict.fromkeys(CHANGES, 0)
    changed = []
    for recorded in requests:
        old, new = judge(before, recorded.request), judge(after, recorded.request)
        change = classify(old, new)
        counts[change] += 1
        if change != "unchanged":
            changed.append(Replayed(recorded.task_id, change, old, new))
    return Comparison(counts, tuple(changed))


def classify(before: Decision, after: Decision) -> Change:
    """Name the difference of two decisions on the same request."""
    if before.allowed != after.allowed:
        return "deny_to_allow" if after.allowed else "allow_to_deny"
    if before.approvals != after.approvals:
        return "more_approvals" if after.approvals > before.approvals else "fewer_approvals"
    if before.members != after.members:
        return "other_approvers"
    return "unchanged"
