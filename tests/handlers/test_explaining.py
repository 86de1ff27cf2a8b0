"""Explanations of the policy's decisions: `POST /policy/decide` and `GET /actions`. Nothing is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from qaes.adapters import dynamo
from qaes.adapters.limits import LimitsTable
from qaes.domain.policy import ActionRequest, evaluate
from tests.handlers.test_policy_format_2 import FORMAT_1, enact, propose
from tests.support.api import ALICE, BOB, CAROL, MALLORY, OLIVIA, Answer, Api, items, named
from tests.support.cloud import Cloud, cloud
from tests.support.policies import CONTENT, changed, policy

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"
AGENT = ALICE | {"agent": "crm-agent"}
TRANSFER_RULE: dict[str, Any] = {
    "allowed": True,
    "risk_level": "high",
    "tiers": [{"max_amount": 100, "approvals": 0}, {"max_amount": 400, "approvals": 2, "approvers": "finance"}],
    "limits": [
        {"window_seconds": 86400, "max_amount": 500, "per": "source", "over": "deny"},
        {"window_seconds": 3600, "max_count": 1, "per": "requester", "over": {"approvals": 1, "approvers": "cfo"}},
    ],
}


def refund(amount: Any = 100, order_id: str = "123456") -> dict[str, Any]:
    return {"action": "refund_customer", "parameters": {"order_id": order_id, "amount": amount}}


def transfer(amount: Any = 100) -> dict[str, Any]:
    parameters = {"wallet_address": SOURCE, "to_address": DESTINATION, "amount": amount}
    return {"action": "transfer_funds", "parameters": parameters}


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    return Api(aws, "PlannerApiFunction")


@pytest.fixture
def qubic(aws: Cloud) -> Api:
    return Api(aws, "QubicApiFunction")


@pytest.fixture
def format_2(aws: Cloud, qubic: Api) -> None:
    content = copy.deepcopy(CONTENT)
    content["rules"]["transfer_funds"] = TRANSFER_RULE
    enact(aws, qubic, content, ["monitoring", "transaction"])


def explain(api: Api, body: dict[str, Any], **caller: Any) -> dict[str, Any]:
    before = items()
    answer = api("POST", "/policy/decide", body, **caller)
    assert answer.status == 200, answer
    assert items() == before, "nothing is written"
    return dict(answer.body)


def refused(api: Api, body: dict[str, Any], **caller: Any) -> Answer:
    before = items()
    answer = api("POST", "/policy/decide", body, **caller)
    assert items() == before
    return answer


def test_explain_names_tier_people_and_room(api: Api, format_2: None) -> None:
    found = explain(api, refund(20_000))
    limits = found.pop("limits")
    assert found == {
        "policy_id": found["policy_id"],
        "version": 2,
        "status": "in_force",
        "action": "refund_customer",
        "requester": "alice",
        "agent": None,
        "decision": "await_approval",
        "code": "allowed",
        "reason": "tier 2 of 2 (up to 200000 EUR-cent) requires 2 approvals by the group `finance`",
        "risk_level": "medium",
        "tier": 1,
        "approvals": [{"approvals": 2, "approvers": "finance", "eligible": 3}],
        "signature": False,
        "expires_after": 14400,
        "escalate_after": 3600,
        "escalate_to": "cfo",
        "amount": 20_000,
        "unit": "EUR-cent",
        "destination": "123456",
        "source": None,
        "suspended": False,
    }
    assert [(each["per"], each["used"], each["remaining"], each["add"], each["exceeded"]) for each in limits] == [
        ("action", 0, 500_000, 20_000, False), ("requester", 0, 20, 1, False)
    ]  # fmt: skip
    assert limits[0]["words"] == "500000 EUR-cent of 500000 left in 86400 s for this action"


@pytest.mark.parametrize(
    ("body", "decision", "code"),
    [
        (refund(100), "execute", "allowed"),
        (refund(200_000), "await_approval", "allowed"),
        (refund(200_001), "denied", "over_max_amount"),
        (refund("100"), "denied", "invalid_amount"),
        (refund(100, "12"), "denied", "invalid_parameters"),
        (transfer(100), "execute", "allowed"),
        (transfer(400), "await_approval", "allowed"),
        (transfer(401), "denied", "over_max_amount"),
        ({"action": "monitor_wallet", "parameters": {"wallet_address": SOURCE}}, "denied", "not_allowed"),
        ({"action": "monitoring", "parameters": {"wallet_address": SOURCE}}, "denied", "not_allowed"),
        ({"action": "burn"}, "denied", "unknown_action"),
    ],
)
def test_explain_decides_as_a_task_is_decided(
    api: Api, format_2: None, body: dict[str, Any], decision: str, code: str
) -> None:
    found = explain(api, body)
    assert (found["decision"], found["code"]) == (decision, code), found
    assert found["reason"]


def test_explain_reads_the_workers_counts(api: Api, format_2: None) -> None:
    request = ActionRequest("refund_customer", refund(499_000)["parameters"], "mallory")
    uses = evaluate(policy(changed(CONTENT, "rules.refund_customer.tiers.1.max_amount", 500_000)), request)
    dynamo.transact(LimitsTable("LimitsTable").reserve(uses).writes)
    found = explain(api, refund(2_000))
    assert (found["decision"], found["code"]) == ("denied", "limit_exceeded")
    assert found["limits"][0]["remaining"] == 1_000
    assert "exceeds the limit of 500000 EUR-cent" in found["reason"]
    assert explain(api, refund(1_000))["decision"] == "execute"
    assert [each["used"] for each in explain(api, refund(1_000))["limits"]] == [499_000, 0]


def test_explain_reads_the_ledgers_counts(aws: Cloud, api: Api, format_2: None) -> None:
    terms = {"reference": "task_x#step_3", "source": SOURCE, "destination": DESTINATION, "amount": 90, "run": 1}
    moved = aws.invoke("LedgerTransferFunction", {"operation": "transfer", "requester": "alice"} | terms)
    assert moved["ok"] is True, moved
    found = explain(api, transfer(100))
    assert (found["decision"], found["code"]) == ("await_approval", "allowed")
    assert found["approvals"] == [{"approvals": 1, "approvers": "cfo", "eligible": 1}]
    assert "exceeds the limit of 1 request" in found["reason"]
    assert [(each["used"], each["remaining"], each["exceeded"]) for each in found["limits"]] == [
        (90, 410, False), (1, 0, True)
    ]  # fmt: skip
    assert explain(api, transfer(100), **MALLORY)["decision"] == "execute"


def test_explain_reports_that_too_few_people_are_left(aws: Cloud, api: Api, qubic: Api) -> None:
    content = changed(CONTENT, "groups.finance", ["alice", "fay"])
    enact(aws, qubic, content)
    found = explain(api, refund(20_000))
    assert (found["decision"], found["code"]) == ("denied", "too_few_approvers")
    assert found["approvals"] == [{"approvals": 2, "approvers": "finance", "eligible": 1}]
    assert explain(api, refund(20_000), **MALLORY)["decision"] == "await_approval"


def test_explain_reports_a_suspension(api: Api, qubic: Api, format_2: None) -> None:
    assert qubic("POST", "/policy/suspend", {"action": "*", "reason": "an incident"}, **OLIVIA).status == 200
    found = explain(api, refund())
    assert (found["decision"], found["code"], found["suspended"]) == ("denied", "suspended", True)
    assert "olivia suspended every action" in found["reason"]


def test_explain_judges_by_a_proposal(api: Api, qubic: Api, format_2: None) -> None:
    stricter = changed(CONTENT, "rules.refund_customer.tiers.0.max_amount", 50)
    assert propose(qubic, stricter, ["transfer_funds"]).body["version"] == 3
    found = explain(api, refund(100) | {"version": 3})
    assert (found["version"], found["status"], found["decision"]) == (3, "proposed", "await_approval")
    assert explain(api, refund(100))["decision"] == "execute"
    assert explain(api, refund(100) | {"version": 1})["code"] == "not_allowed"
    missing = refused(api, refund() | {"version": 9})
    assert (missing.status, named(missing)) == (404, {"version"})


def test_explain_reads_the_windows_of_the_version_asked_for(aws: Cloud, api: Api, qubic: Api) -> None:
    content = {"groups": {"finance": ["fay", "finn"], "cfo": ["carla"]}, "rules": {"transfer_funds": TRANSFER_RULE}}
    assert propose(qubic, content, ["monitoring", "transaction"]).status == 201
    terms = {"reference": "task_x#step_3", "source": SOURCE, "destination": DESTINATION, "amount": 90, "run": 1}
    assert aws.invoke("LedgerTransferFunction", {"operation": "transfer", "requester": "alice"} | terms)["ok"] is True
    found = explain(api, transfer(100) | {"version": 2})
    # Version 1 has no limits: the windows of version 2 start empty.
    assert [each["used"] for each in found["limits"]] == [0, 0]


@pytest.mark.parametrize("caller", [CAROL, OLIVIA])
def test_explain_is_for_another_requester_by_auditors(api: Api, format_2: None, caller: dict[str, Any]) -> None:
    found = explain(api, refund() | {"requester": " dora ", "agent": "crm-agent"}, **caller)
    assert (found["requester"], found["agent"]) == ("dora", "crm-agent")


@pytest.mark.parametrize("caller", [ALICE, BOB, AGENT])
@pytest.mark.parametrize("other", [{"requester": "dora"}, {"agent": "another-agent"}])
def test_explain_for_another_is_forbidden_to_others(api: Api, caller: dict[str, Any], other: dict[str, Any]) -> None:
    assert refused(api, transfer() | other, **caller).status == 403


def test_explain_takes_the_callers_own_name(api: Api) -> None:
    assert explain(api, transfer() | {"requester": "alice"})["requester"] == "alice"
    assert explain(api, transfer() | {"requester": "alice"}, **AGENT)["agent"] == "crm-agent"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"action": "a b"}, "action"),
        ({"action": None}, "action"),
        ({"parameters": []}, "parameters"),
        ({"parameters": {"wallet_address": SOURCE}}, "parameters.to_address"),
        ({"parameters": transfer(0)["parameters"]}, "parameters.amount"),
        ({"requester": "\u2800"}, "requester"),
        ({"version": 0}, "version"),
        ({"version": "2"}, "version"),
        ({"days": 2}, "days"),
    ],
)
def test_explain_returns_422_with_the_field(api: Api, changes: dict[str, Any], field: str) -> None:
    answer = refused(api, transfer() | changes, **OLIVIA)
    assert (answer.status, named(answer)) == (422, {field})


def test_explain_and_actions_name_no_handler(api: Api, format_2: None) -> None:
    for caller in (ALICE, BOB, CAROL, OLIVIA, AGENT):
        shown = json.dumps([explain(api, refund(), **caller), api("GET", "/actions", **caller).body])
        assert "qaes-action" not in shown and "handler" not in shown


def actions(api: Api, **caller: Any) -> dict[str, dict[str, Any]]:
    return {each["action"]: each for each in api("GET", "/actions", **caller).body["actions"]}


def test_actions_of_format_1_are_the_built_in_ones(api: Api) -> None:
    found = actions(api)
    assert set(found) == set(FORMAT_1)
    assert found["monitoring"]["task_type"] == "monitor_wallet"
    assert {name: each["may_request"] for name, each in found.items()} == dict.fromkeys(FORMAT_1, True)
    assert found["transfer_funds"]["tiers"][0]["approvals"] == 1
    assert found["transfer_funds"]["parameters"]["required"] == ["wallet_address", "to_address", "amount"]
    assert (found["transfer_funds"]["unit"], found["monitoring"]["unit"]) == ("QU", None)


def test_actions_of_format_2_are_as_the_caller_sees_them(aws: Cloud, api: Api, qubic: Api) -> None:
    content = changed(CONTENT, "rules.refund_customer.requesters", ["user:alice", "group:cfo", "agent:crm-agent"])
    enact(aws, qubic, content)
    may = {
        caller: actions(api, **who)["refund_customer"]["may_request"]
        for caller, who in {
            "alice": ALICE,
            "agent": AGENT,
            "another agent": ALICE | {"agent": "another"},
            "mallory": MALLORY,
            "carla": {"subject": "carla", "roles": "requester"},
        }.items()
    }
    assert may == {"alice": True, "agent": True, "another agent": False, "mallory": False, "carla": True}
    found = actions(api)["refund_customer"]
    assert (found["title"], found["recorded_only"], found["unit"]) == ("Refund a customer", True, "EUR-cent")
    assert found["parameters"] == CONTENT["actions"]["refund_customer"]["parameters"]
    assert len(found["tiers"]) == len(found["limits"]) == 2
    assert actions(api)["transfer_funds"]["may_request"] is False


def test_actions_need_the_role_of_a_requester_to_request(api: Api) -> None:
    for caller, may in ((BOB, False), (CAROL, False), (OLIVIA, True)):
        assert {each["may_request"] for each in actions(api, **caller).values()} == {may}
    assert actions(api, **BOB)["monitoring"]["reason"] == "this needs the role requester"


def test_actions_name_their_suspensions(api: Api, qubic: Api) -> None:
    assert api("GET", "/actions").body["suspended"] == []
    qubic("POST", "/policy/suspend", {"action": "transfer_funds", "reason": "so"}, **OLIVIA)
    assert api("GET", "/actions").body["suspended"] == ["transfer_funds"]
