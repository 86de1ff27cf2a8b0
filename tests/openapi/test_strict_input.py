"""Every route of the document takes its own query parameters, each once; and no text that deceives its reader."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest

from tests.openapi.conftest import OPERATIONS, Operation, routes
from tests.support.api import NOBODY, Answer, Api, named
from tests.support.cloud import Cloud

OLIVIA = {"subject": "olivia", "roles": "operator"}
VALUES = {"task_id": "task_019ab000-0000-7000-8000-00000000dead", "hash": "a" * 64, "txid": "a" * 60}
NETWORK = {"rpc_tick_info", "rpc_broadcast_transaction", "rpc_balance", "rpc_last_processed_tick", "rpc_transaction",
           "rpc_transactions"}  # fmt: skip
"""The network's own routes answer in the public RPC's form: 400, and the parameter's name in `message`."""


def send(aws: Cloud, operation: Operation, query: dict[str, list[str]] | None, **changes: Any) -> Answer:
    """Send an operation's example with this query."""
    path = operation.path.format_map(defaultdict(lambda: "1", VALUES))
    api = Api(aws, routes()[f"{operation.method} {operation.path}"])
    body = changes.pop("body", operation.example)
    event = api.event(operation.method, path, body, **(OLIVIA | changes))
    event["queryStringParameters"] = {name: values[-1] for name, values in (query or {}).items()} or None
    event["multiValueQueryStringParameters"] = query
    raw = aws.invoke(api.function, event)
    if operation.id in NETWORK and raw["statusCode"] == 400:
        return Answer(400, json.loads(raw["body"]), {})
    return api.checked(raw)


def refused(answer: Answer, operation: Operation, name: str) -> bool:
    if operation.id in NETWORK:
        return answer.status == 400 and name in answer.body["message"]
    return answer.status == 422 and named(answer) == {name}


def parameters(operation: Operation) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in operation.content.get("parameters", []) if each["in"] == "query"}


@pytest.fixture(scope="module")
def shared() -> Any:
    """One cloud for all tests: a rejected request changes nothing."""
    from tests.support.cloud import cloud

    with cloud(state_machine=False) as it:
        yield it


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.id)
def test_query_refused_when_a_name_is_unknown(operation: Operation, shared: Cloud) -> None:
    for query in ({"surprise": ["1"]}, {"": ["1"]}, {"Limit": ["1"]}, {"limit ": ["1"]}):
        [name] = query
        needed = {known: [str(each["example"])] for known, each in parameters(operation).items() if each["required"]}
        answer = send(shared, operation, needed | query)
        assert refused(answer, operation, name or "query"), (query, answer)


WITH_A_QUERY = [
    pytest.param(operation, name, id=f"{operation.id}-{name}")
    for operation in OPERATIONS
    for name in parameters(operation)
]


def test_operations_with_a_query_are_known() -> None:
    assert len(WITH_A_QUERY) >= 11


@pytest.mark.parametrize(("operation", "name"), WITH_A_QUERY)
def test_query_refused_when_not_of_one_meaning(operation: Operation, name: str, shared: Cloud) -> None:
    known = parameters(operation)
    good = str(known[name].get("example", {"mine": "true", "cursor": VALUES["task_id"]}.get(name, "1")))
    rest = {other: [str(each["example"])] for other, each in known.items() if each["required"] and other != name}
    bad: dict[str, list[str]] = {
        "repeated": [good, good],
        "repeated with another value": [good, "other"],
        "empty": [""],
        "over-long": ["1" * 300],
        "a right-to-left override": [f"{good}\u202e"],
        "a NUL": [f"{good}\0"],
        "a line": [f"{good}\n"],
    }
    if known[name]["schema"].get("type") == "integer":
        spelled = ("01", "+1", " 1", "1 ", "1.0", "1_0", "1e0", "\u0661", "0x1")
        bad |= {f"spelled {text}": [text] for text in spelled}
    for what, values in bad.items():
        answer = send(shared, operation, rest | {name: values})
        assert refused(answer, operation, name), (what, answer)


def test_query_is_not_looked_at_before_the_caller(shared: Cloud) -> None:
    [tasks] = [operation for operation in OPERATIONS if operation.id == "get_tasks"]
    assert send(shared, tasks, {"surprise": ["1"]}, **NOBODY).status == 401
    assert send(shared, tasks, {"surprise": ["1"]}, subject="eve", roles="").status == 403


KEYED = [operation for operation in OPERATIONS
         if any(each["name"] == "Idempotency-Key" for each in operation.content.get("parameters", []))]  # fmt: skip


@pytest.mark.parametrize("operation", KEYED, ids=lambda operation: operation.id)
def test_header_refused_when_repeated(operation: Operation, shared: Cloud) -> None:
    path = operation.path.format_map(defaultdict(lambda: "1", VALUES))
    api = Api(shared, routes()[f"{operation.method} {operation.path}"])
    for sent in ({"Idempotency-Key": ["a", "b"]}, {"Idempotency-Key": ["a", "a"]},
                 {"Idempotency-Key": ["a"], "idempotency-key": ["b"]}, {"idempotency-key": ["a", "b"]}):  # fmt: skip
        event = api.event(operation.method, path, operation.example, **OLIVIA)
        event["headers"] |= {name: values[-1] for name, values in sent.items()}
        event["multiValueHeaders"] |= sent
        answer = api.checked(shared.invoke(api.function, event))
        assert (answer.status, named(answer)) == (422, {"Idempotency-Key"}), (sent, answer)


DECEPTIVE = ("\u202e", "\u200b", "a\0", "\x1b[2J", "a\rb", "\u2066", "\ufeffx", "a\ufe0f", "\u3164", "\x9b2J")


def places(body: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where a body has a text."""
    if isinstance(body, dict):
        return [place for name, inner in body.items() for place in places(inner, (*path, name))]
    return [path] if isinstance(body, str) else []


def replaced(body: Any, place: tuple[str, ...], text: str) -> Any:
    if not place:
        return text
    return body | {place[0]: replaced(body[place[0]], place[1:], text)}


WITH_A_BODY = [operation for operation in OPERATIONS if isinstance(operation.example, dict)]


@pytest.mark.parametrize("operation", WITH_A_BODY, ids=lambda operation: operation.id)
def test_body_refused_when_its_text_deceives(operation: Operation, shared: Cloud) -> None:
    for text in DECEPTIVE:
        for place in places(operation.example):
            answer = send(shared, operation, None, body=replaced(operation.example, place, f"x{text}"))
            assert refused(answer, operation, ".".join(place)), (place, text, answer)
        answer = send(shared, operation, None, body=operation.example | {f"x{text}": 1})
        if operation.id in NETWORK:
            assert answer.status == 400
        else:
            assert answer.status == 422 and "U+" in answer.body["detail"], answer
            assert all(error["field"].isprintable() for error in answer.body["errors"])
