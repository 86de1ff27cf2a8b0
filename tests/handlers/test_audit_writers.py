"""The audit functions write only to the partitions that the log table's own policy permits.

The local AWS does not enforce a table's policy: a key outside would be refused only on AWS.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any
from unittest.mock import patch

import pytest
from botocore.client import BaseClient

from qaes.adapters import clients
from tests.handlers.test_audit_recorder import stream_event, task_with
from tests.support import template
from tests.support.cloud import Cloud, cloud
from tests.support.trail import anchor, entry_items, json_of, put_policy_event, stream_of


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        clients.client("dynamodb")
        clients.lambda_client()
        yield it


def partitions() -> dict[str, list[str]]:
    """Role's name → the keys that the table's policy leaves it."""
    policy = template.template()["Resources"]["AuditLogTable"]["Properties"]["ResourcePolicy"]["PolicyDocument"]
    return {
        each["Condition"]["ArnLike"]["aws:PrincipalArn"]["Fn::Sub"].split("/")[-2]: each["Condition"][
            "ForAnyValue:StringNotLike"
        ]["dynamodb:LeadingKeys"]
        for each in policy["Statement"]
        if "ForAnyValue:StringNotLike" in each.get("Condition", {})
    }


def writes_of(operation: str, arguments: Any) -> Iterator[tuple[str, str, str]]:
    """(action, table, partition) of each write in a call."""
    if operation in {"PutItem", "UpdateItem"}:
        yield operation, arguments["TableName"], (arguments.get("Item") or arguments["Key"])["pk"]["S"]
    for each in arguments.get("TransactItems", []) if operation == "TransactWriteItems" else []:
        [(kind, body)] = each.items()
        yield f"{kind}Item", body["TableName"], (body.get("Item") or body["Key"])["pk"]["S"]


def test_every_write_is_in_a_partition_of_its_role(aws: Cloud) -> None:
    written: dict[str, set[tuple[str, str, str]]] = {}
    call, invoke, running = BaseClient._make_api_call, aws.invoke, []

    def named(function: str, event: Any) -> Any:
        running.append(function)
        try:
            return invoke(function, event)
        finally:
            running.pop()

    def noting(client: Any, operation: str, arguments: Any) -> Any:
        if running and client.meta.service_model.service_name == "dynamodb":
            role = template.template()["Resources"][running[-1]]["Properties"].get("RolePath", {}).get("Fn::Sub", "//")
            written.setdefault(role.split("/")[-2], set()).update(writes_of(operation, arguments))
        return call(client, operation, arguments)

    task_id = task_with(3)
    with patch.object(aws, "invoke", named), patch.object(BaseClient, "_make_api_call", noting):
        aws.invoke("RecordEventsFunction", stream_event(task_id)[0])
        aws.invoke("RecordEventsFunction", json_of(stream_of([put_policy_event("action_suspended")])))
        aws.invoke("SequencerFunction", json_of(stream_of(entry_items(task_id, "policy"))))
        anchor(aws)
        aws.settle()
        anchor(aws)
        aws.invoke("AuditSweeperFunction", {})
    mine = partitions()
    assert mine.keys() == {"sequencer", "sweeper"}
    assert written["recorder"] == {("PutItem", "AuditEntriesTable", stream) for stream in (task_id, "policy")}
    assert written["anchor"] == {("PutItem", "AuditAnchorsTable", "ANCHOR")}
    for role, patterns in mine.items():
        to_log = {(action, key) for action, table, key in written[role] if table == "AuditLogTable"}
        assert to_log, role
        assert not [each for each in to_log if not any(fnmatchcase(each[1], pattern) for pattern in patterns)], role
        used = [pattern for pattern in patterns if any(fnmatchcase(key, pattern) for _, key in to_log)]
        assert used == patterns, "none that is not needed"
        if role != "sequencer":
            assert {action for action, _ in to_log} == {"PutItem"}, role
