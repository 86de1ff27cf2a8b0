from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from qaes.adapters.executions import Executions
from qaes.adapters.task_repository import TaskStore
from qaes.domain.ids import new_task_id, now, timestamp
from qaes.domain.models import Approval, Task
from tests.support.cloud import Cloud, cloud
from tests.support.stories import check_every_story

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud() as it:
        yield it
        check_every_story()


def begin(aws: Cloud, task_type: str, *, only: dict[str, Any] | None = None, **parameters: Any) -> str:
    """Write a task as the gateway does and start its execution; returns its id. `only` are all of its parameters."""
    moment = timestamp(now())
    transfer = {"to_address": DESTINATION, "amount": 250} if task_type == "transfer_funds" else {}
    task = Task(
        task_id=new_task_id(),
        status="pending",
        task_type=task_type,
        description="a test",
        parameters={"wallet_address": SOURCE} | transfer | parameters if only is None else only,
        requester="alice",
        created_at=moment,
        updated_at=moment,
    )
    TaskStore("TasksTable").start_task(task)
    boto3.client("stepfunctions").start_execution(
        stateMachineArn=aws.machine_arn, name=task.task_id, input=json.dumps({"task_id": task.task_id})
    )
    return task.task_id


@pytest.fixture
def start(aws: Cloud) -> Callable[..., str]:
    return lambda task_type="monitor_wallet", **parameters: begin(aws, task_type, **parameters)


@pytest.fixture
def transfer(start: Callable[..., str]) -> Callable[..., str]:
    return lambda amount=250: start("transfer_funds", amount=amount)


@pytest.fixture
def decide(aws: Cloud) -> Callable[..., Approval]:
    """Commit a decision and wake the execution, as the gateway does."""

    def commit(task_id: str, *, approved: bool, deliver: bool = True, subject: str = "bob") -> Approval:
        aws.wait(task_id, "waiting_approval")
        approval = TaskStore("TasksTable").decide(task_id, approved=approved, subject=subject, reason="because")
        if deliver and approval.status != "pending":
            Executions.deliver(task_id, approval)
        return approval

    return commit
