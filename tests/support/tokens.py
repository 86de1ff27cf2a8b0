"""The callback tokens that a task's execution waits under."""

from __future__ import annotations

from qaes.adapters.callbacks import CallbacksTable

ACTION = 2
"""The index of the last step of a transfer's plan."""


def approval_token(task_id: str) -> str | None:
    """Return the token of the state that waits for people."""
    return CallbacksTable().token("APPROVAL", task_id, ACTION)


def action_token(task_id: str) -> str | None:
    """Return the token of the state that waits for the ledger."""
    return CallbacksTable().token("ACTION", task_id, ACTION)
