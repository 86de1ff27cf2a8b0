"""Interrupted work ends properly: a decision not delivered, a task not started, an execution stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest

from qaes.adapters import clients
from qaes.adapters.task_repository import TaskStore
from qaes.domain.ids import new_task_id, now, timestamp
from qaes.domain.models import Task
from tests.e2e.conftest import MONITORING, SOURCE, Api, audit_environment

LONG_AGO = "2026-01-01T00:00:00.000Z"


@pytest.fixture
def store(api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[TaskStore]:
    """The tasks' table, as this account's root: for changes that the API does not allow."""
    for name, value in audit_environment(api.cloud).items():
        monkeypatch.setenv(name, value)
    clients.reset()
    yield TaskStore(api.cloud.resources["TasksTable"])
    clients.reset()


def _grow_old(api: Api, task_id: str) -> None:
    """The reconciler leaves a task alone that has just changed."""
    dynamodb, table = api.cloud.client("dynamodb"), api.cloud.resources["TasksTable"]
    key = {"pk": {"S": task_id}, "sk": {"S": "TASK"}}
    item = dynamodb.get_item(TableName=table, Key=key, ConsistentRead=True)["Item"]
    old = json.loads(item["data"]["S"]) | {"updated_at": LONG_AGO}
    dynamodb.put_item(TableName=table, Item=item | {"data": {"S": json.dumps(old)}})


def test_ledgers_event_of_a_transfers_end_reaches_the_worker(api: Api) -> None:
    task_id = new_task_id()
    detail = {"task_id": task_id, "step_id": "step_3", "outcome": "confirmed", "txid": "x"}
    entry = {"Source": "qaes.qubic", "DetailType": "transfer_settled", "Detail": json.dumps(detail)}
    api.cloud.client("events").put_events(Entries=[entry | {"EventBusName": api.cloud.resources["LedgerBus"]}])
    deadline = time.monotonic() + 30
    while not [
        line for line in api.cloud.service_logs(task_id, everything=False) if "belongs to no known task" in line
    ]:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _reconcile(api: Api) -> list[str]:
    return list(api.invoke("ReconcilerFunction", {"detail-type": "Scheduled Event"})["reconciled"])


def test_decision_that_was_not_delivered_is_delivered(api: Api, store: TaskStore, waiting: Callable[..., str]) -> None:
    task_id = waiting(2)
    store.decide(task_id, approved=True, subject="bob", reason="and then the gateway crashed")
    _grow_old(api, task_id)
    assert task_id in _reconcile(api)
    assert api.wait(task_id)["status"] == "completed"


def test_task_that_was_written_and_not_started_is_started(api: Api, store: TaskStore) -> None:
    task = Task(
        task_id=new_task_id(),
        status="pending",
        task_type="monitor_wallet",
        description=str(MONITORING["description"]),
        parameters={"wallet_address": SOURCE, "alert_threshold": 1},
        requester="alice",
        created_at=timestamp(now()),
        updated_at=timestamp(now()),
    )
    store.start_task(task)
    _grow_old(api, task.task_id)
    assert task.task_id in _reconcile(api)
    assert api.wait(task.task_id)["status"] == "completed"


def test_task_whose_execution_was_stopped_has_failed(api: Api, waiting: Callable[..., str]) -> None:
    """Without a call of ours: the change of the execution's status reaches the reconciler by its rule."""
    task_id = waiting(2)
    api.cloud.client("stepfunctions").stop_execution(executionArn=api.execution_arn(task_id))
    task = api.wait(task_id, "failed")
    assert task["error"]["reason"] == "the execution was stopped"
    assert api.decide(task_id, approved=True).status_code == 409
    assert api.trail(task_id)[-1]["status"] == "failed"


def test_recording_again_changes_no_entry(api: Api) -> None:
    task_id = api.start(MONITORING)
    api.wait(task_id)
    before = api.trail(task_id)
    api.invoke("RecordEventsFunction", {"task_id": task_id})
    api.invoke("RecordEventsFunction", {"task_id": task_id})
    assert api.trail(task_id) == before
