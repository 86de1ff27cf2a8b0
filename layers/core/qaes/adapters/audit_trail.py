"""Check of a task's audit trail before an effect. It never writes to the trail."""

from __future__ import annotations

import json

from qaes.adapters import clients, dynamo, settings
from qaes.adapters.logs import logger
from qaes.domain.errors import ConflictError, TransientError


def ensure_recorded(task_id: str, number: int, *, step_id: str) -> None:
    """Ensure that the audit table has the task's entries up to `number`, the beginning of the step.

    If the stream has not delivered their events yet, invoke the recorder. Its response is not trusted: read the table
    again.

    Raises
    ------
    TransientError
        The entries do not exist yet (ThrottledError if AWS throttles the call).
    ConflictError
        The entry with that number is a different one: another role wrote an event before the claim.
    """
    if _is_recorded(task_id, number, step_id):
        return
    clients.invoke(settings.text("RECORDER_FUNCTION"), {"task_id": task_id}, "the recorder")
    if not _is_recorded(task_id, number, step_id):
        logger().warning("the recorder has not recorded the intent", extra={"task_id": task_id, "entry": number})
        raise TransientError("the task's events are not in the audit trail yet; try again")


def _is_recorded(task_id: str, number: int, step_id: str) -> bool:
    # Entries are written in order, each after the previous one.
    item = dynamo.get(settings.text("AUDIT_ENTRIES_TABLE"), task_id, f"ENTRY#{number:06d}")
    if item is None:
        return False
    entry = json.loads(item["text"]["S"])
    if (entry["kind"], entry["step_id"]) != ("step_started", step_id):
        logger().error("another entry has the number of the intent", extra={"task_id": task_id, "entry": number})
        raise ConflictError(f"entry {number} of the audit trail is not the beginning of {step_id}")
    return True
