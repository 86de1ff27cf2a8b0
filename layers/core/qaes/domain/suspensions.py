"""Suspended actions, and the error of a step that must not run because its action is suspended."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from pydantic import BaseModel, ConfigDict

from qaes.domain.ids import parse_timestamp
from qaes.domain.policy_events import EVERY_ACTION

CODE = "suspended"
RESUME_REQUEST_LASTS = timedelta(days=1)
"""A request to resume ends after this time: its reasons may no longer hold."""


class Suspension(BaseModel):
    """A suspended action, or all actions: the operators who suspended it and who requested to resume it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: str
    at: str
    reason: str
    resume_by: str | None = None
    resume_at: str | None = None

    def resumes_with(self, moment: datetime) -> bool:
        """Return whether a request to resume is open at this time."""
        return self.resume_at is not None and moment < parse_timestamp(self.resume_at) + RESUME_REQUEST_LASTS


def refusal(action: str, suspended: Mapping[str, Suspension]) -> str | None:
    """Return the reason why no step of `action` may start, as code and text; None if it is not suspended."""
    for name in (action, EVERY_ACTION):
        if found := suspended.get(name):
            what = "every action" if name == EVERY_ACTION else f"`{name}`"
            return f"{CODE}: {found.by} suspended {what} at {found.at}: {found.reason}"
    return None
