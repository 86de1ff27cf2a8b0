"""The end of a transfer: record it, which ends the task, and resume ExecuteAction if it still waits.

The order does not matter: ExecuteAction reads the record after it has stored its token, and the qubic service publishes
the end at least once. The reconciler handles lost events.
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
    """Process the event `transfer_settled`. Return `{status}` of the step's record, null without a record.

    The event only names a transfer. Its outcome is read from the ledger, because an event may come late or repeatedly.
    """
    detail = event["detail"]
    reference = transfers.reference_of(str(detail["task_id"]), str(detail["step_id"]))
    record = _ended(reference)
    if detail["outcome"] == "confirmed":
        _check_on_record(record, reference, str(detail["txid"]))
    return {"status": record.status if record is not None else None}


def _ended(reference: str) -> StepRecord | None:
    """Finish the step's record, and resume the waiting execution. Return the record, if it exists."""
    store = TaskStore()
    task_id, _, step_id = reference.partition("#")
    try:
        task = store.get_task(task_id)
    except NotFoundError:
        logger().warning("the transfer belongs to no known task", extra={"reference": reference})
        return None
    step_index = _index_of(store, task, step_id)
    record = store.step(task_id, step_index) if step_index is not None else None
    if record is None:
        logger().warning("the transfer belongs to no started step", extra={"reference": reference})
        return None
    return transfers.settle_and_tell(store, LedgerClient(), task, record)


def _check_on_record(record: StepRecord | None, reference: str, txid: str) -> None:
    """Raise an alarm if a confirmed transfer's step has another end, or was never started.

    A recorded end is final, so an operator must correct a transfer that was confirmed after its step failed. A
    confirmed transfer stays confirmed, so a late event does no harm.
    """
    if record is not None and (record.status == "running" or (record.result or {}).get("txid") == txid):
        return
    state = transfers.state_of(LedgerClient(), *reference.split("#", 1))
    if state is None or state["state"] != "confirmed":
        return
    status = record.status if record is not None else None
    logger().error(
        "a transfer was confirmed that no step records",
        extra={"transfer": reference, "txid": state["txid"], "step": status},
    )
    metrics.count_one(UNRECORDED_TRANSFER_METRIC)


def _index_of(store: TaskStore, task: Task, step_id: str) -> int | None:
    steps = store.plan_of(task).steps if task.plan_id else ()
    return next((index for index, step in enumerate(steps) if step.step_id == step_id), None)
