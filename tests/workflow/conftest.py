from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from qaes.adapters.executions import Executions
from qaes.adapters.task_repository import TaskStore
from qaes.domain.ids import new_task_id, now, timestamp
from qaes.domain.models import Approval, Task
from qaes.domain.policy import DEFAULT_RULES, Rule
from qubic import wiring
from tests.handlers.test_audit_api import request
from tests.support.api import set_environment
from tests.support.bundles import load_verifier
from tests.support.cloud import Cloud, call, cloud
from tests.support.stories import check_every_story
from tests.support.trail import LOG_ID, anchor_all

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud() as it:
        yield it
        check_every_story()


@pytest.fixture
def audit_environment(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables with which this process publishes policies and requests bundles."""
    for function in ("QubicApiFunction", "AuditApiFunction"):
        set_environment(function, monkeypatch)


def publish(action: str, rule: Rule) -> str:
    """Put another rule for one action in force, by a new version of the policy; returns its id."""
    policies, before = wiring.policies(), in_force()
    proposed = policies.propose(DEFAULT_RULES | {action: rule}, subject="olivia")
    policies.approve(proposed.version, subject="oscar", four_eyes=True)
    deadline = time.monotonic() + 20
    while (now_in_force := in_force()) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now_in_force == proposed.policy_id
    return now_in_force


def in_force() -> str:
    return str(call("LedgerFunction", {"operation": "policy"})["result"]["policy_id"])


def verify_bundle(aws: Cloud, task_id: str) -> list[str]:
    """Verify the bundle of a task as a stranger does; return the lines that the verifier prints."""
    aws.stop_time()
    aws.drain(task_id)
    anchor_all(aws)
    identity = json.loads(request("/audit/log/checkpoint")["body"])["anchor"]["source"]
    answer = request(f"/audit/{task_id}/bundle")
    assert answer["statusCode"] == 200
    return load_verifier().verify(answer["body"].encode(), log_id=LOG_ID, anchor_identity=identity, task_id=task_id)


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
