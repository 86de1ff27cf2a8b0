"""Pages of tasks, newest first, for the API's lists and an approver's inbox.

A cursor is a task's id, and ids grow with time. Changes between two pages therefore never repeat or omit another task.
Each list reads ids from one index, under one key or under each shard of it (`qaes.adapters.shards`), and then the tasks
themselves. Without a status, no change of a task moves its id (docs/adr/0026). With a status, the index is eventually
consistent: a task that has left the status is omitted, and the page is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from qaes.adapters import dynamo, settings
from qaes.adapters.shards import status_keys
from qaes.adapters.task_items import requester_and_status
from qaes.domain.models import Status, Task


@dataclass(frozen=True)
class Page:
    """A page of tasks; `cursor` leads to the next page, None on the last page."""

    tasks: list[Task]
    cursor: str | None


def list_tasks(*, status: Status | None, requester: str | None, limit: int, before: str | None) -> Page:
    """Return the newest `limit` tasks older than the task `before`. The list is eventually consistent.

    Parameters
    ----------
    status : str, optional
        Only tasks in this status. A page may have fewer tasks than `limit` and still have a next page.
    requester : str, optional
        Only tasks of this subject.
    limit : int
        Maximum number of tasks, at most 100.
    before : str, optional
        Id of the last task of the previous page.

    Raises
    ------
    TransientError
        DynamoDB repeatedly omitted some of the page's tasks.
    """
    if requester is not None and status is not None:
        index, key = "by_requester_and_status", "requester_status_key"
        values = [requester_and_status(requester, status)]
    elif requester is not None:
        index, key, values = "by_requester", "requester_key", [requester]
    elif status is not None:
        index, key, values = "by_status", "status_key", status_keys(status)
    else:
        index, key, values = "by_kind", "sk", ["TASK"]
    # Each task has one of the keys, so the newest tasks of all keys are among the newest of each key.
    candidates = sorted(
        (each for value in values for each in _query(index, key, value, before, limit + 1)), reverse=True
    )
    ids = candidates[:limit]
    keys = [dynamo.key(task_id, "TASK") for task_id in ids]
    data = {item["pk"]["S"]: item["data"]["S"] for item in dynamo.get_many(settings.text("TASKS_TABLE"), keys)}
    tasks = [Task.model_validate_json(data[task_id]) for task_id in ids if task_id in data]
    return Page([task for task in tasks if status in (None, task.status)], ids[-1] if len(candidates) > limit else None)


def _query(index: str, key: str, value: str, before: str | None, limit: int) -> list[str]:
    """Return the newest ids under a key of an index, at most `limit`."""
    values = {":value": {"S": value}}
    condition = "#key = :value"
    if before is not None:
        condition += " AND task_id < :before"
        values[":before"] = {"S": before}
    items = dynamo.items(
        TableName=settings.text("TASKS_TABLE"),
        IndexName=index,
        KeyConditionExpression=condition,
        ExpressionAttributeNames={"#key": key},
        ExpressionAttributeValues=values,
        ScanIndexForward=False,
        Limit=limit,
    )
    return [item["pk"]["S"] for item in islice(items, limit)]
