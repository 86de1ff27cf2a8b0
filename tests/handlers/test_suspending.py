"""Suspend and resume over HTTP: one operator stops an action, two let it go on, and each change is an event."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import boto3
import pytest

from qaes.adapters import dynamo, suspensions
from qaes.adapters.policy_events import events_after
from qaes.domain.errors import ConflictError
from qaes.domain.ids import now
from qaes.domain.policy_events import EVERY_ACTION
from qaes.domain.suspensions import RESUME_REQUEST_LASTS
from qubic import wiring
from qubic.policy import trust
from qubic.policy.suspending import MAX_SUSPENDED, Suspending
from tests.support.api import ALICE, BOB, CAROL, OLIVIA, Answer, Api, items, named, set_environment
from tests.support.cloud import Cloud, cloud

OSCAR = {"subject": "oscar", "roles": "operator"}
DEMO_USER = {"subject": "demo_user", "roles": "requester approver auditor operator", "auth_mode": "stub"}
REASON = "the supplier's address changed"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("QubicApiFunction", monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    return Api(aws, "QubicApiFunction")


def suspend(api: Api, action: str = "transfer_funds", caller: dict[str, Any] = OLIVIA, reason: str = REASON) -> Answer:
    return api("POST", "/policy/suspend", {"action": action, "reason": reason}, **caller)


def resume(api: Api, action: str = "transfer_funds", caller: dict[str, Any] = OLIVIA) -> Answer:
    return api("POST", "/policy/resume", {"action": action}, **caller)


def happened() -> list[tuple[str, str, dict[str, Any]]]:
    """Kind, actor and input of each event since the first version came into force."""
    _, *events = events_after("PolicyTable")
    return [(event.kind, event.actor, json.loads(event.input)) for event in events]


def stopped(action: str = "transfer_funds") -> bool:
    """Whether an intent's transaction fails: the same for each copy."""
    refused = set()
    for number in range(64):
        try:
            dynamo.transact([suspensions.check(action, f"task_{number}")])
        except dynamo.ConditionFailedError:
            refused.add(True)
        else:
            refused.add(False)
    [found] = refused
    return found


def test_suspend_stops_the_action_at_once_by_one_operator(api: Api) -> None:
    answer = suspend(api)
    assert answer.status == 200
    at = answer.body.pop("suspended_at")
    assert answer.body == {
        "network": "mock",
        "action": "transfer_funds",
        "status": "suspended",
        "suspended_by": "olivia",
        "reason": REASON,
        "resume_requested_by": None,
        "resume_requested_at": None,
    }
    assert (stopped(), stopped("transaction")) == (True, False)
    assert happened() == [("action_suspended", "olivia", {"name": "transfer_funds", "reason": REASON})]
    *_, event = events_after("PolicyTable")
    assert event.timestamp == at
    assert json.loads(event.output)["suspended"] == {"transfer_funds": {"event": 2, "resume_requested_by": None}}


def test_suspend_stops_every_action_by_the_star(api: Api) -> None:
    assert suspend(api, "*").status == 200
    assert stopped() and stopped("transaction") and stopped("refund_customer")


def test_suspend_changes_nothing_when_called_twice(api: Api) -> None:
    first = suspend(api)
    before = items("PolicyTable")
    assert suspend(api, caller=OSCAR, reason="another").body == first.body
    assert items("PolicyTable") == before


def test_suspend_is_written_once_when_called_at_once(api: Api) -> None:
    request = {"method": "POST", "path": "/policy/suspend", "body": {"action": "*", "reason": REASON}}
    answers = api.at_once([request | OLIVIA, request | OSCAR] * 3)
    assert {answer.status for answer in answers} == {200}
    [suspended_by] = {answer.body["suspended_by"] for answer in answers}
    assert [kind for kind, *_ in happened()] == ["action_suspended"]
    assert happened()[0][1] == suspended_by


def test_suspend_keeps_both_names_when_called_at_once(api: Api) -> None:
    actions = ["transfer_funds", "transaction", "monitoring", "*"]
    requests = [
        {"method": "POST", "path": "/policy/suspend", "body": {"action": each, "reason": REASON}} | OLIVIA
        for each in actions
    ]
    assert {answer.status for answer in api.at_once(requests)} == {200}
    assert sorted(suspensions.suspended()) == sorted(actions)
    assert [event.number for event in events_after("PolicyTable")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("suspender", [OLIVIA, OSCAR])
def test_resume_needs_two_operators(api: Api, suspender: dict[str, Any]) -> None:
    suspend(api, caller=suspender)
    requested = resume(api)
    assert (requested.status, requested.body["status"]) == (200, "resume_requested")
    assert requested.body["resume_requested_by"] == "olivia"
    assert stopped()
    before = items("PolicyTable")
    assert resume(api).body == requested.body  # again by the same operator
    assert resume(api, caller=OLIVIA | {"subject": " olivia "}).body == requested.body
    assert items("PolicyTable") == before
    done = resume(api, caller=OSCAR)
    assert (done.status, done.body["status"], done.body["suspended_by"]) == (200, "active", None)
    assert not stopped()
    assert [(kind, actor) for kind, actor, _ in happened()[1:]] == [
        ("resume_requested", "olivia"), ("action_resumed", "oscar")
    ]  # fmt: skip


def test_resume_changes_nothing_when_the_action_is_not_suspended(api: Api) -> None:
    before = items("PolicyTable")
    for caller in (OLIVIA, OSCAR):
        answer = resume(api, caller=caller)
        assert (answer.status, answer.body["status"]) == (200, "active")
    assert items("PolicyTable") == before


def test_resume_completes_once_when_called_at_once(api: Api) -> None:
    suspend(api)
    resume(api)
    request = {"method": "POST", "path": "/policy/resume", "body": {"action": "transfer_funds"}}
    answers = api.at_once([request | OSCAR] * 4)
    assert {(answer.status, answer.body["status"]) for answer in answers} == {(200, "active")}
    assert [kind for kind, *_ in happened()] == ["action_suspended", "resume_requested", "action_resumed"]


def test_resume_request_ends_when_the_action_is_suspended_again(api: Api) -> None:
    suspend(api)
    resume(api)
    again = suspend(api, caller=OSCAR, reason="not yet")
    assert (again.body["status"], again.body["suspended_by"], again.body["reason"]) == ("suspended", "oscar", "not yet")
    assert resume(api, caller=OSCAR).body["status"] == "resume_requested"  # the first of the two again
    assert stopped()


def test_resume_request_ends_after_a_day(aws: Cloud, api: Api) -> None:
    suspend(api)
    resume(api)
    later = Suspending("mock", clock=lambda: now() + RESUME_REQUEST_LASTS)
    assert [(each.status, each.suspension and each.suspension.resume_by) for each in later.suspended()] == [
        ("suspended", None)
    ]
    assert later.resume("transfer_funds", subject="oscar", four_eyes=True).status == "resume_requested"
    just_in_time = Suspending("mock", clock=lambda: now() + 2 * RESUME_REQUEST_LASTS - timedelta(minutes=1))
    assert just_in_time.resume("transfer_funds", subject="olivia", four_eyes=True).status == "active"


def test_star_and_names_are_resumed_each_by_itself(api: Api) -> None:
    suspend(api)
    suspend(api, "*")
    resume(api, "*")
    assert resume(api, "*", OSCAR).body["status"] == "active"
    assert (stopped(), stopped("transaction")) == (True, False)


def test_stub_user_is_both_operators(api: Api) -> None:
    suspend(api, caller=DEMO_USER)
    assert resume(api, caller=DEMO_USER).body["status"] == "resume_requested"
    assert resume(api, caller=DEMO_USER).body["status"] == "active"
    assert not stopped()


@pytest.mark.parametrize("caller", [ALICE, BOB, CAROL, OLIVIA | {"agent": "crm-agent"}])
def test_suspend_and_resume_are_for_operators_alone(api: Api, caller: dict[str, Any]) -> None:
    suspend(api, "transaction")
    before = items("PolicyTable")
    assert suspend(api, caller=caller).status == 403
    assert resume(api, "transaction", caller).status == 403
    assert items("PolicyTable") == before


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"action": "transfer_fund", "reason": REASON}, "action"),
        ({"action": "**", "reason": REASON}, "action"),
        ({"action": "", "reason": REASON}, "action"),
        ({"action": "*\n", "reason": REASON}, "action"),
        ({"action": ["*"], "reason": REASON}, "action"),
        ({"reason": REASON}, "action"),
        ({"action": "*"}, "reason"),
        ({"action": "*", "reason": " "}, "reason"),
        ({"action": "*", "reason": "\u2800"}, "reason"),
        ({"action": "*", "reason": "x" * 501}, "reason"),
        ({"action": "*", "reason": "a\u202eb"}, "reason"),
        ({"action": "*", "reason": REASON, "until": 5}, "until"),
    ],
)
def test_suspend_returns_422_with_the_field_and_writes_nothing(api: Api, body: Any, field: str) -> None:
    before = items("PolicyTable")
    answer = api("POST", "/policy/suspend", body, **OLIVIA)
    assert (answer.status, named(answer)) == (422, {field})
    assert items("PolicyTable") == before


def test_resume_returns_422_for_an_unknown_action(api: Api) -> None:
    refused = resume(api, "transfer_fund")
    assert named(refused) == {"action"}
    assert "`GET /policy` has the names" in refused.body["detail"]


def test_suspend_waits_for_no_ledger(aws: Cloud, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    # No process has checked the policy yet, and its anchor cannot be read: nothing else is allowed then.
    trust._verified.clear()
    submission = {"pk": {"S": "SUBMISSION#mock#policy:1"}, "sk": {"S": "SUBMISSION"}}
    boto3.client("dynamodb").delete_item(TableName="LedgerTable", Key=submission)
    assert api("GET", "/policy").status == 503
    for action in ("transfer_funds", "an_operators_action", "*"):
        assert suspend(api, action).status == 200
    assert stopped("an_operators_action")
    refused = suspend(api, "monitor_wallet")
    assert (refused.status, refused.body["detail"]) == (422, "is a type of task, whose action is `monitoring`")


def test_removed_action_can_still_be_resumed(aws: Cloud, api: Api) -> None:
    store = wiring.suspending()
    store.suspend("refund_customer", subject="olivia", reason=REASON)
    assert resume(api, "refund_customer").body["status"] == "resume_requested"
    assert resume(api, "refund_customer", OSCAR).body["status"] == "active"
    assert named(resume(api, "refund_customer")) == {"action"}


def test_suspend_refuses_more_names_than_a_copy_holds(aws: Cloud) -> None:
    store = wiring.suspending()
    one = store.suspend("action_0", subject="olivia", reason=REASON).suspension
    assert one is not None
    dynamo.transact(suspensions.puts({f"action_{number}": one for number in range(MAX_SUSPENDED)}))
    with pytest.raises(ConflictError, match=r"suspend `\*` instead"):
        store.suspend("one_more", subject="olivia", reason=REASON)
    dynamo.transact(suspensions.puts({f"action_{number}": one for number in range(1, MAX_SUSPENDED)}))
    store.suspend(EVERY_ACTION, subject="olivia", reason=REASON)


def test_largest_suspensions_are_written(aws: Cloud) -> None:
    """As many names as possible, each with the longest text of four bytes a letter."""
    store = wiring.suspending()
    one = store.suspend("action_0", subject="\U0001f600" * 256, reason="\U0001f600" * 500).suspension
    assert one is not None
    whole = {f"{number:064d}": one for number in range(MAX_SUSPENDED - 1)} | {"action_0": one}
    dynamo.transact(suspensions.puts(whole))
    assert store.resume("action_0", subject="\U0001f601" * 256, four_eyes=True).status == "resume_requested"
    assert len(suspensions.suspended()) == MAX_SUSPENDED


def test_policy_shows_suspensions_to_every_caller(api: Api) -> None:
    assert api("GET", "/policy").body["suspended"] == []
    suspend(api)
    suspend(api, "transaction")
    shown = api("GET", "/policy").body["suspended"]
    assert [(each["action"], each["status"], each["reason"]) for each in shown] == [
        ("transaction", "suspended", REASON), ("transfer_funds", "suspended", REASON)
    ]  # fmt: skip
    event = api.event("GET", "/policy")
    event["queryStringParameters"] = {"action_type": "transfer_funds"}
    event["multiValueQueryStringParameters"] = {"action_type": ["transfer_funds"]}
    rule = api.checked(api.aws.invoke(api.function, event)).body
    assert [each["action"] for each in rule["suspended"]] == ["transfer_funds"]
    assert rule["allowed"] is True  # the rule itself is as it was


def test_change_before_the_first_event_keeps_the_version(aws: Cloud, api: Api) -> None:
    """A stack of a release without events has a version in force: the first event's state names it."""
    boto3.client("dynamodb").delete_item(TableName="PolicyTable", Key=dynamo.key("EVENTS#policy", "EVENT#000000001"))
    policy_id = api("GET", "/policy").body["policy_id"]
    suspend(api)
    [event] = events_after("PolicyTable")
    assert (event.number, event.state.in_force) == (1, policy_id)
