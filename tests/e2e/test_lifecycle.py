"""Lists, cancellation and retry on the deployed template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from tests.e2e.conftest import MONITORING, SOURCE, Api


def test_cancelled_task_stops_its_execution(api: Api, waiting: Callable[..., str]) -> None:
    task_id = waiting(4)
    answer = api("requester", "POST", f"/task/{task_id}/cancel", {"reason": "no longer needed"})
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    execution = api.cloud.client("stepfunctions").describe_execution(executionArn=api.execution_arn(task_id))
    assert execution["status"] == "ABORTED"
    trail = api.trail(task_id)
    assert [entry["kind"] for entry in trail][-2:] == ["approval_cancelled", "task_ended"]
    assert (trail[-1]["actor"], trail[-1]["status"]) == ("alice", "cancelled")
    assert api("requester", "POST", f"/task/{task_id}/cancel").status_code == 409
    assert api("requester", "POST", f"/task/{task_id}/retry").status_code == 409
    assert api.decide(task_id, approved=True).status_code == 409


@contextmanager
def nothing_reaches_the_network(api: Api) -> Iterator[None]:
    """Let the network take each broadcast and forget it: a transfer expires, and its task fails."""
    assert api("operator", "PUT", "/mock/faults", {"drop": 1_000_000}).status_code == 200
    try:
        yield
    finally:
        assert api("operator", "PUT", "/mock/faults", {}).status_code == 200


def test_failed_task_is_retried_from_the_step_that_failed(api: Api, waiting: Callable[..., str]) -> None:
    before, task_id = api.balance(SOURCE), waiting(2)
    with nothing_reaches_the_network(api):
        api.decide(task_id, approved=True)
        task = api.wait(task_id)
    assert (task["status"], task["error"]["step_id"]) == ("failed", "step_3")
    assert "expired" in task["error"]["reason"]
    assert [step["status"] for step in api.steps(task_id)] == ["succeeded", "succeeded", "failed"]
    answer = api("requester", "POST", f"/task/{task_id}/retry")
    assert (answer.status_code, answer.json()["status"]) == (202, "executing")
    api.wait(task_id, "waiting_approval")
    api.decide(task_id, approved=True)
    assert api.wait(task_id)["status"] == "completed"
    assert before - api.balance(SOURCE) == 2
    kinds = [entry["kind"] for entry in api.trail(task_id)]
    assert (kinds.count("task_retried"), kinds.count("approval_requested"), kinds.count("task_ended")) == (1, 2, 2)
    assert kinds.count("step_executed") == 4, "two that succeeded once, and the transfer twice"
    assert [step["attempt"] for step in api.steps(task_id)] == [1, 1, 2]


def fifty_at_once(api: Api, who: str, path: str, body: Any, status: int) -> httpx.Response:
    """Ask fifty times at once under one key; all answers are the same, and one of them is no replay."""
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: api(who, "POST", path, body, Idempotency_Key=f"fifty:{path}"), range(50)))
    assert {answer.status_code for answer in answers} == {status}
    first = [answer for answer in answers if "Idempotent-Replay" not in answer.headers]
    assert len(first) == 1
    assert {answer.headers["Idempotent-Replay"] for answer in answers if answer is not first[0]} == {"true"}
    return first[0]


def test_fifty_starts_at_once_under_one_key_start_one_task(api: Api) -> None:
    def tasks() -> int:
        wanted = {"FilterExpression": "sk = :task", "ExpressionAttributeValues": {":task": {"S": "TASK"}}}
        return len(api.items("TasksTable", **wanted))

    before = tasks()
    answer = fifty_at_once(api, "requester", "/task/start", dict(MONITORING), 202)
    assert tasks() == before + 1
    assert api.wait(answer.json()["task_id"])["status"] == "completed"


def test_concurrent_changes_under_one_key_take_effect_once(api: Api, waiting: Callable[..., str]) -> None:
    """On one task: approved, it fails; retried, it waits again; it is cancelled."""
    task_id, approval = waiting(2), {"approved": True, "reason": "checked"}
    with nothing_reaches_the_network(api):
        answer = fifty_at_once(api, "approver", f"/task/{task_id}/approve", approval, 200)
        assert answer.json()["approved"] is True
        assert api.wait(task_id)["status"] == "failed"
    answer = fifty_at_once(api, "requester", f"/task/{task_id}/retry", None, 202)
    assert answer.json()["status"] == "executing"
    api.wait(task_id, "waiting_approval")
    answer = fifty_at_once(api, "requester", f"/task/{task_id}/cancel", {"reason": "enough"}, 200)
    assert answer.json()["status"] == "cancelled"
    kinds = [entry["kind"] for entry in api.trail(task_id)]
    assert [kinds.count(kind) for kind in ("approval_decided", "task_retried", "approval_cancelled")] == [1, 1, 1]
    executions = api.cloud.client("stepfunctions").get_paginator("list_executions")
    names = [
        execution["name"]
        for page in executions.paginate(stateMachineArn=api.cloud.outputs["StateMachineArn"])
        for execution in page["executions"]
        if execution["name"].startswith(task_id)
    ]
    assert sorted(names) == [task_id, f"{task_id}-2"]


def test_list_is_an_inbox_and_has_pages(api: Api, waiting: Callable[..., str]) -> None:
    task_id = waiting(1)
    inbox = api("approver", "GET", "/tasks?status=waiting_approval").json()["tasks"]
    assert task_id in [task["task_id"] for task in inbox]
    assert all(task["waiting_until"] for task in inbox)
    first = api("auditor", "GET", "/tasks?limit=2").json()
    second = api("auditor", "GET", f"/tasks?limit=2&cursor={first['next_cursor']}").json()
    ids = [task["task_id"] for task in first["tasks"] + second["tasks"]]
    assert ids == sorted(set(ids), reverse=True)
    assert len(ids) == 4
    mallory = api.cloud.token("requester", subject="mallory")
    assert api(None, "GET", "/tasks", token=mallory).json() == {"tasks": [], "next_cursor": None}
    assert api("requester", "POST", f"/task/{task_id}/cancel").status_code == 200


def test_decision_on_another_plan_is_refused(api: Api, waiting: Callable[..., str]) -> None:
    task_id = waiting(1)
    body = {"approved": True, "reason": "checked", "plan_hash": "0" * 64}
    assert api("approver", "POST", f"/task/{task_id}/approve", body).status_code == 409
    body["plan_hash"] = api.task(task_id)["approval"]["plan_hash"]
    assert api("approver", "POST", f"/task/{task_id}/approve", body).status_code == 200
    assert api.wait(task_id)["status"] == "completed"
