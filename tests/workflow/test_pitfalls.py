"""Known failures of systems that wait for people (docs/testing.md), on the deployed state machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import boto3
import pytest

from qaes.adapters.callbacks import Callback, CallbacksTable
from qaes.adapters.executions import Executions
from qaes.adapters.task_repository import TaskStore
from qaes.domain.canonical import canonical_json
from qaes.domain.errors import InvalidInputError
from qaes.domain.ids import now
from qaes.domain.models import Approval, Task
from qaes.domain.requests import MAX_PARAMETERS_BYTES, TaskRequest
from tests.handlers.test_task_repository import new_task
from tests.support.cloud import Cloud, call
from tests.workflow.conftest import DESTINATION, SOURCE
from tests.workflow.test_paths import balance, kinds

STATE_LIMIT = 256 * 1024
"""Maximum bytes of a state's input or output in Step Functions; `States.ALL` does not catch more."""


def test_repeated_delivery_of_decision_changes_nothing(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Approval]
) -> None:
    """A token is good for one use: again at once, again long afterwards, and one that never was."""
    task_id = transfer(250)
    approval = decide(task_id, approved=True)
    executions = Executions(aws.machine_arn)
    executions.deliver(task_id, approval)  # whether the execution still waits at this moment, or no longer
    aws.wait(task_id, "completed")
    before = kinds(aws, task_id)
    assert executions.deliver(task_id, approval) is False
    CallbacksTable().wait(Callback("APPROVAL", task_id, approval.step_index, "made up", 60, 1))
    assert executions.deliver(task_id, approval) is False
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    assert kinds(aws, task_id) == before
    assert aws.execution(task_id)["status"] == "SUCCEEDED"


def test_decision_at_moment_of_request_is_not_lost(
    aws: Cloud, transfer: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided and delivered before the function that stores the token has even returned to the state that waits."""
    request = TaskStore.request_approval

    def and_decide(self: TaskStore, task: Task, *arguments: Any, **named: Any) -> Approval:
        asked = request(self, task, *arguments, **named)
        decided = self.decide(task.task_id, approved=True, subject="bob", reason="quick")
        assert Executions(aws.machine_arn).deliver(task_id, decided)
        return asked

    monkeypatch.setattr(TaskStore, "request_approval", and_decide)
    task_id = transfer(250)
    aws.wait(task_id, "completed")
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)


@pytest.mark.parametrize(("outcome", "ends"), [("approved", "completed"), ("rejected", "rejected"), ("expired",) * 2])
def test_decision_before_the_state_that_asks_is_retried_stands(
    aws: Cloud,
    transfer: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    outcome: str,
    ends: str,
) -> None:
    """The approval is stored, the function's response is lost, a person decides; then the state is retried."""
    store, losses = TaskStore("TasksTable"), iter([True])

    def decided_and_lost(event: Any) -> None:
        if not next(losses, False):
            return
        call("AwaitApprovalFunction", event, aws.parameters)
        if outcome == "expired":
            with pytest.MonkeyPatch.context() as later:
                later.setattr("qaes.adapters.task_repository.now", lambda: now() + timedelta(hours=1))
                assert store.expire(event["task_id"])
        else:
            store.decide(event["task_id"], approved=outcome == "approved", subject="bob", reason="because")
        raise ConnectionError("the answer was lost")

    aws.faults["AwaitApprovalFunction"] = decided_and_lost
    task_id = transfer(250)
    task = aws.wait(task_id, ends)
    if outcome == "rejected":
        assert task["reason"] == "because"
    assert aws.invocations["AwaitApprovalFunction"] == 2
    assert [approval.status for approval in store.approvals(task_id)] == [outcome]
    assert kinds(aws, task_id).count("approval_requested:pending") == 1
    assert balance(DESTINATION) == (250 if outcome == "approved" else 0)


def test_largest_task_stays_far_within_a_states_limit(aws: Cloud, decide: Callable[..., Approval]) -> None:
    """Description and parameters as long as they may be, in letters of four bytes: the state holds references alone."""
    least = TaskRequest.model_validate(
        {
            "task_type": "transfer_funds",
            "description": "𝄞" * 4000,
            "wallet_address": SOURCE,
            "parameters": {"to_address": DESTINATION, "amount": 250, "note": ""},
        }
    )
    free = MAX_PARAMETERS_BYTES - len(canonical_json(least.resolved("mock")).encode())

    def with_note(letters: int) -> TaskRequest:
        return least.model_copy(update={"parameters": (least.parameters or {}) | {"note": "𝄞" * letters}})

    with pytest.raises(InvalidInputError):
        with_note(free // 4 + 1).resolved("mock")
    largest = with_note(free // 4)
    fields = {name: getattr(largest, name) for name in ("task_type", "description")}
    task = new_task().model_copy(update=fields | {"parameters": largest.resolved("mock")})
    TaskStore("TasksTable").start_task(task)
    Executions(aws.machine_arn).start(task)
    decide(task.task_id, approved=True)
    aws.wait(task.task_id, "completed")
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    arn = f"{aws.machine_arn.replace(':stateMachine:', ':execution:')}:{task.task_id}"
    pages = boto3.client("stepfunctions").get_paginator("get_execution_history").paginate(executionArn=arn)
    sizes = [
        len(str(text).encode())
        for page in pages
        for event in page["events"]
        for details in event.values()
        if isinstance(details, dict)
        for name, text in details.items()
        if name in {"input", "output", "parameters"}
    ]
    assert len(sizes) > 20
    assert max(sizes) < STATE_LIMIT / 2, f"{max(sizes)} bytes"


def test_execution_polls_nothing_while_it_waits(aws: Cloud, transfer: Callable[..., str]) -> None:
    """A wait for a person is one event, however long it takes: loops of polls run into the limit of 25,000."""
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    arn = f"{aws.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
    step_functions = boto3.client("stepfunctions")

    def length() -> int:
        pages = step_functions.get_paginator("get_execution_history").paginate(executionArn=arn)
        return sum(len(page["events"]) for page in pages)

    time.sleep(0.5)
    before = length()
    time.sleep(1.5)
    assert length() == before
    assert json.loads(step_functions.describe_execution(executionArn=arn)["input"]) == {"task_id": task_id}
