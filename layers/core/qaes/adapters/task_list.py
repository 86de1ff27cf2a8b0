"""Tasks by page, newest first: what the API's lists and an approver's inbox show.

A cursor is a task's id, and ids grow with time: whatever happens between two pages, no page shows a task of the one
before, and none is left out because others came or went. Each list reads ids from one key of one index, and then the
tasks themselves. Without a status, no change of a task moves its id (docs/adr/0026). With a status, the index may be
a moment behind: a task that has left the status meanwhile is not shown, and the page is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qaes.adapters import dynamo, settings
from qaes.adapters.task_items import requester_and_status
from qaes.domain.models import Status, Task


@dataclass(frozen=True)
class Page:
    """`cursor` leads to the next page; None: this is the last one."""

    tasks: list[Task]
    cursor: str | None


def list_tasks(*, status: Status | None, requester: str | None, limit: int, before: str | None) -> Page:
    """Return the newest `limit` tasks older than the task `before`; which there are is an eventually consistent read.

    Parameters
    ----------
    status : str, optional
        Only those in this status. A page may have fewer tasks than `limit`, and lead on.
    requester : str, optional
        Only those of this subject.
    limit : int
        At most so many, and at most 100.
    before : str, optional
        Id of the last task of the page before.

    Raises
    ------
    UnavailableError
        DynamoDB kept leaving out some of the page's tasks.
    """
    if requester is not None and status is not None:
        index, key, value = "by_requester_and_status", "requester_status_key", requester_and_status(requester, status)
    elif requester is not None:
        index, key, value = "by_requester", "requester_key", requester
    elif status is not None:
        index, key, value = "by_status", "status_key", status
    else:
        index, key, value = "by_kind", "sk", "TASK"
    ids, cursor = _query(index, key, value, before, limit)
    keys = [dynamo.key(task_id, "TASK") for task_id in ids]
    data = {item["pk"]["S"]: item["data"]["S"] for item in dynamo.get_many(settings.text("TASKS_TABLE"), keys)}
    tasks = [Task.model_validate_json(data[task_id]) for task_id in ids if task_id in data]
    return Page([task for task in tasks if status in (None, task.status)], cursor)


def _query(index: str, key: str, value: str, before: str | None, limit: int) -> tuple[list[str], str | None]:
    """Return at most `limit` ids of an index, newest first, and the cursor that leads on."""
    values = {":value": {"S": value}}
    condition = "#key = :value"
    if before is not None:
        condition += " AND task_id < :before"
        values[":before"] = {"S": before}
    arguments: dict[str, Any] = {
        "TableName": settings.text("TASKS_TABLE"),
        "IndexName": index,
        "KeyConditionExpression": condition,
        "ExpressionAttributeNames": {"#key": key},
        "ExpressionAttributeValues": values,
        "ScanIndexForward": False,
        "Limit": limit + 1,
    }
    ids: list[str] = []
    for page in dynamo.pages(**arguments):
        ids += [item["pk"]["S"] for item in page["Items"]]
        if len(ids) > limit:
            return ids[:limit], ids[limit - 1]
    return ids, None
