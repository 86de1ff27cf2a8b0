"""The rules of both formats, and the decision that a plan pins.

A format 1 rule is `Rule`, a format 2 rule is `ActionRule`. `normalised` turns the first into the second, so that one
evaluator (`deciding`) serves both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qaes.domain.errors import InvalidInputError
from qaes.domain.policy.names import MAX_INTEGER, MAX_SECONDS, TRANSFER_ACTION, ActionType, Name, once
from qaes.domain.qubic import MAX_QU
from qaes.domain.qubic.identity import check_address

RiskLevel = Literal["low", "medium", "high"]

MAX_ADDRESSES = 100
MAX_RULES = 200
DAY = 86_400


@lru_cache(4096)  # a rule is read for each step, and its addresses' checksums are always the same
def _address(text: str) -> str:
    try:
        return check_address(text)
    except InvalidInputError as error:
        raise ValueError(error.message) from None


Address = Annotated[str, AfterValidator(_address)]
"""An address in its normal form."""


class Rule(BaseModel):
    """The format 1 rule of one action type; None means no limit.

    The limits are about money, so in a new version only the rule TRANSFER_ACTION may have them (`check_enforceable`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    allowed: bool = Field(strict=True)
    requires_approval: bool = Field(strict=True)
    risk_level: RiskLevel
    approvals: int = Field(1, ge=1, le=10, strict=True, description="number of different people who must approve")
    expires_after: int | None = Field(
        None,
        ge=1,
        le=MAX_SECONDS,
        strict=True,
        description="seconds that an approval stays open, if less than the system's limit",
    )
    max_amount: int | None = Field(None, ge=1, le=MAX_QU, strict=True, description="maximum QU of one transfer")
    daily_limit: int | None = Field(
        None, ge=1, le=MAX_QU, strict=True, description="maximum QU that a wallet sends in 24 hours"
    )
    allowed_addresses: tuple[Address, ...] | None = Field(
        None, min_length=1, max_length=MAX_ADDRESSES, description="permitted destinations; null: every one"
    )

    @field_validator("daily_limit")
    @classmethod
    def _reaches_max_amount(cls, daily_limit: int | None, info: ValidationInfo) -> int | None:
        # max_amount would never be reached: the two were mixed up, or one of them was forgotten.
        max_amount = info.data.get("max_amount")
        if daily_limit is not None and max_amount is not None and daily_limit < max_amount:
            raise ValueError("less than max_amount, which no transfer could then reach")
        return daily_limit

    @field_validator("allowed_addresses")
    @classmethod
    def _once(cls, addresses: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if addresses is not None and len(set(addresses)) != len(addresses):
            raise ValueError("an address appears twice")
        return addresses


DENIED = Rule(allowed=False, requires_approval=True, risk_level="high")
"""An action type without a rule: denied."""

DEFAULT_RULES = {
    "monitoring": Rule(allowed=True, requires_approval=False, risk_level="low"),
    "transaction": Rule(allowed=True, requires_approval=True, risk_level="medium"),
    TRANSFER_ACTION: Rule(allowed=True, requires_approval=True, risk_level="high"),
}
"""Rules of version 1, which is not proposed by an operator."""

Rules = Annotated[dict[ActionType, Rule], Field(max_length=MAX_RULES)]


# Format 2


class RequiredApprovals(BaseModel):
    """Number of people who must approve, and their group; null: any approver."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    approvals: int = Field(ge=1, le=10, strict=True)
    approvers: Name | None = None


class Tier(BaseModel):
    """Required approvals of requests up to `max_amount`; null means no upper bound."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_amount: int | None = Field(None, ge=1, le=MAX_INTEGER, strict=True)
    approvals: int = Field(ge=0, le=10, strict=True, description="number of different people who must approve")
    approvers: Name | None = Field(None, description="the group that they belong to; null: any approver")
    signature: Literal[False] = Field(default=False, description="only false: signed approvals do not exist yet")
    expires_after: int | None = Field(
        None, ge=1, le=MAX_SECONDS, strict=True, description="seconds that an approval stays open"
    )
    escalate_after: int | None = Field(
        None, ge=1, le=MAX_SECONDS, strict=True, description="seconds after which `escalate_to` is notified"
    )
    escalate_to: Name | None = Field(None, description="a group that is notified; it never adds voters")

    @model_validator(mode="after")
    def _is_consistent(self) -> Tier:
        if self.approvals == 0:
            for name in ("approvers", "escalate_after", "escalate_to"):
                if getattr(self, name) is not None:
                    raise policy_error(f"`{name}` has no effect with 0 approvals: leave it out, or require an approval")
        if (self.escalate_after is None) != (self.escalate_to is None):
            raise policy_error("`escalate_after` and `escalate_to` need each other: set both, or neither")
        after, expires = self.escalate_after, self.expires_after
        if after is not None and expires is not None and after >= expires:
            raise policy_error("`escalate_after` must be less than `expires_after`, or the approval expires first")
        return self


Per = Literal["action", "requester", "source", "destination", "agent"]
Counts = Literal["amount", "count"]


def _kind_of_over(value: Any) -> str | None:
    if value == "deny":
        return "<deny>"
    return "<approvals>" if isinstance(value, Mapping | RequiredApprovals) else None


class Limit(BaseModel):
    """The maximum of a rolling window, as a sum of amounts or as a number of requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window_seconds: int = Field(ge=60, le=2_678_400, strict=True)
    max_amount: int | None = Field(None, ge=1, le=MAX_INTEGER, strict=True)
    max_count: int | None = Field(None, ge=1, le=1_000_000, strict=True)
    per: Per
    over: Annotated[
        Annotated[Literal["deny"], Tag("<deny>")] | Annotated[RequiredApprovals, Tag("<approvals>")],
        Discriminator(
            _kind_of_over,
            custom_error_type="over",
            custom_error_message="must be `deny`, or an object with `approvals` and perhaps `approvers`",
        ),
    ] = Field(description="`deny`, or the approvals that a request over the limit needs instead")

    @model_validator(mode="after")
    def _has_one_maximum(self) -> Limit:
        if (self.max_amount is None) == (self.max_count is None):
            raise policy_error("a limit has either `max_amount` or `max_count`: set exactly one of them")
        return self

    @property
    def counts(self) -> Counts:
        """Return whether the limit sums amounts or counts requests."""
        return "count" if self.max_amount is None else "amount"

    @property
    def maximum(self) -> int:
        """Return the maximum of the window."""
        return self.max_amount or self.max_count or 0


class ActionRule(BaseModel):
    """The format 2 rule of one action."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    allowed: bool = Field(strict=True)
    risk_level: RiskLevel
    requesters: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        max_length=MAX_ADDRESSES,
        description="`user:<subject>`, `group:<name>` or `agent:<client id>`; null: every caller",
    )
    destinations: tuple[str, ...] | None = Field(
        None, min_length=1, max_length=MAX_ADDRESSES, description="the permitted destinations; null: every one"
    )
    allow_derived: bool = Field(default=False, strict=True)
    smart_contracts: bool = Field(default=False, strict=True)
    tiers: tuple[Tier, ...] = Field(min_length=1, max_length=5)
    limits: tuple[Limit, ...] = Field((), max_length=10)

    @field_validator("tiers")
    @classmethod
    def _rise(cls, tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
        for index, (lower, upper) in enumerate(pairwise(tiers), start=1):
            if lower.max_amount is None:
                raise policy_error("only the last tier may have a `max_amount` of null", f"{index - 1}.max_amount")
            if upper.max_amount is not None and upper.max_amount <= lower.max_amount:
                raise policy_error("must be more than the tier before", f"{index}.max_amount")
        return tiers

    @field_validator("limits")
    @classmethod
    def _differ(cls, limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        seen: dict[tuple[str, str, int], int] = {}
        for index, limit in enumerate(limits):
            first = seen.setdefault((limit.counts, limit.per, limit.window_seconds), index)
            if first != index:
                raise policy_error(f"has the same window and `per` as limit {first}: keep one of them", str(index))
        return limits

    @field_validator("requesters", "destinations")
    @classmethod
    def _once(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        once(values or ())
        return values


def policy_error(message: str, at: str = "") -> PydanticCustomError:
    """Make an error of a validator; `at` continues the field's path."""
    return PydanticCustomError("policy", "{message}", {"message": message, "at": at})


def groups_of(rule: Rule | ActionRule | None) -> list[str]:
    """Return the groups that a rule names, each once."""
    if not isinstance(rule, ActionRule):
        return []
    return list(dict.fromkeys(name for _, name in named_groups(rule)))


def named_groups(rule: ActionRule) -> Iterator[tuple[str, str]]:
    """Yield the place and the name of each group that a rule names."""
    for index, requester in enumerate(rule.requesters or ()):
        kind, _, name = requester.partition(":")
        if kind == "group":
            yield f"requesters.{index}", name
    for index, tier in enumerate(rule.tiers):
        for member, group in (("approvers", tier.approvers), ("escalate_to", tier.escalate_to)):
            if group is not None:
                yield f"tiers.{index}.{member}", group
    for index, limit in enumerate(rule.limits):
        if limit.over != "deny" and limit.over.approvers is not None:
            yield f"limits.{index}.over.approvers", limit.over.approvers


@lru_cache(1024)
def normalised(name: str, rule: Rule) -> ActionRule:
    """Return the format 2 form of a format 1 rule: one tier, and one limit per source and 86,400 s.

    Limits in another rule than TRANSFER_ACTION have no effect in format 1, so they are left out.
    """
    moves = name == TRANSFER_ACTION
    tier = Tier(
        max_amount=rule.max_amount if moves else None,
        approvals=rule.approvals if rule.requires_approval else 0,
        expires_after=rule.expires_after,
    )
    daily = (
        Limit(window_seconds=DAY, max_amount=rule.daily_limit, per="source", over="deny") if rule.daily_limit else None
    )
    return ActionRule(
        allowed=rule.allowed,
        risk_level=rule.risk_level,
        destinations=rule.allowed_addresses if moves else None,
        tiers=(tier,),
        limits=(daily,) if daily and moves else (),
    )


# The decision that a plan pins

_FORMAT_1_ONLY = ("max_amount", "daily_limit", "allowed_addresses")
_FORMAT_2_ONLY = ("format", "tier", "approvers", "signature")


class PolicyDecision(BaseModel):
    """A rule as applied to a task, pinned to the policy's version by `policy_id`.

    Its dump has only the members of its format. The members of format 1 never change, because entries and plans hash
    them.

    Attributes
    ----------
    tier
        Format 2: the index of the tier that applies; None when the request is denied.
    approvers
        Format 2: the group of the tier; None: any approver.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy_id: str
    action_type: str
    allowed: bool
    requires_approval: bool
    risk_level: RiskLevel
    approvals: int = 1
    expires_after: int | None = None
    max_amount: int | None = None
    daily_limit: int | None = None
    allowed_addresses: tuple[str, ...] | None = None
    format: Literal[1, 2] = 1
    tier: int | None = None
    approvers: str | None = None
    signature: bool = False

    @model_serializer(mode="wrap")
    def _members_of_its_format(self, dump: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]  # noqa: ANN202 (a return type would replace the JSON schema)
        absent = _FORMAT_2_ONLY if self.format == 1 else _FORMAT_1_ONLY
        return {name: value for name, value in dump(self).items() if name not in absent}

    @property
    def rule(self) -> Rule:
        """The rule of format 1 that was applied."""
        return Rule.model_validate(self.model_dump(include=set(Rule.model_fields)))

    @property
    def limits_transfers(self) -> bool:
        """Return whether a format 1 rule may reject a transfer for its amount or destination."""
        return (self.max_amount, self.daily_limit, self.allowed_addresses) != (None, None, None)


def check_enforceable(rules: Mapping[str, Rule]) -> None:
    """Check that no format 1 rule of a new version has a limit that nothing would enforce.

    Older documents that have one stay valid: there the limit has no effect. Raises InvalidInputError.
    """
    for name, rule in rules.items():
        for limit in _FORMAT_1_ONLY:
            if name != TRANSFER_ACTION and getattr(rule, limit) is not None:
                raise InvalidInputError(
                    f"`{name}` moves no money, so nothing would enforce it: only `{TRANSFER_ACTION}` may have it",
                    field=f"rules.{name}.{limit}",
                )
