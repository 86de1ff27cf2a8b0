"""HTTP API of the agent runtime: the progress of a task's execution."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Depends
from pydantic import BaseModel, Field

from qaes.adapters.health import add_health, state_machine_answers, tasks_table_answers
from qaes.adapters.http import Caller, TaskId, create_app, make_handler, require
from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import NotFoundError
from qaes.domain.ids import is_task_id
from qaes.domain.models import TERMINAL, Status, Step, StepRecord, StepStatus, Task
from qaes.domain.planning import Effect, effect_of
from qaes.domain.step_types import CONFIRMED_LATER, StepType

app = create_app("agent-runtime")
handler = make_handler(app)
add_health(app, "/agent-runtime/health", {"tasks_table": tasks_table_answers, "state_machine": state_machine_answers})


class StepState(BaseModel):
    """A step of the plan, and its outcome; `skipped` if the task ended before it."""

    step_id: str
    type: StepType
    status: StepStatus | Literal["waiting_approval", "skipped"]
    result: dict[str, Any] | None
    error: str | None
    requires_approval: bool
    attempt: int
    duration_ms: int | None
    effect: Effect = Field(
        description="effect of the step if it succeeds; `recorded only`: the system performs nothing"
    )


class ExecutionAnswer(BaseModel):
    """A task's execution. `current_step` counts from 0; `total_steps` is 0 before the task has a plan.

    `reason` is the reason for the end of a task that did not complete.
    """

    task_id: str
    status: Status
    current_step: int
    total_steps: int
    steps: list[StepState]
    requires_approval: bool
    reason: str | None


@app.get("/task/{task_id}/status")
def get_status(
    task_id: TaskId, caller: Annotated[Caller, Depends(require("requester", "approver", "auditor"))]
) -> ExecutionAnswer:
    """Return each step of a task, with its result or its error."""
    store = TaskStore()
    task = store.get_task(task_id) if is_task_id(task_id) else None
    if task is None or not caller.may_see(task.requester):
        raise NotFoundError("no such task", field="task_id")
    plan = store.plan_of(task) if task.plan_id else None
    records = {record.step_index: record for record in store.steps(task_id)} if plan else {}
    return ExecutionAnswer(
        task_id=task.task_id,
        status=task.status,
        current_step=task.current_step or 0,
        total_steps=task.total_steps or 0,
        steps=[_state(task, index, step, records.get(index)) for index, step in enumerate(plan.steps if plan else ())],
        requires_approval=task.requires_approval,
        reason=task.reason,
    )


def _state(task: Task, index: int, step: Step, record: StepRecord | None) -> StepState:
    status: StepStatus | Literal["waiting_approval", "skipped"] = "pending"
    # A crashed worker leaves its step `running`, although the task has ended. A transfer may still happen.
    died = record is not None and record.status == "running" and record.type not in CONFIRMED_LATER
    died = died or (record is None and task.status == "failed" and step.step_id == task.failed_step)
    interrupted = died and task.status in TERMINAL
    if interrupted:
        status = "failed"
    elif record is not None:
        status = record.status
    elif task.status in TERMINAL:
        status = "skipped"
    elif task.status == "waiting_approval" and index == task.current_step:
        status = "waiting_approval"
    return StepState(
        step_id=step.step_id,
        type=step.type,
        status=status,
        result=record.result if record else None,
        error=task.reason if interrupted else record.error if record else None,
        requires_approval=step.requires_approval,
        attempt=record.attempt if record else 0,
        duration_ms=record.duration_ms if record else None,
        effect=effect_of(step.type),
    )
