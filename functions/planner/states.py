"""The planner's state PlanTask: three nodes and a check, in sequence, in one transaction."""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters.handlers import state
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import note
from qaes.adapters.task_repository import TaskStore
from qaes.domain import compliance, planning
from qaes.domain.ids import new_plan_id, now, timestamp
from qaes.domain.models import TERMINAL, Analysis, Plan, Task
from qaes.domain.policy import PolicyDecision
from qaes.domain.ruling import rule
from qaes.domain.tasks import lifecycle


@state("PlanTask")
def plan_task(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """`{task_id, execution?}` → `{allowed, nodes, steps, action?}`. The plan itself is stored.

    `steps` are the plain steps to run. `action` is the last step if it has an effect, needs an approval, or has already
    succeeded. A repeated call, or a retry of the task, uses the stored plan and omits the steps that succeeded.
    """
    store = TaskStore()
    task = store.get_task(str(event["task_id"]))
    lifecycle.refuse_other_execution(task, event.get("execution"))
    if task.plan_id is None and task.status not in TERMINAL:
        policy = LedgerClient().policy()
        analysis, ruling = planning.analyze(task.task_type, policy), rule(task, policy, policy)
        if refusal := compliance.refusal_at_start(ruling):
            task = store.deny_task(task, analysis, ruling.recorded, reason=refusal)
        else:
            task, plan = store.plan_task(task, _build(task, analysis, ruling.recorded))
            return _planned(store, task, plan, is_new=True)
    if task.plan_id is None or task.status in TERMINAL:
        note(outcome=task.status, policy_id=task.policy_id)
        return {"allowed": False, "status": task.status, "policy_id": task.policy_id, "nodes": []}
    return _planned(store, task, store.plan_of(task), is_new=False)


def _build(task: Task, analysis: Analysis, decision: PolicyDecision) -> Plan:
    return planning.build_plan(
        plan_id=new_plan_id(),
        task_id=task.task_id,
        created_at=timestamp(now()),
        task_type=task.task_type,
        description=task.description,
        parameters=task.parameters,
        analysis=analysis,
        policy=decision,
    )


def _planned(store: TaskStore, task: Task, plan: Plan, *, is_new: bool) -> dict[str, Any]:
    planning.check_plan(plan, task.task_id)
    compliance.check_same_plan(task, plan)
    note(outcome="allowed", policy_id=plan.policy.policy_id)
    records = {} if is_new else store.records(task.task_id)
    left = [index for index in range(len(plan.steps)) if not lifecycle.has_succeeded(records, index)]
    last = len(plan.steps) - 1
    acts = not planning.is_plain(plan.steps[last]) or not left
    answer: dict[str, Any] = {
        "allowed": True,
        "nodes": _nodes(plan),
        "steps": [_reference(plan, index) for index in left if index != last or not acts],
    }
    return answer | ({"action": _reference(plan, last)} if acts else {})


def _nodes(plan: Plan) -> list[dict[str, Any]]:
    """Return the outcome of each node, for the console of Step Functions."""
    decision = plan.policy.model_dump(mode="json", include={"policy_id", "allowed", "requires_approval", "approvals"})
    return [
        {"node": "analyze_task", "result": plan.analysis.model_dump(mode="json")},
        {"node": "policy_check", "result": decision},
        {"node": "plan_builder", "result": {"plan_id": plan.plan_id, "plan_hash": plan.hash()}},
        {"node": "validate_plan", "result": {"steps": len(plan.steps)}},
    ]


def _reference(plan: Plan, index: int) -> dict[str, Any]:
    return {"step_index": index, "step_id": plan.steps[index].step_id, "step_type": plan.steps[index].type}
