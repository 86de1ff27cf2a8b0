"""Functions with a list of work stop in time, report their results, and continue in the next run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError

from audit import sequencer, sweeper
from audit.sweeper import Sweeper
from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.errors import TransientError
from qaes.domain.ids import now
from tests.handlers.test_audit_recorder import stream_event, task_with
from tests.support.cloud import Cloud, Context, cloud
from tests.support.trail import entry_items, log, new_recorder, outbox, policy_outbox, store


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False, policy=False) as it:
        yield it


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], list[str]]:
    """Let each call of an operation take so many seconds of a function's time; the calls are noted."""

    def slow(operation: str, seconds: float) -> list[str]:
        call, calls = BaseClient._make_api_call, []

        def make(client: Any, name: str, arguments: Any) -> Any:
            if name == operation:
                calls.append(name)
            return call(client, name, arguments)

        monkeypatch.setattr(BaseClient, "_make_api_call", make)
        monkeypatch.setattr(
            Context, "get_remaining_time_in_millis", lambda self: int((self.seconds - len(calls) * seconds) * 1000)
        )
        return calls

    return slow


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sweeper run when the streams have had their time."""
    monkeypatch.setattr(sweeper, "now", lambda: now() + timedelta(minutes=2))


def test_sweeper_sends_metrics_when_hand_over_is_slow(
    aws: Cloud,
    clock: Callable[[str, float], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = [task_with(1) for _ in range(6)]
    later(monkeypatch)
    invoked = clock("Invoke", 20)
    assert aws.invoke("AuditSweeperFunction", {})["behind"] == 6
    assert '"AuditBacklog":[6.0]' in capsys.readouterr().out
    assert 0 < len(invoked) < 6
    for _ in range(6):
        invoked.clear()
        aws.invoke("AuditSweeperFunction", {})
    assert {item["pk"]["S"] for item in entry_items()} == set(tasks)


def test_sweeper_stores_how_far_it_has_looked_when_time_is_short(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "CHUNK", 2)
    tasks = [task_with(1) for _ in range(6)]
    handed: list[str] = []
    for _ in range(len(tasks)):
        one = Sweeper(
            outbox(), store(), log(), record=handed.extend, sequence=lambda _: None, policy_outbox=policy_outbox()
        )
        one.sweep(now() + timedelta(minutes=2), lambda seconds: seconds < sweeper.SECONDS_TO_HAND_OVER)
    assert set(handed) >= set(tasks[:2])
    swept = log().swept()
    assert swept is not None and len(swept.behind) >= 2


def test_sweeper_goes_on_when_lambda_refuses_to_take_a_task(
    aws: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task_id, call, left = task_with(1), BaseClient._make_api_call, [1]
    later(monkeypatch)

    def refuse(client: Any, name: str, arguments: Any) -> Any:
        if name == "Invoke" and left[0]:
            left[0] -= 1
            raise ClientError({"Error": {"Code": "TooManyRequestsException", "Message": "Rate exceeded"}}, name)
        return call(client, name, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    assert aws.invoke("AuditSweeperFunction", {})["behind"] == 1
    assert '"AuditBacklog":[1.0]' in capsys.readouterr().out
    aws.invoke("AuditSweeperFunction", {})
    assert [item["pk"]["S"] for item in entry_items()] == [task_id]


def test_sequencer_begins_no_further_tasks_when_time_is_short(
    aws: Cloud, clock: Callable[[str, float], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequencer, "TASKS_AT_ONCE", 2)
    tasks = [task_with(1) for _ in range(6)]
    for task_id in tasks:
        new_recorder().drain(task_id)
    transactions = clock("TransactWriteItems", 30)
    assert aws.invoke("SequencerFunction", {"task_ids": tasks}) == {"broken": []}
    assert 0 < log().head().size < 6
    for _ in range(4):
        transactions.clear()
        aws.invoke("SequencerFunction", {"task_ids": tasks})
    assert log().head().size == 6


def test_recorder_gives_events_back_when_time_is_short(aws: Cloud, clock: Callable[[str, float], list[str]]) -> None:
    tasks = [task_with(2) for _ in range(4)]
    event, numbers = stream_event(*tasks)
    clock("PutItem", 6)
    failed = [each["itemIdentifier"] for each in aws.invoke("RecordEventsFunction", event)["batchItemFailures"]]
    assert failed == [number for task_id in tasks[2:] for number in numbers[task_id]]


def test_anchor_sends_its_age_when_ledger_is_silent(
    aws: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new_recorder().drain(task_with(1))
    [item] = entry_items()
    aws.invoke("SequencerFunction", {"task_ids": [item["pk"]["S"]]})

    def silent(*_: Any, **__: Any) -> None:
        raise TransientError("the ledger does not answer")

    monkeypatch.setattr(LedgerClient, "submit_anchor", silent)
    with pytest.raises(TransientError):
        aws.invoke("AnchorFunction", {})
    assert '"AnchorInFlightSeconds":[' in capsys.readouterr().out
