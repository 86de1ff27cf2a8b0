"""The worker on moto: each step type, once, and only what may run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qaes.adapters.task_store import TaskStore
from qaes.domain import planning
from qaes.domain.canonical import hash_of
from qaes.domain.ids import new_plan_id, timestamp
from qaes.domain.ids import now as moment
from qaes.domain.models import Plan
from qaes.domain.policy import Policy
from qubic.chain.mock import Faults, MockChain
from tests.handlers.test_task_store import new_task
from tests.support.cloud import Cloud, call, cloud

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"
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
    answer: dict[str, Any] = aws.invoke("ExecuteStepFunction", {"task_id": task_id, "step_index": step_index})
    return answer


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
    aws: Cloud, store: TaskStore, plan_for: Plans
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    submitted = {"step_id": "step_3", "status": "submitted", "result": None, "error": None, "attempt": 1}
    assert [run(aws, task_id, 2) for _ in range(3)] == [submitted] * 3
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)
    aws.settle()
    done = run(aws, task_id, 2)
    assert (done["status"], done["attempt"]) == ("succeeded", 1)
    assert done["result"]["network"] == "mock"
    assert run(aws, task_id, 2) == done
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)


def test_a_transfer_that_expired_has_failed_and_a_retry_of_the_task_makes_it(
    aws: Cloud, store: TaskStore, plan_for: Plans
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    assert run(aws, task_id, 2)["status"] == "submitted"
    aws.settle()
    failed = run(aws, task_id, 2)
    assert (failed["status"], failed["error"].split(":")[0]) == ("failed", "expired")
    assert run(aws, task_id, 2) == failed
    mock_chain(aws).set_faults(Faults())
    store.end_task(task_id, "failed", actor="test", reason="expired")
    store.retry(task_id, subject="alice")
    approve(store, task_id, plan, 2)
    assert run(aws, task_id, 2)["status"] == "submitted"
    aws.settle()
    assert (run(aws, task_id, 2)["status"], balance(DESTINATION)) == ("succeeded", 250)


def mock_chain(aws: Cloud) -> MockChain:
    return MockChain(genesis={}, table="ChainTable", clock=aws.clock, tick_milliseconds=1000)


# Waiting for the ledger


def await_confirmation(aws: Cloud, task_id: str, token: str = WAITER) -> dict[str, Any]:
    event = {"task_id": task_id, "step_index": 2, "task_token": token}
    answer: dict[str, Any] = aws.invoke("AwaitConfirmationFunction", event)
    return answer


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens that were woken; what Step Functions does with them is tested by the workflow's tests."""
    tokens: list[str] = []
    for module in ("worker.confirmations", "agent_runtime.reconciler"):
        monkeypatch.setattr(f"{module}.wake", lambda token, output: tokens.append(token) or True)
    return tokens


def ended(task_id: str, state: str = "confirmed") -> dict[str, Any]:
    image = {"key": {"S": f"transfer:{task_id}#step_3"}, "kind": {"S": "transfer"}, "state": {"S": state}}
    return {"Records": [{"dynamodb": {"NewImage": image, "SequenceNumber": "1"}}]}


def test_who_waits_is_woken_by_the_end_of_the_transfer(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: list[str]
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    run(aws, task_id, 2)
    assert await_confirmation(aws, task_id)["state"] in {"signed", "broadcast"}
    assert aws.invoke("TransferEndedFunction", ended(task_id, "broadcast")) == {"batchItemFailures": []}
    assert woken == []
    aws.settle()  # and with it, the stream's record
    assert woken == ["a token"]


def test_who_comes_after_the_end_does_not_wait(aws: Cloud, store: TaskStore, plan_for: Plans, woken: list[str]) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    run(aws, task_id, 2)
    aws.settle()
    assert woken == []
    assert await_confirmation(aws, task_id) == {"state": "confirmed"}
    assert woken == ["a token"]
    run(aws, task_id, 2)
    assert await_confirmation(aws, task_id, "another") == {"state": "ended"}
    assert woken == ["a token", "another"]


def test_the_newest_token_counts(aws: Cloud, store: TaskStore, plan_for: Plans, woken: list[str]) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    run(aws, task_id, 2)
    await_confirmation(aws, task_id, "first")
    await_confirmation(aws, task_id, "second")
    aws.settle()
    assert woken == ["second"]


def test_what_a_cancelled_task_has_done_is_put_on_record(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: list[str]
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    run(aws, task_id, 2)
    await_confirmation(aws, task_id)
    store.cancel(task_id, subject="alice", reason="changed my mind")
    aws.settle()
    record = store.step(task_id, 2)
    assert record is not None
    assert (record.status, balance(DESTINATION), woken) == ("succeeded", 250, [])
    before = record
    assert aws.invoke("TransferEndedFunction", ended(task_id)) == {"batchItemFailures": []}
    assert store.step(task_id, 2) == before


def test_a_task_that_was_cancelled_before_its_transfer_was_handed_in_pays_nothing(
    aws: Cloud, store: TaskStore, plan_for: Plans
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(fail_requests=50))
    with pytest.raises(Exception, match="ledger"):
        run(aws, task_id, 2)  # the intent is on record, the ledger did not answer
    mock_chain(aws).set_faults(Faults())
    store.cancel(task_id, subject="alice", reason="changed my mind")
    answer = run(aws, task_id, 2)
    assert (answer["status"], answer["error"].split(":")[0]) == ("failed", "not_submitted")
    aws.settle()
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_the_end_of_a_cancelled_tasks_transfer_never_has_it_signed_anew(
    aws: Cloud, store: TaskStore, plan_for: Plans
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    mock_chain(aws).set_faults(Faults(empty_ticks=30))
    run(aws, task_id, 2)
    store.end_task(task_id, "failed", actor="test", reason="the ledger has not confirmed it in time")
    store.retry(task_id, subject="alice")
    approve(store, task_id, plan, 2)
    assert run(aws, task_id, 2)["status"] == "submitted"  # the second run finds it under way
    store.cancel(task_id, subject="alice", reason="changed my mind")
    aws.settle()
    mock_chain(aws).set_faults(Faults())
    record = store.step(task_id, 2)
    assert record is not None
    assert (record.status, str(record.error).split(":")[0]) == ("failed", "expired")
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_the_end_of_a_transfer_of_no_task_harms_nobody(aws: Cloud, woken: list[str]) -> None:
    assert aws.invoke("TransferEndedFunction", ended("task_none")) == {"batchItemFailures": []}
    assert woken == []


def test_an_end_that_cannot_be_told_is_delivered_again(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskStore, "get_task", lambda *key: 1 / 0)
    assert aws.invoke("TransferEndedFunction", ended("task_none")) == {"batchItemFailures": [{"itemIdentifier": "1"}]}


def test_the_reconciler_wakes_whom_everybody_missed(
    aws: Cloud, store: TaskStore, plan_for: Plans, woken: list[str]
) -> None:
    from agent_runtime import reconciler

    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2)
    assert reconciler._wake(store.get_task(task_id), store) is False
    run(aws, task_id, 2)
    await_confirmation(aws, task_id)
    with ledger_function():
        assert reconciler._wake(store.get_task(task_id), store) is False
        aws.settle()
        woken.clear()
        assert reconciler._wake(store.get_task(task_id), store) is True
        assert woken == ["a token"]
        run(aws, task_id, 2)
        assert reconciler._wake(store.get_task(task_id), store) is False


@contextmanager
def ledger_function() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEDGER_FUNCTION", "LedgerFunction")
        yield


def test_a_transfer_that_nobody_approved_does_not_run_even_when_the_worker_is_called_by_itself(
    aws: Cloud, plan_for: Plans
) -> None:
    task_id, _ = plan_for("transfer_funds", TRANSFER)
    assert run(aws, task_id, 2)["status"] == "failed"
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_a_transfer_that_was_rejected_does_not_run(aws: Cloud, store: TaskStore, plan_for: Plans) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    approve(store, task_id, plan, 2, approved=False)
    answer = run(aws, task_id, 2)
    assert (answer["status"], answer["error"]) == ("failed", "an approver rejected it")
    assert balance(SOURCE) == 1000


def test_a_balance_that_does_not_suffice_is_told_and_moves_nothing(
    aws: Cloud, store: TaskStore, plan_for: Plans
) -> None:
    task_id, plan = plan_for("transfer_funds", TRANSFER | {"amount": 1001})
    approve(store, task_id, plan, 2)
    answer = run(aws, task_id, 2)
    assert answer["status"] == "failed"
    assert "insufficient_balance" in answer["error"]
    assert run(aws, task_id, 2) == answer
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_a_refusal_does_not_overrule_an_attempt_that_is_at_work(
    aws: Cloud, store: TaskStore, plan_for: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between this attempt's look and its claim, another one, which had its approval, has begun."""
    task_id, plan = plan_for("transfer_funds", TRANSFER)
    store.claim_step(task_id, 2, plan.steps[2], None)
    look, first = TaskStore.step, iter([True])
    monkeypatch.setattr(TaskStore, "step", lambda *key: None if next(first, False) else look(*key))
    with pytest.raises(Exception, match="another attempt is at work"):
        run(aws, task_id, 2)
    record = store.step(task_id, 2)
    assert record is not None
    assert record.status == "running"
