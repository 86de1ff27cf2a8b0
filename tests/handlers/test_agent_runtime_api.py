"""The agent runtime's routes on moto: the progress of a task in any state, and the rights to read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from qaes import VERSION
from qaes.adapters.task_repository import TaskStore
from qaes.domain.models import Outcome
from qaes.domain.tasks.lifecycle import StepOutcome
from tests.handlers.test_gateway import UNKNOWN
from tests.handlers.test_task_repository import claim, new_task, planned
from tests.support.api import ALICE, BOB, CAROL, MALLORY, NOBODY, OLIVIA, Api
from tests.support.cloud import Cloud, cloud


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    return Api(aws, "AgentRuntimeApiFunction")


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def status_of(api: Api, task_id: str) -> dict[str, Any]:
    answer = api("GET", f"/task/{task_id}/status")
    assert answer.status == 200
    return answer.body


def steps(body: dict[str, Any]) -> list[str]:
    return [step["status"] for step in body["steps"]]


def run(store: TaskStore, task_id: str, step_index: int, *, error: str | None = None) -> None:
    """Record a step as the worker does."""
    task = store.get_task(task_id)
    record = claim(store, task_id, store.plan_of(task), step_index, run=task.run)
    store.finish_step(task_id, record, StepOutcome(result={"balance": 1000} if error is None else None, error=error))


def end(store: TaskStore, task_id: str, outcome: Outcome, failed_step: str | None = None) -> None:
    store.end_task(task_id, outcome, actor="execution", reason="because", failed_step=failed_step)


def test_running_task_has_the_inherited_fields(api: Api, store: TaskStore) -> None:
    task_id, plan = planned(store)
    run(store, task_id, 0)
    body = status_of(api, task_id)
    inherited = {
        "task_id": str, "status": str, "current_step": int, "total_steps": int, "steps": list,
        "requires_approval": bool,
    }  # fmt: skip
    assert {name: type(body[name]) for name in inherited} == inherited
    assert (body["task_id"], body["status"], body["total_steps"]) == (task_id, "executing", 3)
    assert [step["step_id"] for step in body["steps"]] == [step.step_id for step in plan.steps]
    first, second, third = body["steps"]
    assert (first["status"], first["result"], first["error"]) == ("succeeded", {"balance": 1000}, None)
    assert (first["attempt"], type(first["duration_ms"])) == (1, int)
    assert (second["status"], second["result"], second["error"], second["attempt"]) == ("pending", None, None, 0)
    assert (third["type"], third["requires_approval"]) == ("onchain_action", True)


def test_task_without_a_plan_has_no_steps_yet(api: Api, store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    nothing_yet = {"current_step": 0, "total_steps": 0, "steps": [], "requires_approval": False, "reason": None}
    assert status_of(api, task.task_id) == {"task_id": task.task_id, "status": "pending"} | nothing_yet


def test_retried_step_shows_its_attempts(api: Api, store: TaskStore) -> None:
    task_id, plan = planned(store)
    for _ in range(2):
        claim(store, task_id, plan, 0, None, run=1, current=plan.policy)
    body = status_of(api, task_id)
    assert steps(body) == ["running", "pending", "pending"]
    assert (body["steps"][0]["attempt"], body["steps"][0]["duration_ms"]) == (2, None)


def test_waiting_step_reports_status_until_decision(api: Api, store: TaskStore) -> None:
    task_id, plan = planned(store)
    for index in range(2):
        run(store, task_id, index)
    store.request_approval(store.get_task(task_id), plan, 2, "token-1", 60)
    body = status_of(api, task_id)
    assert (body["status"], body["requires_approval"], body["current_step"]) == ("waiting_approval", True, 2)
    assert steps(body) == ["succeeded", "succeeded", "waiting_approval"]
    store.decide(task_id, approved=True, subject="bob", reason="x")
    body = status_of(api, task_id)
    assert (body["status"], steps(body)) == ("executing", ["succeeded", "succeeded", "pending"])


def test_failed_task_shows_the_step_that_failed_and_why(api: Api, store: TaskStore) -> None:
    task_id, _ = planned(store)
    run(store, task_id, 0)
    run(store, task_id, 1, error="insufficient_balance: 4 QU are missing")
    end(store, task_id, "failed", "step_2")
    body = status_of(api, task_id)
    assert (body["status"], steps(body)) == ("failed", ["succeeded", "failed", "skipped"])
    assert body["current_step"] == 1
    failed = body["steps"][1]
    assert (failed["result"], failed["error"]) == (None, "insufficient_balance: 4 QU are missing")


def test_step_whose_worker_died_has_failed_with_the_task(api: Api, store: TaskStore) -> None:
    task_id, plan = planned(store)
    claim(store, task_id, plan, 0, None, run=1, current=plan.policy)
    reason = "a service did not respond; retry the task"
    store.end_task(task_id, "failed", actor="execution", reason=reason, failed_step="step_1")
    body = status_of(api, task_id)
    assert steps(body) == ["failed", "skipped", "skipped"]
    assert (body["steps"][0]["error"], body["reason"]) == (reason, reason)


def test_open_transfer_has_not_failed_with_its_task(api: Api, store: TaskStore) -> None:
    task_id, plan = planned(store)
    for index in range(2):
        run(store, task_id, index)
    claim(store, task_id, plan, 2, None, run=1, current=plan.policy)
    end(store, task_id, "failed")
    assert plan.steps[2].type == "onchain_action"
    assert steps(status_of(api, task_id)) == ["succeeded", "succeeded", "running"]


def test_steps_that_a_task_did_not_come_to_are_skipped(api: Api, store: TaskStore) -> None:
    outcomes: tuple[Outcome, ...] = ("denied", "rejected", "expired", "failed")
    for outcome in outcomes:
        task_id, plan = planned(store)
        run(store, task_id, 0)
        if outcome in {"rejected", "expired"}:
            store.request_approval(store.get_task(task_id), plan, 2, "token", 60)
        if outcome == "rejected":
            store.decide(task_id, approved=False, subject="bob", reason="no")
        end(store, task_id, outcome)
        body = status_of(api, task_id)
        assert (body["status"], steps(body)) == (outcome, ["succeeded", "skipped", "skipped"])


def test_step_that_never_ran_shows_why_the_task_failed(api: Api, store: TaskStore) -> None:
    """A plain step leaves no record when its function fails for good: the task names the failed step."""
    task_id, _ = planned(store)
    run(store, task_id, 0)
    end(store, task_id, "failed", failed_step="step_2")
    body = status_of(api, task_id)
    assert steps(body) == ["succeeded", "failed", "skipped"]
    assert body["steps"][1]["error"] == "because"


def test_status_has_no_steps_when_denied_without_plan(api: Api, store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    end(store, task.task_id, "denied")
    body = status_of(api, task.task_id)
    assert (body["status"], body["steps"], body["total_steps"]) == ("denied", [], 0)


def test_completed_task_shows_all_results(api: Api, store: TaskStore) -> None:
    task_id, _ = planned(store)
    for index in range(3):
        run(store, task_id, index)
    end(store, task_id, "completed")
    body = status_of(api, task_id)
    assert (body["status"], steps(body)) == ("completed", ["succeeded"] * 3)
    assert all(step["result"] == {"balance": 1000} for step in body["steps"])


def test_status_is_shown_to_participants_only(api: Api, store: TaskStore) -> None:
    task_id, _ = planned(store)
    for caller in (ALICE, BOB, CAROL, OLIVIA):
        assert api("GET", f"/task/{task_id}/status", **caller).status == 200
    assert api("GET", f"/task/{task_id}/status", **(ALICE | {"roles": "staff"})).status == 403
    assert api("GET", f"/task/{task_id}/status", **NOBODY).status == 401
    hidden = api("GET", f"/task/{task_id}/status", **MALLORY)
    missing = api("GET", f"/task/{UNKNOWN}/status", **MALLORY)
    assert (hidden.status, hidden.body["detail"]) == (missing.status, missing.body["detail"]) == (404, "no such task")


def test_unknown_task_id_returns_404(api: Api, store: TaskStore) -> None:
    _, plan = planned(store)
    for task_id in ("nonsense", "TASK", UNKNOWN, UNKNOWN.upper(), plan.plan_id):
        assert api("GET", f"/task/{task_id}/status", **OLIVIA).status == 404, task_id
    assert api("POST", f"/task/{UNKNOWN}/status", {}, **OLIVIA).status == 405
    assert api("GET", f"/task/{UNKNOWN}/state", **OLIVIA).status == 404


def test_health_names_missing_dependencies(api: Api) -> None:
    answer = api("GET", "/agent-runtime/health", **NOBODY)
    assert (answer.status, answer.body["failing"]) == (503, ["state_machine"])
    boto3.client("dynamodb").delete_table(TableName="TasksTable")
    answer = api("GET", "/agent-runtime/health", **NOBODY)
    assert (answer.status, answer.body["failing"]) == (503, ["tasks_table", "state_machine"])


def test_health_is_well_when_all_is_there() -> None:
    with cloud() as aws:
        answer = Api(aws, "AgentRuntimeApiFunction")("GET", "/agent-runtime/health", **NOBODY)
    assert (answer.status, answer.body) == (200, {"status": "healthy", "service": "agent-runtime", "version": VERSION})
