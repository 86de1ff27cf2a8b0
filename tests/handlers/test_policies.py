"""The policy's lifecycle: proposal, approval by another operator, anchor, in force; and versions that must not be."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import boto3
import pytest
from botocore.client import BaseClient

from qaes.adapters import settings
from qaes.adapters.policy_events import events_after
from qaes.domain.errors import (
    ConflictError,
    ForbiddenError,
    LimitError,
    NotFoundError,
    PermanentError,
    TransientError,
)
from qaes.domain.policy import DEFAULT_RULES, DENIED, PolicyDocument, Rule
from qaes.domain.policy_events import LEDGER
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.transaction import Transaction, decode
from qubic import wallets, wiring
from qubic.network import chain
from qubic.network.base import Included, SentList
from qubic.network.faults import Faults
from qubic.network.mock import MockChain
from qubic.policy import lifecycle, trust
from qubic.policy.lifecycle import Policies
from qubic.policy.versions import PolicyVersion
from qubic.transactions.submissions import Submissions
from qubic.wallets import Key, demo_key, service_key
from tests.support.api import items, set_environment
from tests.support.cloud import Cloud, cloud

TABLE = "LedgerTable"
RULES = DEFAULT_RULES | {"transfer_funds": Rule(allowed=True, requires_approval=True, risk_level="high", max_amount=5)}
OTHER_RULES = DEFAULT_RULES | {"transaction": DENIED}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment("LedgerRecordFunction", monkeypatch)


@pytest.fixture
def aws(environment: None) -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def store(aws: Cloud) -> Policies:
    return wiring.policies()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Return the result or the error of each call; all calls start at once."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return call()
        except Exception as error:  # noqa: BLE001 it is looked at by the test
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def publish(aws: Cloud, store: Policies, rules: dict[str, Rule] = RULES) -> PolicyVersion:
    """Propose, approve and let the ledger confirm."""
    proposed = store.propose(rules, subject="olivia")
    store.approve(proposed.version, subject="oscar", four_eyes=True)
    aws.settle()
    return store.get(proposed.version)


def alter(pk: str, sk: str, **attributes: Any) -> None:
    """Change a stored item without permission."""
    names = {f"#{name}": name for name in attributes}
    boto3.client("dynamodb").update_item(
        TableName=TABLE,
        Key={"pk": {"S": pk}, "sk": {"S": sk}},
        UpdateExpression="SET " + ", ".join(f"#{name} = :{name}" for name in attributes),
        ConditionExpression="attribute_exists(pk)",
        ExpressionAttributeNames=names,
        ExpressionAttributeValues={f":{name}": value for name, value in attributes.items()},
    )


def alter_text(version: int, text: str) -> None:
    alter("POLICY#mock", f"VERSION#{version:09d}", text={"S": text})


def remove(pk: str, sk: str) -> None:
    boto3.client("dynamodb").delete_item(TableName=TABLE, Key={"pk": {"S": pk}, "sk": {"S": sk}})


def alter_record(version: int, **changes: Any) -> None:
    record = wiring.policies().get(version).model_copy(update=changes)
    alter("POLICY#mock", f"VERSION#{version:09d}", record={"S": record.model_dump_json()})


def alter_head(**numbers: int) -> None:
    alter("POLICY#mock", "HEAD", **{name: {"N": str(number)} for name, number in numbers.items()})


def forget() -> None:
    """Be another process from now on."""
    trust._verified.clear()
    trust._seen.clear()


def submissions_of_policies() -> list[str]:
    found = [item for item in items(TABLE) if item["pk"]["S"].startswith("SUBMISSION#mock#policy:")]
    return sorted(f"{item['pk']['S'].rpartition('#')[2]} {item['sk']['S']}" for item in found)


# The first version


def test_no_policy_in_force_until_version_1_is_confirmed(environment: None) -> None:
    with cloud(state_machine=False, policy=False) as aws:
        with pytest.raises(TransientError, match="not confirmed on the ledger yet"):
            wiring.policies().in_force()
        assert wiring.policies().get(1).status == "anchoring"
        with pytest.raises(TransientError):
            wiring.policies().propose(RULES, subject="olivia")
        aws.settle()
        policy = wiring.policies().in_force()
        assert (policy.version, policy.rules) == (1, DEFAULT_RULES)


def test_first_reader_submits_the_first_version_once(environment: None) -> None:
    with cloud(state_machine=False, policy=False) as aws:
        found = at_once(*[lambda: wiring.policies().in_force()] * 8)
        assert {type(each) for each in found} == {TransientError}
        aws.settle()
        found = at_once(*[lambda: wiring.policies().in_force()] * 8)
        assert {policy.policy_id for policy in found} == {wiring.policies().in_force().policy_id}
        assert submissions_of_policies() == ["policy:1 ATTEMPT#000001", "policy:1 SUBMISSION"]


def test_first_version_confirmed_without_worker(environment: None) -> None:
    """Without a transaction worker, each caller checks whether the ledger has it."""
    with cloud(state_machine=False, policy=False) as aws:
        with pytest.raises(TransientError):
            wiring.policies().in_force()
        aws.clock.pass_seconds(60)
        assert wiring.policies().in_force().version == 1


# The life of a version


def test_version_is_in_force_when_the_ledger_has_it(aws: Cloud, store: Policies) -> None:
    before = store.in_force()
    proposed = store.propose(RULES, subject="olivia")
    assert (proposed.version, proposed.status, proposed.proposed_by) == (2, "proposed", "olivia")
    assert proposed.based_on == before.policy_id
    assert store.in_force() == before

    approved = store.approve(2, subject="oscar", four_eyes=True)
    assert (approved.status, approved.approved_by) == ("anchoring", "oscar")
    assert approved.txid is not None
    assert store.in_force() == before

    aws.settle()
    policy = store.in_force()
    assert (policy.policy_id, policy.rules) == (proposed.policy_id, RULES)
    found = store.get(2)
    assert (found.status, found.txid, found.tick) == ("in_force", approved.txid, approved.tick)
    assert store.get(1).status == "superseded"
    assert [(each.version, each.status) for each in store.list()] == [(2, "in_force"), (1, "superseded")]


def test_document_is_proven_by_its_transaction(aws: Cloud, store: Policies) -> None:
    """Verify as an offline verifier, with only the result of `policy_document`."""
    version = publish(aws, store)
    found = aws.invoke("LedgerFunction", {"operation": "policy_document", "policy_id": version.policy_id})["result"]
    transaction = decode(base64.b64decode(found["encoded"]))
    assert hashlib.sha256(found["text"].encode()).digest() == transaction.payload
    assert transaction.is_signed_by_source()
    assert (transaction.id, transaction.tick) == (found["txid"], found["tick"])
    assert transaction.source == service_key().public_key
    assert found["policy_id"] == f"policy-v2-{transaction.payload.hex()}"
    assert PolicyDocument.read(found["text"]).rules == RULES
    first = store.document(store.get(1).policy_id)
    assert (first["version"], first["hash"]) == (1, store.get(1).hash)


@pytest.mark.parametrize("policy_id", ["", f"policy-v1-{'0' * 64}", f"policy-v9-{'0' * 64}", "nonsense"])
def test_unknown_document_is_not_found(store: Policies, policy_id: str) -> None:
    with pytest.raises(NotFoundError):
        store.document(policy_id)


def test_document_that_never_came_into_force_is_not_given(store: Policies) -> None:
    with pytest.raises(NotFoundError):
        store.document(store.propose(RULES, subject="olivia").policy_id)


def test_pages_of_versions(store: Policies) -> None:
    for number in range(5):
        rule = Rule(allowed=True, requires_approval=True, risk_level="low", max_amount=number + 1)
        store.propose(DEFAULT_RULES | {"transfer_funds": rule}, subject="olivia")
    assert [each.version for each in store.list(limit=4)] == [6, 5, 4, 3]
    assert [each.version for each in store.list(limit=4, before=3)] == [2, 1]
    assert store.list(before=1) == []


# Who may, and when


def test_proposer_cannot_approve_their_own_proposal(store: Policies) -> None:
    store.propose(RULES, subject="olivia")
    with pytest.raises(ForbiddenError):
        store.approve(2, subject="olivia", four_eyes=True)
    assert store.get(2).status == "proposed"
    assert store.approve(2, subject="olivia", four_eyes=False).status == "anchoring"


@pytest.mark.parametrize("look_alike", ["olivia ", "olivia\ufe0f", "oli\u034fvia", " olivia"])
def test_proposal_not_approved_by_a_look_alike(store: Policies, look_alike: str) -> None:
    store.propose(RULES, subject="olivia")
    with pytest.raises(ForbiddenError):
        store.approve(2, subject=look_alike, four_eyes=True)
    assert store.get(2).status == "proposed"


def test_same_proposal_twice_is_one(store: Policies) -> None:
    first = store.propose(RULES, subject="olivia")
    assert store.propose(RULES, subject="olivia") == first
    assert store.propose(RULES, subject="oscar").version == 3
    store.reject(3, subject="oscar")
    assert store.propose(RULES, subject="oscar").version == 4


def test_stale_proposal_is_refused(aws: Cloud, store: Policies) -> None:
    first = store.in_force().policy_id
    store.propose(RULES, subject="olivia", based_on=first)
    store.propose(OTHER_RULES, subject="oscar", based_on=first)
    store.approve(3, subject="olivia", four_eyes=True)
    for attempt in (
        lambda: store.propose(OTHER_RULES, subject="olivia", based_on=first),
        lambda: store.approve(2, subject="oscar", four_eyes=True),
    ):
        with pytest.raises(ConflictError, match="version 3 was approved"):
            attempt()
    aws.settle()
    for attempt in (
        lambda: store.propose(OTHER_RULES, subject="olivia", based_on=first),
        lambda: store.approve(2, subject="oscar", four_eyes=True),
    ):
        with pytest.raises(ConflictError, match="is in force now") as caught:
            attempt()
        assert caught.value.details["policy_id"] == store.in_force().policy_id
    assert store.in_force().version == 3
    assert store.get(2).status == "proposed"


def test_approval_is_given_once(aws: Cloud, store: Policies) -> None:
    store.propose(RULES, subject="olivia")
    first = store.approve(2, subject="oscar", four_eyes=True)
    assert store.approve(2, subject="oscar", four_eyes=True) == first
    with pytest.raises(ConflictError):
        store.approve(2, subject="otto", four_eyes=True)
    aws.settle()
    assert store.approve(2, subject="oscar", four_eyes=True).status == "in_force"
    with pytest.raises(ConflictError):
        store.approve(1, subject="oscar", four_eyes=True)


def test_rejected_version_stays_rejected(store: Policies) -> None:
    store.propose(RULES, subject="olivia")
    rejected = store.reject(2, subject="oscar", reason="too strict")
    assert (rejected.status, rejected.rejected_by, rejected.reason) == ("rejected", "oscar", "too strict")
    assert store.reject(2, subject="otto") == rejected
    with pytest.raises(ConflictError):
        store.approve(2, subject="oscar", four_eyes=True)
    assert store.propose(RULES, subject="olivia").version == 3
    assert store.reject(3, subject="olivia").status == "rejected"  # withdrawn


def test_version_being_anchored_cannot_be_rejected(aws: Cloud, store: Policies) -> None:
    store.propose(RULES, subject="olivia")
    store.approve(2, subject="oscar", four_eyes=True)
    with pytest.raises(ConflictError):
        store.reject(2, subject="olivia")
    aws.settle()
    with pytest.raises(ConflictError):
        store.reject(2, subject="olivia")
    assert store.in_force().version == 2


def test_unknown_version_is_not_found(store: Policies) -> None:
    for call in (
        store.get,
        lambda n: store.approve(n, subject="o", four_eyes=True),
        lambda n: store.reject(n, subject="o"),
    ):
        with pytest.raises(NotFoundError):
            call(7)


# Races


def test_of_two_approvals_at_once_one_wins(aws: Cloud, store: Policies) -> None:
    store.propose(RULES, subject="olivia")
    store.propose(OTHER_RULES, subject="olivia")
    found = at_once(
        *(lambda n=n, who=who: wiring.policies().approve(n, subject=who, four_eyes=True)
          for n, who in ((2, "oscar"), (3, "otto"), (2, "otto"), (3, "oscar")))
    )  # fmt: skip
    won = [each for each in found if isinstance(each, PolicyVersion)]
    assert len(won) == 1
    assert {type(each) for each in found} == {PolicyVersion, ConflictError}
    aws.settle()
    assert store.in_force().version == won[0].version
    assert len([key for key in submissions_of_policies() if key.endswith("SUBMISSION")]) == 2


def test_approval_and_a_rejection_at_once(aws: Cloud, store: Policies) -> None:
    store.propose(RULES, subject="olivia")
    found = at_once(
        lambda: wiring.policies().approve(2, subject="oscar", four_eyes=True),
        lambda: wiring.policies().reject(2, subject="olivia"),
    )
    assert sorted(type(each).__name__ for each in found) == ["ConflictError", "PolicyVersion"]
    aws.settle()
    expected = (2, "in_force") if isinstance(found[0], PolicyVersion) else (1, "rejected")
    assert (store.in_force().version, store.get(2).status) == expected


def test_proposals_at_once_have_different_numbers(store: Policies) -> None:
    found = at_once(*(lambda who=who: wiring.policies().propose(RULES, subject=who) for who in "abcdef"))
    assert sorted(each.version for each in found) == [2, 3, 4, 5, 6, 7]
    assert {store.get(each.version).proposed_by for each in found} == set("abcdef")


def test_many_settle_at_once(aws: Cloud, store: Policies) -> None:
    store.propose(RULES, subject="olivia")
    store.approve(2, subject="oscar", four_eyes=True)
    confirm_silently(aws)
    assert store.get(2).status == "anchoring"
    assert at_once(*[lambda: wiring.policies().settle()] * 6) == [None] * 6
    assert (store.get(2).status, store.get(1).status) == ("in_force", "superseded")
    store.settle()
    assert store.in_force().version == 2


def confirm_silently(aws: Cloud) -> None:
    """Let the ledger confirm, and crash the process that reports it."""
    aws.clock.pass_seconds(20)
    Submissions(chain()).advance(service_key().identity)


# Failures half-way


@pytest.mark.parametrize("error", [TransientError, LimitError])
def test_worker_submits_approved_version_after_failure(
    aws: Cloud, store: Policies, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise error("the ledger is busy")

    store.propose(RULES, subject="olivia")
    with monkeypatch.context() as patch:
        patch.setattr(Submissions, "submit_record", busy)
        assert store.approve(2, subject="oscar", four_eyes=True).status == "approved"
        with pytest.raises(TransientError, match="busy"):
            store.settle()
    aws.invoke("TransactionWorkerFunction", {})
    assert store.get(2).status == "anchoring"
    aws.settle()
    assert store.in_force().version == 2


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_crash_at_each_write(aws: Cloud, monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    """Approving and settling, cut off before or after each call that changes anything: it comes into force once."""

    class Cut(BaseException):
        pass

    original = BaseClient._make_api_call
    left = [10**9]

    def cut(self: Any, operation: str, arguments: Any) -> Any:
        if operation in {"GetItem", "Query", "GetSecretValue"}:
            return original(self, operation, arguments)
        left[0] -= 1
        if left[0] == 0 and not done:
            raise Cut
        answer = original(self, operation, arguments)
        if left[0] == 0:
            raise Cut
        return answer

    monkeypatch.setattr(BaseClient, "_make_api_call", cut)
    for number in range(1, 40):
        rule = Rule(allowed=True, requires_approval=True, risk_level="low", max_amount=number)
        version = wiring.policies().propose(DEFAULT_RULES | {"transfer_funds": rule}, subject="olivia").version
        left[0] = number
        try:
            wiring.policies().approve(version, subject="oscar", four_eyes=True)
            confirm_silently(aws)
            wiring.policies().settle()
            finished = True
        except Cut:
            finished = False
        left[0] = 10**9
        wiring.policies().approve(version, subject="oscar", four_eyes=True)
        aws.settle()
        assert wiring.policies().in_force().version == version
        assert wiring.policies().get(version - 1).status == "superseded"
        if finished:
            break
    assert finished
    assert number > 5
    assert len([key for key in submissions_of_policies() if key.endswith("SUBMISSION")]) == number + 1


# Differences from the ledger


def looser(version: int) -> str:
    """A document that would allow everything."""
    rule = Rule(allowed=True, requires_approval=False, risk_level="low")
    return PolicyDocument.write({"transfer_funds": rule}, version=version, proposed_by="olivia").text()


@pytest.mark.parametrize("text", ["{}", looser(2), looser(3)], ids=["none", "another", "another version"])
@pytest.mark.parametrize("known", [True, False], ids=["checked before", "not checked before"])
def test_altered_document_keeps_last_valid_in_force(
    aws: Cloud,
    store: Policies,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    text: str,
    known: bool,
) -> None:
    publish(aws, store)
    store.in_force()
    if not known:
        trust._verified.clear()
    alter_text(2, text)
    capsys.readouterr()
    assert store.in_force().version == 1
    assert '"PolicyRefused":[1.0]' in capsys.readouterr().out
    assert ("ERROR", "policy refused") in {(record.levelname, record.message) for record in caplog.records}
    with pytest.raises(PermanentError) as caught:
        store.document(store.get(2).policy_id)
    assert caught.value.code == "policy_altered"


def test_when_no_version_is_good_nothing_is_allowed(aws: Cloud, store: Policies) -> None:
    publish(aws, store)
    alter_text(1, looser(1))
    assert store.in_force().version == 2
    alter_text(2, looser(2))
    with pytest.raises(TransientError, match="every action is denied"):
        store.in_force()


def test_rejected_version_is_never_fallen_back_to(aws: Cloud, store: Policies) -> None:
    """Not even one whose hash the ledger has: it was altered when it should have come into force."""
    store.propose(OTHER_RULES, subject="olivia")
    text = store.read(2)[1]
    store.approve(2, subject="oscar", four_eyes=True)
    alter_text(2, looser(2))
    aws.settle()
    alter_text(2, text)
    assert publish(aws, store).version == 3
    alter_text(3, looser(3))
    assert (store.get(2).status, store.in_force().version) == ("rejected", 1)


def test_altered_document_is_never_submitted(
    aws: Cloud, store: Policies, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store.propose(RULES, subject="olivia")
    with monkeypatch.context() as patch:
        patch.setattr(Policies, "_submit", lambda *_: None)
        store.approve(2, subject="oscar", four_eyes=True)
    alter_text(2, looser(2))
    capsys.readouterr()
    store.settle()
    assert '"PolicyRefused":[1.0]' in capsys.readouterr().out
    assert "policy:2 SUBMISSION" not in submissions_of_policies()
    assert (store.get(2).status, store.get(2).reason) == ("rejected", "its text differs from the approved text")
    assert store.in_force().version == 1
    # And it does not stand in the way of the next.
    assert publish(aws, store, OTHER_RULES).version == 3
    assert store.in_force().version == 3


@pytest.mark.parametrize("confirmed", [False, True])
def test_altered_first_version_is_not_replaced(
    environment: None, monkeypatch: pytest.MonkeyPatch, confirmed: bool
) -> None:
    with cloud(state_machine=False, policy=False) as aws:
        with monkeypatch.context() as patch:
            if not confirmed:
                patch.setattr(Policies, "_submit", lambda *_: None)
            wiring.policies().settle()
        text = wiring.policies().read(1)[1]
        alter_text(1, looser(1))
        aws.settle()
        for _ in range(2):
            with pytest.raises(TransientError, match="was altered"):
                wiring.policies().in_force()
        assert submissions_of_policies() == ["policy:1 ATTEMPT#000001", "policy:1 SUBMISSION"] * confirmed
        alter_text(1, text)  # which is how it is mended
        wiring.policies().settle()
        aws.settle()
        assert wiring.policies().in_force().version == 1


def test_document_altered_before_approval_is_rejected(store: Policies) -> None:
    store.propose(RULES, subject="olivia")
    alter_text(2, looser(2))
    with pytest.raises(ConflictError, match="differs from the proposal"):
        store.approve(2, subject="oscar", four_eyes=True)


def test_document_altered_while_anchoring_is_not_in_force(aws: Cloud, store: Policies) -> None:
    store.propose(RULES, subject="olivia")
    store.approve(2, subject="oscar", four_eyes=True)
    alter_text(2, looser(2))
    aws.settle()
    assert store.in_force().version == 1
    assert store.get(2).status == "rejected"
    assert "another hash than its text's" in store.get(2).reason
    # And it does not stand in the way of the next.
    assert publish(aws, store, OTHER_RULES).version == 3
    assert store.in_force().version == 3


OTHER = demo_key("0x1234567890abcdef")


def forge(
    aws: Cloud, *, sign: Key | None = None, include: bool = True, text: str | None = None, **changes: Any
) -> None:
    """Anchor version 2 with a changed transaction, as a role with write access to the ledger's table could."""
    submission = Submissions(chain()).get("policy:2")
    assert submission is not None
    transaction = replace(decode(submission.encoded), tick=chain().tick_info().tick + 5)
    if text is not None:
        alter_text(2, text)
        transaction = replace(transaction, payload=hashlib.sha256(text.encode()).digest())
    transaction = replace(transaction, **changes)
    if sign is not None:
        if sign is OTHER:
            transaction = replace(transaction, source=OTHER.public_key, destination=OTHER.public_key)
        transaction = transaction.sign(sign.subseed)
    if include:
        chain().broadcast(transaction.encode())
    aws.clock.pass_seconds(30)
    assert (chain().transaction(transaction.id) is not None) == include
    alter(
        "SUBMISSION#mock#policy:2",
        "SUBMISSION",
        encoded={"B": transaction.encode()},
        txid={"S": transaction.id},
        tick={"N": str(transaction.tick)},
        source={"S": encode_identity(transaction.source)},
        destination={"S": encode_identity(transaction.destination)},
    )
    forget()


def test_transaction_like_the_original_is_as_good(aws: Cloud, store: Policies) -> None:
    """Only the changes of the tests below make the difference."""
    publish(aws, store)
    forge(aws, sign=service_key())
    assert store.in_force().version == 2


def test_transaction_of_another_key_anchors_nothing(aws: Cloud, store: Policies) -> None:
    """With all that belongs to it: the network has it, and the table calls it the submission's."""
    publish(aws, store)
    forge(aws, sign=OTHER, text=looser(2))
    assert store.in_force().version == 1


@pytest.mark.parametrize(
    "changes",
    [{"input_type": 0x5148}, {"destination": OTHER.public_key}, {"destination": OTHER.public_key, "amount": 1}],
    ids=["input type", "destination", "amount"],
)
def test_another_transaction_of_the_service_anchors_nothing(
    aws: Cloud, store: Policies, changes: dict[str, Any]
) -> None:
    publish(aws, store)
    forge(aws, sign=service_key(), **changes)
    assert store.in_force().version == 1


def test_amount_to_the_service_itself_is_no_record(aws: Cloud, store: Policies) -> None:
    publish(aws, store)
    forge(aws, sign=service_key(), amount=1)
    assert store.in_force().version == 1


def test_transaction_without_a_signature_anchors_nothing(
    aws: Cloud, store: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if a node reports that the network has it."""
    publish(aws, store)
    forge(aws, text=looser(2), include=False)
    monkeypatch.setattr(MockChain, "transaction", lambda *_: object())
    assert store.in_force().version == 1


def test_signed_but_absent_transaction_anchors_nothing(aws: Cloud, store: Policies) -> None:
    """Such as an attempt whose tick passed without it, for which another was signed."""
    publish(aws, store)
    forge(aws, sign=service_key(), include=False)
    assert store.in_force().version == 1
    with pytest.raises(PermanentError, match="the network does not have"):
        store.document(store.get(2).policy_id)


def test_document_withheld_when_network_has_no_transaction(aws: Cloud, store: Policies) -> None:
    """Although this process has verified the version, by the right one."""
    publish(aws, store)
    store.in_force()
    verified = dict(trust._verified)
    forge(aws, sign=service_key(), include=False)
    trust._verified.update(verified)
    assert store.in_force().version == 2
    with pytest.raises(PermanentError, match="the network does not have"):
        store.document(store.get(2).policy_id)


# The network is asked


def test_policy_undecided_when_network_does_not_respond(aws: Cloud, store: Policies) -> None:
    publish(aws, store)
    store.in_force()
    chain().set_faults(Faults(lag=1000))  # type: ignore[attr-defined]
    assert store.in_force().version == 2  # known to this process
    forget()
    with pytest.raises(TransientError, match="cannot confirm the policy's transaction"):
        store.in_force()
    chain().set_faults(Faults())  # type: ignore[attr-defined]
    assert store.in_force().version == 2


def test_network_that_does_not_answer(aws: Cloud, store: Policies) -> None:
    publish(aws, store)
    store.in_force()
    chain().set_faults(Faults(fail_requests=1000))  # type: ignore[attr-defined]
    assert store.in_force().version == 2  # known to this process
    forget()
    with pytest.raises(TransientError, match="does not respond"):  # and not the version before it
        store.in_force()


def test_version_confirmed_only_in_table_is_not_in_force(aws: Cloud, store: Policies) -> None:
    store.propose(RULES, subject="olivia")
    store.approve(2, subject="oscar", four_eyes=True)
    alter("SUBMISSION#mock#policy:2", "SUBMISSION", state={"S": "confirmed"})
    with pytest.raises(TransientError, match="cannot confirm the policy's transaction"):
        store.settle()
    assert (store.in_force().version, store.get(2).status) == (1, "anchoring")
    aws.clock.pass_seconds(60)  # and it was sent: so it is there after all
    store.settle()
    assert store.in_force().version == 2


def test_network_is_asked_once_for_each_version(aws: Cloud, store: Policies, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(aws, store)
    forget()
    asked: list[str] = []
    original = MockChain.transaction
    monkeypatch.setattr(MockChain, "transaction", lambda self, txid: (asked.append(txid), original(self, txid))[1])
    for _ in range(3):
        wiring.policies().in_force()
        store.document(store.get(2).policy_id)
    assert asked == [store.get(2).txid]


def listed(*transactions: Transaction, ahead: int = 0) -> Callable[..., SentList]:
    found = tuple(Included(each, 0, money_flew=False) for each in transactions)
    return lambda _, identity, first, last: SentList(found, last + ahead)


@pytest.mark.parametrize(
    ("page", "version"),
    [({}, 1), ({"ahead": -1}, None), ({"has": True}, 2)],
    ids=["not there", "behind", "there"],
)
def test_look_up_that_finds_nothing_is_not_believed_alone(
    aws: Cloud, store: Policies, monkeypatch: pytest.MonkeyPatch, page: dict[str, Any], version: int | None
) -> None:
    publish(aws, store)
    store.in_force()
    first = next(good for known, good in trust._verified.items() if known[2] == 1)
    forget()
    trust._verified["LedgerTable", "mock", 1, first.policy.policy_id.rpartition("-")[2]] = first
    submission = store._submissions.get("policy:2")
    assert submission is not None
    has = (decode(submission.encoded),) if page.pop("has", False) else ()
    monkeypatch.setattr(MockChain, "transaction", lambda *_: None)
    monkeypatch.setattr(MockChain, "sent", listed(*has, **page))
    if version is None:
        with pytest.raises(TransientError, match="cannot confirm the policy's transaction"):
            store.in_force()
    else:
        assert store.in_force().version == version


# A seed that was replaced


def replace_seed() -> str:
    """Return the identity that the service had until now."""
    before = service_key().identity
    secret = settings.text("QUBIC_SEED_SECRET")
    boto3.client("secretsmanager").put_secret_value(SecretId=secret, SecretString="abcde" * 11)
    wallets._key_of_secret.cache_clear()
    assert service_key().identity != before
    return before


def test_version_of_a_former_identity_stays_in_force(
    aws: Cloud, store: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(aws, store)
    former = replace_seed()
    forget()
    with pytest.raises(TransientError, match="every action is denied"):
        store.in_force()
    monkeypatch.setenv("QUBIC_FORMER_IDENTITIES", f"{OTHER.identity}, {former}")
    assert store.in_force().version == 2


@pytest.mark.parametrize("identities", ["A" * 59 + "B", "x", "A" * 60 + ";"])
def test_malformed_former_identities_are_refused(
    aws: Cloud, store: Policies, monkeypatch: pytest.MonkeyPatch, identities: str
) -> None:
    forget()
    monkeypatch.setenv("QUBIC_FORMER_IDENTITIES", identities)
    with pytest.raises(settings.SettingsError, match="QUBIC_FORMER_IDENTITIES"):
        store.in_force()


def test_version_on_its_way_survives_seed_replacement(
    aws: Cloud, store: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key that the service has now signs it."""
    chain().set_faults(Faults(drop=1000))  # type: ignore[attr-defined]
    store.propose(RULES, subject="olivia")
    store.approve(2, subject="oscar", four_eyes=True)
    aws.clock.pass_seconds(60)
    former = replace_seed()
    monkeypatch.setenv("QUBIC_FORMER_IDENTITIES", former)
    aws.parameters["QubicFormerIdentities"] = former
    chain().set_faults(Faults())  # type: ignore[attr-defined]
    fund(aws, service_key())
    aws.invoke("TransactionWorkerFunction", {})
    aws.settle()
    aws.invoke("TransactionWorkerFunction", {})
    assert store.in_force().version == 2
    assert store.document(store.in_force().policy_id)["source"] == service_key().identity


def test_first_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likely first day on a real network: a wallet with a balance takes the place of the one that was made."""
    with cloud(state_machine=False, policy=False) as aws:
        set_environment("LedgerRecordFunction", monkeypatch)
        chain().set_faults(Faults(drop=1000))  # type: ignore[attr-defined]
        with pytest.raises(TransientError):
            wiring.policies().in_force()
        aws.clock.pass_seconds(60)
        former = replace_seed()
        monkeypatch.setenv("QUBIC_FORMER_IDENTITIES", former)
        aws.parameters["QubicFormerIdentities"] = former
        chain().set_faults(Faults())  # type: ignore[attr-defined]
        fund(aws, service_key())
        aws.invoke("TransactionWorkerFunction", {})
        aws.settle()
        assert wiring.policies().in_force().version == 1


def fund(aws: Cloud, key: Key) -> None:
    rich = demo_key("0x1234567890abcdef")
    tick = chain().tick_info().tick + 5
    chain().broadcast(Transaction(rich.public_key, key.public_key, 10, tick).sign(rich.subseed).encode())
    aws.clock.pass_seconds(6)
    assert chain().balance(key.identity).balance == 10


# HEAD that was rolled back


def rolled_back(store: Policies, capsys: pytest.CaptureFixture[str]) -> bool:
    capsys.readouterr()
    try:
        assert store.in_force().version == 1
    except TransientError as error:
        assert "has been in force" in error.message  # noqa: PT017
        assert '"PolicyRefused":[1.0]' in capsys.readouterr().out
        return True
    return False


def lose_item() -> None:
    remove("POLICY#mock", "VERSION#000000002")


def lose_submission() -> None:
    remove("SUBMISSION#mock#policy:2", "SUBMISSION")


def lose_record() -> None:
    alter_record(2, status="proposed")


@pytest.mark.parametrize(
    "also", [(), (lose_item,), (lose_record,), (lose_submission,)], ids=["head", "item", "record", "submission"]
)
def test_head_that_was_rolled_back_is_refused(
    aws: Cloud, store: Policies, capsys: pytest.CaptureFixture[str], also: tuple[Callable[[], None], ...]
) -> None:
    publish(aws, store)
    forget()
    for lose in also:
        lose()
    alter_head(in_force=1)
    for _ in range(2):
        assert rolled_back(store, capsys)
    for attempt in (
        lambda: store.propose(OTHER_RULES, subject="olivia"),
        lambda: store.approve(2, subject="otto", four_eyes=True),
    ):
        with pytest.raises((TransientError, ConflictError, NotFoundError)):
            attempt()
    alter_head(in_force=2)  # which is how it is mended
    if not also:
        assert store.in_force().version == 2


def test_head_that_was_removed(aws: Cloud, store: Policies, capsys: pytest.CaptureFixture[str]) -> None:
    forget()
    remove("POLICY#mock", "HEAD")
    assert rolled_back(store, capsys)


def test_submission_whose_version_is_missing_is_found(
    aws: Cloud, store: Policies, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(aws, store)
    publish(aws, store, OTHER_RULES)
    store.propose(RULES, subject="olivia")
    for lose in (lose_item, lose_submission, lambda: remove("POLICY#mock", "VERSION#000000003")):
        lose()
    alter_head(in_force=1)
    forget()
    assert rolled_back(store, capsys)


def test_process_remembers_the_policy_in_force(aws: Cloud, store: Policies, capsys: pytest.CaptureFixture[str]) -> None:
    """Regardless of other items that were rolled back with HEAD."""
    publish(aws, store)
    store.in_force()
    lose_item()
    lose_submission()
    alter_head(in_force=1)
    assert rolled_back(store, capsys)


@pytest.mark.parametrize("later", [False, True], ids=["changed", "as it was"])
def test_process_that_has_not_seen_the_newer_version(
    aws: Cloud,
    store: Policies,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    later: bool,
) -> None:
    """The process checks again if HEAD has changed, and always after a minute."""
    store.in_force()
    seen = dict(trust._seen)
    [head] = [item for item in items(TABLE) if item["sk"]["S"] == "HEAD"]
    publish(aws, store)
    trust._seen.clear()
    trust._seen.update(seen)
    if later:
        boto3.client("dynamodb").put_item(TableName=TABLE, Item=head)
        assert not rolled_back(store, capsys)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + trust.LOOK_AGAIN_SECONDS)
    else:
        alter_head(in_force=1)
    assert rolled_back(store, capsys)


def test_confirmed_unsettled_version_is_no_rollback(aws: Cloud, store: Policies) -> None:
    store.propose(RULES, subject="olivia")
    store.approve(2, subject="oscar", four_eyes=True)
    confirm_silently(aws)
    forget()
    assert store.in_force().version == 1
    store.settle()
    assert store.in_force().version == 2


def test_proposed_and_rejected_versions_are_no_rollback(aws: Cloud, store: Policies) -> None:
    store.propose(OTHER_RULES, subject="olivia")
    store.approve(2, subject="oscar", four_eyes=True)
    alter_text(2, looser(2))
    aws.settle()
    assert (store.get(2).status, store.propose(RULES, subject="olivia").version) == ("rejected", 3)
    forget()
    assert store.in_force().version == 1


def test_version_entering_force_now_is_no_rollback(
    aws: Cloud, store: Policies, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the read of HEAD and the search for later versions."""
    store.propose(RULES, subject="olivia")
    store.approve(2, subject="oscar", four_eyes=True)
    confirm_silently(aws)
    forget()
    original = Policies._records

    def settled(self: Policies, *arguments: Any) -> Any:
        monkeypatch.setattr(Policies, "_records", original)
        wiring.policies().settle()
        return original(self, *arguments)

    monkeypatch.setattr(Policies, "_records", settled)
    assert store.in_force().version == 2
    assert "PolicyRefused" not in capsys.readouterr().out


def test_reading_the_policy_in_force_takes_two_reads(
    aws: Cloud, store: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(aws, store)
    calls: list[str] = []
    original = BaseClient._make_api_call

    def counted(self: Any, operation: str, arguments: Any) -> Any:
        if arguments.get("TableName") == TABLE:
            calls.append(operation)
        return original(self, operation, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", counted)
    forget()
    store.in_force()
    # Versions after HEAD's, the submission of the next one, and this one's submission.
    assert sorted(calls) == ["GetItem"] * 4 + ["Query"]
    calls.clear()
    store.in_force()
    assert calls == ["GetItem"] * 2


# Replacements of a confirmed transaction


def test_bytes_that_are_not_the_transaction_of_that_id(aws: Cloud, store: Policies) -> None:
    publish(aws, store)
    for encoded in (b"", store._submissions.get("policy:1").encoded):  # type: ignore[union-attr]
        trust._verified.clear()
        alter("SUBMISSION#mock#policy:2", "SUBMISSION", encoded={"B": encoded or b"\0"})
        assert store.in_force().version == 1


def test_version_counts_only_while_its_submission_is_confirmed(aws: Cloud, store: Policies) -> None:
    publish(aws, store)
    trust._verified.clear()
    alter("SUBMISSION#mock#policy:2", "SUBMISSION", state={"S": "broadcast"})
    assert store.in_force().version == 1


def test_transaction_is_checked_once_for_each_version(
    aws: Cloud, store: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(aws, store)
    trust._verified.clear()
    checked: list[str] = []
    original = trust._check_anchor
    monkeypatch.setattr(trust, "_check_anchor", lambda *a: (checked.append(a[0]), original(*a))[1])
    for _ in range(3):
        wiring.policies().in_force()
    assert checked == [store.get(2).hash]


def test_older_version_in_the_place_of_a_newer_one_is_noticed(
    aws: Cloud, store: Policies, caplog: pytest.LogCaptureFixture
) -> None:
    publish(aws, store)
    first = store._submissions.get("policy:1")
    assert first is not None
    alter_text(2, store.read(1)[1])
    attributes = {"encoded": {"B": first.encoded}, "txid": {"S": first.txid}}
    alter("SUBMISSION#mock#policy:2", "SUBMISSION", **attributes)
    assert store.in_force().version == 1
    assert "its text belongs to another version" in {getattr(record, "reason", None) for record in caplog.records}


# The events of the policy


def happened() -> list[tuple[str, str, str, dict[str, Any]]]:
    """Kind, actor, version and input of each event after the first version came into force."""
    first, *events = events_after("PolicyTable")
    assert (first.kind, first.actor, first.number) == ("policy_in_force", LEDGER, 1)
    found = [(event, json.loads(event.input)) for event in events]
    return [(event.kind, event.actor, event.policy_id, input_) for event, input_ in found]


def test_each_change_of_a_version_is_an_event(aws: Cloud, store: Policies) -> None:
    first = store.in_force().policy_id
    rejected = store.propose(OTHER_RULES, subject="olivia")
    store.reject(rejected.version, subject="oscar", reason="too strict")
    accepted = store.propose(RULES, subject="olivia")
    store.approve(accepted.version, subject="oscar", four_eyes=True)
    aws.settle()
    found = store.get(accepted.version)
    about = {"policy_id": accepted.policy_id}
    assert happened() == [
        ("policy_proposed", "olivia", rejected.policy_id, {"policy_id": rejected.policy_id, "based_on": first}),
        ("policy_rejected", "oscar", rejected.policy_id, {"policy_id": rejected.policy_id, "reason": "too strict"}),
        ("policy_proposed", "olivia", accepted.policy_id, about | {"based_on": first}),
        ("policy_approved", "oscar", accepted.policy_id, about),
        ("policy_in_force", LEDGER, accepted.policy_id, about | {"txid": found.txid, "tick": found.tick}),
    ]
    *_, last = events_after("PolicyTable")
    assert last.timestamp == found.in_force_at
    assert last.state.in_force == accepted.policy_id


def test_repeated_change_of_a_version_is_one_event(store: Policies) -> None:
    proposed = store.propose(RULES, subject="olivia")
    at_once(*[lambda: store.propose(RULES, subject="olivia")] * 3)
    at_once(*[lambda: store.approve(proposed.version, subject="oscar", four_eyes=True)] * 4)
    store.approve(proposed.version, subject="oscar", four_eyes=True)
    assert [kind for kind, *_ in happened()] == ["policy_proposed", "policy_approved"]


def test_altered_version_is_rejected_by_the_ledger(aws: Cloud, store: Policies) -> None:
    proposed = store.propose(RULES, subject="olivia")
    store.approve(proposed.version, subject="oscar", four_eyes=True)
    alter_text(2, looser(2))
    aws.settle()
    assert store.get(2).status == "rejected"
    kind, actor, policy_id, input_ = happened()[-1]
    assert (kind, actor, policy_id) == ("policy_rejected", LEDGER, proposed.policy_id)
    assert input_["reason"] == store.get(2).reason


def test_change_is_not_written_when_its_event_is_not(store: Policies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer's event has each number that this process tries: the version must not be there without its own."""
    before = items("LedgerTable")
    monkeypatch.setattr(lifecycle, "newest_event", lambda _: None)
    with pytest.raises(TransientError, match="other callers are changing the policy"):
        store.propose(RULES, subject="olivia")
    assert items("LedgerTable") == before


def test_suspension_and_version_at_once_are_both_events(store: Policies) -> None:
    suspending = wiring.suspending()
    outcomes = at_once(
        lambda: suspending.suspend("transfer_funds", subject="oscar", reason="so"),
        lambda: store.propose(RULES, subject="olivia"),
        lambda: suspending.suspend("*", subject="olivia", reason="so"),
    )
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert [event.number for event in events_after("PolicyTable")] == [1, 2, 3, 4]
    *_, last = events_after("PolicyTable")
    assert set(last.state.suspended) == {"transfer_funds", "*"}
