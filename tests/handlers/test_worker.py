"""The worker on moto: each step type runs once, and only permitted steps run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import boto3
import pytest

from audit.recorder import Drained
from audit.store import Outbox
from qaes.adapters import audit_trail, transfers
from qaes.adapters.callbacks import Callback, CallbacksTable
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_repository import TaskStore
from qaes.domain import planning
from qaes.domain.canonical import hash_of
from qaes.domain.errors import (
    ApprovalExpiredError,
    ApprovalNeededError,
    ApprovalRejectedError,
    ConflictError,
    PermanentError,
    StepDeniedError,
    StepFailedError,
    TransientError,
)
from qaes.domain.ids import new_plan_id, timestamp
from qaes.domain.ids import now as moment
from qaes.domain.models import Event, Plan, StepRecord
from qaes.domain.policy import Policy
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.tasks.lifecycle import StepOutcome
from qubic.network.faults import Faults
from qubic.network.mock import MockChain
from qubic.transactions.submissions import Submissions
from qubic.wallets import Wallets
from tests.handlers.test_task_repository import claim, new_task
from tests.support.cloud import Cloud, Context, call, cloud
from tests.support.template import resolve, template
from tests.support.tokens import action_token

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"
KEYLESS = encode_identity(bytes([7]) * 32)
"""An identity that is no contract's, and whose key is nowhere."""
TRANSFER = {"wallet_address": SOURCE, "to_address": DESTINATION, "amount": 250}
Plans = Callable[..., tuple[str, Plan]]
CALLBACK_TOKEN = "a token"


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


Sent = list[tuple[str, dict[str, str]]]


@pytest.fixture(autouse=True)
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """Responses to callback tokens. The workflow tests cover the reaction of Step Functions."""
    answers: Sent = []
    monkeypatch.setattr("qaes.adapters.executions._send", lambda name, **said: answers.append((name, said)) or True)
    return answers


@pytest.fixture
def woken(sent: Sent) -> Callable[[], list[str]]:
    """The tokens that were answered."""
    return lambda: [said["taskToken"] for _, said in sent]


@pytest.fixture
def plan_for(aws: Cloud, store: TaskStore) -> Plans:
    """A task of that type under the ledger's policy, whose steps before the last have succeeded."""
    policy = Policy.model_validate(call("LedgerFunction", {"operation": "policy"})["result"])

    def make(task_type: str, parameters: dict[str, Any], *, begun: bool = True) -> tuple[str, Plan]:
        task, _ = store.start_task(new_task().model_copy(update={"task_type": task_type, "parameters": parameters}))
        analysis = planning.analyze(task_type, policy)
        plan = planning.build_plan(
            plan_id=new_plan_id(),
            task_id=task.task_id,
            created_at=timestamp(moment()),
            task_type=task_type,
            description=task.description,
            parameters=parameters,
            analysis=analysis,
            policy=policy.decide(analysis.action_type),
        )
        store.plan_task(task, plan)
        for step_index in range(len(plan.steps) - 1 if begun else 0):
            run(aws, task.task_id, step_index)
        return task.task_id, plan

    return make


def run(aws: Cloud, task_id: str, step_index: int) -> dict[str, Any]:
    """As the state RunStep does."""
    answer: dict[str, Any] = aws.invoke("RunStepFunction", {"task_id": task_id, "step_index": step_index})
    return answer


def act(aws: Cloud, task_id: str, token: str = CALLBACK_TOKEN) -> str:
    """As the state ExecuteAction does; the outcome."""
    answer: dict[str, Any] = aws.invoke("ExecuteActionFunction", {"task_id": task_id, "task_token": token})
    return str(answer["status"])


def record_of(store: TaskStore, task_id: str) -> StepRecord:
    record = store.step(task_id, 2)
    assert record is not None
    return record


def events_of(task_id: str) -> list[Event]:
    return list(Outbox("TasksTable").disclosed(task_id).values())


def ends_of_the_transfer(task_id: str) -> list[str]:
    """Return the statuses of the events with the transfer's end."""
    return [each.status for each in events_of(task_id) if (each.kind, each.step_id) == ("step_executed", "step_3")]


@pytest.fixture
def asked(aws: Cloud) -> Counter[str]:
    """Count the calls of each operation of the ledger."""
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
    """The compliance agent's verdict on the action, as the state AwaitApproval; it asks people if they must approve."""
    answer = aws.invoke("AwaitApprovalFunction", {"task_id": task_id, "task_token": CALLBACK_TOKEN})
    return VERDICTS.get(answer.get("status"), answer.get("verdict"))


VERDICTS = {
    StepDeniedError.__name__: "denied",
    ApprovalRejectedError.__name__: "rejected",
    ApprovalExpiredError.__name__: "expired",
}


def next_run(store: TaskStore, task_id: str) -> None:
    """Fail the task, and retry it."""
    store.end_task(task_id, "failed", actor="test", reason="the ledger has not confirmed it in time")
    store.retry(task_id, subject="alice")


def approve(store: TaskStore, task_id: str, plan: Plan, step_index: int, *, approved: bool = True) -> None:
    store.request_approval(store.get_task(task_id), plan, step_index, "token", 60)
    store.decide(task_id, approved=approved, subject="bob", reason="because")


def balance(address: str) -> int:
    return int(call("LedgerFunction", {"operation": "balance", "address": address})["result"]["balance"])


def test_balance_is_read_and_the_record_has_its_hashes(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER, begun=False)
    assert run(aws, task_id, 0) == {"step_id": "step_1", "status": "succeeded", "attempt": 1}
    result = {"wallet_address": SOURCE, "balance": 1000}
    record = store.step(task_id, 0)
    assert record is not None
    assert (record.result, record.error) == (result, None)
    assert (record.input_hash, record.output_hash) == (hash_of(plan.steps[0].parameters), hash_of(result))
    assert record.duration_ms is not None
    assert record.duration_ms >= 0


def test_run_step_writes_one_transaction_after_one_call(
    aws: Cloud, store: TaskStore, plan_for: Plans, asked: Counter[str]
) -> None:
    task_id, _ = plan_for("monitor_wallet", {"wallet_address": SOURCE}, begun=False)
    for step_index in range(3):
        before = store.get_task(task_id)
        run(aws, task_id, step_index)
        assert store.get_task(task_id).version == before.version + 1
    assert asked == {"policy": 3}
    steps = ["step_started", "step_executed"]
    assert [event.kind for event in events_of(task_id)[-7:]] == [*steps * 3, "task_ended"]
    assert store.get_task(task_id).status == "completed"


def test_run_step_called_again_returns_the_record(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, _ = plan_for("monitor_wallet", {"wallet_address": SOURCE}, begun=False)
    first = run(aws, task_id, 0)
    before = store.get_task(task_id)
    assert run(aws, task_id, 0) == first
    assert store.get_task(task_id) == before


def test_run_step_runs_no_step_before_its_turn(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, _ = plan_for("monitor_wallet", {"wallet_address": SOURCE}, begun=False)
    with pytest.raises(ConflictError, match="an earlier step"):
        run(aws, task_id, 1)
    assert store.steps(task_id) == []


def test_run_step_runs_no_step_with_an_effect(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    with pytest.raises(ConflictError, match="has an effect"):
        run(aws, task_id, 2)
    assert (store.step(task_id, 2), balance(SOURCE)) == (None, 1000)


def test_run_step_records_nothing_when_the_ledger_is_down(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, _ = plan_for("monitor_wallet", {"wallet_address": SOURCE}, begun=False)
    before = store.get_task(task_id)

    def down(event: Any) -> None:
        raise ConnectionError("down")

    aws.faults["LedgerFunction"] = down
    with pytest.raises(TransientError):
        run(aws, task_id, 0)
    assert (store.get_task(task_id), store.steps(task_id)) == (before, [])


def test_policy_in_force_is_compared_with_the_pinned_one(store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    record = store.step(task_id, 1)
    assert record is not None and record.result is not None
    assert record.result["pinned"] is True
    assert record.result["policy_id"] == plan.policy.policy_id


@pytest.mark.parametrize(
    ("threshold", "alert", "message"),
    [
        (None, False, "balance 1000 QU; no alert_threshold is set"),
        (1000, False, "balance 1000 QU is not below the threshold of 1000 QU"),
        (1001, True, "balance 1000 QU is below the threshold of 1001 QU"),
    ],
)
def test_monitor_reports_its_observation(
    aws: Cloud, store: TaskStore, plan_for: Plans, threshold: int | None, alert: bool, message: str
) -> None:
    parameters = {"wallet_address": SOURCE} | ({} if threshold is None else {"alert_threshold": threshold})
    task_id, _ = plan_for("monitor_wallet", parameters)
    run(aws, task_id, 2)
    result = record_of(store, task_id).result or {}
    assert (result["alert"], result["message"], result["balance"]) == (alert, message, 1000)


def test_monitor_without_a_wallet_fails_with_the_reason(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("monitor_wallet", {})
    assert [step.type for step in plan.steps] == ["policy_check", "monitor_action"]
    reason = "no_wallet: the task has no `wallet_address` to monitor"
    for _ in range(2):
        with pytest.raises(StepFailedError, match=reason):
            run(aws, task_id, 1)
    record, task = store.step(task_id, 1), store.get_task(task_id)
    assert record is not None and (record.status, record.error) == ("failed", reason)
    assert (task.status, task.failed_step, task.reason) == ("failed", "step_2", reason)


def test_generic_action_leaves_a_receipt_on_the_ledger(
    aws: Cloud, store: TaskStore, plan_for: Plans, sent: Sent
) -> None:
    task_id, plan = plan_for("transaction", {"wallet_address": SOURCE, "anything": [1, "two"]})
    assert plan.steps[2].type == "generic_action"
    approve(store, task_id, plan, 2)
    assert act(aws, task_id) == "succeeded"
    result = record_of(store, task_id).result or {}
    aws.settle()
    found = call("LedgerFunction", {"operation": "verify", "hash": result["instruction_hash"]})["result"]
    assert (found["verified"], found["txid"]) == (True, result["txid"])
    assert (sent[-1][0], action_token(task_id)) == ("send_task_success", None)
    assert store.get_task(task_id).status == "completed"
    assert balance(SOURCE) == 1000


def test_transfer_succeeds_after_confirmation(aws: Cloud, store: TaskStore, plan_for: Plans, missed: None) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    assert [act(aws, task_id) for _ in range(3)] == ["submitted"] * 3
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)
    aws.settle()
    assert act(aws, task_id) == "succeeded"
    done = record_of(store, task_id)
    assert (done.attempt, (done.result or {})["network"], store.get_task(task_id).status) == (1, "mock", "completed")
    assert (act(aws, task_id), record_of(store, task_id)) == ("succeeded", done)
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    assert ends_of_the_transfer(task_id) == ["succeeded"]


def verdict_on(aws: Cloud, task_id: str, sent: Sent) -> dict[str, Any]:
    """The verdict with its reason, and the balance that the approver sees."""
    verdict = check(aws, task_id)
    if verdict == "denied":
        return {"verdict": verdict, "reason": sent[-1][1]["cause"], "balance": None}
    approval = TaskStore("TasksTable").open_approval(task_id)
    found = approval.balance.model_dump() if approval and approval.balance else None
    return {"verdict": verdict, "balance": found}


def spend(amount: int, source: str = SOURCE, destination: str = DESTINATION) -> None:
    """Another task's transfer is signed; its tick has not come."""
    terms = {"source": source, "destination": destination, "amount": amount}
    LedgerClient("LedgerTransferFunction").transfer(reference="another", requester="olivia", **terms)


def test_compliance_denies_unpayable_transfer(aws: Cloud, plan_for: Plans, sent: Sent) -> None:
    task_id, _ = plan_for("transfer_funds", TRANSFER | {"amount": 1001})
    verdict = verdict_on(aws, task_id, sent)
    assert (verdict["verdict"], verdict["balance"]) == ("denied", None)
    assert verdict["reason"] == "insufficient_balance: the wallet holds 1000 QU; the transfer needs 1001 QU"


def test_compliance_denies_amount_promised_to_transfers(aws: Cloud, plan_for: Plans, sent: Sent) -> None:
    """600 of the 1,000 QU are in a transfer whose tick has not come."""
    spend(600)
    task_id, _ = plan_for("transfer_funds", TRANSFER | {"amount": 401})
    verdict = verdict_on(aws, task_id, sent)
    assert verdict["verdict"] == "denied"
    assert "1000 QU, of which 600 QU are promised to other transfers; the transfer needs 401 QU" in verdict["reason"]
    task_id, _ = plan_for("transfer_funds", TRANSFER | {"amount": 400})
    verdict = verdict_on(aws, task_id, sent)
    assert (verdict["verdict"], verdict["balance"]["balance"], verdict["balance"]["available"]) == (
        "pending", 1000, 400,
    )  # fmt: skip


def test_compliance_decides_nothing_without_a_balance(
    aws: Cloud, store: TaskStore, plan_for: Plans, sent: Sent
) -> None:
    """An error, which the state machine tries again: neither a denial nor a request."""

    def down(event: Any) -> None:
        if event.get("transfer"):
            raise ConnectionError("down")

    task_id, _ = plan_for("transfer_funds", TRANSFER | {"amount": 1001})
    aws.faults["LedgerFunction"] = down
    with pytest.raises(TransientError):
        verdict_on(aws, task_id, sent)
    aws.faults.clear()
    assert verdict_on(aws, task_id, sent)["verdict"] == "denied"
    assert store.approvals(task_id) == []


def test_compliance_denies_an_address_that_the_network_lacks(
    aws: Cloud, plan_for: Plans, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LedgerClient, **terms: Any) -> Any:
        both = self.policies(terms["action"], pinned=terms["pinned"])
        return both, PermanentError("invalid_address", "address: on mainnet it is an identity of 60 letters")

    monkeypatch.setattr(LedgerClient, "policy_and_check", refuse)
    task_id, _ = plan_for("transfer_funds", TRANSFER)
    assert verdict_on(aws, task_id, sent)["reason"].startswith("invalid_address: ")


def test_compliance_denies_a_wallet_without_a_key(aws: Cloud, plan_for: Plans, sent: Sent) -> None:
    """The balance covers the amount, so the denial has another reason."""
    spend(600, destination=KEYLESS)
    aws.settle()
    assert balance(KEYLESS) == 600
    task_id, _ = plan_for("transfer_funds", TRANSFER | {"wallet_address": KEYLESS})
    verdict = verdict_on(aws, task_id, sent)
    assert (verdict["verdict"], verdict["balance"]) == ("denied", None)
    assert verdict["reason"] == "no_key: this service does not hold the key of the source wallet"


def test_compliance_denies_amount_spent_since_approval(
    aws: Cloud, store: TaskStore, plan_for: Plans, asked: Counter[str], sent: Sent
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    assert verdict_on(aws, task_id, sent)["verdict"] == "execute"
    spend(751)
    verdict = verdict_on(aws, task_id, sent)
    assert verdict["verdict"] == "denied"
    assert verdict["reason"].startswith("insufficient_balance: the wallet holds 1000 QU, of which 751 QU are promised")
    assert act(aws, task_id) == "StepDeniedError"
    assert sent[-1][1]["cause"] == verdict["reason"]
    assert (store.step(task_id, 2), action_token(task_id)) == (None, None)
    assert asked["transfer"] == 1  # the other task's


def test_compliance_needs_no_funds_for_a_submitted_transfer(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A concurrent call's refusal is recorded; its transfer has emptied the wallet, and the task is retried."""
    task_id, plan = plan_for("transfer_funds", TRANSFER | {"amount": 600})
    approve(store, task_id, plan, 2)
    terms: dict[str, Any] = {}

    def refused(self: LedgerClient, **given: Any) -> Any:
        terms.update(given)
        raise PermanentError("insufficient_balance", "the source's balance is too small")

    with monkeypatch.context() as patch:
        patch.setattr(LedgerClient, "transfer", refused)
        assert act(aws, task_id) == "StepFailedError"
    assert call("LedgerTransferFunction", {"operation": "transfer", **terms})["ok"]
    next_run(store, task_id)
    assert check(aws, task_id) == "pending"  # it is in flight
    approve(store, task_id, plan, 2)
    aws.settle()
    assert balance(SOURCE) == 400
    assert check(aws, task_id) == "execute"  # it is confirmed
    assert (act(aws, task_id), balance(SOURCE)) == ("succeeded", 400)


def test_compliance_reads_no_balance_where_no_money_moves(
    aws: Cloud, plan_for: Plans, asked: Counter[str], sent: Sent
) -> None:
    task_id, _ = plan_for("transaction", {"wallet_address": SOURCE, "amount": 10**9})
    asked.clear()
    verdict = verdict_on(aws, task_id, sent)
    assert (verdict["verdict"], verdict["balance"]) == ("pending", None)
    assert asked == {"policy": 1}


def test_request_approval_keeps_the_balance_that_was_read(
    aws: Cloud, store: TaskStore, plan_for: Plans, sent: Sent
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    verdict = verdict_on(aws, task_id, sent)
    spend(100)
    assert verdict_on(aws, task_id, sent) == verdict  # the state was retried
    [approval] = store.approvals(task_id)
    assert approval.balance is not None
    assert (approval.balance.balance, approval.balance.available, approval.plan_hash) == (1000, 1000, plan.hash())


def test_retry_repeats_expired_transfer(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    assert act(aws, task_id) == "submitted"
    aws.settle()
    failed, task = record_of(store, task_id), store.get_task(task_id)
    assert (failed.status, str(failed.error).split(":")[0]) == ("failed", "expired")
    assert (task.status, task.failed_step, task.reason) == ("failed", "step_3", failed.error)
    assert (act(aws, task_id), record_of(store, task_id)) == ("StepFailedError", failed)
    mock_chain(aws).set_faults(Faults())
    next_run(store, task_id)
    assert check(aws, task_id) == "pending"
    approve(store, task_id, plan, 2)
    assert act(aws, task_id) == "submitted"
    aws.settle()
    assert (record_of(store, task_id).status, balance(DESTINATION)) == ("succeeded", 250)
    assert ends_of_the_transfer(task_id) == ["failed", "succeeded"]


def raise_always(event: Any) -> None:
    raise ConnectionError("down")


def mock_chain(aws: Cloud) -> MockChain:
    return MockChain(genesis={}, table="ChainTable", clock=aws.clock, tick_milliseconds=1000)


# Asking is not acting


def test_only_submitting_state_can_request_transfer(
    aws: Cloud, store: TaskStore, plan_for: Plans, asked: Counter[str], missed: None, no_grace: None
) -> None:
    """The transfer expires, and a later run would sign it again: a read must not."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    act(aws, task_id)
    aws.settle()
    mock_chain(aws).set_faults(Faults())
    next_run(store, task_id)
    asked.clear()
    assert check(aws, task_id) == "pending"
    assert str(record_of(store, task_id).error).split(":")[0] == "expired"
    reconcile(aws)
    assert (asked["transfer_state"], asked["transfer"]) == (1, 0)
    aws.settle()
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_execute_action_called_again_waits_and_changes_nothing(
    aws: Cloud, store: TaskStore, plan_for: Plans, sent: Sent
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    before = (record_of(store, task_id), store.get_task(task_id), balance(SOURCE))
    assert act(aws, task_id, "another") == "submitted"
    assert (record_of(store, task_id), store.get_task(task_id), balance(SOURCE)) == before
    assert (action_token(task_id), sent) == ("another", [])


# On record before the effect


@pytest.fixture
def stream_is_late(aws: Cloud) -> list[str]:
    """Record the calls to the audit trail and to the ledger, in order."""
    order: list[str] = []
    aws.faults["RecordEventsFunction"] = lambda event: order.append("record")
    aws.faults["LedgerTransferFunction"] = lambda event: order.append(event["operation"])
    return order


@pytest.mark.parametrize("task_type", ["transfer_funds", "transaction"])
def test_intent_is_on_record_before_the_effect(
    aws: Cloud, store: TaskStore, plan_for: Plans, stream_is_late: list[str], task_type: str
) -> None:
    task_id, plan = plan_for(task_type, TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    assert stream_is_late == ["record", "transfer" if task_type == "transfer_funds" else "record_instruction"]
    act(aws, task_id)
    assert stream_is_late.count("record") == 1, "a recorded entry is not recorded again"


def test_no_recorder_is_invoked_when_the_stream_was_in_time(
    aws: Cloud, store: TaskStore, plan_for: Plans, stream_is_late: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    claimed = TaskStore.claim_step

    def then_the_stream(*arguments: Any, **named: Any) -> Any:
        claim = claimed(*arguments, **named)
        call("RecordEventsFunction", {"task_id": task_id})
        return claim

    monkeypatch.setattr(TaskStore, "claim_step", then_the_stream)
    assert act(aws, task_id) == "submitted"
    assert stream_is_late == ["transfer"]


@pytest.mark.parametrize("task_type", ["transfer_funds", "transaction"])
def test_no_effect_after_a_cancel_while_the_intent_is_recorded(
    aws: Cloud,
    store: TaskStore,
    plan_for: Plans,
    stream_is_late: list[str],
    monkeypatch: pytest.MonkeyPatch,
    task_type: str,
) -> None:
    task_id, plan = plan_for(task_type, TRANSFER)
    approve(store, task_id, plan, 2)
    ensure = audit_trail.ensure_recorded

    def meanwhile_cancelled(*arguments: Any, **named: Any) -> None:
        ensure(*arguments, **named)
        TaskStore().cancel(task_id, subject="alice", reason="a mistake")

    monkeypatch.setattr(audit_trail, "ensure_recorded", meanwhile_cancelled)
    with pytest.raises(ConflictError, match="the task has ended: cancelled"):
        act(aws, task_id)
    assert stream_is_late == ["record"]


@pytest.mark.parametrize("recorder", ["fails", "lies"])
def test_no_effect_without_the_intent_on_record(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch, recorder: str
) -> None:
    """The recorder's response is not trusted: the table is read."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    with monkeypatch.context() as patch:
        patch.setattr("audit.recorder.Recorder.drain", lambda *_: 1 / 0 if recorder == "fails" else Drained(9, 99))
        for _ in range(2):
            with pytest.raises(TransientError):
                act(aws, task_id)
    assert record_of(store, task_id).status == "running"
    assert aws.invocations["LedgerTransferFunction"] == 0
    assert act(aws, task_id) == "submitted"


def test_simulated_transfer_is_finished_at_once(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger does not store it, so no caller could read it later."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    simulated = {"state": "simulated", "txid": "x" * 60, "tick": 7, "network": "mainnet", "error": None}
    monkeypatch.setattr(LedgerClient, "transfer", lambda self, **terms: simulated)
    assert act(aws, task_id) == "succeeded"
    result = record_of(store, task_id).result or {}
    assert (result["network"], store.get_task(task_id).status) == ("mainnet", "completed")
    assert "not sent" in result["simulated"]
    assert act(aws, task_id) == "succeeded"


def test_unanswered_transfer_is_not_rejected_later(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    transfer = LedgerClient.transfer

    def lost(self: LedgerClient, **terms: Any) -> Any:
        transfer(self, **terms)
        raise TransientError("the ledger did not answer")

    def keyless(*_: Any) -> Any:
        raise PermanentError("no_key", "this wallet's key is not here any more")

    with monkeypatch.context() as patch:
        patch.setattr(LedgerClient, "transfer", lost)
        with pytest.raises(TransientError):
            act(aws, task_id)
    monkeypatch.setattr(Wallets, "_held", keyless)
    assert act(aws, task_id) == "submitted"
    aws.settle()
    assert (record_of(store, task_id).status, balance(DESTINATION)) == ("succeeded", 250)


def test_twin_that_was_refused_keeps_the_other_from_signing(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call still runs when the state tries again; the balance has changed in between."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    sign, twins = Submissions._sign, []

    def refuse(*_: Any) -> None:
        raise PermanentError("insufficient_balance", "the source's balance is too small")

    def meanwhile(it: Submissions, *arguments: Any) -> Any:
        if not twins:
            twins.append("begun")
            with monkeypatch.context() as patch:
                patch.setattr(Submissions, "_check_balance", refuse)
                twins.append(act(aws, task_id))
        return sign(it, *arguments)

    monkeypatch.setattr(Submissions, "_sign", meanwhile)
    assert act(aws, task_id) == "StepFailedError"
    assert str(record_of(store, task_id).error).startswith("insufficient_balance:")
    assert twins == ["begun", "StepFailedError"]
    aws.settle()
    assert balance(DESTINATION) == 0
    next_run(store, task_id)
    approve(store, task_id, plan, 2)
    assert act(aws, task_id) == "submitted"
    aws.settle()
    assert (record_of(store, task_id).status, balance(DESTINATION)) == ("succeeded", 250)


# Waiting for the ledger


def ended(task_id: str, outcome: str = "confirmed", txid: str = "x") -> dict[str, Any]:
    detail = {"task_id": task_id, "step_id": "step_3", "outcome": outcome, "txid": txid}
    return {"source": "qaes.qubic", "detail-type": "transfer_settled", "detail": detail}


def test_transfer_end_recorded_before_execution_resumes(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    answers: list[tuple[str, str, str]] = []

    def send(operation: str, **said: str) -> bool:
        answers.append((operation, said["taskToken"], record_of(store, task_id).status))
        return True

    monkeypatch.setattr("qaes.adapters.executions._send", send)
    assert act(aws, task_id) == "submitted"
    for outcome in ("confirmed", "expired"):  # it is not so
        assert aws.invoke("ExecuteActionFunction", ended(task_id, outcome)) == {"status": "running"}
    assert answers == []
    aws.settle()  # and with it, the qubic service's event
    assert answers == [("send_task_success", CALLBACK_TOKEN, "succeeded")]
    assert store.get_task(task_id).status == "completed"


def test_attempt_after_the_end_does_not_wait(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: Callable[[], list[str]], missed: None
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    aws.settle()
    assert [act(aws, task_id, "second"), act(aws, task_id, "third")] == ["succeeded"] * 2
    assert (woken(), action_token(task_id)) == (["second", "third"], None)
    assert ends_of_the_transfer(task_id) == ["succeeded"]


def test_end_before_the_token_is_kept_is_answered(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between this attempt's look at the step and its token, the end of the one before is put on record."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    put = CallbacksTable.wait

    def settled_first(*arguments: Any, **named: Any) -> None:
        aws.settle()
        put(*arguments, **named)

    monkeypatch.setattr(CallbacksTable, "wait", settled_first)
    assert act(aws, task_id, "second") == "succeeded"
    assert woken() == [CALLBACK_TOKEN, "second"]


def test_failure_before_the_token_is_kept_is_the_step_s(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An execution that should wait for an earlier transfer makes no transfer itself."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    act(aws, task_id)
    next_run(store, task_id)
    put = CallbacksTable.wait

    def settled_first(*arguments: Any, **named: Any) -> None:
        aws.settle()
        put(*arguments, **named)

    monkeypatch.setattr(CallbacksTable, "wait", settled_first)
    assert act(aws, task_id, "second") == "StepFailedError"
    assert (record_of(store, task_id).run, action_token(task_id)) == (1, None)


def test_newest_token_counts_and_is_deleted_after_use(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: Callable[[], list[str]]
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id, "first")
    act(aws, task_id, "second")
    key = {"pk": {"S": task_id}, "sk": {"S": "ACTION#002"}}
    kept = boto3.client("dynamodb").get_item(TableName="CallbacksTable", Key=key)["Item"]
    assert 7000 < int(kept["expires_at_epoch"]["N"]) - moment().timestamp() <= 7201  # when the state gives up
    CallbacksTable().forget("ACTION", task_id, 2, "first")
    assert action_token(task_id) == "second"
    aws.settle()
    assert woken() == ["second"]
    assert action_token(task_id) is None


def test_transfer_end_recorded_when_no_execution_waits(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    monkeypatch.setattr("qaes.adapters.executions._send", lambda *_, **__: False)
    aws.settle()
    assert (record_of(store, task_id).status, action_token(task_id)) == ("succeeded", None)


@pytest.mark.parametrize("by", ["event", "reconciler"])
def test_cancelled_tasks_transfer_is_recorded_once(
    aws: Cloud,
    store: TaskStore,
    plan_for: Plans,
    woken: Callable[[], list[str]],
    no_grace: None,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    store.cancel(task_id, subject="alice", reason="changed my mind")
    assert reconcile(aws) == []
    with monkeypatch.context() as patch:
        if by == "reconciler":
            patch.setattr("worker.confirmations._ended", lambda reference: None)
        aws.settle()
    assert reconcile(aws) == ([task_id] if by == "reconciler" else [])
    record = record_of(store, task_id)
    assert (record.status, balance(DESTINATION)) == ("succeeded", 250)
    assert (woken(), action_token(task_id)) == ([CALLBACK_TOKEN], None)
    assert aws.invoke("ExecuteActionFunction", ended(task_id)) == {"status": "succeeded"}
    assert reconcile(aws) == []
    assert record_of(store, task_id) == record
    assert ends_of_the_transfer(task_id) == ["succeeded"]
    assert store.get_task(task_id).status == "cancelled"


def test_waiting_step_is_found_without_scan(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    run(aws, task_id, 0)
    assert store.transfers_in_flight(-1) == []
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    assert store.transfers_in_flight(-1) == [(task_id, record_of(store, task_id))]
    assert store.transfers_in_flight(60) == []
    aws.settle()
    assert store.transfers_in_flight(-1) == []


def test_cancel_before_transfer_pays_nothing(
    aws: Cloud, store: TaskStore, plan_for: Plans, no_grace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    aws.faults["LedgerTransferFunction"] = raise_always
    with pytest.raises(TransientError, match="ledger"):
        act(aws, task_id)  # the intent is on record, the ledger did not answer
    del aws.faults["LedgerTransferFunction"]
    store.cancel(task_id, subject="alice", reason="changed my mind")
    with pytest.raises(ConflictError, match="has ended"):
        act(aws, task_id)
    assert reconcile(aws) == []  # a call may still be at the ledger
    assert record_of(store, task_id).status == "running"
    monkeypatch.setattr("qaes.adapters.transfers.LATE_SECONDS", -1)
    assert reconcile(aws) == [task_id]
    record = record_of(store, task_id)
    assert (record.status, str(record.error).split(":")[0]) == ("failed", "not_submitted")
    aws.settle()
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_end_of_unknown_transfer_is_ignored(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: Callable[[], list[str]]
) -> None:
    task_id, _ = plan_for("transfer_funds", TRANSFER)
    for each in ("task_none", task_id):
        assert aws.invoke("ExecuteActionFunction", ended(each)) == {"status": None}
    assert (woken(), store.step(task_id, 2)) == ([], None)


def not_on_record(output: str) -> int:
    """Count the alarm's metric, with the alarm's namespace and dimensions."""
    alarm = template()["Resources"]["UnrecordedTransferAlarm"]["Properties"]
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


def test_late_confirmed_transfer_raises_alarm_and_retry_repairs(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    terms: dict[str, Any] = {}

    def refused(self: LedgerClient, **given: Any) -> Any:
        terms.update(given)  # a twin has read the balance before it changed, and is slow
        raise PermanentError("insufficient_balance", "the source's balance is too small")

    with monkeypatch.context() as patch:
        patch.setattr(LedgerClient, "transfer", refused)
        assert act(aws, task_id) == "StepFailedError"
    store.end_task(task_id, "failed", actor="test", reason="step 3 failed")
    assert call("LedgerTransferFunction", {"operation": "transfer", **terms})["ok"]
    assert not_on_record(capsys.readouterr().out) == 0
    aws.settle()
    assert (record_of(store, task_id).status, balance(DESTINATION)) == ("failed", 250)
    assert not_on_record(capsys.readouterr().out) == 1

    store.retry(task_id, subject="alice")
    approve(store, task_id, plan, 2)
    assert act(aws, task_id) == "succeeded"
    aws.settle()
    assert (record_of(store, task_id).status, balance(DESTINATION)) == ("succeeded", 250)


def test_recorded_transfer_raises_no_alarm(
    aws: Cloud, store: TaskStore, plan_for: Plans, asked: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    aws.invoke("ExecuteActionFunction", ended(task_id))  # nothing is known of it yet
    aws.settle()
    asked.clear()
    aws.invoke("ExecuteActionFunction", ended(task_id, txid=record_of(store, task_id).result["txid"]))
    assert not asked
    assert not_on_record(capsys.readouterr().out) == 0


def test_transfer_ended_believes_the_ledger_not_the_event(
    aws: Cloud, store: TaskStore, plan_for: Plans, capsys: pytest.CaptureFixture[str]
) -> None:
    """A role that can put events on the bus can neither end a step nor raise the alarm."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    aws.invoke("ExecuteActionFunction", ended("task_none"))
    aws.invoke("ExecuteActionFunction", ended("task_none", "expired"))
    aws.invoke("ExecuteActionFunction", ended(task_id))
    assert store.step(task_id, 2) is None
    act(aws, task_id)
    for outcome in ("confirmed", "failed"):
        aws.invoke("ExecuteActionFunction", ended(task_id, outcome))
    assert record_of(store, task_id).status == "running"
    assert not_on_record(capsys.readouterr().out) == 0


def test_alarm_is_raised_for_a_transfer_of_no_step(aws: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    terms = {"source": SOURCE, "destination": DESTINATION, "amount": 10, "run": 1, "requester": "alice"}
    moved = {"operation": "transfer", "reference": "task_none#step_3", **terms}
    assert aws.invoke("LedgerTransferFunction", moved)["ok"]
    aws.settle()
    assert not_on_record(capsys.readouterr().out) == 1


def test_undeliverable_end_is_delivered_again(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskStore, "get_task", lambda *key: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        aws.invoke("ExecuteActionFunction", ended("task_none"))


def test_ledger_call_not_started_without_time_left(
    aws: Cloud,
    store: TaskStore,
    plan_for: Plans,
    asked: Counter[str],
    no_grace: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    asked.clear()
    monkeypatch.setattr(Context, "get_remaining_time_in_millis", lambda self: 29_000)
    assert reconcile(aws) == []
    assert not asked


def test_reconciler_finishes_missed_steps_and_resumes(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: Callable[[], list[str]], missed: None, no_grace: None
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    assert reconcile(aws) == []
    aws.settle()
    assert woken() == []
    assert reconcile(aws) == [task_id]
    assert (woken(), record_of(store, task_id).status) == (["a token"], "succeeded")
    assert reconcile(aws) == []


def test_reconciler_resumes_when_message_was_lost(
    aws: Cloud,
    store: TaskStore,
    plan_for: Plans,
    woken: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second execution waits for the first one's transfer, which moved nothing."""
    from agent_runtime import reconciler

    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    assert reconciler._wake(store.get_task(task_id), store) is False
    mock_chain(aws).set_faults(Faults(empty_ticks=40))
    act(aws, task_id, "of the first")
    next_run(store, task_id)
    assert act(aws, task_id) == "submitted"
    assert reconciler._wake(store.get_task(task_id), store) is False
    with monkeypatch.context() as patch:
        patch.setattr("qaes.adapters.transfers.tell", lambda *arguments: False)
        aws.settle()
    assert (record_of(store, task_id).status, store.get_task(task_id).status, woken()) == ("failed", "executing", [])
    assert reconciler._wake(store.get_task(task_id), store) is True
    assert woken() == [CALLBACK_TOKEN]
    assert reconciler._wake(store.get_task(task_id), store) is False


def test_repeated_end_does_not_fail_the_next_run(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: Callable[[], list[str]]
) -> None:
    """The next execution has kept its token, and has not claimed the step yet."""
    from agent_runtime import reconciler

    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    act(aws, task_id, "of the first")
    aws.settle()
    store.retry(task_id, subject="alice")
    before = woken()
    CallbacksTable().wait(Callback("ACTION", task_id, 2, "of the second", 100, 2))
    assert aws.invoke("ExecuteActionFunction", ended(task_id, "expired")) == {"status": "failed"}
    assert reconciler._wake(store.get_task(task_id), store) is False
    assert (woken(), action_token(task_id)) == (before, "of the second")


def test_execution_resumes_when_it_waits_during_call(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task had ended when it was read; it was retried since, and the token is the new execution's."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    store.end_task(task_id, "failed", actor="test", reason="the ledger has not confirmed it in time")
    state_of, retried = transfers.state_of, []

    def slow(*arguments: Any) -> Any:
        if not retried:
            retried.append(store.retry(task_id, subject="alice"))
            CallbacksTable().wait(Callback("ACTION", task_id, 2, "the new one's", 100, 2))
        return state_of(*arguments)

    monkeypatch.setattr("qaes.adapters.transfers.state_of", slow)
    aws.settle()
    assert retried
    assert (record_of(store, task_id).status, woken()) == ("succeeded", ["the new one's"])
    assert action_token(task_id) is None


# An execution that finds the transfer of an earlier one


@pytest.mark.parametrize("known", ["under way", "confirmed", "on record"])
def test_later_execution_needs_no_approval_when_submitted(
    aws: Cloud, store: TaskStore, plan_for: Plans, asked: Counter[str], monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    next_run(store, task_id)
    if known != "under way":
        with monkeypatch.context() as patch:
            if known == "confirmed":
                patch.setattr("worker.confirmations._ended", lambda reference: None)
            aws.settle()
    asked.clear()
    # The recorded end has ended the task, so no work is left.
    assert check(aws, task_id) == ("denied" if known == "on record" else "execute")
    assert act(aws, task_id) == ("submitted" if known == "under way" else "succeeded")
    assert set(asked) <= {"transfer_state"}
    aws.settle()
    done = record_of(store, task_id)
    # The entry names the first execution, which submitted it with its approval.
    assert (done.status, (done.result or {})["run"], done.attempt) == ("succeeded", 1, 1)
    assert store.get_task(task_id).status == "completed"
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    assert ends_of_the_transfer(task_id) == ["succeeded"]


def test_later_execution_pays_for_no_other_plan(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    act(aws, task_id)
    next_run(store, task_id)
    step = plan.steps[2]
    richer = step.model_copy(update={"parameters": step.parameters | {"amount": 999}})
    swapped = plan.model_copy(update={"steps": (*plan.steps[:2], richer)})
    item = {"pk": {"S": plan.plan_id}, "sk": {"S": "PLAN"}, "data": {"S": swapped.model_dump_json()}}
    boto3.client("dynamodb").put_item(TableName="TasksTable", Item=item)
    for call_again in (check, act):
        with pytest.raises(ConflictError, match="differs from the recorded plan"):
            call_again(aws, task_id)


def test_earlier_end_recorded_before_new_approval(aws: Cloud, store: TaskStore, plan_for: Plans, missed: None) -> None:
    """Else it could come in after the new approval, and the trail would read as if that one had been used up."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    act(aws, task_id)
    aws.settle()
    next_run(store, task_id)
    assert record_of(store, task_id).status == "running"
    assert check(aws, task_id) == "pending"
    assert ends_of_the_transfer(task_id) == ["failed"]
    assert check(aws, task_id) == "pending"
    assert ends_of_the_transfer(task_id) == ["failed"]


def test_unsubmitted_step_is_decided_again_in_later_run(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    aws.faults["LedgerTransferFunction"] = raise_always
    with pytest.raises(TransientError, match="ledger"):
        act(aws, task_id)
    del aws.faults["LedgerTransferFunction"]
    next_run(store, task_id)
    assert check(aws, task_id) == "pending"
    assert (act(aws, task_id), balance(SOURCE)) == ("ApprovalNeededError", 1000)  # the worker checks it itself
    next_run(store, task_id)
    approve(store, task_id, plan, 2)
    assert check(aws, task_id) == "execute"
    assert act(aws, task_id) == "submitted"
    aws.settle()
    record = record_of(store, task_id)
    assert (record.status, record.run, balance(DESTINATION)) == ("succeeded", 3, 250)


def test_late_end_of_earlier_attempt_does_not_count(
    aws: Cloud, store: TaskStore, plan_for: Plans, no_grace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the claim and the submission, the ledger still reports the earlier attempt."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    act(aws, task_id)
    aws.settle()
    mock_chain(aws).set_faults(Faults())
    next_run(store, task_id)
    approve(store, task_id, plan, 2)

    def down(event: dict[str, Any]) -> None:
        if event["operation"] == "transfer":
            raise ConnectionError("down")

    aws.faults["LedgerTransferFunction"] = down
    with pytest.raises(TransientError):
        act(aws, task_id)
    claimed = record_of(store, task_id)
    assert (claimed.status, claimed.run) == ("running", 2)
    assert aws.invoke("ExecuteActionFunction", ended(task_id, "expired")) == {"status": "running"}
    reconcile(aws)
    assert record_of(store, task_id) == claimed
    del aws.faults["LedgerTransferFunction"]
    assert act(aws, task_id) == "submitted"
    aws.invoke("ExecuteActionFunction", ended(task_id, "expired"))
    assert record_of(store, task_id) == claimed
    aws.settle()
    assert (record_of(store, task_id).status, balance(DESTINATION)) == ("succeeded", 250)
    assert ends_of_the_transfer(task_id) == ["failed", "succeeded"]


def test_slow_earlier_attempt_does_not_finish_later_one(store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    first = claim(store, task_id, plan, 2, None, run=1, current=plan.policy)
    store.finish_step(task_id, first, StepOutcome(result=None, error="expired: nothing was moved"))
    next_run(store, task_id)
    second = claim(store, task_id, plan, 2, None, run=2, current=plan.policy)
    assert store.finish_step(task_id, first, StepOutcome(result=None, error="expired: nothing was moved")) == second
    assert record_of(store, task_id) == second
    assert ends_of_the_transfer(task_id) == ["failed"]


# Steps that must not run


def test_lost_step_is_decided_again_in_next_execution(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("monitor_wallet", {"wallet_address": SOURCE})
    claim(store, task_id, plan, 2)
    next_run(store, task_id)
    approve(store, task_id, plan, 2, approved=False)
    with pytest.raises(ApprovalRejectedError):
        run(aws, task_id, 2)
    assert act(aws, task_id) == "ApprovalRejectedError"
    assert ends_of_the_transfer(task_id) == []


def test_execute_action_runs_a_reading_step_that_was_approved(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    """The policy in force has asked for a person: RunStep leaves the step to ExecuteAction."""
    task_id, plan = plan_for("monitor_wallet", {"wallet_address": SOURCE})
    approve(store, task_id, plan, 2)
    with pytest.raises(ApprovalNeededError):
        run(aws, task_id, 2)
    assert act(aws, task_id) == "succeeded"
    claimed = [json.loads(event.input) for event in events_of(task_id) if event.kind == "step_started"][-1]
    assert (claimed["approval"], store.get_task(task_id).status) == (1, "completed")
    assert aws.invocations["LedgerTransferFunction"] == 0


def test_unapproved_transfer_does_not_run_when_worker_is_called(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, _ = plan_for("transfer_funds", TRANSFER)
    assert act(aws, task_id) == "ApprovalNeededError"
    assert (store.step(task_id, 2), action_token(task_id)) == (None, None)
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_transfer_that_was_rejected_does_not_run(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2, approved=False)
    assert act(aws, task_id) == "ApprovalRejectedError"
    assert balance(SOURCE) == 1000


def test_transfer_rejected_when_balance_is_insufficient(
    aws: Cloud, store: TaskStore, plan_for: Plans, sent: Sent
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER | {"amount": 1001})
    approve(store, task_id, plan, 2)
    assert [act(aws, task_id), act(aws, task_id)] == ["StepDeniedError"] * 2
    assert all("insufficient_balance" in said["cause"] for _, said in sent)
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_handler_that_raises_answers_its_token_with_the_error(
    aws: Cloud, plan_for: Plans, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a function's failure does not fail its state, the token does; the cause reveals no secret."""
    task_id, _ = plan_for("transfer_funds", TRANSFER)
    monkeypatch.setattr(TaskStore, "plan_of", lambda *_: 1 / 0)
    for function in ("AwaitApprovalFunction", "ExecuteActionFunction"):
        with pytest.raises(ZeroDivisionError):
            aws.invoke(function, {"task_id": task_id, "task_token": CALLBACK_TOKEN})
        said = {"taskToken": CALLBACK_TOKEN, "error": "ZeroDivisionError", "cause": ""}
        assert sent.pop() == ("send_task_failure", said)


def test_refusal_does_not_overrule_a_running_attempt(store: TaskStore, plan_for: Plans) -> None:
    """Between this attempt's look and its refusal, another one, which had its approval, has begun."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    claim(store, task_id, plan, 2)
    with pytest.raises(TransientError, match="another attempt of this step"):
        store.refuse_step(store.get_task(task_id), plan, 2, None, "its approval is too old")
    assert record_of(store, task_id).status == "running"


def test_expired_approval_refuses_the_step(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    monkeypatch.setattr("worker.states.now", lambda: moment() + timedelta(hours=2))
    assert act(aws, task_id) == "StepFailedError"
    # The trail distinguishes a refusal from the outcome of a started step.
    [told] = [each for each in events_of(task_id) if (each.kind, each.step_id) == ("step_executed", "step_3")]
    assert json.loads(told.output)["begun"] is False
    task = store.get_task(task_id)
    assert (task.status, task.failed_step) == ("failed", "step_3") and "retry the task" in str(task.reason)
