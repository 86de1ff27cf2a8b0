"""The next request of an attempt, by the outcomes of its requests: pure, so that a crash loses only time.

One rule protects against a second effect: **after a request to execute that the handler may have received, only the
handler's `not_found` to a later query permits another**. The reference is the same, so a handler that keeps the
contract acts once even if that request was still on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from dispatcher.contract import Outcome

CLOCK_SKEW = timedelta(seconds=60)
"""The difference between two clocks. `not_found` is final only if the query left so long after the deadline."""
FIRST_PAUSE = timedelta(seconds=1)
MAX_PAUSE = timedelta(seconds=60)
MAX_PAUSE_ACCEPTED = timedelta(hours=1)
"""An accepted action finishes by callback; a query finds the result of one whose callback was lost."""
ENDS = frozenset({"done", "refused", "conflict"})


@dataclass(frozen=True)
class Sent:
    """A request of the attempt. `outcome` is None if the dispatcher stopped before it recorded one."""

    mode: Literal["execute", "query"]
    at: datetime
    outcome: Outcome | None

    @property
    def kind(self) -> str:
        """The kind of the outcome; a missing one is unknown."""
        return "unknown" if self.outcome is None else self.outcome.kind


@dataclass(frozen=True)
class Next:
    """The next action. `until` is the end of a wait; `verdict` is the outcome of an attempt that is given up."""

    action: Literal["execute", "query", "wait", "give_up", "ended"]
    until: datetime | None = None
    verdict: Literal["not_done", "outcome_unknown"] | None = None


def next_request(
    history: Sequence[Sent],
    *,
    now: datetime,
    deadline: datetime,
    give_up_at: datetime,
    first_pause: timedelta = FIRST_PAUSE,
) -> Next:
    """Return the next request of an attempt.

    Parameters
    ----------
    history
        The requests so far, oldest first.
    deadline
        The handler refuses a request to execute after this time, so none is sent.
    give_up_at
        From this time on, an unknown outcome is for people to resolve. It is later than `deadline` and `CLOCK_SKEW`.
    """
    if history and history[-1].kind in ENDS:
        return Next("ended")
    may_execute = not any(sent.mode == "execute" and sent.kind != "not_sent" for sent in history)
    if not may_execute and _is_unseen(history):
        if history[-1].at >= deadline + CLOCK_SKEW:
            return Next("give_up", verdict="not_done")
        may_execute = now < deadline
    if may_execute and now >= deadline:
        return Next("give_up", verdict="not_done")
    if not may_execute and now >= give_up_at:
        return Next("give_up", verdict="outcome_unknown")
    due = _due(history, first_pause, now)
    if not may_execute and _is_unseen(history):
        due = max(due, deadline + CLOCK_SKEW)
    if now < due:
        return Next("wait", until=due)
    return Next("execute" if may_execute else "query")


def _is_unseen(history: Sequence[Sent]) -> bool:
    """Return whether the handler reports that it has never seen the reference, and never reported otherwise."""
    last = history[-1]
    return last.mode == "query" and last.kind == "not_found" and all(sent.kind != "accepted" for sent in history)


def _due(history: Sequence[Sent], first_pause: timedelta, now: datetime) -> datetime:
    """Return the earliest time of the next request: pauses double, and a busy handler names its own."""
    if not history:
        return now
    last = history[-1]
    if last.outcome is not None and last.kind == "busy" and last.outcome.retry_after is not None:
        return last.at + timedelta(seconds=last.outcome.retry_after)
    longest = MAX_PAUSE_ACCEPTED if last.kind == "accepted" else MAX_PAUSE
    return last.at + min(first_pause * (1 << min(len(history) - 1, 20)), longest)
