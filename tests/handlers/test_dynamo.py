"""The retry policy for DynamoDB on moto: busy calls are repeated, and a committed write counts once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boto3
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError

from audit import store as audit_store
from qaes.adapters import dynamo
from qaes.adapters.callbacks import Callback, CallbacksTable
from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import ThrottledError, TransientError
from qaes.domain.ids import new_task_id
from qubic.items import ChangedError, Items
from tests.handlers.test_task_repository import new_task
from tests.support import template
from tests.support.api import Api
from tests.support.cloud import Cloud, cloud

LEDGER = "LedgerTable"
MONITOR = {"task_type": "monitor_wallet", "description": "look", "wallet_address": "0x1234567890abcdef"}
REASONS = ["TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"]
CODES = [
    "InternalServerError",
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "ThrottlingException",
    "TransactionInProgressException",
]


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time passes only in pauses, which are noted."""
    noted: list[float] = []
    monkeypatch.setattr(dynamo.time, "sleep", noted.append)
    monkeypatch.setattr(dynamo.time, "monotonic", lambda: sum(noted))
    return noted


def cancelled(*reasons: str) -> ClientError:
    response: Any = {
        "Error": {"Code": "TransactionCanceledException", "Message": "Transaction cancelled"},
        "CancellationReasons": [{"Code": reason} for reason in reasons],
    }
    return ClientError(response, "TransactWriteItems")


def refused(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "arn:aws:dynamodb"}}, "Operation")


@contextmanager
def failing(error: Exception, times: int, operation: str = "", *, after: bool = False) -> Iterator[list[str]]:
    """Let the first calls of DynamoDB fail; `after` they have had their effect."""
    call, failed = BaseClient._make_api_call, []

    def make(client: Any, name: str, arguments: Any) -> Any:
        fails = client.meta.service_model.service_name == "dynamodb" and operation in {"", name}
        if not fails or len(failed) >= times:
            return call(client, name, arguments)
        failed.append(name)
        if after:
            call(client, name, arguments)
        raise error

    with patch.object(BaseClient, "_make_api_call", make):
        yield failed


ERRORS = [*map(cancelled, REASONS), *map(refused, CODES)]


def put(key: str = "a") -> dict[str, Any]:
    return Items(LEDGER).put_new(dynamo.key(key, "X"))


def stored(key: str = "a") -> bool:
    return "Item" in boto3.client("dynamodb").get_item(TableName=LEDGER, Key=dynamo.key(key, "X"))


WRITERS: dict[str, Callable[[], object]] = {
    "tasks": lambda: TaskStore("TasksTable").start_task(new_task()),
    "audit": lambda: audit_store.transact([put(new_task_id())]),
    "qubic": lambda: Items(LEDGER).write(put(new_task_id())),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_transaction_is_repeated_while_the_table_is_busy(aws: Cloud, writer: str) -> None:
    for error in ERRORS:
        with failing(error, 7, "TransactWriteItems") as failed:
            WRITERS[writer]()
        assert len(failed) == 7, error


@pytest.mark.parametrize("writer", WRITERS)
def test_transaction_ends_as_throttled_after_its_patience(aws: Cloud, writer: str, pauses: list[float]) -> None:
    for error in ERRORS:
        pauses.clear()
        with failing(error, 10_000, "TransactWriteItems"), pytest.raises(ThrottledError):
            WRITERS[writer]()
        assert dynamo.PATIENCE_SECONDS - dynamo.LONGEST_PAUSE_SECONDS <= sum(pauses) <= dynamo.PATIENCE_SECONDS
        assert len(set(pauses)) > 5, "pauses are random"


@pytest.mark.parametrize("writer", WRITERS)
def test_transaction_counts_once_when_its_answer_was_lost(aws: Cloud, writer: str) -> None:
    lost = ReadTimeoutError(endpoint_url="https://dynamodb.example")
    with failing(lost, 2, "TransactWriteItems", after=True) as failed:
        assert WRITERS[writer]() is not False
    assert len(failed) == 2


def test_failed_condition_is_never_repeated(aws: Cloud) -> None:
    Items(LEDGER).write(put())
    with failing(refused("unused"), 0) as failed, pytest.raises(dynamo.ConditionFailedError) as caught:
        dynamo.transact([put("b"), put("a")])
    assert (caught.value.refused, failed, stored("b")) == ((1,), [], False)
    with pytest.raises(ChangedError):
        Items(LEDGER).write(put())


def test_failed_condition_counts_although_the_table_is_busy(aws: Cloud, pauses: list[float]) -> None:
    with failing(cancelled("ConditionalCheckFailed", "ThrottlingError"), 1), pytest.raises(dynamo.ConditionFailedError):
        dynamo.transact([put(), put("b")])
    assert pauses == []


@pytest.mark.parametrize("error", [refused("AccessDeniedException"), cancelled("ValidationError", "ThrottlingError")])
def test_error_that_stays_is_raised_at_once(aws: Cloud, error: ClientError, pauses: list[float]) -> None:
    with failing(error, 1), pytest.raises(ClientError):
        dynamo.transact([put()])
    assert pauses == []


READERS: dict[str, Callable[[], object]] = {
    "get": lambda: dynamo.get(LEDGER, "none", "X"),
    "get_many": lambda: list(dynamo.get_many(LEDGER, [dynamo.key("a", "X")])),
    "query": lambda: TaskStore("TasksTable").open_tasks("pending", 0),
    "scan": lambda: list(dynamo.items("scan", TableName=LEDGER)),
    "put": lambda: CallbacksTable().wait(Callback("ACTION", "task_1", 0, "token", 60, 1)),
    "delete": lambda: CallbacksTable().forget("ACTION", "task_1", 0, "token"),
}


@pytest.mark.parametrize("reader", READERS)
def test_single_call_is_repeated_while_the_table_is_busy(aws: Cloud, reader: str) -> None:
    expected = READERS[reader]()
    for error in (*map(refused, CODES), EndpointConnectionError(endpoint_url="https://dynamodb.example")):
        with failing(error, 7):
            assert READERS[reader]() == expected


def test_unprocessed_keys_are_asked_for_again(aws: Cloud) -> None:
    Items(LEDGER).write(put())
    call, left = BaseClient._make_api_call, [3]

    def half(client: Any, name: str, arguments: Any) -> Any:
        if name == "BatchGetItem" and left[0]:
            left[0] -= 1
            return {"Responses": {}, "UnprocessedKeys": arguments["RequestItems"]}
        return call(client, name, arguments)

    with patch.object(BaseClient, "_make_api_call", half):
        assert [item["pk"]["S"] for item in dynamo.get_many(LEDGER, [dynamo.key("a", "X")])] == ["a"]
        left[0] = 10_000
        with pytest.raises(ThrottledError):
            list(dynamo.get_many(LEDGER, [dynamo.key("a", "X")]))


def test_unanswered_call_ends_as_unavailable(aws: Cloud) -> None:
    down = EndpointConnectionError(endpoint_url="https://dynamodb.example")
    with failing(down, 10_000), pytest.raises(TransientError) as caught:
        dynamo.transact([put()])
    assert not isinstance(caught.value, ThrottledError)


def test_start_answers_503_with_retry_after_and_writes_nothing() -> None:
    with cloud() as aws:
        for error in ERRORS:
            with failing(error, 10_000, "TransactWriteItems"):
                answer = Api(aws, "GatewayFunction")("POST", "/task/start", MONITOR)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1"), error
        assert boto3.client("dynamodb").scan(TableName="TasksTable")["Items"] == []
        assert boto3.client("stepfunctions").list_executions(stateMachineArn=aws.machine_arn)["executions"] == []


def test_start_is_taken_when_the_table_was_busy_for_a_moment() -> None:
    with cloud() as aws, failing(cancelled("TransactionConflict"), 8, "TransactWriteItems"):
        assert Api(aws, "GatewayFunction")("POST", "/task/start", MONITOR).status == 202


def test_no_service_calls_dynamodb_by_itself() -> None:
    direct = re.compile(r"""client\(["']dynamodb["']\)""")
    sources = [path for folder in ("functions", "layers/core") for path in (template.ROOT / folder).rglob("*.py")]
    calling = [path.name for path in sources if direct.search(Path(path).read_text())]
    assert calling == ["dynamo.py"]
