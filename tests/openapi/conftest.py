from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from local.openapi_values import PAYER, SIGNED, SIGNED_ID
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_repository import TaskStore
from qaes.domain.policy import DEFAULT_RULES
from qaes.domain.tiles import TILE_WIDTH
from tests.handlers.test_task_repository import new_task, planned, waiting
from tests.support import template
from tests.support.api import Answer, Api
from tests.support.cloud import Cloud, cloud
from tests.support.trail import anchor_all, entry_items, log, put_entries, sequence_all

OTTO = {"subject": "otto", "roles": "operator"}
DOCUMENT: dict[str, Any] = json.loads((template.ROOT / "docs" / "openapi.json").read_text())


@dataclass(frozen=True)
class Operation:
    """One operation of the document."""

    id: str
    method: str
    path: str
    content: dict[str, Any]

    @property
    def roles(self) -> list[str] | None:
        return self.content.get("x-roles")

    @property
    def deciding(self) -> bool:
        return self.content.get("x-deciding", False) is True

    @property
    def example(self) -> Any:
        return self.content.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")

    @property
    def answer(self) -> tuple[int, dict[str, Any]]:
        """Status and content of its success."""
        [status] = [status for status in self.content["responses"] if status.startswith("2")]
        [content] = self.content["responses"][status]["content"].values()
        return int(status), content


OPERATIONS = [
    Operation(operation["operationId"], method.upper(), path, operation)
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
]


def routes() -> dict[str, str]:
    """`METHOD path` → function, of the template; the public log is another API."""
    return {
        f"{event['Properties']['Method']} {event['Properties']['Path']}": name
        for name, body in template.resources("AWS::Serverless::Function").items()
        for event in body["Properties"].get("Events", {}).values()
        if event["Type"] == "Api" and event["Properties"]["RestApiId"] == {"Ref": "Api"}
    }


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setenv("LEDGER_FUNCTION", "LedgerFunction")
    with cloud() as it:
        yield it


@pytest.fixture
def ask(aws: Cloud) -> Callable[..., Answer]:
    """Send an operation's example about a task of alice's that is as the operation needs it."""

    def send(operation: Operation, **caller: Any) -> Answer:
        path = operation.path
        for name, value in prepared(aws, operation).items():
            path = path.replace(f"{{{name}}}", value)
        api = Api(aws, routes()[f"{operation.method} {operation.path}"])
        event = api.event(operation.method, path, operation.example, **caller)
        query = {
            each["name"]: str(each["example"])
            for each in operation.content.get("parameters", [])
            if each["in"] == "query" and "example" in each
        }
        event["queryStringParameters"] = query or None
        event["multiValueQueryStringParameters"] = {name: [value] for name, value in query.items()} or None
        return api.checked(aws.invoke(api.function, event))

    return send


def prepared(aws: Cloud, operation: Operation) -> dict[str, str]:
    """Return the values of the path's parameters."""
    qubic = Api(aws, "QubicApiFunction")
    if operation.id == "rpc_balance":
        return {"id": PAYER}
    if operation.id == "rpc_transaction":  # it is there once the tick that the example names has passed
        sent, olivia = {"encodedTransaction": SIGNED}, {"subject": "olivia", "roles": "operator"}
        asked = qubic.event("POST", "/query/v1/getTransactionByHash", {"hash": SIGNED_ID}, **olivia)
        if aws.invoke(qubic.function, asked)["statusCode"] == 404:  # in the RPC's own form, which is no problem's
            assert qubic("POST", "/live/v1/broadcast-transaction", sent, **olivia).status == 200
            aws.clock.pass_seconds(300)
        return {}
    if operation.id == "get_transaction":
        return {"txid": LedgerClient("LedgerRecordFunction").write("a" * 64, {}, written_by="olivia")["txid"]}
    if operation.id == "resume_action":
        body = {"action": operation.example["action"], "reason": "so"}
        assert qubic("POST", "/policy/suspend", body, **OTTO).status == 200
        return {}
    if "{version}" in operation.path:
        based_on = qubic("GET", "/policy", **OTTO).body["policy_id"]
        proposed = qubic("POST", "/policy", {"based_on": based_on, "rules": {}, "remove": list(DEFAULT_RULES)}, **OTTO)
        return {"version": str(proposed.body["version"])}
    if "{hash}" in operation.path:
        return {"hash": "a" * 64}
    if "/log/" in operation.path:
        return logged(aws, operation)
    return of_a_task(aws, operation)


def of_a_task(aws: Cloud, operation: Operation) -> dict[str, str]:
    """Have a task, or its plan, as the operation needs it."""
    store = TaskStore("TasksTable")
    if operation.id == "get_plan":
        return {"plan_id": planned(store)[1].plan_id}
    if "{task_id}" not in operation.path:
        return {}
    if operation.id == "retry":
        task_id, _ = planned(store)
        store.end_task(task_id, "failed", actor="test", reason="so")
    elif operation.id == "decide":
        task_id, _ = waiting(store)
    else:
        task_id = store.start_task(new_task())[0].task_id
    if operation.id == "get_bundle":
        aws.drain(task_id)
    return {"task_id": task_id}


def logged(aws: Cloud, operation: Operation) -> dict[str, str]:
    """Have a log with an anchor, or a full tile; the parameters are the example's."""
    if operation.id == "get_entries":
        if not entry_items():  # one tile is enough for every role that asks, and takes seconds to make
            put_entries(TILE_WIDTH)
            sequence_all(aws)
    elif operation.id == "get_tile":
        log().widen_tile(0, 0, bytes(32 * TILE_WIDTH))
    else:
        aws.drain(TaskStore("TasksTable").start_task(new_task())[0].task_id)
        anchor_all(aws)
    in_path = (each for each in operation.content.get("parameters", []) if each["in"] == "path")
    return {each["name"]: each["example"] for each in in_path}
