"""The transaction worker tracks signed transactions, and continues after any crash of a process."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError, EndpointConnectionError

from qaes.domain.errors import LimitError, TransientError
from qubic import wallets
from qubic.network.faults import Faults
from qubic.network.mock import MockChain
from qubic.transactions import queue
from qubic.transactions.queue import MAX_DELAY_SECONDS
from qubic.transactions.signing import LEAD_TICKS
from qubic.transactions.submissions import Submissions
from qubic.worker import STUCK_METRIC
from tests.support.cloud import SEED, Cloud, cloud
from tests.support.crashes import crash_at, sampled_numbers

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"
TRANSFER = {
    "operation": "transfer", "reference": "task#step_1", "source": SOURCE, "run": 1,
    "destination": DESTINATION, "amount": 1,
}  # fmt: skip


def digest(number: int) -> str:
    return f"{number:064x}"


# A process that dies


AT_ONCE = 12
"""Calls tried on one fresh AWS: moto copies its tables for each transaction, and is slow when they are large."""


def test_wherever_the_process_dies_a_hash_is_written_once():
    calls = _each_call(_hash_is_written_once)
    assert calls > 20


def _hash_is_written_once(it: Cloud, number: int) -> bool:
    write = {"operation": "write", "hash": digest(number), "metadata": {}}
    with crash_at(number, "after") as crash:
        it.invoke("LedgerRecordFunction", write)
        _follow(it)
    it.invoke("LedgerRecordFunction", write)  # the caller repeats the request
    it.settle()
    state = it.invoke("LedgerFunction", {"operation": "verify", "hash": digest(number)})["result"]
    assert state["verified"], (number, crash.calls[-1])
    assert _on_chain(it, bytes.fromhex(digest(number))) == [state["txid"]], (number, crash.calls[-1])
    return crash.happened


def test_transfer_moves_at_most_once_when_any_call_fails():
    calls = _each_call(_transfer_moves_once_or_not_at_all)
    assert calls > 20


def _transfer_moves_once_or_not_at_all(it: Cloud, number: int) -> bool:
    terms = TRANSFER | {"reference": f"task_{number}#step_3"}
    before = _balance(it, SOURCE)
    with crash_at(number, "after", EndpointConnectionError(endpoint_url="https://dynamodb")) as crash:
        it.invoke("LedgerTransferFunction", terms)
        _follow(it)
    it.invoke("LedgerTransferFunction", terms)
    it.settle()
    state = it.invoke("LedgerTransferFunction", terms)["result"]["state"]
    assert state in {"confirmed", "expired"}, (number, crash.calls[-1])
    assert before - _balance(it, SOURCE) == (1 if state == "confirmed" else 0), (number, crash.calls[-1])
    ends = {event["detail"]["outcome"] for event in _published(it) if event["detail"]["task_id"] == f"task_{number}"}
    assert ends == {state}, (number, crash.calls[-1])
    return crash.happened


def _each_call(check: Callable[[Cloud, int], bool]) -> int:
    """Check with a failure at each `STRIDE`th call until there is no further call; how many there were."""
    numbers = sampled_numbers()
    for first in range(0, len(numbers), AT_ONCE):
        with cloud(state_machine=False) as it:
            for number in numbers[first : first + AT_ONCE]:
                if not check(it, number):
                    return number - 1
    raise AssertionError("there is no end of calls")


def _follow(it: Cloud) -> None:
    """The writer's next two looks: the message before the tick has passed, and the one after."""
    it.invoke("TransactionWorkerFunction", {})
    it.clock.pass_seconds(LEAD_TICKS + 2)
    it.invoke("TransactionWorkerFunction", {})


def _on_chain(it: Cloud, payload: bytes) -> list[str]:
    chain = MockChain(genesis={}, table="ChainTable", clock=it.clock, tick_milliseconds=1000)
    identity = wallets.key_of_seed(SEED).identity
    found, _ = chain.transactions(identity)
    return [each.txid for each in found if each.transaction.payload == payload]


def _balance(it: Cloud, address: str) -> int:
    return int(it.invoke("LedgerFunction", {"operation": "balance", "address": address})["result"]["balance"])


# Events of ended submissions


def _published(it: Cloud) -> list[dict[str, Any]]:
    return [{"type": entry["DetailType"], "detail": json.loads(entry["Detail"])} for entry in it.published]


def test_end_of_a_transfer_is_published():
    with cloud(state_machine=False) as it:
        txid = it.invoke("LedgerTransferFunction", TRANSFER)["result"]["txid"]
        assert _published(it) == []
        it.settle()
        detail = {"task_id": "task", "step_id": "step_1", "outcome": "confirmed", "txid": txid}
        assert _published(it) == [{"type": "transfer_settled", "detail": detail}]


def test_end_of_an_anchor_is_published_and_of_a_hash_not():
    anchor = {"operation": "submit_anchor", "log_id": "qaes", "sequence": 0, "payload": "51414553"}
    with cloud(state_machine=False) as it:
        txid = it.invoke("LedgerAnchorFunction", anchor)["result"]["txid"]
        it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(1), "metadata": {}})
        it.settle()
        detail = {"log_id": "qaes", "sequence": 0, "outcome": "confirmed", "txid": txid}
        assert _published(it) == [{"type": "anchor_settled", "detail": detail}]


@pytest.mark.parametrize("failure", ["refused", "silent"])
def test_queue_waits_until_its_event_is_taken(monkeypatch, capsys, failure):
    def fails(client: Any, operation: str, arguments: Any) -> Any:
        if operation != "PutEvents":
            return call(client, operation, arguments)
        if failure == "silent":
            raise EndpointConnectionError(endpoint_url="https://events")
        return {"FailedEntryCount": 1, "Entries": [{"ErrorCode": "ThrottlingException"}]}

    with cloud(state_machine=False) as it:
        it.invoke("LedgerTransferFunction", TRANSFER)
        call = BaseClient._make_api_call
        it.clock.pass_seconds(LEAD_TICKS + 2)
        with monkeypatch.context() as patch:
            patch.setattr(BaseClient, "_make_api_call", fails)
            it.invoke("TransactionWorkerFunction", {})
            it.clock.pass_seconds(LEAD_TICKS + 2)
            assert len(it.invoke("TransactionWorkerFunction", {})["open"]) == 1
        assert _published(it) == []
        assert it.invoke("TransactionWorkerFunction", {})["open"] == []
        assert [event["detail"]["outcome"] for event in _published(it)] == ["confirmed"]
        if failure == "silent":
            assert STUCK_METRIC in capsys.readouterr().out


# The writer's queue


def _messages() -> list[dict[str, Any]]:
    url = boto3.client("sqs").get_queue_url(QueueName="TransactionWorkerQueue")["QueueUrl"]
    found = boto3.client("sqs").get_queue_attributes(
        QueueUrl=url, AttributeNames=["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesDelayed"]
    )["Attributes"]
    return [{name: int(value) for name, value in found.items()}]


def _record(key: str, network: str = "mock", looks: int = 1) -> dict[str, Any]:
    body = json.dumps({"key": key, "network": network, "looks": looks})
    return {"messageId": key, "body": body, "eventSource": "aws:sqs"}


def test_submission_is_checked_until_closed():
    with cloud(state_machine=False) as it:
        it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(1), "metadata": {}})
        [before] = _messages()
        event = {"Records": [_record(f"hash:{digest(1)}")]}
        assert it.invoke("TransactionWorkerFunction", event) == {"batchItemFailures": []}
        [after] = _messages()
        assert sum(after.values()) == sum(before.values()) + 1  # its tick has not passed: it comes back
        it.clock.pass_seconds(LEAD_TICKS + 2)
        assert it.invoke("TransactionWorkerFunction", event) == {"batchItemFailures": []}
        assert _messages() == [after]
        assert it.invoke("LedgerFunction", {"operation": "verify", "hash": digest(1)})["result"]["verified"]
        # Delivered twice, of another network, of nothing: no harm, and no further message.
        others = [_record(f"hash:{digest(1)}"), _record(f"hash:{digest(1)}", "mainnet"), _record("hash:none")]
        assert it.invoke("TransactionWorkerFunction", {"Records": others}) == {"batchItemFailures": []}
        assert _messages() == [after]


def test_malformed_message_is_delivered_again():
    with cloud(state_machine=False) as it:
        answer = it.invoke("TransactionWorkerFunction", {"Records": [{"messageId": "m", "body": "not JSON"}]})
        assert answer == {"batchItemFailures": [{"itemIdentifier": "m"}]}


def test_worker_returns_while_the_network_is_silent():
    with cloud(state_machine=False) as it:
        it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(1), "metadata": {}})
        chain = MockChain(genesis={}, table="ChainTable", clock=it.clock, tick_milliseconds=1000)
        chain.set_faults(Faults(fail_requests=1))
        [before] = _messages()
        assert it.invoke("TransactionWorkerFunction", {"Records": [_record(f"hash:{digest(1)}")]}) == {
            "batchItemFailures": []
        }
        assert sum(_messages()[0].values()) == sum(before.values()) + 1


def test_lost_message_is_made_up_for_by_the_schedule():
    with cloud(state_machine=False) as it:
        it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(1), "metadata": {}})
        it.clock.pass_seconds(LEAD_TICKS + 2)
        assert it.invoke("TransactionWorkerFunction", {}) == {"open": []}
        assert it.invoke("LedgerFunction", {"operation": "verify", "hash": digest(1)})["result"]["verified"]


def test_unsendable_and_untrackable_sources_are_separate(monkeypatch):
    with cloud(state_machine=False) as it:
        chain = MockChain(genesis={}, table="ChainTable", clock=it.clock, tick_milliseconds=1000)
        chain.set_faults(Faults(fail_after_accepting=1))
        [before] = _messages()
        it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(1), "metadata": {}})
        assert sum(_messages()[0].values()) == sum(before.values()) + 1
        boto3.client("sqs").delete_queue(
            QueueUrl=boto3.client("sqs").get_queue_url(QueueName="TransactionWorkerQueue")["QueueUrl"]
        )
        it.clock.pass_seconds(LEAD_TICKS + 2)
        it.invoke("TransactionWorkerFunction", {})
        written = it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(2), "metadata": {}})["result"]
        it.clock.pass_seconds(LEAD_TICKS + 2)
        assert _on_chain(it, bytes.fromhex(digest(2))) == [written["txid"]]


def _sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Collect the messages for the queue: `{delay, key, network, seen, looks}`."""
    sent = []
    call = BaseClient._make_api_call

    def watched(client: Any, operation: str, arguments: Any) -> Any:
        if operation == "SendMessage":
            sent.append(json.loads(arguments["MessageBody"]) | {"delay": arguments["DelaySeconds"]})
        return call(client, operation, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", watched)
    return sent


def test_pauses_grow_without_ticks_and_shrink_again(monkeypatch):
    with cloud(state_machine=False) as it:
        sent = _sent(monkeypatch)
        it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(1), "metadata": {}})
        assert [each["delay"] for each in sent] == [LEAD_TICKS + 2]
        chain = MockChain(genesis={}, table="ChainTable", clock=it.clock, tick_milliseconds=1000)
        chain.set_faults(Faults(paused=True))

        def look() -> int:
            message = {name: value for name, value in sent[-1].items() if name != "delay"}
            record = {"messageId": "m", "body": json.dumps(message), "eventSource": "aws:sqs"}
            assert it.invoke("TransactionWorkerFunction", {"Records": [record]}) == {"batchItemFailures": []}
            it.clock.pass_seconds(sent[-1]["delay"])
            return int(sent[-1]["delay"])

        pauses = [look() for _ in range(10)]
        assert pauses == sorted(pauses)
        assert (pauses[0], pauses[-1]) == (LEAD_TICKS + 2, MAX_DELAY_SECONDS)
        chain.set_faults(Faults())
        it.clock.pass_seconds(5)
        assert look() < LEAD_TICKS  # ticks come: there are so many left


def test_look_waits_for_the_rest_of_a_second(monkeypatch):
    slept: list[float] = []

    def at(moment: float) -> None:
        monkeypatch.setattr(queue, "time", SimpleNamespace(time=lambda: moment, sleep=slept.append))

    with cloud(state_machine=False, parameters={"QubicTickMilliseconds": "100"}) as it:
        sent = _sent(monkeypatch)
        at(1_000.0)
        it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(1), "metadata": {}})
        [message] = sent
        assert (message["delay"], message["due"]) == (1, 1_000 + (LEAD_TICKS + 2) / 10)
        for moment in (1_000.0, 1_001.5, 1_001.7, 1_009.0):
            at(moment)
            queue.wait_until_due(message)
        queue.wait_until_due({"key": "without a time"})
        assert slept == [pytest.approx(0.2)]


def test_batch_follows_each_source_once(monkeypatch):
    with cloud(state_machine=False) as it:
        for number in (1, 2, 3):
            it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(number), "metadata": {}})
        advanced = _advanced(monkeypatch)
        sent = _sent(monkeypatch)
        records = [_record(f"hash:{digest(number)}") for number in (1, 2, 3)]
        assert it.invoke("TransactionWorkerFunction", {"Records": records}) == {"batchItemFailures": []}
        assert len(advanced) == 1
        assert [each["key"] for each in sent] == [f"hash:{digest(number)}" for number in (1, 2, 3)]


def _advanced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    advanced = []
    advance = Submissions.advance

    def watched(self: Submissions, identity: str, **arguments: Any) -> None:
        advanced.append(identity)
        advance(self, identity, **arguments)

    monkeypatch.setattr(Submissions, "advance", watched)
    return advanced


def test_messages_without_time_left_are_delivered_again(monkeypatch):
    with cloud(state_machine=False) as it:
        it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(1), "metadata": {}})
        advanced, sent = _advanced(monkeypatch), _sent(monkeypatch)
        monkeypatch.setattr("tests.support.cloud.Context.get_remaining_time_in_millis", lambda self: 5_000)
        record = _record(f"hash:{digest(1)}")
        assert it.invoke("TransactionWorkerFunction", {"Records": [record]}) == {
            "batchItemFailures": [{"itemIdentifier": record["messageId"]}]
        }
        assert it.invoke("TransactionWorkerFunction", {})["open"] == [wallets.key_of_seed(SEED).identity]
        assert (advanced, sent) == ([], [])


def test_one_source_never_blocks_others_or_policy(monkeypatch, capsys):
    with cloud(state_machine=False) as it:
        it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(1), "metadata": {}})
        it.invoke("LedgerTransferFunction", TRANSFER)
        advance, seen, settled = Submissions.advance, [], []

        def throttled(self: Submissions, identity: str, **arguments: Any) -> None:
            seen.append(identity)
            if len(seen) == 1:
                raise ClientError({"Error": {"Code": "ThrottlingException"}}, "TransactWriteItems")
            advance(self, identity, **arguments)

        monkeypatch.setattr(Submissions, "advance", throttled)
        monkeypatch.setattr("qubic.policy.lifecycle.Policies.settle", lambda self: settled.append(1))
        assert it.invoke("TransactionWorkerFunction", {}) == {"open": seen[:1]}
        assert (len(seen), settled) == (2, [1])
        assert f'"{STUCK_METRIC}":[1.0]' in capsys.readouterr().out


def test_policy_error_does_not_block_queue(monkeypatch, caplog):
    with cloud(state_machine=False, policy=False) as it:
        it.invoke("TransactionWorkerFunction", {})  # hands version 1 in
        it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(1), "metadata": {}})

        def broken(self: Any) -> None:
            raise TransientError("version 1 of the policy is missing")

        monkeypatch.setattr("qubic.policy.lifecycle.Policies.settle", broken)
        for _ in range(2):
            it.clock.pass_seconds(LEAD_TICKS + 2)
            with pytest.raises(TransientError):
                it.invoke("TransactionWorkerFunction", {})
        assert it.invoke("LedgerFunction", {"operation": "verify", "hash": digest(1)})["result"]["verified"]
        assert "the policy could not be settled" in caplog.text


def test_limit_on_one_source_does_not_keep_the_others_waiting(monkeypatch):
    with cloud(state_machine=False) as it:
        it.invoke("LedgerRecordFunction", {"operation": "write", "hash": digest(1), "metadata": {}})
        it.invoke("LedgerTransferFunction", TRANSFER)
        it.clock.pass_seconds(LEAD_TICKS + 2)
        advance = Submissions.advance

        def busy(self: Submissions, identity: str, **arguments: Any) -> None:
            advance(self, identity, **arguments)
            raise LimitError("the ledger's queue is full; try again later")

        monkeypatch.setattr(Submissions, "advance", busy)
        assert len(it.invoke("TransactionWorkerFunction", {})["open"]) == 2
        assert it.invoke("LedgerFunction", {"operation": "verify", "hash": digest(1)})["result"]["verified"]
        assert it.invoke("TransactionWorkerFunction", {"Records": [_record(f"hash:{digest(1)}")]}) == {
            "batchItemFailures": []
        }
