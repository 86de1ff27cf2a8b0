"""Waiting for the ledger: the state AwaitConfirmation leaves its task token here; the end of a transfer wakes it.

First the end is put on record, then the execution is woken, if it still waits. Who comes first does not matter: who
leaves a token looks whether the transfer has ended already, and the qubic service publishes its end at least once.
What both miss, the reconciler finds.
"""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import clients, metrics, settings, transfers
from qaes.adapters.handlers import function, state
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import logger
from qaes.adapters.task_store import TaskStore, refuse_other_execution
from qaes.domain.errors import ConflictError, NotFoundError
from qaes.domain.models import StepRecord, Task

clients.prepare("stepfunctions")  # to wake executions; no environment variable names them

NOT_ON_RECORD_METRIC = "TransferNotOnRecord"


@state("AwaitConfirmation")
def await_confirmation(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """`{task_id, step_index, task_token, execution?}` → `{state}` of the transfer; nobody sees the token."""
    store, ledger, step_index = TaskStore(), LedgerClient(), int(event["step_index"])
    task = store.get_task(str(event["task_id"]))
    refuse_other_execution(task, event.get("execution"))
    limit = settings.number("CONFIRMATION_TIMEOUT_SECONDS")
    store.put_waiter(task.task_id, step_index, str(event["task_token"]), expires_in=limit, run=task.run)
    record = store.step(task.task_id, step_index)
    if record is None:
        raise ConflictError("this transfer was never handed in", task_status=task.status)
    settled = transfers.settle(store, ledger, task, record)
    transfers.tell(store, task, settled.record)
    return {"state": "under_way" if settled.under_way else settled.record.status}


@function
def transfer_ended(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Take the qubic service's event `transfer_settled`, give `{status}` of the step's record, null without one.

    The event only names a transfer. What became of it is what the ledger answers now: an event may come late, or again.
    """
    detail = event["detail"]
    reference = transfers.reference_of(str(detail["task_id"]), str(detail["step_id"]))
    record = _ended(reference)
    if detail["outcome"] == "confirmed":
        _check_on_record(record, reference, str(detail["txid"]))
    return {"status": record.status if record is not None else None}


def _ended(reference: str) -> StepRecord | None:
    """Finish the step's record, and wake who waits; the record, if there is one."""
    store = TaskStore()
    task_id, _, step_id = reference.partition("#")
    try:
        task = store.get_task(task_id)
    except NotFoundError:
        logger().warning("a transfer of no known task", extra={"reference": reference})
        return None
    step_index = _index_of(store, task, step_id)
    record = store.step(task_id, step_index) if step_index is not None else None
    if record is None:
        logger().warning("a transfer of no step that was begun", extra={"reference": reference})
        return None
    settled = transfers.settle(store, LedgerClient(), task, record)
    transfers.tell(store, task, settled.record)
    return settled.record


def _check_on_record(record: StepRecord | None, reference: str, txid: str) -> None:
    """Raise the alarm when a confirmed transfer's step has ended otherwise, or was never begun.

    A step's end is told once and is not taken back; so what happened after a refusal that was told too early is for a
    person to put right. A confirmed transfer stays so: that an event is old does not matter.
    """
    if record is not None and (record.status == "running" or (record.result or {}).get("txid") == txid):
        return
    state = transfers.state_of(LedgerClient(), *reference.split("#", 1))
    if state is None or state["state"] != "confirmed":
        return
    status = record.status if record is not None else None
    logger().error(
        "money has moved, and it is not on record",
        extra={"transfer": reference, "txid": state["txid"], "step": status},
    )
    metrics.count_one(NOT_ON_RECORD_METRIC)


def _index_of(store: TaskStore, task: Task, step_id: str) -> int | None:
    steps = store.plan_of(task).steps if task.plan_id else ()
    return next((index for index, step in enumerate(steps) if step.step_id == step_id), None)
