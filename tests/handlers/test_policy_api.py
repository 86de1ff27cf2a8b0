"""The policy's routes, each called as API Gateway calls the function."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from local.openapi_examples import EXAMPLES
from qaes.domain.policy import DEFAULT_RULES, policy_of
from qaes.domain.qubic.identity import encode_identity
from tests.support.api import ALICE, BOB, CAROL, OLIVIA, Answer, Api, named, set_environment
from tests.support.cloud import Cloud, cloud

OSCAR = {"subject": "oscar", "roles": "operator"}
DEMO_USER = {"subject": "demo_user", "roles": "requester approver auditor operator", "auth_mode": "stub"}
MANY_ADDRESSES = [f"0x{number:040x}" for number in range(5000, 5100)]
RULE: dict[str, Any] = {"allowed": True, "requires_approval": True, "risk_level": "high"}
NO_LIMITS = {"approvals": 1, "expires_after": None, "max_amount": None, "daily_limit": None, "allowed_addresses": None}
ADDRESS = "0xfedcba0987654321"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("QubicApiFunction", monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    return Api(aws, "QubicApiFunction")


def ask(api: Api, method: str, path: str, query: dict[str, str], **caller: Any) -> Answer:
    event = api.event(method, path, **caller)
    event["queryStringParameters"] = query
    event["multiValueQueryStringParameters"] = {name: [value] for name, value in query.items()}
    return api.checked(api.aws.invoke(api.function, event))


def in_force(api: Api) -> str:
    return str(api("GET", "/policy").body["policy_id"])


DROPPED = ["monitoring", "transaction"]


def propose(api: Api, caller: dict[str, Any] = OLIVIA, **rule: Any) -> Answer:
    body = {"based_on": in_force(api), "rules": {"transfer_funds": RULE | rule}, "remove": DROPPED}
    return api("POST", "/policy", body, **caller)


def test_rule_of_an_action_type(api: Api) -> None:
    answer = ask(api, "GET", "/policy", {"action_type": "transfer_funds"})
    assert answer.status == 200
    assert answer.body.pop("policy_id").startswith("policy-v1-")
    assert answer.body == {
        "network": "mock",
        "action_type": "transfer_funds",
        "allowed": True,
        "requires_approval": True,
        "rules": RULE | NO_LIMITS,
        "effect": "performed",
        "suspended": [],
    }
    denied = ask(api, "GET", "/policy", {"action_type": "burn"}).body
    assert (denied["allowed"], denied["rules"]["allowed"]) == (False, False)
    assert ask(api, "GET", "/policy", {"action_type": ""}).status == 422


def test_every_rule(api: Api) -> None:
    body = api("GET", "/policy").body
    assert (body["version"], set(body["rules"])) == (1, set(DEFAULT_RULES))


def test_before_the_first_version_is_on_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment("QubicApiFunction", monkeypatch)
    with cloud(state_machine=False, policy=False) as aws:
        answer = Api(aws, "QubicApiFunction")("GET", "/policy")
    assert answer.status == 503
    assert "not confirmed on the ledger yet" in answer.body["detail"]
    assert answer.headers["retry-after"]


def test_from_a_proposal_to_the_policy_in_force(aws: Cloud, api: Api) -> None:
    first = in_force(api)
    proposed = propose(api, approvals=2, max_amount=500, daily_limit=2000, allowed_addresses=[ADDRESS])
    assert proposed.status == 201
    assert (proposed.body["version"], proposed.body["status"]) == (2, "proposed")
    assert (proposed.body["proposed_by"], proposed.body["based_on"]) == ("olivia", first)
    approved = api("POST", "/policy/versions/2/approve", **OSCAR)
    assert (approved.status, approved.body["status"], approved.body["approved_by"]) == (200, "anchoring", "oscar")
    assert in_force(api) == first
    aws.settle()
    assert in_force(api) == proposed.body["policy_id"]
    rules = ask(api, "GET", "/policy", {"action_type": "transfer_funds"}).body["rules"]
    assert rules == RULE | NO_LIMITS | {
        "approvals": 2, "max_amount": 500, "daily_limit": 2000, "allowed_addresses": [ADDRESS]
    }  # fmt: skip
    # An action outside the new version is denied.
    assert ask(api, "GET", "/policy", {"action_type": "monitoring"}).body["allowed"] is False

    found = api("GET", "/policy/versions/2", **CAROL).body
    assert hashlib.sha256(found["text"].encode()).hexdigest() == found["hash"] == proposed.body["hash"]
    assert (found["status"], found["txid"], found["tick"]) == (
        "in_force", approved.body["txid"], approved.body["tick"]
    )  # fmt: skip
    versions = api("GET", "/policy/versions", **ALICE).body
    assert [(each["version"], each["status"]) for each in versions["versions"]] == [(2, "in_force"), (1, "superseded")]
    assert versions["next_before"] is None
    transaction = api("GET", f"/tx/{found['txid']}", **CAROL)
    assert transaction.status == 200


def test_only_operators_change_the_policy(api: Api) -> None:
    propose(api)
    for caller in (ALICE, BOB, CAROL):
        assert propose(api, caller).status == 403
        assert api("POST", "/policy/versions/2/approve", **caller).status == 403
        assert api("POST", "/policy/versions/2/reject", **caller).status == 403
    assert api("GET", "/policy/versions/2").body["status"] == "proposed"
    assert len(api("GET", "/policy/versions").body["versions"]) == 2


def test_four_eyes_but_for_the_stub_mode(api: Api) -> None:
    propose(api)
    assert api("POST", "/policy/versions/2/approve", **OLIVIA).status == 403
    api("POST", "/policy/versions/2/reject", **OLIVIA)
    assert propose(api, DEMO_USER).status == 201
    assert api("POST", "/policy/versions/3/approve", **DEMO_USER).body["status"] == "anchoring"


def test_stale_proposal(aws: Cloud, api: Api) -> None:
    first = in_force(api)
    propose(api)
    propose(api, OSCAR, max_amount=5)
    api("POST", "/policy/versions/2/approve", **OSCAR)
    body = {"based_on": first, "rules": {}}
    assert api("POST", "/policy", body, **OLIVIA).status == 409
    aws.settle()
    for answer in (api("POST", "/policy", body, **OLIVIA), api("POST", "/policy/versions/3/approve", **OLIVIA)):
        assert (answer.status, named(answer)) == (409, {"based_on"})
        assert answer.body["policy_id"] == in_force(api)


def test_rejected_with_a_reason_or_without(api: Api) -> None:
    propose(api)
    answer = api("POST", "/policy/versions/2/reject", {"reason": " too high "}, **OSCAR)
    assert (answer.status, answer.body["status"], answer.body["reason"]) == (200, "rejected", "too high")
    conflict = api("POST", "/policy/versions/2/approve", **OSCAR)
    assert (conflict.status, conflict.body["policy_status"]) == (409, "rejected")
    propose(api)
    assert api("POST", "/policy/versions/3/reject", **OSCAR).body["reason"] == ""
    assert api("POST", "/policy/versions/3/reject", {"reason": 5}, **OSCAR).status == 422


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ({"max_amount": 0}, "rules.transfer_funds.max_amount"),
        ({"max_amount": 6, "daily_limit": 5}, "rules.transfer_funds.daily_limit"),
        ({"allowed_addresses": []}, "rules.transfer_funds.allowed_addresses"),
        ({"allowed_addresses": [ADDRESS, "0x1"]}, "rules.transfer_funds.allowed_addresses.1"),
        ({"allowed_addresses": [ADDRESS, encode_identity(bytes(32))]}, "rules.transfer_funds.allowed_addresses.1"),
        (
            {"allowed_addresses": [encode_identity(b"\1" + bytes(31)), ADDRESS]},
            "rules.transfer_funds.allowed_addresses.0",
        ),
        ({"allowed_addresses": ["0x" + "0" * 16]}, "rules.transfer_funds.allowed_addresses.0"),
        ({"approvals": 0}, "rules.transfer_funds.approvals"),
        ({"risk_level": "none"}, "rules.transfer_funds.risk_level"),
        ({"surprise": 1}, "rules.transfer_funds.surprise"),
    ],
)
def test_invalid_rule_is_refused(api: Api, rule: dict[str, Any], field: str) -> None:
    answer = propose(api, **rule)
    assert answer.status == 422
    assert field in named(answer)
    assert len(api("GET", "/policy/versions").body["versions"]) == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"based_on": None}, "based_on"),
        ({"based_on": "latest"}, "based_on"),
        ({"rules": None}, "rules"),
        ({"rules": {f"action_{n}": RULE for n in range(201)}}, "rules"),
        ({"rules": {f"a{n}": RULE | {"allowed_addresses": MANY_ADDRESSES} for n in range(16)}}, "rules"),
        ({"more": 1}, "more"),
        ({"remove": None}, "remove"),
        ({"remove": "monitoring"}, "remove"),
    ],
    ids=["null", "no id", "no rules", "too many", "too large", "more", "no removals", "no list"],
)  # fmt: skip
def test_invalid_proposal_is_refused(api: Api, changes: dict[str, Any], field: str) -> None:
    body = {"based_on": in_force(api), "rules": {"transfer_funds": RULE}, "remove": DROPPED} | changes
    answer = api("POST", "/policy", body, **OLIVIA)
    assert (answer.status, named(answer)) == (422, {field})


# Dropped items of a proposal

NOTHING_OF_FORMAT_2: dict[str, Any] = {
    "groups": {"added": {}, "removed": {}, "changed": {}},
    "actions": {"added": {}, "removed": {}, "changed": {}},
    "new_limits": [],
}


@pytest.mark.parametrize(
    ("rules", "remove", "message"),
    [
        (["transfer_funds"], [], "monitoring, transaction"),
        (["transfer_funds"], ["monitoring"], "drops: transaction"),
        ([], ["monitoring", "transaction"], "drops: transfer_funds"),
        (["transfer_funds"], [*DROPPED, "pay_invoice"], "does not have: pay_invoice"),
        (["transfer_funds"], [*DROPPED, "monitoring"], "twice: monitoring"),
        (["transfer_funds", "monitoring"], DROPPED, "still contains: monitoring"),
        (["transfer_funds", "pay_invoice"], [*DROPPED, "pay_invoice"], "does not have: pay_invoice"),
    ],
    ids=["silent", "one missing", "all gone", "unknown", "duplicate", "kept and removed", "new and removed"],
)
def test_proposal_names_each_rule_that_it_drops(api: Api, rules: list[str], remove: list[str], message: str) -> None:
    plain = {"allowed": True, "requires_approval": False, "risk_level": "low"}
    body = {"based_on": in_force(api), "rules": dict.fromkeys(rules, plain), "remove": remove}
    answer = api("POST", "/policy", body, **OLIVIA)
    assert (answer.status, named(answer)) == (422, {"remove"})
    assert message in json.dumps(answer.body)
    assert len(api("GET", "/policy/versions").body["versions"]) == 1


def test_proposal_returns_its_changes(api: Api) -> None:
    rules = api("GET", "/policy").body["rules"]
    changed = rules["transfer_funds"] | {"max_amount": 5}
    added = rules["monitoring"] | {"risk_level": "high"}
    body = {
        "based_on": in_force(api),
        "rules": {"transfer_funds": changed, "transaction": rules["transaction"], "pay_invoice": added},
        "remove": ["monitoring"],
    }
    expected = {
        "added": {"pay_invoice": added},
        "removed": {"monitoring": rules["monitoring"]},
        "changed": {"transfer_funds": {"before": rules["transfer_funds"], "after": changed}},
        **NOTHING_OF_FORMAT_2,
    }
    for _ in range(2):  # sent again it is the same proposal, with the same answer
        answer = api("POST", "/policy", body, **OLIVIA)
        assert (answer.status, answer.body["version"], answer.body["difference"]) == (201, 2, expected)
    # The operator who decides on it sees the same.
    assert api("GET", "/policy/versions/2", **OSCAR).body["difference"] == expected
    first = api("GET", "/policy/versions/1", **OSCAR).body["difference"]
    assert first == {"added": rules, "removed": {}, "changed": {}, **NOTHING_OF_FORMAT_2}


def test_difference_is_null_when_text_is_unreadable(api: Api) -> None:
    propose(api)
    boto3.client("dynamodb").update_item(
        TableName="LedgerTable",
        Key={"pk": {"S": "POLICY#mock"}, "sk": {"S": "VERSION#000000002"}},
        UpdateExpression="SET #text = :text",
        ExpressionAttributeNames={"#text": "text"},
        ExpressionAttributeValues={":text": {"S": "{"}},
    )
    found = api("GET", "/policy/versions/2", **OSCAR)
    assert (found.status, found.body["difference"]) == (200, None)


# A limit that nothing would enforce


@pytest.mark.parametrize(("limit", "value"), [("max_amount", 5), ("daily_limit", 5), ("allowed_addresses", [ADDRESS])])
@pytest.mark.parametrize("action_type", ["monitoring", "transaction", "pay_invoice"])
def test_rule_has_no_limit_that_nothing_enforces(api: Api, action_type: str, limit: str, value: Any) -> None:
    rules = api("GET", "/policy").body["rules"]
    rules[action_type] = {"allowed": True, "requires_approval": False, "risk_level": "low", limit: value}
    answer = api("POST", "/policy", {"based_on": in_force(api), "rules": rules}, **OLIVIA)
    assert (answer.status, named(answer)) == (422, {f"rules.{action_type}.{limit}"})
    assert len(api("GET", "/policy/versions").body["versions"]) == 1


def test_older_document_with_idle_limit_still_loads() -> None:
    rule = {"allowed": True, "requires_approval": False, "risk_level": "low", "max_amount": 5}
    text = json.dumps({"format": 1, "version": 7, "rules": {"monitoring": rule}})
    assert policy_of(text).decide("monitoring").max_amount == 5


def test_invalid_action_type_is_refused(api: Api) -> None:
    answer = api("POST", "/policy", {"based_on": in_force(api), "rules": {"a b": RULE}}, **OLIVIA)
    assert answer.status == 422
    assert all(field.startswith("rules.") for field in named(answer))


@pytest.mark.parametrize("version", ["0", "-1", "x", "1.5", "1000000000"])
def test_malformed_version_is_refused(api: Api, version: str) -> None:
    assert api("GET", f"/policy/versions/{version}").status == 422
    assert api("POST", f"/policy/versions/{version}/approve", **OLIVIA).status == 422


def test_unknown_version_returns_404(api: Api) -> None:
    assert api("GET", "/policy/versions/9").status == 404
    assert api("POST", "/policy/versions/9/approve", **OLIVIA).status == 404
    assert api("POST", "/policy/versions/9/reject", **OLIVIA).status == 404


def test_pages_of_versions(api: Api) -> None:
    for number in range(1, 4):
        propose(api, max_amount=number)
    first = ask(api, "GET", "/policy/versions", {"limit": "2"}).body
    assert ([each["version"] for each in first["versions"]], first["next_before"]) == ([4, 3], 3)
    rest = ask(api, "GET", "/policy/versions", {"limit": "2", "before": "3"}).body
    assert ([each["version"] for each in rest["versions"]], rest["next_before"]) == ([2, 1], None)


def test_examples_of_the_document(api: Api) -> None:
    body = EXAMPLES["propose_policy"]["body"] | {"based_on": in_force(api)}
    answers = {
        "propose_policy": api("POST", "/policy", body, **OLIVIA),
        "get_policy_version": api("GET", "/policy/versions/2"),
        "get_policy_versions": api("GET", "/policy/versions"),
        "reject_policy": api("POST", "/policy/versions/2/reject", EXAMPLES["reject_policy"]["body"], **OSCAR),
        "get_policy": ask(api, "GET", "/policy", EXAMPLES["get_policy"]["parameters"]),
    }
    api("POST", "/policy", body, **OLIVIA)
    answers["approve_policy"] = api("POST", "/policy/versions/3/approve", **OSCAR)
    for name, answer in answers.items():
        assert answer.status < 300, name
        assert set(answer.body) == set(EXAMPLES[name]["answer"]), name


def test_policy_lists_recorded_only_actions(api: Api) -> None:
    assert ask(api, "GET", "/policy", {"action_type": "transaction"}).body["effect"] == "recorded only"
    for action_type in ("transfer_funds", "monitoring"):
        assert ask(api, "GET", "/policy", {"action_type": action_type}).body["effect"] == "performed"
    assert api("GET", "/policy").body["recorded_only"] == ["transaction"]
