"""The ways that a task can end, from the request to the last audit entry."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from local.readiness import HEALTH_PATHS
from tests.e2e.conftest import APPROVAL_SECONDS, DESTINATION, EMPTY, MONITORING, SOURCE, Api, transfer

SECOND_APPROVER = "barbara"


@pytest.mark.usefixtures("nobody_decides")
@pytest.mark.parametrize("path", HEALTH_PATHS)
def test_each_service_is_healthy(api: Api, path: str) -> None:
    answer = api("requester", "GET", path)
    assert answer.status_code == 200
    assert answer.json()["status"] == "healthy"
    assert answer.json()["service"]


def test_monitoring_task_completes_by_itself(api: Api) -> None:
    task_id = api.start(MONITORING)
    task = api.wait(task_id)
    assert (task["status"], task["requires_approval"], task["error"]) == ("completed", False, None)
    plan = api("operator", "GET", f"/plan/{task['plan_id']}").json()
    assert [step["type"] for step in plan["steps"]] == ["check_balance", "policy_check", "monitor_action"]
    assert plan["policy"]["allowed"] is True
    steps = api.steps(task_id)
    assert [step["status"] for step in steps] == ["succeeded"] * 3
    assert steps[2]["result"]["alert"] is False
    trail = api.trail(task_id)
    assert [entry["kind"] for entry in trail] == [
        "task_started", "policy_checked", "plan_built", *["step_started", "step_executed"] * 3, "task_ended",
    ]  # fmt: skip
    for entry in trail:
        assert api("auditor", "GET", f"/tx/{entry['qubic_txid']}").json()["hash"]
    evidence = api("auditor", "GET", f"/audit/verify/{trail[4]['output_hash']}").json()
    assert (evidence["verified"], evidence["network"]) == (True, "mock")
    assert api("auditor", "GET", f"/audit/verify/{'0' * 64}").json()["verified"] is False


def test_transfer_waits_for_other_person_and_moves_once(api: Api, waiting: Callable[..., str]) -> None:
    before = api.balance(SOURCE), api.balance(DESTINATION)
    task_id = waiting(250)
    question = api.task(task_id)["approval"]
    assert (question["step_type"], question["parameters"]["amount"]) == ("onchain_action", 250)
    assert (api.balance(SOURCE), api.balance(DESTINATION)) == before
    assert api.decide(task_id, approved=True, who="requester").status_code == 403
    assert api.decide(task_id, approved=True).status_code == 200
    again = api.decide(task_id, approved=True)
    assert (again.status_code, again.headers["Content-Type"]) == (409, "application/problem+json")
    assert api.wait(task_id)["status"] == "completed"
    assert (api.balance(SOURCE), api.balance(DESTINATION)) == (before[0] - 250, before[1] + 250)
    trail = api.trail(task_id)
    kinds = [entry["kind"] for entry in trail]
    assert kinds.index("approval_requested") < kinds.index("approval_decided") < kinds.index("task_ended")
    decision = trail[kinds.index("approval_decided")]
    assert (decision["actor"], decision["status"]) == ("bob", "approved")
    after = api.decide(task_id, approved=True)
    assert after.status_code == 409
    assert after.json()["task_status"] == "completed"


def test_rejected_transfer_moves_nothing(api: Api, waiting: Callable[..., str]) -> None:
    before = api.balance(SOURCE)
    task_id = waiting()
    assert api.decide(task_id, approved=False, reason="no such invoice").status_code == 200
    task = api.wait(task_id)
    assert task["status"] == "rejected"
    assert "no such invoice" in task["error"]["reason"]
    assert api.steps(task_id)[-1]["status"] == "skipped"
    assert api.balance(SOURCE) == before
    assert [entry["status"] for entry in api.trail(task_id)][-2:] == ["rejected", "rejected"]


def test_action_without_a_rule_is_denied_and_nothing_executed(api: Api) -> None:
    task_id = api.start({"task_type": "launch_rocket", "description": "to the moon"})
    task = api.wait(task_id)
    assert task["status"] == "denied"
    assert "launch_rocket" in task["error"]["reason"]
    assert api.steps(task_id) == []
    assert not {"step_started", "step_executed"} & {entry["kind"] for entry in api.trail(task_id)}


def test_transfer_above_balance_denied_end_to_end(api: Api) -> None:
    before = api.balance(EMPTY)
    task_id = api.start(transfer(before + 1, EMPTY))
    task = api.wait(task_id)
    assert task["status"] == "denied"
    assert task["error"]["reason"].startswith(f"insufficient_balance: the wallet holds {before} QU")
    assert api.balance(EMPTY) == before
    assert "approval_requested" not in {entry["kind"] for entry in api.trail(task_id)}


def test_approver_sees_the_balance_of_the_wallet_that_pays(api: Api, waiting: Callable[..., str]) -> None:
    task_id = waiting(1)
    shown = api.task(task_id)["approval"]["balance"]
    assert shown["balance"] == api.balance(SOURCE)
    assert 0 < shown["available"] <= shown["balance"]
    assert shown["tick"] > 0
    assert api("requester", "POST", f"/task/{task_id}/cancel").status_code == 200


def test_key_makes_a_repeated_request_harmless(api: Api) -> None:
    key = {"Idempotency_Key": "e2e-1"}
    first = api.start(MONITORING, **key)
    again = api("requester", "POST", "/task/start", dict(MONITORING), **key)
    assert (again.status_code, again.json()["task_id"]) == (202, first)
    assert again.headers["Idempotent-Replay"] == "true"
    other = api("requester", "POST", "/task/start", transfer(), **key)
    assert other.status_code == 409


def test_plan_is_made_without_being_executed(api: Api) -> None:
    answer = api("requester", "POST", "/plan/create", transfer(5))
    assert answer.status_code in {200, 201}
    plan = answer.json()
    assert [step["requires_approval"] for step in plan["steps"]] == [False, False, True]
    assert plan.pop("verdict")["verdict"] == "await_approval"  # of the moment: it is not stored with the plan
    assert api("requester", "GET", f"/plan/{plan['plan_id']}").json() == plan


@pytest.mark.parametrize(("task", "limit"), [(MONITORING, 7), (transfer(3), 9)], ids=["monitoring", "transfer"])
def test_task_costs_at_most_promised_state_transitions(api: Api, task: dict[str, object], limit: int) -> None:
    task_id = api.start(task)
    if task is not MONITORING:
        api.wait(task_id, "waiting_approval")
        api.decide(task_id, approved=True)
    assert api.wait(task_id)["status"] == "completed"
    entered = [
        event["stateEnteredEventDetails"]["name"]
        for event in api.history(task_id)
        if "stateEnteredEventDetails" in event
    ]
    assert entered[0] == "PlanTask"
    assert entered[-1] == ("RunSteps" if task is MONITORING else "ExecuteAction")  # no events from inside a map, here
    assert len(entered) <= limit


def test_expired_approval_ends_task_as_expired(api: Api, nobody_decides: str) -> None:
    task = api.wait(nobody_decides, "expired", seconds=APPROVAL_SECONDS + 40)
    assert task["approval"] is None
    late = api.decide(nobody_decides, approved=True)
    assert late.status_code == 409
    assert late.json()["task_status"] == "expired"
    assert [entry["kind"] for entry in api.trail(nobody_decides)][-2:] == ["approval_expired", "task_ended"]
