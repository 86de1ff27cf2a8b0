"""The transaction of an intent: suspensions, the room in limits, and concurrent callers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest

from audit.store import Outbox
from qaes.adapters import suspensions
from qaes.adapters.intents import Intent
from qaes.adapters.limits import LimitsTable
from qaes.adapters.task_repository import TaskStore
from qaes.domain import planning
from qaes.domain.errors import ApprovalNeededError, QaesError, StepDeniedError, ThrottledError
from qaes.domain.ids import new_plan_id, now, timestamp
from qaes.domain.models import Decision, Plan, StepRecord, Task
from qaes.domain.policy import Policy
from qaes.domain.ruling import Ruling, rule
from qaes.domain.suspensions import Suspension
from qaes.domain.tasks.lifecycle import StepOutcome
from tests.handlers.test_task_repository import events, new_task
from tests.support.api import set_environment
from tests.support.cloud import cloud
from tests.unit.test_rulings import REFUND, policy

FREE = {"max_amount": None, "approvals": 0}
MOST = 5


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[TaskStore]:
    set_environment("ExecuteActionFunction", monkeypatch)
    with cloud(state_machine=False, policy=False):
        yield TaskStore("TasksTable")


def limited(over: Any = "deny", most: int = MOST) -> Policy:
    limit = {"window_seconds": 3600, "max_count": most, "per": "action", "over": over}
    return policy(7, FREE, action="refund", actions={"refund": REFUND}, limits=[limit])


def planned(store: TaskStore, document: Policy) -> tuple[Task, Plan, Ruling]:
    """A task of an operator's action, whose plain steps have run."""
    fields = {"task_type": "refund", "parameters": {"amount": 5}}
    task, _ = store.start_task(new_task().model_copy(update=fields))
    ruling = rule(task, document, document)
    plan = planning.build_plan(
        plan_id=new_plan_id(), task_id=task.task_id, created_at=timestamp(now()), task_type=task.task_type,
        description=task.description, parameters=task.parameters,
        analysis=planning.analyze(task.task_type, document), policy=ruling.pins,
    )  # fmt: skip
    task, plan = store.plan_task(task, plan)
    for index in range(len(plan.steps) - 1):
        store.run_step(task, plan, index, StepOutcome(result={}), ruling, started=now())
        task = store.get_task(task.task_id)
    return task, plan, ruling


def claim(store: TaskStore, task: Task, plan: Plan, ruling: Ruling, *subjects: str) -> StepRecord:
    decisions = tuple(Decision(subject=who, approved=True, reason="", decided_at=task.created_at) for who in subjects)
    last = len(plan.steps) - 1
    intent = Intent(task, last, plan.steps[last], ruling, decisions)
    return store.claim_step(task, plan, last, None, ruling.recorded, intent=intent)[1]


def suspend(*names: str) -> None:
    at = timestamp(now())
    puts = suspensions.puts({name: Suspension(by="olivia", at=at, reason="an incident") for name in names})
    boto3.client("dynamodb").transact_write_items(TransactItems=puts)


def counted(ruling: Ruling) -> int:
    [used] = LimitsTable().read(ruling.current.limits)
    return used.used


@pytest.mark.parametrize("name", ["refund", "*"])
def test_claim_writes_nothing_while_its_action_is_suspended(store: TaskStore, name: str) -> None:
    task, plan, ruling = planned(store, limited())
    suspend(name)
    before = events(task.task_id)
    with pytest.raises(StepDeniedError, match="suspended: olivia suspended"):
        claim(store, task, plan, ruling)
    assert (events(task.task_id), store.step(task.task_id, 1), counted(ruling)) == (before, None, 0)
    suspend("transfer_funds")
    assert claim(store, task, plan, ruling).status == "running"


def test_run_step_writes_nothing_while_its_action_is_suspended(store: TaskStore) -> None:
    watch = policy(7, FREE, action="monitoring")
    task, _ = store.start_task(
        new_task().model_copy(update={"task_type": "monitor_wallet", "parameters": {"wallet_address": "0x12"}})
    )
    ruling = rule(task, watch, watch)
    plan = planning.build_plan(
        plan_id=new_plan_id(), task_id=task.task_id, created_at=timestamp(now()), task_type=task.task_type,
        description=task.description, parameters=task.parameters,
        analysis=planning.analyze(task.task_type, watch), policy=ruling.pins,
    )  # fmt: skip
    task, plan = store.plan_task(task, plan)
    suspend("monitoring")
    for index in range(2):  # these read alone: RunStep has checked them before
        store.run_step(task, plan, index, StepOutcome(result={}), ruling, started=now())
        task = store.get_task(task.task_id)
    with pytest.raises(StepDeniedError, match="suspended: "):
        store.run_step(task, plan, 2, StepOutcome(result={}), ruling, started=now())
    assert store.step(task.task_id, 2) is None


def test_repeated_claim_counts_once(store: TaskStore) -> None:
    task, plan, ruling = planned(store, limited())
    for _ in range(3):
        claim(store, store.get_task(task.task_id), plan, ruling)
    assert counted(ruling) == 1
    record = store.step(task.task_id, len(plan.steps) - 1)
    assert record is not None
    give_back = lambda: LimitsTable().give_back_of(task.task_id, record.step_index)
    for _ in range(2):
        store.finish_step(task.task_id, record, StepOutcome(error="not_allowed: no"), give_back)
    assert counted(ruling) == 0


def test_claims_at_once_never_exceed_the_limit(store: TaskStore) -> None:
    made = [planned(store, limited()) for _ in range(3 * MOST)]

    def attempt(number: int) -> str:
        task, plan, ruling = made[number]
        for _ in range(20):
            try:
                return claim(TaskStore("TasksTable"), task, plan, ruling).status
            except ThrottledError:  # the state machine tries again
                continue
            except QaesError as error:
                return error.message.split(":")[0]
        return "throttled"

    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(attempt, range(len(made))))
    assert sorted(found) == ["limit_exceeded"] * 2 * MOST + ["running"] * MOST
    assert counted(made[0][2]) == MOST


def test_claim_asks_when_others_took_the_last_room(store: TaskStore) -> None:
    """The compliance agent saw room; the limit lets a group approve more."""
    document = limited({"approvals": 1, "approvers": "cfo"}, most=1)
    first, second = planned(store, document), planned(store, document)
    claim(store, *first)
    with pytest.raises(ApprovalNeededError, match="exceeds the limit of 1"):
        claim(store, *second)
    with pytest.raises(ApprovalNeededError):
        claim(store, *second, "bob")  # not of the group
    assert claim(store, *second, "erin").status == "running"
    assert counted(second[2]) == 2


def test_claim_of_a_retry_does_not_count_against_itself(store: TaskStore) -> None:
    """The first run claimed the step, and its outcome is unknown."""
    task, plan, ruling = planned(store, limited(most=1))
    claim(store, task, plan, ruling)
    store.end_task(task.task_id, "failed", actor="execution", reason="a test")
    task = store.retry(task.task_id, subject="alice")
    last = len(plan.steps) - 1
    assert Intent(task, last, plan.steps[last], ruling).usage() == {ruling.current.limits[0].key: 0}
    assert claim(store, task, plan, ruling).status == "running"
    assert counted(ruling) == 1


def test_claim_states_the_usage_that_its_transaction_guards(store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another task counts between the look at the window and the reservation."""
    first, second = planned(store, limited()), planned(store, limited())
    reserve = LimitsTable.reserve_for

    def after_another(self: LimitsTable, *arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(LimitsTable, "reserve_for", reserve)
        claim(store, *second)
        return reserve(self, *arguments, **options)

    monkeypatch.setattr(LimitsTable, "reserve_for", after_another)
    claim(store, *first)
    *_, event = Outbox("TasksTable").disclosed(first[0].task_id).values()
    assert (event.kind, json.loads(event.output)["limits"][0]["used"]) == ("step_started", 1)
