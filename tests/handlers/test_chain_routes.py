"""The mock network's RPC routes: their shapes, their errors, and who may call them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.routing import APIRoute

from qaes.adapters.http import create_app, roles_of
from qubic.network import mock_rpc_api as rpc
from qubic.network import rules
from qubic.network.faults import Faults
from qubic.network.mock import FIRST_TICK, MockChain
from qubic.network.rpc_client import RpcChain
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


def test_every_route_has_roles_and_is_in_the_template() -> None:
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
def test_chain_routes_check_their_roles(call: Call, network: MockChain, name: str) -> None:
    for caller in (ALICE, BOB, CAROL):
        status, body, type_ = call(*(CALLS | SWITCHES)[name], **caller)
        assert (status == 403) == (name in OPERATORS_ONLY)
        if status == 403:
            assert (type_, body["status"]) == (PROBLEM, 403)
    assert call(*(CALLS | SWITCHES)[name], **NOBODY)[::2] == (401, PROBLEM)
    assert network.faults() == Faults()
    assert call(*(CALLS | SWITCHES)[name])[0] == (404 if name == "rpc_transaction" else 200)


# Shapes


def test_shapes(call: Call, clock: Clock) -> None:
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
        "ranges": {"tickNumber": {"gte": "0", "lte": str(FIRST_TICK + 2)}},
        "pagination": {"offset": 0, "size": 5},
    }
    expected = {"validForTick": FIRST_TICK + 3, "hits": {"total": 1, "from": 0, "size": 5}}
    assert call("POST", "/query/v1/getTransactionsForIdentity", question)[1] == expected | {
        "transactions": [transaction]
    }
    for shorter in ({}, {"ranges": {}}, {"filters": None, "exclude": None, "ranges": None}, {"pagination": {}}):
        found = call("POST", "/query/v1/getTransactionsForIdentity", {"identity": POOR.identity} | shorter)[1]
        assert (found["hits"], found["transactions"]) == ({"total": 1, "from": 0, "size": 10}, [transaction])


# Errors


BROADCAST = ("POST", "/live/v1/broadcast-transaction")
BY_HASH = ("POST", "/query/v1/getTransactionByHash")
LIST = ("POST", "/query/v1/getTransactionsForIdentity")
MISTYPED = RICH.identity[:-1] + ("A" if RICH.identity[-1] != "A" else "B")


def late() -> str:
    return base64.b64encode(RICH.signed(POOR, 1, FIRST_TICK).encode()).decode()


def forged() -> str:
    return base64.b64encode(replace(RICH.signed(POOR, 1, FIRST_TICK + 9), amount=2).encode()).decode()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "says"),
    [
        (*BROADCAST, {"encodedTransaction": "%"}, 400, 3, "illegal base64 data"),
        (*BROADCAST, {"encodedTransaction": "AAAA"}, 500, 13, "malformed"),
        (*BROADCAST, {"encodedTransaction": forged()}, 400, 3, "signature"),
        (*BROADCAST, {"encodedTransaction": late()}, 400, 3, "should be greater than max tick"),
        (*BROADCAST, {"encodedTransaction": 7}, 400, 3, "proto: encodedTransaction"),
        (*BROADCAST, {"encodedTransaction": "A" * 5000}, 400, 3, "proto: encodedTransaction"),
        (*BROADCAST, {"encodedTransaction": "AAAA", "more": 1}, 400, 3, "proto: more"),
        (*BROADCAST, {}, 400, 3, "encodedTransaction"),
        (*BROADCAST, None, 400, 3, "body"),
        (*BROADCAST, "{", 400, 3, "JSON"),
        ("GET", "/live/v1/balances/ALICE", None, 500, 13, "invalid ID length, expected 60, found 5"),
        ("GET", f"/live/v1/balances/{RICH.identity.lower()}", None, 500, 13, "invalid conversion"),
        ("GET", f"/live/v1/balances/{'1' * 60}", None, 500, 13, "invalid ID format"),
        (*BY_HASH, {"hash": RICH.signed(POOR, 1, 1).id}, 404, 5, "transaction not found"),
        (*BY_HASH, {"hash": "a" * 60}, 400, 3, "invalid id format: invalid hash [aaa"),
        (*BY_HASH, {"hash": "a" * 59}, 400, 3, "invalid ID length, expected 60, found 59"),
        (*BY_HASH, {"hash": ""}, 400, 3, "invalid ID length, expected 60, found 0"),
        (*BY_HASH, {"hash": RICH.signed(POOR, 1, 1).id.upper()}, 400, 3, "invalid conversion"),
        (*BY_HASH, {"hash": "1" * 60}, 400, 3, "invalid ID format"),
        (*BY_HASH, {"hash": 1}, 400, 3, "proto: hash"),
        (*BY_HASH, {"hash": None}, 400, 3, "hash"),
        (*BY_HASH, {"hash": "a", "more": 1}, 400, 3, "proto: more"),
        (*BY_HASH, "<html>", 400, 3, "JSON"),
        (*BY_HASH, "[]", 400, 3, "proto"),
        (*LIST, {"identity": "A"}, 400, 3, "invalid id format: converting id to pubkey: invalid ID length"),
        (*LIST, {"identity": MISTYPED}, 400, 3, f"invalid id format: invalid identity [{MISTYPED}]"),
        (*LIST, {"identity": RICH.identity.lower()}, 400, 3, "invalid conversion"),
        (*LIST, {}, 400, 3, "identity"),
    ],
)
def test_errors(call: Call, method: str, path: str, body: Any, status: int, code: int, says: str) -> None:
    found = call(method, path, body)
    assert (found[0], found[2]) == (status, "application/json")
    assert set(found[1]) == {"code", "message", "details"}
    assert (found[1]["code"], found[1]["details"]) == (code, [])
    assert says in found[1]["message"]


def ticks(**bounds: Any) -> dict[str, Any]:
    return {"ranges": {"tickNumber": bounds}}


FIVE = ",".join(key(name).identity for name in "abcde")
FILTERS = "creating include filters: "


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        # Ranges
        (ticks(gte="5", lte="5"), "invalid range: invalid tickNumber range: invalid range: [5:5]"),
        (ticks(gte="6", lte="5"), "invalid range: [6:5]"),
        (ticks(gt="4", lt="6"), "invalid range: [5:5]"),
        (ticks(gt="4", lte="5"), "invalid range: [5:5]"),
        (ticks(gte="5", lt="6"), "invalid range: [5:5]"),
        (ticks(), "invalid range: no bounds"),
        (ticks(gte=None), "invalid range: no bounds"),
        (ticks(gt="1", gte="1"), "lower_bound is already set"),
        (ticks(lt="9", lte="9"), "upper_bound is already set"),
        (ticks(gte=1), "proto: ranges.tickNumber.gte"),
        (ticks(gte="-1"), "invalid [gte] value"),
        (ticks(gte="+1"), "invalid syntax"),
        (ticks(lt="1.0"), "invalid [lt] value"),
        (ticks(gt=" 1"), "invalid syntax"),
        (ticks(lte=""), "invalid syntax"),
        (ticks(lte=str(2**32)), "value out of range"),
        (ticks(lte="9" * 5000), "value out of range"),
        (ticks(eq="1"), "proto: ranges.tickNumber.eq"),
        ({"ranges": {"inputType": {"lte": str(2**32)}}}, "invalid inputType range"),
        ({"ranges": {"amount": {"lte": str(2**64)}}}, "invalid amount range"),
        ({"ranges": {"hash": {"gte": "1"}}}, "unsupported range: [hash]"),
        ({"ranges": {name: {"gte": "1"} for name in "abcde"}}, "too many ranges (5)"),
        ({"ranges": {"tickNumber": None}}, "proto: ranges.tickNumber"),
        ({"ranges": []}, "proto: ranges"),
        # Filters
        ({"filters": {"a": "1"}}, FILTERS + "validating filters: unsupported filter: [a]"),
        ({"filters": {"timestamp": "1"}}, "unsupported filter: [timestamp]"),
        ({"filters": dict.fromkeys("abcdef", "1")}, "too many filters (6)"),
        ({"filters": {"amount": 1}}, "proto: filters.amount"),
        ({"filters": {"amount": None}}, "proto: filters.amount"),
        ({"filters": {"amount": "1,2"}}, FILTERS + "handling filter [amount]: more than [1] values"),
        ({"filters": {"amount": " "}}, "empty value"),
        ({"filters": {"amount": "0" * 21}}, "exceeds maximum length"),
        ({"filters": {"amount": "-1"}}, "invalid [amount] filter: invalid numeric value"),
        ({"filters": {"inputType": str(2**32)}}, "invalid [inputType] filter"),
        ({"filters": {"source": MISTYPED}}, "invalid [source] filter: invalid digest"),
        ({"filters": {"source": RICH.identity.lower()}}, "invalid [source] filter: invalid digest"),
        ({"filters": {"source": f"{RICH.identity},"}}, "contains empty value"),
        ({"filters": {"source": f"{RICH.identity},{RICH.identity}"}}, "contains duplicate value"),
        ({"filters": {"destination": f"{FIVE},x"}}, "more than [5] values"),
        ({"filters": {"destination": f"{FIVE}      "}}, "exceeds maximum length"),
        ({"exclude": {"amount": "1"}}, "unsupported exclude filter [amount]"),
        ({"exclude": {"source": "A"}}, "creating exclude filters: "),
        ({"filters": {"amount-exclude": "1"}}, "unsupported exclude filter [amount]"),
        (
            {"filters": {"source-exclude": RICH.identity}, "exclude": {"source": RICH.identity}},
            "cannot use both -exclude filters postfix and exclude filters together",
        ),
        (
            {"filters": {"source": RICH.identity}, "exclude": {"source": POOR.identity}},
            "conflicting filters: duplicate [source] filter",
        ),
        ({"filters": {"tickNumber": "5"}, **ticks(gte="1")}, "conflicting filters: duplicate [tickNumber] filter"),
        # Pages
        ({"pagination": {"size": 1001}}, "invalid pagination: validating page size: page size [1001] exceeds"),
        ({"pagination": {"offset": 10_001}}, "offset [10001] exceeds maximum allowed [10000]"),
        ({"pagination": {"offset": 9_001, "size": 1000}}, "offset [9001] + size [1000] exceeds maximum allowed"),
        ({"pagination": {"offset": 9_991}}, "offset [9991] + size [10] exceeds maximum allowed"),
        ({"pagination": {"offset": -1}}, "proto: pagination.offset"),
        ({"pagination": {"size": -1}}, "proto: pagination.size"),
        ({"pagination": {"size": 1.5}}, "proto: pagination.size"),
        ({"pagination": {"size": True}}, "proto: pagination.size"),
        ({"pagination": {"size": "x"}}, "proto: pagination.size"),
        ({"pagination": {"size": 2**32}}, "proto: pagination.size"),
        ({"pagination": {"page": 1}}, "proto: pagination.page"),
        ({"pagination": []}, "proto: pagination"),
        # Names
        ({"limit": 1}, "proto: limit"),
    ],
    ids=lambda each: json.dumps(each)[:60] if isinstance(each, dict) else "",
)
def test_list_refuses_as_the_query_service_does(call: Call, fields: dict[str, Any], says: str) -> None:
    status, body, _ = call(*LIST, {"identity": RICH.identity} | fields)
    assert (status, body["code"], body["details"]) == (400, 3, [])
    assert says in body["message"]


@pytest.mark.parametrize(
    ("fields", "amounts"),
    [
        ({}, [3, 2, 1]),
        (ticks(gte=str(FIRST_TICK + 1), lte=str(FIRST_TICK + 3)), [2, 1]),
        (ticks(gt=str(FIRST_TICK + 1), lt=str(FIRST_TICK + 4)), [2]),
        (ticks(gt=str(FIRST_TICK + 3)), [3]),
        (ticks(lt=str(FIRST_TICK + 3)), [1]),
        (ticks(lte="007"), []),
        (ticks(gt=str(2**32 - 1)), []),
        (ticks(lt="0"), [3, 2, 1]),  # the service's bound wraps around below 0, and is then no bound
        ({"ranges": {"amount": {"gte": "2", "lte": "3"}, "inputType": {"lt": "8"}}}, [3, 2]),
        ({"ranges": {"timestamp": {"gt": "0"}}}, [3, 2, 1]),
        ({"filters": {"amount": "2", "inputType": "7"}}, [2]),
        ({"filters": {"amount": " 2 "}}, [2]),
        ({"filters": {"tickNumber": str(FIRST_TICK + 1)}}, [1]),
        ({"filters": {"source": f"{RICH.identity}, {POOR.identity}"}}, [3, 2, 1]),
        ({"filters": {"source": POOR.identity}}, []),
        ({"exclude": {"source": RICH.identity}}, []),
        ({"filters": {"destination-exclude": RICH.identity}}, [3, 2, 1]),
        ({"pagination": {"size": 0}}, [3, 2, 1]),
        ({"pagination": {"offset": "1", "size": 1.0}}, [2]),
        ({"pagination": {"offset": None, "size": 1000}}, [3, 2, 1]),
        ({"pagination": {"offset": 9000, "size": 1000}}, []),
    ],
    ids=lambda each: json.dumps(each)[:60],
)
def test_list_accepts_as_the_query_service_does(
    call: Call, clock: Clock, network: MockChain, fields: dict[str, Any], amounts: list[int]
) -> None:
    for amount in (1, 2, 3):
        tick = network.tick_info().tick
        network.broadcast(RICH.signed(POOR, amount, tick + 1, b"abc", 7).encode())
        clock.ticks(2)
    status, body, _ = call(*LIST, {"identity": RICH.identity} | fields)
    assert (status, [int(each["amount"]) for each in body.get("transactions", ())]) == (200, amounts), body


def test_list_counts_to_a_limit(call: Call, clock: Clock, network: MockChain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_HITS", 2)
    for _ in range(3):
        network.broadcast(RICH.signed(POOR, 1, network.tick_info().tick + 1).encode())
        clock.ticks(2)
    body = call(*LIST, {"identity": RICH.identity, "pagination": {"size": 1}})[1]
    assert (body["hits"], len(body["transactions"])) == ({"total": 2, "from": 0, "size": 1}, 1)


def test_balance_does_not_look_at_the_checksum(call: Call) -> None:
    """Neither does the live service: it answers for the 56 letters before it, in the name that was sent."""
    status, body, _ = call("GET", f"/live/v1/balances/{MISTYPED}")
    assert (status, body["balance"]["id"], body["balance"]["balance"]) == (200, MISTYPED, "1000")
    assert call("GET", f"/live/v1/balances/{'Z' * 60}")[0] == 200  # its words are beyond 64 bits, and wrap around


def test_malformed_request_returns_a_problem(call: Call) -> None:
    large = "{" + " " * 300_000 + "}"
    assert call("POST", "/query/v1/getTransactionByHash", large)[::2] == (413, PROBLEM)
    assert call("POST", "/query/v1/getTransactionByHash", "{}", headers={"Content-Type": "text/plain"})[::2] == (
        415,
        PROBLEM,
    )


def test_document_lists_the_errors() -> None:
    app = create_app("qubic")
    rpc.add_rpc_routes(app)
    document = app.openapi()
    assert not {name for name in document["components"]["schemas"] if "ValidationError" in name}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            errors = {"404"} if path == "/mock/faults" else {"400", "404", "500", "503"}
            assert operation["responses"].keys() == {"200", "default"} | errors


def test_network_that_does_not_answer(call: Call, network: MockChain) -> None:
    network.set_faults(Faults(fail_requests=1))
    status, body, _ = call("GET", "/live/v1/tick-info")
    assert (status, body) == (503, {"code": 14, "message": "the node does not respond", "details": []})


@pytest.mark.parametrize("name", CALLS)
def test_other_network_uses_its_own_rpc(call: Call, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The response differs from the one for an absent transaction, so that no client confuses them."""
    monkeypatch.setenv("QUBIC_NETWORK", "mainnet")
    status, body, _ = call(*CALLS[name])
    assert (status, body["code"]) == (404, 12)
    assert "call the network's own RPC" in body["message"]
    if name in OPERATORS_ONLY:
        assert call(*CALLS[name], **ALICE)[0] == 403


def test_real_network_is_not_served(network: MockChain, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_invalid_faults_are_refused(call: Call, network: MockChain, body: Any) -> None:
    status, answer, type_ = call("PUT", "/mock/faults", body)
    assert (status, type_, answer["errors"][0]["field"]) == (422, PROBLEM, next(iter(body)))
    assert network.faults() == Faults()


@pytest.mark.parametrize(
    "variables", [{"STAGE": "dev"}, {"STAGE": "prod"}, {"STAGE": ""}, {"QUBIC_NETWORK": "mainnet"}]
)
@pytest.mark.parametrize("name", SWITCHES)
def test_switches_return_404_outside_the_local_stage(
    call: Call, network: MockChain, monkeypatch: pytest.MonkeyPatch, name: str, variables: dict[str, str]
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    status, body, type_ = call(*SWITCHES[name])
    assert (status, type_) == (404, PROBLEM)
    assert "local stage" in body["detail"]
    assert network.faults() == Faults()
