"""The reconciler on moto: it completes interrupted work, and leaves running work alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import boto3
import pytest
from boto3.dynamodb.types import TypeDeserializer
from botocore.client import BaseClient

from qaes.adapters.executions import Executions
from qaes.adapters.task_items import task_item
from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import ThrottledError
from qaes.domain.ids import new_task_id, now, timestamp
from qaes.domain.models import Task
from tests.handlers.test_task_repository import new_task, planned
from tests.support import template
from tests.support.cloud import Cloud, Context, cloud
from tests.support.crashes import CrashError


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
    """Return EventBridge's event for a change of an execution's status."""
    detail = {"status": status, "name": task_id, "input": f'{{"task_id": "{task_id}"}}'} | changes
    return {"detail-type": "Step Functions Execution Status Change", "detail": detail}


def test_task_that_was_written_and_not_started_is_started_once(aws: Cloud, store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    assert reconcile(aws) == [task.task_id]
    aws.wait(task.task_id, "waiting_approval")
    assert reconcile(aws) == []
    machine = boto3.client("stepfunctions").list_executions(stateMachineArn=aws.machine_arn)
    assert [execution["name"] for execution in machine["executions"]] == [task.task_id]


def test_task_that_has_just_changed_is_left_to_those_at_work(
    aws: Cloud, store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_runtime.reconciler.GRACE_SECONDS", 30)
    store.start_task(new_task())
    assert reconcile(aws) == []


def test_one_failing_task_does_not_block_others(aws: Cloud, store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_executing_task_without_execution_is_not_restarted(aws: Cloud, store: TaskStore) -> None:
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
def test_execution_without_outcome_fails_its_task_once(aws: Cloud, store: TaskStore, status: str, reason: str) -> None:
    task_id, _ = planned(store)
    assert aws.invoke("ReconcilerFunction", ended(task_id, status)) == {"reconciled": [task_id]}
    task = store.get_task(task_id)
    assert (task.status, task.reason) == ("failed", reason)
    assert aws.invoke("ReconcilerFunction", ended(task_id, status)) == {"reconciled": []}
    assert store.get_task(task_id) == task


def test_execution_that_ended_as_it_should_changes_nothing(aws: Cloud, store: TaskStore) -> None:
    task_id, _ = planned(store)
    store.end_task(task_id, "completed", actor="execution", reason="", failed_step=None)
    assert aws.invoke("ReconcilerFunction", ended(task_id, "SUCCEEDED")) == {"reconciled": []}
    assert store.get_task(task_id).status == "completed"


def test_success_without_an_outcome_is_found_within_a_minute(aws: Cloud, store: TaskStore) -> None:
    """No event reports an execution that has succeeded."""
    task_id, _ = planned(store)
    machine, definition = boto3.client("stepfunctions"), {"StartAt": "Done", "States": {"Done": {"Type": "Succeed"}}}
    machine.update_state_machine(stateMachineArn=aws.machine_arn, definition=json.dumps(definition))
    machine.start_execution(stateMachineArn=aws.machine_arn, name=task_id, input=json.dumps({"task_id": task_id}))
    assert aws.execution(task_id)["status"] == "SUCCEEDED"
    assert reconcile(aws) == [task_id]
    task = store.get_task(task_id)
    assert (task.status, task.reason) == ("failed", "the execution ended without an outcome")
    assert reconcile(aws) == []


@pytest.mark.parametrize("ending", ["retried", "cancelled"])
def test_task_that_changed_since_it_was_listed_is_left_alone(
    aws: Cloud, store: TaskStore, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """The end of the execution before a retry is not the new one's end."""
    from agent_runtime import reconciler

    task_id, _ = planned(store)
    listed = store.get_task(task_id)
    store.end_task(
        task_id, "failed", actor="execution", reason="a service did not respond; retry the task", execution=task_id
    )
    store.retry(task_id, subject="alice")
    if ending == "cancelled":
        store.cancel(task_id, subject="alice", reason="changed my mind")
    statuses = {task_id: "FAILED", f"{task_id}-2": "RUNNING" if ending == "retried" else None}
    started: list[Task] = []
    monkeypatch.setattr(Executions, "status", lambda self, task: statuses[task.execution_name])
    monkeypatch.setattr(Executions, "start", lambda self, task: started.append(task))
    assert reconciler.reconcile(listed, store, Executions(aws.machine_arn)) is False
    assert store.get_task(task_id).status == {"retried": "executing"}.get(ending, ending)
    assert started == []


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
def test_event_of_no_known_task_changes_nothing(aws: Cloud, store: TaskStore, event: dict[str, Any]) -> None:
    task_id, _ = planned(store)
    assert aws.invoke("ReconcilerFunction", event) == {"reconciled": []}
    assert store.get_task(task_id).status == "executing"


def test_reconciler_keeps_pending_approval(aws: Cloud, store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    reconcile(aws)
    aws.wait(task.task_id, "waiting_approval")
    assert reconcile(aws) == []
    assert store.get_task(task.task_id).status == "waiting_approval"


LIMIT_SECONDS = template.timeout("ReconcilerFunction")


class SlowStepFunctions:
    """A clock that only calls of Step Functions move on: each takes a tenth of a second, and Lambda ends the run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, listed: Callable[[], list[str]] = list) -> None:
        self.seconds = 0.0
        self.calls: list[tuple[str, str]] = []
        call = BaseClient._make_api_call

        def make(client: Any, operation: str, arguments: Any) -> Any:
            if client.meta.service_model.service_name != "stepfunctions":
                return call(client, operation, arguments)
            self.seconds += 0.1
            if self.seconds > LIMIT_SECONDS:
                raise CrashError
            self.calls.append((operation, str(arguments.get("executionArn")).rpartition(":")[2]))
            if operation == "ListExecutions":
                return {"executions": [{"name": name} for name in listed()]}
            return call(client, operation, arguments)

        monkeypatch.setattr(BaseClient, "_make_api_call", make)
        monkeypatch.setattr(
            Context, "get_remaining_time_in_millis", lambda _: int((LIMIT_SECONDS - self.seconds) * 1000)
        )

    def described(self) -> list[str]:
        """The executions that were described since this was last asked; the clock begins anew."""
        found = [name for operation, name in self.calls if operation == "DescribeExecution"]
        self.calls.clear()
        self.seconds = 0.0
        return found


def waiting_tasks(number: int, *, waited: float = 60.0, lasts: float = 3600.0) -> list[str]:
    """Tasks that wait for an approval, each as the table has it."""
    since = now() - timedelta(seconds=waited)
    tasks = [
        new_task().model_copy(
            update={
                "status": "waiting_approval",
                "updated_at": timestamp(since),
                "waiting_since": timestamp(since),
                "waiting_until": timestamp(since + timedelta(seconds=lasts)),
            }
        )
        for _ in range(number)
    ]
    with boto3.resource("dynamodb").Table("TasksTable").batch_writer() as batch:
        for task in tasks:
            item = task_item(task)
            batch.put_item(Item={name: TypeDeserializer().deserialize(value) for name, value in item.items()})
    return [task.task_id for task in tasks]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the seconds that were left when transfers were settled."""
    left: list[int] = []

    def settle(store: TaskStore, context: Any) -> list[str]:
        left.append(context.get_remaining_time_in_millis() // 1000)
        return []

    monkeypatch.setattr("agent_runtime.reconciler._settle_transfers", settle)
    return left


def oldest(capsys: pytest.CaptureFixture[str]) -> float:
    [line] = [line for line in capsys.readouterr().out.splitlines() if '"OldestPendingApprovalAge":' in line]
    age: float = json.loads(line)["OldestPendingApprovalAge"][0]
    return age


@pytest.mark.parametrize("number", [199, 900])
def test_reconciler_leaves_time_for_transfers_when_slow(
    aws: Cloud,
    settled: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    tasks = waiting_tasks(number)
    clock = SlowStepFunctions(monkeypatch)
    reconcile(aws)
    assert settled[0] >= LIMIT_SECONDS // 2 - 1
    assert 60 <= oldest(capsys) < 120
    described = set(clock.described())
    assert len(described) == min(number, LIMIT_SECONDS * 5 - 1)
    reconcile(aws)  # goes on where the first run stopped
    assert described | set(clock.described()) == set(tasks)


def test_running_executions_are_listed_and_not_described(
    aws: Cloud, settled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = waiting_tasks(900)
    clock = SlowStepFunctions(monkeypatch, lambda: tasks[1:])
    reconcile(aws)
    assert (settled, clock.described()) == ([LIMIT_SECONDS - 1], tasks[:1])


def test_waiting_task_is_not_read_before_its_reminder(
    aws: Cloud, settled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = waiting_tasks(1, waited=2600)[0], waiting_tasks(1, waited=2800)[0]
    SlowStepFunctions(monkeypatch, lambda: [early, late])
    read: list[str] = []
    monkeypatch.setattr(TaskStore, "open_approval", lambda self, task_id: read.append(task_id))
    reconcile(aws)
    assert read == [late]


def test_transfers_are_settled_when_open_tasks_cannot_be_read(
    aws: Cloud, settled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def throttled(*_: Any) -> None:
        raise ThrottledError("the table is busy")

    monkeypatch.setattr(TaskStore, "open_tasks", throttled)
    with pytest.raises(ThrottledError):
        reconcile(aws)
    assert len(settled) == 1


def test_tasks_are_described_when_listing_is_throttled(
    aws: Cloud, store: TaskStore, settled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = store.start_task(new_task())

    def throttled(*_: Any) -> None:
        raise ThrottledError("Step Functions is busy")

    monkeypatch.setattr(Executions, "running", throttled)
    assert reconcile(aws) == [task.task_id]
