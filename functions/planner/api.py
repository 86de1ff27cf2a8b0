"""HTTP API of the planner: previews of plans, and stored plans."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Depends
from pydantic import BaseModel, Field

from planner import explaining, previews, replay
from qaes.adapters import settings, transfers
from qaes.adapters.health import add_health, tasks_table_answers
from qaes.adapters.http import Caller, PlanId, create_app, make_handler, require
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_repository import TaskStore
from qaes.domain import compliance, planning
from qaes.domain.errors import NotFoundError
from qaes.domain.ids import is_plan_id, is_task_id, new_plan_id, now, timestamp
from qaes.domain.models import Plan, Task
from qaes.domain.requests import PlanRequest, check_destination
from qaes.domain.ruling import Ruling, rule

app = create_app("planner")
handler = make_handler(app)
add_health(
    app,
    "/planner/health",
    {
        "tasks_table": tasks_table_answers,
        "previews_table": previews.table_answers,
        "ledger": lambda: LedgerClient().health(),
    },
)


explaining.add_explaining_routes(app)
replay.add_replay_route(app)


class PlanAnswer(Plan):
    """A plan, and its hash, which approvals of its steps refer to."""

    plan_hash: str


class PlanVerdict(BaseModel):
    """The verdict on a task with this plan if it started now. `step_id` is the step that determines it; null: all.

    Other transfers and a new policy may change it.
    """

    allowed: bool = Field(description="false: the task would be denied")
    verdict: Literal["execute", "await_approval", "denied"]
    step_id: str | None
    reason: str
    approvals: int = Field(description="number of people who would have to approve")


class PreviewAnswer(PlanAnswer):
    """A plan that is not executed, and the verdict on its task."""

    verdict: PlanVerdict


@app.post("/plan/create")
def create_plan(body: PlanRequest, caller: Annotated[Caller, Depends(require("requester"))]) -> PreviewAnswer:
    """Create a plan with the planner's nodes, without executing it. It is stored for 30 days, without the verdict."""
    store = TaskStore()
    if body.task_id is not None and not _may_see_task(store, body.task_id, caller):
        raise NotFoundError("no such task", field="task_id")
    ledger, action = LedgerClient(), planning.action_type(body.task_type)
    policy = ledger.policy()
    parameters = body.resolved(settings.text("QUBIC_NETWORK"), operators=action in policy.actions)
    check_destination(policy, action, parameters)
    plan_id, moment = new_plan_id(), timestamp(now())
    task = Task(
        task_id=body.task_id or plan_id,  # nothing else has this id
        status="pending",
        task_type=body.task_type,
        description=body.description,
        parameters=parameters,
        requester=caller.subject,
        agent=caller.agent,
        created_at=moment,
        updated_at=moment,
    )
    ruling = rule(task, policy, policy)
    plan = planning.build_plan(
        plan_id=plan_id,
        task_id=body.task_id,
        created_at=moment,
        task_type=body.task_type,
        description=body.description,
        parameters=parameters,
        analysis=planning.analyze(body.task_type, policy),
        policy=ruling.recorded,
    )
    verdict = _verdict(ledger, task, plan, ruling)
    previews.save(plan)
    return PreviewAnswer(**dict(_answer(plan)), verdict=verdict)


@app.get("/plan/{plan_id}")
def get_plan(
    plan_id: PlanId, caller: Annotated[Caller, Depends(require("requester", "approver", "auditor"))]
) -> PlanAnswer:
    """Return a plan. The plan of a task that the caller cannot see returns 404."""
    store = TaskStore()
    if not is_plan_id(plan_id):
        raise NotFoundError("no such plan", field="plan_id")
    plan = previews.get(plan_id) or store.get_plan(plan_id)
    if plan.task_id is not None and not _may_see_task(store, plan.task_id, caller):
        raise NotFoundError("no such plan", field="plan_id")
    return _answer(plan)


def _verdict(ledger: LedgerClient, task: Task, plan: Plan, ruling: Ruling) -> PlanVerdict:
    """Return the compliance agent's verdict, with the ledger's checks from before and after an approval."""
    action = plan.steps[-1]
    funds = transfers.Funds()
    if compliance.refusal_at_start(ruling) is None:
        funds = transfers.funds_of(ledger, action, task.requester, task.agent)
    usage = transfers.usage_of(action, ruling, funds)
    step, verdict = compliance.preview(task, plan, ruling, usage)
    reason = verdict.reason
    if verdict.verdict != "denied":
        refusal_today = funds.refusal_today or ruling.refusal_by_usage(usage)
        refusal = funds.refusal or (refusal_today if verdict.verdict == "execute" else None)
        if refusal is not None:
            step, verdict, reason = action, compliance.Verdict(verdict="denied", reason=refusal), refusal
        elif refusal_today is not None:
            reason = f"{reason}; after an approval now, it would be denied: {refusal_today}"
    return PlanVerdict(
        allowed=verdict.verdict != "denied",
        verdict=verdict.verdict,
        step_id=step.step_id if step else None,
        reason=reason,
        approvals=verdict.approvals if verdict.verdict == "await_approval" else 0,
    )


def _may_see_task(store: TaskStore, task_id: str, caller: Caller) -> bool:
    if not is_task_id(task_id):
        # Older clients send any word there. It names no task, so nothing is hidden.
        return True
    try:
        return caller.may_see(store.get_task(task_id).requester)
    except NotFoundError:
        return False


def _answer(plan: Plan) -> PlanAnswer:
    return PlanAnswer(**plan.model_dump(), plan_hash=plan.hash())
