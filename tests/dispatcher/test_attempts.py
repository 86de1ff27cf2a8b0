"""The next request of an attempt: examples, and a handler with a bad network that never acts twice."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.attempts import CLOCK_SKEW, ENDS, MAX_PAUSE, MAX_PAUSE_ACCEPTED, Next, Sent, next_request
from dispatcher.contract import Outcome

START = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
DEADLINE = START + timedelta(minutes=5)
GIVE_UP = START + timedelta(minutes=30)
KINDS = ["done", "accepted", "refused", "busy", "not_found", "conflict", "not_sent", "unknown", None]


def sent(mode: Any, kind: Any, at: float = 0, **members: Any) -> Sent:
    outcome = None if kind is None else Outcome(kind=kind, **members)
    return Sent(mode, START + timedelta(seconds=at), outcome)


def next_at(seconds: float, *history: Sent) -> Next:
    return next_request(history, now=START + timedelta(seconds=seconds), deadline=DEADLINE, give_up_at=GIVE_UP)


def test_next_request_executes_when_nothing_was_sent() -> None:
    assert next_at(0).action == "execute"
    assert next_at(1, sent("execute", "not_sent")).action == "execute"


@pytest.mark.parametrize("kind", ["unknown", "busy", "accepted", None])
def test_next_request_queries_before_any_repetition(kind: str | None) -> None:
    assert next_at(60, sent("execute", kind)).action == "query"


def test_next_request_executes_again_after_not_found_only() -> None:
    lost = sent("execute", "unknown")
    assert next_at(60, lost, sent("query", "not_found", 1)).action == "execute"
    for kind in ("unknown", "busy", "not_sent", "accepted", None):
        assert next_at(60, lost, sent("query", "not_found", 1), sent("query", kind, 2)).action == "query"


def test_next_request_queries_when_not_found_contradicts() -> None:
    history = (sent("execute", "accepted"), sent("query", "not_found", 1))
    assert next_at(60, *history).action == "query"


@pytest.mark.parametrize("kind", sorted(ENDS))
def test_next_request_ends_when_the_outcome_is_final(kind: str) -> None:
    assert next_at(0, sent("execute", kind)).action == "ended"


def test_next_request_waits_as_long_as_a_busy_handler_asks() -> None:
    busy = sent("execute", "busy", retry_after=30)
    assert next_at(29, busy) == Next("wait", until=START + timedelta(seconds=30))
    assert next_at(30, busy).action == "query"


def test_next_request_pauses_longer_each_time_up_to_a_bound() -> None:
    def pause(kind: str, count: int) -> float:
        until = next_at(0, *[sent("execute", kind)] * count).until
        assert until is not None
        return (until - START).total_seconds()

    assert [pause("unknown", count) for count in (1, 2, 3, 50)] == [1, 2, 4, MAX_PAUSE.total_seconds()]
    assert pause("accepted", 50) == MAX_PAUSE_ACCEPTED.total_seconds()


def test_next_request_gives_up_as_not_done_when_nothing_was_sent() -> None:
    assert next_at(300) == Next("give_up", verdict="not_done")
    assert next_at(300, sent("execute", "not_sent")) == Next("give_up", verdict="not_done")


def test_not_found_is_final_only_after_deadline_and_skew() -> None:
    lost = sent("execute", "unknown")
    early = sent("query", "not_found", 301)
    assert next_at(302, lost, early) == Next("wait", until=DEADLINE + CLOCK_SKEW)
    assert next_at(360, lost, early).action == "query"
    assert next_at(361, lost, sent("query", "not_found", 360)) == Next("give_up", verdict="not_done")


def test_next_request_gives_up_as_unknown_at_the_end() -> None:
    history = (sent("execute", "unknown"), sent("query", "unknown", 60))
    assert next_at(1799, *history).action == "query"
    assert next_at(1800, *history) == Next("give_up", verdict="outcome_unknown")


@given(
    st.lists(st.tuples(st.sampled_from(["execute", "query"]), st.sampled_from(KINDS)), max_size=8), st.floats(0, 4000)
)
def test_execute_never_follows_a_request_that_may_have_arrived(pairs: list[tuple[str, Any]], now: float) -> None:
    history = [sent(mode, kind, at) for at, (mode, kind) in enumerate(pairs)]
    if next_at(now, *history).action != "execute":
        return
    assert now < 300
    may_have_arrived = any(each.mode == "execute" and each.kind != "not_sent" for each in history)
    assert not may_have_arrived or (history[-1].mode, history[-1].kind) == ("query", "not_found")


@given(st.lists(st.sampled_from(["arrives", "answer lost", "request lost", "delayed", "not sent"]), max_size=60))
def test_attempt_ends_with_at_most_one_effect(network: list[str]) -> None:
    """Run an attempt against a handler that keeps the contract, over a network that loses and delays messages."""
    handler, delayed, history, now, fates = Handler(), [], [], START, iter(network)
    for _ in range(400):
        step = next_request(history, now=now, deadline=DEADLINE, give_up_at=GIVE_UP)
        if step.action in {"give_up", "ended"}:
            break
        if step.until is not None:
            assert step.until > now
            now = step.until
            continue
        fate = next(fates, "arrives")
        answer = handler.receive(step.action, now) if fate in {"arrives", "answer lost"} else "unknown"
        delayed += [step.action] if fate == "delayed" else []
        kind = {"not sent": "not_sent", "arrives": answer}.get(fate, "unknown")
        history.append(sent(step.action, kind, (now - START).total_seconds()))
        now += timedelta(seconds=1)
    else:
        pytest.fail("the attempt never ends")
    for mode in delayed:
        handler.receive(mode, now)
    assert handler.effects <= 1
    if step.verdict == "not_done":
        assert handler.effects == 0


class Handler:
    """A handler that keeps the contract; its clock is a little behind the dispatcher's."""

    def __init__(self) -> None:
        self.effects = 0

    def receive(self, mode: str, at: datetime) -> str:
        if self.effects == 0 and mode == "query":
            return "not_found"
        if self.effects == 0 and at - CLOCK_SKEW / 2 >= DEADLINE:
            return "refused"
        self.effects = 1
        return "done"
