"""A process that dies at its n-th call to AWS: before the call has had an effect, or right after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

from botocore.client import BaseClient

When = Literal["before", "after"]


class CrashError(BaseException):
    """The process is gone: no `except Exception` of the code's own sees it."""


@dataclass
class Crash:
    """`happened` tells whether there was an n-th call; `calls` are those that were made."""

    happened: bool = False
    calls: list[str] = field(default_factory=list)


@contextmanager
def crash_at(number: int, when: When) -> Iterator[Crash]:
    """Let the process die at its call `number` (from 1), and swallow that: what comes after is another process."""
    crash = Crash()
    call = BaseClient._make_api_call

    def dying(client: Any, operation: str, arguments: Any) -> Any:
        crash.calls.append(f"{client.meta.service_model.service_name}.{operation}")
        dies = len(crash.calls) == number
        if dies and when == "before":
            raise CrashError
        answer = call(client, operation, arguments)
        if dies:
            raise CrashError
        return answer

    try:
        with patch.object(BaseClient, "_make_api_call", dying):
            yield crash
    except CrashError:
        crash.happened = True
