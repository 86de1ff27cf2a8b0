"""Complete check of a proposal of a new version, and the resulting document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qaes.domain.errors import InvalidInputError
from qaes.domain.policy.actions import RESERVED, LambdaHandler
from qaes.domain.policy.difference import check_removals
from qaes.domain.policy.document import Policy, PolicyDocument, PolicyDocumentV2, policy_of
from qaes.domain.policy.names import invalid_input
from qaes.domain.policy.rules import Rules, check_enforceable

FUNCTION_PREFIX = "qaes-action-"
"""The prefix of the names of Lambda handlers."""


def is_format_2(content: Mapping[str, Any]) -> bool:
    """Return whether a proposal has format 2, with `groups` or `actions`. With only `rules` it has format 1."""
    return content.get("groups") is not None or content.get("actions") is not None


def propose(
    current: Policy,
    content: Mapping[str, Any],
    *,
    version: int,
    proposed_by: str,
    remove: Sequence[str] = (),
    function_prefix: str = FUNCTION_PREFIX,
) -> PolicyDocument | PolicyDocumentV2:
    """Check a proposal and return its document.

    Parameters
    ----------
    current
        The policy in force, on which the proposal is based.
    content
        `{rules}` in format 1; `{groups, actions, rules}` in format 2.
    remove
        The rules, groups and actions in force that the proposal drops.
    function_prefix
        The prefix of the functions that may handle actions.

    Raises
    ------
    InvalidInputError
        A member is not acceptable; `field` is its path, such as `rules.refund_customer.tiers.1.max_amount`.
    """
    terms: dict[str, Any] = {"version": version, "proposed_by": proposed_by, "based_on": current.policy_id}
    document: PolicyDocument | PolicyDocumentV2
    if is_format_2(content):
        members = {name: content[name] for name in ("groups", "actions", "rules") if content.get(name) is not None}
        document = PolicyDocumentV2.write(members, **terms)
        check_actions(document, function_prefix)
    else:
        rules = _format_1_rules(content.get("rules"))
        document = PolicyDocument.write(rules, **terms)
        check_enforceable(rules)
    check_removals(current, document, remove)
    return document


def read_policy(value: object, function_prefix: str = FUNCTION_PREFIX) -> Policy:
    """Check a parsed policy file, and return its policy: a document of either format, or the body of a proposal.

    A proposal's `based_on` and `remove` are not read: they are for a running system. Raises InvalidInputError.
    """
    if not isinstance(value, Mapping):
        raise InvalidInputError("a policy must be an object")
    content = {name: inner for name, inner in value.items() if name not in {"based_on", "remove", "proposed_by"}}
    format_ = content.pop("format", 2 if is_format_2(content) else 1)
    version = content.pop("version", 1)
    document: PolicyDocument | PolicyDocumentV2
    if format_ == 2:
        document = PolicyDocumentV2.make({"format": 2, "version": version, **content})
        check_actions(document, function_prefix)
    else:
        for name in content.keys() - {"rules"}:
            raise InvalidInputError("format 1 has no such member", field=str(name))
        rules = _format_1_rules(content.get("rules"))
        check_enforceable(rules)
        document = PolicyDocument.write(rules, version=1)
    return policy_of(document.text())


def check_actions(document: PolicyDocumentV2, function_prefix: str = FUNCTION_PREFIX) -> None:
    """Check the requirements for new versions only: schemas, pointers, the names of actions and of functions.

    Raises InvalidInputError.
    """
    from qaes.domain.policy.schemas import check_schemas, check_value

    for name, action in document.actions.items():
        if (twin := _spelling(name)) in RESERVED:
            # An approver would take one for the other.
            text = f"`{name}` looks like the built-in action `{twin}`: choose another name"
            raise InvalidInputError(text, field=f"actions.{name}")
        if isinstance(action.handler, LambdaHandler) and not action.handler.function_name.startswith(function_prefix):
            text = f"must begin with `{function_prefix}`, the prefix of this system's action functions"
            raise InvalidInputError(text, field=f"actions.{name}.handler.function_name")
        check_schemas(name, action)
        rule = document.rules.get(name)
        if rule is None or rule.destinations is None or action.destination is None:
            continue
        schema: Any = action.parameters
        for part in action.destination.split("/")[1:]:
            schema = schema["properties"][part.replace("~1", "/").replace("~0", "~")]
        for index, destination in enumerate(rule.destinations):
            check_value(schema, destination, f"rules.{name}.destinations.{index}")


def _spelling(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")


def _format_1_rules(rules: object) -> Rules:
    for name, rule in rules.items() if isinstance(rules, Mapping) else ():
        if isinstance(rule, Mapping) and "tiers" in rule:
            text = "format 1 has no tiers: add `groups` or `actions`, even empty, to propose a policy of format 2"
            raise InvalidInputError(text, field=f"rules.{name}.tiers")
    try:
        return TypeAdapter(Rules).validate_python(rules)
    except ValidationError as error:
        raise invalid_input(error, "rules") from error
