from __future__ import annotations

from typing import Any

import pytest

from qaes.domain import compliance
from qaes.domain.errors import ConflictError, RefusedError
from qaes.domain.models import Approval, Decision, Task
from qaes.domain.policy import PolicyDecision
from tests.unit.test_planning import POLICY, TRANSFER, plan

PLAN = plan("transfer_funds", TRANSFER)
NOW = "2026-11-23T12:00:00.000Z"
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
APPROVED = Approval(
    step_index=2,
    round=1,
    status="approved",
    plan_hash=PLAN.hash(),
    step_hash=PLAN.steps[2].hash(),
    policy_id="policy-v1-test",
    token="t",
    requested_at=NOW,
    expires_at=NOW,
    decisions=(Decision(subject="bob", approved=True, reason="checked", decided_at=NOW),),
)
CURRENT = POLICY.decide("transfer_funds")


def changed(model: Any, **changes: Any) -> Any:
    return model.model_copy(update=changes)


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
        (2, changed(CURRENT, approvals=2), APPROVED, "await_approval"),
        (2, CURRENT, changed(APPROVED, status="expired"), "expired"),
        (2, CURRENT, changed(APPROVED, step_hash="0" * 64), "denied"),
        (2, CURRENT, changed(APPROVED, plan_hash="0" * 64), "denied"),
        (0, changed(CURRENT, allowed=False), None, "denied"),
        (2, changed(CURRENT, allowed=False), APPROVED, "denied"),
        # A policy that asks for less by now does not take back what the plan was promised to ask for.
        (2, changed(CURRENT, requires_approval=False), None, "await_approval"),
    ],
)
def test_verdicts(step: int, current: PolicyDecision, approval: Approval | None, verdict: str) -> None:
    assert compliance.decide(TASK, PLAN, step, current, approval).verdict == verdict
    if verdict == "execute":
        compliance.check_may_act(TASK, PLAN, step, current, approval)
    else:
        with pytest.raises(RefusedError) as caught:
            compliance.check_may_act(TASK, PLAN, step, current, approval)
        assert caught.value.code == verdict


def test_a_stricter_policy_asks_anew() -> None:
    monitoring = plan("monitor_wallet", {"wallet_address": "0x12"})
    task = changed(TASK, plan_hash=monitoring.hash())
    stricter = changed(POLICY.decide("monitoring"), requires_approval=True)
    assert compliance.decide(task, monitoring, 2, POLICY.decide("monitoring"), None).verdict == "execute"
    assert compliance.decide(task, monitoring, 2, stricter, None).verdict == "await_approval"


def test_no_step_runs_in_a_task_that_has_ended() -> None:
    assert compliance.decide(changed(TASK, status="cancelled"), PLAN, 0, CURRENT, None).verdict == "denied"


def test_another_plan_than_the_recorded_one_is_a_conflict() -> None:
    swapped = changed(PLAN, created_at="2026-11-23T12:00:00.001Z")
    with pytest.raises(ConflictError):
        compliance.decide(TASK, swapped, 0, CURRENT, None)
