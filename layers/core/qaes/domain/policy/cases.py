"""Test cases of a policy in a repository: requests with their expected decisions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from qaes.domain.errors import InvalidInputError
from qaes.domain.policy.deciding import ActionRequest, Decision, LimitUse, Requirement, refusal_over, requirement_over
from qaes.domain.policy.document import Policy
from qaes.domain.policy.names import Name, invalid_input
from qaes.domain.policy.replaying import denied, judge
from qaes.domain.policy.rules import Counts, Per


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CaseRequest(_Part):
    """The request of a case."""

    action: Name
    parameters: dict[str, Any] = {}
    requester: str = Field("requester", min_length=1)
    agent: str | None = None


class CaseUsage(_Part):
    """Usage of a limit's window before the request."""

    per: Per
    counts: Counts
    window_seconds: int = Field(ge=60, strict=True)
    used: int = Field(ge=0, strict=True)


class Expectation(_Part):
    """The members of the decision that a case expects: those that are absent can be anything."""

    allowed: bool = Field(strict=True)
    approvals: int | None = Field(None, ge=0, strict=True)
    approvers: str | None = None
    tier: int | None = Field(None, ge=0, strict=True)
    code: str | None = None
    expires_after: int | None = Field(None, strict=True)


class Case(_Part):
    """A request, the usage of the limits before it, and the expected decision."""

    name: str = Field(min_length=1)
    request: CaseRequest
    used: tuple[CaseUsage, ...] = ()
    expect: Expectation


@dataclass(frozen=True)
class Outcome:
    """A case that was evaluated: the differences from its expectation, and the reason of the decision."""

    name: str
    differences: tuple[str, ...]
    reason: str

    @property
    def passed(self) -> bool:
        """Return whether the decision is the expected one."""
        return not self.differences


def read_cases(value: object) -> list[Case]:
    """Read a parsed file of cases.

    Raises
    ------
    InvalidInputError
        It is not a list of cases, or two have the same name; `field` is the path, such as `3.expect.allowed`.
    """
    try:
        cases: list[Case] = TypeAdapter(Annotated[list[Case], Field(min_length=1)]).validate_python(value)
    except ValidationError as error:
        raise invalid_input(error) from error
    names = [case.name for case in cases]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidInputError(f"another case has the name `{name}`", field=f"{index}.name")
    return cases


def run(policy: Policy, case: Case) -> Outcome:
    """Evaluate a case, and compare the decision with the expected one."""
    request = ActionRequest(case.request.action, case.request.parameters, case.request.requester, case.request.agent)
    decision, needed, unknown = _with_usage(policy, judge(policy, request), case.used)
    found = {
        "allowed": decision.allowed,
        "approvals": max((each.approvals for each in needed), default=0) if decision.allowed else None,
        "approvers": next((each.approvers for each in needed if each.approvers is not None), None),
        "tier": decision.tier,
        "code": decision.code,
        "expires_after": decision.expires_after,
    }
    expected = case.expect.model_dump(exclude_unset=True)
    differences = [
        f"`{member}` is {json.dumps(found[member])}, and the case expects {json.dumps(value)}"
        for member, value in expected.items()
        if found[member] != value
    ]
    return Outcome(case.name, (*unknown, *differences), decision.reason)


def _with_usage(
    policy: Policy, decision: Decision, usage: Sequence[CaseUsage]
) -> tuple[Decision, list[Requirement], list[str]]:
    """Return the decision with the usage of the limits, its requirements, and the usages that fit no limit."""
    needed = [decision.requirement] if decision.requirement is not None else []
    unknown = []
    for each in usage if decision.allowed else ():
        limit = next((use for use in decision.limits if _is_of(use, each)), None)
        if limit is None:
            unknown.append(f"`used`: no limit counts the {each.counts} per {each.per} in {each.window_seconds} s")
        elif refusal := refusal_over(policy.policy_id, limit, used=each.used):
            return denied(decision, refusal.message, limit.code), [], unknown
        elif requirement := requirement_over(limit, used=each.used):
            needed.append(requirement)
    return decision, needed, unknown


def _is_of(use: LimitUse, usage: CaseUsage) -> bool:
    return (use.per, use.counts, use.window_seconds) == (usage.per, usage.counts, usage.window_seconds)
