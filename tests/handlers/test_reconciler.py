"""The reconciler on moto: what was left undone is done, and what is being done is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from qaes.adapters.executions import Executions
from qaes.adapters.task_store import TaskStore
from qaes.domain.ids import new_task_id
from qaes.domain.models import Task
from tests.handlers.test_task_store import new_task, planned
from tests.support.cloud import Cloud, cloud


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setattr("agent_runtime.reconciler.GRACE_SECONDS", -1)
    with cloud() as it:
        yield it


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def reconcile(aws: Cloud) -> list[str]:
    found: list[str] = aws.invoke("ReconcilerFunction", {"detail-type": "Scheduled Event"})["reconciled"]
    return found


def ended(task_id: str, status: str, **changes: Any) -> dict[str, Any]:
    """What EventBridge sends when an execution's status changes."""
    detail = {"status": status, "name": task_id, "input": f'{{"task_id": "{task_id}"}}'} | changes
    return {"detail-type": "Step Functions Execution Status Change", "detail": detail}


def test_a_task_that_was_written_and_not_started_is_started_once(aws: Cloud, store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    assert reconcile(aws) == [task.task_id]
    aws.wait(task.task_id, "waiting_approval")
    assert reconcile(aws) == []
    machine = boto3.client("stepfunctions").list_executions(stateMachineArn=aws.machine_arn)
    assert [execution["name"] for execution in machine["executions"]] == [task.task_id]


def test_a_task_that_has_just_changed_is_left_to_those_at_work(
    aws: Cloud, store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_runtime.reconciler.GRACE_SECONDS", 30)
    store.start_task(new_task())
    assert reconcile(aws) == []


def test_one_task_that_cannot_be_helped_does_not_keep_the_others_waiting(
    aws: Cloud, store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (store.start_task(new_task())[0] for _ in range(2))
    start = Executions.start

    def not_the_first(self: Executions, task: Task) -> None:
        if task.task_id == first.task_id:
            raise ConnectionError("down")
        start(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(Executions, "start", not_the_first)
        assert reconcile(aws) == [second.task_id]
    assert first.task_id in reconcile(aws)


def test_a_task_under_way_without_an_execution_is_not_started_anew(aws: Cloud, store: TaskStore) -> None:
    planned(store)
    assert reconcile(aws) == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("TIMED_OUT", "the execution reached its time limit"),
        ("ABORTED", "the execution was stopped"),
        ("FAILED", "the execution failed"),
        ("SUCCEEDED", "the execution ended without an outcome"),
    ],
)
def test_an_execution_that_ended_without_a_word_fails_its_task_once(
    aws: Cloud, store: TaskStore, status: str, reason: str
) -> None:
    task_id, _ = planned(store)
    assert aws.invoke("ReconcilerFunction", ended(task_id, status)) == {"reconciled": [task_id]}
    task = store.get_task(task_id)
    assert (task.status, task.reason) == ("failed", reason)
    assert aws.invoke("ReconcilerFunction", ended(task_id, status)) == {"reconciled": []}
    assert store.get_task(task_id) == task


def test_an_execution_that_ended_as_it_should_changes_nothing(aws: Cloud, store: TaskStore) -> None:
    task_id, _ = planned(store)
    store.end_task(task_id, "completed", actor="execution", reason="", failed_step=None)
    assert aws.invoke("ReconcilerFunction", ended(task_id, "SUCCEEDED")) == {"reconciled": []}
    assert store.get_task(task_id).status == "completed"


@pytest.mark.parametrize(
    "event",
    [
        ended(new_task_id(), "ABORTED"),
        ended(new_task_id(), "RUNNING"),
        ended("", "FAILED", input="not JSON"),
        ended("", "FAILED", input="[]"),
        ended("", "FAILED", input="{}"),
        {"detail-type": "Step Functions Execution Status Change"},
    ],
    ids=["unknown task", "running", "not JSON", "a list", "no task id", "no detail"],
)
def test_an_event_of_no_known_task_changes_nothing(aws: Cloud, store: TaskStore, event: dict[str, Any]) -> None:
    task_id, _ = planned(store)
    assert aws.invoke("ReconcilerFunction", event) == {"reconciled": []}
    assert store.get_task(task_id).status == "executing"


def test_an_approval_that_nobody_has_decided_is_waited_for(aws: Cloud, store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    reconcile(aws)
    aws.wait(task.task_id, "waiting_approval")
    assert reconcile(aws) == []
    assert store.get_task(task.task_id).status == "waiting_approval"
