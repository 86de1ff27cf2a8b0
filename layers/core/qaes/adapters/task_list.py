"""Tasks by page, newest first: what the API's lists and an approver's inbox show.

A cursor is the last task's id, and ids grow with time: whatever happens between two pages, no page shows a task of the
one before, and none is left out because others came or went.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args

from qaes.adapters import clients, settings
from qaes.domain.models import Status, Task

STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True)
class Page:
    """`cursor` leads to the next page; None: this is the last one."""

    tasks: list[Task]
    cursor: str | None


def list_tasks(*, status: Status | None, requester: str | None, limit: int, before: str | None) -> Page:
    """Return the newest `limit` tasks older than the task `before`; eventually consistent.

    Parameters
    ----------
    status : str, optional
        Only those in this status.
    requester : str, optional
        Only those of this subject.
    limit : int
        At most so many.
    before : str, optional
        Id of the last task of the page before.
    """
    if requester is not None:
        found = _query("by_requester", "requester_key", requester, before, limit, status)
    elif status is not None:
        found = _query("by_status", "status_key", status, before, limit)
    else:
        # There is no index over all tasks, which would put all writes on one key: ten statuses are ten short queries.
        each = (_query("by_status", "status_key", every, before, limit) for every in STATUSES)
        found = _once(heapq.merge(*each, key=lambda task: task.task_id, reverse=True))
    tasks = list(islice(found, limit + 1))
    more = len(tasks) > limit
    return Page(tasks[:limit], tasks[limit - 1].task_id if more else None)


def _once(tasks: Iterator[Task]) -> Iterator[Task]:
    """One that changed its status between two queries is in both answers."""
    last = None
    for task in tasks:
        if task.task_id != last:
            yield task
        last = task.task_id


def _query(
    index: str, key: str, value: str, before: str | None, limit: int, status: Status | None = None
) -> Iterator[Task]:
    condition, values = f"{key} = :value", {":value": {"S": value}}
    if before is not None:
        condition += " AND task_id < :before"
        values[":before"] = {"S": before}
    arguments: dict[str, Any] = {
        "TableName": settings.text("TASKS_TABLE"),
        "IndexName": index,
        "KeyConditionExpression": condition,
        "ExpressionAttributeValues": values,
        "ScanIndexForward": False,
    }
    if status is not None:
        arguments["FilterExpression"] = "status_key = :status"
        values[":status"] = {"S": status}
    else:
        arguments["PaginationConfig"] = {"PageSize": limit + 1}
    for page in clients.client("dynamodb").get_paginator("query").paginate(**arguments):
        for item in page["Items"]:
            yield Task.model_validate_json(item["data"]["S"])
