"""Records on the ledger: an operator's hash is never an instruction, and few people read a task's reference."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.settings import SettingsError
from qaes.domain.errors import PermanentError
from qaes.domain.qubic.transaction import decode
from qubic import wallets
from qubic.network.faults import Faults
from qubic.network.mock import MockChain
from qubic.transactions.hashes import hash_state
from qubic.transactions.model import INPUT_TYPES
from qubic.transactions.submissions import Submissions
from qubic.wallets import DEMO_BALANCES, demo_key, genesis
from tests.support.api import Api
from tests.support.cloud import PARAMETERS, Cloud, cloud
from tests.support.cloud import _environment as function_environment
from tests.support.template import environment

HASH = "ab" * 32
REFERENCE = "task_019ab2f0-7c00-7abc-8def-0123456789ab#step_3"
RICH, _, EMPTY = DEMO_BALANCES
Request = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def request_(aws: Cloud) -> Request:
    api = Api(aws, "QubicApiFunction")

    def send(
        method: str, path: str, *, subject: str = "olivia", roles: str = "operator", body: Any = None
    ) -> tuple[int, dict[str, Any]]:
        answer = api(method, path, body, subject=subject, roles=roles)
        return answer.status, answer.body

    return send


@pytest.fixture
def record(aws: Cloud) -> Callable[..., dict[str, Any]]:
    """Record an instruction, as the worker does."""

    def send(hash_: str = HASH, reference: str = REFERENCE, requester: str = "rita") -> dict[str, Any]:
        sent = {"operation": "record_instruction", "hash": hash_, "reference": reference, "requester": requester}
        answer = aws.invoke("LedgerTransferFunction", sent)
        assert answer["ok"], answer
        return dict(answer["result"])

    return send


Record = Callable[..., dict[str, Any]]


# Two kinds of record


def test_written_hash_is_never_an_instruction(aws: Cloud, request_: Request) -> None:
    """An operator writes the hash of an instruction that was rejected."""
    status, written = request_("POST", "/write", body={"hash": HASH, "metadata": {"note": "done"}})
    assert status == 200
    aws.settle()
    verified = request_("GET", f"/verify/{HASH}")[1]
    assert (verified["verified"], verified["kind"], verified["txid"]) == (True, "hash", written["txid"])
    assert decode(base64.b64decode(verified["encoded"])).input_type == INPUT_TYPES["hash"]
    found = request_("GET", f"/tx/{written['txid']}")[1]
    assert (found["kind"], found["metadata"], found["requested_by"]) == ("hash", {"note": "done"}, "olivia")


def test_instruction_is_recorded_beside_written_hash(aws: Cloud, request_: Request, record: Record) -> None:
    written = request_("POST", "/write", body={"hash": HASH, "metadata": {}})[1]
    recorded = record()
    assert recorded["txid"] != written["txid"]
    aws.settle()
    verified = request_("GET", f"/verify/{HASH}")[1]
    assert (verified["verified"], verified["kind"], verified["txid"]) == (True, "instruction", recorded["txid"])
    assert decode(base64.b64decode(verified["encoded"])).input_type == INPUT_TYPES["instruction"]
    again = request_("POST", "/write", body={"hash": HASH, "metadata": {}})[1]
    assert (again["txid"], again["status"]) == (written["txid"], "confirmed")
    assert record()["txid"] == recorded["txid"]


def test_verify_prefers_confirmed_record(aws: Cloud, request_: Request, record: Record) -> None:
    written = request_("POST", "/write", body={"hash": HASH, "metadata": {}})[1]
    aws.settle()
    record()
    verified = request_("GET", f"/verify/{HASH}")[1]
    assert (verified["verified"], verified["kind"], verified["txid"]) == (True, "hash", written["txid"])


@pytest.mark.parametrize("metadata", [{"reference": REFERENCE}, {"reference": None}, {"note": "x", "reference": {}}])
def test_write_refuses_metadata_that_claims_reference(aws: Cloud, request_: Request, metadata: dict[str, Any]) -> None:
    status, body = request_("POST", "/write", body={"hash": HASH, "metadata": metadata})
    assert status == 422
    assert "metadata.reference" in json.dumps(body)
    answer = aws.invoke("LedgerRecordFunction", {"operation": "write", "hash": HASH, "metadata": metadata})
    assert answer["error"]["code"] == "invalid_input"
    assert request_("GET", f"/verify/{HASH}")[1]["state"] is None


def test_every_kind_of_record_has_its_own_input_type() -> None:
    assert len(set(INPUT_TYPES.values())) == len(INPUT_TYPES)


@pytest.mark.parametrize("function", ["LedgerRecordFunction", "LedgerAnchorFunction", "LedgerFunction"])
def test_only_workers_function_records_instructions(aws: Cloud, function: str) -> None:
    sent = {"operation": "record_instruction", "hash": HASH, "reference": REFERENCE, "requester": "rita"}
    assert aws.invoke(function, sent)["error"]["code"] == "unknown_operation"


def test_instruction_signed_again_is_found_by_its_hash(aws: Cloud, request_: Request, record: Record) -> None:
    """The step's result keeps the transaction that was submitted; the hash leads to the one that is confirmed."""
    chain = MockChain(genesis=genesis(), table="ChainTable", clock=aws.clock, tick_milliseconds=1000)
    chain.set_faults(Faults(empty_ticks=20))
    submitted = record()
    assert submitted["state"] != "confirmed"
    aws.settle()
    verified = request_("GET", f"/verify/{HASH}")[1]
    assert (verified["verified"], verified["kind"]) == (True, "instruction")
    assert verified["txid"] != submitted["txid"]
    assert request_("GET", f"/tx/{submitted['txid']}")[1]["state"] == "expired"


def test_old_hash_record_still_verifies(aws: Cloud) -> None:
    """Records from before records had a requester and a separate type."""
    aws.invoke("LedgerRecordFunction", {"operation": "write", "hash": HASH, "metadata": {}})
    aws.settle()
    boto3.client("dynamodb").update_item(
        TableName="LedgerTable",
        Key={"pk": {"S": f"SUBMISSION#mock#hash:{HASH}"}, "sk": {"S": "SUBMISSION"}},
        UpdateExpression="REMOVE requested_by",
    )
    with function_environment(environment("LedgerFunction", PARAMETERS)):
        chain = MockChain(genesis=genesis(), table="ChainTable", clock=aws.clock, tick_milliseconds=1000)
        assert hash_state(Submissions(chain), HASH)["verified"]


# Who reads a task's reference


@pytest.mark.parametrize(
    ("subject", "roles", "shown"),
    [
        ("rita", "requester", True),
        ("ann", "auditor", True),
        ("otto", "operator", True),
        ("mallory", "requester", False),
        ("carl", "approver", False),
        ("mallory", "requester approver", False),
    ],
)
@pytest.mark.parametrize("kind", ["instruction", "transfer"])
def test_transaction_shows_reference_only_to_those_concerned(
    aws: Cloud, request_: Request, record: Record, kind: str, subject: str, roles: str, shown: bool
) -> None:
    if kind == "instruction":
        txid = record()["txid"]
    else:
        terms = {"reference": REFERENCE, "source": RICH, "destination": EMPTY, "amount": 1, "run": 1}
        sent = {"operation": "transfer", "requester": "rita", **terms}
        txid = aws.invoke("LedgerTransferFunction", sent)["result"]["txid"]
    aws.settle()
    status, found = request_("GET", f"/tx/{txid}", subject=subject, roles=roles)
    assert (status, found["kind"]) == (200, kind)
    assert found["metadata"] == ({"reference": REFERENCE} if shown else {})
    assert found["requested_by"] == ("rita" if shown else None)


def test_record_without_requester_belongs_to_no_caller(aws: Cloud, request_: Request, record: Record) -> None:
    """A record from before requesters were stored belongs to no requester."""
    txid = record(requester="")["txid"]
    assert request_("GET", f"/tx/{txid}", subject="mallory", roles="requester")[1]["metadata"] == {}


def test_no_answer_reveals_reference_to_other_requesters(aws: Cloud, request_: Request, record: Record) -> None:
    txid = record()["txid"]
    terms = {"reference": REFERENCE, "source": RICH, "destination": EMPTY, "amount": 1, "run": 1}
    moved = aws.invoke("LedgerTransferFunction", {"operation": "transfer", "requester": "rita", **terms})["result"]
    aws.settle()
    service = LedgerClient("LedgerFunction").identity()
    pages = {"pagination": {"offset": 0, "size": 100}, "filters": {}}
    answers = [
        request_(method, path, subject="mallory", roles="requester", body=body)
        for method, path, body in [
            ("GET", f"/verify/{HASH}", None),
            ("GET", f"/tx/{txid}", None),
            ("GET", f"/tx/{moved['txid']}", None),
            ("GET", "/qubic/health", None),
            ("GET", "/policy", None),
            ("GET", "/policy/versions", None),
            ("POST", "/query/v1/getTransactionByHash", {"hash": txid}),
            ("POST", "/query/v1/getTransactionByHash", {"hash": moved["txid"]}),
            ("POST", "/query/v1/getTransactionsForIdentity", {"identity": service, **pages}),
            ("POST", "/query/v1/getTransactionsForIdentity", {"identity": demo_key(RICH).identity, **pages}),
            ("POST", "/write", {"hash": HASH, "metadata": {}}),
        ]
    ]
    assert [status for status, _ in answers] == [200] * 10 + [403]
    task_id = REFERENCE.partition("#")[0]
    for _, body in answers:
        assert task_id not in json.dumps(body)
        assert "rita" not in json.dumps(body)


# The key


def test_api_signs_nothing_by_itself(aws: Cloud, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every route of the API works in a process that cannot have the key, and signs through the ledger's functions."""
    with function_environment(environment("QubicApiFunction", PARAMETERS)), pytest.raises(SettingsError):
        wallets.service_key()
    aws.invocations.clear()
    assert request_("POST", "/write", body={"hash": HASH, "metadata": {}})[0] == 200
    assert aws.invocations["LedgerRecordFunction"] == 1
    policy = request_("GET", "/policy")[1]
    rules = policy["rules"] | {"pay_invoice": policy["rules"]["monitoring"]}
    assert request_("POST", "/policy", body={"based_on": policy["policy_id"], "rules": rules})[0] == 201
    status, approved = request_("POST", "/policy/versions/2/approve", subject="oscar")
    assert (status, approved["status"]) == (200, "anchoring")
    assert aws.invocations["LedgerRecordFunction"] == 2
    aws.settle()
    assert request_("GET", "/policy")[1]["version"] == 2
    assert request_("GET", "/qubic/health")[0] == 200


def test_api_advances_first_policy_without_key() -> None:
    with cloud(state_machine=False, policy=False) as it:
        api = Api(it, "QubicApiFunction")
        assert api("GET", "/policy", None, subject="rita", roles="requester").status == 503
        it.settle()
        assert api("GET", "/policy", None, subject="rita", roles="requester").status == 200


def test_write_answers_429_when_ledger_is_busy(aws: Cloud, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qubic.transactions.submissions.MAX_OPEN_HASHES", 0)
    status, body = request_("POST", "/write", body={"hash": HASH, "metadata": {}})
    assert status == 429
    assert body["max_open"] == 0


def test_write_answers_503_when_signer_fails(aws: Cloud, request_: Request) -> None:
    def down(_: Any) -> None:
        raise RuntimeError("down")

    aws.faults["LedgerRecordFunction"] = down
    assert request_("POST", "/write", body={"hash": HASH, "metadata": {}})[0] == 503
    del aws.faults["LedgerRecordFunction"]
    assert request_("POST", "/write", body={"hash": HASH, "metadata": {}})[0] == 200


def test_approval_survives_when_signer_fails(aws: Cloud, request_: Request) -> None:
    """The approval is committed; the transaction worker hands the version in within a minute."""

    def down(_: Any) -> None:
        raise RuntimeError("down")

    policy = request_("GET", "/policy")[1]
    sent = {"based_on": policy["policy_id"], "rules": policy["rules"] | {"pay_invoice": policy["rules"]["monitoring"]}}
    assert request_("POST", "/policy", body=sent)[0] == 201
    aws.faults["LedgerRecordFunction"] = down
    status, approved = request_("POST", "/policy/versions/2/approve", subject="oscar")
    assert (status, approved["status"]) == (200, "approved")
    del aws.faults["LedgerRecordFunction"]
    aws.invoke("TransactionWorkerFunction", {})
    aws.settle()
    assert request_("GET", "/policy")[1]["version"] == 2


def test_ledger_client_refuses_unknown_operation_of_signer(aws: Cloud) -> None:
    with pytest.raises(PermanentError):
        LedgerClient("LedgerRecordFunction").transfer(
            reference="x", source=RICH, destination=EMPTY, amount=1, requester="alice"
        )
