"""RpcChain against nodes that are slow, broken, mistaken or dishonest."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from qaes.domain.errors import PermanentError, TransientError
from qaes.domain.qubic import fourq
from qaes.domain.qubic.transaction import Transaction
from qubic.network import chain
from qubic.network import rpc_client as rpc
from qubic.network.base import Chain, SentList
from qubic.network.rpc_client import ATTEMPTS, MAX_ANSWER_BYTES, MAX_LISTED, PAGE, RpcChain
from tests.support.chain import key
from tests.support.http_server import serve

ALICE, BOB = key("alice"), key("bob")
SENT = ALICE.signed(BOB, 5, 1234, b"payload", 9)
ABSENT = {"code": 5, "message": "transaction not found"}
TICK_INFO = {"tickInfo": {"tick": 7, "duration": 1, "epoch": 2, "initialTick": 3}}


def content(transaction: Transaction, **changes: Any) -> dict[str, Any]:
    """A transaction as the RPC has it."""
    return {
        "hash": transaction.id,
        "amount": str(transaction.amount),
        "source": ALICE.identity,
        "destination": BOB.identity,
        "tickNumber": transaction.tick,
        "timestamp": "1772625600000",
        "inputType": transaction.input_type,
        "inputSize": len(transaction.payload),
        "inputData": base64.b64encode(transaction.payload).decode(),
        "signature": base64.b64encode(transaction.signature).decode(),
        "moneyFlew": True,
    } | changes


@dataclass
class Node:
    """A node with given responses: each once, and then always the last one."""

    url: str = ""
    answers: list[tuple[int, Any, dict[str, str]]] = field(default_factory=list)
    asked: list[tuple[str, str, Any, dict[str, str]]] = field(default_factory=list)

    def says(self, status: int, body: Any, **headers: str) -> None:
        self.answers.append((status, body, headers))

    def chain(self, **options: Any) -> RpcChain:
        return RpcChain(self.url, **options)


@pytest.fixture
def node() -> Iterator[Node]:
    it = Node()

    def handle(method: str, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
        it.asked.append((method, path, json.loads(body) if body else None, headers))
        status, answer, extra = it.answers.pop(0) if len(it.answers) > 1 else it.answers[0]
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return {"statusCode": status, "body": text, "headers": {"Content-Type": "application/json"} | extra}

    with serve(handle) as url:
        it.url = url
        yield it


Ask = Callable[[Chain], Any]
CALLS: dict[str, Ask] = {
    "tick-info": lambda chain: chain.tick_info(),
    "getLastProcessedTick": lambda chain: chain.last_processed_tick(),
    "balances": lambda chain: chain.balance(ALICE.identity),
    "getTransactionByHash": lambda chain: chain.transaction(SENT.id),
    "getTransactionsForIdentity": lambda chain: chain.sent(ALICE.identity, 0, 10**6),
    "broadcast-transaction": lambda chain: chain.broadcast(SENT.encode()),
}


# Requests


def test_client_sends_documented_requests(node: Node) -> None:
    node.says(404, ABSENT)
    chain = node.chain(headers={"Authorization": "Bearer t0ken"})
    assert chain.network == "mainnet"
    chain.transaction(SENT.id)
    [(method, path, body, headers)] = node.asked
    assert (method, path, body) == ("POST", "/query/v1/getTransactionByHash", {"hash": SENT.id})
    assert headers["Authorization"] == "Bearer t0ken"
    assert headers["Content-Type"] == "application/json"


def listing(*transactions: dict[str, Any], total: int | None = None, valid_for_tick: int = 9) -> dict[str, Any]:
    hits = {"total": len(transactions) if total is None else total, "from": 0, "size": PAGE}
    return {"validForTick": valid_for_tick, "hits": hits, "transactions": list(transactions)}


@pytest.mark.parametrize(
    ("first", "last", "bounds"),
    [
        (1000, 2000, ("999", "2001")),
        (1234, 1234, ("1233", "1235")),  # the query service refuses 1234 to 1234
        (0, 0, ("0", "1")),
        (2**32 - 1, 2**32 - 1, (str(2**32 - 2), str(2**32 - 1))),
        (0, 2**32 - 1, ("0", str(2**32 - 1))),
    ],
)
def test_sent_requests_a_range_that_the_service_takes(
    node: Node, first: int, last: int, bounds: tuple[str, str]
) -> None:
    node.says(200, listing())
    assert node.chain().sent(ALICE.identity, first, last) == SentList((), 9)
    assert node.asked[0][2] == {
        "identity": ALICE.identity,
        "filters": {"source": ALICE.identity},
        "ranges": {"tickNumber": dict(zip(("gte", "lte"), bounds, strict=True))},
        "pagination": {"offset": 0, "size": PAGE},
    }


def test_sent_leaves_out_the_ticks_around_the_range(node: Node) -> None:
    around = [ALICE.signed(BOB, 5, tick) for tick in (1235, 1234, 1233)]
    node.says(200, listing(*map(content, around)))
    assert [each.transaction for each in node.chain().sent(ALICE.identity, 1234, 1234).transactions] == around[1:2]


def test_sent_reads_page_after_page(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "PAGE", 2)
    sent = [ALICE.signed(BOB, 5, tick) for tick in (1004, 1003, 1002, 1001, 1000)]
    for at in (0, 2, 4):
        node.says(200, listing(*map(content, sent[at : at + 2]), total=5, valid_for_tick=20 - at))
    found = node.chain().sent(ALICE.identity, 1000, 2000)
    assert ([each.transaction for each in found.transactions], found.valid_for_tick) == (sent, 16)
    assert [each[2]["pagination"]["offset"] for each in node.asked] == [0, 2, 4]


def test_path_before_the_rpc_s(node: Node) -> None:
    node.says(200, TICK_INFO)
    assert RpcChain(node.url + "/v1/").tick_info().tick == 7
    assert node.asked[0][1] == "/v1/live/v1/tick-info"


@pytest.mark.parametrize(
    "url",
    [
        "http://rpc.qubic.org",
        "http://127.0.0.1.evil.example",
        "http://localhost.evil.example",
        "http://0.0.0.0:1",
        "ftp://rpc.qubic.org",
        "rpc.qubic.org",
        "https://",
        "https://user:secret@rpc.qubic.org",
        "https://rpc.qubic.org/?a=b",
        "https://rpc.qubic.org/#a",
        "",
        "https://[::1",
    ],
)
def test_invalid_or_unsafe_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="RPC") as caught:
        RpcChain(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://rpc.qubic.org", "http://localhost:80/v1", "http://127.0.0.1", "http://[::1]"])
def test_safe_address_is_accepted(url: str) -> None:
    assert RpcChain(url).network == "mainnet"


# No answer


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_busy_node_is_called_again(node: Node, name: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    node.says(status, {"code": 14, "message": "busy"}, **{"Retry-After": "3600"})
    with pytest.raises(TransientError, match=rf"^{name}: the node responded with status {status}"):
        CALLS[name](node.chain())
    assert len(node.asked) == ATTEMPTS
    assert sum(pauses) < 5, "the node does not control the pauses"
    assert len({json.dumps(each[:3]) for each in node.asked}) == 1, "the same, each time"


def test_single_failure_is_retried(node: Node) -> None:
    node.says(503, {"code": 14, "message": "busy"})
    node.says(200, TICK_INFO)
    assert node.chain().tick_info().tick == 7


@contextmanager
def hanging(answer: bytes, *, wait: float = 0.0, chunks: int = 1) -> Iterator[str]:
    """A node that accepts a request and sends `answer` a given number of times; yields its address."""
    done = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            for _ in range(chunks):
                try:
                    connection.sendall(answer)
                except OSError:
                    return
                if wait and done.wait(wait):
                    return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        done.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


BEGUN = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "READ_SECONDS", 0.2)


@pytest.mark.usefixtures("impatient")
def test_node_that_never_answers() -> None:
    with hanging(b"", wait=5) as url, pytest.raises(TransientError, match="does not respond"):
        RpcChain(url).tick_info()


@pytest.mark.usefixtures("impatient")
def test_node_that_stops_in_the_midst_of_its_answer() -> None:
    with hanging(BEGUN + b"{", wait=5) as url, pytest.raises(TransientError, match="cut off"):
        RpcChain(url).tick_info()


def test_node_that_hangs_up_in_the_midst_of_its_answer() -> None:
    with hanging(BEGUN + b"{}") as url, pytest.raises(TransientError, match="cut off"):
        RpcChain(url).tick_info()


def test_node_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, the answer does not."""
    monkeypatch.setattr(rpc, "READ_SECONDS", 0.3)
    with hanging(BEGUN, wait=0.1, chunks=100) as url, pytest.raises(TransientError, match="too long"):
        RpcChain(url).tick_info()


def test_unreachable_node_is_unavailable(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(TransientError, match="does not respond"):
        RpcChain(f"http://127.0.0.1:{port}").tick_info()


# Malformed responses


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "answer",
    ["", "<html>", "{", "null", "[]", "7", '{"tickInfo":null}', "[" * 100_000],
    ids=lambda text: text[:8] or "-",
)
def test_undocumented_response_is_unavailable(node: Node, name: str, answer: str) -> None:
    node.says(200, answer)
    with pytest.raises(TransientError, match=rf"^{name}: the response "):
        CALLS[name](node.chain())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(node: Node, name: str, status: int) -> None:
    node.says(status, TICK_INFO, Location=node.url + "/elsewhere")
    with pytest.raises(TransientError, match=f"responded with status {status}"):
        CALLS[name](node.chain())
    assert len(node.asked) == 1


@pytest.mark.parametrize("name", CALLS)
def test_too_large_response_is_refused(node: Node, name: str) -> None:
    node.says(200, {"padding": "x" * MAX_ANSWER_BYTES})
    with pytest.raises(TransientError, match="larger"):
        CALLS[name](node.chain())


def test_answer_of_the_largest_size(node: Node) -> None:
    padding = MAX_ANSWER_BYTES - len(json.dumps(TICK_INFO | {"padding": ""}))
    node.says(200, TICK_INFO | {"padding": "x" * padding})
    assert node.chain().tick_info().tick == 7


@pytest.mark.parametrize("tick", [-1, "x", "1_000", " 7", 7.0, True, None, 2**32, 2**64, "1" * 21, [7]])
def test_malformed_number_is_refused(node: Node, tick: Any) -> None:
    node.says(200, {"tickInfo": TICK_INFO["tickInfo"] | {"tick": tick}})
    with pytest.raises(
        TransientError, match=r"^tick-info: the response does not match the documentation: tickInfo\.tick$"
    ):
        node.chain().tick_info()


def test_balance_of_another_identity_is_refused(node: Node) -> None:
    ticks = ("validForTick", "latestIncomingTransferTick", "latestOutgoingTransferTick")
    numbers = dict.fromkeys((*ticks, "numberOfIncomingTransfers", "numberOfOutgoingTransfers"), 1)
    balance = {"id": BOB.identity, "balance": "5", "incomingAmount": "6", "outgoingAmount": "1"} | numbers
    node.says(200, {"balance": balance})
    assert node.chain().balance(BOB.identity).balance == 5
    with pytest.raises(TransientError, match="another identity"):
        node.chain().balance(ALICE.identity)


def without(answer: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in names}


BALANCE = {
    "id": ALICE.identity, "balance": "5", "validForTick": 8, "latestIncomingTransferTick": 1,
    "latestOutgoingTransferTick": 2, "incomingAmount": "6", "outgoingAmount": "1",
    "numberOfIncomingTransfers": 3, "numberOfOutgoingTransfers": 4,
}  # fmt: skip
DECIDES_NOTHING = {
    "tick-info": ("duration", "epoch", "initialTick"),
    "getLastProcessedTick": ("epoch", "intervalInitialTick", "lastProcessedLogTick"),
    "balances": (
        "latestIncomingTransferTick", "incomingAmount", "outgoingAmount",
        "numberOfIncomingTransfers", "numberOfOutgoingTransfers",
    ),
    "getTransactionByHash": ("timestamp", "moneyFlew"),
}  # fmt: skip
WHOLE: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]] = {
    "tick-info": (TICK_INFO["tickInfo"], lambda each: {"tickInfo": each}),
    "getLastProcessedTick": (
        {"tickNumber": 7, "epoch": 2, "intervalInitialTick": 3, "lastProcessedLogTick": 6},
        lambda each: each,
    ),
    "balances": (BALANCE, lambda each: {"balance": each}),
    "getTransactionByHash": (content(SENT), lambda each: {"transaction": each}),
    "getTransactionsForIdentity": (listing(content(SENT)), lambda each: each),
}


@pytest.mark.parametrize("name", DECIDES_NOTHING)
@pytest.mark.parametrize("absent", ["missing", "null"])
def test_response_without_optional_fields_is_accepted(node: Node, name: str, absent: str) -> None:
    """Protobuf's JSON may omit 0 and false, or have null for them."""
    whole, wrapped = WHOLE[name]
    names = DECIDES_NOTHING[name]
    node.says(200, wrapped(without(whole, *names) if absent == "missing" else whole | dict.fromkeys(names)))
    assert CALLS[name](node.chain())


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("tick-info", "tick"), ("getLastProcessedTick", "tickNumber"),
        *[("balances", each) for each in ("id", "balance", "validForTick", "latestOutgoingTransferTick")],
        *[("getTransactionByHash", each) for each in ("hash", "source", "destination", "tickNumber", "signature")],
        *[("getTransactionsForIdentity", each) for each in ("validForTick", "hits", "transactions")],
    ],
)  # fmt: skip
def test_response_without_required_fields_is_unavailable(node: Node, name: str, member: str) -> None:
    """A missing number is never read as 0."""
    whole, wrapped = WHOLE[name]
    for answer in (without(whole, member), whole | {member: None}):
        node.answers.clear()
        node.says(200, wrapped(answer))
        with pytest.raises(TransientError, match="does not match the documentation"):
            CALLS[name](node.chain())


@pytest.mark.parametrize("name", ["amount", "inputType", "inputSize", "inputData"])
def test_transaction_without_a_member_is_proved_by_its_id(node: Node, name: str) -> None:
    empty = ALICE.signed(BOB, 0, 1234)
    node.says(200, {"transaction": without(content(empty), name)})
    found = node.chain().transaction(empty.id)
    assert found is not None
    assert found.transaction == empty
    node.answers.clear()
    node.says(200, {"transaction": without(content(SENT), name)})
    with pytest.raises(TransientError, match="another transaction"):
        node.chain().transaction(SENT.id)


# A transaction is there, or not, or nothing is known


@pytest.mark.parametrize("nested", [True, False])
def test_both_nestings(node: Node, nested: bool) -> None:
    node.says(200, {"transaction": content(SENT)} if nested else content(SENT))
    found = node.chain().transaction(SENT.id)
    assert found is not None
    assert (found.transaction, found.timestamp, found.money_flew) == (SENT, 1772625600000, True)


def test_money_flew_decides_nothing(node: Node) -> None:
    node.says(200, content(SENT, moneyFlew=False))
    found = node.chain().transaction(SENT.id)
    assert found is not None
    assert found.transaction == SENT


def test_absent(node: Node) -> None:
    node.says(404, ABSENT)
    assert node.chain().transaction(SENT.id) is None


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, "<html>not found</html>"),
        (404, {"message": "Not Found"}),
        (404, {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "This route does not exist."}),
        (404, {"code": 12, "message": "this stack does not use the mock network"}),
        (404, {"code": 5, "message": "Not Found", "details": []}),  # grpc-gateway's, for a path that it does not have
        (400, {"code": 3, "message": "invalid id format", "details": []}),
        (404, {"code": "5", "message": "x"}),
        (403, {"message": "Missing Authentication Token"}),
        (400, ABSENT),
        (410, ABSENT),
        (200, {}),
        (200, {"transaction": None}),
        (204, ""),
    ],
)
def test_only_documented_404_means_absent(node: Node, status: int, body: Any) -> None:
    """A client that treats it as absent would sign it again, and it would execute twice."""
    node.says(status, body)
    with pytest.raises(TransientError):
        node.chain().transaction(SENT.id)


CHANGES = {
    "amount": "6",
    "source": BOB.identity,
    "destination": ALICE.identity,
    "tickNumber": 1235,
    "inputType": 8,
    "inputSize": 8,
    "inputData": base64.b64encode(b"pay1oad").decode(),
    "signature": base64.b64encode(BOB.signed(BOB, 5, 1234).signature).decode(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_node_that_changes_something(node: Node, name: str) -> None:
    node.says(200, content(SENT, **{name: CHANGES[name]}))
    with pytest.raises(TransientError, match="another transaction"):
        node.chain().transaction(SENT.id)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", "A" * 60),
        ("destination", ""),
        ("amount", str(10**15 + 1)),
        ("tickNumber", 2**32),
        ("inputType", 2**16),
        ("inputData", "%%%"),
        ("signature", ""),
        ("signature", "AAAA"),
        ("signature", "ü"),
    ],
)
def test_malformed_transaction_is_refused(node: Node, name: str, value: Any) -> None:
    node.says(200, content(SENT, **{name: value}))
    with pytest.raises(TransientError, match=r"malformed transaction|does not match the documentation: tickNumber"):
        node.chain().transaction(SENT.id)


def test_signature_of_another_source_is_refused(node: Node) -> None:
    """The id is that of these very bytes, and the source has not signed them."""
    s = int.from_bytes(SENT.signature[32:], "little")
    for signature in (bytes(64), SENT.signature[:32] + (s + fourq.N).to_bytes(32, "little")):
        forged = replace(SENT, signature=signature)
        node.answers.clear()
        node.says(200, content(forged))
        with pytest.raises(TransientError, match="without its source"):
            node.chain().transaction(forged.id)


@pytest.mark.parametrize(
    ("transactions", "match"),
    [
        ([content(SENT, amount="6")], "another transaction"),
        ([content(replace(SENT, signature=bytes(64)))], "without its source.s signature"),
        ([content(ALICE.signed(BOB, 5, 998))], "does not match the request"),
        ([content(ALICE.signed(BOB, 5, 2002))], "does not match the request"),
        ([content(BOB.signed(ALICE, 5, 1234), source=BOB.identity)], "does not match the request"),
        ([content(SENT)] * (PAGE + 1), "more transactions than requested"),
    ],
)
def test_list_of_other_transactions_is_refused(node: Node, transactions: list[Any], match: str) -> None:
    node.says(200, listing(*transactions))
    with pytest.raises(TransientError, match=match):
        node.chain().sent(ALICE.identity, 1000, 2000)


@pytest.mark.parametrize(
    ("transactions", "total", "match"),
    [
        ([], 1, "counts 1 transactions but lists 0"),
        ([content(SENT)], 0, "counts 0 transactions but lists 1"),
        ([content(SENT), content(SENT)], 2, "counts 2 transactions but lists 1"),
        ([content(SENT)], MAX_LISTED + 1, "too many"),
        ([content(SENT)], 10_000, "too many"),  # the service counts no further
    ],
)
def test_sent_unavailable_when_the_list_is_incomplete(
    node: Node, transactions: list[Any], total: int, match: str
) -> None:
    """A transaction that the list lacks would be taken for absent."""
    node.says(200, listing(*transactions, total=total))
    with pytest.raises(TransientError, match=match):
        node.chain().sent(ALICE.identity, 1000, 2000)


# Broadcast


def test_number_of_peers_decides_nothing(node: Node) -> None:
    for peers in (0, 7):
        node.answers.clear()
        node.says(200, {"peersBroadcasted": peers, "encodedTransaction": "", "transactionId": SENT.id})
        assert node.chain().broadcast(SENT.encode()) == SENT.id
    assert base64.b64decode(node.asked[0][2]["encodedTransaction"]) == SENT.encode()


def test_refused_broadcast_is_permanent(node: Node) -> None:
    node.says(400, {"code": 3, "message": "no balance\n" + "x" * 1000})
    with pytest.raises(PermanentError, match="no balance") as caught:
        node.chain().broadcast(SENT.encode())
    assert caught.value.code == "broadcast_refused"
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300
    assert len(node.asked) == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"code": 16, "message": "token"}),
        (403, {"message": "Forbidden"}),
        (404, {"code": 5, "message": "Not Found"}),
        (413, "too large"),
        (400, "<html>bad gateway of some proxy</html>"),
        (200, {"transactionId": "a" * 60}),
        (202, {"transactionId": SENT.id}),
    ],
)
def test_broadcast_of_which_nothing_is_known(node: Node, status: int, body: Any) -> None:
    node.says(status, body)
    with pytest.raises(TransientError):
        node.chain().broadcast(SENT.encode())


def test_malformed_transaction_is_not_sent(node: Node) -> None:
    node.says(200, {})
    with pytest.raises(PermanentError, match="malformed"):
        node.chain().broadcast(b"x" * 100)
    assert node.asked == []


def test_process_keeps_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUBIC_NETWORK", "mainnet")
    monkeypatch.setenv("QUBIC_RPC_URL", "https://rpc.example")
    assert chain() is chain()
    monkeypatch.setenv("QUBIC_RPC_URL", "https://other.example")
    other = chain()
    monkeypatch.setenv("QUBIC_RPC_URL", "https://rpc.example")
    assert chain() is not other
