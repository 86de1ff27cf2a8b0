"""Functions that come late, crashes between two calls, and items that a role of the engine forges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import boto3
import pytest

from audit.fsck import fsck
from audit.store import AuditStore, Outbox
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_events import event_item
from qaes.adapters.task_items import TaskItems, plan_item, task_item
from qaes.adapters.task_repository import TaskStore
from qaes.domain import planning
from qaes.domain.errors import ApprovalNeededError, ConflictError, TransientError
from qaes.domain.ids import new_plan_id, now, timestamp
from qaes.domain.models import Plan, Task
from qaes.domain.policy import Policy
from qaes.domain.tasks import events, lifecycle
from tests.handlers.test_task_repository import claim, new_task
from tests.support.cloud import Cloud, call, cloud
from tests.support.stories import check_every_story
from tests.support.trail import LOG_ID, log, policy_outbox

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"
TRANSFER = {"wallet_address": SOURCE, "to_address": DESTINATION, "amount": 250}
TOKEN = "a token"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setattr("qaes.adapters.executions._send", lambda name, **said: True)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def policy() -> Policy:
    return Policy.model_validate(call("LedgerFunction", {"operation": "policy"})["result"])


def plan_of(task: Task) -> Plan:
    analysis = planning.analyze(task.task_type, policy())
    return planning.build_plan(
        plan_id=new_plan_id(),
        task_id=task.task_id,
        created_at=timestamp(now()),
        task_type=task.task_type,
        description=task.description,
        parameters=task.parameters,
        analysis=analysis,
        policy=policy().decide(analysis.action_type),
    )


def planned(aws: Cloud, store: TaskStore, task_type: str = "transfer_funds") -> tuple[str, Plan]:
    """A task whose steps before the action have run."""
    started = new_task().model_copy(update={"task_type": task_type, "parameters": TRANSFER})
    task, _ = store.start_task(started)
    plan = plan_of(task)
    store.plan_task(task, plan)
    for step_index in range(len(plan.steps) - 1):
        aws.invoke("RunStepFunction", {"task_id": task.task_id, "step_index": step_index})
    return task.task_id, plan


def approve(store: TaskStore, task_id: str, plan: Plan) -> None:
    store.request_approval(store.get_task(task_id), plan, 2, "token", 60)
    store.decide(task_id, approved=True, subject="bob", reason="because")


def next_run(store: TaskStore, task_id: str) -> None:
    store.end_task(task_id, "failed", actor="execution", reason="a service did not respond; retry the task")
    store.retry(task_id, subject="alice")


def act(aws: Cloud, task_id: str) -> str:
    return str(aws.invoke("ExecuteActionFunction", {"task_id": task_id, "task_token": TOKEN})["status"])


def balance(address: str) -> int:
    return LedgerClient("LedgerFunction").balance(address)


def kinds(task_id: str) -> list[str]:
    return [json.loads(entry.text)["kind"] for entry in AuditStore("AuditEntriesTable").entries(task_id)]


def put(item: dict[str, Any]) -> None:
    boto3.client("dynamodb").put_item(TableName="TasksTable", Item=item)


# Before an effect


def test_no_effect_before_the_claim_of_a_twin_is_on_record(
    aws: Cloud, store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another attempt claims the step between this one's look at the task and at its records, and dies."""
    task_id, plan = planned(aws, store)
    approve(store, task_id, plan)
    aws.drain(task_id)
    approval = store.latest_approval(task_id, 2)
    records, claims = TaskStore.records, iter([True])

    def after_the_twin(self: TaskStore, *arguments: Any) -> Any:
        if next(claims, False):
            store.claim_step(store.get_task(task_id), plan, 2, approval, plan.policy)
        return records(self, *arguments)

    monkeypatch.setattr(TaskStore, "records", after_the_twin)
    monkeypatch.setattr("audit.recorder.Recorder.drain", lambda *_: 1 / 0)
    with pytest.raises(TransientError):
        act(aws, task_id)
    assert aws.invocations["LedgerTransferFunction"] == 0


def test_no_effect_when_a_forged_event_hides_the_intent(aws: Cloud, store: TaskStore) -> None:
    """The key of a forged item is that of its last event: its numbers shadow those of the genuine ones."""
    task_id, plan = planned(aws, store)
    approve(store, task_id, plan)
    task = store.get_task(task_id)
    final = {"status": "failed", "reason": "no answer", "failed_step": None}
    never = events.task_ended(task, "execution", final, timestamp(now()))
    again = never.model_copy(update={"kind": "approval_reminder", "actor": "reconciler", "status": "pending"})
    put(event_item(task_id, task.events + 1, [never, again, again]))
    aws.drain(task_id)
    with pytest.raises(ConflictError, match="not the beginning of step_3"):
        act(aws, task_id)
    assert (aws.invocations["LedgerTransferFunction"], balance(DESTINATION)) == (0, 0)


def test_plan_that_no_request_makes_moves_no_money(aws: Cloud, store: TaskStore) -> None:
    """A role of the engine writes plan and task: another amount, which a person even approves."""
    task_id, plan = planned(aws, store)
    step = plan.steps[2].model_copy(update={"parameters": plan.steps[2].parameters | {"amount": 999}})
    forged = plan.model_copy(update={"steps": (*plan.steps[:2], step)})
    put(plan_item(forged))
    put(task_item(store.get_task(task_id).model_copy(update={"plan_hash": forged.hash()})))
    approve(store, task_id, forged)
    for function in ("AwaitApprovalFunction", "ExecuteActionFunction"):
        with pytest.raises(ConflictError, match="does not follow from the request"):
            aws.invoke(function, {"task_id": task_id, "task_token": TOKEN})
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_claim_refused_while_people_are_asked(aws: Cloud, store: TaskStore) -> None:
    """People are asked, under a policy that was in force for a moment, after the last check and before the claim."""
    task_id, plan = planned(aws, store)
    task = store.get_task(task_id)
    store.request_approval(task, plan, 2, "token", 60)
    with pytest.raises(ApprovalNeededError):
        store.claim_step(task, plan, 2, None, plan.policy)
    assert store.step(task_id, 2) is None


def test_forged_beginning_moves_no_money_without_approval(aws: Cloud, store: TaskStore) -> None:
    """A role of the engine writes the step's record, its event and the task's count, and wakes the execution."""
    task_id, plan = planned(aws, store)
    store.request_approval(store.get_task(task_id), plan, 2, "token", 60)
    task = store.get_task(task_id)
    going_on = task.model_copy(update={"status": "executing"})
    change = lifecycle.claim_step(going_on, 2, lifecycle.History(plan), None, plan.policy, run=1, at=now())
    assert change.step is not None
    put(TaskItems("any").put_step(task_id, "STEP#002", change.step, before=None)["Put"]["Item"])
    put(event_item(task_id, task.events + 1, change.events))
    put(task_item(going_on.model_copy(update={"events": task.events + 1})))
    assert act(aws, task_id) == "StepDeniedError"
    assert (aws.invocations["LedgerTransferFunction"], balance(DESTINATION)) == (0, 0)


# Late functions of an execution before a retry


def test_late_plain_step_of_run_1_records_nothing_in_run_2(aws: Cloud, store: TaskStore) -> None:
    started = new_task().model_copy(update={"task_type": "monitor_wallet", "parameters": {"wallet_address": SOURCE}})
    task, _ = store.start_task(started)
    store.plan_task(task, plan_of(task))
    late = {"task_id": task.task_id, "step_index": 0, "execution": task.task_id}
    aws.faults["LedgerFunction"] = lambda event: next_run(store, task.task_id)
    with pytest.raises(ConflictError, match="a later execution"):
        aws.invoke("RunStepFunction", late)
    assert store.steps(task.task_id) == []


@pytest.mark.parametrize("allowed", [True, False])
def test_late_planner_of_run_1_pins_no_policy_in_run_2(aws: Cloud, store: TaskStore, allowed: bool) -> None:
    task, _ = store.start_task(new_task().model_copy(update={"task_type": "transfer_funds", "parameters": TRANSFER}))
    late = store.get_task(task.task_id)
    next_run(store, task.task_id)
    plan = plan_of(late)
    denied = plan.policy.model_copy(update={"allowed": False})
    with pytest.raises(ConflictError, match="a later execution"):
        _ = store.plan_task(late, plan) if allowed else store.deny_task(late, plan.analysis, denied)
    assert (store.get_task(task.task_id).policy_id, store.get_task(task.task_id).status) == (None, "pending")


# Outcomes


def test_refusal_in_run_2_leaves_run_1_s_transfer_to_settle(
    aws: Cloud, store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run 1's transfer never reached the ledger; run 2 is refused. The trail has an outcome for run 1 in the end."""
    task_id, plan = planned(aws, store)
    approve(store, task_id, plan)
    claim(store, task_id, plan, 2, store.latest_approval(task_id, 2))
    next_run(store, task_id)
    approve(store, task_id, plan)
    with monkeypatch.context() as patch:
        patch.setattr("worker.states.now", lambda: now() + timedelta(hours=2))
        assert act(aws, task_id) == "StepFailedError"
    assert store.get_task(task_id).status == "failed"
    record = store.step(task_id, 2)
    assert record is not None and (record.status, record.run) == ("running", 1)
    monkeypatch.setattr("agent_runtime.reconciler.GRACE_SECONDS", -1)
    monkeypatch.setattr("qaes.adapters.transfers.LATE_SECONDS", -1)
    assert aws.invoke("ReconcilerFunction", {"detail-type": "Scheduled Event"}) == {"reconciled": [task_id]}
    aws.drain(task_id)
    assert kinds(task_id)[-4:] == ["approval_decided", "step_executed", "task_ended", "step_executed"]
    assert check_every_story() == 1


def test_action_that_succeeded_after_its_run_is_not_asked_about(aws: Cloud, store: TaskStore) -> None:
    """The execution was stopped while the ledger recorded the instruction; then the task is retried."""
    task_id, plan = planned(aws, store, "transaction")
    approve(store, task_id, plan)
    aws.faults["LedgerTransferFunction"] = lambda event: store.end_task(
        task_id, "failed", actor="reconciler", reason="the execution was stopped"
    )
    assert act(aws, task_id) == "succeeded"
    store.retry(task_id, subject="alice")
    answer = aws.invoke("AwaitApprovalFunction", {"task_id": task_id, "task_token": TOKEN})
    assert answer["verdict"] == "execute"
    assert act(aws, task_id) == "succeeded"
    assert store.get_task(task_id).status == "completed"
    assert check_every_story() == 1


# Several events in one item


@pytest.mark.parametrize("covers_up", [False, True])
def test_event_that_hides_a_rejection_shows(aws: Cloud, store: TaskStore, covers_up: bool) -> None:
    """A role of the engine takes the number of a decision before it is made, and may overwrite the item afterwards."""
    task_id, plan = planned(aws, store)
    store.request_approval(store.get_task(task_id), plan, 2, "token", 60)
    aws.drain(task_id)
    task, approval = store.get_task(task_id), store.latest_approval(task_id, 2)
    assert approval is not None
    step, final = plan.steps[2], {"status": "failed", "reason": "no answer", "failed_step": None}
    closed = events.of_approval(task, "approval_cancelled", "compliance", "cancelled", approval, step, timestamp(now()))
    never = events.task_ended(task, "execution", final, timestamp(now()))
    put(event_item(task_id, task.events + 1, [closed, never]))
    aws.drain(task_id)
    assert check_every_story() == 1, "the lie alone is consistent"
    store.decide(task_id, approved=False, subject="bob", reason="no")
    if covers_up:
        put(event_item(task_id, task.events + 1, [closed]))
        put(event_item(task_id, task.events + 2, [never]))
    assert kinds(task_id)[-2:] == ["approval_cancelled", "task_ended"]
    told = Outbox("TasksTable").disclosed(task_id)
    assert max(told) <= task.events + (not covers_up), "the bundle cannot disclose the lie"
    report = fsck(
        AuditStore("AuditEntriesTable"),
        log(),
        None,
        log_id=LOG_ID,
        outbox=Outbox("TasksTable"),
        policy_outbox=policy_outbox(),
    )
    assert {each.where.split()[0] for each in report.findings if each.invariant == "decision"} == {task_id}
