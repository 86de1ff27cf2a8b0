"""Puts a policy of format 2 in force, as two operators do, on the ledger of a test's cloud."""

from __future__ import annotations

import time
from typing import Any

from qubic import wiring
from tests.support.cloud import Cloud, call

GROUPS = {"finance": ["bob", "carol", "dora"], "cfo": ["dora", "erin"]}


def publish(aws: Cloud, rules: dict[str, Any], *, groups: Any = None, actions: Any = None) -> str:
    """Have a version come into force; returns its id. The test has the environment of QubicApiFunction."""
    content = {"rules": rules, "groups": GROUPS if groups is None else groups, "actions": actions or {}}
    policies = wiring.policies()
    current = policies.in_force()
    dropped = {name for kind, kept in content.items() for name in getattr(current, kind) if name not in kept}
    proposed = policies.propose(**content, subject="olivia", remove=sorted(dropped))
    policies.approve(proposed.version, subject="oscar", four_eyes=True)
    deadline = time.monotonic() + 20
    while in_force() != proposed.policy_id and time.monotonic() < deadline:
        if not aws.machine_arn:
            aws.settle()  # elsewhere, ticks pass by themselves
        time.sleep(0.02)
    assert in_force() == proposed.policy_id
    return proposed.policy_id


def in_force() -> str:
    """Return the id of the policy in force."""
    return str(call("LedgerFunction", {"operation": "policy"})["result"]["policy_id"])
