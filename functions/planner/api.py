"""The planner over HTTP: a plan that is not executed, and a stored plan."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends

from qaes.adapters import settings
from qaes.adapters.http import Caller, PlanId, add_health, create_app, make_handler, require, tasks_table_answers
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_store import TaskStore
from qaes.domain import planning
from qaes.domain.errors import NotFoundError
from qaes.domain.ids import is_plan_id, is_task_id, new_plan_id, now, timestamp
from qaes.domain.models import Plan
from qaes.domain.requests import PlanRequest

app = create_app("planner")
handler = make_handler(app)
add_health(app, "/planner/health", {"tasks_table": tasks_table_answers, "ledger": lambda: LedgerClient().health()})


class PlanAnswer(Plan):
    """A plan, and the hash that an approval of its steps is bound to."""

    plan_hash: str


@app.post("/plan/create")
def create_plan(body: PlanRequest, caller: Annotated[Caller, Depends(require("requester"))]) -> PlanAnswer:
    """Make a plan without executing it, by the nodes that plan a task; it is kept for 30 days."""
    store = TaskStore()
    if body.task_id is not None and not _may_see_task(store, body.task_id, caller):
        raise NotFoundError("no such task", field="task_id")
    parameters = body.resolved(settings.text("QUBIC_NETWORK"))
    policy = LedgerClient().policy()
    analysis = planning.analyze(body.task_type, policy)
    plan = planning.build_plan(
        plan_id=new_plan_id(),
        task_id=body.task_id,
        created_at=timestamp(now()),
        task_type=body.task_type,
        description=body.description,
        parameters=parameters,
        analysis=analysis,
        policy=policy.decide(analysis.action_type),
    )
    store.save_preview_plan(plan)
    return _answer(plan)


@app.get("/plan/{plan_id}")
def get_plan(
    plan_id: PlanId, caller: Annotated[Caller, Depends(require("requester", "approver", "auditor"))]
) -> PlanAnswer:
    """Show a plan; the plan of a task that the caller may not see is not there."""
    store = TaskStore()
    plan = store.get_plan(plan_id) if is_plan_id(plan_id) else None
    if plan is None or (plan.task_id is not None and not _may_see_task(store, plan.task_id, caller)):
        raise NotFoundError("no such plan", field="plan_id")
    return _answer(plan)


def _may_see_task(store: TaskStore, task_id: str, caller: Caller) -> bool:
    if not is_task_id(task_id):
        # Older clients put any word there; it names no task, and so hides none.
        return True
    try:
        return caller.may_see(store.get_task(task_id).requester)
    except NotFoundError:
        return False


def _answer(plan: Plan) -> PlanAnswer:
    return PlanAnswer(**plan.model_dump(), plan_hash=plan.hash())
