"""One structured logger for each service, with readable lines that contain the task's id.

An INFO line has at most `MAX_LINE_BYTES` and reports the outcome of one request, state or decision. No line contains a
token, a body or a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.logging.formatter import LambdaPowertoolsFormatter

MAX_LINE_BYTES = 300
_ONLY_OF_PROBLEMS = ("location", "xray_trace_id")
_noted: ContextVar[dict[str, Any]] = ContextVar("noted")


class _Formatter(LambdaPowertoolsFormatter):
    """Omits from INFO lines the fields that only help to find the cause of a problem."""

    def serialize(self, log: Any) -> str:
        if log.get("level") == "INFO":
            log = {key: value for key, value in log.items() if key not in _ONLY_OF_PROBLEMS}
        return super().serialize(log)


@cache
def logger() -> Logger:
    """Return the service's logger (name: POWERTOOLS_SERVICE_NAME, level: POWERTOOLS_LOG_LEVEL)."""
    return Logger(logger_formatter=_Formatter(use_rfc3339=True, utc=True))


def note(**fields: str | int | bool | None) -> None:
    """Add fields to the report line of this invocation; None adds nothing."""
    _noted.get().update({name: value for name, value in fields.items() if value is not None})


def has_noted(field: str) -> bool:
    """Return whether this invocation has noted a field."""
    return field in _noted.get()


@contextmanager
def invocation(correlation_id: str | None) -> Iterator[None]:
    """Give each line inside the `with` block a correlation id, and discard earlier notes."""
    before, noted = logger().get_correlation_id(), _noted.set({})
    logger().set_correlation_id(correlation_id)
    try:
        yield
    finally:
        logger().set_correlation_id(before)
        _noted.reset(noted)


def report(message: str, milliseconds: int) -> None:
    """Write the report line of this invocation with all noted fields."""
    fields = dict(_noted.get())
    outcome = fields.pop("outcome", None)
    logger().info(f"{message}: {outcome}" if outcome else message, extra=fields | {"ms": milliseconds})
