"""Identifiers and times."""

from __future__ import annotations

import os
import re
import time
import uuid
from datetime import UTC, datetime
from typing import NewType

TaskId = NewType("TaskId", str)
PlanId = NewType("PlanId", str)

_UUID7 = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
TASK_ID_PATTERN = rf"^task_{_UUID7}$"
PLAN_ID_PATTERN = rf"^plan_{_UUID7}$"


def uuid7() -> uuid.UUID:
    """Return a UUID of version 7 (RFC 9562, section 5.7): 48 bits of Unix milliseconds, then 74 random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return uuid.UUID(int=value)


def new_task_id() -> TaskId:
    return TaskId(f"task_{uuid7()}")


def first_task_id(moment: datetime) -> str:
    """Return the lower bound of the ids of tasks that were started at or after `moment`."""
    milliseconds = f"{int(moment.timestamp() * 1000):012x}"
    return f"task_{milliseconds[:8]}-{milliseconds[8:]}"


def new_plan_id() -> PlanId:
    return PlanId(f"plan_{uuid7()}")


def is_task_id(text: str) -> bool:
    return re.fullmatch(TASK_ID_PATTERN, text) is not None


def is_plan_id(text: str) -> bool:
    return re.fullmatch(PLAN_ID_PATTERN, text) is not None


def now() -> datetime:
    """Return the current time in UTC, with its time zone."""
    return datetime.now(UTC)


def timestamp(moment: datetime) -> str:
    """Return ISO 8601 with milliseconds and a `Z`: `2026-11-23T12:00:00.000Z`. Text order is time order."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_timestamp(text: str) -> datetime:
    return datetime.fromisoformat(text)
