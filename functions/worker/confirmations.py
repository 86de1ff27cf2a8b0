"""Waiting for the ledger: the state AwaitConfirmation leaves its task token here; the end of a transfer wakes it.

Who comes first does not matter: who leaves a token looks whether the transfer has ended already, and the ledger's
stream tells of its end at least once. What both miss, the reconciler finds.
"""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters.executions import wake
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import TASK_ID, logger
from qaes.adapters.task_store import TaskStore
from qaes.domain.errors import NotFoundError
from qaes.domain.models import TERMINAL, Task
from worker.app import reference_of, run_step

OPEN = {"signed", "broadcast"}
_PREFIX = "transfer:"


@logger().inject_lambda_context(correlation_id_path=TASK_ID)
def await_confirmation(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """`{task_id, step_index, task_token}` → `{state}` of the transfer; the token is kept, and told nobody."""
    store, step_index = TaskStore(), int(event["step_index"])
    task = store.get_task(str(event["task_id"]))
    step = store.plan_of(task).steps[step_index]
    store.put_waiter(task.task_id, step_index, str(event["task_token"]))
    record = store.step(task.task_id, step_index)
    state = "ended"
    if record is None or record.status == "running":
        state = LedgerClient().transfer_state(reference_of(task.task_id, step.step_id))["state"]
    if state not in OPEN:
        wake(str(event["task_token"]), {"state": state})
    return {"state": state}


@logger().inject_lambda_context
def transfer_ended(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Take a batch of the ledger table's stream, give `{"batchItemFailures": [{"itemIdentifier": …}]}`."""
    failed: list[str] = []
    for record in event["Records"]:
        change = record["dynamodb"]
        image = change.get("NewImage", {})
        key, state = image.get("key", {}).get("S", ""), image.get("state", {}).get("S", "")
        if not key.startswith(_PREFIX) or state in OPEN:
            continue
        try:
            _ended(key.removeprefix(_PREFIX), state)
        except Exception:  # noqa: BLE001 - whatever it is, it is logged, and delivered again
            logger().exception("could not tell", extra={"transfer": key})
            failed.append(change["SequenceNumber"])
    return {"batchItemFailures": [{"itemIdentifier": number} for number in failed]}


def _ended(reference: str, state: str) -> None:
    store = TaskStore()
    task_id, _, step_id = reference.partition("#")
    try:
        task = store.get_task(task_id)
    except NotFoundError:
        logger().warning("a transfer of no known task", extra={"reference": reference})
        return
    step_index = _index_of(store, task, step_id)
    if step_index is None:
        return
    if task.status in TERMINAL:
        # Cancelled, say, while it was under way: what was done is put on record all the same.
        record = store.step(task_id, step_index)
        if record is not None and record.status == "running":
            run_step(store, LedgerClient(), task_id, step_index)
        return
    # An event may come late, or again: what counts is how the transfer stands now.
    if LedgerClient().transfer_state(reference)["state"] in OPEN:
        return
    token = store.waiter(task_id, step_index)
    if token is not None:
        wake(token, {"state": state})


def _index_of(store: TaskStore, task: Task, step_id: str) -> int | None:
    steps = store.plan_of(task).steps if task.plan_id else ()
    return next((index for index, step in enumerate(steps) if step.step_id == step_id), None)
