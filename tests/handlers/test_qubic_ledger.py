"""The ledger's function on moto: the operations for other services, and refusals as values."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.settings import SettingsError
from qaes.domain.errors import PermanentError
from qaes.domain.policy import DEFAULT_RULES
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.transaction import decode
from qubic import operations, wallets, wiring
from qubic.network.faults import Faults
from qubic.network.mock import FIRST_TICK, MockChain
from qubic.operations import _OPERATIONS
from qubic.wallets import DEMO_BALANCES, genesis
from tests.support.cloud import PARAMETERS, Cloud, Context, cloud
from tests.support.cloud import _environment as function_environment
from tests.support.template import environment

RICH, POOR, EMPTY = DEMO_BALANCES
ZERO = encode_identity(bytes(32))
CONTRACT = encode_identity(b"\4" + bytes(31))
NOBODY = encode_identity(bytes([7]) * 32)
"""An identity that is no contract's, and whose key is nowhere."""
HASH = "ab" * 32
LEDGER_FUNCTIONS = ("LedgerFunction", "LedgerTransferFunction", "LedgerAnchorFunction", "LedgerRecordFunction")
Call = Callable[..., dict[str, Any]]


def function_for(operation: Any) -> str:
    changing = {"transfer": "LedgerTransferFunction"}
    changing |= {"record_instruction": "LedgerTransferFunction", "submit_anchor": "LedgerAnchorFunction"}
    changing |= {"write": "LedgerRecordFunction", "settle_policy": "LedgerRecordFunction"}
    return changing.get(operation, "LedgerFunction") if isinstance(operation, str) else "LedgerFunction"


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def call(aws: Cloud) -> Call:
    def send(operation: Any, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = aws.invoke(function_for(operation), {"operation": operation, **arguments})
        return answer

    return send


@pytest.fixture
def transfer(call: Call) -> Call:
    def send(**changes: Any) -> dict[str, Any]:
        terms = {
            "reference": "task#step_3", "source": RICH, "destination": EMPTY, "amount": 10, "run": 1,
        }  # fmt: skip
        return call("transfer", **terms | changes)

    return send


def code(answer: dict[str, Any]) -> str:
    assert answer["ok"] is False, answer
    assert answer["error"]["message"]
    return str(answer["error"]["code"])


def test_transfer_is_in_flight_and_then_confirmed(aws: Cloud, call: Call, transfer: Call) -> None:
    in_flight = transfer()["result"]
    assert in_flight["state"] == "signed"
    assert in_flight["encoded"] == ""  # not sent yet: who had the bytes could send them
    assert call("balance", address=RICH)["result"]["balance"] == DEMO_BALANCES[RICH]
    assert call("transfer_state", reference="task#step_3")["result"]["state"] == "broadcast"
    aws.settle()
    done = call("transfer_state", reference="task#step_3")["result"]
    assert (done["state"], done["txid"], done["error"]) == ("confirmed", in_flight["txid"], None)
    assert decode(base64.b64decode(done["encoded"])).id == done["txid"]
    assert transfer()["result"] == done | {"network": "mock"}
    assert call("balance", address=RICH)["result"]["balance"] == DEMO_BALANCES[RICH] - 10
    assert call("balance", address=EMPTY)["result"]["balance"] == 10


def test_unknown_transfer_has_no_state(call: Call) -> None:
    assert code(call("transfer_state", reference="task#step_9")) == "not_found"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"amount": 0}, "invalid_amount"),
    ({"amount": 1.5}, "invalid_amount"),
    ({"amount": True}, "invalid_amount"),
    ({"amount": "10"}, "invalid_amount"),
    ({"source": "0x12"}, "invalid_address"),
    ({"destination": ZERO[:-1] + "Z"}, "invalid_address"),
    ({"destination": RICH}, "invalid_address"),
    ({"source": NOBODY}, "no_key"),
    ({"source": ZERO}, "invalid_address"),
    ({"source": CONTRACT}, "invalid_address"),
]
"""Terms that no transfer may have on any day."""
BY_RULE: list[tuple[dict[str, Any], str]] = [
    ({"destination": ZERO}, "invalid_address"),
    ({"destination": CONTRACT}, "invalid_address"),
    ({"destination": "0x" + "0" * 16}, "invalid_address"),
]
"""Terms that the policy's rule does not allow."""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        *REFUSED,
        ({"run": "1"}, "invalid_input"),
        ({"reference": ""}, "invalid_input"),
        ({"reference": 7}, "invalid_input"),
        ({"reference": "x" * 3000}, "invalid_input"),
    ],
)
def test_refused_transfer_writes_nothing(
    call: Call, transfer: Call, limited: None, changes: dict[str, Any], expected: str
) -> None:
    assert code(transfer(**changes)) == expected
    assert code(call("transfer_state", reference="task#step_3")) == "not_found"
    assert spent() == 0


@pytest.mark.parametrize(("changes", "expected"), BY_RULE)
def test_transfer_that_the_rule_refuses_has_failed(
    call: Call, transfer: Call, changes: dict[str, Any], expected: str
) -> None:
    assert code(transfer(**changes)) == expected
    state = call("transfer_state", reference="task#step_3")["result"]
    assert (state["state"], state["txid"]) == ("failed", "")
    assert state["error"].startswith(f"{expected}: destination is the ")
    assert spent() == 0


@pytest.mark.parametrize("changes", [{"amount": 1001}, {"source": EMPTY, "destination": RICH}])
def test_unpayable_transfer_has_failed(call: Call, transfer: Call, changes: dict[str, Any]) -> None:
    assert code(transfer(**changes)) == "insufficient_balance"
    for answer in (transfer(**changes), call("transfer_state", reference="task#step_3")):
        state = answer["result"]
        assert (state["state"], state["txid"], state["encoded"]) == ("failed", "", "")
        assert state["error"] == "insufficient_balance: the source's balance is too small"
    assert spent() == 0


def spent() -> int:
    """Return the usage of all windows."""
    found = boto3.client("dynamodb").scan(TableName="LedgerTable")["Items"]
    windows = [item["buckets"]["M"] for item in found if item["sk"]["S"] == "LIMIT"]
    return sum(int(total["N"]) for buckets in windows for total in buckets.values())


@pytest.mark.parametrize(("changes", "expected"), [*REFUSED, *BY_RULE])
def test_check_transfer_refuses_as_transfer_does(call: Call, changes: dict[str, Any], expected: str) -> None:
    terms = {"source": RICH, "destination": EMPTY, "amount": 10}
    assert code(call("check_transfer", **terms | changes)) == expected
    assert call("check_transfer", **terms)["ok"]


def test_check_transfer_returns_balance_and_todays_refusal(call: Call, limited: None) -> None:
    terms = {"source": RICH, "destination": EMPTY, "amount": 600}
    free = call("check_transfer", **terms)["result"]
    assert (free["source"]["balance"], free["source"]["available"], free["refusal_today"]) == (1000, 1000, None)
    call("transfer", reference="task#step_3", run=1, **terms)
    full = call("check_transfer", **terms)["result"]
    assert (full["source"]["balance"], full["source"]["available"]) == (1000, 400)
    assert full["refusal_today"].startswith("daily_limit_exceeded: over daily_limit: policy policy-v2-")
    assert full["refusal_today"].endswith("lets a wallet send at most 1000 QU in 24 hours, and 600 QU are used")
    assert code(call("check_transfer", **terms | {"amount": 1001})) == "daily_limit_exceeded"  # on any day
    assert spent() == 600


def test_policy_answers_the_balance_of_an_address(call: Call) -> None:
    answer = call("policy", address=RICH)["result"]
    assert answer | {"balance": None} == call("policy")["result"] | {"balance": None}
    assert answer["balance"] == {"ok": True, "result": _without_network(call("balance", address=RICH))}
    assert code(call("policy", address="0x12")["result"]["balance"]) == "invalid_address"


@pytest.mark.parametrize(("changes", "expected"), [({}, ""), *REFUSED, ({"run": 1}, "invalid_input")])
def test_policy_answers_the_check_of_a_transfer(call: Call, changes: dict[str, Any], expected: str) -> None:
    terms = {"source": RICH, "destination": EMPTY, "amount": 10} | changes
    answer = call("policy", transfer=terms)["result"]
    assert answer["policy_id"] == call("policy")["result"]["policy_id"]
    if expected:
        assert code(answer["transfer"]) == expected
    else:
        assert answer["transfer"]["result"] == _without_network(call("check_transfer", **terms))


def test_ledger_client_returns_the_policy_and_a_refusal(aws: Cloud) -> None:
    with function_environment(environment("AwaitApprovalFunction", PARAMETERS)):
        client = LedgerClient()
        policies, balance = client.policy_and_balance(RICH)
        assert (policies.current, balance) == (client.policy(), client.wallet_balance(RICH))
        assert isinstance(client.policy_and_balance("0x12")[1], PermanentError)
        allowed = client.policy_and_check(source=RICH, destination=EMPTY, amount=10)
        assert allowed == (policies, client.check_transfer(source=RICH, destination=EMPTY, amount=10))
        checked, refusal = client.policy_and_check(source=RICH, destination=EMPTY, amount=0)
    assert checked == policies
    assert isinstance(refusal, PermanentError)
    assert refusal.code == "invalid_amount"


def _without_network(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer["result"].items() if name != "network"}


@pytest.mark.parametrize("network", ["mock", "mainnet"])
def test_check_parties_reads_no_seed(aws: Cloud, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> Any:
        raise AssertionError("the seed was read")

    own = encode_identity(bytes([9]) * 32)
    monkeypatch.setattr(wallets, "service_key", unreadable)
    monkeypatch.setattr(wallets, "service_identity", lambda: own)
    held = wallets.Wallets(network)
    assert held.check_parties(own, NOBODY) == NOBODY
    with pytest.raises(PermanentError, match="does not hold the key"):
        held.check_parties(NOBODY, own)


@pytest.fixture
def limited(aws: Cloud) -> None:
    """A policy with a daily limit is in force."""
    rule = DEFAULT_RULES["transfer_funds"].model_copy(update={"daily_limit": 1000})
    with function_environment(environment("LedgerFunction", PARAMETERS)):
        store = wiring.policies()
        store.propose(DEFAULT_RULES | {"transfer_funds": rule}, subject="olivia")
        store.approve(2, subject="oscar", four_eyes=True)
    aws.settle()


def test_another_transfer_under_the_same_reference_is_refused(transfer: Call) -> None:
    transfer()
    assert code(transfer(amount=11)) == "reference_conflict"


def test_transfer_only_simulated_when_not_enabled(aws: Cloud, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    class Real(MockChain):
        network = "mainnet"

    real = Real(genesis=genesis(), table="ChainTable", clock=aws.clock, tick_milliseconds=1000)
    monkeypatch.setattr("qubic.wiring.chain", lambda: real)
    service = wallets.service_identity()
    terms = {
        "reference": "task#step_3", "source": service, "destination": NOBODY, "amount": 1, "run": 1,
    }  # fmt: skip
    for operation, sent in (("transfer", terms), ("policy", {})):  # nothing is shown before a policy allows it
        with pytest.raises(Exception, match="not confirmed on the ledger yet"):
            call(operation, **sent)
    aws.settle()
    shown = call("transfer", **terms)["result"]
    assert (shown["state"], shown["network"]) == ("simulated", "mainnet")
    assert (len(shown["txid"]), shown["encoded"]) == (60, "")
    check = {name: terms[name] for name in ("source", "destination", "amount")}
    assert call("check_transfer", **check)["result"]["refusal_today"] is None
    assert spent() == 0
    assert code(call("transfer_state", reference="task#step_3")) == "not_found"
    assert code(call("transfer", **terms | {"source": RICH})) == "invalid_address"
    assert code(call("transfer", **terms | {"source": NOBODY, "destination": service})) == "no_key"
    assert code(call("transfer", **terms | {"destination": CONTRACT})) == "invalid_address"
    aws.clock.pass_seconds(60)
    assert real.balance(NOBODY).balance == 0


def test_hash_is_verified_when_it_is_confirmed_and_not_before(aws: Cloud, call: Call) -> None:
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
def test_malformed_hash_is_not_written(call: Call, arguments: dict[str, Any]) -> None:
    assert code(call("write", **arguments)) == "invalid_input"
    assert call("verify", hash=HASH)["result"]["state"] is None


def test_anchor_is_submitted_once_and_returned_with_bytes(aws: Cloud, call: Call) -> None:
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
def test_malformed_anchor_is_refused(call: Call, changes: dict[str, Any]) -> None:
    sent = {"log_id": "qaes", "sequence": 0, "payload": "51414553"} | changes
    assert code(call("submit_anchor", **sent)) == "invalid_input"


# The dispatch


@pytest.mark.parametrize("operation", [None, "", "mint", 7, ["policy"]])
def test_unknown_operation_is_refused(call: Call, operation: Any) -> None:
    assert code(call(operation)) == "unknown_operation"


@pytest.mark.parametrize("function", LEDGER_FUNCTIONS)
def test_function_runs_only_its_own_operations(aws: Cloud, function: str) -> None:
    own = set()
    for operation in _OPERATIONS:
        with suppress(Exception):  # operations without arguments may do their work; the others name their arguments
            answer = aws.invoke(function, {"operation": operation, "nothing": "takes this"})
            if code(answer) != "unknown_operation":
                own.add(operation)
    assert own == {operation for operation in _OPERATIONS if function_for(operation) == function}


def test_function_without_operations_refuses_all(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment("LedgerFunction", PARAMETERS).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LEDGER_OPERATIONS", "")
    with pytest.raises(SettingsError, match="LEDGER_OPERATIONS"):
        operations.handler({"operation": "health"}, Context())
    monkeypatch.setenv("LEDGER_OPERATIONS", "health_check")
    assert code(operations.handler({"operation": "health"}, Context())) == "unknown_operation"


@pytest.mark.parametrize(
    ("asked", "missing"),
    [
        (lambda client: client.policy(), "LEDGER_FUNCTION"),
        (lambda client: client.write(HASH, {}, written_by="olivia"), "LEDGER_RECORD_FUNCTION"),
        (lambda client: client.record_instruction(HASH, reference="x", requester="rita"), "LEDGER_TRANSFER_FUNCTION"),
        (lambda client: client.submit_anchor(log_id="qaes", sequence=0, payload="00"), "LEDGER_ANCHOR_FUNCTION"),
    ],
)
def test_caller_without_function_name_gets_settings_error(
    aws: Cloud, monkeypatch: pytest.MonkeyPatch, asked: Callable[[LedgerClient], Any], missing: str
) -> None:
    for name, function in (
        ("LEDGER_FUNCTION", "LedgerFunction"),
        ("LEDGER_TRANSFER_FUNCTION", "LedgerTransferFunction"),
        ("LEDGER_ANCHOR_FUNCTION", "LedgerAnchorFunction"),
        ("LEDGER_RECORD_FUNCTION", "LedgerRecordFunction"),
    ):
        monkeypatch.setenv(name, function)
    asked(LedgerClient())
    monkeypatch.setenv(missing, "")
    with pytest.raises(SettingsError, match=missing):
        asked(LedgerClient())


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


def test_outage_raises(aws: Cloud, call: Call) -> None:
    chain = MockChain(genesis=genesis(), table="ChainTable", clock=aws.clock, tick_milliseconds=1000)
    chain.set_faults(Faults(fail_requests=1))
    with pytest.raises(Exception, match="respond"):
        call("balance", address=RICH)
    assert call("balance", address=RICH)["ok"]
    boto3.client("dynamodb").delete_table(TableName="LedgerTable")
    with pytest.raises(ClientError):
        call("verify", hash=HASH)


def test_unknown_network_is_a_settings_error(aws: Cloud) -> None:

    aws.parameters["QubicNetwork"] = "testnet"
    with pytest.raises(RuntimeError, match="testnet"):
        aws.invoke("LedgerFunction", {"operation": "health"})


def test_policy_is_not_in_force_before_the_ledger_has_it() -> None:
    with cloud(state_machine=False, policy=False) as it:
        with pytest.raises(Exception, match="not confirmed on the ledger yet"):
            it.invoke("LedgerFunction", {"operation": "policy"})
        it.settle()
        assert it.invoke("LedgerFunction", {"operation": "policy"})["result"]["version"] == 1
