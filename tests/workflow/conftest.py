from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from qaes.adapters.task_store import TaskStore
from qaes.domain.ids import new_task_id, now, timestamp
from qaes.domain.models import Approval, Task
from tests.support.cloud import Cloud, cloud

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud() as it:
        yield it


@pytest.fixture
def start(aws: Cloud) -> Callable[..., str]:
    """Write a task as the gateway does and start its execution."""

    def begin(task_type: str = "monitor_wallet", **parameters: Any) -> str:
        moment = timestamp(now())
        task = Task(
            task_id=new_task_id(),
            status="pending",
            task_type=task_type,
            description="a test",
            parameters={"wallet_address": SOURCE} | parameters,
            requester="alice",
            created_at=moment,
            updated_at=moment,
        )
        TaskStore("TasksTable").start_task(task)
        boto3.client("stepfunctions").start_execution(
            stateMachineArn=aws.machine_arn, name=task.task_id, input=json.dumps({"task_id": task.task_id})
        )
        return task.task_id

    return begin


@pytest.fixture
def transfer(start: Callable[..., str]) -> Callable[..., str]:
    def begin(amount: int = 250, to_address: str = DESTINATION) -> str:
        return start("transfer_funds", to_address=to_address, amount=amount)

    return begin


@pytest.fixture
def decide(aws: Cloud) -> Callable[..., Approval]:
    """Commit a decision and wake the execution, as the gateway does."""

    def commit(task_id: str, *, approved: bool, deliver: bool = True) -> Approval:
        aws.wait(task_id, "waiting_approval")
        approval = TaskStore("TasksTable").decide(task_id, approved=approved, subject="bob", reason="because")
        if deliver:
            boto3.client("stepfunctions").send_task_success(taskToken=approval.token, output="{}")
        return approval

    return commit
