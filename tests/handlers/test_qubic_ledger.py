"""The ledger's function on moto: what other services ask it, and that a refusal is a value."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.transaction import decode
from qubic.chain.mock import FIRST_TICK, Faults, MockChain
from qubic.wallets import DEMO_BALANCES, genesis
from tests.support.cloud import Cloud, cloud

RICH, POOR, EMPTY = DEMO_BALANCES
ZERO = encode_identity(bytes(32))
HASH = "ab" * 32
Call = Callable[..., dict[str, Any]]


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def call(aws: Cloud) -> Call:
    def send(operation: Any, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = aws.invoke("LedgerFunction", {"operation": operation, **arguments})
        return answer

    return send


@pytest.fixture
def transfer(call: Call) -> Call:
    def send(**changes: Any) -> dict[str, Any]:
        terms = {
            "reference": "task#step_3", "source": RICH, "destination": EMPTY, "amount": 10,
            "action_type": "transfer_funds", "run": 1,
        }  # fmt: skip
        return call("transfer", **terms | changes)

    return send


def code(answer: dict[str, Any]) -> str:
    assert answer["ok"] is False, answer
    assert answer["error"]["message"]
    return str(answer["error"]["code"])


def test_a_transfer_is_under_way_and_then_confirmed(aws: Cloud, call: Call, transfer: Call) -> None:
    under_way = transfer()["result"]
    assert under_way["state"] == "signed"
    assert under_way["encoded"] == ""  # not sent yet: who had the bytes could send them
    assert call("balance", address=RICH)["result"]["balance"] == DEMO_BALANCES[RICH]
    assert call("transfer_state", reference="task#step_3")["result"]["state"] == "broadcast"
    aws.settle()
    done = call("transfer_state", reference="task#step_3")["result"]
    assert (done["state"], done["txid"], done["error"]) == ("confirmed", under_way["txid"], None)
    assert decode(base64.b64decode(done["encoded"])).id == done["txid"]
    assert transfer()["result"] == done | {"network": "mock"}
    assert call("balance", address=RICH)["result"]["balance"] == DEMO_BALANCES[RICH] - 10
    assert call("balance", address=EMPTY)["result"]["balance"] == 10


def test_a_transfer_that_nobody_asked_for_has_no_state(call: Call) -> None:
    assert code(call("transfer_state", reference="task#step_9")) == "not_found"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"amount": 0}, "invalid_amount"),
        ({"amount": 1.5}, "invalid_amount"),
        ({"amount": True}, "invalid_amount"),
        ({"amount": "10"}, "invalid_amount"),
        ({"run": "1"}, "invalid_input"),
        ({"reference": ""}, "invalid_input"),
        ({"reference": 7}, "invalid_input"),
        ({"source": "0x12"}, "invalid_address"),
        ({"destination": ZERO[:-1] + "Z"}, "invalid_address"),
        ({"destination": RICH}, "invalid_address"),
        ({"amount": 1001}, "insufficient_balance"),
        ({"source": EMPTY, "destination": RICH}, "insufficient_balance"),
        ({"source": ZERO}, "no_key"),
        ({"action_type": "burn"}, "not_allowed"),
    ],
)
def test_what_is_refused_leaves_nothing(call: Call, transfer: Call, changes: dict[str, Any], expected: str) -> None:
    assert code(transfer(**changes)) == expected
    assert code(call("transfer_state", reference="task#step_3")) == "not_found"


def test_another_transfer_under_the_same_reference_is_refused(transfer: Call) -> None:
    transfer()
    assert code(transfer(amount=11)) == "reference_conflict"


def test_on_a_real_network_a_transfer_is_only_shown_unless_it_is_allowed(
    aws: Cloud, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qubic import ledger, wallets

    class Real(MockChain):
        network = "mainnet"

    real = Real(genesis=genesis(), table="ChainTable", clock=aws.clock, tick_milliseconds=1000)
    monkeypatch.setattr("qubic.service.chain", lambda: real)
    monkeypatch.setattr(ledger, "policies", lambda: pytest.fail("a simulation reserves nothing"))
    service = wallets.service_key().identity
    terms = {
        "reference": "task#step_3", "source": service, "destination": ZERO, "amount": 1,
        "action_type": "transfer_funds", "run": 1,
    }  # fmt: skip
    shown = call("transfer", **terms)["result"]
    assert (shown["state"], shown["network"]) == ("simulated", "mainnet")
    assert (len(shown["txid"]), shown["encoded"]) == (60, "")
    assert code(call("transfer_state", reference="task#step_3")) == "not_found"
    assert code(call("transfer", **terms | {"source": RICH})) == "invalid_address"
    assert code(call("transfer", **terms | {"source": ZERO, "destination": service})) == "no_key"
    aws.clock.pass_seconds(60)
    assert real.balance(ZERO).balance == 0


def test_a_hash_is_verified_when_it_is_confirmed_and_not_before(aws: Cloud, call: Call) -> None:
    unknown = call("verify", hash=HASH)["result"]
    assert (unknown["verified"], unknown["txid"], unknown["state"]) == (False, None, None)
    written = call("write", hash=HASH.upper(), metadata={})["result"]
    assert (written["hash"], written["state"]) == (HASH, "signed")
    pending = call("verify", hash=HASH)["result"]
    assert (pending["verified"], pending["state"], pending["txid"]) == (False, "broadcast", written["txid"])
    aws.settle()
    known = call("verify", hash=HASH)["result"]
    assert (known["verified"], known["txid"], known["tick"]) == (True, written["txid"], written["tick"])
    assert decode(base64.b64decode(known["encoded"])).payload.hex() == HASH
    assert call("transaction", txid=written["txid"])["result"]["state"] == "confirmed"


@pytest.mark.parametrize(
    "arguments",
    [
        {"hash": "ab", "metadata": {}},
        {"hash": "zz" * 32, "metadata": {}},
        {"hash": None, "metadata": {}},
        {"hash": HASH, "metadata": []},
        {"hash": HASH, "metadata": {"x": "y" * 5000}},
        {"hash": HASH, "metadata": {"x": 2**60}},
    ],
)
def test_what_is_no_hash_is_not_written(call: Call, arguments: dict[str, Any]) -> None:
    assert code(call("write", **arguments)) == "invalid_input"
    assert call("verify", hash=HASH)["result"]["state"] is None


def test_an_anchor_is_submitted_once_and_told_with_its_bytes(aws: Cloud, call: Call) -> None:
    sent = {"log_id": "qaes", "sequence": 0, "payload": "51414553"}
    assert code(call("anchor_state", log_id="qaes", sequence=0)) == "not_found"
    first = call("submit_anchor", **sent)["result"]
    assert call("submit_anchor", **sent)["result"]["txid"] == first["txid"]
    assert code(call("submit_anchor", **sent | {"payload": "51414554"})) == "key_conflict"
    aws.settle()
    state = call("anchor_state", log_id="qaes", sequence=0)["result"]
    assert state["state"] == "confirmed"
    transaction = decode(base64.b64decode(state["encoded"]))
    assert (transaction.payload, transaction.input_type) == (b"QAES", 0x5141)
    assert encode_identity(transaction.source) == state["source"]


@pytest.mark.parametrize("changes", [{"payload": "x"}, {"payload": 7}, {"sequence": -1}, {"sequence": True}])
def test_what_is_no_anchor_is_refused(call: Call, changes: dict[str, Any]) -> None:
    sent = {"log_id": "qaes", "sequence": 0, "payload": "51414553"} | changes
    assert code(call("submit_anchor", **sent)) == "invalid_input"


# The dispatch


@pytest.mark.parametrize("operation", [None, "", "mint", 7, ["policy"]])
def test_an_unknown_operation_is_refused(call: Call, operation: Any) -> None:
    assert code(call(operation)) == "unknown_operation"


@pytest.mark.parametrize("arguments", [{}, {"address": RICH, "more": 1}])
def test_missing_and_further_arguments_are_refused(call: Call, arguments: dict[str, Any]) -> None:
    assert code(call("balance", **arguments)) == "invalid_input"


def test_policy_balance_health_and_a_missing_transaction(call: Call) -> None:
    policy = call("policy")["result"]
    assert (policy["version"], set(policy["rules"])) == (1, {"monitoring", "transaction", "transfer_funds"})
    document = call("policy_document", policy_id=policy["policy_id"])["result"]
    assert document["hash"] == decode(base64.b64decode(document["encoded"])).payload.hex()
    assert code(call("policy_document", policy_id=f"policy-v9-{'0' * 64}")) == "not_found"
    balance = call("balance", address="0X" + RICH[2:])["result"]
    assert (balance["address"], balance["balance"]) == (RICH, 1000)
    assert call("balance", address=ZERO)["result"]["balance"] == 0
    health = call("health")["result"]
    assert (health["status"], health["policy_id"]) == ("healthy", policy["policy_id"])
    assert health["tick"] > FIRST_TICK
    assert code(call("transaction", txid="a" * 60)) == "not_found"


def test_an_outage_raises(aws: Cloud, call: Call) -> None:
    chain = MockChain(genesis=genesis(), table="ChainTable", clock=aws.clock, tick_milliseconds=1000)
    chain.set_faults(Faults(fail_requests=1))
    with pytest.raises(Exception, match="answer"):
        call("balance", address=RICH)
    assert call("balance", address=RICH)["ok"]
    boto3.client("dynamodb").delete_table(TableName="LedgerTable")
    with pytest.raises(ClientError):
        call("verify", hash=HASH)


def test_a_network_that_is_none_is_a_mistake_in_the_settings(aws: Cloud) -> None:

    aws.parameters["QubicNetwork"] = "testnet"
    with pytest.raises(RuntimeError, match="testnet"):
        aws.invoke("LedgerFunction", {"operation": "health"})


def test_the_policy_is_not_in_force_before_the_ledger_has_it() -> None:
    with cloud(state_machine=False, policy=False) as it:
        with pytest.raises(Exception, match="not on the ledger yet"):
            it.invoke("LedgerFunction", {"operation": "policy"})
        it.settle()
        assert it.invoke("LedgerFunction", {"operation": "policy"})["result"]["version"] == 1
