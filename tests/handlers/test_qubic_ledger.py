"""The mock ledger on moto: money moves once or not at all, a hash is written once, and refusals are values."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws

from qaes.adapters import clients
from qaes.domain.errors import InvalidInputError, RefusedError, UnavailableError
from qaes.domain.policy import Rule
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.transaction import decode
from qubic import ledger
from qubic.chain import mock
from qubic.chain.base import HashEntry
from qubic.chain.mock import DEMO_BALANCES, FIRST_TICK, GENESIS, MockChain

EVENTS = Path(__file__).parents[2] / "events" / "qubic"
RICH, POOR, EMPTY = DEMO_BALANCES
TABLE = "ledger"
ZERO = encode_identity(bytes(32))
Call = Callable[..., dict[str, Any]]


class Context:
    function_name = "ledger"
    memory_limit_in_mb = 256
    invoked_function_arn = "arn:aws:lambda:us-east-1:123456789012:function:ledger"
    aws_request_id = "test"


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockChain]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "LEDGER_TABLE": TABLE,
        "QUBIC_NETWORK": "mock",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mock.time, "sleep", lambda seconds: None)
    with mock_aws():
        clients.reset()
        boto3.client("dynamodb").create_table(
            TableName=TABLE,
            AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in ("pk", "sk")],
            KeySchema=[
                {"AttributeName": "pk", "KeyType": "HASH"},
                {"AttributeName": "sk", "KeyType": "RANGE"},
            ],
            BillingMode="PAY_PER_REQUEST",
        )
        yield MockChain()
    clients.reset()


@pytest.fixture
def call(chain: MockChain) -> Call:
    def perform(operation: Any, **arguments: Any) -> dict[str, Any]:
        answer = ledger.handler({"operation": operation, **arguments}, Context())
        return dict(json.loads(json.dumps(answer)))  # as the runtime does

    return perform


def items(prefix: str) -> list[dict[str, Any]]:
    found = boto3.client("dynamodb").scan(TableName=TABLE)["Items"]
    return [dict(item) for item in found if item["pk"]["S"].startswith(prefix)]


def balances(chain: MockChain) -> dict[str, int]:
    return {address: chain.balance(address) for address in DEMO_BALANCES}


def transfer(call: Call, reference: str = "r1", amount: Any = 250, **other: Any) -> dict[str, Any]:
    return call(
        "transfer", **({"reference": reference, "source": RICH, "destination": EMPTY, "amount": amount} | other)
    )


# Transfers


def test_a_transfer_debits_credits_and_leaves_a_transaction(chain: MockChain, call: Call) -> None:
    result = transfer(call)["result"]
    assert result["source_balance"] == 750
    assert result["destination_balance"] == 250
    assert result["replayed"] is False
    assert result["network"] == "mock"
    assert balances(chain) == {RICH: 750, POOR: 500, EMPTY: 250}
    record = chain.transaction(result["txid"])
    assert record.metadata == {"reference": "r1", "source": RICH, "destination": EMPTY, "amount": 250}
    found = chain.verify(record.hash)
    assert found is not None
    assert found.txid == result["txid"]


def test_the_same_reference_moves_once_and_answers_the_same(chain: MockChain, call: Call) -> None:
    first, second = transfer(call)["result"], transfer(call)["result"]
    assert second == first | {"replayed": True}
    transfer(call, "r2", 1)
    assert transfer(call)["result"] == second
    assert balances(chain) == {RICH: 749, POOR: 500, EMPTY: 251}


def test_a_replay_does_not_need_the_balance_any_more(call: Call) -> None:
    first = transfer(call, amount=1000)["result"]
    assert transfer(call, amount=1000)["result"] == first | {"replayed": True}


@pytest.mark.parametrize("change", [{"amount": 1}, {"source": POOR}, {"destination": POOR}])
def test_the_same_reference_for_another_transfer_is_a_conflict(
    chain: MockChain, call: Call, change: dict[str, Any]
) -> None:
    transfer(call)
    before = balances(chain)
    assert transfer(call, **change)["error"]["code"] == "reference_conflict"
    assert balances(chain) == before


def test_an_insufficient_balance_moves_nothing(chain: MockChain, call: Call) -> None:
    answer = transfer(call, amount=1001)
    assert answer["ok"] is False
    assert answer["error"]["code"] == "insufficient_balance"
    assert balances(chain) == DEMO_BALANCES
    assert not items("TX#")
    assert not items("REFERENCE#")


def test_a_credit_creates_an_account(chain: MockChain, call: Call) -> None:
    assert transfer(call, destination=ZERO, amount=1000)["result"]["destination_balance"] == 1000
    assert chain.balance(ZERO) == 1000
    assert transfer(call, "back", 400, source=ZERO, destination=RICH)["ok"]
    assert sum(balances(chain).values()) + chain.balance(ZERO) == 1500


@pytest.mark.parametrize("amount", [0, -1, 10**15 + 1, True, 1.5, 1.0, "5", None])
def test_an_amount_that_is_none(call: Call, amount: Any) -> None:
    assert transfer(call, amount=amount)["error"]["code"] == "invalid_amount"


@pytest.mark.parametrize("address", ["A" * 60, "0x12", "", None, RICH.upper().replace("0X", "0y")])
def test_an_address_that_is_none(call: Call, address: Any) -> None:
    assert transfer(call, source=address)["error"]["code"] == "invalid_address"
    assert transfer(call, destination=address)["error"]["code"] == "invalid_address"
    assert call("balance", address=address)["error"]["code"] == "invalid_address"


def test_a_transfer_to_oneself_is_refused_in_any_spelling(call: Call) -> None:
    assert transfer(call, destination="0x" + RICH[2:].upper())["error"]["code"] == "invalid_address"


@pytest.mark.parametrize("reference", ["", "x" * 257, 5, None])
def test_a_reference_that_is_none(call: Call, reference: Any) -> None:
    assert transfer(call, reference=reference)["error"]["code"] == "invalid_input"


@pytest.fixture
def one_at_a_time(chain: MockChain, monkeypatch: pytest.MonkeyPatch) -> None:
    # moto's tables are not safe for threads; DynamoDB's calls are atomic one by one, and so are these.
    lock, original = threading.Lock(), clients.client("dynamodb")._make_api_call

    def locked(*arguments: Any) -> Any:
        with lock:
            return original(*arguments)

    monkeypatch.setattr(clients.client("dynamodb"), "_make_api_call", locked)


@pytest.mark.usefixtures("one_at_a_time")
def test_concurrent_transfers_spend_nothing_twice(chain: MockChain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mock, "_ATTEMPTS", 100)

    def pay(number: int) -> str:
        try:
            chain.transfer(reference=f"r{number}", source=RICH, destination=EMPTY, amount=300)
        except RefusedError as error:
            return error.code
        return "paid"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(pay, range(8)))
    assert sorted(outcomes) == ["insufficient_balance"] * 5 + ["paid"] * 3
    assert balances(chain) == {RICH: 100, POOR: 500, EMPTY: 900}


@pytest.mark.usefixtures("one_at_a_time")
def test_concurrent_calls_with_one_reference_move_once(chain: MockChain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mock, "_ATTEMPTS", 100)

    def pay(number: int) -> mock.Transfer:
        return chain.transfer(reference="r", source=RICH, destination=EMPTY, amount=1000)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(pay, range(8)))
    assert len({each.txid for each in made}) == 1
    assert [each.replayed for each in made].count(False) == 1
    assert balances(chain) == {RICH: 0, POOR: 500, EMPTY: 1000}


@pytest.fixture
def just_before_the_write(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Let a rival act once, between what was read and what is to be written."""

    def arrange(rival: Callable[[], object]) -> None:
        original = MockChain._transact

        def late(self: MockChain, items: Any) -> None:
            monkeypatch.setattr(MockChain, "_transact", original)
            rival()
            original(self, items)

        monkeypatch.setattr(MockChain, "_transact", late)

    return arrange


def test_a_twin_that_was_quicker_is_found_though_the_balances_look_untouched(
    chain: MockChain, just_before_the_write: Callable[[Callable[[], object]], None]
) -> None:
    def rival() -> None:
        chain.transfer(reference="r", source=RICH, destination=EMPTY, amount=10)
        chain.transfer(reference="back", source=EMPTY, destination=RICH, amount=10)

    just_before_the_write(rival)
    assert chain.transfer(reference="r", source=RICH, destination=EMPTY, amount=10).replayed
    assert balances(chain) == DEMO_BALANCES


def test_a_balance_that_was_spent_meanwhile_is_read_again(
    chain: MockChain, just_before_the_write: Callable[[Callable[[], object]], None]
) -> None:
    just_before_the_write(lambda: chain.transfer(reference="other", source=RICH, destination=POOR, amount=900))
    with pytest.raises(RefusedError, match="too small"):
        chain.transfer(reference="r", source=RICH, destination=EMPTY, amount=500)
    assert balances(chain) == {RICH: 100, POOR: 1400, EMPTY: 0}


def test_a_hash_that_was_written_meanwhile_keeps_its_transaction(
    chain: MockChain, just_before_the_write: Callable[[Callable[[], object]], None]
) -> None:
    earlier = MockChain(clock=lambda: GENESIS)
    just_before_the_write(lambda: earlier.write_hashes([HashEntry("ab" * 32, {})]))
    first, second = chain.write_hashes([HashEntry("ab" * 32, {}), HashEntry("cd" * 32, {})])
    assert first.tick == FIRST_TICK
    assert second.tick > FIRST_TICK
    assert len(items("TX#")) == 2


def test_a_policy_that_was_published_meanwhile_is_not_overwritten(
    chain: MockChain, just_before_the_write: Callable[[Callable[[], object]], None]
) -> None:
    rule = Rule(allowed=True, requires_approval=True, risk_level="low")
    chain.policy()
    just_before_the_write(lambda: chain.publish_policy({"rival": rule}))
    assert chain.publish_policy({"ours": rule}).version == 3
    assert len(items("POLICY")) == 4


def test_endless_contention_is_unavailable_and_moves_nothing(chain: MockChain, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: MockChain, items: Any) -> None:
        raise mock._ChangedError

    monkeypatch.setattr(MockChain, "_transact", changed)
    with pytest.raises(UnavailableError):
        chain.transfer(reference="r", source=RICH, destination=EMPTY, amount=1)
    with pytest.raises(UnavailableError):
        chain.write_hashes([HashEntry("ab" * 32, {})])
    monkeypatch.undo()


# Hashes


def test_a_hash_is_written_once(chain: MockChain, call: Call) -> None:
    hashes = [f"{number:064x}" for number in (3, 1, 2, 3)]
    entries = [{"hash": hash_, "metadata": {"n": number}} for number, hash_ in enumerate(hashes)]
    first = call("write_hashes", entries=entries)["result"]["transactions"]
    assert [each["hash"] for each in first] == hashes
    assert first[0] == first[3]
    again = call("write_hashes", entries=[*entries, {"hash": "f" * 64, "metadata": {}}])["result"]["transactions"]
    assert again[:4] == first
    assert len(items("TX#")) == 4
    assert chain.transaction(first[0]["txid"]).metadata == {"n": 0}


def test_the_same_hash_at_another_tick_is_still_the_same_transaction(chain: MockChain) -> None:
    [first] = chain.write_hashes([HashEntry("ab" * 32, {})])
    later = MockChain(clock=lambda: GENESIS + timedelta(days=9999))
    assert later.write_hashes([HashEntry("ab" * 32, {"other": 1})]) == [first]


@pytest.mark.usefixtures("one_at_a_time")
def test_concurrent_writers_of_one_hash_get_one_transaction(chain: MockChain) -> None:
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda _: chain.write_hashes([HashEntry("cd" * 32, {})])[0], range(8)))
    assert len(set(written)) == 1


def test_many_hashes_need_several_transactions(chain: MockChain) -> None:
    entries = [HashEntry(f"{number:064x}", {"n": number}) for number in range(90)]
    receipts = chain.write_hashes(entries)
    assert len({receipt.txid for receipt in receipts}) == 90
    assert chain.write_hashes(entries) == receipts


def test_a_transaction_is_a_signed_qubic_transaction(chain: MockChain) -> None:
    at = GENESIS + timedelta(seconds=77, milliseconds=900)
    [receipt] = MockChain(clock=lambda: at).write_hashes([HashEntry("ab" * 32, {"amount": 0.5})])
    record = chain.transaction(receipt.txid)
    transaction = decode(base64.b64decode(record.encoded))
    assert transaction.is_signed_by_source()
    assert transaction.id == receipt.txid
    assert transaction.payload.hex() == receipt.hash
    assert transaction.tick == receipt.tick == FIRST_TICK + 77
    assert transaction.amount == 0
    assert receipt.timestamp == "2026-01-01T00:01:17.900Z"
    assert record.metadata == {"amount": 0.5}


def test_verify(call: Call) -> None:
    unknown = call("verify", hash="ab" * 32)["result"]
    assert unknown["verified"] is False
    assert unknown["txid"] is None
    [written] = call("write_hashes", entries=[{"hash": "AB" * 32, "metadata": {}}])["result"]["transactions"]
    known = call("verify", hash="ab" * 32)["result"]
    assert known == {
        "network": "mock",
        "hash": "ab" * 32,
        "verified": True,
        "txid": written["txid"],
        "timestamp": written["timestamp"],
        "tick": written["tick"],
    }
    assert call("transaction", txid=written["txid"])["result"]["hash"] == "ab" * 32


@pytest.mark.parametrize(
    "entries",
    [
        None,
        [None],
        [{"hash": "ab" * 32}],
        [{"hash": "ab", "metadata": {}}],
        [{"hash": "zz" * 32, "metadata": {}}],
        [{"hash": "ab" * 32, "metadata": []}],
        [{"hash": "ab" * 32, "metadata": {"x": "y" * 5000}}],
        [{"hash": "ab" * 32, "metadata": {"x": 2**60}}],
        [{"hash": f"{number:064x}", "metadata": {}} for number in range(501)],
    ],
)
def test_entries_that_are_none_write_nothing(call: Call, entries: Any) -> None:
    assert call("write_hashes", entries=entries)["error"]["code"] == "invalid_input"
    assert not items("TX#")


# Policy and the dispatch


def test_the_default_policy(chain: MockChain, call: Call) -> None:
    policy = call("policy")["result"]
    assert policy["policy_id"].startswith("policy-v1-")
    assert policy["version"] == 1
    once = {"approvals": 1, "expires_after": None}
    assert policy["rules"] == {
        "monitoring": {"allowed": True, "requires_approval": False, "risk_level": "low"} | once,
        "transaction": {"allowed": True, "requires_approval": True, "risk_level": "medium"} | once,
        "transfer_funds": {"allowed": True, "requires_approval": True, "risk_level": "high"} | once,
    }
    assert call("policy")["result"] == policy


def test_a_published_policy_is_in_force_and_the_old_one_is_kept(chain: MockChain) -> None:
    first = chain.policy()
    second = chain.publish_policy({"monitoring": Rule(allowed=True, requires_approval=True, risk_level="high")})
    assert second.version == 2
    assert second.policy_id.startswith("policy-v2-")
    assert chain.policy() == second
    assert sorted(item["sk"]["S"] for item in items("POLICY")) == ["CURRENT", "VERSION#000001", "VERSION#000002"]
    assert first.policy_id in items("POLICY")[1]["data"]["S"]


@pytest.mark.parametrize("operation", [None, "", "mint", 7, ["policy"]])
def test_an_unknown_operation_is_refused(call: Call, operation: Any) -> None:
    assert call(operation)["error"]["code"] == "unknown_operation"


@pytest.mark.parametrize("arguments", [{}, {"address": RICH, "more": 1}])
def test_missing_and_further_arguments_are_refused(call: Call, arguments: dict[str, Any]) -> None:
    assert call("balance", **arguments)["error"]["code"] == "invalid_input"


def test_balance_health_and_a_missing_transaction(call: Call) -> None:
    assert call("balance", address="0X" + RICH[2:])["result"] == {"network": "mock", "address": RICH, "balance": 1000}
    assert call("balance", address=ZERO)["result"]["balance"] == 0
    health = call("health")["result"]
    assert health["status"] == "healthy"
    assert health["tick"] > FIRST_TICK
    assert call("transaction", txid="a" * 60)["error"]["code"] == "not_found"


def test_an_outage_raises(call: Call) -> None:
    boto3.client("dynamodb").delete_table(TableName=TABLE)
    with pytest.raises(ClientError):
        call("balance", address=RICH)


def test_only_the_mock_is_known(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUBIC_NETWORK", "mainnet")
    with pytest.raises(RuntimeError, match="mainnet"):
        call("health")


@pytest.mark.parametrize("path", sorted(EVENTS.glob("ledger_*.json")), ids=lambda path: path.stem)
def test_the_example_events(call: Call, path: Path) -> None:
    answer = call(**json.loads(path.read_text()))
    assert answer["ok"], answer
    assert answer["result"]["network"] == "mock"


def test_check_of_an_entry_names_the_field() -> None:
    with pytest.raises(InvalidInputError) as caught:
        HashEntry.checked("ab" * 32, 5, "entries.3.")
    assert caught.value.field == "entries.3.metadata"
