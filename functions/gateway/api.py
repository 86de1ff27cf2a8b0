"""The gateway: starts tasks, returns them, and records decisions.

A conditional write is the commit point of each request. The steps after it (start or resumption of the execution) may
fail without an error for the caller: the reconciler completes them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from botocore.exceptions import BotoCoreError, ClientError
from fastapi import Depends, Header, Query, Response

from gateway.known_policy import check_request, policy_in_force
from gateway.schemas import (
    About,
    CancelRequest,
    DecisionAnswer,
    DecisionRequest,
    LifecycleAnswer,
    StartAnswer,
    TaskAnswer,
    TaskPage,
    TaskSummary,
    error_of,
    question,
)
from qaes import VERSION
from qaes.adapters import settings
from qaes.adapters.executions import Executions
from qaes.adapters.health import add_health, state_machine_answers, tasks_table_answers
from qaes.adapters.http import NO_TOKEN, Caller, TaskId, create_app, make_handler, require
from qaes.adapters.logs import logger, note
from qaes.adapters.task_changes import ReplayedError
from qaes.adapters.task_items import Idempotency
from qaes.adapters.task_list import list_tasks
from qaes.adapters.task_repository import TaskStore, decided_answer, lifecycle_answer
from qaes.domain import planning
from qaes.domain.canonical import hash_of
from qaes.domain.errors import ForbiddenError, InvalidInputError, NotFoundError, TransientError
from qaes.domain.ids import TASK_ID_PATTERN, is_task_id, new_task_id, now, timestamp
from qaes.domain.models import Status, Task
from qaes.domain.planning import RECORDED_ONLY, action_step, effect_of
from qaes.domain.policy import Policy
from qaes.domain.policy.actions import BUILT_IN
from qaes.domain.requests import TaskRequest
from qaes.domain.text import subject_note

app = create_app("gateway")
handler = make_handler(app)
add_health(app, "/health", {"tasks_table": tasks_table_answers, "state_machine": state_machine_answers})

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[!-~]{1,255}$",
        description="for 24 hours, requests with the same key and body take effect once and return the same response",
    ),
]
REPLAY = "Idempotent-Replay"


@app.post("/task/start", status_code=202)
def start_task(
    body: TaskRequest,
    caller: Annotated[Caller, Depends(require("requester"))],
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> StartAnswer:
    """Start a task. With an `Idempotency-Key` that was used for the same body, answer with the task of that time.

    422 if the parameters do not fit the action's schema, or if fewer people can approve the task than must. A task that
    the policy denies is started, and ends as `denied`.
    """
    moment, action = timestamp(now()), planning.action_type(body.task_type)
    parameters, policy = _resolved(body, action)
    task = Task(
        task_id=new_task_id(),
        status="pending",
        task_type=body.task_type,
        description=body.description,
        parameters=parameters,
        requester=caller.subject,
        agent=caller.agent,
        created_at=moment,
        updated_at=moment,
    )
    asked_for = task.model_dump(mode="json", include={"task_type", "description", "parameters"})
    store, idempotency = TaskStore(), _idempotency(caller, idempotency_key, "start", asked_for)
    if policy is not None:
        try:
            check_request(policy, task)
        except InvalidInputError:
            # A repetition gets the response of the first request, regardless of the current policy.
            if idempotency is None or store.answered(idempotency) is None:
                raise
    task, replayed = store.start_task(task, idempotency, max_open=settings.number("MAX_OPEN_TASKS"))
    note(task_id=task.task_id)
    if replayed:
        response.headers[REPLAY] = "true"
        return StartAnswer(task_id=task.task_id, status=task.status, message="The task was already started.")
    _start(task)
    message = "The task has been accepted."
    if effect_of(action_step(task.task_type)) == RECORDED_ONLY:
        message += (
            f" Its action is {RECORDED_ONLY}: its hash is written to the ledger, and the system performs nothing."
        )
    return StartAnswer(task_id=task.task_id, status=task.status, message=message)


@app.get("/", openapi_extra=NO_TOKEN)
def get_about() -> About:
    """Return a description of this service, and the paths of its documentation."""
    return About(
        service="Qubic Autonomous Execution System",
        version=VERSION,
        description="Runs tasks of agents under a policy, with approvals and an audit trail that anyone can verify.",
        documentation="/docs",
        openapi="/openapi.json",
        health="/health",
    )


DOCUMENT = Path(__file__).with_name("openapi.json")
# The page has no script and no external resources; its style is inline, and its icon is empty (data:).
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)


@app.get("/openapi.json", include_in_schema=False)
def get_openapi() -> Response:
    """Return the API's document."""
    return Response(DOCUMENT.read_text(), media_type="application/json")


@app.get("/docs", include_in_schema=False)
def get_docs() -> Response:
    """Return the API's document as a page."""
    from gateway.docs_page import page

    return Response(page(DOCUMENT), media_type="text/html", headers={"Content-Security-Policy": PAGE_POLICY})


@app.get("/task/{task_id}")
def get_task(
    task_id: TaskId, caller: Annotated[Caller, Depends(require("requester", "approver", "auditor"))]
) -> TaskAnswer:
    """Return a task, with the approval request while it waits for a person."""
    store = TaskStore()
    task = _visible(store, task_id, caller)
    approval = store.open_approval(task_id, of=task) if task.status == "waiting_approval" else None
    return TaskAnswer(
        task_id=task.task_id,
        status=task.status,
        task_type=task.task_type,
        description=task.description,
        requester=task.requester,
        agent=task.agent,
        created_at=task.created_at,
        updated_at=task.updated_at,
        plan_id=task.plan_id,
        current_step=task.current_step,
        requires_approval=task.requires_approval,
        requester_note=subject_note(task.requester),
        effect=effect_of(action_step(task.task_type)),
        error=error_of(task),
        approval=question(task, store.plan_of(task), approval) if approval else None,
    )


@app.get("/tasks")
def get_tasks(
    caller: Annotated[Caller, Depends(require("requester", "approver", "auditor"))],
    status: Annotated[
        Status | None, Query(description="only tasks in this status; `waiting_approval` lists the pending approvals")
    ] = None,
    mine: Annotated[bool, Query(description="only tasks that the caller requested")] = False,
    for_me: Annotated[
        bool,
        Query(description="only tasks that the caller can decide on now; requires `status=waiting_approval`"),
    ] = False,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[
        str | None,
        Query(
            max_length=128,
            description="`next_cursor` of the previous page",
            json_schema_extra={"pattern": TASK_ID_PATTERN},
        ),
    ] = None,
) -> TaskPage:
    """List tasks, newest first. Callers with only the role requester see their own tasks.

    With `for_me`, the list is the caller's inbox: the tasks that the caller can approve or reject now. A page reads at
    most `limit` tasks, so it may be short or empty and still have a `next_cursor`.
    """
    if cursor is not None and not is_task_id(cursor):
        raise InvalidInputError("`cursor` is not a `next_cursor` of this list", field="cursor")
    if for_me and status != "waiting_approval":
        raise InvalidInputError("needs `status=waiting_approval`", field="for_me")
    if for_me and not caller.has("approver"):
        return TaskPage(tasks=[], next_cursor=None)
    everyones = caller.has("approver", "auditor") and not mine
    page = list_tasks(status=status, requester=None if everyones else caller.subject, limit=limit, before=cursor)
    shown, store = set(TaskSummary.model_fields), TaskStore()
    tasks = [
        TaskSummary.model_validate(task.model_dump(include=shown))
        for task in page.tasks
        if not for_me or store.may_decide(task, caller.subject, four_eyes=caller.four_eyes)
    ]
    return TaskPage(tasks=tasks, next_cursor=page.cursor)


@app.post("/task/{task_id}/approve")
def decide(
    task_id: TaskId,
    body: DecisionRequest,
    caller: Annotated[Caller, Depends(require("approver", deciding=True))],
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> DecisionAnswer:
    """Approve or reject the pending step of a task, once; 409 if the task does not wait for an approval.

    A person cannot decide on a task that they started or retried in any run. If the policy names a group of
    approvers, only members of that group can decide.
    """
    store = TaskStore()
    task = _visible(store, task_id, caller)
    try:
        approval = store.decide(
            task_id,
            known=task,
            approved=body.approved,
            subject=caller.subject,
            reason=body.reason,
            plan_hash=body.plan_hash,
            four_eyes=caller.four_eyes,
            idempotency=_idempotency(caller, idempotency_key, f"approve {task_id}", body.model_dump()),
        )
    except ReplayedError as replayed:
        response.headers[REPLAY] = "true"
        return DecisionAnswer.model_validate(replayed.answer)
    note(decision="approved" if body.approved else "rejected", approval=approval.status)
    if approval.status != "pending":
        _afterwards("the decision is not delivered yet", task_id, lambda: Executions().deliver(task_id, approval))
    return DecisionAnswer.model_validate(decided_answer(task_id, approval))


@app.post("/task/{task_id}/cancel")
def cancel(
    task_id: TaskId,
    caller: Annotated[Caller, Depends(require("requester"))],
    response: Response,
    body: CancelRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> LifecycleAnswer:
    """Cancel a task that has not ended; 409 if it has ended, or if an approver has rejected it.

    The effects of its completed steps remain, and stay recorded.
    """
    store = TaskStore()
    _changeable(store, task_id, caller)
    reason = body.reason if body else ""
    try:
        task = store.cancel(
            task_id,
            subject=caller.subject,
            agent=caller.agent,
            reason=reason or f"cancelled by {caller.subject}",
            idempotency=_idempotency(caller, idempotency_key, f"cancel {task_id}", {"reason": reason}),
        )
    except ReplayedError as replayed:
        response.headers[REPLAY] = "true"
        return LifecycleAnswer.model_validate(replayed.answer)
    # If the execution cannot be stopped now, its next step sees that the task has ended.
    _afterwards("the execution is not stopped yet", task_id, lambda: Executions().stop(task, "the task was cancelled"))
    return LifecycleAnswer.model_validate(lifecycle_answer(task_id, task.status))


@app.post("/task/{task_id}/retry", status_code=202)
def retry(
    task_id: TaskId,
    caller: Annotated[Caller, Depends(require("requester"))],
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> LifecycleAnswer:
    """Retry a failed or expired task from the step that did not succeed; 409 for any other status.

    Required approvals are requested again. A task that an approver has rejected cannot be retried.
    """
    store = TaskStore()
    _changeable(store, task_id, caller)
    try:
        task = store.retry(
            task_id,
            subject=caller.subject,
            agent=caller.agent,
            max_open=settings.number("MAX_OPEN_TASKS"),
            idempotency=_idempotency(caller, idempotency_key, f"retry {task_id}", {}),
        )
    except ReplayedError as replayed:
        response.headers[REPLAY] = "true"
        return LifecycleAnswer.model_validate(replayed.answer)
    _start(task)
    return LifecycleAnswer.model_validate(lifecycle_answer(task_id, task.status))


def _resolved(body: TaskRequest, action: str) -> tuple[dict[str, Any], Policy | None]:
    """Check the parameters by the action's own rules, and return them with the policy in force, if it can be read.

    The policy defines an operator's action. A built-in one needs no policy for its parameters.
    """
    network = settings.text("QUBIC_NETWORK")
    if action in BUILT_IN:
        return body.resolved(network), policy_in_force()
    policy = policy_in_force()
    return body.resolved(network, operators=policy is not None and action in policy.actions), policy


def _start(task: Task) -> None:
    _afterwards("the execution is not started yet", task.task_id, lambda: Executions().start(task))


def _afterwards(failure: str, task_id: str, act: Callable[[], object]) -> None:
    """Run the action after a commit. If it fails, the reconciler completes it."""
    try:
        act()
    except (TransientError, BotoCoreError, ClientError) as error:
        logger().warning(failure, extra={"task_id": task_id, "error": type(error).__name__})


def _idempotency(caller: Caller, key: str | None, operation: str, content: dict[str, Any]) -> Idempotency | None:
    if key is None:
        return None
    return Idempotency(subject=caller.subject, key=key, body_hash=hash_of([operation, content]))


def _changeable(store: TaskStore, task_id: str, caller: Caller) -> None:
    """Reject callers who cannot cancel or retry the task: 403 if they can see it, otherwise 404."""
    task = _visible(store, task_id, caller)
    if not caller.may_change(task.requester):
        raise ForbiddenError("only the task's requester or an operator can do this")


def _visible(store: TaskStore, task_id: str, caller: Caller) -> Task:
    """Read a task. Raises NotFoundError if the caller cannot see it."""
    task = store.get_task(task_id) if is_task_id(task_id) else None
    if task is None or not caller.may_see(task.requester):
        raise NotFoundError("no such task", field="task_id")
    return task
