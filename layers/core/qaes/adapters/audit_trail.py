"""What the audit trail has of a task: read before an effect, and never written here."""

from __future__ import annotations

import json

from qaes.adapters import clients, dynamo, settings
from qaes.adapters.logs import logger
from qaes.domain.errors import ConflictError, TransientError


def ensure_recorded(task_id: str, number: int, *, step_id: str) -> None:
    """Make sure that the audit table has the task's entries up to `number`, which is the step's beginning.

    If the stream has not delivered their events yet, the recorder is invoked. What it answers is not believed: the
    table is read again.

    Raises
    ------
    TransientError
        The entries are not there yet (ThrottledError while AWS throttles).
    ConflictError
        The entry with that number is another one: another role has written an event before the claim.
    """
    if _is_recorded(task_id, number, step_id):
        return
    clients.invoke(settings.text("RECORDER_FUNCTION"), {"task_id": task_id}, "the recorder")
    if not _is_recorded(task_id, number, step_id):
        logger().warning("the recorder has not recorded the intent", extra={"task_id": task_id, "entry": number})
        raise TransientError("the task's events are not in the audit trail yet")


def _is_recorded(task_id: str, number: int, step_id: str) -> bool:
    # Entries are written one after the other, each only after the one before.
    item = dynamo.get(settings.text("AUDIT_ENTRIES_TABLE"), task_id, f"ENTRY#{number:06d}")
    if item is None:
        return False
    entry = json.loads(item["text"]["S"])
    if (entry["kind"], entry["step_id"]) != ("step_started", step_id):
        logger().error("an entry stands where the intent belongs", extra={"task_id": task_id, "entry": number})
        raise ConflictError(f"entry {number} of the audit trail is not the beginning of {step_id}")
    return True
