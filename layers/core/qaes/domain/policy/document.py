"""The document of a version of the policy in both formats, as it is hashed and anchored, and its policy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qaes.domain.canonical import canonical_json, sha256_hex
from qaes.domain.errors import InvalidInputError
from qaes.domain.policy.actions import BUILT_IN, Action, BuiltIn
from qaes.domain.policy.checks import check_consistent
from qaes.domain.policy.names import (
    ACTION_TYPE_PATTERN,
    MAX_INTEGER,
    POLICY_ID_PATTERN,
    TRANSFER_ACTION,
    Name,
    invalid_input,
    policy_id_of,
    text_flaw,
)
from qaes.domain.policy.rules import DENIED, MAX_RULES, ActionRule, PolicyDecision, Rule, Rules, groups_of, normalised
from qaes.domain.qubic.identity import check_payable
from qaes.domain.text import normal_subject

MAX_DOCUMENT_BYTES = 64 * 1024
MAX_DOCUMENT_V2_BYTES = 256 * 1024
MAX_GROUPS = 200
MAX_ACTIONS = 200
MAX_MEMBERS = 200
MAX_DEPTH = 32

Group = Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_MEMBERS)]
Groups = Annotated[dict[Name, Group], Field(max_length=MAX_GROUPS)]
Actions = Annotated[dict[Name, Action], Field(max_length=MAX_ACTIONS)]
ActionRules = Annotated[dict[Name, ActionRule], Field(max_length=MAX_RULES)]


class Policy(BaseModel):
    """A version of the policy document; `policy_id` names version and hash.

    It may be reduced to one action: its rule, its definition and the groups that the rule names.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    policy_id: str
    version: int
    format: Literal[1, 2] = 1
    rules: dict[str, Rule | ActionRule]
    groups: dict[str, tuple[str, ...]] = {}
    actions: dict[str, Action] = {}

    def decide(self, action_type: str) -> PolicyDecision:
        """Return the format 1 rule for `action_type`; without a rule, denied.

        A format 2 rule decides on a request, not on an action alone: `deciding.decide` does.
        """
        rule = self.rules.get(action_type, DENIED)
        if not isinstance(rule, Rule) or self.format != 1:
            raise ValueError(f"policy {self.policy_id} has format 2: decide on a request")
        return PolicyDecision(policy_id=self.policy_id, action_type=action_type, **dict(rule))

    def rule_for(self, action: str) -> ActionRule | None:
        """Return the rule for an action in its format 2 form; None if the policy has no rule for it."""
        rule = self.rules.get(action)
        return normalised(action, rule) if isinstance(rule, Rule) else rule

    @property
    def pays_contracts(self) -> bool:
        """Return whether a transfer can go to a smart contract or to the zero address."""
        rule = self.rule_for(TRANSFER_ACTION)
        return rule is not None and rule.smart_contracts

    def action(self, name: str) -> Action | BuiltIn | None:
        """Return the definition of an action; None for an action that the policy does not define."""
        return BUILT_IN.get(name) or self.actions.get(name)

    def members(self, group: str | None) -> frozenset[str] | None:
        """Return the subjects of a group; None without a group. A group that does not exist has no members."""
        return None if group is None else frozenset(self.groups.get(group, ()))

    def reduced(self, action: str) -> Policy:
        """Return the policy with only the parts that a decision on `action` reads."""
        rule = self.rules.get(action)
        return self.model_copy(
            update={
                "rules": {} if rule is None else {action: rule},
                "actions": {action: self.actions[action]} if action in self.actions else {},
                "groups": {name: self.groups[name] for name in groups_of(rule) if name in self.groups},
            }
        )


class PolicyDocument(BaseModel):
    """A version of the policy in format 1.

    Attributes
    ----------
    format
        Of the document; a verifier refuses one that it does not know.
    version
        1, 2, 3 …; a number that was proposed is not used again.
    proposed_by
        The proposing operator; none for version 1.
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
        """Create the document of a new version.

        Raises
        ------
        InvalidInputError
            More than 200 rules, a malformed action type, an allowed address that no transfer can use, or a
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
        """Parse a document. Raises ValueError if it is malformed, or has an unknown format."""
        return cls.model_validate_json(text)

    def text(self) -> str:
        """Return the canonical text (RFC 8785) with every field of every rule; null means no limit."""
        return canonical_json(self.model_dump(mode="json"))


class PolicyDocumentV2(BaseModel):
    """A version of the policy in format 2: actions, groups, and rules with tiers and limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    version: int = Field(ge=1, lt=10**9, strict=True)
    proposed_by: str | None = None
    based_on: str | None = Field(None, pattern=POLICY_ID_PATTERN)
    roots: tuple[Any, ...] = Field((), max_length=0, description="only empty: keys that enrol others do not exist yet")
    signed_operations: tuple[Any, ...] = Field((), max_length=0, description="only empty: see `roots`")
    groups: Groups = {}
    actions: Actions = {}
    rules: ActionRules

    @field_validator("groups")
    @classmethod
    def _are_subjects(cls, groups: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, members in groups.items():
            for index, subject in enumerate(members):
                _check_subject(subject, f"groups.{name}.{index}")
            if len(set(members)) != len(members):
                raise InvalidInputError("a subject appears twice", field=f"groups.{name}")
        return groups

    @classmethod
    def write(
        cls,
        content: Mapping[str, Any],
        *,
        version: int,
        proposed_by: str | None = None,
        based_on: str | None = None,
    ) -> PolicyDocumentV2:
        """Create the document of a new version from its members `groups`, `actions` and `rules`.

        Raises
        ------
        InvalidInputError
            A member is not as the format defines it; `field` is its path.
        """
        head = {"format": 2, "version": version, "proposed_by": proposed_by, "based_on": based_on}
        return cls.make(head | dict(content))

    @classmethod
    def make(cls, value: object) -> PolicyDocumentV2:
        """Check a parsed document. Raises InvalidInputError, whose `field` is a path in the document."""
        check_values(value)
        try:
            document = cls.model_validate(value)
        except ValidationError as error:
            raise invalid_input(error) from error
        if len(document.text().encode()) > MAX_DOCUMENT_V2_BYTES:
            raise InvalidInputError(f"a policy document has at most {MAX_DOCUMENT_V2_BYTES} bytes", field="rules")
        check_consistent(document.groups, document.actions, document.rules)
        return document

    @classmethod
    def read(cls, text: str) -> PolicyDocumentV2:
        """Read a document's text, which must be the one that `text` returns. Raises InvalidInputError."""
        document = cls.make(parse_strictly(text))
        if document.text() != text:
            raise InvalidInputError("is not canonical JSON (RFC 8785) with every member of the format")
        return document

    def text(self) -> str:
        """Return the document's canonical text (RFC 8785), in which every member is present."""
        return canonical_json(self.model_dump(mode="json"))


def _check_subject(subject: str, field: str) -> None:
    try:
        normal = normal_subject(subject)
    except ValueError as error:
        raise InvalidInputError(f"is not a subject: {error}", field=field) from None
    if normal != subject:
        raise InvalidInputError("is not in Unicode NFC, or begins or ends with a space", field=field)


def parse_strictly(text: str) -> Any:
    """Parse JSON that has one meaning: no name twice, no number but integers. Raises InvalidInputError."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise InvalidInputError(f"the name `{name}` appears twice in one object")
            found[name] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=members, parse_float=_NoInteger, parse_constant=_NoInteger)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"is not JSON: {error}") from error
    for path, inner in _walk(value):
        if isinstance(inner, _NoInteger):
            flaw = f"`{inner.token}` is not an integer: write integers without a fraction or an exponent"
            raise InvalidInputError(flaw, field=".".join(path) or None)
    return value


@dataclass(frozen=True)
class _NoInteger:
    """Placeholder in a parsed text for a number that is not an integer."""

    token: str


def check_values(value: object) -> None:
    """Check each text and each number of a parsed document, wherever it stands. Raises InvalidInputError."""
    for path, inner in _walk(value):
        if flaw := _flaw_of(inner, len(path)):
            raise InvalidInputError(flaw, field=".".join(path) or None)


def _walk(value: object) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield each value inside a value with its path, outer values before inner ones, as they are written."""
    left: list[tuple[tuple[str, ...], object]] = [((), value)]
    while left:
        path, each = left.pop()
        yield path, each
        if isinstance(each, Mapping):
            left.extend(((*path, str(name)), inner) for name, inner in reversed(list(each.items())))
        elif isinstance(each, list | tuple):
            left.extend(((*path, str(index)), each[index]) for index in reversed(range(len(each))))


def _flaw_of(value: object, depth: int) -> str | None:
    if depth > MAX_DEPTH:
        return f"is nested deeper than {MAX_DEPTH} levels"
    if isinstance(value, str):
        return text_flaw(value)
    if isinstance(value, Mapping):
        return next((f"a name in it {flaw}" for name in value if (flaw := text_flaw(name))), None)
    if isinstance(value, float):
        return "must be an integer, written without a fraction or an exponent"
    if type(value) is int and abs(value) > MAX_INTEGER:
        return "must not be beyond 2^53 - 1"
    return None


def read_document(text: str) -> PolicyDocument | PolicyDocumentV2:
    """Parse a document of either format. Raises ValueError if it is malformed."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.get("format") != 2:
        return PolicyDocument.read(text)
    try:
        return PolicyDocumentV2.read(text)
    except InvalidInputError as error:
        raise ValueError(f"{error.field or 'PolicyDocument'}: {error.message}") from error


def policy_of(text: str) -> Policy:
    """Return the policy of a document's text.

    The hash is the hash of the given text, not of a text in the current form. Raises ValueError.
    """
    document = read_document(text)
    return Policy(
        policy_id=policy_id_of(document.version, sha256_hex(text)),
        version=document.version,
        format=document.format,
        rules=dict(document.rules),
        groups=document.groups if isinstance(document, PolicyDocumentV2) else {},
        actions=document.actions if isinstance(document, PolicyDocumentV2) else {},
    )
