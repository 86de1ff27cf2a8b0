"""What a task costs: transitions, invocations, DynamoDB units and ledger transactions, counted from a run on moto."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import boto3
from botocore.client import BaseClient

from qaes.adapters.task_store import TaskStore
from qaes.domain.ids import new_task_id, now, timestamp
from qaes.domain.models import Task
from tests.support.cloud import Cloud, cloud
from tests.support.trail import anchor_all, sequence_all

PRICES_OF = "2026-11, us-east-1, list prices"
PRICE = {
    "state transitions": 25.00e-6,
    "Lambda invocations": 0.20e-6,
    "Lambda GB-seconds": 16.6667e-6,
    "DynamoDB write units": 0.625e-6,
    "DynamoDB read units": 0.125e-6,
    "API requests": 3.50e-6,
}
SECONDS_A_CALL, GIGABYTES = 0.1, 0.5


@dataclass
class Count:
    """What one task used."""

    transitions: int = 0
    invocations: int = 0
    write_units: float = 0
    read_units: float = 0
    ledger_transactions: int = 0
    functions: Counter[str] = field(default_factory=Counter)

    def dollars_for_a_million(self, api_requests: int) -> float:
        """The price of a million such tasks; a call is taken to last 100 ms with 512 MB."""
        each = (
            self.transitions * PRICE["state transitions"]
            + self.invocations * (PRICE["Lambda invocations"] + SECONDS_A_CALL * GIGABYTES * PRICE["Lambda GB-seconds"])
            + self.write_units * PRICE["DynamoDB write units"]
            + self.read_units * PRICE["DynamoDB read units"]
            + api_requests * PRICE["API requests"]
        )
        return each * 1_000_000


_polling: list[int] = []


def _size(item: Any) -> int:
    return len(json.dumps(item, default=str))


@contextmanager
def _metered(count: Count) -> Iterator[None]:
    """Count DynamoDB's units by its rules: 1 KB a write, 4 KB a consistent read, twice in a transaction."""
    call = BaseClient._make_api_call  # noqa: SLF001

    def metered(client: Any, operation: str, arguments: Any) -> Any:
        answer = call(client, operation, arguments)
        if client.meta.service_model.service_name != "dynamodb" or threading.get_ident() in _polling:
            return answer
        if "ChainTable" in str(arguments):
            return answer  # the mock network stands for the world outside
        if operation == "GetItem":
            count.read_units += max(1, math.ceil(_size(answer.get("Item", {})) / 4096))
        elif operation == "Query":
            size = sum(_size(item) for item in answer["Items"])
            units = max(1, math.ceil(size / 4096))
            count.read_units += units if arguments.get("ConsistentRead") else units / 2
        elif operation in {"PutItem", "UpdateItem"}:
            count.write_units += max(1, math.ceil(_size(arguments.get("Item", {})) / 1024))
        elif operation == "TransactWriteItems":
            for write in arguments["TransactItems"]:
                [body] = write.values()
                count.write_units += 2 * max(1, math.ceil(_size(body.get("Item", {})) / 1024))
        return answer

    with patch.object(BaseClient, "_make_api_call", metered):
        yield


def _ledger_writes(aws: Cloud) -> int:
    found = boto3.client("dynamodb").scan(TableName="LedgerTable")["Items"]
    return sum(item["sk"]["S"].startswith("ATTEMPT#") for item in found)


def run(task_type: str, parameters: dict[str, Any]) -> Count:
    """Run one task to its end on the deployed definition; a second person approves when asked."""
    count = Count()
    with cloud() as aws:
        aws.invoke("LedgerFunction", {"operation": "policy"})
        aws.invocations.clear()
        before = _ledger_writes(aws)
        with _metered(count):
            moment = timestamp(now())
            task = Task(
                task_id=new_task_id(),
                status="pending",
                task_type=task_type,
                description="what does it cost?",
                parameters=parameters,
                requester="alice",
                created_at=moment,
                updated_at=moment,
            )
            store = TaskStore("TasksTable")
            store.start_task(task)
            boto3.client("stepfunctions").start_execution(
                stateMachineArn=aws.machine_arn, name=task.task_id, input=json.dumps({"task_id": task.task_id})
            )
            if task_type == "transfer_funds":
                _wait(aws, task.task_id, "waiting_approval")
                approval = store.decide(task.task_id, approved=True, subject="bob", reason="ok")
                boto3.client("stepfunctions").send_task_success(taskToken=approval.token, output="{}")
            _wait(aws, task.task_id, "completed")
            aws.execution(task.task_id)
            aws.drain(task.task_id)  # what the streams would call
            sequence_all(aws)
            anchor_all(aws)
        count.transitions = len(aws.history(task.task_id))
        count.functions = Counter(aws.invocations)
        count.invocations = sum(aws.invocations.values())
        count.ledger_transactions = _ledger_writes(aws) - before
    return count


def _wait(aws: Cloud, task_id: str, status: str) -> None:
    """Wait without counting: what this thread reads meanwhile is not the task's."""
    _polling.append(threading.get_ident())
    try:
        aws.wait(task_id, status)
    finally:
        _polling.clear()
