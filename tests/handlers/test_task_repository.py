"""The task aggregate on moto's DynamoDB: once, at the same time, half-way, a day late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest

from audit.store import Outbox
from qaes.adapters import clients, dynamo
from qaes.adapters.task_items import Idempotency, task_item
from qaes.adapters.task_repository import TaskStore
from qaes.domain import planning
from qaes.domain.errors import ConflictError, NotFoundError, ThrottledError, TransientError
from qaes.domain.ids import new_plan_id, new_task_id, now, timestamp
from qaes.domain.models import Approval, Plan, StepRecord, Task
from qaes.domain.policy import PolicyDecision
from qaes.domain.tasks.lifecycle import StepOutcome
from tests.support.cloud import cloud
from tests.support.tokens import approval_token
from tests.unit.test_planning import POLICY, TRANSFER


@pytest.fixture
def store() -> Iterator[TaskStore]:
    with cloud(state_machine=False):
        yield TaskStore("TasksTable")


def new_task(requester: str = "alice") -> Task:
    moment = timestamp(now())
    return Task(
        task_id=new_task_id(),
        status="pending",
        task_type="transfer_funds",
        description="a test",
        parameters=TRANSFER,
        requester=requester,
        created_at=moment,
        updated_at=moment,
    )


def planned(store: TaskStore) -> tuple[str, Plan]:
    """A task that executes its plan."""
    task, _ = store.start_task(new_task())
    _, plan = store.plan_task(task, build(task.task_id))
    return task.task_id, plan


def claim(
    store: TaskStore,
    task_id: str,
    plan: Plan,
    step_index: int,
    approval: Approval | None = None,
    *,
    run: int = 1,
    current: PolicyDecision | None = None,
) -> StepRecord:
    """Claim a step for an execution of the task, which may be one before a retry."""
    task = store.get_task(task_id)
    if task.run != run:
        task = task.model_copy(update={"run": run, "version": task.version - 1})
    return store.claim_step(task, plan, step_index, approval, current or plan.policy)[1]


def replace_approval(store: TaskStore, task_id: str, approval: Approval) -> None:
    """Store another state of the open approval, and its times with the task."""
    task = store.get_task(task_id)
    times = {"waiting_since": approval.requested_at, "waiting_until": approval.expires_at, "version": task.version + 1}
    writes = [
        store._items.put_approval(task_id, approval, "pending"),
        store._items.put_task(task.model_copy(update=times), before=task),
    ]
    dynamo.transact(writes)


def build(task_id: str | None) -> Plan:
    analysis = planning.analyze("transfer_funds", POLICY)
    return planning.build_plan(
        plan_id=new_plan_id(),
        task_id=task_id,
        created_at=timestamp(now()),
        task_type="transfer_funds",
        description="a test",
        parameters=TRANSFER,
        analysis=analysis,
        policy=POLICY.decide(analysis.action_type),
    )


def waiting(store: TaskStore, expires_in: int = 60) -> tuple[str, Plan]:
    task_id, plan = planned(store)
    store.request_approval(store.get_task(task_id), plan, 2, "token-1", expires_in)
    return task_id, plan


def events(task_id: str) -> list[str]:
    found = dict(Outbox("TasksTable").events_after(task_id, 0))
    assert list(found) == list(range(1, len(found) + 1))
    return [event.kind for event in found.values()]


def test_everything_called_twice_changes_nothing_the_second_time(store: TaskStore) -> None:
    task_id, plan = planned(store)
    before = store.get_task(task_id)
    assert store.plan_task(before, build(task_id)) == (before, plan)
    assert store.deny_task(before, plan.analysis, plan.policy) == before
    assert store.get_task(task_id) == before
    assert events(task_id) == ["task_started", "policy_checked", "plan_built"]


def test_idempotency_key_returns_task_and_rejects_other_body(store: TaskStore) -> None:
    key = Idempotency("alice", "key-1", "body-1")
    first, replayed = store.start_task(new_task(), key)
    second, again = store.start_task(new_task(), key)
    assert (replayed, again) == (False, True) and second.task_id == first.task_id
    with pytest.raises(ConflictError, match="Idempotency-Key"):
        store.start_task(new_task(), Idempotency("alice", "key-1", "body-2"))
    other, replayed = store.start_task(new_task("bob"), Idempotency("bob", "key-1", "body-2"))
    assert not replayed and other.task_id != first.task_id


def test_fifty_starts_at_once_under_one_key_make_one_task(store: TaskStore) -> None:
    clients.client("dynamodb")

    def start(_: int) -> str:
        return store.start_task(new_task(), Idempotency("alice", "key", "body"))[0].task_id

    with ThreadPoolExecutor(10) as pool:
        assert len(set(pool.map(start, range(50)))) == 1


def test_task_id_is_not_written_twice(store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    with pytest.raises(TransientError):
        store.start_task(task)


def test_missing_item_is_not_found(store: TaskStore) -> None:
    with pytest.raises(NotFoundError):
        store.get_task(new_task_id())
    with pytest.raises(NotFoundError):
        store.get_plan(new_plan_id())
    task, _ = store.start_task(new_task())
    with pytest.raises(ConflictError):
        store.plan_of(task)


def test_waiting_status_and_token_are_one_write(store: TaskStore) -> None:
    task_id, plan = waiting(store)
    assert store.get_task(task_id).status == "waiting_approval"
    store.request_approval(store.get_task(task_id), plan, 2, "token-1", 60)
    again = store.request_approval(store.get_task(task_id), plan, 2, "token-2", 60)
    assert (approval_token(task_id), again.round) == ("token-2", 1)
    assert store.open_approval(task_id) == again
    assert events(task_id).count("approval_requested") == 1


@pytest.mark.parametrize("outcome", ["approved", "rejected", "expired"])
def test_decided_step_is_not_requested_again_in_execution(store: TaskStore, outcome: str) -> None:
    """The state is retried: the decision counts, and is delivered to the new token."""
    task_id, plan = waiting(store, expires_in=0 if outcome == "expired" else 60)
    if outcome == "expired":
        store.expire(task_id)
    else:
        store.decide(task_id, approved=outcome == "approved", subject="bob", reason="x")
    before = store.get_task(task_id), events(task_id), store.latest_approval(task_id, 2)
    again = store.request_approval(store.get_task(task_id), plan, 2, "token-2", 60)
    assert before[2] is not None and again == before[2].model_copy(update={"token": "token-2"})
    assert store.approvals(task_id) == [again] and again.status == outcome
    assert (store.get_task(task_id).status, events(task_id)) == (before[0].status, before[1])


def test_approval_requested_again_when_more_are_required(store: TaskStore) -> None:
    task_id, plan = waiting(store)
    store.decide(task_id, approved=True, subject="bob", reason="x")
    again = store.request_approval(store.get_task(task_id), plan, 2, "token-2", 60, required=2)
    assert (again.round, again.status, again.required) == (2, "pending", 2)
    store.decide(task_id, approved=False, subject="carol", reason="x")
    assert store.request_approval(store.get_task(task_id), plan, 2, "token-3", 60, required=3).status == "rejected"


def test_used_approval_stays_used(store: TaskStore) -> None:
    """A call with a late response does not overwrite later changes."""
    task_id, plan = waiting(store)
    approval = store.decide(task_id, approved=True, subject="bob", reason="x")
    claim(store, task_id, plan, 2, approval, run=1, current=plan.policy)
    with pytest.raises(ThrottledError):
        store.request_approval(store.get_task(task_id), plan, 2, "token-2", 60)
    item = boto3.client("dynamodb").get_item(
        TableName="TasksTable", Key={"pk": {"S": task_id}, "sk": {"S": "APPROVAL#002#01"}}
    )["Item"]
    assert "consumed_at" in item and "token-2" not in item["data"]["S"]


def test_of_two_decisions_at_the_same_moment_one_wins(store: TaskStore) -> None:
    task_id, _ = waiting(store)

    def decide(number: int) -> str | None:
        try:
            return store.decide(task_id, approved=bool(number % 2), subject=f"bob-{number}", reason="x").status
        except ConflictError:
            return None

    clients.client("dynamodb")
    with ThreadPoolExecutor(8) as pool:
        results = [result for result in pool.map(decide, range(8)) if result]
    assert len(results) == 1
    assert store.approvals(task_id)[0].status == results[0]
    assert events(task_id).count("approval_decided") == 1


def test_decision_refused_a_day_after_expiry(store: TaskStore) -> None:
    task_id, _ = waiting(store, expires_in=0)
    with pytest.raises(ConflictError) as caught:
        store.decide(task_id, approved=True, subject="bob", reason="late")
    assert caught.value.details["task_status"] == "expired"
    assert "approval_decided" not in events(task_id)


def test_decision_after_the_end_is_refused_with_the_status(store: TaskStore) -> None:
    task_id, _ = waiting(store)
    store.end_task(task_id, "expired", actor="execution", reason="no decision was made in time", failed_step=None)
    with pytest.raises(ConflictError) as caught:
        store.decide(task_id, approved=True, subject="bob", reason="late")
    assert caught.value.details["task_status"] == "expired"
    assert events(task_id)[-2:] == ["approval_expired", "task_ended"]
    assert store.approvals(task_id)[0].status == "expired"


@pytest.mark.parametrize(("approved", "status"), [(True, "failed"), (False, "rejected")])
def test_timeout_after_decision_keeps_decision(store: TaskStore, approved: bool, status: str) -> None:
    task_id, _ = waiting(store)
    store.decide(task_id, approved=approved, subject="bob", reason="because")
    ended = store.end_task(
        task_id, "expired", actor="execution", reason="no decision was made in time", failed_step=None
    )
    assert ended.status == status
    assert "approval_expired" not in events(task_id)


def test_approval_is_consumed_once(store: TaskStore) -> None:
    task_id, plan = waiting(store)
    approval = store.decide(task_id, approved=True, subject="bob", reason="ok")
    claim(store, task_id, plan, 2, approval, run=1, current=plan.policy)
    # Another step cannot be run on the same approval.
    with pytest.raises(ThrottledError):
        claim(store, task_id, plan, 1, approval, run=1, current=plan.policy)
    assert store.step(task_id, 1) is None


def test_step_is_claimed_counted_and_ended_once(store: TaskStore) -> None:
    task_id, plan = planned(store)
    first = claim(store, task_id, plan, 0, None, run=1, current=plan.policy)
    second = claim(store, task_id, plan, 0, None, run=1, current=plan.policy)
    assert (first.attempt, second.attempt) == (1, 2)
    assert events(task_id).count("step_started") == 1, "to attempt it once more is not another decision"
    ended = store.finish_step(task_id, first, StepOutcome(result={"balance": 1}, error=None))
    assert ended.status == "succeeded" and ended.attempt == 2
    late = store.finish_step(task_id, second, StepOutcome(result=None, error="too late"))
    assert late == ended and store.steps(task_id) == [ended]
    assert claim(store, task_id, plan, 0, None, run=1, current=plan.policy) == ended
    assert events(task_id).count("step_executed") == 1


def test_claim_returns_the_decision(store: TaskStore) -> None:
    task_id, plan = waiting(store)
    approval = store.decide(task_id, approved=True, subject="bob", reason="ok")
    stricter = plan.policy.model_copy(update={"policy_id": "policy-v2-" + "0" * 64, "approvals": 1})
    claim(store, task_id, plan, 2, approval, run=1, current=stricter)
    told = next(event for event in Outbox("TasksTable").disclosed(task_id).values() if event.kind == "step_started")
    assert (told.actor, told.status, told.step_index, told.step_id) == ("worker", "running", 2, "step_3")
    assert (told.policy_id, told.plan_hash) == (plan.policy.policy_id, plan.hash())
    expected = {"step_hash": plan.steps[2].hash(), "run": 1, "attempt": 1, "approval": approval.round}
    assert json.loads(told.input) == expected
    assert PolicyDecision.model_validate_json(told.output) == stricter


def test_verdict_of_earlier_execution_does_not_start_step(store: TaskStore) -> None:
    task_id, plan = waiting(store)
    approval = store.decide(task_id, approved=True, subject="bob", reason="ok")
    store.end_task(task_id, "failed", actor="execution", reason="x")
    store.retry(task_id, subject="alice")
    with pytest.raises(ConflictError, match="a later execution"):
        claim(store, task_id, plan, 2, approval, run=1, current=plan.policy)
    assert store.step(task_id, 2) is None and "step_started" not in events(task_id)


def test_terminal_statuses_never_change(store: TaskStore) -> None:
    task_id, plan = planned(store)
    store.end_task(task_id, "failed", actor="execution", reason="x", failed_step="step_1")
    before = store.get_task(task_id)
    store.end_task(task_id, "completed", actor="execution", reason="", failed_step=None)
    store.plan_task(before, build(task_id))
    for late in (
        lambda: claim(store, task_id, plan, 0, None, run=1, current=plan.policy),
        lambda: store.request_approval(store.get_task(task_id), plan, 2, "t", 60),
    ):
        with pytest.raises(ConflictError):
            late()
    assert store.get_task(task_id) == before


def test_open_tasks_are_found_by_status_and_age(store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    assert [each.task_id for each in store.open_tasks("pending", -1)] == [task.task_id]
    assert store.open_tasks("pending", 60) == [] and store.open_tasks("executing", -1) == []


def test_open_tasks_are_read_in_order_beyond_one_batch(store: TaskStore) -> None:
    writer = boto3.client("dynamodb")
    tasks = [new_task() for _ in range(dynamo.BATCH_GET + 5)]
    for task in tasks:
        writer.put_item(TableName="TasksTable", Item=task_item(task))
    assert [each.task_id for each in store.open_tasks("pending", -1)] == sorted(task.task_id for task in tasks)


def test_open_tasks_omit_a_task_that_has_just_left(store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index may be behind: a task that is in two of its answers is helped once."""
    still, moving = (store.start_task(new_task())[0] for _ in range(2))
    read = dynamo.get_many

    def after_it_moved(*arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
        if store.get_task(moving.task_id).status == "pending":
            store.plan_task(moving, build(moving.task_id))
        return read(*arguments, **options)

    monkeypatch.setattr(dynamo, "get_many", after_it_moved)
    assert [each.task_id for each in store.open_tasks("pending", -1)] == [still.task_id]
    assert [each.task_id for each in store.open_tasks("executing", -1)] == [moving.task_id]


def test_write_raises_clear_error_after_losing_every_race(store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = store.start_task(new_task())
    stale = store.get_task(task.task_id)
    store.plan_task(task, build(task.task_id))

    def read_stale(self: TaskStore, task_id: str) -> Task:
        return stale

    monkeypatch.setattr(TaskStore, "get_task", read_stale)
    monkeypatch.setattr("qaes.adapters.task_changes.time.sleep", lambda seconds: None)
    with pytest.raises(ThrottledError):
        store.plan_task(stale, build(task.task_id))


def test_other_errors_of_the_table_are_not_swallowed(store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError

    class Broken:
        def __init__(self, code: str) -> None:
            self.code = code

        def transact_write_items(self, **_: Any) -> None:
            raise ClientError({"Error": {"Code": self.code, "Message": ""}}, "TransactWriteItems")

    for code, expected in (("ThrottlingException", TransientError), ("AccessDeniedException", ClientError)):
        monkeypatch.setattr(clients, "client", lambda name, code=code: Broken(code))
        with pytest.raises(expected):
            store.start_task(new_task())
