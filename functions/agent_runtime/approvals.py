"""Asking a person: the state AwaitApproval hands its task token to `request_approval` and waits.

When the state is retried (the function's answer was lost), people may have decided in between, and have woken a token
that nobody waits under any more: the decision is delivered to the new one.
"""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import clients, settings
from qaes.adapters.executions import Executions
from qaes.adapters.handlers import state
from qaes.adapters.task_store import TaskStore
from qaes.domain import compliance
from qaes.domain.models import WalletBalance

clients.prepare("stepfunctions")  # to deliver what was decided meanwhile; no environment variable names them


@state("AwaitApproval")
def request_approval(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Store what people are asked to decide; nobody sees the token.

    `{task_id, step_index, task_token, execution?, approvals?, expires_after?, balance?}` → `{status, expires_at}`.
    Raises ConflictError when `execution` is not the task's: its token would wake nobody.
    """
    store, step_index = TaskStore(), int(event["step_index"])
    task = store.get_task(event["task_id"])
    plan = store.plan_of(task)
    compliance.check_same_plan(task, plan)
    longest = settings.number("APPROVAL_TIMEOUT_SECONDS")
    approval = store.request_approval(
        task.task_id,
        step_index,
        plan.steps[step_index],
        event["task_token"],
        min(int(event.get("expires_after") or longest), longest),
        required=int(event.get("approvals") or 1),
        execution=event.get("execution"),
        balance=WalletBalance.model_validate(event["balance"]) if event.get("balance") else None,
    )
    if approval.status != "pending":
        Executions.deliver(approval)
    return {"status": approval.status, "expires_at": approval.expires_at}
