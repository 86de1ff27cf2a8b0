"""From a task to a plan: the three nodes of the planner as pure functions."""

from __future__ import annotations

from typing import Any, Literal

from qaes.domain.errors import ConflictError, InvalidInputError
from qaes.domain.models import Analysis, Plan, Step, Task
from qaes.domain.policy import DENIED, TRANSFER_ACTION, Policy, PolicyDecision
from qaes.domain.policy.actions import ACTION_STEPS, BUILT_IN, action_of, step_of
from qaes.domain.qubic.identity import check_address, check_payable
from qaes.domain.step_types import EFFECT_TYPES, StepType

Effect = Literal["performed", "recorded only"]
"""The effect of a completed action. `recorded only`: only the hash of its instruction is on the ledger."""

RECORDED_ONLY: Effect = "recorded only"
MAX_STEPS = 50


def analyze(task_type: str, policy: Policy) -> Analysis:
    """Return the kind of action and its risk level by the policy."""
    action = action_type(task_type)
    rule = policy.rule_for(action)
    return Analysis(action_type=action, risk_level=rule.risk_level if rule else DENIED.risk_level)


def action_type(task_type: str) -> str:
    """Return the action type of a task type: the policy has rules for action types."""
    return action_of(task_type)


def action_step(task_type: str) -> StepType:
    """Return the type of the step that performs a task of that type."""
    return step_of(action_of(task_type))


def effect_of(step: StepType) -> Effect:
    """Return the effect of a successful step of this type."""
    return RECORDED_ONLY if step == "generic_action" else "performed"


def build_plan(
    *,
    plan_id: str,
    task_id: str | None,
    created_at: str,
    task_type: str,
    description: str,
    parameters: dict[str, Any],
    analysis: Analysis,
    policy: PolicyDecision,
) -> Plan:
    """Build the plan: `check_balance` (if the task has a wallet), `policy_check`, then the action.

    Raises
    ------
    InvalidInputError
        A required parameter is missing, or is an address that a transfer cannot use; `field` names it.
    """
    steps: list[tuple[StepType, dict[str, Any]]] = []
    wallet = parameters.get("wallet_address")
    if wallet is not None:
        steps.append(("check_balance", {"wallet_address": wallet}))
    steps.append(("policy_check", {"action_type": analysis.action_type, "policy_id": policy.policy_id}))
    values = _action_parameters(analysis.action_type, task_type, description, parameters)
    steps.append((step_of(analysis.action_type), values))
    return Plan(
        plan_id=plan_id,
        task_id=task_id,
        created_at=created_at,
        analysis=analysis,
        policy=policy,
        steps=tuple(
            Step(
                step_id=f"step_{number}",
                type=type_,
                # Only the policy and the step's type determine this, never a planner.
                requires_approval=step_requires_approval(type_, policy),
                parameters=values,
            )
            for number, (type_, values) in enumerate(steps, start=1)
        ),
    )


def is_plain(step: Step) -> bool:
    """Return whether a step only reads and needs no approval by the plan: RunStep runs it."""
    return step.type not in EFFECT_TYPES and not step.requires_approval


def step_requires_approval(type_: StepType, policy: PolicyDecision) -> bool:
    """Whether the policy requires an approval of a step of this type."""
    return policy.requires_approval and can_require_approval(type_)


def can_require_approval(type_: StepType) -> bool:
    """Whether a step of this type is the action itself, of which people may have to approve."""
    return type_ in ACTION_STEPS


def _action_parameters(action: str, task_type: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    takes = BUILT_IN[action].takes if action in BUILT_IN else None
    if takes is None:
        return {"task_type": task_type, "description": description, "parameters": parameters}
    if action == TRANSFER_ACTION:
        for field in BUILT_IN[action].needs:
            if field not in parameters:
                raise InvalidInputError(f"a transfer requires {field}", field=f"parameters.{field}")
        check_payable(parameters["wallet_address"], "parameters.wallet_address")
        check_address(parameters["to_address"], "parameters.to_address")
    return {name: parameters.get(given) for name, given in takes.items()}


def check_follows(plan: Plan, task: Task) -> None:
    """Check that a stored plan follows from the task's request, because roles without decision rights can write plans.

    Raises ConflictError if it differs.
    """
    made = build_plan(
        plan_id=plan.plan_id,
        task_id=task.task_id,
        created_at=plan.created_at,
        task_type=task.task_type,
        description=task.description,
        parameters=task.parameters,
        analysis=plan.analysis,
        policy=plan.policy,
    )
    if made != plan or plan.analysis.action_type != action_type(task.task_type):
        raise ConflictError("the plan does not follow from the request", field="plan")


def check_plan(plan: Plan, task_id: str) -> None:
    """Check that a plan may be executed for this task.

    Raises
    ------
    InvalidInputError
        It belongs to another task, has no or too many steps or a repeated step id, or requires fewer approvals than its
        policy; it transfers money under the rule of another action; or a step before its last one is not plain.
    """
    if plan.task_id != task_id:
        raise InvalidInputError("the plan belongs to another task", field="plan.task_id")
    if not 1 <= len(plan.steps) <= MAX_STEPS:
        raise InvalidInputError(f"a plan must have 1 to {MAX_STEPS} steps", field="plan.steps")
    if len({step.step_id for step in plan.steps}) != len(plan.steps):
        raise InvalidInputError("the step ids must be different", field="plan.steps")
    if not plan.policy.allowed or plan.policy.action_type != plan.analysis.action_type:
        raise InvalidInputError("the pinned policy does not allow this plan", field="plan.policy")
    for number, step in enumerate(plan.steps):
        if step.type == "onchain_action" and plan.policy.action_type != TRANSFER_ACTION:
            raise InvalidInputError(
                f"only a plan for {TRANSFER_ACTION} can transfer money", field=f"plan.steps.{number}"
            )
        if step_requires_approval(step.type, plan.policy) and not step.requires_approval:
            raise InvalidInputError("the policy requires an approval for this step", field=f"plan.steps.{number}")
        if number < len(plan.steps) - 1 and not is_plain(step):
            raise InvalidInputError(
                "only the last step can have an effect or need an approval", field=f"plan.steps.{number}"
            )
