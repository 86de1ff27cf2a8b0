"""The planner's three nodes, each a state of the state machine: analyze_task, check_policy, build_plan."""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters.handlers import state
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import note
from qaes.adapters.task_store import TaskStore
from qaes.domain import planning
from qaes.domain.errors import InvalidInputError, UnavailableError
from qaes.domain.ids import new_plan_id, now, timestamp
from qaes.domain.models import Analysis
from qaes.domain.policy import Policy, PolicyDecision, policy_of


@state("AnalyzeTask")
def analyze_task(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """What kind of action does the task ask for? `{task_id}` → `{analysis}`."""
    task = TaskStore().begin_planning(event["task_id"])
    analysis = planning.analyze(task.task_type, LedgerClient().policy())
    return {"analysis": analysis.model_dump(mode="json")}


@state("CheckPolicy")
def check_policy(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """May it be done at all? Pins the policy. `{task_id, analysis}` → `{analysis, policy}`, both by the same policy.

    The policy may have changed since the analysis was made. What an attempt, or an execution, before has pinned stays.
    """
    store, ledger = TaskStore(), LedgerClient()
    task = store.get_task(event["task_id"])
    if task.plan_id is not None:  # a retry goes on with the plan, which has both
        plan = store.plan_of(task)
        return _checked(plan.analysis, plan.policy)
    policy = _pinned(ledger, task.policy_id) if task.policy_id is not None else ledger.policy()
    decision = policy.decide(Analysis.model_validate(event["analysis"]).action_type)
    analysis = Analysis(action_type=decision.action_type, risk_level=decision.risk_level)
    task = store.record_policy(task.task_id, analysis, decision)
    if task.policy_id not in {None, decision.policy_id}:
        raise UnavailableError("another attempt has pinned another policy")  # the next attempt goes by that one
    return _checked(analysis, decision)


def _checked(analysis: Analysis, decision: PolicyDecision) -> dict[str, Any]:
    note(outcome="allowed" if decision.allowed else "denied", policy_id=decision.policy_id)
    return {"analysis": analysis.model_dump(mode="json"), "policy": decision.model_dump(mode="json")}


def _pinned(ledger: LedgerClient, policy_id: str) -> Policy:
    """The policy that is on record for the task, by its document: its id names the document's hash."""
    policy = policy_of(ledger.policy_document(policy_id)["text"])
    if policy.policy_id != policy_id:
        raise InvalidInputError("the document is not the one that was pinned", field="policy_id")
    return policy


@state("BuildPlan")
def build_plan(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """The typed steps. `{task_id, analysis, policy}` → `{plan_id, plan_hash}`, the same on a retry."""
    store = TaskStore()
    task = store.get_task(event["task_id"])
    policy = PolicyDecision.model_validate(event["policy"])
    if task.plan_id is not None and task.plan_hash is not None:
        return {"plan_id": task.plan_id, "plan_hash": task.plan_hash}
    if task.policy_id != policy.policy_id:
        # It was not pinned (the task had ended); nothing is planned by what is not on record.
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
