"""The qubic service's routes, each called as API Gateway calls the function."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from qaes.adapters import clients
from qaes.domain.qubic.transaction import decode

EVENTS = Path(__file__).parents[2] / "events" / "qubic"
HASH = "ab" * 32
Request = Callable[..., tuple[int, dict[str, Any]]]


class Context:
    function_name = "qubic-api"
    memory_limit_in_mb = 256
    invoked_function_arn = "arn:aws:lambda:us-east-1:123456789012:function:qubic-api"
    aws_request_id = "test"

    def get_remaining_time_in_millis(self) -> int:
        return 30_000


def send(event: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    from qubic import api

    answer = api.handler(event, Context())
    return answer["statusCode"], json.loads(answer["body"])


@pytest.fixture
def request_(monkeypatch: pytest.MonkeyPatch) -> Iterator[Request]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "LEDGER_TABLE": "ledger",
        "QUBIC_NETWORK": "mock",
        "AUTH_MODE": "jwt",
    }.items():
        monkeypatch.setenv(name, value)

    def send_one(
        method: str, path: str, *, roles: str = "requester", body: Any = None, query: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        event = json.loads((EVENTS / "api_health.json").read_text())
        event |= {"httpMethod": method, "path": path, "resource": path}
        event["queryStringParameters"] = query
        event["multiValueQueryStringParameters"] = {name: [value] for name, value in query.items()} if query else None
        event["body"] = None if body is None else json.dumps(body)
        event["requestContext"] |= {"path": f"/v1{path}", "resourcePath": path, "httpMethod": method}
        event["requestContext"]["authorizer"]["roles"] = roles
        return send(event)

    with mock_aws():
        clients.reset()
        boto3.client("dynamodb").create_table(
            TableName="ledger",
            AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in ("pk", "sk")],
            KeySchema=[
                {"AttributeName": "pk", "KeyType": "HASH"},
                {"AttributeName": "sk", "KeyType": "RANGE"},
            ],
            BillingMode="PAY_PER_REQUEST",
        )
        yield send_one
    clients.reset()


def test_the_rule_of_an_action_type(request_: Request) -> None:
    status, body = request_("GET", "/policy", query={"action_type": "transfer_funds"})
    assert status == 200
    assert body.pop("policy_id").startswith("policy-v1-")
    once = {"approvals": 1, "expires_after": None}
    assert body == {
        "network": "mock",
        "action_type": "transfer_funds",
        "allowed": True,
        "requires_approval": True,
        "rules": {"allowed": True, "requires_approval": True, "risk_level": "high"} | once,
    }


def test_an_action_type_without_a_rule_is_denied(request_: Request) -> None:
    status, body = request_("GET", "/policy", query={"action_type": "burn"})
    assert status == 200
    assert body["allowed"] is False
    assert body["rules"]["allowed"] is False
    assert request_("GET", "/policy", query={"action_type": ""})[0] == 422


def test_every_rule(request_: Request) -> None:
    status, body = request_("GET", "/policy")
    assert status == 200
    assert body["version"] == 1
    assert set(body["rules"]) == {"monitoring", "transaction", "transfer_funds"}


def test_a_written_hash_is_verified_and_its_transaction_found(request_: Request) -> None:
    sent = {"hash": HASH, "metadata": {"note": "é", "n": 3}}
    status, written = request_("POST", "/write", roles="operator", body=sent)
    assert status == 200
    assert written["hash"] == HASH
    assert written["network"] == "mock"
    assert request_("POST", "/write", roles="operator", body=sent | {"metadata": {}}) == (200, written)

    status, verified = request_("GET", f"/verify/{HASH.upper()}")
    assert (status, verified["verified"], verified["txid"]) == (200, True, written["txid"])

    status, found = request_("GET", f"/tx/{written['txid']}")
    assert status == 200
    assert found["metadata"] == sent["metadata"]
    assert found["block_height"] == written["tick"]
    assert found["timestamp"] == written["timestamp"]
    assert decode(base64.b64decode(found["encoded"])).id == written["txid"]


def test_only_an_operator_writes(request_: Request) -> None:
    status, body = request_("POST", "/write", roles="requester approver auditor", body={"hash": HASH, "metadata": {}})
    assert status == 403
    assert body["detail"]
    assert request_("GET", f"/verify/{HASH}")[1]["verified"] is False


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"hash": "ab", "metadata": {}},
        {"hash": "zz" * 32, "metadata": {}},
        {"hash": HASH, "metadata": []},
        {"hash": HASH, "metadata": {"x": "y" * 5000}},
        {"hash": HASH, "metadata": {"x": 2**60}},
        {"hash": HASH, "metadata": {}, "more": 1},
        [],
    ],
)
def test_a_write_that_is_not_acceptable(request_: Request, body: Any) -> None:
    status, answer = request_("POST", "/write", roles="operator", body=body)
    assert status == 422
    assert answer["status"] == 422
    assert answer["title"]


def test_what_is_not_there(request_: Request) -> None:
    status, body = request_("GET", f"/verify/{HASH}")
    assert (status, body["verified"], body["txid"], body["timestamp"]) == (200, False, None, None)
    for txid in ("a" * 60, "A" * 60, "short"):
        status, body = request_("GET", f"/tx/{txid}")
        assert status == 404
        assert body["detail"] == "no such transaction"
    assert request_("GET", "/verify/abc")[0] == 422


def test_health_needs_the_table(request_: Request) -> None:
    status, body = request_("GET", "/qubic/health")
    assert status == 200
    assert (body["status"], body["service"], body["network"]) == ("healthy", "qubic", "mock")
    boto3.client("dynamodb").delete_table(TableName="ledger")
    status, body = request_("GET", "/qubic/health")
    assert (status, body["status"]) == (503, "unhealthy")
    assert body["failing"] == ["ledger_table"]
    assert body["detail"]


@pytest.mark.parametrize("path", sorted(EVENTS.glob("api_*.json")), ids=lambda path: path.stem)
@pytest.mark.usefixtures("request_")
def test_the_example_events(path: Path) -> None:
    status, body = send(json.loads(path.read_text()))
    assert status == 200, body
    assert body["network"] == "mock"
