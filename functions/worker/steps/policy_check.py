"""policy_check: what does the policy in force say of this action?"""

from __future__ import annotations

from typing import Any

from worker.steps.context import StepContext


def run(parameters: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """`{action_type, policy_id}` → the decision of the policy in force, and whether it is the pinned one."""
    decision = context.policy.decide(parameters["action_type"])
    return decision.model_dump(mode="json") | {"pinned": decision.policy_id == parameters["policy_id"]}
