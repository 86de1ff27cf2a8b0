"""A format 2 policy for tests: the example of docs/policy.md, and parts of it to change."""

from __future__ import annotations

import copy
from typing import Any

from qaes.domain.canonical import sha256_hex
from qaes.domain.policy import Policy, PolicyDocumentV2, policy_of

POLICY_ID = f"policy-v7-{sha256_hex(str(7))}"
FINANCE = ["fay", "finn", "flora"]

REFUND: dict[str, Any] = {
    "title": "Refund a customer",
    "description": "Pays back an order, in part or in full.",
    "effect": "irreversible",
    "handler": {"type": "lambda", "function_name": "qaes-action-refund"},
    "parameters": {
        "type": "object",
        "required": ["order_id", "amount"],
        "additionalProperties": False,
        "properties": {
            "order_id": {"type": "string", "pattern": "^[0-9]{6}$"},
            "amount": {"type": "integer", "minimum": 1, "maximum": 1000000},
        },
    },
    "result": {"type": "object", "required": ["refund_id"], "properties": {"refund_id": {"type": "string"}}},
    "amount": "/amount",
    "unit": "EUR-cent",
    "destination": "/order_id",
    "sensitive": [],
    "timeout_seconds": 20,
    "result_timeout_seconds": 86400,
    "dry_run": True,
}
REFUND_RULE: dict[str, Any] = {
    "allowed": True,
    "risk_level": "medium",
    "requesters": None,
    "destinations": None,
    "allow_derived": False,
    "smart_contracts": False,
    "tiers": [
        {"max_amount": 10000, "approvals": 0},
        {
            "max_amount": 200000,
            "approvals": 2,
            "approvers": "finance",
            "signature": False,
            "expires_after": 14400,
            "escalate_after": 3600,
            "escalate_to": "cfo",
        },
    ],
    "limits": [
        {"window_seconds": 86400, "max_amount": 500000, "per": "action", "over": "deny"},
        {
            "window_seconds": 3600,
            "max_count": 20,
            "per": "requester",
            "over": {"approvals": 1, "approvers": "finance"},
        },
    ],
}
CONTENT: dict[str, Any] = {
    "groups": {"finance": FINANCE, "cfo": ["carla"]},
    "actions": {"refund_customer": REFUND},
    "rules": {"refund_customer": REFUND_RULE},
}
"""The members of the example that a proposal has."""


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy with another value at a dotted path; a value of `...` removes the member."""
    result = copy.deepcopy(content)
    at: Any = result
    *outer, last = path.split(".")
    for part in outer:
        at = at[int(part)] if isinstance(at, list) else at[part]
    if isinstance(at, list):
        at[int(last)] = value
    elif value is ...:
        del at[last]
    else:
        at[last] = value
    return result


def document(content: dict[str, Any] = CONTENT, version: int = 7) -> PolicyDocumentV2:
    """Return a document of format 2."""
    based_on = f"policy-v{version - 1}-{sha256_hex('before')}" if version > 1 else None
    return PolicyDocumentV2.write(content, version=version, proposed_by="olivia", based_on=based_on)


def policy(content: dict[str, Any] = CONTENT, version: int = 7) -> Policy:
    """Return a policy of format 2."""
    return policy_of(document(content, version).text())


def with_rule(**members: Any) -> dict[str, Any]:
    """Return the example with other members in the rule of the refund."""
    result = copy.deepcopy(CONTENT)
    result["rules"]["refund_customer"] |= members
    return result


def of_limits(action: str, *limits: dict[str, Any], **members: Any) -> Policy:
    """Return a policy that allows one action without an approval, within these limits."""
    rule = {"allowed": True, "risk_level": "high", "tiers": [{"max_amount": None, "approvals": 0}]}
    rules = {action: rule | members | {"limits": list(limits)}}
    groups = CONTENT["groups"]
    return Policy.model_validate({"policy_id": POLICY_ID, "version": 7, "format": 2, "groups": groups, "rules": rules})
