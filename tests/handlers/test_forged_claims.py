"""Claims of an operator's action that a role of the engine forges, without the worker's transaction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from qaes.adapters import suspensions
from qaes.adapters.intents import Intent
from qaes.adapters.task_events import event_item
from qaes.adapters.task_items import TaskItems, task_item
from qaes.adapters.task_repository import TaskStore
from qaes.domain import planning
from qaes.domain.ids import new_plan_id, now, timestamp
from qaes.domain.models import Plan, Task
from qaes.domain.policy import Policy
from qaes.domain.ruling import Ruling, rule
from qaes.domain.suspensions import Suspension
from qaes.domain.tasks import lifecycle
from tests.handlers.test_policy_format_2 import enact
from tests.handlers.test_task_repository import new_task
from tests.support.api import Api, set_environment
from tests.support.cloud import Cloud, call, cloud
from tests.support.policies import CONTENT, changed

ONCE = [{"window_seconds": 86_400, "max_count": 1, "per": "action", "over": "deny"}]
LAST = 1
"""The action's step: the step before it reads the policy."""


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setattr("qaes.adapters.executions._send", lambda name, **said: True)
    set_environment("ExecuteActionFunction", monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def enacted(aws: Cloud, limits: list[dict[str, Any]]) -> None:
    enact(aws, Api(aws, "QubicApiFunction"), changed(CONTENT, "rules.refund_customer.limits", limits))


def planned(aws: Cloud, store: TaskStore) -> tuple[Task, Plan, Ruling]:
    """A task whose steps before the action have run; the action needs no approval."""
    fields = {"task_type": "refund_customer", "parameters": {"order_id": "123456", "amount": 500}}
    task, _ = store.start_task(new_task().model_copy(update=fields))
    policy = Policy.model_validate(call("LedgerFunction", {"operation": "policy"})["result"])
    ruling = rule(task, policy, policy)
    plan = planning.build_plan(
        plan_id=new_plan_id(), task_id=task.task_id, created_at=timestamp(now()), task_type=task.task_type,
        description=task.description, parameters=task.parameters,
        analysis=planning.analyze(task.task_type, policy), policy=ruling.pins,
    )  # fmt: skip
    store.plan_task(task, plan)
    aws.invoke("RunStepFunction", {"task_id": task.task_id, "step_index": 0})
    return store.get_task(task.task_id), plan, ruling


def forge(store: TaskStore, task: Task, plan: Plan, ruling: Ruling) -> None:
    """Write the step's record, its event and the task's count, as a role that may write TasksTable alone."""
    history, limits = lifecycle.History(plan, store.records(task.task_id)), ruling.limits({})
    change = lifecycle.claim_step(task, LAST, history, None, ruling.recorded, limits=limits, run=task.run, at=now())
    assert change.step is not None
    for item in (
        TaskItems("any").put_step(task.task_id, f"STEP#{LAST:03d}", change.step, before=None)["Put"]["Item"],
        event_item(task.task_id, task.events + 1, change.events),
        task_item(task.model_copy(update={"events": task.events + 1})),
    ):
        boto3.client("dynamodb").put_item(TableName="TasksTable", Item=item)


def act(aws: Cloud, task: Task) -> str:
    return str(aws.invoke("ExecuteActionFunction", {"task_id": task.task_id, "task_token": "a token"})["status"])


def suspend(name: str) -> None:
    names = {name: Suspension(by="olivia", at=timestamp(now()), reason="an incident")}
    boto3.client("dynamodb").transact_write_items(TransactItems=suspensions.puts(names))


@pytest.mark.parametrize("limits", [ONCE, []], ids=["limited", "unlimited"])
def test_forged_claim_does_not_hide_a_suspension(aws: Cloud, store: TaskStore, limits: list[dict[str, Any]]) -> None:
    enacted(aws, limits)
    made = planned(aws, store)
    suspend("refund_customer")
    forge(store, *made)
    acted = aws.invocations["LedgerTransferFunction"]
    assert act(aws, made[0]) == "StepDeniedError"
    assert aws.invocations["LedgerTransferFunction"] == acted


def test_forged_claim_does_not_pass_a_full_limit(aws: Cloud, store: TaskStore) -> None:
    enacted(aws, ONCE)
    first, made = planned(aws, store), planned(aws, store)
    assert act(aws, first[0]) == "succeeded"
    forge(store, *made)
    acted = aws.invocations["LedgerTransferFunction"]
    assert act(aws, made[0]) == "StepDeniedError"
    assert aws.invocations["LedgerTransferFunction"] == acted


@pytest.mark.parametrize("limits", [ONCE, []], ids=["limited", "unlimited"])
def test_genuine_claim_continues_after_a_crash(aws: Cloud, store: TaskStore, limits: list[dict[str, Any]]) -> None:
    """The action is suspended after the claim: an effect that may have begun goes on."""
    enacted(aws, limits)
    task, plan, ruling = planned(aws, store)
    store.claim_step(task, plan, LAST, None, ruling.recorded, intent=Intent(task, LAST, plan.steps[LAST], ruling))
    suspend("*")
    assert act(aws, task) == "succeeded"
