"""Whether the parts of a format 2 document fit together: rules, actions, groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qaes.domain.errors import InvalidInputError
from qaes.domain.policy.actions import BUILT_IN, RESERVED, Action, BuiltIn
from qaes.domain.policy.names import TRANSFER_ACTION
from qaes.domain.policy.rules import ActionRule, Limit, named_groups
from qaes.domain.qubic import MAX_QU
from qaes.domain.qubic.identity import check_address, check_payable
from qaes.domain.text import normal_subject

MAX_DESTINATION_LENGTH = 256
_CLIENT_LENGTH = 256

Groups = Mapping[str, tuple[str, ...]]


def check_consistent(groups: Groups, actions: Mapping[str, Action], rules: Mapping[str, ActionRule]) -> None:
    """Check that each rule is for an action, that it fits the action, and that its groups exist and are large enough.

    Raises
    ------
    InvalidInputError
        `field` is the path of the member that does not fit.
    """
    for name in actions:
        if name in RESERVED:
            raise InvalidInputError(
                f"`{name}` is a built-in action, which cannot be redefined", field=f"actions.{name}"
            )
    for name, rule in rules.items():
        action = BUILT_IN.get(name) or actions.get(name)
        if action is None:
            raise InvalidInputError(f"no action has the name `{name}`: define it in `actions`", field=f"rules.{name}")
        path = f"rules.{name}"
        _check_groups(rule, groups, path)
        _check_requesters(rule, path)
        _check_amounts(name, action, rule, path)
        _check_destinations(name, action, rule, path)
        for index, limit in enumerate(rule.limits):
            _check_limit(action, limit, f"{path}.limits.{index}")
        if rule.smart_contracts and name != TRANSFER_ACTION:
            text = f"only `{TRANSFER_ACTION}` moves QU: leave it false"
            raise InvalidInputError(text, field=f"{path}.smart_contracts")


def _check_groups(rule: ActionRule, groups: Groups, path: str) -> None:
    for place, named in named_groups(rule):
        if named not in groups:
            raise InvalidInputError(f"there is no group `{named}`: define it in `groups`", field=f"{path}.{place}")
    requirements: list[tuple[str, int, str | None]] = [
        (f"tiers.{index}", tier.approvals, tier.approvers) for index, tier in enumerate(rule.tiers)
    ]
    requirements += [
        (f"limits.{index}.over", limit.over.approvals, limit.over.approvers)
        for index, limit in enumerate(rule.limits)
        if limit.over != "deny"
    ]
    for place, approvals, group in requirements:
        if group is not None and len(groups[group]) < approvals:
            text = (
                f"the group `{group}` has {len(groups[group])} members, fewer than the {approvals} approvals required"
            )
            raise InvalidInputError(text, field=f"{path}.{place}.approvals")


def _check_requesters(rule: ActionRule, path: str) -> None:
    for index, requester in enumerate(rule.requesters or ()):
        field = f"{path}.requesters.{index}"
        kind, colon, value = requester.partition(":")
        if kind not in {"user", "group", "agent"} or not colon or not value:
            text = "must be `user:<subject>`, `group:<name>` or `agent:<client id>`"
            raise InvalidInputError(text, field=field)
        if kind == "user":
            try:
                is_normal = normal_subject(value) == value
            except ValueError:
                is_normal = False
            if not is_normal:
                raise InvalidInputError("is not a subject in Unicode NFC", field=field)
        if kind == "agent" and len(value) > _CLIENT_LENGTH:
            raise InvalidInputError(f"a client id has at most {_CLIENT_LENGTH} characters", field=field)


def _check_amounts(name: str, action: Action | BuiltIn, rule: ActionRule, path: str) -> None:
    if action.amount is None and (len(rule.tiers) > 1 or rule.tiers[0].max_amount is not None):
        text = "the action has no amount: it has exactly one tier, whose `max_amount` is null"
        raise InvalidInputError(text, field=f"{path}.tiers")
    if name in BUILT_IN:
        for index, tier in enumerate(rule.tiers):
            if tier.max_amount is not None and tier.max_amount > MAX_QU:
                raise InvalidInputError(f"must be at most {MAX_QU} QU", field=f"{path}.tiers.{index}.max_amount")
    counted = any(limit.counts == "count" for limit in rule.limits)
    if rule.allowed and action.effect != "none" and action.amount is None and not counted:
        text = "an action with an effect and without an amount needs a limit with `max_count`"
        raise InvalidInputError(text, field=f"{path}.limits")


def _check_destinations(name: str, action: Action | BuiltIn, rule: ActionRule, path: str) -> None:
    if rule.destinations is not None and action.destination is None:
        raise InvalidInputError("the action has no destination: leave it null", field=f"{path}.destinations")
    for index, destination in enumerate(rule.destinations or ()):
        field = f"{path}.destinations.{index}"
        if len(destination) > MAX_DESTINATION_LENGTH:
            raise InvalidInputError(f"must have at most {MAX_DESTINATION_LENGTH} characters", field=field)
        if name in BUILT_IN:
            check: Any = check_address if rule.smart_contracts else check_payable
            if check(destination, field) != destination:
                raise InvalidInputError(f"must be written as `{check(destination)}`", field=field)


def _check_limit(action: Action | BuiltIn, limit: Limit, path: str) -> None:
    if limit.counts == "amount" and action.amount is None:
        raise InvalidInputError("the action has no amount: set `max_count`", field=f"{path}.max_amount")
    if limit.per in {"source", "destination"} and getattr(action, limit.per) is None:
        raise InvalidInputError(f"the action has no {limit.per}", field=f"{path}.per")
