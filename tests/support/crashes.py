"""A process that crashes or fails at its n-th call to AWS: before the effect of the call, or right after.

A crash before a call equals a crash right after the previous call, so `after` alone enumerates all places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

from botocore.client import BaseClient
from botocore.exceptions import BotoCoreError

from qaes.domain.errors import QaesError
from tests.support.sampling import SEED, WHOLE

When = Literal["before", "after"]
STRIDE = 1 if WHOLE else 3
"""Each run tries every third call, by the seed; `make fuzz` tries every call."""


def sampled_numbers(first: int = 0) -> range:
    """Return the numbers of the calls to try; cases with other values of `first` try others."""
    return range(1 + (SEED + first) % STRIDE, 1000, STRIDE)


class CrashError(BaseException):
    """The process has crashed. No `except Exception` of the code catches it."""


@dataclass
class Crash:
    """`happened` is true if the n-th call was made; `calls` are the calls so far."""

    happened: bool = False
    calls: list[str] = field(default_factory=list)


@contextmanager
def crash_at(number: int, when: When, error: type[BaseException] | BaseException = CrashError) -> Iterator[Crash]:
    """Crash the process at its call `number` (from 1), and suppress that: the code after it is another process.

    With an `error` of AWS, the call fails with it instead, and the error that the code raises is suppressed too.
    """
    crash = Crash()
    call = BaseClient._make_api_call

    def dying(client: Any, operation: str, arguments: Any) -> Any:
        crash.calls.append(f"{client.meta.service_model.service_name}.{operation}")
        dies = len(crash.calls) == number
        crash.happened |= dies
        if dies and when == "before":
            raise error
        answer = call(client, operation, arguments)
        if dies:
            raise error
        return answer

    with patch.object(BaseClient, "_make_api_call", dying), suppress(CrashError, QaesError, BotoCoreError):
        yield crash
