"""The mock network's RPC routes: their shapes, their errors, and who may call them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute

from qaes.adapters.http import create_app, roles_of
from qubic import rpc
from qubic.chain.mock import FIRST_TICK, Faults, MockChain
from qubic.chain.rpc import RpcChain
from tests.support import template
from tests.support.api import ALICE, BOB, CAROL, NOBODY, OLIVIA, PROBLEM, Api
from tests.support.chain import Clock, key
from tests.support.cloud import Cloud, Context, cloud
from tests.support.rpc import FUNCTION, handler_of

RICH, POOR = key("alice"), key("dave")
EVERYBODY = [ALICE, BOB, CAROL, OLIVIA]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def network(clock: Clock) -> Iterator[MockChain]:
    with cloud(state_machine=False, policy=False):
        yield MockChain(genesis={RICH.identity: 1000}, table="ChainTable", clock=clock, tick_milliseconds=1000)


Call = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def call(network: MockChain, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call a route as an operator; gives the status, the body and its type."""
    handler = handler_of(network, monkeypatch)
    api = Api(Cloud(), FUNCTION)

    def send(method: str, path: str, body: Any = None, **caller: Any) -> tuple[int, Any, str]:
        answer = handler(api.event(method, path, body, **(OLIVIA | caller)), Context())
        headers = {name.lower(): value for name, value in answer["headers"].items()}
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
        return answer["statusCode"], json.loads(answer["body"]), headers["content-type"]

    return send


def encoded(amount: int = 1, ahead: int = 2) -> str:
    return base64.b64encode(RICH.signed(POOR, amount, FIRST_TICK + ahead, b"abc", 7).encode()).decode()


CALLS: dict[str, tuple[str, str, Any]] = {
    "rpc_tick_info": ("GET", "/live/v1/tick-info", None),
    "rpc_broadcast_transaction": ("POST", "/live/v1/broadcast-transaction", {"encodedTransaction": encoded()}),
    "rpc_balance": ("GET", f"/live/v1/balances/{RICH.identity}", None),
    "rpc_last_processed_tick": ("GET", "/query/v1/getLastProcessedTick", None),
    "rpc_transaction": ("POST", "/query/v1/getTransactionByHash", {"hash": RICH.signed(POOR, 1, 1).id}),
    "rpc_transactions": ("POST", "/query/v1/getTransactionsForIdentity", {"identity": RICH.identity}),
}
SWITCHES: dict[str, tuple[str, str, Any]] = {
    "get_mock_faults": ("GET", "/mock/faults", None),
    "put_mock_faults": ("PUT", "/mock/faults", {"drop": 1}),
}
OPERATORS_ONLY = {"rpc_broadcast_transaction", *SWITCHES}


# Who may call


def test_every_route_says_who_may_call_it_and_is_in_the_template() -> None:
    app = create_app("qubic")
    rpc.add_rpc_routes(app)
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert {route.operation_id: set(roles_of(route) or ()) for route in routes} == {
        name: {"operator"} if name in OPERATORS_ONLY else {"requester", "approver", "auditor", "operator"}
        for name in CALLS | SWITCHES
    }
    events = template.template()["Resources"][FUNCTION]["Properties"]["Events"].values()
    there = {(each["Properties"]["Method"], each["Properties"]["Path"]) for each in events if each["Type"] == "Api"}
    assert {(method, route.path) for route in routes for method in route.methods or ()} <= there
    assert all(isinstance(route, app.router.route_class) for route in routes)


@pytest.mark.parametrize("name", CALLS | SWITCHES)
def test_who_may_call(call: Call, network: MockChain, name: str) -> None:
    for caller in (ALICE, BOB, CAROL):
        status, body, type_ = call(*(CALLS | SWITCHES)[name], **caller)
        assert (status == 403) == (name in OPERATORS_ONLY)
        if status == 403:
            assert (type_, body["status"]) == (PROBLEM, 403)
    assert call(*(CALLS | SWITCHES)[name], **NOBODY)[::2] == (401, PROBLEM)
    assert network.faults() == Faults()
    assert call(*(CALLS | SWITCHES)[name])[0] == (404 if name == "rpc_transaction" else 200)


# Shapes


def test_the_shapes(call: Call, clock: Clock) -> None:
    """As the document has them, name by name."""
    assert call("GET", "/live/v1/tick-info")[:2] == (
        200,
        {"tickInfo": {"tick": FIRST_TICK, "duration": 1, "epoch": 1, "initialTick": FIRST_TICK}},
    )
    sent = RICH.signed(POOR, 1, FIRST_TICK + 2, b"abc", 7)
    assert call("POST", "/live/v1/broadcast-transaction", {"encodedTransaction": encoded()})[:2] == (
        200,
        {"peersBroadcasted": 1, "encodedTransaction": encoded(), "transactionId": sent.id},
    )
    clock.ticks(4)
    assert call("GET", "/query/v1/getLastProcessedTick")[1] == {
        "tickNumber": FIRST_TICK + 3,
        "epoch": 1,
        "intervalInitialTick": FIRST_TICK,
        "lastProcessedLogTick": FIRST_TICK + 3,
    }
    assert call("GET", f"/live/v1/balances/{RICH.identity}")[1] == {
        "balance": {
            "id": RICH.identity,
            "balance": "999",
            "validForTick": FIRST_TICK + 3,
            "latestIncomingTransferTick": FIRST_TICK,
            "latestOutgoingTransferTick": FIRST_TICK + 2,
            "incomingAmount": "1000",
            "outgoingAmount": "1",
            "numberOfIncomingTransfers": 1,
            "numberOfOutgoingTransfers": 1,
        }
    }
    transaction = {
        "hash": sent.id,
        "amount": "1",
        "source": RICH.identity,
        "destination": POOR.identity,
        "tickNumber": FIRST_TICK + 2,
        "timestamp": str(int(clock.moment.timestamp() * 1000) - 2000),
        "inputType": 7,
        "inputSize": 3,
        "inputData": "YWJj",
        "signature": base64.b64encode(sent.signature).decode(),
        "moneyFlew": True,
    }
    assert call("POST", "/query/v1/getTransactionByHash", {"hash": sent.id})[1] == {"transaction": transaction}
    question = {
        "identity": POOR.identity,
        "filters": {},
        "ranges": {"tickNumber": {"gte": "0", "lte": FIRST_TICK + 2}},
        "pagination": {"offset": 0, "size": 5},
    }
    expected = {"validForTick": FIRST_TICK + 3, "hits": {"total": 1, "from": 0, "size": 5}}
    assert call("POST", "/query/v1/getTransactionsForIdentity", question)[1] == expected | {
        "transactions": [transaction]
    }
    for shorter in ({}, {"ranges": {}}, {"ranges": {"tickNumber": {}}}, {"pagination": {}}):
        found = call("POST", "/query/v1/getTransactionsForIdentity", {"identity": POOR.identity} | shorter)[1]
        assert (found["hits"], found["transactions"]) == ({"total": 1, "from": 0, "size": 10}, [transaction])


# Errors


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "says"),
    [
        ("POST", "/live/v1/broadcast-transaction", {"encodedTransaction": "%"}, 400, 3, "base64"),
        ("POST", "/live/v1/broadcast-transaction", {"encodedTransaction": "AAAA"}, 400, 3, "malformed"),
        ("POST", "/live/v1/broadcast-transaction", {"encodedTransaction": 7}, 400, 3, "encodedTransaction"),
        ("POST", "/live/v1/broadcast-transaction", {"encodedTransaction": "A" * 5000}, 400, 3, "encodedTransaction"),
        ("POST", "/live/v1/broadcast-transaction", {}, 400, 3, "encodedTransaction"),
        ("POST", "/live/v1/broadcast-transaction", None, 400, 3, "body"),
        ("POST", "/live/v1/broadcast-transaction", "{", 400, 3, "JSON"),
        ("GET", "/live/v1/balances/ALICE", None, 400, 3, "identity"),
        ("POST", "/query/v1/getTransactionByHash", {"hash": "a" * 60}, 404, 5, "not found"),
        ("POST", "/query/v1/getTransactionByHash", {"hash": "a", "more": 1}, 400, 3, "more"),
        ("POST", "/query/v1/getTransactionsForIdentity", {"identity": "A"}, 400, 3, "identity"),
        ("POST", "/query/v1/getTransactionsForIdentity", {"identity": RICH.identity, "filters": {"a": 1}}, 400, 3, "a"),
        (
            "POST",
            "/query/v1/getTransactionsForIdentity",
            {"identity": RICH.identity, "pagination": {"size": 1001}},
            400,
            3,
            "pagination.size",
        ),
        (
            "POST",
            "/query/v1/getTransactionsForIdentity",
            {"identity": RICH.identity, "ranges": {"tickNumber": {"gte": "-1"}}},
            400,
            3,
            "ranges.tickNumber.gte",
        ),
    ],
)
def test_errors(call: Call, method: str, path: str, body: Any, status: int, code: int, says: str) -> None:
    found = call(method, path, body)
    assert (found[0], found[2]) == (status, "application/json")
    assert set(found[1]) == {"code", "message"}
    assert found[1]["code"] == code
    assert says in found[1]["message"]


def test_what_is_no_question_at_all_is_a_problem(call: Call) -> None:
    large = "{" + " " * 300_000 + "}"
    assert call("POST", "/query/v1/getTransactionByHash", large)[::2] == (413, PROBLEM)
    assert call("POST", "/query/v1/getTransactionByHash", "{}", headers={"Content-Type": "text/plain"})[::2] == (
        415,
        PROBLEM,
    )


def test_the_document_knows_the_errors() -> None:
    app = create_app("qubic")
    rpc.add_rpc_routes(app)
    document = app.openapi()
    assert not {name for name in document["components"]["schemas"] if "ValidationError" in name}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            errors = {"404"} if path == "/mock/faults" else {"400", "404", "503"}
            assert operation["responses"].keys() == {"200", "default"} | errors


def test_a_network_that_does_not_answer(call: Call, network: MockChain) -> None:
    network.set_faults(Faults(fail_requests=1))
    status, body, _ = call("GET", "/live/v1/tick-info")
    assert (status, body) == (503, {"code": 14, "message": "the node does not answer"})


@pytest.mark.parametrize("name", CALLS)
def test_another_network_has_its_own_rpc(call: Call, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And says so in another way than that a transaction is absent, lest somebody believe that."""
    monkeypatch.setenv("QUBIC_NETWORK", "mainnet")
    status, body, _ = call(*CALLS[name])
    assert (status, body["code"]) == (404, 12)
    assert "ask the RPC of the network itself" in body["message"]
    if name in OPERATORS_ONLY:
        assert call(*CALLS[name], **ALICE)[0] == 403


def test_a_chain_that_is_not_the_mock_is_not_served(
    network: MockChain, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "chain", lambda: RpcChain("https://rpc.qubic.org"))
    assert call("GET", "/live/v1/tick-info")[0] == 404


# Faults


def test_faults_are_set_and_read(call: Call, network: MockChain) -> None:
    nothing = Faults().model_dump()
    assert call("GET", "/mock/faults")[:2] == (200, nothing)
    assert call("PUT", "/mock/faults", {"drop": 2, "lag": 3})[:2] == (200, nothing | {"drop": 2, "lag": 3})
    assert network.faults() == Faults(drop=2, lag=3)
    assert call("PUT", "/mock/faults", {"paused": True})[:2] == (200, nothing | {"paused": True})
    assert call("PUT", "/mock/faults", {"jump": 10})[:2] == (200, nothing)
    assert network.tick_info().tick == FIRST_TICK + 10


@pytest.mark.parametrize("body", [{"drop": -1}, {"drop": "x"}, {"fall": 1}, {"drop": 10**7}, {"paused": None}])
def test_faults_that_are_none(call: Call, network: MockChain, body: Any) -> None:
    status, answer, type_ = call("PUT", "/mock/faults", body)
    assert (status, type_, answer["errors"][0]["field"]) == (422, PROBLEM, next(iter(body)))
    assert network.faults() == Faults()


@pytest.mark.parametrize(
    "variables", [{"STAGE": "dev"}, {"STAGE": "prod"}, {"STAGE": ""}, {"QUBIC_NETWORK": "mainnet"}]
)
@pytest.mark.parametrize("name", SWITCHES)
def test_there_are_no_switches_elsewhere(
    call: Call, network: MockChain, monkeypatch: pytest.MonkeyPatch, name: str, variables: dict[str, str]
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    status, body, type_ = call(*SWITCHES[name])
    assert (status, type_) == (404, PROBLEM)
    assert "local stage" in body["detail"]
    assert network.faults() == Faults()
