"""The anchor on moto: a pending anchor never changes, one is in flight at a time, and only the ledger confirms it."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from audit.anchor import Anchorer
from audit.anchors import Anchor
from audit.fsck import fsck
from audit.log import CorruptLogError
from qaes.adapters import clients
from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.anchor import FIRST, decode, log_id_bytes
from qaes.domain.errors import PermanentError, QaesError, TransientError
from qaes.domain.note import parse_checkpoint, verify_note
from qaes.domain.qubic import transaction as qubic
from tests.handlers.test_audit_recorder import task_with
from tests.support import template
from tests.support.cloud import PARAMETERS, Cloud, cloud
from tests.support.cloud import _environment as function_environment
from tests.support.ledger import SUBSEED, Ledger
from tests.support.trail import LOG_ID, ORIGIN, anchor, deliver, entry_items, log, new_recorder, store


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        clients.client("dynamodb")
        clients.lambda_client()
        yield it


@pytest.fixture
def ledger(aws: Cloud) -> Ledger:
    return Ledger(confirms_at_once=False).install(aws)


def grow(aws: Cloud, events: int = 2) -> int:
    task_id = task_with(events)
    new_recorder().drain(task_id)
    assert deliver(aws, entry_items(task_id)) == []
    return log().head().size


def confirmed() -> list[Anchor]:
    return list(log().anchors.all())


def test_empty_log_is_not_anchored(aws: Cloud, ledger: Ledger) -> None:
    assert anchor(aws) == {"sequence": None, "size": 0, "state": "none"}
    assert ledger.submitted == {}


def test_grown_log_is_anchored_and_confirmed(aws: Cloud, ledger: Ledger) -> None:
    grow(aws, 3)
    assert anchor(aws) == {"sequence": 0, "size": 3, "state": "pending"}
    assert anchor(aws) == {"sequence": 0, "size": 3, "state": "pending"}
    assert confirmed() == []
    ledger.confirm()
    assert anchor(aws) == {"sequence": 0, "size": 3, "state": "confirmed"}
    [one] = confirmed()
    head, transaction = log().head(), ledger.submitted[LOG_ID, 0]
    payload = decode(one.payload)
    assert (payload.log_id, payload.size, payload.root) == (log_id_bytes(LOG_ID), 3, head.root)
    assert (payload.previous, payload.sequence) == (FIRST, 0)
    assert (one.sequence, one.size, one.root, one.previous) == (0, 3, head.root, FIRST)
    assert (one.txid, one.tick, one.network) == (transaction.id, transaction.tick, "mock")
    assert one.encoded == transaction.encode()
    assert log().anchors.newest() == one


def test_checkpoint_is_signed_by_a_key_that_readers_can_pin(aws: Cloud, ledger: Ledger) -> None:
    grow(aws, 3)
    ledger.confirms_at_once = True
    anchor(aws)
    [one] = confirmed()
    said = parse_checkpoint(verify_note(one.note, one.verifier_key))
    assert (said.origin, said.size, said.root) == (ORIGIN, 3, one.root)
    assert one.verifier_key.startswith(f"{ORIGIN}+")
    secret = boto3.client("secretsmanager").get_secret_value(SecretId="LogSigningKey")["SecretString"]
    assert secret not in str(one)


def test_one_anchor_in_flight_and_next_covers_rest(aws: Cloud, ledger: Ledger) -> None:
    grow(aws, 2)
    anchor(aws)
    grow(aws, 2)
    grow(aws, 3)
    assert anchor(aws) == {"sequence": 0, "size": 2, "state": "pending"}
    assert list(ledger.submitted) == [(LOG_ID, 0)]
    ledger.confirm()
    assert anchor(aws) == {"sequence": 1, "size": 7, "state": "pending"}
    ledger.confirm()
    assert anchor(aws)["state"] == "confirmed"
    first, second = (decode(each.payload) for each in confirmed())
    assert (second.previous, second.sequence, second.size) == (first.digest, 1, 7)


def test_log_that_has_not_grown_is_not_anchored_again(aws: Cloud, ledger: Ledger) -> None:
    ledger.confirms_at_once = True
    grow(aws)
    for _ in range(3):
        assert anchor(aws) == {"sequence": 0, "size": 2, "state": "confirmed"}
    assert len(ledger.submitted) == 1


def test_unintegrated_entries_are_not_anchored(aws: Cloud, ledger: Ledger) -> None:
    grow(aws, 2)
    boto3.client("dynamodb").update_item(
        TableName="AuditLogTable",
        Key={"pk": {"S": "LOG"}, "sk": {"S": "HEAD"}},
        UpdateExpression="SET #size = :size, root = :root",
        ExpressionAttributeNames={"#size": "size"},
        ExpressionAttributeValues={":size": {"N": "9"}, ":root": {"B": b"x" * 32}},
    )
    assert anchor(aws) == {"sequence": 0, "size": 2, "state": "pending"}


def test_first_anchor_for_an_index_is_found(aws: Cloud, ledger: Ledger) -> None:
    ledger.confirms_at_once = True
    for size in (2, 5, 6):
        grow(aws, size - log().head().size)
        anchor(aws)
    found = [log().anchors.of(index) for index in range(7)]
    assert [each.size if each else None for each in found] == [2, 2, 5, 5, 5, 6, None]


# Failures


def stopped(aws: Cloud) -> str:
    """Call the anchor, which must raise; return the code of its error."""
    with pytest.raises(PermanentError) as caught:
        anchor(aws)
    return caught.value.code


def test_log_is_anchored_on_one_network_only(aws: Cloud, ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    grow(aws)
    anchor(aws)
    aws.parameters["QubicNetwork"] = "mainnet"
    asked = aws.invocations["LedgerAnchorFunction"]
    assert stopped(aws) == "another_network", "while it is in flight"
    aws.parameters.clear()
    ledger.confirm()
    anchor(aws)
    grow(aws)
    aws.parameters["QubicNetwork"] = "mainnet"
    capsys.readouterr()
    assert stopped(aws) == "another_network", "and after that"
    assert '"AnchorStopped":[1.0]' in capsys.readouterr().out
    assert aws.invocations["LedgerAnchorFunction"] == asked + 1, "the other network receives no call"
    aws.parameters.clear()
    assert anchor(aws)["sequence"] == 1


def test_ledger_of_another_network_is_not_believed(aws: Cloud, ledger: Ledger) -> None:
    ledger.confirms_at_once = True
    ledger.network = "mainnet"
    grow(aws)
    with pytest.raises(CorruptLogError, match="mainnet"):
        anchor(aws)
    assert confirmed() == []


def test_anchor_reports_abandoned_submission(aws: Cloud, ledger: Ledger) -> None:
    grow(aws)
    anchor(aws)
    ledger.falsify = {"state": "failed", "error": "no_key: this service does not hold the key"}
    assert stopped(aws) == "given_up"
    ledger.falsify = {}
    ledger.confirm()
    assert anchor(aws)["state"] == "confirmed"


def test_new_key_takes_over_the_anchor_that_the_former_left(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real ledger: the former key's transaction missed its tick, and the key no longer exists."""
    from qubic import wallets
    from qubic.network import chain
    from qubic.network.faults import Faults

    grow(aws)
    with function_environment(template.environment("LedgerFunction", PARAMETERS)):
        chain().set_faults(Faults(drop=1))
    assert anchor(aws)["state"] == "pending"
    pending = log().anchors.anchoring()
    with function_environment(template.environment("LedgerFunction", PARAMETERS)):
        former = wallets.service_key()
        successor = wallets.demo_key("0x1234567890abcdef")
    for module in ("qubic.transactions.submissions", "qubic.wallets"):
        monkeypatch.setattr(f"{module}.service_key", lambda: successor)
    aws.settle()  # the event of its failure has the anchor submitted again: the same, signed by the successor
    assert anchor(aws)["state"] == "confirmed"
    [one] = confirmed()
    assert (one.source, former.identity != successor.identity) == (successor.identity, True)
    assert pending is not None and pending.payload == one.payload
    assert fsck(store(), log(), LedgerClient("LedgerFunction"), log_id=LOG_ID).findings == []


def set_back(tables: dict[str, list[dict[str, Any]]]) -> None:
    client = boto3.client("dynamodb")
    for table, kept in tables.items():
        for item in client.scan(TableName=table)["Items"]:
            client.delete_item(TableName=table, Key={name: item[name] for name in ("pk", "sk")})
        for item in kept:
            client.put_item(TableName=table, Item=item)


@pytest.mark.parametrize(
    ("tables", "code"), [(("AuditLogTable", "AuditAnchorsTable"), "key_conflict"), (("AuditLogTable",), "corrupt")]
)
def test_log_that_was_set_back_is_not_anchored(aws: Cloud, ledger: Ledger, tables: tuple[str, ...], code: str) -> None:
    ledger.confirms_at_once = True
    grow(aws)
    anchor(aws)
    kept = {table: boto3.client("dynamodb").scan(TableName=table)["Items"] for table in tables}
    grow(aws, 2)
    anchor(aws)
    anchored = confirmed()
    set_back(kept)
    grow(aws, 7)  # the places that were forgotten are given to others
    if code == "corrupt":
        with pytest.raises(CorruptLogError, match="anchored root at size 4"):
            anchor(aws)
    else:
        assert stopped(aws) == code
    assert confirmed() == anchored[: len(anchored) if code == "corrupt" else 1]


def test_anchor_stays_same_when_ledger_is_down(aws: Cloud, ledger: Ledger) -> None:
    grow(aws)

    def down(event: Any) -> None:
        raise RuntimeError("down")

    aws.faults["LedgerAnchorFunction"] = down
    with pytest.raises(TransientError):
        anchor(aws)
    pending = log().anchors.anchoring()
    assert pending is not None and pending.state == "pending"
    aws.faults.clear()
    grow(aws)
    ledger.confirms_at_once = True
    anchor(aws)
    assert [each.size for each in confirmed()] == [2, 4]
    assert confirmed()[0].payload == pending.payload


def test_another_payload_under_this_logs_id_stops_everything(aws: Cloud, ledger: Ledger) -> None:
    grow(aws)
    anchor(aws)
    other = dataclasses.replace(ledger.submitted[LOG_ID, 0], payload=b"another", signature=b"")
    ledger.submitted[LOG_ID, 0] = other.sign(SUBSEED)
    ledger.confirm()
    assert stopped(aws) == "key_conflict"
    assert confirmed() == []


def forged(ledger: Ledger, **changes: Any) -> dict[str, Any]:
    """An answer with a transaction that differs from the one that was stored, and is signed as it is."""
    found = dataclasses.replace(ledger.submitted[LOG_ID, 0], signature=b"", **changes).sign(SUBSEED)
    return {"encoded": base64.b64encode(found.encode()).decode(), "txid": found.id, "tick": found.tick}


@pytest.mark.parametrize(
    "changes", [{"payload": b"QAES"}, {"input_type": 1}, {"amount": 1}, {"destination": bytes(32)}],
    ids=["payload", "input type", "amount", "destination"],
)  # fmt: skip
def test_transaction_with_something_else_in_it_is_not_believed(
    aws: Cloud, ledger: Ledger, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    grow(aws)
    anchor(aws)
    ledger.confirm()
    ledger.falsify = forged(ledger, **changes)
    with pytest.raises(CorruptLogError, match=request.node.callspec.id):
        anchor(aws)
    assert confirmed() == []
    ledger.falsify = {}
    assert anchor(aws)["state"] == "confirmed"


def test_answer_has_to_agree_with_the_bytes(aws: Cloud, ledger: Ledger) -> None:
    grow(aws)
    anchor(aws)
    ledger.confirm()
    signed = ledger.submitted[LOG_ID, 0]
    bad_signature = dataclasses.replace(signed, signature=bytes(64))
    for name, falsified in {
        "source": {"source": "A" * 60},
        "tick": {"tick": 1},
        "txid": {"txid": "a" * 60},
        "signature": {"encoded": base64.b64encode(bad_signature.encode()).decode(), "txid": bad_signature.id},
        "cannot be read": {"encoded": "AAAA"},
    }.items():
        ledger.falsify = falsified
        with pytest.raises(CorruptLogError, match=name):
            anchor(aws)
    assert confirmed() == []


def test_calls_at_the_same_time_seal_and_confirm_once(aws: Cloud, ledger: Ledger) -> None:
    """Each of two reads before the other writes: the second finds the first one's anchor, and takes it on."""
    ledger.confirms_at_once = True
    grow(aws)
    slow = Anchorer(log(), LedgerClient("LedgerAnchorFunction"), log_id=LOG_ID, origin=ORIGIN, network="mock")
    before = slow._log.anchors.anchoring()
    grown = log().head()
    anchor(aws)
    grow(aws)
    assert (before, grown.size) == (None, 2)
    taken = slow._begin_next(before)
    assert taken is not None and (taken.sequence, taken.size, taken.state) == (0, 2, "confirmed")
    first = log().anchors.anchoring()
    assert first is not None
    assert slow._log.anchors.confirm(dataclasses.replace(first, state="pending"), confirmed()[0]) is False
    seventh, sixth = (dataclasses.replace(first, sequence=sequence) for sequence in (7, 6))
    assert slow._log.anchors.begin(seventh, after=sixth) is False
    assert [each.sequence for each in confirmed()] == [0]


def test_anchor_is_never_replaced(aws: Cloud, ledger: Ledger) -> None:
    ledger.confirms_at_once = True
    grow(aws)
    anchor(aws)
    grow(aws)
    ledger.confirms_at_once = False
    anchor(aws)
    pending = log().anchors.anchoring()
    assert pending is not None and pending.sequence == 1
    assert log().anchors.confirm(pending, confirmed()[0]) is False  # its size is anchored
    assert len(confirmed()) == 1


def test_without_its_key_nothing_is_confirmed(aws: Cloud, ledger: Ledger) -> None:
    ledger.confirms_at_once = True
    grow(aws)
    boto3.client("secretsmanager").delete_secret(SecretId="LogSigningKey", ForceDeleteWithoutRecovery=True)
    with pytest.raises(Exception, match="ResourceNotFound"):
        anchor(aws)
    assert confirmed() == []


def test_transaction_is_the_one_that_a_verifier_reads(aws: Cloud, ledger: Ledger) -> None:
    ledger.confirms_at_once = True
    grow(aws)
    anchor(aws)
    [one] = confirmed()
    found = qubic.decode(one.encoded)
    assert found.is_signed_by_source()
    assert decode(found.payload).size == 2
    with pytest.raises(QaesError):
        decode(found.payload + b"x")
