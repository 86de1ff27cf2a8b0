"""Responses of the gateway and the planner's API by a policy of format 2: start, preview and approval."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gateway import known_policy
from qaes.adapters.task_repository import TaskStore
from tests.support.api import ALICE, Answer, Api, items, named, set_environment
from tests.support.cloud import Cloud, cloud
from tests.support.policies import REFUND
from tests.support.publishing import GROUPS, publish

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"
FREE = {"max_amount": 10, "approvals": 0}
BY_FINANCE = {"max_amount": 500, "approvals": 2, "approvers": "finance", "expires_after": 900}
COUNT = {"window_seconds": 3600, "max_count": 9, "per": "action", "over": "deny"}
RULES: dict[str, Any] = {
    "transfer_funds": {"allowed": True, "risk_level": "high", "tiers": [FREE, BY_FINANCE]},
    "refund_customer": {"allowed": True, "risk_level": "low", "tiers": [{"max_amount": None, "approvals": 0}]},
}
ACTIONS = {"refund_customer": REFUND}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    for function in ("QubicApiFunction", "PlannerApiFunction", "GatewayFunction"):
        set_environment(function, monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    publish(aws, RULES, actions=ACTIONS)
    aws.invocations.clear()
    return Api(aws, "GatewayFunction")


def transfer(api: Api, amount: int, **caller: Any) -> Answer:
    body = {
        "task_type": "transfer_funds", "description": "pay the invoice", "wallet_address": SOURCE,
        "parameters": {"to_address": DESTINATION, "amount": amount},
    }  # fmt: skip
    return api("POST", "/task/start", body, **caller)


def refund(api: Api, parameters: Any, path: str = "/task/start", **caller: Any) -> Answer:
    body = {"task_type": "refund_customer", "description": "a refund", "parameters": parameters}
    return api("POST", path, body, **caller)


def tasks() -> list[str]:
    return [item["sk"]["S"] for item in items("TasksTable", "DecisionsTable")]


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"order_id": "12", "amount": 5}, "parameters.order_id"),
        ({"order_id": "123456"}, "parameters.amount"),
        ({"order_id": "123456", "amount": 0}, "parameters.amount"),
        ({"order_id": "123456", "amount": 5.0}, "parameters.amount"),
        ({"order_id": "123456", "amount": None}, "parameters.amount"),
        ({"order_id": "123456", "amount": 5, "more": 1}, "parameters.more"),
        (None, "parameters.order_id"),
    ],
)
def test_start_refuses_parameters_that_do_not_fit_the_schema(api: Api, parameters: Any, field: str) -> None:
    answer = refund(api, parameters)
    assert (answer.status, named(answer)) == (422, {field}), answer
    assert tasks() == []


def test_start_takes_parameters_as_the_schema_defines_them(api: Api) -> None:
    answer = refund(api, {"order_id": "123456", "amount": 5})
    assert answer.status == 202
    assert TaskStore("TasksTable").get_task(answer.body["task_id"]).parameters == {"order_id": "123456", "amount": 5}


def test_start_refuses_a_task_that_too_few_can_approve(aws: Cloud, api: Api) -> None:
    publish(aws, RULES, actions=ACTIONS, groups=GROUPS | {"finance": ["alice", "bob"]})
    known_policy.forget()
    answer = transfer(api, 250)
    assert (answer.status, named(answer), answer.body["code"]) == (422, {"task_type"}, "too_few_approvers")
    assert "requires 2 approvals by the group `finance`, in which 1 person can approve" in answer.body["detail"]
    assert tasks() == []
    assert transfer(api, 250, subject="zed").status == 202  # alice and bob can approve it
    assert transfer(api, 10).status == 202  # no approval is needed


def test_start_accepts_actions_the_policy_denies(api: Api) -> None:
    """The task is recorded, and ends as denied."""
    assert transfer(api, 501).status == 202
    assert api("POST", "/task/start", {"task_type": "note", "description": "x"}).status == 202


def test_start_reads_the_policy_once_in_a_while(aws: Cloud, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer(api, 250)
    refund(api, {"order_id": "123456", "amount": 5})
    assert aws.invocations["LedgerFunction"] == 1
    monkeypatch.setattr(known_policy.time, "monotonic", lambda: 1e12)
    transfer(api, 250)
    assert aws.invocations["LedgerFunction"] == 2


def test_start_needs_no_ledger(aws: Cloud, api: Api) -> None:
    def down(event: Any) -> None:
        raise ConnectionError("down")

    aws.faults["LedgerFunction"] = down
    assert transfer(api, 250).status == 202


def test_start_repeats_its_answer_after_policy_change(aws: Cloud, api: Api) -> None:
    key = {"headers": {"Idempotency-Key": "invoice-1"}}
    first = transfer(api, 250, **key)
    publish(aws, RULES, actions=ACTIONS, groups=GROUPS | {"finance": ["alice", "bob"]})
    known_policy.forget()
    again = transfer(api, 250, **key)
    assert (again.status, again.body["task_id"]) == (202, first.body["task_id"])
    assert transfer(api, 250).status == 422


# A preview


def preview(aws: Cloud, body: dict[str, Any]) -> dict[str, Any]:
    answer = Api(aws, "PlannerApiFunction")("POST", "/plan/create", body, **ALICE)
    assert answer.status == 200, answer
    return dict(answer.body["verdict"])


@pytest.mark.parametrize(
    ("amount", "verdict", "approvals"), [(10, "execute", 0), (250, "await_approval", 2), (501, "denied", 0)]
)
def test_preview_shows_the_verdict_of_the_tier(aws: Cloud, api: Api, amount: int, verdict: str, approvals: int) -> None:
    found = preview(aws, {
        "task_type": "transfer_funds", "description": "x", "wallet_address": SOURCE,
        "parameters": {"to_address": DESTINATION, "amount": amount},
    })  # fmt: skip
    assert (found["verdict"], found["approvals"]) == (verdict, approvals)


@pytest.mark.parametrize(
    ("over", "verdict"), [("deny", "denied"), ({"approvals": 1, "approvers": "cfo"}, "await_approval")]
)
def test_preview_reads_the_limits_usage(aws: Cloud, api: Api, over: Any, verdict: str) -> None:
    limit = {"window_seconds": 3600, "max_amount": 100, "per": "action", "over": over}
    rules = RULES | {"refund_customer": RULES["refund_customer"] | {"limits": [limit]}}
    publish(aws, rules, actions=ACTIONS)
    body = {"task_type": "refund_customer", "description": "x", "parameters": {"order_id": "123456", "amount": 60}}
    assert preview(aws, body)["verdict"] == "execute"
    task_id = refund(api, body["parameters"]).body["task_id"]
    for step in aws.invoke("PlanTaskFunction", {"task_id": task_id})["steps"]:
        aws.invoke("RunStepFunction", {"task_id": task_id, "step_index": step["step_index"]})
    aws.invoke("ExecuteActionFunction", {"task_id": task_id, "task_token": "token"})
    found = preview(aws, body)
    assert found["verdict"] == verdict
    if verdict == "denied":
        assert found["reason"].startswith("limit_exceeded: `amount` 60 EUR-cent exceeds the limit of 100")


def test_preview_shows_schema_errors(aws: Cloud, api: Api) -> None:
    body = {"task_type": "refund_customer", "description": "x", "parameters": {"order_id": "12", "amount": 5}}
    found = preview(aws, body)
    assert (found["verdict"], found["reason"].split(":")[0]) == ("denied", "invalid_parameters")


# The approval


def test_question_shows_the_tier_of_format_2(aws: Cloud, api: Api) -> None:
    task_id = transfer(api, 250).body["task_id"]
    planned = aws.invoke("PlanTaskFunction", {"task_id": task_id})
    for step in planned["steps"]:
        aws.invoke("RunStepFunction", {"task_id": task_id, "step_index": step["step_index"]})
    aws.invoke("AwaitApprovalFunction", {"task_id": task_id, "task_token": "token"})
    question = api("GET", f"/task/{task_id}", subject="bob", roles="approver").body["approval"]
    shown = ("tier", "approvers", "amount", "unit", "approvals_required", "quorums")
    assert {name: question[name] for name in shown} == {
        "tier": 1, "approvers": "finance", "amount": 250, "unit": "QU", "approvals_required": 2,
        "quorums": [{"approvals": 2, "approvers": "finance"}],
    }  # fmt: skip
    assert (question["rule"]["approvals"], question["rule"]["expires_after"]) == (2, 900)
    refused = api(
        "POST", f"/task/{task_id}/approve", {"approved": True, "reason": ""}, subject="erin", roles="approver"
    )
    assert refused.status == 403
    pages = api.event("GET", "/tasks", subject="dora", roles="approver")
    query = {"status": "waiting_approval", "for_me": "true"}
    pages |= {"queryStringParameters": query, "multiValueQueryStringParameters": {k: [v] for k, v in query.items()}}
    listed = api.checked(aws.invoke("GatewayFunction", pages)).body["tasks"]
    assert [task["task_id"] for task in listed] == [task_id]
