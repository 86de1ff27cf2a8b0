"""The write rights of each deployed role: its credentials attempt every kind of item of every table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from local.cloud import Cloud
from qaes.adapters.callbacks import CallbacksTable
from qaes.adapters.task_items import task_item
from qaes.adapters.task_repository import TaskStore
from tests.e2e.conftest import DESTINATION, SOURCE, Api, audit_environment
from tests.support import template
from tests.support.forgery import approval_of_bob, event_of_bob, task_that_goes_on
from tests.support.rights import ITEMS, WRITES, is_partial, may

DENIED = {"AccessDenied", "AccessDeniedException"}
REFUSED = {"ConditionalCheckFailedException", "TransactionCanceledException"}
NEVER = {"ConditionExpression": "attribute_exists(never) AND attribute_not_exists(never)"}
"""A write that is allowed changes nothing."""
FUNCTIONS = sorted(template.resources("AWS::Serverless::Function"))
Session = Callable[[str], boto3.Session]


def attempts(client: Any, table: str, pk: str, sk: str) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yield (right, name, call) for each way to write an item."""
    key = {"pk": {"S": pk}, "sk": {"S": sk}}
    change = {
        "UpdateExpression": "SET #forged = :forged",
        "ExpressionAttributeNames": {"#forged": "forged"},
        "ExpressionAttributeValues": {":forged": {"S": "forged"}},
    }
    put, update, delete = {"Item": key}, {"Key": key} | change, {"Key": key}
    for right, call, arguments in (
        ("put", client.put_item, put),
        ("update", client.update_item, update),
        ("delete", client.delete_item, delete),
    ):
        yield right, f"{right}_item", lambda call=call, given=arguments: call(TableName=table, **given, **NEVER)
        one = {right.capitalize(): {"TableName": table, **arguments, **NEVER}}
        yield right, f"transact {right}", lambda one=one: client.transact_write_items(TransactItems=[one])
    for request in ({"PutRequest": {"Item": key}}, {"DeleteRequest": {"Key": key}}):
        batch = {table: [request]}
        yield "batch", f"batch {next(iter(request))}", lambda batch=batch: client.batch_write_item(RequestItems=batch)


def code_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return "written"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_role_writes_what_its_row_lists_and_nothing_else(local_cloud: Cloud, session: Session, function: str) -> None:
    client = session(function).client("dynamodb", endpoint_url=local_cloud.endpoint)
    wrong = []
    for name, items in ITEMS.items():
        table = local_cloud.resources[name]
        for pk, sk in items:
            for right, attempt, call in attempts(client, table, pk, sk):
                allowed = may(function, right, name, pk)
                if not allowed and is_partial(function, right, name):
                    continue  # only AWS evaluates dynamodb:LeadingKeys
                if (code := code_of(call)) not in (REFUSED if allowed else DENIED):
                    wrong.append(f"{attempt} {name} {pk}/{sk}: {code}")
    assert wrong == []


def test_no_role_but_the_gateways_approves_a_transfer(
    api: Api, waiting: Callable[..., str], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other role writes an approval, an event and a task, as far as it may; then the execution is resumed."""
    for name, value in audit_environment(api.cloud).items():
        monkeypatch.setenv(name, value)
    cloud, before = api.cloud, (api.balance(SOURCE), api.balance(DESTINATION))
    task_id = waiting(11)
    store, table = TaskStore(), cloud.resources["TasksTable"]
    task, [approval] = store.get_task(task_id), store.approvals(task_id)
    forged = [approval_of_bob(task, approval), event_of_bob(task), task_that_goes_on(task, requester="mallory")]
    root = cloud.client("dynamodb")
    genuine = [root.get_item(TableName=table, Key={k: each[k] for k in ("pk", "sk")}).get("Item") for each in forged]
    try:
        for function in sorted(set(FUNCTIONS) - {"GatewayFunction"}):
            client = session(function).client("dynamodb", endpoint_url=cloud.endpoint)
            for item in forged:
                code = code_of(lambda item=item: client.put_item(TableName=table, Item=item))  # noqa: B023
                assert code in ({"written"} if "TasksTable" in WRITES[function] else DENIED), (function, code)
        token = CallbacksTable().token("APPROVAL", task_id, approval.step_index)
        decision = json.dumps({"decision": "approved"})
        cloud.client("stepfunctions").send_task_success(taskToken=token, output=decision)
        time.sleep(3)
        assert (api.balance(SOURCE), api.balance(DESTINATION)) == before
        logs = api("auditor", "GET", f"/audit/{task_id}").json()["logs"]
        assert [entry["kind"] for entry in logs][-1] == "approval_requested"
        assert api.task(task_id)["requester"] == task.requester
    finally:
        for item, was in zip(forged, genuine, strict=True):
            key = {name: item[name] for name in ("pk", "sk")}
            root.put_item(TableName=table, Item=was) if was else root.delete_item(TableName=table, Key=key)
    assert task_item(store.get_task(task_id))["pk"]["S"] == task_id
    api.wait(task_id)
    assert (api.balance(SOURCE), api.balance(DESTINATION)) == before
