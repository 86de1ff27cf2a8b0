"""The ledger's operation `policy`: as much of two versions as a decision on one action needs, and the suspensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qaes.domain.policy import DEFAULT_RULES, Rule
from qubic import wiring
from qubic.policy import trust
from tests.support.api import set_environment
from tests.support.cloud import Cloud, cloud

Call = Callable[..., dict[str, Any]]
STRICTER = DEFAULT_RULES | {
    "transfer_funds": Rule(allowed=True, requires_approval=True, risk_level="high", approvals=2)
}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("LedgerRecordFunction", monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def call(aws: Cloud) -> Call:
    def send(**arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = aws.invoke("LedgerFunction", {"operation": "policy", **arguments})
        return answer

    return send


@pytest.fixture
def versions(aws: Cloud, call: Call) -> tuple[str, str]:
    """The ids of version 1, superseded, and of version 2, in force."""
    first = str(call()["result"]["policy_id"])
    store = wiring.policies()
    second = store.propose(STRICTER, subject="olivia")
    store.approve(second.version, subject="oscar", four_eyes=True)
    aws.settle()
    return first, second.policy_id


def suspend(name: str) -> None:
    wiring.suspending().suspend(name, subject="olivia", reason="so")


def test_policy_is_whole_without_an_action(call: Call) -> None:
    result = call()["result"]
    assert set(result["rules"]) == set(DEFAULT_RULES)
    assert not {"pinned", "suspended"} & set(result)


def test_policy_returns_the_fields_for_the_action(call: Call, versions: tuple[str, str]) -> None:
    first, second = versions
    result = call(action="transfer_funds", pinned=first)["result"]
    assert (result["policy_id"], result["version"], result["format"]) == (second, 2, 1)
    assert {name: rule["approvals"] for name, rule in result["rules"].items()} == {"transfer_funds": 2}
    pinned = result["pinned"]
    assert (pinned["policy_id"], pinned["version"], pinned["format"]) == (first, 1, 1)
    assert {name: rule["approvals"] for name, rule in pinned["rules"].items()} == {"transfer_funds": 1}
    assert result["suspended"] == {}


def test_policy_leaves_out_the_pinned_version_in_force(call: Call, versions: tuple[str, str]) -> None:
    assert "pinned" not in call(action="transfer_funds", pinned=versions[1])["result"]


def test_policy_has_no_rule_for_an_unknown_action(call: Call) -> None:
    assert call(action="burn")["result"]["rules"] == {}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"pinned": f"policy-v1-{'a' * 64}"}, "not_found"),
        ({"pinned": f"policy-v9-{'a' * 64}"}, "not_found"),
        ({"pinned": "policy"}, "not_found"),
        ({"pinned": 1}, "not_found"),
        ({"action": None}, "invalid_input"),
    ],
)
def test_policy_refuses_version_never_in_force(
    call: Call, versions: tuple[str, str], changes: dict[str, Any], code: str
) -> None:
    answer = call(**{"action": "transfer_funds", "pinned": versions[0]} | changes)
    assert answer["ok"] is False
    assert answer["error"]["code"] == code


def test_policy_refuses_a_pinned_proposal(call: Call) -> None:
    proposed = wiring.policies().propose(STRICTER, subject="olivia")
    assert call(action="monitoring", pinned=proposed.policy_id)["error"]["code"] == "not_found"


@pytest.mark.parametrize("new_process", [False, True])
def test_policy_refuses_an_altered_pinned_version(
    aws: Cloud, call: Call, versions: tuple[str, str], new_process: bool
) -> None:
    store = wiring.policies()
    text = store.read(1)[1]
    store._items.update(
        Key=store._key("VERSION#000000001"),
        UpdateExpression="SET #text = :text",
        ExpressionAttributeNames={"#text": "text"},
        ExpressionAttributeValues={":text": {"S": text.replace('"approvals":1', '"approvals":3')}},
    )
    if new_process:
        trust._verified.clear()
        trust._seen.clear()
    assert call(action="transfer_funds", pinned=versions[0])["error"]["code"] == "policy_altered"
    assert call(action="transfer_funds", pinned=versions[1])["ok"] is True


def test_policy_shows_the_suspensions_of_the_action(call: Call) -> None:
    suspend("transaction")
    suspend("transfer_funds")
    suspended = call(action="transfer_funds")["result"]["suspended"]
    assert {name: (each["by"], each["reason"]) for name, each in suspended.items()} == {
        "transfer_funds": ("olivia", "so")
    }
    suspend("*")
    assert set(call(action="monitoring")["result"]["suspended"]) == {"*"}


def test_policy_costs_no_more_reads_than_before(
    aws: Cloud, call: Call, versions: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HEAD is read consistently. The version and the suspensions may come from any replica, for half of that."""
    reads: list[tuple[str, bool]] = []
    from qaes.adapters import dynamo

    get = dynamo.get

    def counted(table: str, pk: str, sk: str, *, consistent: bool = True) -> Any:
        reads.append((table, consistent))
        return get(table, pk, sk, consistent=consistent)

    call(action="transfer_funds", pinned=versions[1])
    monkeypatch.setattr(dynamo, "get", counted)
    call(action="transfer_funds", pinned=versions[1])
    assert sorted(reads) == [("LedgerTable", False), ("LedgerTable", True), ("PolicyTable", False)]
