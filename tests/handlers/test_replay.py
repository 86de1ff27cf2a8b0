"""Recorded requests, decided again by a proposal: counts, pages, and who may see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from planner import replay
from qaes.domain.ids import now
from tests.handlers.test_policy_format_2 import propose
from tests.support.api import ALICE, BOB, CAROL, OLIVIA, Answer, Api, items, named
from tests.support.cloud import Cloud, cloud
from tests.support.recorded import record, transfer

PROPOSAL: dict[str, Any] = {
    "groups": {"finance": ["fay", "finn"]},
    "rules": {
        "transfer_funds": {
            "allowed": True,
            "risk_level": "high",
            "requesters": ["user:alice", "agent:crm-agent"],
            "tiers": [
                {"max_amount": 100, "approvals": 0},
                {"max_amount": 200, "approvals": 1, "approvers": "finance"},
                {"max_amount": 300, "approvals": 2, "approvers": "finance"},
            ],
            "limits": [{"window_seconds": 3600, "max_amount": 300, "per": "requester", "over": "deny"}],
        }
    },
}
"""Against version 1, which requires one approval by any approver for every transfer."""
REMOVED = ["monitoring", "transaction"]
NONE = dict.fromkeys(
    ["allow_to_deny", "deny_to_allow", "more_approvals", "fewer_approvals", "other_approvers", "unchanged"], 0
)


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    proposed = propose(Api(aws, "QubicApiFunction"), PROPOSAL, REMOVED)
    assert proposed.body["version"] == 2, proposed
    return Api(aws, "PlannerApiFunction")


def again(api: Api, version: int = 2, caller: dict[str, Any] = CAROL, **body: Any) -> Answer:
    before = items()
    answer = api("POST", f"/policy/versions/{version}/replay", {"days": 7} | body, **caller)
    assert items() == before, "nothing is written"
    return answer


def test_replay_counts_and_lists_the_differences(api: Api) -> None:
    at = now() - timedelta(hours=1)
    amounts = [50, 150, 250, 350]
    tasks = [transfer(number, amount, at) for number, amount in enumerate(amounts)]
    tasks += [transfer(10, 50, at, "mallory"), transfer(11, 50, at, "alice", "crm-agent")]
    record(tasks)
    found = again(api).body
    assert found["counts"] == NONE | {
        "fewer_approvals": 2, "other_approvers": 1, "more_approvals": 1, "allow_to_deny": 2
    }  # fmt: skip
    assert (found["requests"], found["next_cursor"], found["ignores_windows"]) == (6, None, True)
    changes = {each["task_id"]: each for each in found["changes"]}
    assert {changes[task.task_id]["change"] for task in tasks[:1]} == {"fewer_approvals"}
    denied = changes[tasks[3].task_id]
    assert (denied["change"], denied["after"]["code"], denied["before"]["approvals"]) == (
        "allow_to_deny", "over_max_amount", 1
    )  # fmt: skip
    assert changes[tasks[2].task_id]["after"] == {
        "allowed": True,
        "code": "allowed",
        "reason": "tier 3 of 3 (up to 300 QU) requires 2 approvals by the group `finance`",
        "tier": 2,
        "approvals": 2,
        "approvers": "finance",
    }
    assert changes[tasks[4].task_id]["after"]["code"] == "requester_not_allowed"
    assert "usage of the limits' windows is ignored" in found["note"]


def test_replay_of_the_version_in_force_changes_nothing(api: Api) -> None:
    record([transfer(number, 50, now() - timedelta(minutes=1)) for number in range(3)])
    found = again(api, 1).body
    assert found["counts"] == NONE | {"unchanged": 3}
    assert (found["changes"], found["policy_id"]) == ([], found["compared_with"])


def test_replay_leaves_out_older_requests(api: Api) -> None:
    ages = [timedelta(days=2, minutes=1), timedelta(days=2, minutes=-1), timedelta(days=89)]
    record([transfer(number, 50, now() - age) for number, age in enumerate(ages)])
    assert again(api, days=2).body["requests"] == 1
    assert again(api, days=90).body["requests"] == 3
    assert again(api, days=1).body["requests"] == 0


def test_replay_pages_through_every_request_once(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    at = now() - timedelta(hours=5)
    tasks = [transfer(number, 50 + 100 * (number % 4), at + timedelta(seconds=number)) for number in range(30)]
    record(tasks)
    monkeypatch.setattr(replay, "MOST_REQUESTS", 13)
    seen: list[str] = []
    counts: Counter[str] = Counter()
    cursor, pages = None, 0
    while pages == 0 or cursor:
        page = again(api, limit=7, cursor=cursor).body
        assert len(page["changes"]) <= 7
        assert page["requests"] <= 13
        seen += [each["task_id"] for each in page["changes"]]
        counts.update(page["counts"])
        cursor, pages = page["next_cursor"], pages + 1
    assert seen == sorted((task.task_id for task in tasks), reverse=True)
    assert sum(counts.values()) == 30
    assert pages >= 5
    monkeypatch.undo()
    assert counts == Counter(again(api, limit=500).body["counts"])


def test_replay_stops_in_time_and_goes_on(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    record([transfer(number, 50, now() - timedelta(minutes=1)) for number in range(250)])
    monkeypatch.setattr(replay, "TIME_SECONDS", -1.0)
    requests, cursor = [], None
    for _ in range(4):
        page = again(api, limit=500, cursor=cursor).body
        requests.append(page["requests"])
        if (cursor := page["next_cursor"]) is None:
            break
    assert requests[:3] == [100, 100, 50]
    assert cursor is None


def test_replay_cursor_of_before_the_days_ends(api: Api) -> None:
    old = transfer(1, 50, now() - timedelta(days=3))
    record([old, transfer(2, 50, now())])
    page = again(api, days=1, cursor=old.task_id).body
    assert (page["requests"], page["next_cursor"]) == (0, None)


@pytest.mark.parametrize(("caller", "status"), [(ALICE, 403), (BOB, 403), (CAROL, 200), (OLIVIA, 200)])
def test_replay_is_for_auditors_and_operators(api: Api, caller: dict[str, Any], status: int) -> None:
    assert again(api, caller=caller).status == status
    assert again(api, caller=caller | {"agent": "crm-agent"}).status == 403


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"days": 0}, "days"),
        ({"days": 91}, "days"),
        ({"days": 1.5}, "days"),
        ({"days": None}, "days"),
        ({"limit": 501}, "limit"),
        ({"cursor": "task_1"}, "cursor"),
        ({"hours": 1}, "hours"),
    ],
)
def test_replay_returns_422_with_the_field(api: Api, body: dict[str, Any], field: str) -> None:
    answer = again(api, **body)
    assert (answer.status, named(answer)) == (422, {field})


def test_replay_of_an_unknown_version_is_not_found(api: Api) -> None:
    missing = again(api, 9)
    assert (missing.status, named(missing)) == (404, {"version"})
