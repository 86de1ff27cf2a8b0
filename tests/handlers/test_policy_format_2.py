"""Proposals of format 2 over HTTP: from the body to the policy in force, and rejections on the way."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from qaes.domain.policy import policy_of
from qaes.domain.policy.document import MAX_DOCUMENT_V2_BYTES
from qubic import wiring
from qubic.policy import trust
from tests.support.api import ALICE, BOB, CAROL, OLIVIA, Answer, Api, items, named, set_environment
from tests.support.cloud import Cloud, cloud
from tests.support.policies import CONTENT, changed

OSCAR = {"subject": "oscar", "roles": "operator"}
FORMAT_1 = ["monitoring", "transaction", "transfer_funds"]
REFUND = "refund_customer"
NAMES = ["refund_customer", "finance", "cfo"]
TRANSFER: dict[str, Any] = {
    "allowed": True,
    "risk_level": "high",
    "tiers": [{"max_amount": 100, "approvals": 0}, {"max_amount": None, "approvals": 1, "approvers": "finance"}],
    "limits": [{"window_seconds": 3600, "max_amount": 500, "per": "requester", "over": "deny"}],
}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("QubicApiFunction", monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    return Api(aws, "QubicApiFunction")


def in_force(api: Api) -> str:
    return str(api("GET", "/policy").body["policy_id"])


def propose(api: Api, content: dict[str, Any] = CONTENT, remove: list[str] | None = None) -> Answer:
    body = {"based_on": in_force(api), "remove": FORMAT_1 if remove is None else remove} | content
    return api("POST", "/policy", body, **OLIVIA)


def enact(aws: Cloud, api: Api, content: dict[str, Any] = CONTENT, remove: list[str] | None = None) -> dict[str, Any]:
    proposed = propose(api, content, remove)
    assert proposed.status == 201, proposed
    assert api("POST", f"/policy/versions/{proposed.body['version']}/approve", **OSCAR).status == 200
    aws.settle()
    assert in_force(api) == proposed.body["policy_id"]
    return dict(proposed.body)


def test_format_2_goes_from_the_proposal_into_force(aws: Cloud, api: Api) -> None:
    proposed = enact(aws, api)
    assert set(proposed["difference"]["added"]) == {REFUND}
    assert set(proposed["difference"]["removed"]) == set(FORMAT_1)
    assert set(proposed["difference"]["actions"]["added"]) == {REFUND}
    assert set(proposed["difference"]["groups"]["added"]) == {"finance", "cfo"}
    assert len(proposed["difference"]["new_limits"]) == 2
    shown = api("GET", "/policy/versions/2", **CAROL).body
    assert hashlib.sha256(shown["text"].encode()).hexdigest() == shown["hash"]
    assert policy_of(shown["text"]).format == 2
    policy = api("GET", "/policy").body
    assert (policy["version"], policy["format"], set(policy["rules"])) == (2, 2, {REFUND})
    kinds = [item["kind"]["S"] for item in items("PolicyTable") if item["pk"]["S"] == "EVENTS#policy"]
    assert kinds == ["policy_in_force", "policy_proposed", "policy_approved", "policy_in_force"]


def test_rule_of_format_2_is_shown_by_its_action(aws: Cloud, api: Api) -> None:
    enact(aws, api)
    shown = {}
    for action in (REFUND, "transfer_funds"):
        event = api.event("GET", "/policy")
        event["queryStringParameters"] = {"action_type": action}
        event["multiValueQueryStringParameters"] = {"action_type": [action]}
        shown[action] = api.checked(aws.invoke(api.function, event)).body
    assert (shown[REFUND]["allowed"], shown[REFUND]["requires_approval"]) == (True, True)
    assert len(shown[REFUND]["rules"]["tiers"]) == 2
    assert (shown["transfer_funds"]["allowed"], shown["transfer_funds"]["rules"]["allowed"]) == (False, False)


def test_same_proposal_again_is_the_same_version(api: Api) -> None:
    first = propose(api)
    assert propose(api).body == first.body
    assert propose(api, changed(CONTENT, "groups.cfo", ["chris"])).body["version"] == first.body["version"] + 1


def test_versions_change_format_in_both_directions(aws: Cloud, api: Api) -> None:
    content = copy.deepcopy(CONTENT)
    content["rules"]["transfer_funds"] = TRANSFER
    enact(aws, api, content, ["monitoring", "transaction"])
    rule = {"allowed": True, "requires_approval": True, "risk_level": "high"}
    back = {"rules": {"transfer_funds": rule}}
    missing = propose(api, back, [])
    assert (missing.status, named(missing)) == (422, {"remove"})
    assert named(propose(api, back, [REFUND])) == {"remove"}
    proposed = enact(aws, api, back, NAMES)
    assert set(proposed["difference"]["actions"]["removed"]) == {REFUND}
    assert set(proposed["difference"]["changed"]) == {"transfer_funds"}
    assert api("GET", "/policy").body["format"] == 1


def test_format_2_may_have_no_custom_action(aws: Cloud, api: Api) -> None:
    content = {"groups": {"finance": ["fay"]}, "rules": {"transfer_funds": TRANSFER}}
    enact(aws, api, content, ["monitoring", "transaction"])
    assert api("GET", "/policy").body["format"] == 2


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("rules.refund_customer.tiers.0.max_amount", 0, "rules.refund_customer.tiers.0.max_amount"),
        ("rules.refund_customer.tiers.0.max_amount", 100.0, "rules.refund_customer.tiers.0.max_amount"),
        ("rules.refund_customer.tiers.1.approvers", "nobody", "rules.refund_customer.tiers.1.approvers"),
        ("rules.refund_customer.limits.0.per", "moon", "rules.refund_customer.limits.0.per"),
        ("rules.refund_customer.requires_approval", True, "rules.refund_customer.requires_approval"),
        ("groups.finance", [], "groups.finance"),
        ("groups.finance.0", "fay\u202e", "groups.finance.0"),
        ("groups", [], "groups"),
        ("actions.refund_customer.handler.function_name", "other", "actions.refund_customer.handler.function_name"),
        ("actions.refund_customer.amount", "/nothing", "actions.refund_customer.amount"),
        ("actions.refund_customer.title", " \u0301", "actions.refund_customer.title"),
        ("actions.transfer_funds", CONTENT["actions"][REFUND], "actions.transfer_funds"),
        ("roots", [], "roots"),
    ],
)
def test_proposal_returns_422_with_the_field(api: Api, path: str, value: Any, field: str) -> None:
    before = items("LedgerTable", "PolicyTable")
    answer = propose(api, changed(CONTENT, path, value))
    assert (answer.status, named(answer)) == (422, {field}), answer
    assert items("LedgerTable", "PolicyTable") == before


@pytest.mark.parametrize(
    ("raw", "replaced", "field"),
    [
        ('"max_amount": 10000,', '"max_amount": 10000.0,', "rules.refund_customer.tiers.0.max_amount"),
        ('"max_amount": 10000,', '"max_amount": 1e4,', "rules.refund_customer.tiers.0.max_amount"),
        ('"minimum": 1,', '"minimum": 1.0,', "actions.refund_customer.parameters.properties.amount.minimum"),
        ('"cfo": ["carla"]', '"cfo": ["carla"], "cfo": ["carla"]', "groups.cfo"),
        (
            '"max_amount": 10000,',
            '"max_amount": 10000, "max_amount": 10001,',
            "rules.refund_customer.tiers.0.max_amount",
        ),
    ],
)
def test_proposal_reads_the_raw_body(api: Api, raw: str, replaced: str, field: str) -> None:
    """JSON that is the same value to some readers, and another to others, is refused where it stands."""
    text = json.dumps({"based_on": in_force(api), "remove": FORMAT_1} | CONTENT)
    assert text.count(raw) == 1
    answer = api("POST", "/policy", text.replace(raw, replaced), **OLIVIA)
    assert (answer.status, named(answer)) == (422, {field})
    assert api("POST", "/policy", text, **OLIVIA).status == 201


@pytest.mark.parametrize(("prefix", "status"), [("qaes-action-", 201), ("acme-", 422), ("qaes-action-refund-", 422)])
def test_proposal_names_functions_of_the_stacks_prefix(aws: Cloud, api: Api, prefix: str, status: int) -> None:
    aws.parameters["ActionFunctionPrefix"] = prefix
    answer = propose(api)
    assert answer.status == status
    if status == 422:
        assert named(answer) == {f"actions.{REFUND}.handler.function_name"}
        assert f"`{prefix}`" in answer.body["detail"]


def large(bytes_: int) -> dict[str, Any]:
    """Make a content whose document has about so many bytes."""
    content = copy.deepcopy(CONTENT)
    members = [f"subject-{number:05d}-{'x' * 230}" for number in range(200)]
    for number in range(5):
        content["groups"][f"group_{number}"] = members
    left = bytes_ - len(json.dumps(content, separators=(",", ":")))
    for number in range(left // 2100):
        content["actions"][f"action_{number}"] = content["actions"][REFUND] | {"description": "d" * 1500}
        content["rules"][f"action_{number}"] = content["rules"][REFUND]
    return content


def test_largest_document_comes_into_force(aws: Cloud, api: Api) -> None:
    content = large(MAX_DOCUMENT_V2_BYTES - 12_000)
    enact(aws, api, content)
    found = api("GET", "/policy/versions/2", **CAROL).body
    size = len(found["text"].encode())
    assert MAX_DOCUMENT_V2_BYTES * 0.8 < size <= MAX_DOCUMENT_V2_BYTES
    reduced = aws.invoke("LedgerFunction", {"operation": "policy", "action": REFUND})["result"]
    assert len(json.dumps(reduced)) < 4000


def test_too_large_document_is_refused(api: Api) -> None:
    before = items("LedgerTable")
    answer = propose(api, large(MAX_DOCUMENT_V2_BYTES + 40_000))
    assert (answer.status, named(answer)) == (422, {"rules"})
    assert "262144 bytes" in answer.body["detail"]
    assert items("LedgerTable") == before
    assert propose(api, {"groups": {}, "rules": {}, "x": "y" * 600_000}).status == 413
    assert api("POST", "/policy/suspend", {"action": "*", "reason": "x" * 300_000}, **OLIVIA).status == 413


def test_requester_does_not_see_the_handlers(api: Api) -> None:
    propose(api)
    hidden = api("GET", "/policy/versions/2", **ALICE)
    assert (hidden.status, hidden.body["text"], hidden.body["difference"]) == (200, None, None)
    assert "qaes-action" not in json.dumps(hidden.body)
    for caller in (BOB, CAROL, OLIVIA):
        assert "qaes-action-refund" in api("GET", "/policy/versions/2", **caller).body["text"]
    assert api("GET", "/policy/versions/1", **ALICE).body["text"].startswith('{"based_on":null,"format":1')


def test_requester_does_not_see_dropped_handlers(aws: Cloud, api: Api) -> None:
    enact(aws, api)
    assert propose(api, {"groups": {}, "rules": {}}, NAMES).status == 201
    hidden = api("GET", "/policy/versions/3", **ALICE)
    assert (hidden.status, hidden.body["difference"]) == (200, None)
    assert "qaes-action" not in json.dumps(hidden.body)
    assert "qaes-action-refund" in json.dumps(api("GET", "/policy/versions/3", **BOB).body["difference"])


def test_altered_format_2_keeps_previous_version_in_force(aws: Cloud, api: Api) -> None:
    enact(aws, api)
    store = wiring.policies()
    text = store.read(2)[1].replace('"max_amount":10000,', '"max_amount":99999,')
    store._items.update(
        Key=store._key("VERSION#000000002"),
        UpdateExpression="SET #text = :text",
        ExpressionAttributeNames={"#text": "text"},
        ExpressionAttributeValues={":text": {"S": text}},
    )
    trust._verified.clear()
    trust._seen.clear()
    assert api("GET", "/policy").body["version"] == 1
