"""The recorder on moto: every event once, in order, under concurrent runs and crashes."""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boto3
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ReadTimeoutError

from audit.policy_stream import PolicyOutbox
from audit.recorder import Recorder
from audit.store import AuditStore, Outbox, StoredEntry
from qaes.adapters import clients, dynamo
from qaes.adapters.decisions import DecisionsTable
from qaes.adapters.task_items import TaskItems, task_item
from qaes.adapters.task_repository import TaskStore
from qaes.domain.audit import BrokenChainError, verify_chain
from qaes.domain.errors import TransientError
from qaes.domain.ids import new_task_id, now, timestamp
from qaes.domain.models import Event, Task
from tests.support.cloud import Cloud, cloud

EVENTS = Path(__file__).parents[2] / "events" / "audit"
LOG_ID = "qaes"
SOME_HASH, OTHER_HASH = "1" * 64, "2" * 64


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        clients.client("dynamodb")
        yield it


def new_recorder() -> Recorder:
    return Recorder(
        Outbox("TasksTable"),
        AuditStore("AuditEntriesTable"),
        log_id=LOG_ID,
        policy_outbox=PolicyOutbox("PolicyTable"),
    )


def start_task(requester: str = "alice") -> str:
    moment = timestamp(now())
    task = Task(
        task_id=new_task_id(),
        status="pending",
        task_type="monitor_wallet",
        description="a test",
        parameters={"wallet_address": "0x1234567890abcdef"},
        requester=requester,
        created_at=moment,
        updated_at=moment,
    )
    TaskStore("TasksTable").start_task(task)
    return task.task_id


def end_task(task_id: str) -> None:
    TaskStore("TasksTable").end_task(task_id, "failed", actor="execution", reason="a test", failed_step=None)


def add_events(task_id: str, first: int, last: int) -> None:
    """Put EVENT items as the task store does, for tasks with more events than a plan would make."""
    for number in range(first, last + 1):
        event = Event(
            kind="step_executed",
            actor="worker",
            status="succeeded",
            input_hash=SOME_HASH,
            output_hash=OTHER_HASH,
            step_index=number,
            step_id=f"step_{number}",
            step_type="check_balance",
            timestamp=timestamp(now()),
        )
        boto3.client("dynamodb").put_item(**TaskItems("TasksTable").put_events(task_id, number, [event])["Put"])
    task = TaskStore("TasksTable").get_task(task_id)
    counted = task_item(task.model_copy(update={"events": max(last, task.events)}))
    boto3.client("dynamodb").put_item(TableName="TasksTable", Item=counted)


def task_with(events: int) -> str:
    task_id = start_task()
    add_events(task_id, 2, events)
    return task_id


def entries(task_id: str) -> list[StoredEntry]:
    return list(AuditStore("AuditEntriesTable").entries(task_id))


def check_complete(task_id: str, count: int) -> None:
    """Each of `count` entries is there once, in an unbroken chain, found by each of its hashes."""
    store, found = AuditStore("AuditEntriesTable"), entries(task_id)
    assert [entry.seq for entry in found] == list(range(1, count + 1))
    verify_chain([(entry.text, entry.leaf) for entry in found], log_id=LOG_ID, stream=task_id)
    for entry in found:
        said = json.loads(entry.text)
        for hash_, role in ((entry.leaf, "leaf"), (said["input_hash"], "input"), (said["output_hash"], "output")):
            assert (task_id, entry.seq, role) in {(p.task_id, p.seq, p.role) for p in store.occurrences(hash_)}


def test_state_records_outstanding_events_and_counts_them(aws: Cloud) -> None:
    task_id = start_task()
    assert aws.invoke("RecordEventsFunction", {"task_id": task_id}) == {"recorded": 1, "seq": 1}
    end_task(task_id)
    assert aws.invoke("RecordEventsFunction", {"task_id": task_id}) == {"recorded": 1, "seq": 2}
    assert aws.invoke("RecordEventsFunction", {"task_id": task_id}) == {"recorded": 0, "seq": 2}
    check_complete(task_id, 2)


def test_entry_has_the_events_fields(aws: Cloud) -> None:
    task_id = task_with(2)
    new_recorder().drain(task_id)
    started, step = (json.loads(entry.text) for entry in entries(task_id))
    assert (started["kind"], started["step_index"], started["step_type"]) == ("task_started", -1, "task_started")
    assert (started["actor"], started["status"], started["v"]) == ("alice", "pending", 1)
    assert (step["step_index"], step["step_id"], step["step_type"]) == (2, "step_2", "check_balance")
    assert (step["input_hash"], step["output_hash"]) == (SOME_HASH, OTHER_HASH)


def test_task_without_events_has_nothing_to_record(aws: Cloud) -> None:
    assert aws.invoke("RecordEventsFunction", {"task_id": new_task_id()}) == {"recorded": 0, "seq": 0}


def test_recording_does_not_ask_the_ledger(aws: Cloud) -> None:
    task_id = task_with(30)
    drained = new_recorder().drain(task_id)
    assert (drained.recorded, drained.seq) == (30, 30)
    assert aws.invocations["LedgerFunction"] == 0
    check_complete(task_id, 30)


def test_events_are_read_page_by_page(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    task_id = task_with(7)
    call = BaseClient._make_api_call

    def two_at_a_time(client: Any, operation: str, arguments: Any) -> Any:
        if operation == "Query" and "Limit" not in arguments:
            arguments = arguments | {"Limit": 2}
        return call(client, operation, arguments)

    with patch.object(BaseClient, "_make_api_call", two_at_a_time):
        assert new_recorder().drain(task_id).recorded == 7
    check_complete(task_id, 7)


def test_missing_event_stops_the_recorder(aws: Cloud) -> None:
    task_id = start_task()
    add_events(task_id, 3, 3)
    with pytest.raises(BrokenChainError) as caught:
        new_recorder().drain(task_id)
    assert (caught.value.seq, caught.value.check) == (2, "seq")
    assert len(entries(task_id)) == 1


def test_nothing_is_recorded_on_top_of_an_altered_entry(aws: Cloud) -> None:
    task_id = start_task()
    new_recorder().drain(task_id)
    [entry] = entries(task_id)
    boto3.client("dynamodb").update_item(
        TableName="AuditEntriesTable",
        Key={"pk": {"S": task_id}, "sk": {"S": "ENTRY#000001"}},
        UpdateExpression="SET #text = :text",
        ExpressionAttributeNames={"#text": "text"},
        ExpressionAttributeValues={":text": {"S": entry.text.replace("alice", "mallory")}},
    )
    end_task(task_id)
    with pytest.raises(BrokenChainError):
        new_recorder().drain(task_id)
    assert len(entries(task_id)) == 1


@pytest.mark.parametrize("seed", range(4))
def test_drains_at_the_same_time_record_each_event_once(aws: Cloud, seed: int) -> None:
    task_id, count, workers = task_with(6), 12, 4
    call, chance, ready = BaseClient._make_api_call, random.Random(seed), threading.Barrier(workers + 1)  # noqa: S311 (jitter)

    def unevenly(client: Any, operation: str, arguments: Any) -> Any:
        time.sleep(chance.random() / 300)
        return call(client, operation, arguments)

    def drain() -> int:
        ready.wait()
        return sum(new_recorder().drain(task_id).recorded for _ in range(3))

    with patch.object(BaseClient, "_make_api_call", unevenly), ThreadPoolExecutor(workers) as pool:
        drains = [pool.submit(drain) for _ in range(workers)]
        ready.wait()
        add_events(task_id, 7, count)
        recorded = sum(each.result() for each in drains)
    recorded += new_recorder().drain(task_id).recorded
    assert recorded == count
    check_complete(task_id, count)


class CrashError(Exception):
    """The process is gone."""


def crashing(at: int, *, after: bool, calls: list[str]) -> Callable[..., Any]:
    """Calls to AWS, of which number `at` ends the process: before it is made, or right after."""
    call = BaseClient._make_api_call

    def make(client: Any, operation: str, arguments: Any) -> Any:
        calls.append(operation)
        number = len(calls)
        if number == at and not after:
            raise CrashError(operation)
        answer = call(client, operation, arguments)
        if number == at:
            raise CrashError(operation)
        return answer

    return make


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_crash_at_any_call_is_made_good_by_the_next_drain(aws: Cloud, after: bool) -> None:
    crashed: list[str] = []
    for at in range(1, 200):
        task_id, calls = task_with(3), []
        with patch.object(BaseClient, "_make_api_call", crashing(at, after=after, calls=calls)):
            try:
                new_recorder().drain(task_id)
            except (CrashError, TransientError):
                crashed.append(calls[at - 1])
        if len(calls) < at:
            break
        before = entries(task_id)
        assert new_recorder().drain(task_id).recorded == 3 - len(before)
        assert entries(task_id)[: len(before)] == before, f"a crash at call {at} ({crashed[-1]}) changed an entry"
        check_complete(task_id, 3)
    assert {"Query", "PutItem"} <= set(crashed)


def test_drain_waits_when_the_table_is_throttled(aws: Cloud) -> None:
    task_id, call, left = task_with(2), BaseClient._make_api_call, [2]

    def throttled(client: Any, operation: str, arguments: Any) -> Any:
        if operation == "PutItem" and left[0]:
            left[0] -= 1
            raise client.exceptions.ProvisionedThroughputExceededException(
                {"Error": {"Code": "ProvisionedThroughputExceededException", "Message": "slow down"}}, operation
            )
        return call(client, operation, arguments)

    with patch.object(BaseClient, "_make_api_call", throttled):
        assert new_recorder().drain(task_id).recorded == 2
    assert left == [0]
    check_complete(task_id, 2)


def test_drain_goes_on_when_the_answer_of_a_put_was_lost(aws: Cloud) -> None:
    task_id, call, lost = task_with(2), BaseClient._make_api_call, [1]

    def losing(client: Any, operation: str, arguments: Any) -> Any:
        answer = call(client, operation, arguments)
        if operation == "PutItem" and lost[0]:
            lost[0] -= 1
            raise ReadTimeoutError(endpoint_url="https://aws")
        return answer

    with patch.object(BaseClient, "_make_api_call", losing):
        assert new_recorder().drain(task_id).seq == 2
    assert lost == [0]
    check_complete(task_id, 2)


# The stream


def stream_event(*tasks: str, events: int = 2) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A batch in which the tasks' events alternate, and the sequence numbers of each task."""
    batch = json.loads((EVENTS / "record_events.json").read_text())
    records: list[Any] = []
    numbers: dict[str, list[str]] = {task_id: [] for task_id in tasks}
    for number in range(1, events + 1):
        for task_id in tasks:
            record = json.loads(json.dumps(batch["Records"][0]))
            record["dynamodb"]["Keys"] = {"pk": {"S": task_id}, "sk": {"S": f"EVENT#{number:06d}"}}
            record["dynamodb"]["SequenceNumber"] = str(1000 + len(records))
            numbers[task_id].append(record["dynamodb"]["SequenceNumber"])
            records.append(record)
    return {"Records": records}, numbers


def test_stream_drains_each_task_of_the_batch(aws: Cloud) -> None:
    first, second = task_with(2), task_with(2)
    event, _ = stream_event(first, second)
    assert aws.invoke("RecordEventsFunction", event) == {"batchItemFailures": []}
    check_complete(first, 2)
    check_complete(second, 2)
    assert aws.invoke("RecordEventsFunction", event) == {"batchItemFailures": []}


def test_stream_gets_back_events_of_failed_task(aws: Cloud) -> None:
    good, bad = task_with(2), start_task()
    add_events(bad, 3, 3)
    event, numbers = stream_event(good, bad)
    answer = aws.invoke("RecordEventsFunction", event)
    assert answer == {"batchItemFailures": [{"itemIdentifier": number} for number in numbers[bad]]}
    check_complete(good, 2)


def test_stream_and_the_state_do_the_same(aws: Cloud) -> None:
    task_id = task_with(3)
    assert aws.invoke("RecordEventsFunction", {"task_id": task_id})["recorded"] == 3
    assert aws.invoke("RecordEventsFunction", stream_event(task_id)[0]) == {"batchItemFailures": []}
    check_complete(task_id, 3)


def test_sample_events_are_taken(aws: Cloud) -> None:
    assert aws.invoke("RecordEventsFunction", json.loads((EVENTS / "record_task.json").read_text())) == {
        "recorded": 0,
        "seq": 0,
    }
    events = json.loads((EVENTS / "record_events.json").read_text())
    assert aws.invoke("RecordEventsFunction", events) == {"batchItemFailures": []}
    sample = events["Records"][0]["dynamodb"]
    client = boto3.client("dynamodb")
    for record in events["Records"]:
        image = record["dynamodb"]["NewImage"]
        bytes_ = {name: {"B": base64.b64decode(value["B"])} for name, value in image.items() if "B" in value}
        client.put_item(TableName="TasksTable", Item=image | bytes_)
    started = Event(
        kind="task_started", actor="demo_user", status="pending", input_hash=SOME_HASH, output_hash=OTHER_HASH,
        timestamp=sample["NewImage"]["timestamp"]["S"],
    )  # fmt: skip
    dynamo.transact([DecisionsTable().put(sample["Keys"]["pk"]["S"], 1, started)])
    assert aws.invoke("RecordEventsFunction", events) == {"batchItemFailures": []}
    check_complete(sample["Keys"]["pk"]["S"], 3)
