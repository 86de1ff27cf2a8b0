"""What the audit trail has of a task: read before an effect, and never written here."""

from __future__ import annotations

from qaes.adapters import clients, dynamo, settings
from qaes.adapters.logs import logger
from qaes.domain.errors import UnavailableError


def ensure_recorded(task_id: str, number: int) -> None:
    """Make sure that the audit table has the task's entries up to `number`.

    If the stream has not delivered their events yet, the recorder is invoked. What it answers is not believed: the
    table is read again.

    Raises
    ------
    UnavailableError
        The entries are not there yet (ThrottledError while AWS throttles).
    """
    if _is_recorded(task_id, number):
        return
    clients.invoke(settings.text("RECORDER_FUNCTION"), {"task_id": task_id}, "the recorder")
    if not _is_recorded(task_id, number):
        logger().warning("the recorder has not recorded the intent", extra={"task_id": task_id, "entry": number})
        raise UnavailableError("the task's events are not in the audit trail yet")


def _is_recorded(task_id: str, number: int) -> bool:
    # Entries are written one after the other, each only after the one before.
    return dynamo.get(settings.text("AUDIT_ENTRIES_TABLE"), task_id, f"ENTRY#{number:06d}") is not None
