"""Tasks by page, newest first: what the API's lists and an approver's inbox show.

A cursor is a task's id, and ids grow with time: whatever happens between two pages, no page shows a task of the one
before, and none is left out because others came or went. Nor because its status changed: the ids on a page come from
one key of one index (docs/adr/0026).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qaes.adapters import dynamo, settings
from qaes.domain.models import Status, Task

MAX_EVALUATED = 1000
"""So many tasks are looked through for one page of a requester's tasks in one status; then the page is short."""
EVALUATED_AT_ONCE = 250

Item = dict[str, Any]


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
        Only those in this status. With a requester, a page may have fewer tasks than there are, and lead on.
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
    if requester is not None:
        found, cursor = _query("by_requester", "requester_key", requester, before, limit, status)
    elif status is not None:
        found, cursor = _query("by_status", "status_key", status, before, limit)
    else:
        keys, cursor = _query("by_kind", "sk", "TASK", before, limit)
        found = _read([{name: key[name] for name in ("pk", "sk")} for key in keys])
    return Page([Task.model_validate_json(item["data"]["S"]) for item in found], cursor)


def _query(
    index: str, key: str, value: str, before: str | None, limit: int, status: Status | None = None
) -> tuple[list[Item], str | None]:
    """Return at most `limit` items of an index, newest first, and the cursor that leads on."""
    names, values = {"#key": key}, {":value": {"S": value}}
    condition = "#key = :value"
    if before is not None:
        condition += " AND task_id < :before"
        values[":before"] = {"S": before}
    arguments: dict[str, Any] = {
        "TableName": settings.text("TASKS_TABLE"),
        "IndexName": index,
        "KeyConditionExpression": condition,
        "ExpressionAttributeNames": names,
        "ExpressionAttributeValues": values,
        "ScanIndexForward": False,
        "Limit": limit + 1,
    }
    if status is not None:
        arguments |= {"FilterExpression": "status_key = :status", "Limit": EVALUATED_AT_ONCE}
        values[":status"] = {"S": status}
    found: list[Item] = []
    evaluated = 0
    for page in dynamo.pages(**arguments):
        found += page["Items"]
        evaluated += page["ScannedCount"]
        if len(found) > limit:
            return found[:limit], found[limit - 1]["task_id"]["S"]
        last = page.get("LastEvaluatedKey")
        if last is not None and evaluated >= MAX_EVALUATED:
            return found, last["task_id"]["S"]
    return found, None


def _read(keys: list[Item]) -> list[Item]:
    """Read the items of these keys, in their order, each as it stands: one that an index names is there."""
    found = {item["pk"]["S"]: item for item in dynamo.get_many(settings.text("TASKS_TABLE"), keys)}
    return [found[key["pk"]["S"]] for key in keys if key["pk"]["S"] in found]
