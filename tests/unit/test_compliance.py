from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain import compliance
from qaes.domain.errors import (
    ApprovalExpiredError,
    ApprovalNeededError,
    ApprovalRejectedError,
    ConflictError,
    PermanentError,
    StepDeniedError,
)
from qaes.domain.ids import parse_timestamp
from qaes.domain.models import Approval, Decision, Task
from qaes.domain.policy import Policy, Rule
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.ruling import Ruling, rule
from tests.support.policies import of_limits
from tests.unit.test_planning import POLICY, TRANSFER, plan

PLAN = plan("transfer_funds", TRANSFER)
NOW = "2026-11-23T12:00:00.000Z"
AT = parse_timestamp(NOW)
TASK = Task(
    task_id="task_1",
    status="executing",
    task_type="transfer_funds",
    description="a test",
    parameters=TRANSFER,
    requester="alice",
    created_at=NOW,
    updated_at=NOW,
    plan_id="plan_1",
    plan_hash=PLAN.hash(),
)
MONITORING_TASK = TASK.model_copy(update={"task_type": "monitor_wallet", "parameters": {"wallet_address": "0x12"}})
APPROVED = Approval(
    step_index=2,
    round=1,
    status="approved",
    plan_hash=PLAN.hash(),
    step_hash=PLAN.steps[2].hash(),
    policy_id="policy-v1-test",
    requested_at=NOW,
    expires_at=NOW,
    decisions=(Decision(subject="bob", approved=True, reason="checked", decided_at=NOW),),
)


def policy(policy_id: str = "policy-v2-test", action: str = "transfer_funds", **changes: Any) -> Policy:
    """The test's policy with another rule for an action, which is not checked."""
    rules = POLICY.rules | {action: POLICY.rules[action].model_copy(update=changes)}
    return POLICY.model_copy(update={"policy_id": policy_id, "rules": rules})


def ruling(current: Policy = POLICY, pinned: Policy = POLICY, task: Task = TASK) -> Ruling:
    return rule(task, pinned, current)


CURRENT = POLICY


def changed(model: Any, **changes: Any) -> Any:
    return model.model_copy(update=changes)


STOPS = {
    "denied": StepDeniedError,
    "await_approval": ApprovalNeededError,
    "rejected": ApprovalRejectedError,
    "expired": ApprovalExpiredError,
}


@pytest.mark.parametrize(
    ("step", "current", "approval", "verdict"),
    [
        (0, CURRENT, None, "execute"),
        (2, CURRENT, None, "await_approval"),
        (2, CURRENT, changed(APPROVED, status="pending"), "await_approval"),
        (2, CURRENT, APPROVED, "execute"),
        (2, CURRENT, changed(APPROVED, status="rejected"), "rejected"),
        (2, CURRENT, changed(APPROVED, status="cancelled"), "denied"),
        # Another execution of the task, after a retry, asks anew.
        (2, CURRENT, changed(APPROVED, run=2), "await_approval"),
        # A policy that asks for more people by now gets them.
        (2, policy(approvals=2), APPROVED, "await_approval"),
        (2, CURRENT, changed(APPROVED, status="expired"), "expired"),
        (2, CURRENT, changed(APPROVED, step_hash="0" * 64), "denied"),
        (2, CURRENT, changed(APPROVED, plan_hash="0" * 64), "denied"),
        (0, policy(allowed=False), None, "denied"),
        (2, policy(allowed=False), APPROVED, "denied"),
        # A less strict policy in force does not take back the approvals that the plan promised.
        (2, policy(requires_approval=False), None, "await_approval"),
    ],
)
def test_verdicts(step: int, current: Policy, approval: Approval | None, verdict: str) -> None:
    assert compliance.decide(TASK, PLAN, step, ruling(current), approval).verdict == verdict
    if verdict == "execute":
        compliance.check_may_act(TASK, PLAN, step, ruling(current), approval, at=AT)
    else:
        with pytest.raises(STOPS[verdict]):
            compliance.check_may_act(TASK, PLAN, step, ruling(current), approval, at=AT)


def test_step_is_refused_when_its_approval_is_too_old() -> None:
    late = AT + compliance.MAX_APPROVAL_AGE
    compliance.check_may_act(TASK, PLAN, 2, ruling(), APPROVED, at=late - timedelta(milliseconds=1))
    with pytest.raises(PermanentError) as caught:
        compliance.check_may_act(TASK, PLAN, 2, ruling(), APPROVED, at=late)
    assert caught.value.code == "approval_too_old"
    monitoring = plan("monitor_wallet", {"wallet_address": "0x12"})
    task = changed(MONITORING_TASK, plan_hash=monitoring.hash())
    compliance.check_may_act(task, monitoring, 2, ruling(task=task), None, at=late)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"status": "rejected"}, "rejected"),
        ({"status": "expired"}, "expired"),
        ({"status": "cancelled"}, "denied"),
        ({"status": "pending"}, "await_approval"),
        ({"step_hash": "0" * 64}, "denied"),
        ({}, "execute"),
        ({"status": "rejected", "run": 2}, "execute"),  # of another execution
    ],
)
def test_decision_counts_when_policy_was_relaxed(changes: dict[str, Any], verdict: str) -> None:
    monitoring = plan("monitor_wallet", {"wallet_address": "0x12"})
    task, step = changed(MONITORING_TASK, plan_hash=monitoring.hash()), monitoring.steps[2]
    assert not compliance.needs_approval(step, ruling(task=task))
    asked = changed(APPROVED, **({"plan_hash": monitoring.hash(), "step_hash": step.hash()} | changes))
    assert compliance.decide(task, monitoring, 2, ruling(task=task), asked).verdict == verdict


def test_stricter_policy_requests_a_new_approval() -> None:
    monitoring = plan("monitor_wallet", {"wallet_address": "0x12"})
    task = changed(MONITORING_TASK, plan_hash=monitoring.hash())
    stricter = policy(action="monitoring", requires_approval=True)
    assert compliance.decide(task, monitoring, 2, ruling(task=task), None).verdict == "execute"
    assert compliance.decide(task, monitoring, 2, ruling(stricter, task=task), None).verdict == "await_approval"


def test_no_step_runs_in_a_task_that_has_ended() -> None:
    assert compliance.decide(changed(TASK, status="cancelled"), PLAN, 0, ruling(), None).verdict == "denied"


def test_another_plan_than_the_recorded_one_is_a_conflict() -> None:
    swapped = changed(PLAN, created_at="2026-11-23T12:00:00.001Z")
    with pytest.raises(ConflictError):
        compliance.decide(TASK, swapped, 0, ruling(), None)


# Limits

SOURCE, DESTINATION = TRANSFER["wallet_address"], TRANSFER["to_address"]
ELSEWHERE = "0xabcdef1234567890"
LIMITS = st.fixed_dictionaries(
    {
        "max_amount": st.none() | st.integers(1, 10),
        "daily_limit": st.none() | st.integers(1, 10),
        "allowed_addresses": st.none() | st.sampled_from([(DESTINATION,), (ELSEWHERE,), (ELSEWHERE, DESTINATION)]),
    }
)


def under(pinned: Policy, amount: Any = 5, to_address: Any = DESTINATION) -> tuple[Task, Any]:
    """A task and its plan of one transfer, under a pinned policy."""
    steps = list(PLAN.steps)
    parameters = {"from_address": SOURCE, "to_address": to_address, "amount": amount}
    asks = pinned.decide("transfer_funds")
    steps[2] = changed(steps[2], requires_approval=asks.requires_approval, parameters=parameters)
    made = changed(PLAN, policy=asks, steps=tuple(steps))
    requested = {"wallet_address": SOURCE, "to_address": to_address, "amount": amount}
    return changed(TASK, plan_hash=made.hash(), parameters=requested), made


def allows(rule: Rule, amount: int) -> bool:
    return (
        rule.allowed
        and (rule.max_amount is None or amount <= rule.max_amount)
        and (rule.daily_limit is None or amount <= rule.daily_limit)
        and (rule.allowed_addresses is None or DESTINATION in rule.allowed_addresses)
    )


def verdict(pinned: Policy, current: Policy, amount: Any = 5, to_address: Any = DESTINATION) -> compliance.Verdict:
    """The verdict on a transfer."""
    task, made = under(pinned, amount, to_address)
    decided = rule(task, pinned, current)
    found = compliance.decide(task, made, 2, decided, None)
    if found.verdict == "denied":
        with pytest.raises(StepDeniedError):
            compliance.check_may_act(task, made, 2, decided, None, at=AT)
    return found


FREE = {"requires_approval": False}


@given(pinned=LIMITS, current=LIMITS, amount=st.integers(1, 11), allowed=st.tuples(st.booleans(), st.booleans()))
def test_step_runs_only_if_both_policies_allow_it(
    pinned: dict[str, Any], current: dict[str, Any], amount: int, allowed: tuple[bool, bool]
) -> None:
    then = policy("policy-v1-then", allowed=allowed[0], **FREE, **pinned)
    now = policy("policy-v2-now", allowed=allowed[1], **FREE, **current)
    rules = [each.rules["transfer_funds"] for each in (then, now)]
    both = all(isinstance(each, Rule) and allows(each, amount) for each in rules)
    assert verdict(then, now, amount).verdict == ("execute" if both else "denied")


@pytest.mark.parametrize("which", ["pinned", "current"])
@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_amount": 4}, "max_amount"),
        ({"daily_limit": 4}, "daily_limit"),
        ({"allowed_addresses": (ELSEWHERE,)}, "allowed_addresses"),
    ],
)
def test_no_approval_requested_beyond_a_limit(which: str, limits: dict[str, Any], named: str) -> None:
    strict = policy("policy-v9-strict", **limits)
    found = verdict(strict if which == "pinned" else POLICY, strict if which == "current" else POLICY)
    assert found.verdict == "denied"
    assert named in found.reason
    assert "policy-v9-strict" in found.reason


@pytest.mark.parametrize("name", ["wallet_address", "to_address"])
@pytest.mark.parametrize("number", [0, 1, 1023])
def test_decide_denies_a_transfer_with_a_contract_or_a_burn(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that was stored before such addresses were refused."""
    address = encode_identity(number.to_bytes(8, "little") + bytes(24))
    with monkeypatch.context() as patch:
        patch.setattr("qaes.domain.planning.check_payable", lambda *_: None)
        it = plan("transfer_funds", TRANSFER | {name: address})
    found = compliance.decide(changed(TASK, plan_hash=it.hash()), it, 2, ruling(), None)
    field = "from_address" if name == "wallet_address" else name
    assert found.verdict == "denied"
    assert found.reason.startswith(f"invalid_address: {field} is the {'zero' if not number else 'address of smart'}")


@pytest.mark.parametrize(("pinned", "current"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("field", ["wallet_address", "to_address"])
def test_decide_lets_a_contract_be_paid_by_both_policies(field: str, pinned: bool, current: bool) -> None:
    """The source is never a contract."""
    address = encode_identity(b"\1" + bytes(31))
    rules = [of_limits("transfer_funds", smart_contracts=each) for each in (pinned, current)]
    parameters = TRANSFER | {field: address}
    ruled = rule(changed(TASK, parameters=parameters), *rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qaes.domain.planning.check_payable", lambda *_: None)
        it = changed(plan("transfer_funds", parameters), policy=ruled.pins)
    found = compliance.decide(changed(TASK, plan_hash=it.hash()), it, 2, ruled, None)
    assert found.verdict == ("execute" if pinned and current and field == "to_address" else "denied")


@pytest.mark.parametrize("limits", [{"max_amount": 5}, {"daily_limit": 5}, {"allowed_addresses": (DESTINATION,)}])
def test_at_the_limit_an_approver_is_asked(limits: dict[str, Any]) -> None:
    assert verdict(policy(**limits), policy(**limits)).verdict == "await_approval"


@pytest.mark.parametrize("amount", [None, True, "5", 5.0, 0, -5])
def test_malformed_amount_is_denied_under_limits(amount: Any) -> None:
    assert verdict(policy(**FREE), policy("policy-v2-now", **FREE, max_amount=10), amount).verdict == "denied"


@pytest.mark.parametrize("to_address", [None, "", "0x12", 5, ["x"]])
def test_invalid_destination_denied_when_list_exists(to_address: Any) -> None:
    current = policy("policy-v2-now", **FREE, allowed_addresses=(DESTINATION,))
    assert verdict(policy(**FREE), current, to_address=to_address).verdict == "denied"


def test_destination_is_known_in_any_spelling() -> None:
    current = policy("policy-v2-now", **FREE, allowed_addresses=(DESTINATION,))
    shouted = DESTINATION.upper().replace("X", "x")
    assert verdict(policy(**FREE), current, to_address=shouted).verdict == "execute"


def test_limits_are_without_effect_where_no_money_moves() -> None:
    limits = policy(max_amount=1, daily_limit=1, allowed_addresses=(ELSEWHERE,))
    task, made = under(limits)
    assert compliance.decide(task, made, 0, rule(task, limits, limits), None).verdict == "execute"
    free = policy("policy-v2-now", **FREE, max_amount=1, daily_limit=1, allowed_addresses=(ELSEWHERE,))
    task, made = under(free)
    generic = changed(made, steps=(*made.steps[:2], changed(made.steps[2], type="generic_action")))
    task = changed(task, plan_hash=generic.hash())
    assert compliance.decide(task, generic, 2, rule(task, free, free), None).verdict == "execute"


def test_plan_that_misquotes_its_policy_is_a_conflict() -> None:
    """Roles that decide nothing can write plans."""
    lenient = POLICY.decide("transfer_funds").model_copy(update=FREE)
    forged = changed(PLAN, policy=lenient, steps=(*PLAN.steps[:2], changed(PLAN.steps[2], **FREE)))
    with pytest.raises(ConflictError, match="document"):
        compliance.decide(changed(TASK, plan_hash=forged.hash()), forged, 2, ruling(), None)
