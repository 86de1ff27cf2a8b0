"""The end of a transfer: it is put on record, which ends the task, and then ExecuteAction is woken, if it still waits.

Who comes first does not matter: ExecuteAction reads the record after it has left its token, and the qubic service
publishes the end at least once. What both miss, the reconciler finds.
"""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import metrics, transfers
from qaes.adapters.handlers import function
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import logger
from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import NotFoundError
from qaes.domain.models import StepRecord, Task

SETTLED = "transfer_settled"
"""The qubic service's event."""
UNRECORDED_TRANSFER_METRIC = "UnrecordedTransfer"


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
    return transfers.settle_and_tell(store, LedgerClient(), task, record)


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
    metrics.count_one(UNRECORDED_TRANSFER_METRIC)


def _index_of(store: TaskStore, task: Task, step_id: str) -> int | None:
    steps = store.plan_of(task).steps if task.plan_id else ()
    return next((index for index, step in enumerate(steps) if step.step_id == step_id), None)
