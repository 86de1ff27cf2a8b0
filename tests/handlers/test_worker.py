"""The worker on moto: each step type, once, and only what may run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from audit.store import Outbox
from qaes.adapters import transfers
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_store import TaskStore
from qaes.domain import planning
from qaes.domain.canonical import hash_of
from qaes.domain.errors import ConflictError, RefusedError, UnavailableError
from qaes.domain.ids import new_plan_id, timestamp
from qaes.domain.ids import now as moment
from qaes.domain.models import Event, Plan, StepRecord
from qaes.domain.policy import Policy
from qaes.domain.qubic.identity import encode_identity
from qubic.chain.mock import Faults, MockChain
from qubic.submissions import Submissions
from tests.handlers.test_task_store import new_task
from tests.support.cloud import Cloud, Context, call, cloud
from tests.support.template import resolve, template
from worker.app import NotConfirmedYetError

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"
KEYLESS = encode_identity(bytes([7]) * 32)
"""An identity that is no contract's, and whose key is nowhere."""
TRANSFER = {"wallet_address": SOURCE, "to_address": DESTINATION, "amount": 250}
Plans = Callable[..., tuple[str, Plan]]
WAITER = "a token"


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


@pytest.fixture
def plan_for(store: TaskStore) -> Plans:
    """A task of that type that executes its plan, under the ledger's policy."""
    policy = Policy.model_validate(call("LedgerFunction", {"operation": "policy"})["result"])

    def make(task_type: str, parameters: dict[str, Any]) -> tuple[str, Plan]:
        task, _ = store.start_task(new_task().model_copy(update={"task_type": task_type, "parameters": parameters}))
        store.begin_planning(task.task_id)
        analysis = planning.analyze(task_type, policy)
        decision = policy.decide(analysis.action_type)
        store.record_policy(task.task_id, analysis, decision)
        plan = planning.build_plan(
            plan_id=new_plan_id(),
            task_id=task.task_id,
            created_at=timestamp(moment()),
            task_type=task_type,
            description=task.description,
            parameters=parameters,
            analysis=analysis,
            policy=decision,
        )
        store.save_plan(task.task_id, plan)
        store.begin_execution(task.task_id)
        return task.task_id, plan

    return make


def run(aws: Cloud, task_id: str, step_index: int) -> dict[str, Any]:
    """As the state ExecuteStep does."""
    answer: dict[str, Any] = aws.invoke("ExecuteStepFunction", {"task_id": task_id, "step_index": step_index})
    return answer


def submit(aws: Cloud, task_id: str) -> dict[str, Any]:
    """As the state SubmitTransfer does, for the third step."""
    event = {"task_id": task_id, "step_index": 2, "submit": True}
    answer: dict[str, Any] = aws.invoke("ExecuteStepFunction", event)
    return answer


def record_of(store: TaskStore, task_id: str) -> StepRecord:
    record = store.step(task_id, 2)
    assert record is not None
    return record


def events_of(task_id: str) -> list[Event]:
    return [event for _, event in Outbox("TasksTable").events_after(task_id, 0)]


def ends_of_the_transfer(task_id: str) -> list[str]:
    """The statuses of the events that tell how the transfer has ended."""
    return [each.status for each in events_of(task_id) if (each.kind, each.step_id) == ("step_executed", "step_3")]


@pytest.fixture
def asked(aws: Cloud) -> Counter[str]:
    """How often each operation of the ledger was asked for."""
    operations: Counter[str] = Counter()
    for function in ("LedgerFunction", "LedgerTransferFunction"):
        aws.faults[function] = lambda event: operations.update([event["operation"]])
    return operations


@pytest.fixture
def missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The qubic service's event does not arrive."""
    monkeypatch.setattr("worker.confirmations._ended", lambda reference: None)


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.reconciler.GRACE_SECONDS", -1)


def reconcile(aws: Cloud) -> list[str]:
    found: list[str] = aws.invoke("ReconcilerFunction", {"detail-type": "Scheduled Event"})["reconciled"]
    return found


def check(aws: Cloud, task_id: str) -> str:
    """The compliance agent's verdict on the transfer."""
    return str(aws.invoke("CheckComplianceFunction", {"task_id": task_id, "step_index": 2})["verdict"])


def next_run(store: TaskStore, task_id: str) -> None:
    """The task fails, and somebody retries it."""
    store.end_task(task_id, "failed", actor="test", reason="the ledger has not confirmed it in time")
    store.retry(task_id, subject="alice")


def approve(store: TaskStore, task_id: str, plan: Plan, step_index: int, *, approved: bool = True) -> None:
    store.request_approval(task_id, step_index, plan.steps[step_index], "token", 60)
    store.decide(task_id, approved=approved, subject="bob", reason="because")


def balance(address: str) -> int:
    return int(call("LedgerFunction", {"operation": "balance", "address": address})["result"]["balance"])


def test_a_balance_is_read_and_the_record_has_its_hashes(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    answer = run(aws, task_id, 0)
    result = {"wallet_address": SOURCE, "balance": 1000}
    assert answer == {"step_id": "step_1", "status": "succeeded", "result": result, "error": None, "attempt": 1}
    record = store.step(task_id, 0)
    assert record is not None
    assert (record.input_hash, record.output_hash) == (hash_of(plan.steps[0].parameters), hash_of(result))
    assert record.duration_ms is not None
    assert record.duration_ms >= 0


def test_the_policy_in_force_is_compared_with_the_pinned_one(aws: Cloud, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    result = run(aws, task_id, 1)["result"]
    assert result["pinned"] is True
    assert result["policy_id"] == plan.policy.policy_id


@pytest.mark.parametrize(
    ("threshold", "alert", "message"),
    [
        (None, False, "balance 1000 QU; no alert_threshold was set"),
        (1000, False, "balance 1000 QU is not below the threshold of 1000 QU"),
        (1001, True, "balance 1000 QU is below the threshold of 1001 QU"),
    ],
)
def test_a_monitor_says_what_it_saw(
    aws: Cloud, plan_for: Plans, threshold: int | None, alert: bool, message: str
) -> None:
    parameters = {"wallet_address": SOURCE} | ({} if threshold is None else {"alert_threshold": threshold})
    task_id, _ = plan_for("monitor_wallet", parameters)
    result = run(aws, task_id, 2)["result"]
    assert (result["alert"], result["message"], result["balance"]) == (alert, message, 1000)


def test_a_monitor_without_a_wallet_fails_with_the_reason(aws: Cloud, plan_for: Plans) -> None:
    task_id, plan = plan_for("monitor_wallet", {})
    assert [step.type for step in plan.steps] == ["policy_check", "monitor_action"]
    answer = run(aws, task_id, 1)
    assert (answer["status"], answer["error"]) == ("failed", "no_wallet: there is no wallet_address to monitor")


def test_a_generic_action_leaves_a_receipt_on_the_ledger(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transaction", {"wallet_address": SOURCE, "anything": [1, "two"]})
    assert plan.steps[2].type == "generic_action"
    approve(store, task_id, plan, 2)
    answer = run(aws, task_id, 2)
    aws.settle()
    found = call("LedgerFunction", {"operation": "verify", "hash": answer["result"]["instruction_hash"]})["result"]
    assert (found["verified"], found["txid"]) == (True, answer["result"]["txid"])
    assert balance(SOURCE) == 1000


def test_a_transfer_is_submitted_and_has_succeeded_when_the_ledger_has_confirmed_it(
    aws: Cloud, store: TaskStore, plan_for: Plans, missed: None
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submitted = {"step_id": "step_3", "status": "submitted", "result": None, "error": None, "attempt": 1}
    assert [submit(aws, task_id) for _ in range(3)] == [submitted] * 3
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)
    aws.settle()
    done = run(aws, task_id, 2)
    assert (done["status"], done["attempt"]) == ("succeeded", 1)
    assert done["result"]["network"] == "mock"
    assert run(aws, task_id, 2) == submit(aws, task_id) == done
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    assert ends_of_the_transfer(task_id) == ["succeeded"]


def verdict_on(aws: Cloud, task_id: str) -> dict[str, Any]:
    answer: dict[str, Any] = aws.invoke("CheckComplianceFunction", {"task_id": task_id, "step_index": 2})
    return answer


def spend(amount: int, source: str = SOURCE, destination: str = DESTINATION) -> None:
    """Another task's transfer is signed; its tick has not come."""
    terms = {"source": source, "destination": destination, "amount": amount}
    LedgerClient("LedgerTransferFunction").transfer(reference="another", requester="olivia", **terms)


def test_compliance_denies_what_the_wallet_cannot_pay(aws: Cloud, plan_for: Plans) -> None:
    task_id, _ = plan_for("transfer_funds", TRANSFER | {"amount": 1001})
    verdict = verdict_on(aws, task_id)
    assert (verdict["verdict"], verdict["balance"]) == ("denied", None)
    assert verdict["reason"] == "insufficient_balance: the wallet holds 1000 QU; the transfer needs 1001 QU"


def test_compliance_denies_what_is_promised_elsewhere(aws: Cloud, plan_for: Plans) -> None:
    """600 of the 1,000 QU are in a transfer whose tick has not come."""
    spend(600)
    task_id, _ = plan_for("transfer_funds", TRANSFER | {"amount": 401})
    verdict = verdict_on(aws, task_id)
    assert verdict["verdict"] == "denied"
    assert "1000 QU, of which 600 QU are promised to other transfers; the transfer needs 401 QU" in verdict["reason"]
    task_id, _ = plan_for("transfer_funds", TRANSFER | {"amount": 400})
    verdict = verdict_on(aws, task_id)
    assert (verdict["verdict"], verdict["balance"]["balance"], verdict["balance"]["available"]) == (
        "await_approval", 1000, 400,
    )  # fmt: skip


def test_compliance_decides_nothing_without_a_balance(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    """An error, which the state machine tries again: neither a denial nor a request."""

    def down(event: Any) -> None:
        if event["operation"] == "check_transfer":
            raise ConnectionError("down")

    task_id, _ = plan_for("transfer_funds", TRANSFER | {"amount": 1001})
    aws.faults["LedgerFunction"] = down
    with pytest.raises(UnavailableError):
        verdict_on(aws, task_id)
    aws.faults.clear()
    assert verdict_on(aws, task_id)["verdict"] == "denied"
    assert store.approvals(task_id) == []


def test_compliance_denies_an_address_that_the_network_lacks(
    aws: Cloud, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RefusedError("invalid_address", "address: on mainnet an address is an identity of 60 letters")

    monkeypatch.setattr(LedgerClient, "check_transfer", refuse)
    task_id, _ = plan_for("transfer_funds", TRANSFER)
    assert verdict_on(aws, task_id)["reason"].startswith("invalid_address: ")


def test_compliance_denies_a_wallet_without_a_key(aws: Cloud, plan_for: Plans) -> None:
    """Its balance would cover the amount: it is not that which is missing."""
    spend(600, destination=KEYLESS)
    aws.settle()
    assert balance(KEYLESS) == 600
    task_id, _ = plan_for("transfer_funds", TRANSFER | {"wallet_address": KEYLESS})
    verdict = verdict_on(aws, task_id)
    assert (verdict["verdict"], verdict["balance"]) == ("denied", None)
    assert verdict["reason"] == "no_key: this service does not hold the key of the wallet that is to pay"


def test_compliance_denies_what_was_spent_since_the_approval(
    aws: Cloud, store: TaskStore, plan_for: Plans, asked: Counter[str]
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    assert verdict_on(aws, task_id)["verdict"] == "execute"
    spend(751)
    asked.clear()
    verdict = verdict_on(aws, task_id)
    assert verdict["verdict"] == "denied"
    assert verdict["reason"].startswith("insufficient_balance: the wallet holds 1000 QU, of which 751 QU are promised")
    assert store.step(task_id, 2) is None
    assert asked["transfer"] == 0


def test_compliance_needs_no_funds_for_a_submitted_transfer(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin's refusal is on record; its transfer has taken what the wallet held, and the task is retried."""
    task_id, plan = plan_for("transfer_funds", TRANSFER | {"amount": 600})
    approve(store, task_id, plan, 2)
    terms: dict[str, Any] = {}

    def refused(self: LedgerClient, **given: Any) -> Any:
        terms.update(given)
        raise RefusedError("insufficient_balance", "the source's balance is too small")

    with monkeypatch.context() as patch:
        patch.setattr(LedgerClient, "transfer", refused)
        assert submit(aws, task_id)["status"] == "failed"
    assert call("LedgerTransferFunction", {"operation": "transfer", **terms})["ok"]
    next_run(store, task_id)
    assert check(aws, task_id) == "await_approval"  # it is under way
    approve(store, task_id, plan, 2)
    aws.settle()
    assert balance(SOURCE) == 400
    assert check(aws, task_id) == "execute"  # it is confirmed
    submit(aws, task_id)
    assert (run(aws, task_id, 2)["status"], balance(SOURCE)) == ("succeeded", 400)


def test_compliance_reads_no_balance_where_no_money_moves(aws: Cloud, plan_for: Plans, asked: Counter[str]) -> None:
    task_id, _ = plan_for("transaction", {"wallet_address": SOURCE, "amount": 10**9})
    verdict = verdict_on(aws, task_id)
    assert (verdict["verdict"], verdict["balance"]) == ("await_approval", None)
    assert set(asked) == {"policy"}


def test_request_approval_keeps_the_balance_that_was_read(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    verdict = verdict_on(aws, task_id)
    event = {"task_id": task_id, "step_index": 2, "task_token": "token", "balance": verdict["balance"]}
    aws.invoke("RequestApprovalFunction", event)
    aws.invoke("RequestApprovalFunction", event | {"balance": None})  # the state was retried
    [approval] = store.approvals(task_id)
    assert approval.balance is not None
    assert approval.balance.model_dump() == verdict["balance"]
    assert (approval.balance.balance, approval.plan_hash) == (1000, plan.hash())


def test_a_transfer_that_expired_has_failed_and_a_retry_of_the_task_makes_it(
    aws: Cloud, store: TaskStore, plan_for: Plans
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    assert submit(aws, task_id)["status"] == "submitted"
    aws.settle()
    failed = run(aws, task_id, 2)
    assert (failed["status"], failed["error"].split(":")[0]) == ("failed", "expired")
    assert run(aws, task_id, 2) == submit(aws, task_id) == failed
    mock_chain(aws).set_faults(Faults())
    next_run(store, task_id)
    assert check(aws, task_id) == "await_approval"
    approve(store, task_id, plan, 2)
    assert submit(aws, task_id)["status"] == "submitted"
    aws.settle()
    assert (run(aws, task_id, 2)["status"], balance(DESTINATION)) == ("succeeded", 250)
    assert ends_of_the_transfer(task_id) == ["failed", "succeeded"]


def mock_chain(aws: Cloud) -> MockChain:
    return MockChain(genesis={}, table="ChainTable", clock=aws.clock, tick_milliseconds=1000)


# Asking is not acting


def test_only_the_state_that_submits_has_the_ledger_make_a_transfer(
    aws: Cloud, store: TaskStore, plan_for: Plans, asked: Counter[str], missed: None, no_grace: None
) -> None:
    """The transfer expires, and a later run would have it signed anew: whoever asks must not."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    submit(aws, task_id)
    aws.settle()
    mock_chain(aws).set_faults(Faults())
    next_run(store, task_id)
    asked.clear()
    answer = run(aws, task_id, 2)
    assert (answer["status"], answer["error"].split(":")[0]) == ("failed", "expired")
    assert asked == {"transfer_state": 1}
    assert run(aws, task_id, 2) == answer
    await_confirmation(aws, task_id)
    reconcile(aws)
    assert asked == {"transfer_state": 1}
    aws.settle()
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_who_asks_too_early_is_told_so_by_a_name_and_changes_nothing(
    aws: Cloud, store: TaskStore, plan_for: Plans, asked: Counter[str]
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    with pytest.raises(ConflictError, match="never handed in"):
        run(aws, task_id, 2)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    before = record_of(store, task_id)
    asked.clear()
    with pytest.raises(NotConfirmedYetError):
        run(aws, task_id, 2)
    assert (record_of(store, task_id), asked) == (before, {"transfer_state": 1})


def test_a_transfer_that_is_only_simulated_is_finished_at_once(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger does not keep it: nobody could ask for it later."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    simulated = {"state": "simulated", "txid": "x" * 60, "tick": 7, "network": "mainnet", "error": None}
    monkeypatch.setattr(LedgerClient, "transfer", lambda self, **terms: simulated)
    answer = submit(aws, task_id)
    assert (answer["status"], answer["result"]["network"]) == ("succeeded", "mainnet")
    assert "not sent" in answer["result"]["simulated"]
    assert run(aws, task_id, 2) == answer


def test_a_transfer_whose_handing_in_was_not_answered_is_not_refused_afterwards(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    transfer = LedgerClient.transfer

    def lost(self: LedgerClient, **terms: Any) -> Any:
        transfer(self, **terms)
        raise UnavailableError("the ledger did not answer")

    def refused(self: LedgerClient, **terms: Any) -> Any:
        raise RefusedError("no_key", "this wallet's key is not here any more")

    monkeypatch.setattr(LedgerClient, "transfer", lost)
    with pytest.raises(UnavailableError):
        submit(aws, task_id)
    monkeypatch.setattr(LedgerClient, "transfer", refused)
    assert submit(aws, task_id)["status"] == "submitted"
    aws.settle()
    assert (run(aws, task_id, 2)["status"], balance(DESTINATION)) == ("succeeded", 250)


def test_a_twin_that_was_refused_keeps_the_other_from_signing(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call still runs when the state tries again; the balance has changed in between."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    sign, twins = Submissions._sign, []

    def refuse(*_: Any) -> None:
        raise RefusedError("insufficient_balance", "the source's balance is too small")

    def meanwhile(it: Submissions, *arguments: Any) -> Any:
        if not twins:
            twins.append("begun")
            with monkeypatch.context() as patch:
                patch.setattr(Submissions, "_check_balance", refuse)
                twins.append(submit(aws, task_id)["status"])
        return sign(it, *arguments)

    monkeypatch.setattr(Submissions, "_sign", meanwhile)
    answer = submit(aws, task_id)
    assert (answer["status"], answer["error"].partition(":")[0]) == ("failed", "insufficient_balance")
    assert twins == ["begun", "failed"]
    aws.settle()
    assert balance(DESTINATION) == 0
    next_run(store, task_id)
    approve(store, task_id, plan, 2)
    assert submit(aws, task_id)["status"] == "submitted"
    aws.settle()
    assert (run(aws, task_id, 2)["status"], balance(DESTINATION)) == ("succeeded", 250)


# Waiting for the ledger


def await_confirmation(aws: Cloud, task_id: str, token: str = WAITER) -> dict[str, Any]:
    event = {"task_id": task_id, "step_index": 2, "task_token": token}
    answer: dict[str, Any] = aws.invoke("AwaitConfirmationFunction", event)
    return answer


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens that were woken; what Step Functions does with them is tested by the workflow's tests."""
    tokens: list[str] = []
    monkeypatch.setattr("qaes.adapters.transfers.wake", lambda token, output: tokens.append(token) or True)
    return tokens


def ended(task_id: str, outcome: str = "confirmed", txid: str = "x") -> dict[str, Any]:
    detail = {"task_id": task_id, "step_id": "step_3", "outcome": outcome, "txid": txid}
    return {"source": "qaes.qubic", "detail-type": "transfer_settled", "detail": detail}


def test_the_end_of_a_transfer_is_on_record_before_who_waits_is_woken(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    woken: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "qaes.adapters.transfers.wake",
        lambda token, output: woken.append((token, record_of(store, task_id).status)) or True,
    )
    assert await_confirmation(aws, task_id) == {"state": "under_way"}
    for outcome in ("confirmed", "expired"):  # it is not so
        assert aws.invoke("TransferEndedFunction", ended(task_id, outcome)) == {"status": "running"}
    assert woken == []
    aws.settle()  # and with it, the qubic service's event
    assert woken == [("a token", "succeeded")]


def test_who_comes_after_the_end_does_not_wait(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: list[str], missed: None
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    with pytest.raises(ConflictError, match="never handed in"):
        await_confirmation(aws, task_id)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    aws.settle()
    assert await_confirmation(aws, task_id) == {"state": "succeeded"}
    assert await_confirmation(aws, task_id, "another") == {"state": "succeeded"}
    assert woken == ["a token", "another"]
    assert ends_of_the_transfer(task_id) == ["succeeded"]


def test_the_newest_token_counts_and_is_forgotten_when_it_was_used(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: list[str]
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    await_confirmation(aws, task_id, "first")
    await_confirmation(aws, task_id, "second")
    key = {"pk": {"S": task_id}, "sk": {"S": "WAITER#002"}}
    kept = boto3.client("dynamodb").get_item(TableName="TasksTable", Key=key)["Item"]
    assert 7000 < int(kept["expires_at_epoch"]["N"]) - moment().timestamp() <= 7201  # when the state gives up
    store.forget_waiter(task_id, 2, "first")
    assert store.waiter(task_id, 2) == "second"
    aws.settle()
    assert woken == ["second"]
    assert store.waiter(task_id, 2) is None


def test_when_nobody_waits_any_more_the_end_is_on_record_all_the_same(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    await_confirmation(aws, task_id)
    monkeypatch.setattr("qaes.adapters.transfers.wake", lambda token, output: False)
    aws.settle()
    assert (record_of(store, task_id).status, store.waiter(task_id, 2)) == ("succeeded", None)


@pytest.mark.parametrize("by", ["event", "reconciler"])
def test_what_a_cancelled_task_has_done_is_put_on_record_once(
    aws: Cloud,
    store: TaskStore,
    plan_for: Plans,
    woken: list[str],
    no_grace: None,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    await_confirmation(aws, task_id)
    store.cancel(task_id, subject="alice", reason="changed my mind")
    assert reconcile(aws) == []
    with monkeypatch.context() as patch:
        if by == "reconciler":
            patch.setattr("worker.confirmations._ended", lambda reference: None)
        aws.settle()
    assert reconcile(aws) == ([task_id] if by == "reconciler" else [])
    record = record_of(store, task_id)
    assert (record.status, balance(DESTINATION), woken, store.waiter(task_id, 2)) == ("succeeded", 250, [WAITER], None)
    assert aws.invoke("TransferEndedFunction", ended(task_id)) == {"status": "succeeded"}
    assert reconcile(aws) == []
    assert record_of(store, task_id) == record
    assert ends_of_the_transfer(task_id) == ["succeeded"]
    assert store.get_task(task_id).status == "cancelled"


def test_a_step_that_waits_for_the_ledger_is_found_without_a_scan_until_it_is_finished(
    aws: Cloud, store: TaskStore, plan_for: Plans
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    run(aws, task_id, 0)
    assert store.transfers_under_way(-1) == []
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    assert store.transfers_under_way(-1) == [(task_id, record_of(store, task_id))]
    assert store.transfers_under_way(60) == []
    aws.settle()
    assert store.transfers_under_way(-1) == []


def test_a_task_that_was_cancelled_before_its_transfer_was_handed_in_pays_nothing(
    aws: Cloud, store: TaskStore, plan_for: Plans, no_grace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(fail_requests=50))
    with pytest.raises(Exception, match="ledger"):
        submit(aws, task_id)  # the intent is on record, the ledger did not answer
    mock_chain(aws).set_faults(Faults())
    store.cancel(task_id, subject="alice", reason="changed my mind")
    with pytest.raises(ConflictError, match="has ended"):
        submit(aws, task_id)
    assert reconcile(aws) == []  # a call may still be at the ledger
    assert record_of(store, task_id).status == "running"
    monkeypatch.setattr("qaes.adapters.transfers.LATE_SECONDS", -1)
    assert reconcile(aws) == [task_id]
    record = record_of(store, task_id)
    assert (record.status, str(record.error).split(":")[0]) == ("failed", "not_submitted")
    aws.settle()
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_the_end_of_a_transfer_of_no_task_or_no_begun_step_harms_nobody(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: list[str]
) -> None:
    task_id, _ = plan_for("transfer_funds", TRANSFER)
    for each in ("task_none", task_id):
        assert aws.invoke("TransferEndedFunction", ended(each)) == {"status": None}
    assert (woken, store.step(task_id, 2)) == ([], None)


def not_on_record(output: str) -> int:
    """How often the alarm's metric was told, with the alarm's own namespace and dimensions."""
    alarm = template()["Resources"]["TransferNotOnRecordAlarm"]["Properties"]
    wanted = {each["Name"]: each["Value"] for each in alarm["Dimensions"]}
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"_aws"')]
    found = [
        {name: line[name] for name in group["Dimensions"][0]} == wanted
        for line in lines
        for group in line["_aws"]["CloudWatchMetrics"]
        if alarm["MetricName"] in line and group["Namespace"] == resolve(alarm["Namespace"])
    ]
    assert all(found)
    return len(found)


def test_a_transfer_that_is_confirmed_after_its_step_has_failed_raises_an_alarm_and_a_retry_puts_it_right(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    terms: dict[str, Any] = {}

    def refused(self: LedgerClient, **given: Any) -> Any:
        terms.update(given)  # a twin has read the balance before it changed, and is slow
        raise RefusedError("insufficient_balance", "the source's balance is too small")

    with monkeypatch.context() as patch:
        patch.setattr(LedgerClient, "transfer", refused)
        assert submit(aws, task_id)["status"] == "failed"
    store.end_task(task_id, "failed", actor="test", reason="step 3 failed")
    assert call("LedgerTransferFunction", {"operation": "transfer", **terms})["ok"]
    assert not_on_record(capsys.readouterr().out) == 0
    aws.settle()
    assert (record_of(store, task_id).status, balance(DESTINATION)) == ("failed", 250)
    assert not_on_record(capsys.readouterr().out) == 1

    store.retry(task_id, subject="alice")
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    assert run(aws, task_id, 2)["status"] == "succeeded"
    aws.settle()
    assert (record_of(store, task_id).status, balance(DESTINATION)) == ("succeeded", 250)


def test_no_alarm_is_raised_for_a_transfer_that_is_on_record(
    aws: Cloud, store: TaskStore, plan_for: Plans, asked: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    aws.invoke("TransferEndedFunction", ended(task_id))  # nothing is known of it yet
    aws.settle()
    asked.clear()
    aws.invoke("TransferEndedFunction", ended(task_id, txid=record_of(store, task_id).result["txid"]))
    assert not asked
    assert not_on_record(capsys.readouterr().out) == 0


def test_transfer_ended_believes_the_ledger_not_the_event(
    aws: Cloud, store: TaskStore, plan_for: Plans, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever can put an event on the bus can neither end a step nor raise the alarm."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    aws.invoke("TransferEndedFunction", ended("task_none"))
    aws.invoke("TransferEndedFunction", ended("task_none", "expired"))
    aws.invoke("TransferEndedFunction", ended(task_id))
    assert store.step(task_id, 2) is None
    submit(aws, task_id)
    for outcome in ("confirmed", "failed"):
        aws.invoke("TransferEndedFunction", ended(task_id, outcome))
    assert record_of(store, task_id).status == "running"
    assert not_on_record(capsys.readouterr().out) == 0


def test_an_alarm_is_raised_for_a_transfer_of_no_step(aws: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    terms = {"source": SOURCE, "destination": DESTINATION, "amount": 10, "run": 1, "requester": "alice"}
    moved = {"operation": "transfer", "reference": "task_none#step_3", **terms}
    assert aws.invoke("LedgerTransferFunction", moved)["ok"]
    aws.settle()
    assert not_on_record(capsys.readouterr().out) == 1


def test_an_end_that_cannot_be_told_is_delivered_again(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskStore, "get_task", lambda *key: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        aws.invoke("TransferEndedFunction", ended("task_none"))


def test_who_has_no_time_left_for_a_call_of_the_ledger_begins_none(
    aws: Cloud,
    store: TaskStore,
    plan_for: Plans,
    asked: Counter[str],
    no_grace: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    asked.clear()
    monkeypatch.setattr(Context, "get_remaining_time_in_millis", lambda self: 29_000)
    assert reconcile(aws) == []
    assert not asked


def test_the_reconciler_finishes_what_everybody_missed_and_wakes_who_waits(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: list[str], missed: None, no_grace: None
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    await_confirmation(aws, task_id)
    assert reconcile(aws) == []
    aws.settle()
    assert woken == []
    assert reconcile(aws) == [task_id]
    assert (woken, record_of(store, task_id).status) == (["a token"], "succeeded")
    assert reconcile(aws) == []


def test_the_reconciler_wakes_for_who_finished_the_step_and_did_not_come_to_tell(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from agent_runtime import reconciler

    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    assert reconciler._wake(store.get_task(task_id), store) is False
    submit(aws, task_id)
    await_confirmation(aws, task_id)
    assert reconciler._wake(store.get_task(task_id), store) is False
    with monkeypatch.context() as patch:
        patch.setattr("qaes.adapters.transfers.tell", lambda *arguments: False)
        aws.settle()
    assert (record_of(store, task_id).status, woken) == ("succeeded", [])
    assert reconciler._wake(store.get_task(task_id), store) is True
    assert woken == ["a token"]
    assert reconciler._wake(store.get_task(task_id), store) is False


def test_an_execution_that_began_to_wait_while_the_ledger_was_asked_is_woken(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task had ended when it was read; it was retried since, and the token is the new execution's."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    store.end_task(task_id, "failed", actor="test", reason="the ledger has not confirmed it in time")
    state_of, retried = transfers.state_of, []

    def slow(*arguments: Any) -> Any:
        if not retried:
            retried.append(store.retry(task_id, subject="alice"))
            store.put_waiter(task_id, 2, "the new one's", expires_in=100, run=2)
        return state_of(*arguments)

    monkeypatch.setattr("qaes.adapters.transfers.state_of", slow)
    aws.settle()
    assert retried
    assert (record_of(store, task_id).status, woken) == ("succeeded", ["the new one's"])
    assert store.waiter(task_id, 2) is None


# An execution that finds what one before it has handed in


@pytest.mark.parametrize("known", ["under way", "confirmed", "on record"])
def test_a_later_execution_asks_nobody_about_a_transfer_that_was_let_through(
    aws: Cloud, store: TaskStore, plan_for: Plans, asked: Counter[str], monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    next_run(store, task_id)
    if known != "under way":
        with monkeypatch.context() as patch:
            if known == "confirmed":
                patch.setattr("worker.confirmations._ended", lambda reference: None)
            aws.settle()
    asked.clear()
    assert check(aws, task_id) == "execute"
    assert submit(aws, task_id)["status"] == ("submitted" if known == "under way" else "succeeded")
    assert set(asked) <= {"transfer_state"}
    aws.settle()
    done = run(aws, task_id, 2)
    # The first execution handed it in, under what was approved then: the entry says so.
    assert (done["status"], done["result"]["run"], done["attempt"]) == ("succeeded", 1, 1)
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    assert ends_of_the_transfer(task_id) == ["succeeded"]


def test_a_later_execution_pays_for_no_other_plan(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submit(aws, task_id)
    next_run(store, task_id)
    step = plan.steps[2]
    richer = step.model_copy(update={"parameters": step.parameters | {"amount": 999}})
    swapped = plan.model_copy(update={"steps": (*plan.steps[:2], richer)})
    item = {"pk": {"S": plan.plan_id}, "sk": {"S": "PLAN"}, "data": {"S": swapped.model_dump_json()}}
    boto3.client("dynamodb").put_item(TableName="TasksTable", Item=item)
    for act in (check, submit):
        with pytest.raises(ConflictError, match="not the one that was recorded"):
            act(aws, task_id)


def test_the_end_of_an_earlier_attempt_is_on_record_before_anybody_is_asked_anew(
    aws: Cloud, store: TaskStore, plan_for: Plans, missed: None
) -> None:
    """Else it could come in after the new approval, and the trail would read as if that one had been used up."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    submit(aws, task_id)
    aws.settle()
    next_run(store, task_id)
    assert record_of(store, task_id).status == "running"
    assert check(aws, task_id) == "await_approval"
    assert ends_of_the_transfer(task_id) == ["failed"]
    assert check(aws, task_id) == "await_approval"
    assert ends_of_the_transfer(task_id) == ["failed"]


def test_what_was_never_handed_in_is_decided_on_anew_by_a_later_execution(
    aws: Cloud, store: TaskStore, plan_for: Plans
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(fail_requests=50))
    with pytest.raises(Exception, match="ledger"):
        submit(aws, task_id)
    mock_chain(aws).set_faults(Faults())
    next_run(store, task_id)
    assert check(aws, task_id) == "await_approval"
    assert (submit(aws, task_id)["status"], balance(SOURCE)) == ("failed", 1000)  # the worker looks itself
    next_run(store, task_id)
    approve(store, task_id, plan, 2)
    assert check(aws, task_id) == "execute"
    assert submit(aws, task_id)["status"] == "submitted"
    aws.settle()
    record = record_of(store, task_id)
    assert (record.status, record.run, balance(DESTINATION)) == ("succeeded", 3, 250)


def test_the_late_end_of_an_earlier_attempt_is_not_taken_for_this_ones(
    aws: Cloud, store: TaskStore, plan_for: Plans, no_grace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the claim and the handing in, the ledger still tells of the attempt before."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    submit(aws, task_id)
    aws.settle()
    mock_chain(aws).set_faults(Faults())
    next_run(store, task_id)
    approve(store, task_id, plan, 2)

    def down(event: dict[str, Any]) -> None:
        if event["operation"] == "transfer":
            raise ConnectionError("down")

    aws.faults["LedgerTransferFunction"] = down
    with pytest.raises(UnavailableError):
        submit(aws, task_id)
    claimed = record_of(store, task_id)
    assert (claimed.status, claimed.run) == ("running", 2)
    assert aws.invoke("TransferEndedFunction", ended(task_id, "expired")) == {"status": "running"}
    reconcile(aws)
    assert record_of(store, task_id) == claimed
    del aws.faults["LedgerTransferFunction"]
    assert submit(aws, task_id)["status"] == "submitted"
    aws.invoke("TransferEndedFunction", ended(task_id, "expired"))
    assert record_of(store, task_id) == claimed
    aws.settle()
    assert (record_of(store, task_id).status, balance(DESTINATION)) == ("succeeded", 250)
    assert ends_of_the_transfer(task_id) == ["failed", "succeeded"]


def test_who_was_slow_to_tell_of_an_earlier_attempt_does_not_finish_the_later_one(
    store: TaskStore, plan_for: Plans
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    first = store.claim_step(task_id, 2, plan.steps[2], None, run=1, current=plan.policy)
    store.finish_step(task_id, first, result=None, error="expired: nothing was moved")
    next_run(store, task_id)
    second = store.claim_step(task_id, 2, plan.steps[2], None, run=2, current=plan.policy)
    assert store.finish_step(task_id, first, result=None, error="expired: nothing was moved") == second
    assert record_of(store, task_id) == second
    assert ends_of_the_transfer(task_id) == ["failed"]


# What may not run


def test_a_step_that_a_worker_lost_is_decided_on_anew_by_the_next_execution(
    aws: Cloud, store: TaskStore, plan_for: Plans
) -> None:
    task_id, plan = plan_for("monitor_wallet", {"wallet_address": SOURCE})
    store.claim_step(task_id, 2, plan.steps[2], None, run=1, current=plan.policy)
    next_run(store, task_id)
    approve(store, task_id, plan, 2, approved=False)
    refused = run(aws, task_id, 2)
    assert (refused["status"], refused["error"]) == ("failed", "an approver rejected it")
    # The trail tells a refusal from the outcome of what the first execution has begun.
    [told] = [each for each in events_of(task_id) if (each.kind, each.step_id) == ("step_executed", "step_3")]
    assert json.loads(told.output) == {"error": "an approver rejected it", "begun": False}


def test_a_transfer_that_nobody_approved_does_not_run_even_when_the_worker_is_called_by_itself(
    aws: Cloud, plan_for: Plans
) -> None:
    task_id, _ = plan_for("transfer_funds", TRANSFER)
    assert submit(aws, task_id)["status"] == "failed"
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_a_transfer_that_was_rejected_does_not_run(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2, approved=False)
    answer = submit(aws, task_id)
    assert (answer["status"], answer["error"]) == ("failed", "an approver rejected it")
    assert balance(SOURCE) == 1000


def test_a_balance_that_does_not_suffice_is_told_and_moves_nothing(
    aws: Cloud, store: TaskStore, plan_for: Plans
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER | {"amount": 1001})
    approve(store, task_id, plan, 2)
    answer = submit(aws, task_id)
    assert answer["status"] == "failed"
    assert "insufficient_balance" in answer["error"]
    assert submit(aws, task_id) == answer
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_a_refusal_does_not_overrule_an_attempt_that_is_at_work(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between this attempt's look and its claim, another one, which had its approval, has begun."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    store.claim_step(task_id, 2, plan.steps[2], None, run=1, current=plan.policy)
    look, first = TaskStore.step, iter([True])
    monkeypatch.setattr(TaskStore, "step", lambda *key: None if next(first, False) else look(*key))
    with pytest.raises(Exception, match="another attempt is at work"):
        submit(aws, task_id)
    record = store.step(task_id, 2)
    assert record is not None
    assert record.status == "running"
