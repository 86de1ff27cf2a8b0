"""Policies of format 2 in the workflow: tiers, groups, limits and suspensions, by documents that the ledger has."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from audit.store import Outbox
from qaes.adapters.executions import Executions
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import ForbiddenError, PermanentError
from qaes.domain.models import Approval
from qaes.domain.qubic.identity import encode_identity
from qubic import wiring
from tests.support.api import set_environment
from tests.support.cloud import Cloud, cloud
from tests.support.policies import REFUND
from tests.support.publishing import GROUPS, publish
from tests.support.stories import check_every_story
from tests.workflow.conftest import begin
from tests.workflow.test_paths import kinds, retry

FREE = {"max_amount": 10, "approvals": 0}
BY_FINANCE = {"max_amount": 500, "approvals": 2, "approvers": "finance"}
CONTRACT = encode_identity(b"\4" + bytes(31))
ALLOWED = {"allowed": True, "risk_level": "high"}
TRANSFERS = {"transfer_funds": ALLOWED | {"tiers": [FREE, BY_FINANCE]}}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("QubicApiFunction", monkeypatch)
    monkeypatch.setenv("LIMITS_TABLE", "LimitsTable")
    with cloud() as it:
        yield it
        check_every_story()


def store() -> TaskStore:
    return TaskStore("TasksTable")


def approve(task_id: str, *subjects: str, deliver: bool = True) -> Approval:
    for subject in subjects:
        approval = store().decide(task_id, approved=True, subject=subject, reason="because")
    if deliver and approval.status != "pending":
        Executions.deliver(task_id, approval)
    return approval


def requests(aws: Cloud, task_id: str) -> int:
    """Return the number of approval requests."""
    return kinds(aws, task_id).count("approval_requested:pending")


def again(aws: Cloud, task_id: str) -> Approval:
    """Wait until people are asked a second time."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        approval = store().open_approval(task_id)
        if approval is not None and approval.round == 2:
            aws.wait(task_id, "waiting_approval")
            return approval
        time.sleep(0.02)
    raise AssertionError(f"no new approval was requested: {kinds(aws, task_id)}")


def test_tier_without_approvals_requests_none(aws: Cloud, transfer: Callable[..., str]) -> None:
    publish(aws, TRANSFERS)
    task_id = transfer(10)
    aws.wait(task_id, "completed")
    assert requests(aws, task_id) == 0
    assert [state for state in aws.history(task_id) if state in {"AwaitApproval", "ExecuteAction"}] == [
        "AwaitApproval",
        "ExecuteAction",
    ]


def test_only_the_tiers_group_approves(aws: Cloud, transfer: Callable[..., str]) -> None:
    policy_id = publish(aws, TRANSFERS)
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    for outsider in ("erin", "mallory"):
        with pytest.raises(ForbiddenError, match="only people in `finance`"):
            approve(task_id, outsider)
    assert approve(task_id, "bob").status == "pending"
    approve(task_id, "carol")
    aws.wait(task_id, "completed")
    plan = store().plan_of(store().get_task(task_id))
    assert plan.policy.model_dump() == {
        "policy_id": policy_id, "action_type": "transfer_funds", "allowed": True, "requires_approval": True,
        "risk_level": "high", "approvals": 2, "expires_after": None, "format": 2, "tier": 1, "approvers": "finance",
        "signature": False,
    }  # fmt: skip


def test_transfer_pays_a_contract_by_a_rule_that_allows_it(aws: Cloud) -> None:
    rule = {"tiers": [BY_FINANCE], "smart_contracts": True}
    publish(aws, {"transfer_funds": ALLOWED | rule})
    paid, late = (begin(aws, "transfer_funds", to_address=CONTRACT, amount=250) for _ in range(2))
    for task_id in (paid, late):
        aws.wait(task_id, "waiting_approval")
    approve(paid, "bob", "carol")
    aws.wait(paid, "completed")
    approval = approve(late, "bob", "carol", deliver=False)
    publish(aws, {"transfer_funds": ALLOWED | rule | {"smart_contracts": False}})
    Executions.deliver(late, approval)
    assert aws.wait(late, "denied")["reason"].startswith("invalid_address: to_address is the address of smart contract")


def test_transfer_to_a_contract_denied_without_the_rule(aws: Cloud) -> None:
    publish(aws, {"transfer_funds": ALLOWED | {"tiers": [BY_FINANCE]}})
    task_id = begin(aws, "transfer_funds", to_address=CONTRACT, amount=250)
    assert aws.wait(task_id, "denied")["reason"].startswith("invalid_address: ")
    assert requests(aws, task_id) == 0


def test_amount_beyond_every_tier_is_denied_with_its_reason(aws: Cloud, transfer: Callable[..., str]) -> None:
    publish(aws, TRANSFERS)
    task_id = transfer(501)
    task = aws.wait(task_id, "denied")
    assert "over max_amount" in task["reason"]
    assert kinds(aws, task_id) == ["task_started:pending", "policy_checked:denied", "task_ended:denied"]


def test_too_few_people_deny_a_task_at_once(aws: Cloud, transfer: Callable[..., str]) -> None:
    publish(aws, TRANSFERS, groups=GROUPS | {"finance": ["alice", "bob"]})
    task = aws.wait(transfer(250), "denied")
    assert task["reason"].startswith("too_few_approvers: ")


def test_member_who_leaves_before_the_claim_does_not_count(aws: Cloud, transfer: Callable[..., str]) -> None:
    publish(aws, TRANSFERS)
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    approval = approve(task_id, "bob", "carol", deliver=False)
    publish(aws, TRANSFERS, groups=GROUPS | {"finance": ["bob", "dora", "erin"]})
    Executions.deliver(task_id, approval)
    asked = again(aws, task_id)
    # Of the pinned group and the present one; the present tier lets erin count, who joined.
    assert [quorum.members for quorum in asked.quorums] == [("bob", "dora")]
    approve(task_id, "bob", "dora")
    aws.wait(task_id, "completed")


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({}, "does not allow transfer_funds"),
        ({"transfer_funds": ALLOWED | {"allowed": False, "tiers": [FREE]}}, "does not allow transfer_funds"),
        ({"transfer_funds": ALLOWED | {"tiers": [FREE]}}, "over max_amount"),
        ({"transfer_funds": TRANSFERS["transfer_funds"] | {"requesters": ["user:zed"]}}, "this requester"),
    ],
)
def test_stricter_policy_denies_an_approved_transfer(
    aws: Cloud, transfer: Callable[..., str], rules: dict[str, Any], named: str
) -> None:
    publish(aws, TRANSFERS)
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    approval = approve(task_id, "bob", "carol", deliver=False)
    publish(aws, rules)
    Executions.deliver(task_id, approval)
    task = aws.wait(task_id, "denied")
    assert named in task["reason"]


def test_format_2_comes_into_force_while_a_task_waits(aws: Cloud, transfer: Callable[..., str]) -> None:
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    approval = approve(task_id, "mallory", deliver=False)
    publish(aws, TRANSFERS)
    Executions.deliver(task_id, approval)
    asked = again(aws, task_id)
    assert [(quorum.approvals, quorum.approvers) for quorum in asked.quorums] == [(2, "finance")]
    approve(task_id, "bob", "carol")
    aws.wait(task_id, "completed")
    assert store().plan_of(store().get_task(task_id)).policy.format == 1


def test_member_who_retried_a_task_does_not_count(aws: Cloud, transfer: Callable[..., str]) -> None:
    publish(aws, TRANSFERS)

    def fail(event: Any) -> None:
        raise ConnectionError("down")

    aws.faults["AwaitApprovalFunction"] = fail
    task_id = transfer(250)
    aws.wait(task_id, "failed")
    aws.execution(task_id)
    aws.faults.clear()
    retry(aws, task_id, subject="bob")
    aws.wait(task_id, "waiting_approval")
    [quorum] = store().open_approval(task_id).quorums  # type: ignore[union-attr]
    assert quorum.members == ("carol", "dora")
    with pytest.raises(ForbiddenError, match="retried"):
        approve(task_id, "bob")
    approve(task_id, "carol", "dora")
    aws.wait(task_id, "completed")


# Operators' actions, which are recorded only


def refunds(**members: Any) -> dict[str, Any]:
    return {"refund_customer": ALLOWED | {"tiers": [{"max_amount": None, "approvals": 0}]} | members}


def refund(aws: Cloud, amount: int = 50) -> str:
    moment = {"order_id": "123456", "amount": amount}
    return begin(aws, "refund_customer", only=moment)


def used(limits: list[dict[str, Any]]) -> list[int]:
    return [limit["used"] for limit in limits]


def claim_of(aws: Cloud, task_id: str) -> dict[str, Any]:
    """Return the content of the action's claim."""
    found = Outbox("TasksTable").disclosed(task_id).values()
    *_, claim = [json.loads(event.output) for event in found if event.kind == "step_started"]
    return dict(claim)


def test_operators_action_counts_in_its_limits(aws: Cloud) -> None:
    limit = {"window_seconds": 86400, "max_amount": 100, "per": "action", "over": "deny"}
    count = {"window_seconds": 3600, "max_count": 5, "per": "requester", "over": "deny"}
    publish(aws, refunds(limits=[limit, count]), actions={"refund_customer": REFUND})
    first, second = refund(aws), None
    aws.wait(first, "completed")
    second = refund(aws)
    aws.wait(second, "completed")
    assert (used(claim_of(aws, first)["limits"]), used(claim_of(aws, second)["limits"])) == ([0, 0], [50, 1])
    third = refund(aws, 1)
    task = aws.wait(third, "denied")
    assert task["reason"].startswith("limit_exceeded: `amount` 1 EUR-cent exceeds the limit of 100 EUR-cent in 86400 s")
    assert "step_started:running" not in kinds(aws, third)[-2:]


def test_over_a_limit_its_group_approves(aws: Cloud) -> None:
    over = {"approvals": 1, "approvers": "cfo"}
    limit = {"window_seconds": 86400, "max_count": 1, "per": "requester", "over": over}
    publish(aws, refunds(limits=[limit]), actions={"refund_customer": REFUND})
    aws.wait(refund(aws), "completed")
    task_id = refund(aws)
    aws.wait(task_id, "waiting_approval")
    with pytest.raises(ForbiddenError):
        approve(task_id, "bob")
    approve(task_id, "erin")
    aws.wait(task_id, "completed")
    assert used(claim_of(aws, task_id)["limits"]) == [1]
    assert claim_of(aws, task_id)["limits"][0]["maximum"] == 1


def test_action_that_fails_gives_its_share_back(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = {"window_seconds": 86400, "max_amount": 100, "per": "action", "over": "deny"}
    publish(aws, refunds(limits=[limit]), actions={"refund_customer": REFUND})

    def no(*_: Any, **__: Any) -> Any:
        raise PermanentError("not_allowed", "a test")

    with monkeypatch.context() as patched:
        patched.setattr(LedgerClient, "record_instruction", no)
        aws.wait(refund(aws, 100), "failed")
    task_id = refund(aws, 100)
    aws.wait(task_id, "completed")
    assert used(claim_of(aws, task_id)["limits"]) == [0]


def test_parameters_that_do_not_fit_the_schema_are_denied(aws: Cloud) -> None:
    publish(aws, refunds(limits=[]), actions={"refund_customer": REFUND})
    task = aws.wait(begin(aws, "refund_customer", only={"order_id": "12", "amount": 5}), "denied")
    assert task["reason"].startswith("invalid_parameters: parameters.order_id: ")


def test_action_that_the_policy_does_not_define_is_denied(aws: Cloud) -> None:
    publish(aws, TRANSFERS)
    task = aws.wait(begin(aws, "note", only={}), "denied")
    assert "has no action note" in task["reason"]


# Monitoring


def watching(**members: Any) -> dict[str, Any]:
    return {"monitoring": ALLOWED | {"tiers": [{"max_amount": None, "approvals": 0}]} | members}


def test_monitoring_with_approvals_waits_for_the_group(aws: Cloud, start: Callable[..., str]) -> None:
    publish(aws, watching(tiers=[{"max_amount": None, "approvals": 1, "approvers": "cfo"}]))
    task_id = start()
    aws.wait(task_id, "waiting_approval")
    approve(task_id, "erin")
    aws.wait(task_id, "completed")


def test_monitoring_over_its_limit_waits_for_people(aws: Cloud, start: Callable[..., str]) -> None:
    limit = {"window_seconds": 3600, "max_count": 1, "per": "source", "over": {"approvals": 1}}
    publish(aws, watching(limits=[limit]))
    aws.wait(start(), "completed")
    task_id = start()
    aws.wait(task_id, "waiting_approval")
    approve(task_id, "bob")
    aws.wait(task_id, "completed")
    assert used(claim_of(aws, task_id)["limits"]) == [1]


# Suspension


@pytest.mark.parametrize("name", ["transfer_funds", "*"])
def test_suspension_denies_an_approved_step(aws: Cloud, transfer: Callable[..., str], name: str) -> None:
    publish(aws, TRANSFERS)
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    approval = approve(task_id, "bob", "carol", deliver=False)
    wiring.suspending().suspend(name, subject="olivia", reason="the supplier's address changed")
    Executions.deliver(task_id, approval)
    task = aws.wait(task_id, "denied")
    assert task["reason"].startswith("suspended: olivia suspended ")
    assert "step_started:running" not in kinds(aws, task_id)[-3:]


def test_suspension_denies_a_plain_step(aws: Cloud, start: Callable[..., str]) -> None:
    publish(aws, watching())
    wiring.suspending().suspend("monitoring", subject="olivia", reason="a test")
    task = aws.wait(start(), "denied")
    assert task["reason"].startswith("suspended: olivia suspended `monitoring`")


# Limits of transfers, which the ledger counts


def over(**over: Any) -> dict[str, Any]:
    limit = {"window_seconds": 86400, "max_amount": 300, "per": "source", "over": over or "deny"}
    return {"transfer_funds": ALLOWED | {"tiers": [{"max_amount": None, "approvals": 0}], "limits": [limit]}}


def test_a_transfer_over_its_limit_is_denied(aws: Cloud, transfer: Callable[..., str]) -> None:
    publish(aws, over())
    first = transfer(250)
    aws.wait(first, "completed")
    task = aws.wait(transfer(51), "denied")
    assert "exceeds the limit of 300 QU in 86400 s for this source (250 QU used)" in task["reason"]


def test_a_transfer_over_its_limit_is_made_when_its_group_approves(aws: Cloud, transfer: Callable[..., str]) -> None:
    publish(aws, over(approvals=1, approvers="cfo"))
    aws.wait(transfer(250), "completed")
    task_id = transfer(51)
    aws.wait(task_id, "waiting_approval")
    with pytest.raises(ForbiddenError):
        approve(task_id, "bob")
    approve(task_id, "erin")
    aws.wait(task_id, "completed")
    assert used(claim_of(aws, task_id)["limits"]) == [250]


def test_the_groups_of_both_tiers_must_approve(aws: Cloud, transfer: Callable[..., str]) -> None:
    """The tier in force names another group; the pinned one's is still in the document."""
    publish(aws, TRANSFERS)
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    approval = approve(task_id, "bob", "carol", deliver=False)
    by_cfo = {"max_amount": None, "approvals": 1, "approvers": "cfo"}
    publish(aws, {"transfer_funds": ALLOWED | {"tiers": [by_cfo]}})
    Executions.deliver(task_id, approval)
    asked = again(aws, task_id)
    assert [(quorum.approvals, quorum.approvers) for quorum in asked.quorums] == [(2, "finance"), (1, "cfo")]
    approve(task_id, "bob", "dora")  # dora is in both groups
    aws.wait(task_id, "completed")


def test_transfer_over_a_limit_of_its_requester_is_denied(aws: Cloud, transfer: Callable[..., str]) -> None:
    limit = {"window_seconds": 3600, "max_count": 1, "per": "requester", "over": "deny"}
    publish(aws, {"transfer_funds": ALLOWED | {"tiers": [FREE], "limits": [limit]}})
    aws.wait(transfer(10), "completed")
    task = aws.wait(transfer(10), "denied")
    exceeds = "the request exceeds the limit of 1 request in 3600 s for this requester (1 request used)"
    assert task["reason"] == f"limit_exceeded: {exceeds}"


def test_retry_is_not_denied_by_its_own_share(aws: Cloud) -> None:
    """The outcome of the first execution is unknown, so it keeps counting; the retry is the same action."""
    limit = {"window_seconds": 86400, "max_count": 1, "per": "action", "over": "deny"}
    publish(aws, refunds(limits=[limit]), actions={"refund_customer": REFUND})
    aws.faults["LedgerTransferFunction"] = lambda event: 1 / 0  # type: ignore[assignment]
    task_id = refund(aws)
    aws.wait(task_id, "failed")
    aws.execution(task_id)
    aws.wait(refund(aws), "denied")
    aws.faults.clear()
    retry(aws, task_id)
    aws.wait(task_id, "completed")
    aws.wait(refund(aws), "denied")
