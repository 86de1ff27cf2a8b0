"""Events for other services at the end of a transfer or an anchor: EventBridge, the bus LEDGER_BUS.

| detail-type | detail |
|---|---|
| `transfer_settled` | `{task_id, step_id, outcome, txid}` |
| `anchor_settled` | `{log_id, sequence, outcome, txid}` |

`outcome` is the submission's state: confirmed, expired or failed. An event has no secret and proves nothing: its
receiver reads the state from the ledger. It is published at least once, before the source's queue advances.
"""

from __future__ import annotations

import json
from typing import Any

from qaes.adapters import clients, settings
from qaes.domain.errors import TransientError
from qubic.transactions.model import Submission

SOURCE = "qaes.qubic"


def publish(submission: Submission) -> None:
    """Publish the end of a transfer or an anchor. Raises TransientError if EventBridge rejects the event.

    No service waits for other kinds of record, so they have no event.
    """
    detail = _detail(submission)
    if detail is None:
        return
    entry = {
        "EventBusName": settings.text("LEDGER_BUS"),
        "Source": SOURCE,
        "DetailType": f"{submission.kind}_settled",
        "Detail": json.dumps(detail | {"outcome": submission.state, "txid": submission.txid}),
    }
    answer = clients.client("events").put_events(Entries=[entry])
    if answer["FailedEntryCount"]:
        raise TransientError(f"EventBridge rejected the event: {answer['Entries'][0].get('ErrorCode')}")


def _detail(submission: Submission) -> dict[str, Any] | None:
    if submission.kind == "transfer":
        task_id, _, step_id = submission.metadata["reference"].partition("#")
        return {"task_id": task_id, "step_id": step_id}
    if submission.kind == "anchor":
        return {name: submission.metadata[name] for name in ("log_id", "sequence")}
    return None
