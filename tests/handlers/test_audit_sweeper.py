"""The sweeper on moto: undelivered events get into the log once, even late; and the cost of that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any
from unittest.mock import patch

import boto3
import pytest
from botocore.client import BaseClient

from audit import sweeper
from audit.log import Swept
from audit.store import Outbox
from audit.sweeper import Outcome, Sweeper
from qaes.adapters import clients, shards
from qaes.domain.ids import now, parse_timestamp, timestamp
from tests.handlers.test_audit_fsck import check
from tests.handlers.test_audit_recorder import add_events, check_complete, end_task, start_task, stream_event, task_with
from tests.support.cloud import Cloud, cloud
from tests.support.template import resolve, template
from tests.support.trail import deliver, entry_items, log, new_recorder, outbox, policy_outbox, sequence_all, store

MINUTE = timedelta(minutes=1)
TASKS = "TasksTable"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    with cloud(state_machine=False, policy=False) as it:
        clients.client("dynamodb")
        clients.lambda_client()
        monkeypatch.setenv("RECORDER_FUNCTION", "RecordEventsFunction")
        monkeypatch.setenv("SEQUENCER_FUNCTION", "SequencerFunction")
        yield it


def sweep(after: timedelta = 2 * MINUTE, chunks: int = 1_000) -> Outcome:
    """A run so long from now, which has the time for so many chunks of events."""
    one = Sweeper(
        outbox(), store(), log(), record=sweeper._record, sequence=sweeper._sequence, policy_outbox=policy_outbox()
    )
    looks = iter(range(1, chunks))
    return one.sweep(now() + after, lambda _: next(looks, None) is not None)


def outcome(to_record: list[str], to_sequence: list[str], behind: int, *stuck: str) -> Outcome:
    """Of a run that is through with everything."""
    return Outcome(to_record, to_sequence, behind, list(stuck), int(sweeper.GRACE.total_seconds()))


def down(_: Any) -> None:
    raise RuntimeError("down")


def check_in_log(*tasks: str) -> None:
    """All that happened to them is on record and in the log, once."""
    report = check()
    assert [str(each) for each in report.findings] == []
    assert (report.tasks, report.size) == (len(tasks), report.entries)


def test_sweeper_handles_undelivered_events(aws: Cloud) -> None:
    task_id = start_task()
    new_recorder().drain(task_id)
    sequence_all(aws)
    end_task(task_id)  # the recorder is not invoked
    assert sweep() == outcome([task_id], [], 1)
    assert sweep(3 * MINUTE) == outcome([], [task_id], 1)
    assert sweep(4 * MINUTE) == outcome([], [], 0)
    check_complete(task_id, 2)
    check_in_log(task_id)


def test_sweeper_finds_unrecorded_task(aws: Cloud) -> None:
    tasks = [task_with(3), start_task()]
    for minutes in (2, 3):
        sweep(minutes * MINUTE)
    check_in_log(*tasks)


def test_day_late_is_not_too_late(aws: Cloud) -> None:
    assert sweep() == outcome([], [], 0)
    task_id = task_with(2)
    assert sweep(timedelta(days=1)).to_record == [task_id]
    assert sweep(timedelta(days=2)).to_sequence == [task_id]
    check_in_log(task_id)


def test_event_that_the_index_shows_late_is_found(aws: Cloud) -> None:
    """The timestamp is from before the last run."""
    assert sweep() == outcome([], [], 0)
    task_id = start_task()
    swept = log().swept()
    assert swept is not None and parse_timestamp(swept.through) + sweeper.OVERLAP > now()
    assert sweep(3 * MINUTE).to_record == [task_id]


def test_young_events_are_left_to_the_streams(aws: Cloud) -> None:
    start_task()
    assert sweep(timedelta(0)) == outcome([], [], 0)
    assert store().last_entry(start_task()) is None


def test_logged_events_cost_one_read_and_no_call(aws: Cloud) -> None:
    for _ in range(12):
        new_recorder().drain(task_with(2))
    sequence_all(aws)
    call, calls = BaseClient._make_api_call, []

    def counting(client: Any, operation: str, arguments: Any) -> Any:
        calls.append(operation)
        return call(client, operation, arguments)

    aws.invocations.clear()
    with patch.object(BaseClient, "_make_api_call", counting):
        assert sweep() == outcome([], [], 0)
        first = list(calls)
        assert sweep(10 * MINUTE) == outcome([], [], 0)
        calls.clear()
        assert sweep(11 * MINUTE) == outcome([], [], 0)
    assert not aws.invocations
    partitions = (sweeper.FIRST_LOOK.days + 1) * shards.DAY_SHARDS
    assert (first.count("BatchGetItem"), first.count("Query") <= partitions + 1) == (1, True), first
    assert set(calls) == {"GetItem", "PutItem", "Query"}, "later it reads newer events only"


def test_stream_may_come_at_the_same_time_and_later(aws: Cloud) -> None:
    task_id = task_with(4)
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(sweep),
            pool.submit(aws.invoke, "RecordEventsFunction", stream_event(task_id, events=4)[0]),
            pool.submit(sweep),
        ]
        for each in runs:
            each.result()
    check_complete(task_id, 4)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(sweep, 3 * MINUTE), pool.submit(deliver, aws, entry_items(task_id))]
        for each in runs:
            each.result()
    assert aws.invoke("RecordEventsFunction", stream_event(task_id, events=4)[0]) == {"batchItemFailures": []}
    assert deliver(aws, entry_items(task_id)) == []
    check_in_log(task_id)


def test_unrecordable_task_stays_listed_and_blocks_none(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "MOST_HANDED", 1)
    bad = start_task()
    boto3.client("dynamodb").delete_item(TableName="TasksTable", Key={"pk": {"S": bad}, "sk": {"S": "EVENT#000001"}})
    add_events(bad, 2, 2)
    good = task_with(2)
    for minutes in range(2, 6):
        found = sweep(minutes * MINUTE)
    assert (found.behind, found.to_record) == (1, [bad])
    swept = log().swept()
    assert swept is not None and swept.behind == {bad: 2}
    check_complete(good, 2)
    assert {each.key[0] for batch in log().batches() for each in batch.leaves} == {good}


def test_sweeper_keeps_list_when_recorder_is_down(aws: Cloud) -> None:
    task_id = start_task()

    aws.faults["RecordEventsFunction"] = down
    assert sweep().behind == 1
    with patch.object(sweeper, "_invoke", side_effect=RuntimeError("throttled")), pytest.raises(RuntimeError):
        sweep(3 * MINUTE)
    aws.faults.clear()
    for minutes in (4, 5):
        sweep(minutes * MINUTE)
    check_in_log(task_id)


def test_many_events_are_looked_at_in_several_runs(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "CHUNK", 2)
    begin = now()
    tasks = [start_task() for _ in range(7)]
    sweep(chunks=2)
    swept = log().swept()
    assert swept is not None and parse_timestamp(swept.through) < begin + MINUTE, "it is not through with all of them"
    # The index has milliseconds: the overlap repeats events with the same one as the last read event.
    for minutes in range(3, 8):
        sweep(minutes * MINUTE, chunks=2)
    check_in_log(*tasks)


def test_sweeper_reads_all_events_while_time_remains(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "CHUNK", 2)
    tasks = [start_task() for _ in range(25)]
    found = sweep()
    assert set(found.to_record) == set(tasks)
    assert found.lag_seconds == sweeper.GRACE.total_seconds()


def test_sweeper_goes_on_when_the_overlap_takes_all_its_time(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run continues after an unfinished run's progress: otherwise it would never advance."""
    monkeypatch.setattr(sweeper, "CHUNK", 2)
    tasks = [start_task() for _ in range(9)]
    for minutes in range(10, 30):
        sweep(minutes * MINUTE, chunks=2)
    check_in_log(*tasks)


def test_events_of_all_shards_are_found_in_order(aws: Cloud) -> None:
    tasks = [task_with(2) for _ in range(20)]
    found = list(outbox().written(timestamp(now() - MINUTE), timestamp(now())))
    assert found == sorted(found)
    assert {(task_id, number) for _, task_id, number in found} == {
        (task, number) for task in tasks for number in (1, 2)
    }
    assert len({shards.day_key("", task) for task in tasks}) > 1


def test_long_list_is_worked_off_before_it_gets_longer(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "CHUNK", 1)
    monkeypatch.setattr(sweeper, "MOST_BEHIND", 2)
    tasks = [start_task() for _ in range(5)]
    assert sweep().behind == 2
    for minutes in range(3, 12):
        sweep(minutes * MINUTE)
    check_in_log(*tasks)


def test_concurrent_runs_may_both_store_progress(aws: Cloud) -> None:
    """The earlier run stores last, so the later run's events are read again."""
    begin: datetime = now()
    early = Sweeper(
        outbox(), store(), log(), record=lambda _: None, sequence=lambda _: None, policy_outbox=policy_outbox()
    )
    task_id = start_task()
    assert sweep(timedelta(days=1)).behind == 1
    assert early.sweep(begin).behind == 1  # it finds the other's list
    log().record_swept(Swept(timestamp(begin - MINUTE), {}, {}))
    assert sweep().to_sequence == [task_id]
    check_in_log(task_id)


def erase(task_id: str) -> None:
    client = boto3.client("dynamodb")
    of_the_task = {":pk": {"S": task_id}}
    found = client.query(TableName=TASKS, KeyConditionExpression="pk = :pk", ExpressionAttributeValues=of_the_task)
    for item in found["Items"]:
        client.delete_item(TableName=TASKS, Key={"pk": item["pk"], "sk": item["sk"]})


def test_task_that_was_erased_leaves_the_list(aws: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    aws.faults["RecordEventsFunction"] = down
    erased, other = task_with(2), start_task()
    assert sweep().behind == 2
    erase(erased)
    found = sweep(3 * MINUTE)
    assert (found.behind, found.to_record) == (1, [other])
    assert [
        (each.task_id, each.number) for each in caplog.records if each.message == "the task has neither event nor entry"
    ] == [(erased, 2)]
    swept = log().swept()
    assert swept is not None and (swept.behind.keys(), swept.since.keys()) == ({other}, {other})


def test_recorded_task_stays_listed_when_events_are_erased(aws: Cloud) -> None:
    task_id = start_task()
    new_recorder().drain(task_id)
    aws.faults["SequencerFunction"] = down
    assert sweep() == outcome([], [task_id], 1)
    erase(task_id)
    assert sweep(3 * MINUTE) == outcome([], [task_id], 1)
    aws.faults.clear()
    sweep(4 * MINUTE)
    assert sweep(5 * MINUTE) == outcome([], [], 0)


def test_task_behind_for_a_day_is_counted_separately(aws: Cloud) -> None:
    bad = start_task()
    boto3.client("dynamodb").delete_item(TableName=TASKS, Key={"pk": {"S": bad}, "sk": {"S": "EVENT#000001"}})
    add_events(bad, 2, 2)
    assert sweep() == outcome([bad], [], 1)
    assert sweep(timedelta(hours=23)) == outcome([bad], [], 1)
    assert sweep(timedelta(days=1) + 2 * MINUTE) == outcome([bad], [], 0, bad), "it is handed over all the same"
    add_events(bad, 3, 3)
    assert sweep(timedelta(days=1) + 3 * MINUTE) == outcome([bad], [], 0, bad), "with more events it is no newer"
    late = start_task()
    log().record_swept(Swept(timestamp(now() - MINUTE), {bad: 3}, {bad: timestamp(now() - timedelta(days=2))}))
    assert sweep() == outcome([bad, late], [], 1, bad)


def test_sweeper_reports_its_lag(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "CHUNK", 1)
    for _ in range(3):
        new_recorder().drain(start_task())
    sequence_all(aws)
    late = sweep(timedelta(hours=1), chunks=1)
    assert late.behind == 0 and 3590 <= late.lag_seconds <= 3600


def test_function_reports_the_backlog(aws: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert aws.invoke("AuditSweeperFunction", {}) == {"recorded": [], "sequenced": [], "behind": 0, "stuck": 0}
    said = capsys.readouterr().out
    for name, value in (("AuditBacklog", 0.0), ("TasksStuckInAudit", 0.0), ("AuditSweepLagSeconds", 60.0)):
        assert f'"{name}":[{value}]' in said


def test_alarms_use_the_functions_metrics(aws: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """Name, namespace and dimensions as in the log: an alarm on anything else is silent for ever."""
    aws.invoke("AuditSweeperFunction", {})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"_aws"')]
    told = {
        (group["Namespace"], metric["Name"], frozenset((name, line[name]) for name in group["Dimensions"][0]))
        for line in lines
        for group in line["_aws"]["CloudWatchMetrics"]
        for metric in group["Metrics"]
    }
    for name in ("AuditBacklogAlarm", "AuditSweepLateAlarm"):
        alarm = template()["Resources"][name]["Properties"]
        dimensions = frozenset((each["Name"], each["Value"]) for each in alarm["Dimensions"])
        assert (resolve(alarm["Namespace"]), alarm["MetricName"], dimensions) in told, name


def test_outbox_reads_decisions_only_for_peoples_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweeper's function has neither the name of their table nor a right to it."""
    monkeypatch.delenv("DECISIONS_TABLE", raising=False)
    assert Outbox("TasksTable").there([]) == set()
