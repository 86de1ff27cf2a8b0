"""The policy: what may be done, and for what a person must be asked. It decides; a planner never does."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

RiskLevel = Literal["low", "medium", "high"]


class Rule(BaseModel):
    """What the policy says of one action type."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    allowed: bool
    requires_approval: bool
    risk_level: RiskLevel
    approvals: int = Field(1, ge=1, le=10, description="how many people have to approve, each another one")
    expires_after: int | None = Field(
        None, ge=1, le=2_592_000, description="seconds that an approval stays open, if less than the system's limit"
    )


DENIED = Rule(allowed=False, requires_approval=True, risk_level="high")
"""An action type without a rule: denied."""


class PolicyDecision(BaseModel):
    """A rule as applied to a task, pinned to the policy's version by `policy_id`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy_id: str
    action_type: str
    allowed: bool
    requires_approval: bool
    risk_level: RiskLevel
    approvals: int = 1
    expires_after: int | None = None

    @property
    def rule(self) -> Rule:
        """The rule that was applied."""
        return Rule.model_validate(self.model_dump(include=set(Rule.model_fields)))


class Policy(BaseModel):
    """A version of the policy document; `policy_id` names version and hash."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    policy_id: str
    version: int
    rules: dict[str, Rule]

    def decide(self, action_type: str) -> PolicyDecision:
        """The rule for `action_type`; without one, denied."""
        rule = self.rules.get(action_type, DENIED)
        return PolicyDecision(
            policy_id=self.policy_id,
            action_type=action_type,
            allowed=rule.allowed,
            requires_approval=rule.requires_approval,
            risk_level=rule.risk_level,
            approvals=rule.approvals,
            expires_after=rule.expires_after,
        )
