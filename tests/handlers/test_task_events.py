"""The EVENT items on moto: one for each change, without the texts that other items have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from audit.store import AuditStore, Outbox
from benchmarks.units import item_size
from qaes.adapters.task_events import event_item, events_of
from qaes.adapters.task_items import TaskItems
from qaes.adapters.task_repository import TaskStore
from qaes.domain.canonical import hash_of
from qaes.domain.ids import new_task_id, timestamp
from qaes.domain.ids import now as moment
from qaes.domain.models import Event
from qaes.domain.tasks.decisions import Decided
from tests.handlers.test_task_repository import new_task, planned, waiting
from tests.support.api import items
from tests.support.cloud import Cloud, cloud
from tests.support.trail import new_recorder

TEXT = "x" * 3000


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def event(number: int, **fields: Any) -> Event:
    given = {"kind": "step_started", "actor": "worker", "status": "running", "timestamp": timestamp(moment())}
    hashes = {"input_hash": hash_of(number), "output_hash": hash_of([number])}
    return Event.model_validate(given | hashes | fields)


def event_items(task_id: str) -> list[dict[str, Any]]:
    found = [
        each for each in items("TasksTable") if each["pk"]["S"] == task_id and each["sk"]["S"].startswith("EVENT#")
    ]
    return sorted(found, key=lambda item: str(item["sk"]["S"]))


EVENTS = [
    event(1, step_index=0, step_id="step_1", step_type="check_balance", input='{"run":1}', output_of="policy"),
    event(2, kind="step_executed", status="succeeded", step_index=0, step_id="step_1", input_of="parameters"),
    event(3, kind="task_ended", actor="execution", status="completed", plan_hash=hash_of("plan"), input='{"a":"b"}'),
]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_event_item_survives_a_round_trip(count: int) -> None:
    item = event_item("task_1", 5, EVENTS[:count])
    assert item["sk"]["S"] == f"EVENT#{4 + count:06d}"
    assert list(events_of(item)) == list(enumerate(EVENTS[:count], start=5))


def test_event_item_of_a_step_and_the_end_fits_in_1_kb() -> None:
    assert item_size(event_item(new_task_id(), 12, EVENTS)) <= 1024


def test_change_with_two_events_writes_one_item(store: TaskStore) -> None:
    task_id, _ = waiting(store)
    before, count = len(event_items(task_id)), store.get_task(task_id).events
    store.cancel(task_id, subject="alice", reason="changed my mind")
    *_, last = event_items(task_id)
    assert len(event_items(task_id)) == before + 1
    cancelled, ended = (each for _, each in events_of(last))
    assert isinstance(cancelled, Event) and cancelled.kind == "approval_cancelled"
    assert isinstance(ended, Decided), "a person ended the task"
    assert [number for number, _ in events_of(last)] == [count + 1, count + 2]


@pytest.mark.parametrize("recorded", [3, 4, 5])
def test_recorder_goes_on_in_the_middle_of_a_change(store: TaskStore, recorded: int) -> None:
    """The change of a cancellation has the events 5 and 6; the recorder stopped after `recorded` entries."""
    task_id, _ = waiting(store)
    store.cancel(task_id, subject="alice", reason="")
    audit, outbox = AuditStore("AuditEntriesTable"), Outbox("TasksTable")
    events = dict(outbox.events_after(task_id, 0))
    assert list(events) == [1, 2, 3, 4, 5, 6]

    class Stopped(Outbox):
        def events_after(self, task_id: str, seq: int) -> Iterator[tuple[int, Event]]:
            return ((number, event) for number, event in super().events_after(task_id, seq) if number <= recorded)

    stopped = new_recorder()
    stopped._outbox = Stopped("TasksTable")
    assert stopped.drain(task_id).seq == recorded
    assert new_recorder().drain(task_id) == new_recorder().drain(task_id).__class__(6 - recorded, 6)
    kinds = [json.loads(entry.text)["kind"] for entry in audit.entries(task_id)]
    assert kinds == [each.kind for each in events.values()]


def test_event_has_no_text_that_another_item_has(store: TaskStore) -> None:
    task = new_task().model_copy(update={"description": TEXT})
    store.start_task(task)
    [item] = event_items(task.task_id)
    assert TEXT not in str(item) and item_size(item) <= 1024
    [disclosed] = Outbox("TasksTable").disclosed(task.task_id).values()
    assert json.loads(disclosed.input)["description"] == TEXT


def test_plan_is_not_in_its_event(store: TaskStore) -> None:
    task_id, plan = planned(store)
    built = event_items(task_id)[-1]
    assert "step_3" not in str(built) and item_size(built) <= 1024
    assert json.loads(Outbox("TasksTable").disclosed(task_id)[3].output) == plan.model_dump(mode="json")


@pytest.mark.parametrize("gone", ["TASK", "PLAN"])
def test_missing_text_is_empty_and_the_rest_is_read(store: TaskStore, gone: str) -> None:
    task_id, plan = planned(store)
    pk = task_id if gone == "TASK" else plan.plan_id
    boto3.client("dynamodb").delete_item(TableName="TasksTable", Key={"pk": {"S": pk}, "sk": {"S": gone}})
    disclosed = Outbox("TasksTable").disclosed(task_id)
    assert (disclosed[3].output, bool(disclosed[2].input)) == ("", True)
    assert json.loads(disclosed[3].input) == json.loads(disclosed[1].input)


def test_event_is_not_written_twice_under_its_number(store: TaskStore) -> None:
    task_id, _ = planned(store)
    put = TaskItems("TasksTable").put_events(task_id, 3, [event(1)])["Put"]
    with pytest.raises(boto3.client("dynamodb").exceptions.ConditionalCheckFailedException):
        boto3.client("dynamodb").put_item(**put)
