"""The errors that the functions of a local cloud logged: the end-to-end run fails for each one that is not expected."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

_PLATFORM = re.compile(r"(START|END|REPORT|INIT_START|XRAY)[ \t]|\{.*\"_aws\":")
"""A line of Lambda itself, or a metric."""
_CHAINED = re.compile(r"(During handling of|The above exception)")


class Expected(NamedTuple):
    """Errors that are no fault: `error` matches `<log group>: <text>`, which is the message or the exception."""

    error: str
    reason: str


EXPECTED = (
    Expected(r"AuthorizerLogs: Exception: Unauthorized$", "API Gateway answers 401 only to this exception."),
    Expected(
        r"\w+Logs: \S*TransientError: version 1 of the policy is not confirmed on the ledger yet",
        "The first request after a deployment submits version 1 of the policy. Its callers try again.",
    ),
    Expected(
        r"RecordEventsLogs: (forged event rejected|the events could not be recorded: ForgedEventError)",
        "test_rights puts a forged event into the outbox.",
    ),
    Expected(
        r"AwaitApprovalLogs: \S*ThrottledError: other callers keep changing this task",
        "The forged event of test_rights has the number of the task's next event.",
    ),
)


def unexpected_errors(lines: Iterable[str], expected: Sequence[Expected] = EXPECTED) -> list[str]:
    """Return the errors among lines `<log group>: <text>`, as `<log group>: <message or exception>`."""
    return [error for error in _errors(lines) if not any(re.match(each.error, error) for each in expected)]


def _errors(lines: Iterable[str]) -> Iterator[str]:
    """Yield each error: of the logger, or of Lambda, whose traceback ends with the line of the exception."""
    for line in lines:
        group, _, text = line.partition(": ")
        if not text.strip() or text[0].isspace() or _PLATFORM.match(text) or _CHAINED.match(text):
            continue
        if text.startswith("Traceback "):
            continue
        try:
            record: Any = json.loads(text)
        except ValueError:
            yield f"{group}: {text}"
            continue
        if not isinstance(record, dict) or "level" not in record:
            yield f"{group}: {text}"
        elif record["level"] not in {"DEBUG", "INFO", "WARNING"}:
            exception = f": {record['exception_name']}" if "exception_name" in record else ""
            yield f"{group}: {record.get('message')}{exception}"
