"""A read changes nothing: mail scanners, previews and prefetches open links too."""

from __future__ import annotations

from collections import defaultdict

import boto3
import pytest

from qaes.adapters.task_repository import TaskStore
from tests.handlers.test_task_repository import waiting
from tests.openapi.conftest import OPERATIONS, routes
from tests.support.api import Api
from tests.support.cloud import Cloud

TABLES = ("TasksTable", "AuditEntriesTable", "AuditLogTable", "AuditAnchorsTable")
"""Not the ledger's: the mock network begins when it is first asked."""


def everything() -> dict[str, list[str]]:
    """All that is stored of tasks and audit, table by table."""
    pages = boto3.client("dynamodb").get_paginator("scan")
    return {
        table: sorted(str(item) for page in pages.paginate(TableName=table) for item in page["Items"])
        for table in TABLES
    }


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_no_link_decides_starts_or_cancels(aws: Cloud, method: str) -> None:
    """Each path of the document, those of POST too, asked for by an approver's browser while a task waits for them."""
    task_id, plan = waiting(TaskStore("TasksTable"))
    before = everything()
    values = {"task_id": task_id, "plan_id": plan.plan_id, "hash": "a" * 64, "txid": "a" * 60}
    for operation in OPERATIONS:
        # Of a version, a tile or an identity the first one there could be.
        path = operation.path.format_map(defaultdict(lambda: "1", values))
        api = Api(aws, routes()[f"{operation.method} {operation.path}"])
        for query in ({}, {"approved": "true", "reason": "opened"}):
            event = api.event(method, path, None, subject="bob", roles="requester approver operator")
            event["queryStringParameters"] = query or None
            event["multiValueQueryStringParameters"] = {name: [value] for name, value in query.items()} or None
            answer = aws.invoke(api.function, event)
            if method != "GET" or f"GET {operation.path}" not in routes():
                # A path of this kind that GET has, such as /plan/{plan_id}, knows no such query: 422.
                assert answer["statusCode"] in ({404, 405, 422} if query else {404, 405}), (operation.id, answer)
    assert everything() == before
    approval = TaskStore("TasksTable").open_approval(task_id)
    assert approval is not None and approval.status == "pending"
