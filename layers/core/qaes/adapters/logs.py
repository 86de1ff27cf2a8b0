"""One structured logger for a service; the correlation id of a workflow function is the task's id."""

from __future__ import annotations

from functools import cache

from aws_lambda_powertools import Logger

TASK_ID = "task_id"
"""`correlation_id_path` of the functions that the state machine calls."""


@cache
def logger() -> Logger:
    """The service's logger (name and level from POWERTOOLS_SERVICE_NAME and POWERTOOLS_LOG_LEVEL)."""
    return Logger(use_rfc3339=True, utc=True)
