"""Every call to AWS on the way from an event to its confirmed anchor fails once: before it takes effect, and after.

The client is instrumented to list the real calls: those of the audit functions, of the ledger function that they call,
and of the transaction worker. After each failure the event is delivered again, as AWS does. Then fsck finds nothing,
no entry is lost or stored twice, and the network has one transaction for each anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import boto3
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ReadTimeoutError

from audit.fsck import fsck
from qaes.adapters import clients
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_repository import TaskStore
from qubic.network import chain
from tests.handlers.test_audit_recorder import start_task, stream_event
from tests.support import template
from tests.support.cloud import PARAMETERS, Cloud, cloud
from tests.support.cloud import _environment as function_environment
from tests.support.crashes import STRIDE, sampled_numbers
from tests.support.trail import (
    entry_items,
    forget_policy_events,
    json_of,
    log,
    outbox,
    policy_outbox,
    store,
    stream_of,
)

EVENTS = 2
EACH = 8


class CrashError(Exception):
    """The process is gone."""


def crash(operation: str) -> Exception:
    return CrashError(operation)


def no_answer(operation: str) -> Exception:
    return ReadTimeoutError(endpoint_url=f"https://aws/{operation}")


@dataclass
class Saboteur:
    """Counts the calls that handlers make, and has number `at` fail."""

    at: int
    after: bool
    error: Callable[[str], Exception]
    calls: list[str] = field(default_factory=list)
    inside: int = 0

    def make(self, client: Any, operation: str, arguments: Any) -> Any:
        if not self.inside:
            return self.original(client, operation, arguments)
        self.calls.append(f"{client.meta.service_model.service_name}:{operation}")
        number = len(self.calls)
        if number == self.at and not self.after:
            raise self.error(operation)
        answer = self.original(client, operation, arguments)
        if number == self.at:
            raise self.error(operation)
        return answer

    def original(self, client: Any, operation: str, arguments: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        clients.client("dynamodb")
        clients.lambda_client()
        yield it


def the_way(aws: Cloud, task_id: str) -> list[Callable[[], Any]]:
    """Make AWS's calls in order; each may fail, and the next still follows."""
    return [
        lambda: aws.invoke("RecordEventsFunction", stream_event(task_id)[0]),
        lambda: aws.invoke("RecordEventsFunction", {"task_id": task_id}),
        lambda: aws.invoke("SequencerFunction", json_of(stream_of(entry_items(task_id)))),
        lambda: aws.invoke("AnchorFunction", {}),
        aws.settle,
        lambda: aws.invoke("AnchorFunction", {}),
    ]


def submissions(log_id: str) -> list[dict[str, Any]]:
    """The ledger's own records of this log's anchors."""
    pages = boto3.client("dynamodb").get_paginator("scan").paginate(TableName="LedgerTable")
    found = [item for page in pages for item in page["Items"]]
    return [item for item in found if f"#anchor:{log_id}:" in item["pk"]["S"]]


def on_network(txid: str) -> bool:
    with function_environment(template.environment("LedgerFunction", PARAMETERS)):
        return chain().transaction(txid) is not None


def empty_the_tables() -> None:
    client = boto3.client("dynamodb")
    for table in ("TasksTable", "AuditEntriesTable", "AuditLogTable", "AuditAnchorsTable"):
        for page in client.get_paginator("scan").paginate(TableName=table):
            for item in page["Items"]:
                client.delete_item(TableName=table, Key={"pk": item["pk"], "sk": item["sk"]})


def run(aws: Cloud, task_id: str, saboteur: Saboteur | None) -> None:
    if saboteur is None:
        for step in the_way(aws, task_id):
            step()
        return
    call, invoke = BaseClient._make_api_call, aws.invoke
    saboteur.original = call  # type: ignore[method-assign]

    def counted(function: str, event: Any) -> Any:
        saboteur.inside += 1
        try:
            return invoke(function, event)
        finally:
            saboteur.inside -= 1

    def make(client: Any, operation: str, arguments: Any) -> Any:
        return saboteur.make(client, operation, arguments)

    with patch.object(aws, "invoke", counted), patch.object(BaseClient, "_make_api_call", make):
        for step in the_way(aws, task_id):
            with suppress(Exception):
                step()


def check(aws: Cloud, task_id: str, log_id: str, where: str) -> None:
    forget_policy_events()
    report = fsck(
        store(), log(), LedgerClient("LedgerFunction"), log_id=log_id, outbox=outbox(), policy_outbox=policy_outbox()
    )
    assert [str(each) for each in report.findings] == [], where
    assert (report.entries, report.size, report.anchored) == (EVENTS, EVENTS, EVENTS), where
    assert [entry.seq for entry in store().entries(task_id)] == list(range(1, EVENTS + 1)), where
    records = submissions(log_id)
    submitted = [item for item in records if item["sk"]["S"] == "SUBMISSION"]
    assert {item["state"]["S"] for item in submitted} == {"confirmed"}, where
    assert len(submitted) == report.anchors, where
    confirmed = {anchor.txid for anchor in log().anchors.all()}
    assert {item["txid"]["S"] for item in submitted} == confirmed, where
    # A transaction that missed its tick was signed again; the network has one of them.
    attempts = [item["txid"]["S"] for item in records if item["sk"]["S"].startswith("ATTEMPT#")]
    assert {txid for txid in attempts if on_network(txid)} == confirmed, where


def fail_once(aws: Cloud, at: int, after: bool, error: Callable[[str], Exception]) -> list[str]:
    """Have call number `at` fail, deliver everything again, and check; return the calls, none if there are fewer."""
    log_id = f"log-{at}"
    aws.parameters["LogId"] = log_id
    empty_the_tables()
    task_id = start_task()
    TaskStore("TasksTable").end_task(task_id, "failed", actor="execution", reason="a test")
    saboteur = Saboteur(at, after, error)
    run(aws, task_id, saboteur)
    if len(saboteur.calls) < at:
        return []
    operation = saboteur.calls[at - 1]
    where = f"call {at}, {operation}, {'after' if after else 'before'}"
    live = [item for item in submissions(log_id) if item["sk"]["S"] == "SUBMISSION"]
    assert len(live) <= 1, where
    run(aws, task_id, None)
    check(aws, task_id, log_id, where)
    return saboteur.calls


def clouds(sampled: int) -> Iterator[tuple[int, Cloud]]:
    """Number by number with a cloud, a fresh one now and then: moto's transactions copy all that is there.

    The cases below sample from different numbers on, so that together they try all.
    """
    numbers = sampled_numbers(sampled)
    for first in range(0, len(numbers), EACH):
        with cloud(state_machine=False) as aws:
            clients.client("dynamodb")
            clients.lambda_client()
            for at in numbers[first : first + EACH]:
                yield at, aws


@pytest.mark.parametrize("error", [crash, no_answer])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_every_call_may_fail_once(after: bool, error: Callable[[str], Exception]) -> None:
    failed: set[str] = set()
    tried, sampled = 0, 2 * after + (error is crash)
    with closing(clouds(sampled)) as each:
        for at, aws in each:
            operations = fail_once(aws, at, after, error)
            if not operations:
                break
            failed.update(operations)
            tried += 1
    assert {
        "dynamodb:Query",  # the recorder
        "dynamodb:TransactWriteItems",  # batches, anchors, submissions
        "dynamodb:PutItem",  # entries, tiles, indexes
        "dynamodb:UpdateItem",  # how far the log is integrated
        "dynamodb:GetItem",
        "lambda:Invoke",  # the ledger
        "secretsmanager:GetSecretValue",  # the checkpoint's signature
    } <= failed
    assert tried * STRIDE > 40


def test_flaw_would_be_found(aws: Cloud) -> None:
    """The same without recovery leaves findings: so the suite really detects the damage."""
    aws.parameters["LogId"] = "flawed"
    task_id = start_task()
    run(aws, task_id, Saboteur(10**6, after=False, error=crash))
    boto3.client("dynamodb").delete_item(
        TableName="AuditLogTable",
        Key={"pk": {"S": task_id}, "sk": {"S": "INDEX#000001"}},  # its only entry's
    )
    forget_policy_events()
    report = fsck(
        store(), log(), LedgerClient("LedgerFunction"), log_id="flawed", outbox=outbox(), policy_outbox=policy_outbox()
    )
    assert [each.invariant for each in report.findings] == ["index"]
