"""Recorded requests for replays: the TASK and the request of many tasks, written as the gateway writes them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import boto3

from qaes.adapters.decisions import DecisionsTable
from qaes.adapters.task_items import task_item
from qaes.domain.ids import first_task_id, timestamp
from qaes.domain.models import Task
from qaes.domain.tasks import events

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"
BATCH = 25


def transfer(number: int, amount: int, at: datetime, requester: str = "alice", agent: str | None = None) -> Task:
    """Return the task of a transfer that was started at that time; `number` makes its id unique."""
    return Task(
        task_id=f"{first_task_id(at)}-7000-8000-{number:012x}",
        status="completed",
        salt="0" * 32,
        task_type="transfer_funds",
        description="a recorded request",
        parameters={"wallet_address": SOURCE, "to_address": DESTINATION, "amount": amount},
        requester=requester,
        agent=agent,
        created_at=timestamp(at),
        updated_at=timestamp(at),
    )


def record(tasks: Sequence[Task]) -> None:
    """Write them without the events of the outbox: nothing of the audit reads them here."""
    client: Any = boto3.client("dynamodb")
    decisions = DecisionsTable("DecisionsTable")
    for start in range(0, len(tasks), BATCH):
        written: dict[str, list[Any]] = {"TasksTable": [], "DecisionsTable": []}
        for task in tasks[start : start + BATCH]:
            event = events.make(
                task,
                "task_started",
                task.requester,
                "pending",
                task.request(),
                {},
                at=task.created_at,
                input_of="request",
            )
            request = decisions.put(task.task_id, 1, event, salt="0" * 32)["Put"]["Item"]
            written["TasksTable"].append({"PutRequest": {"Item": task_item(task)}})
            written["DecisionsTable"].append({"PutRequest": {"Item": request}})
        for table, puts in written.items():
            assert not client.batch_write_item(RequestItems={table: puts}).get("UnprocessedItems")
