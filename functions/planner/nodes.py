"""The planner's three nodes, each a state of the state machine: analyze_task, check_policy, build_plan."""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import TASK_ID, logger
from qaes.adapters.task_store import TaskStore
from qaes.domain import planning
from qaes.domain.errors import InvalidInputError
from qaes.domain.ids import new_plan_id, now, timestamp
from qaes.domain.models import Analysis
from qaes.domain.policy import PolicyDecision


@logger().inject_lambda_context(correlation_id_path=TASK_ID)
def analyze_task(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """What kind of action does the task ask for? `{task_id}` → `{analysis}`."""
    task = TaskStore().begin_planning(event["task_id"])
    analysis = planning.analyze(task.task_type, LedgerClient().policy())
    return {"analysis": analysis.model_dump(mode="json")}


@logger().inject_lambda_context(correlation_id_path=TASK_ID)
def check_policy(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """May it be done at all? Pins the policy. `{task_id, analysis}` → `{policy}`."""
    analysis = Analysis.model_validate(event["analysis"])
    decision = LedgerClient().policy().decide(analysis.action_type)
    TaskStore().record_policy(event["task_id"], analysis, decision)
    return {"policy": decision.model_dump(mode="json")}


@logger().inject_lambda_context(correlation_id_path=TASK_ID)
def build_plan(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """The typed steps. `{task_id, analysis, policy}` → `{plan_id, plan_hash}`, the same on a retry."""
    store = TaskStore()
    task = store.get_task(event["task_id"])
    policy = PolicyDecision.model_validate(event["policy"])
    if task.plan_id is not None and task.plan_hash is not None:
        return {"plan_id": task.plan_id, "plan_hash": task.plan_hash}
    if task.policy_id != policy.policy_id:
        # A retry of CheckPolicy met a newer policy than the one that is pinned and recorded.
        raise InvalidInputError("the plan's policy is not the one that was recorded", field="policy.policy_id")
    plan = planning.build_plan(
        plan_id=new_plan_id(),
        task_id=task.task_id,
        created_at=timestamp(now()),
        task_type=task.task_type,
        description=task.description,
        parameters=task.parameters,
        analysis=Analysis.model_validate(event["analysis"]),
        policy=policy,
    )
    plan = store.save_plan(task.task_id, plan)
    return {"plan_id": plan.plan_id, "plan_hash": plan.hash()}
