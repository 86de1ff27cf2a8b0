"""The policy: what may be done, and for what a person must be asked. It decides; a planner never does.

A version of the policy is a document: one text, whose SHA-256 is written to the ledger (docs/policy.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qaes.domain.canonical import canonical_json, sha256_hex
from qaes.domain.errors import InvalidInputError
from qaes.domain.qubic import MAX_QU
from qaes.domain.qubic.identity import check_address, check_payable

RiskLevel = Literal["low", "medium", "high"]

MAX_ADDRESSES = 100
MAX_RULES = 200
MAX_DOCUMENT_BYTES = 64 * 1024
TRANSFER_ACTION = "transfer_funds"
"""The one action type whose steps move money: its rule judges every transfer, whatever asked for it."""
ACTION_TYPE_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"
POLICY_ID_PATTERN = r"^policy-v[1-9][0-9]{0,8}-[0-9a-f]{64}$"


@lru_cache(4096)  # a rule is read for each step, and its addresses' checksums are always the same
def _address(text: str) -> str:
    try:
        return check_address(text)
    except InvalidInputError as error:
        raise ValueError(error.message) from None


Address = Annotated[str, AfterValidator(_address)]
"""An address in its one spelling."""


class Rule(BaseModel):
    """What the policy says of one action type; a limit that is None is none.

    The limits are about money, so in a new version only the rule TRANSFER_ACTION may have them (`check_enforceable`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    allowed: bool = Field(strict=True)
    requires_approval: bool = Field(strict=True)
    risk_level: RiskLevel
    approvals: int = Field(1, ge=1, le=10, strict=True, description="how many people have to approve, each another one")
    expires_after: int | None = Field(
        None,
        ge=1,
        le=2_592_000,
        strict=True,
        description="seconds that an approval stays open, if less than the system's limit",
    )
    max_amount: int | None = Field(None, ge=1, le=MAX_QU, strict=True, description="most QU that one transfer moves")
    daily_limit: int | None = Field(
        None, ge=1, le=MAX_QU, strict=True, description="most QU that a wallet sends in a day (UTC)"
    )
    allowed_addresses: tuple[Address, ...] | None = Field(
        None, min_length=1, max_length=MAX_ADDRESSES, description="where money may go; null: anywhere"
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
            raise ValueError("an address stands twice")
        return addresses


DENIED = Rule(allowed=False, requires_approval=True, risk_level="high")
"""An action type without a rule: denied."""

DEFAULT_RULES = {
    "monitoring": Rule(allowed=True, requires_approval=False, risk_level="low"),
    "transaction": Rule(allowed=True, requires_approval=True, risk_level="medium"),
    TRANSFER_ACTION: Rule(allowed=True, requires_approval=True, risk_level="high"),
}
"""The rules of version 1, which nobody proposed."""

ActionType = Annotated[str, Field(pattern=ACTION_TYPE_PATTERN)]
Rules = Annotated[dict[ActionType, Rule], Field(max_length=MAX_RULES)]


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
    max_amount: int | None = None
    daily_limit: int | None = None
    allowed_addresses: tuple[str, ...] | None = None

    @property
    def rule(self) -> Rule:
        """The rule that was applied."""
        return Rule.model_validate(self.model_dump(include=set(Rule.model_fields)))

    @property
    def limits_transfers(self) -> bool:
        """Whether a transfer may be refused for what it moves, or where to."""
        return (self.max_amount, self.daily_limit, self.allowed_addresses) != (None, None, None)


class Policy(BaseModel):
    """A version of the policy document; `policy_id` names version and hash."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    policy_id: str
    version: int
    rules: dict[str, Rule]

    def decide(self, action_type: str) -> PolicyDecision:
        """The rule for `action_type`; without one, denied."""
        rule = self.rules.get(action_type, DENIED)
        return PolicyDecision(policy_id=self.policy_id, action_type=action_type, **dict(rule))


class PolicyDocument(BaseModel):
    """A version of the policy as it is written down, hashed and anchored.

    Attributes
    ----------
    format
        Of the document; a verifier refuses one that it does not know.
    version
        1, 2, 3 …; a number that was proposed is not used again.
    proposed_by
        Who wrote it; nobody did version 1.
    based_on
        The `policy_id` in force when it was written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    version: int = Field(ge=1, lt=10**9, strict=True)
    proposed_by: str | None = None
    based_on: str | None = Field(None, pattern=POLICY_ID_PATTERN)
    rules: Rules

    @model_validator(mode="after")
    def _is_not_too_large(self) -> PolicyDocument:
        if len(self.text().encode()) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"a policy document has at most {MAX_DOCUMENT_BYTES} bytes")
        return self

    @classmethod
    def write(
        cls, rules: dict[str, Rule], *, version: int, proposed_by: str | None = None, based_on: str | None = None
    ) -> PolicyDocument:
        """Make the document of a new version.

        Raises
        ------
        InvalidInputError
            More than 200 rules, a name that is no action type, an allowed address that no transfer may go to, or a
            document of more than 64 KiB; `field` names it. An older document with such an address stays readable.
        """
        if len(rules) > MAX_RULES:
            raise InvalidInputError(f"a policy has at most {MAX_RULES} rules", field="rules")
        for name in rules:
            if not re.fullmatch(ACTION_TYPE_PATTERN, name):
                raise InvalidInputError("an action type has 1 to 64 letters, digits, or _ . -", field="rules")
        for name, rule in rules.items():
            for index, address in enumerate(rule.allowed_addresses or ()):
                check_payable(address, f"rules.{name}.allowed_addresses.{index}")
        try:
            return cls(version=version, proposed_by=proposed_by, based_on=based_on, rules=rules)
        except ValidationError as error:
            raise InvalidInputError(error.errors()[0]["msg"].removeprefix("Value error, "), field="rules") from error

    @classmethod
    def read(cls, text: str) -> PolicyDocument:
        """Read a document. Raises ValueError when it is none, or of a format that is not known."""
        return cls.model_validate_json(text)

    def text(self) -> str:
        """Write it in the one way (RFC 8785), every field of every rule being in it: null is the absence of a limit."""
        return canonical_json(self.model_dump(mode="json"))


class RuleChange(BaseModel):
    """A rule of both documents, which differs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: Rule
    after: Rule


class PolicyDifference(BaseModel):
    """What a version of the policy changes in the version that it is based on, by action type."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    added: dict[str, Rule]
    removed: dict[str, Rule] = Field(description="denied from then on")
    changed: dict[str, RuleChange]


def difference(before: Mapping[str, Rule], after: Mapping[str, Rule]) -> PolicyDifference:
    """Compare the rules of two versions."""
    return PolicyDifference(
        added={name: rule for name, rule in after.items() if name not in before},
        removed={name: rule for name, rule in before.items() if name not in after},
        changed={
            name: RuleChange(before=before[name], after=rule)
            for name, rule in after.items()
            if name in before and before[name] != rule
        },
    )


def check_removals(before: Mapping[str, Rule], after: Mapping[str, Rule], remove: Sequence[str]) -> None:
    """Check that `remove` names each rule that a new version drops, once, and nothing else.

    Raises
    ------
    InvalidInputError
        A rule would be dropped silently; or a name stands twice, has no rule in force, or has one in `after`.
    """
    wrong = {
        "names these rules twice": [name for name in dict.fromkeys(remove) if remove.count(name) > 1],
        "names what has no rule in the policy in force": [name for name in remove if name not in before],
        "names what `rules` has a rule for": [name for name in remove if name in after],
        "does not name these rules, which `rules` drops": [
            name for name in before if name not in after and name not in remove
        ],
    }
    for problem, names in wrong.items():
        if names:
            raise InvalidInputError(f"`remove` {problem}: {', '.join(sorted(set(names)))}", field="remove")


def check_enforceable(rules: Mapping[str, Rule]) -> None:
    """Check that no rule of a new version has a limit that nothing would enforce.

    Older documents that have one stay valid: there the limit has no effect. Raises InvalidInputError.
    """
    for name, rule in rules.items():
        for limit in ("max_amount", "daily_limit", "allowed_addresses"):
            if name != TRANSFER_ACTION and getattr(rule, limit) is not None:
                raise InvalidInputError(
                    f"`{name}` moves no money, so nothing would enforce it: only `{TRANSFER_ACTION}` may have it",
                    field=f"rules.{name}.{limit}",
                )


def policy_id_of(version: int, hash_: str) -> str:
    """Name a version by its number and its document's whole hash: whoever pins the id has pinned the document."""
    return f"policy-v{version}-{hash_}"


def version_of(policy_id: str) -> int | None:
    """Return the number in a policy's id; None for what is no id."""
    return int(policy_id.split("-")[1][1:]) if re.fullmatch(POLICY_ID_PATTERN, policy_id) else None


def policy_of(text: str) -> Policy:
    """Return the policy that a document's text makes.

    The hash is that of the text as it stands, not of what it would be written like today. Raises ValueError.
    """
    document = PolicyDocument.read(text)
    return Policy(
        policy_id=policy_id_of(document.version, sha256_hex(text)), version=document.version, rules=document.rules
    )
