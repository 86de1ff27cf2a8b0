"""The gateway: starts tasks, shows them, takes decisions.

A conditional write is the commit point of each request. What follows it (starting the execution, resuming it) may fail
without the caller's noticing: the reconciler does what was left undone.
"""

from __future__ import annotations

from typing import Annotated, Any

from botocore.exceptions import BotoCoreError, ClientError
from fastapi import Depends, Header, Response
from pydantic import BaseModel, ConfigDict, StringConstraints

from qaes.adapters.executions import Executions
from qaes.adapters.http import (
    Caller,
    add_health,
    create_app,
    make_handler,
    require,
    state_machine_answers,
    tasks_table_answers,
)
from qaes.adapters.logs import logger
from qaes.adapters.task_store import Idempotency, TaskStore
from qaes.domain.canonical import hash_of
from qaes.domain.errors import ForbiddenError, NotFoundError
from qaes.domain.ids import is_task_id, new_task_id, now, timestamp
from qaes.domain.models import TERMINAL, Approval, Plan, Status, Task
from qaes.domain.policy import RiskLevel
from qaes.domain.requests import TaskRequest

app = create_app("gateway")
handler = make_handler(app)
add_health(app, "/health", {"tasks_table": tasks_table_answers, "state_machine": state_machine_answers})

IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", pattern=r"^[!-~]{1,255}$", description="the same key and body start one task"),
]


class StartAnswer(BaseModel):
    """The task is recorded; it runs by itself."""

    task_id: str
    status: Status
    message: str


class TaskError(BaseModel):
    """Why a task did not complete, and at which step."""

    step_id: str | None
    reason: str


class ApprovalQuestion(BaseModel):
    """What a person is asked to approve: exactly what the hashes stand for, and nothing else, will run."""

    step_index: int
    step_id: str
    step_type: str
    parameters: dict[str, Any]
    action_type: str
    risk_level: RiskLevel
    requester: str
    plan_hash: str
    step_hash: str
    policy_id: str
    requested_at: str
    expires_at: str


class TaskAnswer(BaseModel):
    """A task as it stands."""

    task_id: str
    status: Status
    task_type: str
    description: str
    requester: str
    created_at: str
    updated_at: str
    plan_id: str | None
    current_step: int | None
    requires_approval: bool
    error: TaskError | None
    approval: ApprovalQuestion | None


class DecisionRequest(BaseModel):
    """A decision. Who decides is told by the token alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    approved: bool
    reason: Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000)]


class DecisionAnswer(BaseModel):
    """The decision is recorded."""

    task_id: str
    approved: bool
    message: str


@app.post("/task/start", status_code=202)
def start_task(
    body: TaskRequest,
    caller: Annotated[Caller, Depends(require("requester"))],
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> StartAnswer:
    """Start a task. With an `Idempotency-Key` that was used for the same body, answer with the task of that time."""
    moment = timestamp(now())
    task = Task(
        task_id=new_task_id(),
        status="pending",
        task_type=body.task_type,
        description=body.description,
        parameters=body.resolved(),
        requester=caller.subject,
        created_at=moment,
        updated_at=moment,
    )
    task, replayed = TaskStore().start_task(task, _idempotency(task, idempotency_key))
    if replayed:
        response.headers["Idempotent-Replay"] = "true"
        return StartAnswer(task_id=task.task_id, status=task.status, message="The task had been started already.")
    try:
        Executions().start(task.task_id)
    except (BotoCoreError, ClientError) as error:
        logger().warning("not started yet", extra={"task_id": task.task_id, "error": type(error).__name__})
    return StartAnswer(task_id=task.task_id, status=task.status, message="The task has been accepted.")


@app.get("/task/{task_id}")
def get_task(
    task_id: str, caller: Annotated[Caller, Depends(require("requester", "approver", "auditor"))]
) -> TaskAnswer:
    """Show a task; while it waits for a person, with what is asked."""
    store = TaskStore()
    task = _visible(store, task_id, caller)
    approval = store.open_approval(task_id) if task.status == "waiting_approval" else None
    return TaskAnswer(
        task_id=task.task_id,
        status=task.status,
        task_type=task.task_type,
        description=task.description,
        requester=task.requester,
        created_at=task.created_at,
        updated_at=task.updated_at,
        plan_id=task.plan_id,
        current_step=task.current_step,
        requires_approval=task.requires_approval,
        error=_error(task),
        approval=_question(task, store.plan_of(task), approval) if approval else None,
    )


@app.post("/task/{task_id}/approve")
def decide(
    task_id: str, body: DecisionRequest, caller: Annotated[Caller, Depends(require("approver"))]
) -> DecisionAnswer:
    """Approve or reject what the task waits for, once; 409 when it waits for nothing. Never one's own task."""
    store = TaskStore()
    task = _visible(store, task_id, caller)
    if caller.four_eyes and caller.subject == task.requester:
        raise ForbiddenError("nobody decides on their own task")
    approval = store.decide(task_id, approved=body.approved, subject=caller.subject, reason=body.reason)
    try:
        Executions().deliver(approval)
    except (BotoCoreError, ClientError) as error:
        logger().warning("not delivered yet", extra={"task_id": task_id, "error": type(error).__name__})
    return DecisionAnswer(task_id=task_id, approved=body.approved, message=f"The step has been {approval.status}.")


def _idempotency(task: Task, key: str | None) -> Idempotency | None:
    if key is None:
        return None
    asked_for = task.model_dump(mode="json", include={"task_type", "description", "parameters"})
    return Idempotency(subject=task.requester, key=key, body_hash=hash_of(asked_for))


def _visible(store: TaskStore, task_id: str, caller: Caller) -> Task:
    """Read a task; one that the caller may not see is not there."""
    task = store.get_task(task_id) if is_task_id(task_id) else None
    if task is None or not caller.may_see(task.requester):
        raise NotFoundError("no such task", field="task_id")
    return task


def _error(task: Task) -> TaskError | None:
    if task.status not in TERMINAL or task.status == "completed":
        return None
    return TaskError(step_id=task.failed_step, reason=task.reason or task.status)


def _question(task: Task, plan: Plan, approval: Approval) -> ApprovalQuestion:
    step = plan.steps[approval.step_index]
    return ApprovalQuestion(
        step_index=approval.step_index,
        step_id=step.step_id,
        step_type=step.type,
        parameters=step.parameters,
        action_type=plan.analysis.action_type,
        risk_level=plan.policy.risk_level,
        requester=task.requester,
        plan_hash=approval.plan_hash,
        step_hash=approval.step_hash,
        policy_id=approval.policy_id,
        requested_at=approval.requested_at,
        expires_at=approval.expires_at,
    )
