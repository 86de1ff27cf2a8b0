"""The qubic service's routes, each called as API Gateway calls the function."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from qaes.domain.qubic.transaction import decode
from qubic.network.faults import Faults
from qubic.network.mock import MockChain
from qubic.wallets import genesis
from tests.support.api import Api
from tests.support.cloud import Cloud, cloud

HASH = "ab" * 32
Request = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def request_(aws: Cloud) -> Request:
    api = Api(aws, "QubicApiFunction")

    def send(method: str, path: str, *, roles: str = "requester", body: Any = None) -> tuple[int, dict[str, Any]]:
        answer = api(method, path, body, subject="someone", roles=roles)
        return answer.status, answer.body

    return send


def test_hash_is_pending_until_it_is_confirmed(aws: Cloud, request_: Request) -> None:
    sent = {"hash": HASH, "metadata": {"note": "é", "n": 3}}
    status, written = request_("POST", "/write", roles="operator", body=sent)
    assert (status, written["status"], written["hash"], written["network"]) == (200, "pending", HASH, "mock")
    assert len(written["txid"]) == 60

    status, verified = request_("GET", f"/verify/{HASH.upper()}")
    assert (status, verified["verified"], verified["state"]) == (200, False, "broadcast")
    aws.settle()
    status, verified = request_("GET", f"/verify/{HASH.upper()}")
    assert (status, verified["verified"], verified["txid"]) == (200, True, written["txid"])
    assert decode(base64.b64decode(verified["encoded"])).is_signed_by_source()

    status, again = request_("POST", "/write", roles="operator", body=sent | {"metadata": {}})
    assert (status, again["status"], again["txid"]) == (200, "confirmed", written["txid"])

    status, found = request_("GET", f"/tx/{written['txid']}")
    assert status == 200
    assert found["metadata"] == sent["metadata"]
    assert (found["block_height"], found["hash"], found["state"]) == (written["tick"], HASH, "confirmed")
    assert decode(base64.b64decode(found["encoded"])).id == written["txid"]


def test_transaction_that_was_replaced_is_shown_as_expired(aws: Cloud, request_: Request) -> None:
    chain = MockChain(genesis=genesis(), table="ChainTable", clock=aws.clock, tick_milliseconds=1000)
    chain.set_faults(Faults(empty_ticks=20))
    first = request_("POST", "/write", roles="operator", body={"hash": HASH, "metadata": {}})[1]
    aws.settle()
    verified = request_("GET", f"/verify/{HASH}")[1]
    assert verified["verified"] is True
    assert verified["txid"] != first["txid"]
    assert request_("GET", f"/tx/{first['txid']}")[1]["state"] == "expired"


def test_only_an_operator_writes(request_: Request) -> None:
    status, body = request_("POST", "/write", roles="requester approver auditor", body={"hash": HASH, "metadata": {}})
    assert status == 403
    assert body["detail"]
    assert request_("GET", f"/verify/{HASH}")[1]["state"] is None


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"hash": "ab", "metadata": {}},
        {"hash": "zz" * 32, "metadata": {}},
        {"hash": HASH, "metadata": []},
        {"hash": HASH, "metadata": {"x": "y" * 5000}},
        {"hash": HASH, "metadata": {}, "more": 1},
        [],
    ],
)
def test_invalid_write_is_refused(request_: Request, body: Any) -> None:
    status, answer = request_("POST", "/write", roles="operator", body=body)
    assert status == 422
    assert answer["status"] == 422
    assert answer["title"]


def test_unknown_hash_and_transaction_are_not_found(request_: Request) -> None:
    status, body = request_("GET", f"/verify/{HASH}")
    assert (status, body["verified"], body["txid"], body["timestamp"]) == (200, False, None, None)
    for txid in ("a" * 60, "A" * 60, "short"):
        status, body = request_("GET", f"/tx/{txid}")
        assert status == 404
        assert body["detail"] == "no such transaction"
    assert request_("GET", "/verify/abc")[0] == 422


def test_health_needs_the_network_and_a_policy(aws: Cloud, request_: Request) -> None:
    status, body = request_("GET", "/qubic/health")
    assert status == 200
    assert (body["status"], body["service"], body["network"]) == ("healthy", "qubic", "mock")
    MockChain(genesis=genesis(), table="ChainTable", clock=aws.clock, tick_milliseconds=1000).set_faults(
        Faults(fail_requests=1)
    )
    status, body = request_("GET", "/qubic/health")
    assert (status, body["status"], body["failing"]) == (503, "unhealthy", ["network"])
    assert body["detail"]


def test_without_a_balance_the_service_is_not_healthy(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    assert request_("GET", "/qubic/health")[0] == 200
    balance = MockChain.balance
    monkeypatch.setattr(MockChain, "balance", lambda self, identity: replace(balance(self, identity), balance=0))
    status, body = request_("GET", "/qubic/health")
    assert (status, body["failing"]) == (503, ["wallet"])


def test_without_a_policy_in_force_the_service_is_not_healthy() -> None:
    with cloud(state_machine=False, policy=False) as it:
        api = Api(it, "QubicApiFunction")
        answer = api("GET", "/qubic/health", None, subject="someone", roles="")
        assert (answer.status, answer.body["failing"]) == (503, ["policy"])
        it.settle()
        assert api("GET", "/qubic/health", None, subject="someone", roles="").status == 200
