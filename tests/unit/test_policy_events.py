"""The events of the policy: their numbers, their texts, and the state after each."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qaes.adapters.policy_events import event_item, event_of, put_event
from qaes.domain.errors import ConflictError, InvalidInputError
from qaes.domain.policy_events import LEDGER, PolicyEvent, PolicyState, next_event

POLICY_ID = f"policy-v2-{'a' * 64}"
AT = "2026-11-23T12:00:00.000Z"


def event(before: PolicyEvent | None, kind: Any, actor: str = "olivia", **more: Any) -> PolicyEvent:
    about = {"policy_id": POLICY_ID} if kind.startswith("policy_") else {"name": "transfer_funds"}
    return next_event(before, kind, actor=actor, at=AT, **(about | more))


def suspended() -> PolicyEvent:
    return event(None, "action_suspended", in_force=POLICY_ID, details={"reason": "an incident"})


def test_policy_event_numbered_after_the_one_before() -> None:
    first = event(None, "policy_proposed")
    second = event(first, "policy_approved", "oscar")
    assert [first.number, second.number] == [1, 2]


def test_policy_event_has_its_exact_members() -> None:
    built = event(None, "policy_in_force", LEDGER, details={"txid": "x" * 60, "tick": 7})
    assert built.model_dump(exclude={"salt"}) == {
        "number": 1,
        "kind": "policy_in_force",
        "actor": "ledger",
        "status": "in_force",
        "timestamp": AT,
        "policy_id": POLICY_ID,
        "input": f'{{"policy_id":"{POLICY_ID}","tick":7,"txid":"{"x" * 60}"}}',
        "output": f'{{"in_force":"{POLICY_ID}","suspended":{{}}}}',
    }


def test_policy_event_has_its_own_salt() -> None:
    assert suspended().salt != suspended().salt


def test_policy_event_keeps_version_of_before_the_stream() -> None:
    assert suspended().state.in_force == POLICY_ID


def test_suspension_names_its_event_and_its_reason() -> None:
    first = suspended()
    assert json.loads(first.input) == {"name": "transfer_funds", "reason": "an incident"}
    assert json.loads(first.output)["suspended"] == {"transfer_funds": {"event": 1, "resume_requested_by": None}}


def test_suspension_ends_when_resumed() -> None:
    requested = event(suspended(), "resume_requested")
    assert requested.state.suspended["transfer_funds"].resume_requested_by == "olivia"
    assert event(requested, "action_resumed", "oscar").state == PolicyState(in_force=POLICY_ID)


def test_suspension_of_another_name_stays_when_resumed() -> None:
    both = event(suspended(), "action_suspended", name="*")
    resumed = event(event(both, "resume_requested"), "action_resumed", "oscar")
    assert list(resumed.state.suspended) == ["*"]


def test_resume_request_lapses_when_suspended_again() -> None:
    again = event(event(suspended(), "resume_requested"), "action_suspended")
    with pytest.raises(ConflictError, match="no operator has requested"):
        event(again, "action_resumed", "oscar")


@pytest.mark.parametrize("kind", ["resume_requested", "action_resumed"])
def test_resume_refused_when_not_suspended(kind: str) -> None:
    with pytest.raises(ConflictError, match="`transfer_funds` is not suspended"):
        event(None, kind)


@pytest.mark.parametrize(
    ("kind", "about"),
    [
        ("policy_proposed", {"policy_id": "", "name": "transfer_funds"}),
        ("policy_proposed", {"name": "transfer_funds"}),
        ("action_suspended", {"policy_id": POLICY_ID}),
        ("action_suspended", {"name": ""}),
    ],
)
def test_policy_event_refused_about_the_wrong_thing(kind: str, about: dict[str, str]) -> None:
    with pytest.raises(InvalidInputError):
        event(None, kind, **about)


def test_policy_event_details_cannot_replace_its_subject() -> None:
    built = event(None, "policy_proposed", details={"policy_id": "another"})
    assert json.loads(built.input) == {"policy_id": POLICY_ID}


def test_policy_event_read_as_written() -> None:
    written = event(suspended(), "policy_rejected", details={"reason": "Zürich \U0001f9fe"})
    assert event_of(event_item(written)) == written


def test_policy_event_written_once_for_its_number() -> None:
    put = put_event("PolicyTable", suspended())["Put"]
    assert put["ConditionExpression"] == "attribute_not_exists(pk)"
    assert (put["Item"]["pk"], put["Item"]["sk"]) == ({"S": "EVENTS#policy"}, {"S": "EVENT#000000001"})
