"""The policy changes while a task is planned, by the ledger's own documents; a stranger still accepts the bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qaes.adapters.task_repository import TaskStore
from qaes.domain.models import Approval
from qaes.domain.policy import DENIED, Rule
from tests.support.cloud import Cloud, call
from tests.workflow.conftest import in_force, publish, verify_bundle
from tests.workflow.test_paths import kinds, raise_always, retry

LESS_RISKY = Rule(allowed=True, requires_approval=True, risk_level="low")
pytestmark = pytest.mark.usefixtures("audit_environment")


def test_one_policy_decides_when_it_changes_between_attempts(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Approval]
) -> None:
    """The first attempt has read the policy and loses its transaction."""
    published: list[str] = []

    def lost_at_first(event: Any) -> None:
        if published:
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TaskStore, "plan_task", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                call("PlanTaskFunction", event)
        published.append(publish("transfer_funds", LESS_RISKY))
        raise ConnectionError("the table did not answer")

    aws.faults["PlanTaskFunction"] = lost_at_first
    task_id = transfer(250)
    decide(task_id, approved=True)
    aws.wait(task_id, "completed")
    store = TaskStore("TasksTable")
    plan = store.plan_of(store.get_task(task_id))
    assert [plan.policy.policy_id] == published
    assert (plan.analysis.risk_level, plan.policy.risk_level) == ("low", "low")
    verify_bundle(aws, task_id)


def failed_before_its_plan(aws: Cloud, transfer: Callable[..., str]) -> str:
    """A task of which nothing is on record but its start and its end."""
    aws.faults["PlanTaskFunction"] = raise_always
    task_id = transfer(250)
    aws.wait(task_id, "failed")
    aws.execution(task_id)
    aws.faults.clear()
    assert kinds(aws, task_id) == ["task_started:pending", "task_ended:failed"]
    return task_id


def test_retry_without_plan_uses_policy_in_force(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Approval]
) -> None:
    """Policy and plan are on record together: a task without a plan is pinned to no policy."""
    task_id = failed_before_its_plan(aws, transfer)
    newest = publish("transfer_funds", LESS_RISKY)
    retry(aws, task_id)
    decide(task_id, approved=True)
    aws.wait(task_id, "completed")
    store = TaskStore("TasksTable")
    plan = store.plan_of(store.get_task(task_id))
    assert (plan.policy.policy_id, plan.analysis.risk_level) == (newest, "low")
    assert kinds(aws, task_id).count("policy_checked:allowed") == 1
    verify_bundle(aws, task_id)


def test_retry_with_plan_uses_recorded_policy(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Approval]
) -> None:
    first = in_force()
    aws.faults["RunStepFunction"] = raise_always
    task_id = transfer(250)
    aws.wait(task_id, "failed")
    aws.execution(task_id)
    aws.faults.clear()
    publish("transfer_funds", LESS_RISKY)
    retry(aws, task_id)
    decide(task_id, approved=True)
    aws.wait(task_id, "completed")
    store = TaskStore("TasksTable")
    plan = store.plan_of(store.get_task(task_id))
    assert (plan.policy.policy_id, plan.analysis.risk_level) == (first, "high")
    assert kinds(aws, task_id).count("policy_checked:allowed") == 1
    verify_bundle(aws, task_id)


def test_retry_without_plan_obeys_policy_in_force(aws: Cloud, transfer: Callable[..., str]) -> None:
    task_id = failed_before_its_plan(aws, transfer)
    newest = publish("transfer_funds", DENIED)
    retry(aws, task_id)
    task = aws.wait(task_id, "denied")
    assert task["reason"] == f"policy {newest} does not allow transfer_funds"
    assert TaskStore("TasksTable").steps(task_id) == []
    verify_bundle(aws, task_id)
